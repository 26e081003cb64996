//! Locks of this process.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks what no panic can leave half changed, so that a poisoned lock is as good as any.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
