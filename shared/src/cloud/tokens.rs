//! The tokens table: which agent tokens are good. It holds hashes only, so that reading it lets nobody in.

use std::time::Duration;

use aws_config::SdkConfig;

use super::store::{StoreError, Table, number, read_flag, read_number, text};

/// The table.
#[derive(Clone, Debug)]
pub struct Tokens(Table);

impl Tokens {
    /// The table of this name.
    pub fn new(sdk: &SdkConfig, name: String) -> Self {
        Self(Table::new(sdk, name))
    }

    /// Tells whether the token of this hash is known, not revoked and not expired.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn is_good(&self, hash: &str, now: Duration) -> Result<bool, StoreError> {
        let table = &self.0;
        let output = table
            .client
            .get_item()
            .table_name(&table.name)
            .key("tokenHash", text(hash))
            .consistent_read(true)
            .send()
            .await
            .map_err(table.failed("GetItem"))?;
        Ok(output.item.is_some_and(|item| {
            let unexpired = read_number(&item, "expiresAt").is_none_or(|at| at > now.as_secs());
            unexpired && !read_flag(&item, "revoked")
        }))
    }

    /// Makes the token of this hash good.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn put(&self, hash: &str, name: &str, now: Duration) -> Result<(), StoreError> {
        let table = &self.0;
        table
            .client
            .put_item()
            .table_name(&table.name)
            .item("tokenHash", text(hash))
            .item("name", text(name))
            .item("createdAt", number(now.as_secs()))
            .send()
            .await
            .map_err(table.failed("PutItem"))?;
        Ok(())
    }

    /// Tells whether any token exists.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn any(&self) -> Result<bool, StoreError> {
        let table = &self.0;
        let output = table.client.scan().table_name(&table.name).limit(1).send().await.map_err(table.failed("Scan"))?;
        Ok(output.count > 0)
    }
}
