//! What is said over an upgraded connection that is a WebSocket: the messages of both sides, read from the bytes that pass.

use std::{collections::VecDeque, time::Duration};

use flate2::{Decompress, FlushDecompress};
use http::{HeaderMap, header};

/// How many messages of a connection are kept: the newest.
const MAX_MESSAGES: usize = 500;
/// How much is kept of a message.
const MAX_MESSAGE_BYTES: usize = 64 * 1024;
/// How much is kept of all messages of a connection.
const MAX_CONVERSATION_BYTES: usize = 2 * 1024 * 1024;
/// Longest header of a frame (RFC 6455, 5.2): two bytes, eight of length, four of mask.
const MAX_FRAME_HEAD_BYTES: usize = 14;
/// What a message costs beside its bytes, roughly.
const MESSAGE_BYTES: usize = 96;
/// How much is inflated at once.
const INFLATE_BYTES: usize = 16 * 1024;
/// The end of each deflated message, which its sender leaves out (RFC 7692, 7.2.2).
const DEFLATE_TAIL: [u8; 4] = [0x00, 0x00, 0xff, 0xff];

/// Who said something.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Side {
    Visitor,
    LocalService,
}

impl Side {
    /// The side with this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        [Self::Visitor, Self::LocalService]
            .into_iter()
            .find(|side| side.name() == name)
    }

    /// The side in a word, as in the API.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Visitor => "visitor",
            Self::LocalService => "service",
        }
    }
}

/// What a message is (RFC 6455, 5.2).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum MessageKind {
    Text,
    Binary,
    Close,
    Ping,
    Pong,
}

impl MessageKind {
    fn of(opcode: u8) -> Option<Self> {
        match opcode {
            1 => Some(Self::Text),
            2 => Some(Self::Binary),
            8 => Some(Self::Close),
            9 => Some(Self::Ping),
            10 => Some(Self::Pong),
            _ => None,
        }
    }

    /// The kind with this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        (1..=10)
            .filter_map(Self::of)
            .find(|kind| kind.name() == name)
    }

    /// The kind in a word, as in the API.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Binary => "binary",
            Self::Close => "close",
            Self::Ping => "ping",
            Self::Pong => "pong",
        }
    }
}

/// A message, of which the first bytes are kept.
#[derive(Clone, Debug)]
pub(crate) struct RecordedMessage {
    /// Counts the connection's messages, from 0.
    pub number: u64,
    /// When it ended, counted from the request.
    pub at: Duration,
    pub side: Side,
    pub kind: MessageKind,
    pub kept: Vec<u8>,
    /// How long it is, inflated.
    pub bytes: u64,
}

impl RecordedMessage {
    /// What it costs in memory, roughly.
    fn cost(&self) -> usize {
        self.kept.len() + MESSAGE_BYTES
    }
}

/// The messages of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Conversation {
    visitor: Reader,
    local_service: Reader,
    messages: VecDeque<RecordedMessage>,
    /// How many there have been.
    count: u64,
    kept_bytes: usize,
    /// The most that `kept_bytes` has been: what the connection was charged for.
    charged_bytes: usize,
}

impl Conversation {
    /// For a connection whose response has these headers; `None` if it is no WebSocket.
    pub(crate) fn begin(response: &HeaderMap) -> Option<Self> {
        let protocol = response.get(header::UPGRADE)?;
        if !protocol.as_bytes().eq_ignore_ascii_case(b"websocket") {
            return None;
        }
        let extensions: Vec<_> = response
            .get_all(header::SEC_WEBSOCKET_EXTENSIONS)
            .iter()
            .map(|value| String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase())
            .collect();
        let extensions = extensions.join(",");
        let deflates = extensions.contains("permessage-deflate");
        let reader = |resets: &str| Reader {
            inflater: deflates.then(|| Inflater::new(extensions.contains(resets))),
            ..Reader::default()
        };
        Some(Self {
            visitor: reader("client_no_context_takeover"),
            local_service: reader("server_no_context_takeover"),
            messages: VecDeque::new(),
            count: 0,
            kept_bytes: 0,
            charged_bytes: 0,
        })
    }

