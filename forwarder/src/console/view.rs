//! How the console looks.

use std::{
    env,
    time::{Duration, Instant},
};

use http::StatusCode;
use qrcode::{QrCode, render::unicode::Dense1x2};
use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span, Text},
    widgets::{Cell, Clear, Paragraph, Row, Table},
};

use super::state::{Counts, RequestLine, State, Status, TunnelState};
use crate::display;

/// Lines of the log that are shown at most.
const MAX_LOG_LINES: u16 = 4;
/// Narrower terminals get no column for the size.
const MIN_WIDTH_WITH_SIZE: u16 = 60;

/// Colours, or none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Theme {
    has_colours: bool,
}

impl Theme {
    /// Colours unless `NO_COLOR` is set to something.
    pub(super) fn from_environment() -> Self {
        let without = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            has_colours: !without,
        }
    }

    fn colour(self, colour: Color) -> Style {
        if self.has_colours {
            Style::new().fg(colour)
        } else {
            Style::new()
        }
    }

    fn outcome(self, outcome: &Result<StatusCode, String>) -> Style {
        match outcome.as_ref().map(|status| status.as_u16() / 100) {
            Ok(1 | 3) => self.colour(Color::Cyan),
            Ok(2) => self.colour(Color::Green),
            Ok(4) => self.colour(Color::Yellow),
            _ => self.colour(Color::Red),
        }
    }
}

const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);

/// Draws all of it, whatever the size of the terminal.
pub(super) fn draw(frame: &mut Frame<'_>, state: &State, theme: Theme, now: Instant) {
    if let Some(url) = state.qr_code() {
        return draw_qr_code(frame, url);
    }
    let width = frame.area().width.into();
    let mut about: Vec<Line<'_>> = state
        .tunnels()
        .iter()
        .enumerate()
        .flat_map(|(at, tunnel)| {
            let is_selected = state.tunnels().len() > 1 && at == state.selected();
            tunnel_lines(tunnel, is_selected, width, theme, now)
        })
        .collect();
    let inspector = state.inspector_url();
    about.extend(inspector.map(|url| about_line("inspector", url, Style::new(), width)));
    let log_lines = u16::try_from(state.log_lines().len())
        .unwrap_or(u16::MAX)
        .min(MAX_LOG_LINES);
    let [head, about_area, counts, requests, log, keys] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(u16::try_from(about.len() + 1).unwrap_or(u16::MAX)),
        Constraint::Length(2),
        Constraint::Min(3),
        Constraint::Length(log_lines),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(head_line(state, now), head);
    frame.render_widget(Paragraph::new(about), about_area);
    frame.render_widget(counts_line(state, theme, now), counts);
    frame.render_widget(request_table(state, requests, theme, now), requests);
    let skipped = state.log_lines().len().saturating_sub(log_lines.into());
    let lines = state.log_lines().iter().skip(skipped);
    let lines: Vec<Line<'_>> = lines.map(|line| Line::styled(line.as_str(), DIM)).collect();
    frame.render_widget(Paragraph::new(lines), log);
    frame.render_widget(key_line(state), keys);
}

fn head_line(state: &State, now: Instant) -> Line<'_> {
    let mut line = Line::from(vec![
        Span::styled("ttf", BOLD),
        Span::styled(concat!(" ", env!("CARGO_PKG_VERSION")), DIM),
    ]);
    if let Some(in_flight) = state.draining() {
        line.push_span(Span::styled(
            format!("   stopping; open requests: {in_flight}; Ctrl-C stops now"),
            BOLD,
        ));
    } else if let Some(notice) = state.notice(now) {
        line.push_span(Span::styled(format!("   {notice}"), DIM));
    }
    line
}

fn tunnel_lines(
    tunnel: &TunnelState,
    is_selected: bool,
    width: usize,
    theme: Theme,
    now: Instant,
) -> Vec<Line<'_>> {
    let mark = if is_selected { "> " } else { "  " };
    let name = Span::styled(format!("{mark}{:<12} ", tunnel.name), BOLD);
    let status = match &tunnel.status {
        Status::Connecting => Span::styled("connecting", theme.colour(Color::Yellow)),
        Status::Online { since } => Span::styled(
            format!("online for {}{}", age(*since, now), measures(tunnel)),
            theme.colour(Color::Green),
        ),
        Status::Offline {
            reason,
            next_try,
            attempt,
        } => {
            let pause = next_try.saturating_duration_since(now);
            Span::styled(
                format!(
                    "offline: {reason}; next try in {:.0} s (attempt {attempt})",
                    pause.as_secs_f64().ceil()
                ),
                theme.colour(Color::Red),
            )
        }
    };
    let mut lines = vec![Line::from(vec![name, status])];
    if let Some(urls) = &tunnel.urls {
        let rows = [
            ("address", Some(urls.public.as_str()), BOLD),
            ("in a browser", urls.browser.as_deref(), Style::new()),
            ("leads to", Some(urls.target.as_str()), Style::new()),
        ];
        for (label, value, style) in rows {
            if let Some(value) = value {
                lines.push(about_line(label, value, style, width));
            }
        }
    }
    lines
}

