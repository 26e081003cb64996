//! One request: to the local service, and its response back in as few messages as keep it moving.

use std::{io, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Method, Response, StatusCode};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout_at},
};
use tunnel_protocol::{
    body::chunker::{Chunker, Piece},
    body::window::ReceiveWindow,
    body::{self, compression},
    headers::remove_hop_by_hop,
    id::{ConnectionId, RequestId},
    limits::MAX_PART_BYTES,
    message,
    message::{
        AgentError, AgentErrorCode, Body, BodyPart, Encoding, Feature, FromAgent, HttpRequest,
        HttpResponse, Window,
    },
};

use crate::{
    event::Event,
    origin::{Origin, OriginError, RequestBody},
    rewrite::PublicAddress,
    settings::Settings,
};

/// How long bytes wait for company before they go out: a visitor does not notice, and each message has a price.
const COALESCE_FOR: Duration = Duration::from_millis(10);
/// How long a body that will fit the first message is waited for.
const COALESCE_WHOLE_FOR: Duration = Duration::from_millis(50);
/// Room for flags and digits that the measure of an envelope does not show.
const ENVELOPE_SLACK_BYTES: usize = 128;

/// What an exchange needs to know.
#[derive(Clone, Debug)]
pub struct Context {
    /// The local service.
    pub origin: Origin,
    /// Takes encoded messages to the service.
    pub outgoing: mpsc::Sender<String>,
    timeout: Duration,
    /// The service takes bodies in parts.
    parts: bool,
    /// The service allows parts with `window`, and waits for being allowed.
    windows: bool,
    /// Bodies are packed where it pays.
    packs: bool,
}

impl Context {
    /// For a service that has these features.
    pub fn new(
        settings: &Settings,
        origin: &Origin,
        features: &[Feature],
        outgoing: mpsc::Sender<String>,
    ) -> Self {
        Self {
            origin: origin.clone(),
            outgoing,
            timeout: settings.request_timeout,
            parts: features.contains(&Feature::BodyParts),
            windows: features.contains(&Feature::Window),
            packs: settings.compression && features.contains(&Feature::Zstd),
        }
    }
}

/// The parts of a request's body that follow its first message, in order, up to the one that says it is the last. Closed before that,
/// the body has broken off.
pub type BodyParts = mpsc::Receiver<BodyPart>;

/// Carries out one exchange and tells how it went. `allowed` is how many parts of the response may be sent.
pub async fn run(
    context: Context,
    message: HttpRequest,
    more: Option<BodyParts>,
    allowed: watch::Receiver<u32>,
) -> Event {
    let started = Instant::now();
    let (method, uri) = (
        message.method.parse().unwrap_or_default(),
        message.uri.clone(),
    );
    let (request_id, reply_to) = (message.request_id.clone(), message.reply_to.clone());
    let outgoing = Outgoing {
        messages: context.outgoing.clone(),
        request_id,
        reply_to,
    };
    let mut reply = Reply {
        outgoing: outgoing.clone(),
        allowed: context.windows.then_some(allowed),
        bytes: 0,
    };
    let outcome = match attempt(&context, message, more, &mut reply, started).await {
        Ok(status) => Ok(status),
        Err(failed) => {
            let text = failed.message.to_owned();
            outgoing.error(failed.code, text.clone()).await;
            Err(text)
        }
    };
    Event::Request {
        method,
        uri,
        outcome,
        bytes: reply.bytes,
        took: started.elapsed(),
    }
}

async fn attempt(
    context: &Context,
    message: HttpRequest,
    more: Option<BodyParts>,
    reply: &mut Reply,
    started: Instant,
) -> Result<StatusCode, OriginError> {
    let timeout = match message.deadline_ms {
        0 => context.timeout,
        deadline => context.timeout.min(Duration::from_millis(deadline)),
    };
    let public = PublicAddress::of(&message.headers);
    let first = unpack(message.body.0.clone(), message.encoding).map_err(|_| OriginError {
        code: AgentErrorCode::InvalidRequest,
        message: "its body cannot be unpacked",
    })?;
    let length = first.len();
    let windows = context.windows.then(|| reply.outgoing.clone());
    let request = context
        .origin
        .request(&message, length, body(first, more, windows))?;
    let is_head = request.method() == Method::HEAD;
    let mut response = timeout_at(started + timeout, context.origin.call(request))
        .await
        .unwrap_or(Err(OriginError {
            code: AgentErrorCode::Timeout,
            message: "the local service took too long",
        }))?;
    let status = response.status();
    remove_hop_by_hop(response.headers_mut());
    public.rewrite(response.headers_mut(), context.origin.target());
    let processing_time_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    reply
        .respond(response, is_head, processing_time_ms, context)
        .await?;
    Ok(status)
}

fn unpack(bytes: Bytes, encoding: Option<Encoding>) -> io::Result<Bytes> {
    compression::decompress(bytes, encoding).map_err(io::Error::other)
}

