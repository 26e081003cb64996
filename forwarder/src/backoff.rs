//! Pauses between tries: each up to twice as long as the one before, to a limit, and never the same for two agents.

use std::time::Duration;

use rand::RngExt;

/// The first pause is at most this long.
const MIN_PAUSE: Duration = Duration::from_millis(250);
/// No pause is longer: once the service can be reached again, a tunnel is back within seconds.
const MAX_PAUSE: Duration = Duration::from_millis(2500);

/// The pauses of one series of tries.
#[derive(Debug, Default)]
pub struct Backoff {
    attempt: u32,
}

impl Backoff {
    /// How many pauses there have been.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The next pause: a random time between half of the current limit and all of it.
    pub fn next_pause(&mut self) -> Duration {
        let limit = MIN_PAUSE
            .saturating_mul(1 << self.attempt.min(16))
            .min(MAX_PAUSE);
        self.attempt += 1;
        limit.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// Starts again with the shortest pause.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_limit_and_start_again_after_a_reset() {
        let mut backoff = Backoff::default();
        let pauses: Vec<Duration> = (0..40).map(|_| backoff.next_pause()).collect();
        assert!(
            pauses[0] >= MIN_PAUSE / 2 && pauses[0] <= MIN_PAUSE,
            "{pauses:?}"
        );
        assert!(pauses.iter().all(|pause| *pause <= MAX_PAUSE), "{pauses:?}");
        assert!(
            pauses[10..].iter().all(|pause| *pause >= MAX_PAUSE / 2),
            "{pauses:?}"
        );
        assert_eq!(backoff.attempt(), 40);
        backoff.reset();
        assert!(backoff.next_pause() <= MIN_PAUSE);
    }
}
