//! Bytes that say whose they are: of each request its upload and its answer, made anew on both sides from the request's number.

use std::hash::{DefaultHasher, Hasher};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Which of a request's two bodies.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Side {
    Upload,
    Answer,
}

/// A request's body: its number first, if there is room. `is_text` makes one that can be compressed.
pub(crate) fn content(number: u64, side: Side, length: usize, is_text: bool) -> Bytes {
    let mut bytes = vec![0; length];
    if is_text {
        let line = format!("{number:016x} {side:?} of a request, a line that repeats\n");
        bytes
            .iter_mut()
            .zip(line.bytes().cycle())
            .for_each(|(byte, letter)| *byte = letter);
    } else {
        StdRng::seed_from_u64(2 * number + u64::from(side == Side::Answer)).fill_bytes(&mut bytes);
        let stamp = number.to_be_bytes();
        let room = stamp.len().min(length);
        bytes[..room].copy_from_slice(&stamp[..room]);
    }
    bytes.into()
}

/// The same for the same bytes in processes of the same executable.
pub(crate) fn hash(bytes: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    format!("{:016x}", hasher.finish())
}
