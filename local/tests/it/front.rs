//! The socket between visitors and the service: who leaves, who stays, and what breaks is seen.

use std::{collections::HashSet, io::ErrorKind, time::Duration};

use local::{Options, Server};
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::harness::{Origin, ScriptedAgent, agent, raw, response, stack, stack_with, within};

const ASK: &str = "GET /my-app/x HTTP/1.1\r\nhost: localhost\r\n\r\n";

const ASK_1_0: &str = "GET /my-app/x HTTP/1.0\r\n\r\n";

async fn visitor(stack: &Server, request: &[u8]) -> TcpStream {
    let authority = stack.public_url.to_string().split_off("http://".len());
    let mut stream = TcpStream::connect(authority).await.expect("a connection");
    stream.write_all(request).await.expect("sent");
    stream
}

/// An agent that can be told that visitors have left.
async fn online(stack: &Server) -> ScriptedAgent {
    let mut agent = ScriptedAgent::connect(stack, "?tunnel_id=my-app").await;
    agent
        .ready(&json!({ "type": "ready", "features": ["body_parts", "cancel", "window"] }))
        .await;
    agent
}

async fn request_id(agent: &mut ScriptedAgent) -> String {
    let request = agent.hear().await;
    assert_eq!(request["type"], "http_request", "{request}");
    request["request_id"].as_str().expect("an id").to_owned()
}

#[tokio::test]
async fn a_visitor_that_leaves_is_noticed_whatever_it_sent_before() {
    let stack = stack().await;
    let mut agent = online(&stack).await;
    for (what, behind) in [
        ("nothing", Some("")),
        ("one byte", Some("X")),
        ("a request", Some(ASK)),
        ("more than the socket takes", None),
    ] {
        for by_reset in [false, true] {
            let mut stream = visitor(&stack, ASK.as_bytes()).await;
            let id = request_id(&mut agent).await;
            match behind {
                Some(behind) => stream.write_all(behind.as_bytes()).await.expect("sent"),
                None => fill(&mut stream).await,
            }
            if by_reset {
                stream.set_zero_linger().expect("set");
            }
            drop(stream);
            let heard = agent.hear().await;
            assert_eq!(
                heard,
                json!({ "type": "cancel", "request_id": id }),
                "{what} behind, by reset: {by_reset}"
            );
        }
    }
}

/// Sends bytes until no more are taken, however often that is tried: once could be a busy machine.
pub(crate) async fn fill(stream: &mut (impl AsyncWrite + Unpin)) {
    let chunk = vec![b'A'; 100_000];
    let (mut taken, mut refused) = (0, 0);
    while refused < 5 {
        match timeout(Duration::from_millis(100), stream.write(&chunk)).await {
            Ok(sent) => {
                taken += sent.expect("open");
                refused = 0;
            }
            Err(_) => refused += 1,
        }
        assert!(taken < 49_000_000, "all of it was taken");
    }
}

/// Sends as much of an upload as is taken.
async fn upload(stream: &mut (impl AsyncWrite + Unpin), framing: &str) {
    let head = format!("POST /my-app/x HTTP/1.1\r\nhost: localhost\r\n{framing}");
    stream.write_all(head.as_bytes()).await.expect("sent");
    fill(stream).await;
}

/// A body of 50 MB, by its length and as one chunk.
const UPLOADS: [&str; 2] = [
    "content-length: 50000000\r\n\r\n",
    "transfer-encoding: chunked\r\n\r\n2faf080\r\n",
];

