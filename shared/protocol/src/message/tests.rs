use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::limits::{HEAD_LENGTH_BYTES, MAX_HEADER_FIELDS, MAX_MESSAGE_BYTES};

#[test]
fn each_peer_gets_the_format_that_it_reads() {
    for (features, format) in [
        (&[][..], Format::Text),
        (&[Feature::LongFrames], Format::Text),
        (&[Feature::CompactHeads], Format::Text),
        (
            &[Feature::Binary],
            Format::Binary(Framing::Short, Heads::Json),
        ),
        (
            &[Feature::Binary, Feature::LongFrames],
            Format::Binary(Framing::Whole, Heads::Json),
        ),
        (
            &[Feature::Binary, Feature::CompactHeads],
            Format::Binary(Framing::Short, Heads::Compact),
        ),
    ] {
        assert_eq!(Format::of(features), format, "{features:?}");
    }
}

#[test]
fn messages_of_the_first_agents_are_understood() {
    assert_eq!(
        decode::<FromAgent>(r#"{"type":"ready"}"#).expect("ready"),
        FromAgent::Ready(Ready::default())
    );
    assert_eq!(
        decode::<FromAgent>(r#"{"type":"ping"}"#).expect("ping"),
        FromAgent::Ping { id: None }
    );
    let response = r#"{"type":"http_response","request_id":"r1","status_code":200,"headers":{"x":["1","2"]},"body":"aGk=","processing_time_ms":5}"#;
    let FromAgent::HttpResponse(response) = decode(response).expect("a response") else {
        panic!("not a response")
    };
    assert_eq!(
        response.headers.get_all("x").iter().collect::<Vec<_>>(),
        ["1", "2"]
    );
    assert_eq!(response.body.0, "hi");
    assert!(!response.more);
}

#[test]
fn a_service_that_sends_three_fields_is_understood() {
    let text = r#"{"type":"connection_established","connection_id":"c=","tunnel_id":"abc","public_url":"https://x/abc"}"#;
    let ToAgent::ConnectionEstablished(established) = decode(text).expect("established") else {
        panic!("not established")
    };
    assert_eq!(established.features, []);
    assert_eq!(established.protocol, None);
}

#[test]
fn a_newer_peer_is_understood_as_far_as_it_goes() {
    assert_eq!(
        decode::<ToAgent>(r#"{"type":"dance","steps":3}"#).expect("unknown"),
        ToAgent::Unknown
    );
    let ready =
        decode::<FromAgent>(r#"{"type":"ready","protocol":9,"features":["ping_ids","teleport"]}"#)
            .expect("ready");
    assert_eq!(
        ready,
        FromAgent::Ready(Ready {
            protocol: Some(9),
            features: vec![Feature::PingIds, Feature::Unknown],
            ..Ready::default()
        })
    );
    let error = decode::<FromAgent>(r#"{"type":"error","request_id":"r","code":"on_fire"}"#)
        .expect("error");
    assert!(matches!(
        error,
        FromAgent::Error(AgentError {
            code: AgentErrorCode::InternalError,
            ..
        })
    ));
}

#[test]
fn an_array_is_not_a_message() {
    assert!(matches!(
        decode::<FromAgent>(r#"["ping"]"#),
        Err(DecodeError::Malformed(_))
    ));
    assert!(matches!(
        decode::<FromAgent>(r#"["body_part","r1",1,"aGk=",false]"#),
        Err(DecodeError::Malformed(_))
    ));
}

#[test]
fn a_message_from_api_gateway_itself_is_an_error() {
    let text = r#"{"message":"Internal server error","connectionId":"c=","requestId":"r"}"#;
    assert!(matches!(
        decode::<ToAgent>(text),
        Err(DecodeError::Malformed(_))
    ));
}

#[test]
fn without_negotiation_only_first_version_fields_are_written() {
    assert_eq!(
        encode(&FromAgent::Ready(Ready::default())),
        r#"{"type":"ready"}"#
    );
    assert_eq!(encode(&ToAgent::Pong { id: None }), r#"{"type":"pong"}"#);
}

#[test]
fn a_text_over_the_message_limit_is_refused_without_decoding_it() {
    let text = format!(
        r#"{{"type":"ping","pad":"{}"}}"#,
        "x".repeat(MAX_MESSAGE_BYTES)
    );
    assert!(matches!(
        decode::<FromAgent>(&text),
        Err(DecodeError::TooLong(_))
    ));
}

/// A binary message with this head and body.
fn binary(length: usize, head: &str, body: &str) -> Bytes {
    let length = u32::try_from(length).expect("short");
    [&length.to_be_bytes()[..], head.as_bytes(), body.as_bytes()]
        .concat()
        .into()
}

#[test]
fn a_binary_message_is_refused_unless_each_byte_has_its_place() {
    let part = r#"{"type":"body_part","request_id":"r","part":1}"#;
    let decoded: FromAgent = decode_binary(&binary(part.len(), part, "raw")).expect("a message");
    assert!(matches!(decoded, FromAgent::BodyPart(part) if part.body.0 == "raw"));
    let with_body = r#"{"type":"body_part","request_id":"r","part":1,"body":"aGk="}"#;
    let long = "x".repeat(MAX_MESSAGE_BYTES);
    for refused in [
        Bytes::new(),
        Bytes::from_static(&[0, 0, 0]),
        binary(part.len() + 1, part, ""),
        binary(part.len() - 1, part, ""),
        binary(usize::try_from(u32::MAX).expect("64 bits"), part, "raw"),
        binary(0, "", "raw"),
        binary(with_body.len(), with_body, "raw"),
        binary(15, r#"{"type":"ping"}"#, "raw"),
        binary(part.len(), part, &long),
        binary(1, "\u{e9}", ""),
    ] {
        let refused = decode_binary::<FromAgent>(&refused);
        assert!(refused.is_err(), "{refused:?}");
    }
}

/// A binary message with a compact head of these fields, and this body.
fn compact(fields: &[(&str, &str)], body: &str) -> Bytes {
    let mut head = Vec::new();
    for text in fields.iter().flat_map(|(name, value)| [name, value]) {
        head.extend(u32::try_from(text.len()).expect("short").to_be_bytes());
        head.extend(text.as_bytes());
    }
    let length = u32::try_from(head.len()).expect("short").to_be_bytes();
    [&length[..], &head, body.as_bytes()].concat().into()
}

#[test]
fn a_compact_head_says_what_json_says() {
    let request = decode_binary::<ToAgent>(&compact(
        &[
            (":type", "http_request"),
            (":request_id", "r"),
            (":method", "POST"),
            (":uri", "/a?b"),
            (":deadline_ms", "29000"),
            (":from_the_future", "x"),
            ("set-cookie", "a=1"),
            ("host", "x"),
            ("set-cookie", "b=2"),
        ],
        "raw",
    ));
    let json = r#"{"type":"http_request","request_id":"r","method":"POST","uri":"/a?b","deadline_ms":29000,"headers":{"set-cookie":["a=1","b=2"],"host":["x"]},"body":"cmF3"}"#;
    assert_eq!(request.expect("a message"), decode(json).expect("JSON"));
    let other_direction = [
        (":type", "http_response"),
        (":request_id", "r"),
        (":status_code", "200"),
    ];
    let other_direction = compact(&other_direction, "");
    let newer = compact(&[(":type", "dance"), (":steps", "3")], "");
    for unknown in [other_direction, newer] {
        assert_eq!(
            decode_binary::<ToAgent>(&unknown).expect("unknown"),
            ToAgent::Unknown
        );
    }
}

#[test]
fn a_compact_head_is_refused_unless_it_is_whole_and_right() {
    let whole = [
        (":type", "http_response"),
        (":request_id", "r"),
        (":status_code", "200"),
    ];
    let with = |field: (&'static str, &'static str)| [&whole[..], &[field]].concat();
    let many = vec![("x-many", "1"); MAX_HEADER_FIELDS + 1];
    let most = [&whole[..], &many[1..]].concat();
    assert!(decode_binary::<FromAgent>(&compact(&most, "")).is_ok());
    assert!(decode_binary::<FromAgent>(&compact(&with(("x-a", "1")), "raw")).is_ok());
    for refused in [
        whole[1..].to_vec(),
        whole[..2].to_vec(),
        [whole[0], whole[2]].to_vec(),
        with((":status_code", "200")),
        with((":type", "http_response")),
        with((":body", "raw")),
        with((":encoding", "gzip")),
        with((":more", "1")),
        with((":processing_time_ms", "-1")),
        with((":reply_to", "a/b")),
        with(("x a", "1")),
        with(("", "1")),
        with(("x-a", "1\n2")),
        [&whole[..], &many].concat(),
    ] {
        let message = decode_binary::<FromAgent>(&compact(&refused, ""));
        assert!(message.is_err(), "{refused:?}: {message:?}");
    }
    let message = compact(&whole, "");
    for end in HEAD_LENGTH_BYTES + 1..message.len() {
        let cut = compact_cut(&message, end);
        let read = decode_binary::<FromAgent>(&cut);
        assert!(read.is_err(), "{end}: {read:?}");
    }
}

/// A binary message whose head ends early.
fn compact_cut(message: &Bytes, end: usize) -> Bytes {
    let length = u32::try_from(end - HEAD_LENGTH_BYTES).expect("short");
    [&length.to_be_bytes()[..], &message[HEAD_LENGTH_BYTES..end]]
        .concat()
        .into()
}

#[test]
fn an_unreadable_message_still_names_its_request() {
    let head = [
        (":type", "http_request"),
        (":request_id", "r"),
        ("x a", "1"),
    ];
    let json = r#"{"type":"http_request","request_id":"r"}"#;
    for unreadable in [compact(&head, "raw"), binary(json.len(), json, "raw")] {
        assert!(decode_binary::<ToAgent>(&unreadable).is_err());
        let subject = subject_of_binary(&unreadable).expect("a request");
        assert_eq!(subject.request_id.as_str(), "r");
    }
    assert!(subject_of_binary(&compact(&head[..1], "raw")).is_err());
}

/// Names of fields in compact heads, and values of which some do for some.
const NAMES: [&str; 9] = [
    ":method",
    ":uri",
    ":status_code",
    ":more",
    ":encoding",
    ":reply_to",
    ":unknown",
    "x-a",
    "x b",
];
const VALUES: [&str; 7] = ["", "200", "/x", "true", "zstd", "a=", "1\r\n2"];

/// Header fields of all kinds of bytes that HTTP allows, some with several values.
fn header_fields() -> impl Strategy<Value = HeaderMap> {
    let value = prop::collection::vec(prop_oneof![32u8..=126, 128u8..=255, Just(9u8)], 0..20);
    prop::collection::vec(("[a-c]{1,2}", value), 0..12).prop_map(|fields| {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            let value = http::HeaderValue::from_bytes(&value).expect("made of allowed bytes");
            headers.append(http::HeaderName::try_from(name).expect("a name"), value);
        }
        headers
    })
}

const SAMPLES: [&str; 10] = [
    r#"{"type":"ready","protocol":1,"features":["body_parts"],"previous":"a=","access":{"allow":["::/0"]}}"#,
    r#"{"type":"http_response","request_id":"r","status_code":200,"headers":{"a":["b"]},"body":"aGk=","more":true}"#,
    r#"{"type":"body_part","request_id":"r","part":1,"body":"aGk=","encoding":"zstd","reply_to":"a="}"#,
    r#"{"type":"window","request_id":"r","parts":33}"#,
    r#"{"type":"error","request_id":"r","code":"timeout","message":"m"}"#,
    r#"{"type":"connection_established","connection_id":"a=","tunnel_id":"my-app","public_url":"u","life_ms":1}"#,
    r#"{"type":"http_request","request_id":"r","method":"GET","uri":"/","headers":{"a":["b"]},"body":"","deadline_ms":1}"#,
    r#"{"type":"released","tunnel_id":"my-app","existed":true}"#,
    r#"{"type":"websocket_batch","request_id":"r","websocket":"a=","batch":0,"texts":["a","b"]}"#,
    r#"{"type":"websocket_message","request_id":"r","text":"a"}"#,
];

#[test]
fn the_samples_that_faults_are_made_in_are_messages() {
    for sample in SAMPLES {
        let from_agent =
            decode(sample).is_ok_and(|message: FromAgent| message != FromAgent::Unknown);
        let to_agent = decode(sample).is_ok_and(|message: ToAgent| message != ToAgent::Unknown);
        assert!(from_agent || to_agent, "{sample}");
    }
}

proptest! {
    // Starts from messages, because hardly any random text gets as far as the fields of one. The fuzz target `decode` goes further.
    #[test]
    fn decoding_a_message_with_faults_never_panics(
        sample in prop::sample::select(&SAMPLES[..]),
        faults in prop::collection::vec((any::<prop::sample::Index>(), any::<char>(), any::<bool>()), 1..4),
    ) {
        let mut text: Vec<char> = sample.chars().collect();
        for (at, character, is_inserted) in faults {
            let at = at.index(text.len());
            if is_inserted {
                text.insert(at, character);
            } else {
                text[at] = character;
            }
        }
        let text: String = text.into_iter().collect();
        let (from_agent, to_agent) = (decode::<FromAgent>(&text), decode::<ToAgent>(&text));
        // Whatever stands first, it is the same message.
        if text.starts_with('{') {
            if let Ok(message) = serde_json::from_str::<FromAgent>(&text) {
                prop_assert_eq!(from_agent.expect("a message"), message);
            }
            if let Ok(message) = serde_json::from_str::<ToAgent>(&text) {
                prop_assert_eq!(to_agent.expect("a message"), message);
            }
        }
    }

    #[test]
    fn a_message_in_either_format_is_what_was_written(
        bytes in prop::collection::vec(any::<u8>(), 0..500), part in 1u32.., more: bool, is_binary: bool,
    ) {
        let format = if is_binary { Format::Binary(Framing::Short, Heads::Json) } else { Format::Text };
        let part = BodyPart { request_id: RequestId::generate(), part, body: Body(bytes.into()), encoding: None, more, reply_to: None };
        let message = FromAgent::BodyPart(part.clone());
        let encoded = message.clone().encode_as(format);
        prop_assert!(encoded.is_body_part());
        prop_assert_eq!(matches!(encoded, Encoded::Binary(..)), is_binary && !part.body.0.is_empty());
        let decoded = match encoded {
            Encoded::Text(text) => decode::<FromAgent>(&text),
            Encoded::Binary(bytes, _) => decode_binary(&bytes),
        };
        prop_assert_eq!(decoded.expect("what we wrote"), message);
    }

    #[test]
    fn requests_and_responses_with_compact_heads_are_what_was_written(
        (headers, bytes) in (header_fields(), prop::collection::vec(any::<u8>(), 0..50)),
        (method, uri, upgrade) in ("[A-Z]{1,8}", "/[ -~]{0,20}", prop::option::of("[a-z]{1,9}")),
        (websocket, reply_to, is_compressed) in (prop::option::of("[A-Za-z0-9=]{1,20}"), prop::option::of("[A-Za-z0-9=]{1,20}"), any::<bool>()),
        (timestamp, deadline_ms, processing_time_ms, status_code, more) in (any::<u64>(), 0u64..2, any::<u64>(), any::<u16>(), any::<bool>()),
    ) {
        let format = Format::Binary(Framing::Short, Heads::Compact);
        let request_id = RequestId::generate();
        let connection = |id: Option<String>| id.map(|id| id.parse().expect("an id"));
        let encoding = is_compressed.then_some(Encoding::Zstd);
        let body = Body(bytes.into());
        let response = HttpResponse {
            request_id: request_id.clone(), status_code, headers: headers.clone(), body: body.clone(), encoding, processing_time_ms,
            more, reply_to: connection(reply_to.clone()),
        };
        let request = HttpRequest {
            request_id, method, uri, headers, upgrade, websocket: connection(websocket), body, encoding, timestamp, more, deadline_ms,
            reply_to: connection(reply_to),
        };
        let (mut response, mut request) = (FromAgent::HttpResponse(response), ToAgent::HttpRequest(request));
        for (encoded, is_request) in [(response.encode_as(format), false), (request.encode_as(format), true)] {
            let Encoded::Binary(bytes, Framing::Short) = encoded else { panic!("not binary: {encoded:?}") };
            if is_request {
                prop_assert_eq!(&decode_binary::<ToAgent>(&bytes).expect("what we wrote"), &request);
            } else {
                prop_assert_eq!(&decode_binary::<FromAgent>(&bytes).expect("what we wrote"), &response);
            }
        }
    }

    #[test]
    fn any_binary_message_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..50), length in 0u32..60) {
        let mut message = length.to_be_bytes().to_vec();
        message.extend(&bytes);
        let message = Bytes::from(message);
        let head = bytes.get(..length as usize);
        prop_assert_eq!(is_binary(&message), head.is_some_and(|head| head.starts_with(&[0]) || std::str::from_utf8(head).is_ok()));
    }

    #[test]
    fn any_compact_head_is_read_or_refused(
        is_request: bool,
        fields in prop::collection::vec((prop::sample::select(&NAMES[..]), prop::sample::select(&VALUES[..])), 0..8),
        fault in prop::option::of((any::<prop::sample::Index>(), any::<u8>())),
    ) {
        let types = if is_request { "http_request" } else { "http_response" };
        let fields = [&[(":type", types), (":request_id", "r")], &fields[..]].concat();
        let whole = compact(&fields, "raw");
        let mut message = whole.to_vec();
        if let Some((at, byte)) = fault {
            let at = at.index(message.len());
            message[at] = byte;
        }
        let message = Bytes::from(message);
        let read = (decode_binary::<FromAgent>(&message), decode_binary::<ToAgent>(&message), subject_of_binary(&message));
        if message == whole {
            let subject = read.2.expect("a subject");
            prop_assert_eq!(subject.request_id.as_str(), "r");
            let values = |name: &str| fields.iter().filter(|field| field.0 == name).map(|field| field.1).collect::<Vec<_>>();
            let headers = match (read.0, read.1) {
                (Ok(FromAgent::HttpResponse(response)), _) => {
                    prop_assert_eq!(values(":status_code"), ["200"]);
                    response.headers
                }
                (_, Ok(ToAgent::HttpRequest(request))) => {
                    prop_assert_eq!((values(":method"), values(":uri")), (vec![&*request.method], vec![&*request.uri]));
                    request.headers
                }
                _ => return Ok(()),
            };
            let read: Vec<_> = headers.get_all("x-a").iter().map(|value| value.to_str().expect("ASCII")).collect();
            prop_assert_eq!(read, values("x-a"));
        }
    }

    #[test]
    fn bodies_survive_the_wire(bytes in prop::collection::vec(any::<u8>(), 0..500), part in 1u32.., more: bool) {
        let message = FromAgent::BodyPart(BodyPart { request_id: RequestId::generate(), part, body: Body(bytes.into()), encoding: None, more, reply_to: None });
        prop_assert_eq!(decode::<FromAgent>(&encode(&message)).expect("what we wrote"), message);
    }
}
