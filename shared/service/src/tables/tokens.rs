//! The tokens table: which agent tokens are valid. It holds only hashes, so that reading it does not allow anyone to connect.

use std::{collections::HashSet, time::Duration};

use aws_sdk_dynamodb::types::AttributeValue;

use crate::tables::dynamodb::{
    Change, Item, StoreError, Table, number, read_flag, read_number, read_text, text,
};
use crate::{
    auth::token::{self, TokenHash},
    aws::sdk::SdkConfig,
};

/// The table.
#[derive(Clone, Debug)]
pub struct TokensTable(Table);

impl TokensTable {
    /// The table of this name.
    pub fn new(sdk: &SdkConfig, name: String) -> Self {
        Self(Table::new(sdk, name))
    }

    /// The token of this hash, if it is known, not revoked and not expired.
    ///
    /// # Errors
    /// If DynamoDB does not answer.
    pub async fn good(&self, hash: &TokenHash, now: Duration) -> Result<Option<Token>, StoreError> {
        let item = self.0.get("tokenHash", text(hash.to_string())).await?;
        Ok(item.as_ref().and_then(|item| good_token(item, now)))
    }

    /// Those of these tokens that [`TokensTable::good`] finds.
    ///
    /// # Errors
    /// If DynamoDB does not answer.
    pub async fn good_among(
        &self,
        hashes: impl Iterator<Item = &TokenHash>,
        now: Duration,
    ) -> Result<HashSet<TokenHash>, StoreError> {
        let keys = hashes.map(TokenHash::to_string);
        let items = self.0.get_many("tokenHash", keys).await?;
        let good = items.iter().filter_map(|item| good_token(item, now));
        Ok(good.map(|token| token.hash).collect())
    }

    /// Creates a token with this name and returns it: it is not stored, and cannot be shown again.
    ///
    /// # Errors
    /// If DynamoDB does not answer.
    pub async fn create(
        &self,
        name: &str,
        expires: Option<Duration>,
        now: Duration,
    ) -> Result<String, StoreError> {
        let token = token::generate_token();
        self.record(&token, name, expires, now).await?;
        Ok(token)
    }

    /// Makes a token valid that was generated before.
    ///
    /// # Errors
    /// If DynamoDB does not answer.
    pub async fn record(
        &self,
        token: &str,
        name: &str,
        expires: Option<Duration>,
        now: Duration,
    ) -> Result<(), StoreError> {
        let expires_at = expires.map(|expires| (now + expires).as_secs());
        self.put(&Token {
            hash: TokenHash::of(token),
            name: name.to_owned(),
            created_at: now.as_secs(),
            expires_at,
            revoked: false,
        })
        .await
    }

    /// Keeps a token that is not known yet. What is known of it otherwise stays: this may be the late repetition of a write after
    /// which the token was revoked.
    ///
    /// # Errors
    /// If DynamoDB does not answer.
    pub async fn put(&self, token: &Token) -> Result<(), StoreError> {
        let table = &self.0;
        let put = table
            .client
            .put_item()
            .table_name(&table.name)
            .item("tokenHash", text(token.hash.to_string()))
            .item("name", text(&token.name))
            .item("createdAt", number(token.created_at))
            .item("revoked", AttributeValue::Bool(token.revoked));
        let put = token
            .expires_at
            .into_iter()
            .fold(put, |put, at| put.item("expiresAt", number(at)));
        table
            .conditional_put(put.condition_expression("attribute_not_exists(tokenHash)"))
            .await
            .map(drop)
    }

    /// All tokens, for the operator.
    ///
    /// # Errors
    /// If DynamoDB does not answer.
    pub async fn list(&self) -> Result<Vec<Token>, StoreError> {
        let items = self.0.scan().await?;
        Ok(items.iter().filter_map(token).collect())
    }

    /// Revokes all tokens with this name, and returns how many there were.
    ///
    /// # Errors
    /// If DynamoDB does not answer.
    pub async fn revoke(&self, name: &str) -> Result<usize, StoreError> {
        let mut revoked = 0;
        for token in self
            .list()
            .await?
            .into_iter()
            .filter(|token| token.name == name && !token.revoked)
        {
            revoked += usize::from(self.mark_revoked(&token.hash).await?);
        }
        Ok(revoked)
    }

    /// Returns whether the token is known.
    async fn mark_revoked(&self, hash: &TokenHash) -> Result<bool, StoreError> {
        let table = &self.0;
        let change = Change::default().set("revoked", AttributeValue::Bool(true));
        let outcome = table
            .client
            .update_item()
            .table_name(&table.name)
            .key("tokenHash", text(hash.to_string()))
            .update_expression(change.expression())
            .condition_expression("attribute_exists(tokenHash)")
            .set_expression_attribute_names(Some(change.names()))
            .set_expression_attribute_values(Some(change.values()))
            .send()
            .await;
        Ok(table.conditional(outcome)?.is_some())
    }
}

fn good_token(item: &Item, now: Duration) -> Option<Token> {
    let is_good =
        |token: &Token| !token.revoked && token.expires_at.is_none_or(|at| at > now.as_secs());
    token(item).filter(is_good)
}

fn token(item: &Item) -> Option<Token> {
    Some(Token {
        hash: TokenHash::from_hex(read_text(item, "tokenHash")?),
        name: read_text(item, "name").unwrap_or_default().to_owned(),
        created_at: read_number(item, "createdAt").unwrap_or_default(),
        expires_at: read_number(item, "expiresAt"),
        revoked: read_flag(item, "revoked"),
    })
}

/// What is kept of an agent's token.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Token {
    /// Its hash, by which it is found.
    pub hash: TokenHash,
    /// Whom it was made for.
    pub name: String,
    /// In seconds since 1970.
    pub created_at: u64,
    /// In seconds since 1970; none if it does not expire.
    pub expires_at: Option<u64>,
    /// It was revoked.
    pub revoked: bool,
}
