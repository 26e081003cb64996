//! The inspector: records the exchanges of all tunnels of the process, and shows them on a page of its own.
//!
//! `recorder` is what the agent tells of an exchange while it carries it out. `store` keeps the newest as far as they fit, each a
//! `recorded` exchange, with the messages of a `websocket`. `server` listens, `guard` decides who may ask, and `api` answers: with
//! `json`, `har`, `live` changes, `decode`d bodies and the page's `assets`. `replay` sends a recorded request again, and `history`
//! keeps exchanges over restarts.

mod api;
mod assets;
mod decode;
mod guard;
mod har;
mod history;
mod json;
mod live;
mod masking;
mod metrics;
mod options;
mod packed_fields;
mod recorded;
mod recorder;
mod replay;
mod reply;
mod server;
mod shared;
mod store;
mod websocket;

use std::{fmt, sync::Arc, time::SystemTime};

pub use history::HistoryError;
pub use options::{
    InspectAddress, InspectAddressError, InspectOptions, InspectSize, InspectSizeError,
};
pub(crate) use recorder::RecordedStream;
pub use recorder::{Recorder, Recording};
pub use server::{InspectorError, Server};
pub(crate) use websocket::Side;

use self::{
    history::History,
    metrics::Metrics,
    recorded::ExchangeId,
    shared::{InspectedTunnel, Shared},
    store::ExchangeStore,
};
use crate::{event::Event, settings::Settings};

/// Records exchanges, and learns where tunnels are. The default one is off, and does nothing.
#[derive(Clone, Default)]
pub struct Inspector(Option<Arc<Shared>>);

impl fmt::Debug for Inspector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Inspector").field(&self.0.is_some()).finish()
    }
}

impl Inspector {
    /// An inspector of these tunnels, with its server, which is to be run; `None` if it is to be off.
    ///
    /// # Errors
    /// If it cannot listen where it is told to.
    pub async fn start(
        options: &InspectOptions,
        tunnels: &[Settings],
    ) -> Result<Option<(Self, Server)>, InspectorError> {
        let Some((listener, name)) = server::listen(&options.address).await? else {
            return Ok(None);
        };
        let store = ExchangeStore::new(options.limits());
        let history = match &options.history {
            None => None,
            Some(path) => {
                let opened = History::open(path, store.limits());
                let (history, kept) = opened.map_err(|reason| InspectorError::History {
                    path: path.display().to_string(),
                    reason,
                })?;
                store.restore(kept);
                Some(Arc::new(history))
            }
        };
        let shared = Arc::new(Shared {
            process: ExchangeId::first(SystemTime::now()),
            store,
            metrics: Metrics::default(),
            tunnels: tunnels.iter().map(InspectedTunnel::new).collect(),
            history,
        });
        let server = Server::new(listener, name, shared.clone())?;
        Ok(Some((Self(Some(shared)), server)))
    }

    /// Learns what happened to a tunnel. Never blocks.
    pub fn observe(&self, tunnel: &str, event: &Event) {
        if let Some(shared) = &self.0 {
            shared.observe(tunnel, event);
        }
    }

    /// Writes what the history has not written yet. Blocks for as long as that takes.
    pub fn close(&self) {
        if let Some(history) = self.0.as_ref().and_then(|shared| shared.history.as_ref()) {
            history.close();
        }
    }

    /// What records the exchanges of a tunnel.
    pub fn recorder(&self, tunnel: &str) -> Recorder {
        match &self.0 {
            Some(shared) => Recorder::new(tunnel, shared.clone()),
            None => Recorder::default(),
        }
    }
}
