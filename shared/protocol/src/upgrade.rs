//! Upgraded connections (RFC 9110, 7.8), WebSockets above all: which requests ask for one, and which fields belong to the hop.

use http::{HeaderMap, HeaderValue, header};

/// The protocols a request asks to change to: the value of `Upgrade`, where `Connection` names that field too.
///
/// `h2c` is not among them. Clients offer it beside ordinary requests, which it is right to answer as such (RFC 9113, 3.1).
pub fn requested(headers: &HeaderMap) -> Option<&HeaderValue> {
    let is_named = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|name| name.trim().eq_ignore_ascii_case("upgrade"));
    headers
        .get(header::UPGRADE)
        .filter(|_| is_named)
        .filter(|value| !value.as_bytes().eq_ignore_ascii_case(b"h2c"))
}

/// Writes the two fields that ask for an upgrade, or accept one, on the next hop.
pub fn set(headers: &mut HeaderMap, protocols: HeaderValue) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, protocols);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(fields: &[(http::HeaderName, &str)]) -> Option<String> {
        let headers = fields
            .iter()
            .map(|(name, value)| (name.clone(), HeaderValue::from_str(value).expect("a value")))
            .collect();
        requested(&headers).map(|value| value.to_str().expect("text").to_owned())
    }

    #[test]
    fn an_upgrade_is_requested_by_both_fields() {
        for (connection, upgrade, expected) in [
            ("Upgrade", "websocket", Some("websocket")),
            ("keep-alive, upgrade", "WebSocket", Some("WebSocket")),
            ("upgrade", "irc/6.9, x-own", Some("irc/6.9, x-own")),
            ("upgrade, http2-settings", "h2c", None),
            ("keep-alive", "websocket", None),
        ] {
            let fields = [(header::CONNECTION, connection), (header::UPGRADE, upgrade)];
            assert_eq!(of(&fields).as_deref(), expected, "{connection} {upgrade}");
        }
        assert_eq!(of(&[(header::CONNECTION, "upgrade")]), None);
        assert_eq!(of(&[(header::UPGRADE, "websocket")]), None);
    }
}
