//! Which requests have been carried out, so that one that comes twice, over whichever connection, is not carried out twice.

use std::{
    collections::VecDeque,
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, MutexGuard},
};

use tunnel_protocol::id::{ConnectionId, RequestId};

use crate::lock::lock;

/// How many requests are remembered: at 1,000 requests a second, those of the last four seconds. The service sends one again
/// within a second, or not at all.
const MAX_SEEN_REQUESTS: usize = 4096;

/// The last requests of a tunnel, and the connections that they came over. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct SeenRequests(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    /// By keyed hashes of 64 bits. Collisions are not to be expected, and the ids themselves would not stay in a processor's caches.
    connections: foldhash::HashMap<u64, ConnectionId>,
    in_order: VecDeque<u64>,
    hasher: RandomState,
}

impl SeenRequests {
    /// The connection that a request was carried out for, if it was.
    pub fn connection(&self, id: &RequestId) -> Option<ConnectionId> {
        let seen = self.lock();
        seen.connections.get(&seen.hasher.hash_one(id)).cloned()
    }

    /// Remembers that a request is being carried out for `connection`. Returns the connection that it came over before, if it
    /// did.
    pub fn insert(&self, id: &RequestId, connection: &ConnectionId) -> Option<ConnectionId> {
        let mut seen = self.lock();
        let id = seen.hasher.hash_one(id);
        if let Some(before) = seen.connections.get(&id) {
            return Some(before.clone());
        }
        if seen.in_order.len() == MAX_SEEN_REQUESTS
            && let Some(oldest) = seen.in_order.pop_front()
        {
            seen.connections.remove(&oldest);
        }
        seen.connections.insert(id, connection.clone());
        seen.in_order.push_back(id);
        None
    }

    /// Held for a few lines only.
    fn lock(&self) -> MutexGuard<'_, Seen> {
        lock(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_seen_over_any_connection_and_the_oldest_is_forgotten() {
        let seen = SeenRequests::default();
        let connection = |text: &str| text.parse::<ConnectionId>().expect("an id");
        let request = |number: usize| format!("r{number}").parse::<RequestId>().expect("an id");
        assert_eq!(seen.connection(&request(0)), None);
        assert_eq!(seen.insert(&request(0), &connection("a")), None);
        assert_eq!(seen.connection(&request(0)), Some(connection("a")));
        assert_eq!(
            seen.clone().insert(&request(0), &connection("b")),
            Some(connection("a"))
        );
        for number in 1..=MAX_SEEN_REQUESTS {
            assert_eq!(seen.insert(&request(number), &connection("a")), None);
        }
        assert_eq!(seen.insert(&request(0), &connection("b")), None);
        let held = seen.0.lock().expect("not poisoned");
        assert_eq!(held.connections.len(), MAX_SEEN_REQUESTS);
    }
}
