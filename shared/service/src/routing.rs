//! Public addresses: which tunnel a visitor's address means, and what address a tunnel has.

use std::{borrow::Cow, fmt, str::FromStr};

use http::uri::{Authority, Scheme, Uri};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use tunnel_protocol::{id::TunnelId, url::is_loopback};

/// What a path cannot hold as it is, whatever else its sender wrote.
const NOT_IN_PATH: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'#')
    .add(b'?')
    .add(b'<')
    .add(b'>')
    .add(b'`');
/// What RFC 3986 wants encoded in a path besides.
const NOT_IN_STRICT_PATH: &AsciiSet = &NOT_IN_PATH
    .add(b'"')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'^')
    .add(b'{')
    .add(b'|')
    .add(b'}');

/// What a query cannot hold as it is, whatever else its sender wrote.
const NOT_IN_QUERY: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'<').add(b'>');

/// How public addresses name a tunnel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Routing {
    /// By the first path segment: `https://domain/{tunnel_id}/rest`.
    Path,
    /// By the host name, `https://{tunnel_id}.domain/rest`, and by the path under the domain itself.
    Subdomain,
}

/// A setting that is not one of the words it may be, or not an address.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RoutingError {
    /// Not a way of routing.
    #[error("must be path or subdomain")]
    Routing,
    /// Not an address visitors could use.
    #[error(
        "must be an http:// or https:// address without query, such as https://tunnel.example.com"
    )]
    PublicUrl,
}

impl FromStr for Routing {
    type Err = RoutingError;

    fn from_str(word: &str) -> Result<Self, RoutingError> {
        match word {
            "path" => Ok(Self::Path),
            "subdomain" => Ok(Self::Subdomain),
            _ => Err(RoutingError::Routing),
        }
    }
}

/// The address under which all tunnels of a deployment live.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PublicUrl {
    scheme: Scheme,
    authority: Authority,
    /// The host as names are compared: see [`host_name`].
    name: Box<str>,
    /// The host is this machine's own.
    is_loopback: bool,
    /// Empty, or starts with `/` and does not end with one.
    path: String,
}

impl PublicUrl {
    /// Whether only this machine can use it.
    pub fn is_loopback(&self) -> bool {
        self.is_loopback
    }

    /// Whether a host, as it stands in an address or in a `Host` field, is this one.
    pub fn has_host(&self, host: &str) -> bool {
        self.authority.as_str().eq_ignore_ascii_case(host)
    }

    /// Whether a host, whatever its port, is this one or a subdomain of it.
    pub fn covers_host(&self, host: &str) -> bool {
        let name = host_name(host);
        let label = name.strip_suffix(&*self.name);
        label.is_some_and(|label| label.is_empty() || label.ends_with('.'))
    }

    /// The path below which the tunnels are: empty, or starting with `/` and not ending with one.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The host and, unless it is the scheme's own, the port.
    pub fn authority(&self) -> &str {
        self.authority.as_str()
    }

    /// Whether a host is this one, on which others than this machine depend.
    fn is_public_host(&self, host: &str) -> bool {
        !self.is_loopback && host_name(host) == *self.name
    }

    /// `http` or `https`.
    pub fn scheme(&self) -> &str {
        self.scheme.as_str()
    }

    /// Where a tunnel is reached by path.
    pub fn by_path(&self, id: &TunnelId) -> String {
        format!("{self}/{id}")
    }

    /// The public address of a tunnel, as its agent and its owner see it.
    pub fn of(&self, id: &TunnelId, routing: Routing) -> String {
        match routing {
            Routing::Path => self.by_path(id),
            Routing::Subdomain => self.by_subdomain(id),
        }
    }

    /// Where a tunnel has a web origin of its own: under its subdomain, or on this machine under `localhost`.
    pub fn own_origin(&self, id: &TunnelId, routing: Routing) -> Option<String> {
        if routing == Routing::Subdomain {
            return Some(self.by_subdomain(id));
        }
        let parent = self.parent_of_subdomains(routing)?;
        let port = self.authority.port().map(|port| format!(":{port}"));
        let port = port.unwrap_or_default();
        Some(format!("{}://{id}.{parent}{port}", self.scheme))
    }

    /// The host, as names are compared, below which each tunnel has a name of its own. Browsers resolve all names below `localhost` to this machine.
    fn parent_of_subdomains(&self, routing: Routing) -> Option<&str> {
        match routing {
            Routing::Subdomain => Some(&self.name),
            Routing::Path if !self.is_loopback => None,
            Routing::Path if self.name.ends_with(".localhost") => Some(&self.name),
            Routing::Path => Some("localhost"),
        }
    }

    /// Where a tunnel is reached by host name.
    pub fn by_subdomain(&self, id: &TunnelId) -> String {
        format!("{}://{id}.{}", self.scheme, self.authority)
    }
}

