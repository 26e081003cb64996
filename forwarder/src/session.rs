//! One connection to the service, from its first request to its end.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, stream::SplitSink};
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    task::{AbortHandle, JoinSet},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_tungstenite::tungstenite::{
    self, Message,
    protocol::frame::{
        Frame,
        coding::{Data, OpCode},
    },
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use tunnel_protocol::{
    body::{reorder::Reorder, window::WindowUpdates},
    frames,
    id::{ConnectionId, RequestId},
    limits::MAX_REORDER_PARTS,
    message,
    message::{
        AgentError, AgentErrorCode, BodyPart, ConnectionEstablished, FromAgent, HttpRequest,
        Subject, ToAgent,
    },
};

use crate::{
    Observer,
    event::Event,
    exchange::{self, Context},
    handshake::Socket,
    origin::Origin,
    settings::Settings,
};

/// How often a ping frame asks whether the service is still there.
const PING_FRAME_INTERVAL: Duration = Duration::from_secs(5);
/// How often a `ping` message does so where pings are answered: under API Gateway's 10 minutes without a message.
pub const PING_MESSAGE_INTERVAL: Duration = Duration::from_secs(5 * 60);
/// How often a `ping` message does so where ping frames are not answered. Each is billed, so no more often than it takes to
/// notice a dead connection within half a minute.
pub const SOLE_PING_MESSAGE_INTERVAL: Duration = Duration::from_secs(15);
/// A connection on which nothing was heard for this long, though it was asked, is dead.
const MAX_SILENCE: Duration = Duration::from_secs(20);
/// How long requests are taken after another connection of this agent has taken over: longer than the service remembers which
/// connection serves a tunnel, so that none is sent here in vain.
const HANDOVER_TIME: Duration = Duration::from_secs(7);
/// How long requests in flight may take to finish once the agent is told to stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages on their way out. Each is up to 128 KiB long; more wait where they are made.
const MAX_QUEUED_MESSAGES: usize = 32;
/// Refusals that wait for room among them; with more, no messages are read until the service has taken some.
const MAX_QUEUED_REFUSALS: usize = 1024;
/// How many ended requests are remembered, so that one that comes twice is not carried out twice.
const MAX_ENDED_REQUESTS: usize = 1024;

/// Requests that have ended, the last [`MAX_ENDED_REQUESTS`] of them.
#[derive(Debug, Default)]
struct Ended {
    known: HashSet<RequestId>,
    in_order: VecDeque<RequestId>,
}

impl Ended {
    fn insert(&mut self, id: RequestId) {
        if self.in_order.len() == MAX_ENDED_REQUESTS
            && let Some(oldest) = self.in_order.pop_front()
        {
            self.known.remove(&oldest);
        }
        if self.known.insert(id.clone()) {
            self.in_order.push_back(id);
        }
    }
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
    body: Option<UploadedBody>,
    /// Which parts of the response may be sent.
    window: WindowUpdates,
    reply_to: Option<ConnectionId>,
}

/// The rest of a request's body, on its way to the local service.
#[derive(Debug)]
struct UploadedBody {
    parts: Reorder<BodyPart>,
    to_origin: mpsc::Sender<BodyPart>,
}

/// Why no more requests are taken.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Leaving {
    /// The agent was told to stop.
    Stopped,
    /// Another connection of this agent serves the tunnel.
    Retired,
    /// A connection of another agent serves it, as the service says.
    Replaced(String),
}

/// A connection that serves a tunnel.
pub struct Session {
    context: Context,
    /// The other end of what the context sends.
    queue: Option<mpsc::Receiver<String>>,
    name: String,
    observer: Observer,
    max_concurrent: usize,
    requests: HashMap<RequestId, InFlight>,
    running: JoinSet<(RequestId, Event)>,
    ended: Ended,
    /// On their way to the queue of what the context sends.
    refusals: VecDeque<String>,
    leaving: Option<Leaving>,
}

impl Session {
    /// A session that has not served yet.
    pub fn new(
        settings: &Settings,
        origin: &Origin,
        observer: Observer,
        established: &ConnectionEstablished,
    ) -> Self {
        let (outgoing, queue) = mpsc::channel(MAX_QUEUED_MESSAGES);
        Self {
            context: Context::new(settings, origin, &established.features, outgoing),
            queue: Some(queue),
            name: settings.name.clone(),
            observer,
            max_concurrent: settings.max_concurrent,
            requests: HashMap::new(),
            running: JoinSet::new(),
            ended: Ended::default(),
            refusals: VecDeque::new(),
            leaving: None,
        }
    }

