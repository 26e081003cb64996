//! Replies on their way back: pushed over a reply connection or through the mailbox, in windows, and to nobody else.
//! The way they take in AWS, whichever shape the suite runs in.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use local::{Options, Server, Transport};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tunnel_protocol::id::ConnectionId;

use crate::harness::{
    Origin, ScriptedAgent, agent, get, post, response, response_with, stack, visit, within,
};

async fn as_in_aws() -> Server {
    let listen = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    Server::start(Options {
        listen,
        transport: Transport::Emulated,
        ..Options::default()
    })
    .await
    .expect("a stack")
}

/// An agent on a tunnel of this name that answers over reply connections, once there is one.
async fn connected(stack: &Server, name: &str) -> (ScriptedAgent, String) {
    let agent = ScriptedAgent::online(stack, name, &["body_parts", "reply_to"]).await;
    (agent, format!("{}/{name}/", stack.public_url))
}

/// Visits until the request names a reply connection, and answers each visit over it.
async fn reply_connection(agent: &mut ScriptedAgent, url: &str) -> Value {
    within("a reply connection", async {
        loop {
            let mut reply_to = Value::Null;
            let (got, ()) = tokio::join!(get(url), async {
                let request = agent.hear().await;
                reply_to = request["reply_to"].clone();
                let more = if reply_to.is_null() {
                    json!({})
                } else {
                    json!({ "reply_to": reply_to })
                };
                agent.say(&response_with(&request, "aGk=", &more)).await;
            });
            assert_eq!((got.status, &got.body[..]), (StatusCode::OK, &b"hi"[..]));
            if !reply_to.is_null() {
                return reply_to;
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_reply_is_found_whether_it_names_a_reply_connection_or_not() {
    let stack = as_in_aws().await;
    let (mut agent, url) = connected(&stack, "my-app").await;
    reply_connection(&mut agent, &url).await;
    let got = agent
        .answer(&url, |request| vec![response(request, "bWFpbGJveA==")])
        .await;
    assert_eq!(&got.body[..], b"mailbox");
}

#[tokio::test]
async fn an_agent_cannot_make_the_service_send_to_another_agent() {
    let stack = as_in_aws().await;
    let (mut agent, url) = connected(&stack, "my-app").await;
    let mut other = ScriptedAgent::connect(&stack, "?tunnel_id=other").await;
    let other_id = other.ready(&json!({ "type": "ready" })).await["connection_id"].clone();

    let got = agent
        .answer(&url, |request| {
            vec![response_with(
                request,
                "aGk=",
                &json!({ "reply_to": other_id }),
            )]
        })
        .await;

    assert_eq!(&got.body[..], b"hi", "the mailbox took it");
    other.expect_quiet("it heard something before").await;
}

#[tokio::test]
async fn what_is_no_reply_is_dealt_with_also_when_it_names_a_reply_connection() {
    let stack = as_in_aws().await;
    let (mut agent, url) = connected(&stack, "my-app").await;
    let reply_to = reply_connection(&mut agent, &url).await;
    agent
        .say(&json!({ "type": "ping", "reply_to": reply_to }))
        .await;
    assert_eq!(agent.hear().await, json!({ "type": "pong" }));
}

#[tokio::test]
async fn a_reply_connection_that_is_killed_costs_no_request() {
    let stack = as_in_aws().await;
    let (mut agent, url) = connected(&stack, "my-app").await;
    let first = reply_connection(&mut agent, &url).await;
    let id: ConnectionId = serde_json::from_value(first.clone()).expect("an id");

    // While a request waits that named it.
    let got = agent
        .answer(&url, |request| {
            assert_eq!(request["reply_to"], first);
            stack.disconnect(&id).expect("open until now");
            vec![response_with(
                request,
                "aGk=",
                &json!({ "reply_to": first }),
            )]
        })
        .await;
    assert_eq!((got.status, &got.body[..]), (StatusCode::OK, &b"hi"[..]));

    // Until this side has seen its end, requests may still name it, and are answered all the same.
    within("another one to be opened", async {
        while reply_connection(&mut agent, &url).await == first {}
    })
    .await;
}

#[tokio::test]
async fn a_reply_connection_cannot_be_opened_without_a_ticket() {
    let stack = as_in_aws().await;
    for ticket in [None, Some("ttf_0000")] {
        let refused = ScriptedAgent::try_connect(&stack, "?reply=1", ticket).await;
        assert!(
            matches!(refused, Err(tokio_tungstenite::tungstenite::Error::Http(response)) if response.status() == 401)
        );
    }
}

#[tokio::test]
async fn a_body_goes_on_only_as_far_as_the_receiver_allows() {
    let stack = stack().await;
    let mut agent = ScriptedAgent::online(&stack, "my-app", &["body_parts", "window"]).await;
    let url = format!("{}/my-app/", stack.public_url);

    // Ten megabytes are more than a hundred parts; 32 of them, numbered 0 to 31, may be sent unasked.
    let upload = post(&url, vec![b'x'; 10_000_000]);
    let told = async {
        let request = agent.hear().await;
        let mut last = 0;
        while last < 31 {
            last = agent.hear().await["part"].as_u64().expect("a part");
        }
        agent.expect_quiet("a part beyond the window came").await;
        agent
            .say(&json!({ "type": "window", "request_id": request["request_id"], "parts": 34 }))
            .await;
        assert_eq!(
            [
                agent.hear().await["part"].clone(),
                agent.hear().await["part"].clone()
            ],
            [32, 33]
        );
    };
    tokio::select! {
        () = told => {}
        got = upload => panic!("nobody answered, and yet: {got:?}"),
    }
}

#[tokio::test]
async fn a_visitor_who_does_not_read_stops_the_local_service_and_not_the_tunnel() {
    let stack = stack().await;
    let produced = Arc::new(AtomicUsize::new(0));
    let counted = produced.clone();
    let origin = Origin::answering(move |_| {
        let counted = counted.clone();
        let endless = futures_util::stream::repeat_with(move || {
            counted.fetch_add(64 * 1024, Ordering::Relaxed);
            Ok(Frame::data(Bytes::from(vec![b'x'; 64 * 1024])))
        });
        Some(Response::new(StreamBody::new(endless).boxed()))
    })
    .await;
    let agent = agent(&stack, &origin).await;
    let authority = stack.public_url.to_string().split_off("http://".len());
    let mut slow = tokio::net::TcpStream::connect(authority)
        .await
        .expect("a connection");
    slow.write_all(b"GET /my-app/ HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .expect("sent");
    let mut start = [0; 1024];
    slow.read_exact(&mut start)
        .await
        .expect("the start of an endless body");

    // It stops: the count stays the same while other requests go on.
    let stopped = within("the local service to be stopped", async {
        loop {
            let before = produced.load(Ordering::Relaxed);
            for _ in 0..20 {
                let request = http::Request::head(&agent.url)
                    .body("".into())
                    .expect("a request");
                assert_eq!(visit(request).await.status, StatusCode::OK);
            }
            if produced.load(Ordering::Relaxed) == before {
                return before;
            }
        }
    })
    .await;
    assert!(
        stopped < 32 * 1024 * 1024,
        "{stopped} bytes are kept for a visitor who does not read"
    );
}

#[tokio::test]
async fn a_request_returned_by_a_replaced_agent_is_sent_to_the_one_that_serves_now() {
    let stack = stack().await;
    let mut old = ScriptedAgent::online(&stack, "my-app", &["notices"]).await;
    let url = format!("{}/my-app/", stack.public_url);
    // Which connection serves the tunnel is remembered now.
    old.answer(&url, |request| vec![response(request, "b2xk")])
        .await;
    let mut new = ScriptedAgent::online(&stack, "my-app", &[]).await;
    assert_eq!(old.hear().await["type"], "replaced");

    let give_back = async {
        loop {
            let id = old.hear().await["request_id"].clone();
            old.say(
                &json!({ "type": "error", "request_id": id, "code": "replaced", "message": "" }),
            )
            .await;
        }
    };
    let visit = async {
        tokio::join!(post(&url, "once"), async {
            let request = new.hear().await;
            assert_eq!(request["body"], "b25jZQ==");
            new.say(&response(&request, "bmV3")).await;
        })
    };
    let got = tokio::select! {
        (got, ()) = visit => got,
        () = give_back => unreachable!("it goes on for ever"),
    };
    assert_eq!((got.status, &got.body[..]), (StatusCode::OK, &b"new"[..]));
}

#[tokio::test]
async fn a_request_whose_agent_died_is_repeated_only_if_that_is_safe() {
    let stack = stack().await;
    for (method, is_repeated) in [("GET", true), ("POST", false)] {
        let mut old = ScriptedAgent::online(&stack, "my-app", &["notices"]).await;
        let request = http::Request::builder()
            .method(method)
            .uri(format!("{}/my-app/", stack.public_url));
        let visit = visit(request.body("".into()).expect("a request"));
        let story = async {
            let first = old.hear().await["request_id"].clone();
            // Another connection of the owner serves the tunnel by the time the first one breaks.
            let mut new = ScriptedAgent::online(&stack, "my-app", &[]).await;
            drop(old);
            if is_repeated {
                let request = new.hear().await;
                // An agent carries out no request twice, also where both connections are its own.
                assert_ne!(request["request_id"], first);
                new.say(&response(&request, "bmV3")).await;
            }
            new
        };
        let (got, mut new) = tokio::join!(visit, story);
        if is_repeated {
            assert_eq!((got.status, &got.body[..]), (StatusCode::OK, &b"new"[..]));
        } else {
            assert_eq!(
                (got.status, got.error()),
                (StatusCode::BAD_GATEWAY, Some("agent_lost"))
            );
            new.expect_quiet("it was sent again").await;
        }
    }
}
