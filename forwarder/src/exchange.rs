//! One request: to the local service, and its response back in as few messages as keep it moving.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Response, StatusCode, header};
use tokio::time::Instant;
use tracing::info;
use tunnel_protocol::{
    body::{BodySender, Chunk, Mode, SendBodyError, compression, window::SendWindow},
    headers::remove_hop_by_hop,
    message::{AgentErrorCode, Feature, Format, FromAgent, HttpRequest},
    writer::{MessageSender, Receipt},
};

use crate::{
    inspector::{RecordedStream, Recording},
    open_socket::SocketObserver,
    origin::{Origin, OriginBody, OriginError},
    origin_socket::ResponseBody,
    outgoing::Outgoing,
    settings::Settings,
    upgrade,
    upload::{UploadBody, UploadProgress, UploadStream},
};

/// What an exchange needs to know.
#[derive(Debug)]
pub(crate) struct Context {
    /// The local service.
    pub origin: Origin,
    /// Takes encoded messages to the service.
    pub outgoing: MessageSender,
    /// Learns of upgraded connections.
    pub sockets: SocketObserver,
    timeout: Duration,
    /// The service takes bodies in parts.
    takes_parts: bool,
    /// The service allows parts with `window`, and waits until it is allowed to send more itself.
    has_windows: bool,
    /// Bodies are compressed where that makes them shorter.
    compresses: bool,
    /// How the service reads bodies.
    format: Format,
}

impl Context {
    /// For a service that has these features.
    pub(crate) fn new(
        settings: &Settings,
        origin: &Origin,
        features: &[Feature],
        outgoing: MessageSender,
        sockets: SocketObserver,
    ) -> Self {
        Self {
            origin: origin.clone(),
            outgoing,
            sockets,
            timeout: settings.request_timeout,
            takes_parts: features.contains(&Feature::BodyParts),
            has_windows: features.contains(&Feature::Window),
            compresses: settings.compression && features.contains(&Feature::Zstd),
            format: Format::of(features),
        }
    }

    /// How long the local service may take until the head of its response, if the visitor waits for `deadline_ms`; 0 if the service
    /// did not say.
    pub(crate) fn time_limit(&self, deadline_ms: u64) -> Duration {
        match deadline_ms {
            0 => self.timeout,
            deadline => self.timeout.min(Duration::from_millis(deadline)),
        }
    }
}

/// How an exchange ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// The local service's status, or why there is no whole response.
    pub outcome: Result<StatusCode, String>,
    /// How many bytes of the response's body were sent.
    pub bytes: u64,
    /// Tells when the socket has taken its last message, if that was not waited for.
    pub unwritten: Option<Receipt>,
}

/// Carries out one exchange, and returns how it went. `window` allows the parts of the response.
pub(crate) async fn run(
    context: Arc<Context>,
    message: Box<HttpRequest>,
    body: UploadBody,
    window: SendWindow,
    recording: Recording,
) -> Ended {
    let is_upgrade = message.upgrade.is_some();
    let outgoing = Outgoing::about(&message, &context.outgoing, context.format);
    let mut reply = ResponseSender {
        outgoing: outgoing.clone(),
        window: context.has_windows.then_some(window),
        bytes: 0,
        unwritten: None,
        recording: recording.clone(),
    };
    let grants = context.has_windows.then(|| outgoing.clone());
    let (upload, progress) = UploadStream::new(body, grants);
    let outcome = match attempt(&context, message, upload, progress.clone(), &mut reply).await {
        Ok(status) => Ok(status),
        Err(failed) => {
            let text = failed.for_user().to_owned();
            outgoing.error(failed.code, failed.message.to_owned()).await;
            Err(text)
        }
    };
    recording.finish(&outcome);
    if outcome.is_ok() && !progress.ended().await && context.has_windows && !is_upgrade {
        // Otherwise the service would wait to be allowed more.
        outgoing.window(0).await;
    }
    Ended {
        outcome,
        bytes: reply.bytes,
        unwritten: reply.unwritten,
    }
}

