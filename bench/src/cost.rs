//! The cost model: prices, what a request uses, and the tables of docs/cost.md.

use forwarder::session::{PING_MESSAGE_INTERVAL, SOLE_PING_MESSAGE_INTERVAL};
use tunnel_protocol::{body::room_beside, limits::MAX_PART_BYTES};

use crate::{lambda::MEMORY, meter::Counts, visitors::CALL, websocket::units};

/// List prices of us-east-1 in USD, without free tiers and volume discounts. docs/cost.md gives their sources and date.
pub mod price {
    /// A call of an HTTP API, for each 512 KiB or part of it.
    pub const HTTP_API_CALL: f64 = 1.00e-6;
    /// A message of a WebSocket API, for each 32 KiB or part of it.
    pub const MAX_MESSAGE_BYTES: f64 = 1.00e-6;
    /// A minute of a WebSocket connection.
    pub const CONNECTION_MINUTE: f64 = 0.25e-6;
    /// A call of a function.
    pub const LAMBDA_CALL: f64 = 0.20e-6;
    /// A second of a function with 1 GB, x86_64.
    pub const LAMBDA_GB_SECOND: f64 = 16.6667e-6;
    /// A DynamoDB read unit, on demand.
    pub const READ_UNIT: f64 = 0.125e-6;
    /// A DynamoDB write unit, on demand.
    pub const WRITE_UNIT: f64 = 0.625e-6;
    /// A GB to the internet.
    pub const GB_OUT: f64 = 0.09;
    /// A GB of logs taken in by CloudWatch.
    pub const LOG_GB: f64 = 0.50;
    /// A GB of a streamed response, after its first 6 MB.
    pub const STREAMED_GB: f64 = 0.008;
}

/// What AWS bills for, per request or in total.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Calls of the HTTP API.
    pub http_calls: f64,
    /// Message units of the WebSocket API.
    pub messages: f64,
    /// Calls of functions.
    pub calls: f64,
    /// How long functions ran, in milliseconds.
    pub milliseconds: f64,
    /// DynamoDB read units.
    pub reads: f64,
    /// DynamoDB write units.
    pub writes: f64,
}

impl Usage {
    /// The average of what was counted for `requests` requests.
    pub fn of(counts: &Counts, requests: usize) -> Self {
        let runs = || counts.functions.values().flat_map(|runs| &runs.calls);
        // Lambda bills each invocation, and each start, in whole milliseconds.
        let billed = counts
            .functions
            .values()
            .flat_map(|runs| runs.calls.iter().chain(&runs.starts));
        let each = requests as f64;
        Self {
            http_calls: counts.http_calls as f64 / each,
            messages: counts.units() as f64 / each,
            calls: runs().count() as f64 / each,
            milliseconds: billed
                .map(|took| (took.as_secs_f64() * 1e3).ceil())
                .sum::<f64>()
                / each,
            reads: counts.reads / each,
            writes: counts.writes / each,
        }
    }

    /// The formula: for a request without a body, whose response has a body of `bytes`, of which `sent`
    /// bytes go over the WebSocket connection, to a tunnel that was looked up in the last few seconds.
    pub fn of_response(bytes: usize, sent: usize, forward: f64, default: f64) -> Self {
        let parts = parts_of(sent);
        let (to_service, to_forward): (u64, u64) = parts
            .iter()
            .map(|bytes| (units(encoded(*bytes)), units(encoded(*bytes) + RELAYED)))
            .fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
        Self {
            http_calls: bytes.div_ceil(CALL).max(1) as f64,
            messages: (1 + to_service + to_forward) as f64,
            calls: (1 + parts.len()) as f64,
            milliseconds: forward + parts.len() as f64 * default,
            reads: 0.0,
            writes: 0.0,
        }
    }

    /// The cost in USD.
    pub fn bill(&self) -> Bill {
        let seconds = self.milliseconds / 1e3 * f64::from(MEMORY) / 1024.0;
        Bill {
            http_api: self.http_calls * price::HTTP_API_CALL,
            websocket: self.messages * price::MAX_MESSAGE_BYTES,
            lambda: self.calls * price::LAMBDA_CALL + seconds * price::LAMBDA_GB_SECOND,
            dynamodb: self.reads * price::READ_UNIT + self.writes * price::WRITE_UNIT,
        }
    }
}

/// A cost in USD, by service.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bill {
    /// The HTTP API.
    pub http_api: f64,
    /// The WebSocket API.
    pub websocket: f64,
    /// Lambda.
    pub lambda: f64,
    /// DynamoDB.
    pub dynamodb: f64,
}

impl Bill {
    /// The total.
    pub fn sum(&self) -> f64 {
        self.http_api + self.websocket + self.lambda + self.dynamodb
    }
}

/// Approximate bytes of JSON around the first part of a response body, most of them the header.
const HEAD: usize = 500;
/// Approximate bytes of JSON around a later part.
const PART: usize = 200;
/// Approximate bytes that `default` adds to a message that it passes on.
const RELAYED: usize = 60;

/// The lengths of the parts in which a body is sent.
fn parts_of(bytes: usize) -> Vec<usize> {
    let first = bytes.min(room_beside(HEAD).unwrap_or_default());
    let (full, rest) = (
        (bytes - first) / MAX_PART_BYTES,
        (bytes - first) % MAX_PART_BYTES,
    );
    std::iter::once(first)
        .chain(std::iter::repeat_n(MAX_PART_BYTES, full))
        .chain((rest > 0).then_some(rest))
        .collect()
}

/// The length of the message that carries a part.
fn encoded(bytes: usize) -> usize {
    bytes.div_ceil(3) * 4 + if bytes == MAX_PART_BYTES { PART } else { HEAD }
}

