//! The WebSocket API: agents' connections, with API Gateway's quotas and its close codes.
//!
//! Unlike API Gateway it probes whether an agent is still there, so that the visitors of one whose network went away do
//! not wait for it.

use std::{borrow::Cow, future::poll_fn, net::SocketAddr, sync::Arc, task::Poll, time::Duration};

use axum::extract::State;
use futures_util::{StreamExt, stream::SplitStream};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use rand::RngExt;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit},
    time::{Instant, sleep_until, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, Message, protocol::Role},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, error, warn};
use tunnel_connect::{
    Admission, Caller, Connect, ConnectError, Handshake, HandshakeRefusal, Purpose,
};
use tunnel_default::DefaultRoute;
use tunnel_disconnect::Disconnect;
use tunnel_forward::response::{self, ResponseBody};
use tunnel_local_aws::{
    events::EventSource,
    management::{Connection, ConnectionRegistry, STAGE, SocketConnection},
    quotas::Quotas,
};
use tunnel_protocol::{
    frames,
    headers::LONG_FRAMES,
    id::{ConnectionId, TunnelId},
    message,
    writer::MessageWriter,
};
use tunnel_service::{
    auth::owner::Owner, aws::route_event::RouteResponse, now, replies::Replies,
    telemetry::connection_span,
};

use crate::{
    front::{
        agent_limit::{AgentLimit, AgentPermit},
        connection_clock::ConnectionClock,
        forwarded::Peer,
        handshake,
        listener::ConnectionPermit,
        response::text,
    },
    operator::{HANDSHAKE_CODES, Observer},
    options::Transport,
};

/// Where agents connect.
pub(crate) const PATH: &str = "/_ws";
/// How often an agent is asked whether it is still there.
const PING_INTERVAL: Duration = Duration::from_secs(13);
/// An agent from which nothing was received for this long, although it was pinged, is gone.
const MAX_SILENCE: Duration = Duration::from_secs(30);
/// How often a connection whose life is over is looked at for upgraded connections that it still carries. Agents close such
/// connections themselves when the last has ended.
const UPGRADED_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// For how many ended connections, and for how many handshakes, the tables are asked at once. They serve one call at a time, and a call
/// that waits for too many others fails: when all agents leave together, their tunnels would stay online, and when thousands come
/// together, as after an upgrade, none would be let in.
pub(crate) const MAX_AT_THE_TABLES: usize = 32;
/// How long the last messages of a connection may take to be written.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// The WebSocket API beside its @connections, as in AWS: for the reply connections of functions on this machine.
pub(crate) fn router(front: &Arc<AgentFront>) -> axum::Router {
    let accept = |State(front): State<Arc<AgentFront>>, request: axum::extract::Request| async {
        front
            .accept(
                request,
                &SocketAddr::from(([127, 0, 0, 1], 0)).into(),
                ConnectionPermit::internal(),
            )
            .await
            .map(axum::body::Body::new)
    };
    axum::Router::new()
        .route(&format!("/{STAGE}"), axum::routing::get(accept))
        .with_state(front.clone())
}

/// The WebSocket API.
#[derive(Debug)]
pub(crate) struct AgentFront {
    /// Whether messages take every step that they take in AWS.
    pub(crate) transport: Transport,
    /// The function of `$connect`.
    pub(crate) connect: Connect,
    /// The function of `$default`.
    pub(crate) default: DefaultRoute,
    /// The function of `$disconnect`.
    pub(crate) disconnect: Disconnect,
    /// Where open connections are known.
    pub(crate) connections: ConnectionRegistry,
    /// Where replies are waited for.
    pub(crate) replies: Replies,
    /// What they may do.
    pub(crate) quotas: Quotas,
    /// Whose connections are open.
    pub(crate) limit: AgentLimit,
    /// Which connections are newer than others.
    pub(crate) clock: ConnectionClock,
    /// Places for handshakes that are being decided.
    pub(crate) connecting: TablePermits,
    /// Places for ended connections that are being noted.
    pub(crate) disconnecting: TablePermits,
    /// Takes note of agents.
    pub(crate) observer: Arc<Observer>,
    /// Holds a task for each connection and each message being handled.
    pub(crate) tasks: TaskTracker,
    /// Cancelled when connections are to end, also those that open later.
    pub(crate) stopping: CancellationToken,
}