    /// Serves until the connection ends, or `stop` or `notify_replaced` are cancelled and the requests in flight have finished.
    pub async fn serve(
        mut self,
        socket: Socket,
        stop: CancellationToken,
        notify_replaced: CancellationToken,
    ) -> SessionEnd {
        let (sink, mut stream) = socket.split();
        let (ping, pings) = mpsc::channel(1);
        let mut writer = JoinSet::new();
        writer.spawn(write(
            sink,
            self.queue.take().expect("a session serves once"),
            pings,
        ));
        let opened = Instant::now();
        let (mut heard, mut pinged, mut answers_pings) = (opened, opened, false);
        // When nothing new is taken any more, and when nothing is waited for any more.
        let (mut leave_at, mut release_owned): (Option<Instant>, Option<Instant>) = (None, None);
        let outgoing = self.context.outgoing.clone();
        let mut tick = interval(PING_FRAME_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ended = loop {
            tokio::select! {
                message = stream.next(), if self.refusals.len() < MAX_QUEUED_REFUSALS => {
                    heard = Instant::now();
                    match message {
                        Some(Ok(Message::Text(text))) => self.take(&text),
                        Some(Ok(Message::Pong(_))) => answers_pings = true,
                        Some(Ok(Message::Close(frame))) => {
                            let reason = frame.map(|frame| format!(" ({})", frame.code)).unwrap_or_default();
                            break SessionEnd::Lost(format!("the service closed the connection{reason}"));
                        }
                        Some(Ok(_)) => {}
                        Some(Err(error)) => break SessionEnd::Lost(error.to_string()),
                        None => break SessionEnd::Lost("the connection broke".to_owned()),
                    }
                }
                Some(done) = self.running.join_next() => self.finish(done),
                Ok(room) = outgoing.reserve(), if !self.refusals.is_empty() => {
                    if let Some(refusal) = self.refusals.pop_front() {
                        room.send(refusal);
                    }
                }
                Some(failed) = writer.join_next() => {
                    break SessionEnd::Lost(failed.ok().flatten().unwrap_or_else(|| "the connection broke".to_owned()));
                }
                now = tick.tick() => {
                    if heard.elapsed() > MAX_SILENCE && (answers_pings || pinged > heard) {
                        break SessionEnd::Lost(format!("nothing was heard for {} s", heard.elapsed().as_secs()));
                    }
                    // A full queue means that the writer has not got round to the last one.
                    let _ = ping.try_send(());
                    if now - pinged >= if answers_pings { PING_MESSAGE_INTERVAL } else { SOLE_PING_MESSAGE_INTERVAL } {
                        pinged = now;
                        let _ = self.context.outgoing.try_send(message::encode(&FromAgent::Ping));
                    }
                }
                () = stop.cancelled(), if self.leaving != Some(Leaving::Stopped) => {
                    self.leaving = Some(Leaving::Stopped);
                    self.observe(Event::Draining { in_flight: self.requests.len() });
                }
                () = notify_replaced.cancelled(), if self.leaving.is_none() && leave_at.is_none() => leave_at = Some(Instant::now() + HANDOVER_TIME),
                () = sleep_until(leave_at.unwrap_or(opened)), if self.leaving.is_none() && leave_at.is_some() => {
                    self.leaving = Some(Leaving::Retired);
                }
                () = sleep_until(release_owned.unwrap_or(opened)), if release_owned.is_some() => break self.left(),
            }
            match &self.leaving {
                Some(_) if self.requests.is_empty() && self.refusals.is_empty() => {
                    break self.left();
                }
                // Who was taken over from by this agent's own next connection has as long as the connection lives.
                Some(Leaving::Stopped | Leaving::Replaced(_)) if release_owned.is_none() => {
                    release_owned = Some(Instant::now() + DRAIN_TIMEOUT)
                }
                _ => {}
            }
        };
        self.running.shutdown().await;
        drop((self, ping, outgoing));
        // With all senders gone the writer sends what is queued, closes and ends.
        if !matches!(ended, SessionEnd::Lost(_)) {
            let _ = timeout(Duration::from_secs(2), writer.join_next()).await;
        }
        ended
    }

    fn left(&self) -> SessionEnd {
        match &self.leaving {
            Some(Leaving::Replaced(reason)) => SessionEnd::Replaced(reason.clone()),
            _ => SessionEnd::Stopped,
        }
    }

    fn observe(&self, event: Event) {
        (self.observer)(&self.name, event);
    }

    fn take(&mut self, text: &str) {
        match message::decode(text) {
            Ok(ToAgent::HttpRequest(request)) => self.start(request),
            Ok(ToAgent::BodyPart(part)) => self.body_part(part),
            Ok(ToAgent::Window(window)) => {
                if let Some(request) = self.requests.get(&window.request_id) {
                    request.window.allow(window.parts);
                }
            }
            Ok(ToAgent::Cancel { request_id }) => {
                if let Some(request) = self.requests.remove(&request_id) {
                    debug!(request = %request_id, "cancelled");
                    request.task.abort();
                    self.ended.insert(request_id);
                }
            }
            Ok(ToAgent::Replaced { reason }) => self.leaving = Some(Leaving::Replaced(reason)),
            Ok(ToAgent::UrlUpdated { public_url }) => {
                self.observe(Event::Online {
                    public_url,
                    target: self.context.origin.target().to_string(),
                });
            }
            Ok(ToAgent::Error { message }) => warn!(message, "the service refused a message"),
            Ok(
                ToAgent::Pong
                | ToAgent::ConnectionEstablished(_)
                | ToAgent::Released { .. }
                | ToAgent::Unknown,
            ) => {}
            // API Gateway itself may speak up: {"message": "Internal server error", ..}
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "message ignored");
                if let Ok(Subject { request_id }) = message::decode(text) {
                    self.refuse(
                        request_id,
                        None,
                        AgentErrorCode::InvalidRequest,
                        "the agent cannot read it",
                    );
                }
            }
        }
    }

    fn start(&mut self, request: HttpRequest) {
        let id = request.request_id.clone();
        if self.requests.contains_key(&id) || self.ended.known.contains(&id) {
            debug!(request = %id, "request came twice");
            return;
        }
        let refusal = match &self.leaving {
            None if self.requests.len() < self.max_concurrent => None,
            None => Some((
                AgentErrorCode::Busy,
                "the agent takes no more requests at once",
            )),
            Some(Leaving::Stopped) => Some((AgentErrorCode::Busy, "the agent is stopping")),
            Some(Leaving::Retired | Leaving::Replaced(_)) => Some((
                AgentErrorCode::Replaced,
                "another connection serves the tunnel",
            )),
        };
        if let Some((code, message)) = refusal {
            return self.refuse(id, request.reply_to, code, message);
        }
        let (body, more) = if request.more {
            let (to_origin, parts) = mpsc::channel(MAX_REORDER_PARTS);
            (
                Some(UploadedBody {
                    parts: Reorder::starting_at(1),
                    to_origin,
                }),
                Some(parts),
            )
        } else {
            (None, None)
        };
        let window = WindowUpdates::default();
        let may_send = window.window();
        let reply_to = request.reply_to.clone();
        let context = self.context.clone();
        let task = self.running.spawn({
            let id = id.clone();
            async move { (id, exchange::run(context, request, more, may_send).await) }
        });
        self.requests.insert(
            id,
            InFlight {
                task,
                body,
                window,
                reply_to,
            },
        );
    }

    /// Hands a part to the local service. A request whose part cannot be handed on is dropped: its body would be cut.
    fn body_part(&mut self, part: BodyPart) {
        let Some(request) = self.requests.get_mut(&part.request_id) else {
            return;
        };
        let Some(body) = &mut request.body else {
            return;
        };
        let id = part.request_id.clone();
        if let Err(error) = body.parts.insert(part.part, part) {
            return self.drop_request(id, &error.to_string());
        }
        while let Some(part) = body.parts.take_next() {
            let more = part.more;
            match body.to_origin.try_send(part) {
                // The local service has answered without reading all; that is its right.
                Ok(()) | Err(TrySendError::Closed(_)) => {}
                // Only a service that does not heed `window` sends more than fits.
                Err(TrySendError::Full(_)) => {
                    return self.drop_request(id, "the local service reads the request too slowly");
                }
            }
            if !more {
                request.body = None;
                return;
            }
        }
    }

    /// Ends a request that cannot be completed, and says so.
    fn drop_request(&mut self, id: RequestId, message: &str) {
        warn!(request = %id, message, "request dropped");
        let Some(request) = self.requests.remove(&id) else {
            return;
        };
        request.task.abort();
        self.ended.insert(id.clone());
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
        let error = AgentError {
            request_id: Some(id),
            code,
            message: message.to_owned(),
            reply_to,
        };
        self.refusals
            .push_back(message::encode(&FromAgent::Error(error)));
    }

    fn finish(&mut self, done: Result<(RequestId, Event), tokio::task::JoinError>) {
        let (id, event) = match done {
            Ok(done) => done,
            Err(ended) => {
                // Aborted, and removed by whoever aborted it; or ended by a bug, and not removed yet.
                self.requests
                    .retain(|_, request| request.task.id() != ended.id());
                return;
            }
        };
        self.requests.remove(&id);
        self.ended.insert(id);
        self.observe(event);
    }
}

/// Writes messages in frames that API Gateway takes, until all senders are gone. Returns why it could not.
async fn write(
    mut sink: SplitSink<Socket, Message>,
    mut queue: mpsc::Receiver<String>,
    mut pings: mpsc::Receiver<()>,
) -> Option<String> {
    loop {
        let outcome = tokio::select! {
            message = queue.recv() => match message {
                Some(text) => write_text(&mut sink, text).await,
                None => break,
            },
            Some(()) = pings.recv() => sink.send(Message::Ping(Bytes::new())).await,
        };
        if let Err(error) = outcome {
            return Some(error.to_string());
        }
    }
    let _ = sink.close().await;
    None
}

async fn write_text(
    sink: &mut SplitSink<Socket, Message>,
    text: String,
) -> Result<(), tungstenite::Error> {
    let mut data = Data::Text;
    for (frame, is_last) in frames::frames(text) {
        sink.feed(Message::Frame(Frame::message(
            frame,
            OpCode::Data(data),
            is_last,
        )))
        .await?;
        data = Data::Continue;
    }
    sink.flush().await
}
