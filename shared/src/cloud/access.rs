//! Who may be an agent, and who still may. The first is asked once for each connection, the second again and again while it is
//! open, so that a revoked token ends what it has begun.

use std::time::Duration;

use super::{
    auth::{self, Auth},
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
        Self { owner: auth::ANYBODY.to_owned(), expires_at: None }
    }

    /// Whether the proof's time is over.
    pub fn is_expired(&self, now: Duration) -> bool {
        self.expires_at.is_some_and(|at| at <= now.as_secs())
    }
}

/// How a service tells who somebody is.
#[derive(Clone, Debug)]
pub struct Access {
    auth: Auth,
    tokens: Tokens,
}

impl Access {
    /// Reads the settings. `None` means that a fault was noted.
    pub fn load(variables: &Variables<'_>, sdk: &SdkConfig) -> Option<Self> {
        let auth = variables.optional("AUTH", Auth::Token);
        let tokens = variables.required("TOKENS_TABLE");
        Some(Self { auth: auth?, tokens: Tokens::new(sdk, tokens?) })
    }

    /// Who presents this token. `None` when it proves nothing.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn identify(&self, token: Option<&str>, now: Duration) -> Result<Option<Identity>, StoreError> {
        match (self.auth, token) {
            (Auth::Open, _) => Ok(Some(Identity::anybody())),
            (Auth::Token, None) => Ok(None),
            (Auth::Token, Some(token)) => {
                let found = self.tokens.good(&auth::hash_token(token), now).await?;
                Ok(found.map(|token| Identity { owner: auth::owner_of(&token.hash), expires_at: token.expires_at }))
            }
        }
    }

    /// Whether somebody who was identified earlier would be again: not expired, and not revoked.
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
            // From before tokens were asked for.
            (Auth::Token, None) => Ok(false),
        }
    }
}
