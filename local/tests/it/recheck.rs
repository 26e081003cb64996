//! Who may stay is asked again and again, costs nothing while nothing changes, and is noticed whatever it is that changes.

use std::{path::Path, time::Duration};

use forwarder::{
    settings::{Secret, Settings},
    tunnel::TunnelError,
};
use local::{Options, Server};
use serde_json::{Value, json};
use tokio::time::sleep;
use tunnel_local_aws::quotas::Quotas;
use tunnel_service::{auth::AuthMode, now};

use crate::{
    executable::admin,
    harness::{Agent, Origin, ScriptedAgent, settings, within},
    operator::{metrics, watched},
};

const RECHECK: Duration = Duration::from_millis(20);

/// A server that asks for tokens, with its data in this directory, or else in memory.
async fn server(data: Option<&Path>) -> Server {
    watched(Options {
        auth: AuthMode::Token,
        data: data.map(Path::to_owned),
        quotas: Quotas {
            recheck: RECHECK,
            ..Quotas::default()
        },
        ..Options::default()
    })
    .await
}

/// Returns once nobody has been looked up in the time of ten checks.
async fn left_alone(stack: &Server) {
    let lookups = async || {
        let name = r#"tunnel_table_operation_seconds_count{operation="BatchGetItem"}"#;
        metrics(stack).await[name]
    };
    within("connections to be left alone", async {
        let mut before = lookups().await;
        loop {
            sleep(10 * RECHECK).await;
            let after = lookups().await;
            // Not before they were looked up at all.
            if after > 0.0 && before.to_bits() == after.to_bits() {
                return;
            }
            before = after;
        }
    })
    .await;
}

/// An agent with a token of its own that `expires`, and that has been left alone by now.
async fn idle_agent(stack: &Server, origin: &Origin, expires: Option<Duration>) -> Agent {
    let token = stack.tokens().create("idle", expires, now()).await;
    let token = Secret::from(token.expect("a token"));
    let agent = Agent::online(Settings {
        token: Some(token),
        ..settings(stack, origin.address)
    })
    .await;
    left_alone(stack).await;
    agent
}

/// What can be written while an agent is idle, and ends its connection.
#[derive(Clone, Copy, Debug)]
enum Change {
    Revoked,
    Released,
}

#[tokio::test]
async fn an_idle_agent_is_left_alone_until_something_is_written() {
    for change in [Change::Revoked, Change::Released] {
        let directory = tempfile::tempdir().expect("a directory");
        for data in [None, Some(directory.path())] {
            let (stack, origin) = (server(data).await, Origin::echo().await);
            let mut agent = idle_agent(&stack, &origin, None).await;
            match change {
                Change::Revoked => {
                    assert_eq!(stack.tokens().revoke("idle").await.expect("revoked"), 1);
                }
                Change::Released => {
                    let id = "my-app".parse().expect("an id");
                    assert!(stack.tunnels().release(&id).await.expect("released"));
                }
            }
            let end = agent.ended().await;
            let expected = match (change, &end) {
                (Change::Revoked, Err(TunnelError::Unauthorized)) => true,
                (Change::Released, Err(TunnelError::Replaced(reason))) => {
                    reason.contains("released")
                }
                _ => false,
            };
            assert!(expected, "{change:?}, {data:?}: {end:?}");
            stack.stop().await;
        }
    }
}

#[tokio::test]
async fn what_tunnel_admin_writes_to_the_data_directory_is_noticed() {
    let directory = tempfile::tempdir().expect("a directory");
    let (stack, origin) = (server(Some(directory.path())).await, Origin::echo().await);
    let mut agent = idle_agent(&stack, &origin, None).await;

    let revoked = admin(directory.path(), &["revoke-token", "idle"]).await;
    assert!(revoked.status.success(), "{revoked:?}");

    assert_eq!(agent.ended().await, Err(TunnelError::Unauthorized));
}

#[tokio::test]
async fn a_token_that_expires_is_noticed_though_nothing_is_written() {
    let (stack, origin) = (server(None).await, Origin::echo().await);
    let mut agent = idle_agent(&stack, &origin, Some(Duration::from_secs(5))).await;
    assert_eq!(agent.ended().await, Err(TunnelError::Unauthorized));
}

#[tokio::test]
async fn one_who_is_idle_may_stay_when_another_one_has_to_leave() {
    let (stack, origin) = (server(None).await, Origin::echo().await);
    let other = stack.create_token("other").await.expect("a token");
    let mut leaving = idle_agent(&stack, &origin, None).await;
    let staying = Agent::online(Settings {
        token: Some(Secret::from(other)),
        tunnel_id: Some("other".parse().expect("an id")),
        ..settings(&stack, origin.address)
    })
    .await;
    left_alone(&stack).await;
    stack.tokens().revoke("idle").await.expect("revoked");
    assert_eq!(leaving.ended().await, Err(TunnelError::Unauthorized));
    left_alone(&stack).await;
    staying.stop().await.expect("stopped as asked");
}

#[tokio::test]
async fn a_connection_that_its_agent_has_left_is_left_alone() {
    let stack = server(None).await;
    let token = stack.create_token("ours").await.expect("a token");
    let connect = async |ready: Value| {
        let agent = ScriptedAgent::try_connect(&stack, "?tunnel_id=my-app", Some(&token));
        let mut agent = agent.await.expect("a connection");
        let established = agent.ready(&ready).await;
        (agent, established["connection_id"].clone())
    };
    let mut ready = json!({ "type": "ready", "features": ["notices"] });
    let (mut left, id) = connect(ready.clone()).await;
    ready["previous"] = id;
    let (mut serving, _) = connect(ready).await;
    left_alone(&stack).await;
    left.expect_quiet("it may finish what it has").await;
    serving.expect_quiet("it serves").await;
}
