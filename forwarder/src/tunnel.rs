//! One tunnel, kept open over as many connections as it takes. Before a connection's life ends the next one is opened and takes
//! over, and the old one finishes what it has.

use std::{future::pending, sync::Arc, time::Duration};

use tokio::{
    sync::Semaphore,
    task::{AbortHandle, Id, JoinError, JoinSet},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, info_span, warn};
use tunnel_protocol::{
    backoff::Backoff,
    body::budget::BodyBudget,
    id::{ConnectionId, TunnelId},
};

use crate::{
    Observer,
    event::Event,
    handshake::{self, HandshakeError, Opened},
    inspector::Recorder,
    origin::Origin,
    seen_requests::SeenRequests,
    session::{Session, SessionEnd, TunnelContext},
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
/// A service that announces a shorter life than this is taken for one that announces this: each connection has its price.
const MIN_LIFE: Duration = Duration::from_secs(2);
/// Connections that were left and are still open, for what they carry. With more, the one that was left first is cut: visitors
/// could otherwise have an agent open connections until the service takes no more. It is past the life that the service gave it,
/// because an agent does not move that often within one.
const MAX_LEFT: usize = 32;
/// Longer than any connection lives; what is announced beyond is not counted with.
const MAX_LIFE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Why a tunnel cannot be kept open by trying again.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TunnelError {
    /// The token is missing, unknown, expired or revoked.
    #[error(
        "the service refused this agent: run `ttf login ENDPOINT`, or pass a valid token with --token, TTF_TOKEN, or `token` in the config file"
    )]
    Unauthorized,
    /// The tunnel id belongs to another owner.
    #[error("the tunnel id {0} belongs to another owner: choose another with --tunnel-id")]
    NameTaken(String),
    /// The first connection failed for a reason that time does not mend.
    #[error("{0}; it is not tried again, as --keep-trying would")]
    Misdirected(String),
    /// The service refused the handshake as invalid.
    #[error("the service refused the handshake: {0}")]
    Invalid(String),
    /// The service does not know rules about visitors.
    #[error(
        "the service is too old to enforce visitor rules, so no tunnel was opened: update the service, or start without --basic-auth, --allow, --deny and --require-header"
    )]
    Unprotected,
    /// The same owner has opened the tunnel elsewhere.
    #[error("{0}")]
    Replaced(String),
}

/// Keeps a tunnel open until `stop` is cancelled. What it holds of bodies counts towards `budget`, and `recorder` records its
/// requests.
///
/// # Errors
/// If trying again would not help.
pub async fn run(
    settings: Settings,
    observer: Observer,
    budget: BodyBudget,
    recorder: Recorder,
    stop: CancellationToken,
) -> Result<(), TunnelError> {
    let memory = match &settings.memory {
        Some(file) if settings.tunnel_id.is_none() => {
            TunnelIdStore::open(file, &settings.endpoint, &settings.target).await
        }
        _ => None,
    };
    let recalled = memory.as_ref().and_then(TunnelIdStore::tunnel_id).cloned();
    let mut tunnel = Tunnel {
        tunnel_id: settings.tunnel_id.clone().or(recalled.clone()),
        recalled,
        memory,
        context: TunnelContext {
            origin: Origin::new(&settings),
            permits: Arc::new(Semaphore::new(
                settings.max_concurrent.min(Semaphore::MAX_PERMITS),
            )),
            seen: SeenRequests::default(),
            settings: Arc::new(settings),
            observer,
            budget,
            recorder,
        },
        stop: stop.child_token(),
        backoff: Backoff::new(MIN_PAUSE, MAX_PAUSE),
        has_been_online: false,
        sessions: JoinSet::new(),
        left: LeftSessions::default(),
    };
    let outcome = tunnel.keep_open().await;
    if outcome.is_err() {
        // What serves still takes nothing new: this agent is about to end.
        tunnel.stop.cancel();
    }
    // Sessions that have handed over end with their last request, or when they are stopped.
    while tunnel.sessions.join_next().await.is_some() {}
    outcome
}

struct Tunnel {
    context: TunnelContext,
    stop: CancellationToken,
    /// The id to request: once the service has assigned one, that one.
    tunnel_id: Option<TunnelId>,
    /// The remembered id, until the service has accepted or refused it.
    recalled: Option<TunnelId>,
    memory: Option<TunnelIdStore>,
    backoff: Backoff,
    has_been_online: bool,
    /// The one that serves the tunnel, and those it took over from.
    sessions: JoinSet<SessionEnd>,
    left: LeftSessions,
}

/// The session that serves the tunnel.
struct Current {
    task: AbortHandle,
    connection: ConnectionId,
    opened: Instant,
    /// Cancelled when another takes over.
    moved: CancellationToken,
    /// Cancelled when another agent has taken over for good: then there are no more moves.
    replaced: CancellationToken,
    move_at: Option<Instant>,
}

