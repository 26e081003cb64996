//! A visitor's WebSocket whose messages the service carries, where API Gateway holds the connection. The handshake is passed on to
//! the local service like a request; then texts go both ways. What the local service says goes in batches, of which one is on its
//! way at a time: that keeps it in order.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{Response, StatusCode};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::{sync::mpsc, time::timeout};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message, Utf8Bytes,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};
use tracing::info;
use tunnel_protocol::{
    headers::remove_hop_by_hop,
    id::ConnectionId,
    limits::MAX_MESSAGE_BYTES,
    message::{self, AgentErrorCode, Format, FromAgent, HttpRequest, WebsocketBatch},
};

use crate::{
    exchange::{Context, Ended},
    inspector::Recording,
    origin::{OriginBody, OriginError},
    origin_socket::ResponseBody,
    outgoing::Outgoing,
};

/// Messages of a visitor that the local service has not taken yet. With more, its WebSocket is closed.
pub(crate) const MAX_QUEUED_MESSAGES: usize = 256;
/// Bytes of texts, as JSON, that one batch may have: the rest of the message is short.
const MAX_BATCH_BYTES: usize = MAX_MESSAGE_BYTES - 1024;

/// How long the local service has for its side of the closing handshake.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// What the service says about a visitor's WebSocket.
#[derive(Debug)]
pub(crate) enum FromVisitor {
    /// The visitor says this.
    Text(String),
    /// A batch was passed on as far as this.
    Sent {
        /// Its number.
        batch: u32,
        /// How many of its texts.
        delivered: usize,
    },
    /// The visitor has left.
    Closed(Option<u16>),
}

/// Carries a visitor's WebSocket to its end, and returns how the handshake went.
pub(crate) async fn run(
    context: Arc<Context>,
    request: HttpRequest,
    visitor: ConnectionId,
    incoming: mpsc::Receiver<FromVisitor>,
    recording: Recording,
) -> Ended {
    let started = Instant::now();
    let outgoing = Outgoing::about(&request, &context.outgoing, Format::Text);
    let mut carrier = Carrier {
        outgoing: outgoing.clone(),
        visitor,
        bytes: 0,
        next_batch: 0,
        in_flight: None,
        texts: Vec::new(),
        waiting_bytes: 0,
        recording: recording.clone(),
    };
    let outcome = match carrier.open(&context, &request, started).await {
        Ok((status, None)) => Ok(status),
        Ok((status, Some(socket))) => {
            let _open = context.sockets.opened();
            carrier.carry(socket, incoming).await;
            Ok(status)
        }
        Err(failed) => {
            let text = failed.for_user().to_owned();
            outgoing.error(failed.code, failed.message.to_owned()).await;
            Err(text)
        }
    };
    recording.finish(&outcome);
    Ended {
        outcome,
        bytes: carrier.bytes,
        unwritten: None,
    }
}

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// The way from the local service to the visitor.
struct Carrier {
    outgoing: Outgoing,
    visitor: ConnectionId,
    bytes: u64,
    next_batch: u32,
    /// How many texts the batch has that is on its way.
    in_flight: Option<usize>,
    /// What waits for the next batch.
    texts: Vec<String>,
    /// How many bytes of JSON these are.
    waiting_bytes: usize,
    recording: Recording,
}

impl Carrier {
    /// Passes the handshake on, and its answer back. Returns the connection if the local service has accepted it.
    async fn open(
        &self,
        context: &Context,
        request: &HttpRequest,
        started: Instant,
    ) -> Result<(StatusCode, Option<Socket>), OriginError> {
        let addresses = context.origin.addresses(request);
        let limit = context.time_limit(request.deadline_ms);
        let body = OriginBody::Whole(Bytes::new());
        let call = context.origin.call(request, &addresses, body);
        let mut response = timeout(limit, call).await.map_err(|_| {
            OriginError::new(AgentErrorCode::Timeout, "the local service took too long")
        })??;
        let status = response.status();
        remove_hop_by_hop(response.headers_mut());
        addresses.to_public(status, response.headers_mut());
        self.recording.request_sent();
        self.recording.response_head(status, response.headers());
        let took = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let head = self
            .outgoing
            .response(status, response.headers().clone(), took);
        // Before the answer, so that what the visitor then says finds a connection.
        let socket = match status {
            StatusCode::SWITCHING_PROTOCOLS => Some(upgraded(response).await?),
            _ => None,
        };
        if let Some(receipt) = self.outgoing.send(FromAgent::HttpResponse(head)).await {
            // What the local service says must not overtake it.
            let _ = receipt.taken().await;
        }
        Ok((status, socket))
    }

