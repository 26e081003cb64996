//! Which header fields are secrets, and how they are shown.

use http::{HeaderName, HeaderValue, header};
use tunnel_protocol::headers::value_to_text;

/// Stands in the place of a secret.
pub(crate) const MASK: &str = "[masked]";

/// Fields that are secrets in every tunnel.
const SECRET_FIELDS: [HeaderName; 4] = [
    header::AUTHORIZATION,
    header::PROXY_AUTHORIZATION,
    header::COOKIE,
    header::SET_COOKIE,
];

/// What is masked in the exchanges of a tunnel.
#[derive(Clone, Debug, Default)]
pub(crate) struct Masking {
    /// Fields that visitors must send to be admitted.
    required: Vec<HeaderName>,
}

impl Masking {
    pub(crate) fn new(required: impl IntoIterator<Item = HeaderName>) -> Self {
        Self {
            required: required.into_iter().collect(),
        }
    }

    /// Whether the field is a secret.
    pub(crate) fn hides(&self, name: &HeaderName) -> bool {
        SECRET_FIELDS.contains(name) || self.required.contains(name)
    }

    /// The value of a field as it may be shown. What tells exchanges apart without being a secret stays: the scheme of an
    /// authorization, the names of cookies and their attributes.
    pub(crate) fn show(&self, name: &HeaderName, value: &HeaderValue) -> String {
        let text = value_to_text(value);
        if !self.hides(name) {
            return text.into_owned();
        }
        match *name {
            header::AUTHORIZATION | header::PROXY_AUTHORIZATION => match text.split_once(' ') {
                Some((scheme, _)) => format!("{scheme} {MASK}"),
                None => MASK.to_owned(),
            },
            header::COOKIE => {
                let pairs: Vec<_> = text.split(';').map(mask_pair).collect();
                pairs.join("; ")
            }
            header::SET_COOKIE => match text.split_once(';') {
                Some((pair, attributes)) => format!("{};{attributes}", mask_pair(pair)),
                None => mask_pair(&text),
            },
            _ => MASK.to_owned(),
        }
    }
}

fn mask_pair(pair: &str) -> String {
    match pair.trim().split_once('=') {
        Some((name, _)) => format!("{name}={MASK}"),
        None => MASK.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_masked_and_what_tells_exchanges_apart_stays() {
        let masking = Masking::new([HeaderName::from_static("x-gate")]);
        for (name, value, shown) in [
            ("authorization", "Bearer abc.def", "Bearer [masked]"),
            ("authorization", "abcdef", "[masked]"),
            ("cookie", "a=1; session=2=3", "a=[masked]; session=[masked]"),
            ("cookie", "naked", "[masked]"),
            (
                "set-cookie",
                "id=1; Path=/; HttpOnly",
                "id=[masked]; Path=/; HttpOnly",
            ),
            ("x-gate", "sesame", "[masked]"),
            ("x-other", "sesame", "sesame"),
        ] {
            let name: HeaderName = name.parse().expect("a name");
            let value = HeaderValue::from_static(value);
            assert_eq!(masking.show(&name, &value), shown);
        }
    }
}
