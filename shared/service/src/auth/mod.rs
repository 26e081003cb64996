//! Who may be an agent, and who still may. The first is asked once for each connection, the second again and again while it is
//! open, so that a revoked token ends what it has begun.

pub mod jwks;
pub mod jwt;
mod jwt_ring;
pub mod owner;
pub mod token;

use std::{str::FromStr, sync::Arc, time::Duration};

use http::HeaderMap;

use crate::{
    auth::{
        jwks::JwksError,
        jwt::{Jwt, JwtSettings},
        owner::Owner,
        token::TokenHash,
    },
    aws::sdk::SdkConfig,
    settings::Variables,
    tables::dynamodb::StoreError,
    tables::tokens::TokensTable,
};

/// How agents prove who they are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AuthMode {
    /// With a bearer token whose hash the tokens table knows.
    Token,
    /// With a JSON Web Token of an issuer that is trusted; see [`crate::auth::jwt`].
    Jwt,
    /// Not at all. For one user on a loopback address.
    Open,
}

/// A setting that names no way to authenticate.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("must be token, jwt or open")]
pub struct AuthModeError;

impl FromStr for AuthMode {
    type Err = AuthModeError;

    fn from_str(word: &str) -> Result<Self, AuthModeError> {
        match word {
            "token" => Ok(Self::Token),
            "jwt" => Ok(Self::Jwt),
            "open" => Ok(Self::Open),
            _ => Err(AuthModeError),
        }
    }
}

/// The result of authentication.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Identity {
    /// Whom tunnel ids belong to.
    pub owner: Owner,
    /// When the credentials expire, in seconds since 1970; `None` if they do not.
    pub expires_at: Option<u64>,
}

impl Identity {
    /// Whether the proof's time is over.
    pub fn is_expired(&self, now: Duration) -> bool {
        self.expires_at.is_some_and(|at| at <= now.as_secs())
    }
}

/// Why authentication cannot be decided now.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The tables do not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The issuer of JSON Web Tokens does not answer.
    #[error(transparent)]
    Keys(#[from] JwksError),
}

/// What agents prove who they are with.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// See [`AuthMode::Token`].
    Token,
    /// See [`AuthMode::Jwt`].
    Jwt(Arc<Jwt>),
    /// See [`AuthMode::Open`].
    Open,
}

impl Credentials {
    fn mode(&self) -> AuthMode {
        match self {
            Self::Token => AuthMode::Token,
            Self::Jwt(_) => AuthMode::Jwt,
            Self::Open => AuthMode::Open,
        }
    }
}

/// What a function needs for authentication.
#[derive(Clone, Debug)]
pub struct AuthSettings {
    /// What agents authenticate with.
    pub credentials: Credentials,
    /// The name of the tokens table.
    pub tokens_table: String,
}

impl AuthSettings {
    /// Reads `AUTH`, `TOKENS_TABLE` and the settings of JSON Web Tokens. `None` means that a fault was noted.
    pub fn read(variables: &Variables<'_>) -> Option<Self> {
        let mode = variables.or("AUTH", AuthMode::Token);
        let tokens_table = variables.required("TOKENS_TABLE");
        let jwt = JwtSettings::read(variables);
        let credentials = match mode? {
            AuthMode::Token => Credentials::Token,
            AuthMode::Jwt => Credentials::Jwt(Arc::new(variables.noted(Jwt::new(jwt))?)),
            AuthMode::Open => Credentials::Open,
        };
        Some(Self {
            credentials,
            tokens_table: tokens_table?,
        })
    }
}

/// Authenticates agents and owners. The only place that does: handshakes, `/_status` and limits per owner all use it.
#[derive(Clone, Debug)]
pub struct Authenticator {
    credentials: Credentials,
    tokens: TokensTable,
}

impl Authenticator {
    /// One with these settings.
    pub fn new(settings: AuthSettings, sdk: &SdkConfig) -> Self {
        Self {
            credentials: settings.credentials,
            tokens: TokensTable::new(sdk, settings.tokens_table),
        }
    }

