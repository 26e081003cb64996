//! One request: to the local service, and its response back in as few messages as keep it moving.

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http::{Method, Response, StatusCode};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tunnel_shared::{
    headers::remove_hop_by_hop,
    id::RequestId,
    limits::PART_BODY,
    parts,
    protocol::{self, AgentError, AgentErrorCode, Body, BodyPart, FromAgent, HttpRequest, HttpResponse},
};

use crate::{
    event::Event,
    origin::{Failed, Origin, RequestBody},
    rewrite::PublicAddress,
};

/// How long bytes wait for company before they go out: a visitor does not notice, and each message has a price.
const GATHER: Duration = Duration::from_millis(10);
/// How long a body that will fit the first message is waited for.
const GATHER_WHOLE: Duration = Duration::from_millis(50);
/// Room for the flag and digits that the measure of an envelope does not show.
const ENVELOPE_SLACK: usize = 64;

/// What an exchange needs to know.
#[derive(Clone, Debug)]
pub struct Context {
    /// The local service.
    pub origin: Origin,
    /// How long it may take to start its response.
    pub timeout: Duration,
    /// Whether the service takes bodies in parts.
    pub parts: bool,
    /// Takes encoded messages to the service.
    pub outgoing: mpsc::Sender<String>,
}

/// The parts of a request's body that follow its first message; closed at the end. A body that breaks off ends the exchange.
pub type BodyParts = mpsc::Receiver<Bytes>;

/// Carries out one exchange and tells how it went.
pub async fn run(context: Context, message: HttpRequest, more: Option<BodyParts>) -> Event {
    let started = Instant::now();
    let (method, uri) = (message.method.parse().unwrap_or_default(), message.uri.clone());
    let mut reply = Reply { outgoing: context.outgoing.clone(), request_id: message.request_id.clone(), bytes: 0 };
    let outcome = match attempt(&context, message, more, &mut reply, started).await {
        Ok(status) => Ok(status),
        Err(failed) => {
            let text = failed.message.to_owned();
            reply
                .send(FromAgent::Error(AgentError { request_id: Some(reply.request_id.clone()), code: failed.code, message: text.clone() }))
                .await;
            Err(text)
        }
    };
    Event::Request { method, uri, outcome, bytes: reply.bytes, took: started.elapsed() }
}

async fn attempt(
    context: &Context,
    message: HttpRequest,
    more: Option<BodyParts>,
    reply: &mut Reply,
    started: Instant,
) -> Result<StatusCode, Failed> {
    let timeout = match message.deadline_ms {
        0 => context.timeout,
        deadline => context.timeout.min(Duration::from_millis(deadline)),
    };
    let public = PublicAddress::of(&message.headers);
    let request = context.origin.request(&message, body(message.body.0.clone(), more))?;
    let is_head = request.method() == Method::HEAD;
    let mut response = timeout_at(started + timeout, context.origin.call(request))
        .await
        .unwrap_or(Err(Failed { code: AgentErrorCode::Timeout, message: "the local service took too long" }))?;
    let status = response.status();
    remove_hop_by_hop(response.headers_mut());
    public.rewrite(response.headers_mut(), context.origin.target());
    let processing_time_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    reply.respond(response, is_head, processing_time_ms, context.parts).await?;
    Ok(status)
}

fn body(first: Bytes, more: Option<BodyParts>) -> RequestBody {
    match more {
        None => Full::new(first).boxed_unsync(),
        Some(parts) => {
            let rest = stream::unfold(parts, |mut parts| async move { parts.recv().await.map(|part| (Ok(Frame::data(part)), parts)) });
            StreamBody::new(futures_util::StreamExt::chain(stream::iter([Ok(Frame::data(first))]), rest)).boxed_unsync()
        }
    }
}

/// The way back to the visitor.
struct Reply {
    outgoing: mpsc::Sender<String>,
    request_id: RequestId,
    bytes: u64,
}

impl Reply {
    /// Waits for room on the connection, which is what slows a fast local service down. When the connection has ended the
    /// exchange is about to be dropped with it.
    async fn send(&self, message: FromAgent) {
        let _ = self.outgoing.send(protocol::encode(&message)).await;
    }

