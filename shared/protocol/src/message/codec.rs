//! How messages are written and read: as JSON, or with a body in binary behind a head that is JSON or [`compact`].

use std::{fmt, io, str::FromStr};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{
    Feature, FromAgent, Relayed, Subject, ToAgent,
    compact::{self, Head, HeadRef},
};
use crate::limits::{
    HEAD_LENGTH_BYTES, MAX_BINARY_PART_BYTES, MAX_CONTROL_MESSAGE_BYTES, MAX_MESSAGE_BYTES,
    MAX_PART_BYTES,
};

/// How the messages to a peer carry bodies.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Format {
    /// As base64 in the JSON of a text message.
    Text,
    /// As they are, behind a head: a binary message is the length of its head in four bytes, the most significant first; the
    /// head, which is the message without its body; and the body. Messages without a body are text all the same, unless their
    /// heads are compact.
    Binary(Framing, Heads),
}

/// How the heads of binary messages are written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Heads {
    /// As JSON.
    Json,
    /// Those of requests and responses as lists of fields, the others as JSON.
    Compact,
}

/// How a binary message is cut into frames.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Framing {
    /// Into as many as are needed of at most [`crate::limits::MAX_FRAME_BYTES`], like text.
    Short,
    /// Not at all, so that its reader has nothing to put together.
    Whole,
}

impl Format {
    /// What a peer with these features reads best.
    pub fn of(features: &[Feature]) -> Self {
        if !features.contains(&Feature::Binary) {
            return Self::Text;
        }
        let framing = if features.contains(&Feature::LongFrames) {
            Framing::Whole
        } else {
            Framing::Short
        };
        let heads = if features.contains(&Feature::CompactHeads) {
            Heads::Compact
        } else {
            Heads::Json
        };
        Self::Binary(framing, heads)
    }

    /// Most body bytes in one part.
    pub fn max_part_bytes(self) -> usize {
        match self {
            Self::Text => MAX_PART_BYTES,
            Self::Binary(..) => MAX_BINARY_PART_BYTES,
        }
    }
}

/// A message as it goes over the wire.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Encoded {
    /// In a text message.
    Text(String),
    /// In a binary message.
    Binary(Bytes, Framing),
}

impl Encoded {
    /// How long it is, in bytes.
    pub fn length(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Binary(bytes, _) => bytes.len(),
        }
    }

    /// Whether it is a control message: short, and no part of a body.
    pub fn is_control(&self) -> bool {
        self.length() <= MAX_CONTROL_MESSAGE_BYTES && !self.is_body_part()
    }

    pub(super) fn is_body_part(&self) -> bool {
        let head = match self {
            Self::Text(text) => text.as_bytes(),
            Self::Binary(bytes, _) => bytes.get(HEAD_LENGTH_BYTES..).unwrap_or_default(),
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

    /// The message, if its head can be compact.
    fn head(&self) -> Option<HeadRef<'_>>;

    /// Writes the message for a peer that reads `format`. It is the same afterwards.
    fn encode_as(&mut self, format: Format) -> Encoded {
        let Format::Binary(framing, heads) = format else {
            return Encoded::Text(encode(self));
        };
        let body = self
            .body_mut()
            .map(|body| std::mem::take(&mut body.0))
            .unwrap_or_default();
        let compact = self.head().filter(|_| heads == Heads::Compact);
        if body.is_empty() && compact.is_none() {
            return Encoded::Text(encode(self));
        }
        let mut bytes = Vec::with_capacity(HEAD_CAPACITY_BYTES + body.len());
        bytes.extend([0; HEAD_LENGTH_BYTES]);
        match compact {
            Some(head) => head.write(&mut bytes),
            None => serde_json::to_writer(&mut bytes, self)
                .expect("maps with string keys, strings and numbers can always be encoded as JSON"),
        }
        let head = u32::try_from(bytes.len() - HEAD_LENGTH_BYTES).unwrap_or(u32::MAX);
        bytes[..HEAD_LENGTH_BYTES].copy_from_slice(&head.to_be_bytes());
        bytes.extend_from_slice(&body);
        if let Some(place) = self.body_mut() {
            place.0 = body;
        }
        Encoded::Binary(bytes.into(), framing)
    }
}

/// Room for most heads, so that writing one seldom moves what is written already.
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

    fn head(&self) -> Option<HeadRef<'_>> {
        match self {
            Self::HttpResponse(response) => Some(HeadRef::Response(response)),
            _ => None,
        }
    }
}

