//! `tunnel-local` with `ttf` on this machine, beside the local service alone and beside other tunnels, all under the same load.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};
use tokio::{net::TcpStream, task::spawn_blocking};

use crate::{
    idle_agents,
    processes::{self, Output, Process},
    under_load::{self, Contestant},
};

/// How many connections load is put on, and how many threads of the load generator.
const CONNECTIONS: [usize; 3] = [1, 32, 256];
/// How many connections carry long bodies at once.
const LONG_CONNECTIONS: usize = 4;
/// How often everything is measured. One contestant follows the other within a round, so that what else the machine does meets all.
const ROUNDS: usize = 5;
/// How long each measurement takes, in seconds.
const SECONDS: u32 = 4;
/// How long each is warmed up before it, in seconds.
const WARM_UP_SECONDS: u32 = 1;
/// A request that takes longer counts as failed, in seconds: less than a measurement, so that a stall shows.
const STALL_SECONDS: u32 = 2;
/// Which of [`CONNECTIONS`] shows the rate of which half is kept up.
const AT_HALF: usize = 1;
/// A short body, in bytes.
const SHORT: usize = 1024;
/// A long body, in bytes.
const LONG: usize = 10_000_000;

/// Which way long bodies go.
#[derive(Clone, Copy, Debug)]
enum Direction {
    Download,
    Upload,
}

impl Direction {
    const ALL: [Self; 2] = [Self::Download, Self::Upload];

    fn name(self) -> &'static str {
        match self {
            Self::Download => "downloads",
            Self::Upload => "uploads",
        }
    }
}

/// What the load generator uploads, in files: the body, and how wrk is told to send it.
#[derive(Clone, Debug)]
struct Upload {
    body: PathBuf,
    script: PathBuf,
}

impl Upload {
    fn write(work: &Path) -> anyhow::Result<Self> {
        let upload = Self {
            body: work.join("body"),
            script: work.join("upload.lua"),
        };
        std::fs::write(&upload.body, vec![b'x'; LONG])?;
        let script = format!("wrk.method = 'POST'\nwrk.body = string.rep('x', {LONG})\n");
        std::fs::write(&upload.script, script)?;
        Ok(upload)
    }
}

/// The load generator.
#[derive(Clone, Debug)]
enum Generator {
    Wrk(PathBuf),
    Oha(PathBuf),
}

/// What the load generator reports.
#[derive(Clone, Copy, Debug, Default)]
struct Report {
    requests_per_second: f64,
    requests: f64,
    failures: f64,
    /// In milliseconds.
    p50: f64,
    p99: f64,
}

