//! Logs: JSON lines on stdout, which Lambda hands to CloudWatch. What a span knows, such as the connection that a message came
//! over, stands beside what the event itself says.

use json_subscriber::JsonLayer;
use tracing::{Level, Span, Subscriber, error_span};
use tracing_subscriber::{
    filter::Targets,
    fmt::{MakeWriter, time::SystemTime},
    layer::{Layer, SubscriberExt},
    registry::LookupSpan,
    util::SubscriberInitExt,
};
use tunnel_protocol::id::ConnectionId;

use crate::settings::Variables;

/// Starts logging at `LOG_LEVEL`, a list such as `info,tunnel_forward=debug`; `info` when it is not set or cannot be read.
pub fn init() {
    let level = Variables::of_process()
        .or("LOG_LEVEL", "info".to_owned())
        .unwrap_or_default();
    let targets: Targets = level
        .parse()
        .unwrap_or_else(|_| Targets::new().with_default(Level::INFO));
    tracing_subscriber::registry()
        .with(json_lines(std::io::stdout))
        .with(targets)
        .init();
}

/// The span for what an agent's connection does. It is at the level of errors, so that none is logged without it.
pub fn connection_span(id: &ConnectionId) -> Span {
    error_span!("connection", connection = %id)
}

fn json_lines<S, W>(writer: W) -> impl Layer<S>
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let mut lines = JsonLayer::new(writer);
    lines
        .with_timer("timestamp", SystemTime)
        .with_level("level")
        .with_flattened_event()
        .with_top_level_flattened_span_list();
    lines
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Write},
        sync::{Arc, Mutex},
    };

    use serde_json::Value;
    use tracing::{info, subscriber::with_default};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("not poisoned").write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_dashboard_finds_the_connection_at_the_top_of_every_line_about_it() {
        let lines = Lines::default();
        let writer = lines.clone();
        let log = tracing_subscriber::registry().with(json_lines(move || writer.clone()));
        let error = io::Error::other("it broke");
        with_default(log, || {
            let _entered = connection_span(&"L0SM9cOFvHcCIhw=".parse().expect("an id")).entered();
            info!(error = &error as &dyn std::error::Error, parts = 3, "ping");
        });
        let text = lines.0.lock().expect("not poisoned").clone();
        let mut line: Value = serde_json::from_slice(&text).expect("one line of JSON");
        assert!(line["timestamp"].take().is_string(), "{line}");
        let expected = serde_json::json!({
            "timestamp": null,
            "level": "INFO",
            "message": "ping",
            "parts": 3,
            "error": "it broke",
            "name": "connection",
            "connection": "L0SM9cOFvHcCIhw=",
        });
        assert_eq!(line, expected);

        let template = include_str!("../../../template.yaml");
        assert!(
            template.contains("filter ispresent(connection) | stats count_distinct(connection)")
        );
    }
}
