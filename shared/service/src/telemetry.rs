//! Logs: JSON lines on stdout, which Lambda hands to CloudWatch.

use tracing_subscriber::{filter::Targets, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use crate::settings::Variables;

/// Starts logging at `LOG_LEVEL`, a list such as `info,tunnel_forward=debug`; `info` when it is not set or cannot be read.
pub fn init() {
    let level = Variables::of_process()
        .or("LOG_LEVEL", "info".to_owned())
        .unwrap_or_default();
    let targets: Targets = level
        .parse()
        .unwrap_or_else(|_| Targets::new().with_default(tracing::Level::INFO));
    let lines = fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_target(false);
    tracing_subscriber::registry()
        .with(lines)
        .with(targets)
        .init();
}
