//! The WebSocket API: agents' connections, with API Gateway's quotas and its close codes.

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, stream::SplitSink};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use hyper::{body::Incoming, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use rand::RngExt;
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, sleep_until},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        handshake::derive_accept_key,
        protocol::{
            CloseFrame, Role, WebSocketConfig,
            frame::{
                Frame,
                coding::{CloseCode, Data, OpCode},
            },
        },
    },
};
use tokio_util::task::TaskTracker;
use tracing::{error, warn};
use tunnel_connect::Connect;
use tunnel_default::DefaultRoute;
use tunnel_disconnect::Disconnect;
use tunnel_forward::answer::{self, AnswerBody};
use tunnel_shared::{cloud::now, id::ConnectionId, limits::WEBSOCKET_FRAME};

use crate::{
    connections::{Command, Connections, STAGE},
    event::Source,
    quotas::Quotas,
    visitors::say,
};

/// Where agents connect.
pub const PATH: &str = "/_ws";

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// The WebSocket API.
#[derive(Clone, Debug)]
pub struct WebSocketFront {
    /// The function of `$connect`.
    pub connect: Connect,
    /// The function of `$default`.
    pub default: DefaultRoute,
    /// The function of `$disconnect`.
    pub disconnect: Disconnect,
    /// Where open connections are known.
    pub connections: Connections,
    /// What they may do.
    pub quotas: Quotas,
    /// Holds a task for each connection and each message being handled.
    pub tasks: TaskTracker,
}

impl WebSocketFront {
    /// Answers a handshake: 101 if `$connect` lets the agent in, and what it says otherwise.
    pub async fn accept(&self, mut request: Request<Incoming>, peer: SocketAddr) -> Response<AnswerBody> {
        let Some(accept_key) = accept_key(request.headers()) else {
            let mut response = say(StatusCode::UPGRADE_REQUIRED, "This is where agents connect with a WebSocket.\n");
            response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            return response;
        };
        if request.headers().contains_key(header::ORIGIN) {
            // Only browsers send it: a page that the user visits must not open tunnels on the user's machine.
            return say(StatusCode::FORBIDDEN, "Web pages cannot be agents.\n");
        }
        let source = Source {
            connection_id: connection_id(),
            connected_at: u64::try_from(now().as_millis()).unwrap_or(u64::MAX),
            source_ip: peer.ip().to_string(),
            stage: STAGE,
        };
        let outcome = self.connect.handle(source.connect(request.headers(), request.uri())).await;
        let route = match outcome {
            Ok(route) => route,
            Err(error) => {
                error!(error = &error as &dyn std::error::Error, "$connect failed");
                return say(StatusCode::INTERNAL_SERVER_ERROR, "Internal server error\n");
            }
        };
        if !(200..300).contains(&route.status_code) {
            let mut response = Response::new(answer::whole(route.body.unwrap_or_default()));
            *response.status_mut() = StatusCode::from_u16(route.status_code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            return response;
        }
        let upgrade = hyper::upgrade::on(&mut request);
        let front = self.clone();
        self.tasks.spawn(async move {
            match upgrade.await {
                Ok(upgraded) => front.serve(upgraded, source).await,
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "the agent left during its handshake");
                    front.disconnected(&source, 1006, "").await;
                }
            }
        });
        let mut response = Response::new(answer::whole(Bytes::new()));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept_key);
        response
    }

    /// Serves a connection to its end.
    async fn serve(&self, upgraded: Upgraded, source: Source) {
        let config = WebSocketConfig::default()
            .read_buffer_size(WEBSOCKET_FRAME)
            .write_buffer_size(0)
            .max_frame_size(Some(self.quotas.frame))
            .max_message_size(Some(self.quotas.message));
        let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await;
        let (sink, stream) = socket.split();
        let (commands, queue) = mpsc::channel(self.quotas.queue);
        let (used, use_times) = mpsc::channel(1);
        self.connections.insert(source.connection_id.clone(), commands.clone());
        let writer = self.tasks.spawn(write(sink, queue, used));
        let (code, reason) = self.read(stream, &source, use_times, &commands).await;
        self.connections.remove(&source.connection_id);
        drop(commands);
        // The writer ends by itself once the queue is closed, unless the agent does not read.
        let stuck = writer.abort_handle();
        if tokio::time::timeout(std::time::Duration::from_secs(2), writer).await.is_err() {
            stuck.abort();
        }
        self.disconnected(&source, code, reason).await;
    }

    /// Reads messages until the connection ends, and returns the close code and reason of its end.
    async fn read(
        &self,
        mut stream: futures_util::stream::SplitStream<Socket>,
        source: &Source,
        mut sent: mpsc::Receiver<()>,
        commands: &mpsc::Sender<Command>,
    ) -> (u16, &'static str) {
        let end_of_life = Instant::now() + self.quotas.life;
        let mut idle_at = Instant::now() + self.quotas.idle;
        let handled_at_once = Arc::new(Semaphore::new(self.quotas.handled_at_once));
        let close = async |code, reason| {
            // Waits for room: the queue is emptied or the writer ends.
            let _ = commands.send(Command::Close(code, reason)).await;
            (code, reason)
        };
        loop {
            let message = tokio::select! {
                message = stream.next() => message,
                Some(()) = sent.recv() => {
                    idle_at = Instant::now() + self.quotas.idle;
                    continue;
                }
                () = sleep_until(idle_at) => return close(1001, "idle for too long").await,
                () = sleep_until(end_of_life) => return close(1001, "open for too long").await,
            };
            match message {
                Some(Ok(Message::Text(text))) => {
                    idle_at = Instant::now() + self.quotas.idle;
                    let permit = handled_at_once.clone().acquire_owned().await;
                    let (front, source, commands) = (self.clone(), source.clone(), commands.clone());
                    self.tasks.spawn(async move {
                        front.message(&source, text.as_str().to_owned(), &commands).await;
                        drop(permit);
                    });
                }
                Some(Ok(Message::Binary(_))) => return close(1003, "binary frames are not supported").await,
                // The protocol engine answers pings, and a close with a close.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Close(frame))) => return (frame.map_or(1005, |frame| frame.code.into()), "closed by the agent"),
                Some(Err(tungstenite::Error::Capacity(_))) => return close(1009, "over the frame or message limit").await,
                Some(Err(tungstenite::Error::Utf8(_))) => return close(1007, "text that is not UTF-8").await,
                Some(Err(tungstenite::Error::Protocol(_))) => return close(1002, "not WebSocket").await,
                Some(Err(_)) | None => return (1006, "the connection broke"),
            }
        }
    }

    async fn message(&self, source: &Source, body: String, commands: &mpsc::Sender<Command>) {
        if let Err(error) = self.default.handle(source.message(body)).await {
            error!(connection = %source.connection_id, error = &error as &dyn std::error::Error, "$default failed");
            let said = serde_json::json!({ "message": "Internal server error", "connectionId": source.connection_id.as_str() });
            let _ = commands.try_send(Command::Send(said.to_string()));
        }
    }

    async fn disconnected(&self, source: &Source, code: u16, reason: &str) {
        if let Err(error) = self.disconnect.handle(source.disconnect(code, reason)).await {
            error!(connection = %source.connection_id, error = &error as &dyn std::error::Error, "$disconnect failed");
        }
    }
}

