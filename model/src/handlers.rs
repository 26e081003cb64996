//! The handlers, one call of a table or of @connections at a time.

use crate::{
    AgentEnd, Answer, Connection, Message, Ownership, Reply, State, Write, tables::Answered,
};

/// An event on its way, a handler at its next step, or a write that is applied late.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Task {
    /// `$connect`: claims the name, then writes the record.
    Connect {
        /// The connection.
        connection: Connection,
        /// The name is claimed.
        is_claimed: bool,
        /// What `ready` will name.
        previous: Option<Connection>,
    },
    /// `ready`.
    Ready {
        /// The connection.
        connection: Connection,
        /// What it named.
        previous: Option<Connection>,
        /// What comes next.
        step: ReadyStep,
    },
    /// `ping`.
    Ping {
        /// The connection.
        connection: Connection,
        /// What comes next.
        step: PingStep,
    },
    /// `$disconnect`.
    Disconnect {
        /// The connection.
        connection: Connection,
        /// What comes next.
        step: DisconnectStep,
    },
    /// `release`: deletes the name, and tells the connection that served it.
    Release,
    /// The visitor's request.
    Forward {
        /// How often the tunnel may still be looked up.
        lookups_left: u8,
        /// What comes next.
        step: ForwardStep,
    },
    /// A write whose caller has stopped waiting.
    Late(Write),
}

/// A step of `ready`.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ReadyStep {
    /// Not begun.
    Start,
    /// Post `connection_established`.
    Establish,
    /// Take the tunnel.
    Take,
    /// Read why it could not be taken.
    Explain,
    /// Record what it said.
    Record,
}

/// A step of `ping`.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum PingStep {
    /// Read the record and the tunnel, and whether the connection that serves is open.
    Read,
    /// Take the tunnel.
    Take,
    /// Mark offline what a connection that is gone serves.
    Offline(Connection),
}

/// A step of `$disconnect`.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum DisconnectStep {
    /// Not begun.
    Start,
    /// Delete the record.
    Delete,
    /// Mark the tunnel offline.
    Offline,
}

/// A step of a request.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ForwardStep {
    /// Look the tunnel up.
    Lookup,
    /// Post the request.
    Post {
        /// To this connection.
        to: Connection,
        /// An attempt before this one may have arrived.
        is_unknown: bool,
    },
    /// Mark offline what a connection that is gone serves.
    Offline(Connection),
    /// Wait for the reply.
    Wait(Connection),
}

impl Task {
    pub(crate) fn ping(connection: Connection) -> Self {
        Self::Ping {
            connection,
            step: PingStep::Read,
        }
    }

    pub(crate) fn disconnect(connection: Connection) -> Self {
        Self::Disconnect {
            connection,
            step: DisconnectStep::Start,
        }
    }

    /// Whether it is an event that has not reached its handler.
    pub(crate) fn is_event(self) -> bool {
        match self {
            Self::Ready { step, .. } => step == ReadyStep::Start,
            Self::Ping { step, .. } => step == PingStep::Read,
            Self::Disconnect { step, .. } => step == DisconnectStep::Start,
            _ => false,
        }
    }

    /// Whether what it does depends on a connection.
    pub(crate) fn refers_to(self, it: Connection) -> bool {
        match self {
            Self::Connect {
                connection,
                previous,
                ..
            }
            | Self::Ready {
                connection,
                previous,
                ..
            } => connection == it || previous == Some(it),
            Self::Ping { connection, step } => connection == it || step == PingStep::Offline(it),
            Self::Disconnect { connection, .. } => connection == it,
            Self::Release => false,
            Self::Forward { step, .. } => match step {
                ForwardStep::Lookup => false,
                ForwardStep::Post { to, .. } => to == it,
                ForwardStep::Offline(connection) | ForwardStep::Wait(connection) => {
                    connection == it
                }
            },
            Self::Late(write) => match write {
                Write::Claim(connection)
                | Write::Put(connection)
                | Write::Offline(connection)
                | Write::Delete(connection) => connection == it,
                Write::Record(connection, previous) | Write::Take(connection, previous) => {
                    connection == it || previous == Some(it)
                }
                Write::Release(_) => false,
            },
        }
    }

