//! The wire protocol, version 1: JSON messages between the agent and the service over one WebSocket connection.
//!
//! There is one enum per direction. A message type that is not listed decodes as `Unknown`, so that
//! either side may be newer than the other. Everything beyond the first version's messages is
//! negotiated in `features`. docs/protocol.md describes the same with examples.

use std::{fmt, io};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::HeaderMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{
    headers,
    id::{ConnectionId, RequestId, TunnelId},
    limits::{HEAD_LENGTH_BYTES, MAX_BINARY_PART_BYTES, MAX_MESSAGE_BYTES, MAX_PART_BYTES},
};

/// The protocol version that this code speaks.
pub const VERSION: u32 = 1;

/// A capability beyond the first version's messages. It is used only with a peer that announced it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Feature {
    /// Understands bodies in parts: `more` and `body_part`.
    BodyParts,
    /// Understands `cancel`.
    Cancel,
    /// Understands `replaced` and `url_updated`.
    Notices,
    /// Sends no part of a body before `window` allows it, and sends `window` for the bodies it receives.
    Window,
    /// Repeats the `reply_to` of a request in every message about it.
    ReplyTo,
    /// Understands compressed bodies; see [`Encoding`].
    Zstd,
    /// Enforces the visitor policy in `access` of `ready`. Has no meaning when an agent announces it.
    Access,
    /// Answers a `ping` of a connection that does not serve its tunnel with `replaced`, so that an agent can ask whether it was
    /// really replaced. Has no meaning when an agent announces it.
    ConfirmReplaced,
    /// Carries upgraded connections, such as WebSockets: `upgrade` of `http_request`, and raw bytes in the parts that follow.
    Upgrade,
    /// Reads messages with a body in binary; see [`Format`].
    Binary,
    /// Carries visitors' WebSockets as text messages: `websocket` of `http_request`, and the `websocket_` messages that follow.
    Websockets,
    /// Repeats the `id` of a `ping` in its answer. Has no meaning when an agent announces it.
    PingIds,
    /// A feature that this code does not know.
    #[serde(other)]
    Unknown,
}

/// What this code announces, on both sides.
pub const FEATURES: [Feature; 12] = [
    Feature::BodyParts,
    Feature::Cancel,
    Feature::Notices,
    Feature::Window,
    Feature::ReplyTo,
    Feature::Zstd,
    Feature::Access,
    Feature::ConfirmReplaced,
    Feature::Upgrade,
    Feature::Binary,
    Feature::Websockets,
    Feature::PingIds,
];

/// How the messages to a peer carry bodies.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Format {
    /// As base64 in the JSON of a text message.
    Text,
    /// As they are, behind the JSON: a binary message is the length of its head in four bytes, the most significant first; the
    /// head, which is the message without its body, as JSON; and the body. Messages without a body are text all the same.
    Binary,
}

impl Format {
    /// What a peer with these features reads best.
    pub fn of(features: &[Feature]) -> Self {
        if features.contains(&Feature::Binary) {
            Self::Binary
        } else {
            Self::Text
        }
    }

    /// Most body bytes in one part.
    pub fn max_part_bytes(self) -> usize {
        match self {
            Self::Text => MAX_PART_BYTES,
            Self::Binary => MAX_BINARY_PART_BYTES,
        }
    }
}

/// A message as it goes over the wire.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Encoded {
    /// In a text message.
    Text(String),
    /// In a binary message.
    Binary(Bytes),
}

impl Encoded {
    /// How long it is, in bytes.
    pub fn length(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Binary(bytes) => bytes.len(),
        }
    }

    /// Whether it is a part of a body.
    pub(crate) fn is_body_part(&self) -> bool {
        let head = match self {
            Self::Text(text) => text.as_bytes(),
            Self::Binary(bytes) => bytes.get(HEAD_LENGTH_BYTES..).unwrap_or_default(),
        };
        head.starts_with(br#"{"type":"body_part""#)
    }
}

impl From<String> for Encoded {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// A message that may have a body.
pub trait CarriesBody: Serialize {
    /// The body, if messages of this type have one.
    fn body_mut(&mut self) -> Option<&mut Body>;

