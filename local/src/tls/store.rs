//! Certificates of an authority: those in use, and their files.

use std::{
    collections::HashMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tracing::warn;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use crate::tls::{TlsError, acme::Naming, provider};

/// What a certificate's file is called behind its name.
const EXTENSION: &str = "pem";
/// What a file has in place of `*.`.
const WILDCARD: &str = "_.";

/// A certificate from an authority.
#[derive(Clone, Debug)]
pub(super) struct Issued {
    key: Arc<CertifiedKey>,
    /// When two thirds of its life are over.
    pub(super) renew_at: SystemTime,
}

/// The certificates that serve, by name.
#[derive(Debug)]
pub(super) struct Certificates {
    directory: PathBuf,
    naming: Naming,
    issued: Mutex<HashMap<String, Issued>>,
}

impl Certificates {
    /// Reads what is in a directory. What cannot be used is left out.
    ///
    /// # Errors
    /// If the directory cannot be made or read.
    pub(super) fn open(directory: PathBuf, naming: Naming) -> Result<Self, TlsError> {
        create_directory(&directory)?;
        let files = fs::read_dir(&directory).map_err(|source| TlsError::Read {
            path: directory.clone(),
            source,
        })?;
        let mut issued = HashMap::new();
        for path in files.filter_map(|file| Some(file.ok()?.path())) {
            let Some(name) = name_of(&path).filter(|name| naming.is_subject(name)) else {
                continue;
            };
            match Issued::read(&path) {
                Ok(certificate) => drop(issued.insert(name, certificate)),
                Err(error) => warn!(%error, "a stored certificate is not used"),
            }
        }
        Ok(Self {
            directory,
            naming,
            issued: Mutex::new(issued),
        })
    }

    /// Whether there is a certificate for a subject.
    pub(super) fn contains(&self, subject: &str) -> bool {
        let issued = self.issued();
        issued.contains_key(subject)
    }

    /// All subjects, and when each is to be renewed.
    pub(super) fn due(&self) -> Vec<(String, SystemTime)> {
        let issued = self.issued();
        issued
            .iter()
            .map(|(subject, issued)| (subject.clone(), issued.renew_at))
            .collect()
    }

    /// Stores a certificate, its key first, and uses it from now on.
    ///
    /// # Errors
    /// If it cannot be stored or is none.
    pub(super) fn insert(&self, subject: &str, pem: &str) -> Result<(), TlsError> {
        let path = self.path(subject);
        let issued = Issued::parse(&path, pem.as_bytes())?;
        write_secret(&path, pem.as_bytes())?;
        let mut all = self.issued();
        all.insert(subject.to_owned(), issued);
        Ok(())
    }

    /// Forgets a certificate.
    pub(super) fn remove(&self, subject: &str) {
        let mut all = self.issued();
        if all.remove(subject).is_some() {
            // One that stays is removed when it would be renewed after the next start.
            let _ = fs::remove_file(self.path(subject));
        }
    }

    fn issued(&self) -> MutexGuard<'_, HashMap<String, Issued>> {
        self.issued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, subject: &str) -> PathBuf {
        let file = match subject.strip_prefix("*.") {
            Some(base) => format!("{WILDCARD}{base}.{EXTENSION}"),
            None => format!("{subject}.{EXTENSION}"),
        };
        self.directory.join(file)
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let subject = self.naming.subject(hello.server_name())?;
        let issued = self.issued();
        issued.get(subject.name()).map(|issued| issued.key.clone())
    }
}

impl Issued {
    fn read(path: &Path) -> Result<Self, TlsError> {
        let pem = fs::read(path).map_err(|source| TlsError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &pem)
    }

