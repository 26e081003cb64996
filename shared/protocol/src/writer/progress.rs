//! What a writer has done so far.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

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
pub(super) struct ProgressCounters {
    pub(super) unblocked_writes: AtomicU64,
    pub(super) ping_frames: AtomicU64,
    pub(super) is_blocked: AtomicBool,
    /// When the socket took the last of them, in microseconds after `opened`.
    pub(super) last_ping_frame: AtomicU64,
    pub(super) opened: Instant,
    /// When the socket last took a frame, in microseconds after `opened`.
    pub(super) last_written: AtomicU64,
}

impl ProgressCounters {
    pub(super) fn new() -> Self {
        Self {
            unblocked_writes: AtomicU64::new(0),
            ping_frames: AtomicU64::new(0),
            is_blocked: AtomicBool::new(false),
            last_ping_frame: AtomicU64::new(0),
            opened: Instant::now(),
            last_written: AtomicU64::new(0),
        }
    }

    /// Since the writer was made.
    fn elapsed_microseconds(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Notes a write, and returns how long ago the last one was.
    pub(super) fn write_now(&self) -> Duration {
        let microseconds = self.elapsed_microseconds();
        let last = self.last_written.swap(microseconds, Ordering::Relaxed);
        Duration::from_micros(microseconds.saturating_sub(last))
    }

    pub(super) fn pinged(&self, ping_frames: u64) {
        let microseconds = self.elapsed_microseconds();
        self.last_ping_frame.store(microseconds, Ordering::Relaxed);
        // After the time, so that whoever sees this ping frame counted sees its time.
        self.ping_frames.fetch_add(ping_frames, Ordering::Release);
    }
}
