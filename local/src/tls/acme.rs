//! Certificates from an authority that speaks ACME: for which names, when, and how many.

use std::{
    collections::{HashMap, VecDeque},
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use rustls::{ServerConfig, server::ClientHello};
use serde_json::json;
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
        store::{Certificates, write_secret},
    },
};

/// What ALPN calls a validation (RFC 8737, 6.2).
const VALIDATION: &[u8] = b"acme-tls/1";
/// Most certificates that the tunnels of one owner get in an hour. Authorities count: Let's Encrypt issues 50 in a week for a domain.
const MAX_FIRST_CERTIFICATES_OF_OWNER: usize = 5;
/// Most that all owners together get in an hour, and in a week.
const MAX_FIRST_CERTIFICATES: usize = 20;
const MAX_FIRST_CERTIFICATES_OF_WEEK: usize = 40;
const HOUR: Duration = Duration::from_secs(3600);
const WEEK: Duration = Duration::from_secs(7 * 24 * 3600);
/// The file that says when the first certificates of the last week were asked for, in seconds since 1970.
const ALLOWANCE_FILE: &str = "first_certificates.json";
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
        let base = host_name(public_url.authority()).into_owned();
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
            Routing::Subdomain => Some(Subject::Tunnel(name.into_owned(), id)),
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
        let allowance = Allowance::open(directory.join(ALLOWANCE_FILE));
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
            allowance: Mutex::new(allowance),
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
        if self.is_delayed(&subject) {
            return;
        }
        let owner = match &subject {
            Subject::Service(_) => None,
            Subject::Tunnel(name, id) => match self.owner(name, id).await {
                Some(owner) => Some(owner),
                None => return,
            },
        };
        if let Some(mut running) = self.begin(subject, owner) {
            // An error is the end of the attempt, too.
            let _ = running.changed().await;
        }
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
                self.begin(subject, None);
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

    /// Whose a tunnel is; only one that exists gets a certificate.
    async fn owner(&self, name: &str, id: &TunnelId) -> Option<Owner> {
        match self.tunnels.get(id, now()).await {
            Ok(Some(tunnel)) => Some(tunnel.identity.owner),
            Ok(None) => {
                debug!(name, "no certificate for a tunnel that nobody has");
                None
            }
            Err(error) => {
                error!(
                    error = &error as &dyn std::error::Error,
                    "a tunnel could not be looked up"
                );
                None
            }
        }
    }

    /// Whether one more first certificate may be obtained for an owner.
    fn may_issue(&self, name: &str, owner: Owner) -> bool {
        let now = Instant::now();
        let mut allowance = lock(&self.allowance);
        let is_allowed = allowance.take(owner, now, tunnel_service::now());
        if !is_allowed && allowance.is_news(now) {
            warn!(
                name,
                "no certificate: its owner, or all owners, have had as many as they get in an hour or a week"
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

    /// Begins an attempt, unless one is going on, and returns what shows its end. A tunnel's first certificate counts among those of
    /// its `owner`. `None` if it is not the time for one.
    fn begin(
        self: &Arc<Self>,
        subject: Subject,
        owner: Option<Owner>,
    ) -> Option<watch::Receiver<()>> {
        let mut attempts = lock(&self.attempts);
        let failures = match attempts.get(subject.name()) {
            Some(Attempt::Running(end)) if is_open(end) => return Some(end.clone()),
            Some(Attempt::Failed(_, retry_at)) if Instant::now() < *retry_at => return None,
            Some(Attempt::Failed(failures, _)) => *failures,
            Some(Attempt::Running(_)) | None => 0,
        };
        if let Some(owner) = owner {
            // Another handshake may have obtained it while this one looked up the owner.
            let is_there = self.certificates.contains(subject.name());
            if is_there || !self.may_issue(subject.name(), owner) {
                return None;
            }
        }
        let (running, end) = watch::channel(());
        attempts.insert(subject.name().to_owned(), Attempt::Running(end.clone()));
        drop(attempts);
        let acme = self.clone();
        self.subsystem.spawn(async move {
            acme.attempt(&subject, failures).await;
            drop(running);
            acme.changed.notify_one();
        });
        Some(end)
    }

    async fn attempt(&self, subject: &Subject, failures: u32) {
        let stopping = self.subsystem.stopping();
        let place = stopping.run_until_cancelled(self.places.acquire()).await;
        if place.is_none() {
            return;
        }
        let outcome = match self.issuer.issue(&subject.names(), stopping).await {
            Ok(None) => return,
            Ok(Some(pem)) => self
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

/// How many first certificates were asked for in the last hour, and for whom, and how many in the last week.
#[derive(Debug, Default)]
struct Allowance {
    taken: VecDeque<(Instant, Owner)>,
    /// When, in seconds since 1970.
    week: Vec<u64>,
    /// Where `week` outlives the server.
    file: PathBuf,
    /// When the log was told last that it is used up.
    told_at: Option<Instant>,
}

impl Allowance {
    /// Goes on counting where an earlier server has stopped.
    fn open(file: PathBuf) -> Self {
        let week = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        };
        let week = week.unwrap_or_else(|error| {
            warn!(file = %file.display(), %error, "the certificates of the last week are not known: none is counted");
            Vec::new()
        });
        Self {
            week,
            file,
            ..Self::default()
        }
    }

    /// Counts one more, if there may be one more. `date` is the time since 1970.
    fn take(&mut self, owner: Owner, now: Instant, date: Duration) -> bool {
        let is_old = |(at, _): &(Instant, Owner)| now.duration_since(*at) >= HOUR;
        while self.taken.front().is_some_and(is_old) {
            self.taken.pop_front();
        }
        let of_owner = self.taken.iter().filter(|(_, other)| *other == owner);
        let date = date.as_secs();
        self.week
            .retain(|taken| date.saturating_sub(*taken) < WEEK.as_secs());
        if self.taken.len() >= MAX_FIRST_CERTIFICATES
            || of_owner.count() >= MAX_FIRST_CERTIFICATES_OF_OWNER
            || self.week.len() >= MAX_FIRST_CERTIFICATES_OF_WEEK
        {
            return false;
        }
        self.taken.push_back((now, owner));
        self.week.push(date);
        if let Err(error) = write_secret(&self.file, json!(self.week).to_string().as_bytes()) {
            warn!(%error, "a restart will forget how many certificates there were this week");
        }
        true
    }

    /// Whether the log has not been told for an hour that it is used up: strangers can ask as often as they like.
    fn is_news(&mut self, now: Instant) -> bool {
        let is_news = self
            .told_at
            .is_none_or(|told_at| now.duration_since(told_at) >= HOUR);
        if is_news {
            self.told_at = Some(now);
        }
        is_news
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

/// The name of the folder for an authority's directory: what is tried with one is not another's.
fn folder(directory_url: &str) -> String {
    let name = directory_url
        .strip_prefix("https://")
        .unwrap_or(directory_url);
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
        let data = tempfile::tempdir().expect("a directory");
        let mut allowance = Allowance::open(data.path().join(ALLOWANCE_FILE));
        let begin = Instant::now();
        let mut taken = |name: &str, now| allowance.take(owner(name), now, now - begin);
        for _ in 0..MAX_FIRST_CERTIFICATES_OF_OWNER {
            assert!(taken("greedy", begin));
        }
        assert!(!taken("greedy", begin));
        assert!(taken("other", begin));
        assert!(taken("greedy", begin + HOUR));
    }

    #[test]
    fn a_week_has_a_bound_that_a_restart_does_not_forget() {
        let data = tempfile::tempdir().expect("a directory");
        let file = data.path().join(ALLOWANCE_FILE);
        let (begin, date) = (Instant::now(), WEEK * 1000);
        let mut allowance = Allowance::open(file.clone());
        let take = |allowance: &mut Allowance, number: usize, after: Duration| {
            let owner = format!("token:{number}").parse().expect("an owner");
            allowance.take(owner, begin + after, date + after)
        };
        for number in 0..MAX_FIRST_CERTIFICATES_OF_WEEK {
            let hours = HOUR * u32::try_from(number).expect("few");
            assert!(take(&mut allowance, number, hours), "{number}");
        }
        let mut again = Allowance::open(file.clone());
        assert!(!take(&mut again, 100, WEEK - HOUR));
        assert!(take(&mut again, 100, WEEK));
        fs::write(&file, "broken").expect("written");
        assert!(take(&mut Allowance::open(file), 100, WEEK - HOUR));
    }

    #[test]
    fn the_log_is_told_once_an_hour_that_an_allowance_is_used_up() {
        let (mut allowance, begin) = (Allowance::default(), Instant::now());
        assert!(allowance.is_news(begin));
        assert!(!allowance.is_news(begin + HOUR / 2));
        assert!(allowance.is_news(begin + HOUR));
    }

    /// With an authority that nobody is.
    fn acme(data: PathBuf) -> Arc<Acme> {
        let options = AcmeOptions {
            contact: "a@example.com".to_owned(),
            directory_url: "https://localhost:9/dir".to_owned(),
            authority: None,
            dns_hook: None,
            data,
        };
        let sdk = tunnel_service::aws::sdk::for_loopback("http://127.0.0.1:9", "key");
        let names = Names {
            public_url: "https://t.example.com".parse().expect("a URL"),
            routing: Routing::Subdomain,
            tunnels: TunnelsTable::new(&sdk, String::new()),
        };
        Arc::new(Acme::open(options, names, Subsystem::default()).expect("opened"))
    }

    #[tokio::test]
    async fn handshakes_for_one_name_at_once_are_one_of_the_owners_certificates() {
        let data = tempfile::tempdir().expect("a directory");
        let acme = acme(data.path().to_owned());
        let begin = |label: &str| {
            let name = format!("{label}.t.example.com");
            let subject = acme.naming.subject(Some(&name)).expect("a subject");
            acme.begin(subject, "token:owner".parse().ok())
        };
        for _ in 0..2 * MAX_FIRST_CERTIFICATES_OF_OWNER {
            assert!(begin("my-app").is_some());
        }
        for number in 1..MAX_FIRST_CERTIFICATES_OF_OWNER {
            assert!(begin(&format!("other{number}")).is_some(), "{number}");
        }
        assert!(begin("too-many").is_none());
    }

    #[tokio::test]
    async fn a_name_that_has_failed_waits_and_one_with_a_certificate_needs_none() {
        let data = tempfile::tempdir().expect("a directory");
        let acme = acme(data.path().to_owned());
        let name = "my-app.t.example.com";
        let begin = || {
            let subject = acme.naming.subject(Some(name)).expect("a subject");
            acme.begin(subject, "token:owner".parse().ok())
        };
        let later = Instant::now() + HOUR;
        lock(&acme.attempts).insert(name.to_owned(), Attempt::Failed(1, later));
        assert!(begin().is_none());
        lock(&acme.attempts).clear();
        let pair = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a pair");
        let pem = format!("{}{}", pair.signing_key.serialize_pem(), pair.cert.pem());
        acme.certificates.insert(name, &pem).expect("stored");
        assert!(begin().is_none());
        assert!(lock(&acme.allowance).taken.is_empty());
    }

    #[test]
    fn directories_on_one_host_have_folders_of_their_own() {
        let one = folder("https://ca.example:14000/acme/one/directory");
        assert_eq!(one, "ca.example_14000_acme_one_directory");
        assert_ne!(one, folder("https://ca.example:14000/acme/two/directory"));
    }

    #[test]
    fn pauses_between_failures_grow_to_six_hours() {
        let minutes =
            [0, 1, 2, 3, 4, 5, 6, 100].map(|failures| retry_delay(failures).as_secs() / 60);
        assert_eq!(minutes, [1, 3, 9, 27, 81, 243, 360, 360]);
    }
}
