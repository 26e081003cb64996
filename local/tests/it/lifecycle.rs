//! Coming, going, losing and taking over.

use std::net::SocketAddr;

use forwarder::{event::Event, settings::Secret, tunnel::TunnelError};
use http::StatusCode;
use local::{Options, Server};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::yield_now,
};
use tokio_tungstenite::tungstenite;
use tunnel_local_aws::quotas::Quotas;
use tunnel_protocol::id::ConnectionId;
use tunnel_service::{auth::AuthMode, now};

use crate::harness::{
    Agent, Origin, ScriptedAgent, agent, get, reply, settings, stack, stack_in_order, stack_with,
    within,
};

#[expect(clippy::needless_pass_by_value, reason = "what Agent::until takes")]
fn offline(event: Event) -> Option<()> {
    matches!(event, Event::Reconnecting { .. }).then_some(())
}

#[tokio::test]
async fn visitors_of_an_unknown_tunnel_get_404_and_of_an_offline_one_503() {
    let (stack, origin) = (stack().await, Origin::echo().await);

    let unknown = get(&format!("{}/my-app/", stack.public_url)).await;
    assert_eq!(
        (unknown.status, unknown.error()),
        (StatusCode::NOT_FOUND, Some("tunnel_not_found"))
    );

    let agent = agent(&stack, &origin).await;
    let url = agent.url.clone();
    assert_eq!(get(&url).await.status, StatusCode::OK);
    agent.stop().await.expect("stopped as asked");
    // The tunnel goes offline when $disconnect has been handled, or at the first request that finds its agent gone.
    let offline = get(&url).await;
    assert_eq!(
        (offline.status, offline.error()),
        (StatusCode::SERVICE_UNAVAILABLE, Some("tunnel_offline"))
    );
    assert!(offline.header("retry-after").is_some());
}