/// Visitors send uploads over connections that `connect` opens, nobody reads any, and all but the first two leave. Those get their
/// answers.
pub(crate) async fn leave_uploads<S: AsyncRead + AsyncWrite + Send + Unpin>(
    agent: &mut ScriptedAgent,
    connect: impl AsyncFn() -> S,
    set_reset: impl Fn(&S),
) {
    let mut forwarded = connect().await;
    let by_proxy = format!("x-forwarded-for: 192.0.2.1\r\n{}", UPLOADS[0]);
    upload(&mut forwarded, &by_proxy).await;
    let answered_to_proxy = agent.hear_type("http_request").await;
    let mut staying = connect().await;
    upload(&mut staying, UPLOADS[0]).await;
    let answered = agent.hear_type("http_request").await;
    let mut leaving = HashSet::new();
    let mut streams = Vec::new();
    for framing in UPLOADS {
        for by_reset in [false, true] {
            let mut stream = connect().await;
            upload(&mut stream, framing).await;
            if by_reset {
                set_reset(&stream);
            }
            streams.push(stream);
            let request = agent.hear_type("http_request").await;
            leaving.insert(request["request_id"].to_string());
        }
    }
    drop(streams);
    while !leaving.is_empty() {
        let cancel = agent.hear_type("cancel").await;
        assert!(
            leaving.remove(&cancel["request_id"].to_string()),
            "{cancel}"
        );
    }
    // It is asked whether it is there, in a way that means nothing.
    read_past(&mut staying, "HTTP/1.1 100 Continue\r\n\r\n").await;
    // A proxy is not: nginx would pass that on as the response.
    for (request, stream) in [
        (&answered, &mut staying),
        (&answered_to_proxy, &mut forwarded),
    ] {
        agent.say(&response(request, "aGVsbG8=")).await;
        let answer = read_past(stream, "hello").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    }
}

#[tokio::test]
async fn a_visitor_that_leaves_an_upload_that_nobody_reads_is_noticed() {
    let stack = stack().await;
    let mut agent = online(&stack).await;
    let connect = async || {
        TcpStream::connect(stack.address)
            .await
            .expect("a connection")
    };
    let set_reset = |stream: &TcpStream| stream.set_zero_linger().expect("set");
    leave_uploads(&mut agent, connect, set_reset).await;
}

#[tokio::test]
async fn a_visitor_that_half_closes_after_its_request_gets_its_answer() {
    let stack = stack().await;
    let mut agent = online(&stack).await;
    for request in [ASK, ASK_1_0] {
        let mut stream = visitor(&stack, request.as_bytes()).await;
        stream.shutdown().await.expect("ended");
        let id = request_id(&mut agent).await;
        // Long enough for the front to ask whether it is still there.
        tokio::time::sleep(Duration::from_millis(1_300)).await;
        agent
            .say(&json!({ "type": "http_response", "request_id": id, "status_code": 200, "headers": { "content-length": ["5"] }, "body": "aGVsbG8=" }))
            .await;
        let mut answer = String::new();
        within("the answer", stream.read_to_string(&mut answer))
            .await
            .expect("an answer");
        assert!(answer.ends_with("\r\n\r\nhello"), "{answer}");
        let last = answer.rfind("HTTP/1.").expect("a head");
        assert!(answer[last..].contains(" 200 OK"), "{answer}");
    }
}

/// What a visitor gets that ends its side of the connection `when` the response to `request` has come so far.
async fn half_closed_answer(
    stack: &Server,
    request: &str,
    length: bool,
    when: HalfClose,
) -> String {
    let mut agent = online(stack).await;
    let mut stream = visitor(stack, request.as_bytes()).await;
    if when == HalfClose::AtOnce {
        stream.shutdown().await.expect("ended");
    }
    let id = request_id(&mut agent).await;
    let headers = if length {
        json!({ "content-length": ["10"] })
    } else {
        json!({})
    };
    agent
        .say(&json!({ "type": "http_response", "request_id": id, "status_code": 200, "headers": headers, "body": "aGVsbG8=", "more": true }))
        .await;
    let mut answer = Vec::new();
    if when != HalfClose::AtOnce {
        while !String::from_utf8_lossy(&answer).contains("hello") {
            within("the first bytes", stream.read_buf(&mut answer))
                .await
                .expect("open");
        }
        if when == HalfClose::InSilence {
            sleep(Duration::from_millis(600)).await;
        }
        stream.shutdown().await.expect("ended");
    }
    // Long enough for the front to notice, and to ask.
    sleep(Duration::from_millis(900)).await;
    agent
        .say(&json!({ "type": "body_part", "request_id": id, "part": 1, "body": "d29ybGQ=", "more": false }))
        .await;
    within("the rest", stream.read_to_end(&mut answer))
        .await
        .expect("an answer");
    String::from_utf8(answer).expect("text")
}