    /// A connection that has ended, of which these messages are known.
    pub(crate) fn of(messages: impl IntoIterator<Item = RecordedMessage>) -> Self {
        let messages: VecDeque<_> = messages.into_iter().collect();
        Self {
            visitor: Reader::default(),
            local_service: Reader::default(),
            count: messages.back().map_or(0, |message| message.number + 1),
            kept_bytes: messages.iter().map(RecordedMessage::cost).sum(),
            messages,
            charged_bytes: 0,
        }
    }

    /// What the messages that are kept cost in memory, roughly.
    pub(crate) fn kept_bytes(&self) -> usize {
        self.kept_bytes
    }

    /// The messages that are kept, oldest first.
    pub(crate) fn messages(&self) -> impl ExactSizeIterator<Item = &RecordedMessage> {
        self.messages.iter()
    }

    /// How many messages there have been.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Reads bytes that one side has sent. Returns by how many bytes the record grew, and whether a message has ended.
    pub(crate) fn take(&mut self, side: Side, at: Duration, bytes: &[u8]) -> (usize, bool) {
        let reader = match side {
            Side::Visitor => &mut self.visitor,
            Side::LocalService => &mut self.local_service,
        };
        let ended = reader.take(bytes);
        let has_message = !ended.is_empty();
        for message in ended {
            let message = RecordedMessage {
                number: self.count,
                at,
                side,
                kind: message.kind,
                kept: message.kept,
                bytes: message.bytes,
            };
            self.kept_bytes += message.cost();
            self.messages.push_back(message);
            self.count += 1;
        }
        while self.messages.len() > MAX_MESSAGES || self.kept_bytes > MAX_CONVERSATION_BYTES {
            let Some(oldest) = self.messages.pop_front() else {
                break;
            };
            self.kept_bytes -= oldest.cost();
        }
        let grown = self.kept_bytes.saturating_sub(self.charged_bytes);
        self.charged_bytes += grown;
        (grown, has_message)
    }
}

/// A message that is not yet complete, or complete and not yet numbered.
#[derive(Clone, Debug)]
struct PartialMessage {
    kind: MessageKind,
    is_deflated: bool,
    kept: Vec<u8>,
    bytes: u64,
}

impl PartialMessage {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        let kept = bytes.len().min(self.room());
        self.kept.extend_from_slice(&bytes[..kept]);
    }

    /// How much more is kept of it.
    fn room(&self) -> usize {
        MAX_MESSAGE_BYTES.saturating_sub(self.kept.len())
    }
}

/// Reads the frames of one side (RFC 6455, 5.2). Bytes that are no frames end the reading, and pass all the same.
#[derive(Clone, Debug, Default)]
struct Reader {
    head: Vec<u8>,
    frame: Option<Frame>,
    /// The message that frames continue.
    message: Option<PartialMessage>,
    inflater: Option<Inflater>,
    is_lost: bool,
}

#[derive(Clone, Debug)]
struct Frame {
    is_last: bool,
    left: u64,
    mask: Option<[u8; 4]>,
    /// How many bytes were unmasked.
    at: usize,
    /// The message of a control frame, which may stand between the frames of another message.
    control: Option<PartialMessage>,
}

impl Reader {
    fn take(&mut self, mut bytes: &[u8]) -> Vec<PartialMessage> {
        let mut ended = Vec::new();
        while !self.is_lost && (!bytes.is_empty() || self.is_frame_over()) {
            match self.frame.take() {
                None => {
                    let Some((&byte, rest)) = bytes.split_first() else {
                        break;
                    };
                    bytes = rest;
                    self.head.push(byte);
                    self.read_head();
                }
                Some(mut frame) => {
                    let here = usize::try_from(frame.left).unwrap_or(usize::MAX);
                    let (payload, rest) = bytes.split_at(here.min(bytes.len()));
                    bytes = rest;
                    frame.left -= payload.len() as u64;
                    self.payload(&mut frame, payload);
                    if frame.left == 0 {
                        ended.extend(self.frame_ended(frame));
                    } else {
                        self.frame = Some(frame);
                    }
                }
            }
        }
        ended
    }

    fn is_frame_over(&self) -> bool {
        self.frame.as_ref().is_some_and(|frame| frame.left == 0)
    }

