//! Bodies packed for the wire, where both sides can and it pays: fewer and smaller messages, of which each has a price.

use std::io::Read;

use bytes::Bytes;
use http::{HeaderMap, header};

use crate::{limits::MAX_DECOMPRESSED_BYTES, message::Encoding};

/// Shorter bodies fit the smallest unit that is billed whatever is done to them.
const WORTH_IT: usize = 1024;
/// Zstandard's quickest regular level: what is waited for is a visitor's answer.
const LEVEL: i32 = 1;

/// The decoder's memory is two to the power of this, half a megabyte: as much as what may be unpacked can need, whatever a frame
/// claims to.
const WINDOW_LOG: u32 = MAX_DECOMPRESSED_BYTES.ilog2() + 1;

/// A body that does not unpack to what it may.
#[derive(Debug, thiserror::Error)]
pub enum DecompressError {
    /// Not Zstandard.
    #[error("a compressed part cannot be unpacked")]
    Malformed(#[from] std::io::Error),
    /// Far longer than what was sent: broken or hostile.
    #[error("a compressed part unpacks to more than {MAX_DECOMPRESSED_BYTES} bytes")]
    TooLong,
}

/// Whether bodies with these header fields are likely to become much shorter.
pub fn is_compressible(fields: &HeaderMap) -> bool {
    let text = |name| fields.get(name).and_then(|value| value.to_str().ok());
    let is_packed = text(header::CONTENT_ENCODING)
        .is_some_and(|encoding| !encoding.trim().eq_ignore_ascii_case("identity"));
    let kind = text(header::CONTENT_TYPE)
        .unwrap_or_default()
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    let is_text = kind.starts_with("text/")
        || [
            "json",
            "xml",
            "javascript",
            "x-www-form-urlencoded",
            "wasm",
            "x-ndjson",
            "graphql",
        ]
        .iter()
        .any(|word| kind.ends_with(word));
    // Events are few bytes, and each is on its way before the next.
    is_text && !is_packed && kind != "text/event-stream"
}

/// Packs bytes; `None` when that makes them no shorter.
pub fn compress(bytes: &[u8]) -> Option<Bytes> {
    if bytes.len() < WORTH_IT || bytes.len() > MAX_DECOMPRESSED_BYTES {
        return None;
    }
    let packed = zstd::bulk::compress(bytes, LEVEL).ok()?;
    (packed.len() < bytes.len()).then(|| packed.into())
}

/// Unpacks a message's bytes.
///
/// # Errors
/// When they are not what `encoding` says, or unpack to more than [`MAX_DECOMPRESSED_BYTES`] bytes.
pub fn decompress(bytes: Bytes, encoding: Option<Encoding>) -> Result<Bytes, DecompressError> {
    match encoding {
        None => Ok(bytes),
        Some(Encoding::Zstd) => {
            let mut unpacked = Vec::new();
            let mut decoder = zstd::stream::read::Decoder::with_buffer(&bytes[..])?;
            decoder.window_log_max(WINDOW_LOG)?;
            decoder
                .take(MAX_DECOMPRESSED_BYTES as u64 + 1)
                .read_to_end(&mut unpacked)?;
            if unpacked.len() > MAX_DECOMPRESSED_BYTES {
                Err(DecompressError::TooLong)
            } else {
                Ok(unpacked.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_small_part_cannot_make_the_receiver_keep_a_large_one() {
        let bomb =
            zstd::bulk::compress(&vec![0; MAX_DECOMPRESSED_BYTES + 1], LEVEL).expect("packed");
        assert!(bomb.len() < 1024);
        assert!(matches!(
            decompress(bomb.into(), Some(Encoding::Zstd)),
            Err(DecompressError::TooLong)
        ));
        assert!(matches!(
            decompress(Bytes::from_static(b"not zstd"), Some(Encoding::Zstd)),
            Err(DecompressError::Malformed(_))
        ));
        let largest =
            zstd::bulk::compress(&vec![0; MAX_DECOMPRESSED_BYTES], LEVEL).expect("packed");
        assert_eq!(
            decompress(largest.into(), Some(Encoding::Zstd))
                .expect("allowed")
                .len(),
            MAX_DECOMPRESSED_BYTES
        );
    }

    #[test]
    fn only_what_is_text_and_not_packed_already_is_packed() {
        for (kind, encoding, expected) in [
            ("text/html; charset=utf-8", None, true),
            ("application/json", None, true),
            ("application/problem+json", Some("identity"), true),
            ("image/svg+xml", None, true),
            ("text/html", Some("gzip"), false),
            ("image/png", None, false),
            ("text/event-stream", None, false),
            ("application/octet-stream", None, false),
        ] {
            let mut fields =
                HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(kind))]);
            if let Some(encoding) = encoding {
                fields.insert(header::CONTENT_ENCODING, HeaderValue::from_static(encoding));
            }
            assert_eq!(is_compressible(&fields), expected, "{kind} {encoding:?}");
        }
        assert!(!is_compressible(&HeaderMap::new()));
    }

    proptest! {
        #[test]
        fn what_is_packed_unpacks_to_the_same(word in prop::collection::vec(any::<u8>(), 1..20), times in 60usize..2000) {
            let bytes: Bytes = word.repeat(times).into();
            if let Some(packed) = compress(&bytes) {
                prop_assert!(packed.len() < bytes.len());
                prop_assert_eq!(decompress(packed, Some(Encoding::Zstd)).expect("what we packed"), bytes);
            }
        }

        #[test]
        fn unpacking_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decompress(bytes.into(), Some(Encoding::Zstd));
        }
    }
}
