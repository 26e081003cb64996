//! The figures of `/metrics`. What each request touches is atomic, and takes no lock unless each tunnel is counted for itself.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use http::StatusCode;
use tunnel_protocol::id::TunnelId;

use super::exposition::{Histogram, Kind, Page};

/// Bounds of the times to a response's head, in seconds.
const HEAD_BOUNDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];
/// Bounds of the times that the tables take, in seconds.
const TABLE_BOUNDS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1, 1.0,
];
/// What the tables are asked for, as DynamoDB calls it.
const OPERATIONS: [&str; 9] = [
    "GetItem",
    "BatchGetItem",
    "PutItem",
    "UpdateItem",
    "DeleteItem",
    "Query",
    "Scan",
    "TransactWriteItems",
    OTHER,
];
/// The codes of docs/errors.md that visitors get.
const VISITOR_CODES: [&str; 19] = [
    "tunnel_not_found",
    "unauthorized",
    "tunnel_offline",
    "visitor_unauthorized",
    "visitor_forbidden",
    "rate_limited",
    "agent_lost",
    "agent_busy",
    "local_unreachable",
    "local_timeout",
    "invalid_reply",
    "too_large",
    "bad_request",
    "foreign_host",
    "head_too_large",
    "unsupported_encoding",
    "no_upgrade",
    "internal_error",
    OTHER,
];
/// Why agents' handshakes are refused.
pub(crate) const HANDSHAKE_CODES: [&str; 9] = [
    "unauthorized",
    "invalid_tunnel_id",
    "too_many_tunnel_ids",
    "name_taken",
    "too_many_agents",
    "not_websocket",
    "web_page",
    "several_credentials",
    "internal_error",
];
/// How agents' connections end.
const ENDS: [&str; 6] = [
    "by_agent",
    "by_service",
    "going_away",
    "too_long",
    "malformed",
    "lost",
];
/// Classes of statuses, by their first digit.
const STATUSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];
/// A label for what has none of its own.
const OTHER: &str = "other";
/// Most tunnels that are counted for themselves; more are counted together.
const MAX_COUNTED_TUNNELS: usize = 10_000;

/// How a request ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Outcome {
    /// The visitor left before the response's end.
    VisitorLeft,
    /// The response of the local service, or a page of the service's own, was handed over whole.
    Ok,
    /// The service refused the request: a status of 4xx with a code.
    Refused,
    /// The tunnel failed: a status of 5xx with a code.
    Failed,
    /// The response broke off after its head.
    BrokeOff,
}

impl Outcome {
    /// All of them, by their number.
    pub(crate) const ALL: [Self; 5] = [
        Self::VisitorLeft,
        Self::Ok,
        Self::Refused,
        Self::Failed,
        Self::BrokeOff,
    ];

    /// Its name in metrics and access logs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::VisitorLeft => "visitor_left",
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::BrokeOff => "broke_off",
        }
    }
}

/// A counter for each of some labels.
#[derive(Debug)]
struct Counts<const N: usize>(&'static [&'static str; N], [AtomicU64; N]);

impl<const N: usize> Counts<N> {
    fn new(labels: &'static [&'static str; N]) -> Self {
        Self(labels, std::array::from_fn(|_| AtomicU64::new(0)))
    }

    /// Counts one more of a label; the last one is for those that are not listed.
    fn add(&self, label: &str) {
        let at = self.0.iter().position(|known| *known == label);
        self.1[at.unwrap_or(N - 1)].fetch_add(1, Relaxed);
    }

    fn write(&self, page: &mut Page, name: &str, label: &str) {
        for (text, count) in self.0.iter().zip(&self.1) {
            page.sample(name, &[(label, text)], count.load(Relaxed));
        }
    }
}

/// The counters.
#[derive(Debug)]
pub(crate) struct Metrics {
    started_at: Duration,
    requests: [[AtomicU64; STATUSES.len()]; Outcome::ALL.len()],
    codes: Counts<{ VISITOR_CODES.len() }>,
    head: Histogram,
    in_progress: AtomicU64,
    request_bytes: AtomicU64,
    response_bytes: AtomicU64,
    upgraded: AtomicU64,
    upgraded_open: AtomicU64,
    open_connections: AtomicU64,
    agent_connections: AtomicU64,
    agent_reconnections: AtomicU64,
    agent_ends: Counts<{ ENDS.len() }>,
    handshakes: Counts<{ HANDSHAKE_CODES.len() }>,
    tables: [Histogram; OPERATIONS.len()],
    table_errors: AtomicU64,
    tunnels: Option<Mutex<BTreeMap<String, TunnelCounts>>>,
}

