//! Pauses between attempts: each up to twice as long as the one before, up to a limit, and never the same for two callers.

use std::time::Duration;

use rand::RngExt;

/// The pauses of one series of attempts.
#[derive(Clone, Debug)]
pub struct Backoff {
    shortest: Duration,
    longest: Duration,
    attempt: u32,
}

impl Backoff {
    /// Pauses that start at no more than `shortest` and never exceed `longest`.
    pub const fn new(shortest: Duration, longest: Duration) -> Self {
        Self {
            shortest,
            longest,
            attempt: 0,
        }
    }

    /// How many pauses there have been since the last reset.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The next pause: a random time between half of the current limit and all of it.
    pub fn next_pause(&mut self) -> Duration {
        let limit = self
            .shortest
            .saturating_mul(1 << self.attempt.min(16))
            .min(self.longest);
        self.attempt = self.attempt.saturating_add(1);
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
        let shortest = Duration::from_millis(250);
        let longest = Duration::from_millis(2500);
        let mut backoff = Backoff::new(shortest, longest);
        let pauses: Vec<Duration> = (0..40).map(|_| backoff.next_pause()).collect();
        assert!(
            pauses[0] >= shortest / 2 && pauses[0] <= shortest,
            "{pauses:?}"
        );
        assert!(pauses.iter().all(|pause| *pause <= longest), "{pauses:?}");
        assert!(
            pauses[10..].iter().all(|pause| *pause >= longest / 2),
            "{pauses:?}"
        );
        assert_eq!(backoff.attempt(), 40);
        backoff.reset();
        assert!(backoff.next_pause() <= shortest);
    }
}
