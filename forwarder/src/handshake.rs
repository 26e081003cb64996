//! Opening a connection to the service: TCP, TLS, the WebSocket upgrade, and the first words of both sides.

use std::{io, time::Duration};

use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, StatusCode, header};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, client_async_tls_with_config,
    tungstenite::{self, Message, client::IntoClientRequest, protocol::WebSocketConfig},
};
use tracing::debug;
use tunnel_shared::{
    access::Access,
    id::{ConnectionId, TunnelId},
    limits::{WEBSOCKET_FRAME, WEBSOCKET_MESSAGE},
    protocol::{self, ConnectionEstablished, FEATURES, Feature, FromAgent, Ready, ToAgent},
};

use crate::settings::Settings;

/// How long reaching the service's machine may take. Short, because a network that has just come back is found by the next try.
const CONNECT: Duration = Duration::from_secs(3);
/// How long saying goodbye may take.
const CLOSE: Duration = Duration::from_secs(1);
/// How long all of it may take. Functions of the service may be starting cold.
const HANDSHAKE: Duration = Duration::from_secs(15);

/// A connection over which messages go.
pub type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// An open connection, and what the service said first.
#[derive(Debug)]
pub struct Opened {
    /// The connection.
    pub socket: Socket,
    /// The service's first words.
    pub established: ConnectionEstablished,
    /// When it was opened.
    pub at: Instant,
}

/// Why there is no connection.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Failed {
    /// 401 or 403.
    Unauthorized,
    /// 409.
    NameTaken,
    /// 400, with the service's words.
    Invalid(String),
    /// The service would let in visitors whom this agent keeps out.
    Unprotected,
    /// Anything that may be better at the next try.
    Unreachable(String),
}

/// Opens a connection that asks for `tunnel_id` and takes over from `previous`.
///
/// # Errors
/// When the service cannot be reached or refuses.
pub async fn open(settings: &Settings, tunnel_id: Option<&TunnelId>, previous: Option<&ConnectionId>) -> Result<Opened, Failed> {
    match timeout(HANDSHAKE, shake_hands(settings, tunnel_id, previous)).await {
        Ok(opened) => opened,
        Err(_) => Err(Failed::Unreachable(format!("the service did not answer within {HANDSHAKE:?}"))),
    }
}

async fn shake_hands(settings: &Settings, tunnel_id: Option<&TunnelId>, previous: Option<&ConnectionId>) -> Result<Opened, Failed> {
    let endpoint = &settings.endpoint;
    let mut request = endpoint.asking_for(tunnel_id).into_client_request().map_err(|error| Failed::Unreachable(error.to_string()))?;
    if let Some(token) = &settings.token {
        let mut value = HeaderValue::from_str(&format!("Bearer {}", token.reveal()))
            .map_err(|_| Failed::Invalid("the token has characters that no token has".to_owned()))?;
        value.set_sensitive(true);
        request.headers_mut().insert(header::AUTHORIZATION, value);
    }
    let config = WebSocketConfig::default()
        .read_buffer_size(WEBSOCKET_FRAME)
        .write_buffer_size(0)
        .max_message_size(Some(2 * WEBSOCKET_MESSAGE))
        .max_frame_size(Some(2 * WEBSOCKET_MESSAGE));
    let stream = timeout(CONNECT, TcpStream::connect(endpoint.address()))
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, format!("it did not answer within {CONNECT:?}"))))
        .map_err(|error| Failed::Unreachable(format!("cannot connect to {}: {error}", endpoint.address())))?;
    // Without it a connection only has more latency.
    let _ = stream.set_nodelay(true);
    let (mut socket, _) = client_async_tls_with_config(request, stream, Some(config), None).await.map_err(failed)?;
    let access = settings.access.for_one_connection();
    let ready = Ready {
        protocol: Some(protocol::VERSION),
        features: FEATURES.into_iter().filter(|feature| settings.compression || *feature != Feature::Zstd).collect(),
        agent: Some(concat!("ttf/", env!("CARGO_PKG_VERSION")).to_owned()),
        previous: previous.cloned(),
        access: access.as_ref().map(Access::to_json),
    };
    socket.send(Message::text(protocol::encode(&FromAgent::Ready(ready)))).await.map_err(failed)?;
    loop {
        match socket.next().await {
            Some(Ok(Message::Text(text))) => match protocol::decode(&text) {
                // No request is taken from a service that has not read the rules.
                Ok(ToAgent::ConnectionEstablished(established)) if access.is_some() && !established.features.contains(&Feature::Access) => {
                    let _ = timeout(CLOSE, socket.close(None)).await;
                    return Err(Failed::Unprotected);
                }
                Ok(ToAgent::ConnectionEstablished(established)) => return Ok(Opened { socket, established, at: Instant::now() }),
                Ok(ToAgent::Error { message }) => return Err(Failed::Unreachable(message)),
                _ => debug!("message before connection_established ignored"),
            },
            Some(Ok(Message::Close(frame))) => {
                let reason = frame.map(|frame| format!(" ({}: {})", frame.code, frame.reason)).unwrap_or_default();
                return Err(Failed::Unreachable(format!("the service closed the connection{reason}")));
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(failed(error)),
            None => return Err(Failed::Unreachable("the service closed the connection".to_owned())),
        }
    }
}

fn failed(error: tungstenite::Error) -> Failed {
    let tungstenite::Error::Http(response) = error else { return Failed::Unreachable(error.to_string()) };
    let said = response.body().as_deref().map(|body| String::from_utf8_lossy(body).into_owned()).unwrap_or_default();
    match response.status() {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Failed::Unauthorized,
        StatusCode::CONFLICT => Failed::NameTaken,
        StatusCode::BAD_REQUEST => Failed::Invalid(said),
        status => Failed::Unreachable(format!("the service answered the handshake with {status}")),
    }
}
