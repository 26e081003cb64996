//! A visitor's request as a front received it.

use std::time::Duration;

use aws_lambda_events::apigw::{
    ApiGatewayProxyRequest, ApiGatewayV2httpRequest, ApiGatewayWebsocketProxyRequest,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Version, header, request};
use http_body::Body as _;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use lambda_http::request::LambdaRequest;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tunnel_protocol::{
    headers::{FORWARDED_PROTO, text_to_value},
    id::ConnectionId,
    limits::{HTTP_API_TIMEOUT, STREAM_TIMEOUT, WEBSOCKET_INTEGRATION_TIMEOUT},
    upgrade,
};
use tunnel_service::{
    aws::route_event::{RouteEventError, connection_of},
    routing::{PublicUrl, encode_decoded_path, encode_path, encode_query},
};

use crate::{error::ForwardError, login::LoginCookie};

/// What a visitor sends, as it arrives.
pub type VisitorBody = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// How much earlier than its front gives up a request does, so that the visitor gets our answer and not the front's.
pub(crate) const ANSWER_MARGIN: Duration = Duration::from_secs(1);

/// The part of a host name by which function URLs are known: `<id>.lambda-url.<region>.on.aws`.
const FUNCTION_URL: &str = ".lambda-url.";

/// What a query's key or value may hold as it is: RFC 3986's unreserved characters.
const NOT_IN_QUERY: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Where a request arrived, which decides how it is answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ingress {
    /// An HTTP API: takes whole answers only, and gives up after [`HTTP_API_TIMEOUT`].
    HttpApi(Payload),
    /// A function URL in RESPONSE_STREAM mode, or `local`: takes answers as they come.
    Streaming,
    /// The visitors' WebSocket API: takes the status of an answer, and the subprotocol.
    WebSocketApi,
}

/// The payload format version of an HTTP API's integration.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Payload {
    /// 1.0
    V1,
    /// 2.0
    V2,
}

impl Ingress {
    /// How long a visitor can be made to wait for the response to start.
    fn response_timeout(self) -> Duration {
        match self {
            Self::HttpApi(_) => HTTP_API_TIMEOUT - ANSWER_MARGIN,
            Self::Streaming => STREAM_TIMEOUT - ANSWER_MARGIN,
            // The accepted handshake is recorded after the reply.
            Self::WebSocketApi => WEBSOCKET_INTEGRATION_TIMEOUT - 4 * ANSWER_MARGIN,
        }
    }
}

/// A visitor's request.
#[derive(Debug)]
pub struct VisitorRequest {
    /// Where it came in.
    pub ingress: Ingress,
    /// How long the visitor can be made to wait for the response to start.
    pub response_timeout: Duration,
    /// The method as sent.
    pub method: Method,
    /// The scheme the visitor used.
    pub scheme: String,
    /// The host the visitor used, with its port if it named one.
    pub host: String,
    /// The percent-encoded path.
    pub path: String,
    /// The query as sent, without `?`; none when there was no `?`.
    pub query: Option<String>,
    /// All header fields as the front gave them.
    pub headers: HeaderMap,
    /// The protocols the visitor asks to change to; see [`upgrade`].
    pub upgrade: Option<HeaderValue>,
    /// The visitor's connection, where a WebSocket API holds it and messages are carried instead of bytes.
    pub websocket: Option<ConnectionId>,
    /// What a browser has from an earlier login.
    pub(crate) login: LoginCookie,
    /// The visitor's address.
    pub source_ip: String,
    /// The body; what the visitor sends after the change of protocol, if there is one.
    pub body: VisitorBody,
}

/// The event is not from an HTTP API or function URL, or is malformed: a fault of the deployment.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// Another kind of event.
    #[error("not an event of an HTTP API or a function URL")]
    Kind,
    /// An event of a WebSocket API that is no handshake.
    #[error(transparent)]
    Handshake(#[from] RouteEventError),
    /// A body that claims to be base64 and is not.
    #[error("the body is marked as base64 but is not valid base64")]
    Body(#[from] base64::DecodeError),
}

/// Where a request comes from, as the front that received it knows.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RequestSource {
    /// The visitor's IP address.
    pub address: String,
    /// The scheme the visitor used.
    pub scheme: String,
    /// The host the visitor used, with its port if it named one.
    pub host: String,
}

