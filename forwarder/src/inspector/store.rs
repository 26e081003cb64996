//! The ring of recorded exchanges: the newest, as many as fit.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use tokio::sync::watch;

use super::recorded::{ExchangeId, RecordedExchange};
use crate::lock::lock;

/// How many exchanges are kept at most.
pub(crate) const MAX_EXCHANGES: usize = 500;
/// How much memory they may take if the user does not say.
pub(crate) const DEFAULT_STORE_BYTES: usize = 50 * 1024 * 1024;
/// How much is kept of a body at most.
const MAX_BODY_BYTES: usize = 4 * 1024 * 1024;
/// No body may fill more than this fraction of the ring.
const BODY_FRACTION: usize = 8;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoreLimits {
    /// Exchanges.
    pub exchanges: usize,
    /// Memory for all of them together.
    pub bytes: usize,
    /// Memory for one body.
    pub body_bytes: usize,
}

impl StoreLimits {
    /// With this much memory.
    pub(crate) fn with_bytes(bytes: usize) -> Self {
        Self {
            exchanges: MAX_EXCHANGES,
            bytes,
            body_bytes: MAX_BODY_BYTES.min(bytes / BODY_FRACTION),
        }
    }
}

/// A place of the ring. Whoever records an exchange holds it, also when the ring has dropped it already.
#[derive(Debug)]
pub(crate) struct Slot {
    id: ExchangeId,
    /// The store's version when the exchange was last changed.
    version: AtomicU64,
    content: Mutex<SlotContent>,
}

#[derive(Debug)]
struct SlotContent {
    exchange: RecordedExchange,
    /// What it counts for.
    bytes: usize,
    /// The ring has dropped it, and nothing more is recorded.
    is_dropped: bool,
}

impl Slot {
    pub(crate) fn id(&self) -> ExchangeId {
        self.id
    }

    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// A copy of the exchange, for whatever takes longer than a look.
    pub(crate) fn copy(&self) -> RecordedExchange {
        self.read(RecordedExchange::clone)
    }

    /// Looks at the exchange. Whoever records it waits for that long.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&RecordedExchange) -> T) -> T {
        look(&lock(&self.content).exchange)
    }
}

/// The ring of recorded exchanges.
#[derive(Debug)]
pub(crate) struct ExchangeStore {
    limits: StoreLimits,
    ring: Mutex<Ring>,
    bytes: AtomicUsize,
    /// Counts changes. Whoever follows the exchanges asks which have changed since the version that they know.
    version: Mutex<u64>,
    /// Wakes those who follow the exchanges.
    followed: watch::Sender<u64>,
}

#[derive(Debug)]
struct Ring {
    slots: VecDeque<Arc<Slot>>,
    last_id: ExchangeId,
    /// The version at which the ring was last cleared.
    cleared: u64,
}

/// What has changed since a version.
#[derive(Debug)]
pub(crate) struct Changes {
    /// The version that these changes lead to.
    pub version: u64,
    /// The ring was cleared in between.
    pub cleared: bool,
    /// The oldest exchange that is kept.
    pub oldest: Option<ExchangeId>,
    /// What was changed since, oldest first.
    pub changed: Vec<Arc<Slot>>,
}

impl ExchangeStore {
    pub(crate) fn new(limits: StoreLimits) -> Self {
        Self {
            limits,
            ring: Mutex::new(Ring {
                slots: VecDeque::new(),
                last_id: ExchangeId::first(SystemTime::now()),
                cleared: 0,
            }),
            bytes: AtomicUsize::new(0),
            version: Mutex::new(0),
            followed: watch::Sender::new(0),
        }
    }

    /// How much is kept.
    pub(crate) fn limits(&self) -> StoreLimits {
        self.limits
    }

    /// How much memory the exchanges take, roughly.
    pub(crate) fn held_bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Adds an exchange, and gives it its id.
    pub(crate) fn insert(&self, mut exchange: RecordedExchange) -> Arc<Slot> {
        let mut ring = lock(&self.ring);
        ring.last_id = ring.last_id.next();
        exchange.id = ring.last_id;
        let (slot, dropped) = self.add(&mut ring, exchange);
        // What they held is freed once others may add theirs.
        drop(ring);
        drop(dropped);
        slot
    }

    /// Adds exchanges of an earlier process, oldest first.
    pub(crate) fn restore(&self, exchanges: impl IntoIterator<Item = RecordedExchange>) {
        let mut ring = lock(&self.ring);
        for exchange in exchanges {
            ring.last_id = ring.last_id.max(exchange.id);
            self.add(&mut ring, exchange);
        }
    }

