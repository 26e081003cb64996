//! Certificates from an authority that speaks ACME: for which names, when, and how many.

use std::{
    collections::{HashMap, VecDeque},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use http::Uri;
use rustls::{ServerConfig, server::ClientHello};
use tokio::{
    sync::{Notify, Semaphore, watch},
    time::Instant,
};
use tracing::{debug, error, info, warn};
use tunnel_protocol::id::TunnelId;
use tunnel_service::{
    auth::owner::Owner,
    now,
    routing::{PublicUrl, Routing, host_name},
    tables::tunnels::TunnelsTable,
};

use crate::{
    subsystem::Subsystem,
    tls::{
        Names, TlsError, config,
        issue::{AccountCell, Issuer, Validations},
        store::Certificates,
    },
};

/// What ALPN calls a validation (RFC 8737, 6.2).
const VALIDATION: &[u8] = b"acme-tls/1";
/// Most certificates that the tunnels of one owner get in an hour. Authorities count: Let's Encrypt issues 50 in a week for a domain.
const MAX_FIRST_CERTIFICATES_OF_OWNER: usize = 5;
/// Most that all owners together get in an hour.
const MAX_FIRST_CERTIFICATES: usize = 20;
const HOUR: Duration = Duration::from_secs(3600);
/// Most certificates that are being obtained at once.
const ISSUED_AT_ONCE: usize = 4;
/// How long the first pause after a failure is, and the longest; each is three times as long as the one before it. Let's Encrypt
/// takes five failures an hour for a name.
const MIN_RETRY_DELAY: Duration = Duration::from_secs(60);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(6 * 3600);
/// How often it is looked for what is due, at least and at most.
const MAX_SLEEP: Duration = Duration::from_secs(60);
const MIN_SLEEP: Duration = Duration::from_secs(1);

/// How certificates are obtained.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AcmeOptions {
    /// Whom the authority writes to: an address, with or without `mailto:`.
    pub contact: String,
    /// Where the authority's directory is.
    pub directory_url: String,
    /// The certificate of a private authority, in PEM, by which its directory is known; without one, those that the system trusts.
    pub authority: Option<PathBuf>,
    /// The command that publishes DNS records. With it, one certificate is for all names.
    pub dns_hook: Option<PathBuf>,
    /// Where account and certificates are kept.
    pub data: PathBuf,
}

/// Whether a handshake is that of an authority that validates a name.
pub(super) fn is_validation(hello: &ClientHello<'_>) -> bool {
    hello
        .alpn()
        .is_some_and(|mut protocols| protocols.any(|name| name == VALIDATION))
}

/// What a certificate is for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Subject {
    /// The public URL's host, and what is below it if the name starts with `*.`.
    Service(String),
    /// A tunnel's own host.
    Tunnel(String, TunnelId),
}

impl Subject {
    /// The certificate's name.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Service(name) | Self::Tunnel(name, _) => name,
        }
    }

    /// The names in the certificate.
    fn names(&self) -> Vec<String> {
        let name = self.name();
        match name.strip_prefix("*.") {
            Some(base) => vec![base.to_owned(), name.to_owned()],
            None => vec![name.to_owned()],
        }
    }
}

/// Which certificate a name has.
#[derive(Clone, Debug)]
pub(super) struct Naming {
    base: String,
    service: String,
    routing: Routing,
}

impl Naming {
    /// One certificate for `public_url`, and if tunnels have subdomains, one for each or, with `is_wildcard`, the same.
    pub(super) fn new(public_url: &PublicUrl, routing: Routing, is_wildcard: bool) -> Self {
        let base = host_name(public_url.authority());
        let service = match routing {
            Routing::Subdomain if is_wildcard => format!("*.{base}"),
            Routing::Path | Routing::Subdomain => base.clone(),
        };
        Self {
            base,
            service,
            routing,
        }
    }

    /// The certificate for a handshake with this name; `None` if there can be none.
    pub(super) fn subject(&self, name: Option<&str>) -> Option<Subject> {
        let service = || Some(Subject::Service(self.service.clone()));
        let Some(name) = name.map(host_name).filter(|name| *name != self.base) else {
            return service();
        };
        let label = name.strip_suffix(&self.base)?.strip_suffix('.')?;
        let id: TunnelId = label.parse().ok()?;
        match self.routing {
            Routing::Path => None,
            Routing::Subdomain if self.service != self.base => service(),
            Routing::Subdomain => Some(Subject::Tunnel(name, id)),
        }
    }