impl Current {
    /// Completes when it is time for the next connection.
    async fn move_due(&self) {
        match self.move_at {
            Some(at) if !self.replaced.is_cancelled() => sleep_until(at).await,
            _ => pending().await,
        }
    }
}

impl Tunnel {
    async fn keep_open(&mut self) -> Result<(), TunnelError> {
        while let Some(current) = self.until_online().await? {
            match self.while_online(current).await? {
                SessionEnd::Stopped => return Ok(()),
                SessionEnd::Replaced(reason) => return Err(TunnelError::Replaced(reason)),
                SessionEnd::Lost(reason) => self.pause(reason).await,
            }
        }
        Ok(())
    }

    /// Tries until a connection is open; `None` if stopped.
    async fn until_online(&mut self) -> Result<Option<Current>, TunnelError> {
        loop {
            self.observe(Event::Connecting {
                endpoint: self.context.settings.endpoint.to_string(),
                proxy: self
                    .context
                    .settings
                    .proxy
                    .as_ref()
                    .map(ToString::to_string),
            });
            let opened = tokio::select! {
                opened = handshake::open(&self.context.settings, self.tunnel_id.as_ref(), None) => opened,
                () = self.stop.cancelled() => return Ok(None),
            };
            match opened {
                Ok(opened) => return Ok(Some(self.serve(opened).await)),
                Err(HandshakeError::Misdirected(reason)) if self.gives_up() => {
                    return Err(TunnelError::Misdirected(reason));
                }
                Err(HandshakeError::Misdirected(reason) | HandshakeError::Unreachable(reason)) => {
                    self.pause(reason).await;
                }
                Err(HandshakeError::NameTaken) if self.recalled.take().is_some() => {
                    self.forget().await;
                }
                Err(error) => return Err(self.refused(error)),
            }
        }
    }

    /// Lets `current` serve, and moves to the next connection before its life ends. Returns how the one that served last ended.
    async fn while_online(&mut self, mut current: Current) -> Result<SessionEnd, TunnelError> {
        loop {
            tokio::select! {
                end = session_end(&mut self.sessions, current.task.id()) => return Ok(self.ended(&current, end)),
                () = current.move_due() => {}
            }
            let opened = match self.open_next(&current).await {
                Ok(opened) => opened,
                Err(end) => return Ok(self.ended(&current, end)),
            };
            match opened {
                Ok(opened) => {
                    self.backoff.reset();
                    current.moved.cancel();
                    self.left.add(current.task.clone());
                    current = self.serve(opened).await;
                }
                // The one that serves continues meanwhile.
                Err(HandshakeError::Misdirected(reason) | HandshakeError::Unreachable(reason)) => {
                    debug!(reason, "the next connection could not be opened");
                    current.move_at = Some(Instant::now() + self.backoff.next_pause());
                }
                Err(error) => return Err(self.refused(error)),
            }
        }
    }

    /// Opens the connection that takes over from `current`. Returns how `current` ended if there is nothing to follow it.
    async fn open_next(
        &mut self,
        current: &Current,
    ) -> Result<Result<Opened, HandshakeError>, SessionEnd> {
        let mut opening = std::pin::pin!(handshake::open(
            &self.context.settings,
            self.tunnel_id.as_ref(),
            Some(&current.connection),
        ));
        let mut end = None;
        let opened = tokio::select! {
            opened = &mut opening => opened,
            ended = session_end(&mut self.sessions, current.task.id()) => {
                if matches!(ended, SessionEnd::Stopped) {
                    return Err(ended);
                }
                end = Some(ended);
                tokio::select! {
                    opened = opening => opened,
                    () = self.stop.cancelled() => return Err(SessionEnd::Stopped),
                }
            }
        };
        // The service may have let the next connection take over already, and ended the agent that had replaced this one: then
        // nobody is left unless this agent goes on.
        let is_ending = end.is_some() || current.replaced.is_cancelled();
        match (opened, end) {
            (Err(HandshakeError::Unreachable(reason)), _) if is_ending => {
                Err(SessionEnd::Lost(reason))
            }
            (Err(_), Some(end)) => Err(end),
            (opened, _) => Ok(opened),
        }
    }

    fn ended(&mut self, current: &Current, end: SessionEnd) -> SessionEnd {
        if current.opened.elapsed() >= STABLE_AFTER {
            self.backoff.reset();
        }
        end
    }

    fn refused(&mut self, error: HandshakeError) -> TunnelError {
        match error {
            HandshakeError::Unauthorized => TunnelError::Unauthorized,
            HandshakeError::NameTaken => {
                TunnelError::NameTaken(self.tunnel_id.take().map(String::from).unwrap_or_default())
            }
            HandshakeError::Unprotected => TunnelError::Unprotected,
            HandshakeError::Invalid(reason)
            | HandshakeError::Misdirected(reason)
            | HandshakeError::Unreachable(reason) => TunnelError::Invalid(reason),
        }
    }

