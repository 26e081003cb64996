//! The console, on a terminal of its own.

use std::{num::NonZeroU16, process::ExitStatus};

use pty_process::{Command, OwnedReadPty, OwnedWritePty, Size};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    process::Child,
    time::timeout,
};
use vt100::{Color, Parser, Screen};

use crate::harness::{Agent, PATIENCE, Service, within};

const URL: &str = "http://t.example.com/my-app";
const TTF: &str = env!("CARGO_BIN_EXE_ttf");

fn cells(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).expect("not 0")
}

/// A terminal, and the program that has it.
struct Terminal {
    parser: Parser,
    reading: OwnedReadPty,
    writing: OwnedWritePty,
    child: Child,
}

impl Terminal {
    /// Starts a program on a terminal of 24 rows.
    fn start(columns: u16, program: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let (pty, pts) = pty_process::open().expect("a terminal");
        pty.resize(Size::new(24, columns)).expect("a size");
        let child = Command::new(program)
            .args(arguments)
            .env_clear()
            .env("XDG_CONFIG_HOME", "/nonexistent")
            .env("TERM", "xterm-256color")
            .envs(variables.iter().copied())
            .kill_on_drop(true)
            .spawn(pts)
            .expect("the program");
        let (reading, writing) = pty.into_split();
        Self {
            parser: Parser::new(cells(24), cells(columns), 0),
            reading,
            writing,
            child,
        }
    }

    /// Starts a tunnel of `service`.
    fn tunnel(
        service: &Service,
        columns: u16,
        target: &str,
        more: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let arguments = [&tunnel(service, target)[..], more].concat();
        Self::start(columns, TTF, &arguments, variables)
    }

    /// Has a shell with job control run a script, whose arguments start a tunnel of `service`.
    fn shell(service: &Service, script: &str) -> Self {
        let script = format!("set -m; {script}");
        let arguments = [&["-c", &script, "sh", TTF][..], &tunnel(service, "1")].concat();
        Self::start(80, "/bin/sh", &arguments, &[])
    }

    /// Takes what the program writes next. Returns whether it has not ended.
    async fn read(&mut self) -> bool {
        let mut bytes = [0; 4096];
        // A terminal that nobody has open any more fails.
        let read = self.reading.read(&mut bytes).await.unwrap_or(0);
        self.parser.process(&bytes[..read]);
        read > 0
    }

    /// Waits until the screen is as it should be.
    async fn until(&mut self, what: &str, is_so: impl Fn(&Screen) -> bool) {
        let shown = async {
            while !is_so(self.parser.screen()) {
                let text = self.parser.screen().contents();
                assert!(self.read().await, "it has ended before {what}:\n{text}");
            }
        };
        if timeout(PATIENCE, shown).await.is_err() {
            let text = self.parser.screen().contents();
            panic!("timed out waiting for {what}:\n{text}");
        }
    }

    async fn until_text(&mut self, text: &str) {
        self.until(text, |screen| screen.contents().contains(text))
            .await;
    }

    async fn press(&mut self, keys: &str) {
        let pressed = self.writing.write_all(keys.as_bytes()).await;
        pressed.expect("a terminal");
    }

    fn resize(&mut self, rows: u16, columns: u16) {
        self.parser
            .screen_mut()
            .set_size(cells(rows), cells(columns));
        let size = Size::new(rows, columns);
        self.writing.resize(size).expect("a size");
    }

    /// Waits for the program's end. Returns what is left on the terminal, too.
    async fn ended(mut self) -> (ExitStatus, Parser) {
        let ended = async {
            while self.read().await {}
            self.child.wait().await.expect("an end")
        };
        let status = within("the end", ended).await;
        (status, self.parser)
    }
}

fn tunnel<'a>(service: &'a Service, target: &'a str) -> [&'a str; 6] {
    let endpoint = service.endpoint.as_str();
    let inspect = "--inspect=127.0.0.1:0";
    ["http", target, "-e", endpoint, "--remember=false", inspect]
}

async fn service() -> Service {
    Service::online(URL, Agent::until_closed).await
}

/// A service with two requests, one of which fails.
async fn busy_service() -> Service {
    Service::online(URL, |mut agent: Agent| async move {
        agent.request("r1", "/hello.txt").await;
        agent.until("http_response").await;
        agent.request("r2", "/missing").await;
        agent.until_closed().await;
    })
    .await
}

fn row(screen: &Screen, row: u16) -> String {
    let (_, columns) = screen.size();
    let mut rows = screen.rows(0, columns.get());
    rows.nth(row.into()).unwrap_or_default()
}

/// The colours of texts.
fn colours(screen: &Screen) -> Vec<Color> {
    let (rows, columns) = screen.size();
    let places =
        (0..rows.get()).flat_map(|row| (0..columns.get()).map(move |column| (row, column)));
    places
        .filter_map(|(row, column)| screen.cell(row, column))
        .map(vt100::Cell::fgcolor)
        .filter(|colour| *colour != Color::Default)
        .collect()
}

