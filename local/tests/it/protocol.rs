//! Agents of other versions, and agents that say what they should not.

use bytes::{Buf, Bytes};
use http::StatusCode;
use local::Transport;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    harness::{
        Agent, Origin, ScriptedAgent, ScriptedService, get, post, reply, settings_for, stack,
        stack_in_order, within,
    },
    websocket::{one_process, stack_as},
};

#[tokio::test]
async fn an_agent_that_knows_only_the_first_messages_serves_small_requests() {
    let stack = stack().await;
    let mut agent = ScriptedAgent::connect(&stack, "?tunnel_id=old-one").await;
    let established = agent.ready(&json!({ "type": "ready" })).await;
    assert_eq!(established["type"], "connection_established");
    assert_eq!(established["tunnel_id"], "old-one");
    assert_eq!(
        established["public_url"],
        format!("{}/old-one", stack.public_url)
    );

    agent.say(&json!({ "type": "ping" })).await;
    assert_eq!(agent.hear().await, json!({ "type": "pong" }));

    let url = format!("{}/old-one/x?y=1", stack.public_url);
    let (got, ()) = tokio::join!(post(&url, "hello"), async {
        let request = agent.hear().await;
        assert_eq!(
            (&request["type"], &request["method"], &request["uri"]),
            (&json!("http_request"), &json!("POST"), &json!("/x?y=1"))
        );
        assert_eq!(
            (&request["body"], &request["more"]),
            (&json!("aGVsbG8="), &json!(null))
        );
        let (id, headers) = (&request["request_id"], json!({ "x-a": ["1"] }));
        agent.say(&json!({ "type": "http_response", "request_id": id, "status_code": 201, "headers": headers, "body": "aGk=", "processing_time_ms": 1 })).await;
    });
    assert_eq!(
        (got.status, got.header("x-a"), &got.body[..]),
        (StatusCode::CREATED, Some("1"), &b"hi"[..])
    );

    let (got, ()) = tokio::join!(get(&url), async {
        let id = agent.hear().await["request_id"].clone();
        agent.say(&json!({ "type": "error", "request_id": id, "code": "local_service_unavailable", "message": "refused" })).await;
    });
    assert_eq!(
        (got.status, got.error()),
        (StatusCode::BAD_GATEWAY, Some("local_unreachable"))
    );
}

#[tokio::test]
async fn an_old_agent_is_never_sent_what_it_did_not_announce() {
    let stack = stack().await;
    let mut agent = ScriptedAgent::online(&stack, "old-one", &[]).await;

    let got = post(&format!("{}/old-one/", stack.public_url), vec![0; 200_000]).await;
    assert_eq!(
        (got.status, got.error()),
        (StatusCode::PAYLOAD_TOO_LARGE, Some("too_large"))
    );

    agent.expect_quiet("it was sent a part of that body").await;
}

