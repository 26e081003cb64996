//! The command line: flags with the environment, over the config files, over defaults.

use std::{
    collections::HashMap,
    ffi::OsString,
    path::{Path, PathBuf},
};

use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tunnel_config::ConfigFileError;
use tunnel_protocol::id::TunnelId;

use crate::{
    background::{Background, BackgroundCommand, BackgroundError, BackgroundOptions},
    config_command,
    config_file::ConfigFile,
    endpoint::Endpoint,
    inspector::InspectOptions,
    log_format::LogFormat,
    login::{Login, Logout},
    manual,
    proxy::ProxyChoice,
    settings::{Layer, LayerError, ProcessLayer, Settings},
    status::StatusSubject,
    target::Target,
    words,
};

const AFTER_HELP: &str = "\
`ttf 3000` is short for `ttf http 3000`.
The public URL is printed on stdout, one line for each tunnel; everything else goes to stderr.
Flags override environment variables, and those override the config files.

Exit codes: 0 stopped on request, 1 failed, 2 wrong usage or config, 3 token refused, 4 tunnel id taken,
5 replaced by another agent of the same owner, or the tunnel id was released,
6 the service is too old to enforce visitor rules.";

/// The log level if none is set.
const DEFAULT_LOG_LEVEL: &str = "warn";
/// The crates whose log level can be set by name.
const LOG_TARGETS: [&str; 7] = [
    "forwarder",
    "tunnel_protocol",
    "hyper",
    "hyper_util",
    "rustls",
    "tokio_tungstenite",
    "tungstenite",
];

/// Gives a local service a public URL.
#[derive(Debug, Parser)]
#[command(name = "ttf", version, after_help = AFTER_HELP, args_conflicts_with_subcommands = false)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Open one tunnel to an HTTP service
    Http {
        /// A port (3000), host:port, http(s)://host:port, unix:/path, or a directory whose files are served
        #[arg(id = "local_service", value_name = "TARGET")]
        target: Option<Target>,
    },
    /// Open tunnels from the config file
    Start {
        /// Open every tunnel of the file
        #[arg(long, conflicts_with = "names")]
        all: bool,
        /// The tunnels to open
        #[arg(value_name = "NAME")]
        names: Vec<String>,
    },
    /// Give up a tunnel id, so that anyone may claim it; the agent that serves it exits
    Release {
        /// The tunnel id
        #[arg(id = "released", value_name = "ID")]
        tunnel_id: TunnelId,
    },
    /// Try an endpoint and a token, and store them for every later start
    Login {
        /// The service's address, such as tunnel.example.com
        #[arg(id = "login_endpoint", value_name = "ENDPOINT")]
        endpoint: Option<Endpoint>,
    },
    /// Forget the stored endpoint and token, or with --service those of that name
    Logout,
    /// Find, check or edit the config file
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print how a tunnel is, as the service says
    Status {
        /// The tunnel's id, or its public URL
        #[arg(value_name = "TUNNEL")]
        tunnel: Option<StatusSubject>,
    },
    /// Ask the agent on this machine, at the address of its inspector, whether its tunnels are open; exits with 1 if not
    Health,
    /// Try every step from here to the service and to the local service, and say what is wrong
    Diagnose {
        /// A local service to try, if not that of the settings
        #[arg(id = "diagnosed", value_name = "TARGET")]
        target: Option<Target>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Keep the tunnels of the config file open in the background, also after a restart of the machine
    Service {
        #[command(subcommand)]
        command: BackgroundCommand,
        #[command(flatten)]
        options: BackgroundOptions,
    },
    /// Print a script that completes commands and flags
    #[command(visible_alias = "completion")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page, or write one for each command
    Man {
        /// Write the pages into this directory
        #[arg(long, value_name = "DIRECTORY")]
        directory: Option<PathBuf>,
    },
    /// Print the version
    Version,
    #[command(external_subcommand)]
    Unknown(Vec<OsString>),
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print where the config file is
    Path,
    /// Check the config files
    Check,
    /// Open the config file in an editor, and check it afterwards
    Edit {
        /// The editor
        #[arg(long, env = "VISUAL", value_name = "PROGRAM")]
        editor: Option<String>,
        /// The editor if VISUAL is not set
        #[arg(long, env = "EDITOR", hide = true)]
        default_editor: Option<String>,
    },
    #[command(external_subcommand)]
    Unknown(Vec<OsString>),
}