/// An address with its label, or without where only one of them fits.
fn about_line<'a>(label: &str, value: &'a str, style: Style, width: usize) -> Line<'a> {
    let value = Span::styled(value, style);
    let label = Span::styled(format!("  {label:<12} "), DIM);
    if label.width() + value.width() > width {
        Line::from(vec![Span::raw("  "), value])
    } else {
        Line::from(vec![label, value])
    }
}

/// What is known of a connection beside that it is open.
fn measures(tunnel: &TunnelState) -> String {
    let mut text = String::new();
    if let Some(round_trip) = tunnel.round_trip {
        text.push_str(&format!(", round trip {}", short_duration(round_trip)));
    }
    match tunnel.sockets {
        0 => {}
        1 => text.push_str(", 1 open socket"),
        sockets => text.push_str(&format!(", {sockets} open sockets")),
    }
    text
}

fn counts_line<'a>(state: &State, theme: Theme, now: Instant) -> Line<'a> {
    let Counts { by_class, failed } = state.counts();
    let mut spans = vec![
        Span::styled("  requests     ", DIM),
        Span::styled(state.counts().total().to_string(), BOLD),
    ];
    let classes = by_class.iter().zip(1_u16..).map(|(count, class)| {
        let status = StatusCode::from_u16(class * 100).map_err(|_| String::new());
        (format!("{class}xx"), *count, theme.outcome(&status))
    });
    let failed = ("failed".to_owned(), failed, theme.colour(Color::Red));
    for (name, count, style) in classes.chain([failed]).filter(|(_, count, _)| *count > 0) {
        spans.push(Span::styled(format!("  {name} {count}"), style));
    }
    spans.push(Span::raw(format!("  {:.1}/s", state.rate(now))));
    if let Some([median, p95]) = state.durations().percentiles([50, 95]) {
        let times = format!("  p50 {}  p95 {}", duration(median), duration(p95));
        spans.push(Span::styled(times, DIM));
    }
    Line::from(spans)
}

fn request_table<'a>(state: &'a State, area: Rect, theme: Theme, now: Instant) -> Table<'a> {
    let names_tunnels = state.tunnels().len() > 1;
    let has_size = area.width >= MIN_WIDTH_WITH_SIZE;
    let mut columns = vec![("ago", Constraint::Length(6))];
    if names_tunnels {
        columns.push(("tunnel", Constraint::Length(10)));
    }
    columns.push(("method", Constraint::Length(7)));
    columns.push(("path", Constraint::Fill(1)));
    columns.push(("status", Constraint::Length(6)));
    if has_size {
        columns.push(("size", Constraint::Length(10)));
    }
    columns.push(("time", Constraint::Length(8)));
    let rows = state
        .requests()
        .take(area.height.saturating_sub(1).into())
        .map(|request| request_row(request, names_tunnels, has_size, theme, now));
    let header = Row::new(columns.iter().map(|(name, _)| *name)).style(DIM);
    Table::new(rows, columns.iter().map(|(_, width)| *width)).header(header)
}

fn request_row(
    request: &RequestLine,
    names_tunnel: bool,
    has_size: bool,
    theme: Theme,
    now: Instant,
) -> Row<'_> {
    let style = theme.outcome(&request.outcome);
    let (path, status) = match &request.outcome {
        Ok(status) => (Text::raw(request.uri.as_str()), status.as_str().to_owned()),
        Err(reason) => (
            Text::from(format!("{} ({reason})", request.uri)),
            "failed".to_owned(),
        ),
    };
    let mut cells = vec![Cell::from(Span::styled(age(request.ended, now), DIM))];
    if names_tunnel {
        cells.push(Cell::from(request.tunnel.as_str()));
    }
    cells.push(Cell::from(request.method.as_str()));
    cells.push(Cell::from(path));
    cells.push(Cell::from(Span::styled(status, style)));
    if has_size {
        cells.push(Cell::from(display::size(request.bytes)));
    }
    cells.push(Cell::from(duration(request.took)));
    Row::new(cells)
}

