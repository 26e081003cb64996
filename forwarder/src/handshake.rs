//! Opening a connection to the service: TCP, TLS, the WebSocket upgrade, and the first words of both sides.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, StatusCode, header};
use hyper_util::client::legacy::connect::HttpConnector;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, client_async_tls_with_config,
    tungstenite::{self, Message, client::IntoClientRequest},
};
use tower_service::Service;
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

/// How long reaching the service's machine may take, over IPv6 and over IPv4, shared by the addresses of each. Short, because a
/// network that has just come back is found by the next try.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the addresses of the family that the resolver prefers are tried alone (RFC 8305, 5).
const HAPPY_EYEBALLS_DELAY: Duration = Duration::from_millis(250);
/// How long saying goodbye may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long all of it may take. Functions of the service may be starting cold.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(15);
/// Most bytes of messages that are kept because they came before `connection_established`.
const MAX_EARLY_BYTES: usize = 4 * 1024 * 1024;

/// A connection over which messages go.
pub type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// An open connection, and the first message of the service.
#[derive(Debug)]
pub struct Opened {
    /// The connection.
    pub socket: Socket,
    /// The service's first words.
    pub established: ConnectionEstablished,
    /// Messages that overtook them: order is not guaranteed.
    pub early: Vec<String>,
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
    /// The service would admit visitors whom this agent refuses.
    Unprotected,
    /// Anything that may be better at the next try.
    Unreachable(String),
}

/// Opens a connection that requests `tunnel_id` and takes over from `previous`.
///
/// # Errors
/// If the service cannot be reached or refuses.
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

/// Gives up a tunnel id, and returns whether this agent owned it; if not, no one did.
///
/// # Errors
/// If the service cannot be reached or refuses.
pub async fn release(settings: &Settings, tunnel_id: &TunnelId) -> Result<bool, HandshakeError> {
    let released = async {
        let mut socket = connect(settings, settings.endpoint.releasing(tunnel_id)).await?;
        socket
            .send(Message::text(message::encode(&FromAgent::Release)))
            .await
            .map_err(failed)?;
        loop {
            let text = next_text(&mut socket).await?;
            if let Some(ToAgent::Released { existed, .. }) = read(&text)? {
                return Ok(existed);
            }
        }
    };
    let no_answer = || {
        HandshakeError::Unreachable(format!(
            "the service did not answer within {HANDSHAKE_TIMEOUT:?}; it may be too old to release tunnel ids"
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
    let mut early = Vec::new();
    let established = established(&mut socket, &mut early).await?;
    if access.is_some() && !established.features.contains(&Feature::Access) {
        // No request is taken from a service that has not read the rules.
        let _ = timeout(CLOSE_TIMEOUT, socket.close(None)).await;
        return Err(HandshakeError::Unprotected);
    }
    Ok(Opened {
        socket,
        established,
        early,
        at: Instant::now(),
    })
}

/// Waits for `connection_established`, and keeps what comes before it.
async fn established(
    socket: &mut Socket,
    early: &mut Vec<String>,
) -> Result<ConnectionEstablished, HandshakeError> {
    let mut early_bytes = 0;
    loop {
        let text = next_text(socket).await?;
        match read(&text)? {
            Some(ToAgent::ConnectionEstablished(established)) => return Ok(established),
            Some(_) => {
                early_bytes += text.len();
                early.push(text);
            }
            None => {}
        }
        if early_bytes > MAX_EARLY_BYTES {
            return Err(HandshakeError::Unreachable(
                "the service sent requests, but not that the tunnel is open".to_owned(),
            ));
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
                HandshakeError::Invalid(
                    "the token contains characters that are not allowed in a token".to_owned(),
                )
            })?;
        value.set_sensitive(true);
        request.headers_mut().insert(header::AUTHORIZATION, value);
    }
    let stream = dial(&endpoint.address()).await?;
    writer::tune(&stream);
    let (socket, _) =
        client_async_tls_with_config(request, stream, Some(frames::client_config()), None)
            .await
            .map_err(failed)?;
    Ok(socket)
}

/// Connects to `address`, a host and a port, over whichever of its addresses answers first (RFC 8305).
async fn dial(address: &str) -> Result<TcpStream, HandshakeError> {
    let cannot_connect = |error: &dyn std::error::Error| {
        HandshakeError::Unreachable(format!(
            "cannot connect to {address}: {}",
            root_cause(error)
        ))
    };
    let uri = http::Uri::builder()
        .scheme("http")
        .authority(address)
        .path_and_query("/")
        .build()
        .map_err(|error| cannot_connect(&error))?;
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_happy_eyeballs_timeout(Some(HAPPY_EYEBALLS_DELAY));
    let stream = connector
        .call(uri)
        .await
        .map_err(|error| cannot_connect(&error))?;
    Ok(stream.into_inner())
}

/// What is behind an error that only says which step failed.
fn root_cause(error: &dyn std::error::Error) -> &dyn std::error::Error {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause
}

/// Reads a message of a service that has not answered yet; `None` if it is not one.
fn read(text: &str) -> Result<Option<ToAgent>, HandshakeError> {
    match message::decode(text) {
        Ok(ToAgent::Error { message }) => Err(HandshakeError::Unreachable(message)),
        Ok(message) => Ok(Some(message)),
        Err(error) => {
            debug!(error = &error as &dyn std::error::Error, "message ignored");
            Ok(None)
        }
    }
}

/// The next text of a service that has not answered yet.
async fn next_text(socket: &mut Socket) -> Result<String, HandshakeError> {
    loop {
        match socket.next().await {
            Some(Ok(Message::Text(text))) => return Ok(text.as_str().to_owned()),
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
