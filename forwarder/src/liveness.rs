//! Whether the service at the other end of a connection is still there.
//!
//! Signs of life are anything that arrives, and bytes that a blocked socket accepts in the end. Their absence counts only while this
//! process runs, and only after the service was asked: a process that was stopped for a minute finds its connection as it left it.

use std::time::Duration;

use tokio::time::Instant;
use tunnel_protocol::writer::{Progress, Receipt};

/// How often a connection is looked at. The writer asks with a ping frame as often.
pub(crate) const LIVENESS_TICK: Duration = Duration::from_secs(5);
/// How often a `ping` message asks where ping frames are answered: under API Gateway's 10 minutes without a message.
pub const PING_MESSAGE_INTERVAL: Duration = Duration::from_secs(5 * 60);
/// How often a `ping` message asks where ping frames are not answered. Each is billed, so no more often than it takes to notice a
/// dead connection within half a minute.
pub const SOLE_PING_MESSAGE_INTERVAL: Duration = Duration::from_secs(15);
/// After this many looks without a sign of life, 20 s, a connection is dead if it was asked.
const MAX_SILENT_TICKS: u32 = 4;
/// How many looks an answer may take.
const MAX_UNANSWERED_TICKS: u32 = 2;

/// What is known of the service's being there.
#[derive(Debug)]
pub(crate) struct Liveness {
    heard: Instant,
    /// Looks since the last sign of life.
    silent_ticks: u32,
    /// Looks since the service was asked, and has not given a sign of life.
    unanswered_ticks: u32,
    answers_ping_frames: bool,
    /// Pong frames that have arrived.
    pong_frames: u64,
    /// What the writer had done at the last sign of life.
    seen: Progress,
    ping_message: PingMessage,
}

#[derive(Debug)]
struct PingMessage {
    queued: Instant,
    /// Until the socket has taken it.
    receipt: Option<Receipt>,
    /// Taken since the last sign of life.
    is_unanswered: bool,
    /// No `pong` has arrived since it was queued.
    awaits_pong: bool,
}

impl Liveness {
    /// A connection that was opened just now.
    pub(crate) fn new() -> Self {
        let now = Instant::now();
        Self {
            heard: now,
            silent_ticks: 0,
            unanswered_ticks: 0,
            answers_ping_frames: false,
            pong_frames: 0,
            seen: Progress::default(),
            ping_message: PingMessage {
                queued: now,
                receipt: None,
                is_unanswered: false,
                awaits_pong: false,
            },
        }
    }

    /// Something arrived.
    pub(crate) fn heard(&mut self, progress: Progress) {
        self.heard = Instant::now();
        self.silent_ticks = 0;
        self.unanswered_ticks = 0;
        self.seen = progress;
        self.ping_message.is_unanswered = false;
    }

    /// A pong frame arrived. Returns how long it took, if it answers the last ping frame, which the socket took at `pinged`.
    pub(crate) fn ping_frame_answered(
        &mut self,
        progress: Progress,
        pinged: Instant,
    ) -> Option<Duration> {
        self.answers_ping_frames = true;
        self.pong_frames += 1;
        (self.pong_frames == progress.ping_frames).then(|| pinged.elapsed())
    }

    /// A `pong` message arrived. Returns how long it took, where ping frames do not tell.
    pub(crate) fn ping_message_answered(&mut self) -> Option<Duration> {
        let is_answer = std::mem::take(&mut self.ping_message.awaits_pong);
        (is_answer && !self.answers_ping_frames).then(|| self.ping_message.queued.elapsed())
    }

    /// Whether it is time for a `ping` message.
    pub(crate) fn is_ping_message_due(&self) -> bool {
        let interval = if self.answers_ping_frames {
            PING_MESSAGE_INTERVAL
        } else {
            SOLE_PING_MESSAGE_INTERVAL
        };
        self.ping_message.receipt.is_none() && self.ping_message.queued.elapsed() >= interval
    }

    /// A `ping` message was queued.
    pub(crate) fn ping_message_queued(&mut self, receipt: Receipt) {
        self.ping_message.queued = Instant::now();
        self.ping_message.receipt = Some(receipt);
        self.ping_message.awaits_pong = true;
    }