/// What is counted of one tunnel.
#[derive(Clone, Copy, Debug, Default)]
struct TunnelCounts {
    requests: [u64; STATUSES.len()],
    request_bytes: u64,
    response_bytes: u64,
}

/// What is read when the page is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Readings {
    pub(crate) max_connections: usize,
    pub(crate) agents: usize,
    pub(crate) held_body_bytes: usize,
    pub(crate) max_body_bytes: usize,
    pub(crate) lost_lines: u64,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended<'v> {
    pub(crate) outcome: Outcome,
    pub(crate) status: Option<StatusCode>,
    pub(crate) tunnel: Option<&'v TunnelId>,
    pub(crate) request_bytes: u64,
    pub(crate) response_bytes: u64,
}

impl Metrics {
    /// Nothing has happened yet.
    pub(crate) fn new(per_tunnel: bool) -> Self {
        Self {
            started_at: tunnel_service::now(),
            requests: Default::default(),
            codes: Counts::new(&VISITOR_CODES),
            head: Histogram::new(HEAD_BOUNDS),
            in_progress: AtomicU64::default(),
            request_bytes: AtomicU64::default(),
            response_bytes: AtomicU64::default(),
            upgraded: AtomicU64::default(),
            upgraded_open: AtomicU64::default(),
            open_connections: AtomicU64::default(),
            agent_connections: AtomicU64::default(),
            agent_reconnections: AtomicU64::default(),
            agent_ends: Counts::new(&ENDS),
            handshakes: Counts::new(&HANDSHAKE_CODES),
            tables: std::array::from_fn(|_| Histogram::new(TABLE_BOUNDS)),
            table_errors: AtomicU64::default(),
            tunnels: per_tunnel.then(Mutex::default),
        }
    }

    /// A request has begun.
    pub(crate) fn begun(&self) {
        self.in_progress.fetch_add(1, Relaxed);
    }

    /// A response's head was ready after this long.
    pub(crate) fn answered(&self, after: Duration, code: Option<&str>) {
        self.head.observe(after);
        if let Some(code) = code {
            self.codes.add(code);
        }
    }

    /// A part of a request's body has come.
    pub(crate) fn received(&self, bytes: u64) {
        self.request_bytes.fetch_add(bytes, Relaxed);
    }

    /// A part of a response's body has gone.
    pub(crate) fn sent(&self, bytes: u64) {
        self.response_bytes.fetch_add(bytes, Relaxed);
    }

    /// A request has ended.
    pub(crate) fn ended(&self, ended: Ended<'_>) {
        self.in_progress.fetch_sub(1, Relaxed);
        let class = class(ended.status);
        self.requests[ended.outcome as usize][class].fetch_add(1, Relaxed);
        if let (Some(tunnels), Some(id)) = (&self.tunnels, ended.tunnel) {
            let mut tunnels = lock(tunnels);
            let is_full =
                tunnels.len() >= MAX_COUNTED_TUNNELS && !tunnels.contains_key(id.as_str());
            let label = if is_full { OTHER } else { id.as_str() };
            let counts = tunnels.entry(label.to_owned()).or_default();
            counts.requests[class] += 1;
            counts.request_bytes += ended.request_bytes;
            counts.response_bytes += ended.response_bytes;
        }
    }

    /// A connection was upgraded.
    pub(crate) fn upgraded(&self) {
        self.upgraded.fetch_add(1, Relaxed);
        self.upgraded_open.fetch_add(1, Relaxed);
    }

    /// An upgraded connection has ended.
    pub(crate) fn upgraded_ended(&self) {
        self.upgraded_open.fetch_sub(1, Relaxed);
    }

    /// A connection was accepted, a visitor's or an agent's.
    pub(crate) fn connection_opened(&self) {
        self.open_connections.fetch_add(1, Relaxed);
    }

    /// A connection has ended.
    pub(crate) fn connection_closed(&self) {
        self.open_connections.fetch_sub(1, Relaxed);
    }

    /// An agent has connected, for a tunnel that is new or has had one before.
    pub(crate) fn agent_connected(&self, is_new: bool) {
        self.agent_connections.fetch_add(1, Relaxed);
        if !is_new {
            self.agent_reconnections.fetch_add(1, Relaxed);
        }
    }

    /// An agent's connection has ended.
    pub(crate) fn agent_left(&self, how: &str) {
        self.agent_ends.add(how);
    }

    /// An agent's handshake is refused.
    pub(crate) fn refused(&self, code: &str) {
        self.handshakes.add(code);
    }

