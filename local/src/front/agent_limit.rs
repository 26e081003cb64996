//! How many agents each owner has connected.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tunnel_service::auth::owner::Owner;

/// How many connections each owner has open. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct AgentLimit(Arc<Mutex<HashMap<Owner, usize>>>);

/// A connection's place among its owner's. Dropped, it is free again.
#[derive(Debug)]
pub(crate) struct AgentPermit {
    limit: AgentLimit,
    owner: Owner,
}

impl AgentLimit {
    /// Takes a place, if `owner` has fewer than `max` connections.
    pub(crate) fn acquire(&self, owner: Owner, max: usize) -> Option<AgentPermit> {
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
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        let limit = AgentLimit::default();
        let alice = || Owner::Jwt(SubjectHash::of("issuer", "alice"));
        let first = limit.acquire(alice(), 2).expect("the first");
        let _second = limit.acquire(alice(), 2).expect("the second");
        assert!(limit.acquire(alice(), 2).is_none());
        assert!(
            limit
                .acquire(Owner::Token(TokenHash::of("bob")), 2)
                .is_some()
        );
        drop(first);
        assert!(limit.acquire(alice(), 2).is_some());
    }
}