impl VisitorRequest {
    /// A request that arrived over a connection, for fronts that stream responses.
    pub fn from_http(head: request::Parts, body: VisitorBody, source: RequestSource) -> Self {
        // A body would come before the change of protocol, and is not carried then. RFC 9110, 7.8: who cannot change it goes on.
        let may_upgrade = head.version == Version::HTTP_11 && body.is_end_stream();
        let upgrade = upgrade::requested(&head.headers).filter(|_| may_upgrade);
        Self {
            ingress: Ingress::Streaming,
            response_timeout: Ingress::Streaming.response_timeout(),
            method: head.method,
            scheme: source.scheme,
            host: source.host,
            path: encode_path(head.uri.path()).into_owned(),
            query: head.uri.query().map(str::to_owned),
            upgrade: upgrade.cloned(),
            websocket: None,
            login: LoginCookie::default(),
            headers: head.headers,
            source_ip: source.address,
            body,
        }
    }

    /// Makes it a request that does not ask for an upgrade, where none can be carried. Only a WebSocket handshake makes no sense
    /// as such.
    ///
    /// # Errors
    /// [`ForwardError::NoUpgrade`] for a WebSocket.
    pub(crate) fn without_upgrade(&mut self, why: &'static str) -> Result<(), ForwardError> {
        match self.upgrade.take() {
            Some(protocol) if protocol.as_bytes().eq_ignore_ascii_case(b"websocket") => {
                Err(ForwardError::NoUpgrade(why))
            }
            Some(_) => {
                self.body = whole(Bytes::new());
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Reads an event: payload format 1.0 or 2.0 of an HTTP API, or that of a function URL. A function URL is known by its host:
    /// AWS's own, or that of `streaming_url`.
    ///
    /// # Errors
    /// If the event is not one of them.
    pub fn from_event(
        event: LambdaRequest,
        streaming_url: Option<&PublicUrl>,
    ) -> Result<Self, EventError> {
        match event {
            LambdaRequest::ApiGatewayV1(event) => Self::from_v1(event),
            LambdaRequest::ApiGatewayV2(event) => Self::from_v2(event, streaming_url),
            _ => Err(EventError::Kind),
        }
    }

    fn from_v2(
        event: ApiGatewayV2httpRequest,
        streaming_url: Option<&PublicUrl>,
    ) -> Result<Self, EventError> {
        let context = event.request_context;
        let is_function_url = context.domain_name.as_deref().is_some_and(|domain| {
            domain.contains(FUNCTION_URL) || streaming_url.is_some_and(|url| url.has_host(domain))
        });
        let mut headers = as_bytes(event.headers);
        if let Some(cookies) = event.cookies.filter(|cookies| !cookies.is_empty())
            && let Some(value) = text_to_value(&cookies.join("; "))
        {
            headers.insert(header::COOKIE, value);
        }
        let path = event.raw_path.unwrap_or_default();
        let ingress = if is_function_url {
            Ingress::Streaming
        } else {
            Ingress::HttpApi(Payload::V2)
        };
        Ok(Self {
            ingress,
            response_timeout: ingress.response_timeout(),
            method: context.http.method,
            scheme: scheme(&headers),
            host: host(&headers, context.domain_name),
            path: if is_function_url {
                encode_path(&path).into_owned()
            } else {
                encode_decoded_path(&path)
            },
            query: event
                .raw_query_string
                .filter(|query| !query.is_empty())
                .map(|query| encode_query(&query).into_owned()),
            upgrade: handshake(&headers),
            websocket: None,
            login: LoginCookie::default(),
            headers,
            source_ip: context.http.source_ip.unwrap_or_default(),
            body: body(event.body, event.is_base64_encoded)?,
        })
    }

    /// A handshake at the visitors' WebSocket API, whose event has neither path nor query: see [`Self::set_target`].
    ///
    /// # Errors
    /// If the event is another one.
    pub(crate) fn from_handshake(
        event: ApiGatewayWebsocketProxyRequest,
    ) -> Result<Self, EventError> {
        let context = event.request_context;
        let connection = connection_of(
            "CONNECT",
            context.event_type.as_deref(),
            context.connection_id.as_deref(),
        )?;
        // Emulators may leave out the fields in which values repeat; API Gateway does not.
        let headers = as_bytes(if event.multi_value_headers.is_empty() {
            event.headers
        } else {
            event.multi_value_headers
        });
        Ok(Self {
            ingress: Ingress::WebSocketApi,
            response_timeout: Ingress::WebSocketApi.response_timeout(),
            method: Method::GET,
            scheme: "https".to_owned(),
            host: host(&headers, context.domain_name),
            path: "/".to_owned(),
            query: None,
            upgrade: Some(HeaderValue::from_static("websocket")),
            websocket: Some(connection),
            login: LoginCookie::default(),
            headers,
            source_ip: context.identity.source_ip.unwrap_or_default(),
            body: whole(Bytes::new()),
        })
    }

    /// Replaces path and query.
    pub(crate) fn set_target(&mut self, target: &str) {
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(encode_query(query).into_owned())),
            None => (target, None),
        };
        self.path = encode_path(path).into_owned();
        self.query = query;
    }

    /// Payload 1.0 has no raw query: it is rebuilt from the decoded one, in which the order of different keys is lost.
    fn from_v1(event: ApiGatewayProxyRequest) -> Result<Self, EventError> {
        let context = event.request_context;
        let mut headers = as_bytes(event.headers);
        for name in event.multi_value_headers.keys() {
            headers.remove(name);
        }
        headers.extend(as_bytes(event.multi_value_headers));
        let escaped = |text| utf8_percent_encode(text, NOT_IN_QUERY);
        let mut pairs: Vec<String> = event
            .multi_value_query_string_parameters
            .iter()
            .map(|(key, value)| format!("{}={}", escaped(key), escaped(value)))
            .collect();
        pairs.sort_by(|a, b| a.split('=').next().cmp(&b.split('=').next()));
        Ok(Self {
            ingress: Ingress::HttpApi(Payload::V1),
            response_timeout: Ingress::HttpApi(Payload::V1).response_timeout(),
            method: event.http_method,
            scheme: scheme(&headers),
            host: host(&headers, context.domain_name),
            path: encode_decoded_path(&event.path.unwrap_or_default()),
            query: (!pairs.is_empty()).then(|| pairs.join("&")),
            upgrade: handshake(&headers),
            websocket: None,
            login: LoginCookie::default(),
            headers,
            source_ip: context.identity.source_ip.unwrap_or_default(),
            body: body(event.body, event.is_base64_encoded)?,
        })
    }

    /// Whether an error page is better than JSON for this visitor.
    pub fn wants_html(&self) -> bool {
        wants_html(&self.headers)
    }
}

/// Whether the sender of these fields prefers a page.
pub fn wants_html(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("text/html"))
}

