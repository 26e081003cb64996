//! The command line: flags and environment, over the config file, over defaults; what is printed, and the exit codes.

use std::{
    collections::HashMap,
    io::Write,
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use etcetera::{BaseStrategy, choose_base_strategy};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::{filter::Targets, fmt, layer::SubscriberExt, util::SubscriberInitExt};
use tunnel_protocol::id::TunnelId;

use crate::{
    Observer,
    event::Event,
    handshake::{self, HandshakeError},
    settings::{
        DEFAULT_TARGET, Endpoint, File, FileTunnel, HostHeader, MAX_CONCURRENT, REQUEST_TIMEOUT,
        Secret, Settings, Target,
    },
    tunnel::TunnelError,
    tunnel_ids,
    visitor_rules::PolicyArgs,
};

const AFTER_HELP: &str = "\
The public URL is printed on stdout, one line for each tunnel; everything else goes to stderr.
Flags win over environment variables, and those over the config file.

Exit codes: 0 stopped on request, 1 failed, 2 wrong usage or config, 3 token refused, 4 tunnel id taken,
5 replaced by another agent of the same owner, or the tunnel id was released, 6 the service cannot keep visitors out.";

/// Gives a local service a public URL.
#[derive(Debug, Parser)]
#[command(name = "ttf", version, after_help = AFTER_HELP, args_conflicts_with_subcommands = false)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Open one tunnel to an HTTP service
    Http {
        /// A port (3000), host:port, or http(s)://host:port
        #[arg(id = "service", value_name = "TARGET")]
        target: Option<Target>,
    },
    /// Open tunnels of the config file
    Start {
        /// All of them
        #[arg(long, conflicts_with = "names")]
        all: bool,
        /// These
        #[arg(value_name = "NAME")]
        names: Vec<String>,
    },
    /// Give a tunnel id up, so that anybody may take it; the agent that serves it ends
    Release {
        /// The tunnel id
        #[arg(id = "released", value_name = "ID")]
        tunnel_id: TunnelId,
    },
}

#[derive(Debug, Args)]
struct Options {
    /// The service's WebSocket address: wss://..., or ws://127.0.0.1:8080/_ws for one on this machine
    #[arg(short, long, global = true, env = "TTF_ENDPOINT", value_name = "URL")]
    endpoint: Option<Endpoint>,
    /// The agent's token; better in the environment than on the command line
    #[arg(
        long,
        global = true,
        env = "TTF_TOKEN",
        hide_env_values = true,
        value_name = "TOKEN"
    )]
    token: Option<String>,
    /// The tunnel id to ask for; if none is given a random one, the same each time for the same endpoint and target
    #[arg(
        short = 's',
        long,
        global = true,
        env = "TTF_TUNNEL_ID",
        visible_alias = "subdomain",
        value_name = "ID"
    )]
    tunnel_id: Option<TunnelId>,
    /// The local service, if no command names it [default: 127.0.0.1:3000]
    #[arg(
        short = 'p',
        long,
        global = true,
        env = "TTF_TARGET",
        visible_alias = "port",
        value_name = "TARGET"
    )]
    target: Option<Target>,
    /// The Host the local service sees: rewrite (its own), preserve (the visitor's), or a host [default: rewrite]
    #[arg(long, global = true, env = "TTF_HOST_HEADER", value_name = "HOST")]
    host_header: Option<HostHeader>,
    /// How long the local service may take to start its response [default: 5m]
    #[arg(long, global = true, env = "TTF_REQUEST_TIMEOUT", value_parser = humantime::parse_duration, value_name = "TIME")]
    request_timeout: Option<Duration>,
    /// How many requests are passed on at once [default: 1024]
    #[arg(long, global = true, env = "TTF_MAX_CONCURRENT", value_name = "N")]
    max_concurrent: Option<usize>,
    /// Compress bodies between the service and this agent where it pays [default: true]
    #[arg(long, global = true, env = "TTF_COMPRESSION", value_name = "BOOL")]
    compression: Option<bool>,
    #[command(flatten)]
    rules: PolicyArgs,
    /// Remember a random tunnel id for the next start [default: true]
    #[arg(long, global = true, env = "TTF_REMEMBER", value_name = "BOOL")]
    remember: Option<bool>,
    /// A config file in TOML
    #[arg(short, long, global = true, env = "TTF_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// What is logged on stderr: error, warn, info, debug, or a list such as warn,forwarder=debug [default: warn]
    #[arg(long, global = true, env = "TTF_LOG_LEVEL", value_name = "LEVEL")]
    log_level: Option<String>,
}

