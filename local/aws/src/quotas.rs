//! What the WebSocket front allows: by default just what API Gateway allows, so that what works here works there.

use std::time::Duration;

use tunnel_protocol::limits;

/// The limits of an agent's connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Quotas {
    /// Longest frame from an agent that does not say in its handshake that it sends longer ones, in bytes; over it the connection
    /// is closed with 1009.
    pub frame: usize,
    /// Longest message either way, in bytes; over it 1009 to the agent, 413 to PostToConnection.
    pub message: usize,
    /// Longest time without a message either way; then 1001.
    pub idle: Duration,
    /// Longest life; then 1001, or once the connection carries no upgraded one any more. `None` means no limit.
    pub life: Option<Duration>,
    /// Messages of one connection that are handled at once; an agent that sends more waits.
    pub handled_at_once: usize,
    /// Open connections of agents of one owner; over it the handshake is answered 429. Where agents do not authenticate, of all.
    pub agents_of_one: usize,
    /// How often each open connection is checked, unless nothing has changed: whether its token is still valid and it should serve its
    /// tunnel. API Gateway does not; there an agent's `ping` and its tunnel's visitors cause the check.
    pub recheck: Duration,
}

impl Default for Quotas {
    fn default() -> Self {
        Self {
            frame: limits::MAX_FRAME_BYTES,
            message: limits::MAX_MESSAGE_BYTES,
            idle: limits::WEBSOCKET_IDLE_TIMEOUT,
            life: Some(limits::WEBSOCKET_LIFETIME),
            handled_at_once: 64,
            agents_of_one: 100,
            recheck: Duration::from_secs(20),
        }
    }
}
