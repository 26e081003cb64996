//! The listening socket: connections are accepted up to a limit, and each is served to its end.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use http::{Request, Response};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, MissedTickBehavior, interval_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use tunnel_forward::{error::ForwardError, request::wants_html};
use tunnel_protocol::limits::MAX_HEADER_FIELDS;

use crate::{
    front::{
        agents::{self, AgentFront},
        request_head::MAX_HEAD_BYTES,
        response::last,
        socket::{VisitorSocket, VisitorStream},
        visitors::{VisitorBody, VisitorFront},
    },
    operator::Observer,
    subsystem::Subsystem,
    supervision::Heartbeat,
};

/// Most open connections of visitors and agents together; more wait to be accepted.
pub(crate) const MAX_OPEN_CONNECTIONS: usize = 4096;
/// How long a visitor may take to send a request's head, and how long a connection without a request is kept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long accepting rests after it failed.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
/// How often a visitor that waits for its response is looked after.
const DEPARTURE_CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// What a connection is served with.
#[derive(Clone, Debug)]
pub(crate) struct Front {
    pub(crate) visitors: VisitorFront,
    pub(crate) agents: Arc<AgentFront>,
    /// Takes note of requests.
    pub(crate) observer: Arc<Observer>,
}

/// An open connection's place among [`MAX_OPEN_CONNECTIONS`]. It is free when the last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionPermit {
    _permit: Option<Arc<OwnedSemaphorePermit>>,
}

impl ConnectionPermit {
    /// Of a connection within this process, which is not counted.
    pub(crate) fn internal() -> Self {
        Self { _permit: None }
    }
}

/// Accepts connections until the subsystem is stopped.
pub(crate) async fn listen(listener: TcpListener, front: Front, visitors: Subsystem) {
    let places = Arc::new(Semaphore::new(MAX_OPEN_CONNECTIONS));
    let mut heartbeat = Heartbeat::new();
    loop {
        let next = tokio::select! {
            next = next_connection(&listener, &places, visitors.stopping()) => next,
            () = heartbeat.beat() => continue,
        };
        let Some(accepted) = next else {
            return;
        };
        match accepted {
            Ok((stream, peer, permit)) => {
                let socket = Arc::new(VisitorSocket::new(stream, peer));
                visitors.spawn(serve(socket, front.clone(), permit, visitors.clone()));
            }
            Err(error) => {
                // Out of file descriptors, most likely: connections that end will free some.
                warn!(%error, "cannot accept");
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
}

/// Waits for a place among the open connections and then for a connection to take it; `None` when `stopping` is cancelled.
async fn next_connection(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    stopping: &CancellationToken,
) -> Option<io::Result<(TcpStream, SocketAddr, ConnectionPermit)>> {
    let accept = async {
        let place = places.clone().acquire_owned().await;
        let place = place.expect("the semaphore is never closed");
        let (stream, peer) = listener.accept().await?;
        let permit = ConnectionPermit {
            _permit: Some(Arc::new(place)),
        };
        Ok((stream, peer, permit))
    };
    stopping.run_until_cancelled(accept).await
}

/// Serves a connection until it ends, becomes an agent's, or its visitor has gone.
async fn serve(
    socket: Arc<VisitorSocket>,
    front: Front,
    permit: ConnectionPermit,
    visitors: Subsystem,
) {
    let service = {
        let (socket, permit) = (socket.clone(), permit.clone());
        service_fn(move |request| {
            let (front, socket, permit) = (front.clone(), socket.clone(), permit.clone());
            // Boxed, because hyper moves it about.
            Box::pin(async move { Ok::<_, Infallible>(front.serve(request, socket, permit).await) })
        })
    };
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .half_close(true)
        // Heads grow where characters of the target are escaped.
        .max_buf_size(2 * MAX_HEAD_BYTES)
        .max_headers(MAX_HEADER_FIELDS);
    let stream = TokioIo::new(VisitorStream::new(socket.clone()));
    let mut connection = std::pin::pin!(http.serve_connection(stream, service).with_upgrades());
    let begin = Instant::now() + DEPARTURE_CHECK_INTERVAL;
    let mut check = interval_at(begin, DEPARTURE_CHECK_INTERVAL);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_stopping = false;
    let peer = socket.peer;
    let outcome = loop {
        tokio::select! {
            outcome = connection.as_mut() => break outcome,
            () = visitors.stopping().cancelled(), if !is_stopping => {
                is_stopping = true;
                connection.as_mut().graceful_shutdown();
            }
            _ = check.tick() => if let Some(reason) = socket.cut_reason() {
                debug!(%peer, %reason, "connection cut");
                socket.reset();
                return;
            },
        }
    };
    if let Err(error) = outcome {
        debug!(%peer, error = &error as &dyn std::error::Error, "connection ended");
    }
    if !socket.is_upgraded() {
        socket.finish().await;
    }
}

impl Front {
    async fn serve(
        &self,
        request: Request<Incoming>,
        socket: Arc<VisitorSocket>,
        permit: ConnectionPermit,
    ) -> Response<VisitorBody> {
        let begun = socket.begin_request(request.version());
        if begun.is_ok() && request.uri().path() == agents::PATH {
            let peer = socket.peer;
            let mut response = self.agents.clone().accept(request, peer, permit).await;
            if response.status() == http::StatusCode::SWITCHING_PROTOCOLS {
                socket.upgrade();
            } else {
                response = last(response);
            }
            return VisitorBody::of(response, socket, None);
        }
        let visit = self.observer.visit(&request, socket.peer);
        let response = match begun {
            Err(error) => {
                last(ForwardError::from(error).into_response(wants_html(request.headers())))
            }
            Ok(()) => self.visitors.serve(request, &socket, permit, &visit).await,
        };
        visit.answered(&response);
        VisitorBody::of(response, socket, Some(visit))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn while_all_places_are_taken_no_connection_is_accepted_and_stopping_is_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let _waits = TcpStream::connect(address).await.expect("a connection");
        let places = Arc::new(Semaphore::new(0));
        let stopping = CancellationToken::new();
        let mut next = Box::pin(next_connection(&listener, &places, &stopping));
        assert!(next.as_mut().now_or_never().is_none(), "accepted");
        stopping.cancel();
        let next = tokio::time::timeout(Duration::from_secs(20), next).await;
        assert!(next.expect("in time").is_none());
    }

    #[tokio::test]
    async fn a_place_is_free_again_when_the_last_who_holds_it_is_done() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let _both = [
            TcpStream::connect(address).await.expect("a connection"),
            TcpStream::connect(address).await.expect("a connection"),
        ];
        let places = Arc::new(Semaphore::new(1));
        let stopping = CancellationToken::new();
        let first = next_connection(&listener, &places, &stopping).await;
        let (_stream, _peer, place) = first.expect("not stopped").expect("accepted");
        // An agent's connection holds it beyond the request that opened it.
        let agents = place.clone();
        drop(place);
        let mut next = Box::pin(next_connection(&listener, &places, &stopping));
        assert!(next.as_mut().now_or_never().is_none(), "accepted");
        drop(agents);
        let next = tokio::time::timeout(Duration::from_secs(20), next).await;
        assert!(next.expect("in time").expect("not stopped").is_ok());
    }
}
