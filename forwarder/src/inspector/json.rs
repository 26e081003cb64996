//! Exchanges and tunnels as JSON: the shapes of ngrok's agent API, so that scripts written for it work, with more fields.

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, StatusCode, header};
use humantime::format_rfc3339_millis;
use serde_json::{Map, Value, json};
use tunnel_protocol::headers::value_to_text;

use super::{
    masking::Masking,
    metrics::Rates,
    packed_fields::PackedFields,
    recorded::{RecordedBody, RecordedExchange},
    shared::{InspectedTunnel, Shared},
    websocket::{MessageKind, RecordedMessage},
};

/// Where exchanges are in the API.
pub(crate) const REQUESTS: &str = "/api/requests/http";

/// An exchange with its raw bytes, as far as they are kept.
pub(crate) fn exchange(exchange: &RecordedExchange, masking: &Masking) -> Value {
    let mut value = summary(exchange);
    let request = &exchange.request;
    let request_headers = request.headers.unpack();
    value["request"] = json!({
        "method": request.method,
        "proto": "HTTP/1.1",
        "headers": headers(&request_headers, masking),
        "uri": request.uri,
        "raw": raw(
            &format!("{} {} HTTP/1.1", request.method, request.uri),
            &request_headers,
            &request.body,
            masking,
        ),
        "size": request.body.bytes,
        "kept": request.body.kept_bytes(),
        "truncated": request.body.is_cut() && exchange.conversation.is_none(),
    });
    value["response"] = match &exchange.response {
        None => Value::Null,
        Some(response) => {
            let response_headers = response.headers.unpack();
            json!({
                "status": status_line(response.status),
                "status_code": response.status.as_u16(),
                "proto": "HTTP/1.1",
                "headers": headers(&response_headers, masking),
                "raw": raw(
                    &format!("HTTP/1.1 {}", status_line(response.status)),
                    &response_headers,
                    &response.body,
                    masking,
                ),
                "size": response.body.bytes,
                "kept": response.body.kept_bytes(),
                "truncated": response.body.is_cut() && exchange.conversation.is_none(),
            })
        }
    };
    let timings = &exchange.timings;
    value["timings"] = json!({
        "transit": timings.transit.map(nanos),
        "sent": timings.sent.map(nanos),
        "head": timings.head.map(nanos),
        "end": timings.end.map(nanos),
    });
    value["masked"] = masked(exchange, masking).into();
    value["secrets_kept"] = (!exchange.is_masked).into();
    value["messages"] = match &exchange.conversation {
        None => Value::Null,
        Some(conversation) => conversation.messages().map(message).collect(),
    };
    value
}

/// What a list shows of an exchange.
pub(crate) fn summary(exchange: &RecordedExchange) -> Value {
    let request = &exchange.request;
    let response = exchange.response.as_ref();
    let content_type = response
        .and_then(|response| response.headers.last(&header::CONTENT_TYPE))
        .map(|value| value_to_text(&value).into_owned());
    json!({
        "uri": format!("{REQUESTS}/{}", exchange.id),
        "id": exchange.id,
        "tunnel_name": &*exchange.tunnel,
        "remote_addr": exchange.visitor().unwrap_or_default(),
        "start": format_rfc3339_millis(exchange.started).to_string(),
        "duration": exchange.timings.end.map_or(0, nanos),
        "state": exchange.state.name(),
        "error": exchange.state.reason(),
        "upgrade": request.upgrade,
        "replay_of": exchange.replay.as_ref().map(|replay| replay.of),
        "replay_edited": exchange.replay.as_ref().is_some_and(|replay| replay.edited),
        "replay_target": exchange.replay.as_ref().and_then(|replay| replay.target.as_deref()),
        "method": request.method,
        "path": request.uri,
        "status_code": response.map(|response| response.status.as_u16()),
        "content_type": content_type,
        "request_bytes": request.body.bytes,
        "response_bytes": response.map_or(0, |response| response.body.bytes),
        "message_count": exchange.conversation.as_ref().map(|conversation| conversation.count()),
    })
}

