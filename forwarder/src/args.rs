//! The command line: flags with the environment, over the config files, over defaults.

mod error;
mod log_filter;
#[cfg(test)]
mod tests;
mod tunnels;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use tracing_subscriber::filter::Targets;
use tunnel_protocol::id::TunnelId;

pub(crate) use self::error::UsageError;
use self::{
    log_filter::log_filter,
    tunnels::{checked_tunnels, every_tunnel, settings_of_one, start, unknown_service, with_file},
};
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
    settings::{Layer, ProcessLayer, Settings},
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
        let flags = as_started(self.layer);
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

/// The flags, with what holds for a process that systemd has started unless they say otherwise.
fn as_started(flags: Layer) -> Layer {
    let is_service = is_started_by_systemd().then_some(true);
    Layer {
        keep_trying: flags.keep_trying.or(is_service),
        ..flags
    }
}

/// Whether systemd has started this very process, and not one that it descends from (systemd.exec(5)).
fn is_started_by_systemd() -> bool {
    std::env::var_os("SYSTEMD_EXEC_PID")
        .is_some_and(|pid| pid == std::process::id().to_string().as_str())
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
