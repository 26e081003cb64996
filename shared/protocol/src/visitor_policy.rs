//! Which visitors a tunnel admits: by address, user name and password, or secret header fields.
//!
//! The agent knows the secrets. The service gets salted hashes of them, with which it can check what a
//! visitor sends, and which it deletes with the agent's connection. A hash protects its secret only as
//! far as the secret is hard to guess: short passwords can be found by anyone who has the hash.

use std::net::IpAddr;

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use subtle::{Choice, ConstantTimeEq};

use crate::{cidr::Cidr, headers, message::Body};

/// Most user names with passwords, and most required fields, of one tunnel: each costs a hash for
/// every request.
pub const MAX_CREDENTIALS: usize = 32;
/// Most networks of one tunnel, allowed and denied together.
pub const MAX_NETWORKS: usize = 64;
/// Longest name of a required field, in bytes.
pub const MAX_FIELD_NAME_BYTES: usize = 64;
/// Bytes of the salt.
const SALT_BYTES: usize = 16;
/// Bytes of a hash.
const HASH_BYTES: usize = 32;

/// What a request must satisfy. The agent makes it from secrets; the service reads it from the agent's
/// `ready`.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct VisitorPolicy(Fields);

/// The form in which it is sent and stored. An unknown field is an error: it may be a rule of a newer
/// agent, which must not be ignored.
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

/// Why a policy cannot be enforced, and so is not accepted.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PolicyError {
    /// It would refuse no one.
    #[error("there are no rules")]
    Empty,
    /// It has more rules than the service checks for each request.
    #[error(
        "more than {MAX_CREDENTIALS} user names with passwords, {MAX_CREDENTIALS} required headers or {MAX_NETWORKS} networks"
    )]
    TooMany,
    /// A salt or a hash has the wrong length.
    #[error("a salt must have {SALT_BYTES} bytes and a hash {HASH_BYTES}")]
    Hash,
    /// A visitor cannot be required to send this field.
    #[error(
        "the header {0} cannot be required: use a name of up to {MAX_FIELD_NAME_BYTES} characters that is not Host, Content-Length, or a forwarding or connection header"
    )]
    Field(String),
    /// Two kinds of rules would use the same field.
    #[error(
        "the header authorization cannot be required together with user names and passwords, which are sent in it"
    )]
    Authorization,
}

/// Why a visitor is refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DeniedError {
    /// No valid user name and password; the visitor may try again with one.
    Unauthorized,
    /// The visitor's address is not allowed.
    Address,
    /// A secret header field is missing or wrong.
    Field,
}

impl VisitorPolicy {
    /// Makes a policy. `salt` must be random and never used before. The texts in `basic` have the form
    /// `name:password`.
    ///
    /// # Errors
    /// If there are no rules, or the service would not accept one of them.
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

    /// A policy that refuses everyone, used in place of one that cannot be read.
    pub fn nobody() -> Self {
        let everybody = ["0.0.0.0/0", "::/0"].map(|network| network.parse().expect("a network"));
        Self(Fields {
            deny: everybody.to_vec(),
            ..Fields::default()
        })
    }

    /// As JSON, for [`crate::message::Ready::access`].
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).expect("lists of strings can always be encoded as JSON")
    }

    /// Checks a request from `address` with the header `fields`. An unknown address is in no network.
    ///
    /// # Errors
    /// The first kind of rule that the request does not satisfy, in the order: address, header fields,
    /// user name and password.
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
            // If there are several values for one name, any of them is accepted, so that a secret can be
            // changed without an interruption.
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

    /// Removes the fields that were meant for the service, so that the local service does not see the
    /// secrets.
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
            if !can_be_required(name) {
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
    fn from(policy: VisitorPolicy) -> Self {
        policy.0
    }
}

/// Whether a field with this name reaches the service as the visitor sent it. Names are in lower case,
/// as the crate `http` writes them.
fn can_be_required(name: &str) -> bool {
    let Ok(parsed) = name.parse::<HeaderName>() else {
        return false;
    };
    let mut alone = HeaderMap::from_iter([(parsed.clone(), HeaderValue::from_static("x"))]);
    headers::remove_hop_by_hop(&mut alone);
    headers::remove_forwarding(&mut alone);
    let is_ours = parsed == header::HOST || parsed == header::CONTENT_LENGTH;
    parsed.as_str() == name && name.len() <= MAX_FIELD_NAME_BYTES && !alone.is_empty() && !is_ours
}

