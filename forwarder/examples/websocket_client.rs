//! A WebSocket client of the crate tungstenite, for `make web`. `websocket_client URL` plays the script of `.ci/web/matrix.test.js`
//! with the server at the address, and writes what it saw to stdout, as JSON.

use std::{
    env,
    io::{self, Write},
};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{
        self, Message,
        client::IntoClientRequest,
        protocol::{
            CloseFrame,
            frame::{
                Frame,
                coding::{CloseCode, Data, OpCode},
            },
        },
    },
};

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

const LARGE_BYTES: usize = 1_000_000;

async fn open(url: &str, protocols: &str) -> tungstenite::Result<(Socket, Value)> {
    let mut request = url.into_client_request()?;
    let headers = request.headers_mut();
    headers.insert("sec-websocket-protocol", protocols.parse()?);
    let (socket, response) = connect_async(request).await?;
    let protocol = response.headers().get("sec-websocket-protocol");
    let protocol = protocol.and_then(|protocol| protocol.to_str().ok());
    Ok((socket, json!(protocol)))
}

/// The next message: its kind and what is in it.
async fn next(socket: &mut Socket) -> Value {
    match socket.next().await {
        Some(Ok(Message::Text(text))) => json!(["text", text.as_str()]),
        Some(Ok(Message::Binary(bytes))) => json!(["binary", bytes.to_vec()]),
        Some(Ok(Message::Pong(bytes))) => json!(["pong", bytes.to_vec()]),
        Some(Ok(Message::Close(Some(frame)))) => {
            json!(["close", u16::from(frame.code), frame.reason.as_str()])
        }
        other => json!(["other", format!("{other:?}")]),
    }
}

async fn play(url: &str) -> tungstenite::Result<Vec<Value>> {
    let (mut socket, protocol) = open(url, "chat, other").await?;
    let mut saw = vec![protocol];
    let bytes: Vec<u8> = (0..=255).cycle().take(70_000).collect();
    for message in [
        Message::text("hello"),
        Message::text(""),
        Message::text("x".repeat(LARGE_BYTES)),
        Message::binary(bytes),
        Message::text("größer"),
    ] {
        socket.send(message).await?;
        saw.push(next(&mut socket).await);
    }
    for (opcode, text, is_last) in [
        (Data::Text, "in ", false),
        (Data::Continue, "three ", false),
        (Data::Continue, "parts", true),
    ] {
        let frame = Frame::message(text, OpCode::Data(opcode), is_last);
        socket.send(Message::Frame(frame)).await?;
    }
    saw.push(next(&mut socket).await);
    socket.send(Message::text("fragments")).await?;
    saw.push(next(&mut socket).await);
    let ping = Message::Ping("are you there".into());
    socket.send(ping).await?;
    saw.push(next(&mut socket).await);
    let frame = CloseFrame {
        code: CloseCode::from(4321),
        reason: "that was it".into(),
    };
    socket.close(Some(frame)).await?;
    saw.push(next(&mut socket).await);
    // Until the connection has ended, the server may not know that it has.
    while let Some(Ok(_)) = socket.next().await {}
    drop(socket);
    let (mut socket, protocol) = open(url, "chat").await?;
    saw.push(protocol);
    for message in ["last close", "close"] {
        socket.send(Message::text(message)).await?;
        saw.push(next(&mut socket).await);
    }
    Ok(saw)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = env::args().nth(1).ok_or("usage: websocket_client URL")?;
    let saw = play(&url).await?;
    writeln!(io::stdout(), "{}", Value::from(saw))?;
    Ok(())
}
