//! Exchanges in a SQLite file, so that they survive a restart. A thread writes them, and what it cannot keep up with is not kept.

use std::{
    fs::OpenOptions,
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderName, StatusCode};
use rusqlite::{Connection, Row, params};
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};
use tunnel_protocol::headers::text_to_value;

use super::{
    masking::Masking,
    packed_fields::PackedFields,
    recorded::{
        self, ExchangeId, RecordedBody, RecordedExchange, RecordedRequest, RecordedResponse,
        ReplaySource, State, Timings,
    },
    store::{Slot, StoreLimits},
    websocket::{Conversation, MessageKind, RecordedMessage, Side},
};
use crate::lock::lock;

/// How many exchanges may wait to be written.
const MAX_QUEUED: usize = 256;
/// How long another process with the same file is waited for.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// The version of the table. A file of another one is not touched.
const SCHEMA_VERSION: i32 = 1;
const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS exchanges (
    id INTEGER PRIMARY KEY,
    head TEXT NOT NULL,
    request_body BLOB NOT NULL,
    response_body BLOB,
    bytes INTEGER NOT NULL
);
PRAGMA user_version = 1;";

/// A file that cannot keep exchanges.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// It cannot be read or written.
    #[error(transparent)]
    File(#[from] io::Error),
    /// It is not what this program writes.
    #[error(transparent)]
    Database(#[from] rusqlite::Error),
    /// A later version has written it.
    #[error("it was written by another version of ttf")]
    Version,
}

/// What the writing thread is to do.
enum Task {
    Keep(Arc<Slot>, Masking),
    Clear,
}

/// Keeps exchanges in a file.
#[derive(Debug)]
pub(crate) struct History {
    tasks: Mutex<Option<SyncSender<Task>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl History {
    /// Opens a file, or makes it, readable for its owner alone, and reads what it has.
    pub(crate) fn open(
        path: &Path,
        limits: StoreLimits,
    ) -> Result<(Self, Vec<RecordedExchange>), HistoryError> {
        create_private(path)?;
        let connection = Connection::open(path)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        let version: i32 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if ![0, SCHEMA_VERSION].contains(&version) {
            return Err(HistoryError::Version);
        }
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        connection.execute_batch(SCHEMA)?;
        let kept = read(&connection, limits)?;
        let (sender, tasks) = sync_channel(MAX_QUEUED);
        let thread = std::thread::Builder::new()
            .name("history".to_owned())
            .spawn(move || write(connection, &tasks, limits))?;
        let history = Self {
            tasks: Mutex::new(Some(sender)),
            thread: Mutex::new(Some(thread)),
        };
        Ok((history, kept))
    }

    /// Keeps an exchange that has ended, with its secrets masked. Never blocks.
    pub(crate) fn keep(&self, slot: Arc<Slot>, masking: Masking) {
        if let Some(sender) = &*lock(&self.tasks)
            && let Err(TrySendError::Full(_)) = sender.try_send(Task::Keep(slot, masking))
        {
            debug!("the history cannot keep up: a request is not kept");
        }
    }

    /// Forgets all exchanges. Waits for room in the queue.
    pub(crate) fn clear(&self) {
        let sender = lock(&self.tasks).clone();
        if let Some(sender) = sender {
            let _ = sender.send(Task::Clear);
        }
    }

    /// Writes what is queued, and closes the file.
    pub(crate) fn close(&self) {
        drop(lock(&self.tasks).take());
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}

/// Makes the file, and takes it from others if it is there. SQLite gives the files beside it the same mode.
fn create_private(path: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.create(true).append(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(path)?;
    #[cfg(unix)]
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    drop(file);
    Ok(())
}

fn write(mut connection: Connection, tasks: &Receiver<Task>, limits: StoreLimits) {
    while let Ok(first) = tasks.recv() {
        let batch: Vec<Task> = [first].into_iter().chain(tasks.try_iter()).collect();
        if let Err(error) = write_batch(&mut connection, batch, limits) {
            warn!(
                error = &error as &dyn std::error::Error,
                "requests could not be kept in the history"
            );
        }
    }
}

fn write_batch(
    connection: &mut Connection,
    batch: Vec<Task>,
    limits: StoreLimits,
) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    for task in batch {
        match task {
            Task::Clear => {
                transaction.execute("DELETE FROM exchanges", [])?;
            }
            Task::Keep(slot, masking) => {
                let exchange = slot.copy();
                let head = Head::of(&exchange, &masking);
                let head = serde_json::to_string(&head).unwrap_or_default();
                let request = exchange.request.body.kept();
                let response = exchange
                    .response
                    .as_ref()
                    .map(|response| response.body.kept());
                let bytes =
                    head.len() + request.len() + response.as_ref().map_or(0, |kept| kept.len());
                transaction.execute(
                    "INSERT OR REPLACE INTO exchanges VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![
                        exchange.id.0.cast_signed(),
                        head,
                        request,
                        response,
                        i64::try_from(bytes).unwrap_or(i64::MAX)
                    ],
                )?;
            }
        }
    }
    transaction.execute(
        "DELETE FROM exchanges WHERE id IN (
            SELECT id FROM (
                SELECT id, row_number() OVER newest AS number, sum(bytes) OVER newest AS total
                FROM exchanges WINDOW newest AS (ORDER BY id DESC)
            ) WHERE number > ?1 OR total > ?2)",
        params![
            i64::try_from(limits.exchanges).unwrap_or(i64::MAX),
            i64::try_from(limits.bytes).unwrap_or(i64::MAX)
        ],
    )?;
    transaction.commit()
}

/// The exchanges of a file, oldest first. What cannot be read is left out.
fn read(connection: &Connection, limits: StoreLimits) -> rusqlite::Result<Vec<RecordedExchange>> {
    let mut statement = connection.prepare(
        "SELECT id, head, request_body, response_body FROM exchanges ORDER BY id DESC LIMIT ?1",
    )?;
    let limit = i64::try_from(limits.exchanges).unwrap_or(i64::MAX);
    let rows = statement.query_map([limit], exchange)?;
    let mut exchanges: Vec<_> = rows.filter_map(|row| row.ok().flatten()).collect();
    exchanges.reverse();
    Ok(exchanges)
}

fn exchange(row: &Row<'_>) -> rusqlite::Result<Option<RecordedExchange>> {
    let id = ExchangeId(row.get::<_, i64>(0)?.cast_unsigned());
    let head: String = row.get(1)?;
    let request_body: Vec<u8> = row.get(2)?;
    let response_body: Option<Vec<u8>> = row.get(3)?;
    let head: Option<Head> = serde_json::from_str(&head).ok();
    Ok(head.and_then(|head| head.into_exchange(id, request_body, response_body)))
}

/// Header fields as pairs of texts.
type Fields = Vec<(String, String)>;

/// All of an exchange but its bodies.
#[derive(Debug, Deserialize, Serialize)]
struct Head {
    tunnel: String,
    started_ms: u64,
    method: String,
    uri: String,
    request_headers: Fields,
    request_bytes: u64,
    upgrade: Option<String>,
    status: Option<u16>,
    response_headers: Fields,
    response_bytes: u64,
    transit_us: Option<u64>,
    sent_us: Option<u64>,
    head_us: Option<u64>,
    end_us: Option<u64>,
    state: String,
    reason: Option<String>,
    replay_of: Option<u64>,
    replay_edited: bool,
    replay_target: Option<String>,
    messages: Option<Vec<Message>>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Message {
    number: u64,
    at_us: u64,
    from: String,
    kind: String,
    bytes: u64,
    kept: String,
}

impl Head {
    fn of(exchange: &RecordedExchange, masking: &Masking) -> Self {
        let response = exchange.response.as_ref();
        let replay = exchange.replay.as_ref();
        let started = exchange.started.duration_since(SystemTime::UNIX_EPOCH);
        let timings = &exchange.timings;
        Self {
            tunnel: exchange.tunnel.to_string(),
            started_ms: millis(started.unwrap_or_default()),
            method: exchange.request.method.to_string(),
            uri: exchange.request.uri.to_string(),
            request_headers: fields(&exchange.request.headers.unpack(), masking),
            request_bytes: exchange.request.body.bytes,
            upgrade: exchange.request.upgrade.clone(),
            status: response.map(|response| response.status.as_u16()),
            response_headers: response
                .map(|response| fields(&response.headers.unpack(), masking))
                .unwrap_or_default(),
            response_bytes: response.map_or(0, |response| response.body.bytes),
            transit_us: timings.transit.map(micros),
            sent_us: timings.sent.map(micros),
            head_us: timings.head.map(micros),
            end_us: timings.end.map(micros),
            state: exchange.state.name().to_owned(),
            reason: exchange.state.reason().map(str::to_owned),
            replay_of: replay.map(|replay| replay.of.0),
            replay_edited: replay.is_some_and(|replay| replay.edited),
            replay_target: replay.and_then(|replay| replay.target.clone()),
            messages: exchange
                .conversation
                .as_ref()
                .map(|conversation| conversation.messages().map(Message::of).collect()),
        }
    }

    fn into_exchange(
        self,
        id: ExchangeId,
        request_body: Vec<u8>,
        response_body: Option<Vec<u8>>,
    ) -> Option<RecordedExchange> {
        let reason = self.reason.unwrap_or_default();
        let state = match self.state.as_str() {
            "complete" => State::Complete,
            "refused" => State::Refused(reason),
            "cancelled" => State::Cancelled(reason),
            _ => State::Failed(reason),
        };
        let response = match self.status {
            None => None,
            Some(status) => Some(RecordedResponse {
                status: StatusCode::from_u16(status).ok()?,
                headers: PackedFields::of(&headers(&self.response_headers)?),
                body: RecordedBody::of(response_body.unwrap_or_default(), self.response_bytes),
            }),
        };
        let micros = |micros: Option<u64>| micros.map(Duration::from_micros);
        Some(RecordedExchange {
            id,
            tunnel: self.tunnel.into(),
            started: SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(self.started_ms))?,
            request: RecordedRequest {
                method: recorded::method(&self.method),
                uri: self.uri.into(),
                headers: PackedFields::of(&headers(&self.request_headers)?),
                body: RecordedBody::of(request_body, self.request_bytes),
                upgrade: self.upgrade,
            },
            response,
            timings: Timings {
                transit: micros(self.transit_us),
                sent: micros(self.sent_us),
                head: micros(self.head_us),
                end: micros(self.end_us),
            },
            state,
            replay: self.replay_of.map(|of| ReplaySource {
                of: ExchangeId(of),
                edited: self.replay_edited,
                target: self.replay_target,
            }),
            conversation: self.messages.map(|messages| {
                let messages = messages.into_iter().filter_map(Message::into_recorded);
                Box::new(Conversation::of(messages))
            }),
            is_masked: true,
        })
    }
}

impl Message {
    fn of(message: &RecordedMessage) -> Self {
        Self {
            number: message.number,
            at_us: micros(message.at),
            from: message.side.name().to_owned(),
            kind: message.kind.name().to_owned(),
            bytes: message.bytes,
            kept: BASE64_STANDARD.encode(&message.kept),
        }
    }

    fn into_recorded(self) -> Option<RecordedMessage> {
        Some(RecordedMessage {
            number: self.number,
            at: Duration::from_micros(self.at_us),
            side: Side::named(&self.from)?,
            kind: MessageKind::named(&self.kind)?,
            kept: BASE64_STANDARD.decode(self.kept).ok()?,
            bytes: self.bytes,
        })
    }
}

fn fields(headers: &HeaderMap, masking: &Masking) -> Fields {
    headers
        .iter()
        .map(|(name, value)| (name.to_string(), masking.show(name, value)))
        .collect()
}

fn headers(fields: &Fields) -> Option<HeaderMap> {
    fields
        .iter()
        .map(|(name, value)| Some((name.parse::<HeaderName>().ok()?, text_to_value(value)?)))
        .collect::<Option<Vec<_>>>()
        .map(|fields| {
            let mut headers = HeaderMap::new();
            for (name, value) in fields {
                headers.append(name, value);
            }
            headers
        })
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
