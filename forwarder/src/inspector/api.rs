//! The inspector's addresses: ngrok's agent API, with a few more. docs/inspector.md lists them.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header, request::Parts};
use http_body::Frame;
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::Incoming;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use tunnel_protocol::headers::value_to_text;

use super::{
    assets::asset,
    decode::decode,
    guard::{Guard, check_json},
    har, json, live,
    recorded::{RecordedBody, RecordedExchange},
    replay::{ReplayRequest, Replays},
    reply::{self, ApiError, Reply, no_content, with_body},
    shared::Shared,
    store::Slot,
};

/// Longest request to the API: an edited body in Base64 with what belongs to it.
const MAX_API_REQUEST_BYTES: usize = 32 * 1024 * 1024;
/// How many exchanges a list has if the request does not say.
const DEFAULT_LIMIT: usize = 50;

/// For a response that is shown as a page: no scripts, and an origin of its own, which shares nothing with the inspector's.
const PREVIEW_POLICY: &str =
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'";

/// Answers requests to the inspector.
pub(crate) struct Api {
    shared: Arc<Shared>,
    guard: Guard,
    replays: Replays,
}

/// A body of an exchange with what tells how to read it.
struct ExchangeBody {
    headers: HeaderMap,
    body: RecordedBody,
}

impl Api {
    pub(crate) fn new(shared: Arc<Shared>, guard: Guard) -> Self {
        Self {
            shared,
            guard,
            replays: Replays::new(),
        }
    }

