//! The command line of `tunnel-local`.

use std::{
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{
    ArgMatches, Command, CommandFactory, FromArgMatches, Parser, Subcommand,
    builder::{PossibleValuesParser, TypedValueParser},
    error::ErrorKind,
    parser::ValueSource,
};
use tokio::runtime::Runtime;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tunnel_config::ConfigFileError;
use tunnel_connect::MAX_TUNNEL_IDS_PER_OWNER;
use tunnel_forward::rate_limit::MAX_CONCURRENT_REQUESTS;
use tunnel_local_aws::quotas::Quotas;
use tunnel_protocol::cidr::Cidr;
use tunnel_service::{
    auth::{AuthMode, jwt::JwtSettings},
    routing::{PublicUrl, Routing},
};

use crate::{
    AccessLogFormat, AccessLogOptions, Options, OptionsError, Server, ServerError,
    config_file::{self, ConfigFile},
    console::{LogFormat, LogLevel, Signals, Wish, fail, raise_open_files, report, start_log},
    document::Document,
    front::listener::MAX_OPEN_CONNECTIONS,
    health, sam_invoke, supervision,
    tls::{AcmeOptions, TlsOptions},
};

/// Files that are open besides connections, with room to spare: the database, the log, sockets of the process's own.
const OTHER_OPEN_FILES: u64 = 256;
/// In less, agents could not open the next connection in time.
const MIN_CONNECTION_AGE: Duration = Duration::from_secs(1);

/// Whom --acme asks for certificates.
const LETS_ENCRYPT: &str = "https://acme-v02.api.letsencrypt.org/directory";

/// Runs the whole tunnel on this machine: visitors and agents connect to one address.
#[derive(Parser)]
#[command(name = "tunnel-local", version)]
struct Cli {
    /// Where visitors and agents connect; port 0 picks a free one. With --samples: where containers reach this machine
    #[arg(
        long,
        global = true,
        env = "TUNNEL_LISTEN",
        default_value = "127.0.0.1:8080",
        value_parser = address,
        value_name = "ADDRESS"
    )]
    listen: SocketAddr,
    /// Where visitors reach the server, if not at that address
    #[arg(long, env = "TUNNEL_PUBLIC_URL", value_name = "URL")]
    public_url: Option<PublicUrl>,
    /// Serve HTTPS with the certificate in this PEM file, which is read again when it changes
    #[arg(long, env = "TUNNEL_TLS_CERT", value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key, in PEM
    #[arg(long, env = "TUNNEL_TLS_KEY", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Serve HTTPS with certificates that an authority issues for the host of --public-url; CONTACT is your mail address. You agree to the authority's terms of service
    #[arg(long, env = "TUNNEL_ACME", value_name = "CONTACT")]
    acme: Option<String>,
    /// With --acme: the authority's directory
    #[arg(
        long,
        env = "TUNNEL_ACME_DIRECTORY",
        value_name = "URL",
        default_value = LETS_ENCRYPT
    )]
    acme_directory: String,
    /// With --acme: the certificate, in PEM, by which a private authority's directory is known
    #[arg(long, env = "TUNNEL_ACME_CA", value_name = "FILE")]
    acme_ca: Option<PathBuf>,
    /// With --acme: prove with DNS records whose the names are, and use one certificate for all subdomains; called as COMMAND present|cleanup _acme-challenge.NAME VALUE
    #[arg(long, env = "TUNNEL_ACME_DNS_HOOK", value_name = "COMMAND")]
    acme_dns_hook: Option<PathBuf>,
    /// With HTTPS: redirect visitors who use http:// at this address
    #[arg(long, env = "TUNNEL_LISTEN_HTTP", value_parser = address, value_name = "ADDRESS")]
    listen_http: Option<SocketAddr>,
    /// Store names and tokens in this directory; without it they are lost when the server stops
    #[arg(long, env = "TUNNEL_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
    /// How agents prove who they are: not at all, with a token (the first is created on the first start), or with a JSON Web Token
    /// [default: open if only this machine can connect, token otherwise]
    #[arg(long, env = "TUNNEL_AUTH", value_parser = words::<AuthMode>(&["open", "token", "jwt"]))]
    auth: Option<AuthMode>,
    /// With --auth jwt: the issuer of agents' JSON Web Tokens, their `iss`
    #[arg(long, env = "TUNNEL_JWT_ISSUER", value_name = "TEXT")]
    jwt_issuer: Option<String>,
    /// With --auth jwt: the audience of those tokens, their `aud`
    #[arg(long, env = "TUNNEL_JWT_AUDIENCE", value_name = "TEXT")]
    jwt_audience: Option<String>,
    /// With --auth jwt: where the issuer publishes its keys
    #[arg(long, env = "TUNNEL_JWT_JWKS_URL", value_name = "URL")]
    jwt_jwks_url: Option<String>,
    /// With --auth jwt: the secret that the issuer signs with instead, at least 32 bytes; other users of this machine can see it on the command line, so prefer the environment
    #[arg(
        long,
        env = "TUNNEL_JWT_SECRET",
        hide_env_values = true,
        value_name = "SECRET"
    )]
    jwt_secret: Option<String>,
    /// How public addresses name a tunnel: by the first path segment, or by a subdomain of the public URL's host
    #[arg(long, env = "TUNNEL_ROUTING", value_parser = words::<Routing>(&["path", "subdomain"]), default_value = "path")]
    routing: Routing,
    /// Serve visitors whatever host name they use, and pass that name on to local services
    #[arg(long, env = "TUNNEL_ANY_HOST")]
    any_host: bool,
    /// How long an agent's connection may live; agents open the next one in time [default: no limit]
    #[arg(long, env = "TUNNEL_MAX_CONNECTION_AGE", value_parser = connection_age, value_name = "TIME")]
    max_connection_age: Option<Duration>,
    /// Most requests of one tunnel at once; 0 means no limit
    #[arg(long, env = "TUNNEL_MAX_CONCURRENT_REQUESTS", default_value_t = MAX_CONCURRENT_REQUESTS, value_name = "N")]
    max_concurrent_requests: u32,
    /// Most new requests of one tunnel per second, and twice as many after a pause; 0 means no limit
    #[arg(
        long,
        env = "TUNNEL_MAX_REQUESTS_PER_SECOND",
        default_value_t = 0,
        value_name = "N"
    )]
    max_requests_per_second: u32,
    /// Most tunnel ids that one owner may have; with --auth open, all agents together; 0 means no limit
    #[arg(long, env = "TUNNEL_MAX_TUNNEL_IDS_PER_OWNER", default_value_t = MAX_TUNNEL_IDS_PER_OWNER, value_name = "N")]
    max_tunnel_ids_per_owner: u32,
    /// Most agents that one owner, a token or a JSON Web Token's subject, may have connected; with --auth open, all agents together
    #[arg(long, env = "TUNNEL_MAX_AGENTS_PER_TOKEN", default_value_t = Quotas::default().agents_of_one, value_name = "N")]
    max_agents_per_token: usize,
    /// Trust X-Forwarded-For, -Proto and -Host from reverse proxies in this network; may be repeated [default: none]
    #[arg(
        long,
        env = "TUNNEL_TRUST_PROXY",
        value_delimiter = ',',
        value_name = "CIDR"
    )]
    trust_proxy: Vec<Cidr>,
    /// Where you ask for metrics, health, and who is connected: /metrics, /healthz, /readyz, /agents and /tunnels at this address [default: nowhere]
    #[arg(long, env = "TUNNEL_ADMIN", value_parser = address, value_name = "ADDRESS")]
    admin: Option<SocketAddr>,
    /// Serve --admin at an address that other machines can connect to; nobody is asked for a password
    #[arg(long, env = "TUNNEL_ADMIN_REMOTE")]
    admin_remote: bool,
    /// Count each tunnel's requests and bytes for itself in /metrics
    #[arg(long, env = "TUNNEL_METRICS_PER_TUNNEL")]
    metrics_per_tunnel: bool,
    /// Write a line for each request of a visitor to this file, or to stdout with -
    #[arg(long, env = "TUNNEL_ACCESS_LOG", value_name = "FILE")]
    access_log: Option<PathBuf>,
    /// How lines of the access log look: as Apache and nginx combine them, or as JSON
    #[arg(long, env = "TUNNEL_ACCESS_LOG_FORMAT", value_parser = words::<AccessLogFormat>(&["combined", "json"]), default_value = "combined", value_name = "FORMAT")]
    access_log_format: AccessLogFormat,
    /// Serve a stand-in DynamoDB and @connections for `sam local invoke` instead
    #[arg(long, conflicts_with_all = ["data", "auth", "public_url", "tls_cert", "acme", "listen_http"])]
    samples: bool,
    /// Read settings from this file: every flag is a key, with _ in place of - [default: config.toml in the directory tunnel-local of your configuration directory or of /etc]
    #[arg(long, short, env = "TUNNEL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// What to log on stderr: error, warn, info, debug, or a list such as warn,local=debug
    #[arg(
        long,
        env = "TUNNEL_LOG_LEVEL",
        value_parser = log_level,
        default_value = "warn",
        value_name = "LEVEL"
    )]
    log_level: Targets,
    /// How lines on stderr look: text, or json, an object a line
    #[arg(long, env = "TUNNEL_LOG_FORMAT", value_parser = words::<LogFormat>(&["text", "json"]), default_value = "text", value_name = "FORMAT")]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Option<OtherCommand>,
}

