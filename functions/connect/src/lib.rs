//! The `$connect` route: who is this agent, which tunnel does it want, may it have it?
//!
//! API Gateway completes the upgrade only after this function has answered with a 2xx status; any other status is what the
//! agent's handshake sees. Nothing can be sent to the connection yet, so the tunnel goes online with the agent's first message.

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use tracing::{info, warn};
use tunnel_protocol::id::{ConnectionId, TunnelId};
use tunnel_service::{
    auth::{AuthError, Authenticator, Identity, token},
    aws::route_event::{RouteEventError, RouteResponse, connection_of},
    aws::sdk::SdkConfig,
    now,
    settings::{SettingsError, Variables},
    tables::connections::{Connection, ConnectionsTable},
    tables::dynamodb::StoreError,
    tables::tunnels::TunnelsTable,
};

/// The query parameter with which an agent asks for a tunnel by name.
const TUNNEL_ID: &str = "tunnel_id";
/// The query parameter that names a tunnel in its stead, for a connection that is to give it up.
const RELEASE: &str = "release";
/// The query parameter by which `forward`'s reply connections are known. Their ticket stands where agents have their token.
const REPLY: &str = "reply";

/// The function: its settings and clients, made once per execution environment.
#[derive(Clone, Debug)]
pub struct Connect {
    access: Authenticator,
    tunnels: TunnelsTable,
    connections: ConnectionsTable,
}

/// Why an agent is not let in.
enum HandshakeRefusal {
    NotAuthorized,
    InvalidTunnelId(String),
    NameTaken(TunnelId),
}

/// Why there is no answer: the fault is ours, not the agent's.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The event is of another kind.
    #[error(transparent)]
    Event(#[from] RouteEventError),
    /// It cannot be told who the agent is.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// The tables do not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Connect {
    /// Reads the settings.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn load(variables: Variables<'_>, sdk: &SdkConfig) -> Result<Self, SettingsError> {
        let access = Authenticator::load(&variables, sdk);
        let tunnels = variables.required("TUNNELS_TABLE");
        let connections = variables.required("CONNECTIONS_TABLE");
        variables.finish(|| {
            Some(Self {
                access: access?,
                tunnels: TunnelsTable::new(sdk, tunnels?),
                connections: ConnectionsTable::new(sdk, connections?),
            })
        })
    }

    /// Handles an event.
    ///
    /// # Errors
    /// When the event is of another kind or the tables do not answer. A refusal is an answer.
    pub async fn handle(
        &self,
        event: ApiGatewayWebsocketProxyRequest,
    ) -> Result<RouteResponse, ConnectError> {
        let context = &event.request_context;
        let connection = connection_of(
            "CONNECT",
            context.event_type.as_deref(),
            context.connection_id.as_deref(),
        )?;
        let admitted = if event.query_string_parameters.first(REPLY).is_some() {
            self.admit_reply_connection(&event, &connection).await?
        } else {
            self.admit(&event, &connection).await?.map(Some)
        };
        match admitted {
            Ok(tunnel_id) => {
                info!(%connection, tunnel = tunnel_id.map(String::from), "connected");
                Ok(RouteResponse::ok())
            }
            Err(refusal) => {
                let response = refusal.into_response();
                warn!(%connection, status = response.status_code, "refused");
                Ok(response)
            }
        }
    }

    async fn admit(
        &self,
        event: &ApiGatewayWebsocketProxyRequest,
        connection: &ConnectionId,
    ) -> Result<Result<TunnelId, HandshakeRefusal>, ConnectError> {
        let Some(identity) = self.access.identify(bearer_token(event), now()).await? else {
            return Ok(Err(HandshakeRefusal::NotAuthorized));
        };
        let query = &event.query_string_parameters;
        let released = query.first(RELEASE);
        let tunnel_id = match released.or(query.first(TUNNEL_ID)) {
            None => TunnelId::generate(),
            Some(name) => match name.parse() {
                Ok(id) => id,
                Err(invalid) => {
                    return Ok(Err(HandshakeRefusal::InvalidTunnelId(format!("{invalid}"))));
                }
            },
        };
        let may_have_it = match released {
            None => {
                self.tunnels
                    .claim(&tunnel_id, &identity.owner, now())
                    .await?
            }
            Some(_) => self.may_release(&tunnel_id, &identity).await?,
        };
        if !may_have_it {
            return Ok(Err(HandshakeRefusal::NameTaken(tunnel_id)));
        }
        self.connections
            .put(
                connection,
                &Connection::Agent {
                    tunnel_id: tunnel_id.clone(),
                    identity,
                    opened: None,
                },
                now(),
            )
            .await?;
        Ok(Ok(tunnel_id))
    }

    /// Whether a tunnel is nobody else's. It is not claimed, so that it is not left behind as somebody's.
    async fn may_release(
        &self,
        tunnel_id: &TunnelId,
        identity: &Identity,
    ) -> Result<bool, StoreError> {
        Ok(self
            .tunnels
            .get(tunnel_id, now())
            .await?
            .is_none_or(|tunnel| tunnel.identity.owner == identity.owner))
    }

    /// Lets a connection in that serves no tunnel, for a ticket that only a function can have written.
    async fn admit_reply_connection(
        &self,
        event: &ApiGatewayWebsocketProxyRequest,
        connection: &ConnectionId,
    ) -> Result<Result<Option<TunnelId>, HandshakeRefusal>, ConnectError> {
        let Some(ticket) = bearer_token(event) else {
            return Ok(Err(HandshakeRefusal::NotAuthorized));
        };
        if !self.connections.redeem_ticket(ticket, now()).await? {
            return Ok(Err(HandshakeRefusal::NotAuthorized));
        }
        self.connections
            .put(connection, &Connection::Reply, now())
            .await?;
        Ok(Ok(None))
    }
}

fn bearer_token(event: &ApiGatewayWebsocketProxyRequest) -> Option<&str> {
    event
        .headers
        .get(http::header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(token::bearer_token)
}

impl HandshakeRefusal {
    fn into_response(self) -> RouteResponse {
        match self {
            Self::NotAuthorized => {
                RouteResponse::refused(401, "unauthorized", "connect with a valid agent token")
            }
            Self::InvalidTunnelId(rule) => RouteResponse::refused(400, "invalid_tunnel_id", &rule),
            Self::NameTaken(id) => RouteResponse::refused(
                409,
                "name_taken",
                &format!("the tunnel id {id} belongs to somebody else; choose another"),
            ),
        }
    }
}
