//! What happens next: steps, deliveries, users, and faults.

use crate::{
    AgentEnd, Answer, Connection, Ends, ForwardStep, LOOKUPS, Message, Owner, Ownership, PingId,
    Pings, Request, State, Task, Write,
    handlers::{post, to_tell},
};

/// How it goes on.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Phase {
    /// Anything may happen.
    Storm,
    /// Nothing is on its way and nothing new happens, but that every agent that believes it serves pings once.
    Calm,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Action {
    /// An agent opens a connection, perhaps in the same millisecond as the last one.
    Connect(Connection, SameTime),
    /// An agent is done with a connection, has given it up, or dies.
    Leave(Connection),
    /// API Gateway notices that an agent is not there any more.
    Close(Connection),
    /// An agent pings.
    Ping(Connection),
    /// A visitor sends a request.
    Send,
    /// Alice releases the name.
    Release,
    /// A month passes without a connection.
    Expire,
    /// Everything has arrived, and from now on there are no faults.
    Calm,
    /// A handler takes its next step.
    Step(Task),
    /// A message reaches its agent.
    Deliver(Connection, Message),
    /// Fault: the next step is carried out, but its caller does not learn of it and tries again. A write may be applied much later.
    Unanswered(Task),
    /// Fault: a handler dies, or its event is lost.
    Die(Task),
    /// Fault: an event comes twice.
    Double(Task),
    /// Fault: @connections says that an open connection is gone.
    Deny(Task),
    /// Fault: a message is lost.
    Lose(Connection, Message),
    /// Fault: a message arrives twice.
    Repeat(Connection, Message),
}

/// A request that cannot go wrong any more, however it went.
const REQUEST_IS_OVER: Request = Request {
    is_sent: true,
    executions: 0,
    seen: [None; LOOKUPS as usize],
    reply: None,
    answer: Some(Answer::Response),
};

/// Whether a connection is opened in the same millisecond as the last one.
pub type SameTime = bool;

impl Ownership {
    /// What may happen next.
    pub fn possible(&self, state: &State, actions: &mut Vec<Action>) {
        let mut last = None;
        for task in &state.tasks {
            // Equal tasks are interchangeable.
            if last == Some(task) {
                continue;
            }
            last = Some(task);
            if self.can_step(state, *task) {
                actions.push(Action::Step(*task));
            }
            if state.phase == Phase::Storm && state.faults_left > 0 {
                self.faults_of_task(state, *task, actions);
            }
        }
        let mut last = None;
        for entry in &state.messages {
            if last == Some(entry) {
                continue;
            }
            last = Some(entry);
            let (to, message) = *entry;
            actions.push(Action::Deliver(to, message));
            if state.phase == Phase::Storm && state.faults_left > 0 && self.scenario.messages_fail {
                actions.push(Action::Repeat(to, message));
                // A request that API Gateway has taken and lost is only found by its deadline.
                if !matches!(message, Message::Request(_)) {
                    actions.push(Action::Lose(to, message));
                }
            }
        }
        self.of_connections(state, actions);
        if state.phase == Phase::Storm {
            self.of_users(state, actions);
            if self.is_quiet(state) && !State::all().any(|it| is_unfinished(state.ends(it))) {
                actions.push(Action::Calm);
            }
        }
    }

    /// Nothing is on its way.
    fn is_quiet(&self, state: &State) -> bool {
        state.messages.is_empty() && !state.tasks.iter().any(|task| self.can_step(state, *task))
    }

    fn can_step(&self, state: &State, task: Task) -> bool {
        match task {
            // It waits.
            Task::Forward {
                step: ForwardStep::Wait(on),
                ..
            } => state.request.reply.is_some() || !state.ends(on).is_open,
            _ => true,
        }
    }

    fn faults_of_task(&self, state: &State, task: Task, actions: &mut Vec<Action>) {
        let scenario = &self.scenario;
        let is_forward = matches!(task, Task::Forward { .. });
        let is_late = matches!(task, Task::Late(_));
        if scenario.events_fail && !is_forward && !is_late {
            actions.push(Action::Die(task));
            if task.is_event() {
                actions.push(Action::Double(task));
            }
        }
        if scenario.probes_fail && self.takes_if_denied(state, task).is_some() {
            actions.push(Action::Deny(task));
        }
        let posts_to_open = task.post().is_some_and(|(to, _)| state.ends(to).is_open);
        if is_forward {
            if scenario.requests_fail && posts_to_open {
                actions.push(Action::Unanswered(task));
                actions.push(Action::Deny(task));
            }
        } else if scenario.answers_fail
            && (task.write().is_some() || self.takes(state, task).is_some() || posts_to_open)
        {
            actions.push(Action::Unanswered(task));
        }
    }

