//! What goes wrong, and when: all of it follows from one number.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tunnel_protocol::id::ConnectionId;

/// What happens to something that is on its way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Passage {
    /// It arrives.
    Once,
    /// It arrives twice.
    Twice,
    /// It does not arrive.
    Never,
}

/// The source of everything random. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Weather(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    random: StdRng,
    is_calm: bool,
    /// How often things go wrong: one time in so many.
    one_in: u32,
}

impl Weather {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        // Some storms are single gusts in an otherwise good day, some never stop.
        let one_in = [4, 12, 40, 120][random.random_range(0..4)];
        Self(Arc::new(Mutex::new(Inner {
            random,
            is_calm: true,
            one_in,
        })))
    }

    pub(crate) fn set_calm(&self, is_calm: bool) {
        self.lock().is_calm = is_calm;
    }

    pub(crate) fn is_calm(&self) -> bool {
        self.lock().is_calm
    }

    /// Whether a fault happens now: only in a storm.
    pub(crate) fn strikes(&self) -> bool {
        let mut inner = self.lock();
        let one_in = inner.one_in;
        !inner.is_calm && inner.random.random_range(0..one_in) == 0
    }

    /// Whether something happens that may happen at any time.
    pub(crate) fn one_in(&self, times: u32) -> bool {
        self.lock().random.random_range(0..times) == 0
    }

    /// A time between nothing and `most`, in whole milliseconds.
    pub(crate) fn time(&self, most: Duration) -> Duration {
        let most = u64::try_from(most.as_millis()).unwrap_or(u64::MAX);
        Duration::from_millis(self.lock().random.random_range(0..=most))
    }

    /// How long something is on its way: as a rule milliseconds, sometimes many seconds.
    pub(crate) fn delay(&self) -> Duration {
        let most = if self.strikes() { 12_000 } else { 30 };
        self.time(Duration::from_millis(most))
    }

    pub(crate) fn passage(&self) -> Passage {
        match (self.strikes(), self.one_in(2)) {
            (false, _) => Passage::Once,
            (true, true) => Passage::Twice,
            (true, false) => Passage::Never,
        }
    }

    /// An id of API Gateway's form.
    pub(crate) fn connection_id(&self) -> ConnectionId {
        let id: u64 = self.lock().random.random();
        format!("{id:016x}=").parse().expect("an id")
    }

    /// Held between awaits only.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
