//! What an agent is told to do: checked values, and the file they may come from.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use http::{
    HeaderValue,
    uri::{Authority, Scheme, Uri},
};
use serde::{Deserialize, Deserializer, de::Error};
use tunnel_protocol::{cidr::Cidr, id::TunnelId, url::is_loopback};

use crate::visitor_rules::{Policy, PolicyArgs};

/// How long the local service may take to start its response.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5 * 60);
/// How many requests are passed to the local service at once.
pub const MAX_CONCURRENT: usize = 1024;
/// Where the local service is if nobody says so.
pub const DEFAULT_TARGET: &str = "127.0.0.1:3000";

/// What one tunnel needs to be opened.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The tunnel's name in what the user sees; nothing to do with its address.
    pub name: String,
    /// The service's WebSocket address.
    pub endpoint: Endpoint,
    /// What the agent authenticates with.
    pub token: Option<Secret>,
    /// The tunnel id to ask for; the service picks one if there is none.
    pub tunnel_id: Option<TunnelId>,
    /// The file that remembers ids that the service picked; none forgets them with the process. See [`crate::tunnel_ids`].
    pub memory: Option<PathBuf>,
    /// The local service.
    pub target: Target,
    /// Which `Host` the local service sees.
    pub host_header: HostHeader,
    /// See [`REQUEST_TIMEOUT`].
    pub request_timeout: Duration,
    /// See [`MAX_CONCURRENT`].
    pub max_concurrent: usize,
    /// Bodies may be compressed on the way between the service and this agent. Visitors and the local service do not see it.
    pub compression: bool,
    /// Which visitors the service lets in.
    pub access: Policy,
}

/// A text that is not what it should be.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SettingError {
    /// Not a WebSocket address.
    #[error(
        "an endpoint is a ws:// or wss:// address such as wss://id.execute-api.eu-west-1.amazonaws.com/dev"
    )]
    Endpoint,
    /// A token would travel unencrypted.
    #[error("ws:// is for services on this machine; use wss:// to reach another")]
    PlainEndpoint,
    /// Not a local service.
    #[error("a target is a port (3000), host:port, or http(s)://host:port")]
    Target,
    /// Not a value of a Host header.
    #[error("a host header is rewrite, preserve, or the host to send")]
    HostHeader,
}

/// The service's WebSocket address. Unencrypted only on loopback, because a token travels to it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Endpoint(Uri);

impl Endpoint {
    /// Host and port to connect to.
    pub fn address(&self) -> String {
        let default = if self.0.scheme_str() == Some("ws") {
            80
        } else {
            443
        };
        format!(
            "{}:{}",
            self.0.host().unwrap_or_default(),
            self.0.port_u16().unwrap_or(default)
        )
    }

    /// The address with a query that asks for a tunnel by name.
    pub fn asking_for(&self, tunnel_id: Option<&TunnelId>) -> String {
        tunnel_id.map_or_else(|| self.0.to_string(), |id| self.with_query("tunnel_id", id))
    }

    /// The address with a query that says which tunnel's name is to be given up.
    pub fn releasing(&self, tunnel_id: &TunnelId) -> String {
        self.with_query("release", tunnel_id)
    }

    fn with_query(&self, name: &str, id: &TunnelId) -> String {
        let separator = if self.0.query().is_some() { '&' } else { '?' };
        format!("{}{separator}{name}={id}", self.0)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Endpoint {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        let uri: Uri = text.parse().map_err(|_| SettingError::Endpoint)?;
        let host = uri.host().ok_or(SettingError::Endpoint)?;
        match uri.scheme_str() {
            Some("wss") => Ok(Self(uri)),
            Some("ws") if is_loopback(host) => Ok(Self(uri)),
            Some("ws") => Err(SettingError::PlainEndpoint),
            _ => Err(SettingError::Endpoint),
        }
    }
}

/// The local service: a scheme and an authority. Requests decide the path, and nothing else.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Target {
    /// `http` or `https`.
    pub scheme: Scheme,
    /// Host and port.
    pub authority: Authority,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.authority)
    }
}

impl FromStr for Target {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            let port: u16 = text.parse().map_err(|_| SettingError::Target)?;
            return format!("http://127.0.0.1:{port}").parse();
        }
        let with_scheme = if text.contains("://") {
            text.to_owned()
        } else {
            format!("http://{text}")
        };
        let parts = with_scheme
            .parse::<Uri>()
            .map_err(|_| SettingError::Target)?
            .into_parts();
        let has_path = parts.path_and_query.is_some_and(|path| path != "/");
        match (parts.scheme, parts.authority) {
            (Some(scheme), Some(authority))
                if (scheme == Scheme::HTTP || scheme == Scheme::HTTPS)
                    && !has_path
                    && !authority.as_str().contains('@') =>
            {
                Ok(Self { scheme, authority })
            }
            _ => Err(SettingError::Target),
        }
    }
}

