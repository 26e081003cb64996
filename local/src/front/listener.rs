//! The listening socket: connections are accepted up to a limit, and each is served to its end.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Interval, MissedTickBehavior, error::Elapsed, interval_at, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use tunnel_forward::{error::ForwardError, request::wants_html, response::ResponseBody};
use tunnel_protocol::limits::{MAX_BINARY_PART_BYTES, MAX_HYPER_FIELDS};
use tunnel_service::aside::aside;

use crate::{
    front::{
        agents::{self, AgentFront},
        http2::{self, OpenStream, StreamBody, Streams},
        response::{last, text},
        socket::{RawStream, Transport, VisitorSocket, VisitorStream},
        visitors::{VisitorBody, VisitorFront},
    },
    operator::Observer,
    subsystem::Subsystem,
    supervision::Heartbeat,
    tls::{HANDSHAKE_TIMEOUT, Handshake, Tls},
};

/// Most open connections of visitors and agents together; more wait to be accepted.
pub(crate) const MAX_OPEN_CONNECTIONS: usize = 4096;
/// How long a visitor may take to send a request's head, and how long a connection without a request is kept.
pub(crate) const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long accepting rests after it failed.
pub(crate) const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
/// How often a visitor is checked. A connection over HTTP/1 also learns here that the server stops: watching a token for that would
/// cost something at every poll.
const DEPARTURE_CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// How long a visitor over HTTP/2 that has no request, and all of its responses, may take to end its connection once it was asked
/// to.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// What is spoken on a listening socket.
#[derive(Clone, Debug)]
pub(crate) enum Entrance {
    /// HTTP.
    Plain,
    /// HTTP in TLS.
    Tls(Arc<Tls>),
    /// HTTP, and whoever speaks it is sent to TLS.
    Redirect,
}

/// What a connection is served with.
#[derive(Clone, Debug)]
pub(crate) struct Front {
    pub(crate) entrance: Entrance,
    pub(crate) visitors: VisitorFront,
    pub(crate) agents: Arc<AgentFront>,
    /// Takes note of requests.
    pub(crate) observer: Arc<Observer>,
}

/// An open connection's place among [`MAX_OPEN_CONNECTIONS`]. It is free when the last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionPermit {
    _place: Option<Arc<Place>>,
}

/// A place that is taken, and noted as such.
#[derive(Debug)]
struct Place {
    observer: Arc<Observer>,
    _permit: OwnedSemaphorePermit,
}

impl ConnectionPermit {
    /// Of a connection that was accepted.
    fn new(permit: OwnedSemaphorePermit, observer: &Arc<Observer>) -> Self {
        observer.metrics.connection_opened();
        let place = Place {
            observer: observer.clone(),
            _permit: permit,
        };
        Self {
            _place: Some(Arc::new(place)),
        }
    }

    /// Of a connection within this process, which is not counted.
    pub(crate) fn internal() -> Self {
        Self { _place: None }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.observer.metrics.connection_closed();
    }
}

/// The places for connections.
pub(crate) fn places() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(MAX_OPEN_CONNECTIONS))
}

