//! The local service's address.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use http::uri::{Authority, Scheme, Uri};

use crate::authority::{self, AuthorityError};

/// Why a text is not a valid target.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TargetError {
    /// Not an address, or one of another scheme.
    #[error("a target must be a port (3000), host:port, http(s)://host:port, or unix:/path")]
    Address,
    /// The host or port cannot be.
    #[error("a target must be a port (3000), host:port, http(s)://host:port, or unix:/path: {0}")]
    Authority(#[from] AuthorityError),
    /// It has a path or a query.
    #[error(
        "a target must not have a path, because visitors choose it: leave out everything after the port"
    )]
    Path,
    /// No path of a socket.
    #[error("a Unix socket must be unix:/path/to/socket, with an absolute path")]
    Socket,
    /// A path that is no directory.
    #[error(
        "there is no such directory; a target that is a path must be a directory whose files are served"
    )]
    Directory,
    /// This system has none.
    #[error("this system has no Unix sockets")]
    NoSockets,
}

/// How the local service is connected to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TargetTransport {
    /// Over TCP, at the addresses that the target's host has.
    Tcp,
    /// Over TCP, at 127.0.0.1 and at ::1: what a port alone means. Servers that listen on `localhost` have one of them.
    Loopback,
    /// Over this Unix socket.
    Unix(PathBuf),
    /// To the files of this directory, within the process. The path is absolute and without links.
    Directory(PathBuf),
}

/// The local service: how to connect, and the scheme and authority that its requests have. Visitors choose path and query.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Target {
    /// `http` or `https`.
    pub scheme: Scheme,
    /// Host and port, as in `Host`; `localhost` for a Unix socket.
    pub authority: Authority,
    /// How to connect.
    pub transport: TargetTransport,
}

impl Target {
    /// The port to connect to.
    pub fn port(&self) -> u16 {
        let default = if self.scheme == Scheme::HTTPS {
            443
        } else {
            80
        };
        self.authority.port_u16().unwrap_or(default)
    }

    fn on_port(port: &str) -> Result<Self, TargetError> {
        let port = authority::port(port)?;
        Ok(Self {
            scheme: Scheme::HTTP,
            authority: format!("127.0.0.1:{port}")
                .parse()
                .expect("an address and a port"),
            transport: TargetTransport::Loopback,
        })
    }

    fn directory(path: &Path) -> Result<Self, TargetError> {
        let path = path.canonicalize().map_err(|_| TargetError::Directory)?;
        if !path.is_dir() {
            return Err(TargetError::Directory);
        }
        Ok(Self {
            scheme: Scheme::HTTP,
            authority: Authority::from_static("localhost"),
            transport: TargetTransport::Directory(path),
        })
    }

    fn socket(path: &str) -> Result<Self, TargetError> {
        if !cfg!(unix) {
            return Err(TargetError::NoSockets);
        }
        // unix:///path is written, too.
        let path = path.strip_prefix("//").unwrap_or(path);
        if !path.starts_with('/') || path.ends_with('/') || path.contains('\0') {
            return Err(TargetError::Socket);
        }
        Ok(Self {
            scheme: Scheme::HTTP,
            authority: Authority::from_static("localhost"),
            transport: TargetTransport::Unix(path.into()),
        })
    }
}

/// A text that can only be a path: `./dist`, `/srv/www`, `file:///srv/www`, `index.html`, or the name of a directory that is there.
fn directory(text: &str) -> Option<&Path> {
    if let Some(path) = text.strip_prefix("file://") {
        return Some(Path::new(path));
    }
    let path = Path::new(text);
    let is_path = text == "."
        || text == ".."
        || ["./", "../", "/", ".\\", "..\\"]
            .iter()
            .any(|start| text.starts_with(start));
    let is_name =
        !text.is_empty() && !text.bytes().all(|byte| byte.is_ascii_digit()) && !text.contains(':');
    let is_page = path
        .extension()
        .is_some_and(|extension| extension == "html" || extension == "htm");
    (is_path || (is_name && (path.is_dir() || is_page))).then_some(path)
}

