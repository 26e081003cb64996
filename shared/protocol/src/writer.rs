//! The one writer of a WebSocket connection, for both ends.
//!
//! Messages wait in two lanes. Short ones (`window`, `cancel`, `error`, `replaced`, `ping`, requests and responses that have next
//! to no body) are control messages and go first. Parts of bodies and what is as long as they are take turns, and at most two
//! such messages are held: the one being written and the one after it. Senders that have more wait in line. So a large body delays short messages by no more than one message
//! and what the socket holds.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, Sink, SinkExt};
use tokio::{
    net::TcpStream,
    sync::{mpsc, oneshot, watch},
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};
use tokio_tungstenite::tungstenite::{
    self, Message,
    protocol::{
        CloseFrame,
        frame::{
            Frame,
            coding::{CloseCode, Data, OpCode},
        },
    },
};

use crate::{frames, message};

/// Longest text, in bytes, that [`MessageSender::send`] takes for a control message: the head of a request or a response with
/// next to no body, as a rule. [`MAX_CONTROL_BURST`] of them are as long as the longest message with a body.
const MAX_CONTROL_MESSAGE_BYTES: usize = 8 * 1024;
/// Control messages that wait.
const MAX_QUEUED_CONTROL_MESSAGES: usize = 64;
/// After so many control messages in a row one with a body has its turn, so that no number of short answers stops a long one.
const MAX_CONTROL_BURST: u32 = 16;
/// Messages with bodies that wait behind the one being written.
const MAX_QUEUED_BODY_MESSAGES: usize = 1;
/// A write that was taken after at least this long shows that the peer reads. A shorter wait may only be for the lock that the
/// reading half holds.
const BLOCKED_AFTER: Duration = Duration::from_millis(2);
/// Most bytes that the system's send buffer holds beyond those in transit, where the system lets us limit it. What is there can
/// no longer be overtaken.
const MAX_UNSENT_BYTES: u32 = 64 * 1024;

/// Keeps the system from queueing much more than what is in transit, so that a control message need not wait behind it, and turns
/// off Nagle's algorithm. Without either a connection only has more latency, so failing is not an error.
pub fn tune(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let _ = socket2::SockRef::from(stream).set_tcp_notsent_lowat(MAX_UNSENT_BYTES);
}

/// Why a message was not queued.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SendError {
    /// There is no room without waiting.
    #[error("too many messages are waiting to be sent")]
    Full,
    /// The connection has ended or is being closed.
    #[error("the connection is closed")]
    Closed,
}

/// Tells when the socket has taken a message.
#[derive(Debug)]
pub struct Receipt(oneshot::Receiver<()>);

impl Receipt {
    /// Waits until the socket has taken the message's last byte.
    ///
    /// # Errors
    /// If the connection ended before.
    pub async fn taken(self) -> Result<(), SendError> {
        self.0.await.map_err(|_| SendError::Closed)
    }

    /// Whether the socket has taken the message.
    pub fn is_taken(&mut self) -> bool {
        self.0.try_recv().is_ok()
    }
}

#[derive(Debug)]
struct Queued {
    text: String,
    taken: oneshot::Sender<()>,
}

impl Queued {
    fn new(text: String) -> (Self, Receipt) {
        let (taken, receipt) = oneshot::channel();
        (Self { text, taken }, Receipt(receipt))
    }
}

/// What the writer has done so far, for those who judge whether the peer is alive.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Progress {
    /// Writes that had to wait and were taken in the end: the peer has read something meanwhile.
    pub unblocked_writes: u64,
    /// Ping frames that were taken by the socket.
    pub ping_frames: u64,
}

#[derive(Debug)]
struct ProgressCounters {
    unblocked_writes: AtomicU64,
    ping_frames: AtomicU64,
    opened: Instant,
    /// When the socket last took a frame, in milliseconds after `opened`.
    last_written: AtomicU64,
}

impl ProgressCounters {
    fn new() -> Self {
        Self {
            unblocked_writes: AtomicU64::new(0),
            ping_frames: AtomicU64::new(0),
            opened: Instant::now(),
            last_written: AtomicU64::new(0),
        }
    }

    fn write_now(&self) {
        let elapsed = self.opened.elapsed().as_millis();
        let milliseconds = u64::try_from(elapsed).unwrap_or(u64::MAX);
        self.last_written.store(milliseconds, Ordering::Relaxed);
    }
}

/// Queues messages for a [`MessageWriter`]. Clones share its lanes. The writer closes the connection when the last clone is gone.
#[derive(Clone, Debug)]
pub struct MessageSender {
    control: mpsc::Sender<Queued>,
    bodies: mpsc::Sender<Queued>,
    close: Arc<watch::Sender<Option<CloseFrame>>>,
    progress: Arc<ProgressCounters>,
}

