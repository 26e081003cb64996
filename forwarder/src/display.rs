//! What a user sees: lines on stdout and stderr, written so that nothing ever waits for the reader.

use std::{
    borrow::Cow,
    collections::HashMap,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use tracing_subscriber::fmt::MakeWriter;

use crate::{
    event::Event,
    lock::lock,
    log_format::{self, LocalTime, LogFormat},
};

/// Lines that wait for a slow reader. More are dropped, and counted.
const MAX_QUEUED_LINES: usize = 1024;
/// How long lines come together before they are written: too short to notice, and a busy agent has one for each request.
const GATHER_TIME: Duration = Duration::from_millis(10);
/// Longest line, in characters: a request's query, or what a service says, may be longer.
const MAX_LINE_CHARS: usize = 4096;

/// Which lines there are on stderr, and how they look.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LineStyle {
    /// Their format.
    pub format: LogFormat,
    /// Only those about lost connections.
    pub is_quiet: bool,
    /// They say which tunnel they are about.
    pub names_tunnels: bool,
}

/// Shows events.
#[derive(Debug)]
pub(crate) struct Display {
    stdout: Lines,
    stderr: Lines,
    style: LineStyle,
    /// The URL of each tunnel that was printed last.
    printed: Mutex<HashMap<String, String>>,
}

impl Display {
    /// Shows events on these streams.
    pub(crate) fn new(stdout: Lines, stderr: Lines, style: LineStyle) -> Self {
        Self {
            stdout,
            stderr,
            style,
            printed: Mutex::default(),
        }
    }

    /// Prints a tunnel's URL on stdout, if it is a new one. Never blocks.
    pub(crate) fn print_url(&self, tunnel: &str, event: &Event) {
        if let Event::Online { public_url, .. } = event
            && self.is_new_url(tunnel, public_url)
        {
            self.stdout.line(public_url);
        }
    }

    /// Shows what happened to a tunnel. Never blocks.
    pub(crate) fn show(&self, tunnel: &str, event: &Event) {
        self.print_url(tunnel, event);
        let is_bad_news = matches!(event, Event::Reconnecting { .. });
        if self.style.is_quiet && !is_bad_news {
            return;
        }
        if self.style.format == LogFormat::Json {
            let line = log_format::event_line(tunnel, event);
            return line.into_iter().for_each(|line| self.stderr.push(&line));
        }
        let Some(mut line) = text(event) else {
            return;
        };
        if self.style.names_tunnels {
            line.insert_str(0, &format!("[{tunnel}] "));
        }
        if self.style.format == LogFormat::Text {
            line.insert_str(0, &format!("{} ", LocalTime::now()));
        }
        self.stderr.line(&line);
    }

    fn is_new_url(&self, tunnel: &str, public_url: &str) -> bool {
        let mut printed = lock(&self.printed);
        let before = printed.insert(tunnel.to_owned(), public_url.to_owned());
        before.as_deref() != Some(public_url)
    }
}

