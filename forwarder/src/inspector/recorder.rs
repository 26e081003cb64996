//! What the agent tells the inspector of an exchange while it carries it out. Nothing here waits, and what does not fit is dropped.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;
use tunnel_protocol::message::HttpRequest;

use super::{
    metrics::TunnelMetrics,
    packed_fields::PackedFields,
    recorded::{
        self, ExchangeId, RecordedBody, RecordedExchange, RecordedRequest, RecordedResponse,
        ReplaySource, State, Timings,
    },
    shared::Shared,
    store::{ExchangeStore, Slot},
    websocket::{Conversation, Side},
};

/// Longest time from the service to the agent that is believed: with more, their clocks differ.
const MAX_TRANSIT: Duration = Duration::from_secs(60);
/// What is said where nobody said why an exchange ended early.
const BROKEN_OFF: &str = "the connection to the service broke";

/// Records the exchanges of one tunnel. The default one records nothing.
#[derive(Clone, Default)]
pub struct Recorder(Option<Arc<TunnelRecorder>>);

struct TunnelRecorder {
    tunnel: Arc<str>,
    metrics: Arc<TunnelMetrics>,
    shared: Arc<Shared>,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tunnel = self.0.as_ref().map(|recorder| &recorder.tunnel);
        f.debug_tuple("Recorder").field(&tunnel).finish()
    }
}

impl Recorder {
    pub(crate) fn new(tunnel: &str, shared: Arc<Shared>) -> Self {
        Self(Some(Arc::new(TunnelRecorder {
            tunnel: tunnel.into(),
            metrics: shared.metrics.of(tunnel),
            shared,
        })))
    }

    /// Begins to record a visitor's request.
    pub(crate) fn begin(&self, message: &HttpRequest) -> Recording {
        self.record(message, None)
    }

    /// Begins to record a request that is made from an earlier one.
    pub(crate) fn begin_replay(&self, message: &HttpRequest, source: ReplaySource) -> Recording {
        self.record(message, Some(source))
    }

    fn record(&self, message: &HttpRequest, replay: Option<ReplaySource>) -> Recording {
        let Some(recorder) = &self.0 else {
            return Recording::default();
        };
        recorder.metrics.started();
        let now = SystemTime::now();
        let slot = recorder.shared.store.insert(RecordedExchange {
            id: ExchangeId(0),
            tunnel: recorder.tunnel.clone(),
            started: now,
            request: RecordedRequest {
                method: recorded::method(&message.method),
                uri: message.uri.as_str().into(),
                headers: PackedFields::of(&message.headers),
                body: RecordedBody::default(),
                upgrade: message.upgrade.clone(),
            },
            response: None,
            timings: Timings {
                transit: transit(message.timestamp, now),
                ..Timings::default()
            },
            state: State::Open,
            replay,
            conversation: None,
            is_masked: false,
        });
        Recording(Some(Arc::new(OpenRecording {
            slot,
            recorder: recorder.clone(),
            started: Instant::now(),
        })))
    }
}

fn transit(sent_ms: u64, now: SystemTime) -> Option<Duration> {
    let sent = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(sent_ms))?;
    let transit = now.duration_since(sent).ok()?;
    (transit <= MAX_TRANSIT).then_some(transit)
}

/// An exchange that is being recorded. The default one is not.
///
/// When the last copy is dropped and nobody has said how the exchange ended, it was broken off.
#[derive(Clone, Default)]
pub struct Recording(Option<Arc<OpenRecording>>);

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.0.as_ref().map(|open| open.slot.id());
        f.debug_tuple("Recording").field(&id).finish()
    }
}

struct OpenRecording {
    slot: Arc<Slot>,
    recorder: Arc<TunnelRecorder>,
    started: Instant,
}

impl OpenRecording {
    fn store(&self) -> &ExchangeStore {
        &self.recorder.shared.store
    }

    fn update(&self, change: impl FnOnce(&mut RecordedExchange) -> usize) {
        self.store().update(&self.slot, change);
    }

    fn changed(&self) {
        self.store().changed(&self.slot);
    }

