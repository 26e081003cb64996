//! The tunnel under test: service, agent and local service as processes, and the network between them.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, interval, timeout},
};

use crate::{Cli, load::Load, process::Process, proxy::Proxy, service};

/// The id of the tunnel.
const TUNNEL: &str = "chaos";
/// Few enough that the agent is filled easily.
const MAX_CONCURRENT: u32 = 128;
/// Longer than any answer takes without a fault.
const REQUEST_TIMEOUT: &str = "20s";

/// The directory, below that of the logs, with the service's data.
const DATA: &str = "data";
/// The size of its disk. The database and its log need less than 8 MiB.
const DISK_BYTES: u32 = 16 * 1024 * 1024;

/// How often a request is made to see whether the tunnel answers.
const PROBE: Duration = Duration::from_millis(100);

/// Everything that a scenario acts on.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) service: Mutex<Process>,
    pub(crate) agent: Mutex<Process>,
    pub(crate) local_service: Mutex<Process>,
    pub(crate) network: Proxy,
    pub(crate) load: Load,
    pub(crate) begun: Instant,
    pub(crate) logs: PathBuf,
    pub(crate) ledger: PathBuf,
    /// This needs iptables and a network of our own.
    pub(crate) can_drop_packets: bool,
    /// The disk with the service's data is small and nothing else is on it.
    pub(crate) can_fill_disk: bool,
    visitors_at: SocketAddr,
    local_service_at: SocketAddr,
}

impl World {
    /// Starts everything, and returns when the tunnel answers. Connections live `age` if that is given.
    pub(crate) async fn start(cli: &Cli, age: Option<&str>) -> anyhow::Result<Self> {
        let files = Files::new(cli)?;
        if cli.isolated {
            files.mount_disk()?;
        }
        let visitors_at = free_port()?;
        let local_service_at = SocketAddr::new(visitors_at.ip(), visitors_at.port() + 3000);
        let local_service = files.start_local_service(local_service_at)?;
        let service = files.start_service(visitors_at, age)?;
        let from = cli.isolated.then(|| SocketAddr::from(([127, 0, 0, 2], 0)));
        let network = Proxy::start(visitors_at, from).await?;
        let agent = files.start_agent(network.address, local_service_at)?;
        let begun = Instant::now();
        let world = Self {
            service: Mutex::new(service),
            agent: Mutex::new(agent),
            local_service: Mutex::new(local_service),
            network,
            load: Load::new(visitors_at, &format!("/{TUNNEL}"), begun),
            begun,
            ledger: files.ledger(),
            logs: files.logs,
            can_drop_packets: cli.isolated && has_iptables(),
            can_fill_disk: cli.isolated,
            visitors_at,
            local_service_at,
        };
        let found = world.until_it_answers(Duration::from_secs(20)).await;
        ensure!(
            found.is_some(),
            "the tunnel did not open; see {}",
            world.logs.display()
        );
        // The tries until then are no part of the scenario.
        Ok(Self {
            load: Load::new(visitors_at, &format!("/{TUNNEL}"), Instant::now()).from(1_000_000),
            begun: Instant::now(),
            ..world
        })
    }

    /// How long it takes from now until a request is answered.
    pub(crate) async fn until_it_answers(&self, limit: Duration) -> Option<Duration> {
        let since = Instant::now();
        let (mut probes, mut tick) = (JoinSet::new(), interval(PROBE));
        while since.elapsed() < limit {
            tokio::select! {
                Some(probe) = probes.join_next() => {
                    if probe.is_ok_and(|is_right| is_right) {
                        return Some(since.elapsed());
                    }
                }
                _ = tick.tick() => {
                    let load = self.load.clone();
                    // Each by itself: one that hangs tells nothing of the next.
                    probes.spawn(async move { load.probe(limit).await });
                }
            }
        }
        None
    }

    /// Drops every packet between agent and service without a word, or lets them pass again.
    pub(crate) fn drop_packets(&self, drops: bool) -> io::Result<()> {
        let port = self.network.address.port().to_string();
        let action = if drops { "-I" } else { "-D" };
        for rule in [
            ["--dport", &port],
            ["--sport", &port],
            ["-s", "127.0.0.2"],
            ["-d", "127.0.0.2"],
        ] {
            let status = Command::new("iptables")
                .args([action, "INPUT", "-p", "tcp"])
                .args(rule)
                .args(["-j", "DROP"])
                .status()?;
            if !status.success() {
                return Err(io::Error::other("iptables failed"));
            }
        }
        Ok(())
    }

    /// Where the service keeps its data.
    pub(crate) fn data(&self) -> PathBuf {
        self.logs.join(DATA)
    }

    /// The processes, most interesting first.
    pub(crate) fn processes(&self) -> [&Mutex<Process>; 3] {
        [&self.service, &self.agent, &self.local_service]
    }

    /// How many requests the local service has open.
    pub(crate) async fn open_requests(&self) -> Option<usize> {
        let ask = async {
            let mut stream = TcpStream::connect(self.local_service_at).await?;
            stream
                .write_all(format!("GET {} HTTP/1.0\r\n\r\n", service::OPEN).as_bytes())
                .await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            io::Result::Ok(answer)
        };
        let answer = timeout(Duration::from_secs(2), ask).await.ok()?.ok()?;
        answer.rsplit("\r\n\r\n").next()?.trim().parse().ok()
    }