#[tokio::test]
async fn browsers_get_a_page_and_others_json() {
    let stack = stack().await;
    let url = format!("{}/my-app/", stack.public_url);
    let page = crate::harness::visit(
        http::Request::get(&url)
            .header("accept", "text/html,*/*")
            .body("".into())
            .expect("a request"),
    )
    .await;
    assert_eq!(
        page.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    assert!(page.body.starts_with(b"<!doctype html>"));
    let json: serde_json::Value = serde_json::from_slice(&get(&url).await.body).expect("JSON");
    assert_eq!(json["error"], "tunnel_not_found");
}

#[tokio::test]
async fn a_local_service_that_is_down_breaks_off_or_sends_nonsense_is_a_502() {
    let stack = stack().await;
    let free = TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port")
        .local_addr()
        .expect("an address");
    let agent = Agent::online(settings(&stack, free)).await;
    let got = get(&agent.url).await;
    assert_eq!(
        (got.status, got.error()),
        (StatusCode::BAD_GATEWAY, Some("local_unreachable"))
    );
    agent.stop().await.expect("stopped as asked");

    let origin = Origin::answering(|_| None).await;
    let agent = Agent::online(settings(&stack, origin.address)).await;
    let got = get(&agent.url).await;
    assert_eq!(
        (got.status, got.error()),
        (StatusCode::BAD_GATEWAY, Some("local_unreachable"))
    );
    assert_eq!(origin.count(), 1, "the request was sent again");
}

#[tokio::test]
async fn a_request_the_local_service_never_answers_is_a_504() {
    let stack = stack().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let mut settings = settings(&stack, silent.local_addr().expect("an address"));
    settings.request_timeout = std::time::Duration::from_millis(100);
    let agent = Agent::online(settings).await;

    let got = get(&agent.url).await;

    assert_eq!(
        (got.status, got.error()),
        (StatusCode::GATEWAY_TIMEOUT, Some("local_timeout"))
    );
}

#[tokio::test]
async fn a_visitor_learns_at_once_that_the_agent_died() {
    let stack = stack().await;
    let mut agent = ScriptedAgent::online(&stack, "mortal", &[]).await;

    let url = format!("{}/mortal/", stack.public_url);
    let (got, ()) = tokio::join!(get(&url), async {
        agent.hear().await;
        drop(agent);
    });

    assert_eq!(
        (got.status, got.error()),
        (StatusCode::BAD_GATEWAY, Some("agent_lost"))
    );
}

#[tokio::test]
async fn requests_in_progress_finish_when_the_agent_stops() {
    let stack = stack().await;
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let held = std::sync::Mutex::new(held);
    let (told, mut asked) = tokio::sync::mpsc::unbounded_channel();
    let origin = Origin::answering(move |_| {
        told.send(()).expect("the test waits");
        tokio::task::block_in_place(|| held.lock().expect("not poisoned").recv()).expect("let go");
        Some(reply(StatusCode::OK, "late"))
    });
    // The local service blocks its thread on purpose, so it has a runtime of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let origin = runtime.spawn(origin).await.expect("an origin");
    let mut agent = agent(&stack, &origin).await;

    let url = agent.url.clone();
    let (got, stopped) = tokio::join!(get(&url), async {
        within("the request", asked.recv()).await;
        agent.stop_soon();
        agent
            .until("draining", |event| {
                matches!(event, Event::Draining { in_flight: 1 }).then_some(())
            })
            .await;
        hold.send(()).expect("the local service waits");
        agent.ended().await
    });

    assert_eq!((&got.body[..], stopped), (&b"late"[..], Ok(())));
    runtime.shutdown_background();
}

#[tokio::test]
async fn a_tunnel_keeps_its_address_when_the_server_restarts() {
    let data = tempfile::tempdir().expect("a directory");
    let origin = Origin::echo().await;
    let options = |port: u16| Options {
        listen: SocketAddr::from(([127, 0, 0, 1], port)),
        data: Some(data.path().to_owned()),
        ..Options::default()
    };
    let stack = Server::start(options(0)).await.expect("a stack");
    let port = stack
        .public_url
        .to_string()
        .rsplit(':')
        .next()
        .expect("a port")
        .parse()
        .expect("a number");
    let mut settings = settings(&stack, origin.address);
    settings.tunnel_id = None;
    let mut agent = Agent::online(settings).await;

    stack.stop().await;
    agent.until("the agent to notice", offline).await;
    let stack = Server::start(options(port))
        .await
        .expect("the same stack again");
    let url = agent.until_online().await;

    assert_eq!(url, agent.url);
    assert_eq!(get(&url).await.status, StatusCode::OK);
    drop(stack);
}

#[tokio::test]
async fn no_request_fails_while_an_agent_moves_from_one_connection_to_the_next() {
    let quotas = Quotas {
        life: Some(std::time::Duration::from_secs(2)),
        ..Quotas::default()
    };
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    // Only a process that holds the connections itself can shorten their life.
    let stack = Server::start(Options {
        listen,
        quotas,
        ..Options::default()
    })
    .await
    .expect("a stack");
    let origin = Origin::echo().await;
    let mut agent = agent(&stack, &origin).await;

    let url = agent.url.clone();
    let visits = async {
        loop {
            let got = get(&url).await;
            assert_eq!(got.status, StatusCode::OK, "{got:?}");
        }
    };
    // Each time it comes online it does so over another connection, long before the one before it ends.
    let moves = async {
        for _ in 0..3 {
            agent.until_online().await;
            let before = origin.count();
            within("visits between two moves", async {
                while origin.count() < before + 2 {
                    yield_now().await;
                }
            })
            .await;
        }
    };
    tokio::select! {
        () = visits => {}
        () = moves => {}
    }
}

#[tokio::test]
async fn the_newest_connection_of_an_owner_takes_the_tunnel_over() {
    let stack = stack().await;
    let (first, second) = (Origin::echo().await, Origin::echo().await);
    let mut old = agent(&stack, &first).await;

    let new = agent(&stack, &second).await;

    assert!(matches!(old.ended().await, Err(TunnelError::Replaced(_))));
    assert_eq!(get(&new.url).await.status, StatusCode::OK);
    assert_eq!((first.count(), second.count()), (0, 1));
}

#[tokio::test]
async fn a_connection_is_left_alone_by_the_one_that_names_it_and_replaced_by_any_other() {
    let stack = stack_in_order().await;
    let connect = async |previous: Option<&Value>| {
        let mut agent = ScriptedAgent::connect(&stack, "?tunnel_id=my-app").await;
        let mut ready = json!({ "type": "ready", "features": ["notices"] });
        if let Some(previous) = previous {
            ready["previous"] = previous.clone();
        }
        let id = agent.ready(&ready).await["connection_id"].clone();
        // Once this is answered all of `ready` has been dealt with.
        agent.expect_quiet("it was told something more").await;
        (agent, id)
    };
    let (mut first, first_id) = connect(None).await;

    let (mut second, _) = connect(Some(&first_id)).await;
    first
        .expect_quiet("the agent's own next connection replaced it")
        .await;

    // One that takes over from another connection than this, or from none, is another agent.
    let (mut third, _) = connect(Some(&first_id)).await;
    second.hear_type("replaced").await;
    let (_fourth, _) = connect(None).await;
    third.hear_type("replaced").await;
}

#[tokio::test]
async fn a_connection_that_ends_takes_only_its_own_tunnel_offline() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let mut old = ScriptedAgent::connect(&stack, "?tunnel_id=my-app").await;
    let established = old.ready(&json!({ "type": "ready" })).await;
    let old_id: ConnectionId =
        serde_json::from_value(established["connection_id"].clone()).expect("an id");

    let agent = agent(&stack, &origin).await;
    assert_eq!(
        old.close_code().await,
        1000,
        "an agent that does not know of being replaced is closed"
    );
    drop(old);
    within("the end to be dealt with", async {
        let connections = stack.connections();
        while connections
            .get(&old_id, now())
            .await
            .expect("an answer")
            .is_some()
        {
            yield_now().await;
        }
    })
    .await;

    assert_eq!(get(&agent.url).await.status, StatusCode::OK);
}

