//! Visitors' WebSockets. What a visitor says goes to the agent that has the other end; what the agent says goes to the visitor, text
//! after text, and is acknowledged so that the next may come.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tracing::info;
use tunnel_protocol::{
    id::{ConnectionId, RequestId},
    message::{ToAgent, WebsocketBatch},
};
use tunnel_service::{
    agents::{AgentConnections, PostError},
    now,
    tables::{
        dynamodb::StoreError,
        visitor_sockets::{VisitorSocket, VisitorSocketsTable},
    },
};

use crate::{DefaultRouteError, ownership::BUSY_TIMEOUT};

/// How long after its handshake was accepted a visitor's connection may take no messages: no event says when it does.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(3);
/// The first pause before a connection that takes none yet is tried again; each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Most WebSockets whose other end is remembered by one process.
const MAX_KNOWN: usize = 4096;

#[derive(Clone, Debug)]
pub(crate) struct Websockets {
    table: VisitorSocketsTable,
    agents: AgentConnections,
    visitors: AgentConnections,
    /// What was looked up: it does not change while a WebSocket is open.
    known: Arc<Mutex<HashMap<ConnectionId, VisitorSocket>>>,
}

impl Websockets {
    pub(crate) fn new(
        table: VisitorSocketsTable,
        agents: AgentConnections,
        visitors: AgentConnections,
    ) -> Self {
        Self {
            table,
            agents,
            visitors,
            known: Arc::default(),
        }
    }

    /// Passes on what a visitor says. A visitor of whom a message cannot be passed on is closed: it would be missing.
    pub(crate) async fn take_from_visitor(
        &self,
        visitor: &ConnectionId,
        text: String,
    ) -> Result<(), DefaultRouteError> {
        let Some(socket) = self.find(visitor).await? else {
            return Ok(self.visitors.close(visitor).await?);
        };
        let message = ToAgent::WebsocketMessage {
            request_id: socket.request,
            text,
        };
        let posted = self
            .agents
            .post_patiently(&socket.agent, &message, BUSY_TIMEOUT)
            .await;
        if let Err(error) = posted {
            info!(%visitor, connection = %socket.agent, error = &error as &dyn std::error::Error, "a visitor's message cannot be passed on: its WebSocket is closed");
            self.visitors.close(visitor).await?;
        }
        Ok(())
    }

    /// Passes on what the agent says, in order, and tells it how far that went.
    pub(crate) async fn take_from_agent(
        &self,
        sender: &ConnectionId,
        batch: WebsocketBatch,
    ) -> Result<(), DefaultRouteError> {
        let mut delivered = 0;
        let mut patience = Patience::of_first(batch.batch == 0);
        while let Some(text) = batch.texts.get(delivered) {
            if self
                .is_other_end(sender, &batch.websocket, &batch.request_id)
                .await?
                && self.post(&batch.websocket, text).await?
            {
                delivered += 1;
            } else if !patience.wait().await {
                break;
            }
        }
        let sent = ToAgent::WebsocketSent {
            request_id: batch.request_id,
            batch: batch.batch,
            delivered,
        };
        match self
            .agents
            .post_patiently(sender, &sent, BUSY_TIMEOUT)
            .await
        {
            // It says itself that it is gone.
            Err(PostError::Gone | PostError::Unknown) => Ok(()),
            outcome => Ok(outcome?),
        }
    }

    /// Closes a visitor's WebSocket as its agent asks.
    pub(crate) async fn close(
        &self,
        sender: &ConnectionId,
        request: &RequestId,
        visitor: &ConnectionId,
    ) -> Result<(), DefaultRouteError> {
        let mut patience = Patience::of_first(true);
        loop {
            if self.is_other_end(sender, visitor, request).await?
                && self.visitors.is_open(visitor).await?
            {
                return Ok(self.visitors.close(visitor).await?);
            }
            if !patience.wait().await {
                return Ok(());
            }
        }
    }

    /// Whether a visitor's connection took a text.
    async fn post(&self, visitor: &ConnectionId, text: &str) -> Result<bool, PostError> {
        match self
            .visitors
            .post_encoded(visitor, text.to_owned().into(), BUSY_TIMEOUT)
            .await
        {
            Ok(()) => Ok(true),
            Err(PostError::Failed { code, source }) => Err(PostError::Failed { code, source }),
            Err(_) => Ok(false),
        }
    }

    /// Whether a visitor's WebSocket was opened by this request to this agent's connection. No agent reaches another's visitors.
    async fn is_other_end(
        &self,
        agent: &ConnectionId,
        visitor: &ConnectionId,
        request: &RequestId,
    ) -> Result<bool, StoreError> {
        let found = self.find(visitor).await?;
        Ok(found.is_some_and(|socket| socket.agent == *agent && socket.request == *request))
    }

    async fn find(&self, visitor: &ConnectionId) -> Result<Option<VisitorSocket>, StoreError> {
        if let Some(socket) = self.known().get(visitor) {
            return Ok(Some(socket.clone()));
        }
        let found = self.table.get(visitor, now()).await?;
        if let Some(socket) = &found {
            let mut known = self.known();
            if known.len() >= MAX_KNOWN {
                known.clear();
            }
            known.insert(visitor.clone(), socket.clone());
        }
        Ok(found)
    }

    /// Held between awaits only.
    fn known(&self) -> MutexGuard<'_, HashMap<ConnectionId, VisitorSocket>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long is waited for a connection whose handshake may just be over.
struct Patience {
    until: Instant,
    pause: Duration,
}

impl Patience {
    fn of_first(is_first: bool) -> Self {
        let patience = if is_first {
            UPGRADE_TIMEOUT
        } else {
            Duration::ZERO
        };
        Self {
            until: Instant::now() + patience,
            pause: FIRST_PAUSE,
        }
    }

    /// Waits a little. Returns whether there is any patience left.
    async fn wait(&mut self) -> bool {
        if Instant::now() >= self.until {
            return false;
        }
        sleep(self.pause).await;
        self.pause *= 2;
        true
    }
}
