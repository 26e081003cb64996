//! Agents' replies and the way they take to the requests of a process that wait for them.
//!
//! [`Replies`] is where requests wait. What reaches it was sent by an agent of this process, came over a reply connection, or was
//! found in the mailbox: [`ReplyPath`] knows which of these there are.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use http::HeaderMap;
use serde::{Deserialize, Serialize};
use tokio::{sync::Notify, time::Instant};
use tunnel_protocol::{
    body::{
        BodyReceiver, Chunk, Part, ReceivedChunk,
        budget::BodyBudget,
        window::{SendWindow, WindowUpdates},
    },
    headers,
    id::{ConnectionId, RequestId},
    message::{AgentError, AgentErrorCode, BodyPart, FromAgent, HttpResponse, Window},
};

use crate::{
    aside::aside, now, tables::connections::ConnectionsTable, tables::dynamodb::StoreError,
    tables::mailbox::MailboxTable,
};

/// The types of messages that are replies: those that [`Reply::from_message`] takes.
pub const REPLY_TYPES: [&str; 4] = ["http_response", "body_part", "window", "error"];

/// What a message says about a request.
#[derive(Clone, Debug, PartialEq)]
pub enum ReplyPart {
    /// Part 0: the response's head, and the start of its body.
    Head(ReplyHead, Chunk),
    /// Any later part.
    Body(Chunk),
    /// There is no response, or the rest of it will not come.
    Failed {
        /// What kind of failure.
        code: AgentErrorCode,
        /// The failure in a sentence.
        message: String,
        /// Parts with numbers below this were sent before.
        parts: u32,
    },
    /// Parts of the request's body with smaller numbers may be sent.
    Window(u32),
}

/// A response without its body.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplyHead {
    /// 200 to 599, if the agent is honest.
    pub status_code: u16,
    /// The fields, as the agent sent them.
    #[serde(with = "headers::json")]
    pub headers: HeaderMap,
    /// How long the local service took to its head, in milliseconds.
    pub processing_time_ms: u64,
}

/// A message about a request: the request it answers, the part's number, and what it says.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The request.
    pub request_id: RequestId,
    /// The part's number; without meaning for what is not a part.
    pub part: u32,
    /// What it says.
    pub content: ReplyPart,
}

impl From<HttpResponse> for Reply {
    fn from(mut response: HttpResponse) -> Self {
        let chunk = response.take_chunk();
        let head = ReplyHead {
            status_code: response.status_code,
            headers: response.headers,
            processing_time_ms: response.processing_time_ms,
        };
        Self {
            request_id: response.request_id,
            part: 0,
            content: ReplyPart::Head(head, chunk),
        }
    }
}

impl From<BodyPart> for Reply {
    fn from(message: BodyPart) -> Self {
        let request_id = message.request_id.clone();
        let part = Part::from(message);
        Self {
            request_id,
            part: part.number,
            content: ReplyPart::Body(part.chunk),
        }
    }
}

impl From<Window> for Reply {
    fn from(window: Window) -> Self {
        Self {
            request_id: window.request_id,
            part: 0,
            content: ReplyPart::Window(window.parts),
        }
    }
}

impl Reply {
    /// A message as a reply.
    ///
    /// # Errors
    /// The message, when it is not about a request.
    pub fn from_message(message: FromAgent) -> Result<Self, Box<FromAgent>> {
        match message {
            FromAgent::HttpResponse(response) => Ok(response.into()),
            FromAgent::BodyPart(part) => Ok(part.into()),
            FromAgent::Window(window) => Ok(window.into()),
            FromAgent::Error(AgentError {
                request_id: Some(request_id),
                code,
                message,
                parts,
                ..
            }) => Ok(Self::failed(request_id, code, message, parts)),
            other => Err(Box::new(other)),
        }
    }

    /// What it means to a request that a message about it cannot be read.
    pub fn unreadable(request_id: RequestId) -> Self {
        let message = "a message has a header, a status or a body that cannot be read".to_owned();
        Self::failed(request_id, AgentErrorCode::InternalError, message, 0)
    }

    fn failed(request_id: RequestId, code: AgentErrorCode, message: String, parts: u32) -> Self {
        Self {
            request_id,
            part: 0,
            content: ReplyPart::Failed {
                code,
                message,
                parts,
            },
        }
    }
}

/// How replies get from the function that receives from agents to the one that serves visitors.
#[derive(Clone, Debug)]
pub enum ReplyPath {
    /// Both run in this process.
    InProcess(Replies),
    /// Through DynamoDB, for what no reply connection brings.
    Cloud {
        /// Where replies are left.
        mailbox: MailboxTable,
        /// Who is connected.
        connections: ConnectionsTable,
    },
}

