//! Bodies without their content codings.

use std::io::{self, Read};

use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use http::{HeaderMap, header};

/// How long a decoded body may become: what is compressed can be a thousand times as long.
const MAX_DECODED_BYTES: usize = 16 * 1024 * 1024;

/// A body without its content codings, as far as it could be decoded.
#[derive(Debug)]
pub(crate) struct Decoded {
    pub bytes: Vec<u8>,
    /// Why the rest is missing.
    pub fault: Option<String>,
}

/// Takes the content codings off a body, of which only the beginning may be known.
pub(crate) fn decode(headers: &HeaderMap, body: &[u8]) -> Decoded {
    let codings: Vec<String> = headers
        .get_all(header::CONTENT_ENCODING)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|coding| coding.trim().to_ascii_lowercase())
        .filter(|coding| !coding.is_empty() && coding != "identity")
        .collect();
    let mut decoded = Decoded {
        bytes: body.to_vec(),
        fault: None,
    };
    // The last coding was applied last.
    for coding in codings.iter().rev() {
        let before = std::mem::take(&mut decoded.bytes);
        let read = match coding.as_str() {
            "gzip" | "x-gzip" => read(MultiGzDecoder::new(&before[..]), &mut decoded.bytes),
            // Some servers mean the bare format.
            "deflate" if is_zlib(&before) => {
                read(ZlibDecoder::new(&before[..]), &mut decoded.bytes)
            }
            "deflate" => read(DeflateDecoder::new(&before[..]), &mut decoded.bytes),
            "br" => read(
                brotli_decompressor::Decompressor::new(&before[..], 4096),
                &mut decoded.bytes,
            ),
            "zstd" => zstd::stream::read::Decoder::with_buffer(&before[..])
                .and_then(|decoder| read(decoder, &mut decoded.bytes)),
            _ => {
                decoded.bytes = before;
                decoded.fault = Some(format!("the content coding {coding} is not known"));
                break;
            }
        };
        if let Err(error) = read {
            decoded.fault = Some(format!("not all could be decoded as {coding}: {error}"));
        }
    }
    decoded
}

fn is_zlib(bytes: &[u8]) -> bool {
    matches!(bytes, [first, second, ..] if first & 0x0f == 8 && u16::from_be_bytes([*first, *second]) % 31 == 0)
}

fn read(decoder: impl Read, decoded: &mut Vec<u8>) -> io::Result<()> {
    decoder
        .take(MAX_DECODED_BYTES as u64 + 1)
        .read_to_end(decoded)?;
    if decoded.len() > MAX_DECODED_BYTES {
        decoded.truncate(MAX_DECODED_BYTES);
        return Err(io::Error::other(format!(
            "only the first {} MiB are shown",
            MAX_DECODED_BYTES >> 20
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn coded(coding: &'static str) -> HeaderMap {
        [(header::CONTENT_ENCODING, coding.parse().expect("a value"))]
            .into_iter()
            .collect()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).expect("memory");
        encoder.finish().expect("memory")
    }

    #[test]
    fn codings_are_taken_off_in_reverse_order() {
        let text = b"{\"a\": 1}".repeat(100);
        let zstd = zstd::encode_all(&text[..], 1).expect("memory");
        let decoded = decode(&coded("zstd, gzip"), &gzip(&zstd));
        assert_eq!((decoded.bytes, decoded.fault), (text, None));
    }

    #[test]
    fn the_beginning_of_a_body_that_was_cut_is_decoded() {
        let text: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let whole = gzip(&text);
        let decoded = decode(&coded("gzip"), &whole[..whole.len() / 2]);
        assert!(decoded.fault.is_some());
        assert!(decoded.bytes.len() > 1000 && text.starts_with(&decoded.bytes));
    }

    #[test]
    fn what_becomes_too_long_is_cut() {
        let decoded = decode(&coded("gzip"), &gzip(&vec![0; 20 << 20]));
        assert_eq!(decoded.bytes.len(), MAX_DECODED_BYTES);
        assert!(decoded.fault.is_some_and(|fault| fault.contains("16 MiB")));
    }

    #[test]
    fn foreign_bytes_are_a_fault_and_no_panic() {
        for coding in ["gzip", "deflate", "br", "zstd", "compress"] {
            let decoded = decode(&coded(coding), b"\x78\xffnot that");
            assert!(decoded.fault.is_some(), "{coding}");
        }
    }
}
