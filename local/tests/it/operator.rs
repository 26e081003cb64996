//! What the operator sees: metrics that agree with what was sent, health, who is connected, and the access log.

use std::{collections::HashMap, net::SocketAddr, path::Path};

use bytes::Bytes;
use forwarder::settings::Settings;
use futures_util::{SinkExt, StreamExt};
use http::{Request, StatusCode};
use local::{AccessLogFormat, AccessLogOptions, AccessLogTarget, Options, Server};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::{JoinSet, yield_now},
};
use tokio_tungstenite::{connect_async, tungstenite::Message};

use crate::{
    front::fill,
    harness::{
        Agent, Origin, ScriptedAgent, agent, get, post, reply, response, settings, stack_with,
        try_get, visit, within,
    },
    websocket::{EchoServer, accept_own, ask_own, own_protocol},
};

/// A server that the operator can ask.
pub(crate) async fn watched(options: Options) -> Server {
    stack_with(Options {
        admin: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
        ..options
    })
    .await
}

fn admin_url(stack: &Server, path: &str) -> String {
    let address = stack.admin_address.expect("an address");
    format!("http://{address}{path}")
}

/// The samples of `/metrics` by name and labels.
pub(crate) async fn metrics(stack: &Server) -> HashMap<String, f64> {
    let got = get(&admin_url(stack, "/metrics")).await;
    let kind = got.header("content-type").expect("a type");
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    let text = String::from_utf8(got.body.to_vec()).expect("text");
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').expect("a value");
            (name.to_owned(), value.parse().expect("a number"))
        })
        .collect()
}

/// The samples, once `sample` is `value`: a request has ended a little after its visitor has the response.
async fn metrics_when(stack: &Server, sample: &str, value: f64) -> HashMap<String, f64> {
    within(sample, async {
        loop {
            let samples = metrics(stack).await;
            if samples.get(sample) == Some(&value) {
                return samples;
            }
            yield_now().await;
        }
    })
    .await
}

async fn json(stack: &Server, path: &str) -> Value {
    let got = get(&admin_url(stack, path)).await;
    assert_eq!(got.status, StatusCode::OK, "{path}");
    serde_json::from_slice(&got.body).expect("JSON")
}

fn expect(samples: &HashMap<String, f64>, expected: &[(&str, f64)]) {
    for (sample, value) in expected {
        assert_eq!(
            samples.get(*sample),
            Some(value),
            "{sample} of {samples:#?}"
        );
    }
}

#[tokio::test]
async fn open_connections_are_counted_beside_their_limit() {
    let stack = watched(Options::default()).await;
    let open = "tunnel_open_connections";
    let samples = metrics_when(&stack, open, 0.0).await;
    expect(&samples, &[("tunnel_open_connections_max", 4096.0)]);
    let mut visitors = Vec::new();
    for _ in 0..3 {
        let visitor = TcpStream::connect(stack.address).await;
        visitors.push(visitor.expect("a connection"));
    }
    metrics_when(&stack, open, 3.0).await;
    let origin = Origin::answering(|_| None).await;
    let _agent = agent(&stack, &origin).await;
    metrics_when(&stack, open, 4.0).await;
    drop(visitors);
    metrics_when(&stack, open, 1.0).await;
}