/// The answer to a handshake's key; none when the request is no WebSocket handshake (RFC 6455, 4.2.1).
fn accept_key(headers: &HeaderMap) -> Option<HeaderValue> {
    let has = |name, word: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value: &HeaderValue| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|part| part.trim().eq_ignore_ascii_case(word))
    };
    let is_handshake = has(header::UPGRADE, "websocket") && has(header::CONNECTION, "upgrade") && has(header::SEC_WEBSOCKET_VERSION, "13");
    let key = headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| is_handshake)?;
    HeaderValue::from_str(&derive_accept_key(key.as_bytes())).ok()
}

/// An id that nobody can guess, in the form of API Gateway's.
fn connection_id() -> ConnectionId {
    const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let mut random = rand::rng();
    let text: String = (0..15).map(|_| char::from(ALPHABET[random.random_range(0..ALPHABET.len())])).collect();
    (text + "=").parse().expect("letters, digits and = make a connection id")
}

/// Writes what the functions send, in frames no longer than API Gateway's, until the queue is closed or says so.
async fn write(mut sink: SplitSink<Socket, Message>, mut queue: mpsc::Receiver<Command>, sent: mpsc::Sender<()>) {
    while let Some(command) = queue.recv().await {
        let outcome = match command {
            Command::Send(text) => send(&mut sink, text).await,
            Command::Close(code, reason) => {
                let frame = CloseFrame { code: CloseCode::from(code), reason: reason.into() };
                let _ = sink.send(Message::Close(Some(frame))).await;
                let _ = sink.close().await;
                return;
            }
        };
        if outcome.is_err() {
            return;
        }
        // The reader resets its idle timer; one notice waiting for it is enough.
        let _ = sent.try_send(());
    }
    let _ = sink.close().await;
}

async fn send(sink: &mut SplitSink<Socket, Message>, text: String) -> Result<(), tungstenite::Error> {
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