impl AgentFront {
    /// Answers a handshake: 101 if `$connect` lets the agent in, and what it says otherwise.
    pub(crate) async fn accept<B: Send + 'static>(
        self: Arc<Self>,
        mut request: Request<B>,
        peer: &Peer,
        connection_permit: ConnectionPermit,
    ) -> Response<ResponseBody> {
        let accept_key = match handshake::check(&request) {
            Ok(accept_key) => accept_key,
            Err(refusal) => {
                self.observer.metrics.refused(refusal.code());
                return refusal.into_response();
            }
        };
        let origin = self.observer.proxies.origin(peer, request.headers());
        let source = Arc::new(EventSource {
            connection_id: connection_id(),
            connected_at: self.clock.open_ms(now()),
            source_ip: (*peer.ip).to_owned(),
            stage: STAGE,
        });
        let has_long_frames = self.takes_binary() && request.headers().contains_key(LONG_FRAMES);
        let span = connection_span(&source.connection_id);
        let upgrade = hyper::upgrade::on(&mut request);
        let admitted = self.admit(request.headers(), request.uri(), &source);
        let admitted = match admitted.instrument(span.clone()).await {
            Ok(admitted) => admitted,
            Err(refusal) => {
                self.observer.metrics.refused(refusal.code);
                return refusal.response;
            }
        };
        let agent = admitted.agent.map(|(tunnel, owner)| {
            let connection = source.connection_id.clone();
            self.observer
                .agent(connection, tunnel, owner, origin.address)
        });
        let front = self.clone();
        let serving = async move {
            let end = match upgrade.await {
                Ok(upgraded) => front.serve(upgraded, has_long_frames, source).await,
                Err(error) => {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "the agent left during its handshake"
                    );
                    front.disconnected(&source, 1006, "").await;
                    ConnectionEnd::new(1006, "")
                }
            };
            if let Some(agent) = agent {
                agent.ended(end.name());
            }
            drop((admitted.permit, connection_permit));
        };
        self.tasks.spawn(serving.instrument(span));
        let mut answer = handshake::switching_protocols(accept_key);
        if has_long_frames {
            let fields = answer.headers_mut();
            fields.insert(LONG_FRAMES, HeaderValue::from_static("yes"));
        }
        answer
    }

    /// Asks `$connect`. Lets a connection in with a place among its owner's, or returns why not; one that is no agent's needs no
    /// place.
    async fn admit(
        &self,
        headers: &HeaderMap,
        uri: &Uri,
        source: &EventSource,
    ) -> Result<Admitted, Refused> {
        let query: Vec<(Cow<'_, str>, Cow<'_, str>)> =
            form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).collect();
        let first = |name: &str| {
            let found = query.iter().find(|(key, _)| key == name);
            found.map(|(_, value)| &**value)
        };
        let handshake = Handshake {
            connection: source.connection_id.clone(),
            connected_at: Duration::from_millis(source.connected_at),
            headers: headers.clone(),
            purpose: Purpose::of_query(first),
        };
        let failed = |error: ConnectError| Refused::failed(&error);
        let (caller, table_permit) = self.identify(&handshake).await?;
        let owner = match &caller {
            Caller::Agent(identity) => Some(identity.owner.clone()),
            Caller::TicketHolder(_) => None,
        };
        let permit = match &owner {
            Some(owner) => {
                let permit = self.limit.acquire(owner.clone());
                Some(permit.ok_or_else(Refused::too_many)?)
            }
            None => None,
        };
        let asked_for = first("tunnel_id").and_then(|id| id.parse().ok());
        let tunnel = match self.transport {
            Transport::InProcess => {
                match self
                    .connect
                    .admit(&handshake, caller)
                    .await
                    .map_err(failed)?
                {
                    Admission::Refused(refusal) => return Err(Refused::by(&refusal)),
                    Admission::Agent { tunnel_id, .. } => Some(tunnel_id),
                    Admission::ReplyConnection => None,
                }
            }
            Transport::Emulated => {
                let event = source.connect(headers, uri);
                let answer = self.connect.handle(event).await.map_err(failed)?;
                if !(200..300).contains(&answer.status_code) {
                    return Err(Refused::answered(answer));
                }
                asked_for
            }
        };
        drop(table_permit);
        Ok(Admitted {
            permit,
            agent: tunnel.zip(owner),
        })
    }

    /// Who is calling, and a permit to ask the tables what more there is to ask. Whoever leaves while it waits for one costs the tables
    /// nothing.
    async fn identify(
        &self,
        handshake: &Handshake,
    ) -> Result<(Caller, Option<SemaphorePermit<'_>>), Refused> {
        let mut permit = None;
        // The keys of an issuer may be long in coming, and nobody else waits for them.
        if self.connect.identifies_by_tables() {
            permit = self.connecting.acquire().await;
        }
        let caller = self.connect.identify(handshake).await;
        let Some(caller) = caller.map_err(|error| Refused::failed(&error))? else {
            return Err(Refused::by(&HandshakeRefusal::NotAuthorized));
        };
        if permit.is_none() {
            permit = self.connecting.acquire().await;
        }
        Ok((caller, permit))
    }

    /// Serves a connection to its end, and returns why it has ended.
    async fn serve(
        self: &Arc<Self>,
        upgraded: Upgraded,
        has_long_frames: bool,
        source: Arc<EventSource>,
    ) -> ConnectionEnd {
        let longest_frame = match has_long_frames {
            true => self.quotas.message,
            false => self.quotas.frame,
        };
        let config = frames::server_config(longest_frame, self.quotas.message);
        let socket =
            WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config))
                .await;
        let (sink, mut stream) = socket.split();
        let (sender, writer) = MessageWriter::new(sink, Some(PING_INTERVAL));
        let connection = SocketConnection::new(sender);
        self.connections
            .insert(source.connection_id.clone(), connection.clone());
        let writing = self.tasks.spawn(writer.run().in_current_span());
        let end = self.read(&mut stream, &source, &connection).await;
        self.connections.remove(&source.connection_id);
        self.replies.lose(&source.connection_id);
        connection.close(end.code, end.reason);
        drop(connection);
        let stuck = writing.abort_handle();
        let written = timeout(CLOSE_TIMEOUT, writing).await;
        // An agent that does not read is not waited for.
        stuck.abort();
        self.disconnected(&source, end.code, end.reason).await;
        if let Ok(Ok(Ok(sink))) = written
            && let Ok(mut socket) = stream.reunite(sink)
        {
            // Closed with bytes unread, the agent would be sent a reset, and might never see the close frame before it.
            let mut nowhere = tokio::io::sink();
            let drain = tokio::io::copy(socket.get_mut(), &mut nowhere);
            let _ = timeout(CLOSE_TIMEOUT, drain).await;
        }
        end
    }

    /// Reads messages until the connection ends or is to be closed, and returns why.
    async fn read(
        self: &Arc<Self>,
        stream: &mut SplitStream<Socket>,
        source: &Arc<EventSource>,
        connection: &SocketConnection,
    ) -> ConnectionEnd {
        let mut liveness = Liveness::new(&self.quotas);
        let handled_at_once = Arc::new(Semaphore::new(self.quotas.handled_at_once));
        loop {
            let message = tokio::select! {
                end = self.closing(connection) => return end,
                message = stream.next() => message,
                () = sleep_until(liveness.deadline(connection)) => {
                    let carries_upgraded = || self.replies.carries_upgraded(&source.connection_id);
                    match liveness.end(connection, carries_upgraded) {
                        Some(end) => return end,
                        None => continue,
                    }
                }
            };
            liveness.hear();
            match message {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_))))
                    if self.takes(&message) =>
                {
                    connection.use_now();
                    let permit = tokio::select! {
                        // The semaphore is never closed.
                        permit = handled_at_once.clone().acquire_owned() => permit.ok(),
                        end = self.closing(connection) => return end,
                    };
                    let front = self.clone();
                    let mut handling =
                        Box::pin(front.handle(source.clone(), message, connection.clone(), permit));
                    // Most messages need nothing outside this process and are done at once. Only the others get a task.
                    if poll_fn(|context| Poll::Ready(handling.as_mut().poll(context)))
                        .await
                        .is_pending()
                    {
                        self.tasks.spawn(handling.in_current_span());
                    }
                }
                // The protocol engine answers pings, and a close with a close.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                message => return ConnectionEnd::of(message),
            }
        }
    }

    /// Waits until the service closes the connection, and returns why.
    async fn closing(&self, connection: &SocketConnection) -> ConnectionEnd {
        tokio::select! {
            () = connection.closing().cancelled() => CLOSED_BY_SERVICE,
            () = self.stopping.cancelled() => GOING_AWAY,
        }
    }

    /// Whether a message is text, or binary as the protocol has it, which API Gateway does not pass on.
    fn takes(&self, message: &Message) -> bool {
        match message {
            Message::Text(_) => true,
            Message::Binary(bytes) => self.takes_binary() && message::is_binary(bytes),
            _ => false,
        }
    }

    /// Whether messages may be binary: API Gateway passes on text.
    fn takes_binary(&self) -> bool {
        self.transport == Transport::InProcess
    }

    async fn handle(
        self: Arc<Self>,
        source: Arc<EventSource>,
        message: Message,
        connection: SocketConnection,
        _permit: Option<OwnedSemaphorePermit>,
    ) {
        let sender = &source.connection_id;
        let outcome = match (self.transport, message) {
            (Transport::InProcess, Message::Text(text)) => {
                self.default.message(sender, text.as_str()).await
            }
            (Transport::InProcess, message) => {
                let bytes = message.into_data();
                self.default.binary_message(sender, &bytes).await
            }
            (Transport::Emulated, message) => {
                let text = message.into_text().unwrap_or_default();
                // Boxed, as nothing else needs so much room.
                let event = source.message(text.to_string());
                Box::pin(self.default.handle(event)).await
            }
        };
        if let Err(error) = outcome {
            error!(error = &error as &dyn std::error::Error, "$default failed");
            let said = serde_json::json!({ "message": "Internal server error", "connectionId": source.connection_id.as_str() });
            let _ = connection.sender().try_control(said.to_string());
        }
    }

    async fn disconnected(&self, source: &EventSource, code: u16, reason: &str) {
        let _permit = self.disconnecting.acquire().await;
        // Boxed: it is longer than all else that an open connection keeps for itself.
        let handling = Box::pin(self.disconnect.handle(source.disconnect(code, reason)));
        if let Err(error) = handling.await {
            error!(
                error = &error as &dyn std::error::Error,
                "$disconnect failed"
            );
        }
    }
}

