//! What the service manager that has started the process is told (sd_notify(3)): that it is ready, how its tunnels are, that it lives,
//! and that it stops. Where there is none, nothing is said.

use std::{collections::BTreeMap, convert::Infallible, future, sync::Mutex, time::Duration};

use crate::{display::clean, event::Event, lock::lock};

/// Says how tunnels are.
#[derive(Debug)]
pub(crate) struct Supervision {
    /// The state of each tunnel, once its first connection is open or has failed.
    tunnels: Mutex<BTreeMap<String, Option<String>>>,
}

impl Supervision {
    /// About these tunnels.
    pub(crate) fn new(tunnels: impl Iterator<Item = String>) -> Self {
        Self {
            tunnels: Mutex::new(tunnels.map(|tunnel| (tunnel, None)).collect()),
        }
    }

    /// Says what has become of a tunnel. The process is ready when every tunnel is open or has been tried: what cannot get better has
    /// ended it by then, and the network may be away for long.
    pub(crate) fn observe(&self, tunnel: &str, event: &Event) {
        let state = match event {
            Event::Online { public_url, .. } => format!("online: {public_url}"),
            Event::Reconnecting { reason, .. } => format!("offline: {reason}"),
            Event::Connecting { .. }
            | Event::Request { .. }
            | Event::RoundTrip(_)
            | Event::SocketOpened
            | Event::SocketClosed
            | Event::Draining { .. } => return,
        };
        let mut tunnels = lock(&self.tunnels);
        tunnels.insert(tunnel.to_owned(), Some(state));
        tell(&status(&tunnels));
    }
}

/// The message about these tunnels, with readiness once there is something to say about each.
fn status(tunnels: &BTreeMap<String, Option<String>>) -> String {
    let known: Vec<String> = tunnels
        .iter()
        .filter_map(|(tunnel, state)| {
            let state = clean(state.as_ref()?);
            Some(if tunnels.len() > 1 {
                format!("{tunnel} {state}")
            } else {
                state.into_owned()
            })
        })
        .collect();
    let is_ready = known.len() == tunnels.len();
    let ready = if is_ready { "READY=1\n" } else { "" };
    format!("{ready}STATUS={}", known.join("; "))
}

/// Says that the process stops.
pub(crate) fn stopping() {
    tell("STOPPING=1");
}

/// Says that the process lives, as often as the service manager wants to hear it.
pub(crate) async fn keep_alive() -> Infallible {
    let Some(limit) = watchdog() else {
        return future::pending().await;
    };
    // Twice as often as it has to be, as sd_watchdog_enabled(3) advises.
    let mut tick = tokio::time::interval(limit / 2);
    loop {
        tick.tick().await;
        tell("WATCHDOG=1");
    }
}

#[cfg(unix)]
fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero())
}

#[cfg(not(unix))]
fn watchdog() -> Option<Duration> {
    None
}

/// A service manager that does not listen cannot be told so.
#[cfg(unix)]
fn tell(message: &str) {
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Custom(message)]);
}

#[cfg(not(unix))]
fn tell(_message: &str) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_is_ready_when_there_is_something_to_say_about_each_tunnel() {
        let mut tunnels: BTreeMap<String, Option<String>> =
            ["api", "web"].map(|name| (name.to_owned(), None)).into();
        assert_eq!(status(&tunnels), "STATUS=");
        tunnels.insert("web".to_owned(), Some("online: https://x/web".to_owned()));
        assert_eq!(status(&tunnels), "STATUS=web online: https://x/web");
        tunnels.insert("api".to_owned(), Some("offline: a\nREADY=1".to_owned()));
        assert_eq!(
            status(&tunnels),
            "READY=1\nSTATUS=api offline: a?READY=1; web online: https://x/web"
        );
    }
}