#[derive(Debug, Args)]
struct Options {
    #[command(flatten)]
    layer: Layer,
    #[command(flatten)]
    process: ProcessLayer,
    /// A config file in TOML, read over the one in its default place; may be repeated, and later files override earlier ones
    #[arg(short, long, global = true, env = "TTF_CONFIG", value_name = "FILE")]
    config: Vec<PathBuf>,
    /// Log more: -v what happens, -vv in detail; --log-level says it exactly
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

/// A command line with everything that belongs to it.
#[derive(Debug)]
pub(crate) struct Invocation {
    /// What is to be done.
    pub action: Action,
    /// What is logged.
    pub log: Targets,
    /// Whether a terminal shows the console.
    pub console: bool,
    /// What is inspected.
    pub inspect: InspectOptions,
    /// How lines look.
    pub format: LogFormat,
    /// Where they go, if not to stderr.
    pub destination: Option<PathBuf>,
    /// Only bad news are shown.
    pub is_quiet: bool,
    /// The config files that were read.
    pub files: Vec<PathBuf>,
}

/// What an invocation is to do.
#[derive(Debug)]
pub(crate) enum Action {
    /// Keep these tunnels open.
    Open(Vec<Settings>),
    /// Give up a tunnel id.
    Release(Box<Settings>, TunnelId),
    /// Store an endpoint and a token.
    Login(Box<Login>),
    /// Forget them.
    Logout(Logout),
    /// Print this.
    Print(String),
    /// Print this as it is.
    PrintDocument(Vec<u8>),
    /// Write manual pages into this directory.
    WriteManual(PathBuf),
    /// Open a file in an editor.
    Edit(config_command::Edit),
    /// Say how a tunnel is.
    Status(Box<Settings>, StatusSubject),
    /// Ask a running agent whether its tunnels are open.
    Health,
    /// Try every step.
    Diagnose {
        /// To this tunnel's service.
        settings: Box<Settings>,
        /// And to these local services.
        targets: Vec<Target>,
        /// For a program.
        json: bool,
    },
    /// Control the service of the system.
    Background(Background),
}

/// A command line or file that cannot be carried out; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UsageError {
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] ConfigFileError),
    /// Values are missing or cannot be used.
    #[error(transparent)]
    Settings(#[from] LayerError),
    /// Not a level, or a list of levels.
    #[error(
        "log_level: `{0}` is not a level (error, warn, info, debug, trace, off) and not TARGET=LEVEL, such as forwarder=debug; targets are {parts}",
        parts = LOG_TARGETS.join(", ")
    )]
    LogLevel(String),
    /// The directory of the user's files is not known.
    #[error(
        "there is no home directory, so the config file has no default place: pass one with --config"
    )]
    NoHome,
    /// No such service is stored.
    #[error("there is no service {name} in the config files; {known}")]
    UnknownService {
        /// The requested name.
        name: String,
        /// What there is.
        known: String,
    },
    /// `ttf login` without an endpoint.
    #[error("which service? `ttf login ENDPOINT`, such as `ttf login https://tunnel.example.com`")]
    NoLoginEndpoint,
    /// `ttf status` without a tunnel.
    #[error("which tunnel? `ttf status ID`, or its public URL in place of the id")]
    NoTunnel,
    /// The manual cannot be made.
    #[error("cannot write the manual: {0}")]
    Manual(std::io::Error),
    /// The service could not open a tunnel.
    #[error(transparent)]
    Background(BackgroundError),
    /// Not a command of `ttf config`.
    #[error(
        "there is no `ttf config {0}`; there are path, check and edit, and `ttf login ENDPOINT --token TOKEN` stores a token"
    )]
    ConfigCommand(String),
    /// The file is for `ttf start`.
    #[error("the config file has [tunnels]: open them with `ttf start --all` or `ttf start NAME`")]
    StartMissing,
    /// `ttf start` without a file that has tunnels.
    #[error(
        "`ttf start` needs a config file with [tunnels.NAME]: write one (`ttf config edit`), or pass one with --config"
    )]
    NoTunnels,
    /// `ttf start` without names.
    #[error("name the tunnels to start, or pass --all; the config file has: {0}")]
    NoNames(String),
    /// The file has no such tunnel.
    #[error("there is no tunnel {name} in the config file; it has: {known}")]
    UnknownName {
        /// The requested name.
        name: String,
        /// What there is.
        known: String,
    },
    /// One name twice on the command line.
    #[error("the tunnel {0} is named twice: name each once")]
    NamedTwice(String),
    /// A flag that only makes sense for one tunnel.
    #[error(
        "--tunnel-id and --target apply to a single tunnel: set them in the config file instead"
    )]
    ForOneTunnel,
    /// Two tunnels would take each other's place for ever.
    #[error(
        "the tunnels {first} and {second} have the same tunnel_id {tunnel_id}: give each a different one"
    )]
    SameTunnelId {
        /// One tunnel.
        first: String,
        /// The other.
        second: String,
        /// The id that both request.
        tunnel_id: TunnelId,
    },
}