    fn parse(path: &Path, pem: &[u8]) -> Result<Self, TlsError> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        let chain = chain.ok().filter(|chain| !chain.is_empty());
        let chain = chain.ok_or_else(|| TlsError::NoCertificate(path.to_owned()))?;
        let private =
            PrivateKeyDer::from_pem_slice(pem).map_err(|_| TlsError::NoKey(path.to_owned()))?;
        let renew_at = renewal_time(&chain[0]);
        let renew_at = renew_at.ok_or_else(|| TlsError::Malformed(path.to_owned()))?;
        let key = CertifiedKey::from_der(chain, private, &provider());
        let key = key.map_err(|source| TlsError::Pair {
            certificate: path.to_owned(),
            key: path.to_owned(),
            source,
        })?;
        Ok(Self {
            key: Arc::new(key),
            renew_at,
        })
    }
}

/// When two thirds of a certificate's life are over.
fn renewal_time(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let validity = parsed.validity();
    let begin = u64::try_from(validity.not_before.timestamp()).ok()?;
    let end = u64::try_from(validity.not_after.timestamp()).ok()?;
    let life = Duration::from_secs(end.checked_sub(begin)?);
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(begin) + life * 2 / 3)
}

fn name_of(path: &Path) -> Option<String> {
    let is_certificate = path.extension()? == EXTENSION;
    let stem = path.file_stem()?.to_str().filter(|_| is_certificate)?;
    Some(match stem.strip_prefix(WILDCARD) {
        Some(base) => format!("*.{base}"),
        None => stem.to_owned(),
    })
}

/// Makes a directory that only this user can look into.
fn create_directory(path: &Path) -> Result<(), TlsError> {
    let mut directory = fs::DirBuilder::new();
    directory.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut directory, 0o700);
    directory.create(path).map_err(|source| TlsError::Write {
        path: path.to_owned(),
        source,
    })
}

/// Writes a file that only this user can read, all of it or nothing.
pub(super) fn write_secret(path: &Path, contents: &[u8]) -> Result<(), TlsError> {
    let next = path.with_extension("next");
    let write = || -> io::Result<()> {
        // One that was left behind may be another user's.
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(&next)?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&next, path)
    };
    write().map_err(|source| TlsError::Write {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};
    use tunnel_service::routing::Routing;

    use super::*;

    /// A key and a certificate that is valid in these years.
    fn pem(name: &str, years: [i32; 2]) -> String {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new([name.to_owned()]).expect("a name");
        params.not_before = date_time_ymd(years[0], 1, 1);
        params.not_after = date_time_ymd(years[1], 1, 1);
        let certificate = params.self_signed(&key).expect("a certificate");
        format!("{}{}", key.serialize_pem(), certificate.pem())
    }

    fn naming() -> Naming {
        let url = "https://t.example.com".parse().expect("a URL");
        Naming::new(&url, Routing::Subdomain, false)
    }

    #[test]
    fn certificates_are_found_again_by_name_and_only_this_user_can_read_them() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("authority");
        let certificates = Certificates::open(path.clone(), naming()).expect("opened");
        let name = "my-app.t.example.com";
        certificates
            .insert(name, &pem(name, [2000, 2003]))
            .expect("stored");
        fs::write(path.join("t.example.com.pem"), "broken").expect("written");
        fs::write(path.join("other.example.pem"), "another's").expect("written");
        let again = Certificates::open(path.clone(), naming()).expect("opened");
        let due = again.due();
        let [(found, renew_at)] = &due[..] else {
            panic!("{due:?}")
        };
        assert_eq!(found, name);
        let since_2000 = Duration::from_secs(946_684_800);
        let two_years = Duration::from_secs((366 + 365 + 365) * 2 / 3 * 86_400);
        let expected = SystemTime::UNIX_EPOCH + since_2000 + two_years;
        let difference = renew_at.duration_since(expected).unwrap_or_default();
        assert!(difference < Duration::from_secs(86_400), "{renew_at:?}");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            for path in [path.clone(), path.join(format!("{name}.pem"))] {
                let mode = fs::metadata(&path).expect("there").permissions().mode();
                assert_eq!(mode & 0o077, 0, "{}", path.display());
            }
        }
        again.remove(name);
        let after = Certificates::open(path, naming()).expect("opened");
        assert!(!after.contains(name));
    }
}
