//! The executable's life: start, signals, end, and the codes that it ends with.

use std::{
    convert::Infallible,
    fs::File,
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    runtime::Runtime,
    task::{JoinSet, spawn_blocking},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use tracing_subscriber::{
    Layer, filter::Targets, fmt, layer::SubscriberExt, util::SubscriberInitExt,
};
use tunnel_protocol::id::TunnelId;

use crate::{
    Observer,
    args::{self, Action, Cli, Invocation},
    config_command, config_file,
    console::Console,
    diagnose,
    display::{Display, LineStyle, Lines},
    handshake::{self, HandshakeError},
    health,
    inspector::{InspectOptions, Inspector},
    log_format::{self, LocalTime, LogFormat},
    login::{self, LoginError},
    settings::Settings,
    status::{self, StatusError},
    supervision::{self, Supervision},
    tunnel::TunnelError,
    tunnel_ids,
};

/// How long the last lines may take to be read.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// Fewer open files than this are too few for [`crate::settings::MAX_CONCURRENT`] requests, each with a connection.
const MIN_OPEN_FILES: u64 = 2048;

/// How the executable ends; the numbers are its exit codes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Exit {
    Stopped = 0,
    Failed = 1,
    Usage = 2,
    Unauthorized = 3,
    NameTaken = 4,
    Replaced = 5,
    Unprotected = 6,
}

impl From<&TunnelError> for Exit {
    fn from(error: &TunnelError) -> Self {
        match error {
            TunnelError::Invalid(_) => Self::Usage,
            TunnelError::Misdirected(_) => Self::Failed,
            TunnelError::Unauthorized => Self::Unauthorized,
            TunnelError::NameTaken(_) => Self::NameTaken,
            TunnelError::Replaced(_) => Self::Replaced,
            TunnelError::Unprotected => Self::Unprotected,
        }
    }
}

/// Why the executable ends otherwise than as asked.
struct ExitFailure {
    exit: Exit,
    /// Empty if there is nothing left to say.
    text: String,
    /// Further lines.
    details: Vec<String>,
}

impl ExitFailure {
    fn new(exit: Exit, text: &impl ToString) -> Self {
        Self {
            exit,
            text: text.to_string(),
            details: Vec::new(),
        }
    }

    /// Says what is left to say.
    fn report(&mut self, lines: &Lines, format: LogFormat) {
        let text = std::mem::take(&mut self.text);
        if text.is_empty() {
            return;
        }
        match format {
            LogFormat::Json => {
                let fields = json!({ "error": text, "exit_code": self.exit as u8 });
                lines.push(&log_format::line("ERROR", "exit", fields));
            }
            LogFormat::Text => lines.line(&format!("{} error: {text}", LocalTime::now())),
            LogFormat::Plain => lines.line(&format!("error: {text}")),
        }
        for detail in self.details.drain(..) {
            lines.line(&detail);
        }
    }

    /// A fault in what the user has written, which may take several lines: none of them is another party's.
    fn usage(error: &impl ToString) -> Self {
        let text = error.to_string();
        let mut lines = text.lines().map(str::to_owned);
        Self {
            exit: Exit::Usage,
            text: lines.next().unwrap_or_default(),
            details: lines.collect(),
        }
    }
}

impl From<LoginError> for ExitFailure {
    fn from(error: LoginError) -> Self {
        match error {
            LoginError::Handshake(error) => {
                let failure = Self::from(error);
                Self {
                    text: format!("nothing is stored: {}", failure.text),
                    ..failure
                }
            }
            LoginError::NoToken => Self::new(Exit::Unauthorized, &error),
            other => Self::new(Exit::Failed, &other),
        }
    }
}

impl From<StatusError> for ExitFailure {
    fn from(error: StatusError) -> Self {
        match error {
            StatusError::Handshake(error) => error.into(),
            StatusError::NoWebAddress(_) => Self::new(Exit::Usage, &error),
            StatusError::Unknown(_) | StatusError::Status(_) => failed(&error),
        }
    }
}

impl From<HandshakeError> for ExitFailure {
    fn from(error: HandshakeError) -> Self {
        match error {
            HandshakeError::Unauthorized => TunnelError::Unauthorized.into(),
            HandshakeError::Unprotected => TunnelError::Unprotected.into(),
            HandshakeError::Invalid(reason) => TunnelError::Invalid(reason).into(),
            HandshakeError::NameTaken => TunnelError::NameTaken(String::new()).into(),
            HandshakeError::Misdirected(reason) | HandshakeError::Unreachable(reason) => {
                Self::new(Exit::Failed, &reason)
            }
        }
    }
}

