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
    /// It serves.
    Serving,
    /// It was told `replaced`, and asks whether that is so.
    Doubting,
    /// The agent's own next connection serves.
    Retired,
    /// It is over.
    Left,
}

/// A message to an agent.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Message {
    /// `connection_established`.
    Established,
    /// `replaced`.
    Replaced,
    /// `pong`.
    Pong,
    /// `http_request`, with its id.
    Request(RequestId),
}

impl AgentEnd {
    /// Whether the agent tells its user that the tunnel is served here.
    pub fn believes(self) -> bool {
        matches!(self, Self::Serving | Self::Doubting)
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
            (Message::Replaced, AgentEnd::Handshake { .. }) if self.rules.early_messages_count => {
                state.ends_mut(to).agent = AgentEnd::Handshake { is_replaced: true };
            }
            (Message::Replaced, AgentEnd::Serving) => self.doubt(state, to),
            (Message::Replaced, AgentEnd::Doubting) => self.end(state, to),
            (Message::Pong, AgentEnd::Doubting) => state.ends_mut(to).agent = AgentEnd::Serving,
            _ => {}
        }
    }

    fn doubt(&self, state: &mut State, connection: Connection) {
        if self.rules.replaced_is_confirmed {
            state.ends_mut(connection).agent = AgentEnd::Doubting;
            state.add_task(Task::ping(connection));
        } else {
            self.end(state, connection);
        }
    }

    /// The agent ends for good.
    fn end(&self, state: &mut State, connection: Connection) {
        let agent = self.agent(connection);
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
            AgentEnd::Serving | AgentEnd::Doubting => Reply::Response,
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
