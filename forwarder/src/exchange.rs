//! One request: to the local service, and its response back in as few messages as keep it moving.

use std::{io, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Method, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tunnel_protocol::{
    body::{
        BodySender, Chunk, Mode, SendBodyError, compression, window::ReceiveWindow,
        window::SendWindow,
    },
    headers::remove_hop_by_hop,
    id::{ConnectionId, RequestId},
    message,
    message::{
        AgentError, AgentErrorCode, Body, BodyPart, Encoding, Feature, FromAgent, HttpRequest,
        HttpResponse, Window,
    },
};

use crate::{
    event::Event,
    origin::{Origin, OriginError, RequestBody},
    settings::Settings,
};

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

/// Carries out one exchange and tells how it went. `window` tells which parts of the response may be sent.
pub async fn run(
    context: Context,
    message: HttpRequest,
    more: Option<BodyParts>,
    window: SendWindow,
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
        window: context.windows.then_some(window),
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
    let addresses = context.origin.addresses(&message);
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
    addresses.to_public(status, response.headers_mut());
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
    /// Which parts may be sent; `None` if the service does not know of windows.
    window: Option<SendWindow>,
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
        let room = message.room().ok_or(OriginError {
            code: AgentErrorCode::ResponseTooLarge,
            message: "The response's header is longer than a tunnel can carry.",
        })?;
        if is_head {
            self.outgoing.send(FromAgent::HttpResponse(message)).await;
            return Ok(());
        }
        let mut body = BodySender::new(body, Mode::Coalesced { compress: packs });
        let first = self.first_chunk(&mut body, room, context.parts).await?;
        message.set_chunk(first);
        self.bytes = body.sent_bytes();
        self.outgoing.send(FromAgent::HttpResponse(message)).await;
        loop {
            let part = match body.next_part(self.window.as_mut()).await {
                Ok(Some(part)) => part,
                // A closed window means that the connection has ended, and this exchange is about to.
                Ok(None) | Err(SendBodyError::WindowClosed(_)) => return Ok(()),
                Err(SendBodyError::Body(error)) => return Err(broken_off(error)),
            };
            self.bytes = body.sent_bytes();
            let message = part.into_message(
                self.outgoing.request_id.clone(),
                self.outgoing.reply_to.clone(),
            );
            self.outgoing.send(FromAgent::BodyPart(message)).await;
        }
    }

    async fn first_chunk(
        &self,
        body: &mut BodySender<Incoming>,
        room: usize,
        takes_parts: bool,
    ) -> Result<Chunk, OriginError> {
        if takes_parts {
            return body.first_chunk(room).await.map_err(broken_off);
        }
        body.whole(room)
            .await
            .map_err(broken_off)?
            .ok_or(OriginError {
                code: AgentErrorCode::ResponseTooLarge,
                message: "The response is longer than this service's version can carry.",
            })
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
