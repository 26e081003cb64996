//! The `$default` route: everything an agent sends.
//!
//! `ready` puts the tunnel online and is answered with its address. Replies to visitors' requests are passed on to where `forward`
//! waits for them: see `relay`. `websockets` carries the messages of visitors' WebSockets, both ways. Each sender is checked: whether its token is still valid, its tunnel still its own,
//! and the address that it was sent still right. What cannot be read is logged and dropped: an agent learns of it from the visitor's
//! time-out.

mod ownership;
mod relay;
mod websockets;

use std::{sync::Arc, time::Duration};

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use bytes::Bytes;
use tracing::{Instrument, debug, info, warn};
use tunnel_protocol::{
    id::{ConnectionId, TunnelId},
    limits::WEBSOCKET_LIFETIME,
    message,
    message::{
        ConnectionEstablished, DecodeError, FEATURES, Feature, FromAgent, Ready, Subject, ToAgent,
    },
    visitor_policy::VisitorPolicy,
};
use tunnel_service::{
    agent_path::AgentPath,
    agents::{AgentConnections, PostError, WebSocketApiUrl},
    aside::aside,
    auth::{AuthMode, Revalidator},
    aws::route_event::{RouteEventError, RouteResponse, VISITORS_STAGE, connection_of},
    aws::sdk::SdkConfig,
    now,
    replies::Reply,
    routing::{PublicUrl, Routing},
    settings::{SettingsError, Variables},
    tables::connections::{AgentConnection, Connection, ConnectionsTable, Opened},
    tables::dynamodb::StoreError,
    tables::tokens::TokensTable,
    tables::tunnels::TunnelsTable,
    tables::visitor_sockets::VisitorSocketsTable,
    telemetry::connection_span,
};

use crate::{
    ownership::{BUSY_TIMEOUT, Candidate, Ownership, RELEASED, Standing, TAKEN_OVER},
    relay::Relay,
    websockets::Websockets,
};

/// What a look at many open connections has found.
#[derive(Clone, Debug)]
pub struct Survey<'c> {
    /// Those that a [check](DefaultRoute::check) would do something about.
    pub unsettled: Vec<&'c ConnectionId>,
    /// When the first of their agents' credentials expires, as the time since 1970. Until then nobody who is settled has to leave
    /// unless something is written to the tables, or a record's own time is over.
    pub next_expiry: Option<Duration>,
}

/// What the function needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How agents authenticate.
    pub auth: AuthMode,
    /// The name of the tokens table.
    pub tokens_table: String,
    /// The name of the tunnels table.
    pub tunnels_table: String,
    /// The name of the connections table.
    pub connections_table: String,
    /// The way to agents, and of their replies.
    pub agent_path: AgentPath,
    /// Where visitors find the tunnels.
    pub public_url: PublicUrl,
    /// How public addresses name a tunnel.
    pub routing: Routing,
    /// The visitors' WebSocket API; `None` where WebSockets are carried in another way.
    pub visitor_sockets: Option<WebSocketApiUrl>,
}

impl Settings {
    /// Reads the settings.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn read(variables: Variables<'_>) -> Result<Self, SettingsError> {
        let auth = variables.or("AUTH", AuthMode::Token);
        let tokens_table = variables.required("TOKENS_TABLE");
        let tunnels_table = variables.required("TUNNELS_TABLE");
        let connections_table = variables.required("CONNECTIONS_TABLE");
        let agent_path = AgentPath::read(&variables);
        let public_url = variables.required("PUBLIC_URL");
        let routing = variables.or("ROUTING", Routing::Path);
        let visitor_sockets = variables.optional("VISITOR_SOCKETS_ENDPOINT");
        variables.finish(|| {
            Some(Self {
                auth: auth?,
                tokens_table: tokens_table?,
                tunnels_table: tunnels_table?,
                connections_table: connections_table?,
                agent_path: agent_path?,
                public_url: public_url?,
                routing: routing?,
                visitor_sockets: visitor_sockets?,
            })
        })
    }
}

/// The function: its settings and clients, made once per execution environment.
#[derive(Clone, Debug)]
pub struct DefaultRoute {
    revalidator: Revalidator,
    ownership: Ownership,
    relay: Relay,
    /// Visitors' WebSockets; `None` where they are carried in another way.
    websockets: Option<Websockets>,
    public_url: PublicUrl,
    routing: Routing,
    /// How long a connection may live; `None` means no limit.
    life: Option<Duration>,
    /// What this service announces.
    features: Vec<Feature>,
}

