//! A visitor's socket: what hyper reads from it and writes to it, and what hyper does not see: that the visitor has left, or takes
//! nothing any more.

mod transport;

use std::{
    io, mem,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use http::{Request, Version};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_util::io::poll_read_buf;
use tunnel_protocol::headers::says_forwarded;

pub(crate) use self::transport::{RawStream, Transport};
use self::transport::{SharedTransport, transfer};
use crate::front::{
    forwarded::Peer,
    request_head::RequestHeadError,
    request_stream::{RequestStream, Step},
};

/// How much of a head is read at once.
const HEAD_READ_BYTES: usize = 4 * 1024;
/// How long a visitor may take nothing of what is there for it.
pub(crate) const MAX_STALL: Duration = Duration::from_secs(60);
/// What means nothing, and by which it shows whether a visitor that has ended its side still listens: if not, its system answers
/// with a reset. HTTP/1.1 clients skip this before the response (RFC 9110, 15.2). Proxies have to, too, but nginx takes it for the
/// response, so they are not asked in the middle of an upload.
const PROBE_BEFORE_RESPONSE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
/// The same between two chunks: a zero before the size of the next one (RFC 9112, 7.1).
const PROBE_BETWEEN_CHUNKS: &[u8] = b"0";
/// When a visitor is asked after the first doubt, and again. Not often: some clients accept no more than five such answers, or
/// sixteen digits of a size.
const PROBE_DELAYS: [Duration; 4] = [
    Duration::from_millis(200),
    Duration::from_secs(5),
    Duration::from_secs(30),
    Duration::from_secs(120),
];
/// When the system probes a silent visitor, how often, and after how many unanswered probes it gives up.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 3;
/// How often it is looked whether an upgraded connection is still open that nobody may be reading.
const CLOSED_CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// How long what was sent has to reach a visitor before its connection is reset.
pub(crate) const RESET_DELAY: Duration = Duration::from_secs(1);
/// How long a visitor may send nothing behind the last answer before its connection is closed. What it sends is read and dropped:
/// many send all of a request before they read the answer.
const LINGER_IDLE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long it may go on sending.
const LINGER_TIMEOUT: Duration = Duration::from_secs(30);

/// A visitor's socket. hyper has it as a [`VisitorStream`], or as its [`Transport`] alone where HTTP/2 is spoken.
#[derive(Debug)]
pub(crate) struct VisitorSocket {
    stream: TcpStream,
    /// Where it comes from.
    pub(crate) peer: Peer,
    /// Its bytes are TLS.
    is_encrypted: bool,
    exchange: Mutex<Exchange>,
}

/// How far the request that is being served has come.
#[derive(Debug, Default)]
struct Exchange {
    /// What was found of the request whose head hyper was given last.
    checked: Option<Result<(), RequestHeadError>>,
    /// The request's version, while it is being served.
    version: Option<Version>,
    /// How many requests have begun.
    requests: u64,
    /// What may be sent to ask the visitor whether it is there, while hyper has nothing to send.
    probe: Option<&'static [u8]>,
    /// The same while the request's body is not read.
    probe_in_body: Option<&'static [u8]>,
    /// All of the request was read: bytes behind it are not its body.
    is_read: bool,
    /// Since when it is in doubt whether the visitor is still there.
    doubted_since: Option<Instant>,
    /// How often the visitor was asked.
    probes: usize,
    /// How often hyper was given bytes, and how often when it was last looked.
    reads: u64,
    reads_seen: u64,
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

impl Exchange {
    /// From now on the visitor is asked with this, if at all, and in the middle of an upload with `in_body`.
    fn expect_probe(&mut self, probe: Option<&'static [u8]>, in_body: Option<&'static [u8]>) {
        self.probe = probe;
        self.probe_in_body = in_body;
        self.probes = 0;
        self.doubted_since = None;
    }

    /// Whether nothing was read since this was asked last, or what is to be read is not of this request.
    fn is_stuck(&mut self) -> bool {
        let seen = mem::replace(&mut self.reads_seen, self.reads);
        self.is_read || seen == self.reads
    }

    /// What to ask a visitor with that may have left, if it is time. One whose body is not read is asked later: local services may
    /// take a moment. Where it cannot be asked, the next bytes of its response show whether it still listens, or the system's own
    /// probes, once the visitor's system has forgotten the connection.
    fn due_probe(&mut self, now: Instant, is_body: bool) -> Option<&'static [u8]> {
        let doubted = now.duration_since(*self.doubted_since.get_or_insert(now));
        let delay = PROBE_DELAYS.get(self.probes + usize::from(is_body))?;
        let probe = if is_body {
            self.probe_in_body
        } else {
            self.probe
        };
        let probe = probe.filter(|_| !self.is_unflushed)?;
        if doubted < *delay {
            return None;
        }
        self.probes += 1;
        Some(probe)
    }
}

/// Why a visitor's connection is cut.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum CutReason {
    /// The visitor has closed its connection.
    #[error("the visitor has left")]
    Left,
    /// The visitor takes nothing of its response.
    #[error("the visitor has taken nothing for {} s", MAX_STALL.as_secs())]
    Stalled,
}

