//! The opening handshake of an agent's WebSocket (RFC 6455, 4.2.1).

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tunnel_forward::response::{self, ResponseBody};

use crate::front::response::text;

/// The length of a handshake's key, in bytes.
const KEY_BYTES: usize = 16;

/// Why a request does not become an agent's connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum HandshakeError {
    /// It does not request a WebSocket, or not as the RFC requires.
    NotWebSocket,
    /// A web page asks.
    WebPage,
    /// It presents two credentials.
    SeveralCredentials,
}

/// Checks a handshake, and returns what its answer has in `Sec-WebSocket-Accept`.
pub(crate) fn check<B>(request: &Request<B>) -> Result<HeaderValue, HandshakeError> {
    let is_get = request.method() == Method::GET && request.version() == Version::HTTP_11;
    let headers = request.headers();
    let key = accept_key(headers).filter(|_| is_get && !has_body(headers));
    let key = key.ok_or(HandshakeError::NotWebSocket)?;
    if headers.contains_key(header::ORIGIN) {
        // Only browsers send it: a page that the user visits must not open tunnels on the user's machine.
        return Err(HandshakeError::WebPage);
    }
    if headers.get_all(header::AUTHORIZATION).iter().count() > 1 {
        return Err(HandshakeError::SeveralCredentials);
    }
    Ok(key)
}

/// The answer to a handshake's key; `None` if the request is not a WebSocket handshake.
pub fn accept_key(headers: &HeaderMap) -> Option<HeaderValue> {
    let has = |name, word: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value: &HeaderValue| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|part| part.trim().eq_ignore_ascii_case(word))
    };
    let is_handshake = has(header::UPGRADE, "websocket")
        && has(header::CONNECTION, "upgrade")
        && has(header::SEC_WEBSOCKET_VERSION, "13");
    let mut keys = headers.get_all(header::SEC_WEBSOCKET_KEY).iter();
    let key = keys.next().filter(|_| is_handshake)?;
    let is_key = |key: &HeaderValue| {
        BASE64_STANDARD
            .decode(key)
            .is_ok_and(|key| key.len() == KEY_BYTES)
    };
    if keys.next().is_some() || !is_key(key) {
        return None;
    }
    HeaderValue::from_str(&derive_accept_key(key.as_bytes())).ok()
}

fn has_body(headers: &HeaderMap) -> bool {
    headers.contains_key(header::TRANSFER_ENCODING)
        || headers
            .get(header::CONTENT_LENGTH)
            .is_some_and(|length| length != "0")
}

impl HandshakeError {
    /// A name for those who count.
    pub(crate) fn code(self) -> &'static str {
        match self {
            Self::NotWebSocket => "not_websocket",
            Self::WebPage => "web_page",
            Self::SeveralCredentials => "several_credentials",
        }
    }

    /// The answer to a refused handshake.
    pub(crate) fn into_response(self) -> Response<ResponseBody> {
        match self {
            Self::NotWebSocket => {
                let mut response = text(
                    StatusCode::UPGRADE_REQUIRED,
                    "Agents connect here with a WebSocket.\n",
                );
                let upgrade = HeaderValue::from_static("websocket");
                response.headers_mut().insert(header::UPGRADE, upgrade);
                response
            }
            Self::WebPage => text(StatusCode::FORBIDDEN, "Web pages cannot act as agents.\n"),
            Self::SeveralCredentials => text(
                StatusCode::BAD_REQUEST,
                "Send one Authorization header, not several.\n",
            ),
        }
    }
}

/// The answer to an accepted handshake.
pub(crate) fn switching_protocols(accept_key: HeaderValue) -> Response<ResponseBody> {
    let mut response = Response::new(response::whole(""));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept_key);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handshake() -> http::request::Builder {
        Request::get("/_ws?tunnel_id=x")
            .header("host", "x")
            .header("upgrade", "websocket")
            .header("connection", "keep-alive, Upgrade")
            .header("sec-websocket-version", "13")
    }

    fn outcome(request: http::request::Builder) -> Result<HeaderValue, HandshakeError> {
        check(&request.body(()).expect("a request"))
    }

    #[test]
    fn a_handshake_is_as_the_rfc_wants_it() {
        let key = "dGhlIHNhbXBsZSBub25jZQ==";
        let good = || handshake().header("sec-websocket-key", key);
        assert_eq!(
            outcome(good()),
            Ok(HeaderValue::from_static("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="))
        );
        for (what, request) in [
            ("no key", handshake()),
            ("a short key", handshake().header("sec-websocket-key", "x")),
            ("two keys", good().header("sec-websocket-key", key)),
            ("POST", good().method("POST")),
            ("HTTP/1.0", good().version(Version::HTTP_10)),
            ("a body", good().header("content-length", "5")),
            ("chunks", good().header("transfer-encoding", "chunked")),
            ("another version", {
                Request::get("/_ws")
                    .header("upgrade", "websocket")
                    .header("connection", "upgrade")
                    .header("sec-websocket-version", "12")
                    .header("sec-websocket-key", key)
            }),
        ] {
            assert_eq!(
                outcome(request),
                Err(HandshakeError::NotWebSocket),
                "{what}"
            );
        }
    }

    #[test]
    fn web_pages_and_two_credentials_are_refused() {
        let good = || handshake().header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(
            outcome(good().header("origin", "null")),
            Err(HandshakeError::WebPage)
        );
        assert!(outcome(good().header("authorization", "Bearer a")).is_ok());
        assert_eq!(
            outcome(
                good()
                    .header("authorization", "Bearer a")
                    .header("authorization", "Bearer b")
            ),
            Err(HandshakeError::SeveralCredentials)
        );
    }
}
