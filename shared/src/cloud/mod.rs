//! What the Lambda functions share, and nothing else uses but `local`, which runs them in process.

pub mod access;
pub mod auth;
pub mod connections;
pub mod event;
pub mod jwt;
pub mod mailbox;
pub mod replies;
pub mod sdk;
pub mod settings;
pub mod store;
pub mod telemetry;
pub mod tokens;
pub mod tunnels;
pub mod websocket;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// The time since 1970. What is stored counts whole seconds of it, as DynamoDB's TTL wants.
pub fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// What a WebSocket route's function returns. API Gateway reads the status of $connect only; no route passes a body on.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteResponse {
    /// The HTTP status of the handshake or message.
    pub status_code: u16,
    /// Why a handshake was refused. Fronts other than API Gateway may show it to the agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
}

impl RouteResponse {
    /// Done.
    pub fn ok() -> Self {
        Self {
            status_code: 200,
            body: None,
        }
    }

    /// Refused, with a stable code and a sentence.
    pub fn refused(status_code: u16, code: &str, message: &str) -> Self {
        Self {
            status_code,
            body: Some(serde_json::json!({ "error": code, "message": message }).to_string()),
        }
    }
}
