//! How many agents each owner has connected.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tunnel_service::auth::owner::Owner;

/// How many connections each owner has open, and may have. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct AgentLimit(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    max: AtomicUsize,
    open: Mutex<HashMap<Owner, usize>>,
}

/// A connection's place among its owner's. Dropped, it is free again.
#[derive(Debug)]
pub(crate) struct AgentPermit {
    limit: AgentLimit,
    owner: Owner,
}

impl AgentLimit {
    /// Lets each owner have `max` connections.
    pub(crate) fn new(max: usize) -> Self {
        Self(Arc::new(Shared {
            max: max.into(),
            open: Mutex::default(),
        }))
    }

    /// Changes how many each may have. Those who have more keep them.
    pub(crate) fn set(&self, max: usize) {
        self.0.max.store(max, Ordering::Relaxed);
    }

    /// Takes a place, if `owner` has fewer connections than it may.
    pub(crate) fn acquire(&self, owner: Owner) -> Option<AgentPermit> {
        let max = self.0.max.load(Ordering::Relaxed);
        let mut open = self.lock();
        if open.get(&owner).is_some_and(|open| *open >= max) {
            return None;
        }
        *open.entry(owner.clone()).or_default() += 1;
        Some(AgentPermit {
            limit: self.clone(),
            owner,
        })
    }

    /// Held between awaits only.
    fn lock(&self) -> MutexGuard<'_, HashMap<Owner, usize>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for AgentPermit {
    fn drop(&mut self) {
        let mut open = self.limit.lock();
        if let Some(count) = open.get_mut(&self.owner) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tunnel_service::auth::{owner::SubjectHash, token::TokenHash};

    use super::*;

    #[test]
    fn each_owner_has_its_own_places_and_they_are_free_again() {
        let limit = AgentLimit::new(2);
        let alice = || Owner::Jwt(SubjectHash::of("issuer", "alice"));
        let first = limit.acquire(alice()).expect("the first");
        let _second = limit.acquire(alice()).expect("the second");
        assert!(limit.acquire(alice()).is_none());
        assert!(limit.acquire(Owner::Token(TokenHash::of("bob"))).is_some());
        drop(first);
        let _again = limit.acquire(alice()).expect("free again");
        limit.set(3);
        assert!(limit.acquire(alice()).is_some(), "one more than before");
    }
}
