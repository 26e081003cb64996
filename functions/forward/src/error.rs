//! What a visitor sees when there is no response from the local service to show.

use std::time::Duration;

use http::{HeaderValue, Response, StatusCode, header};
use tracing::error;
use tunnel_protocol::{
    headers::TUNNEL_ERROR, id::TunnelId, message::AgentErrorCode, visitor_policy::DeniedError,
};
use tunnel_service::{agents::PostError, auth::AuthError, tables::dynamodb::StoreError};

use crate::{
    login::FORM,
    response::{self, ResponseBody},
};

/// `Retry-After` for an offline tunnel: agents reconnect within seconds.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Why a request has no response from the local service. Each has a stable code, in the `X-Tunnel-Error` header and in the body.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The address names no tunnel that exists.
    #[error(
        "There is no tunnel at this address. Check the address, or start the agent with this tunnel id."
    )]
    NoSuchTunnel,
    /// A tunnel's status was requested without a valid token.
    #[error(
        "Only the tunnel's owner can see this. Send the owner's token in a header: Authorization: Bearer TOKEN"
    )]
    NotTheOwner,
    /// The tunnel exists, but no agent is connected.
    #[error(
        "The tunnel exists, but its agent is not connected right now. Try again in a few seconds."
    )]
    Offline,
    /// The tunnel requires a user name and a password, and the visitor has sent none or the wrong ones.
    #[error("This tunnel requires a user name and a password.")]
    Unauthorized(TunnelId),
    /// The visitor policy refuses this visitor.
    #[error("Access denied: {0}.")]
    Forbidden(&'static str),
    /// The tunnel has reached its limit of requests. The next one may come after this time.
    #[error("Too many requests for this tunnel. Try again in {} s.", seconds(*.0))]
    RateLimited(Duration),
    /// The agent returned the request, because another connection serves the tunnel now.
    #[error("The tunnel has just moved to another connection of its agent. Try again.")]
    Moved,
    /// The agent's connection ended before its reply did.
    #[error(
        "The agent's connection ended before it answered. The local service may have seen the request."
    )]
    AgentLost,
    /// The agent accepts no more requests.
    #[error("The agent cannot take more requests right now. Try again in a moment.")]
    AgentBusy,
    /// The agent could not reach the local service, or it broke off.
    #[error("The agent is connected, but the local service did not answer: {0}")]
    LocalUnreachable(String),
    /// The local service, or the way to it, took too long.
    #[error("The local service did not answer in time.")]
    LocalTimeout,
    /// The agent's reply is not a valid response.
    #[error("The agent's reply is not a valid HTTP response: {0}")]
    InvalidReply(String),
    /// A body is over a limit.
    #[error("{0}")]
    TooLarge(String),
    /// The visitor's request is malformed or broke off.
    #[error("The request is not valid: {0}")]
    BadRequest(String),
    /// The request is for a host that is not this service's.
    #[error("{0}")]
    ForeignHost(String),
    /// The visitor's request line and headers are too long.
    #[error("The request was refused: {0}")]
    HeadTooLarge(String),
    /// The request's body is coded in a way that is not undone here.
    #[error("The request was refused: {0}")]
    UnsupportedEncoding(String),
    /// The visitor asked for a WebSocket, or another change of protocol, which cannot be carried here for this reason.
    #[error("WebSockets and other upgraded connections are not carried here: {0}.")]
    NoUpgrade(&'static str),
    /// The service failed; the cause goes to the log.
    #[error("The tunnel service failed. Its log says why.")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl ForwardError {
    /// The status the visitor gets.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::NoSuchTunnel => StatusCode::NOT_FOUND,
            Self::NoUpgrade(_) => StatusCode::NOT_IMPLEMENTED,
            Self::Unauthorized(_) | Self::NotTheOwner => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::RateLimited(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Offline | Self::Moved | Self::AgentBusy => StatusCode::SERVICE_UNAVAILABLE,
            Self::AgentLost | Self::LocalUnreachable(_) | Self::InvalidReply(_) => {
                StatusCode::BAD_GATEWAY
            }
            Self::LocalTimeout => StatusCode::GATEWAY_TIMEOUT,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::ForeignHost(_) => StatusCode::MISDIRECTED_REQUEST,
            Self::HeadTooLarge(_) => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::UnsupportedEncoding(_) => StatusCode::NOT_IMPLEMENTED,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoSuchTunnel => "tunnel_not_found",
            Self::NoUpgrade(_) => "no_upgrade",
            Self::Unauthorized(_) => "visitor_unauthorized",
            Self::Forbidden(_) => "visitor_forbidden",
            Self::RateLimited(_) => "rate_limited",
            Self::NotTheOwner => "unauthorized",
            Self::Offline | Self::Moved => "tunnel_offline",
            Self::AgentLost => "agent_lost",
            Self::AgentBusy => "agent_busy",
            Self::LocalUnreachable(_) => "local_unreachable",
            Self::LocalTimeout => "local_timeout",
            Self::InvalidReply(_) => "invalid_reply",
            Self::TooLarge(_) => "too_large",
            Self::BadRequest(_) => "bad_request",
            Self::ForeignHost(_) => "foreign_host",
            Self::HeadTooLarge(_) => "head_too_large",
            Self::UnsupportedEncoding(_) => "unsupported_encoding",
            Self::Internal(_) => "internal_error",
        }
    }

    /// What the agent's error means to the visitor.
    pub fn of_agent(code: AgentErrorCode, message: String) -> Self {
        match code {
            AgentErrorCode::InvalidRequest => Self::BadRequest(message),
            AgentErrorCode::Timeout => Self::LocalTimeout,
            AgentErrorCode::LocalServiceUnavailable => Self::LocalUnreachable(message),
            AgentErrorCode::ResponseTooLarge => Self::TooLarge(message),
            AgentErrorCode::Busy => Self::AgentBusy,
            AgentErrorCode::Replaced => Self::Moved,
            AgentErrorCode::InternalError => Self::InvalidReply(message),
        }
    }

    /// The answer: a page for browsers, JSON for all others.
    pub fn into_response(self, wants_html: bool) -> Response<ResponseBody> {
        let (status, code, sentence) = (self.status(), self.code(), self.to_string());
        let (content_type, body) = if wants_html {
            let form = match self {
                Self::Unauthorized(_) => FORM,
                _ => "",
            };
            (
                "text/html; charset=utf-8",
                page(status, code, &sentence, form),
            )
        } else {
            (
                "application/json",
                serde_json::json!({ "error": code, "message": sentence }).to_string() + "\n",
            )
        };
        let mut response = Response::new(response::whole(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(TUNNEL_ERROR, HeaderValue::from_static(code));
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        match self {
            Self::RateLimited(pause) => {
                headers.insert(header::RETRY_AFTER, seconds(pause).into());
            }
            // Named after the tunnel, so that a browser does not send its password to others of the same host.
            Self::Unauthorized(tunnel) => {
                let challenge = format!("Basic realm=\"{tunnel}\", charset=\"UTF-8\"");
                headers.extend(
                    HeaderValue::from_str(&challenge)
                        .map(|value| (header::WWW_AUTHENTICATE, value)),
                );
            }
            Self::NotTheOwner => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ if status == StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, RETRY_AFTER.as_secs().into());
            }
            _ => {}
        }
        response
    }
}

