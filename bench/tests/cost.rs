//! docs/cost.md is right about the cost of requests: its tables match the formula, and the formula
//! matches what the stand-in counts when the functions' own executables serve a visitor.

#![allow(clippy::panic, reason = "a story that goes wrong ends here")]
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "so does this")]

use std::{path::Path, time::Duration};

use tokio::time::timeout;
use tunnel_bench::{
    cloud::Cloud,
    cost::{self, Usage},
    latency::Latency,
    load::Visitor,
    meter::Counts,
    origin::Origin,
    processes,
};

const PAGE: &str = include_str!("../../docs/cost.md");

#[test]
fn the_tables_of_the_cost_page_match_the_formula() {
    for table in [cost::table(), cost::idle_table(), cost::scenarios_table()] {
        assert!(PAGE.contains(&table), "docs/cost.md should have\n\n{table}");
    }
}

#[test]
fn the_page_has_the_prices_of_logs_and_streams() {
    for price in [cost::price::LOG_GB, cost::price::STREAMED_GB] {
        assert!(
            PAGE.contains(&format!("${price} a GB")) || PAGE.contains(&format!("${price:.2} a GB")),
            "{price}"
        );
    }
}

fn said(log: &Path) -> String {
    std::fs::read_to_string(log).unwrap_or_default()
}

/// What the cheapest of a few requests used. They differ: one may start a new environment, or look up the tunnel again.
async fn cheapest(cloud: &Cloud, url: &str, length: usize) -> (Usage, Counts) {
    let visitor = Visitor::default();
    let mut used = Vec::new();
    for _ in 0..5 {
        cloud.meter.settled().await;
        cloud.meter.reset();
        visitor.fetch(url, length).await.expect("an answer");
        cloud.meter.settled().await;
        let counts = cloud.meter.read();
        used.push((Usage::of(&counts, 1), counts));
    }
    used.into_iter()
        .min_by(|(a, _), (b, _)| a.bill().sum().total_cmp(&b.bill().sum()))
        .expect("five")
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_through_the_functions_executables_match_the_formula() {
    let executables = processes::build().expect("executables");
    let work = tempfile::tempdir().expect("a directory");
    let log = work.path().join("functions.log");
    let story = async {
        let cloud = Cloud::start(&executables, &log, Latency::Zero)
            .await
            .expect("a stand-in");
        let origin = Origin::start().await.expect("a local service");
        let (_agent, url) = processes::agent(
            &executables,
            &cloud.agent_endpoint,
            Some(("TTF_TOKEN", &cloud.token)),
            &origin.address,
        )
        .await
        .unwrap_or_else(|error| panic!("{error:#}; the functions logged: {}", said(&log)));
        // The first requests find no reply connection yet.
        let visitor = Visitor::default();
        while cloud.meter.read().units_relayed == 0 {
            cloud.meter.settled().await;
            visitor
                .fetch(&format!("{url}/bytes/1024"), 1024)
                .await
                .expect("an answer");
        }
        for bytes in [1024, 32 * 1024, 100 * 1024] {
            let (used, counts) = cheapest(&cloud, &format!("{url}/bytes/{bytes}"), bytes).await;
            let expected = Usage::of_response(bytes, bytes, used.milliseconds, 0.0);
            assert_eq!(
                used,
                Usage {
                    milliseconds: used.milliseconds,
                    ..expected
                },
                "{bytes} bytes: {counts:?}"
            );
            assert_eq!(counts.dynamodb_requests, 0, "{bytes} bytes: {counts:?}");
        }
        // JSON is compressed, into one message each way.
        let (used, counts) = cheapest(&cloud, &format!("{url}/json/102400"), 102_400).await;
        assert_eq!((used.messages, used.calls), (3.0, 2.0), "{counts:?}");
        // The function URL streams its responses, and does not use the HTTP API.
        let streamed = url.replace(&cloud.http_api, &cloud.function_url);
        let (used, counts) = cheapest(&cloud, &format!("{streamed}/bytes/1024"), 1024).await;
        assert_eq!(
            (used.http_calls, used.messages, counts.url_requests),
            (0.0, 3.0, 1),
            "{counts:?}"
        );
        // A request is served even without a reply connection.
        assert_ne!(cloud.websocket.break_reply_connections(), 0);
        visitor
            .fetch(&format!("{url}/bytes/1024"), 1024)
            .await
            .expect("an answer");
        cloud.stop().await;
    };
    timeout(Duration::from_secs(60), story)
        .await
        .unwrap_or_else(|_| panic!("timed out; the functions logged: {}", said(&log)));
}
