//! Quotas of the platforms the tunnel runs on, and the sizes derived from them.
//!
//! Sources: "Quotas for configuring and running a WebSocket API" and "Quotas for HTTP APIs" in the API Gateway developer guide,
//! "Lambda quotas" and "Response streaming" in the Lambda developer guide. None of these can be raised.

use std::time::Duration;

/// Longest WebSocket frame API Gateway takes, in bytes; a longer one closes the connection with code 1009.
pub const MAX_FRAME_BYTES: usize = 32 * 1024;

/// Longest WebSocket message API Gateway takes in either direction, in bytes. A longer one from the client closes the
/// connection with code 1009; a longer PostToConnection is answered 413.
pub const MAX_MESSAGE_BYTES: usize = 128 * 1024;

/// How long a WebSocket connection may carry no message before API Gateway closes it.
pub const WEBSOCKET_IDLE_TIMEOUT: Duration = Duration::from_secs(10 * 60);

/// How long a WebSocket connection may live before API Gateway closes it.
pub const WEBSOCKET_LIFETIME: Duration = Duration::from_secs(2 * 60 * 60);

/// Longest a WebSocket route's integration may take.
pub const WEBSOCKET_INTEGRATION_TIMEOUT: Duration = Duration::from_secs(29);

/// Longest an HTTP API's integration may take; the visitor then gets 503 while the function runs on.
pub const HTTP_API_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest request body an HTTP API takes, in bytes.
pub const HTTP_API_BODY: usize = 10 * 1024 * 1024;

/// Longest request line plus headers an HTTP API takes, in bytes.
pub const HTTP_API_HEAD: usize = 10_240;

/// Longest payload of a synchronous invocation, event or answer, in bytes of JSON: 6 MB and a little, the figure that
/// Lambda's own error message names.
pub const MAX_LAMBDA_PAYLOAD_BYTES: usize = 6_291_556;

/// Longest streamed answer of a function, in bytes.
pub const LAMBDA_STREAM: usize = 200 * 1024 * 1024;

/// Longest a Lambda function runs.
pub const LAMBDA_RUN: Duration = Duration::from_secs(900);

/// Room in a [`MAX_MESSAGE_BYTES`] for the JSON around a message that is passed on with the id of the connection it came from.
pub const RELAY_ENVELOPE_BYTES: usize = 192;

/// Room in a [`MAX_MESSAGE_BYTES`] for a part's JSON around the encoded body: type, ids, number, flags and quotes.
pub const PART_ENVELOPE: usize = 512 + RELAY_ENVELOPE_BYTES;

/// Most body bytes a part carries, so that its base64 and envelope fit a [`MAX_MESSAGE_BYTES`].
pub const MAX_PART_BYTES: usize = (MAX_MESSAGE_BYTES - PART_ENVELOPE) / 4 * 3;

/// Most header fields the tunnel takes in one request or response.
pub const MAX_HEADER_FIELDS: usize = 256;

/// Most parts of one body a receiver holds while an earlier one is missing. It bounds what a disordered or hostile sender can
/// make the receiver keep: `MAX_REORDER_PARTS` times [`MAX_PART_BYTES`].
pub const MAX_REORDER_PARTS: usize = 64;

/// How many parts of a body may be sent before the receiver has allowed more with `window`. As many as keep a distant receiver
/// busy, and as few as every request may hold in memory: three megabytes.
pub const INITIAL_WINDOW_PARTS: u32 = 32;

/// Most bytes a compressed part may unpack to. It bounds what a few bytes can make the receiver keep.
pub const MAX_DECOMPRESSED_BYTES: usize = 4 * MAX_PART_BYTES;

/// Longest deadline the service gives to a request it hands an agent, unless a front allows less.
pub const STREAM_TIMEOUT: Duration = Duration::from_secs(15 * 60);

const _: () = assert!(MAX_PART_BYTES.div_ceil(3) * 4 + PART_ENVELOPE <= MAX_MESSAGE_BYTES);
const _: () = assert!(INITIAL_WINDOW_PARTS as usize <= MAX_REORDER_PARTS);
const _: () = assert!(MAX_FRAME_BYTES <= MAX_MESSAGE_BYTES);
const _: () = assert!(WEBSOCKET_IDLE_TIMEOUT.as_secs() < WEBSOCKET_LIFETIME.as_secs());
const _: () = assert!(STREAM_TIMEOUT.as_secs() <= LAMBDA_RUN.as_secs());
