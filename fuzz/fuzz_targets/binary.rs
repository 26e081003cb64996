//! Any bytes as a binary message, in either direction. Proves that decoding never panics; that every decoded message, encoded with a
//! compact head and decoded again, is the same; and that a message with as long a body as there is room for is not too long.
#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use tunnel_protocol::{
    limits::MAX_MESSAGE_BYTES,
    message::{
        CarriesBody, Encoded, Format, Framing, FromAgent, FromJson, Head, Heads, ToAgent,
        decode_binary, is_binary, subject_of_binary,
    },
};

const FORMAT: Format = Format::Binary(Framing::Whole, Heads::Compact);

fuzz_target!(|bytes: &[u8]| {
    let is_one = is_binary(&bytes.to_vec().into());
    for is_read in [
        check(bytes, |message: &FromAgent| match message {
            FromAgent::HttpResponse(response) => response.room(FORMAT),
            _ => None,
        }),
        check(bytes, |message: &ToAgent| match message {
            ToAgent::HttpRequest(request) => request.room(FORMAT),
            _ => None,
        }),
    ] {
        assert!(is_one || !is_read, "read, and not binary");
    }
    let _ = subject_of_binary(&bytes.to_vec().into());
});

fn check<M: CarriesBody + Debug + From<Head> + for<'de> FromJson<'de> + PartialEq>(
    bytes: &[u8],
    room: fn(&M) -> Option<usize>,
) -> bool {
    let Ok(mut message) = decode_binary::<M>(&bytes.to_vec().into()) else {
        return false;
    };
    let Encoded::Binary(encoded, _) = message.encode_as(FORMAT) else {
        return true;
    };
    // Not longer than it may be unless defaults of JSON were written out.
    if encoded.len() <= MAX_MESSAGE_BYTES {
        let again: M = decode_binary(&encoded).expect("what was written");
        assert_eq!(again, message);
    }
    if let Some(room) = room(&message) {
        if let Some(body) = message.body_mut() {
            body.0 = vec![0; room].into();
        }
        let length = message.encode_as(FORMAT).length();
        assert!(length <= MAX_MESSAGE_BYTES, "{length} bytes: {message:?}");
    }
    true
}
