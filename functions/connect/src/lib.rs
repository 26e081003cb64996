//! The `$connect` route: who is this agent, which tunnel does it want, may it have it?
//!
//! API Gateway completes the upgrade only after this function has answered with a 2xx status; any other status is what the
//! agent's handshake sees. Nothing can be sent to the connection yet, so the tunnel goes online with the agent's first message.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use http::HeaderMap;
use tracing::{Instrument, info, warn};
use tunnel_protocol::id::{ConnectionId, IdError, TunnelId};
use tunnel_service::{
    auth::{AuthError, AuthSettings, Authenticator, Identity, token},
    aws::route_event::{RouteEventError, RouteResponse, connection_of},
    aws::sdk::SdkConfig,
    now,
    settings::{SettingsError, Variables},
    tables::connections::{AgentConnection, Connection, ConnectionsTable},
    tables::dynamodb::StoreError,
    tables::tunnels::{Claim, TunnelsTable},
    telemetry::connection_span,
};

/// The query parameter with which an agent requests a tunnel id.
const TUNNEL_ID: &str = "tunnel_id";
/// The query parameter that names a tunnel in its stead, for a connection that is to give it up.
const RELEASE: &str = "release";
/// The query parameter by which `forward`'s reply connections are known. Their ticket stands where agents have their token.
const REPLY: &str = "reply";

/// Most tunnel ids of one owner, unless the setting says otherwise.
pub const MAX_TUNNEL_IDS_PER_OWNER: u32 = 100;

/// What the function needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How agents authenticate.
    pub auth: AuthSettings,
    /// The name of the tunnels table.
    pub tunnels_table: String,
    /// The name of the connections table.
    pub connections_table: String,
    /// Most tunnel ids of one owner; 0 means no limit.
    pub max_tunnel_ids: u32,
}

impl Settings {
    /// Reads the settings.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn read(variables: Variables<'_>) -> Result<Self, SettingsError> {
        let auth = AuthSettings::read(&variables);
        let tunnels_table = variables.required("TUNNELS_TABLE");
        let connections_table = variables.required("CONNECTIONS_TABLE");
        let max_tunnel_ids = variables.or("MAX_TUNNEL_IDS_PER_OWNER", MAX_TUNNEL_IDS_PER_OWNER);
        variables.finish(|| {
            Some(Self {
                auth: auth?,
                tunnels_table: tunnels_table?,
                connections_table: connections_table?,
                max_tunnel_ids: max_tunnel_ids?,
            })
        })
    }
}

/// The function: its settings and clients, made once per execution environment.
#[derive(Clone, Debug)]
pub struct Connect {
    authenticator: Authenticator,
    tunnels: TunnelsTable,
    connections: ConnectionsTable,
    /// 0 means no limit. Clones share it.
    max_tunnel_ids: Arc<AtomicU32>,
}

/// A handshake that the service has to accept or refuse.
#[derive(Clone, Debug)]
pub struct Handshake {
    /// The id that the connection will have.
    pub connection: ConnectionId,
    /// When it was opened, since 1970.
    pub connected_at: Duration,
    /// Its header fields, repeated ones too.
    pub headers: HeaderMap,
    /// What it was opened for.
    pub purpose: Purpose,
}

/// What a connection is opened for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Purpose {
    /// To serve a tunnel: the one of this id, or a new one.
    Serve(Option<String>),
    /// To release a tunnel id.
    Release(String),
    /// To take replies to a `forward`'s requests.
    TakeReplies,
}

impl Purpose {
    /// Reads the purpose from the handshake's query, of which `first` returns a parameter's first value.
    pub fn of_query<'q>(first: impl Fn(&str) -> Option<&'q str>) -> Self {
        if first(REPLY).is_some() {
            Self::TakeReplies
        } else if let Some(id) = first(RELEASE) {
            Self::Release(id.to_owned())
        } else {
            Self::Serve(first(TUNNEL_ID).map(str::to_owned))
        }
    }
}

/// Who opens a connection.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Caller {
    /// An agent.
    Agent(Identity),
    /// The holder of this ticket. Redeeming it shows whether it is valid.
    TicketHolder(String),
}

/// What becomes of a handshake.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Admission {
    /// The agent may open or release this tunnel.
    Agent {
        /// Who the agent is.
        identity: Identity,
        /// The tunnel.
        tunnel_id: TunnelId,
    },
    /// A reply connection is accepted.
    ReplyConnection,
    /// The handshake is refused.
    Refused(HandshakeRefusal),
}