    fn read_head(&mut self) {
        let (&first, &second) = match self.head.as_slice() {
            [first, second, ..] => (first, second),
            _ => return,
        };
        let length_bytes = match second & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        let is_masked = second & 0x80 != 0;
        let needed = 2 + length_bytes + if is_masked { 4 } else { 0 };
        debug_assert!(needed <= MAX_FRAME_HEAD_BYTES);
        if self.head.len() < needed {
            return;
        }
        let left = match length_bytes {
            0 => u64::from(second & 0x7f),
            _ => self.head[2..2 + length_bytes]
                .iter()
                .fold(0, |length, &byte| length << 8 | u64::from(byte)),
        };
        let mask = is_masked
            .then(|| self.head[needed - 4..].try_into().ok())
            .flatten();
        self.head.clear();
        let opcode = first & 0x0f;
        let message = MessageKind::of(opcode).map(|kind| PartialMessage {
            kind,
            is_deflated: first & 0x40 != 0 && self.inflater.is_some(),
            kept: Vec::new(),
            bytes: 0,
        });
        let is_control = opcode >= 8;
        let control = match (opcode, message) {
            (0, _) => None,
            (_, None) => {
                self.is_lost = true;
                return;
            }
            (_, Some(message)) if is_control => Some(message),
            (_, Some(message)) => {
                self.message = Some(message);
                None
            }
        };
        self.frame = Some(Frame {
            is_last: first & 0x80 != 0,
            left,
            mask,
            at: 0,
            control,
        });
    }

    fn payload(&mut self, frame: &mut Frame, payload: &[u8]) {
        let at = frame.at;
        frame.at += payload.len();
        let Some(message) = frame.control.as_mut().or(self.message.as_mut()) else {
            return;
        };
        let inflater = self.inflater.as_mut().filter(|_| message.is_deflated);
        // What is neither inflated nor kept need not be unmasked.
        let wanted = match &inflater {
            Some(_) => payload.len(),
            None => payload.len().min(message.room()),
        };
        let mask = frame.mask.unwrap_or_default();
        let unmasked: Vec<u8> = payload[..wanted]
            .iter()
            .zip(at..)
            .map(|(byte, at)| byte ^ mask[at % mask.len()])
            .collect();
        match inflater {
            Some(inflater) => inflater.inflate(&unmasked, message),
            None => {
                message.kept.extend_from_slice(&unmasked);
                message.bytes += payload.len() as u64;
            }
        }
    }

    fn frame_ended(&mut self, frame: Frame) -> Option<PartialMessage> {
        if frame.control.is_some() {
            return frame.control;
        }
        if !frame.is_last {
            return None;
        }
        let mut message = self.message.take()?;
        if let Some(inflater) = self.inflater.as_mut().filter(|_| message.is_deflated) {
            inflater.inflate(&DEFLATE_TAIL, &mut message);
            inflater.message_ended();
        }
        Some(message)
    }
}

/// Inflates messages (RFC 7692).
#[derive(Debug)]
struct Inflater {
    decompress: Decompress,
    /// Each message stands for itself.
    resets: bool,
    /// Something could not be inflated, and neither can what follows.
    is_broken: bool,
}

impl Inflater {
    fn new(resets: bool) -> Self {
        Self {
            decompress: Decompress::new(false),
            resets,
            is_broken: false,
        }
    }

    fn inflate(&mut self, mut bytes: &[u8], message: &mut PartialMessage) {
        let mut inflated = vec![0; INFLATE_BYTES];
        while !self.is_broken {
            let before = (self.decompress.total_in(), self.decompress.total_out());
            let status = self
                .decompress
                .decompress(bytes, &mut inflated, FlushDecompress::Sync);
            let read = difference(before.0, self.decompress.total_in());
            let written = difference(before.1, self.decompress.total_out());
            bytes = &bytes[read..];
            message.push(&inflated[..written]);
            self.is_broken = status.is_err();
            if read == 0 && written == 0 || bytes.is_empty() && written < inflated.len() {
                return;
            }
        }
    }

    fn message_ended(&mut self) {
        if self.resets {
            self.decompress.reset(false);
        }
    }
}

/// How far a count of bytes has come, within one buffer.
fn difference(before: u64, after: u64) -> usize {
    usize::try_from(after - before).expect("no buffer is longer than memory")
}

/// A copy of a record is only read.
impl Clone for Inflater {
    fn clone(&self) -> Self {
        Self::new(self.resets)
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};
    use proptest::prelude::*;

    use super::*;