    /// The write that is its next step.
    pub(crate) fn write(self) -> Option<Write> {
        match self {
            Self::Connect {
                connection,
                is_claimed,
                ..
            } => Some(if is_claimed {
                Write::Put(connection)
            } else {
                Write::Claim(connection)
            }),
            Self::Ready {
                connection,
                previous,
                step,
            } => match step {
                ReadyStep::Record => Some(Write::Record(connection, previous)),
                ReadyStep::Take => Some(Write::Take(connection, previous)),
                _ => None,
            },
            Self::Ping { connection, step } => match step {
                PingStep::Read => None,
                PingStep::Take => Some(Write::Take(connection, None)),
                PingStep::Offline(gone) => Some(Write::Offline(gone)),
            },
            Self::Disconnect { connection, step } => match step {
                DisconnectStep::Start => None,
                DisconnectStep::Delete => Some(Write::Delete(connection)),
                DisconnectStep::Offline => Some(Write::Offline(connection)),
            },
            Self::Forward {
                step: ForwardStep::Offline(gone),
                ..
            } => Some(Write::Offline(gone)),
            Self::Release => Some(Write::Release(crate::Owner::Alice)),
            Self::Forward { .. } | Self::Late(_) => None,
        }
    }

    /// The post that is its next step.
    pub(crate) fn post(self) -> Option<(Connection, Message)> {
        match self {
            Self::Ready {
                connection,
                step: ReadyStep::Establish,
                ..
            } => Some((connection, Message::Established)),
            Self::Forward {
                lookups_left,
                step: ForwardStep::Post { to, .. },
            } => Some((to, Message::Request(lookups_left))),
            _ => None,
        }
    }
}

/// What a ping finds.
enum Checked {
    /// The connection serves, or may go on.
    Good,
    /// Another one serves.
    Replaced,
    /// Nobody serves, or an older connection.
    Offline,
    /// A connection that is gone serves.
    Gone(Connection),
    /// There is no record of the connection.
    Unknown,
}

impl Ownership {
    /// Lets a task take its next step, which is answered.
    pub(crate) fn step(&self, state: &mut State, task: Task) {
        state.remove_task(task);
        let next = match task {
            Task::Connect {
                connection,
                is_claimed,
                previous,
            } => self.step_connect(state, connection, is_claimed, previous),
            Task::Ready {
                connection,
                previous,
                step,
            } => self
                .step_ready(state, connection, previous, step)
                .map(|step| Task::Ready {
                    connection,
                    previous,
                    step,
                }),
            Task::Ping { connection, step } => self
                .step_ping(state, connection, step)
                .map(|step| Task::Ping { connection, step }),
            Task::Disconnect { connection, step } => self
                .step_disconnect(state, connection, step)
                .map(|step| Task::Disconnect { connection, step }),
            Task::Release => {
                if let Answered::Applied(Some(before)) =
                    self.write(state, Write::Release(crate::Owner::Alice))
                {
                    post(state, before, Message::Replaced);
                }
                None
            }
            Task::Forward { lookups_left, step } => self.step_forward(state, lookups_left, step),
            Task::Late(write) => {
                // Later than the whole life of its connection a record is not written.
                if !matches!(write, Write::Put(connection) if is_over(state, connection)) {
                    self.write(state, write);
                }
                None
            }
        };
        if let Some(next) = next {
            state.add_task(next);
        }
    }

    fn step_connect(
        &self,
        state: &mut State,
        connection: Connection,
        is_claimed: bool,
        previous: Option<Connection>,
    ) -> Option<Task> {
        if !is_claimed {
            if self.write(state, Write::Claim(connection)) == Answered::Refused {
                state.ends_mut(connection).agent = AgentEnd::Left;
                return None;
            }
            // Where the name has one owner for good, nothing can come between.
            if self.scenario.name_changes_hands {
                return Some(Task::Connect {
                    connection,
                    is_claimed: true,
                    previous,
                });
            }
        }
        self.write(state, Write::Put(connection));
        let ends = state.ends_mut(connection);
        ends.is_open = true;
        if ends.agent == AgentEnd::Left {
            // The agent has ended meanwhile.
            return None;
        }
        ends.agent = AgentEnd::Handshake { is_replaced: false };
        Some(Task::Ready {
            connection,
            previous,
            step: ReadyStep::Start,
        })
    }

