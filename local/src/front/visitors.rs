//! The HTTP front: visitors' requests as they come, straight to `forward`.
//!
//! What an event would carry is handed over as it is, because an event cannot carry a stream and payload 2.0 joins repeated
//! fields. From there on the way is that of a function URL.

use std::{net::IpAddr, sync::atomic::Ordering};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, Uri, header, uri::Scheme};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tunnel_forward::{
    Forward,
    error::ForwardError,
    request::{RequestSource, VisitorRequest, wants_html},
    response::{self, ResponseBody},
};

use crate::{front::forwarded::TrustedProxies, front::length_check::TrackedBody};

/// Serves a visitor's request.
pub async fn serve(
    forward: &Forward,
    request: Request<Incoming>,
    peer: IpAddr,
    proxies: &TrustedProxies,
    scheme: &str,
) -> Response<ResponseBody> {
    if is_absolute(request.uri()) {
        return refuse(&request, "its target is a whole address, as for a proxy");
    }
    let (head, body) = request.into_parts();
    let (body, is_read) = TrackedBody::new(body);
    let origin = proxies.origin(peer, &head.headers);
    let host = head
        .headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or_default()
        .to_owned();
    let source = RequestSource {
        address: origin.address,
        scheme: origin.scheme.unwrap_or_else(|| scheme.to_owned()),
        host: origin.host.unwrap_or(host),
    };
    let visit = VisitorRequest::from_http(head, body.map_err(Into::into).boxed_unsync(), source);
    let mut response = forward.serve(visit).await;
    if !is_read.load(Ordering::Relaxed) {
        response
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Refuses a request that is not to be served, and closes the connection: what follows on it may be part of the same.
pub fn refuse(request: &Request<Incoming>, why: &str) -> Response<ResponseBody> {
    let mut response =
        ForwardError::BadRequest(why.to_owned()).into_response(wants_html(request.headers()));
    response
        .headers_mut()
        .insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Whether a request's target is in absolute-form or authority-form, which only proxies take.
fn is_absolute(uri: &Uri) -> bool {
    uri.scheme() == Some(&Scheme::HTTP)
        || uri.scheme() == Some(&Scheme::HTTPS)
        || uri.authority().is_some()
}

/// A short answer of the front's own.
pub fn say(status: StatusCode, text: &'static str) -> Response<ResponseBody> {
    let mut response = Response::new(response::whole(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}
