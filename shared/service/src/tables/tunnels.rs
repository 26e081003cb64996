//! The tunnels table: who owns a name, and which connection serves it now.

use std::{sync::Arc, time::Duration};

use aws_sdk_dynamodb::{
    operation::delete_item::DeleteItemError,
    types::{AttributeValue, ReturnValue},
};

use crate::tables::dynamodb::{
    Item, StoreError, Table, is_live, number, read_number, read_text, text,
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

/// How long a name that nobody uses stays its owner's.
pub const NAME_LEASE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// A tunnel.
#[derive(Clone, Debug, PartialEq)]
pub struct Tunnel {
    /// Whose it is. `expires_at` is of the proof with which it last went online.
    pub identity: Identity,
    /// The connection that serves it; none while it is offline.
    pub online: Option<Online>,
    /// When it last went online or offline, in seconds since 1970; 0 if it never was online.
    pub since: u64,
}

/// The connection that serves a tunnel.
#[derive(Clone, Debug, PartialEq)]
pub struct Online {
    /// The connection.
    pub connection_id: ConnectionId,
    /// What its agent announced.
    pub features: Vec<Feature>,
    /// Which visitors it lets in; all of them if there are no rules.
    pub access: Option<Arc<VisitorPolicy>>,
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
    /// When DynamoDB does not answer.
    pub async fn get(&self, id: &TunnelId, now: Duration) -> Result<Option<Tunnel>, StoreError> {
        let table = &self.0;
        let output = table
            .client
            .get_item()
            .table_name(&table.name)
            .key("tunnelId", text(id.as_str()))
            .consistent_read(true)
            .send()
            .await
            .map_err(table.failed("GetItem"))?;
        Ok(output
            .item
            .filter(|item| is_live(item, now))
            .and_then(|item| tunnel(&item)))
    }

    /// Makes the name `owner`'s if it is nobody's, and tells whether it is `owner`'s now.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn claim(
        &self,
        id: &TunnelId,
        owner: &Owner,
        now: Duration,
    ) -> Result<bool, StoreError> {
        let table = &self.0;
        let outcome = table
            .client
            .update_item()
            .table_name(&table.name)
            .key("tunnelId", text(id.as_str()))
            .update_expression("SET #owner = :owner, #ttl = :ttl")
            .condition_expression(
                "attribute_not_exists(tunnelId) OR #owner = :owner OR #ttl <= :now",
            )
            .expression_attribute_names("#owner", "owner")
            .expression_attribute_names("#ttl", "ttl")
            .expression_attribute_values(":owner", text(owner.to_string()))
            .expression_attribute_values(":ttl", number((now + NAME_LEASE).as_secs()))
            .expression_attribute_values(":now", number(now.as_secs()))
            .send()
            .await;
        Ok(table.conditional(outcome)?.is_some())
    }

    /// Lets `online` serve the tunnel, and returns the connection that served it until then. `None` when the tunnel is no
    /// longer its owner's.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn mark_online(
        &self,
        id: &TunnelId,
        identity: &Identity,
        online: &Online,
        now: Duration,
    ) -> Result<Option<Option<Online>>, StoreError> {
        let table = &self.0;
        // In one write with the connection: there is no moment in which it is served without its rules.
        let update = match &online.access {
            Some(_) => {
                "SET connectionId = :connection, features = :features, #access = :access, expiresAt = :expires, since = :now, #ttl = :ttl"
            }
            None => {
                "SET connectionId = :connection, features = :features, expiresAt = :expires, since = :now, #ttl = :ttl REMOVE #access"
            }
        };
        let expires_at = identity
            .expires_at
            .map_or(AttributeValue::Null(true), number);
        let outcome = table
            .client
            .update_item()
            .table_name(&table.name)
            .key("tunnelId", text(id.as_str()))
            .update_expression(update)
            .condition_expression("#owner = :owner")
            .expression_attribute_names("#access", "access")
            .expression_attribute_names("#owner", "owner")
            .expression_attribute_names("#ttl", "ttl")
            .set_expression_attribute_values(
                online
                    .access
                    .as_ref()
                    .map(|access| Item::from([(":access".to_owned(), access_to_text(access))])),
            )
            .expression_attribute_values(":owner", text(identity.owner.to_string()))
            .expression_attribute_values(":expires", expires_at)
            .expression_attribute_values(":connection", text(online.connection_id.as_str()))
            .expression_attribute_values(
                ":features",
                AttributeValue::S(features_to_text(&online.features)),
            )
            .expression_attribute_values(":now", number(now.as_secs()))
            .expression_attribute_values(":ttl", number((now + NAME_LEASE).as_secs()))
            .return_values(ReturnValue::UpdatedOld)
            .send()
            .await;
        let Some(output) = table.conditional(outcome)? else {
            return Ok(None);
        };
        let before = output.attributes.as_ref().and_then(online_of);
        Ok(Some(before.filter(|before| {
            before.connection_id != online.connection_id
        })))
    }

    /// All tunnels with their names, for whoever runs the service.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn list(&self, now: Duration) -> Result<Vec<(TunnelId, Tunnel)>, StoreError> {
        let items = self.0.scan().await?;
        let named = |item: &Item| Some((read_text(item, "tunnelId")?.parse().ok()?, tunnel(item)?));
        Ok(items
            .iter()
            .filter(|item| is_live(item, now))
            .filter_map(named)
            .collect())
    }

    /// Makes the name nobody's if it is `owner`'s, and returns what it was. `None` when it is not `owner`'s.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn release_owned(
        &self,
        id: &TunnelId,
        owner: &Owner,
    ) -> Result<Option<Tunnel>, StoreError> {
        let table = &self.0;
        let outcome = table
            .client
            .delete_item()
            .table_name(&table.name)
            .key("tunnelId", text(id.as_str()))
            .condition_expression("#owner = :owner")
            .expression_attribute_names("#owner", "owner")
            .expression_attribute_values(":owner", text(owner.to_string()))
            .return_values(ReturnValue::AllOld)
            .send()
            .await;
        match outcome {
            Ok(output) => Ok(output.attributes.as_ref().and_then(tunnel)),
            Err(error)
                if error
                    .as_service_error()
                    .is_some_and(DeleteItemError::is_conditional_check_failed_exception) =>
            {
                Ok(None)
            }
            Err(error) => Err(table.failed("DeleteItem")(error)),
        }
    }

    /// Makes the name nobody's, and tells whether it was somebody's.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
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

    /// Marks the tunnel offline if `connection` serves it, and tells whether it did.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub async fn mark_offline(
        &self,
        id: &TunnelId,
        connection: &ConnectionId,
        now: Duration,
    ) -> Result<bool, StoreError> {
        let table = &self.0;
        let outcome = table
            .client
            .update_item()
            .table_name(&table.name)
            .key("tunnelId", text(id.as_str()))
            .update_expression("REMOVE connectionId, #access SET since = :now, #ttl = :ttl")
            .condition_expression("connectionId = :connection")
            .expression_attribute_names("#access", "access")
            .expression_attribute_names("#ttl", "ttl")
            .expression_attribute_values(":connection", text(connection.as_str()))
            .expression_attribute_values(":now", number(now.as_secs()))
            .expression_attribute_values(":ttl", number((now + NAME_LEASE).as_secs()))
            .send()
            .await;
        Ok(table.conditional(outcome)?.is_some())
    }
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
        features: read_text(item, "features")
            .map(features_of_text)
            .unwrap_or_default(),
        access: item.get("access").map(|rules| Arc::new(access_of(rules))),
    })
}

