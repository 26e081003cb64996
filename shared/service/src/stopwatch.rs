//! How long ago something was, where a process may have been frozen meanwhile.

use std::time::{Duration, Instant, SystemTime};

/// Started when something was known, tells its age.
///
/// Lambda freezes an execution environment between invocations, in which the monotonic clock may stand still; the wall clock may
/// be set back. Of both the one that says more counts, so that nothing is taken for younger than it is.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch {
    monotonic: Instant,
    wall: SystemTime,
}

impl Stopwatch {
    /// Starts now.
    pub fn start() -> Self {
        Self {
            monotonic: Instant::now(),
            wall: SystemTime::now(),
        }
    }

    /// The time since the start.
    pub fn elapsed(&self) -> Duration {
        let wall = self.wall.elapsed().unwrap_or_default();
        wall.max(self.monotonic.elapsed())
    }

    /// Whether this one was started before `other`.
    pub fn is_older_than(&self, other: &Self) -> bool {
        self.monotonic < other.monotonic
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_a_frozen_clock_nor_one_that_is_set_back_makes_anything_younger() {
        let hour = Duration::from_secs(3600);
        let now = Stopwatch::start();
        let frozen = Stopwatch {
            wall: now.wall - hour,
            ..now
        };
        assert!(frozen.elapsed() >= hour);
        let set_back = Stopwatch {
            wall: now.wall + hour,
            ..now
        };
        assert!(set_back.elapsed() < hour);
    }
}
