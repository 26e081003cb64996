//! How many exchanges the tunnels have, how often and how long: the numbers of `/api/tunnels`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde::Serialize;
use tokio::time::Instant;

use crate::{durations::Durations, lock::lock};

/// How often rates are computed.
const RATE_TICK: Duration = Duration::from_secs(5);
/// Over how many minutes the rates are averaged.
const RATE_MINUTES: [f64; 3] = [1.0, 5.0, 15.0];

/// Counts the exchanges of each tunnel.
#[derive(Debug, Default)]
pub(crate) struct Metrics(Mutex<HashMap<Box<str>, Arc<TunnelMetrics>>>);

/// Counts the exchanges of one tunnel.
#[derive(Debug, Default)]
pub(crate) struct TunnelMetrics(Mutex<Counts>);

#[derive(Debug)]
struct Counts {
    count: u64,
    open: u64,
    since_tick: u32,
    tick: Instant,
    /// Exchanges per second.
    rates: [f64; 3],
    durations: Durations,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            count: 0,
            open: 0,
            since_tick: 0,
            tick: Instant::now(),
            rates: [0.0; 3],
            durations: Durations::default(),
        }
    }
}

/// The numbers of a tunnel. Rates are per second and averaged over so many minutes; percentiles are durations in nanoseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Rates {
    pub count: u64,
    pub rate1: f64,
    pub rate5: f64,
    pub rate15: f64,
    pub p50: u64,
    pub p90: u64,
    pub p95: u64,
    pub p99: u64,
}

impl Metrics {
    /// The numbers of a tunnel.
    pub(crate) fn of(&self, tunnel: &str) -> Arc<TunnelMetrics> {
        let mut tunnels = lock(&self.0);
        tunnels.entry(tunnel.into()).or_default().clone()
    }
}

impl TunnelMetrics {
    /// An exchange has begun.
    pub(crate) fn started(&self) {
        let mut counts = lock(&self.0);
        counts.count += 1;
        counts.open += 1;
        counts.advance();
        counts.since_tick += 1;
    }

    /// An exchange took this long.
    pub(crate) fn took(&self, took: Duration) {
        lock(&self.0).durations.push(took);
    }

    /// An exchange is not going on any more.
    pub(crate) fn closed(&self) {
        let mut counts = lock(&self.0);
        counts.open = counts.open.saturating_sub(1);
    }

    /// The numbers now, and how many exchanges are going on.
    pub(crate) fn now(&self) -> (Rates, u64) {
        let mut counts = lock(&self.0);
        counts.advance();
        (counts.rates(), counts.open)
    }
}

impl Counts {
    /// Brings the averages up to now: each tick they move towards the rate since the last one.
    fn advance(&mut self) {
        let mut ticks = self.tick.elapsed().as_secs() / RATE_TICK.as_secs();
        if ticks == 0 {
            return;
        }
        self.tick += RATE_TICK * u32::try_from(ticks).unwrap_or(u32::MAX);
        // After an hour without exchanges nothing is left of the averages.
        ticks = ticks.min(720);
        let mut rate = f64::from(std::mem::take(&mut self.since_tick)) / RATE_TICK.as_secs_f64();
        for _ in 0..ticks {
            for (average, minutes) in self.rates.iter_mut().zip(RATE_MINUTES) {
                let weight = 1.0 - (-RATE_TICK.as_secs_f64() / 60.0 / minutes).exp();
                *average += weight * (rate - *average);
            }
            rate = 0.0;
        }
    }

    fn rates(&self) -> Rates {
        let percentiles = self.durations.percentiles([50, 90, 95, 99]);
        let [p50, p90, p95, p99] = percentiles
            .unwrap_or_default()
            .map(|took| u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        Rates {
            count: self.count,
            rate1: self.rates[0],
            rate5: self.rates[1],
            rate15: self.rates[2],
            p50,
            p90,
            p95,
            p99,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn rates_follow_the_exchanges_and_fade() {
        let metrics = Metrics::default();
        let tunnel = metrics.of("web");
        for _ in 0..120 {
            for _ in 0..10 {
                tunnel.started();
                tunnel.took(Duration::from_millis(5));
                tunnel.closed();
            }
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        let (rates, open) = metrics.of("web").now();
        assert_eq!(
            (rates.count, open, rates.p50, rates.p99),
            (1200, 0, 5_000_000, 5_000_000)
        );
        assert!((7.0..10.0).contains(&rates.rate1), "{rates:?}");
        assert!(rates.rate15 < rates.rate1);
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert!(tunnel.now().0.rate1 < 0.001);
    }
}
