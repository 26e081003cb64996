//! The `$disconnect` route: forget the connection, and mark its tunnel offline if no other connection has taken it over.
//!
//! API Gateway calls this as a best effort only. A tunnel whose $disconnect was lost is marked offline by the first message
//! that cannot be delivered to it.

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use tracing::{Instrument, info};
use tunnel_protocol::{id::ConnectionId, message::ToAgent};
use tunnel_service::{
    agents::{AgentConnections, PostError, WebSocketApiUrl},
    aws::route_event::{RouteEventError, RouteResponse, VISITORS_STAGE, connection_of},
    aws::sdk::SdkConfig,
    now,
    settings::{SettingsError, Variables},
    tables::connections::{AgentConnection, Connection, ConnectionsTable},
    tables::dynamodb::StoreError,
    tables::tunnels::TunnelsTable,
    tables::visitor_sockets::VisitorSocketsTable,
    telemetry::connection_span,
};

/// What the function needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The name of the tunnels table.
    pub tunnels_table: String,
    /// The name of the connections table.
    pub connections_table: String,
    /// The ends of visitors' WebSockets; `None` where these are carried in another way.
    pub websockets: Option<WebSocketApis>,
}

/// Where the @connections of both WebSocket APIs are.
#[derive(Clone, Debug)]
pub struct WebSocketApis {
    /// The agents'.
    pub agents: WebSocketApiUrl,
    /// The visitors'.
    pub visitors: WebSocketApiUrl,
}

impl Settings {
    /// Reads the settings. The agents' @connections may be at an address of its own, as for the other functions.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn read(variables: Variables<'_>) -> Result<Self, SettingsError> {
        let tunnels_table = variables.required("TUNNELS_TABLE");
        let connections_table = variables.required("CONNECTIONS_TABLE");
        let agents = variables.optional("WEBSOCKET_API_ENDPOINT");
        let elsewhere = variables.optional("AWS_ENDPOINT_URL_APIGATEWAYMANAGEMENTAPI");
        let visitors = variables.optional("VISITOR_SOCKETS_ENDPOINT");
        variables.finish(|| {
            let (agents, elsewhere) = (agents?, elsewhere?);
            let apis = elsewhere.or(agents).zip(visitors?);
            Some(Self {
                tunnels_table: tunnels_table?,
                connections_table: connections_table?,
                websockets: apis.map(|(agents, visitors)| WebSocketApis { agents, visitors }),
            })
        })
    }
}

/// The function: its settings and clients, made once per execution environment.
#[derive(Clone, Debug)]
pub struct Disconnect {
    tunnels: TunnelsTable,
    connections: ConnectionsTable,
    /// Visitors' WebSockets; `None` where they are carried in another way.
    websockets: Option<Websockets>,
}

/// Both ends of visitors' WebSockets.
#[derive(Clone, Debug)]
struct Websockets {
    table: VisitorSocketsTable,
    agents: AgentConnections,
    visitors: AgentConnections,
}

/// A connection that has ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Ended {
    /// The connection.
    pub connection: ConnectionId,
    /// The close code, if one is known.
    pub code: Option<u16>,
}

/// Why there is no answer: an error of the service.
#[derive(Debug, thiserror::Error)]
pub enum DisconnectError {
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

impl Disconnect {
    /// Reads the settings and makes the function.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn load(variables: Variables<'_>, sdk: &SdkConfig) -> Result<Self, SettingsError> {
        Ok(Self::new(Settings::read(variables)?, sdk))
    }

    /// Makes the function.
    pub fn new(settings: Settings, sdk: &SdkConfig) -> Self {
        let connections = ConnectionsTable::new(sdk, settings.connections_table);
        let websockets = settings.websockets.map(|apis| Websockets {
            table: VisitorSocketsTable::new(&connections),
            agents: AgentConnections::managed(sdk, &apis.agents),
            visitors: AgentConnections::managed(sdk, &apis.visitors),
        });
        Self {
            tunnels: TunnelsTable::new(sdk, settings.tunnels_table),
            connections,
            websockets,
        }
    }

    /// Handles an event.
    ///
    /// # Errors
    /// If the event is of another kind or the tables do not answer.
    pub async fn handle(
        &self,
        event: ApiGatewayWebsocketProxyRequest,
    ) -> Result<RouteResponse, DisconnectError> {
        let context = event.request_context;
        let connection = connection_of(
            "DISCONNECT",
            context.event_type.as_deref(),
            context.connection_id.as_deref(),
        )?;
        let code = context
            .disconnect_status_code
            .and_then(|code| u16::try_from(code).ok());
        let ended = Ended { connection, code };
        let handled = async {
            match &self.websockets {
                Some(websockets) if context.stage.as_deref() == Some(VISITORS_STAGE) => {
                    websockets.visitor_left(&ended).await
                }
                _ => self.serve(&ended).await,
            }
        };
        handled
            .instrument(connection_span(&ended.connection))
            .await?;
        Ok(RouteResponse::ok())
    }

    /// Forgets a connection that has ended, and marks its tunnel offline if it served it.
    ///
    /// # Errors
    /// If the tables do not answer.
    pub async fn serve(&self, ended: &Ended) -> Result<(), DisconnectError> {
        let id = &ended.connection;
        // First the connection is kept from taking the tunnel any more, and only at the end it is forgotten. So each step can be
        // repeated, and a `ready` that is handled at the same time comes before all of this or finds the connection ended.
        let Some(connection) = self.connections.end(id).await? else {
            return Ok(());
        };
        if let Connection::Agent(AgentConnection { tunnel_id, .. }) = connection {
            let went_offline = self.tunnels.mark_offline(&tunnel_id, id, now()).await?;
            info!(tunnel = %tunnel_id, code = ended.code, went_offline, "disconnected");
            if let Some(websockets) = &self.websockets {
                websockets.agent_left(id).await?;
            }
        }
        self.connections.remove(id).await?;
        Ok(())
    }
}

impl Websockets {
    /// Tells the agent at the other end that a visitor has left.
    async fn visitor_left(&self, ended: &Ended) -> Result<(), DisconnectError> {
        let Some(socket) = self.table.close(&ended.connection).await? else {
            return Ok(());
        };
        let close = ToAgent::WebsocketClose {
            request_id: socket.request,
            code: ended.code,
        };
        match self.agents.post(&socket.agent, &close).await {
            Err(PostError::Gone | PostError::Unknown) => Ok(()),
            outcome => Ok(outcome?),
        }
    }

    /// Closes the visitors whose other end was the connection of an agent that has left.
    async fn agent_left(&self, agent: &ConnectionId) -> Result<(), DisconnectError> {
        for visitor in self.table.take_of_agent(agent).await? {
            self.visitors.close(&visitor).await?;
        }
        Ok(())
    }
}