    /// Whether what time does not mend ends the tunnel: a mistyped endpoint has never worked.
    fn gives_up(&self) -> bool {
        !self.has_been_online && !self.context.settings.keep_trying
    }

    async fn serve(&mut self, opened: Opened) -> Current {
        let established = &opened.established;
        self.has_been_online = true;
        self.tunnel_id = Some(established.tunnel_id.clone());
        self.observe(Event::Online {
            public_url: established.public_url.clone(),
            browser_url: established
                .subdomain_url
                .clone()
                .filter(|url| *url != established.public_url),
            target: self.context.origin.target().to_string(),
        });
        let connection = established.connection_id.clone();
        let at = opened.at;
        let move_at = established.life_ms.map(|life| at + move_after(life));
        let span = info_span!("connection", id = %connection);
        let session = span.in_scope(|| Session::new(self.context.clone(), opened));
        let moved = session.moved();
        let replaced = session.replaced();
        let serving = session.serve(self.stop.clone());
        let current = Current {
            task: self.sessions.spawn(serving.instrument(span)),
            connection,
            opened: at,
            moved,
            replaced,
            move_at,
        };
        self.remember().await;
        current
    }

    async fn remember(&mut self) {
        self.recalled = None;
        if let (Some(memory), Some(tunnel_id)) = (&mut self.memory, &self.tunnel_id) {
            memory.remember(tunnel_id).await;
        }
    }

    /// Forgets a remembered id that now belongs to another owner, and lets the service pick another.
    async fn forget(&mut self) {
        let forgotten = self.tunnel_id.take();
        warn!(
            tunnel_id = forgotten.map(String::from),
            "the remembered tunnel id now belongs to another owner"
        );
        if let Some(memory) = &mut self.memory {
            memory.forget().await;
        }
    }

    async fn pause(&mut self, reason: String) {
        let pause = self.backoff.next_pause();
        self.observe(Event::Reconnecting {
            reason,
            pause,
            attempt: self.backoff.attempt(),
        });
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = sleep(pause) => {}
        }
    }

    fn observe(&self, event: Event) {
        (self.context.observer)(&self.context.settings.name, event);
    }
}

/// The end of the session that `task` runs. Those of others are taken from the set.
async fn session_end(sessions: &mut JoinSet<SessionEnd>, task: Id) -> SessionEnd {
    loop {
        match sessions.join_next_with_id().await {
            Some(Ok((id, end))) if id == task => return end,
            Some(Ok(_)) => {}
            Some(Err(error)) => resume_panic(error),
            None => pending().await,
        }
    }
}

/// Passes a panic on. A session that was cut needs no more.
fn resume_panic(error: JoinError) {
    if let Ok(panic) = error.try_into_panic() {
        std::panic::resume_unwind(panic);
    }
}

/// Sessions that another has taken over from, the first one left first.
#[derive(Default)]
struct LeftSessions(Vec<AbortHandle>);

impl LeftSessions {
    /// Adds a session, and cuts the first ones if there are too many.
    fn add(&mut self, session: AbortHandle) {
        self.0.push(session);
        self.0.retain(|session| !session.is_finished());
        let surplus = self.0.len().saturating_sub(MAX_LEFT);
        for session in self.0.drain(..surplus) {
            warn!(
                "a connection that was left long ago is cut, with the upgraded connections that it still carries"
            );
            session.abort();
        }
    }
}

/// When in a connection's life the next one takes over.
fn move_after(life_ms: u64) -> Duration {
    let life = Duration::from_millis(life_ms).clamp(MIN_LIFE, MAX_LIFE);
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

    #[tokio::test]
    async fn visitors_cannot_keep_open_more_than_some_connections_that_were_left() {
        let mut sessions = JoinSet::new();
        let mut left = LeftSessions::default();
        let ended = sessions.spawn(async { SessionEnd::Stopped });
        while sessions.join_next().await.is_some() {}
        left.add(ended);
        let first = sessions.spawn(pending());
        left.add(first.clone());
        for _ in 1..MAX_LEFT {
            left.add(sessions.spawn(pending()));
        }
        assert_eq!(left.0.len(), MAX_LEFT);
        left.add(sessions.spawn(pending()));
        let cut = sessions.join_next_with_id().await.expect("one");
        assert_eq!(cut.expect_err("cut").id(), first.id());
        assert_eq!(left.0.len(), MAX_LEFT);
    }

    #[test]
    fn a_service_cannot_make_the_agent_open_connections_without_a_pause() {
        for life_ms in [0, 1, 500] {
            assert!(
                move_after(life_ms) >= Duration::from_millis(500),
                "{life_ms}"
            );
        }
        assert!(move_after(u64::MAX) > Duration::from_secs(60 * 60));
    }
}
