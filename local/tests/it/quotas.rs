//! API Gateway's quotas, each at the limit and on both sides of it.

use std::time::Duration;

use bytes::Bytes;
use local::{Options, Stack, quotas::Quotas};
use serde_json::json;
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::frame::{
        Frame,
        coding::{Data, OpCode},
    },
};
use tunnel_shared::limits::{WEBSOCKET_FRAME, WEBSOCKET_MESSAGE};

use crate::harness::{ScriptedAgent, stack, stack_with};

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
        agent.send(Message::Frame(Frame::message(frame, OpCode::Data(data), rest.is_empty()))).await;
        data = Data::Continue;
    }
}

#[tokio::test]
async fn a_frame_over_32_kib_closes_the_connection() {
    let stack = stack().await;
    for (length, is_allowed) in [(WEBSOCKET_FRAME - 1, true), (WEBSOCKET_FRAME, true), (WEBSOCKET_FRAME + 1, false)] {
        let mut agent = ScriptedAgent::connect(&stack, "").await;
        send_in_frames(&mut agent, ping(length), usize::MAX).await;
        if is_allowed {
            assert_eq!(agent.hear().await, json!({ "type": "pong" }), "{length}");
        } else {
            assert_eq!(agent.close_code().await, 1009, "{length}");
        }
    }
}

#[tokio::test]
async fn a_message_over_128_kib_closes_the_connection() {
    let stack = stack().await;
    for (length, is_allowed) in [(WEBSOCKET_MESSAGE - 1, true), (WEBSOCKET_MESSAGE, true), (WEBSOCKET_MESSAGE + 1, false)] {
        let mut agent = ScriptedAgent::connect(&stack, "").await;
        send_in_frames(&mut agent, ping(length), WEBSOCKET_FRAME).await;
        if is_allowed {
            assert_eq!(agent.hear().await, json!({ "type": "pong" }), "{length}");
        } else {
            assert_eq!(agent.close_code().await, 1009, "{length}");
        }
    }
}

#[tokio::test]
async fn a_binary_frame_closes_the_connection() {
    let stack = stack().await;
    let mut agent = ScriptedAgent::connect(&stack, "").await;
    agent.send(Message::binary(&b"{\"type\":\"ping\"}"[..])).await;
    assert_eq!(agent.close_code().await, 1003);
}

async fn impatient(quotas: Quotas) -> Stack {
    stack_with(Options { quotas, ..Options::default() }).await
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let stack = impatient(Quotas { idle: Duration::from_millis(50), ..Quotas::default() }).await;
    assert_eq!(ScriptedAgent::connect(&stack, "").await.close_code().await, 1001);
}

#[tokio::test]
async fn a_connection_is_closed_at_the_end_of_its_life_however_busy() {
    let stack = impatient(Quotas { life: Duration::from_millis(200), ..Quotas::default() }).await;
    let mut agent = ScriptedAgent::connect(&stack, "").await;
    agent.say(&json!({ "type": "ping" })).await;
    assert_eq!(agent.hear().await, json!({ "type": "pong" }));
    assert_eq!(agent.close_code().await, 1001);
}