/// A connection that is let in.
struct Admitted {
    /// Its place among its owner's.
    permit: Option<AgentPermit>,
    /// If it is an agent's: its tunnel and its owner.
    agent: Option<(TunnelId, Owner)>,
}

/// A handshake that is refused.
struct Refused {
    /// Why, for those who count.
    code: &'static str,
    response: Response<ResponseBody>,
}

impl Refused {
    fn by(refusal: &HandshakeRefusal) -> Self {
        let answer = RouteResponse::refused(refusal.status(), refusal.code(), &refusal.to_string());
        Self {
            code: refusal.code(),
            response: refused(answer),
        }
    }

    fn failed(error: &ConnectError) -> Self {
        error!(error = error as &dyn std::error::Error, "$connect failed");
        Self {
            code: "internal_error",
            response: text(StatusCode::INTERNAL_SERVER_ERROR, "Internal server error\n"),
        }
    }

    fn too_many() -> Self {
        Self {
            code: "too_many_agents",
            response: text(
                StatusCode::TOO_MANY_REQUESTS,
                "Too many agents of this owner are connected.\n",
            ),
        }
    }

    /// By the function, whose answer has the code in its body.
    fn answered(answer: RouteResponse) -> Self {
        let body = answer.body.as_deref().unwrap_or_default();
        let said: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
        let known = HANDSHAKE_CODES.iter().find(|code| said["error"] == **code);
        Self {
            code: known.copied().unwrap_or("internal_error"),
            response: refused(answer),
        }
    }
}

