//! `ttf login`: an endpoint and a token are tried, and stored for every later start. `ttf logout` forgets them.

use std::{
    fs,
    io::{self, BufRead, IsTerminal, Write},
    path::{Path, PathBuf},
};

use toml_edit::{DocumentMut, Item, Table, TableLike};

use crate::{
    handshake::{self, HandshakeError},
    proxy::ProxyChoice,
    settings::{Secret, Settings},
};

/// What is to be stored.
#[derive(Debug)]
pub(crate) struct Login {
    /// Endpoint and token.
    pub settings: Settings,
    /// The file with the certificates that the endpoint may have besides those that the system trusts.
    pub endpoint_ca: Option<PathBuf>,
    /// The proxy that the login was given, if it was.
    pub proxy: Option<ProxyChoice>,
    /// The name of the service; without one it is that of all tunnels that name none.
    pub service: Option<String>,
    /// The file that they are stored in.
    pub file: PathBuf,
}

/// What is to be forgotten.
#[derive(Debug)]
pub(crate) struct Logout {
    /// The name of the service, as in [`Login`].
    pub service: Option<String>,
    /// The file that has it.
    pub file: PathBuf,
}

/// Why nothing is stored, or forgotten.
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
        proxy,
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
        move || {
            let proxy = proxy.as_ref().and_then(ProxyChoice::reveal);
            let ca = endpoint_ca.as_deref();
            store(&path, service.as_deref(), &settings, ca, proxy)
        }
    });
    stored
        .await
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
    let (stored, needs) = if settings.token.is_some() {
        ("and its token are stored", "")
    } else {
        ("is stored", " (it needs no token)")
    };
    Ok(format!(
        "{} {stored} in {}{needs}; now: ttf http 3000",
        settings.endpoint,
        file.display()
    ))
}

/// Forgets what a login has stored. Returns what to tell the user.
///
/// # Errors
/// If the file cannot be read or written.
pub(crate) fn logout(logout: &Logout) -> Result<String, LoginError> {
    let path = &logout.file;
    let name = path.display();
    let before = read(path)?;
    let service = logout.service.as_deref();
    let (after, login) = without_login(&before, service).ok_or_else(|| LoginError::Content {
        path: name.to_string(),
    })?;
    if after == before {
        let of = service.map_or(String::new(), |service| format!(" for a service {service}"));
        return Ok(format!("{name} has no endpoint and no token{of}"));
    }
    write(path, &after).map_err(|source| LoginError::Unwritable {
        path: name.to_string(),
        source,
    })?;
    let endpoint = login.endpoint.as_deref().unwrap_or("the service");
    Ok(if login.has_token {
        format!(
            "{endpoint} and its token are no longer stored in {name}; the token is valid until the service's operator revokes it (`tunnel-admin revoke-token`)"
        )
    } else {
        format!("{endpoint} is no longer stored in {name}")
    })
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
    proxy: Option<&str>,
) -> Result<(), LoginError> {
    let name = || path.display().to_string();
    let unwritable = |source| LoginError::Unwritable {
        path: name(),
        source,
    };
    let before = read(path)?;
    let content = || LoginError::Content { path: name() };
    // A later start may be in another directory.
    let endpoint_ca = endpoint_ca
        .map(std::path::absolute)
        .transpose()
        .map_err(unwritable)?;
    let after = with_login(&before, service, settings, endpoint_ca.as_deref(), proxy)
        .ok_or_else(content)?;
    write(path, &after).map_err(unwritable)
}

/// The file's text, which is empty if there is no file.
fn read(path: &Path) -> Result<String, LoginError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(LoginError::Unwritable {
            path: path.display().to_string(),
            source,
        }),
    }
}

/// What a file had of a login.
#[derive(Debug, Default, Eq, PartialEq)]
struct StoredLogin {
    endpoint: Option<String>,
    has_token: bool,
}

impl StoredLogin {
    fn of(table: &dyn TableLike) -> Self {
        let endpoint = table.get("endpoint").and_then(Item::as_str);
        Self {
            endpoint: endpoint.map(str::to_owned),
            has_token: table.get("token").is_some(),
        }
    }
}

/// The file's text without what belongs to a login, and what that was. `None` if it is not TOML.
fn without_login(text: &str, service: Option<&str>) -> Option<(String, StoredLogin)> {
    let mut document: DocumentMut = text.parse().ok()?;
    let login = match service {
        None => {
            let table = document.as_table_mut();
            let login = StoredLogin::of(table);
            for key in ["endpoint", "token", "endpoint_ca"] {
                table.remove(key);
            }
            login
        }
        Some(service) => {
            let services = document
                .get_mut("services")
                .and_then(Item::as_table_like_mut);
            let removed = services.and_then(|services| services.remove(service));
            let table = removed.as_ref().and_then(Item::as_table_like);
            table.map(StoredLogin::of).unwrap_or_default()
        }
    };
    Some((document.to_string(), login))
}

