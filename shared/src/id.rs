//! Identifiers. Each is a type of its own whose only constructor checks it, so that a function which takes one needs no check.

use std::{fmt, str::FromStr};

use rand::RngExt;
use serde::{Deserialize, Serialize};
use ulid::Ulid;

/// Shortest name a user may choose for a tunnel, in characters.
pub const TUNNEL_ID_MIN: usize = 3;
/// Longest name a user may choose for a tunnel, in characters: that of a DNS label (RFC 1035, 2.3.4).
pub const TUNNEL_ID_MAX: usize = 63;
/// Length of a generated tunnel id. 36^12 of them make guessing one hopeless.
const TUNNEL_ID_GENERATED: usize = 12;
/// Longest connection id accepted. API Gateway's have 12 to 16 characters.
const CONNECTION_ID_MAX: usize = 128;
/// Longest request id accepted. Ours are ULIDs of 26 characters.
const REQUEST_ID_MAX: usize = 64;

/// Why a string is not the identifier it was meant to be.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InvalidId {
    /// Not a tunnel's name.
    #[error(
        "a tunnel id has {TUNNEL_ID_MIN} to {TUNNEL_ID_MAX} characters of a-z, 0-9 and -, and neither starts nor ends with -"
    )]
    Tunnel,
    /// Not a connection id.
    #[error("a connection id has 1 to {CONNECTION_ID_MAX} visible ASCII characters and no /")]
    Connection,
    /// Not a request id.
    #[error("a request id has 1 to {REQUEST_ID_MAX} letters, digits, - or _")]
    Request,
}

/// The name of a tunnel: generated, or chosen by its owner. Valid as a DNS label and as a path segment.
#[derive(Clone, Debug, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TunnelId(String);

impl TunnelId {
    /// Generates a name that nobody can guess.
    pub fn generate() -> Self {
        const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
        let mut random = rand::rng();
        Self(
            (0..TUNNEL_ID_GENERATED)
                .map(|_| char::from(ALPHABET[random.random_range(0..ALPHABET.len())]))
                .collect(),
        )
    }
}

impl TryFrom<String> for TunnelId {
    type Error = InvalidId;

    fn try_from(name: String) -> Result<Self, InvalidId> {
        let right_length = (TUNNEL_ID_MIN..=TUNNEL_ID_MAX).contains(&name.len());
        let right_characters = name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if right_length && right_characters && !name.starts_with('-') && !name.ends_with('-') {
            Ok(Self(name))
        } else {
            Err(InvalidId::Tunnel)
        }
    }
}

/// The id API Gateway gave a WebSocket connection.
#[derive(Clone, Debug, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ConnectionId(String);

impl TryFrom<String> for ConnectionId {
    type Error = InvalidId;

    fn try_from(id: String) -> Result<Self, InvalidId> {
        let valid = (1..=CONNECTION_ID_MAX).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        if valid {
            Ok(Self(id))
        } else {
            Err(InvalidId::Connection)
        }
    }
}

/// The id of one visitor's request.
#[derive(Clone, Debug, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RequestId(String);

impl RequestId {
    /// Generates an id that is unique and sorts by time.
    pub fn generate() -> Self {
        Self(Ulid::generate().to_string())
    }
}

impl TryFrom<String> for RequestId {
    type Error = InvalidId;

    fn try_from(id: String) -> Result<Self, InvalidId> {
        let valid = (1..=REQUEST_ID_MAX).contains(&id.len())
            && id
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if valid {
            Ok(Self(id))
        } else {
            Err(InvalidId::Request)
        }
    }
}

macro_rules! text {
    ($($id:ty),*) => {$(
        impl $id {
            /// The identifier as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $id {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::try_from(text.to_owned())
            }
        }

        impl From<$id> for String {
            fn from(id: $id) -> String {
                id.0
            }
        }
    )*};
}

text!(TunnelId, ConnectionId, RequestId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnel_ids_are_dns_labels_and_never_ours() {
        let longest = "a".repeat(TUNNEL_ID_MAX);
        for valid in ["abc", "my-app", "0-0", longest.as_str()] {
            assert!(valid.parse::<TunnelId>().is_ok(), "{valid}");
        }
        let too_long = "a".repeat(TUNNEL_ID_MAX + 1);
        for invalid in [
            "",
            "ab",
            "My-app",
            "my_app",
            "_ws",
            "-ab",
            "ab-",
            "a.b",
            "a/b",
            "caf\u{e9}",
            too_long.as_str(),
        ] {
            assert_eq!(
                invalid.parse::<TunnelId>(),
                Err(InvalidId::Tunnel),
                "{invalid}"
            );
        }
    }

    #[test]
    fn generated_tunnel_ids_are_valid_and_differ() {
        let (one, two) = (TunnelId::generate(), TunnelId::generate());
        assert_eq!(one.as_str().len(), TUNNEL_ID_GENERATED);
        assert!(one.as_str().parse::<TunnelId>().is_ok());
        assert_ne!(one, two);
    }

    #[test]
    fn connection_and_request_ids_cannot_carry_a_separator() {
        assert!("L0SM9cOFvHcCIhw=".parse::<ConnectionId>().is_ok());
        assert!("a/b".parse::<ConnectionId>().is_err());
        assert!("a b".parse::<ConnectionId>().is_err());
        assert!(RequestId::generate().as_str().parse::<RequestId>().is_ok());
        assert!("../x".parse::<RequestId>().is_err());
        assert!("".parse::<RequestId>().is_err());
    }
}
