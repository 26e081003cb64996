//! The open connections, and @connections: how functions outside this process reach them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use axum::{
    Router,
    body::Bytes,
    extract::{Path, State},
    http::{HeaderName, HeaderValue, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use tokio::sync::mpsc::{self, error::TrySendError};
use tunnel_protocol::id::ConnectionId;
use tunnel_service::agents::{OpenConnections, PostError};

use crate::{caller::AccessKey, quotas::Quotas};

/// The stage in the address of the management endpoint.
pub const STAGE: &str = "local";

/// What is done to an agent's connection.
#[derive(Debug)]
pub enum ConnectionCommand {
    /// Send a text message.
    Send(String),
    /// Close with this code.
    Close(u16, &'static str),
}

/// The open connections.
#[derive(Clone, Debug, Default)]
pub struct ConnectionRegistry(Arc<Mutex<HashMap<ConnectionId, mpsc::Sender<ConnectionCommand>>>>);

impl ConnectionRegistry {
    /// Adds a connection whose upgrade has finished.
    pub fn insert(&self, id: ConnectionId, commands: mpsc::Sender<ConnectionCommand>) {
        self.lock().insert(id, commands);
    }

    /// Removes a connection that has ended.
    pub fn remove(&self, id: &ConnectionId) {
        self.lock().remove(id);
    }

    /// Those that are open now.
    pub fn ids(&self) -> Vec<ConnectionId> {
        self.lock().keys().cloned().collect()
    }

    /// Closes all connections with 1001, "going away".
    pub fn close_all(&self) {
        for commands in self.lock().values() {
            // A full queue belongs to an agent that does not read; its connection ends with the process.
            let _ = commands.try_send(ConnectionCommand::Close(1001, "going away"));
        }
    }

    fn command(&self, id: &ConnectionId, command: ConnectionCommand) -> Result<(), PostError> {
        let connections = self.lock();
        let commands = connections.get(id).ok_or(PostError::Gone)?;
        commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => PostError::Busy,
            TrySendError::Closed(_) => PostError::Gone,
        })
    }

    /// Held between awaits only.
    fn lock(&self) -> MutexGuard<'_, HashMap<ConnectionId, mpsc::Sender<ConnectionCommand>>> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl OpenConnections for ConnectionRegistry {
    fn send(&self, to: &ConnectionId, text: String) -> Result<(), PostError> {
        self.command(to, ConnectionCommand::Send(text))
    }

    fn is_open(&self, connection: &ConnectionId) -> bool {
        self.lock().contains_key(connection)
    }

    fn close(&self, connection: &ConnectionId) -> Result<(), PostError> {
        self.command(
            connection,
            ConnectionCommand::Close(1000, "Connection Closed Normally"),
        )
    }
}

/// What @connections answers when it does not do as told; the names are those of the API's exceptions.
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
    Ok(api
        .connections
        .send(&id, String::from_utf8_lossy(&body).into_owned())?)
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
