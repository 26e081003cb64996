//! The command line of `tunnel-local`.

use std::{io::Write, net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, ValueEnum};
use tokio::runtime::Runtime;
use tracing_subscriber::{filter::Targets, fmt, layer::SubscriberExt, util::SubscriberInitExt};
use tunnel_forward::rate_limit::MAX_CONCURRENT_REQUESTS;
use tunnel_protocol::{cidr::Cidr, limits::WEBSOCKET_LIFETIME};
use tunnel_service::{
    auth::AuthMode,
    routing::{PublicUrl, Routing},
};

use crate::{Options, Server, sam_invoke, server::JwtIssuer};
use tunnel_local_aws::quotas::Quotas;

/// Runs the whole tunnel on this machine: visitors and agents connect to one address.
#[derive(Parser)]
#[command(name = "tunnel-local", version)]
struct Cli {
    /// Where visitors and agents connect; port 0 picks a free one
    #[arg(
        long,
        env = "TUNNEL_LISTEN",
        default_value = "127.0.0.1:8080",
        value_name = "ADDRESS"
    )]
    listen: SocketAddr,
    /// Where visitors reach it, if not under that address
    #[arg(long, env = "TUNNEL_PUBLIC_URL", value_name = "URL")]
    public_url: Option<PublicUrl>,
    /// Keep names and tokens in this directory instead of forgetting them
    #[arg(long, env = "TUNNEL_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
    /// How agents prove who they are [default: open if only this machine can connect, token otherwise]
    #[arg(long, env = "TUNNEL_AUTH")]
    auth: Option<AuthWord>,
    /// With --auth jwt: who makes agents' JSON Web Tokens, their `iss`
    #[arg(long, env = "TUNNEL_JWT_ISSUER", value_name = "TEXT")]
    jwt_issuer: Option<String>,
    /// With --auth jwt: whom they are for, their `aud`
    #[arg(long, env = "TUNNEL_JWT_AUDIENCE", value_name = "TEXT")]
    jwt_audience: Option<String>,
    /// With --auth jwt: where the issuer publishes its keys
    #[arg(long, env = "TUNNEL_JWT_JWKS_URL", value_name = "URL")]
    jwt_jwks_url: Option<String>,
    /// With --auth jwt: what the issuer signs with instead, at least 32 bytes; better in the environment than on the command line
    #[arg(
        long,
        env = "TUNNEL_JWT_SECRET",
        hide_env_values = true,
        value_name = "SECRET"
    )]
    jwt_secret: Option<String>,
    /// How visitors name a tunnel
    #[arg(long, env = "TUNNEL_ROUTING", value_enum, default_value = "path")]
    routing: RoutingWord,
    /// How long an agent's connection may live: agents open the next one in time [default: 2h, as in AWS]
    #[arg(long, env = "TUNNEL_MAX_CONNECTION_AGE", value_parser = connection_age, value_name = "TIME")]
    max_connection_age: Option<Duration>,
    /// Most requests of one tunnel at once; 0 is no limit
    #[arg(long, env = "TUNNEL_MAX_CONCURRENT_REQUESTS", default_value_t = MAX_CONCURRENT_REQUESTS, value_name = "N")]
    max_concurrent_requests: u32,
    /// Most new requests of one tunnel in a second, and twice that after a pause; 0 is no limit
    #[arg(
        long,
        env = "TUNNEL_MAX_REQUESTS_PER_SECOND",
        default_value_t = 0,
        value_name = "N"
    )]
    max_requests_per_second: u32,
    /// Most agents that may be connected with one token; without tokens, in all
    #[arg(long, env = "TUNNEL_MAX_AGENTS_PER_TOKEN", default_value_t = Quotas::default().agents_of_one, value_name = "N")]
    max_agents_per_token: usize,
    /// Believe X-Forwarded-For, -Proto and -Host of a proxy with an address in this network; may be repeated [default: none]
    #[arg(
        long,
        env = "TUNNEL_TRUST_PROXY",
        value_delimiter = ',',
        value_name = "CIDR"
    )]
    trust_proxy: Vec<Cidr>,
    /// Be the other side of the events in events/ instead: for `sam local invoke`
    #[arg(long, conflicts_with_all = ["data", "auth", "public_url"])]
    samples: bool,
    /// What is logged on stderr: error, warn, info, debug, or a list such as warn,local=debug
    #[arg(
        long,
        env = "TUNNEL_LOG_LEVEL",
        default_value = "warn",
        value_name = "LEVEL"
    )]
    log_level: String,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum AuthWord {
    /// Everybody may connect; on loopback only
    Open,
    /// With a token; the first one is made and printed on the first start
    Token,
    /// With a JSON Web Token
    Jwt,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoutingWord {
    /// By the first path segment
    Path,
    /// By host name, below that of the public URL
    Subdomain,
}

impl Cli {
    fn options(&self) -> Options {
        let auth = match self.auth {
            Some(AuthWord::Open) => AuthMode::Open,
            Some(AuthWord::Token) => AuthMode::Token,
            Some(AuthWord::Jwt) => AuthMode::Jwt,
            None if self.listen.ip().is_loopback()
                && self.public_url.as_ref().is_none_or(PublicUrl::is_loopback) =>
            {
                AuthMode::Open
            }
            None => AuthMode::Token,
        };
        let routing = match self.routing {
            RoutingWord::Path => Routing::Path,
            RoutingWord::Subdomain => Routing::Subdomain,
        };
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let jwt = JwtIssuer {
            issuer: text(&self.jwt_issuer),
            audience: text(&self.jwt_audience),
            jwks_url: text(&self.jwt_jwks_url),
            secret: text(&self.jwt_secret),
        };
        Options {
            listen: self.listen,
            public_url: self.public_url.clone(),
            data: self.data.clone(),
            auth,
            jwt: Some(jwt),
            routing,
            quotas: Quotas {
                life: self.max_connection_age.unwrap_or(WEBSOCKET_LIFETIME),
                agents_of_one: self.max_agents_per_token,
                ..Quotas::default()
            },
            max_concurrent_requests: self.max_concurrent_requests,
            max_requests_per_second: self.max_requests_per_second,
            trusted_proxies: self.trust_proxy.clone(),
            ..Options::default()
        }
    }
}

fn connection_age(text: &str) -> Result<Duration, String> {
    let age = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let is_possible = (Duration::from_secs(1)..=WEBSOCKET_LIFETIME).contains(&age);
    is_possible
        .then_some(age)
        .ok_or_else(|| "must be between 1s and 2h".to_owned())
}

/// The executable's whole life. Not async, so that the compiler makes code of its futures here and not once more there.
pub fn main() -> ExitCode {
    match Runtime::new() {
        Ok(runtime) => runtime.block_on(run()),
        Err(error) => fail(1, &format!("cannot start: {error}")),
    }
}

async fn run() -> ExitCode {
    let cli = Cli::parse();
    let filter = match cli.log_level.parse::<Targets>() {
        Ok(filter) => filter,
        Err(error) => return fail(2, &format!("log level {}: {error}", cli.log_level)),
    };
    tracing_subscriber::registry()
        .with(fmt::layer().with_writer(std::io::stderr))
        .with(filter)
        .init();
    if cli.samples {
        return match sam_invoke::run(interrupted()).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(1, &format!("{error:#}")),
        };
    }
    let stack = match Server::start(cli.options()).await {
        Ok(stack) => stack,
        Err(error) => return fail(1, &format!("{error:#}")),
    };
    say(&format!(
        "ready: visitors at {}, agents at {}",
        stack.public_url, stack.endpoint
    ));
    let token = stack
        .first_token
        .as_ref()
        .map(|token| format!("TTF_TOKEN={token} "))
        .unwrap_or_default();
    if stack.first_token.is_some() {
        say("a first agent token was made; it is shown this once:");
    }
    say(&format!(
        "open a tunnel with: {token}ttf http 3000 --endpoint {}",
        stack.endpoint
    ));
    interrupted().await;
    say("stopping");
    tokio::select! {
        () = stack.stop() => ExitCode::SUCCESS,
        // A second signal ends at once.
        () = interrupted() => ExitCode::FAILURE,
    }
}

pub(crate) fn fail(code: u8, text: &str) -> ExitCode {
    say(&format!("error: {text}"));
    ExitCode::from(code)
}

/// Writes a line to stderr.
pub(crate) fn say(line: &str) {
    // Without stderr there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Waits for Ctrl-C or a request to terminate.
async fn interrupted() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}