async fn with_tokens() -> (Server, String) {
    let mut stack = stack_with(Options {
        auth: AuthMode::Token,
        ..Options::default()
    })
    .await;
    let token = stack.first_token.take().expect("a first token");
    (stack, token)
}

#[tokio::test]
async fn an_agent_without_a_valid_token_is_refused_and_does_not_retry() {
    let (stack, token) = with_tokens().await;
    let origin = Origin::echo().await;
    for token in [None, Some("wrong".to_owned()), Some(token.to_uppercase())] {
        let mut settings = settings(&stack, origin.address);
        settings.token = token.map(Secret::from);
        assert_eq!(
            Agent::start(settings).ended().await,
            Err(TunnelError::Unauthorized)
        );
    }
    let mut settings = settings(&stack, origin.address);
    settings.token = Some(Secret::from(token));
    assert_eq!(
        get(&Agent::online(settings).await.url).await.status,
        StatusCode::OK
    );
}

#[tokio::test]
async fn a_name_of_another_owner_is_refused_and_stays_theirs() {
    let (stack, token) = with_tokens().await;
    let other = stack.create_token("other").await.expect("another token");
    let (first, second) = (Origin::echo().await, Origin::echo().await);
    let with = |token: &str, origin: &Origin| forwarder::settings::Settings {
        token: Some(Secret::from(token.to_owned())),
        ..settings(&stack, origin.address)
    };
    let agent = Agent::online(with(&token, &first)).await;

    assert_eq!(
        Agent::start(with(&other, &second)).ended().await,
        Err(TunnelError::NameTaken("my-app".to_owned()))
    );

    assert_eq!(get(&agent.url).await.status, StatusCode::OK);
    agent.stop().await.expect("stopped as asked");
    assert_eq!(
        Agent::start(with(&other, &second)).ended().await,
        Err(TunnelError::NameTaken("my-app".to_owned())),
        "offline, it is still theirs"
    );
    assert_eq!((first.count(), second.count()), (1, 0));
}

