//! One mapping between the two addresses of a local service: its own, and the public one that visitors use.
//!
//! Requests are mapped from public to own, responses from own to public, each address by the same rule, so that there and back is the
//! identity. Addresses of others are never touched, and bodies neither. docs/agent.md has the table of fields.

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header,
    uri::{Authority, Scheme},
};
use tunnel_protocol::{
    headers::{FORWARDED_HOST, FORWARDED_PREFIX, FORWARDED_PROTO, text_to_value, value_to_text},
    message::HttpRequest,
    url::is_loopback,
};

use crate::{
    settings::HostHeader,
    target::{Target, TargetTransport},
};

/// Where WebDAV's COPY and MOVE put the resource (RFC 4918, 10.3).
const DESTINATION: HeaderName = HeaderName::from_static("destination");

/// The two addresses of the local service, as one request sees them.
#[derive(Clone, Debug)]
pub struct Addresses {
    own: Own,
    public: Option<Public>,
    /// What visitors have before the local service's path: empty, or starts with `/` and does not end with one.
    prefix: String,
    /// The requested address, if a redirect to the same place would be a loop.
    requested: Option<String>,
    /// The local service has paths of its own that begin like the prefix.
    has_paths_like_prefix: bool,
}

/// The names under which the local service knows itself.
#[derive(Clone, Debug)]
struct Own {
    /// What it gets as `Host`, unless that is the visitor's.
    host_header: Option<HeaderValue>,
    /// Its scheme and `Host`, for the addresses that it gets.
    origin: String,
    scheme: Scheme,
    hosts: Vec<Host>,
    /// Every name of this machine is one of its names, with the port of the first of `hosts`.
    is_loopback: bool,
}

/// The address under which the visitor sees the local service.
#[derive(Clone, Debug)]
struct Public {
    scheme: Scheme,
    /// Host and port, as written.
    authority: String,
    host: Host,
}

/// A host in lower case, and its port unless that is the scheme's own.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Host {
    name: String,
    port: Option<u16>,
}

/// An address with a host, in its parts.
#[derive(Clone, Debug)]
struct Absolute<'a> {
    /// Absent in `//host/path`.
    scheme: Option<Scheme>,
    host: Host,
    /// Path, query and fragment.
    rest: &'a str,
}

/// Which reading of a path that begins with the prefix is right.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Reading {
    /// A place to go to: one that leads back to where the visitor is cannot be meant.
    Redirect,
    /// Anything else.
    Reference,
}

impl Addresses {
    /// The addresses that belong to a request.
    pub fn of(request: &HttpRequest, target: &Target, host_header: &HostHeader) -> Self {
        let text = |name| {
            let value = request.headers.get(name);
            value.and_then(|value: &HeaderValue| value.to_str().ok())
        };
        let public = Public::new(text(FORWARDED_PROTO), text(FORWARDED_HOST));
        let prefix = text(FORWARDED_PREFIX).unwrap_or_default();
        let prefix = prefix.trim_end_matches('/').to_owned();
        let is_safe = matches!(request.method.parse(), Ok(Method::GET | Method::HEAD));
        Self {
            own: Own::new(target, host_header),
            public,
            requested: is_safe.then(|| request.uri.clone()),
            has_paths_like_prefix: below(&request.uri, &prefix).is_some(),
            prefix,
        }
    }

    /// Makes the fields of a request those that the local service would get at its own address.
    pub fn to_own(&self, fields: &mut HeaderMap) {
        map_field(fields, &DESTINATION, |address| self.own_address(address));
        let Some(host) = &self.own.host_header else {
            // With the visitor's Host the local service is at the visitor's address.
            return;
        };
        fields.insert(header::HOST, host.clone());
        map_field(fields, &header::REFERER, |address| {
            self.own_address(address)
        });
        if map_field(fields, &header::ORIGIN, |origin| self.own_origin(origin)) {
            // Who compares the origin with this field would find two different hosts.
            fields.remove(FORWARDED_HOST);
        }
    }