    fn step_ready(
        &self,
        state: &mut State,
        connection: Connection,
        previous: Option<Connection>,
        step: ReadyStep,
    ) -> Option<ReadyStep> {
        let rules = self.rules;
        match step {
            ReadyStep::Start => {
                state.ends(connection).record?;
                if !rules.established_first {
                    return Some(ReadyStep::Take);
                }
                if rules.recorded_first {
                    self.write(state, Write::Record(connection, previous));
                }
                Some(ReadyStep::Establish)
            }
            ReadyStep::Establish => {
                let is_taken = post(state, connection, Message::Established);
                if !rules.established_first {
                    return Some(ReadyStep::Record);
                }
                is_taken.then_some(ReadyStep::Take)
            }
            ReadyStep::Take => match self.write(state, Write::Take(connection, previous)) {
                Answered::Applied(before) => {
                    if let Some(before) = before.filter(|_| previous != before) {
                        post(state, before, Message::Replaced);
                    }
                    match (rules.established_first, rules.recorded_first) {
                        (true, true) => None,
                        (true, false) => Some(ReadyStep::Record),
                        (false, _) => Some(ReadyStep::Establish),
                    }
                }
                Answered::Refused if rules.refusals_are_explained => Some(ReadyStep::Explain),
                Answered::Refused => {
                    close(state, connection);
                    None
                }
            },
            ReadyStep::Explain => self.explain_refusal(state, connection, previous),
            ReadyStep::Record => {
                self.write(state, Write::Record(connection, previous));
                None
            }
        }
    }

    fn explain_refusal(
        &self,
        state: &mut State,
        connection: Connection,
        previous: Option<Connection>,
    ) -> Option<ReadyStep> {
        state.ends(connection).record?;
        let owner = self.owner(connection);
        let Some(tunnel) = state.tunnel.filter(|tunnel| tunnel.owner == owner) else {
            close(state, connection);
            return None;
        };
        match tunnel.serving {
            Some(serving) if serving == connection => None,
            Some(_) if self.outranks(state, &tunnel, connection, previous) => {
                if tunnel.previous != Some(connection) {
                    post(state, connection, Message::Replaced);
                }
                None
            }
            // It can be taken by now.
            _ => Some(ReadyStep::Take),
        }
    }

    fn step_ping(
        &self,
        state: &mut State,
        connection: Connection,
        step: PingStep,
    ) -> Option<PingStep> {
        match step {
            PingStep::Read => {
                let checked = self.check(state, connection);
                if let Checked::Good = checked {
                    post(state, connection, Message::Pong);
                }
                if let Checked::Replaced = checked {
                    post(state, connection, Message::Replaced);
                }
                match checked {
                    Checked::Good | Checked::Replaced => None,
                    Checked::Unknown => {
                        close(state, connection);
                        None
                    }
                    Checked::Offline => Some(PingStep::Take),
                    Checked::Gone(serving) => Some(PingStep::Offline(serving)),
                }
            }
            PingStep::Take => {
                let Some(record) = state.ends(connection).record else {
                    close(state, connection);
                    return None;
                };
                match self.write(state, Write::Take(connection, record.previous)) {
                    Answered::Applied(before) => {
                        if let Some(before) = before.filter(|_| record.previous != before) {
                            post(state, before, Message::Replaced);
                        }
                        post(state, connection, Message::Pong);
                        None
                    }
                    Answered::Refused => Some(PingStep::Read),
                }
            }
            PingStep::Offline(gone) => {
                self.write(state, Write::Offline(gone));
                Some(PingStep::Read)
            }
        }
    }

    fn check(&self, state: &State, connection: Connection) -> Checked {
        let Some(record) = state.ends(connection).record else {
            return Checked::Unknown;
        };
        let owned = state
            .tunnel
            .filter(|tunnel| tunnel.owner == self.owner(connection));
        let Some(tunnel) = owned else {
            return if record.is_ready {
                Checked::Replaced
            } else {
                Checked::Good
            };
        };
        let newer = match tunnel.serving {
            Some(serving) if serving == connection => return Checked::Good,
            Some(serving) if self.outranks(state, &tunnel, connection, record.previous) => serving,
            _ if self.rules.check_heals && record.is_ready => return Checked::Offline,
            _ => return Checked::Good,
        };
        if self.rules.check_probes && !state.ends(newer).is_open {
            Checked::Gone(newer)
        } else if tunnel.previous == Some(connection) || !self.rules.check_replaces {
            Checked::Good
        } else {
            Checked::Replaced
        }
    }

