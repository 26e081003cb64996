//! Any bytes as a message, in either direction. Proves that decoding never panics; that every decoded
//! message, encoded and decoded again, is the same; and that no body is longer than the text could hold.
#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use tunnel_protocol::{
    limits::MAX_MESSAGE_BYTES,
    message::{Body, FromAgent, FromJson, ToAgent, decode, encode},
};

fuzz_target!(|text: &str| {
    check(text, |message| match message {
        FromAgent::HttpResponse(response) => Some(&response.body),
        FromAgent::BodyPart(part) => Some(&part.body),
        _ => None,
    });
    check(text, |message| match message {
        ToAgent::HttpRequest(request) => Some(&request.body),
        ToAgent::BodyPart(part) => Some(&part.body),
        _ => None,
    });
});

fn check<M: Debug + for<'de> FromJson<'de> + PartialEq + Serialize>(
    text: &str,
    body: fn(&M) -> Option<&Body>,
) {
    let Ok(message) = decode::<M>(text) else {
        return;
    };
    assert!(
        text.len() <= MAX_MESSAGE_BYTES,
        "{} bytes were read",
        text.len()
    );
    assert!(text.trim_start().starts_with('{'), "no object was read");
    let length = body(&message).map_or(0, |body| body.0.len());
    assert!(
        length.div_ceil(3) * 4 <= text.len(),
        "{length} bytes of body out of {} of text",
        text.len()
    );

    // Not `decode`: a text near the limit may have grown beyond it, by default fields and by Latin-1.
    let encoded = encode(&message);
    let again: M =
        serde_json::from_str(&encoded).unwrap_or_else(|error| panic!("{error}: {encoded}"));
    assert_eq!(again, message);
    // Equal maps may differ in the order of their names.
    assert_eq!(encode(&again), encoded);
}