    fn of_connections(&self, state: &State, actions: &mut Vec<Action>) {
        for connection in State::all() {
            let ends = state.ends(connection);
            // A handshake that is given up before `$connect` has answered is one whose `ready` is late.
            let may_leave = match ends.agent {
                AgentEnd::Unused | AgentEnd::Connecting | AgentEnd::Left => false,
                AgentEnd::Handshake { .. } => !self.scenario.handshakes_end,
                AgentEnd::Serving | AgentEnd::Retired => true,
            };
            if state.phase == Phase::Storm && may_leave {
                actions.push(Action::Leave(connection));
            }
            if ends.is_open && ends.agent == AgentEnd::Left {
                actions.push(Action::Close(connection));
            }
            let may_ping = match state.phase {
                Phase::Storm => ends.may_ping_early,
                Phase::Calm => !ends.has_pinged,
            };
            if may_ping && ends.agent.believes() {
                actions.push(Action::Ping(connection));
            }
        }
    }

    fn of_users(&self, state: &State, actions: &mut Vec<Action>) {
        let latest = self.latest(state);
        for connection in State::all() {
            let agent = self.agent(connection);
            let same = |other: &Connection| self.agent(*other) == agent;
            let is_next = State::all()
                .filter(same)
                .find(|other| state.ends(*other).agent == AgentEnd::Unused)
                == Some(connection);
            let is_busy = State::all().filter(same).any(|other| {
                matches!(
                    state.ends(other).agent,
                    AgentEnd::Connecting | AgentEnd::Handshake { .. }
                )
            });
            if is_next && !is_busy && !state.ended[agent] {
                actions.push(Action::Connect(connection, false));
                // An agent that comes back without a connection to name as the previous one has paused: see the crate's documentation.
                let last_is_own = State::all()
                    .filter(same)
                    .any(|other| state.ends(other).connected_at == latest);
                let moves = State::all()
                    .filter(same)
                    .any(|other| state.ends(other).agent.believes());
                if self.scenario.ties && latest > 0 && (moves || !last_is_own) {
                    actions.push(Action::Connect(connection, true));
                }
            }
        }
        if self.scenario.request && !state.request.is_sent {
            actions.push(Action::Send);
        }
        if self.scenario.name_changes_hands {
            let is_owned = state
                .tunnel
                .is_some_and(|tunnel| tunnel.owner == Owner::Alice && !tunnel.is_expired);
            if is_owned && !state.history.was_released && !self.is_releasing(state) {
                actions.push(Action::Release);
            }
            let nobody = State::all().all(|connection| {
                let ends = state.ends(connection);
                !ends.is_open && matches!(ends.agent, AgentEnd::Unused | AgentEnd::Left)
            });
            if is_owned && nobody && state.tasks.is_empty() && state.messages.is_empty() {
                actions.push(Action::Expire);
            }
        }
    }

    fn is_releasing(&self, state: &State) -> bool {
        state.tasks.iter().any(|task| matches!(task, Task::Release))
    }

    fn latest(&self, state: &State) -> u8 {
        state
            .connections
            .iter()
            .map(|ends| ends.connected_at)
            .max()
            .unwrap_or_default()
    }

    /// The state after something has happened.
    pub fn after(&self, before: &State, action: Action) -> State {
        let mut state = before.clone();
        match action {
            Action::Connect(connection, same_time) => {
                self.connect(&mut state, connection, same_time);
            }
            Action::Leave(connection) => {
                state.ends_mut(connection).agent = AgentEnd::Left;
                state.messages.retain(|(to, _)| *to != connection);
            }
            Action::Close(connection) => {
                state.ends_mut(connection).is_open = false;
                state.add_task(Task::disconnect(connection));
            }
            Action::Ping(connection) => {
                let ends = state.ends_mut(connection);
                match before.phase {
                    Phase::Storm => ends.may_ping_early = false,
                    _ => ends.has_pinged = true,
                }
                self.ping(&mut state, connection);
            }
            Action::Send => {
                state.request.is_sent = true;
                state.add_task(Task::Forward {
                    lookups_left: LOOKUPS,
                    step: ForwardStep::Lookup,
                });
            }
            Action::Release => state.add_task(Task::Release),
            Action::Expire => {
                if let Some(tunnel) = &mut state.tunnel {
                    tunnel.is_expired = true;
                }
            }
            Action::Calm => {
                state.phase = Phase::Calm;
                // What can make no difference any more is forgotten.
                state.faults_left = 0;
                for connection in State::all() {
                    state.ends_mut(connection).may_ping_early = false;
                }
            }
            Action::Step(task) => self.step(&mut state, task),
            Action::Deliver(to, message) => {
                state.remove_message(to, message);
                self.deliver(&mut state, to, message);
            }
            fault => self.fail(&mut state, fault),
        }
        self.forget_pings(&mut state);
        forget(&mut state);
        state
    }