    fn step_disconnect(
        &self,
        state: &mut State,
        connection: Connection,
        step: DisconnectStep,
    ) -> Option<DisconnectStep> {
        match step {
            DisconnectStep::Start => {
                state.ends(connection).record?;
                Some(if self.rules.offline_last {
                    DisconnectStep::Delete
                } else {
                    DisconnectStep::Offline
                })
            }
            DisconnectStep::Delete => {
                let answered = self.write(state, Write::Delete(connection));
                let goes_on =
                    self.rules.offline_always || answered == Answered::Applied(Some(connection));
                (self.rules.offline_last && goes_on).then_some(DisconnectStep::Offline)
            }
            DisconnectStep::Offline => {
                self.write(state, Write::Offline(connection));
                (!self.rules.offline_last).then_some(DisconnectStep::Delete)
            }
        }
    }

    fn step_forward(&self, state: &mut State, lookups_left: u8, step: ForwardStep) -> Option<Task> {
        let next = |lookups_left, step| Some(Task::Forward { lookups_left, step });
        match step {
            ForwardStep::Lookup => match state.tunnel.and_then(|tunnel| tunnel.serving) {
                Some(to) if lookups_left > 0 => next(
                    lookups_left - 1,
                    ForwardStep::Post {
                        to,
                        is_unknown: false,
                    },
                ),
                _ => {
                    Self::answer(state, Answer::Offline);
                    None
                }
            },
            ForwardStep::Post { to, is_unknown } => {
                if post(state, to, Message::Request(lookups_left)) {
                    return next(lookups_left, ForwardStep::Wait(to));
                }
                self.gone(state, lookups_left, to, is_unknown)
            }
            ForwardStep::Offline(gone) => {
                self.write(state, Write::Offline(gone));
                next(lookups_left, ForwardStep::Lookup)
            }
            ForwardStep::Wait(on) => {
                let reply = state.request.reply.take();
                match reply.filter(|(id, _)| *id == lookups_left) {
                    Some((_, Reply::Response)) => {
                        Self::answer(state, Answer::Response);
                        None
                    }
                    Some((_, Reply::Replaced)) => next(lookups_left, ForwardStep::Lookup),
                    None if state.ends(on).is_open => next(lookups_left, step),
                    None => {
                        Self::answer(state, Answer::AgentLost);
                        None
                    }
                }
            }
        }
    }

    /// @connections says 410 to a request.
    pub(crate) fn gone(
        &self,
        state: &mut State,
        lookups_left: u8,
        from: Connection,
        is_unknown: bool,
    ) -> Option<Task> {
        if is_unknown && self.rules.unknown_is_carried_out {
            Self::answer(state, Answer::AgentLost);
            return None;
        }
        Some(Task::Forward {
            lookups_left,
            step: ForwardStep::Offline(from),
        })
    }
}

/// Posts a message, and says whether the connection took it.
pub(crate) fn post(state: &mut State, to: Connection, message: Message) -> bool {
    let is_open = state.ends(to).is_open;
    // What is sent to an agent that is not there any more arrives nowhere.
    if is_open && state.ends(to).agent != AgentEnd::Left {
        state.add_message(to, message);
    }
    is_open
}

/// Whether a connection has been on record and is not any more.
fn is_over(state: &State, connection: Connection) -> bool {
    let ends = state.ends(connection);
    ends.record.is_none() && ends.agent != AgentEnd::Connecting
}

/// Closes a connection from the service's side.
fn close(state: &mut State, connection: Connection) {
    let ends = state.ends_mut(connection);
    if ends.is_open {
        ends.is_open = false;
        ends.agent = AgentEnd::Left;
        state.messages.retain(|(to, _)| *to != connection);
        state.add_task(Task::disconnect(connection));
    }
}
