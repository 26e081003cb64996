//! A visitor's bytes on their way to hyper: request after request, each with a head that was checked. Where a request ends is
//! counted here, so that no byte of it is taken for the head of the next, however the bytes are cut and however many requests
//! were sent ahead.

use std::mem;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::ReadBuf;

use crate::front::request_head::{self, Framing, RequestHeadError};

/// What hyper gets in place of a head that is refused, so that it requests an answer.
const REFUSED_GET: &[u8] = b"GET / HTTP/1.1\r\nHost: refused\r\nConnection: close\r\n\r\n";
const REFUSED_HEAD: &[u8] = b"HEAD / HTTP/1.1\r\nHost: refused\r\nConnection: close\r\n\r\n";

/// Where in the stream of requests the next byte is.
#[derive(Debug)]
enum Position {
    /// In a head.
    Head,
    /// In a body with this many bytes to come.
    Body(u64),
    /// In a body of chunks.
    Chunks(ChunkScanner),
    /// Behind a request that was refused: nothing is read any more.
    Refused,
    /// Behind an upgrade: the bytes are not HTTP.
    Upgraded,
}

/// The visitor's stream, checked.
#[derive(Debug)]
pub(crate) struct RequestStream {
    position: Position,
    /// Read from the visitor and not looked at yet.
    input: BytesMut,
    /// For hyper.
    output: Bytes,
}

/// What the reader is to do.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Step {
    /// Bytes were handed on, or the stream is over.
    Done,
    /// The head of a request was completed. The reader records it, and continues.
    Request(Result<(), RequestHeadError>),
    /// Read more of a head into [`RequestStream::input`].
    ReadHead,
    /// Read up to this many bytes of a body straight for hyper, and pass them to [`RequestStream::pass`].
    ReadBody(usize),
}

impl RequestStream {
    pub(crate) fn new() -> Self {
        Self {
            position: Position::Head,
            input: BytesMut::new(),
            output: Bytes::new(),
        }
    }

    /// From here on bytes are handed on as they come, and no room is kept for heads.
    pub(crate) fn upgrade(&mut self) {
        self.position = Position::Upgraded;
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
    }

    /// Whether all of the last request was handed on, so that what follows is not its body.
    pub(crate) fn is_between_requests(&self) -> bool {
        matches!(self.position, Position::Head | Position::Refused)
    }

    /// Where the bytes of heads are read into.
    pub(crate) fn input(&mut self) -> &mut BytesMut {
        &mut self.input
    }

    /// Hands on what there is, and tells what to do next.
    pub(crate) fn step(&mut self, buffer: &mut ReadBuf<'_>) -> Step {
        if self.output.has_remaining() {
            let length = self.output.len().min(buffer.remaining());
            buffer.put_slice(&self.output.split_to(length));
            return Step::Done;
        }
        if matches!(self.position, Position::Head) {
            return self.take_head();
        }
        if matches!(self.position, Position::Refused) {
            return Step::Done;
        }
        if self.input.has_remaining() {
            let length = self.input.len().min(buffer.remaining());
            let before = buffer.filled().len();
            buffer.put_slice(&self.input.split_to(length));
            self.pass(buffer, before);
            return Step::Done;
        }
        let most = match self.position {
            Position::Body(left) => usize::try_from(left).unwrap_or(usize::MAX),
            _ => usize::MAX,
        };
        Step::ReadBody(most.min(buffer.remaining()))
    }

    /// Looks at what was put into `buffer` behind `before`, and takes back what is not of this request's body.
    pub(crate) fn pass(&mut self, buffer: &mut ReadBuf<'_>, before: usize) {
        let bytes = &buffer.filled()[before..];
        let taken = match &mut self.position {
            Position::Body(left) => {
                let taken = usize::try_from(*left)
                    .unwrap_or(usize::MAX)
                    .min(bytes.len());
                *left -= taken as u64;
                if *left == 0 {
                    self.position = Position::Head;
                }
                taken
            }
            Position::Chunks(scanner) => match scanner.scan(bytes) {
                ChunkScan::Inside => bytes.len(),
                ChunkScan::End(taken) => {
                    self.position = Position::Head;
                    taken
                }
                // hyper reads up to the fault, and finds the body cut there.
                ChunkScan::Fault(taken) => {
                    self.position = Position::Refused;
                    taken
                }
            },
            Position::Head | Position::Refused => 0,
            Position::Upgraded => bytes.len(),
        };
        if taken < bytes.len() {
            let mut rest = BytesMut::from(&bytes[taken..]);
            rest.extend_from_slice(&mem::take(&mut self.input));
            self.input = rest;
            buffer.set_filled(before + taken);
        }
    }

