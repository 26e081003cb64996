//! Every state that the model can reach is visited. With the rules as they are every property holds; with a rule switched off, which
//! puts a fault back that the product once had, the property that it stands for has a counter-example.

#![allow(clippy::print_stdout, reason = "counter-examples and sizes are shown")]

use stateright::{Checker, HasDiscoveries, Model, Property};
use tunnel_model::{
    Action, Owner, Ownership, Rules, Scenario, State,
    properties::{
        self, AGENTS_END_ONLY_WHEN_REPLACED, CARRIED_OUT_ONCE, EARLY_REQUESTS_COUNT,
        ENDED_IS_OFFLINE, ENDED_OR_OLDER_NEVER_TAKES_OVER, Holds, NEWEST_SERVES,
        NOBODY_BELIEVES_WRONGLY, OFFLINE_MEANS_NOT_CARRIED_OUT, ONLY_THE_OWNER_SERVES,
        SERVING_IS_FOUND, SOMEBODY_IS_LEFT,
    },
};

/// How many threads search.
const THREADS: usize = 2;
/// That the search goes as far as it is meant to.
const SETTLES: &str = "it can settle with the tunnel online";

/// [`Ownership`] as the checker wants it.
#[derive(Clone, Copy, Debug)]
struct Checked(Ownership);

/// The checker takes properties as functions that capture nothing.
fn property<const INDEX: usize>() -> Property<Checked> {
    Property::always(properties::ALL[INDEX].0, |model: &Checked, state| {
        let holds: Holds = properties::ALL[INDEX].1;
        holds(&model.0, state)
    })
}

impl Model for Checked {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.0.start()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.0.possible(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        Some(self.0.after(state, action))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            property::<0>(),
            property::<1>(),
            property::<2>(),
            property::<3>(),
            property::<4>(),
            property::<5>(),
            property::<6>(),
            property::<7>(),
            property::<8>(),
            property::<9>(),
            property::<10>(),
            Property::sometimes(SETTLES, |_, state| {
                properties::is_settled(state)
                    && state.tunnel.is_some_and(|tunnel| tunnel.serving.is_some())
            }),
        ]
    }
}

/// Two agents of one owner. The first may move to another connection, or come back with one.
const TAKEOVER: Scenario = Scenario {
    owners: [Owner::Alice, Owner::Alice],
    agents: [0, 0, 1],
    max_faults: 1,
    events_fail: true,
    messages_fail: true,
    answers_fail: true,
    requests_fail: true,
    probes_fail: false,
    handshakes_end: false,
    ties: false,
    early_ping: false,
    request: false,
    name_changes_hands: false,
};
/// The same with fewer faults, and connections of the same millisecond.
const TIES: Scenario = Scenario {
    ties: true,
    early_ping: true,
    max_faults: 0,
    ..TAKEOVER
};
/// Two faults: messages that are lost or come twice, and an @connections that denies connections which are open.
///
/// With two faults of every kind there would be hundreds of millions of states: in [`TAKEOVER`], the first one makes ten million of
/// three hundred thousand.
const DENIAL: Scenario = Scenario {
    max_faults: 2,
    events_fail: false,
    answers_fail: false,
    requests_fail: false,
    probes_fail: true,
    handshakes_end: true,
    ..TAKEOVER
};
/// A request, sent while its agent moves and another one takes over.
const REQUEST: Scenario = Scenario {
    request: true,
    events_fail: false,
    messages_fail: false,
    answers_fail: false,
    ..TAKEOVER
};
/// One agent with a request and every kind of fault.
const ONE_AGENT: Scenario = Scenario {
    agents: [0, 0, 0],
    request: true,
    ..TAKEOVER
};
/// Two agents of different owners and a name that changes hands.
const OWNERS: Scenario = Scenario {
    owners: [Owner::Alice, Owner::Bob],
    name_changes_hands: true,
    messages_fail: false,
    ..TAKEOVER
};

/// Visits every state.
fn assert_all_hold(scenario: Scenario) {
    let rules = Rules::default();
    let checker = Checked(Ownership { rules, scenario })
        .checker()
        .threads(THREADS)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    println!("{} states", checker.unique_state_count());
    checker.assert_properties();
}

/// Finds the shortest way to a state in which `property` does not hold.
fn assert_breaks(property: &'static str, rules: Rules, scenario: Scenario) {
    let checker = Checked(Ownership { rules, scenario })
        .checker()
        .threads(THREADS)
        .finish_when(HasDiscoveries::AllOf([property].into()))
        .spawn_bfs()
        .join();
    let path = checker.assert_any_discovery(property);
    println!("{property}, after {} states:", checker.unique_state_count());
    for action in path.into_actions() {
        println!("    {action:?}");
    }
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "visits millions of states: needs a release build"
)]
fn all_properties_hold_while_agents_take_over_from_each_other() {
    assert_all_hold(TAKEOVER);
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "visits millions of states: needs a release build"
)]
fn all_properties_hold_for_connections_of_the_same_millisecond() {
    assert_all_hold(TIES);
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "visits millions of states: needs a release build"
)]
fn all_properties_hold_though_open_connections_are_denied() {
    assert_all_hold(DENIAL);
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "visits millions of states: needs a release build"
)]
fn all_properties_hold_for_a_request_during_takeovers() {
    assert_all_hold(REQUEST);
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "visits millions of states: needs a release build"
)]
fn all_properties_hold_for_a_name_that_changes_hands() {
    assert_all_hold(OWNERS);
}

