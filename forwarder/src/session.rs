//! One connection to the service, from the upgrade to its end.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, stream::SplitSink};
use http::{HeaderValue, StatusCode, header};
use tokio::{
    net::TcpStream,
    sync::mpsc::{self, error::TrySendError},
    task::{AbortHandle, JoinSet},
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async_with_config,
    tungstenite::{
        self, Message,
        client::IntoClientRequest,
        protocol::{
            WebSocketConfig,
            frame::{
                Frame,
                coding::{Data, OpCode},
            },
        },
    },
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use tunnel_shared::{
    id::{RequestId, TunnelId},
    limits::{PARTS_AHEAD, WEBSOCKET_FRAME, WEBSOCKET_MESSAGE},
    parts::Reorder,
    protocol::{
        self, AgentError, AgentErrorCode, BodyPart, ConnectionEstablished, FEATURES, Feature, FromAgent, HttpRequest, Ready, ToAgent,
    },
};

use crate::{
    event::Event,
    exchange::{self, Context},
    origin::Origin,
    settings::Settings,
};

/// How long connecting and becoming ready may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How often a ping frame asks whether the service is still there.
const PING_FRAME: Duration = Duration::from_secs(5);
/// How often a `ping` message does so where pings are answered: under API Gateway's 10 minutes without a message.
const PING_MESSAGE: Duration = Duration::from_secs(5 * 60);
/// How often a `ping` message does so where ping frames are not answered. Each is billed, so no more often than it takes to
/// notice a dead connection within half a minute.
const PING_MESSAGE_ALONE: Duration = Duration::from_secs(15);
/// A connection on which nothing was heard for this long, though it was asked, is dead.
const SILENCE: Duration = Duration::from_secs(25);
/// How long requests in flight may take to finish once the agent is told to stop.
const GRACE: Duration = Duration::from_secs(10);
/// Messages on their way out. Each is up to [`WEBSOCKET_MESSAGE`] long; more wait where they are made.
const OUTGOING: usize = 32;
/// How many ended requests are remembered, so that one that comes twice is not carried out twice.
const REMEMBERED: usize = 1024;

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// How a session ended.
#[derive(Debug)]
pub enum Ended {
    /// As asked.
    Stopped,
    /// The service will not have this agent. Trying again would not help.
    Refused(Refused),
    /// Another connection of the owner has taken the tunnel over.
    Replaced(String),
    /// The connection could not be made, or broke.
    Lost {
        /// Why.
        reason: String,
        /// How long the tunnel was open.
        open: Duration,
    },
}

/// Why the service will not have an agent.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Refused {
    /// 401 or 403.
    Unauthorized,
    /// 409.
    NameTaken,
    /// 400, with the service's words.
    Invalid(String),
}

/// Opens a connection and serves it to its end. `tunnel_id` is asked for, and set to what the service gave.
pub async fn run(
    settings: &Settings,
    origin: &Origin,
    tunnel_id: &mut Option<TunnelId>,
    observe: &(dyn Fn(Event) + Send + Sync),
    stop: &CancellationToken,
) -> Ended {
    let lost = |reason: String| Ended::Lost { reason, open: Duration::ZERO };
    let opened = tokio::select! {
        () = stop.cancelled() => return Ended::Stopped,
        opened = timeout(HANDSHAKE, open(settings, tunnel_id.as_ref())) => opened,
    };
    let (socket, established) = match opened {
        Err(_) => return lost(format!("the service did not answer within {HANDSHAKE:?}")),
        Ok(Err(OpenError::Refused(refused))) => return Ended::Refused(refused),
        Ok(Err(OpenError::Failed(reason))) => return lost(reason),
        Ok(Ok(opened)) => opened,
    };
    *tunnel_id = Some(established.tunnel_id.clone());
    observe(Event::Online { public_url: established.public_url.clone(), target: origin.target().to_string() });
    Session::serve(settings, origin, socket, &established, observe, stop).await
}

enum OpenError {
    Refused(Refused),
    Failed(String),
}

