//! An agent by the book (docs/protocol.md), without sockets.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::info;

use crate::cloud::{Cloud, Line};

/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(15);
/// How often it pings.
pub(crate) const PING_INTERVAL: Duration = Duration::from_secs(15);
/// How long the connection before takes requests after a move.
const HANDOVER_TIME: Duration = Duration::from_secs(7);
/// Shortest and longest pause between two handshakes: longer than the clocks of two machines differ.
const MIN_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(3);

/// What it did, for the verdict. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record(Arc<Mutex<Done>>);

#[derive(Debug, Default)]
pub(crate) struct Done {
    /// Requests that were carried out, by number.
    pub(crate) executed: Vec<usize>,
    /// The connection on which it believes to serve, and when that was opened.
    pub(crate) serving: Option<(String, u64)>,
    /// It has ended, for this reason.
    pub(crate) ended: Option<&'static str>,
    /// A connection was established at some time.
    pub(crate) has_served: bool,
}

impl Record {
    /// Held between awaits only.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Done> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One agent.
pub(crate) struct Agent {
    pub(crate) cloud: Cloud,
    pub(crate) token: String,
    pub(crate) record: Record,
    /// How often it moves or loses its connection on average, while there is a storm.
    pub(crate) restlessness: Duration,
}

/// How a time of serving ends.
enum Turn {
    /// The service closed the connection.
    Closed,
    /// It is time for another connection.
    Moves,
    /// Another agent serves.
    Replaced,
}

/// What the agent knows of a connection.
struct Session {
    line: Line,
    is_established: bool,
    asks_again: bool,
    is_replaced: bool,
    /// `replaced` has overtaken `connection_established`.
    is_early_replaced: bool,
    /// The id of the last `ping`.
    last_ping: u64,
    /// The highest id of those that were answered with `pong`.
    last_pong: u64,
    /// The id of the last that asked whether `replaced` is true.
    last_question: u64,
    seen: HashSet<String>,
}

impl Agent {
    /// Keeps the tunnel open until another agent has taken it over or the service refuses.
    pub(crate) async fn run(self) {
        let mut main: Option<Session> = None;
        loop {
            let previous = main.as_ref().map(|session| session.line.id.to_string());
            let opened = match &mut main {
                None => timeout(HANDSHAKE_TIMEOUT, self.open(previous)).await,
                Some(serving) => {
                    let opening = timeout(HANDSHAKE_TIMEOUT, self.open(previous));
                    tokio::pin!(opening);
                    tokio::select! {
                        biased;
                        opened = &mut opening => opened,
                        // It goes on serving meanwhile.
                        turn = self.serve(serving, None) => {
                            main = None;
                            let opened = opening.await;
                            // The next connection may have taken over from the agent that replaced this one, also if its answer
                            // was lost. Only one that was refused has not.
                            if matches!(turn, Turn::Replaced) && matches!(opened, Ok(Err(401 | 403 | 409))) {
                                return self.end("replaced");
                            }
                            opened
                        }
                    }
                }
            };
            match opened {
                Ok(Ok(session)) => {
                    if let Some(old) = main.replace(session) {
                        self.retire(old);
                    }
                }
                Ok(Err(401 | 403 | 409)) => return self.end("refused"),
                Ok(Err(_)) | Err(_) => self.pause().await,
            }
            if let Some(session) = &mut main {
                let until = self.next_change();
                match self.serve(session, until).await {
                    Turn::Replaced => return self.end("replaced"),
                    Turn::Moves if self.cloud.weather().one_in(2) => {}
                    Turn::Closed | Turn::Moves => {
                        main = None;
                        self.record.lock().serving = None;
                        self.pause().await;
                    }
                }
            }
        }
    }

    async fn pause(&self) {
        sleep(MIN_PAUSE + self.cloud.weather().time(MAX_PAUSE)).await;
    }

    fn next_change(&self) -> Option<Instant> {
        let weather = self.cloud.weather();
        (!weather.is_calm()).then(|| Instant::now() + weather.time(2 * self.restlessness))
    }

    fn end(&self, reason: &'static str) {
        info!(reason, "agent ends");
        let mut done = self.record.lock();
        done.ended = Some(reason);
        done.serving = None;
    }

