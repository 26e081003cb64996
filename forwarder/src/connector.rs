//! Connections to the local service: over TCP or a Unix socket, with TLS where the target has it, all within one time limit. Each
//! keeps a record of what it was used for, from which failures are explained.

use std::{
    error::Error,
    future::Future,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{Extensions, Uri};
use hyper::rt::{Read, Write};
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::{
    client::legacy::connect::{
        Connection, HttpConnector,
        dns::{GaiResolver, Name},
    },
    rt::TokioIo,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::timeout,
};
use tower_service::Service;

use crate::{
    directory::Directory,
    lock::lock,
    origin_socket::{OriginSocket, Responses},
    target::{Target, TargetTransport},
};

/// How long connecting to the local service may take, the TLS handshake included.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How much of a response's head is kept to explain what is wrong with it.
const MAX_RECORDED_BYTES: usize = 16 * 1024;

pub(crate) type BoxError = Box<dyn Error + Send + Sync>;
type BoxFuture<T> = Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send>>;

/// Makes connections to one target.
#[derive(Clone, Debug)]
pub(crate) struct Connector(HttpsConnector<Dialer>);

impl Connector {
    /// Connects to `target`. Its scheme decides about TLS.
    pub(crate) fn new(target: &Target, tls: rustls::ClientConfig, is_single_page: bool) -> Self {
        Self(HttpsConnector::from((
            Dialer::new(target, is_single_page),
            tls,
        )))
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Recorded<MaybeHttpsStream<TokioIo<OriginSocket>>>>;
    type Error = BoxError;
    type Future = BoxFuture<Self::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.0.call(uri);
        Box::pin(async move {
            let stream = timeout(CONNECT_TIMEOUT, connecting)
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            Ok(Recorded::wrap(stream))
        })
    }
}

/// Makes connections without TLS.
#[derive(Clone, Debug)]
enum Dialer {
    Tcp(HttpConnector),
    Loopback(HttpConnector<LoopbackResolver>, u16),
    #[cfg(unix)]
    Unix(std::path::PathBuf),
    Directory(Directory),
}

impl Dialer {
    fn new(target: &Target, is_single_page: bool) -> Self {
        match &target.transport {
            TargetTransport::Directory(root) => {
                Self::Directory(Directory::new(root, is_single_page))
            }
            TargetTransport::Tcp => Self::Tcp(configured(HttpConnector::new_with_resolver(
                GaiResolver::new(),
            ))),
            TargetTransport::Loopback => Self::Loopback(
                configured(HttpConnector::new_with_resolver(LoopbackResolver)),
                target.authority.port_u16().unwrap_or(80),
            ),
            #[cfg(unix)]
            TargetTransport::Unix(path) => Self::Unix(path.clone()),
            #[cfg(not(unix))]
            TargetTransport::Unix(_) => unreachable!("no target is a Unix socket on this system"),
        }
    }
}

fn configured<R>(mut connector: HttpConnector<R>) -> HttpConnector<R> {
    connector.set_nodelay(true);
    connector.enforce_http(false);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<OriginSocket>;
    type Error = BoxError;
    type Future = BoxFuture<Self::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self {
            Self::Tcp(connector) => connector.poll_ready(cx).map_err(Into::into),
            Self::Loopback(connector, _) => connector.poll_ready(cx).map_err(Into::into),
            #[cfg(unix)]
            Self::Unix(_) => Poll::Ready(Ok(())),
            Self::Directory(_) => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        match self {
            Self::Directory(directory) => {
                let stream = OriginSocket::wrap(directory.connect());
                Box::pin(std::future::ready(Ok(stream)))
            }
            Self::Tcp(connector) => {
                let connecting = connector.call(uri);
                Box::pin(async move { Ok(OriginSocket::wrap(connecting.await?.into_inner())) })
            }
            Self::Loopback(connector, port) => {
                // Only names are resolved, so a name has to stand for the two addresses.
                let uri = format!("http://localhost:{port}").parse();
                let connecting = connector.call(uri.expect("a host and a port"));
                Box::pin(async move { Ok(OriginSocket::wrap(connecting.await?.into_inner())) })
            }
            #[cfg(unix)]
            Self::Unix(path) => {
                let connecting = tokio::net::UnixStream::connect(path.clone());
                Box::pin(async move { Ok(OriginSocket::wrap(connecting.await?)) })
            }
        }
    }
}

/// Both addresses of this machine, whatever its name service says.
#[derive(Clone, Debug)]
struct LoopbackResolver;

impl Service<Name> for LoopbackResolver {
    type Response = std::array::IntoIter<SocketAddr, 2>;
    type Error = io::Error;
    type Future = std::future::Ready<Result<Self::Response, io::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Name) -> Self::Future {
        let addresses = [
            (Ipv4Addr::LOCALHOST, 0).into(),
            (Ipv6Addr::LOCALHOST, 0).into(),
        ];
        std::future::ready(Ok(addresses.into_iter()))
    }
}