/// Which `Host` the local service sees.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum HostHeader {
    /// The target's own. Development servers refuse others.
    #[default]
    Rewrite,
    /// The one the visitor used.
    Preserve,
    /// This one.
    Fixed(HeaderValue),
}

impl FromStr for HostHeader {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        match text {
            "rewrite" => Ok(Self::Rewrite),
            "preserve" => Ok(Self::Preserve),
            host => {
                host.parse::<Authority>()
                    .map_err(|_| SettingError::HostHeader)?;
                host.parse()
                    .map(Self::Fixed)
                    .map_err(|_| SettingError::HostHeader)
            }
        }
    }
}

/// A secret that no log or message can show.
#[derive(Clone)]
pub struct Secret(String);

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)
            .map(Self)
            .map_err(|_| D::Error::custom("must be a text in quotes"))
    }
}

impl Secret {
    /// The secret itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(secret: String) -> Self {
        Self(secret)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// A configuration file, in TOML. docs/agent.md lists the keys.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// See [`Settings::endpoint`].
    #[serde(default, deserialize_with = "parsed")]
    pub endpoint: Option<Endpoint>,
    /// See [`Settings::token`].
    pub token: Option<Secret>,
    /// What is logged on stderr.
    pub log_level: Option<String>,
    /// For the single tunnel of a file without `[tunnels]`, and default for the others.
    #[serde(default, deserialize_with = "parsed")]
    pub target: Option<Target>,
    /// For the single tunnel of a file without `[tunnels]`.
    #[serde(default, deserialize_with = "parsed")]
    pub tunnel_id: Option<TunnelId>,
    /// Default for all tunnels.
    #[serde(default, deserialize_with = "parsed")]
    pub host_header: Option<HostHeader>,
    /// Default for all tunnels.
    #[serde(default, deserialize_with = "duration")]
    pub request_timeout: Option<Duration>,
    /// Default for all tunnels.
    pub max_concurrent: Option<usize>,
    /// See [`Settings::compression`].
    pub compression: Option<bool>,
    /// Default for all tunnels; see [`PolicyArgs`], as the next three.
    #[serde(default, deserialize_with = "secrets")]
    pub basic_auth: Option<Vec<Secret>>,
    /// Default for all tunnels.
    pub allow: Option<Vec<Cidr>>,
    /// Default for all tunnels.
    pub deny: Option<Vec<Cidr>>,
    /// Default for all tunnels.
    #[serde(default, deserialize_with = "secrets")]
    pub require_header: Option<Vec<Secret>>,
    /// Whether tunnel ids that the service picked are remembered.
    pub remember: Option<bool>,
    /// Tunnels by name, for `ttf start`.
    #[serde(default)]
    pub tunnels: BTreeMap<String, FileTunnel>,
}

/// A `[tunnels.NAME]` of a [`File`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileTunnel {
    /// See [`Settings::target`].
    #[serde(default, deserialize_with = "parsed")]
    pub target: Option<Target>,
    /// See [`Settings::tunnel_id`].
    #[serde(default, deserialize_with = "parsed")]
    pub tunnel_id: Option<TunnelId>,
    /// See [`Settings::host_header`].
    #[serde(default, deserialize_with = "parsed")]
    pub host_header: Option<HostHeader>,
    /// See [`Settings::request_timeout`].
    #[serde(default, deserialize_with = "duration")]
    pub request_timeout: Option<Duration>,
    /// See [`Settings::max_concurrent`].
    pub max_concurrent: Option<usize>,
    /// See [`PolicyArgs`], as the next three.
    #[serde(default, deserialize_with = "secrets")]
    pub basic_auth: Option<Vec<Secret>>,
    /// See [`PolicyArgs`].
    pub allow: Option<Vec<Cidr>>,
    /// See [`PolicyArgs`].
    pub deny: Option<Vec<Cidr>>,
    /// See [`PolicyArgs`].
    #[serde(default, deserialize_with = "secrets")]
    pub require_header: Option<Vec<Secret>>,
}

impl FileTunnel {
    /// The tunnel's own rules.
    pub fn rules(&self) -> PolicyArgs {
        PolicyArgs {
            basic_auth: self.basic_auth.clone(),
            allow: self.allow.clone(),
            deny: self.deny.clone(),
            require_header: self.require_header.clone(),
        }
    }
}

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML, or has keys or values it may not have.
    #[error("{path}, line {line}: {message}")]
    SettingError {
        /// The file.
        path: String,
        /// Where.
        line: usize,
        /// Why, without what stands there: it may be a secret.
        message: String,
    },
}