impl From<TunnelError> for ExitFailure {
    fn from(error: TunnelError) -> Self {
        Self::new(Exit::from(&error), &error)
    }
}

/// The executable's whole life. Not async, so that the compiler makes code of its futures here and not once more there.
pub fn main() -> ExitCode {
    let cli = Cli::from_process();
    let stdout = Lines::to(io::stdout());
    let stderr = Lines::to(io::stderr());
    let exit = match run(cli, &stdout, &stderr) {
        Ok(()) => Exit::Stopped,
        Err(mut failure) => {
            failure.report(&stderr, LogFormat::Plain);
            failure.exit
        }
    };
    stdout.flush(FLUSH_TIMEOUT);
    stderr.flush(FLUSH_TIMEOUT);
    ExitCode::from(exit as u8)
}

fn run(cli: Cli, stdout: &Lines, stderr: &Lines) -> Result<(), ExitFailure> {
    let Invocation {
        action,
        log,
        console,
        format,
        destination,
        is_quiet,
        files,
        inspect,
    } = cli
        .invocation(config_file::default_path())
        .map_err(|error| ExitFailure::usage(&error))?;
    let cannot_start = |error| ExitFailure::new(Exit::Failed, &format!("cannot start: {error}"));
    let runtime = Runtime::new().map_err(cannot_start)?;
    let console = match &action {
        Action::Open(tunnels) if console && Console::is_possible() => {
            // A terminal that cannot be controlled gets lines.
            Console::open(tunnels.iter().map(|tunnel| tunnel.name.clone())).ok()
        }
        _ => None,
    };
    let lines = destination.as_deref().map_or_else(
        || Ok(stderr.clone()),
        |destination| log_lines(destination, stdout, stderr),
    )?;
    let logged = console.as_ref().map_or_else(|| lines.clone(), Console::log);
    log_to(logged, log, format);
    raise_open_files();
    let output = Output {
        stdout: stdout.clone(),
        stderr: lines.clone(),
        console,
        format,
        is_quiet,
    };
    let mut outcome = runtime.block_on(act(action, &files, &inspect, output));
    if let Err(failure) = &mut outcome {
        failure.report(&lines, format);
    }
    lines.flush(FLUSH_TIMEOUT);
    // A look-up of a name cannot be cancelled, and may hang for as long as the network is away.
    runtime.shutdown_background();
    outcome
}

/// Where what a user sees goes.
struct Output {
    stdout: Lines,
    stderr: Lines,
    console: Option<Console>,
    format: LogFormat,
    is_quiet: bool,
}

/// Opens tunnels, after it has said where their settings are from.
async fn open_with(
    tunnels: Vec<Settings>,
    files: &[PathBuf],
    inspect: &InspectOptions,
    output: Output,
) -> Result<(), ExitFailure> {
    let Output {
        stdout,
        stderr,
        console,
        format,
        is_quiet,
    } = output;
    let style = LineStyle {
        format,
        is_quiet,
        names_tunnels: tunnels.len() > 1,
    };
    if !files.is_empty() {
        let log = console
            .as_ref()
            .map_or_else(|| stderr.clone(), Console::log);
        let names: Vec<String> = files
            .iter()
            .map(|file| file.display().to_string())
            .collect();
        let text = format!("config: {}", names.join(", "));
        say(&log, style, "config", &text, json!({ "files": names }));
    }
    let display = Display::new(stdout, stderr.clone(), style);
    open(tunnels, inspect, display, (&stderr, style), console).await
}

