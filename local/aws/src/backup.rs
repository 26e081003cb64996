//! Copies of a data directory: made while a server works, put back while none does.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use rusqlite::{Connection, OpenFlags};

use crate::dynamodb::{self, DATABASE_FILE, DataError, DirectoryLock};

/// The files that SQLite has beside a database, and that belong to no other.
const COMPANIONS: [&str; 2] = ["tunnel.db-wal", "tunnel.db-shm"];
/// What a copy is called in the data directory until it is complete.
const RESTORING_FILE: &str = "tunnel.db-restoring";

/// Why a copy cannot be made or put back.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The directory cannot be used, or its server is running.
    #[error(transparent)]
    Data(#[from] DataError),
    /// There is nothing to copy.
    #[error("{} contains no data of a tunnel-local", .0.display())]
    NoData(PathBuf),
    /// The copy's file is there already.
    #[error("{} exists already: choose another file", .0.display())]
    Exists(PathBuf),
    /// A file cannot be read or written.
    #[error("cannot use {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The database cannot be copied.
    #[error("cannot copy {}: {source}", path.display())]
    Copy {
        /// The database.
        path: PathBuf,
        /// The cause.
        source: rusqlite::Error,
    },
    /// What is to be put back is no copy of a data directory.
    #[error("{} is not a backup of a data directory: {reason}", path.display())]
    NotABackup {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The directory has data that would be lost.
    #[error("{} contains data already: restore into another directory, or move its tunnel.db away", .0.display())]
    Occupied(PathBuf),
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> BackupError {
    let path = path.to_owned();
    move |source| BackupError::File { path, source }
}

/// Copies the data of `directory` as it is at this moment into a new file that only its user can read. A server may be running.
///
/// # Errors
/// If there is no data, or the file exists or cannot be written.
pub fn backup(directory: &Path, file: &Path) -> Result<(), BackupError> {
    if !dynamodb::has_data(directory) {
        return Err(BackupError::NoData(directory.to_owned()));
    }
    if file.exists() {
        return Err(BackupError::Exists(file.to_owned()));
    }
    // SQLite fills a file that is empty.
    drop(dynamodb::private_file(file)?);
    let copied = copy(directory, file);
    if copied.is_err() {
        let _ = std::fs::remove_file(file);
    }
    copied
}

fn copy(directory: &Path, file: &Path) -> Result<(), BackupError> {
    let path = directory.join(DATABASE_FILE);
    let name = file
        .to_str()
        .ok_or_else(|| DataError::Path(file.to_owned()))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    Connection::open_with_flags(&path, flags)
        .and_then(|database| database.execute("VACUUM INTO ?1", [name]))
        .map_err(|source| BackupError::Copy { path, source })?;
    File::open(file)
        .and_then(|copy| copy.sync_all())
        .map_err(file_error(file))
}

/// Makes a copy the data of `directory`, which is created if need be and must have none yet.
///
/// # Errors
/// If the directory has data or a server that is running, or the file is no copy of data that this version reads.
pub fn restore(directory: &Path, file: &Path) -> Result<(), BackupError> {
    check(file)?;
    let _lock = DirectoryLock::acquire(directory)?;
    if dynamodb::has_data(directory) {
        return Err(BackupError::Occupied(directory.to_owned()));
    }
    for companion in COMPANIONS {
        match std::fs::remove_file(directory.join(companion)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(file_error(&directory.join(companion))(error));
            }
            _ => {}
        }
    }
    let restoring = directory.join(RESTORING_FILE);
    let mut to = dynamodb::private_file(&restoring)?;
    to.set_len(0).map_err(file_error(&restoring))?;
    let mut from = File::open(file).map_err(file_error(file))?;
    io::copy(&mut from, &mut to)
        .and_then(|_| to.sync_all())
        .map_err(file_error(&restoring))?;
    let database = directory.join(DATABASE_FILE);
    std::fs::rename(&restoring, &database).map_err(file_error(&database))
}

/// Checks that a file is a copy of data that this version reads.
fn check(file: &Path) -> Result<(), BackupError> {
    let not_a_backup = |reason: String| BackupError::NotABackup {
        path: file.to_owned(),
        reason,
    };
    if !file.is_file() {
        return Err(not_a_backup("there is no such file".to_owned()));
    }
    let database = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY)
        .map_err(|error| not_a_backup(error.to_string()))?;
    let text = |query: &str| database.query_row(query, [], |row| row.get::<_, String>(0));
    let found = text("PRAGMA quick_check").map_err(|error| not_a_backup(error.to_string()))?;
    if found != "ok" {
        return Err(not_a_backup(format!("it is damaged: {found}")));
    }
    let tables = text("SELECT name FROM sqlite_master WHERE name = 'TokensTable'");
    tables.map_err(|_| not_a_backup("it has no table of tokens".to_owned()))?;
    dynamodb::check_format(&database, file)?;
    Ok(())
}
