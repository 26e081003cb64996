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
    tungstenite::{self, Message, client::IntoClientRequest},
};
use tracing::debug;
use tunnel_protocol::{
    frames,
    id::{ConnectionId, TunnelId},
    message,
    message::{ConnectionEstablished, FEATURES, Feature, FromAgent, Ready, ToAgent},
    visitor_policy::VisitorPolicy,
    writer,
};

use crate::settings::Settings;

/// How long reaching the service's machine may take. Short, because a network that has just come back is found by the next try.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long saying goodbye may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long all of it may take. Functions of the service may be starting cold.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(15);

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
pub enum HandshakeError {
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
pub async fn open(
    settings: &Settings,
    tunnel_id: Option<&TunnelId>,
    previous: Option<&ConnectionId>,
) -> Result<Opened, HandshakeError> {
    match timeout(
        HANDSHAKE_TIMEOUT,
        shake_hands(settings, tunnel_id, previous),
    )
    .await
    {
        Ok(opened) => opened,
        Err(_) => Err(HandshakeError::Unreachable(format!(
            "the service did not answer within {HANDSHAKE_TIMEOUT:?}"
        ))),
    }
}

/// Gives a tunnel id up, and tells whether it was this agent's; otherwise it was nobody's.
///
/// # Errors
/// When the service cannot be reached or refuses.
pub async fn release(settings: &Settings, tunnel_id: &TunnelId) -> Result<bool, HandshakeError> {
    let released = async {
        let mut socket = connect(settings, settings.endpoint.releasing(tunnel_id)).await?;
        socket
            .send(Message::text(message::encode(&FromAgent::Release)))
            .await
            .map_err(failed)?;
        loop {
            if let ToAgent::Released { existed, .. } = first_word(&mut socket).await? {
                return Ok(existed);
            }
        }
    };
    let no_answer = || {
        HandshakeError::Unreachable(format!(
            "the service did not answer within {HANDSHAKE_TIMEOUT:?}; it may be one that cannot release"
        ))
    };
    timeout(HANDSHAKE_TIMEOUT, released)
        .await
        .unwrap_or_else(|_| Err(no_answer()))
}

async fn shake_hands(
    settings: &Settings,
    tunnel_id: Option<&TunnelId>,
    previous: Option<&ConnectionId>,
) -> Result<Opened, HandshakeError> {
    let mut socket = connect(settings, settings.endpoint.asking_for(tunnel_id)).await?;
    let access = settings.access.for_one_connection();
    let ready = Ready {
        protocol: Some(message::VERSION),
        features: FEATURES
            .into_iter()
            .filter(|feature| settings.compression || *feature != Feature::Zstd)
            .collect(),
        agent: Some(concat!("ttf/", env!("CARGO_PKG_VERSION")).to_owned()),
        previous: previous.cloned(),
        access: access.as_ref().map(VisitorPolicy::to_json),
    };
    socket
        .send(Message::text(message::encode(&FromAgent::Ready(ready))))
        .await
        .map_err(failed)?;
    loop {
        if let ToAgent::ConnectionEstablished(established) = first_word(&mut socket).await? {
            if access.is_some() && !established.features.contains(&Feature::Access) {
                // No request is taken from a service that has not read the rules.
                let _ = timeout(CLOSE_TIMEOUT, socket.close(None)).await;
                return Err(HandshakeError::Unprotected);
            }
            return Ok(Opened {
                socket,
                established,
                at: Instant::now(),
            });
        }
    }
}

/// Opens a connection at an address of the endpoint's.
async fn connect(settings: &Settings, address: String) -> Result<Socket, HandshakeError> {
    let endpoint = &settings.endpoint;
    let mut request = address
        .into_client_request()
        .map_err(|error| HandshakeError::Unreachable(error.to_string()))?;
    if let Some(token) = &settings.token {
        let mut value =
            HeaderValue::from_str(&format!("Bearer {}", token.reveal())).map_err(|_| {
                HandshakeError::Invalid("the token has characters that no token has".to_owned())
            })?;
        value.set_sensitive(true);
        request.headers_mut().insert(header::AUTHORIZATION, value);
    }
    let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(endpoint.address()))
        .await
        .unwrap_or_else(|_| {
            Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("it did not answer within {CONNECT_TIMEOUT:?}"),
            ))
        })
        .map_err(|error| {
            HandshakeError::Unreachable(format!(
                "cannot connect to {}: {error}",
                endpoint.address()
            ))
        })?;
    writer::tune(&stream);
    let (socket, _) =
        client_async_tls_with_config(request, stream, Some(frames::client_config()), None)
            .await
            .map_err(failed)?;
    Ok(socket)
}

/// The next message of a service that has not answered yet.
async fn first_word(socket: &mut Socket) -> Result<ToAgent, HandshakeError> {
    loop {
        match socket.next().await {
            Some(Ok(Message::Text(text))) => match message::decode(&text) {
                Ok(ToAgent::Error { message }) => return Err(HandshakeError::Unreachable(message)),
                Ok(message) => return Ok(message),
                Err(error) => debug!(error = &error as &dyn std::error::Error, "message ignored"),
            },
            Some(Ok(Message::Close(frame))) => {
                let reason = frame
                    .map(|frame| format!(" ({}: {})", frame.code, frame.reason))
                    .unwrap_or_default();
                return Err(HandshakeError::Unreachable(format!(
                    "the service closed the connection{reason}"
                )));
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(failed(error)),
            None => {
                return Err(HandshakeError::Unreachable(
                    "the service closed the connection".to_owned(),
                ));
            }
        }
    }
}

fn failed(error: tungstenite::Error) -> HandshakeError {
    let tungstenite::Error::Http(response) = error else {
        return HandshakeError::Unreachable(error.to_string());
    };
    let said = response
        .body()
        .as_deref()
        .map(|body| String::from_utf8_lossy(body).into_owned())
        .unwrap_or_default();
    match response.status() {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => HandshakeError::Unauthorized,
        StatusCode::CONFLICT => HandshakeError::NameTaken,
        StatusCode::BAD_REQUEST => HandshakeError::Invalid(said),
        status => {
            HandshakeError::Unreachable(format!("the service answered the handshake with {status}"))
        }
    }
}