    /// Makes the fields of a response those that a visitor can use.
    pub fn to_public(&self, status: StatusCode, fields: &mut HeaderMap) {
        let reading = if status.is_redirection() {
            Reading::Redirect
        } else {
            Reading::Reference
        };
        let address = |address: &str| self.public_address(address, Reading::Reference);
        map_field(fields, &header::LOCATION, |address| {
            self.public_address(address, reading)
        });
        map_field(fields, &header::CONTENT_LOCATION, address);
        map_field(fields, &header::REFRESH, |value| refresh(value, address));
        map_field(fields, &header::LINK, |value| links(value, address));
        map_field(fields, &header::SET_COOKIE, |cookie| self.cookie(cookie));
        map_field(fields, &header::ACCESS_CONTROL_ALLOW_ORIGIN, |origin| {
            self.public_origin(origin)
        });
    }

    /// A public address as the local service's own.
    fn own_address(&self, address: &str) -> Option<String> {
        if is_path(address) {
            return below(address, &self.prefix)
                .filter(|_| !self.prefix.is_empty())
                .map(rooted);
        }
        let absolute = Absolute::parse(address)?;
        if !self.public.as_ref()?.has(&absolute) {
            return None;
        }
        let path = below(absolute.rest, &self.prefix)?;
        if self.own.host_header.is_none() {
            let origin = address.strip_suffix(absolute.rest)?;
            return Some(format!("{origin}{}", rooted(path)));
        }
        Some(format!("{}{}", self.own.origin, rooted(path)))
    }

    fn own_origin(&self, origin: &str) -> Option<String> {
        let absolute = Absolute::parse(origin).filter(|absolute| absolute.rest.is_empty())?;
        let public = self.public.as_ref()?;
        let is_ours = public.has(&absolute) && absolute.scheme.as_ref() == Some(&public.scheme);
        is_ours.then(|| self.own.origin.clone())
    }

    /// One of the local service's own addresses as the visitor's.
    fn public_address(&self, address: &str, reading: Reading) -> Option<String> {
        if is_path(address) {
            return self.prefixed(address, reading);
        }
        let absolute = Absolute::parse(address)?;
        let public = self.public.as_ref()?;
        if public.has(&absolute) {
            // A service that believes X-Forwarded-Host knows the public host, and seldom the prefix.
            let path = rooted(absolute.rest);
            let origin = address.strip_suffix(absolute.rest)?;
            return Some(format!("{origin}{}", self.prefixed(&path, reading)?));
        }
        if !self.own.has(&absolute) {
            return None;
        }
        let path = rooted(absolute.rest);
        let Public {
            scheme, authority, ..
        } = public;
        Some(match absolute.scheme {
            Some(_) => format!("{scheme}://{authority}{}{path}", self.prefix),
            None => format!("//{authority}{}{path}", self.prefix),
        })
    }

    fn public_origin(&self, origin: &str) -> Option<String> {
        let absolute = Absolute::parse(origin).filter(|absolute| absolute.rest.is_empty())?;
        let Public {
            scheme, authority, ..
        } = self.public.as_ref()?;
        self.own
            .has(&absolute)
            .then(|| format!("{scheme}://{authority}"))
    }

    /// A path of the local service behind the prefix, unless it has that already: the service may know X-Forwarded-Prefix.
    ///
    /// A service that has paths of its own that begin like the prefix does not know it, as far as one can tell: that is so when it is
    /// asked for one of them, and when its redirect would otherwise lead back to what was asked for.
    fn prefixed(&self, path: &str, reading: Reading) -> Option<String> {
        if self.prefix.is_empty() {
            return None;
        }
        let knows_prefix = below(path, &self.prefix).is_some_and(|rest| {
            let leads_back = reading == Reading::Redirect
                && self.requested.as_deref() == rooted(rest).split('#').next();
            !self.has_paths_like_prefix && !leads_back
        });
        (!knows_prefix).then(|| format!("{}{path}", self.prefix))
    }