impl Cli {
    /// Reads the command line and environment of the process. Exits if they are wrong or request help.
    pub(crate) fn from_process() -> Self {
        let arguments: Vec<OsString> = std::env::args_os().collect();
        words::read(&arguments).unwrap_or_else(|error| error.exit())
    }

    /// The words of a command that there is not.
    pub(crate) fn unknown_command(&self) -> Option<&[OsString]> {
        match &self.command {
            Some(Command::Unknown(words)) => Some(words),
            _ => None,
        }
    }

    /// Reads the config files, and puts all layers together. `default_file` is read if it exists.
    ///
    /// # Errors
    /// If something is missing, malformed or contradictory.
    pub(crate) fn invocation(
        self,
        default_file: Option<PathBuf>,
    ) -> Result<Invocation, UsageError> {
        let Self { command, options } = self;
        let files = options.files(default_file.as_deref());
        let verbose = options.verbose;
        let (action, process) = match command {
            Some(Command::Version) => (Action::Print(version()), options.process),
            Some(Command::Completions { shell }) => {
                (Action::PrintDocument(completions(shell)), options.process)
            }
            Some(Command::Man { directory: None }) => {
                let page = manual_page().map_err(UsageError::Manual)?;
                (Action::PrintDocument(page), options.process)
            }
            Some(Command::Man {
                directory: Some(directory),
            }) => (Action::WriteManual(directory), options.process),
            Some(Command::Config(command)) => {
                let action = command.action(&options.layer, &files, default_file)?;
                (action, options.process)
            }
            command => {
                let file = ConfigFile::read_all(&files)?;
                let process = options.process.or(&file.process);
                (options.action(command, &file, default_file)?, process)
            }
        };
        let level = process.log_level.as_deref();
        let log = log_filter(level.unwrap_or(match verbose {
            0 => DEFAULT_LOG_LEVEL,
            1 => "info",
            _ => "debug",
        }))?;
        Ok(Invocation {
            action,
            log,
            console: process.console.unwrap_or(true)
                && process.log.is_none()
                && process.log_format.is_none()
                && !process.quiet.unwrap_or(false),
            format: process.log_format.unwrap_or_default(),
            inspect: process.inspect(),
            destination: process.log,
            is_quiet: process.quiet.unwrap_or(false),
            files,
        })
    }
}

impl ConfigCommand {
    fn action(
        self,
        flags: &Layer,
        files: &[PathBuf],
        default_file: Option<PathBuf>,
    ) -> Result<Action, UsageError> {
        match self {
            Self::Path => {
                let path = default_file.ok_or(UsageError::NoHome)?;
                Ok(Action::Print(path.display().to_string()))
            }
            Self::Check => {
                let file = ConfigFile::read_all(files)?;
                if let Some(level) = file.process.log_level.as_deref() {
                    log_filter(level)?;
                }
                let tunnels = checked_tunnels(flags, &file)?;
                Ok(Action::Print(config_command::check(files, &file, &tunnels)))
            }
            Self::Edit {
                editor,
                default_editor,
            } => Ok(Action::Edit(config_command::Edit {
                editor: editor.or(default_editor),
                file: default_file.ok_or(UsageError::NoHome)?,
            })),
            Self::Unknown(words) => {
                let word = words
                    .first()
                    .map(|word| word.to_string_lossy().into_owned());
                Err(UsageError::ConfigCommand(word.unwrap_or_default()))
            }
        }
    }
}

