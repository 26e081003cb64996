use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::limits::MAX_MESSAGE_BYTES;

#[test]
fn bodies_are_binary_and_whole_only_for_a_peer_that_reads_both() {
    for (features, format) in [
        (&[][..], Format::Text),
        (&[Feature::LongFrames], Format::Text),
        (&[Feature::Binary], Format::Binary(Framing::Short)),
        (
            &[Feature::Binary, Feature::LongFrames],
            Format::Binary(Framing::Whole),
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
        let format = if is_binary { Format::Binary(Framing::Short) } else { Format::Text };
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
    fn any_binary_message_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..50), length in 0u32..60) {
        let mut message = length.to_be_bytes().to_vec();
        message.extend(&bytes);
        let message = Bytes::from(message);
        let outcome = split_binary(&message);
        prop_assert_eq!(outcome.is_ok(), length as usize <= bytes.len() && std::str::from_utf8(&bytes[..length as usize]).is_ok());
    }

    #[test]
    fn bodies_survive_the_wire(bytes in prop::collection::vec(any::<u8>(), 0..500), part in 1u32.., more: bool) {
        let message = FromAgent::BodyPart(BodyPart { request_id: RequestId::generate(), part, body: Body(bytes.into()), encoding: None, more, reply_to: None });
        prop_assert_eq!(decode::<FromAgent>(&encode(&message)).expect("what we wrote"), message);
    }
}
