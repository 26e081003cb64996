//! Waiting for an agent's reply: its parts come to this process, or are found in the mailbox.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tunnel_protocol::{body::ReceivedChunk, limits::MAX_REORDER_PARTS};
use tunnel_service::{
    aside::aside,
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
    /// If the agent says that it failed, is gone, or is out of time.
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
            // It counts from the event that it is about, and not from when this part was requested.
            let missing_until = self
                .expected
                .missing_since()
                .map(|since| since + MISSING_PART_TIMEOUT);
            let give_up = limit.into_iter().chain(missing_until).min();
            if give_up.is_some_and(|at| Instant::now() >= at) {
                return Err(self
                    .expected
                    .failure()
                    .map_or(ForwardError::LocalTimeout, of_failure));
            }
            let wake = next_look.into_iter().chain(give_up).min();
            tokio::select! {
                () = self.expected.changed() => {}
                () = sleep_until(wake.unwrap_or(waiting_since)), if wake.is_some() => {
                    if next_look.is_some_and(|at| Instant::now() >= at) {
                        aside(|| self.look(waiting_since)).await?;
                        next_look = self.next_look(waiting_since);
                    }
                }
            }
        }
    }

    /// Waits until nothing arrives any more, for an upload that continues after its response: window updates still arrive.
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
        let next = self.expected.next_number();
        for (at, (number, part)) in parts.into_iter().enumerate() {
            // They are in the order of their numbers. What cannot be held yet stays there until the next look, but a reply whose
            // first part is that far ahead is not one.
            let is_too_far = number.saturating_sub(next) as usize >= MAX_REORDER_PARTS;
            let is_part = matches!(part, ReplyPart::Head(..) | ReplyPart::Body(_));
            if at == 0 || !is_part || !is_too_far {
                self.expected.take(number, part);
            }
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

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tunnel_protocol::id::{ConnectionId, RequestId};
    use tunnel_service::replies::{Replies, Reply};

    use super::*;

    struct Agent {
        replies: Replies,
        id: ConnectionId,
        request: RequestId,
    }

    impl Agent {
        /// Says this of the request.
        fn say(&self, mut message: serde_json::Value) {
            message["request_id"] = json!(self.request);
            let message = serde_json::from_value(message).expect("a message");
            let reply = Reply::from_message(message).expect("about a request");
            self.replies.deliver(&self.id, reply);
        }

        fn head(&self) {
            self.say(json!({ "type": "http_response", "status_code": 200, "more": true }));
        }

        fn part(&self, number: u32) {
            self.say(json!({ "type": "body_part", "part": number, "more": true }));
        }
    }

    /// An agent that has a request, and the wait for its reply.
    fn asked(deadline: Option<Instant>) -> (Agent, PendingReply) {
        let (replies, request) = (Replies::default(), RequestId::generate());
        let id: ConnectionId = "c".parse().expect("an id");
        let expected = replies.expect(id.clone(), request.clone());
        let path = ReplyPath::InProcess(replies.clone());
        let reply = PendingReply::new(expected, &path, false, deadline);
        let agent = Agent {
            replies,
            id,
            request,
        };
        (agent, reply)
    }

    fn after(seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn a_part_is_missing_from_when_a_later_one_is_there_and_not_from_when_it_is_waited_for() {
        let (agent, mut reply) = asked(None);
        let started = Instant::now();
        let (head, ()) = tokio::join!(reply.head(after(60)), async {
            tokio::time::sleep(Duration::from_secs(11)).await;
            agent.part(1);
            tokio::time::sleep(Duration::from_secs(9)).await;
            agent.head();
        });
        assert_eq!(head.expect("a head").0.status_code, 200);
        assert_eq!(started.elapsed().as_secs(), 20);

        // A pause in a stream is the same.
        reply.next(None).await.expect("part 1");
        let (part, ()) = tokio::join!(reply.next(None), async {
            tokio::time::sleep(Duration::from_secs(11)).await;
            agent.part(3);
            tokio::time::sleep(Duration::from_secs(9)).await;
            agent.part(2);
        });
        part.expect("part 2");
        reply.next(None).await.expect("part 3");
    }

    #[tokio::test(start_paused = true)]
    async fn a_part_that_stays_missing_ends_the_wait_ten_seconds_after_a_later_one_came() {
        for silent_secs in [0, 11] {
            let (agent, mut reply) = asked(None);
            let started = Instant::now();
            let (head, ()) = tokio::join!(reply.head(after(60)), async {
                tokio::time::sleep(Duration::from_secs(silent_secs)).await;
                agent.part(1);
                tokio::time::sleep(Duration::from_secs(5)).await;
                // More of the same makes it no younger.
                agent.part(2);
            });
            assert!(matches!(head, Err(ForwardError::LocalTimeout)), "{head:?}");
            assert_eq!(started.elapsed().as_secs(), silent_secs + 10);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_told_though_parts_before_it_never_come() {
        let (agent, mut reply) = asked(None);
        agent.head();
        reply.head(after(60)).await.expect("a head");
        let started = Instant::now();
        agent.say(json!({ "type": "error", "code": "local_service_unavailable", "parts": 3 }));
        let failed = reply.next(None).await;
        assert!(
            matches!(failed, Err(ForwardError::LocalUnreachable(_))),
            "{failed:?}"
        );
        assert_eq!(started.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reply_is_waited_for_until_its_deadline_and_no_longer() {
        let (agent, mut reply) = asked(Some(after(29)));
        let started = Instant::now();
        assert!(matches!(
            reply.head(after(60)).await,
            Err(ForwardError::LocalTimeout)
        ));
        assert_eq!(started.elapsed().as_secs(), 29);
        drop(agent);

        let (agent, mut reply) = asked(None);
        agent.head();
        reply.head(after(60)).await.expect("a head");
        let (part, ()) = tokio::join!(reply.next(None), async {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            agent.part(1);
        });
        part.expect("an event stream may pause as long as it likes");
    }

    #[tokio::test(start_paused = true)]
    async fn what_came_in_order_is_given_out_before_the_end() {
        let (agent, mut reply) = asked(None);
        agent.head();
        agent.part(1);
        agent.replies.lose(&agent.id);
        reply.head(after(60)).await.expect("a head");
        reply.next(None).await.expect("part 1");
        assert!(matches!(
            reply.next(None).await,
            Err(ForwardError::AgentLost)
        ));
    }
}