impl Options {
    /// The config files, the later over the earlier ones.
    fn files(&self, default_file: Option<&Path>) -> Vec<PathBuf> {
        let default_file = default_file
            .filter(|file| file.exists())
            .map(Path::to_owned);
        default_file
            .into_iter()
            .chain(self.config.iter().cloned())
            .collect()
    }

    fn action(
        self,
        command: Option<Command>,
        file: &ConfigFile,
        default_file: Option<PathBuf>,
    ) -> Result<Action, UsageError> {
        let is_service = is_started_by_systemd().then_some(true);
        let flags = Layer {
            keep_trying: self.layer.keep_trying.or(is_service),
            ..self.layer
        };
        let one = |layer: &Layer, name| settings_of_one(layer, file, name);
        match command {
            Some(Command::Http { target }) => {
                Ok(Action::Open(vec![one(&flags.with_target(target), "http")?]))
            }
            Some(Command::Start { all, names }) => {
                Ok(Action::Open(start(&flags, all, names, file)?))
            }
            Some(Command::Release { tunnel_id }) => {
                let settings = one(&flags, "release")?;
                Ok(Action::Release(Box::new(settings), tunnel_id))
            }
            Some(Command::Login { endpoint }) => {
                let endpoint = endpoint.or(flags.endpoint.clone());
                login(Layer { endpoint, ..flags }, file, default_file)
            }
            Some(Command::Logout) => Ok(Action::Logout(Logout {
                service: stored_service(&flags, file)?,
                file: default_file.ok_or(UsageError::NoHome)?,
            })),
            Some(Command::Status { tunnel }) => {
                let settings = one(&flags, "status")?;
                let id = settings.tunnel_id.clone().map(StatusSubject::Id);
                let subject = tunnel.or(id).ok_or(UsageError::NoTunnel)?;
                Ok(Action::Status(Box::new(settings), subject))
            }
            Some(Command::Diagnose { target, json }) => {
                let flags = flags.with_target(target);
                Ok(Action::Diagnose {
                    settings: Box::new(one(&flags, "diagnose")?),
                    targets: diagnosed_targets(&flags, file),
                    json,
                })
            }
            Some(Command::Service { command, options }) => {
                let background = Background {
                    command,
                    options,
                    files: self.config,
                    loses_proxy: false,
                    default_file: default_file.filter(|file| file.exists()),
                };
                with_background(background, flags.proxy, file)
            }
            Some(Command::Health) => Ok(Action::Health),
            None if !file.tunnels.is_empty() && flags.target().is_none() => {
                Err(UsageError::StartMissing)
            }
            None => Ok(Action::Open(vec![one(&flags, "http")?])),
            Some(
                Command::Config(_)
                | Command::Version
                | Command::Completions { .. }
                | Command::Man { .. }
                | Command::Unknown(_),
            ) => unreachable!("these need no config file"),
        }
    }
}

/// Whether systemd has started this very process, and not one that it descends from (systemd.exec(5)).
fn is_started_by_systemd() -> bool {
    std::env::var_os("SYSTEMD_EXEC_PID")
        .is_some_and(|pid| pid == std::process::id().to_string().as_str())
}

/// The settings of a tunnel that has no table in the file.
fn settings_of_one(layer: &Layer, file: &ConfigFile, name: &str) -> Result<Settings, UsageError> {
    Ok(with_file(layer, &Layer::default(), file)?.settings(name)?)
}

/// Of the config files, only the way to the service counts: who the user is there is what a login is about.
fn login(
    flags: Layer,
    file: &ConfigFile,
    default_file: Option<PathBuf>,
) -> Result<Action, UsageError> {
    if flags.endpoint.is_none() {
        return Err(UsageError::NoLoginEndpoint);
    }
    let service = flags.service.as_ref();
    let stored = service.and_then(|service| file.services.get(service));
    let proxy = stored
        .and_then(|service| service.proxy.clone())
        .or_else(|| file.top.proxy.clone());
    let layer = Layer {
        proxy: flags.proxy.clone().or(proxy),
        ..flags.clone()
    };
    Ok(Action::Login(Box::new(Login {
        service: flags.service,
        endpoint_ca: flags.endpoint_ca,
        proxy: flags.proxy,
        settings: layer.settings("login")?,
        file: default_file.ok_or(UsageError::NoHome)?,
    })))
}