    /// Returns its place, and those that it took the room of.
    fn add(&self, ring: &mut Ring, exchange: RecordedExchange) -> (Arc<Slot>, Vec<Arc<Slot>>) {
        let mut bytes = exchange.base_bytes() + exchange.request.body.kept_bytes();
        if let Some(response) = &exchange.response {
            bytes += response.headers.bytes() + response.body.kept_bytes();
        }
        if let Some(conversation) = &exchange.conversation {
            bytes += conversation.kept_bytes();
        }
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let slot = Arc::new(Slot {
            id: exchange.id,
            version: AtomicU64::new(0),
            content: Mutex::new(SlotContent {
                exchange,
                bytes,
                is_dropped: false,
            }),
        });
        ring.slots.push_back(slot.clone());
        let dropped = self.trim(ring);
        self.changed(&slot);
        (slot, dropped)
    }

    /// Changes an exchange. `change` returns by how many bytes it grew. Does nothing if the ring has dropped the exchange.
    pub(crate) fn update(&self, slot: &Slot, change: impl FnOnce(&mut RecordedExchange) -> usize) {
        {
            let mut content = lock(&slot.content);
            if content.is_dropped {
                return;
            }
            let grown = change(&mut content.exchange);
            content.bytes += grown;
            // Under the lock: who drops the exchange takes off what was added.
            self.bytes.fetch_add(grown, Ordering::Relaxed);
        }
        if self.held_bytes() > self.limits.bytes {
            let dropped = self.trim(&mut lock(&self.ring));
            drop(dropped);
        }
    }

    /// Tells whoever follows that an exchange has changed.
    pub(crate) fn changed(&self, slot: &Slot) {
        self.advance(|version| slot.version.store(version, Ordering::Release));
    }

    /// Tells whoever follows that something beside the exchanges has changed.
    pub(crate) fn touch(&self) {
        self.advance(|_| {});
    }

    /// Counts a change, and lets `note` note its version before anybody sees that.
    fn advance(&self, note: impl FnOnce(u64)) {
        let mut version = lock(&self.version);
        *version += 1;
        note(*version);
        // Costs more than all of the above, and most of the time nobody follows.
        if self.followed.receiver_count() > 0 {
            self.followed.send_replace(*version);
        }
    }

    /// The exchange with this id, if it is kept.
    pub(crate) fn get(&self, id: ExchangeId) -> Option<Arc<Slot>> {
        let ring = lock(&self.ring);
        let at = ring.slots.binary_search_by_key(&id, |slot| slot.id).ok()?;
        ring.slots.get(at).cloned()
    }

    /// All that are kept, newest first.
    pub(crate) fn newest_first(&self) -> Vec<Arc<Slot>> {
        lock(&self.ring).slots.iter().rev().cloned().collect()
    }

    /// Drops all exchanges.
    pub(crate) fn clear(&self) {
        let mut ring = lock(&self.ring);
        while let Some(slot) = ring.slots.pop_front() {
            self.drop_slot(&slot);
        }
        self.advance(|version| ring.cleared = version);
    }

    /// Follows the changes.
    pub(crate) fn follow(&self) -> watch::Receiver<u64> {
        let version = lock(&self.version);
        let follower = self.followed.subscribe();
        // Nobody may have been told of the last ones.
        self.followed.send_replace(*version);
        follower
    }

    /// What has changed since a version.
    pub(crate) fn changes_since(&self, since: u64) -> Changes {
        let ring = lock(&self.ring);
        let version = *lock(&self.version);
        let changed = ring.slots.iter().filter(|slot| slot.version() > since);
        Changes {
            version,
            cleared: ring.cleared > since,
            oldest: ring.slots.front().map(|slot| slot.id),
            changed: changed.cloned().collect(),
        }
    }

    /// Drops the oldest exchanges until the others fit, and returns them.
    fn trim(&self, ring: &mut Ring) -> Vec<Arc<Slot>> {
        let mut dropped = Vec::new();
        while ring.slots.len() > self.limits.exchanges || self.held_bytes() > self.limits.bytes {
            let Some(slot) = ring.slots.pop_front() else {
                break;
            };
            self.drop_slot(&slot);
            dropped.push(slot);
        }
        dropped
    }

    fn drop_slot(&self, slot: &Slot) {
        let mut content = lock(&slot.content);
        content.is_dropped = true;
        self.bytes.fetch_sub(content.bytes, Ordering::Relaxed);
        content.bytes = 0;
        // Whoever still records it must not hold this memory.
        content.exchange.request.body = Default::default();
        content.exchange.conversation = None;
        if let Some(response) = &mut content.exchange.response {
            response.body = Default::default();
        }
    }
}
