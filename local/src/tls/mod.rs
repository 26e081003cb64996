//! TLS on the listening socket. The certificates come from `files`, or from an authority that `acme` asks for them.

mod acme;
mod files;
mod issue;
mod store;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, ring},
    server::{Acceptor, ResolvesServerCert},
};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};
use tunnel_service::{
    routing::{PublicUrl, Routing},
    tables::tunnels::TunnelsTable,
};

use crate::{front::socket::RawStream, subsystem::Subsystem};

pub use acme::AcmeOptions;

/// HTTP/2, as ALPN calls it (RFC 9113, 3.1).
const HTTP_2: &[u8] = b"h2";
/// HTTP/1.1 (RFC 7301, 6).
const HTTP_11: &[u8] = b"http/1.1";
/// How long a handshake may take.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Where certificates come from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TlsOptions {
    /// From files, which are read again when they change.
    Files {
        /// The certificate and those that lead to its authority, in PEM.
        certificate: PathBuf,
        /// Its private key, in PEM.
        key: PathBuf,
    },
    /// From an authority.
    Acme(AcmeOptions),
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file has no certificate.
    #[error("{0} contains no certificate in PEM form")]
    NoCertificate(PathBuf),
    /// A file has no key.
    #[error("{0} contains no private key in PEM form")]
    NoKey(PathBuf),
    /// A certificate is not one, or its key is another's or of an unknown kind.
    #[error("{certificate} cannot be used with {key}: {source}")]
    Pair {
        /// The file with the certificate.
        certificate: PathBuf,
        /// The file with the key.
        key: PathBuf,
        /// The cause.
        source: rustls::Error,
    },
    /// Nobody knows until when a certificate is valid.
    #[error("{0} contains a certificate that cannot be read")]
    Malformed(PathBuf),
}

/// What a handshake led to.
pub(crate) enum Handshake {
    /// The connection speaks HTTP/1.1.
    Http1(TlsStream<RawStream>),
    /// The connection speaks HTTP/2.
    Http2(TlsStream<RawStream>),
    /// An authority has seen the certificate that it looked for.
    Validation,
}

/// TLS for one listening socket.
#[derive(Debug)]
pub(crate) struct Tls {
    config: Arc<ServerConfig>,
    acme: Option<Arc<acme::Acme>>,
}

impl Tls {
    /// Takes certificates from where `options` say, and goes on looking for newer ones until `subsystem` is stopped.
    ///
    /// # Errors
    /// If files cannot be read, or make no certificate.
    pub(crate) fn start(
        options: TlsOptions,
        names: Names,
        subsystem: &Subsystem,
    ) -> Result<Self, TlsError> {
        Ok(match options {
            TlsOptions::Files { certificate, key } => {
                let pair = Arc::new(files::CertificateFiles::open(certificate, key)?);
                subsystem.spawn(pair.clone().watch(subsystem.stopping().clone()));
                Self {
                    config: http_config(pair),
                    acme: None,
                }
            }
            TlsOptions::Acme(options) => {
                let acme = Arc::new(acme::Acme::open(options, names, subsystem.clone())?);
                subsystem.spawn(acme.clone().renew());
                Self {
                    config: http_config(acme.certificates()),
                    acme: Some(acme),
                }
            }
        })
    }

    /// Does the server's part of a handshake.
    ///
    /// # Errors
    /// If it fails.
    pub(crate) async fn accept(&self, stream: RawStream) -> io::Result<Handshake> {
        let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        if let Some(acme) = &self.acme {
            let hello = start.client_hello();
            if acme::is_validation(&hello) {
                start.into_stream(acme.validation()).await?;
                return Ok(Handshake::Validation);
            }
            let name = hello.server_name().map(str::to_owned);
            acme.ensure(name.as_deref()).await;
        }
        let stream = start.into_stream(self.config.clone()).await?;
        Ok(match stream.get_ref().1.alpn_protocol() {
            Some(HTTP_2) => Handshake::Http2(stream),
            _ => Handshake::Http1(stream),
        })
    }
}

/// The names that visitors use.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    pub(crate) public_url: PublicUrl,
    pub(crate) routing: Routing,
    pub(crate) tunnels: TunnelsTable,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The configuration for visitors and agents: TLS 1.2 and 1.3.
fn http_config(certificates: Arc<dyn ResolvesServerCert>) -> Arc<ServerConfig> {
    let mut config = config(certificates, &[HTTP_2, HTTP_11]);
    // Sessions are resumed without being stored here.
    if let Ok(ticketer) = ring::Ticketer::new() {
        config.ticketer = ticketer;
    }
    Arc::new(config)
}

fn config(certificates: Arc<dyn ResolvesServerCert>, protocols: &[&[u8]]) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("ring has the default versions")
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    config
}