#[tokio::test]
async fn the_counts_agree_with_the_load_that_was_sent() {
    let stack = watched(Options {
        metrics_per_tunnel: true,
        ..Options::default()
    })
    .await;
    let origin = Origin::answering(|seen| match seen.uri.path() {
        "/missing" => Some(reply(StatusCode::NOT_FOUND, "no")),
        _ => Some(reply(StatusCode::OK, seen.body.clone())),
    })
    .await;
    let agent = agent(&stack, &origin).await;
    for _ in 0..20 {
        get(&format!("{}/empty", agent.url)).await;
    }
    for _ in 0..10 {
        let got = post(&format!("{}/echo", agent.url), vec![b'x'; 300_000]).await;
        assert_eq!(got.body.len(), 300_000);
    }
    get(&format!("{}/missing", agent.url)).await;
    for _ in 0..3 {
        get(&format!("{}/nosuchtunnel/", stack.public_url)).await;
    }
    let ended = "tunnel_requests_total{outcome=\"refused\",status=\"4xx\"}";
    let samples = metrics_when(&stack, ended, 3.0).await;
    let tunnel = agent.url.rsplit('/').next().expect("an id");
    expect(
        &samples,
        &[
            ("tunnel_requests_total{outcome=\"ok\",status=\"2xx\"}", 30.0),
            ("tunnel_requests_total{outcome=\"ok\",status=\"4xx\"}", 1.0),
            (
                "tunnel_request_errors_total{code=\"tunnel_not_found\"}",
                3.0,
            ),
            ("tunnel_request_head_seconds_count", 34.0),
            ("tunnel_requests_in_progress", 0.0),
            ("tunnel_request_body_bytes_total", 3_000_000.0),
            ("tunnel_agents", 1.0),
            ("tunnel_agent_connections_total", 1.0),
            ("tunnel_held_body_bytes_max", 268_435_456.0),
            (
                &format!("tunnel_tunnel_requests_total{{tunnel=\"{tunnel}\",status=\"2xx\"}}"),
                30.0,
            ),
            (
                &format!("tunnel_tunnel_request_body_bytes_total{{tunnel=\"{tunnel}\"}}"),
                3_000_000.0,
            ),
            (
                &format!("tunnel_tunnel_response_body_bytes_total{{tunnel=\"{tunnel}\"}}"),
                3_000_002.0,
            ),
        ],
    );
    let sent = samples["tunnel_response_body_bytes_total"];
    assert!(
        sent > 3_000_002.0 && sent < 3_001_000.0,
        "with three error bodies: {sent}"
    );
    assert!(samples["tunnel_table_operation_seconds_count{operation=\"GetItem\"}"] > 0.0);
}

#[tokio::test]
async fn failures_and_refusals_are_counted_by_their_codes() {
    let stack = watched(Options::default()).await;
    let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
    let unreachable = Agent::online(settings(&stack, nobody)).await;
    assert_eq!(
        get(&unreachable.url).await.error(),
        Some("local_unreachable")
    );
    let failed = "tunnel_requests_total{outcome=\"failed\",status=\"5xx\"}";
    let samples = metrics_when(&stack, failed, 1.0).await;
    expect(
        &samples,
        &[(
            "tunnel_request_errors_total{code=\"local_unreachable\"}",
            1.0,
        )],
    );
    assert!(
        connect_async(format!("{}?tunnel_id=X", stack.endpoint))
            .await
            .is_err()
    );
    get(&format!("{}/_ws", stack.public_url)).await;
    expect(
        &metrics(&stack).await,
        &[
            (
                "tunnel_handshake_refusals_total{code=\"invalid_tunnel_id\"}",
                1.0,
            ),
            (
                "tunnel_handshake_refusals_total{code=\"not_websocket\"}",
                1.0,
            ),
            ("tunnel_request_head_seconds_count", 1.0),
        ],
    );
}

#[tokio::test]
async fn agents_that_come_back_are_told_from_new_ones_and_listed_while_they_are_there() {
    let stack = watched(Options::default()).await;
    let origin = Origin::echo().await;
    let settings = Settings {
        tunnel_id: Some("my-app".parse().expect("an id")),
        ..settings(&stack, origin.address)
    };
    for _ in 0..2 {
        let agent = Agent::online(settings.clone()).await;
        let agents = json(&stack, "/agents").await["agents"].take();
        let [open] = &agents.as_array().expect("a list")[..] else {
            panic!("{agents}")
        };
        assert_eq!(open["tunnel"], "my-app");
        assert_eq!(open["owner"], "open");
        assert_eq!(open["address"], "127.0.0.1");
        assert_eq!(open["serves"], true);
        let tunnels = json(&stack, "/tunnels").await;
        assert_eq!(tunnels["tunnels"][0]["id"], "my-app");
        assert_eq!(tunnels["tunnels"][0]["state"], "online");
        assert_eq!(tunnels["tunnels"][0]["connection"], open["connection"]);
        agent.stop().await.expect("a clean end");
        metrics_when(&stack, "tunnel_agents", 0.0).await;
    }
    expect(
        &metrics(&stack).await,
        &[
            ("tunnel_agent_connections_total", 2.0),
            ("tunnel_agent_reconnections_total", 1.0),
            (
                "tunnel_agent_disconnections_total{reason=\"by_agent\"}",
                2.0,
            ),
        ],
    );
}

