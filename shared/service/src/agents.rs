//! Sending to agents: over @connections, the management side of the WebSocket API, or, in `local`, which holds the connections itself,
//! directly.

use std::{
    fmt, future::Future, net::SocketAddr, pin::Pin, str::FromStr, sync::Arc, time::Duration,
};

use aws_sdk_apigatewaymanagement::{
    Client, Config,
    config::retry::RetryConfig,
    error::{ProvideErrorMetadata, SdkError},
    primitives::Blob,
};
use http::uri::Uri;
use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::{aside::aside, aws::sdk::SdkConfig};
use tunnel_protocol::{
    id::ConnectionId,
    limits::MAX_MESSAGE_BYTES,
    message::{self, CarriesBody, Encoded, Feature, Format},
    url::is_loopback,
};

/// Pauses before a message is posted again that @connections has failed to take.
const RETRY_DELAYS: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(200)];
/// How long a connection may take no more messages where the caller does not say.
const SHORT_PATIENCE: Duration = Duration::from_millis(250);
/// Waits between tries while a connection is busy; they double from the first value to the second.
const MIN_BUSY_DELAY: Duration = Duration::from_millis(5);
const MAX_BUSY_DELAY: Duration = Duration::from_millis(500);

/// The address of a WebSocket API, which is that of its @connections as well. It has the scheme of plain HTTP requests.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct WebSocketApiUrl(String);

/// A text that is not the address of a WebSocket API.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "must be the WebSocket API's address with its stage, such as wss://id.execute-api.eu-west-1.amazonaws.com/dev (ws:// and http:// only on this machine)"
)]
pub struct WebSocketApiUrlError;

impl FromStr for WebSocketApiUrl {
    type Err = WebSocketApiUrlError;

    fn from_str(text: &str) -> Result<Self, WebSocketApiUrlError> {
        let uri: Uri = text.parse().map_err(|_| WebSocketApiUrlError)?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(WebSocketApiUrlError);
        };
        let host = authority.host();
        // The last is how a container calls the machine it runs on.
        let is_this_machine = is_loopback(host) || host == "host.docker.internal";
        let scheme = match scheme {
            "wss" | "https" => "https",
            "ws" | "http" if is_this_machine => "http",
            _ => return Err(WebSocketApiUrlError),
        };
        Ok(Self(format!(
            "{scheme}://{authority}{}",
            uri.path().trim_end_matches('/')
        )))
    }
}

impl WebSocketApiUrl {
    /// The address of a stand-in that listens on this machine.
    pub fn of_socket(address: SocketAddr, stage: &str) -> Self {
        Self(format!("http://{address}/{stage}"))
    }

    /// The address with the scheme of WebSocket connections.
    pub fn for_websockets(&self) -> String {
        // https becomes wss, and http ws.
        self.0.replacen("http", "ws", 1)
    }
}

/// Why a message did not reach a connection.
#[derive(Debug, thiserror::Error)]
pub enum PostError {
    /// The connection is closed, or its upgrade has not finished.
    #[error("the connection is gone")]
    Gone,
    /// The agent reads too slowly, or too many messages are on their way.
    #[error("the connection accepts no more messages now")]
    Busy,
    /// The message is over the limit.
    #[error("a message of {0} bytes is over the limit of {MAX_MESSAGE_BYTES}")]
    TooLarge(usize),
    /// The connection is gone now, but an earlier try whose answer was lost may have reached it.
    #[error("the connection is gone, and may have taken the message before")]
    Unknown,
    /// Anything else, after retries.
    #[error("@connections: {code}")]
    Failed {
        /// What the service or the SDK calls it.
        code: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A message on its way to a connection.
pub type Sending<'s> = Pin<Box<dyn Future<Output = Result<(), PostError>> + Send + 's>>;

/// Connections that this process holds itself.
pub trait OpenConnections: fmt::Debug + Send + Sync {
    /// Sends a message to a connection, and waits for its turn until the connection has taken nothing for `patience`.
    ///
    /// # Errors
    /// As @connections answers: see [`PostError`].
    fn send<'s>(
        &'s self,
        to: &'s ConnectionId,
        message: Encoded,
        patience: Duration,
    ) -> Sending<'s>;

    /// Whether a connection is open.
    fn is_open(&self, connection: &ConnectionId) -> bool;

    /// Closes a connection.
    ///
    /// # Errors
    /// If it is not open.
    fn close(&self, connection: &ConnectionId) -> Result<(), PostError>;
}

/// The connections of one WebSocket API.
#[derive(Clone, Debug)]
pub struct AgentConnections(Reached);

#[derive(Clone, Debug)]
enum Reached {
    Management(Client),
    InProcess(Arc<dyn OpenConnections>),
}

impl AgentConnections {
    /// Those of the WebSocket API whose @connections is at `endpoint`.
    pub fn managed(sdk: &SdkConfig, endpoint: &WebSocketApiUrl) -> Self {
        let config = aws_sdk_apigatewaymanagement::config::Builder::from(sdk)
            .endpoint_url(&endpoint.0)
            .build();
        Self(Reached::Management(Client::from_conf(config)))
    }

