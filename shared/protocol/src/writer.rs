//! The one writer of a WebSocket connection, for both ends.
//!
//! Messages wait in two lanes. Short ones (`window`, `cancel`, `error`, `replaced`, `ping`, requests and responses that have next
//! to no body) are control messages and go first. Parts of bodies and what is as long as they are take turns, and at most two
//! such messages are held: the one being written and the one after it. Senders that have more wait in line. So a large body delays short messages by no more than one message
//! and what the socket holds.
//!
//! Whoever queues a message writes as much of what is queued as the socket takes at once, so that no other task has to be woken for
//! it. While one task writes, the others only queue; the one that writes takes what they queued along, several short messages in
//! one write. When the socket takes no more, the writer's own task waits and goes on from there.
//!
//! While short messages follow one another closely, as with many requests at once, they are left to the writer's task, which lets
//! all tasks that are ready have their turn first: what they queue goes out in one write, and the other end reads it in one.

use std::{
    collections::VecDeque,
    fmt,
    future::poll_fn,
    mem,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Sink, SinkExt};
use tokio::{
    net::TcpStream,
    sync::{Semaphore, oneshot, watch},
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};
use tokio_tungstenite::tungstenite::{
    self, Message,
    protocol::{CloseFrame, frame::coding::CloseCode},
};

use crate::{frames, limits::MAX_FRAME_BYTES, message::Encoded};

/// Longest message, in bytes, that [`MessageSender::send`] takes for a control message: the head of a request or a response with
/// next to no body, as a rule. [`MAX_CONTROL_BURST`] of them are as long as the longest message with a body.
const MAX_CONTROL_MESSAGE_BYTES: usize = 8 * 1024;
/// Control messages that wait.
const MAX_QUEUED_CONTROL_MESSAGES: usize = 64;
/// After so many control messages in a row one with a body has its turn, so that no number of short answers stops a long one.
const MAX_CONTROL_BURST: u32 = 16;
/// Messages with bodies that wait behind the one being written.
const MAX_QUEUED_BODY_MESSAGES: usize = 1;
/// A write that was taken after at least this long shows that the peer reads. A shorter wait may only be for the lock that the
/// reading half holds.
const BLOCKED_AFTER: Duration = Duration::from_millis(2);
/// Writes that follow one another sooner than this are so frequent that it pays to wait for the next one. It is several times what a
/// short write takes, and much less than anyone notices.
const FREQUENT_WRITES: Duration = Duration::from_micros(50);
/// Most bytes that the system's send buffer holds beyond those in transit, where the system lets us limit it. What is there can
/// no longer be overtaken.
const MAX_UNSENT_BYTES: u32 = 64 * 1024;

/// Ping frames are sent at multiples of this, counted from one time for the whole process: thousands of idle connections then wake
/// it a few times a second together, and not each by itself.
const PING_FRAME_GRID: Duration = Duration::from_millis(250);

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

/// A message that waits for its turn.
#[derive(Debug)]
struct Queued {
    message: Encoded,
    taken: oneshot::Sender<()>,
}

/// What the writer has done so far, for those who judge whether the peer is alive.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Progress {
    /// Writes that had to wait and were taken in the end: the peer has read something meanwhile.
    pub unblocked_writes: u64,
    /// Ping frames that were taken by the socket.
    pub ping_frames: u64,
    /// The socket has no room for what is to be written.
    pub is_blocked: bool,
}

#[derive(Debug)]
struct ProgressCounters {
    unblocked_writes: AtomicU64,
    ping_frames: AtomicU64,
    is_blocked: AtomicBool,
    /// When the socket took the last of them, in microseconds after `opened`.
    last_ping_frame: AtomicU64,
    opened: Instant,
    /// When the socket last took a frame, in microseconds after `opened`.
    last_written: AtomicU64,
}

impl ProgressCounters {
    fn new() -> Self {
        Self {
            unblocked_writes: AtomicU64::new(0),
            ping_frames: AtomicU64::new(0),
            is_blocked: AtomicBool::new(false),
            last_ping_frame: AtomicU64::new(0),
            opened: Instant::now(),
            last_written: AtomicU64::new(0),
        }
    }

