//! Opening a connection to the service: TCP, TLS, the WebSocket upgrade, and the first words of both sides.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio::time::{Instant, timeout};
use tokio_tungstenite::{
    Connector, MaybeTlsStream, WebSocketStream, client_async_tls_with_config,
    tungstenite::{self, Message, client::IntoClientRequest, handshake::client::Response},
};
use tracing::debug;
use tunnel_protocol::{
    frames,
    headers::LONG_FRAMES,
    id::{ConnectionId, TunnelId},
    message,
    message::{ConnectionEstablished, FEATURES, Feature, FromAgent, Ready, ToAgent},
    visitor_policy::VisitorPolicy,
};

use crate::{
    dial::{ServiceStream, dial, misdirected},
    settings::Settings,
    tls,
};

/// How long saying goodbye may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the answer to a ping frame is waited for by who only wants to know whether there is one.
const PONG_TIMEOUT: Duration = Duration::from_secs(3);
/// How long all of it may take. Functions of the service may be starting cold.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(15);
/// Most bytes of messages that are kept because they came before `connection_established`.
const MAX_EARLY_BYTES: usize = 4 * 1024 * 1024;

/// A connection over which messages go.
pub type Socket = WebSocketStream<MaybeTlsStream<ServiceStream>>;

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
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum HandshakeError {
    /// 401 or 403.
    #[error("the service refuses the token, or requires one: `ttf login ENDPOINT` stores one")]
    Unauthorized,
    /// 409.
    #[error("the tunnel id belongs to another owner")]
    NameTaken,
    /// 400, with the service's words.
    #[error("the service refused the handshake: {0}")]
    Invalid(String),
    /// The service would admit visitors whom this agent refuses.
    #[error("the service is too old to enforce visitor rules")]
    Unprotected,
    /// What time does not mend: nobody is there, or somebody else.
    #[error("{0}")]
    Misdirected(String),
    /// Anything that may be better at the next try.
    #[error("{0}")]
    Unreachable(String),
}

impl HandshakeError {
    /// The service said nothing in time.
    pub(crate) fn no_answer() -> Self {
        Self::Unreachable(format!(
            "the service did not answer within {HANDSHAKE_TIMEOUT:?}"
        ))
    }
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
        Err(_) => Err(HandshakeError::no_answer()),
    }
}

/// What a connection that carries no tunnel tells of the service.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Probe {
    /// The service's time.
    pub date: Option<SystemTime>,
    /// How long the answer to a ping frame took; `None` if there was none.
    pub pong: Option<Duration>,
}

/// Whether the service takes this agent: it authenticates before the connection is open, and none is kept.
///
/// # Errors
/// If the service cannot be reached or refuses.
pub(crate) async fn check(settings: &Settings) -> Result<(), HandshakeError> {
    let address = settings.endpoint.asking_for(None);
    let (mut socket, _) = timeout(HANDSHAKE_TIMEOUT, connect(settings, address))
        .await
        .unwrap_or_else(|_| Err(HandshakeError::no_answer()))?;
    let _ = timeout(CLOSE_TIMEOUT, socket.close(None)).await;
    Ok(())
}

/// As [`check`], and looks around.
///
/// # Errors
/// If the service cannot be reached or refuses.
pub(crate) async fn probe(settings: &Settings) -> Result<Probe, HandshakeError> {
    let address = settings.endpoint.asking_for(None);
    let (mut socket, response) = timeout(HANDSHAKE_TIMEOUT, connect(settings, address))
        .await
        .unwrap_or_else(|_| Err(HandshakeError::no_answer()))?;
    let date = response
        .headers()
        .get(header::DATE)
        .and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
    let asked = Instant::now();
    socket
        .send(Message::Ping(tungstenite::Bytes::new()))
        .await
        .map_err(|error| failed(&error))?;
    let answered = timeout(PONG_TIMEOUT, async {
        while let Some(Ok(message)) = socket.next().await {
            if message.is_pong() {
                return Some(asked.elapsed());
            }
        }
        None
    });
    let pong = answered.await.unwrap_or_default();
    let _ = timeout(CLOSE_TIMEOUT, socket.close(None)).await;
    Ok(Probe { date, pong })
}

