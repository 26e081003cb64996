//! Taking a body in pieces of a wanted size, as it comes: full ones while it comes fast, short ones while it does not.

use bytes::Bytes;
use http_body::Body;
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};

use crate::{
    body::{self, compression},
    limits::{MAX_DECOMPRESSED_BYTES, MAX_PART_BYTES},
    message::Encoding,
};

/// A body from which pieces are taken.
#[derive(Debug)]
pub struct Chunker<B: Body> {
    body: B,
    left: Bytes,
    is_over: bool,
    /// How it broke off, after bytes that are still to be given out.
    broken_off: Option<B::Error>,
    /// How many bytes are packed into one piece; none where they are sent as they are.
    packed_at_once: Option<usize>,
}

/// As much of a body as goes into one message.
#[derive(Debug, Eq, PartialEq)]
pub struct Piece {
    /// The bytes.
    pub bytes: Bytes,
    /// How they are packed.
    pub encoding: Option<Encoding>,
    /// How many bytes of the body they are, unpacked.
    pub length: usize,
    /// The body goes on.
    pub more: bool,
}

impl<B: Body<Data = Bytes> + Unpin> Chunker<B> {
    /// Takes from `body`; packs what it gives if `packs`.
    pub fn new(body: B, packs: bool) -> Self {
        Self {
            body,
            left: Bytes::new(),
            is_over: false,
            broken_off: None,
            packed_at_once: packs.then_some(MAX_DECOMPRESSED_BYTES),
        }
    }

    /// Waits until there are bytes, or the end; tells which.
    ///
    /// # Errors
    /// When the body breaks off.
    pub async fn is_at_end(&mut self) -> Result<bool, B::Error> {
        while self.left.is_empty() && !self.is_over {
            if let Some(error) = self.broken_off.take() {
                return Err(error);
            }
            match self.body.frame().await {
                None => self.is_over = true,
                // Trailers are dropped: API Gateway has no way to pass them on.
                Some(frame) => self.left = frame?.into_data().unwrap_or_default(),
            }
        }
        Ok(self.left.is_empty())
    }

    /// Up to `limit` bytes, fewer only at the body's end.
    ///
    /// # Errors
    /// When the body breaks off.
    pub async fn take(&mut self, limit: usize) -> Result<Bytes, B::Error> {
        let (mut chunks, mut length) = (Vec::new(), 0);
        while length < limit && !self.is_at_end().await? {
            chunks.push(self.cut(limit, &mut length));
        }
        Ok(body::join(chunks))
    }

    /// What comes before `until`, if it fits into `room` bytes, packed or not; as much of it as fits otherwise.
    ///
    /// # Errors
    /// When the body breaks off.
    pub async fn piece(&mut self, room: usize, until: Instant) -> Result<Piece, B::Error> {
        let (mut bytes, more) = self
            .gather(self.packed_at_once.unwrap_or(room), until)
            .await?;
        while self.packed_at_once.is_some() {
            match compression::compress(&bytes) {
                Some(packed) if packed.len() <= room => {
                    let more = more || !self.left.is_empty();
                    return Ok(Piece {
                        bytes: packed,
                        encoding: Some(Encoding::Zstd),
                        length: bytes.len(),
                        more,
                    });
                }
                _ if bytes.len() > room => {
                    let rest = bytes.split_off((bytes.len() / 2).max(room));
                    self.put_back(rest);
                    // What follows is likely to be of the same kind.
                    self.packed_at_once = Some(bytes.len().max(MAX_PART_BYTES));
                }
                _ => break,
            }
        }
        Ok(Piece {
            length: bytes.len(),
            bytes,
            encoding: None,
            more: more || !self.left.is_empty(),
        })
    }

    /// Up to `limit` of the bytes that come before `until`, and whether the body goes on.
    async fn gather(&mut self, limit: usize, until: Instant) -> Result<(Bytes, bool), B::Error> {
        let (mut chunks, mut length) = (Vec::new(), 0);
        while let Ok(is_at_end) = timeout_at(until, self.is_at_end()).await {
            match is_at_end {
                Ok(false) if length < limit => {}
                Ok(_) => break,
                Err(error) if length > 0 => {
                    self.broken_off = Some(error);
                    break;
                }
                Err(error) => return Err(error),
            }
            chunks.push(self.cut(limit, &mut length));
        }
        Ok((body::join(chunks), !(self.is_over && self.left.is_empty())))
    }

    /// Gives back what was taken last and not used, to be taken again.
    fn put_back(&mut self, bytes: Bytes) {
        self.left = match (bytes.is_empty(), self.left.is_empty()) {
            (true, _) => return,
            (false, true) => bytes,
            (false, false) => body::join(vec![bytes, std::mem::take(&mut self.left)]),
        };
    }

    fn cut(&mut self, limit: usize, length: &mut usize) -> Bytes {
        let chunk = self.left.split_to(self.left.len().min(limit - *length));
        *length += chunk.len();
        chunk
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;
    use proptest::prelude::*;

    use super::*;

    fn pieces(body: &Bytes, room: usize, packs: bool) -> Vec<Piece> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let mut gathering = Chunker::new(Full::new(body.clone()), packs);
            let mut pieces = Vec::new();
            loop {
                let piece = gathering
                    .piece(room, Instant::now() + std::time::Duration::from_secs(1))
                    .await
                    .expect("a body never breaks off");
                let more = piece.more;
                pieces.push(piece);
                if !more {
                    return pieces;
                }
            }
        })
    }

    #[tokio::test]
    async fn what_came_before_a_body_broke_off_is_given_out() {
        let frames = [
            Ok(http_body::Frame::data(Bytes::from_static(b"hello"))),
            Err("broken"),
        ];
        let mut body = Chunker::new(
            http_body_util::StreamBody::new(futures_util::stream::iter(frames)),
            false,
        );
        let until = Instant::now() + std::time::Duration::from_secs(1);
        let piece = body.piece(100, until).await.expect("the bytes that came");
        assert_eq!((&piece.bytes[..], piece.more), (&b"hello"[..], true));
        assert_eq!(body.piece(100, until).await, Err("broken"));
    }

    #[test]
    fn what_packs_well_goes_into_few_pieces() {
        let body: Bytes = "a line of a log that is much like the others\n"
            .repeat(10_000)
            .into();
        assert_eq!(
            pieces(&body, 100_000, true).len(),
            body.len().div_ceil(MAX_DECOMPRESSED_BYTES)
        );
        assert_eq!(
            pieces(&body, 100_000, false).len(),
            body.len().div_ceil(100_000)
        );
    }

    proptest! {
        #[test]
        fn pieces_put_together_give_the_body_and_each_fits(
            word in prop::collection::vec(any::<u8>(), 1..3000),
            times in 1usize..40,
            room in 500usize..20_000,
            packs: bool,
        ) {
            let body: Bytes = word.repeat(times).into();
            let mut joined = Vec::new();
            for piece in pieces(&body, room, packs) {
                prop_assert!(piece.bytes.len() <= room);
                joined.extend(compression::decompress(piece.bytes, piece.encoding).expect("what was packed"));
            }
            prop_assert_eq!(joined, body);
        }
    }
}