/// The local service that is named, or else those of the tunnels in the file.
fn diagnosed_targets(flags: &Layer, file: &ConfigFile) -> Vec<Target> {
    let named = flags.target();
    if named.is_some() || file.tunnels.is_empty() {
        return vec![named.or(file.top.target()).unwrap_or_default()];
    }
    let target = |tunnel: &Layer| tunnel.target().or(file.top.target());
    let targets = file.tunnels.values().map(target);
    targets.map(Option::unwrap_or_default).collect()
}

/// The service that is named, if one is; it must be there.
fn stored_service(flags: &Layer, file: &ConfigFile) -> Result<Option<String>, UsageError> {
    match &flags.service {
        Some(name) if !file.services.contains_key(name) => Err(unknown_service(name, file)),
        service => Ok(service.clone()),
    }
}

fn unknown_service(name: &str, file: &ConfigFile) -> UsageError {
    let known: Vec<&str> = file.services.keys().map(String::as_str).collect();
    UsageError::UnknownService {
        name: name.to_owned(),
        known: if known.is_empty() {
            format!("`ttf login ENDPOINT --service {name}` stores one")
        } else {
            format!("they have: {}", known.join(", "))
        },
    }
}

/// What is to be installed must have tunnels. It has neither these flags nor this environment.
fn with_background(
    background: Background,
    proxy: Option<ProxyChoice>,
    file: &ConfigFile,
) -> Result<Action, UsageError> {
    if background.command != BackgroundCommand::Install {
        return Ok(Action::Background(background));
    }
    if every_tunnel(&Layer::default(), file)?.is_empty() {
        return Err(UsageError::Background(BackgroundError::NoTunnels));
    }
    Ok(Action::Background(Background {
        loses_proxy: loses_proxy(proxy, file)?,
        ..background
    }))
}

/// Whether a tunnel's service is reached through a proxy that only this choice, of a flag, or the environment names.
fn loses_proxy(choice: Option<ProxyChoice>, file: &ConfigFile) -> Result<bool, UsageError> {
    let here = Layer {
        proxy: choice,
        ..Layer::default()
    };
    for (name, tunnel) in &file.tunnels {
        let names_none = with_file(&Layer::default(), tunnel, file)?.proxy.is_none();
        if names_none
            && with_file(&here, tunnel, file)?
                .settings(name)?
                .proxy
                .is_some()
        {
            return Ok(true);
        }
    }
    Ok(false)
}

fn version() -> String {
    format!("ttf {}", env!("CARGO_PKG_VERSION"))
}

fn completions(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "ttf", &mut script);
    script
}

/// The manual page ttf(1).
fn manual_page() -> std::io::Result<Vec<u8>> {
    let mut page = Vec::new();
    manual::page(Cli::command(), &mut page)?;
    Ok(page)
}

/// Writes the manual pages of all commands into a directory.
///
/// # Errors
/// If that is impossible.
pub(crate) fn write_manual(directory: &Path) -> std::io::Result<()> {
    manual::pages(Cli::command(), directory)
}

/// What the flags leave open, from a tunnel's table and what it takes from the rest of the file.
fn with_file(flags: &Layer, tunnel: &Layer, file: &ConfigFile) -> Result<Layer, UsageError> {
    let service = flags.service.as_deref().or(tunnel.service.as_deref());
    let defaults = file.defaults(service).ok_or_else(|| {
        let name = service.or(file.top.service.as_deref());
        unknown_service(name.unwrap_or_default(), file)
    })?;
    let layer = flags.with_credentials_for_endpoint(&tunnel.or(&defaults));
    // An endpoint that is given without a token has the one that is stored for it.
    let token = layer.token.clone().or_else(|| {
        let endpoint = layer.endpoint.as_ref()?;
        let mut stored = file.services.values().chain([&file.top]);
        stored
            .find(|stored| stored.endpoint.as_ref() == Some(endpoint))?
            .token
            .clone()
    });
    Ok(Layer { token, ..layer })
}