/// Why a handshake is refused. Its text is meant for the agent's user.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum HandshakeRefusal {
    /// The caller proves nothing.
    NotAuthorized,
    /// The requested tunnel id is not valid.
    InvalidTunnelId(IdError),
    /// The tunnel id belongs to another owner.
    NameTaken(TunnelId),
    /// The tunnel id is free, but the caller has this many already, which is as many as one owner may have.
    TooManyTunnelIds(u32),
}

impl HandshakeRefusal {
    /// The HTTP status that the handshake is answered with.
    pub fn status(&self) -> u16 {
        match self {
            Self::NotAuthorized => 401,
            // 400, because agents exit on it. Trying again would be refused until the owner releases an id.
            Self::InvalidTunnelId(_) | Self::TooManyTunnelIds(_) => 400,
            Self::NameTaken(_) => 409,
        }
    }

    /// The stable code of the answer's body.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotAuthorized => "unauthorized",
            Self::InvalidTunnelId(_) => "invalid_tunnel_id",
            Self::NameTaken(_) => "name_taken",
            Self::TooManyTunnelIds(_) => "too_many_tunnel_ids",
        }
    }
}

impl fmt::Display for HandshakeRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAuthorized => f.write_str("connect with a valid agent token"),
            Self::InvalidTunnelId(error) => error.fmt(f),
            Self::NameTaken(id) => write!(
                f,
                "the tunnel id {id} belongs to another owner; choose another"
            ),
            Self::TooManyTunnelIds(limit) => write!(
                f,
                "you have {limit} tunnel ids, which is the most that this service allows; release one with ttf release, or use one of them"
            ),
        }
    }
}

impl From<HandshakeRefusal> for RouteResponse {
    fn from(refusal: HandshakeRefusal) -> Self {
        Self::refused(refusal.status(), refusal.code(), &refusal.to_string())
    }
}