/// What is between the load generator and the local service.
struct Setup {
    name: &'static str,
    url: String,
    processes: Vec<(&'static str, Process)>,
}

/// What is measured beside the tunnel, and how it is installed.
const CONTESTANTS: [(&str, &str); 3] = [
    ("nginx", "apt install nginx-light"),
    ("bore", "cargo install bore-cli --root .tools"),
    ("rathole", "cargo install rathole --root .tools"),
];

/// Checks that everything needed is installed.
///
/// # Errors
/// If no load generator is on the PATH, or, unless `may_miss`, another tunnel to compare with; the error says how to install it.
pub fn check(tools: &Path, may_miss: bool) -> anyhow::Result<()> {
    generator(tools)?;
    let missing: Vec<String> = CONTESTANTS
        .iter()
        .filter(|(name, _)| find(tools, name).is_none())
        .map(|(name, install)| format!("{name} ({install})"))
        .collect();
    if !missing.is_empty() && !may_miss {
        bail!(
            "missing: {}. To measure without, set MISSING=allow; the page is not written then.",
            missing.join(", ")
        );
    }
    Ok(())
}

/// Measures the executables in `deployed`, and returns the figures as Markdown. The demo service is in `executables`.
///
/// # Errors
/// If something is missing or does not start.
pub async fn measure(
    executables: &Path,
    deployed: &Path,
    tools: &Path,
    say: impl Fn(&str),
) -> anyhow::Result<String> {
    let generator = generator(tools)?;
    let work = tempfile::tempdir()?;
    let (service, origin, has_long) = origin(executables, work.path()).await?;
    let direct = Setup {
        name: "the service alone",
        url: format!("http://{origin}"),
        processes: Vec::new(),
    };
    let setups = [
        Some(direct),
        Some(tunnel(deployed, &origin).await?),
        bore(tools, &origin).await?,
        rathole(tools, &origin, work.path()).await?,
    ];
    let upload = Upload::write(work.path())?;
    let mut results: Vec<Results> = setups.into_iter().flatten().map(Results::new).collect();
    for round in 1..=ROUNDS {
        for (at, connections) in CONNECTIONS.into_iter().enumerate() {
            for contestant in &mut results {
                contestant.measure_short(&generator, at).await?;
                let (name, report) = (contestant.setup.name, contestant.short[at].last());
                say(&format!("{round}: {name} {connections}: {report:?}"));
            }
        }
        for direction in Direction::ALL.into_iter().filter(|_| has_long) {
            for contestant in &mut results {
                contestant
                    .measure_long(&generator, direction, &upload)
                    .await?;
                let (name, reports) = (contestant.setup.name, contestant.long(direction));
                say(&format!(
                    "{round}: {name} {}: {:?}",
                    direction.name(),
                    reports.last()
                ));
            }
        }
    }
    let mut page = page(&results, generator.name(), has_long)?;
    if has_long {
        let ours = results.get(1).context("nothing was measured")?;
        let half = ours.requests_per_second(AT_HALF).median / 2.0;
        let contestants: Vec<_> = results.iter().map(Results::contestant).collect();
        page.push_str(&under_load::measure(&contestants, half, (SHORT, LONG)).await?);
    }
    drop((results, service));
    page.push_str(&idle_agents::measure(deployed, &say).await?);
    Ok(page)
}

/// What was measured of a contestant: a report for each round.
struct Results {
    setup: Setup,
    short: [Vec<Report>; CONNECTIONS.len()],
    long: [Vec<Report>; Direction::ALL.len()],
    /// Processor time per request, in microseconds, of each process in each round.
    processor: [Vec<Vec<f64>>; CONNECTIONS.len()],
}

impl Results {
    fn new(setup: Setup) -> Self {
        Self {
            setup,
            short: Default::default(),
            long: Default::default(),
            processor: Default::default(),
        }
    }

    async fn measure_short(&mut self, generator: &Generator, at: usize) -> anyhow::Result<()> {
        let (url, connections) = (format!("{}/short", self.setup.url), CONNECTIONS[at]);
        generator
            .run(&url, connections, WARM_UP_SECONDS, None)
            .await?;
        let before = self.setup.processor_times()?;
        let report = generator.run(&url, connections, SECONDS, None).await?;
        let after = self.setup.processor_times()?;
        let times = before.iter().zip(&after);
        let times = times.map(|(before, after)| (after - before) / report.requests * 1e6);
        self.processor[at].push(times.collect());
        self.short[at].push(report);
        Ok(())
    }

    fn contestant(&self) -> Contestant<'_> {
        Contestant {
            name: self.setup.name,
            url: &self.setup.url,
            processes: &self.setup.processes,
        }
    }

    fn requests_per_second(&self, at: usize) -> Spread {
        Spread::of(
            self.short[at]
                .iter()
                .map(|report| report.requests_per_second),
        )
    }

    async fn measure_long(
        &mut self,
        generator: &Generator,
        direction: Direction,
        upload: &Upload,
    ) -> anyhow::Result<()> {
        let (path, upload) = match direction {
            Direction::Download => ("long", None),
            Direction::Upload => ("upload", Some(upload)),
        };
        let url = format!("{}/{path}", self.setup.url);
        let report = generator
            .run(&url, LONG_CONNECTIONS, SECONDS, upload)
            .await?;
        self.long[direction as usize].push(report);
        Ok(())
    }

