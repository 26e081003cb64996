//! The proxy through which the service is reached, where only a proxy leads out.

use std::{fmt, str::FromStr};

use http::{HeaderValue, Uri, uri::Scheme};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use tunnel_protocol::url::is_loopback;

use crate::{authority, endpoint::Endpoint, settings::Secret};

/// The port of an http, socks5 or socks5h proxy whose address has none, as curl has it.
const DEFAULT_PORT: u16 = 1080;
/// The port of an https proxy whose address has none.
const DEFAULT_TLS_PORT: u16 = 443;

/// A text that is no proxy. It is not repeated: it may have a password in it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "a proxy must be http://host:port, https://host:port or socks5h://host:port, with user:password@ before the host if it asks for them, or none"
)]
pub struct ProxyError;

/// Whether there is a proxy, as a user says it.
#[derive(Clone, Debug, PartialEq)]
pub enum ProxyChoice {
    /// None, whatever the environment says.
    Direct,
    /// This one.
    Through(Box<Proxy>),
}

/// How a proxy is spoken to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ProxyKind {
    /// CONNECT over plain TCP.
    Http,
    /// CONNECT over TLS.
    Https,
    /// SOCKS 5; the proxy looks names up, or this machine does.
    Socks {
        /// This machine looks names up.
        local_dns: bool,
    },
}

/// A proxy. Neither its text nor its debug form has its credentials.
#[derive(Clone)]
pub struct Proxy {
    kind: ProxyKind,
    /// Host and port, with the scheme of the connection to it.
    address: Uri,
    basic_auth: Option<HeaderValue>,
    credentials: Option<(String, Secret)>,
    /// What it was read from, if a user wrote it.
    text: Option<Secret>,
}

impl Proxy {
    /// The proxy that `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY` name for an endpoint, as curl reads them. A service of
    /// this machine has none.
    ///
    /// # Errors
    /// If they name one that cannot be used.
    pub fn of_environment(endpoint: &Endpoint) -> Result<Option<Self>, ProxyError> {
        Self::of(&Matcher::from_env(), endpoint)
    }

    fn of(matcher: &Matcher, endpoint: &Endpoint) -> Result<Option<Self>, ProxyError> {
        if is_loopback(endpoint.host()) {
            return Ok(None);
        }
        let intercept = matcher.intercept(&endpoint.as_http());
        intercept.as_ref().map(Self::try_from).transpose()
    }

    /// How it is spoken to.
    pub fn kind(&self) -> ProxyKind {
        self.kind
    }

    /// Where it is, as `http` or `https`.
    pub fn address(&self) -> &Uri {
        &self.address
    }

    /// What `Proxy-Authorization` says, if it asks for credentials.
    pub fn basic_auth(&self) -> Option<&HeaderValue> {
        self.basic_auth.as_ref()
    }

    /// Whether it is given a user name and a password.
    pub fn has_credentials(&self) -> bool {
        self.basic_auth.is_some() || self.credentials.is_some()
    }

    /// User name and password, for SOCKS.
    pub fn credentials(&self) -> Option<(&str, &Secret)> {
        let (user, password) = self.credentials.as_ref()?;
        Some((user, password))
    }
}

impl TryFrom<&Intercept> for Proxy {
    type Error = ProxyError;

    fn try_from(intercept: &Intercept) -> Result<Self, ProxyError> {
        let uri = intercept.uri();
        let kind = match uri.scheme_str() {
            Some("http") => ProxyKind::Http,
            Some("https") => ProxyKind::Https,
            Some("socks5h") => ProxyKind::Socks { local_dns: false },
            Some("socks5") => ProxyKind::Socks { local_dns: true },
            _ => return Err(ProxyError),
        };
        let authority = uri.authority().ok_or(ProxyError)?;
        let (scheme, default) = match kind {
            ProxyKind::Https => (Scheme::HTTPS, DEFAULT_TLS_PORT),
            ProxyKind::Http | ProxyKind::Socks { .. } => (Scheme::HTTP, DEFAULT_PORT),
        };
        let port = authority::check(authority).map_err(|_| ProxyError)?;
        let address = Uri::builder()
            .scheme(scheme)
            .authority(format!("{}:{}", authority.host(), port.unwrap_or(default)))
            .path_and_query("/")
            .build()
            .map_err(|_| ProxyError)?;
        Ok(Self {
            kind,
            address,
            basic_auth: intercept.basic_auth().cloned(),
            credentials: intercept
                .raw_auth()
                .map(|(user, password)| (user.to_owned(), password.to_owned().into())),
            text: None,
        })
    }
}

