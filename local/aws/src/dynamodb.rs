//! The embedded DynamoDB engine, with the tables that template.yaml describes, behind the API of DynamoDB as far as the tunnel
//! uses it.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use aws_sdk_dynamodb::{
    Client,
    error::BuildError,
    types::{
        AttributeDefinition, BillingMode, CreateGlobalSecondaryIndexAction,
        GlobalSecondaryIndexUpdate, KeySchemaElement, Projection, ProjectionType,
        TimeToLiveSpecification,
    },
};
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use dynoxide::DynoxideError;
use serde::{Serialize, de::DeserializeOwned};
use serde_yaml_ng::Value;
use tokio::{net::TcpListener, time::interval};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use crate::{
    caller::AccessKey,
    revision::{Revision, Revisions},
};

/// The template that deploys the same tables to AWS.
const TEMPLATE: &str = include_str!("../../../template.yaml");
/// How often expired items are removed. The engine does not do it on its own.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// The format of what the tables hold, kept as SQLite's user_version. Data from before it was kept has 0 and the same format.
const FORMAT: u32 = 1;
/// The file in a data directory that holds everything.
pub(crate) const DATABASE_FILE: &str = "tunnel.db";
/// The file in a data directory with the token that was made when there was none.
const FIRST_TOKEN_FILE: &str = "first-token";
/// The file in a data directory that the server which uses it has locked; it holds that server's process id.
const LOCK_FILE: &str = "tunnel.lock";

/// Where SQLite keeps a number of the application's own.
const USER_VERSION: &str = "user_version";
/// How long another process may keep the database locked.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The name of the table with the tunnels, as in the template.
pub const TUNNELS: &str = "TunnelsTable";
/// The name of the table with the connections.
pub const CONNECTIONS: &str = "ConnectionsTable";
/// The name of the table with the replies.
pub const PENDING_REQUESTS: &str = "PendingRequestsTable";
/// The name of the table with the tokens.
pub const TOKENS: &str = "TokensTable";

/// The table whose name the functions read from this variable.
pub fn table_of_variable(variable: &str) -> Option<&'static str> {
    match variable {
        "TUNNELS_TABLE" => Some(TUNNELS),
        "CONNECTIONS_TABLE" => Some(CONNECTIONS),
        "PENDING_REQUESTS_TABLE" => Some(PENDING_REQUESTS),
        "TOKENS_TABLE" => Some(TOKENS),
        _ => None,
    }
}

/// Why the engine or its data cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// Another server has the directory open.
    #[error("{} is in use by another tunnel-local{}", path.display(), process(holder))]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The other server's process id, as far as it can be read.
        holder: String,
    },
    /// A file or directory cannot be used.
    #[error("cannot use {}: {source}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The path is not UTF-8, as SQLite needs it.
    #[error("the path {} is not UTF-8", .0.display())]
    Path(PathBuf),
    /// The engine cannot open its file.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: DynoxideError,
    },
    /// The data is of a newer version of this program.
    #[error(
        "{} is of a newer version: it has format {found}, and this version reads formats up to {FORMAT}. Use the version that has written it, or a backup from before",
        path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The format of the data cannot be read or noted.
    #[error("cannot use {}: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: rusqlite::Error,
    },
    /// Whether the data has changed cannot be determined.
    #[error("cannot read the version of the data: {0}")]
    Revision(rusqlite::Error),
    /// The process is ending.
    #[error("the process is ending")]
    Ending,
    /// The engine does not work in memory.
    #[error("the database engine cannot start: {0}")]
    Memory(DynoxideError),
    /// A table cannot be made.
    #[error("cannot create the table {table}: {cause}")]
    Table {
        /// Its name.
        table: String,
        /// What the engine or its client says.
        cause: String,
    },
    /// template.yaml does not spell a table out.
    #[error("template.yaml: {0}")]
    Template(String),
}

fn process(holder: &str) -> String {
    match holder.trim() {
        "" => String::new(),
        id => format!(" (process {id})"),
    }
}

/// A data directory that one server holds for itself until this is dropped, or its process ends.
#[derive(Debug)]
pub struct DirectoryLock {
    _file: File,
}

