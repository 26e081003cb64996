//! What an agent is to do: the checked values, and the layers that they come from.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use clap::{Args, builder::BoolishValueParser};
use http::{HeaderValue, uri::Authority};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde::Deserialize;
use tunnel_protocol::{cidr::Cidr, id::TunnelId};

use crate::{
    authority,
    config_file::{parsed, secret, secrets},
    endpoint::Endpoint,
    header_rules::{HeaderRuleError, HeaderRules},
    inspector::{InspectAddress, InspectOptions, InspectSize},
    log_format::LogFormat,
    named_address::{NamedAddress, NamedAddressError},
    proxy::{Proxy, ProxyChoice, ProxyError},
    target::Target,
    tunnel_ids,
    visitor_rules::{Policy, PolicyArgs, PolicyArgsError},
};

/// How long the local service may take to start its response once it has the request.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5 * 60);
/// How many requests are passed to the local service at once.
pub const MAX_CONCURRENT: usize = 1024;

/// What one tunnel needs to be opened.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The tunnel's name in what the user sees; nothing to do with its address.
    pub name: String,
    /// The service's WebSocket address.
    pub endpoint: Endpoint,
    /// Which certificates the service may have.
    pub endpoint_tls: AcceptedCertificates,
    /// The proxy through which the service is reached.
    pub proxy: Option<Proxy>,
    /// What the agent authenticates with.
    pub token: Option<Secret>,
    /// The tunnel id to request; without one the service picks one.
    pub tunnel_id: Option<TunnelId>,
    /// The file that remembers ids that the service picked; without it they are forgotten with the process.
    pub memory: Option<PathBuf>,
    /// The local service.
    pub target: Target,
    /// Which certificates an `https` target may have.
    pub target_tls: AcceptedCertificates,
    /// Paths of a directory that lead nowhere get its page.
    pub spa: bool,
    /// Which `Host` the local service sees.
    pub host_header: HostHeader,
    /// What is changed in the header of requests.
    pub request_headers: HeaderRules,
    /// What is changed in the header of responses.
    pub response_headers: HeaderRules,
    /// See [`REQUEST_TIMEOUT`].
    pub request_timeout: Duration,
    /// See [`MAX_CONCURRENT`].
    pub max_concurrent: usize,
    /// Bodies may be compressed on the way between the service and this agent. Visitors and the local service do not see it.
    pub compression: bool,
    /// Which visitors the service admits.
    pub access: Policy,
    /// The first connection is tried again also where time does not mend what is wrong.
    pub keep_trying: bool,
}

impl Settings {
    /// What a tunnel has if its user says nothing but where the service is. It remembers no tunnel id and uses no proxy.
    pub fn new(endpoint: Endpoint) -> Self {
        Self {
            name: "http".to_owned(),
            endpoint,
            endpoint_tls: AcceptedCertificates::System,
            proxy: None,
            token: None,
            tunnel_id: None,
            memory: None,
            target: Target::default(),
            target_tls: AcceptedCertificates::System,
            spa: false,
            host_header: HostHeader::default(),
            request_headers: HeaderRules::default(),
            response_headers: HeaderRules::default(),
            request_timeout: REQUEST_TIMEOUT,
            max_concurrent: MAX_CONCURRENT,
            compression: true,
            access: Policy::default(),
            keep_trying: false,
        }
    }
}

/// Which certificates the other end may have.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum AcceptedCertificates {
    /// Those that this machine trusts.
    #[default]
    System,
    /// Those, and these or whatever they have signed.
    Authorities(Arc<[CertificateDer<'static>]>),
    /// Any.
    Insecure,
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

/// A text that is neither a mode nor a host.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "host_header must be rewrite, preserve, or the host to send, such as app.test or app.test:8080"
)]
pub struct HostHeaderError;

impl FromStr for HostHeader {
    type Err = HostHeaderError;

