//! Answers in the shape each front takes: the JSON of payload 1.0 and 2.0, or a stream behind a prelude.

use std::collections::BTreeMap;

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use http_body::Body;
use http_body_util::{BodyDataStream, BodyExt, Full, combinators::UnsyncBoxBody};
use lambda_runtime::{MetadataPrelude, StreamResponse};
use serde::Serialize;
use tunnel_protocol::{headers::TUNNEL_ERROR, limits::MAX_LAMBDA_PAYLOAD_BYTES};
use tunnel_service::routing::PublicUrl;

use crate::{error::ForwardError, request::Payload};

/// The body of an answer, as it arrives from the agent.
pub type ResponseBody = UnsyncBoxBody<Bytes, ResponseBodyError>;

/// The body of a streamed answer.
pub type ResponseStream =
    std::pin::Pin<Box<dyn Stream<Item = Result<Bytes, ResponseBodyError>> + Send>>;

/// Why an answer's body broke off.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct ResponseBodyError(#[from] ForwardError);

/// Room in a Lambda payload for the JSON around headers and body.
const ENVELOPE_BYTES: usize = 256;

/// A whole answer, for an HTTP API.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BufferedResponse {
    status_code: u16,
    headers: BTreeMap<String, String>,
    /// Payload 2.0 only: `Set-Cookie` fields, which cannot be joined with commas.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cookies: Vec<String>,
    /// Payload 1.0 only: every field with all its values.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    multi_value_headers: BTreeMap<String, Vec<String>>,
    body: String,
    is_base64_encoded: bool,
}

