//! The parts put together, started and stopped.

use std::{
    fs::File,
    future::Future,
    io::{self, Write},
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use aws_sdk_dynamodb::Client;
use axum::{
    extract::{Request, State},
    middleware::{Next, from_fn_with_state},
    response::Response,
};
use tokio::{
    net::TcpListener,
    time::{Instant, timeout_at},
};
use tracing::{info, warn};
use tunnel_local_aws::{
    caller::AccessKey,
    dynamodb::{self, DataError, Database, DirectoryLock},
    management::{self, ConnectionRegistry},
    quotas::Quotas,
};
use tunnel_protocol::id::ConnectionId;
use tunnel_service::{
    agents::{OpenConnections, PostError, WebSocketApiUrl},
    auth::{AuthMode, token},
    aws::sdk::{self, SdkConfig},
    now,
    replies::Replies,
    routing::PublicUrl,
    tables::connections::ConnectionsTable,
    tables::dynamodb::StoreError,
    tables::tokens::TokensTable,
    tables::tunnels::TunnelsTable,
};

use crate::{
    front::{
        agent_limit::AgentLimit,
        agents::{self, AgentFront},
        connection_clock::ConnectionClock,
        forwarded::TrustedProxies,
        host::HostPolicy,
        listener::{self, Entrance, Front},
        visitor_sockets::{EdgeSecret, VisitorSockets},
        visitors::VisitorFront,
    },
    functions::{Functions, Surroundings},
    operator::{AccessLog, Observer, admin_api::AdminApi, admin_listener},
    options::{Options, OptionsError, Transport},
    subsystem::Subsystem,
    tls::{Names, Tls, TlsError},
};

/// How long stopping takes at most. Container runtimes kill a process 10 s after they have asked it to end.
const STOP_TIMEOUT: Duration = Duration::from_millis(9_500);
/// How long of that requests in flight have to finish, before agents are closed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(8);
/// How long of that agents have, too, to close their side.
const CLOSE_AGENTS_TIMEOUT: Duration = Duration::from_secs(9);
/// When the tables and --admin have stopped at the latest. The rest is for the access log.
const STOP_ENGINE_TIMEOUT: Duration = Duration::from_millis(9_200);
/// The name of the first token.
const FIRST_TOKEN: &str = "first";

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The options contradict each other.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// A socket cannot be opened.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The socket's address.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// The data cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The tables do not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The access log cannot be written.
    #[error("cannot write the access log: {0}")]
    AccessLog(#[source] io::Error),
    /// Certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The listening address makes no URL.
    #[error("{0} makes no public URL: set --public-url")]
    PublicUrl(SocketAddr),
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    /// Where the operator asks, if anywhere.
    pub admin_address: Option<SocketAddr>,
    /// Where it sends visitors without TLS to TLS.
    pub http_address: Option<SocketAddr>,
    /// Where visitors reach it.
    pub public_url: PublicUrl,
    /// Where agents connect.
    pub endpoint: String,
    /// The agent token that was made because there was none; only its hash is in the tables.
    pub first_token: Option<String>,
    /// The file in the data directory that the first token was written to.
    pub first_token_file: Option<PathBuf>,
    tables: Tables,
    connections: ConnectionRegistry,
    front: Front,
    visitors: Subsystem,
    agents: Subsystem,
    engine: Subsystem,
    _directory: Option<DirectoryLock>,
}

#[derive(Clone, Debug)]
struct Tables {
    tokens: TokensTable,
    tunnels: TunnelsTable,
    connections: ConnectionsTable,
}

/// The embedded DynamoDB engine, at work.
struct Engine {
    database: Database,
    sdk: SdkConfig,
    access_key: AccessKey,
    tables: Tables,
    subsystem: Subsystem,
}

impl Server {
    /// Starts everything, and returns when requests can come.
    ///
    /// # Errors
    /// If an address is taken, data cannot be opened, or the options contradict each other.
    pub fn start(
        options: Options,
    ) -> Pin<Box<dyn Future<Output = Result<Self, ServerError>> + Send>> {
        // Boxed, so that the compiler makes code of all that is below here and not once more in each user.
        Box::pin(Self::start_here(options))
    }

    async fn start_here(options: Options) -> Result<Self, ServerError> {
        options.validate()?;
        let directory = lock_directory(&options)?;
        let observer = Arc::new(observer(&options)?);
        let listeners = Listeners::open(&options).await?;
        let public_url = public_url(&options, listeners.main.1)?;
        let engine = Engine::start(&options, &observer).await?;
        let (management, management_address) = bind_at(LOOPBACK).await?;
        let websocket_api = WebSocketApiUrl::of_socket(management_address, management::STAGE);
        let sockets = Sockets::open(&options).await?;
        let (connections, replies) = (ConnectionRegistry::default(), Replies::default());
        let functions = Functions::new(
            &options,
            &Surroundings {
                public_url: &public_url,
                websocket_api: &websocket_api,
                sockets: sockets.as_ref().map(Sockets::known),
                sdk: &engine.sdk,
                connections: &connections,
                replies: &replies,
            },
        )?;
        let subsystems = Subsystems::default();
        let mut front = front(
            &options,
            functions,
            &observer,
            &connections,
            replies.clone(),
            &subsystems,
            &public_url,
        );
        if let Some(sockets) = sockets {
            front.visitors.sockets = Some(sockets.serve(&engine, &front, &subsystems));
            engine.serve_agents(management, &front.agents);
        }
        let Subsystems { visitors, agents } = subsystems;
        let admin = engine.serve_admin(&options, &front, &replies, &visitors);
        let admin_address = admin.await?;
        agents.spawn(front.agents.clone().recheck(engine.database.clone()));
        front.entrance = entrance(&options, &public_url, &engine.tables, &visitors)?;
        let (first_token, first_token_file) = first_token(&options, &engine.tables.tokens).await?;
        let (address, http_address) = listeners.serve(&front, &visitors);
        Ok(Self {
            address,
            admin_address,
            http_address,
            endpoint: format!("{}{}", websocket_scheme(&public_url), agents::PATH),
            public_url,
            first_token,
            first_token_file,
            tables: engine.tables,
            connections,
            front,
            visitors,
            agents,
            engine: engine.subsystem,
            _directory: directory,
        })
    }

    /// Changes what can change while the server runs: the limits of tunnels and owners, and the trusted proxies.
    pub fn set_limits(&self, options: &Options) {
        let Front {
            visitors, agents, ..
        } = &self.front;
        visitors.forward.set_limits(
            options.max_concurrent_requests,
            options.max_requests_per_second,
        );
        visitors.proxies.set(options.trusted_proxies.clone());
        agents
            .connect
            .set_max_tunnel_ids(options.max_tunnel_ids_per_owner);
        agents.limit.set(options.quotas.agents_of_one);
    }

    /// Opens the file of the access log again, which may have another name by now.
    pub fn reopen_access_log(&self) {
        if let Some(log) = &self.front.observer.access_log {
            log.reopen();
        }
    }

    /// Creates an agent token with a name and returns it.
    ///
    /// # Errors
    /// If the tables do not answer.
    pub async fn create_token(&self, name: &str) -> Result<String, StoreError> {
        self.tables.tokens.create(name, None, now()).await
    }

    /// The table of agents' tokens.
    pub fn tokens(&self) -> &TokensTable {
        &self.tables.tokens
    }

    /// The table of tunnels.
    pub fn tunnels(&self) -> &TunnelsTable {
        &self.tables.tunnels
    }

    /// The table of connections.
    pub fn connections(&self) -> &ConnectionsTable {
        &self.tables.connections
    }

    /// Closes a connection, an agent's or a function's.
    ///
    /// # Errors
    /// If it is not open.
    pub fn disconnect(&self, connection: &ConnectionId) -> Result<(), PostError> {
        self.connections.close(connection)
    }

    /// Stops within 10 seconds: takes nothing new, lets requests in flight finish for most of that time, and tells agents to
    /// come back later. What has not ended then is cut.
    pub async fn stop(self) {
        let now = Instant::now();
        let drained_by = now + DRAIN_TIMEOUT;
        self.visitors.stop("visitors", drained_by).await;
        if timeout_at(drained_by, self.front.visitors.forward.finish())
            .await
            .is_err()
        {
            warn!("requests were still in flight");
        }
        self.agents.stop("agents", now + CLOSE_AGENTS_TIMEOUT).await;
        self.engine.stop("engine", now + STOP_ENGINE_TIMEOUT).await;
        if let Some(log) = &self.front.observer.access_log {
            // A file system that does not answer is not waited for.
            let _ = timeout_at(now + STOP_TIMEOUT, log.finish()).await;
        }
    }
}

/// Takes the data directory for this process, if there is one.
fn lock_directory(options: &Options) -> Result<Option<DirectoryLock>, DataError> {
    let directory = options.data.as_deref();
    directory.map(DirectoryLock::acquire).transpose()
}

/// A free port that only this machine can use.
const LOOPBACK: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// Listens at an address, and returns it with the port that was picked where it has none.
async fn bind_at(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ServerError> {
    let fault = |source| ServerError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(fault)?;
    let address = listener.local_addr().map_err(fault)?;
    Ok((listener, address))
}

fn public_url(options: &Options, address: SocketAddr) -> Result<PublicUrl, ServerError> {
    if let Some(url) = &options.public_url {
        return Ok(url.clone());
    }
    let scheme = if options.tls.is_some() {
        "https"
    } else {
        "http"
    };
    format!("{scheme}://{address}")
        .parse()
        .map_err(|_| ServerError::PublicUrl(address))
}

impl Engine {
    async fn start(options: &Options, observer: &Arc<Observer>) -> Result<Self, ServerError> {
        let database = dynamodb::open(options.data.as_deref())?;
        let (listener, address) = bind_at(LOOPBACK).await?;
        let key = token::generate_token();
        let sdk = sdk::for_loopback(&format!("http://{address}"), &key);
        let access_key = AccessKey::only(&key);
        let subsystem = Subsystem::default();
        let api = dynamodb::router(database.clone(), access_key.clone());
        let api = api.layer(from_fn_with_state(observer.clone(), count_operation));
        serve(&subsystem, listener, api, "DynamoDB");
        subsystem.spawn(dynamodb::sweep(
            database.clone(),
            subsystem.stopping().clone(),
        ));
        dynamodb::create_tables(&Client::new(&sdk)).await?;
        let tables = Tables {
            tokens: TokensTable::new(&sdk, dynamodb::TOKENS.to_owned()),
            tunnels: TunnelsTable::new(&sdk, dynamodb::TUNNELS.to_owned()),
            connections: ConnectionsTable::new(&sdk, dynamodb::CONNECTIONS.to_owned()),
        };
        tables.mark_all_offline().await?;
        Ok(Self {
            database,
            sdk,
            access_key,
            tables,
            subsystem,
        })
    }

    /// @connections, for those who have the engine's key.
    fn management(&self, connections: &ConnectionRegistry, quotas: Quotas) -> axum::Router {
        management::router(connections.clone(), quotas, self.access_key.clone())
    }

    /// Serves what functions need to reach agents: @connections, and the WebSocket API for their reply connections.
    fn serve_agents(&self, listener: TcpListener, agents: &Arc<AgentFront>) {
        let api = self.management(&agents.connections, agents.quotas);
        self.serve(listener, api.merge(agents::router(agents)));
    }

    /// Serves @connections until the engine is stopped.
    fn serve(&self, listener: TcpListener, api: axum::Router) {
        serve(&self.subsystem, listener, api, "@connections");
    }

    /// Serves what the operator asks for until the engine is stopped, which is last; returns where.
    async fn serve_admin(
        &self,
        options: &Options,
        front: &Front,
        replies: &Replies,
        visitors: &Subsystem,
    ) -> Result<Option<SocketAddr>, ServerError> {
        let Some(address) = options.admin else {
            return Ok(None);
        };
        let (listener, address) = bind_at(address).await?;
        let api = AdminApi {
            observer: front.observer.clone(),
            tokens: self.tables.tokens.clone(),
            tunnels: self.tables.tunnels.clone(),
            replies: replies.clone(),
            stopping: visitors.stopping().clone(),
        };
        let api = api.router(address);
        self.subsystem.spawn(admin_listener::listen(
            listener,
            api,
            self.subsystem.clone(),
        ));
        Ok(Some(address))
    }
}

/// Serves an API until the subsystem is stopped.
fn serve(subsystem: &Subsystem, listener: TcpListener, api: axum::Router, name: &'static str) {
    let stopping = subsystem.stopping().clone();
    subsystem.spawn(async move {
        if let Err(error) = axum::serve(listener, api)
            .with_graceful_shutdown(stopping.cancelled_owned())
            .await
        {
            warn!(%error, name, "ended");
        }
    });
}

/// Counts an operation of the tables and the time that it takes.
async fn count_operation(
    State(observer): State<Arc<Observer>>,
    request: Request,
    next: Next,
) -> Response {
    let target = request.headers().get("x-amz-target").cloned();
    let started = Instant::now();
    let response = next.run(request).await;
    let target = target.as_ref().and_then(|target| target.to_str().ok());
    let (_, operation) = target
        .and_then(|target| target.split_once('.'))
        .unwrap_or_default();
    let has_failed = response.status().is_server_error();
    observer
        .metrics
        .table(operation, started.elapsed(), has_failed);
    response
}

/// What takes note of requests and agents.
fn observer(options: &Options) -> Result<Observer, ServerError> {
    let access_log = options.access_log.as_ref().map(AccessLog::open);
    let access_log = access_log.transpose().map_err(ServerError::AccessLog)?;
    let proxies = Arc::new(TrustedProxies::new(options.trusted_proxies.clone()));
    Ok(Observer::new(
        proxies,
        access_log,
        options.metrics_per_tunnel,
    ))
}

impl Tables {
    /// Forgets which agents were connected to an earlier server of the same data: it may have ended without noting that they left.
    async fn mark_all_offline(&self) -> Result<(), StoreError> {
        for (id, tunnel) in self.tunnels.list(now()).await? {
            if let Some(online) = tunnel.online {
                self.tunnels
                    .mark_offline(&id, &online.connection_id, now())
                    .await?;
                info!(tunnel = %id, "its agent was connected to an earlier server: offline");
            }
        }
        Ok(())
    }
}

/// What the visitors' WebSocket API is made of, where every step is as in AWS.
struct Sockets {
    management: TcpListener,
    api: WebSocketApiUrl,
    connections: ConnectionRegistry,
    secret: EdgeSecret,
}

impl Sockets {
    async fn open(options: &Options) -> Result<Option<Self>, ServerError> {
        if options.transport != Transport::Emulated {
            return Ok(None);
        }
        let (listener, address) = bind_at(LOOPBACK).await?;
        let api = WebSocketApiUrl::of_socket(address, management::STAGE);
        Ok(Some(Self {
            management: listener,
            api,
            connections: ConnectionRegistry::default(),
            secret: EdgeSecret::generate(),
        }))
    }

    /// What the functions know of it.
    fn known(&self) -> (&WebSocketApiUrl, &EdgeSecret) {
        (&self.api, &self.secret)
    }

    fn serve(self, engine: &Engine, front: &Front, subsystems: &Subsystems) -> Arc<VisitorSockets> {
        let quotas = front.agents.quotas;
        engine.serve(
            self.management,
            engine.management(&self.connections, quotas),
        );
        Arc::new(VisitorSockets {
            forward: front.visitors.forward.clone(),
            default: front.agents.default.clone(),
            disconnect: front.agents.disconnect.clone(),
            connections: self.connections,
            quotas,
            secret: self.secret,
            subsystem: subsystems.visitors.clone(),
        })
    }
}

/// What the two kinds of sockets are served with.
#[derive(Default)]
struct Subsystems {
    visitors: Subsystem,
    agents: Subsystem,
}

/// What is spoken on the listening socket.
fn entrance(
    options: &Options,
    public_url: &PublicUrl,
    tables: &Tables,
    visitors: &Subsystem,
) -> Result<Entrance, TlsError> {
    let Some(tls) = &options.tls else {
        return Ok(Entrance::Plain);
    };
    let names = Names {
        public_url: public_url.clone(),
        routing: options.routing,
        tunnels: tables.tunnels.clone(),
    };
    let tls = Tls::start(tls.clone(), names, visitors)?;
    Ok(Entrance::Tls(Arc::new(tls)))
}

/// The sockets for visitors and agents, with their addresses.
struct Listeners {
    main: (TcpListener, SocketAddr),
    /// For visitors who are sent to the other.
    http: Option<(TcpListener, SocketAddr)>,
}

impl Listeners {
    async fn open(options: &Options) -> Result<Self, ServerError> {
        Ok(Self {
            main: bind_at(options.listen).await?,
            http: match options.listen_http {
                Some(address) => Some(bind_at(address).await?),
                None => None,
            },
        })
    }

    /// Serves what comes, and returns the addresses.
    fn serve(self, front: &Front, visitors: &Subsystem) -> (SocketAddr, Option<SocketAddr>) {
        let places = listener::places();
        let listen = |listener, front: Front| {
            let front = Arc::new(front);
            let listening = listener::listen(listener, front, places.clone(), visitors.clone());
            visitors.spawn(listening);
        };
        let (main, address) = self.main;
        listen(main, front.clone());
        let http_address = self.http.map(|(http, address)| {
            let entrance = Entrance::Redirect;
            listen(
                http,
                Front {
                    entrance,
                    ..front.clone()
                },
            );
            address
        });
        (address, http_address)
    }
}

fn front(
    options: &Options,
    functions: Functions,
    observer: &Arc<Observer>,
    connections: &ConnectionRegistry,
    replies: Replies,
    subsystems: &Subsystems,
    public_url: &PublicUrl,
) -> Front {
    Front {
        entrance: Entrance::Plain,
        visitors: VisitorFront {
            forward: functions.forward,
            proxies: observer.proxies.clone(),
            hosts: HostPolicy::new(public_url.clone(), options.any_host),
            scheme: public_url.scheme().into(),
            subsystem: subsystems.visitors.clone(),
            sockets: None,
        },
        agents: Arc::new(AgentFront {
            transport: options.transport,
            connect: functions.connect,
            default: functions.default,
            disconnect: functions.disconnect,
            connections: connections.clone(),
            replies,
            quotas: options.quotas,
            limit: AgentLimit::new(options.quotas.agents_of_one),
            clock: ConnectionClock::default(),
            connecting: agents::TablePermits::default(),
            disconnecting: agents::TablePermits::default(),
            observer: observer.clone(),
            tasks: subsystems.agents.tracker().clone(),
            stopping: subsystems.agents.stopping().clone(),
        }),
        observer: observer.clone(),
    }
}

fn websocket_scheme(public_url: &PublicUrl) -> String {
    let url = public_url.to_string();
    url.strip_prefix("http")
        .map_or(url.clone(), |rest| format!("ws{rest}"))
}

/// Where agents need tokens and none exists, makes the first. If data is kept, so is the token, in a file that only the server's user
/// can read: whatever collects stderr keeps it for longer, and for others to read.
async fn first_token(
    options: &Options,
    tokens: &TokensTable,
) -> Result<(Option<String>, Option<PathBuf>), ServerError> {
    if options.auth != AuthMode::Token || !tokens.list().await?.is_empty() {
        return Ok((None, None));
    }
    let file = options
        .data
        .as_deref()
        .map(dynamodb::first_token_file)
        .transpose()?;
    let (token, path) = make_first_token(tokens, file).await?;
    Ok((Some(token), path))
}

/// Makes a token that the file, if there is one, has before it is valid: a later start makes no other.
async fn make_first_token(
    tokens: &TokensTable,
    file: Option<(PathBuf, File)>,
) -> Result<(String, Option<PathBuf>), ServerError> {
    let token = token::generate_token();
    let path = match file {
        Some((path, mut file)) => {
            let written = writeln!(file, "{token}").and_then(|()| file.sync_all());
            if let Err(source) = written {
                return Err(DataError::File { path, source }.into());
            }
            Some(path)
        }
        None => None,
    };
    tokens.record(&token, FIRST_TOKEN, None, now()).await?;
    Ok((token, path))
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use tokio_tungstenite::tungstenite::{Message, protocol::frame::coding::CloseCode};

    use super::*;

    #[tokio::test]
    async fn an_agent_whose_connection_opens_while_the_server_stops_is_closed_as_going_away() {
        let options = Options {
            listen: LOOPBACK,
            ..Options::default()
        };
        let server = Server::start(options).await.expect("a server");
        server.agents.stopping().cancel();
        let connecting = tokio_tungstenite::connect_async(&server.endpoint);
        let (mut agent, _) = connecting.await.expect("a connection");
        let close = tokio::time::timeout(Duration::from_secs(20), agent.next()).await;
        let close = close.expect("in time").expect("open").expect("no error");
        let Message::Close(Some(frame)) = close else {
            panic!("{close:?}")
        };
        assert_eq!(frame.code, CloseCode::Away);
        server.stop().await;
    }

    #[tokio::test]
    async fn handshakes_take_turns_at_the_tables() {
        let options = Options {
            listen: LOOPBACK,
            ..Options::default()
        };
        let server = Server::start(options).await.expect("a server");
        let mut turns = Vec::new();
        for _ in 0..agents::MAX_AT_THE_TABLES {
            turns.push(server.front.agents.connecting.acquire().await);
        }
        let mut connecting = Box::pin(tokio_tungstenite::connect_async(&server.endpoint));
        let answered = tokio::time::timeout(Duration::from_millis(500), &mut connecting).await;
        assert!(answered.is_err(), "it has not waited for its turn");
        turns.pop();
        let answered = tokio::time::timeout(Duration::from_secs(20), connecting).await;
        answered.expect("in time").expect("a connection");
        drop(turns);
        server.stop().await;
    }

    #[tokio::test]
    async fn a_first_token_that_cannot_be_kept_is_not_valid_and_does_not_hinder_the_next() {
        let options = Options {
            listen: LOOPBACK,
            ..Options::default()
        };
        let server = Server::start(options).await.expect("a server");
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("first-token");
        std::fs::write(&path, "").expect("a file");
        let not_writable = File::open(&path).expect("the file");
        let tokens = server.tokens();
        let made = make_first_token(tokens, Some((path.clone(), not_writable))).await;
        assert!(matches!(made, Err(ServerError::Data(_))), "{made:?}");
        assert_eq!(tokens.list().await.expect("the table"), []);
        server.stop().await;
    }
}