    fn take_head(&mut self) -> Step {
        // A line end before a request is nothing (RFC 9112, 2.2).
        while self
            .input
            .first()
            .is_some_and(|byte| matches!(byte, b'\r' | b'\n'))
        {
            self.input.advance(1);
        }
        if self.input.is_empty() {
            return Step::ReadHead;
        }
        match request_head::take(&mut self.input) {
            Ok(None) => Step::ReadHead,
            Ok(Some(head)) => {
                self.output = head.bytes;
                self.position = match head.framing {
                    Framing::Length(0) => Position::Head,
                    Framing::Length(length) => Position::Body(length),
                    Framing::Chunked => Position::Chunks(ChunkScanner::default()),
                };
                Step::Request(Ok(()))
            }
            Err(error) => {
                let is_head = self.input.starts_with(b"HEAD ");
                self.output = Bytes::from_static(if is_head { REFUSED_HEAD } else { REFUSED_GET });
                self.position = Position::Refused;
                Step::Request(Err(error))
            }
        }
    }
}

/// Finds the end of a chunked body (RFC 9112, 7.1). It takes what hyper takes, or less.
#[derive(Debug, Default)]
pub(crate) struct ChunkScanner {
    at: ChunkPosition,
    /// Of the chunk that is being read: its size, and then what is left of it.
    size: u64,
}

#[derive(Clone, Copy, Debug, Default)]
enum ChunkPosition {
    /// Before the first digit of a size.
    #[default]
    Size,
    /// Behind at least one digit.
    SizeDigits,
    /// In what may follow the size on its line.
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// At the start of a line behind the last chunk.
    TrailerLine,
    Trailer,
    TrailerLf,
    EndLf,
}

/// What was found.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum ChunkScan {
    /// All of it is within the body.
    Inside,
    /// The body ended behind this many bytes.
    End(usize),
    /// What follows this many bytes is not a chunk.
    Fault(usize),
}

impl ChunkScanner {
    /// Goes through the next bytes of the body.
    pub(crate) fn scan(&mut self, bytes: &[u8]) -> ChunkScan {
        let mut at = 0;
        while let Some(byte) = bytes.get(at) {
            if matches!(self.at, ChunkPosition::Data) {
                let inside = usize::try_from(self.size)
                    .unwrap_or(usize::MAX)
                    .min(bytes.len() - at);
                self.size -= inside as u64;
                at += inside;
                if self.size == 0 {
                    self.at = ChunkPosition::DataCr;
                }
                continue;
            }
            match self.next(*byte) {
                None => return ChunkScan::Fault(at),
                Some(true) => return ChunkScan::End(at + 1),
                Some(false) => at += 1,
            }
        }
        ChunkScan::Inside
    }

