//! The parts put together, started and stopped.

use std::{
    convert::Infallible, fmt, net::SocketAddr, path::PathBuf, pin::Pin, sync::Arc, time::Duration,
};

use anyhow::{Context, bail};
use aws_sdk_dynamodb::Client;
use http::{Request, Response};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};
use tunnel_connect::Connect;
use tunnel_default::DefaultRoute;
use tunnel_disconnect::Disconnect;
use tunnel_forward::{Forward, rate_limit::MAX_CONCURRENT_REQUESTS, response::ResponseBody};
use tunnel_protocol::{cidr::Cidr, id::ConnectionId, limits::MAX_HEADER_FIELDS};
use tunnel_service::{
    agents::{InProcess, OpenConnections, PostError},
    auth::{AuthMode, token},
    aws::sdk,
    now,
    replies::Replies,
    routing::{PublicUrl, Routing},
    settings::Variables,
    tables::connections::ConnectionsTable,
    tables::tokens::TokensTable,
    tables::tunnels::TunnelsTable,
};

use crate::{
    front::agents::{AgentFront, AgentLimit},
    front::forwarded::TrustedProxies,
    front::length_check::{HeadRecorder, RecordingStream},
    front::{agents, visitors},
};
use tunnel_local_aws::{
    caller::AccessKey, dynamodb, management, management::ConnectionRegistry, quotas::Quotas,
};

/// Most open connections of visitors and agents together; more wait to be accepted.
const MAX_OPEN_CONNECTIONS: usize = 4096;
/// Longest request line plus headers, in bytes. API Gateway takes 10,240.
pub(crate) const MAX_HEAD_BYTES: usize = 64 * 1024;
/// How long a visitor may take to send its request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long accepting rests after it failed.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
/// How long requests in flight may take to finish once the process is told to stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// What to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where visitors and agents connect; port 0 picks a free one.
    pub listen: SocketAddr,
    /// Where visitors reach `listen`, if not under its own address.
    pub public_url: Option<PublicUrl>,
    /// Where data is kept; none forgets all.
    pub data: Option<PathBuf>,
    /// How agents prove who they are.
    pub auth: AuthMode,
    /// What makes agents' JSON Web Tokens good, with [`AuthMode::Jwt`].
    pub jwt: Option<JwtIssuer>,
    /// How visitors name a tunnel.
    pub routing: Routing,
    /// What agents' connections may do.
    pub quotas: Quotas,
    /// Most requests of one tunnel at once; 0 is no limit.
    pub max_concurrent_requests: u32,
    /// Most new requests of one tunnel in a second, and twice that at once after a pause; 0 is no limit.
    pub max_requests_per_second: u32,
    /// Proxies in front of this process whose word about visitors counts.
    pub trusted_proxies: Vec<Cidr>,
    /// Which way the functions reach each other and agents.
    pub shape: Transport,
}

/// Who makes agents' JSON Web Tokens, and how it is known that it did.
#[derive(Clone)]
pub struct JwtIssuer {
    /// `iss` of its tokens.
    pub issuer: String,
    /// What `aud` of tokens for this service has.
    pub audience: String,
    /// Where it publishes its keys; empty if it signs with the secret.
    pub jwks_url: String,
    /// What it signs with; empty if it publishes keys.
    pub secret: String,
}

impl fmt::Debug for JwtIssuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JwtIssuer({})", self.issuer)
    }
}

/// How much of AWS's shape requests see on their way.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Transport {
    /// The functions speak to each other and to agents within the process. What else they do is the same.
    #[default]
    InProcess,
    /// Every step is as in AWS: agents' messages are events, agents are posted to through @connections, and replies come back over
    /// a reply connection or through the mailbox. For tests of what runs in Lambda.
    Emulated,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            public_url: None,
            data: None,
            auth: AuthMode::Open,
            jwt: None,
            routing: Routing::Path,
            quotas: Quotas::default(),
            max_concurrent_requests: MAX_CONCURRENT_REQUESTS,
            max_requests_per_second: 0,
            trusted_proxies: Vec::new(),
            shape: Transport::default(),
        }
    }
}

/// A running stack.
#[derive(Debug)]
pub struct Server {
    /// Where visitors reach it.
    pub public_url: PublicUrl,
    /// Where agents connect.
    pub endpoint: String,
    /// The agent token that was made because there was none; it is not stored and cannot be shown again.
    pub first_token: Option<String>,
    tokens: TokensTable,
    tunnels: TunnelsTable,
    recorded: ConnectionsTable,
    connections: ConnectionRegistry,
    forward: Forward,
    visitors: Subsystem,
    agents: Subsystem,
    services: Subsystem,
}