/// See [`MAX_AT_THE_TABLES`].
#[derive(Debug)]
pub(crate) struct TablePermits(Semaphore);

impl TablePermits {
    /// Waits for a place, which is free again when the result is dropped.
    pub(crate) async fn acquire(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed.
        self.0.acquire().await.ok()
    }
}

impl Default for TablePermits {
    fn default() -> Self {
        Self(Semaphore::new(MAX_AT_THE_TABLES))
    }
}

/// Why a connection ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct ConnectionEnd {
    code: u16,
    reason: &'static str,
}

/// Why a connection ends that the agent has closed, whatever its code.
const CLOSED_BY_AGENT: &str = "closed by the agent";
/// Why one ends from which nothing comes.
const SILENT: &str = "silent for too long";

const CLOSED_BY_SERVICE: ConnectionEnd = ConnectionEnd {
    code: 1000,
    reason: "closed by the service",
};

const GOING_AWAY: ConnectionEnd = ConnectionEnd {
    code: 1001,
    reason: "going away",
};

impl ConnectionEnd {
    /// A name for those who count.
    fn name(self) -> &'static str {
        match (self.reason, self.code) {
            (CLOSED_BY_AGENT, _) => "by_agent",
            (SILENT, _) => "lost",
            _ if self == GOING_AWAY => "going_away",
            (_, 1000 | 1001) => "by_service",
            (_, 1009) => "too_long",
            (_, 1002 | 1003 | 1007) => "malformed",
            _ => "lost",
        }
    }

    fn new(code: u16, reason: &'static str) -> Self {
        Self { code, reason }
    }

    /// What a message means that is none of the protocol's.
    fn of(message: Option<Result<Message, tungstenite::Error>>) -> Self {
        match message {
            Some(Ok(Message::Close(frame))) => Self::new(
                frame.map_or(1005, |frame| frame.code.into()),
                CLOSED_BY_AGENT,
            ),
            Some(Ok(_)) => Self::new(1003, "not a binary message of this protocol"),
            Some(Err(tungstenite::Error::Capacity(_))) => {
                Self::new(1009, "frame or message too long")
            }
            Some(Err(tungstenite::Error::Utf8(_))) => Self::new(1007, "text that is not UTF-8"),
            Some(Err(tungstenite::Error::Protocol(_))) => Self::new(1002, "not WebSocket"),
            Some(Err(_)) | None => Self::new(1006, "the connection broke"),
        }
    }
}

