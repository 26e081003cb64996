//! Parts in any order, with gaps, repetitions and nonsense, taken out at any time. Proves that
//! [`Reorder`] returns exactly the parts it accepted, each once, as first sent, in the order of their
//! numbers; that it refuses exactly those too far ahead; that it never holds more than its limit; and
//! that what it reports about itself is true.
#![no_main]

use std::{collections::BTreeMap, rc::Rc};

use libfuzzer_sys::{
    arbitrary::{self, Arbitrary},
    fuzz_target,
};
use tunnel_protocol::{body::reorder::Reorder, limits::MAX_REORDER_PARTS};

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// A part whose number is this far from that of the next.
    Near(i8, &'a [u8]),
    /// A part with this number.
    Any(u32, &'a [u8]),
    /// The next part is taken, if it is there.
    Take,
}

// A body has far less than `u32::MAX` parts.
fuzz_target!(|input: (u16, Vec<Step<'_>>)| {
    let (first, steps) = input;
    let mut reorder = Reorder::starting_at(first.into());
    // The model: what is held by number, and the next number. Every part that is held keeps a copy of `held`.
    let (mut model, mut next, held) = (BTreeMap::new(), u32::from(first), Rc::new(()));
    for step in steps {
        let (part, bytes) = match step {
            Step::Near(ahead, bytes) => (next.saturating_add_signed(ahead.into()), bytes),
            Step::Any(part, bytes) => (part, bytes),
            Step::Take => {
                let taken = reorder.take_next().map(|(bytes, _)| bytes);
                assert_eq!(taken, model.remove(&next), "part {next}");
                next += u32::from(taken.is_some());
                continue;
            }
        };
        let is_too_far = part.saturating_sub(next) as usize >= MAX_REORDER_PARTS;
        assert_eq!(
            reorder.insert(part, (bytes, held.clone())).is_err(),
            is_too_far,
            "part {part}, expected {next}"
        );
        if part >= next && !is_too_far {
            model.entry(part).or_insert(bytes);
        }
        assert!(
            Rc::strong_count(&held) - 1 <= MAX_REORDER_PARTS,
            "{} parts are held",
            Rc::strong_count(&held) - 1
        );
        assert_eq!(Rc::strong_count(&held) - 1, model.len());
        assert_eq!(reorder.expected(), next);
        assert_eq!(reorder.is_empty(), model.is_empty());
        assert_eq!(
            reorder.is_incomplete(),
            !model.is_empty() && !model.contains_key(&next)
        );
    }
});