/// Tasks that are stopped together.
#[derive(Clone, Debug, Default)]
struct Subsystem {
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Subsystem {
    /// Asks the tasks to end and waits for them. Those that do not in time end with the process.
    async fn stop(&self, name: &str) {
        self.stop.cancel();
        self.tasks.close();
        if timeout(DRAIN_TIMEOUT, self.tasks.wait()).await.is_err() {
            warn!(name, left = self.tasks.len(), "not stopped in time");
        }
    }
}

impl Server {
    /// Starts everything, and returns when requests can come.
    ///
    /// # Errors
    /// When an address is taken, data cannot be opened, or the options would let strangers in.
    pub fn start(options: Options) -> Pin<Box<dyn Future<Output = anyhow::Result<Self>> + Send>> {
        // Boxed, so that the compiler makes code of all that is below here and not once more in each user.
        Box::pin(Self::start_here(options))
    }

    async fn start_here(options: Options) -> anyhow::Result<Self> {
        let is_private = options.listen.ip().is_loopback()
            && options
                .public_url
                .as_ref()
                .is_none_or(PublicUrl::is_loopback);
        if options.auth == AuthMode::Open && !is_private {
            bail!(
                "others than this machine can connect: agents must authenticate then, so start with --auth token"
            );
        }
        let listener = TcpListener::bind(options.listen)
            .await
            .with_context(|| format!("cannot listen on {}", options.listen))?;
        let address = listener.local_addr()?;
        let public_url = match options.public_url {
            Some(url) => url,
            None if address.ip().is_unspecified() => {
                bail!("{address} is no address visitors could use: say theirs with --public-url")
            }
            None => format!("http://{address}").parse()?,
        };
        let (visitors, agents, services) = (
            Subsystem::default(),
            Subsystem::default(),
            Subsystem::default(),
        );
        let storage = TcpListener::bind("127.0.0.1:0")
            .await
            .context("no loopback port for DynamoDB")?;
        let database = dynamodb::open(options.data.as_deref())?;
        let dynamodb = format!("http://{}", storage.local_addr()?);
        let access_key = token::generate_token();
        let sdk = sdk::for_loopback(&dynamodb, &access_key);
        let access_key = AccessKey::only(&access_key);
        dynamodb::serve(
            database,
            storage,
            access_key.clone(),
            &services.tasks,
            &services.stop,
        );
        dynamodb::create_tables(&Client::new(&sdk)).await?;

        let connections = ConnectionRegistry::default();
        let management = TcpListener::bind("127.0.0.1:0")
            .await
            .context("no loopback port for @connections")?;
        let websocket_api = format!("ws://{}/{}", management.local_addr()?, management::STAGE);
        let variables = || {
            Variables::new(|name| {
                Some(match name {
                    "WEBSOCKET_API_ENDPOINT" => websocket_api.clone(),
                    "PUBLIC_URL" => public_url.to_string(),
                    "ROUTING" => if options.routing == Routing::Path {
                        "path"
                    } else {
                        "subdomain"
                    }
                    .to_owned(),
                    "MAX_CONCURRENT_REQUESTS" => options.max_concurrent_requests.to_string(),
                    "MAX_REQUESTS_PER_SECOND" => options.max_requests_per_second.to_string(),
                    "AUTH" => options.auth.word().to_owned(),
                    "JWT_ISSUER" => options.jwt.as_ref()?.issuer.clone(),
                    "JWT_AUDIENCE" => options.jwt.as_ref()?.audience.clone(),
                    "JWT_JWKS_URL" => options.jwt.as_ref()?.jwks_url.clone(),
                    "JWT_SECRET" => options.jwt.as_ref()?.secret.clone(),
                    table => return dynamodb::table_of_variable(table).map(str::to_owned),
                })
            })
        };
        let replies = Replies::default();
        let in_process = InProcess {
            connections: Arc::new(connections.clone()),
            replies: replies.clone(),
            life: options.quotas.life,
        };
        let in_process = Some(&in_process).filter(|_| options.shape == Transport::InProcess);
        let forward = Forward::load(variables(), &sdk, in_process)?;
        let websocket = Arc::new(AgentFront {
            shape: options.shape,
            auth: options.auth,
            connect: Connect::load(variables(), &sdk)?,
            default: DefaultRoute::load(variables(), &sdk, in_process)?,
            disconnect: Disconnect::load(variables(), &sdk)?,
            connections: connections.clone(),
            replies,
            quotas: options.quotas,
            open: AgentLimit::default(),
            tasks: agents.tasks.clone(),
        });
        if options.shape == Transport::Emulated {
            let api = management::router(connections.clone(), options.quotas, access_key)
                .merge(agents::router(&websocket));
            let stopped = services.stop.clone();
            services.tasks.spawn(async move {
                if let Err(error) = axum::serve(management, api)
                    .with_graceful_shutdown(stopped.cancelled_owned())
                    .await
                {
                    warn!(%error, "@connections ended");
                }
            });
        }
        agents
            .tasks
            .spawn(websocket.clone().recheck(agents.stop.clone()));
        let tokens = TokensTable::new(&sdk, dynamodb::TOKENS.to_owned());
        let tunnels = TunnelsTable::new(&sdk, dynamodb::TUNNELS.to_owned());
        let first_token = first_token(options.auth, &tokens).await?;
        let proxies = Arc::new(TrustedProxies::new(options.trusted_proxies));
        let front = Front {
            forward: forward.clone(),
            websocket,
            proxies,
            scheme: public_url.scheme().to_owned(),
        };
        visitors
            .tasks
            .spawn(listen(listener, front, visitors.clone()));
        let endpoint = format!("{}{}", websocket_scheme(&public_url), agents::PATH);
        Ok(Self {
            public_url,
            endpoint,
            first_token,
            tokens,
            tunnels,
            recorded: ConnectionsTable::new(&sdk, dynamodb::CONNECTIONS.to_owned()),
            connections,
            forward,
            visitors,
            agents,
            services,
        })
    }