    /// Answers a request.
    pub(crate) async fn answer(&self, request: Request<Incoming>) -> Reply {
        let mut reply = match self.guard.check(&request) {
            Ok(()) => {
                let routed = self.route(request).await;
                routed.unwrap_or_else(ApiError::reply)
            }
            Err(error) => error.reply(),
        };
        for (name, value) in [
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "no-referrer"),
            (header::CACHE_CONTROL, "no-store"),
            (
                http::HeaderName::from_static("cross-origin-resource-policy"),
                "same-origin",
            ),
            (
                http::HeaderName::from_static("cross-origin-opener-policy"),
                "same-origin",
            ),
        ] {
            reply
                .headers_mut()
                .entry(name)
                .or_insert(HeaderValue::from_static(value));
        }
        reply
            .headers_mut()
            .entry(header::CONTENT_SECURITY_POLICY)
            .or_insert(HeaderValue::from_static(
                "default-src 'none'; frame-ancestors 'none'",
            ));
        reply
    }

    async fn route(&self, request: Request<Incoming>) -> Result<Reply, ApiError> {
        let (head, body) = request.into_parts();
        let path = head.uri.path().to_owned();
        let is_read = matches!(head.method, Method::GET | Method::HEAD);
        let segments: Vec<&str> = path.trim_matches('/').split('/').collect();
        match (&head.method, segments.as_slice()) {
            (&Method::POST, ["api", "requests", "http"]) => {
                let wanted: ReplayRequest = read_json(&head, body).await?;
                self.replay(&wanted)
            }
            (&Method::DELETE, ["api", "requests", "http"]) => {
                self.shared.clear().await;
                Ok(no_content())
            }
            (&Method::POST, ["api", "requests", "http", id, "reveal"]) => {
                let wanted: RevealRequest = read_json(&head, body).await?;
                self.reveal(id, &wanted)
            }
            _ if is_read => self.read(&head, &segments).await,
            _ => Err(ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "tunnels are opened and closed with ttf and its config file; here requests can be read, replayed and deleted",
            )),
        }
    }

    async fn read(&self, head: &Parts, segments: &[&str]) -> Result<Reply, ApiError> {
        match segments {
            ["api"] => Ok(reply::json(&root())),
            ["api", "status"] => Ok(reply::json(&self.status())),
            ["api", "tunnels"] => Ok(reply::json(
                &json!({ "tunnels": self.tunnels(), "uri": "/api/tunnels" }),
            )),
            ["api", "tunnels", name] => {
                let tunnel = self.shared.tunnel(&percent_decode(name));
                let tunnel = tunnel.and_then(|tunnel| json::tunnel(tunnel, &self.shared));
                tunnel
                    .map(|tunnel| reply::json(&tunnel))
                    .ok_or(ApiError::new(
                        StatusCode::NOT_FOUND,
                        "no_such_tunnel",
                        "no tunnel of that name is online",
                    ))
            }
            ["api", "requests", "http"] => Ok(self.list(head)),
            ["api", "requests", "har"] => self.har(head),
            ["api", "requests", "http", id] => {
                let slot = self.slot(id)?;
                Ok(reply::json(&self.exchange(&slot.copy())))
            }
            [
                "api",
                "requests",
                "http",
                id,
                part @ ("request" | "response"),
                "body",
            ] => {
                let body = self.slot(id)?.read(|exchange| body(exchange, part));
                Ok(raw_body(head, body?).await)
            }
            ["api", "requests", "http", id, "response", "preview"] => {
                let body = self.slot(id)?.read(|exchange| body(exchange, "response"));
                Ok(preview(body?).await)
            }
            ["api", "events"] => Ok(live::events(self.shared.clone(), &head.headers)),
            _ => asset(head.uri.path()).ok_or(ApiError::new(
                StatusCode::NOT_FOUND,
                "no_such_path",
                "there is nothing at this path; the page is at / and the API at /api",
            )),
        }
    }

    fn exchange(&self, exchange: &RecordedExchange) -> Value {
        json::exchange(exchange, &self.shared.masking(&exchange.tunnel))
    }

    fn slot(&self, id: &str) -> Result<Arc<Slot>, ApiError> {
        let id = id.parse().ok();
        id.and_then(|id| self.shared.store.get(id))
            .ok_or(ApiError::new(
                StatusCode::NOT_FOUND,
                "no_such_request",
                "the request is not kept any more",
            ))
    }

    fn tunnels(&self) -> Vec<Value> {
        self.shared
            .tunnels
            .iter()
            .filter_map(|tunnel| json::tunnel(tunnel, &self.shared))
            .collect()
    }

    fn status(&self) -> Value {
        let is_online = self
            .shared
            .tunnels
            .iter()
            .all(|tunnel| tunnel.address().is_online);
        json!({
            "status": if is_online { "online" } else { "reconnecting" },
            "agent_version": env!("CARGO_PKG_VERSION"),
            "session": { "legs": [] },
            "uri": "/api/status",
            "requests": {
                "kept": self.shared.store.newest_first().len(),
                "bytes": self.shared.store.held_bytes(),
                "max": self.shared.store.limits().exchanges,
                "max_bytes": self.shared.store.limits().bytes,
                "max_body_bytes": self.shared.store.limits().body_bytes,
            },
        })
    }

    /// The newest exchanges, made into JSON one by one: all of them together would take much more memory than they do.
    fn list(&self, head: &Parts) -> Reply {
        let limit = query(head, "limit").and_then(|limit| limit.parse().ok());
        let mut slots = self.slots_of(query(head, "tunnel_name").as_deref());
        slots.truncate(limit.unwrap_or(DEFAULT_LIMIT));
        let shared = self.shared.clone();
        let prefix = format!("{{\"uri\":\"{}\",\"requests\":[", json::REQUESTS);
        streamed(prefix, slots, "]}", move |exchange| {
            json::exchange(exchange, &shared.masking(&exchange.tunnel))
        })
    }

    /// All exchanges, or the one that the query names, oldest first.
    fn har(&self, head: &Parts) -> Result<Reply, ApiError> {
        let (slots, name) = match query(head, "id") {
            Some(id) => (vec![self.slot(&id)?], format!("request-{id}.har")),
            None => {
                let mut slots = self.slots_of(query(head, "tunnel_name").as_deref());
                slots.reverse();
                (slots, "requests.har".to_owned())
            }
        };
        let shared = self.shared.clone();
        let mut reply = streamed(har::prefix(), slots, har::SUFFIX, move |exchange| {
            let address = shared
                .tunnel(&exchange.tunnel)
                .map(|tunnel| tunnel.address());
            let origin = address.and_then(|address| address.public_url);
            let masking = shared.masking(&exchange.tunnel);
            har::entry(exchange, &masking, &origin.unwrap_or_default())
        });
        let disposition = HeaderValue::try_from(format!("attachment; filename=\"{name}\""));
        if let Ok(disposition) = disposition {
            reply
                .headers_mut()
                .insert(header::CONTENT_DISPOSITION, disposition);
        }
        Ok(reply)
    }

    fn slots_of(&self, tunnel: Option<&str>) -> Vec<Arc<Slot>> {
        let mut slots = self.shared.store.newest_first();
        if let Some(tunnel) = tunnel.filter(|tunnel| !tunnel.is_empty()) {
            slots.retain(|slot| slot.read(|exchange| &*exchange.tunnel == tunnel));
        }
        slots
    }

    fn replay(&self, wanted: &ReplayRequest) -> Result<Reply, ApiError> {
        let replayed = self.replays.start(&self.shared, wanted)?;
        let mut reply = no_content();
        let location = replayed.map(|id| format!("{}/{id}", json::REQUESTS));
        if let Some(location) = location.and_then(|location| location.parse().ok()) {
            reply.headers_mut().insert(header::LOCATION, location);
        }
        Ok(reply)
    }

    fn reveal(&self, id: &str, wanted: &RevealRequest) -> Result<Reply, ApiError> {
        let values = self.slot(id)?.read(|exchange| {
            let headers = match (&*wanted.part, &exchange.response) {
                ("request", _) => Some(exchange.request.headers.unpack()),
                ("response", Some(response)) => Some(response.headers.unpack()),
                _ => None,
            };
            let values = headers
                .as_ref()
                .map(|headers| headers.get_all(wanted.header.as_str()).iter());
            values
                .into_iter()
                .flatten()
                .map(|value| value_to_text(value).into_owned())
                .collect::<Vec<_>>()
        });
        Ok(reply::json(&json!({ "values": values })))
    }
}

