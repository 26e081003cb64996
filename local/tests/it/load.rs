//! Many at once.

use forwarder::settings::Settings;
use futures_util::FutureExt;
use http::StatusCode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinSet,
};

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

#[tokio::test]
async fn an_agent_has_no_more_requests_at_its_local_service_than_it_may() {
    const AT_ONCE: usize = 8;
    const VISITORS: usize = 60;
    let (stack, local_service) = (
        stack().await,
        TcpListener::bind("127.0.0.1:0").await.expect("a port"),
    );
    let settings = settings(&stack, local_service.local_addr().expect("an address"));
    let agent = Agent::online(Settings {
        max_concurrent: AT_ONCE,
        ..settings
    })
    .await;

    // Twice, because the places of the first requests must be free again.
    for round in 0..2 {
        let mut visitors = JoinSet::new();
        for visitor in 0..VISITORS {
            let url = format!("{}/{round}/{visitor}", agent.url);
            visitors.spawn(async move { get(&url).await });
        }
        for _ in 0..VISITORS - AT_ONCE {
            let got = within("a refusal", visitors.join_next()).await;
            assert_eq!(
                got.expect("a visitor").expect("an answer").error(),
                Some("agent_busy")
            );
        }
        let mut requests = Vec::new();
        for _ in 0..AT_ONCE {
            let accepted = within("a request", local_service.accept()).await;
            requests.push(accepted.expect("a connection").0);
        }
        assert!(local_service.accept().now_or_never().is_none(), "one more");
        for mut request in requests {
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            request.write_all(answer).await.expect("sent");
            // Closed with the request unread, the connection would be reset.
            request.shutdown().await.expect("ended");
            let mut unread = Vec::new();
            within("the end of the request", request.read_to_end(&mut unread))
                .await
                .expect("read");
        }
        while let Some(got) = within("an answer", visitors.join_next()).await {
            assert_eq!(got.expect("an answer").status, StatusCode::OK);
        }
    }
}