    /// Looks at the connection, every [`LIVENESS_TICK`]. Returns for how long nothing has arrived, if it is dead.
    pub(crate) fn tick(&mut self, progress: Progress) -> Option<Duration> {
        if progress.unblocked_writes != self.seen.unblocked_writes {
            self.heard(progress);
        }
        self.silent_ticks += 1;
        if self.was_asked(progress) {
            self.unanswered_ticks += 1;
        }
        let is_dead =
            self.silent_ticks >= MAX_SILENT_TICKS && self.unanswered_ticks >= MAX_UNANSWERED_TICKS;
        is_dead.then(|| self.heard.elapsed())
    }

    fn was_asked(&mut self, progress: Progress) -> bool {
        let receipt = &mut self.ping_message.receipt;
        if receipt.as_mut().is_some_and(Receipt::is_taken) {
            *receipt = None;
            self.ping_message.is_unanswered = true;
        }
        let by_ping_frame =
            self.answers_ping_frames && progress.ping_frames != self.seen.ping_frames;
        // Nothing can be asked through a blocked socket, and need not be: what it holds has to be acknowledged.
        progress.is_blocked || by_ping_frame || self.ping_message.is_unanswered
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const NOTHING: Progress = Progress {
        unblocked_writes: 0,
        ping_frames: 0,
        is_blocked: false,
    };

    fn ping_frames(ping_frames: u64) -> Progress {
        Progress {
            ping_frames,
            ..NOTHING
        }
    }

    /// A pong frame arrives.
    fn answer(liveness: &mut Liveness) {
        liveness.ping_frame_answered(NOTHING, Instant::now());
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_trip_is_measured_by_the_answer_to_the_last_ping_frame() {
        const TOOK: Duration = Duration::from_millis(30);
        let mut liveness = Liveness::new();
        let pinged = Instant::now();
        advance(TOOK).await;
        assert_eq!(
            liveness.ping_frame_answered(ping_frames(1), pinged),
            Some(TOOK)
        );
        // Of two that are on their way, the first answer is not the last one's.
        assert_eq!(liveness.ping_frame_answered(ping_frames(3), pinged), None);
        assert_eq!(
            liveness.ping_frame_answered(ping_frames(3), pinged),
            Some(TOOK)
        );
        // Arrived before the writer has counted its ping frame.
        assert_eq!(liveness.ping_frame_answered(ping_frames(3), pinged), None);
    }

    /// Looks `times` times at a connection on which the writer got as far as `progress`.
    async fn is_dead_after(liveness: &mut Liveness, times: u32, progress: Progress) -> bool {
        let mut is_dead = false;
        for _ in 0..times {
            advance(LIVENESS_TICK).await;
            is_dead |= liveness.tick(progress).is_some();
        }
        is_dead
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_answers_no_ping_frame_is_dead_within_20_s() {
        let mut liveness = Liveness::new();
        liveness.heard(NOTHING);
        answer(&mut liveness);
        assert!(!is_dead_after(&mut liveness, 3, ping_frames(1)).await);
        assert!(is_dead_after(&mut liveness, 1, ping_frames(1)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_was_not_pinged_is_never_dead() {
        let mut liveness = Liveness::new();
        assert!(!is_dead_after(&mut liveness, 100, ping_frames(100)).await);
        assert!(liveness.is_ping_message_due());
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_accepted_by_a_blocked_socket_are_a_sign_of_life() {
        let mut liveness = Liveness::new();
        answer(&mut liveness);
        for unblocked_writes in 1..20 {
            let progress = Progress {
                unblocked_writes,
                ping_frames: unblocked_writes,
                is_blocked: true,
            };
            assert!(!is_dead_after(&mut liveness, 3, progress).await);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_takes_no_bytes_is_dead_within_20_s_though_no_ping_frame_finds_room()
    {
        let blocked = Progress {
            is_blocked: true,
            ..ping_frames(1)
        };
        let mut liveness = Liveness::new();
        answer(&mut liveness);
        liveness.heard(ping_frames(1));
        assert!(!is_dead_after(&mut liveness, 3, blocked).await);
        assert!(is_dead_after(&mut liveness, 1, blocked).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_of_the_process_is_not_silence() {
        let mut liveness = Liveness::new();
        answer(&mut liveness);
        assert!(!is_dead_after(&mut liveness, 1, ping_frames(1)).await);
        advance(Duration::from_secs(40)).await;
        assert!(!is_dead_after(&mut liveness, 1, ping_frames(2)).await);
    }
}
