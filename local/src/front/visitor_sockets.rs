//! The visitors' WebSocket API behind its edge, for the shape in which every step is as in AWS: the handshake and each message are
//! events, and the functions reach a visitor through @connections.

use std::sync::Arc;

use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{CloseFrame, Role, frame::coding::CloseCode},
    },
};
use tracing::{error, warn};
use tunnel_default::DefaultRoute;
use tunnel_disconnect::Disconnect;
use tunnel_forward::{
    Forward,
    edge::EdgeSecrets,
    request::VisitorRequest,
    response::{self, ResponseBody},
};
use tunnel_local_aws::{
    events::EventSource,
    management::{ConnectionCommand, ConnectionRegistry},
    quotas::Quotas,
};
use tunnel_protocol::frames;
use tunnel_service::{auth::token, aws::route_event::VISITORS_STAGE, now};

use crate::{
    front::{
        agents::connection_id,
        handshake::{self, accept_key},
        response::text,
    },
    subsystem::Subsystem,
};

/// Messages on their way to one visitor.
const QUEUED: usize = 16;

/// The API.
#[derive(Debug)]
pub(crate) struct VisitorSockets {
    /// The function of `$connect`.
    pub(crate) forward: Forward,
    /// The function of `$default`.
    pub(crate) default: DefaultRoute,
    /// The function of `$disconnect`.
    pub(crate) disconnect: Disconnect,
    /// Where open connections are known.
    pub(crate) connections: ConnectionRegistry,
    /// What they may do.
    pub(crate) quotas: Quotas,
    /// By which the functions know the edge.
    pub(crate) secret: EdgeSecret,
    /// Carries the connections.
    pub(crate) subsystem: Subsystem,
}

/// The secret of the edge, which is made anew for each server.
#[derive(Clone)]
pub(crate) struct EdgeSecret(String);

impl EdgeSecret {
    pub(crate) fn generate() -> Self {
        Self(token::generate_token())
    }

    /// As the functions know it.
    pub(crate) fn known(&self) -> EdgeSecrets {
        self.0.parse().expect("a token is long enough")
    }
}

impl std::fmt::Debug for EdgeSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EdgeSecret")
    }
}

impl VisitorSockets {
    /// Answers a handshake: 101 if `$connect` accepts it, and its status otherwise.
    pub(crate) async fn accept(
        self: &Arc<Self>,
        upgrade: OnUpgrade,
        visit: Box<VisitorRequest>,
    ) -> Response<ResponseBody> {
        let Some(accept_key) = accept_key(&visit.headers) else {
            return text(StatusCode::BAD_REQUEST, "Not a WebSocket handshake.\n");
        };
        let source = EventSource {
            connection_id: connection_id(),
            connected_at: u64::try_from(now().as_millis()).unwrap_or(u64::MAX),
            source_ip: "127.0.0.1".to_owned(),
            stage: VISITORS_STAGE,
        };
        let event = source.connect(
            &self.at_origin(&visit),
            &"/visitors".parse().expect("a path"),
        );
        let answer = match self.forward.handshake(event).await {
            Ok(answer) => serde_json::to_value(&answer).expect("JSON"),
            Err(error) => {
                error!(error = &error as &dyn std::error::Error, "$connect failed");
                return text(StatusCode::INTERNAL_SERVER_ERROR, "Internal server error\n");
            }
        };
        let status = answer["statusCode"]
            .as_u64()
            .and_then(|status| u16::try_from(status).ok())
            .and_then(|status| StatusCode::from_u16(status).ok())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let field = |name: &header::HeaderName| {
            let value = answer["headers"][name.as_str()].as_str()?;
            HeaderValue::from_str(value).ok()
        };
        if !status.is_success() {
            // As AWS does: nothing but the status.
            let mut response = Response::new(response::whole(bytes::Bytes::new()));
            *response.status_mut() = status;
            return response;
        }
        let api = self.clone();
        self.subsystem.spawn(async move {
            match upgrade.await {
                Ok(upgraded) => api.serve(upgraded, &source).await,
                Err(error) => {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "the visitor left during the handshake"
                    );
                    api.disconnected(&source, 1006).await;
                }
            }
        });
        let mut response = handshake::switching_protocols(accept_key);
        if let Some(protocol) = field(&header::SEC_WEBSOCKET_PROTOCOL) {
            response
                .headers_mut()
                .insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
        }
        response
    }

    /// The fields of a handshake as CloudFront passes them on.
    fn at_origin(&self, visit: &VisitorRequest) -> HeaderMap {
        let mut headers = visit.headers.clone();
        for name in [header::UPGRADE, header::CONNECTION] {
            headers.remove(name);
        }
        let query = visit.query.as_ref().map(|query| format!("?{query}"));
        let target = format!("{}{}", visit.path, query.unwrap_or_default());
        for (name, value) in [
            ("host", "sockets.localhost"),
            ("x-tunnel-edge", &*self.secret.0),
            ("x-tunnel-host", &*visit.host),
            ("x-tunnel-address", &*visit.source_ip),
            ("x-tunnel-target", &*target),
        ] {
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(name, value);
            }
        }
        headers
    }

    async fn serve(&self, upgraded: Upgraded, source: &EventSource) {
        let config = frames::server_config(self.quotas.frame, self.quotas.message);
        let mut socket =
            WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config))
                .await;
        let (commands, mut queue) = mpsc::channel(QUEUED);
        self.connections
            .insert(source.connection_id.clone(), commands);
        let code = loop {
            tokio::select! {
                () = self.subsystem.stopping().cancelled() => break 1001,
                command = queue.recv() => match command {
                    Some(ConnectionCommand::Send(text)) => {
                        // One that has ended says so when it is read.
                        let _ = socket.send(Message::text(text)).await;
                    }
                    Some(ConnectionCommand::Close(code, _)) => break code,
                    None => break 1001,
                },
                message = socket.next() => match message {
                    Some(Ok(Message::Text(text))) => {
                        let event = source.message(text.to_string());
                        if let Err(error) = self.default.handle(event).await {
                            error!(connection = %source.connection_id, error = &error as &dyn std::error::Error, "$default failed");
                        }
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                    Some(Ok(Message::Close(frame))) => break frame.map_or(1005, |frame| frame.code.into()),
                    Some(Ok(Message::Binary(_))) => break 1003,
                    Some(Err(_)) | None => break 1006,
                },
            }
        };
        self.connections.remove(&source.connection_id);
        let code_sent = CloseCode::from(code);
        let frame = code_sent.is_allowed().then(|| CloseFrame {
            code: code_sent,
            reason: "".into(),
        });
        // The visitor may be gone.
        let _ = socket.close(frame).await;
        self.disconnected(source, code).await;
    }

    async fn disconnected(&self, source: &EventSource, code: u16) {
        if let Err(error) = self.disconnect.handle(source.disconnect(code, "")).await {
            error!(connection = %source.connection_id, error = &error as &dyn std::error::Error, "$disconnect failed");
        }
    }
}
