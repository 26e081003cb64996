//! The access log: a line for each request of a visitor, when it has ended. docs/metrics.md has the schema.
//!
//! A thread of its own writes it. Requests do not wait for it: lines that it cannot keep up with are lost, and counted.

use std::{
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::{self, BufWriter, Write},
    path::PathBuf,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    time::Duration,
};

use http::{HeaderMap, HeaderName, Request, Version, header};
use jiff::Timestamp;
use serde_json::json;
use tokio::sync::oneshot;
use tracing::warn;
use tunnel_protocol::id::TunnelId;

use super::metrics::Ended;
use crate::{console::escape_json, front::forwarded::VisitorOrigin};

/// Lines that wait to be written.
const MAX_QUEUED_LINES: usize = 4096;
/// What they may have together, in bytes.
const MAX_QUEUED_BYTES: usize = 16 * 1024 * 1024;
/// What is kept of each text that a visitor sends: the longest URLs that browsers and proxies commonly pass on.
const MAX_FIELD_BYTES: usize = 2048;

/// How lines look.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum AccessLogFormat {
    /// The combined format of Apache and nginx.
    #[default]
    Combined,
    /// An object a line.
    Json,
}

/// A text that is no format.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("a format of access logs is combined or json")]
pub struct AccessLogFormatError;

impl FromStr for AccessLogFormat {
    type Err = AccessLogFormatError;

    fn from_str(text: &str) -> Result<Self, AccessLogFormatError> {
        match text {
            "combined" => Ok(Self::Combined),
            "json" => Ok(Self::Json),
            _ => Err(AccessLogFormatError),
        }
    }
}

/// Where lines go.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum AccessLogTarget {
    /// To stdout.
    Stdout,
    /// To the end of this file.
    File(PathBuf),
}

impl From<PathBuf> for AccessLogTarget {
    fn from(path: PathBuf) -> Self {
        if path.as_os_str() == "-" {
            Self::Stdout
        } else {
            Self::File(path)
        }
    }
}

/// An access log that is asked for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AccessLogOptions {
    /// Where it is.
    pub target: AccessLogTarget,
    /// How its lines look.
    pub format: AccessLogFormat,
}

/// What is known of a request from its head.
#[derive(Debug)]
pub(super) struct RequestLine {
    visitor: String,
    method: String,
    target: String,
    version: Version,
    host: Option<String>,
    referer: Option<String>,
    user_agent: Option<String>,
}

impl RequestLine {
    pub(super) fn of<B>(request: &Request<B>, origin: VisitorOrigin) -> Self {
        let text = |name| text(request.headers(), name);
        let target = request.uri().path_and_query();
        Self {
            visitor: origin.address,
            method: cut(request.method().as_str()),
            target: cut(target.map_or("", |target| target.as_str())),
            version: request.version(),
            host: origin.host.map(|host| cut(&host)).or_else(|| {
                let authority = request.uri().authority();
                text(header::HOST).or_else(|| authority.map(|host| cut(host.as_str())))
            }),
            referer: text(header::REFERER),
            user_agent: text(header::USER_AGENT),
        }
    }
}

fn text(fields: &HeaderMap, name: HeaderName) -> Option<String> {
    let value = fields.get(name)?;
    Some(cut(&String::from_utf8_lossy(value.as_bytes())))
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_FIELD_BYTES)].to_owned()
}

/// A request that has ended.
pub(super) struct Entry<'e> {
    pub(super) request: &'e RequestLine,
    pub(super) ended: Ended<'e>,
    pub(super) code: Option<&'e str>,
    pub(super) head: Option<Duration>,
    pub(super) took: Duration,
}