    async fn carry(&mut self, mut socket: Socket, mut incoming: mpsc::Receiver<FromVisitor>) {
        let mut is_open = true;
        while is_open || self.in_flight.is_some() || !self.texts.is_empty() {
            self.send_batch().await;
            tokio::select! {
                said = incoming.recv() => match said {
                    Some(FromVisitor::Text(text)) => {
                        // When it has ended, the next that is read of it says so.
                        let _ = socket.send(Message::text(text)).await;
                    }
                    Some(FromVisitor::Sent { batch, delivered }) => {
                        if batch + 1 == self.next_batch
                            && self.in_flight.take().is_some_and(|sent| delivered < sent)
                        {
                            return close(socket, Some(1001)).await;
                        }
                    }
                    Some(FromVisitor::Closed(code)) => return close(socket, code).await,
                    None => return close(socket, Some(1001)).await,
                },
                said = socket.next(), if is_open && self.waiting_bytes < MAX_BATCH_BYTES => {
                    is_open = self.take(said, &mut socket).await;
                }
            }
        }
        self.outgoing.close_websocket(&self.visitor).await;
    }

    /// Takes what the local service says. Returns whether it may say more.
    async fn take(
        &mut self,
        said: Option<Result<Message, tungstenite::Error>>,
        socket: &mut Socket,
    ) -> bool {
        let text = match said {
            Some(Ok(Message::Text(text))) => text.to_string(),
            Some(Ok(Message::Binary(_))) => return refuse(socket, CloseCode::Unsupported).await,
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => return true,
            Some(Ok(Message::Close(_))) | None => return false,
            Some(Err(error)) => {
                info!(
                    error = &error as &dyn std::error::Error,
                    "a visitor's WebSocket broke"
                );
                return false;
            }
        };
        let json_bytes = json_bytes(&text);
        if json_bytes > MAX_BATCH_BYTES {
            return refuse(socket, CloseCode::Size).await;
        }
        self.bytes += text.len() as u64;
        self.waiting_bytes += json_bytes;
        self.texts.push(text);
        true
    }

    /// Sends as many of the texts as one message holds, unless others are on their way.
    async fn send_batch(&mut self) {
        if self.in_flight.is_some() || self.texts.is_empty() {
            return;
        }
        let (mut bytes, mut count) = (0, 0);
        for text in &self.texts {
            let more = bytes + json_bytes(text);
            if more > MAX_BATCH_BYTES {
                break;
            }
            (bytes, count) = (more, count + 1);
        }
        self.waiting_bytes -= bytes;
        let texts: Vec<String> = self.texts.drain(..count).collect();
        self.in_flight = Some(texts.len());
        let batch = WebsocketBatch {
            request_id: self.outgoing.request_id().clone(),
            websocket: self.visitor.clone(),
            batch: self.next_batch,
            texts,
        };
        self.next_batch += 1;
        self.outgoing.send(FromAgent::WebsocketBatch(batch)).await;
    }
}

/// What a text takes in a batch: its JSON and a comma.
fn json_bytes(text: &str) -> usize {
    message::encoded_length(&text) + 1
}

async fn upgraded(response: Response<ResponseBody>) -> Result<Socket, OriginError> {
    let upgraded = hyper::upgrade::on(response).await.map_err(|error| {
        info!(
            error = &error as &dyn std::error::Error,
            "the local service's WebSocket broke"
        );
        OriginError::new(
            AgentErrorCode::LocalServiceUnavailable,
            "its connection broke",
        )
    })?;
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES));
    Ok(WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, Some(config)).await)
}

/// Closes the local service's WebSocket because it said what cannot be carried. It says no more.
async fn refuse(socket: &mut Socket, code: CloseCode) -> bool {
    info!(%code, "the local service said what the service of the tunnel cannot carry");
    // It may have closed already.
    let _ = socket.close(Some(frame(code))).await;
    false
}

/// Passes on that the visitor has left.
async fn close(mut socket: Socket, code: Option<u16>) {
    let code = code.map(CloseCode::from).filter(|code| code.is_allowed());
    let closing = async {
        // It may have closed already.
        let _ = socket.close(code.map(frame)).await;
        while let Some(Ok(_)) = socket.next().await {}
    };
    // A local service that does not answer is left.
    let _ = timeout(CLOSE_TIMEOUT, closing).await;
}

fn frame(code: CloseCode) -> CloseFrame {
    CloseFrame {
        code,
        reason: Utf8Bytes::default(),
    }
}
