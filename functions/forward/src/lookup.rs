//! Which connection serves a tunnel, remembered for a few seconds.
//!
//! What is remembered may be outdated. A connection that is gone, or that says it was replaced, has not taken the request: it is
//! forgotten, looked up afresh, and the request is sent to the one that serves now. `exchange` tells what else is sent again.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tracing::warn;
use tunnel_protocol::id::TunnelId;
use tunnel_service::{
    agents::AgentConnections,
    auth::{Identity, Revalidator, owner::Owner},
    now,
    tables::dynamodb::StoreError,
    tables::tunnels::{Online, TunnelsTable},
};

use crate::error::ForwardError;

/// How long a lookup is good. An agent that moves to another connection keeps the old one open for longer.
const LOOKUP_TTL: Duration = Duration::from_secs(5);
/// How long it is not asked again whether an owner's token is revoked.
const TOKEN_RECHECK_AFTER: Duration = Duration::from_secs(30);
/// Most tunnels, and most owners, remembered by one process.
const MAX_REMEMBERED: usize = 10_000;

#[derive(Debug)]
pub(crate) struct Lookup {
    tunnels: TunnelsTable,
    revalidator: Revalidator,
    agents: AgentConnections,
    /// Owners whose token was good, and when that was.
    verified: Mutex<HashMap<Owner, Instant>>,
    known: Mutex<HashMap<TunnelId, (Online, Instant)>>,
}

impl Lookup {
    pub(crate) fn new(
        tunnels: TunnelsTable,
        revalidator: Revalidator,
        agents: AgentConnections,
    ) -> Self {
        Self {
            tunnels,
            revalidator,
            agents,
            verified: Mutex::default(),
            known: Mutex::default(),
        }
    }

    /// The connection that serves a tunnel. One whose token is good no longer serves none: it is closed.
    ///
    /// # Errors
    /// When there is none, or DynamoDB does not answer.
    pub(crate) async fn find(&self, id: &TunnelId) -> Result<Online, ForwardError> {
        if let Some((online, since)) = self.lock().get(id)
            && since.elapsed() < LOOKUP_TTL
        {
            return Ok(online.clone());
        }
        let found = Box::pin(self.tunnels.get(id, now()))
            .await?
            .ok_or(ForwardError::NoSuchTunnel)?;
        let online = found.online.ok_or(ForwardError::Offline)?;
        if !Box::pin(self.is_good(&found.identity)).await? {
            warn!(tunnel = %id, connection = %online.connection_id, "closed: its token is revoked or expired");
            self.lost(id, &online).await?;
            self.agents.close(&online.connection_id).await?;
            return Err(ForwardError::Offline);
        }
        let mut known = self.lock();
        if known.len() >= MAX_REMEMBERED {
            known.clear();
        }
        known.insert(id.clone(), (online.clone(), Instant::now()));
        Ok(online)
    }

    async fn is_good(&self, identity: &Identity) -> Result<bool, StoreError> {
        let since = self.verified().get(&identity.owner).copied();
        if since.is_some_and(|since| since.elapsed() < TOKEN_RECHECK_AFTER) {
            return Ok(!identity.is_expired(now()));
        }
        let is_good = self.revalidator.is_still_valid(identity, now()).await?;
        let mut verified = self.verified();
        if is_good {
            if verified.len() >= MAX_REMEMBERED {
                verified.clear();
            }
            verified.insert(identity.owner.clone(), Instant::now());
        } else {
            verified.remove(&identity.owner);
        }
        Ok(is_good)
    }

    /// Forgets that `online` serves a tunnel.
    pub(crate) fn forget(&self, id: &TunnelId, online: &Online) {
        let mut known = self.lock();
        if known
            .get(id)
            .is_some_and(|(known, _)| known.connection_id == online.connection_id)
        {
            known.remove(id);
        }
    }

    /// Notes, for everybody, that `gone` does not serve a tunnel any more.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub(crate) async fn lost(&self, id: &TunnelId, gone: &Online) -> Result<(), ForwardError> {
        self.forget(id, gone);
        Box::pin(self.tunnels.mark_offline(id, &gone.connection_id, now())).await?;
        Ok(())
    }

    /// Held between awaits only.
    fn verified(&self) -> MutexGuard<'_, HashMap<Owner, Instant>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held between awaits only.
    fn lock(&self) -> MutexGuard<'_, HashMap<TunnelId, (Online, Instant)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