impl Entry<'_> {
    fn combined(&self, at: Timestamp) -> String {
        let request = self.request;
        let time = at.strftime("%d/%b/%Y:%H:%M:%S +0000");
        let quoted = |text: &Option<String>| text.as_deref().map_or("-".to_owned(), quotable);
        format!(
            "{} - - [{time}] \"{} {} {:?}\" {} {} \"{}\" \"{}\"\n",
            quotable(&request.visitor),
            quotable(&request.method),
            quotable(&request.target),
            request.version,
            self.ended.status.map_or(499, |status| status.as_u16()),
            self.ended.response_bytes,
            quoted(&request.referer),
            quoted(&request.user_agent),
        )
    }

    fn json(&self, at: Timestamp) -> String {
        let request = self.request;
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let mut object = json!({
            "time": format!("{at:.3}"),
            "visitor": request.visitor,
            "method": request.method,
            "uri": request.target,
            "protocol": format!("{:?}", request.version),
            "host": request.host,
            "tunnel": self.ended.tunnel.map(TunnelId::as_str),
            "status": self.ended.status.map(|status| status.as_u16()),
            "outcome": self.ended.outcome.name(),
            "error": self.code,
            "request_bytes": self.ended.request_bytes,
            "response_bytes": self.ended.response_bytes,
            "head_ms": self.head.map(millis),
            "duration_ms": millis(self.took),
            "referer": request.referer,
            "user_agent": request.user_agent,
        });
        if let Some(fields) = object.as_object_mut() {
            fields.retain(|_, value| !value.is_null());
        }
        escape_json(&object.to_string()) + "\n"
    }
}

/// A text as it may stand between quotation marks, the way Apache writes it.
fn quotable(text: &str) -> String {
    let mut quotable = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' => quotable.extend(['\\', char::from(byte)]),
            b' '..=b'~' => quotable.push(char::from(byte)),
            // Nothing fails that is written to a string.
            _ => drop(write!(quotable, "\\x{byte:02x}")),
        }
    }
    quotable
}

/// What the thread is told.
enum Command {
    Write(String),
    /// Look at what is to be done besides.
    Wake,
    /// Write what is queued, and say so.
    Finish(oneshot::Sender<()>),
}

/// The log.
#[derive(Debug)]
pub(crate) struct AccessLog {
    format: AccessLogFormat,
    commands: SyncSender<Command>,
    is_to_be_reopened: Arc<AtomicBool>,
    lost: Arc<AtomicU64>,
    queued_bytes: Arc<AtomicUsize>,
}