impl File {
    /// The rules for tunnels that do not say otherwise.
    pub fn rules(&self) -> PolicyArgs {
        PolicyArgs {
            basic_auth: self.basic_auth.clone(),
            allow: self.allow.clone(),
            deny: self.deny.clone(),
            require_header: self.require_header.clone(),
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read or has a fault: the text names line and key.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let text = std::fs::read_to_string(path).map_err(|source| FileError::Unreadable {
            path: path.display().to_string(),
            source,
        })?;
        Self::parse(&text).map_err(|(line, message)| FileError::SettingError {
            path: path.display().to_string(),
            line,
            message,
        })
    }

    /// Reads a text; a fault comes with its line.
    fn parse(text: &str) -> Result<Self, (usize, String)> {
        toml::from_str(text).map_err(|fault: toml::de::Error| {
            let before = fault
                .span()
                .and_then(|span| text.get(..span.start))
                .unwrap_or_default();
            (before.matches('\n').count() + 1, fault.message().to_owned())
        })
    }
}

/// A list of secrets, whose faults do not show them.
fn secrets<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<Secret>>, D::Error> {
    Vec::deserialize(deserializer)
        .map(Some)
        .map_err(|_| D::Error::custom("must be a list of texts in quotes"))
}

fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err: fmt::Display>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    /// Takes a number where a text is meant, as in `target = 3000`.
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Word {
        Text(String),
        Number(u16),
    }
    let text = match Word::deserialize(deserializer)? {
        Word::Text(text) => text,
        Word::Number(number) => number.to_string(),
    };
    text.parse().map(Some).map_err(D::Error::custom)
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text)
        .map(Some)
        .map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_written_as_users_write_them() {
        for (text, target) in [
            ("3000", "http://127.0.0.1:3000"),
            ("localhost:8080", "http://localhost:8080"),
            ("http://[::1]:80", "http://[::1]:80"),
            ("https://localhost:8443/", "https://localhost:8443"),
        ] {
            assert_eq!(
                text.parse::<Target>().map(|target| target.to_string()),
                Ok(target.to_owned()),
                "{text}"
            );
        }
        for text in [
            "",
            "70000000",
            "http://",
            "ftp://x",
            "http://x/path",
            "http://user@x",
        ] {
            assert_eq!(text.parse::<Target>(), Err(SettingError::Target), "{text}");
        }
    }

    #[test]
    fn a_token_never_goes_over_plain_text_to_another_machine() {
        for text in [
            "wss://x.example.com/dev",
            "ws://127.0.0.1:8080/_ws",
            "ws://localhost:1",
        ] {
            assert!(text.parse::<Endpoint>().is_ok(), "{text}");
        }
        assert_eq!(
            "ws://10.0.0.1/".parse::<Endpoint>(),
            Err(SettingError::PlainEndpoint)
        );
        for text in ["https://x", "x", ""] {
            assert_eq!(
                text.parse::<Endpoint>(),
                Err(SettingError::Endpoint),
                "{text}"
            );
        }
    }

    #[test]
    fn a_secret_is_never_printed() {
        assert_eq!(
            format!("{:?}", Secret::from("hunter2".to_owned())),
            "Secret"
        );
    }

    #[test]
    fn a_file_is_read_and_its_faults_are_named_with_their_line() {
        let file: File = toml::from_str(
            "endpoint = 'wss://x.example.com/dev'\ntoken = 't'\nrequest_timeout = '30s'\n[tunnels.web]\ntarget = 3000\ntunnel_id = 'my-app'\nhost_header = 'preserve'\n",
        )
        .expect("a good file");
        let web = &file.tunnels["web"];
        assert_eq!(file.request_timeout, Some(Duration::from_secs(30)));
        assert_eq!(
            web.target,
            Some("127.0.0.1:3000".parse().expect("a target"))
        );
        assert_eq!(web.host_header, Some(HostHeader::Preserve));

        for (text, line, key) in [
            ("endpoint = 'wss://x'\nendpiont = 1\n", 2, "endpiont"),
            ("[tunnels.web]\nport = 1\n", 2, "port"),
            ("\n\ntunnel_id = 'NO'\n", 3, "tunnel id"),
            ("basic_auth = 'alice:swordfish'\n", 1, "a list"),
            ("token = ['swordfish']\n", 1, "a text"),
            ("token = 'swordfish\n", 1, ""),
        ] {
            let (at, fault) = File::parse(text).expect_err("a bad file");
            assert!(
                at == line && fault.contains(key) && !fault.contains("sword"),
                "{at}: {fault}"
            );
        }
    }
}
