//! What a message must not repeat of what a user has written, because it may be a secret in the wrong place.

/// Whether a text is a token of a service of its own, or a JWT. No host has such a name, and a resolver must not be asked for it.
pub fn is_like_a_token(text: &str) -> bool {
    let is_own = text
        .strip_prefix("ttf_")
        .is_some_and(|rest| rest.len() >= 16 && rest.bytes().all(|byte| byte.is_ascii_hexdigit()));
    is_own || (text.starts_with("eyJ") && text.len() > 20)
}

/// Whether a word may be a token, or an address with a password in it.
pub fn may_be_secret(word: &str) -> bool {
    word.contains('@') || is_like_a_token(word)
}

/// The words of a file's text that may be secrets.
pub(crate) fn secrets(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c.is_whitespace() || "\"'`=,#[](){}".contains(c))
        .filter(|word| may_be_secret(word))
}
