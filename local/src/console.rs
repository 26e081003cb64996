//! What the executables have in common: their log, their lines on stderr, their exit codes and their signals.

use std::{
    fmt::{self, Write as _},
    io::{self, Write},
    process::ExitCode,
    str::FromStr,
    time::{Duration, SystemTime},
};

#[cfg(unix)]
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    Layer, Registry,
    filter::Targets,
    fmt::{self as log, MakeWriter},
    layer::SubscriberExt,
    reload,
    util::SubscriberInitExt,
};

/// Libraries whose finest logs show the access keys that requests are signed with.
const SIGNING_TARGETS: [&str; 7] = [
    "aws_config",
    "aws_runtime",
    "aws_sdk_apigatewaymanagement",
    "aws_sdk_dynamodb",
    "aws_sigv4",
    "aws_smithy_http_client",
    "aws_smithy_runtime",
];

/// How long a terminal that closes may take to be gone, once the process was told.
#[cfg(unix)]
const TERMINAL_CLOSING_TIME: Duration = Duration::from_millis(100);

/// How lines on stderr look.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object a line.
    Json,
}

/// A text that is no format.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("a log format is text or json")]
pub(crate) struct LogFormatError;

impl FromStr for LogFormat {
    type Err = LogFormatError;

    fn from_str(text: &str) -> Result<Self, LogFormatError> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(LogFormatError),
        }
    }
}

/// Changes what is logged.
#[derive(Clone, Debug)]
pub(crate) struct LogLevel(reload::Handle<Targets, Registry>);

impl LogLevel {
    /// Logs what `filter` lets through from now on.
    pub(crate) fn set(&self, filter: Targets) {
        // It fails only without a log.
        let _ = self.0.reload(without_keys(filter));
    }
}

/// Starts logging on stderr what `filter` lets through, but for what would show keys.
pub(crate) fn start_log(filter: Targets, format: LogFormat) -> LogLevel {
    let (filter, handle) = reload::Layer::new(without_keys(filter));
    let lines = log::layer().with_ansi(false);
    let lines = match format {
        LogFormat::Text => lines.with_writer(EscapedStderr(escape)).boxed(),
        LogFormat::Json => lines.json().with_writer(EscapedStderr(escape_json)).boxed(),
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .init();
    LogLevel(handle)
}

fn without_keys(filter: Targets) -> Targets {
    filter.with_targets(SIGNING_TARGETS.map(|target| (target, LevelFilter::WARN)))
}

/// Stderr, on which each event stays one line of printable characters, whatever other parties' text it holds.
struct EscapedStderr(fn(&str) -> String);

impl<'a> MakeWriter<'a> for EscapedStderr {
    type Writer = EscapedLines<io::Stderr>;

    fn make_writer(&'a self) -> Self::Writer {
        EscapedLines(io::stderr(), self.0)
    }
}

/// Takes one event at a time, and escapes control characters within it.
struct EscapedLines<W>(W, fn(&str) -> String);

impl<W: Write> Write for EscapedLines<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let line = text.strip_suffix('\n').unwrap_or(&text);
        self.0.write_all((self.1(line) + "\n").as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Whether a character stays in its line, and leaves the cursor and the direction of what follows alone.
fn is_plain(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}' | '\u{2029}'
            | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Escapes what would start a new line, move the cursor, or turn the direction of what follows.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if is_plain(c) {
            escaped.push(c);
        } else {
            escaped.extend(c.escape_default());
        }
    }
    escaped
}

/// The same for a line of JSON, where such characters stand in strings only.
pub(crate) fn escape_json(line: &str) -> String {
    let mut escaped = String::with_capacity(line.len());
    for c in line.chars() {
        if is_plain(c) {
            escaped.push(c);
        } else {
            // None of them is beyond the Basic Multilingual Plane.
            let _ = write!(escaped, "\\u{:04x}", u32::from(c));
        }
    }
    escaped
}

/// Says why the process ends, and makes its exit code.
pub(crate) fn fail(code: u8, error: &dyn fmt::Display) -> ExitCode {
    format!("error: {error}").lines().for_each(say);
    ExitCode::from(code)
}

/// Writes a line to stderr.
pub(crate) fn say(line: &str) {
    // Without stderr there is nowhere to write to.
    let _ = writeln!(io::stderr(), "{}", escape(line));
}