/// The body as the local service gets it. Each part that it takes lets the service send more, as `windows` tells it.
fn body(first: Bytes, more: Option<BodyParts>, windows: Option<Outgoing>) -> RequestBody {
    let Some(parts) = more else {
        return Full::new(first)
            .map_err(|never| match never {})
            .boxed_unsync();
    };
    let mut allowance = ReceiveWindow::default();
    // The first message had a part too, and is used up at once.
    allowance.part_used();
    let rest = stream::unfold(
        (parts, windows, allowance, true),
        |(mut parts, windows, mut allowance, more)| async move {
            if !more {
                return None;
            }
            let Some(part) = parts.recv().await else {
                // Nobody sends the rest. Only an error tells the local service so: it takes an end for the body's end.
                let broken_off =
                    io::Error::new(io::ErrorKind::UnexpectedEof, "the upload broke off");
                return Some((Err(broken_off), (parts, windows, allowance, false)));
            };
            if let (Some(outgoing), Some(allowed)) = (&windows, allowance.part_used()) {
                outgoing.window(allowed).await;
            }
            let more = part.more;
            Some((
                unpack(part.body.0, part.encoding).map(Frame::data),
                (parts, windows, allowance, more),
            ))
        },
    );
    StreamBody::new(stream::iter([Ok(Frame::data(first))]).chain(rest)).boxed_unsync()
}

/// What an exchange says to the service.
#[derive(Clone, Debug)]
struct Outgoing {
    messages: mpsc::Sender<String>,
    request_id: RequestId,
    reply_to: Option<ConnectionId>,
}

impl Outgoing {
    /// Waits for room on the connection, which is what slows a fast local service down. When the connection has ended the
    /// exchange is about to be dropped with it.
    async fn send(&self, message: FromAgent) {
        let _ = self.messages.send(message::encode(&message)).await;
    }

    async fn window(&self, parts: u32) {
        self.send(FromAgent::Window(Window {
            request_id: self.request_id.clone(),
            parts,
            reply_to: self.reply_to.clone(),
        }))
        .await;
    }

    async fn error(&self, code: AgentErrorCode, message: String) {
        let request_id = Some(self.request_id.clone());
        self.send(FromAgent::Error(AgentError {
            request_id,
            code,
            message,
            reply_to: self.reply_to.clone(),
        }))
        .await;
    }
}

/// The way back to the visitor.
struct Reply {
    outgoing: Outgoing,
    /// How many parts may be sent; none where nobody counts.
    allowed: Option<watch::Receiver<u32>>,
    bytes: u64,
}

impl Reply {
    async fn respond(
        &mut self,
        response: Response<Incoming>,
        is_head: bool,
        processing_time_ms: u64,
        context: &Context,
    ) -> Result<(), OriginError> {
        let (head, body) = response.into_parts();
        let packs = context.packs && compression::is_compressible(&head.headers);
        let mut message = self.head(head.status, head.headers, processing_time_ms);
        let room = room_beside_head(&message)?;
        if is_head {
            self.outgoing.send(FromAgent::HttpResponse(message)).await;
            return Ok(());
        }
        let fits = body
            .size_hint()
            .exact()
            .is_some_and(|length| length <= room as u64);
        let mut body = Chunker::new(body, packs);
        let first = if context.parts {
            body.piece(
                room,
                Instant::now()
                    + if fits {
                        COALESCE_WHOLE_FOR
                    } else {
                        COALESCE_FOR
                    },
            )
            .await
            .map_err(broken_off)?
        } else {
            let bytes = body.take(room).await.map_err(broken_off)?;
            Piece {
                length: bytes.len(),
                bytes,
                encoding: None,
                more: !body.is_at_end().await.map_err(broken_off)?,
            }
        };
        if first.more && !context.parts {
            return Err(OriginError {
                code: AgentErrorCode::ResponseTooLarge,
                message: "The response is longer than this service's version can carry.",
            });
        }
        self.bytes += first.length as u64;
        let mut more = first.more;
        (message.body, message.encoding, message.more) = (Body(first.bytes), first.encoding, more);
        self.outgoing.send(FromAgent::HttpResponse(message)).await;
        let mut part = 1;
        while more {
            if let Some(allowed) = &mut self.allowed
                && allowed.wait_for(|allowed| part < *allowed).await.is_err()
            {
                // The connection has ended, and this exchange is about to.
                return Ok(());
            }
            body.is_at_end().await.map_err(broken_off)?;
            let piece = body
                .piece(MAX_PART_BYTES, Instant::now() + COALESCE_FOR)
                .await
                .map_err(broken_off)?;
            self.bytes += piece.length as u64;
            more = piece.more;
            let (request_id, reply_to) = (
                self.outgoing.request_id.clone(),
                self.outgoing.reply_to.clone(),
            );
            let message = BodyPart {
                request_id,
                part,
                body: Body(piece.bytes),
                encoding: piece.encoding,
                more,
                reply_to,
            };
            self.outgoing.send(FromAgent::BodyPart(message)).await;
            part += 1;
        }
        Ok(())
    }

    fn head(
        &self,
        status: StatusCode,
        headers: HeaderMap,
        processing_time_ms: u64,
    ) -> HttpResponse {
        HttpResponse {
            request_id: self.outgoing.request_id.clone(),
            status_code: status.as_u16(),
            headers,
            body: Body::default(),
            encoding: None,
            processing_time_ms,
            more: false,
            reply_to: self.outgoing.reply_to.clone(),
        }
    }
}

fn broken_off(_: hyper::Error) -> OriginError {
    OriginError {
        code: AgentErrorCode::LocalServiceUnavailable,
        message: "it broke off in the middle of its response",
    }
}

fn room_beside_head(message: &HttpResponse) -> Result<usize, OriginError> {
    let envelope =
        message::encode(&FromAgent::HttpResponse(message.clone())).len() + ENVELOPE_SLACK_BYTES;
    body::room_beside(envelope).ok_or(OriginError {
        code: AgentErrorCode::ResponseTooLarge,
        message: "The response's header is longer than a tunnel can carry.",
    })
}
