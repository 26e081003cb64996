//! How messages get into the socket, frame by frame.

use std::{
    collections::VecDeque,
    mem,
    sync::atomic::Ordering,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Sink, SinkExt};
use tokio::{sync::oneshot, time::Instant};
use tokio_tungstenite::tungstenite::{self, Message};

use super::lanes::Lanes;
use crate::{frames, limits::MAX_FRAME_BYTES};

/// A write that was taken after at least this long shows that the peer reads. A shorter wait may only be for the lock that the
/// reading half holds.
const BLOCKED_AFTER: Duration = Duration::from_millis(2);
/// Writes that follow one another sooner than this are so frequent that it pays to wait for the next one. It is several times what a
/// short write takes, and much less than anyone notices.
pub(super) const FREQUENT_WRITES: Duration = Duration::from_micros(50);

/// How far writing has come.
#[derive(Debug)]
pub(super) struct Writing<W> {
    /// Gone once the writer has ended.
    pub(super) sink: Option<W>,
    /// Of the writer's task, which goes on when the socket takes more.
    pub(super) waker: Waker,
    /// Frames of the message whose turn it is, and one that found no room in the sink before them.
    frames: VecDeque<Message>,
    /// To be told when the last of `frames` is taken.
    taken: Option<oneshot::Sender<()>>,
    /// A ping frame goes next.
    pub(super) is_ping_due: bool,
    /// Of what the sink holds and the socket has not taken yet.
    unflushed: Unflushed,
    /// A frame was refused: the sink has to be flushed first.
    must_flush: bool,
    /// The last write took several messages along, or came soon after the one before it.
    pub(super) are_writes_frequent: bool,
    turn: Turn,
    /// Since when the socket has taken nothing of what the sink holds.
    blocked_since: Option<Instant>,
    /// Why the connection is broken, for the writer's task to report.
    broken: Option<tungstenite::Error>,
}

/// The turn of the writer's task at what was left to it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Turn {
    /// Nothing is left to it.
    NotAsked,
    /// It has been woken.
    Asked,
    /// It lets the tasks that are ready go first.
    Yielding,
}

/// What the sink holds.
#[derive(Debug, Default)]
struct Unflushed {
    bytes: usize,
    ping_frames: u64,
    /// Of messages whose last byte is in the sink.
    taken: Vec<oneshot::Sender<()>>,
}

impl<W> Writing<W> {
    pub(super) fn new(sink: Option<W>) -> Self {
        Self {
            sink,
            waker: Waker::noop().clone(),
            frames: VecDeque::new(),
            taken: None,
            is_ping_due: false,
            unflushed: Unflushed::default(),
            must_flush: false,
            are_writes_frequent: false,
            turn: Turn::NotAsked,
            blocked_since: None,
            broken: None,
        }
    }
}

impl<W: Sink<Message, Error = tungstenite::Error> + Unpin> Writing<W> {
    /// Leaves what is queued to the writer's task.
    pub(super) fn ask_for_turn(&mut self) {
        // A socket that takes no more wakes the task itself.
        if self.turn == Turn::NotAsked && self.blocked_since.is_none() {
            self.turn = Turn::Asked;
            self.waker.wake_by_ref();
        }
    }

    /// Whether the writer's task is to let others go first.
    pub(super) fn yields_once(&mut self) -> bool {
        let yields = self.turn == Turn::Asked;
        self.turn = if yields {
            Turn::Yielding
        } else {
            Turn::NotAsked
        };
        yields
    }

    /// Writes for a sender. Returns whether the socket has taken all that was queued.
    pub(super) fn write_at_once(&mut self, lanes: &Lanes) -> bool {
        if self.blocked_since.is_some() {
            return false;
        }
        // No waker is left behind where the socket takes all: it would be woken whenever the connection can be read.
        let mut written = self.poll_write(lanes, &mut Context::from_waker(Waker::noop()));
        if written.is_pending() {
            let waker = self.waker.clone();
            written = self.poll_write(lanes, &mut Context::from_waker(&waker));
        }
        match written {
            Poll::Ready(Ok(())) => true,
            Poll::Ready(Err(error)) => {
                self.broken = Some(error);
                self.waker.wake_by_ref();
                false
            }
            Poll::Pending => false,
        }
    }