/// Header values come as text in events and as its UTF-8 in the event types; this gives each character's byte back.
fn as_bytes(headers: HeaderMap) -> HeaderMap {
    let decode = |value: HeaderValue| match std::str::from_utf8(value.as_bytes()) {
        Ok(text) if !text.is_ascii() => text_to_value(text).unwrap_or(value),
        _ => value,
    };
    let mut name = None;
    headers
        .into_iter()
        .filter_map(|(next, value)| {
            name = next.or(name.take());
            Some((name.clone()?, decode(value)))
        })
        .collect()
}

/// The upgrade that a visitor of an HTTP API or function URL asks for. They pass on no `Connection` field.
fn handshake(headers: &HeaderMap) -> Option<HeaderValue> {
    let is_websocket = headers.contains_key(header::SEC_WEBSOCKET_KEY);
    is_websocket.then(|| HeaderValue::from_static("websocket"))
}

fn scheme(headers: &HeaderMap) -> String {
    let proto = headers
        .get(FORWARDED_PROTO)
        .and_then(|value| value.to_str().ok());
    proto
        .filter(|proto| matches!(*proto, "http" | "https"))
        .unwrap_or("https")
        .to_owned()
}

fn host(headers: &HeaderMap, domain_name: Option<String>) -> String {
    let header = headers
        .get(header::HOST)
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned);
    header.or(domain_name).unwrap_or_default()
}

fn body(body: Option<String>, is_base64: bool) -> Result<VisitorBody, EventError> {
    let bytes = match body {
        Some(text) if is_base64 => BASE64_STANDARD.decode(text)?,
        Some(text) => text.into_bytes(),
        None => Vec::new(),
    };
    Ok(whole(bytes.into()))
}

