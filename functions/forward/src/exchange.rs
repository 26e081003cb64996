//! One request and its reply: out to the agent in as few messages as fit, back as a response whose body arrives in parts.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use futures_util::{Stream, stream};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::{sync::oneshot, task::AbortHandle, time::Instant};
use tracing::warn;
use tunnel_shared::{
    cloud::{
        mailbox::{Chunk, ReplyPart},
        now,
        tunnels::Online,
        websocket::PostError,
    },
    headers::{self, FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PREFIX, FORWARDED_PROTO, TUNNEL_ERROR},
    id::{RequestId, TunnelId},
    limits::{HEADER_FIELDS, PART_BODY},
    parts,
    protocol::{self, Body, BodyPart, Feature, HttpRequest, ToAgent},
};

use crate::{
    Parts,
    answer::{AnswerBody, AnswerError},
    record::Record,
    refusal::Refusal,
    reply::PendingReply,
    visit::{Front, Visit, VisitBody},
};

/// The JSON around a `more` flag and a longer deadline that the first measure of an envelope does not show.
const ENVELOPE_SLACK: usize = 64;

/// Sends a visit to the tunnel's agent and returns when the reply's head is there.
///
/// # Errors
/// Everything that leaves the visitor without a response.
pub(crate) async fn run(
    function: &Arc<Parts>,
    visit: Visit,
    tunnel: &TunnelId,
    prefix: &str,
    path: &str,
    record: &mut Record,
) -> Result<Replying, Refusal> {
    let head_deadline = Instant::now() + visit.front.patience();
    let online = find(function, tunnel).await?;
    let (method, front) = (visit.method.clone(), visit.front);
    let (message, rest) = first_message(visit, prefix, path, &online).await?;
    let request = message.request_id.clone();
    record.request = Some(request.clone());
    record.request_bytes.fetch_add(message.body.0.len() as u64, Ordering::Relaxed);
    let online = deliver(function, tunnel, online, message).await?;
    record.connection = Some(online.connection_id.clone());

    let deadline = matches!(front, Front::HttpApi(_)).then_some(head_deadline);
    let connection = online.connection_id.clone();
    let replies = PendingReply::new(function.mailbox.clone(), function.connections.clone(), connection, request.clone(), deadline);
    let mut exchange = Exchange { function: function.clone(), online, request, replies, upload: None, is_over: false };
    if let Some(rest) = rest {
        exchange.upload = Some(exchange.upload(rest, record.request_bytes.clone()));
    }
    let ReplyPart::Head(head, first) = exchange.next(Some(head_deadline)).await? else {
        return Err(Refusal::InvalidReply("its first part is not its head".to_owned()));
    };
    let status = StatusCode::from_u16(head.status_code).ok().filter(|status| !status.is_informational());
    let status = status.ok_or_else(|| Refusal::InvalidReply("its status is none that ends a response".to_owned()))?;
    record.replied(head.status_code);
    let has_no_body = method == Method::HEAD || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED;
    let first = if has_no_body { Chunk { bytes: Bytes::new(), more: false } } else { first };
    Ok(Replying { exchange, status, fields: response_fields(head.headers), first })
}

/// A reply that has begun.
pub(crate) struct Replying {
    exchange: Exchange,
    status: StatusCode,
    fields: HeaderMap,
    first: Chunk,
}

impl Replying {
    /// The response, which tells `record` how it ends.
    pub(crate) fn into_response(mut self, mut record: Record) -> Response<AnswerBody> {
        if !self.first.more {
            // Known now, because a front that has no use for an empty body does not ask for it.
            self.exchange.is_over = true;
            record.completed();
        }
        let mut response = Response::new(StreamBody::new(self.exchange.into_body(self.first, record)).boxed_unsync());
        *response.status_mut() = self.status;
        *response.headers_mut() = self.fields;
        response
    }
}

async fn find(function: &Parts, tunnel: &TunnelId) -> Result<Online, Refusal> {
    let found = function.tunnels.get(tunnel, now()).await?.ok_or(Refusal::NoSuchTunnel)?;
    found.online.ok_or(Refusal::Offline)
}