    fn long(&self, direction: Direction) -> &[Report] {
        &self.long[direction as usize]
    }

    /// Of the bodies of requests that did not fail.
    fn megabytes_per_second(&self, direction: Direction) -> Spread {
        let good = |report: &Report| (report.requests - report.failures).max(0.0) / report.requests;
        let reports = self.long(direction).iter();
        Spread::of(
            reports.map(|report| report.requests_per_second * good(report) * LONG as f64 / 1e6),
        )
    }
}

/// The median of the rounds, and their extremes.
#[derive(Clone, Copy, Debug, Default)]
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or_default();
        Self {
            median: at(values.len() / 2),
            least: at(0),
            most: at(values.len().saturating_sub(1)),
        }
    }
}

fn page(results: &[Results], generator: &str, has_long: bool) -> anyhow::Result<String> {
    let origin = if has_long {
        "nginx"
    } else {
        "the demo service"
    };
    let mut page = format!(
        "Load from {generator}, {ROUNDS} rounds of {SECONDS} s each after {WARM_UP_SECONDS} s to warm up, one contestant after the other in each round; the\n\
         figures are medians, with the least and the most in parentheses. The service is {origin}. The generator waits for each response\n\
         before it sends the next request, so p50 and p99 leave out what would have waited during a stall. Failed are also requests\n\
         that took longer than {STALL_SECONDS} s.\n\n"
    );
    page.push_str(&ratios(results, has_long)?);
    page.push_str(&short_table(results)?);
    if has_long {
        page.push_str(&long_table(results)?);
    }
    page.push_str(&processor_table(results)?);
    Ok(page)
}

/// Ours beside the service alone and the better of the other tunnels.
fn ratios(results: &[Results], has_long: bool) -> anyhow::Result<String> {
    let (Some(alone), Some(ours)) = (results.first(), results.get(1)) else {
        bail!("nothing was measured");
    };
    let relays = results.get(2..).unwrap_or_default();
    let mut table = "Ratios of `tunnel-local` with `ttf`:\n\n| | to the service alone | to the better relay |\n|---|---|---|\n".to_owned();
    let mut line = |what: &str, of: &dyn Fn(&Results) -> f64| {
        let best = relays.iter().map(of).fold(f64::NAN, f64::max);
        let to_best = match best.is_nan() {
            true => "not measured".to_owned(),
            false => format!("{:.2}", of(ours) / best),
        };
        writeln!(
            table,
            "| {what} | {:.2} | {to_best} |",
            of(ours) / of(alone)
        )
    };
    for (at, connections) in CONNECTIONS.into_iter().enumerate() {
        let what = format!("requests/s, connections: {connections}");
        line(&what, &|results| results.requests_per_second(at).median)?;
    }
    if has_long {
        for direction in Direction::ALL {
            let direction_name = direction.name();
            let what = format!("MB/s, {direction_name} of 10 MB, connections: {LONG_CONNECTIONS}");
            line(&what, &|results| {
                results.megabytes_per_second(direction).median
            })?;
        }
    }
    Ok(table)
}

fn short_table(results: &[Results]) -> anyhow::Result<String> {
    let mut table = "\nResponses of 1 KiB:\n\n| | connections | requests/s | p50 ms | p99 ms | failed |\n|---|---|---|---|---|---|\n".to_owned();
    for contestant in results {
        for (at, connections) in CONNECTIONS.into_iter().enumerate() {
            let Spread {
                median,
                least,
                most,
            } = contestant.requests_per_second(at);
            let reports = &contestant.short[at];
            let p50 = Spread::of(reports.iter().map(|report| report.p50)).median;
            let p99 = Spread::of(reports.iter().map(|report| report.p99)).median;
            let failed: f64 = reports.iter().map(|report| report.failures).sum();
            writeln!(
                table,
                "| {} | {connections} | {median:.0} ({least:.0} to {most:.0}) | {p50:.2} | {p99:.2} | {failed} |",
                contestant.setup.name
            )?;
        }
    }
    Ok(table)
}

