//! A model of who serves a tunnel, small enough to be checked in every state that it can reach.
//!
//! It has the tunnels and connections tables, the handlers of `$connect`, `$default` and `$disconnect`, `forward` with one request,
//! agents, and the network between them. A handler is a [`Task`] that takes one step at a time: one call of a table or of
//! @connections. Steps of different tasks interleave in any order, and so do messages on their way to agents. Beyond that a limited
//! number of faults happens anywhere: an event or message is lost or doubled, a handler dies between two steps, a write is applied
//! although its answer is lost (at once or much later, while the caller tries again), @connections denies a connection that is open.
//!
//! Sooner or later it becomes calm: no more faults, no more connections. What is on its way arrives, every agent that believes it
//! serves pings once, and then the tunnel must be right: see [`properties`].
//!
//! Which of two connections is newer follows from the times at which they were opened. The model leaves out that these times are the
//! wrong way round, and that an agent which names no previous connection opens one in the millisecond of its last one. Neither can
//! happen: such an agent has lost its connection or failed to open one, and has then paused, for 125 ms or more (half of `MIN_PAUSE`
//! in `forwarder/src/tunnel.rs`); the clocks of API Gateway's hosts differ by far less, and `tunnel-local` gives every connection a
//! later time than the one before, whatever the system's clock does (`local/src/front/connection_clock.rs`). An agent that moves
//! pauses for nothing, but names the connection before; with that, times may be equal.
//!
//! [`Rules`] are what the product does. Each can be switched off, which puts a known fault back.

use std::cmp::Reverse;

pub mod properties;

mod agent;
mod handlers;
mod network;
mod tables;

pub use crate::{
    agent::{AgentEnd, Message, PingId, Pings},
    handlers::{Before, DisconnectStep, ForwardStep, ReadyStep, Task},
    network::{Action, Phase, SameTime},
    tables::{Record, Tunnel, Write},
};

/// How many connections there are.
pub const CONNECTIONS: usize = 3;
/// How many agents there are.
pub const AGENTS: usize = 2;

/// How often `forward` may look up whom to send a request to. Each time it is sent with another id.
pub const LOOKUPS: u8 = 2;

/// Index of a connection.
pub type Connection = u8;
/// Index of an id of the request.
pub type RequestId = u8;

/// Who a name may belong to.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Owner {
    /// One user.
    Alice,
    /// Another.
    Bob,
}

/// What the product does. All of them are on by default.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rules {
    /// A tunnel is taken only while the connection's record exists and no newer connection serves.
    pub fence: bool,
    /// A connection that is on record is not recorded again, which would forget what `ready` said.
    pub recorded_once: bool,
    /// What `ready` said is recorded before anything else, so that a later check can put the tunnel online.
    pub recorded_first: bool,
    /// A ping puts a tunnel back online that nobody, or an older connection, serves.
    pub check_heals: bool,
    /// A ping of a connection that does not serve is answered with `replaced`.
    pub check_replaces: bool,
    /// Before a connection hears that it was replaced, @connections is asked whether the one that serves is still open.
    pub check_probes: bool,
    /// `$disconnect` deletes the record before it marks the tunnel offline.
    pub offline_last: bool,
    /// `$disconnect` marks the tunnel offline whatever the delete of the record found.
    pub offline_always: bool,
    /// Connections opened in the same millisecond are ordered by their ids.
    pub ties_are_broken: bool,
    /// A connection is newer than the one that it named in `previous`, whatever their times and ids tell.
    pub previous_is_older: bool,
    /// A claim of an expired name forgets the former owner's connection.
    pub claim_clears: bool,
    /// A 410 after an attempt of unknown outcome counts as carried out.
    pub unknown_is_carried_out: bool,
    /// The agent acts on messages that arrive before `connection_established`.
    pub early_messages_count: bool,
    /// The agent asks once more before it believes `replaced`.
    pub replaced_is_confirmed: bool,
    /// The answer to a ping repeats its id, so that no other `replaced` is taken for the answer.
    pub pings_have_ids: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            fence: true,
            recorded_once: true,
            recorded_first: true,
            check_heals: true,
            check_replaces: true,
            check_probes: true,
            offline_last: true,
            offline_always: true,
            ties_are_broken: true,
            previous_is_older: true,
            claim_clears: true,
            unknown_is_carried_out: true,
            early_messages_count: true,
            replaced_is_confirmed: true,
            pings_have_ids: true,
        }
    }
}

/// What may happen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Scenario {
    /// Whom each agent works for.
    pub owners: [Owner; AGENTS],
    /// Which agent opens each connection.
    pub agents: [u8; CONNECTIONS],
    /// Most faults.
    pub max_faults: u8,
    /// Handlers may die and events may be lost or doubled.
    pub events_fail: bool,
    /// Messages to agents may be lost or doubled.
    pub messages_fail: bool,
    /// Answers of tables and @connections may be lost.
    pub answers_fail: bool,
    /// @connections may lose its answer to the request, or deny a connection that is open.
    pub requests_fail: bool,
    /// @connections may deny a connection that is open when it is asked whether it is.
    pub probes_fail: bool,
    /// No agent gives a handshake up. The late `ready` of one that did may end the agent that has replaced its own.
    pub handshakes_end: bool,
    /// Connections may be opened in the same millisecond.
    pub ties: bool,
    /// The first connection may ping once before it is calm.
    pub early_ping: bool,
    /// A visitor sends a request that must not be repeated.
    pub request: bool,
    /// Alice may release the name, and it expires when nobody is connected for long.
    pub name_changes_hands: bool,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Answer {
    /// The local service's response.
    Response,
    /// 503: nothing was carried out, try again.
    Offline,
    /// 502: it may have been carried out.
    AgentLost,
}