    /// The tables have answered.
    pub(crate) fn table(&self, operation: &str, took: Duration, has_failed: bool) {
        let at = OPERATIONS.iter().position(|known| *known == operation);
        self.tables[at.unwrap_or(OPERATIONS.len() - 1)].observe(took);
        if has_failed {
            self.table_errors.fetch_add(1, Relaxed);
        }
    }

    /// The page.
    pub(crate) fn page(&self, readings: Readings) -> String {
        let mut page = Page::default();
        self.write_process(&mut page);
        self.write_requests(&mut page);
        self.write_traffic(&mut page);
        self.write_connections(&mut page, readings);
        self.write_agents(&mut page, readings);
        self.write_tables(&mut page, readings);
        let name = "tunnel_access_log_lost_lines_total";
        let help = "Lines of the access log that could not be written, or not fast enough.";
        page.single(name, Kind::Counter, help, readings.lost_lines);
        self.write_tunnels(&mut page);
        page.into_text()
    }

    fn write_process(&self, page: &mut Page) {
        let name = "tunnel_build_info";
        page.family(name, Kind::Gauge, "The version of tunnel-local.");
        page.sample(name, &[("version", env!("CARGO_PKG_VERSION"))], 1);
        let help = "When the server started, in seconds since 1970.";
        page.single(
            "tunnel_start_time_seconds",
            Kind::Gauge,
            help,
            self.started_at.as_secs(),
        );
    }

    fn write_requests(&self, page: &mut Page) {
        let name = "tunnel_requests_total";
        let help =
            "Requests of visitors that have ended, by how, and by the class of their status.";
        page.family(name, Kind::Counter, help);
        for (outcome, by_status) in Outcome::ALL.iter().zip(&self.requests) {
            for (status, count) in STATUSES.iter().zip(by_status) {
                let labels = [("outcome", outcome.name()), ("status", *status)];
                page.sample(name, &labels, count.load(Relaxed));
            }
        }
        let name = "tunnel_request_errors_total";
        let help = "Requests that the service answered with a code of docs/errors.md.";
        page.family(name, Kind::Counter, help);
        self.codes.write(page, name, "code");
        let name = "tunnel_request_head_seconds";
        let help = "Time from a request's head to its response's.";
        page.family(name, Kind::Histogram, help);
        page.histogram(name, &[], &self.head);
    }

    fn write_traffic(&self, page: &mut Page) {
        for (name, kind, help, value) in [
            (
                "tunnel_requests_in_progress",
                Kind::Gauge,
                "Requests that have not ended, upgraded connections included.",
                &self.in_progress,
            ),
            (
                "tunnel_request_body_bytes_total",
                Kind::Counter,
                "Bytes of bodies, and of upgraded connections, that came from visitors.",
                &self.request_bytes,
            ),
            (
                "tunnel_response_body_bytes_total",
                Kind::Counter,
                "Bytes of bodies, and of upgraded connections, that went to visitors.",
                &self.response_bytes,
            ),
            (
                "tunnel_upgraded_connections_total",
                Kind::Counter,
                "Connections that were upgraded, such as WebSockets.",
                &self.upgraded,
            ),
            (
                "tunnel_upgraded_connections",
                Kind::Gauge,
                "Upgraded connections that are open.",
                &self.upgraded_open,
            ),
        ] {
            page.single(name, kind, help, value.load(Relaxed));
        }
    }

    fn write_connections(&self, page: &mut Page, readings: Readings) {
        page.single(
            "tunnel_open_connections",
            Kind::Gauge,
            "Connections of visitors and agents that are open.",
            self.open_connections.load(Relaxed),
        );
        page.single(
            "tunnel_open_connections_max",
            Kind::Gauge,
            "Most that may be open; more wait to be accepted.",
            readings.max_connections,
        );
    }

    fn write_agents(&self, page: &mut Page, readings: Readings) {
        page.single(
            "tunnel_agents",
            Kind::Gauge,
            "Agents' connections that are open.",
            readings.agents,
        );
        for (name, help, value) in [
            (
                "tunnel_agent_connections_total",
                "Agents' connections that were accepted.",
                &self.agent_connections,
            ),
            (
                "tunnel_agent_reconnections_total",
                "Of those, the ones of tunnels that had had an agent before, since the server started.",
                &self.agent_reconnections,
            ),
        ] {
            page.single(name, Kind::Counter, help, value.load(Relaxed));
        }
        let name = "tunnel_agent_disconnections_total";
        page.family(
            name,
            Kind::Counter,
            "Agents' connections that have ended, by how.",
        );
        self.agent_ends.write(page, name, "reason");
        let name = "tunnel_handshake_refusals_total";
        page.family(
            name,
            Kind::Counter,
            "Agents' handshakes that were refused, by why.",
        );
        self.handshakes.write(page, name, "code");
    }

