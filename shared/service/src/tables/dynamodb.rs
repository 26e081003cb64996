//! What the tables have in common: the client, how a call fails, and how attributes are read.

use std::collections::HashMap;

use aws_sdk_dynamodb::{
    Client,
    error::{ProvideErrorMetadata, SdkError},
    operation::update_item::{UpdateItemError, UpdateItemOutput},
    types::AttributeValue,
};

use crate::aws::sdk::SdkConfig;

/// A DynamoDB item.
pub(crate) type Item = HashMap<String, AttributeValue>;

/// A call to DynamoDB failed, after the SDK's own retries.
#[derive(Debug, thiserror::Error)]
#[error("DynamoDB: {operation} on {table}: {code}")]
pub struct StoreError {
    operation: &'static str,
    table: String,
    code: String,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// One table.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub(crate) client: Client,
    pub(crate) name: String,
}

impl Table {
    pub(crate) fn new(sdk: &SdkConfig, name: String) -> Self {
        Self {
            client: Client::new(sdk),
            name,
        }
    }

    /// All items, for administration. Page by page, so that no table is too long.
    pub(crate) async fn scan(&self) -> Result<Vec<Item>, StoreError> {
        let pages = self
            .client
            .scan()
            .table_name(&self.name)
            .consistent_read(true)
            .into_paginator()
            .items()
            .send();
        pages.try_collect().await.map_err(self.failed("Scan"))
    }

    pub(crate) fn failed<E>(
        &self,
        operation: &'static str,
    ) -> impl FnOnce(SdkError<E>) -> StoreError
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let table = self.name.clone();
        move |error| StoreError {
            operation,
            table,
            code: error.code().unwrap_or("no answer").to_owned(),
            source: Box::new(error),
        }
    }

    /// The outcome of a conditional update: `None` when the condition did not hold.
    pub(crate) fn conditional(
        &self,
        outcome: Result<UpdateItemOutput, SdkError<UpdateItemError>>,
    ) -> Result<Option<UpdateItemOutput>, StoreError> {
        match outcome {
            Ok(output) => Ok(Some(output)),
            Err(error)
                if error
                    .as_service_error()
                    .is_some_and(UpdateItemError::is_conditional_check_failed_exception) =>
            {
                Ok(None)
            }
            Err(error) => Err(self.failed("UpdateItem")(error)),
        }
    }
}

pub(crate) fn text(value: impl Into<String>) -> AttributeValue {
    AttributeValue::S(value.into())
}

pub(crate) fn number(value: u64) -> AttributeValue {
    AttributeValue::N(value.to_string())
}

pub(crate) fn read_text<'i>(item: &'i Item, name: &str) -> Option<&'i str> {
    item.get(name)?.as_s().ok().map(String::as_str)
}

pub(crate) fn read_number(item: &Item, name: &str) -> Option<u64> {
    item.get(name)?.as_n().ok()?.parse().ok()
}

pub(crate) fn read_flag(item: &Item, name: &str) -> bool {
    matches!(item.get(name), Some(AttributeValue::Bool(true)))
}

/// An item stays readable for up to two days after its TTL ("Using time to live", DynamoDB developer guide), so readers check.
pub(crate) fn is_live(item: &Item, now: std::time::Duration) -> bool {
    read_number(item, "ttl").is_none_or(|ttl| ttl > now.as_secs())
}