    fn from_str(text: &str) -> Result<Self, HostHeaderError> {
        match text {
            "rewrite" => Ok(Self::Rewrite),
            "preserve" => Ok(Self::Preserve),
            host => {
                let authority: Authority = host.parse().map_err(|_| HostHeaderError)?;
                authority::check(&authority).map_err(|_| HostHeaderError)?;
                host.parse().map(Self::Fixed).map_err(|_| HostHeaderError)
            }
        }
    }
}

/// A secret that no log or message can show.
#[derive(Clone)]
pub struct Secret(String);

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

/// Settings of a tunnel from one place: the command line with the environment, a tunnel's table in the config file, or the top of
/// that file. What one layer leaves open, the next decides.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Layer {
    /// The service's address: wss://..., its public URL, or ws://127.0.0.1:8080/_ws for one on this machine
    #[arg(
        short,
        long,
        global = true,
        env = "TTF_ENDPOINT",
        aliases = ["server", "server-addr", "connect-url", "to"],
        value_name = "URL"
    )]
    #[serde(deserialize_with = "parsed")]
    pub endpoint: Option<Endpoint>,
    /// The agent's token; prefer the environment to the command line
    #[arg(
        long,
        global = true,
        env = "TTF_TOKEN",
        hide_env_values = true,
        alias = "authtoken",
        value_name = "TOKEN"
    )]
    #[serde(deserialize_with = "secret")]
    pub token: Option<Secret>,
    /// Accept the certificates in this PEM file, and those that they have signed, from the service
    #[arg(long, global = true, env = "TTF_ENDPOINT_CA", value_name = "FILE")]
    pub endpoint_ca: Option<PathBuf>,
    /// The proxy to the service: http://, https:// or socks5h://HOST:PORT, with USER:PASSWORD@ before the host if it wants that, or none [default: as HTTPS_PROXY, ALL_PROXY and NO_PROXY say]
    #[arg(
        long,
        global = true,
        env = "TTF_PROXY",
        hide_env_values = true,
        alias = "proxy-url",
        value_name = "URL"
    )]
    #[serde(deserialize_with = "parsed")]
    pub proxy: Option<ProxyChoice>,
    /// The service to use of those in the config file, as `ttf login --service NAME` stores it
    #[arg(long, global = true, env = "TTF_SERVICE", value_name = "NAME")]
    pub service: Option<String>,
    /// The tunnel id to request [default: a random one, the same each time for the same endpoint and target]
    #[arg(
        short = 's',
        long,
        global = true,
        env = "TTF_TUNNEL_ID",
        visible_alias = "subdomain",
        aliases = ["name", "sd"],
        value_name = "ID"
    )]
    #[serde(deserialize_with = "parsed")]
    pub tunnel_id: Option<TunnelId>,
    /// The local service, if the command does not name it [default: 3000]
    #[arg(
        short = 'p',
        long,
        global = true,
        env = "TTF_TARGET",
        visible_alias = "port",
        alias = "addr",
        value_name = "TARGET"
    )]
    #[serde(deserialize_with = "parsed")]
    pub target: Option<Target>,
    /// The local service or the tunnel, by an address, as other tunnels have it
    #[arg(long = "url", global = true, hide = true, aliases = ["domain", "hostname"], value_name = "URL")]
    #[serde(deserialize_with = "parsed")]
    pub url: Option<NamedAddress>,
    /// Accept any certificate of an https:// target
    #[arg(
        long,
        global = true,
        env = "TTF_TARGET_INSECURE",
        aliases = ["no-tls-verify", "insecure"],
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = BoolishValueParser::new(),
        value_name = "BOOL"
    )]
    pub target_insecure: Option<bool>,
    /// Accept the certificates in this PEM file, and those that they have signed, from an https:// target
    #[arg(
        long,
        global = true,
        env = "TTF_TARGET_CA",
        alias = "origin-ca-pool",
        value_name = "FILE"
    )]
    pub target_ca: Option<PathBuf>,
    /// The Host that the local service sees: rewrite (its own), preserve (the visitor's), or a host [default: rewrite]
    #[arg(
        long,
        global = true,
        env = "TTF_HOST_HEADER",
        alias = "http-host-header",
        value_name = "HOST"
    )]
    #[serde(deserialize_with = "parsed")]
    pub host_header: Option<HostHeader>,
    /// Change the header of requests: "NAME: VALUE" sets a field, "+NAME: VALUE" adds one, "-NAME" removes it; may be repeated
    #[arg(
        long,
        global = true,
        env = "TTF_HEADER",
        hide_env_values = true,
        aliases = ["request-header", "request-header-add"],
        allow_hyphen_values = true,
        value_name = "RULE"
    )]
    #[serde(deserialize_with = "secrets")]
    pub header: Option<Vec<Secret>>,
    /// Change the header of responses, in the same way; may be repeated
    #[arg(
        long,
        global = true,
        env = "TTF_RESPONSE_HEADER",
        hide_env_values = true,
        alias = "response-header-add",
        allow_hyphen_values = true,
        value_name = "RULE"
    )]
    #[serde(deserialize_with = "secrets")]
    pub response_header: Option<Vec<Secret>>,
    /// Answer paths of a directory that lead nowhere with its index.html, as single-page applications need it
    #[arg(
        long,
        global = true,
        env = "TTF_SPA",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = BoolishValueParser::new(),
        value_name = "BOOL"
    )]
    pub spa: Option<bool>,
    /// How long the local service may take to start its response [default: 5m]
    #[arg(long, global = true, env = "TTF_REQUEST_TIMEOUT", value_name = "TIME")]
    #[serde(deserialize_with = "parsed")]
    pub request_timeout: Option<humantime::Duration>,
    /// How many requests may be in progress at once [default: 1024]
    #[arg(long, global = true, env = "TTF_MAX_CONCURRENT", value_name = "N")]
    pub max_concurrent: Option<usize>,
    /// Compress bodies between the service and this agent where that saves something [default: true]
    #[arg(long, global = true, env = "TTF_COMPRESSION", value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    pub compression: Option<bool>,
    /// Admit only visitors with this user name and password; may be repeated; prefer the environment to the command line
    #[arg(
        long,
        global = true,
        env = "TTF_BASIC_AUTH",
        hide_env_values = true,
        alias = "auth",
        value_name = "USER:PASSWORD"
    )]
    #[serde(deserialize_with = "secrets")]
    pub basic_auth: Option<Vec<Secret>>,
    /// Admit only visitors from this network, such as 192.0.2.0/24; may be repeated
    #[arg(
        long,
        global = true,
        env = "TTF_ALLOW",
        alias = "cidr-allow",
        value_delimiter = ',',
        value_name = "CIDR"
    )]
    pub allow: Option<Vec<Cidr>>,
    /// Refuse visitors from this network; may be repeated
    #[arg(
        long,
        global = true,
        env = "TTF_DENY",
        alias = "cidr-deny",
        value_delimiter = ',',
        value_name = "CIDR"
    )]
    pub deny: Option<Vec<Cidr>>,
    /// Admit only requests with this header; may be repeated
    #[arg(
        long,
        global = true,
        env = "TTF_REQUIRE_HEADER",
        hide_env_values = true,
        value_name = "NAME: VALUE"
    )]
    #[serde(deserialize_with = "secrets")]
    pub require_header: Option<Vec<Secret>>,
    /// Remember a random tunnel id for the next start [default: true]
    #[arg(long, global = true, env = "TTF_REMEMBER", value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    pub remember: Option<bool>,
    /// Keep trying although the first connection fails for a reason that time does not mend [default: only under systemd]
    #[arg(
        long,
        global = true,
        env = "TTF_KEEP_TRYING",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = BoolishValueParser::new(),
        value_name = "BOOL"
    )]
    pub keep_trying: Option<bool>,
}

