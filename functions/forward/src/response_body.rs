//! A reply on its way to the visitor: its head, and a body that is requested from the agent as the visitor reads it.

use bytes::Bytes;
use futures_util::{Stream, stream};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::task::yield_now;
use tracing::{Instrument, Span};
use tunnel_protocol::{body::ReceivedChunk, headers, headers::TUNNEL_ERROR, upgrade};
use tunnel_service::replies::ReplyHead;

use crate::{
    error::ForwardError,
    exchange::Exchange,
    request_log::RequestLog,
    response::{ResponseBody, ResponseBodyError},
};

/// A reply that has begun.
pub(crate) struct Replying {
    exchange: Exchange,
    status: StatusCode,
    fields: HeaderMap,
    length: Option<u64>,
    first: ReceivedChunk,
    has_body: bool,
}

impl Replying {
    /// A reply to a request of `method` with this head and these first bytes of its body.
    ///
    /// # Errors
    /// If it is not a valid response.
    pub(crate) fn new(
        exchange: Exchange,
        head: ReplyHead,
        first: ReceivedChunk,
        method: &Method,
        log: &mut RequestLog,
    ) -> Result<Self, ForwardError> {
        let invalid = |why: &str| ForwardError::InvalidReply(why.to_owned());
        let status = StatusCode::from_u16(head.status_code)
            .ok()
            .filter(|status| (200..600).contains(&status.as_u16()))
            .ok_or_else(|| invalid("its status is not between 200 and 599"))?;
        log.replied(head.status_code);
        let fields = response_fields(status, head.headers);
        let has_body = *method != Method::HEAD
            && status != StatusCode::NO_CONTENT
            && status != StatusCode::NOT_MODIFIED;
        let length = content_length(&fields).filter(|_| has_body);
        let received = first.bytes.len() as u64;
        if length.is_some_and(|length| received > length || (!first.more && received < length)) {
            return Err(invalid("its body does not have the length that it states"));
        }
        Ok(Self {
            exchange,
            status,
            fields,
            length,
            first,
            has_body,
        })
    }

    /// A reply that changes the protocol: what the local service sends then is the body, which has no length and no end of its own.
    pub(crate) fn upgraded(
        exchange: Exchange,
        head: ReplyHead,
        first: ReceivedChunk,
        log: &mut RequestLog,
    ) -> Self {
        log.replied(head.status_code);
        let mut fields = head.headers;
        let protocol = fields.remove(header::UPGRADE);
        headers::remove_hop_by_hop(&mut fields);
        fields.remove(TUNNEL_ERROR);
        fields.remove(header::CONTENT_LENGTH);
        upgrade::set(
            &mut fields,
            protocol.unwrap_or(HeaderValue::from_static("websocket")),
        );
        Self {
            exchange,
            status: StatusCode::SWITCHING_PROTOCOLS,
            fields,
            length: None,
            first,
            has_body: true,
        }
    }

    /// The response, which reports to `log` how it ends.
    pub(crate) fn into_response(self, mut log: RequestLog) -> Response<ResponseBody> {
        let body = if self.has_body && self.first.more {
            let body = Body {
                exchange: self.exchange,
                log,
                left: self.length,
                span: Span::current(),
            };
            StreamBody::new(body.into_stream(self.first)).boxed_unsync()
        } else {
            log.received(self.first.bytes.len());
            log.completed();
            if !self.first.more {
                self.exchange.complete();
            }
            // Otherwise it is dropped here: the agent is not to send a body that nothing may carry.
            let bytes = if self.has_body {
                self.first.bytes
            } else {
                Bytes::new()
            };
            crate::response::whole(bytes)
        };
        let mut response = Response::new(body);
        *response.status_mut() = self.status;
        *response.headers_mut() = self.fields;
        response
    }
}

/// A body that is not complete yet.
struct Body {
    exchange: Exchange,
    log: RequestLog,
    /// How many bytes are still to come, where the head says so.
    left: Option<u64>,
    span: Span,
}

/// What comes next of a [`Body`].
enum Next {
    Chunk(Body, ReceivedChunk),
    Part(Body),
    Broken(Body, ForwardError),
    End,
}

impl Body {
    /// The body as a stream: each part is requested when the one before it has been read.
    fn into_stream(
        self,
        first: ReceivedChunk,
    ) -> impl Stream<Item = Result<Frame<Bytes>, ResponseBodyError>> + Send {
        stream::unfold(Next::Chunk(self, first), async |next| match next {
            Next::Chunk(body, chunk) => body.give(chunk).await,
            Next::Part(mut body) => {
                let span = body.span.clone();
                match body.exchange.next().instrument(span).await {
                    Ok(chunk) => body.give(chunk).await,
                    Err(error) => body.break_off(error).await,
                }
            }
            Next::Broken(body, error) => body.break_off(error).await,
            Next::End => None,
        })
    }

