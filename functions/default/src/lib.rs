//! The `$default` route: everything an agent sends.
//!
//! `ready` puts the tunnel online and is answered with its address. Replies to visitors' requests are passed on to where `forward`
//! waits for them: `relay` tells how. Whoever is heard from is checked: whether its token is still good, its tunnel still its own,
//! and the address that it was told still right. What cannot be read is logged and dropped: an agent learns of it from the visitor's
//! time-out.

mod relay;

use std::{sync::Arc, time::Duration};

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use tracing::{debug, info, warn};
use tunnel_protocol::{
    id::{ConnectionId, TunnelId},
    limits::WEBSOCKET_LIFETIME,
    message,
    message::{ConnectionEstablished, FEATURES, Feature, FromAgent, Ready, Subject, ToAgent},
    visitor_policy::VisitorPolicy,
};
use tunnel_service::{
    agents::{AgentConnections, InProcess, PostError, use_compression},
    auth::{AuthMode, Revalidator},
    aws::route_event::{RouteEventError, RouteResponse, connection_of},
    aws::sdk::SdkConfig,
    now,
    replies::Reply,
    routing::{PublicUrl, Routing},
    settings::{SettingsError, Variables},
    tables::connections::{Connection, ConnectionsTable, Opened},
    tables::dynamodb::StoreError,
    tables::tokens::TokensTable,
    tables::tunnels::{Online, Tunnel, TunnelsTable},
};

use crate::relay::Relay;

/// Why a connection serves its tunnel no longer.
const TAKEN_OVER: &str = "another connection of the tunnel's owner has taken it over";
const RELEASED: &str = "the tunnel id was released: it is this agent's no longer";

/// The function: its settings and clients, made once per execution environment.
#[derive(Clone, Debug)]
pub struct DefaultRoute {
    revalidator: Revalidator,
    tunnels: TunnelsTable,
    connections: ConnectionsTable,
    relay: Relay,
    agents: AgentConnections,
    public_url: PublicUrl,
    routing: Routing,
    /// How long a connection may live.
    life: Duration,
    /// What this service announces.
    features: Vec<Feature>,
}

