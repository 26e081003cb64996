//! WebSocket frames: how a message is cut into them, and how much of them a connection holds in memory.

use bytes::Bytes;
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::{
        WebSocketConfig,
        frame::{
            Frame,
            coding::{Data, OpCode},
        },
    },
};

use crate::{
    limits::{MAX_FRAME_BYTES, MAX_MESSAGE_BYTES},
    message::{Encoded, Framing},
};

/// Longest message, and longest frame, that a client takes from its server, in bytes: [`MAX_MESSAGE_BYTES`] with room for what a
/// newer service may put around one.
const MAX_CLIENT_READ_BYTES: usize = 2 * MAX_MESSAGE_BYTES;

/// How much a server reads from a socket at once. A connection that is idle keeps as much memory, and a server has thousands.
const SERVER_READ_BUFFER_BYTES: usize = 8 * 1024;
/// How much a client reads at once: so much that long messages take few system calls, and no more, because the library fills the
/// buffer with zeros before each read, also for a short message. A client has one connection, or a few.
const CLIENT_READ_BUFFER_BYTES: usize = 32 * 1024;

/// Bytes that wait to be written to the socket before they are written without being asked for: short messages that are ready
/// together go out in one write.
const WRITE_BUFFER_BYTES: usize = 2 * MAX_FRAME_BYTES;

/// Most bytes that wait to be written to the socket: what is written at once, the longest frame behind it, and as many pongs as fit
/// beside them. The library answers each ping by itself; once there is no room, only the latest ping is answered (RFC 6455, 5.5.3,
/// allows it), so that a flood of pings from a peer that does not read takes no more memory than this.
const MAX_WRITE_BUFFER_BYTES: usize = 2 * MAX_FRAME_BYTES + MAX_MESSAGE_BYTES;

/// The configuration of a connection to a service.
pub fn client_config() -> WebSocketConfig {
    server_config(MAX_CLIENT_READ_BYTES, MAX_CLIENT_READ_BYTES)
        .read_buffer_size(CLIENT_READ_BUFFER_BYTES)
}

/// The configuration of a connection that takes frames of up to `max_frame_bytes` and messages of up to `max_message_bytes`.
pub fn server_config(max_frame_bytes: usize, max_message_bytes: usize) -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(SERVER_READ_BUFFER_BYTES)
        .write_buffer_size(WRITE_BUFFER_BYTES)
        .max_write_buffer_size(MAX_WRITE_BUFFER_BYTES)
        .max_frame_size(Some(max_frame_bytes))
        .max_message_size(Some(max_message_bytes))
}

/// Cuts a message into frames: those that API Gateway takes, unless its reader takes longer ones.
pub(crate) fn frames(message: Encoded) -> impl Iterator<Item = Message> {
    let (bytes, mut data, longest) = match message {
        Encoded::Text(text) => (text.into(), Data::Text, MAX_FRAME_BYTES),
        Encoded::Binary(bytes, Framing::Short) => (bytes, Data::Binary, MAX_FRAME_BYTES),
        Encoded::Binary(bytes, Framing::Whole) => (bytes, Data::Binary, usize::MAX),
    };
    cut(bytes, longest).map(move |(frame, is_last)| {
        let data = std::mem::replace(&mut data, Data::Continue);
        Message::Frame(Frame::message(frame, OpCode::Data(data), is_last))
    })
}

/// Cuts bytes into the payloads of frames of at most `longest` bytes: at least one, and whether each is the last.
fn cut(bytes: Bytes, longest: usize) -> impl Iterator<Item = (Bytes, bool)> {
    let mut rest = Some(bytes);
    std::iter::from_fn(move || {
        let mut frame = rest.take()?;
        if frame.len() > longest {
            rest = Some(frame.split_off(longest));
        }
        Some((frame, rest.is_none()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::join;

    #[test]
    fn a_binary_message_stays_whole_for_a_reader_of_long_frames() {
        let bytes = Bytes::from(vec![1; MAX_MESSAGE_BYTES]);
        for (framing, count) in [
            (Framing::Short, MAX_MESSAGE_BYTES / MAX_FRAME_BYTES),
            (Framing::Whole, 1),
        ] {
            let frames = frames(Encoded::Binary(bytes.clone(), framing));
            assert_eq!(frames.count(), count, "{framing:?}");
        }
    }

    #[test]
    fn frames_are_cut_at_the_limit_and_put_together_give_the_text() {
        for (length, count) in [
            (0, 1),
            (1, 1),
            (MAX_FRAME_BYTES, 1),
            (MAX_FRAME_BYTES + 1, 2),
            (3 * MAX_FRAME_BYTES, 3),
        ] {
            let text = "x".repeat(length);
            let cut: Vec<(Bytes, bool)> = cut(text.clone().into(), MAX_FRAME_BYTES).collect();
            assert_eq!(cut.len(), count, "{length}");
            assert!(
                cut.iter().all(|(frame, _)| frame.len() <= MAX_FRAME_BYTES),
                "{length}"
            );
            assert_eq!(
                cut.iter().rposition(|(_, is_last)| *is_last),
                Some(count - 1),
                "{length}"
            );
            assert_eq!(
                cut.iter().filter(|(_, is_last)| *is_last).count(),
                1,
                "{length}"
            );
            assert_eq!(
                join(cut.into_iter().map(|(frame, _)| frame).collect()),
                text,
                "{length}"
            );
        }
    }
}
