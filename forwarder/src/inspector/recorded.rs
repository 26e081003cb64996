//! One exchange as the inspector keeps it: what was sent and received, as far as it is kept, and when.

use std::{
    borrow::Cow,
    fmt,
    num::ParseIntError,
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::StatusCode;
use serde::{Serialize, Serializer};

use tunnel_protocol::headers::{FORWARDED_FOR, value_to_text};

use super::{packed_fields::PackedFields, websocket::Conversation};

/// What an exchange costs beside its bodies and headers, roughly.
const RECORD_BYTES: usize = 1024;
/// Bytes are added to the last piece of a body as long as it is no longer than this with them.
const MAX_PIECE_BYTES: usize = 64 * 1024;
/// Methods of which no copy is kept.
const METHODS: [&str; 9] = [
    "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH",
];

/// Identifies a recorded exchange. Later exchanges have greater numbers, also over restarts, and scripts in a browser can count so far.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct ExchangeId(pub(crate) u64);

impl ExchangeId {
    /// The first id of a process that starts now.
    pub(crate) fn first(now: SystemTime) -> Self {
        let millis = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis();
        // 12 bits: a process would have to record four million exchanges a second to reach the ids of its next start.
        Self(u64::try_from(millis).unwrap_or_default() << 12)
    }

    pub(crate) fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for ExchangeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl FromStr for ExchangeId {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        u64::from_str_radix(text, 16).map(Self)
    }
}

impl Serialize for ExchangeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// How far an exchange is, or how it ended.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) enum State {
    /// It is going on.
    #[default]
    Open,
    /// The response was delivered to its end.
    Complete,
    /// There is no response, or only a part of one, for this reason.
    Failed(String),
    /// The agent did not pass the request on, for this reason.
    Refused(String),
    /// It was ended before its end, for this reason.
    Cancelled(String),
}

impl State {
    /// The state in one word, as in the API.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Complete => "complete",
            Self::Failed(_) => "failed",
            Self::Refused(_) => "refused",
            Self::Cancelled(_) => "cancelled",
        }
    }

    /// Why there is no whole response.
    pub(crate) fn reason(&self) -> Option<&str> {
        match self {
            Self::Open | Self::Complete => None,
            Self::Failed(reason) | Self::Refused(reason) | Self::Cancelled(reason) => Some(reason),
        }
    }
}

/// A body, of which the first bytes are kept.
#[derive(Clone, Debug, Default)]
pub(crate) struct RecordedBody {
    /// The first piece of what is kept, which most bodies do not outgrow.
    first: Vec<u8>,
    /// The pieces behind it: one that grew with a long body would be copied each time it outgrows its room.
    more: Vec<Vec<u8>>,
    /// How much is kept.
    kept_bytes: usize,
    /// How long it is so far.
    pub bytes: u64,
}

impl RecordedBody {
    /// A body of so many bytes, of which these are kept.
    pub(crate) fn of(kept: Vec<u8>, bytes: u64) -> Self {
        Self {
            kept_bytes: kept.len(),
            first: kept,
            more: Vec::new(),
            bytes,
        }
    }

    /// Counts bytes, and keeps them as far as `limit` allows. Returns how many it has kept.
    pub(crate) fn push(&mut self, bytes: &[u8], limit: usize) -> usize {
        self.bytes += bytes.len() as u64;
        let kept = bytes.len().min(limit.saturating_sub(self.kept_bytes));
        let bytes = &bytes[..kept];
        let last = self.more.last_mut().unwrap_or(&mut self.first);
        if last.is_empty() || last.len() + kept <= MAX_PIECE_BYTES {
            last.extend_from_slice(bytes);
        } else if kept > 0 {
            self.more.push(bytes.to_vec());
        }
        self.kept_bytes += kept;
        kept
    }

    /// What is kept of it.
    pub(crate) fn kept(&self) -> Cow<'_, [u8]> {
        if self.more.is_empty() {
            return Cow::Borrowed(&self.first);
        }
        let mut kept = Vec::with_capacity(self.kept_bytes);
        kept.extend_from_slice(&self.first);
        for piece in &self.more {
            kept.extend_from_slice(piece);
        }
        Cow::Owned(kept)
    }

    /// How much is kept of it.
    pub(crate) fn kept_bytes(&self) -> usize {
        self.kept_bytes
    }

    /// Whether the end is missing.
    pub(crate) fn is_cut(&self) -> bool {
        (self.kept_bytes as u64) < self.bytes
    }
}