impl fmt::Display for PublicUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme, self.authority, self.path)
    }
}

impl FromStr for PublicUrl {
    type Err = RoutingError;

    fn from_str(text: &str) -> Result<Self, RoutingError> {
        let uri: Uri = text.parse().map_err(|_| RoutingError::PublicUrl)?;
        let path = uri.path().trim_end_matches('/').to_owned();
        let parts = uri.into_parts();
        let has_query = parts
            .path_and_query
            .is_some_and(|path| path.query().is_some());
        match (parts.scheme, parts.authority) {
            (Some(scheme), Some(authority))
                if (scheme == Scheme::HTTP || scheme == Scheme::HTTPS)
                    && !has_query
                    && is_host_and_port(&authority) =>
            {
                Ok(Self {
                    scheme,
                    name: host_name(authority.as_str()).into(),
                    is_loopback: is_loopback(authority.host()),
                    authority,
                    path,
                })
            }
            _ => Err(RoutingError::PublicUrl),
        }
    }
}

/// Whether an authority is a host and, at most, a port after it. `Authority` itself takes more.
fn is_host_and_port(authority: &Authority) -> bool {
    let Some(rest) = authority.as_str().strip_prefix(authority.host()) else {
        return false;
    };
    let is_port =
        |port: &str| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok();
    !authority.host().is_empty() && (rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port))
}

/// What a visitor's address means.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Route {
    /// A tunnel.
    Tunnel {
        /// Its name.
        id: TunnelId,
        /// The part of the path that named it, which the local service does not see.
        prefix: String,
        /// The path the local service sees; starts with `/`.
        path: String,
    },
    /// A tunnel, named by path on a domain whose tunnels have subdomains: its visitors belong there, so that no tunnel shares a web
    /// origin with another.
    OwnOrigin {
        /// Its name.
        id: TunnelId,
        /// The path below its own origin; starts with `/`.
        path: String,
    },
    /// A page of ours: a path that starts with `/_`.
    Own(String),
    /// Nothing a tunnel could be named.
    None,
}

impl Route {
    /// Reads a visitor's address. `host` is the host it was sent to, with or without port; `path` is percent-encoded.
    pub fn of(routing: Routing, base: &PublicUrl, host: &str, path: &str) -> Self {
        let parent = base.parent_of_subdomains(routing);
        if let Some(label) = parent.and_then(|parent| subdomain(host, parent)) {
            return match label.parse() {
                Ok(id) => Self::Tunnel {
                    id,
                    prefix: String::new(),
                    path: rooted(path),
                },
                Err(_) => Self::None,
            };
        }
        let below = path
            .strip_prefix(&base.path)
            .filter(|rest| rest.is_empty() || rest.starts_with('/'))
            .unwrap_or(path);
        let base_path = &path[..path.len() - below.len()];
        let named = below.strip_prefix('/').unwrap_or(below);
        if named.starts_with('_') {
            return Self::Own(rooted(below));
        }
        let segment = named.split('/').next().unwrap_or_default();
        match segment.parse() {
            Ok(id) if routing == Routing::Subdomain && base.is_public_host(host) => {
                Self::OwnOrigin {
                    id,
                    path: rooted(&named[segment.len()..]),
                }
            }
            Ok(id) => Self::Tunnel {
                prefix: format!("{base_path}/{segment}"),
                id,
                path: rooted(&named[segment.len()..]),
            },
            Err(_) => Self::None,
        }
    }
}

/// The label before `.parent` in `host`, whatever its case and port.
fn subdomain(host: &str, parent: &str) -> Option<String> {
    host_name(host)
        .strip_suffix(parent)?
        .strip_suffix('.')
        .map(str::to_owned)
}

/// A host's name as names are compared: without port and final dot, in lower case.
pub fn host_name(host: &str) -> Cow<'_, str> {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Cow::Owned(name.to_ascii_lowercase())
    } else {
        Cow::Borrowed(name)
    }
}

fn rooted(path: &str) -> String {
    if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    }
}

/// Encodes what no path can hold and leaves the rest as it was sent, so that a path that needs nothing stays as it is.
pub fn encode_path(path: &str) -> Cow<'_, str> {
    utf8_percent_encode(path, NOT_IN_PATH).into()
}

/// Encodes what no query can hold and leaves the rest as it was sent.
pub fn encode_query(query: &str) -> Cow<'_, str> {
    utf8_percent_encode(query, NOT_IN_QUERY).into()
}

