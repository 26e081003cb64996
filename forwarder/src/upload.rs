//! The rest of a request's body, on its way from the connection to the local service.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc::{self, error::TrySendError};
use tunnel_protocol::{
    body::{
        budget::{BodyBudget, BudgetExceededError, BudgetShare},
        reorder::{Reorder, ReorderError},
    },
    limits::MAX_REORDER_PARTS,
    message::BodyPart,
};

/// The parts of a request's body that follow its first message, in order, up to the one that says it is the last. Closed before
/// that, the body has broken off.
pub(crate) type BodyParts = mpsc::Receiver<HeldPart>;

/// Why the rest of a body cannot be handed on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FeedError {
    #[error(transparent)]
    Reorder(#[from] ReorderError),
    #[error(transparent)]
    Budget(#[from] BudgetExceededError),
    /// Only a service that does not heed `window` sends more than fits.
    #[error("the local service reads the request too slowly")]
    TooSlow,
}

/// Takes the parts of one body as they arrive, and hands them on in their order.
#[derive(Debug)]
pub(crate) struct UploadFeed {
    parts: Reorder<HeldPart>,
    share: Arc<Mutex<BudgetShare>>,
    to_origin: mpsc::Sender<HeldPart>,
}

/// A part, which counts towards the budget for as long as it waits.
#[derive(Debug)]
pub(crate) struct HeldPart {
    part: BodyPart,
    _held: HeldBytes,
}

#[derive(Debug)]
struct HeldBytes {
    share: Arc<Mutex<BudgetShare>>,
    bytes: usize,
}

impl HeldPart {
    /// The part, which does not count any more.
    pub(crate) fn into_part(self) -> BodyPart {
        self.part
    }
}

impl Drop for HeldBytes {
    fn drop(&mut self) {
        lock(&self.share).release(self.bytes);
    }
}

impl UploadFeed {
    /// A feed that holds what `budget` allows, and where the parts come out.
    pub(crate) fn new(budget: &BodyBudget) -> (Self, BodyParts) {
        let (to_origin, parts) = mpsc::channel(MAX_REORDER_PARTS);
        let feed = Self {
            parts: Reorder::starting_at(1),
            share: Arc::new(Mutex::new(budget.share())),
            to_origin,
        };
        (feed, parts)
    }

    /// Takes a part, and hands on what is in order now. Returns whether more is to come.
    pub(crate) fn take(&mut self, part: BodyPart) -> Result<bool, FeedError> {
        if self.parts.has_seen(part.part) {
            return Ok(true);
        }
        let held = self.hold(part.body.0.len())?;
        let number = part.part;
        self.parts.insert(number, HeldPart { part, _held: held })?;
        while let Some(next) = self.parts.take_next() {
            let more = next.part.more;
            match self.to_origin.try_send(next) {
                // The local service has answered without reading all; that is its right.
                Ok(()) | Err(TrySendError::Closed(_)) => {}
                Err(TrySendError::Full(_)) => return Err(FeedError::TooSlow),
            }
            if !more {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn hold(&self, bytes: usize) -> Result<HeldBytes, BudgetExceededError> {
        lock(&self.share).hold(bytes)?;
        Ok(HeldBytes {
            share: self.share.clone(),
            bytes,
        })
    }
}

/// Held between awaits only.
fn lock(share: &Mutex<BudgetShare>) -> std::sync::MutexGuard<'_, BudgetShare> {
    share.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tunnel_protocol::message::Body;

    use super::*;

    fn part(number: u32, bytes: usize, more: bool) -> BodyPart {
        BodyPart {
            request_id: "r".parse().expect("an id"),
            part: number,
            body: Body(vec![0; bytes].into()),
            encoding: None,
            more,
            reply_to: None,
        }
    }

    #[test]
    fn parts_come_out_in_order_and_count_until_they_are_taken() {
        let budget = BodyBudget::new(1000);
        let (mut feed, mut parts) = UploadFeed::new(&budget);
        assert!(feed.take(part(2, 10, false)).expect("room"));
        assert!(feed.take(part(2, 10, false)).expect("seen"));
        assert_eq!(budget.held_bytes(), 10);
        assert!(!feed.take(part(1, 20, true)).expect("room"));
        assert_eq!(budget.held_bytes(), 30);
        let first = parts.try_recv().expect("in order").into_part();
        assert_eq!((first.part, budget.held_bytes()), (1, 10));
        drop((parts, feed));
        assert_eq!(budget.held_bytes(), 0);
    }

    #[test]
    fn parts_that_are_not_read_are_bounded_over_all_bodies() {
        let budget = BodyBudget::new(100_000);
        let mut feeds: Vec<_> = (0..100).map(|_| UploadFeed::new(&budget)).collect();
        let mut refused = 0;
        for number in 1..=32 {
            for (feed, _) in &mut feeds {
                // Part 0 came with the request: these are early, or wait for the local service.
                let early = if number == 32 { 1 } else { number + 1 };
                refused += usize::from(feed.take(part(early, 1000, true)).is_err());
                assert!(budget.held_bytes() <= 100_000);
            }
        }
        assert!(refused > 0);
    }
}