impl ReplyPath {
    /// Leaves a reply where the request that waits for it finds it. A request that does not wait any more misses nothing.
    ///
    /// # Errors
    /// If DynamoDB does not answer.
    pub async fn leave(&self, sender: &ConnectionId, reply: Reply) -> Result<(), StoreError> {
        match self {
            Self::InProcess(replies) => {
                replies.deliver(sender, reply);
                Ok(())
            }
            Self::Cloud { mailbox, .. } => aside(|| mailbox.put(sender, reply, now())).await,
        }
    }
}

/// Why the rest of a reply will not come.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ReplyFailure {
    /// The agent says so.
    Agent {
        /// What kind of failure.
        code: AgentErrorCode,
        /// The failure in a sentence.
        message: String,
    },
    /// What the agent sent is not a reply.
    Invalid(String),
    /// The agent's connection has ended.
    Lost,
}

/// A reply as far as it has arrived.
#[derive(Debug)]
struct Arrived {
    head: Option<ReplyHead>,
    body: BodyReceiver,
    end: Option<FailedEnd>,
}

/// That the rest of a reply will not come.
#[derive(Debug)]
struct FailedEnd {
    failure: ReplyFailure,
    /// Parts with numbers below this may still be on their way.
    parts: u32,
    since: Instant,
}

#[derive(Debug)]
struct Inbox {
    arrived: Mutex<Arrived>,
    changed: Notify,
    window: WindowUpdates,
    /// The reply has changed the protocol.
    is_upgraded: AtomicBool,
}

impl Inbox {
    fn take(&self, reply: ReplyPart, number: u32) {
        let mut arrived = self.arrived();
        match reply {
            ReplyPart::Window(parts) => return self.window.allow(parts),
            ReplyPart::Failed {
                code,
                message,
                parts,
            } => {
                arrived.fail(ReplyFailure::Agent { code, message }, parts);
            }
            ReplyPart::Head(head, chunk) => {
                arrived.head.get_or_insert(head);
                arrived.insert(0, chunk);
            }
            ReplyPart::Body(_) if number == 0 => {
                let why = "its first part has no head".to_owned();
                arrived.fail(ReplyFailure::Invalid(why), 0);
            }
            ReplyPart::Body(chunk) => arrived.insert(number, chunk),
        }
        drop(arrived);
        self.changed.notify_one();
    }

    fn fail(&self, failure: ReplyFailure) {
        self.arrived().fail(failure, 0);
        self.changed.notify_one();
    }

    fn is_upgraded(&self) -> bool {
        self.is_upgraded.load(Ordering::Relaxed)
    }

    /// Held between awaits only.
    fn arrived(&self) -> MutexGuard<'_, Arrived> {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arrived {
    /// The first failure counts; a later one may show that the parts before it will not come either.
    fn fail(&mut self, failure: ReplyFailure, parts: u32) {
        let end = self.end.get_or_insert_with(|| FailedEnd {
            failure,
            parts,
            since: Instant::now(),
        });
        end.parts = end.parts.min(parts);
    }

    fn insert(&mut self, number: u32, chunk: Chunk) {
        if let Err(error) = self.body.insert(number, chunk) {
            self.fail(ReplyFailure::Invalid(error.to_string()), 0);
        }
    }
}

/// Inboxes by the connection that is to answer, and the request. Nobody else can choose either id, so a quick hash is enough.
type Waiting = foldhash::HashMap<(ConnectionId, RequestId), Arc<Inbox>>;

/// The requests that wait for replies, each by the connection it was sent to: no other can answer it.
#[derive(Clone, Debug, Default)]
pub struct Replies {
    waiting: Arc<Mutex<Waiting>>,
    budget: BodyBudget,
}

impl Replies {
    /// Takes replies of `sender` to `request` from now on.
    pub fn expect(&self, sender: ConnectionId, request: RequestId) -> Expected {
        let inbox = Arc::new(Inbox {
            arrived: Mutex::new(Arrived {
                head: None,
                body: BodyReceiver::new(&self.budget),
                end: None,
            }),
            changed: Notify::new(),
            window: WindowUpdates::default(),
            is_upgraded: AtomicBool::new(false),
        });
        let key = (sender, request);
        self.lock().insert(key.clone(), inbox.clone());
        Expected {
            replies: self.clone(),
            key,
            inbox,
        }
    }

    /// How many bytes of bodies are held now: they wait for slow visitors, or for parts that are missing.
    pub fn held_body_bytes(&self) -> usize {
        self.budget.held_bytes()
    }

    /// Passes a reply to the request that waits for it, and returns whether there is one.
    pub fn deliver(&self, sender: &ConnectionId, reply: Reply) -> bool {
        let key = (sender.clone(), reply.request_id);
        let Some(inbox) = self.lock().get(&key).cloned() else {
            return false;
        };
        inbox.take(reply.content, reply.part);
        true
    }

