//! The verdict: what visitors got, against what was wrong at the time, and what the local service did.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write,
    time::Duration,
};

use http::{Method, StatusCode};

use crate::{
    fault::Spell,
    visit::{Outcome, Visit},
    world::{World, lock, panics, tail},
};

/// Where errors are documented.
const ERRORS: &str = include_str!("../../docs/errors.md");
/// How much memory a process may have more than at its start. What several hundred visitors at once took, some 85 MB of
/// `tunnel-local`, does not go back to the system.
const GROWTH_KB: u64 = 128 * 1024;
/// Connections that a process may have accepted and not closed when nobody makes requests any more: an agent that moves has three.
const IDLE_CONNECTIONS: usize = 6;
/// Failures that are shown whole.
const SHOWN: usize = 12;

/// What was found. Empty if all is well.
#[derive(Debug, Default)]
pub(crate) struct Findings(Vec<String>);

impl Findings {
    pub(crate) fn add(&mut self, finding: impl Into<String>) {
        self.0.push(finding.into());
    }

    /// Prints the verdict and tells whether all is well.
    pub(crate) fn verdict(&self, world: &World) -> bool {
        if self.0.is_empty() {
            println!("all checks passed");
            return true;
        }
        println!("\n{} FAILURES", self.0.len());
        for finding in self.0.iter().take(SHOWN) {
            println!("- {finding}");
        }
        if self.0.len() > SHOWN {
            let all = world.logs.join("findings.log");
            println!("- and {} more: {}", self.0.len() - SHOWN, all.display());
            if let Err(error) = std::fs::write(&all, self.0.join("\n")) {
                println!("  which cannot be written: {error}");
            }
        }
        for name in ["tunnel-local", "ttf", "local-service"] {
            println!(
                "\nthe end of {name}.log:\n{}",
                tail(&world.logs.join(format!("{name}.log")), 15)
            );
        }
        println!("\nlogs: {}", world.logs.display());
        false
    }

    /// Every visit got the right bytes, or an error that a fault explains.
    pub(crate) fn of_visits(&mut self, world: &World, spells: &[Spell]) {
        let documented = documented();
        for visit in &world.load.visits() {
            let meanwhile =
                |spell: &&Spell| spell.began <= visit.ended && visit.began <= spell.over;
            let mut now = spells.iter().filter(meanwhile);
            let problem = match &visit.outcome {
                Outcome::Right | Outcome::Left => continue,
                Outcome::Wrong(why) => why.clone(),
                Outcome::Refused(status, code) => {
                    if documented.get(code.as_str()) != Some(status) {
                        format!("{status} {code} is not documented")
                    } else if now.any(|spell| spell.allows(code)) {
                        continue;
                    } else {
                        format!("{status} {code}, which no fault explains")
                    }
                }
                Outcome::Broken(_) if now.any(|spell| spell.breaks()) => continue,
                Outcome::Broken(why) => format!("broke, which no fault explains: {why}"),
            };
            self.add(format!(
                "{}: {problem}\n{}",
                describe(world, visit),
                around(world, visit, spells)
            ));
        }
    }

    /// No POST was carried out twice, and no upload that was cut passed as whole.
    pub(crate) fn of_ledger(&mut self, world: &World) {
        let ledger = std::fs::read_to_string(&world.ledger).unwrap_or_default();
        let visits: HashMap<u64, Visit> = world
            .load
            .visits()
            .into_iter()
            .map(|visit| (visit.plan.wish.number, visit))
            .collect();
        let mut posts: HashMap<u64, u32> = HashMap::new();
        let name = |number: u64| {
            visits
                .get(&number)
                .map_or(format!("request {number}"), |visit| describe(world, visit))
        };
        for line in ledger.lines() {
            let number = || {
                line.rsplit(' ')
                    .next()
                    .and_then(|number| number.parse::<u64>().ok())
                    .unwrap_or_default()
            };
            match line.split(' ').next().unwrap_or_default() {
                "start-POST" => *posts.entry(number()).or_default() += 1,
                "corrupt" => self.add(format!(
                    "{}: the local service took another upload for its own",
                    name(number())
                )),
                "stray" => self.add(format!("the local service got what nobody sent: {line}")),
                _ => {}
            }
        }
        for (number, times) in &posts {
            if *times > 1 {
                self.add(format!("{}: carried out {times} times", name(*number)));
            }
        }
        for visit in visits
            .values()
            .filter(|visit| visit.outcome == Outcome::Right && visit.plan.method == Method::POST)
        {
            if !posts.contains_key(&visit.plan.wish.number) {
                self.add(format!(
                    "{}: answered, but the local service never saw it",
                    describe(world, visit)
                ));
            }
        }
    }

    /// The tunnel was back in time after each fault, and what was to end has ended.
    pub(crate) fn of_spells(&mut self, world: &World, spells: &[Spell]) {
        for spell in spells {
            for problem in &spell.problems {
                self.add(format!("{problem}: {}", line(world, spell)));
            }
            let limit = spell.back_within();
            match spell.back_after {
                Some(time) if time <= limit => {}
                Some(time) => self.add(format!(
                    "back only after {time:.1?}, the limit is {limit:?}: {}",
                    line(world, spell)
                )),
                None => self.add(format!(
                    "the tunnel did not come back: {}",
                    line(world, spell)
                )),
            }
        }
    }

