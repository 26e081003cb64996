//! One connection to the service, from its first request to its end.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::Either, stream::SplitStream};
use http::Method;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::{AbortHandle, JoinSet},
    time::{Instant, Interval, MissedTickBehavior, interval_at, sleep_until, timeout_at},
};
use tokio_tungstenite::tungstenite::{self, Message, error::ProtocolError};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, info_span, warn};
use tunnel_protocol::{
    body::{Part, budget::BodyBudget, window::WindowUpdates},
    headers::FORWARDED_FOR,
    id::{ConnectionId, RequestId},
    message,
    message::{
        AgentError, AgentErrorCode, BodyPart, DecodeError, Feature, FromAgent, HttpRequest,
        Subject, ToAgent,
    },
    writer::{MessageWriter, Receipt},
};

pub use crate::liveness::{PING_MESSAGE_INTERVAL, SOLE_PING_MESSAGE_INTERVAL};
use crate::{
    Observer,
    event::Event,
    exchange::{self, Context, Ended},
    handshake::{Opened, Socket},
    inspector::{Recorder, Recording},
    liveness::{LIVENESS_TICK, Liveness},
    open_socket::SocketObserver,
    origin::Origin,
    seen_requests::SeenRequests,
    settings::Settings,
    upload::{UploadFeed, upload},
    websocket::{self, FromVisitor, MAX_QUEUED_MESSAGES},
};

/// How long requests are taken after another connection of this agent has taken over: longer than the service remembers which
/// connection serves a tunnel, so that no request is refused here.
const HANDOVER_TIME: Duration = Duration::from_secs(7);
/// How long a connection may take to end once the agent is stopping: requests in progress, messages in transit and the close
/// handshake together.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the service's goodbye may take on a connection that has carried nothing for [`DRAIN_TIMEOUT`].
const IDLE_CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long it may take in any case, also when a request used up all other time.
const MIN_CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
/// Refusals that are not written yet; with more, no messages are read until the service has taken some.
const MAX_UNWRITTEN: usize = 1024;

/// What all connections of a tunnel share.
#[derive(Clone)]
pub struct TunnelContext {
    /// What to do.
    pub settings: Arc<Settings>,
    /// The local service.
    pub origin: Origin,
    /// Learns of every request.
    pub observer: Observer,
    /// One for each request in flight: during a move both connections have some.
    pub permits: Arc<Semaphore>,
    /// What has been carried out.
    pub seen: SeenRequests,
    /// For the parts of bodies that this process holds.
    pub budget: BodyBudget,
    /// Records every request, if the inspector is on.
    pub recorder: Recorder,
}

/// How a session ended.
#[derive(Debug)]
pub enum SessionEnd {
    /// As asked.
    Stopped,
    /// Another connection of the owner has taken the tunnel over.
    Replaced(String),
    /// The connection broke, for this reason.
    Lost(String),
}

/// A request that is being carried out.
#[derive(Debug)]
struct InFlight {
    task: AbortHandle,
    upload: UploadFeed,
    /// How many parts of the response may be sent.
    window: WindowUpdates,
    line: RequestLine,
    reply_to: Option<ConnectionId>,
    recording: Recording,
    /// It asked for another protocol; what is said in that has no end of its own.
    is_upgrade: bool,
    /// What the service says about a visitor's WebSocket.
    websocket: Option<mpsc::Sender<FromVisitor>>,
    _permit: OwnedSemaphorePermit,
}

/// What a user sees of a request.
#[derive(Clone, Debug)]
struct RequestLine {
    method: Method,
    uri: String,
    visitor: Option<String>,
    started: Instant,
}

impl RequestLine {
    fn of(request: &HttpRequest) -> Self {
        Self {
            method: request.method.parse().unwrap_or_default(),
            uri: request.uri.clone(),
            // The service's front alone sets this field.
            visitor: request
                .headers
                .get(FORWARDED_FOR)
                .and_then(|address| address.to_str().ok().map(str::to_owned)),
            started: Instant::now(),
        }
    }

