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

use http::{Extensions, Request};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::connect::{CaptureConnection, Connected, Connection, capture_connection},
    rt::TokioIo,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use crate::lock::lock;

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
    /// Whoever writes has had an opportunity to read since.
    could_read: bool,
    limit: Pin<Box<Sleep>>,
}

/// Tells a socket when the responses that it carries have been read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Responses(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The last response has been read, and nothing has come since.
    is_read: bool,
    /// The connection carries no responses any more.
    is_upgraded: bool,
    /// How many requests with a body and responses have begun.
    begun: u64,
    /// The task whose write waits.
    writer: Option<Waker>,
}

/// Held while a response is read.
#[derive(Debug)]
struct ReadingResponse {
    responses: Responses,
    number: u64,
}

/// The body of a request. Before the first of its bytes is written, and its head with it, the socket learns that whatever is read
/// from then on belongs to another response than the last: that one's body may still be waiting to be taken.
#[derive(Debug)]
pub(crate) struct RequestBody<B> {
    body: B,
    /// The connection that it is written to, until it is.
    connection: Option<CaptureConnection>,
}

/// The body of a response. Until it has been read to its end or is dropped, it is read on although the service takes no more of the
/// request.
#[derive(Debug)]
pub struct ResponseBody<B = Incoming> {
    body: B,
    reading: Option<ReadingResponse>,
}

impl Responses {
    /// A response has begun, and this is its body.
    pub(crate) fn body<B: Body>(self, body: B) -> ResponseBody<B> {
        let mut body = ResponseBody {
            body,
            reading: Some(self.begin()),
        };
        body.end_if_read();
        body
    }

    /// A request with a body is about to be written.
    fn expect_another(&self) {
        let mut state = lock(&self.0);
        state.begun += 1;
        state.is_read = false;
    }

    /// The connection has changed its protocol: what comes is no response, so no write waits for one.
    pub(crate) fn upgraded(&self) {
        lock(&self.0).is_upgraded = true;
    }

    /// A response is being read from now on, until what this returns is dropped.
    fn begin(self) -> ReadingResponse {
        let number = {
            let mut state = lock(&self.0);
            state.begun += 1;
            state.begun
        };
        ReadingResponse {
            responses: self,
            number,
        }
    }
}

impl Drop for ReadingResponse {
    fn drop(&mut self) {
        let mut state = lock(&self.responses.0);
        // The next one may have begun, or be awaited: this end is not its end.
        if state.begun == self.number {
            state.is_read = true;
            if let Some(writer) = state.writer.take() {
                writer.wake();
            }
        }
    }
}

/// A request whose body tells the socket that it begins.
pub(crate) fn observed<B: Body>(request: Request<B>) -> Request<RequestBody<B>> {
    let has_body = !request.body().is_end_stream();
    let mut request = request.map(|body| RequestBody {
        body,
        connection: None,
    });
    // Without one nothing is left to be written when an early answer comes.
    if has_body {
        let connection = capture_connection(&mut request);
        request.body_mut().connection = Some(connection);
    }
    request
}

impl<B> RequestBody<B> {
    fn begin(&mut self) {
        let Some(connection) = self.connection.take() else {
            return;
        };
        let mut extras = Extensions::new();
        if let Some(connected) = &*connection.connection_metadata() {
            connected.get_extras(&mut extras);
        }
        if let Some(responses) = extras.remove::<Responses>() {
            responses.expect_another();
        }
    }
}

impl<B: Body + Unpin> Body for RequestBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.begin();
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B: Body> ResponseBody<B> {
    /// A body during which no write waits.
    pub(crate) fn unobserved(body: B) -> Self {
        Self {
            body,
            reading: None,
        }
    }

    /// Once the last bytes have been taken, the socket may carry the next response: what still holds the body must not end that.
    fn end_if_read(&mut self) {
        if self.body.is_end_stream() {
            self.reading = None;
        }
    }
}

impl<B: Body + Unpin> Body for ResponseBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if matches!(frame, Some(Ok(_))) {
            self.end_if_read();
        } else {
            self.reading = None;
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
                        could_read: false,
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
        if state.is_upgraded {
            return Poll::Ready(Err(failure.kind.into()));
        }
        // After a response there may be another request on the same connection, and its response in the socket.
        let could_read = std::mem::replace(&mut failure.could_read, true);
        if (state.is_read && could_read) || failure.limit.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(failure.kind.into()));
        }
        if state.is_read {
            cx.waker().wake_by_ref();
        } else {
            state.writer = Some(cx.waker().clone());
        }
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
            lock(&self.responses.0).is_read = false;
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

    use bytes::Bytes;
    use http_body_util::{BodyExt, Full};
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
        let reading = socket.responses.clone().begin();
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
        drop(socket.responses.clone().begin());
        assert!(!fails(&mut socket).await, "there may be something to read");
        assert_eq!(read(&mut socket).await.0, ANSWER);
        assert!(!fails(&mut socket).await);
    }

    #[tokio::test]
    async fn a_write_fails_if_nothing_comes_after_the_last_response() {
        let mut socket = answered(b"").await;
        drop(socket.responses.clone().begin());
        assert!(!fails(&mut socket).await);
        assert!(fails(&mut socket).await);
    }

    #[tokio::test]
    async fn a_response_outlasts_the_one_before() {
        // Its bytes have been taken, and are on their way to the visitor.
        let mut socket = answered(ANSWER).await;
        let mut before = socket.responses.clone().body(Full::new(Bytes::from("ok")));
        assert!(before.frame().await.is_some());
        assert_eq!(read(&mut socket).await.0, ANSWER);
        drop(before);
        assert!(!fails(&mut socket).await);
        assert!(!fails(&mut socket).await);

        // Its last bytes wait until the visitor takes more.
        let mut socket = answered(ANSWER).await;
        let before = socket.responses.clone().body(Full::new(Bytes::from("ok")));
        assert_eq!(read(&mut socket).await.0, ANSWER);
        let body = Full::new(Bytes::from("413"));
        let response = socket.responses.clone().body(body);
        drop(before);
        assert!(!fails(&mut socket).await);
        assert!(!fails(&mut socket).await);
        drop(response);
        assert!(fails(&mut socket).await);
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
