//! The WebSocket connection to our own WebSocket API over which agents' replies are pushed to this execution environment.
//!
//! It is opened with the first request, stays open while later ones arrive, and is opened again when it is found dead. A request that
//! arrives while there is none, or whose reply did not come over the connection, finds its reply in the mailbox.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use futures_util::{SinkExt, StreamExt, stream::SplitStream};
use http::{HeaderValue, header};
use tokio::{
    net::TcpStream,
    task::{AbortHandle, JoinSet},
    time::timeout,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async_with_config,
    tungstenite::{Message, client::IntoClientRequest},
};
use tracing::{debug, warn};
use tunnel_protocol::{
    frames,
    id::ConnectionId,
    limits::WEBSOCKET_IDLE_TIMEOUT,
    message,
    message::{FromAgent, Ready, Relayed, Subject},
};
use tunnel_service::{
    agents::WebSocketApiUrl,
    now,
    replies::{Replies, Reply},
    tables::connections::ConnectionsTable,
};

/// How long opening may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long nothing is tried after opening failed. The mailbox serves meanwhile.
const RETRY_COOLDOWN: Duration = Duration::from_secs(5);
/// A connection that was not used for this long may have been closed while this process was frozen.
const MAX_IDLE: Duration = WEBSOCKET_IDLE_TIMEOUT.saturating_sub(Duration::from_secs(60));

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// The connection, opened when it is needed.
#[derive(Clone, Debug)]
pub(crate) struct ReplyConnection(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The WebSocket API, with the query by which `connect` knows a reply connection.
    url: String,
    connections: ConnectionsTable,
    replies: Replies,
    state: Mutex<State>,
    /// Opens, and reads what was opened. No invocation waits for it: it continues between invocations.
    tasks: Mutex<JoinSet<()>>,
}

#[derive(Debug)]
enum State {
    Closed,
    Opening,
    /// The wall clock counts, because the other one may stand still while this process is frozen.
    Open {
        id: ConnectionId,
        used: SystemTime,
        reader: AbortHandle,
    },
    Failed {
        at: SystemTime,
    },
}

/// Why it could not be opened.
type Failure = Box<dyn std::error::Error + Send + Sync>;

impl ReplyConnection {
    /// A connection to the WebSocket API whose replies go to `replies`.
    pub(crate) fn new(
        websocket_api: &WebSocketApiUrl,
        connections: ConnectionsTable,
        replies: Replies,
    ) -> Self {
        let url = format!("{}?reply=1", websocket_api.for_websockets());
        Self(Arc::new(Shared {
            url,
            connections,
            replies,
            state: Mutex::new(State::Closed),
            tasks: Mutex::default(),
        }))
    }

    /// The connection's id, if it is open. If it is not, it is being opened when this returns.
    pub(crate) async fn id(&self) -> Option<ConnectionId> {
        // After a thaw, lets the reader see first what has happened to the connection meanwhile.
        tokio::task::yield_now().await;
        let now = SystemTime::now();
        let since = |then: SystemTime| now.duration_since(then).unwrap_or_default();
        let mut state = self.lock();
        match &mut *state {
            State::Open { id, used, reader } => {
                if since(*used) < MAX_IDLE {
                    *used = now;
                    return Some(id.clone());
                }
                reader.abort();
            }
            State::Opening => return None,
            State::Failed { at } if since(*at) < RETRY_COOLDOWN => return None,
            State::Failed { .. } | State::Closed => {}
        }
        *state = State::Opening;
        drop(state);
        self.spawn(self.clone().open());
        None
    }

    async fn open(self) {
        let opened = match timeout(HANDSHAKE_TIMEOUT, self.handshake()).await {
            Ok(opened) => opened,
            Err(elapsed) => Err(elapsed.into()),
        };
        match opened {
            Ok((id, stream)) => {
                debug!(connection = %id, "reply connection open");
                let mut state = self.lock();
                let reader = self.spawn(self.clone().read(id.clone(), stream));
                *state = State::Open {
                    id,
                    used: SystemTime::now(),
                    reader,
                };
            }
            Err(error) => {
                warn!(
                    error = &*error as &dyn std::error::Error,
                    "no reply connection; replies come through the mailbox"
                );
                *self.lock() = State::Failed {
                    at: SystemTime::now(),
                };
            }
        }
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let mut tasks = self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task)
    }

    async fn handshake(&self) -> Result<(ConnectionId, SplitStream<Socket>), Failure> {
        let ticket = self.0.connections.issue_ticket(now()).await?;
        let mut request = self.0.url.as_str().into_client_request()?;
        let mut authorization = HeaderValue::from_str(&format!("Bearer {ticket}"))?;
        authorization.set_sensitive(true);
        request
            .headers_mut()
            .insert(header::AUTHORIZATION, authorization);
        let config = frames::client_config();
        let (mut socket, _) = connect_async_with_config(request, Some(config), true).await?;
        socket
            .send(Message::text(message::encode(&FromAgent::Ready(
                Ready::default(),
            ))))
            .await?;
        let (_, mut stream) = socket.split();
        while let Some(message) = stream.next().await {
            if let Message::Text(text) = message?
                && let Ok(Relayed {
                    sender,
                    message: FromAgent::Ready(_),
                }) = message::decode(&text)
            {
                return Ok((sender, stream));
            }
        }
        Err("it was closed before it received its id".into())
    }

    /// Hands replies to the requests that wait for them, until the connection ends.
    async fn read(self, id: ConnectionId, mut stream: SplitStream<Socket>) {
        while let Some(Ok(message)) = stream.next().await {
            let Message::Text(text) = message else {
                continue;
            };
            match message::decode::<Relayed>(&text) {
                Ok(Relayed { sender, message }) => {
                    if let Ok(reply) = Reply::from_message(message) {
                        self.0.replies.deliver(&sender, reply);
                    }
                }
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "not a reply");
                    if let Ok(Relayed {
                        sender,
                        message: Subject { request_id },
                    }) = message::decode(&text)
                    {
                        self.0
                            .replies
                            .deliver(&sender, Reply::unreadable(request_id));
                    }
                }
            }
        }
        let mut state = self.lock();
        if matches!(&*state, State::Open { id: open, .. } if *open == id) {
            *state = State::Closed;
        }
    }

    /// Held between awaits only.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
