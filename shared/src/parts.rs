//! Bodies in parts: cutting a body so that every message fits, and putting parts that arrive in any order back in order.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};

use crate::limits::{PART_BODY, PARTS_AHEAD, WEBSOCKET_MESSAGE};

/// How many body bytes fit beside `envelope` bytes of JSON in one message; `None` when not even the envelope does.
pub fn room_beside(envelope: usize) -> Option<usize> {
    WEBSOCKET_MESSAGE.checked_sub(envelope).map(|rest| rest / 4 * 3)
}

/// Cuts the longest part off the front of `rest`.
pub fn next_part(rest: &mut Bytes) -> Bytes {
    rest.split_to(rest.len().min(PART_BODY))
}

/// Joins chunks into one; copies nothing when there is only one.
pub fn join(chunks: Vec<Bytes>) -> Bytes {
    match <[Bytes; 1]>::try_from(chunks) {
        Ok([only]) => only,
        Err(chunks) => {
            let mut joined = BytesMut::with_capacity(chunks.iter().map(Bytes::len).sum());
            chunks.iter().for_each(|chunk| joined.extend_from_slice(chunk));
            joined.freeze()
        }
    }
}

/// A part is too far ahead of the next one expected: the sender is broken or hostile.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error("part {part} is more than {PARTS_AHEAD} ahead of part {expected}")]
pub struct TooFarAhead {
    /// The part that came.
    pub part: u32,
    /// The part that should come next.
    pub expected: u32,
}

/// Puts numbered parts back in order. Holds at most [`PARTS_AHEAD`] of them.
#[derive(Debug)]
pub struct Reorder<T> {
    expected: u32,
    early: BTreeMap<u32, T>,
}

impl<T> Reorder<T> {
    /// Expects `first` before all others.
    pub fn starting_at(first: u32) -> Self {
        Self { expected: first, early: BTreeMap::new() }
    }

    /// The number of the next part to come out.
    pub fn expected(&self) -> u32 {
        self.expected
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.early.is_empty()
    }

    /// Whether the next part is missing while a later one is there.
    pub fn is_incomplete(&self) -> bool {
        self.early.first_key_value().is_some_and(|(&first, _)| first != self.expected)
    }

    /// Takes a part in. One that was seen before is ignored: the first counts.
    ///
    /// # Errors
    /// When the part is too far ahead; it is dropped then.
    pub fn insert(&mut self, part: u32, item: T) -> Result<(), TooFarAhead> {
        let Some(ahead) = part.checked_sub(self.expected) else { return Ok(()) };
        if ahead as usize >= PARTS_AHEAD {
            return Err(TooFarAhead { part, expected: self.expected });
        }
        self.early.entry(part).or_insert(item);
        Ok(())
    }

    /// Takes the next part in order out, if it is there.
    pub fn take_next(&mut self) -> Option<T> {
        let item = self.early.remove(&self.expected)?;
        self.expected += 1;
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        id::RequestId,
        protocol::{Body, BodyPart, FromAgent, ToAgent, encode},
    };

    #[test]
    fn a_full_part_fits_a_message_with_the_longest_ids() {
        let part = BodyPart {
            request_id: "r".repeat(64).parse().expect("an id"),
            part: u32::MAX,
            body: Body(vec![0; PART_BODY].into()),
            more: false,
        };
        assert!(encode(&FromAgent::BodyPart(part.clone())).len() <= WEBSOCKET_MESSAGE);
        assert!(encode(&ToAgent::BodyPart(part)).len() <= WEBSOCKET_MESSAGE);
        assert!(RequestId::generate().as_str().len() <= 64);
    }

    #[test]
    fn room_is_what_base64_leaves() {
        assert_eq!(room_beside(WEBSOCKET_MESSAGE), Some(0));
        assert_eq!(room_beside(WEBSOCKET_MESSAGE - 4), Some(3));
        assert_eq!(room_beside(WEBSOCKET_MESSAGE + 1), None);
    }

    #[test]
    fn a_part_beyond_the_window_is_refused_and_the_last_within_it_is_not() {
        let mut reorder = Reorder::starting_at(1);
        let limit = u32::try_from(PARTS_AHEAD).expect("small");
        assert_eq!(reorder.insert(limit, ()), Ok(()));
        assert_eq!(reorder.insert(limit + 1, ()), Err(TooFarAhead { part: limit + 1, expected: 1 }));
    }

    proptest! {
        #[test]
        fn any_order_and_duplication_gives_the_body_back(
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