#[tokio::test]
async fn only_names_that_no_web_page_can_point_here_are_answered() {
    let stack = watched(Options::default()).await;
    for (host, status) in [
        ("localhost", 200),
        ("127.0.0.1:9090", 200),
        ("prometheus-target:9090", 200),
        ("evil.example.com", 421),
    ] {
        let request = Request::get(admin_url(&stack, "/metrics"))
            .header("host", host)
            .body(Bytes::new())
            .expect("a request");
        assert_eq!(visit(request).await.status, status, "{host}");
    }
    assert_eq!(
        get(&format!("{}/metrics", stack.public_url)).await.status,
        404
    );
}

#[tokio::test]
async fn a_server_is_ready_until_it_stops() {
    let stack = watched(Options::default()).await;
    assert_eq!(json(&stack, "/healthz").await["status"], "ok");
    assert_eq!(json(&stack, "/readyz").await["status"], "ready");
    let mut agent = ScriptedAgent::online(&stack, "slow", &[]).await;
    let url = format!("{}/slow/", stack.public_url);
    let (ready, healthy) = (admin_url(&stack, "/readyz"), admin_url(&stack, "/healthz"));
    let mut visiting = Box::pin(get(&url));
    let request = tokio::select! {
        got = &mut visiting => panic!("answered with {}", got.status),
        request = agent.hear_type("http_request") => request,
    };
    let ((), got, ()) = tokio::join!(
        async {
            within("not to be ready", async {
                while get(&ready).await.status == StatusCode::OK {
                    yield_now().await;
                }
            })
            .await;
            let reason = get(&ready).await;
            assert_eq!(reason.status, StatusCode::SERVICE_UNAVAILABLE);
            let said: Value = serde_json::from_slice(&reason.body).expect("JSON");
            assert_eq!(said["reason"], "the server is stopping");
            assert_eq!(get(&healthy).await.status, StatusCode::OK);
            agent.say(&response(&request, "ZG9uZQ==")).await;
        },
        visiting,
        stack.stop(),
    );
    assert_eq!(&got.body[..], b"done");
}

/// A local service that answers each connection's request with these bytes, and then ends it or keeps it.
async fn raw_origin(answer: &'static [u8], ends: bool) -> (SocketAddr, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut kept = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = [0; 1024];
            let _ = stream.read(&mut head).await;
            stream.write_all(answer).await.expect("written");
            if !ends {
                kept.push(stream);
            }
        }
    });
    (address, tasks)
}

#[tokio::test]
async fn responses_that_break_off_are_counted_as_such() {
    let stack = watched(Options::default()).await;
    let half = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf.";
    let (broken, _broken) = raw_origin(half, true).await;
    let agent = Agent::online(settings(&stack, broken)).await;
    assert!(try_get(&agent.url).await.is_err(), "it is not whole");
    let broke_off = "tunnel_requests_total{outcome=\"broke_off\",status=\"2xx\"}";
    metrics_when(&stack, broke_off, 1.0).await;
}

#[tokio::test]
async fn visitors_who_leave_without_an_answer_are_counted_as_such() {
    let stack = watched(Options::default()).await;
    let (silent, _silent) = raw_origin(b"", false).await;
    let agent = Agent::online(settings(&stack, silent)).await;
    let mut visitor = TcpStream::connect(stack.address)
        .await
        .expect("a connection");
    let id = agent.url.rsplit('/').next().expect("an id");
    let request = format!("GET /{id}/ HTTP/1.1\r\nhost: localhost\r\n\r\n");
    visitor.write_all(request.as_bytes()).await.expect("sent");
    metrics_when(&stack, "tunnel_requests_in_progress", 1.0).await;
    // Without the reset it is asked first whether it only sends nothing more.
    visitor.set_zero_linger().expect("set");
    drop(visitor);
    let left = "tunnel_requests_total{outcome=\"visitor_left\",status=\"none\"}";
    let samples = metrics_when(&stack, "tunnel_requests_in_progress", 0.0).await;
    expect(&samples, &[(left, 1.0)]);
}