/// A row of the table in docs/cost.md.
pub struct Example {
    /// What the body is, as shown in the table.
    pub name: &'static str,
    /// Its length.
    pub bytes: usize,
    /// How many of its bytes go over the WebSocket connection.
    pub sent: usize,
    /// How long `forward` runs, in milliseconds, according to docs/performance.md.
    pub forward: f64,
}

/// How long `default` runs for each message, in milliseconds, according to docs/performance.md.
pub const DEFAULT: f64 = 15.0;

/// The rows of the table.
pub const EXAMPLES: [Example; 5] = [
    Example {
        name: "1 KiB",
        bytes: 1024,
        sent: 1024,
        forward: 45.0,
    },
    Example {
        name: "32 KiB",
        bytes: 32 * 1024,
        sent: 32 * 1024,
        forward: 50.0,
    },
    Example {
        name: "100 KiB",
        bytes: 100 * 1024,
        sent: 100 * 1024,
        forward: 50.0,
    },
    Example {
        name: "100 KiB of JSON",
        bytes: 100 * 1024,
        sent: 20 * 1024,
        forward: 50.0,
    },
    Example {
        name: "1 MiB",
        bytes: 1024 * 1024,
        sent: 1024 * 1024,
        forward: 80.0,
    },
];

const MILLION: f64 = 1e6;

/// The first table of docs/cost.md: what a million requests cost.
pub fn table() -> String {
    let mut table = String::from(
        "| response body | messages | calls | HTTP API | WebSocket | Lambda | sum | traffic out |\n|---|---|---|---|---|---|---|---|\n",
    );
    for Example {
        name,
        bytes,
        sent,
        forward,
    } in EXAMPLES
    {
        let usage = Usage::of_response(bytes, sent, forward, DEFAULT);
        let bill = usage.bill();
        let out = bytes as f64 / 1e9 * price::GB_OUT * MILLION;
        let [http, websocket, lambda, sum] =
            [bill.http_api, bill.websocket, bill.lambda, bill.sum()].map(|usd| usd * MILLION);
        table += &format!(
            "| {name} | {} | {} | {http:.2} | {websocket:.2} | {lambda:.2} | **{sum:.2}** | {out:.2} |\n",
            usage.messages, usage.calls
        );
    }
    table
}

/// Bytes of logs for a request: `forward`'s line of figures, and what CloudWatch adds to each event ("Amazon CloudWatch Logs
/// concepts" in its user guide).
const LOGGED: f64 = 657.0 + 26.0;

/// Use of a tunnel for a month of 30 days.
pub struct Scenario {
    /// Requests a day, each with a response of 1 KiB.
    pub requests_a_day: f64,
    /// Hours a day for which the agent is connected.
    pub hours_a_day: f64,
}

/// The rows of the table of monthly bills.
pub const SCENARIOS: [Scenario; 2] = [
    Scenario {
        requests_a_day: 100.0,
        hours_a_day: 2.0,
    },
    Scenario {
        requests_a_day: 10_000.0,
        hours_a_day: 24.0,
    },
];

/// The third table: what a month costs, with an agent whose ping frames are not answered, which is the dearer kind.
pub fn scenarios_table() -> String {
    let mut table = String::from(
        "| requests a day | agent, hours a day | requests | agent | logs | traffic out | sum |\n|---|---|---|---|---|---|---|\n",
    );
    for Scenario {
        requests_a_day,
        hours_a_day,
    } in SCENARIOS
    {
        let requests = 30.0 * requests_a_day;
        let small = &EXAMPLES[0];
        let each = Usage::of_response(small.bytes, small.sent, small.forward, DEFAULT).bill();
        let seconds = 30.0 * hours_a_day * 3600.0;
        let agent = idle(seconds, SOLE_PING_MESSAGE_INTERVAL.as_secs_f64()).sum()
            + seconds / 60.0 * price::CONNECTION_MINUTE;
        let logs = requests * LOGGED / 1e9 * price::LOG_GB;
        let out = requests * small.bytes as f64 / 1e9 * price::GB_OUT;
        let requests = requests * each.sum();
        table += &format!(
            "| {requests_a_day} | {hours_a_day} | {requests:.2} | {agent:.2} | {logs:.2} | {out:.2} | **{:.2}** |\n",
            requests + agent + logs + out
        );
    }
    table
}

/// What the messages of an agent without visitors cost.
fn idle(seconds: f64, ping_interval: f64) -> Bill {
    let pings = seconds / ping_interval;
    // Each is answered with a `pong`.
    Usage {
        messages: 2.0 * pings,
        calls: pings,
        milliseconds: pings * DEFAULT,
        ..Usage::default()
    }
    .bill()
}

/// The second table: what an agent without visitors costs in 30 days.
pub fn idle_table() -> String {
    let seconds = 30.0 * 24.0 * 3600.0;
    let minutes = seconds / 60.0 * price::CONNECTION_MINUTE;
    let mut table = String::from(
        "| ping frames are | a `ping` every | messages | WebSocket | Lambda | connection | sum |\n|---|---|---|---|---|---|---|\n",
    );
    for (are, every) in [
        ("answered", PING_MESSAGE_INTERVAL),
        ("not answered", SOLE_PING_MESSAGE_INTERVAL),
    ] {
        let pings = seconds / every.as_secs_f64();
        let bill = idle(seconds, every.as_secs_f64());
        table += &format!(
            "| {are} | {} s | {} | {:.2} | {:.2} | {minutes:.2} | **{:.2}** |\n",
            every.as_secs(),
            2.0 * pings,
            bill.websocket,
            bill.lambda,
            bill.sum() + minutes
        );
    }
    table
}
