//! Measures everything and writes docs/performance.md. `make bench` builds the executables first. With
//! an argument, `local` or `cloud`, it only prints that part. With `--allow-missing` it measures without the tunnels that are not
//! installed, and only prints.

use std::{
    fmt::Write as _,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::Context;
use tunnel_bench::{
    cloud::{Cloud, FUNCTIONS},
    cost::Usage,
    latency::{self, Latency},
    load::{self, Timings, Visitor},
    meter::Counts,
    one_machine,
    origin::Origin,
    processes,
};

/// How many cold starts of each function are measured.
const COLD: usize = 25;
/// How many times the reply connection is broken.
const BROKEN: usize = 20;
/// Warm-up requests before a measurement, for each visitor.
const WARM_UP: usize = 15;

const MILLION: f64 = 1e6;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let (executables, tools) = (processes::built()?, root.join(".tools/bin"));
    let part = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    let may_miss = std::env::args().any(|argument| argument == "--allow-missing");
    let is_wanted = |name| part.as_deref().is_none_or(|part| part == name);
    if is_wanted("local") {
        one_machine::check(&tools, may_miss)?;
    }
    let mut page = format!("{HEAD}\n{}\n", machine()?);
    if is_wanted("local") {
        let deployed = executables.with_file_name("deployed");
        let figures = one_machine::measure(&executables, &deployed, &tools, say).await?;
        write!(
            page,
            "\n## On one machine\n\n{ONE_MACHINE}\n{figures}{PROFILE}"
        )?;
    }
    if is_wanted("cloud") {
        write!(
            page,
            "\n## In AWS\n\n{}\n{}",
            in_aws(),
            cloud(&executables).await?
        )?;
    }
    say(&page);
    if part.is_some() || may_miss {
        return Ok(());
    }
    let file = root.join("docs/performance.md");
    std::fs::write(&file, page).with_context(|| format!("cannot write {}", file.display()))?;
    say("docs/performance.md is written");
    Ok(())
}

const HEAD: &str = "# Performance

`make bench` writes this page. Compare the figures with each other only: they come from one machine on one day.
";

const ONE_MACHINE: &str =
    "`tunnel-local` and `ttf` are built as `make dist` builds them, optimized for what they did under some load. The load generator,
all processes and the local service share the machine. bore and rathole relay TCP connections and do not read HTTP. Times of 40 ms at
one connection look like stalls of theirs, in which Nagle's algorithm at one end waits for an acknowledgement that the other end delays.
";

/// Measured by hand.
const PROFILE: &str = include_str!("../profile.md");

fn in_aws() -> String {
    format!(
        "The functions' executables run as they do in Lambda: one event at a time in each environment, frozen in between. A stand-in on
this machine (`bench/`) replaces the rest of AWS. Its services take as long as AWS's do within a Region, each 85 to 125 % of: HTTP API
{} ms each way, WebSocket API {} ms, Lambda {} ms, @connections {} ms, DynamoDB {} to {} ms, a handshake {} ms. The visitor, the agent
and the local service are on the same machine: add the round trips between each of them and the Region. The functions run on a
processor of this machine, which is more than Lambda gives a function of {} MB, and which they share with everything else that is
measured. The cost is computed from what was counted, with the prices of [cost.md](cost.md).
",
        latency::HTTP_API,
        latency::WEBSOCKET_API,
        latency::INVOKE,
        latency::POST,
        latency::of_dynamodb("GetItem"),
        latency::of_dynamodb("TransactWriteItems"),
        latency::HANDSHAKE,
        tunnel_bench::lambda::MEMORY,
    )
}

/// What is measured through the stand-in.
struct Scene {
    cloud: Cloud,
    url: String,
    streaming_url: String,
}

async fn cloud(executables: &Path) -> anyhow::Result<String> {
    let log = executables.join("bench-functions.log");
    let cloud = Cloud::start(executables, &log, Latency::Aws).await?;
    let origin = Origin::start().await?;
    let (_agent, url) = processes::agent(
        executables,
        &cloud.agent_endpoint,
        Some(("TTF_TOKEN", &cloud.token)),
        &origin.address,
    )
    .await?;
    let streaming_url = url.replace(&cloud.http_api, &cloud.function_url);
    let scene = Scene {
        cloud,
        url,
        streaming_url,
    };
    let text = [
        scene.steady().await?,
        scene.cold().await?,
        scene.broken().await?,
    ]
    .concat();
    scene.cloud.stop().await;
    Ok(text)
}

