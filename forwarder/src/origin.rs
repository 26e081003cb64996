//! The local service: how it is called, and what its failures mean.

use std::{error::Error, io, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, Request, Response, header, uri::PathAndQuery};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use tunnel_protocol::{
    headers::remove_hop_by_hop,
    limits::MAX_HEADER_FIELDS,
    message::{AgentErrorCode, HttpRequest},
};

use crate::{
    addresses::Addresses,
    settings::{HostHeader, Settings},
    target::Target,
};

/// How long connecting to the local service may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an idle connection to the local service is kept. Shorter than servers keep theirs (Node: 5 s), so that none is
/// used while the server closes it.
const IDLE: Duration = Duration::from_secs(3);

/// What the local service is sent.
pub type RequestBody = UnsyncBoxBody<Bytes, io::Error>;

/// The local service, with its pool of connections.
#[derive(Clone, Debug)]
pub struct Origin {
    client: Client<HttpsConnector<HttpConnector>, RequestBody>,
    target: Target,
    host_header: HostHeader,
}

/// Why there is no response. The text is shown to visitors, so it tells nothing of this machine.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct OriginError {
    /// What kind of failure.
    pub code: AgentErrorCode,
    /// The failure in a sentence.
    pub message: &'static str,
}

impl Origin {
    /// The local service of a tunnel.
    pub fn new(settings: &Settings) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let connector = HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
            .unwrap_or_else(|_| HttpsConnectorBuilder::new().with_tls_config(without_roots()))
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .http1_max_headers(MAX_HEADER_FIELDS)
            .set_host(false)
            .build(connector);
        Self {
            client,
            target: settings.target.clone(),
            host_header: settings.host_header.clone(),
        }
    }

    /// Where it is.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Its addresses, as a request sees them.
    pub fn addresses(&self, request: &HttpRequest) -> Addresses {
        Addresses::of(request, &self.target, &self.host_header)
    }

    /// Makes a request of a message whose own body unpacks to `length` bytes. Only path and query of its address are the
    /// visitor's to choose.
    ///
    /// # Errors
    /// When the message is no request that HTTP allows.
    pub fn request(
        &self,
        message: &HttpRequest,
        length: usize,
        body: RequestBody,
    ) -> Result<Request<RequestBody>, OriginError> {
        let invalid = |message| OriginError {
            code: AgentErrorCode::InvalidRequest,
            message,
        };
        let method: Method = message
            .method
            .parse()
            .map_err(|_| invalid("its method is none"))?;
        if method == Method::CONNECT || !message.uri.starts_with('/') {
            return Err(invalid("its address is not a path"));
        }
        let path: PathAndQuery = message
            .uri
            .parse()
            .map_err(|_| invalid("its path is none"))?;
        let uri = http::Uri::builder()
            .scheme(self.target.scheme.clone())
            .authority(self.target.authority.clone())
            .path_and_query(path)
            .build()
            .map_err(|_| invalid("its path is none"))?;
        let mut request = Request::new(body);
        *request.headers_mut() = self.fields(message, length, &method);
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        Ok(request)
    }

    fn fields(&self, message: &HttpRequest, length: usize, method: &Method) -> HeaderMap {
        let mut fields = message.headers.clone();
        remove_hop_by_hop(&mut fields);
        self.addresses(message).to_own(&mut fields);
        let said = remove_length(&mut fields);
        let expects_body = matches!(*method, Method::POST | Method::PUT | Method::PATCH);
        if message.more {
            // Its length, if the visitor told it; chunked otherwise.
            if let Some(said) = said {
                fields.insert(header::CONTENT_LENGTH, said.into());
            }
        } else if said.is_some() || expects_body || length > 0 {
            fields.insert(header::CONTENT_LENGTH, length.into());
        }
        fields
    }

    /// Calls the local service and returns its response as soon as the head is there.
    ///
    /// # Errors
    /// When it cannot be reached or what it says is not HTTP.
    pub async fn call(
        &self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, OriginError> {
        self.client.request(request).await.map_err(|error| {
            let unavailable = |message| OriginError {
                code: AgentErrorCode::LocalServiceUnavailable,
                message,
            };
            if error.is_connect() {
                return unavailable(if is_refused(&error) {
                    "it refused the connection"
                } else {
                    "it could not be connected to"
                });
            }
            match error
                .source()
                .and_then(|cause| cause.downcast_ref::<hyper::Error>())
            {
                Some(cause) if cause.is_parse() => unavailable("what it said is not HTTP"),
                _ => unavailable("it closed the connection without an answer"),
            }
        })
    }
}

/// Removes the length the visitor gave, and returns it if it is one.
fn remove_length(fields: &mut HeaderMap) -> Option<u64> {
    let name: HeaderName = header::CONTENT_LENGTH;
    fields.remove(name)?.to_str().ok()?.parse().ok()
}

fn is_refused(error: &(dyn Error + 'static)) -> bool {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
        {
            return true;
        }
        cause = error.source();
    }
    false
}

/// For a machine without any certificates: plain HTTP works, and every HTTPS target fails.
fn without_roots() -> rustls::ClientConfig {
    rustls::ClientConfig::builder_with_provider(std::sync::Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .expect("ring speaks the default versions")
    .with_root_certificates(rustls::RootCertStore::empty())
    .with_no_client_auth()
}