/// Why a message was not handled: the fault is ours. API Gateway tells the agent "Internal server error".
#[derive(Debug, thiserror::Error)]
pub enum DefaultRouteError {
    /// The event is of another kind.
    #[error(transparent)]
    Event(#[from] RouteEventError),
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
    pub fn load(
        variables: Variables<'_>,
        sdk: &SdkConfig,
        in_process: Option<&InProcess>,
    ) -> Result<Self, SettingsError> {
        let auth = variables.or("AUTH", AuthMode::Token);
        let tokens = variables.required("TOKENS_TABLE");
        let tunnels = variables.required("TUNNELS_TABLE");
        let connections = variables
            .required("CONNECTIONS_TABLE")
            .map(|name| ConnectionsTable::new(sdk, name));
        let agents = AgentConnections::load(&variables, sdk, in_process);
        let relay = Relay::load(
            &variables,
            sdk,
            in_process,
            connections.as_ref(),
            agents.as_ref(),
        );
        let public_url = variables.required("PUBLIC_URL");
        let routing = variables.or("ROUTING", Routing::Path);
        variables.finish(|| {
            let public_url: PublicUrl = public_url?;
            let packs = use_compression(in_process, &public_url);
            Some(Self {
                revalidator: Revalidator::new(auth?, TokensTable::new(sdk, tokens?)),
                tunnels: TunnelsTable::new(sdk, tunnels?),
                connections: connections?,
                relay: relay?,
                agents: agents?,
                features: FEATURES
                    .into_iter()
                    .filter(|feature| packs || *feature != Feature::Zstd)
                    .collect(),
                public_url,
                routing: routing?,
                life: in_process.map_or(WEBSOCKET_LIFETIME, |in_process| in_process.life),
            })
        })
    }

    /// Handles an event.
    ///
    /// # Errors
    /// When the event is of another kind, or the tables or @connections do not answer.
    pub async fn handle(
        &self,
        event: ApiGatewayWebsocketProxyRequest,
    ) -> Result<RouteResponse, DefaultRouteError> {
        let context = event.request_context;
        let sender = connection_of(
            "MESSAGE",
            context.event_type.as_deref(),
            context.connection_id.as_deref(),
        )?;
        self.message(&sender, event.body.as_deref().unwrap_or_default())
            .await
    }

    /// Handles a message that `sender` sent.
    ///
    /// # Errors
    /// When the tables or @connections do not answer.
    pub async fn message(
        &self,
        sender: &ConnectionId,
        text: &str,
    ) -> Result<RouteResponse, DefaultRouteError> {
        if self.relay.is_elsewhere() && Box::pin(self.relay.pass_on(sender, text)).await? {
            return Ok(RouteResponse::ok());
        }
        match message::decode(text) {
            Ok(message) => self.take(sender, message).await,
            Err(error) => {
                warn!(connection = %sender, error = &error as &dyn std::error::Error, "message dropped");
                if let Ok(Subject { request_id }) = message::decode(text) {
                    self.relay
                        .deliver(sender, Reply::unreadable(request_id))
                        .await?;
                }
                Ok(RouteResponse::refused(
                    400,
                    "invalid_message",
                    "not a message of the tunnel protocol",
                ))
            }
        }
    }

    async fn take(
        &self,
        sender: &ConnectionId,
        message: FromAgent,
    ) -> Result<RouteResponse, DefaultRouteError> {
        match message {
            FromAgent::Ready(ready) => return Box::pin(self.open(sender, ready)).await,
            FromAgent::Ping => {
                // The dashboard counts live agents by this line.
                info!(connection = %sender, "ping");
                if self.check(sender).await? {
                    self.post(sender, &ToAgent::Pong).await?;
                }
            }
            FromAgent::Release => return self.release(sender).await,
            FromAgent::HttpResponse(response) => {
                self.relay.deliver(sender, response.into()).await?
            }
            FromAgent::BodyPart(part) => self.relay.deliver(sender, part.into()).await?,
            FromAgent::Window(window) => self.relay.deliver(sender, window.into()).await?,
            FromAgent::Error(error) => match Reply::of_error(error.clone()) {
                Some(reply) => self.relay.deliver(sender, reply).await?,
                None => {
                    info!(connection = %sender, code = ?error.code, message = error.message, "agent reports an error")
                }
            },
            FromAgent::Unknown => {
                debug!(connection = %sender, "message of an unknown type ignored")
            }
        }
        Ok(RouteResponse::ok())
    }

    /// Puts the sender's tunnel online and tells it the address.
    async fn open(
        &self,
        sender: &ConnectionId,
        ready: Ready,
    ) -> Result<RouteResponse, DefaultRouteError> {
        let (tunnel_id, identity) = match self.connections.get(sender, now()).await? {
            Some(Connection::Agent {
                tunnel_id,
                identity,
                ..
            }) => (tunnel_id, identity),
            Some(Connection::Reply) => {
                self.relay.open(sender).await?;
                return Ok(RouteResponse::ok());
            }
            None => return Ok(unknown(sender)),
        };
        if !self.revalidator.is_still_valid(&identity, now()).await? {
            return self.close_revoked(sender, &tunnel_id).await;
        }
        let access = match ready
            .access
            .map(serde_json::from_value::<VisitorPolicy>)
            .transpose()
        {
            Ok(access) => access.map(Arc::new),
            // Without them the tunnel would be open to everybody.
            Err(error) => return self.refuse_access(sender, &error).await,
        };
        let online = Online {
            connection_id: sender.clone(),
            features: ready.features,
            access,
        };
        let Some(before) = self
            .tunnels
            .mark_online(&tunnel_id, &identity, &online, now())
            .await?
        else {
            self.agents.close(sender).await?;
            return Ok(RouteResponse::refused(
                409,
                "name_taken",
                "the tunnel belongs to somebody else by now",
            ));
        };
        info!(connection = %sender, tunnel = %tunnel_id, agent = ready.agent, "online");
        if let Some(before) =
            before.filter(|before| ready.previous.as_ref() != Some(&before.connection_id))
        {
            self.notify_replaced(&before, TAKEN_OVER).await;
        }
        let address = self.address(sender, tunnel_id);
        let opened = Opened {
            features: online.features,
            public_url: address.public_url.clone(),
        };
        self.post(sender, &ToAgent::ConnectionEstablished(address))
            .await?;
        self.connections.record_opened(sender, &opened).await?;
        Ok(RouteResponse::ok())
    }

    /// Says what is wrong with the rules, and closes the connection.
    async fn refuse_access(
        &self,
        sender: &ConnectionId,
        fault: &serde_json::Error,
    ) -> Result<RouteResponse, DefaultRouteError> {
        let message = format!("the service cannot keep to the rules in access: {fault}");
        warn!(connection = %sender, message, "refused");
        self.post(
            sender,
            &ToAgent::Error {
                message: message.clone(),
            },
        )
        .await?;
        self.agents.close(sender).await?;
        Ok(RouteResponse::refused(400, "invalid_access", &message))
    }

    /// Makes the sender's tunnel nobody's, and tells whoever served it.
    async fn release(&self, sender: &ConnectionId) -> Result<RouteResponse, DefaultRouteError> {
        let Some(Connection::Agent {
            tunnel_id,
            identity,
            ..
        }) = self.connections.get(sender, now()).await?
        else {
            return Ok(unknown(sender));
        };
        if !self.revalidator.is_still_valid(&identity, now()).await? {
            return self.close_revoked(sender, &tunnel_id).await;
        }
        let released = self
            .tunnels
            .release_owned(&tunnel_id, &identity.owner)
            .await?;
        let existed = released.is_some();
        info!(connection = %sender, tunnel = %tunnel_id, existed, "released");
        if let Some(online) = released
            .and_then(|tunnel| tunnel.online)
            .filter(|online| online.connection_id != *sender)
        {
            self.notify_replaced(&online, RELEASED).await;
        }
        self.post(sender, &ToAgent::Released { tunnel_id, existed })
            .await?;
        Ok(RouteResponse::ok())
    }

    /// Checks an agent's open connection, and tells whether it may stay. One whose token is good no longer is closed; one whose
    /// tunnel is its own no longer is told or closed; one that was told another address than the tunnel's is told that.
    ///
    /// # Errors
    /// When the tables or @connections do not answer.
    pub async fn check(&self, connection: &ConnectionId) -> Result<bool, DefaultRouteError> {
        let Some(Connection::Agent {
            tunnel_id,
            identity,
            opened,
        }) = self.connections.get(connection, now()).await?
        else {
            return Ok(true);
        };
        if !self.revalidator.is_still_valid(&identity, now()).await? {
            self.close_revoked(connection, &tunnel_id).await?;
            return Ok(false);
        }
        match self
            .tunnels
            .get(&tunnel_id, now())
            .await?
            .filter(|tunnel| tunnel.identity.owner == identity.owner)
        {
            Some(Tunnel {
                online: Some(online),
                ..
            }) if online.connection_id == *connection => {
                self.check_url(connection, &tunnel_id, opened).await?;
                Ok(true)
            }
            // Another connection of the owner serves it.
            Some(_) => Ok(true),
            None => {
                // One that has not opened its tunnel, such as to release it, has none to lose.
                let Some(Opened { features, .. }) = opened else {
                    return Ok(true);
                };
                info!(%connection, tunnel = %tunnel_id, "its tunnel id was released");
                let takes_notices = features.contains(&Feature::Notices);
                self.notify_replaced(
                    &Online {
                        connection_id: connection.clone(),
                        features,
                        access: None,
                    },
                    RELEASED,
                )
                .await;
                Ok(takes_notices)
            }
        }
    }

    /// Tells the agent that serves a tunnel if the tunnel's address is another than it was told.
    async fn check_url(
        &self,
        connection: &ConnectionId,
        tunnel_id: &TunnelId,
        opened: Option<Opened>,
    ) -> Result<(), DefaultRouteError> {
        let public_url = self.public_url.of(tunnel_id, self.routing);
        let told_another = |opened: &Opened| {
            opened.public_url != public_url && opened.features.contains(&Feature::Notices)
        };
        let Some(opened) = opened.filter(told_another) else {
            return Ok(());
        };
        info!(%connection, tunnel = %tunnel_id, "told the new address");
        self.post(
            connection,
            &ToAgent::UrlUpdated {
                public_url: public_url.clone(),
            },
        )
        .await?;
        self.connections
            .record_opened(
                connection,
                &Opened {
                    public_url,
                    ..opened
                },
            )
            .await?;
        Ok(())
    }

    /// Closes a connection whose token is good no longer.
    async fn close_revoked(
        &self,
        connection: &ConnectionId,
        tunnel_id: &TunnelId,
    ) -> Result<RouteResponse, DefaultRouteError> {
        warn!(%connection, tunnel = %tunnel_id, "closed: its token is revoked or expired");
        self.tunnels
            .mark_offline(tunnel_id, connection, now())
            .await?;
        self.agents.close(connection).await?;
        Ok(RouteResponse::refused(
            401,
            "unauthorized",
            "the token of this connection is good no longer",
        ))
    }

    fn address(&self, connection: &ConnectionId, tunnel_id: TunnelId) -> ConnectionEstablished {
        let by_path = self.public_url.by_path(&tunnel_id);
        let by_subdomain =
            (self.routing == Routing::Subdomain).then(|| self.public_url.by_subdomain(&tunnel_id));
        ConnectionEstablished {
            connection_id: connection.clone(),
            public_url: self.public_url.of(&tunnel_id, self.routing),
            subdomain_url: by_subdomain,
            path_based_url: Some(by_path),
            tunnel_id,
            protocol: Some(message::VERSION),
            features: self.features.clone(),
            life_ms: u64::try_from(self.life.as_millis()).ok(),
        }
    }

    /// Tells a connection that it serves the tunnel no longer. That is decided already, so a failure only matters to the log.
    async fn notify_replaced(&self, before: &Online, reason: &str) {
        let outcome = if before.features.contains(&Feature::Notices) {
            self.post(
                &before.connection_id,
                &ToAgent::Replaced {
                    reason: reason.to_owned(),
                },
            )
            .await
        } else {
            self.agents.close(&before.connection_id).await
        };
        if let Err(error) = outcome {
            warn!(connection = %before.connection_id, error = &error as &dyn std::error::Error, "could not tell the connection");
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

fn unknown(sender: &ConnectionId) -> RouteResponse {
    warn!(connection = %sender, "message from a connection that is not recorded");
    RouteResponse::refused(
        410,
        "gone",
        "this connection is not recorded; connect again",
    )
}
