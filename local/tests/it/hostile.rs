//! Agents and services that do what they must not: what becomes of the requests concerned, and that all others go on.

use http::StatusCode;
use local::{Options, Server, Transport};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tunnel_protocol::limits::MAX_REORDER_PARTS;

use crate::harness::{
    Agent, Origin, ScriptedAgent, ScriptedService, get, reply, response, settings_for, stack,
    stack_in_order, within,
};

async fn still_serves(agent: &mut ScriptedAgent, url: &str) {
    let got = agent
        .answer(url, |request| vec![response(request, "aGk=")])
        .await;
    assert_eq!((got.status, &got.body[..]), (StatusCode::OK, &b"hi"[..]));
}

#[tokio::test]
async fn a_reply_that_is_not_a_valid_response_is_a_502_at_once() {
    let stack = stack().await;
    let mut agent = ScriptedAgent::online(&stack, "my-app", &["body_parts", "reply_to"]).await;
    let url = format!("{}/my-app/", stack.public_url);
    let many: serde_json::Map<String, Value> = (0..300)
        .map(|number| (format!("x-{number}"), json!(["1"])))
        .collect();
    let with_headers = |headers: Value| json!({ "status_code": 200, "headers": headers });
    for response in [
        with_headers(json!(many)),
        with_headers(json!({ "x": vec!["1"; 300] })),
        with_headers(json!({ "x\r\nset-cookie": ["evil=1"] })),
        with_headers(json!({ "x: 1\r\nset-cookie: evil=1\r\n\r\n<html>": ["1"] })),
        with_headers(json!({ "x": ["1\r\nset-cookie: evil=1"] })),
        with_headers(json!({ "x": ["1\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"] })),
        with_headers(json!({ "x": ["1\nset-cookie: evil=1"] })),
        with_headers(json!({ "x": ["1\u{0}"] })),
        with_headers(json!({ "": ["1"] })),
        with_headers(json!({ "x y": ["1"] })),
        with_headers(json!({ "x": "1" })),
        json!({ "status_code": "200" }),
        json!({ "status_code": -1 }),
        json!({ "status_code": 70000 }),
        json!({ "status_code": 0 }),
        json!({ "status_code": 100 }),
        json!({ "status_code": 101 }),
        json!({ "status_code": 102 }),
        json!({ "status_code": 103 }),
        json!({ "status_code": 199 }),
        json!({ "status_code": 1000 }),
        json!({}),
        json!({ "status_code": 200, "body": "%%%" }),
        json!({ "status_code": 200, "body": "aGk=", "encoding": "zstd" }),
        json!({ "status_code": 200, "body": "aGk=", "encoding": "brotli" }),
    ] {
        for has_reply_to in [false, true] {
            let (got, ()) = tokio::join!(crate::harness::try_get(&url), async {
                let request = agent.hear().await;
                let mut message = response.clone();
                message["type"] = json!("http_response");
                message["request_id"] = request["request_id"].clone();
                if has_reply_to && let Some(to) = request.get("reply_to") {
                    message["reply_to"] = to.clone();
                }
                agent.say(&message).await;
            });
            match got {
                Ok(got) => {
                    assert_eq!(
                        (got.status, got.error()),
                        (StatusCode::BAD_GATEWAY, Some("invalid_reply")),
                        "{response}"
                    );
                    assert_eq!(got.header("set-cookie"), None, "{response}");
                }
                // The head was good, and the body was found bad behind it.
                Err(_) => assert_eq!(response["encoding"], "zstd", "{response}"),
            }
        }
    }
    still_serves(&mut agent, &url).await;
}

#[tokio::test]
async fn parts_that_cannot_be_ordered_or_are_repeated_do_no_harm() {
    let stack = stack().await;
    let mut agent = ScriptedAgent::online(&stack, "my-app", &["body_parts"]).await;
    let url = format!("{}/my-app/", stack.public_url);
    let head = |id: &Value, body: &str, more: bool| json!({ "type": "http_response", "request_id": id, "status_code": 200, "headers": {}, "body": body, "more": more });
    let part = |id: &Value, number: u64, body: &str, more: bool| json!({ "type": "body_part", "request_id": id, "part": number, "body": body, "more": more });

    for number in [
        MAX_REORDER_PARTS as u64,
        1000,
        u64::from(u32::MAX) - 2,
        u64::from(u32::MAX),
        u64::from(u32::MAX) + 1,
    ] {
        let got = agent
            .answer(&url, |request| {
                vec![part(&request["request_id"], number, "MQ==", true)]
            })
            .await;
        assert_eq!(
            (got.status, got.error()),
            (StatusCode::BAD_GATEWAY, Some("invalid_reply")),
            "part {number}"
        );
    }
    let got = agent
        .answer(&url, |request| {
            vec![part(&request["request_id"], 0, "MQ==", false)]
        })
        .await;
    assert_eq!(
        (got.status, got.error()),
        (StatusCode::BAD_GATEWAY, Some("invalid_reply")),
        "a part with the number of the head"
    );

    // The same again changes nothing, before the part was taken or after it.
    let (got, ()) = tokio::join!(get(&url), async {
        let id = &agent.hear().await["request_id"];
        for message in [
            head(id, "MA==", true),
            part(id, 1, "MQ==", true),
            part(id, 1, "MQ==", true),
            head(id, "MA==", true),
            part(id, 2, "Mg==", false),
        ] {
            agent.say(&message).await;
        }
        agent.say(&part(id, 3, "Mw==", true)).await;
    });
    assert_eq!((got.status, &got.body[..]), (StatusCode::OK, &b"012"[..]));
    still_serves(&mut agent, &url).await;
}

