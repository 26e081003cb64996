//! The inspector: what it records of exchanges, what its API answers, and what it sends again.

use std::{convert::Infallible, os::unix::fs::PermissionsExt, path::Path};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use forwarder::{
    inspector::{InspectAddress, InspectOptions, Inspector},
    settings::{Secret, Settings},
    visitor_rules::PolicyArgs,
};
use futures_util::{SinkExt, StreamExt};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use local::Server;
use serde_json::{Value, json};
use tokio::{net::TcpStream, task::JoinSet};
use tokio_tungstenite::{connect_async, tungstenite::Message};

use crate::{
    harness::{Agent, Got, Origin, post, reply, reply_with, settings, stack, visit, within},
    websocket::{EchoServer, one_process},
};

/// The example of a tunnel in the documentation of ngrok's agent API.
const NGROK_TUNNEL: &str = r#"{"name": "command_line", "uri": "/api/tunnels/command_line",
    "public_url": "https://d95211d2.ngrok.app", "proto": "https", "config": {"addr": "localhost:80", "inspect": true},
    "metrics": {"conns": {"count": 0, "gauge": 0, "rate1": 0, "rate5": 0, "rate15": 0, "p50": 0, "p90": 0, "p95": 0, "p99": 0},
    "http": {"count": 0, "rate1": 0, "rate5": 0, "rate15": 0, "p50": 0, "p90": 0, "p95": 0, "p99": 0}}}"#;
/// Its example of a request.
const NGROK_REQUEST: &str = r#"{"uri": "/api/requests/http/548fb5c700000002", "id": "548fb5c700000002",
    "tunnel_name": "command_line (http)", "remote_addr": "192.168.100.25", "start": "2014-12-15T20:32:07-08:00",
    "duration": 3893202, "request": {"method": "GET", "proto": "HTTP/1.1", "headers": {}, "uri": "/favicon.ico", "raw": ""},
    "response": {"status": "502 Bad Gateway", "status_code": 502, "proto": "HTTP/1.1", "headers": {}, "raw": ""}}"#;

/// An agent whose tunnel is open, with its inspector.
struct Inspected {
    agent: Agent,
    api: String,
    inspector: Inspector,
    _serving: JoinSet<Infallible>,
}

impl Inspected {
    async fn start(stack: &Server, origin: &Origin) -> Self {
        Self::with(settings(stack, origin.address), None).await
    }

    async fn with(settings: Settings, history: Option<&Path>) -> Self {
        let options = InspectOptions {
            address: InspectAddress::At {
                host: "127.0.0.1".to_owned(),
                port: 0,
            },
            history: history.map(Path::to_owned),
            ..InspectOptions::default()
        };
        let started = Inspector::start(&options, std::slice::from_ref(&settings)).await;
        let (inspector, server) = started.expect("a port").expect("it is on");
        let api = format!("{}/api", server.url());
        let mut serving = JoinSet::new();
        serving.spawn(server.run());
        let mut agent = Agent::inspected(settings, inspector.clone());
        agent.url = agent.until_online().await;
        Self {
            agent,
            api,
            inspector,
            _serving: serving,
        }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.agent.url)
    }

    async fn get(&self, path: &str) -> Value {
        let got = crate::harness::get(&format!("{}{path}", self.api)).await;
        assert_eq!(got.status, StatusCode::OK, "{path}: {got:?}");
        serde_json::from_slice(&got.body).expect("JSON")
    }

    async fn post(&self, path: &str, value: &Value) -> Got {
        let request = Request::post(format!("{}{path}", self.api))
            .header("content-type", "application/json")
            .body(Bytes::from(value.to_string()));
        visit(request.expect("a request")).await
    }

    /// The newest exchange, once it has ended.
    async fn ended(&self) -> Value {
        within("the exchange to end", async {
            let mut changes = self.changes().await;
            loop {
                let exchanges = self.get("/requests/http").await;
                let newest = &exchanges["requests"][0];
                if !newest.is_null() && newest["state"] != "open" {
                    return newest.clone();
                }
                changes.next().await;
            }
        })
        .await
    }

    async fn changes(&self) -> Changes {
        let authority = self
            .api
            .trim_start_matches("http://")
            .trim_end_matches("/api");
        let stream = TcpStream::connect(authority).await.expect("a connection");
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .expect("HTTP");
        let mut driving = JoinSet::new();
        driving.spawn(connection);
        let request = Request::get("/api/events")
            .header("host", authority)
            .body(Empty::<Bytes>::new());
        let response = sender.send_request(request.expect("a request")).await;
        Changes {
            body: response.expect("events").into_body(),
            _driving: driving,
        }
    }

    /// Sends an exchange again and returns what became of it.
    async fn replay(&self, wanted: &Value) -> Value {
        let replayed = self.post("/requests/http", wanted).await;
        assert_eq!(replayed.status, StatusCode::NO_CONTENT, "{replayed:?}");
        let newest = self.ended().await;
        assert_eq!(replayed.header("location"), newest["uri"].as_str());
        newest
    }
}

