//! Upgraded connections: WebSockets above all, and whatever else two programs say to each other after a 101.

use std::{net::SocketAddr, time::Duration};

use forwarder::{event::Event, settings::Settings, visitor_rules::PolicyArgs};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, StatusCode};
use local::{Options, Server, Transport};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, accept_hdr_async, connect_async,
    tungstenite::{
        self, Message,
        client::IntoClientRequest,
        handshake::server::{ErrorResponse, Request, Response},
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};
use tunnel_local_aws::quotas::Quotas;
use tunnel_protocol::id::ConnectionId;
use tunnel_service::{now, tables::connections::Connection};

use crate::{
    access::{ALICE, secrets},
    harness::{Agent, Origin, ScriptedAgent, get, reply, settings, visit, within},
};

type VisitorWebSocket = WebSocketStream<MaybeTlsStream<TcpStream>>;

pub(crate) async fn one_process() -> Server {
    stack_as(Transport::InProcess).await
}

/// A stack of this transport, whichever the suite is run in.
pub(crate) async fn stack_as(transport: Transport) -> Server {
    stack_with(Options {
        transport,
        ..Options::default()
    })
    .await
}

async fn stack_with(options: Options) -> Server {
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let options = Options { listen, ..options };
    Server::start(options).await.expect("a stack")
}

/// A WebSocket server that sends back what it gets, and passes on what its clients' handshakes said.
pub(crate) struct EchoServer {
    pub(crate) address: SocketAddr,
    handshakes: mpsc::UnboundedReceiver<Request>,
    _tasks: JoinSet<()>,
}

impl EchoServer {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (seen, handshakes) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(echo(stream, seen.clone()));
            }
        });
        Self {
            address,
            handshakes,
            _tasks: tasks,
        }
    }
}

#[expect(
    clippy::result_large_err,
    reason = "what tungstenite's callback returns"
)]
async fn echo(stream: TcpStream, seen: mpsc::UnboundedSender<Request>) {
    let callback = |request: &Request, mut response: Response| {
        seen.send(request.clone()).expect("the test listens");
        let protocol = HeaderValue::from_static("chat");
        if request.headers().contains_key("sec-websocket-protocol") {
            response
                .headers_mut()
                .insert("sec-websocket-protocol", protocol);
        }
        response
            .headers_mut()
            .append("set-cookie", HeaderValue::from_static("a=1"));
        response
            .headers_mut()
            .append("set-cookie", HeaderValue::from_static("b=2"));
        Ok::<_, ErrorResponse>(response)
    };
    let Ok(mut socket) = accept_hdr_async(stream, callback).await else {
        return;
    };
    while let Some(Ok(message)) = socket.next().await {
        if message.is_text() || message.is_binary() {
            socket.send(message).await.expect("the client reads");
        }
    }
}

fn websocket_url(agent: &Agent, path: &str) -> String {
    format!("{}{path}", agent.url.replacen("http", "ws", 1))
}

async fn open(agent: &Agent, path: &str) -> VisitorWebSocket {
    let opening = connect_async(websocket_url(agent, path));
    let (socket, response) = within("the upgrade", opening).await.expect("upgraded");
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    socket
}

async fn next(socket: &mut VisitorWebSocket) -> Message {
    let next = within("a message", socket.next()).await;
    next.expect("open").expect("a message")
}

