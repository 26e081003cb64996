//! Agents of other versions, and agents that say what they should not.

use http::StatusCode;
use serde_json::{Value, json};

use crate::harness::{
    Agent, Origin, ScriptedAgent, ScriptedService, get, post, reply, settings_for, stack,
    stack_in_order, within,
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
        agent
            .send(tokio_tungstenite::tungstenite::Message::text(nonsense))
            .await;
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