impl DirectoryLock {
    /// Creates the directory if need be, and takes it.
    ///
    /// # Errors
    /// If it cannot be used, or another server has it.
    pub fn acquire(directory: &Path) -> Result<Self, DataError> {
        create_private(directory)?;
        let path = directory.join(LOCK_FILE);
        let fault = |source| DataError::File {
            path: path.clone(),
            source,
        };
        let mut file = match new_private_file(&path) {
            Ok(new) => {
                give_to_owner(&new, directory);
                new
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => private_file(&path)?,
            Err(error) => return Err(fault(error)),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Only for the message.
                let _ = (&file).take(20).read_to_string(&mut holder);
                return Err(DataError::InUse {
                    path: directory.to_owned(),
                    holder,
                });
            }
            Err(TryLockError::Error(source)) => return Err(fault(source)),
        }
        file.set_len(0).map_err(fault)?;
        writeln!(file, "{}", std::process::id()).map_err(fault)?;
        Ok(Self { _file: file })
    }
}

/// Creates a directory that only its user can look into. One that exists stays as it is.
fn create_private(directory: &Path) -> Result<(), DataError> {
    let mut create = std::fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut create, 0o700);
    create
        .recursive(true)
        .create(directory)
        .map_err(|source| DataError::File {
            path: directory.to_owned(),
            source,
        })
}

/// Opens or creates a file that only its user can read, whatever the directory lets others do. A symbolic link is not followed: root
/// may use the directory of a server that runs as another user, who must not choose what root changes.
pub(crate) fn private_file(path: &Path) -> Result<File, DataError> {
    let fault = |source| DataError::File {
        path: path.to_owned(),
        source,
    };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        let no_follow = rustix::fs::OFlags::NOFOLLOW.bits();
        options.mode(0o600).custom_flags(no_follow.cast_signed());
    }
    let file = options.open(path).map_err(|error| match error {
        _ if path.is_symlink() => fault(io::Error::other(
            "it is a symbolic link, which is not followed; the directory may be one",
        )),
        error => fault(error),
    })?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let permissions = std::fs::Permissions::from_mode(0o600);
        file.set_permissions(permissions).map_err(fault)?;
    }
    Ok(file)
}

/// Creates a file that only its user can read. What has the name already, be it a link, is left alone.
pub(crate) fn new_private_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// Gives a new file in a directory to the directory's owner: root may have made it for a server that runs as another user. Who may
/// not give files away keeps it.
#[cfg(unix)]
pub(crate) fn give_to_owner(file: &File, directory: &Path) {
    use std::os::unix::fs::{MetadataExt, fchown};

    let (Ok(file_now), Ok(directory)) = (file.metadata(), directory.metadata()) else {
        return;
    };
    if file_now.uid() != directory.uid() {
        let _ = fchown(file, Some(directory.uid()), Some(directory.gid()));
    }
}

/// Elsewhere files are made for whoever makes them.
#[cfg(not(unix))]
pub(crate) fn give_to_owner(_file: &File, _directory: &Path) {}

/// Makes the file in a data directory for a server's first token; only its user can read it.
///
/// # Errors
/// If it cannot be made.
pub fn first_token_file(directory: &Path) -> Result<(PathBuf, File), DataError> {
    let path = directory.join(FIRST_TOKEN_FILE);
    let file = private_file(&path)?;
    file.set_len(0).map_err(|source| DataError::File {
        path: path.clone(),
        source,
    })?;
    Ok((path, file))
}

/// The engine with its data.
#[derive(Clone)]
pub struct Database {
    engine: dynoxide::Database,
    revisions: Revisions,
}

impl Database {
    /// The revision of the data, which is another one after every write, by this process or by another one that has the directory
    /// open. Only that expired items are removed need not change it. It costs the same however much data there is.
    ///
    /// # Errors
    /// If the file of the data cannot be read.
    pub async fn revision(&self) -> Result<Revision, DataError> {
        let revisions = self.revisions.clone();
        let revision = tokio::task::spawn_blocking(move || revisions.current()).await;
        revision
            .map_err(|_| DataError::Ending)?
            .map_err(DataError::Revision)
    }
}

