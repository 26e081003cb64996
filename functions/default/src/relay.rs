//! Agents' replies on their way to `forward`. Three ways, of which the first that there is is taken: to a `forward` of the same
//! process; over the reply connection that the request named; through the mailbox, where `forward` looks as well.

use std::{
    borrow::Cow,
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Deserialize;
use tracing::{debug, info, warn};
use tunnel_protocol::{id::ConnectionId, limits::MAX_MESSAGE_BYTES, message::Relayed};
use tunnel_service::{
    agents::{AgentConnections, PostError},
    now,
    replies::{REPLY_TYPES, Reply, ReplyPath},
    tables::connections::{Connection, ConnectionsTable},
    tables::dynamodb::StoreError,
};

use crate::DefaultRouteError;

/// Most reply connections remembered: more than one account has execution environments, as a rule.
const MAX_KNOWN_REPLY_CONNECTIONS: usize = 4096;
/// How long a busy reply connection is tried. After that the mailbox takes the message.
const BUSY_TIMEOUT: Duration = Duration::from_millis(250);

#[derive(Clone, Debug)]
pub(crate) struct Relay {
    path: ReplyPath,
    agents: AgentConnections,
    /// Reply connections that were looked up. An agent names the connection its reply is to go to, so it is checked that it is not
    /// another agent's.
    known: Arc<Mutex<HashSet<ConnectionId>>>,
}

/// The part of a message that says where it goes. The body is skipped, not decoded.
#[derive(Deserialize)]
struct Address<'m> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'m, str>,
    reply_to: Option<ConnectionId>,
}

impl Relay {
    pub(crate) fn new(path: ReplyPath, agents: AgentConnections) -> Self {
        Self {
            path,
            agents,
            known: Arc::default(),
        }
    }

    /// Passes on a message that names a reply connection, unchanged, and returns whether it did.
    pub(crate) async fn pass_on(
        &self,
        sender: &ConnectionId,
        text: &str,
    ) -> Result<bool, DefaultRouteError> {
        let ReplyPath::Cloud { connections, .. } = &self.path else {
            return Ok(false);
        };
        if text.len() > MAX_MESSAGE_BYTES {
            return Ok(false);
        }
        let Ok(Address {
            kind,
            reply_to: Some(to),
        }) = serde_json::from_str(text)
        else {
            return Ok(false);
        };
        if !REPLY_TYPES.contains(&&*kind) {
            return Ok(false);
        }
        if !self.is_reply_connection(connections, &to).await? {
            info!("a reply names a connection that is not, or no longer, a reply connection");
            return Ok(false);
        }
        let relayed = Relayed::encode(sender, text);
        match Box::pin(self.agents.post_encoded(&to, relayed.into(), BUSY_TIMEOUT)).await {
            Ok(()) => Ok(true),
            Err(error) => {
                if matches!(error, PostError::Gone) {
                    self.known().remove(&to);
                }
                debug!(to = %to, error = &error as &dyn std::error::Error, "not passed on; stored in the mailbox");
                Ok(false)
            }
        }
    }

    /// Leaves a reply where `forward` finds it.
    pub(crate) async fn deliver(
        &self,
        sender: &ConnectionId,
        reply: Reply,
    ) -> Result<(), StoreError> {
        self.path.leave(sender, reply).await
    }

    /// Tells a reply connection its own id: it cannot know it otherwise.
    pub(crate) async fn open(&self, connection: &ConnectionId) -> Result<(), PostError> {
        if matches!(self.path, ReplyPath::InProcess(_)) {
            warn!("a reply connection in a process that does not use any");
            return Ok(());
        }
        let ready = Relayed::encode(connection, r#"{"type":"ready"}"#);
        self.agents.post_text(connection, ready).await
    }

    async fn is_reply_connection(
        &self,
        connections: &ConnectionsTable,
        id: &ConnectionId,
    ) -> Result<bool, StoreError> {
        if self.known().contains(id) {
            return Ok(true);
        }
        if connections.get(id, now()).await? != Some(Connection::Reply) {
            return Ok(false);
        }
        let mut known = self.known();
        if known.len() >= MAX_KNOWN_REPLY_CONNECTIONS {
            known.clear();
        }
        known.insert(id.clone());
        Ok(true)
    }

    /// Held between awaits only.
    fn known(&self) -> MutexGuard<'_, HashSet<ConnectionId>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
