//! What is done to a world, from its start to the verdict.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use tokio::time::{Instant, interval, sleep, sleep_until, timeout};

use crate::{
    Cli, Scenario,
    check::{Findings, line, summary},
    fault::{AGE, Fault, Spell},
    visit::{Outcome, Plan},
    world::{World, lock},
};

/// After the last fault load goes on for this long.
const CALM_END: Duration = Duration::from_secs(5);
/// A request without a fault takes less.
const QUICK: Duration = Duration::from_secs(1);
/// How long the network is silent in [`outage`].
const OUTAGE: Duration = Duration::from_secs(60);

/// Runs what the command line asks for, and tells whether all is well.
pub(crate) async fn run(cli: Cli) -> anyhow::Result<bool> {
    let seed = cli
        .seed
        .unwrap_or_else(|| rand::rng().random_range(0..1_000_000));
    println!("seed {seed}");
    match cli.scenario.as_ref().unwrap_or(&Scenario::Faults) {
        Scenario::Faults | Scenario::Service { .. } => faults(&cli, seed).await,
        Scenario::Rollovers => rollovers(&cli, seed).await,
        Scenario::Outage => outage(&cli, seed).await,
        Scenario::Soak => soak(&cli, seed).await,
    }
}

async fn faults(cli: &Cli, seed: u64) -> anyhow::Result<bool> {
    let world = World::start(cli, Some(AGE)).await?;
    let end = Instant::now() + cli.time();
    let load = world
        .load
        .come(cli.rate.unwrap_or(40), end, seed, Plan::random);
    let (spells, ()) = tokio::join!(
        async { measured(&world, happen(&world, cli, seed, end)).await },
        load
    );
    let spells = spells?;

    summary(&world);
    let slowest = spells
        .iter()
        .filter(|spell| !spell.faults.contains(&Fault::ForgetConnections))
        .filter_map(|spell| spell.back_after)
        .max();
    println!(
        "{} faults; the tunnel was back after at most {:.2?}",
        spells.len(),
        slowest.unwrap_or_default()
    );
    let mut findings = Findings::default();
    findings.of_spells(&world, &spells);
    findings.of_visits(&world, &spells);
    findings.of_ledger(&world);
    findings.of_the_end(&world).await;
    Ok(finish(&world, cli, &findings))
}

/// Faults in random order, each kind once before any comes again, with calm between them.
async fn happen(world: &World, cli: &Cli, seed: u64, end: Instant) -> anyhow::Result<Vec<Spell>> {
    let mut random = StdRng::seed_from_u64(seed);
    let wanted = wanted(world, cli)?;
    let (mut deck, mut spells) = (Vec::new(), Vec::new());
    loop {
        sleep(Duration::from_millis(random.random_range(1500..4000))).await;
        let left = end
            .saturating_duration_since(Instant::now())
            .saturating_sub(CALM_END);
        if left < Duration::from_secs(3) {
            sleep_until(end).await;
            return Ok(spells);
        }
        if deck.is_empty() {
            deck.clone_from(&wanted);
            deck.shuffle(&mut random);
        }
        let Some(first) = deck.pop() else { continue };
        let mut faults = vec![first];
        if random.random_bool(0.25) {
            faults.extend(
                deck.iter()
                    .rposition(|other| other.place() != first.place())
                    .map(|at| deck.remove(at)),
            );
        }
        let is_long = random.random_bool(0.12) && left > Duration::from_secs(60);
        let time = Duration::from_millis(if is_long {
            random.random_range(26_000..36_000)
        } else {
            random.random_range(200..5000)
        });
        let spell = Spell::run(&faults, world, time.min(left), &mut random).await?;
        println!("{}", line(world, &spell));
        for process in world.processes() {
            let mut process = lock(process);
            if let Some(status) = process.ended() {
                println!(
                    "{} ENDED by itself: {status}; it is started again",
                    process.name
                );
                process.restart(|_| {})?;
            }
        }
        spells.push(spell);
    }
}

/// The faults that are asked for, and that can be done here.
fn wanted(world: &World, cli: &Cli) -> anyhow::Result<Vec<Fault>> {
    let is_asked_for = |fault: &Fault| {
        let name = format!("{fault:?}").to_lowercase();
        cli.only.as_ref().is_none_or(|only| {
            only.split(',')
                .any(|part| name.contains(&part.to_lowercase()))
        })
    };
    let asked_for = Fault::ALL.into_iter().filter(is_asked_for);
    let (wanted, impossible): (Vec<_>, Vec<_>) =
        asked_for.partition(|fault| fault.is_possible(world));
    for fault in impossible {
        println!("{fault:?} is left out: it takes root and unshare, and iptables to drop packets");
    }
    anyhow::ensure!(!wanted.is_empty(), "no fault has such a name");
    Ok(wanted)
}

/// Does something while memory is measured every second.
async fn measured<T>(world: &World, work: impl Future<Output = T>) -> T {
    let measure = async {
        let mut tick = interval(Duration::from_secs(1));
        loop {
            tick.tick().await;
            for process in world.processes() {
                lock(process).measure();
            }
        }
    };
    tokio::select! {
        done = work => done,
        () = measure => unreachable!("measuring does not end"),
    }
}

/// Something small, as people's pages are made of.
fn small(number: u64, random: &mut StdRng) -> Plan {
    let mut plan = Plan::get("get", number, random.random_range(0..30_000));
    plan.wish.is_text = random.random_bool(0.5);
    if random.random_bool(0.3) {
        (plan.kind, plan.method) = ("post", http::Method::POST);
        plan.wish.upload = random.random_range(0..30_000);
    }
    plan
}