#[tokio::test]
async fn guessed_request_ids_reach_no_visitor() {
    let stack = stack_in_order().await;
    let mut agent = ScriptedAgent::online(&stack, "my-app", &[]).await;
    let url = format!("{}/my-app/", stack.public_url);
    let (got, ()) = tokio::join!(get(&url), async {
        let id = agent.hear().await["request_id"].clone();
        let text = id.as_str().expect("an id");
        let (start, end) = text.split_at(text.len() - 1);
        let next = format!("{start}{}", if end == "0" { "1" } else { "0" });
        for guess in [
            &*next,
            "",
            "0",
            "*",
            "../x",
            "a/b",
            &"0".repeat(64),
            &"0".repeat(65),
            &text.to_lowercase(),
        ] {
            agent
                .say(&json!({ "type": "http_response", "request_id": guess, "status_code": 200, "headers": {}, "body": "ZXZpbA==" }))
                .await;
        }
        agent.say(&json!({ "type": "http_response", "request_id": id, "status_code": 200, "headers": {}, "body": "Z29vZA==" })).await;
    });
    assert_eq!((got.status, &got.body[..]), (StatusCode::OK, &b"good"[..]));
}

#[tokio::test]
async fn an_agent_that_sends_a_thousand_parts_to_a_visitor_who_does_not_read_loses_the_request() {
    const PART: usize = 24_000;
    // Where parts are pushed; the mailbox holds what nobody asks for, as long as it does anything.
    let listen = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let stack = Server::start(Options {
        listen,
        transport: Transport::InProcess,
        ..Options::default()
    })
    .await
    .expect("a stack");
    let mut agent =
        ScriptedAgent::online(&stack, "my-app", &["body_parts", "cancel", "window"]).await;
    let authority = stack.public_url.to_string().split_off("http://".len());
    let mut slow = tokio::net::TcpStream::connect(authority)
        .await
        .expect("a connection");
    slow.write_all(b"GET /my-app/ HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .await
        .expect("sent");
    let id = agent.hear().await["request_id"].clone();
    agent.say(&json!({ "type": "http_response", "request_id": id, "status_code": 200, "headers": {}, "body": "", "more": true })).await;
    let body = "A".repeat(PART / 3 * 4);
    for part in 1..=1000 {
        agent.say(&json!({ "type": "body_part", "request_id": id, "part": part, "body": body, "more": part < 1000 })).await;
    }
    agent.say(&json!({ "type": "ping" })).await;
    let mut heard = Vec::new();
    while heard.last() != Some(&json!("pong")) {
        heard.push(agent.hear().await["type"].clone());
    }

    let mut got = Vec::new();
    within("the end of the response", slow.read_to_end(&mut got))
        .await
        .expect("read");
    assert!(
        got.len() < 500 * PART,
        "{} bytes were kept for a visitor who does not read",
        got.len()
    );
    assert!(
        !got.ends_with(b"0\r\n\r\n"),
        "a response that broke off looks complete"
    );
    if !heard.contains(&json!("cancel")) {
        within("cancel", async {
            while agent.hear().await["type"] != "cancel" {}
        })
        .await;
    }
    let url = format!("{}/my-app/", stack.public_url);
    still_serves(&mut agent, &url).await;
}

#[tokio::test]
async fn a_request_that_the_service_sends_twice_is_carried_out_once() {
    let (service, origin) = (ScriptedService::listening().await, Origin::echo().await);
    let mut agent = Agent::start(settings_for(&service.endpoint, origin.address));
    let mut connection = service.accept().await;
    connection.hear().await;
    connection.establish("my-app", &["body_parts"]).await;
    agent.until_online().await;

    let request = |id: &str| json!({ "type": "http_request", "request_id": id, "method": "POST", "uri": "/", "headers": {}, "body": "aGk=" });
    for _ in 0..3 {
        connection.say(&request("once")).await;
    }
    assert_eq!(connection.hear().await["request_id"], "once");
    connection.say(&request("once")).await;
    connection.say(&request("next")).await;
    assert_eq!(
        connection.hear().await["request_id"],
        "next",
        "an answer came twice"
    );
    assert_eq!(origin.count(), 2);
}

#[tokio::test]
async fn an_agent_sends_no_part_that_the_service_has_not_allowed() {
    let service = ScriptedService::listening().await;
    let origin = Origin::answering(|seen| {
        let length = if seen.uri.path() == "/long" {
            10_000_000
        } else {
            2
        };
        Some(reply(StatusCode::OK, vec![b'x'; length]))
    })
    .await;
    let mut agent = Agent::start(settings_for(&service.endpoint, origin.address));
    let mut connection = service.accept().await;
    connection.hear().await;
    connection
        .establish("my-app", &["body_parts", "window"])
        .await;
    agent.until_online().await;

    let request = |id: &str, uri: &str| json!({ "type": "http_request", "request_id": id, "method": "GET", "uri": uri, "headers": {} });
    connection.say(&request("long", "/long")).await;
    assert_eq!(connection.hear().await["type"], "http_response");
    for part in 1..32 {
        assert_eq!(connection.hear().await["part"], part);
    }
    // However often it is spoken to meanwhile, nothing more comes.
    for id in ["short-1", "short-2", "short-3"] {
        connection.say(&request(id, "/short")).await;
        assert_eq!(connection.hear().await["request_id"], id);
    }
    connection
        .say(&json!({ "type": "window", "request_id": "long", "parts": 34 }))
        .await;
    let parts = [connection.hear().await, connection.hear().await];
    assert_eq!(
        parts.map(|message| message["part"].clone()),
        [json!(32), json!(33)]
    );
}

#[tokio::test]
async fn nonsense_from_a_service_harms_no_agent() {
    let (service, origin) = (ScriptedService::listening().await, Origin::echo().await);
    let mut agent = Agent::start(settings_for(&service.endpoint, origin.address));
    let mut connection = service.accept().await;
    connection.hear().await;
    connection
        .establish("my-app", &["body_parts", "window"])
        .await;
    agent.until_online().await;

    for nonsense in [
        json!({}),
        json!([]),
        json!({ "type": "http_request" }),
        json!({ "type": "http_request", "request_id": "a/b", "method": "GET", "uri": "/" }),
        json!({ "type": "body_part", "request_id": "unknown", "part": 1, "body": "aGk=" }),
        json!({ "type": "window", "request_id": "unknown", "parts": u32::MAX }),
        json!({ "type": "cancel", "request_id": "unknown" }),
        json!({ "type": "http_request", "request_id": "r1", "method": "GET", "uri": "/", "headers": { "x": ["1\r\nx-evil: 1"] } }),
    ] {
        connection.say(&nonsense).await;
    }
    // What names its request is answered.
    let heard = connection.hear().await;
    assert_eq!(
        (&heard["request_id"], &heard["code"]),
        (&json!("r1"), &json!("invalid_request"))
    );
    for (id, method, uri) in [
        ("r2", "GET", "http://elsewhere.example/"),
        ("r3", "CONNECT", "/"),
        ("r4", "GE T", "/"),
        ("r5", "GET", "//["),
    ] {
        connection
            .say(&json!({ "type": "http_request", "request_id": id, "method": method, "uri": uri }))
            .await;
        let heard = connection.hear().await;
        let is_refused =
            (&heard["type"], &heard["code"]) == (&json!("error"), &json!("invalid_request"));
        assert!(
            is_refused || (id == "r5" && heard["type"] == "http_response"),
            "{method} {uri}: {heard}"
        );
        assert_eq!(heard["request_id"], id);
    }
    // A body that goes on far beyond what was allowed.
    connection.say(&json!({ "type": "http_request", "request_id": "r6", "method": "POST", "uri": "/", "more": true })).await;
    connection.say(&json!({ "type": "body_part", "request_id": "r6", "part": 1000, "body": "aGk=", "more": false })).await;
    let heard = connection.hear().await;
    assert_eq!(
        (&heard["request_id"], &heard["code"]),
        (&json!("r6"), &json!("busy"))
    );

    connection.say(&json!({ "type": "http_request", "request_id": "r7", "method": "POST", "uri": "/good", "body": "aGk=" })).await;
    let heard = connection.hear().await;
    assert_eq!(
        (&heard["request_id"], &heard["body"]),
        (&json!("r7"), &json!("aGk="))
    );
    assert_eq!(origin.last().uri.path(), "/good");
}
