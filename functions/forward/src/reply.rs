//! Waiting for an agent's reply: its parts come to this process, or are found in the mailbox.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tunnel_protocol::body::ReceivedChunk;
use tunnel_service::{
    now,
    replies::{Expected, ReplyFailure, ReplyHead, ReplyPart, ReplyPath},
    tables::{connections::ConnectionsTable, mailbox::MailboxTable},
};

use crate::error::ForwardError;

/// After this long without a part, each look into the mailbox asks too whether the agent is still connected.
const LIVENESS_CHECK_AFTER: Duration = Duration::from_millis(400);
/// How long a reply is waited for after its connection was found to have ended: the function that stores its last part runs beside
/// the one that notes the end, and may be starting cold.
const LAST_PARTS_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a part may be missing while a later one is there. The function that stores it may be starting cold.
const MISSING_PART_TIMEOUT: Duration = Duration::from_secs(10);

/// The reply to one request.
#[derive(Debug)]
pub(crate) struct PendingReply {
    expected: Expected,
    mailbox: Option<Mailbox>,
    /// When the front gives up on the whole reply; `None` where it takes as long as it takes.
    deadline: Option<Instant>,
}

/// Where parts are found that are not brought to this process.
#[derive(Debug)]
struct Mailbox {
    parts: MailboxTable,
    connections: ConnectionsTable,
    /// A reply connection was named: the mailbox is for what could not be pushed.
    is_pushed: bool,
    /// Since when the agent's connection has been found to have ended.
    lost_since: Option<Instant>,
}

impl PendingReply {
    /// The reply that `expected` receives, over `path` or pushed.
    pub(crate) fn new(
        expected: Expected,
        path: &ReplyPath,
        is_pushed: bool,
        deadline: Option<Instant>,
    ) -> Self {
        let mailbox = match path {
            ReplyPath::InProcess(_) => None,
            ReplyPath::Cloud {
                mailbox,
                connections,
            } => Some(Mailbox {
                parts: mailbox.clone(),
                connections: connections.clone(),
                is_pushed,
                lost_since: None,
            }),
        };
        Self {
            expected,
            mailbox,
            deadline,
        }
    }

    /// The request's side of the wait.
    pub(crate) fn expected(&self) -> &Expected {
        &self.expected
    }

    /// The head, with the first bytes of the body. `until` limits the wait.
    ///
    /// # Errors
    /// As for [`PendingReply::next`].
    pub(crate) async fn head(
        &mut self,
        until: Instant,
    ) -> Result<(ReplyHead, ReceivedChunk), ForwardError> {
        let chunk = self.next(Some(until)).await?;
        let head = self
            .expected
            .take_head()
            .ok_or_else(|| ForwardError::InvalidReply("its first part has no head".to_owned()))?;
        Ok((head, chunk))
    }

    /// The next bytes of the body. `until` limits the wait for them alone.
    ///
    /// # Errors
    /// When the agent says that it failed, is gone, or is out of time.
    pub(crate) async fn next(
        &mut self,
        until: Option<Instant>,
    ) -> Result<ReceivedChunk, ForwardError> {
        let waiting_since = Instant::now();
        let limit = self.deadline.into_iter().chain(until).min();
        let mut next_look = self.next_look(waiting_since);
        loop {
            if let Some(chunk) = self.expected.try_next().map_err(of_failure)? {
                return Ok(chunk);
            }
            // It counts from the event it is about, and not from when this part was asked for.
            let missing_until = self
                .expected
                .missing_since()
                .map(|since| since + MISSING_PART_TIMEOUT);
            let give_up = limit.into_iter().chain(missing_until).min();
            if give_up.is_some_and(|at| Instant::now() >= at) {
                return Err(ForwardError::LocalTimeout);
            }
            let wake = next_look.into_iter().chain(give_up).min();
            tokio::select! {
                () = self.expected.changed() => {}
                () = sleep_until(wake.unwrap_or(waiting_since)), if wake.is_some() => {
                    if next_look.is_some_and(|at| Instant::now() >= at) {
                        Box::pin(self.look(waiting_since)).await?;
                        next_look = self.next_look(waiting_since);
                    }
                }
            }
        }
    }

    /// Waits until nothing comes any more, for an upload that goes on after its response: the window's updates still come in.
    pub(crate) async fn ended(&mut self) {
        while self.next(None).await.is_ok() {}
    }

    /// When to look into the mailbox next. Looks grow rarer in proportion to the time waited, so that a quick reply is found at
    /// once and a slow one costs few reads; a reply that was pushed is there before the first.
    fn next_look(&self, waiting_since: Instant) -> Option<Instant> {
        let mailbox = self.mailbox.as_ref()?;
        let waited = waiting_since.elapsed();
        let pause = if mailbox.lost_since.is_some() {
            LAST_PARTS_TIMEOUT / 4
        } else if mailbox.is_pushed {
            waited.clamp(Duration::from_millis(120), Duration::from_secs(5))
        } else {
            (waited / 4).clamp(Duration::from_millis(10), Duration::from_secs(1))
        };
        Some(Instant::now() + pause)
    }

    /// Looks into the mailbox.
    async fn look(&mut self, waiting_since: Instant) -> Result<(), ForwardError> {
        let Some(mailbox) = &mut self.mailbox else {
            return Ok(());
        };
        let sender = self.expected.sender();
        // Asked before the look, so that a reply stored just before the connection ended is still found.
        if waiting_since.elapsed() >= LIVENESS_CHECK_AFTER {
            mailbox.lost_since = match mailbox.connections.get(sender, now()).await? {
                Some(_) => None,
                None => mailbox.lost_since.or_else(|| Some(Instant::now())),
            };
        }
        let is_given_up = mailbox
            .lost_since
            .is_some_and(|since| since.elapsed() >= LAST_PARTS_TIMEOUT);
        let parts = mailbox
            .parts
            .read(sender, self.expected.request(), self.expected.next_number())
            .await?;
        let has_more = parts
            .iter()
            .any(|(_, part)| matches!(part, ReplyPart::Head(..) | ReplyPart::Body(_)));
        for (number, part) in parts {
            self.expected.take(number, part);
        }
        if is_given_up && !has_more {
            self.expected.lose();
        }
        Ok(())
    }
}

fn of_failure(failure: ReplyFailure) -> ForwardError {
    match failure {
        ReplyFailure::Agent { code, message } => ForwardError::of_agent(code, message),
        ReplyFailure::Invalid(why) => ForwardError::InvalidReply(why),
        ReplyFailure::Lost => ForwardError::AgentLost,
    }
}
