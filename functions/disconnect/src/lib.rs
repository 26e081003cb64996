//! The `$disconnect` route: forget the connection, and mark its tunnel offline if no other connection has taken it over.
//!
//! API Gateway calls this as a best effort only. A tunnel whose $disconnect was lost is marked offline by the first message
//! that cannot be delivered to it.

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use tracing::{Instrument, info};
use tunnel_protocol::id::ConnectionId;
use tunnel_service::{
    aws::route_event::{RouteEventError, RouteResponse, connection_of},
    aws::sdk::SdkConfig,
    now,
    settings::{SettingsError, Variables},
    tables::connections::{AgentConnection, Connection, ConnectionsTable},
    tables::dynamodb::StoreError,
    tables::tunnels::TunnelsTable,
    telemetry::connection_span,
};

/// What the function needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The name of the tunnels table.
    pub tunnels_table: String,
    /// The name of the connections table.
    pub connections_table: String,
}

impl Settings {
    /// Reads the settings.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn read(variables: Variables<'_>) -> Result<Self, SettingsError> {
        let tunnels_table = variables.required("TUNNELS_TABLE");
        let connections_table = variables.required("CONNECTIONS_TABLE");
        variables.finish(|| {
            Some(Self {
                tunnels_table: tunnels_table?,
                connections_table: connections_table?,
            })
        })
    }
}

/// The function: its settings and clients, made once per execution environment.
#[derive(Clone, Debug)]
pub struct Disconnect {
    tunnels: TunnelsTable,
    connections: ConnectionsTable,
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
        Self {
            tunnels: TunnelsTable::new(sdk, settings.tunnels_table),
            connections: ConnectionsTable::new(sdk, settings.connections_table),
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
        let span = connection_span(&connection);
        self.serve(&Ended { connection, code })
            .instrument(span)
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
        }
        self.connections.remove(id).await?;
        Ok(())
    }
}
