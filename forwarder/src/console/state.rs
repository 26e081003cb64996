//! What the console shows.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use http::{Method, StatusCode};

use crate::{display, durations::Durations, event::Event};

/// Requests that are remembered; taller terminals are rare.
const MAX_REQUESTS: usize = 200;
/// Lines of the log that are remembered.
const MAX_LOG_LINES: usize = 100;
/// How long a notice is shown.
const NOTICE_TIME: Duration = Duration::from_secs(4);
/// Over how many seconds the rate is an average.
const RATE_SECONDS: usize = 10;

/// All of it. Texts of others are made safe for a terminal when they come in.
#[derive(Debug)]
pub(super) struct State {
    started: Instant,
    tunnels: Vec<TunnelState>,
    selected: usize,
    requests: VecDeque<RequestLine>,
    counts: Counts,
    rate: Rate,
    durations: Durations,
    log: VecDeque<String>,
    inspector_url: Option<String>,
    notice: Option<(Instant, String)>,
    shows_qr_code: bool,
    draining: Option<usize>,
}

/// One tunnel.
#[derive(Debug)]
pub(super) struct TunnelState {
    pub(super) name: String,
    pub(super) status: Status,
    /// The addresses, once known. They stay while the tunnel is offline.
    pub(super) urls: Option<Urls>,
    /// How long the service took to answer the last ping of the connection.
    pub(super) round_trip: Option<Duration>,
    /// Visitors' connections that have changed their protocol and are open.
    pub(super) sockets: usize,
}

#[derive(Debug)]
pub(super) struct Urls {
    pub(super) public: String,
    pub(super) browser: Option<String>,
    pub(super) target: String,
}

/// The state of a tunnel's connection.
#[derive(Debug)]
pub(super) enum Status {
    Connecting,
    Online {
        since: Instant,
    },
    /// All tries since the connection was lost are one line: the last reason, and when the next try comes.
    Offline {
        reason: String,
        next_try: Instant,
        attempt: u32,
    },
}

/// A request that has ended.
#[derive(Debug)]
pub(super) struct RequestLine {
    pub(super) ended: Instant,
    pub(super) tunnel: String,
    pub(super) method: Method,
    pub(super) uri: String,
    pub(super) outcome: Result<StatusCode, String>,
    pub(super) bytes: u64,
    pub(super) took: Duration,
}

/// Requests by outcome.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// By class of status, from 1xx to 5xx.
    pub(super) by_class: [u64; 5],
    /// Those without a status.
    pub(super) failed: u64,
}

impl Counts {
    pub(super) fn total(&self) -> u64 {
        self.by_class.iter().sum::<u64>() + self.failed
    }

    fn add(&mut self, outcome: &Result<StatusCode, String>) {
        let class = outcome
            .as_ref()
            .ok()
            .and_then(|status| usize::from(status.as_u16() / 100).checked_sub(1));
        match class.and_then(|class| self.by_class.get_mut(class)) {
            Some(count) => *count += 1,
            None => self.failed += 1,
        }
    }
}

/// Requests in each of the last seconds.
#[derive(Debug)]
struct Rate {
    /// The second of the newest slot, counted from the start.
    second: u64,
    /// One more than are averaged: the newest is not over yet.
    slots: [u64; RATE_SECONDS + 1],
}

impl Rate {
    fn advance(&mut self, second: u64) {
        for passed in (self.second + 1..=second).rev().take(self.slots.len()) {
            self.slots[slot(passed)] = 0;
        }
        self.second = self.second.max(second);
    }

    /// Requests a second, over the last whole seconds.
    fn at(&self, second: u64) -> f64 {
        let oldest = second.saturating_sub(RATE_SECONDS as u64);
        let sum: u64 = (oldest..second)
            // What is newer than the newest slot has no requests; what is older has been overwritten.
            .filter(|second| *second <= self.second && self.second - second <= RATE_SECONDS as u64)
            .map(|second| self.slots[slot(second)])
            .sum();
        let seconds = (second - oldest).max(1);
        sum as f64 / seconds as f64
    }
}

fn slot(second: u64) -> usize {
    usize::try_from(second % (RATE_SECONDS as u64 + 1)).unwrap_or_default()
}

impl State {
    pub(super) fn new(tunnels: impl Iterator<Item = String>) -> Self {
        Self {
            started: Instant::now(),
            tunnels: tunnels
                .map(|name| TunnelState {
                    name,
                    status: Status::Connecting,
                    urls: None,
                    round_trip: None,
                    sockets: 0,
                })
                .collect(),
            selected: 0,
            requests: VecDeque::new(),
            counts: Counts::default(),
            rate: Rate {
                second: 0,
                slots: [0; RATE_SECONDS + 1],
            },
            durations: Durations::default(),
            log: VecDeque::new(),
            inspector_url: None,
            notice: None,
            shows_qr_code: false,
            draining: None,
        }
    }

