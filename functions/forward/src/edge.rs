//! CloudFront as a front: what it says about a visitor, in fields that are believed only beside a secret.
//!
//! An origin must be addressed by its own host name, so `edge/viewer-request.js` writes the visitor's host, address and, for a
//! WebSocket handshake, target into fields of their own. CloudFront itself adds the secret. Anyone may send the same fields to
//! the origin directly.

use std::{net::IpAddr, str::FromStr};

use http::{HeaderMap, HeaderName, HeaderValue, header};
use tunnel_service::auth::token::TokenHash;

use crate::request::VisitorRequest;

/// The secret.
const SECRET: HeaderName = HeaderName::from_static("x-tunnel-edge");
/// The host that the visitor used.
const HOST: HeaderName = HeaderName::from_static("x-tunnel-host");
/// The visitor's address.
const ADDRESS: HeaderName = HeaderName::from_static("x-tunnel-address");
/// Path and query of a WebSocket handshake.
const TARGET: HeaderName = HeaderName::from_static("x-tunnel-target");

/// Shorter secrets could be guessed.
const MIN_SECRET_BYTES: usize = 32;

/// The secrets by which CloudFront is known: none where there is no edge, two while one replaces the other.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct EdgeSecrets(Vec<TokenHash>);

/// A secret that is too short.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("each secret must have at least {MIN_SECRET_BYTES} characters")]
pub struct ShortSecretError;

impl FromStr for EdgeSecrets {
    type Err = ShortSecretError;

    /// Secrets are separated by spaces.
    fn from_str(text: &str) -> Result<Self, ShortSecretError> {
        text.split_whitespace()
            .map(|secret| {
                (secret.len() >= MIN_SECRET_BYTES)
                    .then(|| TokenHash::of(secret))
                    .ok_or(ShortSecretError)
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

impl EdgeSecrets {
    /// Makes the request what the visitor sent to CloudFront, if it came from there. Returns whether it did. The fields are
    /// removed either way: they are not the local service's.
    pub(crate) fn apply(&self, request: &mut VisitorRequest) -> bool {
        let secret = only(&mut request.headers, &SECRET);
        let host = only(&mut request.headers, &HOST);
        let address = only(&mut request.headers, &ADDRESS);
        let target = only(&mut request.headers, &TARGET);
        // Of a hash, how far a comparison gets tells nothing about the secret.
        let is_believed = secret.is_some_and(|secret| self.0.contains(&TokenHash::of(&secret)));
        if !is_believed {
            return false;
        }
        if let Some(value) = host
            .as_deref()
            .and_then(|host| HeaderValue::from_str(host).ok())
        {
            request.headers.insert(header::HOST, value);
        }
        request.host = host.unwrap_or_default();
        // Without an address the visitor's rules refuse whom they cannot place.
        request.source_ip = address
            .filter(|address| address.parse::<IpAddr>().is_ok())
            .unwrap_or_default();
        if let Some(target) = target {
            request.set_target(&target);
        }
        true
    }
}

/// Takes a field out. One that is there twice has no value.
fn only(headers: &mut HeaderMap, name: &HeaderName) -> Option<String> {
    let mut values = headers.get_all(name).iter();
    let value = values
        .next()
        .filter(|_| values.next().is_none())
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned);
    headers.remove(name);
    value
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::Request;

    use super::*;
    use crate::request::{RequestSource, whole};

    const GOOD: &str = "0123456789abcdef0123456789abcdef";
    const OTHER: &str = "fedcba9876543210fedcba9876543210";

    fn request(fields: &[(&'static str, &str)]) -> VisitorRequest {
        let mut request = Request::get("/my-app/").body(()).expect("a request");
        for (name, value) in fields {
            let value = HeaderValue::from_str(value).expect("a value");
            request.headers_mut().append(*name, value);
        }
        let source = RequestSource {
            address: "192.0.2.1".to_owned(),
            scheme: "https".to_owned(),
            host: "id.lambda-url.us-east-1.on.aws".to_owned(),
        };
        VisitorRequest::from_http(request.into_parts().0, whole(Bytes::new()), source)
    }

    fn forwarded(secret: &str) -> [(&'static str, &str); 4] {
        [
            ("x-tunnel-edge", secret),
            ("x-tunnel-host", "tunnel.example.com"),
            ("x-tunnel-address", "2001:db8::1"),
            ("x-tunnel-target", "/other/a%2Fb?x=%20"),
        ]
    }

    #[test]
    fn the_edge_is_believed_with_any_of_its_secrets() {
        for secrets in [GOOD.to_owned(), format!("{OTHER} {GOOD}")] {
            let secrets: EdgeSecrets = secrets.parse().expect("secrets");
            let mut request = request(&forwarded(GOOD));
            assert!(secrets.apply(&mut request));
            assert_eq!(
                (&*request.host, &*request.source_ip),
                ("tunnel.example.com", "2001:db8::1")
            );
            assert_eq!(
                (&*request.path, request.query.as_deref()),
                ("/other/a%2Fb", Some("x=%20"))
            );
            assert_eq!(request.headers.len(), 1, "{:?}", request.headers);
            assert_eq!(request.headers["host"], "tunnel.example.com");
        }
    }

    #[test]
    fn nothing_is_believed_without_the_secret_and_nothing_of_it_is_passed_on() {
        let none = EdgeSecrets::default();
        let some: EdgeSecrets = GOOD.parse().expect("a secret");
        let twice = [&forwarded(GOOD)[..], &forwarded(OTHER)[..1]].concat();
        for (secrets, fields) in [
            (&none, &forwarded("")[..]),
            (&none, &forwarded(GOOD)),
            (&some, &forwarded("")),
            (&some, &forwarded(OTHER)),
            (&some, &forwarded(GOOD)[1..]),
            (&some, &twice),
        ] {
            let mut request = request(fields);
            assert!(!secrets.apply(&mut request), "{fields:?}");
            assert_eq!(
                (&*request.host, &*request.source_ip, &*request.path),
                ("id.lambda-url.us-east-1.on.aws", "192.0.2.1", "/my-app/")
            );
            assert!(request.headers.is_empty(), "{:?}", request.headers);
        }
    }

    #[test]
    fn what_is_not_an_address_is_none() {
        let secrets: EdgeSecrets = GOOD.parse().expect("a secret");
        for address in ["unknown", "", "203.0.113.9, 192.0.2.1"] {
            let mut request = request(&[("x-tunnel-edge", GOOD), ("x-tunnel-address", address)]);
            assert!(secrets.apply(&mut request));
            assert_eq!(request.source_ip, "", "{address}");
        }
    }

    #[test]
    fn a_secret_that_can_be_guessed_is_refused() {
        assert_eq!("".parse(), Ok(EdgeSecrets::default()));
        assert_eq!(GOOD[1..].parse::<EdgeSecrets>(), Err(ShortSecretError));
        assert!(format!("{GOOD} short").parse::<EdgeSecrets>().is_err());
    }
}