/// A field whose secret is to be shown.
#[derive(Debug, serde::Deserialize)]
struct RevealRequest {
    /// `request` or `response`.
    part: String,
    /// The field's name.
    header: String,
}

fn root() -> Value {
    json!({
        "uri": "/api/",
        "tunnels_uri": "/api/tunnels",
        "requests_uri": json::REQUESTS,
        "har_uri": "/api/requests/har",
        "events_uri": "/api/events",
        "status_uri": "/api/status",
    })
}

async fn read_json<T: DeserializeOwned>(head: &Parts, body: Incoming) -> Result<T, ApiError> {
    check_json(&head.headers)?;
    let body = Limited::new(body, MAX_API_REQUEST_BYTES).collect().await;
    let body = body.map_err(|_| {
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "too_large",
            "the request is longer than the API takes",
        )
    })?;
    serde_json::from_slice(&body.to_bytes()).map_err(|_| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            "invalid_json",
            "the request is not the JSON that docs/inspector.md describes",
        )
    })
}

fn query(head: &Parts, name: &str) -> Option<String> {
    form_urlencoded::parse(head.uri.query()?.as_bytes())
        .find(|(key, _)| key == name)
        .map(|(_, value)| value.into_owned())
}

fn percent_decode(segment: &str) -> String {
    // A form's encoding differs in `+` alone.
    let segment = segment.replace('+', "%2B");
    form_urlencoded::parse(segment.as_bytes())
        .next()
        .map(|(name, _)| name.into_owned())
        .unwrap_or_default()
}

fn streamed(
    prefix: String,
    slots: Vec<Arc<Slot>>,
    suffix: &'static str,
    render: impl Fn(&RecordedExchange) -> Value + Send + 'static,
) -> Reply {
    let exchanges = slots.into_iter().enumerate().map(move |(at, slot)| {
        let separator = if at == 0 { "" } else { "," };
        format!("{separator}{}", render(&slot.copy()))
    });
    let text = [prefix].into_iter().chain(exchanges);
    let text = stream::iter(text).chain(stream::iter([suffix.to_owned()]));
    let frames = text.map(|text| Ok::<_, Infallible>(Frame::data(Bytes::from(text))));
    with_body("application/json", StreamBody::new(frames).boxed_unsync())
}

fn body(exchange: &RecordedExchange, part: &str) -> Result<ExchangeBody, ApiError> {
    let (headers, body) = match (part, &exchange.response) {
        ("request", _) => (&exchange.request.headers, &exchange.request.body),
        (_, Some(response)) => (&response.headers, &response.body),
        (_, None) => {
            return Err(ApiError::new(
                StatusCode::NOT_FOUND,
                "no_response",
                "the request has no response",
            ));
        }
    };
    Ok(ExchangeBody {
        headers: headers.unpack(),
        body: body.clone(),
    })
}

/// The bytes of a body. Never as what they claim to be: they are from strangers, and the inspector's origin can replay requests.
async fn raw_body(head: &Parts, body: ExchangeBody) -> Reply {
    let (bytes, fault) = if query(head, "decoded").is_some() {
        decoded(body).await
    } else {
        (body.body.kept().into_owned(), None)
    };
    let mut reply = reply::bytes("application/octet-stream", bytes.into());
    let headers = reply.headers_mut();
    headers.insert(
        header::CONTENT_DISPOSITION,
        HeaderValue::from_static("attachment"),
    );
    if let Some(fault) = fault.and_then(|fault| HeaderValue::try_from(fault).ok()) {
        headers.insert("x-decode-error", fault);
    }
    reply
}

async fn preview(body: ExchangeBody) -> Reply {
    let (bytes, _) = decoded(body).await;
    let mut reply = reply::bytes("text/html; charset=utf-8", bytes.into());
    reply.headers_mut().insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(PREVIEW_POLICY),
    );
    reply
}

/// Decodes a body where nothing else waits for it.
async fn decoded(body: ExchangeBody) -> (Vec<u8>, Option<String>) {
    let decoding = spawn_blocking(move || decode(&body.headers, &body.body.kept()));
    match decoding.await {
        Ok(decoded) => (decoded.bytes, decoded.fault),
        Err(_) => (Vec::new(), Some("it cannot be decoded".to_owned())),
    }
}
