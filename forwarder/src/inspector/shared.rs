//! What recorders, the API and replays share.

use std::sync::{Arc, Mutex};

use tokio::task::spawn_blocking;

use super::{
    history::History,
    masking::Masking,
    metrics::Metrics,
    recorded::ExchangeId,
    store::{ExchangeStore, Slot},
};
use crate::{event::Event, lock::lock, origin::Origin, settings::Settings};

/// The state of the inspector.
pub(crate) struct Shared {
    /// Tells this process from others, for those who follow its changes.
    pub process: ExchangeId,
    pub store: ExchangeStore,
    pub metrics: Metrics,
    pub tunnels: Vec<InspectedTunnel>,
    /// Keeps exchanges over restarts.
    pub history: Option<Arc<History>>,
}

/// A tunnel as the inspector knows it.
pub(crate) struct InspectedTunnel {
    pub settings: Settings,
    /// For replays: connections of its own, so that no visitor waits for one.
    pub origin: Origin,
    pub masking: Masking,
    address: Mutex<TunnelAddress>,
}

/// Where a tunnel is.
#[derive(Clone, Debug, Default)]
pub(crate) struct TunnelAddress {
    /// Where visitors reach it; `None` before it was online for the first time.
    pub public_url: Option<String>,
    /// The best address for a browser, where that is another.
    pub browser_url: Option<String>,
    pub is_online: bool,
}

impl InspectedTunnel {
    pub(crate) fn new(settings: &Settings) -> Self {
        Self {
            settings: settings.clone(),
            origin: Origin::new(settings),
            masking: Masking::new(settings.access.required_headers()),
            address: Mutex::default(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.settings.name
    }

    pub(crate) fn address(&self) -> TunnelAddress {
        lock(&self.address).clone()
    }
}

impl Shared {
    pub(crate) fn tunnel(&self, name: &str) -> Option<&InspectedTunnel> {
        self.tunnels.iter().find(|tunnel| tunnel.name() == name)
    }

    /// What is masked in the exchanges of a tunnel, which may be one of an earlier process.
    pub(crate) fn masking(&self, tunnel: &str) -> Masking {
        self.tunnel(tunnel)
            .map(|tunnel| tunnel.masking.clone())
            .unwrap_or_default()
    }

    /// Learns where a tunnel is.
    pub(crate) fn observe(&self, tunnel: &str, event: &Event) {
        let Some(tunnel) = self.tunnel(tunnel) else {
            return;
        };
        match event {
            Event::Online {
                public_url,
                browser_url,
                ..
            } => {
                *lock(&tunnel.address) = TunnelAddress {
                    public_url: Some(public_url.clone()),
                    browser_url: browser_url.clone(),
                    is_online: true,
                };
            }
            Event::Reconnecting { .. } => lock(&tunnel.address).is_online = false,
            Event::Connecting { .. }
            | Event::Request { .. }
            | Event::RoundTrip(_)
            | Event::SocketOpened
            | Event::SocketClosed
            | Event::Draining { .. } => return,
        }
        self.store.touch();
    }

    /// Forgets all exchanges.
    pub(crate) async fn clear(&self) {
        self.store.clear();
        if let Some(history) = self.history.clone() {
            // It waits for its file, and who asked is not answered before the history knows.
            let _ = spawn_blocking(move || history.clear()).await;
        }
    }

    /// An exchange has ended.
    pub(crate) fn ended(&self, tunnel: &str, slot: &Arc<Slot>) {
        if let Some(history) = &self.history {
            history.keep(slot.clone(), self.masking(tunnel));
        }
    }
}