/// What a chunked body carries. It must be complete, and end where `text` does.
fn unchunked(text: &str) -> String {
    let mut lines = text.split("\r\n");
    let mut body = String::new();
    loop {
        let size = lines.next().expect("a size");
        let chunk = lines.next().expect("a chunk");
        assert_eq!(Ok(chunk.len()), usize::from_str_radix(size, 16), "{text}");
        if chunk.is_empty() {
            assert_eq!(lines.collect::<Vec<_>>(), [""], "{text}");
            return body;
        }
        body += chunk;
    }
}

/// When a visitor ends its side of the connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum HalfClose {
    AtOnce,
    AfterTheFirstBytes,
    InSilence,
}

#[tokio::test]
async fn a_visitor_that_half_closes_at_any_time_gets_its_whole_answer() {
    let stack = stack().await;
    for when in [
        HalfClose::AtOnce,
        HalfClose::AfterTheFirstBytes,
        HalfClose::InSilence,
    ] {
        for (request, length) in [(ASK, false), (ASK, true), (ASK_1_0, false), (ASK_1_0, true)] {
            let answer = half_closed_answer(&stack, request, length, when).await;
            let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
            assert!(head.contains(" 200 OK"), "{when:?} {request}: {answer}");
            let body = if head.contains("transfer-encoding: chunked") {
                unchunked(body)
            } else {
                body.to_owned()
            };
            assert_eq!(body, "helloworld", "{when:?} {request}");
        }
    }
}

#[tokio::test]
async fn a_visitor_that_leaves_a_silent_stream_is_noticed_whatever_it_sent_before() {
    let stack = stack().await;
    let mut agent = online(&stack).await;
    for behind in ["", "X", ASK] {
        for by_reset in [false, true] {
            let mut stream = visitor(&stack, ASK.as_bytes()).await;
            let id = request_id(&mut agent).await;
            agent
                .say(&json!({ "type": "http_response", "request_id": id, "status_code": 200, "body": "aGVsbG8=", "more": true }))
                .await;
            let mut got = Vec::new();
            while !got.ends_with(b"hello\r\n") {
                within("the first bytes", stream.read_buf(&mut got))
                    .await
                    .expect("open");
            }
            stream.write_all(behind.as_bytes()).await.expect("sent");
            if by_reset {
                stream.set_zero_linger().expect("set");
            }
            drop(stream);
            let heard = agent.hear().await;
            assert_eq!(
                heard,
                json!({ "type": "cancel", "request_id": id }),
                "{behind:?} behind, by reset: {by_reset}"
            );
        }
    }
}

#[tokio::test]
async fn a_visitor_that_leaves_a_response_with_a_length_is_noticed_with_its_next_bytes() {
    let stack = stack().await;
    let mut agent = online(&stack).await;
    for request in [ASK, ASK_1_0] {
        let mut stream = visitor(&stack, request.as_bytes()).await;
        let id = request_id(&mut agent).await;
        agent
            .say(&json!({ "type": "http_response", "request_id": id, "status_code": 200, "headers": { "content-length": ["15"] }, "body": "aGVsbG8=", "more": true }))
            .await;
        let mut got = Vec::new();
        while !got.ends_with(b"hello") {
            within("the first bytes", stream.read_buf(&mut got))
                .await
                .expect("open");
        }
        drop(stream);
        agent
            .say(&json!({ "type": "body_part", "request_id": id, "part": 1, "body": "d29ybGQ=", "more": true }))
            .await;
        let heard = agent.hear().await;
        assert_eq!(heard, json!({ "type": "cancel", "request_id": id }));
    }
}

/// Answers each request with a head and `body`, and then with an error.
async fn broken_response(
    stack: &Server,
    request: &str,
    headers: serde_json::Value,
) -> (Vec<u8>, std::io::Result<()>) {
    let mut agent = online(stack).await;
    let mut stream = visitor(stack, request.as_bytes()).await;
    let id = request_id(&mut agent).await;
    agent
        .say(&json!({ "type": "http_response", "request_id": id, "status_code": 200, "headers": headers, "body": "aGVsbG8=", "more": true }))
        .await;
    agent
        .say(&json!({ "type": "error", "request_id": id, "code": "local_service_unavailable", "message": "it broke off" }))
        .await;
    let mut got = Vec::new();
    let end = loop {
        match within("the end", stream.read_buf(&mut got)).await {
            Ok(0) => break Ok(()),
            Ok(_) => {}
            Err(error) => break Err(error),
        }
    };
    (got, end)
}

