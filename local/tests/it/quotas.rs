//! API Gateway's quotas, each at the limit and on both sides of it.

use std::time::Duration;

use bytes::Bytes;
use futures_util::sink;
use local::{Options, Server, Transport};
use serde_json::json;
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_tungstenite::tungstenite::{
    self, Message,
    protocol::frame::{
        Frame,
        coding::{Data, OpCode},
    },
};
use tunnel_local_aws::{
    caller::AccessKey,
    management::{self, Connection, ConnectionCommand, ConnectionRegistry, SocketConnection},
    quotas::Quotas,
};
use tunnel_protocol::{
    id::ConnectionId,
    limits::{MAX_FRAME_BYTES, MAX_MESSAGE_BYTES},
    writer::MessageWriter,
};
use tunnel_service::{
    agents::{AgentConnections, PostError},
    aws::sdk,
};

use crate::{
    harness::{ScriptedAgent, post, stack, stack_with},
    websocket::{one_process, stack_as},
};

/// A ping of exactly this many bytes.
fn ping(length: usize) -> String {
    let bare = json!({ "type": "ping", "pad": "" }).to_string();
    json!({ "type": "ping", "pad": "x".repeat(length - bare.len()) }).to_string()
}

/// Sends a text in frames of at most this many bytes.
async fn send_in_frames(agent: &mut ScriptedAgent, text: String, longest: usize) {
    let mut rest = Bytes::from(text);
    let mut data = Data::Text;
    while !rest.is_empty() {
        let frame = rest.split_to(rest.len().min(longest));
        agent
            .send(Message::Frame(Frame::message(
                frame,
                OpCode::Data(data),
                rest.is_empty(),
            )))
            .await;
        data = Data::Continue;
    }
}

/// That a ping of this many bytes is answered, or else that the connection is closed.
async fn expect_taken(agent: &mut ScriptedAgent, length: usize, is_allowed: bool) {
    if is_allowed {
        assert_eq!(agent.hear().await, json!({ "type": "pong" }), "{length}");
    } else {
        assert_eq!(agent.close_code().await, 1009, "{length}");
    }
}

#[tokio::test]
async fn a_frame_over_32_kib_closes_the_connection() {
    let stack = stack().await;
    for (length, is_allowed) in [
        (MAX_FRAME_BYTES - 1, true),
        (MAX_FRAME_BYTES, true),
        (MAX_FRAME_BYTES + 1, false),
    ] {
        let mut agent = ScriptedAgent::connect(&stack, "").await;
        send_in_frames(&mut agent, ping(length), usize::MAX).await;
        expect_taken(&mut agent, length, is_allowed).await;
    }
}

#[tokio::test]
async fn an_agent_that_announces_long_frames_may_send_them_where_api_gateway_has_no_part_in_it() {
    for (transport, longest) in [
        (Transport::InProcess, MAX_MESSAGE_BYTES),
        (Transport::Emulated, MAX_FRAME_BYTES),
    ] {
        let stack = stack_as(transport).await;
        for (length, is_allowed) in [(longest, true), (longest + 1, false)] {
            let (mut agent, is_agreed) = ScriptedAgent::with_long_frames(&stack).await;
            assert_eq!(is_agreed, transport == Transport::InProcess);
            send_in_frames(&mut agent, ping(length), usize::MAX).await;
            expect_taken(&mut agent, length, is_allowed).await;
        }
    }
}

#[tokio::test]
async fn bodies_come_in_one_frame_to_an_agent_that_reads_that_and_to_no_other() {
    let stack = one_process().await;
    for (features, can_read) in [(&["binary"][..], true), (&["binary", "long_frames"], false)] {
        let mut agent = ScriptedAgent::for_frames_of(&stack, MAX_FRAME_BYTES).await;
        let established = agent
            .ready(&json!({ "type": "ready", "features": features }))
            .await;
        let announced = established["features"].as_array().expect("features");
        assert!(announced.contains(&json!("long_frames")), "{established}");
        let url = format!(
            "{}/{}/x",
            stack.public_url,
            established["tunnel_id"].as_str().expect("an id")
        );
        let mut upload = JoinSet::new();
        upload.spawn(async move { post(&url, vec![b'x'; 2 * MAX_FRAME_BYTES]).await });
        assert_eq!(agent.can_read().await, can_read, "{features:?}");
    }
}

#[tokio::test]
async fn a_message_over_128_kib_closes_the_connection() {
    let stack = stack().await;
    for (length, is_allowed) in [
        (MAX_MESSAGE_BYTES - 1, true),
        (MAX_MESSAGE_BYTES, true),
        (MAX_MESSAGE_BYTES + 1, false),
    ] {
        let mut agent = ScriptedAgent::connect(&stack, "").await;
        send_in_frames(&mut agent, ping(length), MAX_FRAME_BYTES).await;
        expect_taken(&mut agent, length, is_allowed).await;
    }
}