/// Why there is no answer: an error of the service, not of the agent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The event is of another kind.
    #[error(transparent)]
    Event(#[from] RouteEventError),
    /// It cannot be decided now who the agent is.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// The tables do not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Connect {
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
            authenticator: Authenticator::new(settings.auth, sdk),
            tunnels: TunnelsTable::new(sdk, settings.tunnels_table),
            connections: ConnectionsTable::new(sdk, settings.connections_table),
            max_tunnel_ids: Arc::new(settings.max_tunnel_ids.into()),
        }
    }

    /// Changes how many tunnel ids one owner may have; 0 means no limit. Those who have more keep them.
    pub fn set_max_tunnel_ids(&self, most: u32) {
        self.max_tunnel_ids.store(most, Ordering::Relaxed);
    }

    /// Handles an event.
    ///
    /// # Errors
    /// If the event is of another kind or the tables do not answer. A refusal is an answer.
    pub async fn handle(
        &self,
        event: ApiGatewayWebsocketProxyRequest,
    ) -> Result<RouteResponse, ConnectError> {
        let handshake = Handshake::from_event(event)?;
        let span = connection_span(&handshake.connection);
        Ok(match self.serve(&handshake).instrument(span).await? {
            Admission::Agent { .. } | Admission::ReplyConnection => RouteResponse::ok(),
            Admission::Refused(refusal) => refusal.into(),
        })
    }

    /// Decides on a handshake.
    ///
    /// # Errors
    /// If it cannot be decided now: the tables or the issuer of JSON Web Tokens do not answer.
    pub async fn serve(&self, handshake: &Handshake) -> Result<Admission, ConnectError> {
        match self.identify(handshake).await? {
            Some(caller) => self.admit(handshake, caller).await,
            None => Ok(refuse(HandshakeRefusal::NotAuthorized)),
        }
    }

    /// The first half of [`Connect::serve`]: who is calling. `None` when the caller proves nothing.
    ///
    /// # Errors
    /// If it cannot be decided now.
    pub async fn identify(&self, handshake: &Handshake) -> Result<Option<Caller>, ConnectError> {
        if handshake.purpose == Purpose::TakeReplies {
            let ticket = token::bearer(&handshake.headers);
            return Ok(ticket.map(|ticket| Caller::TicketHolder(ticket.to_owned())));
        }
        let identity = self
            .authenticator
            .identify(&handshake.headers, now())
            .await?;
        Ok(identity.map(Caller::Agent))
    }

    /// Whether [`Connect::identify`] asks the tables.
    pub fn identifies_by_tables(&self) -> bool {
        self.authenticator.asks_tables()
    }

    /// The second half of [`Connect::serve`]: whether `caller` may have the tunnel id that it requests. If so, the connection is recorded.
    ///
    /// # Errors
    /// If the tables do not answer.
    pub async fn admit(
        &self,
        handshake: &Handshake,
        caller: Caller,
    ) -> Result<Admission, ConnectError> {
        let admitted = match caller {
            Caller::Agent(identity) => self.admit_agent(handshake, identity).await?,
            Caller::TicketHolder(ticket) => self.admit_reply_connection(handshake, &ticket).await?,
        };
        Ok(match admitted {
            Ok(admission) => {
                info!(
                    tunnel = admission.tunnel_id().map(TunnelId::as_str),
                    "connected"
                );
                admission
            }
            Err(refusal) => refuse(refusal),
        })
    }

    async fn admit_agent(
        &self,
        handshake: &Handshake,
        identity: Identity,
    ) -> Result<Result<Admission, HandshakeRefusal>, ConnectError> {
        let asked_for = match &handshake.purpose {
            Purpose::Serve(id) => id.as_deref(),
            Purpose::Release(id) => Some(id.as_str()),
            Purpose::TakeReplies => None,
        };
        let tunnel_id = match asked_for.map_or_else(|| Ok(TunnelId::generate()), str::parse) {
            Ok(id) => id,
            Err(error) => return Ok(Err(HandshakeRefusal::InvalidTunnelId(error))),
        };
        let max_tunnel_ids = self.max_tunnel_ids.load(Ordering::Relaxed);
        let claim = match handshake.purpose {
            Purpose::Release(_) => self.may_release(&tunnel_id, &identity).await?,
            Purpose::Serve(_) | Purpose::TakeReplies => {
                self.tunnels
                    .claim(&tunnel_id, &identity.owner, max_tunnel_ids, now())
                    .await?
            }
        };
        match claim {
            Claim::Owned => {}
            Claim::Taken => return Ok(Err(HandshakeRefusal::NameTaken(tunnel_id))),
            Claim::TooMany => {
                return Ok(Err(HandshakeRefusal::TooManyTunnelIds(max_tunnel_ids)));
            }
        }
        let connection = Connection::Agent(AgentConnection {
            tunnel_id: tunnel_id.clone(),
            identity: identity.clone(),
            connected_at_ms: u64::try_from(handshake.connected_at.as_millis()).unwrap_or(u64::MAX),
            opened: None,
        });
        self.connections
            .put(&handshake.connection, &connection, now())
            .await?;
        Ok(Ok(Admission::Agent {
            identity,
            tunnel_id,
        }))
    }

    /// Whether no one else owns a tunnel id. It is not claimed: a caller that only releases it must not leave it owned.
    async fn may_release(
        &self,
        tunnel_id: &TunnelId,
        identity: &Identity,
    ) -> Result<Claim, StoreError> {
        let is_anothers = self
            .tunnels
            .get(tunnel_id, now())
            .await?
            .is_some_and(|tunnel| tunnel.identity.owner != identity.owner);
        Ok(if is_anothers {
            Claim::Taken
        } else {
            Claim::Owned
        })
    }

    /// Lets a connection in that serves no tunnel, for a ticket that only a function can have written.
    async fn admit_reply_connection(
        &self,
        handshake: &Handshake,
        ticket: &str,
    ) -> Result<Result<Admission, HandshakeRefusal>, ConnectError> {
        if !self
            .connections
            .redeem_ticket(ticket, &handshake.connection, now())
            .await?
        {
            return Ok(Err(HandshakeRefusal::NotAuthorized));
        }
        self.connections
            .put(&handshake.connection, &Connection::Reply, now())
            .await?;
        Ok(Ok(Admission::ReplyConnection))
    }
}

impl Handshake {
    fn from_event(event: ApiGatewayWebsocketProxyRequest) -> Result<Self, RouteEventError> {
        let context = &event.request_context;
        let connection = connection_of(
            "CONNECT",
            context.event_type.as_deref(),
            context.connection_id.as_deref(),
        )?;
        // Emulators may leave out the fields in which values repeat; API Gateway does not.
        let headers = if event.multi_value_headers.is_empty() {
            event.headers
        } else {
            event.multi_value_headers
        };
        Ok(Self {
            connection,
            connected_at: u64::try_from(context.connected_at)
                .map_or_else(|_| now(), Duration::from_millis),
            headers,
            purpose: Purpose::of_query(|name| event.query_string_parameters.first(name)),
        })
    }
}

impl Admission {
    fn tunnel_id(&self) -> Option<&TunnelId> {
        match self {
            Self::Agent { tunnel_id, .. } => Some(tunnel_id),
            Self::ReplyConnection | Self::Refused(_) => None,
        }
    }
}

fn refuse(refusal: HandshakeRefusal) -> Admission {
    warn!(code = refusal.code(), "refused");
    Admission::Refused(refusal)
}
