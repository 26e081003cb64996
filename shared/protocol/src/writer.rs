//! The one writer of a WebSocket connection, for both ends.
//!
//! Messages wait in two lanes. Short ones (`window`, `cancel`, `error`, `replaced`, `ping`, requests and responses that have next
//! to no body) are control messages and go first. Parts of bodies and what is as long as they are take turns, and at most two
//! such messages are held: the one being written and the one after it. Senders that have more wait in line. So a large body delays
//! short messages by no more than one message and what the socket holds.
//!
//! Whoever queues a message writes as much of what is queued as the socket takes at once, so that no other task has to be woken for
//! it. While one task writes, the others only queue; the one that writes takes what they queued along, several short messages in
//! one write. When the socket takes no more, the writer's own task waits and goes on from there.
//!
//! While short messages follow one another closely, as with many requests at once, they are left to the writer's task, which lets
//! all tasks that are ready have their turn first: what they queue goes out in one write, and the other end reads it in one.

mod lanes;
mod progress;
#[cfg(test)]
mod tests;
mod writing;

use std::{
    fmt,
    future::poll_fn,
    mem,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, TryLockError, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::{Sink, SinkExt};
use tokio::{
    net::TcpStream,
    sync::{oneshot, watch},
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};
use tokio_tungstenite::tungstenite::{
    self, Message,
    protocol::{CloseFrame, frame::coding::CloseCode},
};

pub use self::progress::Progress;
use self::{
    lanes::{Lane, Lanes, Queued, room_for},
    writing::Writing,
};
use crate::message::Encoded;

/// Most bytes that the system's send buffer holds beyond those in transit, where the system lets us limit it. What is there can
/// no longer be overtaken.
const MAX_UNSENT_BYTES: u32 = 64 * 1024;
/// Ping frames are sent at multiples of this, counted from one time for the whole process: thousands of idle connections then wake
/// it twice a second together, and not each by itself.
const PING_FRAME_GRID: Duration = Duration::from_millis(500);

/// Keeps the system from queueing much more than what is in transit, so that a control message need not wait behind it, and turns
/// off Nagle's algorithm. Without either a connection only has more latency, so failing is not an error.
pub fn tune(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let _ = socket2::SockRef::from(stream).set_tcp_notsent_lowat(MAX_UNSENT_BYTES);
}

/// Why a message was not queued.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SendError {
    /// There is no room without waiting.
    #[error("too many messages are waiting to be sent")]
    Full,
    /// The connection has ended or is being closed.
    #[error("the connection is closed")]
    Closed,
}

/// Tells when the socket has taken a message.
#[derive(Debug)]
pub struct Receipt(oneshot::Receiver<()>);

impl Receipt {
    /// Waits until the socket has taken the message's last byte.
    ///
    /// # Errors
    /// If the connection ended before.
    pub async fn taken(self) -> Result<(), SendError> {
        self.0.await.map_err(|_| SendError::Closed)
    }

    /// Whether the socket has taken the message.
    pub fn is_taken(&mut self) -> bool {
        self.0.try_recv().is_ok()
    }
}

/// Queues messages for a [`MessageWriter`]. Clones share its lanes. The writer closes the connection when the last clone is gone.
#[derive(Clone, Debug)]
pub struct MessageSender(Arc<Sending>);

/// What the clones of a sender share.
struct Sending {
    lanes: Arc<Lanes>,
    socket: Arc<dyn WriteQueued>,
    /// Closed when the writer has ended.
    ended: watch::Receiver<()>,
}

impl fmt::Debug for Sending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sending")
            .field("lanes", &self.lanes)
            .finish_non_exhaustive()
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.lanes.close(None);
        self.socket.wake_writer();
    }
}

impl MessageSender {
    /// Queues a message in its lane, and waits for room if need be. Parts of bodies keep their order; of other messages a
    /// shorter one may overtake what was queued before it.
    ///
    /// # Errors
    /// [`SendError::Closed`].
    pub async fn send(&self, message: impl Into<Encoded>) -> Result<Receipt, SendError> {
        let message = message.into();
        if message.is_control() {
            self.control(message).await
        } else {
            self.body(message).await
        }
    }

    /// Queues a control message, and waits for room if need be.
    ///
    /// # Errors
    /// [`SendError::Closed`].
    pub async fn control(&self, message: impl Into<Encoded>) -> Result<Receipt, SendError> {
        let message = message.into();
        let lanes = &self.0.lanes;
        let room = lanes.control_room.acquire_many(room_for(&message));
        room.await.map_err(|_| SendError::Closed)?.forget();
        self.queue(message, Lane::Control)
    }

