//! How many requests a tunnel may have, at once and in a second, as this process counts them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tunnel_protocol::id::TunnelId;

use crate::error::ForwardError;

/// Most requests of one tunnel at once, unless the settings say otherwise. What an agent takes by default.
pub const MAX_CONCURRENT_REQUESTS: u32 = 1024;
/// How many seconds' worth of requests may come at once after a pause: a page with all that belongs to it.
const BURST_SECONDS: u32 = 2;
/// When one request has to end before the next: requests take less than this, as a rule.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Most tunnels that are counted between requests. More tunnels than this were not busy for long.
const MAX_COUNTED_TUNNELS: usize = 10_000;

/// The counts. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct RateLimiter(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    at_once: u32,
    per_second: f64,
    tunnels: Mutex<HashMap<TunnelId, Usage>>,
}

/// What a tunnel uses: requests that are under way, and a bucket from which each takes a token.
#[derive(Debug)]
struct Usage {
    in_flight: u32,
    tokens: f64,
    filled: Instant,
}

/// A request's place. Dropped, it is free again.
#[derive(Debug)]
pub(crate) struct Permit(RateLimiter, TunnelId);

impl RateLimiter {
    /// Lets each tunnel have `at_once` requests under way and `per_second` new ones; 0 is no limit.
    pub(crate) fn new(at_once: u32, per_second: u32) -> Self {
        let at_once = if at_once == 0 { u32::MAX } else { at_once };
        Self(Arc::new(Shared {
            at_once,
            per_second: per_second.into(),
            tunnels: Mutex::default(),
        }))
    }

    /// Takes a place for a request that comes `now`.
    ///
    /// # Errors
    /// [`ForwardError::RateLimited`] when there is none.
    pub(crate) fn take(&self, tunnel: &TunnelId, now: Instant) -> Result<Permit, ForwardError> {
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
        if usage.in_flight >= self.0.at_once {
            return Err(ForwardError::RateLimited(RETRY_AFTER));
        }
        if self.0.per_second > 0.0 {
            if usage.tokens < 1.0 {
                return Err(ForwardError::RateLimited(Duration::from_secs_f64(
                    (1.0 - usage.tokens) / self.0.per_second,
                )));
            }
            usage.tokens -= 1.0;
        }
        usage.in_flight += 1;
        Ok(Permit(self.clone(), tunnel.clone()))
    }

    fn burst(&self) -> f64 {
        self.0.per_second * f64::from(BURST_SECONDS)
    }

    fn tokens(&self, usage: &Usage, now: Instant) -> f64 {
        (usage.tokens + (now - usage.filled).as_secs_f64() * self.0.per_second).min(self.burst())
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
        let Self(throttle, tunnel) = self;
        let mut tunnels = throttle.lock();
        let Some(usage) = tunnels.get_mut(tunnel) else {
            return;
        };
        usage.in_flight -= 1;
        // Nothing is lost that a new count would not have.
        if usage.in_flight == 0 && throttle.tokens(usage, Instant::now()) >= throttle.burst() {
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
        let (throttle, now) = (RateLimiter::new(2, 0), Instant::now());
        let places = [
            throttle.take(&id("one"), now),
            throttle.take(&id("one"), now),
        ];
        assert_eq!(pause(throttle.take(&id("one"), now)), Some(RETRY_AFTER));
        assert_eq!(pause(throttle.take(&id("two"), now)), None);
        drop(places);
        assert!(
            throttle.lock().is_empty(),
            "something is kept of tunnels without requests"
        );
        assert_eq!(pause(throttle.take(&id("one"), now)), None);
    }

    #[test]
    fn after_a_burst_requests_come_at_their_rate() {
        let (throttle, now) = (RateLimiter::new(0, 10), Instant::now());
        let taken_at = |now| {
            std::iter::repeat_with(|| throttle.take(&id("one"), now))
                .take_while(Result::is_ok)
                .count()
        };
        assert_eq!(taken_at(now), 20);
        assert_eq!(
            pause(throttle.take(&id("one"), now)),
            Some(Duration::from_millis(100))
        );
        assert_eq!(
            pause(throttle.take(&id("two"), now)),
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
        let (throttle, now) = (RateLimiter::new(0, 1000), Instant::now());
        let held = throttle.take(&id("held"), now);
        for number in 0..2 * MAX_COUNTED_TUNNELS {
            drop(throttle.take(&id(&format!("tunnel-{number}")), now));
        }
        assert!(
            throttle.lock().len() <= MAX_COUNTED_TUNNELS,
            "{}",
            throttle.lock().len()
        );
        assert!(
            held.is_ok() && throttle.lock().contains_key(&id("held")),
            "a request that is under way is not counted any more"
        );
    }
}
