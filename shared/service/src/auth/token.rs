//! Who an agent is.
//!
//! An owner is a text: `token:` and the SHA-256 of the agent's token, `jwt:` and one of the issuer and subject of its JSON Web Token,
//! or `open` where everybody may connect.

use std::fmt::Write;

use rand::RngExt;
use sha2::{Digest, Sha256};

/// The owner of everything where agents do not authenticate.
pub const ANYBODY: &str = "open";

/// Generates a token: 256 random bits behind a prefix by which leaked ones can be searched for.
pub fn generate_token() -> String {
    let bytes: [u8; 32] = rand::rng().random();
    format!("ttf_{}", hex(&bytes))
}

/// What is stored of a token. Tokens are long and random, so that a plain hash cannot be searched backwards.
pub fn hash_token(token: &str) -> String {
    hex(&Sha256::digest(token.as_bytes()))
}

/// The owner that the token of this hash stands for.
pub fn owner_of(token_hash: &str) -> String {
    format!("token:{token_hash}")
}

/// What owners that a JSON Web Token proved begin with.
const JWT: &str = "jwt:";

/// The owner that an issuer's subject is. Both are hashed in a form that tells where one ends and the other begins.
pub(crate) fn owner_of_subject(issuer: &str, subject: &str) -> String {
    format!(
        "{JWT}{}",
        hash_token(&serde_json::json!([issuer, subject]).to_string())
    )
}

/// Whether an owner is an issuer's subject.
pub(crate) fn is_subject(owner: &str) -> bool {
    owner.starts_with(JWT)
}

/// The hash of the token that an owner stands for; none if it stands for no token.
pub fn token_hash_of(owner: &str) -> Option<&str> {
    owner.strip_prefix("token:")
}

/// The token of an `Authorization` header: RFC 6750, 2.1.
pub fn bearer_token(authorization: &str) -> Option<&str> {
    let (scheme, token) = authorization.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            write!(text, "{byte:02x}").expect("writing to a String cannot fail");
            text
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_stored_as_its_sha_256() {
        assert_eq!(
            hash_token("abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_ne!(generate_token(), generate_token());
    }

    #[test]
    fn only_bearer_tokens_are_read() {
        assert_eq!(bearer_token("Bearer abc"), Some("abc"));
        assert_eq!(bearer_token("bearer  abc "), Some("abc"));
        for other in ["", "abc", "Bearer", "Bearer ", "Basic abc"] {
            assert_eq!(bearer_token(other), None, "{other}");
        }
    }
}
