//! A body on its way in.

use bytes::Bytes;
use tokio::time::Instant;

use crate::body::{
    Chunk,
    budget::{BodyBudget, BudgetExceededError, BudgetShare},
    compression::DecompressError,
    reorder::{Reorder, ReorderError},
    window::ReceiveWindow,
};

/// Why a body cannot be received: its sender breaks the protocol, or this process holds too much already.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveBodyError {
    /// A part came too early.
    #[error(transparent)]
    Reorder(#[from] ReorderError),
    /// More parts came than are held for a slow reader. A sender that heeds the window never sends that many.
    #[error("the body is read too slowly")]
    Unread,
    /// A part cannot be decompressed.
    #[error(transparent)]
    Decompress(#[from] DecompressError),
    /// The process holds too many body bytes.
    #[error(transparent)]
    Budget(#[from] BudgetExceededError),
}

/// A body's next bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ReceivedChunk {
    /// The bytes as they were before compression.
    pub bytes: Bytes,
    /// More of the body follows.
    pub more: bool,
    /// What `window` is to allow the sender from now on, when it is time to say so.
    pub window: Option<u32>,
}

/// Takes a body's parts in any order and gives out its bytes in theirs.
///
/// The chunk that came beside the head is part 0. At most [`crate::limits::MAX_REORDER_PARTS`] parts are held, and no more bytes
/// than the budget allows.
#[derive(Debug)]
pub struct BodyReceiver {
    parts: Reorder<Chunk>,
    window: ReceiveWindow,
    held: BudgetShare,
    missing_since: Option<Instant>,
    is_over: bool,
}

impl BodyReceiver {
    /// Expects part 0, and holds what `budget` allows.
    pub fn new(budget: &BodyBudget) -> Self {
        Self {
            parts: Reorder::starting_at(0),
            window: ReceiveWindow::default(),
            held: budget.share(),
            missing_since: None,
            is_over: false,
        }
    }

    /// Accepts a part. If it was seen before, it is ignored: the first one counts. So is what comes after the last.
    ///
    /// # Errors
    /// If it is too far ahead, or the budget does not allow it. It is not held then, so the body cannot be completed any more.
    pub fn insert(&mut self, number: u32, chunk: Chunk) -> Result<(), ReceiveBodyError> {
        if self.is_over || self.parts.has_seen(number) {
            return Ok(());
        }
        let bytes = chunk.bytes.len();
        self.held.hold(bytes)?;
        if let Err(error) = self.parts.insert(number, chunk) {
            self.held.release(bytes);
            let is_unread = !self.parts.is_empty() && !self.parts.is_incomplete();
            return Err(if is_unread {
                ReceiveBodyError::Unread
            } else {
                error.into()
            });
        }
        self.note_missing();
        Ok(())
    }

    /// The bytes of the next part, if it is there. Nothing comes after the last.
    ///
    /// # Errors
    /// If they cannot be decompressed.
    pub fn next_chunk(&mut self) -> Result<Option<ReceivedChunk>, ReceiveBodyError> {
        if self.is_over {
            return Ok(None);
        }
        let Some(chunk) = self.parts.take_next() else {
            return Ok(None);
        };
        self.held.release(chunk.bytes.len());
        self.note_missing();
        let more = chunk.more;
        self.is_over = !more;
        let bytes = chunk.decompress()?;
        let window = self.window.part_used().filter(|_| more);
        Ok(Some(ReceivedChunk {
            bytes,
            more,
            window,
        }))
    }

    /// Since when the next part has been missing while a later one is there.
    pub fn missing_since(&self) -> Option<Instant> {
        self.missing_since
    }

    /// The number of the next part to be given out.
    pub fn next_number(&self) -> u32 {
        self.parts.expected()
    }

    /// Whether no part has come.
    pub fn has_nothing(&self) -> bool {
        self.parts.expected() == 0 && self.parts.is_empty()
    }

    /// Whether the last part has been given out.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    fn note_missing(&mut self) {
        self.missing_since = if self.parts.is_incomplete() {
            self.missing_since.or_else(|| Some(Instant::now()))
        } else {
            None
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::MAX_REORDER_PARTS;

    #[test]
    fn what_a_reader_leaves_lying_and_what_comes_too_early_are_told_apart() {
        let more = |number: usize| {
            let chunk = Chunk {
                more: true,
                ..Chunk::default()
            };
            (u32::try_from(number).expect("small"), chunk)
        };
        let mut body = BodyReceiver::new(&BodyBudget::default());
        for number in 0..MAX_REORDER_PARTS {
            let (number, chunk) = more(number);
            body.insert(number, chunk).expect("room");
        }
        let (number, chunk) = more(MAX_REORDER_PARTS);
        let error = body.insert(number, chunk.clone()).expect_err("no room");
        assert!(matches!(error, ReceiveBodyError::Unread), "{error:?}");
        body.next_chunk().expect("bytes").expect("part 0");
        body.insert(number, chunk.clone()).expect("room again");

        let mut body = BodyReceiver::new(&BodyBudget::default());
        let error = body.insert(number, chunk).expect_err("too early");
        assert!(matches!(error, ReceiveBodyError::Reorder(_)), "{error:?}");
    }
}
