//! Replies on their way to the requests of this process that wait for them: in Lambda from a reply connection, in `local`
//! straight from the `$default` route.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use http::HeaderMap;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{self, error::TryRecvError};

use tunnel_protocol::{
    body::{Chunk, Part, window::SendWindow, window::WindowUpdates},
    headers,
    id::{ConnectionId, RequestId},
    limits::MAX_REORDER_PARTS,
    message::{AgentError, AgentErrorCode, BodyPart, HttpResponse, Window},
};

/// A piece of an agent's reply.
#[derive(Clone, Debug, PartialEq)]
pub enum ReplyPart {
    /// Part 0: the response's head, and the start of its body.
    Head(ReplyHead, Chunk),
    /// Any later part.
    Body(Chunk),
    /// There is no response, or no more of it.
    Failed {
        /// What kind of failure.
        code: AgentErrorCode,
        /// The failure in a sentence.
        message: String,
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

/// A piece of a reply with its place: the request it answers and its number.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The request.
    pub request_id: RequestId,
    /// The part's number; of no meaning for what is no part.
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
    /// What it means to a request that a message about it cannot be read.
    pub fn unreadable(request_id: RequestId) -> Self {
        let message =
            "a message of it has a header, a status or a body that cannot be read".to_owned();
        Self {
            request_id,
            part: 0,
            content: ReplyPart::Failed {
                code: AgentErrorCode::InternalError,
                message,
            },
        }
    }

    /// A failure of one request; `None` when the agent named none.
    pub fn of_error(error: AgentError) -> Option<Self> {
        let content = ReplyPart::Failed {
            code: error.code,
            message: error.message,
        };
        Some(Self {
            request_id: error.request_id?,
            part: 0,
            content,
        })
    }
}

/// A part with its number.
type Numbered = (u32, ReplyPart);

#[derive(Debug)]
struct Inbox {
    parts: mpsc::Sender<Numbered>,
    window: WindowUpdates,
}

/// The requests that wait for replies, each by the connection it was sent to: nobody else can answer it.
#[derive(Clone, Debug, Default)]
pub struct Replies(Arc<Mutex<HashMap<(ConnectionId, RequestId), Inbox>>>);

impl Replies {
    /// Takes replies of `sender` to `request` from now on.
    pub fn expect(&self, sender: ConnectionId, request: RequestId) -> Expected {
        // One place more than parts: for the word that there were too many.
        let (parts, received) = mpsc::channel(MAX_REORDER_PARTS + 1);
        let window = WindowUpdates::default();
        let key = (sender, request);
        self.lock().insert(
            key.clone(),
            Inbox {
                parts,
                window: window.clone(),
            },
        );
        Expected {
            replies: self.clone(),
            key,
            received,
            window,
        }
    }

    /// Hands a reply to the request that waits for it, and tells whether one does.
    pub fn deliver(&self, sender: &ConnectionId, reply: Reply) -> bool {
        let mut waiting = self.lock();
        let key = (sender.clone(), reply.request_id);
        let Some(inbox) = waiting.get(&key) else {
            return false;
        };
        if let ReplyPart::Window(parts) = reply.content {
            inbox.window.allow(parts);
            return true;
        }
        if inbox.parts.capacity() > 1 {
            // It has a place, and the lock keeps others from taking it.
            return inbox.parts.try_send((reply.part, reply.content)).is_ok();
        }
        let message =
            format!("it sends more than {MAX_REORDER_PARTS} parts ahead of what the visitor takes");
        let _ = inbox.parts.try_send((
            reply.part,
            ReplyPart::Failed {
                code: AgentErrorCode::InternalError,
                message,
            },
        ));
        waiting.remove(&key);
        true
    }

    /// Ends the wait of all requests that were sent to `connection`: it has ended.
    pub fn lose(&self, connection: &ConnectionId) {
        self.lock().retain(|(sender, _), _| sender != connection);
    }

    /// Held between awaits only.
    fn lock(&self) -> MutexGuard<'_, HashMap<(ConnectionId, RequestId), Inbox>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request's side of [`Replies`]. Dropped, it takes no more.
#[derive(Debug)]
pub struct Expected {
    replies: Replies,
    key: (ConnectionId, RequestId),
    received: mpsc::Receiver<Numbered>,
    window: WindowUpdates,
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

    /// The next part to arrive, in no order; `None` once the connection is lost.
    pub async fn recv(&mut self) -> Option<Numbered> {
        self.received.recv().await
    }

    /// Like [`Expected::recv`], if there is something.
    ///
    /// # Errors
    /// When there is nothing, now or ever.
    pub fn try_recv(&mut self) -> Result<Numbered, TryRecvError> {
        self.received.try_recv()
    }

    /// The window of the request's body.
    pub fn window(&self) -> SendWindow {
        self.window.window()
    }

    /// Allows more of the request's body.
    pub fn allow(&self, parts: u32) {
        self.window.allow(parts);
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.replies.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn part(request: &RequestId, part: u32) -> Reply {
        let chunk = Chunk {
            bytes: Bytes::new(),
            encoding: None,
            more: true,
        };
        Reply {
            request_id: request.clone(),
            part,
            content: ReplyPart::Body(chunk),
        }
    }

    fn id(text: &str) -> ConnectionId {
        text.parse().expect("an id")
    }

    #[tokio::test]
    async fn only_the_connection_that_was_asked_can_answer() {
        let (replies, request) = (Replies::default(), RequestId::generate());
        let mut expected = replies.expect(id("asked"), request.clone());
        assert!(!replies.deliver(&id("other"), part(&request, 0)));
        assert!(
            !replies.deliver(&id("asked"), part(&RequestId::generate(), 0)),
            "a request that nobody made"
        );
        assert!(replies.deliver(&id("asked"), part(&request, 7)));
        assert_eq!(expected.recv().await.map(|(number, _)| number), Some(7));
        drop(expected);
        assert!(
            !replies.deliver(&id("asked"), part(&request, 8)),
            "nobody waits any more"
        );
    }

    #[tokio::test]
    async fn an_agent_that_sends_without_end_is_cut_off_and_its_visitor_told() {
        let (replies, request) = (Replies::default(), RequestId::generate());
        let mut expected = replies.expect(id("c"), request.clone());
        let taken = (0..1000)
            .filter(|number| replies.deliver(&id("c"), part(&request, *number)))
            .count();
        assert_eq!(taken, MAX_REORDER_PARTS + 1);
        for _ in 0..MAX_REORDER_PARTS {
            assert!(matches!(
                expected.recv().await,
                Some((_, ReplyPart::Body(_)))
            ));
        }
        assert!(matches!(
            expected.recv().await,
            Some((_, ReplyPart::Failed { .. }))
        ));
        assert_eq!(expected.recv().await, None);
    }

    #[tokio::test]
    async fn a_lost_connection_ends_the_wait_for_it_and_no_other() {
        let replies = Replies::default();
        let mut lost = replies.expect(id("lost"), RequestId::generate());
        let mut other = replies.expect(id("other"), RequestId::generate());
        replies.lose(&id("lost"));
        assert_eq!(lost.recv().await, None);
        assert_eq!(other.try_recv(), Err(TryRecvError::Empty));
    }
}
