//! Bodies in parts: cutting a body so that every message fits, and putting parts that arrive in any order back in order.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};

use crate::limits::{PARTS_AHEAD, RELAY_ENVELOPE, WEBSOCKET_FRAME, WEBSOCKET_MESSAGE, WINDOW};

/// How many body bytes fit beside `envelope` bytes of JSON in one message that may be passed on; `None` when not even the
/// envelope does.
pub fn room_beside(envelope: usize) -> Option<usize> {
    WEBSOCKET_MESSAGE
        .checked_sub(RELAY_ENVELOPE + envelope)
        .map(|rest| rest / 4 * 3)
}

/// Cuts a text into frames that API Gateway takes: at least one, and whether each is the last.
pub fn frames(text: String) -> impl Iterator<Item = (Bytes, bool)> {
    let mut rest = Some(Bytes::from(text));
    std::iter::from_fn(move || {
        let mut frame = rest.take()?;
        if frame.len() > WEBSOCKET_FRAME {
            rest = Some(frame.split_off(WEBSOCKET_FRAME));
        }
        Some((frame, rest.is_none()))
    })
}

/// Counts what a receiver has used up, and tells when its sender should be allowed more.
#[derive(Debug)]
pub struct Allowance {
    used: u32,
    allowed: u32,
}

impl Default for Allowance {
    fn default() -> Self {
        Self {
            used: 0,
            allowed: WINDOW,
        }
    }
}

impl Allowance {
    /// Notes that one more part was used up. Returns the number below which parts are allowed from now on, when it is time to
    /// say so: with half of the window left, so that a steady sender need not stop.
    pub fn use_part(&mut self) -> Option<u32> {
        self.used = self.used.saturating_add(1);
        if self.allowed - self.used > WINDOW / 2 {
            return None;
        }
        self.allowed = self.used.saturating_add(WINDOW);
        Some(self.allowed)
    }
}

/// Joins chunks into one; copies nothing when there is only one.
pub fn join(chunks: Vec<Bytes>) -> Bytes {
    match <[Bytes; 1]>::try_from(chunks) {
        Ok([only]) => only,
        Err(chunks) => {
            let mut joined = BytesMut::with_capacity(chunks.iter().map(Bytes::len).sum());
            chunks
                .iter()
                .for_each(|chunk| joined.extend_from_slice(chunk));
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
        Self {
            expected: first,
            early: BTreeMap::new(),
        }
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
        self.early
            .first_key_value()
            .is_some_and(|(&first, _)| first != self.expected)
    }

    /// Takes a part in. One that was seen before is ignored: the first counts.
    ///
    /// # Errors
    /// When the part is too far ahead; it is dropped then.
    pub fn insert(&mut self, part: u32, item: T) -> Result<(), TooFarAhead> {
        let Some(ahead) = part.checked_sub(self.expected) else {
            return Ok(());
        };
        if ahead as usize >= PARTS_AHEAD {
            return Err(TooFarAhead {
                part,
                expected: self.expected,
            });
        }
        self.early.entry(part).or_insert(item);
        Ok(())
    }

    /// Takes the next part in order out, if it is there.
    pub fn take_next(&mut self) -> Option<T> {
        let item = self.early.remove(&self.expected)?;
        self.expected = self.expected.saturating_add(1);
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        id::RequestId,
        limits::PART_BODY,
        protocol::{Body, BodyPart, Encoding, FromAgent, ToAgent, encode},
    };

    #[test]
    fn a_full_part_fits_a_message_with_the_longest_ids() {
        let part = BodyPart {
            request_id: "r".repeat(64).parse().expect("an id"),
            part: u32::MAX,
            body: Body(vec![0; PART_BODY].into()),
            encoding: Some(Encoding::Zstd),
            more: false,
            reply_to: Some("c".repeat(128).parse().expect("an id")),
        };
        assert!(
            encode(&FromAgent::BodyPart(part.clone())).len() + RELAY_ENVELOPE <= WEBSOCKET_MESSAGE
        );
        assert!(encode(&ToAgent::BodyPart(part)).len() <= WEBSOCKET_MESSAGE);
        assert!(RequestId::generate().as_str().len() <= 64);
    }

    #[test]
    fn room_is_what_base64_leaves() {
        let most = WEBSOCKET_MESSAGE - RELAY_ENVELOPE;
        assert_eq!(room_beside(most), Some(0));
        assert_eq!(room_beside(most - 4), Some(3));
        assert_eq!(room_beside(most + 1), None);
    }

    #[test]
    fn frames_are_cut_at_the_limit_and_put_together_give_the_text() {
        for (length, count) in [
            (0, 1),
            (1, 1),
            (WEBSOCKET_FRAME, 1),
            (WEBSOCKET_FRAME + 1, 2),
            (3 * WEBSOCKET_FRAME, 3),
        ] {
            let text = "x".repeat(length);
            let cut: Vec<(Bytes, bool)> = frames(text.clone()).collect();
            assert_eq!(cut.len(), count, "{length}");
            assert!(
                cut.iter().all(|(frame, _)| frame.len() <= WEBSOCKET_FRAME),
                "{length}"
            );
            assert_eq!(
                cut.iter().rposition(|(_, is_last)| *is_last),
                Some(count - 1),
                "{length}"
            );
            assert_eq!(
                cut.iter().filter(|(_, is_last)| *is_last).count(),
                1,
                "{length}"
            );
            assert_eq!(
                join(cut.into_iter().map(|(frame, _)| frame).collect()),
                text,
                "{length}"
            );
        }
    }

    #[test]
    fn a_sender_that_heeds_the_window_is_never_stopped_by_a_receiver_that_keeps_up() {
        let (mut allowance, mut allowed) = (Allowance::default(), WINDOW);
        let mut told = 0;
        for used in 1..1000 {
            assert!(used <= allowed, "part {used} was never allowed");
            if let Some(more) = allowance.use_part() {
                assert!(more - used <= WINDOW, "more than a window is under way");
                (allowed, told) = (more, told + 1);
            }
        }
        assert!(told < 1000 / (WINDOW / 2) + 1, "told {told} times");
    }

    #[test]
    fn a_part_beyond_the_window_is_refused_and_the_last_within_it_is_not() {
        let mut reorder = Reorder::starting_at(1);
        let limit = u32::try_from(PARTS_AHEAD).expect("small");
        assert_eq!(reorder.insert(limit, ()), Ok(()));
        assert_eq!(
            reorder.insert(limit + 1, ()),
            Err(TooFarAhead {
                part: limit + 1,
                expected: 1
            })
        );
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