#[tokio::test]
async fn a_handshake_passes_as_the_two_ends_say_it() {
    let stack = one_process().await;
    let mut server = EchoServer::start().await;
    let agent = Agent::online(settings(&stack, server.address)).await;
    let mut request = websocket_url(&agent, "/socket?room=1")
        .into_client_request()
        .expect("a request");
    let headers = request.headers_mut();
    for (name, value) in [
        ("sec-websocket-protocol", "chat, superchat"),
        ("sec-websocket-extensions", "x-own; level=3"),
        ("cookie", "session=42"),
        ("x-own", "yes"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    let key = headers["sec-websocket-key"].clone();
    let (_socket, response) = within("the upgrade", connect_async(request))
        .await
        .expect("upgraded");
    assert_eq!(response.headers()["sec-websocket-protocol"], "chat");
    assert_eq!(response.headers()["upgrade"], "websocket");
    let cookies: Vec<_> = response.headers().get_all("set-cookie").iter().collect();
    assert_eq!(cookies.len(), 2, "{cookies:?}");

    let seen = within("the handshake", server.handshakes.recv()).await;
    let seen = seen.expect("a handshake");
    assert_eq!(seen.uri(), "/socket?room=1");
    for (name, value) in [
        ("sec-websocket-protocol", "chat, superchat"),
        ("sec-websocket-extensions", "x-own; level=3"),
        ("sec-websocket-version", "13"),
        ("cookie", "session=42"),
        ("x-own", "yes"),
        ("upgrade", "websocket"),
    ] {
        assert_eq!(seen.headers()[name], value, "{name}");
    }
    assert_eq!(seen.headers()["sec-websocket-key"], key);
    assert!(seen.headers().contains_key("x-forwarded-for"));
}

#[tokio::test]
async fn messages_of_every_size_pass_in_order_both_ways() {
    let stack = one_process().await;
    let server = EchoServer::start().await;
    let agent = Agent::online(settings(&stack, server.address)).await;
    let (mut sending, mut receiving) = open(&agent, "/").await.split();
    let lengths: Vec<usize> = (0..60)
        .map(|number| [1, 125, 126, 65_535, 65_536, 1_000_000][number % 6])
        .collect();
    let message = |number: usize, length: usize| {
        let byte = u8::try_from(number % 26).expect("small") + b'a';
        if number.is_multiple_of(2) {
            Message::text(char::from(byte).to_string().repeat(length))
        } else {
            Message::binary(vec![byte; length])
        }
    };
    let send = async {
        for (number, length) in lengths.iter().enumerate() {
            sending.send(message(number, *length)).await.expect("open");
        }
    };
    let receive = async {
        for (number, length) in lengths.iter().enumerate() {
            let received = receiving.next().await.expect("open").expect("a message");
            assert!(received == message(number, *length), "message {number}");
        }
    };
    within("all messages", async { tokio::join!(send, receive) }).await;
}

#[tokio::test]
async fn pings_and_close_codes_pass() {
    let stack = one_process().await;
    let server = EchoServer::start().await;
    let agent = Agent::online(settings(&stack, server.address)).await;
    let mut socket = open(&agent, "/").await;
    socket
        .send(Message::Ping("are you there".into()))
        .await
        .expect("open");
    assert_eq!(
        next(&mut socket).await,
        Message::Pong("are you there".into())
    );
    let close = CloseFrame {
        code: CloseCode::from(4321),
        reason: "that was it".into(),
    };
    socket
        .send(Message::Close(Some(close.clone())))
        .await
        .expect("open");
    assert_eq!(next(&mut socket).await, Message::Close(Some(close)));
    let end = within("the end", socket.next()).await;
    assert!(!matches!(end, Some(Ok(_))), "{end:?}");
}

#[tokio::test]
async fn a_local_service_that_refuses_is_heard() {
    let stack = one_process().await;
    let origin = Origin::answering(|_| Some(reply(StatusCode::FORBIDDEN, "members only"))).await;
    let agent = Agent::online(settings(&stack, origin.address)).await;
    let refused = within("an answer", connect_async(websocket_url(&agent, "/"))).await;
    let Err(tungstenite::Error::Http(response)) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(response.status(), StatusCode::FORBIDDEN);
    assert!(!response.headers().contains_key("x-tunnel-error"));
    assert_eq!(origin.last().header("upgrade"), Some("websocket"));
}

/// A local service that changes to a protocol of its own and is then served by hand.
pub(crate) async fn own_protocol() -> (SocketAddr, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    (listener.local_addr().expect("an address"), listener)
}

pub(crate) async fn accept_own(listener: &TcpListener) -> TcpStream {
    let (mut stream, _) = within("a connection", listener.accept())
        .await
        .expect("open");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("a head"));
    }
    let head = String::from_utf8(head).expect("text").to_lowercase();
    assert!(head.contains("\r\nupgrade: own/1\r\n"), "{head}");
    stream
        .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: own/1\r\n\r\nhello")
        .await
        .expect("open");
    stream
}

