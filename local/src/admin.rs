//! What an operator does to the tables of a service: agent tokens and tunnel names, of a deployment or of a data directory.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use aws_sdk_dynamodb::Client;
use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};
use serde_json::json;
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tunnel_local_aws::{backup, caller::AccessKey, dynamodb};
use tunnel_protocol::id::TunnelId;
use tunnel_service::{
    auth::token,
    aws::sdk,
    now,
    settings::Variables,
    tables::{tokens::TokensTable, tunnels::TunnelsTable},
};

use crate::{
    console::{escape, escape_json, fail},
    document::Document,
    operator::listing,
};

/// Longest life that a token can be given.
const MAX_TOKEN_LIFE: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// Manages agent tokens and tunnel names.
#[derive(Debug, Parser)]
#[command(name = "tunnel-admin", version)]
struct Cli {
    /// The name of a deployment's stack. Needs sam, and AWS credentials and region in the environment
    #[arg(long, global = true, value_name = "NAME", conflicts_with = "data")]
    stack: Option<String>,
    /// The data directory of a tunnel-local
    #[arg(long, global = true, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Print lists as JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: AdminCommand,
}

#[derive(Debug, Subcommand)]
enum AdminCommand {
    #[command(flatten)]
    Tables(TablesCommand),
    #[command(flatten)]
    Copies(CopiesCommand),
    #[command(flatten)]
    Document(Document),
}

/// What is done to the tables of a service.
#[derive(Debug, Subcommand)]
enum TablesCommand {
    /// Create a token and print it; it cannot be shown again, because only its hash is kept
    CreateToken {
        /// Who it is for
        #[arg(value_parser = token_name)]
        name: String,
        /// How long it is valid, such as 90d [default: until it is revoked]
        #[arg(long, value_parser = token_life, value_name = "TIME")]
        expires: Option<Duration>,
    },
    /// List tokens: name, start of the hash, and whether they are valid
    ListTokens,
    /// Revoke all tokens with this name
    RevokeToken {
        /// Who they were made for
        name: String,
    },
    /// List tunnels: id, state, and the token that owns them
    ListTunnels,
    /// Release a tunnel id, so that anyone may claim it
    ReleaseTunnel {
        /// The tunnel's id
        id: TunnelId,
    },
}

/// What is done to a data directory as a whole.
#[derive(Debug, Subcommand)]
enum CopiesCommand {
    /// Copy a data directory's tokens and tunnel names into a new file; the server may be running
    Backup {
        /// The new file
        file: PathBuf,
    },
    /// Make a backup the data of a directory that has none; its server must not be running
    Restore {
        /// The backup
        file: PathBuf,
    },
}

fn token_name(name: &str) -> Result<String, String> {
    if name.trim().is_empty() || name.chars().any(char::is_control) {
        return Err("must not be empty or contain control characters".to_owned());
    }
    Ok(name.to_owned())
}

fn token_life(text: &str) -> Result<Duration, String> {
    let life = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if life.is_zero() || life > MAX_TOKEN_LIFE {
        return Err("must be more than nothing and at most 100 years".to_owned());
    }
    Ok(life)
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
    let command = match cli.command {
        AdminCommand::Tables(command) => command,
        AdminCommand::Copies(command) => return command.run(cli.data.as_deref()),
        AdminCommand::Document(document) => return Ok(document.write(Cli::command())?),
    };
    let service = match (cli.stack, cli.data) {
        (Some(stack), _) => Service::deployed(&stack)?,
        (None, Some(directory)) => Service::in_directory(&directory).await?,
        (None, None) => missing("specify the service: --stack NAME or --data DIR"),
    };
    let mut out = std::io::stdout().lock();
    match command {
        TablesCommand::CreateToken { name, expires } => {
            let token = service.tokens.create(&name, expires, now()).await?;
            writeln!(out, "{token}")?;
        }
        TablesCommand::ListTokens => service.list_tokens(&mut out, cli.json).await?,
        TablesCommand::RevokeToken { name } => {
            let revoked = service.tokens.revoke(&name).await?;
            if revoked == 0 {
                bail!("there is no valid token with the name {name}");
            }
            writeln!(out, "revoked {revoked}")?;
        }
        TablesCommand::ListTunnels => service.list_tunnels(&mut out, cli.json).await?,
        TablesCommand::ReleaseTunnel { id } => {
            if !service.tunnels.release(&id).await? {
                bail!("there is no tunnel {id}");
            }
            writeln!(out, "released {id}")?;
        }
    }
    Ok(())
}

/// Ends the process because of an argument that is missing.
fn missing(what: &str) -> ! {
    Cli::command()
        .error(ErrorKind::MissingRequiredArgument, what)
        .exit()
}

