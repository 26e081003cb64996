//! Compact heads: those of requests and responses as lists of fields, where both sides have [`super::Feature::CompactHeads`].
//!
//! A field is a name and a value, each behind its length in four bytes, the most significant first. The header fields stand there as
//! they are. What else JSON has beside them stands before them under the same name with a colon in front, `:type` first; numbers and
//! flags are text, and `0`, `false` and `null` are left out. Reading JSON costs several times as much, because each byte of it may
//! mean something.

use std::str::{self, FromStr};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};

use super::{Body, DecodeError, HttpRequest, HttpResponse, Subject};
use crate::{headers::USUAL_FIELDS, limits::MAX_HEADER_FIELDS};

/// Bytes before a name, and before a value: its length.
const LENGTH_BYTES: usize = size_of::<u32>();

/// Room for the fields beside the header, without the texts that are measured. They take 240 bytes with their lengths and with
/// numbers of 20 digits, and a connection's id may come later.
const OWN_FIELDS_BYTES: usize = 512;

/// The values of `:type`, which are those of `type` in JSON.
const REQUEST: &[u8] = b"http_request";
const RESPONSE: &[u8] = b"http_response";

const NO_REQUEST_ID: DecodeError = DecodeError::NotCompact("no request_id");

/// A message whose head can be compact.
#[derive(Clone, Copy, Debug)]
pub enum HeadRef<'m> {
    /// A visitor's request.
    Request(&'m HttpRequest),
    /// The local service's response.
    Response(&'m HttpResponse),
}

impl HeadRef<'_> {
    /// Appends the head, which is the message without its body.
    pub(super) fn write(self, head: &mut Vec<u8>) {
        let headers = match self {
            Self::Request(request) => {
                put(head, ":type", REQUEST);
                put(head, ":request_id", request.request_id.as_str());
                put(head, ":method", &request.method);
                put(head, ":uri", &request.uri);
                put_some(head, ":upgrade", request.upgrade.as_deref());
                put_some(
                    head,
                    ":websocket",
                    request.websocket.as_ref().map(|id| id.as_str()),
                );
                put_some(
                    head,
                    ":encoding",
                    request.encoding.map(|encoding| encoding.as_str()),
                );
                put_number(head, ":timestamp", request.timestamp);
                put_some(head, ":more", request.more.then_some("true"));
                put_number(head, ":deadline_ms", request.deadline_ms);
                put_some(
                    head,
                    ":reply_to",
                    request.reply_to.as_ref().map(|id| id.as_str()),
                );
                &request.headers
            }
            Self::Response(response) => {
                put(head, ":type", RESPONSE);
                put(head, ":request_id", response.request_id.as_str());
                put(head, ":status_code", response.status_code.to_string());
                put_some(
                    head,
                    ":encoding",
                    response.encoding.map(|encoding| encoding.as_str()),
                );
                put_number(head, ":processing_time_ms", response.processing_time_ms);
                put_some(head, ":more", response.more.then_some("true"));
                put_some(
                    head,
                    ":reply_to",
                    response.reply_to.as_ref().map(|id| id.as_str()),
                );
                &response.headers
            }
        };
        for (name, value) in headers {
            put(head, name.as_str(), value);
        }
    }
}

/// How long the compact head of a message with these header fields is at most, with `text_bytes` of text beside them.
pub(crate) fn longest_head(headers: &HeaderMap, text_bytes: usize) -> usize {
    let fields = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 2 * LENGTH_BYTES);
    fields.sum::<usize>() + text_bytes + OWN_FIELDS_BYTES
}

fn put(head: &mut Vec<u8>, name: &str, value: impl AsRef<[u8]>) {
    for text in [name.as_bytes(), value.as_ref()] {
        // A longer one makes a message that nobody sends.
        let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
        head.extend_from_slice(&length.to_be_bytes());
        head.extend_from_slice(text);
    }
}

fn put_some(head: &mut Vec<u8>, name: &str, value: Option<&str>) {
    if let Some(value) = value {
        put(head, name, value);
    }
}

fn put_number(head: &mut Vec<u8>, name: &str, number: u64) {
    if number != 0 {
        put(head, name, number.to_string());
    }
}

/// What a compact head says.
#[derive(Debug)]
pub enum Head {
    /// A visitor's request, without its body.
    Request(HttpRequest),
    /// The local service's response, without its body.
    Response(HttpResponse),
    /// A type that this code does not know.
    Unknown,
}

impl Head {
    /// Reads a head.
    ///
    /// # Errors
    /// If it is none, or lacks something, or has something twice, or holds what HTTP does not allow, or more than
    /// [`MAX_HEADER_FIELDS`] header fields.
    pub(super) fn read(head: &[u8]) -> Result<Self, DecodeError> {
        // All values of the header share one copy of it, instead of the message, whose body is to be freed before them.
        let head = Bytes::copy_from_slice(head);
        let mut fields = Fields(&head);
        match fields.next().transpose()? {
            Some((b":type", REQUEST)) => read_request(&head, fields).map(Self::Request),
            Some((b":type", RESPONSE)) => read_response(&head, fields).map(Self::Response),
            Some((b":type", _)) => Ok(Self::Unknown),
            _ => Err(DecodeError::NotCompact("no type")),
        }
    }
}

