//! The functions as they are, between an API Gateway, a DynamoDB and agents of which nothing can be relied on: events, messages and
//! calls are late, overtake each other, come twice or not at all; calls are carried out although their answer is lost; functions
//! die between two steps. Then it becomes calm, and the tunnel must be right.
//!
//! Time is virtual and there is one thread, so that what happens follows from a seed alone. `ADVERSARY_SEED=n` repeats one,
//! `ADVERSARY_SEEDS=n` sets how many are tried.

#![allow(clippy::panic, reason = "a storm that leaves damage ends here")]
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "so does this")]

mod agent;
mod cloud;
mod weather;
mod wire;

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::{
    agent::{Agent, PING_INTERVAL, Record},
    cloud::{Answer, Cloud},
    weather::Weather,
};

/// How many seeds are tried.
const SEEDS: u64 = if cfg!(debug_assertions) { 20 } else { 1000 };
/// How long a storm lasts.
const STORM: Duration = Duration::from_secs(90);
/// What is on its way when it becomes calm has arrived after this time: a call is tried three times for 5 s, in a function that may
/// take 29 s, of which an event may be late by 12 s.
const SETTLING: Duration = Duration::from_secs(75);
/// How many visitors there are in a storm.
const VISITORS: usize = 6;

#[expect(clippy::disallowed_methods, reason = "the suite's own setting")]
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn the_tunnel_is_right_after_any_storm() {
    let seeds = match setting("ADVERSARY_SEED") {
        Some(seed) => {
            // What agents and functions do is shown.
            tracing_subscriber::fmt().without_time().init();
            seed..seed + 1
        }
        None => 0..setting("ADVERSARY_SEEDS").unwrap_or(SEEDS),
    };
    let began = Instant::now();
    let mut failures = Vec::new();
    for seed in seeds.clone() {
        let damage = storm(seed);
        if !damage.is_empty() {
            println!("ADVERSARY_SEED={seed}: {}", damage.join("; "));
            failures.push(seed);
        }
    }
    println!("{} seeds in {:.1?}", seeds.count(), began.elapsed());
    assert!(failures.is_empty(), "seeds that fail: {failures:?}");
}

/// One storm, and what is wrong after it.
fn storm(seed: u64) -> Vec<String> {
    // The pauses between the SDK's tries.
    fastrand::seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let scene = Scene::begin(seed).await;
        let answers = scene.storm().await;
        scene.damage(&answers).await
    })
}

/// Two agents and their visitors.
struct Scene {
    cloud: Cloud,
    agents: [Record; 2],
    /// Whether both agents are of one owner.
    is_one_owner: bool,
}

impl Scene {
    async fn begin(seed: u64) -> Self {
        let weather = Weather::new(seed);
        let cloud = Cloud::start(weather.clone()).await;
        let alice = cloud.create_token("alice").await;
        let bob = cloud.create_token("bob").await;
        let is_one_owner = !weather.one_in(4);
        let agents = [Record::default(), Record::default()];
        let tokens = [alice.clone(), if is_one_owner { alice } else { bob }];
        for (index, (record, token)) in agents.iter().zip(tokens).enumerate() {
            let agent = Agent {
                cloud: cloud.clone(),
                token,
                record: record.clone(),
                restlessness: weather.time(STORM),
            };
            let start = weather.time(STORM);
            cloud.spawn(async move {
                // The first has the name before the second comes.
                if index > 0 {
                    sleep(Duration::from_secs(1) + start).await;
                }
                agent.run().await;
            });
        }
        Self {
            cloud,
            agents,
            is_one_owner,
        }
    }

    /// Lets it storm, and returns what visitors were answered, by number.
    async fn storm(&self) -> Vec<Answer> {
        sleep(Duration::from_millis(900)).await;
        let weather = self.cloud.weather();
        weather.set_calm(false);
        let mut visits = tokio::task::JoinSet::new();
        for number in 0..VISITORS {
            let (cloud, at) = (self.cloud.clone(), weather.time(STORM));
            visits.spawn(async move {
                sleep(at).await;
                (number, cloud.visit(number).await)
            });
        }
        sleep(STORM).await;
        weather.set_calm(true);
        let mut answers = visits.join_all().await;
        answers.sort_by_key(|(number, _)| *number);
        sleep(SETTLING + 2 * PING_INTERVAL).await;
        answers.into_iter().map(|(_, answer)| answer).collect()
    }

    /// What is wrong once everything has arrived.
    async fn damage(&self, answers: &[Answer]) -> Vec<String> {
        let mut damage = Vec::new();
        self.check_agents(&mut damage).await;
        self.check_requests(answers, &mut damage);
        if damage.is_empty() {
            let answer = self.cloud.visit(VISITORS).await;
            if answer.status != 200 {
                damage.push(format!("O2: a visitor after the storm got {answer:?}"));
            }
        }
        damage
    }

    async fn check_agents(&self, damage: &mut Vec<String>) {
        let serving = self.cloud.serving().await.map(|id| id.to_string());
        let mut believing: Vec<(String, u64)> = self
            .agents
            .iter()
            .filter_map(|agent| agent.lock().serving.clone())
            .collect();
        believing.sort_by_key(|(_, connected_at)| *connected_at);
        for (connection, _) in &believing {
            if serving.as_ref() != Some(connection) {
                damage.push(format!(
                    "O3: the agent of {connection} believes that it serves, the table says {serving:?}"
                ));
            }
        }
        match believing.last() {
            None => {
                let ended = self.agents.each_ref().map(|agent| agent.lock().ended);
                damage.push(format!("O1: no agent is left; they ended: {ended:?}"));
            }
            Some(_) if serving.is_none() => {
                damage.push("O4: an agent is there and the tunnel is offline".to_owned());
            }
            Some((newest, _)) if serving.as_ref() != Some(newest) => {
                damage.push(format!("O2: {newest} is the newest"));
            }
            Some(_) => {}
        }
        let second = self.agents[1].lock();
        if !self.is_one_owner && (second.has_served || !second.executed.is_empty()) {
            damage.push("O7: another owner's agent has served".to_owned());
        }
        let first = self.agents[0].lock();
        if first.ended.is_some() && !second.has_served {
            damage.push("O1: the agent ended and no other has served".to_owned());
        }
    }

    fn check_requests(&self, answers: &[Answer], damage: &mut Vec<String>) {
        let executed: Vec<usize> = self
            .agents
            .iter()
            .flat_map(|agent| agent.lock().executed.clone())
            .collect();
        for (number, answer) in answers.iter().enumerate() {
            let times = executed.iter().filter(|other| **other == number).count();
            let is_nothing_done = matches!(answer.status, 429 | 503 | 404);
            if times > 1 {
                damage.push(format!(
                    "O6: request {number} was carried out {times} times"
                ));
            } else if times == 1 && is_nothing_done {
                damage.push(format!(
                    "O6: request {number} was carried out and answered {answer:?}"
                ));
            } else if times == 0 && answer.status == 200 {
                damage.push(format!("request {number} was answered by nobody"));
            }
        }
    }
}
