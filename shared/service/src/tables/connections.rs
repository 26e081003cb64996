//! The connections table: which tunnel an open WebSocket connection requested, and who owns it; and the tickets with which `forward`
//! opens connections of its own.

use std::{collections::HashMap, sync::Arc, time::Duration};

use aws_sdk_dynamodb::types::{AttributeValue, ConditionCheck, ReturnValue, TransactWriteItem};

use crate::tables::dynamodb::{
    Change, Item, StoreError, Table, is_live, number, read_flag, read_number, read_text, text,
};
use crate::tables::tunnels::{features_of_text, features_to_text, policy_of, policy_to_text};
use crate::{
    auth::{
        Identity,
        token::{self, TokenHash},
    },
    aws::sdk::SdkConfig,
};
use tunnel_protocol::{
    id::{ConnectionId, TunnelId},
    limits::WEBSOCKET_LIFETIME,
    message::Feature,
    visitor_policy::VisitorPolicy,
};

/// The condition that a connection is recorded and has not ended.
const IS_OPEN: &str = "attribute_exists(connectionId) AND attribute_not_exists(ended)";

/// How long a record lives unless it is kept: 10 minutes longer than a connection in AWS, for a $disconnect that comes late or
/// not at all.
const RECORD_LIFETIME: Duration = Duration::from_secs(WEBSOCKET_LIFETIME.as_secs() + 10 * 60);

/// How long a ticket is valid; a handshake is shorter than that.
const TICKET_TTL: Duration = Duration::from_secs(60);

/// What an open connection is.
#[derive(Clone, Debug, PartialEq)]
pub enum Connection {
    /// An agent's.
    Agent(AgentConnection),
    /// One of `forward`'s, to which replies may be passed on.
    Reply,
}

/// An agent's connection.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentConnection {
    /// The tunnel that it requested.
    pub tunnel_id: TunnelId,
    /// Who it authenticated as.
    pub identity: Identity,
    /// When it was opened, in milliseconds since 1970. Of two connections of one owner the later one serves the tunnel.
    pub connected_at_ms: u64,
    /// What `ready` said; `None` before it.
    pub opened: Option<Opened>,
}

/// What the agent said in `ready`, and the service answered: everything needed to put its tunnel online
/// again.
#[derive(Clone, Debug, PartialEq)]
pub struct Opened {
    /// What the agent announced.
    pub features: Vec<Feature>,
    /// The public address that it was sent.
    pub public_url: String,
    /// The visitor policy; without one, all visitors are admitted.
    pub policy: Option<Arc<VisitorPolicy>>,
    /// The agent's own connection that this one takes over from.
    pub previous: Option<ConnectionId>,
}

/// The table.
#[derive(Clone, Debug)]
pub struct ConnectionsTable(pub(super) Table);

impl ConnectionsTable {
    /// The table of this name.
    pub fn new(sdk: &SdkConfig, name: String) -> Self {
        Self(Table::new(sdk, name))
    }