fn long_table(results: &[Results]) -> anyhow::Result<String> {
    let mut table = format!(
        "\nBodies of 10 MB, {LONG_CONNECTIONS} connections, MB/s:\n\n| | downloads | uploads | failed |\n|---|---|---|---|\n"
    );
    for contestant in results {
        let [down, up] = Direction::ALL.map(|direction| {
            let Spread {
                median,
                least,
                most,
            } = contestant.megabytes_per_second(direction);
            format!("{median:.0} ({least:.0} to {most:.0})")
        });
        let reports = contestant.long.iter().flatten();
        let failed: f64 = reports.map(|report| report.failures).sum();
        let name = contestant.setup.name;
        writeln!(table, "| {name} | {down} | {up} | {failed} |")?;
    }
    Ok(table)
}

fn processor_table(results: &[Results]) -> anyhow::Result<String> {
    let mut table = "\nProcessor time per request, user and kernel:\n\n| process | connections | µs |\n|---|---|---|\n".to_owned();
    for contestant in results {
        for (at, connections) in CONNECTIONS.into_iter().enumerate() {
            for (number, (process, _)) in contestant.setup.processes.iter().enumerate() {
                let rounds = contestant.processor[at].iter();
                let median =
                    Spread::of(rounds.filter_map(|times| times.get(number).copied())).median;
                writeln!(table, "| {process} | {connections} | {median:.0} |")?;
            }
        }
    }
    Ok(table)
}

impl Setup {
    fn processor_times(&self) -> anyhow::Result<Vec<f64>> {
        self.processes
            .iter()
            .map(|(_, process)| process.processor_time())
            .collect()
    }
}

/// An executable on the PATH, or one that was installed for this benchmark.
fn find(tools: &Path, name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(tools.to_owned())
        .chain(std::env::split_paths(&path))
        .chain(["/usr/sbin".into()])
        .map(|place| place.join(name))
        .find(|file| file.is_file())
}

fn generator(tools: &Path) -> anyhow::Result<Generator> {
    let oha = || find(tools, "oha").map(Generator::Oha);
    find(tools, "wrk")
        .map(Generator::Wrk)
        .or_else(oha)
        .context("a load generator is missing: apt install wrk, or cargo install oha")
}