    fn ended(self, ended: Ended) -> Event {
        Event::Request {
            method: self.method,
            uri: self.uri,
            outcome: ended.outcome,
            bytes: ended.bytes,
            took: self.started.elapsed(),
            visitor: self.visitor,
        }
    }

    fn failed(self, message: &str) -> Event {
        self.ended(Ended {
            outcome: Err(message.to_owned()),
            bytes: 0,
            unwritten: None,
        })
    }
}

/// Why no more requests are taken.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Departure {
    /// The agent is stopping.
    Stopped,
    /// Another connection of this agent serves the tunnel.
    Moved,
    /// A connection of another agent serves it, as the service says.
    Replaced(String),
}

/// How far a connection is from its end.
#[derive(Debug)]
enum Phase {
    Serving,
    /// Another connection of this agent has taken over. Requests that are on their way here still count.
    HandingOver {
        until: Instant,
    },
    Leaving {
        departure: Departure,
        deadline: Option<Instant>,
    },
}

/// A connection that serves a tunnel.
pub struct Session {
    tunnel: TunnelContext,
    context: Arc<Context>,
    connection: ConnectionId,
    stream: SplitStream<Socket>,
    writer: JoinSet<Result<(), tungstenite::Error>>,
    early: Vec<String>,
    /// The service chooses the ids, and they are few, so a quick hash is enough.
    requests: foldhash::HashMap<RequestId, InFlight>,
    running: JoinSet<(RequestId, Ended)>,
    /// Wait until messages are written: refusals and, while the connection is left, short answers.
    unwritten: JoinSet<()>,
    /// Of the short answer that ended last. Those queued before it are written before it.
    last_answer: Option<Receipt>,
    liveness: Liveness,
    tick: Interval,
    phase: Phase,
    /// When a request was last in flight, or a message about one was last waited for.
    busy: Option<Instant>,
    end_of_life: Option<Instant>,
    /// The service answers a `ping` of a connection that it has replaced with `replaced`.
    confirms_replaced: bool,
    /// The service repeats the id of a `ping`.
    repeats_ping_ids: bool,
    /// A service that does not repeat ids has said `replaced`, and was asked to confirm it.
    awaits_confirmation: bool,
    /// The id of the last `ping`.
    last_ping: u32,
    /// The highest id of those that were answered with `pong`.
    last_pong: u32,
    /// The id of the last that asked whether `replaced` is true.
    last_question: u32,
    /// Cancelled when another agent has taken the tunnel over for good.
    replaced: CancellationToken,
    /// Cancelled when another connection of this agent has taken over.
    moved: CancellationToken,
}

impl Session {
    /// A session over a connection that was opened just now.
    pub fn new(tunnel: TunnelContext, opened: Opened) -> Self {
        let established = opened.established;
        let (sink, stream) = opened.socket.split();
        let (sender, writer) = MessageWriter::new(sink, Some(LIVENESS_TICK));
        let mut writing = JoinSet::new();
        writing.spawn(async move { writer.run().await.map(drop) }.in_current_span());
        let mut tick = interval_at(Instant::now() + LIVENESS_TICK, LIVENESS_TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            context: Arc::new(Context::new(
                &tunnel.settings,
                &tunnel.origin,
                &established.features,
                sender,
                SocketObserver::new(tunnel.observer.clone(), tunnel.settings.clone()),
            )),
            tunnel,
            connection: established.connection_id,
            stream,
            writer: writing,
            early: opened.early,
            requests: foldhash::HashMap::default(),
            running: JoinSet::new(),
            unwritten: JoinSet::new(),
            last_answer: None,
            liveness: Liveness::new(),
            tick,
            phase: Phase::Serving,
            busy: None,
            end_of_life: established
                .life_ms
                .and_then(|life| opened.at.checked_add(Duration::from_millis(life))),
            confirms_replaced: established.features.contains(&Feature::ConfirmReplaced),
            repeats_ping_ids: established.features.contains(&Feature::PingIds),
            awaits_confirmation: false,
            last_ping: 0,
            last_pong: 0,
            last_question: 0,
            replaced: CancellationToken::new(),
            moved: CancellationToken::new(),
        }
    }

