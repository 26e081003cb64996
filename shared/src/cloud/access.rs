//! Who may be an agent, and who still may. The first is asked once for each connection, the second again and again while it is
//! open, so that a revoked token ends what it has begun.

use std::{sync::Arc, time::Duration};

use super::{
    auth::{self, Auth},
    jwt::{Jwt, JwtSettings, KeysError},
    sdk::SdkConfig,
    settings::Variables,
    store::StoreError,
    tokens::Tokens,
};

/// Who somebody proved to be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Identity {
    /// Whom names belong to; see [`super::auth`].
    pub owner: String,
    /// Until when the proof is good, in seconds since 1970; none if that is not limited.
    pub expires_at: Option<u64>,
}

impl Identity {
    /// Everybody, where agents do not authenticate.
    pub fn anybody() -> Self {
        Self {
            owner: auth::ANYBODY.to_owned(),
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
pub enum AccessError {
    /// The tables do not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The issuer of JSON Web Tokens does not answer.
    #[error(transparent)]
    Keys(#[from] KeysError),
}

/// How a service tells who somebody is.
#[derive(Clone, Debug)]
pub struct Access {
    standing: Standing,
    jwt: Option<Arc<Jwt>>,
}

impl Access {
    /// Reads the settings. `None` means that a fault was noted.
    pub fn load(variables: &Variables<'_>, sdk: &SdkConfig) -> Option<Self> {
        let standing = Standing::load(variables, sdk);
        let settings = JwtSettings::read(variables);
        let standing = standing?;
        let jwt = if standing.auth == Auth::Jwt {
            Some(Arc::new(Jwt::load(variables, settings)?))
        } else {
            None
        };
        Some(Self { standing, jwt })
    }

    /// Who presents this token. `None` when it proves nothing.
    ///
    /// # Errors
    /// When it cannot be told now.
    pub async fn identify(
        &self,
        token: Option<&str>,
        now: Duration,
    ) -> Result<Option<Identity>, AccessError> {
        match (self.standing.auth, &self.jwt, token) {
            (Auth::Open, _, _) => Ok(Some(Identity::anybody())),
            (Auth::Token, _, Some(token)) => {
                let found = self
                    .standing
                    .tokens
                    .good(&auth::hash_token(token), now)
                    .await?;
                Ok(found.map(|token| Identity {
                    owner: auth::owner_of(&token.hash),
                    expires_at: token.expires_at,
                }))
            }
            (Auth::Jwt, Some(jwt), Some(token)) => Ok(jwt.identify(token).await?),
            (Auth::Token | Auth::Jwt, _, _) => Ok(None),
        }
    }

    /// The part of it that knows who may stay.
    pub fn standing(&self) -> &Standing {
        &self.standing
    }
}

/// How a service tells whether somebody who was identified may stay.
#[derive(Clone, Debug)]
pub struct Standing {
    auth: Auth,
    tokens: Tokens,
}

impl Standing {
    /// Reads the settings. `None` means that a fault was noted.
    pub fn load(variables: &Variables<'_>, sdk: &SdkConfig) -> Option<Self> {
        let auth = variables.optional("AUTH", Auth::Token);
        let tokens = variables.required("TOKENS_TABLE");
        Some(Self {
            auth: auth?,
            tokens: Tokens::new(sdk, tokens?),
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
        match (self.auth, auth::token_hash_of(&identity.owner)) {
            (Auth::Open, _) => Ok(true),
            (Auth::Token, Some(hash)) => Ok(self.tokens.good(hash, now).await?.is_some()),
            // From before the service asked for tokens of this kind.
            (Auth::Token, None) => Ok(false),
            (Auth::Jwt, _) => Ok(auth::is_subject(&identity.owner)),
        }
    }
}
