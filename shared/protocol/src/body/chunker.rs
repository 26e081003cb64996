//! Cuts a body into the chunks that messages carry: full or nearly full ones while it comes fast, short ones while it does not.

use bytes::Bytes;
use futures_util::FutureExt;
use http_body::Body;
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};

use crate::{
    body::{self, Chunk, compression},
    limits::{MAX_DECOMPRESSED_BYTES, MAX_PART_BYTES},
    message::Encoding,
};

/// A body from which chunks are cut.
pub(super) struct Chunker<B: Body> {
    body: B,
    /// Bytes that the body gave and no chunk has yet.
    unsent: Bytes,
    is_over: bool,
    /// Why the body broke off, while bytes from before that are still to be given out.
    broken_off: Option<B::Error>,
    /// How many bytes are compressed into one chunk; `None` where they are sent as they are.
    compress_at_once: Option<usize>,
    /// Chunks are filled. Otherwise one ends where a read did if it or the next one is nearly full then, and nothing has to be copied
    /// together.
    fills: bool,
    cut_bytes: u64,
}

impl<B: Body<Data = Bytes> + Unpin> Chunker<B> {
    /// Cuts `body`; compresses the chunks where that makes them shorter if `compresses`. Chunks are full while the body comes fast,
    /// if it `fills` them, and nearly full otherwise.
    pub(super) fn new(body: B, compresses: bool, fills: bool) -> Self {
        Self {
            body,
            unsent: Bytes::new(),
            is_over: false,
            broken_off: None,
            compress_at_once: compresses.then_some(MAX_DECOMPRESSED_BYTES),
            fills,
            cut_bytes: 0,
        }
    }

    /// How many bytes of the body have been given out, counted before compression.
    pub(super) fn cut_bytes(&self) -> u64 {
        self.cut_bytes
    }

    /// How long the body is, where it says so.
    pub(super) fn exact_length(&self) -> Option<u64> {
        self.body.size_hint().exact()
    }

    /// Waits until the body has more bytes or has ended, and returns whether it has ended.
    pub(super) async fn is_at_end(&mut self) -> Result<bool, B::Error> {
        while self.unsent.is_empty() && !self.is_over {
            if let Some(error) = self.broken_off.take() {
                return Err(error);
            }
            match self.body.frame().await {
                None => self.is_over = true,
                // Trailers are dropped: API Gateway has no way to pass them on.
                Some(frame) => self.unsent = frame?.into_data().unwrap_or_default(),
            }
        }
        Ok(self.unsent.is_empty())
    }

    /// Like [`Chunker::is_at_end`]; `None` if that is not known by then.
    async fn is_at_end_by(&mut self, until: Option<Instant>) -> Option<Result<bool, B::Error>> {
        match until {
            Some(until) => timeout_at(until, self.is_at_end()).await.ok(),
            None => self.is_at_end().now_or_never(),
        }
    }

    /// The whole body, uncompressed; `None` if it is longer than `room` bytes.
    pub(super) async fn whole(&mut self, room: usize) -> Result<Option<Bytes>, B::Error> {
        let (mut runs, mut length) = (Vec::new(), 0);
        while !self.is_at_end().await? {
            if length == room {
                return Ok(None);
            }
            runs.push(self.cut(room, &mut length));
        }
        self.cut_bytes += length as u64;
        Ok(Some(body::join(runs)))
    }

    /// What comes before `until`, or is there already if that is `None`, if it fits into `room` bytes, compressed or not; as much
    /// of it as fits otherwise. Bytes that came before the body broke off are given out first.
    pub(super) async fn chunk(
        &mut self,
        room: usize,
        until: Option<Instant>,
    ) -> Result<Chunk, B::Error> {
        let mut bytes = self
            .gather(self.compress_at_once.unwrap_or(room), until)
            .await?;
        let compressed = if self.compress_at_once.is_some() {
            self.compress_into(room, &mut bytes)
        } else {
            None
        };
        self.cut_bytes += bytes.len() as u64;
        let more = !(self.is_over && self.unsent.is_empty());
        Ok(match compressed {
            Some(bytes) => Chunk {
                bytes,
                encoding: Some(Encoding::Zstd),
                more,
            },
            None => Chunk {
                bytes,
                encoding: None,
                more,
            },
        })
    }

    /// Compresses as many of `bytes` as fit into `room` then, and puts the others back. `None` if they fit as they are and
    /// would get no shorter.
    fn compress_into(&mut self, room: usize, bytes: &mut Bytes) -> Option<Bytes> {
        loop {
            match compression::compress(bytes) {
                Some(compressed) if compressed.len() <= room => return Some(compressed),
                _ if bytes.len() > room => {
                    let rest = bytes.split_off((bytes.len() / 2).max(room));
                    self.put_back(rest);
                    // What follows is likely to be of the same kind.
                    self.compress_at_once = Some(bytes.len().max(MAX_PART_BYTES));
                }
                _ => return None,
            }
        }
    }

    /// Up to `limit` of the bytes that come before `until`.
    async fn gather(&mut self, limit: usize, until: Option<Instant>) -> Result<Bytes, B::Error> {
        let (mut runs, mut length) = (Vec::new(), 0);
        while let Some(is_at_end) = self.is_at_end_by(until).await {
            match is_at_end {
                Ok(false) if length < limit && self.takes_more(limit, length) => {}
                Ok(_) => break,
                Err(error) if length > 0 => {
                    self.broken_off = Some(error);
                    break;
                }
                Err(error) => return Err(error),
            }
            runs.push(self.cut(limit, &mut length));
        }
        Ok(body::join(runs))
    }