/// The request of an exchange, as the visitor sent it.
#[derive(Clone, Debug, Default)]
pub(crate) struct RecordedRequest {
    pub method: Cow<'static, str>,
    /// Path and query.
    pub uri: Box<str>,
    pub headers: PackedFields,
    pub body: RecordedBody,
    /// The protocols that the visitor asked to change to.
    pub upgrade: Option<String>,
}

/// The response of an exchange, as the visitor received it.
#[derive(Clone, Debug)]
pub(crate) struct RecordedResponse {
    pub status: StatusCode,
    pub headers: PackedFields,
    pub body: RecordedBody,
}

/// When things happened, counted from the request's arrival at the agent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Timings {
    /// How long the request took from the service to the agent, by the clocks of both.
    pub transit: Option<Duration>,
    /// Until the request had been passed on to its end.
    pub sent: Option<Duration>,
    /// Until the head of the response.
    pub head: Option<Duration>,
    /// Until the end.
    pub end: Option<Duration>,
}

/// What an exchange was made from, if it is no visitor's.
#[derive(Clone, Debug)]
pub(crate) struct ReplaySource {
    /// The exchange that was replayed.
    pub of: ExchangeId,
    /// Something was changed.
    pub edited: bool,
    /// Where it went, if not to the tunnel's own target.
    pub target: Option<String>,
}

/// An exchange, as far as it is kept.
#[derive(Clone, Debug)]
pub(crate) struct RecordedExchange {
    pub id: ExchangeId,
    /// The name of the tunnel.
    pub tunnel: Arc<str>,
    /// When the request arrived at the agent.
    pub started: SystemTime,
    pub request: RecordedRequest,
    pub response: Option<RecordedResponse>,
    pub timings: Timings,
    pub state: State,
    pub replay: Option<ReplaySource>,
    /// What was said over an upgraded connection.
    pub conversation: Option<Box<Conversation>>,
    /// Secrets of its headers are masked in what is kept, so that it cannot be replayed with them.
    pub is_masked: bool,
}

impl RecordedExchange {
    /// What it costs in memory without its bodies, roughly.
    pub(crate) fn base_bytes(&self) -> usize {
        RECORD_BYTES + self.request.uri.len() + self.request.headers.bytes()
    }

    /// The visitor's address: the last one in the list, which the service itself has added.
    pub(crate) fn visitor(&self) -> Option<String> {
        let value = self.request.headers.last(&FORWARDED_FOR)?;
        let text = value_to_text(&value);
        let last = text.rsplit(',').next()?.trim();
        (!last.is_empty()).then(|| last.to_owned())
    }
}

/// The name of a method as it is kept.
pub(crate) fn method(name: &str) -> Cow<'static, str> {
    match METHODS.into_iter().find(|known| *known == name) {
        Some(known) => known.into(),
        None => name.to_owned().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_of_a_body_are_kept_in_order_whatever_it_comes_in() {
        const LIMIT: usize = 1_000_000;
        let body: Vec<u8> = (0..=250).cycle().take(LIMIT + 200_000).collect();
        for piece in [
            1,
            7,
            1000,
            MAX_PIECE_BYTES,
            MAX_PIECE_BYTES + 1,
            300_000,
            body.len(),
        ] {
            let mut recorded = RecordedBody::default();
            let mut kept = 0;
            for bytes in body.chunks(piece) {
                kept += recorded.push(bytes, LIMIT);
                recorded.push(&[], LIMIT);
                assert_eq!(recorded.kept_bytes(), kept);
            }
            assert_eq!(kept, LIMIT, "pieces of {piece}");
            assert!(*recorded.kept() == body[..LIMIT], "pieces of {piece}");
            assert!(recorded.is_cut());
            assert_eq!(recorded.bytes, body.len() as u64);
        }
    }
}