impl From<Head> for FromAgent {
    fn from(head: Head) -> Self {
        match head {
            Head::Response(response) => Self::HttpResponse(response),
            Head::Request(_) | Head::Unknown => Self::Unknown,
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

    fn head(&self) -> Option<HeadRef<'_>> {
        match self {
            Self::HttpRequest(request) => Some(HeadRef::Request(request)),
            _ => None,
        }
    }
}

impl From<Head> for ToAgent {
    fn from(head: Head) -> Self {
        match head {
            Head::Request(request) => Self::HttpRequest(request),
            Head::Response(_) | Head::Unknown => Self::Unknown,
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

impl Encoding {
    /// As messages name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
        }
    }
}

impl FromStr for Encoding {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "zstd" => Ok(Self::Zstd),
            _ => Err(()),
        }
    }
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
    /// Binary, but not a length, a head of that length, and the body of a message that has one.
    #[error("not a binary message of this protocol")]
    NotBinary,
    /// Not the compact head of a message.
    #[error("not a compact head of this protocol: {0}")]
    NotCompact(&'static str),
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

/// The head of a binary message.
enum BinaryHead<'m> {
    Json(&'m str),
    Compact(&'m [u8]),
}

/// Takes a binary message apart. A compact head begins with the high byte of a length, which is 0 in a message that is not too long;
/// JSON never does.
fn split(message: &Bytes) -> Result<(BinaryHead<'_>, Bytes), DecodeError> {
    if message.len() > MAX_MESSAGE_BYTES {
        return Err(DecodeError::TooLong(message.len()));
    }
    let (length, rest) = message
        .split_first_chunk::<HEAD_LENGTH_BYTES>()
        .ok_or(DecodeError::NotBinary)?;
    let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
    let head = rest.get(..length).ok_or(DecodeError::NotBinary)?;
    let head = match head {
        [0, ..] => BinaryHead::Compact(head),
        _ => BinaryHead::Json(str::from_utf8(head).map_err(|_| DecodeError::NotBinary)?),
    };
    Ok((head, message.slice(HEAD_LENGTH_BYTES + length..)))
}

/// Whether a binary message has a head that is as long as it says, and either JSON in UTF-8 or compact.
pub fn is_binary(message: &Bytes) -> bool {
    split(message).is_ok()
}

/// Reads a binary message of one direction, whose body shares the memory of `message`.
///
/// # Errors
/// If it is too long, or is no binary message; or if the head is not that of a message, has a body of its own, or is of a type that
/// has none.
pub fn decode_binary<M: CarriesBody + From<Head> + for<'de> FromJson<'de>>(
    message: &Bytes,
) -> Result<M, DecodeError> {
    let (head, body) = split(message)?;
    let mut decoded: M = match head {
        BinaryHead::Json(head) => decode(head)?,
        BinaryHead::Compact(head) => Head::read(head)?.into(),
    };
    match decoded.body_mut() {
        Some(place) if place.0.is_empty() => place.0 = body,
        None if body.is_empty() => {}
        _ => return Err(DecodeError::NotBinary),
    }
    Ok(decoded)
}

/// Reads which request a binary message is about.
///
/// # Errors
/// If it does not say so.
pub fn subject_of_binary(message: &Bytes) -> Result<Subject, DecodeError> {
    match split(message)?.0 {
        BinaryHead::Json(head) => decode(head),
        BinaryHead::Compact(head) => compact::subject(head),
    }
}

/// Writes a message. The result is longer than [`MAX_MESSAGE_BYTES`] only if its body was not cut by [`crate::body::BodySender`].
pub fn encode<M: Serialize + ?Sized>(message: &M) -> String {
    let mut text = Vec::with_capacity(HEAD_CAPACITY_BYTES);
    serde_json::to_writer(&mut text, message)
        .expect("maps with string keys, strings and numbers can always be encoded as JSON");
    String::from_utf8(text).expect("JSON is UTF-8")
}

/// The length in bytes of a message, or the head of one, as JSON.
pub fn encoded_length<M: Serialize>(message: &M) -> usize {
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