#[tokio::test]
async fn a_response_that_breaks_off_arrives_as_far_as_it_came_and_is_seen_to_be_broken() {
    let stack = stack().await;
    let (got, _) = broken_response(&stack, ASK, json!({})).await;
    let got = String::from_utf8(got).expect("text");
    assert!(got.starts_with("HTTP/1.1 200 OK\r\n"), "{got}");
    assert!(
        got.ends_with("\r\n\r\n5\r\nhello\r\n"),
        "no last chunk: {got}"
    );

    let (got, _) = broken_response(&stack, ASK, json!({ "content-length": ["50"] })).await;
    let got = String::from_utf8(got).expect("text");
    assert!(got.contains("content-length: 50"), "{got}");
    assert!(got.ends_with("\r\n\r\nhello"), "{got}");

    let (got, end) = broken_response(&stack, ASK_1_0, json!({})).await;
    let got = String::from_utf8(got).expect("text");
    assert!(got.ends_with("\r\n\r\nhello"), "{got}");
    let error = end.expect_err("only a reset shows an HTTP/1.0 visitor that this is not all");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

/// What a visitor gets whose agent says these things of its request, in this order.
async fn answer_of(stack: &Server, said: &[serde_json::Value]) -> String {
    let mut agent = online(stack).await;
    let last = ASK.replacen("host", "connection: close\r\nhost", 1);
    let mut stream = visitor(stack, last.as_bytes()).await;
    let id = request_id(&mut agent).await;
    for message in said {
        let mut message = message.clone();
        message["request_id"] = json!(id);
        agent.say(&message).await;
        // Long enough for the request to see it before the next one comes.
        sleep(Duration::from_millis(100)).await;
    }
    let mut answer = Vec::new();
    within("the end", stream.read_to_end(&mut answer))
        .await
        .expect("closed");
    String::from_utf8(answer).expect("text")
}

#[tokio::test]
async fn an_error_that_overtakes_what_was_sent_before_it_takes_nothing_away() {
    let stack = stack().await;
    let head =
        json!({ "type": "http_response", "status_code": 200, "body": "aGVsbG8=", "more": true });
    let part = json!({ "type": "body_part", "part": 1, "body": "d29ybGQ=", "more": true });
    let error = json!({ "type": "error", "code": "local_service_unavailable", "parts": 2 });
    for said in [
        [error.clone(), head.clone(), part.clone()],
        [head.clone(), error.clone(), part.clone()],
        [part.clone(), error.clone(), head.clone()],
        [head.clone(), part.clone(), error.clone()],
    ] {
        let answer = answer_of(&stack, &said).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(
            answer.ends_with("\r\n\r\n5\r\nhello\r\n5\r\nworld\r\n"),
            "no last chunk: {answer}"
        );
    }
    let nothing_sent = json!({ "type": "error", "code": "local_service_unavailable" });
    let answer = answer_of(&stack, &[nothing_sent]).await;
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
}

/// A local service that answers each request by its head alone, and ends its side.
async fn hasty_service() -> (std::net::SocketAddr, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let mut open = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.windows(4).any(|end| end == b"\r\n\r\n") {
                if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
                    break;
                }
            }
            let answer = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 5\r\n\r\nlarge";
            let _ = stream.write_all(answer).await;
            let _ = stream.shutdown().await;
            open.push(stream);
        }
    });
    (address, serving)
}

#[tokio::test]
async fn a_visitor_that_sends_everything_before_it_reads_gets_an_early_answer() {
    const LENGTH: usize = 20_000_000;
    let stack = stack().await;
    let (address, _serving) = hasty_service().await;
    let settings = crate::harness::settings(&stack, address);
    let _agent = crate::harness::Agent::online(settings).await;
    let head =
        format!("POST /my-app/ HTTP/1.1\r\nhost: localhost\r\ncontent-length: {LENGTH}\r\n\r\n");
    let mut stream = visitor(&stack, head.as_bytes()).await;
    within("all to be sent", stream.write_all(&vec![b'x'; LENGTH]))
        .await
        .expect("sent");
    let mut answer = String::new();
    within("the answer", stream.read_to_string(&mut answer))
        .await
        .expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert!(answer.ends_with("\r\n\r\nlarge"), "{answer}");
}

