//! Executables: where they are, starting them, and how much processor time they use.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

/// Longer than any of them takes to start or to end.
const PATIENCE: Duration = Duration::from_secs(20);
/// Linux counts processor time in hundredths of a second, on every architecture.
const TICKS: f64 = 100.0;

/// The directory in which cargo puts executables: two levels above that of a test or benchmark.
///
/// # Errors
/// If this executable is not in a target directory.
pub fn built() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    own.parent()
        .and_then(Path::parent)
        .map(Path::to_owned)
        .context("not in a target directory")
}

/// Builds the executables of all packages, which cargo does not do for a test of this one, and returns their directory.
///
/// # Errors
/// If they cannot be built.
pub fn build() -> anyhow::Result<PathBuf> {
    let mut cargo = Command::new(env!("CARGO"));
    // These variables describe the package of the test; they would make the build scripts of others run again.
    for (name, _) in std::env::vars_os() {
        let is_of_package = [
            "CARGO_PKG_",
            "CARGO_MANIFEST_",
            "CARGO_CRATE_",
            "CARGO_BIN_",
        ]
        .iter()
        .any(|start| name.to_str().is_some_and(|name| name.starts_with(start)));
        if is_of_package {
            cargo.env_remove(name);
        }
    }
    // With the examples, the libraries have the features that they have in tests, and none is built twice.
    cargo.args([
        "build",
        "--locked",
        "--quiet",
        "--workspace",
        "--bins",
        "--examples",
    ]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let status = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status()?;
    anyhow::ensure!(status.success(), "the executables cannot be built");
    built()
}

/// A process that ends when it is dropped.
pub struct Process {
    child: Child,
    lines: mpsc::UnboundedReceiver<String>,
}

impl Process {
    /// Starts an executable, and reads the lines of one of its outputs.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(command: &mut Command, heard: Output) -> anyhow::Result<Self> {
        let pipe = |output| {
            if output == heard {
                Stdio::piped()
            } else {
                Stdio::null()
            }
        };
        command
            .stdin(Stdio::null())
            .stdout(pipe(Output::Stdout))
            .stderr(pipe(Output::Stderr));
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let (said, lines) = mpsc::unbounded_channel();
        let stdout = child
            .stdout
            .take()
            .map(|stdout| Box::new(stdout) as Box<dyn Read + Send>);
        let output = stdout.or(child
            .stderr
            .take()
            .map(|stderr| Box::new(stderr) as Box<dyn Read + Send>));
        if let Some(output) = output {
            // Ends with the process, and goes on reading when no one needs the lines, so that the process never blocks.
            std::thread::spawn(move || {
                BufReader::new(output)
                    .lines()
                    .map_while(Result::ok)
                    .for_each(|line| drop(said.send(line)));
            });
        }
        Ok(Self { child, lines })
    }

    /// Waits for a line in which `find` finds something.
    ///
    /// # Errors
    /// If no such line comes in time.
    pub async fn hear<T>(
        &mut self,
        what: &str,
        find: impl Fn(&str) -> Option<T>,
    ) -> anyhow::Result<T> {
        let heard = timeout(PATIENCE, async {
            while let Some(line) = self.lines.recv().await {
                if let Some(found) = find(&line) {
                    return Some(found);
                }
            }
            None
        });
        heard
            .await
            .ok()
            .flatten()
            .with_context(|| format!("timed out waiting for {what}"))
    }

    /// Asks it to end, and waits until it has.
    ///
    /// # Errors
    /// If it does not end in time, or with another code than 0.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let id = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(id.context("it has ended")?, Signal::TERM)?;
        let ended = timeout(PATIENCE, async {
            loop {
                match self.child.try_wait()? {
                    Some(status) => return anyhow::Ok(status),
                    None => sleep(Duration::from_millis(20)).await,
                }
            }
        });
        let status = ended.await.context("a process does not end")??;
        anyhow::ensure!(status.success(), "a process ended with {status}");
        Ok(())
    }

    /// The processor time it has taken so far, in user and kernel mode, in seconds.
    ///
    /// # Errors
    /// If it has ended, or this is not Linux.
    pub fn processor_time(&self) -> anyhow::Result<f64> {
        let id = self.child.id();
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat"))
            .context("processor times are read from /proc")?;
        // The name, in parentheses, may contain spaces; utime and stime are the 14th and 15th field.
        let (_, fields) = stat.rsplit_once(')').context("not a stat file")?;
        let ticks: f64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<f64>().ok())
            .sum();
        Ok(ticks / TICKS)
    }

    /// The memory that it has, in bytes.
    ///
    /// # Errors
    /// If it has ended, or this is not Linux.
    pub fn memory(&self) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .context("memory is read from /proc")?;
        let kibibytes = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix("kB"))
            .context("not a status file")?;
        Ok(kibibytes.trim().parse::<f64>()? * 1024.0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An output of a process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Output {
    /// Its stdout.
    Stdout,
    /// Its stderr.
    Stderr,
    /// Neither.
    None,
}

/// Starts `tunnel-local` at a free port, and returns it with its address for agents.
///
/// # Errors
/// If it does not start.
pub async fn server(executables: &Path, flags: &[&str]) -> anyhow::Result<(Process, String)> {
    let mut command = Command::new(executables.join("tunnel-local"));
    command.args(["--listen", "127.0.0.1:0"]).args(flags);
    let mut server = Process::start(&mut command, Output::Stderr)?;
    let endpoint = server
        .hear("tunnel-local", |line| {
            Some(line.split_once("agents at ")?.1.to_owned())
        })
        .await?;
    Ok((server, endpoint))
}

/// Starts the agent for a local service at `target`, and returns it with the tunnel's public URL.
///
/// # Errors
/// If the tunnel does not open.
pub async fn agent(
    executables: &Path,
    endpoint: &str,
    variable: Option<(&str, &str)>,
    target: &str,
) -> anyhow::Result<(Process, String)> {
    let mut command = Command::new(executables.join("ttf"));
    command.args([
        "http",
        target,
        "--endpoint",
        endpoint,
        "--tunnel-id",
        "bench",
    ]);
    command.envs(variable);
    let mut agent = Process::start(&mut command, Output::Stdout)?;
    let url = agent
        .hear("the tunnel to open", |line| {
            line.starts_with("http").then(|| line.to_owned())
        })
        .await?;
    Ok((agent, url))
}
