//! The handlers, one call of a table or of @connections at a time.

use crate::{
    AgentEnd, Answer, Connection, Message, Ownership, PingId, Reply, State, Tunnel, Write,
    tables::Answered,
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
        /// Its id, which the answer repeats.
        id: PingId,
        /// Which connection served before its last attempt to take the tunnel.
        before: Before,
    },
    /// The rest of a `ready` whose connection turned out to be gone: the connection before serves again, if it should.
    Resume {
        /// The connection before.
        connection: Connection,
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
    /// Record what it said, and take the tunnel, if it should.
    Settle(Before),
    /// Post `connection_established`. Then tell the connection that served before.
    Establish(Before),
    /// Mark the tunnel offline: the connection is gone. The one that served before was not told.
    Withdraw(Before),
    /// With `recorded_first` switched off: record what it said.
    Record,
}

/// The connection that served when a tunnel was taken, perhaps by an attempt whose answer was lost, if it is to be told.
pub type Before = Option<Connection>;

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
    pub(crate) fn ping(connection: Connection, id: PingId) -> Self {
        Self::Ping {
            connection,
            id,
            before: None,
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
            Self::Ready { step, .. } => step == ReadyStep::Settle(None),
            Self::Ping { before, .. } => before.is_none(),
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
            } => connection == it || previous == Some(it),
            Self::Ready {
                connection,
                previous,
                step,
            } => {
                let is_named = match step {
                    ReadyStep::Settle(before)
                    | ReadyStep::Establish(before)
                    | ReadyStep::Withdraw(before) => before == Some(it),
                    ReadyStep::Record => false,
                };
                connection == it || previous == Some(it) || is_named
            }
            Self::Ping {
                connection, before, ..
            } => connection == it || before == Some(it),
            Self::Resume { connection } => connection == it,
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
                Write::Record(connection, previous) => connection == it || previous == Some(it),
                Write::Take {
                    connection,
                    from,
                    previous,
                } => connection == it || from == Some(it) || previous == Some(it),
                Write::Release(_) => false,
            },
        }
    }

    /// The write that is its next step, but for that which takes a tunnel.
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
                ReadyStep::Withdraw(_) => Some(Write::Offline(connection)),
                _ => None,
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
            Self::Ping { .. } | Self::Resume { .. } | Self::Forward { .. } | Self::Late(_) => None,
        }
    }

    /// The connection for which its next step takes the tunnel, if it should, and what it named as the one before.
    pub(crate) fn settles(self, state: &State) -> Option<(Connection, Option<Connection>)> {
        match self {
            Self::Ready {
                connection,
                previous,
                step: ReadyStep::Settle(_),
            } => Some((connection, previous)),
            Self::Ping { connection, .. } | Self::Resume { connection } => {
                let record = state.ends(connection).record?;
                record.is_ready.then_some((connection, record.previous))
            }
            _ => None,
        }
    }

    /// The same task after an attempt to take the tunnel whose answer was lost.
    pub(crate) fn after_attempt(self, before: Before) -> Self {
        match self {
            Self::Ready {
                connection,
                previous,
                ..
            } => Self::Ready {
                connection,
                previous,
                step: ReadyStep::Settle(before),
            },
            Self::Ping { connection, id, .. } => Self::Ping {
                connection,
                id,
                before,
            },
            other => other,
        }
    }

    /// The post that is its next step.
    pub(crate) fn post(self) -> Option<(Connection, Message)> {
        match self {
            Self::Ready {
                connection,
                step: ReadyStep::Establish(_),
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

/// How a connection stands to its tunnel.
enum Standing {
    /// It should serve, and takes the tunnel with this write.
    Takes(Write),
    /// It serves, in place of a connection that is to be told.
    Serves(Option<Connection>),
    /// A newer one serves, which named it as the one before.
    Left,
    /// A newer one serves.
    Outranked,
    /// The tunnel is its owner's no longer.
    Released,
    /// It has ended.
    Ended,
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
            } => self.step_ready(state, connection, previous, step),
            Task::Ping {
                connection,
                id,
                before,
            } => {
                self.step_ping(state, connection, id, before);
                None
            }
            Task::Resume { .. } => {
                if let Some((connection, previous)) = task.settles(state) {
                    self.settle(state, connection, previous, None);
                }
                None
            }
            Task::Disconnect { connection, step } => self
                .step_disconnect(state, connection, step)
                .map(|step| Task::Disconnect { connection, step }),
            Task::Release => {
                if let Answered::Applied(Some(before)) =
                    self.write(state, Write::Release(crate::Owner::Alice))
                {
                    post(state, before, Message::Replaced(None));
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
            step: ReadyStep::Settle(None),
        })
    }

    fn step_ready(
        &self,
        state: &mut State,
        connection: Connection,
        previous: Option<Connection>,
        step: ReadyStep,
    ) -> Option<Task> {
        let rules = self.rules;
        let next = |step| {
            Some(Task::Ready {
                connection,
                previous,
                step,
            })
        };
        let recorded = || (!rules.recorded_first).then_some(ReadyStep::Record);
        match step {
            ReadyStep::Settle(before) => {
                match self.record_and_settle(state, connection, previous, before) {
                    Standing::Serves(before) => next(ReadyStep::Establish(before)),
                    Standing::Left | Standing::Outranked | Standing::Takes(_) => {
                        post(state, connection, Message::Established);
                        post(state, connection, Message::Replaced(None));
                        None
                    }
                    Standing::Released | Standing::Ended => {
                        close(state, connection);
                        None
                    }
                }
            }
            ReadyStep::Establish(before) => {
                if !post(state, connection, Message::Established) {
                    return next(ReadyStep::Withdraw(before));
                }
                if let Some(before) = before {
                    post(state, before, Message::Replaced(None));
                }
                recorded().and_then(next)
            }
            ReadyStep::Withdraw(before) => {
                self.write(state, Write::Offline(connection));
                let before = before.or(previous)?;
                state.ends(before).record.filter(|it| it.is_ready)?;
                Some(Task::Resume { connection: before })
            }
            ReadyStep::Record => {
                self.write(state, Write::Record(connection, previous));
                None
            }
        }
    }

    /// Records what `ready` said before anything else. Nobody but the connection itself reads that, so it is one step with the next.
    fn record_and_settle(
        &self,
        state: &mut State,
        connection: Connection,
        previous: Option<Connection>,
        before: Before,
    ) -> Standing {
        if self.rules.recorded_first {
            self.write(state, Write::Record(connection, previous));
        }
        self.settle(state, connection, previous, before)
    }

    /// Lets a connection that has sent `ready` serve the tunnel if it should.
    ///
    /// What it reads and what it writes are one step: the write has the condition that nothing it depends on has changed, and if it
    /// has, the handler looks again.
    fn settle(
        &self,
        state: &mut State,
        connection: Connection,
        previous: Option<Connection>,
        before: Before,
    ) -> Standing {
        match self.standing(state, connection, previous, before) {
            Standing::Takes(take) => {
                let before = to_tell(state, take);
                match self.write(state, take) {
                    Answered::Applied(_) => Standing::Serves(before),
                    Answered::Refused => Standing::Ended,
                }
            }
            standing => standing,
        }
    }

    fn standing(
        &self,
        state: &State,
        connection: Connection,
        previous: Option<Connection>,
        before: Before,
    ) -> Standing {
        if state.ends(connection).record.is_none() && self.rules.fence {
            return Standing::Ended;
        }
        let owner = self.owner(connection);
        let Some(tunnel) = state.tunnel.filter(|tunnel| tunnel.owner == owner) else {
            return Standing::Released;
        };
        if tunnel.serving == Some(connection) && tunnel.previous == previous {
            return Standing::Serves(before);
        }
        let newer = self
            .newer(state, &tunnel, connection, previous)
            .filter(|newer| !self.rules.check_probes || state.ends(*newer).is_open);
        if newer.is_none() {
            Standing::Takes(Write::Take {
                connection,
                from: tunnel.serving,
                previous,
            })
        } else if tunnel.previous == Some(connection) {
            Standing::Left
        } else {
            Standing::Outranked
        }
    }

    /// The connection that serves, if it is newer than another, which named `previous`.
    fn newer(
        &self,
        state: &State,
        tunnel: &Tunnel,
        connection: Connection,
        previous: Option<Connection>,
    ) -> Option<Connection> {
        tunnel.serving.filter(|serving| {
            *serving != connection
                && self.rules.fence
                && self.outranks(state, tunnel, connection, previous)
        })
    }

    /// The write by which the next step of a task takes the tunnel, if it does.
    pub(crate) fn takes(&self, state: &State, task: Task) -> Option<Write> {
        let (connection, previous) = task.settles(state)?;
        if matches!(task, Task::Ping { .. }) && !self.rules.check_heals {
            return None;
        }
        match self.standing(state, connection, previous, None) {
            Standing::Takes(take) => Some(take),
            _ => None,
        }
    }

    /// The write by which a task would take the tunnel if @connections denied that a newer connection is open.
    pub(crate) fn takes_if_denied(&self, state: &State, task: Task) -> Option<Write> {
        let (connection, previous) = task.settles(state)?;
        let owner = self.owner(connection);
        let tunnel = state.tunnel.filter(|tunnel| tunnel.owner == owner)?;
        let newer = self.newer(state, &tunnel, connection, previous)?;
        (self.rules.check_probes && state.ends(newer).is_open).then_some(Write::Take {
            connection,
            from: Some(newer),
            previous,
        })
    }

    fn step_ping(&self, state: &mut State, connection: Connection, id: PingId, before: Before) {
        let Some(record) = state.ends(connection).record else {
            return close(state, connection);
        };
        let previous = record.previous;
        let standing = if !record.is_ready {
            // One that has not opened its tunnel has none to lose.
            Standing::Left
        } else if self.rules.check_heals {
            self.settle(state, connection, previous, before)
        } else {
            self.standing(state, connection, previous, before)
        };
        let answer = match standing {
            Standing::Serves(before) => {
                if let Some(before) = before {
                    post(state, before, Message::Replaced(None));
                }
                Message::Pong(id)
            }
            Standing::Left | Standing::Takes(_) => Message::Pong(id),
            Standing::Outranked if !self.rules.check_replaces => Message::Pong(id),
            Standing::Outranked | Standing::Released => Message::Replaced(Some(id)),
            Standing::Ended => return,
        };
        post(state, connection, answer);
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

/// The connection that is to be told that the tunnel is taken from it.
pub(crate) fn to_tell(state: &State, take: Write) -> Before {
    let Write::Take {
        connection,
        previous,
        ..
    } = take
    else {
        return None;
    };
    let serving = state.tunnel.and_then(|tunnel| tunnel.serving);
    serving.filter(|serving| *serving != connection && previous != Some(*serving))
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
