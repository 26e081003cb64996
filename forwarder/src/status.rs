//! `ttf status`: how a tunnel is, as the service says.

use std::{str::FromStr, time::Duration};

use http::{StatusCode, Uri};
use tokio::time::timeout;
use tunnel_protocol::id::TunnelId;

use crate::{endpoint::Endpoint, handshake::HandshakeError, settings::Settings, web_request};

/// How long the service may take.
const STATUS_TIMEOUT: Duration = Duration::from_secs(15);

/// The tunnel that is asked about.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum StatusSubject {
    /// By its id, at a service whose web address follows from its endpoint.
    Id(TunnelId),
    /// By its public URL.
    Url(Endpoint, TunnelId),
}

/// Neither an id nor an address.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("must be a tunnel id (my-app) or the public URL of a tunnel")]
pub(crate) struct StatusSubjectError;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    /// The endpoint says nothing about the web address.
    #[error(
        "where visitors reach {0} does not follow from the endpoint: pass the tunnel's public URL instead of its id"
    )]
    NoWebAddress(TunnelId),
    /// The service is not reached, or refuses the token.
    #[error("the service gives no answer")]
    Handshake(#[from] HandshakeError),
    /// There is no such tunnel, or it is another owner's.
    #[error("there is no tunnel {0}, or it belongs to another owner")]
    Unknown(TunnelId),
    /// Something else.
    #[error("the service answered {0}")]
    Status(StatusCode),
}

impl FromStr for StatusSubject {
    type Err = StatusSubjectError;

    fn from_str(text: &str) -> Result<Self, StatusSubjectError> {
        if let Ok(id) = text.parse() {
            return Ok(Self::Id(id));
        }
        let uri: Uri = text.parse().map_err(|_| StatusSubjectError)?;
        let authority = uri.authority().ok_or(StatusSubjectError)?;
        let host = authority.host();
        let label = match uri.path().trim_matches('/') {
            "" => host.split('.').next().unwrap_or_default(),
            path => path.split('/').next().unwrap_or_default(),
        };
        let id = label.parse().map_err(|_| StatusSubjectError)?;
        let scheme = uri.scheme_str().unwrap_or("https");
        let address = format!("{scheme}://{authority}").parse();
        Ok(Self::Url(address.map_err(|_| StatusSubjectError)?, id))
    }
}

/// Asks the service. Returns what it says, in JSON.
///
/// # Errors
/// If it says nothing, or that there is no such tunnel.
pub(crate) async fn status(
    settings: &Settings,
    subject: StatusSubject,
) -> Result<String, StatusError> {
    let (address, id) = match subject {
        StatusSubject::Url(address, id) => (address, id),
        // `tunnel-local` takes agents at its public URL; API Gateway takes them elsewhere.
        StatusSubject::Id(id) if settings.endpoint.is_public_url() => {
            (settings.endpoint.clone(), id)
        }
        StatusSubject::Id(id) => return Err(StatusError::NoWebAddress(id)),
    };
    let path = format!("/_status/{id}");
    let response = timeout(STATUS_TIMEOUT, web_request::get(settings, &address, &path))
        .await
        .unwrap_or_else(|_| Err(HandshakeError::no_answer()))?;
    match response.status {
        StatusCode::OK => Ok(String::from_utf8_lossy(&response.body).trim().to_owned()),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Err(HandshakeError::Unauthorized.into())
        }
        StatusCode::NOT_FOUND => Err(StatusError::Unknown(id)),
        status => Err(StatusError::Status(status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_is_named_by_its_id_or_its_address() {
        let id: TunnelId = "my-app".parse().expect("an id");
        assert_eq!("my-app".parse(), Ok(StatusSubject::Id(id.clone())));
        for (text, address) in [
            ("https://t.example.com/my-app/", "https://t.example.com"),
            (
                "https://my-app.t.example.com/",
                "https://my-app.t.example.com",
            ),
            (
                "http://my-app.localhost:8080",
                "http://my-app.localhost:8080",
            ),
        ] {
            let address = address.parse().expect("an address");
            assert_eq!(
                text.parse(),
                Ok(StatusSubject::Url(address, id.clone())),
                "{text}"
            );
        }
        for text in ["", "/", "NO", "https://t.example.com/NO"] {
            assert_eq!(
                text.parse::<StatusSubject>(),
                Err(StatusSubjectError),
                "{text}"
            );
        }
    }
}