#[tokio::test]
async fn a_web_page_cannot_be_an_agent() {
    let stack = stack().await;
    let url = stack.endpoint.replace("ws://", "http://");
    let request = http::Request::get(url)
        .header("upgrade", "websocket")
        .header("connection", "upgrade")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
        .header("origin", "https://evil.example.com");
    assert_eq!(
        crate::harness::visit(request.body("".into()).expect("a request"))
            .await
            .status,
        StatusCode::FORBIDDEN
    );
}

#[tokio::test]
async fn an_invalid_tunnel_id_is_refused() {
    let stack = stack().await;
    for name in ["No", "_ws", "a/b", ""] {
        let Err(tungstenite::Error::Http(response)) =
            ScriptedAgent::try_connect(&stack, &format!("?tunnel_id={name}"), None).await
        else {
            panic!("{name} was let in")
        };
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{name}");
    }
}

#[tokio::test]
async fn strangers_are_not_admitted_without_tokens() {
    let error = Server::start(Options {
        listen: SocketAddr::from(([0, 0, 0, 0], 0)),
        auth: AuthMode::Open,
        ..Options::default()
    })
    .await
    .expect_err("a refusal");
    assert!(error.to_string().contains("--auth token"), "{error}");
    let public_url = Some("https://tunnel.example.com".parse().expect("an address"));
    let behind_proxy = Options {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        public_url,
        ..Options::default()
    };
    assert!(
        Server::start(behind_proxy).await.is_err(),
        "a proxy lets the world in"
    );
}

#[tokio::test]
async fn a_visitor_who_leaves_a_stream_leaves_it_at_the_local_service_too() {
    let (stack, local_service) = (
        stack().await,
        TcpListener::bind("127.0.0.1:0").await.expect("a port"),
    );
    let _agent = Agent::online(settings(
        &stack,
        local_service.local_addr().expect("an address"),
    ))
    .await;
    // Whether the stream is at its beginning or says nothing more.
    for events in ["", "data: 1\n\n"] {
        let authority = stack.public_url.to_string().split_off("http://".len());
        let mut visitor = TcpStream::connect(authority).await.expect("a connection");
        visitor
            .write_all(b"GET /my-app/ HTTP/1.1\r\nhost: localhost\r\n\r\n")
            .await
            .expect("sent");
        let (mut stream, _) = within("the request", local_service.accept())
            .await
            .expect("a connection");
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
        stream
            .write_all(format!("{head}{events}").as_bytes())
            .await
            .expect("sent");
        let mut got = Vec::new();
        let received = |got: &[u8]| {
            let text = String::from_utf8_lossy(got);
            text.contains("\r\n\r\n") && text.contains(events.trim_end())
        };
        while !received(&got) {
            within("the stream", visitor.read_buf(&mut got))
                .await
                .expect("read");
        }
        drop(visitor);
        // A reset is as good as an end.
        let _ = within(
            "the local service's connection to end",
            stream.read_to_end(&mut Vec::new()),
        )
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_never_looks_complete_to_the_local_service() {
    let (stack, local_service) = (
        stack().await,
        TcpListener::bind("127.0.0.1:0").await.expect("a port"),
    );
    let _agent = Agent::online(settings(
        &stack,
        local_service.local_addr().expect("an address"),
    ))
    .await;
    // Often, because whether its end or its break is seen first was a race.
    for _ in 0..100 {
        let mut visitor =
            TcpStream::connect(stack.public_url.to_string().split_off("http://".len()))
                .await
                .expect("a connection");
        let half =
            b"POST /my-app/ HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n";
        visitor.write_all(half).await.expect("sent");
        let (mut stream, _) = within("the upload", local_service.accept())
            .await
            .expect("a connection");
        let mut seen = Vec::new();
        while !seen.ends_with(b"half\r\n") {
            within("the first half", stream.read_buf(&mut seen))
                .await
                .expect("read");
        }
        drop(visitor);
        // A reset is as good as an end.
        let _ = within("the connection to end", stream.read_to_end(&mut seen)).await;
        assert!(
            seen.ends_with(b"half\r\n"),
            "{}",
            String::from_utf8_lossy(&seen)
        );
    }
}