/// The rules with some switched off.
fn without(switch_off: fn(&mut Rules)) -> Rules {
    let mut rules = Rules::default();
    switch_off(&mut rules);
    rules
}

#[test]
fn o1_breaks_when_a_late_ready_of_a_dead_connection_takes_over() {
    let rules = without(|rules| rules.fence = false);
    assert_breaks(ENDED_OR_OLDER_NEVER_TAKES_OVER, rules, TAKEOVER);
}

#[test]
fn o1_breaks_when_the_first_replaced_is_believed_without_a_fence() {
    let rules = without(|rules| {
        rules.fence = false;
        rules.replaced_is_confirmed = false;
    });
    assert_breaks(AGENTS_END_ONLY_WHEN_REPLACED, rules, TAKEOVER);
}

#[test]
fn o1_breaks_when_a_message_that_comes_twice_confirms_itself() {
    let rules = without(|rules| rules.pings_have_ids = false);
    assert_breaks(SOMEBODY_IS_LEFT, rules, DENIAL);
}

#[test]
fn o1_breaks_when_connections_of_the_same_millisecond_take_from_each_other() {
    let rules = without(|rules| {
        rules.ties_are_broken = false;
        rules.previous_is_older = false;
        rules.replaced_is_confirmed = false;
    });
    assert_breaks(AGENTS_END_ONLY_WHEN_REPLACED, rules, TIES);
}

#[test]
fn o1_breaks_when_an_agent_s_next_connection_loses_to_the_one_before() {
    let rules = without(|rules| rules.previous_is_older = false);
    assert_breaks(AGENTS_END_ONLY_WHEN_REPLACED, rules, TIES);
}

#[test]
fn o2_breaks_when_an_offline_tunnel_stays_offline() {
    let rules = without(|rules| rules.check_heals = false);
    assert_breaks(NEWEST_SERVES, rules, ONE_AGENT);
}

#[test]
fn o2_breaks_when_ready_is_recorded_last() {
    let rules = without(|rules| rules.recorded_first = false);
    assert_breaks(NEWEST_SERVES, rules, ONE_AGENT);
}

#[test]
fn o2_breaks_when_a_connection_is_recorded_again_later() {
    let rules = without(|rules| rules.recorded_once = false);
    assert_breaks(NEWEST_SERVES, rules, TAKEOVER);
}

#[test]
fn o2_breaks_when_a_retried_delete_is_believed() {
    let rules = without(|rules| rules.offline_always = false);
    assert_breaks(ENDED_IS_OFFLINE, rules, ONE_AGENT);
}

#[test]
fn o2_breaks_when_the_record_outlives_the_tunnel_s_mark() {
    let rules = without(|rules| rules.offline_last = false);
    assert_breaks(ENDED_IS_OFFLINE, rules, ONE_AGENT);
}

#[test]
fn o2_breaks_when_a_lost_disconnect_is_believed() {
    let rules = without(|rules| rules.check_probes = false);
    assert_breaks(NEWEST_SERVES, rules, TAKEOVER);
}

#[test]
fn o3_breaks_when_a_lost_replaced_is_never_repeated() {
    let rules = without(|rules| rules.check_replaces = false);
    assert_breaks(NOBODY_BELIEVES_WRONGLY, rules, TAKEOVER);
}

#[test]
fn o4_breaks_when_a_wrong_410_is_believed_for_good() {
    let rules = without(|rules| rules.check_heals = false);
    assert_breaks(SERVING_IS_FOUND, rules, ONE_AGENT);
}

#[test]
fn o5_breaks_when_what_overtakes_connection_established_is_dropped() {
    let rules = without(|rules| rules.early_messages_count = false);
    assert_breaks(EARLY_REQUESTS_COUNT, rules, REQUEST);
}

#[test]
fn o6_breaks_when_a_410_after_a_lost_answer_is_believed() {
    let rules = without(|rules| rules.unknown_is_carried_out = false);
    assert_breaks(CARRIED_OUT_ONCE, rules, REQUEST);
    assert_breaks(OFFLINE_MEANS_NOT_CARRIED_OUT, rules, REQUEST);
}

#[test]
fn o7_breaks_when_a_claim_keeps_the_former_owner_s_connection() {
    let rules = without(|rules| rules.claim_clears = false);
    assert_breaks(ONLY_THE_OWNER_SERVES, rules, OWNERS);
}
