//! The body of a request on its way from the connection to the local service.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use tunnel_protocol::body::{
    BodyReceiver, Part, ReceiveBodyError, ReceivedChunk, budget::BodyBudget,
};

use crate::{inspector::Recording, lock::lock, origin::OriginBody, outgoing::Outgoing};

/// How long an upload may stand still after its response has ended: no visitor waits for it then.
const UPLOAD_STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// A body between the connection, which feeds it, and the exchange, which reads it.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is more to be read, or nothing will be fed any more.
    changed: Notify,
    /// Nobody reads it any more.
    released: Notify,
}

#[derive(Debug)]
struct State {
    /// What has arrived; `None` once nobody reads it any more.
    receiver: Option<BodyReceiver>,
    /// Nothing will be fed any more.
    is_cut: bool,
    /// When the local service last read something.
    last_read: Instant,
    /// It has read all.
    is_over: bool,
}

impl Shared {
    /// Held between awaits only.
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// Where the parts of a body go in as they arrive. Dropped before the last one, the body has broken off.
#[derive(Debug)]
pub(crate) struct UploadFeed(Arc<Shared>);

/// Where a body comes out. Dropped, the rest of the body is of no interest.
#[derive(Debug)]
pub(crate) struct UploadBody(Arc<Shared>);

/// A body that holds what `budget` allows.
pub(crate) fn upload(budget: &BodyBudget) -> (UploadFeed, UploadBody) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            receiver: Some(BodyReceiver::new(budget)),
            is_cut: false,
            last_read: Instant::now(),
            is_over: false,
        }),
        changed: Notify::new(),
        released: Notify::new(),
    });
    (UploadFeed(shared.clone()), UploadBody(shared))
}

impl UploadFeed {
    /// Takes a part. The chunk that came with the request is part 0.
    ///
    /// # Errors
    /// If it cannot be held. The body cannot be completed then.
    pub(crate) fn take(&self, part: Part) -> Result<(), ReceiveBodyError> {
        // A local service may answer without reading all; that is its right.
        if let Some(receiver) = &mut self.0.state().receiver {
            receiver.insert(part.number, part.chunk)?;
        }
        self.0.changed.notify_one();
        Ok(())
    }
}

impl Drop for UploadFeed {
    fn drop(&mut self) {
        self.0.state().is_cut = true;
        self.0.changed.notify_one();
    }
}

impl UploadBody {
    /// What comes next, if it is there.
    fn try_next(&self) -> io::Result<Option<ReceivedChunk>> {
        let mut state = self.0.state();
        let next = match &mut state.receiver {
            Some(receiver) => receiver.next_chunk().map_err(io::Error::other)?,
            None => None,
        };
        if next.is_none() && state.is_cut {
            // Only an error says that the rest will not come: the local service would take an end for the body's end.
            return Err(broken_off());
        }
        Ok(next)
    }

    async fn next(&self) -> io::Result<ReceivedChunk> {
        loop {
            if let Some(chunk) = self.try_next()? {
                return Ok(chunk);
            }
            self.0.changed.notified().await;
        }
    }
}

impl Drop for UploadBody {
    fn drop(&mut self) {
        self.0.state().receiver = None;
        self.0.released.notify_one();
    }
}

fn broken_off() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the upload broke off")
}

/// The body of a request as the local service reads it.
pub(crate) struct UploadStream {
    body: UploadBody,
    /// Allows more parts, where the service waits for that.
    grants: Option<Outgoing>,
}

/// Tells how far the local service has come with an upload.
#[derive(Clone)]
pub(crate) struct UploadProgress(Arc<Shared>);

impl UploadStream {
    /// Reads `body`.
    pub(crate) fn new(body: UploadBody, grants: Option<Outgoing>) -> (Self, UploadProgress) {
        let progress = UploadProgress(body.0.clone());
        (Self { body, grants }, progress)
    }

    fn is_over(&self) -> bool {
        self.body.0.state().is_over
    }

    fn advance(&self, is_over: bool) {
        let mut state = self.body.0.state();
        state.last_read = Instant::now();
        state.is_over = is_over;
    }

    /// The chunk that came with the request.
    ///
    /// # Errors
    /// If it cannot be decompressed.
    pub(crate) fn first(&mut self) -> io::Result<ReceivedChunk> {
        let first = self.body.try_next()?.ok_or_else(broken_off)?;
        self.advance(!first.more);
        Ok(first)
    }

    /// The body as the local service gets it, after its first bytes; `recording` learns of both.
    pub(crate) fn into_body(self, first: Bytes, recording: Recording) -> OriginBody {
        recording.request_bytes(&first);
        let first = stream::iter([Ok(first)]);
        let rest = stream::unfold(Some(self), move |upload| {
            let recording = recording.clone();
            async move {
                let mut upload = upload?;
                let bytes = upload.next().await?;
                if let Ok(bytes) = &bytes {
                    recording.request_bytes(bytes);
                }
                if upload.is_over() {
                    recording.request_sent();
                }
                // After an error nothing comes.
                let upload = bytes.is_ok().then_some(upload);
                Some((bytes, upload))
            }
        });
        let frames = first.chain(rest).map(|bytes| bytes.map(Frame::data));
        OriginBody::Streamed(StreamBody::new(frames).boxed_unsync())
    }

    /// The next bytes; `None` after the last. Each part that the local service takes lets the sender send more.
    pub(crate) async fn next(&mut self) -> Option<io::Result<Bytes>> {
        if self.is_over() {
            return None;
        }
        self.advance(false);
        let chunk = match self.body.next().await {
            Ok(chunk) => chunk,
            Err(error) => return Some(Err(error)),
        };
        self.advance(!chunk.more);
        if let (Some(outgoing), Some(allowed)) = (&self.grants, chunk.window) {
            outgoing.window(allowed).await;
        }
        Some(Ok(chunk.bytes))
    }
}