    /// Cancelled when another agent has taken over the tunnel for good, before the session has ended.
    pub fn replaced(&self) -> CancellationToken {
        self.replaced.clone()
    }

    /// To be cancelled when another connection of this agent has taken over.
    pub fn moved(&self) -> CancellationToken {
        self.moved.clone()
    }

    /// Serves until the connection ends, or `stop` or [`Session::moved`] are cancelled and all that was promised has been
    /// delivered.
    pub async fn serve(mut self, stop: CancellationToken) -> SessionEnd {
        for text in std::mem::take(&mut self.early) {
            self.receive(&text);
        }
        let end = loop {
            if let Some(end) = self.step(&stop).await {
                break end;
            }
        };
        self.running.shutdown().await;
        self.unwritten.shutdown().await;
        if !matches!(end, SessionEnd::Lost(_)) {
            self.close().await;
        }
        end
    }

    /// Waits for what happens next. Returns the end if that is it.
    async fn step(&mut self, stop: &CancellationToken) -> Option<SessionEnd> {
        let is_serving = matches!(self.phase, Phase::Serving);
        let due = self.due();
        tokio::select! {
            message = self.stream.next(), if self.unwritten.len() < MAX_UNWRITTEN => {
                if let Some(reason) = self.on_message(message) {
                    return Some(self.lost(reason));
                }
            }
            Some(done) = self.running.join_next() => self.finish(done),
            Some(_) = self.unwritten.join_next() => self.busy = Some(Instant::now()),
            Some(ended) = self.writer.join_next() => return Some(self.lost(why_not_written(ended))),
            _ = self.tick.tick() => {
                if let Some(silence) = self.on_tick() {
                    return Some(self.lost(format!("nothing was heard for {} s", silence.as_secs())));
                }
            }
            () = stop.cancelled(), if !self.is_stopping() => {
                self.leave(Departure::Stopped);
                self.observe(Event::Draining { in_flight: self.requests.len() });
            }
            () = self.moved.cancelled(), if is_serving => {
                self.phase = Phase::HandingOver { until: Instant::now() + HANDOVER_TIME };
            }
            () = sleep_until_some(due) => match self.phase {
                Phase::HandingOver { .. } => self.leave(Departure::Moved),
                _ => return Some(self.left()),
            }
        }
        self.wait_for_last_answer();
        self.has_left().then(|| self.left())
    }

    /// When the phase ends on its own.
    fn due(&self) -> Option<Instant> {
        match self.phase {
            Phase::Serving => None,
            Phase::HandingOver { until } => Some(until),
            // The service, too, leaves it open for them.
            Phase::Leaving {
                departure: Departure::Moved,
                ..
            } if self.carries_upgrades() => None,
            Phase::Leaving { deadline, .. } => deadline,
        }
    }

    /// Whether all that was promised has been delivered. Upgraded connections are waited for only where they do not keep the agent
    /// from ending.
    fn has_left(&self) -> bool {
        let Phase::Leaving { departure, .. } = &self.phase else {
            return false;
        };
        let is_waited_for =
            |request: &InFlight| *departure == Departure::Moved || !request.is_upgrade;
        !self.requests.values().any(is_waited_for) && self.unwritten.is_empty()
    }

    /// Once the connection is left, it stays until the last answer is written. Until then, requests that arrive are refused.
    fn wait_for_last_answer(&mut self) {
        if matches!(self.phase, Phase::Leaving { .. })
            && let Some(answer) = self.last_answer.take()
        {
            self.unwritten.spawn(answer.taken().map(drop));
        }
    }

    fn carries_upgrades(&self) -> bool {
        self.requests.values().any(|request| request.is_upgrade)
    }

    fn has_moved(&self) -> bool {
        matches!(
            self.phase,
            Phase::HandingOver { .. }
                | Phase::Leaving {
                    departure: Departure::Moved,
                    ..
                }
        )
    }

    fn is_stopping(&self) -> bool {
        matches!(
            self.phase,
            Phase::Leaving {
                departure: Departure::Stopped,
                ..
            }
        )
    }