/// Reads which request a head is about.
///
/// # Errors
/// If it does not say so.
pub(super) fn subject(head: &[u8]) -> Result<Subject, DecodeError> {
    let mut request_id = None;
    for field in Fields(head) {
        if let (b":request_id", id) = field? {
            set(&mut request_id, id)?;
            break;
        }
    }
    let request_id = request_id.ok_or(NO_REQUEST_ID)?;
    Ok(Subject { request_id })
}

fn read_request(head: &Bytes, fields: Fields<'_>) -> Result<HttpRequest, DecodeError> {
    let (mut request_id, mut method, mut uri) = (None, None, None);
    let (mut upgrade, mut websocket, mut encoding, mut reply_to) = (None, None, None, None);
    let (mut timestamp, mut more, mut deadline_ms) = (None, None, None);
    let headers = read_headers(head, fields, |name, value| match name {
        b":request_id" => set(&mut request_id, value),
        b":method" => set(&mut method, value),
        b":uri" => set(&mut uri, value),
        b":upgrade" => set(&mut upgrade, value),
        b":websocket" => set(&mut websocket, value),
        b":encoding" => set(&mut encoding, value),
        b":timestamp" => set(&mut timestamp, value),
        b":more" => set(&mut more, value),
        b":deadline_ms" => set(&mut deadline_ms, value),
        b":reply_to" => set(&mut reply_to, value),
        _ => Ok(()),
    })?;
    Ok(HttpRequest {
        request_id: request_id.ok_or(NO_REQUEST_ID)?,
        method: method.ok_or(DecodeError::NotCompact("no method"))?,
        uri: uri.ok_or(DecodeError::NotCompact("no uri"))?,
        headers,
        upgrade,
        websocket,
        body: Body::default(),
        encoding,
        timestamp: timestamp.unwrap_or_default(),
        more: more.unwrap_or_default(),
        deadline_ms: deadline_ms.unwrap_or_default(),
        reply_to,
    })
}

fn read_response(head: &Bytes, fields: Fields<'_>) -> Result<HttpResponse, DecodeError> {
    let (mut request_id, mut status_code, mut encoding) = (None, None, None);
    let (mut processing_time_ms, mut more, mut reply_to) = (None, None, None);
    let headers = read_headers(head, fields, |name, value| match name {
        b":request_id" => set(&mut request_id, value),
        b":status_code" => set(&mut status_code, value),
        b":encoding" => set(&mut encoding, value),
        b":processing_time_ms" => set(&mut processing_time_ms, value),
        b":more" => set(&mut more, value),
        b":reply_to" => set(&mut reply_to, value),
        _ => Ok(()),
    })?;
    Ok(HttpResponse {
        request_id: request_id.ok_or(NO_REQUEST_ID)?,
        status_code: status_code.ok_or(DecodeError::NotCompact("no status_code"))?,
        headers,
        body: Body::default(),
        encoding,
        processing_time_ms: processing_time_ms.unwrap_or_default(),
        more: more.unwrap_or_default(),
        reply_to,
    })
}

/// Reads the header fields, whose values share the memory of `head`, and gives the others to `take`.
fn read_headers<'h>(
    head: &Bytes,
    fields: Fields<'h>,
    mut take: impl FnMut(&'h [u8], &'h [u8]) -> Result<(), DecodeError>,
) -> Result<HeaderMap, DecodeError> {
    let mut headers = HeaderMap::with_capacity(USUAL_FIELDS);
    for field in fields {
        let (name, value) = field?;
        match name {
            b":type" | b":body" => {
                return Err(DecodeError::NotCompact("a field that has no place here"));
            }
            [b':', ..] => {
                take(name, value)?;
                continue;
            }
            _ => {}
        }
        if headers.len() == MAX_HEADER_FIELDS {
            return Err(DecodeError::NotCompact("too many header fields"));
        }
        let name = HeaderName::from_bytes(name)
            .map_err(|_| DecodeError::NotCompact("a header name that HTTP does not allow"))?;
        let value = HeaderValue::from_maybe_shared(head.slice_ref(value))
            .map_err(|_| DecodeError::NotCompact("a header value that HTTP does not allow"))?;
        headers.append(name, value);
    }
    Ok(headers)
}

fn set<T: FromStr>(place: &mut Option<T>, value: &[u8]) -> Result<(), DecodeError> {
    let value = str::from_utf8(value)
        .ok()
        .and_then(|text| text.parse().ok());
    let value = value.ok_or(DecodeError::NotCompact("a value of the wrong kind"))?;
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(DecodeError::NotCompact("a field that stands twice")),
    }
}

/// The names and values of a head that are still to be read.
struct Fields<'h>(&'h [u8]);

impl<'h> Fields<'h> {
    /// A name or a value.
    fn text(&mut self) -> Option<&'h [u8]> {
        let (length, rest) = self.0.split_first_chunk::<LENGTH_BYTES>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        let (text, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some(text)
    }
}

impl<'h> Iterator for Fields<'h> {
    type Item = Result<(&'h [u8], &'h [u8]), DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.text().and_then(|name| Some((name, self.text()?)));
        Some(field.ok_or(DecodeError::NotCompact("a field that is cut off")))
    }
}
