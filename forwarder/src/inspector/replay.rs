//! Recorded requests, sent again: as they were, or changed, to the tunnel's own target or to another.

use std::{io, sync::Arc, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use http_body_util::BodyExt;
use serde::Deserialize;
use tokio::{sync::Semaphore, time::timeout};
use tokio_util::task::TaskTracker;
use tunnel_protocol::{
    headers::{remove_hop_by_hop, text_to_value, value_to_text},
    id::RequestId,
    message::{Body, HttpRequest},
};

use super::{
    masking::MASK,
    recorded::{ExchangeId, RecordedExchange, ReplaySource},
    recorder::{Recorder, Recording},
    reply::ApiError,
    shared::{InspectedTunnel, Shared},
};
use crate::{
    origin::{Origin, OriginBody, OriginError},
    settings::Settings,
    target::Target,
};

/// How many replays go on at once.
const MAX_REPLAYS: usize = 32;
/// A response that goes on for longer, such as a stream of events, is left.
const MAX_REPLAY_TIME: Duration = Duration::from_secs(5 * 60);

/// What is to be replayed. What is left out stays as it was.
#[derive(Debug, Deserialize)]
pub(crate) struct ReplayRequest {
    /// The recorded exchange.
    id: String,
    /// The tunnel to replay it against, if not its own.
    tunnel_name: Option<String>,
    /// Where to send it, in place of the tunnel's target.
    target: Option<String>,
    method: Option<String>,
    /// Path and query.
    uri: Option<String>,
    /// All fields. A value that is masked stands for the recorded one.
    headers: Option<Vec<(String, String)>>,
    /// The body as text.
    body: Option<String>,
    /// The body in Base64.
    body_base64: Option<String>,
}

impl ReplayRequest {
    fn is_edited(&self) -> bool {
        self.method.is_some()
            || self.uri.is_some()
            || self.headers.is_some()
            || self.body.is_some()
            || self.body_base64.is_some()
    }

    fn new_body(&self) -> Result<Option<Bytes>, ApiError> {
        match (&self.body, &self.body_base64) {
            (None, None) => Ok(None),
            (Some(text), None) => Ok(Some(text.clone().into())),
            (None, Some(base64)) => match BASE64_STANDARD.decode(base64) {
                Ok(bytes) => Ok(Some(bytes.into())),
                Err(_) => Err(invalid("body_base64 is not Base64")),
            },
            (Some(_), Some(_)) => Err(invalid("give body or body_base64, not both")),
        }
    }
}

fn invalid(message: &'static str) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "invalid_replay", message)
}

/// Sends recorded requests again.
#[derive(Debug)]
pub(crate) struct Replays {
    tasks: TaskTracker,
    permits: Arc<Semaphore>,
}

impl Replays {
    pub(crate) fn new() -> Self {
        Self {
            tasks: TaskTracker::new(),
            permits: Arc::new(Semaphore::new(MAX_REPLAYS)),
        }
    }

    /// Starts a replay and returns what it is recorded as.
    ///
    /// # Errors
    /// If the exchange is not kept, or cannot be sent again.
    pub(crate) fn start(
        &self,
        shared: &Arc<Shared>,
        wanted: &ReplayRequest,
    ) -> Result<Option<ExchangeId>, ApiError> {
        let gone = || {
            ApiError::new(
                StatusCode::NOT_FOUND,
                "no_such_request",
                "the request is not kept any more",
            )
        };
        let id: ExchangeId = wanted.id.parse().map_err(|_| gone())?;
        let source = shared.store.get(id).ok_or_else(gone)?;
        let permit = self.permits.clone().try_acquire_owned().map_err(|_| {
            ApiError::new(
                StatusCode::TOO_MANY_REQUESTS,
                "too_many_replays",
                "too many replays are going on: wait until some have ended",
            )
        })?;
        let source = source.copy();
        let tunnel = tunnel(shared, wanted, &source)?;
        let origin = origin(tunnel, wanted)?;
        let message = message(wanted, &source, tunnel)?;
        let recorder = Recorder::new(tunnel.name(), shared.clone());
        let recording = recorder.begin_replay(
            &message,
            ReplaySource {
                of: id,
                edited: wanted.is_edited(),
                target: wanted.target.clone(),
            },
        );
        let replayed = recording.id();
        let request_timeout = tunnel.settings.request_timeout;
        self.tasks.spawn(async move {
            let _permit = permit;
            let sent = timeout(
                MAX_REPLAY_TIME,
                send(&origin, message, &recording, request_timeout),
            );
            match sent.await {
                Ok(outcome) => recording.finish(&outcome),
                Err(_) => recording.cancel("the response went on for too long to be replayed"),
            }
        });
        Ok(replayed)
    }
}

fn tunnel<'a>(
    shared: &'a Shared,
    wanted: &ReplayRequest,
    source: &RecordedExchange,
) -> Result<&'a InspectedTunnel, ApiError> {
    let name = wanted
        .tunnel_name
        .as_deref()
        .filter(|name| !name.is_empty());
    shared
        .tunnel(name.unwrap_or(&source.tunnel))
        .ok_or(ApiError::new(
            StatusCode::NOT_FOUND,
            "no_such_tunnel",
            "this process has no tunnel of that name: name another in tunnel_name",
        ))
}

