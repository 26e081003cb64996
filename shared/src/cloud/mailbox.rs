//! The pending-requests table: where `default` leaves the parts of a reply and `forward` finds them.
//!
//! A part's key starts with the connection it came from, as API Gateway reports it and not as the agent claims. So an agent can
//! only ever write replies to requests that were sent to itself, and nothing need be written before a request is sent.

use std::time::Duration;

use aws_sdk_dynamodb::{primitives::Blob, types::AttributeValue};
use bytes::Bytes;
use http::HeaderMap;
use serde::{Deserialize, Serialize};

use super::sdk::SdkConfig;
use super::store::{Item, StoreError, Table, number, read_flag, read_number, read_text, text};
use crate::{
    headers,
    id::{ConnectionId, RequestId},
    protocol::{AgentError, AgentErrorCode, BodyPart, HttpResponse},
};

/// How long a part waits to be read. TTL removes it then, which costs nothing; a delete would be billed.
const KEPT: Duration = Duration::from_secs(5 * 60);

/// The number under which a failure is kept, behind all parts.
const FAILURE: u32 = u32::MAX;

/// A piece of an agent's reply.
#[derive(Clone, Debug, PartialEq)]
pub enum ReplyPart {
    /// Part 0: the response's head, and the start of its body.
    Head(ReplyHead, Chunk),
    /// Any later part.
    Body(Chunk),
    /// There is no response, or no more of it.
    Failed {
        /// What kind of failure.
        code: AgentErrorCode,
        /// The failure in a sentence.
        message: String,
    },
}

/// Body bytes, and whether more follow.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Chunk {
    /// The bytes.
    pub bytes: Bytes,
    /// Further parts follow.
    pub more: bool,
}

/// A response without its body.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplyHead {
    /// 200 to 599, if the agent is honest.
    pub status_code: u16,
    /// The fields, as the agent sent them.
    #[serde(with = "headers::json")]
    pub headers: HeaderMap,
    /// How long the local service took to its head, in milliseconds.
    pub processing_time_ms: u64,
}

/// A piece of a reply with its place: the request it answers and its number.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The request.
    pub request_id: RequestId,
    /// The part's number.
    pub part: u32,
    /// What it says.
    pub content: ReplyPart,
}

impl From<HttpResponse> for Reply {
    fn from(response: HttpResponse) -> Self {
        let head =
            ReplyHead { status_code: response.status_code, headers: response.headers, processing_time_ms: response.processing_time_ms };
        Self {
            request_id: response.request_id,
            part: 0,
            content: ReplyPart::Head(head, Chunk { bytes: response.body.0, more: response.more }),
        }
    }
}

impl From<BodyPart> for Reply {
    fn from(part: BodyPart) -> Self {
        Self { request_id: part.request_id, part: part.part, content: ReplyPart::Body(Chunk { bytes: part.body.0, more: part.more }) }
    }
}

impl Reply {
    /// A failure of one request; `None` when the agent named none.
    pub fn of_error(error: AgentError) -> Option<Self> {
        Some(Self { request_id: error.request_id?, part: FAILURE, content: ReplyPart::Failed { code: error.code, message: error.message } })
    }
}

/// The table.
#[derive(Clone, Debug)]
pub struct Mailbox(Table);

impl Mailbox {
    /// The table of this name.
    pub fn new(sdk: &SdkConfig, name: String) -> Self {
        Self(Table::new(sdk, name))
    }

    /// Leaves a part that came from `sender`.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn put(&self, sender: &ConnectionId, reply: Reply, now: Duration) -> Result<(), StoreError> {
        let table = &self.0;
        let put = table
            .client
            .put_item()
            .table_name(&table.name)
            .item("requestKey", text(key(sender, &reply.request_id)))
            .item("part", number(reply.part.into()))
            .item("ttl", number((now + KEPT).as_secs()));
        let put = match reply.content {
            ReplyPart::Head(head, chunk) => with_chunk(put.item("head", text(json(&head))), chunk),
            ReplyPart::Body(chunk) => with_chunk(put, chunk),
            ReplyPart::Failed { code, message } => put.item("failure", text(json(&(code, message)))),
        };
        put.send().await.map_err(table.failed("PutItem"))?;
        Ok(())
    }

    /// The parts of a reply that came from `sender` and have the number `from` or a later one.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn read(&self, sender: &ConnectionId, request: &RequestId, from: u32) -> Result<Vec<(u32, ReplyPart)>, StoreError> {
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
    serde_json::to_string(value).expect("strings, numbers and maps with string keys have a JSON text")
}

fn with_chunk(
    put: aws_sdk_dynamodb::operation::put_item::builders::PutItemFluentBuilder,
    chunk: Chunk,
) -> aws_sdk_dynamodb::operation::put_item::builders::PutItemFluentBuilder {
    put.item("body", AttributeValue::B(Blob::new(chunk.bytes))).item("more", AttributeValue::Bool(chunk.more))
}

fn part(item: &Item) -> Option<(u32, ReplyPart)> {
    let number = u32::try_from(read_number(item, "part")?).ok()?;
    let content = if let Some(failure) = read_text(item, "failure") {
        let (code, message) = serde_json::from_str(failure).ok()?;
        ReplyPart::Failed { code, message }
    } else {
        let bytes = item.get("body")?.as_b().ok()?.clone().into_inner().into();
        let chunk = Chunk { bytes, more: read_flag(item, "more") };
        match read_text(item, "head") {
            Some(head) => ReplyPart::Head(serde_json::from_str(head).ok()?, chunk),
            None => ReplyPart::Body(chunk),
        }
    };
    Some((number, content))
}