/// Why a message was not handled: an error of the service. API Gateway sends the agent "Internal server error".
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
    /// The tunnel changes hands faster than it can be looked at.
    #[error("the tunnel changes hands too fast")]
    Contended,
}

impl DefaultRoute {
    /// Reads the settings and makes the function.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn load(variables: Variables<'_>, sdk: &SdkConfig) -> Result<Self, SettingsError> {
        Ok(Self::new(Settings::read(variables)?, sdk))
    }

    /// Makes the function.
    pub fn new(settings: Settings, sdk: &SdkConfig) -> Self {
        let path = settings.agent_path;
        let agents = path.agents(sdk);
        let connections = ConnectionsTable::new(sdk, settings.connections_table);
        let use_compression = path.use_compression(&settings.public_url);
        let websockets = settings.visitor_sockets.map(|api| {
            let visitors = AgentConnections::managed(sdk, &api);
            Websockets::new(
                VisitorSocketsTable::new(&connections),
                agents.clone(),
                visitors,
            )
        });
        Self {
            revalidator: Revalidator::new(
                settings.auth,
                TokensTable::new(sdk, settings.tokens_table),
            ),
            relay: Relay::new(path.replies(sdk, connections.clone()), agents.clone()),
            websockets,
            ownership: Ownership {
                tunnels: TunnelsTable::new(sdk, settings.tunnels_table),
                connections,
                agents,
            },
            features: FEATURES
                .into_iter()
                .filter(|feature| match feature {
                    Feature::Zstd => use_compression,
                    Feature::Binary | Feature::LongFrames | Feature::CompactHeads => {
                        path.use_binary()
                    }
                    _ => true,
                })
                .collect(),
            public_url: settings.public_url,
            routing: settings.routing,
            life: path.life(),
        }
    }

    /// Handles an event.
    ///
    /// # Errors
    /// If the event is of another kind, or the tables or @connections do not answer.
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
        let text = event.body.unwrap_or_default();
        let handled = async {
            match &self.websockets {
                Some(websockets) if context.stage.as_deref() == Some(VISITORS_STAGE) => {
                    Box::pin(websockets.take_from_visitor(&sender, text)).await?;
                    Ok(RouteResponse::ok())
                }
                _ => self.message(&sender, &text).await,
            }
        };
        handled.instrument(connection_span(&sender)).await
    }

    /// Handles a message that `sender` sent, within the caller's span of that connection.
    ///
    /// # Errors
    /// If the tables or @connections do not answer.
    pub async fn message(
        &self,
        sender: &ConnectionId,
        text: &str,
    ) -> Result<RouteResponse, DefaultRouteError> {
        if Box::pin(self.relay.pass_on(sender, text)).await? {
            return Ok(RouteResponse::ok());
        }
        let subject = || message::decode(text);
        self.decoded(sender, message::decode(text), subject).await
    }

    /// Handles a binary message that `sender` sent.
    ///
    /// # Errors
    /// If the tables or @connections do not answer.
    pub async fn binary_message(
        &self,
        sender: &ConnectionId,
        bytes: &Bytes,
    ) -> Result<RouteResponse, DefaultRouteError> {
        let subject = || message::subject_of_binary(bytes);
        self.decoded(sender, message::decode_binary(bytes), subject)
            .await
    }

    /// Handles a message. `subject` is the request that it is about, should it be unreadable otherwise.
    async fn decoded(
        &self,
        sender: &ConnectionId,
        message: Result<FromAgent, DecodeError>,
        subject: impl FnOnce() -> Result<Subject, DecodeError>,
    ) -> Result<RouteResponse, DefaultRouteError> {
        match message {
            Ok(message) => self.take(sender, message).await,
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                warn!(error = %error, cause, "message dropped");
                if let Ok(Subject { request_id }) = subject() {
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
        match Reply::from_message(message) {
            Ok(reply) => {
                self.relay.deliver(sender, reply).await?;
                Ok(RouteResponse::ok())
            }
            Err(message) => aside(|| self.take_other(sender, *message)).await,
        }
    }

    /// Handles a message that is no reply.
    async fn take_other(
        &self,
        sender: &ConnectionId,
        message: FromAgent,
    ) -> Result<RouteResponse, DefaultRouteError> {
        match message {
            FromAgent::Ready(ready) => return self.open(sender, ready).await,
            FromAgent::Ping { id } => {
                // The dashboard counts live agents by the connections of such lines.
                info!("ping");
                if self.check(sender, id).await? {
                    self.post(sender, &ToAgent::Pong { id }).await?;
                }
            }
            FromAgent::Release => return self.release(sender).await,
            FromAgent::WebsocketBatch(batch) => {
                if let Some(websockets) = &self.websockets {
                    websockets.take_from_agent(sender, batch).await?;
                }
            }
            FromAgent::WebsocketClose {
                request_id,
                websocket,
            } => {
                if let Some(websockets) = &self.websockets {
                    websockets.close(sender, &request_id, &websocket).await?;
                }
            }
            FromAgent::Error(error) => {
                info!(code = ?error.code, message = error.message, "agent reports an error");
            }
            FromAgent::HttpResponse(_) | FromAgent::BodyPart(_) | FromAgent::Window(_) => {}
            FromAgent::Unknown => {
                debug!("message of an unknown type ignored");
            }
        }
        Ok(RouteResponse::ok())
    }

    /// Puts the sender's tunnel online and sends it the address.
    async fn open(
        &self,
        sender: &ConnectionId,
        ready: Ready,
    ) -> Result<RouteResponse, DefaultRouteError> {
        let agent = match self.ownership.connections.get(sender, now()).await? {
            Some(Connection::Agent(agent)) => agent,
            Some(Connection::Reply) => {
                self.relay.open(sender).await?;
                return Ok(RouteResponse::ok());
            }
            None => return self.refuse_unknown(sender).await,
        };
        if !self.is_still_valid(&agent).await? {
            return self.close_revoked(sender, &agent.tunnel_id).await;
        }
        let policy = match ready
            .access
            .map(serde_json::from_value::<VisitorPolicy>)
            .transpose()
        {
            Ok(policy) => policy.map(Arc::new),
            // Without it the tunnel would be open to everyone.
            Err(error) => return self.refuse_policy(sender, &error).await,
        };
        let address = self.address(sender, agent.tunnel_id.clone());
        let opened = Opened {
            features: ready.features,
            public_url: address.public_url.clone(),
            policy,
            previous: ready.previous,
        };
        info!(tunnel = %agent.tunnel_id, agent = ready.agent, "ready");
        let candidate = Candidate {
            id: sender.clone(),
            agent,
            opened,
        };
        self.establish(&candidate, address).await
    }

    /// Lets a connection that has sent `ready` serve its tunnel, and notifies it and the one that served until then.
    async fn establish(
        &self,
        candidate: &Candidate,
        address: ConnectionEstablished,
    ) -> Result<RouteResponse, DefaultRouteError> {
        let (id, opened) = (&candidate.id, &candidate.opened);
        let is_open = self.ownership.connections.record_opened(id, opened).await?;
        if !is_open {
            return self.refuse_unknown(id).await;
        }
        let established = ToAgent::ConnectionEstablished(address);
        match Box::pin(self.ownership.settle(candidate)).await? {
            Standing::Serves { before } => {
                match self
                    .agents()
                    .post_patiently(id, &established, BUSY_TIMEOUT)
                    .await
                {
                    Err(PostError::Gone | PostError::Unknown) => {
                        info!("gone before its tunnel was open");
                        Box::pin(self.ownership.withdraw(candidate, before.as_ref())).await?;
                        return Ok(unknown());
                    }
                    outcome => outcome?,
                }
                if let Some(before) = before {
                    self.ownership
                        .notify_replaced(&before.connection_id, &before.features, TAKEN_OVER, None)
                        .await;
                }
            }
            Standing::Left | Standing::Outranked => {
                // Agents of earlier versions ignore everything before this message.
                self.post(id, &established).await?;
                self.ownership
                    .notify_replaced(id, &opened.features, TAKEN_OVER, None)
                    .await;
            }
            Standing::Released => {
                self.agents().close(id).await?;
                return Ok(RouteResponse::refused(
                    409,
                    "name_taken",
                    "the tunnel belongs to another owner by now",
                ));
            }
            Standing::Ended => return self.refuse_unknown(id).await,
        }
        Ok(RouteResponse::ok())
    }

    /// Says what is wrong with the visitor policy, and closes the connection.
    async fn refuse_policy(
        &self,
        sender: &ConnectionId,
        fault: &serde_json::Error,
    ) -> Result<RouteResponse, DefaultRouteError> {
        let message = format!("the service cannot enforce the visitor policy in access: {fault}");
        warn!(message, "refused");
        self.post(
            sender,
            &ToAgent::Error {
                message: message.clone(),
            },
        )
        .await?;
        self.agents().close(sender).await?;
        Ok(RouteResponse::refused(400, "invalid_access", &message))
    }

    /// Releases the sender's tunnel id, and notifies the connection that served the tunnel.
    async fn release(&self, sender: &ConnectionId) -> Result<RouteResponse, DefaultRouteError> {
        let Some(Connection::Agent(agent)) = self.ownership.connections.get(sender, now()).await?
        else {
            return self.refuse_unknown(sender).await;
        };
        if !self.is_still_valid(&agent).await? {
            return self.close_revoked(sender, &agent.tunnel_id).await;
        }
        let tunnel_id = agent.tunnel_id;
        let released = self
            .ownership
            .tunnels
            .release_owned(&tunnel_id, &agent.identity.owner, now())
            .await?;
        let existed = released.is_some();
        info!(tunnel = %tunnel_id, existed, "released");
        if let Some(online) = released
            .and_then(|tunnel| tunnel.online)
            .filter(|online| online.connection_id != *sender)
        {
            self.ownership
                .notify_replaced(&online.connection_id, &online.features, RELEASED, None)
                .await;
        }
        self.post(sender, &ToAgent::Released { tunnel_id, existed })
            .await?;
        Ok(RouteResponse::ok())
    }

    /// Checks an agent's open connection, sets right what is wrong, and returns whether a `ping` is to be answered with `pong`.
    /// `ping` is the id of that `ping`, if there is one and it has one.
    ///
    /// - One whose token was revoked or has expired is closed, and so is one that is not on record.
    /// - One that should serve its tunnel and does not is put online: an older one serves, or none does.
    /// - One that does not serve, because a newer one does or the tunnel id was released, receives `replaced`, unless the newer
    ///   one named it as `previous`.
    /// - One that serves and was sent an address other than the tunnel's is sent the right one.
    /// - The records of one that may be open for longer than in AWS are kept from expiring.
    ///
    /// # Errors
    /// If the tables or @connections do not answer.
    pub async fn check(
        &self,
        connection: &ConnectionId,
        ping: Option<u32>,
    ) -> Result<bool, DefaultRouteError> {
        let agent = match self.ownership.connections.get(connection, now()).await? {
            Some(Connection::Agent(agent)) => agent,
            Some(Connection::Reply) => return Ok(true),
            None => {
                self.refuse_unknown(connection).await?;
                return Ok(false);
            }
        };
        if !self.is_still_valid(&agent).await? {
            self.close_revoked(connection, &agent.tunnel_id).await?;
            return Ok(false);
        }
        // One that has not opened its tunnel, such as to release it, has none to lose.
        let Some(candidate) = Candidate::of(connection, agent) else {
            return Ok(true);
        };
        if self.life.is_none_or(|life| life > WEBSOCKET_LIFETIME) {
            self.ownership.keep(&candidate).await?;
        }
        let reason = match Box::pin(self.ownership.settle(&candidate)).await? {
            Standing::Serves { before } => {
                if let Some(before) = before {
                    self.ownership
                        .notify_replaced(&before.connection_id, &before.features, TAKEN_OVER, None)
                        .await;
                }
                self.check_url(&candidate).await?;
                return Ok(true);
            }
            Standing::Left => return Ok(true),
            Standing::Ended => return Ok(false),
            Standing::Outranked => TAKEN_OVER,
            Standing::Released => RELEASED,
        };
        info!(tunnel = %candidate.agent.tunnel_id, reason, "notified that it was replaced");
        self.ownership
            .notify_replaced(connection, &candidate.opened.features, reason, ping)
            .await;
        Ok(false)
    }

    /// Finds those of these open connections that a [check](Self::check) would do something about. It reads many at once, so that a
    /// process that holds thousands of idle connections can ask often.
    ///
    /// # Errors
    /// If the tables do not answer.
    pub async fn survey<'c>(
        &self,
        connections: &'c [ConnectionId],
    ) -> Result<Survey<'c>, DefaultRouteError> {
        let recorded = self
            .ownership
            .connections
            .get_many(connections, now())
            .await?;
        let agents = || {
            recorded.values().filter_map(|connection| match connection {
                Connection::Agent(agent) => Some(agent),
                Connection::Reply => None,
            })
        };
        let identities = agents().map(|agent| &agent.identity);
        let is_valid = self.revalidator.still_valid(identities, now()).await?;
        let ids = agents().map(|agent| &agent.tunnel_id);
        let tunnels = self.ownership.tunnels.get_many(ids, now()).await?;
        let is_settled = |id: &ConnectionId| match recorded.get(id) {
            None => false,
            Some(Connection::Reply) => true,
            Some(Connection::Agent(agent)) => {
                is_valid(&agent.identity)
                    && Candidate::of(id, agent.clone()).is_none_or(|candidate| {
                        tunnels.get(&agent.tunnel_id).is_some_and(|tunnel| {
                            candidate.serves(tunnel) && !self.has_old_url(&candidate)
                                || candidate
                                    .left_to(tunnel)
                                    .is_some_and(|next| recorded.contains_key(next))
                        })
                    })
            }
        };
        let expiries = agents().filter_map(|agent| agent.identity.expires_at);
        Ok(Survey {
            unsettled: connections.iter().filter(|id| !is_settled(id)).collect(),
            next_expiry: expiries.min().map(Duration::from_secs),
        })
    }

    async fn is_still_valid(&self, agent: &AgentConnection) -> Result<bool, StoreError> {
        self.revalidator
            .is_still_valid(&agent.identity, now())
            .await
    }

    /// Whether an agent that can be told was sent an address that is not the tunnel's.
    fn has_old_url(&self, serving: &Candidate) -> bool {
        let opened = &serving.opened;
        opened.features.contains(&Feature::Notices)
            && opened.public_url != self.public_url.of(&serving.agent.tunnel_id, self.routing)
    }

    /// Notifies the agent that serves a tunnel if the tunnel's address differs from the one it was sent.
    async fn check_url(&self, serving: &Candidate) -> Result<(), DefaultRouteError> {
        if !self.has_old_url(serving) {
            return Ok(());
        }
        let public_url = self.public_url.of(&serving.agent.tunnel_id, self.routing);
        let opened = &serving.opened;
        info!(tunnel = %serving.agent.tunnel_id, "sent the new address");
        let updated = ToAgent::UrlUpdated {
            public_url: public_url.clone(),
        };
        self.post(&serving.id, &updated).await?;
        let opened = Opened {
            public_url,
            ..opened.clone()
        };
        self.ownership
            .connections
            .record_opened(&serving.id, &opened)
            .await?;
        Ok(())
    }

    /// Closes a connection whose token was revoked or has expired.
    async fn close_revoked(
        &self,
        connection: &ConnectionId,
        tunnel_id: &TunnelId,
    ) -> Result<RouteResponse, DefaultRouteError> {
        warn!(tunnel = %tunnel_id, "closed: its token is revoked or expired");
        self.ownership
            .tunnels
            .mark_offline(tunnel_id, connection, now())
            .await?;
        self.agents().close(connection).await?;
        Ok(RouteResponse::refused(
            401,
            "unauthorized",
            "the token of this connection was revoked or has expired",
        ))
    }

    /// Closes a connection that is not on record, and so can serve nothing. Its agent connects again.
    async fn refuse_unknown(
        &self,
        connection: &ConnectionId,
    ) -> Result<RouteResponse, DefaultRouteError> {
        self.agents().close(connection).await?;
        Ok(unknown())
    }

    fn agents(&self) -> &AgentConnections {
        &self.ownership.agents
    }

    fn address(&self, connection: &ConnectionId, tunnel_id: TunnelId) -> ConnectionEstablished {
        let by_path = self.public_url.by_path(&tunnel_id);
        let by_subdomain = self.public_url.own_origin(&tunnel_id, self.routing);
        ConnectionEstablished {
            connection_id: connection.clone(),
            public_url: self.public_url.of(&tunnel_id, self.routing),
            subdomain_url: by_subdomain,
            path_based_url: Some(by_path),
            tunnel_id,
            protocol: Some(message::VERSION),
            features: self.features.clone(),
            life_ms: self
                .life
                .and_then(|life| u64::try_from(life.as_millis()).ok()),
        }
    }

    /// Sends to an agent. If the agent has gone meanwhile, that is not an error.
    async fn post(&self, to: &ConnectionId, message: &ToAgent) -> Result<(), PostError> {
        match self.agents().post(to, message).await {
            Err(PostError::Gone) => {
                info!("the connection closed before it could be answered");
                Ok(())
            }
            outcome => outcome,
        }
    }
}

fn unknown() -> RouteResponse {
    warn!("message from a connection that is not recorded");
    RouteResponse::refused(
        410,
        "gone",
        "this connection is not recorded; connect again",
    )
}
