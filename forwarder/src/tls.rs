//! Which certificates of a local service are accepted.

use std::sync::Arc;

use http::uri::Scheme;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature,
        verify_tls13_signature,
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tracing::warn;

use crate::{settings::TargetTls, target::Target};

/// The configuration for a target. Certificates of the system are only read for a target that has TLS.
pub(crate) fn client_config(target: &Target, accepted: &TargetTls) -> ClientConfig {
    let provider = Arc::new(ring::default_provider());
    let mut verifier = Verifier::new(&provider);
    if target.scheme == Scheme::HTTPS {
        verifier.accept(accepted, &provider);
    }
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has the default versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth()
}

/// Accepts what the system or an authority of the user trusts, and the very certificates of the user: one that signed itself is not
/// valid as an authority and a server at once.
#[derive(Debug)]
struct Verifier {
    authorities: Option<Arc<WebPkiServerVerifier>>,
    exact: Arc<[CertificateDer<'static>]>,
    accepts_all: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    /// Accepts nothing yet.
    fn new(provider: &CryptoProvider) -> Self {
        Self {
            authorities: None,
            exact: Arc::new([]),
            accepts_all: false,
            algorithms: provider.signature_verification_algorithms,
        }
    }

    fn accept(&mut self, accepted: &TargetTls, provider: &Arc<CryptoProvider>) {
        match accepted {
            TargetTls::System => {}
            TargetTls::Authorities(certificates) => self.exact = certificates.clone(),
            TargetTls::Insecure => self.accepts_all = true,
        }
        let mut roots = RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        if !system.errors.is_empty() {
            warn!(errors = ?system.errors, "some certificates of this system cannot be read");
        }
        roots.add_parsable_certificates(system.certs);
        roots.add_parsable_certificates(self.exact.iter().cloned());
        // A system without certificates trusts none.
        self.authorities =
            WebPkiServerVerifier::builder_with_provider(roots.into(), provider.clone())
                .build()
                .ok();
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.accepts_all || self.exact.iter().any(|exact| exact == end_entity) {
            return Ok(ServerCertVerified::assertion());
        }
        let Some(authorities) = &self.authorities else {
            return Err(CertificateError::UnknownIssuer.into());
        };
        authorities.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// What is wrong with a handshake, in words for the user.
pub(crate) fn explain(error: &Error, target: &Target) -> String {
    let host = target.authority.host();
    let Error::InvalidCertificate(fault) = error else {
        return match error {
            Error::InvalidMessage(_) => {
                "it does not speak TLS; write http:// instead of https://".to_owned()
            }
            other => format!("TLS failed: {other}"),
        };
    };
    let fault = match fault {
        CertificateError::UnknownIssuer => {
            "is self-signed, or signed by an authority that this machine does not trust".to_owned()
        }
        // How webpki refuses a certificate that may sign others, such as those that `openssl req -x509` makes.
        CertificateError::Other(other) if other.to_string().contains("CaUsedAsEndEntity") => {
            "is self-signed".to_owned()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "has expired".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "is not valid yet".to_owned()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            format!("is not for the name {host}")
        }
        other => format!("is not valid: {other}"),
    };
    let remedy = if tunnel_protocol::url::is_loopback(host) {
        "pass --target-insecure or --target-ca FILE"
    } else {
        "pass --target-ca FILE to accept it"
    };
    format!("its certificate {fault}; {remedy}")
}
