//! Tunnel ids that the service picked, remembered from one run to the next, so that a tunnel keeps its address.
//!
//! One file has them all, by endpoint and target. An agent that uses an entry holds a lock beside the file: a second agent with the
//! same endpoint and target gets an id of its own and remembers nothing. Other locks say at which ports inspectors are. Nothing here is
//! worth a tunnel: what goes wrong is logged.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tracing::{info, warn};
use tunnel_protocol::id::TunnelId;

use crate::{config_file, endpoint::Endpoint, target::Target};

/// Most entries kept; the oldest make room.
const MAX_ENTRIES: usize = 1000;
/// Longest file that is read, in bytes: more than that many entries have.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// How often, and with which pauses, another agent that writes the file is waited for.
const MAX_LOCK_ATTEMPTS: u32 = 20;
const LOCK_RETRY_DELAY: Duration = Duration::from_millis(50);
/// The lock that a writer of the file holds. No entry's lock has this name.
const WRITE_LOCK: &str = "writing";
/// The lock that an agent holds while its inspector is at a port, which follows.
const INSPECTOR_LOCK: &str = "inspector-";

/// What is remembered for one endpoint and target.
#[derive(Debug)]
pub(crate) struct TunnelIdStore {
    file: PathBuf,
    entry: Entry,
    remembers: bool,
    /// Says that this agent uses the entry.
    _lock: File,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
enum TunnelIdStoreError {
    #[error("cannot be read or written")]
    Io(#[from] io::Error),
    #[error("is not a list of tunnels")]
    Content(#[from] toml::de::Error),
    #[error("is longer than {MAX_FILE_BYTES} bytes")]
    Length,
    #[error("is being written by another process")]
    Busy,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Entry {
    endpoint: String,
    target: String,
    tunnel_id: Option<TunnelId>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
struct Entries {
    #[serde(default)]
    tunnel: Vec<Entry>,
}

impl TunnelIdStore {
    /// What `file` has for an endpoint and a target. `None` when another agent uses it, or nothing can be remembered.
    pub(crate) async fn open(file: &Path, endpoint: &Endpoint, target: &Target) -> Option<Self> {
        let file = file.to_owned();
        let endpoint = endpoint.to_string();
        let target = target.to_string();
        spawn_blocking(move || Self::open_here(file, endpoint, target))
            .await
            .unwrap_or_default()
    }

    fn open_here(file: PathBuf, endpoint: String, target: String) -> Option<Self> {
        let lock = match lock(&file, &lock_name(&endpoint, &target)) {
            Ok(lock) => lock,
            Err(TryLockError::WouldBlock) => {
                warn!(
                    target,
                    "another agent already uses the remembered tunnel id; requesting a new one"
                );
                return None;
            }
            Err(TryLockError::Error(error)) => {
                warn!(file = %file.display(), error = &error as &dyn std::error::Error, "tunnel ids cannot be remembered");
                return None;
            }
        };
        let entries = read(&file).unwrap_or_else(|error| {
            warn!(file = %file.display(), error = &error as &dyn std::error::Error, "the remembered tunnel id cannot be read");
            Entries::default()
        });
        let known = entries
            .tunnel
            .into_iter()
            .find(|entry| entry.endpoint == endpoint && entry.target == target);
        let remembers = known.is_some();
        let entry = known.unwrap_or(Entry {
            endpoint,
            target,
            tunnel_id: None,
        });
        Some(Self {
            file,
            entry,
            remembers,
            _lock: lock,
        })
    }

    /// The tunnel id to request.
    pub(crate) fn tunnel_id(&self) -> Option<&TunnelId> {
        self.entry.tunnel_id.as_ref()
    }

    /// Remembers a tunnel id.
    pub(crate) async fn remember(&mut self, tunnel_id: &TunnelId) {
        if !self.remembers || self.tunnel_id() != Some(tunnel_id) {
            self.entry.tunnel_id = Some(tunnel_id.clone());
            self.remembers = true;
            let entry = self.entry.clone();
            change(&self.file, move |entries| {
                entries.retain(|other| {
                    other.endpoint != entry.endpoint || other.target != entry.target
                });
                entries.push(entry);
                entries.drain(..entries.len().saturating_sub(MAX_ENTRIES));
            })
            .await;
        }
    }

    /// Remembers no tunnel id any more.
    pub(crate) async fn forget(&mut self) {
        self.remembers = false;
        self.entry.tunnel_id = None;
        let endpoint = self.entry.endpoint.clone();
        let target = self.entry.target.clone();
        change(&self.file, move |entries| {
            entries.retain(|other| other.endpoint != endpoint || other.target != target);
        })
        .await;
    }
}

/// The file in the user's configuration directory. A user without a home has none.
pub(crate) fn default_file() -> Option<PathBuf> {
    Some(config_file::user_directory()?.join("tunnels.toml"))
}

/// Forgets a tunnel id of an endpoint, whatever it was for. A file that does not exist is not made.
pub(crate) async fn forget(file: &Path, endpoint: &Endpoint, tunnel_id: &TunnelId) {
    if file.exists() {
        let endpoint = endpoint.to_string();
        let tunnel_id = tunnel_id.clone();
        change(file, move |entries| {
            entries.retain(|entry| {
                entry.endpoint != endpoint || entry.tunnel_id.as_ref() != Some(&tunnel_id)
            });
        })
        .await;
    }
}

async fn change(file: &Path, edit: impl FnOnce(&mut Vec<Entry>) + Send + 'static) {
    let path = file.to_owned();
    if let Ok(Err(error)) = spawn_blocking(move || rewrite(&path, edit)).await {
        warn!(file = %file.display(), error = &error as &dyn std::error::Error, "the tunnel id is not remembered");
    }
}

fn rewrite(file: &Path, edit: impl FnOnce(&mut Vec<Entry>)) -> Result<(), TunnelIdStoreError> {
    let _lock = wait_for_lock(file, WRITE_LOCK)?;
    let mut entries = match read(file) {
        Ok(entries) => entries,
        Err(TunnelIdStoreError::Io(error)) => return Err(error.into()),
        Err(error) => {
            info!(file = %file.display(), error = &error as &dyn std::error::Error, "the file is replaced");
            Entries::default()
        }
    };
    edit(&mut entries.tunnel);
    let text = toml::to_string(&entries).map_err(io::Error::other)?;
    // A temporary file is its user's alone, and has all it will have before it takes the other's place.
    let mut new = tempfile::NamedTempFile::new_in(directory(file))?;
    new.write_all(text.as_bytes())?;
    new.as_file().sync_all()?;
    new.persist(file).map_err(|error| error.error)?;
    Ok(())
}

fn read(file: &Path) -> Result<Entries, TunnelIdStoreError> {
    let open = match File::open(file) {
        Ok(open) => open,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Entries::default()),
        Err(error) => return Err(error.into()),
    };
    let mut bytes = Vec::new();
    open.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(TunnelIdStoreError::Length);
    }
    Ok(toml::from_slice(&bytes)?)
}

fn wait_for_lock(file: &Path, name: &str) -> Result<File, TunnelIdStoreError> {
    for _ in 0..MAX_LOCK_ATTEMPTS {
        match lock(file, name) {
            Ok(lock) => return Ok(lock),
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_RETRY_DELAY),
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
    }
    Err(TunnelIdStoreError::Busy)
}

/// Notes beside `file`, until the result is dropped or the process ends, that this user's agent has an inspector at a port of 127.0.0.1.
pub(crate) fn note_inspector(file: &Path, port: u16) -> Option<File> {
    let noted = wait_for_lock(file, &format!("{INSPECTOR_LOCK}{port}"));
    noted
        .inspect_err(|error| {
            info!(
                error = error as &dyn std::error::Error,
                "`ttf health` will not find the inspector"
            );
        })
        .ok()
}

/// The ports that are noted beside `file`, in order.
pub(crate) fn noted_inspectors(file: &Path) -> Vec<u16> {
    let Ok(entries) = fs::read_dir(locks(file)) else {
        return Vec::new();
    };
    let mut ports: Vec<u16> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            let port = name.to_str()?.strip_prefix(INSPECTOR_LOCK)?.parse().ok()?;
            // Shared, so that another look is not taken for an agent.
            let lock = File::open(locks(file).join(&name)).ok()?;
            let is_held = matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock));
            is_held.then_some(port)
        })
        .collect();
    ports.sort_unstable();
    ports
}

