//! A socket of the local service, from which a response is read to its end although the service takes no more of the request.
//!
//! A service may answer before it has read the request, and then close the connection. Its answer has arrived, but the next write
//! fails, and an HTTP client that has failed to write does not read. So a write that fails waits here until the response has been
//! read. What comes of the connection then is what reading finds: the response, its end, or the error.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use crate::{
    lock::lock,
    origin_pool::{OriginConnection, OriginPool},
};

/// How long a write that failed waits at most. A response takes less as a rule; this ends connections that nobody reads any more.
const MAX_WAIT: Duration = Duration::from_secs(5 * 60);

trait ReadWrite: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ReadWrite for T {}

/// A TCP or Unix socket, or what stands for one.
pub(crate) struct OriginSocket {
    stream: Box<dyn ReadWrite>,
    responses: Responses,
    failure: Option<WriteFailure>,
}

/// A write that failed.
struct WriteFailure {
    kind: io::ErrorKind,
    limit: Pin<Box<Sleep>>,
}

/// Tells a socket when the responses that it carries have been read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Responses(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The last response has been read, and there has been no other request since.
    is_read: bool,
    /// The connection carries no responses any more.
    is_upgraded: bool,
    /// The task whose write waits.
    writer: Option<Waker>,
}

/// Held while a response is read.
#[derive(Debug)]
struct ReadingResponse(Responses);

/// The body of a response. Until it has been read to its end or is dropped, it is read on although the service takes no more of the
/// request.
#[derive(Debug)]
pub struct ResponseBody {
    body: Incoming,
    reading: Option<ReadingResponse>,
    /// Takes the connection once the body has been read to its end. Until then, reading the body drives it.
    kept_by: Option<(OriginPool, OriginConnection)>,
}

impl Responses {
    /// A response has begun, and this is its body.
    pub(crate) fn body(self, body: Incoming) -> ResponseBody {
        let mut body = ResponseBody {
            body,
            reading: Some(ReadingResponse(self)),
            kept_by: None,
        };
        body.end_if_read();
        body
    }

    /// A request is about to be written: what is read from now on is its response.
    pub(crate) fn expect(&self) {
        lock(&self.0).is_read = false;
    }

    /// The response has been read, or nothing more of it is.
    pub(crate) fn end(&self) {
        let mut state = lock(&self.0);
        state.is_read = true;
        if let Some(writer) = state.writer.take() {
            writer.wake();
        }
    }

    /// The connection has changed its protocol: what comes is no response, so no write waits for one.
    pub(crate) fn upgraded(&self) {
        lock(&self.0).is_upgraded = true;
    }
}

impl Drop for ReadingResponse {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl ResponseBody {
    /// A body during which no write waits.
    pub(crate) fn unobserved(body: Incoming) -> Self {
        Self {
            body,
            reading: None,
            kept_by: None,
        }
    }

    /// Once it has been read to its end, `pool` has the connection that it came on.
    pub(crate) fn kept_by(mut self, pool: OriginPool, connection: OriginConnection) -> Self {
        self.kept_by = Some((pool, connection));
        self.end_if_read();
        self
    }

    /// Once the last bytes have been taken, the socket may carry the next response: what still holds the body must not end that.
    fn end_if_read(&mut self) {
        if self.body.is_end_stream() {
            self.end();
        }
    }