/// What a connection was used for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record(Arc<Mutex<Recording>>);

#[derive(Debug, Default)]
struct Recording {
    has_served: bool,
    /// A response was taken, and nothing has been written since.
    is_answered: bool,
    /// The beginning of what was read since the first write after the last response. Later writes do not clear it: a response may
    /// begin while the body of its request is still being written. Where the last response came before its request was written,
    /// what was read since counts, too, so that the next request is not repeated though it could be.
    head: Vec<u8>,
    is_complete: bool,
}

impl Record {
    /// Notes that a request has had its response on this connection.
    pub(crate) fn mark_served(&self) {
        let mut recording = self.lock();
        recording.has_served = true;
        recording.is_answered = true;
    }

    /// Whether an earlier request has had its response on this connection.
    pub(crate) fn has_served(&self) -> bool {
        self.lock().has_served
    }

    /// The beginning of the last response: its head, as far as it came and was kept.
    pub(crate) fn head(&self) -> Vec<u8> {
        self.lock().head.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Recording> {
        lock(&self.0)
    }
}

impl Recording {
    fn write(&mut self) {
        if std::mem::take(&mut self.is_answered) {
            self.head.clear();
            self.is_complete = false;
        }
    }

    fn read(&mut self, bytes: &[u8]) {
        if self.is_complete {
            return;
        }
        let room = MAX_RECORDED_BYTES - self.head.len();
        let bytes = &bytes[..bytes.len().min(room)];
        // Most heads come at once, and with them the beginning of a body, which is not to be copied.
        if self.head.is_empty()
            && let Some(end) = end_of_head(bytes)
        {
            self.head.extend_from_slice(&bytes[..end]);
            self.is_complete = true;
            return;
        }
        self.head.extend_from_slice(bytes);
        self.is_complete =
            self.head.len() == MAX_RECORDED_BYTES || end_of_head(&self.head).is_some();
    }
}

/// Where the first empty line after the first line begins, where lines may end without CR.
fn end_of_head(bytes: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'\n', bytes)
        .map(|end| end + 1)
        .find(|after| matches!(bytes[*after..], [b'\n', ..] | [b'\r', b'\n', ..]))
}

/// A connection with its record. Only the beginning of a response is copied.
pub(crate) struct Recorded<T> {
    stream: TokioIo<T>,
    /// What it was used for.
    pub(crate) record: Record,
    /// Tells its socket when responses have been read.
    pub(crate) responses: Responses,
}

impl<T: Connection> Recorded<T> {
    fn wrap(stream: T) -> TokioIo<Self> {
        let mut extras = Extensions::new();
        stream.connected().get_extras(&mut extras);
        TokioIo::new(Self {
            stream: TokioIo::new(stream),
            record: Record::default(),
            responses: extras.remove().expect("each socket has responses"),
        })
    }
}

impl<T: Read + Unpin> AsyncRead for Recorded<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        self.record.lock().read(&buffer.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl<T: Write + Unpin> AsyncWrite for Recorded<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.record.lock().write();
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.record.lock().write();
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Nothing is read from then on, so what TLS still writes waits for no response.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.responses.end();
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_the_head_of_a_response_and_nothing_of_its_body() {
        const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n";
        let whole = format!("{HEAD}\r\nok");
        for at in 0..=whole.len() {
            let record = Record::default();
            let (first, rest) = whole.split_at(at);
            record.lock().read(first.as_bytes());
            record.lock().read(rest.as_bytes());
            record.lock().read(b"HTTP/1.1 404 Not Found\r\n");
            assert!(record.head().starts_with(HEAD.as_bytes()), "{at}");
            assert!(record.head().len() <= whole.len(), "{at}");
        }
        let record = Record::default();
        record.lock().read(whole.as_bytes());
        assert_eq!(record.head(), HEAD.as_bytes());
        record.mark_served();
        record.lock().write();
        assert_eq!(record.head(), b"");
    }
}