/// What happened, in words; `None` if it is no matter for lines.
fn text(event: &Event) -> Option<String> {
    let text = match event {
        Event::Connecting {
            endpoint,
            proxy: None,
        } => format!("connecting to {endpoint}"),
        Event::Connecting {
            endpoint,
            proxy: Some(proxy),
        } => format!("connecting to {endpoint} through the proxy {proxy}"),
        Event::Online {
            public_url,
            browser_url: None,
            target,
        } => format!("online: {public_url} -> {target}"),
        Event::Online {
            public_url,
            browser_url: Some(browser_url),
            target,
        } => format!("online: {public_url} -> {target} (in a browser: {browser_url}/)"),
        Event::Reconnecting {
            reason,
            pause,
            attempt,
        } => format!(
            "offline: {reason}; reconnecting in {:.1} s (attempt {attempt})",
            pause.as_secs_f64()
        ),
        Event::Request {
            method,
            uri,
            outcome,
            bytes,
            took,
            visitor,
        } => {
            let (failed, outcome) = match outcome {
                Ok(status) => ("", status.as_str()),
                Err(reason) => ("failed: ", reason.as_str()),
            };
            let visitor = visitor.as_deref();
            let (from, visitor) = visitor.map_or(("", ""), |visitor| (" from ", visitor));
            let (method, size, ms) = (method.as_str(), size(*bytes), took.as_millis().to_string());
            [
                method, " ", uri, " ", failed, outcome, " ", &size, " ", &ms, " ms", from, visitor,
            ]
            .concat()
        }
        Event::Draining { in_flight: 0 } => "stopping".to_owned(),
        Event::Draining { in_flight } => {
            let requests = if *in_flight == 1 {
                "request"
            } else {
                "requests"
            };
            format!("draining {in_flight} {requests}; press Ctrl-C again to stop now")
        }
        Event::RoundTrip(_) | Event::SocketOpened | Event::SocketClosed => return None,
    };
    Some(text)
}

/// A number of bytes, as a reader wants it.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => bytes.to_string() + " B",
        1024..1_048_576 => in_tenths(bytes, 1024) + " KiB",
        _ => in_tenths(bytes, 1_048_576) + " MiB",
    }
}

fn in_tenths(bytes: u64, unit: u64) -> String {
    let mut tenths = (bytes / (unit / 10)).to_string();
    tenths.insert(tenths.len() - 1, '.');
    tenths
}

/// A text as part of one line: what would end the line, steer a terminal or change the direction of writing becomes `?`. Texts of
/// visitors, of the service and of the local service are all printed so.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    if text.len() <= MAX_LINE_CHARS {
        return replace_unsafe(text);
    }
    let mut rest = text.chars();
    rest.nth(MAX_LINE_CHARS - 1);
    let (line, rest) = text.split_at(text.len() - rest.as_str().len());
    let mut line = replace_unsafe(line);
    if !rest.is_empty() {
        line.to_mut().push('…');
    }
    line
}

fn replace_unsafe(text: &str) -> Cow<'_, str> {
    let is_unsafe = |c: char| {
        c.is_control()
            || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    // Most texts are of this kind, and looking at bytes takes less time than looking at characters.
    if text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return text.into();
    }
    text.replace(is_unsafe, "?").into()
}

/// A stream of lines to a terminal, file or pipe. A thread writes them, so that a reader who does not read holds up nothing but them:
/// lines that do not fit are dropped, and the next one that fits is preceded by their number.
#[derive(Clone, Debug)]
pub(crate) struct Lines(Arc<LineQueue>);

#[derive(Debug, Default)]
struct LineQueue {
    queue: Mutex<QueuedLines>,
    /// There are lines for a thread that waits for some.
    queued: Condvar,
    /// Lines were written that someone waits for.
    written: Condvar,
}

#[derive(Debug, Default)]
struct QueuedLines {
    /// The lines, each with its end.
    text: String,
    /// How many they are.
    count: usize,
    dropped: u64,
    /// How many are being written.
    writing: usize,
    /// The thread that writes waits for a line. Waking it costs a system call for each line where it does not.
    is_idle: bool,
    /// How many wait until all is written.
    flushing: usize,
}

impl Lines {
    /// Lines to a stream. A stream that is closed drops them.
    pub(crate) fn to(mut stream: impl Write + Send + 'static) -> Self {
        let shared = Arc::new(LineQueue::default());
        let queue = shared.clone();
        thread::spawn(move || {
            loop {
                let lines = queue.next();
                // A closed reader is no reason to stop.
                // In one write, so that the other stream's lines do not come in between where both go to one place.
                let _ = stream
                    .write_all(lines.as_bytes())
                    .and_then(|()| stream.flush());
                queue.rest();
            }
        });
        Self(shared)
    }

    /// Writes a text as one line. Never blocks.
    pub(crate) fn line(&self, text: &str) {
        self.push(&clean(text));
    }

