//! Answers of the front's own.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use tunnel_forward::{
    error::ForwardError,
    response::{self, ResponseBody},
};

use crate::front::{host::ForeignHostError, request_head::RequestHeadError};

impl From<RequestHeadError> for ForwardError {
    fn from(error: RequestHeadError) -> Self {
        let text = error.to_string();
        match error {
            RequestHeadError::Malformed(_) => Self::BadRequest(text),
            RequestHeadError::TooLarge => Self::HeadTooLarge(text),
            RequestHeadError::BodyTooLarge => Self::TooLarge(text),
            RequestHeadError::TransferEncoding(_) => Self::UnsupportedEncoding(text),
        }
    }
}

impl From<ForeignHostError> for ForwardError {
    fn from(error: ForeignHostError) -> Self {
        Self::ForeignHost(error.to_string())
    }
}

/// A short answer in plain text.
pub(crate) fn text(status: StatusCode, text: &'static str) -> Response<ResponseBody> {
    let mut response = Response::new(response::whole(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

/// The same response, and the last on its connection.
pub(crate) fn last(mut response: Response<ResponseBody>) -> Response<ResponseBody> {
    response
        .headers_mut()
        .insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}