#[tokio::test]
async fn upgraded_connections_are_counted_while_they_are_open() {
    let stack = Server::start(Options {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        admin: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
        ..Options::default()
    });
    let stack = stack.await.expect("a stack");
    let origin = EchoServer::start().await;
    let agent = Agent::online(settings(&stack, origin.address)).await;
    let url = agent.url.replacen("http", "ws", 1) + "/chat";
    let (mut visitor, _) = connect_async(url).await.expect("a connection");
    metrics_when(&stack, "tunnel_upgraded_connections", 1.0).await;
    visitor.send(Message::text("hello")).await.expect("sent");
    let heard = within("an echo", visitor.next()).await;
    assert_eq!(
        heard.expect("open").expect("a message"),
        Message::text("hello")
    );
    // A frame of text: its head, a mask on the way in, and five bytes.
    let samples = metrics_when(&stack, "tunnel_response_body_bytes_total", 7.0).await;
    expect(&samples, &[("tunnel_request_body_bytes_total", 11.0)]);
    drop(visitor);
    let samples = metrics_when(&stack, "tunnel_requests_in_progress", 0.0).await;
    expect(
        &samples,
        &[
            ("tunnel_upgraded_connections", 0.0),
            ("tunnel_upgraded_connections_total", 1.0),
            ("tunnel_requests_total{outcome=\"ok\",status=\"1xx\"}", 1.0),
        ],
    );
}

#[tokio::test]
async fn an_upgraded_connection_that_is_reset_ends_though_nobody_reads_what_came_before() {
    let stack = Server::start(Options {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        admin: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
        ..Options::default()
    });
    let stack = stack.await.expect("a stack");
    let (address, listener) = own_protocol().await;
    let agent = Agent::online(settings(&stack, address)).await;
    let (mut visitor, _service) = tokio::join!(ask_own(&stack, &agent), accept_own(&listener));
    metrics_when(&stack, "tunnel_upgraded_connections", 1.0).await;
    fill(&mut visitor).await;
    visitor.set_zero_linger().expect("set");
    drop(visitor);
    metrics_when(&stack, "tunnel_upgraded_connections", 0.0).await;
    metrics_when(&stack, "tunnel_requests_in_progress", 0.0).await;
}

#[tokio::test]
async fn the_access_log_has_a_line_for_each_request_and_follows_when_it_is_moved() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("access.log");
    let stack = watched(Options {
        access_log: Some(AccessLogOptions {
            target: AccessLogTarget::File(path.clone()),
            format: AccessLogFormat::Json,
        }),
        ..Options::default()
    })
    .await;
    let origin = Origin::echo().await;
    let agent = agent(&stack, &origin).await;
    let request = Request::post(format!("{}/a?b=%22", agent.url))
        .header("authorization", "Bearer swordfish")
        .header("user-agent", "a\"b")
        .body(Bytes::from_static(b"hello"))
        .expect("a request");
    visit(request).await;
    let line = line(&path, 0).await;
    let read: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(read["method"], "POST");
    assert_eq!(read["visitor"], "127.0.0.1");
    assert_eq!(read["tunnel"], agent.url.rsplit('/').next().expect("an id"));
    assert_eq!(
        (&read["status"], &read["outcome"]),
        (&200.into(), &"ok".into())
    );
    assert_eq!(
        (&read["request_bytes"], &read["response_bytes"]),
        (&5.into(), &5.into())
    );
    assert_eq!(read["user_agent"], "a\"b");
    assert!(
        read["uri"].as_str().expect("text").ends_with("/a?b=%22"),
        "{line}"
    );
    assert!(!line.contains("swordfish"), "{line}");

    let moved = directory.path().join("access.log.1");
    std::fs::rename(&path, &moved).expect("moved");
    stack.reopen_access_log();
    get(&agent.url).await;
    self::line(&path, 0).await;
    assert_eq!(
        std::fs::read_to_string(&moved)
            .expect("a file")
            .lines()
            .count(),
        1
    );
}

/// The line with this number, once it is there.
async fn line(path: &Path, number: usize) -> String {
    within("a line", async {
        loop {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            match text.split_inclusive('\n').nth(number) {
                Some(line) if line.ends_with('\n') => return line.to_owned(),
                _ => yield_now().await,
            }
        }
    })
    .await
}
