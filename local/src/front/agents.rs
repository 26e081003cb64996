//! The WebSocket API: agents' connections, with API Gateway's quotas and its close codes.
//!
//! Unlike API Gateway it asks by itself whether an agent is still there, so that the visitors of one whose network went away do
//! not wait for it.

use std::{
    borrow::Cow,
    future::poll_fn,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::Poll,
    time::Duration,
};

use axum::extract::State;
use bytes::Bytes;
use futures_util::{
    Sink, SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use rand::RngExt;
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{
            CloseFrame, Role, WebSocketConfig,
            frame::{
                Frame,
                coding::{CloseCode, Data, OpCode},
            },
        },
    },
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{error, warn};
use tunnel_connect::{
    Admission, Caller, Connect, ConnectError, Handshake, HandshakeRefusal, Purpose,
};
use tunnel_default::DefaultRoute;
use tunnel_disconnect::Disconnect;
use tunnel_forward::response::{self, ResponseBody};
use tunnel_protocol::{frames, id::ConnectionId, limits::MAX_FRAME_BYTES};
use tunnel_service::{aws::route_event::RouteResponse, now, replies::Replies};

use crate::{
    front::{
        agent_limit::{AgentLimit, AgentPermit},
        handshake,
        listener::ConnectionPermit,
        response::text,
    },
    options::Transport,
};
use tunnel_local_aws::{
    events::EventSource,
    management::{ConnectionCommand, ConnectionRegistry, STAGE},
    quotas::Quotas,
};

