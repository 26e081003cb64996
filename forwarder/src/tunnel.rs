//! One tunnel, kept open over as many connections as it takes.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::{
    Observer,
    backoff::Backoff,
    event::Event,
    origin::Origin,
    session::{self, Ended, Refused},
    settings::Settings,
};

/// A session that was open for this long worked; the pause after it is a short one again.
const WORKED: Duration = Duration::from_secs(5);

/// Why a tunnel cannot be kept open by trying again.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Failure {
    /// The token is missing, unknown, expired or revoked.
    #[error("the service refused this agent: pass a valid token with --token, TTF_TOKEN, or `token` in the config file")]
    Unauthorized,
    /// The tunnel id is somebody else's.
    #[error("the tunnel id {0} belongs to somebody else: choose another with --tunnel-id")]
    NameTaken(String),
    /// What the agent asked for is not valid.
    #[error("the service does not accept what this agent asks for: {0}")]
    Invalid(String),
    /// The same owner has opened the tunnel elsewhere.
    #[error("{0}")]
    Replaced(String),
}

/// Keeps a tunnel open until `stop` is cancelled.
///
/// # Errors
/// When trying again would not help.
pub async fn run(settings: Settings, observer: Observer, stop: CancellationToken) -> Result<(), Failure> {
    let observe = |event| observer(&settings.name, event);
    let origin = Origin::new(&settings);
    let mut tunnel_id = settings.tunnel_id.clone();
    let mut backoff = Backoff::default();
    loop {
        observe(Event::Connecting { endpoint: settings.endpoint.to_string() });
        let reason = match session::run(&settings, &origin, &mut tunnel_id, &observe, &stop).await {
            Ended::Stopped => return Ok(()),
            Ended::Refused(Refused::Unauthorized) => return Err(Failure::Unauthorized),
            Ended::Refused(Refused::NameTaken) => return Err(Failure::NameTaken(tunnel_id.map(String::from).unwrap_or_default())),
            Ended::Refused(Refused::Invalid(said)) => return Err(Failure::Invalid(said)),
            Ended::Replaced(reason) => return Err(Failure::Replaced(reason)),
            Ended::Lost { reason, open } => {
                if open >= WORKED {
                    backoff.reset();
                }
                reason
            }
        };
        let pause = backoff.next_pause();
        observe(Event::Reconnecting { reason, pause, attempt: backoff.attempt() });
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause) => {}
        }
    }
}
