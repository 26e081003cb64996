//! The keys that an issuer publishes (RFC 7517), fetched when they are needed and kept.

use std::{
    fmt, io,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{Jwk, PublicKeyUse},
};
use serde::Deserialize;
use tokio::{
    sync::Mutex as AsyncMutex,
    time::{Instant, timeout},
};
use tracing::{info, warn};

use tunnel_protocol::{backoff::Backoff, url::is_loopback};

/// How long fetched keys are trusted without asking again, so that a key that its issuer withdraws is believed no longer.
const JWKS_TTL: Duration = Duration::from_secs(60 * 60);
/// The shortest time between two fetches of the keys, however many unknown key ids arrive.
const JWKS_MIN_REFRESH: Duration = Duration::from_secs(60);
/// The first pause after a fetch that failed is at most this long, the next ones each up to twice as long, and none is longer than
/// [`JWKS_MIN_REFRESH`].
const JWKS_MIN_RETRY: Duration = Duration::from_secs(1);
/// How long an answer may take.
const JWKS_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest answer, in bytes.
const MAX_JWKS_BYTES: usize = 1024 * 1024;

/// Where an issuer publishes its keys. Unencrypted only on this machine.
#[derive(Clone, Debug)]
pub(crate) struct JwksUrl(Uri);

/// The text is not such an address.
#[derive(Clone, Debug, thiserror::Error)]
#[error("must be an https:// address, such as https://issuer.example.com/.well-known/jwks.json")]
pub(crate) struct JwksUrlError;

impl FromStr for JwksUrl {
    type Err = JwksUrlError;

    fn from_str(text: &str) -> Result<Self, JwksUrlError> {
        let uri: Uri = text.parse().map_err(|_| JwksUrlError)?;
        match (uri.scheme_str(), uri.host()) {
            (Some("https"), Some(_)) => Ok(Self(uri)),
            (Some("http"), Some(host)) if is_loopback(host) => Ok(Self(uri)),
            _ => Err(JwksUrlError),
        }
    }
}

/// The issuer's keys cannot be fetched.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the issuer's keys cannot be fetched: {0}")]
pub struct JwksError(Arc<str>);

/// A set of keys. Keys of unknown kinds, which cannot be read, are left out.
#[derive(Debug, Default, Deserialize)]
struct KeySet {
    keys: Vec<serde_json::Value>,
}

#[derive(Debug)]
struct Fetched {
    keys: Vec<Jwk>,
    at: Instant,
}

/// The keys at one address.
pub(crate) struct Jwks {
    url: Uri,
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    fetched: Mutex<Option<Arc<Fetched>>>,
    /// Held while the keys are fetched, so that one task fetches for all.
    asked: AsyncMutex<Asked>,
}

/// How requesting the keys has gone.
#[derive(Debug)]
struct Asked {
    /// When they may be requested again.
    next: Instant,
    /// Why the last request failed, if it did.
    error: Option<JwksError>,
    pauses: Backoff,
}

impl Default for Asked {
    fn default() -> Self {
        Self {
            next: Instant::now(),
            error: None,
            pauses: Backoff::new(JWKS_MIN_RETRY, JWKS_MIN_REFRESH),
        }
    }
}

impl Asked {
    /// Notes how a request ended just now.
    fn done(&mut self, outcome: Result<(), JwksError>) {
        self.error = outcome.err();
        let pause = match self.error {
            Some(_) => self.pauses.next_pause(),
            None => {
                self.pauses.reset();
                JWKS_MIN_REFRESH
            }
        };
        self.next = Instant::now() + pause;
    }
}

impl fmt::Debug for Jwks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Jwks({})", self.url)
    }
}

