//! The `$connect` route: who is this agent, which tunnel does it want, may it have it?
//!
//! API Gateway completes the upgrade only after this function has answered with a 2xx status; any other status is what the
//! agent's handshake sees. Nothing can be sent to the connection yet, so the tunnel goes online with the agent's first message.

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use tracing::{info, warn};
use tunnel_shared::{
    cloud::{
        RouteResponse,
        auth::{self, Auth},
        connections::{Connection, Connections},
        event::{WrongEvent, connection_of},
        now,
        sdk::SdkConfig,
        settings::{Faults, Variables},
        store::StoreError,
        tokens::Tokens,
        tunnels::Tunnels,
    },
    id::{ConnectionId, TunnelId},
};

/// The query parameter with which an agent asks for a tunnel by name.
const TUNNEL_ID: &str = "tunnel_id";
/// The query parameter by which `forward`'s reply connections are known. Their ticket stands where agents have their token.
const REPLY: &str = "reply";

/// The function: its settings and clients, made once per execution environment.
#[derive(Clone, Debug)]
pub struct Connect {
    auth: Auth,
    tunnels: Tunnels,
    connections: Connections,
    tokens: Tokens,
}

/// Why an agent is not let in.
enum Refusal {
    NotAuthorized,
    InvalidTunnelId(String),
    NameTaken(TunnelId),
}

/// Why there is no answer: the fault is ours, not the agent's.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The event is of another kind.
    #[error(transparent)]
    Event(#[from] WrongEvent),
    /// The tables do not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Connect {
    /// Reads the settings.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn load(variables: Variables<'_>, sdk: &SdkConfig) -> Result<Self, Faults> {
        let auth = variables.optional("AUTH", Auth::Token);
        let tunnels = variables.required("TUNNELS_TABLE");
        let connections = variables.required("CONNECTIONS_TABLE");
        let tokens = variables.required("TOKENS_TABLE");
        variables.finish(|| {
            Some(Self {
                auth: auth?,
                tunnels: Tunnels::new(sdk, tunnels?),
                connections: Connections::new(sdk, connections?),
                tokens: Tokens::new(sdk, tokens?),
            })
        })
    }

    /// Handles an event.
    ///
    /// # Errors
    /// When the event is of another kind or the tables do not answer. A refusal is an answer.
    pub async fn handle(&self, event: ApiGatewayWebsocketProxyRequest) -> Result<RouteResponse, Error> {
        let context = &event.request_context;
        let connection = connection_of("CONNECT", context.event_type.as_deref(), context.connection_id.as_deref())?;
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

    async fn admit(&self, event: &ApiGatewayWebsocketProxyRequest, connection: &ConnectionId) -> Result<Result<TunnelId, Refusal>, Error> {
        let Some(owner) = self.authenticate(event).await? else { return Ok(Err(Refusal::NotAuthorized)) };
        let tunnel_id = match event.query_string_parameters.first(TUNNEL_ID) {
            None => TunnelId::generate(),
            Some(name) => match name.parse() {
                Ok(id) => id,
                Err(invalid) => return Ok(Err(Refusal::InvalidTunnelId(format!("{invalid}")))),
            },
        };
        if !self.tunnels.claim(&tunnel_id, &owner, now()).await? {
            return Ok(Err(Refusal::NameTaken(tunnel_id)));
        }
        self.connections.put(connection, &Connection::Agent { tunnel_id: tunnel_id.clone(), owner }, now()).await?;
        Ok(Ok(tunnel_id))
    }

    /// Lets a connection in that serves no tunnel, for a ticket that only a function can have written.
    async fn admit_reply_connection(
        &self,
        event: &ApiGatewayWebsocketProxyRequest,
        connection: &ConnectionId,
    ) -> Result<Result<Option<TunnelId>, Refusal>, Error> {
        let Some(ticket) = bearer_token(event) else { return Ok(Err(Refusal::NotAuthorized)) };
        if !self.connections.redeem_ticket(ticket, now()).await? {
            return Ok(Err(Refusal::NotAuthorized));
        }
        self.connections.put(connection, &Connection::Reply, now()).await?;
        Ok(Ok(None))
    }

    /// The owner that the agent proved to be.
    async fn authenticate(&self, event: &ApiGatewayWebsocketProxyRequest) -> Result<Option<String>, StoreError> {
        match self.auth {
            Auth::Open => Ok(Some(auth::ANYBODY.to_owned())),
            Auth::Token => {
                let Some(token) = bearer_token(event) else { return Ok(None) };
                let hash = auth::hash_token(token);
                Ok(self.tokens.is_good(&hash, now()).await?.then(|| auth::owner_of(&hash)))
            }
        }
    }
}

fn bearer_token(event: &ApiGatewayWebsocketProxyRequest) -> Option<&str> {
    event.headers.get(http::header::AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(auth::bearer_token)
}

impl Refusal {
    fn into_response(self) -> RouteResponse {
        match self {
            Self::NotAuthorized => RouteResponse::refused(401, "unauthorized", "connect with a valid agent token"),
            Self::InvalidTunnelId(rule) => RouteResponse::refused(400, "invalid_tunnel_id", &rule),
            Self::NameTaken(id) => {
                RouteResponse::refused(409, "name_taken", &format!("the tunnel id {id} belongs to somebody else; choose another"))
            }
        }
    }
}