    /// The handshake. What comes before `connection_established` counts.
    async fn open(&self, previous: Option<String>) -> Result<Session, u16> {
        let mut session = Session {
            line: self.cloud.connect(&self.token).await?,
            is_established: false,
            asks_again: false,
            is_replaced: false,
            is_early_replaced: false,
            last_ping: 0,
            last_pong: 0,
            last_question: 0,
            seen: HashSet::new(),
        };
        let ready = json!({
            "type": "ready",
            "protocol": 1,
            "features": ["body_parts", "cancel", "notices", "window", "access"],
            "previous": previous,
        });
        info!(connection = %session.line.id, connected_at = session.line.connected_at, ready = %ready["previous"], "agent connects");
        self.cloud.send(&session.line.id, &ready);
        while !session.is_established {
            let text = session.line.inbox.recv().await.ok_or(500_u16)?;
            self.take(&mut session, &text, true);
        }
        Ok(session)
    }

    /// Serves until something changes.
    async fn serve(&self, session: &mut Session, mut until: Option<Instant>) -> Turn {
        {
            let mut done = self.record.lock();
            done.has_served = true;
            done.serving = Some((session.line.id.to_string(), session.line.connected_at));
        }
        let mut ping_at = Instant::now() + PING_INTERVAL;
        let turn = loop {
            tokio::select! {
                biased;
                text = session.line.inbox.recv() => match text {
                    Some(text) => self.take(session, &text, true),
                    None => break Turn::Closed,
                },
                () = sleep_until(ping_at) => {
                    ping_at = Instant::now() + PING_INTERVAL;
                    self.ping(session);
                }
                () = sleep_until(until.unwrap_or(ping_at)), if until.is_some() => {
                    if !self.cloud.weather().is_calm() {
                        break Turn::Moves;
                    }
                    until = None;
                }
            }
            if session.is_replaced {
                break Turn::Replaced;
            }
        };
        if !matches!(turn, Turn::Moves) {
            self.record.lock().serving = None;
        }
        turn
    }

    /// Takes requests on the connection before for a while, and then refuses them for a while.
    fn retire(&self, mut old: Session) {
        let agent = Self {
            cloud: self.cloud.clone(),
            token: String::new(),
            record: self.record.clone(),
            restlessness: self.restlessness,
        };
        self.cloud.spawn(async move {
            for takes in [true, false] {
                let reading = async {
                    while let Some(text) = old.line.inbox.recv().await {
                        agent.take(&mut old, &text, takes);
                    }
                };
                let _ = timeout(HANDOVER_TIME, reading).await;
            }
        });
    }

    fn take(&self, session: &mut Session, text: &str, takes_requests: bool) {
        let message: Value = serde_json::from_str(text).expect("a message");
        info!(connection = %session.line.id, message = %message["type"], "agent");
        match message["type"].as_str().unwrap_or_default() {
            "connection_established" => {
                session.asks_again = message["features"]
                    .as_array()
                    .is_some_and(|features| features.contains(&json!(CONFIRMS)));
                session.is_established = true;
                if session.is_early_replaced {
                    self.doubt(session);
                }
            }
            "replaced" if !session.is_established => session.is_early_replaced = true,
            "replaced" => match message["id"].as_u64() {
                None => self.doubt(session),
                Some(id) => {
                    session.is_replaced |= id > session.last_pong && id >= session.last_question;
                }
            },
            "pong" => {
                let id = message["id"].as_u64().unwrap_or_default();
                session.last_pong = session.last_pong.max(id);
            }
            "http_request" => self.request(session, &message, takes_requests),
            _ => {}
        }
    }

    fn doubt(&self, session: &mut Session) {
        if session.asks_again {
            self.ping(session);
            session.last_question = session.last_ping;
        } else {
            session.is_replaced = true;
        }
    }

    fn ping(&self, session: &mut Session) {
        session.last_ping += 1;
        let ping = json!({ "type": "ping", "id": session.last_ping });
        self.cloud.send(&session.line.id, &ping);
    }

    fn request(&self, session: &mut Session, message: &Value, takes_requests: bool) {
        let id = &message["request_id"];
        if !session.seen.insert(id.to_string()) {
            return;
        }
        let reply = if takes_requests {
            let uri = message["uri"].as_str().unwrap_or_default();
            let number = uri.trim_start_matches('/').parse().expect("a number");
            self.record.lock().executed.push(number);
            json!({ "type": "http_response", "request_id": id, "status_code": 200, "headers": {} })
        } else {
            json!({ "type": "error", "request_id": id, "code": "replaced", "message": "another connection serves" })
        };
        self.cloud.send(&session.line.id, &reply);
    }
}

/// The feature of services that answer a ping of a connection that does not serve with `replaced`.
pub(crate) const CONFIRMS: &str = "confirm_replaced";

impl Drop for Session {
    fn drop(&mut self) {
        info!(connection = %self.line.id, "agent leaves");
        self.line.left.cancel();
    }
}
