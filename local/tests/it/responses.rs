//! Responses that are not what they say, or end before their end: what the visitor still gets, and that nothing cut looks whole.

use http::StatusCode;
use local::Server;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::harness::{ScriptedAgent, get, stack_in_order, within};

/// All that a visitor with this request gets until the connection ends, in whichever way.
async fn raw(stack: &Server, request: &str) -> String {
    let authority = stack.public_url.to_string().split_off("http://".len());
    let mut stream = TcpStream::connect(authority).await.expect("a connection");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut got = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    within(&format!("the end of {request:?}"), async {
        while let Ok(length @ 1..) = stream.read(&mut buffer).await {
            got.extend_from_slice(&buffer[..length]);
        }
    })
    .await;
    String::from_utf8_lossy(&got).into_owned()
}

/// The next request of a visitor, past cancellations of former ones.
async fn request_of(agent: &mut ScriptedAgent) -> Value {
    loop {
        let message = agent.hear().await;
        if message["type"] == "http_request" {
            return message;
        }
    }
}

/// As messages have it.
pub(crate) fn base64(bytes: &[u8]) -> String {
    use base64::{Engine, prelude::BASE64_STANDARD};
    BASE64_STANDARD.encode(bytes)
}

fn head(request: &Value, more: &Value) -> Value {
    let mut message = json!({
        "type": "http_response", "request_id": request["request_id"], "status_code": 200, "more": true,
    });
    for (key, value) in more.as_object().expect("fields") {
        message[key] = value.clone();
    }
    message
}

fn part(request: &Value, number: usize, body: &[u8], more: bool) -> Value {
    json!({
        "type": "body_part", "request_id": request["request_id"], "part": number, "body": base64(body), "more": more,
    })
}

fn broke_off(request: &Value) -> Value {
    json!({
        "type": "error", "request_id": request["request_id"], "code": "local_service_unavailable", "message": "it broke off",
    })
}

#[tokio::test]
async fn what_came_before_a_response_broke_off_arrives_and_does_not_look_complete() {
    let stack = stack_in_order().await;
    let mut agent = ScriptedAgent::online(&stack, "my-app", &["body_parts"]).await;
    for length in [0, 3, 900, 50_000, 97_000, 200_000, 1_000_000] {
        for (version, fields) in [
            ("1.1", json!({})),
            ("1.1", json!({ "content-length": ["2000000"] })),
            ("1.0", json!({})),
            ("1.0", json!({ "content-length": ["2000000"] })),
        ] {
            let request = format!("GET /my-app/ HTTP/{version}\r\nhost: 127.0.0.1\r\n\r\n");
            let body = vec![b'x'; length];
            let (got, ()) = tokio::join!(raw(&stack, &request), async {
                let request = request_of(&mut agent).await;
                // As much as fits into one frame.
                let mut chunks = body.chunks(20_000);
                let first = chunks.next().unwrap_or_default();
                let more = json!({ "headers": fields, "body": base64(first) });
                agent.say(&head(&request, &more)).await;
                for (number, chunk) in (1..).zip(chunks) {
                    agent.say(&part(&request, number, chunk, true)).await;
                }
                agent.say(&broke_off(&request)).await;
            });
            let what = format!("{length} bytes, HTTP/{version}, {fields}");
            let status_line = got.lines().next().unwrap_or_default();
            assert!(status_line.contains(" 200 "), "{what}: {status_line:?}");
            let (_, received) = got.split_once("\r\n\r\n").expect("a head");
            // Chunk sizes are written in digits and lower-case letters up to f.
            assert_eq!(received.matches('x').count(), length, "{what}");
            assert!(
                !received.ends_with("0\r\n\r\n"),
                "{what}: it looks complete"
            );
        }
    }
}

#[tokio::test]
async fn a_response_that_is_not_one_is_a_502_while_nothing_has_been_sent() {
    let stack = stack_in_order().await;
    let mut agent = ScriptedAgent::online(&stack, "my-app", &["body_parts", "zstd"]).await;
    let url = format!("{}/my-app/", stack.public_url);
    for response in [
        json!({ "status_code": 100, "more": false }),
        json!({ "status_code": 101, "more": false }),
        json!({ "status_code": 199, "more": false }),
        json!({ "status_code": 600, "more": false }),
        json!({ "status_code": 999, "more": false }),
        json!({ "headers": { "content-length": ["30"] }, "body": "YWJj", "more": false }),
        json!({ "headers": { "content-length": ["2"] }, "body": "YWJj", "more": false }),
        json!({ "headers": { "content-length": ["2"] }, "body": "YWJj", "more": true }),
        json!({ "body": base64(b"not zstd"), "encoding": "zstd", "more": false }),
    ] {
        let got = agent
            .answer(&url, |request| vec![head(request, &response)])
            .await;
        assert_eq!(
            (got.status, got.error()),
            (StatusCode::BAD_GATEWAY, Some("invalid_reply")),
            "{response}"
        );
    }
    let got = agent
        .answer(&url, |request| {
            vec![json!({ "type": "body_part", "request_id": request["request_id"], "part": 0, "body": "YWJj" })]
        })
        .await;
    assert_eq!(got.error(), Some("invalid_reply"), "a body without a head");
}