    /// Takes a byte outside a chunk's data, and tells whether it was the body's last; `None` if it may not stand there.
    fn next(&mut self, byte: u8) -> Option<bool> {
        use ChunkPosition as At;
        self.at = match (self.at, byte) {
            (At::Size | At::SizeDigits, digit) if digit.is_ascii_hexdigit() => {
                let value = char::from(digit).to_digit(16)?;
                self.size = self.size.checked_mul(16)?.checked_add(value.into())?;
                At::SizeDigits
            }
            (At::SizeDigits | At::Extension, b'\r') => At::SizeLf,
            (At::SizeDigits, b' ' | b'\t' | b';') => At::Extension,
            (At::Extension, byte) if byte != b'\n' => At::Extension,
            (At::SizeLf, b'\n') if self.size == 0 => At::TrailerLine,
            (At::SizeLf, b'\n') => At::Data,
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => At::Size,
            (At::TrailerLine, b'\r') => At::EndLf,
            (At::EndLf, b'\n') => return Some(true),
            (At::Trailer, b'\r') => At::TrailerLf,
            (At::TrailerLine | At::Trailer, _) => At::Trailer,
            (At::TrailerLf, b'\n') => At::TrailerLine,
            _ => return None,
        };
        Some(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What hyper gets of `sent` that comes in pieces of `piece` bytes, and what was found of each request.
    fn through(sent: &[u8], piece: usize) -> (Vec<u8>, Vec<Result<(), RequestHeadError>>) {
        let mut stream = RequestStream::new();
        let mut pieces = sent.chunks(piece);
        let (mut got, mut requests) = (Vec::new(), Vec::new());
        loop {
            let mut room = [0; 64];
            let mut buffer = ReadBuf::new(&mut room);
            match stream.step(&mut buffer) {
                Step::Done if buffer.filled().is_empty() => return (got, requests),
                Step::Done => got.extend_from_slice(buffer.filled()),
                Step::Request(outcome) => requests.push(outcome),
                Step::ReadHead => match pieces.next() {
                    Some(piece) => stream.input().extend_from_slice(piece),
                    None => return (got, requests),
                },
                Step::ReadBody(most) => {
                    let Some(piece) = pieces.next() else {
                        return (got, requests);
                    };
                    let (now, later) = piece.split_at(most.min(piece.len()));
                    buffer.put_slice(now);
                    stream.pass(&mut buffer, 0);
                    stream.input().extend_from_slice(later);
                    got.extend_from_slice(buffer.filled());
                }
            }
        }
    }

    #[test]
    fn every_request_is_checked_however_many_were_sent_ahead_and_however_they_are_cut() {
        let get = "GET /t/A HTTP/1.1\r\nHost: x\r\n\r\n";
        let post = "POST /t/B HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello";
        let chunked = "PUT /t/C HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n\
                       5;a=\"\r\n0\r\n\r\n\"\r\nhello\r\n0\r\nA: b\r\n\r\n"
            .replace("5;a=\"\r\n0\r\n\r\n\"\r\n", "5;a=b\r\n");
        let good = [get, post, &chunked, get, post, get].concat();
        let two_lengths = "POST /t/D HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\
                           Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
        let sent = [&good, two_lengths, get].concat();
        for piece in 1..=sent.len() {
            let (got, requests) = through(sent.as_bytes(), piece);
            let expected = [good.as_bytes(), REFUSED_GET].concat();
            assert!(
                got == expected,
                "{piece}: {}",
                String::from_utf8_lossy(&got)
            );
            assert_eq!(requests.len(), 7, "{piece}");
            assert_eq!(
                requests.iter().filter(|request| request.is_ok()).count(),
                6,
                "{piece}"
            );
        }
    }

    #[test]
    fn the_bytes_behind_a_chunked_body_are_the_next_request_and_a_fault_ends_it() {
        let head = "POST /t/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
        let next = "GET /t/ HTTP/1.1\r\nHost: x\r\n\r\n";
        for (body, is_whole) in [
            ("0\r\n\r\n", true),
            ("3\r\nabc\r\n00\r\n\r\n", true),
            ("A\r\n0123456789\r\n0\r\n\r\n", true),
            ("3 \t;x=\"y\"\r\nabc\r\n0\r\nA: b\r\nB: c\r\n\r\n", true),
            ("3\nabc\n0\n\n", false),
            ("3;a\nabc\r\n0\r\n\r\n", false),
            ("3\r\nabcXX0\r\n\r\n", false),
            ("-3\r\nabc\r\n0\r\n\r\n", false),
            ("0x3\r\nabc\r\n0\r\n\r\n", false),
            ("\r\n\r\n", false),
            (";a\r\n\r\n", false),
            ("10000000000000003\r\nabc\r\n0\r\n\r\n", false),
        ] {
            for piece in [1, 2, 7, 1000] {
                let sent = [head, body, next].concat();
                let (got, requests) = through(sent.as_bytes(), piece);
                if is_whole {
                    assert!(got == sent.as_bytes(), "{body:?} {piece}");
                } else {
                    assert!(got.len() < head.len() + body.len(), "{body:?} {piece}");
                }
                assert_eq!(
                    requests.len(),
                    1 + usize::from(is_whole),
                    "{body:?} {piece}"
                );
            }
        }
    }
}
