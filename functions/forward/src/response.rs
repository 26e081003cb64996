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
use tunnel_protocol::{headers::value_to_text, limits::MAX_LAMBDA_PAYLOAD_BYTES};
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

/// Sends a visitor elsewhere for good, with the same method and body.
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
/// When the body breaks off, or the answer is over [`MAX_LAMBDA_PAYLOAD_BYTES`].
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
                .map(value_to_text)
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
    // JSON escapes can make a text up to six times longer, so only its JSON tells its length.
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
                headers.get_all(name).iter().map(value_to_text).collect(),
            )
        })
        .collect()
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
        .map(value_to_text)
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
        let values: Vec<&[u8]> = headers
            .get_all(name)
            .iter()
            .map(HeaderValue::as_bytes)
            .collect();
        HeaderValue::from_bytes(&values.join(&b", "[..]))
            .ok()
            .map(|value| (name.clone(), value))
    };
    headers.keys().filter_map(join).collect()
}