    /// Notes what happened to a tunnel.
    pub(super) fn apply(&mut self, tunnel: &str, event: &Event, now: Instant) {
        match event {
            Event::Draining { in_flight } => self.draining = Some(*in_flight),
            Event::Request {
                method,
                uri,
                outcome,
                bytes,
                took,
                ..
            } => self.add_request(RequestLine {
                ended: now,
                tunnel: tunnel.to_owned(),
                method: method.clone(),
                uri: display::clean(uri).into_owned(),
                outcome: outcome
                    .as_ref()
                    .copied()
                    .map_err(|text| display::clean(text).into_owned()),
                bytes: *bytes,
                took: *took,
            }),
            Event::Connecting { .. } => {}
            Event::Online {
                public_url,
                browser_url,
                target,
            } => self.change(tunnel, |tunnel| {
                tunnel.urls = Some(Urls {
                    public: display::clean(public_url).into_owned(),
                    browser: browser_url
                        .as_deref()
                        .map(|url| display::clean(url).into_owned()),
                    target: display::clean(target).into_owned(),
                });
                if !matches!(tunnel.status, Status::Online { .. }) {
                    tunnel.status = Status::Online { since: now };
                }
            }),
            Event::Reconnecting {
                reason,
                pause,
                attempt,
            } => self.change(tunnel, |tunnel| {
                tunnel.status = Status::Offline {
                    reason: display::clean(reason).into_owned(),
                    next_try: now + *pause,
                    attempt: *attempt,
                };
                tunnel.round_trip = None;
            }),
            Event::RoundTrip(took) => {
                self.change(tunnel, |tunnel| tunnel.round_trip = Some(*took));
            }
            Event::SocketOpened => self.change(tunnel, |tunnel| tunnel.sockets += 1),
            Event::SocketClosed => self.change(tunnel, |tunnel| {
                tunnel.sockets = tunnel.sockets.saturating_sub(1);
            }),
        }
    }

    fn add_request(&mut self, request: RequestLine) {
        let second = self.second(request.ended);
        self.counts.add(&request.outcome);
        self.rate.advance(second);
        self.rate.slots[slot(self.rate.second)] += 1;
        // How long a socket was open says nothing about how fast requests are answered.
        if request.outcome != Ok(StatusCode::SWITCHING_PROTOCOLS) {
            self.durations.push(request.took);
        }
        push_bounded(&mut self.requests, request, MAX_REQUESTS);
    }

    fn change(&mut self, tunnel: &str, change: impl FnOnce(&mut TunnelState)) {
        if let Some(tunnel) = self.tunnels.iter_mut().find(|known| known.name == tunnel) {
            change(tunnel);
        }
    }

    /// Notes a line of the log, which is safe for a terminal already.
    pub(super) fn log(&mut self, line: String) {
        push_bounded(&mut self.log, line, MAX_LOG_LINES);
    }

    /// Shows a short text for a moment.
    pub(super) fn notify(&mut self, text: String) {
        self.notice = Some((Instant::now(), text));
    }

    pub(super) fn toggle_qr_code(&mut self) {
        self.shows_qr_code = !self.shows_qr_code;
    }

    pub(super) fn hide_qr_code(&mut self) {
        self.shows_qr_code = false;
    }

    pub(super) fn select_next(&mut self) {
        self.selected = (self.selected + 1) % self.tunnels.len().max(1);
    }

    pub(super) fn select_previous(&mut self) {
        let last = self.tunnels.len().saturating_sub(1);
        self.selected = self.selected.checked_sub(1).unwrap_or(last);
    }

    fn selected_urls(&self) -> Option<&Urls> {
        self.tunnels.get(self.selected)?.urls.as_ref()
    }

    /// The public URL of the selected tunnel.
    pub(super) fn public_url(&self) -> Option<&str> {
        self.selected_urls().map(|urls| urls.public.as_str())
    }

    /// The best address of the selected tunnel for a browser.
    pub(super) fn browser_url(&self) -> Option<&str> {
        let urls = self.selected_urls()?;
        Some(urls.browser.as_ref().unwrap_or(&urls.public))
    }

    pub(super) fn set_inspector_url(&mut self, url: String) {
        self.inspector_url = Some(url);
    }

    /// Where the inspector is.
    pub(super) fn inspector_url(&self) -> Option<&str> {
        self.inspector_url.as_deref()
    }

    pub(super) fn tunnels(&self) -> &[TunnelState] {
        &self.tunnels
    }

    pub(super) fn selected(&self) -> usize {
        self.selected
    }

    /// The newest first.
    pub(super) fn requests(&self) -> impl Iterator<Item = &RequestLine> {
        self.requests.iter().rev()
    }

    /// The newest last.
    pub(super) fn log_lines(&self) -> &VecDeque<String> {
        &self.log
    }

    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// Requests a second.
    pub(super) fn rate(&self, now: Instant) -> f64 {
        self.rate.at(self.second(now))
    }

    /// How long the last requests took.
    pub(super) fn durations(&self) -> &Durations {
        &self.durations
    }

    pub(super) fn notice(&self, now: Instant) -> Option<&str> {
        let (at, text) = self.notice.as_ref()?;
        (now.saturating_duration_since(*at) < NOTICE_TIME).then_some(text)
    }

    /// The URL to show as a QR code, if one is wanted.
    pub(super) fn qr_code(&self) -> Option<&str> {
        self.shows_qr_code.then(|| self.public_url()).flatten()
    }

    /// How many requests a stopping agent waits for.
    pub(super) fn draining(&self) -> Option<usize> {
        self.draining
    }

    /// What was served, for the end.
    pub(super) fn summary(&self, now: Instant) -> String {
        let total = self.counts.total();
        let requests = if total == 1 { "request" } else { "requests" };
        let seconds = now.saturating_duration_since(self.started).as_secs();
        let time = humantime::format_duration(Duration::from_secs(seconds));
        format!("{total} {requests} in {time}")
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_secs()
    }
}

fn push_bounded<T>(queue: &mut VecDeque<T>, item: T, most: usize) {
    if queue.len() >= most {
        queue.pop_front();
    }
    queue.push_back(item);
}