    /// Notes a write, and returns how long ago the last one was.
    fn write_now(&self) -> Duration {
        let elapsed = self.opened.elapsed().as_micros();
        let microseconds = u64::try_from(elapsed).unwrap_or(u64::MAX);
        let last = self.last_written.swap(microseconds, Ordering::Relaxed);
        Duration::from_micros(microseconds.saturating_sub(last))
    }

    fn pinged(&self, ping_frames: u64) {
        let elapsed = self.opened.elapsed().as_micros();
        let microseconds = u64::try_from(elapsed).unwrap_or(u64::MAX);
        self.last_ping_frame.store(microseconds, Ordering::Relaxed);
        // After the time, so that whoever sees this ping frame counted sees its time.
        self.ping_frames.fetch_add(ping_frames, Ordering::Release);
    }
}

/// Where a message waits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Lane {
    Control,
    Bodies,
}

/// The messages that wait.
#[derive(Debug, Default)]
struct Queues {
    control: VecDeque<Queued>,
    bodies: VecDeque<Queued>,
    /// Control messages taken since the last one with a body.
    control_burst: u32,
    /// The close frame that follows what is queued, once nothing more may be.
    close: Option<Option<CloseFrame>>,
}

impl Queues {
    fn is_empty(&self) -> bool {
        self.control.is_empty() && self.bodies.is_empty()
    }
}

/// The two lanes, and who may queue in them.
#[derive(Debug)]
struct Lanes {
    queues: Mutex<Queues>,
    /// Room for control messages. Those who wait for it are served in turn.
    control_room: Semaphore,
    /// Room for messages with bodies.
    body_room: Semaphore,
    progress: ProgressCounters,
}

impl Lanes {
    fn new() -> Self {
        Self {
            queues: Mutex::default(),
            control_room: Semaphore::new(MAX_QUEUED_CONTROL_MESSAGES),
            body_room: Semaphore::new(MAX_QUEUED_BODY_MESSAGES),
            progress: ProgressCounters::new(),
        }
    }

    /// Held between awaits only, and never while the socket is written to.
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The message whose turn it is. There is room for another one then.
    fn pop(&self) -> Option<Queued> {
        let mut queues = self.queues();
        let is_turn_of_bodies =
            queues.control_burst >= MAX_CONTROL_BURST && !queues.bodies.is_empty();
        if !is_turn_of_bodies && let Some(queued) = queues.control.pop_front() {
            queues.control_burst = queues.control_burst.saturating_add(1);
            self.control_room.add_permits(1);
            return Some(queued);
        }
        queues.control_burst = 0;
        let queued = queues.bodies.pop_front()?;
        self.body_room.add_permits(1);
        Some(queued)
    }

    /// The close frame, once nothing is queued and nothing can be any more.
    fn closes_now(&self) -> Option<Option<CloseFrame>> {
        let queues = self.queues();
        queues.close.clone().filter(|_| queues.is_empty())
    }

    /// Takes nothing more. The first close frame counts.
    fn close(&self, close: Option<CloseFrame>) {
        let mut queues = self.queues();
        queues.close.get_or_insert(close);
        self.control_room.close();
        self.body_room.close();
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
        if message.is_body_part() || message.length() > MAX_CONTROL_MESSAGE_BYTES {
            self.body(message).await
        } else {
            self.control(message).await
        }
    }

    /// Queues a control message, and waits for room if need be.
    ///
    /// # Errors
    /// [`SendError::Closed`].
    pub async fn control(&self, message: impl Into<Encoded>) -> Result<Receipt, SendError> {
        let room = self.0.lanes.control_room.acquire().await;
        room.map_err(|_| SendError::Closed)?.forget();
        self.queue(message.into(), Lane::Control)
    }

