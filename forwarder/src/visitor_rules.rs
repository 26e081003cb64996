//! Which visitors a tunnel admits, as its user writes it. The service enforces it, and gets only hashes.

use std::str::FromStr;

use http::{HeaderName, HeaderValue};
use rand::RngExt;
use tunnel_protocol::{
    cidr::Cidr,
    visitor_policy::{PolicyError, VisitorPolicy},
};

use crate::settings::Secret;

/// The rules of one tunnel as they were written, not checked yet.
#[derive(Clone, Debug, Default)]
pub struct PolicyArgs {
    /// `USER:PASSWORD` pairs of which a visitor must have one.
    pub basic_auth: Option<Vec<Secret>>,
    /// Networks from which visitors are admitted; if empty, from everywhere.
    pub allow: Option<Vec<Cidr>>,
    /// Networks from which visitors are refused.
    pub deny: Option<Vec<Cidr>>,
    /// `NAME: VALUE` fields that each request must have.
    pub require_header: Option<Vec<Secret>>,
}

/// What is wrong with the rules. Reveals no secret.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PolicyArgsError {
    /// Not a name with a password.
    #[error(
        "basic_auth must be USER:PASSWORD, with both parts non-empty, no colon in the user name and no control characters"
    )]
    BasicAuth,
    /// Not a header field.
    #[error(
        "require_header must be NAME: VALUE, such as X-Secret: 5ca1ab1e, with a name and a value that HTTP allows"
    )]
    RequireHeader,
    /// What the service would not accept.
    #[error("basic_auth, require_header, allow and deny: {0}")]
    PolicyError(#[from] PolicyError),
}

/// Validated rules. Without rules every visitor is admitted.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    basic_auth: Vec<Secret>,
    require_header: Vec<(HeaderName, HeaderValue)>,
    allow: Vec<Cidr>,
    deny: Vec<Cidr>,
}

impl PolicyArgs {
    /// Checks them.
    ///
    /// # Errors
    /// If one is malformed, or there are more than the service takes.
    pub fn check(self) -> Result<Policy, PolicyArgsError> {
        let basic_auth = self.basic_auth.unwrap_or_default();
        if !basic_auth
            .iter()
            .all(|credentials| is_basic_auth(credentials.reveal()))
        {
            return Err(PolicyArgsError::BasicAuth);
        }
        let require_header: Option<Vec<_>> = self
            .require_header
            .unwrap_or_default()
            .iter()
            .map(|field| header(field.reveal()))
            .collect();
        let checked = Policy {
            basic_auth,
            require_header: require_header.ok_or(PolicyArgsError::RequireHeader)?,
            allow: self.allow.unwrap_or_default(),
            deny: self.deny.unwrap_or_default(),
        };
        if !checked.is_empty() {
            checked.access([0; 16])?;
        }
        Ok(checked)
    }
}

impl Policy {
    /// The names of the fields that a request must have. Their values are secrets.
    pub fn required_headers(&self) -> impl Iterator<Item = HeaderName> {
        self.require_header.iter().map(|(name, _)| name.clone())
    }

    /// Whether every visitor is admitted.
    pub fn is_empty(&self) -> bool {
        self.basic_auth.is_empty()
            && self.require_header.is_empty()
            && self.allow.is_empty()
            && self.deny.is_empty()
    }

    /// What one connection sends to the service, with its own salt; `None` if every visitor is admitted.
    pub fn for_one_connection(&self) -> Option<VisitorPolicy> {
        (!self.is_empty()).then(|| {
            self.access(rand::rng().random())
                .expect("they were checked")
        })
    }

    fn access(&self, salt: [u8; 16]) -> Result<VisitorPolicy, PolicyError> {
        let basic: Vec<&str> = self.basic_auth.iter().map(Secret::reveal).collect();
        VisitorPolicy::new(
            salt,
            &basic,
            &self.require_header,
            self.allow.clone(),
            self.deny.clone(),
        )
    }
}

/// RFC 7617, 2.
fn is_basic_auth(text: &str) -> bool {
    let has_both = text
        .split_once(':')
        .is_some_and(|(name, password)| !name.is_empty() && !password.is_empty());
    has_both && !text.chars().any(char::is_control)
}

fn header(text: &str) -> Option<(HeaderName, HeaderValue)> {
    let (name, value) = text.split_once(':')?;
    let mut value = HeaderValue::from_str(value.trim())
        .ok()
        .filter(|value| !value.is_empty())?;
    value.set_sensitive(true);
    Some((HeaderName::from_str(name.trim()).ok()?, value))
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    fn rules(basic_auth: &[&str], require_header: &[&str]) -> PolicyArgs {
        let secrets = |texts: &[&str]| {
            Some(
                texts
                    .iter()
                    .map(|text| Secret::from((*text).to_owned()))
                    .collect(),
            )
        };
        PolicyArgs {
            basic_auth: secrets(basic_auth),
            require_header: secrets(require_header),
            ..PolicyArgs::default()
        }
    }

    #[test]
    fn visitor_rules_are_validated_before_a_tunnel_opens_and_errors_reveal_no_secret() {
        for (good, header) in [
            ("alice:x", "X-Key: 1"),
            ("a b:c:d", "x-key:1"),
            ("\u{e9}:\u{2615}", "authorization: Bearer x"),
        ] {
            assert!(rules(&[good], &[]).check().is_ok(), "{good}");
            assert!(rules(&[], &[header]).check().is_ok(), "{header}");
        }
        for bad in [
            "",
            "swordfish",
            ":swordfish",
            "swordfish:",
            "alice:sword\nfish",
        ] {
            let fault = rules(&[bad], &[]).check().expect_err(bad);
            assert_eq!(fault, PolicyArgsError::BasicAuth);
            assert!(!fault.to_string().contains("sword"), "{fault}");
        }
        for bad in [
            "",
            "swordfish",
            "x y: swordfish",
            ": swordfish",
            "x-key:",
            "x-key: sword\nfish",
        ] {
            let fault = rules(&[], &[bad]).check().expect_err(bad);
            assert_eq!(fault, PolicyArgsError::RequireHeader);
        }
        for bad in ["Host: swordfish", "X-Forwarded-For: swordfish"] {
            let fault = rules(&[], &[bad]).check().expect_err(bad);
            assert!(
                matches!(fault, PolicyArgsError::PolicyError(PolicyError::Field(_)))
                    && !fault.to_string().contains("sword"),
                "{fault}"
            );
        }
        assert!(rules(&["a:b"; 33], &[]).check().is_err());
        assert!(rules(&[], &[]).check().expect("no rules").is_empty());
        assert!(
            !format!(
                "{:?}",
                rules(&["a:swordfish"], &["x-key: swordfish"]).check()
            )
            .contains("sword")
        );
    }

    #[test]
    fn every_connection_has_its_own_salt() {
        let checked = rules(&["alice:swordfish"], &["X-Key: swordfish"])
            .check()
            .expect("rules");
        let [one, two] = [(); 2].map(|()| checked.for_one_connection().expect("rules"));
        assert_ne!(one, two);
        assert!(one.admit(None, &HeaderMap::new()).is_err());
        assert_eq!(Policy::default().for_one_connection(), None);
    }
}