/// Accepts connections until the subsystem is stopped.
pub(crate) async fn listen(
    listener: TcpListener,
    front: Arc<Front>,
    places: Arc<Semaphore>,
    visitors: Subsystem,
) {
    let is_encrypted = matches!(front.entrance, Entrance::Tls(_));
    // Signs of life of a second loop would hide that the main one has none.
    let mut heartbeat = match front.entrance {
        Entrance::Plain | Entrance::Tls(_) => Heartbeat::new(),
        Entrance::Redirect => Heartbeat::silent(),
    };
    loop {
        let next = tokio::select! {
            next = next_connection(&listener, &places, &front.observer, visitors.stopping()) => next,
            () = heartbeat.beat() => continue,
        };
        let Some(accepted) = next else {
            return;
        };
        match accepted {
            Ok((stream, peer, permit)) => {
                let socket = Arc::new(VisitorSocket::new(stream, peer, is_encrypted));
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
    observer: &Arc<Observer>,
    stopping: &CancellationToken,
) -> Option<io::Result<(TcpStream, SocketAddr, ConnectionPermit)>> {
    let accept = async {
        let place = places.clone().acquire_owned().await;
        let place = place.expect("the semaphore is never closed");
        let (stream, peer) = listener.accept().await?;
        Ok((stream, peer, ConnectionPermit::new(place, observer)))
    };
    stopping.run_until_cancelled(accept).await
}

/// Serves a connection until it ends, becomes an agent's, or its visitor has gone.
async fn serve(
    socket: Arc<VisitorSocket>,
    front: Arc<Front>,
    permit: ConnectionPermit,
    visitors: Subsystem,
) {
    let transport = match &front.entrance {
        Entrance::Plain | Entrance::Redirect => Transport::Plain(RawStream::new(socket.clone())),
        Entrance::Tls(tls) => {
            let handshake = aside(|| handshake(tls, &socket, &front.visitors));
            match visitors.stopping().run_until_cancelled(handshake).await {
                Some(Ok(Some(Handshake::Http1(stream)))) => Transport::Tls(Box::new(stream)),
                Some(Ok(Some(Handshake::Http2(stream)))) => {
                    let transport = Transport::Tls(Box::new(stream));
                    let served = aside(|| serve_http2(socket, transport, front, permit, visitors));
                    return served.await;
                }
                Some(Ok(Some(Handshake::Validation) | None)) => return socket.finish().await,
                Some(Err(_)) => {
                    debug!(peer = %socket.peer.address, "the TLS handshake takes too long");
                    return socket.reset();
                }
                None => return,
            }
        }
    };
    serve_http1(socket, transport, front, permit, visitors).await;
}

/// Does the server's part of a handshake, and returns what it led to, if it did not fail.
///
/// # Errors
/// If it takes longer than [`HANDSHAKE_TIMEOUT`].
async fn handshake(
    tls: &Tls,
    socket: &Arc<VisitorSocket>,
    front: &VisitorFront,
) -> Result<Option<Handshake>, Elapsed> {
    let peer = socket.peer.address;
    let accept = async {
        let first = socket.first_byte().await?;
        if first.is_some_and(|byte| byte.is_ascii_uppercase()) {
            // A method, and no record of TLS.
            let answer = plain_http_answer(&front.hosts.secure_origin(None));
            let _ = RawStream::new(socket.clone())
                .write_all(answer.as_bytes())
                .await;
            return Err(io::Error::other("it speaks HTTP without TLS"));
        }
        tls.accept(RawStream::new(socket.clone())).await
    };
    let outcome = timeout(HANDSHAKE_TIMEOUT, accept).await?;
    Ok(outcome
        .inspect_err(
            |error| debug!(%peer, error = error as &dyn std::error::Error, "no TLS handshake"),
        )
        .ok())
}

/// What whoever speaks HTTP where TLS is expected is told.
fn plain_http_answer(origin: &str) -> String {
    let sentence = format!("This port speaks HTTPS. Use {origin}\n");
    let length = sentence.len();
    format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{sentence}"
    )
}

/// How often visitors are looked after.
fn departure_checks() -> Interval {
    let begin = Instant::now() + DEPARTURE_CHECK_INTERVAL;
    let mut checks = interval_at(begin, DEPARTURE_CHECK_INTERVAL);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    checks
}

async fn serve_http1(
    socket: Arc<VisitorSocket>,
    transport: Transport,
    front: Arc<Front>,
    permit: ConnectionPermit,
    visitors: Subsystem,
) {
    let service = {
        let (socket, permit) = (socket.clone(), permit.clone());
        service_fn(move |request| {
            let (front, socket, permit) = (front.clone(), socket.clone(), permit.clone());
            // Both boxed, because they are long and are moved about.
            let request = Box::new(request);
            Box::pin(async move { Ok::<_, Infallible>(front.serve(request, socket, permit).await) })
        })
    };
    let mut http = http1::Builder::new();
    // Its own timeout for heads would start a timer for each request.
    http.header_read_timeout(None)
        .half_close(true)
        // What is read at once of a long body is sent on as it is. Heads, which are shorter, grow where characters of the target
        // are escaped.
        .max_buf_size(MAX_BINARY_PART_BYTES)
        .max_headers(MAX_HYPER_FIELDS);
    let stream = VisitorStream::new(socket.clone(), transport);
    let transport = stream.transport();
    let connection = http.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection.with_upgrades());
    let mut check = departure_checks();
    let mut is_stopping = false;
    let (mut served, mut waiting_since) = (None, Instant::now());
    let peer = socket.peer.address;
    let outcome = loop {
        tokio::select! {
            outcome = connection.as_mut() => break outcome,
            _ = check.tick() => {
                if !is_stopping && visitors.stopping().is_cancelled() {
                    is_stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                if let Some(reason) = socket.cut_reason(Some(&transport)) {
                    debug!(%peer, %reason, "connection cut");
                    socket.reset();
                    return;
                }
                let before = std::mem::replace(&mut served, socket.served());
                if served.is_none() || served != before {
                    waiting_since = Instant::now();
                } else if waiting_since.elapsed() >= HEAD_TIMEOUT {
                    debug!(%peer, "no request came in time");
                    break Ok(());
                }
            }
        }
    };
    if let Err(error) = outcome {
        debug!(%peer, error = &error as &dyn std::error::Error, "connection ended");
    }
    if !socket.is_upgraded() {
        socket.finish().await;
    }
}

async fn serve_http2(
    socket: Arc<VisitorSocket>,
    transport: Transport,
    front: Arc<Front>,
    permit: ConnectionPermit,
    visitors: Subsystem,
) {
    let streams = Arc::new(Streams::default());
    let service = {
        let (socket, streams) = (socket.clone(), streams.clone());
        service_fn(move |request| {
            let (front, socket, permit) = (front.clone(), socket.clone(), permit.clone());
            let stream = streams.open(request.method());
            let request = Box::new(request);
            Box::pin(async move {
                Ok::<_, Infallible>(front.serve_stream(request, socket, permit, stream).await)
            })
        })
    };
    let http = http2::builder(visitors.clone());
    let mut connection = Box::pin(http.serve_connection(TokioIo::new(transport), service));
    let mut check = departure_checks();
    let mut closing_since: Option<Instant> = None;
    let peer = socket.peer.address;
    let outcome = loop {
        tokio::select! {
            outcome = connection.as_mut() => break outcome,
            () = visitors.stopping().cancelled(), if closing_since.is_none() => {
                closing_since = Some(Instant::now());
                connection.as_mut().graceful_shutdown();
            }
            () = streams.is_flooded.cancelled() => {
                debug!(%peer, "the visitor gives up one request after another: connection cut");
                socket.reset();
                return;
            }
            _ = check.tick() => {
                let is_stuck = streams.check(socket.is_blocked());
                if is_stuck || socket.cut_reason(None).is_some() {
                    debug!(%peer, "the visitor takes nothing: connection cut");
                    socket.reset();
                    return;
                }
                let idle = streams.idle();
                if idle.is_some_and(|idle| idle >= CLOSE_TIMEOUT)
                    && closing_since.is_some_and(|since| since.elapsed() >= CLOSE_TIMEOUT)
                {
                    break Ok(());
                }
                if closing_since.is_none() && idle.is_some_and(|idle| idle >= HEAD_TIMEOUT) {
                    closing_since = Some(Instant::now());
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    };
    if let Err(error) = outcome {
        debug!(%peer, error = &error as &dyn std::error::Error, "connection ended");
    }
    drop(connection);
    socket.finish().await;
}

impl Front {
    async fn serve(
        &self,
        request: Box<Request<Incoming>>,
        socket: Arc<VisitorSocket>,
        permit: ConnectionPermit,
    ) -> Response<VisitorBody> {
        let is_redirect = matches!(self.entrance, Entrance::Redirect);
        let begun = socket.begin_request(&request);
        if begun.is_ok() && !is_redirect && request.uri().path() == agents::PATH {
            let agents = self.agents.clone();
            let accepted = aside(|| agents.accept(*request, &socket.peer, permit));
            let mut response = accepted.await;
            if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                socket.upgrade();
            } else {
                response = last(response);
            }
            return VisitorBody::of(response, socket, None);
        }
        let visit = self.observer.visit(&request, &socket.peer);
        let response = match begun {
            Ok(()) if is_redirect => self.redirect(&request),
            Err(error) => {
                last(ForwardError::from(error).into_response(wants_html(request.headers())))
            }
            Ok(()) => self.visitors.serve(request, &socket, permit, &visit).await,
        };
        visit.answered(&response);
        VisitorBody::of(response, socket, Some(visit))
    }

    /// Serves a request over HTTP/2.
    async fn serve_stream(
        &self,
        mut request: Box<Request<Incoming>>,
        socket: Arc<VisitorSocket>,
        permit: ConnectionPermit,
        stream: OpenStream,
    ) -> Response<StreamBody> {
        let checked = http2::check(&mut *request);
        if checked.is_ok() && request.uri().path() == agents::PATH {
            let agents = self.agents.clone();
            let response = aside(|| agents.accept(*request, &socket.peer, permit)).await;
            return stream.answer(response, None);
        }
        let visit = self.observer.visit(&request, &socket.peer);
        let response = match checked {
            Err(error) => ForwardError::from(error).into_response(wants_html(request.headers())),
            Ok(()) => {
                let visitors = &self.visitors;
                visitors.serve(request, &socket, permit, &visit).await
            }
        };
        visit.answered(&response);
        stream.answer(response, Some(visit))
    }

    /// Sends a visitor to the same address with TLS.
    fn redirect(&self, request: &Request<Incoming>) -> Response<ResponseBody> {
        let asked = request.headers().get(header::HOST);
        let asked = asked.and_then(|host| host.to_str().ok());
        let origin = self.visitors.hosts.secure_origin(asked);
        let location = HeaderValue::from_str(&format!("{origin}{}", request.uri()));
        let mut response = text(StatusCode::PERMANENT_REDIRECT, "Use https.\n");
        match location {
            Ok(location) => drop(response.headers_mut().insert(header::LOCATION, location)),
            Err(_) => *response.status_mut() = StatusCode::BAD_REQUEST,
        }
        last(response)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn observer() -> Arc<Observer> {
        Arc::new(Observer::new(Arc::default(), None, false))
    }

    #[tokio::test]
    async fn while_all_places_are_taken_no_connection_is_accepted_and_stopping_is_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let _waits = TcpStream::connect(address).await.expect("a connection");
        let places = Arc::new(Semaphore::new(0));
        let (observer, stopping) = (observer(), CancellationToken::new());
        let mut next = Box::pin(next_connection(&listener, &places, &observer, &stopping));
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
        let (observer, stopping) = (observer(), CancellationToken::new());
        let first = next_connection(&listener, &places, &observer, &stopping).await;
        let (_stream, _peer, place) = first.expect("not stopped").expect("accepted");
        // An agent's connection holds it beyond the request that opened it.
        let agents = place.clone();
        drop(place);
        let mut next = Box::pin(next_connection(&listener, &places, &observer, &stopping));
        assert!(next.as_mut().now_or_never().is_none(), "accepted");
        drop(agents);
        let next = tokio::time::timeout(Duration::from_secs(20), next).await;
        assert!(next.expect("in time").expect("not stopped").is_ok());
    }
}
