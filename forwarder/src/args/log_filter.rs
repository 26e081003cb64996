//! What is logged.

use tracing_subscriber::filter::{LevelFilter, Targets};

use super::UsageError;

/// The crates whose log level can be set by name.
pub(super) const LOG_TARGETS: [&str; 7] = [
    "forwarder",
    "tunnel_protocol",
    "hyper",
    "hyper_util",
    "rustls",
    "tokio_tungstenite",
    "tungstenite",
];

/// Reads a list of levels. `Targets` itself takes any word for a target's name, so that a typo would silence the log.
pub(super) fn log_filter(text: &str) -> Result<Targets, UsageError> {
    text.split(',')
        .try_fold(Targets::new(), |filter, directive| {
            let fault = || UsageError::LogLevel(directive.to_owned());
            let level = |text: &str| match text.trim().to_ascii_lowercase().as_str() {
                "off" => Ok(LevelFilter::OFF),
                "error" => Ok(LevelFilter::ERROR),
                "warn" => Ok(LevelFilter::WARN),
                "info" => Ok(LevelFilter::INFO),
                "debug" => Ok(LevelFilter::DEBUG),
                "trace" => Ok(LevelFilter::TRACE),
                _ => Err(fault()),
            };
            let Some((target, of_target)) = directive.split_once('=') else {
                return Ok(filter.with_default(level(directive)?));
            };
            let target = target.trim();
            let krate = target.split("::").next().unwrap_or_default();
            if !LOG_TARGETS.contains(&krate) {
                return Err(fault());
            }
            Ok(filter.with_target(target, level(of_target)?))
        })
}
