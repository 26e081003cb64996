//! Requests that say two things about their length. hyper takes one and drops the other without a word; whoever stands in front may
//! have taken the other one, and then the two see different requests (RFC 9112, 6.3 and 11.2). So they are refused.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use http::{Request, header};
use http_body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::server::MAX_HEAD_BYTES;

/// The bytes that a visitor has sent since the last answer, up to the end of a head.
#[derive(Clone, Debug, Default)]
pub struct HeadRecorder(Arc<Mutex<Vec<u8>>>);

impl HeadRecorder {
    /// Whether a request may be served: what it was made of says only one thing about its length. A chunked request whose head
    /// cannot be seen, because it came before the answer to the one before it, is not.
    pub fn is_plain<B>(&self, request: &Request<B>) -> bool {
        let is_chunked = request.headers().contains_key(header::TRANSFER_ENCODING);
        if !is_chunked && !request.headers().contains_key(header::CONTENT_LENGTH) {
            return true;
        }
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut fields = vec![httparse::EMPTY_HEADER; tunnel_protocol::limits::MAX_HEADER_FIELDS];
        let mut head = httparse::Request::new(&mut fields);
        let is_this = matches!(head.parse(&bytes), Ok(httparse::Status::Complete(_)))
            && head.method == Some(request.method().as_str());
        if !is_this {
            // hyper itself refuses lengths that differ.
            return !is_chunked;
        }
        let is_length = |field: &&httparse::Header<'_>| {
            field.name.eq_ignore_ascii_case("content-length")
                || field.name.eq_ignore_ascii_case("transfer-encoding")
        };
        head.headers.iter().filter(is_length).count() == 1
    }
}

/// A request's body that notes when it has been read to its end.
#[derive(Debug)]
pub struct TrackedBody<B> {
    body: B,
    is_read: Arc<AtomicBool>,
}

impl<B: Body> TrackedBody<B> {
    /// The body, and whether it has been read. An answer given before that has to be the connection's last: what is left of the
    /// body would look like the start of the next head.
    pub fn new(body: B) -> (Self, Arc<AtomicBool>) {
        let is_read = Arc::new(AtomicBool::new(body.is_end_stream()));
        (
            Self {
                body,
                is_read: is_read.clone(),
            },
            is_read,
        )
    }
}

impl<B: Body + Unpin> Body for TrackedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if frame.is_none() || self.body.is_end_stream() {
            self.is_read.store(true, Ordering::Relaxed);
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

/// A visitor's connection that keeps the last head.
#[derive(Debug)]
pub struct RecordingStream<S> {
    stream: S,
    head: HeadRecorder,
    /// The head is complete: what follows is body.
    is_complete: bool,
}

impl<S> RecordingStream<S> {
    /// Watches `stream`.
    pub fn new(stream: S, head: HeadRecorder) -> Self {
        Self {
            stream,
            head,
            is_complete: false,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for RecordingStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if !self.is_complete {
            let watched = &mut *self;
            let mut head = watched
                .head
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            // An end may be in two reads.
            let from = head.len().saturating_sub(3);
            head.extend_from_slice(&buffer.filled()[before..]);
            watched.is_complete = head.len() > MAX_HEAD_BYTES
                || head[from..].windows(4).any(|four| four == b"\r\n\r\n");
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for RecordingStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.answered();
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.answered();
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl<S> RecordingStream<S> {
    /// What comes next is another request.
    fn answered(&mut self) {
        self.is_complete = false;
        self.head
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}
