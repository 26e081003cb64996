//! The local service: how it is called, and what its failures mean.

use std::{error::Error, io};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header,
    request::Parts,
    uri::{PathAndQuery, Scheme, Uri},
};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use tracing::{debug, info};
use tunnel_protocol::{
    headers::{self, remove_hop_by_hop},
    limits::MAX_HEADER_FIELDS,
    message::{AgentErrorCode, HttpRequest},
    upgrade,
};

use crate::{
    addresses::{Addresses, OwnAddress},
    connector::Connector,
    failure,
    header_rules::HeaderRules,
    origin_pool::{OriginConnection, OriginPool},
    origin_socket::ResponseBody,
    settings::Settings,
    target::Target,
    tls,
};

/// This hop in the `Via` of requests (RFC 9110, 7.6.3).
const VIA: HeaderValue = HeaderValue::from_static("1.1 ttf");

/// Sockets, pipes and TLS hold more, in bytes, while nobody reads: at least the 8 KiB of a Unix socket of macOS.
pub(crate) const MAX_SHORT_BODY_BYTES: usize = 4 * 1024;

/// A body that arrives while it is passed on.
pub(crate) type StreamedBody = UnsyncBoxBody<Bytes, io::Error>;

/// The local service, with its pool of connections.
#[derive(Clone, Debug)]
pub struct Origin {
    pool: OriginPool,
    target: Target,
    own_address: OwnAddress,
    request_headers: HeaderRules,
    response_headers: HeaderRules,
}

/// A request to the local service.
#[derive(Debug)]
struct OriginRequest {
    head: Parts,
    body: OriginBody,
}

/// The body of a request to the local service.
#[derive(Debug)]
pub enum OriginBody {
    /// All of it.
    Whole(Bytes),
    /// What is still on its way.
    Streamed(StreamedBody),
}

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct OriginError {
    /// What kind of failure.
    pub code: AgentErrorCode,
    /// The failure in a sentence. It is shown to visitors, so it tells nothing of this machine.
    pub message: &'static str,
    /// What the user of the agent may know, and do about it.
    pub cause: Option<String>,
}

impl OriginError {
    /// A failure of which there is nothing more to say.
    pub fn new(code: AgentErrorCode, message: &'static str) -> Self {
        Self {
            code,
            message,
            cause: None,
        }
    }

    /// The local service does not answer as HTTP requires.
    pub(crate) fn unavailable(message: &'static str, cause: Option<String>) -> Self {
        Self {
            code: AgentErrorCode::LocalServiceUnavailable,
            message,
            cause,
        }
    }

    /// The failure as the user of the agent sees it.
    pub fn for_user(&self) -> &str {
        self.cause.as_deref().unwrap_or(self.message)
    }
}

/// A call that failed.
struct FailedCall {
    error: OriginError,
    /// The connection had served before, and ended without a byte of a response: it was closed when the request came.
    was_stale: bool,
}

impl FailedCall {
    fn for_good(error: OriginError) -> Self {
        Self {
            error,
            was_stale: false,
        }
    }
}

impl Origin {
    /// The local service of a tunnel.
    pub fn new(settings: &Settings) -> Self {
        let has_tls = settings.target.scheme == Scheme::HTTPS;
        let tls = tls::client_config(has_tls, &settings.target_tls);
        let connector = Connector::new(&settings.target, tls, settings.spa);
        let address = Uri::builder()
            .scheme(settings.target.scheme.clone())
            .authority(settings.target.authority.clone())
            .path_and_query("/")
            .build()
            .expect("all that an address has");
        Self {
            pool: OriginPool::new(connector, address),
            target: settings.target.clone(),
            own_address: OwnAddress::new(&settings.target, &settings.host_header),
            request_headers: settings.request_headers.clone(),
            response_headers: settings.response_headers.clone(),
        }
    }

    #[cfg(test)]
    pub(crate) fn pool(&self) -> &OriginPool {
        &self.pool
    }

    /// Where it is.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// What is changed in the header of its responses.
    pub fn response_rules(&self) -> &HeaderRules {
        &self.response_headers
    }

    /// Its addresses, as a request sees them.
    pub fn addresses<'a>(&'a self, request: &'a HttpRequest) -> Addresses<'a> {
        Addresses::of(request, &self.own_address)
    }

    /// Looks whether a message can be made a request.
    ///
    /// # Errors
    /// If it is not a valid HTTP request.
    pub(crate) fn check(&self, message: &HttpRequest) -> Result<(), OriginError> {
        let addresses = self.addresses(message);
        let body = OriginBody::Whole(Bytes::new());
        self.request(message, &addresses, body).map(drop)
    }

