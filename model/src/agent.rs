//! Agents: what each thinks of its connections, and what messages make of that.

use crate::{Answer, Connection, Ownership, Reply, RequestId, State, Task};

/// What an agent thinks of a connection.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum AgentEnd {
    /// It was not opened yet.
    Unused,
    /// `$connect` has not answered.
    Connecting,
    /// `ready` was sent; `replaced` has come already or not.
    Handshake {
        /// `replaced` overtook `connection_established`.
        is_replaced: bool,
    },
    /// It serves, as far as the agent knows.
    Serving,
    /// The agent's own next connection serves.
    Retired,
    /// It is over.
    Left,
}

/// The id of a `ping`. The first of a connection is 1.
pub type PingId = u8;

/// The pings of a connection.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Pings {
    /// The id of the last.
    pub last: PingId,
    /// The highest id that was answered with `pong`.
    pub answered: PingId,
    /// The id of the last that asked whether `replaced` is true.
    pub question: PingId,
}

/// A message to an agent.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Message {
    /// `connection_established`.
    Established,
    /// `replaced`, with the id of the `ping` that it answers.
    Replaced(Option<PingId>),
    /// `pong`, with the id of its `ping`.
    Pong(PingId),
    /// `http_request`, with its id.
    Request(RequestId),
}

impl AgentEnd {
    /// Whether the agent tells its user that the tunnel is served here.
    pub fn believes(self) -> bool {
        self == Self::Serving
    }
}

impl Ownership {
    pub(crate) fn deliver(&self, state: &mut State, to: Connection, message: Message) {
        let end = state.ends(to).agent;
        match (message, end) {
            (Message::Request(id), _) => self.execute(state, to, id),
            (Message::Established, AgentEnd::Handshake { is_replaced }) => {
                for other in State::all() {
                    if other != to
                        && self.agent(other) == self.agent(to)
                        && state.ends(other).agent.believes()
                    {
                        state.ends_mut(other).agent = AgentEnd::Retired;
                    }
                }
                state.ends_mut(to).agent = AgentEnd::Serving;
                if is_replaced {
                    self.doubt(state, to);
                }
            }
            (Message::Replaced(_), AgentEnd::Handshake { .. })
                if self.rules.early_messages_count =>
            {
                state.ends_mut(to).agent = AgentEnd::Handshake { is_replaced: true };
            }
            (Message::Replaced(ping), AgentEnd::Serving) => self.replaced(state, to, ping),
            (Message::Pong(id), AgentEnd::Serving) => {
                let pings = &mut state.ends_mut(to).pings;
                pings.answered = pings.answered.max(id);
                if !self.rules.pings_have_ids {
                    pings.question = 0;
                }
            }
            _ => {}
        }
    }

    fn replaced(&self, state: &mut State, to: Connection, ping: Option<PingId>) {
        let pings = state.ends(to).pings;
        let is_confirmed = if self.rules.pings_have_ids {
            ping.map(|id| id > pings.answered && id >= pings.question)
        } else {
            (pings.question > 0).then_some(true)
        };
        match is_confirmed {
            Some(true) => self.end(state, to),
            Some(false) => {}
            None => self.doubt(state, to),
        }
    }

    /// Asks whether `replaced` is true.
    fn doubt(&self, state: &mut State, connection: Connection) {
        if self.rules.replaced_is_confirmed {
            self.ping(state, connection);
            let pings = &mut state.ends_mut(connection).pings;
            pings.question = if self.rules.pings_have_ids {
                pings.last
            } else {
                1
            };
        } else {
            self.end(state, connection);
        }
    }

    pub(crate) fn ping(&self, state: &mut State, connection: Connection) {
        let pings = &mut state.ends_mut(connection).pings;
        pings.last += u8::from(self.rules.pings_have_ids);
        let id = pings.last;
        state.add_task(Task::ping(connection, id));
    }

    /// The agent ends for good, unless it is opening its next connection, which may have taken over.
    fn end(&self, state: &mut State, connection: Connection) {
        let agent = self.agent(connection);
        let is_opening = |other: Connection| {
            let end = state.ends(other).agent;
            matches!(end, AgentEnd::Connecting | AgentEnd::Handshake { .. })
        };
        if State::all().any(|other| self.agent(other) == agent && is_opening(other)) {
            state.ends_mut(connection).agent = AgentEnd::Left;
            state.messages.retain(|(to, _)| *to != connection);
            return;
        }
        state.ended[agent] = true;
        let another_served = state.history.has_served[1 - agent];
        if !another_served && !state.history.was_released {
            state.history.wrong_end = true;
        }
        for other in State::all().filter(|other| self.agent(*other) == agent) {
            let ends = state.ends_mut(other);
            if ends.agent != AgentEnd::Unused {
                ends.agent = AgentEnd::Left;
            }
        }
    }

    fn execute(&self, state: &mut State, on: Connection, id: RequestId) {
        // A request that comes twice is carried out once, whatever has become of the connection meanwhile.
        let seen = (on, id);
        if state.request.seen.contains(&Some(seen)) {
            return;
        }
        let reply = match state.ends(on).agent {
            AgentEnd::Serving => Reply::Response,
            AgentEnd::Handshake { .. } if self.rules.early_messages_count => Reply::Response,
            AgentEnd::Retired => Reply::Replaced,
            _ => return,
        };
        state.request.seen[usize::from(id)] = Some(seen);
        state.request.reply = Some((id, reply));
        if reply == Reply::Response {
            state.request.executions += 1;
        }
    }

    pub(crate) fn answer(state: &mut State, answer: Answer) {
        state.request.answer = Some(answer);
        state.request.reply = None;
    }
}
