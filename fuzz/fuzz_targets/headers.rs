//! Any bytes as the lines of a header. Proves that every value survives the wire, that exactly the texts
//! without control characters are values, that every map within the limit survives JSON, and that
//! [`remove_hop_by_hop`] removes what docs/protocol.md lists and nothing else.
#![no_main]

use http::{HeaderMap, HeaderName, HeaderValue, header::CONNECTION};
use libfuzzer_sys::fuzz_target;
use tunnel_protocol::{
    headers::{json, remove_hop_by_hop, text_to_value, value_to_text},
    limits::MAX_HEADER_FIELDS,
};

const HOP_BY_HOP: &str = "connection,keep-alive,proxy-connection,proxy-authenticate,proxy-authorization,te,trailer,transfer-encoding,upgrade";

fuzz_target!(|bytes: &[u8]| {
    let mut headers = HeaderMap::new();
    for line in bytes.split(|&byte| byte == b'\n') {
        let (name, value) = line.split_at(line.iter().position(|&byte| byte == b':').unwrap_or(0));
        let Ok(value) = HeaderValue::from_bytes(value.strip_prefix(b":").unwrap_or(value)) else {
            continue;
        };
        assert_eq!(text_to_value(&value_to_text(&value)).as_ref(), Some(&value));
        if let Ok(name) = HeaderName::from_bytes(name) {
            headers.append(name, value);
        }
    }
    assert_eq!(
        from_json(&to_json(&headers)).as_ref(),
        Some(&headers).filter(|headers| headers.len() <= MAX_HEADER_FIELDS)
    );
    check_hop_by_hop(headers);

    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    if let Some(headers) = from_json(text) {
        assert_eq!(from_json(&to_json(&headers)), Some(headers));
    }
    let value = text_to_value(text);
    assert_eq!(
        value.is_none(),
        text.chars().any(|c| c != '\t' && c.is_ascii_control())
    );
    let is_latin_1 = text.chars().all(|c| c <= '\u{ff}');
    assert!(value.is_none_or(|value| if is_latin_1 {
        value_to_text(&value) == text
    } else {
        value == text
    }));
});

fn check_hop_by_hop(mut headers: HeaderMap) {
    let options = headers
        .get_all(CONNECTION)
        .into_iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    let ends_here: Vec<&[u8]> = HOP_BY_HOP
        .split(',')
        .map(str::as_bytes)
        .chain(options.map(<[u8]>::trim_ascii))
        .collect();
    let goes_on = |name: &HeaderName| {
        !ends_here
            .iter()
            .any(|ends| ends.eq_ignore_ascii_case(name.as_ref()))
    };
    let fields = headers.iter().filter(|(name, _)| goes_on(name));
    let expected: HeaderMap = fields
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    remove_hop_by_hop(&mut headers);
    assert_eq!(headers, expected);
}

fn to_json(headers: &HeaderMap) -> String {
    let mut text = Vec::new();
    json::serialize(headers, &mut serde_json::Serializer::new(&mut text))
        .expect("every map has a JSON text");
    String::from_utf8(text).expect("JSON is UTF-8")
}

fn from_json(text: &str) -> Option<HeaderMap> {
    json::deserialize(&mut serde_json::Deserializer::from_str(text)).ok()
}