struct Changes {
    body: hyper::body::Incoming,
    _driving: JoinSet<Result<(), hyper::Error>>,
}

impl Changes {
    async fn next(&mut self) -> String {
        let frame = self
            .body
            .frame()
            .await
            .expect("it goes on")
            .expect("a frame");
        String::from_utf8_lossy(frame.data_ref().expect("data")).into_owned()
    }
}

/// Asserts that a value has all that an example has, each of the same type.
fn assert_shape(value: &Value, example: &Value, path: &str) {
    match (value, example) {
        (Value::Object(value), Value::Object(example)) => {
            for (key, example) in example {
                let found = value.get(key).unwrap_or_else(|| panic!("no {path}.{key}"));
                assert_shape(found, example, &format!("{path}.{key}"));
            }
        }
        _ => assert_eq!(
            std::mem::discriminant(value),
            std::mem::discriminant(example),
            "{path}: {value} is not like {example}"
        ),
    }
}

#[tokio::test]
async fn scripts_that_read_ngroks_api_find_the_address_and_the_requests() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let inspected = Inspected::start(&stack, &origin).await;
    post(&inspected.url("/hook"), "hello").await;
    let exchange = inspected.ended().await;
    assert_shape(
        &exchange,
        &serde_json::from_str(NGROK_REQUEST).expect("JSON"),
        "request",
    );
    let tunnels = inspected.get("/tunnels").await;
    let tunnel = &tunnels["tunnels"][0];
    assert_shape(
        tunnel,
        &serde_json::from_str(NGROK_TUNNEL).expect("JSON"),
        "tunnel",
    );
    assert_eq!(tunnel["public_url"], inspected.agent.url.as_str());
    assert_eq!(tunnel["metrics"]["http"]["count"], 1);
    assert_eq!(inspected.get("/tunnels/test").await["name"], "test");
    assert_eq!(inspected.get("/status").await["status"], "online");
    let id = exchange["id"].as_str().expect("an id");
    assert_eq!(
        inspected.get(&format!("/requests/http/{id}")).await,
        exchange
    );
    let listed = inspected.get("/requests/http?tunnel_name=other").await;
    assert_eq!(listed["requests"], json!([]));
}