    /// A cookie with its `Path` behind the prefix, and without a `Domain` that no visitor's browser would accept.
    fn cookie(&self, cookie: &str) -> Option<String> {
        let name = cookie.split('=').next().unwrap_or_default().trim();
        let keeps_path = name
            .get(.."__Host-".len())
            .is_some_and(|start| start.eq_ignore_ascii_case("__Host-"));
        let mut has_changed = false;
        let mut attributes = cookie.split(';');
        let mut mapped = attributes.next().unwrap_or_default().to_owned();
        for attribute in attributes {
            let (name, value) = attribute.split_once('=').unwrap_or_default();
            let value = value.trim();
            let is = |wanted: &str| name.trim().eq_ignore_ascii_case(wanted);
            if is("domain") && self.is_own_domain(value) {
                has_changed = true;
                continue;
            }
            mapped.push(';');
            let path = if is("path") && !keeps_path && value.starts_with('/') {
                self.cookie_path(value)
            } else {
                None
            };
            if let Some(path) = path {
                has_changed = true;
                mapped.push_str(&format!("{name}={path}"));
            } else {
                mapped.push_str(attribute);
            }
        }
        has_changed.then_some(mapped)
    }

    fn cookie_path(&self, path: &str) -> Option<String> {
        if path == "/" && !self.prefix.is_empty() {
            return Some(self.prefix.clone());
        }
        self.prefixed(path, Reading::Reference)
    }

    fn is_own_domain(&self, domain: &str) -> bool {
        let domain = Host::parse(domain.trim_start_matches('.'));
        domain.is_some_and(|domain| self.own.has_name(&domain.name))
    }
}

impl Own {
    fn new(target: &Target, host_header: &HostHeader) -> Self {
        let authority = target.authority.as_str();
        let host_header = match host_header {
            HostHeader::Rewrite => HeaderValue::from_str(authority).ok(),
            HostHeader::Fixed(host) => Some(host.clone()),
            HostHeader::Preserve => None,
        };
        let sent = host_header.as_ref().and_then(|host| host.to_str().ok());
        let origin = format!("{}://{}", target.scheme, sent.unwrap_or(authority));
        let here = Host::of(&target.authority, &target.scheme);
        let is_loopback = target.transport != TargetTransport::Tcp || is_this_machine(&here.name);
        let mut hosts = vec![here];
        let sent = sent.and_then(Host::parse);
        if let Some(sent) = sent.map(|sent| sent.without_default(&target.scheme)) {
            // A service may add its port to a host that was sent without one.
            let port = hosts[0].port;
            hosts.extend([
                Host {
                    port,
                    ..sent.clone()
                },
                sent,
            ]);
        }
        Self {
            host_header,
            origin,
            scheme: target.scheme.clone(),
            hosts,
            is_loopback,
        }
    }

    /// Whether an address is the service's own, over whichever scheme: it may believe X-Forwarded-Proto.
    fn has(&self, address: &Absolute<'_>) -> bool {
        let scheme = address.scheme.as_ref().unwrap_or(&self.scheme);
        let has_port = |host: &Host| host.has_port_of(&address.host, scheme);
        self.hosts
            .iter()
            .any(|host| host.name == address.host.name && has_port(host))
            || (self.is_loopback && is_this_machine(&address.host.name) && has_port(&self.hosts[0]))
    }

    fn has_name(&self, name: &str) -> bool {
        self.hosts.iter().any(|host| host.name == name)
            || (self.is_loopback && is_this_machine(name))
    }
}

impl Public {
    /// The address that the service says the visitor used; none if it did not say.
    fn new(scheme: Option<&str>, authority: Option<&str>) -> Option<Self> {
        let scheme = scheme?.parse().ok()?;
        let authority = authority?.to_owned();
        let host = Host::parse(&authority)?.without_default(&scheme);
        Some(Self {
            scheme,
            authority,
            host,
        })
    }

    /// Whether an address has the public host, over whichever scheme: the local service may not know which one visitors use.
    fn has(&self, address: &Absolute<'_>) -> bool {
        let scheme = address.scheme.as_ref().unwrap_or(&self.scheme);
        self.host.name == address.host.name && self.host.has_port_of(&address.host, scheme)
    }
}

impl Host {
    fn of(authority: &Authority, scheme: &Scheme) -> Self {
        let host = Self {
            name: normal_name(authority.host()),
            port: authority.port_u16(),
        };
        host.without_default(scheme)
    }

