//! The open connections, and @connections: how functions outside this process reach them.

use std::{
    fmt,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::{Path, State},
    http::{HeaderName, HeaderValue, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tunnel_protocol::{id::ConnectionId, message::Encoded, writer::MessageSender};
use tunnel_service::agents::{OpenConnections, PostError, Sending};

use crate::{caller::AccessKey, quotas::Quotas};

/// The stage in the address of the management endpoint.
pub const STAGE: &str = "local";

/// How long PostToConnection waits for room before it answers 429.
const POST_PATIENCE: Duration = Duration::from_millis(250);

/// An open connection, as the registry knows it.
pub trait Connection: fmt::Debug + Send + Sync {
    /// Sends a message, and waits for its turn until the connection has taken nothing for `patience`.
    ///
    /// # Errors
    /// [`PostError::Busy`] when there is no room, [`PostError::Gone`] when the connection has ended.
    fn send(&self, message: Encoded, patience: Duration) -> Sending<'_>;

    /// Closes the connection, whether its peer agrees or not. Only the first code counts.
    fn close(&self, code: u16, reason: &'static str);
}

/// A connection over a socket. Clones share it.
#[derive(Clone, Debug)]
pub struct SocketConnection(Arc<SocketState>);

#[derive(Debug)]
struct SocketState {
    sender: MessageSender,
    closing: CancellationToken,
    opened: Instant,
    /// When a message was last sent or received, in milliseconds after `opened`.
    last_used: AtomicU64,
}

impl SocketConnection {
    /// The connection that `sender` writes to.
    pub fn new(sender: MessageSender) -> Self {
        Self(Arc::new(SocketState {
            sender,
            closing: CancellationToken::new(),
            opened: Instant::now(),
            last_used: AtomicU64::new(0),
        }))
    }

    /// Where messages are queued.
    pub fn sender(&self) -> &MessageSender {
        &self.0.sender
    }

    /// Cancelled when the connection is to be closed.
    pub fn closing(&self) -> &CancellationToken {
        &self.0.closing
    }

    /// Notes that the connection carries a message.
    pub fn use_now(&self) {
        let elapsed = self.0.opened.elapsed().as_millis();
        let milliseconds = u64::try_from(elapsed).unwrap_or(u64::MAX);
        self.0.last_used.store(milliseconds, Ordering::Relaxed);
    }

    /// When the connection last carried a message, either way.
    pub fn last_used(&self) -> Instant {
        self.0.opened + Duration::from_millis(self.0.last_used.load(Ordering::Relaxed))
    }
}

impl Connection for SocketConnection {
    fn send(&self, message: Encoded, patience: Duration) -> Sending<'_> {
        Box::pin(async move {
            let sender = &self.0.sender;
            let mut queue = pin!(sender.send(message));
            let mut deadline = Instant::now() + patience;
            loop {
                match timeout_at(deadline, queue.as_mut()).await {
                    Ok(Ok(_)) => {
                        self.use_now();
                        return Ok(());
                    }
                    Ok(Err(_)) => return Err(PostError::Gone),
                    // Many may be in line before it: its turn comes as long as the peer reads.
                    Err(_) if sender.last_written() + patience > deadline => {
                        deadline = sender.last_written() + patience;
                    }
                    Err(_) => return Err(PostError::Busy),
                }
            }
        })
    }

    fn close(&self, code: u16, reason: &'static str) {
        self.0.sender.close(code, reason);
        self.0.closing.cancel();
    }
}

/// What is done to a connection that is a queue.
#[derive(Debug)]
pub enum ConnectionCommand {
    /// Send a text message.
    Send(String),
    /// Close with this code.
    Close(u16, &'static str),
}

/// For the other end of the connection in this process.
impl Connection for mpsc::Sender<ConnectionCommand> {
    fn send(&self, message: Encoded, patience: Duration) -> Sending<'_> {
        Box::pin(async move {
            let Encoded::Text(text) = message else {
                // Nothing that sits at such a queue asks for binary messages.
                return Err(PostError::Gone);
            };
            let queue = mpsc::Sender::send(self, ConnectionCommand::Send(text));
            match timeout(patience, queue).await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(_)) => Err(PostError::Gone),
                Err(_) => Err(PostError::Busy),
            }
        })
    }

    fn close(&self, code: u16, reason: &'static str) {
        // A full queue belongs to a peer that does not read it.
        let _ = self.try_send(ConnectionCommand::Close(code, reason));
    }
}

/// Connections by their ids. Nobody else can choose these, so a quick hash is enough.
type Connections = foldhash::HashMap<ConnectionId, Arc<dyn Connection>>;

/// The open connections.
#[derive(Clone, Debug, Default)]
pub struct ConnectionRegistry(Arc<Mutex<Connections>>);

impl ConnectionRegistry {
    /// Adds a connection whose upgrade has finished.
    pub fn insert(&self, id: ConnectionId, connection: impl Connection + 'static) {
        self.lock().insert(id, Arc::new(connection));
    }