/// Reads an answer until this text has come, and returns what has.
async fn read_past(stream: &mut (impl AsyncRead + Unpin), text: &str) -> String {
    let mut answer = Vec::new();
    loop {
        let so_far = String::from_utf8_lossy(&answer);
        if so_far.contains(text) {
            return so_far.into_owned();
        }
        let read = within("an answer", stream.read_buf(&mut answer)).await;
        assert_ne!(read.expect("read"), 0, "no {text} in {answer:?}");
    }
}

/// After how many seconds the stack closes a connection on which nothing more is said, and what it sent until then.
async fn closed_after(stream: &mut TcpStream) -> (u64, Vec<u8>) {
    tokio::time::pause();
    let began = Instant::now();
    let mut last_words = Vec::new();
    let end = timeout(
        Duration::from_secs(120),
        stream.read_to_end(&mut last_words),
    );
    end.await.expect("an end").expect("read");
    let elapsed = began.elapsed();
    tokio::time::resume();
    (elapsed.as_secs(), last_words)
}

#[tokio::test]
async fn a_connection_that_sends_no_whole_head_is_closed_after_thirty_seconds() {
    let stack = stack().await;
    for sent in ["", "GET /_health HTTP/1.1\r\nhost: local"] {
        let mut stream = visitor(&stack, sent.as_bytes()).await;
        let (seconds, answer) = closed_after(&mut stream).await;
        assert!((29..=31).contains(&seconds), "{sent:?}: {seconds} s");
        assert_eq!(answer, b"", "{sent:?}");
    }
    let request = b"GET /_health HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut stream = visitor(&stack, request).await;
    read_past(&mut stream, r#"{"status":"ok"}"#).await;
    let (seconds, _) = closed_after(&mut stream).await;
    assert!((29..=31).contains(&seconds), "after an answer: {seconds} s");
}

#[tokio::test]
async fn an_agent_that_says_nothing_for_thirty_seconds_is_closed() {
    let stack = stack().await;
    let handshake = b"GET /_ws?tunnel_id=my-app HTTP/1.1\r\nhost: localhost\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let mut stream = visitor(&stack, handshake).await;
    read_past(&mut stream, "\r\n\r\n").await;
    let (seconds, frames) = closed_after(&mut stream).await;
    // It has a little time to agree.
    assert!((30..=35).contains(&seconds), "{seconds} s");
    let frames = String::from_utf8_lossy(&frames);
    assert!(frames.contains("silent for too long"), "{frames}");
}

#[tokio::test]
async fn an_upload_that_stands_still_after_its_answer_is_cancelled_after_a_minute() {
    let stack = stack().await;
    let mut agent = online(&stack).await;
    let head = b"POST /my-app/ HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nbegin";
    let mut stream = visitor(&stack, head).await;
    let id = request_id(&mut agent).await;
    let answer = json!({ "type": "http_response", "request_id": id, "status_code": 200, "headers": {}, "body": "ZWFybHk=" });
    agent.say(&answer).await;
    read_past(&mut stream, "early").await;
    let pass = async |seconds| {
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(seconds)).await;
        tokio::time::resume();
    };
    for _ in 0..3 {
        pass(19).await;
        agent.expect_quiet("cancelled too soon").await;
    }
    pass(4).await;
    assert_eq!(
        agent.hear().await,
        json!({ "type": "cancel", "request_id": id })
    );
}

#[tokio::test]
async fn an_upload_that_goes_on_after_its_answer_may_take_longer_than_a_head() {
    let stack = stack().await;
    let mut agent = online(&stack).await;
    let head = b"POST /my-app/ HTTP/1.1\r\nhost: localhost\r\ncontent-length: 30\r\n\r\nbegin";
    let mut stream = visitor(&stack, head).await;
    let id = request_id(&mut agent).await;
    let answer = json!({ "type": "http_response", "request_id": id, "status_code": 200, "headers": {}, "body": "ZWFybHk=" });
    agent.say(&answer).await;
    read_past(&mut stream, "early").await;
    for part in 1..=5 {
        // Time passes in steps in which the connection is checked.
        for _ in 0..20 {
            tokio::time::pause();
            tokio::time::advance(Duration::from_millis(500)).await;
            tokio::time::resume();
            tokio::task::yield_now().await;
        }
        stream.write_all(b"later").await.expect("sent");
        let said = agent.hear().await;
        assert_eq!(said["type"], "body_part", "part {part}: {said}");
        assert_eq!(said["body"], "bGF0ZXI=", "part {part}: {said}");
        assert_eq!(
            said["more"].as_bool().unwrap_or_default(),
            part < 5,
            "{said}"
        );
    }
}