    /// Whether a certificate of this name is one of ours.
    pub(super) fn is_subject(&self, name: &str) -> bool {
        name == self.service
            || self
                .subject(Some(name))
                .is_some_and(|subject| subject.name() == name)
    }
}

/// How far obtaining a certificate has come.
#[derive(Debug)]
enum Attempt {
    /// It is going on; the channel closes at its end.
    Running(watch::Receiver<()>),
    /// It has failed this often in a row, and is tried again then.
    Failed(u32, Instant),
}

/// The certificates of a server.
#[derive(Debug)]
pub(crate) struct Acme {
    naming: Naming,
    tunnels: TunnelsTable,
    certificates: Arc<Certificates>,
    issuer: Issuer,
    validation: Arc<ServerConfig>,
    attempts: Mutex<HashMap<String, Attempt>>,
    allowance: Mutex<Allowance>,
    places: Semaphore,
    changed: Notify,
    subsystem: Subsystem,
}

impl Acme {
    /// Takes the certificates of earlier servers.
    ///
    /// # Errors
    /// If the directory cannot be used.
    pub(super) fn open(
        options: AcmeOptions,
        names: Names,
        subsystem: Subsystem,
    ) -> Result<Self, TlsError> {
        let is_wildcard = options.dns_hook.is_some();
        let naming = Naming::new(&names.public_url, names.routing, is_wildcard);
        let directory = options
            .data
            .join("acme")
            .join(folder(&options.directory_url));
        let account_file = directory.join("account.json");
        let certificates = Arc::new(Certificates::open(directory, naming.clone())?);
        if !certificates.contains(&naming.service) {
            warn!(
                name = naming.service,
                authority = options.directory_url,
                "there is no certificate yet: connections are refused until the authority has issued it"
            );
        }
        let validations = Arc::new(Validations::default());
        Ok(Self {
            naming,
            tunnels: names.tunnels,
            certificates,
            validation: Arc::new(config(validations.clone(), &[VALIDATION])),
            issuer: Issuer {
                contact: contact(&options.contact),
                directory_url: options.directory_url,
                authority: options.authority,
                dns_hook: options.dns_hook,
                account_file,
                validations,
                account: AccountCell::default(),
            },
            attempts: Mutex::default(),
            allowance: Mutex::default(),
            places: Semaphore::new(ISSUED_AT_ONCE),
            changed: Notify::new(),
            subsystem,
        })
    }

    /// What handshakes are answered with.
    pub(super) fn certificates(&self) -> Arc<Certificates> {
        self.certificates.clone()
    }

    /// How an authority that validates a name is answered.
    pub(super) fn validation(&self) -> Arc<ServerConfig> {
        self.validation.clone()
    }

    /// Returns once there is a certificate for a handshake with this name, or there will be none soon.
    pub(super) async fn ensure(self: &Arc<Self>, name: Option<&str>) {
        let Some(subject) = self.naming.subject(name) else {
            return debug!(name, "no certificate for a name that is not this service's");
        };
        if self.certificates.contains(subject.name()) {
            return;
        }
        let running = match self.running(&subject) {
            Some(running) => running,
            None if self.is_delayed(&subject) || !self.may_issue(&subject).await => return,
            None => self.begin(subject),
        };
        // An error is the end of the attempt, too.
        let _ = running.clone().changed().await;
    }

    /// Goes on obtaining and renewing what is due, until stopped.
    pub(super) async fn renew(self: Arc<Self>) {
        let stopping = self.subsystem.stopping().clone();
        let work = async {
            loop {
                let next = self.begin_due().await;
                let sleep = next.clamp(MIN_SLEEP, MAX_SLEEP);
                let _ = tokio::time::timeout(sleep, self.changed.notified()).await;
            }
        };
        let never = stopping.run_until_cancelled(work).await;
        debug_assert!(never.is_none());
    }

