//! The connections table: which tunnel an open WebSocket connection asked for, and who it is.

use std::time::Duration;

use aws_sdk_dynamodb::types::ReturnValue;

use super::sdk::SdkConfig;
use super::store::{Item, StoreError, Table, is_live, number, read_text, text};
use crate::{
    id::{ConnectionId, TunnelId},
    limits::WEBSOCKET_LIFE,
};

/// How much longer than its connection a record lives, for a $disconnect that comes late or not at all.
const GRACE: Duration = Duration::from_secs(10 * 60);

/// An agent's connection.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Connection {
    /// Its id.
    pub id: ConnectionId,
    /// The tunnel it asked for.
    pub tunnel_id: TunnelId,
    /// Who it authenticated as; see [`super::auth`].
    pub owner: String,
}

/// The table.
#[derive(Clone, Debug)]
pub struct Connections(Table);

impl Connections {
    /// The table of this name.
    pub fn new(sdk: &SdkConfig, name: String) -> Self {
        Self(Table::new(sdk, name))
    }

    /// Records a connection.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn put(&self, connection: &Connection, now: Duration) -> Result<(), StoreError> {
        let table = &self.0;
        table
            .client
            .put_item()
            .table_name(&table.name)
            .item("connectionId", text(connection.id.as_str()))
            .item("tunnelId", text(connection.tunnel_id.as_str()))
            .item("owner", text(&connection.owner))
            .item("kind", text("agent"))
            .item("connectedAt", number(now.as_secs()))
            .item("ttl", number((now + WEBSOCKET_LIFE + GRACE).as_secs()))
            .send()
            .await
            .map_err(table.failed("PutItem"))?;
        Ok(())
    }

    /// Looks a connection up, with all writes that were answered before.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn get(&self, id: &ConnectionId, now: Duration) -> Result<Option<Connection>, StoreError> {
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
        Ok(output.item.filter(|item| is_live(item, now)).and_then(|item| connection(&item)))
    }

    /// Forgets a connection and returns what it was.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn remove(&self, id: &ConnectionId) -> Result<Option<Connection>, StoreError> {
        let table = &self.0;
        let output = table
            .client
            .delete_item()
            .table_name(&table.name)
            .key("connectionId", text(id.as_str()))
            .return_values(ReturnValue::AllOld)
            .send()
            .await
            .map_err(table.failed("DeleteItem"))?;
        Ok(output.attributes.and_then(|item| connection(&item)))
    }
}

fn connection(item: &Item) -> Option<Connection> {
    Some(Connection {
        id: read_text(item, "connectionId")?.parse().ok()?,
        tunnel_id: read_text(item, "tunnelId")?.parse().ok()?,
        owner: read_text(item, "owner")?.to_owned(),
    })
}
