//! Who may be an agent, and who still may. The first is asked once for each connection, the second again and again while it is
//! open, so that a revoked token ends what it has begun.

pub mod jwks;
pub mod jwt;
mod jwt_ring;
pub mod token;

use std::{str::FromStr, sync::Arc, time::Duration};

use crate::{
    auth::{
        jwks::JwksError,
        jwt::{Jwt, JwtSettings},
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

impl AuthMode {
    /// The word that is parsed as this.
    pub fn word(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Jwt => "jwt",
            Self::Open => "open",
        }
    }
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

/// Who somebody proved to be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Identity {
    /// Whom names belong to; see [`crate::auth::token`].
    pub owner: String,
    /// Until when the proof is good, in seconds since 1970; none if that is not limited.
    pub expires_at: Option<u64>,
}

impl Identity {
    /// Everybody, where agents do not authenticate.
    pub fn anybody() -> Self {
        Self {
            owner: token::ANYBODY.to_owned(),
            expires_at: None,
        }
    }

    /// Whether the proof's time is over.
    pub fn is_expired(&self, now: Duration) -> bool {
        self.expires_at.is_some_and(|at| at <= now.as_secs())
    }
}

/// Why it cannot be told who somebody is.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The tables do not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The issuer of JSON Web Tokens does not answer.
    #[error(transparent)]
    Keys(#[from] JwksError),
}

/// How a service tells who somebody is.
#[derive(Clone, Debug)]
pub struct Authenticator {
    revalidator: Revalidator,
    jwt: Option<Arc<Jwt>>,
}

impl Authenticator {
    /// Reads the settings. `None` means that a fault was noted.
    pub fn load(variables: &Variables<'_>, sdk: &SdkConfig) -> Option<Self> {
        let revalidator = Revalidator::load(variables, sdk);
        let settings = JwtSettings::read(variables);
        let revalidator = revalidator?;
        let jwt = if revalidator.auth == AuthMode::Jwt {
            Some(Arc::new(Jwt::load(variables, settings)?))
        } else {
            None
        };
        Some(Self { revalidator, jwt })
    }

    /// Who presents this token. `None` when it proves nothing.
    ///
    /// # Errors
    /// When it cannot be told now.
    pub async fn identify(
        &self,
        token: Option<&str>,
        now: Duration,
    ) -> Result<Option<Identity>, AuthError> {
        match (self.revalidator.auth, &self.jwt, token) {
            (AuthMode::Open, _, _) => Ok(Some(Identity::anybody())),
            (AuthMode::Token, _, Some(token)) => {
                let found = self
                    .revalidator
                    .tokens
                    .good(&token::hash_token(token), now)
                    .await?;
                Ok(found.map(|token| Identity {
                    owner: token::owner_of(&token.hash),
                    expires_at: token.expires_at,
                }))
            }
            (AuthMode::Jwt, Some(jwt), Some(token)) => Ok(jwt.identify(token).await?),
            (AuthMode::Token | AuthMode::Jwt, _, _) => Ok(None),
        }
    }

    /// The part of it that knows who may stay.
    pub fn revalidator(&self) -> &Revalidator {
        &self.revalidator
    }
}

/// How a service tells whether somebody who was identified may stay.
#[derive(Clone, Debug)]
pub struct Revalidator {
    auth: AuthMode,
    tokens: TokensTable,
}

impl Revalidator {
    /// Reads the settings. `None` means that a fault was noted.
    pub fn load(variables: &Variables<'_>, sdk: &SdkConfig) -> Option<Self> {
        let auth = variables.optional("AUTH", AuthMode::Token);
        let tokens = variables.required("TOKENS_TABLE");
        Some(Self {
            auth: auth?,
            tokens: TokensTable::new(sdk, tokens?),
        })
    }

    /// Whether somebody would be identified again: the proof has not expired and its token was not revoked.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn is_good(&self, identity: &Identity, now: Duration) -> Result<bool, StoreError> {
        if identity.is_expired(now) {
            return Ok(false);
        }
        match (self.auth, token::token_hash_of(&identity.owner)) {
            (AuthMode::Open, _) => Ok(true),
            (AuthMode::Token, Some(hash)) => Ok(self.tokens.good(hash, now).await?.is_some()),
            // From before the service asked for tokens of this kind.
            (AuthMode::Token, None) => Ok(false),
            (AuthMode::Jwt, _) => Ok(token::is_subject(&identity.owner)),
        }
    }
}
