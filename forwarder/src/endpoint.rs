//! The service's WebSocket address.

use std::{fmt, str::FromStr};

use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use tunnel_config::is_like_a_token;
use tunnel_protocol::{id::TunnelId, url::is_loopback};

use crate::authority::{self, AuthorityError};

/// Where `tunnel-local` takes agents.
const LOCAL_PATH: PathAndQuery = PathAndQuery::from_static("/_ws");

/// Why a text is not a valid endpoint.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum EndpointError {
    /// Not an address at all, or one of another scheme.
    #[error(
        "an endpoint must be a wss:// address, such as wss://id.execute-api.eu-west-1.amazonaws.com/dev, or ws://127.0.0.1:8080/_ws on this machine"
    )]
    Address,
    /// The host or port cannot be.
    #[error("an endpoint must be an address such as wss://tunnel.example.com/_ws: {0}")]
    Authority(#[from] AuthorityError),
    /// Not where the service is, but what it asks for.
    #[error(
        "that looks like a token; the endpoint is the service's address: `ttf login ENDPOINT --token TOKEN`"
    )]
    Token,
    /// A token would travel unencrypted.
    #[error(
        "an unencrypted endpoint (ws:// or http://) is allowed only on this machine: use wss://"
    )]
    Unencrypted,
}

/// The service's WebSocket address. Unencrypted only on loopback, because a token travels to it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Endpoint(Uri);

impl Endpoint {
    /// Host and port to connect to.
    pub fn address(&self) -> String {
        let default = if self.is_secure() { 443 } else { 80 };
        format!(
            "{}:{}",
            self.0.host().unwrap_or_default(),
            self.0.port_u16().unwrap_or(default)
        )
    }

    /// The host, without its port.
    pub fn host(&self) -> &str {
        self.0.host().unwrap_or_default()
    }

    /// Whether it has TLS.
    pub fn is_secure(&self) -> bool {
        self.0.scheme_str() == Some("wss")
    }

    /// Whether visitors reach their tunnels at this host, too: `tunnel-local` takes agents there.
    pub fn is_public_url(&self) -> bool {
        self.0.path() == LOCAL_PATH.path()
    }

    /// Scheme, host and port as a web address, by which connections are made and proxies chosen.
    pub fn as_http(&self) -> Uri {
        let scheme = if self.is_secure() {
            Scheme::HTTPS
        } else {
            Scheme::HTTP
        };
        Uri::builder()
            .scheme(scheme)
            .authority(self.address())
            .path_and_query("/")
            .build()
            .expect("host and port were checked")
    }

    /// The address with a query that requests a tunnel id.
    pub fn asking_for(&self, tunnel_id: Option<&TunnelId>) -> String {
        tunnel_id.map_or_else(|| self.0.to_string(), |id| self.with_query("tunnel_id", id))
    }

    /// The address with a query that says which tunnel's name is to be given up.
    pub fn releasing(&self, tunnel_id: &TunnelId) -> String {
        self.with_query("release", tunnel_id)
    }

    fn with_query(&self, name: &str, id: &TunnelId) -> String {
        let separator = if self.0.query().is_some() { '&' } else { '?' };
        format!("{}{separator}{name}={id}", self.0)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    /// Takes a WebSocket address, and a service's public URL: with `https` for `wss`, or without a scheme.
    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if is_like_a_token(text) {
            return Err(EndpointError::Token);
        }
        let mut parts = with_scheme(text)?
            .parse::<Uri>()
            .map_err(|_| EndpointError::Address)?
            .into_parts();
        let authority = parts.authority.as_ref().ok_or(EndpointError::Address)?;
        authority::check(authority)?;
        let is_loopback = is_loopback(authority.host());
        let (secure, is_public_url) = match parts.scheme.as_ref().map(Scheme::as_str) {
            Some("wss") => (true, false),
            Some("ws") => (false, false),
            Some("https") => (true, true),
            Some("http") => (false, true),
            _ => return Err(EndpointError::Address),
        };
        if !secure && !is_loopback {
            return Err(EndpointError::Unencrypted);
        }
        let has_path = parts
            .path_and_query
            .as_ref()
            .is_some_and(|path| path != "/");
        // Only API Gateway takes agents at the root of its address, and only under wss://.
        if !has_path && (is_public_url || is_loopback) {
            parts.path_and_query = Some(LOCAL_PATH);
        }
        let scheme = if secure { "wss" } else { "ws" };
        parts.scheme = Some(scheme.parse().expect("a scheme"));
        Uri::from_parts(parts)
            .map(Self)
            .map_err(|_| EndpointError::Address)
    }
}

/// A host alone is `https://host`, and on this machine `http://host`.
fn with_scheme(text: &str) -> Result<String, EndpointError> {
    if text.contains("://") {
        return Ok(text.to_owned());
    }
    let authority = text.split('/').next().unwrap_or_default();
    let authority: Authority = authority.parse().map_err(|_| EndpointError::Address)?;
    authority::check(&authority)?;
    let scheme = if is_loopback(authority.host()) {
        "http"
    } else {
        "https"
    };
    Ok(format!("{scheme}://{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<String, EndpointError> {
        text.parse::<Endpoint>()
            .map(|endpoint| endpoint.to_string())
    }

    #[test]
    fn a_public_url_is_an_endpoint_too() {
        for (text, endpoint) in [
            ("wss://x.example.com/dev", "wss://x.example.com/dev"),
            ("wss://x.example.com", "wss://x.example.com/"),
            ("ws://127.0.0.1:8080/_ws", "ws://127.0.0.1:8080/_ws"),
            ("ws://127.0.0.1:8080", "ws://127.0.0.1:8080/_ws"),
            ("http://localhost:8080/", "ws://localhost:8080/_ws"),
            ("https://t.example.com", "wss://t.example.com/_ws"),
            ("t.example.com", "wss://t.example.com/_ws"),
            ("localhost:8080", "ws://localhost:8080/_ws"),
            ("[::1]:8080/x", "ws://[::1]:8080/x"),
        ] {
            assert_eq!(parsed(text), Ok(endpoint.to_owned()), "{text}");
        }
        for text in ["", "/", "ftp://x.example.com", "wss://", "a b"] {
            assert_eq!(parsed(text), Err(EndpointError::Address), "{text}");
        }
    }

    #[test]
    fn a_token_never_goes_over_plain_text_to_another_machine() {
        for text in ["ws://10.0.0.1/", "http://t.example.com", "ws://x/_ws"] {
            assert_eq!(parsed(text), Err(EndpointError::Unencrypted), "{text}");
        }
    }

    #[test]
    fn a_token_is_not_looked_up_as_a_host() {
        for text in [
            "ttf_0123456789abcdef",
            "eyJhbGciOiJIUzI1NiJ9.eyJhIjoxfQ.c2ln",
        ] {
            assert_eq!(parsed(text), Err(EndpointError::Token), "{text}");
        }
        assert_eq!(parsed("ttf_"), Ok("wss://ttf_/_ws".to_owned()));
    }

    #[test]
    fn an_impossible_port_is_refused_and_a_password_is_never_repeated() {
        for text in [
            "wss://127.0.0.1:99999/x",
            "wss://x.example.com:/x",
            "localhost:0",
        ] {
            assert_eq!(parsed(text), Err(AuthorityError::Port.into()), "{text}");
        }
        for text in ["ws://user:hunter2@127.0.0.1/x", "user:hunter2@x"] {
            let error = parsed(text).expect_err(text);
            assert_eq!(error, AuthorityError::UserInfo.into());
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }
}
