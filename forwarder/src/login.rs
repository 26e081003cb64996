//! `ttf login`: an endpoint and a token are tried, and stored for every later start.

use std::{
    fs,
    io::{self, BufRead, IsTerminal, Write},
    path::{Path, PathBuf},
};

use toml_edit::{DocumentMut, Item, Table};

use crate::{
    handshake::{self, HandshakeError},
    settings::{Secret, Settings},
};

/// What is to be stored.
#[derive(Debug)]
pub(crate) struct Login {
    /// Endpoint and token.
    pub settings: Settings,
    /// The file with the certificates that the endpoint may have besides those that the system trusts.
    pub endpoint_ca: Option<PathBuf>,
    /// The name of the service; without one it is that of all tunnels that name none.
    pub service: Option<String>,
    /// The file that they are stored in.
    pub file: PathBuf,
}

/// Why nothing is stored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoginError {
    /// The service refuses the token, or cannot be reached.
    #[error("nothing is stored: {0}")]
    Handshake(HandshakeError),
    /// The service asks for a token, and none was given.
    #[error(
        "the service requires a token: pass it with --token, or write it on stdin; its operator makes one with `tunnel-admin create-token NAME`"
    )]
    NoToken,
    /// The token cannot be read.
    #[error("cannot read the token: {0}")]
    Unreadable(io::Error),
    /// The file cannot be read or written.
    #[error("cannot write {path}: {source}")]
    Unwritable {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The file has a fault already.
    #[error("{path} cannot be changed, as it is not valid TOML: `ttf config check` says where")]
    Content {
        /// The file.
        path: String,
    },
}

/// Tries and stores. Returns what to tell the user.
///
/// # Errors
/// If the service refuses, or the file cannot be written.
pub(crate) async fn login(login: Login) -> Result<String, LoginError> {
    let Login {
        mut settings,
        endpoint_ca,
        service,
        file,
    } = login;
    let tried = match (handshake::check(&settings).await, &settings.token) {
        (Err(HandshakeError::Unauthorized), None) => {
            settings.token = Some(ask().await?);
            handshake::check(&settings).await
        }
        (tried, _) => tried,
    };
    tried.map_err(LoginError::Handshake)?;
    let path = file.clone();
    let stored = tokio::task::spawn_blocking({
        let settings = settings.clone();
        move || store(&path, service.as_deref(), &settings, endpoint_ca.as_deref())
    });
    stored
        .await
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
    let with = if settings.token.is_some() {
        "and its token are"
    } else {
        "is (it needs no token)"
    };
    Ok(format!(
        "{} {with} stored in {}; now: ttf http 3000",
        settings.endpoint,
        file.display()
    ))
}

/// Asks for the token on a terminal, or takes the first line of another stdin.
async fn ask() -> Result<Secret, LoginError> {
    let read = || {
        if io::stdin().is_terminal() {
            rpassword::prompt_password("Token: ")
        } else {
            let mut line = String::new();
            io::stdin().lock().read_line(&mut line)?;
            Ok(line)
        }
    };
    let token = tokio::task::spawn_blocking(read)
        .await
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
        .map_err(LoginError::Unreadable)?;
    match token.trim() {
        "" => Err(LoginError::NoToken),
        token => Ok(token.to_owned().into()),
    }
}

fn store(
    path: &Path,
    service: Option<&str>,
    settings: &Settings,
    endpoint_ca: Option<&Path>,
) -> Result<(), LoginError> {
    let name = || path.display().to_string();
    let unwritable = |source| LoginError::Unwritable {
        path: name(),
        source,
    };
    let before = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(unwritable(error)),
    };
    let content = || LoginError::Content { path: name() };
    // A later start may be in another directory.
    let endpoint_ca = endpoint_ca
        .map(std::path::absolute)
        .transpose()
        .map_err(unwritable)?;
    let after =
        with_login(&before, service, settings, endpoint_ca.as_deref()).ok_or_else(content)?;
    write(path, &after).map_err(unwritable)
}

