//! The messages that wait, in two lanes.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Semaphore, oneshot};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

use super::progress::ProgressCounters;
use crate::{
    limits::{MAX_CONTROL_MESSAGE_BYTES, MAX_MESSAGE_BYTES},
    message::Encoded,
};

/// Control messages that wait, in bytes: see [`room_for`]. Several hundred requests at once wait for no room.
const MAX_QUEUED_CONTROL_BYTES: u32 = 1024 * 1024;
/// What a short message takes beside what it says: its buffer is made for more, and it has its place in line.
const QUEUED_MESSAGE_BYTES: usize = 1280;
/// After so many control messages in a row one with a body has its turn, so that no number of short answers stops a long one.
pub(super) const MAX_CONTROL_BURST: u32 = 16;
const _: () = assert!(MAX_CONTROL_BURST as usize * MAX_CONTROL_MESSAGE_BYTES == MAX_MESSAGE_BYTES);
/// Messages with bodies that wait behind the one being written.
const MAX_QUEUED_BODY_MESSAGES: usize = 1;

/// Where a message waits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Lane {
    Control,
    Bodies,
}

/// A message that waits for its turn.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) message: Encoded,
    pub(super) taken: oneshot::Sender<()>,
}

/// How much room a control message takes in its lane, in bytes. It is about what it takes in memory.
pub(super) fn room_for(message: &Encoded) -> u32 {
    u32::try_from(message.length() + QUEUED_MESSAGE_BYTES)
        .map_or(MAX_QUEUED_CONTROL_BYTES, |bytes| {
            bytes.min(MAX_QUEUED_CONTROL_BYTES)
        })
}

/// The messages that wait.
#[derive(Debug, Default)]
pub(super) struct Queues {
    pub(super) control: VecDeque<Queued>,
    pub(super) bodies: VecDeque<Queued>,
    /// Control messages taken since the last one with a body.
    control_burst: u32,
    /// The close frame that follows what is queued, once nothing more may be.
    pub(super) close: Option<Option<CloseFrame>>,
}

impl Queues {
    pub(super) fn is_empty(&self) -> bool {
        self.control.is_empty() && self.bodies.is_empty()
    }
}

/// The two lanes, and who may queue in them.
#[derive(Debug)]
pub(super) struct Lanes {
    queues: Mutex<Queues>,
    /// Room for control messages: see [`room_for`]. Those who wait for it are served in turn.
    pub(super) control_room: Semaphore,
    /// Room for messages with bodies.
    pub(super) body_room: Semaphore,
    pub(super) progress: ProgressCounters,
}

impl Lanes {
    pub(super) fn new() -> Self {
        Self {
            queues: Mutex::default(),
            control_room: Semaphore::new(MAX_QUEUED_CONTROL_BYTES as usize),
            body_room: Semaphore::new(MAX_QUEUED_BODY_MESSAGES),
            progress: ProgressCounters::new(),
        }
    }

    /// Held between awaits only, and never while the socket is written to.
    pub(super) fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The message whose turn it is. The room that it took is free then.
    pub(super) fn pop(&self) -> Option<Queued> {
        let mut queues = self.queues();
        let is_turn_of_bodies =
            queues.control_burst >= MAX_CONTROL_BURST && !queues.bodies.is_empty();
        if !is_turn_of_bodies && let Some(queued) = queues.control.pop_front() {
            queues.control_burst = queues.control_burst.saturating_add(1);
            let room = room_for(&queued.message);
            self.control_room.add_permits(room as usize);
            return Some(queued);
        }
        queues.control_burst = 0;
        let queued = queues.bodies.pop_front()?;
        self.body_room.add_permits(1);
        Some(queued)
    }

    /// The close frame, once nothing is queued and nothing can be any more.
    pub(super) fn closes_now(&self) -> Option<Option<CloseFrame>> {
        let queues = self.queues();
        queues.close.clone().filter(|_| queues.is_empty())
    }

    /// Takes nothing more. The first close frame counts.
    pub(super) fn close(&self, close: Option<CloseFrame>) {
        let mut queues = self.queues();
        queues.close.get_or_insert(close);
        self.control_room.close();
        self.body_room.close();
    }
}
