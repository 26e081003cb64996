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
    #[error("{} contains data already: restore into another directory, or move tunnel.db and what begins with tunnel.db- out of it", .0.display())]
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
    let path = directory.join(DATABASE_FILE);
    // Refuses a link.
    drop(dynamodb::private_file(&path)?);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let database =
        Connection::open_with_flags(&path, flags).map_err(|source| BackupError::Copy {
            path: path.clone(),
            source,
        })?;
    copy(&database, &path, file)?;
    Ok(())
}

/// Copies what a connection sees in the database at `path`, its write-ahead log included, into a file that must not exist yet.
fn copy(database: &Connection, path: &Path, file: &Path) -> Result<File, BackupError> {
    let name = file
        .to_str()
        .ok_or_else(|| DataError::Path(file.to_owned()))?;
    let new = dynamodb::new_private_file(file).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => BackupError::Exists(file.to_owned()),
        _ => file_error(file)(source),
    })?;
    // SQLite fills a file that is empty.
    let copied = database
        .execute("VACUUM INTO ?1", [name])
        .map_err(|source| BackupError::Copy {
            path: path.to_owned(),
            source,
        })
        .and_then(|_| new.sync_all().map_err(file_error(file)));
    if copied.is_err() {
        let _ = std::fs::remove_file(file);
    }
    copied.map(|()| new)
}

/// Makes a copy the data of `directory`, which is created if need be and must have none yet. The data belongs to the directory's
/// owner, as whom the server runs, if this process may give it away.
///
/// # Errors
/// If the directory has data or a server that is running, or the file is no copy of data that this version reads.
pub fn restore(directory: &Path, file: &Path) -> Result<(), BackupError> {
    let checked = check(file)?;
    let _lock = DirectoryLock::acquire(directory)?;
    if dynamodb::has_data(directory) {
        return Err(BackupError::Occupied(directory.to_owned()));
    }
    let restoring = directory.join(RESTORING_FILE);
    for left in COMPANIONS.map(|name| directory.join(name)) {
        remove(&left)?;
    }
    remove(&restoring)?;
    let restored = copy(&checked, file, &restoring)?;
    dynamodb::give_to_owner(&restored, directory);
    let database = directory.join(DATABASE_FILE);
    std::fs::rename(&restoring, &database).map_err(file_error(&database))
}

/// Removes a file that an earlier server or restore may have left.
fn remove(path: &Path) -> Result<(), BackupError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file_error(path)(error)),
        _ => Ok(()),
    }
}

