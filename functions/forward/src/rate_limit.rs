//! How many requests a tunnel may have, at once and in a second, as this process counts them.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;
use tunnel_protocol::id::TunnelId;

use crate::error::ForwardError;

/// Most requests of one tunnel at once, unless the settings say otherwise. What an agent takes by default.
pub const MAX_CONCURRENT_REQUESTS: u32 = 1024;
/// How many seconds' worth of requests may arrive at once after a pause: a page with everything on it.
const BURST_SECONDS: u32 = 2;
/// `Retry-After` at the limit of requests in flight: most finish sooner.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Most tunnels that are counted between requests. More tunnels than this were not busy for long.
const MAX_COUNTED_TUNNELS: usize = 10_000;

/// The counts. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct RateLimiter(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// 0 means no limit.
    max_concurrent: AtomicU32,
    /// 0 means no limit.
    per_second: AtomicU32,
    tunnels: Mutex<HashMap<TunnelId, Usage>>,
}

/// What a tunnel uses: requests in progress, and a bucket from which each takes a token.
#[derive(Debug)]
struct Usage {
    in_flight: u32,
    tokens: f64,
    filled: Instant,
}

/// Lets one request be in flight, until it is dropped.
#[derive(Debug)]
pub(crate) struct Permit(RateLimiter, TunnelId);

impl RateLimiter {
    /// Lets each tunnel have `max_concurrent` requests in progress and `per_second` new ones; 0 means no limit.
    pub(crate) fn new(max_concurrent: u32, per_second: u32) -> Self {
        Self(Arc::new(Shared {
            max_concurrent: max_concurrent.into(),
            per_second: per_second.into(),
            tunnels: Mutex::default(),
        }))
    }

    /// Changes the limits for requests that come from now on.
    pub(crate) fn set(&self, max_concurrent: u32, per_second: u32) {
        self.0.max_concurrent.store(max_concurrent, Relaxed);
        self.0.per_second.store(per_second, Relaxed);
    }

    fn max_concurrent(&self) -> u32 {
        match self.0.max_concurrent.load(Relaxed) {
            0 => u32::MAX,
            most => most,
        }
    }

    fn per_second(&self) -> f64 {
        self.0.per_second.load(Relaxed).into()
    }

    /// A permit for a request that comes `now`.
    ///
    /// # Errors
    /// [`ForwardError::RateLimited`] when there is none.
    pub(crate) fn acquire(&self, tunnel: &TunnelId, now: Instant) -> Result<Permit, ForwardError> {
        let mut tunnels = self.lock();
        if tunnels.len() >= MAX_COUNTED_TUNNELS && !tunnels.contains_key(tunnel) {
            tunnels.retain(|_, usage| usage.in_flight > 0);
        }
        let usage = tunnels.entry(tunnel.clone()).or_insert_with(|| Usage {
            in_flight: 0,
            tokens: self.burst(),
            filled: now,
        });
        usage.tokens = self.tokens(usage, now);
        usage.filled = now;
        if usage.in_flight >= self.max_concurrent() {
            return Err(ForwardError::RateLimited(RETRY_AFTER));
        }
        let per_second = self.per_second();
        if per_second > 0.0 {
            if usage.tokens < 1.0 {
                return Err(ForwardError::RateLimited(Duration::from_secs_f64(
                    (1.0 - usage.tokens) / per_second,
                )));
            }
            usage.tokens -= 1.0;
        }
        usage.in_flight += 1;
        Ok(Permit(self.clone(), tunnel.clone()))
    }

    fn burst(&self) -> f64 {
        self.per_second() * f64::from(BURST_SECONDS)
    }

    fn tokens(&self, usage: &Usage, now: Instant) -> f64 {
        (usage.tokens + (now - usage.filled).as_secs_f64() * self.per_second()).min(self.burst())
    }

    /// Held between awaits only.
    fn lock(&self) -> MutexGuard<'_, HashMap<TunnelId, Usage>> {
        self.0
            .tunnels
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Self(limiter, tunnel) = self;
        let mut tunnels = limiter.lock();
        let Some(usage) = tunnels.get_mut(tunnel) else {
            return;
        };
        usage.in_flight -= 1;
        // Nothing is lost that a new count would not have.
        if usage.in_flight == 0 && limiter.tokens(usage, Instant::now()) >= limiter.burst() {
            tunnels.remove(tunnel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> TunnelId {
        text.parse().expect("an id")
    }

    fn pause(taken: Result<Permit, ForwardError>) -> Option<Duration> {
        match taken {
            Ok(_) => None,
            Err(ForwardError::RateLimited(pause)) => Some(pause),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_tunnel_has_as_many_requests_at_once_as_it_may_and_others_have_theirs() {
        let (limiter, now) = (RateLimiter::new(2, 0), Instant::now());
        let places = [
            limiter.acquire(&id("one"), now),
            limiter.acquire(&id("one"), now),
        ];
        assert_eq!(pause(limiter.acquire(&id("one"), now)), Some(RETRY_AFTER));
        assert_eq!(pause(limiter.acquire(&id("two"), now)), None);
        drop(places);
        assert!(
            limiter.lock().is_empty(),
            "something is kept of tunnels without requests"
        );
        assert_eq!(pause(limiter.acquire(&id("one"), now)), None);
    }

    #[test]
    fn after_a_burst_requests_come_at_their_rate() {
        let (limiter, now) = (RateLimiter::new(0, 10), Instant::now());
        let taken_at = |now| {
            std::iter::repeat_with(|| limiter.acquire(&id("one"), now))
                .take_while(Result::is_ok)
                .count()
        };
        assert_eq!(taken_at(now), 20);
        assert_eq!(
            pause(limiter.acquire(&id("one"), now)),
            Some(Duration::from_millis(100))
        );
        assert_eq!(
            pause(limiter.acquire(&id("two"), now)),
            None,
            "it is counted with another"
        );
        assert_eq!(taken_at(now + Duration::from_millis(101)), 1);
        assert_eq!(
            taken_at(now + Duration::from_secs(60)),
            20,
            "a pause saves up more than a burst"
        );
    }

    #[test]
    fn the_number_of_counts_is_bounded() {
        // Later than this test takes: no tunnel has all of its burst again before its end.
        let now = Instant::now() + Duration::from_secs(3600);
        let limiter = RateLimiter::new(0, 1000);
        let held = limiter.acquire(&id("held"), now);
        let mut most = 0;
        for number in 0..2 * MAX_COUNTED_TUNNELS {
            drop(limiter.acquire(&id(&format!("tunnel-{number}")), now));
            most = most.max(limiter.lock().len());
        }
        assert_eq!(most, MAX_COUNTED_TUNNELS);
        assert!(
            held.is_ok() && limiter.lock().contains_key(&id("held")),
            "a request that is under way is not counted any more"
        );
    }
}