    /// Writes the message for a peer that reads `format`. It is the same afterwards.
    fn encode_as(&mut self, format: Format) -> Encoded {
        let body = match (format, self.body_mut()) {
            (Format::Binary, Some(body)) if !body.0.is_empty() => std::mem::take(&mut body.0),
            _ => return Encoded::Text(encode(self)),
        };
        let mut bytes = Vec::with_capacity(HEAD_CAPACITY_BYTES + body.len());
        bytes.extend([0; HEAD_LENGTH_BYTES]);
        serde_json::to_writer(&mut bytes, self)
            .expect("maps with string keys, strings and numbers can always be encoded as JSON");
        let head = u32::try_from(bytes.len() - HEAD_LENGTH_BYTES).unwrap_or(u32::MAX);
        bytes[..HEAD_LENGTH_BYTES].copy_from_slice(&head.to_be_bytes());
        bytes.extend_from_slice(&body);
        if let Some(place) = self.body_mut() {
            place.0 = body;
        }
        Encoded::Binary(bytes.into())
    }
}

/// Room for most heads of binary messages, so that writing one seldom moves what is written already.
const HEAD_CAPACITY_BYTES: usize = 1024;

impl CarriesBody for FromAgent {
    fn body_mut(&mut self) -> Option<&mut Body> {
        match self {
            Self::HttpResponse(response) => Some(&mut response.body),
            Self::BodyPart(part) => Some(&mut part.body),
            Self::Ready(_)
            | Self::Window(_)
            | Self::Error(_)
            | Self::WebsocketBatch(_)
            | Self::WebsocketClose { .. }
            | Self::Ping { .. }
            | Self::Release
            | Self::Unknown => None,
        }
    }
}

impl CarriesBody for ToAgent {
    fn body_mut(&mut self) -> Option<&mut Body> {
        match self {
            Self::HttpRequest(request) => Some(&mut request.body),
            Self::BodyPart(part) => Some(&mut part.body),
            Self::ConnectionEstablished(_)
            | Self::Window(_)
            | Self::Cancel { .. }
            | Self::WebsocketMessage { .. }
            | Self::WebsocketSent { .. }
            | Self::WebsocketClose { .. }
            | Self::Pong { .. }
            | Self::UrlUpdated { .. }
            | Self::Released { .. }
            | Self::Replaced { .. }
            | Self::Error { .. }
            | Self::Unknown => None,
        }
    }
}

/// Body bytes, which JSON carries in base64 (RFC 4648, 4: with padding).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Body(pub Bytes);

impl Serialize for Body {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Body {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// Decodes from the borrowed text, which can be as long as a message, without copying it.
        struct Base64;

        impl de::Visitor<'_> for Base64 {
            type Value = Body;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("base64")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Body, E> {
                BASE64_STANDARD
                    .decode(text)
                    .map(|bytes| Body(bytes.into()))
                    .map_err(E::custom)
            }
        }

        deserializer.deserialize_str(Base64)
    }
}

/// How a body's bytes are compressed in a message. Each message is compressed on its own, because
/// messages may arrive in any order.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encoding {
    /// One Zstandard frame (RFC 8878) that decompresses to at most
    /// [`crate::limits::MAX_DECOMPRESSED_BYTES`] bytes.
    Zstd,
}

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

/// Why a text is not a message.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Longer than any message may be.
    #[error("a message of {0} bytes is over the limit of {MAX_MESSAGE_BYTES}")]
    TooLong(usize),
    /// Not the JSON of a message.
    #[error("not a message of this protocol")]
    Malformed(#[from] serde_json::Error),
    /// Binary, but not a length, a head of that length in UTF-8, and the body of a message that has one.
    #[error("not a binary message of this protocol")]
    NotBinary,
}

/// Reads a message of one direction.
///
/// # Errors
/// If the text is too long or is not a message. An unknown `type` is not an error.
pub fn decode<'de, M: FromJson<'de>>(text: &'de str) -> Result<M, DecodeError> {
    if text.len() > MAX_MESSAGE_BYTES {
        return Err(DecodeError::TooLong(text.len()));
    }
    if !text.trim_start().starts_with('{') {
        // serde would also accept an array of the fields in order, which the protocol does not allow.
        return Err(DecodeError::Malformed(de::Error::custom("not an object")));
    }
    Ok(M::from_json(text)?)
}

