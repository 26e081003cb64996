//! Networks in CIDR notation (RFC 4632), for visitor policies and trusted proxies.

use std::{fmt, net::IpAddr, str::FromStr};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

/// An IPv4 or IPv6 network. An IPv4 address in IPv6 notation (`::ffff:192.0.2.1`) counts as the IPv4
/// address, both in networks and in the addresses that are checked against them.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr(IpNet);

/// The text is not a network.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("must be a network, such as 192.0.2.0/24 or 2001:db8::/32, or a single address")]
pub struct CidrError;

impl Cidr {
    /// Whether an address is in the network.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let network = match text.parse::<IpAddr>() {
            Ok(address) => IpNet::from(address),
            Err(_) => text.parse::<IpNet>().map_err(|_| CidrError)?,
        };
        if let IpNet::V6(v6) = network
            && let Some(mapped) = v6.addr().to_ipv4_mapped()
            && let Some(length) = v6.prefix_len().checked_sub(96)
        {
            return Ok(Self(
                Ipv4Net::new(mapped, length)
                    .map_err(|_| CidrError)?
                    .trunc()
                    .into(),
            ));
        }
        Ok(Self(network.trunc()))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TryFrom<String> for Cidr {
    type Error = CidrError;

    fn try_from(text: String) -> Result<Self, CidrError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(network: Cidr) -> Self {
        network.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contains(network: &str, address: &str) -> bool {
        network
            .parse::<Cidr>()
            .expect("a network")
            .contains(address.parse().expect("an address"))
    }

    #[test]
    fn addresses_are_in_their_networks_and_in_no_others() {
        for (network, address, is_in) in [
            ("192.0.2.0/24", "192.0.2.255", true),
            ("192.0.2.0/24", "192.0.3.0", false),
            ("192.0.2.7/24", "192.0.2.1", true),
            ("192.0.2.7", "192.0.2.7", true),
            ("192.0.2.7", "192.0.2.8", false),
            ("0.0.0.0/0", "203.0.113.9", true),
            ("0.0.0.0/0", "2001:db8::1", false),
            ("2001:db8::/32", "2001:db8:ffff::1", true),
            ("2001:db8::/32", "2001:db9::1", false),
            ("::1", "::1", true),
            ("::/0", "2001:db8::1", true),
            ("::/0", "192.0.2.1", false),
        ] {
            assert_eq!(contains(network, address), is_in, "{address} in {network}");
        }
    }

    #[test]
    fn an_ipv4_address_in_ipv6_notation_is_the_ipv4_address() {
        for network in ["192.0.2.0/24", "::ffff:192.0.2.0/120"] {
            for (address, is_in) in [
                ("::ffff:192.0.2.1", true),
                ("192.0.2.1", true),
                ("::ffff:192.0.3.1", false),
                ("::192.0.2.1", false),
            ] {
                assert_eq!(contains(network, address), is_in, "{address} in {network}");
            }
        }
        assert!(
            !contains("::/0", "::ffff:192.0.2.1"),
            "it is not an IPv6 address"
        );
    }

    #[test]
    fn invalid_networks_are_refused() {
        for text in [
            "",
            "192.0.2.0/33",
            "192.0.2/24",
            "2001:db8::/129",
            "example.com",
            "192.0.2.0/24 ",
            "10",
            "fe80::1%eth0",
        ] {
            assert_eq!(text.parse::<Cidr>(), Err(CidrError), "{text}");
        }
    }
}
