//! The executables from outside: their settings, signals and exit codes, and what is printed where.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use http::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStderr, Command},
};
use tokio_tungstenite::{connect_async, tungstenite};

use crate::harness::{get, within};

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
    match connect_async(format!("{endpoint}?tunnel_id={tunnel_id}")).await {
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
        let read: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert!(read["fields"]["message"].is_string(), "{line}");
        assert!(
            read["timestamp"].is_string() && read["level"].is_string(),
            "{line}"
        );
    }
}
