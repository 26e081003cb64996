//! One request and its reply: out to the agent in as few messages as fit, back as a response whose body arrives in parts.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, stream};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::{sync::oneshot, task::AbortHandle, time::Instant};
use tracing::warn;
use tunnel_protocol::{
    body::{BodySender, Chunk, Mode, SendBodyError, compression, window::ReceiveWindow},
    headers,
    headers::{FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PREFIX, FORWARDED_PROTO, TUNNEL_ERROR},
    id::{ConnectionId, RequestId, TunnelId},
    limits::MAX_HEADER_FIELDS,
    message,
    message::{Body, Feature, HttpRequest, ToAgent, Window},
};
use tunnel_service::{agents::PostError, now, replies::ReplyPart, tables::tunnels::Online};

use crate::{
    State,
    error::ForwardError,
    reply::PendingReply,
    request::{Ingress, VisitorBody, VisitorRequest},
    request_log::RequestLog,
    response::{ResponseBody, ResponseBodyError},
};

/// How long an agent may take no messages before its visitor is told. Pauses between tries double from the shortest.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
const MIN_BUSY_DELAY: Duration = Duration::from_millis(5);
const MAX_BUSY_DELAY: Duration = Duration::from_millis(500);

/// Sends a visit to the tunnel's agent and returns when the reply's head is there.
///
/// # Errors
/// Everything that leaves the visitor without a response.
pub(crate) async fn run(
    function: &Arc<State>,
    mut visit: VisitorRequest,
    tunnel: &TunnelId,
    prefix: &str,
    path: &str,
    log: &mut RequestLog,
) -> Result<Replying, ForwardError> {
    let head_deadline = Instant::now() + visit.response_timeout;
    let deadline = matches!(visit.front, Ingress::HttpApi(_)).then_some(head_deadline);
    let visitor = Visitor {
        address: visit.source_ip.parse().ok(),
        fields: std::mem::take(&mut visit.headers),
    };
    let online = visitor.admitted(function, tunnel).await?;
    log.place = Some(function.throttle.take(tunnel, Instant::now())?);
    let method = visit.method.clone();
    let (mut message, length, rest) = first_message(
        visit,
        &visitor.fields,
        prefix,
        path,
        &online,
        function.packs,
    )
    .await?;
    log.request = Some(message.request_id.clone());
    log.request_bytes.fetch_max(length, Ordering::Relaxed);
    let may_repeat = rest.is_none()
        && message.body.0.is_empty()
        && matches!(method, Method::GET | Method::HEAD | Method::OPTIONS);

    let mut exchange =
        Exchange::start(function, tunnel, &visitor, online, &mut message, deadline).await?;
    log.connection = Some(exchange.online.connection_id.clone());
    let has_upload = rest.is_some();
    if let Some(rest) = rest {
        exchange.upload = Some(exchange.upload(rest, log.request_bytes.clone()));
    }
    let first = match exchange.next(Some(head_deadline)).await {
        // The agent says that it has not passed the request on, or nothing can have come of it that matters.
        Err(refusal) if exchange.is_untouched(&refusal, has_upload, may_repeat) => {
            function.lookup.forget(tunnel, &exchange.online);
            let online = match visitor.admitted(function, tunnel).await {
                Ok(online) if online != exchange.online => online,
                Err(denied @ (ForwardError::Unauthorized(_) | ForwardError::Forbidden(_))) => {
                    return Err(denied);
                }
                _ => return Err(refusal),
            };
            message.request_id = RequestId::generate();
            log.request = Some(message.request_id.clone());
            exchange =
                Exchange::start(function, tunnel, &visitor, online, &mut message, deadline).await?;
            log.connection = Some(exchange.online.connection_id.clone());
            exchange.next(Some(head_deadline)).await?
        }
        first => first?,
    };
    let ReplyPart::Head(head, first) = first else {
        return Err(ForwardError::InvalidReply(
            "its first part is not its head".to_owned(),
        ));
    };
    let status = StatusCode::from_u16(head.status_code)
        .ok()
        .filter(|status| !status.is_informational());
    let status = status.ok_or_else(|| {
        ForwardError::InvalidReply("its status is none that ends a response".to_owned())
    })?;
    log.replied(head.status_code);
    let has_no_body = method == Method::HEAD
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED;
    let first = if has_no_body {
        Chunk {
            bytes: Bytes::new(),
            encoding: None,
            more: false,
        }
    } else {
        first
    };
    Ok(Replying {
        exchange,
        status,
        fields: response_fields(head.headers),
        first,
    })
}

