//! Lists of tokens and tunnels for programs.

use jiff::Timestamp;
use serde_json::{Value, json};
use tunnel_protocol::id::TunnelId;
use tunnel_service::{
    auth::owner::Owner,
    now,
    tables::{tokens::Token, tunnels::Tunnel},
};

/// How much of a hash or of another owner's name is shown.
const SHOWN_CHARACTERS: usize = 18;

/// Who an owner is: the name of the token, or the start of what the tables know.
pub(crate) fn owner_name(owner: &Owner, tokens: &[Token]) -> String {
    tokens
        .iter()
        .find(|token| *owner == Owner::Token(token.hash.clone()))
        .map_or_else(
            || short(&owner.to_string()).to_owned(),
            |token| token.name.clone(),
        )
}

/// Whether a token is valid: `good`, `expired` or `revoked`.
pub(crate) fn token_state(token: &Token) -> &'static str {
    let is_expired = token.expires_at.is_some_and(|at| at <= now().as_secs());
    match (token.revoked, is_expired) {
        (true, _) => "revoked",
        (false, true) => "expired",
        (false, false) => "good",
    }
}

/// The start of a hash.
pub(crate) fn short(text: &str) -> &str {
    text.get(..SHOWN_CHARACTERS).unwrap_or(text)
}

/// A token as an object.
pub(crate) fn token(token: &Token) -> Value {
    json!({
        "name": token.name,
        "hash": short(&token.hash.to_string()),
        "state": token_state(token),
        "created_at": time(token.created_at),
        "expires_at": token.expires_at.map(time),
    })
}

/// A tunnel as an object.
pub(crate) fn tunnel(id: &TunnelId, tunnel: &Tunnel, tokens: &[Token]) -> Value {
    let online = tunnel.online.as_ref();
    json!({
        "id": id.as_str(),
        "state": if online.is_some() { "online" } else { "offline" },
        "owner": owner_name(&tunnel.identity.owner, tokens),
        "since": (tunnel.since > 0).then(|| time(tunnel.since)),
        "connection": online.map(|online| online.connection_id.as_str()),
    })
}

/// A time in seconds since 1970, as RFC 3339 has it.
pub(crate) fn time(seconds: u64) -> Option<String> {
    let seconds = i64::try_from(seconds).ok()?;
    Some(Timestamp::from_second(seconds).ok()?.to_string())
}
