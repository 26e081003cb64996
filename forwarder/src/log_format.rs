//! How lines on stderr look: for people who watch, for people who read later, or for programs. docs/agent.md has the schema.

use std::{fmt, str::FromStr};

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use jiff::{Timestamp, Zoned};
use serde_json::{Map, Value, json};
use tracing_subscriber::fmt::{format::Writer, time::FormatTime};

use crate::{display::clean, event::Event};

/// A format.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum LogFormat {
    /// Without a time, for somebody who watches.
    #[default]
    Plain,
    /// With the local time at the front.
    Text,
    /// An object a line.
    Json,
}

/// A text that is no format.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("a log format is plain, text (with times) or json")]
pub struct LogFormatError;

impl LogFormat {
    /// Reads it from a command line, and tells shells what there is.
    pub(crate) fn parser() -> impl TypedValueParser<Value = Self> {
        let words = [
            PossibleValue::new("plain").aliases(["term", "default"]),
            PossibleValue::new("text").alias("logfmt"),
            PossibleValue::new("json"),
        ];
        PossibleValuesParser::new(words).try_map(|word| word.parse::<Self>())
    }
}

impl FromStr for LogFormat {
    type Err = LogFormatError;

    fn from_str(text: &str) -> Result<Self, LogFormatError> {
        match text {
            "plain" | "term" | "default" => Ok(Self::Plain),
            "text" | "logfmt" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(LogFormatError),
        }
    }
}

/// The local time, at the front of a line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocalTime;

impl LocalTime {
    /// The time now, to the millisecond, with its distance from UTC.
    pub(crate) fn now() -> String {
        Zoned::now()
            .strftime("%Y-%m-%dT%H:%M:%S%.3f%:z")
            .to_string()
    }
}

impl FormatTime for LocalTime {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        writer.write_str(&Self::now())
    }
}

/// What happened to a tunnel, as an object a line; `None` if it is no matter for lines.
pub(crate) fn event_line(tunnel: &str, event: &Event) -> Option<String> {
    let (level, kind, fields) = match event {
        Event::Connecting { endpoint, proxy } => (
            "INFO",
            "connecting",
            json!({ "endpoint": endpoint, "proxy": proxy }),
        ),
        Event::Online {
            public_url,
            browser_url,
            target,
        } => (
            "INFO",
            "online",
            json!({ "public_url": public_url, "browser_url": browser_url, "target": target }),
        ),
        Event::Reconnecting {
            reason,
            pause,
            attempt,
        } => (
            "WARN",
            "offline",
            json!({ "reason": reason, "retry_in_ms": millis(*pause), "attempt": attempt }),
        ),
        Event::Request {
            method,
            uri,
            outcome,
            bytes,
            took,
            visitor,
        } => (
            if outcome.is_ok() { "INFO" } else { "WARN" },
            "request",
            json!({
                "method": method.as_str(),
                "uri": uri,
                "status": outcome.as_ref().ok().map(http::StatusCode::as_u16),
                "error": outcome.as_ref().err(),
                "response_bytes": bytes,
                "duration_ms": millis(*took),
                "visitor": visitor,
            }),
        ),
        Event::Draining { in_flight } => ("INFO", "draining", json!({ "in_flight": in_flight })),
        Event::RoundTrip(_) | Event::SocketOpened | Event::SocketClosed => return None,
    };
    let mut all = json!({ "tunnel": tunnel });
    merge(&mut all, fields);
    Some(line(level, kind, all))
}

/// A line about the process.
pub(crate) fn line(level: &str, kind: &str, fields: Value) -> String {
    let timestamp = format!("{:.3}", Timestamp::now());
    let mut object = json!({ "timestamp": timestamp, "level": level, "event": kind });
    merge(&mut object, fields);
    object.to_string()
}

/// Adds fields whose value is known, with foreign texts made safe.
fn merge(object: &mut Value, fields: Value) {
    let (Some(object), Value::Object(fields)) = (object.as_object_mut(), fields) else {
        return;
    };
    let known: Map<String, Value> = fields
        .into_iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| match value {
            Value::String(text) => (name, clean(&text).into()),
            value => (name, value),
        })
        .collect();
    object.extend(known);
}

fn millis(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::{Method, StatusCode};

    use super::*;

    #[test]
    fn a_request_is_an_object_with_what_is_known_of_it() {
        let request = |outcome| Event::Request {
            method: Method::GET,
            uri: "/a\"?\u{202e}\u{1b}[2J".to_owned(),
            outcome,
            bytes: 12,
            took: Duration::from_millis(7),
            visitor: Some("203.0.113.9".to_owned()),
        };
        let line = event_line("web", &request(Ok(StatusCode::OK))).expect("a line");
        let mut read: Value = serde_json::from_str(&line).expect("JSON");
        let timestamp = read["timestamp"].take();
        assert!(
            timestamp
                .as_str()
                .is_some_and(|time| time.parse::<Timestamp>().is_ok())
        );
        assert_eq!(
            read,
            json!({
                "timestamp": null, "level": "INFO", "event": "request", "tunnel": "web", "method": "GET",
                "uri": "/a\"???[2J", "status": 200, "response_bytes": 12, "duration_ms": 7, "visitor": "203.0.113.9",
            })
        );
        let line = event_line("web", &request(Err("it broke off".to_owned()))).expect("a line");
        let read: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(read["error"], "it broke off");
        assert!(read.get("status").is_none());
    }
}
