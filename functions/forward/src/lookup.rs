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
use tunnel_shared::{
    cloud::{
        now,
        tunnels::{Online, Tunnels},
    },
    id::TunnelId,
};

use crate::refusal::Refusal;

/// How long a lookup is good. An agent that moves to another connection keeps the old one open for longer.
const GOOD: Duration = Duration::from_secs(5);
/// Most tunnels remembered by one process.
const REMEMBERED: usize = 10_000;

#[derive(Debug)]
pub(crate) struct Lookup {
    tunnels: Tunnels,
    known: Mutex<HashMap<TunnelId, (Online, Instant)>>,
}

impl Lookup {
    pub(crate) fn new(tunnels: Tunnels) -> Self {
        Self { tunnels, known: Mutex::default() }
    }

    /// The connection that serves a tunnel.
    ///
    /// # Errors
    /// When there is none, or DynamoDB does not answer.
    pub(crate) async fn find(&self, id: &TunnelId) -> Result<Online, Refusal> {
        if let Some((online, since)) = self.lock().get(id)
            && since.elapsed() < GOOD
        {
            return Ok(online.clone());
        }
        let found = Box::pin(self.tunnels.get(id, now())).await?.ok_or(Refusal::NoSuchTunnel)?;
        let online = found.online.ok_or(Refusal::Offline)?;
        let mut known = self.lock();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(id.clone(), (online.clone(), Instant::now()));
        Ok(online)
    }

    /// Forgets that `online` serves a tunnel.
    pub(crate) fn forget(&self, id: &TunnelId, online: &Online) {
        let mut known = self.lock();
        if known.get(id).is_some_and(|(known, _)| known.connection_id == online.connection_id) {
            known.remove(id);
        }
    }

    /// Notes, for everybody, that `gone` does not serve a tunnel any more.
    ///
    /// # Errors
    /// When DynamoDB does not answer.
    pub(crate) async fn lost(&self, id: &TunnelId, gone: &Online) -> Result<(), Refusal> {
        self.forget(id, gone);
        Box::pin(self.tunnels.go_offline(id, &gone.connection_id, now())).await?;
        Ok(())
    }

    /// Held between awaits only.
    fn lock(&self) -> MutexGuard<'_, HashMap<TunnelId, (Online, Instant)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
