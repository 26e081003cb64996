//! Which visitors a tunnel lets in: addresses, a name and password, secret header fields.
//!
//! The agent knows the secrets. The service is given salted hashes of them, with which it can tell whether a visitor has one, and
//! which it forgets with the agent's connection. A hash is as hard to search backwards as its secret is to guess: short passwords
//! are found by whoever has the hash and time.

use std::net::IpAddr;

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use subtle::{Choice, ConstantTimeEq};

use crate::{cidr::Cidr, headers, message::Body};

/// Most names with passwords, and most required fields, of one tunnel: each costs a hash for each request.
pub const MAX_CREDENTIALS: usize = 32;
/// Most networks of one tunnel, allowed and denied together.
pub const MAX_NETWORKS: usize = 64;
/// Longest name of a required field, in bytes.
pub const MAX_FIELD_NAME_BYTES: usize = 64;
/// Bytes of the salt.
const SALT_BYTES: usize = 16;
/// Bytes of a hash.
const HASH_BYTES: usize = 32;

/// What a visitor must show. Made of secrets by the agent, and read by the service from what the agent sent.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct VisitorPolicy(Fields);

/// As it travels and as it is stored. A field of a newer agent is an error: it may be a rule, and must not be passed over.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    #[serde(default)]
    salt: Body,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    basic: Vec<Body>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    headers: Vec<RequiredField>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    allow: Vec<Cidr>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    deny: Vec<Cidr>,
}

#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequiredField {
    name: String,
    hash: Body,
}

/// Rules that cannot be kept to, and so are not accepted.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PolicyError {
    /// Nobody would be kept out.
    #[error("there is no rule")]
    Empty,
    /// More than the service checks for each request.
    #[error(
        "more than {MAX_CREDENTIALS} names with passwords, {MAX_CREDENTIALS} required headers or {MAX_NETWORKS} networks"
    )]
    TooMany,
    /// A salt or a hash of a wrong length.
    #[error("a salt has {SALT_BYTES} bytes and a hash {HASH_BYTES}")]
    Hash,
    /// A required field that no visitor can be asked for.
    #[error(
        "the header {0} cannot be required: a name has up to {MAX_FIELD_NAME_BYTES} characters, and is none of Host, Content-Length, forwarding or connection headers"
    )]
    Field(String),
    /// A field that two rules want.
    #[error(
        "the header authorization cannot be required beside names with passwords, which are sent in it"
    )]
    Authorization,
}

/// Why a visitor is not let in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DeniedError {
    /// No name with password of the tunnel's; the visitor may try again with one.
    Unauthorized,
    /// The visitor's address may not come in.
    Address,
    /// A secret header field is missing or wrong.
    Field,
}

impl VisitorPolicy {
    /// The rules, with `salt`, which must be random and never used before. `basic` are texts of the form `name:password`.
    ///
    /// # Errors
    /// When no rule is given, or one that the service would not accept.
    pub fn new(
        salt: [u8; SALT_BYTES],
        basic: &[&str],
        required: &[(HeaderName, HeaderValue)],
        allow: Vec<Cidr>,
        deny: Vec<Cidr>,
    ) -> Result<Self, PolicyError> {
        let hashed = |secret: &[u8]| Body(Bytes::copy_from_slice(&hash(&salt, secret)));
        Fields {
            salt: Body(Bytes::copy_from_slice(&salt)),
            basic: basic
                .iter()
                .map(|credentials| hashed(credentials.as_bytes()))
                .collect(),
            headers: required
                .iter()
                .map(|(name, value)| RequiredField {
                    name: name.to_string(),
                    hash: hashed(value.as_bytes()),
                })
                .collect(),
            allow,
            deny,
        }
        .try_into()
    }

    /// Rules that let nobody in: for what cannot be read.
    pub fn nobody() -> Self {
        let everybody = ["0.0.0.0/0", "::/0"].map(|network| network.parse().expect("a network"));
        Self(Fields {
            deny: everybody.to_vec(),
            ..Fields::default()
        })
    }