/// What there is to do instead of serving.
#[derive(Subcommand)]
enum OtherCommand {
    /// Ask the server with the same settings whether it serves; exits with 1 if it does not
    Health,
    #[command(flatten)]
    Document(Document),
}

/// Flags whose values can change while the server runs.
const RELOADED: [&str; 6] = [
    "log_level",
    "max_concurrent_requests",
    "max_requests_per_second",
    "max_tunnel_ids_per_owner",
    "max_agents_per_token",
    "trust_proxy",
];

/// The command line, without the values of a config file.
pub(crate) fn command() -> Command {
    Cli::command()
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
enum InvocationError {
    /// The config file cannot be used.
    #[error(transparent)]
    File(#[from] ConfigFileError),
    /// The command line or the environment cannot be used, or help was asked for.
    #[error(transparent)]
    Usage(#[from] clap::Error),
}

/// What the process was told: by the command line, the environment and the config file.
struct Invocation {
    cli: Cli,
    matches: ArgMatches,
    /// The config file that was read.
    file: Option<PathBuf>,
    has_listen: bool,
}

impl Invocation {
    /// Finds the config file, if there is one, and reads them.
    fn read() -> Result<Self, InvocationError> {
        // Faults are shown below.
        let asked = command().ignore_errors(true).try_get_matches()?;
        let named = asked.get_one::<PathBuf>("config").cloned();
        let path = named.or_else(config_file::default_path);
        Self::with_file(path.filter(|_| !asked.get_flag("samples")))
    }

    /// Reads them again, from the same file: that one is missing now is no wish for the settings of another.
    fn read_again(&self) -> Result<Self, InvocationError> {
        Self::with_file(self.file.clone())
    }

    /// Reads them. The command line is over the environment, and that over the file.
    fn with_file(path: Option<PathBuf>) -> Result<Self, InvocationError> {
        let file = match &path {
            Some(path) => Some(ConfigFile::read(path, &command())?),
            None => None,
        };
        let settled = match &file {
            Some(file) => file.under(command()),
            None => command(),
        };
        let matches = settled.try_get_matches()?;
        let is_default = matches.value_source("listen") == Some(ValueSource::DefaultValue);
        Ok(Self {
            cli: Cli::from_arg_matches(&matches)?,
            matches,
            has_listen: !is_default || file.is_some_and(|file| file.sets("listen")),
            file: path,
        })
    }

    /// The flags that have other values here than there, with `_` for `-`.
    fn changes(&self, before: &Self) -> Vec<String> {
        let value = |matches: &ArgMatches, id: &str| -> Option<Vec<OsString>> {
            let values = matches.try_get_raw(id).ok()??;
            Some(values.map(ToOwned::to_owned).collect())
        };
        command()
            .get_arguments()
            .map(|flag| flag.get_id().as_str())
            .filter(|id| value(&self.matches, id) != value(&before.matches, id))
            .map(ToOwned::to_owned)
            .collect()
    }
}

/// Words that are parsed as `T`.
fn words<
    T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>
        + Clone
        + Send
        + Sync
        + 'static,
>(
    words: &'static [&'static str],
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(words).try_map(|word| word.parse::<T>())
}

impl Cli {
    fn options(&self) -> Options {
        let is_private = Options::is_private(self.listen, self.public_url.as_ref());
        let default_auth = if is_private {
            AuthMode::Open
        } else {
            AuthMode::Token
        };
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        Options {
            listen: self.listen,
            public_url: self.public_url.clone(),
            listen_http: self.listen_http,
            data: self.data.clone(),
            auth: self.auth.unwrap_or(default_auth),
            jwt: Some(JwtSettings {
                issuer: text(&self.jwt_issuer),
                audience: text(&self.jwt_audience),
                jwks_url: text(&self.jwt_jwks_url),
                secret: text(&self.jwt_secret),
            }),
            routing: self.routing,
            any_host: self.any_host,
            quotas: Quotas {
                life: self.max_connection_age,
                agents_of_one: self.max_agents_per_token,
                ..Quotas::default()
            },
            max_concurrent_requests: self.max_concurrent_requests,
            max_requests_per_second: self.max_requests_per_second,
            max_tunnel_ids_per_owner: self.max_tunnel_ids_per_owner,
            trusted_proxies: self.trust_proxy.clone(),
            admin: self.admin,
            admin_remote: self.admin_remote,
            metrics_per_tunnel: self.metrics_per_tunnel,
            access_log: self.access_log.clone().map(|path| AccessLogOptions {
                target: path.into(),
                format: self.access_log_format,
            }),
            ..Options::default()
        }
    }
}

impl Cli {
    /// Where certificates come from.
    fn tls(&self) -> Result<Option<TlsOptions>, OptionsError> {
        match (&self.tls_cert, &self.tls_key, &self.acme) {
            (None, None, None) => Ok(None),
            (Some(certificate), Some(key), None) => Ok(Some(TlsOptions::Files {
                certificate: certificate.clone(),
                key: key.clone(),
            })),
            (None, None, Some(contact)) => Ok(Some(TlsOptions::Acme(AcmeOptions {
                contact: contact.clone(),
                directory_url: self.acme_directory.clone(),
                authority: self.acme_ca.clone(),
                dns_hook: self.acme_dns_hook.clone(),
                data: self.data.clone().ok_or(OptionsError::NowhereToKeep)?,
            }))),
            (_, _, Some(_)) => Err(OptionsError::TwoSources),
            (_, _, None) => Err(OptionsError::HalfAPair),
        }
    }
}

fn connection_age(text: &str) -> Result<Duration, String> {
    let age = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    (age >= MIN_CONNECTION_AGE)
        .then_some(age)
        .ok_or_else(|| "must be at least 1s".to_owned())
}

/// An address to listen at. A port alone is one of this machine alone: that others can connect is said, and not left out.
fn address(text: &str) -> Result<SocketAddr, String> {
    let port = text
        .strip_prefix("localhost:")
        .or_else(|| text.strip_prefix(':'))
        .unwrap_or(text);
    match (text.parse(), port.parse::<u16>()) {
        (Ok(address), _) => Ok(address),
        (Err(_), Ok(port)) => Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
        _ => Err(
            "must be an IP address and a port, such as 0.0.0.0:8080 for every address of this machine, or a port alone for 127.0.0.1"
                .to_owned(),
        ),
    }
}

/// Reads a list of levels. `Targets` itself takes any word for a target's name, so that a typo would log all of nothing.
fn log_level(text: &str) -> Result<Targets, String> {
    let is_known = |directive: &str| {
        directive.contains('=') || directive.trim().parse::<LevelFilter>().is_ok()
    };
    if let Some(wrong) = text.split(',').find(|directive| !is_known(directive)) {
        return Err(format!(
            "`{wrong}` is not a level (error, warn, info, debug, trace, off) and not TARGET=LEVEL, such as local=debug or, for all of a target, local=trace"
        ));
    }
    text.parse().map_err(|error| format!("{error}"))
}

/// The executable's whole life. Not async, so that the compiler makes code of its futures here and not once more there.
pub fn main() -> ExitCode {
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &format!("cannot start: {error}")),
    };
    let code = runtime.block_on(run());
    // What was not stopped in time is not waited for.
    runtime.shutdown_background();
    code
}