impl VisitorSocket {
    /// Takes an accepted connection, on which TLS is spoken if it `is_encrypted`.
    pub(crate) fn new(stream: TcpStream, peer: SocketAddr, is_encrypted: bool) -> Self {
        tunnel_protocol::writer::tune(&stream);
        // Without it a connection that is gone is missed later.
        #[cfg(unix)]
        let _ = keep_alive(&stream);
        Self {
            stream,
            peer: peer.into(),
            is_encrypted,
            exchange: Mutex::default(),
        }
    }

    /// Notes that a request is being served, and tells what was found of its head.
    pub(crate) fn begin_request<B>(&self, request: &Request<B>) -> Result<(), RequestHeadError> {
        let version = request.version();
        let is_direct = !says_forwarded(request.headers());
        let probe = (version == Version::HTTP_11).then_some(PROBE_BEFORE_RESPONSE);
        let mut exchange = self.exchange();
        exchange.version = Some(version);
        exchange.requests += 1;
        exchange.expect_probe(probe, probe.filter(|_| is_direct));
        exchange.checked.take().unwrap_or(Ok(()))
    }

    /// Notes that hyper was given a response, whose body `is_open`: it has neither a length nor an end yet.
    pub(crate) fn begin_response(&self, is_open: bool) {
        let mut exchange = self.exchange();
        let is_chunked = is_open && exchange.version == Some(Version::HTTP_11);
        let probe = is_chunked.then_some(PROBE_BETWEEN_CHUNKS);
        exchange.expect_probe(probe, probe);
    }

    /// Notes that the response was given whole.
    pub(crate) fn end_response(&self) {
        let mut exchange = self.exchange();
        exchange.version = None;
    }

