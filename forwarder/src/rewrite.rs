//! What has to change in a response because the visitor sees the local service under another address.

use http::{HeaderMap, HeaderValue, header, uri::Uri};
use tunnel_protocol::{
    headers::{FORWARDED_HOST, FORWARDED_PREFIX, FORWARDED_PROTO, text_to_value, value_to_text},
    url::is_loopback,
};

use crate::target::Target;

/// The address under which one visitor sees the local service, as the request's fields tell.
#[derive(Clone, Debug)]
pub struct PublicAddress {
    /// `https://host`; empty when the service did not say.
    origin: String,
    /// Empty, or starts with `/` and does not end with one.
    prefix: String,
}

impl PublicAddress {
    /// Reads it from a request.
    pub fn of(request: &HeaderMap) -> Self {
        let text = |name| {
            request
                .get(name)
                .and_then(|value: &HeaderValue| value.to_str().ok())
        };
        let origin = match (text(FORWARDED_PROTO), text(FORWARDED_HOST)) {
            (Some(proto), Some(host)) => format!("{proto}://{host}"),
            _ => String::new(),
        };
        Self {
            origin,
            prefix: text(FORWARDED_PREFIX)
                .unwrap_or_default()
                .trim_end_matches('/')
                .to_owned(),
        }
    }

    /// Rewrites `Location` and the paths of cookies that point at the local service itself. Everything else stays as it is.
    pub fn rewrite(&self, response: &mut HeaderMap, target: &Target) {
        // Byte by byte: not every service writes ASCII only.
        if let Some(location) = response.get(header::LOCATION).map(value_to_text)
            && let Some(rewritten) = self.location(&location, target)
            && let Some(value) = text_to_value(&rewritten)
        {
            response.insert(header::LOCATION, value);
        }
        if let header::Entry::Occupied(mut cookies) = response.entry(header::SET_COOKIE) {
            for cookie in cookies.iter_mut() {
                if let Some(rewritten) = self.cookie(cookie.as_bytes(), target) {
                    *cookie = rewritten;
                }
            }
        }
    }

    fn location(&self, location: &str, target: &Target) -> Option<String> {
        if location.starts_with('/') && !location.starts_with("//") {
            return self.prefixed(location);
        }
        let (scheme, after_scheme) = location.split_once("://")?;
        let (authority, rest) = after_scheme.split_at(
            after_scheme
                .find(['/', '?', '#'])
                .unwrap_or(after_scheme.len()),
        );
        let points_here = is_same_origin(&format!("{scheme}://{authority}").parse().ok()?, target);
        if !points_here || self.origin.is_empty() {
            return None;
        }
        let separator = if rest.starts_with('/') { "" } else { "/" };
        Some(format!("{}{}{separator}{rest}", self.origin, self.prefix))
    }

    /// The path with the prefix, unless it has it: a service may know of `X-Forwarded-Prefix`.
    fn prefixed(&self, path: &str) -> Option<String> {
        let has_prefix = path
            .strip_prefix(&self.prefix)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '?', '#']));
        (!self.prefix.is_empty() && !has_prefix).then(|| format!("{}{path}", self.prefix))
    }

    /// The cookie with its `Path` below the prefix and without a `Domain` that no visitor could have.
    fn cookie(&self, cookie: &[u8], target: &Target) -> Option<HeaderValue> {
        let mut changed = false;
        let attributes: Vec<Vec<u8>> = cookie
            .split(|&byte| byte == b';')
            .enumerate()
            .filter_map(|(at, attribute)| {
                let (name, value) = std::str::from_utf8(attribute)
                    .ok()
                    .and_then(|text| text.split_once('='))
                    .unwrap_or_default();
                let (name, value) = (name.trim(), value.trim());
                if at > 0 && name.eq_ignore_ascii_case("path") && value.starts_with('/') {
                    let path = if value == "/" && !self.prefix.is_empty() {
                        Some(self.prefix.clone())
                    } else {
                        self.prefixed(value)
                    };
                    if let Some(path) = path {
                        changed = true;
                        return Some(format!(" {name}={path}").into_bytes());
                    }
                }
                if at > 0
                    && name.eq_ignore_ascii_case("domain")
                    && value
                        .trim_start_matches('.')
                        .eq_ignore_ascii_case(target.authority.host())
                {
                    changed = true;
                    return None;
                }
                Some(attribute.to_vec())
            })
            .collect();
        changed
            .then(|| HeaderValue::from_bytes(&attributes.join(&b';')).ok())
            .flatten()
    }
}

