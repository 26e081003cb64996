//! Compression of chunks, where both sides can and it pays: fewer and smaller messages, each of which has a price.

use std::io::Read;

use bytes::Bytes;
use http::{HeaderMap, header};

use crate::{limits::MAX_DECOMPRESSED_BYTES, message::Encoding};

/// Shorter bodies fit the smallest unit that is billed whatever is done to them.
const MIN_COMPRESSED_BYTES: usize = 1024;
/// Zstandard's quickest regular level: what is waited for is a visitor's answer.
const LEVEL: i32 = 1;

/// The decoder's memory is two to the power of this, half a MiB: as much as the longest chunk can need, whatever a frame claims.
const MAX_DECODER_WINDOW_LOG: u32 = MAX_DECOMPRESSED_BYTES.ilog2() + 1;

/// A chunk that cannot be decompressed to what it may become.
#[derive(Debug, thiserror::Error)]
pub enum DecompressError {
    /// Not Zstandard.
    #[error("a compressed part cannot be decompressed")]
    Malformed(#[from] std::io::Error),
    /// Far longer than what was sent: broken or hostile.
    #[error("a compressed part decompresses to more than {MAX_DECOMPRESSED_BYTES} bytes")]
    TooLong,
}

/// Whether bodies with these header fields are likely to become much shorter.
pub fn is_compressible(fields: &HeaderMap) -> bool {
    let text = |name| fields.get(name).and_then(|value| value.to_str().ok());
    let is_encoded = text(header::CONTENT_ENCODING)
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
    is_text && !is_encoded && kind != "text/event-stream"
}

/// Compresses bytes; `None` when that makes them no shorter, or they are more than [`MAX_DECOMPRESSED_BYTES`].
pub fn compress(bytes: &[u8]) -> Option<Bytes> {
    if bytes.len() < MIN_COMPRESSED_BYTES || bytes.len() > MAX_DECOMPRESSED_BYTES {
        return None;
    }
    let compressed = zstd::bulk::compress(bytes, LEVEL).ok()?;
    (compressed.len() < bytes.len()).then(|| compressed.into())
}

/// Decompresses a message's bytes.
///
/// # Errors
/// If they are not what `encoding` says, or become more than [`MAX_DECOMPRESSED_BYTES`] bytes.
pub fn decompress(bytes: Bytes, encoding: Option<Encoding>) -> Result<Bytes, DecompressError> {
    match encoding {
        None => Ok(bytes),
        Some(Encoding::Zstd) => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(&bytes[..])?;
            decoder.window_log_max(MAX_DECODER_WINDOW_LOG)?;
            read_limited(decoder)
        }
    }
}

/// Reads to the end, but hardly further than allowed: what is compressed can be a thousand times as long.
fn read_limited(decoder: impl Read) -> Result<Bytes, DecompressError> {
    let mut decompressed = Vec::new();
    decoder
        .take(MAX_DECOMPRESSED_BYTES as u64 + 1)
        .read_to_end(&mut decompressed)?;
    if decompressed.len() > MAX_DECOMPRESSED_BYTES {
        return Err(DecompressError::TooLong);
    }
    Ok(decompressed.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_small_part_cannot_make_the_receiver_keep_a_large_one() {
        let bomb =
            zstd::bulk::compress(&vec![0; MAX_DECOMPRESSED_BYTES + 1], LEVEL).expect("compressed");
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
            zstd::bulk::compress(&vec![0; MAX_DECOMPRESSED_BYTES], LEVEL).expect("compressed");
        assert_eq!(
            decompress(largest.into(), Some(Encoding::Zstd))
                .expect("allowed")
                .len(),
            MAX_DECOMPRESSED_BYTES
        );
    }

    #[test]
    fn what_the_receiver_would_refuse_is_not_compressed() {
        for (length, is_compressed) in [
            (MIN_COMPRESSED_BYTES - 1, false),
            (MIN_COMPRESSED_BYTES, true),
            (MAX_DECOMPRESSED_BYTES, true),
            (MAX_DECOMPRESSED_BYTES + 1, false),
        ] {
            let Some(compressed) = compress(&vec![0; length]) else {
                assert!(!is_compressed, "{length}");
                continue;
            };
            assert!(is_compressed, "{length}");
            let bytes = decompress(compressed, Some(Encoding::Zstd)).expect("allowed");
            assert_eq!(bytes.len(), length);
        }
    }

    /// A decoder whose output would never end. It fails where there is no reason to read on.
    struct Endless {
        read_bytes: usize,
    }

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.read_bytes += buffer.len();
            if self.read_bytes > 4 * MAX_DECOMPRESSED_BYTES {
                return Err(std::io::Error::other("read on and on"));
            }
            buffer.fill(0);
            Ok(buffer.len())
        }
    }

    #[test]
    fn decompressing_stops_at_the_limit_however_much_would_follow() {
        let read = read_limited(Endless { read_bytes: 0 });
        assert!(matches!(read, Err(DecompressError::TooLong)), "{read:?}");
    }

    #[test]
    fn a_frame_cannot_make_the_decoder_keep_a_large_window() {
        let decompressed_with_window_log = |window_log| {
            let mut encoder =
                zstd::stream::write::Encoder::new(Vec::new(), LEVEL).expect("an encoder");
            encoder
                .set_parameter(zstd::zstd_safe::CParameter::WindowLog(window_log))
                .expect("a window");
            encoder.write_all(b"hi").expect("written");
            let frame = encoder.finish().expect("a frame");
            decompress(frame.into(), Some(Encoding::Zstd))
        };
        for window_log in [MAX_DECODER_WINDOW_LOG + 1, 27] {
            let refused = decompressed_with_window_log(window_log);
            assert!(
                matches!(refused, Err(DecompressError::Malformed(_))),
                "{window_log}: {refused:?}"
            );
        }
        let allowed = decompressed_with_window_log(MAX_DECODER_WINDOW_LOG);
        assert_eq!(allowed.expect("allowed"), "hi");
    }

    #[test]
    fn only_text_that_is_not_compressed_already_is_compressed() {
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
        fn compression_is_lossless(word in prop::collection::vec(any::<u8>(), 1..20), times in 60usize..2000) {
            let bytes: Bytes = word.repeat(times).into();
            if let Some(compressed) = compress(&bytes) {
                prop_assert!(compressed.len() < bytes.len());
                prop_assert_eq!(decompress(compressed, Some(Encoding::Zstd)).expect("what we compressed"), bytes);
            }
        }

        #[test]
        fn decompressing_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decompress(bytes.into(), Some(Encoding::Zstd));
        }
    }
}
