//! HTTP header rules: which fields a tunnel passes on, and how their bytes travel in JSON.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue, header};

/// Marks an error that the tunnel itself generated, with its code. A local service cannot send it.
pub const TUNNEL_ERROR: HeaderName = HeaderName::from_static("x-tunnel-error");
/// In an agent's handshake, with any value: the agent would send binary messages whole in one frame, however long. A service that
/// reads such frames repeats the field in its answer; one that does not know it ignores it.
pub const LONG_FRAMES: HeaderName = HeaderName::from_static("x-tunnel-long-frames");
/// The path prefix under which the visitor sees the local service's root; absent if there is none.
pub const FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");
/// The visitor's address.
pub const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// The scheme the visitor used.
pub const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// The host the visitor used.
pub const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Fields that apply to one connection and not to the message (RFC 9110, 7.6.1), including obsolete ones.
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Few messages have more header fields, so reading one seldom moves what was read already.
pub(crate) const USUAL_FIELDS: usize = 24;

/// Removes the fields that end at this hop: the fixed list and those that `Connection` names.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        // It is for the other end, whatever a sender says (RFC 9110, 7.6.1).
        .filter(|name| name != header::HOST)
        .collect();
    remove_all(headers, |name| HOP_BY_HOP.contains(&name.as_str()));
    for name in named {
        headers.remove(name);
    }
}

/// Removes the fields whose names `is_unwanted`. Most requests have few fields, and none of these.
fn remove_all(headers: &mut HeaderMap, is_unwanted: impl Fn(&HeaderName) -> bool) {
    let unwanted: Vec<HeaderName> = headers
        .keys()
        .filter(|name| is_unwanted(name))
        .cloned()
        .collect();
    for name in unwanted {
        headers.remove(name);
    }
}

/// Fields in which proxies and content delivery networks tell a visitor's address, and from which frameworks take it, beside those
/// that begin with `x-forwarded-`.
const VISITOR_ADDRESS: [&str; 11] = [
    "cf-connecting-ip",
    "client-ip",
    "fastly-client-ip",
    "forwarded",
    "forwarded-for",
    "true-client-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-forwarded",
    "x-originating-ip",
    "x-real-ip",
];

/// Removes everything a visitor may claim about where a request comes from: only what the front saw
/// counts.
pub fn remove_forwarding(headers: &mut HeaderMap) {
    remove_all(headers, is_forwarding);
}

fn is_forwarding(name: &HeaderName) -> bool {
    // Servers that hand fields on as variables (RFC 3875, 4.1.18) cannot tell one from the other.
    let name = match name.as_str() {
        name if name.contains('_') => Cow::Owned(name.replace('_', "-")),
        name => Cow::Borrowed(name),
    };
    name.starts_with("x-forwarded-") || VISITOR_ADDRESS.contains(&&*name)
}

/// Whether a request says that it has come through a proxy.
pub fn says_forwarded(headers: &HeaderMap) -> bool {
    headers.contains_key(header::VIA) || headers.keys().any(is_forwarding)
}

/// Converts a header value's bytes to text that JSON can carry: each byte becomes the character with
/// the same number.
///
/// Header values are bytes (RFC 9110, 5.5). Read as Latin-1, each value has exactly one text, and each
/// such text exactly one value.
pub fn value_to_text(value: &HeaderValue) -> Cow<'_, str> {
    match value.to_str() {
        Ok(ascii) => Cow::Borrowed(ascii),
        Err(_) => value.as_bytes().iter().copied().map(char::from).collect(),
    }
}

/// The inverse of [`value_to_text`]. A text with characters above U+00FF can only come from a peer that
/// decoded the value as UTF-8, so it is encoded as UTF-8. `None` if the text contains characters that no
/// header value may contain.
pub fn text_to_value(text: &str) -> Option<HeaderValue> {
    if text.is_ascii() {
        return HeaderValue::from_str(text).ok();
    }
    let bytes: Option<Vec<u8>> = text
        .chars()
        .map(|c| u8::try_from(u32::from(c)).ok())
        .collect();
    HeaderValue::from_bytes(bytes.as_deref().unwrap_or(text.as_bytes())).ok()
}

/// Header fields in JSON: `{"name": ["value", ..]}`, names in order of first appearance. For `#[serde(with = ..)]`.
pub mod json {
    use std::{borrow::Cow, fmt};

