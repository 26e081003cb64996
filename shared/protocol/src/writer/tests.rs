use std::pin::Pin;

use bytes::Bytes;
use futures_util::{StreamExt, stream::SplitStream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    task::JoinSet,
    time::{advance, timeout},
};
use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Role};

use super::{lanes::MAX_CONTROL_BURST, writing::FREQUENT_WRITES, *};
use crate::{
    frames,
    id::RequestId,
    limits::{MAX_CONTROL_MESSAGE_BYTES, MAX_FRAME_BYTES, MAX_MESSAGE_BYTES},
    message::{self, Body, BodyPart, CarriesBody, Format, Framing, FromAgent, Heads, ToAgent},
};

type Socket = WebSocketStream<DuplexStream>;

/// A writer that runs, the reading half beside it, and the raw other end.
struct Writing {
    sender: MessageSender,
    reading: SplitStream<Socket>,
    peer: DuplexStream,
    task: JoinSet<Result<(), tungstenite::Error>>,
}

async fn writing(socket_bytes: usize, ping_interval: Option<Duration>) -> Writing {
    let (ours, peer) = duplex(socket_bytes);
    let config = frames::server_config(MAX_FRAME_BYTES, MAX_FRAME_BYTES);
    let socket = Socket::from_raw_socket(ours, Role::Server, Some(config)).await;
    let (sink, reading) = socket.split();
    let (sender, writer) = MessageWriter::new(sink, ping_interval);
    let mut task = JoinSet::new();
    task.spawn(async move { writer.run().await.map(drop) });
    Writing {
        sender,
        reading,
        peer,
        task,
    }
}

async fn client(peer: DuplexStream) -> Socket {
    Socket::from_raw_socket(peer, Role::Client, Some(frames::client_config())).await
}

