//! Many at once.

use http::StatusCode;
use tokio::task::JoinSet;

use crate::harness::{Origin, agent, post, stack};

#[tokio::test(flavor = "multi_thread")]
async fn of_a_thousand_requests_at_fifty_at_once_none_is_lost_or_crossed() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let agent = agent(&stack, &origin).await;

    let mut visitors = JoinSet::new();
    for visitor in 0..50 {
        let url = agent.url.clone();
        visitors.spawn(async move {
            for round in 0..20 {
                let body = format!("{visitor}-{round}").repeat(1 + (visitor * 20 + round) % 97);
                let got = post(&format!("{url}/{visitor}/{round}"), body.clone()).await;
                assert_eq!((got.status, &got.body[..]), (StatusCode::OK, body.as_bytes()));
            }
        });
    }
    while let Some(visitor) = visitors.join_next().await {
        visitor.expect("no visitor failed");
    }

    assert_eq!(origin.count(), 1000);
}
