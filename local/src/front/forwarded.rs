//! Reverse proxies in front of this process, and what they say of a visitor.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use http::{HeaderMap, HeaderName};
use tunnel_protocol::{
    cidr::Cidr,
    headers::{FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PROTO},
};

/// What stands for an address that cannot be read, as in `Forwarded` (RFC 7239, 6.2). It is in no network.
const UNKNOWN: &str = "unknown";

/// The other end of a connection.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Where it is.
    pub(crate) address: SocketAddr,
    /// Its IP address in its canonical form (an IPv4 address is never mapped to IPv6), which each of its requests has.
    pub(crate) ip: Box<str>,
}

impl From<SocketAddr> for Peer {
    fn from(address: SocketAddr) -> Self {
        Self {
            address,
            ip: address.ip().to_canonical().to_string().into(),
        }
    }
}

/// The proxies whose word counts.
#[derive(Debug, Default)]
pub(crate) struct TrustedProxies(Mutex<Arc<[Cidr]>>);

/// Where a request comes from.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct VisitorOrigin {
    /// The visitor's address.
    pub(crate) address: String,
    /// The scheme the visitor used, if a trusted proxy reports it.
    pub(crate) scheme: Option<String>,
    /// The host the visitor used, if a trusted proxy reports it.
    pub(crate) host: Option<String>,
}

impl TrustedProxies {
    /// Those with an address in one of these networks.
    pub(crate) fn new(networks: Vec<Cidr>) -> Self {
        Self(Mutex::new(networks.into()))
    }

    /// Trusts those in these networks from now on.
    pub(crate) fn set(&self, networks: Vec<Cidr>) {
        *self.lock() = networks.into();
    }

    /// Held between awaits only.
    fn lock(&self) -> MutexGuard<'_, Arc<[Cidr]>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a request with these fields comes from that `peer` has sent. Only what a trusted proxy has written counts: in
    /// `X-Forwarded-For`, to which each adds the address that it sees, what is right of the first address that is none of theirs.
    pub(crate) fn origin(&self, peer: &Peer, fields: &HeaderMap) -> VisitorOrigin {
        let networks = self.lock().clone();
        let trusts = |address: IpAddr| networks.iter().any(|network| network.contains(address));
        let mut origin = VisitorOrigin {
            address: (*peer.ip).to_owned(),
            ..VisitorOrigin::default()
        };
        if !trusts(peer.address.ip()) {
            return origin;
        }
        for said in values(fields, FORWARDED_FOR).rev() {
            let Some(address) = address(said) else {
                UNKNOWN.clone_into(&mut origin.address);
                break;
            };
            origin.address = address.to_canonical().to_string();
            if !trusts(address) {
                break;
            }
        }
        let last = |name| {
            values(fields, name)
                .next_back()
                .filter(|value| !value.is_empty())
                .map(str::to_owned)
        };
        origin.scheme = last(FORWARDED_PROTO)
            .map(|scheme| scheme.to_ascii_lowercase())
            .filter(|scheme| matches!(&**scheme, "http" | "https"));
        origin.host = last(FORWARDED_HOST);
        origin
    }
}

/// The members of a list in all fields with a name. A field that is not text counts as one unreadable member.
fn values(fields: &HeaderMap, name: HeaderName) -> impl DoubleEndedIterator<Item = &str> {
    fields
        .get_all(name)
        .iter()
        .flat_map(|value| value.to_str().unwrap_or(UNKNOWN).split(','))
        .map(str::trim)
}

/// An address, with or without a port.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(text);
    bare.parse()
        .ok()
        .or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn fields(pairs: &[(&'static str, &'static [u8])]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                let value = HeaderValue::from_bytes(value).expect("a value");
                (HeaderName::from_static(name), value)
            })
            .collect()
    }

    fn origin(peer: &str, pairs: &[(&'static str, &'static [u8])]) -> VisitorOrigin {
        let networks = ["10.0.0.0/8", "::1/128"];
        let proxies = networks.map(|network| network.parse().expect("a network"));
        let peer = Peer::from(SocketAddr::new(peer.parse().expect("an address"), 1));
        TrustedProxies::new(proxies.to_vec()).origin(&peer, &fields(pairs))
    }

    #[test]
    fn the_visitor_is_the_right_most_address_that_no_trusted_proxy_has() {
        for (peer, forwarded_for, expected) in [
            ("9.9.9.9", &b"1.1.1.1"[..], "9.9.9.9"),
            ("10.0.0.1", b"1.1.1.1", "1.1.1.1"),
            ("10.0.0.1", b"6.6.6.6, 1.1.1.1", "1.1.1.1"),
            ("10.0.0.1", b"6.6.6.6, 1.1.1.1 ,10.2.2.2", "1.1.1.1"),
            ("10.0.0.1", b"10.3.3.3", "10.3.3.3"),
            ("10.0.0.1", b"6.6.6.6, 1.1.1.1:443", "1.1.1.1"),
            ("::1", b"[2001:db8::1]:443", "2001:db8::1"),
            ("::1", b"[2001:db8::1]", "2001:db8::1"),
            ("::ffff:10.0.0.1", b"::ffff:1.1.1.1", "1.1.1.1"),
            ("10.0.0.1", b"6.6.6.6, nonsense", "unknown"),
            ("10.0.0.1", b"6.6.6.6,", "unknown"),
            ("10.0.0.1", b"6.6.6.6, \xff", "unknown"),
        ] {
            let got = origin(peer, &[("x-forwarded-for", forwarded_for)]);
            assert_eq!(got.address, expected, "{peer} {forwarded_for:?}");
        }
        let lines: &[(&str, &[u8])] = &[
            ("x-forwarded-for", b"6.6.6.6"),
            ("x-forwarded-for", b"1.1.1.1"),
        ];
        assert_eq!(origin("10.0.0.1", lines).address, "1.1.1.1");
    }

    #[test]
    fn scheme_and_host_are_those_that_a_trusted_proxy_tells_last() {
        let told: &[(&str, &[u8])] = &[
            ("x-forwarded-proto", b"http, HTTPS"),
            ("x-forwarded-host", b"a.example, b.example"),
        ];
        let got = origin("10.0.0.1", told);
        assert_eq!(got.scheme.as_deref(), Some("https"));
        assert_eq!(got.host.as_deref(), Some("b.example"));
        let stranger = origin("9.9.9.9", told);
        assert_eq!((stranger.scheme, stranger.host), (None, None));
        let odd = origin(
            "10.0.0.1",
            &[("x-forwarded-proto", b"gopher"), ("x-forwarded-host", b"")],
        );
        assert_eq!((odd.scheme, odd.host), (None, None));
    }
}