/// Writes a line about the process to stderr, as the log has it.
pub(crate) fn report(format: LogFormat, line: &str) {
    match format {
        LogFormat::Text => line.lines().for_each(say),
        LogFormat::Json => {
            let object = serde_json::json!({
                "timestamp": humantime::format_rfc3339_micros(SystemTime::now()).to_string(),
                "level": "INFO",
                "fields": { "message": line },
                "target": "tunnel_local",
            });
            // Without stderr there is nowhere to write to.
            let _ = writeln!(io::stderr(), "{}", escape_json(&object.to_string()));
        }
    }
}

/// What the process is asked to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Wish {
    /// To end: by Ctrl-C or SIGTERM, or because its terminal was closed.
    Stop,
    /// To read its settings again: by SIGHUP.
    Reload,
}

/// The signals that the process gets.
#[cfg(unix)]
#[derive(Debug)]
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    had_terminal: bool,
}

#[cfg(unix)]
impl Signals {
    /// Takes signals from now on.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
            had_terminal: has_terminal(),
        })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) -> Wish {
        tokio::select! {
            _ = self.interrupt.recv() => return Wish::Stop,
            _ = self.terminate.recv() => return Wish::Stop,
            _ = self.hangup.recv() => {}
        }
        // The same signal says that the terminal has closed. A shell may pass it on before the terminal is gone.
        tokio::time::sleep(TERMINAL_CLOSING_TIME).await;
        if self.had_terminal && !has_terminal() {
            Wish::Stop
        } else {
            Wish::Reload
        }
    }
}

/// Whether the process has a terminal that controls it.
#[cfg(unix)]
fn has_terminal() -> bool {
    std::fs::File::open("/dev/tty").is_ok()
}

/// The signals that the process gets: only Ctrl-C.
#[cfg(not(unix))]
#[derive(Debug)]
pub(crate) struct Signals;

#[cfg(not(unix))]
impl Signals {
    /// Takes signals from now on.
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self)
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) -> Wish {
        let _ = tokio::signal::ctrl_c().await;
        Wish::Stop
    }
}

/// Lets the process open as many files as the system allows it to, and returns how many that is if fewer than `wanted`.
pub(crate) fn raise_open_files(wanted: u64) -> Option<u64> {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let limit = getrlimit(Resource::Nofile);
        if let Some(current) = limit
            .current
            .filter(|current| *current < limit.maximum.unwrap_or(wanted))
        {
            let raised = Rlimit {
                current: Some(limit.maximum.unwrap_or(wanted).max(current)),
                maximum: limit.maximum,
            };
            // The limit stays as it is if it cannot be raised; what it is then is read below.
            let _ = setrlimit(Resource::Nofile, raised);
        }
        getrlimit(Resource::Nofile)
            .current
            .filter(|current| *current < wanted)
    }
    #[cfg(not(unix))]
    {
        let _ = wanted;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_text_it_contains() {
        let mut lines = EscapedLines(Vec::new(), escape);
        lines
            .write_all(
                "WARN rules: `x\n2026 ERROR forged\r\u{1b}[31m \u{9b}1m \u{202e}gpj`\n".as_bytes(),
            )
            .expect("written");
        assert_eq!(
            String::from_utf8(lines.0).expect("text"),
            "WARN rules: `x\\n2026 ERROR forged\\r\\u{1b}[31m \\u{9b}1m \\u{202e}gpj`\n"
        );
    }

    #[test]
    fn logs_that_would_show_keys_stay_off_at_the_finest_level() {
        let filter = without_keys("trace".parse().expect("a filter"));
        assert!(filter.would_enable("tunnel_forward", &tracing::Level::TRACE));
        for target in [
            "aws_sigv4::http_request::sign",
            "aws_smithy_runtime::client",
        ] {
            assert!(
                !filter.would_enable(target, &tracing::Level::DEBUG),
                "{target}"
            );
        }
    }

    #[test]
    fn a_line_of_json_stays_json() {
        let line =
            serde_json::json!({ "message": "x\n\u{1b}[31m \u{9b}1m \u{202e}gpj" }).to_string();
        let escaped = escape_json(&line);
        assert!(escaped.is_ascii(), "{escaped}");
        let read: serde_json::Value = serde_json::from_str(&escaped).expect("JSON");
        assert_eq!(read["message"], "x\n\u{1b}[31m \u{9b}1m \u{202e}gpj");
    }
}
