//! Counts what AWS would bill.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::watch;

/// What was counted since the last [`Meter::reset`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    /// Calls of the HTTP API, for each 512 KiB or part of it.
    pub http_calls: u64,
    /// Requests to the function URL.
    pub url_requests: u64,
    /// Messages that agents sent, for each 32 KiB or part of it; without pings.
    pub units_in: u64,
    /// Messages to agents, for each 32 KiB or part of it; without pongs.
    pub units_out: u64,
    /// Messages to reply connections, for each 32 KiB or part of it.
    pub units_relayed: u64,
    /// Messages with which agents keep their connections open, and the answers to them.
    pub units_of_pings: u64,
    /// Requests to DynamoDB.
    pub dynamodb_requests: u64,
    /// DynamoDB's read units.
    pub reads: f64,
    /// DynamoDB's write units.
    pub writes: f64,
    /// What was counted for each function, by name.
    pub functions: BTreeMap<&'static str, Runs>,
}

/// What was counted for one function.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Runs {
    /// How long each invocation took, from the event to the end of the response.
    pub calls: Vec<Duration>,
    /// How long each new environment took until its first poll.
    pub starts: Vec<Duration>,
}

impl Counts {
    /// What was counted for a function.
    pub fn of(&self, function: &str) -> Runs {
        self.functions.get(function).cloned().unwrap_or_default()
    }

    /// All message units.
    pub fn units(&self) -> u64 {
        self.units_in + self.units_out + self.units_relayed + self.units_of_pings
    }
}

/// Counts, and knows whether anything is in progress. Clones share their state.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    counts: Arc<Mutex<Counts>>,
    under_way: watch::Sender<usize>,
}

impl Meter {
    /// Counts something.
    pub fn count(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut self.lock());
    }

    /// What was counted so far.
    pub fn read(&self) -> Counts {
        self.lock().clone()
    }

    /// Starts from zero.
    pub fn reset(&self) {
        *self.lock() = Counts::default();
    }

    /// Marks something as in progress until the returned value is dropped.
    pub fn begin(&self) -> UnderWay {
        self.under_way.send_modify(|number| *number += 1);
        UnderWay(self.under_way.clone())
    }

    /// Waits until nothing is in progress: every event is handled, every environment is idle.
    pub async fn settled(&self) {
        // This cannot fail while `self` holds the sender.
        let _ = self
            .under_way
            .subscribe()
            .wait_for(|number| *number == 0)
            .await;
    }

    /// Never held across an await.
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Meter::begin`].
#[derive(Debug)]
pub struct UnderWay(watch::Sender<usize>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.send_modify(|number| *number -= 1);
    }
}
