//! What a visitor notices while there is load: how long responses take at a constant rate and beside long bodies, and how much
//! memory the processes have meanwhile and afterwards.

use std::{fmt::Write, time::Duration};

use tokio::{task::JoinSet, time::sleep};

use crate::{
    load::{self, Timings, Visitor},
    processes::Process,
};

/// How many connections share the constant rate.
const CONNECTIONS: usize = 32;
/// How long the constant rate is kept up.
const AT_RATE: Duration = Duration::from_secs(8);
/// How many connections carry long bodies.
const LONG_CONNECTIONS: usize = 4;
/// Short requests beside them, one after the other.
const SHORT_REQUESTS: usize = 300;
/// How many connections there are when memory is measured, and requests over them.
const MANY_CONNECTIONS: usize = 256;
const MANY_REQUESTS: usize = 60_000;
/// How long after the load memory is measured again.
const PAUSE: Duration = Duration::from_secs(10);

/// What is between the visitors and the local service.
#[derive(Clone, Copy)]
pub(crate) struct Contestant<'a> {
    /// Its name.
    pub(crate) name: &'a str,
    /// Where its visitors come.
    pub(crate) url: &'a str,
    /// Its processes, with their names.
    pub(crate) processes: &'a [(&'static str, Process)],
}

/// Measures all, and returns tables: `short` bytes are at `/short`, and `long` bytes at `/long`. `per_second` requests
/// a second are the constant rate.
///
/// # Errors
/// If a process has ended.
pub(crate) async fn measure(
    contestants: &[Contestant<'_>],
    per_second: f64,
    (short, long): (usize, usize),
) -> anyhow::Result<String> {
    let mut text = format!(
        "\n{per_second:.0} requests a second over {CONNECTIONS} connections, which is half of what `tunnel-local` and `ttf` can do. \
         Each counts from when it\nwas due, so what waits during a stall counts too. Timers tick every millisecond.\n\n\
         | | p50 ms | p99 ms | p99.9 ms | failed |\n|---|---|---|---|---|\n"
    );
    for contestant in contestants {
        let url = format!("{}/short", contestant.url);
        load::run(&url, short, CONNECTIONS, CONNECTIONS).await;
        let timings = load::at_rate(&url, short, per_second, AT_RATE, CONNECTIONS).await;
        line(&mut text, contestant.name, &timings, &[0.5, 0.99, 0.999])?;
    }
    write!(
        text,
        "\nShort requests, one after the other, while {LONG_CONNECTIONS} connections carry long responses:\n\n\
         | | p50 ms | p99 ms | failed |\n|---|---|---|---|\n"
    )?;
    for contestant in contestants {
        let timings = beside_long(contestant.url, short, long).await;
        line(&mut text, contestant.name, &timings, &[0.5, 0.99])?;
    }
    writeln!(
        text,
        "\nMemory in MB, while {MANY_CONNECTIONS} connections carry short requests and {} s after:\n\n\
         | process | meanwhile | after |\n|---|---|---|",
        PAUSE.as_secs()
    )?;
    for contestant in contestants {
        let url = format!("{}/short", contestant.url);
        let mut most = vec![0.0_f64; contestant.processes.len()];
        let mut load = JoinSet::new();
        load.spawn(async move { load::run(&url, short, MANY_REQUESTS, MANY_CONNECTIONS).await });
        while load.try_join_next().is_none() {
            for ((_, process), most) in contestant.processes.iter().zip(&mut most) {
                *most = most.max(process.memory()?);
            }
            sleep(Duration::from_millis(100)).await;
        }
        sleep(PAUSE).await;
        for ((name, process), most) in contestant.processes.iter().zip(most) {
            let after = process.memory()?;
            writeln!(text, "| {name} | {:.1} | {:.1} |", most / 1e6, after / 1e6)?;
        }
    }
    Ok(text)
}

async fn beside_long(url: &str, short: usize, long: usize) -> Timings {
    let mut bodies = JoinSet::new();
    for _ in 0..LONG_CONNECTIONS {
        let url = format!("{url}/long");
        bodies.spawn(async move {
            let visitor = Visitor::default();
            loop {
                // What matters is that there is load.
                let _ = visitor.fetch(&url, long).await;
            }
        });
    }
    load::run(&format!("{url}/short"), short, SHORT_REQUESTS, 1).await
}

fn line(text: &mut String, name: &str, timings: &Timings, shares: &[f64]) -> std::fmt::Result {
    write!(text, "| {name} |")?;
    for share in shares {
        let milliseconds = timings.quantile(*share).as_secs_f64() * 1e3;
        write!(text, " {milliseconds:.2} |")?;
    }
    writeln!(text, " {} |", timings.failures.len())
}