impl CopiesCommand {
    fn run(self, data: Option<&Path>) -> anyhow::Result<()> {
        let data = data.unwrap_or_else(|| missing("specify the data directory: --data DIR"));
        match self {
            Self::Backup { file } => backup::backup(data, &file)?,
            Self::Restore { file } => backup::restore(data, &file)?,
        }
        Ok(())
    }
}

/// The tables of a service.
struct Service {
    tokens: TokensTable,
    tunnels: TunnelsTable,
    /// Ends the engine that serves the tables of a data directory.
    _engine: Option<tokio_util::sync::DropGuard>,
}

impl Service {
    /// Those of a data directory, whether a server is running on it or not.
    async fn in_directory(directory: &Path) -> anyhow::Result<Self> {
        if !dynamodb::has_data(directory) {
            bail!("{} contains no data of a tunnel-local", directory.display());
        }
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .context("no loopback port for DynamoDB")?;
        let access_key = token::generate_token();
        let sdk = sdk::for_loopback(&format!("http://{}", listener.local_addr()?), &access_key);
        let stop = CancellationToken::new();
        dynamodb::serve(
            dynamodb::open(Some(directory))?,
            listener,
            AccessKey::only(&access_key),
            &TaskTracker::new(),
            &stop,
        );
        dynamodb::create_tables(&Client::new(&sdk)).await?;
        Ok(Self {
            tokens: TokensTable::new(&sdk, dynamodb::TOKENS.to_owned()),
            tunnels: TunnelsTable::new(&sdk, dynamodb::TUNNELS.to_owned()),
            _engine: Some(stop.drop_guard()),
        })
    }

    /// Those of a deployment, as its outputs name them.
    fn deployed(stack: &str) -> anyhow::Result<Self> {
        let output = std::process::Command::new("sam")
            .args(["list", "stack-outputs", "--output", "json", "--stack-name"])
            .arg(stack)
            .output()
            .context(
                "sam is needed to find the tables of the deployment: pip install aws-sam-cli",
            )?;
        if !output.status.success() {
            bail!(
                "sam list stack-outputs failed: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        let outputs: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)
            .context("sam list stack-outputs did not print JSON")?;
        let table = |key: &str| {
            let found = outputs
                .iter()
                .find(|output| output["OutputKey"] == key)
                .and_then(|output| output["OutputValue"].as_str());
            found
                .map(str::to_owned)
                .with_context(|| format!("the stack {stack} has no output {key}"))
        };
        let sdk = sdk::from_environment(Variables::of_process()).context(
            "AWS credentials are needed in the environment: eval \"$(aws configure export-credentials --format env)\"",
        )?;
        Ok(Self {
            tokens: TokensTable::new(&sdk, table("TokensTable")?),
            tunnels: TunnelsTable::new(&sdk, table("TunnelsTable")?),
            _engine: None,
        })
    }

    async fn list_tokens(&self, out: &mut impl Write, is_json: bool) -> anyhow::Result<()> {
        let tokens = self.tokens.list().await?;
        if is_json {
            let tokens: Vec<_> = tokens.iter().map(listing::token).collect();
            let listed = json!({ "tokens": tokens }).to_string();
            writeln!(out, "{}", escape_json(&listed))?;
            return Ok(());
        }
        for token in tokens {
            let (name, hash) = (escape(&token.name), token.hash.to_string());
            let (hash, state) = (listing::short(&hash), listing::token_state(&token));
            writeln!(out, "{name}\t{hash}\t{state}")?;
        }
        Ok(())
    }

    async fn list_tunnels(&self, out: &mut impl Write, is_json: bool) -> anyhow::Result<()> {
        let tokens = self.tokens.list().await?;
        let tunnels = self.tunnels.list(now()).await?;
        if is_json {
            let tunnels: Vec<_> = tunnels
                .iter()
                .map(|(id, tunnel)| listing::tunnel(id, tunnel, &tokens))
                .collect();
            let listed = json!({ "tunnels": tunnels }).to_string();
            writeln!(out, "{}", escape_json(&listed))?;
            return Ok(());
        }
        for (id, tunnel) in tunnels {
            let owner = listing::owner_name(&tunnel.identity.owner, &tokens);
            let state = match tunnel.online {
                Some(_) => "online",
                None => "offline",
            };
            writeln!(out, "{id}\t{state}\t{}", escape(&owner))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_break_a_listing_and_lives_that_cannot_be_are_refused() {
        Cli::command().debug_assert();
        for name in ["", " ", "a\tb", "a\nb", "\u{1b}[31m"] {
            assert!(token_name(name).is_err(), "{name:?}");
        }
        assert_eq!(token_name("alice b").as_deref(), Ok("alice b"));
        for life in ["0s", "18446744073709551615s", "101years", "x"] {
            assert!(token_life(life).is_err(), "{life}");
        }
        assert_eq!(token_life("90d"), Ok(Duration::from_secs(90 * 86_400)));
    }
}