#[tokio::test]
async fn a_terminal_shows_the_tunnel_and_its_requests_and_is_given_back_at_the_end() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("hello.txt"), "hello").expect("written");
    let service = busy_service().await;
    let target = directory.path().to_str().expect("a path");
    let mut terminal = Terminal::tunnel(&service, 100, target, &[], &[]);
    for part in [
        "online for",
        &format!("address      {URL}"),
        "inspector    http://127.0.0.1:",
        "requests     2  2xx 1  4xx 1",
        "/missing",
        "q quit   o open   c copy   s QR code   i inspector",
    ] {
        terminal.until_text(part).await;
    }
    let screen = terminal.parser.screen();
    assert!(screen.alternate_screen() && screen.hide_cursor());
    assert!(!colours(screen).is_empty());
    terminal.press("q").await;
    let (status, parser) = terminal.ended().await;
    assert_eq!(status.code(), Some(0));
    let screen = parser.screen();
    assert!(!screen.alternate_screen() && !screen.hide_cursor());
    assert!(
        screen.contents().starts_with("2 requests in "),
        "{}",
        screen.contents()
    );
}

#[tokio::test]
async fn the_round_trip_of_the_connection_and_open_sockets_are_shown() {
    let local = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let target = local.local_addr().expect("an address").to_string();
    let service = Service::online(URL, |mut agent: Agent| async move {
        let upgrade = json!({
            "type": "http_request", "request_id": "r1", "method": "GET", "uri": "/chat",
            "headers": {}, "upgrade": "websocket", "more": true,
        });
        agent.send(upgrade).await;
        // The visitor, too, has said all once the local service has.
        agent.until("body_part").await;
        let end = json!({ "type": "body_part", "request_id": "r1", "part": 1, "body": "", "more": false });
        agent.send(end).await;
        agent.until_closed().await;
    })
    .await;
    let mut terminal = Terminal::tunnel(&service, 100, &target, &[], &[]);
    let (mut stream, _) = within("the request", local.accept())
        .await
        .expect("a connection");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("a head"));
    }
    let response =
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    let answered = stream.write_all(response.as_bytes()).await;
    answered.expect("it reads");
    terminal.until_text(", 1 open socket").await;
    terminal.until_text(", round trip ").await;
    drop(stream);
    let is_closed = |screen: &Screen| !screen.contents().contains("open socket");
    terminal.until("the socket's end", is_closed).await;
}

#[tokio::test]
async fn a_key_shows_the_qr_code_and_hides_it() {
    let service = service().await;
    let mut terminal = Terminal::tunnel(&service, 80, "1", &[], &[]);
    terminal.until_text("online for").await;
    terminal.press("s").await;
    terminal.until_text("(s or Esc: back)").await;
    terminal.until_text("\u{2580}").await;
    let text = terminal.parser.screen().contents();
    assert!(text.starts_with(URL), "{text}");
    terminal.press("s").await;
    terminal.until_text("online for").await;
}

#[tokio::test]
async fn it_follows_the_size_of_the_window() {
    let service = busy_service().await;
    let mut terminal = Terminal::tunnel(&service, 100, "1", &[], &[]);
    for (rows, columns, has_size) in [(24, 100, true), (12, 40, false), (30, 120, true)] {
        terminal.resize(rows, columns);
        let is_drawn = |screen: &Screen| {
            let text = screen.contents();
            row(screen, rows - 1).starts_with("q quit")
                && [URL, "/hello", "failed"]
                    .iter()
                    .all(|part| text.contains(part))
                && text.contains("size") == has_size
        };
        let what = format!("all of it in {rows} rows of {columns}");
        terminal.until(&what, is_drawn).await;
    }
}

#[tokio::test]
async fn without_colours_and_on_dumb_terminals() {
    let service = busy_service().await;
    let mut terminal = Terminal::tunnel(&service, 80, "1", &[], &[("NO_COLOR", "1")]);
    terminal.until_text("failed").await;
    assert_eq!(colours(terminal.parser.screen()), []);
    for (more, variables) in [
        (&["--console", "false"][..], &[][..]),
        (&[], &[("TERM", "dumb")]),
    ] {
        let mut terminal = Terminal::tunnel(&service, 80, "1", more, variables);
        terminal.until_text(&format!("online: {URL} ->")).await;
        assert!(!terminal.parser.screen().alternate_screen());
        terminal.press("\u{3}").await;
        let (status, parser) = terminal.ended().await;
        let text = parser.screen().contents();
        assert_eq!(status.code(), Some(0), "{text}");
        assert!(text.contains("stopping"), "{text}");
    }
}

#[tokio::test]
async fn a_job_in_the_background_leaves_the_terminal_alone() {
    let service = service().await;
    let script = r#""$@" & read line; echo "read: $line"; kill $!; wait $!; echo "code $?""#;
    let mut terminal = Terminal::shell(&service, script);
    terminal.until_text(&format!("online: {URL} ->")).await;
    terminal.press("for the shell\n").await;
    let (_, parser) = terminal.ended().await;
    let text = parser.screen().contents();
    assert!(text.contains("read: for the shell"), "{text}");
    assert!(text.contains("code 0"), "{text}");
    assert!(!parser.screen().alternate_screen());
}

#[tokio::test]
async fn one_that_is_suspended_gives_the_terminal_back_and_takes_it_again_in_the_foreground() {
    let service = service().await;
    let script = r#""$@"; echo suspended; read line; fg; echo "code $?""#;
    let mut terminal = Terminal::shell(&service, script);
    terminal.until_text("online for").await;
    terminal.press("\u{1a}").await;
    terminal.until_text("suspended").await;
    let screen = terminal.parser.screen();
    assert!(!screen.alternate_screen() && !screen.hide_cursor());
    terminal.press("\n").await;
    terminal
        .until("the console", |screen| {
            screen.alternate_screen() && screen.contents().contains("online for")
        })
        .await;
    terminal.press("q").await;
    let (_, parser) = terminal.ended().await;
    let text = parser.screen().contents();
    assert!(text.contains("code 0"), "{text}");
}