/// Posts the first message. Where the tunnel has just moved to another connection, it is posted there: the first one did not
/// take it, so nothing is sent twice.
async fn deliver(function: &Parts, tunnel: &TunnelId, online: Online, message: HttpRequest) -> Result<Online, Refusal> {
    let message = ToAgent::HttpRequest(message);
    match function.agents.post(&online.connection_id, &message).await {
        Err(PostError::Gone) => {
            function.tunnels.go_offline(tunnel, &online.connection_id, now()).await?;
            let moved = find(function, tunnel).await?;
            function.agents.post(&moved.connection_id, &message).await?;
            Ok(moved)
        }
        outcome => outcome.map(|()| online).map_err(Refusal::from),
    }
}

/// The request's first message, with as much of the body as fits, and what is left of the body.
async fn first_message(visit: Visit, prefix: &str, path: &str, online: &Online) -> Result<(HttpRequest, Option<Rest>), Refusal> {
    let mut message = HttpRequest {
        request_id: RequestId::generate(),
        method: visit.method.to_string(),
        uri: match &visit.query {
            Some(query) => format!("{path}?{query}"),
            None => path.to_owned(),
        },
        headers: forwarded(&visit, prefix),
        body: Body::default(),
        timestamp: u64::try_from(now().as_millis()).unwrap_or(u64::MAX),
        more: false,
        deadline_ms: u64::try_from(visit.front.patience().as_millis()).unwrap_or(u64::MAX),
        reply_to: None,
    };
    if message.headers.len() > HEADER_FIELDS {
        return Err(Refusal::TooLarge(format!("The request has more than {HEADER_FIELDS} header fields.")));
    }
    let envelope = protocol::encode(&ToAgent::HttpRequest(message.clone())).len() + ENVELOPE_SLACK;
    let room = parts::room_beside(envelope)
        .ok_or_else(|| Refusal::TooLarge("The request's header is longer than a tunnel can carry.".to_owned()))?;
    let mut rest = Rest { body: visit.body, read: Bytes::new() };
    message.body = Body(rest.take(room).await?);
    message.more = !rest.is_empty().await?;
    if message.more && !online.features.contains(&Feature::BodyParts) {
        return Err(Refusal::TooLarge(format!("The agent is an old one that takes request bodies up to {room} bytes. Update it.")));
    }
    let rest = message.more.then_some(rest);
    Ok((message, rest))
}

/// The fields that the local service gets: the visitor's own, and ours about where the request comes from.
fn forwarded(visit: &Visit, prefix: &str) -> HeaderMap {
    let mut fields = visit.headers.clone();
    headers::remove_hop_by_hop(&mut fields);
    headers::remove_forwarding(&mut fields);
    fields.remove(header::EXPECT);
    for (name, value) in [(FORWARDED_FOR, &visit.source_ip), (FORWARDED_PROTO, &visit.scheme), (FORWARDED_HOST, &visit.host)] {
        if let Ok(value) = HeaderValue::from_str(value) {
            fields.insert(name, value);
        }
    }
    if let Some(value) = HeaderValue::from_str(prefix).ok().filter(|prefix| !prefix.is_empty()) {
        fields.insert(FORWARDED_PREFIX, value);
    }
    fields
}

/// A body of which some may have been read already.
struct Rest {
    body: VisitBody,
    read: Bytes,
}

impl Rest {
    /// Reads up to `limit` bytes: fewer only at the body's end.
    async fn take(&mut self, limit: usize) -> Result<Bytes, Refusal> {
        let (mut chunks, mut length) = (Vec::new(), 0);
        while length < limit && !self.is_empty().await? {
            let chunk = self.read.split_to(self.read.len().min(limit - length));
            length += chunk.len();
            chunks.push(chunk);
        }
        Ok(parts::join(chunks))
    }

    /// Whether the body has ended, for which some of it may have to be read.
    async fn is_empty(&mut self) -> Result<bool, Refusal> {
        while self.read.is_empty() {
            match self.body.frame().await {
                None => return Ok(true),
                Some(Ok(frame)) => self.read = frame.into_data().unwrap_or_default(),
                Some(Err(error)) => return Err(Refusal::BadRequest(format!("its body broke off: {error}"))),
            }
        }
        Ok(false)
    }
}

/// An upload that goes on while the reply is awaited.
struct Upload {
    task: AbortHandle,
    /// Receives why the upload failed; closed without a word when it did not.
    failed: oneshot::Receiver<Refusal>,
}

/// A request that is with its agent. Dropped before its end, it tells the agent to drop it as well.
struct Exchange {
    function: Arc<Parts>,
    online: Online,
    request: RequestId,
    replies: PendingReply,
    upload: Option<Upload>,
    is_over: bool,
}

