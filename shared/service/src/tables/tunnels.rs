//! The tunnels table: who owns a name, and which connection serves it now.

use std::{collections::HashMap, sync::Arc, time::Duration};

use aws_sdk_dynamodb::{
    operation::delete_item::DeleteItemError,
    types::{AttributeValue, ReturnValue, Select, TransactWriteItem, Update},
};

use crate::tables::connections::ConnectionsTable;
use crate::tables::dynamodb::{
    Change, Item, StoreError, Table, cancellation_codes, is_live, number, read_number, read_text,
    text,
};
use tracing::error;

use crate::{
    auth::{Identity, owner::Owner},
    aws::sdk::SdkConfig,
};
use tunnel_protocol::{
    id::{ConnectionId, TunnelId},
    message::Feature,
    visitor_policy::VisitorPolicy,
};

/// How often a tunnel id is looked at that changes hands while it is claimed.
const CLAIM_ATTEMPTS: u32 = 5;
/// The index of tunnel ids by owner, as template.yaml names it.
const OWNER_INDEX: &str = "byOwner";
/// How long an unused name belongs to its owner.
pub const NAME_LEASE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// A tunnel.
#[derive(Clone, Debug, PartialEq)]
pub struct Tunnel {
    /// Whose it is. `expires_at` is of the proof with which it last went online.
    pub identity: Identity,
    /// The connection that serves it; `None` while it is offline.
    pub online: Option<Online>,
    /// When it last went online or offline, in seconds since 1970; 0 if it never was online.
    pub since: u64,
}

/// The connection that serves a tunnel.
#[derive(Clone, Debug, PartialEq)]
pub struct Online {
    /// The connection.
    pub connection_id: ConnectionId,
    /// When it was opened, in milliseconds since 1970.
    pub connected_at_ms: u64,
    /// The connection of the same agent that it took over from. That one is left to finish what it has.
    pub previous: Option<ConnectionId>,
    /// What its agent announced.
    pub features: Vec<Feature>,
    /// The visitor policy; without one, all visitors are admitted.
    pub policy: Option<Arc<VisitorPolicy>>,
}

impl Online {
    /// Whether it was opened after another connection. The ids decide between two that were opened in the same millisecond, so
    /// that all functions agree which one is newer.
    pub fn is_newer_than(&self, connection: &ConnectionId, connected_at_ms: u64) -> bool {
        (self.connected_at_ms, self.connection_id.as_str()) > (connected_at_ms, connection.as_str())
    }
}

/// What came of claiming a tunnel id.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Claim {
    /// It is the claimant's.
    Owned,
    /// It is another owner's.
    Taken,
    /// It was free, but the claimant has as many as one owner may have.
    TooMany,
}

/// The table.
#[derive(Clone, Debug)]
pub struct TunnelsTable(Table);

impl TunnelsTable {
    /// The table of this name.
    pub fn new(sdk: &SdkConfig, name: String) -> Self {
        Self(Table::new(sdk, name))
    }

