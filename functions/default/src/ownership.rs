//! Who serves a tunnel: the newest of its owner's open connections that have sent `ready`.
//!
//! States are published by one function and believed by another, and messages, calls and answers are lost, late or repeated. So
//! nothing here trusts what it read earlier: a tunnel changes hands in one transaction, which fails if another connection was
//! faster, or if the connection that takes the tunnel has ended. Whoever fails looks again. And each check of a connection
//! sets right whatever was lost before: see [`Ownership::settle`].

use std::time::Duration;

use tracing::{info, warn};
use tunnel_protocol::{
    id::ConnectionId,
    message::{Feature, ToAgent},
};
use tunnel_service::{
    agents::{AgentConnections, PostError},
    now,
    tables::connections::{AgentConnection, Connection, ConnectionsTable, Opened},
    tables::dynamodb::StoreError,
    tables::tunnels::{Online, Tunnel, TunnelsTable},
};

use crate::DefaultRouteError;

/// How long a busy connection is tried before its notification is left to the next check.
pub(crate) const BUSY_TIMEOUT: Duration = Duration::from_millis(800);
/// How often a tunnel is looked at that changes hands meanwhile.
const ATTEMPTS: u32 = 5;
/// The reason sent to a connection that lost its tunnel to another one.
pub(crate) const TAKEN_OVER: &str = "another connection of the tunnel's owner has taken it over";
/// The reason sent to a connection whose tunnel id was released.
pub(crate) const RELEASED: &str = "the tunnel id was released and no longer belongs to this agent";

/// The tables and connections that decide who serves a tunnel.
#[derive(Clone, Debug)]
pub(crate) struct Ownership {
    pub(crate) tunnels: TunnelsTable,
    pub(crate) connections: ConnectionsTable,
    pub(crate) agents: AgentConnections,
}

/// A connection that has sent `ready`.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) id: ConnectionId,
    pub(crate) agent: AgentConnection,
    pub(crate) opened: Opened,
}

/// How a connection stands to its tunnel.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Standing {
    /// It serves the tunnel, in place of the connection named here, if that one has to be notified.
    Serves {
        /// The connection that served until now.
        before: Option<Online>,
    },
    /// A newer one serves the tunnel and named this one in `previous`; this one finishes what it has.
    Left,
    /// A newer one serves the tunnel.
    Outranked,
    /// The tunnel is its owner's no longer.
    Released,
    /// It has ended.
    Ended,
}

impl Candidate {
    /// A recorded connection, if it has sent `ready`.
    pub(crate) fn of(id: &ConnectionId, agent: AgentConnection) -> Option<Self> {
        let opened = agent.opened.clone()?;
        Some(Self {
            id: id.clone(),
            agent,
            opened,
        })
    }

    /// Whether a connection that serves is newer. One that an agent named in `previous` is the older one, whatever the clocks
    /// of two machines say.
    fn is_outranked_by(&self, serving: &Online) -> bool {
        if self.opened.previous.as_ref() == Some(&serving.connection_id) {
            return false;
        }
        serving.previous.as_ref() == Some(&self.id)
            || serving.is_newer_than(&self.id, self.agent.connected_at_ms)
    }

    /// Whether it serves this tunnel, which is its owner's.
    pub(crate) fn serves(&self, tunnel: &Tunnel) -> bool {
        tunnel.identity.owner == self.agent.identity.owner
            && tunnel.online.as_ref() == Some(&self.online())
    }

    /// The connection that has taken over from it at its agent's own wish, of this tunnel, which is its owner's.
    pub(crate) fn left_to<'t>(&self, tunnel: &'t Tunnel) -> Option<&'t ConnectionId> {
        let serving = tunnel.online.as_ref()?;
        let is_left = tunnel.identity.owner == self.agent.identity.owner
            && serving.previous.as_ref() == Some(&self.id)
            && self.is_outranked_by(serving);
        is_left.then_some(&serving.connection_id)
    }

    fn online(&self) -> Online {
        Online {
            connection_id: self.id.clone(),
            connected_at_ms: self.agent.connected_at_ms,
            previous: self.opened.previous.clone(),
            features: self.opened.features.clone(),
            policy: self.opened.policy.clone(),
        }
    }
}