    /// Makes an agent token for somebody and returns it.
    ///
    /// # Errors
    /// When the engine does not answer.
    pub async fn create_token(&self, name: &str) -> anyhow::Result<String> {
        Ok(self.tokens.create(name, None, now()).await?)
    }

    /// The table of agents' tokens.
    pub fn tokens(&self) -> &TokensTable {
        &self.tokens
    }

    /// The table of tunnels.
    pub fn tunnels(&self) -> &TunnelsTable {
        &self.tunnels
    }

    /// The table of connections.
    pub fn connections(&self) -> &ConnectionsTable {
        &self.recorded
    }

    /// Closes a connection, an agent's or a function's.
    ///
    /// # Errors
    /// When it is not open.
    pub fn disconnect(&self, connection: &ConnectionId) -> Result<(), PostError> {
        self.connections.close(connection)
    }

    /// Stops: takes nothing new, lets requests in flight finish for a while, and tells agents to come back later.
    pub async fn stop(self) {
        self.visitors.stop("visitors").await;
        if timeout(DRAIN_TIMEOUT, self.forward.finish()).await.is_err() {
            warn!("uploads were still under way");
        }
        self.connections.close_all();
        self.agents.stop("agents").await;
        self.services.stop("services").await;
    }
}

fn websocket_scheme(public_url: &PublicUrl) -> String {
    let url = public_url.to_string();
    url.strip_prefix("http")
        .map_or(url.clone(), |rest| format!("ws{rest}"))
}

/// Where agents need tokens and none exists, makes the first.
async fn first_token(auth: AuthMode, tokens: &TokensTable) -> anyhow::Result<Option<String>> {
    if auth != AuthMode::Token || !tokens.list().await?.is_empty() {
        return Ok(None);
    }
    Ok(Some(tokens.create("first", None, now()).await?))
}

/// What every connection is served with.
#[derive(Clone)]
struct Front {
    forward: Forward,
    websocket: Arc<AgentFront>,
    proxies: Arc<TrustedProxies>,
    scheme: String,
}

impl Front {
    async fn serve(
        &self,
        request: Request<Incoming>,
        peer: SocketAddr,
        head: &HeadRecorder,
    ) -> Response<ResponseBody> {
        if request.uri().path() == agents::PATH {
            self.websocket.accept(request, peer).await
        } else if head.is_plain(&request) {
            visitors::serve(
                &self.forward,
                request,
                peer.ip(),
                &self.proxies,
                &self.scheme,
            )
            .await
        } else {
            visitors::refuse(&request, "it says two things about its length")
        }
    }
}

async fn listen(listener: TcpListener, front: Front, visitors: Subsystem) {
    let open = Arc::new(Semaphore::new(MAX_OPEN_CONNECTIONS));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADER_FIELDS);
    loop {
        let Ok(place) = open.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            () = visitors.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: connections that end will free some.
                warn!(%error, "cannot accept");
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                continue;
            }
        };
        // Without it a connection only has more latency.
        let _ = stream.set_nodelay(true);
        let (front, head) = (front.clone(), HeadRecorder::default());
        let stream = TokioIo::new(RecordingStream::new(stream, head.clone()));
        let service = service_fn(move |request| {
            let (front, head) = (front.clone(), head.clone());
            // Boxed, because hyper moves it about.
            Box::pin(async move { Ok::<_, Infallible>(front.serve(request, peer, &head).await) })
        });
        let connection = http.serve_connection(stream, service).with_upgrades();
        let stop = visitors.stop.clone();
        visitors.tasks.spawn(async move {
            let mut connection = std::pin::pin!(connection);
            let outcome = tokio::select! {
                outcome = connection.as_mut() => outcome,
                () = stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = outcome {
                debug!(%peer, error = &error as &dyn std::error::Error, "connection ended");
            }
            drop(place);
        });
    }
}
