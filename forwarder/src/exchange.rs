//! One request: to the local service, and its response back in as few messages as keep it moving.

use std::{io, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tracing::info;
use tunnel_protocol::{
    body::{
        BodySender, Chunk, Mode, Part, SendBodyError, compression, window::ReceiveWindow,
        window::SendWindow,
    },
    headers::remove_hop_by_hop,
    id::{ConnectionId, RequestId},
    message,
    message::{
        AgentError, AgentErrorCode, Body, Feature, FromAgent, HttpRequest, HttpResponse, Window,
    },
    writer::MessageSender,
};

use crate::{
    event::Event,
    origin::{Origin, OriginBody, OriginError},
    settings::Settings,
    upgrade,
    upload::BodyParts,
};

/// How long an upload may stand still after its response has ended: no visitor waits for it then.
const UPLOAD_STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// What an exchange needs to know.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// The local service.
    pub origin: Origin,
    /// Takes encoded messages to the service.
    pub outgoing: MessageSender,
    timeout: Duration,
    /// The service takes bodies in parts.
    takes_parts: bool,
    /// The service allows parts with `window`, and waits until it is allowed to send more itself.
    has_windows: bool,
    /// Bodies are compressed where that makes them shorter.
    compresses: bool,
}

impl Context {
    /// For a service that has these features.
    pub(crate) fn new(
        settings: &Settings,
        origin: &Origin,
        features: &[Feature],
        outgoing: MessageSender,
    ) -> Self {
        Self {
            origin: origin.clone(),
            outgoing,
            timeout: settings.request_timeout,
            takes_parts: features.contains(&Feature::BodyParts),
            has_windows: features.contains(&Feature::Window),
            compresses: settings.compression && features.contains(&Feature::Zstd),
        }
    }
}

/// Carries out one exchange, and returns how it went. `window` allows the parts of the response.
pub(crate) async fn run(
    context: Context,
    message: HttpRequest,
    parts: Option<BodyParts>,
    window: SendWindow,
) -> Event {
    let started = Instant::now();
    let method = message.method.parse().unwrap_or_default();
    let uri = message.uri.clone();
    let outgoing = Outgoing {
        messages: context.outgoing.clone(),
        request_id: message.request_id.clone(),
        reply_to: message.reply_to.clone(),
    };
    let mut reply = ResponseSender {
        outgoing: outgoing.clone(),
        window: context.has_windows.then_some(window),
        bytes: 0,
    };
    let grants = context.has_windows.then(|| outgoing.clone());
    let (upload, progress) = UploadStream::new(parts, grants);
    let outcome = match attempt(&context, message, upload, progress.clone(), &mut reply).await {
        Ok(status) => Ok(status),
        Err(failed) => {
            let text = failed.for_user().to_owned();
            outgoing.error(failed.code, failed.message.to_owned()).await;
            Err(text)
        }
    };
    let took = started.elapsed();
    if outcome.is_ok() {
        progress.ended().await;
    }
    Event::Request {
        method,
        uri,
        outcome,
        bytes: reply.bytes,
        took,
    }
}

async fn attempt(
    context: &Context,
    mut message: HttpRequest,
    upload: UploadStream,
    progress: UploadProgress,
    reply: &mut ResponseSender,
) -> Result<StatusCode, OriginError> {
    let started = Instant::now();
    let timeout = match message.deadline_ms {
        0 => context.timeout,
        deadline => context.timeout.min(Duration::from_millis(deadline)),
    };
    let addresses = context.origin.addresses(&message);
    let first = message.take_chunk().decompress().map_err(|_| {
        OriginError::new(
            AgentErrorCode::InvalidRequest,
            "its body cannot be decompressed",
        )
    })?;
    let (body, upgrade) = match message.upgrade {
        None => (upload.body(first), None),
        Some(_) => (OriginBody::Whole(Bytes::new()), Some(upload)),
    };
    let request = context.origin.request(&message, body)?;
    let is_head = message.method == "HEAD";
    let mut response = tokio::select! {
        response = context.origin.call(request) => response?,
        () = progress.silent_for(timeout) => return Err(OriginError::new(
            AgentErrorCode::Timeout,
            "the local service took too long",
        )),
    };
    let status = response.status();
    let protocol = response.headers_mut().remove(header::UPGRADE);
    remove_hop_by_hop(response.headers_mut());
    addresses.to_public(status, response.headers_mut());
    let processing_time_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    if let Some(upload) = upgrade
        && status == StatusCode::SWITCHING_PROTOCOLS
    {
        let protocol = protocol.map(|protocol| (header::UPGRADE, protocol));
        response.headers_mut().extend(protocol);
        let upload = (upload, progress);
        reply.upgrade(response, upload, processing_time_ms).await?;
    } else {
        reply
            .respond(response, is_head, processing_time_ms, context)
            .await?;
    }
    Ok(status)
}