/// Settings of the process from one place, as [`Layer`] has those of a tunnel.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProcessLayer {
    /// What to log on stderr: error, warn, info, debug, trace, off, or a list such as warn,forwarder=debug [default: warn]
    #[arg(
        long,
        global = true,
        env = "TTF_LOG_LEVEL",
        alias = "loglevel",
        value_name = "LEVEL"
    )]
    pub log_level: Option<String>,
    /// How the lines on stderr look: plain, text (with the local time), or json [default: plain]
    #[arg(
        long,
        global = true,
        env = "TTF_LOG_FORMAT",
        alias = "output",
        value_parser = LogFormat::parser(),
        value_name = "FORMAT"
    )]
    #[serde(deserialize_with = "parsed")]
    pub log_format: Option<LogFormat>,
    /// Where those lines go: stderr, stdout, none, or a file that they are appended to [default: stderr]
    #[arg(
        long,
        global = true,
        env = "TTF_LOG",
        alias = "logfile",
        value_name = "FILE"
    )]
    pub log: Option<PathBuf>,
    /// Print nothing but public URLs, lost connections and errors
    #[arg(
        short,
        long,
        global = true,
        env = "TTF_QUIET",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = BoolishValueParser::new(),
        value_name = "BOOL"
    )]
    pub quiet: Option<bool>,
    /// Whether a terminal shows the console, redrawn in place, instead of lines [default: true]
    #[arg(long, global = true, env = "TTF_CONSOLE", value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    pub console: Option<bool>,
    /// Where the inspector's page is: false, a port, or host:port [default: 127.0.0.1:4040, or the next free port]
    #[arg(long, global = true, env = "TTF_INSPECT", value_name = "ADDRESS")]
    pub inspect: Option<InspectAddress>,
    /// How much memory the inspector may take for requests [default: 50MiB]
    #[arg(long, global = true, env = "TTF_INSPECT_SIZE", value_name = "SIZE")]
    #[serde(deserialize_with = "parsed")]
    pub inspect_size: Option<InspectSize>,
    /// A file that keeps the inspector's requests over restarts, with secrets in headers masked
    #[arg(long, global = true, env = "TTF_INSPECT_HISTORY", value_name = "FILE")]
    pub inspect_history: Option<PathBuf>,
}

