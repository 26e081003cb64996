//! Exit codes, signals, and what is printed where.

use rustix::process::Signal;
use serde_json::json;
use tokio::net::{TcpListener, UnixDatagram};
use tokio_tungstenite::accept_async;

use crate::harness::{Agent, Service, Ttf, within};

async fn code(ttf: Ttf) -> Option<i32> {
    ttf.ended().await.code
}

#[tokio::test]
async fn a_signal_stops_it_with_code_0() {
    let service = Service::online("http://t.example.com/my-app", Agent::until_closed).await;
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut ttf = Ttf::tunnel(&service, &[]);
        ttf.until_line("online: ").await;
        ttf.signal(signal);
        let ended = ttf.ended().await;
        assert_eq!(ended.code, Some(0), "{signal:?}");
        assert_eq!(ended.stdout, ["http://t.example.com/my-app"]);
        assert_eq!(ended.stderr, ["stopping"]);
    }
}

#[tokio::test]
async fn a_service_manager_hears_when_it_is_ready_that_it_lives_and_that_it_stops() {
    let service = Service::online("http://t.example.com/my-app", Agent::until_closed).await;
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).expect("a socket");
    let heard = async |wanted: &str| {
        let mut message = [0; 4096];
        loop {
            let length = within(wanted, manager.recv(&mut message))
                .await
                .expect("a message");
            if message[..length].trim_ascii_end() == wanted.as_bytes() {
                return;
            }
        }
    };
    let environment = [
        ("XDG_CONFIG_HOME", "/nonexistent"),
        ("NOTIFY_SOCKET", path.to_str().expect("a path")),
        ("WATCHDOG_USEC", "100000"),
    ];
    let arguments = ["http", "1", "-e", &service.endpoint, "--remember=false"];
    let ttf = Ttf::start_with(&environment, &arguments);
    heard("READY=1\nSTATUS=online: http://t.example.com/my-app").await;
    heard("WATCHDOG=1").await;
    ttf.signal(Signal::TERM);
    heard("STOPPING=1").await;
    assert_eq!(code(ttf).await, Some(0));
}

#[tokio::test]
async fn a_service_is_ready_though_the_tunnel_cannot_be_opened_yet_but_not_with_a_refused_token() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).expect("a socket");
    let environment = [
        ("XDG_CONFIG_HOME", "/nonexistent"),
        ("NOTIFY_SOCKET", path.to_str().expect("a path")),
    ];
    let start = |service: &Service| {
        let arguments = ["http", "1", "-e", &service.endpoint, "--keep-trying"];
        Ttf::start_with(&environment, &arguments)
    };

    let refused = start(&Service::refusing("401 Unauthorized").await)
        .ended()
        .await;
    assert_eq!(refused.code, Some(3));
    let mut message = [0; 4096];
    assert!(
        manager.try_recv(&mut message).is_err(),
        "it was never ready"
    );

    let _unavailable = start(&Service::refusing("503 Service Unavailable").await);
    let length = within("readiness", manager.recv(&mut message)).await;
    let message = String::from_utf8_lossy(&message[..length.expect("a message")]);
    assert!(
        message.starts_with("READY=1\nSTATUS=offline: "),
        "{message}"
    );
}

#[tokio::test]
async fn a_second_signal_stops_it_with_code_1_though_a_request_is_in_progress() {
    // A local service that accepts and says nothing.
    let origin = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = origin.local_addr().expect("an address").port().to_string();
    let service = Service::online(
        "http://t.example.com/my-app",
        |mut agent: Agent| async move {
            agent.request("r1", "/").await;
            agent.until_closed().await;
        },
    )
    .await;
    let mut ttf = Ttf::start(&["http", &port, "-e", &service.endpoint, "--remember=false"]);
    let _connection = within("the request", origin.accept())
        .await
        .expect("a request");
    ttf.signal(Signal::TERM);
    ttf.until_line("draining 1 request; press Ctrl-C again to stop now")
        .await;
    ttf.signal(Signal::TERM);
    assert_eq!(code(ttf).await, Some(1));
}

