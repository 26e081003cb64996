//! The tunnels table and the connections table, and every write of them.

use crate::{Connection, Owner, Ownership, State};

/// The item of the one tunnel.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Tunnel {
    /// Whose name it is.
    pub owner: Owner,
    /// The connection that serves it.
    pub serving: Option<Connection>,
    /// The connection that the serving one named in `previous`.
    pub previous: Option<Connection>,
    /// Nobody has used the name for a month.
    pub is_expired: bool,
}

/// A connection's record.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Record {
    /// It has what `ready` said: features, visitor policy, the connection before.
    pub is_ready: bool,
    /// The connection that `ready` named in `previous`.
    pub previous: Option<Connection>,
}

/// A write of a table.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Write {
    /// Of the name, by `$connect`.
    Claim(Connection),
    /// Of a record, by `$connect`.
    Put(Connection),
    /// Of what `ready` said.
    Record(Connection, Option<Connection>),
    /// Of the tunnel, for a connection.
    Take {
        /// The connection.
        connection: Connection,
        /// If this one serves until then, or none does.
        from: Option<Connection>,
        /// What the connection named as the one before.
        previous: Option<Connection>,
    },
    /// Of the tunnel, if this connection serves it.
    Offline(Connection),
    /// Of a record.
    Delete(Connection),
    /// Of the name, by its owner.
    Release(Owner),
}

/// What a write answers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Answered {
    /// It was applied. Of a delete and of a release: what was there before.
    Applied(Option<Connection>),
    /// Its condition did not hold.
    Refused,
}

impl Ownership {
    pub(crate) fn write(&self, state: &mut State, write: Write) -> Answered {
        match write {
            Write::Claim(connection) => self.claim(state, self.owner(connection)),
            Write::Put(connection) => {
                let record = &mut state.ends_mut(connection).record;
                if record.is_some() && self.rules.recorded_once {
                    return Answered::Refused;
                }
                *record = Some(Record {
                    is_ready: false,
                    previous: None,
                });
                Answered::Applied(None)
            }
            Write::Record(connection, previous) => {
                let record = &mut state.ends_mut(connection).record;
                if record.is_none() {
                    return Answered::Refused;
                }
                *record = Some(Record {
                    is_ready: true,
                    previous,
                });
                Answered::Applied(None)
            }
            Write::Take {
                connection,
                from,
                previous,
            } => self.take(state, connection, from, previous),
            Write::Offline(connection) => match &mut state.tunnel {
                Some(tunnel) if tunnel.serving == Some(connection) => {
                    tunnel.serving = None;
                    tunnel.previous = None;
                    tunnel.is_expired = false;
                    Answered::Applied(None)
                }
                _ => Answered::Refused,
            },
            Write::Delete(connection) => {
                let before = state.ends_mut(connection).record.take();
                Answered::Applied(before.map(|_| connection))
            }
            Write::Release(owner) => match state.tunnel {
                Some(tunnel) if tunnel.owner == owner => {
                    state.tunnel = None;
                    state.history.was_released = true;
                    Answered::Applied(tunnel.serving)
                }
                _ => Answered::Refused,
            },
        }
    }

    fn claim(&self, state: &mut State, owner: Owner) -> Answered {
        let mut claimed = match state.tunnel {
            None => Tunnel {
                owner,
                serving: None,
                previous: None,
                is_expired: false,
            },
            Some(tunnel) if tunnel.owner == owner => tunnel,
            Some(tunnel) if tunnel.is_expired => Tunnel {
                owner,
                serving: tunnel.serving.filter(|_| !self.rules.claim_clears),
                previous: None,
                is_expired: false,
            },
            Some(_) => return Answered::Refused,
        };
        claimed.is_expired = false;
        state.tunnel = Some(claimed);
        Answered::Applied(None)
    }

    fn take(
        &self,
        state: &mut State,
        connection: Connection,
        from: Option<Connection>,
        previous: Option<Connection>,
    ) -> Answered {
        let owner = self.owner(connection);
        let Some(tunnel) = state.tunnel.filter(|tunnel| tunnel.owner == owner) else {
            return Answered::Refused;
        };
        let has_record = state.ends(connection).record.is_some();
        if self.rules.fence && (!has_record || tunnel.serving != from) {
            return Answered::Refused;
        }
        let newer = tunnel.serving.filter(|serving| {
            *serving != connection && self.outranks(state, &tunnel, connection, previous)
        });
        let is_wrong = !has_record || newer.is_some_and(|newer| state.ends(newer).is_open);
        state.history.wrong_takeover |= is_wrong && !state.history.was_denied;
        state.history.has_served[self.agent(connection)] = true;
        state.tunnel = Some(Tunnel {
            owner,
            serving: Some(connection),
            previous,
            is_expired: false,
        });
        Answered::Applied(None)
    }
}
