//! Where addresses stand in the values of header fields.

use http::HeaderValue;
use tunnel_protocol::headers::{text_to_value, value_to_text};

/// Maps a value, byte by byte: not every service writes ASCII only. Returns whether it has changed.
pub(super) fn map_value(value: &mut HeaderValue, map: impl Fn(&str) -> Option<String>) -> bool {
    let mapped = map(&value_to_text(value)).and_then(|text| text_to_value(&text));
    let has_changed = mapped.is_some();
    if let Some(mapped) = mapped {
        *value = mapped;
    }
    has_changed
}

/// Maps the address in `5; url=/next`.
pub(super) fn refresh(value: &str, map: impl Fn(&str) -> Option<String>) -> Option<String> {
    let (delay, parameter) = value.split_at(value.find([';', ','])?);
    let (name, address) = parameter.split_once('=')?;
    if !name[1..].trim().eq_ignore_ascii_case("url") {
        return None;
    }
    let address = address.trim();
    let quote = if address.starts_with(['"', '\'']) {
        &address[..1]
    } else {
        ""
    };
    let address = address.strip_prefix(quote)?;
    let address = address.strip_suffix(quote).unwrap_or(address);
    Some(format!("{delay}{name}={quote}{}{quote}", map(address)?))
}

/// Maps the addresses in `<...>` that are not within a quoted text (RFC 8288, 3).
pub(super) fn links(value: &str, map: impl Fn(&str) -> Option<String>) -> Option<String> {
    let mut mapped = String::with_capacity(value.len());
    let mut has_changed = false;
    let mut rest = value;
    let mut is_quoted = false;
    while let Some(at) = rest.find(['<', '"', '\\']) {
        let (before, found) = rest.split_at(at);
        mapped.push_str(before);
        let length = match found.as_bytes()[0] {
            b'"' => {
                is_quoted = !is_quoted;
                1
            }
            b'\\' if is_quoted => found.chars().take(2).map(char::len_utf8).sum(),
            b'<' if !is_quoted => match found.find('>') {
                Some(end) => {
                    if let Some(address) = map(&found[1..end]) {
                        has_changed = true;
                        mapped.push_str(&format!("<{address}>"));
                        rest = &found[end + 1..];
                        continue;
                    }
                    end + 1
                }
                None => found.len(),
            },
            _ => 1,
        };
        mapped.push_str(&found[..length]);
        rest = &found[length..];
    }
    mapped.push_str(rest);
    has_changed.then_some(mapped)
}