    /// How many connections the service and the local service have accepted and not closed.
    pub(crate) fn accepted(&self) -> [usize; 2] {
        /// Established, and closed by the other side only.
        const OPEN: [&str; 2] = ["01", "08"];
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
        [self.visitors_at, self.local_service_at].map(|address| {
            let port = format!(":{:04X}", address.port());
            let is_open = |line: &&str| {
                let mut cells = line.split_whitespace().skip(1);
                cells.next().is_some_and(|local| local.ends_with(&port))
                    && cells.nth(1).is_some_and(|state| OPEN.contains(&state))
            };
            table.lines().filter(is_open).count()
        })
    }

    /// Seconds since the scenario began.
    pub(crate) fn at(&self, instant: Instant) -> f64 {
        instant.saturating_duration_since(self.begun).as_secs_f64()
    }
}

/// The executables under test, and where they write.
struct Files {
    /// This executable, which is also the local service.
    this: PathBuf,
    bin: PathBuf,
    logs: PathBuf,
}

impl Files {
    /// What the command line names or leaves open. The directory of the logs is made.
    fn new(cli: &Cli) -> anyhow::Result<Self> {
        let this = std::env::current_exe()?;
        let bin = match &cli.bin {
            Some(bin) => bin.clone(),
            None => this
                .parent()
                .context("this executable is nowhere")?
                .to_owned(),
        };
        let logs = cli
            .logs
            .clone()
            .unwrap_or_else(|| std::env::temp_dir().join(format!("chaos-{}", std::process::id())));
        std::fs::create_dir_all(&logs)
            .with_context(|| format!("cannot write to {}", logs.display()))?;
        let files = Self { this, bin, logs };
        // What an earlier run left there would count as carried out once more: numbers of requests begin anew.
        match std::fs::remove_file(files.ledger()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).context("an earlier ledger cannot be removed")
            }
            _ => Ok(files),
        }
    }

    /// Where the local service writes what it did.
    fn ledger(&self) -> PathBuf {
        self.logs.join("ledger")
    }

    /// Gives the service's data a disk of its own, which is easily filled.
    fn mount_disk(&self) -> anyhow::Result<()> {
        let data = self.logs.join(DATA);
        std::fs::create_dir_all(&data)?;
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={DISK_BYTES}"), "tmpfs"])
            .arg(&data)
            .status()?;
        ensure!(status.success(), "a disk cannot be mounted");
        Ok(())
    }

    fn start_local_service(&self, listen: SocketAddr) -> io::Result<Process> {
        let ledger = self.ledger();
        let arguments = ["service", &listen.to_string(), &ledger.to_string_lossy()];
        let arguments = arguments.map(str::to_owned).into();
        Process::start("local-service", &self.this, arguments, &self.logs)
    }

    fn start_service(&self, listen: SocketAddr, age: Option<&str>) -> anyhow::Result<Process> {
        let mut arguments = [
            "--listen",
            &listen.to_string(),
            "--data",
            &self.logs.join(DATA).to_string_lossy(),
        ]
        .map(str::to_owned)
        .to_vec();
        set_age(&mut arguments, age);
        let path = self.bin.join("tunnel-local");
        Process::start("tunnel-local", &path, arguments, &self.logs)
            .context("cannot start tunnel-local")
    }

    /// The agent, which reaches the service at `network`.
    fn start_agent(&self, network: SocketAddr, target: SocketAddr) -> anyhow::Result<Process> {
        let arguments = [
            "http",
            &target.to_string(),
            "--endpoint",
            &format!("ws://{network}/_ws"),
            "--tunnel-id",
            TUNNEL,
            "--max-concurrent",
            &MAX_CONCURRENT.to_string(),
            "--request-timeout",
            REQUEST_TIMEOUT,
        ]
        .map(str::to_owned)
        .to_vec();
        Process::start("ttf", &self.bin.join("ttf"), arguments, &self.logs)
            .context("cannot start ttf")
    }
}

fn has_iptables() -> bool {
    Command::new("iptables")
        .args(["-L", "INPUT"])
        .output()
        .is_ok_and(|output| output.status.success())
}

/// Held between awaits only.
pub(crate) fn lock(process: &Mutex<Process>) -> MutexGuard<'_, Process> {
    process.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Changes how long agents' connections live in the arguments of `tunnel-local`.
pub(crate) fn set_age(arguments: &mut Vec<String>, age: Option<&str>) {
    if let Some(at) = arguments
        .iter()
        .position(|argument| argument == "--max-connection-age")
    {
        arguments.drain(at..at + 2);
    }
    arguments.extend(
        age.into_iter()
            .flat_map(|age| ["--max-connection-age".to_owned(), age.to_owned()]),
    );
}

/// Where nobody listens now, outside the range that connections are given theirs from: processes that restart need the same, and
/// meanwhile nobody else may have it.
fn free_port() -> io::Result<SocketAddr> {
    let first = 20_000 + u16::try_from(std::process::id() % 10_000).unwrap_or_default();
    let mut tries = (first..first + 2000).map(|port| TcpListener::bind(("127.0.0.1", port)));
    tries
        .find_map(Result::ok)
        .ok_or_else(|| io::Error::other("no port is free"))?
        .local_addr()
}

/// A file's lines that say something of a bug.
pub(crate) fn panics(log: &str) -> Vec<&str> {
    log.lines()
        .filter(|line| {
            line.contains("panicked at")
                || line.contains("RUST_BACKTRACE")
                || line.contains("overflow")
        })
        .collect()
}

/// The last lines of a log.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let text = String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
