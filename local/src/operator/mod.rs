//! What the operator sees of a running server: `metrics` counts, `access_log` has a line for each request, and `admin_api` answers
//! at an address of its own. `visit` is what is noted of one request.

mod access_log;
pub(crate) mod admin_api;
pub(crate) mod admin_listener;
mod exposition;
pub(crate) mod listing;
mod metrics;
mod visit;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::Request;
use tunnel_protocol::id::{ConnectionId, TunnelId};
use tunnel_service::{auth::owner::Owner, now};

use crate::front::forwarded::{Peer, TrustedProxies};

pub use access_log::{AccessLogFormat, AccessLogFormatError, AccessLogOptions, AccessLogTarget};

pub(crate) use self::{
    access_log::AccessLog,
    metrics::{HANDSHAKE_CODES, Metrics},
    visit::{UpgradedVisit, Visit},
};

/// How many tunnels are remembered for telling agents that come back from new ones.
const MAX_KNOWN_TUNNELS: usize = 100_000;

/// Takes note of what happens. The fronts share it.
#[derive(Debug)]
pub(crate) struct Observer {
    pub(crate) metrics: Metrics,
    pub(crate) access_log: Option<AccessLog>,
    /// Says where visitors and agents come from.
    pub(crate) proxies: Arc<TrustedProxies>,
    agents: Mutex<Agents>,
}

#[derive(Debug, Default)]
struct Agents {
    open: HashMap<ConnectionId, OpenAgent>,
    /// Tunnels that have had an agent since the start.
    known: HashSet<TunnelId>,
}

/// An agent's open connection.
#[derive(Clone, Debug)]
pub(crate) struct OpenAgent {
    /// Its tunnel.
    pub(crate) tunnel: TunnelId,
    /// Who it authenticated as.
    pub(crate) owner: Owner,
    /// Where it connects from.
    pub(crate) address: String,
    /// When it connected, since 1970.
    pub(crate) connected_at: Duration,
}

/// Counts an agent's connection as open until it is dropped.
#[derive(Debug)]
pub(crate) struct AgentVisit {
    observer: Arc<Observer>,
    connection: ConnectionId,
}

impl Observer {
    /// Takes note of everything; of each tunnel's requests for itself only if asked to.
    pub(crate) fn new(
        proxies: Arc<TrustedProxies>,
        access_log: Option<AccessLog>,
        per_tunnel: bool,
    ) -> Self {
        Self {
            metrics: Metrics::new(per_tunnel),
            access_log,
            proxies,
            agents: Mutex::default(),
        }
    }

    /// A visitor's request has begun.
    pub(crate) fn visit<B>(self: &Arc<Self>, request: &Request<B>, peer: &Peer) -> Arc<Visit> {
        Arc::new(Visit::new(self.clone(), request, peer))
    }

    /// An agent's handshake is accepted.
    pub(crate) fn agent(
        self: &Arc<Self>,
        connection: ConnectionId,
        tunnel: TunnelId,
        owner: Owner,
        address: String,
    ) -> AgentVisit {
        let mut agents = self.agents();
        if agents.known.len() >= MAX_KNOWN_TUNNELS {
            agents.known.clear();
        }
        let is_new = agents.known.insert(tunnel.clone());
        let agent = OpenAgent {
            tunnel,
            owner,
            address,
            connected_at: now(),
        };
        agents.open.insert(connection.clone(), agent);
        drop(agents);
        self.metrics.agent_connected(is_new);
        AgentVisit {
            observer: self.clone(),
            connection,
        }
    }

    /// The agents that are connected.
    pub(crate) fn open_agents(&self) -> Vec<(ConnectionId, OpenAgent)> {
        let agents = self.agents();
        agents
            .open
            .iter()
            .map(|(connection, agent)| (connection.clone(), agent.clone()))
            .collect()
    }

    /// How many agents are connected.
    pub(crate) fn agent_count(&self) -> usize {
        self.agents().open.len()
    }

    /// Held between awaits only.
    fn agents(&self) -> MutexGuard<'_, Agents> {
        self.agents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AgentVisit {
    /// Notes how the connection has ended.
    pub(crate) fn ended(&self, how: &str) {
        self.observer.metrics.agent_left(how);
    }
}

impl Drop for AgentVisit {
    fn drop(&mut self) {
        self.observer.agents().open.remove(&self.connection);
    }
}
