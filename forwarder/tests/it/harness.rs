//! A service that does what a test says, and the executable that meets it.

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
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("timed out waiting for {what}"))
}

/// A service that runs a script on each connection of an agent.
pub(crate) struct Service {
    pub(crate) endpoint: String,
    _serving: JoinSet<()>,
}

impl Service {
    pub(crate) async fn running<F: Future<Output = ()> + Send + 'static>(
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
    pub(crate) async fn refusing(status: &'static str) -> Self {
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
    pub(crate) async fn online<F: Future<Output = ()> + Send + 'static>(
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
pub(crate) struct Agent(pub(crate) WebSocketStream<TcpStream>);

impl Agent {
    pub(crate) async fn send(&mut self, message: Value) {
        let text = Message::text(message.to_string());
        self.0.send(text).await.expect("the agent is there");
    }

    pub(crate) async fn request(&mut self, id: &str, uri: &str) {
        self.send(json!({ "type": "http_request", "request_id": id, "method": "GET", "uri": uri }))
            .await;
    }

    /// The next message of a type; `None` when the connection ends before.
    pub(crate) async fn next(&mut self, kind: &str) -> Option<Value> {
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

    pub(crate) async fn until(&mut self, kind: &str) {
        assert!(self.next(kind).await.is_some(), "no {kind}");
    }

    pub(crate) async fn until_closed(mut self) {
        while let Some(Ok(_)) = self.0.next().await {}
    }
}

/// The executable, running.
pub(crate) struct Ttf {
    pub(crate) child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    /// Not read where a test does without.
    pub(crate) stderr: Option<Lines<BufReader<ChildStderr>>>,
}

/// How the executable has ended.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<String>,
    pub(crate) stderr: Vec<String>,
}

impl Ttf {
    /// Starts it, with no settings but these arguments.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_in("/nonexistent", arguments)
    }

    /// Starts it, with a directory for the user's files.
    pub(crate) fn start_in(home: &str, arguments: &[&str]) -> Self {
        Self::start_with(&[("XDG_CONFIG_HOME", home)], arguments)
    }

    /// Starts it, with this environment and nothing else in it.
    pub(crate) fn start_with(environment: &[(&str, &str)], arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ttf"))
            .args(arguments)
            .env_clear()
            .envs(environment.iter().copied())
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
    pub(crate) fn tunnel(service: &Service, more: &[&str]) -> Self {
        let arguments = ["http", "1", "-e", &service.endpoint, "--remember=false"];
        Self::start(&[&arguments[..], more].concat())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = self
            .child
            .id()
            .and_then(|id| Pid::from_raw(id.cast_signed()));
        kill_process(pid.expect("it runs"), signal).expect("a signal");
    }

    /// Waits for a line on stderr that begins like this, and returns how it goes on.
    pub(crate) async fn until_line(&mut self, start: &str) -> String {
        let lines = self.stderr.as_mut().expect("stderr is read");
        within(start, async {
            loop {
                let line = lines.next_line().await.expect("a pipe");
                if let Some(rest) = line.expect("another line").strip_prefix(start) {
                    return rest.to_owned();
                }
            }
        })
        .await
    }

    /// Waits for its end.
    pub(crate) async fn ended(mut self) -> Ended {
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
