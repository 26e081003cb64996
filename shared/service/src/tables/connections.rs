//! The connections table: which tunnel an open WebSocket connection asked for, and who it is; and the tickets with which `forward`
//! opens connections of its own.

use std::time::Duration;

use aws_sdk_dynamodb::types::ReturnValue;

use crate::tables::dynamodb::{
    Item, StoreError, Table, is_live, number, read_number, read_text, text,
};
use crate::tables::tunnels::{features_of_text, features_to_text};
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
};

/// How much longer than its connection a record lives, for a $disconnect that comes late or not at all.
const RECORD_GRACE: Duration = Duration::from_secs(10 * 60);

/// How long a ticket is good: a handshake takes no longer.
const TICKET_TTL: Duration = Duration::from_secs(60);

/// What an open connection is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Connection {
    /// An agent's.
    Agent {
        /// The tunnel it asked for.
        tunnel_id: TunnelId,
        /// Who it authenticated as.
        identity: Identity,
        /// What was said when its tunnel opened; none before that.
        opened: Option<Opened>,
    },
    /// One of `forward`'s, to which replies may be passed on.
    Reply,
}

/// What an agent and the service said to each other when its tunnel opened.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Opened {
    /// What the agent announced.
    pub features: Vec<Feature>,
    /// The address that it was told.
    pub public_url: String,
}

/// The table.
#[derive(Clone, Debug)]
pub struct ConnectionsTable(Table);

impl ConnectionsTable {
    /// The table of this name.
    pub fn new(sdk: &SdkConfig, name: String) -> Self {
        Self(Table::new(sdk, name))
    }

    /// Records a connection, which is not opened yet.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn put(
        &self,
        id: &ConnectionId,
        connection: &Connection,
        now: Duration,
    ) -> Result<(), StoreError> {
        let table = &self.0;
        let put = table
            .client
            .put_item()
            .table_name(&table.name)
            .item("connectionId", text(id.as_str()))
            .item("connectedAt", number(now.as_secs()))
            .item(
                "ttl",
                number((now + WEBSOCKET_LIFETIME + RECORD_GRACE).as_secs()),
            );
        let put = match connection {
            Connection::Agent {
                tunnel_id,
                identity,
                ..
            } => {
                let put = put
                    .item("kind", text("agent"))
                    .item("tunnelId", text(tunnel_id.as_str()))
                    .item("owner", text(identity.owner.to_string()));
                identity
                    .expires_at
                    .into_iter()
                    .fold(put, |put, at| put.item("expiresAt", number(at)))
            }
            Connection::Reply => put.item("kind", text("reply")),
        };
        put.send().await.map_err(table.failed("PutItem"))?;
        Ok(())
    }

    /// Notes what was said when an agent's tunnel opened, or since, and tells whether the connection is still recorded.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn record_opened(
        &self,
        id: &ConnectionId,
        opened: &Opened,
    ) -> Result<bool, StoreError> {
        let table = &self.0;
        let outcome = table
            .client
            .update_item()
            .table_name(&table.name)
            .key("connectionId", text(id.as_str()))
            .update_expression("SET features = :features, publicUrl = :url")
            // A connection that has ended meanwhile stays forgotten.
            .condition_expression("attribute_exists(connectionId)")
            .expression_attribute_values(":features", text(features_to_text(&opened.features)))
            .expression_attribute_values(":url", text(&opened.public_url))
            .send()
            .await;
        Ok(table.conditional(outcome)?.is_some())
    }

    /// Looks a connection up, with all writes that were answered before.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn get(
        &self,
        id: &ConnectionId,
        now: Duration,
    ) -> Result<Option<Connection>, StoreError> {
        let table = &self.0;
        let output = table
            .client
            .get_item()
            .table_name(&table.name)
            .key("connectionId", text(id.as_str()))
            .consistent_read(true)
            .send()
            .await
            .map_err(table.failed("GetItem"))?;
        Ok(output
            .item
            .filter(|item| is_live(item, now))
            .and_then(|item| connection(&item)))
    }

    /// Issues a ticket for one reply connection and returns it; only its hash is kept. Whoever can write to this table can, and
    /// those are the functions alone.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
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

    /// Takes a ticket, and tells whether it was good. It is good once.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn redeem_ticket(&self, ticket: &str, now: Duration) -> Result<bool, StoreError> {
        Ok(self
            .delete(ticket_key(ticket))
            .await?
            .is_some_and(|item| is_live(&item, now)))
    }

    /// Forgets a connection and returns what it was.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn remove(&self, id: &ConnectionId) -> Result<Option<Connection>, StoreError> {
        Ok(self
            .delete(id.as_str().to_owned())
            .await?
            .and_then(|item| connection(&item)))
    }

    async fn delete(&self, key: String) -> Result<Option<Item>, StoreError> {
        let table = &self.0;
        let output = table
            .client
            .delete_item()
            .table_name(&table.name)
            .key("connectionId", text(key))
            .return_values(ReturnValue::AllOld)
            .send()
            .await
            .map_err(table.failed("DeleteItem"))?;
        Ok(output.attributes)
    }
}

/// No connection id has a slash.
fn ticket_key(ticket: &str) -> String {
    format!("ticket/{}", TokenHash::of(ticket))
}

fn connection(item: &Item) -> Option<Connection> {
    match read_text(item, "kind")? {
        "agent" => {
            let identity = Identity {
                owner: read_text(item, "owner")?.parse().ok()?,
                expires_at: read_number(item, "expiresAt"),
            };
            let opened = || {
                let features = features_of_text(read_text(item, "features")?);
                Some(Opened {
                    features,
                    public_url: read_text(item, "publicUrl")?.to_owned(),
                })
            };
            Some(Connection::Agent {
                tunnel_id: read_text(item, "tunnelId")?.parse().ok()?,
                identity,
                opened: opened(),
            })
        }
        "reply" => Some(Connection::Reply),
        _ => None,
    }
}