/// Encodes a path that an HTTP API has percent-decoded. Escapes that are still there are kept: HTTP APIs leave `%25` as it is.
/// What was `%2F` can no longer be distinguished from a separator.
pub fn encode_decoded_path(path: &str) -> String {
    let mut encoded = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        encoded.extend(utf8_percent_encode(&rest[..at], NOT_IN_STRICT_PATH));
        let is_escape = rest
            .as_bytes()
            .get(at + 1..at + 3)
            .is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit));
        encoded.push_str(if is_escape { "%" } else { "%25" });
        rest = &rest[at + 1..];
    }
    encoded.extend(utf8_percent_encode(rest, NOT_IN_STRICT_PATH));
    encoded
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn base(text: &str) -> PublicUrl {
        text.parse().expect("an address")
    }

    fn tunnel(id: &str, prefix: &str, path: &str) -> Route {
        Route::Tunnel {
            id: id.parse().expect("an id"),
            prefix: prefix.to_owned(),
            path: path.to_owned(),
        }
    }

    #[test]
    fn the_first_segment_names_the_tunnel_and_is_stripped() {
        let base = base("https://tunnel.example.com");
        for (path, expected) in [
            (
                "/abc123/api/users",
                tunnel("abc123", "/abc123", "/api/users"),
            ),
            ("/abc123", tunnel("abc123", "/abc123", "/")),
            ("/abc123/", tunnel("abc123", "/abc123", "/")),
            ("/abc123//x/", tunnel("abc123", "/abc123", "//x/")),
            (
                "/abc123/a%2Fb%20c",
                tunnel("abc123", "/abc123", "/a%2Fb%20c"),
            ),
            ("/_health", Route::Own("/_health".to_owned())),
            ("/", Route::None),
            ("/favicon.ico", Route::None),
            ("//abc123/x", Route::None),
        ] {
            assert_eq!(
                Route::of(Routing::Path, &base, "tunnel.example.com", path),
                expected,
                "{path}"
            );
        }
    }

    #[test]
    fn a_stage_before_the_tunnel_is_part_of_the_prefix() {
        let base = base("https://id.execute-api.eu-west-1.amazonaws.com/dev/");
        assert_eq!(
            Route::of(Routing::Path, &base, "", "/dev/abc123/x"),
            tunnel("abc123", "/dev/abc123", "/x")
        );
        assert_eq!(
            Route::of(Routing::Path, &base, "", "/abc123/x"),
            tunnel("abc123", "/abc123", "/x"),
            "the streaming URL has no stage"
        );
        assert_eq!(
            Route::of(Routing::Path, &base, "", "/develop/x"),
            tunnel("develop", "/develop", "/x")
        );
    }

    #[test]
    fn the_host_names_the_tunnel_where_subdomains_are_configured() {
        let base = base("https://tunnel.example.com:8443");
        let of = |host, path| Route::of(Routing::Subdomain, &base, host, path);
        assert_eq!(
            of("abc.tunnel.example.com", "/abc/x"),
            tunnel("abc", "", "/abc/x")
        );
        assert_eq!(
            of("ABC.Tunnel.Example.com:8443", "/"),
            tunnel("abc", "", "/")
        );
        assert_eq!(of("a.b.tunnel.example.com", "/"), Route::None);
        assert_eq!(
            of("evil-tunnel.example.com", "/abc/x"),
            tunnel("abc", "/abc", "/x")
        );
        assert_eq!(
            of("id.lambda-url.eu-west-1.on.aws", "/abc/x"),
            tunnel("abc", "/abc", "/x"),
            "the streaming URL has no subdomains"
        );
        assert_eq!(of("abc.tunnel.example.com.", "/x"), tunnel("abc", "", "/x"));
    }

    #[test]
    fn a_path_on_a_domain_with_subdomains_leads_to_the_tunnels_own_origin() {
        let public = base("https://tunnel.example.com:8443");
        let id = || "abc".parse().expect("an id");
        for host in [
            "tunnel.example.com",
            "Tunnel.Example.COM.:8443",
            "tunnel.example.com:443",
        ] {
            for (asked, path) in [("/abc", "/"), ("/abc/", "/"), ("/abc//x%2Fy", "//x%2Fy")] {
                assert_eq!(
                    Route::of(Routing::Subdomain, &public, host, asked),
                    Route::OwnOrigin {
                        id: id(),
                        path: path.to_owned()
                    },
                    "{host} {asked}"
                );
            }
            assert_eq!(
                Route::of(Routing::Subdomain, &public, host, "/_health"),
                Route::Own("/_health".to_owned())
            );
            assert_eq!(
                Route::of(Routing::Path, &public, host, "/abc/x"),
                tunnel("abc", "/abc", "/x")
            );
        }
        assert_eq!(
            Route::of(
                Routing::Subdomain,
                &base("http://localhost:8080"),
                "localhost:8080",
                "/abc/x"
            ),
            tunnel("abc", "/abc", "/x"),
            "one machine is one user's"
        );
    }

    #[test]
    fn a_host_is_compared_without_case_port_and_final_dot() {
        let base = base("https://T.Example.COM:8443");
        let subdomain = Route::of(Routing::Subdomain, &base, "abc.t.EXAMPLE.com", "/x");
        assert_eq!(subdomain, tunnel("abc", "", "/x"));
        for host in [
            "t.example.com",
            "T.example.com.:80",
            "a.t.example.com",
            "a.b.t.example.com.",
        ] {
            assert!(base.covers_host(host), "{host}");
        }
        for host in [
            "example.com",
            "evil-t.example.com",
            "t.example.com.evil.net",
            "",
            "localhost",
        ] {
            assert!(!base.covers_host(host), "{host}");
        }
    }

    #[test]
    fn tunnels_have_the_addresses_that_lead_to_them() {
        let id: TunnelId = "abc".parse().expect("an id");
        assert_eq!(base("https://x.com/").by_path(&id), "https://x.com/abc");
        assert_eq!(
            base("https://x.com/dev").by_path(&id),
            "https://x.com/dev/abc"
        );
        assert_eq!(
            base("http://localhost:8080").by_subdomain(&id),
            "http://abc.localhost:8080"
        );
        for invalid in [
            "x.com",
            "ftp://x.com",
            "https://",
            "https://x.com/?a",
            "https://u@x.com",
            "http://x:",
            "http://x:99999",
            "http://:80",
        ] {
            assert_eq!(
                invalid.parse::<PublicUrl>(),
                Err(RoutingError::PublicUrl),
                "{invalid}"
            );
        }
    }

    #[test]
    fn on_this_machine_tunnels_have_names_below_localhost() {
        let id: TunnelId = "my-app".parse().expect("an id");
        for (url, own_origin, host) in [
            (
                "http://127.0.0.1:8080",
                "http://my-app.localhost:8080",
                "my-app.localhost:8080",
            ),
            (
                "http://localhost",
                "http://my-app.localhost",
                "my-app.localhost",
            ),
            (
                "http://tunnel.localhost:8080",
                "http://my-app.tunnel.localhost:8080",
                "my-app.tunnel.localhost:8080",
            ),
        ] {
            let base = base(url);
            assert_eq!(
                base.own_origin(&id, Routing::Path).as_deref(),
                Some(own_origin),
                "{url}"
            );
            let route = |host, path| Route::of(Routing::Path, &base, host, path);
            assert_eq!(route(host, "/x"), tunnel("my-app", "", "/x"), "{url}");
            let own = base.authority().to_owned();
            assert_eq!(
                route(&own, "/my-app/x"),
                tunnel("my-app", "/my-app", "/x"),
                "{url}"
            );
            assert_eq!(
                route(&own, "/_health"),
                Route::Own("/_health".to_owned()),
                "{url}"
            );
        }
        assert_eq!(
            base("https://example.com").own_origin(&id, Routing::Path),
            None
        );
    }

    #[test]
    fn paths_that_a_gateway_decoded_are_encoded_again() {
        assert_eq!(
            encode_decoded_path("/caf\u{e9} \u{2615}/a?b#c"),
            "/caf%C3%A9%20%E2%98%95/a%3Fb%23c"
        );
        assert_eq!(
            encode_decoded_path("/100%/a%25b/{x}|"),
            "/100%25/a%25b/%7Bx%7D%7C"
        );
    }

    #[test]
    fn queries_are_encoded_only_where_an_address_cannot_contain_them() {
        for (sent, seen) in [
            ("a=1&b=%20+c;{}|[]^`\\'?/", "a=1&b=%20+c;{}|[]^`\\'?/"),
            ("q={job=\"x\"}&<\u{e9}>", "q={job=%22x%22}&%3C%C3%A9%3E"),
        ] {
            assert_eq!(encode_query(sent), seen);
            assert!(
                format!("/?{seen}")
                    .parse::<http::uri::PathAndQuery>()
                    .is_ok()
            );
        }
    }

    #[test]
    fn paths_as_sent_stay_as_sent() {
        for path in [
            "/a%2Fb%3F%23%25",
            "/a+b;c=1,2@:!$&'()*~",
            "/{x}|\"[]^\\",
            "/%zz",
        ] {
            assert_eq!(encode_path(path), path);
        }
    }

    proptest! {
        #[test]
        fn encoding_gives_a_valid_path_and_encoding_again_changes_nothing(path in "/.{0,60}") {
            let encoded = encode_decoded_path(&path);
            prop_assert!(encoded.parse::<http::uri::PathAndQuery>().is_ok(), "{}", encoded);
            prop_assert_eq!(encode_decoded_path(&encoded), encoded.clone());
            prop_assert!(encode_path(&path).parse::<http::uri::PathAndQuery>().is_ok());
        }
    }
}
