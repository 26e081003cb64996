//! Visitors who come at a steady rate.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::visit::{Outcome, Plan, Visit, visit};

/// Visitors at once; more do not come.
const VISITORS: usize = 600;

/// All requests that were made. Clones are one.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    service: SocketAddr,
    prefix: Arc<str>,
    next: Arc<AtomicU64>,
    visits: Arc<Mutex<Vec<Visit>>>,
    begun: Instant,
}

impl Load {
    pub(crate) fn new(service: SocketAddr, prefix: &str, begun: Instant) -> Self {
        Self {
            service,
            prefix: prefix.into(),
            next: Arc::new(AtomicU64::new(1)),
            visits: Arc::default(),
            begun,
        }
    }

    /// Numbers requests from `first` on.
    pub(crate) fn from(self, first: u64) -> Self {
        self.next.store(first, Ordering::Relaxed);
        self
    }

    /// A number that no other request has.
    pub(crate) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Makes requests on one connection, and returns how the last one went.
    pub(crate) async fn make(&self, plans: Vec<Plan>) -> Outcome {
        let made = visit(self.service, &self.prefix, plans).await;
        let last = made
            .last()
            .map_or(Outcome::Left, |visit| visit.outcome.clone());
        for visit in &made {
            if let Outcome::Wrong(why) = &visit.outcome {
                println!(
                    "{:7.2} s  WRONG: request {} ({}): {why}",
                    self.begun.elapsed().as_secs_f64(),
                    visit.plan.wish.number,
                    visit.plan.kind
                );
            }
        }
        self.visits
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(made);
        last
    }

    /// Makes a quick request, and tells whether it went well.
    pub(crate) async fn probe(&self, patience: Duration) -> bool {
        let plan = Plan::get("probe", self.number(), 64);
        timeout(patience, self.make(vec![plan])).await == Ok(Outcome::Right)
    }

    /// Lets `rate` requests a second come, made by `plan`, until `until`; returns when all have ended.
    pub(crate) async fn come(
        &self,
        rate: u32,
        until: Instant,
        seed: u64,
        plan: fn(u64, &mut StdRng) -> Plan,
    ) {
        let mut random = StdRng::seed_from_u64(seed);
        let places = Arc::new(Semaphore::new(VISITORS));
        let mut visitors = JoinSet::new();
        let mut tick = interval(Duration::from_secs(1) / rate);
        tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut skip = 0;
        while Instant::now() < until {
            tick.tick().await;
            while visitors.try_join_next().is_some() {}
            if skip > 0 {
                skip -= 1;
                continue;
            }
            // Some make several requests on one connection; the rate stays.
            let count = if random.random_bool(0.2) {
                random.random_range(2..5)
            } else {
                1
            };
            skip = count - 1;
            let plans = (0..count)
                .map(|_| plan(self.number(), &mut random))
                .collect();
            let Ok(place) = places.clone().try_acquire_owned() else {
                continue;
            };
            let load = self.clone();
            visitors.spawn(async move {
                load.make(plans).await;
                drop(place);
            });
        }
        while visitors.join_next().await.is_some() {}
    }

    /// All that have ended so far.
    pub(crate) fn visits(&self) -> Vec<Visit> {
        self.visits
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
