//! Any bytes as a packed body. Proves that unpacking never panics and never gives more than it may.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tunnel_shared::{limits::UNPACKED, packing, protocol::Encoding};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(unpacked) = packing::unpack(bytes.to_vec().into(), Some(Encoding::Zstd)) {
        assert!(
            unpacked.len() <= UNPACKED,
            "{} bytes of {}",
            unpacked.len(),
            bytes.len()
        );
    }
    if let Some(packed) = packing::pack(bytes) {
        assert_eq!(
            packing::unpack(packed, Some(Encoding::Zstd)).expect("what was packed"),
            bytes
        );
    }
});
