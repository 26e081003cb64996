//! The embedded DynamoDB engine, with the tables that template.yaml describes, behind the API of DynamoDB as far as the tunnel
//! uses it.

use std::{path::Path, time::Duration};

use anyhow::{Context, anyhow};
use aws_sdk_dynamodb::{
    Client,
    types::{AttributeDefinition, BillingMode, KeySchemaElement, TimeToLiveSpecification},
};
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use dynoxide::{Database, DynoxideError};
use serde::{Serialize, de::DeserializeOwned};
use serde_yaml_ng::Value;
use tokio::{net::TcpListener, time::interval};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use crate::caller::AccessKey;

/// The template that deploys the same tables to AWS.
const TEMPLATE: &str = include_str!("../../../template.yaml");
/// How often expired items are removed. The engine never does it by itself.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// The file in a data directory.
const FILE: &str = "tunnel.db";

/// The name of the table with the tunnels, as in the template.
pub const TUNNELS: &str = "TunnelsTable";
/// The name of the table with the connections.
pub const CONNECTIONS: &str = "ConnectionsTable";
/// The name of the table with the replies.
pub const PENDING_REQUESTS: &str = "PendingRequestsTable";
/// The name of the table with the tokens.
pub const TOKENS: &str = "TokensTable";

/// The table whose name the functions ask for with this variable.
pub fn table_of_variable(variable: &str) -> Option<&'static str> {
    match variable {
        "TUNNELS_TABLE" => Some(TUNNELS),
        "CONNECTIONS_TABLE" => Some(CONNECTIONS),
        "PENDING_REQUESTS_TABLE" => Some(PENDING_REQUESTS),
        "TOKENS_TABLE" => Some(TOKENS),
        _ => None,
    }
}

/// Opens the engine's data; without a directory it forgets all at the end.
///
/// # Errors
/// When the directory cannot be used.
pub fn open(data: Option<&Path>) -> anyhow::Result<Database> {
    let Some(directory) = data else {
        return Ok(Database::memory()?);
    };
    let mut create = std::fs::DirBuilder::new();
    // Tokens' hashes are in it, and who owns which name.
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut create, 0o700);
    create
        .recursive(true)
        .create(directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    let file = directory.join(FILE);
    let path = file
        .to_str()
        .ok_or_else(|| anyhow!("{} is not UTF-8", file.display()))?;
    Database::new(path).with_context(|| format!("cannot open {path}"))
}

/// Whether a directory holds data.
pub fn has_data(directory: &Path) -> bool {
    directory.join(FILE).is_file()
}

/// Serves the engine on a listener until `stop` is cancelled, to callers that sign with `access_key`.
pub fn serve(
    database: Database,
    listener: TcpListener,
    access_key: AccessKey,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    let stopped = stop.clone();
    let router = Router::new().fallback(answer).with_state(Endpoint {
        database: database.clone(),
        access_key,
    });
    tasks.spawn(async move {
        if let Err(error) = axum::serve(listener, router)
            .with_graceful_shutdown(stopped.cancelled_owned())
            .await
        {
            warn!(%error, "DynamoDB ended");
        }
    });
    tasks.spawn(sweep(database, stop.clone()));
}

#[derive(Clone)]
struct Endpoint {
    database: Database,
    access_key: AccessKey,
}

/// Why a call of the API fails.
enum DynamoDbError {
    /// Signed by somebody else.
    Unauthorized,
    /// Not a call that the tunnel makes.
    Unknown,
    /// Not the JSON of the call.
    Malformed(serde_json::Error),
    /// The engine's own errors.
    Engine(DynoxideError),
}

impl From<DynoxideError> for DynamoDbError {
    fn from(error: DynoxideError) -> Self {
        Self::Engine(error)
    }
}

impl IntoResponse for DynamoDbError {
    fn into_response(self) -> Response {
        let (status, body) = match self {
            Self::Unauthorized => (
                400,
                r#"{"__type":"com.amazon.coral.service#UnrecognizedClientException"}"#.to_owned(),
            ),
            Self::Unknown => (
                400,
                r#"{"__type":"com.amazon.coral.service#UnknownOperationException"}"#.to_owned(),
            ),
            Self::Malformed(error) => {
                let kind = "com.amazon.coral.service#SerializationException";
                (
                    400,
                    serde_json::json!({ "__type": kind, "Message": error.to_string() }).to_string(),
                )
            }
            Self::Engine(error) => (error.status_code(), error.to_json()),
        };
        (
            StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST),
            [(header::CONTENT_TYPE, JSON)],
            body,
        )
            .into_response()
    }
}

/// What DynamoDB calls its JSON.
const JSON: &str = "application/x-amz-json-1.0";

