//! The way from a function to agents, and of their replies back to the function that waits for them.

use std::{sync::Arc, time::Duration};

use tunnel_protocol::limits::WEBSOCKET_LIFETIME;

use crate::{
    agents::{AgentConnections, OpenConnections, WebSocketApiUrl},
    aws::sdk::SdkConfig,
    replies::{Replies, ReplyPath},
    routing::PublicUrl,
    settings::Variables,
    tables::{connections::ConnectionsTable, mailbox::MailboxTable},
};

/// How a function reaches agents.
#[derive(Clone, Debug)]
pub enum AgentPath {
    /// API Gateway has the connections, and replies that it does not push come through DynamoDB.
    Cloud(CloudPath),
    /// This process has the connections, and runs the other functions as well.
    InProcess(InProcess),
}

/// What a function in AWS must know to reach agents.
#[derive(Clone, Debug)]
pub struct CloudPath {
    /// The WebSocket API, where reply connections are opened.
    pub websocket_api: WebSocketApiUrl,
    /// Where its @connections is.
    pub management: WebSocketApiUrl,
    /// The name of the table with the replies.
    pub pending_requests_table: String,
}

/// What a process that holds the connections itself gives to the functions it runs, so that they can send within the process to
/// each other and to agents.
#[derive(Clone, Debug)]
pub struct InProcess {
    /// The connections.
    pub connections: Arc<dyn OpenConnections>,
    /// Where replies are waited for.
    pub replies: Replies,
    /// How long a connection may live; `None` means no limit.
    pub life: Option<Duration>,
}

impl AgentPath {
    /// Reads `WEBSOCKET_API_ENDPOINT` and `PENDING_REQUESTS_TABLE`. @connections is under the WebSocket API's address unless the
    /// SDK's own `AWS_ENDPOINT_URL_APIGATEWAYMANAGEMENTAPI` names another, as emulators need it. `None` means that a fault was
    /// noted.
    pub fn read(variables: &Variables<'_>) -> Option<Self> {
        let websocket_api = variables.required::<WebSocketApiUrl>("WEBSOCKET_API_ENDPOINT");
        let elsewhere = variables.optional("AWS_ENDPOINT_URL_APIGATEWAYMANAGEMENTAPI");
        let pending_requests_table = variables.required("PENDING_REQUESTS_TABLE");
        let websocket_api = websocket_api?;
        Some(Self::Cloud(CloudPath {
            management: elsewhere?.unwrap_or_else(|| websocket_api.clone()),
            websocket_api,
            pending_requests_table: pending_requests_table?,
        }))
    }

    /// Agents' connections.
    pub fn agents(&self, sdk: &SdkConfig) -> AgentConnections {
        match self {
            Self::Cloud(path) => AgentConnections::managed(sdk, &path.management),
            Self::InProcess(process) => AgentConnections::in_process(process.connections.clone()),
        }
    }

    /// The way of replies. `connections` is who is connected.
    pub fn replies(&self, sdk: &SdkConfig, connections: ConnectionsTable) -> ReplyPath {
        match self {
            Self::Cloud(path) => ReplyPath::Cloud {
                mailbox: MailboxTable::new(sdk, path.pending_requests_table.clone()),
                connections,
            },
            Self::InProcess(process) => ReplyPath::InProcess(process.replies.clone()),
        }
    }

    /// How long a connection may live; `None` means no limit.
    pub fn life(&self) -> Option<Duration> {
        match self {
            Self::Cloud(_) => Some(WEBSOCKET_LIFETIME),
            Self::InProcess(process) => process.life,
        }
    }

    /// Whether bodies are compressed between the service and agents: not if both are on one machine, where bytes cost nothing and
    /// compression does.
    pub fn use_compression(&self, public_url: &PublicUrl) -> bool {
        matches!(self, Self::Cloud(_)) || !public_url.is_loopback()
    }

    /// Whether messages may be binary: API Gateway passes on text.
    pub fn use_binary(&self) -> bool {
        matches!(self, Self::InProcess(_))
    }
}

#[cfg(test)]
mod tests {
    use tunnel_protocol::{id::ConnectionId, message::Encoded};

    use super::*;
    use crate::agents::{PostError, Sending};

    /// A process without agents.
    #[derive(Debug)]
    struct Nobody;

    impl OpenConnections for Nobody {
        fn send<'s>(&'s self, _: &'s ConnectionId, _: Encoded, _: Duration) -> Sending<'s> {
            Box::pin(async { Err(PostError::Gone) })
        }

        fn is_open(&self, _: &ConnectionId) -> bool {
            false
        }

        fn close(&self, _: &ConnectionId) -> Result<(), PostError> {
            Err(PostError::Gone)
        }
    }

    #[test]
    fn only_bodies_that_stay_on_one_machine_are_not_compressed() {
        let process = AgentPath::InProcess(InProcess {
            connections: Arc::new(Nobody),
            replies: Replies::default(),
            life: None,
        });
        let api: WebSocketApiUrl = "ws://127.0.0.1:1/v1".parse().expect("a URL");
        let cloud = AgentPath::Cloud(CloudPath {
            websocket_api: api.clone(),
            management: api,
            pending_requests_table: "replies".to_owned(),
        });
        for (path, public_url, expected) in [
            (&process, "http://127.0.0.1:8080", false),
            (&process, "https://tunnel.example.com", true),
            (&cloud, "http://127.0.0.1:8080", true),
        ] {
            let public_url = public_url.parse().expect("a URL");
            assert_eq!(path.use_compression(&public_url), expected, "{public_url}");
        }
    }
}