async fn rollovers(cli: &Cli, seed: u64) -> anyhow::Result<bool> {
    let world = World::start(cli, Some("10s")).await?;
    let end = Instant::now() + cli.time();
    measured(
        &world,
        world.load.come(cli.rate.unwrap_or(20), end, seed, small),
    )
    .await;
    summary(&world);
    let visits = world.load.visits();
    let slow = visits
        .iter()
        .filter(|visit| visit.ended - visit.began > QUICK)
        .count();
    println!(
        "{} connections took over from another; {slow} requests took longer than {QUICK:?}",
        times_online(&world).saturating_sub(1)
    );
    let mut findings = Findings::default();
    if slow > 0 {
        findings.add(format!("{slow} requests were slow"));
    }
    findings.of_visits(&world, &[]);
    findings.of_ledger(&world);
    findings.of_the_end(&world).await;
    Ok(finish(&world, cli, &findings))
}

/// The network was silent for [`OUTAGE`].
struct Outage {
    /// When the agent said that it was offline, counted from the beginning; `MAX` if it did not.
    noticed_after: Duration,
    spell: Spell,
}

impl Outage {
    /// Silences the network, and waits until the tunnel answers again.
    async fn run(world: &World) -> anyhow::Result<Self> {
        let began = Instant::now();
        silence(world, true)?;
        let noticed = timeout(OUTAGE, until_logged(world, "offline:")).await;
        let noticed_after = noticed.map_or(Duration::MAX, |()| began.elapsed());
        sleep_until(began + OUTAGE).await;
        let ended = Instant::now();
        silence(world, false)?;
        let back_after = world.until_it_answers(Duration::from_secs(60)).await;
        let spell = Spell {
            faults: vec![Fault::DropPackets],
            problems: Vec::new(),
            began,
            ended,
            back_after,
            over: Instant::now() + Duration::from_secs(1),
        };
        Ok(Self {
            noticed_after,
            spell,
        })
    }
}

/// Lets nothing pass between agent and service, or everything again.
fn silence(world: &World, is_silent: bool) -> std::io::Result<()> {
    if world.can_drop_packets {
        return world.drop_packets(is_silent);
    }
    world.network.change(|mode, _| mode.holds = is_silent);
    Ok(())
}

async fn outage(cli: &Cli, seed: u64) -> anyhow::Result<bool> {
    let world = World::start(cli, None).await?;
    let begins = Instant::now() + Duration::from_secs(5);
    let end = begins + OUTAGE + Duration::from_secs(15);
    let (outage, ()) = tokio::join!(
        async {
            sleep_until(begins).await;
            Outage::run(&world).await
        },
        world.load.come(cli.rate.unwrap_or(5), end, seed, small)
    );
    let Outage {
        noticed_after,
        spell,
    } = outage?;
    summary(&world);
    println!(
        "the agent noticed after {noticed_after:.1?}; {}",
        line(&world, &spell)
    );
    let waits = |from: u64, to: u64| {
        let range = spell.began + Duration::from_secs(from)..spell.began + Duration::from_secs(to);
        world
            .load
            .visits()
            .iter()
            .filter(|visit| range.contains(&visit.began))
            .map(|visit| visit.ended - visit.began)
            .max()
            .unwrap_or_default()
    };
    println!(
        "visitors of the first 30 s waited at most {:.1?}, those of the next 30 s {:.1?}",
        waits(0, 30),
        waits(31, 60)
    );
    let mut findings = Findings::default();
    if noticed_after > Duration::from_secs(30) {
        findings.add("the agent did not notice within 30 s");
    }
    if waits(0, 60) > Duration::from_secs(35) {
        findings.add("a visitor waited for more than 35 s");
    }
    findings.of_spells(&world, std::slice::from_ref(&spell));
    findings.of_visits(&world, std::slice::from_ref(&spell));
    findings.of_ledger(&world);
    findings.of_the_end(&world).await;
    Ok(finish(&world, cli, &findings))
}

async fn soak(cli: &Cli, seed: u64) -> anyhow::Result<bool> {
    let world = World::start(cli, Some("10s")).await?;
    let end = Instant::now() + cli.time();
    let report = async {
        let mut tick = interval(Duration::from_secs(15));
        loop {
            tick.tick().await;
            let memory: Vec<String> = world
                .processes()
                .iter()
                .map(|process| {
                    let mut process = lock(process);
                    let memory = process.measure();
                    format!("{} {memory} kB", process.name)
                })
                .collect();
            println!(
                "{:7.2} s  {}; {} requests",
                world.at(Instant::now()),
                memory.join(", "),
                world.load.visits().len()
            );
        }
    };
    tokio::select! {
        () = measured(&world, world.load.come(cli.rate.unwrap_or(200), end, seed, small)) => {}
        () = report => {}
    }
    summary(&world);
    let wrong = world
        .load
        .visits()
        .iter()
        .filter(|visit| visit.outcome != Outcome::Right)
        .count();
    let mut findings = Findings::default();
    if wrong > 0 {
        findings.add(format!("{wrong} requests did not go well"));
    }
    findings.of_visits(&world, &[]);
    findings.of_ledger(&world);
    findings.of_the_end(&world).await;
    Ok(finish(&world, cli, &findings))
}

fn times_online(world: &World) -> usize {
    lock(&world.agent)
        .log()
        .lines()
        .filter(|line| line.starts_with("online:"))
        .count()
}

async fn until_logged(world: &World, text: &str) {
    while !lock(&world.agent).log().contains(text) {
        sleep(Duration::from_millis(50)).await;
    }
}

/// Prints the verdict. Logs are kept if something was found or somebody said where.
fn finish(world: &World, cli: &Cli, findings: &Findings) -> bool {
    let is_well = findings.verdict(world);
    if is_well && cli.logs.is_none() {
        let _ = std::fs::remove_dir_all(&world.logs);
    }
    is_well
}