#[tokio::test]
async fn an_exchange_is_recorded_as_visitor_and_local_service_saw_it_but_for_secrets() {
    let origin = Origin::answering(|seen| {
        let fields: [(&str, &[u8]); 2] = [("set-cookie", b"id=s3cret; Secure"), ("x-a", b"1")];
        Some(reply_with(StatusCode::CREATED, &fields, seen.body.clone()))
    })
    .await;
    let stack = stack().await;
    let rules = PolicyArgs {
        require_header: Some(vec![Secret::from("X-Gate: sesame".to_owned())]),
        ..PolicyArgs::default()
    };
    let settings = Settings {
        access: rules.check().expect("rules"),
        ..settings(&stack, origin.address)
    };
    let inspected = Inspected::with(settings, None).await;
    let body: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let request = Request::put(inspected.url("/a?b=%20"))
        .header("authorization", "Bearer s3cret")
        .header("cookie", "id=s3cret")
        .header("x-gate", "sesame")
        .body(Bytes::from(body.clone()))
        .expect("a request");
    assert_eq!(visit(request).await.body, body);
    let exchange = inspected.ended().await;
    assert!(!exchange.to_string().contains("s3cret"), "{exchange}");
    assert_eq!(exchange["request"]["method"], "PUT");
    assert_eq!(exchange["request"]["uri"], "/a?b=%20");
    assert_eq!(
        exchange["request"]["headers"]["Authorization"],
        json!(["Bearer [masked]"])
    );
    assert_eq!(
        exchange["request"]["headers"]["Cookie"],
        json!(["id=[masked]"])
    );
    assert_eq!(exchange["response"]["status"], "201 Created");
    assert_eq!(exchange["response"]["headers"]["X-A"], json!(["1"]));
    assert_eq!(exchange["state"], "complete");
    assert_body(&inspected, &exchange, "request", &body).await;
    assert_body(&inspected, &exchange, "response", &body).await;
    let har = inspected.get("/requests/har").await;
    assert!(!har.to_string().contains("s3cret"));
    assert_eq!(har["log"]["entries"][0]["response"]["status"], 201);
    let id = exchange["id"].as_str().expect("an id");
    let wanted = json!({ "part": "request", "header": "Authorization" });
    let revealed = inspected
        .post(&format!("/requests/http/{id}/reveal"), &wanted)
        .await;
    assert_eq!(revealed.body, r#"{"values":["Bearer s3cret"]}"#);
}

/// Asserts that the body of this part of an exchange was kept whole, and that its raw form shows no secret.
async fn assert_body(inspected: &Inspected, exchange: &Value, part: &str, body: &[u8]) {
    let address = inspected.api.trim_end_matches("/api");
    let path = exchange["uri"].as_str().expect("a path");
    let kept = crate::harness::get(&format!("{address}{path}/{part}/body")).await;
    assert_eq!(kept.body, body);
    let raw = exchange[part]["raw"].as_str().expect("text");
    let raw = BASE64_STANDARD.decode(raw).expect("Base64");
    assert!(raw.ends_with(body), "{part}");
    assert!(!raw.windows(6).any(|bytes| bytes == b"s3cret"), "{part}");
    assert_eq!(exchange[part]["size"], body.len());
}

#[tokio::test]
async fn a_replay_is_what_the_local_service_saw_before() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let inspected = Inspected::start(&stack, &origin).await;
    let body = Bytes::from_static(b"\x00\xff binary \r\n");
    let request = Request::post(inspected.url("/hook?a=1&a=2"))
        .header("authorization", "Bearer s3cret")
        .header("x-twice", "1")
        .header("x-twice", "2")
        .body(body.clone());
    visit(request.expect("a request")).await;
    let first = inspected.ended().await;
    let seen = origin.last();
    let replayed = inspected.replay(&json!({ "id": first["id"] })).await;
    assert_eq!(
        (replayed["replay_of"].as_str(), origin.count()),
        (first["id"].as_str(), 2)
    );
    let again = origin.last();
    assert_eq!(
        (again.method, again.uri, again.headers, again.body),
        (seen.method, seen.uri, seen.headers, seen.body)
    );

    let other = Origin::answering(|_| Some(reply(StatusCode::ACCEPTED, "other"))).await;
    let edited = inspected
        .replay(&json!({
            "id": first["id"],
            "method": "PATCH",
            "uri": "/other",
            "headers": [["Authorization", "Bearer [masked]"], ["X-New", "1"]],
            "body": "new",
            "target": other.address.to_string(),
        }))
        .await;
    assert_eq!(edited["status_code"], 202);
    let seen = other.last();
    assert_eq!(
        (seen.method.as_str(), seen.uri.path(), &seen.body[..]),
        ("PATCH", "/other", &b"new"[..])
    );
    assert_eq!(seen.header("authorization"), Some("Bearer s3cret"));
    assert_eq!(
        (seen.header("x-new"), seen.header("x-twice")),
        (Some("1"), None)
    );
    assert_eq!(origin.count(), 2);
}