fn key_line(state: &State) -> Line<'_> {
    let mut keys = vec!["q quit", "o open", "c copy", "s QR code"];
    if state.inspector_url().is_some() {
        keys.push("i inspector");
    }
    if state.tunnels().len() > 1 {
        keys.push("up/down select");
    }
    Line::styled(keys.join("   "), DIM)
}

fn draw_qr_code(frame: &mut Frame<'_>, url: &str) {
    let Ok(code) = QrCode::new(url) else {
        return;
    };
    // Cameras want dark on light, whatever the terminal's own colours are.
    let picture = code
        .render::<Dense1x2>()
        .dark_color(Dense1x2::Dark)
        .light_color(Dense1x2::Light)
        .build();
    let style = Style::new()
        .fg(Color::Rgb(0, 0, 0))
        .bg(Color::Rgb(255, 255, 255));
    let height = u16::try_from(picture.lines().count()).unwrap_or(u16::MAX);
    let area = frame.area();
    frame.render_widget(Clear, area);
    let fits = height + 2 <= area.height
        && picture
            .lines()
            .next()
            .is_some_and(|line| line.chars().count() <= area.width.into());
    let [about, code_area] =
        Layout::vertical([Constraint::Length(2), Constraint::Min(0)]).areas(area);
    let text = if fits {
        format!("{url}   (s or Esc: back)")
    } else {
        "the window is too small for the QR code (s or Esc: back)".to_owned()
    };
    frame.render_widget(Line::raw(text), about);
    if fits {
        let lines: Vec<Line<'_>> = picture
            .lines()
            .map(|line| Line::from(Span::styled(line.to_owned(), style)))
            .collect();
        frame.render_widget(Paragraph::new(lines), code_area);
    }
}

fn age(since: Instant, now: Instant) -> String {
    let seconds = now.saturating_duration_since(since).as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}

fn duration(took: Duration) -> String {
    match took.as_millis() {
        millis @ 0..10_000 => format!("{millis} ms"),
        millis => format!("{:.1} s", millis as f64 / 1000.0),
    }
}

/// A duration that may be shorter than a millisecond.
fn short_duration(took: Duration) -> String {
    if took < Duration::from_millis(10) {
        format!("{:.1} ms", took.as_secs_f64() * 1000.0)
    } else {
        duration(took)
    }
}

#[cfg(test)]
mod tests {
    use http::Method;
    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::event::Event;

    fn online(browser_url: Option<&str>) -> Event {
        Event::Online {
            public_url: "http://127.0.0.1:8080/my-app".to_owned(),
            browser_url: browser_url.map(str::to_owned),
            target: "http://127.0.0.1:3000".to_owned(),
        }
    }

    fn request(uri: &str, outcome: Result<StatusCode, String>) -> Event {
        Event::Request {
            method: Method::GET,
            uri: uri.to_owned(),
            outcome,
            bytes: 2048,
            took: Duration::from_millis(7),
            visitor: None,
        }
    }