/// What [`decode`] reads.
pub trait FromJson<'de>: Deserialize<'de> {
    /// Reads it.
    ///
    /// # Errors
    /// If the text is something else.
    fn from_json(text: &'de str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }
}

impl FromJson<'_> for Subject {}
impl<'de, M: Deserialize<'de>> FromJson<'de> for Relayed<M> {}

impl FromJson<'_> for ToAgent {
    fn from_json(text: &str) -> serde_json::Result<Self> {
        match leading_type(text) {
            Some("http_request") => serde_json::from_str(text).map(Self::HttpRequest),
            Some("body_part") => serde_json::from_str(text).map(Self::BodyPart),
            _ => serde_json::from_str(text),
        }
    }
}

impl FromJson<'_> for FromAgent {
    fn from_json(text: &str) -> serde_json::Result<Self> {
        match leading_type(text) {
            Some("http_response") => serde_json::from_str(text).map(Self::HttpResponse),
            Some("body_part") => serde_json::from_str(text).map(Self::BodyPart),
            _ => serde_json::from_str(text),
        }
    }
}

/// The type of a message where it stands first, as this code writes it. serde holds all of a message in pieces until it has seen the
/// type, wherever that stands; for the messages that each request has, that is half of the time that reading them takes.
fn leading_type(text: &str) -> Option<&str> {
    let (name, _) = text.strip_prefix(r#"{"type":""#)?.split_once("\",")?;
    Some(name)
}

/// The head of a binary message and what follows it.
///
/// # Errors
/// If the bytes are too many, or no head is as long as they say.
pub fn split_binary(message: &Bytes) -> Result<(&str, Bytes), DecodeError> {
    if message.len() > MAX_MESSAGE_BYTES {
        return Err(DecodeError::TooLong(message.len()));
    }
    let (length, rest) = message
        .split_first_chunk::<HEAD_LENGTH_BYTES>()
        .ok_or(DecodeError::NotBinary)?;
    let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
    let head = rest.get(..length).ok_or(DecodeError::NotBinary)?;
    let head = std::str::from_utf8(head).map_err(|_| DecodeError::NotBinary)?;
    Ok((head, message.slice(HEAD_LENGTH_BYTES + length..)))
}

/// Reads a binary message of one direction, whose body shares the memory of `message`.
///
/// # Errors
/// As [`split_binary`]; or if the head is not a message, has a body of its own, or is of a type that has none.
pub fn decode_binary<M: CarriesBody + for<'de> FromJson<'de>>(
    message: &Bytes,
) -> Result<M, DecodeError> {
    let (head, body) = split_binary(message)?;
    let mut decoded: M = decode(head)?;
    match decoded.body_mut() {
        Some(place) if place.0.is_empty() => place.0 = body,
        None if body.is_empty() => {}
        _ => return Err(DecodeError::NotBinary),
    }
    Ok(decoded)
}

/// Writes a message. The result is longer than [`MAX_MESSAGE_BYTES`] only if its body was not cut by [`crate::body::BodySender`].
pub fn encode<M: Serialize + ?Sized>(message: &M) -> String {
    serde_json::to_string(message)
        .expect("maps with string keys, strings and numbers can always be encoded as JSON")
}

/// The length in bytes of a message, or the head of one, as JSON.
pub(crate) fn encoded_length<M: Serialize>(message: &M) -> usize {
    /// Counts the bytes that are written.
    struct Counter(usize);

    impl io::Write for Counter {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    let mut counter = Counter(0);
    serde_json::to_writer(&mut counter, message)
        .expect("maps with string keys, strings and numbers can always be encoded as JSON");
    counter.0
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_of_the_first_agents_are_understood() {
        assert_eq!(
            decode::<FromAgent>(r#"{"type":"ready"}"#).expect("ready"),
            FromAgent::Ready(Ready::default())
        );
        assert_eq!(
            decode::<FromAgent>(r#"{"type":"ping"}"#).expect("ping"),
            FromAgent::Ping { id: None }
        );
        let response = r#"{"type":"http_response","request_id":"r1","status_code":200,"headers":{"x":["1","2"]},"body":"aGk=","processing_time_ms":5}"#;
        let FromAgent::HttpResponse(response) = decode(response).expect("a response") else {
            panic!("not a response")
        };
        assert_eq!(
            response.headers.get_all("x").iter().collect::<Vec<_>>(),
            ["1", "2"]
        );
        assert_eq!(response.body.0, "hi");
        assert!(!response.more);
    }

    #[test]
    fn a_service_that_sends_three_fields_is_understood() {
        let text = r#"{"type":"connection_established","connection_id":"c=","tunnel_id":"abc","public_url":"https://x/abc"}"#;
        let ToAgent::ConnectionEstablished(established) = decode(text).expect("established") else {
            panic!("not established")
        };
        assert_eq!(established.features, []);
        assert_eq!(established.protocol, None);
    }

    #[test]
    fn a_newer_peer_is_understood_as_far_as_it_goes() {
        assert_eq!(
            decode::<ToAgent>(r#"{"type":"dance","steps":3}"#).expect("unknown"),
            ToAgent::Unknown
        );
        let ready = decode::<FromAgent>(
            r#"{"type":"ready","protocol":9,"features":["ping_ids","teleport"]}"#,
        )
        .expect("ready");
        assert_eq!(
            ready,
            FromAgent::Ready(Ready {
                protocol: Some(9),
                features: vec![Feature::PingIds, Feature::Unknown],
                ..Ready::default()
            })
        );
        let error = decode::<FromAgent>(r#"{"type":"error","request_id":"r","code":"on_fire"}"#)
            .expect("error");
        assert!(matches!(
            error,
            FromAgent::Error(AgentError {
                code: AgentErrorCode::InternalError,
                ..
            })
        ));
    }

    #[test]
    fn an_array_is_not_a_message() {
        assert!(matches!(
            decode::<FromAgent>(r#"["ping"]"#),
            Err(DecodeError::Malformed(_))
        ));
        assert!(matches!(
            decode::<FromAgent>(r#"["body_part","r1",1,"aGk=",false]"#),
            Err(DecodeError::Malformed(_))
        ));
    }

    #[test]
    fn a_message_from_api_gateway_itself_is_an_error() {
        let text = r#"{"message":"Internal server error","connectionId":"c=","requestId":"r"}"#;
        assert!(matches!(
            decode::<ToAgent>(text),
            Err(DecodeError::Malformed(_))
        ));
    }

    #[test]
    fn without_negotiation_only_first_version_fields_are_written() {
        assert_eq!(
            encode(&FromAgent::Ready(Ready::default())),
            r#"{"type":"ready"}"#
        );
        assert_eq!(encode(&ToAgent::Pong { id: None }), r#"{"type":"pong"}"#);
    }

    #[test]
    fn a_text_over_the_message_limit_is_refused_without_decoding_it() {
        let text = format!(
            r#"{{"type":"ping","pad":"{}"}}"#,
            "x".repeat(MAX_MESSAGE_BYTES)
        );
        assert!(matches!(
            decode::<FromAgent>(&text),
            Err(DecodeError::TooLong(_))
        ));
    }

    /// A binary message with this head and body.
    fn binary(length: usize, head: &str, body: &str) -> Bytes {
        let length = u32::try_from(length).expect("short");
        [&length.to_be_bytes()[..], head.as_bytes(), body.as_bytes()]
            .concat()
            .into()
    }

    #[test]
    fn a_binary_message_is_refused_unless_each_byte_has_its_place() {
        let part = r#"{"type":"body_part","request_id":"r","part":1}"#;
        let decoded: FromAgent =
            decode_binary(&binary(part.len(), part, "raw")).expect("a message");
        assert!(matches!(decoded, FromAgent::BodyPart(part) if part.body.0 == "raw"));
        let with_body = r#"{"type":"body_part","request_id":"r","part":1,"body":"aGk="}"#;
        let long = "x".repeat(MAX_MESSAGE_BYTES);
        for refused in [
            Bytes::new(),
            Bytes::from_static(&[0, 0, 0]),
            binary(part.len() + 1, part, ""),
            binary(part.len() - 1, part, ""),
            binary(usize::try_from(u32::MAX).expect("64 bits"), part, "raw"),
            binary(0, "", "raw"),
            binary(with_body.len(), with_body, "raw"),
            binary(15, r#"{"type":"ping"}"#, "raw"),
            binary(part.len(), part, &long),
            binary(1, "\u{e9}", ""),
        ] {
            let refused = decode_binary::<FromAgent>(&refused);
            assert!(refused.is_err(), "{refused:?}");
        }
    }

    const SAMPLES: [&str; 10] = [
        r#"{"type":"ready","protocol":1,"features":["body_parts"],"previous":"a=","access":{"allow":["::/0"]}}"#,
        r#"{"type":"http_response","request_id":"r","status_code":200,"headers":{"a":["b"]},"body":"aGk=","more":true}"#,
        r#"{"type":"body_part","request_id":"r","part":1,"body":"aGk=","encoding":"zstd","reply_to":"a="}"#,
        r#"{"type":"window","request_id":"r","parts":33}"#,
        r#"{"type":"error","request_id":"r","code":"timeout","message":"m"}"#,
        r#"{"type":"connection_established","connection_id":"a=","tunnel_id":"my-app","public_url":"u","life_ms":1}"#,
        r#"{"type":"http_request","request_id":"r","method":"GET","uri":"/","headers":{"a":["b"]},"body":"","deadline_ms":1}"#,
        r#"{"type":"released","tunnel_id":"my-app","existed":true}"#,
        r#"{"type":"websocket_batch","request_id":"r","websocket":"a=","batch":0,"texts":["a","b"]}"#,
        r#"{"type":"websocket_message","request_id":"r","text":"a"}"#,
    ];

    #[test]
    fn the_samples_that_faults_are_made_in_are_messages() {
        for sample in SAMPLES {
            let from_agent =
                decode(sample).is_ok_and(|message: FromAgent| message != FromAgent::Unknown);
            let to_agent = decode(sample).is_ok_and(|message: ToAgent| message != ToAgent::Unknown);
            assert!(from_agent || to_agent, "{sample}");
        }
    }

    proptest! {
        // Starts from messages, because hardly any random text gets as far as the fields of one. The fuzz target `decode` goes further.
        #[test]
        fn decoding_a_message_with_faults_never_panics(
            sample in prop::sample::select(&SAMPLES[..]),
            faults in prop::collection::vec((any::<prop::sample::Index>(), any::<char>(), any::<bool>()), 1..4),
        ) {
            let mut text: Vec<char> = sample.chars().collect();
            for (at, character, is_inserted) in faults {
                let at = at.index(text.len());
                if is_inserted {
                    text.insert(at, character);
                } else {
                    text[at] = character;
                }
            }
            let text: String = text.into_iter().collect();
            let (from_agent, to_agent) = (decode::<FromAgent>(&text), decode::<ToAgent>(&text));
            // Whatever stands first, it is the same message.
            if text.starts_with('{') {
                if let Ok(message) = serde_json::from_str::<FromAgent>(&text) {
                    prop_assert_eq!(from_agent.expect("a message"), message);
                }
                if let Ok(message) = serde_json::from_str::<ToAgent>(&text) {
                    prop_assert_eq!(to_agent.expect("a message"), message);
                }
            }
        }

        #[test]
        fn a_message_in_either_format_is_what_was_written(
            bytes in prop::collection::vec(any::<u8>(), 0..500), part in 1u32.., more: bool, is_binary: bool,
        ) {
            let format = if is_binary { Format::Binary } else { Format::Text };
            let part = BodyPart { request_id: RequestId::generate(), part, body: Body(bytes.into()), encoding: None, more, reply_to: None };
            let message = FromAgent::BodyPart(part.clone());
            let encoded = message.clone().encode_as(format);
            prop_assert!(encoded.is_body_part());
            prop_assert_eq!(matches!(encoded, Encoded::Binary(_)), is_binary && !part.body.0.is_empty());
            let decoded = match encoded {
                Encoded::Text(text) => decode::<FromAgent>(&text),
                Encoded::Binary(bytes) => decode_binary(&bytes),
            };
            prop_assert_eq!(decoded.expect("what we wrote"), message);
        }

        #[test]
        fn any_binary_message_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..50), length in 0u32..60) {
            let mut message = length.to_be_bytes().to_vec();
            message.extend(&bytes);
            let message = Bytes::from(message);
            let outcome = split_binary(&message);
            prop_assert_eq!(outcome.is_ok(), length as usize <= bytes.len() && std::str::from_utf8(&bytes[..length as usize]).is_ok());
        }

        #[test]
        fn bodies_survive_the_wire(bytes in prop::collection::vec(any::<u8>(), 0..500), part in 1u32.., more: bool) {
            let message = FromAgent::BodyPart(BodyPart { request_id: RequestId::generate(), part, body: Body(bytes.into()), encoding: None, more, reply_to: None });
            prop_assert_eq!(decode::<FromAgent>(&encode(&message)).expect("what we wrote"), message);
        }
    }
}