    /// Ends the wait of all requests that were sent to `connection`: it has ended.
    pub fn lose(&self, connection: &ConnectionId) {
        self.lock().retain(|(sender, _), inbox| {
            let is_lost = sender == connection;
            if is_lost {
                inbox.fail(ReplyFailure::Lost);
            }
            !is_lost
        });
    }

    /// Whether `connection` carries upgraded connections, which end when one of their two ends does and not before.
    pub fn carries_upgraded(&self, connection: &ConnectionId) -> bool {
        self.lock()
            .iter()
            .any(|((sender, _), inbox)| sender == connection && inbox.is_upgraded())
    }

    /// Held between awaits only.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The receiving side of [`Replies`] for one request. Dropping it ends the wait.
#[derive(Debug)]
pub struct Expected {
    replies: Replies,
    key: (ConnectionId, RequestId),
    inbox: Arc<Inbox>,
}

impl Expected {
    /// The connection that is to reply.
    pub fn sender(&self) -> &ConnectionId {
        &self.key.0
    }

    /// The request that waits.
    pub fn request(&self) -> &RequestId {
        &self.key.1
    }

    /// Waits until something may have changed since the last call.
    pub async fn changed(&self) {
        self.inbox.changed.notified().await;
    }

    /// Takes what was found elsewhere, such as in the mailbox.
    pub fn take(&self, number: u32, reply: ReplyPart) {
        self.inbox.take(reply, number);
    }

    /// Ends the wait: the connection was found to have ended.
    pub fn lose(&self) {
        self.inbox.fail(ReplyFailure::Lost);
    }

    /// The head, once, when it is there.
    pub fn take_head(&self) -> Option<ReplyHead> {
        self.inbox.arrived().head.take()
    }

    /// The next bytes of the body, if they are there. What is in order comes before a failure.
    ///
    /// # Errors
    /// Why nothing comes any more.
    pub fn try_next(&self) -> Result<Option<ReceivedChunk>, ReplyFailure> {
        let mut arrived = self.inbox.arrived();
        match arrived.body.next_chunk() {
            Ok(Some(chunk)) => Ok(Some(chunk)),
            Ok(None) => match &arrived.end {
                Some(end) if arrived.body.next_number() >= end.parts => Err(end.failure.clone()),
                _ => Ok(None),
            },
            Err(error) => Err(ReplyFailure::Invalid(error.to_string())),
        }
    }

    /// Since when the next part has been missing although later ones, or the reply's end, are there.
    pub fn missing_since(&self) -> Option<Instant> {
        let arrived = self.inbox.arrived();
        let end = arrived.end.as_ref().map(|end| end.since);
        arrived.body.missing_since().into_iter().chain(end).min()
    }

    /// Why no part comes after those that are missing, if that is known.
    pub fn failure(&self) -> Option<ReplyFailure> {
        let arrived = self.inbox.arrived();
        arrived.end.as_ref().map(|end| end.failure.clone())
    }

    /// The number of the next part to be given out.
    pub fn next_number(&self) -> u32 {
        self.inbox.arrived().body.next_number()
    }

    /// Whether nothing of a response has arrived.
    pub fn has_nothing(&self) -> bool {
        self.inbox.arrived().body.has_nothing()
    }

    /// Notes that the reply has changed the protocol.
    pub fn upgraded(&self) {
        self.inbox.is_upgraded.store(true, Ordering::Relaxed);
    }

