//! What must hold. Some of it in every state, the rest once everything has arrived and every agent has pinged once.

use crate::{Answer, Connection, ForwardStep, Ownership, Phase, State, Task};

/// A property.
pub type Holds = fn(&Ownership, &State) -> bool;

/// All properties, by name.
pub const ALL: [(&str, Holds); 11] = [
    (ENDED_OR_OLDER_NEVER_TAKES_OVER, |_, state| {
        !state.history.wrong_takeover
    }),
    (AGENTS_END_ONLY_WHEN_REPLACED, |_, state| {
        !state.history.wrong_end
    }),
    (SOMEBODY_IS_LEFT, |model, state| {
        !model.scenario.handshakes_end || state.history.was_released || state.ended.contains(&false)
    }),
    (NEWEST_SERVES, newest_serves),
    (ENDED_IS_OFFLINE, ended_is_offline),
    (NOBODY_BELIEVES_WRONGLY, nobody_believes_wrongly),
    (SERVING_IS_FOUND, serving_is_found),
    (EARLY_REQUESTS_COUNT, early_requests_count),
    (CARRIED_OUT_ONCE, |_, state| state.request.executions <= 1),
    (OFFLINE_MEANS_NOT_CARRIED_OUT, |_, state| {
        state.request.answer != Some(Answer::Offline) || state.request.executions == 0
    }),
    (ONLY_THE_OWNER_SERVES, |model, state| {
        state.tunnel.is_none_or(|tunnel| {
            tunnel
                .serving
                .is_none_or(|serving| model.owner(serving) == tunnel.owner)
        })
    }),
];

/// O1, of the table.
pub const ENDED_OR_OLDER_NEVER_TAKES_OVER: &str =
    "O1 a connection that has ended, or is older, never takes over";
/// O1, of the agents.
pub const AGENTS_END_ONLY_WHEN_REPLACED: &str =
    "O1 an agent ends only if another agent has served or the name was released";
/// O1, of all agents.
pub const SOMEBODY_IS_LEFT: &str = "O1 the agents do not all end unless one gives a handshake up";
/// O2.
pub const NEWEST_SERVES: &str = "O2 the newest live connection that said ready serves";
/// O2, the other way round.
pub const ENDED_IS_OFFLINE: &str =
    "O2 a tunnel whose connection has ended is offline, if $disconnect was carried out";
/// O3.
pub const NOBODY_BELIEVES_WRONGLY: &str = "O3 no agent believes that it serves if it does not";
/// O4.
pub const SERVING_IS_FOUND: &str = "O4 a tunnel with a live connection is not offline";
/// O5.
pub const EARLY_REQUESTS_COUNT: &str = "O5 no request is forgotten by a live agent";
/// O6.
pub const CARRIED_OUT_ONCE: &str = "O6 a request is carried out at most once";
/// O6, of the answer.
pub const OFFLINE_MEANS_NOT_CARRIED_OUT: &str = "O6 what is answered 503 is not carried out";
/// O7.
pub const ONLY_THE_OWNER_SERVES: &str = "O7 a name never serves anybody but its owner";

/// Whether everything has arrived and every agent has pinged.
pub fn is_settled(state: &State) -> bool {
    let is_done = |task: &Task| {
        matches!(
            task,
            Task::Forward {
                step: ForwardStep::Wait(_),
                ..
            }
        )
    };
    state.phase == Phase::Calm
        && state.tasks.iter().all(is_done)
        && state.messages.is_empty()
        && state
            .connections
            .iter()
            .all(|ends| ends.has_pinged || !ends.agent.believes())
}

/// The newest connection that is live at both ends and whose agent believes that it serves.
fn newest(model: &Ownership, state: &State) -> Option<Connection> {
    State::all()
        .filter(|connection| {
            let ends = state.ends(*connection);
            ends.is_open && ends.agent.believes()
        })
        .reduce(|one, other| {
            if model.is_newer(state, one, other) {
                one
            } else {
                other
            }
        })
}

fn serving(state: &State) -> Option<Connection> {
    state.tunnel.and_then(|tunnel| tunnel.serving)
}

fn newest_serves(model: &Ownership, state: &State) -> bool {
    !is_settled(state) || newest(model, state).is_none_or(|newest| serving(state) == Some(newest))
}

fn ended_is_offline(_: &Ownership, state: &State) -> bool {
    !is_settled(state)
        || state.history.disconnect_lost
        || serving(state).is_none_or(|serving| state.ends(serving).is_open)
}

fn nobody_believes_wrongly(_: &Ownership, state: &State) -> bool {
    !is_settled(state)
        || State::all().all(|connection| {
            !state.ends(connection).agent.believes() || serving(state) == Some(connection)
        })
}

fn serving_is_found(model: &Ownership, state: &State) -> bool {
    !is_settled(state) || newest(model, state).is_none() || serving(state).is_some()
}

fn early_requests_count(_: &Ownership, state: &State) -> bool {
    !is_settled(state)
        || !state.tasks.iter().any(|task| match task {
            Task::Forward {
                step: ForwardStep::Wait(on),
                ..
            } => state.ends(*on).is_open && state.request.reply.is_none(),
            _ => false,
        })
}
