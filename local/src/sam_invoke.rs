//! The other side of the events in events/: the tables with what the events name, and a sample agent that prints what it is sent
//! and answers visitors. With it `sam local invoke -e events/ready.json` does what it does in AWS.

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::Stdio,
    time::Duration,
};

use anyhow::Context;
use aws_sdk_dynamodb::Client;
use tokio::{net::TcpListener, process::Command, sync::mpsc, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;
use tunnel_protocol::{
    id::ConnectionId,
    message,
    message::{Body, FEATURES, HttpResponse, ToAgent},
};
use tunnel_service::{
    auth::{Identity, owner::Owner, token::TokenHash},
    aws::sdk,
    now,
    tables::connections::{AgentConnection, Connection, ConnectionsTable},
    tables::mailbox::MailboxTable,
    tables::tokens::{Token, TokensTable},
    tables::tunnels::{Online, TunnelsTable},
};

use crate::console::say;
use tunnel_local_aws::{
    caller::AccessKey,
    dynamodb::{self, Database},
    management::{self, ConnectionCommand, ConnectionRegistry},
    quotas::Quotas,
};

/// Where sam-local.json sends the functions' DynamoDB calls. Those of @connections go to the next port.
const DYNAMODB_PORT: u16 = 8701;
/// The address of Docker's bridge on Linux, under which containers reach this machine, unless Docker says otherwise.
const BRIDGE: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 17, 0, 1));
/// How often it is looked for, while it does not exist: Docker makes it when it starts.
const BRIDGE_INTERVAL: Duration = Duration::from_secs(2);

/// Messages to the sample agent that wait to be printed.
const MAX_QUEUED_COMMANDS: usize = 128;

/// The connection that the events come from.
const CONNECTION: &str = "L0SM9cOFvHcCIhw=";
/// The tunnel that they request.
const TUNNEL: &str = "sample";
/// The token that events/connect.json carries.
const TOKEN: &str = "sample";

/// Serves the samples until `stopped`: on this machine, and where containers reach it, which is at `listen` or at the address of
/// Docker's bridge. Only sample data is served.
///
/// # Errors
/// If the ports are taken.
pub(crate) async fn run(
    listen: Option<SocketAddr>,
    stopped: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let port = listen.map_or(DYNAMODB_PORT, |listen| listen.port());
    let samples = Samples {
        database: dynamodb::open(None)?,
        connections: ConnectionRegistry::default(),
        port,
        tasks: tasks.clone(),
        stop: stop.clone(),
    };
    let (commands, sent) = mpsc::channel(MAX_QUEUED_COMMANDS);
    samples.connections.insert(CONNECTION.parse()?, commands);
    let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
    samples.serve(local).await?;
    let sdk = sdk::for_loopback(&format!("http://{local}:{port}"), "samples");
    dynamodb::create_tables(&Client::new(&sdk)).await?;
    seed(&sdk).await?;
    let mailbox = MailboxTable::new(&sdk, dynamodb::PENDING_REQUESTS.to_owned());
    let agent = tasks.spawn(sample_agent(sent, mailbox));
    say(&format!(
        "ready: DynamoDB on port {port}, @connections on port {}",
        port + 1
    ));
    match listen.map(|listen| listen.ip()) {
        Some(address) if address == local => {}
        Some(address) => samples.serve(address).await?,
        None => {
            let stopping = stop.clone();
            tasks.spawn(async move {
                stopping
                    .run_until_cancelled(samples.serve_at_bridge())
                    .await
            });
        }
    }
    say(
        "messages to the sample connection are printed here; try: sam local invoke -e events/ready.json",
    );
    stopped.await;
    stop.cancel();
    agent.abort();
    tasks.close();
    tasks.wait().await;
    Ok(())
}