fn start(
    flags: &Layer,
    all: bool,
    names: Vec<String>,
    file: &ConfigFile,
) -> Result<Vec<Settings>, UsageError> {
    let known = || {
        let names: Vec<&str> = file.tunnels.keys().map(String::as_str).collect();
        names.join(", ")
    };
    if file.tunnels.is_empty() {
        return Err(UsageError::NoTunnels);
    }
    let names = if all {
        file.tunnels.keys().cloned().collect()
    } else {
        names
    };
    if names.is_empty() {
        return Err(UsageError::NoNames(known()));
    }
    if let Some(twice) = first_duplicate(&names) {
        return Err(UsageError::NamedTwice(twice.clone()));
    }
    if names.len() > 1
        && (flags.tunnel_id().is_some() || flags.target().is_some() || flags.url.is_some())
    {
        return Err(UsageError::ForOneTunnel);
    }
    // A tunnel id at the top is the one of `ttf http`: two tunnels cannot share it.
    let mut file = file.clone();
    file.top.tunnel_id = None;
    let mut tunnels = Vec::new();
    for name in names {
        let tunnel = file
            .tunnels
            .get(&name)
            .ok_or_else(|| UsageError::UnknownName {
                known: known(),
                name: name.clone(),
            })?;
        tunnels.push(with_file(flags, tunnel, &file)?.settings(&name)?);
    }
    check_tunnel_ids(&tunnels)?;
    Ok(tunnels)
}

/// Every tunnel of a file, checked.
fn every_tunnel(flags: &Layer, file: &ConfigFile) -> Result<Vec<Settings>, UsageError> {
    if file.tunnels.is_empty() {
        return Ok(Vec::new());
    }
    let flags = Layer {
        tunnel_id: None,
        target: None,
        url: None,
        ..flags.clone()
    };
    start(&flags, true, Vec::new(), file)
}

