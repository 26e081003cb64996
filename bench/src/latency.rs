//! How long AWS's services take, seen from inside a Region, in milliseconds.

use std::time::Duration;

use rand::RngExt;

/// An HTTP API, once for the request and once for the response.
pub const HTTP_API: f64 = 6.0;
/// A WebSocket API, from a message to the invocation of its function.
pub const WEBSOCKET_API: f64 = 6.0;
/// A WebSocket handshake without its function: TCP, TLS, upgrade.
pub const HANDSHAKE: f64 = 25.0;
/// Lambda, from the invocation to the environment.
pub const INVOKE: f64 = 4.0;
/// PostToConnection and DeleteConnection, over an open connection.
pub const POST: f64 = 12.0;

/// A DynamoDB operation, over an open connection.
pub fn of_dynamodb(operation: &str) -> f64 {
    match operation {
        "GetItem" => 5.0,
        "TransactWriteItems" => 12.0,
        _ => 6.0,
    }
}

/// Whether the stand-in adds latency.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Latency {
    /// As much as AWS.
    Aws,
    /// None, for tests.
    Zero,
}

impl Latency {
    /// Waits for 85 to 125 % of the given time.
    pub async fn pause(self, milliseconds: f64) {
        if self == Self::Aws {
            let spread = rand::rng().random_range(0.85..1.25);
            tokio::time::sleep(Duration::from_secs_f64(milliseconds * spread / 1000.0)).await;
        }
    }
}