/// The samples, which may be served at several addresses.
struct Samples {
    database: Database,
    connections: ConnectionRegistry,
    port: u16,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Samples {
    async fn serve(&self, address: IpAddr) -> anyhow::Result<()> {
        let listen = async |port: u16| {
            TcpListener::bind(SocketAddr::from((address, port)))
                .await
                .with_context(|| format!("port {port} of {address} is needed for the samples"))
        };
        let (tables, management) = (listen(self.port).await?, listen(self.port + 1).await?);
        dynamodb::serve(
            self.database.clone(),
            tables,
            AccessKey::any(),
            &self.tasks,
            &self.stop,
        );
        let api = management::router(
            self.connections.clone(),
            Quotas::default(),
            AccessKey::any(),
        );
        let stopping = self.stop.clone();
        self.tasks.spawn(async move {
            if let Err(error) = axum::serve(management, api)
                .with_graceful_shutdown(stopping.cancelled_owned())
                .await
            {
                warn!(%error, "@connections ended");
            }
        });
        Ok(())
    }

    /// Serves them at the address of Docker's bridge, as soon as there is one.
    async fn serve_at_bridge(self) {
        let mut has_said = false;
        loop {
            let bridge = bridge().await;
            match self.serve(bridge).await {
                Ok(()) => {
                    return say(&format!("containers reach the samples at {bridge}"));
                }
                Err(error) if !has_said => {
                    has_said = true;
                    say(&format!(
                        "containers cannot reach the samples yet; start Docker, or name the address with --listen ADDRESS:{}: {error:#}",
                        self.port
                    ));
                }
                Err(_) => {}
            }
            sleep(BRIDGE_INTERVAL).await;
        }
    }
}

/// The address of Docker's bridge, as Docker itself says if it runs.
async fn bridge() -> IpAddr {
    const GATEWAY: &str = "{{range .IPAM.Config}}{{.Gateway}} {{end}}";
    let asked = Command::new("docker")
        .args(["network", "inspect", "bridge", "--format", GATEWAY])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await;
    let said = asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    said.unwrap_or_default()
        .split_whitespace()
        .find_map(|address| address.parse().ok())
        .unwrap_or(BRIDGE)
}

async fn seed(sdk: &sdk::SdkConfig) -> anyhow::Result<()> {
    let hash = TokenHash::of(TOKEN);
    let identity = Identity {
        owner: Owner::Token(hash.clone()),
        expires_at: None,
    };
    let (connection_id, tunnel_id): (ConnectionId, _) = (CONNECTION.parse()?, TUNNEL.parse()?);
    let token = Token {
        hash,
        name: "sample".to_owned(),
        created_at: now().as_secs(),
        expires_at: None,
        revoked: false,
    };
    TokensTable::new(sdk, dynamodb::TOKENS.to_owned())
        .put(&token)
        .await?;
    let tunnels = TunnelsTable::new(sdk, dynamodb::TUNNELS.to_owned());
    tunnels.claim(&tunnel_id, &identity.owner, 0, now()).await?;
    let connections = ConnectionsTable::new(sdk, dynamodb::CONNECTIONS.to_owned());
    let connected_at_ms = u64::try_from(now().as_millis()).unwrap_or(u64::MAX);
    let connection = Connection::Agent(AgentConnection {
        tunnel_id: tunnel_id.clone(),
        identity: identity.clone(),
        connected_at_ms,
        opened: None,
    });
    connections.put(&connection_id, &connection, now()).await?;
    let online = Online {
        connection_id,
        connected_at_ms,
        previous: None,
        features: FEATURES.to_vec(),
        policy: None,
    };
    tunnels
        .hand_over(&tunnel_id, None, &online, &identity, &connections, now())
        .await?;
    Ok(())
}

/// Prints what it is sent, and answers requests as `default` would hand the answer on.
async fn sample_agent(
    mut sent: mpsc::Receiver<ConnectionCommand>,
    mailbox: MailboxTable,
) -> anyhow::Result<()> {
    let id: ConnectionId = CONNECTION.parse()?;
    while let Some(command) = sent.recv().await {
        let ConnectionCommand::Send(text) = command else {
            continue;
        };
        writeln!(std::io::stdout(), "{text}")?;
        if let Ok(ToAgent::HttpRequest(request)) = message::decode(&text) {
            let body = format!(
                "The sample agent was asked for {} {}\n",
                request.method, request.uri
            );
            let response = HttpResponse {
                request_id: request.request_id,
                status_code: 200,
                headers: [(
                    http::header::CONTENT_TYPE,
                    http::HeaderValue::from_static("text/plain"),
                )]
                .into_iter()
                .collect(),
                body: Body(body.into()),
                encoding: None,
                processing_time_ms: 0,
                more: false,
                reply_to: None,
            };
            mailbox.put(&id, response.into(), now()).await?;
        }
    }
    Ok(())
}
