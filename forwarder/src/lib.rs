//! The agent: keeps a tunnel open and passes its visitors' requests to a local service.
//!
//! A user's words become [`settings`]: `args` is the command line and `config_file` the file, `endpoint`, `target` and
//! [`visitor_rules`] are the values in them. [`tunnel`] keeps one tunnel open over as many connections as it takes, [`handshake`]
//! opens a connection and [`session`] serves it. `exchange` is one request with its response, `upload` the request's body,
//! `outgoing` what the service is told about it, `open_socket` who counts those that have changed their protocol, `origin` the local service, and `addresses` what that is called on either side.
//! `tunnel_ids` keeps the tunnel's address over restarts. [`inspector`] records exchanges and shows them on a page. [`event`] is what
//! happens, `display` how the user sees it, `supervision` what a service manager is told of it, and [`exit`] the executable's life.

mod addresses;
mod args;
mod authority;
mod background;
mod config_command;
mod config_file;
mod connector;
mod console;
mod diagnose;
mod dial;
mod directory;
mod display;
mod durations;
mod endpoint;
pub mod event;
mod exchange;
pub mod exit;
mod failure;
pub mod handshake;
mod header_rules;
mod health;
pub mod inspector;
mod liveness;
mod lock;
mod log_format;
mod login;
mod manual;
mod named_address;
mod open_socket;
mod origin;
mod origin_driver;
mod origin_pool;
mod origin_socket;
mod outgoing;
mod proxy;
#[cfg(test)]
mod scripted;
mod seen_requests;
pub mod session;
pub mod settings;
mod status;
mod supervision;
mod target;
mod tls;
pub mod tunnel;
mod tunnel_ids;
mod upgrade;
mod upload;
pub mod visitor_rules;
mod web_request;
mod websocket;
mod words;

use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tunnel_protocol::body::budget::BodyBudget;

use crate::{event::Event, inspector::Inspector, settings::Settings, tunnel::TunnelError};

/// Receives events, with the name of the tunnel they concern. Must not block.
pub type Observer = Arc<dyn Fn(&str, Event) + Send + Sync>;

/// Keeps all `tunnels` open until `stop` is cancelled, and then lets the requests in flight finish. `inspector` records them.
///
/// # Errors
/// As soon as one tunnel cannot be kept open by trying again; the others are closed then.
pub async fn run(
    tunnels: Vec<Settings>,
    observer: Observer,
    inspector: Inspector,
    stop: CancellationToken,
) -> Result<(), TunnelError> {
    let stop = stop.child_token();
    let budget = BodyBudget::default();
    let mut running: JoinSet<Result<(), TunnelError>> = tunnels
        .into_iter()
        .map(|settings| {
            let recorder = inspector.recorder(&settings.name);
            let observer = observer.clone();
            tunnel::run(settings, observer, budget.clone(), recorder, stop.clone())
        })
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
