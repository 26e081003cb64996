//! The WebSocket API and its @connections: agents' connections and the functions' reply connections, with API Gateway's quotas.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing,
};
use futures_util::{StreamExt, stream::SplitStream};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, Message, protocol::Role},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tunnel_local_aws::{
    caller::AccessKey,
    events::EventSource,
    management::{self, Connection, ConnectionRegistry, STAGE, SocketConnection},
    quotas::Quotas,
};
use tunnel_protocol::{
    frames,
    id::{ConnectionId, RequestId},
    limits::WEBSOCKET_INTEGRATION_TIMEOUT,
    message,
    message::{FromAgent, ToAgent},
    writer::MessageWriter,
};
use tunnel_service::now;

use crate::{
    lambda::{Lambda, Outcome},
    latency::{self, Latency},
    meter::Meter,
};

/// What a WebSocket API counts as one message, in bytes.
pub const UNIT: usize = 32 * 1024;

/// The API.
pub struct AgentConnections {
    lambda: Arc<Lambda>,
    latency: Latency,
    meter: Meter,
    quotas: Quotas,
    connections: ConnectionRegistry,
    /// Reply connections, and what breaks them.
    reply_connections: Mutex<HashMap<ConnectionId, CancellationToken>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl AgentConnections {
    /// An API with the routes' functions.
    pub fn new(lambda: Arc<Lambda>, latency: Latency, meter: Meter) -> Arc<Self> {
        let (connections, reply_connections, tasks, stop) = Default::default();
        Arc::new(Self {
            lambda,
            latency,
            meter,
            quotas: Quotas::default(),
            connections,
            reply_connections,
            tasks,
            stop,
        })
    }

    /// Breaks all reply connections without a word, and returns how many there were.
    pub fn break_reply_connections(&self) -> usize {
        let broken: Vec<CancellationToken> = self
            .reply_connections()
            .drain()
            .map(|(_, connection)| connection)
            .collect();
        broken.iter().for_each(CancellationToken::cancel);
        broken.len()
    }

    /// Breaks all connections.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Held between awaits only.
    fn reply_connections(&self) -> MutexGuard<'_, HashMap<ConnectionId, CancellationToken>> {
        self.reply_connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    async fn call(&self, function: &'static str, event: &impl serde::Serialize) -> Outcome {
        let _under_way = self.meter.begin();
        self.latency.pause(latency::WEBSOCKET_API).await;
        self.lambda
            .invoke(function, event, WEBSOCKET_INTEGRATION_TIMEOUT)
            .await
    }

    async fn connect(self: &Arc<Self>, mut request: Request) -> Response {
        let _under_way = self.meter.begin();
        self.latency.pause(latency::HANDSHAKE).await;
        let Some(accept) = local::accept_key(request.headers()) else {
            return StatusCode::UPGRADE_REQUIRED.into_response();
        };
        let id = RequestId::generate().to_string();
        let source = EventSource {
            connection_id: id.parse().expect("a request id is a connection id, too"),
            connected_at: u64::try_from(now().as_millis()).unwrap_or(u64::MAX),
            source_ip: "203.0.113.10".to_owned(),
            stage: STAGE,
        };
        let handshake = source.connect(request.headers(), request.uri());
        let status = self.ask_connect(&handshake).await;
        if !status.is_success() {
            return status.into_response();
        }
        let is_reply_connection = request
            .uri()
            .query()
            .is_some_and(|query| query.contains("reply="));
        let broken = self.stop.child_token();
        if is_reply_connection {
            self.reply_connections()
                .insert(source.connection_id.clone(), broken.clone());
        }
        let upgrade = hyper::upgrade::on(&mut request);
        let api = self.clone();
        self.tasks.spawn(async move {
            if let Ok(upgraded) = upgrade.await {
                api.serve(upgraded, &source, &broken).await;
            }
            api.connections.remove(&source.connection_id);
            api.reply_connections().remove(&source.connection_id);
            if !api.stop.is_cancelled() {
                api.call("tunnel-disconnect", &source.disconnect(1006, ""))
                    .await;
            }
        });
        let mut response = (
            StatusCode::SWITCHING_PROTOCOLS,
            [
                (header::UPGRADE, "websocket"),
                (header::CONNECTION, "Upgrade"),
            ],
        )
            .into_response();
        response
            .headers_mut()
            .insert(header::SEC_WEBSOCKET_ACCEPT, accept);
        response
    }

    /// The status with which `connect` answers a handshake.
    async fn ask_connect(&self, handshake: &impl serde::Serialize) -> StatusCode {
        let status = match self.call("tunnel-connect", handshake).await {
            Outcome::Whole(answer) => serde_json::from_slice::<serde_json::Value>(&answer)
                .ok()
                .and_then(|answer| answer["statusCode"].as_u64()),
            Outcome::Stream(_) | Outcome::Failed(_) => None,
        };
        status
            .and_then(|status| StatusCode::from_u16(u16::try_from(status).ok()?).ok())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// Serves a connection until it ends or is broken.
    async fn serve(
        self: &Arc<Self>,
        upgraded: Upgraded,
        source: &EventSource,
        broken: &CancellationToken,
    ) {
        let config = frames::server_config(self.quotas.frame, self.quotas.message);
        let socket =
            WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config))
                .await;
        let (sink, mut stream) = socket.split();
        let (sender, writer) = MessageWriter::new(sink, None);
        let connection = SocketConnection::new(sender);
        self.connections
            .insert(source.connection_id.clone(), connection.clone());
        let writing = self.tasks.spawn(writer.run());
        let code = self.read(&mut stream, source, &connection, broken).await;
        connection.close(code, "");
        if broken.is_cancelled() {
            writing.abort();
        }
    }