impl AccessLog {
    /// Opens the log and begins to write it.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub(crate) fn open(options: &AccessLogOptions) -> io::Result<Self> {
        let (commands, received) = sync_channel(MAX_QUEUED_LINES);
        let is_to_be_reopened = Arc::new(AtomicBool::new(false));
        let lost = Arc::new(AtomicU64::new(0));
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let writer = Writer {
            output: output(&options.target)?,
            target: options.target.clone(),
            is_to_be_reopened: is_to_be_reopened.clone(),
            lost: lost.clone(),
            queued_bytes: queued_bytes.clone(),
            is_failing: false,
        };
        std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || writer.run(&received))?;
        Ok(Self {
            format: options.format,
            commands,
            is_to_be_reopened,
            lost,
            queued_bytes,
        })
    }

    /// How many lines are lost: too many waited already, or they could not be written.
    pub(super) fn lost_lines(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Writes a line, unless too many wait already.
    pub(super) fn write(&self, entry: &Entry<'_>) {
        let now = Timestamp::now();
        let line = match self.format {
            AccessLogFormat::Combined => entry.combined(now),
            AccessLogFormat::Json => entry.json(now),
        };
        let bytes = line.len();
        let waiting = self.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        if waiting + bytes > MAX_QUEUED_BYTES
            || self.commands.try_send(Command::Write(line)).is_err()
        {
            self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Opens the file again, because the one that was open has another name by now. The lines before stay in that one.
    pub(crate) fn reopen(&self) {
        self.is_to_be_reopened.store(true, Ordering::Relaxed);
        // If the queue is full, the thread is awake.
        let _ = self.commands.try_send(Command::Wake);
    }

    /// Waits until all lines so far are written.
    pub(crate) async fn finish(&self) {
        let (done, finished) = oneshot::channel();
        if self.commands.try_send(Command::Finish(done)).is_ok() {
            let _ = finished.await;
        }
    }
}

fn output(target: &AccessLogTarget) -> io::Result<Box<dyn Write + Send>> {
    let AccessLogTarget::File(path) = target else {
        return Ok(Box::new(BufWriter::new(io::stdout())));
    };
    let mut options = OpenOptions::new();
    options.append(true).create(true);
    // Visitors' addresses are in it.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o640);
    let file: File = options.open(path)?;
    Ok(Box::new(BufWriter::new(file)))
}

/// The thread that writes.
struct Writer {
    target: AccessLogTarget,
    output: Box<dyn Write + Send>,
    is_to_be_reopened: Arc<AtomicBool>,
    lost: Arc<AtomicU64>,
    queued_bytes: Arc<AtomicUsize>,
    is_failing: bool,
}

impl Writer {
    /// Writes until nobody is left who could send a line.
    fn run(mut self, commands: &Receiver<Command>) {
        loop {
            let command = match commands.try_recv() {
                Ok(command) => command,
                Err(TryRecvError::Disconnected) => break,
                Err(TryRecvError::Empty) => {
                    let flushed = self.output.flush();
                    self.note(flushed);
                    match commands.recv() {
                        Ok(command) => command,
                        Err(_) => break,
                    }
                }
            };
            if self.is_to_be_reopened.swap(false, Ordering::Relaxed) {
                self.reopen();
            }
            match command {
                Command::Write(line) => {
                    self.queued_bytes.fetch_sub(line.len(), Ordering::Relaxed);
                    let written = self.output.write_all(line.as_bytes());
                    if written.is_err() {
                        self.lost.fetch_add(1, Ordering::Relaxed);
                    }
                    self.note(written);
                }
                Command::Wake => {}
                Command::Finish(done) => {
                    let flushed = self.output.flush();
                    self.note(flushed);
                    let _ = done.send(());
                }
            }
        }
        let flushed = self.output.flush();
        self.note(flushed);
    }

    fn reopen(&mut self) {
        let flushed = self.output.flush();
        self.note(flushed);
        match output(&self.target) {
            Ok(output) => self.output = output,
            Err(error) => {
                warn!(%error, "the access log could not be opened again; it goes on in the old file");
            }
        }
    }

    /// Warns once when writing begins to fail, and not again until it has worked.
    fn note(&mut self, written: io::Result<()>) {
        match written {
            Ok(()) => self.is_failing = false,
            Err(error) if !self.is_failing => {
                self.is_failing = true;
                warn!(%error, "the access log cannot be written");
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use http::StatusCode;

    use super::*;
    use crate::operator::metrics::Outcome;

    /// Does something with the entry of a request that has failed.
    fn with_entry<T>(request: &Request<()>, act: impl FnOnce(&Entry<'_>) -> T) -> T {
        let origin = VisitorOrigin {
            address: "203.0.113.9".to_owned(),
            ..VisitorOrigin::default()
        };
        let tunnel = "my-app".parse().expect("an id");
        act(&Entry {
            request: &RequestLine::of(request, origin),
            ended: Ended {
                outcome: Outcome::Failed,
                status: Some(StatusCode::BAD_GATEWAY),
                tunnel: Some(&tunnel),
                request_bytes: 3,
                response_bytes: 70,
            },
            code: Some("local_unreachable"),
            head: Some(Duration::from_millis(7)),
            took: Duration::from_millis(8),
        })
    }

    fn lines(request: &Request<()>) -> (String, String) {
        let at = "2026-11-25T21:58:32.5Z".parse().expect("a time");
        with_entry(request, |entry| (entry.combined(at), entry.json(at)))
    }

    fn write(log: &AccessLog, lines: usize) {
        let request = Request::get("/").body(()).expect("a request");
        for _ in 0..lines {
            with_entry(&request, |entry| log.write(entry));
        }
    }

    #[test]
    fn nobody_waits_for_a_log_that_is_not_written_and_lost_lines_are_counted() {
        let (log, _not_read) = not_read(2);
        write(&log, 5);
        assert_eq!(log.lost_lines(), 3);
    }

    #[test]
    fn lines_that_wait_have_few_bytes_together_however_long_they_are() {
        let (log, waiting) = not_read(MAX_QUEUED_LINES);
        let request = Request::builder()
            .method(&*"M".repeat(100_000))
            .uri(format!("/{}", "x".repeat(5000)))
            .header("user-agent", "\"".repeat(5000))
            .body(())
            .expect("a request");
        for _ in 0..MAX_QUEUED_LINES {
            with_entry(&request, |entry| log.write(entry));
        }
        let lines: Vec<_> = waiting.try_iter().collect();
        let bytes = lines.iter().map(|command| match command {
            Command::Write(line) => line.len(),
            Command::Wake | Command::Finish(_) => 0,
        });
        let bytes: usize = bytes.sum();
        assert!(bytes <= MAX_QUEUED_BYTES, "{bytes}");
        assert!(bytes / lines.len() < 10_000, "each is cut");
        let lost = MAX_QUEUED_LINES - lines.len();
        assert!(lost > 0 && log.lost_lines() == lost as u64, "{lost}");
    }

    /// A log whose lines nobody writes.
    fn not_read(lines: usize) -> (AccessLog, Receiver<Command>) {
        let (commands, received) = sync_channel(lines);
        let log = AccessLog {
            format: AccessLogFormat::Combined,
            commands,
            is_to_be_reopened: Arc::default(),
            lost: Arc::default(),
            queued_bytes: Arc::default(),
        };
        (log, received)
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn lines_that_a_full_disk_does_not_take_are_counted() {
        let options = AccessLogOptions {
            target: AccessLogTarget::File("/dev/full".into()),
            format: AccessLogFormat::Json,
        };
        let log = AccessLog::open(&options).expect("it opens");
        write(&log, 1000);
        log.finish().await;
        // Some are still kept, to be tried again.
        assert!(
            (900..1000).contains(&log.lost_lines()),
            "{}",
            log.lost_lines()
        );
    }

    #[test]
    fn a_line_has_the_fields_of_the_schema_and_no_credentials() {
        let request = Request::post("/a?b=c")
            .header("host", "my-app.example.com")
            .header("authorization", "Bearer swordfish")
            .header("cookie", "id=swordfish")
            .header("referer", "https://example.com/")
            .header("user-agent", "curl/8")
            .body(())
            .expect("a request");
        let (combined, json) = lines(&request);
        assert_eq!(
            combined,
            "203.0.113.9 - - [25/Nov/2026:21:58:32 +0000] \"POST /a?b=c HTTP/1.1\" 502 70 \"https://example.com/\" \"curl/8\"\n"
        );
        let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(
            json,
            json!({
                "time": "2026-11-25T21:58:32.500Z", "visitor": "203.0.113.9", "method": "POST", "uri": "/a?b=c",
                "protocol": "HTTP/1.1", "host": "my-app.example.com", "tunnel": "my-app", "status": 502, "outcome": "failed",
                "error": "local_unreachable", "request_bytes": 3, "response_bytes": 70, "head_ms": 7, "duration_ms": 8,
                "referer": "https://example.com/", "user_agent": "curl/8",
            })
        );
    }

    #[test]
    fn what_visitors_send_neither_ends_a_line_nor_a_quotation() {
        let agent = "a\" 200 \"\\ \u{9b}31m\u{202e}";
        let agent = http::HeaderValue::from_bytes(agent.as_bytes()).expect("a value");
        let request = Request::get(format!("/{}", "x".repeat(5000)))
            .header("user-agent", agent)
            .body(())
            .expect("a request");
        let (combined, json) = lines(&request);
        assert!(
            combined.ends_with("\"a\\\" 200 \\\"\\\\ \\xc2\\x9b31m\\xe2\\x80\\xae\"\n"),
            "{combined}"
        );
        assert!(
            combined.len() < 3000 && json.trim_end().is_ascii(),
            "{json}"
        );
        let read: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(read["user_agent"], "a\" 200 \"\\ \u{9b}31m\u{202e}");
    }
}