pub(crate) async fn ask_own(stack: &Server, agent: &Agent) -> TcpStream {
    let mut visitor = TcpStream::connect(stack.address).await.expect("open");
    let path = agent.url.splitn(4, '/').nth(3).expect("a path");
    let head = format!(
        "POST /{path}/ HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: own/1\r\n\r\n",
        stack.address
    );
    visitor.write_all(head.as_bytes()).await.expect("open");
    visitor
}

async fn read_until(stream: &mut TcpStream, end: &[u8]) {
    let mut read = Vec::new();
    within("bytes", async {
        while !read.ends_with(end) {
            read.push(stream.read_u8().await.expect("open"));
        }
    })
    .await;
}

#[tokio::test]
async fn other_protocols_pass_and_each_side_may_end_first() {
    let stack = one_process().await;
    let (address, listener) = own_protocol().await;
    let agent = Agent::online(settings(&stack, address)).await;
    let (mut service, mut visitor) = tokio::join!(accept_own(&listener), ask_own(&stack, &agent));
    read_until(&mut visitor, b"\r\n\r\nhello").await;
    visitor.write_all(b"\0\xffquestion").await.expect("open");
    read_until(&mut service, b"\0\xffquestion").await;
    // The visitor has said all, and goes on to listen.
    visitor.shutdown().await.expect("open");
    let end = within("the visitor's end", service.read(&mut [0])).await;
    assert_eq!(end.expect("no reset"), 0);
    service.write_all(b"answer").await.expect("open");
    read_until(&mut visitor, b"answer").await;
    drop(service);
    let end = within("the service's end", visitor.read(&mut [0])).await;
    assert_eq!(end.expect("no reset"), 0);
}

#[tokio::test]
async fn the_death_of_any_side_ends_the_connection_at_the_others() {
    let stack = one_process().await;
    let (address, listener) = own_protocol().await;
    for killed in ["visitor", "local service", "agent"] {
        let agent = Agent::online(settings(&stack, address)).await;
        let (service, mut visitor) = tokio::join!(accept_own(&listener), ask_own(&stack, &agent));
        read_until(&mut visitor, b"hello").await;
        let mut left = match killed {
            "visitor" => {
                drop(visitor);
                vec![service]
            }
            "local service" => {
                drop(service);
                vec![visitor]
            }
            _ => {
                agent.stop_soon();
                vec![service, visitor]
            }
        };
        for socket in &mut left {
            let end = within(killed, socket.read(&mut [0])).await;
            assert!(matches!(end, Ok(0) | Err(_)), "{killed}: {end:?}");
        }
        agent.stop().await.expect("stopped as asked");
    }
}

#[tokio::test]
async fn what_cannot_carry_an_upgrade_says_so() {
    for transport in [Transport::InProcess, Transport::Emulated] {
        let old = stack_as(transport).await;
        let features = ["body_parts", "cancel", "window"];
        let _old_agent = ScriptedAgent::online(&old, "old-agent", &features).await;
        let url = format!("{}/old-agent/", old.public_url).replacen("http", "ws", 1);
        let refused = within("an answer", connect_async(&url)).await;
        let Err(tungstenite::Error::Http(response)) = refused else {
            panic!("{transport:?}: {refused:?}");
        };
        assert_eq!(
            response.status(),
            StatusCode::NOT_IMPLEMENTED,
            "{transport:?}"
        );
        // A WebSocket API passes on nothing but the status.
        if transport == Transport::InProcess {
            assert_eq!(response.headers()["x-tunnel-error"], "no_upgrade");
        }
    }
}