#[tokio::test]
async fn a_response_that_turns_out_not_to_be_one_breaks_off() {
    let stack = stack_in_order().await;
    let mut agent = ScriptedAgent::online(&stack, "my-app", &["body_parts", "zstd"]).await;
    let request_text = "GET /my-app/ HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n";
    type Rest = fn(&Value) -> Value;
    let rests: [(Value, Rest, &str); 3] = [
        (
            json!({}),
            |request| {
                let mut part = part(request, 1, b"junk", false);
                part["encoding"] = json!("zstd");
                part
            },
            "xyz",
        ),
        (
            json!({ "content-length": ["30"] }),
            |request| part(request, 1, b"XYZ", false),
            "xyzXYZ",
        ),
        (
            json!({ "content-length": ["4"] }),
            |request| part(request, 1, b"XYZ", true),
            "xyz",
        ),
    ];
    for (fields, rest, expected) in rests {
        let (got, ()) = tokio::join!(raw(&stack, request_text), async {
            let request = request_of(&mut agent).await;
            let more = json!({ "headers": fields, "body": base64(b"xyz") });
            agent.say(&head(&request, &more)).await;
            agent.say(&rest(&request)).await;
        });
        let (head, received) = got.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 200 "), "{fields}: {head}");
        let letters: String = received.chars().filter(char::is_ascii_alphabetic).collect();
        assert_eq!(letters, expected, "{fields}");
        assert!(
            !received.ends_with("0\r\n\r\n"),
            "{fields}: it looks complete"
        );
    }
}

#[tokio::test]
async fn a_body_that_may_not_be_sent_is_not_read() {
    let stack = stack_in_order().await;
    let features = ["body_parts", "window", "cancel"];
    let mut agent = ScriptedAgent::online(&stack, "my-app", &features).await;
    for (method, status) in [("HEAD", 200), ("GET", 204), ("GET", 304)] {
        let request =
            format!("{method} /my-app/ HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n");
        let (got, cancelled) = tokio::join!(raw(&stack, &request), async {
            let request = request_of(&mut agent).await;
            let more = json!({
                "status_code": status, "headers": { "content-length": ["5"] }, "body": base64(b"xyz"),
            });
            agent.say(&head(&request, &more)).await;
            let cancel = agent.hear().await;
            (
                cancel["type"] == "cancel" && cancel["request_id"] == request["request_id"],
                cancel,
            )
        });
        assert!(cancelled.0, "{method} {status}: {}", cancelled.1);
        assert!(got.starts_with(&format!("HTTP/1.1 {status} ")), "{got}");
        assert!(
            got.ends_with("\r\n\r\n"),
            "{method} {status}: a body came: {got}"
        );
        assert_eq!(got.contains("content-length: 5"), method == "HEAD", "{got}");
    }
}

#[tokio::test]
async fn an_agent_that_is_lost_while_it_takes_an_upload_may_have_acted_on_it() {
    let stack = stack_in_order().await;
    let mut agent = ScriptedAgent::online(&stack, "my-app", &["body_parts", "window"]).await;
    let url = format!("{}/my-app/", stack.public_url);
    let (got, ()) = tokio::join!(crate::harness::post(&url, vec![b'x'; 3_000_000]), async {
        while agent.hear().await["part"] != 5 {}
        drop(agent);
    });
    assert_eq!(
        (got.status, got.error(), got.header("retry-after")),
        (StatusCode::BAD_GATEWAY, Some("agent_lost"), None)
    );
}

#[tokio::test]
async fn requests_that_come_together_look_the_tunnel_up_and_are_all_answered() {
    let stack = stack_in_order().await;
    let url = format!("{}/nobody-here/", stack.public_url);
    let visits = (0..50).map(|_| get(&url));
    for got in futures_util::future::join_all(visits).await {
        assert_eq!(got.error(), Some("tunnel_not_found"));
    }
}