    /// Writes a line that is safe already. Never blocks.
    pub(crate) fn push(&self, line: &str) {
        let mut queue = lock(&self.0.queue);
        // Room for the number of dropped lines, too.
        if queue.count + queue.writing + 1 >= MAX_QUEUED_LINES {
            queue.dropped += 1;
            return;
        }
        queue.report_dropped();
        queue.add(line);
        self.0.wake(&mut queue);
    }

    /// Waits until all lines are written, or `limit` has passed.
    pub(crate) fn flush(&self, limit: Duration) {
        let mut queue = lock(&self.0.queue);
        queue.report_dropped();
        queue.flushing += 1;
        self.0.wake(&mut queue);
        let pending = |queue: &mut QueuedLines| queue.writing > 0 || queue.count > 0;
        let waited = self.0.written.wait_timeout_while(queue, limit, pending);
        let (mut queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
        queue.flushing -= 1;
    }
}

impl QueuedLines {
    fn add(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
        self.count += 1;
    }

    fn report_dropped(&mut self) {
        let dropped = std::mem::take(&mut self.dropped);
        if dropped > 0 {
            let lines = if dropped == 1 { "line" } else { "lines" };
            self.add(&format!(
                "({dropped} {lines} dropped: they were not read in time)"
            ));
        }
    }
}

impl LineQueue {
    /// All lines that there are, once there is one.
    fn next(&self) -> String {
        let mut queue = lock(&self.queue);
        while queue.count == 0 {
            queue.is_idle = true;
            queue = self
                .queued
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        queue.is_idle = false;
        queue.writing = std::mem::take(&mut queue.count);
        std::mem::take(&mut queue.text)
    }

    /// Notes that lines were written, and lets more come together, unless someone waits for them.
    fn rest(&self) {
        let mut queue = lock(&self.queue);
        queue.writing = 0;
        if queue.flushing == 0 {
            drop(queue);
            thread::sleep(GATHER_TIME);
        } else {
            self.written.notify_all();
        }
    }

    /// Has queued lines written, if nothing is being written.
    fn wake(&self, queue: &mut QueuedLines) {
        if std::mem::take(&mut queue.is_idle) {
            self.queued.notify_one();
        }
    }
}

/// The log writes each event at once, and so as a line.
impl io::Write for Lines {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let text = text.trim_end();
        if text.starts_with('{') && text.ends_with('}') {
            // An object, whose strings have escapes for what is not safe; it must not be cut.
            self.push(&replace_unsafe(text));
        } else {
            self.line(text);
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use http::{Method, StatusCode};

    use super::*;

    /// Longer than anything takes here.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// Hands on what is written, and waits for each write to be allowed.
    struct Slow {
        written: mpsc::Sender<String>,
        may_write: mpsc::Receiver<()>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.may_write.recv();
            let _ = self
                .written
                .send(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn written(show: impl FnOnce(&Display)) -> [String; 2] {
        let streams = [(); 2].map(|()| mpsc::channel());
        let [stdout, stderr] = streams.each_ref().map(|(written, _)| {
            let (allow, may_write) = mpsc::channel();
            drop(allow);
            let written = written.clone();
            Lines::to(Slow { written, may_write })
        });
        show(&Display::new(
            stdout.clone(),
            stderr.clone(),
            LineStyle::default(),
        ));
        stdout.flush(PATIENCE);
        stderr.flush(PATIENCE);
        streams.map(|(_, lines)| lines.try_iter().collect())
    }

    fn online(public_url: &str) -> Event {
        Event::Online {
            public_url: public_url.to_owned(),
            browser_url: None,
            target: "http://127.0.0.1:3000".to_owned(),
        }
    }

    #[test]
    fn no_line_is_cut_between_writes() {
        let (written, writes) = mpsc::channel();
        let (allow, may_write) = mpsc::channel();
        drop(allow);
        let lines = Lines::to(Slow { written, may_write });
        lines.line("one");
        lines.line("two");
        lines.flush(PATIENCE);
        let writes: Vec<String> = writes.try_iter().collect();
        assert!(writes.iter().all(|write| write.ends_with('\n')));
        assert_eq!(writes.concat(), "one\ntwo\n");
    }

    #[test]
    fn a_url_is_printed_again_only_when_it_changes() {
        let [stdout, stderr] = written(|display| {
            for url in ["http://a/x", "http://a/x", "http://b/x"] {
                display.show("http", &online(url));
            }
        });
        assert_eq!(stdout, "http://a/x\nhttp://b/x\n");
        assert_eq!(stderr.lines().count(), 3);
    }

    #[test]
    fn foreign_text_cannot_forge_lines_or_control_the_terminal() {
        let request = Event::Request {
            method: Method::GET,
            uri: "/a?\u{202e}gpj.x\u{2066}\u{9b}2J".to_owned(),
            outcome: Err("it said\r\nonline: http://forged/ -> x\u{1b}[2J".to_owned()),
            bytes: 0,
            took: Duration::ZERO,
            visitor: None,
        };
        let [stdout, stderr] = written(|display| {
            display.show("http", &online("http://x/\nhttp://forged/"));
            display.show("http", &request);
            let mut log = display.stderr.clone();
            log.write_all("WARN said \"a\nERROR forged\u{2028}\"\n".as_bytes())
                .expect("written");
        });
        assert_eq!(stdout, "http://x/?http://forged/\n");
        assert_eq!(
            stderr.lines().collect::<Vec<_>>(),
            [
                "online: http://x/?http://forged/ -> http://127.0.0.1:3000",
                "GET /a??gpj.x??2J failed: it said??online: http://forged/ -> x?[2J 0 B 0 ms",
                "WARN said \"a?ERROR forged?\"",
            ]
        );
    }

    #[test]
    fn a_long_text_is_cut_after_a_character() {
        let longest = "\u{e9}".repeat(MAX_LINE_CHARS);
        assert_eq!(clean(&longest), longest);
        assert_eq!(clean(&format!("{longest}e")), format!("{longest}…"));
    }

    #[test]
    fn lines_that_are_not_read_are_dropped_and_counted() {
        let (allow, may_write) = mpsc::channel();
        let (send, lines) = mpsc::channel();
        let stream = Lines::to(Slow {
            written: send,
            may_write,
        });
        for number in 0..MAX_QUEUED_LINES * 3 {
            stream.line(&number.to_string());
        }
        drop(allow);
        stream.flush(PATIENCE);
        let written: String = lines.try_iter().collect();
        let kept = written
            .lines()
            .filter(|line| !line.starts_with('('))
            .count();
        let dropped = MAX_QUEUED_LINES * 3 - kept;
        assert!((1..=MAX_QUEUED_LINES).contains(&kept), "{kept}");
        assert_eq!(
            written.lines().last(),
            Some(format!("({dropped} lines dropped: they were not read in time)").as_str())
        );
    }

    #[test]
    fn sizes_are_in_binary_units() {
        for (bytes, text) in [(1023, "1023 B"), (1024, "1.0 KiB"), (1_572_864, "1.5 MiB")] {
            assert_eq!(size(bytes), text);
        }
        let event = Event::Request {
            method: Method::GET,
            uri: "/".to_owned(),
            outcome: Ok(StatusCode::OK),
            bytes: 2048,
            took: Duration::from_millis(7),
            visitor: Some("203.0.113.9".to_owned()),
        };
        let line = text(&event);
        assert_eq!(
            line.as_deref(),
            Some("GET / 200 2.0 KiB 7 ms from 203.0.113.9")
        );
        assert_eq!(
            text(&Event::Draining { in_flight: 1 }).as_deref(),
            Some("draining 1 request; press Ctrl-C again to stop now")
        );
    }
}