    /// Reads until the connection ends, and returns its close code.
    async fn read(
        self: &Arc<Self>,
        stream: &mut SplitStream<Socket>,
        source: &EventSource,
        connection: &SocketConnection,
        broken: &CancellationToken,
    ) -> u16 {
        loop {
            let message = tokio::select! {
                () = broken.cancelled() => return 1006,
                () = connection.closing().cancelled() => return 1000,
                message = stream.next() => message,
            };
            match message {
                Some(Ok(Message::Text(text))) => {
                    let (api, source, connection) =
                        (self.clone(), source.clone(), connection.clone());
                    self.tasks.spawn(async move {
                        api.message(&source, text.as_str(), &connection).await;
                    });
                }
                Some(Ok(Message::Binary(_))) => return 1003,
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Err(tungstenite::Error::Capacity(_))) => return 1009,
                Some(Ok(Message::Close(_)) | Err(_)) | None => return 1000,
            }
        }
    }

    async fn message(&self, source: &EventSource, text: &str, connection: &SocketConnection) {
        let _under_way = self.meter.begin();
        let units = units(text.len());
        let is_ping = matches!(message::decode(text), Ok(FromAgent::Ping { .. }));
        self.meter.count(|counts| {
            *(if is_ping {
                &mut counts.units_of_pings
            } else {
                &mut counts.units_in
            }) += units;
        });
        if let Outcome::Failed(_) = self
            .call("tunnel-default", &source.message(text.to_owned()))
            .await
        {
            let said = json!({ "message": "Internal server error", "connectionId": source.connection_id.as_str() });
            let _ = connection.sender().try_control(said.to_string());
        }
    }

    /// @connections: adds its latency, sends or closes, and counts what was sent.
    async fn manage(self: &Arc<Self>, request: Request, next: Next) -> Response {
        let _under_way = self.meter.begin();
        self.latency.pause(latency::POST).await;
        let is_post = request.method() == Method::POST;
        let id = request
            .uri()
            .path()
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned();
        let (head, body) = request.into_parts();
        let Ok(body) = axum::body::to_bytes(body, 2 * self.quotas.message).await else {
            return StatusCode::PAYLOAD_TOO_LARGE.into_response();
        };
        let units = units(body.len());
        let is_pong = matches!(
            std::str::from_utf8(&body).map(message::decode),
            Ok(Ok(ToAgent::Pong { .. }))
        );
        let is_relayed = id
            .parse()
            .is_ok_and(|id: ConnectionId| self.reply_connections().contains_key(&id));
        let response = next.run(Request::from_parts(head, Body::from(body))).await;
        if is_post && response.status().is_success() {
            self.meter.count(|counts| match (is_pong, is_relayed) {
                (true, _) => counts.units_of_pings += units,
                (false, true) => counts.units_relayed += units,
                (false, false) => counts.units_out += units,
            });
        }
        response
    }
}

/// The API under its stage, and @connections below it.
pub fn router(api: &Arc<AgentConnections>) -> Router {
    let connect = async |State(api): State<Arc<AgentConnections>>, request: Request| {
        api.connect(request).await
    };
    let manage = async |State(api): State<Arc<AgentConnections>>, request: Request, next: Next| {
        api.manage(request, next).await
    };
    let management = management::router(api.connections.clone(), api.quotas, AccessKey::any())
        .layer(middleware::from_fn_with_state(api.clone(), manage));
    Router::new()
        .route(&format!("/{STAGE}"), routing::get(connect))
        .with_state(api.clone())
        .merge(management)
}

/// How many messages a text counts as.
pub fn units(bytes: usize) -> u64 {
    bytes.div_ceil(UNIT).max(1) as u64
}

type Socket = WebSocketStream<TokioIo<Upgraded>>;