/// How long a connection may still be open.
struct Liveness {
    idle: Duration,
    /// `None` if it may be open for as long as it likes.
    end_of_life: Option<Instant>,
    heard: Instant,
    unblocked_writes: u64,
}

impl Liveness {
    fn new(quotas: &Quotas) -> Self {
        let now = Instant::now();
        Self {
            idle: quotas.idle,
            end_of_life: quotas.life.and_then(|life| now.checked_add(life)),
            heard: now,
            unblocked_writes: 0,
        }
    }

    /// Notes a sign of life.
    fn hear(&mut self) {
        self.heard = Instant::now();
    }

    /// When to look whether the connection has to end.
    fn deadline(&self, connection: &SocketConnection) -> Instant {
        (connection.last_used() + self.idle)
            .min(self.heard + MAX_SILENCE)
            .min(self.end_of_life.unwrap_or(self.heard + MAX_SILENCE))
    }

    /// Why the connection has to end now, if it has to. Its life lasts for as long as it carries upgraded connections.
    fn end(
        &mut self,
        connection: &SocketConnection,
        carries_upgraded: impl FnOnce() -> bool,
    ) -> Option<ConnectionEnd> {
        let now = Instant::now();
        if self.end_of_life.is_some_and(|end| now >= end) {
            if !carries_upgraded() {
                return Some(ConnectionEnd::new(1001, "open for too long"));
            }
            self.end_of_life = Some(now + UPGRADED_CHECK_INTERVAL);
        }
        if now >= connection.last_used() + self.idle {
            return Some(ConnectionEnd::new(1001, "idle for too long"));
        }
        // An agent that is busy reading may say nothing.
        let unblocked_writes = connection.sender().progress().unblocked_writes;
        if unblocked_writes > self.unblocked_writes {
            self.unblocked_writes = unblocked_writes;
            self.hear();
        }
        (now >= self.heard + MAX_SILENCE).then_some(ConnectionEnd::new(1001, SILENT))
    }
}

/// What an agent sees of `$connect`'s refusal.
fn refused(answer: RouteResponse) -> Response<ResponseBody> {
    let mut response = Response::new(response::whole(answer.body.unwrap_or_default()));
    *response.status_mut() =
        StatusCode::from_u16(answer.status_code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

/// An id that cannot be guessed, in the form of API Gateway's.
pub(crate) fn connection_id() -> ConnectionId {
    const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let mut random = rand::rng();
    let text: String = (0..15)
        .map(|_| char::from(ALPHABET[random.random_range(0..ALPHABET.len())]))
        .collect();
    (text + "=")
        .parse()
        .expect("letters, digits and = make a connection id")
}