fn message(message: &RecordedMessage) -> Value {
    let mut value = json!({
        "number": message.number,
        "at": nanos(message.at),
        "from": message.side.name(),
        "kind": message.kind.name(),
        "size": message.bytes,
        "truncated": (message.kept.len() as u64) < message.bytes,
    });
    let is_text = matches!(message.kind, MessageKind::Text);
    let (key, content) = match message.kind {
        MessageKind::Close => ("text", close_text(&message.kept)),
        _ if is_text => ("text", String::from_utf8_lossy(&message.kept).into_owned()),
        _ => ("base64", BASE64_STANDARD.encode(&message.kept)),
    };
    value[key] = content.into();
    value
}

/// Code and reason of a close frame (RFC 6455, 5.5.1).
fn close_text(payload: &[u8]) -> String {
    match payload {
        [first, second, reason @ ..] => {
            let code = u16::from_be_bytes([*first, *second]);
            format!("{code} {}", String::from_utf8_lossy(reason))
                .trim_end()
                .to_owned()
        }
        _ => String::new(),
    }
}

/// A tunnel that has been online; `None` before.
pub(crate) fn tunnel(tunnel: &InspectedTunnel, shared: &Shared) -> Option<Value> {
    let address = tunnel.address();
    let public_url = address.public_url?;
    let proto = public_url.split(':').next().unwrap_or_default();
    let (rates, open) = shared.metrics.of(tunnel.name()).now();
    Some(json!({
        "name": tunnel.name(),
        "uri": format!("/api/tunnels/{}", tunnel.name()),
        "proto": proto,
        "public_url": public_url,
        "browser_url": address.browser_url,
        "online": address.is_online,
        "config": {
            "addr": tunnel.settings.target.to_string(),
            "inspect": true,
        },
        "metrics": metrics(&rates, open),
    }))
}

/// Each request counts as a connection: what a visitor's connection is only the service knows.
fn metrics(rates: &Rates, open: u64) -> Value {
    let http = json!(rates);
    let mut conns = http.clone();
    conns["gauge"] = open.into();
    json!({ "conns": conns, "http": http })
}

/// Header fields with their names written as usual.
fn headers(headers: &HeaderMap, masking: &Masking) -> Map<String, Value> {
    headers
        .keys()
        .map(|name| {
            let values: Vec<_> = headers
                .get_all(name)
                .iter()
                .map(|value| masking.show(name, value))
                .collect();
            (field_name(name.as_str()), values.into())
        })
        .collect()
}

/// `content-type` as `Content-Type`.
pub(crate) fn field_name(name: &str) -> String {
    let mut starts_word = true;
    name.chars()
        .map(|c| {
            let shown = if starts_word {
                c.to_ascii_uppercase()
            } else {
                c
            };
            starts_word = c == '-';
            shown
        })
        .collect()
}

/// The fields of an exchange whose values are masked.
fn masked(exchange: &RecordedExchange, masking: &Masking) -> Vec<String> {
    let responses = exchange.response.iter().map(|response| &response.headers);
    let headers = responses.chain([&exchange.request.headers]);
    let mut names: Vec<_> = headers
        .map(PackedFields::unpack)
        .flat_map(|headers| headers.keys().cloned().collect::<Vec<_>>())
        .filter(|name| masking.hides(name))
        .map(|name| field_name(name.as_str()))
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn raw(first_line: &str, headers: &HeaderMap, body: &RecordedBody, masking: &Masking) -> String {
    let mut raw = format!("{first_line}\r\n").into_bytes();
    for (name, value) in headers {
        raw.extend_from_slice(field_name(name.as_str()).as_bytes());
        raw.extend_from_slice(b": ");
        if masking.hides(name) {
            raw.extend_from_slice(masking.show(name, value).as_bytes());
        } else {
            raw.extend_from_slice(value.as_bytes());
        }
        raw.extend_from_slice(b"\r\n");
    }
    raw.extend_from_slice(b"\r\n");
    raw.extend_from_slice(&body.kept());
    BASE64_STANDARD.encode(raw)
}

/// `200 OK`.
pub(crate) fn status_line(status: StatusCode) -> String {
    let reason = status.canonical_reason().unwrap_or_default();
    format!("{} {reason}", status.as_u16())
        .trim_end()
        .to_owned()
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