async fn answer(
    State(endpoint): State<Endpoint>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, DynamoDbError> {
    if !endpoint.access_key.is_signed_by(&headers) {
        return Err(DynamoDbError::Unauthorized);
    }
    let target = headers
        .get("x-amz-target")
        .and_then(|target| target.to_str().ok())
        .unwrap_or_default();
    let operation = target
        .strip_prefix("DynamoDB_20120810.")
        .ok_or(DynamoDbError::Unknown)?
        .to_owned();
    // The engine works where it is called, on disk if it keeps data.
    let answered =
        tokio::task::spawn_blocking(move || carry_out(&endpoint.database, &operation, &body)).await;
    let json = answered.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
    Ok(([(header::CONTENT_TYPE, JSON)], json).into_response())
}

fn carry_out(database: &Database, operation: &str, body: &[u8]) -> Result<Vec<u8>, DynamoDbError> {
    fn call<I: DeserializeOwned, O: Serialize>(
        body: &[u8],
        call: impl FnOnce(I) -> dynoxide::Result<O>,
    ) -> Result<Vec<u8>, DynamoDbError> {
        let output = call(serde_json::from_slice(body).map_err(DynamoDbError::Malformed)?)?;
        serde_json::to_vec(&output).map_err(DynamoDbError::Malformed)
    }
    match operation {
        "GetItem" => call(body, |input| database.get_item(input)),
        "PutItem" => call(body, |input| database.put_item(input)),
        "UpdateItem" => call(body, |input| database.update_item(input)),
        "DeleteItem" => call(body, |input| database.delete_item(input)),
        "Query" => call(body, |input| database.query(input)),
        "Scan" => call(body, |input| database.scan(input)),
        "ListTables" => call(body, |input| database.list_tables(input)),
        "CreateTable" => call(body, |input| database.create_table(input)),
        "UpdateTimeToLive" => call(body, |input| database.update_time_to_live(input)),
        _ => Err(DynamoDbError::Unknown),
    }
}

async fn sweep(database: Database, stop: CancellationToken) {
    let mut due = interval(SWEEP_INTERVAL);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = due.tick() => {}
        }
        let database = database.clone();
        match tokio::task::spawn_blocking(move || database.sweep_ttl()).await {
            Ok(Ok(removed)) => debug!(removed, "expired items removed"),
            Ok(Err(error)) => warn!(%error, "expired items could not be removed"),
            Err(error) => warn!(%error, "expired items could not be removed"),
        }
    }
}

/// A table of the template.
#[derive(Debug, Eq, PartialEq)]
pub struct Table {
    /// Its name in the template, which is its name here.
    pub logical_id: String,
    /// Key attributes with HASH or RANGE.
    pub keys: Vec<(String, String)>,
    /// The types of the key attributes.
    pub attributes: Vec<(String, String)>,
    /// The attribute with the time at which an item expires.
    pub ttl: Option<String>,
}

/// Creates the tables that do not exist yet. Each is named by its logical id in the template.
///
/// # Errors
/// When the engine refuses one.
pub async fn create_tables(client: &Client) -> anyhow::Result<()> {
    let existing = client
        .list_tables()
        .send()
        .await
        .context("DynamoDB does not answer")?;
    for table in tables()? {
        if existing.table_names().contains(&table.logical_id) {
            continue;
        }
        let keys = table.keys.iter().map(|(name, kind)| {
            KeySchemaElement::builder()
                .attribute_name(name)
                .key_type(kind.as_str().into())
                .build()
        });
        let attributes = table.attributes.iter().map(|(name, kind)| {
            AttributeDefinition::builder()
                .attribute_name(name)
                .attribute_type(kind.as_str().into())
                .build()
        });
        client
            .create_table()
            .table_name(&table.logical_id)
            .billing_mode(BillingMode::PayPerRequest)
            .set_key_schema(Some(keys.collect::<Result<_, _>>()?))
            .set_attribute_definitions(Some(attributes.collect::<Result<_, _>>()?))
            .send()
            .await
            .with_context(|| format!("cannot create {}", table.logical_id))?;
        if let Some(attribute) = table.ttl {
            let specification = TimeToLiveSpecification::builder()
                .attribute_name(attribute)
                .enabled(true)
                .build()?;
            client
                .update_time_to_live()
                .table_name(&table.logical_id)
                .time_to_live_specification(specification)
                .send()
                .await?;
        }
    }
    Ok(())
}

/// The tables that the template describes.
///
/// # Errors
/// When one of them is not spelled out literally.
pub fn tables() -> anyhow::Result<Vec<Table>> {
    let template: Value = serde_yaml_ng::from_str(TEMPLATE)?;
    let resources = template
        .get("Resources")
        .and_then(Value::as_mapping)
        .ok_or_else(|| anyhow!("the template has no Resources"))?;
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let pairs =
        |list: Option<&Value>, first: &str, second: &str| -> Option<Vec<(String, String)>> {
            list?
                .as_sequence()?
                .iter()
                .map(|entry| Some((text(entry.get(first))?, text(entry.get(second))?)))
                .collect()
        };
    resources
        .iter()
        .filter(|(_, resource)| {
            resource.get("Type").and_then(Value::as_str) == Some("AWS::DynamoDB::Table")
        })
        .map(|(id, resource)| {
            let properties = resource.get("Properties");
            let property = |name: &str| properties.and_then(|properties| properties.get(name));
            let table = || {
                Some(Table {
                    logical_id: text(Some(id))?,
                    keys: pairs(property("KeySchema"), "AttributeName", "KeyType")?,
                    attributes: pairs(
                        property("AttributeDefinitions"),
                        "AttributeName",
                        "AttributeType",
                    )?,
                    ttl: property("TimeToLiveSpecification")
                        .and_then(|ttl| text(ttl.get("AttributeName"))),
                })
            };
            table().ok_or_else(|| anyhow!("a table of the template is not spelled out: {id:?}"))
        })
        .collect()
}
