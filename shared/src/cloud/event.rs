//! What the functions of the WebSocket routes ask of an event before they look at anything else in it.

use crate::id::ConnectionId;

/// The event is not of the kind its function is for: a fault of the deployment, not of an agent.
#[derive(Debug, thiserror::Error)]
#[error("not a {expected} event of a WebSocket API: {fault}")]
pub struct WrongEvent {
    expected: &'static str,
    fault: &'static str,
}

/// The connection that an event of type `expected` is about.
///
/// HTTP events carry the route key `$default` too; only WebSocket events have an `eventType`.
///
/// # Errors
/// When the event has another type or names no connection.
pub fn connection_of(
    expected: &'static str,
    event_type: Option<&str>,
    connection_id: Option<&str>,
) -> Result<ConnectionId, WrongEvent> {
    let wrong = |fault| WrongEvent { expected, fault };
    match event_type {
        Some(kind) if kind == expected => connection_id
            .ok_or(wrong("it names no connection"))?
            .parse()
            .map_err(|_| wrong("its connectionId is none")),
        _ => Err(wrong("its eventType is another")),
    }
}