    fn end(&self, state: State) {
        let mut is_end = false;
        let took = self.started.elapsed();
        self.update(|exchange| {
            if exchange.state == State::Open {
                is_end = true;
                exchange.state = state;
                exchange.timings.end = Some(took);
            }
            0
        });
        if is_end {
            let TunnelRecorder {
                tunnel,
                metrics,
                shared,
            } = &*self.recorder;
            metrics.took(took);
            shared.ended(tunnel, &self.slot);
            self.changed();
        }
    }
}

impl Drop for OpenRecording {
    fn drop(&mut self) {
        self.end(State::Cancelled(BROKEN_OFF.to_owned()));
        self.recorder.metrics.closed();
    }
}

impl Recording {
    /// What identifies the exchange, if it is recorded.
    pub(crate) fn id(&self) -> Option<ExchangeId> {
        self.0.as_ref().map(|open| open.slot.id())
    }

    /// Bytes of the request's body, on their way to the local service.
    pub(crate) fn request_bytes(&self, bytes: &[u8]) {
        if let Some(open) = self.0.as_ref().filter(|_| !bytes.is_empty()) {
            let limit = open.store().limits().body_bytes;
            open.update(|exchange| exchange.request.body.push(bytes, limit));
        }
    }

    /// The request was passed on to its end.
    pub(crate) fn request_sent(&self) {
        if let Some(open) = &self.0 {
            let took = open.started.elapsed();
            open.update(|exchange| {
                exchange.timings.sent.get_or_insert(took);
                0
            });
        }
    }

    /// The head of the response, as the visitor gets it.
    pub(crate) fn response_head(&self, status: StatusCode, headers: &HeaderMap) {
        let Some(open) = &self.0 else { return };
        let took = open.started.elapsed();
        let packed = PackedFields::of(headers);
        let bytes = packed.bytes();
        open.update(|exchange| {
            exchange.timings.head = Some(took);
            exchange.response = Some(RecordedResponse {
                status,
                headers: packed,
                body: RecordedBody::default(),
            });
            if status == StatusCode::SWITCHING_PROTOCOLS {
                exchange.conversation = Conversation::begin(headers).map(Box::new);
            }
            bytes
        });
        open.changed();
    }

    /// Bytes of the response's body, on their way to the visitor.
    pub(crate) fn response_bytes(&self, bytes: &[u8]) {
        if let Some(open) = self.0.as_ref().filter(|_| !bytes.is_empty()) {
            let limit = open.store().limits().body_bytes;
            open.update(|exchange| match &mut exchange.response {
                Some(response) => response.body.push(bytes, limit),
                None => 0,
            });
        }
    }

    /// Bytes that one side of an upgraded connection has sent.
    pub(crate) fn upgraded_bytes(&self, side: Side, bytes: &[u8]) {
        let Some(open) = self.0.as_ref().filter(|_| !bytes.is_empty()) else {
            return;
        };
        let at = open.started.elapsed();
        let mut has_message = false;
        open.update(|exchange| {
            match side {
                Side::Visitor => exchange.request.body.bytes += bytes.len() as u64,
                Side::LocalService => {
                    if let Some(response) = &mut exchange.response {
                        response.body.bytes += bytes.len() as u64;
                    }
                }
            }
            let Some(conversation) = &mut exchange.conversation else {
                return 0;
            };
            let (grown, ended_messages) = conversation.take(side, at, bytes);
            has_message = ended_messages;
            grown
        });
        if has_message {
            open.changed();
        }
    }

    /// A body that is recorded while it is read.
    pub(crate) fn tap<B>(&self, body: B) -> RecordedStream<B> {
        RecordedStream {
            body,
            recording: self.clone(),
        }
    }

    /// The exchange has ended: with a status if the local service's response was delivered, or for this reason.
    pub(crate) fn finish(&self, outcome: &Result<StatusCode, String>) {
        match outcome {
            Ok(_) => self.end(State::Complete),
            Err(reason) => self.end(State::Failed(reason.clone())),
        }
    }

    /// The request is not passed on.
    pub(crate) fn refuse(&self, reason: &str) {
        self.end(State::Refused(reason.to_owned()));
    }