    /// Makes states equal that differ in nothing but the pings that nobody waits for any more.
    fn forget_pings(&self, state: &mut State) {
        if !self.rules.pings_have_ids {
            return;
        }
        for connection in State::all() {
            let ends = *state.ends(connection);
            if !state.messages.iter().any(|(to, _)| *to == connection) {
                renumber_pings(state, connection);
                continue;
            }
            let tasks = state.tasks.clone();
            let messages = state.messages.clone();
            // Answers to other pings than this one that are on their way or may come, and for which it is not too late.
            let has_earlier = |id: PingId| {
                let is_earlier = |other: PingId| other <= id && other > ends.pings.answered;
                tasks.iter().any(|task| ping_of_task(task, connection).is_some_and(is_earlier))
                    || messages.iter().any(|(to, message)| {
                        *to == connection
                            && matches!(message, Message::Replaced(Some(other)) if is_earlier(*other))
                    })
            };
            state.messages.retain(|(to, message)| {
                *to != connection
                    || match message {
                        Message::Request(_) => true,
                        Message::Established => matches!(ends.agent, AgentEnd::Handshake { .. }),
                        _ if ends.agent == AgentEnd::Retired => false,
                        Message::Replaced(None) => true,
                        Message::Pong(id) => *id > ends.pings.answered && has_earlier(*id),
                        Message::Replaced(Some(id)) => {
                            *id > ends.pings.answered && *id >= ends.pings.question
                        }
                    }
            });
            renumber_pings(state, connection);
        }
    }

    fn connect(&self, state: &mut State, connection: Connection, same_time: bool) {
        let latest = self.latest(state);
        let agent = self.agent(connection);
        let previous = State::all()
            .find(|other| self.agent(*other) == agent && state.ends(*other).agent.believes());
        let ends = state.ends_mut(connection);
        ends.connected_at = if same_time { latest } else { latest + 1 };
        ends.agent = AgentEnd::Connecting;
        state.add_task(Task::Connect {
            connection,
            is_claimed: false,
            previous,
        });
    }

    fn fail(&self, state: &mut State, fault: Action) {
        state.faults_left -= 1;
        match fault {
            Action::Unanswered(task) => self.leave_unanswered(state, task),
            Action::Die(task) => {
                state.remove_task(task);
                match task {
                    Task::Connect { connection, .. } => {
                        state.ends_mut(connection).agent = AgentEnd::Left;
                    }
                    Task::Disconnect { .. } => state.history.disconnect_lost = true,
                    _ => {}
                }
            }
            Action::Double(task) => state.add_task(task),
            Action::Deny(task) => {
                if let Some(take) = self.takes_if_denied(state, task) {
                    // Its next step finds the tunnel taken.
                    state.remove_task(task);
                    state.add_task(task.after_attempt(to_tell(state, take)));
                    state.history.was_denied = true;
                    self.write(state, take);
                }
                if let Task::Forward {
                    lookups_left,
                    step: ForwardStep::Post { to, is_unknown },
                } = task
                {
                    state.remove_task(task);
                    if let Some(next) = self.gone(state, lookups_left, to, is_unknown) {
                        state.add_task(next);
                    }
                }
            }
            Action::Lose(to, message) => state.remove_message(to, message),
            Action::Repeat(to, message) => state.add_message(to, message),
            _ => unreachable!("no fault"),
        }
    }

    /// The next step of a task is carried out, but its caller does not learn of it and tries again.
    fn leave_unanswered(&self, state: &mut State, task: Task) {
        if let Some(take) = self.takes(state, task) {
            let before = to_tell(state, take);
            state.remove_task(task);
            state.add_task(task.after_attempt(before));
            state.add_task(Task::Late(take));
        }
        match task.write() {
            // Both writes of `$connect` are one step then.
            Some(Write::Claim(connection)) if !self.scenario.name_changes_hands => {
                state.add_task(Task::Late(Write::Put(connection)));
            }
            Some(write) => state.add_task(Task::Late(write)),
            None => {}
        }
        if let Some((to, message)) = task.post() {
            post(state, to, message);
        }
        if let Task::Forward {
            lookups_left,
            step: ForwardStep::Post { to, .. },
        } = task
        {
            state.remove_task(task);
            let step = ForwardStep::Post {
                to,
                is_unknown: true,
            };
            state.add_task(Task::Forward { lookups_left, step });
        }
    }
}

