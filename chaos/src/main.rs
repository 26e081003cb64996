//! Faults under load, at random: processes killed and stopped, the network between agent and service cut, delayed and silent, the
//! agent or the disk full. `make chaos` runs it with the built executables; CONTRIBUTING.md says what it checks.

#![expect(clippy::print_stdout, reason = "what is found is for whoever runs it")]

mod check;
mod content;
mod fault;
mod load;
mod message;
mod process;
mod proxy;
mod scenario;
mod service;
mod visit;
mod world;

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{Command, ExitCode},
    time::Duration,
};

use clap::{Parser, Subcommand};

/// Breaks a running tunnel in every way it can while visitors use it, and checks what they get.
#[derive(Clone, Debug, Parser)]
pub(crate) struct Cli {
    /// How long faults and load go on
    #[arg(long, env = "CHAOS_SECONDS", default_value_t = 300, global = true)]
    seconds: u64,
    /// What is random follows from it
    #[arg(long, env = "CHAOS_SEED", global = true)]
    seed: Option<u64>,
    /// Requests a second
    #[arg(long, env = "CHAOS_RATE", global = true)]
    rate: Option<u32>,
    /// Only faults whose name has this in it
    #[arg(long, env = "CHAOS_ONLY", global = true)]
    only: Option<String>,
    /// Where tunnel-local and ttf are [default: beside this executable]
    #[arg(long, env = "CHAOS_BIN", global = true)]
    bin: Option<PathBuf>,
    /// Where logs are written; kept when a check fails [default: a directory under /tmp]
    #[arg(long, env = "CHAOS_LOGS", global = true)]
    logs: Option<PathBuf>,
    /// This process has a network and mounts of its own: a disk can be filled, and with iptables packets can be dropped
    #[arg(long, hide = true, global = true)]
    isolated: bool,
    #[command(subcommand)]
    scenario: Option<Scenario>,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Scenario {
    /// Faults at random; what is done if nothing is said
    Faults,
    /// Connections that live 10 s, and nothing else: no request may fail or be slow
    Rollovers,
    /// The agent's network silent for a minute
    Outage,
    /// Load without faults: memory must stay what it is
    Soak,
    /// The local service of the suite, as a process that can be killed
    #[command(hide = true)]
    Service {
        /// Where it listens
        listen: SocketAddr,
        /// Where it writes what it did
        ledger: PathBuf,
    },
}

impl Cli {
    fn time(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(Scenario::Service { listen, ledger }) = &cli.scenario {
        return service::main(*listen, ledger);
    }
    if !cli.isolated && can_isolate() {
        return isolated();
    }
    let runtime = tokio::runtime::Runtime::new().expect("threads can be started");
    match runtime.block_on(scenario::run(cli)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether this process may have a network of its own, and mount a small disk that others do not see.
fn can_isolate() -> bool {
    let try_it = "ip link set lo up && mount -t tmpfs tmpfs /mnt";
    Command::new("unshare")
        .args(["--net", "--mount", "sh", "-c", try_it])
        .output()
        .is_ok_and(|output| output.status.success())
}

/// Runs this program with a network and mounts of its own, which end with it.
fn isolated() -> ExitCode {
    let this = std::env::current_exe().expect("a running executable has a path");
    let status = Command::new("unshare")
        .args([
            "--net",
            "--mount",
            "sh",
            "-c",
            "ip link set lo up && exec \"$0\" \"$@\"",
        ])
        .arg(this)
        .args(std::env::args_os().skip(1))
        .arg("--isolated")
        .status();
    if status.is_ok_and(|status| status.success()) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
