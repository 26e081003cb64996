//! The wire protocol, version 1: JSON messages between the agent and the service over one WebSocket connection.
//!
//! There is one enum per direction. A message type that is not listed decodes as `Unknown`, so that
//! either side may be newer than the other. Everything beyond the first version's messages is
//! negotiated in `features`. docs/protocol.md describes the same with examples.

mod codec;
mod compact;
mod feature;
#[cfg(test)]
mod tests;

use http::HeaderMap;
use serde::{Deserialize, Serialize};

pub(crate) use self::compact::longest_head;
pub use self::{
    codec::{
        Body, CarriesBody, DecodeError, Encoded, Encoding, Format, Framing, FromJson, Heads,
        decode, decode_binary, encode, encoded_length, is_binary, subject_of_binary,
    },
    compact::{Head, HeadRef},
    feature::{FEATURES, Feature},
};
use crate::{
    headers,
    id::{ConnectionId, RequestId, TunnelId},
};

/// The protocol version that this code speaks.
pub const VERSION: u32 = 1;

/// What the agent sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromAgent {
    /// The upgrade is complete, so the service may send now. Earlier it could not: @connections answers
    /// 410 until `$connect` has finished.
    Ready(Ready),
    /// The head of a response and as much of the body as fits.
    HttpResponse(HttpResponse),
    /// The next part of a response's body.
    BodyPart(BodyPart),
    /// Allows more of a request's body.
    Window(Window),
    /// A request failed, or a message could not be read.
    Error(AgentError),
    /// What the local service says over a visitor's WebSocket.
    WebsocketBatch(WebsocketBatch),
    /// The local service has closed a visitor's WebSocket.
    WebsocketClose {
        /// The request that opened it.
        request_id: RequestId,
        /// The visitor's connection.
        websocket: ConnectionId,
    },
    /// Keeps an idle connection open and requests a `pong`.
    Ping {
        /// Tells the answer from others, where the service has [`Feature::PingIds`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<u32>,
    },
    /// Gives up the connection's tunnel id, so that anyone may claim it.
    Release,
    /// A type that this code does not know.
    #[serde(other)]
    Unknown,
}

/// What the service sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToAgent {
    /// Answers `ready`: the tunnel is open.
    ConnectionEstablished(ConnectionEstablished),
    /// A visitor's request.
    HttpRequest(HttpRequest),
    /// The next part of a request's body.
    BodyPart(BodyPart),
    /// Allows more of a response's body.
    Window(Window),
    /// The visitor has left, or time has run out: drop the request.
    Cancel {
        /// The request to drop.
        request_id: RequestId,
    },
    /// What a visitor says over its WebSocket.
    WebsocketMessage {
        /// The request that opened it.
        request_id: RequestId,
        /// The text.
        text: String,
    },
    /// Answers `websocket_batch`.
    WebsocketSent {
        /// The request that opened the WebSocket.
        request_id: RequestId,
        /// The batch's number.
        batch: u32,
        /// How many of its texts were sent: fewer than it has when the visitor is gone.
        delivered: usize,
    },
    /// A visitor's WebSocket has ended.
    WebsocketClose {
        /// The request that opened it.
        request_id: RequestId,
        /// Why: a close code (RFC 6455, 7.4), if there was one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        code: Option<u16>,
    },
    /// Answers `ping`.
    Pong {
        /// That of the `ping`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<u32>,
    },
    /// The tunnel has a different address from now on.
    UrlUpdated {
        /// The new address.
        public_url: String,
    },
    /// Answers `release`.
    Released {
        /// The tunnel id, which has no owner now.
        tunnel_id: TunnelId,
        /// Whether the agent owned it. If not, it had no owner already.
        existed: bool,
    },
    /// The connection no longer serves the tunnel: another connection of the owner has taken it over,
    /// or the tunnel id was released. Requests may still arrive until remembered lookups expire.
    Replaced {
        /// What happened, for the user.
        reason: String,
        /// That of the `ping` that this answers, if it answers one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<u32>,
    },
    /// Something the agent sent was refused.
    Error {
        /// What was wrong, for the log.
        message: String,
    },
    /// A type that this code does not know.
    #[serde(other)]
    Unknown,
}

/// See [`FromAgent::Ready`]. The first agents sent none of these fields.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct Ready {
    /// The version the agent speaks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u32>,
    /// What the agent can do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<Feature>,
    /// The agent's name and version, for the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// The agent's own connection that this one takes over from. It may finish what it has, and is not
    /// sent `replaced`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<ConnectionId>,
    /// The visitor policy, as JSON of [`crate::visitor_policy::VisitorPolicy`]; without it, all
    /// visitors are admitted. It is decoded separately, so that a policy that cannot be read is
    /// refused with an error instead of making the whole message unreadable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<serde_json::Value>,
}

/// See [`ToAgent::ConnectionEstablished`]. The first services sent only the first three fields.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct ConnectionEstablished {
    /// This connection.
    pub connection_id: ConnectionId,
    /// The tunnel's name.
    pub tunnel_id: TunnelId,
    /// Where visitors reach the tunnel.
    pub public_url: String,
    /// The address with the tunnel's own host name, if subdomains are configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subdomain_url: Option<String>,
    /// The address with the tunnel's name as its first path segment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_based_url: Option<String>,
    /// The version the service speaks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u32>,
    /// What the service can do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<Feature>,
    /// How long the connection can stay open, in milliseconds. An agent that opens the next connection
    /// earlier misses no request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub life_ms: Option<u64>,
}

