//! What to start: the settings of a server, and which of them cannot be.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use tunnel_connect::MAX_TUNNEL_IDS_PER_OWNER;
use tunnel_forward::rate_limit::MAX_CONCURRENT_REQUESTS;
use tunnel_local_aws::quotas::Quotas;
use tunnel_protocol::cidr::Cidr;
use tunnel_service::{
    auth::{AuthMode, jwt::JwtSettings},
    routing::{PublicUrl, Routing, host_name},
    settings::SettingsError,
};

use crate::operator::AccessLogOptions;

use crate::tls::TlsOptions;

/// The settings of a server.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where visitors and agents connect; port 0 picks a free one.
    pub listen: SocketAddr,
    /// Where visitors reach `listen`, if not under its own address.
    pub public_url: Option<PublicUrl>,
    /// TLS on `listen`, and where its certificates come from.
    pub tls: Option<TlsOptions>,
    /// Where visitors without TLS are sent to TLS.
    pub listen_http: Option<SocketAddr>,
    /// Where data is kept; without a directory it is forgotten at the end.
    pub data: Option<PathBuf>,
    /// How agents prove who they are.
    pub auth: AuthMode,
    /// Who issues agents' JSON Web Tokens, with [`AuthMode::Jwt`].
    pub jwt: Option<JwtSettings>,
    /// How public addresses name a tunnel.
    pub routing: Routing,
    /// Serve visitors whatever host they ask for, and treat that host as ours.
    pub any_host: bool,
    /// What agents' connections may do.
    pub quotas: Quotas,
    /// Most requests of one tunnel at once; 0 means no limit.
    pub max_concurrent_requests: u32,
    /// Most new requests of one tunnel per second, and twice as many at once after a pause; 0 means no limit.
    pub max_requests_per_second: u32,
    /// Most tunnel ids that one owner may have; 0 means no limit.
    pub max_tunnel_ids_per_owner: u32,
    /// Reverse proxies in front of this process whose forwarding fields are believed.
    pub trusted_proxies: Vec<Cidr>,
    /// Where the operator asks for metrics, health and who is connected; nowhere if not set.
    pub admin: Option<SocketAddr>,
    /// Serve `admin` at an address that other machines can connect to.
    pub admin_remote: bool,
    /// Count each tunnel's requests for itself.
    pub metrics_per_tunnel: bool,
    /// A log with a line for each request.
    pub access_log: Option<AccessLogOptions>,
    /// How the functions reach each other and agents.
    pub transport: Transport,
}

/// How much of AWS requests see on their way.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Transport {
    /// The functions exchange messages with each other and with agents within the process. Everything else is the same.
    #[default]
    InProcess,
    /// Every step is as in AWS: agents' messages are events, agents are posted to through @connections, and replies come back
    /// over a reply connection or through the mailbox. For tests of what runs in Lambda.
    Emulated,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            public_url: None,
            tls: None,
            listen_http: None,
            data: None,
            auth: AuthMode::Open,
            jwt: None,
            routing: Routing::Path,
            any_host: false,
            quotas: Quotas::default(),
            max_concurrent_requests: MAX_CONCURRENT_REQUESTS,
            max_requests_per_second: 0,
            max_tunnel_ids_per_owner: MAX_TUNNEL_IDS_PER_OWNER,
            trusted_proxies: Vec::new(),
            admin: None,
            admin_remote: false,
            metrics_per_tunnel: false,
            access_log: None,
            transport: Transport::default(),
        }
    }
}

