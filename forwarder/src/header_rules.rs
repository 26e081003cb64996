//! Header fields that the user of a tunnel sets, adds or removes, in requests and in responses.

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::settings::Secret;

/// Fields that rules must leave alone, because they say how a message is framed or connected, or are the tunnel's own.
const PROTECTED: [&str; 11] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "via",
    "x-tunnel-error",
];

/// Rules, applied in the order in which they were written.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct HeaderRules(Vec<HeaderRule>);

#[derive(Clone, Debug, Eq, PartialEq)]
enum HeaderRule {
    /// In place of all fields of the name.
    Set(HeaderName, HeaderValue),
    /// Beside them.
    Add(HeaderName, HeaderValue),
    Remove(HeaderName),
}

/// What is wrong with a rule. Reveals no value.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum HeaderRuleError {
    /// Not a rule.
    #[error(
        "must be \"NAME: VALUE\" to set a field, \"+NAME: VALUE\" to add one, or \"-NAME\" to remove it, with a name and a value that HTTP allows"
    )]
    Syntax,
    /// A field that is not the user's to change.
    #[error("cannot change {0}{hint}", hint = if *.0 == http::header::HOST { ", which --host-header does" } else { ", which the tunnel sets itself" })]
    Protected(HeaderName),
}

impl HeaderRules {
    /// Reads rules: `NAME: VALUE`, `+NAME: VALUE` or `-NAME`.
    ///
    /// # Errors
    /// If one is malformed, or about a field that is not the user's to change.
    pub fn parse(rules: &[Secret]) -> Result<Self, HeaderRuleError> {
        rules
            .iter()
            .map(|rule| parse(rule.reveal()))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Changes the fields of a message.
    pub fn apply(&self, fields: &mut HeaderMap) {
        for rule in &self.0 {
            match rule {
                HeaderRule::Set(name, value) => {
                    fields.insert(name, value.clone());
                }
                HeaderRule::Add(name, value) => {
                    fields.append(name, value.clone());
                }
                HeaderRule::Remove(name) => {
                    fields.remove(name);
                }
            }
        }
    }
}

fn parse(text: &str) -> Result<HeaderRule, HeaderRuleError> {
    let name = |text: &str| {
        let name: HeaderName = text.trim().parse().map_err(|_| HeaderRuleError::Syntax)?;
        if PROTECTED.contains(&name.as_str()) {
            return Err(HeaderRuleError::Protected(name));
        }
        Ok(name)
    };
    if let Some(removed) = text.strip_prefix('-') {
        return name(removed).map(HeaderRule::Remove);
    }
    let (field, is_added) = match text.strip_prefix('+') {
        Some(field) => (field, true),
        None => (text, false),
    };
    let (field, value) = field.split_once(':').ok_or(HeaderRuleError::Syntax)?;
    let field = name(field)?;
    let mut value: HeaderValue = value.trim().parse().map_err(|_| HeaderRuleError::Syntax)?;
    value.set_sensitive(true);
    Ok(if is_added {
        HeaderRule::Add(field, value)
    } else {
        HeaderRule::Set(field, value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(texts: &[&str]) -> Result<HeaderRules, HeaderRuleError> {
        let rules: Vec<Secret> = texts.iter().map(|text| (*text).to_owned().into()).collect();
        HeaderRules::parse(&rules)
    }

    #[test]
    fn fields_are_set_added_and_removed_in_order() {
        let mut fields = HeaderMap::new();
        for (name, value) in [("x-a", "1"), ("x-a", "2"), ("x-b", "1"), ("x-c", "1")] {
            fields.append(
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            );
        }
        let rules = rules(&["X-A: 3", "+x-b:2", "-X-C", "x-d: a: b", "x-e:"]).expect("rules");
        rules.apply(&mut fields);
        let all = |name: &str| fields.get_all(name).iter().cloned().collect::<Vec<_>>();
        assert_eq!(all("x-a"), ["3"]);
        assert_eq!(all("x-b"), ["1", "2"]);
        assert!(all("x-c").is_empty());
        assert_eq!(all("x-d"), ["a: b"]);
        assert_eq!(all("x-e"), [""]);
    }

    #[test]
    fn a_rule_cannot_break_a_message_apart() {
        for text in ["", "x", ":", "a b: c", "x: a\r\ny: b", "-", "+x", "-x: y"] {
            assert_eq!(rules(&[text]), Err(HeaderRuleError::Syntax), "{text:?}");
        }
        for text in [
            "Content-Length: 3",
            "-transfer-encoding",
            "+Host: x",
            "X-Tunnel-Error: x",
        ] {
            let error = rules(&[text]).expect_err(text);
            assert!(matches!(error, HeaderRuleError::Protected(_)), "{error}");
        }
        let host = rules(&["Host: x"]).expect_err("Host").to_string();
        assert!(host.contains("--host-header"), "{host}");
        let secret = rules(&["Authorization: Bearer hunter2"]).expect("rules");
        assert!(!format!("{secret:?}").contains("hunter2"));
    }
}
