//! Reverse proxies in front of this process, and what they say of a visitor.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName};
use tunnel_protocol::{
    cidr::Cidr,
    headers::{FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PROTO},
};

/// What stands for an address that cannot be read, as in `Forwarded` (RFC 7239, 6.2). It is in no network.
const UNKNOWN: &str = "unknown";

/// The proxies whose word counts.
#[derive(Clone, Debug, Default)]
pub struct TrustedProxies(Vec<Cidr>);

/// Where a request comes from.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct VisitorOrigin {
    /// The visitor's address.
    pub address: String,
    /// The scheme the visitor used, if a proxy tells it.
    pub scheme: Option<String>,
    /// The host the visitor used, if a proxy tells it.
    pub host: Option<String>,
}

impl TrustedProxies {
    /// Those with an address in one of these networks.
    pub fn new(networks: Vec<Cidr>) -> Self {
        Self(networks)
    }

    /// Where a request with these fields comes from that `peer` has sent. Only what a trusted proxy has written counts: in
    /// `X-Forwarded-For`, to which each adds the address that it sees, what is right of the first address that is none of theirs.
    pub fn origin(&self, peer: IpAddr, fields: &HeaderMap) -> VisitorOrigin {
        let mut origin = VisitorOrigin {
            address: peer.to_canonical().to_string(),
            ..VisitorOrigin::default()
        };
        if !self.trusts(peer) {
            return origin;
        }
        for said in values(fields, FORWARDED_FOR).rev() {
            let Some(address) = address(said) else {
                UNKNOWN.clone_into(&mut origin.address);
                break;
            };
            origin.address = address.to_canonical().to_string();
            if !self.trusts(address) {
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

    fn trusts(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(address))
    }
}

/// The members of a list in all fields of a name. A field that is no text is a member that cannot be read.
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