#[tokio::test]
async fn what_cannot_be_replayed_is_refused_with_a_reason() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let inspected = Inspected::start(&stack, &origin).await;
    post(&inspected.url("/large"), vec![b'x'; 5 << 20]).await;
    let large = inspected.ended().await;
    assert_eq!(large["request"]["truncated"], true);
    assert_eq!(large["request"]["kept"], 4 << 20);
    for (wanted, status, code) in [
        (json!({ "id": large["id"] }), 409, "body_cut"),
        (json!({ "id": "1" }), 404, "no_such_request"),
        (
            json!({ "id": large["id"], "tunnel_name": "x" }),
            404,
            "no_such_tunnel",
        ),
        (
            json!({ "id": large["id"], "body": "", "uri": "http://x/" }),
            400,
            "invalid_replay",
        ),
        (
            json!({ "id": large["id"], "body": "", "method": "A B" }),
            400,
            "invalid_replay",
        ),
        (
            json!({ "id": large["id"], "body": "", "target": "ftp://x" }),
            400,
            "invalid_replay",
        ),
        (
            json!({ "id": large["id"], "body": "", "headers": [["a", "b\nc"]] }),
            400,
            "invalid_replay",
        ),
        (json!({ "id": 1 }), 400, "invalid_json"),
    ] {
        let got = inspected.post("/requests/http", &wanted).await;
        let error: Value = serde_json::from_slice(&got.body).expect("JSON");
        assert_eq!(
            (got.status.as_u16(), error["code"].as_str()),
            (status, Some(code)),
            "{wanted}"
        );
    }
    assert_eq!(origin.count(), 1);
    let empty = inspected
        .replay(&json!({ "id": large["id"], "body": "short" }))
        .await;
    assert_eq!(empty["request"]["size"], 5);
}

#[tokio::test]
async fn requests_that_fail_are_recorded_with_their_reason() {
    let origin = Origin::answering(|_| None).await;
    let stack = stack().await;
    let inspected = Inspected::start(&stack, &origin).await;
    post(&inspected.url("/"), "x").await;
    let failed = inspected.ended().await;
    assert_eq!(failed["state"], "failed");
    assert_eq!(failed["response"], Value::Null);
    assert!(
        failed["error"]
            .as_str()
            .is_some_and(|reason| reason.contains("closed the connection")),
        "{failed}"
    );
}

#[tokio::test]
async fn foreign_hosts_and_origins_get_nothing() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let inspected = Inspected::start(&stack, &origin).await;
    post(&inspected.url("/hook"), "x").await;
    let exchange = inspected.ended().await;
    let wanted = json!({ "id": exchange["id"] }).to_string();
    for (method, path, name, value, status) in [
        ("GET", "/tunnels", "host", "rebound.example.com", 403),
        (
            "GET",
            "/requests/http",
            "origin",
            "http://evil.example.com",
            403,
        ),
        ("GET", "/requests/http", "sec-fetch-site", "cross-site", 403),
        (
            "POST",
            "/requests/http",
            "origin",
            "http://evil.example.com",
            403,
        ),
        ("POST", "/requests/http", "host", "rebound.example.com", 403),
        ("POST", "/requests/http", "content-type", "text/plain", 415),
        ("DELETE", "/requests/http", "origin", "null", 403),
        ("PUT", "/requests/http", "x-a", "1", 405),
        ("POST", "/tunnels", "x-a", "1", 405),
    ] {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", inspected.api))
            .header(name, value)
            .body(Bytes::from(wanted.clone()))
            .expect("a request");
        let got = visit(request).await;
        assert_eq!(
            got.status.as_u16(),
            status,
            "{method} {path} {name}: {value}"
        );
        assert_eq!(got.header("access-control-allow-origin"), None);
    }
    assert_eq!(origin.count(), 1);
    assert_eq!(inspected.ended().await["id"], exchange["id"]);
}

