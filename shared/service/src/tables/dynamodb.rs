//! What the tables have in common: the client, how a call fails, and how attributes are read.

use std::collections::{HashMap, HashSet};

use aws_sdk_dynamodb::{
    Client,
    config::{
        interceptors::InterceptorContext,
        retry::{ClassifyRetry, RetryAction},
    },
    error::{ProvideErrorMetadata, SdkError},
    operation::{
        delete_item::DeleteItemError,
        put_item::{PutItemError, builders::PutItemFluentBuilder},
        transact_write_items::TransactWriteItemsError,
        update_item::{UpdateItemError, UpdateItemOutput},
    },
    types::{AttributeValue, KeysAndAttributes},
};

use crate::aws::sdk::SdkConfig;

/// Most keys that BatchGetItem takes, see its page in the DynamoDB API reference.
const MAX_BATCH_KEYS: usize = 100;

/// A DynamoDB item.
pub(crate) type Item = HashMap<String, AttributeValue>;

/// A call to DynamoDB failed, after the SDK's own retries: there was no answer, or a refusal such as throttling or a missing
/// permission. A write may have been carried out nevertheless. Every method of the tables may fail in this way.
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
        let config = aws_sdk_dynamodb::config::Builder::from(sdk)
            .retry_classifier(TransactionConflict)
            .build();
        Self {
            client: Client::from_conf(config),
            name,
        }
    }

    /// The item with this key, with all writes that were answered before.
    pub(crate) async fn get(
        &self,
        attribute: &str,
        key: AttributeValue,
    ) -> Result<Option<Item>, StoreError> {
        let output = self
            .client
            .get_item()
            .table_name(&self.name)
            .key(attribute, key)
            .consistent_read(true)
            .send()
            .await
            .map_err(self.failed("GetItem"))?;
        Ok(output.item)
    }

    /// The items that there are with these keys, with all writes that were answered before: many in one call.
    pub(crate) async fn get_many(
        &self,
        attribute: &str,
        keys: impl IntoIterator<Item = String>,
    ) -> Result<Vec<Item>, StoreError> {
        let keys: HashSet<String> = keys.into_iter().collect();
        let mut waiting: Vec<_> = keys
            .into_iter()
            .map(|key| Item::from([(attribute.to_owned(), AttributeValue::S(key))]))
            .collect();
        let mut items = Vec::with_capacity(waiting.len());
        while !waiting.is_empty() {
            let batch = waiting.split_off(waiting.len().saturating_sub(MAX_BATCH_KEYS));
            let keys = KeysAndAttributes::builder()
                .set_keys(Some(batch))
                .consistent_read(true)
                .build()
                .expect("it has keys");
            let output = self
                .client
                .batch_get_item()
                .request_items(&self.name, keys)
                .send()
                .await
                .map_err(self.failed("BatchGetItem"))?;
            items.extend(
                output
                    .responses
                    .into_iter()
                    .flat_map(|mut tables| tables.remove(&self.name))
                    .flatten(),
            );
            // What did not fit into one answer.
            let unprocessed = output
                .unprocessed_keys
                .and_then(|mut tables| tables.remove(&self.name));
            waiting.extend(unprocessed.into_iter().flat_map(|keys| keys.keys));
        }
        Ok(items)
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

    /// Puts an item if its condition holds, and returns whether it did.
    pub(crate) async fn conditional_put(
        &self,
        put: PutItemFluentBuilder,
    ) -> Result<bool, StoreError> {
        match put.send().await {
            Ok(_) => Ok(true),
            Err(error)
                if error
                    .as_service_error()
                    .is_some_and(PutItemError::is_conditional_check_failed_exception) =>
            {
                Ok(false)
            }
            Err(error) => Err(self.failed("PutItem")(error)),
        }
    }
}

/// Retries calls that conflicted with a transaction on the same item, which the SDK does not do on its own ("Transaction conflict
/// handling in DynamoDB" in its developer guide).
#[derive(Debug)]
struct TransactionConflict;

impl ClassifyRetry for TransactionConflict {
    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        let Some(Err(error)) = context.output_or_error() else {
            return RetryAction::NoActionIndicated;
        };
        let is_conflict = error.as_operation_error().is_some_and(|error| {
            if let Some(error) = error.downcast_ref::<TransactWriteItemsError>() {
                cancellation_codes(error).any(|code| code == "TransactionConflict")
            } else {
                let update = error.downcast_ref::<UpdateItemError>();
                let put = error.downcast_ref::<PutItemError>();
                let delete = error.downcast_ref::<DeleteItemError>();
                let code = (update.and_then(ProvideErrorMetadata::code))
                    .or_else(|| put.and_then(ProvideErrorMetadata::code))
                    .or_else(|| delete.and_then(ProvideErrorMetadata::code));
                code == Some("TransactionConflictException")
            }
        });
        if is_conflict {
            RetryAction::transient_error()
        } else {
            RetryAction::NoActionIndicated
        }
    }

    fn name(&self) -> &'static str {
        "transaction conflict"
    }
}

/// Why the steps of a transaction were refused: `None` for those that were not.
pub(crate) fn cancellation_codes(
    error: &TransactWriteItemsError,
) -> impl Iterator<Item = &str> + '_ {
    let reasons = match error {
        TransactWriteItemsError::TransactionCanceledException(canceled) => {
            canceled.cancellation_reasons()
        }
        _ => &[],
    };
    reasons.iter().filter_map(|reason| reason.code())
}

/// A change of an item's attributes, as an update expression with its names and values. Each attribute `a` is named `#a` and
/// its new value `:a`, so that no attribute can collide with DynamoDB's reserved words.
#[derive(Default)]
pub(crate) struct Change {
    set: Vec<(&'static str, AttributeValue)>,
    remove: Vec<&'static str>,
    named: Vec<&'static str>,
}

impl Change {
    /// Sets an attribute.
    pub(crate) fn set(mut self, name: &'static str, value: AttributeValue) -> Self {
        self.set.push((name, value));
        self
    }

    /// Removes an attribute.
    pub(crate) fn remove(mut self, name: &'static str) -> Self {
        self.remove.push(name);
        self
    }

    /// Sets an attribute if there is a value, and removes it otherwise.
    pub(crate) fn set_or_remove(self, name: &'static str, value: Option<AttributeValue>) -> Self {
        match value {
            Some(value) => self.set(name, value),
            None => self.remove(name),
        }
    }

    /// Names an attribute that only a condition uses.
    pub(crate) fn name(mut self, name: &'static str) -> Self {
        self.named.push(name);
        self
    }

    pub(crate) fn expression(&self) -> String {
        let set: Vec<String> = self
            .set
            .iter()
            .map(|(name, _)| format!("#{name} = :{name}"))
            .collect();
        let remove: Vec<String> = self.remove.iter().map(|name| format!("#{name}")).collect();
        [("SET", set), ("REMOVE", remove)]
            .into_iter()
            .filter(|(_, attributes)| !attributes.is_empty())
            .map(|(clause, attributes)| format!("{clause} {}", attributes.join(", ")))
            .collect::<Vec<_>>()
            .join(" ")
    }

    pub(crate) fn names(&self) -> HashMap<String, String> {
        let set = self.set.iter().map(|(name, _)| name);
        set.chain(&self.remove)
            .chain(&self.named)
            .map(|name| (format!("#{name}"), (*name).to_owned()))
            .collect()
    }

    pub(crate) fn values(self) -> Item {
        self.set
            .into_iter()
            .map(|(name, value)| (format!(":{name}"), value))
            .collect()
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
