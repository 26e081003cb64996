//! A visitor's socket: what hyper reads from it and writes to it, and what hyper does not see: that the visitor has left, or takes
//! nothing any more.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::BytesMut;
use http::Version;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, timeout},
};

use crate::front::{
    request_head::RequestHeadError,
    request_stream::{RequestStream, Step},
};

/// How much of a head is read at once.
const HEAD_READ_BYTES: usize = 4 * 1024;
/// How long a visitor may take nothing of what is there for it.
pub(crate) const MAX_STALL: Duration = Duration::from_secs(60);
/// An answer that says nothing, by which it shows whether a visitor that has ended its side still listens: if not, its system
/// answers with a reset. Every HTTP/1.1 client skips it (RFC 9110, 15.2).
const PROBE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
/// When it is probed after the first doubt, and again. Not often: some clients accept no more than five such answers.
const PROBE_DELAYS: [Duration; 4] = [
    Duration::from_millis(200),
    Duration::from_secs(5),
    Duration::from_secs(30),
    Duration::from_secs(120),
];
/// When the system probes a silent visitor, how often, and after how many unanswered probes it gives up.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 3;
/// How long what was sent has to reach a visitor before its connection is reset.
const RESET_DELAY: Duration = Duration::from_secs(1);
/// How long a visitor has to close its side behind the last answer, and what it sends meanwhile is read and dropped.
const LINGER_TIMEOUT: Duration = Duration::from_secs(2);

/// A visitor's socket. hyper has it as a [`VisitorStream`].
#[derive(Debug)]
pub(crate) struct VisitorSocket {
    stream: TcpStream,
    /// Where it comes from.
    pub(crate) peer: SocketAddr,
    exchange: Mutex<Exchange>,
}

/// How far the request that is being served has come.
#[derive(Debug, Default)]
struct Exchange {
    /// What was found of the request whose head hyper was given last.
    checked: Option<Result<(), RequestHeadError>>,
    /// The request's version, while it is being served.
    version: Option<Version>,
    /// Its response has begun.
    has_response: bool,
    /// All of the request was read: bytes behind it are not its body.
    is_read: bool,
    /// The visitor had ended its side before the response began.
    is_half_closed: bool,
    /// Since when it is in doubt whether the visitor is still there.
    doubted_since: Option<Instant>,
    /// How often the visitor was asked.
    probes: usize,
    /// hyper has bytes that the socket has not taken yet.
    is_unflushed: bool,
    /// Since when the socket has taken nothing.
    stalled_since: Option<Instant>,
    /// Wakes a body that waits until everything before its end is sent.
    waits_for_flush: Option<Waker>,
    /// The response broke off, and only a reset shows it.
    needs_reset: bool,
    /// What follows is not HTTP.
    is_upgraded: bool,
}

/// Why a visitor's connection is cut.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Departure {
    /// The visitor has closed its connection.
    #[error("the visitor has left")]
    Left,
    /// The visitor takes nothing of its response.
    #[error("the visitor has taken nothing for {} s", MAX_STALL.as_secs())]
    Stalled,
}

impl VisitorSocket {
    /// Takes an accepted connection.
    pub(crate) fn new(stream: TcpStream, peer: SocketAddr) -> Self {
        tunnel_protocol::writer::tune(&stream);
        // Without it a connection that is gone is missed later.
        #[cfg(unix)]
        let _ = keep_alive(&stream);
        Self {
            stream,
            peer,
            exchange: Mutex::default(),
        }
    }

    /// Notes that a request is being served, and tells what was found of its head.
    pub(crate) fn begin_request(&self, version: Version) -> Result<(), RequestHeadError> {
        let mut exchange = self.exchange();
        exchange.version = Some(version);
        exchange.has_response = false;
        exchange.doubted_since = None;
        exchange.probes = 0;
        exchange.checked.take().unwrap_or(Ok(()))
    }

    /// Notes that hyper was given the response.
    pub(crate) fn begin_response(&self) {
        let mut exchange = self.exchange();
        exchange.has_response = true;
        exchange.is_half_closed = matches!(peer_state(&self.stream), PeerState::HalfClosed);
    }

    /// Notes that the response was given whole.
    pub(crate) fn end_response(&self) {
        let mut exchange = self.exchange();
        exchange.version = None;
    }

    /// What follows on the connection is not HTTP.
    pub(crate) fn upgrade(&self) {
        self.exchange().is_upgraded = true;
    }

    /// Whether what follows is not HTTP.
    pub(crate) fn is_upgraded(&self) -> bool {
        self.exchange().is_upgraded
    }