    use http::{
        HeaderMap, HeaderName, HeaderValue,
        header::{Entry, GetAll},
    };
    use serde::{
        Deserialize, Deserializer, Serialize, Serializer,
        de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor},
        ser::SerializeMap,
    };

    use super::{USUAL_FIELDS, text_to_value, value_to_text};
    use crate::limits::MAX_HEADER_FIELDS;

    /// Writes the fields.
    ///
    /// # Errors
    /// Only those of the serializer.
    pub fn serialize<S: Serializer>(headers: &HeaderMap, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(headers.keys_len()))?;
        for name in headers.keys() {
            map.serialize_entry(name.as_str(), &Values(headers.get_all(name)))?;
        }
        map.end()
    }

    /// The values of one name.
    struct Values<'h>(GetAll<'h, HeaderValue>);

    impl Serialize for Values<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_seq(self.0.iter().map(value_to_text))
        }
    }

    /// Reads the fields.
    ///
    /// # Errors
    /// If a name or value is not allowed in HTTP, or there are more than [`MAX_HEADER_FIELDS`] fields.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<HeaderMap, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = HeaderMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of header names, each with a list of values")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<HeaderMap, A::Error> {
                let mut headers = HeaderMap::with_capacity(USUAL_FIELDS);
                let mut room = MAX_HEADER_FIELDS;
                while let Some(Text(name)) = map.next_key::<Text<'de>>()? {
                    let name = HeaderName::from_bytes(name.as_bytes())
                        .map_err(|_| A::Error::custom("a header name that HTTP does not allow"))?;
                    map.next_value_seed(ReadValues {
                        field: headers.entry(name),
                        room: &mut room,
                    })?;
                }
                Ok(headers)
            }
        }

        deserializer.deserialize_map(Fields)
    }

    /// Borrowed from the JSON where that has no escapes.
    #[derive(Deserialize)]
    #[serde(transparent)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

    /// Reads the values of one name to where they belong.
    struct ReadValues<'h> {
        field: Entry<'h, HeaderValue>,
        /// How many more there may be.
        room: &'h mut usize,
    }

    impl<'de> DeserializeSeed<'de> for ReadValues<'_> {
        type Value = ();

        fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
            deserializer.deserialize_seq(self)
        }
    }

    impl<'de> Visitor<'de> for ReadValues<'_> {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of values")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<(), A::Error> {
            let Self { mut field, room } = self;
            while let Some(Text(value)) = values.next_element::<Text<'de>>()? {
                *room = room.checked_sub(1).ok_or_else(|| {
                    A::Error::custom(format_args!("more than {MAX_HEADER_FIELDS} header fields"))
                })?;
                let value = text_to_value(&value).ok_or_else(|| {
                    let name = field.key();
                    A::Error::custom(format_args!("a value of {name} that HTTP does not allow"))
                })?;
                field = Entry::Occupied(match field {
                    Entry::Vacant(field) => field.insert_entry(value),
                    Entry::Occupied(mut field) => {
                        field.append(value);
                        field
                    }
                });
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::MAX_HEADER_FIELDS;

    fn map(fields: &[(&str, &str)]) -> HeaderMap {
        fields
            .iter()
            .map(|(name, value)| {
                (
                    name.parse::<HeaderName>().expect("a name"),
                    HeaderValue::from_str(value).expect("a value"),
                )
            })
            .collect()
    }

    #[test]
    fn hop_by_hop_fields_and_those_connection_names_are_removed() {
        let mut headers = map(&[
            ("connection", "close, X-Hop, Host"),
            ("x-hop", "1"),
            ("host", "x"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("x-end", "2"),
        ]);
        remove_hop_by_hop(&mut headers);
        assert_eq!(headers, map(&[("host", "x"), ("x-end", "2")]));
    }

    #[test]
    fn every_field_that_concerns_one_connection_only_is_removed() {
        // As RFC 9110, 7.6.1 lists them, and the two for proxies.
        for name in [
            "connection",
            "keep-alive",
            "proxy-authenticate",
            "proxy-authorization",
            "proxy-connection",
            "te",
            "trailer",
            "transfer-encoding",
            "upgrade",
        ] {
            let mut headers = map(&[(name, "x"), ("x-end", "1")]);
            remove_hop_by_hop(&mut headers);
            assert_eq!(headers, map(&[("x-end", "1")]), "{name}");
        }
    }

    #[test]
    fn a_connection_field_with_binary_bytes_still_names_fields() {
        let mut headers = map(&[("x-hop", "1"), ("x-end", "2")]);
        headers.insert(
            "connection",
            HeaderValue::from_bytes(b"close, x-hop, \xff").expect("a value"),
        );
        remove_hop_by_hop(&mut headers);
        assert_eq!(headers, map(&[("x-end", "2")]));
    }

    #[test]
    fn forwarding_fields_from_a_visitor_are_removed() {
        let mut headers = map(&[
            ("x-forwarded-for", "1.2.3.4"),
            ("X-Forwarded-Anything", "x"),
            ("forwarded", "for=1.2.3.4"),
            ("x-real-ip", "1.2.3.4"),
            ("x_forwarded_for", "1.2.3.4"),
            ("x_real_ip", "1.2.3.4"),
            ("true-client-ip", "1.2.3.4"),
            ("x-client-ip", "1.2.3.4"),
            ("client_ip", "1.2.3.4"),
            ("cf-connecting-ip", "1.2.3.4"),
            ("x-cluster_client-ip", "1.2.3.4"),
            ("x-forwarded", "1.2.3.4"),
            ("via", "1.1 p"),
        ]);
        remove_forwarding(&mut headers);
        assert_eq!(headers, map(&[("via", "1.1 p")]));
    }

    #[test]
    fn as_many_fields_are_read_as_the_limit_says_and_no_more() {
        for (count, is_read) in [(MAX_HEADER_FIELDS, true), (MAX_HEADER_FIELDS + 1, false)] {
            let (name, values) = ("x-many", vec!["1"; count - 1]);
            let fields = serde_json::json!({ name: values, "x-one": ["1"] }).to_string();
            let read = json::deserialize(&mut serde_json::Deserializer::from_str(&fields));
            assert_eq!(read.is_ok(), is_read, "{count}: {read:?}");
        }
    }

    #[test]
    fn a_value_beyond_latin_1_is_read_as_utf_8() {
        let value = text_to_value("\u{2615}").expect("allowed");
        assert_eq!(value.as_bytes(), "\u{2615}".as_bytes());
        assert_eq!(text_to_value("a\nb"), None);
    }

    proptest! {
        #[test]
        fn every_header_value_survives_the_wire(bytes in prop::collection::vec(prop_oneof![32u8..=126, 128u8..=255, Just(9u8)], 0..64)) {
            let value = HeaderValue::from_bytes(&bytes).expect("made of allowed bytes");
            prop_assert_eq!(text_to_value(&value_to_text(&value)), Some(value));
        }
    }
}
