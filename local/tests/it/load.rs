//! Many at once.

use forwarder::settings::Settings;
use http::StatusCode;
use tokio::{net::TcpListener, task::JoinSet};

use crate::harness::{Agent, Origin, agent, get, post, settings, stack, within};

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_requests_fifty_at_once_are_neither_lost_nor_mixed_up() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let agent = agent(&stack, &origin).await;

    let mut visitors = JoinSet::new();
    for visitor in 0..50 {
        let url = agent.url.clone();
        visitors.spawn(async move {
            for round in 0..20 {
                let body = format!("{visitor}-{round}").repeat(1 + (visitor * 20 + round) % 97);
                let got = post(&format!("{url}/{visitor}/{round}"), body.clone()).await;
                assert_eq!(
                    (got.status, &got.body[..]),
                    (StatusCode::OK, body.as_bytes())
                );
            }
        });
    }
    while let Some(visitor) = visitors.join_next().await {
        visitor.expect("no visitor failed");
    }

    assert_eq!(origin.count(), 1000);
}

// On one thread, so that the agent reads many requests before it can write.
#[tokio::test]
async fn every_visitor_refused_by_a_busy_agent_gets_an_error() {
    let (stack, silent) = (
        stack().await,
        TcpListener::bind("127.0.0.1:0").await.expect("a port"),
    );
    let settings = settings(&stack, silent.local_addr().expect("an address"));
    let agent = Agent::online(Settings {
        max_concurrent: 1,
        ..settings
    })
    .await;

    let mut visitors = JoinSet::new();
    for visitor in 0..400 {
        let url = format!("{}/{visitor}", agent.url);
        visitors.spawn(async move { get(&url).await });
    }
    for _ in 0..399 {
        let got = within("a refusal", visitors.join_next())
            .await
            .expect("a visitor")
            .expect("an answer");
        assert_eq!(
            (got.status, got.error()),
            (StatusCode::SERVICE_UNAVAILABLE, Some("agent_busy"))
        );
    }
}