    fn leave(&mut self, departure: Departure) {
        // A connection that this agent's own next one took over from has as long as it lives.
        let deadline = match departure {
            Departure::Moved => self.end_of_life,
            Departure::Stopped | Departure::Replaced(_) => {
                let latest = Instant::now() + DRAIN_TIMEOUT;
                match self.phase {
                    // One that is leaving already gets no more time for a second reason.
                    Phase::Leaving {
                        deadline: Some(deadline),
                        ..
                    } => Some(deadline.min(latest)),
                    _ => Some(latest),
                }
            }
        };
        self.phase = Phase::Leaving {
            departure,
            deadline,
        };
    }

    /// Writes what is queued, sends a close frame, and continues to read until the service has closed the connection: one that is
    /// closed with bytes unread is reset, and what is on its way would be lost.
    async fn close(&mut self) {
        self.context.outgoing.close(1000, "");
        let now = Instant::now();
        let is_idle = self
            .busy
            .is_none_or(|busy| now.duration_since(busy) >= DRAIN_TIMEOUT);
        let patience = if is_idle {
            IDLE_CLOSE_TIMEOUT
        } else {
            DRAIN_TIMEOUT
        };
        let latest = now + patience;
        let deadline = self.due().map_or(latest, |due| due.min(latest));
        let deadline = deadline.max(now + MIN_CLOSE_TIMEOUT);
        let read = async {
            // The service's close frame answers ours, so it has read all that came before.
            while let Some(Ok(message)) = self.stream.next().await {
                if message.is_close() {
                    break;
                }
            }
            self.writer.join_next().await
        };
        if timeout_at(deadline, read).await.is_err() {
            debug!("the service did not close the connection in time");
        }
        self.writer.abort_all();
    }

    /// The end of a connection that broke. One that was about to end for another reason ends for that.
    fn lost(&self, reason: String) -> SessionEnd {
        match self.phase {
            Phase::Leaving {
                departure: Departure::Replaced(_),
                ..
            } => self.left(),
            _ => SessionEnd::Lost(reason),
        }
    }

    fn left(&self) -> SessionEnd {
        match &self.phase {
            Phase::Leaving {
                departure: Departure::Replaced(reason),
                ..
            } => SessionEnd::Replaced(reason.clone()),
            _ => SessionEnd::Stopped,
        }
    }

    fn observe(&self, event: Event) {
        (self.tunnel.observer)(&self.tunnel.settings.name, event);
    }

    /// Tells of the connection that serves the tunnel; others may be about to end.
    fn observe_round_trip(&self, took: Option<Duration>) {
        if let Some(took) = took.filter(|_| matches!(self.phase, Phase::Serving)) {
            self.observe(Event::RoundTrip(took));
        }
    }

    /// Looks whether the service is still there, and asks. Returns for how long nothing has arrived if it is not.
    fn on_tick(&mut self) -> Option<Duration> {
        let silence = self.liveness.tick(self.context.outgoing.progress());
        if silence.is_none() && self.liveness.is_ping_message_due() {
            self.ping();
        }
        silence
    }

    /// Asks for a `pong`, if there is room for a `ping`. Returns whether there was.
    fn ping(&mut self) -> bool {
        self.last_ping = self.last_ping.wrapping_add(1);
        let id = self.repeats_ping_ids.then_some(self.last_ping);
        let ping = message::encode(&FromAgent::Ping { id });
        let receipt = self.context.outgoing.try_control(ping);
        let is_queued = receipt.is_ok();
        if let Ok(receipt) = receipt {
            self.liveness.ping_message_queued(receipt);
        }
        is_queued
    }