fn origin(tunnel: &InspectedTunnel, wanted: &ReplayRequest) -> Result<Origin, ApiError> {
    let Some(target) = &wanted.target else {
        return Ok(tunnel.origin.clone());
    };
    let target: Target = target
        .parse()
        .map_err(|_| invalid("target must be a port, host:port or http(s)://host:port"))?;
    Ok(Origin::new(&Settings {
        target,
        ..tunnel.settings.clone()
    }))
}

/// The message that brings the request, as the service would send it.
fn message(
    wanted: &ReplayRequest,
    source: &RecordedExchange,
    tunnel: &InspectedTunnel,
) -> Result<HttpRequest, ApiError> {
    if source.request.upgrade.is_some() {
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            "upgraded",
            "an upgraded connection cannot be replayed",
        ));
    }
    let body = match wanted.new_body()? {
        Some(body) => body,
        None if source.request.body.is_cut() => {
            return Err(ApiError::new(
                StatusCode::CONFLICT,
                "body_cut",
                "only a part of the request's body was kept: edit it, or send the request anew",
            ));
        }
        None => source.request.body.kept().into_owned().into(),
    };
    let mut headers = match &wanted.headers {
        Some(fields) => edited(fields, &source.request.headers.unpack(), tunnel)?,
        None => source.request.headers.unpack(),
    };
    if source.is_masked {
        remove_masks(&mut headers);
    }
    let method = wanted.method.as_deref().unwrap_or(&source.request.method);
    let uri = wanted.uri.as_deref().unwrap_or(&source.request.uri);
    let message = HttpRequest {
        request_id: RequestId::generate(),
        method: method.to_owned(),
        uri: uri.to_owned(),
        headers,
        upgrade: None,
        websocket: None,
        body: Body(body),
        encoding: None,
        timestamp: 0,
        more: false,
        deadline_ms: 0,
        reply_to: None,
    };
    tunnel.origin.check(&message).map_err(|_| {
        invalid("method must be a method, and uri a path with a query, such as /hook?a=1")
    })?;
    Ok(message)
}

/// The fields that an editor has left. Those that are still masked are the recorded ones.
fn edited(
    fields: &[(String, String)],
    recorded: &HeaderMap,
    tunnel: &InspectedTunnel,
) -> Result<HeaderMap, ApiError> {
    let mut headers = HeaderMap::new();
    for (name, text) in fields {
        let fault = invalid("headers must be pairs of a name and a value that HTTP allows");
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| fault)?;
        let value = text_to_value(text).ok_or(fault)?;
        let masked = recorded.get_all(&name).iter().find(|value| {
            tunnel.masking.hides(&name) && tunnel.masking.show(&name, value) == *text
        });
        headers.append(name, masked.cloned().unwrap_or(value));
    }
    Ok(headers)
}

/// Removes fields of which only the mask is known.
fn remove_masks(headers: &mut HeaderMap) {
    let is_mask = |value: &HeaderValue| value_to_text(value).contains(MASK);
    let masked: Vec<HeaderName> = headers
        .iter()
        .filter(|(_, value)| is_mask(value))
        .map(|(name, _)| name.clone())
        .collect();
    for name in masked {
        headers.remove(name);
    }
}

async fn send(
    origin: &Origin,
    mut message: HttpRequest,
    recording: &Recording,
    request_timeout: Duration,
) -> Result<StatusCode, String> {
    let for_user = |error: OriginError| error.for_user().to_owned();
    let body = message.take_chunk().bytes;
    recording.request_bytes(&body);
    let addresses = origin.addresses(&message);
    recording.request_sent();
    let call = origin.call(&message, &addresses, OriginBody::Whole(body));
    let mut response = match timeout(request_timeout, call).await {
        Ok(response) => response.map_err(for_user)?,
        Err(_) => return Err("the local service took too long".to_owned()),
    };
    let status = response.status();
    remove_hop_by_hop(response.headers_mut());
    addresses.to_public(status, response.headers_mut());
    recording.response_head(status, response.headers());
    let mut body = recording.tap(response.into_body());
    while let Some(frame) = body.frame().await {
        if let Err(error) = frame {
            let error = io::Error::other(error);
            return Err(format!(
                "it broke off in the middle of its response: {error}"
            ));
        }
    }
    Ok(status)
}