    fn drawn(state: &State, width: u16, height: u16, now: Instant) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
        let theme = Theme { has_colours: true };
        terminal
            .draw(|frame| draw(frame, state, theme, now))
            .expect("drawn");
        let buffer = terminal.backend().buffer();
        (0..height)
            .map(|y| {
                let row: String = (0..width).map(|x| buffer[(x, y)].symbol()).collect();
                row.trim_end().to_owned()
            })
            .collect()
    }

    fn state(names: &[&str]) -> State {
        State::new(names.iter().map(|name| (*name).to_owned()))
    }

    #[test]
    fn a_tunnel_its_addresses_and_its_requests_are_shown() {
        let now = Instant::now();
        let mut state = state(&["http"]);
        state.apply("http", &online(Some("http://my-app.localhost:8080")), now);
        state.apply("http", &request("/hello?a=1", Ok(StatusCode::OK)), now);
        state.apply("http", &request("/gone", Err("refused".to_owned())), now);
        let lines = drawn(&state, 80, 20, now + Duration::from_secs(3));
        let text = lines.join("\n");
        for part in [
            "online for 3 s",
            "address      http://127.0.0.1:8080/my-app",
            "in a browser http://my-app.localhost:8080",
            "leads to     http://127.0.0.1:3000",
            "requests     2  2xx 1  failed 1",
            "p50 7 ms",
            "q quit",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        let newest = lines
            .iter()
            .position(|line| line.contains("/gone (refused)"));
        let older = lines.iter().position(|line| line.contains("/hello?a=1"));
        assert!(newest.is_some() && newest < older, "{text}");
        assert!(!text.contains("i inspector"), "there is none: {text}");
    }

    #[test]
    fn the_round_trip_and_the_open_sockets_of_a_tunnel_are_shown() {
        let now = Instant::now();
        let mut state = state(&["api", "web"]);
        state.apply("web", &online(None), now);
        for event in [
            Event::SocketOpened,
            Event::RoundTrip(Duration::from_micros(340)),
            Event::SocketOpened,
        ] {
            state.apply("web", &event, now);
        }
        let text = drawn(&state, 80, 20, now).join("\n");
        let expected = "online for 0 s, round trip 0.3 ms, 2 open sockets";
        assert!(text.contains(expected), "{text}");
        state.apply("web", &Event::SocketClosed, now);
        state.apply("web", &Event::RoundTrip(Duration::from_millis(48)), now);
        let text = drawn(&state, 80, 20, now).join("\n");
        assert!(text.contains("round trip 48 ms, 1 open socket\n"), "{text}");
    }

    #[test]
    fn a_socket_that_was_open_for_long_does_not_count_as_a_slow_request() {
        let now = Instant::now();
        let mut state = state(&["http"]);
        state.apply("http", &request("/", Ok(StatusCode::OK)), now);
        let mut socket = request("/chat", Ok(StatusCode::SWITCHING_PROTOCOLS));
        if let Event::Request { took, .. } = &mut socket {
            *took = Duration::from_secs(3600);
        }
        state.apply("http", &socket, now);
        let text = drawn(&state, 80, 20, now).join("\n");
        assert!(text.contains("p50 7 ms  p95 7 ms"), "{text}");
    }

    #[test]
    fn tries_to_reconnect_are_one_line_that_keeps_the_address() {
        let now = Instant::now();
        let mut state = state(&["http"]);
        state.apply("http", &online(None), now);
        for attempt in 1..=50 {
            let lost = Event::Reconnecting {
                reason: "the connection is lost".to_owned(),
                pause: Duration::from_secs(2),
                attempt,
            };
            state.apply("http", &lost, now);
        }
        let lines = drawn(&state, 100, 20, now);
        let offline: Vec<_> = lines
            .iter()
            .filter(|line| line.contains("offline"))
            .collect();
        assert_eq!(offline.len(), 1);
        assert!(offline[0].contains("the connection is lost; next try in 2 s (attempt 50)"));
        assert!(lines.iter().any(|line| line.contains("/my-app")));
    }

    #[test]
    fn every_size_of_window_is_drawn() {
        let now = Instant::now();
        let mut state = state(&["api", "web"]);
        state.apply("web", &online(None), now);
        for number in 0..1000 {
            let uri = format!("/{number}/{}", "long".repeat(200));
            state.apply("api", &request(&uri, Ok(StatusCode::NOT_FOUND)), now);
            state.log(format!("line {number}"));
        }
        for (width, height) in [(1, 1), (20, 5), (40, 10), (80, 24), (300, 100)] {
            drawn(&state, width, height, now);
            state.toggle_qr_code();
            state.select_next();
            drawn(&state, width, height, now);
            state.hide_qr_code();
        }
        let text = drawn(&state, 80, 24, now).join("\n");
        assert!(
            text.contains("line 999") && !text.contains("line 9\n"),
            "{text}"
        );
        assert!(text.contains("up/down select"), "{text}");
    }

    #[test]
    fn the_qr_code_is_dark_on_light_and_names_its_address() {
        let now = Instant::now();
        let mut state = state(&["http"]);
        state.apply("http", &online(None), now);
        state.toggle_qr_code();
        let lines = drawn(&state, 80, 40, now);
        assert!(lines[0].contains("http://127.0.0.1:8080/my-app"));
        assert!(lines.iter().filter(|line| line.contains('█')).count() > 10);
    }

    #[test]
    fn the_rate_counts_the_last_whole_seconds_only() {
        let mut state = state(&["http"]);
        let now = Instant::now();
        for _ in 0..50 {
            state.apply("http", &request("/", Ok(StatusCode::OK)), now);
        }
        let rate_after = |seconds| state.rate(now + Duration::from_secs(seconds));
        assert!((rate_after(10) - 5.0).abs() < 0.01, "{}", rate_after(10));
        assert!(rate_after(12) < 0.01, "{}", rate_after(12));
    }

    #[test]
    fn foreign_text_cannot_control_the_terminal() {
        let now = Instant::now();
        let mut state = state(&["http"]);
        let uri = "/a\u{1b}[2J\u{202e}b";
        state.apply("http", &request(uri, Err("x\r\ny\u{9b}".to_owned())), now);
        let text = drawn(&state, 80, 20, now).join("");
        assert!(text.contains("/a?[2J?b (x??y?)"), "{text}");
    }
}
