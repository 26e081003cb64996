//! Visitors' WebSockets as in AWS: handshake and messages are events of a WebSocket API behind the edge.

use std::net::SocketAddr;

use crate::harness::{Agent, settings, within};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, StatusCode};
use local::{Options, Server, Transport};
use tokio::{
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

type Visitor = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn stack() -> Server {
    let options = Options {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        transport: Transport::Emulated,
        ..Options::default()
    };
    Server::start(options).await.expect("a stack")
}

/// What the local service does with a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Service {
    /// Sends back what it gets.
    Echo,
    /// Sends this many numbers at once, and then closes.
    Count(usize),
    /// Sends a binary message.
    Binary,
    /// Refuses the handshake with 403.
    Refuse,
}

/// What the local service saw.
#[derive(Debug)]
enum Saw {
    Handshake(Box<Request>),
    Text,
    Closed(Option<u16>),
}

struct LocalService {
    address: SocketAddr,
    saw: mpsc::UnboundedReceiver<Saw>,
    _serving: JoinSet<()>,
}

impl LocalService {
    async fn start(service: Service) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (seen, saw) = mpsc::unbounded_channel();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, service, seen.clone()));
            }
        });
        Self {
            address,
            saw,
            _serving: serving,
        }
    }

    async fn next(&mut self) -> Saw {
        within("something for the local service", self.saw.recv())
            .await
            .expect("a service")
    }
}

#[expect(clippy::result_large_err, reason = "the signature is tungstenite's")]
async fn serve(stream: TcpStream, service: Service, saw: mpsc::UnboundedSender<Saw>) {
    let seen = saw.clone();
    let answer = move |request: &Request, mut response: Response| {
        let _ = seen.send(Saw::Handshake(Box::new(request.clone())));
        if service == Service::Refuse {
            let mut refusal = ErrorResponse::new(None);
            *refusal.status_mut() = StatusCode::FORBIDDEN;
            return Err(refusal);
        }
        if request.headers().contains_key("sec-websocket-protocol") {
            let chosen = HeaderValue::from_static("second");
            response
                .headers_mut()
                .insert("sec-websocket-protocol", chosen);
        }
        Ok(response)
    };
    let Ok(mut socket) = accept_hdr_async(stream, answer).await else {
        return;
    };
    match service {
        Service::Count(count) => {
            for number in 0..count {
                let text = Message::text(number.to_string());
                socket.send(text).await.expect("sent");
            }
            let frame = CloseFrame {
                code: CloseCode::Normal,
                reason: "".into(),
            };
            socket.close(Some(frame)).await.expect("closed");
        }
        Service::Binary => {
            socket
                .send(Message::binary(vec![1, 2, 3]))
                .await
                .expect("sent");
        }
        Service::Echo | Service::Refuse => {}
    }
    while let Some(Ok(message)) = socket.next().await {
        match message {
            Message::Text(text) => {
                let _ = saw.send(Saw::Text);
                socket.send(Message::Text(text)).await.expect("sent");
            }
            Message::Close(frame) => {
                let _ = saw.send(Saw::Closed(frame.map(|frame| frame.code.into())));
            }
            _ => {}
        }
    }
}

fn websocket_url(agent: &Agent, path: &str) -> String {
    format!("{}{path}", agent.url).replacen("http", "ws", 1)
}

async fn visit(agent: &Agent) -> Visitor {
    let connecting = connect_async(websocket_url(agent, "/chat?x=%20"));
    within("a connection", connecting)
        .await
        .expect("accepted")
        .0
}

async fn next_text(visitor: &mut Visitor) -> String {
    match within("a message", visitor.next()).await {
        Some(Ok(Message::Text(text))) => text.to_string(),
        other => panic!("heard {other:?}"),
    }
}

/// Reads to the end, and returns the close code.
async fn close_code(visitor: &mut Visitor) -> Option<u16> {
    within("a close", async {
        loop {
            match visitor.next().await {
                Some(Ok(Message::Close(frame))) => return frame.map(|frame| frame.code.into()),
                Some(Ok(_)) => {}
                other => panic!("ended with {other:?}"),
            }
        }
    })
    .await
}

async fn refused(url: &str) -> StatusCode {
    match within("an answer", connect_async(url)).await {
        Err(tungstenite::Error::Http(response)) => response.status(),
        other => panic!("{url}: {other:?}"),
    }
}