/// Asks for a WebSocket with these fields, and returns it or the refusal's status and code.
async fn ask(
    agent: &Agent,
    fields: &[(&'static str, &'static str)],
) -> Result<VisitorWebSocket, (StatusCode, String)> {
    let mut request = websocket_url(agent, "/")
        .into_client_request()
        .expect("a request");
    for (name, value) in fields {
        let value = HeaderValue::from_static(value);
        request.headers_mut().insert(*name, value);
    }
    match within("an answer", connect_async(request)).await {
        Ok((socket, _)) => Ok(socket),
        Err(tungstenite::Error::Http(response)) => {
            let code = response.headers().get("x-tunnel-error");
            let code = code.map(|code| code.to_str().expect("text").to_owned());
            Err((response.status(), code.unwrap_or_default()))
        }
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn visitor_rules_and_limits_apply_to_handshakes() {
    let stack = stack_with(Options {
        max_concurrent_requests: 1,
        ..Options::default()
    })
    .await;
    let mut server = EchoServer::start().await;
    let rules = PolicyArgs {
        basic_auth: secrets(&["alice:opensesame"]),
        ..PolicyArgs::default()
    };
    let mut agent = Agent::online(Settings {
        access: rules.check().expect("rules"),
        ..settings(&stack, server.address)
    })
    .await;
    let refused = |status, code: &str| Err((status, code.to_owned()));
    let unauthorized = ask(&agent, &[]).await.map(drop);
    let expected = refused(StatusCode::UNAUTHORIZED, "visitor_unauthorized");
    assert_eq!(unauthorized, expected);
    let alice = [("authorization", ALICE)];
    let first = ask(&agent, &alice).await.expect("upgraded");
    let handshake = within("the handshake", server.handshakes.recv()).await;
    let handshake = handshake.expect("a handshake");
    assert!(!handshake.headers().contains_key("authorization"));
    // For as long as it is open it is one of the tunnel's requests.
    let second = ask(&agent, &alice).await.map(drop);
    let expected = refused(StatusCode::TOO_MANY_REQUESTS, "rate_limited");
    assert_eq!(second, expected);
    drop(first);
    agent
        .until("the socket's end", |event| {
            matches!(event, Event::SocketClosed).then_some(())
        })
        .await;
    assert!(server.handshakes.try_recv().is_err(), "only one was let in");
}

#[tokio::test]
async fn h2c_is_an_ordinary_request() {
    let stack = one_process().await;
    let origin = Origin::echo().await;
    let agent = Agent::online(settings(&stack, origin.address)).await;
    let request = http::Request::get(format!("{}/x", agent.url))
        .header("connection", "upgrade, http2-settings")
        .header("upgrade", "h2c")
        .header("http2-settings", "AAMAAABkAAQCAAAAAAIAAAAA")
        .body("".into())
        .expect("a request");
    assert_eq!(visit(request).await.status, StatusCode::OK);
    assert_eq!(origin.last().header("upgrade"), None);
}

#[tokio::test]
async fn a_slow_reader_slows_the_sender_down() {
    let stack = one_process().await;
    let (address, listener) = own_protocol().await;
    let agent = Agent::online(settings(&stack, address)).await;
    let (mut service, _visitor) = tokio::join!(accept_own(&listener), ask_own(&stack, &agent));
    // More than all buffers and windows on the way hold.
    const MOST: usize = 64 * 1024 * 1024;
    let bytes = vec![0; 64 * 1024];
    let mut sent = 0;
    while let Ok(written) =
        tokio::time::timeout(Duration::from_secs(2), service.write(&bytes)).await
    {
        sent += written.expect("open");
        assert!(sent < MOST, "the sender is never stopped");
    }
}

#[tokio::test]
async fn a_request_with_a_body_is_served_as_it_is_whatever_upgrade_it_offers() {
    let stack = one_process().await;
    let origin = Origin::echo().await;
    let agent = Agent::online(settings(&stack, origin.address)).await;
    for protocol in ["TLS/1.2", "websocket", "own/1"] {
        let request = http::Request::post(format!("{}/x", agent.url))
            .header("connection", "Upgrade")
            .header("upgrade", protocol)
            .body("hello".into())
            .expect("a request");
        let served = visit(request).await;
        assert_eq!(served.status, StatusCode::OK, "{protocol}");
        assert_eq!(&origin.last().body[..], b"hello", "{protocol}");
        assert_eq!(origin.last().header("upgrade"), None, "{protocol}");
    }
}

#[tokio::test]
async fn an_offer_that_cannot_be_taken_is_passed_over_unless_it_is_a_websocket() {
    let stack = one_process().await;
    let mut agent = ScriptedAgent::online(&stack, "old-agent", &["body_parts", "window"]).await;
    let request = http::Request::get(format!("{}/old-agent/", stack.public_url))
        .header("connection", "Upgrade")
        .header("upgrade", "TLS/1.2")
        .body("".into())
        .expect("a request");
    let (served, ()) = tokio::join!(visit(request), async {
        let request = agent.hear_type("http_request").await;
        assert_eq!(request.get("upgrade"), None);
        agent.say(&crate::harness::response(&request, "b2s=")).await;
    });
    assert_eq!(served.status, StatusCode::OK);
}

#[tokio::test]
async fn moves_leave_upgraded_connections_where_they_are_until_they_end() {
    let quotas = Quotas {
        life: Some(Duration::from_secs(2)),
        recheck: Duration::from_millis(50),
        ..Quotas::default()
    };
    let stack = stack_with(Options {
        quotas,
        ..Options::default()
    })
    .await;
    let (address, listener) = own_protocol().await;
    let mut agent = Agent::online(settings(&stack, address)).await;
    let (mut service, mut visitor) = tokio::join!(accept_own(&listener), ask_own(&stack, &agent));
    read_until(&mut visitor, b"\r\n\r\nhello").await;
    // For longer than the first connection lives, and than it takes requests after the next one has taken over.
    for _ in 0..14 {
        agent.until_online().await;
        visitor.write_all(b"question").await.expect("open");
        read_until(&mut service, b"question").await;
        service.write_all(b"answer").await.expect("open");
        read_until(&mut visitor, b"answer").await;
    }
    drop(visitor);
    let end = within("the visitor's end", service.read(&mut [0])).await;
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    agent.stop().await.expect("stopped as asked");
}

#[tokio::test]
async fn an_agent_that_stops_does_not_wait_for_upgraded_connections() {
    let stack = one_process().await;
    let (address, listener) = own_protocol().await;
    let mut agent = Agent::online(settings(&stack, address)).await;
    let (_service, mut visitor) = tokio::join!(accept_own(&listener), ask_own(&stack, &agent));
    read_until(&mut visitor, b"hello").await;
    let url = agent.url.clone();
    let mut waiting = JoinSet::new();
    waiting.spawn(async move { get(&url).await });
    let (mut request, _) = within("a request", listener.accept()).await.expect("open");
    agent.stop_soon();
    agent
        .until("the agent to say that it waits", |event| {
            matches!(event, Event::Draining { .. }).then_some(())
        })
        .await;
    // For what has an end it does wait, and for nothing else after that.
    request
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        .await
        .expect("open");
    let served = within("the answer", waiting.join_next()).await;
    let served = served.expect("one visitor").expect("no panic");
    assert_eq!(served.status, StatusCode::OK);
    agent.stop().await.expect("stopped as asked");
    let end = within("the end", visitor.read(&mut [0])).await;
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}

#[tokio::test]
async fn the_records_of_a_connection_without_a_limit_do_not_expire() {
    let quotas = Quotas {
        life: None,
        ..Quotas::default()
    };
    let stack = stack_with(Options {
        quotas,
        ..Options::default()
    })
    .await;
    let mut agent = ScriptedAgent::connect(&stack, "?tunnel_id=my-app").await;
    let established = agent.ready(&json!({ "type": "ready" })).await;
    assert_eq!(established.get("life_ms"), None, "{established}");
    let id: ConnectionId = established["connection_id"]
        .as_str()
        .expect("an id")
        .parse()
        .expect("an id");
    let recorded = stack.connections().get(&id, now()).await.expect("a table");
    let Some(Connection::Agent(recorded)) = recorded else {
        panic!("{recorded:?}");
    };
    // As if it had been recorded an hour and a half ago.
    let opened = recorded.opened.clone().expect("ready");
    let long_ago = now() - Duration::from_secs(90 * 60);
    let records = stack.connections();
    records.remove(&id).await.expect("a table");
    records
        .put(&id, &Connection::Agent(recorded), long_ago)
        .await
        .expect("a table");
    records.record_opened(&id, &opened).await.expect("a table");
    let later = now() + Duration::from_secs(2 * 60 * 60);
    let old = records.get(&id, later).await.expect("a table");
    assert!(old.is_none(), "the record is not an old one");
    agent.expect_quiet("its ping is answered").await;
    let kept = records.get(&id, later).await.expect("a table");
    assert!(kept.is_some(), "the record expires");
}