    /// Writes until nothing is queued and the socket has taken everything.
    pub(super) fn poll_write(
        &mut self,
        lanes: &Lanes,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), tungstenite::Error>> {
        if let Some(error) = self.broken.take() {
            return Poll::Ready(Err(error));
        }
        loop {
            match self.poll_step(lanes, context) {
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(Ok(false)) => return Poll::Ready(Ok(())),
                // Pongs have taken the room.
                Poll::Ready(Err(tungstenite::Error::WriteBufferFull(refused))) => {
                    self.frames.push_front(*refused);
                    self.must_flush = true;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    self.blocked_since.get_or_insert_with(Instant::now);
                    lanes.progress.is_blocked.store(true, Ordering::Relaxed);
                    return Poll::Pending;
                }
            }
        }
    }

    /// Hands the next frame to the sink, or flushes it where it holds enough or there is no frame. Returns whether there was
    /// anything to do.
    fn poll_step(
        &mut self,
        lanes: &Lanes,
        context: &mut Context<'_>,
    ) -> Poll<Result<bool, tungstenite::Error>> {
        let has_room = self.unflushed.bytes < MAX_FRAME_BYTES && !self.must_flush;
        if has_room && self.has_frame(lanes) {
            let Some(sink) = &mut self.sink else {
                return Poll::Ready(Ok(false));
            };
            ready!(sink.poll_ready_unpin(context))?;
            let is_ping = mem::take(&mut self.is_ping_due);
            let frame = match is_ping {
                true => Message::Ping(Bytes::new()),
                false => self
                    .frames
                    .pop_front()
                    .unwrap_or(Message::Ping(Bytes::new())),
            };
            self.unflushed.bytes += frame.len().max(1);
            self.unflushed.ping_frames += u64::from(is_ping);
            if self.frames.is_empty() {
                self.unflushed.taken.extend(self.taken.take());
            }
            sink.start_send_unpin(frame)?;
            return Poll::Ready(Ok(true));
        }
        if self.unflushed.bytes == 0 && !self.must_flush {
            return Poll::Ready(Ok(false));
        }
        ready!(self.poll_flush(lanes, context))?;
        Poll::Ready(Ok(true))
    }

    fn has_frame(&mut self, lanes: &Lanes) -> bool {
        if self.is_ping_due || !self.frames.is_empty() {
            return true;
        }
        let Some(queued) = lanes.pop() else {
            return false;
        };
        self.frames.extend(frames::frames(queued.message));
        self.taken = Some(queued.taken);
        true
    }

    fn poll_flush(
        &mut self,
        lanes: &Lanes,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), tungstenite::Error>> {
        let Some(sink) = &mut self.sink else {
            return Poll::Ready(Ok(()));
        };
        ready!(sink.poll_flush_unpin(context))?;
        let since_last = lanes.progress.write_now();
        self.are_writes_frequent = self.unflushed.taken.len() > 1 || since_last < FREQUENT_WRITES;
        if let Some(since) = self.blocked_since.take() {
            let progress = &lanes.progress;
            progress.is_blocked.store(false, Ordering::Relaxed);
            if since.elapsed() >= BLOCKED_AFTER {
                progress.unblocked_writes.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.unflushed.bytes = 0;
        // A frame that was refused is the last of a message whose receipt waits here already.
        if mem::take(&mut self.must_flush) {
            return Poll::Ready(Ok(()));
        }
        let ping_frames = mem::take(&mut self.unflushed.ping_frames);
        if ping_frames > 0 {
            lanes.progress.pinged(ping_frames);
        }
        for taken in self.unflushed.taken.drain(..) {
            // Not every sender waits for it.
            let _ = taken.send(());
        }
        Poll::Ready(Ok(()))
    }
}
