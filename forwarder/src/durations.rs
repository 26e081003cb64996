//! How long the last requests took.

use std::{collections::VecDeque, time::Duration};

/// So many are remembered.
const MAX_DURATIONS: usize = 1024;

/// The durations of the last requests.
#[derive(Debug, Default)]
pub(crate) struct Durations(VecDeque<Duration>);

impl Durations {
    /// Adds one, in place of the oldest if there are many.
    pub(crate) fn push(&mut self, took: Duration) {
        if self.0.len() == MAX_DURATIONS {
            self.0.pop_front();
        }
        self.0.push_back(took);
    }

    /// For each of these numbers, the time within which so many percent of the requests ended. `None` if there were none.
    pub(crate) fn percentiles<const N: usize>(
        &self,
        percents: [usize; N],
    ) -> Option<[Duration; N]> {
        let mut sorted: Vec<Duration> = self.0.iter().copied().collect();
        sorted.sort_unstable();
        let last = sorted.len().checked_sub(1)?;
        Some(percents.map(|percent| {
            let rank = (sorted.len() * percent).div_ceil(100);
            sorted[rank.saturating_sub(1).min(last)]
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_last_requests() {
        let mut durations = Durations::default();
        assert_eq!(durations.percentiles([50]), None);
        durations.push(Duration::from_millis(7));
        let one = Some([Duration::from_millis(7); 2]);
        assert_eq!(durations.percentiles([1, 99]), one);
        for _ in 0..MAX_DURATIONS {
            durations.push(Duration::from_secs(1));
        }
        for millis in (1..=100).rev() {
            durations.push(Duration::from_millis(millis));
        }
        // Of 1,024 the 100 shortest are these.
        let [p5, p10] = durations.percentiles([5, 10]).expect("some");
        assert_eq!(p5, Duration::from_millis(52));
        assert_eq!(p10, Duration::from_secs(1));
    }
}