/// A command line or file that cannot be carried out; the text says what to do.
#[derive(Debug, PartialEq)]
pub struct Usage(String);

impl Cli {
    /// The tunnel id that is to be given up, where that is what the command is.
    fn released(&self) -> Option<TunnelId> {
        match &self.command {
            Some(Command::Release { tunnel_id }) => Some(tunnel_id.clone()),
            _ => None,
        }
    }

    /// The tunnels to open, or the one to release, and the log's filter.
    ///
    /// # Errors
    /// When something is missing or contradicts.
    pub fn settings(self) -> Result<(Vec<Settings>, String), Usage> {
        let file = match &self.options.config {
            Some(path) => File::read(path).map_err(|error| Usage(error.to_string()))?,
            None => File::default(),
        };
        let log_level = self
            .options
            .log_level
            .clone()
            .or(file.log_level.clone())
            .unwrap_or_else(|| "warn".to_owned());
        let single = |target: Option<Target>| {
            let tunnel = FileTunnel {
                target: file.target.clone(),
                tunnel_id: file.tunnel_id.clone(),
                ..FileTunnel::default()
            };
            self.options
                .settings("http", target, &tunnel, &file)
                .map(|settings| vec![settings])
        };
        let tunnels = match &self.command {
            Some(Command::Http { target }) => single(target.clone())?,
            Some(Command::Start { all, names }) => self.options.start(*all, names, &file)?,
            Some(Command::Release { tunnel_id }) => {
                let settings =
                    self.options
                        .settings("release", None, &FileTunnel::default(), &file)?;
                vec![Settings {
                    tunnel_id: Some(tunnel_id.clone()),
                    ..settings
                }]
            }
            None if !file.tunnels.is_empty() => {
                return Err(Usage("the config file has [tunnels]: open them with `ttf start --all` or `ttf start NAME`".to_owned()));
            }
            None => single(None)?,
        };
        Ok((tunnels, log_level))
    }
}

impl Options {
    fn start(&self, all: bool, names: &[String], file: &File) -> Result<Vec<Settings>, Usage> {
        let known = || {
            file.tunnels
                .keys()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join(", ")
        };
        if file.tunnels.is_empty() {
            return Err(Usage(
                "`ttf start` needs a config file with [tunnels.NAME]: pass it with --config"
                    .to_owned(),
            ));
        }
        if !all && names.is_empty() {
            return Err(Usage(format!(
                "name the tunnels to start, or pass --all; the config file has: {}",
                known()
            )));
        }
        let chosen: Vec<&String> = if all {
            file.tunnels.keys().collect()
        } else {
            names.iter().collect()
        };
        if chosen.len() > 1 && (self.tunnel_id.is_some() || self.target.is_some()) {
            return Err(Usage(
                "--tunnel-id and --target are for one tunnel: put them into the config file"
                    .to_owned(),
            ));
        }
        chosen
            .into_iter()
            .map(|name| {
                let tunnel = file.tunnels.get(name).ok_or_else(|| {
                    Usage(format!(
                        "there is no tunnel {name} in the config file; it has: {}",
                        known()
                    ))
                })?;
                self.settings(name, None, tunnel, file)
            })
            .collect()
    }

