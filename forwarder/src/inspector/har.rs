//! Exchanges as HAR 1.2, which browsers' developer tools and many others read.

use std::{borrow::Cow, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, header};
use humantime::format_rfc3339_millis;
use serde_json::{Value, json};
use tunnel_protocol::headers::value_to_text;

use super::{
    decode::decode,
    json::field_name,
    masking::Masking,
    recorded::{RecordedBody, RecordedExchange, RecordedResponse},
    websocket::{MessageKind, Side},
};

/// What stands before the entries of a file, which are separated by commas.
pub(crate) fn prefix() -> String {
    let creator = json!({ "name": "ttf", "version": env!("CARGO_PKG_VERSION") });
    format!("{{\"log\":{{\"version\":\"1.2\",\"creator\":{creator},\"entries\":[")
}

/// What stands after them.
pub(crate) const SUFFIX: &str = "]}}";

/// An exchange as an entry. `origin` is the tunnel's public address.
pub(crate) fn entry(exchange: &RecordedExchange, masking: &Masking, origin: &str) -> Value {
    let request = &exchange.request;
    let query: Vec<_> = request
        .uri
        .split_once('?')
        .map(|(_, query)| form_urlencoded::parse(query.as_bytes()))
        .into_iter()
        .flatten()
        .map(|(name, value)| json!({ "name": name, "value": value }))
        .collect();
    let request_headers = request.headers.unpack();
    let timings = &exchange.timings;
    let wait = timings.head.or(timings.end).unwrap_or_default();
    let end = timings.end.unwrap_or(wait);
    let mut entry = json!({
        "startedDateTime": format_rfc3339_millis(exchange.started).to_string(),
        "time": millis(end),
        "request": {
            "method": request.method,
            "url": format!("{}{}", origin.trim_end_matches('/'), request.uri),
            "httpVersion": "HTTP/1.1",
            "cookies": [],
            "headers": fields(&request_headers, masking),
            "queryString": query,
            "headersSize": -1,
            "bodySize": request.body.bytes,
        },
        "response": response(exchange.response.as_ref(), masking),
        "cache": {},
        "timings": {
            "send": 0,
            "wait": millis(wait),
            "receive": millis(end.saturating_sub(wait)),
        },
        "_id": exchange.id,
        "_tunnel": &*exchange.tunnel,
        "_state": exchange.state.name(),
    });
    if request.body.kept_bytes() > 0 {
        entry["request"]["postData"] = post_data(&request_headers, &request.body);
    }
    if let Some(visitor) = exchange.visitor() {
        entry["_visitor"] = visitor.into();
    }
    if let Some(reason) = exchange.state.reason() {
        entry["_error"] = reason.into();
    }
    if let Some(messages) = web_socket_messages(exchange) {
        entry["_webSocketMessages"] = messages;
    }
    entry
}

fn response(response: Option<&RecordedResponse>, masking: &Masking) -> Value {
    let Some(response) = response else {
        // Where there is no response, browsers write this.
        return json!({
            "status": 0,
            "statusText": "",
            "httpVersion": "HTTP/1.1",
            "cookies": [],
            "headers": [],
            "content": { "size": 0, "mimeType": "x-unknown" },
            "redirectURL": "",
            "headersSize": -1,
            "bodySize": -1,
        });
    };
    let headers = response.headers.unpack();
    let location = headers.get(header::LOCATION).map(value_to_text);
    json!({
        "status": response.status.as_u16(),
        "statusText": response.status.canonical_reason().unwrap_or_default(),
        "httpVersion": "HTTP/1.1",
        "cookies": [],
        "headers": fields(&headers, masking),
        "content": content(&headers, &response.body),
        "redirectURL": location.unwrap_or_default(),
        "headersSize": -1,
        "bodySize": response.body.bytes,
    })
}

fn fields(headers: &HeaderMap, masking: &Masking) -> Vec<Value> {
    headers
        .iter()
        .map(|(name, value)| {
            json!({ "name": field_name(name.as_str()), "value": masking.show(name, value) })
        })
        .collect()
}

fn mime_type(headers: &HeaderMap) -> Cow<'_, str> {
    headers
        .get(header::CONTENT_TYPE)
        .map_or("application/octet-stream".into(), value_to_text)
}

/// HAR has bodies without their content codings.
fn content(headers: &HeaderMap, body: &RecordedBody) -> Value {
    let decoded = decode(headers, &body.kept());
    let mut content = json!({ "size": decoded.bytes.len(), "mimeType": mime_type(headers) });
    if body.is_cut() {
        content["comment"] = cut(body).into();
    }
    match String::from_utf8(decoded.bytes) {
        Ok(text) => content["text"] = text.into(),
        Err(error) => {
            content["text"] = BASE64_STANDARD.encode(error.as_bytes()).into();
            content["encoding"] = "base64".into();
        }
    }
    content
}

/// HAR 1.2 has no place for bytes in a request: those that are no text are in Base64, which `_encoding` says.
fn post_data(headers: &HeaderMap, body: &RecordedBody) -> Value {
    let mut data = json!({ "mimeType": mime_type(headers) });
    let kept = body.kept();
    match std::str::from_utf8(&kept) {
        Ok(text) => data["text"] = text.into(),
        Err(_) => {
            data["text"] = BASE64_STANDARD.encode(&kept).into();
            data["_encoding"] = "base64".into();
        }
    }
    if body.is_cut() {
        data["comment"] = cut(body).into();
    }
    data
}

fn cut(body: &RecordedBody) -> String {
    format!(
        "only the first {} of {} bytes were kept",
        body.kept_bytes(),
        body.bytes
    )
}

/// As Chromium writes them.
fn web_socket_messages(exchange: &RecordedExchange) -> Option<Value> {
    let conversation = exchange.conversation.as_ref()?;
    let started = exchange
        .started
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    let messages = conversation.messages().filter_map(|message| {
        let (opcode, data) = match message.kind {
            MessageKind::Text => (1, String::from_utf8_lossy(&message.kept).into_owned()),
            MessageKind::Binary => (2, BASE64_STANDARD.encode(&message.kept)),
            MessageKind::Close | MessageKind::Ping | MessageKind::Pong => return None,
        };
        Some(json!({
            "type": match message.side { Side::Visitor => "send", Side::LocalService => "receive" },
            "time": (started + message.at).as_secs_f64(),
            "opcode": opcode,
            "data": data,
        }))
    });
    Some(messages.collect())
}

fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1_000_000.0).round() / 1000.0
}