/// Where agents connect.
pub(crate) const PATH: &str = "/_ws";
/// How often an agent is asked whether it is still there.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// An agent that has not said anything for this long, though it was asked, is gone.
const MAX_SILENCE: Duration = Duration::from_secs(30);
/// Shortest pause between two checks of all connections.
const MIN_RECHECK_INTERVAL: Duration = Duration::from_millis(1);
/// How long the last messages of a connection may take to be written.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// The WebSocket API beside its @connections, as in AWS: for the reply connections of functions on this machine.
pub(crate) fn router(front: &Arc<AgentFront>) -> axum::Router {
    let accept = |State(front): State<Arc<AgentFront>>, request: axum::extract::Request| async {
        front
            .accept(
                request,
                SocketAddr::from(([127, 0, 0, 1], 0)),
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
    /// Holds a task for each connection and each message being handled.
    pub(crate) tasks: TaskTracker,
}

impl AgentFront {
    /// Answers a handshake: 101 if `$connect` lets the agent in, and what it says otherwise.
    pub(crate) async fn accept<B: Send + 'static>(
        self: Arc<Self>,
        mut request: Request<B>,
        peer: SocketAddr,
        connection_permit: ConnectionPermit,
    ) -> Response<ResponseBody> {
        let accept_key = match handshake::check(&request) {
            Ok(accept_key) => accept_key,
            Err(refusal) => return refusal.into_response(),
        };
        let source = EventSource {
            connection_id: connection_id(),
            connected_at: u64::try_from(now().as_millis()).unwrap_or(u64::MAX),
            source_ip: peer.ip().to_string(),
            stage: STAGE,
        };
        let upgrade = hyper::upgrade::on(&mut request);
        let agent_permit = match self.admit(request.headers(), request.uri(), &source).await {
            Ok(agent_permit) => agent_permit,
            Err(refusal) => return refusal,
        };
        let front = self.clone();
        self.tasks.spawn(async move {
            match upgrade.await {
                Ok(upgraded) => front.serve(upgraded, source).await,
                Err(error) => {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "the agent left during its handshake"
                    );
                    front.disconnected(&source, 1006, "").await;
                }
            }
            drop((agent_permit, connection_permit));
        });
        handshake::switching_protocols(accept_key)
    }

    /// Asks `$connect`. Lets a connection in with a place among its owner's, or returns why not; one that is no agent's needs no
    /// place.
    async fn admit(
        &self,
        headers: &HeaderMap,
        uri: &Uri,
        source: &EventSource,
    ) -> Result<Option<AgentPermit>, Response<ResponseBody>> {
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
        let failed = |error: ConnectError| {
            error!(error = &error as &dyn std::error::Error, "$connect failed");
            text(StatusCode::INTERNAL_SERVER_ERROR, "Internal server error\n")
        };
        let Some(caller) = self.connect.identify(&handshake).await.map_err(failed)? else {
            return Err(refused(HandshakeRefusal::NotAuthorized.into()));
        };
        let permit = match &caller {
            Caller::Agent(identity) => {
                let owner = identity.owner.clone();
                let permit = self.limit.acquire(owner, self.quotas.agents_of_one);
                Some(permit.ok_or_else(|| {
                    text(
                        StatusCode::TOO_MANY_REQUESTS,
                        "Too many agents of this owner are connected.\n",
                    )
                })?)
            }
            Caller::TicketHolder(_) => None,
        };
        let answer: RouteResponse = match self.transport {
            Transport::InProcess => {
                match self
                    .connect
                    .admit(&handshake, caller)
                    .await
                    .map_err(failed)?
                {
                    Admission::Refused(refusal) => refusal.into(),
                    Admission::Agent { .. } | Admission::ReplyConnection => RouteResponse::ok(),
                }
            }
            Transport::Emulated => self
                .connect
                .handle(source.connect(headers, uri))
                .await
                .map_err(failed)?,
        };
        if (200..300).contains(&answer.status_code) {
            Ok(permit)
        } else {
            Err(refused(answer))
        }
    }

    /// Serves a connection to its end.
    async fn serve(self: &Arc<Self>, upgraded: Upgraded, source: EventSource) {
        let config = WebSocketConfig::default()
            .read_buffer_size(MAX_FRAME_BYTES)
            .write_buffer_size(0)
            .max_frame_size(Some(self.quotas.frame))
            .max_message_size(Some(self.quotas.message));
        let socket =
            WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config))
                .await;
        let (sink, mut stream) = socket.split();
        let (commands, queue) = mpsc::channel(self.quotas.queue);
        let used = Arc::new(LastUsed::new());
        self.connections
            .insert(source.connection_id.clone(), commands.clone());
        let writer = self.tasks.spawn(write(sink, queue, used.clone()));
        let (code, reason) = self.read(&mut stream, &source, &used, &commands).await;
        self.connections.remove(&source.connection_id);
        self.replies.lose(&source.connection_id);
        drop(commands);
        // The writer ends by itself once the queue is closed, unless the agent does not read.
        let stuck = writer.abort_handle();
        let written = timeout(CLOSE_TIMEOUT, writer).await;
        stuck.abort();
        self.disconnected(&source, code, reason).await;
        if let Ok(Ok(sink)) = written
            && let Ok(mut socket) = stream.reunite(sink)
        {
            // Closed with bytes unread, the agent would be sent a reset, and might never see the close frame before it.
            let _ = timeout(
                CLOSE_TIMEOUT,
                tokio::io::copy(socket.get_mut(), &mut tokio::io::sink()),
            )
            .await;
        }
    }

    /// Reads messages until the connection ends, and returns the close code and reason of its end.
    async fn read(
        self: &Arc<Self>,
        stream: &mut SplitStream<Socket>,
        source: &EventSource,
        used: &LastUsed,
        commands: &mpsc::Sender<ConnectionCommand>,
    ) -> (u16, &'static str) {
        let end_of_life = Instant::now() + self.quotas.life;
        let mut heard = Instant::now();
        let handled_at_once = Arc::new(Semaphore::new(self.quotas.handled_at_once));
        let close = async |code, reason| {
            // Waits for room: the queue is emptied or the writer ends.
            let _ = timeout(
                CLOSE_TIMEOUT,
                commands.send(ConnectionCommand::Close(code, reason)),
            )
            .await;
            (code, reason)
        };
        let mut idle_at = used.last() + self.quotas.idle;
        loop {
            let message = tokio::select! {
                message = stream.next() => message,
                () = sleep_until(idle_at) => {
                    idle_at = used.last() + self.quotas.idle;
                    if Instant::now() >= idle_at {
                        return close(1001, "idle for too long").await;
                    }
                    continue;
                }
                () = sleep_until(heard + MAX_SILENCE) => return close(1001, "silent for too long").await,
                () = sleep_until(end_of_life) => return close(1001, "open for too long").await,
            };
            heard = Instant::now();
            match message {
                Some(Ok(Message::Text(text))) => {
                    used.now();
                    let permit = handled_at_once.clone().acquire_owned().await;
                    let (front, source, commands) =
                        (self.clone(), source.clone(), commands.clone());
                    let mut handling = Box::pin(async move {
                        front.message(&source, text.as_str(), &commands).await;
                        drop(permit);
                    });
                    // Most messages need nothing outside this process and are done at once. Only the others get a task.
                    if poll_fn(|context| Poll::Ready(handling.as_mut().poll(context)))
                        .await
                        .is_pending()
                    {
                        self.tasks.spawn(handling);
                    }
                }
                Some(Ok(Message::Binary(_))) => {
                    return close(1003, "binary frames are not supported").await;
                }
                // The protocol engine answers pings, and a close with a close.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Close(frame))) => {
                    return (
                        frame.map_or(1005, |frame| frame.code.into()),
                        "closed by the agent",
                    );
                }
                Some(Err(tungstenite::Error::Capacity(_))) => {
                    return close(1009, "frame or message too long").await;
                }
                Some(Err(tungstenite::Error::Utf8(_))) => {
                    return close(1007, "text that is not UTF-8").await;
                }
                Some(Err(tungstenite::Error::Protocol(_))) => {
                    return close(1002, "not WebSocket").await;
                }
                Some(Err(_)) | None => return (1006, "the connection broke"),
            }
        }
    }

    /// Checks the open connections again and again until `stop` is cancelled, so that one whose token was revoked ends though it
    /// says nothing and nobody visits it.
    pub(crate) async fn recheck(self: Arc<Self>, stop: CancellationToken) {
        let mut due = interval(self.quotas.recheck.max(MIN_RECHECK_INTERVAL));
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = due.tick() => {}
            }
            for connection in self.connections.ids() {
                if let Err(error) = self.default.check(&connection).await {
                    error!(%connection, error = &error as &dyn std::error::Error, "could not be checked");
                }
            }
        }
    }

    async fn message(
        &self,
        source: &EventSource,
        text: &str,
        commands: &mpsc::Sender<ConnectionCommand>,
    ) {
        let outcome = match self.transport {
            Transport::InProcess => self.default.message(&source.connection_id, text).await,
            Transport::Emulated => self.default.handle(source.message(text.to_owned())).await,
        };
        if let Err(error) = outcome {
            error!(connection = %source.connection_id, error = &error as &dyn std::error::Error, "$default failed");
            let said = serde_json::json!({ "message": "Internal server error", "connectionId": source.connection_id.as_str() });
            let _ = commands.try_send(ConnectionCommand::Send(said.to_string()));
        }
    }

    async fn disconnected(&self, source: &EventSource, code: u16, reason: &str) {
        if let Err(error) = self
            .disconnect
            .handle(source.disconnect(code, reason))
            .await
        {
            error!(connection = %source.connection_id, error = &error as &dyn std::error::Error, "$disconnect failed");
        }
    }
}

