//! WebSocket frames: how a message is cut into them.

use bytes::Bytes;

use crate::limits::MAX_FRAME_BYTES;

/// Cuts a text into frames that API Gateway takes: at least one, and whether each is the last.
pub fn frames(text: String) -> impl Iterator<Item = (Bytes, bool)> {
    let mut rest = Some(Bytes::from(text));
    std::iter::from_fn(move || {
        let mut frame = rest.take()?;
        if frame.len() > MAX_FRAME_BYTES {
            rest = Some(frame.split_off(MAX_FRAME_BYTES));
        }
        Some((frame, rest.is_none()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::join;

    #[test]
    fn frames_are_cut_at_the_limit_and_put_together_give_the_text() {
        for (length, count) in [
            (0, 1),
            (1, 1),
            (MAX_FRAME_BYTES, 1),
            (MAX_FRAME_BYTES + 1, 2),
            (3 * MAX_FRAME_BYTES, 3),
        ] {
            let text = "x".repeat(length);
            let cut: Vec<(Bytes, bool)> = frames(text.clone()).collect();
            assert_eq!(cut.len(), count, "{length}");
            assert!(
                cut.iter().all(|(frame, _)| frame.len() <= MAX_FRAME_BYTES),
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
}
