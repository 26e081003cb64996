//! What holds for a body's whole way, whatever the network does to its messages.

use std::{cell::RefCell, collections::VecDeque, convert::Infallible};

use futures_util::{FutureExt, StreamExt, stream};
use http_body::Frame;
use http_body_util::StreamBody;
use proptest::{prelude::*, sample::Index};
use tokio::task::yield_now;

use super::{budget::BodyBudget, window::WindowUpdates, *};
use crate::{
    limits::{INITIAL_WINDOW_PARTS, MAX_REORDER_PARTS},
    message::{CarriesBody, Encoded, Format, Framing, FromAgent, Heads, decode, decode_binary},
};

/// A body whose frames come one after another, with a pause before each.
fn body(frames: Vec<Vec<u8>>) -> impl http_body::Body<Data = Bytes, Error = Infallible> + Unpin {
    let frames = stream::iter(frames).then(async |frame| {
        yield_now().await;
        Ok(Frame::data(Bytes::from(frame)))
    });
    StreamBody::new(Box::pin(frames))
}

/// What is on its way: messages in both directions, which overtake each other and come twice.
#[derive(Default)]
struct Network {
    parts: VecDeque<Encoded>,
    windows: VecDeque<u32>,
    is_sent: bool,
}

/// Takes any of `messages`, as `choice` has it, and leaves it there as well if `twice`.
fn take_any<T: Clone>(messages: &mut VecDeque<T>, choice: &Index, twice: bool) -> Option<T> {
    if messages.is_empty() {
        return None;
    }
    let at = choice.index(messages.len());
    if twice {
        messages.get(at).cloned()
    } else {
        messages.remove(at)
    }
}

async fn send(
    frames: Vec<Vec<u8>>,
    (mode, format): (Mode, Format),
    network: &RefCell<Network>,
    updates: &WindowUpdates,
) {
    let mut sender = BodySender::new(body(frames), mode, format);
    let mut window = updates.window();
    let push = |message: BodyPart| {
        network
            .borrow_mut()
            .parts
            .push_back(FromAgent::BodyPart(message).encode_as(format));
    };
    let id = RequestId::generate();
    let chunk = sender.first_chunk(1000).await.expect("bytes");
    assert!(chunk.bytes.len() <= 1000);
    push(Part { number: 0, chunk }.into_message(id.clone(), None));
    while let Some(part) = sender
        .next_part(Some(&mut window))
        .await
        .expect("a body that does not break off")
    {
        push(part.into_message(id.clone(), None));
    }
    assert!(matches!(sender.next_part(None).await, Ok(None)));
    network.borrow_mut().is_sent = true;
}

async fn receive(
    choices: Vec<(Index, Index, bool)>,
    network: &RefCell<Network>,
    updates: &WindowUpdates,
    budget: &BodyBudget,
) -> Vec<u8> {
    let mut receiver = BodyReceiver::new(budget);
    let mut received = Vec::new();
    for (part, window, twice) in choices.iter().cycle() {
        let window = take_any(&mut network.borrow_mut().windows, window, *twice);
        if let Some(allowed) = window {
            updates.allow(allowed);
        }
        yield_now().await;
        let twice = *twice && !network.borrow().is_sent;
        let encoded = take_any(&mut network.borrow_mut().parts, part, twice);
        if let Some(encoded) = encoded {
            let decoded = match &encoded {
                Encoded::Text(text) => decode(text),
                Encoded::Binary(bytes, _) => decode_binary(bytes),
            };
            let Ok(FromAgent::BodyPart(message)) = decoded else {
                panic!("not a part: {encoded:?}");
            };
            let part = Part::from(message);
            assert!(
                part.number - receiver.next_number().min(part.number) < INITIAL_WINDOW_PARTS,
                "part {} was sent before it was allowed",
                part.number
            );
            receiver.insert(part.number, part.chunk).expect("room");
        }
        assert!(
            budget.held_bytes()
                <= INITIAL_WINDOW_PARTS as usize * crate::limits::MAX_BINARY_PART_BYTES
        );
        while let Some(chunk) = receiver.next_chunk().expect("what was sent") {
            received.extend(chunk.bytes);
            network.borrow_mut().windows.extend(chunk.window);
        }
        assert!(receiver.missing_since().is_some() || budget.held_bytes() == 0);
        if receiver.is_over() {
            break;
        }
    }
    received
}