#[tokio::test]
async fn changes_are_heard_of_as_they_happen() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let inspected = Inspected::start(&stack, &origin).await;
    let mut changes = inspected.changes().await;
    let first = within("the first event", changes.next()).await;
    assert!(
        first.contains(r#""exchanges":[]"#) && first.contains(&inspected.agent.url),
        "{first}"
    );
    post(&inspected.url("/hook"), "x").await;
    let heard = async { while !changes.next().await.contains(r#""path":"/hook""#) {} };
    within("the request", heard).await;
    let request = Request::delete(format!("{}/requests/http", inspected.api));
    let got = visit(request.body(Bytes::new()).expect("a request")).await;
    assert_eq!(got.status, StatusCode::NO_CONTENT);
    let heard = async { while !changes.next().await.contains(r#""cleared":true"#) {} };
    within("the clearing", heard).await;
    assert_eq!(inspected.get("/requests/http").await["requests"], json!([]));
}

#[tokio::test]
async fn messages_of_a_web_socket_are_recorded_both_ways() {
    let (stack, server) = (one_process().await, EchoServer::start().await);
    let inspected = Inspected::with(settings(&stack, server.address), None).await;
    let url = inspected.url("/chat").replace("http://", "ws://");
    let (mut socket, _) = connect_async(url).await.expect("a WebSocket");
    let long = "long ".repeat(50_000);
    for message in [
        Message::text("hello"),
        Message::binary(vec![0, 1, 2]),
        Message::text(&*long),
    ] {
        socket.send(message.clone()).await.expect("sent");
        assert_eq!(
            within("the echo", socket.next())
                .await
                .expect("open")
                .expect("a message"),
            message
        );
    }
    socket.close(None).await.expect("closed");
    while let Some(Ok(_)) = within("the end", socket.next()).await {}
    drop(socket);
    let exchange = inspected.ended().await;
    let messages = exchange["messages"].as_array().expect("messages");
    let said = |from: &str| -> Vec<_> {
        let of = messages
            .iter()
            .filter(|message| message["from"] == from && message["kind"] != "close");
        of.map(|message| (message["kind"].as_str(), message["size"].as_u64()))
            .collect()
    };
    let expected = vec![
        (Some("text"), Some(5)),
        (Some("binary"), Some(3)),
        (Some("text"), Some(250_000)),
    ];
    assert_eq!(said("visitor"), expected);
    assert_eq!(said("service"), expected);
    assert_eq!(messages[0]["text"], "hello");
    assert!(messages.iter().any(|message| message["truncated"] == true));
    let refused = inspected
        .post("/requests/http", &json!({ "id": exchange["id"] }))
        .await;
    assert_eq!(refused.status, StatusCode::CONFLICT);
}

#[tokio::test]
async fn history_survives_a_restart_without_secrets_and_for_its_owner_alone() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("history.db");
    let before = Inspected::with(settings(&stack, origin.address), Some(&file)).await;
    let request = Request::post(before.url("/kept?a=1"))
        .header("authorization", "Bearer s3cret")
        .header("x-kept", "yes")
        .body(Bytes::from_static(b"body"));
    visit(request.expect("a request")).await;
    let kept = before.ended().await;
    before.inspector.close();
    drop(before);
    for file in std::fs::read_dir(directory.path()).expect("a directory") {
        let file = file.expect("a file").path();
        let mode = std::fs::metadata(&file)
            .expect("a file")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{}", file.display());
        let bytes = std::fs::read(&file).expect("a file");
        assert!(!bytes.windows(6).any(|bytes| bytes == b"s3cret"));
    }

    let after = Inspected::with(settings(&stack, origin.address), Some(&file)).await;
    let found = after.get("/requests/http").await["requests"][0].clone();
    for field in [
        "id",
        "start",
        "method",
        "path",
        "state",
        "status_code",
        "request_bytes",
    ] {
        assert_eq!(found[field], kept[field], "{field}");
    }
    assert_eq!(found["request"], kept["request"]);
    assert_eq!(found["secrets_kept"], false);
    after.replay(&json!({ "id": found["id"] })).await;
    let seen = origin.last();
    assert_eq!(&seen.body[..], b"body");
    assert_eq!(
        (seen.header("x-kept"), seen.header("authorization")),
        (Some("yes"), None)
    );
    let request = Request::delete(format!("{}/requests/http", after.api));
    visit(request.body(Bytes::new()).expect("a request")).await;
    after.inspector.close();
    drop(after);
    let last = Inspected::with(settings(&stack, origin.address), Some(&file)).await;
    assert_eq!(last.get("/requests/http").await["requests"], json!([]));
}

#[tokio::test]
async fn a_file_that_is_no_history_is_not_touched() {
    let stack = stack().await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("notes.txt");
    std::fs::write(&file, "not a database, but the user's notes").expect("written");
    let options = InspectOptions {
        address: "127.0.0.1:0".parse().expect("an address"),
        history: Some(file.clone()),
        ..InspectOptions::default()
    };
    let origin = Origin::echo().await;
    let tunnels = [settings(&stack, origin.address)];
    let refused = Inspector::start(&options, &tunnels)
        .await
        .err()
        .expect("refused");
    assert!(refused.to_string().contains("notes.txt"), "{refused}");
    let text = std::fs::read_to_string(&file).expect("a file");
    assert_eq!(text, "not a database, but the user's notes");
}
