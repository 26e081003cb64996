//! The inspector's socket.

use std::{
    convert::Infallible,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::sleep,
};
use tracing::{debug, warn};

use super::{
    api::Api,
    guard::Guard,
    history::HistoryError,
    options::{InspectAddress, default_addresses},
    shared::Shared,
};

/// How many connections are served at once. A browser opens six for a page.
const MAX_CONNECTIONS: usize = 128;
/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to wait after no connection could be accepted, such as for want of open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the inspector cannot start.
#[derive(Debug, thiserror::Error)]
pub enum InspectorError {
    /// It cannot listen.
    #[error(
        "the inspector cannot listen at {address}: {reason}; name another address with --inspect, or switch it off with --inspect false"
    )]
    Listen {
        /// Where.
        address: String,
        /// Why.
        reason: io::Error,
    },
    /// Its history cannot be kept.
    #[error("the inspector's history {path} cannot be used: {reason}")]
    History {
        /// The file.
        path: String,
        /// Why.
        reason: HistoryError,
    },
}

/// Serves the inspector's page and API.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    api: Arc<Api>,
}

/// Listens where the user wants it, and returns the name that it was given; `None` if it is to be off.
pub(crate) async fn listen(
    wanted: &InspectAddress,
) -> Result<Option<(TcpListener, Option<String>)>, InspectorError> {
    match wanted {
        InspectAddress::Off => Ok(None),
        InspectAddress::At { host, port } => {
            let listener = TcpListener::bind((host.as_str(), *port)).await;
            let listener = listener.map_err(|reason| InspectorError::Listen {
                address: format!("{host}:{port}"),
                reason,
            })?;
            Ok(Some((listener, Some(host.clone()))))
        }
        InspectAddress::Default => {
            for address in default_addresses() {
                match TcpListener::bind(address).await {
                    Ok(listener) => return Ok(Some((listener, None))),
                    Err(error) => debug!(
                        %address,
                        error = &error as &dyn std::error::Error,
                        "the inspector is not here"
                    ),
                }
            }
            // Nobody has asked for it, so the tunnels open without it.
            warn!("the inspector is off: it found no port on 127.0.0.1");
            Ok(None)
        }
    }
}

impl Server {
    pub(crate) fn new(
        listener: TcpListener,
        name: Option<String>,
        shared: Arc<Shared>,
    ) -> Result<Self, InspectorError> {
        let address = listener
            .local_addr()
            .map_err(|reason| InspectorError::Listen {
                address: name.clone().unwrap_or_default(),
                reason,
            })?;
        Ok(Self {
            listener,
            address,
            api: Arc::new(Api::new(shared, Guard::new(name, address))),
        })
    }

    /// Where the page is.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The port of 127.0.0.1 that it is at, if that is where it is.
    pub(crate) fn loopback_port(&self) -> Option<u16> {
        (self.address.ip() == Ipv4Addr::LOCALHOST).then_some(self.address.port())
    }

    /// Serves until it is dropped.
    pub async fn run(self) -> Infallible {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                    Ok((stream, _)) => {
                        connections.spawn(serve(stream, self.api.clone()));
                    }
                    Err(error) => {
                        debug!(error = &error as &dyn std::error::Error, "no connection accepted");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }
}

async fn serve(stream: TcpStream, api: Arc<Api>) {
    let answer = service_fn(move |request| {
        let api = api.clone();
        async move { Ok::<_, Infallible>(api.answer(request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), answer)
        .await;
    if let Err(error) = served {
        debug!(
            error = &error as &dyn std::error::Error,
            "a connection to the inspector broke"
        );
    }
}