    /// Looks a tunnel up, with all writes that were answered before.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn get(&self, id: &TunnelId, now: Duration) -> Result<Option<Tunnel>, StoreError> {
        let item = self.0.get("tunnelId", text(id.as_str())).await?;
        Ok(item
            .filter(|item| is_live(item, now))
            .and_then(|item| tunnel(&item)))
    }

    /// Looks many tunnels up, as [`TunnelsTable::get`] does one.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn get_many(
        &self,
        ids: impl Iterator<Item = &TunnelId>,
        now: Duration,
    ) -> Result<HashMap<TunnelId, Tunnel>, StoreError> {
        let keys = ids.map(|id| id.as_str().to_owned());
        let items = self.0.get_many("tunnelId", keys).await?;
        let live = items.iter().filter(|item| is_live(item, now));
        Ok(live.filter_map(named).collect())
    }

    /// Gives a tunnel id to `owner`, if no one owns it and `owner` has fewer than `max_ids`; 0 means no limit. What an earlier
    /// owner left there is removed.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn claim(
        &self,
        id: &TunnelId,
        owner: &Owner,
        max_ids: u32,
        now: Duration,
    ) -> Result<Claim, StoreError> {
        for _ in 0..CLAIM_ATTEMPTS {
            let is_written = match self.get(id, now).await? {
                Some(tunnel) if tunnel.identity.owner == *owner => {
                    self.renew(id, owner, now).await?
                }
                Some(_) => return Ok(Claim::Taken),
                None if max_ids > 0 && self.count_of(owner, max_ids).await? >= max_ids => {
                    // Another connection of the owner may have claimed it meanwhile: then it is among those counted.
                    if self.get(id, now).await?.is_none() {
                        return Ok(Claim::TooMany);
                    }
                    false
                }
                None => self.claim_free(id, owner, now).await?,
            };
            if is_written {
                return Ok(Claim::Owned);
            }
        }
        Ok(Claim::Taken)
    }

    async fn renew(&self, id: &TunnelId, owner: &Owner, now: Duration) -> Result<bool, StoreError> {
        let change = Change::default()
            .set("ttl", number((now + NAME_LEASE).as_secs()))
            .name("owner");
        self.update(id, change, "#owner = :me", [(":me", owner_text(owner))])
            .await
    }

    /// Gives the record of a tunnel its whole time again, if half of that is over, and it is still its owner's.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn keep(
        &self,
        id: &TunnelId,
        owner: &Owner,
        now: Duration,
    ) -> Result<(), StoreError> {
        let change = Change::default()
            .set("ttl", number((now + NAME_LEASE).as_secs()))
            .name("owner");
        let values = [
            (":me", owner_text(owner)),
            (":half", number((now + NAME_LEASE / 2).as_secs())),
        ];
        self.update(id, change, "#owner = :me AND #ttl < :half", values)
            .await?;
        Ok(())
    }

    async fn claim_free(
        &self,
        id: &TunnelId,
        owner: &Owner,
        now: Duration,
    ) -> Result<bool, StoreError> {
        let change = without_connection(Change::default())
            .set("owner", owner_text(owner))
            .set("ttl", number((now + NAME_LEASE).as_secs()))
            .remove("expiresAt")
            .remove("since");
        self.update(
            id,
            change,
            "attribute_not_exists(tunnelId) OR #ttl <= :current",
            [(":current", number(now.as_secs()))],
        )
        .await
    }

    /// How many tunnel ids an owner has, counted up to `limit`. Those claimed a moment ago may be missing, and those that have
    /// expired may be counted until DynamoDB removes them.
    async fn count_of(&self, owner: &Owner, limit: u32) -> Result<u32, StoreError> {
        let table = &self.0;
        let output = table
            .client
            .query()
            .table_name(&table.name)
            .index_name(OWNER_INDEX)
            .key_condition_expression("#owner = :owner")
            .expression_attribute_names("#owner", "owner")
            .expression_attribute_values(":owner", owner_text(owner))
            .select(Select::Count)
            .limit(i32::try_from(limit).unwrap_or(i32::MAX))
            .send()
            .await
            .map_err(table.failed("Query"))?;
        Ok(u32::try_from(output.count).unwrap_or_default())
    }

    /// Lets `to` serve the tunnel in place of `from`, in one transaction: only if the tunnel is still its owner's, `from` serves
    /// it now (none does, if it is `None`), and `to` is still open. Returns whether all that was the case. After `false`, or an error,
    /// `to` may serve nevertheless, because an earlier attempt's answer was lost: look again.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn hand_over(
        &self,
        id: &TunnelId,
        from: Option<&ConnectionId>,
        to: &Online,
        identity: &Identity,
        connections: &ConnectionsTable,
        now: Duration,
    ) -> Result<bool, StoreError> {
        let table = &self.0;
        let change = online(to, identity, now).name("owner");
        let (condition, from) = match from {
            None => ("attribute_not_exists(#connectionId)", None),
            Some(from) => ("#connectionId = :from", Some((":from", from))),
        };
        let update = Update::builder()
            .table_name(&table.name)
            .key("tunnelId", text(id.as_str()))
            .update_expression(change.expression())
            .condition_expression(format!("#owner = :me AND {condition}"))
            .set_expression_attribute_names(Some(change.names()))
            .set_expression_attribute_values(Some(change.values()))
            .expression_attribute_values(":me", owner_text(&identity.owner));
        let update = from
            .into_iter()
            .fold(update, |update, (name, from)| {
                update.expression_attribute_values(name, text(from.as_str()))
            })
            .build()
            .expect("it has a table, a key and an expression");
        let outcome = table
            .client
            .transact_write_items()
            .transact_items(connections.is_open(&to.connection_id))
            .transact_items(TransactWriteItem::builder().update(update).build())
            .send()
            .await;
        match outcome {
            Ok(_) => Ok(true),
            Err(error)
                if error.as_service_error().is_some_and(|error| {
                    cancellation_codes(error).any(|code| code == "ConditionalCheckFailed")
                }) =>
            {
                Ok(false)
            }
            Err(error) => Err(table.failed("TransactWriteItems")(error)),
        }
    }

    /// All tunnels with their names, for the operator.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn list(&self, now: Duration) -> Result<Vec<(TunnelId, Tunnel)>, StoreError> {
        let items = self.0.scan().await?;
        Ok(items
            .iter()
            .filter(|item| is_live(item, now))
            .filter_map(named)
            .collect())
    }

    /// Releases a tunnel id if `owner` owns it, and returns what it was; `None` if `owner` does not own it. It reads before
    /// it deletes, so that a deletion repeated because its answer was lost is not mistaken for an unowned id.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn release_owned(
        &self,
        id: &TunnelId,
        owner: &Owner,
        now: Duration,
    ) -> Result<Option<Tunnel>, StoreError> {
        let Some(tunnel) = self
            .get(id, now)
            .await?
            .filter(|tunnel| tunnel.identity.owner == *owner)
        else {
            return Ok(None);
        };
        let table = &self.0;
        let outcome = table
            .client
            .delete_item()
            .table_name(&table.name)
            .key("tunnelId", text(id.as_str()))
            .condition_expression("#owner = :owner")
            .expression_attribute_names("#owner", "owner")
            .expression_attribute_values(":owner", owner_text(owner))
            .send()
            .await;
        match outcome {
            Ok(_) => Ok(Some(tunnel)),
            // It is gone already, or another owner's by now: released either way.
            Err(error)
                if error
                    .as_service_error()
                    .is_some_and(DeleteItemError::is_conditional_check_failed_exception) =>
            {
                Ok(Some(tunnel))
            }
            Err(error) => Err(table.failed("DeleteItem")(error)),
        }
    }

    /// Releases a tunnel id, whoever owns it, and returns whether it had an owner.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn release(&self, id: &TunnelId) -> Result<bool, StoreError> {
        let table = &self.0;
        let output = table
            .client
            .delete_item()
            .table_name(&table.name)
            .key("tunnelId", text(id.as_str()))
            .return_values(ReturnValue::AllOld)
            .send()
            .await
            .map_err(table.failed("DeleteItem"))?;
        Ok(output.attributes.is_some())
    }

    /// Marks the tunnel offline if `connection` serves it, and returns whether it did.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn mark_offline(
        &self,
        id: &TunnelId,
        connection: &ConnectionId,
        now: Duration,
    ) -> Result<bool, StoreError> {
        let condition = "#connectionId = :connection";
        self.update(
            id,
            offline(now),
            condition,
            [(":connection", text(connection.as_str()))],
        )
        .await
    }

    /// Changes a tunnel on a condition, and returns whether that held.
    async fn update(
        &self,
        id: &TunnelId,
        change: Change,
        condition: &str,
        values: impl IntoIterator<Item = (&'static str, AttributeValue)>,
    ) -> Result<bool, StoreError> {
        let table = &self.0;
        let update = table
            .client
            .update_item()
            .table_name(&table.name)
            .key("tunnelId", text(id.as_str()))
            .update_expression(change.expression())
            .condition_expression(condition)
            .set_expression_attribute_names(Some(change.names()))
            .set_expression_attribute_values(Some(change.values()));
        let outcome = values
            .into_iter()
            .fold(update, |update, (name, value)| {
                update.expression_attribute_values(name, value)
            })
            .send()
            .await;
        Ok(table.conditional(outcome)?.is_some())
    }
}

