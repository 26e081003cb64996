//! The fronts for visitors: an HTTP API with payload 2.0, and a function URL with streamed responses.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, request},
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use tunnel_protocol::{
    headers::{text_to_value, value_to_text},
    limits::{HTTP_API_TIMEOUT, LAMBDA_TIMEOUT, MAX_HTTP_API_BODY_BYTES, MAX_LAMBDA_PAYLOAD_BYTES},
};

use crate::{
    lambda::{Lambda, Outcome},
    latency::{self, Latency},
    meter::Meter,
};

/// The function that serves visitors.
const FUNCTION: &str = "tunnel-forward";
/// What the HTTP API counts as one call, in bytes.
pub const CALL: usize = 512 * 1024;
/// What separates the prelude of a streamed response from its body.
const PRELUDE_END: [u8; 8] = [0; 8];

/// What both fronts need.
#[derive(Clone)]
pub struct Fronts {
    /// Where the function runs.
    pub lambda: Arc<Lambda>,
    /// How long the HTTP API takes.
    pub latency: Latency,
    /// Where requests are counted.
    pub meter: Meter,
}

/// The HTTP API.
pub fn http_api(fronts: Fronts) -> Router {
    Router::new().fallback(serve_http_api).with_state(fronts)
}

/// The function URL.
pub fn function_url(fronts: Fronts) -> Router {
    Router::new()
        .fallback(serve_function_url)
        .with_state(fronts)
}

/// A complete response, or the prelude of a streamed one.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    status_code: u16,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    #[serde(default)]
    cookies: Vec<String>,
    #[serde(default)]
    body: String,
    #[serde(default)]
    is_base64_encoded: bool,
}

impl Answer {
    fn into_response(self, body: Body) -> Response {
        let mut response = Response::new(body);
        *response.status_mut() =
            StatusCode::from_u16(self.status_code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let cookies = self
            .cookies
            .into_iter()
            .map(|cookie| (header::SET_COOKIE.to_string(), cookie));
        for (name, value) in self.headers.into_iter().chain(cookies) {
            if let (Ok(name), Some(value)) = (name.parse::<HeaderName>(), text_to_value(&value)) {
                response.headers_mut().append(name, value);
            }
        }
        response
    }
}

async fn serve_http_api(State(fronts): State<Fronts>, request: Request) -> Response {
    let _under_way = fronts.meter.begin();
    fronts.latency.pause(latency::HTTP_API).await;
    let (head, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, MAX_HTTP_API_BODY_BYTES).await else {
        return say(StatusCode::PAYLOAD_TOO_LARGE, "Request Entity Too Large");
    };
    let asked = body.len();
    let event = event(include_str!("../../events/http-v2.json"), &head, &body);
    let outcome = fronts
        .lambda
        .invoke(FUNCTION, &event, HTTP_API_TIMEOUT)
        .await;
    let answer = match outcome {
        Outcome::Whole(answer) => {
            serde_json::from_slice::<Answer>(&answer).map_err(|error| error.to_string())
        }
        Outcome::Stream(_) => Err("an HTTP API does not accept a stream".to_owned()),
        Outcome::Failed(why) => Err(why),
    };
    fronts.latency.pause(latency::HTTP_API).await;
    let Ok(mut answer) = answer else {
        return say(StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error");
    };
    let text = std::mem::take(&mut answer.body);
    let body: Bytes = if answer.is_base64_encoded {
        BASE64_STANDARD.decode(text).unwrap_or_default().into()
    } else {
        text.into()
    };
    fronts
        .meter
        .count(|counts| counts.http_calls += (asked + body.len()).div_ceil(CALL).max(1) as u64);
    answer.into_response(body.into())
}

async fn serve_function_url(State(fronts): State<Fronts>, request: Request) -> Response {
    let under_way = fronts.meter.begin();
    let (head, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, MAX_LAMBDA_PAYLOAD_BYTES).await else {
        return say(StatusCode::PAYLOAD_TOO_LARGE, "Request Entity Too Large");
    };
    fronts.meter.count(|counts| counts.url_requests += 1);
    let event = event(include_str!("../../events/url.json"), &head, &body);
    let Outcome::Stream(mut chunks) = fronts.lambda.invoke(FUNCTION, &event, LAMBDA_TIMEOUT).await
    else {
        return say(StatusCode::BAD_GATEWAY, "Internal Server Error");
    };
    let mut start = BytesMut::new();
    let end = loop {
        if let Some(end) = start
            .windows(PRELUDE_END.len())
            .position(|bytes| bytes == PRELUDE_END)
        {
            break end;
        }
        let Some(Ok(chunk)) = chunks.recv().await else {
            return say(StatusCode::BAD_GATEWAY, "Internal Server Error");
        };
        start.extend_from_slice(&chunk);
    };
    let Ok(answer) = serde_json::from_slice::<Answer>(&start[..end]) else {
        return say(StatusCode::BAD_GATEWAY, "Internal Server Error");
    };
    let first = start.split_off(end + PRELUDE_END.len()).freeze();
    let rest = stream::unfold(
        (Some(first), chunks, under_way),
        |(first, mut chunks, under_way)| async move {
            let chunk = match first {
                Some(first) => Ok(first),
                None => chunks.recv().await?,
            };
            if chunk.is_err() {
                // hyper drops what it has not written when a body fails. It writes once the body has nothing more for now.
                tokio::task::yield_now().await;
            }
            Some((chunk, (None, chunks, under_way)))
        },
    );
    answer.into_response(Body::from_stream(rest))
}

fn say(status: StatusCode, message: &str) -> Response {
    (
        status,
        [(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        )],
        json!({ "message": message }).to_string(),
    )
        .into_response()
}

/// The sample event, filled in from this request.
fn event(sample: &str, head: &request::Parts, body: &[u8]) -> Value {
    let mut event: Value = serde_json::from_str(sample).expect("the sample is JSON");
    let (path, query) = (head.uri.path(), head.uri.query().unwrap_or_default());
    event["rawPath"] = json!(path);
    event["rawQueryString"] = json!(query);
    event["headers"] = fields(&head.headers);
    event["requestContext"]["http"]["path"] = json!(path);
    event["requestContext"]["http"]["method"] = json!(head.method.as_str());
    if !body.is_empty() {
        event["body"] = json!(BASE64_STANDARD.encode(body));
        event["isBase64Encoded"] = json!(true);
    }
    if let Some(event) = event.as_object_mut() {
        // The measurements here need neither.
        event.remove("cookies");
        event.remove("queryStringParameters");
    }
    event
}

fn fields(headers: &HeaderMap) -> Value {
    let mut fields: BTreeMap<&str, String> = BTreeMap::new();
    for name in headers
        .keys()
        .filter(|name| !matches!(name.as_str(), "connection" | "transfer-encoding"))
    {
        let values: Vec<String> = headers
            .get_all(name)
            .iter()
            .map(|value| value_to_text(value).into_owned())
            .collect();
        fields.insert(name.as_str(), values.join(","));
    }
    for (name, value) in [
        ("x-forwarded-for", "203.0.113.9"),
        ("x-forwarded-port", "443"),
        ("x-forwarded-proto", "https"),
    ] {
        fields.insert(name, value.to_owned());
    }
    fields.insert(
        "x-amzn-trace-id",
        "Root=1-6968ba25-89abcdef0123456789abcdef".to_owned(),
    );
    json!(fields)
}