async fn act(
    action: Action,
    files: &[PathBuf],
    inspect: &InspectOptions,
    output: Output,
) -> Result<(), ExitFailure> {
    let stdout = output.stdout.clone();
    match action {
        Action::Open(tunnels) => {
            return open_with(tunnels, files, inspect, output).await;
        }
        Action::Release(settings, tunnel_id) => {
            stdout.line(&release(&settings, &tunnel_id).await?);
        }
        Action::Login(login) => stdout.line(&login::login(*login).await?),
        Action::Logout(logout) => stdout.line(&login::logout(&logout)?),
        Action::Print(text) => text.lines().for_each(|line| stdout.line(line)),
        Action::PrintDocument(document) => {
            // A reader who has seen enough, such as `head`, is no failure.
            let _ = io::stdout().write_all(&document);
        }
        Action::WriteManual(directory) => {
            args::write_manual(&directory).map_err(|error| failed(&error))?;
        }
        Action::Edit(edit) => {
            let edited = config_command::edit(&edit);
            stdout.line(&edited.map_err(|error| ExitFailure::usage(&error))?);
        }
        Action::Status(settings, subject) => {
            stdout.line(&status::status(&settings, subject).await?);
        }
        Action::Health => {
            let state = health::check(&inspect.address).await;
            stdout.line(state.map_err(|error| failed(&error))?);
        }
        Action::Diagnose {
            settings,
            targets,
            json,
        } => {
            let diagnosis = diagnose::diagnose(&settings, &targets).await;
            if json {
                stdout.line(&diagnosis.to_json().to_string());
            } else {
                diagnosis
                    .to_lines()
                    .iter()
                    .for_each(|line| stdout.line(line));
            }
            if !diagnosis.is_good() {
                return Err(failed(&""));
            }
        }
        Action::Background(background) => {
            stdout.line(&background.run().map_err(|error| failed(&error))?);
        }
    }
    Ok(())
}

/// Says something about the process, once it has started well.
fn say(lines: &Lines, style: LineStyle, kind: &str, text: &str, fields: Value) {
    match style.format {
        _ if style.is_quiet => {}
        LogFormat::Json => lines.push(&log_format::line("INFO", kind, fields)),
        LogFormat::Text => lines.line(&format!("{} {text}", LocalTime::now())),
        LogFormat::Plain => lines.line(text),
    }
}

/// Where `--log` sends lines.
fn log_lines(destination: &Path, stdout: &Lines, stderr: &Lines) -> Result<Lines, ExitFailure> {
    match destination.to_str() {
        Some("stderr" | "-") => Ok(stderr.clone()),
        Some("stdout") => Ok(stdout.clone()),
        Some("none" | "false") => Ok(Lines::to(io::sink())),
        _ => {
            let file = File::options().append(true).create(true).open(destination);
            let fault = |error| {
                let destination = destination.display();
                ExitFailure::new(
                    Exit::Usage,
                    &format!("log: cannot write {destination}: {error}"),
                )
            };
            file.map(Lines::to).map_err(fault)
        }
    }
}

fn log_to(lines: Lines, filter: Targets, format: LogFormat) {
    let layer = fmt::layer().with_ansi(false).with_writer(lines);
    let layer = match format {
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
        LogFormat::Plain | LogFormat::Text => layer.with_timer(LocalTime).boxed(),
    };
    tracing_subscriber::registry()
        .with(layer)
        .with(filter)
        .init();
}

fn failed(error: &impl ToString) -> ExitFailure {
    ExitFailure::new(Exit::Failed, error)
}

async fn open(
    tunnels: Vec<Settings>,
    inspect: &InspectOptions,
    display: Display,
    (stderr, style): (&Lines, LineStyle),
    console: Option<Console>,
) -> Result<(), ExitFailure> {
    let mut signals = Signals::new()
        .map_err(|error| ExitFailure::new(Exit::Failed, &format!("cannot start: {error}")))?;
    let stop = CancellationToken::new();
    let console = console.map(Arc::new);
    let (inspector, mut serving) =
        inspect_tunnels(inspect, &tunnels, console.as_deref(), (stderr, style)).await?;
    serving.spawn(supervision::keep_alive());
    let supervision = Supervision::new(tunnels.iter().map(|tunnel| tunnel.name.clone()));
    let observer = observer(display, console.clone(), inspector.clone(), supervision);
    let mut run = std::pin::pin!(crate::run(
        tunnels,
        observer,
        inspector.clone(),
        stop.clone()
    ));
    let stop_requested = async |signals: &mut Signals| {
        tokio::select! {
            () = signals.next() => {}
            () = Console::stop_requested(console.as_deref()) => {}
        }
    };
    let outcome = tokio::select! {
        outcome = &mut run => Some(outcome),
        () = stop_requested(&mut signals) => {
            supervision::stopping();
            stop.cancel();
            tokio::select! {
                outcome = &mut run => Some(outcome),
                () = stop_requested(&mut signals) => None,
            }
        }
    };
    inspector.close();
    if let Some(console) = console {
        stderr.line(&console.close());
    }
    match outcome {
        Some(outcome) => Ok(outcome?),
        None => Err(ExitFailure::new(Exit::Failed, &"")),
    }
}