    /// Begins what is due now, and tells how long it is until something is.
    async fn begin_due(self: &Arc<Self>) -> Duration {
        let now = SystemTime::now();
        let mut due = self.certificates.due();
        if !self.certificates.contains(&self.naming.service) {
            due.push((self.naming.service.clone(), now));
        }
        let mut next = MAX_SLEEP;
        for (name, at) in due {
            if let Ok(left) = at.duration_since(now)
                && !left.is_zero()
            {
                next = next.min(left);
                continue;
            }
            let subject = match name.strip_prefix("*.") {
                Some(_) => Some(Subject::Service(name.clone())),
                None => self.naming.subject(Some(&name)),
            };
            let Some(subject) = subject else {
                continue;
            };
            if self.running(&subject).is_some() || self.is_delayed(&subject) {
                continue;
            }
            if self.is_wanted(&subject).await {
                self.begin(subject);
            }
        }
        next
    }

    /// Whether a certificate still has a use. That of a tunnel that is no more is removed.
    async fn is_wanted(&self, subject: &Subject) -> bool {
        let Subject::Tunnel(name, id) = subject else {
            return true;
        };
        match self.tunnels.get(id, now()).await {
            Ok(Some(_)) => true,
            Ok(None) => {
                self.certificates.remove(name);
                false
            }
            Err(error) => {
                error!(
                    error = &error as &dyn std::error::Error,
                    "a tunnel could not be looked up"
                );
                false
            }
        }
    }

    /// Whether a first certificate may be obtained: only for tunnels that exist, and not too many.
    async fn may_issue(&self, subject: &Subject) -> bool {
        let Subject::Tunnel(name, id) = subject else {
            return true;
        };
        let owner = match self.tunnels.get(id, now()).await {
            Ok(Some(tunnel)) => tunnel.identity.owner,
            Ok(None) => {
                debug!(name, "no certificate for a tunnel that nobody has");
                return false;
            }
            Err(error) => {
                error!(
                    error = &error as &dyn std::error::Error,
                    "a tunnel could not be looked up"
                );
                return false;
            }
        };
        let mut allowance = lock(&self.allowance);
        let is_allowed = allowance.take(owner, Instant::now());
        if !is_allowed {
            warn!(
                name,
                "no certificate: its owner, or all owners, have had as many as they get in an hour"
            );
        }
        is_allowed
    }

    fn running(&self, subject: &Subject) -> Option<watch::Receiver<()>> {
        match lock(&self.attempts).get(subject.name()) {
            Some(Attempt::Running(end)) if is_open(end) => Some(end.clone()),
            Some(Attempt::Running(_) | Attempt::Failed(..)) | None => None,
        }
    }

    fn is_delayed(&self, subject: &Subject) -> bool {
        match lock(&self.attempts).get(subject.name()) {
            Some(Attempt::Failed(_, retry_at)) => Instant::now() < *retry_at,
            Some(Attempt::Running(_)) | None => false,
        }
    }

    /// Begins an attempt, unless one is going on, and returns what shows its end.
    fn begin(self: &Arc<Self>, subject: Subject) -> watch::Receiver<()> {
        let mut attempts = lock(&self.attempts);
        let failures = match attempts.get(subject.name()) {
            Some(Attempt::Running(end)) if is_open(end) => return end.clone(),
            Some(Attempt::Failed(failures, _)) => *failures,
            Some(Attempt::Running(_)) | None => 0,
        };
        let (running, end) = watch::channel(());
        attempts.insert(subject.name().to_owned(), Attempt::Running(end.clone()));
        drop(attempts);
        let acme = self.clone();
        self.subsystem.spawn(async move {
            let stopping = acme.subsystem.stopping().clone();
            let attempt = acme.attempt(&subject, failures);
            stopping.run_until_cancelled(attempt).await;
            drop(running);
            acme.changed.notify_one();
        });
        end
    }

    async fn attempt(&self, subject: &Subject, failures: u32) {
        let _place = self.places.acquire().await;
        let outcome = match self.issuer.issue(&subject.names()).await {
            Ok(pem) => self
                .certificates
                .insert(subject.name(), &pem)
                .map_err(Into::into),
            Err(error) => Err(error),
        };
        let name = subject.name();
        let mut attempts = lock(&self.attempts);
        match outcome {
            Ok(()) => {
                attempts.remove(name);
                info!(name, "the authority has issued a certificate");
            }
            Err(error) => {
                let delay = retry_delay(failures);
                let retry = Attempt::Failed(failures.saturating_add(1), Instant::now() + delay);
                attempts.insert(name.to_owned(), retry);
                let kept = self.certificates.contains(name);
                let state = if kept {
                    "the earlier one stays in use"
                } else {
                    "connections are refused"
                };
                warn!(name, reason = %error, retry_in_s = delay.as_secs(), "no certificate from the authority: {state}");
            }
        }
    }
}