/// The body of a request on its way to the local service.
pub(crate) struct UploadStream {
    /// What follows the first message, if anything does.
    parts: Option<BodyParts>,
    window: ReceiveWindow,
    /// Allows more parts, where the service waits for that.
    grants: Option<Outgoing>,
    progress: watch::Sender<Instant>,
}

/// When the local service last read something of the upload. The sender is gone when it reads no more.
#[derive(Clone)]
pub(crate) struct UploadProgress(watch::Receiver<Instant>);

impl UploadStream {
    fn new(parts: Option<BodyParts>, grants: Option<Outgoing>) -> (Self, UploadProgress) {
        let (progress, receiver) = watch::channel(Instant::now());
        let upload = Self {
            parts,
            window: ReceiveWindow::default(),
            grants,
            progress,
        };
        (upload, UploadProgress(receiver))
    }

    /// The body as the local service gets it, after its first bytes.
    fn body(mut self, first: Bytes) -> OriginBody {
        let Some(parts) = self.begin() else {
            return OriginBody::Whole(first);
        };
        let first = stream::iter([Ok(Frame::data(first))]);
        let rest = stream::unfold((self, Some(parts)), |(mut upload, parts)| async move {
            let mut parts = parts?;
            let (data, more) = upload.next(&mut parts).await;
            Some((data.map(Frame::data), (upload, more.then_some(parts))))
        });
        OriginBody::Streamed(StreamBody::new(first.chain(rest)).boxed_unsync())
    }

    /// The parts that follow the first message, if any do. It had a part, too, which is used up at once.
    pub(crate) fn begin(&mut self) -> Option<BodyParts> {
        let parts = self.parts.take()?;
        self.window.part_used();
        Some(parts)
    }

    /// The next bytes, and whether more follow. Each part that the local service takes lets the sender send more.
    pub(crate) async fn next(&mut self, parts: &mut BodyParts) -> (io::Result<Bytes>, bool) {
        self.progress.send_replace(Instant::now());
        let Some(part) = parts.recv().await else {
            // Only an error says that the rest will not come: the local service would take an end for the body's end.
            let broken_off = io::Error::new(io::ErrorKind::UnexpectedEof, "the upload broke off");
            return (Err(broken_off), false);
        };
        self.progress.send_replace(Instant::now());
        let chunk = Part::from(part.into_part()).chunk;
        let more = chunk.more;
        let allowed = self.window.part_used().filter(|_| more);
        if let (Some(outgoing), Some(allowed)) = (&self.grants, allowed) {
            outgoing.window(allowed).await;
        }
        (chunk.decompress().map_err(io::Error::other), more)
    }
}

impl UploadProgress {
    /// When the local service last read something.
    pub(crate) fn last(&self) -> Instant {
        *self.0.borrow()
    }

    /// Completes when nothing has been taken of the upload for this long.
    async fn silent_for(&self, time: Duration) {
        loop {
            let last = *self.0.borrow();
            sleep_until(last + time).await;
            if *self.0.borrow() == last {
                return;
            }
        }
    }

    /// Waits for the end of an upload whose response is there already: the local service still gets all that it takes.
    async fn ended(mut self) {
        let stalled = self.clone();
        let taken = async { while self.0.changed().await.is_ok() {} };
        tokio::select! {
            () = taken => {}
            () = stalled.silent_for(UPLOAD_STALL_TIMEOUT) => {}
        }
    }
}

/// What an exchange says to the service.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing {
    messages: MessageSender,
    request_id: RequestId,
    reply_to: Option<ConnectionId>,
}

impl Outgoing {
    /// Waits for room on the connection, which is what slows a fast local service down, and with an exchange's last message until
    /// the socket has taken it. When the connection has ended the exchange is about to be dropped with it.
    async fn send(&self, message: FromAgent) {
        let text = message::encode(&message);
        let is_last = match &message {
            FromAgent::HttpResponse(response) => !response.more,
            FromAgent::BodyPart(part) => !part.more,
            FromAgent::Error(_) => true,
            _ => false,
        };
        let queued = match message {
            // An error must not overtake the parts before it.
            FromAgent::Error(_) => self.messages.body(text).await,
            _ => self.messages.send(text).await,
        };
        if is_last && let Ok(receipt) = queued {
            let _ = receipt.taken().await;
        }
    }

    async fn window(&self, parts: u32) {
        self.send(FromAgent::Window(Window {
            request_id: self.request_id.clone(),
            parts,
            reply_to: self.reply_to.clone(),
        }))
        .await;
    }

