//! Hosts, and addresses that have one.

use http::uri::{Authority, Scheme};
use tunnel_protocol::url::is_loopback;

/// A host in lower case, and its port unless that is the scheme's own.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Host {
    pub(super) name: String,
    pub(super) port: Option<u16>,
}

/// An address with a host, in its parts.
#[derive(Clone, Debug)]
pub(super) struct Absolute<'a> {
    /// Absent in `//host/path`.
    pub(super) scheme: Option<Scheme>,
    pub(super) host: Host,
    /// Path, query and fragment.
    pub(super) rest: &'a str,
}

impl Host {
    pub(super) fn of(authority: &Authority, scheme: &Scheme) -> Self {
        let host = Self {
            name: normal_name(authority.host()),
            port: authority.port_u16(),
        };
        host.without_default(scheme)
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
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

    pub(super) fn without_default(self, scheme: &Scheme) -> Self {
        let port = self.port.filter(|port| *port != default_port(scheme));
        Self { port, ..self }
    }

    /// Whether another host, in an address of this scheme, has this one's port. Without a port that is the default of any scheme.
    pub(super) fn has_port_of(&self, other: &Self, scheme: &Scheme) -> bool {
        let default = default_port(scheme);
        other.port.unwrap_or(default) == self.port.unwrap_or(default)
    }
}

impl<'a> Absolute<'a> {
    /// An `http` or `https` address, or one that leaves the scheme open. Addresses with a user name are left to others.
    pub(super) fn parse(address: &'a str) -> Option<Self> {
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
pub(super) fn is_this_machine(host: &str) -> bool {
    is_loopback(host) || matches!(host, "0.0.0.0" | "[::]")
}