    fn settings(
        &self,
        name: &str,
        target: Option<Target>,
        tunnel: &FileTunnel,
        file: &File,
    ) -> Result<Settings, Usage> {
        let endpoint = self.endpoint.clone().or(file.endpoint.clone()).ok_or_else(|| {
            Usage("no endpoint: pass --endpoint, set TTF_ENDPOINT, or put `endpoint` into the config file (ws://127.0.0.1:8080/_ws is tunnel-local's)".to_owned())
        })?;
        let max_concurrent = self
            .max_concurrent
            .or(tunnel.max_concurrent)
            .or(file.max_concurrent)
            .unwrap_or(MAX_CONCURRENT);
        if max_concurrent == 0 {
            return Err(Usage("max_concurrent must be at least 1".to_owned()));
        }
        Ok(Settings {
            name: name.to_owned(),
            endpoint,
            token: self.token.clone().map(Secret::from).or(file.token.clone()),
            tunnel_id: self.tunnel_id.clone().or(tunnel.tunnel_id.clone()),
            memory: memory_file().filter(|_| self.remember.or(file.remember).unwrap_or(true)),
            target: target
                .or(self.target.clone())
                .or(tunnel.target.clone())
                .or(file.target.clone())
                .unwrap_or_else(|| DEFAULT_TARGET.parse().expect("the default is a target")),
            host_header: self
                .host_header
                .clone()
                .or(tunnel.host_header.clone())
                .or(file.host_header.clone())
                .unwrap_or_default(),
            request_timeout: self
                .request_timeout
                .or(tunnel.request_timeout)
                .or(file.request_timeout)
                .unwrap_or(REQUEST_TIMEOUT),
            max_concurrent,
            compression: self.compression.or(file.compression).unwrap_or(true),
            access: self
                .rules
                .or(&tunnel.rules())
                .or(&file.rules())
                .check()
                .map_err(|fault| Usage(fault.to_string()))?,
        })
    }
}

/// The file of [`crate::tunnel_ids`]. A user without a home remembers nothing.
fn memory_file() -> Option<PathBuf> {
    Some(
        choose_base_strategy()
            .ok()?
            .config_dir()
            .join("ttf")
            .join("tunnels.toml"),
    )
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
    let released = cli.released();
    let (tunnels, log_level) = match cli.settings() {
        Ok(settings) => settings,
        Err(Usage(text)) => return fail(2, &text),
    };
    let filter = match log_level.parse::<Targets>() {
        Ok(filter) => filter,
        Err(error) => return fail(2, &format!("log_level {log_level}: {error}")),
    };
    tracing_subscriber::registry()
        .with(fmt::layer().with_writer(std::io::stderr))
        .with(filter)
        .init();
    if let (Some(tunnel_id), [settings]) = (&released, &tunnels[..]) {
        return release(settings, tunnel_id).await;
    }
    let stop = CancellationToken::new();
    let name_tunnels = tunnels.len() > 1;
    let printed = Mutex::new(HashMap::new());
    let observer: Observer = Arc::new(move |name, event| {
        if let Event::Online { public_url, .. } = &event
            && printed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(name.to_owned(), public_url.clone())
                .as_ref()
                != Some(public_url)
        {
            // Nobody reading stdout is no reason to close the tunnel.
            let _ = writeln!(std::io::stdout(), "{}", clean(public_url))
                .and_then(|()| std::io::stdout().flush());
        }
        show(name_tunnels.then_some(name), &event);
    });
    let mut run = std::pin::pin!(crate::run(tunnels, observer, stop.clone()));
    let outcome = tokio::select! {
        outcome = &mut run => outcome,
        () = interrupted() => {
            stop.cancel();
            tokio::select! {
                outcome = &mut run => outcome,
                // A second signal ends at once.
                () = interrupted() => return ExitCode::FAILURE,
            }
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(code(&failure), &failure.to_string()),
    }
}

async fn release(settings: &Settings, tunnel_id: &TunnelId) -> ExitCode {
    let existed = match handshake::release(settings, tunnel_id).await {
        Ok(existed) => existed,
        Err(HandshakeError::NameTaken) => {
            return fail(
                4,
                &format!(
                    "the tunnel id {tunnel_id} belongs to somebody else: only its owner can release it"
                ),
            );
        }
        Err(HandshakeError::Unauthorized) => {
            return fail(
                code(&TunnelError::Unauthorized),
                &TunnelError::Unauthorized.to_string(),
            );
        }
        Err(HandshakeError::Unprotected) => {
            return fail(
                code(&TunnelError::Unprotected),
                &TunnelError::Unprotected.to_string(),
            );
        }
        Err(HandshakeError::Invalid(said)) => {
            return fail(2, &TunnelError::Invalid(said).to_string());
        }
        Err(HandshakeError::Unreachable(reason)) => return fail(1, &reason),
    };
    if let Some(file) = &settings.memory {
        tunnel_ids::forget(file, &settings.endpoint, tunnel_id).await;
    }
    let done = if existed {
        "is released: anybody may take it now"
    } else {
        "was nobody's: there was nothing to release"
    };
    let _ = writeln!(std::io::stdout(), "{tunnel_id} {done}");
    ExitCode::SUCCESS
}

fn code(failure: &TunnelError) -> u8 {
    match failure {
        TunnelError::Invalid(_) => 2,
        TunnelError::Unauthorized => 3,
        TunnelError::NameTaken(_) => 4,
        TunnelError::Replaced(_) => 5,
        TunnelError::Unprotected => 6,
    }
}

fn fail(code: u8, text: &str) -> ExitCode {
    say(&format!("error: {text}"));
    ExitCode::from(code)
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

fn show(name: Option<&str>, event: &Event) {
    let name = name.map(|name| format!("[{name}] ")).unwrap_or_default();
    match event {
        Event::Connecting { endpoint } => say(&format!("{name}connecting to {endpoint}")),
        Event::Online { public_url, target } => {
            say(&format!("{name}online: {public_url} -> {target}"));
        }
        Event::Reconnecting {
            reason,
            pause,
            attempt,
        } => {
            say(&format!(
                "{name}offline: {reason}; reconnecting in {:.1} s (attempt {attempt})",
                pause.as_secs_f64()
            ));
        }
        Event::Request {
            method,
            uri,
            outcome,
            bytes,
            took,
        } => {
            let outcome = match outcome {
                Ok(status) => status.as_u16().to_string(),
                Err(reason) => format!("failed: {reason}"),
            };
            say(&format!(
                "{name}{method} {uri} {outcome} {} {} ms",
                size(*bytes),
                took.as_millis()
            ));
        }
        Event::Draining { in_flight: 0 } => say(&format!("{name}stopping")),
        Event::Draining { in_flight } => say(&format!(
            "{name}stopping once {in_flight} requests have finished; again to stop now"
        )),
    }
}

/// Writes a line to stderr.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{}", clean(line));
}

/// A text without what could steer a terminal.
fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && c != '\n' { '?' } else { c })
        .collect()
}