impl FromStr for Proxy {
    type Err = ProxyError;

    fn from_str(text: &str) -> Result<Self, ProxyError> {
        let anywhere = Uri::from_static("https://t.example.com/");
        let matcher = Matcher::builder().all(text).build();
        let proxy = Self::try_from(&matcher.intercept(&anywhere).ok_or(ProxyError)?)?;
        Ok(Self {
            text: Some(text.to_owned().into()),
            ..proxy
        })
    }
}

impl ProxyChoice {
    /// As a user has written it, with the credentials.
    pub fn reveal(&self) -> Option<&str> {
        match self {
            Self::Direct => Some("none"),
            Self::Through(proxy) => proxy.text.as_ref().map(Secret::reveal),
        }
    }
}

impl FromStr for ProxyChoice {
    type Err = ProxyError;

    fn from_str(text: &str) -> Result<Self, ProxyError> {
        match text {
            "none" | "direct" => Ok(Self::Direct),
            proxy => Ok(Self::Through(Box::new(proxy.parse()?))),
        }
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.kind {
            ProxyKind::Http => "http",
            ProxyKind::Https => "https",
            ProxyKind::Socks { local_dns: false } => "socks5h",
            ProxyKind::Socks { local_dns: true } => "socks5",
        };
        let authority = self
            .address
            .authority()
            .map_or("", |authority| authority.as_str());
        write!(f, "{scheme}://{authority}")
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl PartialEq for Proxy {
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_an_address_whose_credentials_are_never_shown() {
        for (text, shown) in [
            (
                "http://proxy.example.com:3128",
                "http://proxy.example.com:3128",
            ),
            ("http://alice:hunter2@proxy:3128/", "http://proxy:3128"),
            ("https://alice:hunter2@proxy", "https://proxy:443"),
            (
                "socks5h://alice:hunter2@127.0.0.1",
                "socks5h://127.0.0.1:1080",
            ),
            ("socks5://[::1]:9050", "socks5://[::1]:9050"),
            ("proxy:3128", "http://proxy:3128"),
        ] {
            let proxy: Proxy = text.parse().expect(text);
            assert_eq!(proxy.to_string(), shown, "{text}");
            assert_eq!(format!("{proxy:?}"), shown);
        }
        for text in ["", "socks4://x", "ftp://x", "http://x:99999", "http://:1"] {
            assert_eq!(
                text.parse::<Proxy>().map(|proxy| proxy.to_string()),
                Err(ProxyError),
                "{text}"
            );
        }
        assert_eq!("none".parse(), Ok(ProxyChoice::Direct));
    }

    #[test]
    fn credentials_are_given_in_the_form_that_the_proxy_takes() {
        let http: Proxy = "http://al:p%40ss@proxy".parse().expect("a proxy");
        assert_eq!(
            http.basic_auth(),
            Some(&HeaderValue::from_static("Basic YWw6cEBzcw=="))
        );
        let socks: Proxy = "socks5h://al:p%40ss@proxy".parse().expect("a proxy");
        let (user, password) = socks.credentials().expect("credentials");
        assert_eq!((user, password.reveal()), ("al", "p@ss"));
    }

    #[test]
    fn the_environment_says_for_which_endpoints_there_is_a_proxy() {
        let matcher = Matcher::builder()
            .https("http://proxy:3128")
            .no("internal.example.com,10.0.0.0/8")
            .build();
        for (endpoint, proxy) in [
            ("wss://t.example.com", Some("http://proxy:3128")),
            ("wss://t.internal.example.com", None),
            ("wss://10.1.2.3/_ws", None),
            ("ws://127.0.0.1:8080/_ws", None),
            ("localhost:8080", None),
        ] {
            let endpoint = endpoint.parse().expect("an endpoint");
            let found = Proxy::of(&matcher, &endpoint).expect("a proxy or none");
            assert_eq!(
                found.map(|proxy| proxy.to_string()).as_deref(),
                proxy,
                "{endpoint}"
            );
        }
    }
}