impl Generator {
    fn name(&self) -> &'static str {
        match self {
            Self::Wrk(_) => "wrk",
            Self::Oha(_) => "oha",
        }
    }

    /// Requests `url` over and over: with GET, or with POST of `upload`.
    async fn run(
        &self,
        url: &str,
        connections: usize,
        seconds: u32,
        upload: Option<&Upload>,
    ) -> anyhow::Result<Report> {
        let (connections, seconds) = (connections.to_string(), format!("{seconds}s"));
        let mut command = match self {
            Self::Wrk(wrk) => {
                let mut command = Command::new(wrk);
                command.args([
                    "--threads",
                    "1",
                    "--connections",
                    &connections,
                    "--duration",
                    &seconds,
                    "--latency",
                    "--timeout",
                    &format!("{STALL_SECONDS}s"),
                ]);
                if let Some(upload) = upload {
                    command.arg("--script").arg(&upload.script);
                }
                command
            }
            Self::Oha(oha) => {
                let mut command = Command::new(oha);
                command.args([
                    "--no-tui",
                    "--output-format",
                    "json",
                    "-c",
                    &connections,
                    "-z",
                    &seconds,
                    "-t",
                    &format!("{STALL_SECONDS}s"),
                ]);
                if let Some(upload) = upload {
                    command.args(["-m", "POST", "-D"]).arg(&upload.body);
                }
                command
            }
        };
        command.arg(url);
        let output = spawn_blocking(move || command.output())
            .await?
            .with_context(|| format!("cannot start {}", self.name()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!(
                "{} failed: {}{text}",
                self.name(),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        match self {
            Self::Wrk(_) => of_wrk(&text),
            Self::Oha(_) => of_oha(&text),
        }
        .with_context(|| format!("cannot parse the report of {}: {text}", self.name()))
    }
}

fn of_wrk(text: &str) -> Option<Report> {
    let after = |word: &str| {
        text.lines()
            .find_map(|line| line.trim().strip_prefix(word))
            .map(str::trim)
    };
    let requests = text
        .lines()
        .find_map(|line| line.trim().split_once(" requests in "))?
        .0
        .parse()
        .ok()?;
    let errors: f64 = after("Socket errors:")
        .map(numbers)
        .into_iter()
        .flatten()
        .sum();
    let other = after("Non-2xx or 3xx responses:")
        .and_then(|number| number.parse::<f64>().ok())
        .unwrap_or_default();
    Some(Report {
        requests_per_second: after("Requests/sec:")?.parse().ok()?,
        requests,
        failures: errors + other,
        p50: milliseconds(after("50%")?)?,
        p99: milliseconds(after("99%")?)?,
    })
}

fn of_oha(text: &str) -> Option<Report> {
    let report: serde_json::Value = serde_json::from_str(text).ok()?;
    let (summary, errors) = (&report["summary"], report["errorDistribution"].as_object());
    let requests: f64 = report["statusCodeDistribution"]
        .as_object()?
        .values()
        .filter_map(serde_json::Value::as_f64)
        .sum();
    let good = report["statusCodeDistribution"]["200"]
        .as_f64()
        .unwrap_or_default();
    Some(Report {
        requests_per_second: summary["requestsPerSec"].as_f64()?,
        requests,
        // Requests that were in progress at the end are not failures.
        failures: requests - good
            + errors?
                .iter()
                .filter(|(why, _)| !why.contains("deadline"))
                .filter_map(|(_, number)| number.as_f64())
                .sum::<f64>(),
        p50: report["latencyPercentiles"]["p50"].as_f64()? * 1e3,
        p99: report["latencyPercentiles"]["p99"].as_f64()? * 1e3,
    })
}

/// The numbers in a text like `connect 0, read 1`.
fn numbers(text: &str) -> impl Iterator<Item = f64> {
    text.split([' ', ',']).filter_map(|word| word.parse().ok())
}

/// A text like `1.5ms`.
fn milliseconds(text: &str) -> Option<f64> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic())?);
    let factor = match unit {
        "us" => 1e-3,
        "ms" => 1.0,
        "s" => 1e3,
        "m" => 60e3,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

/// A free port of this machine. The caller should bind it soon.
fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port())
}

