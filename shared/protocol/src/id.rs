//! Identifiers. Each is a separate type whose only constructors validate it, so that functions that
//! take one need not check it again. Clones share the text, because a request takes its ids to many places.

use std::{fmt, str::FromStr, sync::Arc};

use rand::RngExt;
use serde::{Deserialize, Serialize};
use ulid::Ulid;

/// Shortest tunnel id that a user may choose, in bytes.
pub const MIN_TUNNEL_ID_BYTES: usize = 3;
/// Longest tunnel id that a user may choose, in bytes: the length of a DNS label (RFC 1035, 2.3.4).
pub const MAX_TUNNEL_ID_BYTES: usize = 63;
/// Ids of no tunnel: an HTTP API answers `/ping` and `/sping` itself ("Amazon API Gateway important notes" in its developer guide).
const RESERVED_TUNNEL_IDS: [&str; 2] = ["ping", "sping"];
/// Length of a generated tunnel id, in bytes. There are 36^12 of them, too many to guess one.
const GENERATED_TUNNEL_ID_BYTES: usize = 12;
/// Longest accepted connection id. API Gateway's have 12 to 16 characters.
const MAX_CONNECTION_ID_BYTES: usize = 128;
/// Longest accepted request id. Ours are ULIDs of 26 characters.
const MAX_REQUEST_ID_BYTES: usize = 64;

/// Why a string is not a valid identifier.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum IdError {
    /// Not a valid tunnel id.
    #[error(
        "a tunnel id has {MIN_TUNNEL_ID_BYTES} to {MAX_TUNNEL_ID_BYTES} characters of a-z, 0-9 and -, and neither starts nor ends with -"
    )]
    Tunnel,
    /// A tunnel id that visitors could not reach.
    #[error("ping and sping cannot be tunnel ids: API Gateway answers these paths itself")]
    ReservedTunnel,
    /// Not a valid connection id.
    #[error("a connection id has 1 to {MAX_CONNECTION_ID_BYTES} visible ASCII characters and no /")]
    Connection,
    /// Not a valid request id.
    #[error("a request id has 1 to {MAX_REQUEST_ID_BYTES} letters, digits, - or _")]
    Request,
}

/// The name of a tunnel: generated, or chosen by its owner. Valid as a DNS label and as a path segment.
#[derive(Clone, Debug, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TunnelId(Arc<str>);

impl TunnelId {
    /// Generates a name that cannot be guessed.
    pub fn generate() -> Self {
        const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
        let mut random = rand::rng();
        Self(
            (0..GENERATED_TUNNEL_ID_BYTES)
                .map(|_| char::from(ALPHABET[random.random_range(0..ALPHABET.len())]))
                .collect::<String>()
                .into(),
        )
    }

    fn check(name: &str) -> Result<(), IdError> {
        if RESERVED_TUNNEL_IDS.contains(&name) {
            return Err(IdError::ReservedTunnel);
        }
        let right_length = (MIN_TUNNEL_ID_BYTES..=MAX_TUNNEL_ID_BYTES).contains(&name.len());
        let right_characters = name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if right_length && right_characters && !name.starts_with('-') && !name.ends_with('-') {
            Ok(())
        } else {
            Err(IdError::Tunnel)
        }
    }
}

/// The id that API Gateway gave to a WebSocket connection.
#[derive(Clone, Debug, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ConnectionId(Arc<str>);

impl ConnectionId {
    fn check(id: &str) -> Result<(), IdError> {
        let valid = (1..=MAX_CONNECTION_ID_BYTES).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        if valid {
            Ok(())
        } else {
            Err(IdError::Connection)
        }
    }
}

/// The id of one visitor's request.
#[derive(Clone, Debug, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// Generates an id that is unique and sorts by time.
    pub fn generate() -> Self {
        Self(Ulid::generate().to_string().into())
    }

    fn check(id: &str) -> Result<(), IdError> {
        let valid = (1..=MAX_REQUEST_ID_BYTES).contains(&id.len())
            && id
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if valid { Ok(()) } else { Err(IdError::Request) }
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
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::check(text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $id {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$id> for String {
            fn from(id: $id) -> String {
                id.0.as_ref().to_owned()
            }
        }
    )*};
}

text!(TunnelId, ConnectionId, RequestId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnel_ids_are_dns_labels_and_never_reserved_paths() {
        let longest = "a".repeat(MAX_TUNNEL_ID_BYTES);
        for valid in ["abc", "my-app", "0-0", longest.as_str()] {
            assert!(valid.parse::<TunnelId>().is_ok(), "{valid}");
        }
        let too_long = "a".repeat(MAX_TUNNEL_ID_BYTES + 1);
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
                Err(IdError::Tunnel),
                "{invalid}"
            );
        }
    }

    #[test]
    fn paths_that_api_gateway_answers_itself_are_not_tunnel_ids() {
        for reserved in ["ping", "sping"] {
            assert_eq!(reserved.parse::<TunnelId>(), Err(IdError::ReservedTunnel));
        }
        assert!("pings".parse::<TunnelId>().is_ok());
    }

    #[test]
    fn generated_tunnel_ids_are_valid_and_differ() {
        let (one, two) = (TunnelId::generate(), TunnelId::generate());
        assert_eq!(one.as_str().len(), GENERATED_TUNNEL_ID_BYTES);
        assert!(one.as_str().parse::<TunnelId>().is_ok());
        assert_ne!(one, two);
    }

    #[test]
    fn connection_and_request_ids_cannot_contain_a_separator() {
        assert!("L0SM9cOFvHcCIhw=".parse::<ConnectionId>().is_ok());
        assert!("a/b".parse::<ConnectionId>().is_err());
        assert!("a b".parse::<ConnectionId>().is_err());
        assert!(RequestId::generate().as_str().parse::<RequestId>().is_ok());
        assert!("../x".parse::<RequestId>().is_err());
        assert!("".parse::<RequestId>().is_err());
    }
}