/// Opens the engine's data; without a directory it forgets all at the end.
///
/// # Errors
/// If the directory cannot be used.
pub fn open(data: Option<&Path>) -> Result<Database, DataError> {
    let Some(directory) = data else {
        return Ok(Database {
            engine: dynoxide::Database::memory().map_err(DataError::Memory)?,
            revisions: Revisions::in_memory(),
        });
    };
    create_private(directory)?;
    let path = directory.join(DATABASE_FILE);
    // Tokens' hashes are in it, and who owns which name. SQLite gives the files beside it the same mode.
    for name in [DATABASE_FILE, "tunnel.db-wal", "tunnel.db-shm"] {
        let file = directory.join(name);
        if name == DATABASE_FILE || file.exists() {
            private_file(&file)?;
        }
    }
    let name = path.to_str().ok_or_else(|| DataError::Path(path.clone()))?;
    let revisions = Revisions::in_file(note_format(&path)?);
    let engine =
        dynoxide::Database::new(name).map_err(|source| DataError::Open { path, source })?;
    Ok(Database { engine, revisions })
}

/// Refuses data of a newer format. Older data is read as it is, and from then on has this version's. Returns its connection to the
/// file.
fn note_format(path: &Path) -> Result<rusqlite::Connection, DataError> {
    let fault = |source| DataError::Format {
        path: path.to_owned(),
        source,
    };
    let database = rusqlite::Connection::open(path).map_err(fault)?;
    database.busy_timeout(BUSY_TIMEOUT).map_err(fault)?;
    if check_format(&database, path)? < FORMAT {
        database
            .pragma_update(None, USER_VERSION, FORMAT)
            .map_err(fault)?;
    }
    Ok(database)
}

/// The format of a database, if this version reads it.
pub(crate) fn check_format(database: &rusqlite::Connection, path: &Path) -> Result<u32, DataError> {
    let found = database
        .pragma_query_value(None, USER_VERSION, |row| row.get(0))
        .map_err(|source| DataError::Format {
            path: path.to_owned(),
            source,
        })?;
    if found > FORMAT {
        return Err(DataError::Newer {
            path: path.to_owned(),
            found,
        });
    }
    Ok(found)
}

/// Whether a directory holds data.
pub fn has_data(directory: &Path) -> bool {
    directory.join(DATABASE_FILE).is_file()
}