    fn parse(text: &str) -> Option<Self> {
        let end_of_name = text.find(']').map_or(0, |bracket| bracket + 1);
        let (name, port) = match text[end_of_name..].find(':') {
            None => (text, None),
            Some(colon) => {
                let (name, port) = text.split_at(end_of_name + colon);
                (name, Some(port[1..].parse().ok()?))
            }
        };
        let is_name = !name.is_empty() && !name.contains(['@', '\\', ' ']);
        is_name.then(|| Self {
            name: normal_name(name),
            port,
        })
    }

    fn without_default(self, scheme: &Scheme) -> Self {
        let port = self.port.filter(|port| *port != default_port(scheme));
        Self { port, ..self }
    }

    /// Whether another host, in an address of this scheme, has this one's port. Without a port that is the default of any scheme.
    fn has_port_of(&self, other: &Self, scheme: &Scheme) -> bool {
        let default = default_port(scheme);
        other.port.unwrap_or(default) == self.port.unwrap_or(default)
    }
}

impl<'a> Absolute<'a> {
    /// An `http` or `https` address, or one that leaves the scheme open. Addresses with a user name are left to others.
    fn parse(address: &'a str) -> Option<Self> {
        let (scheme, after) = match address.strip_prefix("//") {
            Some(after) => (None, after),
            None => {
                let (scheme, after) = address.split_once("://")?;
                let scheme = match scheme.to_ascii_lowercase().as_str() {
                    "http" => Scheme::HTTP,
                    "https" => Scheme::HTTPS,
                    _ => return None,
                };
                (Some(scheme), after)
            }
        };
        let (authority, rest) =
            after.split_at(after.find(['/', '?', '#', '\\']).unwrap_or(after.len()));
        Some(Self {
            scheme,
            host: Host::parse(authority)?,
            rest,
        })
    }
}

fn default_port(scheme: &Scheme) -> u16 {
    if *scheme == Scheme::HTTPS { 443 } else { 80 }
}

/// A host as it is compared: case and a final dot do not count.
fn normal_name(host: &str) -> String {
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

/// Whether a host is this machine: a loopback name, or the address that a service listens on to mean all of its addresses.
fn is_this_machine(host: &str) -> bool {
    is_loopback(host) || matches!(host, "0.0.0.0" | "[::]")
}

/// Whether an address is a path alone. Browsers take `\` for `/`.
fn is_path(address: &str) -> bool {
    address.starts_with('/') && !address[1..].starts_with(['/', '\\'])
}

/// What follows the prefix in a path that begins with it.
fn below<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    path.strip_prefix(prefix)
        .filter(|rest| rest.is_empty() || rest.starts_with(['/', '?', '#']))
}

/// A path with the `/` that it may be written without.
fn rooted(path: &str) -> String {
    if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    }
}

/// Maps all values of a field, byte by byte: not every service writes ASCII only. Returns whether one has changed.
fn map_field(
    fields: &mut HeaderMap,
    name: &HeaderName,
    map: impl Fn(&str) -> Option<String>,
) -> bool {
    let header::Entry::Occupied(mut values) = fields.entry(name) else {
        return false;
    };
    let mut has_changed = false;
    for value in values.iter_mut() {
        if let Some(mapped) = map(&value_to_text(value)).and_then(|text| text_to_value(&text)) {
            *value = mapped;
            has_changed = true;
        }
    }
    has_changed
}

/// Maps the address in `5; url=/next`.
fn refresh(value: &str, map: impl Fn(&str) -> Option<String>) -> Option<String> {
    let (delay, parameter) = value.split_at(value.find([';', ','])?);
    let (name, address) = parameter.split_once('=')?;
    if !name[1..].trim().eq_ignore_ascii_case("url") {
        return None;
    }
    let address = address.trim();
    let quote = if address.starts_with(['"', '\'']) {
        &address[..1]
    } else {
        ""
    };
    let address = address.strip_prefix(quote)?;
    let address = address.strip_suffix(quote).unwrap_or(address);
    Some(format!("{delay}{name}={quote}{}{quote}", map(address)?))
}

