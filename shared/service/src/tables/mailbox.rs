//! The pending-requests table: where `default` leaves the parts of a reply that it cannot pass on, and `forward` finds them.
//!
//! A part's key starts with the connection it came from, as API Gateway reports it and not as the agent claims. So an agent can
//! only ever write replies to requests that were sent to itself, and nothing need be written before a request is sent.

use std::time::Duration;

use aws_sdk_dynamodb::{primitives::Blob, types::AttributeValue};
use serde::Serialize;

use crate::aws::sdk::SdkConfig;
use crate::replies::{Reply, ReplyPart};
use crate::tables::dynamodb::{
    Item, StoreError, Table, number, read_flag, read_number, read_text, text,
};
use tunnel_protocol::{
    body::Chunk,
    id::{ConnectionId, RequestId},
    message::Encoding,
};

/// How long a part waits to be read. TTL removes it then, which costs nothing; a delete would be billed.
const REPLY_TTL: Duration = Duration::from_secs(5 * 60);

/// The number under which a failure is kept, behind all parts.
const FAILURE_PART: u32 = u32::MAX;
/// The number under which the last window is kept.
const WINDOW_PART: u32 = u32::MAX - 1;

/// The table.
#[derive(Clone, Debug)]
pub struct MailboxTable(Table);

impl MailboxTable {
    /// The table of this name.
    pub fn new(sdk: &SdkConfig, name: String) -> Self {
        Self(Table::new(sdk, name))
    }

    /// Leaves a part that came from `sender`.
    ///
    /// # Errors
    /// If DynamoDB does not answer.
    pub async fn put(
        &self,
        sender: &ConnectionId,
        reply: Reply,
        now: Duration,
    ) -> Result<(), StoreError> {
        let table = &self.0;
        let part = match reply.content {
            ReplyPart::Head(..) | ReplyPart::Body(_) => reply.part,
            ReplyPart::Failed { .. } => FAILURE_PART,
            ReplyPart::Window(_) => WINDOW_PART,
        };
        let put = table
            .client
            .put_item()
            .table_name(&table.name)
            .item("requestKey", text(key(sender, &reply.request_id)))
            .item("part", number(part.into()))
            .item("ttl", number((now + REPLY_TTL).as_secs()));
        let put = match reply.content {
            ReplyPart::Head(head, chunk) => with_chunk(put.item("head", text(json(&head))), chunk),
            ReplyPart::Body(chunk) => with_chunk(put, chunk),
            ReplyPart::Failed {
                code,
                message,
                parts,
            } => put
                .item("failure", text(json(&(code, message))))
                .item("parts", number(parts.into())),
            ReplyPart::Window(parts) => put.item("window", number(parts.into())),
        };
        put.send().await.map_err(table.failed("PutItem"))?;
        Ok(())
    }

    /// The parts of a reply that came from `sender` and have the number `from` or a later one.
    ///
    /// # Errors
    /// If DynamoDB does not answer.
    pub async fn read(
        &self,
        sender: &ConnectionId,
        request: &RequestId,
        from: u32,
    ) -> Result<Vec<(u32, ReplyPart)>, StoreError> {
        let table = &self.0;
        let output = table
            .client
            .query()
            .table_name(&table.name)
            .key_condition_expression("requestKey = :key AND part >= :from")
            .expression_attribute_values(":key", text(key(sender, request)))
            .expression_attribute_values(":from", number(from.into()))
            .consistent_read(true)
            .send()
            .await
            .map_err(table.failed("Query"))?;
        Ok(output.items().iter().filter_map(part).collect())
    }
}

fn key(sender: &ConnectionId, request: &RequestId) -> String {
    format!("{sender}/{request}")
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value)
        .expect("strings, numbers and maps with string keys can always be encoded as JSON")
}

fn with_chunk(
    put: aws_sdk_dynamodb::operation::put_item::builders::PutItemFluentBuilder,
    chunk: Chunk,
) -> aws_sdk_dynamodb::operation::put_item::builders::PutItemFluentBuilder {
    let put = put
        .item("body", AttributeValue::B(Blob::new(chunk.bytes)))
        .item("more", AttributeValue::Bool(chunk.more));
    if chunk.encoding == Some(Encoding::Zstd) {
        put.item("zstd", AttributeValue::Bool(true))
    } else {
        put
    }
}

fn part(item: &Item) -> Option<(u32, ReplyPart)> {
    let number = u32::try_from(read_number(item, "part")?).ok()?;
    let content = if let Some(failure) = read_text(item, "failure") {
        let (code, message) = serde_json::from_str(failure).ok()?;
        let parts = read_number(item, "parts").and_then(|parts| u32::try_from(parts).ok());
        ReplyPart::Failed {
            code,
            message,
            parts: parts.unwrap_or_default(),
        }
    } else if let Some(parts) = read_number(item, "window") {
        ReplyPart::Window(u32::try_from(parts).ok()?)
    } else {
        let bytes = item.get("body")?.as_b().ok()?.clone().into_inner().into();
        let encoding = read_flag(item, "zstd").then_some(Encoding::Zstd);
        let chunk = Chunk {
            bytes,
            encoding,
            more: read_flag(item, "more"),
        };
        match read_text(item, "head") {
            Some(head) => ReplyPart::Head(serde_json::from_str(head).ok()?, chunk),
            None => ReplyPart::Body(chunk),
        }
    };
    Some((number, content))
}