    /// Nothing is left of the load, and all end as they should.
    pub(crate) async fn of_the_end(&mut self, world: &World) {
        let mut left = None;
        let mut connections = [0, 0];
        for _ in 0..60 {
            left = world.open_requests().await;
            connections = world.accepted();
            if left == Some(0) && connections.iter().all(|count| *count <= IDLE_CONNECTIONS) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        if left != Some(0) {
            self.add(format!(
                "30 s after the last request the local service has {left:?} open"
            ));
        }
        for (count, name) in connections.iter().zip(["tunnel-local", "local-service"]) {
            if *count > IDLE_CONNECTIONS {
                self.add(format!(
                    "30 s after the last request {name} has {count} connections"
                ));
            }
        }
        for process in world.processes() {
            let mut process = lock(process);
            let (memory, name) = (process.measure(), process.name);
            let at_start = process.at_start.unwrap_or(memory);
            println!(
                "{name}: {:.1} MB at its start, {:.1} at the end, {:.1} at most",
                mb(at_start),
                mb(memory),
                mb(process.peak)
            );
            if memory > at_start + GROWTH_KB {
                self.add(format!(
                    "{name} has {:.1} MB, at its start it had {:.1}",
                    mb(memory),
                    mb(at_start)
                ));
            }
            if let Some(status) = process.ended() {
                self.add(format!("{name} ended by itself: {status}"));
            }
            for panic in panics(&process.log()).iter().take(3) {
                self.add(format!("{name} logged: {panic}"));
            }
        }
        for process in [&world.agent, &world.service] {
            let mut process = lock(process);
            match process.terminate() {
                Ok(status) if status.success() => {}
                Ok(status) => self.add(format!("{} was asked to end: {status}", process.name)),
                Err(error) => self.add(format!("{} was asked to end: {error}", process.name)),
            }
        }
    }
}

/// Prints how many visits ended how.
pub(crate) fn summary(world: &World) {
    let (mut ends, mut slowest, mut slowest_error) = (
        BTreeMap::<String, u32>::new(),
        Duration::ZERO,
        Duration::ZERO,
    );
    let visits = world.load.visits();
    for visit in &visits {
        let took = visit.ended - visit.began;
        let end = match &visit.outcome {
            Outcome::Right => "right".to_owned(),
            Outcome::Left => "left by the visitor".to_owned(),
            Outcome::Refused(_, code) => code.clone(),
            Outcome::Broken(_) => "connection ended".to_owned(),
            Outcome::Wrong(_) => "WRONG".to_owned(),
        };
        if visit.outcome == Outcome::Right {
            slowest = slowest.max(took);
        } else {
            slowest_error = slowest_error.max(took);
        }
        *ends.entry(end).or_default() += 1;
    }
    let ends: Vec<String> = ends
        .iter()
        .map(|(end, count)| format!("{count} {end}"))
        .collect();
    println!("{} requests: {}", visits.len(), ends.join(", "));
    println!("the slowest right answer took {slowest:.1?}, the slowest error {slowest_error:.1?}");
    let waited =
        |visit: &&Visit| matches!(visit.outcome, Outcome::Refused(..) | Outcome::Broken(_));
    if let Some(visit) = visits
        .iter()
        .filter(waited)
        .max_by_key(|visit| visit.ended - visit.began)
    {
        println!(
            "the latter was {}: {:?}",
            describe(world, visit),
            visit.outcome
        );
    }
}

/// One line of the time line.
pub(crate) fn line(world: &World, spell: &Spell) -> String {
    let faults: Vec<String> = spell
        .faults
        .iter()
        .map(|fault| format!("{fault:?}"))
        .collect();
    let back = spell
        .back_after
        .map_or("never".to_owned(), |time| format!("after {time:.2?}"));
    format!(
        "{:7.2} s to {:7.2} s  {}, back {back}",
        world.at(spell.began),
        world.at(spell.ended),
        faults.join(" and ")
    )
}

fn describe(world: &World, visit: &Visit) -> String {
    let wish = &visit.plan.wish;
    format!(
        "request {} ({}, upload {} B, answer {} B), {:.2} s to {:.2} s",
        wish.number,
        visit.plan.kind,
        wish.upload,
        wish.answer,
        world.at(visit.began),
        world.at(visit.ended)
    )
}

/// The faults around a visit.
fn around(world: &World, visit: &Visit, spells: &[Spell]) -> String {
    const MARGIN: Duration = Duration::from_secs(15);
    let mut text = String::new();
    for spell in spells
        .iter()
        .filter(|spell| spell.began <= visit.ended + MARGIN && visit.began <= spell.over + MARGIN)
    {
        let _ = writeln!(text, "      {}", line(world, spell));
    }
    if text.is_empty() {
        "      no fault within 15 s".to_owned()
    } else {
        text.trim_end().to_owned()
    }
}

/// The codes of the table in errors.md, with their statuses.
fn documented() -> HashMap<&'static str, StatusCode> {
    let codes: HashMap<_, _> = ERRORS
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| `")?.split(" | ");
            Some((
                cells.next()?.trim_end_matches('`'),
                cells.next()?.parse().ok()?,
            ))
        })
        .collect();
    assert!(
        codes.len() >= 10,
        "the table of codes in errors.md is not found"
    );
    codes
}

#[expect(clippy::cast_precision_loss, reason = "a rounded figure for people")]
fn mb(kb: u64) -> f64 {
    kb as f64 / 1024.0
}
