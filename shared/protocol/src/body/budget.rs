//! How many body bytes one process holds for all its bodies together.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most body bytes that a process holds at once: 256 MiB, which is about 80 bodies with a full window each. Few are held at a
/// time, because a body is held only while a part of it is missing or its reader is slow.
pub const MAX_HELD_BODY_BYTES: usize = 256 * 1024 * 1024;

/// One body may hold this fraction of what is free.
const FREE_FRACTION: usize = 8;

/// The bytes of bodies that one process may hold. Clones share it.
///
/// A body may hold an eighth of what is free at that moment ("dynamic threshold", Choudhury and Hahne, 1998). So the limit is
/// never exceeded, and the first few bodies that are not read do not take all of it.
#[derive(Clone, Debug)]
pub struct BodyBudget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    max_bytes: usize,
    held_bytes: Mutex<usize>,
}

/// The process holds too many body bytes for this body to hold more.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("too many body bytes are waiting to be read")]
pub struct BudgetExceededError;

impl Default for BodyBudget {
    /// A budget of [`MAX_HELD_BODY_BYTES`].
    fn default() -> Self {
        Self::new(MAX_HELD_BODY_BYTES)
    }
}

impl BodyBudget {
    /// A budget of `max_bytes`.
    pub fn new(max_bytes: usize) -> Self {
        Self(Arc::new(Shared {
            max_bytes,
            held_bytes: Mutex::default(),
        }))
    }

    /// A share of the budget for one body, which holds nothing yet.
    pub fn share(&self) -> BudgetShare {
        BudgetShare {
            budget: self.clone(),
            bytes: 0,
        }
    }

    /// How many bytes are held now.
    pub fn held_bytes(&self) -> usize {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.0
            .held_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one body holds of a [`BodyBudget`]. Dropped, it holds nothing.
#[derive(Debug)]
pub struct BudgetShare {
    budget: BodyBudget,
    bytes: usize,
}

impl BudgetShare {
    /// Holds `bytes` more.
    ///
    /// # Errors
    /// If the budget does not allow it; nothing more is held then.
    pub fn hold(&mut self, bytes: usize) -> Result<(), BudgetExceededError> {
        let mut held = self.budget.lock();
        let free = self.budget.0.max_bytes - *held;
        if self.bytes.saturating_add(bytes) > free / FREE_FRACTION {
            return Err(BudgetExceededError);
        }
        *held += bytes;
        drop(held);
        self.bytes += bytes;
        Ok(())
    }

    /// Gives back `bytes` that are held no longer.
    pub fn release(&mut self, bytes: usize) {
        let released = bytes.min(self.bytes);
        *self.budget.lock() -= released;
        self.bytes -= released;
    }
}

impl Drop for BudgetShare {
    fn drop(&mut self) {
        self.release(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::{INITIAL_WINDOW_PARTS, MAX_PART_BYTES};

    #[test]
    fn bodies_that_are_not_read_leave_room_for_one_that_is() {
        let budget = BodyBudget::default();
        let window = INITIAL_WINDOW_PARTS as usize * MAX_PART_BYTES;
        let mut unread: Vec<_> = (0..100).map(|_| budget.share()).collect();
        let mut full = 0;
        for share in &mut unread {
            let has_all = (0..INITIAL_WINDOW_PARTS).all(|_| share.hold(MAX_PART_BYTES).is_ok());
            full += usize::from(has_all);
        }
        assert!((70..80).contains(&full), "{full}");
        assert!(budget.held_bytes() < MAX_HELD_BODY_BYTES);
        assert_eq!(budget.share().hold(64 * 1024), Ok(()), "a small answer");
        drop(unread);
        assert_eq!(budget.held_bytes(), 0);
        assert_eq!(budget.share().hold(window), Ok(()));
    }

    proptest! {
        #[test]
        fn the_limit_is_never_exceeded_and_released_bytes_are_free_again(
            steps in prop::collection::vec((0usize..5, 0usize..200, any::<bool>()), 0..200),
        ) {
            let budget = BodyBudget::new(1000);
            let mut shares: Vec<_> = (0..5).map(|_| budget.share()).collect();
            for (at, bytes, is_release) in steps {
                if is_release {
                    shares[at].release(bytes);
                } else {
                    let _ = shares[at].hold(bytes);
                }
                prop_assert!(budget.held_bytes() <= 1000);
                prop_assert_eq!(budget.held_bytes(), shares.iter().map(|share| share.bytes).sum::<usize>());
            }
            drop(shares);
            prop_assert_eq!(budget.held_bytes(), 0);
        }
    }
}
