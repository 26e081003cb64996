//! Whom tunnel ids belong to.

use std::{fmt, str::FromStr};

use crate::auth::token::{TokenHash, sha256};

/// Who an agent proved to be, and so whom its tunnel ids belong to. Its text is how the tables keep it.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Owner {
    /// The holder of an agent token: `token:` and the token's hash.
    Token(TokenHash),
    /// A subject of the trusted issuer of JSON Web Tokens: `jwt:` and a hash of issuer and subject.
    Jwt(SubjectHash),
    /// Everybody, on a service where agents do not authenticate: `open`.
    Open,
}

/// The SHA-256 of an issuer and a subject.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct SubjectHash(String);

impl SubjectHash {
    /// Hashes both in a form that shows where one ends and the other begins.
    pub fn of(issuer: &str, subject: &str) -> Self {
        Self(sha256(
            serde_json::json!([issuer, subject]).to_string().as_bytes(),
        ))
    }
}

/// A text that names no owner.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("an owner is token:HASH, jwt:HASH or open")]
pub struct OwnerError;

impl FromStr for Owner {
    type Err = OwnerError;

    fn from_str(text: &str) -> Result<Self, OwnerError> {
        match text.split_once(':') {
            Some(("token", hash)) => Ok(Self::Token(TokenHash::from_hex(hash))),
            Some(("jwt", hash)) => Ok(Self::Jwt(SubjectHash(hash.to_owned()))),
            None if text == "open" => Ok(Self::Open),
            _ => Err(OwnerError),
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(hash) => write!(f, "token:{hash}"),
            Self::Jwt(SubjectHash(hash)) => write!(f, "jwt:{hash}"),
            Self::Open => f.write_str("open"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stored_text_of_an_owner_reads_back_as_that_owner() {
        for owner in [
            Owner::Token(TokenHash::of("abc")),
            Owner::Jwt(SubjectHash::of("https://issuer.example.com", "alice")),
            Owner::Open,
        ] {
            assert_eq!(owner.to_string().parse(), Ok(owner));
        }
        for text in ["", "open:", "Open", "someone", "saml:abc"] {
            assert_eq!(text.parse::<Owner>(), Err(OwnerError), "{text}");
        }
    }

    #[test]
    fn an_issuer_and_a_subject_are_never_confused() {
        assert_ne!(
            SubjectHash::of("issuer", "subject"),
            SubjectHash::of("issuers", "ubject")
        );
    }
}