/// Whether an address is the target's, under whichever name of this machine.
fn is_same_origin(uri: &Uri, target: &Target) -> bool {
    let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
        return false;
    };
    let port = |authority: &http::uri::Authority, scheme: &http::uri::Scheme| {
        authority
            .port_u16()
            .unwrap_or(if *scheme == http::uri::Scheme::HTTPS {
                443
            } else {
                80
            })
    };
    let is_here = |host: &str| is_loopback(host) || host == "0.0.0.0";
    let same_host = authority
        .host()
        .eq_ignore_ascii_case(target.authority.host())
        || (is_here(authority.host()) && is_here(target.authority.host()));
    *scheme == target.scheme
        && same_host
        && port(authority, scheme) == port(&target.authority, &target.scheme)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(prefix: &str) -> PublicAddress {
        PublicAddress {
            origin: "https://t.example.com".to_owned(),
            prefix: prefix.to_owned(),
        }
    }

    fn rewritten(prefix: &str, name: header::HeaderName, value: &'static str) -> String {
        let mut response = HeaderMap::from_iter([(name.clone(), HeaderValue::from_static(value))]);
        address(prefix).rewrite(&mut response, &"localhost:3000".parse().expect("a target"));
        String::from_utf8_lossy(response[name].as_bytes()).into_owned()
    }

    #[test]
    fn locations_at_the_local_service_become_public() {
        for (location, by_path, by_host) in [
            (
                "/login?next=/x#y",
                "/abc/login?next=/x#y",
                "/login?next=/x#y",
            ),
            ("/", "/abc/", "/"),
            ("/abc/x", "/abc/x", "/abc/x"),
            ("/abcd", "/abc/abcd", "/abcd"),
            (
                "http://localhost:3000/a#b",
                "https://t.example.com/abc/a#b",
                "https://t.example.com/a#b",
            ),
            (
                "http://127.0.0.1:3000",
                "https://t.example.com/abc/",
                "https://t.example.com/",
            ),
            (
                "http://127.0.0.1:3001/x",
                "http://127.0.0.1:3001/x",
                "http://127.0.0.1:3001/x",
            ),
            (
                "https://example.com/x",
                "https://example.com/x",
                "https://example.com/x",
            ),
            ("//example.com/x", "//example.com/x", "//example.com/x"),
            ("next", "next", "next"),
        ] {
            assert_eq!(
                rewritten("/abc", header::LOCATION, location),
                by_path,
                "{location} by path"
            );
            assert_eq!(
                rewritten("", header::LOCATION, location),
                by_host,
                "{location} by host name"
            );
        }
    }

    #[test]
    fn a_location_that_is_not_ascii_stays_in_the_tunnel_too() {
        for (location, by_path) in [
            ("/\u{fc}n\u{ef}code?x#y", "/abc/\u{fc}n\u{ef}code?x#y"),
            (
                "http://localhost:3000/\u{fc}",
                "https://t.example.com/abc/\u{fc}",
            ),
        ] {
            let value = HeaderValue::from_bytes(location.as_bytes()).expect("a value");
            let mut response = HeaderMap::from_iter([(header::LOCATION, value)]);
            address("/abc").rewrite(&mut response, &"localhost:3000".parse().expect("a target"));
            assert_eq!(
                response[header::LOCATION].as_bytes(),
                by_path.as_bytes(),
                "{location}"
            );
        }
    }

    #[test]
    fn cookies_stay_in_the_tunnel_and_are_otherwise_untouched() {
        for (cookie, by_path) in [
            ("a=1; Path=/; HttpOnly", "a=1; Path=/abc; HttpOnly"),
            (
                "a=1;path=/x;Expires=Wed, 21 Oct 2026 07:28:00 GMT",
                "a=1; path=/abc/x;Expires=Wed, 21 Oct 2026 07:28:00 GMT",
            ),
            ("path=/; Secure", "path=/; Secure"),
            ("a=1; Domain=localhost; Max-Age=1", "a=1; Max-Age=1"),
            ("a=1; Domain=example.com", "a=1; Domain=example.com"),
            ("a=\"x; y\"", "a=\"x; y\""),
        ] {
            assert_eq!(
                rewritten("/abc", header::SET_COOKIE, cookie),
                by_path,
                "{cookie}"
            );
        }
        assert_eq!(
            rewritten("", header::SET_COOKIE, "a=1; Path=/"),
            "a=1; Path=/"
        );
    }
}