/// Whole seconds, at least one: what `Retry-After` can say.
fn seconds(pause: Duration) -> u64 {
    pause
        .as_millis()
        .div_ceil(1000)
        .try_into()
        .unwrap_or(u64::MAX)
        .max(1)
}

fn page(status: StatusCode, code: &str, sentence: &str, form: &str) -> String {
    let escaped = sentence
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{status}</title>\n<style>body{{font:1rem/1.5 system-ui;margin:15vh auto;max-width:34rem;padding:0 1rem}}</style>\n\
         <h1>{status}</h1>\n<p>{escaped}</p>\n{form}<p><code>{code}</code></p>\n</html>\n"
    )
}

impl ForwardError {
    /// The error for a visitor whom the policy of `tunnel` refuses.
    pub fn of_denied(denied: DeniedError, tunnel: &TunnelId) -> Self {
        match denied {
            DeniedError::Unauthorized => Self::Unauthorized(tunnel.clone()),
            DeniedError::Address => {
                Self::Forbidden("your IP address is not allowed by this tunnel")
            }
            DeniedError::Field => Self::Forbidden("a required header is missing or wrong"),
        }
    }
}

impl From<StoreError> for ForwardError {
    fn from(error: StoreError) -> Self {
        Self::Internal(Box::new(error))
    }
}

impl From<AuthError> for ForwardError {
    fn from(error: AuthError) -> Self {
        Self::Internal(Box::new(error))
    }
}

impl ForwardError {
    /// Logs what the visitor is not shown.
    pub(crate) fn log_cause(&self) {
        if let Self::Internal(cause) = self {
            error!(error = &**cause as &dyn std::error::Error, "request failed");
        }
    }

    /// What it means to a request that its first message could not be posted: nothing came of it, unless that is not known.
    pub(crate) fn before_start(error: PostError) -> Self {
        match error {
            PostError::Gone => Self::Offline,
            PostError::Unknown => Self::AgentLost,
            PostError::Busy => Self::AgentBusy,
            PostError::TooLarge(_) | PostError::Failed { .. } => Self::Internal(Box::new(error)),
        }
    }

    /// What it means to a request that the agent has that a later message could not be posted. The local service may have acted
    /// on it, so the visitor must not be asked to try again.
    pub(crate) fn after_start(error: PostError) -> Self {
        match error {
            PostError::Gone | PostError::Unknown => Self::AgentLost,
            PostError::Busy => Self::LocalTimeout,
            PostError::TooLarge(_) | PostError::Failed { .. } => Self::Internal(Box::new(error)),
        }
    }
}

impl From<PostError> for ForwardError {
    fn from(error: PostError) -> Self {
        Self::Internal(Box::new(error))
    }
}