impl Default for Target {
    fn default() -> Self {
        Self::on_port("3000").expect("a port")
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.transport {
            TargetTransport::Unix(path) => write!(f, "unix:{}", path.display()),
            TargetTransport::Directory(path) => write!(f, "{}", path.display()),
            TargetTransport::Tcp | TargetTransport::Loopback => {
                write!(f, "{}://{}", self.scheme, self.authority)
            }
        }
    }
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Self::socket(path);
        }
        if let Some(path) = directory(text) {
            return Self::directory(path);
        }
        let port = text.strip_prefix(':').unwrap_or(text);
        if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Self::on_port(port);
        }
        let with_scheme = if text.contains("://") {
            text.to_owned()
        } else {
            format!("http://{text}")
        };
        let parts = with_scheme
            .parse::<Uri>()
            .map_err(|_| TargetError::Address)?
            .into_parts();
        let (Some(scheme), Some(authority)) = (parts.scheme, parts.authority) else {
            return Err(TargetError::Address);
        };
        if scheme != Scheme::HTTP && scheme != Scheme::HTTPS {
            return Err(TargetError::Address);
        }
        authority::check(&authority)?;
        if parts.path_and_query.is_some_and(|path| path != "/") {
            return Err(TargetError::Path);
        }
        Ok(Self {
            scheme,
            authority,
            transport: TargetTransport::Tcp,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<String, TargetError> {
        text.parse::<Target>().map(|target| target.to_string())
    }

    #[test]
    fn targets_are_written_as_users_write_them() {
        for (text, target) in [
            ("3000", "http://127.0.0.1:3000"),
            (":3000", "http://127.0.0.1:3000"),
            ("localhost:8080", "http://localhost:8080"),
            ("http://[::1]:80", "http://[::1]:80"),
            ("https://localhost:8443/", "https://localhost:8443"),
            ("unix:/run/app.sock", "unix:/run/app.sock"),
            ("unix:///run/app.sock", "unix:/run/app.sock"),
        ] {
            assert_eq!(parsed(text), Ok(target.to_owned()), "{text}");
        }
    }

    #[test]
    fn a_bare_port_means_both_loopback_addresses_and_an_address_only_itself() {
        let transport = |text: &str| text.parse::<Target>().map(|target| target.transport);
        assert_eq!(transport("3000"), Ok(TargetTransport::Loopback));
        assert_eq!(transport("127.0.0.1:3000"), Ok(TargetTransport::Tcp));
    }

    #[test]
    fn a_path_of_a_directory_is_its_files() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().canonicalize().expect("a path");
        for text in [
            path.display().to_string(),
            format!("file://{}/", path.display()),
        ] {
            let target: Target = text.parse().expect("a target");
            assert_eq!(target.transport, TargetTransport::Directory(path.clone()));
            assert_eq!(target.to_string(), path.display().to_string());
        }
    }

    #[test]
    fn impossible_values_are_refused_with_a_reason() {
        for (text, error) in [
            ("", TargetError::Address),
            ("http://", TargetError::Address),
            ("ftp://x", TargetError::Address),
            ("file:///does/not/exist", TargetError::Directory),
            ("./does-not-exist", TargetError::Directory),
            ("/etc/hosts", TargetError::Directory),
            ("index.html", TargetError::Directory),
            ("0", AuthorityError::Port.into()),
            ("70000", AuthorityError::Port.into()),
            ("127.0.0.1:99999", AuthorityError::Port.into()),
            ("127.0.0.1:", AuthorityError::Port.into()),
            ("3000/", AuthorityError::Host.into()),
            ("-1", AuthorityError::Host.into()),
            ("http://user@x", AuthorityError::UserInfo.into()),
            ("http://x/path", TargetError::Path),
            ("localhost:3000/api?x", TargetError::Path),
            ("unix:", TargetError::Socket),
            ("unix:app.sock", TargetError::Socket),
            ("unix:/", TargetError::Socket),
        ] {
            assert_eq!(parsed(text), Err(error), "{text}");
        }
    }
}
