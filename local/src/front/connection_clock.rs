//! When agents' connections were opened, in an order that the system's clock cannot upset.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Gives each connection its time. A later connection has a later time, also when the system's clock is set back: of two
/// connections the one with the later time serves, and an agent must not lose its tunnel to a connection that it has left.
#[derive(Debug, Default)]
pub(crate) struct ConnectionClock {
    last_ms: AtomicU64,
}

impl ConnectionClock {
    /// The time of a connection that opens at `now`, in milliseconds since 1970.
    pub(crate) fn open_ms(&self, now: Duration) -> u64 {
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let after = |last_ms: u64| now_ms.max(last_ms.saturating_add(1));
        let before = self
            .last_ms
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last_ms| {
                Some(after(last_ms))
            });
        after(before.unwrap_or_else(|last_ms| last_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_ordered_even_if_the_clock_stands_still_or_is_set_back() {
        let clock = ConnectionClock::default();
        let times = [5000, 5000, 5001, 4000, 10_000, 9_999]
            .map(|now_ms| clock.open_ms(Duration::from_millis(now_ms)));
        assert_eq!(times, [5000, 5001, 5002, 5003, 10_000, 10_001]);
    }
}