/// Waits until the address accepts connections.
async fn listening(address: &str) -> anyhow::Result<()> {
    for _ in 0..200 {
        if TcpStream::connect(address).await.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    bail!("nothing is listening at {address}")
}

/// The local service: nginx if it is installed, which can serve the long body too, and reads uploads to their end before it answers.
async fn origin(executables: &Path, work: &Path) -> anyhow::Result<(Process, String, bool)> {
    let address = format!("127.0.0.1:{}", free_port()?);
    let Some(nginx) = find(work, "nginx") else {
        let demo = Process::start(
            Command::new(executables.join("examples/demo")).arg(&address),
            Output::None,
        )?;
        listening(&address).await?;
        return Ok((demo, address, false));
    };
    let files = work.join("files");
    std::fs::create_dir(&files)?;
    std::fs::write(files.join("short"), vec![b'x'; SHORT])?;
    std::fs::write(files.join("long"), vec![b'x'; LONG])?;
    let configuration = work.join("nginx.conf");
    let places: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|of| format!("{of}_temp_path {}/{of};", work.display()))
        .collect();
    // One process, so that none is left when it is killed.
    let text = format!(
        "daemon off; master_process off; error_log stderr crit; pid {work}/nginx.pid;\nevents {{ worker_connections 1024; }}\n\
         http {{ access_log off; sendfile on; tcp_nodelay on; keepalive_requests 100000000; {places}\n\
         server {{ listen {address}; root {files};\n\
         location = /taken {{ return 200; }}\n\
         location = /upload {{ proxy_pass http://{address}/taken; proxy_pass_request_body off; proxy_set_header Content-Length \"\";\n\
         client_max_body_size {LONG}; client_body_buffer_size {LONG}; }} }} }}\n",
        work = work.display(),
        files = files.display(),
    );
    std::fs::write(&configuration, text)?;
    let nginx = Process::start(
        Command::new(nginx).arg("-c").arg(&configuration),
        Output::None,
    )?;
    listening(&address).await?;
    Ok((nginx, address, true))
}

async fn tunnel(executables: &Path, origin: &str) -> anyhow::Result<Setup> {
    let (service, endpoint) = processes::server(executables, &[]).await?;
    let (agent, url) = processes::agent(executables, &endpoint, None, origin).await?;
    Ok(Setup {
        name: "tunnel-local and ttf",
        url,
        processes: vec![("tunnel-local", service), ("ttf", agent)],
    })
}

/// bore relays TCP connections: no HTTP, no names, no certificates.
async fn bore(tools: &Path, origin: &str) -> anyhow::Result<Option<Setup>> {
    let Some(bore) = find(tools, "bore") else {
        return Ok(None);
    };
    let port = free_port()?.to_string();
    let server = Process::start(
        Command::new(&bore).args(["server", "--min-port", "1024"]),
        Output::None,
    )?;
    listening("127.0.0.1:7835").await?;
    let (host, origin_port) = origin.split_once(':').context("an address with a port")?;
    let mut local = Command::new(&bore);
    local.args([
        "local",
        "--local-host",
        host,
        "--to",
        "127.0.0.1",
        "--port",
        &port,
        origin_port,
    ]);
    let local = Process::start(&mut local, Output::None)?;
    listening(&format!("127.0.0.1:{port}")).await?;
    Ok(Some(Setup {
        name: "bore",
        url: format!("http://127.0.0.1:{port}"),
        processes: vec![("bore server", server), ("bore local", local)],
    }))
}

/// rathole relays TCP connections too.
async fn rathole(tools: &Path, origin: &str, work: &Path) -> anyhow::Result<Option<Setup>> {
    let Some(rathole) = find(tools, "rathole") else {
        return Ok(None);
    };
    let (control, port) = (free_port()?, free_port()?);
    let token = "default_token = \"bench\"";
    let start = |side: &str, text: String| {
        let configuration = work.join(format!("rathole-{side}.toml"));
        std::fs::write(&configuration, text)?;
        Process::start(
            Command::new(&rathole)
                .arg(format!("--{side}"))
                .arg(configuration),
            Output::None,
        )
    };
    let server = start(
        "server",
        format!(
            "[server]\nbind_addr = \"127.0.0.1:{control}\"\n{token}\n[server.services.bench]\nbind_addr = \"127.0.0.1:{port}\"\n"
        ),
    )?;
    let client = start(
        "client",
        format!(
            "[client]\nremote_addr = \"127.0.0.1:{control}\"\n{token}\n[client.services.bench]\nlocal_addr = \"{origin}\"\n"
        ),
    )?;
    listening(&format!("127.0.0.1:{port}")).await?;
    let processes = vec![("rathole server", server), ("rathole client", client)];
    Ok(Some(Setup {
        name: "rathole",
        url: format!("http://127.0.0.1:{port}"),
        processes,
    }))
}
