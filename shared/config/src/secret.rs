//! What a message must not repeat of what a user has written, because it may be a secret in the wrong place.

/// What a service's own tokens begin with, and how many hexadecimal digits follow at least.
const OWN_TOKEN: (&str, usize) = ("ttf_", 16);
/// What a JWT begins with, and how many bytes follow at least.
const JWT: (&str, usize) = ("eyJ", 18);

/// Whether a text is a token of a service of its own, or a JWT. No host has such a name, and a resolver must not be asked for it.
pub fn is_like_a_token(text: &str) -> bool {
    let own = text.strip_prefix(OWN_TOKEN.0);
    let is_own = own.is_some_and(|rest| {
        rest.len() >= OWN_TOKEN.1 && rest.bytes().all(|byte| byte.is_ascii_hexdigit())
    });
    is_own
        || text
            .strip_prefix(JWT.0)
            .is_some_and(|rest| rest.len() >= JWT.1)
}

/// Whether a text may hold a token, or an address with a password in it.
pub fn may_be_secret(text: &str) -> bool {
    let holds = |(start, length): (&str, usize), is_token: fn(char) -> bool| {
        text.match_indices(start).any(|(at, _)| {
            let rest = text[at + start.len()..].chars();
            rest.take_while(|c| is_token(*c)).count() >= length
        })
    };
    text.contains('@')
        || holds(OWN_TOKEN, |c| c.is_ascii_hexdigit())
        || holds(JWT, |c| !c.is_whitespace() && !is_quote(c))
}

/// The words of a text that may be secrets. Anything may be part of a password, so only quotes and white space end a word.
pub(crate) fn secrets(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c.is_whitespace() || is_quote(c))
        .filter(|word| may_be_secret(word))
}

/// What stands between quotes in a text and may be a secret, white space included.
pub(crate) fn quoted_secrets(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_quote).filter(|quoted| may_be_secret(quoted))
}

/// Whether it begins or ends a quotation, in TOML or in a message.
const fn is_quote(c: char) -> bool {
    matches!(c, '"' | '\'' | '`')
}