/// The engine behind DynamoDB's API, for callers that sign with `access_key`.
pub fn router(database: Database, access_key: AccessKey) -> Router {
    Router::new().fallback(answer).with_state(Endpoint {
        database,
        access_key,
    })
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
    let router = router(database.clone(), access_key);
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
    /// Signed with another key.
    Unauthorized,
    /// The process is ending.
    Unavailable,
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
            Self::Unavailable => (
                503,
                r#"{"__type":"com.amazon.coral.availability#ServiceUnavailable"}"#.to_owned(),
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
    let json = match answered {
        Ok(answered) => answered?,
        Err(failed) if failed.is_panic() => std::panic::resume_unwind(failed.into_panic()),
        // The process is ending.
        Err(_) => return Err(DynamoDbError::Unavailable),
    };
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
    let Database { engine, revisions } = database;
    match operation {
        "GetItem" => call(body, |input| engine.get_item(input)),
        "BatchGetItem" => call(body, |input| engine.batch_get_item(input)),
        "PutItem" => call(body, |input| revisions.written(engine.put_item(input))),
        "UpdateItem" => call(body, |input| revisions.written(engine.update_item(input))),
        "DeleteItem" => call(body, |input| revisions.written(engine.delete_item(input))),
        "Query" => call(body, |input| engine.query(input)),
        "Scan" => call(body, |input| engine.scan(input)),
        "ListTables" => call(body, |input| engine.list_tables(input)),
        "CreateTable" => call(body, |input| revisions.written(engine.create_table(input))),
        "DescribeTable" => call(body, |input| engine.describe_table(input)),
        "UpdateTable" => call(body, |input| revisions.written(engine.update_table(input))),
        "TransactWriteItems" => call(body, |input| {
            revisions.written(engine.transact_write_items(input))
        }),
        "DescribeTimeToLive" => call(body, |input| engine.describe_time_to_live(input)),
        "UpdateTimeToLive" => call(body, |input| {
            revisions.written(engine.update_time_to_live(input))
        }),
        _ => Err(DynamoDbError::Unknown),
    }
}

/// Removes expired items until `stop` is cancelled.
pub async fn sweep(database: Database, stop: CancellationToken) {
    let mut due = interval(SWEEP_INTERVAL);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = due.tick() => {}
        }
        let database = database.clone();
        match tokio::task::spawn_blocking(move || database.engine.sweep_ttl()).await {
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
    /// Indexes, which project keys only.
    pub indexes: Vec<Index>,
}

/// An index of a table.
#[derive(Debug, Eq, PartialEq)]
pub struct Index {
    /// Its name.
    pub name: String,
    /// Key attributes with HASH or RANGE.
    pub keys: Vec<(String, String)>,
}

/// Creates the tables that do not exist yet, and lets their items expire. Each is named by its logical id in the template. It can
/// be repeated, and so finishes what an earlier start did not.
///
/// # Errors
/// If the engine refuses one.
pub async fn create_tables(client: &Client) -> Result<(), DataError> {
    let failed = |table: &str, error: &dyn std::error::Error| DataError::Table {
        table: table.to_owned(),
        cause: cause_of(error),
    };
    let existing = client
        .list_tables()
        .send()
        .await
        .map_err(|error| failed("list", &error))?;
    for table in tables()? {
        let name = &table.logical_id;
        if !existing.table_names().contains(name) {
            create_table(client, &table)
                .await
                .map_err(|error| failed(name, &error))?;
        }
        create_indexes(client, &table)
            .await
            .map_err(|error| failed(name, &error))?;
        if let Some(attribute) = &table.ttl {
            expire_by(client, name, attribute)
                .await
                .map_err(|error| failed(name, &error))?;
        }
    }
    Ok(())
}

async fn create_table(client: &Client, table: &Table) -> Result<(), aws_sdk_dynamodb::Error> {
    client
        .create_table()
        .table_name(&table.logical_id)
        .billing_mode(BillingMode::PayPerRequest)
        .set_key_schema(Some(key_schema(&table.keys)?))
        .set_attribute_definitions(Some(definitions(&table.attributes, &table.keys)?))
        .send()
        .await?;
    Ok(())
}

/// Creates the indexes that a table lacks, such as those that are newer than a directory's data.
async fn create_indexes(client: &Client, table: &Table) -> Result<(), aws_sdk_dynamodb::Error> {
    if table.indexes.is_empty() {
        return Ok(());
    }
    let described = client
        .describe_table()
        .table_name(&table.logical_id)
        .send()
        .await?;
    let existing: Vec<&str> = described
        .table()
        .map(|table| table.global_secondary_indexes())
        .unwrap_or_default()
        .iter()
        .filter_map(|index| index.index_name())
        .collect();
    for index in &table.indexes {
        if existing.contains(&index.name.as_str()) {
            continue;
        }
        let keys_only = Projection::builder()
            .projection_type(ProjectionType::KeysOnly)
            .build();
        let create = CreateGlobalSecondaryIndexAction::builder()
            .index_name(&index.name)
            .set_key_schema(Some(key_schema(&index.keys)?))
            .projection(keys_only)
            .build()?;
        client
            .update_table()
            .table_name(&table.logical_id)
            .set_attribute_definitions(Some(definitions(&table.attributes, &index.keys)?))
            .global_secondary_index_updates(
                GlobalSecondaryIndexUpdate::builder().create(create).build(),
            )
            .send()
            .await?;
    }
    Ok(())
}

fn key_schema(keys: &[(String, String)]) -> Result<Vec<KeySchemaElement>, BuildError> {
    keys.iter()
        .map(|(name, kind)| {
            KeySchemaElement::builder()
                .attribute_name(name)
                .key_type(kind.as_str().into())
                .build()
        })
        .collect()
}

/// The definitions of the attributes that are keys: DynamoDB takes no others.
fn definitions(
    attributes: &[(String, String)],
    keys: &[(String, String)],
) -> Result<Vec<AttributeDefinition>, BuildError> {
    attributes
        .iter()
        .filter(|(name, _)| keys.iter().any(|(key, _)| key == name))
        .map(|(name, kind)| {
            AttributeDefinition::builder()
                .attribute_name(name)
                .attribute_type(kind.as_str().into())
                .build()
        })
        .collect()
}

async fn expire_by(
    client: &Client,
    table: &str,
    attribute: &str,
) -> Result<(), aws_sdk_dynamodb::Error> {
    let specification = TimeToLiveSpecification::builder()
        .attribute_name(attribute)
        .enabled(true)
        .build()?;
    client
        .update_time_to_live()
        .table_name(table)
        .time_to_live_specification(specification)
        .send()
        .await?;
    Ok(())
}

/// An error with all its causes, but for those that it repeats.
pub fn cause_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}

