//! The executable `ttf` against a service that does what a test says: exit codes, signals, and what is printed where.
#![cfg(unix)]

use std::{future::Future, process::Stdio, time::Duration};

use futures_util::{SinkExt, StreamExt};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    net::{TcpListener, TcpStream},
    process::{Child, ChildStderr, ChildStdout, Command},
    task::JoinSet,
    time::timeout,
};
use tokio_tungstenite::{WebSocketStream, accept_async, tungstenite::Message};

/// Longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(30);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("timed out waiting for {what}"))
}

/// A service that runs a script on each connection of an agent.
struct Service {
    endpoint: String,
    _serving: JoinSet<()>,
}

impl Service {
    async fn running<F: Future<Output = ()> + Send + 'static>(
        script: impl Fn(TcpStream) -> F + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut running = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                running.spawn(script(stream));
            }
        });
        Self {
            endpoint: format!("ws://{address}/_ws"),
            _serving: serving,
        }
    }

    /// Answers every handshake with this status.
    async fn refusing(status: &'static str) -> Self {
        Self::running(move |mut stream| async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.expect("a handshake"));
            }
            let response = format!("HTTP/1.1 {status}\r\ncontent-length: 5\r\n\r\nwords");
            let _ = stream.write_all(response.as_bytes()).await;
        })
        .await
    }

    /// Opens each tunnel and runs a script then.
    async fn online<F: Future<Output = ()> + Send + 'static>(
        public_url: &'static str,
        script: impl Fn(Agent) -> F + Clone + Send + Sync + 'static,
    ) -> Self {
        Self::running(move |stream| {
            let script = script.clone();
            async move {
                let mut agent = Agent(accept_async(stream).await.expect("a handshake"));
                agent.until("ready").await;
                agent
                    .send(json!({
                        "type": "connection_established", "connection_id": "c1", "tunnel_id": "my-app",
                        "public_url": public_url, "protocol": 1, "features": [],
                    }))
                    .await;
                script(agent).await;
            }
        })
        .await
    }
}

/// The service's side of a connection with an agent.
struct Agent(WebSocketStream<TcpStream>);

impl Agent {
    async fn send(&mut self, message: Value) {
        let text = Message::text(message.to_string());
        self.0.send(text).await.expect("the agent is there");
    }

    async fn request(&mut self, id: &str, uri: &str) {
        self.send(json!({ "type": "http_request", "request_id": id, "method": "GET", "uri": uri }))
            .await;
    }

    /// The next message of a type; `None` when the connection ends before.
    async fn next(&mut self, kind: &str) -> Option<Value> {
        loop {
            let Message::Text(text) = self.0.next().await?.ok()? else {
                continue;
            };
            let message: Value = serde_json::from_str(&text).expect("JSON");
            if message["type"] == kind {
                return Some(message);
            }
        }
    }

    async fn until(&mut self, kind: &str) {
        assert!(self.next(kind).await.is_some(), "no {kind}");
    }

    async fn until_closed(mut self) {
        while let Some(Ok(_)) = self.0.next().await {}
    }
}

/// The executable, running.
struct Ttf {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    /// Not read where a test does without.
    stderr: Option<Lines<BufReader<ChildStderr>>>,
}

/// How the executable has ended.
struct Ended {
    code: Option<i32>,
    stdout: Vec<String>,
    stderr: Vec<String>,
}

impl Ttf {
    /// Starts it, with no settings but these arguments.
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ttf"))
            .args(arguments)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the executable");
        let stdout = child.stdout.take().expect("a pipe");
        let stderr = child.stderr.take().expect("a pipe");
        Self {
            child,
            stdout: BufReader::new(stdout).lines(),
            stderr: Some(BufReader::new(stderr).lines()),
        }
    }

    /// Starts it with a tunnel of `service`.
    fn tunnel(service: &Service, more: &[&str]) -> Self {
        let arguments = ["http", "1", "-e", &service.endpoint, "--remember=false"];
        Self::start(&[&arguments[..], more].concat())
    }

    fn signal(&self, signal: Signal) {
        let pid = self
            .child
            .id()
            .and_then(|id| Pid::from_raw(id.cast_signed()));
        kill_process(pid.expect("it runs"), signal).expect("a signal");
    }

    /// Waits for a line on stderr that begins like this.
    async fn until_line(&mut self, start: &str) {
        let lines = self.stderr.as_mut().expect("stderr is read");
        within(start, async {
            loop {
                let line = lines.next_line().await.expect("a pipe");
                if line.expect("another line").starts_with(start) {
                    return;
                }
            }
        })
        .await;
    }

    /// Waits for its end.
    async fn ended(mut self) -> Ended {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let code = within("the end", async {
            while let Ok(Some(line)) = self.stdout.next_line().await {
                stdout.push(line);
            }
            if let Some(lines) = &mut self.stderr {
                while let Ok(Some(line)) = lines.next_line().await {
                    stderr.push(line);
                }
            }
            self.child.wait().await.expect("an end").code()
        })
        .await;
        Ended {
            code,
            stdout,
            stderr,
        }
    }
}

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
async fn a_released_tunnel_id_is_said_on_stdout() {
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
        ["my-app is released: anybody may take it now"]
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
