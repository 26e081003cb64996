//! What the flags `--url`, `--domain` and `--hostname` of other tunnels name: the local service, or the tunnel by its address.

use std::str::FromStr;

use http::Uri;
use tunnel_protocol::{id::TunnelId, url::is_loopback};

use crate::{endpoint::Endpoint, target::Target};

/// What an address names.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NamedAddress {
    /// A service of this machine, as in `cloudflared tunnel --url http://localhost:3000`.
    Target(Target),
    /// A tunnel, by its id alone.
    TunnelId(TunnelId),
    /// A tunnel, by its public address, as in `ngrok http 3000 --url https://my-app.example.com`.
    Public {
        /// The host, in lower case.
        host: String,
        /// The path without slashes at its ends.
        path: String,
    },
}

/// An address that names nothing here. The text says what to do.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NamedAddressError {
    /// Neither a service of this machine nor a tunnel.
    #[error(
        "must be a local service (http://localhost:3000), a tunnel id (my-app), or the public URL of a tunnel"
    )]
    Address,
    /// Not under the service's address.
    #[error(
        "{host} is not an address of the service at {service}, which alone decides the domain of its tunnels: choose the first part of the address with --tunnel-id {example}"
    )]
    Elsewhere {
        /// The requested host.
        host: String,
        /// The endpoint's host.
        service: String,
        /// A tunnel id that would come close.
        example: String,
    },
}

impl NamedAddress {
    /// The tunnel id that this names at the service with this endpoint; `None` if it names a local service.
    ///
    /// # Errors
    /// If the address is not under the service's own.
    pub fn tunnel_id(&self, endpoint: &Endpoint) -> Result<Option<TunnelId>, NamedAddressError> {
        let (host, path) = match self {
            Self::Target(_) => return Ok(None),
            Self::TunnelId(id) => return Ok(Some(id.clone())),
            Self::Public { host, path } => (host, path),
        };
        let service = endpoint.host().to_ascii_lowercase();
        let label = if *host == service {
            Some(path.as_str())
        } else {
            host.strip_suffix(&service)
                .and_then(|label| label.strip_suffix('.'))
        };
        if let Some(id) = label.and_then(|label| label.parse().ok()) {
            return Ok(Some(id));
        }
        let first: &str = host.split('.').next().unwrap_or_default();
        let example = if first.parse::<TunnelId>().is_ok() {
            first
        } else {
            "my-app"
        };
        Err(NamedAddressError::Elsewhere {
            host: host.clone(),
            service,
            example: example.to_owned(),
        })
    }
}

impl FromStr for NamedAddress {
    type Err = NamedAddressError;

    fn from_str(text: &str) -> Result<Self, NamedAddressError> {
        if let Ok(id) = text.parse::<TunnelId>()
            && !is_loopback(text)
            && !text.bytes().all(|byte| byte.is_ascii_digit())
        {
            return Ok(Self::TunnelId(id));
        }
        let with_scheme = if text.contains("://") {
            text.to_owned()
        } else {
            format!("https://{text}")
        };
        let uri: Uri = with_scheme.parse().unwrap_or_default();
        let host = uri.host().unwrap_or_default();
        if !host.contains('.') || is_loopback(host) {
            let target = text.parse().map_err(|_| NamedAddressError::Address);
            return target.map(Self::Target);
        }
        Ok(Self::Public {
            host: host.to_ascii_lowercase(),
            path: uri.path().trim_matches('/').to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_names_a_local_service_or_a_tunnel() {
        let endpoint: Endpoint = "https://t.example.com".parse().expect("an endpoint");
        for (text, target, id) in [
            ("http://localhost:3000", Some("http://localhost:3000"), None),
            ("3000", Some("http://127.0.0.1:3000"), None),
            ("localhost:3000", Some("http://localhost:3000"), None),
            ("my-app", None, Some("my-app")),
            ("my-app.t.example.com", None, Some("my-app")),
            ("https://My-App.T.example.com/", None, Some("my-app")),
            ("https://t.example.com/my-app/", None, Some("my-app")),
        ] {
            let address: NamedAddress = text.parse().expect(text);
            let named = match &address {
                NamedAddress::Target(target) => Some(target.to_string()),
                _ => None,
            };
            assert_eq!(named.as_deref(), target, "{text}");
            let named = address.tunnel_id(&endpoint).expect(text);
            assert_eq!(named.as_ref().map(TunnelId::as_str), id, "{text}");
        }
        for text in ["my-app.ngrok.app", "t.example.com", "my-app.xt.example.com"] {
            let address: NamedAddress = text.parse().expect(text);
            let error = address.tunnel_id(&endpoint).expect_err(text).to_string();
            assert!(error.contains("t.example.com, which"), "{error}");
        }
        assert_eq!("".parse::<NamedAddress>(), Err(NamedAddressError::Address));
    }
}
