//! `ttf health`: whether the tunnels of the agent that runs on this machine are open, as its inspector says.

use std::time::Duration;

use http::StatusCode;
use serde_json::Value;
use tokio::time::timeout;

use crate::{
    endpoint::Endpoint, handshake::HandshakeError, inspector::InspectAddress, settings::Settings,
    web_request,
};

/// How long the agent may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// What the inspector calls the state in which all tunnels are open.
const ONLINE: &str = "online";

/// Why an agent is not known to be well.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HealthError {
    /// Nobody can be asked.
    #[error(
        "there is no inspector at a known address to ask: set inspect to a port, for the agent and here"
    )]
    NoAddress,
    /// There is no agent, or it does not answer.
    #[error("no agent answers at {address}: {reason}")]
    Silent {
        /// Where it was expected.
        address: String,
        /// Why it did not answer.
        reason: HandshakeError,
    },
    /// Something else answers.
    #[error("what answers at {0} is no agent")]
    Foreign(String),
    /// The agent has no connection for one of its tunnels.
    #[error("the agent is {0}")]
    Offline(String),
}

/// Asks the agent whose inspector is at this address.
///
/// # Errors
/// If it does not say that all its tunnels are open.
pub(crate) async fn check(inspector: &InspectAddress) -> Result<&'static str, HealthError> {
    let address = inspector.in_use().ok_or(HealthError::NoAddress)?;
    let endpoint: Endpoint = format!("http://{address}")
        .parse()
        .map_err(|_| HealthError::NoAddress)?;
    let settings = Settings::new(endpoint.clone());
    let answer = timeout(
        ANSWER_TIMEOUT,
        web_request::get(&settings, &endpoint, "/api/status"),
    )
    .await
    .unwrap_or_else(|_| Err(HandshakeError::no_answer()));
    let answer = match answer {
        Ok(answer) if answer.status == StatusCode::OK => answer,
        Ok(_) => return Err(HealthError::Foreign(address)),
        Err(reason) => return Err(HealthError::Silent { address, reason }),
    };
    let status: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    match status["status"].as_str() {
        Some(ONLINE) => Ok(ONLINE),
        Some(other) => Err(HealthError::Offline(other.to_owned())),
        None => Err(HealthError::Foreign(address)),
    }
}