/// The file's text with what belongs to the login, and all else as it was. `None` if it is not TOML, or has something else in its
/// place.
fn with_login(
    text: &str,
    service: Option<&str>,
    settings: &Settings,
    endpoint_ca: Option<&Path>,
    proxy: Option<&str>,
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
    // This is a matter of the network, and not of the login: the one that is there stays.
    if let Some(proxy) = proxy {
        table.insert("proxy", toml_edit::value(proxy));
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
            None,
        );
        let first = first.expect("a file");
        assert_eq!(
            first,
            "# mine\ntarget = 3000 # the app\nendpoint = \"wss://t.example.com/_ws\"\ntoken = \"one\"\n\n[tunnels.web]\ntarget = 1\n"
        );
        let again = with_login(&first, None, &settings("127.0.0.1:8080", None), None, None)
            .expect("a file");
        assert!(
            !again.contains("token") && again.contains("ws://127.0.0.1:8080/_ws"),
            "{again}"
        );
        let named = with_login(
            &first,
            Some("work"),
            &settings("https://w.example.com", Some("two")),
            Some(Path::new("/etc/w.pem")),
            Some("http://al:hunter2@proxy:3128"),
        );
        let named = named.expect("a file");
        assert!(named.starts_with(&first), "{named}");
        assert!(
            named.ends_with(
                "[services.work]\nendpoint = \"wss://w.example.com/_ws\"\ntoken = \"two\"\nendpoint_ca = \"/etc/w.pem\"\nproxy = \"http://al:hunter2@proxy:3128\"\n"
            ),
            "{named}"
        );
        let again = with_login(
            &named,
            Some("work"),
            &settings("https://w.example.com", None),
            None,
            None,
        );
        let again = again.expect("a file");
        assert!(
            again.ends_with("w.example.com/_ws\"\nproxy = \"http://al:hunter2@proxy:3128\"\n"),
            "{again}"
        );
        let settings = settings("127.0.0.1:8080", None);
        for spoilt in ["nonsense", "services = 3\n", "services.work = 3\n"] {
            assert_eq!(
                with_login(spoilt, Some("work"), &settings, None, None),
                None,
                "{spoilt}"
            );
        }
    }

    #[test]
    fn a_logout_forgets_what_belongs_to_its_service_and_nothing_else() {
        let text = "target = 3000 # the app\nendpoint = 'wss://t.example.com'\ntoken = 'one'\n\n\
                    [services.work]\nendpoint = 'wss://w.example.com'\ntoken = 'two'\n\n[tunnels.web]\ntarget = 1\n";
        let stored = |endpoint: &str, has_token| StoredLogin {
            endpoint: Some(endpoint.to_owned()),
            has_token,
        };
        let (after, login) = without_login(text, None).expect("a file");
        assert_eq!(login, stored("wss://t.example.com", true));
        assert_eq!(
            after,
            "target = 3000 # the app\n\n\
             [services.work]\nendpoint = 'wss://w.example.com'\ntoken = 'two'\n\n[tunnels.web]\ntarget = 1\n"
        );
        let (after, login) = without_login(&after, Some("work")).expect("a file");
        assert_eq!(login, stored("wss://w.example.com", true));
        assert_eq!(
            after,
            "target = 3000 # the app\n\n[tunnels.web]\ntarget = 1\n"
        );
        for service in [None, Some("work")] {
            let nothing = (after.clone(), StoredLogin::default());
            assert_eq!(without_login(&after, service), Some(nothing));
        }
        let inline = "services.work = { endpoint = 'wss://w.example.com' }\n";
        let (_, login) = without_login(inline, Some("work")).expect("a file");
        assert_eq!(login, stored("wss://w.example.com", false));
        assert_eq!(without_login("nonsense", None), None);
    }

    #[cfg(unix)]
    #[test]
    fn only_the_user_can_read_what_is_stored() {
        use std::os::unix::fs::PermissionsExt;

        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("ttf/config.toml");
        let settings = settings("https://t.example.com", Some("one"));
        store(&file, None, &settings, None, None).expect("stored");
        store(&file, Some("work"), &settings, None, None).expect("stored");
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!(mode(&file), 0o600);
        assert_eq!(mode(file.parent().expect("a directory")), 0o700);
    }
}
