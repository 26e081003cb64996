//! Which connection serves a tunnel, remembered for a few seconds.
//!
//! What is remembered may be outdated. A connection that is gone, or that says it was replaced, has not taken the request: it is
//! forgotten, looked up again, and the request is sent to the one that serves now. `exchange` decides what else is sent again.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tracing::warn;
use tunnel_protocol::id::TunnelId;
use tunnel_service::{
    agents::AgentConnections,
    aside::aside,
    auth::{Identity, Revalidator, owner::Owner},
    now,
    stopwatch::Stopwatch,
    tables::dynamodb::StoreError,
    tables::tunnels::{Online, TunnelsTable},
};

use crate::error::ForwardError;

/// How long a lookup counts, from when it was asked. An agent that moves to another connection keeps the old one open for longer.
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
    /// Owners whose token was valid, and when that was.
    verified: Mutex<HashMap<Owner, Stopwatch>>,
    known: Mutex<HashMap<TunnelId, Arc<Known>>>,
}

/// What is known of one tunnel. Locked while it is being asked, so that requests that come together ask once.
type Known = tokio::sync::Mutex<Option<Answer>>;

/// What a lookup found.
#[derive(Debug)]
struct Answer {
    asked: Stopwatch,
    found: Result<Online, NotServed>,
}

/// Why no connection serves a tunnel.
#[derive(Clone, Debug)]
enum NotServed {
    NoSuchTunnel,
    Offline,
    Failed(Arc<ForwardError>),
}

impl From<NotServed> for ForwardError {
    fn from(not_served: NotServed) -> Self {
        match not_served {
            NotServed::NoSuchTunnel => Self::NoSuchTunnel,
            NotServed::Offline => Self::Offline,
            NotServed::Failed(cause) => Self::Internal(Box::new(cause)),
        }
    }
}

impl From<ForwardError> for NotServed {
    fn from(error: ForwardError) -> Self {
        match error {
            ForwardError::NoSuchTunnel => Self::NoSuchTunnel,
            ForwardError::Offline => Self::Offline,
            cause => Self::Failed(Arc::new(cause)),
        }
    }
}

impl Answer {
    /// Whether it answers a request that came at `arrived`. Only a connection is remembered; anything else answers those who were
    /// waiting when it was asked.
    fn counts_for(&self, arrived: &Stopwatch) -> bool {
        arrived.is_older_than(&self.asked)
            || (self.found.is_ok() && self.asked.elapsed() < LOOKUP_TTL)
    }
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

    /// The connection that serves a tunnel. One whose token is not valid any more serves none: it is closed.
    ///
    /// # Errors
    /// If there is none, or DynamoDB does not answer.
    pub(crate) async fn find(&self, id: &TunnelId) -> Result<Online, ForwardError> {
        let arrived = Stopwatch::start();
        let known = self.known_of(id);
        let mut answer = known.lock().await;
        if let Some(answer) = &*answer
            && answer.counts_for(&arrived)
        {
            return answer.found.clone().map_err(ForwardError::from);
        }
        let asked = Stopwatch::start();
        let found = aside(|| self.ask(id)).await.map_err(NotServed::from);
        if found.is_err() {
            self.remove(id, &known);
        }
        *answer = Some(Answer {
            asked,
            found: found.clone(),
        });
        found.map_err(ForwardError::from)
    }

    async fn ask(&self, id: &TunnelId) -> Result<Online, ForwardError> {
        let found = self
            .tunnels
            .get(id, now())
            .await?
            .ok_or(ForwardError::NoSuchTunnel)?;
        let online = found.online.ok_or(ForwardError::Offline)?;
        if !self.is_valid(&found.identity).await? {
            warn!(tunnel = %id, closed = %online.connection_id, "closed: its token is revoked or expired");
            self.tunnels
                .mark_offline(id, &online.connection_id, now())
                .await?;
            self.agents.close(&online.connection_id).await?;
            return Err(ForwardError::Offline);
        }
        Ok(online)
    }

    async fn is_valid(&self, identity: &Identity) -> Result<bool, StoreError> {
        let verified = self.verified().get(&identity.owner).copied();
        if verified.is_some_and(|verified| verified.elapsed() < TOKEN_RECHECK_AFTER) {
            return Ok(!identity.is_expired(now()));
        }
        let asked = Stopwatch::start();
        let is_valid = self.revalidator.is_still_valid(identity, now()).await?;
        let mut verified = self.verified();
        if is_valid {
            if verified.len() >= MAX_REMEMBERED {
                verified.clear();
            }
            verified.insert(identity.owner.clone(), asked);
        } else {
            verified.remove(&identity.owner);
        }
        Ok(is_valid)
    }

    /// Forgets that `online` serves a tunnel.
    pub(crate) fn forget(&self, id: &TunnelId, online: &Online) {
        let known = self.known_of(id);
        let is_other = known.try_lock().is_ok_and(|answer| {
            answer.as_ref().is_some_and(|answer| {
                answer
                    .found
                    .as_ref()
                    .is_ok_and(|found| found.connection_id != online.connection_id)
            })
        });
        // What is being asked at this moment may find the same once more: later requests do not wait for it.
        if !is_other {
            self.remove(id, &known);
        }
    }

    /// Records, for all processes, that `gone` no longer serves a tunnel.
    ///
    /// # Errors
    /// If DynamoDB does not answer.
    pub(crate) async fn lost(&self, id: &TunnelId, gone: &Online) -> Result<(), ForwardError> {
        self.forget(id, gone);
        aside(|| self.tunnels.mark_offline(id, &gone.connection_id, now())).await?;
        Ok(())
    }

    fn known_of(&self, id: &TunnelId) -> Arc<Known> {
        let mut known = self.known();
        if known.len() >= MAX_REMEMBERED && !known.contains_key(id) {
            known.clear();
        }
        known.entry(id.clone()).or_default().clone()
    }

    fn remove(&self, id: &TunnelId, former: &Arc<Known>) {
        let mut known = self.known();
        if known
            .get(id)
            .is_some_and(|known| Arc::ptr_eq(known, former))
        {
            known.remove(id);
        }
    }

    /// Held between awaits only.
    fn verified(&self) -> MutexGuard<'_, HashMap<Owner, Stopwatch>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held between awaits only.
    fn known(&self) -> MutexGuard<'_, HashMap<TunnelId, Arc<Known>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