#[tokio::test]
async fn a_binary_frame_closes_the_connection() {
    let stack = stack().await;
    let mut agent = ScriptedAgent::connect(&stack, "").await;
    agent
        .send(Message::binary(&b"{\"type\":\"ping\"}"[..]))
        .await;
    assert_eq!(agent.close_code().await, 1003);
}

async fn impatient(quotas: Quotas) -> Server {
    stack_with(Options {
        quotas,
        ..Options::default()
    })
    .await
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let stack = impatient(Quotas {
        idle: Duration::from_millis(50),
        ..Quotas::default()
    })
    .await;
    assert_eq!(
        ScriptedAgent::connect(&stack, "").await.close_code().await,
        1001
    );
}

#[tokio::test]
async fn a_connection_is_closed_at_the_end_of_its_life_however_busy() {
    let stack = impatient(Quotas {
        life: Some(Duration::from_millis(200)),
        ..Quotas::default()
    })
    .await;
    let mut agent = ScriptedAgent::connect(&stack, "").await;
    agent.say(&json!({ "type": "ping" })).await;
    assert_eq!(agent.hear().await, json!({ "type": "pong" }));
    assert_eq!(agent.close_code().await, 1001);
}

/// @connections with its key, as the functions see it.
async fn management(
    connections: ConnectionRegistry,
    quotas: Quotas,
    key: &str,
) -> (AgentConnections, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = format!(
        "ws://{}/{}",
        listener.local_addr().expect("an address"),
        management::STAGE
    )
    .parse()
    .expect("an endpoint");
    let router = management::router(connections, quotas, AccessKey::only("the key"));
    let mut serving = JoinSet::new();
    serving.spawn(async move { axum::serve(listener, router).await.expect("served") });
    (
        AgentConnections::managed(&sdk::for_loopback("http://127.0.0.1:9", key), &endpoint),
        serving,
    )
}

/// A message whose JSON has exactly this many bytes.
fn text(length: usize) -> String {
    "x".repeat(length - 2)
}

#[tokio::test]
async fn a_connection_is_gone_until_its_upgrade_has_finished_and_after_its_end() {
    let connections = ConnectionRegistry::default();
    let (api, _serving) = management(connections.clone(), Quotas::default(), "the key").await;
    let id: ConnectionId = "abc=".parse().expect("an id");
    assert!(matches!(api.post(&id, &"x").await, Err(PostError::Gone)));

    let (commands, mut sent) = mpsc::channel(1);
    connections.insert(id.clone(), commands);
    api.post(&id, &"x").await.expect("taken");
    assert!(matches!(sent.recv().await, Some(ConnectionCommand::Send(text)) if text == "\"x\""));

    connections.remove(&id);
    assert!(matches!(api.post(&id, &"x").await, Err(PostError::Gone)));
}

#[tokio::test]
async fn a_message_to_an_agent_is_at_most_128_kib_long() {
    let connections = ConnectionRegistry::default();
    let (commands, _sent) = mpsc::channel(8);
    let id: ConnectionId = "abc=".parse().expect("an id");
    connections.insert(id.clone(), commands);
    // One byte shorter than what the client itself would send, so that the other side has to refuse.
    let quotas = Quotas {
        message: MAX_MESSAGE_BYTES - 1,
        ..Quotas::default()
    };
    for (quotas, limit) in [
        (Quotas::default(), MAX_MESSAGE_BYTES),
        (quotas, MAX_MESSAGE_BYTES - 1),
    ] {
        let (api, _serving) = management(connections.clone(), quotas, "the key").await;
        for length in [limit - 1, limit] {
            api.post(&id, &text(length)).await.expect("taken");
        }
        assert!(
            matches!(api.post(&id, &text(limit + 1)).await, Err(PostError::TooLarge(length)) if length == limit + 1)
        );
    }
}

#[tokio::test]
async fn a_connection_whose_agent_does_not_read_accepts_a_limited_number_of_messages() {
    let connections = ConnectionRegistry::default();
    let (api, _serving) = management(connections.clone(), Quotas::default(), "the key").await;
    let (commands, _unread) = mpsc::channel(1);
    let id: ConnectionId = "abc=".parse().expect("an id");
    connections.insert(id.clone(), commands);
    api.post(&id, &"one").await.expect("taken");
    assert!(matches!(api.post(&id, &"two").await, Err(PostError::Busy)));
}

/// A connection whose socket takes this long for each of its first frames, and nothing after them.
fn slow_connection(
    per_frame: Duration,
    frames: usize,
    writing: &mut JoinSet<()>,
) -> SocketConnection {
    let sink = sink::unfold(frames, move |left, _: Message| async move {
        let Some(left) = left.checked_sub(1) else {
            return std::future::pending().await;
        };
        sleep(per_frame).await;
        Ok::<_, tungstenite::Error>(left)
    });
    let (sender, writer) = MessageWriter::new(Box::pin(sink), None);
    writing.spawn(async move {
        let _ = writer.run().await;
    });
    SocketConnection::new(sender)
}

