//! Visitors' WebSockets, in the connections table: which agent has the other end of each, and which each agent has.
//!
//! Their keys have prefixes, so that a visitor's connection is never taken for an agent's.

use std::time::Duration;

use aws_sdk_dynamodb::types::{AttributeValue, ReturnValue};
use tunnel_protocol::{
    id::{ConnectionId, RequestId},
    limits::WEBSOCKET_LIFETIME,
};

use crate::tables::{
    connections::ConnectionsTable,
    dynamodb::{Item, StoreError, Table, is_live, number, read_text, text},
};

/// How much longer than its connection a record lives, for a $disconnect that comes late or not at all.
const RECORD_GRACE: Duration = Duration::from_secs(10 * 60);

/// The other end of a visitor's WebSocket.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct VisitorSocket {
    /// The agent's connection.
    pub agent: ConnectionId,
    /// The request that opened it.
    pub request: RequestId,
}

/// The records.
#[derive(Clone, Debug)]
pub struct VisitorSocketsTable(Table);

impl VisitorSocketsTable {
    /// Those in this connections table.
    pub fn new(connections: &ConnectionsTable) -> Self {
        Self(connections.0.clone())
    }

    /// Records a visitor's WebSocket.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn open(
        &self,
        visitor: &ConnectionId,
        socket: &VisitorSocket,
        now: Duration,
    ) -> Result<(), StoreError> {
        let table = &self.0;
        let expires = number((now + WEBSOCKET_LIFETIME + RECORD_GRACE).as_secs());
        // First among its agent's, so that none is recorded that the end of its agent does not end.
        table
            .client
            .update_item()
            .table_name(&table.name)
            .key("connectionId", text(agent_key(&socket.agent)))
            .update_expression("ADD visitors :visitor SET #ttl = :expires")
            .expression_attribute_names("#ttl", "ttl")
            .expression_attribute_values(":visitor", AttributeValue::Ss(vec![visitor.to_string()]))
            .expression_attribute_values(":expires", expires.clone())
            .send()
            .await
            .map_err(table.failed("UpdateItem"))?;
        table
            .client
            .put_item()
            .table_name(&table.name)
            .item("connectionId", text(visitor_key(visitor)))
            .item("agent", text(socket.agent.as_str()))
            .item("request", text(socket.request.as_str()))
            .item("ttl", expires)
            .send()
            .await
            .map_err(table.failed("PutItem"))?;
        Ok(())
    }

    /// The other end of a visitor's WebSocket. `None` if there is none on record.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn get(
        &self,
        visitor: &ConnectionId,
        now: Duration,
    ) -> Result<Option<VisitorSocket>, StoreError> {
        let item = self
            .0
            .get("connectionId", text(visitor_key(visitor)))
            .await?;
        Ok(item
            .filter(|item| is_live(item, now))
            .and_then(|item| socket(&item)))
    }

    /// Forgets a visitor's WebSocket that has ended, and returns what its other end was.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn close(&self, visitor: &ConnectionId) -> Result<Option<VisitorSocket>, StoreError> {
        let table = &self.0;
        let Some(socket) = self
            .take(visitor_key(visitor))
            .await?
            .and_then(|item| socket(&item))
        else {
            return Ok(None);
        };
        let outcome = table
            .client
            .update_item()
            .table_name(&table.name)
            .key("connectionId", text(agent_key(&socket.agent)))
            .update_expression("DELETE visitors :visitor")
            .condition_expression("attribute_exists(connectionId)")
            .expression_attribute_values(":visitor", AttributeValue::Ss(vec![visitor.to_string()]))
            .send()
            .await;
        // The agent's record is gone when its connection has ended.
        table.conditional(outcome)?;
        Ok(Some(socket))
    }

    /// Forgets which WebSockets an agent's connection that has ended had the other end of, and returns them.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn take_of_agent(
        &self,
        agent: &ConnectionId,
    ) -> Result<Vec<ConnectionId>, StoreError> {
        let item = self.take(agent_key(agent)).await?.unwrap_or_default();
        let visitors = item.get("visitors").and_then(|ids| ids.as_ss().ok());
        Ok(visitors
            .into_iter()
            .flatten()
            .filter_map(|id| id.parse().ok())
            .collect())
    }

    async fn take(&self, key: String) -> Result<Option<Item>, StoreError> {
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

fn visitor_key(visitor: &ConnectionId) -> String {
    format!("visitor/{visitor}")
}

fn agent_key(agent: &ConnectionId) -> String {
    format!("visitors/{agent}")
}

fn socket(item: &Item) -> Option<VisitorSocket> {
    Some(VisitorSocket {
        agent: read_text(item, "agent")?.parse().ok()?,
        request: read_text(item, "request")?.parse().ok()?,
    })
}