#[expect(clippy::cast_precision_loss, reason = "a rounded figure for people")]
fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} kB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MB", bytes as f64 / 1_048_576.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Vec<Settings>, Usage> {
        let cli = Cli::try_parse_from([&["ttf"], arguments].concat()).expect("a command line");
        cli.settings().map(|(tunnels, _)| tunnels)
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("written");
        file
    }

    #[test]
    fn the_bare_command_tunnels_port_3000() {
        let tunnels = parse(&[
            "--endpoint",
            "ws://127.0.0.1:1/_ws",
            "--tunnel-id",
            "my-app",
        ])
        .expect("settings");
        assert_eq!(tunnels[0].target.to_string(), "http://127.0.0.1:3000");
        assert_eq!(
            tunnels[0].tunnel_id.as_ref().map(TunnelId::as_str),
            Some("my-app")
        );
    }

    #[test]
    fn flags_win_over_the_file() {
        let file =
            file("endpoint = 'wss://file.example.com'\ntarget = 1\ntunnel_id = 'from-file'\n");
        let path = file.path().to_str().expect("a path");
        let from_file = parse(&["--config", path]).expect("settings");
        assert_eq!(from_file[0].target.to_string(), "http://127.0.0.1:1");
        let from_flags = parse(&[
            "http",
            "2",
            "--config",
            path,
            "-e",
            "wss://flag.example.com",
        ])
        .expect("settings");
        assert_eq!(
            from_flags[0].endpoint.to_string(),
            "wss://flag.example.com/"
        );
        assert_eq!(from_flags[0].target.to_string(), "http://127.0.0.1:2");
        assert_eq!(
            from_flags[0].tunnel_id.as_ref().map(TunnelId::as_str),
            Some("from-file")
        );
    }

    #[test]
    fn a_random_id_is_remembered_unless_that_is_switched_off() {
        let arguments = ["-e", "ws://127.0.0.1:1"];
        let memory = |more: &[&str]| {
            parse(&[&arguments[..], more].concat()).expect("settings")[0]
                .memory
                .clone()
        };
        assert!(memory(&[]).is_none_or(|file| file.ends_with("ttf/tunnels.toml")));
        assert_eq!(memory(&["--remember", "false"]), None);
        let file = file("remember = false\n");
        assert_eq!(
            memory(&["--config", file.path().to_str().expect("a path")]),
            None
        );
    }

    #[test]
    fn start_opens_the_tunnels_it_is_told_to() {
        let file = file(
            "endpoint = 'wss://x.example.com'\n[tunnels.api]\ntarget = 1\n[tunnels.web]\ntarget = 2\n",
        );
        let path = file.path().to_str().expect("a path");
        let names = |arguments: &[&str]| {
            parse(arguments).map(|tunnels| {
                tunnels
                    .into_iter()
                    .map(|tunnel| tunnel.name)
                    .collect::<Vec<_>>()
            })
        };
        assert_eq!(
            names(&["start", "--all", "--config", path]),
            Ok(vec!["api".to_owned(), "web".to_owned()])
        );
        assert_eq!(
            names(&["start", "web", "--config", path]),
            Ok(vec!["web".to_owned()])
        );
        for wrong in [
            &["start", "--config", path][..],
            &["start", "nope", "--config", path],
            &["--config", path],
            &["start", "--all", "-s", "one", "--config", path],
        ] {
            assert!(names(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_target_may_be_a_flag() {
        for arguments in [&["-p", "2"][..], &["http", "--target", "2"], &["http", "2"]] {
            let tunnels =
                parse(&[arguments, &["-e", "ws://127.0.0.1:1"]].concat()).expect("settings");
            assert_eq!(
                tunnels[0].target.to_string(),
                "http://127.0.0.1:2",
                "{arguments:?}"
            );
        }
    }

    #[test]
    fn rules_about_visitors_come_from_flags_or_the_file_and_faults_tell_no_secret() {
        let file = file(
            "endpoint = 'wss://x.example.com'\nbasic_auth = ['all:swordfish']\n\
             [tunnels.api]\nbasic_auth = []\nallow = ['192.0.2.0/24']\n[tunnels.web]\nrequire_header = ['x-key: swordfish']\n",
        );
        let path = file.path().to_str().expect("a path");
        let rules = |arguments: &[&str]| {
            let tunnels = parse(&[arguments, &["--config", path]].concat()).expect("settings");
            let access = tunnels[0]
                .access
                .for_one_connection()
                .expect("rules")
                .to_json();
            ["basic", "headers", "allow", "deny"]
                .map(|kind| access[kind].as_array().map_or(0, Vec::len))
        };
        assert_eq!(rules(&["start", "api"]), [0, 0, 1, 0]);
        assert_eq!(rules(&["start", "web"]), [1, 1, 0, 0]);
        assert_eq!(
            rules(&[
                "start",
                "web",
                "--basic-auth",
                "a:b",
                "--basic-auth",
                "c:d",
                "--deny",
                "::1,::2"
            ]),
            [2, 1, 0, 2]
        );
        let none = parse(&["-e", "wss://x.example.com"]).expect("settings");
        assert!(none[0].access.is_empty());

        for wrong in [
            &["--basic-auth", "swordfish"][..],
            &["--require-header", "swordfish"],
            &["--require-header", "host: swordfish"],
        ] {
            let Err(Usage(text)) = parse(&[wrong, &["-e", "wss://x.example.com"]].concat()) else {
                panic!("accepted: {wrong:?}")
            };
            assert!(
                text.contains("basic_auth") || text.contains("require_header"),
                "{text}"
            );
            assert!(!text.contains("sword"), "{text}");
        }
    }

    #[test]
    fn a_missing_endpoint_is_named() {
        let Err(Usage(text)) = parse(&["http", "3000"]) else {
            panic!("settings without endpoint")
        };
        assert!(
            text.contains("--endpoint") && text.contains("TTF_ENDPOINT"),
            "{text}"
        );
    }
}
