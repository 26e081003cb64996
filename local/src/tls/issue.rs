//! How a certificate is obtained from an authority (RFC 8555).

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, ChallengeType, Identifier, KeyAuthorization,
    NewAccount, NewOrder, Order, OrderStatus, RetryPolicy,
};
use rcgen::{CertificateParams, CustomExtension, KeyPair};
use rustls::{
    pki_types::PrivateKeyDer,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    process::Command,
    sync::Mutex as AsyncMutex,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use tunnel_local_aws::dynamodb::cause_of;

use crate::tls::{TlsError, provider, store::write_secret};

/// How long an authority has to look at a name, and then to issue.
const POLLING: RetryPolicy = RetryPolicy::new()
    .initial_delay(Duration::from_millis(250))
    .backoff(1.5)
    .timeout(Duration::from_secs(90));
/// How long a DNS hook may take; it waits until the record can be seen.
const HOOK_TIMEOUT: Duration = Duration::from_secs(300);
/// How much of what a DNS hook complains about is passed on, in bytes.
const MAX_HOOK_TEXT_BYTES: usize = 500;
/// How long obtaining a certificate may take altogether.
const ISSUE_TIMEOUT: Duration = Duration::from_secs(900);
/// How long removing what validations needed may take, and how long once the server is stopping.
const CLEAN_UP_TIMEOUT: Duration = HOOK_TIMEOUT.saturating_mul(2);
const STOP_CLEAN_UP_TIMEOUT: Duration = Duration::from_secs(5);
/// What an authority says that has forgotten the account.
const NO_ACCOUNT: &str = "urn:ietf:params:acme:error:accountDoesNotExist";

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub(super) enum IssueError {
    /// The authority does not answer, or refuses.
    #[error("{}", cause_of(.0))]
    Authority(#[from] instant_acme::Error),
    /// The authority has looked at a name and found something else than it wanted.
    #[error("the authority could not validate {name}: {reason}")]
    Validation {
        /// The name.
        name: String,
        /// What it says.
        reason: String,
    },
    /// The authority validates in other ways only.
    #[error("the authority does not offer {challenge} for {name}")]
    NoChallenge {
        /// What is needed.
        challenge: &'static str,
        /// The name.
        name: String,
    },
    /// The DNS hook failed.
    #[error("the DNS hook failed: {0}")]
    Hook(String),
    /// Making a key or a certificate failed.
    #[error("cannot make a key: {0}")]
    Key(String),
    /// What was obtained cannot be kept, or the account.
    #[error(transparent)]
    Store(#[from] TlsError),
    /// It took too long.
    #[error("it took longer than {} s", ISSUE_TIMEOUT.as_secs())]
    Timeout,
}

/// What is asked for certificates, and as whom.
#[derive(Debug)]
pub(super) struct Issuer {
    pub(super) contact: String,
    pub(super) directory_url: String,
    pub(super) authority: Option<PathBuf>,
    pub(super) dns_hook: Option<PathBuf>,
    pub(super) account_file: PathBuf,
    pub(super) validations: Arc<Validations>,
    pub(super) account: AccountCell,
}

/// The account, once it is known.
#[derive(Default)]
pub(super) struct AccountCell(AsyncMutex<Option<Account>>);

impl std::fmt::Debug for AccountCell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AccountCell")
    }
}

impl Issuer {
    /// Obtains a certificate for names, and returns its key and its chain in PEM, or `None` when it is `stopping`. However it ends,
    /// nothing of the validations stays where the authority looks.
    ///
    /// # Errors
    /// See [`IssueError`].
    pub(super) async fn issue(
        &self,
        names: &[String],
        stopping: &CancellationToken,
    ) -> Result<Option<String>, IssueError> {
        let mut prepared = Prepared::default();
        let order = Box::pin(timeout(ISSUE_TIMEOUT, self.order(names, &mut prepared)));
        let outcome = match stopping.run_until_cancelled(order).await {
            Some(outcome) => outcome.unwrap_or(Err(IssueError::Timeout)).map(Some),
            None => Ok(None),
        };
        let stopped = async {
            stopping.cancelled().await;
            sleep(STOP_CLEAN_UP_TIMEOUT).await;
        };
        tokio::select! {
            () = self.clean_up(prepared) => {}
            () = stopped => warn!("records of a validation may stay: the DNS hook takes too long"),
            () = sleep(CLEAN_UP_TIMEOUT) => warn!("records of a validation may stay: the DNS hook takes too long"),
        }
        if let Err(IssueError::Authority(instant_acme::Error::Api(problem))) = &outcome
            && problem.r#type.as_deref() == Some(NO_ACCOUNT)
        {
            // The next attempt registers again.
            *self.account.0.lock().await = None;
            let _ = fs::remove_file(&self.account_file);
        }
        outcome
    }

    async fn order(&self, names: &[String], prepared: &mut Prepared) -> Result<String, IssueError> {
        let account = self.account().await?;
        let identifiers: Vec<_> = names.iter().cloned().map(Identifier::Dns).collect();
        let mut order = account.new_order(&NewOrder::new(&identifiers)).await?;
        self.validate(&mut order, prepared).await?;
        let failed = |error: rcgen::Error| IssueError::Key(error.to_string());
        let key = KeyPair::generate().map_err(failed)?;
        let mut request = CertificateParams::new(names).map_err(failed)?;
        request.distinguished_name = rcgen::DistinguishedName::new();
        let request = request.serialize_request(&key).map_err(failed)?;
        order.finalize_csr(request.der()).await?;
        let chain = order.poll_certificate(&POLLING).await?;
        Ok(format!("{}{chain}", key.serialize_pem()))
    }

    /// The account from its file, or a new one.
    async fn account(&self) -> Result<Account, IssueError> {
        let mut known = self.account.0.lock().await;
        if let Some(account) = &*known {
            return Ok(account.clone());
        }
        let builder = match &self.authority {
            Some(authority) => Account::builder_with_root(authority)?,
            None => Account::builder()?,
        };
        let stored = match fs::read(&self.account_file) {
            Ok(bytes) => serde_json::from_slice::<AccountCredentials>(&bytes)
                .inspect_err(|error| warn!(file = %self.account_file.display(), %error, "the ACME account cannot be read: a new one is made"))
                .ok(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => {
                let path = self.account_file.clone();
                return Err(TlsError::Read { path, source }.into());
            }
        };
        let account = match stored {
            Some(credentials) => builder.from_credentials(credentials).await?,
            None => {
                let new = NewAccount {
                    contact: &[&self.contact],
                    terms_of_service_agreed: true,
                    only_return_existing: false,
                };
                let directory = self.directory_url.clone();
                let (account, credentials) = builder.create(&new, directory, None).await?;
                let json = serde_json::to_vec(&credentials).map_err(instant_acme::Error::from)?;
                write_secret(&self.account_file, &json)?;
                account
            }
        };
        *known = Some(account.clone());
        Ok(account)
    }

    /// Proves to the authority whose the order's names are.
    async fn validate(&self, order: &mut Order, prepared: &mut Prepared) -> Result<(), IssueError> {
        let (kind, kind_name) = match self.dns_hook {
            Some(_) => (ChallengeType::Dns01, "DNS-01"),
            None => (ChallengeType::TlsAlpn01, "TLS-ALPN-01"),
        };
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let mut authorization = authorization?;
            if authorization.status == AuthorizationStatus::Valid {
                continue;
            }
            let name = match authorization.identifier().identifier {
                Identifier::Dns(name) => name.clone(),
                _ => continue,
            };
            let Some(challenge) = authorization.challenge(kind.clone()) else {
                let challenge = kind_name;
                return Err(IssueError::NoChallenge { challenge, name });
            };
            let proof = challenge.key_authorization();
            match &self.dns_hook {
                Some(hook) => prepared.publish(hook, &name, &proof).await?,
                None => {
                    self.validations.insert(&name, &proof)?;
                    prepared.names.push(name);
                }
            }
        }
        // Two names may share a record. Looked up with one value, it would be remembered without the other.
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let mut authorization = authorization?;
            if authorization.status != AuthorizationStatus::Valid
                && let Some(mut challenge) = authorization.challenge(kind.clone())
            {
                challenge.set_ready().await?;
            }
        }
        match order.poll_ready(&POLLING).await {
            Ok(OrderStatus::Ready) => Ok(()),
            Err(error @ instant_acme::Error::Timeout(_)) => Err(error.into()),
            outcome => Err(match (refusal(order).await, outcome) {
                (Some(refusal), _) => refusal,
                (None, Err(error)) => error.into(),
                (None, Ok(status)) => IssueError::Validation {
                    name: "a name".to_owned(),
                    reason: format!("the order is {status:?}"),
                },
            }),
        }
    }

    async fn clean_up(&self, prepared: Prepared) {
        for name in prepared.names {
            self.validations.remove(&name);
        }
        let Some(hook) = &self.dns_hook else {
            return;
        };
        for (record, value) in prepared.records {
            if let Err(error) = run_hook(hook, "cleanup", &record, &value).await {
                warn!(%error, record, "a DNS record of a validation stays");
            }
        }
    }
}

