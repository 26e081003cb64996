//! @connections, the management side of the WebSocket API: speaking to agents.

use std::str::FromStr;

use aws_sdk_apigatewaymanagement::{
    Client,
    error::{ProvideErrorMetadata, SdkError},
    primitives::Blob,
};
use http::uri::Uri;
use serde::Serialize;

use super::sdk::SdkConfig;
use crate::{id::ConnectionId, limits::WEBSOCKET_MESSAGE, protocol, routing::is_loopback};

/// Where @connections is served: the WebSocket API's own address with the scheme of plain HTTP requests.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ManagementEndpoint(String);

/// A text that is not the address of a WebSocket API.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "must be the WebSocket API's address with its stage, such as wss://id.execute-api.eu-west-1.amazonaws.com/dev (ws:// and http:// only on this machine)"
)]
pub struct InvalidEndpoint;

impl FromStr for ManagementEndpoint {
    type Err = InvalidEndpoint;

    fn from_str(text: &str) -> Result<Self, InvalidEndpoint> {
        let uri: Uri = text.parse().map_err(|_| InvalidEndpoint)?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(InvalidEndpoint) };
        let host = authority.host();
        // The last is how a container calls the machine it runs on.
        let is_this_machine = is_loopback(host) || host == "host.docker.internal";
        let scheme = match scheme {
            "wss" | "https" => "https",
            "ws" | "http" if is_this_machine => "http",
            _ => return Err(InvalidEndpoint),
        };
        Ok(Self(format!("{scheme}://{authority}{}", uri.path().trim_end_matches('/'))))
    }
}

/// Why a message did not reach a connection.
#[derive(Debug, thiserror::Error)]
pub enum PostError {
    /// The connection is closed, or its upgrade has not finished.
    #[error("the connection is gone")]
    Gone,
    /// The agent reads too slowly, or too many messages are on their way.
    #[error("the connection takes no more messages now")]
    Busy,
    /// The message is over the limit.
    #[error("a message of {0} bytes is over the limit of {WEBSOCKET_MESSAGE}")]
    TooLarge(usize),
    /// Anything else, after the SDK's own retries.
    #[error("@connections: {code}")]
    Failed {
        /// What the service or the SDK calls it.
        code: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The connections of one WebSocket API.
#[derive(Clone, Debug)]
pub struct WebSocketApi(Client);

impl WebSocketApi {
    /// The WebSocket API at `endpoint`.
    pub fn new(sdk: &SdkConfig, endpoint: &ManagementEndpoint) -> Self {
        Self(Client::from_conf(aws_sdk_apigatewaymanagement::config::Builder::from(sdk).endpoint_url(&endpoint.0).build()))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// See [`PostError`].
    pub async fn post<M: Serialize>(&self, to: &ConnectionId, message: &M) -> Result<(), PostError> {
        let text = protocol::encode(message);
        if text.len() > WEBSOCKET_MESSAGE {
            return Err(PostError::TooLarge(text.len()));
        }
        let length = text.len();
        let outcome = self.0.post_to_connection().connection_id(to.as_str()).data(Blob::new(text)).send().await;
        outcome.map(drop).map_err(|error| post_error(error, length))
    }

    /// Closes a connection. That it is closed already is no failure.
    ///
    /// # Errors
    /// When @connections does not answer.
    pub async fn close(&self, connection: &ConnectionId) -> Result<(), PostError> {
        match self.0.delete_connection().connection_id(connection.as_str()).send().await.map_err(|error| post_error(error, 0)) {
            Err(PostError::Gone) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Told by the status alone: not every stand-in for API Gateway names the exception.
fn post_error<E>(error: SdkError<E>, length: usize) -> PostError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    match error.raw_response().map(|response| response.status().as_u16()) {
        Some(410) => PostError::Gone,
        Some(429) => PostError::Busy,
        Some(413) => PostError::TooLarge(length),
        _ => PostError::Failed { code: error.code().unwrap_or("no answer").to_owned(), source: Box::new(error) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_management_endpoint_never_has_a_websocket_scheme() {
        for (setting, endpoint) in [
            ("wss://id.execute-api.eu-west-1.amazonaws.com/dev", "https://id.execute-api.eu-west-1.amazonaws.com/dev"),
            ("wss://id.execute-api.eu-west-1.amazonaws.com/dev/", "https://id.execute-api.eu-west-1.amazonaws.com/dev"),
            ("https://id.execute-api.eu-west-1.amazonaws.com/dev", "https://id.execute-api.eu-west-1.amazonaws.com/dev"),
            ("ws://127.0.0.1:4566/x/dev", "http://127.0.0.1:4566/x/dev"),
            ("http://localhost:1/dev", "http://localhost:1/dev"),
        ] {
            assert_eq!(setting.parse(), Ok(ManagementEndpoint(endpoint.to_owned())), "{setting}");
        }
    }

    #[test]
    fn credentials_never_go_over_plain_http_to_another_machine() {
        for setting in ["ws://example.com/dev", "ws://127.0.0.1.example.com/dev", "http://10.0.0.1/dev", "ftp://x/dev", "example.com", ""] {
            assert_eq!(setting.parse::<ManagementEndpoint>(), Err(InvalidEndpoint), "{setting}");
        }
    }
}
