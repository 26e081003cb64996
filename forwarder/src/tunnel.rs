//! One tunnel, kept open over as many connections as it takes. Before a connection's life ends the next one is opened and takes
//! over, and the old one finishes what it has.

use std::time::Duration;

use tokio::{
    task::{Id, JoinSet},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use tunnel_protocol::{
    backoff::Backoff,
    id::{ConnectionId, TunnelId},
    message::ConnectionEstablished,
};

use crate::{
    Observer,
    event::Event,
    handshake::{self, HandshakeError, Opened},
    origin::Origin,
    session::{Session, SessionEnd},
    settings::Settings,
    tunnel_ids::TunnelIdStore,
};

/// A session that was open for this long worked; the pause after it is a short one again.
const STABLE_AFTER: Duration = Duration::from_secs(5);
/// The first pause after a failed attempt is at most this long.
const MIN_PAUSE: Duration = Duration::from_millis(250);
/// No pause is longer: once the service can be reached again, a tunnel is back within seconds.
const MAX_PAUSE: Duration = Duration::from_millis(2500);
/// How long before the end of a connection's life the next one takes over: time for several tries, and for requests in flight.
const MOVE_MARGIN: Duration = Duration::from_secs(5 * 60);

/// Why a tunnel cannot be kept open by trying again.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TunnelError {
    /// The token is missing, unknown, expired or revoked.
    #[error(
        "the service refused this agent: pass a valid token with --token, TTF_TOKEN, or `token` in the config file"
    )]
    Unauthorized,
    /// The tunnel id is somebody else's.
    #[error("the tunnel id {0} belongs to somebody else: choose another with --tunnel-id")]
    NameTaken(String),
    /// What the agent asked for is not valid.
    #[error("the service does not accept what this agent asks for: {0}")]
    Invalid(String),
    /// The service does not know rules about visitors.
    #[error(
        "the service cannot keep visitors out of a tunnel, so none was opened: update the service, or do without --basic-auth, --allow, --deny and --require-header"
    )]
    Unprotected,
    /// The same owner has opened the tunnel elsewhere.
    #[error("{0}")]
    Replaced(String),
}

/// Keeps a tunnel open until `stop` is cancelled.
///
/// # Errors
/// When trying again would not help.
pub async fn run(
    settings: Settings,
    observer: Observer,
    stop: CancellationToken,
) -> Result<(), TunnelError> {
    let origin = Origin::new(&settings);
    let stop = stop.child_token();
    let memory = match &settings.memory {
        Some(file) if settings.tunnel_id.is_none() => {
            TunnelIdStore::open(file, &settings.endpoint, &settings.target).await
        }
        _ => None,
    };
    let recalled = memory.as_ref().and_then(TunnelIdStore::tunnel_id).cloned();
    let tunnel_id = settings.tunnel_id.clone().or(recalled.clone());
    let mut tunnel = Tunnel {
        tunnel_id,
        recalled,
        memory,
        settings,
        observer,
        origin,
        stop,
        sessions: JoinSet::new(),
    };
    let outcome = tunnel.keep_open().await;
    if outcome.is_err() {
        // What serves still takes nothing new: this agent is about to end.
        tunnel.stop.cancel();
    }
    // Sessions that were taken over from end with their last request, or when they are told to stop.
    while tunnel.sessions.join_next().await.is_some() {}
    outcome
}

struct Tunnel {
    settings: Settings,
    observer: Observer,
    origin: Origin,
    stop: CancellationToken,
    /// What is asked for: in the end what the service gave.
    tunnel_id: Option<TunnelId>,
    /// What the memory had, until the service has said whose it is.
    recalled: Option<TunnelId>,
    memory: Option<TunnelIdStore>,
    /// The one that serves the tunnel, and those it took over from.
    sessions: JoinSet<SessionEnd>,
}

/// The session that serves the tunnel.
struct Current {
    task: Id,
    connection: ConnectionId,
    opened: Instant,
    /// Cancelled when another takes over.
    notify_replaced: CancellationToken,
    move_at: Option<Instant>,
}