/// How many first certificates were obtained in the last hour, and whose.
#[derive(Debug, Default)]
struct Allowance(VecDeque<(Instant, Owner)>);

impl Allowance {
    /// Counts one more, if there may be one more.
    fn take(&mut self, owner: Owner, now: Instant) -> bool {
        let is_old = |(at, _): &(Instant, Owner)| now.duration_since(*at) >= HOUR;
        while self.0.front().is_some_and(is_old) {
            self.0.pop_front();
        }
        let of_owner = self.0.iter().filter(|(_, other)| *other == owner).count();
        if self.0.len() >= MAX_FIRST_CERTIFICATES || of_owner >= MAX_FIRST_CERTIFICATES_OF_OWNER {
            return false;
        }
        self.0.push_back((now, owner));
        true
    }
}

/// Whether an attempt goes on.
fn is_open(end: &watch::Receiver<()>) -> bool {
    end.has_changed().is_ok()
}

fn retry_delay(failures: u32) -> Duration {
    let factor = 3u32.saturating_pow(failures.min(20));
    MIN_RETRY_DELAY.saturating_mul(factor).min(MAX_RETRY_DELAY)
}

/// The address as ACME has it.
fn contact(text: &str) -> String {
    if text.starts_with("mailto:") {
        text.to_owned()
    } else {
        format!("mailto:{text}")
    }
}

/// The name of the folder for an authority: what is tried with one is not another's.
fn folder(directory_url: &str) -> String {
    let uri: Option<Uri> = directory_url.parse().ok();
    let authority = uri.as_ref().and_then(Uri::authority);
    let name = authority.map_or(directory_url, http::uri::Authority::as_str);
    name.chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '.' || c == '-' {
                c
            } else {
                '_'
            }
        })
        .collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_service_have_certificates() {
        let url: PublicUrl = "https://t.example.com:8443".parse().expect("a URL");
        for (routing, is_wildcard, name, expected) in [
            (Routing::Path, false, "T.example.com", Some("t.example.com")),
            (Routing::Path, false, "my-app.t.example.com", None),
            (
                Routing::Subdomain,
                false,
                "t.example.com",
                Some("t.example.com"),
            ),
            (
                Routing::Subdomain,
                false,
                "My-App.t.example.com",
                Some("my-app.t.example.com"),
            ),
            (Routing::Subdomain, false, "a.b.t.example.com", None),
            (Routing::Subdomain, false, "evilt.example.com", None),
            (Routing::Subdomain, false, "evil.example", None),
            (
                Routing::Subdomain,
                true,
                "my-app.t.example.com",
                Some("*.t.example.com"),
            ),
            (
                Routing::Subdomain,
                true,
                "t.example.com",
                Some("*.t.example.com"),
            ),
            (Routing::Path, true, "t.example.com", Some("t.example.com")),
        ] {
            let naming = Naming::new(&url, routing, is_wildcard);
            let subject = naming.subject(Some(name));
            assert_eq!(
                subject.as_ref().map(Subject::name),
                expected,
                "{routing:?} {name}"
            );
            if let Some(subject) = expected {
                assert!(naming.is_subject(subject), "{subject}");
            }
        }
    }

    #[test]
    fn one_owner_cannot_use_up_the_certificates_of_all() {
        let owner = |name: &str| format!("token:{name}").parse().expect("an owner");
        let (mut allowance, begin) = (Allowance::default(), Instant::now());
        let mut taken = |name: &str, now| allowance.take(owner(name), now);
        for _ in 0..MAX_FIRST_CERTIFICATES_OF_OWNER {
            assert!(taken("greedy", begin));
        }
        assert!(!taken("greedy", begin));
        assert!(taken("other", begin));
        assert!(taken("greedy", begin + HOUR));
    }

    #[test]
    fn pauses_between_failures_grow_to_six_hours() {
        let minutes =
            [0, 1, 2, 3, 4, 5, 6, 100].map(|failures| retry_delay(failures).as_secs() / 60);
        assert_eq!(minutes, [1, 3, 9, 27, 81, 243, 360, 360]);
    }
}