/// Takes one of the locks beside a file. It is held until the result is dropped, or the process ends however it does.
fn lock(file: &Path, name: &str) -> Result<File, TryLockError> {
    let locks = locks(file);
    let mut create = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut create, 0o700);
    create
        .recursive(true)
        .create(&locks)
        .map_err(TryLockError::Error)?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(locks.join(name))
        .map_err(TryLockError::Error)?;
    lock.try_lock()?;
    Ok(lock)
}

/// The directory of the locks beside a file.
fn locks(file: &Path) -> PathBuf {
    file.with_extension("locks")
}

/// A name that any file system takes. Two that differ only in what is replaced, or beyond what is taken, share a lock: the second
/// agent of them gets a new tunnel id then.
fn lock_name(endpoint: &str, target: &str) -> String {
    let safe = |c: char| {
        if c.is_ascii_alphanumeric() || c == '.' {
            c
        } else {
            '-'
        }
    };
    let name: String = format!("{target} {endpoint}")
        .chars()
        .map(safe)
        .take(200)
        .collect();
    name + ".lock"
}

fn directory(file: &Path) -> &Path {
    file.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDPOINT: &str = "wss://x.example.com/v1";

    async fn memory(file: &Path, target: &str) -> Option<TunnelIdStore> {
        TunnelIdStore::open(
            file,
            &ENDPOINT.parse().expect("an endpoint"),
            &target.parse().expect("a target"),
        )
        .await
    }

    fn id(text: &str) -> TunnelId {
        text.parse().expect("an id")
    }

    #[tokio::test]
    async fn an_id_is_recalled_for_its_own_endpoint_and_target_only() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("new/tunnels.toml");
        for (target, tunnel_id) in [("3000", "first"), ("4000", "second")] {
            memory(&file, target)
                .await
                .expect("a memory")
                .remember(&id(tunnel_id))
                .await;
        }
        assert_eq!(
            memory(&file, "3000").await.expect("a memory").tunnel_id(),
            Some(&id("first"))
        );
        assert_eq!(
            memory(&file, "4000").await.expect("a memory").tunnel_id(),
            Some(&id("second"))
        );
        assert_eq!(
            memory(&file, "5000").await.expect("a memory").tunnel_id(),
            None
        );
        let elsewhere = "wss://y.example.com/v1".parse().expect("an endpoint");
        assert!(
            TunnelIdStore::open(&file, &elsewhere, &"3000".parse().expect("a target"))
                .await
                .expect("a memory")
                .tunnel_id()
                .is_none()
        );

        memory(&file, "3000")
            .await
            .expect("a memory")
            .forget()
            .await;
        assert_eq!(
            memory(&file, "3000").await.expect("a memory").tunnel_id(),
            None
        );
        forget(
            &file,
            &ENDPOINT.parse().expect("an endpoint"),
            &id("second"),
        )
        .await;
        assert_eq!(
            memory(&file, "4000").await.expect("a memory").tunnel_id(),
            None
        );
    }

    #[tokio::test]
    async fn the_second_of_two_simultaneous_agents_remembers_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("tunnels.toml");
        let mut first = memory(&file, "3000").await.expect("a memory");
        first.remember(&id("first")).await;
        assert!(memory(&file, "3000").await.is_none());
        assert!(
            memory(&file, "4000").await.is_some(),
            "nothing is remembered for another target"
        );
        drop(first);
        assert_eq!(
            memory(&file, "3000").await.expect("a memory").tunnel_id(),
            Some(&id("first"))
        );
    }

    #[tokio::test]
    async fn many_agents_that_write_at_once_lose_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("tunnels.toml");
        let mut writing = tokio::task::JoinSet::new();
        for port in 1..=20 {
            let file = file.clone();
            writing.spawn(async move {
                memory(&file, &port.to_string())
                    .await
                    .expect("a memory")
                    .remember(&id(&format!("tunnel-{port}")))
                    .await;
            });
        }
        writing.join_all().await;
        for port in 1..=20 {
            let memory = memory(&file, &port.to_string()).await.expect("a memory");
            assert_eq!(memory.tunnel_id(), Some(&id(&format!("tunnel-{port}"))));
        }
    }

    #[tokio::test]
    async fn the_oldest_of_too_many_ids_is_forgotten() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("tunnels.toml");
        let endpoint: Endpoint = ENDPOINT.parse().expect("an endpoint");
        let entry = |port: usize| {
            let target: Target = port.to_string().parse().expect("a target");
            Entry {
                endpoint: endpoint.to_string(),
                target: target.to_string(),
                tunnel_id: Some(id(&format!("tunnel-{port}"))),
            }
        };
        let full = Entries {
            tunnel: (1..=MAX_ENTRIES).map(entry).collect(),
        };
        fs::write(&file, toml::to_string(&full).expect("TOML")).expect("written");
        let next = (MAX_ENTRIES + 1).to_string();
        let mut store = memory(&file, &next).await.expect("a memory");
        store.remember(&id("the-newest")).await;
        let recalled = read(&file).expect("entries").tunnel;
        assert_eq!(recalled.len(), MAX_ENTRIES);
        assert_eq!(recalled[0], entry(2));
        let newest = recalled.last().expect("some").tunnel_id.as_ref();
        assert_eq!(newest, Some(&id("the-newest")));
    }

    #[tokio::test]
    async fn a_corrupt_file_recalls_nothing_and_is_replaced() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("tunnels.toml");
        for spoilt in [
            "nonsense",
            "[[tunnel]]\nendpoint = 1\n",
            "\0",
            &"#".repeat(2 * 1024 * 1024),
        ] {
            fs::write(&file, spoilt).expect("written");
            let mut memory = memory(&file, "3000").await.expect("a memory");
            assert_eq!(memory.tunnel_id(), None);
            memory.remember(&id("my-app")).await;
            assert!(fs::read_to_string(&file).expect("text").contains("my-app"));
        }
    }

    #[tokio::test]
    async fn if_the_file_cannot_be_written_nothing_is_remembered_and_nothing_fails() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("file");
        fs::write(&file, "").expect("written");
        assert!(
            memory(&file.join("tunnels.toml"), "3000").await.is_none(),
            "a file is no directory"
        );

        let file = directory.path().join("tunnels.toml");
        fs::create_dir(&file).expect("a directory in its place");
        let mut memory = memory(&file, "3000").await.expect("a memory");
        memory.remember(&id("my-app")).await;
        assert!(file.is_dir());
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn only_the_user_can_read_the_file() {
        use std::os::unix::fs::PermissionsExt;

        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("ttf/tunnels.toml");
        memory(&file, "3000")
            .await
            .expect("a memory")
            .remember(&id("my-app"))
            .await;
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!(
            (mode(&file), mode(file.parent().expect("a directory"))),
            (0o600, 0o700)
        );
        let names: Vec<_> = fs::read_dir(file.parent().expect("a directory"))
            .expect("a directory")
            .collect();
        assert_eq!(names.len(), 2, "something is left behind: {names:?}");
    }

    #[test]
    fn a_lock_has_a_name_that_every_file_system_takes() {
        let name = lock_name(
            &format!("wss://{}/v1?a=b", "x".repeat(500)),
            "https://[::1]:8443",
        );
        assert!(
            name.len() < 255
                && name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'-'),
            "{name}"
        );
        assert_ne!(name, WRITE_LOCK);
    }
}