/// The value of a field that is present exactly once. If it came twice, the local service might use
/// the other one.
fn only_value<'f>(fields: &'f HeaderMap, name: &str) -> Option<&'f HeaderValue> {
    let mut values = fields.get_all(name).iter();
    values.next().filter(|_| values.next().is_none())
}

/// User name and password of `Authorization: Basic`, as `name:password` (RFC 7617, 2).
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

/// Compares with all of them, even after a match, so that the time reveals nothing.
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

    fn policy(
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
    fn how_long_a_comparison_takes_does_not_tell_which_secret_was_right() {
        let secrets = ["first", "second", "third"].map(|secret| hash(b"salt", secret.as_bytes()));
        let accepted = secrets.map(|hash| Body(Bytes::copy_from_slice(&hash)));
        for guess in ["first", "third", "none of them"] {
            let mut compared = 0;
            let all = accepted.iter().inspect(|_| compared += 1);
            let is_right = is_one_of(&hash(b"salt", guess.as_bytes()), all);
            assert_eq!(is_right, guess != "none of them");
            assert_eq!(compared, accepted.len(), "{guess}");
        }
    }

    #[test]
    fn only_a_user_name_with_its_password_is_admitted() {
        let policy = policy(&["alice:opensesame", "bob:a:b"], &[], &[], &[]).expect("rules");
        let admit = |values: &[&str]| {
            let fields = HeaderMap::from_iter(
                values
                    .iter()
                    .map(|value| (header::AUTHORIZATION, value.parse().expect("a value"))),
            );
            policy.admit(None, &fields)
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
    fn denied_networks_override_allowed_ones_and_an_allow_list_excludes_all_others() {
        let both = policy(
            &[],
            &[],
            &["192.0.2.0/24", "2001:db8::/32"],
            &["192.0.2.128/25"],
        )
        .expect("rules");
        let only_deny = policy(&[], &[], &[], &["192.0.2.0/24"]).expect("rules");
        let admit = |policy: &VisitorPolicy, address: &str| {
            policy
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
        let policy = policy(
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
                policy.admit(None, &fields(sent)).is_ok(),
                is_admitted,
                "{sent:?}"
            );
        }
    }

    #[test]
    fn secrets_are_removed_and_nothing_else() {
        let of = |policy: VisitorPolicy| {
            let mut sent = fields(&[("authorization", "x"), ("x-key", "one"), ("accept", "*/*")]);
            policy.remove_secrets(&mut sent);
            sent
        };
        assert_eq!(
            of(policy(&["a:b"], &[], &[], &[]).expect("rules")),
            fields(&[("x-key", "one"), ("accept", "*/*")])
        );
        assert_eq!(
            of(policy(&[], &[("x-key", "one")], &[], &[]).expect("rules")),
            fields(&[("authorization", "x"), ("accept", "*/*")])
        );
    }

    #[test]
    fn a_policy_survives_the_wire_and_reveals_no_secret() {
        let policy = policy(
            &["alice:opensesame"],
            &[("x-key", "swordfish")],
            &["192.0.2.0/24"],
            &["::1"],
        )
        .expect("rules");
        let text = serde_json::to_string(&policy).expect("JSON");
        assert!(
            !text.contains("sesame") && !text.contains("alice") && !text.contains("swordfish"),
            "{text}"
        );
        assert_eq!(
            serde_json::from_str::<VisitorPolicy>(&text).expect("what we wrote"),
            policy
        );
        let other_salt =
            VisitorPolicy::new([8; SALT_BYTES], &["alice:opensesame"], &[], vec![], vec![])
                .expect("rules");
        assert_ne!(
            other_salt.0.basic[0], policy.0.basic[0],
            "a secret must not have the same hash in every session"
        );
    }

    #[test]
    fn policies_that_cannot_be_enforced_are_refused() {
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
                policy(
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
                policy(&[], &[], &vec!["::1"; count - 1], &["::2"]).err(),
                expected,
                "{count}"
            );
        }
        assert_eq!(policy(&[], &[], &[], &[]), Err(PolicyError::Empty));
        assert_eq!(
            policy(&["a:b"], &[("authorization", "x")], &[], &[]),
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
                policy(&[], &[(name, "x")], &[], &[]),
                Err(PolicyError::Field(name.to_owned()))
            );
        }
    }

    #[test]
    fn a_policy_of_another_form_is_not_read() {
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
    fn a_policy_that_cannot_be_read_admits_no_one() {
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