/// What an agent replied to the request.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Reply {
    /// The response.
    Response,
    /// It was not carried out: another connection serves.
    Replaced,
}

/// The visitor's request.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Request {
    /// It was sent.
    pub is_sent: bool,
    /// How often the local service saw it.
    pub executions: u8,
    /// Where each of its ids was seen by an agent, which does not act on it twice.
    pub seen: [Option<(Connection, RequestId)>; LOOKUPS as usize],
    /// What an agent replied last to which id, until `forward` reads it.
    pub reply: Option<(RequestId, Reply)>,
    /// How it ended.
    pub answer: Option<Answer>,
}

/// Both ends of a connection, and what the table says of it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Ends {
    /// When it was opened; 0 before that. Two may have been opened at once.
    pub connected_at: u8,
    /// The connections table's record.
    pub record: Option<Record>,
    /// Whether API Gateway holds it open.
    pub is_open: bool,
    /// What its agent thinks of it.
    pub agent: AgentEnd,
    /// It may still ping before it is calm.
    pub may_ping_early: bool,
    /// It has pinged since it is calm.
    pub has_pinged: bool,
    /// The pings of its agent.
    pub pings: Pings,
}

/// Everything.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct State {
    /// The tunnels table's item.
    pub tunnel: Option<Tunnel>,
    /// The connections.
    pub connections: [Ends; CONNECTIONS],
    /// Events, handlers and late writes, in order.
    pub tasks: Vec<Task>,
    /// Messages on their way to agents, in order.
    pub messages: Vec<(Connection, Message)>,
    /// The visitor's request.
    pub request: Request,
    /// How many faults may still happen.
    pub faults_left: u8,
    /// Whether it is calm.
    pub phase: Phase,
    /// Agents that have ended for good because of `replaced`.
    pub ended: [bool; AGENTS],
    /// What must not happen, and has.
    pub history: History,
}

/// What cannot be seen in one state.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct History {
    /// Agents of which a connection has taken the tunnel.
    pub has_served: [bool; AGENTS],
    /// The name was released.
    pub was_released: bool,
    /// A connection without a record took the tunnel, or took it from a newer one that was open and that nobody denied.
    pub wrong_takeover: bool,
    /// An agent ended though no other agent had ever served and the name was still its owner's.
    pub wrong_end: bool,
    /// @connections denied a connection that was open when it was asked.
    pub was_denied: bool,
    /// A `$disconnect` was lost, or died.
    pub disconnect_lost: bool,
}

/// The model: [`Rules`] in a [`Scenario`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ownership {
    /// What the product does.
    pub rules: Rules,
    /// What may happen to it.
    pub scenario: Scenario,
}

impl Ownership {
    /// Before anything has happened.
    pub fn start(&self) -> State {
        let ends = Ends {
            connected_at: 0,
            record: None,
            is_open: false,
            agent: AgentEnd::Unused,
            may_ping_early: false,
            has_pinged: false,
            pings: Pings::default(),
        };
        let mut connections = [ends; CONNECTIONS];
        connections[0].may_ping_early = self.scenario.early_ping;
        State {
            tunnel: None,
            connections,
            tasks: Vec::new(),
            messages: Vec::new(),
            request: Request::default(),
            faults_left: self.scenario.max_faults,
            phase: Phase::Storm,
            ended: [false; AGENTS],
            history: History::default(),
        }
    }

    pub(crate) fn agent(&self, connection: Connection) -> usize {
        usize::from(self.scenario.agents[usize::from(connection)])
    }

    pub(crate) fn owner(&self, connection: Connection) -> Owner {
        self.scenario.owners[self.agent(connection)]
    }

    /// Whether `one` was opened after `other`, as far as times and ids tell.
    pub(crate) fn is_newer(&self, state: &State, one: Connection, other: Connection) -> bool {
        let order = |connection| {
            let at = state.ends(connection).connected_at;
            // The agent's next connection has the smaller id: the one that does not help.
            let id = self.rules.ties_are_broken.then_some(Reverse(connection));
            (at, id)
        };
        order(one) > order(other)
    }

    /// Whether the connection that serves a tunnel is newer than another, which named `previous`.
    pub(crate) fn outranks(
        &self,
        state: &State,
        tunnel: &Tunnel,
        other: Connection,
        previous: Option<Connection>,
    ) -> bool {
        tunnel.serving.is_some_and(|serving| {
            if self.rules.previous_is_older && previous == Some(serving) {
                return false;
            }
            let is_next = self.rules.previous_is_older && tunnel.previous == Some(other);
            is_next || self.is_newer(state, serving, other)
        })
    }
}

impl State {
    /// A connection.
    pub fn ends(&self, connection: Connection) -> &Ends {
        &self.connections[usize::from(connection)]
    }

    pub(crate) fn ends_mut(&mut self, connection: Connection) -> &mut Ends {
        &mut self.connections[usize::from(connection)]
    }

    pub(crate) fn add_task(&mut self, task: Task) {
        let at = self.tasks.partition_point(|other| *other < task);
        self.tasks.insert(at, task);
    }

    pub(crate) fn remove_task(&mut self, task: Task) {
        if let Ok(at) = self.tasks.binary_search(&task) {
            self.tasks.remove(at);
        }
    }

    pub(crate) fn add_message(&mut self, to: Connection, message: Message) {
        let entry = (to, message);
        let at = self.messages.partition_point(|other| *other < entry);
        self.messages.insert(at, entry);
    }

    pub(crate) fn remove_message(&mut self, to: Connection, message: Message) {
        if let Ok(at) = self.messages.binary_search(&(to, message)) {
            self.messages.remove(at);
        }
    }

    /// All connections.
    pub fn all() -> impl DoubleEndedIterator<Item = Connection> {
        0..3
    }
}
