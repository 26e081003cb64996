//! The other side of the events in events/: the tables with what the events name, and a sample agent that prints what it is sent
//! and answers visitors. With it `sam local invoke -e events/ready.json` does what it does in AWS.

use std::{
    io::Write,
    net::{IpAddr, SocketAddr},
};

use anyhow::Context;
use aws_sdk_dynamodb::Client;
use tokio::{net::TcpListener, sync::mpsc};
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
    dynamodb,
    management::{self, ConnectionCommand, ConnectionRegistry},
    quotas::Quotas,
};

/// Where sam-local.json sends the functions' DynamoDB calls.
const DYNAMODB_PORT: u16 = 8701;
/// Where it sends their calls of @connections.
const CONNECTIONS_PORT: u16 = 8702;
/// The addresses the ports are opened on: this machine's own, and that of Docker's bridge on Linux, under which containers reach
/// this machine. Only sample data is served.
const ADDRESSES: [IpAddr; 2] = [
    IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
    IpAddr::V4(std::net::Ipv4Addr::new(172, 17, 0, 1)),
];

/// Messages to the sample agent that wait to be printed.
const MAX_QUEUED_COMMANDS: usize = 128;

/// The connection that the events come from.
const CONNECTION: &str = "L0SM9cOFvHcCIhw=";
/// The tunnel that they request.
const TUNNEL: &str = "sample";
/// The token that events/connect.json carries.
const TOKEN: &str = "sample";

/// Serves the samples until `stopped`.
///
/// # Errors
/// If the ports are taken.
pub(crate) async fn run(stopped: impl Future<Output = ()>) -> anyhow::Result<()> {
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let database = dynamodb::open(None)?;
    for listener in listeners(DYNAMODB_PORT).await? {
        dynamodb::serve(database.clone(), listener, AccessKey::any(), &tasks, &stop);
    }
    let sdk = sdk::for_loopback(&format!("http://127.0.0.1:{DYNAMODB_PORT}"), "samples");
    dynamodb::create_tables(&Client::new(&sdk)).await?;
    seed(&sdk).await?;

    let connections = ConnectionRegistry::default();
    let (commands, sent) = mpsc::channel(MAX_QUEUED_COMMANDS);
    connections.insert(CONNECTION.parse()?, commands);
    for listener in listeners(CONNECTIONS_PORT).await? {
        let (api, stopping) = (
            management::router(connections.clone(), Quotas::default(), AccessKey::any()),
            stop.clone(),
        );
        tasks.spawn(async move {
            if let Err(error) = axum::serve(listener, api)
                .with_graceful_shutdown(stopping.cancelled_owned())
                .await
            {
                warn!(%error, "@connections ended");
            }
        });
    }
    let mailbox = MailboxTable::new(&sdk, dynamodb::PENDING_REQUESTS.to_owned());
    let agent = tasks.spawn(sample_agent(sent, mailbox));
    say(&format!(
        "ready: DynamoDB on port {DYNAMODB_PORT}, @connections on port {CONNECTIONS_PORT}"
    ));
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

async fn listeners(port: u16) -> anyhow::Result<Vec<TcpListener>> {
    let mut listeners = Vec::new();
    for address in ADDRESSES {
        match TcpListener::bind(SocketAddr::from((address, port))).await {
            Ok(listener) => listeners.push(listener),
            // A machine without Docker's bridge has no such address.
            Err(error)
                if error.kind() == std::io::ErrorKind::AddrNotAvailable
                    && !address.is_loopback() =>
            {
                say(&format!(
                    "{address} does not exist, so containers cannot reach port {port}: start Docker first if they need it"
                ));
            }
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("port {port} is needed for the samples"));
            }
        }
    }
    Ok(listeners)
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