impl Jwks {
    /// The keys at an address. Nothing is fetched until a key is needed.
    ///
    /// # Errors
    /// If this machine has no certificates to trust.
    pub(crate) fn new(JwksUrl(url): JwksUrl) -> io::Result<Self> {
        let connector = HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(rustls::crypto::ring::default_provider())?
            .https_or_http()
            .enable_http1()
            .build();
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self {
            url,
            client,
            fetched: Mutex::default(),
            asked: AsyncMutex::default(),
        })
    }

    /// The key of this id for this algorithm; without an id, the only key. `None` if there is no such key.
    ///
    /// # Errors
    /// If it is not known whether there is, because the keys cannot be fetched.
    pub(crate) async fn find(
        &self,
        kid: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<Option<DecodingKey>, JwksError> {
        let known = |fetched: &Option<Arc<Fetched>>| {
            fetched
                .as_ref()
                .and_then(|fetched| choose(&fetched.keys, kid, algorithm))
        };
        let fetched = self.fetched();
        if let (Some(key), Some(fetched)) = (known(&fetched), &fetched)
            && fetched.at.elapsed() < JWKS_TTL
        {
            return Ok(Some(key));
        }
        let mut asked = self.asked.lock().await;
        let is_due = Instant::now() >= asked.next;
        if is_due {
            let outcome = self.fetch().await;
            if let Err(error) = &outcome {
                warn!(url = %self.url, error = error as &dyn std::error::Error, "no keys");
            }
            asked.done(outcome);
        }
        match (known(&self.fetched()), &asked.error) {
            // Keys of before, while the issuer does not answer, rather than no agents at all.
            (Some(key), _) => Ok(Some(key)),
            (None, Some(error)) => Err(error.clone()),
            // Its issuer may have published it since the keys were fetched, and they are not fetched again so soon.
            (None, None) if !is_due && kid.is_some_and(|kid| !self.has(kid)) => Err(JwksError(
                "they were fetched a moment ago, without the one named".into(),
            )),
            (None, None) => Ok(None),
        }
    }

    /// Whether a key of this id was published when the keys were last fetched.
    fn has(&self, kid: &str) -> bool {
        self.fetched().is_some_and(|fetched| {
            let mut ids = fetched.keys.iter().map(|key| &key.common.key_id);
            ids.any(|id| id.as_deref() == Some(kid))
        })
    }

    async fn fetch(&self) -> Result<(), JwksError> {
        let failed = |error: &dyn fmt::Display| JwksError(error.to_string().into());
        let request = Request::get(&self.url)
            .header(header::ACCEPT, "application/json")
            .body(Empty::new())
            .map_err(|error| failed(&error))?;
        let answer = async {
            let response = self
                .client
                .request(request)
                .await
                .map_err(|error| failed(&error))?;
            if response.status() != StatusCode::OK {
                return Err(failed(&format!("it answered {}", response.status())));
            }
            Limited::new(response.into_body(), MAX_JWKS_BYTES)
                .collect()
                .await
                .map_err(|error| failed(&error))
        };
        let body = timeout(JWKS_TIMEOUT, answer)
            .await
            .map_err(|_| failed(&format!("it did not answer within {JWKS_TIMEOUT:?}")))??;
        let set: KeySet =
            serde_json::from_slice(&body.to_bytes()).map_err(|error| failed(&error))?;
        let keys: Vec<Jwk> = set
            .keys
            .into_iter()
            .filter_map(|key| serde_json::from_value(key).ok())
            .collect();
        info!(url = %self.url, keys = keys.len(), "keys fetched");
        *self.fetched.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(Fetched {
            keys,
            at: Instant::now(),
        }));
        Ok(())
    }

    /// Held between awaits only.
    fn fetched(&self) -> Option<Arc<Fetched>> {
        self.fetched
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

fn choose(keys: &[Jwk], kid: Option<&str>, algorithm: Algorithm) -> Option<DecodingKey> {
    let mut matching = keys
        .iter()
        .filter(|key| kid.is_none() || key.common.key_id.as_deref() == kid);
    let key = matching.next()?;
    let is_the_only_one = kid.is_some() || matching.next().is_none();
    let may_sign = key
        .common
        .public_key_use
        .as_ref()
        .is_none_or(|used_for| *used_for == PublicKeyUse::Signature);
    let is_for_it = key
        .common
        .key_algorithm
        .is_none_or(|named| named == algorithm.into());
    let key = DecodingKey::from_jwk(key).ok()?;
    (is_the_only_one && may_sign && is_for_it && key.family() == algorithm.family()).then_some(key)
}