impl UploadProgress {
    /// When the local service last read something.
    pub(crate) fn last(&self) -> Instant {
        self.0.state().last_read
    }

    /// Completes when nothing has been taken of the upload for this long.
    pub(crate) async fn silent_for(&self, time: Duration) {
        loop {
            let last = self.last();
            sleep_until(last + time).await;
            if self.last() == last {
                return;
            }
        }
    }

    /// Waits for the end of an upload whose response is there already: the local service still gets all that it takes. Returns
    /// whether it took all.
    pub(crate) async fn ended(self) -> bool {
        let taken = async {
            while self.0.state().receiver.is_some() {
                self.0.released.notified().await;
            }
        };
        tokio::select! {
            () = taken => {}
            () = self.silent_for(UPLOAD_STALL_TIMEOUT) => {}
        }
        self.0.state().is_over
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::time::{advance, timeout};
    use tunnel_protocol::body::Chunk;

    use super::*;

    fn part(number: u32, bytes: usize, more: bool) -> Part {
        let chunk = Chunk {
            more,
            ..Chunk::last(vec![0; bytes].into())
        };
        Part { number, chunk }
    }

    fn idle() -> (UploadFeed, UploadStream, UploadProgress) {
        let (feed, body) = upload(&BodyBudget::default());
        let (stream, progress) = UploadStream::new(body, None);
        (feed, stream, progress)
    }

    #[test]
    fn parts_come_out_in_order_and_count_until_they_are_taken() {
        let budget = BodyBudget::new(1000);
        let (feed, body) = upload(&budget);
        feed.take(part(1, 10, false)).expect("room");
        feed.take(part(1, 10, false)).expect("seen");
        assert_eq!(budget.held_bytes(), 10);
        feed.take(part(0, 20, true)).expect("room");
        assert_eq!(budget.held_bytes(), 30);
        let (mut stream, _) = UploadStream::new(body, None);
        assert_eq!(stream.first().expect("in order").bytes.len(), 20);
        assert_eq!(budget.held_bytes(), 10);
        drop(stream);
        assert_eq!(budget.held_bytes(), 0);
        feed.take(part(2, 10, true)).expect("of no interest");
        assert_eq!(budget.held_bytes(), 0);
    }

    #[test]
    fn a_body_that_is_cut_never_looks_complete() {
        let (feed, mut stream, _progress) = idle();
        feed.take(part(0, 1, true)).expect("room");
        feed.take(part(1, 2, true)).expect("room");
        drop(feed);
        assert_eq!(stream.first().expect("it came").bytes.len(), 1);
        let mut next = || stream.next().now_or_never().expect("no wait");
        assert_eq!(next().expect("more").expect("it came").len(), 2);
        let error = next().expect("no end").expect_err("no part");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);

        let (feed, mut stream, _progress) = idle();
        feed.take(part(0, 1, true)).expect("room");
        feed.take(part(1, 0, false)).expect("room");
        drop(feed);
        stream.first().expect("it came");
        let mut next = || stream.next().now_or_never().expect("no wait");
        assert_eq!(next().expect("a part").expect("it came").len(), 0);
        assert!(next().is_none());
    }

    #[test]
    fn parts_that_are_not_read_are_bounded_over_all_bodies() {
        let budget = BodyBudget::new(100_000);
        let uploads: Vec<_> = (0..100).map(|_| upload(&budget)).collect();
        let mut refused = 0;
        for number in 0..32 {
            for (feed, _) in &uploads {
                // The last is early; the others wait for the local service.
                let early = number + u32::from(number == 31);
                refused += usize::from(feed.take(part(early, 1000, true)).is_err());
                assert!(budget.held_bytes() <= 100_000);
            }
        }
        assert!(refused > 0);
    }

    #[tokio::test(start_paused = true)]
    async fn time_counts_from_the_last_progress_of_an_upload() {
        const LIMIT: Duration = Duration::from_secs(10);
        let (_feed, upload, progress) = idle();
        let silent = progress.silent_for(LIMIT);
        tokio::pin!(silent);
        for _ in 0..10 {
            assert!(timeout(LIMIT * 9 / 10, &mut silent).await.is_err());
            upload.advance(false);
        }
        let last = Instant::now();
        silent.await;
        assert_eq!(last.elapsed().as_secs(), LIMIT.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_is_awaited_until_it_ends_or_stalls() {
        let (feed, mut upload, progress) = idle();
        feed.take(part(0, 1, true)).expect("room");
        upload.first().expect("it came");
        let started = Instant::now();
        advance(UPLOAD_STALL_TIMEOUT / 2).await;
        drop(upload);
        assert!(!progress.ended().await, "more was to come");
        assert!(started.elapsed() < UPLOAD_STALL_TIMEOUT);

        let (feed, mut upload, progress) = idle();
        feed.take(part(0, 1, false)).expect("room");
        let started = Instant::now();
        let read = async move { upload.first().expect("it came") };
        let (is_over, _) = tokio::join!(progress.ended(), read);
        assert!(is_over);
        assert_eq!(started.elapsed(), Duration::ZERO);

        let (_feed, _upload, progress) = idle();
        let started = Instant::now();
        assert!(!progress.ended().await);
        assert_eq!(started.elapsed().as_secs(), UPLOAD_STALL_TIMEOUT.as_secs());
    }
}
