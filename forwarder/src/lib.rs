//! The agent: keeps a tunnel open and passes its visitors' requests to a local service.
//!
//! [`settings`] says what to do and [`access`] which visitors are admitted; [`tunnel`] keeps one tunnel open over as many connections as
//! it takes, [`handshake`] opens a connection and [`session`] serves it, [`exchange`] is one request with its response, [`origin`]
//! the local service. [`memory`] keeps the tunnel's address over restarts. [`event`] is what a user learns of it.

pub mod addresses;
pub mod args;
pub mod authority;
pub mod config_file;
mod connector;
pub mod display;
pub mod endpoint;
pub mod event;
pub mod exchange;
pub mod exit;
mod failure;
pub mod handshake;
mod liveness;
pub mod origin;
#[cfg(test)]
mod scripted;
mod seen_requests;
pub mod session;
pub mod settings;
pub mod target;
mod tls;
pub mod tunnel;
pub mod tunnel_ids;
pub mod upload;
pub mod visitor_rules;

use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tunnel_protocol::body::budget::BodyBudget;

use crate::{event::Event, settings::Settings, tunnel::TunnelError};

/// Receives events, with the name of the tunnel they concern. Must not block.
pub type Observer = Arc<dyn Fn(&str, Event) + Send + Sync>;

/// Keeps all `tunnels` open until `stop` is cancelled, and then lets the requests in flight finish.
///
/// # Errors
/// As soon as one tunnel cannot be kept open by trying again; the others are closed then.
pub async fn run(
    tunnels: Vec<Settings>,
    observer: Observer,
    stop: CancellationToken,
) -> Result<(), TunnelError> {
    let stop = stop.child_token();
    let budget = BodyBudget::default();
    let mut running: JoinSet<Result<(), TunnelError>> = tunnels
        .into_iter()
        .map(|settings| tunnel::run(settings, observer.clone(), budget.clone(), stop.clone()))
        .collect();
    let mut outcome = Ok(());
    while let Some(ended) = running.join_next().await {
        let ended = ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        if ended.is_err() && outcome.is_ok() {
            outcome = ended;
            stop.cancel();
        }
    }
    outcome
}
