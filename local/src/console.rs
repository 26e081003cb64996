//! What the executables have in common: their log, their lines on stderr, their exit codes and their signals.

use std::{
    fmt,
    io::{self, Write},
    process::ExitCode,
};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    filter::Targets,
    fmt::{self as log, MakeWriter},
    layer::SubscriberExt,
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

/// Starts logging on stderr what `filter` lets through, but for what would show keys.
pub(crate) fn start_log(filter: Targets) {
    tracing_subscriber::registry()
        .with(log::layer().with_writer(EscapedStderr).with_ansi(false))
        .with(without_keys(filter))
        .init();
}

fn without_keys(filter: Targets) -> Targets {
    filter.with_targets(SIGNING_TARGETS.map(|target| (target, LevelFilter::WARN)))
}

/// Stderr, on which each event stays one line of printable characters, whatever other parties' text it holds.
struct EscapedStderr;

impl<'a> MakeWriter<'a> for EscapedStderr {
    type Writer = EscapedLines<io::Stderr>;

    fn make_writer(&'a self) -> Self::Writer {
        EscapedLines(io::stderr())
    }
}

/// Takes one event at a time, and escapes control characters within it.
struct EscapedLines<W>(W);

impl<W: Write> Write for EscapedLines<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let line = text.strip_suffix('\n').unwrap_or(&text);
        self.0.write_all((escape(line) + "\n").as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Escapes what would start a new line, move the cursor, or turn the direction of what follows.
pub(crate) fn escape(text: &str) -> String {
    let is_plain = |c: char| {
        !c.is_control()
            && !matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}' | '\u{2029}'
                | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
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

/// Says why the process ends, and makes its exit code.
pub(crate) fn fail(code: u8, error: &dyn fmt::Display) -> ExitCode {
    say(&format!("error: {error}"));
    ExitCode::from(code)
}

/// Writes a line to stderr.
pub(crate) fn say(line: &str) {
    // Without stderr there is nowhere to write to.
    let _ = writeln!(io::stderr(), "{}", escape(line));
}

/// Waits for Ctrl-C, or for a request to terminate: SIGTERM, or SIGHUP when the terminal is closed.
pub(crate) async fn interrupted() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let signals = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
        ];
        let [interrupt, terminate, hangup] = signals.map(signal);
        if let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) =
            (interrupt, terminate, hangup)
        {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
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
        let mut lines = EscapedLines(Vec::new());
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
}