    /// Whether a chunk of up to `limit` bytes, of which it has `length`, takes some of what came next.
    fn takes_more(&self, limit: usize, length: usize) -> bool {
        let next = self.unsent.len();
        let is_nearly_full = |length: usize| 4 * length >= 3 * limit;
        self.fills
            || next <= limit - length
            || !(is_nearly_full(length) || next <= limit && is_nearly_full(next))
    }

    /// Gives back what was cut last and not used, to be cut again.
    fn put_back(&mut self, bytes: Bytes) {
        self.unsent = match (bytes.is_empty(), self.unsent.is_empty()) {
            (true, _) => return,
            (false, true) => bytes,
            (false, false) => body::join(vec![bytes, std::mem::take(&mut self.unsent)]),
        };
    }

    fn cut(&mut self, limit: usize, length: &mut usize) -> Bytes {
        let run = self.unsent.split_to(self.unsent.len().min(limit - *length));
        *length += run.len();
        run
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::{Full, StreamBody};
    use proptest::prelude::*;

    use super::*;

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_secs(1))
    }

    /// The chunks of a body that comes in reads of so many bytes.
    fn chunks(body: &Bytes, read: usize, room: usize, compresses: bool, fills: bool) -> Vec<Chunk> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let reads = body.chunks(read).map(Bytes::copy_from_slice);
            let frames = reads.map(|bytes| Ok::<_, std::io::Error>(http_body::Frame::data(bytes)));
            let frames = StreamBody::new(futures_util::stream::iter(frames));
            let mut chunker = Chunker::new(frames, compresses, fills);
            let mut chunks = Vec::new();
            loop {
                let chunk = chunker
                    .chunk(room, soon())
                    .await
                    .expect("a body that does not break off");
                let more = chunk.more;
                chunks.push(chunk);
                if !more {
                    assert_eq!(chunker.cut_bytes(), body.len() as u64);
                    return chunks;
                }
            }
        })
    }

    #[tokio::test]
    async fn bytes_received_before_a_body_broke_off_are_delivered() {
        let frames = [
            Ok(http_body::Frame::data(Bytes::from_static(b"hello"))),
            Err("broken"),
        ];
        let body = StreamBody::new(futures_util::stream::iter(frames));
        let mut chunker = Chunker::new(body, false, true);
        let chunk = chunker.chunk(100, soon()).await.expect("bytes");
        assert_eq!((&chunk.bytes[..], chunk.more), (&b"hello"[..], true));
        assert_eq!(chunker.chunk(100, soon()).await, Err("broken"));
    }

    #[tokio::test]
    async fn chunks_are_full_or_nearly_full_and_end_where_a_read_did() {
        for (fills, lengths) in [(true, [12, 12, 12, 4]), (false, [9, 12, 8, 11])] {
            let reads = [6, 3, 8, 4, 8, 11].map(|length| vec![7; length].into());
            let frames = reads.map(|bytes| Ok::<_, std::io::Error>(http_body::Frame::data(bytes)));
            let body = StreamBody::new(futures_util::stream::iter(frames));
            let mut chunker = Chunker::new(body, false, fills);
            for length in lengths {
                let chunk = chunker.chunk(12, soon()).await.expect("bytes");
                assert_eq!(chunk.bytes.len(), length, "{fills}");
            }
            assert!(chunker.is_at_end().await.expect("no fault"), "{fills}");
        }
        let body = Full::new(Bytes::from(vec![7; 25]));
        let mut chunker = Chunker::new(body, false, false);
        for length in [12, 12, 1] {
            let chunk = chunker.chunk(12, soon()).await.expect("bytes");
            assert_eq!(chunk.bytes.len(), length, "one read, longer than a chunk");
        }
    }

    #[tokio::test]
    async fn a_whole_body_is_read_up_to_the_available_room() {
        for (length, fits) in [(0, true), (9, true), (10, true), (11, false), (40, false)] {
            let mut chunker = Chunker::new(Full::new(Bytes::from(vec![7; length])), false, true);
            let whole = chunker.whole(10).await.expect("a body");
            assert_eq!(whole.map(|bytes| bytes.len()), fits.then_some(length));
        }
    }

    #[test]
    fn compressible_bytes_go_into_few_chunks() {
        let body: Bytes = "a line of a log that is much like the others\n"
            .repeat(10_000)
            .into();
        assert_eq!(
            chunks(&body, usize::MAX, 100_000, true, true).len(),
            body.len().div_ceil(MAX_DECOMPRESSED_BYTES)
        );
        assert_eq!(
            chunks(&body, usize::MAX, 100_000, false, true).len(),
            body.len().div_ceil(100_000)
        );
    }

    proptest! {
        #[test]
        fn chunks_fit_and_make_up_the_body(
            word in prop::collection::vec(any::<u8>(), 1..3000),
            times in 1usize..40,
            room in 500usize..20_000,
            read in 1usize..30_000,
            compresses: bool,
            fills: bool,
        ) {
            let body: Bytes = word.repeat(times).into();
            let mut joined = Vec::new();
            for chunk in chunks(&body, read, room, compresses, fills) {
                prop_assert!(chunk.bytes.len() <= room);
                joined.extend(chunk.decompress().expect("what was compressed"));
            }
            prop_assert_eq!(joined, body);
        }
    }
}