    /// Records a connection that has been admitted. One that is on record stays as it is: the call may be a repetition that
    /// comes late, after what `ready` said was recorded.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn put(
        &self,
        id: &ConnectionId,
        connection: &Connection,
        now: Duration,
    ) -> Result<(), StoreError> {
        let table = &self.0;
        let expires = now + RECORD_LIFETIME;
        let put = table
            .client
            .put_item()
            .table_name(&table.name)
            .item("connectionId", text(id.as_str()))
            .item("ttl", number(expires.as_secs()));
        let put = match connection {
            Connection::Agent(agent) => {
                let put = put
                    .item("kind", text("agent"))
                    .item("tunnelId", text(agent.tunnel_id.as_str()))
                    .item("owner", text(agent.identity.owner.to_string()))
                    .item("connectedAt", number(agent.connected_at_ms));
                agent
                    .identity
                    .expires_at
                    .into_iter()
                    .fold(put, |put, at| put.item("expiresAt", number(at)))
            }
            Connection::Reply => put.item("kind", text("reply")),
        };
        table
            .conditional_put(put.condition_expression("attribute_not_exists(connectionId)"))
            .await
            .map(drop)
    }

    /// Records what an agent said in `ready`, or what has changed since. Returns whether the connection is still open.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn record_opened(
        &self,
        id: &ConnectionId,
        opened: &Opened,
    ) -> Result<bool, StoreError> {
        let table = &self.0;
        let change = Change::default()
            .set("features", text(features_to_text(&opened.features)))
            .set("publicUrl", text(&opened.public_url))
            .set_or_remove("access", opened.policy.as_deref().map(policy_to_text))
            .set_or_remove(
                "previous",
                opened.previous.as_ref().map(|id| text(id.as_str())),
            );
        let outcome = table
            .client
            .update_item()
            .table_name(&table.name)
            .key("connectionId", text(id.as_str()))
            .update_expression(change.expression())
            .condition_expression(IS_OPEN)
            .set_expression_attribute_names(Some(change.names()))
            .set_expression_attribute_values(Some(change.values()))
            .send()
            .await;
        Ok(table.conditional(outcome)?.is_some())
    }

    /// Gives the record of an open connection its whole time again, if half of that is over.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn keep(&self, id: &ConnectionId, now: Duration) -> Result<(), StoreError> {
        let table = &self.0;
        let change = Change::default().set("ttl", number((now + RECORD_LIFETIME).as_secs()));
        let outcome = table
            .client
            .update_item()
            .table_name(&table.name)
            .key("connectionId", text(id.as_str()))
            .update_expression(change.expression())
            .condition_expression(format!("{IS_OPEN} AND #ttl < :half"))
            .set_expression_attribute_names(Some(change.names()))
            .set_expression_attribute_values(Some(change.values()))
            .expression_attribute_values(":half", number((now + RECORD_LIFETIME / 2).as_secs()))
            .send()
            .await;
        table.conditional(outcome)?;
        Ok(())
    }

    /// Looks an open connection up, with all writes that were answered before.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn get(
        &self,
        id: &ConnectionId,
        now: Duration,
    ) -> Result<Option<Connection>, StoreError> {
        let item = self.0.get("connectionId", text(id.as_str())).await?;
        Ok(item.and_then(|item| open_connection(&item, now)))
    }

    /// Looks many connections up, as [`ConnectionsTable::get`] does one.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn get_many(
        &self,
        ids: &[ConnectionId],
        now: Duration,
    ) -> Result<HashMap<ConnectionId, Connection>, StoreError> {
        let keys = ids.iter().map(|id| id.as_str().to_owned());
        let items = self.0.get_many("connectionId", keys).await?;
        let named = |item: &Item| {
            let id = read_text(item, "connectionId")?.parse().ok()?;
            Some((id, open_connection(item, now)?))
        };
        Ok(items.iter().filter_map(named).collect())
    }

    /// The step of a transaction that makes it fail unless a connection is open.
    pub(super) fn is_open(&self, id: &ConnectionId) -> TransactWriteItem {
        let check = ConditionCheck::builder()
            .table_name(&self.0.name)
            .key("connectionId", text(id.as_str()))
            .condition_expression(IS_OPEN)
            .build()
            .expect("it has a table, a key and a condition");
        TransactWriteItem::builder().condition_check(check).build()
    }

    /// Notes that a connection has ended, after which it cannot take its tunnel any more, and returns what it was. Until it
    /// is [removed](Self::remove) the same can be asked again. `None` if it is not recorded.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn end(&self, id: &ConnectionId) -> Result<Option<Connection>, StoreError> {
        let table = &self.0;
        let outcome = table
            .client
            .update_item()
            .table_name(&table.name)
            .key("connectionId", text(id.as_str()))
            .update_expression("SET ended = :ended")
            .condition_expression("attribute_exists(connectionId)")
            .expression_attribute_values(":ended", AttributeValue::Bool(true))
            .return_values(ReturnValue::AllNew)
            .send()
            .await;
        let output = table.conditional(outcome)?;
        Ok(output
            .and_then(|output| output.attributes)
            .and_then(|item| connection(&item)))
    }

    /// Forgets a connection.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn remove(&self, id: &ConnectionId) -> Result<(), StoreError> {
        let table = &self.0;
        table
            .client
            .delete_item()
            .table_name(&table.name)
            .key("connectionId", text(id.as_str()))
            .send()
            .await
            .map_err(table.failed("DeleteItem"))?;
        Ok(())
    }

    /// Issues a ticket for one reply connection and returns it; only its hash is kept. It proves that its holder is a function
    /// of this service, because nothing else can write to this table.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn issue_ticket(&self, now: Duration) -> Result<String, StoreError> {
        let table = &self.0;
        let ticket = token::generate_token();
        table
            .client
            .put_item()
            .table_name(&table.name)
            .item("connectionId", text(ticket_key(&ticket)))
            .item("ttl", number((now + TICKET_TTL).as_secs()))
            .send()
            .await
            .map_err(table.failed("PutItem"))?;
        Ok(ticket)
    }

    /// Redeems a ticket for a connection, and returns whether it was valid. It is valid for one connection, for which it may be
    /// redeemed again: an answer may have been lost.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn redeem_ticket(
        &self,
        ticket: &str,
        connection: &ConnectionId,
        now: Duration,
    ) -> Result<bool, StoreError> {
        let table = &self.0;
        let outcome = table
            .client
            .update_item()
            .table_name(&table.name)
            .key("connectionId", text(ticket_key(ticket)))
            .update_expression("SET redeemedBy = :connection")
            .condition_expression(
                "#ttl > :now AND (attribute_not_exists(redeemedBy) OR redeemedBy = :connection)",
            )
            .expression_attribute_names("#ttl", "ttl")
            .expression_attribute_values(":connection", text(connection.as_str()))
            .expression_attribute_values(":now", number(now.as_secs()))
            .send()
            .await;
        Ok(table.conditional(outcome)?.is_some())
    }
}

/// No connection id has a slash.
fn ticket_key(ticket: &str) -> String {
    format!("ticket/{}", TokenHash::of(ticket))
}

fn open_connection(item: &Item, now: Duration) -> Option<Connection> {
    let is_open = is_live(item, now) && !read_flag(item, "ended");
    is_open.then(|| connection(item)).flatten()
}

fn connection(item: &Item) -> Option<Connection> {
    match read_text(item, "kind")? {
        "agent" => Some(Connection::Agent(AgentConnection {
            tunnel_id: read_text(item, "tunnelId")?.parse().ok()?,
            identity: Identity {
                owner: read_text(item, "owner")?.parse().ok()?,
                expires_at: read_number(item, "expiresAt"),
            },
            // Older versions wrote seconds, which makes their connections older than any new one.
            connected_at_ms: read_number(item, "connectedAt").unwrap_or_default(),
            opened: opened(item),
        })),
        "reply" => Some(Connection::Reply),
        _ => None,
    }
}

fn opened(item: &Item) -> Option<Opened> {
    Some(Opened {
        features: features_of_text(read_text(item, "features")?),
        public_url: read_text(item, "publicUrl")?.to_owned(),
        policy: policy_of(item),
        previous: read_text(item, "previous").and_then(|id| id.parse().ok()),
    })
}