/// The tables that the template describes.
///
/// # Errors
/// If one of them is not spelled out literally.
pub fn tables() -> Result<Vec<Table>, DataError> {
    let template: Value = serde_yaml_ng::from_str(TEMPLATE)
        .map_err(|error| DataError::Template(error.to_string()))?;
    let resources = template
        .get("Resources")
        .and_then(Value::as_mapping)
        .ok_or_else(|| DataError::Template("it has no Resources".to_owned()))?;
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
                    indexes: indexes(property("GlobalSecondaryIndexes"))?,
                })
            };
            table().ok_or_else(|| DataError::Template(format!("not a literal table: {id:?}")))
        })
        .collect()
}

fn text(value: Option<&Value>) -> Option<String> {
    value.and_then(Value::as_str).map(str::to_owned)
}

fn pairs(list: Option<&Value>, first: &str, second: &str) -> Option<Vec<(String, String)>> {
    list?
        .as_sequence()?
        .iter()
        .map(|entry| Some((text(entry.get(first))?, text(entry.get(second))?)))
        .collect()
}

/// The indexes of a table, if all of them are spelled out and project keys only.
fn indexes(list: Option<&Value>) -> Option<Vec<Index>> {
    let Some(list) = list else {
        return Some(Vec::new());
    };
    let index = |index: &Value| {
        let projection = index.get("Projection")?.get("ProjectionType")?;
        (projection.as_str()? == "KEYS_ONLY").then_some(())?;
        Some(Index {
            name: text(index.get("IndexName"))?,
            keys: pairs(index.get("KeySchema"), "AttributeName", "KeyType")?,
        })
    };
    list.as_sequence()?.iter().map(index).collect()
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_has_one_server_at_a_time() {
        let directory = tempfile::tempdir().expect("a directory");
        let first = DirectoryLock::acquire(directory.path()).expect("free");
        let second = DirectoryLock::acquire(directory.path()).expect_err("in use");
        assert_eq!(
            second.to_string(),
            format!(
                "{} is in use by another tunnel-local (process {})",
                directory.path().display(),
                std::process::id()
            )
        );
        drop(first);
        DirectoryLock::acquire(directory.path()).expect("free again");
    }

    #[test]
    fn files_are_private_even_in_a_directory_that_everyone_may_read() {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).expect("set");
        let _lock = DirectoryLock::acquire(directory.path()).expect("free");
        let _database = open(Some(directory.path())).expect("a database");
        let modes: Vec<(String, u32)> = std::fs::read_dir(directory.path())
            .expect("a directory")
            .map(|entry| {
                let entry = entry.expect("an entry");
                let mode = entry.metadata().expect("metadata").permissions().mode() & 0o777;
                (entry.file_name().to_string_lossy().into_owned(), mode)
            })
            .collect();
        assert!(modes.len() >= 2, "{modes:?}");
        assert!(modes.iter().all(|(_, mode)| *mode == 0o600), "{modes:?}");
    }
}
