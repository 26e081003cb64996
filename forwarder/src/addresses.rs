//! One mapping between the two addresses of a local service: its own, and the public one that visitors use.
//!
//! Requests are mapped from public to own, responses from own to public, each address by the same rule, so that there and back is the
//! identity. Addresses of others are never touched, and bodies neither. docs/agent.md has the table of fields.

mod fields;
mod host;
#[cfg(test)]
mod tests;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, uri::Scheme};
use tunnel_protocol::{
    headers::{FORWARDED_HOST, FORWARDED_PREFIX, FORWARDED_PROTO},
    message::HttpRequest,
};

use self::{
    fields::{links, map_value, refresh},
    host::{Absolute, Host, is_this_machine},
};
use crate::{
    settings::HostHeader,
    target::{Target, TargetTransport},
};

/// The two addresses of the local service, as one request sees them.
#[derive(Clone, Debug)]
pub struct Addresses<'a> {
    own: &'a OwnAddress,
    request: &'a HttpRequest,
    /// What visitors have before the local service's path: empty, or starts with `/` and does not end with one.
    prefix: &'a str,
}

/// The names under which the local service knows itself.
#[derive(Clone, Debug)]
pub struct OwnAddress {
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
struct Public<'a> {
    scheme: Scheme,
    /// Host and port, as written.
    authority: &'a str,
    host: Host,
}

/// Which reading of a path that begins with the prefix is right.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Reading {
    /// A place to go to: one that leads back to where the visitor is cannot be meant.
    Redirect,
    /// Anything else.
    Reference,
}

impl<'a> Addresses<'a> {
    /// The addresses that belong to a request.
    pub fn of(request: &'a HttpRequest, own: &'a OwnAddress) -> Self {
        let prefix = text(request, FORWARDED_PREFIX).unwrap_or_default();
        Self {
            own,
            request,
            prefix: prefix.trim_end_matches('/'),
        }
    }

    /// The address that the service says the visitor used; none if it did not say.
    fn public(&self) -> Option<Public<'a>> {
        let scheme = text(self.request, FORWARDED_PROTO)?.parse().ok()?;
        let authority = text(self.request, FORWARDED_HOST)?;
        let host = Host::parse(authority)?.without_default(&scheme);
        Some(Public {
            scheme,
            authority,
            host,
        })
    }

    /// The requested address, if a redirect to the same place would be a loop.
    fn requested(&self) -> Option<&'a str> {
        let is_safe = matches!(self.request.method.as_str(), "GET" | "HEAD");
        is_safe.then_some(&self.request.uri)
    }

    /// Whether the local service has paths of its own that begin like the prefix.
    fn has_paths_like_prefix(&self) -> bool {
        below(&self.request.uri, self.prefix).is_some()
    }

    /// Makes the fields of a request those that the local service would get at its own address.
    pub fn to_own(&self, fields: &mut HeaderMap) {
        let host = self.own.host_header.as_ref();
        let mut is_origin_mapped = false;
        for (name, value) in fields.iter_mut() {
            match name.as_str() {
                // Where WebDAV's COPY and MOVE put the resource (RFC 4918, 10.3).
                "destination" => {
                    map_value(value, |address| self.own_address(address));
                }
                // With the visitor's Host the local service is at the visitor's address.
                _ if host.is_none() => {}
                "referer" => {
                    map_value(value, |address| self.own_address(address));
                }
                "origin" => {
                    is_origin_mapped |= map_value(value, |origin| self.own_origin(origin));
                }
                _ => {}
            }
        }
        if let Some(host) = host {
            fields.insert(header::HOST, host.clone());
        }
        if is_origin_mapped {
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
        for (name, value) in fields.iter_mut() {
            let map: &dyn Fn(&str) -> Option<String> = match name.as_str() {
                "location" => &|address| self.public_address(address, reading),
                "content-location" => &address,
                "refresh" => &|value| refresh(value, address),
                "link" => &|value| links(value, address),
                "set-cookie" => &|cookie| self.cookie(cookie),
                "access-control-allow-origin" => &|origin| self.public_origin(origin),
                _ => continue,
            };
            map_value(value, map);
        }
    }

    /// A public address as the local service's own.
    fn own_address(&self, address: &str) -> Option<String> {
        if is_path(address) {
            return below(address, self.prefix)
                .filter(|_| !self.prefix.is_empty())
                .map(rooted);
        }
        let absolute = Absolute::parse(address)?;
        if !self.public()?.has(&absolute) {
            return None;
        }
        let path = below(absolute.rest, self.prefix)?;
        if self.own.host_header.is_none() {
            let origin = address.strip_suffix(absolute.rest)?;
            return Some(format!("{origin}{}", rooted(path)));
        }
        Some(format!("{}{}", self.own.origin, rooted(path)))
    }

    fn own_origin(&self, origin: &str) -> Option<String> {
        let absolute = Absolute::parse(origin).filter(|absolute| absolute.rest.is_empty())?;
        let public = self.public()?;
        let is_ours = public.has(&absolute) && absolute.scheme.as_ref() == Some(&public.scheme);
        is_ours.then(|| self.own.origin.clone())
    }

    /// One of the local service's own addresses as the visitor's.
    fn public_address(&self, address: &str, reading: Reading) -> Option<String> {
        if is_path(address) {
            return self.prefixed(address, reading);
        }
        let absolute = Absolute::parse(address)?;
        let public = self.public()?;
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
        } = self.public()?;
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
        let knows_prefix = below(path, self.prefix).is_some_and(|rest| {
            let leads_back =
                reading == Reading::Redirect && self.requested() == rooted(rest).split('#').next();
            !self.has_paths_like_prefix() && !leads_back
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
            return Some(self.prefix.to_owned());
        }
        self.prefixed(path, Reading::Reference)
    }

    fn is_own_domain(&self, domain: &str) -> bool {
        let domain = Host::parse(domain.trim_start_matches('.'));
        domain.is_some_and(|domain| self.own.has_name(&domain.name))
    }
}

impl OwnAddress {
    /// The names of a target that gets this as `Host`.
    pub fn new(target: &Target, host_header: &HostHeader) -> Self {
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

impl Public<'_> {
    /// Whether an address has the public host, over whichever scheme: the local service may not know which one visitors use.
    fn has(&self, address: &Absolute<'_>) -> bool {
        let scheme = address.scheme.as_ref().unwrap_or(&self.scheme);
        self.host.name == address.host.name && self.host.has_port_of(&address.host, scheme)
    }
}

fn text(request: &HttpRequest, name: HeaderName) -> Option<&str> {
    request.headers.get(name)?.to_str().ok()
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