impl Ownership {
    /// Lets a connection serve its tunnel if it should, and returns its standing then. It should if no connection does, if an older
    /// connection does, or if a newer one does that is gone.
    ///
    /// # Errors
    /// If the tables or @connections do not answer. Whether the tunnel has changed hands is not known then.
    pub(crate) async fn settle(
        &self,
        candidate: &Candidate,
    ) -> Result<Standing, DefaultRouteError> {
        let mut before = None;
        for _ in 0..ATTEMPTS {
            let before_last_attempt = before.take();
            let Some(tunnel) = self.tunnel_of(&candidate.agent).await? else {
                return Ok(Standing::Released);
            };
            let online = candidate.online();
            let from = match &tunnel.online {
                // The last attempt may have succeeded although its answer was lost; then the connection that served before it
                // still has to be notified.
                Some(serving) if *serving == online => {
                    return Ok(Standing::Serves {
                        before: before_last_attempt,
                    });
                }
                Some(serving) if serving.connection_id == candidate.id => Some(serving),
                Some(serving) => {
                    if candidate.is_outranked_by(serving)
                        && !self.is_gone(&serving.connection_id).await?
                    {
                        return Ok(if candidate.left_to(&tunnel).is_some() {
                            Standing::Left
                        } else {
                            Standing::Outranked
                        });
                    }
                    before = Some(serving.clone())
                        .filter(|before| online.previous.as_ref() != Some(&before.connection_id));
                    Some(serving)
                }
                None => None,
            };
            let is_taken = self
                .tunnels
                .hand_over(
                    &candidate.agent.tunnel_id,
                    from.map(|from| &from.connection_id),
                    &online,
                    &candidate.agent.identity,
                    &self.connections,
                    now(),
                )
                .await?;
            if is_taken {
                info!(tunnel = %candidate.agent.tunnel_id, "online");
                return Ok(Standing::Serves { before });
            }
            if self.connections.get(&candidate.id, now()).await?.is_none() {
                return Ok(Standing::Ended);
            }
        }
        Err(DefaultRouteError::Contended)
    }

    /// Keeps the records of a connection that is still open from expiring.
    ///
    /// # Errors
    /// If the tables do not answer.
    pub(crate) async fn keep(&self, candidate: &Candidate) -> Result<(), StoreError> {
        self.connections.keep(&candidate.id, now()).await?;
        let agent = &candidate.agent;
        self.tunnels
            .keep(&agent.tunnel_id, &agent.identity.owner, now())
            .await
    }

    /// Withdraws a connection that has settled and turned out to be gone: no other connection is notified, and the one that
    /// served before continues.
    ///
    /// # Errors
    /// If the tables or @connections do not answer.
    pub(crate) async fn withdraw(
        &self,
        gone: &Candidate,
        before: Option<&Online>,
    ) -> Result<(), DefaultRouteError> {
        self.tunnels
            .mark_offline(&gone.agent.tunnel_id, &gone.id, now())
            .await?;
        let Some(before) = before
            .map(|before| &before.connection_id)
            .or(gone.opened.previous.as_ref())
        else {
            return Ok(());
        };
        if let Some(Connection::Agent(agent)) = self.connections.get(before, now()).await?
            && let Some(before) = Candidate::of(before, agent)
            && before.agent.tunnel_id == gone.agent.tunnel_id
        {
            self.settle(&before).await?;
        }
        Ok(())
    }

    /// Tells a connection that it does not serve its tunnel, or closes it if its agent does not know that message. `ping` is the id
    /// of the `ping` that this answers. A check repeats it, so a failure only matters to the log.
    pub(crate) async fn notify_replaced(
        &self,
        connection: &ConnectionId,
        features: &[Feature],
        reason: &str,
        ping: Option<u32>,
    ) {
        let outcome = if features.contains(&Feature::Notices) {
            let replaced = ToAgent::Replaced {
                reason: reason.to_owned(),
                id: ping,
            };
            self.agents
                .post_patiently(connection, &replaced, BUSY_TIMEOUT)
                .await
        } else {
            self.agents.close(connection).await
        };
        match outcome {
            Ok(()) | Err(PostError::Gone | PostError::Unknown) => {}
            Err(error) => {
                warn!(
                    replaced = %connection,
                    error = &error as &dyn std::error::Error,
                    "could not be notified that it was replaced"
                );
            }
        }
    }

    /// Whether a connection is gone: it is not on record, or @connections does not know it. Only a connection that does not
    /// serve asks this about the one that does.
    async fn is_gone(&self, connection: &ConnectionId) -> Result<bool, DefaultRouteError> {
        if self.connections.get(connection, now()).await?.is_none() {
            return Ok(true);
        }
        Ok(!self.agents.is_open(connection).await?)
    }

    /// The tunnel of a connection, if it is its owner's still.
    async fn tunnel_of(&self, agent: &AgentConnection) -> Result<Option<Tunnel>, StoreError> {
        let tunnel = self.tunnels.get(&agent.tunnel_id, now()).await?;
        Ok(tunnel.filter(|tunnel| tunnel.identity.owner == agent.identity.owner))
    }
}