/// Why the authority did not accept an order.
async fn refusal(order: &mut Order) -> Option<IssueError> {
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        // What is known of it is older than the refusal.
        authorization.refresh().await.ok()?;
        let name = authorization.identifier().to_string();
        let errors = authorization.challenges.iter();
        if let Some(problem) = errors
            .filter_map(|challenge| challenge.error.as_ref())
            .next()
        {
            let reason = problem.detail.clone();
            let reason = reason.unwrap_or_else(|| problem.to_string());
            return Some(IssueError::Validation { name, reason });
        }
    }
    None
}

/// What an order has put where the authority looks.
#[derive(Debug, Default)]
struct Prepared {
    names: Vec<String>,
    records: Vec<(String, String)>,
}

impl Prepared {
    async fn publish(
        &mut self,
        hook: &Path,
        name: &str,
        proof: &KeyAuthorization,
    ) -> Result<(), IssueError> {
        let record = format!("_acme-challenge.{name}");
        let value = proof.dns_value();
        self.records.push((record.clone(), value.clone()));
        run_hook(hook, "present", &record, &value).await
    }
}

/// Runs `HOOK present|cleanup RECORD VALUE` to its end.
async fn run_hook(hook: &Path, action: &str, record: &str, value: &str) -> Result<(), IssueError> {
    let failed = |what: String| IssueError::Hook(format!("{} {action}: {what}", hook.display()));
    let running = Command::new(hook)
        .args([action, record, value])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let output = timeout(HOOK_TIMEOUT, running).await;
    let output = output.map_err(|_| failed("it takes too long".to_owned()))?;
    let output = output.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let length = output.stderr.len().min(MAX_HOOK_TEXT_BYTES);
    let said = String::from_utf8_lossy(&output.stderr[output.stderr.len() - length..]);
    Err(failed(format!(
        "{}: {}",
        output.status,
        said.trim().escape_debug()
    )))
}

