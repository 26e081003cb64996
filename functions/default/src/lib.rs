//! The `$default` route: everything an agent sends.
//!
//! `ready` puts the tunnel online and is answered with its address. Replies to visitors' requests are passed on to where `forward`
//! waits for them: `relay` tells how. What cannot be read is logged and dropped: an agent learns of it from the visitor's
//! time-out.

mod relay;

use std::{sync::Arc, time::Duration};

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use tracing::{debug, info, warn};
use tunnel_shared::{
    access::Access,
    cloud::{
        RouteResponse,
        connections::{Connection, Connections},
        event::{WrongEvent, connection_of},
        now,
        replies::Reply,
        sdk::SdkConfig,
        settings::{Faults, Variables},
        store::StoreError,
        tunnels::{Online, Tunnels},
        websocket::{InProcess, PostError, WebSocketApi, packing_pays},
    },
    id::{ConnectionId, TunnelId},
    limits::WEBSOCKET_LIFE,
    protocol::{self, ConnectionEstablished, FEATURES, Feature, FromAgent, Ready, Subject, ToAgent},
    routing::{PublicUrl, Routing},
};

use crate::relay::Relay;

/// The function: its settings and clients, made once per execution environment.
#[derive(Clone, Debug)]
pub struct DefaultRoute {
    tunnels: Tunnels,
    connections: Connections,
    relay: Relay,
    agents: WebSocketApi,
    public_url: PublicUrl,
    routing: Routing,
    /// How long a connection may live.
    life: Duration,
    /// What this service announces.
    features: Vec<Feature>,
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
    /// Reads the settings. `in_process` is for a process that runs `forward` as well.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn load(variables: Variables<'_>, sdk: &SdkConfig, in_process: Option<&InProcess>) -> Result<Self, Faults> {
        let tunnels = variables.required("TUNNELS_TABLE");
        let connections = variables.required("CONNECTIONS_TABLE").map(|name| Connections::new(sdk, name));
        let agents = WebSocketApi::load(&variables, sdk, in_process);
        let relay = Relay::load(&variables, sdk, in_process, connections.as_ref(), agents.as_ref());
        let public_url = variables.required("PUBLIC_URL");
        let routing = variables.optional("ROUTING", Routing::Path);
        variables.finish(|| {
            let public_url: PublicUrl = public_url?;
            let packs = packing_pays(in_process, &public_url);
            Some(Self {
                tunnels: Tunnels::new(sdk, tunnels?),
                connections: connections?,
                relay: relay?,
                agents: agents?,
                features: FEATURES.into_iter().filter(|feature| packs || *feature != Feature::Zstd).collect(),
                public_url,
                routing: routing?,
                life: in_process.map_or(WEBSOCKET_LIFE, |in_process| in_process.life),
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
        self.message(&sender, event.body.as_deref().unwrap_or_default()).await
    }

    /// Handles a message that `sender` sent.
    ///
    /// # Errors
    /// When the tables or @connections do not answer.
    pub async fn message(&self, sender: &ConnectionId, text: &str) -> Result<RouteResponse, Error> {
        if self.relay.is_elsewhere() && Box::pin(self.relay.pass_on(sender, text)).await? {
            return Ok(RouteResponse::ok());
        }
        match protocol::decode(text) {
            Ok(message) => self.take(sender, message).await,
            Err(error) => {
                warn!(connection = %sender, error = &error as &dyn std::error::Error, "message dropped");
                if let Ok(Subject { request_id }) = protocol::decode(text) {
                    self.relay.deliver(sender, Reply::unreadable(request_id)).await?;
                }
                Ok(RouteResponse::refused(400, "invalid_message", "not a message of the tunnel protocol"))
            }
        }
    }

    async fn take(&self, sender: &ConnectionId, message: FromAgent) -> Result<RouteResponse, Error> {
        match message {
            FromAgent::Ready(ready) => return Box::pin(self.open(sender, ready)).await,
            FromAgent::Ping => {
                // The dashboard counts live agents by this line.
                info!(connection = %sender, "ping");
                self.post(sender, &ToAgent::Pong).await?;
            }
            FromAgent::HttpResponse(response) => self.relay.deliver(sender, response.into()).await?,
            FromAgent::BodyPart(part) => self.relay.deliver(sender, part.into()).await?,
            FromAgent::Window(window) => self.relay.deliver(sender, window.into()).await?,
            FromAgent::Error(error) => match Reply::of_error(error.clone()) {
                Some(reply) => self.relay.deliver(sender, reply).await?,
                None => info!(connection = %sender, code = ?error.code, message = error.message, "agent reports an error"),
            },
            FromAgent::Unknown => debug!(connection = %sender, "message of an unknown type ignored"),
        }
        Ok(RouteResponse::ok())
    }

    /// Puts the sender's tunnel online and tells it the address.
    async fn open(&self, sender: &ConnectionId, ready: Ready) -> Result<RouteResponse, Error> {
        let (tunnel_id, owner) = match self.connections.get(sender, now()).await? {
            Some(Connection::Agent { tunnel_id, owner }) => (tunnel_id, owner),
            Some(Connection::Reply) => {
                self.relay.open(sender).await?;
                return Ok(RouteResponse::ok());
            }
            None => {
                warn!(connection = %sender, "ready from a connection that is not recorded");
                return Ok(RouteResponse::refused(410, "gone", "this connection is not recorded; connect again"));
            }
        };
        let access = match ready.access.map(serde_json::from_value::<Access>).transpose() {
            Ok(access) => access.map(Arc::new),
            // Without them the tunnel would be open to everybody.
            Err(error) => return self.refuse_access(sender, &error).await,
        };
        let online = Online { connection_id: sender.clone(), features: ready.features, access };
        let Some(before) = self.tunnels.go_online(&tunnel_id, &owner, &online, now()).await? else {
            self.agents.close(sender).await?;
            return Ok(RouteResponse::refused(409, "name_taken", "the tunnel belongs to somebody else by now"));
        };
        info!(connection = %sender, tunnel = %tunnel_id, agent = ready.agent, "online");
        if let Some(before) = before.filter(|before| ready.previous.as_ref() != Some(&before.connection_id)) {
            self.retire(&before).await;
        }
        self.post(sender, &ToAgent::ConnectionEstablished(self.address(sender, tunnel_id))).await?;
        Ok(RouteResponse::ok())
    }

    /// Says what is wrong with the rules, and closes the connection.
    async fn refuse_access(&self, sender: &ConnectionId, fault: &serde_json::Error) -> Result<RouteResponse, Error> {
        let message = format!("the service cannot keep to the rules in access: {fault}");
        warn!(connection = %sender, message, "refused");
        self.post(sender, &ToAgent::Error { message: message.clone() }).await?;
        self.agents.close(sender).await?;
        Ok(RouteResponse::refused(400, "invalid_access", &message))
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
            features: self.features.clone(),
            life_ms: u64::try_from(self.life.as_millis()).ok(),
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
