//! The `$default` route: everything an agent sends.
//!
//! `ready` puts the tunnel online and is answered with its address. Replies to visitors' requests go to the mailbox, where
//! `forward` finds them. What cannot be read is logged and dropped: an agent learns of it from the visitor's time-out.

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use tracing::{debug, info, warn};
use tunnel_shared::{
    cloud::{
        RouteResponse,
        connections::Connections,
        event::{WrongEvent, connection_of},
        mailbox::{Mailbox, Reply},
        now,
        sdk::SdkConfig,
        settings::{Faults, Variables},
        store::StoreError,
        tunnels::{Online, Tunnels},
        websocket::{ManagementEndpoint, PostError, WebSocketApi},
    },
    id::{ConnectionId, TunnelId},
    protocol::{self, ConnectionEstablished, FEATURES, Feature, FromAgent, Ready, ToAgent},
    routing::{PublicUrl, Routing},
};

/// The function: its settings and clients, made once per execution environment.
#[derive(Clone, Debug)]
pub struct DefaultRoute {
    tunnels: Tunnels,
    connections: Connections,
    mailbox: Mailbox,
    agents: WebSocketApi,
    public_url: PublicUrl,
    routing: Routing,
}

/// Why a message was not handled: the fault is ours. API Gateway tells the agent "Internal server error".
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The event is of another kind.
    #[error(transparent)]
    Event(#[from] WrongEvent),
    /// The tables do not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// @connections does not answer.
    #[error(transparent)]
    Post(#[from] PostError),
}

impl DefaultRoute {
    /// Reads the settings.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn load(variables: Variables<'_>, sdk: &SdkConfig) -> Result<Self, Faults> {
        let tunnels = variables.required("TUNNELS_TABLE");
        let connections = variables.required("CONNECTIONS_TABLE");
        let mailbox = variables.required("PENDING_REQUESTS_TABLE");
        let endpoint = variables.required::<ManagementEndpoint>("WEBSOCKET_API_ENDPOINT");
        let public_url = variables.required("PUBLIC_URL");
        let routing = variables.optional("ROUTING", Routing::Path);
        variables.finish(|| {
            Some(Self {
                tunnels: Tunnels::new(sdk, tunnels?),
                connections: Connections::new(sdk, connections?),
                mailbox: Mailbox::new(sdk, mailbox?),
                agents: WebSocketApi::new(sdk, &endpoint?),
                public_url: public_url?,
                routing: routing?,
            })
        })
    }

    /// Handles an event.
    ///
    /// # Errors
    /// When the event is of another kind, or the tables or @connections do not answer.
    pub async fn handle(&self, event: ApiGatewayWebsocketProxyRequest) -> Result<RouteResponse, Error> {
        let context = event.request_context;
        let sender = connection_of("MESSAGE", context.event_type.as_deref(), context.connection_id.as_deref())?;
        match protocol::decode(event.body.as_deref().unwrap_or_default()) {
            Ok(message) => self.take(&sender, message).await,
            Err(error) => {
                warn!(connection = %sender, error = &error as &dyn std::error::Error, "message dropped");
                Ok(RouteResponse::refused(400, "invalid_message", "not a message of the tunnel protocol"))
            }
        }
    }

    async fn take(&self, sender: &ConnectionId, message: FromAgent) -> Result<RouteResponse, Error> {
        match message {
            FromAgent::Ready(ready) => return self.open(sender, ready).await,
            FromAgent::Ping => {
                // The dashboard counts live agents by this line.
                info!(connection = %sender, "ping");
                self.post(sender, &ToAgent::Pong).await?;
            }
            FromAgent::HttpResponse(response) => self.mailbox.put(sender, response.into(), now()).await?,
            FromAgent::BodyPart(part) => self.mailbox.put(sender, part.into(), now()).await?,
            FromAgent::Error(error) => match Reply::of_error(error.clone()) {
                Some(reply) => self.mailbox.put(sender, reply, now()).await?,
                None => info!(connection = %sender, code = ?error.code, message = error.message, "agent reports an error"),
            },
            FromAgent::Unknown => debug!(connection = %sender, "message of an unknown type ignored"),
        }
        Ok(RouteResponse::ok())
    }

    /// Puts the sender's tunnel online and tells it the address.
    async fn open(&self, sender: &ConnectionId, ready: Ready) -> Result<RouteResponse, Error> {
        let Some(connection) = self.connections.get(sender, now()).await? else {
            warn!(connection = %sender, "ready from a connection that is not recorded");
            return Ok(RouteResponse::refused(410, "gone", "this connection is not recorded; connect again"));
        };
        let online = Online { connection_id: sender.clone(), features: ready.features };
        let Some(before) = self.tunnels.go_online(&connection.tunnel_id, &connection.owner, &online, now()).await? else {
            self.agents.close(sender).await?;
            return Ok(RouteResponse::refused(409, "name_taken", "the tunnel belongs to somebody else by now"));
        };
        info!(connection = %sender, tunnel = %connection.tunnel_id, agent = ready.agent, "online");
        if let Some(before) = before {
            self.retire(&before).await;
        }
        self.post(sender, &ToAgent::ConnectionEstablished(self.address(sender, connection.tunnel_id))).await?;
        Ok(RouteResponse::ok())
    }

    fn address(&self, connection: &ConnectionId, tunnel_id: TunnelId) -> ConnectionEstablished {
        let by_path = self.public_url.by_path(&tunnel_id);
        let by_subdomain = (self.routing == Routing::Subdomain).then(|| self.public_url.by_subdomain(&tunnel_id));
        ConnectionEstablished {
            connection_id: connection.clone(),
            public_url: by_subdomain.clone().unwrap_or_else(|| by_path.clone()),
            subdomain_url: by_subdomain,
            path_based_url: Some(by_path),
            tunnel_id,
            protocol: Some(protocol::VERSION),
            features: FEATURES.to_vec(),
        }
    }

    /// Tells the connection that served the tunnel until now. The new one is online already, so a failure only matters to the log.
    async fn retire(&self, before: &Online) {
        let outcome = if before.features.contains(&Feature::Notices) {
            let reason = "another connection of the tunnel's owner has taken it over".to_owned();
            self.post(&before.connection_id, &ToAgent::Replaced { reason }).await
        } else {
            self.agents.close(&before.connection_id).await
        };
        if let Err(error) = outcome {
            warn!(connection = %before.connection_id, error = &error as &dyn std::error::Error, "could not tell the replaced connection");
        }
    }

    /// Sends to an agent. That it is gone meanwhile is no failure.
    async fn post(&self, to: &ConnectionId, message: &ToAgent) -> Result<(), PostError> {
        match self.agents.post(to, message).await {
            Err(PostError::Gone) => {
                info!(connection = %to, "gone before it could be answered");
                Ok(())
            }
            outcome => outcome,
        }
    }
}