    async fn give(
        mut self,
        chunk: ReceivedChunk,
    ) -> Option<(Result<Frame<Bytes>, ResponseBodyError>, Next)> {
        let wrong_length = || {
            ForwardError::InvalidReply(
                "its body does not have the length that it states".to_owned(),
            )
        };
        if let Some(left) = self.left {
            let Some(rest) = left.checked_sub(chunk.bytes.len() as u64) else {
                return self.break_off(wrong_length()).await;
            };
            self.left = Some(rest);
        }
        self.log.received(chunk.bytes.len());
        let _entered = self.span.clone().entered();
        if let Some(parts) = chunk.window {
            self.exchange.allow(parts);
        }
        let next = if chunk.more {
            Next::Part(self)
        } else if self.left.is_some_and(|left| left > 0) {
            Next::Broken(self, wrong_length())
        } else {
            self.log.completed();
            self.exchange.complete();
            Next::End
        };
        Some((Ok(Frame::data(chunk.bytes)), next))
    }

    /// Ends the body with an error. What was given out before reaches the visitor first: a server sends what it has when there is
    /// nothing more for a moment, and drops it when there is an error.
    async fn break_off(
        mut self,
        error: ForwardError,
    ) -> Option<(Result<Frame<Bytes>, ResponseBodyError>, Next)> {
        yield_now().await;
        self.log.refused(&error);
        Some((Err(error.into()), Next::End))
    }
}

/// The fields that the visitor gets: those of the local service, without those that only the tunnel may send.
fn response_fields(status: StatusCode, mut fields: HeaderMap) -> HeaderMap {
    // RFC 9112, 6.3: it overrides the length. RFC 9110, 8.6: these statuses have none.
    let has_no_length = fields.contains_key(header::TRANSFER_ENCODING)
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    headers::remove_hop_by_hop(&mut fields);
    fields.remove(TUNNEL_ERROR);
    if has_no_length || content_length(&fields).is_none() {
        fields.remove(header::CONTENT_LENGTH);
    }
    fields
}

/// The length that the fields state, if they state one: digits, once (RFC 9110, 8.6).
fn content_length(fields: &HeaderMap) -> Option<u64> {
    let mut lengths = fields.get_all(header::CONTENT_LENGTH).iter();
    let length = lengths.next()?.to_str().ok()?;
    let is_number = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
    if lengths.next().is_some() || !is_number {
        return None;
    }
    length.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines
            .iter()
            .map(|&(name, value)| {
                (
                    name.parse().expect("a name"),
                    value.parse().expect("a value"),
                )
            })
            .collect()
    }

    #[test]
    fn a_length_is_passed_on_only_where_it_is_one_and_may_be_there() {
        for (status, lines, expected) in [
            (200, &[("content-length", "5")][..], Some(5)),
            (200, &[("content-length", "0")], Some(0)),
            (200, &[("content-length", "+5")], None),
            (200, &[("content-length", "-5")], None),
            (200, &[("content-length", " 5")], None),
            (200, &[("content-length", "")], None),
            (200, &[("content-length", "0x5")], None),
            (200, &[("content-length", "99999999999999999999")], None),
            (200, &[("content-length", "5, 5")], None),
            (
                200,
                &[("content-length", "5"), ("content-length", "5")],
                None,
            ),
            (
                200,
                &[("content-length", "5"), ("transfer-encoding", "chunked")],
                None,
            ),
            (204, &[("content-length", "5")], None),
            (304, &[("content-length", "5")], None),
            (404, &[("content-length", "5")], Some(5)),
        ] {
            let status = StatusCode::from_u16(status).expect("a status");
            let fields = response_fields(status, fields(lines));
            assert_eq!(content_length(&fields), expected, "{status} {lines:?}");
            assert_eq!(
                fields.len(),
                usize::from(expected.is_some()),
                "{status} {lines:?}"
            );
        }
    }

    #[test]
    fn the_local_service_cannot_impersonate_the_tunnel_or_describe_its_own_connection() {
        let kept = response_fields(
            StatusCode::OK,
            fields(&[
                ("x-tunnel-error", "tunnel_offline"),
                ("connection", "x-hop"),
                ("x-hop", "1"),
                ("upgrade", "h2"),
                ("x-kept", "1"),
            ]),
        );
        assert_eq!(kept, fields(&[("x-kept", "1")]));
    }
}