    /// The exchange is ended early.
    pub(crate) fn cancel(&self, reason: &str) {
        self.end(State::Cancelled(reason.to_owned()));
    }

    fn end(&self, state: State) {
        if let Some(open) = &self.0 {
            open.end(state);
        }
    }
}

/// The body of a response, recorded while it is read.
pub(crate) struct RecordedStream<B> {
    body: B,
    recording: Recording,
}

impl<B: Body<Data = Bytes> + Unpin> Body for RecordedStream<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            self.recording.response_bytes(data);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use tunnel_protocol::id::RequestId;

    use super::*;
    use crate::inspector::{metrics::Metrics, store::StoreLimits};

    fn recorder(bytes: usize) -> (Recorder, Arc<Shared>) {
        let shared = Arc::new(Shared {
            process: ExchangeId(0),
            store: ExchangeStore::new(StoreLimits::with_bytes(bytes)),
            metrics: Metrics::default(),
            tunnels: Vec::new(),
            history: None,
        });
        (Recorder::new("web", shared.clone()), shared)
    }

    fn message() -> HttpRequest {
        let request_id = RequestId::generate();
        let message = serde_json::json!({
            "request_id": request_id.to_string(),
            "method": "GET",
            "uri": "/",
            "headers": { "x-forwarded-for": ["192.0.2.7, 198.51.100.1"] },
        });
        serde_json::from_value(message).expect("a request")
    }

    /// What the exchanges hold, counted anew.
    fn held_bytes(shared: &Shared) -> usize {
        let slots = shared.store.newest_first();
        let bodies = slots.iter().map(|slot| {
            slot.read(|exchange| {
                let response = exchange.response.as_ref();
                exchange.request.body.kept_bytes()
                    + response.map_or(0, |response| response.body.kept_bytes())
            })
        });
        bodies.sum()
    }

    #[test]
    fn memory_stays_within_its_bound_over_many_exchanges_and_long_bodies() {
        const BYTES: usize = 8 << 20;
        let (recorder, shared) = recorder(BYTES);
        let body = vec![7; 64 * 1024];
        let mut open = Vec::new();
        for number in 0..100_000 {
            let recording = recorder.begin(&message());
            recording.response_head(StatusCode::OK, &HeaderMap::new());
            if number % 100 == 0 {
                for _ in 0..40 {
                    recording.request_bytes(&body);
                    recording.response_bytes(&body);
                }
            }
            if number % 1000 == 0 {
                open.push(recording.clone());
            } else {
                recording.finish(&Ok(StatusCode::OK));
            }
            assert!(shared.store.held_bytes() <= BYTES, "after {number}");
        }
        assert!(held_bytes(&shared) <= BYTES);
        // Those that the ring has dropped keep nothing, whatever still comes.
        for recording in &open {
            for _ in 0..1000 {
                recording.response_bytes(&body);
            }
        }
        assert!(held_bytes(&shared) <= BYTES && shared.store.held_bytes() <= BYTES);
        drop(open);
        shared.store.clear();
        assert_eq!(shared.store.held_bytes(), 0);
    }

    #[test]
    fn an_exchange_that_nobody_ends_was_broken_off() {
        let (recorder, shared) = recorder(1 << 20);
        drop(recorder.begin(&message()));
        let recording = recorder.begin(&message());
        recording.cancel("the visitor left");
        recording.finish(&Ok(StatusCode::OK));
        drop(recording);
        let states: Vec<_> = shared
            .store
            .newest_first()
            .iter()
            .map(|slot| slot.read(|exchange| exchange.state.clone()))
            .collect();
        assert_eq!(
            states,
            [
                State::Cancelled("the visitor left".to_owned()),
                State::Cancelled(BROKEN_OFF.to_owned())
            ]
        );
        let (rates, open) = shared.metrics.of("web").now();
        assert_eq!((rates.count, open), (2, 0));
    }

    #[test]
    fn the_visitor_is_the_one_that_the_service_saw() {
        let (recorder, shared) = recorder(1 << 20);
        let _recording = recorder.begin(&message());
        let visitor = shared.store.newest_first()[0].read(RecordedExchange::visitor);
        assert_eq!(visitor.as_deref(), Some("198.51.100.1"));
    }
}