/// Opens a file that is a copy of data that this version reads.
fn check(file: &Path) -> Result<Connection, BackupError> {
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
    Ok(database)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Data in a directory of its own, and the connection that has written it.
    fn data(directory: &Path) -> Connection {
        std::fs::create_dir(directory).expect("a directory");
        let database = Connection::open(directory.join(DATABASE_FILE)).expect("a database");
        database
            .execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE TokensTable (name TEXT)")
            .expect("a table");
        database
            .execute("INSERT INTO TokensTable VALUES ('alice')", [])
            .expect("a token");
        database
    }

    fn names(directory: &Path) -> Vec<String> {
        let database = Connection::open(directory.join(DATABASE_FILE)).expect("a database");
        let mut names = database
            .prepare("SELECT name FROM TokensTable")
            .expect("the table");
        let names = names.query_map([], |row| row.get(0)).expect("its rows");
        names.collect::<Result<_, _>>().expect("names")
    }

    #[test]
    fn what_is_only_in_the_write_ahead_log_is_restored_too() {
        let directory = tempfile::tempdir().expect("a directory");
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        let _open = data(&from);
        assert!(from.join(COMPANIONS[0]).exists());
        restore(&to, &from.join(DATABASE_FILE)).expect("restored");
        assert_eq!(names(&to), ["alice"]);
    }

    #[test]
    fn what_an_interrupted_restore_has_left_is_in_nobodys_way() {
        let directory = tempfile::tempdir().expect("a directory");
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        let _open = data(&from);
        std::fs::create_dir(&to).expect("a directory");
        std::fs::write(to.join(RESTORING_FILE), "half").expect("written");
        restore(&to, &from.join(DATABASE_FILE)).expect("restored");
        assert_eq!(names(&to), ["alice"]);
        assert!(!to.join(RESTORING_FILE).exists());
    }

    #[test]
    fn a_backup_that_fails_leaves_no_file_behind() {
        let directory = tempfile::tempdir().expect("a directory");
        let from = directory.path().join("from");
        std::fs::create_dir(&from).expect("a directory");
        std::fs::write(from.join(DATABASE_FILE), [b'x'; 8192]).expect("written");
        let copy = directory.path().join("copy");
        let failed = backup(&from, &copy).expect_err("not a database");
        assert!(matches!(failed, BackupError::Copy { .. }), "{failed}");
        assert!(!copy.exists());
    }

    #[cfg(unix)]
    #[test]
    fn a_backup_follows_no_link() {
        let directory = tempfile::tempdir().expect("a directory");
        let from = directory.path().join("from");
        let _open = data(&from);
        let (link, target) = (
            directory.path().join("link"),
            directory.path().join("target"),
        );
        std::os::unix::fs::symlink(&target, &link).expect("a link");
        let refused = backup(&from, &link).expect_err("the name is taken");
        assert!(matches!(refused, BackupError::Exists(_)), "{refused}");
        assert!(!target.exists());
        assert!(link.is_symlink(), "it stays");
    }

    #[cfg(unix)]
    #[test]
    fn links_in_a_data_directory_lead_nowhere() {
        let directory = tempfile::tempdir().expect("a directory");
        let (elsewhere, data_directory) = (
            directory.path().join("elsewhere"),
            directory.path().join("data"),
        );
        let _open = data(&elsewhere);
        std::fs::create_dir(&data_directory).expect("a directory");
        let foreign = directory.path().join("foreign");
        std::fs::write(&foreign, "of somebody else").expect("written");
        for (name, target) in [
            (DATABASE_FILE, elsewhere.join(DATABASE_FILE)),
            ("tunnel.lock", foreign.clone()),
            ("first-token", foreign.clone()),
        ] {
            std::os::unix::fs::symlink(target, data_directory.join(name)).expect("a link");
        }
        let copy = directory.path().join("copy");
        let refusals = [
            backup(&data_directory, &copy)
                .expect_err("a link")
                .to_string(),
            DirectoryLock::acquire(&data_directory)
                .expect_err("a link")
                .to_string(),
            dynamodb::first_token_file(&data_directory)
                .expect_err("a link")
                .to_string(),
            dynamodb::open(Some(&data_directory))
                .err()
                .expect("a link")
                .to_string(),
        ];
        for refusal in refusals {
            assert!(refusal.contains("it is a symbolic link"), "{refusal}");
        }
        assert!(!copy.exists());
        let untouched = std::fs::read_to_string(&foreign).expect("the file");
        assert_eq!(untouched, "of somebody else");
    }

    #[cfg(unix)]
    #[test]
    fn what_root_restores_belongs_to_the_owner_of_the_directory() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

        const OWNER: (u32, u32) = (61_184, 61_185);
        let directory = tempfile::tempdir().expect("a directory");
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        let _open = data(&from);
        std::fs::create_dir(&to).expect("a directory");
        if chown(&to, Some(OWNER.0), Some(OWNER.1)).is_err() {
            // Only root can give anything away.
            return;
        }
        restore(&to, &from.join(DATABASE_FILE)).expect("restored");
        for name in [DATABASE_FILE, "tunnel.lock"] {
            let file = to.join(name).metadata().expect("the file");
            assert_eq!((file.uid(), file.gid()), OWNER, "{name}");
            assert_eq!(file.permissions().mode() & 0o777, 0o600, "{name}");
        }
    }
}