/// When a connection last carried a message, either way.
#[derive(Debug)]
struct LastUsed {
    opened: Instant,
    milliseconds: AtomicU64,
}

impl LastUsed {
    fn new() -> Self {
        Self {
            opened: Instant::now(),
            milliseconds: AtomicU64::new(0),
        }
    }

    fn now(&self) {
        self.milliseconds.store(
            u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
    }

    fn last(&self) -> Instant {
        self.opened + Duration::from_millis(self.milliseconds.load(Ordering::Relaxed))
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

/// An id that nobody can guess, in the form of API Gateway's.
fn connection_id() -> ConnectionId {
    const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let mut random = rand::rng();
    let text: String = (0..15)
        .map(|_| char::from(ALPHABET[random.random_range(0..ALPHABET.len())]))
        .collect();
    (text + "=")
        .parse()
        .expect("letters, digits and = make a connection id")
}

/// Writes what the functions send, in frames no longer than API Gateway's, until the queue is closed or says so.
async fn write(
    mut sink: SplitSink<Socket, Message>,
    mut queue: mpsc::Receiver<ConnectionCommand>,
    used: Arc<LastUsed>,
) -> SplitSink<Socket, Message> {
    let mut ping = interval(PING_INTERVAL);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let command = tokio::select! {
            command = queue.recv() => command,
            _ = ping.tick() => {
                if sink.send(Message::Ping(Bytes::new())).await.is_err() {
                    return sink;
                }
                continue;
            }
        };
        match command {
            Some(ConnectionCommand::Send(text)) => {
                if send(&mut sink, text).await.is_err() {
                    return sink;
                }
                used.now();
            }
            Some(ConnectionCommand::Close(code, reason)) => {
                let frame = CloseFrame {
                    code: CloseCode::from(code),
                    reason: reason.into(),
                };
                let _ = sink.send(Message::Close(Some(frame))).await;
                break;
            }
            None => break,
        }
    }
    let _ = sink.close().await;
    sink
}

/// Sends a text in frames no longer than API Gateway's.
///
/// # Errors
/// When the connection has ended.
pub async fn send<S: Sink<Message, Error = tungstenite::Error> + Unpin>(
    sink: &mut S,
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