    /// Makes a request of a message with its body. Only path and query of its address are the visitor's to choose.
    fn request(
        &self,
        message: &HttpRequest,
        addresses: &Addresses<'_>,
        body: OriginBody,
    ) -> Result<OriginRequest, OriginError> {
        let invalid = |message| OriginError::new(AgentErrorCode::InvalidRequest, message);
        let method: Method = message
            .method
            .parse()
            .map_err(|_| invalid("its method is not valid"))?;
        if method == Method::CONNECT || !message.uri.starts_with('/') {
            return Err(invalid("the request target is not a path"));
        }
        let path: PathAndQuery = message
            .uri
            .parse()
            .map_err(|_| invalid("its path is not valid"))?;
        let (mut head, ()) = Request::new(()).into_parts();
        head.headers = self.fields(message, addresses, &body, &method);
        head.method = method;
        head.uri = path.into();
        Ok(OriginRequest { head, body })
    }

    fn fields(
        &self,
        message: &HttpRequest,
        addresses: &Addresses<'_>,
        body: &OriginBody,
        method: &Method,
    ) -> HeaderMap {
        let mut fields = message.headers.clone();
        remove_hop_by_hop(&mut fields);
        if let Some(protocols) = message.upgrade.as_deref().and_then(headers::text_to_value) {
            upgrade::set(&mut fields, protocols);
        }
        addresses.to_own(&mut fields);
        self.request_headers.apply(&mut fields);
        fields.append(header::VIA, VIA);
        let said = remove_length(&mut fields);
        let expects_body = matches!(*method, Method::POST | Method::PUT | Method::PATCH);
        let length = match body {
            // The visitor's word, if there is one; the body is chunked otherwise.
            OriginBody::Streamed(_) => said,
            OriginBody::Whole(bytes) if said.is_some() || expects_body || !bytes.is_empty() => {
                Some(bytes.len() as u64)
            }
            OriginBody::Whole(_) => None,
        };
        if let Some(length) = length {
            fields.insert(header::CONTENT_LENGTH, length.into());
        }
        fields
    }

    /// Calls the local service with a message's head, whose `addresses` are those of [`Origin::addresses`], and a body, and returns
    /// the response as soon as its head is there.
    ///
    /// Until the response's body has been read or dropped, it is read on although the service takes no more of the request.
    ///
    /// A service may close a kept connection while a request is put on it. A request that may be made twice (RFC 9110, 9.2.2), and
    /// whose body is still at hand, is made once more then, on a new connection.
    ///
    /// # Errors
    /// If the message is not a valid HTTP request, or the service cannot be reached or does not answer as HTTP requires.
    pub async fn call(
        &self,
        message: &HttpRequest,
        addresses: &Addresses<'_>,
        body: OriginBody,
    ) -> Result<Response<ResponseBody>, OriginError> {
        let request = Box::new(self.request(message, addresses, body)?);
        let body_again = request.body_again();
        let failed = match self.attempt(request, false).await {
            Ok(response) => return Ok(response),
            Err(failed) => failed,
        };
        match body_again {
            Some(body) if failed.was_stale => {
                debug!("a kept connection was closed; the request is sent again");
                let request = self.request(message, addresses, OriginBody::Whole(body))?;
                let response = self.attempt(request.into(), true).await;
                response.map_err(|failed| failed.error)
            }
            _ => Err(failed.error),
        }
    }

    /// Sends a request on a connection that waits, or on a new one, which it has for itself: if it asks for another protocol, or
    /// must not meet another connection that is about to be closed.
    async fn attempt(
        &self,
        request: Box<OriginRequest>,
        is_repeated: bool,
    ) -> Result<Response<ResponseBody>, FailedCall> {
        let is_upgrade = request.is_upgrade();
        let has_its_own = is_upgrade || is_repeated;
        let is_long = request.is_long();
        let mut request = request.into_http();
        loop {
            let connection = if has_its_own {
                let connecting = Box::pin(self.pool.connect());
                connecting.await.map(|connection| (connection, false))
            } else {
                self.pool.take().await
            };
            let (mut connection, has_waited) =
                connection.map_err(|error| self.no_connection(&*error))?;
            // A long body is written also while its response waits for the visitor. A connection that is not kept has nobody else to
            // drive it.
            if has_its_own || is_long {
                connection.driver.detach();
            }
            match connection.send(request).await {
                Ok(response) => {
                    let pool = (!has_its_own).then(|| self.pool.clone());
                    let response = observed(response, connection, pool);
                    return checked(response, is_upgrade).map_err(FailedCall::for_good);
                }
                Err(mut error) => match error.take_message() {
                    Some(unsent) if has_waited => request = unsent,
                    _ => return Err(self.no_response(&error.into_error(), &connection)),
                },
            }
        }
    }

