//! Whether the data has changed since somebody looked: who may stay is asked again and again, and mostly nothing has.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

/// SQLite's number that differs whenever another connection has committed something, be it of this process or of another one
/// ("PRAGMA data_version", <https://www.sqlite.org/pragma.html#pragma_data_version>).
const DATA_VERSION: &str = "data_version";

/// A state of the data. If two revisions of one open database are equal, nothing was written between them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Revision(u64);

/// Where revisions come from.
#[derive(Clone)]
pub(crate) enum Revisions {
    /// The data is in memory, where only this process writes: its writes are counted.
    Counted(Arc<AtomicU64>),
    /// The data is in a file, where `tunnel-admin` writes as well: SQLite is asked. The connection is used for nothing else, as it does
    /// not count what it writes itself.
    File(Arc<Mutex<rusqlite::Connection>>),
}

impl Revisions {
    pub(crate) fn in_memory() -> Self {
        Self::Counted(Arc::default())
    }

    pub(crate) fn in_file(connection: rusqlite::Connection) -> Self {
        Self::File(Arc::new(Mutex::new(connection)))
    }

    /// Counts a write unless it failed, and passes its outcome on. To be called where the write is made: a caller that has gone away
    /// by then would not count it.
    pub(crate) fn written<O, E>(&self, outcome: Result<O, E>) -> Result<O, E> {
        if let (Self::Counted(writes), Ok(_)) = (self, &outcome) {
            writes.fetch_add(1, Ordering::AcqRel);
        }
        outcome
    }

    pub(crate) fn current(&self) -> rusqlite::Result<Revision> {
        match self {
            Self::Counted(writes) => Ok(Revision(writes.load(Ordering::Acquire))),
            Self::File(connection) => connection
                .lock()
                // Nothing of it is half done, whoever held it.
                .unwrap_or_else(PoisonError::into_inner)
                .pragma_query_value(None, DATA_VERSION, |row| row.get(0))
                .map(Revision),
        }
    }
}
