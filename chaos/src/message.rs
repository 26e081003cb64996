//! Where the messages of a WebSocket connection begin and end, seen from outside.

use bytes::{Bytes, BytesMut};

/// The opcode of a close frame. It and those above are control frames.
const CLOSE: u8 = 0x8;
/// What a message has in it that others must not overtake: an agent drops what belongs to a request that it does not know yet.
const FIRST_OF_A_REQUEST: &[u8] = br#""http_request""#;

/// One way of a connection, cut into its handshake and its messages.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    bytes: BytesMut,
    state: Progress,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Progress {
    #[default]
    Handshake,
    Frames,
    /// The handshake was refused: what follows is no message.
    Refused,
}

/// Bytes that stay together.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) bytes: Bytes,
    pub(crate) order: Order,
}

/// What may change places with a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Order {
    /// Later ones may overtake it.
    MayWait,
    /// It may overtake earlier ones.
    Goes,
    /// Everything before it goes first.
    IsLast,
}

impl Messages {
    /// Takes what has arrived.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message that has arrived whole.
    pub(crate) fn next(&mut self) -> Option<Message> {
        let (length, order) = match self.state {
            Progress::Handshake => {
                let end = self.bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
                let is_accepted = [&b"GET "[..], b"HTTP/1.1 101"]
                    .iter()
                    .any(|start| self.bytes.starts_with(start));
                self.state = if is_accepted {
                    Progress::Frames
                } else {
                    Progress::Refused
                };
                (end + 4, Order::IsLast)
            }
            Progress::Frames => self.first()?,
            Progress::Refused => return self.rest(),
        };
        let bytes = self.bytes.split_to(length).freeze();
        Some(Message { bytes, order })
    }

    /// What has arrived of a message that will not be whole any more.
    pub(crate) fn rest(&mut self) -> Option<Message> {
        let bytes = self.bytes.split().freeze();
        (!bytes.is_empty()).then_some(Message {
            bytes,
            order: Order::IsLast,
        })
    }

    /// Length and order of the first message, with the control frames between its own.
    fn first(&self) -> Option<(usize, Order)> {
        let first = Frame::parse(&self.bytes)?;
        let mut last = Frame { ..first };
        let mut length = first.length;
        while last.is_control() && !first.is_control() || !last.is_final {
            last = Frame::parse(&self.bytes[length..])?;
            length += last.length;
        }
        let begins_request = || {
            self.bytes[..length]
                .windows(FIRST_OF_A_REQUEST.len())
                .any(|bytes| bytes == FIRST_OF_A_REQUEST)
        };
        let order = if first.opcode == CLOSE {
            Order::IsLast
        } else if first.is_control() || begins_request() {
            Order::Goes
        } else {
            Order::MayWait
        };
        Some((length, order))
    }
}

#[derive(Debug)]
struct Frame {
    opcode: u8,
    is_final: bool,
    length: usize,
}

impl Frame {
    /// The frame at the start of `bytes`, if it is there to its end.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let [first, second, rest @ ..] = bytes else {
            return None;
        };
        let (payload, size_bytes) = match second & 0x7f {
            126 => (u64::from(u16::from_be_bytes(*rest.first_chunk()?)), 2),
            127 => (u64::from_be_bytes(*rest.first_chunk()?), 8),
            short => (u64::from(short), 0),
        };
        let mask_bytes = if second & 0x80 == 0 { 0 } else { 4 };
        let length = usize::try_from(payload)
            .ok()?
            .checked_add(2 + size_bytes + mask_bytes)?;
        (bytes.len() >= length).then_some(Self {
            opcode: first & 0x0f,
            is_final: first & 0x80 != 0,
            length,
        })
    }

    fn is_control(&self) -> bool {
        self.opcode >= CLOSE
    }
}