/// How a local service answers that does not read the whole request.
#[derive(Clone, Copy, Debug)]
struct EarlyAnswer {
    /// How much it reads of the body first.
    reads: usize,
    /// How long the body of its answer is.
    length: usize,
    /// It resets the connection; otherwise it closes it with the rest unread, which resets it as well, but a little later.
    resets: bool,
}

impl EarlyAnswer {
    async fn give(self, mut stream: TcpStream) {
        let mut request = Vec::new();
        let head_end = loop {
            if let Some(at) = request.windows(4).position(|end| end == b"\r\n\r\n") {
                break at + 4;
            }
            stream.read_buf(&mut request).await.expect("a request");
        };
        while request.len() < head_end + self.reads {
            stream.read_buf(&mut request).await.expect("a body");
        }
        let length = self.length;
        let mut answer =
            format!("HTTP/1.1 413 Content Too Large\r\ncontent-length: {length}\r\n\r\n")
                .into_bytes();
        answer.resize(answer.len() + length, b'l');
        stream.write_all(&answer).await.expect("sent");
        if self.resets {
            stream.set_zero_linger().expect("set");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_answer_outlives_the_connection_that_it_came_on() {
    const LENGTH: usize = 2_000_000;
    let stack = stack().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let settings = crate::harness::settings(&stack, listener.local_addr().expect("an address"));
    let _agent = crate::harness::Agent::online(settings).await;
    let chunk = [b"10000\r\n", &[b'x'; 0x10000][..], b"\r\n"].concat();
    let chunked = [chunk.repeat(LENGTH / 0x10000), b"0\r\n\r\n".to_vec()].concat();
    let whole = vec![b'x'; LENGTH];
    for (reads, length, resets) in [
        (0, 0, false),
        (0, 0, true),
        (0, 20_000, false),
        (0, 20_000, true),
        (1, 5, true),
        (100_000, 5, false),
        (100_000, 20_000, true),
    ] {
        let early = EarlyAnswer {
            reads,
            length,
            resets,
        };
        for (framing, body) in [
            (format!("content-length: {LENGTH}"), &whole),
            ("transfer-encoding: chunked".to_owned(), &chunked),
        ] {
            let head = format!(
                "POST /my-app/ HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{framing}\r\n\r\n"
            );
            let visiting = async {
                let mut stream = visitor(&stack, head.as_bytes()).await;
                stream.write_all(body).await.expect("sent");
                let mut answer = String::new();
                stream.read_to_string(&mut answer).await.expect("an answer");
                answer
            };
            let serving = async {
                let (stream, _) = listener.accept().await.expect("a connection");
                early.give(stream).await;
            };
            let both = async { tokio::join!(visiting, serving) };
            let (answer, ()) = within("the answer", both).await;
            assert!(
                answer.starts_with("HTTP/1.1 413 "),
                "{early:?} {framing}: {answer}"
            );
            assert!(
                answer.ends_with(&format!("\r\n\r\n{}", "l".repeat(length))),
                "{early:?} {framing}: {answer}"
            );
        }
    }
}

#[tokio::test]
async fn requests_this_front_cannot_serve_are_answered_with_a_code() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let _agent = agent(&stack, &origin).await;
    for (request, status, code) in [
        ("GET /my-app/ HTTP/1.1\r\n\r\n", 400, "bad_request"),
        (
            "GET /my-app/ HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
            400,
            "bad_request",
        ),
        (
            "GET /my-app/ HTTP/1.1\r\nhost: a b/c\r\n\r\n",
            400,
            "bad_request",
        ),
        (
            "GET /my-app/ HTTP/1.1\r\nhost: evil.example\r\n\r\n",
            421,
            "foreign_host",
        ),
        (
            "GET /_status/my-app HTTP/1.1\r\nhost: evil.example\r\n\r\n",
            421,
            "foreign_host",
        ),
        (
            "POST /my-app/ HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
            501,
            "unsupported_encoding",
        ),
        (
            "POST /my-app/ HTTP/1.1\r\nhost: x\r\ncontent-length: 18446744073709551615\r\n\r\n",
            413,
            "too_large",
        ),
        (
            "GET /my-app/ HTTP/2.0\r\nhost: x\r\n\r\n",
            400,
            "bad_request",
        ),
    ] {
        let request = request.replacen("\r\n", "\r\nconnection: close\r\n", 1);
        let answer = raw(&stack, request.as_bytes()).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{request}: {answer}"
        );
        assert!(
            answer.contains(&format!("x-tunnel-error: {code}\r\n")),
            "{request}: {answer}"
        );
        assert!(answer.contains("connection: close"), "{request}: {answer}");
    }
    assert_eq!(origin.count(), 0);
}

#[tokio::test]
async fn a_head_that_is_too_long_is_refused_with_a_code() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let _agent = agent(&stack, &origin).await;
    let long = format!(
        "GET /my-app/ HTTP/1.1\r\nhost: x\r\na: {}\r\n\r\n",
        "a".repeat(70_000)
    );
    let answer = raw(&stack, long.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    assert!(
        answer.contains("x-tunnel-error: head_too_large"),
        "{answer}"
    );
    assert_eq!(origin.count(), 0);
}

#[tokio::test]
async fn every_request_of_a_connection_is_checked_even_pipelined_ones() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let _agent = agent(&stack, &origin).await;
    let post = "POST /my-app/ HTTP/1.1\r\nhost: x\r\n";
    let good = format!("{post}transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n");
    let split = format!("{post}content-length: 5\r\nx: ");
    let rest = "y\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";

