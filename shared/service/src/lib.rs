//! What the four functions share: everything they ask of AWS is here.
//!
//! [`settings`] and [`telemetry`] start a function. [`routing`] says which tunnel an address means. [`auth`] says who an agent is,
//! [`tables`] is what DynamoDB stores, [`agent_path`] the way to agents and back: [`agents`] is how messages are sent to
//! them, [`replies`] where their replies are awaited. And
//! [`aws`] is the functions' life in Lambda, the SDK's configuration and API Gateway's events.

pub mod agent_path;
pub mod agents;
pub mod aside;
pub mod auth;
pub mod aws;
pub mod replies;
pub mod routing;
pub mod settings;
pub mod stopwatch;
pub mod tables;
pub mod telemetry;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The time since 1970. What is stored counts whole seconds of it, as DynamoDB's TTL wants.
pub fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}