impl Scene {
    /// Requests through environments that are warm.
    async fn steady(&self) -> anyhow::Result<String> {
        let mut times = String::from(
            "| response | at once | p50 ms | p99 ms | failures | messages | calls | forward ms | default ms | reads | writes | USD a million |\n\
             |---|---|---|---|---|---|---|---|---|---|---|---|\n",
        );
        for (name, path, length, requests, at_once, is_streamed) in [
            ("1 KiB", "bytes", 1024, 400, 1, false),
            ("1 KiB", "bytes", 1024, 1000, 10, false),
            ("32 KiB", "bytes", 32 * 1024, 200, 1, false),
            ("32 KiB", "bytes", 32 * 1024, 500, 10, false),
            ("100 KiB", "bytes", 100 * 1024, 200, 1, false),
            ("100 KiB", "bytes", 100 * 1024, 500, 10, false),
            ("100 KiB of JSON", "json", 100 * 1024, 200, 1, false),
            ("100 KiB of JSON", "json", 100 * 1024, 500, 10, false),
            ("1 MiB", "bytes", 1024 * 1024, 100, 1, false),
            ("1 MiB", "bytes", 1024 * 1024, 100, 10, false),
            ("1 KiB, function URL", "bytes", 1024, 200, 1, true),
            ("1 MiB, function URL", "bytes", 1024 * 1024, 100, 1, true),
        ] {
            let base = if is_streamed {
                &self.streaming_url
            } else {
                &self.url
            };
            let url = format!("{base}/{path}/{length}");
            load::run(&url, length, WARM_UP * at_once, at_once).await;
            self.cloud.meter.settled().await;
            self.cloud.meter.reset();
            let timings = load::run(&url, length, requests, at_once).await;
            self.cloud.meter.settled().await;
            let counts = self.cloud.meter.read();
            say(&format!(
                "{name}, {at_once} at once: {:?} {:?}",
                timings.quantile(0.5),
                timings.failures.last()
            ));
            line(&mut times, name, at_once, &timings, &counts, requests)?;
        }
        Ok(format!(
            "{times}\nThe reads are lookups: each environment looks up a tunnel with visitors every 5 s. Messages are counted in units of 32 KiB: in, \
             out\nto the agent, and on to `forward`.\n"
        ))
    }

    /// Requests for which no environment exists yet.
    async fn cold(&self) -> anyhow::Result<String> {
        let (visitor, url) = (Visitor::default(), format!("{}/bytes/1024", self.url));
        let (mut first, mut second) = (Vec::new(), Vec::new());
        self.cloud.meter.settled().await;
        self.cloud.meter.reset();
        for _ in 0..COLD {
            self.cloud.lambda.retire_environments();
            first.push(visitor.fetch(&url, 1024).await?);
            second.push(visitor.fetch(&url, 1024).await?);
            // The reply connection is open by then; opening it started the other functions.
            while self.cloud.websocket.break_reply_connections() == 0 {
                visitor.fetch(&url, 1024).await?;
            }
            self.cloud.meter.settled().await;
        }
        let counts = self.cloud.meter.read();
        let mut text = format!(
            "\nThe first request through new environments took {} ms (median of {COLD}; longest {} ms), the second {} ms. From the\n\
             start of an executable to its first poll:\n\n| function | starts | median ms | longest ms |\n|---|---|---|---|\n",
            ms(median(&mut first)),
            ms(longest(&first)),
            ms(median(&mut second)),
        );
        for function in FUNCTIONS {
            let mut starts = counts.of(function).starts;
            writeln!(
                text,
                "| {function} | {} | {} | {} |",
                starts.len(),
                ms(median(&mut starts)),
                ms(longest(&starts))
            )?;
        }
        Ok(text)
    }

    /// Requests after `forward`'s reply connection broke.
    async fn broken(&self) -> anyhow::Result<String> {
        let (visitor, url) = (Visitor::default(), format!("{}/bytes/1024", self.url));
        let (mut took, mut failures) = (Vec::new(), 0);
        load::run(&url, 1024, WARM_UP, 1).await;
        for _ in 0..BROKEN {
            while self.cloud.websocket.break_reply_connections() == 0 {
                visitor.fetch(&url, 1024).await?;
            }
            self.cloud.meter.settled().await;
            match visitor.fetch(&url, 1024).await {
                Ok(time) => took.push(time),
                Err(_) => failures += 1,
            }
        }
        let (median, longest) = (median(&mut took), longest(&took));
        Ok(format!(
            "\nOf {BROKEN} requests after `forward`'s reply connection broke, {failures} failed; they took {} ms (median; longest {} ms).\n",
            ms(median),
            ms(longest)
        ))
    }
}

fn line(
    table: &mut String,
    name: &str,
    at_once: usize,
    timings: &Timings,
    counts: &Counts,
    requests: usize,
) -> std::fmt::Result {
    let usage = Usage::of(counts, requests);
    let [p50, p99] = [0.5, 0.99].map(|share| ms(timings.quantile(share)));
    let [forward, default] = ["tunnel-forward", "tunnel-default"]
        .map(|function| ms(median(&mut counts.of(function).calls)));
    let Usage {
        messages,
        calls,
        reads,
        writes,
        ..
    } = usage;
    writeln!(
        table,
        "| {name} | {at_once} | {p50} | {p99} | {} | {messages:.2} | {calls:.2} | {forward} | {default} | {reads:.3} | {writes:.3} | {:.2} |",
        timings.failures.len(),
        usage.bill().sum() * MILLION
    )
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn longest(times: &[Duration]) -> Duration {
    times.iter().max().copied().unwrap_or_default()
}

fn ms(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1e3)
}

/// The machine, the date, and how busy it was.
fn machine() -> anyhow::Result<String> {
    let said = |program: &str, arguments: &[&str]| -> anyhow::Result<String> {
        let output = Command::new(program)
            .args(arguments)
            .output()
            .with_context(|| format!("cannot start {program}"))?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let read = |file: &str| std::fs::read_to_string(PathBuf::from(file)).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown processor", |(_, name)| name.trim());
    let load = read("/proc/loadavg")
        .split(' ')
        .next()
        .unwrap_or_default()
        .to_owned();
    let cores = std::thread::available_parallelism()?;
    let (date, kernel) = (said("date", &["-u", "+%F"])?, said("uname", &["-sr"])?);
    Ok(format!(
        "{date}, {kernel}, {model}, {cores} cores; load average {load} when it began, from other work on the machine."
    ))
}

fn say(text: &str) {
    // stdout may be closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}