/// A visitor's request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HttpRequest {
    /// Identifies the request in every message about it.
    pub request_id: RequestId,
    /// The method as sent.
    pub method: String,
    /// Path and query in origin-form (RFC 9112, 3.2.1), without the tunnel's name.
    pub uri: String,
    /// End-to-end fields only.
    #[serde(with = "headers::json", default)]
    pub headers: HeaderMap,
    /// The protocols the visitor asks to change to: the value of `Upgrade`. The parts that follow are what the visitor sends once
    /// a response with status 101 has changed the protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<String>,
    /// The visitor's connection, where the service ends it itself and carries messages instead of bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub websocket: Option<ConnectionId>,
    /// The body, or its first part.
    #[serde(default)]
    pub body: Body,
    /// How the body's bytes are compressed; if absent, they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<Encoding>,
    /// When the request came in, in milliseconds since 1970.
    #[serde(default)]
    pub timestamp: u64,
    /// Parts of the body follow.
    #[serde(default, skip_serializing_if = "is_false")]
    pub more: bool,
    /// How much longer the visitor waits, in milliseconds; 0 if the service did not say.
    #[serde(default)]
    pub deadline_ms: u64,
    /// The reply connection, to be named in every message about this request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<ConnectionId>,
}

/// The local service's response.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HttpResponse {
    /// The request it answers.
    pub request_id: RequestId,
    /// 200 to 599.
    pub status_code: u16,
    /// End-to-end fields only.
    #[serde(with = "headers::json", default)]
    pub headers: HeaderMap,
    /// The body, or its first part.
    #[serde(default)]
    pub body: Body,
    /// How the body's bytes are compressed; if absent, they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<Encoding>,
    /// How long the local service took to send the head of its response, in milliseconds.
    #[serde(default)]
    pub processing_time_ms: u64,
    /// Parts of the body follow.
    #[serde(default, skip_serializing_if = "is_false")]
    pub more: bool,
    /// See [`HttpRequest::reply_to`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<ConnectionId>,
}

/// A part of a body after the first. API Gateway does not guarantee order, so parts carry numbers.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct BodyPart {
    /// The request whose body, or whose response's body, this belongs to.
    pub request_id: RequestId,
    /// 1 for the first part after `http_request` or `http_response`, then one more each.
    pub part: u32,
    /// The bytes.
    #[serde(default)]
    pub body: Body,
    /// How the body's bytes are compressed; if absent, they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<Encoding>,
    /// Further parts follow.
    #[serde(default)]
    pub more: bool,
    /// See [`HttpRequest::reply_to`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<ConnectionId>,
}

/// Allows the sender of a body to send more of it. The window only grows: of two messages the larger
/// number counts, in whichever order they arrive.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// The request whose body, or whose response's body, this is about.
    pub request_id: RequestId,
    /// Parts with smaller numbers may be sent. Before the first of these messages the limit is
    /// [`crate::limits::INITIAL_WINDOW_PARTS`].
    pub parts: u32,
    /// See [`HttpRequest::reply_to`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<ConnectionId>,
}

/// Texts for a visitor, in order. The next batch is sent once this one has been answered, so that no text overtakes another.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct WebsocketBatch {
    /// The request that opened the WebSocket.
    pub request_id: RequestId,
    /// The visitor's connection: `websocket` of the request.
    pub websocket: ConnectionId,
    /// 0 for the first batch, then one more each.
    pub batch: u32,
    /// The texts.
    pub texts: Vec<String>,
}

/// An agent's message as a reply connection receives it: with the connection that sent it, as reported
/// by API Gateway and not as claimed by the agent. The first such message carries the reply
/// connection's own id and its own `ready`.
#[derive(Debug, Deserialize)]
pub struct Relayed<M = FromAgent> {
    /// The connection it came from.
    pub sender: ConnectionId,
    /// The message.
    pub message: M,
}

/// The part of a message that says which request it is about, for messages that cannot be read
/// otherwise.
#[derive(Debug, Deserialize)]
pub struct Subject {
    /// The request.
    pub request_id: RequestId,
}

impl Relayed {
    /// Wraps a message that is already encoded.
    pub fn encode(sender: &ConnectionId, message: &str) -> String {
        let sender = serde_json::to_string(sender).expect("a string can always be encoded as JSON");
        format!("{{\"sender\":{sender},\"message\":{message}}}")
    }
}

/// Why the agent has no response.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct AgentError {
    /// The request that failed, if the error is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<RequestId>,
    /// The kind of failure.
    pub code: AgentErrorCode,
    /// The failure in a sentence.
    #[serde(default)]
    pub message: String,
    /// The response's parts with numbers below this were sent before it failed. They still count.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub parts: u32,
    /// See [`HttpRequest::reply_to`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<ConnectionId>,
}

/// Kinds of [`AgentError`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentErrorCode {
    /// The agent could not read what the service sent.
    InvalidRequest,
    /// The local service took too long.
    Timeout,
    /// The local service refused or reset the connection, or did not speak HTTP.
    LocalServiceUnavailable,
    /// The response is larger than the service accepts.
    ResponseTooLarge,
    /// The agent accepts no more requests now.
    Busy,
    /// Another connection serves the tunnel now, and this one has not passed the request on.
    Replaced,
    /// Anything else.
    #[serde(other)]
    InternalError,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_false(flag: &bool) -> bool {
    !flag
}