async fn run() -> ExitCode {
    let invocation = match Invocation::read() {
        Ok(invocation) => invocation,
        Err(InvocationError::Usage(error)) => error.exit(),
        Err(InvocationError::File(error)) => return fail(2, &error),
    };
    let cli = &invocation.cli;
    match &cli.command {
        Some(OtherCommand::Health) => {
            // Whatever is wrong with the certificates, the server has said it.
            let is_https = !matches!(cli.tls(), Ok(None));
            return outcome(health::check(cli.listen, cli.admin, is_https).await);
        }
        Some(OtherCommand::Document(document)) => {
            return outcome(document.write(command()).map_err(Into::into));
        }
        None => {}
    }
    let log_level = start_log(cli.log_level.clone(), cli.log_format);
    let mut signals = match Signals::listen() {
        Ok(signals) => signals,
        Err(error) => return fail(1, &format!("cannot take signals: {error}")),
    };
    warn_of_few_files(cli.log_format);
    if cli.samples {
        let listen = invocation.has_listen.then_some(cli.listen);
        let stopped = async move {
            signals.next().await;
        };
        return outcome(sam_invoke::run(listen, stopped).await);
    }
    let started = match cli.tls() {
        Ok(tls) => {
            Server::start(Options {
                tls,
                ..cli.options()
            })
            .await
        }
        Err(error) => Err(error.into()),
    };
    let server = match started {
        Ok(server) => server,
        Err(ServerError::Options(error)) => Cli::command()
            .error(ErrorKind::ArgumentConflict, error)
            .exit(),
        Err(error) => return fail(1, &error),
    };
    if let Some(path) = &invocation.file {
        report(cli.log_format, &format!("config file: {}", path.display()));
    }
    announce(&server, cli.log_format);
    serve(server, invocation, &log_level, &mut signals).await
}

