//! A body on its way out.

use std::{fmt, time::Duration};

use bytes::Bytes;
use http_body::Body;
use tokio::time::Instant;

use crate::{
    body::{Chunk, Part, chunker::Chunker, window::SendWindow, window::WindowClosedError},
    message::Format,
};

/// How long bytes wait for more to join them: too short to notice, and each message costs money.
const COALESCE_TIMEOUT: Duration = Duration::from_millis(10);
/// How long a body that will fit into the first message is waited for.
const COALESCE_WHOLE_TIMEOUT: Duration = Duration::from_millis(50);

/// How a body is cut into chunks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mode {
    /// For HTTP bodies: bytes wait a few milliseconds for more, so that messages are few.
    Coalesced {
        /// Chunks are compressed where that makes them shorter.
        compress: bool,
    },
    /// For upgraded connections: each byte goes out at once, as it is.
    Raw,
}

/// Why a body could not be sent to its end.
#[derive(Debug, thiserror::Error)]
pub enum SendBodyError<E> {
    /// The body broke off.
    #[error("the body broke off")]
    Body(#[source] E),
    /// Its receiver is gone.
    #[error(transparent)]
    WindowClosed(#[from] WindowClosedError),
}

/// Cuts a body into a first chunk, which goes beside a head, and numbered parts, each when the receiver's window allows it.
///
/// The futures of its methods must be awaited to their end: dropped before that, they lose the bytes they have taken.
pub struct BodySender<B: Body> {
    chunker: Chunker<B>,
    mode: Mode,
    max_part_bytes: usize,
    next_part: u32,
    is_over: bool,
}

impl<B: Body> fmt::Debug for BodySender<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BodySender")
            .field("mode", &self.mode)
            .field("next_part", &self.next_part)
            .field("is_over", &self.is_over)
            .finish_non_exhaustive()
    }
}

impl<B: Body<Data = Bytes> + Unpin> BodySender<B> {
    /// Sends `body` to a peer that reads `format`.
    pub fn new(body: B, mode: Mode, format: Format) -> Self {
        let compress = mode == Mode::Coalesced { compress: true };
        Self {
            // Each text message is paid for, and binary ones are not.
            chunker: Chunker::new(body, compress, format == Format::Text),
            mode,
            max_part_bytes: format.max_part_bytes(),
            next_part: 0,
            is_over: false,
        }
    }

    /// The first chunk, of up to `room` bytes: see [`super::room_beside`]. It is empty if no bytes arrived in time.
    ///
    /// # Errors
    /// If the body breaks off before its first byte.
    pub async fn first_chunk(&mut self, room: usize) -> Result<Chunk, B::Error> {
        let fits = self
            .chunker
            .exact_length()
            .is_some_and(|length| length <= room as u64);
        let timeout = if fits {
            COALESCE_WHOLE_TIMEOUT
        } else {
            COALESCE_TIMEOUT
        };
        let chunk = self.chunker.chunk(room, self.until(timeout)).await?;
        self.is_over = !chunk.more;
        self.next_part = 1;
        Ok(chunk)
    }

    /// Begins with part 1, where the head goes without a chunk of the body.
    pub fn begin(&mut self) {
        self.next_part = 1;
    }

    /// The whole body as one chunk, for receivers that take no parts; `None` if it is longer than `room` bytes.
    ///
    /// # Errors
    /// If the body breaks off.
    pub async fn whole(&mut self, room: usize) -> Result<Option<Chunk>, B::Error> {
        let whole = self.chunker.whole(room).await?;
        self.is_over = whole.is_some();
        Ok(whole.map(Chunk::last))
    }

    /// The next part, once there are bytes for it and `window` allows it; `None` after the last. Receivers that do not know of
    /// windows have none.
    ///
    /// # Errors
    /// If the body breaks off, or the window closes.
    pub async fn next_part(
        &mut self,
        window: Option<&mut SendWindow>,
    ) -> Result<Option<Part>, SendBodyError<B::Error>> {
        if self.is_over {
            return Ok(None);
        }
        if let Some(window) = window {
            // Before the bytes are taken: a slow receiver slows the body's source down.
            window.wait_for(self.next_part).await?;
        }
        self.chunker
            .is_at_end()
            .await
            .map_err(SendBodyError::Body)?;
        let chunk = self
            .chunker
            .chunk(self.max_part_bytes, self.until(COALESCE_TIMEOUT))
            .await
            .map_err(SendBodyError::Body)?;
        self.is_over = !chunk.more;
        let number = self.next_part;
        self.next_part = number.saturating_add(1);
        Ok(Some(Part { number, chunk }))
    }

    /// Until when bytes wait for more; `None` where they do not.
    fn until(&self, timeout: Duration) -> Option<Instant> {
        match self.mode {
            Mode::Coalesced { .. } => Some(Instant::now() + timeout),
            Mode::Raw => None,
        }
    }

    /// How many bytes of the body have been given out, counted before compression.
    pub fn sent_bytes(&self) -> u64 {
        self.chunker.cut_bytes()
    }
}
