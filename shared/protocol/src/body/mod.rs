//! How a body travels: cut into chunks, compressed, numbered and sent within a window; then put back in order, decompressed, and
//! acknowledged with a larger window.
//!
//! [`BodySender`] and [`BodyReceiver`] are the two ends, the same in both directions.

pub mod budget;
mod chunker;
pub mod compression;
mod receive;
pub mod reorder;
mod send;
pub mod window;

use bytes::{Bytes, BytesMut};

pub use self::{
    receive::{BodyReceiver, ReceiveBodyError, ReceivedChunk},
    send::{BodySender, Mode, SendBodyError},
};
use crate::{
    body::compression::DecompressError,
    id::{ConnectionId, RequestId},
    limits::{HEAD_LENGTH_BYTES, MAX_MESSAGE_BYTES, RELAY_ENVELOPE_BYTES},
    message::{self, Body, BodyPart, Encoding, Format, Heads, HttpRequest, HttpResponse},
};

/// Room for what the measure of a head as JSON does not show: the message's type, and flags, ids and digits that are set later.
const ENVELOPE_SLACK_BYTES: usize = 256;
/// A head that may be longer than this is measured. Measuring is as much work as writing, and so much room can be spared.
const MAX_UNMEASURED_BYTES: usize = 16 * 1024;

/// As much of a body as one message carries.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Chunk {
    /// The bytes, as the message carries them.
    pub bytes: Bytes,
    /// How they are compressed.
    pub encoding: Option<Encoding>,
    /// More of the body follows.
    pub more: bool,
}

impl Chunk {
    /// The last chunk of a body, or its only one, uncompressed.
    pub fn last(bytes: Bytes) -> Self {
        Self {
            bytes,
            encoding: None,
            more: false,
        }
    }

    /// The bytes as they were before compression.
    ///
    /// # Errors
    /// If they cannot be decompressed, or would be too long.
    pub fn decompress(self) -> Result<Bytes, DecompressError> {
        compression::decompress(self.bytes, self.encoding)
    }
}

/// A chunk with its place in the body.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Part {
    /// 1 for the first part after a head, then one more each.
    pub number: u32,
    /// The bytes.
    pub chunk: Chunk,
}

impl Part {
    /// The message that carries it.
    pub fn into_message(self, request_id: RequestId, reply_to: Option<ConnectionId>) -> BodyPart {
        BodyPart {
            request_id,
            part: self.number,
            body: Body(self.chunk.bytes),
            encoding: self.chunk.encoding,
            more: self.chunk.more,
            reply_to,
        }
    }
}

impl From<BodyPart> for Part {
    fn from(message: BodyPart) -> Self {
        Self {
            number: message.part,
            chunk: Chunk {
                bytes: message.body.0,
                encoding: message.encoding,
                more: message.more,
            },
        }
    }
}

/// What the two messages with a head have in common: the first chunk of the body beside it.
macro_rules! first_chunk {
    ($($message:ty),*) => {$(
        impl $message {
            /// Takes the first chunk of the body out.
            pub fn take_chunk(&mut self) -> Chunk {
                Chunk {
                    bytes: std::mem::take(&mut self.body.0),
                    encoding: self.encoding.take(),
                    more: std::mem::take(&mut self.more),
                }
            }

            /// Puts the first chunk of the body in.
            pub fn set_chunk(&mut self, chunk: Chunk) {
                self.body = Body(chunk.bytes);
                self.encoding = chunk.encoding;
                self.more = chunk.more;
            }

            /// How many body bytes fit beside the head; `None` when the head itself does not fit into a message.
            pub fn room(&self, format: Format) -> Option<usize> {
                let measured = || message::encoded_length(self) + ENVELOPE_SLACK_BYTES;
                let head = match format {
                    Format::Text => return room_beside(measured()),
                    Format::Binary(_, Heads::Json) => Some(self.longest_json())
                        .filter(|longest| *longest <= MAX_UNMEASURED_BYTES)
                        .unwrap_or_else(measured),
                    Format::Binary(_, Heads::Compact) => {
                        message::longest_head(&self.headers, self.text_bytes())
                    }
                };
                MAX_MESSAGE_BYTES.checked_sub(HEAD_LENGTH_BYTES + head)
            }

            /// No head is longer as JSON, which writes a byte as six at most.
            fn longest_json(&self) -> usize {
                let fields = self.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 2);
                (fields.sum::<usize>() + self.text_bytes()) * 6 + ENVELOPE_SLACK_BYTES
            }
        }
    )*};
}

first_chunk!(HttpRequest, HttpResponse);

impl HttpRequest {
    /// Bytes of text beside the header fields.
    fn text_bytes(&self) -> usize {
        let upgrade = self.upgrade.as_ref().map_or(0, String::len);
        let websocket = self.websocket.as_ref().map_or(0, |id| id.as_str().len());
        let ids = self.request_id.as_str().len()
            + self.reply_to.as_ref().map_or(0, |id| id.as_str().len());
        self.method.len() + self.uri.len() + upgrade + websocket + ids
    }
}

impl HttpResponse {
    /// Bytes of text beside the header fields.
    fn text_bytes(&self) -> usize {
        self.request_id.as_str().len() + self.reply_to.as_ref().map_or(0, |id| id.as_str().len())
    }
}

