//! Waiting for the parts of an agent's reply: pushed to this process, or found in the mailbox.

use std::{collections::VecDeque, time::Duration};

use tokio::time::{Instant, sleep_until};
use tunnel_protocol::body::reorder::Reorder;
use tunnel_service::{
    now,
    replies::{Expected, ReplyPart},
    tables::connections::ConnectionsTable,
    tables::mailbox::MailboxTable,
};

use crate::error::ForwardError;

/// After this long without a part, each look into the mailbox asks too whether the agent is still connected.
const LIVENESS_CHECK_AFTER: Duration = Duration::from_millis(400);
/// How long a part may be missing while a later one is there. The function that stores it may be starting cold.
const MISSING_PART_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a reply comes from.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// The process that holds the agent's connection is this one: it pushes every part, and tells when the connection is lost.
    InProcess,
    /// Another process pushes, if a reply connection was named, or leaves parts in the mailbox.
    Cloud {
        mailbox: MailboxTable,
        connections: ConnectionsTable,
        /// A reply connection was named: the mailbox is for what could not be pushed.
        is_pushed: bool,
    },
}

/// The reply to one request.
#[derive(Debug)]
pub(crate) struct PendingReply {
    expected: Expected,
    source: Source,
    arrived: Reorder<ReplyPart>,
    /// In order, and not asked for yet.
    ready: VecDeque<ReplyPart>,
    failure: Option<ReplyPart>,
    /// When the front gives up on the whole reply; none where it takes as long as it takes.
    deadline: Option<Instant>,
}

impl PendingReply {
    pub(crate) fn new(expected: Expected, source: Source, deadline: Option<Instant>) -> Self {
        Self {
            expected,
            source,
            arrived: Reorder::starting_at(0),
            ready: VecDeque::new(),
            failure: None,
            deadline,
        }
    }

    /// Whether the agent has said nothing of an answer yet.
    pub(crate) fn has_not_begun(&self) -> bool {
        self.arrived.expected() == 0 && self.arrived.is_empty()
    }

    /// The request's side of the wait.
    pub(crate) fn expected(&self) -> &Expected {
        &self.expected
    }

    /// The next part in order, whatever order they arrive in. `until` limits the wait for this part alone.
    ///
    /// # Errors
    /// When the agent says that it failed, is gone, or is out of time.
    pub(crate) async fn next(&mut self, until: Option<Instant>) -> Result<ReplyPart, ForwardError> {
        let waiting_since = Instant::now();
        let limit = self.deadline.into_iter().chain(until).min();
        let mut next_look = self
            .source
            .pause(Duration::ZERO)
            .map(|pause| waiting_since + pause);
        loop {
            while let Ok((number, part)) = self.expected.try_recv() {
                self.take(number, part)?;
            }
            if let Some(part) = self.ready.pop_front() {
                return Ok(part);
            }
            if let Some(ReplyPart::Failed { code, message }) = self.failure.take() {
                return Err(ForwardError::of_agent(code, message));
            }
            let waited = waiting_since.elapsed();
            let missing_until = self
                .arrived
                .is_incomplete()
                .then_some(waiting_since + MISSING_PART_TIMEOUT);
            let release_owned = limit.into_iter().chain(missing_until).min();
            if release_owned.is_some_and(|at| Instant::now() >= at) {
                return Err(ForwardError::LocalTimeout);
            }
            let wake = next_look.into_iter().chain(release_owned).min();
            tokio::select! {
                part = self.expected.recv() => match part {
                    Some((number, part)) => self.take(number, part)?,
                    None => return Err(ForwardError::AgentLost),
                },
                () = sleep_until(wake.unwrap_or(waiting_since)), if wake.is_some() => {
                    if next_look.is_some_and(|at| Instant::now() >= at) {
                        Box::pin(self.look(waited >= LIVENESS_CHECK_AFTER)).await?;
                        next_look = self.source.pause(waited).map(|pause| Instant::now() + pause);
                    }
                }
            }
        }
    }

    /// Looks into the mailbox.
    async fn look(&mut self, is_in_doubt: bool) -> Result<(), ForwardError> {
        let Source::Cloud {
            mailbox,
            connections,
            ..
        } = &self.source
        else {
            return Ok(());
        };
        let sender = self.expected.sender().clone();
        // Asked before the look, so that a reply stored just before the connection ended is still found.
        let is_lost = is_in_doubt && connections.get(&sender, now()).await?.is_none();
        for (number, part) in mailbox
            .read(&sender, self.expected.request(), self.arrived.expected())
            .await?
        {
            self.take(number, part)?;
        }
        while let Ok((number, part)) = self.expected.try_recv() {
            self.take(number, part)?;
        }
        if is_lost && self.ready.is_empty() && self.failure.is_none() {
            return Err(ForwardError::AgentLost);
        }
        Ok(())
    }

    fn take(&mut self, number: u32, part: ReplyPart) -> Result<(), ForwardError> {
        match part {
            ReplyPart::Failed { .. } => self.failure = Some(part),
            ReplyPart::Window(parts) => self.expected.allow(parts),
            ReplyPart::Head(..) | ReplyPart::Body(_) => {
                self.arrived
                    .insert(number, part)
                    .map_err(|error| ForwardError::InvalidReply(error.to_string()))?;
                self.ready
                    .extend(std::iter::from_fn(|| self.arrived.take_next()));
            }
        }
        Ok(())
    }
}

impl Source {
    /// How long until the next look into the mailbox. Looks grow rarer in proportion to the time waited, so that a quick reply is
    /// found at once and a slow one costs few reads; a reply that was pushed is there before the first.
    fn pause(&self, waited: Duration) -> Option<Duration> {
        match self {
            Self::InProcess => None,
            Self::Cloud {
                is_pushed: false, ..
            } => Some((waited / 4).clamp(Duration::from_millis(10), Duration::from_secs(1))),
            Self::Cloud {
                is_pushed: true, ..
            } => Some(waited.clamp(Duration::from_millis(120), Duration::from_secs(5))),
        }
    }
}