/// The certificates by which an authority recognises this server (RFC 8737), while it looks.
#[derive(Debug, Default)]
pub(super) struct Validations(Mutex<HashMap<String, Arc<CertifiedKey>>>);

impl Validations {
    fn insert(&self, name: &str, proof: &KeyAuthorization) -> Result<(), IssueError> {
        let failed = |error: &dyn std::fmt::Display| IssueError::Key(error.to_string());
        let key = KeyPair::generate().map_err(|error| failed(&error))?;
        let mut params =
            CertificateParams::new(vec![name.to_owned()]).map_err(|error| failed(&error))?;
        let digest = proof.digest();
        params.custom_extensions = vec![CustomExtension::new_acme_identifier(digest.as_ref())];
        let certificate = params.self_signed(&key).map_err(|error| failed(&error))?;
        let private =
            PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| failed(&error))?;
        let chain = vec![certificate.der().clone()];
        // Not checked against each other: the check knows no extension of a validation.
        let private = provider().key_provider.load_private_key(private);
        let pair = CertifiedKey::new(chain, private.map_err(|error| failed(&error))?);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(name.to_owned(), Arc::new(pair));
        Ok(())
    }

    fn remove(&self, name: &str) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(name);
    }
}

impl ResolvesServerCert for Validations {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(hello.server_name()?).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_said_why_an_authority_cannot_be_reached() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        drop(listener);
        let directory = tempfile::tempdir().expect("a directory");
        let issuer = Issuer {
            contact: "mailto:admin@example.com".to_owned(),
            directory_url: format!("https://{address}/dir"),
            authority: None,
            dns_hook: None,
            account_file: directory.path().join("account"),
            validations: Arc::default(),
            account: AccountCell::default(),
        };
        let names = ["t.example.com".to_owned()];
        let issued = issuer.issue(&names, &CancellationToken::new()).await;
        let error = issued.expect_err("nobody is there").to_string();
        assert!(error.contains("Connection refused"), "{error}");
    }
}