    /// Takes what the socket brings. Returns why the connection has ended if it has.
    fn on_message(
        &mut self,
        message: Option<Result<Message, tungstenite::Error>>,
    ) -> Option<String> {
        self.liveness.heard(self.context.outgoing.progress());
        match message {
            Some(Ok(Message::Text(text))) => self.receive(&text),
            Some(Ok(Message::Binary(bytes))) => self.receive_binary(&bytes),
            Some(Ok(Message::Pong(_))) => {
                let outgoing = &self.context.outgoing;
                let (progress, pinged) = (outgoing.progress(), outgoing.last_ping_frame());
                let took = self.liveness.ping_frame_answered(progress, pinged);
                self.observe_round_trip(took);
            }
            Some(Ok(Message::Close(frame))) => {
                let code = frame
                    .map(|frame| format!(" ({})", frame.code))
                    .unwrap_or_default();
                return Some(format!("the service closed the connection{code}"));
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => return Some(error.to_string()),
            None => return Some("the connection broke".to_owned()),
        }
        None
    }

    fn receive(&mut self, text: &str) {
        self.take(message::decode(text), || message::decode(text));
    }

    fn receive_binary(&mut self, bytes: &Bytes) {
        let subject = || message::subject_of_binary(bytes);
        self.take(message::decode_binary(bytes), subject);
    }

    /// Does what a message asks for. `subject` is the request that it is about, should it be unreadable otherwise.
    fn take(
        &mut self,
        message: Result<ToAgent, DecodeError>,
        subject: impl FnOnce() -> Result<Subject, DecodeError>,
    ) {
        match message {
            Ok(ToAgent::HttpRequest(request)) => self.start(request),
            Ok(ToAgent::BodyPart(part)) => self.body_part(part),
            Ok(ToAgent::Window(window)) => {
                if let Some(request) = self.requests.get(&window.request_id) {
                    request.window.allow(window.parts);
                }
            }
            Ok(ToAgent::WebsocketMessage { request_id, text }) => {
                self.websocket(request_id, FromVisitor::Text(text));
            }
            Ok(ToAgent::WebsocketSent {
                request_id,
                batch,
                delivered,
            }) => self.websocket(request_id, FromVisitor::Sent { batch, delivered }),
            Ok(ToAgent::WebsocketClose { request_id, code }) => {
                self.websocket(request_id, FromVisitor::Closed(code));
            }
            Ok(ToAgent::Cancel { request_id }) => self.cancel(&request_id),
            Ok(ToAgent::Pong { id }) => {
                let took = self.liveness.ping_message_answered();
                self.observe_round_trip(took);
                self.on_pong(id);
            }
            Ok(ToAgent::Replaced { reason, id }) => self.on_replaced(reason, id),
            Ok(ToAgent::UrlUpdated { public_url }) => {
                self.observe(Event::Online {
                    public_url,
                    browser_url: None,
                    target: self.context.origin.target().to_string(),
                });
            }
            Ok(ToAgent::Error { message }) => warn!(message, "the service refused a message"),
            Ok(ToAgent::ConnectionEstablished(_) | ToAgent::Released { .. } | ToAgent::Unknown) => {
            }
            // API Gateway may send messages of its own: {"message": "Internal server error", ..}
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "message ignored");
                if let Ok(Subject { request_id }) = subject() {
                    let code = AgentErrorCode::InvalidRequest;
                    self.refuse(request_id, None, code, "the agent cannot read it");
                }
            }
        }
    }

    /// The service says that another connection has taken the tunnel over.
    fn on_replaced(&mut self, reason: String, ping: Option<u32>) {
        if self.has_moved() {
            // By a later connection of this agent, or else that one hears of it and ends the agent.
            debug!(reason, "a connection that has moved does not serve");
            return;
        }
        if self.confirms_replaced && !self.is_confirmed(ping) {
            debug!(reason, "not confirmed");
            return;
        }
        self.replaced.cancel();
        // A stopping agent ends as the user asked, and as soon.
        if !self.is_stopping() {
            self.leave(Departure::Replaced(reason));
        }
    }

    /// Whether `replaced`, as the answer to this `ping` or to none, confirms what the service was asked. Asks if it was not.
    ///
    /// Messages overtake each other and come twice, so a service that can repeats the id of the `ping`. The answer to the later
    /// `ping` counts, and none to those before the last question. From an earlier version of the service, a second `replaced`
    /// without a `pong` in between must do.
    ///
    /// Where there is no room to ask, the answer to the next `ping` says it again.
    fn is_confirmed(&mut self, ping: Option<u32>) -> bool {
        if !self.repeats_ping_ids {
            let is_second = self.awaits_confirmation;
            self.awaits_confirmation = is_second || self.ping();
            return is_second;
        }
        let Some(id) = ping else {
            self.ping();
            self.last_question = self.last_ping;
            return false;
        };
        id > self.last_pong && id >= self.last_question
    }

    /// Without ids, any `pong` ends the wait, also one that answers an earlier `ping`: if the connection is replaced all the same,
    /// the answer to the later one makes the agent ask once more.
    fn on_pong(&mut self, ping: Option<u32>) {
        self.last_pong = self.last_pong.max(ping.unwrap_or_default());
        self.awaits_confirmation = false;
    }

    fn start(&mut self, request: HttpRequest) {
        let id = &request.request_id;
        // Before anything is refused: the service sends a refused request elsewhere, where it would be carried out a second time.
        if self.requests.contains_key(id) {
            debug!(request = %id, "request received twice");
            return;
        }
        if let Some(before) = self.tunnel.seen.connection(id) {
            return self.repeated(request, &before);
        }
        let permit = match self.permit() {
            Ok(permit) => permit,
            Err((code, message)) => {
                self.observe(RequestLine::of(&request).failed(message));
                self.tunnel.recorder.begin(&request).refuse(message);
                return self.refuse(request.request_id, request.reply_to, code, message);
            }
        };
        match self
            .tunnel
            .seen
            .insert(&request.request_id, &self.connection)
        {
            None => self.carry_out(request, permit),
            // It came over another connection in the meantime.
            Some(before) => self.repeated(request, &before),
        }
    }

    /// A request that was carried out for the connection `before`.
    fn repeated(&mut self, request: HttpRequest, before: &ConnectionId) {
        if *before == self.connection {
            debug!(request = %request.request_id, "request received twice");
            return;
        }
        // Its answer went to a connection that the service no longer listens to.
        self.refuse(
            request.request_id,
            request.reply_to,
            AgentErrorCode::InternalError,
            "the request was carried out over another connection",
        );
    }

    /// Whether another connection has taken over, of this agent or of another.
    fn has_successor(&self) -> bool {
        self.moved.is_cancelled() || self.replaced.is_cancelled()
    }

    /// Room for one more request, or why none is taken.
    fn permit(&self) -> Result<OwnedSemaphorePermit, (AgentErrorCode, &'static str)> {
        match &self.phase {
            Phase::Serving | Phase::HandingOver { .. } => self
                .tunnel
                .permits
                .clone()
                .try_acquire_owned()
                .map_err(|_| {
                    let message = "the agent accepts no more requests at once";
                    (AgentErrorCode::Busy, message)
                }),
            Phase::Leaving {
                departure: Departure::Stopped,
                ..
            } if !self.has_successor() => Err((AgentErrorCode::Busy, "the agent is stopping")),
            // Also where the agent is stopping: another one may serve, so the service looks again.
            Phase::Leaving { .. } => Err((
                AgentErrorCode::Replaced,
                "another connection serves the tunnel",
            )),
        }
    }

    fn carry_out(&mut self, mut request: HttpRequest, permit: OwnedSemaphorePermit) {
        let id = request.request_id.clone();
        let first = Part {
            number: 0,
            chunk: request.take_chunk(),
        };
        let (upload, body) = upload(&self.tunnel.budget);
        if let Err(error) = upload.take(first) {
            let message = error.to_string();
            self.observe(RequestLine::of(&request).failed(&message));
            return self.refuse(id, request.reply_to, AgentErrorCode::Busy, &message);
        }
        let window = WindowUpdates::default();
        let line = RequestLine::of(&request);
        let reply_to = request.reply_to.clone();
        let is_upgrade = request.upgrade.is_some();
        let recording = self.tunnel.recorder.begin(&request);
        let context = self.context.clone();
        // Boxed, because they are long, and are moved several times before their task has them.
        let (websocket, exchange) = match request.websocket.clone() {
            None => {
                let window = window.window();
                let exchange =
                    exchange::run(context, request.into(), body, window, recording.clone());
                (None, Either::Left(Box::pin(exchange)))
            }
            Some(visitor) => {
                let (say, incoming) = mpsc::channel(MAX_QUEUED_MESSAGES);
                let exchange =
                    websocket::run(context, request, visitor, incoming, recording.clone());
                (Some(say), Either::Right(Box::pin(exchange)))
            }
        };
        let span = info_span!("request", %id);
        let task = self.running.spawn({
            let id = id.clone();
            async move { (id, exchange.await) }.instrument(span)
        });
        let in_flight = InFlight {
            task,
            upload,
            window,
            line,
            reply_to,
            recording,
            is_upgrade,
            websocket,
            _permit: permit,
        };
        self.requests.insert(id, in_flight);
    }

    /// Hands a part to the local service. A request whose part cannot be handed on is dropped: its body would be cut.
    fn body_part(&mut self, part: BodyPart) {
        let Some(request) = self.requests.get(&part.request_id) else {
            return;
        };
        let id = part.request_id.clone();
        if let Err(error) = request.upload.take(part.into()) {
            self.drop_request(id, &error.to_string());
        }
    }

    /// Hands on what the service says about a visitor's WebSocket. One whose local service takes too little is dropped: a message
    /// would be missing.
    fn websocket(&mut self, id: RequestId, said: FromVisitor) {
        let websocket = self
            .requests
            .get(&id)
            .and_then(|request| request.websocket.as_ref());
        if websocket.is_some_and(|websocket| websocket.try_send(said).is_err()) {
            self.drop_request(id, "the local service does not take the visitor's messages");
        }
    }

    /// The visitor is gone.
    fn cancel(&mut self, id: &RequestId) {
        if let Some(request) = self.requests.remove(id) {
            debug!(request = %id, "cancelled");
            request.task.abort();
            self.busy = Some(Instant::now());
            request.recording.cancel("the visitor left");
            self.observe(request.line.failed("the visitor left"));
        }
    }

    /// Ends a request that cannot be completed, and says so.
    fn drop_request(&mut self, id: RequestId, message: &str) {
        warn!(request = %id, message, "request dropped");
        let Some(request) = self.requests.remove(&id) else {
            return;
        };
        request.task.abort();
        request.recording.cancel(message);
        self.observe(request.line.failed(message));
        self.refuse(id, request.reply_to, AgentErrorCode::Busy, message);
    }

    /// Says that a request is not carried out. Waiting for room here would keep the connection from being read.
    fn refuse(
        &mut self,
        id: RequestId,
        reply_to: Option<ConnectionId>,
        code: AgentErrorCode,
        message: &str,
    ) {
        let error = message::encode(&FromAgent::Error(AgentError {
            request_id: Some(id),
            code,
            message: message.to_owned(),
            parts: 0,
            reply_to,
        }));
        self.busy = Some(Instant::now());
        let outgoing = self.context.outgoing.clone();
        self.unwritten.spawn(async move {
            if let Ok(receipt) = outgoing.control(error).await {
                let _ = receipt.taken().await;
            }
        });
    }

    fn finish(&mut self, done: Result<(RequestId, Ended), tokio::task::JoinError>) {
        self.busy = Some(Instant::now());
        let (id, ended) = match done {
            Ok((id, mut ended)) => {
                if let Some(answer) = ended.unwritten.take() {
                    self.last_answer = Some(answer);
                }
                (id, ended)
            }
            Err(ended) => {
                // Aborted, and removed when it was; or ended by a bug, and not removed yet.
                self.requests
                    .retain(|_, request| request.task.id() != ended.id());
                return;
            }
        };
        // Otherwise it was dropped at the same moment, and that was told.
        if let Some(request) = self.requests.remove(&id) {
            self.observe(request.line.ended(ended));
        }
    }
}

fn why_not_written(
    ended: Result<Result<(), tungstenite::Error>, tokio::task::JoinError>,
) -> String {
    match ended {
        Ok(Err(tungstenite::Error::Protocol(ProtocolError::SendAfterClosing))) => {
            "the service closed the connection".to_owned()
        }
        Ok(Err(error)) => error.to_string(),
        Ok(Ok(())) | Err(_) => "the connection broke".to_owned(),
    }
}

async fn sleep_until_some(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
