//! The bytes of a visitor's connection, as they are on the socket or in TLS.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

use super::VisitorSocket;

/// Where the system tells once that a socket is ready, and not as long as it is.
const IS_TOLD_ONCE: bool = cfg!(any(
    target_os = "linux",
    target_os = "android",
    target_os = "macos",
    target_os = "freebsd"
));

/// Reads or writes up to `most` bytes, in no more slices than the system takes at once. What moves fewer has emptied the socket, or
/// filled it, so it counts as not ready until there is news of it, and the next call need not ask the system. tokio's own streams do
/// the same when they read.
pub(super) fn transfer(
    stream: &TcpStream,
    interest: Interest,
    most: usize,
    call: impl FnOnce() -> io::Result<usize>,
) -> io::Result<usize> {
    let mut outcome = Err(io::ErrorKind::WouldBlock.into());
    let _ = stream.try_io(interest, || {
        outcome = call();
        match outcome {
            Ok(length) if IS_TOLD_ONCE && (1..most).contains(&length) => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            _ => Ok(()),
        }
    });
    outcome
}

/// The bytes on the socket.
#[derive(Debug)]
pub(crate) struct RawStream(Arc<VisitorSocket>);

impl RawStream {
    /// Reads from the socket and writes to it.
    pub(crate) fn new(socket: Arc<VisitorSocket>) -> Self {
        Self(socket)
    }
}

impl AsyncRead for RawStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let stream = &self.0.stream;
        loop {
            ready!(stream.poll_read_ready(context))?;
            let room = buffer.remaining();
            match transfer(stream, Interest::READABLE, room, || {
                stream.try_read_buf(buffer)
            }) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return Poll::Ready(outcome.map(drop)),
            }
        }
    }
}

impl AsyncWrite for RawStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0
            .poll_stream_write(context, bytes.len(), |stream| stream.try_write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = bytes.iter().map(|slice| slice.len()).sum();
        self.0
            .poll_stream_write(context, length, |stream| stream.try_write_vectored(bytes))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        #[cfg(unix)]
        let _ = rustix::net::shutdown(&self.0.stream, rustix::net::Shutdown::Write);
        Poll::Ready(Ok(()))
    }
}

/// What requests and answers travel in.
#[derive(Debug)]
pub(crate) enum Transport {
    /// The socket itself.
    Plain(RawStream),
    /// TLS on the socket.
    Tls(Box<TlsStream<RawStream>>),
}

/// Runs the same on either transport.
macro_rules! on_transport {
    ($transport:expr, $stream:ident => $run:expr) => {
        match $transport.get_mut() {
            Transport::Plain(plain) => {
                let $stream = Pin::new(plain);
                $run
            }
            Transport::Tls(tls) => {
                let $stream = Pin::new(&mut **tls);
                $run
            }
        }
    };
}

impl AsyncRead for Transport {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        on_transport!(self, stream => stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for Transport {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        on_transport!(self, stream => stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        on_transport!(self, stream => stream.poll_write_vectored(context, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(plain) => plain.is_write_vectored(),
            Self::Tls(tls) => tls.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_transport!(self, stream => stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_transport!(self, stream => stream.poll_shutdown(context))
    }
}

/// A transport that hyper has, for asking its visitor something between what hyper sends.
#[derive(Clone, Debug)]
pub(crate) struct SharedTransport(Arc<Mutex<Transport>>);

impl SharedTransport {
    pub(super) fn new(transport: Transport) -> Self {
        Self(Arc::new(Mutex::new(transport)))
    }

    /// Held between awaits only.
    pub(super) fn lock(&self) -> MutexGuard<'_, Transport> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a few bytes if there is room for them, while hyper has nothing to send. Returns whether the connection is still there,
    /// as far as that shows.
    pub(super) fn send(&self, bytes: &[u8]) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        let mut transport = self.lock();
        let written = Pin::new(&mut *transport).poll_write(&mut context, bytes);
        let flushed = Pin::new(&mut *transport).poll_flush(&mut context);
        match written {
            Poll::Pending => true,
            Poll::Ready(Ok(length)) if length == bytes.len() => {
                !matches!(flushed, Poll::Ready(Err(_)))
            }
            Poll::Ready(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
        time::timeout,
    };

    use super::*;

    #[tokio::test]
    async fn bytes_and_the_end_are_noticed_after_a_read_that_emptied_the_socket() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let mut visitor = TcpStream::connect(address).await.expect("a connection");
        let (stream, peer) = listener.accept().await.expect("a connection");
        let socket = Arc::new(VisitorSocket::new(stream, peer, false));
        let mut stream = RawStream::new(socket);
        let mut read = async |most: usize| {
            let mut bytes = vec![0; most];
            let reading = timeout(Duration::from_secs(20), stream.read(&mut bytes));
            let length = reading.await.expect("news").expect("a length");
            bytes[..length].to_vec()
        };
        visitor.write_all(b"more than is read").await.expect("sent");
        assert_eq!(read(4).await, b"more");
        assert_eq!(read(64).await, b" than is read");
        visitor.write_all(b"after that").await.expect("sent");
        assert_eq!(read(64).await, b"after that");
        visitor.write_all(b"last").await.expect("sent");
        drop(visitor);
        assert_eq!(read(64).await, b"last");
        assert_eq!(read(64).await, b"");
    }
}
