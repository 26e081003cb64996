//! The receive window of a body: how much its sender may send before the receiver has used some.

use crate::limits::INITIAL_WINDOW_PARTS;

/// Counts what a receiver has used up, and tells when its sender should be allowed more.
#[derive(Debug)]
pub struct ReceiveWindow {
    used: u32,
    allowed: u32,
}

impl Default for ReceiveWindow {
    fn default() -> Self {
        Self {
            used: 0,
            allowed: INITIAL_WINDOW_PARTS,
        }
    }
}

impl ReceiveWindow {
    /// Notes that one more part was used up. Returns the number below which parts are allowed from now on, when it is time to
    /// say so: with half of the window left, so that a steady sender need not stop.
    pub fn part_used(&mut self) -> Option<u32> {
        self.used = self.used.saturating_add(1);
        if self.allowed - self.used > INITIAL_WINDOW_PARTS / 2 {
            return None;
        }
        self.allowed = self.used.saturating_add(INITIAL_WINDOW_PARTS);
        Some(self.allowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_that_heeds_the_window_is_never_stopped_by_a_receiver_that_keeps_up() {
        let (mut allowance, mut allowed) = (ReceiveWindow::default(), INITIAL_WINDOW_PARTS);
        let mut told = 0;
        for used in 1..1000 {
            assert!(used <= allowed, "part {used} was never allowed");
            if let Some(more) = allowance.part_used() {
                assert!(
                    more - used <= INITIAL_WINDOW_PARTS,
                    "more than a window is under way"
                );
                (allowed, told) = (more, told + 1);
            }
        }
        assert!(
            told < 1000 / (INITIAL_WINDOW_PARTS / 2) + 1,
            "told {told} times"
        );
    }
}