#[tokio::test]
async fn texts_go_both_ways_and_the_handshake_is_the_visitors_own() {
    let stack = stack().await;
    let mut service = LocalService::start(Service::Echo).await;
    let agent = Agent::online(settings(&stack, service.address)).await;
    let mut request = websocket_url(&agent, "/a%2Fb?x=%20&y")
        .into_client_request()
        .expect("a request");
    for (name, value) in [
        ("sec-websocket-protocol", "first, second"),
        ("cookie", "a=1"),
        ("origin", "https://pages.example.com"),
    ] {
        let value = HeaderValue::from_static(value);
        request.headers_mut().insert(name, value);
    }
    let (mut visitor, answer) = within("a connection", connect_async(request))
        .await
        .expect("accepted");
    assert_eq!(answer.headers()["sec-websocket-protocol"], "second");
    let Saw::Handshake(seen) = service.next().await else {
        panic!("no handshake")
    };
    assert_eq!(seen.uri().to_string(), "/a%2Fb?x=%20&y");
    assert_eq!(seen.headers()["cookie"], "a=1");
    assert_eq!(seen.headers()["x-forwarded-for"], "127.0.0.1");
    let ours: Vec<_> = seen
        .headers()
        .keys()
        .filter(|name| name.as_str().starts_with("x-tunnel-"))
        .collect();
    assert!(ours.is_empty(), "{ours:?}");
    // None of these is taken for an agent's message.
    for text in [
        "hello",
        "",
        r#"{"type":"ping"}"#,
        r#"{"type":"release"}"#,
        r#"{"type":"ready"}"#,
        "\u{1f600} \u{0} \"quoted\"",
    ] {
        visitor.send(Message::text(text)).await.expect("sent");
        assert_eq!(next_text(&mut visitor).await, text);
    }
    let long = "x".repeat(30 * 1024);
    visitor.send(Message::text(&*long)).await.expect("sent");
    assert_eq!(next_text(&mut visitor).await, long);
}

#[tokio::test]
async fn what_the_local_service_says_arrives_in_order_and_before_its_close() {
    const MESSAGES: usize = 1000;
    let stack = stack().await;
    let service = LocalService::start(Service::Count(MESSAGES)).await;
    let agent = Agent::online(settings(&stack, service.address)).await;
    let mut visitor = visit(&agent).await;
    for number in 0..MESSAGES {
        assert_eq!(next_text(&mut visitor).await, number.to_string());
    }
    assert_eq!(close_code(&mut visitor).await, Some(1000));
}

#[tokio::test]
async fn a_local_service_that_closes_at_once_closes_the_visitor() {
    let stack = stack().await;
    let service = LocalService::start(Service::Count(0)).await;
    let agent = Agent::online(settings(&stack, service.address)).await;
    let mut visitor = visit(&agent).await;
    assert_eq!(close_code(&mut visitor).await, Some(1000));
}

#[tokio::test]
async fn a_visitor_that_leaves_is_closed_at_the_local_service() {
    let stack = stack().await;
    let mut service = LocalService::start(Service::Echo).await;
    let agent = Agent::online(settings(&stack, service.address)).await;
    let mut visitor = visit(&agent).await;
    let frame = CloseFrame {
        code: CloseCode::Library(4001),
        reason: "".into(),
    };
    visitor.close(Some(frame)).await.expect("closed");
    let Saw::Handshake(_) = service.next().await else {
        panic!("no handshake")
    };
    let Saw::Closed(code) = service.next().await else {
        panic!("not closed")
    };
    assert_eq!(code, Some(4001));
}

#[tokio::test]
async fn what_cannot_be_carried_closes_both_ends() {
    let stack = stack().await;
    let mut service = LocalService::start(Service::Binary).await;
    let agent = Agent::online(settings(&stack, service.address)).await;
    let mut visitor = visit(&agent).await;
    assert_eq!(close_code(&mut visitor).await, Some(1000));
    let Saw::Handshake(_) = service.next().await else {
        panic!("no handshake")
    };
    let Saw::Closed(code) = service.next().await else {
        panic!("not closed")
    };
    assert_eq!(code, Some(1003));
}

#[tokio::test]
async fn an_agent_that_leaves_closes_its_visitors() {
    let stack = stack().await;
    let service = LocalService::start(Service::Echo).await;
    let agent = Agent::online(settings(&stack, service.address)).await;
    let mut visitors = vec![visit(&agent).await, visit(&agent).await];
    for visitor in &mut visitors {
        visitor.send(Message::text("hello")).await.expect("sent");
        assert_eq!(next_text(visitor).await, "hello");
    }
    let stopping = agent.stop();
    let (stopped, ()) = tokio::join!(stopping, async {
        for visitor in &mut visitors {
            assert_eq!(close_code(visitor).await, Some(1000));
        }
    });
    stopped.expect("stopped as asked");
}

#[tokio::test]
async fn refusals_have_their_status() {
    let stack = stack().await;
    let service = LocalService::start(Service::Refuse).await;
    let agent = Agent::online(settings(&stack, service.address)).await;
    let base = stack.public_url.to_string().replacen("http", "ws", 1);
    let refusals = [
        (websocket_url(&agent, "/"), StatusCode::FORBIDDEN),
        (format!("{base}/no-such-tunnel/"), StatusCode::NOT_FOUND),
    ];
    for (url, status) in refusals {
        assert_eq!(refused(&url).await, status, "{url}");
    }
    agent.stop().await.expect("stopped as asked");
    assert_eq!(
        refused(&format!("{base}/my-app/")).await,
        StatusCode::SERVICE_UNAVAILABLE
    );
}