    /// How many requests have been served, if all that was answered is sent, the last one was read to its end, and the next one is
    /// waited for.
    pub(crate) fn served(&self) -> Option<u64> {
        let exchange = self.exchange();
        let is_read = exchange.requests == 0 || exchange.is_read;
        let is_waiting = exchange.version.is_none() && is_read && !exchange.is_unflushed;
        is_waiting.then_some(exchange.requests)
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

    /// Whether there are bytes that the socket has no room for.
    pub(crate) fn is_blocked(&self) -> bool {
        self.exchange().stalled_since.is_some()
    }

    /// Why the connection is to be cut, as far as is known now. A visitor that may have left is asked over `transport`, which is
    /// the one that hyper has; over HTTP/2 none is, as hyper reads whatever comes.
    pub(crate) fn cut_reason(&self, transport: Option<&SharedTransport>) -> Option<CutReason> {
        let now = Instant::now();
        let probe = {
            let mut exchange = self.exchange();
            if exchange
                .stalled_since
                .is_some_and(|since| now.duration_since(since) >= MAX_STALL)
            {
                return Some(CutReason::Stalled);
            }
            exchange.version?;
            match peer_state(&self.stream) {
                PeerState::Closed => return Some(CutReason::Left),
                // TLS has its own way to end one side only, which leaves the socket as it is.
                PeerState::HalfClosed if self.is_encrypted => return Some(CutReason::Left),
                // Some end their side behind their request, at any time, and wait for the answer; others have left.
                PeerState::HalfClosed => exchange.due_probe(now, false)?,
                // What was sent may fill the socket, and hide the end behind it.
                PeerState::Open if exchange.is_stuck() && has_unread(&self.stream) => {
                    let is_body = !exchange.is_read;
                    exchange.due_probe(now, is_body)?
                }
                PeerState::Open => {
                    exchange.doubted_since = None;
                    return None;
                }
            }
        };
        let is_there = transport?.send(probe);
        // Nobody waits for the socket to take it.
        self.exchange().stalled_since = None;
        (!is_there).then_some(CutReason::Left)
    }

    /// Completes once the connection has been reset, or given up by the system. While nothing is read from it, neither is noticed
    /// otherwise.
    pub(crate) async fn closed(&self) {
        while !matches!(peer_state(&self.stream), PeerState::Closed) {
            tokio::time::sleep(CLOSED_CHECK_INTERVAL).await;
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
                let readable = timeout(LINGER_IDLE_TIMEOUT, self.stream.readable());
                if !matches!(readable.await, Ok(Ok(()))) {
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

    /// The first byte that comes, which stays unread; `None` if the connection ends without one.
    pub(crate) async fn first_byte(&self) -> io::Result<Option<u8>> {
        let mut byte = [0];
        let length = self.stream.peek(&mut byte).await?;
        Ok((length > 0).then_some(byte[0]))
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
        length: usize,
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
            match transfer(&self.stream, Interest::WRITABLE, length, || {
                write(&self.stream)
            }) {
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
    transport: SharedTransport,
    requests: RequestStream,
}

impl VisitorStream {
    /// Reads requests from a socket and writes answers to it.
    pub(crate) fn new(socket: Arc<VisitorSocket>, transport: Transport) -> Self {
        Self {
            socket,
            transport: SharedTransport::new(transport),
            requests: RequestStream::new(),
        }
    }

    /// What it reads from and writes to.
    pub(crate) fn transport(&self) -> SharedTransport {
        self.transport.clone()
    }

    fn poll_read_head(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let input = self.requests.input();
        input.reserve(HEAD_READ_BYTES);
        poll_read_buf(Pin::new(&mut *self.transport.lock()), context, input)
    }

    fn poll_read_body(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
        most: usize,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let mut transport = self.transport.lock();
        let transport = Pin::new(&mut *transport);
        if most < buffer.remaining() {
            let mut part = ReadBuf::new(buffer.initialize_unfilled_to(most));
            ready!(transport.poll_read(context, &mut part))?;
            let length = part.filled().len();
            buffer.advance(length);
        } else {
            ready!(transport.poll_read(context, buffer))?;
        }
        self.requests.pass(buffer, before);
        Poll::Ready(Ok(()))
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
        let mut exchange = stream.socket.exchange();
        exchange.is_read = stream.requests.is_between_requests();
        exchange.reads = exchange.reads.wrapping_add(1);
        drop(exchange);
        Poll::Ready(outcome)
    }
}

impl AsyncWrite for VisitorStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let stream = self.get_mut();
        stream.socket.exchange().is_unflushed = true;
        Pin::new(&mut *stream.transport.lock()).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let stream = self.get_mut();
        stream.socket.exchange().is_unflushed = true;
        Pin::new(&mut *stream.transport.lock()).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.transport.lock().is_write_vectored()
    }

    /// hyper calls this once it has handed on all that it had.
    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let stream = self.get_mut();
        ready!(Pin::new(&mut *stream.transport.lock()).poll_flush(context))?;
        let mut exchange = stream.socket.exchange();
        exchange.is_unflushed = false;
        if let Some(waker) = exchange.waits_for_flush.take() {
            waker.wake();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.get_mut().transport.lock()).poll_shutdown(context)
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
        let socket = Arc::new(VisitorSocket::new(stream, peer, false));
        let transport = Transport::Plain(RawStream::new(socket.clone()));
        let mut stream = VisitorStream::new(socket.clone(), transport);
        let chunk = vec![0; 1024 * 1024];
        assert_eq!(socket.served(), Some(0));
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
        assert_eq!(socket.served(), None, "the last answer is on its way");
        assert_eq!(socket.cut_reason(None), None);
        tokio::time::pause();
        tokio::time::advance(MAX_STALL - Duration::from_secs(1)).await;
        assert_eq!(socket.cut_reason(None), None);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(socket.cut_reason(None), Some(CutReason::Stalled));
    }
}