/// The attributes of a tunnel that `online` serves. They are written at once: there is no moment in which it is served without
/// its policy.
fn online(online: &Online, identity: &Identity, now: Duration) -> Change {
    let expires_at = identity
        .expires_at
        .map_or(AttributeValue::Null(true), number);
    Change::default()
        .set("connectionId", text(online.connection_id.as_str()))
        .set("connectedAt", number(online.connected_at_ms))
        .set("features", text(features_to_text(&online.features)))
        .set("expiresAt", expires_at)
        .set("since", number(now.as_secs()))
        .set("ttl", number((now + NAME_LEASE).as_secs()))
        .set_or_remove("access", online.policy.as_deref().map(policy_to_text))
        .set_or_remove(
            "previous",
            online.previous.as_ref().map(|id| text(id.as_str())),
        )
}

/// The attributes of a tunnel that is offline.
fn offline(now: Duration) -> Change {
    without_connection(Change::default())
        .set("since", number(now.as_secs()))
        .set("ttl", number((now + NAME_LEASE).as_secs()))
}

fn without_connection(change: Change) -> Change {
    [
        "connectionId",
        "connectedAt",
        "previous",
        "features",
        "access",
    ]
    .into_iter()
    .fold(change, Change::remove)
}

fn owner_text(owner: &Owner) -> AttributeValue {
    text(owner.to_string())
}

