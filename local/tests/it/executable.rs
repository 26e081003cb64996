//! The executables from outside: their settings, signals and exit codes, and what is printed where.

use std::{
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use futures_util::SinkExt;
use http::StatusCode;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    net::{TcpStream, UnixDatagram},
    process::{Child, ChildStderr, Command},
    time::timeout,
};
use tokio_tungstenite::{
    connect_async,
    tungstenite::{self, client::IntoClientRequest},
};

use crate::{
    harness::{get, within},
    tls::Pair,
};

/// A `tunnel-local` that runs.
pub(crate) struct TunnelLocal {
    child: Child,
    stderr: Lines<BufReader<ChildStderr>>,
    /// The lines on stderr so far.
    said: Vec<String>,
}

impl TunnelLocal {
    /// Starts it on a free port, with no settings but these arguments and variables.
    pub(crate) fn start(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut child = command(env!("CARGO_BIN_EXE_tunnel-local"))
            .args(arguments)
            .envs(variables.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the executable");
        let stderr = child.stderr.take().expect("a pipe");
        Self {
            child,
            stderr: BufReader::new(stderr).lines(),
            said: Vec::new(),
        }
    }

    /// Waits for a line with these words, and returns it.
    pub(crate) async fn says(&mut self, words: &str) -> String {
        within(words, async {
            loop {
                let line = self.stderr.next_line().await.expect("a pipe");
                let line = line.unwrap_or_else(|| panic!("ended after {:?}", self.said));
                self.said.push(line.clone());
                if line.contains(words) {
                    return line;
                }
            }
        })
        .await
    }

    /// Waits until it is ready, and returns where visitors and agents connect.
    pub(crate) async fn ready(&mut self) -> (String, String) {
        let line = self.says("ready: visitors at ").await;
        let (visitors, agents) = line
            .split_once("visitors at ")
            .and_then(|(_, rest)| rest.split_once(", agents at "))
            .expect("two addresses");
        let agents = agents.split('"').next().unwrap_or(agents);
        (visitors.to_owned(), agents.to_owned())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = self
            .child
            .id()
            .and_then(|id| Pid::from_raw(id.cast_signed()));
        kill_process(pid.expect("it runs"), signal).expect("a signal");
    }

    /// Stops it, and returns all that it has said.
    pub(crate) async fn stop(mut self) -> Vec<String> {
        self.signal(Signal::TERM);
        assert_eq!(self.ended().await, Some(0), "{:?}", self.said);
        self.said
    }

    /// Waits for its end, and returns its exit code.
    pub(crate) async fn ended(&mut self) -> Option<i32> {
        within("the end", async {
            while let Ok(Some(line)) = self.stderr.next_line().await {
                self.said.push(line);
            }
            self.child.wait().await.expect("an end").code()
        })
        .await
    }
}

/// An executable without settings of whoever runs the tests.
fn command(executable: &str) -> Command {
    let mut command = Command::new(executable);
    command
        .env_clear()
        .env("XDG_CONFIG_HOME", "/nonexistent")
        .env("TUNNEL_LISTEN", "127.0.0.1:0")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true);
    command
}

/// Runs `tunnel-admin` on a data directory.
pub(crate) async fn admin(data: &Path, arguments: &[&str]) -> Output {
    let mut command = command(env!("CARGO_BIN_EXE_tunnel-admin"));
    command
        .args(arguments)
        .arg("--data")
        .arg(data)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    within("tunnel-admin", command.output())
        .await
        .expect("the executable")
}

fn config(directory: &TempDir, text: &str) -> PathBuf {
    let path = directory.path().join("config.toml");
    std::fs::write(&path, text).expect("written");
    path
}

fn directory() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The status with which an agent's handshake is answered.
async fn handshake(endpoint: &str, tunnel_id: &str) -> u16 {
    handshake_with(endpoint, tunnel_id, "none").await
}