/// Starts the inspector unless it is off, and says where it is. It is served for as long as the set lives.
async fn inspect_tunnels(
    options: &InspectOptions,
    tunnels: &[Settings],
    console: Option<&Console>,
    (stderr, style): (&Lines, LineStyle),
) -> Result<(Inspector, JoinSet<Infallible>), ExitFailure> {
    let mut serving = JoinSet::new();
    let started = Inspector::start(options, tunnels)
        .await
        .map_err(|error| ExitFailure::new(Exit::Failed, &error))?;
    let Some((inspector, server)) = started else {
        return Ok((Inspector::default(), serving));
    };
    match console {
        Some(console) => console.show_inspector(server.url()),
        None => {
            let url = server.url();
            let fields = json!({ "url": url });
            say(
                stderr,
                style,
                "inspector",
                &format!("inspector: {url}"),
                fields,
            );
        }
    }
    let place = tunnel_ids::default_file().zip(server.loopback_port());
    // It may wait for a lock.
    let noting = spawn_blocking(move || {
        place.and_then(|(file, port)| tunnel_ids::note_inspector(&file, port))
    });
    let noted = noting.await.ok().flatten();
    serving.spawn(async move {
        let _noted = noted;
        server.run().await
    });
    Ok((inspector, serving))
}

/// Shows what happens: in the console if there is one, else as lines. URLs are lines on a stdout that somebody else reads.
fn observer(
    display: Display,
    console: Option<Arc<Console>>,
    inspector: Inspector,
    supervision: Supervision,
) -> Observer {
    let prints_urls = !io::stdout().is_terminal();
    Arc::new(move |tunnel, event| {
        inspector.observe(tunnel, &event);
        supervision.observe(tunnel, &event);
        match &console {
            None => display.show(tunnel, &event),
            Some(console) => {
                if prints_urls {
                    display.print_url(tunnel, &event);
                }
                console.show(tunnel, &event);
            }
        }
    })
}

/// Gives up a tunnel id, and returns the message for the user.
async fn release(settings: &Settings, tunnel_id: &TunnelId) -> Result<String, ExitFailure> {
    let existed = handshake::release(settings, tunnel_id)
        .await
        .map_err(|error| match error {
            HandshakeError::NameTaken => ExitFailure::new(
                Exit::NameTaken,
                &format!("the tunnel id {tunnel_id} belongs to another owner: only its owner can release it"),
            ),
            other => other.into(),
        })?;
    if let Some(file) = &settings.memory {
        tunnel_ids::forget(file, &settings.endpoint, tunnel_id).await;
    }
    Ok(if existed {
        format!("{tunnel_id} is released: anyone may claim it now")
    } else {
        format!("{tunnel_id} was not claimed; nothing to release")
    })
}

/// Raises the soft limit of open files to the hard one: each request needs one, and macOS starts with 256.
fn raise_open_files() {
    #[cfg(unix)]
    match rlimit::increase_nofile_limit(u64::MAX) {
        Ok(limit) if limit < MIN_OPEN_FILES => warn!(
            limit,
            "the limit of open files is low, so many requests at once may fail; raise it with `ulimit -n`"
        ),
        Ok(_) => {}
        Err(error) => warn!(
            error = &error as &dyn std::error::Error,
            "the limit of open files cannot be raised"
        ),
    }
}

/// Requests to stop: Ctrl-C, and on Unix SIGTERM and the terminal's SIGHUP. Registered before the first await, so that none is lost.
#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hang_up: Option<tokio::signal::unix::Signal>,
}

#[cfg(unix)]
impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let hang_up = (!ignores_hang_up()).then(|| signal(SignalKind::hangup()));
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: hang_up.transpose()?,
        })
    }

    async fn next(&mut self) {
        let hang_up = async {
            match &mut self.hang_up {
                Some(hang_up) => hang_up.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = hang_up => {}
        }
    }
}

/// Whether this process was started to outlive its terminal, as `nohup` does: listening to SIGHUP would undo that. Only Linux tells.
#[cfg(unix)]
fn ignores_hang_up() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // Signal 1 is the lowest bit.
    ignored.is_some_and(|mask| mask & 1 == 1)
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        let _ = tokio::signal::ctrl_c().await;
    }
}