impl Exchange {
    fn upload(&self, mut rest: Rest, sent: Arc<AtomicU64>) -> Upload {
        let (function, connection, request_id) = (self.function.clone(), self.online.connection_id.clone(), self.request.clone());
        let (fail, failed) = oneshot::channel();
        let task = self.function.tasks.spawn(async move {
            let send = async {
                for part in 1.. {
                    let body = Body(rest.take(PART_BODY).await?);
                    sent.fetch_add(body.0.len() as u64, Ordering::Relaxed);
                    let more = !rest.is_empty().await?;
                    function
                        .agents
                        .post(&connection, &ToAgent::BodyPart(BodyPart { request_id: request_id.clone(), part, body, more }))
                        .await?;
                    if !more {
                        break;
                    }
                }
                Ok::<(), Refusal>(())
            };
            if let Err(refusal) = send.await {
                // The exchange may have ended meanwhile; then nobody asks any more.
                let _ = fail.send(refusal);
            }
        });
        Upload { task: task.abort_handle(), failed }
    }

    /// The next part of the reply, unless the upload fails first.
    async fn next(&mut self, until: Option<Instant>) -> Result<ReplyPart, Refusal> {
        let outcome = loop {
            let Some(upload) = &mut self.upload else { break self.replies.next(until).await };
            tokio::select! {
                biased;
                part = self.replies.next(until) => break part,
                failed = &mut upload.failed => {
                    self.upload = None;
                    if let Ok(refusal) = failed {
                        break Err(refusal);
                    }
                }
            }
        };
        if matches!(outcome, Err(Refusal::AgentLost | Refusal::Offline | Refusal::LocalUnreachable(_))) {
            self.is_over = true;
        }
        outcome
    }

    /// The body as a stream: each part is asked for when the one before it has been taken.
    fn into_body(self, first: Chunk, record: Record) -> impl Stream<Item = Result<Frame<Bytes>, AnswerError>> + Send {
        enum Next {
            Chunk(Chunk),
            Part,
            End,
        }
        stream::unfold((self, record, Next::Chunk(first)), |(mut exchange, mut record, next)| async move {
            let chunk = match next {
                Next::Chunk(chunk) => Ok(chunk),
                Next::Part => match exchange.next(None).await {
                    Ok(ReplyPart::Body(chunk)) => Ok(chunk),
                    Ok(ReplyPart::Head(..) | ReplyPart::Failed { .. }) => {
                        Err(Refusal::InvalidReply("a part after the first is none".to_owned()))
                    }
                    Err(refusal) => Err(refusal),
                },
                Next::End => return None,
            };
            record.parts += 1;
            match chunk {
                Ok(chunk) => {
                    record.response_bytes += chunk.bytes.len() as u64;
                    exchange.is_over = !chunk.more;
                    let next = if chunk.more { Next::Part } else { Next::End };
                    if exchange.is_over {
                        record.completed();
                    }
                    Some((Ok(Frame::data(chunk.bytes)), (exchange, record, next)))
                }
                Err(refusal) => {
                    record.refused(&refusal);
                    Some((Err(refusal.into()), (exchange, record, Next::End)))
                }
            }
        })
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Some(upload) = &self.upload {
            upload.task.abort();
        }
        if !self.is_over && self.online.features.contains(&Feature::Cancel) {
            let (function, connection, request_id) = (self.function.clone(), self.online.connection_id.clone(), self.request.clone());
            self.function.tasks.spawn(async move {
                if let Err(error) = function.agents.post(&connection, &ToAgent::Cancel { request_id }).await {
                    warn!(%connection, error = &error as &dyn std::error::Error, "could not cancel");
                }
            });
        }
    }
}

/// The fields that the visitor gets: what the local service said, without what only we may say.
fn response_fields(mut fields: HeaderMap) -> HeaderMap {
    headers::remove_hop_by_hop(&mut fields);
    fields.remove(TUNNEL_ERROR);
    let mut lengths = fields.get_all(header::CONTENT_LENGTH).iter();
    let is_one_number =
        lengths.next().is_some_and(|length| length.to_str().is_ok_and(|length| length.parse::<u64>().is_ok())) && lengths.next().is_none();
    if !is_one_number {
        fields.remove(header::CONTENT_LENGTH);
    }
    fields
}