impl MessageSender {
    /// Queues a message in its lane, and waits for room if need be. Parts of bodies keep their order; of other messages a
    /// shorter one may overtake what was queued before it.
    ///
    /// # Errors
    /// [`SendError::Closed`].
    pub async fn send(&self, text: String) -> Result<Receipt, SendError> {
        if message::is_body_part(&text) || text.len() > MAX_CONTROL_MESSAGE_BYTES {
            self.body(text).await
        } else {
            self.control(text).await
        }
    }

    /// Queues a control message, and waits for room if need be.
    ///
    /// # Errors
    /// [`SendError::Closed`].
    pub async fn control(&self, text: String) -> Result<Receipt, SendError> {
        enqueue(&self.control, text).await
    }

    /// Queues a control message if there is room.
    ///
    /// # Errors
    /// If there is none, or the connection has ended.
    pub fn try_control(&self, text: String) -> Result<Receipt, SendError> {
        let (queued, receipt) = Queued::new(text);
        match self.control.try_send(queued) {
            Ok(()) => Ok(receipt),
            Err(mpsc::error::TrySendError::Full(_)) => Err(SendError::Full),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(SendError::Closed),
        }
    }

    /// Queues a message with a body behind those who wait already.
    ///
    /// # Errors
    /// [`SendError::Closed`].
    pub async fn body(&self, text: String) -> Result<Receipt, SendError> {
        enqueue(&self.bodies, text).await
    }

    /// Has the connection closed with `code` once what is queued has been written. Those who wait for room are refused. Only the
    /// first call counts.
    pub fn close(&self, code: u16, reason: &'static str) {
        self.close.send_if_modified(|close| {
            let is_first = close.is_none();
            if is_first {
                *close = Some(CloseFrame {
                    code: CloseCode::from(code),
                    reason: reason.into(),
                });
            }
            is_first
        });
    }

    /// Completes when the writer has ended.
    pub async fn closed(&self) {
        self.close.closed().await;
    }

    /// What the writer has done so far.
    pub fn progress(&self) -> Progress {
        Progress {
            unblocked_writes: self.progress.unblocked_writes.load(Ordering::Relaxed),
            ping_frames: self.progress.ping_frames.load(Ordering::Relaxed),
        }
    }

    /// When the socket last took a frame, to the millisecond; when the writer was made, if it has taken none yet.
    pub fn last_written(&self) -> Instant {
        let milliseconds = self.progress.last_written.load(Ordering::Relaxed);
        self.progress.opened + Duration::from_millis(milliseconds)
    }
}

async fn enqueue(lane: &mpsc::Sender<Queued>, text: String) -> Result<Receipt, SendError> {
    let (queued, receipt) = Queued::new(text);
    match lane.send(queued).await {
        Ok(()) => Ok(receipt),
        Err(_) => Err(SendError::Closed),
    }
}

/// Writes messages in frames of at most [`crate::limits::MAX_FRAME_BYTES`] to `W`, the sink of a WebSocket connection that was
/// made with [`frames::client_config`] or [`frames::server_config`].
#[derive(Debug)]
pub struct MessageWriter<W> {
    sink: W,
    control: mpsc::Receiver<Queued>,
    bodies: mpsc::Receiver<Queued>,
    close: watch::Receiver<Option<CloseFrame>>,
    ping_frames: Option<Interval>,
    /// Control messages written since the last one with a body.
    control_burst: u32,
    progress: Arc<ProgressCounters>,
}

/// What a writer does next.
enum Next {
    Write(Queued),
    PingFrame,
    Close,
}

impl<W: Sink<Message, Error = tungstenite::Error> + Unpin> MessageWriter<W> {
    /// A writer that also sends a ping frame every `ping_interval`, and the way to queue messages for it.
    pub fn new(sink: W, ping_interval: Option<Duration>) -> (MessageSender, Self) {
        let (control, queued_control) = mpsc::channel(MAX_QUEUED_CONTROL_MESSAGES);
        let (bodies, queued_bodies) = mpsc::channel(MAX_QUEUED_BODY_MESSAGES);
        let (close, close_requested) = watch::channel(None);
        let progress = Arc::new(ProgressCounters::new());
        let ping_frames = ping_interval.map(|period| {
            let mut due = interval_at(Instant::now() + period, period);
            due.set_missed_tick_behavior(MissedTickBehavior::Delay);
            due
        });
        let sender = MessageSender {
            control,
            bodies,
            close: Arc::new(close),
            progress: progress.clone(),
        };
        let writer = Self {
            sink,
            control: queued_control,
            bodies: queued_bodies,
            close: close_requested,
            ping_frames,
            control_burst: 0,
            progress,
        };
        (sender, writer)
    }

    /// Writes until [`MessageSender::close`] is called or all senders are gone, then what is queued and a close frame. The peer's
    /// close frame is for the reading half to wait for. A peer that does not read keeps this waiting: limit it in time.
    ///
    /// # Errors
    /// If the connection has broken.
    pub async fn run(mut self) -> Result<W, tungstenite::Error> {
        loop {
            match self.next().await {
                Next::Write(queued) => self.write(queued).await?,
                Next::PingFrame => self.write_ping_frame().await?,
                Next::Close => break,
            }
        }
        let close = self.close.borrow().clone();
        // A close frame that found no room beside pongs could not be written a second time.
        self.sink.flush().await?;
        self.sink.send(Message::Close(close)).await?;
        Ok(self.sink)
    }