/// Whether something is bound to happen to a connection: its handshake ends, or its loss is noticed.
fn is_unfinished(ends: &Ends) -> bool {
    ends.is_open && ends.agent == AgentEnd::Left
        || matches!(
            ends.agent,
            AgentEnd::Connecting | AgentEnd::Handshake { .. }
        )
}

/// The id of a connection's ping that a task handles.
fn ping_of_task(task: &Task, connection: Connection) -> Option<PingId> {
    match task {
        Task::Ping {
            connection: of, id, ..
        } if *of == connection => Some(*id),
        _ => None,
    }
}

/// Numbers the pings of a connection that are on their way, or whose answers are.
fn renumber_pings(state: &mut State, connection: Connection) {
    let of_message = |(to, message): &(Connection, Message)| match message {
        Message::Pong(id) | Message::Replaced(Some(id)) if *to == connection => Some(*id),
        _ => None,
    };
    let tasks = state
        .tasks
        .iter()
        .filter_map(|task| ping_of_task(task, connection));
    let messages = state.messages.iter().filter_map(of_message);
    let mut ids: Vec<PingId> = tasks.chain(messages).collect();
    ids.sort_unstable();
    ids.dedup();
    // How many of them are below an id.
    let below = |id: PingId| {
        ids.iter()
            .map(|other| PingId::from(*other < id))
            .sum::<u8>()
    };
    let pings = state.ends(connection).pings;
    let renumbered = Pings {
        last: below(PingId::MAX),
        answered: below(pings.answered + 1),
        question: below(pings.question) + 1,
    };
    if renumbered == pings && ids.iter().all(|id| below(*id) + 1 == *id) {
        return;
    }
    for task in &mut state.tasks {
        if let Task::Ping {
            connection: of, id, ..
        } = task
            && *of == connection
        {
            *id = below(*id) + 1;
        }
    }
    for (to, message) in &mut state.messages {
        if let Message::Pong(id) | Message::Replaced(Some(id)) = message
            && *to == connection
        {
            *id = below(*id) + 1;
        }
    }
    state.tasks.sort_unstable();
    state.messages.sort_unstable();
    state.ends_mut(connection).pings = renumbered;
}

/// Makes states equal that differ in nothing that matters any more: when connections were opened that are over, and the numbers
/// that stand for the order of the others.
fn forget(state: &mut State) {
    for connection in State::all() {
        let ends = state.ends(connection);
        let is_over = ends.agent == AgentEnd::Left && !ends.is_open && ends.record.is_none();
        if is_over && !is_referred_to(state, connection) {
            let ends = state.ends_mut(connection);
            ends.connected_at = 0;
            ends.may_ping_early = false;
            ends.has_pinged = false;
        }
    }
    forget_request(state);
    let times = state.connections.map(|ends| ends.connected_at);
    for ends in &mut state.connections {
        let at = ends.connected_at;
        let unused: u8 = (1..at).map(|time| u8::from(!times.contains(&time))).sum();
        ends.connected_at = at - unused;
    }
}

/// How a request went that cannot go wrong any more.
fn forget_request(state: &mut State) {
    let request = &state.request;
    let is_right = match request.answer {
        None => false,
        Some(Answer::Offline) => request.executions == 0,
        Some(_) => request.executions <= 1,
    };
    let is_request = |(_, message): &(Connection, Message)| matches!(message, Message::Request(_));
    let is_forward = |task: &Task| matches!(task, Task::Forward { .. });
    if is_right && !state.messages.iter().any(is_request) && !state.tasks.iter().any(is_forward) {
        state.request = REQUEST_IS_OVER;
    }
}

fn is_referred_to(state: &State, connection: Connection) -> bool {
    let in_tunnel = state.tunnel.is_some_and(|tunnel| {
        tunnel.serving == Some(connection) || tunnel.previous == Some(connection)
    });
    let in_record = || {
        state.connections.iter().any(|ends| {
            ends.record
                .is_some_and(|it| it.previous == Some(connection))
        })
    };
    in_tunnel || in_record() || state.tasks.iter().any(|task| task.refers_to(connection))
}