/// Serves until the process is to end, and reads the settings again whenever that is wished.
async fn serve(
    server: Server,
    started: Invocation,
    log_level: &LogLevel,
    signals: &mut Signals,
) -> ExitCode {
    let format = started.cli.log_format;
    let mut current = None;
    let has_access_log = matches!(&started.cli.access_log, Some(path) if path.as_os_str() != "-");
    // With neither a config file nor an access log, SIGHUP ends the process, as it does by default.
    while signals.next().await == Wish::Reload && (started.file.is_some() || has_access_log) {
        server.reopen_access_log();
        match started.read_again() {
            Ok(invocation) => {
                log_level.set(invocation.cli.log_level.clone());
                server.set_limits(&invocation.cli.options());
                let before = current.as_ref().unwrap_or(&started);
                report(format, &changed(&invocation, before, &started));
                current = Some(invocation);
            }
            Err(error) => report(format, &format!("not reloaded: {error}")),
        }
    }
    supervision::stopping();
    report(format, "stopping; press Ctrl-C again to stop now");
    let again = async { while signals.next().await == Wish::Reload {} };
    tokio::select! {
        () = server.stop() => ExitCode::SUCCESS,
        () = again => ExitCode::FAILURE,
    }
}

/// Says what has changed since the settings were last read, and what has since the start but needs a restart.
fn changed(now: &Invocation, before: &Invocation, started: &Invocation) -> String {
    let is_reloaded = |id: &String| RELOADED.contains(&id.as_str());
    let mut taken = now.changes(before);
    taken.retain(is_reloaded);
    let mut left = now.changes(started);
    left.retain(|id| !is_reloaded(id));
    let mut said = match &*taken {
        [] => "reloaded: nothing changed".to_owned(),
        taken => format!("reloaded: {} changed", taken.join(", ")),
    };
    if !left.is_empty() {
        said += &format!("; restart to change {}", left.join(", "));
    }
    said
}