    async fn respond(&mut self, response: Response<Incoming>, is_head: bool, processing_time_ms: u64, parts: bool) -> Result<(), Failed> {
        let (head, body) = response.into_parts();
        let mut message = HttpResponse {
            request_id: self.request_id.clone(),
            status_code: head.status.as_u16(),
            headers: head.headers,
            body: Body::default(),
            processing_time_ms,
            more: false,
        };
        let room = room_beside_head(&message)?;
        if is_head {
            self.send(FromAgent::HttpResponse(message)).await;
            return Ok(());
        }
        let fits = body.size_hint().exact().is_some_and(|length| length <= room as u64);
        let mut gathering = Gathering { body, left: Bytes::new(), is_over: false };
        let (chunk, more) = if parts {
            gathering.gather(room, Instant::now() + if fits { GATHER_WHOLE } else { GATHER }).await?
        } else {
            let chunk = gathering.take(room).await?;
            (chunk, !gathering.is_at_end().await?)
        };
        if more && !parts {
            return Err(Failed {
                code: AgentErrorCode::ResponseTooLarge,
                message: "The response is longer than this service's version can carry.",
            });
        }
        self.bytes += chunk.len() as u64;
        (message.body, message.more) = (Body(chunk), more);
        self.send(FromAgent::HttpResponse(message)).await;
        let mut part = 1;
        let mut more = more;
        while more {
            gathering.wait().await?;
            let (chunk, is_more) = gathering.gather(PART_BODY, Instant::now() + GATHER).await?;
            more = is_more;
            self.bytes += chunk.len() as u64;
            self.send(FromAgent::BodyPart(BodyPart { request_id: self.request_id.clone(), part, body: Body(chunk), more })).await;
            part += 1;
        }
        Ok(())
    }
}

fn room_beside_head(message: &HttpResponse) -> Result<usize, Failed> {
    let envelope = protocol::encode(&FromAgent::HttpResponse(message.clone())).len() + ENVELOPE_SLACK;
    parts::room_beside(envelope)
        .ok_or(Failed { code: AgentErrorCode::ResponseTooLarge, message: "The response's header is longer than a tunnel can carry." })
}

/// A response body from which chunks of a wanted size are taken.
struct Gathering {
    body: Incoming,
    left: Bytes,
    is_over: bool,
}

impl Gathering {
    /// Waits until there are bytes, or the end.
    async fn wait(&mut self) -> Result<(), Failed> {
        while self.left.is_empty() && !self.is_over {
            match self.body.frame().await {
                None => self.is_over = true,
                // Trailers are dropped: API Gateway has no way to pass them on.
                Some(Ok(frame)) => self.left = frame.into_data().unwrap_or_default(),
                Some(Err(_)) => {
                    return Err(Failed {
                        code: AgentErrorCode::LocalServiceUnavailable,
                        message: "it broke off in the middle of its response",
                    });
                }
            }
        }
        Ok(())
    }

    /// Whether the body has ended, for which some of it may have to be read.
    async fn is_at_end(&mut self) -> Result<bool, Failed> {
        self.wait().await?;
        Ok(self.left.is_empty())
    }

    /// Up to `limit` bytes, fewer only at the body's end.
    async fn take(&mut self, limit: usize) -> Result<Bytes, Failed> {
        let (mut chunks, mut length) = (Vec::new(), 0);
        while length < limit && !self.is_at_end().await? {
            let chunk = self.left.split_to(self.left.len().min(limit - length));
            length += chunk.len();
            chunks.push(chunk);
        }
        Ok(parts::join(chunks))
    }

    /// Up to `limit` of the bytes that come before `until`, and whether the body goes on.
    async fn gather(&mut self, limit: usize, until: Instant) -> Result<(Bytes, bool), Failed> {
        let (mut chunks, mut length) = (Vec::new(), 0);
        loop {
            match timeout_at(until, self.wait()).await {
                Ok(outcome) => outcome?,
                Err(_) => break,
            }
            if length == limit || self.left.is_empty() {
                break;
            }
            let chunk = self.left.split_to(self.left.len().min(limit - length));
            length += chunk.len();
            chunks.push(chunk);
        }
        let more = !(self.is_over && self.left.is_empty());
        Ok((parts::join(chunks), more))
    }
}