    fn write_tables(&self, page: &mut Page, readings: Readings) {
        let name = "tunnel_table_operation_seconds";
        page.family(
            name,
            Kind::Histogram,
            "Time that the tables took, by DynamoDB's name of the operation.",
        );
        for (operation, histogram) in OPERATIONS.iter().zip(&self.tables) {
            page.histogram(name, &[("operation", operation)], histogram);
        }
        let help = "Operations of the tables that failed in the engine.";
        page.single(
            "tunnel_table_operation_errors_total",
            Kind::Counter,
            help,
            self.table_errors.load(Relaxed),
        );
        let help = "Bytes of responses that wait for slow visitors or for missing parts.";
        page.single(
            "tunnel_held_body_bytes",
            Kind::Gauge,
            help,
            readings.held_body_bytes,
        );
        let help = "Most bytes that may wait so.";
        page.single(
            "tunnel_held_body_bytes_max",
            Kind::Gauge,
            help,
            readings.max_body_bytes,
        );
    }

    fn write_tunnels(&self, page: &mut Page) {
        let Some(tunnels) = &self.tunnels else {
            return;
        };
        let tunnels = lock(tunnels).clone();
        let name = "tunnel_tunnel_requests_total";
        page.family(
            name,
            Kind::Counter,
            "Requests that have ended, by tunnel and class of status.",
        );
        for (tunnel, counts) in &tunnels {
            for (status, count) in STATUSES.iter().zip(counts.requests) {
                if count > 0 {
                    page.sample(name, &[("tunnel", tunnel), ("status", status)], count);
                }
            }
        }
        let name = "tunnel_tunnel_request_body_bytes_total";
        let help = "Bytes that came from visitors in requests that have ended, by tunnel.";
        page.family(name, Kind::Counter, help);
        for (tunnel, counts) in &tunnels {
            page.sample(name, &[("tunnel", tunnel)], counts.request_bytes);
        }
        let name = "tunnel_tunnel_response_body_bytes_total";
        let help = "Bytes that went to visitors in requests that have ended, by tunnel.";
        page.family(name, Kind::Counter, help);
        for (tunnel, counts) in &tunnels {
            page.sample(name, &[("tunnel", tunnel)], counts.response_bytes);
        }
    }
}

fn class(status: Option<StatusCode>) -> usize {
    status.map_or(0, |status| {
        usize::from(status.as_u16() / 100).min(STATUSES.len() - 1)
    })
}

/// Held between awaits only.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_code_that_visitors_get_is_counted_under_its_own_name() {
        let documented = include_str!("../../../docs/errors.md");
        let (_, table) = documented.split_once("| code | status |").expect("a table");
        let (table, _) = table.split_once("\n\n").expect("its end");
        let codes: Vec<&str> = table
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
            .collect();
        assert_eq!(codes, VISITOR_CODES[..VISITOR_CODES.len() - 1]);
    }

    #[test]
    fn outcomes_are_counted_by_their_number() {
        for (at, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, at);
        }
    }

    /// The names of metrics in a text.
    fn names(text: &str) -> BTreeSet<&str> {
        text.split(|c: char| !c.is_ascii_lowercase() && c != '_')
            .filter(|word| word.starts_with("tunnel_") && word.len() > "tunnel_".len())
            .map(|name| {
                let of_histogram = name.strip_suffix("_bucket").or(name.strip_suffix("_count"));
                of_histogram.unwrap_or(name)
            })
            .collect()
    }

    #[test]
    fn the_documentation_has_every_metric_and_rules_and_dashboard_only_those() {
        let page = Metrics::new(true).page(Readings {
            max_connections: 0,
            agents: 0,
            held_body_bytes: 0,
            max_body_bytes: 0,
            lost_lines: 0,
        });
        let families: BTreeSet<&str> = page
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
            .collect();
        assert!(families.len() > 20, "{families:?}");
        let documented = names(include_str!("../../../docs/metrics.md"));
        assert_eq!(documented, families);
        for text in [
            include_str!("../../../packaging/alerts.yml"),
            include_str!("../../../packaging/grafana-dashboard.json"),
        ] {
            let unknown: Vec<_> = names(text).difference(&families).copied().collect();
            assert!(unknown.is_empty(), "{unknown:?}");
        }
    }
}