    /// As JSON, for [`crate::message::Ready::access`].
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).expect("lists of texts have a JSON value")
    }

    /// Whether a visitor at `address` who sent `fields` may come in; an address that is not known is in no network.
    ///
    /// # Errors
    /// When not: for the first rule in the order of address, fields, name and password that is not met.
    pub fn admit(&self, address: Option<IpAddr>, fields: &HeaderMap) -> Result<(), DeniedError> {
        let Fields {
            salt,
            basic,
            headers,
            allow,
            deny,
        } = &self.0;
        if !allow.is_empty() || !deny.is_empty() {
            let Some(address) = address else {
                return Err(DeniedError::Address);
            };
            let is_in =
                |networks: &[Cidr]| networks.iter().any(|network| network.contains(address));
            if is_in(deny) || !allow.is_empty() && !is_in(allow) {
                return Err(DeniedError::Address);
            }
        }
        for required in headers {
            let value = only_value(fields, &required.name).map(HeaderValue::as_bytes);
            // Of several rules for one name any may be met: that is how a secret is changed without an interruption.
            let accepted = headers
                .iter()
                .filter(|other| other.name == required.name)
                .map(|other| &other.hash);
            if !value.is_some_and(|value| is_one_of(&hash(&salt.0, value), accepted)) {
                return Err(DeniedError::Field);
            }
        }
        if !basic.is_empty() {
            let credentials =
                only_value(fields, header::AUTHORIZATION.as_str()).and_then(basic_credentials);
            if !credentials
                .is_some_and(|credentials| is_one_of(&hash(&salt.0, &credentials), basic))
            {
                return Err(DeniedError::Unauthorized);
            }
        }
        Ok(())
    }

    /// Removes the fields that were meant for the service, so that the local service does not see its secrets.
    pub fn remove_secrets(&self, fields: &mut HeaderMap) {
        if !self.0.basic.is_empty() {
            fields.remove(header::AUTHORIZATION);
        }
        for required in &self.0.headers {
            fields.remove(&required.name);
        }
    }
}

impl TryFrom<Fields> for VisitorPolicy {
    type Error = PolicyError;

    fn try_from(fields: Fields) -> Result<Self, PolicyError> {
        let Fields {
            salt,
            basic,
            headers,
            allow,
            deny,
        } = &fields;
        if basic.is_empty() && headers.is_empty() && allow.is_empty() && deny.is_empty() {
            return Err(PolicyError::Empty);
        }
        if basic.len() > MAX_CREDENTIALS
            || headers.len() > MAX_CREDENTIALS
            || allow.len() + deny.len() > MAX_NETWORKS
        {
            return Err(PolicyError::TooMany);
        }
        let has_secrets = !basic.is_empty() || !headers.is_empty();
        let mut hashes = basic
            .iter()
            .chain(headers.iter().map(|required| &required.hash));
        if (has_secrets && salt.0.len() != SALT_BYTES)
            || !hashes.all(|hash| hash.0.len() == HASH_BYTES)
        {
            return Err(PolicyError::Hash);
        }
        for RequiredField { name, .. } in headers {
            if !is_askable(name) {
                return Err(PolicyError::Field(
                    name.chars().take(MAX_FIELD_NAME_BYTES).collect(),
                ));
            }
            if name == header::AUTHORIZATION.as_str() && !basic.is_empty() {
                return Err(PolicyError::Authorization);
            }
        }
        Ok(Self(fields))
    }
}

impl From<VisitorPolicy> for Fields {
    fn from(access: VisitorPolicy) -> Self {
        access.0
    }
}

/// Whether a field of this name reaches the service as the visitor sent it. Names are in lower case, as `http` writes them.
fn is_askable(name: &str) -> bool {
    let Ok(parsed) = name.parse::<HeaderName>() else {
        return false;
    };
    let mut alone = HeaderMap::from_iter([(parsed.clone(), HeaderValue::from_static("x"))]);
    headers::remove_hop_by_hop(&mut alone);
    headers::remove_forwarding(&mut alone);
    let is_ours = parsed == header::HOST || parsed == header::CONTENT_LENGTH;
    parsed.as_str() == name && name.len() <= MAX_FIELD_NAME_BYTES && !alone.is_empty() && !is_ours
}

/// The value of a field that is there once. One that comes twice could be another to the local service than to us.
fn only_value<'f>(fields: &'f HeaderMap, name: &str) -> Option<&'f HeaderValue> {
    let mut values = fields.get_all(name).iter();
    values.next().filter(|_| values.next().is_none())
}

/// Name and password of `Authorization: Basic`, as `name:password` (RFC 7617, 2).
fn basic_credentials(value: &HeaderValue) -> Option<Vec<u8>> {
    let (scheme, encoded) = value.to_str().ok()?.split_once(' ')?;
    let encoded = encoded.trim_start_matches(' ');
    scheme
        .eq_ignore_ascii_case("basic")
        .then(|| BASE64_STANDARD.decode(encoded).ok())?
}

fn hash(salt: &[u8], secret: &[u8]) -> [u8; HASH_BYTES] {
    let mut mac = Hmac::<Sha256>::new_from_slice(salt).expect("HMAC takes keys of any length");
    mac.update(secret);
    mac.finalize().into_bytes().into()
}