/// Warns if the process may not open as many files as it may need.
fn warn_of_few_files(format: LogFormat) {
    let wanted = MAX_OPEN_CONNECTIONS as u64 + OTHER_OPEN_FILES;
    if let Some(limit) = raise_open_files(wanted) {
        let warning = format!(
            "warning: this process may open {limit} files; {MAX_OPEN_CONNECTIONS} connections need {wanted}. Raise the limit with ulimit -n or LimitNOFILE="
        );
        report(format, &warning);
    }
}

fn outcome(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(1, &format!("{error:#}")),
    }
}

/// Says where the server is, and how to open a tunnel.
fn announce(server: &Server, format: LogFormat) {
    let Server {
        public_url,
        endpoint,
        first_token,
        first_token_file,
        ..
    } = server;
    let say = |line: &str| report(format, line);
    if let Some(address) = server.admin_address {
        say(&format!("metrics, health and agents at http://{address}"));
    }
    let ready = format!("ready: visitors at {public_url}, agents at {endpoint}");
    supervision::ready(&ready);
    say(&ready);
    let token = match (first_token, first_token_file) {
        (Some(_), Some(file)) => {
            let file = file.display();
            say(&format!(
                "created the first agent token, in {file}, which only this user can read"
            ));
            format!("TTF_TOKEN=$(cat {file}) ")
        }
        (Some(token), None) => {
            say("created the first agent token; it is shown only this once:");
            format!("TTF_TOKEN={token} ")
        }
        (None, _) => String::new(),
    };
    say(&format!(
        "open a tunnel with: {token}ttf http 3000 --endpoint {endpoint}"
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_defaults_to_this_machine() {
        Cli::command().debug_assert();
        let parse = |arguments: &[&str]| {
            Cli::try_parse_from(std::iter::once(&"tunnel-local").chain(arguments))
                .expect("valid arguments")
                .options()
        };
        assert_eq!(parse(&[]).auth, AuthMode::Open);
        assert_eq!(parse(&["--listen", "0.0.0.0:80"]).auth, AuthMode::Token);
        assert_eq!(
            parse(&["--public-url", "https://t.example.com"]).auth,
            AuthMode::Token
        );
        assert_eq!(
            parse(&["--routing", "subdomain"]).routing,
            Routing::Subdomain
        );
        let tls = |arguments: &[&str]| {
            Cli::try_parse_from(std::iter::once(&"tunnel-local").chain(arguments))
                .expect("valid arguments")
                .tls()
        };
        assert_eq!(tls(&[]), Ok(None));
        assert_eq!(tls(&["--tls-cert", "c"]), Err(OptionsError::HalfAPair));
        assert_eq!(tls(&["--acme", "a@b.c"]), Err(OptionsError::NowhereToKeep));
        let both = [
            "--acme",
            "a@b.c",
            "--data",
            "d",
            "--tls-cert",
            "c",
            "--tls-key",
            "k",
        ];
        assert_eq!(tls(&both), Err(OptionsError::TwoSources));
        assert!(matches!(tls(&both[..4]), Ok(Some(TlsOptions::Acme(_)))));
        assert!(matches!(
            tls(&both[4..]),
            Ok(Some(TlsOptions::Files { .. }))
        ));
        for wrong in [
            ["--auth", "none"],
            ["--routing", "host"],
            ["--log-level", "x=y=z"],
            ["--log-level", "loud"],
            ["--log-level", "warn,debgu"],
            ["--listen", "0.0.0.0"],
            ["--listen", "example.com:80"],
            ["--listen", "99999"],
        ] {
            assert!(Cli::try_parse_from(["tunnel-local", wrong[0], wrong[1]]).is_err());
        }
    }

    #[test]
    fn a_port_alone_is_of_this_machine_alone() {
        for text in ["9000", ":9000", "localhost:9000", "127.0.0.1:9000"] {
            let listen =
                Cli::try_parse_from(["tunnel-local", "--listen", text]).map(|cli| cli.listen);
            let expected = SocketAddr::from((Ipv4Addr::LOCALHOST, 9000));
            assert_eq!(listen.ok(), Some(expected), "{text}");
        }
        for level in ["warn", "WARN", "off", "warn,local=debug"] {
            assert!(
                Cli::try_parse_from(["tunnel-local", "--log-level", level]).is_ok(),
                "{level}"
            );
        }
    }
}