/// The same with a token.
async fn handshake_with(endpoint: &str, tunnel_id: &str, token: &str) -> u16 {
    let url = format!("{endpoint}?tunnel_id={tunnel_id}");
    let mut request = url.into_client_request().expect("a URL");
    let token = format!("Bearer {token}").parse().expect("a value");
    request.headers_mut().insert("authorization", token);
    match connect_async(request).await {
        Ok(_) => 101,
        Err(tungstenite::Error::Http(response)) => response.status().as_u16(),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn flags_are_over_the_environment_and_that_is_over_the_config_file() {
    let directory = directory();
    let file = config(
        &directory,
        "public_url = 'http://file.localhost'\nany_host = true\n",
    );
    let arguments = ["--config", text(&file)];
    let variable = [("TUNNEL_PUBLIC_URL", "http://variable.localhost")];
    let flag = [&arguments[..], &["--public-url", "http://flag.localhost"]].concat();
    for (arguments, variables, expected) in [
        (&arguments[..], &[][..], "http://file.localhost"),
        (&arguments, &variable, "http://variable.localhost"),
        (&flag, &variable, "http://flag.localhost"),
    ] {
        let mut server = TunnelLocal::start(arguments, variables);
        assert_eq!(server.ready().await.0, expected);
        let said = server.stop().await;
        assert!(
            said.contains(&format!("config file: {}", file.display())),
            "{said:?}"
        );
    }
}

#[tokio::test]
async fn the_config_file_of_the_user_is_read_without_being_named() {
    let directory = directory();
    let place = directory.path().join("tunnel-local");
    std::fs::create_dir(&place).expect("a directory");
    std::fs::write(
        place.join("config.toml"),
        "public_url = 'http://mine.localhost'",
    )
    .expect("written");
    let mut server = TunnelLocal::start(&[], &[("XDG_CONFIG_HOME", text(directory.path()))]);
    assert_eq!(server.ready().await.0, "http://mine.localhost");
    server.stop().await;
}

#[tokio::test]
async fn settings_that_cannot_be_used_end_it_with_code_2_and_are_named_as_the_user_knows_them() {
    let directory = directory();
    let misspelt = config(&directory, "lisen = '127.0.0.1:0'\n");
    let jwt = ["--auth", "jwt", "--jwt-issuer", "i", "--jwt-audience", "a"];
    let short_secret = [&jwt[..], &["--jwt-secret", "short"]].concat();
    for (arguments, words) in [
        (&["--config", text(&misspelt)][..], "did you mean `listen`?"),
        (&["--config", "/nonexistent"], "cannot read /nonexistent"),
        (&["--lisen", "x"], "'--listen'"),
        (&jwt, "--jwt-jwks-url or --jwt-secret"),
        (&short_secret, "--jwt-secret: must have at least 32 bytes"),
        (
            &["--listen", "0.0.0.0:0", "--auth", "token"],
            "--public-url",
        ),
    ] {
        let mut server = TunnelLocal::start(arguments, &[]);
        assert_eq!(server.ended().await, Some(2), "{arguments:?}");
        let said = server.said.join("\n");
        assert!(said.contains(words) && !said.contains(" JWT_"), "{said}");
    }
}

#[tokio::test]
async fn sighup_takes_from_the_config_file_what_needs_no_restart() {
    let directory = directory();
    let file = config(&directory, "max_tunnel_ids_per_owner = 1\n");
    let mut server = TunnelLocal::start(&["--config", text(&file)], &[]);
    let (_, endpoint) = server.ready().await;
    assert_eq!(handshake(&endpoint, "one").await, 101);
    assert_eq!(handshake(&endpoint, "two").await, 400);

    std::fs::write(
        &file,
        "max_tunnel_ids_per_owner = 2\nrouting = 'subdomain'\n",
    )
    .expect("written");
    server.signal(Signal::HUP);
    let said = server.says("reloaded: ").await;
    assert_eq!(
        said,
        "reloaded: max_tunnel_ids_per_owner changed; restart to change routing"
    );
    assert_eq!(handshake(&endpoint, "two").await, 101);

    std::fs::write(&file, "max_tunnel_ids_per_owner = 'many'\n").expect("written");
    server.signal(Signal::HUP);
    let said = server.says("not reloaded: ").await;
    assert!(
        said.contains("config.toml:1:28: `max_tunnel_ids_per_owner`: "),
        "{said}"
    );
    assert_eq!(handshake(&endpoint, "two").await, 101);
    server.stop().await;
}

#[tokio::test]
async fn sighup_changes_nothing_while_the_config_file_is_missing() {
    let directory = directory();
    let place = directory.path().join("tunnel-local");
    std::fs::create_dir(&place).expect("a directory");
    let file = place.join("config.toml");
    std::fs::write(&file, "max_tunnel_ids_per_owner = 1\n").expect("written");
    let mut server = TunnelLocal::start(&[], &[("XDG_CONFIG_HOME", text(directory.path()))]);
    let (_, endpoint) = server.ready().await;
    assert_eq!(handshake(&endpoint, "one").await, 101);

    std::fs::remove_file(&file).expect("removed");
    server.signal(Signal::HUP);
    let said = server.says("reloaded: ").await;
    let expected = format!("not reloaded: cannot read {}", file.display());
    assert!(said.starts_with(&expected), "{said}");
    assert_eq!(handshake(&endpoint, "two").await, 400);
    server.stop().await;
}

#[tokio::test]
async fn of_two_sockets_only_the_main_one_gives_signs_of_life() {
    let directory = directory();
    let path = directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).expect("a socket");
    let pair = Pair::new();
    let (certificate, key) = (pair.path("cert.pem"), pair.path("key.pem"));
    let mut server = TunnelLocal::start(
        &[
            "--tls-cert",
            text(&certificate),
            "--tls-key",
            text(&key),
            "--listen-http",
            "127.0.0.1:0",
        ],
        // The first sign comes at once, the next in 5 minutes.
        &[
            ("NOTIFY_SOCKET", text(&path)),
            ("WATCHDOG_USEC", "600000000"),
        ],
    );
    server.ready().await;
    let mut told = String::new();
    let mut message = [0; 1024];
    while !told.contains("WATCHDOG=1") {
        let length = within("a sign of life", manager.recv(&mut message)).await;
        told += &String::from_utf8_lossy(&message[..length.expect("a message")]);
        told.push('\n');
    }
    server.stop().await;
    while let Ok(length) = manager.try_recv(&mut message) {
        told += &String::from_utf8_lossy(&message[..length]);
        told.push('\n');
    }
    assert!(
        told.contains("READY=1") && told.contains("STOPPING=1"),
        "{told}"
    );
    assert_eq!(told.matches("WATCHDOG=1").count(), 1, "{told}");
}

/// A visitor on a connection of its own, which is closed after the answer.
async fn visitor(address: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    let request = "GET /_health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    let sent = stream.write_all(request.as_bytes()).await;
    sent.expect("sent");
    stream
}

async fn is_served(visitor: &mut TcpStream) -> bool {
    let mut answer = String::new();
    let read = within("an answer", visitor.read_to_string(&mut answer)).await;
    read.is_ok() && answer.starts_with("HTTP/1.1 200 ")
}

async fn waits(visitor: &mut TcpStream) -> bool {
    let answer = visitor.read_u8();
    timeout(Duration::from_millis(300), answer).await.is_err()
}

#[tokio::test]
async fn at_most_4096_connections_are_open_at_once_agents_among_them() {
    let most = getrlimit(Resource::Nofile).maximum;
    assert!(
        most.is_none_or(|most| most > 4200),
        "this test needs 4,200 open files: ulimit -Hn"
    );
    let limit = Rlimit {
        current: most,
        maximum: most,
    };
    setrlimit(Resource::Nofile, limit).expect("as many files as may be open");
    let mut server = TunnelLocal::start(&[], &[]);
    let (visitors, agents) = server.ready().await;
    let address = visitors.trim_start_matches("http://");
    let (agent, _) = connect_async(format!("{agents}?tunnel_id=an-agent"))
        .await
        .expect("a connection");
    let mut idle = Vec::new();
    while idle.len() < 4095 {
        let connecting = within("a connection", TcpStream::connect(address));
        idle.push(connecting.await.expect("a connection"));
    }

    let mut waiting = visitor(address).await;
    assert!(waits(&mut waiting).await);
    idle.pop();
    assert!(is_served(&mut waiting).await, "one has left");

    idle.push(TcpStream::connect(address).await.expect("a connection"));
    let mut waiting = visitor(address).await;
    assert!(waits(&mut waiting).await);
    drop(agent);
    assert!(is_served(&mut waiting).await, "the agent has left");
}

#[tokio::test]
async fn sighup_stops_a_server_that_has_nothing_to_read_again() {
    let mut server = TunnelLocal::start(&[], &[]);
    server.ready().await;
    server.signal(Signal::HUP);
    assert_eq!(server.ended().await, Some(0));
}

#[tokio::test]
async fn the_first_token_is_in_a_file_of_the_data_directory_and_not_on_stderr() {
    use std::os::unix::fs::PermissionsExt;
    let directory = directory();
    let data = directory.path().join("data");
    let arguments = ["--data", text(&data), "--auth", "token"];
    let mut server = TunnelLocal::start(&arguments, &[]);
    let (visitors, _) = server.ready().await;
    let file = data.join("first-token");
    server.says(text(&file)).await;
    server.says("open a tunnel with: ").await;
    let token = std::fs::read_to_string(&file).expect("the file");
    let mode = std::fs::metadata(&file).expect("the file").permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    let status = format!("{visitors}/_health");
    assert_eq!(get(&status).await.status, StatusCode::OK);
    let said = server.stop().await;
    assert!(!said.join("\n").contains(token.trim()), "{said:?}");
    // A later start makes no other.
    let mut server = TunnelLocal::start(&arguments, &[]);
    server.says("open a tunnel with: ttf http").await;
    server.stop().await;
    assert_eq!(std::fs::read_to_string(&file).ok(), Some(token));
}

#[tokio::test]
async fn lines_can_be_objects() {
    let mut server = TunnelLocal::start(&["--log-format", "json", "--log-level", "info"], &[]);
    let (_, endpoint) = server.ready().await;
    assert_eq!(handshake(&endpoint, "one").await, 101);
    server.says("connected").await;
    for line in server.stop().await {
        let read: Value = serde_json::from_str(&line).expect("JSON");
        assert!(read["fields"]["message"].is_string(), "{line}");
        assert!(
            read["timestamp"].is_string() && read["level"].is_string(),
            "{line}"
        );
    }
}

#[tokio::test]
async fn each_ping_of_an_agent_is_a_line_with_its_connection_by_which_the_dashboard_counts() {
    let mut server = TunnelLocal::start(&["--log-format", "json", "--log-level", "info"], &[]);
    let (_, endpoint) = server.ready().await;
    let (mut agent, _) = connect_async(endpoint).await.expect("a connection");
    let ping = tungstenite::Message::text(r#"{"type":"ping"}"#);
    agent.send(ping).await.expect("sent");
    let line = server.says("\"ping\"").await;
    let read: Value = serde_json::from_str(&line).expect("JSON");
    assert!(read["span"]["connection"].is_string(), "{line}");
    server.stop().await;
}

/// The output of a `tunnel-admin` that succeeds.
async fn admin_says(data: &Path, arguments: &[&str]) -> String {
    let output = admin(data, arguments).await;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).expect("text")
}

/// What a `tunnel-admin` that fails says.
async fn admin_refuses(data: &Path, arguments: &[&str]) -> String {
    let output = admin(data, arguments).await;
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    String::from_utf8(output.stderr).expect("text")
}

#[tokio::test]
async fn a_backup_of_a_running_server_becomes_the_data_of_another() {
    let directory = directory();
    let (data, copy) = (directory.path().join("data"), directory.path().join("copy"));
    let backup = directory.path().join("backup.db");
    let mut server = TunnelLocal::start(&["--data", text(&data)], &[]);
    let (_, endpoint) = server.ready().await;
    assert_eq!(handshake(&endpoint, "my-app").await, 101);
    let token = admin_says(&data, &["create-token", "alice"]).await;
    admin_says(&data, &["backup", text(&backup)]).await;
    let said = admin_refuses(&data, &["backup", text(&backup)]).await;
    assert!(said.contains("exists already"), "{said}");
    let said = admin_refuses(&data, &["restore", text(&backup)]).await;
    assert!(said.contains("is in use by another tunnel-local"), "{said}");
    server.stop().await;
    let said = admin_refuses(&data, &["restore", text(&backup)]).await;
    assert!(said.contains("contains data already"), "{said}");

    admin_says(&copy, &["restore", text(&backup)]).await;
    let listed = admin_says(&copy, &["list-tunnels"]).await;
    assert_eq!(listed, "my-app\toffline\topen\n");
    let mut server = TunnelLocal::start(&["--data", text(&copy), "--auth", "token"], &[]);
    let (_, endpoint) = server.ready().await;
    assert_eq!(handshake_with(&endpoint, "new", token.trim()).await, 101);
    server.stop().await;
}

#[tokio::test]
async fn names_do_not_turn_the_direction_of_a_line_of_json() {
    let directory = directory();
    let data = directory.path().join("data");
    let mut server = TunnelLocal::start(&["--data", text(&data)], &[]);
    server.ready().await;
    server.stop().await;
    admin_says(&data, &["create-token", "a\u{202e}b"]).await;
    let listed = admin_says(&data, &["list-tokens", "--json"]).await;
    assert!(listed.is_ascii(), "{listed}");
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    assert_eq!(listed["tokens"][0]["name"], "a\u{202e}b");
}

#[tokio::test]
async fn what_is_no_backup_is_not_restored() {
    let directory = directory();
    let data = directory.path().join("data");
    let file = directory.path().join("file");
    std::fs::write(&file, "SQLite format 3\0 or not").expect("written");
    let said = admin_refuses(&data, &["restore", text(&file)]).await;
    assert!(
        said.contains("is not a backup of a data directory"),
        "{said}"
    );
    let said = admin_refuses(&data, &["restore", "/nonexistent"]).await;
    assert!(said.contains("there is no such file"), "{said}");
    let said = admin_refuses(&data, &["backup", text(&file)]).await;
    assert!(said.contains("contains no data"), "{said}");
    assert!(!data.exists());
}

/// A data directory as a server of an earlier version has left it: the token [`RECORDED_TOKEN`], which owns the tunnel `my-app`, the
/// token alice, and bob, which is revoked. There was no index of owners then. The tunnel's `ttl` is in the year 2100, so that it
/// outlives the test.
fn recorded(directory: &TempDir) -> PathBuf {
    let data = directory.path().join("data");
    std::fs::create_dir(&data).expect("a directory");
    let database = include_bytes!("recorded/data-format-0.db");
    std::fs::write(data.join("tunnel.db"), database).expect("written");
    data
}

const RECORDED_TOKEN: &str = "ttf_96f82b66e85c77c9baad5f3e4a0d7471cc5db2a0abde323f6182d88d2eab2e31";

#[tokio::test]
async fn data_of_an_earlier_version_goes_on_being_used() {
    let directory = directory();
    let data = recorded(&directory);
    let arguments = [
        "--data",
        text(&data),
        "--auth",
        "token",
        "--max-tunnel-ids-per-owner",
        "1",
    ];
    let mut server = TunnelLocal::start(&arguments, &[]);
    let (_, endpoint) = server.ready().await;
    assert_eq!(
        handshake_with(&endpoint, "my-app", RECORDED_TOKEN).await,
        101
    );
    // The tunnels that an owner had then count, too.
    assert_eq!(
        handshake_with(&endpoint, "another", RECORDED_TOKEN).await,
        400
    );
    let said = server.stop().await;
    assert!(!said.join("\n").contains("first agent token"), "{said:?}");
    let listed = admin_says(&data, &["list-tokens", "--json"]).await;
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    let mut tokens: Vec<_> = listed["tokens"]
        .as_array()
        .expect("a list")
        .iter()
        .collect();
    tokens.sort_by_key(|token| token["name"].to_string());
    let tokens = tokens.iter().map(|token| (&token["name"], &token["state"]));
    let expected = [("alice", "good"), ("bob", "revoked"), ("first", "good")];
    let expected = expected.map(|(name, state)| (Value::from(name), Value::from(state)));
    assert!(
        tokens.eq(expected.iter().map(|(name, state)| (name, state))),
        "{listed}"
    );
}

#[tokio::test]
async fn data_of_a_later_version_is_refused_with_a_sentence() {
    let directory = directory();
    let data = recorded(&directory);
    // Where SQLite's header has the number that is the application's own.
    let path = data.join("tunnel.db");
    let mut database = std::fs::read(&path).expect("a file");
    database[60..64].copy_from_slice(&7_u32.to_be_bytes());
    std::fs::write(&path, database).expect("written");
    let mut server = TunnelLocal::start(&["--data", text(&data)], &[]);
    assert_eq!(server.ended().await, Some(1));
    let said = server.said.join("\n");
    assert!(
        said.contains("tunnel.db is of a newer version: it has format 7"),
        "{said}"
    );
}
