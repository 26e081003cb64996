//! A process that can be killed, stopped and started again.

use std::{
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// After this long a process has what it needs, and its memory counts as its start's.
const WARM: Duration = Duration::from_secs(4);

/// A process and those that were started in its place.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) name: &'static str,
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    child: Child,
    since: Instant,
    /// Resident memory in kB once warm, and the most since then.
    pub(crate) at_start: Option<u64>,
    pub(crate) peak: u64,
}

impl Process {
    pub(crate) fn start(
        name: &'static str,
        program: &Path,
        arguments: Vec<String>,
        logs: &Path,
    ) -> io::Result<Self> {
        let log = logs.join(format!("{name}.log"));
        let child = spawn(program, &arguments, &log)?;
        Ok(Self {
            name,
            program: program.into(),
            arguments,
            log,
            child,
            since: Instant::now(),
            at_start: None,
            peak: 0,
        })
    }

    /// Starts another one with the same arguments, which writes to the same log.
    pub(crate) fn twin(&self) -> io::Result<Self> {
        let logs = self.log.parent().unwrap_or(Path::new("."));
        Self::start(self.name, &self.program, self.arguments.clone(), logs)
    }

    pub(crate) fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    /// Starts it again after it was killed, with what `change` makes of its arguments.
    pub(crate) fn restart(&mut self, change: impl FnOnce(&mut Vec<String>)) -> io::Result<()> {
        change(&mut self.arguments);
        self.child = spawn(&self.program, &self.arguments, &self.log)?;
        (self.since, self.at_start) = (Instant::now(), None);
        Ok(())
    }

    /// Sends a signal, such as `STOP`.
    pub(crate) fn signal(&self, signal: &str) -> io::Result<()> {
        let status = Command::new("kill")
            .arg(format!("-{signal}"))
            .arg(self.child.id().to_string())
            .status()?;
        if status.success() {
            Ok(())
        } else {
            Err(io::Error::other(format!(
                "{} cannot be sent {signal}",
                self.name
            )))
        }
    }

    /// Asks it to end, and waits for that.
    pub(crate) fn terminate(&mut self) -> io::Result<ExitStatus> {
        self.signal("TERM")?;
        let asked = Instant::now();
        while asked.elapsed() < Duration::from_secs(20) {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        self.kill()?;
        Err(io::Error::other("did not end within 20 s of SIGTERM"))
    }

    /// How it ended, if it did so by itself.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Takes note of its memory, in kB.
    pub(crate) fn measure(&mut self) -> u64 {
        let resident = self.resident();
        self.peak = self.peak.max(resident);
        if self.since.elapsed() >= WARM && resident > 0 {
            self.at_start.get_or_insert(resident);
        }
        resident
    }

    fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .unwrap_or_default();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap_or_default();
        line.split_whitespace()
            .next()
            .and_then(|number| number.parse().ok())
            .unwrap_or_default()
    }

    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

fn spawn(program: &Path, arguments: &[String], log: &Path) -> io::Result<Child> {
    let log: File = OpenOptions::new().create(true).append(true).open(log)?;
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
}