    /// Removes a connection that has ended.
    pub fn remove(&self, id: &ConnectionId) {
        self.lock().remove(id);
    }

    /// Those that are open now.
    pub fn ids(&self) -> Vec<ConnectionId> {
        self.lock().keys().cloned().collect()
    }

    fn get(&self, id: &ConnectionId) -> Result<Arc<dyn Connection>, PostError> {
        self.lock().get(id).cloned().ok_or(PostError::Gone)
    }

    /// Held between awaits only.
    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl OpenConnections for ConnectionRegistry {
    fn send<'s>(
        &'s self,
        to: &'s ConnectionId,
        message: Encoded,
        patience: Duration,
    ) -> Sending<'s> {
        Box::pin(async move { self.get(to)?.send(message, patience).await })
    }

    fn is_open(&self, connection: &ConnectionId) -> bool {
        self.lock().contains_key(connection)
    }

    fn close(&self, connection: &ConnectionId) -> Result<(), PostError> {
        self.get(connection)?
            .close(1000, "Connection Closed Normally");
        Ok(())
    }
}

/// How @connections refuses; the names are those of the API's exceptions.
enum ManagementError {
    Gone,
    LimitExceeded,
    TooLarge,
    Forbidden,
    Invalid,
}

impl From<PostError> for ManagementError {
    fn from(error: PostError) -> Self {
        match error {
            PostError::Gone | PostError::Unknown => Self::Gone,
            PostError::Busy => Self::LimitExceeded,
            PostError::TooLarge(_) => Self::TooLarge,
            PostError::Failed { .. } => Self::Invalid,
        }
    }
}

impl IntoResponse for ManagementError {
    fn into_response(self) -> Response {
        let (status, name) = match self {
            Self::Gone => (StatusCode::GONE, "GoneException"),
            Self::LimitExceeded => (StatusCode::TOO_MANY_REQUESTS, "LimitExceededException"),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "PayloadTooLargeException"),
            Self::Forbidden => (StatusCode::FORBIDDEN, "ForbiddenException"),
            Self::Invalid => (StatusCode::BAD_REQUEST, "BadRequestException"),
        };
        let headers = [(
            HeaderName::from_static("x-amzn-errortype"),
            HeaderValue::from_static(name),
        )];
        (status, headers, format!("{{\"message\":\"{name}\"}}")).into_response()
    }
}

#[derive(Clone)]
struct Api {
    connections: ConnectionRegistry,
    quotas: Quotas,
    access_key: AccessKey,
}

/// The API's routes: POST, GET and DELETE on a connection, for callers that sign with `access_key`.
pub fn router(connections: ConnectionRegistry, quotas: Quotas, access_key: AccessKey) -> Router {
    let limit = axum::extract::DefaultBodyLimit::max(2 * quotas.message);
    Router::new()
        .route(
            &format!("/{STAGE}/@connections/{{id}}"),
            post(post_to).delete(delete).get(look_up),
        )
        .layer(limit)
        .with_state(Api {
            connections,
            quotas,
            access_key,
        })
}

impl Api {
    fn authorize(&self, headers: &axum::http::HeaderMap) -> Result<(), ManagementError> {
        if self.access_key.is_signed_by(headers) {
            Ok(())
        } else {
            Err(ManagementError::Forbidden)
        }
    }
}

async fn post_to(
    State(api): State<Api>,
    Path(id): Path<String>,
    headers: axum::http::HeaderMap,
    body: Bytes,
) -> Result<(), ManagementError> {
    api.authorize(&headers)?;
    if body.len() > api.quotas.message {
        return Err(ManagementError::TooLarge);
    }
    // Frames to agents are text: what is not UTF-8 is replaced.
    let id = id.parse().map_err(|_| ManagementError::Invalid)?;
    let text = String::from_utf8_lossy(&body).into_owned();
    let send = api.connections.send(&id, text.into(), POST_PATIENCE);
    let sent = timeout(POST_PATIENCE, send).await;
    Ok(sent.unwrap_or(Err(PostError::Busy))?)
}

/// Answers whether a connection is open, without what API Gateway says about it.
async fn look_up(
    State(api): State<Api>,
    Path(id): Path<String>,
    headers: axum::http::HeaderMap,
) -> Result<&'static str, ManagementError> {
    api.authorize(&headers)?;
    let id = id.parse().map_err(|_| ManagementError::Invalid)?;
    if api.connections.is_open(&id) {
        Ok("{}")
    } else {
        Err(ManagementError::Gone)
    }
}

async fn delete(
    State(api): State<Api>,
    Path(id): Path<String>,
    headers: axum::http::HeaderMap,
) -> Result<StatusCode, ManagementError> {
    api.authorize(&headers)?;
    let id = id.parse().map_err(|_| ManagementError::Invalid)?;
    api.connections.close(&id)?;
    Ok(StatusCode::NO_CONTENT)
}