    /// Sends a part of the response's body.
    pub(crate) async fn part(&self, part: Part) {
        let message = part.into_message(self.request_id.clone(), self.reply_to.clone());
        self.send(FromAgent::BodyPart(message)).await;
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
struct ResponseSender {
    outgoing: Outgoing,
    /// Which parts may be sent; `None` if the service does not know of windows.
    window: Option<SendWindow>,
    bytes: u64,
}

impl ResponseSender {
    async fn respond(
        &mut self,
        response: Response<Incoming>,
        is_head: bool,
        processing_time_ms: u64,
        context: &Context,
    ) -> Result<(), OriginError> {
        let (head, body) = response.into_parts();
        let compress = context.compresses && compression::is_compressible(&head.headers);
        let mut message = self.head(head.status, head.headers, processing_time_ms);
        let room = message.room().ok_or(OriginError::new(
            AgentErrorCode::ResponseTooLarge,
            "the header of its response is too long for the tunnel",
        ))?;
        if is_head {
            self.outgoing.send(FromAgent::HttpResponse(message)).await;
            return Ok(());
        }
        let mut body = BodySender::new(body, Mode::Coalesced { compress });
        let first = self
            .first_chunk(&mut body, room, context.takes_parts)
            .await?;
        message.set_chunk(first);
        self.bytes = body.sent_bytes();
        self.outgoing.send(FromAgent::HttpResponse(message)).await;
        loop {
            let part = match body.next_part(self.window.as_mut()).await {
                Ok(Some(part)) => part,
                // A closed window means that the connection has ended, and this exchange is about to.
                Ok(None) | Err(SendBodyError::WindowClosed(_)) => return Ok(()),
                Err(SendBodyError::Body(error)) => return Err(broken_off(&error)),
            };
            self.bytes = body.sent_bytes();
            self.outgoing.part(part).await;
        }
    }

    /// Answers that the protocol is changed, and carries what the two sides then send.
    async fn upgrade(
        &mut self,
        response: Response<Incoming>,
        (upload, progress): (UploadStream, UploadProgress),
        processing_time_ms: u64,
    ) -> Result<(), OriginError> {
        let headers = response.headers().clone();
        let mut message = self.head(response.status(), headers, processing_time_ms);
        message.more = true;
        self.outgoing.send(FromAgent::HttpResponse(message)).await;
        let broken = |error: &(dyn std::error::Error + 'static)| {
            info!(error, "an upgraded connection broke");
            OriginError::new(
                AgentErrorCode::LocalServiceUnavailable,
                "its connection broke",
            )
        };
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(|error| broken(&error))?;
        let sent = upgrade::carry(
            upgraded,
            upload,
            progress,
            self.window.as_mut(),
            &self.outgoing,
        )
        .await;
        self.bytes = sent.map_err(|error| broken(&error))?;
        Ok(())
    }

    async fn first_chunk(
        &self,
        body: &mut BodySender<Incoming>,
        room: usize,
        takes_parts: bool,
    ) -> Result<Chunk, OriginError> {
        if takes_parts {
            return body
                .first_chunk(room)
                .await
                .map_err(|error| broken_off(&error));
        }
        body.whole(room)
            .await
            .map_err(|error| broken_off(&error))?
            .ok_or(OriginError::new(
                AgentErrorCode::ResponseTooLarge,
                "its response is too long for this version of the service",
            ))
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

fn broken_off(error: &hyper::Error) -> OriginError {
    info!(
        error = error as &dyn std::error::Error,
        "the local service broke its response off"
    );
    OriginError::new(
        AgentErrorCode::LocalServiceUnavailable,
        "it broke off in the middle of its response",
    )
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_counts_from_the_last_progress_of_an_upload() {
        const LIMIT: Duration = Duration::from_secs(10);
        let (upload, progress) = UploadStream::new(None, None);
        let silent = progress.silent_for(LIMIT);
        tokio::pin!(silent);
        for _ in 0..10 {
            assert!(timeout(LIMIT * 9 / 10, &mut silent).await.is_err());
            upload.progress.send_replace(Instant::now());
        }
        let last = Instant::now();
        silent.await;
        assert_eq!(last.elapsed().as_secs(), LIMIT.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_is_awaited_until_it_ends_or_stalls() {
        let (upload, progress) = UploadStream::new(None, None);
        let started = Instant::now();
        advance(UPLOAD_STALL_TIMEOUT / 2).await;
        drop(upload);
        progress.ended().await;
        assert!(started.elapsed() < UPLOAD_STALL_TIMEOUT);

        let (_upload, progress) = UploadStream::new(None, None);
        let started = Instant::now();
        progress.ended().await;
        assert_eq!(started.elapsed().as_secs(), UPLOAD_STALL_TIMEOUT.as_secs());
    }
}
