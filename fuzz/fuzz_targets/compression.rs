//! Any bytes as a compressed body. Proves that decompressing never panics and never exceeds its limit.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tunnel_protocol::{body::compression, limits::MAX_DECOMPRESSED_BYTES, message::Encoding};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(unpacked) = compression::decompress(bytes.to_vec().into(), Some(Encoding::Zstd)) {
        assert!(
            unpacked.len() <= MAX_DECOMPRESSED_BYTES,
            "{} bytes of {}",
            unpacked.len(),
            bytes.len()
        );
    }
    if let Some(packed) = compression::compress(bytes) {
        assert_eq!(
            compression::decompress(packed, Some(Encoding::Zstd)).expect("what was compressed"),
            bytes
        );
    }
});
