//! Logs: JSON lines on stdout, which Lambda hands to CloudWatch.

use tracing_subscriber::EnvFilter;

use super::settings::Variables;

/// Starts logging at `LOG_LEVEL`, a tracing filter; `info` when it is not set or cannot be read.
pub fn init() {
    let level = Variables::of_process().optional("LOG_LEVEL", "info".to_owned()).unwrap_or_default();
    let filter = EnvFilter::try_new(level).unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().json().flatten_event(true).with_current_span(false).with_env_filter(filter).with_target(false).init();
}