/// Who asks to be let in. Each connection that a request may be sent to has its own rules.
struct Visitor {
    /// Not known when the front's word is no address.
    address: Option<IpAddr>,
    /// As they came, with what is meant for the service.
    fields: HeaderMap,
}

impl Visitor {
    /// The connection that serves the tunnel, if it lets this visitor in. Nothing is sent to one that was not asked for here.
    async fn admitted(&self, function: &State, tunnel: &TunnelId) -> Result<Online, ForwardError> {
        let online = function.lookup.find(tunnel).await?;
        if let Some(access) = &online.access {
            access
                .admit(self.address, &self.fields)
                .map_err(|denied| ForwardError::of_denied(denied, tunnel))?;
        }
        Ok(online)
    }
}

/// A reply that has begun.
pub(crate) struct Replying {
    exchange: Exchange,
    status: StatusCode,
    fields: HeaderMap,
    first: Chunk,
}

impl Replying {
    /// The response, which tells `log` how it ends.
    pub(crate) fn into_response(mut self, mut log: RequestLog) -> Response<ResponseBody> {
        if !self.first.more {
            // Known now, because a front that has no use for an empty body does not ask for it.
            self.exchange.is_over = true;
            log.completed();
        }
        let mut response =
            Response::new(StreamBody::new(self.exchange.into_body(self.first, log)).boxed_unsync());
        *response.status_mut() = self.status;
        *response.headers_mut() = self.fields;
        response
    }
}

/// Posts a message, again while the connection takes no more: a message that is refused so was not taken.
async fn post(function: &State, to: &ConnectionId, message: &ToAgent) -> Result<(), PostError> {
    let text = message::encode(message);
    let (since, mut pause) = (Instant::now(), MIN_BUSY_DELAY);
    loop {
        match function.agents.post_text(to, text.clone()).await {
            Err(PostError::Busy) if since.elapsed() < BUSY_TIMEOUT => {
                tokio::time::sleep(pause).await
            }
            outcome => return outcome,
        }
        pause = (2 * pause).min(MAX_BUSY_DELAY);
    }
}

/// The request's first message, with as much of the body as has come and fits; how many bytes of it those are; and the rest.
async fn first_message(
    visit: VisitorRequest,
    fields: &HeaderMap,
    prefix: &str,
    path: &str,
    online: &Online,
    packs: bool,
) -> Result<(HttpRequest, u64, Option<BodySender<VisitorBody>>), ForwardError> {
    let packs =
        packs && online.features.contains(&Feature::Zstd) && compression::is_compressible(fields);
    let mut message = HttpRequest {
        request_id: RequestId::generate(),
        method: visit.method.to_string(),
        uri: match &visit.query {
            Some(query) => format!("{path}?{query}"),
            None => path.to_owned(),
        },
        headers: forwarded(&visit, fields, prefix),
        body: Body::default(),
        encoding: None,
        timestamp: u64::try_from(now().as_millis()).unwrap_or(u64::MAX),
        more: false,
        deadline_ms: u64::try_from(visit.response_timeout.as_millis()).unwrap_or(u64::MAX),
        reply_to: None,
    };
    if message.headers.len() > MAX_HEADER_FIELDS {
        return Err(ForwardError::TooLarge(format!(
            "The request has more than {MAX_HEADER_FIELDS} header fields."
        )));
    }
    let room = message.room().ok_or_else(|| {
        ForwardError::TooLarge("The request's header is longer than a tunnel can carry.".to_owned())
    })?;
    let mut body = BodySender::new(visit.body, Mode::Coalesced { compress: packs });
    let chunk = if online.features.contains(&Feature::BodyParts) {
        body.first_chunk(room).await.map_err(broken_off)?
    } else {
        let whole = body.whole(room).await.map_err(broken_off)?;
        whole.ok_or_else(|| {
            ForwardError::TooLarge(format!(
                "The agent is an old one that takes request bodies up to {room} bytes. Update it."
            ))
        })?
    };
    message.set_chunk(chunk);
    let length = body.sent_bytes();
    let rest = message.more.then_some(body);
    Ok((message, length, rest))
}

fn broken_off(error: impl std::fmt::Display) -> ForwardError {
    ForwardError::BadRequest(format!("its body broke off: {error}"))
}