#[tokio::test]
async fn wrong_usage_ends_it_with_code_2_and_shows_no_secret() {
    for (arguments, words) in [
        (
            &["http", "0", "-e", "ws://127.0.0.1:1"][..],
            "from 1 to 65535",
        ),
        (&["http", "3000"], "no endpoint"),
        (
            &["http", "3000", "-e", "ws://a:hunter2@127.0.0.1:1"],
            "user name and password",
        ),
        (
            &[
                "http",
                "3000",
                "-e",
                "ws://127.0.0.1:1",
                "--log-level",
                "loud",
            ],
            "loud",
        ),
        (
            &[
                "http",
                "3000",
                "-e",
                "ws://127.0.0.1:1",
                "--basic-auth",
                "hunter2",
            ],
            "USER:PASSWORD",
        ),
        (&["start", "web", "-e", "ws://127.0.0.1:1"], "--config"),
        (&["--config", "/does/not/exist.toml"], "cannot read"),
    ] {
        let ended = Ttf::start(arguments).ended().await;
        let said = ended.stderr.join("\n");
        assert_eq!(ended.code, Some(2), "{arguments:?}: {said}");
        assert!(said.contains(words) && !said.contains("hunter2"), "{said}");
        assert!(ended.stdout.is_empty());
    }
}

#[tokio::test]
async fn what_the_service_refuses_has_its_code() {
    for (status, exit) in [
        ("400 Bad Request", 2),
        ("401 Unauthorized", 3),
        ("403 Forbidden", 3),
        ("409 Conflict", 4),
    ] {
        let service = Service::refusing(status).await;
        let tunnel = Ttf::tunnel(&service, &["-s", "my-app"]);
        assert_eq!(code(tunnel).await, Some(exit), "{status}");
        let release = Ttf::start(&["release", "my-app", "-e", &service.endpoint]);
        assert_eq!(code(release).await, Some(exit), "{status} to a release");
    }
    let service = Service::refusing("503 Service Unavailable").await;
    let release = Ttf::start(&["release", "my-app", "-e", &service.endpoint]);
    assert_eq!(code(release).await, Some(1));
}

#[tokio::test]
async fn a_tunnel_that_was_taken_over_ends_it_with_code_5() {
    let service = Service::online(
        "http://t.example.com/my-app",
        |mut agent: Agent| async move {
            agent
                .send(json!({ "type": "replaced", "reason": "taken\nonline: http://forged/" }))
                .await;
            agent.until_closed().await;
        },
    )
    .await;
    let ended = Ttf::tunnel(&service, &[]).ended().await;
    assert_eq!(ended.code, Some(5));
    let last = ended.stderr.last().map(String::as_str);
    assert_eq!(last, Some("error: taken?online: http://forged/"));
}

#[tokio::test]
async fn a_service_that_does_not_know_visitor_rules_ends_it_with_code_6() {
    let service = Service::online("http://t.example.com/my-app", Agent::until_closed).await;
    let ended = Ttf::tunnel(&service, &["--allow", "192.0.2.1"])
        .ended()
        .await;
    assert_eq!(ended.code, Some(6));
    assert!(ended.stdout.is_empty(), "it was never open to everybody");
}

#[tokio::test]
async fn a_released_tunnel_id_is_reported_on_stdout() {
    let service = Service::running(|stream| async move {
        let mut agent = Agent(accept_async(stream).await.expect("a handshake"));
        agent.until("release").await;
        agent
            .send(json!({ "type": "released", "tunnel_id": "my-app", "existed": true }))
            .await;
        agent.until_closed().await;
    })
    .await;
    let ended = Ttf::start(&["release", "my-app", "-e", &service.endpoint])
        .ended()
        .await;
    assert_eq!(ended.code, Some(0), "{:?}", ended.stderr);
    assert_eq!(
        ended.stdout,
        ["my-app is released: anyone may claim it now"]
    );
}

#[tokio::test]
async fn output_that_is_not_read_holds_up_neither_requests_nor_the_end() {
    /// More lines than a pipe and the queue hold.
    const REQUESTS: usize = 4000;
    let (finished, mut all_finished) = tokio::sync::mpsc::channel(1);
    let service = Service::online("http://t.example.com/my-app", move |mut agent: Agent| {
        let finished = finished.clone();
        async move {
            // Nothing listens on the target's port, so that each request is a line at once.
            let path = format!("/{}", "x".repeat(200));
            for number in 0..REQUESTS {
                agent.request(&format!("r{number}"), &path).await;
                agent.until("error").await;
            }
            let _ = finished.send(()).await;
            agent.until_closed().await;
        }
    })
    .await;
    let ttf = Ttf::tunnel(&service, &[]);
    within("the requests", all_finished.recv()).await;
    ttf.signal(Signal::TERM);
    let Ttf {
        mut child, stderr, ..
    } = ttf;
    let status = within("the end", child.wait()).await.expect("an end");
    assert_eq!(status.code(), Some(0));
    drop(stderr);
}
