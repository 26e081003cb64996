//! The window of a body: how many parts its sender may send before the receiver has used some.

use std::sync::OnceLock;

use tokio::sync::watch;

use crate::limits::INITIAL_WINDOW_PARTS;

/// The sender's side, which receives `window` messages. The window closes when it is dropped.
///
/// Most bodies are too short for a window, so it is made when it is first needed.
#[derive(Debug, Default)]
pub struct WindowUpdates(OnceLock<watch::Sender<Allowed>>);

/// The parts with numbers below this; `None` once the receiver wants no more.
type Allowed = Option<u32>;

impl WindowUpdates {
    /// Allows the parts with numbers below `parts`. Updates may arrive in any order: the largest counts, but after 0 none does,
    /// because the receiver wants no more of the body.
    pub fn allow(&self, parts: u32) {
        self.sender().send_if_modified(|allowed| {
            let before = *allowed;
            *allowed = before.filter(|_| parts > 0).map(|before| before.max(parts));
            *allowed != before
        });
    }

    /// The window that these updates open.
    pub fn window(&self) -> SendWindow {
        SendWindow(self.sender().subscribe())
    }

    fn sender(&self) -> &watch::Sender<Allowed> {
        self.0
            .get_or_init(|| watch::Sender::new(Some(INITIAL_WINDOW_PARTS)))
    }
}

/// The sender's side, where a body waits to be allowed more parts.
#[derive(Clone, Debug)]
pub struct SendWindow(watch::Receiver<Allowed>);

/// The receiver of a body is gone or wants no more of it: it will never allow more parts.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the receiver of the body takes no more")]
pub struct WindowClosedError;

impl SendWindow {
    /// Waits until `part` may be sent.
    ///
    /// # Errors
    /// If the window closes first.
    pub async fn wait_for(&mut self, part: u32) -> Result<(), WindowClosedError> {
        let is_decided = |allowed: &Allowed| allowed.is_none_or(|allowed| part < allowed);
        match self.0.wait_for(is_decided).await {
            Ok(allowed) if allowed.is_some() => Ok(()),
            _ => Err(WindowClosedError),
        }
    }
}

/// The receiver's side: counts the consumed parts, and says when the sender should be allowed more.
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
    /// Notes that one more part was used. Returns the number below which parts are allowed from now on, when it is time to say
    /// so: with half of the window left, so that a steady sender need not stop.
    pub fn part_used(&mut self) -> Option<u32> {
        self.used = self.used.saturating_add(1);
        if self.allowed.saturating_sub(self.used) > INITIAL_WINDOW_PARTS / 2 {
            return None;
        }
        self.allowed = self.used.saturating_add(INITIAL_WINDOW_PARTS);
        Some(self.allowed)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_sender_that_respects_the_window_is_never_stopped_by_a_receiver_that_keeps_up() {
        let (mut window, mut allowed) = (ReceiveWindow::default(), INITIAL_WINDOW_PARTS);
        let mut updates = 0;
        for used in 1..1000 {
            assert!(used <= allowed, "part {used} was never allowed");
            if let Some(more) = window.part_used() {
                assert!(
                    more - used <= INITIAL_WINDOW_PARTS,
                    "more than a window is under way"
                );
                assert_eq!(
                    allowed - used,
                    INITIAL_WINDOW_PARTS / 2,
                    "the sender learns late, or early, of the room that there is"
                );
                (allowed, updates) = (more, updates + 1);
            }
        }
        assert!(
            updates < 1000 / (INITIAL_WINDOW_PARTS / 2) + 1,
            "{updates} updates"
        );
    }

    #[test]
    fn of_two_updates_the_larger_counts() {
        let updates = WindowUpdates::default();
        let mut window = updates.window();
        assert_eq!(
            window.wait_for(INITIAL_WINDOW_PARTS - 1).now_or_never(),
            Some(Ok(()))
        );
        assert_eq!(window.wait_for(INITIAL_WINDOW_PARTS).now_or_never(), None);
        updates.allow(50);
        updates.allow(40);
        assert_eq!(window.wait_for(49).now_or_never(), Some(Ok(())));
        assert_eq!(window.wait_for(50).now_or_never(), None);
        drop(updates);
        assert_eq!(
            window.wait_for(50).now_or_never(),
            Some(Err(WindowClosedError))
        );
    }

    #[test]
    fn a_receiver_that_wants_no_more_allows_nothing_any_more() {
        let updates = WindowUpdates::default();
        let mut window = updates.window();
        updates.allow(0);
        updates.allow(50);
        assert_eq!(
            window.wait_for(1).now_or_never(),
            Some(Err(WindowClosedError))
        );
    }
}