async fn open(settings: &Settings, tunnel_id: Option<&TunnelId>) -> Result<(Socket, ConnectionEstablished), OpenError> {
    let mut request =
        settings.endpoint.asking_for(tunnel_id).into_client_request().map_err(|error| OpenError::Failed(error.to_string()))?;
    if let Some(token) = &settings.token {
        let mut value = HeaderValue::from_str(&format!("Bearer {}", token.reveal()))
            .map_err(|_| OpenError::Refused(Refused::Invalid("the token has characters that no token has".to_owned())))?;
        value.set_sensitive(true);
        request.headers_mut().insert(header::AUTHORIZATION, value);
    }
    let config = WebSocketConfig::default()
        .read_buffer_size(WEBSOCKET_FRAME)
        .write_buffer_size(0)
        .max_message_size(Some(2 * WEBSOCKET_MESSAGE))
        .max_frame_size(Some(2 * WEBSOCKET_MESSAGE));
    let (mut socket, _) = connect_async_with_config(request, Some(config), true).await.map_err(open_error)?;
    let ready = Ready {
        protocol: Some(protocol::VERSION),
        features: FEATURES.to_vec(),
        agent: Some(concat!("ttf/", env!("CARGO_PKG_VERSION")).to_owned()),
    };
    socket.send(Message::text(protocol::encode(&FromAgent::Ready(ready)))).await.map_err(open_error)?;
    loop {
        match socket.next().await {
            Some(Ok(Message::Text(text))) => match protocol::decode(&text) {
                Ok(ToAgent::ConnectionEstablished(established)) => return Ok((socket, established)),
                Ok(ToAgent::Error { message }) => return Err(OpenError::Failed(message)),
                _ => debug!("message before connection_established ignored"),
            },
            Some(Ok(Message::Close(frame))) => {
                let reason = frame.map(|frame| format!(" ({}: {})", frame.code, frame.reason)).unwrap_or_default();
                return Err(OpenError::Failed(format!("the service closed the connection{reason}")));
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(open_error(error)),
            None => return Err(OpenError::Failed("the service closed the connection".to_owned())),
        }
    }
}

fn open_error(error: tungstenite::Error) -> OpenError {
    let tungstenite::Error::Http(response) = error else { return OpenError::Failed(error.to_string()) };
    let said = response.body().as_deref().map(|body| String::from_utf8_lossy(body).into_owned()).unwrap_or_default();
    match response.status() {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => OpenError::Refused(Refused::Unauthorized),
        StatusCode::CONFLICT => OpenError::Refused(Refused::NameTaken),
        StatusCode::BAD_REQUEST => OpenError::Refused(Refused::Invalid(said)),
        status => OpenError::Failed(format!("the service answered the handshake with {status}")),
    }
}

/// A request that is being carried out.
struct InFlight {
    task: AbortHandle,
    body: Option<UploadedBody>,
}

/// The rest of a request's body, on its way to the local service.
struct UploadedBody {
    parts: Reorder<BodyPart>,
    to_origin: mpsc::Sender<Bytes>,
}

struct Session<'a> {
    context: Context,
    max_concurrent: usize,
    requests: HashMap<RequestId, InFlight>,
    running: JoinSet<(RequestId, Event)>,
    ended: VecDeque<RequestId>,
    observe: &'a (dyn Fn(Event) + Send + Sync),
    is_draining: bool,
}

enum Taken {
    Continue,
    Replaced(String),
}