#[tokio::test]
async fn a_service_that_knows_only_the_first_messages_is_served() {
    let service = ScriptedService::listening().await;
    let origin = Origin::answering(|seen| {
        let is_long = seen.uri.path() == "/long";
        Some(reply(
            StatusCode::OK,
            if is_long {
                vec![b'x'; 1_000_000]
            } else {
                b"hi".to_vec()
            },
        ))
    })
    .await;
    let mut agent = Agent::start(settings_for(&service.endpoint, origin.address));
    let mut connection = service.accept().await;
    connection.hear().await;
    connection.say(&json!({ "type": "connection_established", "connection_id": "c=", "tunnel_id": "my-app", "public_url": "https://tunnel.example.com/my-app" })).await;
    agent.until_online().await;

    let request = |id: &str, uri: &str| json!({ "type": "http_request", "request_id": id, "method": "POST", "uri": uri, "headers": { "x-a": ["1"] }, "body": "aGVsbG8=", "timestamp": 0 });
    connection.say(&request("short", "/short")).await;
    let heard = connection.hear().await;
    assert_eq!(
        (
            &heard["type"],
            &heard["request_id"],
            &heard["status_code"],
            &heard["body"]
        ),
        (
            &json!("http_response"),
            &json!("short"),
            &json!(200),
            &json!("aGk=")
        )
    );
    assert_eq!(
        (&heard["more"], &heard["encoding"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(
        (&origin.last().body[..], origin.last().header("x-a")),
        (&b"hello"[..], Some("1"))
    );

    // It takes no parts, so what does not fit into one message cannot be answered.
    connection.say(&request("long", "/long")).await;
    let heard = connection.hear().await;
    assert_eq!(
        (&heard["type"], &heard["request_id"], &heard["code"]),
        (
            &json!("error"),
            &json!("long"),
            &json!("response_too_large")
        )
    );
}

/// A binary message with a compact head, as docs/protocol.md has it.
fn compact(fields: &[(&str, &[u8])], body: &[u8]) -> Bytes {
    let length = |text: &[u8]| u32::try_from(text.len()).expect("short").to_be_bytes();
    let head: Vec<u8> = fields
        .iter()
        .flat_map(|(name, value)| [name.as_bytes(), value])
        .flat_map(|text| [&length(text)[..], text].concat())
        .collect();
    [&length(&head)[..], &head, body].concat().into()
}

/// The fields of a compact head, and the body behind it.
fn read_compact(message: &Bytes) -> (Vec<(String, Vec<u8>)>, Bytes) {
    fn text(bytes: &mut Bytes) -> Bytes {
        let length = bytes.get_u32();
        bytes.split_to(length.try_into().expect("64 bits"))
    }
    let mut body = message.clone();
    let mut head = text(&mut body);
    let mut fields = Vec::new();
    while !head.is_empty() {
        let (name, value) = (text(&mut head), text(&mut head));
        let name = String::from_utf8(name.into()).expect("a name");
        fields.push((name, value.into()));
    }
    (fields, body)
}

#[tokio::test]
async fn requests_and_responses_have_compact_heads_where_the_agent_reads_them() {
    let stack = one_process().await;
    let mut agent = ScriptedAgent::online(&stack, "compact", &["binary", "compact_heads"]).await;
    let url = format!("{}/compact/x?y=1", stack.public_url);
    for upload in [&b""[..], b"\0 raw"] {
        let (got, ()) = tokio::join!(post(&url, upload), async {
            let (fields, body) = read_compact(&agent.hear_binary().await);
            let field = |name: &str| {
                fields
                    .iter()
                    .find(|field| field.0 == name)
                    .map(|field| &field.1[..])
            };
            assert_eq!(fields[0], (":type".to_owned(), b"http_request".to_vec()));
            assert_eq!(field(":method"), Some(&b"POST"[..]));
            assert_eq!(field(":uri"), Some(&b"/x?y=1"[..]));
            assert_eq!(field("x-forwarded-prefix"), Some(&b"/compact"[..]));
            assert_eq!((field(":more"), &body[..]), (None, upload));
            let head: [(&str, &[u8]); 8] = [
                (":type", b"http_response"),
                (":request_id", field(":request_id").expect("an id")),
                (":status_code", b"201"),
                (":from_the_future", b"x"),
                ("set-cookie", b"a=1"),
                ("x-latin-1", b"caf\xe9"),
                ("set-cookie", b"b=2"),
                ("connection", b"x-hop"),
            ];
            agent.send(Message::binary(compact(&head, upload))).await;
        });
        assert_eq!((got.status, &got.body[..]), (StatusCode::CREATED, upload));
        let cookies: Vec<_> = got.headers.get_all("set-cookie").iter().collect();
        assert_eq!(cookies, ["a=1", "b=2"]);
        assert_eq!(got.headers["x-latin-1"].as_bytes(), b"caf\xe9");
    }
}

#[tokio::test]
async fn a_compact_head_that_cannot_be_read_fails_its_request() {
    let stack = one_process().await;
    let mut agent = ScriptedAgent::online(&stack, "faulty", &["binary", "compact_heads"]).await;
    let url = format!("{}/faulty/", stack.public_url);
    for fault in [
        (":status_code", &b"99"[..]),
        (":status_code", b"two hundred"),
        ("x-a", b"1\r\nx-b: 2"),
        ("x a", b"1"),
    ] {
        let (got, ()) = tokio::join!(get(&url), async {
            let (fields, _) = read_compact(&agent.hear_binary().await);
            let id = fields.iter().find(|field| field.0 == ":request_id");
            let head: [(&str, &[u8]); 3] = [
                (":type", b"http_response"),
                (":request_id", &id.expect("an id").1),
                fault,
            ];
            agent.send(Message::binary(compact(&head, b""))).await;
        });
        assert_eq!(
            (got.status, got.error()),
            (StatusCode::BAD_GATEWAY, Some("invalid_reply")),
            "{fault:?}"
        );
    }
}

#[tokio::test]
async fn heads_are_compact_for_no_agent_that_does_not_read_them_and_never_behind_api_gateway() {
    for (stack, features) in [
        (one_process().await, &["binary"][..]),
        (one_process().await, &["compact_heads"]),
        (
            stack_as(Transport::Emulated).await,
            &["binary", "compact_heads"],
        ),
    ] {
        let mut agent = ScriptedAgent::online(&stack, "plain", features).await;
        let url = format!("{}/plain/", stack.public_url);
        let answer = |request: &Value| {
            let id = &request["request_id"];
            vec![json!({ "type": "http_response", "request_id": id, "status_code": 204 })]
        };
        let got = agent.answer(&url, answer).await;
        assert_eq!(got.status, StatusCode::NO_CONTENT, "{features:?}");
    }
}

#[tokio::test]
async fn parts_may_arrive_in_any_order_and_twice() {
    let stack = stack().await;
    let mut agent = ScriptedAgent::online(&stack, "shuffles", &["body_parts"]).await;

    let url = format!("{}/shuffles/", stack.public_url);
    let (got, ()) = tokio::join!(get(&url), async {
        let id = agent.hear().await["request_id"].clone();
        let part = |number: u32, body: &str, more: bool| json!({ "type": "body_part", "request_id": id, "part": number, "body": body, "more": more });
        agent.say(&part(2, "Mg==", true)).await;
        agent.say(&part(3, "Mw==", false)).await;
        agent.say(&part(2, "WA==", true)).await;
        agent
            .say(&json!({ "type": "http_response", "request_id": id, "status_code": 200, "headers": {}, "body": "MA==", "more": true }))
            .await;
        agent.say(&part(1, "MQ==", true)).await;
    });
    assert_eq!(got.status, StatusCode::OK);
    assert!(
        ["0123", "01X3"].contains(&std::str::from_utf8(&got.body).expect("text")),
        "{got:?}"
    );
}

#[tokio::test]
async fn an_agent_cannot_answer_in_place_of_another() {
    let stack = stack_in_order().await;
    let mut asked = ScriptedAgent::online(&stack, "asked", &[]).await;
    let mut other = ScriptedAgent::online(&stack, "other", &[]).await;

    let url = format!("{}/asked/", stack.public_url);
    let (got, ()) = tokio::join!(get(&url), async {
        let id = asked.hear().await["request_id"].clone();
        let answer = |body: &str| json!({ "type": "http_response", "request_id": id, "status_code": 200, "headers": {}, "body": body });
        other.say(&answer("ZXZpbA==")).await;
        other.expect_quiet("it was sent something").await;
        asked.say(&answer("Z29vZA==")).await;
    });
    assert_eq!(&got.body[..], b"good");
}

#[tokio::test]
async fn nonsense_is_ignored_and_invalid_responses_are_refused() {
    let stack = stack().await;
    let mut agent = ScriptedAgent::online(&stack, "nonsense", &[]).await;
    for nonsense in [
        "",
        "nonsense",
        "[]",
        "{}",
        "{\"type\":\"http_response\"}",
        "{\"type\":\"from_the_future\",\"x\":1}",
    ] {
        agent.send(Message::text(nonsense)).await;
    }

    let url = format!("{}/nonsense/", stack.public_url);
    for status in [99, 101, 1000] {
        let (got, ()) = tokio::join!(get(&url), async {
            let id = agent.hear().await["request_id"].clone();
            agent.say(&json!({ "type": "http_response", "request_id": id, "status_code": status, "headers": {}, "body": "" })).await;
        });
        assert_eq!(
            (got.status, got.error()),
            (StatusCode::BAD_GATEWAY, Some("invalid_reply")),
            "{status}"
        );
    }
}

#[tokio::test]
async fn a_visitor_who_leaves_cancels_the_request() {
    let stack = stack().await;
    let mut agent = ScriptedAgent::online(&stack, "patient", &["cancel"]).await;

    let url = format!("{}/patient/", stack.public_url);
    let id = tokio::select! {
        got = get(&url) => panic!("answered: {got:?}"),
        request = agent.hear() => request["request_id"].clone(),
    };

    assert_eq!(
        within("cancel", agent.hear()).await,
        json!({ "type": "cancel", "request_id": id })
    );
}

#[tokio::test]
async fn an_answer_to_a_ping_has_its_id() {
    let stack = stack_in_order().await;
    let mut old = ScriptedAgent::online(&stack, "my-app", &["notices"]).await;
    old.say(&json!({ "type": "ping", "id": 7 })).await;
    assert_eq!(old.hear().await, json!({ "type": "pong", "id": 7 }));
    let _new = ScriptedAgent::online(&stack, "my-app", &["notices"]).await;
    assert_eq!(old.hear_type("replaced").await.get("id"), None);
    old.say(&json!({ "type": "ping", "id": 8 })).await;
    assert_eq!(old.hear_type("replaced").await["id"], 8);
}
