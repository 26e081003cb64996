//! What the functions of the WebSocket routes ask of an event before they look at anything else in it.

use serde::Serialize;
use tunnel_protocol::id::ConnectionId;

/// The stage of the visitors' WebSocket API. The agents' has another.
pub const VISITORS_STAGE: &str = "visitors";

/// The event is not of the kind its function is for: a fault of the deployment, not of an agent.
#[derive(Debug, thiserror::Error)]
#[error("not a {expected} event of a WebSocket API: {fault}")]
pub struct RouteEventError {
    expected: &'static str,
    fault: &'static str,
}

/// The connection that an event of type `expected` is about.
///
/// HTTP events carry the route key `$default` too; only WebSocket events have an `eventType`.
///
/// # Errors
/// If the event has another type or names no connection.
pub fn connection_of(
    expected: &'static str,
    event_type: Option<&str>,
    connection_id: Option<&str>,
) -> Result<ConnectionId, RouteEventError> {
    let wrong = |fault| RouteEventError { expected, fault };
    match event_type {
        Some(kind) if kind == expected => connection_id
            .ok_or(wrong("connectionId is missing"))?
            .parse()
            .map_err(|_| wrong("invalid connectionId")),
        _ => Err(wrong("unexpected eventType")),
    }
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