impl<'a> Session<'a> {
    async fn serve(
        settings: &Settings,
        origin: &Origin,
        socket: Socket,
        established: &ConnectionEstablished,
        observe: &'a (dyn Fn(Event) + Send + Sync),
        stop: &CancellationToken,
    ) -> Ended {
        let (sink, mut stream) = socket.split();
        let (outgoing, queue) = mpsc::channel(OUTGOING);
        let (ping, pings) = mpsc::channel(1);
        let mut writer = JoinSet::new();
        writer.spawn(write(sink, queue, pings));
        let parts = established.features.contains(&Feature::BodyParts);
        let context = Context { origin: origin.clone(), timeout: settings.request_timeout, parts, outgoing: outgoing.clone() };
        let mut session = Self {
            context,
            max_concurrent: settings.max_concurrent,
            requests: HashMap::new(),
            running: JoinSet::new(),
            ended: VecDeque::new(),
            observe,
            is_draining: false,
        };
        let opened = Instant::now();
        let (mut heard, mut pinged, mut answers_pings) = (opened, opened, false);
        let mut give_up = None;
        let mut tick = interval(PING_FRAME);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let lost = |reason: String| Ended::Lost { reason, open: opened.elapsed() };
        let ended = loop {
            tokio::select! {
                message = stream.next() => {
                    heard = Instant::now();
                    match message {
                        Some(Ok(Message::Text(text))) => match session.take(&text).await {
                            Taken::Continue => {}
                            Taken::Replaced(reason) => break Ended::Replaced(reason),
                        },
                        Some(Ok(Message::Pong(_))) => answers_pings = true,
                        Some(Ok(Message::Close(frame))) => {
                            let reason = frame.map(|frame| format!(" ({})", frame.code)).unwrap_or_default();
                            break lost(format!("the service closed the connection{reason}"));
                        }
                        Some(Ok(_)) => {}
                        Some(Err(error)) => break lost(error.to_string()),
                        None => break lost("the connection broke".to_owned()),
                    }
                }
                Some(done) = session.running.join_next() => session.finish(done),
                Some(failed) = writer.join_next() => break lost(failed.ok().flatten().unwrap_or_else(|| "the connection broke".to_owned())),
                now = tick.tick() => {
                    if heard.elapsed() > SILENCE && (answers_pings || pinged > heard) {
                        break lost(format!("nothing was heard for {} s", heard.elapsed().as_secs()));
                    }
                    // A full queue means that the writer has not got round to the last one.
                    let _ = ping.try_send(());
                    if now - pinged >= if answers_pings { PING_MESSAGE } else { PING_MESSAGE_ALONE } {
                        pinged = now;
                        let _ = outgoing.try_send(protocol::encode(&FromAgent::Ping));
                    }
                }
                () = stop.cancelled(), if !session.is_draining => {
                    session.is_draining = true;
                    give_up = Some(Instant::now() + GRACE);
                    (session.observe)(Event::Draining { in_flight: session.requests.len() });
                }
                () = tokio::time::sleep_until(give_up.unwrap_or(opened)), if give_up.is_some() => break Ended::Stopped,
            }
            if session.is_draining && session.requests.is_empty() {
                break Ended::Stopped;
            }
        };
        session.running.shutdown().await;
        drop((session, outgoing, ping));
        // With all senders gone the writer sends what is queued, closes and ends.
        if matches!(ended, Ended::Stopped | Ended::Replaced(_)) {
            let _ = timeout(Duration::from_secs(2), writer.join_next()).await;
        }
        ended
    }

    async fn take(&mut self, text: &str) -> Taken {
        match protocol::decode(text) {
            Ok(ToAgent::HttpRequest(request)) => self.start(request).await,
            Ok(ToAgent::BodyPart(part)) => self.body_part(part),
            Ok(ToAgent::Cancel { request_id }) => {
                if let Some(request) = self.requests.remove(&request_id) {
                    debug!(request = %request_id, "cancelled");
                    request.task.abort();
                    self.remember(request_id);
                }
            }
            Ok(ToAgent::Replaced { reason }) => return Taken::Replaced(reason),
            Ok(ToAgent::UrlUpdated { public_url }) => {
                (self.observe)(Event::Online { public_url, target: self.context.origin.target().to_string() });
            }
            Ok(ToAgent::Error { message }) => warn!(message, "the service refused a message"),
            Ok(ToAgent::Pong | ToAgent::ConnectionEstablished(_) | ToAgent::Unknown) => {}
            // API Gateway itself may speak up: {"message": "Internal server error", ..}
            Err(error) => warn!(error = &error as &dyn std::error::Error, "message ignored"),
        }
        Taken::Continue
    }