/// The file's text with what belongs to the login, and all else as it was. `None` if it is not TOML, or has something else in its
/// place.
fn with_login(
    text: &str,
    service: Option<&str>,
    settings: &Settings,
    endpoint_ca: Option<&Path>,
) -> Option<String> {
    let mut document: DocumentMut = text.parse().ok()?;
    let table = match service {
        None => document.as_table_mut(),
        Some(service) => {
            let services = document
                .entry("services")
                .or_insert_with(|| Item::Table(implicit_table()));
            services
                .as_table_mut()?
                .entry(service)
                .or_insert(Item::Table(Table::new()))
                .as_table_mut()?
        }
    };
    table.insert("endpoint", toml_edit::value(settings.endpoint.to_string()));
    let values = [
        ("token", settings.token.as_ref().map(Secret::reveal)),
        ("endpoint_ca", endpoint_ca.and_then(Path::to_str)),
    ];
    for (key, value) in values {
        match value {
            Some(value) => table.insert(key, toml_edit::value(value)),
            // It belonged to an earlier login.
            None => table.remove(key),
        };
    }
    Some(document.to_string())
}

fn implicit_table() -> Table {
    let mut table = Table::new();
    table.set_implicit(true);
    table
}

/// Writes a file that only its user can read, and that has all it will have before it takes the other's place.
pub(crate) fn write(path: &Path, text: &str) -> io::Result<()> {
    // What a symbolic link leads to is replaced, and not the link.
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut create = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut create, 0o700);
    create.recursive(true).create(directory)?;
    let mut new = tempfile::NamedTempFile::new_in(directory)?;
    new.write_all(text.as_bytes())?;
    new.as_file().sync_all()?;
    new.persist(path).map_err(|error| error.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Layer;

    fn settings(endpoint: &str, token: Option<&str>) -> Settings {
        let layer = Layer {
            endpoint: Some(endpoint.parse().expect("an endpoint")),
            token: token.map(|token| Secret::from(token.to_owned())),
            ..Layer::default()
        };
        layer.settings("login").expect("settings")
    }

    #[test]
    fn a_login_changes_nothing_else_in_the_file() {
        let text = "# mine\ntarget = 3000 # the app\n\n[tunnels.web]\ntarget = 1\n";
        let first = with_login(
            text,
            None,
            &settings("https://t.example.com", Some("one")),
            None,
        );
        let first = first.expect("a file");
        assert_eq!(
            first,
            "# mine\ntarget = 3000 # the app\nendpoint = \"wss://t.example.com/_ws\"\ntoken = \"one\"\n\n[tunnels.web]\ntarget = 1\n"
        );
        let again =
            with_login(&first, None, &settings("127.0.0.1:8080", None), None).expect("a file");
        assert!(
            !again.contains("token") && again.contains("ws://127.0.0.1:8080/_ws"),
            "{again}"
        );
        let named = with_login(
            &first,
            Some("work"),
            &settings("https://w.example.com", Some("two")),
            Some(Path::new("/etc/w.pem")),
        );
        let named = named.expect("a file");
        assert!(named.starts_with(&first), "{named}");
        assert!(
            named.ends_with(
                "[services.work]\nendpoint = \"wss://w.example.com/_ws\"\ntoken = \"two\"\nendpoint_ca = \"/etc/w.pem\"\n"
            ),
            "{named}"
        );
        let again = with_login(
            &named,
            Some("work"),
            &settings("https://w.example.com", None),
            None,
        );
        assert!(again.expect("a file").ends_with("w.example.com/_ws\"\n"));
        let settings = settings("127.0.0.1:8080", None);
        for spoilt in ["nonsense", "services = 3\n", "services.work = 3\n"] {
            assert_eq!(
                with_login(spoilt, Some("work"), &settings, None),
                None,
                "{spoilt}"
            );
        }
    }

    #[cfg(unix)]
    #[test]
    fn only_the_user_can_read_what_is_stored() {
        use std::os::unix::fs::PermissionsExt;

        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("ttf/config.toml");
        let settings = settings("https://t.example.com", Some("one"));
        store(&file, None, &settings, None).expect("stored");
        store(&file, Some("work"), &settings, None).expect("stored");
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!(mode(&file), 0o600);
        assert_eq!(mode(file.parent().expect("a directory")), 0o700);
    }
}