    /// Ready once all that hyper was given is sent, so that a body may break off without taking anything back.
    pub(crate) fn poll_sent(&self, context: &Context<'_>) -> Poll<()> {
        let mut exchange = self.exchange();
        if exchange.is_unflushed {
            exchange.waits_for_flush = Some(context.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    /// Notes that a body is about to break off: hyper has bytes before it that it has not sent yet.
    pub(crate) fn expect_flush(&self) {
        self.exchange().is_unflushed = true;
    }

    /// Notes that the response has broken off. Where its end is that of the connection, only a reset shows that.
    pub(crate) fn break_off(&self) {
        let mut exchange = self.exchange();
        exchange.needs_reset = exchange.version == Some(Version::HTTP_10);
    }

    /// Whether the visitor has gone, as far as is known now.
    pub(crate) fn departure(&self) -> Option<Departure> {
        let now = Instant::now();
        let mut exchange = self.exchange();
        if exchange
            .stalled_since
            .is_some_and(|since| now.duration_since(since) >= MAX_STALL)
        {
            return Some(Departure::Stalled);
        }
        let version = exchange.version?;
        match peer_state(&self.stream) {
            PeerState::Closed => Some(Departure::Left),
            // A visitor ends its side behind its request. One that does so later has left.
            PeerState::HalfClosed if exchange.has_response => {
                (!exchange.is_half_closed).then_some(Departure::Left)
            }
            PeerState::HalfClosed => self.probe(&mut exchange, version, now),
            // What is sent ahead may fill the socket, and hide the end behind it.
            PeerState::Open if exchange.is_read && has_unread(&self.stream) => {
                self.probe(&mut exchange, version, now)
            }
            PeerState::Open => None,
        }
    }

    /// Asks a visitor that may have left whether it still listens.
    fn probe(&self, exchange: &mut Exchange, version: Version, now: Instant) -> Option<Departure> {
        let since = *exchange.doubted_since.get_or_insert(now);
        let is_due = PROBE_DELAYS
            .get(exchange.probes)
            .is_some_and(|delay| now.duration_since(since) >= *delay);
        let can_ask =
            version == Version::HTTP_11 && !exchange.has_response && !exchange.is_unflushed;
        if !is_due || !can_ask {
            return None;
        }
        exchange.probes += 1;
        match self.stream.try_write(PROBE) {
            Ok(length) if length == PROBE.len() => None,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            _ => Some(Departure::Left),
        }
    }

    /// Ends the connection so that the visitor gets all that was sent, and sees it where a response has broken off.
    pub(crate) async fn finish(&self) {
        if self.exchange().needs_reset {
            tokio::time::sleep(RESET_DELAY).await;
            self.reset();
            return;
        }
        #[cfg(unix)]
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Write);
        // Closed with bytes unread, the system would send a reset, which may overtake the answer.
        let drain = async {
            let mut dropped = [0; HEAD_READ_BYTES];
            loop {
                if self.stream.readable().await.is_err() {
                    return;
                }
                match self.stream.try_read(&mut dropped) {
                    Ok(0) => return,
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return,
                }
            }
        };
        let _ = timeout(LINGER_TIMEOUT, drain).await;
    }

    /// Makes closing the connection a reset.
    pub(crate) fn reset(&self) {
        #[cfg(unix)]
        let _ = rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO));
    }

    /// Held between awaits only.
    fn exchange(&self) -> MutexGuard<'_, Exchange> {
        self.exchange.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poll_stream_write(
        &self,
        context: &mut Context<'_>,
        mut write: impl FnMut(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            match self.stream.poll_write_ready(context) {
                Poll::Ready(ready) => ready?,
                Poll::Pending => {
                    self.exchange()
                        .stalled_since
                        .get_or_insert_with(Instant::now);
                    return Poll::Pending;
                }
            }
            match write(&self.stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => {
                    self.exchange().stalled_since = None;
                    return Poll::Ready(outcome);
                }
            }
        }
    }
}

/// Has the system find out that a visitor is gone without a word.
#[cfg(unix)]
fn keep_alive(stream: &TcpStream) -> rustix::io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)
}

/// What the system knows of the other side.
enum PeerState {
    Open,
    /// It sends nothing more. Whether it still reads is not known.
    HalfClosed,
    /// It was reset, or both sides have ended.
    Closed,
}

/// Asks the system, whatever is unread in the socket or in hyper.
#[cfg(target_os = "linux")]
fn peer_state(stream: &TcpStream) -> PeerState {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut sockets = [PollFd::new(stream, PollFlags::RDHUP)];
    if poll(&mut sockets, Some(&now)).is_err() {
        return PeerState::Open;
    }
    let found = sockets[0].revents();
    if found.intersects(PollFlags::ERR | PollFlags::HUP) {
        PeerState::Closed
    } else if found.contains(PollFlags::RDHUP) {
        PeerState::HalfClosed
    } else {
        PeerState::Open
    }
}