/// Settings that contradict each other.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum OptionsError {
    /// Agents need not authenticate, and others than this machine can connect.
    #[error(
        "refusing to serve other machines without authentication: use --auth token or --auth jwt"
    )]
    Unauthenticated,
    /// Visitors could not use the listening address.
    #[error("visitors cannot reach {0}: set --public-url to the address that they use")]
    NoPublicUrl(SocketAddr),
    /// Other machines could ask what only the operator may know.
    #[error(
        "refusing to serve --admin at {0}, where other machines can connect without a password: use a loopback address, or --admin-remote if only those can connect who may"
    )]
    RemoteAdmin(SocketAddr),
    /// JSON Web Tokens are required, and nothing says how they are validated.
    #[error(
        "--auth jwt needs --jwt-issuer, --jwt-audience, and either --jwt-jwks-url or --jwt-secret (in the environment: TUNNEL_JWT_...)"
    )]
    IncompleteJwt,
    /// JSON Web Tokens cannot be validated with these settings.
    #[error("{0}")]
    Jwt(String),
    /// Visitors are told to use an address without TLS, and there is only TLS.
    #[error("with TLS, --public-url must start with https://")]
    PublicUrlWithoutTls,
    /// There is no TLS to which visitors could be sent.
    #[error("--listen-http needs --tls-cert and --tls-key, or --acme")]
    RedirectWithoutTls,
    /// No authority issues a certificate for this name.
    #[error(
        "--acme needs --public-url https://HOST with a host name that others can look up, not an address"
    )]
    NoPublicName,
    /// A certificate without its key, or a key without its certificate.
    #[error("--tls-cert and --tls-key belong together: set both")]
    HalfAPair,
    /// Certificates from two places.
    #[error(
        "certificates come either from --tls-cert and --tls-key or from --acme: set one of them"
    )]
    TwoSources,
    /// There is nowhere to keep certificates.
    #[error("--acme needs --data, where account and certificates are kept")]
    NowhereToKeep,
}

impl OptionsError {
    /// What is wrong with the settings of JSON Web Tokens, by the names that they have here: those of flags.
    pub(crate) fn of_jwt(error: &SettingsError) -> Self {
        let names = [
            ("JWT_ISSUER", "--jwt-issuer"),
            ("JWT_AUDIENCE", "--jwt-audience"),
            ("JWT_JWKS_URL", "--jwt-jwks-url"),
            ("JWT_SECRET", "--jwt-secret"),
        ];
        let said = names
            .iter()
            .fold(error.to_string(), |said, (variable, flag)| {
                said.replace(variable, flag)
            });
        Self::Jwt(said)
    }
}

impl Options {
    /// Whether only this machine can connect, as far as the settings tell.
    pub fn is_private(listen: SocketAddr, public_url: Option<&PublicUrl>) -> bool {
        listen.ip().is_loopback() && public_url.is_none_or(PublicUrl::is_loopback)
    }

    /// Checks what can be checked before anything is opened.
    ///
    /// # Errors
    /// If the settings contradict each other.
    pub fn validate(&self) -> Result<(), OptionsError> {
        let is_private = Self::is_private(self.listen, self.public_url.as_ref());
        if self.auth == AuthMode::Open && !is_private {
            return Err(OptionsError::Unauthenticated);
        }
        if self.public_url.is_none() && self.listen.ip().is_unspecified() {
            return Err(OptionsError::NoPublicUrl(self.listen));
        }
        if let Some(admin) = self.admin
            && !admin.ip().is_loopback()
            && !self.admin_remote
        {
            return Err(OptionsError::RemoteAdmin(admin));
        }
        if self.auth == AuthMode::Jwt && !self.jwt.as_ref().is_some_and(is_complete) {
            return Err(OptionsError::IncompleteJwt);
        }
        self.validate_tls()
    }

    fn validate_tls(&self) -> Result<(), OptionsError> {
        let Some(tls) = &self.tls else {
            return match self.listen_http {
                Some(_) => Err(OptionsError::RedirectWithoutTls),
                None => Ok(()),
            };
        };
        let has_name = |url: &PublicUrl| {
            let name = host_name(url.authority());
            let is_address = name.starts_with('[') || name.parse::<IpAddr>().is_ok();
            !is_address && name.contains('.') && !url.is_loopback()
        };
        match (tls, &self.public_url) {
            (_, Some(url)) if url.scheme() != "https" => Err(OptionsError::PublicUrlWithoutTls),
            (TlsOptions::Acme(_), None) => Err(OptionsError::NoPublicName),
            (TlsOptions::Acme(_), Some(url)) if !has_name(url) => Err(OptionsError::NoPublicName),
            _ => Ok(()),
        }
    }
}