    /// Queues a control message if there is room.
    ///
    /// # Errors
    /// If there is none, or the connection has ended.
    pub fn try_control(&self, message: impl Into<Encoded>) -> Result<Receipt, SendError> {
        let message = message.into();
        let lanes = &self.0.lanes;
        match lanes.control_room.try_acquire_many(room_for(&message)) {
            Ok(room) => room.forget(),
            Err(tokio::sync::TryAcquireError::NoPermits) => return Err(SendError::Full),
            Err(tokio::sync::TryAcquireError::Closed) => return Err(SendError::Closed),
        }
        self.queue(message, Lane::Control)
    }

    /// Queues a message with a body behind those who wait already.
    ///
    /// # Errors
    /// [`SendError::Closed`].
    pub async fn body(&self, message: impl Into<Encoded>) -> Result<Receipt, SendError> {
        let room = self.0.lanes.body_room.acquire().await;
        room.map_err(|_| SendError::Closed)?.forget();
        self.queue(message.into(), Lane::Bodies)
    }

    /// Queues a message for which there is room, and writes what the socket takes, or leaves that to the writer's task.
    fn queue(&self, message: Encoded, lane: Lane) -> Result<Receipt, SendError> {
        let (taken, receipt) = oneshot::channel();
        {
            let mut queues = self.0.lanes.queues();
            if queues.close.is_some() {
                return Err(SendError::Closed);
            }
            let queued = Queued { message, taken };
            match lane {
                Lane::Control => queues.control.push_back(queued),
                Lane::Bodies => queues.bodies.push_back(queued),
            }
        }
        self.0.socket.write_queued(lane);
        Ok(Receipt(receipt))
    }

    /// Has the connection closed with `code` once what is queued has been written. Those who wait for room are refused. Only the
    /// first call counts.
    pub fn close(&self, code: u16, reason: &'static str) {
        self.0.lanes.close(Some(CloseFrame {
            code: CloseCode::from(code),
            reason: reason.into(),
        }));
        self.0.socket.wake_writer();
    }

    /// Completes when the writer has ended.
    pub async fn closed(&self) {
        // Nothing is ever sent through it.
        let _ = self.0.ended.clone().changed().await;
    }

    /// What the writer has done so far.
    pub fn progress(&self) -> Progress {
        let progress = &self.0.lanes.progress;
        Progress {
            unblocked_writes: progress.unblocked_writes.load(Ordering::Relaxed),
            ping_frames: progress.ping_frames.load(Ordering::Acquire),
            is_blocked: progress.is_blocked.load(Ordering::Relaxed),
        }
    }

    /// When the socket took the last ping frame, to the microsecond; when the writer was made, if it has taken none yet.
    pub fn last_ping_frame(&self) -> Instant {
        let progress = &self.0.lanes.progress;
        let microseconds = progress.last_ping_frame.load(Ordering::Relaxed);
        progress.opened + Duration::from_micros(microseconds)
    }

    /// When the socket last took a frame, to the microsecond; when the writer was made, if it has taken none yet.
    pub fn last_written(&self) -> Instant {
        let progress = &self.0.lanes.progress;
        let microseconds = progress.last_written.load(Ordering::Relaxed);
        progress.opened + Duration::from_micros(microseconds)
    }
}

/// The socket, as a sender knows it.
trait WriteQueued: Send + Sync {
    /// Writes what is queued as far as the socket takes it at once, and leaves the rest to the writer's task. Where another task is
    /// writing, it is left to that. What was queued in the control lane may be left to the next turn of the writer's task.
    fn write_queued(&self, lane: Lane);

    /// Has the writer's task look what is to be done.
    fn wake_writer(&self);
}

/// What senders and the writer's task share.
struct Shared<W> {
    lanes: Arc<Lanes>,
    writing: Mutex<Writing<W>>,
}

impl<W> Shared<W> {
    /// Held between awaits only.
    fn writing(&self) -> MutexGuard<'_, Writing<W>> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the sink, and drops what was not written.
    fn take_sink(&self) -> Option<W> {
        // Dropped once the lock is free: a waker may hold a task that holds a sender.
        let ended = mem::replace(&mut *self.writing(), Writing::new(None));
        ended.sink
    }
}