/// The fields that the local service gets: the visitor's own, and ours about where the request comes from.
fn forwarded(visit: &VisitorRequest, fields: &HeaderMap, prefix: &str) -> HeaderMap {
    let mut fields = fields.clone();
    headers::remove_hop_by_hop(&mut fields);
    headers::remove_forwarding(&mut fields);
    fields.remove(header::EXPECT);
    for (name, value) in [
        (FORWARDED_FOR, &visit.source_ip),
        (FORWARDED_PROTO, &visit.scheme),
        (FORWARDED_HOST, &visit.host),
    ] {
        if let Ok(value) = HeaderValue::from_str(value) {
            fields.insert(name, value);
        }
    }
    if let Some(value) = HeaderValue::from_str(prefix)
        .ok()
        .filter(|prefix| !prefix.is_empty())
    {
        fields.insert(FORWARDED_PREFIX, value);
    }
    fields
}

/// An upload that goes on while the reply is awaited.
struct Upload {
    task: AbortHandle,
    /// Receives why the upload failed; closed without a word when it did not.
    failed: oneshot::Receiver<ForwardError>,
}

/// A request that is with its agent. Dropped before its end, it tells the agent to drop it as well.
struct Exchange {
    function: Arc<State>,
    online: Online,
    replies: PendingReply,
    upload: Option<Upload>,
    is_over: bool,
}

