//! Parts of a body with any numbers and bytes, compressed or not, taken out whenever. Proves that receiving never panics; that what
//! comes out is what the parts carry, in the order of their numbers, each once and as first sent; that a body ends with its last
//! part; and that no more bytes are held than the budget has, and none once the body is dropped.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::{
    arbitrary::{self, Arbitrary},
    fuzz_target,
};
use tunnel_protocol::{
    body::{BodyReceiver, Chunk, budget::BodyBudget, compression},
    limits::{INITIAL_WINDOW_PARTS, MAX_DECOMPRESSED_BYTES},
    message::Encoding,
};

/// So small that few parts use it up.
const BUDGET_BYTES: usize = 4096;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// A part whose number is this far from that of the next.
    Part {
        ahead: i8,
        bytes: &'a [u8],
        form: Form,
        more: bool,
    },
    /// The next bytes are taken, if they are there.
    Take,
}

#[derive(Arbitrary, Debug)]
enum Form {
    Plain,
    Compressed,
    /// Said to be compressed, whatever it is.
    Claimed,
}

impl Form {
    fn chunk(&self, bytes: &[u8], more: bool) -> Chunk {
        let plain = || (bytes.to_vec().into(), None);
        let (bytes, encoding) = match self {
            Self::Plain => plain(),
            Self::Compressed => compression::compress(bytes)
                .map_or_else(plain, |compressed| (compressed, Some(Encoding::Zstd))),
            Self::Claimed => (bytes.to_vec().into(), Some(Encoding::Zstd)),
        };
        Chunk {
            bytes,
            encoding,
            more,
        }
    }
}

fuzz_target!(|steps: Vec<Step<'_>>| {
    let budget = BodyBudget::new(BUDGET_BYTES);
    let mut receiver = BodyReceiver::new(&budget);
    let mut parts: BTreeMap<u32, Chunk> = BTreeMap::new();
    let mut allowed = INITIAL_WINDOW_PARTS;
    for step in steps {
        let next = receiver.next_number();
        match step {
            Step::Part {
                ahead,
                bytes,
                form,
                more,
            } => {
                let number = next.saturating_add_signed(ahead.into());
                let chunk = form.chunk(bytes, more);
                let is_new = number >= next && !parts.contains_key(&number);
                if receiver.insert(number, chunk.clone()).is_ok() && is_new && !receiver.is_over() {
                    parts.insert(number, chunk);
                }
            }
            Step::Take => {
                let expected = parts.remove(&next).map(Chunk::decompress);
                match (receiver.next_chunk(), expected) {
                    (Ok(Some(received)), Some(Ok(bytes))) => {
                        assert_eq!(received.bytes, bytes, "part {next}");
                        assert!(received.bytes.len() <= MAX_DECOMPRESSED_BYTES);
                        assert_eq!(receiver.is_over(), !received.more);
                        if let Some(window) = received.window {
                            assert!(window > allowed, "{window} after {allowed}");
                            allowed = window;
                        }
                    }
                    (Ok(None), None) => {}
                    // Nothing good can come after a part that cannot be decompressed.
                    (Err(_), Some(Err(_))) => break,
                    (received, expected) => panic!("part {next}: {received:?}, not {expected:?}"),
                }
                if receiver.is_over() {
                    parts.clear();
                }
            }
        }
        assert!(budget.held_bytes() <= BUDGET_BYTES);
    }
    drop(receiver);
    assert_eq!(budget.held_bytes(), 0);
});
