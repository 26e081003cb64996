//! Which agents may stay, asked again and again: API Gateway does not, but here an agent whose token was revoked leaves though it
//! sends nothing and has no visitors.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{Instrument, error, warn};
use tunnel_local_aws::{dynamodb::Database, revision::Revision};
use tunnel_protocol::id::ConnectionId;
use tunnel_service::{now, telemetry::connection_span};

use crate::front::agents::AgentFront;

/// Shortest pause between two checks.
const MIN_INTERVAL: Duration = Duration::from_millis(1);
/// How long nobody is looked up while nothing changes. What ends by itself and not by a write, as a record does whose time is over, is
/// noticed then, if no agent's `ping` has been faster.
const MAX_UNSEEN: Duration = Duration::from_secs(5 * 60);

/// What was found when every open connection was as it should be.
struct Settled {
    revision: Revision,
    open: Vec<ConnectionId>,
    found_at: Instant,
    /// When the first of the agents' credentials expires, as the time since 1970.
    next_expiry: Option<Duration>,
}

impl Settled {
    /// Whether it is still so: the same connections are open, nothing was written and nothing has expired.
    fn holds(&self, revision: Revision, open: &[ConnectionId]) -> bool {
        self.revision == revision
            && self.found_at.elapsed() < MAX_UNSEEN
            && self.next_expiry.is_none_or(|expiry| now() < expiry)
            && self.open == open
    }
}

impl AgentFront {
    /// Checks the open connections until they are to end. While nothing changes nobody is looked up, however many agents there are.
    pub(crate) async fn recheck(self: Arc<Self>, tables: Database) {
        let mut due = interval(self.quotas.recheck.max(MIN_INTERVAL));
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut settled = None;
        loop {
            tokio::select! {
                () = self.stopping.cancelled() => return,
                _ = due.tick() => {}
            }
            settled = self.recheck_once(&tables, settled).await;
        }
    }

    /// Checks the open connections unless they are still as they were; returns how they are if all are as they should be.
    async fn recheck_once(&self, tables: &Database, before: Option<Settled>) -> Option<Settled> {
        // Read first: what is written while the connections are looked at is noticed the next time.
        let revision = tables
            .revision()
            .await
            .inspect_err(|error| warn!(%error, "cannot tell whether anything has changed: all connections are checked"))
            .ok();
        let open = self.connections.ids();
        if let Some((before, revision)) = before.zip(revision)
            && before.holds(revision, &open)
        {
            return Some(before);
        }
        let found_at = Instant::now();
        let survey = match self.default.survey(&open).await {
            Ok(survey) => survey,
            Err(error) => {
                error!(
                    error = &error as &dyn std::error::Error,
                    "connections could not be checked"
                );
                return None;
            }
        };
        for connection in &survey.unsettled {
            let span = connection_span(connection);
            if let Err(error) = self.default.check(connection, None).instrument(span).await {
                error!(%connection, error = &error as &dyn std::error::Error, "could not be checked");
            }
        }
        if !survey.unsettled.is_empty() {
            return None;
        }
        let next_expiry = survey.next_expiry;
        Some(Settled {
            revision: revision?,
            open,
            found_at,
            next_expiry,
        })
    }
}