/// How many body bytes fit beside `envelope` bytes of JSON in one message that may be passed on; `None` when not even the
/// envelope does.
pub fn room_beside(envelope: usize) -> Option<usize> {
    MAX_MESSAGE_BYTES
        .checked_sub(RELAY_ENVELOPE_BYTES + envelope)
        .map(|rest| rest / 4 * 3)
}

/// Joins runs of bytes into one; copies nothing when there is only one.
pub(crate) fn join(chunks: Vec<Bytes>) -> Bytes {
    match <[Bytes; 1]>::try_from(chunks) {
        Ok([only]) => only,
        Err(chunks) => {
            let mut joined = BytesMut::with_capacity(chunks.iter().map(Bytes::len).sum());
            chunks
                .iter()
                .for_each(|chunk| joined.extend_from_slice(chunk));
            joined.freeze()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        limits::{MAX_BINARY_PART_BYTES, MAX_PART_BYTES},
        message::{CarriesBody, Framing, FromAgent, Heads, ToAgent, encode},
    };

    #[test]
    fn a_full_part_fits_a_message_with_the_longest_ids() {
        let mut part = BodyPart {
            request_id: "r".repeat(64).parse().expect("an id"),
            part: u32::MAX,
            body: Body(vec![0; MAX_PART_BYTES].into()),
            encoding: Some(Encoding::Zstd),
            more: false,
            reply_to: Some("c".repeat(128).parse().expect("an id")),
        };
        assert!(
            encode(&FromAgent::BodyPart(part.clone())).len() + RELAY_ENVELOPE_BYTES
                <= MAX_MESSAGE_BYTES
        );
        assert!(encode(&ToAgent::BodyPart(part.clone())).len() <= MAX_MESSAGE_BYTES);
        part.body = Body(vec![0; MAX_BINARY_PART_BYTES].into());
        let binary =
            FromAgent::BodyPart(part).encode_as(Format::Binary(Framing::Short, Heads::Json));
        assert!(binary.length() <= MAX_MESSAGE_BYTES);
        assert!(RequestId::generate().as_str().len() <= 64);
    }

    #[test]
    fn a_binary_message_with_a_full_first_chunk_fits_whatever_its_head() {
        for heads in [Heads::Json, Heads::Compact] {
            for (fields, length) in [
                (0, 0),
                (1, 10),
                (10, 100),
                (20, 130),
                (20, 1000),
                (100, 1000),
                (256, 0),
            ] {
                // The characters that take most as JSON, and one name for all, which takes most in a compact head.
                for (is_one_name, byte) in [(false, b'"'), (true, b'x')] {
                    let mut headers = http::HeaderMap::new();
                    for number in 0..fields {
                        let name = if is_one_name {
                            "name".repeat(50)
                        } else {
                            format!("field-{number}")
                        };
                        let name = name.parse::<http::HeaderName>().expect("a name");
                        let value = http::HeaderValue::from_bytes(&vec![byte; length]);
                        headers.append(name, value.expect("a value"));
                    }
                    let most = if heads == Heads::Json { 2 } else { 1 } * fields * length;
                    let may_be_too_long = most > MAX_MESSAGE_BYTES;
                    fits(
                        headers,
                        Format::Binary(Framing::Short, heads),
                        may_be_too_long,
                    );
                }
            }
        }
    }

    /// Fills the messages with these header fields, and the longest of all else, up to what they have room for.
    fn fits(headers: http::HeaderMap, format: Format, may_be_too_long: bool) {
        let what = format!("{format:?}: {} fields", headers.len());
        let request_id: RequestId = "r".repeat(64).parse().expect("an id");
        let connection: Option<ConnectionId> = "c".repeat(128).parse().ok();
        let mut response = HttpResponse {
            request_id: request_id.clone(),
            status_code: u16::MAX,
            headers: headers.clone(),
            body: Body::default(),
            encoding: None,
            processing_time_ms: u64::MAX,
            more: false,
            reply_to: connection.clone(),
        };
        let mut request = HttpRequest {
            request_id,
            method: "M".repeat(20),
            uri: "/x".repeat(50),
            headers,
            upgrade: Some("websocket".to_owned()),
            websocket: connection.clone(),
            body: Body::default(),
            encoding: None,
            timestamp: u64::MAX,
            more: false,
            deadline_ms: u64::MAX,
            reply_to: None,
        };
        let rooms = (response.room(format), request.room(format));
        let (Some(for_response), Some(for_request)) = rooms else {
            assert!(may_be_too_long, "{what}");
            return;
        };
        let chunk = |room| Chunk {
            bytes: vec![0; room].into(),
            encoding: Some(Encoding::Zstd),
            more: true,
        };
        response.set_chunk(chunk(for_response));
        request.set_chunk(chunk(for_request));
        if format == Format::Binary(Framing::Short, Heads::Compact) {
            // It is set when the room has been given away.
            request.reply_to = connection;
        }
        for encoded in [
            FromAgent::HttpResponse(response).encode_as(format),
            ToAgent::HttpRequest(request).encode_as(format),
        ] {
            assert!(encoded.length() <= MAX_MESSAGE_BYTES, "{what}");
        }
    }

    #[test]
    fn the_room_for_bytes_accounts_for_base64() {
        let most = MAX_MESSAGE_BYTES - RELAY_ENVELOPE_BYTES;
        assert_eq!(room_beside(most), Some(0));
        assert_eq!(room_beside(most - 4), Some(3));
        assert_eq!(room_beside(most + 1), None);
    }
}

#[cfg(test)]
mod properties;