    /// Who sent a request with these header fields. `None` when they prove nothing.
    ///
    /// # Errors
    /// If it cannot be decided now: the tables or the issuer of JSON Web Tokens do not answer. The same request may be let
    /// in a moment later, so it must not be answered with 401.
    pub async fn identify(
        &self,
        headers: &HeaderMap,
        now: Duration,
    ) -> Result<Option<Identity>, AuthError> {
        match (&self.credentials, token::bearer(headers)) {
            (Credentials::Open, _) => Ok(Some(Identity {
                owner: Owner::Open,
                expires_at: None,
            })),
            (Credentials::Token, Some(token)) => {
                let found = self.tokens.good(&TokenHash::of(token), now).await?;
                Ok(found.map(|token| Identity {
                    owner: Owner::Token(token.hash),
                    expires_at: token.expires_at,
                }))
            }
            (Credentials::Jwt(jwt), Some(token)) => Ok(jwt.identify(token).await?),
            (Credentials::Token | Credentials::Jwt(_), None) => Ok(None),
        }
    }

    /// Whether [`Authenticator::identify`] asks the tables.
    pub fn asks_tables(&self) -> bool {
        self.credentials.mode() == AuthMode::Token
    }

    /// The part of it that knows who may stay.
    pub fn revalidator(&self) -> Revalidator {
        Revalidator {
            mode: self.credentials.mode(),
            tokens: self.tokens.clone(),
        }
    }
}

/// What is known of credentials before the tokens table is asked.
enum Doubt<'i> {
    Valid,
    Invalid,
    /// They are valid if this token is.
    Token(&'i TokenHash),
}

/// Checks whether an identified agent may stay.
#[derive(Clone, Debug)]
pub struct Revalidator {
    mode: AuthMode,
    tokens: TokensTable,
}

impl Revalidator {
    /// One for agents that authenticate in this way, and the tokens table.
    pub fn new(mode: AuthMode, tokens: TokensTable) -> Self {
        Self { mode, tokens }
    }

    /// Whether the credentials are still valid: they have not expired and the token was not revoked.
    ///
    /// # Errors
    /// If the tokens table does not answer.
    pub async fn is_still_valid(
        &self,
        identity: &Identity,
        now: Duration,
    ) -> Result<bool, StoreError> {
        match self.doubt(identity, now) {
            Doubt::Valid => Ok(true),
            Doubt::Invalid => Ok(false),
            Doubt::Token(hash) => Ok(self.tokens.good(hash, now).await?.is_some()),
        }
    }

    /// Which of these identities [`Revalidator::is_still_valid`] holds for, each token looked up once.
    ///
    /// # Errors
    /// If the tokens table does not answer.
    pub async fn still_valid<'i>(
        &self,
        identities: impl Iterator<Item = &'i Identity>,
        now: Duration,
    ) -> Result<impl Fn(&Identity) -> bool, StoreError> {
        let in_doubt = identities.filter_map(|identity| match self.doubt(identity, now) {
            Doubt::Token(hash) => Some(hash),
            Doubt::Valid | Doubt::Invalid => None,
        });
        let good = self.tokens.good_among(in_doubt, now).await?;
        Ok(move |identity: &Identity| match self.doubt(identity, now) {
            Doubt::Valid => true,
            Doubt::Invalid => false,
            Doubt::Token(hash) => good.contains(hash),
        })
    }

    fn doubt<'i>(&self, identity: &'i Identity, now: Duration) -> Doubt<'i> {
        if identity.is_expired(now) {
            return Doubt::Invalid;
        }
        match (self.mode, &identity.owner) {
            (AuthMode::Open, _) | (AuthMode::Jwt, Owner::Jwt(_)) => Doubt::Valid,
            (AuthMode::Token, Owner::Token(hash)) => Doubt::Token(hash),
            // Identified before the service used this kind of credentials.
            (AuthMode::Token | AuthMode::Jwt, _) => Doubt::Invalid,
        }
    }
}