    /// Queues a control message if there is room.
    ///
    /// # Errors
    /// If there is none, or the connection has ended.
    pub fn try_control(&self, message: impl Into<Encoded>) -> Result<Receipt, SendError> {
        match self.0.lanes.control_room.try_acquire() {
            Ok(room) => room.forget(),
            Err(tokio::sync::TryAcquireError::NoPermits) => return Err(SendError::Full),
            Err(tokio::sync::TryAcquireError::Closed) => return Err(SendError::Closed),
        }
        self.queue(message.into(), Lane::Control)
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

/// How far writing has come.
#[derive(Debug)]
struct Writing<W> {
    /// Gone once the writer has ended.
    sink: Option<W>,
    /// Of the writer's task, which goes on when the socket takes more.
    waker: Waker,
    /// Frames of the message whose turn it is, and one that found no room in the sink before them.
    frames: VecDeque<Message>,
    /// To be told when the last of `frames` is taken.
    taken: Option<oneshot::Sender<()>>,
    /// A ping frame goes next.
    is_ping_due: bool,
    /// Of what the sink holds and the socket has not taken yet.
    unflushed: Unflushed,
    /// A frame was refused: the sink has to be flushed first.
    must_flush: bool,
    /// The last write took several messages along, or came soon after the one before it.
    are_writes_frequent: bool,
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
    Last,
}

/// What the sink holds.
#[derive(Debug, Default)]
struct Unflushed {
    bytes: usize,
    messages: usize,
    ping_frames: u64,
    /// Of messages whose last byte is in the sink.
    taken: Vec<oneshot::Sender<()>>,
}

impl<W> Writing<W> {
    fn new(sink: Option<W>) -> Self {
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
    fn ask_for_turn(&mut self) {
        if self.turn == Turn::NotAsked {
            self.turn = Turn::Asked;
            self.waker.wake_by_ref();
        }
    }

    /// Whether the writer's task is to let others go first.
    fn waits_for_others(&mut self) -> bool {
        let waits = self.turn == Turn::Asked;
        self.turn = if waits { Turn::Last } else { Turn::NotAsked };
        waits
    }

    /// Writes for a sender. Returns whether the socket has taken all that was queued.
    fn write_at_once(&mut self, lanes: &Lanes) -> bool {
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
    fn poll_write(
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
                self.unflushed.messages += usize::from(!is_ping);
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
        let messages = mem::take(&mut self.unflushed.messages);
        self.are_writes_frequent = messages > 1 || since_last < FREQUENT_WRITES;
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

/// Writes messages in frames of at most [`crate::limits::MAX_FRAME_BYTES`] to `W`, the sink of a WebSocket connection that was
/// made with [`frames::client_config`] or [`frames::server_config`].
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
            if writing.waits_for_others() {
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

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use futures_util::{StreamExt, stream::SplitStream};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        task::JoinSet,
        time::{advance, timeout},
    };
    use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Role};

    use super::*;
    use crate::{
        id::RequestId,
        limits::MAX_FRAME_BYTES,
        message::{self, Body, BodyPart, CarriesBody, Format, FromAgent, ToAgent},
    };

    type Socket = WebSocketStream<DuplexStream>;

    /// A writer that runs, the reading half beside it, and the raw other end.
    struct Writing {
        sender: MessageSender,
        reading: SplitStream<Socket>,
        peer: DuplexStream,
        task: JoinSet<Result<(), tungstenite::Error>>,
    }

    async fn writing(socket_bytes: usize, ping_interval: Option<Duration>) -> Writing {
        let (ours, peer) = duplex(socket_bytes);
        let config = frames::server_config(MAX_FRAME_BYTES, MAX_FRAME_BYTES);
        let socket = Socket::from_raw_socket(ours, Role::Server, Some(config)).await;
        let (sink, reading) = socket.split();
        let (sender, writer) = MessageWriter::new(sink, ping_interval);
        let mut task = JoinSet::new();
        task.spawn(async move { writer.run().await.map(drop) });
        Writing {
            sender,
            reading,
            peer,
            task,
        }
    }

    async fn client(peer: DuplexStream) -> Socket {
        Socket::from_raw_socket(peer, Role::Client, Some(frames::client_config())).await
    }

    async fn next_text(client: &mut Socket) -> String {
        loop {
            match client.next().await.expect("open").expect("no error") {
                Message::Text(text) => return text.as_str().to_owned(),
                Message::Ping(_) | Message::Pong(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn long(name: &str) -> String {
        name.repeat(2 * MAX_FRAME_BYTES)
    }

    /// Lets everything run that can.
    async fn settle() {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    /// A socket that takes everything, and notes how many messages each write has.
    #[derive(Default)]
    struct Noting {
        messages: usize,
        writes: Arc<Mutex<Vec<usize>>>,
    }

    impl Sink<Message> for Noting {
        type Error = tungstenite::Error;

        fn poll_ready(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Result<(), tungstenite::Error>> {
            Poll::Ready(Ok(()))
        }

        fn start_send(mut self: Pin<&mut Self>, _: Message) -> Result<(), tungstenite::Error> {
            self.messages += 1;
            Ok(())
        }

        fn poll_flush(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Result<(), tungstenite::Error>> {
            let messages = mem::take(&mut self.messages);
            self.writes.lock().expect("no panic").push(messages);
            Poll::Ready(Ok(()))
        }

        fn poll_close(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Result<(), tungstenite::Error>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn messages_that_follow_closely_leave_in_one_write_and_lone_ones_at_once() {
        let socket = Noting::default();
        let writes = socket.writes.clone();
        let (sender, writer) = MessageWriter::new(socket, None);
        let mut task = JoinSet::new();
        task.spawn(async move { writer.run().await.map(drop) });
        settle().await;
        let send = || sender.try_control("short".to_owned()).expect("room");
        for _ in 0..2 {
            advance(FREQUENT_WRITES).await;
            assert!(send().is_taken(), "nothing else is to be expected");
        }
        assert!(send().is_taken(), "it is the first that follows closely");
        let mut followers: Vec<_> = (0..10).map(|_| send()).collect();
        assert!(!followers.iter_mut().any(Receipt::is_taken));
        settle().await;
        assert!(followers.iter_mut().all(Receipt::is_taken));
        assert_eq!(*writes.lock().expect("no panic"), [1, 1, 1, 10]);
        // The first of those that are rare again is still waited with.
        advance(FREQUENT_WRITES).await;
        let mut waits = send();
        assert!(!waits.is_taken());
        settle().await;
        assert!(waits.is_taken());
        advance(FREQUENT_WRITES).await;
        assert!(send().is_taken());
    }

    #[tokio::test]
    async fn control_messages_overtake_bodies() {
        let Writing {
            sender,
            peer,
            reading: _reading,
            task: _task,
        } = writing(1024, None).await;
        sender.body(long("a")).await.expect("open");
        settle().await;
        sender.body(long("b")).await.expect("open");
        sender.control("window".to_owned()).await.expect("open");
        let mut client = client(peer).await;
        assert_eq!(next_text(&mut client).await, long("a"));
        assert_eq!(next_text(&mut client).await, "window");
        assert_eq!(next_text(&mut client).await, long("b"));
    }

    #[tokio::test]
    async fn parts_of_bodies_and_long_messages_take_turns_and_short_messages_go_first() {
        let request_id = RequestId::generate();
        let part = BodyPart {
            request_id: request_id.clone(),
            part: 1,
            body: Body("x".into()),
            encoding: None,
            more: true,
            reply_to: None,
        };
        for (waits, overtakes) in [
            (
                message::encode(&ToAgent::BodyPart(part.clone())).into(),
                message::encode(&ToAgent::Cancel { request_id }),
            ),
            (
                message::encode(&FromAgent::BodyPart(part.clone())).into(),
                message::encode(&FromAgent::Ping { id: None }),
            ),
            (
                FromAgent::BodyPart(part).encode_as(Format::Binary),
                message::encode(&FromAgent::Ping { id: None }),
            ),
            (
                Encoded::Text("x".repeat(MAX_CONTROL_MESSAGE_BYTES + 1)),
                "x".repeat(MAX_CONTROL_MESSAGE_BYTES),
            ),
        ] {
            let Writing {
                sender,
                peer,
                reading: _reading,
                task: _task,
            } = writing(1024, None).await;
            sender.body(long("a")).await.expect("open");
            settle().await;
            sender.send(waits.clone()).await.expect("open");
            sender.send(overtakes.clone()).await.expect("open");
            let mut client = client(peer).await;
            assert_eq!(next_text(&mut client).await, long("a"));
            assert_eq!(next_text(&mut client).await, overtakes);
            let last = client.next().await.expect("open").expect("no error");
            let last = match last {
                Message::Text(text) => Encoded::Text(text.as_str().to_owned()),
                last => Encoded::Binary(last.into_data()),
            };
            assert_eq!(last, waits);
        }
    }

    #[tokio::test]
    async fn no_number_of_control_messages_stops_a_body() {
        let Writing {
            sender,
            peer,
            reading: _reading,
            task: _task,
        } = writing(1024, None).await;
        sender.body(long("a")).await.expect("open");
        settle().await;
        sender.send(long("b")).await.expect("open");
        for _ in 0..MAX_QUEUED_CONTROL_MESSAGES {
            sender.send("short".to_owned()).await.expect("open");
        }
        let mut client = client(peer).await;
        assert_eq!(next_text(&mut client).await, long("a"));
        for _ in 0..MAX_CONTROL_BURST {
            assert_eq!(next_text(&mut client).await, "short");
        }
        assert_eq!(next_text(&mut client).await, long("b"));
        assert_eq!(next_text(&mut client).await, "short");
    }

    #[tokio::test]
    async fn two_bodies_are_held_and_the_others_take_turns() {
        let Writing {
            sender,
            peer,
            reading: _reading,
            task: _task,
        } = writing(1024, None).await;
        sender.body(long("a")).await.expect("open");
        settle().await;
        sender.body(long("a")).await.expect("open");
        let mut waiting = JoinSet::new();
        for name in ["a", "b", "c"] {
            let sender = sender.clone();
            waiting.spawn(async move {
                for _ in 0..2 {
                    sender.body(long(name)).await.expect("open");
                }
            });
            settle().await;
        }
        assert!(
            sender.0.lanes.body_room.try_acquire().is_err(),
            "there was room"
        );
        let mut client = client(peer).await;
        let mut order = String::new();
        for _ in 0..8 {
            order.push_str(&next_text(&mut client).await[..1]);
        }
        assert_eq!(order, "aaabcabc");
    }

    #[tokio::test]
    async fn a_receipt_comes_when_the_socket_has_taken_the_last_byte() {
        let Writing {
            sender,
            mut peer,
            reading: _reading,
            task: _task,
        } = writing(1024, None).await;
        let mut receipt = sender.body("x".repeat(3000)).await.expect("open");
        let mut heard = vec![0; 2000];
        peer.read_exact(&mut heard[..1900]).await.expect("open");
        settle().await;
        assert!(!receipt.is_taken(), "80 bytes do not fit");
        peer.read_exact(&mut heard[..100]).await.expect("open");
        receipt.taken().await.expect("taken");
    }

    #[tokio::test]
    async fn whoever_sends_writes_what_the_socket_takes() {
        let (ours, peer) = duplex(1024);
        let config = frames::server_config(MAX_FRAME_BYTES, MAX_FRAME_BYTES);
        let socket = Socket::from_raw_socket(ours, Role::Server, Some(config)).await;
        let (sender, _does_not_run) = MessageWriter::new(socket, None);
        let mut receipt = sender.control("short".to_owned()).await.expect("open");
        assert!(receipt.is_taken());
        assert_eq!(next_text(&mut client(peer).await).await, "short");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn of_many_senders_at_once_each_has_its_message_taken() {
        const SENDERS: usize = 16;
        const MESSAGES: usize = 500;
        let Writing {
            sender,
            peer,
            reading: _reading,
            task: _task,
        } = writing(1024, None).await;
        let mut sending = JoinSet::new();
        for number in 0..SENDERS {
            let sender = sender.clone();
            sending.spawn(async move {
                for _ in 0..MESSAGES {
                    let text = "x".repeat(1 + number * 100);
                    let receipt = match number % 2 {
                        0 => sender.control(text).await,
                        _ => sender.body(text).await,
                    };
                    receipt.expect("open").taken().await.expect("taken");
                }
            });
        }
        let mut client = client(peer).await;
        for _ in 0..SENDERS * MESSAGES {
            next_text(&mut client).await;
        }
        sending.join_all().await;
    }

    #[tokio::test]
    async fn a_message_that_was_not_taken_has_no_receipt() {
        let Writing {
            sender,
            reading,
            peer,
            task,
        } = writing(1024, None).await;
        let receipt = sender.body(long("a")).await.expect("open");
        drop((peer, reading, task));
        assert_eq!(receipt.taken().await, Err(SendError::Closed));
        assert_eq!(
            sender.control(String::new()).await.map(drop),
            Err(SendError::Closed)
        );
        sender.closed().await;
    }

    #[tokio::test]
    async fn closing_sends_what_is_queued_and_accepts_nothing_more() {
        let Writing {
            sender,
            peer,
            reading: _reading,
            task: _task,
        } = writing(1024, None).await;
        sender.body(long("a")).await.expect("open");
        settle().await;
        sender.body(long("b")).await.expect("open");
        sender.control("cancel".to_owned()).await.expect("open");
        sender.close(1001, "going away");
        sender.close(1000, "too late");
        settle().await;
        let mut client = client(peer).await;
        assert_eq!(next_text(&mut client).await, long("a"));
        assert_eq!(next_text(&mut client).await, "cancel");
        assert_eq!(next_text(&mut client).await, long("b"));
        let close = client.next().await.expect("open").expect("no error");
        let expected = CloseFrame {
            code: CloseCode::Away,
            reason: "going away".into(),
        };
        assert_eq!(close, Message::Close(Some(expected)));
        let refused = sender.body(String::new()).await.map(drop);
        assert_eq!(refused, Err(SendError::Closed));
    }

    #[tokio::test]
    async fn the_connection_is_closed_when_all_senders_are_gone() {
        let Writing {
            sender,
            peer,
            reading: _reading,
            mut task,
        } = writing(1024 * 1024, None).await;
        sender.control("last".to_owned()).await.expect("open");
        drop(sender);
        let mut client = client(peer).await;
        assert_eq!(next_text(&mut client).await, "last");
        assert_eq!(
            client.next().await.expect("open").expect("no error"),
            Message::Close(None)
        );
        let ended = task.join_next().await.expect("one").expect("no panic");
        ended.expect("as asked");
    }

    #[tokio::test(start_paused = true)]
    async fn ping_frames_go_out_at_their_interval_and_only_blocked_writes_are_progress() {
        let period = Duration::from_secs(5);
        let Writing {
            sender,
            peer,
            reading: _reading,
            task: _task,
        } = writing(1024, Some(period)).await;
        let mut client = client(peer).await;
        for sent in 0..3 {
            assert_eq!(sender.progress().ping_frames, sent);
            let ping = timeout(2 * period, client.next()).await.expect("in time");
            let ping = ping.expect("open").expect("no error");
            assert_eq!(ping, Message::Ping(Bytes::new()));
            settle().await;
            assert_eq!(sender.last_ping_frame(), Instant::now());
        }
        assert_eq!(sender.progress().unblocked_writes, 0);
        assert!(!sender.progress().is_blocked);
        sender.body(long("a")).await.expect("open");
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(sender.progress().is_blocked);
        next_text(&mut client).await;
        settle().await;
        assert_eq!(sender.progress().unblocked_writes, 1);
        assert!(!sender.progress().is_blocked);
    }

    #[tokio::test]
    async fn a_flood_of_pings_is_answered_from_a_bounded_buffer_and_messages_still_pass() {
        const PINGS: u32 = 100_000;
        let Writing {
            sender,
            mut reading,
            peer,
            mut task,
        } = writing(8 * 1024, None).await;
        task.spawn(async move {
            while reading.next().await.is_some() {}
            Ok(())
        });
        let (mut answers, mut peer) = tokio::io::split(peer);
        sender.body(long("a")).await.expect("open");
        let mut pings = Vec::new();
        for number in 0..PINGS {
            // Final, ping, masked with zeros, 125 bytes.
            pings.extend([0x89, 0x80 | 125, 0, 0, 0, 0]);
            pings.extend([0; 121]);
            pings.extend(number.to_be_bytes());
        }
        // All of it is read though no answer is.
        peer.write_all(&pings).await.expect("read");
        settle().await;
        let mut answered = Vec::new();
        let mut chunk = [0; 64 * 1024];
        let last = (PINGS - 1).to_be_bytes();
        let is_text = |byte: &&u8| **byte == b'a';
        while answered.iter().filter(is_text).count() < long("a").len()
            || !answered.windows(last.len()).any(|window| window == last)
        {
            let read = answers.read(&mut chunk).await.expect("open");
            answered.extend_from_slice(&chunk[..read]);
        }
        let bound = 8 * 1024 + long("a").len() + 4 * MAX_FRAME_BYTES;
        assert!(answered.len() < bound, "{} bytes", answered.len());
    }
}