    fn no_connection(&self, error: &(dyn Error + 'static)) -> FailedCall {
        let failed = failure::explain_connect(error, &self.target);
        info!(
            error,
            cause = failed.for_user(),
            "no connection to the local service"
        );
        FailedCall::for_good(failed)
    }

    fn no_response(&self, error: &hyper::Error, connection: &OriginConnection) -> FailedCall {
        let head = connection.record.head();
        let failed = failure::explain(error, &head, &self.target);
        info!(
            error = error as &dyn Error,
            cause = failed.for_user(),
            "no response from the local service"
        );
        FailedCall {
            was_stale: connection.record.has_served() && head.is_empty(),
            error: failed,
        }
    }
}

/// A response that was begun on a connection, which `pool` has once the body has been read.
fn observed(
    response: Response<Incoming>,
    connection: OriginConnection,
    pool: Option<OriginPool>,
) -> Response<ResponseBody> {
    connection.record.mark_served();
    let responses = connection.responses.clone();
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        responses.upgraded();
        return response.map(ResponseBody::unobserved);
    }
    response.map(|body| {
        let body = responses.body(body);
        match pool {
            Some(pool) => body.kept_by(pool, connection),
            None => body,
        }
    })
}

impl OriginRequest {
    /// Its body, if it may be made twice.
    fn body_again(&self) -> Option<Bytes> {
        let is_idempotent = matches!(
            self.head.method,
            Method::GET
                | Method::HEAD
                | Method::OPTIONS
                | Method::TRACE
                | Method::PUT
                | Method::DELETE
        );
        match &self.body {
            OriginBody::Whole(bytes) if is_idempotent => Some(bytes.clone()),
            _ => None,
        }
    }

    /// Whether its body may not fit into the buffers on the way to the local service.
    fn is_long(&self) -> bool {
        match &self.body {
            OriginBody::Whole(bytes) => bytes.len() > MAX_SHORT_BODY_BYTES,
            OriginBody::Streamed(_) => true,
        }
    }

    fn is_upgrade(&self) -> bool {
        self.head.headers.contains_key(header::UPGRADE)
    }

    fn into_http(self) -> Request<StreamedBody> {
        let body = match self.body {
            OriginBody::Whole(bytes) => Full::new(bytes)
                .map_err(|never| match never {})
                .boxed_unsync(),
            OriginBody::Streamed(body) => body,
        };
        Request::from_parts(self.head, body)
    }
}

/// Removes the length the visitor gave, and returns it if it is one.
fn remove_length(fields: &mut HeaderMap) -> Option<u64> {
    let said = fields.remove(header::CONTENT_LENGTH)?;
    said.to_str().ok()?.parse().ok()
}

/// Holds a response's head to what HTTP says about status and framing, and makes it fit to be passed on.
fn checked(
    mut response: Response<ResponseBody>,
    is_upgrade: bool,
) -> Result<Response<ResponseBody>, OriginError> {
    if response.headers().len() > MAX_HEADER_FIELDS {
        return Err(failure::head_too_long());
    }
    let status = response.status();
    if is_upgrade && status == StatusCode::SWITCHING_PROTOCOLS {
        return Ok(response);
    }
    if !(200..600).contains(&status.as_u16()) {
        let cause = format!("its status is {}", status.as_u16());
        let message = "it answered with a status that is not valid";
        return Err(OriginError::unavailable(message, Some(cause)));
    }
    let fields = response.headers_mut();
    let codings: Vec<_> = fields.get_all(header::TRANSFER_ENCODING).iter().collect();
    match codings[..] {
        [] => {}
        // The length counts for nothing beside it (RFC 9112, 6.3).
        [coding] if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => {
            fields.remove(header::CONTENT_LENGTH);
        }
        _ => {
            let codings: Vec<_> = codings.iter().map(|coding| coding.as_bytes()).collect();
            let codings = codings.join(&b", "[..]);
            let cause = format!(
                "it answered with Transfer-Encoding: {}; only chunked can be passed on",
                String::from_utf8_lossy(&codings)
            );
            let message = "it answered with a transfer coding that is not supported";
            return Err(OriginError::unavailable(message, Some(cause)));
        }
    }
    if status == StatusCode::NO_CONTENT {
        fields.remove(header::CONTENT_LENGTH);
    }
    Ok(response)
}

#[cfg(test)]
mod tests;
