//! A certificate and its key from files, read again when they change.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::tls::{TlsError, provider};

/// How often the files are looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// The two files and what they said last that was good. Every name gets this certificate.
#[derive(Debug)]
pub(super) struct CertificateFiles {
    certificate: PathBuf,
    key: PathBuf,
    /// What was read last; `None` if that failed.
    read: Mutex<Option<Contents>>,
    current: Mutex<Arc<CertifiedKey>>,
}

impl CertificateFiles {
    /// Reads the files.
    ///
    /// # Errors
    /// If that fails, or they do not belong together.
    pub(super) fn open(certificate: PathBuf, key: PathBuf) -> Result<Self, TlsError> {
        let contents = Contents::read(&certificate, &key)?;
        let current = contents.certified_key(&certificate, &key)?;
        Ok(Self {
            certificate,
            key,
            read: Mutex::new(Some(contents)),
            current: Mutex::new(Arc::new(current)),
        })
    }

    /// Goes on reading the files until stopped.
    pub(super) async fn watch(self: Arc<Self>, stopping: CancellationToken) {
        let mut due = interval(CHECK_INTERVAL);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stopping.run_until_cancelled(due.tick()).await.is_some() {
            let files = self.clone();
            // A panic has been reported where it happened.
            let _ = tokio::task::spawn_blocking(move || files.check()).await;
        }
    }

    /// Takes over what the files say, if it is new and good. What is not is complained about once.
    fn check(&self) {
        let contents = Contents::read(&self.certificate, &self.key);
        let mut read = lock(&self.read);
        if contents.as_ref().ok() == read.as_ref() {
            return;
        }
        let pair = contents.and_then(|contents| {
            let contents = read.insert(contents);
            contents.certified_key(&self.certificate, &self.key)
        });
        match pair {
            Ok(pair) => {
                *lock(&self.current) = Arc::new(pair);
                info!(certificate = %self.certificate.display(), "the certificate was read again");
            }
            Err(error) => {
                if matches!(error, TlsError::Read { .. }) {
                    *read = None;
                }
                warn!(%error, "the earlier certificate stays in use");
            }
        }
    }
}

impl ResolvesServerCert for CertificateFiles {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(lock(&self.current).clone())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the files contain.
#[derive(Eq, PartialEq)]
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Contents")
    }
}

impl Contents {
    fn read(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let read = |path: &Path| {
            fs::read(path).map_err(|source| TlsError::Read {
                path: path.to_owned(),
                source,
            })
        };
        Ok(Self {
            certificate: read(certificate)?,
            key: read(key)?,
        })
    }

    fn certified_key(&self, certificate: &Path, key: &Path) -> Result<CertifiedKey, TlsError> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.certificate).collect();
        let chain = chain.ok().filter(|chain| !chain.is_empty());
        let chain = chain.ok_or_else(|| TlsError::NoCertificate(certificate.to_owned()))?;
        let private = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|_| TlsError::NoKey(key.to_owned()))?;
        CertifiedKey::from_der(chain, private, &provider()).map_err(|source| TlsError::Pair {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertifiedKey, generate_simple_self_signed};

    use super::*;

    /// Writes a pair for a name, and returns the certificate.
    fn write(name: &str, certificate: &Path, key: &Path) -> CertificateDer<'static> {
        let pair = generate_simple_self_signed([name.to_owned()]).expect("a certificate");
        let CertifiedKey { cert, signing_key } = pair;
        fs::write(certificate, cert.pem()).expect("written");
        fs::write(key, signing_key.serialize_pem()).expect("written");
        cert.der().clone()
    }

    #[test]
    fn each_fault_is_complained_about_once() {
        let directory = tempfile::tempdir().expect("a directory");
        let (certificate, key) = (directory.path().join("c"), directory.path().join("k"));
        write("first.example", &certificate, &key);
        let files = CertificateFiles::open(certificate, key.clone()).expect("a pair");
        let log = directory.path().join("log");
        let writer = Arc::new(fs::File::create(&log).expect("a file"));
        let subscriber = tracing_subscriber::fmt().with_writer(writer).finish();
        tracing::subscriber::with_default(subscriber, || {
            for fault in [Some("nothing"), None, Some("nothing again")] {
                match fault {
                    Some(text) => fs::write(&key, text).expect("written"),
                    None => fs::remove_file(&key).expect("removed"),
                }
                for _ in 0..3 {
                    files.check();
                }
            }
        });
        let log = fs::read_to_string(log).expect("text");
        assert_eq!(log.matches("stays in use").count(), 3, "{log}");
    }

    #[test]
    fn a_broken_pair_does_not_replace_a_good_one() {
        let directory = tempfile::tempdir().expect("a directory");
        let (certificate, key) = (directory.path().join("c"), directory.path().join("k"));
        let write = |name: &str| write(name, &certificate, &key);
        let first = write("first.example");
        let files = CertificateFiles::open(certificate.clone(), key.clone()).expect("a pair");
        let served = || {
            files.check();
            lock(&files.current).cert[0].clone()
        };
        let other = fs::read(&key).expect("read");
        let second = write("second.example");
        let second_key = fs::read(&key).expect("read");
        fs::write(&key, other).expect("written");
        assert_eq!(served(), first, "another's key");
        fs::write(&key, "nothing").expect("written");
        assert_eq!(served(), first, "no key");
        fs::remove_file(&key).expect("removed");
        assert_eq!(served(), first, "no file");
        fs::write(&key, second_key).expect("written");
        assert_eq!(served(), second);
    }
}