    fn conversation(extensions: &str) -> Conversation {
        let headers = [
            (header::UPGRADE, "WebSocket".parse().expect("a value")),
            (
                header::SEC_WEBSOCKET_EXTENSIONS,
                extensions.parse().expect("a value"),
            ),
        ];
        Conversation::begin(&headers.into_iter().collect()).expect("a WebSocket")
    }

    fn frame(first: u8, payload: &[u8], mask: Option<[u8; 4]>) -> Vec<u8> {
        let mask_bit = if mask.is_some() { 0x80 } else { 0 };
        let mut frame = vec![first];
        match payload.len() {
            length @ ..126 => frame.push(mask_bit | u8::try_from(length).expect("short")),
            length => {
                frame.push(mask_bit | 127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend(mask.iter().flatten());
        let mask = mask.unwrap_or_default();
        frame.extend(
            payload
                .iter()
                .zip(0..)
                .map(|(byte, at)| byte ^ mask[at % 4]),
        );
        frame
    }

    /// Compresses messages one after another with one context, as senders do.
    fn deflate(compress: &mut Compress, text: &str) -> Vec<u8> {
        let mut deflated = Vec::with_capacity(text.len() + 64);
        compress
            .compress_vec(text.as_bytes(), &mut deflated, FlushCompress::Sync)
            .expect("room");
        deflated.truncate(deflated.len() - DEFLATE_TAIL.len());
        deflated
    }

    fn texts(conversation: &Conversation) -> Vec<(MessageKind, String)> {
        conversation
            .messages()
            .map(|message| {
                let text = String::from_utf8_lossy(&message.kept).into_owned();
                (message.kind, text)
            })
            .collect()
    }

    #[test]
    fn messages_are_read_however_their_bytes_are_cut() {
        let mut compress = Compress::new(Compression::fast(), false);
        let mask = Some([1, 2, 3, 4]);
        let long = "tea and ".repeat(300);
        let stream = [
            frame(0x81, b"plain", mask),
            frame(0xc1, &deflate(&mut compress, &long), mask),
            frame(0x01, b"frag", mask),
            frame(0x89, b"ping", mask),
            frame(0x80, b"mented", mask),
            // It refers to the one before.
            frame(0xc1, &deflate(&mut compress, &long), mask),
            frame(0x82, b"", mask),
            frame(0x88, b"\x03\xe8bye", mask),
        ]
        .concat();
        for step in [1, 2, 3, 7, 1000, stream.len()] {
            let mut read = conversation("permessage-deflate");
            for bytes in stream.chunks(step) {
                read.take(Side::Visitor, Duration::ZERO, bytes);
            }
            assert_eq!(
                texts(&read),
                [
                    (MessageKind::Text, "plain".to_owned()),
                    (MessageKind::Text, long.clone()),
                    (MessageKind::Ping, "ping".to_owned()),
                    (MessageKind::Text, "fragmented".to_owned()),
                    (MessageKind::Text, long.clone()),
                    (MessageKind::Binary, String::new()),
                    (MessageKind::Close, "\u{3}\u{fffd}bye".to_owned()),
                ],
                "in steps of {step}"
            );
        }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut read = conversation("");
        let mut grown = 0;
        let large = frame(0x82, &vec![7; 3 * MAX_MESSAGE_BYTES], None);
        for _ in 0..200 {
            grown += read.take(Side::LocalService, Duration::ZERO, &large).0;
        }
        assert!(read.kept_bytes() <= MAX_CONVERSATION_BYTES);
        assert!(grown <= MAX_CONVERSATION_BYTES + MAX_MESSAGE_BYTES + MESSAGE_BYTES);
        assert_eq!(read.count(), 200);
        let newest = read.messages().last().expect("a message");
        assert_eq!(newest.bytes, 3 * MAX_MESSAGE_BYTES as u64);
        assert_eq!(newest.kept.len(), MAX_MESSAGE_BYTES);
        for _ in 0..2 * MAX_MESSAGES {
            read.take(Side::Visitor, Duration::ZERO, &frame(0x81, b"x", None));
        }
        assert_eq!(read.messages().len(), MAX_MESSAGES);
    }

    proptest! {
        #[test]
        fn no_bytes_are_a_panic(bytes: Vec<u8>, step in 1_usize..20, deflates: bool) {
            let mut read = conversation(if deflates { "permessage-deflate" } else { "" });
            for bytes in bytes.chunks(step) {
                read.take(Side::Visitor, Duration::ZERO, bytes);
            }
        }
    }
}