fn named(item: &Item) -> Option<(TunnelId, Tunnel)> {
    Some((read_text(item, "tunnelId")?.parse().ok()?, tunnel(item)?))
}

fn tunnel(item: &Item) -> Option<Tunnel> {
    Some(Tunnel {
        identity: Identity {
            owner: read_text(item, "owner")?.parse().ok()?,
            expires_at: read_number(item, "expiresAt"),
        },
        online: online_of(item),
        since: read_number(item, "since").unwrap_or_default(),
    })
}

fn online_of(item: &Item) -> Option<Online> {
    Some(Online {
        connection_id: read_text(item, "connectionId")?.parse().ok()?,
        // Older versions did not write it, which makes their connections older than any new one.
        connected_at_ms: read_number(item, "connectedAt").unwrap_or_default(),
        previous: read_text(item, "previous").and_then(|id| id.parse().ok()),
        features: read_text(item, "features")
            .map(features_of_text)
            .unwrap_or_default(),
        policy: policy_of(item),
    })
}

pub(super) fn features_to_text(features: &[Feature]) -> String {
    serde_json::to_string(features).expect("a list of words has a JSON text")
}

pub(super) fn features_of_text(text: &str) -> Vec<Feature> {
    serde_json::from_str(text).unwrap_or_default()
}

pub(super) fn policy_to_text(policy: &VisitorPolicy) -> AttributeValue {
    AttributeValue::S(
        serde_json::to_string(policy).expect("lists of texts can always be encoded as JSON"),
    )
}

/// The visitor policy of an item, if it has one. Another version may have written it: one that cannot be read admits no one.
pub(super) fn policy_of(item: &Item) -> Option<Arc<VisitorPolicy>> {
    let policy = item.get("access")?;
    let read = policy
        .as_s()
        .ok()
        .and_then(|text| serde_json::from_str(text).ok());
    Some(Arc::new(read.unwrap_or_else(|| {
        error!(
            tunnel = read_text(item, "tunnelId"),
            "the visitor policy of a tunnel cannot be read; no visitor is admitted until its agent connects again"
        );
        VisitorPolicy::nobody()
    })))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use http::HeaderMap;

    use super::*;

    #[test]
    fn a_stored_policy_that_cannot_be_read_admits_no_one() {
        let address: IpAddr = "192.0.2.1".parse().expect("an address");
        let admits = |policy: Option<AttributeValue>| {
            let mut item = Item::from([
                ("owner".to_owned(), text("open")),
                ("connectionId".to_owned(), text("abc=")),
            ]);
            item.extend(policy.map(|policy| ("access".to_owned(), policy)));
            let online = tunnel(&item).expect("a tunnel").online.expect("online");
            online
                .policy
                .is_none_or(|policy| policy.admit(Some(address), &HeaderMap::new()).is_ok())
        };
        assert!(admits(None));
        assert!(admits(Some(text(r#"{"allow":["192.0.2.0/24"]}"#))));
        for unreadable in [
            text(""),
            text("{}"),
            text("null"),
            text(r#"{"allow":["192.0.2.0/24"],"captcha":true}"#),
            AttributeValue::Null(true),
            AttributeValue::Bool(false),
            AttributeValue::M(Item::new()),
        ] {
            assert!(!admits(Some(unreadable.clone())), "{unreadable:?}");
        }
    }
}
