//! A visitor's request as its agent gets it: the first message, and the body that does not fit into it.

use http::{HeaderMap, HeaderValue, Method, header};
use tunnel_protocol::{
    body::{BodySender, Mode, compression},
    headers,
    headers::{FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PREFIX, FORWARDED_PROTO},
    id::RequestId,
    limits::MAX_HEADER_FIELDS,
    message::{Body, Feature, Format, HttpRequest},
};
use tunnel_service::{now, tables::tunnels::Online};

use crate::{
    TunnelPath,
    error::ForwardError,
    request::{VisitorBody, VisitorRequest},
};

/// A request, ready to be sent.
pub(crate) struct FirstMessage {
    /// The head, and as much of the body as has come and fits.
    pub(crate) message: HttpRequest,
    /// How many bytes of the body it carries, counted before compression.
    pub(crate) body_bytes: u64,
    /// The rest of the body.
    pub(crate) rest: Option<BodySender<VisitorBody>>,
    /// Whether there is a rest, or was until it was taken.
    pub(crate) has_rest: bool,
    /// What it was measured for.
    format: Format,
}

impl FirstMessage {
    /// Builds the message for the agent of `online`.
    ///
    /// # Errors
    /// If the request is too large for the tunnel, or breaks off.
    pub(crate) async fn build(
        mut request: Box<VisitorRequest>,
        path: &TunnelPath,
        online: &Online,
        use_compression: bool,
        format: Format,
    ) -> Result<Self, ForwardError> {
        let compress = use_compression
            && online.features.contains(&Feature::Zstd)
            && compression::is_compressible(&request.headers);
        let carried_by = upgrade_feature(request.websocket.is_some());
        if !online.features.contains(&carried_by) {
            request.without_upgrade("this tunnel's agent is too old; update it")?;
        }
        let mut message = head(&mut request, path);
        if message.headers.len() > MAX_HEADER_FIELDS {
            return Err(ForwardError::TooLarge(format!(
                "The request has more than {MAX_HEADER_FIELDS} header fields."
            )));
        }
        let room = message.room(format).ok_or_else(|| {
            ForwardError::TooLarge(
                "The header of the request is too long for the tunnel.".to_owned(),
            )
        })?;
        if message.upgrade.is_some() && message.websocket.is_none() {
            return Ok(Self::upgrade(message, request.body, format));
        }
        let mode = Mode::Coalesced { compress };
        let mut body = BodySender::new(request.body, mode, format);
        let chunk = if online.features.contains(&Feature::BodyParts) {
            body.first_chunk(room).await.map_err(broken_off)?
        } else {
            let whole = body.whole(room).await.map_err(broken_off)?;
            whole.ok_or_else(|| {
                ForwardError::TooLarge(format!(
                    "This tunnel's agent is too old for request bodies over {room} bytes. Update it."
                ))
            })?
        };
        message.set_chunk(chunk);
        Ok(Self {
            body_bytes: body.sent_bytes(),
            has_rest: message.more,
            rest: message.more.then_some(body),
            message,
            format,
        })
    }

    /// A request to change the protocol. What the visitor sends after that is sent on as it comes.
    fn upgrade(mut message: HttpRequest, body: VisitorBody, format: Format) -> Self {
        message.more = true;
        let mut sender = BodySender::new(body, Mode::Raw, format);
        sender.begin();
        Self {
            message,
            body_bytes: 0,
            rest: Some(sender),
            has_rest: true,
            format,
        }
    }

    /// Whether the request changes nothing (RFC 9110, 9.2.1) and has no body, so that it may be carried out twice.
    pub(crate) fn may_repeat(&self) -> bool {
        let method = self.message.method.as_bytes();
        !self.has_rest
            && self.message.body.0.is_empty()
            && [Method::GET, Method::HEAD, Method::OPTIONS]
                .iter()
                .any(|safe| safe.as_str().as_bytes() == method)
    }

    /// Whether an agent with these features, which gets messages in `format`, can read the message.
    pub(crate) fn is_readable_with(&self, features: &[Feature], format: Format) -> bool {
        let body = self.message.body.0.len();
        let fits = || self.message.room(format).is_some_and(|room| body <= room);
        (format == self.format || fits())
            && (!self.has_rest || features.contains(&Feature::BodyParts))
            && (self.message.encoding.is_none() || features.contains(&Feature::Zstd))
            && (self.message.upgrade.is_none()
                || features.contains(&upgrade_feature(self.message.websocket.is_some())))
    }
}

/// What an agent must know to take an upgraded connection whose messages, or whose bytes, are carried.
fn upgrade_feature(by_messages: bool) -> Feature {
    if by_messages {
        Feature::Websockets
    } else {
        Feature::Upgrade
    }
}

/// Why an upload ends before its end.
pub(crate) fn broken_off(error: impl std::fmt::Display) -> ForwardError {
    ForwardError::BadRequest(format!("its body broke off: {error}"))
}

fn head(request: &mut VisitorRequest, path: &TunnelPath) -> HttpRequest {
    HttpRequest {
        request_id: RequestId::generate(),
        method: request.method.to_string(),
        uri: match &request.query {
            Some(query) => format!("{}?{query}", path.path),
            None => path.path.clone(),
        },
        headers: forwarded(request, &path.prefix),
        upgrade: request
            .upgrade
            .as_ref()
            .map(|protocol| headers::value_to_text(protocol).into_owned()),
        websocket: request.websocket.clone(),
        body: Body::default(),
        encoding: None,
        timestamp: u64::try_from(now().as_millis()).unwrap_or(u64::MAX),
        more: false,
        deadline_ms: u64::try_from(request.response_timeout.as_millis()).unwrap_or(u64::MAX),
        reply_to: None,
    }
}

/// The fields that the local service gets: the visitor's own, and ours about where the request comes from.
fn forwarded(request: &mut VisitorRequest, prefix: &str) -> HeaderMap {
    let mut fields = std::mem::take(&mut request.headers);
    headers::remove_hop_by_hop(&mut fields);
    headers::remove_forwarding(&mut fields);
    fields.remove(header::EXPECT);
    if request.websocket.is_some() {
        // The service reads the messages: nothing may change what they look like.
        fields.remove(header::SEC_WEBSOCKET_EXTENSIONS);
    }
    for (name, value) in [
        (FORWARDED_FOR, &*request.source_ip),
        (FORWARDED_PROTO, &*request.scheme),
        (FORWARDED_HOST, &*request.host),
        (FORWARDED_PREFIX, prefix),
    ] {
        if let Ok(value) = HeaderValue::from_str(value)
            && !(name == FORWARDED_PREFIX && prefix.is_empty())
        {
            fields.insert(name, value);
        }
    }
    fields
}
