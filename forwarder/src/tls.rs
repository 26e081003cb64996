//! Which certificates are accepted, of a local service and of the service that agents connect to.

use std::sync::Arc;

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature,
        verify_tls13_signature,
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tracing::warn;

use crate::settings::AcceptedCertificates;

/// The configuration for connections that have TLS if `is_used`: only then certificates of the system are read.
pub(crate) fn client_config(is_used: bool, accepted: &AcceptedCertificates) -> ClientConfig {
    let provider = Arc::new(ring::default_provider());
    let mut verifier = Verifier::new(&provider);
    if is_used {
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
    system: Option<rustls_platform_verifier::Verifier>,
    exact: Arc<[CertificateDer<'static>]>,
    accepts_all: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    /// Accepts nothing yet.
    fn new(provider: &CryptoProvider) -> Self {
        Self {
            system: None,
            exact: Arc::new([]),
            accepts_all: false,
            algorithms: provider.signature_verification_algorithms,
        }
    }

    fn accept(&mut self, accepted: &AcceptedCertificates, provider: &Arc<CryptoProvider>) {
        match accepted {
            AcceptedCertificates::System => {}
            AcceptedCertificates::Authorities(certificates) => self.exact = certificates.clone(),
            AcceptedCertificates::Insecure => self.accepts_all = true,
        }
        let system = rustls_platform_verifier::Verifier::new_with_extra_roots(
            self.exact.iter().cloned(),
            provider.clone(),
        );
        // A system without certificates trusts none.
        self.system = system
            .inspect_err(|error| {
                warn!(
                    error = error as &dyn std::error::Error,
                    "the certificates of this system cannot be read"
                );
            })
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
        let Some(system) = &self.system else {
            return Err(CertificateError::UnknownIssuer.into());
        };
        system.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
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

/// What is wrong with a handshake with `host`, in words for the user. `remedy` is what makes another certificate acceptable.
pub(crate) fn explain(error: &Error, host: &str, remedy: &str) -> String {
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
    format!("its certificate {fault}; {remedy}")
}
