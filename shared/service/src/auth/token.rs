//! Bearer tokens: made, hashed, and found in a request.

use std::fmt::{self, Write};

use http::{HeaderMap, header};
use rand::RngExt;
use sha2::{Digest, Sha256};

/// The SHA-256 of an agent token, which is all that is stored of it. Tokens are long and random, so a plain hash cannot be
/// searched backwards.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct TokenHash(String);

impl TokenHash {
    /// The hash of a token.
    pub fn of(token: &str) -> Self {
        Self(sha256(token.as_bytes()))
    }

    /// A hash that was stored earlier.
    pub(crate) fn from_hex(hash: &str) -> Self {
        Self(hash.to_owned())
    }
}

impl fmt::Display for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Generates a token: 256 random bits behind a prefix by which leaked ones can be searched for.
pub fn generate_token() -> String {
    let bytes: [u8; 32] = rand::rng().random();
    format!("ttf_{}", hex(&bytes))
}

/// The bearer token of a request (RFC 6750, 2.1). `None` if there is none, and if there are several `Authorization` fields:
/// two readers of such a request might each believe another one.
pub fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut fields = headers.get_all(header::AUTHORIZATION).iter();
    let authorization = fields.next()?.to_str().ok()?;
    if fields.next().is_some() {
        return None;
    }
    let (scheme, token) = authorization.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
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
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_token_is_stored_as_its_sha_256() {
        assert_eq!(
            TokenHash::of("abc").to_string(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_ne!(generate_token(), generate_token());
    }

    #[test]
    fn only_one_bearer_token_is_read() {
        let headers = |fields: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for field in fields {
                headers.append(header::AUTHORIZATION, HeaderValue::from_static(field));
            }
            headers
        };
        assert_eq!(bearer(&headers(&["Bearer abc"])), Some("abc"));
        assert_eq!(bearer(&headers(&["bearer  abc "])), Some("abc"));
        for none in [
            &[][..],
            &[""],
            &["abc"],
            &["Bearer"],
            &["Bearer "],
            &["Basic abc"],
            &["Bearer abc", "Bearer abc"],
            &["Basic abc", "Bearer abc"],
        ] {
            assert_eq!(bearer(&headers(none)), None, "{none:?}");
        }
    }
}
