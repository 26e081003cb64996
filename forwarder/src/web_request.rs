//! One request to the service's web address, over the same way as the agent's connection.

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use crate::{
    dial::{dial, misdirected},
    endpoint::Endpoint,
    handshake::{HandshakeError, authorization},
    settings::Settings,
    tls,
};

/// Longest answer that is read, in bytes: what is asked for here is short.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// An answer.
#[derive(Debug)]
pub(crate) struct WebResponse {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

/// Gets `path` from the web server at `address`, with the token and by the proxy and certificates of `settings`.
pub(crate) async fn get(
    settings: &Settings,
    address: &Endpoint,
    path: &str,
) -> Result<WebResponse, HandshakeError> {
    let needs_tls = address.is_secure() || settings.proxy.is_some();
    let tls = Arc::new(tls::client_config(needs_tls, &settings.endpoint_tls));
    let stream = dial(address, settings.proxy.as_ref(), &tls).await?;
    let request = request(settings, address, path)?;
    if !address.is_secure() {
        return exchange(stream, request).await;
    }
    let failed = |error: &dyn std::error::Error| HandshakeError::Unreachable(error.to_string());
    let host = address.host().trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_owned()).map_err(|error| failed(&error))?;
    let stream = TlsConnector::from(tls)
        .connect(name, stream)
        .await
        .map_err(|error| misdirected(&error, address).unwrap_or_else(|| failed(&error)))?;
    exchange(stream, request).await
}

fn request(
    settings: &Settings,
    address: &Endpoint,
    path: &str,
) -> Result<Request<Empty<Bytes>>, HandshakeError> {
    let failed = |error: http::Error| HandshakeError::Invalid(error.to_string());
    let uri: Uri = path
        .parse()
        .map_err(|error: http::uri::InvalidUri| failed(error.into()))?;
    let host = address.as_http();
    let mut request = Request::get(uri)
        .header(
            header::HOST,
            host.authority().map_or("", |host| host.as_str()),
        )
        .body(Empty::new())
        .map_err(failed)?;
    request.headers_mut().extend(authorization(settings)?);
    Ok(request)
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Empty<Bytes>>,
) -> Result<WebResponse, HandshakeError> {
    let failed = |error: &dyn std::error::Error| {
        HandshakeError::Unreachable(format!("the service gave no answer: {error}"))
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed(&error))?;
    let answer = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| failed(&error))?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_BODY_BYTES).collect().await;
        let body = body.map_err(|error| failed(error.as_ref()))?.to_bytes();
        Ok(WebResponse {
            status: head.status,
            body,
        })
    };
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        _ = connection => answer.await,
    }
}