/// Maps the addresses in `<...>` that are not within a quoted text (RFC 8288, 3).
fn links(value: &str, map: impl Fn(&str) -> Option<String>) -> Option<String> {
    let mut mapped = String::with_capacity(value.len());
    let mut has_changed = false;
    let mut rest = value;
    let mut is_quoted = false;
    while let Some(at) = rest.find(['<', '"', '\\']) {
        let (before, found) = rest.split_at(at);
        mapped.push_str(before);
        let length = match found.as_bytes()[0] {
            b'"' => {
                is_quoted = !is_quoted;
                1
            }
            b'\\' if is_quoted => found.chars().take(2).map(char::len_utf8).sum(),
            b'<' if !is_quoted => match found.find('>') {
                Some(end) => {
                    if let Some(address) = map(&found[1..end]) {
                        has_changed = true;
                        mapped.push_str(&format!("<{address}>"));
                        rest = &found[end + 1..];
                        continue;
                    }
                    end + 1
                }
                None => found.len(),
            },
            _ => 1,
        };
        mapped.push_str(&found[..length]);
        rest = &found[length..];
    }
    mapped.push_str(rest);
    has_changed.then_some(mapped)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tunnel_protocol::{id::RequestId, message::Body};

    use super::*;

    const PUBLIC: &str = "https://t.example.com";

    /// One exchange with the tunnel `abc` on `t.example.com`.
    #[derive(Debug)]
    struct Exchange {
        target: &'static str,
        host_header: &'static str,
        prefix: &'static str,
        request: &'static str,
    }

    const BY_PATH: Exchange = Exchange {
        target: "3000",
        host_header: "rewrite",
        prefix: "/abc",
        request: "GET /start",
    };
    const BY_SUBDOMAIN: Exchange = Exchange {
        prefix: "",
        ..BY_PATH
    };

    impl Exchange {
        fn request(&self) -> HttpRequest {
            let (method, uri) = self.request.split_once(' ').expect("method and path");
            let fields = [
                ("host", "t.example.com"),
                ("x-forwarded-proto", "https"),
                ("x-forwarded-host", "t.example.com"),
                ("x-forwarded-prefix", self.prefix),
            ];
            HttpRequest {
                request_id: RequestId::generate(),
                method: method.to_owned(),
                uri: uri.to_owned(),
                headers: fields
                    .iter()
                    .filter(|(_, value)| !value.is_empty())
                    .map(|(name, value)| {
                        (
                            HeaderName::from_static(name),
                            HeaderValue::from_static(value),
                        )
                    })
                    .collect(),
                upgrade: None,
                websocket: None,
                body: Body::default(),
                encoding: None,
                timestamp: 0,
                more: false,
                deadline_ms: 0,
                reply_to: None,
            }
        }

        fn addresses(&self) -> Addresses {
            Addresses::of(
                &self.request(),
                &self.target.parse().expect("a target"),
                &self.host_header.parse().expect("a mode"),
            )
        }

        /// What a visitor gets for a field of the local service.
        fn returned(&self, status: u16, name: &'static str, value: &str) -> String {
            let value = text_to_value(value).expect("a value");
            let mut fields = HeaderMap::from_iter([(HeaderName::from_static(name), value)]);
            let status = StatusCode::from_u16(status).expect("a status");
            self.addresses().to_public(status, &mut fields);
            value_to_text(&fields[name])
        }

        /// What the local service gets for a field of a visitor.
        fn sent(&self, name: &'static str, value: &str) -> String {
            let mut fields = self.request().headers;
            fields.insert(name, text_to_value(value).expect("a value"));
            self.addresses().to_own(&mut fields);
            value_to_text(&fields[name])
        }

        fn location(&self, value: &str) -> String {
            self.returned(302, "location", value)
        }
    }

    #[test]
    fn addresses_of_the_local_service_become_public() {
        for (address, by_path, by_subdomain) in [
            (
                "/login?next=/x#y",
                "/abc/login?next=/x#y",
                "/login?next=/x#y",
            ),
            ("/", "/abc/", "/"),
            ("/abc/x", "/abc/x", "/abc/x"),
            ("/abcd", "/abc/abcd", "/abcd"),
            (
                "http://127.0.0.1:3000",
                "https://t.example.com/abc/",
                "https://t.example.com/",
            ),
            (
                "http://LocalHost:3000/a#b",
                "https://t.example.com/abc/a#b",
                "https://t.example.com/a#b",
            ),
            (
                "HTTPS://[::1]:3000/a",
                "https://t.example.com/abc/a",
                "https://t.example.com/a",
            ),
            (
                "http://0.0.0.0:3000?q",
                "https://t.example.com/abc/?q",
                "https://t.example.com/?q",
            ),
            (
                "//127.0.0.1:3000/x",
                "//t.example.com/abc/x",
                "//t.example.com/x",
            ),
            ("/\u{fc}", "/abc/\u{fc}", "/\u{fc}"),
        ] {
            assert_eq!(BY_PATH.location(address), by_path, "{address} by path");
            assert_eq!(
                BY_SUBDOMAIN.location(address),
                by_subdomain,
                "{address} by subdomain"
            );
        }
    }

    #[test]
    fn public_addresses_get_the_prefix_that_a_service_cannot_know() {
        for (address, by_path) in [
            ("https://t.example.com/x", "https://t.example.com/abc/x"),
            ("http://T.example.com:80/x", "http://T.example.com:80/abc/x"),
            ("//t.example.com/x", "//t.example.com/abc/x"),
            ("https://t.example.com/abc/x", "https://t.example.com/abc/x"),
        ] {
            assert_eq!(BY_PATH.location(address), by_path, "{address}");
            assert_eq!(BY_SUBDOMAIN.location(address), address);
        }
    }

    #[test]
    fn addresses_of_others_are_never_touched() {
        for address in [
            "next",
            "?page=2",
            "http://127.0.0.1:3001/x",
            "https://example.com/x",
            "//example.com/x",
            "/\\example.com/x",
            "http://user@127.0.0.1:3000/x",
            "http://127.0.0.1:3000@example.com/x",
            "http://127.0.0.1:3000.example.com/x",
            "https://t.example.com:444/x",
            "ftp://127.0.0.1:3000/x",
            "mailto:a@127.0.0.1:3000",
            "",
        ] {
            for exchange in [BY_PATH, BY_SUBDOMAIN] {
                assert_eq!(exchange.location(address), address);
                assert_eq!(exchange.sent("destination", address), address);
            }
        }
    }

    #[test]
    fn the_host_that_was_sent_is_the_local_services_own() {
        let fixed = Exchange {
            host_header: "myapp.test",
            ..BY_PATH
        };
        for address in [
            "http://myapp.test/login",
            "https://MyApp.test./login",
            "http://myapp.test:3000/login",
            "http://localhost:3000/login",
        ] {
            assert_eq!(
                fixed.location(address),
                "https://t.example.com/abc/login",
                "{address}"
            );
        }
        assert_eq!(
            fixed.location("http://myapp.test:8080/"),
            "http://myapp.test:8080/"
        );
        let cookie = "a=1; path=/; domain=myapp.test";
        assert_eq!(fixed.returned(200, "set-cookie", cookie), "a=1; path=/abc");

        let preserved = Exchange {
            host_header: "preserve",
            ..BY_PATH
        };
        assert_eq!(
            preserved.location("http://t.example.com/login"),
            "http://t.example.com/abc/login"
        );
        let remote = Exchange {
            target: "http://app.test:80",
            ..BY_PATH
        };
        assert_eq!(
            remote.location("https://app.test/x"),
            "https://t.example.com/abc/x"
        );
        assert_eq!(remote.location("http://127.0.0.1/x"), "http://127.0.0.1/x");
    }

    #[test]
    fn a_tunnel_named_like_a_path_of_the_service_does_not_loop() {
        let at = |request| Exchange {
            prefix: "/admin",
            request,
            ..BY_PATH
        };
        // The service does not know the prefix: /admin/ is a path of its own.
        assert_eq!(at("GET /").location("/admin/"), "/admin/admin/");
        assert_eq!(at("HEAD /").location("/admin"), "/admin/admin");
        assert_eq!(
            at("GET /x?a=1").location("/admin/x?a=1#top"),
            "/admin/admin/x?a=1#top"
        );
        assert_eq!(
            at("GET /").location("https://t.example.com/admin/"),
            "https://t.example.com/admin/admin/"
        );
        for path in ["/admin/login", "/admin/"] {
            assert_eq!(
                at("GET /admin/users").location(path),
                format!("/admin{path}")
            );
        }
        // It knows the prefix.
        assert_eq!(at("GET /").location("/admin/login"), "/admin/login");
        assert_eq!(at("POST /form").location("/admin/form"), "/admin/form");
        assert_eq!(
            at("GET /").returned(200, "content-location", "/admin/"),
            "/admin/"
        );
        assert_eq!(
            at("GET /").returned(200, "set-cookie", "a=1; Path=/admin"),
            "a=1; Path=/admin"
        );
    }

    #[test]
    fn every_field_with_an_address_is_mapped() {
        for (name, value, mapped) in [
            ("content-location", "/a.json", "/abc/a.json"),
            ("refresh", "5; url=/next", "5; url=/abc/next"),
            (
                "refresh",
                "0;URL='http://localhost:3000/'",
                "0;URL='https://t.example.com/abc/'",
            ),
            ("refresh", "5", "5"),
            (
                "refresh",
                "5; url=https://example.com/",
                "5; url=https://example.com/",
            ),
            (
                "link",
                "</a.css>; rel=preload, <https://example.com/>; title=\"</x>\\\"</y>\", <http://127.0.0.1:3000/?page=2>; rel=next",
                "</abc/a.css>; rel=preload, <https://example.com/>; title=\"</x>\\\"</y>\", <https://t.example.com/abc/?page=2>; rel=next",
            ),
            ("link", "</a", "</a"),
            (
                "access-control-allow-origin",
                "http://127.0.0.1:3000",
                PUBLIC,
            ),
            ("access-control-allow-origin", "*", "*"),
            (
                "access-control-allow-origin",
                "https://example.com",
                "https://example.com",
            ),
            ("x-other", "/a", "/a"),
        ] {
            assert_eq!(
                BY_PATH.returned(200, name, value),
                mapped,
                "{name}: {value}"
            );
        }
    }

    #[test]
    fn cookies_stay_in_the_tunnel_and_are_otherwise_untouched() {
        for (cookie, by_path) in [
            ("a=1; Path=/; HttpOnly", "a=1; Path=/abc; HttpOnly"),
            (
                "a=1;path=/x;Expires=Wed, 21 Oct 2026 07:28:00 GMT",
                "a=1;path=/abc/x;Expires=Wed, 21 Oct 2026 07:28:00 GMT",
            ),
            ("path=/; Secure", "path=/; Secure"),
            ("a=\u{fc}; Path=/", "a=\u{fc}; Path=/abc"),
            ("a=1; Domain=127.0.0.1; Max-Age=1", "a=1; Max-Age=1"),
            ("a=1; Domain=localhost", "a=1"),
            ("a=1; domain=.App.Localhost", "a=1"),
            ("a=1; Domain=127.0.0.1:3000", "a=1"),
            ("a=1; Domain=example.com", "a=1; Domain=example.com"),
            ("a=1; Domain=t.example.com", "a=1; Domain=t.example.com"),
            ("a=\"x; y\"", "a=\"x; y\""),
            ("__Host-a=1; Path=/; Secure", "__Host-a=1; Path=/; Secure"),
            ("__hOST-a=1; Path=/; Secure", "__hOST-a=1; Path=/; Secure"),
            (
                "__Secure-a=1; Path=/; Secure",
                "__Secure-a=1; Path=/abc; Secure",
            ),
        ] {
            assert_eq!(
                BY_PATH.returned(200, "set-cookie", cookie),
                by_path,
                "{cookie}"
            );
        }
        assert_eq!(
            BY_SUBDOMAIN.returned(200, "set-cookie", "a=1; Path=/"),
            "a=1; Path=/"
        );
    }

    #[test]
    fn requests_reach_the_local_service_with_its_own_address() {
        for (name, value, by_path) in [
            ("host", "t.example.com", "127.0.0.1:3000"),
            ("origin", PUBLIC, "http://127.0.0.1:3000"),
            (
                "origin",
                "https://T.EXAMPLE.com:443",
                "http://127.0.0.1:3000",
            ),
            ("origin", "http://t.example.com", "http://t.example.com"),
            ("origin", "https://example.com", "https://example.com"),
            ("origin", "null", "null"),
            (
                "referer",
                "https://t.example.com/abc/x?y",
                "http://127.0.0.1:3000/x?y",
            ),
            (
                "referer",
                "https://t.example.com/other/x",
                "https://t.example.com/other/x",
            ),
            (
                "destination",
                "https://t.example.com/abc/b.bin",
                "http://127.0.0.1:3000/b.bin",
            ),
            ("destination", "/abc/b.bin", "/b.bin"),
            ("destination", "/abc", "/"),
            ("destination", "/b.bin", "/b.bin"),
        ] {
            assert_eq!(BY_PATH.sent(name, value), by_path, "{name}: {value}");
        }
        assert_eq!(
            BY_SUBDOMAIN.sent("destination", "https://t.example.com/b"),
            "http://127.0.0.1:3000/b"
        );
        assert_eq!(BY_SUBDOMAIN.sent("destination", "/b"), "/b");
    }

    #[test]
    fn with_the_visitors_host_only_the_prefix_of_a_destination_is_mapped() {
        let preserved = Exchange {
            host_header: "preserve",
            ..BY_PATH
        };
        for (name, value, mapped) in [
            ("host", "t.example.com", "t.example.com"),
            ("origin", PUBLIC, PUBLIC),
            (
                "referer",
                "https://t.example.com/abc/x",
                "https://t.example.com/abc/x",
            ),
            (
                "destination",
                "https://t.example.com/abc/b",
                "https://t.example.com/b",
            ),
            ("destination", "/abc/b", "/b"),
        ] {
            assert_eq!(preserved.sent(name, value), mapped, "{name}: {value}");
        }
    }

    #[test]
    fn a_mapped_origin_is_not_contradicted_by_the_forwarded_host() {
        let sent = |origin: &'static str| {
            let mut fields = BY_PATH.request().headers;
            fields.insert(header::ORIGIN, HeaderValue::from_static(origin));
            BY_PATH.addresses().to_own(&mut fields);
            fields.contains_key(FORWARDED_HOST)
        };
        assert!(!sent(PUBLIC));
        assert!(sent("https://example.com"));
    }

    fn exchange() -> impl Strategy<Value = Exchange> {
        let target = prop::sample::select(vec![
            "3000",
            "https://app.test:8443",
            "localhost:80",
            "unix:/x",
        ]);
        let host_header = prop::sample::select(vec!["rewrite", "myapp.test", "myapp.test:81"]);
        let prefix = prop::sample::select(vec!["", "/abc"]);
        (target, host_header, prefix).prop_map(|(target, host_header, prefix)| Exchange {
            target,
            host_header,
            prefix,
            ..BY_PATH
        })
    }

    proptest! {
        #[test]
        fn there_and_back_is_the_identity(exchange in exchange(), path in "/([a-z%.]{1,9}(/[a-z]{0,3}){0,2})?([?][a-z=/]{0,5})?(#[a-z]{0,3})?") {
            let public = format!("{PUBLIC}{}{path}", exchange.prefix);
            let own = exchange.sent("destination", &public);
            prop_assert_ne!(&own, &public);
            prop_assert_eq!(exchange.location(&own), public.clone());
            prop_assert_eq!(exchange.sent("referer", &public), own.clone());
            let reply = exchange.returned(201, "content-location", &own);
            prop_assert_eq!(exchange.sent("destination", &reply), own);
            prop_assume!(below(&path, exchange.prefix).is_none() || exchange.prefix.is_empty());
            let public = exchange.location(&path);
            prop_assert_eq!(exchange.sent("destination", &public), path);
        }

        #[test]
        fn no_field_value_panics_or_becomes_invalid(value in "[ -~]{0,40}|[<>\"\\\\;,=/:a@\\[\\]\u{fc}]{0,12}") {
            for exchange in [BY_PATH, BY_SUBDOMAIN] {
                for name in ["location", "content-location", "refresh", "link", "set-cookie", "access-control-allow-origin"] {
                    exchange.returned(302, name, &value);
                }
                for name in ["origin", "referer", "destination"] {
                    exchange.sent(name, &value);
                }
            }
        }
    }
}