async fn next_text(client: &mut Socket) -> String {
    loop {
        match client.next().await.expect("open").expect("no error") {
            Message::Text(text) => return text.as_str().to_owned(),
            Message::Ping(_) | Message::Pong(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn long(name: &str) -> String {
    name.repeat(2 * MAX_FRAME_BYTES)
}

/// Lets everything run that can.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

/// A socket that takes everything, and notes how many messages each write has.
#[derive(Default)]
struct Noting {
    messages: usize,
    writes: Arc<Mutex<Vec<usize>>>,
}

impl Sink<Message> for Noting {
    type Error = tungstenite::Error;

    fn poll_ready(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Result<(), tungstenite::Error>> {
        Poll::Ready(Ok(()))
    }

    fn start_send(mut self: Pin<&mut Self>, _: Message) -> Result<(), tungstenite::Error> {
        self.messages += 1;
        Ok(())
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Result<(), tungstenite::Error>> {
        let messages = mem::take(&mut self.messages);
        self.writes.lock().expect("no panic").push(messages);
        Poll::Ready(Ok(()))
    }

    fn poll_close(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Result<(), tungstenite::Error>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn messages_that_follow_closely_leave_in_one_write_and_lone_ones_at_once() {
    let socket = Noting::default();
    let writes = socket.writes.clone();
    let (sender, writer) = MessageWriter::new(socket, None);
    let mut task = JoinSet::new();
    task.spawn(async move { writer.run().await.map(drop) });
    settle().await;
    let send = || sender.try_control("short".to_owned()).expect("room");
    for _ in 0..2 {
        advance(FREQUENT_WRITES).await;
        assert!(send().is_taken(), "nothing else is to be expected");
    }
    assert!(send().is_taken(), "it is the first that follows closely");
    let mut followers: Vec<_> = (0..10).map(|_| send()).collect();
    assert!(!followers.iter_mut().any(Receipt::is_taken));
    settle().await;
    assert!(followers.iter_mut().all(Receipt::is_taken));
    assert_eq!(*writes.lock().expect("no panic"), [1, 1, 1, 10]);
    // The first of those that are rare again is still waited with.
    advance(FREQUENT_WRITES).await;
    let mut waits = send();
    assert!(!waits.is_taken());
    settle().await;
    assert!(waits.is_taken());
    advance(FREQUENT_WRITES).await;
    assert!(send().is_taken());
}

#[tokio::test]
async fn control_messages_overtake_bodies() {
    let Writing {
        sender,
        peer,
        reading: _reading,
        task: _task,
    } = writing(1024, None).await;
    sender.body(long("a")).await.expect("open");
    settle().await;
    sender.body(long("b")).await.expect("open");
    sender.control("window".to_owned()).await.expect("open");
    let mut client = client(peer).await;
    assert_eq!(next_text(&mut client).await, long("a"));
    assert_eq!(next_text(&mut client).await, "window");
    assert_eq!(next_text(&mut client).await, long("b"));
}

#[tokio::test]
async fn parts_of_bodies_and_long_messages_take_turns_and_short_messages_go_first() {
    let request_id = RequestId::generate();
    let part = BodyPart {
        request_id: request_id.clone(),
        part: 1,
        body: Body("x".into()),
        encoding: None,
        more: true,
        reply_to: None,
    };
    for (waits, overtakes) in [
        (
            message::encode(&ToAgent::BodyPart(part.clone())).into(),
            message::encode(&ToAgent::Cancel { request_id }),
        ),
        (
            message::encode(&FromAgent::BodyPart(part.clone())).into(),
            message::encode(&FromAgent::Ping { id: None }),
        ),
        (
            FromAgent::BodyPart(part).encode_as(Format::Binary(Framing::Short, Heads::Json)),
            message::encode(&FromAgent::Ping { id: None }),
        ),
        (
            Encoded::Text("x".repeat(MAX_CONTROL_MESSAGE_BYTES + 1)),
            "x".repeat(MAX_CONTROL_MESSAGE_BYTES),
        ),
    ] {
        let Writing {
            sender,
            peer,
            reading: _reading,
            task: _task,
        } = writing(1024, None).await;
        sender.body(long("a")).await.expect("open");
        settle().await;
        sender.send(waits.clone()).await.expect("open");
        sender.send(overtakes.clone()).await.expect("open");
        let mut client = client(peer).await;
        assert_eq!(next_text(&mut client).await, long("a"));
        assert_eq!(next_text(&mut client).await, overtakes);
        let last = client.next().await.expect("open").expect("no error");
        let last = match last {
            Message::Text(text) => Encoded::Text(text.as_str().to_owned()),
            last => Encoded::Binary(last.into_data(), Framing::Short),
        };
        assert_eq!(last, waits);
    }
}

#[tokio::test]
async fn no_number_of_control_messages_stops_a_body() {
    let Writing {
        sender,
        peer,
        reading: _reading,
        task: _task,
    } = writing(1024, None).await;
    sender.body(long("a")).await.expect("open");
    settle().await;
    sender.send(long("b")).await.expect("open");
    for _ in 0..4 * MAX_CONTROL_BURST {
        sender.send("short".to_owned()).await.expect("open");
    }
    let mut client = client(peer).await;
    assert_eq!(next_text(&mut client).await, long("a"));
    for _ in 0..MAX_CONTROL_BURST {
        assert_eq!(next_text(&mut client).await, "short");
    }
    assert_eq!(next_text(&mut client).await, long("b"));
    assert_eq!(next_text(&mut client).await, "short");
}

#[tokio::test]
async fn many_requests_at_once_have_room_and_what_waits_is_limited() {
    for (bytes, at_least, at_most) in [(1, 512, 1024), (1000, 256, 1024), (8192, 64, 128)] {
        let Writing {
            sender,
            peer: _peer,
            reading: _reading,
            task: _task,
        } = writing(1024, None).await;
        sender.body(long("a")).await.expect("open");
        settle().await;
        let mut queued = 0;
        let refused = loop {
            match sender.try_control("x".repeat(bytes)) {
                Ok(_) => queued += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(refused, SendError::Full);
        let expected = at_least..at_most;
        assert!(expected.contains(&queued), "{queued} of {bytes} bytes");
    }
}

#[tokio::test]
async fn two_bodies_are_held_and_the_others_take_turns() {
    let Writing {
        sender,
        peer,
        reading: _reading,
        task: _task,
    } = writing(1024, None).await;
    sender.body(long("a")).await.expect("open");
    settle().await;
    sender.body(long("a")).await.expect("open");
    let mut waiting = JoinSet::new();
    for name in ["a", "b", "c"] {
        let sender = sender.clone();
        waiting.spawn(async move {
            for _ in 0..2 {
                sender.body(long(name)).await.expect("open");
            }
        });
        settle().await;
    }
    assert!(
        sender.0.lanes.body_room.try_acquire().is_err(),
        "there was room"
    );
    let mut client = client(peer).await;
    let mut order = String::new();
    for _ in 0..8 {
        order.push_str(&next_text(&mut client).await[..1]);
    }
    assert_eq!(order, "aaabcabc");
}

#[tokio::test]
async fn a_receipt_comes_when_the_socket_has_taken_the_last_byte() {
    let Writing {
        sender,
        mut peer,
        reading: _reading,
        task: _task,
    } = writing(1024, None).await;
    let mut receipt = sender.body("x".repeat(3000)).await.expect("open");
    let mut heard = vec![0; 2000];
    peer.read_exact(&mut heard[..1900]).await.expect("open");
    settle().await;
    assert!(!receipt.is_taken(), "80 bytes do not fit");
    peer.read_exact(&mut heard[..100]).await.expect("open");
    receipt.taken().await.expect("taken");
}

#[tokio::test]
async fn whoever_sends_writes_what_the_socket_takes() {
    let (ours, peer) = duplex(1024);
    let config = frames::server_config(MAX_FRAME_BYTES, MAX_FRAME_BYTES);
    let socket = Socket::from_raw_socket(ours, Role::Server, Some(config)).await;
    let (sender, _does_not_run) = MessageWriter::new(socket, None);
    let mut receipt = sender.control("short".to_owned()).await.expect("open");
    assert!(receipt.is_taken());
    assert_eq!(next_text(&mut client(peer).await).await, "short");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_senders_at_once_each_has_its_message_taken() {
    const SENDERS: usize = 16;
    const MESSAGES: usize = 500;
    let Writing {
        sender,
        peer,
        reading: _reading,
        task: _task,
    } = writing(1024, None).await;
    let mut sending = JoinSet::new();
    for number in 0..SENDERS {
        let sender = sender.clone();
        sending.spawn(async move {
            for _ in 0..MESSAGES {
                let text = "x".repeat(1 + number * 100);
                let receipt = match number % 2 {
                    0 => sender.control(text).await,
                    _ => sender.body(text).await,
                };
                receipt.expect("open").taken().await.expect("taken");
            }
        });
    }
    let mut client = client(peer).await;
    for _ in 0..SENDERS * MESSAGES {
        next_text(&mut client).await;
    }
    sending.join_all().await;
}

#[tokio::test]
async fn a_message_that_was_not_taken_has_no_receipt() {
    let Writing {
        sender,
        reading,
        peer,
        task,
    } = writing(1024, None).await;
    let receipt = sender.body(long("a")).await.expect("open");
    drop((peer, reading, task));
    assert_eq!(receipt.taken().await, Err(SendError::Closed));
    assert_eq!(
        sender.control(String::new()).await.map(drop),
        Err(SendError::Closed)
    );
    sender.closed().await;
}

#[tokio::test]
async fn closing_sends_what_is_queued_and_accepts_nothing_more() {
    let Writing {
        sender,
        peer,
        reading: _reading,
        task: _task,
    } = writing(1024, None).await;
    sender.body(long("a")).await.expect("open");
    settle().await;
    sender.body(long("b")).await.expect("open");
    sender.control("cancel".to_owned()).await.expect("open");
    sender.close(1001, "going away");
    sender.close(1000, "too late");
    settle().await;
    let mut client = client(peer).await;
    assert_eq!(next_text(&mut client).await, long("a"));
    assert_eq!(next_text(&mut client).await, "cancel");
    assert_eq!(next_text(&mut client).await, long("b"));
    let close = client.next().await.expect("open").expect("no error");
    let expected = CloseFrame {
        code: CloseCode::Away,
        reason: "going away".into(),
    };
    assert_eq!(close, Message::Close(Some(expected)));
    let refused = sender.body(String::new()).await.map(drop);
    assert_eq!(refused, Err(SendError::Closed));
}

#[tokio::test]
async fn the_connection_is_closed_when_all_senders_are_gone() {
    let Writing {
        sender,
        peer,
        reading: _reading,
        mut task,
    } = writing(1024 * 1024, None).await;
    sender.control("last".to_owned()).await.expect("open");
    drop(sender);
    let mut client = client(peer).await;
    assert_eq!(next_text(&mut client).await, "last");
    assert_eq!(
        client.next().await.expect("open").expect("no error"),
        Message::Close(None)
    );
    let ended = task.join_next().await.expect("one").expect("no panic");
    ended.expect("as asked");
}

#[tokio::test(start_paused = true)]
async fn ping_frames_go_out_at_their_interval_and_only_blocked_writes_are_progress() {
    let period = Duration::from_secs(5);
    let Writing {
        sender,
        peer,
        reading: _reading,
        task: _task,
    } = writing(1024, Some(period)).await;
    let mut client = client(peer).await;
    for sent in 0..3 {
        assert_eq!(sender.progress().ping_frames, sent);
        let ping = timeout(2 * period, client.next()).await.expect("in time");
        let ping = ping.expect("open").expect("no error");
        assert_eq!(ping, Message::Ping(Bytes::new()));
        settle().await;
        assert_eq!(sender.last_ping_frame(), Instant::now());
    }
    assert_eq!(sender.progress().unblocked_writes, 0);
    assert!(!sender.progress().is_blocked);
    sender.body(long("a")).await.expect("open");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(sender.progress().is_blocked);
    next_text(&mut client).await;
    settle().await;
    assert_eq!(sender.progress().unblocked_writes, 1);
    assert!(!sender.progress().is_blocked);
}

#[tokio::test]
async fn a_flood_of_pings_is_answered_from_a_bounded_buffer_and_messages_still_pass() {
    let body = Bytes::from("a".repeat(MAX_MESSAGE_BYTES));
    for message in [long("a").into(), Encoded::Binary(body, Framing::Whole)] {
        flood_with_pings(message).await;
    }
}

/// Reads nothing but pings while this message, of one letter, is to be sent.
async fn flood_with_pings(message: Encoded) {
    const PINGS: u32 = 100_000;
    let length = message.length();
    let Writing {
        sender,
        mut reading,
        peer,
        mut task,
    } = writing(8 * 1024, None).await;
    task.spawn(async move {
        while reading.next().await.is_some() {}
        Ok(())
    });
    let (mut answers, mut peer) = tokio::io::split(peer);
    sender.body(message).await.expect("open");
    let mut pings = Vec::new();
    for number in 0..PINGS {
        // Final, ping, masked with zeros, 125 bytes.
        pings.extend([0x89, 0x80 | 125, 0, 0, 0, 0]);
        pings.extend([0; 121]);
        pings.extend(number.to_be_bytes());
    }
    // All of it is read though no answer is.
    peer.write_all(&pings).await.expect("read");
    settle().await;
    let mut answered = Vec::new();
    let mut chunk = [0; 64 * 1024];
    let last = (PINGS - 1).to_be_bytes();
    let is_text = |byte: &&u8| **byte == b'a';
    while answered.iter().filter(is_text).count() < length
        || !answered.windows(last.len()).any(|window| window == last)
    {
        let read = answers.read(&mut chunk).await.expect("open");
        answered.extend_from_slice(&chunk[..read]);
    }
    let bound = 8 * 1024 + length + MAX_MESSAGE_BYTES + 3 * MAX_FRAME_BYTES;
    assert!(answered.len() < bound, "{} bytes", answered.len());
}
