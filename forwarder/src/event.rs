//! What happens to a tunnel, for its observers.

use std::time::Duration;

use http::{Method, StatusCode};

/// Something a user may want to know.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A connection to the service is being opened.
    Connecting {
        /// Where to.
        endpoint: String,
        /// The proxy that leads there, without credentials.
        proxy: Option<String>,
    },
    /// The tunnel is open.
    Online {
        /// Where visitors reach it.
        public_url: String,
        /// The address at which the tunnel has a web origin of its own, where that is another: the best one for a browser.
        browser_url: Option<String>,
        /// What they reach.
        target: String,
    },
    /// The connection is lost, or could not be made.
    Reconnecting {
        /// Why.
        reason: String,
        /// When the next try comes.
        pause: Duration,
        /// Which try that is since the tunnel was last open for a while.
        attempt: u32,
    },
    /// A request was answered, or not.
    Request {
        /// The method.
        method: Method,
        /// Path and query.
        uri: String,
        /// The local service's status, or why there is none.
        outcome: Result<StatusCode, String>,
        /// Bytes of the response's body.
        bytes: u64,
        /// From the request's arrival to the last byte of the response.
        took: Duration,
        /// The visitor's address, as the service's front saw it.
        visitor: Option<String>,
    },
    /// How long the service took to answer the agent's last ping.
    RoundTrip(Duration),
    /// A visitor's connection has changed its protocol, such as to WebSocket.
    SocketOpened,
    /// Such a connection has ended.
    SocketClosed,
    /// No new requests are taken; those in flight may finish.
    Draining {
        /// How many there are.
        in_flight: usize,
    },
}