/// Asks the system. What is unread hides the end behind it here.
#[cfg(not(target_os = "linux"))]
fn peer_state(stream: &TcpStream) -> PeerState {
    let mut context = Context::from_waker(Waker::noop());
    let mut byte = [0];
    let mut peeked = ReadBuf::new(&mut byte);
    match stream.poll_peek(&mut context, &mut peeked) {
        Poll::Ready(Ok(0)) => PeerState::HalfClosed,
        Poll::Ready(Err(_)) => PeerState::Closed,
        Poll::Ready(Ok(_)) | Poll::Pending => PeerState::Open,
    }
}

/// Whether the socket holds bytes that were not read.
fn has_unread(stream: &TcpStream) -> bool {
    #[cfg(unix)]
    return rustix::io::ioctl_fionread(stream).is_ok_and(|unread| unread > 0);
    #[cfg(not(unix))]
    return false;
}

/// The socket as hyper has it: it reads checked requests.
#[derive(Debug)]
pub(crate) struct VisitorStream {
    socket: Arc<VisitorSocket>,
    requests: RequestStream,
}

impl VisitorStream {
    /// Reads requests from the socket and writes answers to it.
    pub(crate) fn new(socket: Arc<VisitorSocket>) -> Self {
        Self {
            socket,
            requests: RequestStream::new(),
        }
    }

    fn poll_read_head(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let input: &mut BytesMut = self.requests.input();
        loop {
            ready!(self.socket.stream.poll_read_ready(context))?;
            input.reserve(HEAD_READ_BYTES);
            match self.socket.stream.try_read_buf(input) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    fn poll_read_body(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
        most: usize,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.socket.stream.poll_read_ready(context))?;
            let before = buffer.filled().len();
            let read = if most < buffer.remaining() {
                let read = self
                    .socket
                    .stream
                    .try_read(buffer.initialize_unfilled_to(most));
                read.inspect(|length| buffer.advance(*length))
            } else {
                self.socket.stream.try_read_buf(buffer)
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(_) => {
                    self.requests.pass(buffer, before);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncRead for VisitorStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let stream = self.get_mut();
        if stream.socket.exchange().is_upgraded {
            stream.requests.upgrade();
        }
        let outcome = loop {
            match stream.requests.step(buffer) {
                Step::Done => break Ok(()),
                Step::Request(checked) => stream.socket.exchange().checked = Some(checked),
                Step::ReadBody(most) => break ready!(stream.poll_read_body(context, buffer, most)),
                Step::ReadHead => match ready!(stream.poll_read_head(context)) {
                    Ok(0) => break Ok(()),
                    Ok(_) => {}
                    Err(error) => break Err(error),
                },
            }
        };
        stream.socket.exchange().is_read = stream.requests.is_between_requests();
        Poll::Ready(outcome)
    }
}

impl AsyncWrite for VisitorStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.socket.exchange().is_unflushed = true;
        self.socket
            .poll_stream_write(context, |stream| stream.try_write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.socket.exchange().is_unflushed = true;
        self.socket
            .poll_stream_write(context, |stream| stream.try_write_vectored(bytes))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// hyper calls this once it has handed on all that it had.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut exchange = self.socket.exchange();
        exchange.is_unflushed = false;
        if let Some(waker) = exchange.waits_for_flush.take() {
            waker.wake();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        #[cfg(unix)]
        let _ = rustix::net::shutdown(&self.socket.stream, rustix::net::Shutdown::Write);
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_visitor_that_takes_nothing_for_a_minute_is_cut_and_not_before() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let _visitor = TcpStream::connect(address).await.expect("a connection");
        let (stream, peer) = listener.accept().await.expect("a connection");
        let socket = Arc::new(VisitorSocket::new(stream, peer));
        let mut stream = VisitorStream::new(socket.clone());
        let chunk = vec![0; 1024 * 1024];
        // Until the system's buffers are full.
        let mut is_full = false;
        while !is_full {
            poll_fn(|context| {
                is_full = Pin::new(&mut stream)
                    .poll_write(context, &chunk)
                    .is_pending();
                Poll::Ready(())
            })
            .await;
        }
        assert_eq!(socket.departure(), None);
        tokio::time::pause();
        tokio::time::advance(MAX_STALL - Duration::from_secs(1)).await;
        assert_eq!(socket.departure(), None);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(socket.departure(), Some(Departure::Stalled));
    }
}