/// Gives up a tunnel id, and returns whether this agent owned it; if not, no one did.
///
/// # Errors
/// If the service cannot be reached or refuses.
pub async fn release(settings: &Settings, tunnel_id: &TunnelId) -> Result<bool, HandshakeError> {
    let released = async {
        let (mut socket, _) = connect(settings, settings.endpoint.releasing(tunnel_id)).await?;
        socket
            .send(Message::text(message::encode(&FromAgent::Release)))
            .await
            .map_err(|error| failed(&error))?;
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
    let (mut socket, answer) = connect(settings, settings.endpoint.asking_for(tunnel_id)).await?;
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
        .map_err(|error| failed(&error))?;
    let mut early = Vec::new();
    let mut established = established(&mut socket, &mut early).await?;
    if !answer.headers().contains_key(LONG_FRAMES) {
        // A proxy may have kept the field to itself.
        established
            .features
            .retain(|feature| *feature != Feature::LongFrames);
    }
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

/// Opens a connection at an address of the endpoint's. Returns the answer to the upgrade, too.
async fn connect(
    settings: &Settings,
    address: String,
) -> Result<(Socket, Response), HandshakeError> {
    let endpoint = &settings.endpoint;
    let mut request = address
        .into_client_request()
        .map_err(|error| HandshakeError::Unreachable(error.to_string()))?;
    request.headers_mut().extend(authorization(settings)?);
    request
        .headers_mut()
        .insert(LONG_FRAMES, HeaderValue::from_static("yes"));
    let needs_tls = endpoint.is_secure() || settings.proxy.is_some();
    let tls = Arc::new(tls::client_config(needs_tls, &settings.endpoint_tls));
    let stream = dial(endpoint, settings.proxy.as_ref(), &tls).await?;
    let config = Some(frames::client_config());
    let (socket, response) =
        client_async_tls_with_config(request, stream, config, Some(Connector::Rustls(tls)))
            .await
            .map_err(|error| refused(error, settings))?;
    Ok((socket, response))
}

/// The field by which the agent authenticates.
pub(crate) fn authorization(settings: &Settings) -> Result<HeaderMap, HandshakeError> {
    let mut fields = HeaderMap::new();
    if let Some(token) = &settings.token {
        let mut value =
            HeaderValue::from_str(&format!("Bearer {}", token.reveal())).map_err(|_| {
                HandshakeError::Invalid(
                    "the token contains characters that are not allowed in a token".to_owned(),
                )
            })?;
        value.set_sensitive(true);
        fields.insert(header::AUTHORIZATION, value);
    }
    Ok(fields)
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
            Some(Err(error)) => return Err(failed(&error)),
            None => {
                return Err(HandshakeError::Unreachable(
                    "the service closed the connection".to_owned(),
                ));
            }
        }
    }
}

fn failed(error: &tungstenite::Error) -> HandshakeError {
    HandshakeError::Unreachable(error.to_string())
}

/// Why the service did not accept the connection.
fn refused(error: tungstenite::Error, settings: &Settings) -> HandshakeError {
    let endpoint = &settings.endpoint;
    let response = match error {
        tungstenite::Error::Http(response) => response,
        error => return misdirected(&error, endpoint).unwrap_or_else(|| failed(&error)),
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
        status if status.is_server_error() || is_temporary(status) => {
            HandshakeError::Unreachable(format!("the service answered the handshake with {status}"))
        }
        status => HandshakeError::Misdirected(format!(
            "{endpoint} answered the handshake with {status}, so it is not where agents connect: check the endpoint (that of tunnel-local is its public URL, that of a stack on AWS its output AgentEndpoint)"
        )),
    }
}

fn is_temporary(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS
    )
}
