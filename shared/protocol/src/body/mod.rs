//! A body's way over the wire: chunked, compressed, numbered, sent within a window; put back in order, decompressed, granted.

pub mod chunker;
pub mod compression;
pub mod reorder;
pub mod window;

use bytes::{Bytes, BytesMut};

use crate::limits::{MAX_MESSAGE_BYTES, RELAY_ENVELOPE_BYTES};

/// How many body bytes fit beside `envelope` bytes of JSON in one message that may be passed on; `None` when not even the
/// envelope does.
pub fn room_beside(envelope: usize) -> Option<usize> {
    MAX_MESSAGE_BYTES
        .checked_sub(RELAY_ENVELOPE_BYTES + envelope)
        .map(|rest| rest / 4 * 3)
}

/// Joins chunks into one; copies nothing when there is only one.
pub fn join(chunks: Vec<Bytes>) -> Bytes {
    match <[Bytes; 1]>::try_from(chunks) {
        Ok([only]) => only,
        Err(chunks) => {
            let mut joined = BytesMut::with_capacity(chunks.iter().map(Bytes::len).sum());
            chunks
                .iter()
                .for_each(|chunk| joined.extend_from_slice(chunk));
            joined.freeze()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::RequestId,
        limits::MAX_PART_BYTES,
        message::{Body, BodyPart, Encoding, FromAgent, ToAgent, encode},
    };

    #[test]
    fn a_full_part_fits_a_message_with_the_longest_ids() {
        let part = BodyPart {
            request_id: "r".repeat(64).parse().expect("an id"),
            part: u32::MAX,
            body: Body(vec![0; MAX_PART_BYTES].into()),
            encoding: Some(Encoding::Zstd),
            more: false,
            reply_to: Some("c".repeat(128).parse().expect("an id")),
        };
        assert!(
            encode(&FromAgent::BodyPart(part.clone())).len() + RELAY_ENVELOPE_BYTES
                <= MAX_MESSAGE_BYTES
        );
        assert!(encode(&ToAgent::BodyPart(part)).len() <= MAX_MESSAGE_BYTES);
        assert!(RequestId::generate().as_str().len() <= 64);
    }

    #[test]
    fn room_is_what_base64_leaves() {
        let most = MAX_MESSAGE_BYTES - RELAY_ENVELOPE_BYTES;
        assert_eq!(room_beside(most), Some(0));
        assert_eq!(room_beside(most - 4), Some(3));
        assert_eq!(room_beside(most + 1), None);
    }
}