impl ProcessLayer {
    /// This layer, with what it leaves open taken from `next`.
    #[must_use]
    pub fn or(&self, next: &Self) -> Self {
        Self {
            log_level: self.log_level.as_ref().or(next.log_level.as_ref()).cloned(),
            log_format: self.log_format.or(next.log_format),
            log: self.log.as_ref().or(next.log.as_ref()).cloned(),
            quiet: self.quiet.or(next.quiet),
            console: self.console.or(next.console),
            inspect: self.inspect.as_ref().or(next.inspect.as_ref()).cloned(),
            inspect_size: self.inspect_size.or(next.inspect_size),
            inspect_history: self
                .inspect_history
                .as_ref()
                .or(next.inspect_history.as_ref())
                .cloned(),
        }
    }

    /// What is inspected.
    pub fn inspect(&self) -> InspectOptions {
        InspectOptions {
            address: self.inspect.clone().unwrap_or_default(),
            size: self.inspect_size,
            history: self.inspect_history.clone(),
        }
    }
}

/// Why layers do not make settings. The text says what to do, and shows no secret.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// No layer has an endpoint.
    #[error(
        "no endpoint: run `ttf login ENDPOINT` once, pass --endpoint, or set TTF_ENDPOINT (for a tunnel-local on this machine: 127.0.0.1:8080)"
    )]
    NoEndpoint,
    /// No request could be passed on.
    #[error("max_concurrent must be at least 1")]
    MaxConcurrent,
    /// Every request would fail.
    #[error("request_timeout must be longer than zero")]
    RequestTimeout,
    /// The file cannot be read, or has no certificate.
    #[error("{setting} {path}: {reason}")]
    Authorities {
        /// `target_ca` or `endpoint_ca`.
        setting: &'static str,
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The rules about visitors are malformed.
    #[error(transparent)]
    Policy(#[from] PolicyArgsError),
    /// A rule about header fields is malformed.
    #[error("{setting}: a rule {reason}")]
    HeaderRule {
        /// `header` or `response_header`.
        setting: &'static str,
        /// What is wrong with it.
        reason: HeaderRuleError,
    },
    /// The environment names a proxy that cannot be used.
    #[error("HTTPS_PROXY or ALL_PROXY: {0}")]
    EnvironmentProxy(ProxyError),
    /// The requested address cannot be had.
    #[error(transparent)]
    NamedAddress(#[from] NamedAddressError),
}

impl Layer {
    /// This layer, with what it leaves open taken from `next`.
    #[must_use]
    pub fn or(&self, next: &Self) -> Self {
        fn first<T: Clone>(this: &Option<T>, next: &Option<T>) -> Option<T> {
            this.as_ref().or(next.as_ref()).cloned()
        }
        Self {
            endpoint: first(&self.endpoint, &next.endpoint),
            token: first(&self.token, &next.token),
            endpoint_ca: first(&self.endpoint_ca, &next.endpoint_ca),
            proxy: first(&self.proxy, &next.proxy),
            service: first(&self.service, &next.service),
            tunnel_id: self.tunnel_id().or_else(|| match self.url {
                Some(NamedAddress::Public { .. }) => None,
                _ => next.tunnel_id(),
            }),
            target: self.target().or_else(|| next.target()),
            url: first(&self.url, &next.url),
            target_insecure: self.target_insecure.or(next.target_insecure),
            target_ca: first(&self.target_ca, &next.target_ca),
            host_header: first(&self.host_header, &next.host_header),
            header: first(&self.header, &next.header),
            response_header: first(&self.response_header, &next.response_header),
            spa: self.spa.or(next.spa),
            request_timeout: self.request_timeout.or(next.request_timeout),
            max_concurrent: self.max_concurrent.or(next.max_concurrent),
            compression: self.compression.or(next.compression),
            basic_auth: first(&self.basic_auth, &next.basic_auth),
            allow: first(&self.allow, &next.allow),
            deny: first(&self.deny, &next.deny),
            require_header: first(&self.require_header, &next.require_header),
            remember: self.remember.or(next.remember),
            keep_trying: self.keep_trying.or(next.keep_trying),
        }
    }

    /// As [`Layer::or`], but a token that `next` has for its own endpoint does not go to another one that this layer names.
    #[must_use]
    pub fn with_credentials_for_endpoint(&self, next: &Self) -> Self {
        let goes_elsewhere = matches!(
            (&self.endpoint, &next.endpoint),
            (Some(own), Some(other)) if own != other
        );
        let merged = self.or(next);
        if goes_elsewhere {
            Self {
                token: self.token.clone(),
                ..merged
            }
        } else {
            merged
        }
    }

    /// This layer, with the target that a command names, if it names one.
    #[must_use]
    pub fn with_target(&self, target: Option<Target>) -> Self {
        Self {
            target: target.or_else(|| self.target()),
            ..self.clone()
        }
    }

    /// The requested tunnel id, as far as it is known without the endpoint.
    pub fn tunnel_id(&self) -> Option<TunnelId> {
        self.tunnel_id.clone().or_else(|| match &self.url {
            Some(NamedAddress::TunnelId(id)) => Some(id.clone()),
            _ => None,
        })
    }

    /// The local service.
    pub fn target(&self) -> Option<Target> {
        self.target.clone().or_else(|| match &self.url {
            Some(NamedAddress::Target(target)) => Some(target.clone()),
            _ => None,
        })
    }

    /// The settings of the tunnel `name`, with defaults for what this layer leaves open.
    ///
    /// # Errors
    /// If there is no endpoint, or values cannot be used.
    pub fn settings(self, name: &str) -> Result<Settings, LayerError> {
        let target_tls = self.target_tls()?;
        let request_timeout = self.request_timeout.map_or(REQUEST_TIMEOUT, Into::into);
        if request_timeout.is_zero() {
            return Err(LayerError::RequestTimeout);
        }
        let max_concurrent = self.max_concurrent.unwrap_or(MAX_CONCURRENT);
        if max_concurrent == 0 {
            return Err(LayerError::MaxConcurrent);
        }
        let endpoint = self.endpoint.clone().ok_or(LayerError::NoEndpoint)?;
        let tunnel_id = match (self.tunnel_id(), &self.url) {
            (None, Some(url)) => url.tunnel_id(&endpoint)?,
            (tunnel_id, _) => tunnel_id,
        };
        let target = self.target().unwrap_or_default();
        let endpoint_tls = authorities("endpoint_ca", self.endpoint_ca.as_deref())?;
        let proxy = self.proxy(&endpoint)?;
        let request_headers = header_rules("header", self.header.as_deref())?;
        let response_headers = header_rules("response_header", self.response_header.as_deref())?;
        let policy = PolicyArgs {
            basic_auth: self.basic_auth,
            allow: self.allow,
            deny: self.deny,
            require_header: self.require_header,
        };
        Ok(Settings {
            name: name.to_owned(),
            endpoint_tls,
            proxy,
            endpoint,
            token: self.token,
            tunnel_id,
            memory: tunnel_ids::default_file().filter(|_| self.remember.unwrap_or(true)),
            target,
            target_tls,
            spa: self.spa.unwrap_or(false),
            host_header: self.host_header.unwrap_or_default(),
            request_headers,
            response_headers,
            request_timeout,
            max_concurrent,
            compression: self.compression.unwrap_or(true),
            access: policy.check()?,
            keep_trying: self.keep_trying.unwrap_or(false),
        })
    }

    fn target_tls(&self) -> Result<AcceptedCertificates, LayerError> {
        if self.target_insecure == Some(true) {
            return Ok(AcceptedCertificates::Insecure);
        }
        authorities("target_ca", self.target_ca.as_deref())
    }

    /// The proxy to an endpoint: the chosen one, or the environment's.
    fn proxy(&self, endpoint: &Endpoint) -> Result<Option<Proxy>, LayerError> {
        match &self.proxy {
            Some(ProxyChoice::Direct) => Ok(None),
            Some(ProxyChoice::Through(proxy)) => Ok(Some((**proxy).clone())),
            None => Proxy::of_environment(endpoint).map_err(LayerError::EnvironmentProxy),
        }
    }
}

fn header_rules(
    setting: &'static str,
    rules: Option<&[Secret]>,
) -> Result<HeaderRules, LayerError> {
    HeaderRules::parse(rules.unwrap_or_default())
        .map_err(|reason| LayerError::HeaderRule { setting, reason })
}

/// The certificates in a file, beside those of the system.
fn authorities(
    setting: &'static str,
    path: Option<&Path>,
) -> Result<AcceptedCertificates, LayerError> {
    let Some(path) = path else {
        return Ok(AcceptedCertificates::System);
    };
    let fault = |reason: String| LayerError::Authorities {
        setting,
        path: path.display().to_string(),
        reason,
    };
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| fault(format!("cannot be read as PEM: {error}")))?;
    if certificates.is_empty() {
        return Err(fault("has no certificate".to_owned()));
    }
    Ok(AcceptedCertificates::Authorities(certificates.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_printed() {
        assert_eq!(
            format!("{:?}", Secret::from("hunter2".to_owned())),
            "Secret"
        );
    }

    #[test]
    fn a_host_header_is_a_mode_or_a_host() {
        assert_eq!("preserve".parse(), Ok(HostHeader::Preserve));
        assert_eq!(
            "app.test:8080".parse(),
            Ok(HostHeader::Fixed(HeaderValue::from_static("app.test:8080")))
        );
        for text in ["", "app.test:99999", "user@app.test", "a b"] {
            assert_eq!(text.parse::<HostHeader>(), Err(HostHeaderError), "{text}");
        }
    }

    #[test]
    fn a_file_of_authorities_must_have_a_certificate() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let layer = Layer {
            endpoint: Some("ws://127.0.0.1:1".parse().expect("an endpoint")),
            target_ca: Some(file.path().to_owned()),
            ..Layer::default()
        };
        let error = layer.clone().settings("x").expect_err("no certificate");
        assert!(error.to_string().contains("no certificate"), "{error}");
        let insecure = Layer {
            target_insecure: Some(true),
            ..layer
        };
        let settings = insecure.settings("x").expect("settings");
        assert_eq!(settings.target_tls, AcceptedCertificates::Insecure);
    }
}