/// The tunnels that the files have for `ttf start`, or the one for `ttf http`. A file may leave its endpoint to others.
fn checked_tunnels(flags: &Layer, file: &ConfigFile) -> Result<Vec<Settings>, UsageError> {
    if !file.tunnels.is_empty() {
        return every_tunnel(flags, file);
    }
    match settings_of_one(flags, file, "http") {
        Ok(settings) => Ok(vec![settings]),
        Err(UsageError::Settings(LayerError::NoEndpoint)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn first_duplicate(names: &[String]) -> Option<&String> {
    let is_duplicate = |(at, name): &(usize, &String)| names[..*at].contains(name);
    names
        .iter()
        .enumerate()
        .find(is_duplicate)
        .map(|(_, name)| name)
}

fn check_tunnel_ids(tunnels: &[Settings]) -> Result<(), UsageError> {
    let mut seen = HashMap::new();
    for tunnel in tunnels {
        let Some(tunnel_id) = &tunnel.tunnel_id else {
            continue;
        };
        let key = (tunnel.endpoint.to_string(), tunnel_id);
        if let Some(first) = seen.insert(key, &tunnel.name) {
            return Err(UsageError::SameTunnelId {
                first: first.clone(),
                second: tunnel.name.clone(),
                tunnel_id: tunnel_id.clone(),
            });
        }
    }
    Ok(())
}

/// Reads a list of levels. `Targets` itself takes any word for a target's name, so that a typo would silence the log.
fn log_filter(text: &str) -> Result<Targets, UsageError> {
    text.split(',')
        .try_fold(Targets::new(), |filter, directive| {
            let fault = || UsageError::LogLevel(directive.to_owned());
            let level = |text: &str| match text.trim().to_ascii_lowercase().as_str() {
                "off" => Ok(LevelFilter::OFF),
                "error" => Ok(LevelFilter::ERROR),
                "warn" => Ok(LevelFilter::WARN),
                "info" => Ok(LevelFilter::INFO),
                "debug" => Ok(LevelFilter::DEBUG),
                "trace" => Ok(LevelFilter::TRACE),
                _ => Err(fault()),
            };
            let Some((target, of_target)) = directive.split_once('=') else {
                return Ok(filter.with_default(level(directive)?));
            };
            let target = target.trim();
            let krate = target.split("::").next().unwrap_or_default();
            if !LOG_TARGETS.contains(&krate) {
                return Err(fault());
            }
            Ok(filter.with_target(target, level(of_target)?))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{settings::AcceptedCertificates, tunnel_ids};

    fn parse(arguments: &[&str]) -> Result<Vec<Settings>, String> {
        let cli = Cli::try_parse_from([&["ttf"], arguments].concat()).expect("a command line");
        match cli.invocation(None) {
            Ok(Invocation {
                action: Action::Open(tunnels),
                ..
            }) => Ok(tunnels),
            Ok(other) => panic!("not tunnels: {other:?}"),
            Err(error) => Err(error.to_string()),
        }
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
    fn flags_override_the_file() {
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
    fn a_random_id_is_remembered_unless_remembering_is_off() {
        let arguments = ["-e", "ws://127.0.0.1:1"];
        let memory = |more: &[&str]| {
            parse(&[&arguments[..], more].concat()).expect("settings")[0]
                .memory
                .clone()
        };
        assert_eq!(memory(&[]), tunnel_ids::default_file());
        assert!(tunnel_ids::default_file().is_some_and(|file| file.ends_with("ttf/tunnels.toml")));
        assert_eq!(memory(&["--remember", "false"]), None);
        let file = file("remember = false\n");
        assert_eq!(
            memory(&["--config", file.path().to_str().expect("a path")]),
            None
        );
    }

    #[test]
    fn start_opens_the_named_tunnels() {
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
    fn visitor_rules_come_from_flags_or_the_file_and_errors_reveal_no_secret() {
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
            let Err(text) = parse(&[wrong, &["-e", "wss://x.example.com"]].concat()) else {
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
        let Err(text) = parse(&["http", "3000"]) else {
            panic!("settings without endpoint")
        };
        assert!(
            text.contains("--endpoint") && text.contains("TTF_ENDPOINT"),
            "{text}"
        );
    }

    #[test]
    fn a_tunnels_table_accepts_every_key_of_the_top_level() {
        let file = file(
            "endpoint = 'wss://x.example.com'\ntoken = 'top'\ncompression = true\ntarget_insecure = true\n\
             [tunnels.api]\nendpoint = 'wss://y.example.com'\ntoken = 'own'\ncompression = false\n\
             target_insecure = false\n[tunnels.web]\n",
        );
        let path = file.path().to_str().expect("a path");
        let tunnels = parse(&["start", "--all", "--config", path]).expect("settings");
        let of = |settings: &Settings| {
            let token = settings
                .token
                .as_ref()
                .map(|token| token.reveal().to_owned());
            (
                settings.endpoint.to_string(),
                token.unwrap_or_default(),
                settings.compression,
                settings.target_tls.clone(),
            )
        };
        assert_eq!(
            of(&tunnels[0]),
            (
                "wss://y.example.com/".to_owned(),
                "own".to_owned(),
                false,
                AcceptedCertificates::System
            )
        );
        assert_eq!(
            of(&tunnels[1]),
            (
                "wss://x.example.com/".to_owned(),
                "top".to_owned(),
                true,
                AcceptedCertificates::Insecure
            )
        );
        let insecure = parse(&["start", "api", "--target-insecure", "--config", path]);
        assert_eq!(
            insecure.expect("settings")[0].target_tls,
            AcceptedCertificates::Insecure
        );
    }

    #[test]
    fn tunnels_that_would_take_each_others_place_are_refused() {
        let file = file(
            "endpoint = 'wss://x.example.com'\n[tunnels.api]\ntunnel_id = 'one'\n\
             [tunnels.far]\nendpoint = 'wss://y.example.com'\ntunnel_id = 'one'\n\
             [tunnels.web]\ntunnel_id = 'one'\n",
        );
        let path = file.path().to_str().expect("a path");
        let start = |names: &[&str]| {
            parse(&[&["start", "--config", path], names].concat()).map(|tunnels| tunnels.len())
        };
        let twice = start(&["--all"]).expect_err("one tunnel id twice");
        assert!(
            twice.contains("api and web") && twice.contains("one"),
            "{twice}"
        );
        let named = start(&["web", "web"]).expect_err("one name twice");
        assert!(named.contains("web is named twice"), "{named}");
        assert_eq!(
            start(&["api", "far"]),
            Ok(2),
            "another service's ids are others"
        );
    }

    #[test]
    fn a_log_level_that_is_a_typo_is_refused() {
        for good in [
            "warn",
            "WARN",
            "off",
            "warn,forwarder=debug",
            "hyper::proto=trace",
        ] {
            assert!(log_filter(good).is_ok(), "{good}");
        }
        for bad in [
            "loud",
            "",
            "warn,",
            "forwarder=loud",
            "forwarderr=debug",
            "info,debgu",
        ] {
            assert!(log_filter(bad).is_err(), "{bad}");
        }
    }
}