impl Tunnel {
    async fn keep_open(&mut self) -> Result<(), TunnelError> {
        let mut backoff = Backoff::new(MIN_PAUSE, MAX_PAUSE);
        let mut current: Option<Current> = None;
        loop {
            if let Some(serving) = &current {
                tokio::select! {
                    Some(ended) = self.sessions.join_next_with_id() => {
                        let (task, ended) = ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
                        if task != serving.task {
                            continue;
                        }
                        if serving.opened.elapsed() >= STABLE_AFTER {
                            backoff.reset();
                        }
                        current = None;
                        match ended {
                            SessionEnd::Stopped => return Ok(()),
                            SessionEnd::Replaced(reason) => return Err(TunnelError::Replaced(reason)),
                            SessionEnd::Lost(reason) => self.pause(&mut backoff, reason).await,
                        }
                        continue;
                    }
                    () = sleep_until(serving.move_at.unwrap_or(serving.opened)), if serving.move_at.is_some() => {}
                }
            } else {
                self.observe(Event::Connecting {
                    endpoint: self.settings.endpoint.to_string(),
                });
            }
            let previous = current.as_ref().map(|serving| serving.connection.clone());
            let opened = tokio::select! {
                opened = handshake::open(&self.settings, self.tunnel_id.as_ref(), previous.as_ref()) => opened,
                () = self.stop.cancelled() => return Ok(()),
            };
            match (opened, &mut current) {
                (Ok(opened), _) => {
                    if let Some(old) = current.take() {
                        backoff.reset();
                        old.notify_replaced.cancel();
                    }
                    current = Some(self.serve(opened));
                    self.remember().await;
                }
                (Err(HandshakeError::NameTaken), None) if self.recalled.take().is_some() => {
                    self.forget().await
                }
                (Err(HandshakeError::Unauthorized), _) => return Err(TunnelError::Unauthorized),
                (Err(HandshakeError::NameTaken), _) => {
                    return Err(TunnelError::NameTaken(
                        self.tunnel_id.take().map(String::from).unwrap_or_default(),
                    ));
                }
                (Err(HandshakeError::Invalid(said)), _) => return Err(TunnelError::Invalid(said)),
                (Err(HandshakeError::Unprotected), _) => return Err(TunnelError::Unprotected),
                // The one that serves goes on meanwhile.
                (Err(HandshakeError::Unreachable(_)), Some(serving)) => {
                    serving.move_at = Some(Instant::now() + backoff.next_pause())
                }
                (Err(HandshakeError::Unreachable(reason)), None) => {
                    self.pause(&mut backoff, reason).await
                }
            }
        }
    }

    fn serve(&mut self, opened: Opened) -> Current {
        let ConnectionEstablished {
            connection_id,
            tunnel_id,
            public_url,
            life_ms,
            ..
        } = opened.established.clone();
        self.tunnel_id = Some(tunnel_id);
        self.observe(Event::Online {
            public_url,
            target: self.origin.target().to_string(),
        });
        let notify_replaced = CancellationToken::new();
        let at = opened.at;
        let session = Session::new(
            &self.settings,
            &self.origin,
            self.observer.clone(),
            &opened.established,
        );
        let task = self
            .sessions
            .spawn(session.serve(opened.socket, self.stop.clone(), notify_replaced.clone()))
            .id();
        Current {
            task,
            connection: connection_id,
            opened: at,
            notify_replaced,
            move_at: life_ms.map(|life| at + move_after(life)),
        }
    }

    async fn remember(&mut self) {
        self.recalled = None;
        if let (Some(memory), Some(tunnel_id)) = (&mut self.memory, &self.tunnel_id) {
            memory.remember(tunnel_id).await;
        }
    }

    /// Forgets an id that has become somebody else's since the last run, and lets the service pick another.
    async fn forget(&mut self) {
        let forgotten = self.tunnel_id.take();
        warn!(
            tunnel_id = forgotten.map(String::from),
            "the tunnel id of the last run is somebody else's now"
        );
        if let Some(memory) = &mut self.memory {
            memory.forget().await;
        }
    }

    async fn pause(&self, backoff: &mut Backoff, reason: String) {
        let pause = backoff.next_pause();
        self.observe(Event::Reconnecting {
            reason,
            pause,
            attempt: backoff.attempt(),
        });
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = sleep(pause) => {}
        }
    }

    fn observe(&self, event: Event) {
        (self.observer)(&self.settings.name, event);
    }
}

/// When in a connection's life the next one takes over.
fn move_after(life_ms: u64) -> Duration {
    let life = Duration::from_millis(life_ms);
    life - MOVE_MARGIN.min(life.mul_f64(0.7))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_connection_takes_over_in_good_time() {
        assert_eq!(
            move_after(2 * 60 * 60 * 1000),
            Duration::from_secs(115 * 60)
        );
        assert_eq!(move_after(10_000), Duration::from_secs(3));
    }
}