fn is_complete(jwt: &JwtSettings) -> bool {
    !jwt.issuer.is_empty()
        && !jwt.audience.is_empty()
        && (jwt.jwks_url.is_empty() != jwt.secret.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::AcmeOptions;

    #[test]
    fn other_machines_ask_the_operators_address_only_if_that_is_wanted() {
        let admin = SocketAddr::from(([192, 0, 2, 1], 9090));
        let options = |admin_remote| Options {
            admin: Some(admin),
            admin_remote,
            ..Options::default()
        };
        let refused = Err(OptionsError::RemoteAdmin(admin));
        assert_eq!(options(false).validate(), refused);
        assert_eq!(options(true).validate(), Ok(()));
    }

    #[test]
    fn a_server_open_to_strangers_or_out_of_visitors_reach_is_refused() {
        let public = |url: &str| Some(url.parse().expect("a URL"));
        let any = SocketAddr::from(([0, 0, 0, 0], 80));
        for (what, options, expected) in [
            ("the default", Options::default(), Ok(())),
            (
                "open on all addresses",
                Options {
                    listen: any,
                    public_url: public("http://localhost"),
                    ..Options::default()
                },
                Err(OptionsError::Unauthenticated),
            ),
            (
                "open behind a proxy",
                Options {
                    public_url: public("https://t.example.com"),
                    ..Options::default()
                },
                Err(OptionsError::Unauthenticated),
            ),
            (
                "no address for visitors",
                Options {
                    listen: any,
                    auth: AuthMode::Token,
                    ..Options::default()
                },
                Err(OptionsError::NoPublicUrl(any)),
            ),
        ] {
            assert_eq!(options.validate(), expected, "{what}");
        }
    }

    #[test]
    fn tls_has_a_public_url_that_fits() {
        let files = TlsOptions::Files {
            certificate: PathBuf::from("c"),
            key: PathBuf::from("k"),
        };
        let acme = TlsOptions::Acme(AcmeOptions {
            contact: "a@example.com".to_owned(),
            directory_url: "https://acme.example.com/directory".to_owned(),
            authority: None,
            dns_hook: None,
            data: PathBuf::from("d"),
        });
        for (tls, public_url, expected) in [
            (&files, None, Ok(())),
            (&files, Some("https://t.example.com"), Ok(())),
            (
                &files,
                Some("http://t.example.com"),
                Err(OptionsError::PublicUrlWithoutTls),
            ),
            (&acme, None, Err(OptionsError::NoPublicName)),
            (
                &acme,
                Some("https://192.0.2.1"),
                Err(OptionsError::NoPublicName),
            ),
            (
                &acme,
                Some("https://[2001:db8::1]"),
                Err(OptionsError::NoPublicName),
            ),
            (
                &acme,
                Some("https://localhost"),
                Err(OptionsError::NoPublicName),
            ),
            (&acme, Some("https://t.example.com"), Ok(())),
        ] {
            let options = Options {
                tls: Some(tls.clone()),
                public_url: public_url.map(|url| url.parse().expect("a URL")),
                auth: AuthMode::Token,
                ..Options::default()
            };
            assert_eq!(options.validate(), expected, "{public_url:?}");
        }
        let redirect = Options {
            listen_http: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
            ..Options::default()
        };
        assert_eq!(redirect.validate(), Err(OptionsError::RedirectWithoutTls));
    }

    #[test]
    fn json_web_tokens_need_an_issuer_with_either_keys_or_a_secret() {
        let issuer = |jwks_url: &str, secret: &str| {
            Some(JwtSettings {
                issuer: "i".to_owned(),
                audience: "a".to_owned(),
                jwks_url: jwks_url.to_owned(),
                secret: secret.to_owned(),
            })
        };
        let incomplete = Err(OptionsError::IncompleteJwt);
        for (what, jwt, expected) in [
            ("no issuer", None, incomplete.clone()),
            (
                "keys and a secret",
                issuer("https://i/keys", "s"),
                incomplete.clone(),
            ),
            ("neither", issuer("", ""), incomplete),
            ("keys", issuer("https://i/keys", ""), Ok(())),
            ("a secret", issuer("", "s"), Ok(())),
        ] {
            let options = Options {
                auth: AuthMode::Jwt,
                jwt,
                ..Options::default()
            };
            assert_eq!(options.validate(), expected, "{what}");
        }
    }
}
