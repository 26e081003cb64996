//! Parts that arrive in any order, put back in order.

use std::collections::VecDeque;

use crate::limits::MAX_REORDER_PARTS;

/// A part is too far ahead of the next one expected: the sender is broken or hostile.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error("part {part} is more than {MAX_REORDER_PARTS} ahead of part {expected}")]
pub struct ReorderError {
    /// The part that came.
    pub part: u32,
    /// The part that should come next.
    pub expected: u32,
}

/// Puts numbered parts back in order. Holds at most [`MAX_REORDER_PARTS`] of them.
#[derive(Debug)]
pub struct Reorder<T> {
    expected: u32,
    /// From the expected part to the last that is there.
    held: VecDeque<Option<T>>,
}

impl<T> Reorder<T> {
    /// Expects `first` before all others.
    pub fn starting_at(first: u32) -> Self {
        Self {
            expected: first,
            held: VecDeque::new(),
        }
    }

    /// The number of the next part to come out.
    pub fn expected(&self) -> u32 {
        self.expected
    }

    /// Whether this part is held, or has been taken out.
    pub fn has_seen(&self, part: u32) -> bool {
        part.checked_sub(self.expected)
            .is_none_or(|ahead| matches!(self.held.get(ahead as usize), Some(Some(_))))
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Whether the next part is missing while a later one is there.
    pub fn is_incomplete(&self) -> bool {
        matches!(self.held.front(), Some(None))
    }

    /// Accepts a part. If it was seen before, it is ignored: the first one counts.
    ///
    /// # Errors
    /// If the part is too far ahead; it is dropped then.
    pub fn insert(&mut self, part: u32, item: T) -> Result<(), ReorderError> {
        let Some(ahead) = part.checked_sub(self.expected) else {
            return Ok(());
        };
        let at = ahead as usize;
        if at >= MAX_REORDER_PARTS {
            return Err(ReorderError {
                part,
                expected: self.expected,
            });
        }
        if at >= self.held.len() {
            self.held.resize_with(at + 1, || None);
        }
        self.held[at].get_or_insert(item);
        Ok(())
    }

    /// Takes the next part in order out, if it is there.
    pub fn take_next(&mut self) -> Option<T> {
        let item = self.held.pop_front_if(|next| next.is_some())??;
        self.expected = self.expected.saturating_add(1);
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_part_beyond_the_window_is_refused_and_the_last_within_it_is_not() {
        let mut reorder = Reorder::starting_at(1);
        let limit = u32::try_from(MAX_REORDER_PARTS).expect("small");
        assert_eq!(reorder.insert(limit, ()), Ok(()));
        assert_eq!(
            reorder.insert(limit + 1, ()),
            Err(ReorderError {
                part: limit + 1,
                expected: 1
            })
        );
    }

    proptest! {
        #[test]
        fn parts_in_any_order_and_repeated_give_the_body_back(
            body in prop::collection::vec(any::<u8>(), 1..400),
            shuffle in prop::collection::vec(any::<prop::sample::Index>(), 0..64),
        ) {
            let parts: Vec<(u32, Vec<u8>)> = (1..).zip(body.chunks(7).map(<[u8]>::to_vec)).collect();
            let mut sent = parts.clone();
            for (at, index) in shuffle.iter().enumerate() {
                let (a, b) = (at % sent.len(), index.index(sent.len()));
                sent.swap(a, b);
                let again = sent[b].clone();
                sent.push(again);
            }
            let (mut reorder, mut received) = (Reorder::starting_at(1), Vec::new());
            for (part, bytes) in sent {
                reorder.insert(part, bytes).expect("within the window");
                while let Some(bytes) = reorder.take_next() {
                    received.extend(bytes);
                }
            }
            prop_assert_eq!(received, body);
        }
    }
}