async fn attempt(
    context: &Context,
    message: Box<HttpRequest>,
    mut upload: UploadStream,
    progress: UploadProgress,
    reply: &mut ResponseSender,
) -> Result<StatusCode, OriginError> {
    let started = Instant::now();
    let timeout = context.time_limit(message.deadline_ms);
    let addresses = context.origin.addresses(&message);
    let first = upload.first().map_err(|_| {
        OriginError::new(
            AgentErrorCode::InvalidRequest,
            "its body cannot be decompressed",
        )
    })?;
    let recording = &reply.recording;
    let (body, upgrade) = match (&message.upgrade, first.more) {
        (Some(_), _) => (OriginBody::Whole(Bytes::new()), Some(upload)),
        (None, true) => (upload.into_body(first.bytes, recording.clone()), None),
        (None, false) => {
            recording.request_bytes(&first.bytes);
            recording.request_sent();
            (OriginBody::Whole(first.bytes), None)
        }
    };
    let is_head = message.method == "HEAD";
    let mut response = tokio::select! {
        response = context.origin.call(&message, &addresses, body) => response?,
        () = progress.silent_for(timeout) => return Err(OriginError::new(
            AgentErrorCode::Timeout,
            "the local service took too long",
        )),
    };
    let status = response.status();
    let protocol = response.headers_mut().remove(header::UPGRADE);
    remove_hop_by_hop(response.headers_mut());
    addresses.to_public(status, response.headers_mut());
    context
        .origin
        .response_rules()
        .apply(response.headers_mut());
    let processing_time_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    if let Some(upload) = upgrade
        && status == StatusCode::SWITCHING_PROTOCOLS
    {
        let protocol = protocol.map(|protocol| (header::UPGRADE, protocol));
        response.headers_mut().extend(protocol);
        let _open = context.sockets.opened();
        let upload = (upload, progress);
        reply.upgrade(response, upload, processing_time_ms).await?;
    } else {
        reply
            .respond(response, is_head, processing_time_ms, context)
            .await?;
    }
    Ok(status)
}

/// The way back to the visitor.
struct ResponseSender {
    outgoing: Outgoing,
    /// Which parts may be sent; `None` if the service does not know of windows.
    window: Option<SendWindow>,
    bytes: u64,
    /// Of the response, if it is one short message.
    unwritten: Option<Receipt>,
    recording: Recording,
}

impl ResponseSender {
    async fn respond(
        &mut self,
        response: Response<ResponseBody>,
        is_head: bool,
        processing_time_ms: u64,
        context: &Context,
    ) -> Result<(), OriginError> {
        let (head, body) = response.into_parts();
        self.recording.response_head(head.status, &head.headers);
        let compress = context.compresses && compression::is_compressible(&head.headers);
        let mut message = self
            .outgoing
            .response(head.status, head.headers, processing_time_ms);
        let room = message.room(context.format).ok_or(OriginError::new(
            AgentErrorCode::ResponseTooLarge,
            "the header of its response is too long for the tunnel",
        ))?;
        if is_head {
            self.unwritten = self.outgoing.send(FromAgent::HttpResponse(message)).await;
            return Ok(());
        }
        let mode = Mode::Coalesced { compress };
        let mut body = BodySender::new(self.recording.tap(body), mode, context.format);
        let first = self
            .first_chunk(&mut body, room, context.takes_parts)
            .await?;
        message.set_chunk(first);
        self.bytes = body.sent_bytes();
        self.unwritten = self.outgoing.send(FromAgent::HttpResponse(message)).await;
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
        response: Response<ResponseBody>,
        (upload, progress): (UploadStream, UploadProgress),
        processing_time_ms: u64,
    ) -> Result<(), OriginError> {
        let headers = response.headers().clone();
        self.recording.response_head(response.status(), &headers);
        let mut message = self
            .outgoing
            .response(response.status(), headers, processing_time_ms);
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
        // Boxed, so that other exchanges do not carry its room about.
        let carried = Box::pin(upgrade::carry(
            upgraded,
            upload,
            progress,
            self.window.as_mut(),
            &self.outgoing,
            &self.recording,
        ));
        let sent = carried.await;
        self.bytes = sent.map_err(|error| broken(&error))?;
        Ok(())
    }

    async fn first_chunk(
        &self,
        body: &mut BodySender<RecordedStream<ResponseBody>>,
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
