//! Agents that prove who they are with a JSON Web Token (RFC 7519) of an issuer that the service trusts.
//!
//! Which algorithms are taken is the service's setting and never the token's: HS256 alone with a secret, asymmetric ones alone with
//! the issuer's published keys. Signatures are checked with ring, as those of TLS are.

use std::{fmt, time::Duration};

use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;

use crate::{
    auth::{
        Identity,
        jwks::{Jwks, JwksError, JwksUrlError},
        jwt_ring,
        owner::{Owner, SubjectHash},
    },
    settings::{SettingsError, Variables},
};

/// How far the issuer's clock and ours may be apart.
const LEEWAY: Duration = Duration::from_secs(60);
/// Shortest secret, in bytes: as long as the hash (RFC 7518, 3.2).
const MIN_SECRET_BYTES: usize = 32;
/// Longest token that is looked at, in bytes.
const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// What issuers' published keys may sign with.
const ASYMMETRIC: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

/// What a token must be to be believed.
#[derive(Debug)]
pub struct Jwt {
    issuer: String,
    audience: String,
    keys: Keys,
}

#[derive(Debug)]
enum Keys {
    Secret(DecodingKey),
    Published(Box<Jwks>),
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    exp: u64,
}

/// An issuer of JSON Web Tokens, and how its signatures are checked. What is empty is not set.
#[derive(Clone, Default)]
pub struct JwtSettings {
    /// `iss` of its tokens.
    pub issuer: String,
    /// What `aud` of tokens for this service contains.
    pub audience: String,
    /// Where it publishes its keys; empty if it signs with the secret.
    pub jwks_url: String,
    /// What it signs with; empty if it publishes keys.
    pub secret: String,
}

impl fmt::Debug for JwtSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JwtSettings({})", self.issuer)
    }
}

impl JwtSettings {
    pub(crate) fn read(variables: &Variables<'_>) -> Self {
        let text = |name: &str| variables.or(name, String::new()).unwrap_or_default();
        Self {
            issuer: text("JWT_ISSUER"),
            audience: text("JWT_AUDIENCE"),
            jwks_url: text("JWT_JWKS_URL"),
            secret: text("JWT_SECRET"),
        }
    }
}

impl Jwt {
    /// Tokens of the issuer that the settings describe.
    ///
    /// # Errors
    /// All that is wrong with them, by the names of the functions' variables.
    pub fn new(settings: JwtSettings) -> Result<Self, SettingsError> {
        let mut faults = Vec::new();
        for (name, text) in [
            ("JWT_ISSUER", &settings.issuer),
            ("JWT_AUDIENCE", &settings.audience),
        ] {
            if text.is_empty() {
                faults.push(format!("{name}: is not set"));
            }
        }
        let keys = Keys::of(&settings.jwks_url, &settings.secret)
            .map_err(|fault| faults.push(fault))
            .ok();
        jwt_ring::install();
        match keys {
            Some(keys) if faults.is_empty() => Ok(Self {
                issuer: settings.issuer,
                audience: settings.audience,
                keys,
            }),
            _ => Err(SettingsError(faults)),
        }
    }

    /// Who presents this token. `None` when it proves nothing.
    ///
    /// # Errors
    /// If the issuer's keys cannot be fetched.
    pub(crate) async fn identify(&self, token: &str) -> Result<Option<Identity>, JwksError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Ok(None);
        }
        // An unknown `alg` such as none cannot be read; of `crit` nothing is understood, so nothing may be demanded.
        let Some(header) = decode_header(token)
            .ok()
            .filter(|header| header.crit.is_none())
        else {
            return Ok(None);
        };
        let key = match &self.keys {
            Keys::Secret(key) if header.alg == Algorithm::HS256 => Some(key.clone()),
            Keys::Published(keys) if ASYMMETRIC.contains(&header.alg) => {
                keys.find(header.kid.as_deref(), header.alg).await?
            }
            Keys::Secret(_) | Keys::Published(_) => None,
        };
        let Some(key) = key.filter(|key| key.family() == header.alg.family()) else {
            return Ok(None);
        };
        let mut validation = Validation::new(header.alg);
        validation.leeway = LEEWAY.as_secs();
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.issuer]);
        validation.set_audience(&[&self.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        let Ok(token) = decode::<Claims>(token, &key, &validation) else {
            return Ok(None);
        };
        let Claims { iss, sub, exp } = token.claims;
        Ok((!sub.is_empty()).then(|| Identity {
            owner: Owner::Jwt(SubjectHash::of(&iss, &sub)),
            expires_at: Some(exp.saturating_add(LEEWAY.as_secs())),
        }))
    }
}

impl Keys {
    /// The issuer's published keys, or else its secret. The error is a fault of the settings.
    fn of(jwks_url: &str, secret: &str) -> Result<Self, String> {
        match (jwks_url, secret) {
            (url, "") if !url.is_empty() => published(url)
                .map(|keys| Self::Published(Box::new(keys)))
                .map_err(|fault| format!("JWT_JWKS_URL: {fault}")),
            ("", secret) if secret.len() >= MIN_SECRET_BYTES => {
                Ok(Self::Secret(DecodingKey::from_secret(secret.as_bytes())))
            }
            ("", short) if !short.is_empty() => Err(format!(
                "JWT_SECRET: must have at least {MIN_SECRET_BYTES} bytes"
            )),
            _ => Err("JWT_JWKS_URL, JWT_SECRET: exactly one of them must be set".to_owned()),
        }
    }
}

fn published(url: &str) -> Result<Jwks, String> {
    Jwks::new(
        url.parse()
            .map_err(|invalid: JwksUrlError| invalid.to_string())?,
    )
    .map_err(|error| error.to_string())
}