fn carried(
    frames: Vec<Vec<u8>>,
    mode: Mode,
    is_binary: bool,
    choices: Vec<(Index, Index, bool)>,
) -> (Vec<u8>, usize) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    let (network, updates) = (RefCell::default(), WindowUpdates::default());
    let budget = BodyBudget::default();
    let format = if is_binary {
        Format::Binary(Framing::Short, Heads::Compact)
    } else {
        Format::Text
    };
    let received = runtime.block_on(async {
        let (received, ()) = tokio::join!(
            receive(choices, &network, &updates, &budget),
            send(frames, (mode, format), &network, &updates)
        );
        received
    });
    (received, budget.held_bytes())
}

fn choices() -> impl Strategy<Value = Vec<(Index, Index, bool)>> {
    // The last choice takes messages away, so that all of them arrive in the end.
    prop::collection::vec(any::<(Index, Index, bool)>(), 1..60).prop_map(|mut choices| {
        choices.push((choices[0].0, choices[0].1, false));
        choices
    })
}

proptest! {
    #[test]
    fn a_body_arrives_whatever_order_its_parts_and_windows_take(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..200),
        is_binary: bool,
        choices in choices(),
    ) {
        let expected = frames.concat();
        let (received, held) = carried(frames, Mode::Raw, is_binary, choices);
        prop_assert_eq!(received, expected);
        prop_assert_eq!(held, 0);
    }

    #[test]
    fn nonsense_gives_bytes_in_order_or_an_error_and_stays_within_the_limit(
        steps in prop::collection::vec((0u32..80, any::<Option<Vec<u8>>>(), any::<bool>(), any::<bool>()), 0..300),
    ) {
        let budget = BodyBudget::new(3000);
        let mut receiver = BodyReceiver::new(&budget);
        for (number, bytes, is_compressed, more) in steps {
            let chunk = Chunk {
                bytes: bytes.unwrap_or_default().into(),
                encoding: is_compressed.then_some(Encoding::Zstd),
                more,
            };
            let is_too_far = number as usize >= receiver.next_number() as usize + MAX_REORDER_PARTS;
            let outcome = receiver.insert(number, chunk);
            prop_assert!(outcome.is_err() || receiver.is_over() || !is_too_far);
            prop_assert!(budget.held_bytes() <= 3000 / 8);
            while let Ok(Some(chunk)) = receiver.next_chunk() {
                prop_assert_eq!(chunk.more, !receiver.is_over());
            }
        }
        drop(receiver);
        prop_assert_eq!(budget.held_bytes(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    #[test]
    fn a_long_body_arrives_compressed_or_not(
        word in prop::collection::vec(any::<u8>(), 1..2000),
        times in 1usize..2000,
        compress: bool,
        is_binary: bool,
        choices in choices(),
    ) {
        let expected = word.repeat(times);
        let frames = expected.chunks(64 * 1024).map(<[u8]>::to_vec).collect();
        let (received, held) = carried(frames, Mode::Coalesced { compress }, is_binary, choices);
        prop_assert!(received == expected);
        prop_assert_eq!(held, 0);
    }
}

#[tokio::test]
async fn bytes_of_an_upgraded_connection_are_sent_at_once() {
    let endless = stream::iter([Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"x")))])
        .chain(stream::pending());
    let mut sender = BodySender::new(StreamBody::new(Box::pin(endless)), Mode::Raw, Format::Text);
    let first = sender
        .first_chunk(100)
        .now_or_never()
        .expect("no wait")
        .expect("bytes");
    assert_eq!((&first.bytes[..], first.more), (&b"x"[..], true));
}

#[tokio::test]
async fn a_silent_upgraded_connection_does_not_delay_its_head() {
    let silent = stream::pending::<Result<Frame<Bytes>, Infallible>>();
    let mut sender = BodySender::new(StreamBody::new(silent), Mode::Raw, Format::Text);
    let first = sender
        .first_chunk(100)
        .now_or_never()
        .expect("no wait")
        .expect("no bytes");
    assert_eq!((first.bytes.len(), first.more), (0, true));
}

#[tokio::test]
async fn a_sender_ends_when_its_receiver_is_gone() {
    let updates = WindowUpdates::default();
    let mut window = updates.window();
    let mut sender = BodySender::new(body(vec![vec![1]; 200]), Mode::Raw, Format::Text);
    sender.first_chunk(1).await.expect("bytes");
    drop(updates);
    while let Ok(part) = sender.next_part(Some(&mut window)).await {
        assert!(part.is_some_and(|part| part.number < INITIAL_WINDOW_PARTS));
    }
}