    let mut stream = visitor(&stack, format!("{good}{good}{split}").as_bytes()).await;
    let mut answers = Vec::new();
    while String::from_utf8_lossy(&answers).matches("hello").count() < 2 {
        within("two answers", stream.read_buf(&mut answers))
            .await
            .expect("open");
    }
    stream.write_all(rest.as_bytes()).await.expect("sent");
    within("the end", stream.read_to_end(&mut answers))
        .await
        .expect("closed");
    let answers = String::from_utf8_lossy(&answers);

    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 2, "{answers}");
    assert_eq!(answers.matches("HTTP/1.1 400").count(), 1, "{answers}");
    assert_eq!(origin.count(), 2);
}

#[tokio::test]
async fn characters_not_allowed_in_an_address_arrive_escaped() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let _agent = agent(&stack, &origin).await;
    let request = "GET /my-app/<a>\u{e9}?q={job=\"x\"}&\u{e9} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let answer = raw(&stack, request.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert_eq!(origin.last().uri, "/%3Ca%3E%C3%A9?q={job=%22x%22}&%C3%A9");
}

#[tokio::test]
async fn on_a_public_server_a_foreign_host_reaches_no_local_service() {
    let public = Options {
        public_url: Some("http://t.example.com:8080".parse().expect("a URL")),
        auth: tunnel_service::auth::AuthMode::Token,
        ..Options::default()
    };
    let mut stack = stack_with(public).await;
    let token = stack.first_token.take().expect("a first token");
    let origin = Origin::echo().await;
    let address = stack.address;
    let mut settings = crate::harness::settings_for(&format!("ws://{address}/_ws"), origin.address);
    settings.token = Some(token.into());
    let _agent = crate::harness::Agent::online(settings).await;

    for host in ["evil.example", "T.Example.com."] {
        let request = format!("GET /my-app/ HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        let mut stream = TcpStream::connect(address).await.expect("a connection");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        within("the answer", stream.read_to_string(&mut answer))
            .await
            .expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let expected = if host == "evil.example" {
            "t.example.com:8080"
        } else {
            host
        };
        assert_eq!(
            origin.last().header("x-forwarded-host"),
            Some(expected),
            "{host}"
        );
    }
}

#[tokio::test]
async fn the_path_of_a_tunnel_with_a_subdomain_leads_there_with_the_method_and_the_query() {
    let stack = stack_with(Options {
        public_url: Some("http://t.example.com:8080".parse().expect("a URL")),
        auth: tunnel_service::auth::AuthMode::Token,
        routing: tunnel_service::routing::Routing::Subdomain,
        ..Options::default()
    })
    .await;
    let mut stream = TcpStream::connect(stack.address)
        .await
        .expect("a connection");
    let request = b"POST /my-app/form?a=1 HTTP/1.1\r\nhost: t.example.com:8080\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.expect("sent");
    let mut answer = String::new();
    within("the answer", stream.read_to_string(&mut answer))
        .await
        .expect("an answer");
    // With 301 or 302, a browser would send a GET without the body.
    assert!(answer.starts_with("HTTP/1.1 308 "), "{answer}");
    let location = "location: http://my-app.t.example.com:8080/form?a=1\r\n";
    assert!(answer.contains(location), "{answer}");
}

#[tokio::test]
async fn a_connection_that_the_service_closes_ends_though_its_agent_does_not_read() {
    let stack = stack().await;
    let mut agent = ScriptedAgent::connect(&stack, "?tunnel_id=my-app").await;
    let established = agent.ready(&json!({ "type": "ready" })).await;
    let id = established["connection_id"].as_str().expect("an id");
    let id = id.parse().expect("a connection id");

    stack.disconnect(&id).expect("open");

    within("the connection to end", async {
        loop {
            let record = stack.connections().get(&id, tunnel_service::now()).await;
            if record.expect("an answer").is_none() {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn stopping_takes_at_most_ten_seconds_whatever_visitors_and_agents_do() {
    let stack = stack().await;
    let mut agent = online(&stack).await;
    let _endless = visitor(&stack, ASK.as_bytes()).await;
    let id = request_id(&mut agent).await;
    agent
        .say(&json!({ "type": "http_response", "request_id": id, "status_code": 200, "body": "eA==", "more": true }))
        .await;
    let upload = "POST /my-app/ HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\nx";
    let _slow = visitor(&stack, upload.as_bytes()).await;
    request_id(&mut agent).await;
    let _half_a_head = visitor(&stack, b"GET /my").await;

    // The agent reads nothing from here on.
    let begin = Instant::now();
    stack.stop().await;

    assert!(
        begin.elapsed() < Duration::from_secs(10),
        "{:?}",
        begin.elapsed()
    );
}

#[tokio::test]
async fn a_handshake_with_two_credentials_is_refused() {
    let stack = stack().await;
    let handshake = "GET /_ws HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
                     sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let twice = format!("{handshake}authorization: Bearer a\r\nauthorization: Bearer b\r\n\r\n");
    let answer = raw(&stack, twice.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    for odd in [
        handshake.replacen("GET", "POST", 1),
        handshake.replacen("HTTP/1.1", "HTTP/1.0", 1),
        handshake.replace("dGhlIHNhbXBsZSBub25jZQ==", "x"),
    ] {
        let answer = raw(&stack, format!("{odd}\r\n").as_bytes()).await;
        assert!(answer.contains(" 426 "), "{odd}: {answer}");
    }
}

#[tokio::test]
async fn a_data_directory_has_one_server_and_a_new_one_marks_tunnels_offline() {
    let directory = tempfile::tempdir().expect("a directory");
    let options = || Options {
        data: Some(directory.path().to_owned()),
        ..Options::default()
    };
    let first = stack_with(options()).await;
    let mut agent = online(&first).await;
    agent.expect_quiet("it was told something").await;
    let second = Server::start(Options {
        listen: ([127, 0, 0, 1], 0).into(),
        ..options()
    });
    let refused = second.await.expect_err("in use").to_string();
    assert!(
        refused.contains("is in use by another tunnel-local"),
        "{refused}"
    );
    let id = "my-app".parse().expect("an id");
    let online = async |stack: &Server| {
        let tunnel = stack.tunnels().get(&id, tunnel_service::now()).await;
        tunnel
            .expect("an answer")
            .expect("a tunnel")
            .online
            .is_some()
    };
    assert!(online(&first).await);

    // As after kill -9: nothing was noted.
    let copy = tempfile::tempdir().expect("a directory");
    for file in std::fs::read_dir(directory.path()).expect("files") {
        let file = file.expect("a file");
        std::fs::copy(file.path(), copy.path().join(file.file_name())).expect("copied");
    }
    let again = stack_with(Options {
        data: Some(copy.path().to_owned()),
        ..Options::default()
    })
    .await;
    assert!(!online(&again).await);
}