    fn end(&mut self) {
        self.reading = None;
        if let Some((pool, connection)) = self.kept_by.take() {
            pool.keep(connection);
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Self { body, kept_by, .. } = &mut *self;
        let mut poll_frame = |cx: &mut Context<'_>| Pin::new(&mut *body).poll_frame(cx);
        let polled = match kept_by {
            Some((_, connection)) => connection.driver.poll_beside(cx, poll_frame),
            None => poll_frame(cx),
        };
        let frame = ready!(polled);
        match &frame {
            Some(Ok(_)) => self.end_if_read(),
            Some(Err(_)) => {
                self.reading = None;
                self.kept_by = None;
            }
            None => self.end(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl OriginSocket {
    pub(crate) fn wrap(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> TokioIo<Self> {
        TokioIo::new(Self {
            stream: Box::new(stream),
            responses: Responses::default(),
            failure: None,
        })
    }

    fn try_write(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut dyn ReadWrite>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if self.failure.is_none() {
            match ready!(write(Pin::new(&mut *self.stream), cx)) {
                Ok(written) => return Poll::Ready(Ok(written)),
                Err(error) => {
                    self.failure = Some(WriteFailure {
                        kind: error.kind(),
                        limit: Box::pin(sleep(MAX_WAIT)),
                    });
                }
            }
        }
        self.wait_for_response(cx)
    }

    /// Fails as the write did, once there is no response that could still be read.
    fn wait_for_response(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Some(failure) = &mut self.failure else {
            return Poll::Pending;
        };
        let mut state = lock(&self.responses.0);
        if state.is_upgraded || state.is_read || failure.limit.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(failure.kind.into()));
        }
        state.writer = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Connection for OriginSocket {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.responses.clone())
    }
}

impl AsyncRead for OriginSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            return Poll::Ready(Ok(()));
        }
        match &self.failure {
            // The write has consumed the error that this end is: of an orderly end a write says that the pipe is broken.
            Some(failure) if failure.kind != io::ErrorKind::BrokenPipe => {
                Poll::Ready(Err(failure.kind.into()))
            }
            _ => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncWrite for OriginSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.try_write(cx, |stream, cx| stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.try_write(cx, |stream, cx| stream.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::scripted::within;

    const ANSWER: &[u8] = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n";

    /// A socket to a service that has said this and then reset the connection.
    async fn answered(answer: &[u8]) -> OriginSocket {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let stream = TcpStream::connect(address).await.expect("a connection");
        let (mut service, _) = listener.accept().await.expect("a connection");
        service.write_all(answer).await.expect("sent");
        service.set_zero_linger().expect("set");
        OriginSocket::wrap(stream).into_inner()
    }

    /// Whether the next write that does not succeed fails. Otherwise it waits.
    async fn fails(socket: &mut OriginSocket) -> bool {
        loop {
            let write = poll_fn(|cx| Poll::Ready(Pin::new(&mut *socket).poll_write(cx, b"more")));
            match write.await {
                Poll::Ready(Ok(_)) => tokio::task::yield_now().await,
                outcome => return outcome.is_ready(),
            }
        }
    }

    async fn read(socket: &mut OriginSocket) -> (Vec<u8>, io::ErrorKind) {
        let mut answer = Vec::new();
        let end = within("the end", socket.read_to_end(&mut answer)).await;
        (answer, end.expect_err("no orderly end").kind())
    }

    #[tokio::test]
    async fn a_response_is_read_although_a_write_has_failed() {
        let mut socket = answered(ANSWER).await;
        assert!(!fails(&mut socket).await);
        let reading = ReadingResponse(socket.responses.clone());
        let (answer, end) = read(&mut socket).await;
        assert_eq!(answer, ANSWER);
        assert_eq!(end, io::ErrorKind::ConnectionReset);
        assert!(!fails(&mut socket).await, "what was read may still be used");
        drop(reading);
        assert!(fails(&mut socket).await);
    }

    #[tokio::test]
    async fn a_response_after_another_is_read_although_a_write_has_failed() {
        let mut socket = answered(ANSWER).await;
        drop(ReadingResponse(socket.responses.clone()));
        socket.responses.expect();
        assert!(!fails(&mut socket).await, "there may be something to read");
        assert_eq!(read(&mut socket).await.0, ANSWER);
        assert!(!fails(&mut socket).await);
    }

    #[tokio::test]
    async fn a_write_fails_if_nothing_comes_after_the_last_response() {
        let mut socket = answered(b"").await;
        drop(ReadingResponse(socket.responses.clone()));
        assert!(fails(&mut socket).await);
    }

    #[tokio::test]
    async fn a_write_waits_for_no_response_once_nothing_more_is_read() {
        let mut socket = answered(b"").await;
        let responses = socket.responses.clone();
        responses.expect();
        let (failed, ()) = tokio::join!(within("a failure", socket.write_all(&[0; 64])), async {
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            responses.end();
        });
        failed
            .or(socket.write_all(b"more").await)
            .expect_err("reset");
    }

    #[tokio::test]
    async fn a_write_fails_at_once_on_an_upgraded_connection() {
        let mut socket = answered(b"bytes of another protocol").await;
        socket.responses.upgraded();
        let mut bytes = [0; 5];
        let read = within("bytes", socket.read_exact(&mut bytes)).await;
        read.expect("bytes");
        assert!(fails(&mut socket).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_does_not_wait_for_ever() {
        let mut socket = answered(b"").await;
        let began = tokio::time::Instant::now();
        let written = async { while socket.write(b"more").await.is_ok() {} };
        tokio::time::timeout(2 * MAX_WAIT, written)
            .await
            .expect("a failure");
        assert!(began.elapsed() >= MAX_WAIT);
    }
}