pub(super) fn features_to_text(features: &[Feature]) -> String {
    serde_json::to_string(features).expect("a list of words has a JSON text")
}

pub(super) fn features_of_text(text: &str) -> Vec<Feature> {
    serde_json::from_str(text).unwrap_or_default()
}

fn access_to_text(access: &VisitorPolicy) -> AttributeValue {
    AttributeValue::S(serde_json::to_string(access).expect("lists of texts have a JSON text"))
}

/// The rules of an item, which another version may have written: what cannot be read lets nobody in.
fn access_of(rules: &AttributeValue) -> VisitorPolicy {
    let read = rules
        .as_s()
        .ok()
        .and_then(|text| serde_json::from_str(text).ok());
    read.unwrap_or_else(|| {
        error!("the access rules of a tunnel cannot be read; no visitor is let in until its agent connects again");
        VisitorPolicy::nobody()
    })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use http::HeaderMap;

    use super::*;

    #[test]
    fn rules_that_cannot_be_read_back_let_nobody_in() {
        let address: IpAddr = "192.0.2.1".parse().expect("an address");
        let admits = |rules: Option<AttributeValue>| {
            let mut item = Item::from([
                ("owner".to_owned(), text("open")),
                ("connectionId".to_owned(), text("abc=")),
            ]);
            item.extend(rules.map(|rules| ("access".to_owned(), rules)));
            let online = tunnel(&item).expect("a tunnel").online.expect("online");
            online
                .access
                .is_none_or(|access| access.admit(Some(address), &HeaderMap::new()).is_ok())
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