/// Compares with all of them, however early one is found, so that the time tells nothing.
fn is_one_of<'h>(hash: &[u8; HASH_BYTES], accepted: impl IntoIterator<Item = &'h Body>) -> bool {
    accepted
        .into_iter()
        .fold(Choice::from(0), |found, accepted| {
            found | accepted.0.ct_eq(hash)
        })
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(
        basic: &[&str],
        required: &[(&'static str, &str)],
        allow: &[&str],
        deny: &[&str],
    ) -> Result<VisitorPolicy, PolicyError> {
        let networks = |texts: &[&str]| {
            texts
                .iter()
                .map(|text| text.parse().expect("a network"))
                .collect()
        };
        let required: Vec<_> = required
            .iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_str(value).expect("a value"),
                )
            })
            .collect();
        VisitorPolicy::new(
            [7; SALT_BYTES],
            basic,
            &required,
            networks(allow),
            networks(deny),
        )
    }

    fn fields(fields: &[(&'static str, &str)]) -> HeaderMap {
        fields
            .iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_str(value).expect("a value"),
                )
            })
            .collect()
    }

    fn basic(credentials: &str) -> String {
        format!("Basic {}", BASE64_STANDARD.encode(credentials))
    }

    #[test]
    fn only_a_name_with_its_password_opens() {
        let access = access(&["alice:opensesame", "bob:a:b"], &[], &[], &[]).expect("rules");
        let admit = |values: &[&str]| {
            let fields = HeaderMap::from_iter(
                values
                    .iter()
                    .map(|value| (header::AUTHORIZATION, value.parse().expect("a value"))),
            );
            access.admit(None, &fields)
        };
        let encoded = BASE64_STANDARD.encode("alice:opensesame");
        for good in [
            basic("alice:opensesame"),
            basic("bob:a:b"),
            format!("bAsIc {encoded}"),
            format!("Basic  {encoded}"),
        ] {
            assert_eq!(admit(&[&good]), Ok(()), "{good}");
        }
        for bad in [
            basic("alice:opensesam"),
            basic("alice:a:b"),
            basic("Alice:opensesame"),
            basic("alice"),
            basic(":"),
            basic(""),
            basic("alice:opensesame\0"),
            format!("Bearer {encoded}"),
            format!("Basic{encoded}"),
            format!("Basic {encoded},Basic {encoded}"),
            format!("Basic {encoded} "),
            "Basic %".to_owned(),
            String::new(),
        ] {
            assert_eq!(admit(&[&bad]), Err(DeniedError::Unauthorized), "{bad}");
        }
        assert_eq!(admit(&[]), Err(DeniedError::Unauthorized));
        let good = basic("alice:opensesame");
        assert_eq!(
            admit(&[&good, &good]),
            Err(DeniedError::Unauthorized),
            "which one would the local service see?"
        );
    }

    #[test]
    fn denied_networks_win_over_allowed_ones_and_these_over_all_others() {
        let both = access(
            &[],
            &[],
            &["192.0.2.0/24", "2001:db8::/32"],
            &["192.0.2.128/25"],
        )
        .expect("rules");
        let only_deny = access(&[], &[], &[], &["192.0.2.0/24"]).expect("rules");
        let admit = |access: &VisitorPolicy, address: &str| {
            access
                .admit(address.parse().ok(), &HeaderMap::new())
                .is_ok()
        };
        for (address, by_both, by_deny) in [
            ("192.0.2.1", true, false),
            ("192.0.2.200", false, false),
            ("203.0.113.1", false, true),
            ("::ffff:192.0.2.1", true, false),
            ("::ffff:192.0.2.200", false, false),
            ("2001:db8::1", true, true),
            ("unknown", false, false),
        ] {
            assert_eq!(
                (admit(&both, address), admit(&only_deny, address)),
                (by_both, by_deny),
                "{address}"
            );
        }
    }

    #[test]
    fn every_required_field_must_have_one_of_its_values_once() {
        let access = access(
            &[],
            &[("x-key", "one"), ("x-key", "two"), ("x-other", "three")],
            &[],
            &[],
        )
        .expect("rules");
        for (sent, is_admitted) in [
            (&[("x-key", "one"), ("x-other", "three")][..], true),
            (&[("x-key", "two"), ("x-other", "three")], true),
            (&[("x-key", "one")], false),
            (&[("x-key", "three"), ("x-other", "one")], false),
            (&[("x-key", "One"), ("x-other", "three")], false),
            (
                &[("x-key", "one"), ("x-key", "two"), ("x-other", "three")],
                false,
            ),
            (&[("x-key", "one, two"), ("x-other", "three")], false),
            (&[], false),
        ] {
            assert_eq!(
                access.admit(None, &fields(sent)).is_ok(),
                is_admitted,
                "{sent:?}"
            );
        }
    }

    #[test]
    fn secrets_are_removed_and_nothing_else() {
        let of = |access: VisitorPolicy| {
            let mut sent = fields(&[("authorization", "x"), ("x-key", "one"), ("accept", "*/*")]);
            access.remove_secrets(&mut sent);
            sent
        };
        assert_eq!(
            of(access(&["a:b"], &[], &[], &[]).expect("rules")),
            fields(&[("x-key", "one"), ("accept", "*/*")])
        );
        assert_eq!(
            of(access(&[], &[("x-key", "one")], &[], &[]).expect("rules")),
            fields(&[("authorization", "x"), ("accept", "*/*")])
        );
    }

    #[test]
    fn rules_survive_the_wire_and_tell_no_secret() {
        let rules = access(
            &["alice:opensesame"],
            &[("x-key", "swordfish")],
            &["192.0.2.0/24"],
            &["::1"],
        )
        .expect("rules");
        let text = serde_json::to_string(&rules).expect("JSON");
        assert!(
            !text.contains("sesame") && !text.contains("alice") && !text.contains("swordfish"),
            "{text}"
        );
        assert_eq!(
            serde_json::from_str::<VisitorPolicy>(&text).expect("what we wrote"),
            rules
        );
        let other_salt =
            VisitorPolicy::new([8; SALT_BYTES], &["alice:opensesame"], &[], vec![], vec![])
                .expect("rules");
        assert_ne!(
            other_salt.0.basic[0], rules.0.basic[0],
            "the same secret has the same hash in every session"
        );
    }

    #[test]
    fn rules_that_would_not_be_kept_to_are_refused() {
        let many = |count: usize| {
            (0..count)
                .map(|at| format!("user{at}:x"))
                .collect::<Vec<_>>()
        };
        for (count, expected) in [
            (MAX_CREDENTIALS, None),
            (MAX_CREDENTIALS + 1, Some(PolicyError::TooMany)),
        ] {
            let texts = many(count);
            assert_eq!(
                access(
                    &texts.iter().map(String::as_str).collect::<Vec<_>>(),
                    &[],
                    &[],
                    &[]
                )
                .err(),
                expected,
                "{count}"
            );
        }
        for (count, expected) in [
            (MAX_NETWORKS, None),
            (MAX_NETWORKS + 1, Some(PolicyError::TooMany)),
        ] {
            assert_eq!(
                access(&[], &[], &vec!["::1"; count - 1], &["::2"]).err(),
                expected,
                "{count}"
            );
        }
        assert_eq!(access(&[], &[], &[], &[]), Err(PolicyError::Empty));
        assert_eq!(
            access(&["a:b"], &[("authorization", "x")], &[], &[]),
            Err(PolicyError::Authorization)
        );
        for name in [
            "host",
            "connection",
            "x-forwarded-for",
            "x-real-ip",
            "content-length",
            "transfer-encoding",
        ] {
            assert_eq!(
                access(&[], &[(name, "x")], &[], &[]),
                Err(PolicyError::Field(name.to_owned()))
            );
        }
        let hash = BASE64_STANDARD.encode([0; HASH_BYTES]);
        let salt = BASE64_STANDARD.encode([0; SALT_BYTES]);
        for text in [
            "{}".to_owned(),
            "[]".to_owned(),
            "true".to_owned(),
            format!(r#"{{"basic":["{hash}"]}}"#),
            format!(r#"{{"salt":"{salt}","basic":["AAAA"]}}"#),
            format!(r#"{{"salt":"{salt}","basic":["{hash}"],"jwt":{{}}}}"#),
            format!(r#"{{"salt":"{salt}","headers":[{{"name":"X-Key","hash":"{hash}"}}]}}"#),
            format!(
                r#"{{"salt":"{salt}","headers":[{{"name":"{}","hash":"{hash}"}}]}}"#,
                "x".repeat(MAX_FIELD_NAME_BYTES + 1)
            ),
            r#"{"allow":["everybody"]}"#.to_owned(),
        ] {
            assert!(
                serde_json::from_str::<VisitorPolicy>(&text).is_err(),
                "{text}"
            );
        }
    }

    #[test]
    fn what_cannot_be_read_lets_nobody_in() {
        for address in [
            None,
            Some("192.0.2.1"),
            Some("::1"),
            Some("::ffff:192.0.2.1"),
        ] {
            let address = address.map(|text| text.parse().expect("an address"));
            assert_eq!(
                VisitorPolicy::nobody().admit(address, &HeaderMap::new()),
                Err(DeniedError::Address),
                "{address:?}"
            );
        }
    }
}