#[tokio::test(start_paused = true)]
async fn a_message_waits_for_its_turn_as_long_as_the_agent_reads_however_many_are_before_it() {
    const PATIENCE: Duration = Duration::from_secs(10);
    let mut writing = JoinSet::new();
    let connection = slow_connection(Duration::from_secs(4), usize::MAX, &mut writing);
    let mut uploads = JoinSet::new();
    let begin = Instant::now();
    for _ in 0..10 {
        let connection = connection.clone();
        uploads.spawn(async move {
            connection
                .send("x".repeat(MAX_FRAME_BYTES).into(), PATIENCE)
                .await
        });
    }
    while let Some(sent) = uploads.join_next().await {
        sent.expect("no panic").expect("sent");
    }
    assert!(begin.elapsed() > 3 * PATIENCE, "the agent was not slow");
}

#[tokio::test(start_paused = true)]
async fn a_message_is_refused_once_the_agent_has_read_nothing_for_as_long_as_its_sender_waits() {
    const PATIENCE: Duration = Duration::from_secs(10);
    let mut writing = JoinSet::new();
    let connection = slow_connection(Duration::from_secs(4), 1, &mut writing);
    let begin = Instant::now();
    let long = || "x".repeat(MAX_FRAME_BYTES);
    for _ in 0..3 {
        connection
            .send(long().into(), PATIENCE)
            .await
            .expect("room");
    }
    assert_eq!(begin.elapsed(), Duration::from_secs(4));
    let refused = connection.send(long().into(), PATIENCE).await;
    assert!(matches!(refused, Err(PostError::Busy)), "{refused:?}");
    assert_eq!(begin.elapsed(), Duration::from_secs(4) + PATIENCE);
}

#[tokio::test]
async fn other_users_of_the_machine_cannot_send_to_agents() {
    let connections = ConnectionRegistry::default();
    let (commands, mut sent) = mpsc::channel(1);
    let id: ConnectionId = "abc=".parse().expect("an id");
    connections.insert(id.clone(), commands);
    let (api, _serving) = management(connections, Quotas::default(), "a guess").await;
    assert!(matches!(
        api.post(&id, &"x").await,
        Err(PostError::Failed { .. })
    ));
    assert!(api.close(&id).await.is_err());
    assert!(
        sent.try_recv().is_err(),
        "the connection was told something"
    );
}

#[tokio::test]
async fn other_users_of_the_machine_cannot_read_the_tables() {
    use aws_sdk_dynamodb::Client;
    let (tasks, stop) = (
        tokio_util::task::TaskTracker::new(),
        tokio_util::sync::CancellationToken::new(),
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = format!("http://{}", listener.local_addr().expect("an address"));
    tunnel_local_aws::dynamodb::serve(
        tunnel_local_aws::dynamodb::open(None).expect("an engine"),
        listener,
        AccessKey::only("the key"),
        &tasks,
        &stop,
    );

    let list = async |key| {
        Client::new(&sdk::for_loopback(&address, key))
            .list_tables()
            .send()
            .await
    };
    assert!(list("the key").await.is_ok());
    for other in ["a guess", "the", "the key and more"] {
        let error = list(other).await.expect_err("a refusal");
        assert!(
            format!("{error:?}").contains("UnrecognizedClientException"),
            "{error:?}"
        );
    }
    stop.cancel();
}

/// AWS's numbers as its documentation has them, and what is derived from them. Everything else, the stand-in included, uses the
/// constants, so that a wrong one would go unnoticed.
#[test]
fn the_limits_are_those_that_aws_documents() {
    use tunnel_protocol::limits;
    assert_eq!(limits::MAX_FRAME_BYTES, 32_768);
    assert_eq!(limits::MAX_MESSAGE_BYTES, 131_072);
    assert_eq!(limits::WEBSOCKET_IDLE_TIMEOUT.as_secs(), 600);
    assert_eq!(limits::WEBSOCKET_LIFETIME.as_secs(), 7_200);
    assert_eq!(limits::WEBSOCKET_INTEGRATION_TIMEOUT.as_secs(), 29);
    assert_eq!(limits::HTTP_API_TIMEOUT.as_secs(), 30);
    assert_eq!(limits::MAX_LAMBDA_PAYLOAD_BYTES, 6_291_556);
    assert_eq!(limits::LAMBDA_TIMEOUT.as_secs(), 900);
    assert_eq!(limits::MAX_PART_BYTES, 97_776);
    assert_eq!(limits::MAX_DECOMPRESSED_BYTES, 391_104);
    assert_eq!(limits::INITIAL_WINDOW_PARTS, 32);
    assert_eq!(limits::MAX_REORDER_PARTS, 64);
}