    /// The window of the request's body.
    pub fn window(&self) -> SendWindow {
        self.inbox.window.window()
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.replies.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use serde_json::json;
    use tunnel_protocol::limits::MAX_REORDER_PARTS;

    use super::*;

    fn part(request: &RequestId, part: u32) -> Reply {
        Reply {
            request_id: request.clone(),
            part,
            content: ReplyPart::Body(Chunk {
                bytes: format!("{part} ").into(),
                encoding: None,
                more: true,
            }),
        }
    }

    fn head(request: &RequestId) -> Reply {
        let response = json!({ "request_id": request, "status_code": 200, "more": true });
        serde_json::from_value::<HttpResponse>(response)
            .expect("a response")
            .into()
    }

    /// That the reply ends after this many parts.
    fn error(request: &RequestId, parts: u32) -> Reply {
        let error =
            json!({ "type": "error", "request_id": request, "code": "timeout", "parts": parts });
        Reply::from_message(serde_json::from_value(error).expect("a message"))
            .expect("about a request")
    }

    fn id(text: &str) -> ConnectionId {
        text.parse().expect("an id")
    }

    #[test]
    fn only_the_connection_that_was_asked_can_answer() {
        let (replies, request) = (Replies::default(), RequestId::generate());
        let expected = replies.expect(id("asked"), request.clone());
        assert!(!replies.deliver(&id("other"), head(&request)));
        assert!(!replies.deliver(&id("asked"), head(&RequestId::generate())));
        assert!(expected.has_nothing());
        assert!(replies.deliver(&id("asked"), head(&request)));
        assert!(!expected.has_nothing());
        drop(expected);
        assert!(!replies.deliver(&id("asked"), part(&request, 1)));
    }

    #[test]
    fn an_agent_that_sends_without_end_is_cut_off_after_what_it_sent() {
        let (replies, request) = (Replies::default(), RequestId::generate());
        let expected = replies.expect(id("c"), request.clone());
        replies.deliver(&id("c"), head(&request));
        for number in 1..1000 {
            replies.deliver(&id("c"), part(&request, number));
        }
        for number in 0..MAX_REORDER_PARTS {
            let chunk = expected.try_next().expect("in order").expect("there");
            let sent = if number == 0 {
                String::new()
            } else {
                format!("{number} ")
            };
            assert_eq!(chunk.bytes, sent);
        }
        assert!(matches!(expected.try_next(), Err(ReplyFailure::Invalid(_))));
    }

    #[test]
    fn a_body_without_a_head_is_not_a_reply() {
        let (replies, request) = (Replies::default(), RequestId::generate());
        let expected = replies.expect(id("c"), request.clone());
        replies.deliver(&id("c"), part(&request, 0));
        assert!(matches!(expected.try_next(), Err(ReplyFailure::Invalid(_))));
    }

    #[test]
    fn messages_that_overtake_are_delivered_in_order_and_before_a_failure() {
        let (replies, request) = (Replies::default(), RequestId::generate());
        let expected = replies.expect(id("c"), request.clone());
        replies.deliver(&id("c"), part(&request, 1));
        replies.deliver(&id("c"), error(&request, 0));
        replies.deliver(&id("c"), head(&request));
        assert_eq!(expected.take_head().map(|head| head.status_code), Some(200));
        for bytes in ["", "1 "] {
            let chunk = expected.try_next().expect("in order").expect("there");
            assert_eq!(chunk.bytes, bytes);
        }
        assert!(matches!(
            expected.try_next(),
            Err(ReplyFailure::Agent {
                code: AgentErrorCode::Timeout,
                ..
            })
        ));
    }

    #[test]
    fn a_failure_that_overtakes_the_parts_before_it_counts_after_them() {
        let (replies, request) = (Replies::default(), RequestId::generate());
        let expected = replies.expect(id("c"), request.clone());
        replies.deliver(&id("c"), error(&request, 3));
        assert_eq!(expected.try_next(), Ok(None));
        assert!(expected.missing_since().is_some());
        replies.deliver(&id("c"), part(&request, 2));
        replies.deliver(&id("c"), head(&request));
        assert!(matches!(expected.try_next(), Ok(Some(_))), "the head");
        assert_eq!(expected.try_next(), Ok(None));
        replies.deliver(&id("c"), part(&request, 1));
        for number in [1, 2] {
            assert!(matches!(expected.try_next(), Ok(Some(_))), "{number}");
        }
        assert!(matches!(
            expected.try_next(),
            Err(ReplyFailure::Agent { .. })
        ));

        // What is missing does not come over a connection that has ended.
        let request = RequestId::generate();
        let expected = replies.expect(id("c"), request.clone());
        replies.deliver(&id("c"), error(&request, u32::MAX));
        replies.lose(&id("c"));
        assert!(matches!(
            expected.try_next(),
            Err(ReplyFailure::Agent { .. })
        ));
    }

    #[test]
    fn a_lost_connection_ends_the_wait_for_it_and_no_other() {
        let replies = Replies::default();
        let lost = replies.expect(id("lost"), RequestId::generate());
        let other = replies.expect(id("other"), RequestId::generate());
        replies.lose(&id("lost"));
        assert_eq!(lost.changed().now_or_never(), Some(()));
        assert_eq!(lost.try_next(), Err(ReplyFailure::Lost));
        assert_eq!(other.changed().now_or_never(), None);
        assert_eq!(other.try_next(), Ok(None));
    }

    #[test]
    fn every_message_about_a_request_is_a_reply_and_no_other_is() {
        let request = RequestId::generate();
        for kind in ["ready", "ping", "release", "unheard_of"]
            .iter()
            .chain(&REPLY_TYPES)
        {
            let message = json!({
                "type": kind, "request_id": request, "status_code": 200, "part": 1, "parts": 1, "code": "busy",
            });
            let message = serde_json::from_value(message).expect("a message");
            assert_eq!(
                Reply::from_message(message).is_ok(),
                REPLY_TYPES.contains(kind),
                "{kind}"
            );
        }
    }
}
