//! What whoever runs the service does to its tables: agent tokens and tunnel names, of a deployment or of a data directory.

use std::{io::Write, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use aws_sdk_dynamodb::Client;
use clap::{Parser, Subcommand};
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tunnel_protocol::id::TunnelId;
use tunnel_service::{
    auth::{owner::Owner, token},
    aws::sdk,
    aws::sdk::SdkConfig,
    now,
    settings::Variables,
    tables::tokens::TokensTable,
    tables::tunnels::TunnelsTable,
};

use crate::cli::fail;
use tunnel_local_aws::{caller::AccessKey, dynamodb};

/// Looks after agent tokens and tunnel names.
#[derive(Debug, Parser)]
#[command(name = "tunnel-admin", version)]
struct Cli {
    /// The deployment: a stack's name. Needs sam, and AWS credentials and region in the environment
    #[arg(long, global = true, value_name = "NAME", conflicts_with = "data")]
    stack: Option<String>,
    /// The data directory of a tunnel-local
    #[arg(long, global = true, value_name = "DIR")]
    data: Option<PathBuf>,
    #[command(subcommand)]
    command: ConnectionCommand,
}

#[derive(Debug, Subcommand)]
enum ConnectionCommand {
    /// Make a token and print it, this once; only its hash is kept
    CreateToken {
        /// Whom it is for
        name: String,
        /// How long it is good, such as 90d [default: until it is revoked]
        #[arg(long, value_parser = humantime::parse_duration, value_name = "TIME")]
        expires: Option<Duration>,
    },
    /// List tokens: name, start of the hash, and whether they are good
    ListTokens,
    /// Let agents with the tokens of this name in no longer
    RevokeToken {
        /// Whom they were made for
        name: String,
    },
    /// List tunnels: id, state, and the token that owns them
    ListTunnels,
    /// Make a tunnel id free for anybody
    ReleaseTunnel {
        /// The tunnel's id
        id: TunnelId,
    },
}

/// The executable's whole life. Not async, so that the compiler makes code of its futures here and not once more there.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match Runtime::new()
        .context("cannot start")
        .and_then(|runtime| runtime.block_on(run(cli)))
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(1, &format!("{error:#}")),
    }
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let (sdk, tokens, tunnels) = match (cli.stack, cli.data) {
        (Some(stack), _) => deployed(&stack).await?,
        (None, Some(directory)) if !dynamodb::has_data(&directory) => {
            bail!("{} holds no tunnel-local's data", directory.display())
        }
        (None, Some(directory)) => {
            let listener = TcpListener::bind("127.0.0.1:0")
                .await
                .context("no loopback port for DynamoDB")?;
            let access_key = token::generate_token();
            let sdk = sdk::for_loopback(&format!("http://{}", listener.local_addr()?), &access_key);
            dynamodb::serve(
                dynamodb::open(Some(&directory))?,
                listener,
                AccessKey::only(&access_key),
                &tasks,
                &stop,
            );
            dynamodb::create_tables(&Client::new(&sdk)).await?;
            (
                sdk,
                dynamodb::TOKENS.to_owned(),
                dynamodb::TUNNELS.to_owned(),
            )
        }
        (None, None) => bail!("say of which service: --stack NAME or --data DIR"),
    };
    let outcome = carry_out(
        cli.command,
        &TokensTable::new(&sdk, tokens),
        &TunnelsTable::new(&sdk, tunnels),
    )
    .await;
    stop.cancel();
    outcome
}

/// The tables of a deployment, as its outputs name them.
async fn deployed(stack: &str) -> anyhow::Result<(SdkConfig, String, String)> {
    let output = std::process::Command::new("sam")
        .args([
            "list",
            "stack-outputs",
            "--output",
            "json",
            "--stack-name",
            stack,
        ])
        .output()
        .context("sam is needed to look the deployment up: pip install aws-sam-cli")?;
    if !output.status.success() {
        bail!(
            "sam list stack-outputs failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let outputs: Vec<serde_json::Value> =
        serde_json::from_slice(&output.stdout).context("sam list stack-outputs printed no JSON")?;
    let table = |key: &str| {
        let found = outputs
            .iter()
            .find(|output| output["OutputKey"] == key)
            .and_then(|output| output["OutputValue"].as_str());
        found
            .map(str::to_owned)
            .with_context(|| format!("the stack {stack} has no output {key}"))
    };
    Ok((
        sdk::from_environment(Variables::of_process())
            .context("credentials of AWS are needed in the environment: eval \"$(aws configure export-credentials --format env)\"")?,
        table("TokensTable")?,
        table("TunnelsTable")?,
    ))
}

async fn carry_out(
    command: ConnectionCommand,
    tokens: &TokensTable,
    tunnels: &TunnelsTable,
) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match command {
        ConnectionCommand::CreateToken { name, expires } => {
            writeln!(out, "{}", tokens.create(&name, expires, now()).await?)?;
        }
        ConnectionCommand::ListTokens => {
            for token in tokens.list().await? {
                let is_expired = token.expires_at.is_some_and(|at| at <= now().as_secs());
                let state = match (token.revoked, is_expired) {
                    (true, _) => "revoked",
                    (false, true) => "expired",
                    (false, false) => "good",
                };
                writeln!(
                    out,
                    "{}\t{}\t{state}",
                    token.name,
                    short(&token.hash.to_string())
                )?;
            }
        }
        ConnectionCommand::RevokeToken { name } => {
            let revoked = tokens.revoke(&name).await?;
            if revoked == 0 {
                bail!("there is no good token of the name {name}");
            }
            writeln!(out, "revoked {revoked}")?;
        }
        ConnectionCommand::ListTunnels => {
            let names = tokens.list().await?;
            for (id, tunnel) in tunnels.list(now()).await? {
                let owner = names
                    .iter()
                    .find(|token| tunnel.identity.owner == Owner::Token(token.hash.clone()));
                let owner = owner.map_or_else(
                    || short(&tunnel.identity.owner.to_string()).to_owned(),
                    |token| token.name.clone(),
                );
                writeln!(
                    out,
                    "{id}\t{}\t{owner}",
                    if tunnel.online.is_some() {
                        "online"
                    } else {
                        "offline"
                    }
                )?;
            }
        }
        ConnectionCommand::ReleaseTunnel { id } => {
            if !tunnels.release(&id).await? {
                bail!("there is no tunnel {id}");
            }
            writeln!(out, "released {id}")?;
        }
    }
    Ok(())
}

fn short(text: &str) -> &str {
    text.get(..18).unwrap_or(text)
}
