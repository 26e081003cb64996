//! Uploads whose local service answers before it has read them.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_tungstenite::accept_async;

use crate::harness::{Agent, Service, Ttf, within};

const PART: &str = "0123456789";

/// The first message of an upload of three [`PART`]s.
fn upload(fields: &Value) -> Value {
    json!({
        "type": "http_request", "request_id": "r1", "method": "POST", "uri": "/upload",
        "headers": fields, "body": BASE64_STANDARD.encode(PART), "more": true,
    })
}

fn part(number: u32, more: bool) -> Value {
    json!({
        "type": "body_part", "request_id": "r1", "part": number,
        "body": BASE64_STANDARD.encode(PART), "more": more,
    })
}

/// A service that uploads, and sends what follows the first message only once the response is there.
async fn uploading(fields: Value) -> Service {
    Service::online("http://t.example.com/my-app", move |mut agent: Agent| {
        let fields = fields.clone();
        async move {
            agent.send(upload(&fields)).await;
            agent.until("http_response").await;
            agent.send(part(1, true)).await;
            agent.send(part(2, false)).await;
            agent.until_closed().await;
        }
    })
    .await
}

/// Starts the executable for a local service, and takes its connection with the head of the request.
async fn connection(listener: &TcpListener, service: &Service) -> (Ttf, TcpStream) {
    let target = listener.local_addr().expect("an address").to_string();
    let ttf = Ttf::start(&["http", &target, "-e", &service.endpoint, "--remember=false"]);
    let (mut stream, _) = within("the request", listener.accept())
        .await
        .expect("a connection");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("a head"));
    }
    (ttf, stream)
}

#[tokio::test]
async fn a_service_that_answers_early_still_gets_all_of_the_upload() {
    let chunked = format!("A\r\n{PART}\r\n").repeat(3) + "0\r\n\r\n";
    for (fields, framed) in [
        (json!({ "content-length": ["30"] }), PART.repeat(3)),
        (json!({}), chunked),
    ] {
        for response in [
            &b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"[..],
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let service = uploading(fields.clone()).await;
            let (mut ttf, mut stream) = connection(&listener, &service).await;
            stream.write_all(response).await.expect("written");
            let mut body = vec![0; framed.len()];
            let read = within("the body", stream.read_exact(&mut body)).await;
            read.expect("all of the body");
            assert_eq!(String::from_utf8_lossy(&body), framed);
            ttf.until_line("POST /upload 200 2 B").await;
        }
    }
}

#[tokio::test]
async fn a_service_that_answers_early_and_closes_ends_the_request() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let service = uploading(json!({})).await;
    let (mut ttf, mut stream) = connection(&listener, &service).await;
    stream
        .write_all(
            b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        )
        .await
        .expect("written");
    drop(stream);
    ttf.until_line("POST /upload 413 0 B").await;
}

#[tokio::test]
async fn an_upload_that_a_local_service_ends_early_is_not_waited_for() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let (tell, mut told) = mpsc::unbounded_channel();
    let service = Service::running(move |stream| {
        let tell = tell.clone();
        async move {
            let mut agent = Agent(accept_async(stream).await.expect("a handshake"));
            agent.until("ready").await;
            let established = json!({
                "type": "connection_established", "connection_id": "c1", "tunnel_id": "my-app",
                "public_url": "http://t.example.com/my-app", "features": ["body_parts", "window"],
            });
            agent.send(established).await;
            agent.send(upload(&json!({}))).await;
            if let Some(window) = agent.next("window").await {
                tell.send(window).expect("it is waited for");
            }
            agent.until_closed().await;
        }
    })
    .await;
    let (_ttf, mut stream) = connection(&listener, &service).await;
    let refusal = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n";
    stream.write_all(refusal).await.expect("written");
    drop(stream);
    let window = within("a window", told.recv()).await.expect("a window");
    // No more of it: otherwise the service, and with it the visitor, would wait until it may send the rest.
    assert_eq!(window["parts"], 0, "{window}");
}
