//! Waiting for the parts of an agent's reply.

use std::{collections::VecDeque, time::Duration};

use tokio::time::{Instant, sleep_until};
use tunnel_shared::{
    cloud::{
        connections::Connections,
        mailbox::{Mailbox, ReplyPart},
        now,
    },
    id::{ConnectionId, RequestId},
    parts::Reorder,
};

use crate::refusal::Refusal;

/// The first look into the mailbox, and the shortest pause between two.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
/// The longest pause between two looks.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// After this long without a part, each look asks too whether the agent is still connected.
const DOUBT: Duration = Duration::from_millis(400);
/// How long a part may be missing while a later one is there. The function that stores it may be starting cold.
const STRAGGLER: Duration = Duration::from_secs(10);

/// The reply to one request.
#[derive(Debug)]
pub struct PendingReply {
    mailbox: Mailbox,
    connections: Connections,
    sender: ConnectionId,
    request: RequestId,
    arrived: Reorder<ReplyPart>,
    /// In order, and not asked for yet: at most what one look finds.
    ready: VecDeque<ReplyPart>,
    failure: Option<ReplyPart>,
    /// When the front gives up on the whole reply; none where it takes as long as it takes.
    deadline: Option<Instant>,
}

impl PendingReply {
    /// Waits for the reply of `sender`, and of nobody else, to `request`.
    pub fn new(mailbox: Mailbox, connections: Connections, sender: ConnectionId, request: RequestId, deadline: Option<Instant>) -> Self {
        Self { mailbox, connections, sender, request, arrived: Reorder::starting_at(0), ready: VecDeque::new(), failure: None, deadline }
    }

    /// The next part in order, whatever order they arrive in. `until` limits the wait for this part alone.
    ///
    /// # Errors
    /// When the agent says that it failed, is gone, or is out of time.
    pub async fn next(&mut self, until: Option<Instant>) -> Result<ReplyPart, Refusal> {
        let waiting_since = Instant::now();
        let limit = self.deadline.into_iter().chain(until).min();
        loop {
            if let Some(part) = self.ready.pop_front() {
                return Ok(part);
            }
            if let Some(ReplyPart::Failed { code, message }) = self.failure.take() {
                return Err(Refusal::of_agent(code, message));
            }
            let waited = waiting_since.elapsed();
            if limit.is_some_and(|limit| Instant::now() >= limit) || (waited > STRAGGLER && self.arrived.is_incomplete()) {
                return Err(Refusal::LocalTimeout);
            }
            let wake = Instant::now() + pause(waited);
            sleep_until(limit.map_or(wake, |limit| wake.min(limit))).await;
            // Asked before the last look, so that a reply stored just before the connection ended is still found.
            let is_lost = waited >= DOUBT && self.connections.get(&self.sender, now()).await?.is_none();
            self.look().await?;
            if is_lost && self.ready.is_empty() && self.failure.is_none() {
                return Err(Refusal::AgentLost);
            }
        }
    }

    async fn look(&mut self) -> Result<(), Refusal> {
        for (number, part) in self.mailbox.read(&self.sender, &self.request, self.arrived.expected()).await? {
            if matches!(part, ReplyPart::Failed { .. }) {
                self.failure = Some(part);
            } else {
                self.arrived.insert(number, part).map_err(|error| Refusal::InvalidReply(error.to_string()))?;
                self.ready.extend(std::iter::from_fn(|| self.arrived.take_next()));
            }
        }
        Ok(())
    }
}

/// Looks grow rarer in proportion to the time waited, so that a quick reply is found at once and a slow one costs few reads.
fn pause(waited: Duration) -> Duration {
    (waited / 4).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_comes_at_most_a_quarter_late_and_at_most_once_a_second() {
        assert_eq!(pause(Duration::ZERO), SHORTEST_PAUSE);
        assert_eq!(pause(Duration::from_millis(400)), Duration::from_millis(100));
        assert_eq!(pause(Duration::from_secs(60)), LONGEST_PAUSE);
    }
}
