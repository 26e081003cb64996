//! What the inspector answers with.

use std::convert::Infallible;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use serde_json::{Value, json};

/// The body of an answer.
pub(crate) type ReplyBody = UnsyncBoxBody<Bytes, Infallible>;

/// An answer.
pub(crate) type Reply = Response<ReplyBody>;

/// A request that is refused.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    /// Stable, for scripts.
    pub code: &'static str,
    /// What is wrong, and what to do.
    pub message: &'static str,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: &'static str) -> Self {
        Self {
            status,
            code,
            message,
        }
    }

    pub(crate) fn reply(self) -> Reply {
        let mut reply = json(&json!({
            "status_code": self.status.as_u16(),
            "code": self.code,
            "msg": self.message,
        }));
        *reply.status_mut() = self.status;
        reply
    }
}

pub(crate) fn json(value: &Value) -> Reply {
    bytes("application/json", value.to_string().into())
}

pub(crate) fn bytes(content_type: &'static str, bytes: Bytes) -> Reply {
    with_body(content_type, Full::new(bytes).boxed_unsync())
}

pub(crate) fn with_body(content_type: &'static str, body: ReplyBody) -> Reply {
    let mut reply = Response::new(body);
    reply
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply
}

pub(crate) fn no_content() -> Reply {
    let mut reply = Response::new(Empty::new().boxed_unsync());
    *reply.status_mut() = StatusCode::NO_CONTENT;
    reply
}