    async fn start(&mut self, request: HttpRequest) {
        let id = request.request_id.clone();
        if self.requests.contains_key(&id) || self.ended.contains(&id) {
            debug!(request = %id, "request came twice");
            return;
        }
        if self.is_draining || self.requests.len() >= self.max_concurrent {
            let message = if self.is_draining { "the agent is stopping" } else { "the agent takes no more requests at once" };
            let error = AgentError { request_id: Some(id), code: AgentErrorCode::Busy, message: message.to_owned() };
            // The queue being full is what busy means; waiting here would keep the connection from being read.
            let _ = self.context.outgoing.try_send(protocol::encode(&FromAgent::Error(error)));
            return;
        }
        let (body, more) = if request.more {
            let (to_origin, parts) = mpsc::channel(PARTS_AHEAD);
            (Some(UploadedBody { parts: Reorder::starting_at(1), to_origin }), Some(parts))
        } else {
            (None, None)
        };
        let context = self.context.clone();
        let task = self.running.spawn({
            let id = id.clone();
            async move { (id, exchange::run(context, request, more).await) }
        });
        self.requests.insert(id, InFlight { task, body });
    }

    /// Hands a part to the local service. A request whose part cannot be handed on is dropped: its body would be cut.
    fn body_part(&mut self, part: BodyPart) {
        let Some(request) = self.requests.get_mut(&part.request_id) else { return };
        let Some(body) = &mut request.body else { return };
        let id = part.request_id.clone();
        if let Err(error) = body.parts.insert(part.part, part) {
            return self.drop_request(id, error.to_string());
        }
        while let Some(part) = body.parts.take_next() {
            match body.to_origin.try_send(part.body.0) {
                // The local service has answered without reading all; that is its right.
                Ok(()) | Err(TrySendError::Closed(_)) => {}
                Err(TrySendError::Full(_)) => return self.drop_request(id, "the local service reads the request too slowly".to_owned()),
            }
            if !part.more {
                if let Some(request) = self.requests.get_mut(&id) {
                    request.body = None;
                }
                return;
            }
        }
    }

    /// Ends a request that cannot be completed, and says so.
    fn drop_request(&mut self, id: RequestId, message: String) {
        warn!(request = %id, message, "request dropped");
        if let Some(request) = self.requests.remove(&id) {
            request.task.abort();
        }
        let error = AgentError { request_id: Some(id.clone()), code: AgentErrorCode::Busy, message };
        // A full queue delays the news until the visitor's time is up; waiting here would stop the connection.
        let _ = self.context.outgoing.try_send(protocol::encode(&FromAgent::Error(error)));
        self.remember(id);
    }

    fn finish(&mut self, done: Result<(RequestId, Event), tokio::task::JoinError>) {
        let (id, event) = match done {
            Ok(done) => done,
            Err(ended) => {
                // Aborted, and removed by whoever aborted it; or ended by a bug, and not removed yet.
                self.requests.retain(|_, request| request.task.id() != ended.id());
                return;
            }
        };
        self.requests.remove(&id);
        self.remember(id);
        (self.observe)(event);
    }

    fn remember(&mut self, id: RequestId) {
        if self.ended.len() == REMEMBERED {
            self.ended.pop_front();
        }
        self.ended.push_back(id);
    }
}

/// Writes messages in frames that API Gateway takes, until all senders are gone. Returns why it could not.
async fn write(mut sink: SplitSink<Socket, Message>, mut queue: mpsc::Receiver<String>, mut pings: mpsc::Receiver<()>) -> Option<String> {
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

async fn write_text(sink: &mut SplitSink<Socket, Message>, text: String) -> Result<(), tungstenite::Error> {
    if text.len() <= WEBSOCKET_FRAME {
        return sink.send(Message::text(text)).await;
    }
    let mut rest = Bytes::from(text);
    let mut data = Data::Text;
    while !rest.is_empty() {
        let frame = rest.split_to(rest.len().min(WEBSOCKET_FRAME));
        sink.feed(Message::Frame(Frame::message(frame, OpCode::Data(data), rest.is_empty()))).await?;
        data = Data::Continue;
    }
    sink.flush().await
}