impl<W: Sink<Message, Error = tungstenite::Error> + Send + Unpin> WriteQueued for Shared<W> {
    fn write_queued(&self, lane: Lane) {
        loop {
            let mut writing = match self.writing.try_lock() {
                Ok(writing) => writing,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // Whoever writes looks again below.
                Err(TryLockError::WouldBlock) => return,
            };
            if lane == Lane::Control && writing.are_writes_frequent {
                writing.ask_for_turn();
                return;
            }
            if !writing.write_at_once(&self.lanes) {
                return;
            }
            drop(writing);
            if self.lanes.queues().is_empty() {
                return;
            }
        }
    }

    fn wake_writer(&self) {
        self.writing().waker.wake_by_ref();
    }
}

/// Writes messages in the frames that their readers take to `W`, the sink of a WebSocket connection that was
/// made with [`crate::frames::client_config`] or [`crate::frames::server_config`].
pub struct MessageWriter<W> {
    shared: Arc<Shared<W>>,
    ping_frames: Option<Interval>,
    _ended: watch::Sender<()>,
}

impl<W> fmt::Debug for MessageWriter<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessageWriter")
            .field("lanes", &self.shared.lanes)
            .finish_non_exhaustive()
    }
}

impl<W: Sink<Message, Error = tungstenite::Error> + Send + Unpin + 'static> MessageWriter<W> {
    /// A writer that also sends a ping frame every `ping_interval`, and the way to queue messages for it.
    pub fn new(sink: W, ping_interval: Option<Duration>) -> (MessageSender, Self) {
        let (ending, ended) = watch::channel(());
        let ping_frames = ping_interval.map(ping_ticks);
        let lanes = Arc::new(Lanes::new());
        let shared = Arc::new(Shared {
            lanes: lanes.clone(),
            writing: Mutex::new(Writing::new(Some(sink))),
        });
        let sender = MessageSender(Arc::new(Sending {
            lanes,
            socket: shared.clone(),
            ended,
        }));
        let writer = Self {
            shared,
            ping_frames,
            _ended: ending,
        };
        (sender, writer)
    }

    /// Writes until [`MessageSender::close`] is called or all senders are gone, then what is queued and a close frame. The peer's
    /// close frame is for the reading half to wait for. A peer that does not read keeps this waiting: limit it in time.
    ///
    /// # Errors
    /// If the connection has broken.
    pub async fn run(mut self) -> Result<W, tungstenite::Error> {
        let close = poll_fn(|context| self.poll_run(context)).await?;
        let sink = self.shared.take_sink();
        let mut sink = sink.ok_or(tungstenite::Error::AlreadyClosed)?;
        // A close frame that found no room beside pongs could not be written a second time.
        sink.flush().await?;
        sink.send(Message::Close(close)).await?;
        Ok(sink)
    }

    /// Ready once everything that was queued before the end has been written.
    fn poll_run(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Option<CloseFrame>, tungstenite::Error>> {
        let lanes = &self.shared.lanes;
        loop {
            let mut writing = self.shared.writing();
            if let Some(due) = &mut self.ping_frames {
                while due.poll_tick(context).is_ready() {
                    writing.is_ping_due = true;
                }
            }
            writing.waker.clone_from(context.waker());
            if writing.yields_once() {
                // Whoever wakes itself is last in line.
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            ready!(writing.poll_write(lanes, context))?;
            if let Some(close) = lanes.closes_now() {
                return Poll::Ready(Ok(close));
            }
            drop(writing);
            // What was queued in the meantime is not for those who queued it to write.
            if lanes.queues().is_empty() {
                return Poll::Pending;
            }
        }
    }
}

/// Ticks every `period`, the first up to [`PING_FRAME_GRID`] early.
fn ping_ticks(period: Duration) -> Interval {
    static GRID_ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    let now = Instant::now();
    let since_origin = now.saturating_duration_since(*GRID_ORIGIN).as_nanos();
    let since_line = Duration::from_nanos_u128(since_origin % PING_FRAME_GRID.as_nanos());
    let first = now + period.saturating_sub(since_line);
    let mut ticks = interval_at(first, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks
}

impl<W> Drop for MessageWriter<W> {
    fn drop(&mut self) {
        self.shared.lanes.close(None);
        let mut queues = self.shared.lanes.queues();
        queues.control.clear();
        queues.bodies.clear();
        drop(queues);
        drop(self.shared.take_sink());
    }
}