    /// Those that this process holds itself.
    pub fn in_process(connections: Arc<dyn OpenConnections>) -> Self {
        Self(Reached::InProcess(connections))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// See [`PostError`].
    pub async fn post<M: Serialize>(
        &self,
        to: &ConnectionId,
        message: &M,
    ) -> Result<(), PostError> {
        self.post_text(to, message::encode(message)).await
    }

    /// Sends a message that is encoded already.
    ///
    /// # Errors
    /// See [`PostError`].
    pub async fn post_text(&self, to: &ConnectionId, text: String) -> Result<(), PostError> {
        match &self.0 {
            Reached::InProcess(_) => self.post_encoded(to, text.into(), Duration::ZERO).await,
            Reached::Management(_) => self.post_encoded(to, text.into(), SHORT_PATIENCE).await,
        }
    }

    /// How messages to an agent with these features carry bodies. Only within the process are they binary.
    pub fn format(&self, features: &[Feature]) -> Format {
        match &self.0 {
            Reached::InProcess(_) => Format::of(features),
            Reached::Management(_) => Format::Text,
        }
    }

    /// Sends a message, which may have a body, in a format of [`AgentConnections::format`]. It waits as
    /// [`AgentConnections::post_encoded`] does.
    ///
    /// # Errors
    /// See [`PostError`].
    pub async fn post_in<M: CarriesBody>(
        &self,
        format: Format,
        to: &ConnectionId,
        message: &mut M,
        patience: Duration,
    ) -> Result<(), PostError> {
        self.post_encoded(to, message.encode_as(format), patience)
            .await
    }

    /// Sends a message, see [`AgentConnections::post_encoded`].
    ///
    /// # Errors
    /// See [`PostError`].
    pub async fn post_patiently<M: Serialize>(
        &self,
        to: &ConnectionId,
        message: &M,
        patience: Duration,
    ) -> Result<(), PostError> {
        let text = message::encode(message);
        self.post_encoded(to, text.into(), patience).await
    }

    /// Like [`AgentConnections::post_text`], but again and again, for as long as `patience`, while the connection is busy: a
    /// message that is refused so was not taken. Within the process it waits in line instead, until the connection has taken
    /// nothing for `patience`.
    ///
    /// # Errors
    /// See [`PostError`].
    pub async fn post_encoded(
        &self,
        to: &ConnectionId,
        message: Encoded,
        patience: Duration,
    ) -> Result<(), PostError> {
        if message.length() > MAX_MESSAGE_BYTES {
            return Err(PostError::TooLarge(message.length()));
        }
        match (&self.0, message) {
            (Reached::InProcess(connections), message) => {
                connections.send(to, message, patience).await
            }
            (Reached::Management(client), Encoded::Text(text)) => {
                aside(|| post_to_connection(client, to, &text, patience)).await
            }
            (Reached::Management(_), Encoded::Binary(..)) => Err(PostError::Failed {
                code: "binary".to_owned(),
                source: "@connections sends text".into(),
            }),
        }
    }

    /// Whether a connection is open, as far as API Gateway knows.
    ///
    /// # Errors
    /// If @connections does not answer.
    pub async fn is_open(&self, connection: &ConnectionId) -> Result<bool, PostError> {
        let outcome = match &self.0 {
            Reached::InProcess(connections) => return Ok(connections.is_open(connection)),
            Reached::Management(client) => {
                client
                    .get_connection()
                    .connection_id(connection.as_str())
                    .send()
                    .await
            }
        };
        match outcome.map_err(|error| post_error(error, 0)) {
            Ok(_) => Ok(true),
            Err(PostError::Gone) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Closes a connection. If it is already closed, that is not an error.
    ///
    /// # Errors
    /// If @connections does not answer.
    pub async fn close(&self, connection: &ConnectionId) -> Result<(), PostError> {
        let outcome = match &self.0 {
            Reached::InProcess(connections) => connections.close(connection),
            Reached::Management(client) => {
                let outcome = client
                    .delete_connection()
                    .connection_id(connection.as_str())
                    .send()
                    .await;
                outcome.map(drop).map_err(|error| post_error(error, 0))
            }
        };
        match outcome {
            Err(PostError::Gone) => Ok(()),
            outcome => outcome,
        }
    }
}

/// Posts with retries of our own, in place of the SDK's: a try whose outcome is not known decides what a later 410 means.
async fn post_to_connection(
    client: &Client,
    to: &ConnectionId,
    text: &str,
    patience: Duration,
) -> Result<(), PostError> {
    let once = Config::builder().retry_config(RetryConfig::disabled());
    let deadline = Instant::now() + patience;
    let mut busy_delay = MIN_BUSY_DELAY;
    let mut retry_delays = RETRY_DELAYS.into_iter();
    let mut may_be_taken = false;
    loop {
        let outcome = client
            .post_to_connection()
            .connection_id(to.as_str())
            .data(Blob::new(text))
            .customize()
            .config_override(once.clone())
            .send()
            .await;
        let Err(error) = outcome else { return Ok(()) };
        // What has no answer, or says that the service failed, may have been done all the same.
        let is_unknown = error
            .raw_response()
            .is_none_or(|response| response.status().is_server_error());
        let delay = match post_error(error, text.len()) {
            PostError::Gone if may_be_taken => return Err(PostError::Unknown),
            PostError::Busy if Instant::now() < deadline => {
                let delay = busy_delay;
                busy_delay = (2 * delay).min(MAX_BUSY_DELAY);
                delay
            }
            error if is_unknown => retry_delays.next().ok_or(error)?,
            error => return Err(error),
        };
        may_be_taken |= is_unknown;
        sleep(delay).await;
    }
}

/// Told by the status alone: not every stand-in for API Gateway names the exception.
fn post_error<E>(error: SdkError<E>, length: usize) -> PostError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    match error
        .raw_response()
        .map(|response| response.status().as_u16())
    {
        Some(410) => PostError::Gone,
        Some(429) => PostError::Busy,
        Some(413) => PostError::TooLarge(length),
        _ => PostError::Failed {
            code: error.code().unwrap_or("no answer").to_owned(),
            source: Box::new(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_management_endpoint_never_has_a_websocket_scheme() {
        for (setting, endpoint) in [
            (
                "wss://id.execute-api.eu-west-1.amazonaws.com/dev",
                "https://id.execute-api.eu-west-1.amazonaws.com/dev",
            ),
            (
                "wss://id.execute-api.eu-west-1.amazonaws.com/dev/",
                "https://id.execute-api.eu-west-1.amazonaws.com/dev",
            ),
            (
                "https://id.execute-api.eu-west-1.amazonaws.com/dev",
                "https://id.execute-api.eu-west-1.amazonaws.com/dev",
            ),
            ("ws://127.0.0.1:4566/x/dev", "http://127.0.0.1:4566/x/dev"),
            ("http://localhost:1/dev", "http://localhost:1/dev"),
        ] {
            assert_eq!(
                setting.parse(),
                Ok(WebSocketApiUrl(endpoint.to_owned())),
                "{setting}"
            );
        }
    }

    #[test]
    fn credentials_never_go_over_plain_http_to_another_machine() {
        for setting in [
            "ws://example.com/dev",
            "ws://127.0.0.1.example.com/dev",
            "http://10.0.0.1/dev",
            "ftp://x/dev",
            "example.com",
            "",
        ] {
            assert_eq!(
                setting.parse::<WebSocketApiUrl>(),
                Err(WebSocketApiUrlError),
                "{setting}"
            );
        }
    }

    /// @connections that answers each request with the next of these statuses.
    async fn answering(statuses: &'static [u16]) -> (AgentConnections, tokio::task::JoinSet<()>) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        let address = listener.local_addr().expect("an address");
        let mut serving = tokio::task::JoinSet::new();
        serving.spawn(async move {
            let mut statuses = statuses.iter();
            loop {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let status = statuses.next().copied().unwrap_or(410);
                // 0 stands for a connection that breaks before the answer.
                if status > 0 {
                    let answer = format!(
                        "HTTP/1.1 {status} X\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{{}}"
                    );
                    let _ = stream.write_all(answer.as_bytes()).await;
                }
            }
        });
        let sdk = crate::aws::sdk::for_loopback("http://127.0.0.1:9", "key");
        let endpoint = format!("http://{address}/v1").parse().expect("an endpoint");
        (AgentConnections::managed(&sdk, &endpoint), serving)
    }

    #[tokio::test]
    async fn a_connection_that_is_gone_took_nothing_unless_an_earlier_try_may_have_reached_it() {
        let to = "c".parse().expect("an id");
        for (statuses, expected) in [
            (&[200][..], "taken"),
            (&[410], "gone"),
            (&[429, 410], "gone"),
            (&[500, 200], "taken"),
            (&[500, 410], "unknown"),
            (&[503, 429, 410], "unknown"),
            (&[0, 410], "unknown"),
            (&[500, 500, 500], "failed"),
            (&[403], "failed"),
        ] {
            let (agents, _serving) = answering(statuses).await;
            let outcome = match agents.post_text(&to, "{}".to_owned()).await {
                Ok(()) => "taken",
                Err(PostError::Gone) => "gone",
                Err(PostError::Unknown) => "unknown",
                Err(PostError::Failed { .. }) => "failed",
                Err(other) => panic!("{statuses:?}: {other}"),
            };
            assert_eq!(outcome, expected, "{statuses:?}");
        }
    }
}
