//! `ttf health`: whether the tunnels of the agents that run on this machine are open, as their inspectors say.

use std::time::Duration;

use http::StatusCode;
use serde_json::Value;
use tokio::time::timeout;

use crate::{
    endpoint::Endpoint, handshake::HandshakeError, inspector::InspectAddress, settings::Settings,
    tunnel_ids, web_request,
};

/// How long the agent may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// What the inspector calls the state in which all tunnels are open.
const ONLINE: &str = "online";

/// Why an agent is not known to be well.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HealthError {
    /// There is nobody to ask.
    #[error(
        "no agent of this user runs here with an inspector; one of another user, or in another directory, is asked at the address of its inspector, as with --inspect 127.0.0.1:4040"
    )]
    NoAgent,
    /// The setting is no address.
    #[error("{0} is no address of an inspector")]
    Address(String),
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

/// Asks the agent whose inspector is at this address; without one, all agents of this user. What else has the default port, such as
/// another user's agent, is not asked.
///
/// # Errors
/// If one does not say that all its tunnels are open, or there is none.
pub(crate) async fn check(inspector: &InspectAddress) -> Result<&'static str, HealthError> {
    let addresses: Vec<String> = match inspector.in_use() {
        Some(address) => vec![address],
        None => tunnel_ids::default_file()
            .iter()
            .flat_map(|file| tunnel_ids::noted_inspectors(file))
            .map(|port| format!("127.0.0.1:{port}"))
            .collect(),
    };
    let mut state = Err(HealthError::NoAgent);
    for address in addresses {
        state = Ok(ask(address).await?);
    }
    state
}

/// Asks the agent whose inspector is at this address.
async fn ask(address: String) -> Result<&'static str, HealthError> {
    let endpoint: Endpoint = match format!("http://{address}").parse() {
        Ok(endpoint) => endpoint,
        Err(_) => return Err(HealthError::Address(address)),
    };
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
