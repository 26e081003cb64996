//! Agents' replies on their way to `forward`. Three ways, of which the first that there is is taken: to a `forward` of the same
//! process; over the reply connection that the request named; through the mailbox, where `forward` looks as well.

use std::{
    borrow::Cow,
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::Deserialize;
use tracing::{debug, info, warn};
use tunnel_protocol::{id::ConnectionId, limits::MAX_MESSAGE_BYTES, message::Relayed};
use tunnel_service::{
    agents::{AgentConnections, InProcess, PostError},
    aws::sdk::SdkConfig,
    now,
    replies::{Replies, Reply},
    settings::Variables,
    tables::connections::{Connection, ConnectionsTable},
    tables::dynamodb::StoreError,
    tables::mailbox::MailboxTable,
};

use crate::DefaultRouteError;

/// Most reply connections remembered: more than one account has execution environments, as a rule.
const MAX_KNOWN_REPLY_CONNECTIONS: usize = 4096;
/// Pauses before a reply connection that takes no more is tried again. Then the mailbox takes the message.
const BUSY_RETRY_DELAYS: [Duration; 3] = [
    Duration::from_millis(20),
    Duration::from_millis(60),
    Duration::from_millis(180),
];

#[derive(Clone, Debug)]
pub(crate) enum Relay {
    /// `forward` runs in this process.
    InProcess(Replies),
    /// `forward` runs elsewhere.
    Cloud {
        mailbox: MailboxTable,
        connections: ConnectionsTable,
        api: AgentConnections,
        /// Reply connections that were looked up. An agent names the connection its reply is to go to, so it is checked that it is
        /// none of another agent's.
        known: Arc<Mutex<HashSet<ConnectionId>>>,
    },
}

/// As much of a message as tells where it goes. The body is skipped, not read.
#[derive(Deserialize)]
struct Address<'m> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'m, str>,
    reply_to: Option<ConnectionId>,
}

impl Relay {
    /// Reads the settings. `None` means that a fault was noted.
    pub(crate) fn load(
        variables: &Variables<'_>,
        sdk: &SdkConfig,
        in_process: Option<&InProcess>,
        connections: Option<&ConnectionsTable>,
        api: Option<&AgentConnections>,
    ) -> Option<Self> {
        let mailbox = variables.required("PENDING_REQUESTS_TABLE");
        if let Some(in_process) = in_process {
            return Some(Self::InProcess(in_process.replies.clone()));
        }
        Some(Self::Cloud {
            mailbox: MailboxTable::new(sdk, mailbox?),
            connections: connections?.clone(),
            api: api?.clone(),
            known: Arc::default(),
        })
    }

    /// Whether replies have to leave this process.
    pub(crate) fn is_elsewhere(&self) -> bool {
        matches!(self, Self::Cloud { .. })
    }

    /// Passes a message that names a reply connection on as it is, and tells whether it did.
    pub(crate) async fn pass_on(
        &self,
        sender: &ConnectionId,
        text: &str,
    ) -> Result<bool, DefaultRouteError> {
        let Self::Cloud { api, known, .. } = self else {
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
        if !matches!(&*kind, "http_response" | "body_part" | "window" | "error") {
            return Ok(false);
        }
        if !self.is_reply_connection(&to).await? {
            info!(connection = %sender, "a reply names a connection that is no reply connection, or no more");
            return Ok(false);
        }
        let relayed = Relayed::encode(sender, text);
        for pause in BUSY_RETRY_DELAYS.map(Some).into_iter().chain([None]) {
            match (api.post_text(&to, relayed.clone()).await, pause) {
                (Ok(()), _) => return Ok(true),
                (Err(PostError::Busy), Some(pause)) => tokio::time::sleep(pause).await,
                (Err(error), _) => {
                    if matches!(error, PostError::Gone) {
                        known
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .remove(&to);
                    }
                    debug!(connection = %to, error = &error as &dyn std::error::Error, "not passed on; the mailbox takes it");
                    return Ok(false);
                }
            }
        }
        Ok(false)
    }

    /// Leaves a reply where `forward` finds it.
    pub(crate) async fn deliver(
        &self,
        sender: &ConnectionId,
        reply: Reply,
    ) -> Result<(), StoreError> {
        match self {
            Self::InProcess(replies) => {
                // A visitor that has left waits for nothing.
                replies.deliver(sender, reply);
                Ok(())
            }
            Self::Cloud { mailbox, .. } => Box::pin(mailbox.put(sender, reply, now())).await,
        }
    }

    /// Tells a reply connection its own id: it cannot know it otherwise.
    pub(crate) async fn open(&self, connection: &ConnectionId) -> Result<(), PostError> {
        match self {
            Self::InProcess(_) => {
                warn!(%connection, "a reply connection in a process that needs none")
            }
            Self::Cloud { api, .. } => {
                api.post_text(
                    connection,
                    Relayed::encode(connection, r#"{"type":"ready"}"#),
                )
                .await?
            }
        }
        Ok(())
    }

    async fn is_reply_connection(&self, id: &ConnectionId) -> Result<bool, StoreError> {
        let Self::Cloud {
            connections, known, ..
        } = self
        else {
            return Ok(false);
        };
        if known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(id)
        {
            return Ok(true);
        }
        if connections.get(id, now()).await? != Some(Connection::Reply) {
            return Ok(false);
        }
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KNOWN_REPLY_CONNECTIONS {
            known.clear();
        }
        known.insert(id.clone());
        Ok(true)
    }
}