/// A body that is there already.
pub fn whole(body: impl Into<Bytes>) -> ResponseBody {
    Full::new(body.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// Redirects a visitor permanently, with the same method and body.
pub(crate) fn moved_permanently(location: &str) -> Response<ResponseBody> {
    let mut response = Response::new(whole(Bytes::new()));
    match HeaderValue::from_str(location) {
        Ok(location) => {
            *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
            response.headers_mut().insert(header::LOCATION, location);
        }
        // A path and a query are percent-encoded, so there is nothing that a header could not carry.
        Err(_) => *response.status_mut() = StatusCode::BAD_REQUEST,
    }
    response
}

/// Collects a response into a whole answer.
///
/// # Errors
/// If the body breaks off, or the answer is over [`MAX_LAMBDA_PAYLOAD_BYTES`].
pub async fn buffer(
    response: Response<ResponseBody>,
    payload: Payload,
    is_head: bool,
    streaming_url: Option<&PublicUrl>,
) -> Result<BufferedResponse, ForwardError> {
    let (head, mut body) = response.into_parts();
    let mut bytes =
        Vec::with_capacity(usize::try_from(body.size_hint().lower()).unwrap_or_default());
    while let Some(frame) = body.frame().await {
        bytes.extend_from_slice(
            &frame
                .map_err(|ResponseBodyError(refusal)| refusal)?
                .into_data()
                .unwrap_or_default(),
        );
        if bytes.len() > MAX_LAMBDA_PAYLOAD_BYTES {
            return Err(too_large(streaming_url));
        }
    }
    let mut headers = head.headers;
    if !is_head {
        // The gateway counts for itself, and it alone knows the length it sends.
        headers.remove(header::CONTENT_LENGTH);
    }
    let (body, is_base64_encoded) = match String::from_utf8(bytes) {
        Ok(text) => (text, false),
        Err(binary) => (BASE64_STANDARD.encode(binary.as_bytes()), true),
    };
    let mut answer = BufferedResponse {
        status_code: head.status.as_u16(),
        body,
        is_base64_encoded,
        ..BufferedResponse::default()
    };
    match payload {
        Payload::V1 => answer.multi_value_headers = values_by_name(&headers),
        Payload::V2 => {
            answer.cookies = headers
                .get_all(header::SET_COOKIE)
                .iter()
                .map(to_ascii)
                .collect();
            headers.remove(header::SET_COOKIE);
            answer.headers = values_by_name(&headers)
                .into_iter()
                .map(|(name, values)| (name, values.join(", ")))
                .collect();
        }
    }
    if json_length(&answer) > MAX_LAMBDA_PAYLOAD_BYTES {
        Err(too_large(streaming_url))
    } else {
        Ok(answer)
    }
}

fn too_large(streaming_url: Option<&PublicUrl>) -> ForwardError {
    let other_way = match streaming_url {
        Some(url) => format!("the same path under {url}"),
        None => "the deployment's streaming URL".to_owned(),
    };
    ForwardError::TooLarge(format!(
        "The response is longer than the {MAX_LAMBDA_PAYLOAD_BYTES} bytes that this address can return. Use {other_way}."
    ))
}

fn json_length(answer: &BufferedResponse) -> usize {
    /// Counts what is written.
    struct Count(usize);
    impl std::io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    // JSON escapes can make a text up to six times longer, so its length is only known from its JSON.
    if answer.is_base64_encoded && answer.body.len() + ENVELOPE_BYTES > MAX_LAMBDA_PAYLOAD_BYTES {
        return answer.body.len() + ENVELOPE_BYTES;
    }
    let mut count = Count(0);
    serde_json::to_writer(&mut count, answer)
        .expect("strings, numbers and maps with string keys can always be encoded as JSON");
    count.0
}

fn values_by_name(headers: &HeaderMap) -> BTreeMap<String, Vec<String>> {
    headers
        .keys()
        .map(|name| {
            (
                name.to_string(),
                headers.get_all(name).iter().map(to_ascii).collect(),
            )
        })
        .collect()
}

/// A field's value for an answer in JSON. What AWS makes of other characters than ASCII is not documented, so bytes above 0x7F are
/// percent-encoded, which is what they are to become in most fields that have any: addresses and file names.
fn to_ascii(value: &HeaderValue) -> String {
    value
        .as_bytes()
        .iter()
        .fold(String::new(), |mut text, &byte| {
            if byte.is_ascii() {
                text.push(char::from(byte));
            } else {
                text.push_str(percent_encoding::percent_encode_byte(byte));
            }
            text
        })
}

/// What a streamed answer has in place of an empty body, if it must have one.
const PADDING: Bytes = Bytes::from_static(b"\n");

/// The answer to a handshake at a WebSocket API, which accepts the connection when the status is 2xx and passes no body on.
pub(crate) fn handshake(response: &Response<ResponseBody>) -> BufferedResponse {
    let (status, field) = match response.status() {
        // It is the gateway that changes the protocol.
        StatusCode::SWITCHING_PROTOCOLS => (StatusCode::OK, header::SEC_WEBSOCKET_PROTOCOL),
        // The local service took the handshake for an ordinary request.
        status if status.is_success() => (StatusCode::BAD_GATEWAY, TUNNEL_ERROR),
        status => (status, TUNNEL_ERROR),
    };
    let value = response.headers().get(&field);
    BufferedResponse {
        status_code: status.as_u16(),
        headers: value
            .map(|value| (field.to_string(), to_ascii(value)))
            .into_iter()
            .collect(),
        ..BufferedResponse::default()
    }
}

/// Adds a line end to a streamed answer that turns out to have no body.
pub(crate) fn padded(stream: ResponseStream) -> ResponseStream {
    let first = Some(stream);
    Box::pin(futures_util::stream::unfold(
        (first, true),
        |(stream, is_empty)| async move {
            let mut stream = stream?;
            match stream.next().await {
                Some(chunk) => Some((chunk, (Some(stream), false))),
                None if is_empty => Some((Ok(PADDING), (None, false))),
                None => None,
            }
        },
    ))
}

/// A response as a streamed answer. Function URLs take one value a field, so repeated fields are joined; cookies have a list.
pub fn stream(response: Response<ResponseBody>) -> StreamResponse<ResponseStream> {
    let (head, body) = response.into_parts();
    let mut headers = head.headers;
    // A function URL would rename it to x-amzn-remapped-content-length.
    headers.remove(header::CONTENT_LENGTH);
    let cookies = headers
        .get_all(header::SET_COOKIE)
        .iter()
        .map(to_ascii)
        .collect();
    headers.remove(header::SET_COOKIE);
    let metadata_prelude = MetadataPrelude {
        status_code: head.status,
        headers: joined(&headers),
        cookies,
    };
    let stream: ResponseStream = Box::pin(BodyDataStream::new(body).filter(|chunk| {
        let has_bytes = chunk.as_ref().map_or(true, |bytes| !bytes.is_empty());
        async move { has_bytes }
    }));
    StreamResponse {
        metadata_prelude,
        stream,
    }
}

fn joined(headers: &HeaderMap) -> HeaderMap {
    let join = |name: &HeaderName| {
        let values: Vec<String> = headers.get_all(name).iter().map(to_ascii).collect();
        HeaderValue::from_str(&values.join(", "))
            .ok()
            .map(|value| (name.clone(), value))
    };
    headers.keys().filter_map(join).collect()
}

#[cfg(test)]
mod tests {
    use http_body_util::StreamBody;
    use serde_json::{Value, json};

    use super::*;

    fn response(lines: &[(&'static str, &'static str)], body: Vec<u8>) -> Response<ResponseBody> {
        let mut response = Response::new(whole(body));
        *response.status_mut() = http::StatusCode::CREATED;
        for &(name, value) in lines {
            let name: HeaderName = name.parse().expect("a name");
            let value = HeaderValue::from_bytes(value.as_bytes()).expect("a value");
            response.headers_mut().append(name, value);
        }
        response
    }

    const LINES: [(&str, &str); 6] = [
        ("content-type", "text/plain"),
        ("content-length", "5"),
        ("x-twice", "1"),
        ("x-twice", "2"),
        ("set-cookie", "a=1; Path=/"),
        ("set-cookie", "b=2, and more"),
    ];

    async fn buffered(response: Response<ResponseBody>, payload: Payload, is_head: bool) -> Value {
        let answer = buffer(response, payload, is_head, None).await;
        serde_json::to_value(answer.expect("an answer")).expect("JSON")
    }

    #[tokio::test]
    async fn payload_1_0_has_every_value_of_every_field() {
        let answer = buffered(response(&LINES, b"hello".to_vec()), Payload::V1, false).await;
        let expected = json!({
            "statusCode": 201,
            "headers": {},
            "multiValueHeaders": {
                "content-type": ["text/plain"],
                "x-twice": ["1", "2"],
                "set-cookie": ["a=1; Path=/", "b=2, and more"],
            },
            "body": "hello",
            "isBase64Encoded": false,
        });
        assert_eq!(answer, expected);
    }

    #[tokio::test]
    async fn payload_2_0_has_cookies_in_a_list_and_other_fields_joined() {
        let answer = buffered(response(&LINES, vec![0xff, 0]), Payload::V2, false).await;
        let expected = json!({
            "statusCode": 201,
            "headers": { "content-type": "text/plain", "x-twice": "1, 2" },
            "cookies": ["a=1; Path=/", "b=2, and more"],
            "body": "/wA=",
            "isBase64Encoded": true,
        });
        assert_eq!(answer, expected);
    }

    #[tokio::test]
    async fn a_head_request_learns_the_length_that_a_body_would_have() {
        for payload in [Payload::V1, Payload::V2] {
            let answer = buffered(response(&LINES, Vec::new()), payload, true)
                .await
                .to_string();
            assert!(answer.contains("\"content-length\":"), "{answer}");
        }
    }

    #[tokio::test]
    async fn what_lambda_would_not_take_is_refused_however_it_gets_too_long() {
        for (body, fits) in [
            (vec![b'x'; 6_291_000], true),
            (vec![b'x'; 6_291_556], false),
            // Base64 makes three bytes four, and JSON one control character six.
            (vec![0xff; 4_718_000], true),
            (vec![0xff; 4_720_000], false),
            (vec![1; 1_048_000], true),
            (vec![1; 1_049_000], false),
        ] {
            let (first, length) = (body[0], body.len());
            let answer = buffer(response(&[], body), Payload::V2, false, None).await;
            match answer {
                Ok(answer) => {
                    let json = serde_json::to_string(&answer).expect("JSON");
                    assert!(fits && json.len() <= 6_291_556, "{length} x {first}");
                }
                Err(error) => assert!(
                    !fits && matches!(error, ForwardError::TooLarge(_)),
                    "{length} x {first}: {error}"
                ),
            }
        }
    }

    #[tokio::test]
    async fn a_visitor_whose_answer_is_too_long_is_told_where_it_is_to_be_had() {
        let url: PublicUrl = "https://stream.example.com".parse().expect("an address");
        // As it is, and with what JSON adds to it.
        for body in [vec![b'x'; 6_291_557], vec![1; 1_049_000]] {
            for (streaming_url, expected) in [
                (
                    Some(&url),
                    "Use the same path under https://stream.example.com.",
                ),
                (None, "Use the deployment's streaming URL."),
            ] {
                let response = response(&[], body.clone());
                let refused = buffer(response, Payload::V2, false, streaming_url).await;
                let response = refused.expect_err("too long").into_response(false);
                let body = response.into_body().collect().await.expect("a body");
                let body = String::from_utf8_lossy(&body.to_bytes()).into_owned();
                assert!(body.contains(expected), "{body}");
            }
        }
    }

    #[tokio::test]
    async fn a_streamed_answer_has_its_fields_in_the_prelude_and_its_chunks_behind_it() {
        let mut response = response(&LINES, Vec::new());
        let frames = [b"he".as_slice(), b"", b"llo"]
            .map(|bytes| Ok(http_body::Frame::data(Bytes::from_static(bytes))));
        *response.body_mut() = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
        let answer = stream(response);
        let expected = json!({
            "statusCode": 201,
            "headers": { "content-type": "text/plain", "x-twice": "1, 2" },
            "cookies": ["a=1; Path=/", "b=2, and more"],
        });
        let prelude = serde_json::to_value(&answer.metadata_prelude).expect("JSON");
        assert_eq!(prelude, expected);
        let chunks: Vec<_> = answer
            .stream
            .map(|chunk| chunk.expect("bytes"))
            .collect()
            .await;
        // An empty chunk would end the stream.
        assert_eq!(chunks, ["he", "llo"]);
    }

    #[tokio::test]
    async fn bytes_above_ascii_are_percent_encoded_in_every_answer() {
        let latin = |fields: &[&'static str]| {
            let mut response = Response::new(whole(Bytes::new()));
            for name in fields {
                let value = HeaderValue::from_bytes(b"caf\xe9%20\xc3\xa9").expect("a value");
                response.headers_mut().append(*name, value);
            }
            response
        };
        let fields = ["location", "x-twice", "x-twice", "set-cookie"];
        let prelude = stream(latin(&fields)).metadata_prelude;
        let prelude = serde_json::to_value(&prelude).expect("JSON");
        let value = "caf%E9%20%C3%A9";
        let expected = json!({ "location": value, "x-twice": format!("{value}, {value}") });
        assert_eq!(prelude["headers"], expected);
        assert_eq!(prelude["cookies"], json!([value]));
        let answer = buffered(latin(&fields), Payload::V2, false).await;
        assert_eq!(
            (&answer["headers"], &answer["cookies"]),
            (&expected, &json!([value]))
        );
        let answer = buffered(latin(&fields), Payload::V1, false).await;
        assert_eq!(
            answer["multiValueHeaders"]["x-twice"],
            json!([value, value])
        );
    }

    #[test]
    fn a_handshake_is_answered_with_a_status_and_the_subprotocol_alone() {
        for (status, field, expected) in [
            (101, "sec-websocket-protocol", 200),
            (200, "x-own", 502),
            (204, "x-own", 502),
            (302, "location", 302),
            (403, "x-tunnel-error", 403),
        ] {
            let mut response = response(&[(field, "value")], b"body".to_vec());
            *response.status_mut() = StatusCode::from_u16(status).expect("a status");
            let answer = serde_json::to_value(handshake(&response)).expect("JSON");
            let headers = match field {
                "sec-websocket-protocol" | "x-tunnel-error" => json!({ field: "value" }),
                _ => json!({}),
            };
            assert_eq!(
                (&answer["statusCode"], &answer["headers"], &answer["body"]),
                (&json!(expected), &headers, &json!("")),
                "{status}"
            );
        }
    }

    #[tokio::test]
    async fn only_an_empty_stream_is_padded() {
        for (body, expected) in [("", "\n"), ("x", "x")] {
            let answer = stream(response(&LINES, body.into()));
            let chunks: Vec<_> = padded(answer.stream)
                .map(|chunk| chunk.expect("bytes"))
                .collect()
                .await;
            assert_eq!(chunks, [expected]);
        }
        let broken = Box::pin(futures_util::stream::iter([Err(ResponseBodyError(
            ForwardError::AgentLost,
        ))]));
        let chunks: Vec<_> = padded(broken).collect().await;
        assert!(matches!(&chunks[..], [Err(_)]), "{chunks:?}");
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_is_never_taken_for_a_whole_one() {
        let broken = || {
            let frames = [
                Ok(http_body::Frame::data(Bytes::from_static(b"hello"))),
                Err(ResponseBodyError(ForwardError::AgentLost)),
            ];
            Response::new(StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync())
        };
        let whole = buffer(broken(), Payload::V2, false, None).await;
        assert!(matches!(whole, Err(ForwardError::AgentLost)));
        let chunks: Vec<_> = stream(broken()).stream.collect().await;
        assert!(matches!(&chunks[..], [Ok(_), Err(_)]), "{chunks:?}");
    }
}
