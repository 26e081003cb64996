//! Whether and where the inspector is, and how much it keeps.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr};

use serde::{
    Deserialize, Deserializer,
    de::{self, Visitor},
};

use super::store::{DEFAULT_STORE_BYTES, StoreLimits};

/// The port that the inspector has if the user does not say.
pub(crate) const DEFAULT_PORT: u16 = 4040;
/// How many ports are tried from there before any free one is taken.
const DEFAULT_PORTS: u16 = 60;
/// Less than this would keep next to nothing.
const MIN_STORE_BYTES: u64 = 1024 * 1024;

/// Whether and where the inspector listens.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum InspectAddress {
    /// At 127.0.0.1:4040, or the next port that is free.
    #[default]
    Default,
    /// Nowhere.
    Off,
    /// Here.
    At {
        /// An IP address or a name, without the brackets of IPv6.
        host: String,
        /// 0 for any port that is free.
        port: u16,
    },
}

impl InspectAddress {
    /// Where an inspector with this setting is; `None` if it is off or at a port that was free.
    pub(crate) fn in_use(&self) -> Option<String> {
        match self {
            Self::Default | Self::Off | Self::At { port: 0, .. } => None,
            Self::At { host, port } if host.contains(':') => Some(format!("[{host}]:{port}")),
            Self::At { host, port } => Some(format!("{host}:{port}")),
        }
    }
}

/// A text that says neither whether nor where.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("inspect must be true, false, a port (4040), or host:port such as 127.0.0.1:4040")]
pub struct InspectAddressError;

impl FromStr for InspectAddress {
    type Err = InspectAddressError;

    fn from_str(text: &str) -> Result<Self, InspectAddressError> {
        let at = |host: &str, port: &str| {
            let port = port.parse().map_err(|_| InspectAddressError)?;
            let host = host.to_owned();
            Ok(Self::At { host, port })
        };
        match text.trim() {
            "true" | "on" | "yes" => Ok(Self::Default),
            "false" | "off" | "no" => Ok(Self::Off),
            text => match text.rsplit_once(':') {
                None => at("127.0.0.1", text),
                Some(("", port)) => at("127.0.0.1", port),
                Some((host, port)) => {
                    let ip = host
                        .strip_prefix('[')
                        .and_then(|host| host.strip_suffix(']'));
                    let is_name = host
                        .bytes()
                        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'));
                    match ip {
                        Some(ip) if ip.parse::<std::net::Ipv6Addr>().is_ok() => at(ip, port),
                        None if is_name => at(host, port),
                        _ => Err(InspectAddressError),
                    }
                }
            },
        }
    }
}

/// In a config file it is a boolean, a number or a text.
impl<'de> Deserialize<'de> for InspectAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;

        impl Visitor<'_> for Words {
            type Value = InspectAddress;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{InspectAddressError}")
            }

            fn visit_bool<E: de::Error>(self, is_on: bool) -> Result<InspectAddress, E> {
                self.visit_str(&is_on.to_string())
            }

            fn visit_i64<E: de::Error>(self, port: i64) -> Result<InspectAddress, E> {
                self.visit_str(&port.to_string())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<InspectAddress, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(Words)
    }
}

/// How much memory the recorded exchanges may take, such as `50 MiB`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InspectSize(u64);

/// A text that is no size, or one that is too small.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("inspect_size must be a size of at least 1 MiB, such as 50MiB or 1GiB")]
pub struct InspectSizeError;

impl FromStr for InspectSize {
    type Err = InspectSizeError;

    fn from_str(text: &str) -> Result<Self, InspectSizeError> {
        let text = text.trim();
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| InspectSizeError)?;
        let unit: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kb" => 1000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            _ => return Err(InspectSizeError),
        };
        number
            .checked_mul(unit)
            .filter(|bytes| *bytes >= MIN_STORE_BYTES && usize::try_from(*bytes).is_ok())
            .map(Self)
            .ok_or(InspectSizeError)
    }
}

impl fmt::Display for InspectSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}B", self.0)
    }
}

/// What the user has said about the inspector.
#[derive(Clone, Debug, Default)]
pub struct InspectOptions {
    /// Whether and where it listens.
    pub address: InspectAddress,
    /// How much memory it may take.
    pub size: Option<InspectSize>,
    /// The file that keeps the exchanges over restarts.
    pub history: Option<PathBuf>,
}

impl InspectOptions {
    pub(crate) fn limits(&self) -> StoreLimits {
        let bytes = self
            .size
            .and_then(|InspectSize(bytes)| usize::try_from(bytes).ok());
        StoreLimits::with_bytes(bytes.unwrap_or(DEFAULT_STORE_BYTES))
    }
}

/// The addresses to try where the user has named none.
pub(crate) fn default_addresses() -> impl Iterator<Item = SocketAddr> {
    (DEFAULT_PORT..DEFAULT_PORT + DEFAULT_PORTS)
        .chain([0])
        .map(|port| ([127, 0, 0, 1], port).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_port_or_a_host_with_one() {
        let at = |host: &str, port| {
            Ok(InspectAddress::At {
                host: host.to_owned(),
                port,
            })
        };
        for (text, address) in [
            ("true", Ok(InspectAddress::Default)),
            ("false", Ok(InspectAddress::Off)),
            ("5050", at("127.0.0.1", 5050)),
            (":5050", at("127.0.0.1", 5050)),
            ("0.0.0.0:0", at("0.0.0.0", 0)),
            ("[::1]:4040", at("::1", 4040)),
            ("agent.internal:4040", at("agent.internal", 4040)),
            ("agent", Err(InspectAddressError)),
            ("::1:4040", Err(InspectAddressError)),
            ("http://127.0.0.1:4040", Err(InspectAddressError)),
            ("127.0.0.1:65536", Err(InspectAddressError)),
            ("", Err(InspectAddressError)),
        ] {
            assert_eq!(text.parse(), address, "{text}");
        }
    }

    #[test]
    fn a_size_has_a_unit() {
        for (text, bytes) in [
            ("50MiB", Some(50 << 20)),
            ("50 MB", Some(50_000_000)),
            ("1g", Some(1 << 30)),
            ("2097152", Some(2 << 20)),
            ("1000", None),
            ("50 XB", None),
            ("-1MB", None),
            ("99999999999999999999", None),
            ("99999999999GiB", None),
        ] {
            let size = text.parse::<InspectSize>().ok().map(|size| size.0);
            assert_eq!(size, bytes, "{text}");
        }
    }
}
