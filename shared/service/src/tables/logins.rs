//! Logins of visitors, in the connections table: the key that seals their cookies, and how often an address has tried a tunnel's
//! passwords.

use std::time::Duration;

use aws_sdk_dynamodb::{
    operation::put_item::PutItemError,
    primitives::Blob,
    types::{AttributeValue, ReturnValue},
};
use tunnel_protocol::id::TunnelId;

use crate::tables::{
    connections::ConnectionsTable,
    dynamodb::{Item, StoreError, Table, number, read_number, text},
};

/// For how long attempts are counted together.
pub const ATTEMPTS_WINDOW: Duration = Duration::from_secs(10 * 60);

/// The bytes of the key.
pub const KEY_BYTES: usize = 32;

/// The record with the key. A tunnel id has no `#`.
const KEY: &str = "login/#key";

/// Attempts that were made from an address within [`ATTEMPTS_WINDOW`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Attempts {
    /// How many, this one too.
    pub count: u64,
    /// When counting starts again, in seconds since 1970.
    pub until: u64,
}

/// The records.
#[derive(Clone, Debug)]
pub struct LoginsTable(Table);

impl LoginsTable {
    /// Those in this connections table.
    pub fn new(connections: &ConnectionsTable) -> Self {
        Self(connections.0.clone())
    }

    /// The key that is stored, or else `fresh`, which is stored then.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn key(&self, fresh: [u8; KEY_BYTES]) -> Result<[u8; KEY_BYTES], StoreError> {
        let table = &self.0;
        loop {
            let item = table.get("connectionId", text(KEY)).await?;
            if let Some(key) = item.as_ref().and_then(read_key) {
                return Ok(key);
            }
            let put = table
                .client
                .put_item()
                .table_name(&table.name)
                .item("connectionId", text(KEY))
                .item("key", AttributeValue::B(Blob::new(fresh)))
                .condition_expression("attribute_not_exists(connectionId)")
                .send()
                .await;
            match put {
                Ok(_) => return Ok(fresh),
                // Another process was first.
                Err(error)
                    if item.is_none()
                        && error
                            .as_service_error()
                            .is_some_and(PutItemError::is_conditional_check_failed_exception) => {}
                Err(error) => return Err(table.failed("PutItem")(error)),
            }
        }
    }

    /// Counts an attempt from an address, or from the network that stands for it.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn attempt(
        &self,
        tunnel: &TunnelId,
        from: &str,
        now: Duration,
    ) -> Result<Attempts, StoreError> {
        let table = &self.0;
        let window = ATTEMPTS_WINDOW.as_secs();
        // Each window has a record of its own, so that none has to be reset.
        let started = now.as_secs() / window * window;
        let until = started + window;
        let output = table
            .client
            .update_item()
            .table_name(&table.name)
            .key(
                "connectionId",
                text(format!("login/{tunnel}/{from}/{started}")),
            )
            .update_expression("ADD attempts :one SET #ttl = :until")
            .expression_attribute_names("#ttl", "ttl")
            .expression_attribute_values(":one", number(1))
            .expression_attribute_values(":until", number(until))
            .return_values(ReturnValue::UpdatedNew)
            .send()
            .await
            .map_err(table.failed("UpdateItem"))?;
        let attributes = output.attributes.unwrap_or_default();
        Ok(Attempts {
            count: read_number(&attributes, "attempts").unwrap_or(u64::MAX),
            until,
        })
    }
}

fn read_key(item: &Item) -> Option<[u8; KEY_BYTES]> {
    item.get("key")?.as_b().ok()?.as_ref().try_into().ok()
}