    async fn next(&mut self) -> Next {
        if self.control_burst >= MAX_CONTROL_BURST {
            self.control_burst = 0;
            if let Ok(queued) = self.bodies.try_recv() {
                return Next::Write(queued);
            }
        }
        tokio::select! {
            biased;
            () = ping_frame_due(&mut self.ping_frames) => Next::PingFrame,
            Ok(()) = self.close.changed() => {
                self.control.close();
                self.bodies.close();
                self.next_queued().await
            }
            queued = self.control.recv() => match queued {
                Some(queued) => {
                    self.control_burst += 1;
                    Next::Write(queued)
                }
                None => self.next_queued().await,
            },
            Some(queued) = self.bodies.recv() => {
                self.control_burst = 0;
                Next::Write(queued)
            }
        }
    }

    /// What is left in lanes that take nothing new.
    async fn next_queued(&mut self) -> Next {
        if let Some(queued) = self.control.recv().await {
            return Next::Write(queued);
        }
        self.bodies.recv().await.map_or(Next::Close, Next::Write)
    }

    async fn write(&mut self, queued: Queued) -> Result<(), tungstenite::Error> {
        let mut data = Data::Text;
        for (frame, is_last) in frames::frames(queued.text) {
            let is_ping_frame_due = ping_frame_due(&mut self.ping_frames)
                .now_or_never()
                .is_some();
            if is_ping_frame_due {
                self.write_ping_frame().await?;
            }
            let frame = Frame::message(frame, OpCode::Data(data), is_last);
            self.write_frame(Message::Frame(frame)).await?;
            data = Data::Continue;
        }
        // Not every sender waits for it.
        let _ = queued.taken.send(());
        Ok(())
    }

    async fn write_ping_frame(&mut self) -> Result<(), tungstenite::Error> {
        self.write_frame(Message::Ping(Bytes::new())).await?;
        self.progress.ping_frames.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Writes a frame and waits until the socket has taken it.
    async fn write_frame(&mut self, mut frame: Message) -> Result<(), tungstenite::Error> {
        let began = Instant::now();
        let written = loop {
            match self.sink.send(frame).await {
                // Pongs have taken the room.
                Err(tungstenite::Error::WriteBufferFull(refused)) => {
                    self.sink.flush().await?;
                    frame = *refused;
                }
                written => break written,
            }
        };
        if written.is_ok() {
            self.progress.write_now();
            if began.elapsed() >= BLOCKED_AFTER {
                self.progress
                    .unblocked_writes
                    .fetch_add(1, Ordering::Relaxed);
            }
        }
        written
    }
}

async fn ping_frame_due(ping_frames: &mut Option<Interval>) {
    match ping_frames {
        Some(due) => {
            due.tick().await;
        }
        None => pending().await,
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt, stream::SplitStream};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        task::JoinSet,
        time::timeout,
    };
    use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Role};

    use super::*;
    use crate::{
        id::RequestId,
        limits::MAX_FRAME_BYTES,
        message::{Body, BodyPart, FromAgent, ToAgent},
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
                message::encode(&ToAgent::BodyPart(part.clone())),
                message::encode(&ToAgent::Cancel { request_id }),
            ),
            (
                message::encode(&FromAgent::BodyPart(part)),
                message::encode(&FromAgent::Ping),
            ),
            (
                "x".repeat(MAX_CONTROL_MESSAGE_BYTES + 1),
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
            assert_eq!(next_text(&mut client).await, waits);
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
        for _ in 0..MAX_QUEUED_CONTROL_MESSAGES {
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
        assert!(sender.bodies.try_reserve().is_err(), "there was room");
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
        }
        assert_eq!(sender.progress().unblocked_writes, 0);
        sender.body(long("a")).await.expect("open");
        tokio::time::sleep(Duration::from_secs(1)).await;
        next_text(&mut client).await;
        settle().await;
        assert_eq!(sender.progress().unblocked_writes, 1);
    }

    #[tokio::test]
    async fn a_flood_of_pings_is_answered_from_a_bounded_buffer_and_messages_still_pass() {
        const PINGS: u32 = 100_000;
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
        sender.body(long("a")).await.expect("open");
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
        while answered.iter().filter(is_text).count() < long("a").len()
            || !answered.windows(last.len()).any(|window| window == last)
        {
            let read = answers.read(&mut chunk).await.expect("open");
            answered.extend_from_slice(&chunk[..read]);
        }
        let bound = 8 * 1024 + long("a").len() + 3 * MAX_FRAME_BYTES;
        assert!(answered.len() < bound, "{} bytes", answered.len());
    }
}
