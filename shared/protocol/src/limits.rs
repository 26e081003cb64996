//! Quotas of the platforms that the tunnel runs on, and the sizes derived from them.
//!
//! Sources: "Quotas for configuring and running a WebSocket API" and "Quotas for HTTP APIs" in the API Gateway developer guide,
//! "Lambda quotas" and "Response streaming" in the Lambda developer guide. None of these can be raised.

use std::time::Duration;

/// Longest WebSocket frame that API Gateway accepts, in bytes. A longer one closes the connection with
/// code 1009.
pub const MAX_FRAME_BYTES: usize = 32 * 1024;

/// Longest WebSocket message that API Gateway accepts in either direction, in bytes. A longer message
/// from the client closes the connection with code 1009; a longer PostToConnection is answered 413.
pub const MAX_MESSAGE_BYTES: usize = 128 * 1024;

/// Longest control message, in bytes: the head of a request or a response with next to no body, as a rule. As many of them as may go
/// before a message with a body, 16, are as long as the longest such message.
pub const MAX_CONTROL_MESSAGE_BYTES: usize = MAX_MESSAGE_BYTES / 16;

/// How long a WebSocket connection may be idle before API Gateway closes it.
pub const WEBSOCKET_IDLE_TIMEOUT: Duration = Duration::from_secs(10 * 60);

/// How long a WebSocket connection may live before API Gateway closes it.
pub const WEBSOCKET_LIFETIME: Duration = Duration::from_secs(2 * 60 * 60);

/// How long the integration of a WebSocket route may take.
pub const WEBSOCKET_INTEGRATION_TIMEOUT: Duration = Duration::from_secs(29);

/// How long an HTTP API's integration may take. After that the visitor gets 503, while the function
/// continues to run.
pub const HTTP_API_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest request body that an HTTP API accepts, in bytes.
pub const MAX_HTTP_API_BODY_BYTES: usize = 10 * 1024 * 1024;

/// Longest request line plus headers that an HTTP API accepts, in bytes.
pub const MAX_HTTP_API_HEAD_BYTES: usize = 10_240;

/// Longest payload of a synchronous invocation, event or response, in bytes of JSON: slightly more than
/// 6 MB, the figure in Lambda's own error message.
pub const MAX_LAMBDA_PAYLOAD_BYTES: usize = 6_291_556;

/// Longest streamed response of a function, in bytes.
pub const MAX_LAMBDA_STREAM_BYTES: usize = 200 * 1024 * 1024;

/// How long a Lambda function may run.
pub const LAMBDA_TIMEOUT: Duration = Duration::from_secs(900);

/// Bytes of JSON that passing a message on adds to it, with the id of the connection that sent it.
pub const RELAY_ENVELOPE_BYTES: usize = 192;

/// Bytes of JSON around the encoded body of a part: type, ids, number, flags and quotes.
pub const PART_ENVELOPE_BYTES: usize = 512 + RELAY_ENVELOPE_BYTES;

/// Most body bytes in one part, so that their base64 and the envelope fit into [`MAX_MESSAGE_BYTES`].
pub const MAX_PART_BYTES: usize = (MAX_MESSAGE_BYTES - PART_ENVELOPE_BYTES) / 4 * 3;

/// Bytes before a binary message's head: its length.
pub const HEAD_LENGTH_BYTES: usize = 4;

/// Most body bytes in one part of a binary message, which are not encoded.
pub const MAX_BINARY_PART_BYTES: usize =
    MAX_MESSAGE_BYTES - PART_ENVELOPE_BYTES - HEAD_LENGTH_BYTES;

/// Most header fields that the tunnel accepts in one request or response.
pub const MAX_HEADER_FIELDS: usize = 256;

/// Most header fields that hyper is to take: one more than [`MAX_HEADER_FIELDS`], which is checked elsewhere. While hyper reads a head
/// it has two arrays for as many, of 32 bytes for each field. So they are longer than its buffers, of 8 KiB, and jemalloc has them in a
/// size class of their own: all connections use the same few, which stay in the processor's caches.
pub const MAX_HYPER_FIELDS: usize = MAX_HEADER_FIELDS + 1;

/// Most parts of one body that a receiver holds while an earlier one is missing. It bounds what a
/// disordered or hostile sender can make the receiver keep: `MAX_REORDER_PARTS` times
/// [`MAX_PART_BYTES`].
pub const MAX_REORDER_PARTS: usize = 64;

/// How many parts of a body may be sent before the receiver has allowed more with `window`. Enough to
/// keep a distant receiver busy, and few enough for every request to hold in memory: about 3 MB.
pub const INITIAL_WINDOW_PARTS: u32 = 32;

/// Most bytes that a compressed part may decompress to. It bounds what a few bytes can make the receiver
/// keep.
pub const MAX_DECOMPRESSED_BYTES: usize = 4 * MAX_PART_BYTES;

/// Longest deadline that the service gives a request, unless its front allows less.
pub const STREAM_TIMEOUT: Duration = Duration::from_secs(15 * 60);

const _: () = assert!(MAX_PART_BYTES.div_ceil(3) * 4 + PART_ENVELOPE_BYTES <= MAX_MESSAGE_BYTES);
const _: () = assert!(INITIAL_WINDOW_PARTS as usize <= MAX_REORDER_PARTS);
const _: () = assert!(MAX_FRAME_BYTES <= MAX_MESSAGE_BYTES);
const _: () = assert!(WEBSOCKET_IDLE_TIMEOUT.as_secs() < WEBSOCKET_LIFETIME.as_secs());
const _: () = assert!(STREAM_TIMEOUT.as_secs() <= LAMBDA_TIMEOUT.as_secs());
