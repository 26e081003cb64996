//! Visitors: each sends its next request as soon as it has the response to the last one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::bail;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{task::JoinSet, time::timeout};

/// Longer than any front makes a visitor wait.
const PATIENCE: Duration = Duration::from_secs(40);

/// How long the responses took.
#[derive(Clone, Debug)]
pub struct Timings {
    /// Shortest first, without failures.
    sorted: Vec<Duration>,
    /// How many requests failed, and why the last did.
    pub failures: Vec<String>,
}

impl Timings {
    /// What the visitors say: how long each response took, and what failed.
    async fn of(visitors: JoinSet<(Vec<Duration>, Vec<String>)>) -> Self {
        let (mut sorted, mut failures) = (Vec::new(), Vec::new());
        for (took, failed) in visitors.join_all().await {
            sorted.extend(took);
            failures.extend(failed);
        }
        sorted.sort_unstable();
        Self { sorted, failures }
    }

    /// The time within which this share of the responses came; zero if there were none.
    pub fn quantile(&self, share: f64) -> Duration {
        let rank = self
            .sorted
            .iter()
            .enumerate()
            .find(|(index, _)| (index + 1) as f64 >= share * self.sorted.len() as f64);
        rank.map(|(_, took)| *took).unwrap_or_default()
    }
}

/// Fetches a URL `requests` times, `at_once` at a time. A response other than 200 with `length` bytes is a failure.
pub async fn run(url: &str, length: usize, requests: usize, at_once: usize) -> Timings {
    let left = Arc::new(AtomicUsize::new(requests));
    let mut visitors = JoinSet::new();
    for _ in 0..at_once {
        let (left, url) = (left.clone(), url.to_owned());
        visitors.spawn(async move {
            let client = Visitor::default();
            let (mut took, mut failures) = (Vec::new(), Vec::new());
            while left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                    left.checked_sub(1)
                })
                .is_ok()
            {
                match client.fetch(&url, length).await {
                    Ok(time) => took.push(time),
                    Err(error) => failures.push(format!("{error:#}")),
                }
            }
            (took, failures)
        });
    }
    Timings::of(visitors).await
}

/// Fetches a URL `per_second` times a second for this time, over `at_once` connections, however long the responses take. Each takes
/// from when its request was due.
pub async fn at_rate(
    url: &str,
    length: usize,
    per_second: f64,
    time: Duration,
    at_once: usize,
) -> Timings {
    let began = tokio::time::Instant::now();
    let mut visitors = JoinSet::new();
    for number in 0..at_once {
        let url = url.to_owned();
        visitors.spawn(async move {
            let client = Visitor::default();
            let (mut took, mut failures) = (Vec::new(), Vec::new());
            for request in (number..).step_by(at_once) {
                let due = Duration::from_secs_f64(request as f64 / per_second);
                if due >= time {
                    break;
                }
                tokio::time::sleep_until(began + due).await;
                match client.fetch(&url, length).await {
                    Ok(_) => took.push(began.elapsed().saturating_sub(due)),
                    Err(error) => failures.push(format!("{error:#}")),
                }
            }
            (took, failures)
        });
    }
    Timings::of(visitors).await
}

/// A visitor with a persistent connection.
#[derive(Clone, Debug)]
pub struct Visitor(Client<HttpConnector, Empty<Bytes>>);

impl Default for Visitor {
    fn default() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Self(Client::builder(TokioExecutor::new()).build(connector))
    }
}

impl Visitor {
    /// Fetches a URL and returns how long that took.
    ///
    /// # Errors
    /// If the response is not 200 with `length` bytes.
    pub async fn fetch(&self, url: &str, length: usize) -> anyhow::Result<Duration> {
        let since = Instant::now();
        let fetched = timeout(PATIENCE, async {
            let response = self.0.get(url.parse()?).await?;
            let status = response.status();
            anyhow::Ok((status, response.into_body().collect().await?.to_bytes()))
        });
        let (status, body) = fetched.await??;
        if status != 200 || body.len() != length {
            let start: String = String::from_utf8_lossy(&body).chars().take(200).collect();
            bail!("{status} with {} bytes for {length}: {start}", body.len());
        }
        Ok(since.elapsed())
    }
}