/// A body that is there already.
pub fn whole(bytes: Bytes) -> VisitorBody {
    Full::new(bytes)
        .map_err(|never| match never {})
        .boxed_unsync()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const V1: &str = include_str!("../../../events/http-v1.json");
    const V2: &str = include_str!("../../../events/http-v2.json");
    const FUNCTION_URL_EVENT: &str = include_str!("../../../events/url.json");

    fn read(event: &str, change: impl FnOnce(&mut serde_json::Value)) -> VisitorRequest {
        let mut event = serde_json::from_str(event).expect("JSON");
        change(&mut event);
        let event = serde_json::from_str(&event.to_string()).expect("an event");
        VisitorRequest::from_event(event, None).expect("a request")
    }

    fn values<'r>(request: &'r VisitorRequest, name: &str) -> Vec<&'r [u8]> {
        let values = request.headers.get_all(name);
        values.iter().map(HeaderValue::as_bytes).collect()
    }

    #[test]
    fn a_visitor_waits_a_second_less_than_the_front_does() {
        for (event, seconds) in [(V1, 29), (V2, 29), (FUNCTION_URL_EVENT, 899)] {
            assert_eq!(read(event, |_| {}).response_timeout.as_secs(), seconds);
        }
        let (head, ()) = http::Request::new(()).into_parts();
        let source = RequestSource {
            address: "192.0.2.1".to_owned(),
            scheme: "http".to_owned(),
            host: "x".to_owned(),
        };
        let request = VisitorRequest::from_http(head, whole(Bytes::new()), source);
        assert_eq!(request.response_timeout.as_secs(), 899);
    }

    #[test]
    fn a_websocket_at_an_http_api_or_a_function_url_is_refused_as_such() {
        for event in [V1, V2, FUNCTION_URL_EVENT] {
            let mut request = read(event, |event| {
                let key = "dGhlIHNhbXBsZSBub25jZQ==";
                event["headers"]["sec-websocket-key"] = key.into();
                if let Some(fields) = event.get_mut("multiValueHeaders") {
                    fields["sec-websocket-key"] = json!([key]);
                }
            });
            let refused = request.without_upgrade("not here").expect_err("refused");
            let response = refused.into_response(false);
            assert_eq!(response.status(), http::StatusCode::NOT_IMPLEMENTED);
            assert_eq!(response.headers()["x-tunnel-error"], "no_upgrade");
            assert!(read(event, |_| {}).without_upgrade("not here").is_ok());
        }
    }

    #[test]
    fn the_scheme_is_the_one_that_the_front_says_the_visitor_used() {
        for event in [V1, V2, FUNCTION_URL_EVENT] {
            for (said, scheme) in [
                (json!("http"), "http"),
                (json!("https"), "https"),
                (json!("gopher"), "https"),
                (json!(null), "https"),
            ] {
                let request = read(event, |event| {
                    for fields in ["headers", "multiValueHeaders"] {
                        let fields = event.get_mut(fields).and_then(|it| it.as_object_mut());
                        if let Some(fields) = fields {
                            fields
                                .retain(|name, _| !name.eq_ignore_ascii_case("x-forwarded-proto"));
                        }
                    }
                    if !said.is_null() {
                        event["headers"]["x-forwarded-proto"] = said.clone();
                    }
                });
                assert_eq!(request.scheme, scheme, "{said}");
            }
        }
    }

    #[test]
    fn each_field_of_payload_1_0_is_there_once_with_all_its_values() {
        let request = read(V1, |event| {
            event["headers"]["x-twice"] = json!("2");
            event["multiValueHeaders"]["x-twice"] = json!(["1", "2"]);
            event["headers"]["x-once"] = json!("only");
        });
        assert_eq!(values(&request, "x-twice"), [b"1", b"2"]);
        assert_eq!(values(&request, "x-once"), [b"only"]);
        assert_eq!(values(&request, "cookie"), [b"a=1; b=2"]);
        assert_eq!(values(&request, "host"), [b"tunnel.example.com"]);
    }

    #[test]
    fn the_decoded_query_of_payload_1_0_is_escaped_again() {
        let request = read(V1, |event| {
            event["multiValueQueryStringParameters"] =
                json!({ "q": ["a&b=c", "\u{e9} +"], "k=&": ["1"], "empty": [""] });
        });
        assert_eq!(
            request.query.as_deref(),
            Some("empty=&k%3D%26=1&q=a%26b%3Dc&q=%C3%A9%20%2B")
        );
        let request = read(V1, |event| {
            event["multiValueQueryStringParameters"] = json!(null);
            event["queryStringParameters"] = json!(null);
        });
        assert_eq!(request.query, None);
    }

    #[test]
    fn a_field_that_payload_1_0_lists_twice_is_there_once() {
        let request = read(V1, |event| {
            event["headers"] = json!({ "x-twice": "2", "x-only-here": "3" });
            event["multiValueHeaders"] = json!({ "x-twice": ["1", "2"] });
        });
        assert_eq!(values(&request, "x-twice"), [b"1", b"2"]);
        assert_eq!(values(&request, "x-only-here"), [b"3"]);
    }

    #[test]
    fn cookies_of_payload_2_0_become_one_field_and_other_bytes_than_ascii_stay_what_they_were() {
        let request = read(V2, |event| {
            event["cookies"] = json!(["a=1", "b=\u{e9}"]);
            event["headers"]["x-latin"] = json!("caf\u{e9}");
        });
        assert_eq!(values(&request, "cookie"), [b"a=1; b=\xe9"]);
        assert_eq!(values(&request, "x-latin"), [b"caf\xe9"]);
    }
}
