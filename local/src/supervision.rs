//! What the service manager that has started the process is told (sd_notify(3)): that it is ready, that it lives, and that it stops.
//! Where there is none, nothing is said.

use std::time::Duration;

use tokio::time::Interval;

/// Says that the server serves, and where.
pub(crate) fn ready(text: &str) {
    tell(&format!("READY=1\nSTATUS={text}"));
}

/// Says that the server stops.
pub(crate) fn stopping() {
    tell("STOPPING=1");
}

/// Signs of life, given by the loop that they stand for.
#[derive(Debug)]
pub(crate) struct Heartbeat(Option<Interval>);

impl Heartbeat {
    /// As often as the service manager wants them, if it does.
    pub(crate) fn new() -> Self {
        // Twice as often as it has to be, as sd_watchdog_enabled(3) advises.
        Self(watchdog().map(|limit| tokio::time::interval(limit / 2)))
    }

    /// Of a loop that stands for nothing.
    pub(crate) fn silent() -> Self {
        Self(None)
    }

    /// Waits until the next one is due, and gives it.
    pub(crate) async fn beat(&mut self) {
        match &mut self.0 {
            Some(interval) => {
                interval.tick().await;
                tell("WATCHDOG=1");
            }
            None => std::future::pending().await,
        }
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
