//! The `$disconnect` route: forget the connection, and mark its tunnel offline if no other connection has taken it over.
//!
//! API Gateway calls this as a best effort only. A tunnel whose $disconnect was lost is marked offline by the first message
//! that cannot be delivered to it.

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use tracing::info;
use tunnel_service::{
    aws::route_event::{RouteEventError, RouteResponse, connection_of},
    aws::sdk::SdkConfig,
    now,
    settings::{SettingsError, Variables},
    tables::connections::{Connection, ConnectionsTable},
    tables::dynamodb::StoreError,
    tables::tunnels::TunnelsTable,
};

/// The function: its settings and clients, made once per execution environment.
#[derive(Clone, Debug)]
pub struct Disconnect {
    tunnels: TunnelsTable,
    connections: ConnectionsTable,
}

/// Why there is no answer: the fault is ours.
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
    /// Reads the settings.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn load(variables: Variables<'_>, sdk: &SdkConfig) -> Result<Self, SettingsError> {
        let tunnels = variables.required("TUNNELS_TABLE");
        let connections = variables.required("CONNECTIONS_TABLE");
        variables.finish(|| {
            Some(Self {
                tunnels: TunnelsTable::new(sdk, tunnels?),
                connections: ConnectionsTable::new(sdk, connections?),
            })
        })
    }

    /// Handles an event.
    ///
    /// # Errors
    /// When the event is of another kind or the tables do not answer.
    pub async fn handle(
        &self,
        event: ApiGatewayWebsocketProxyRequest,
    ) -> Result<RouteResponse, DisconnectError> {
        let context = event.request_context;
        let id = connection_of(
            "DISCONNECT",
            context.event_type.as_deref(),
            context.connection_id.as_deref(),
        )?;
        if let Some(Connection::Agent { tunnel_id, .. }) = self.connections.remove(&id).await? {
            let went_offline = self.tunnels.mark_offline(&tunnel_id, &id, now()).await?;
            info!(connection = %id, tunnel = %tunnel_id, code = context.disconnect_status_code, went_offline, "disconnected");
        }
        Ok(RouteResponse::ok())
    }
}