impl Exchange {
    /// Posts the first message. Where the tunnel has just moved to another connection, it is posted there: the first one did not
    /// take it, so nothing is sent twice.
    async fn start(
        function: &Arc<State>,
        tunnel: &TunnelId,
        visitor: &Visitor,
        online: Online,
        message: &mut HttpRequest,
        deadline: Option<Instant>,
    ) -> Result<Self, ForwardError> {
        let mut connections = vec![online];
        loop {
            let online = connections[connections.len() - 1].clone();
            let lacks = |is_needed: bool, feature| is_needed && !online.features.contains(&feature);
            if lacks(message.more, Feature::BodyParts)
                || lacks(message.encoding.is_some(), Feature::Zstd)
            {
                // Made for a connection that is gone, and this one could not read it.
                return Err(ForwardError::Moved);
            }
            let (source, reply_to) = function
                .reply_path(online.features.contains(&Feature::ReplyTo))
                .await;
            message.reply_to = reply_to;
            if let Some(access) = &online.access {
                access.remove_secrets(&mut message.headers);
            }
            // Before it is sent: the reply may be here before the answer to the post.
            let expected = function
                .replies
                .expect(online.connection_id.clone(), message.request_id.clone());
            match post(
                function,
                &online.connection_id,
                &ToAgent::HttpRequest(message.clone()),
            )
            .await
            {
                Ok(()) => {
                    let replies = PendingReply::new(expected, source, deadline);
                    return Ok(Self {
                        function: function.clone(),
                        online,
                        replies,
                        upload: None,
                        is_over: false,
                    });
                }
                Err(PostError::Gone) => {
                    function.lookup.lost(tunnel, &online).await?;
                    let moved = visitor.admitted(function, tunnel).await?;
                    if connections.contains(&moved) {
                        return Err(ForwardError::Offline);
                    }
                    connections.push(moved);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether the request may be sent to another connection after this one has refused it: the agent says that it did nothing
    /// with it, or it cannot say any more, but the method is one that changes nothing.
    fn is_untouched(&self, refusal: &ForwardError, has_upload: bool, may_repeat: bool) -> bool {
        match refusal {
            ForwardError::Moved => !has_upload,
            ForwardError::AgentLost => may_repeat && self.replies.has_not_begun(),
            _ => false,
        }
    }

    fn upload(&self, mut body: BodySender<VisitorBody>, sent: Arc<AtomicU64>) -> Upload {
        let (function, connection, request_id) = (
            self.function.clone(),
            self.online.connection_id.clone(),
            self.replies.expected().request().clone(),
        );
        let mut window = self
            .online
            .features
            .contains(&Feature::Window)
            .then(|| self.replies.expected().window());
        let (fail, failed) = oneshot::channel();
        let task = self.function.tasks.spawn(async move {
            let send = async {
                loop {
                    let part = match body.next_part(window.as_mut()).await {
                        Ok(Some(part)) => part,
                        // A closed window means that the reply is not waited for any more.
                        Ok(None) | Err(SendBodyError::WindowClosed(_)) => return Ok(()),
                        Err(SendBodyError::Body(error)) => return Err(broken_off(error)),
                    };
                    sent.fetch_max(body.sent_bytes(), Ordering::Relaxed);
                    let message = part.into_message(request_id.clone(), None);
                    post(&function, &connection, &ToAgent::BodyPart(message)).await?;
                }
            };
            if let Err(refusal) = send.await {
                // The exchange may have ended meanwhile; then nobody asks any more.
                let _ = fail.send(refusal);
            }
        });
        Upload {
            task: task.abort_handle(),
            failed,
        }
    }

    /// The next part of the reply, unless the upload fails first.
    async fn next(&mut self, until: Option<Instant>) -> Result<ReplyPart, ForwardError> {
        let outcome = loop {
            let Some(upload) = &mut self.upload else {
                break self.replies.next(until).await;
            };
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
        if matches!(
            outcome,
            Err(ForwardError::AgentLost
                | ForwardError::Offline
                | ForwardError::Moved
                | ForwardError::LocalUnreachable(_))
        ) {
            self.is_over = true;
        }
        outcome
    }

    /// Allows the agent more of the body, if it waits for that.
    fn allow(&self, parts: u32) {
        if !self.online.features.contains(&Feature::Window) {
            return;
        }
        let (request_id, reply_to) = (self.replies.expected().request().clone(), None);
        self.tell(ToAgent::Window(Window {
            request_id,
            parts,
            reply_to,
        }));
    }

    /// Sends the agent a word that nothing waits for.
    fn tell(&self, message: ToAgent) {
        let (function, connection) = (self.function.clone(), self.online.connection_id.clone());
        self.function.tasks.spawn(async move {
            if let Err(error) = post(&function, &connection, &message).await {
                warn!(%connection, error = &error as &dyn std::error::Error, "the agent could not be told");
            }
        });
    }

    /// The next piece of the body.
    async fn chunk(&mut self) -> Result<Chunk, ForwardError> {
        match self.next(None).await? {
            ReplyPart::Body(chunk) => Ok(chunk),
            _ => Err(ForwardError::InvalidReply(
                "a part after the first is none".to_owned(),
            )),
        }
    }

    /// The body as a stream: each part is asked for when the one before it has been taken.
    fn into_body(
        self,
        first: Chunk,
        log: RequestLog,
    ) -> impl Stream<Item = Result<Frame<Bytes>, ResponseBodyError>> + Send {
        enum Next {
            Chunk(Chunk),
            Part,
            End,
        }
        let start = (self, log, ReceiveWindow::default(), Next::Chunk(first));
        stream::unfold(
            start,
            |(mut exchange, mut log, mut allowance, next)| async move {
                let chunk = match next {
                    Next::Chunk(chunk) => Ok(chunk),
                    Next::Part => exchange.chunk().await,
                    Next::End => return None,
                };
                log.parts += 1;
                let unpacked = chunk.and_then(|chunk| {
                    let bytes = compression::decompress(chunk.bytes, chunk.encoding)
                        .map_err(|error| ForwardError::InvalidReply(error.to_string()))?;
                    Ok((bytes, chunk.more))
                });
                match unpacked {
                    Ok((bytes, more)) => {
                        log.response_bytes += bytes.len() as u64;
                        exchange.is_over = !more;
                        if exchange.is_over {
                            log.completed();
                        } else if let Some(parts) = allowance.part_used() {
                            exchange.allow(parts);
                        }
                        let next = if more { Next::Part } else { Next::End };
                        Some((Ok(Frame::data(bytes)), (exchange, log, allowance, next)))
                    }
                    Err(refusal) => {
                        log.refused(&refusal);
                        Some((Err(refusal.into()), (exchange, log, allowance, Next::End)))
                    }
                }
            },
        )
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Some(upload) = &self.upload {
            upload.task.abort();
        }
        if !self.is_over && self.online.features.contains(&Feature::Cancel) {
            self.tell(ToAgent::Cancel {
                request_id: self.replies.expected().request().clone(),
            });
        }
    }
}

/// The fields that the visitor gets: what the local service said, without what only we may say.
fn response_fields(mut fields: HeaderMap) -> HeaderMap {
    headers::remove_hop_by_hop(&mut fields);
    fields.remove(TUNNEL_ERROR);
    let mut lengths = fields.get_all(header::CONTENT_LENGTH).iter();
    let is_one_number = lengths.next().is_some_and(|length| {
        length
            .to_str()
            .is_ok_and(|length| length.parse::<u64>().is_ok())
    }) && lengths.next().is_none();
    if !is_one_number {
        fields.remove(header::CONTENT_LENGTH);
    }
    fields
}
