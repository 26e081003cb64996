//! Visitors that speak HTTP/2: what their requests must be, and what one connection may do. WebSockets stay on HTTP/1.1, which
//! browsers fall back to where a server does not offer extended CONNECT (RFC 8441).

use std::{
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, header, uri::PathAndQuery};
use http_body::{Body, Frame, SizeHint};
use hyper::{rt::Executor, server::conn::http2};
use hyper_util::rt::TokioTimer;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::CancellationToken;
use tunnel_forward::{
    ServedTunnel,
    response::{ResponseBody, ResponseBodyError, whole},
};
use tunnel_protocol::limits::MAX_HEADER_FIELDS;

use crate::{
    front::{
        request_head::{self, MAX_HEAD_BYTES, RequestHeadError},
        socket::{MAX_STALL, RESET_DELAY},
    },
    operator::Visit,
    subsystem::Subsystem,
};

/// Most requests of one connection at once; browsers send no more than this to any server.
const MAX_STREAMS: u32 = 100;
/// Most bytes of one request's body, and of all bodies of a connection, that are received and not passed on yet.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// Most bytes of one response that wait to be sent.
const SEND_BUFFER_BYTES: usize = 128 * 1024;
/// What HTTP/2 counts for a field besides its text (RFC 9113, 6.5.2).
const FIELD_OVERHEAD_BYTES: usize = 32;
/// Most streams that a visitor has opened and reset before they were looked at, and most that were reset for its faults.
const MAX_UNSEEN_RESETS: usize = 20;
const MAX_FAULTS: usize = 100;
/// What a visitor may owe for requests that it has given up, before its connection is closed: each costs this much, and a request
/// that a tunnel has answered whole pays back 1. Opening and resetting streams costs a visitor nothing, and an agent a request.
const MAX_ABANDONED: usize = 800;
const ABANDONED_COST: usize = 4;

/// HTTP/2 with this front's limits.
pub(crate) fn builder(subsystem: Subsystem) -> http2::Builder<StreamExecutor> {
    let mut http = http2::Builder::new(StreamExecutor(subsystem));
    let head_bytes = MAX_HEAD_BYTES + MAX_HEADER_FIELDS * FIELD_OVERHEAD_BYTES;
    http.timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .max_header_list_size(u32::try_from(head_bytes).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(MAX_UNSEEN_RESETS)
        .max_local_error_reset_streams(MAX_FAULTS);
    http
}

/// Runs what hyper does for each stream.
#[derive(Clone, Debug)]
pub(crate) struct StreamExecutor(Subsystem);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for StreamExecutor {
    fn execute(&self, stream: F) {
        self.0.spawn(stream);
    }
}

/// Makes a request what it would be over HTTP/1.1, by the same rules. What connection fields are concerned, hyper has refused
/// them.
///
/// # Errors
/// If it contradicts itself, or is too large.
pub(crate) fn check<B>(request: &mut Request<B>) -> Result<(), RequestHeadError> {
    if request.headers().len() > MAX_HEADER_FIELDS {
        return Err(RequestHeadError::TooLarge);
    }
    if request.method() == Method::CONNECT {
        return Err(RequestHeadError::Malformed(
            "it is a CONNECT: this is not a proxy",
        ));
    }
    let host = host(request)?;
    let headers = request.headers_mut();
    headers.insert(header::HOST, host);
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    if let Some(length) = lengths.next() {
        request_head::content_length(length.as_bytes())?;
    }
    if lengths.next().is_some() {
        return Err(RequestHeadError::Malformed(
            "it has several Content-Length fields",
        ));
    }
    join_cookies(headers);
    let target = request
        .uri()
        .path_and_query()
        .map_or("/", PathAndQuery::as_str);
    let escaped = request_head::escape_target(request.method().as_str(), target)?;
    let target = escaped.unwrap_or_else(|| target.to_owned());
    let invalid = RequestHeadError::Malformed("its target is not valid");
    *request.uri_mut() = target.parse::<Uri>().map_err(|_| invalid)?;
    Ok(())
}

/// The host that a request is for (RFC 9113, 8.3.1).
fn host<B>(request: &Request<B>) -> Result<HeaderValue, RequestHeadError> {
    let mut fields = request.headers().get_all(header::HOST).iter();
    let field = fields.next();
    if fields.next().is_some() {
        return Err(RequestHeadError::Malformed("it has several Host fields"));
    }
    let authority = request
        .uri()
        .authority()
        .map(|authority| authority.as_str());
    let host = match (authority, field) {
        (None, None) => return Err(RequestHeadError::Malformed("it has no Host")),
        (Some(authority), Some(field))
            if !field.as_bytes().eq_ignore_ascii_case(authority.as_bytes()) =>
        {
            return Err(RequestHeadError::Malformed(
                "its Host is not the one in its address",
            ));
        }
        (None, Some(field)) => field.clone(),
        (Some(authority), _) => HeaderValue::from_str(authority)
            .map_err(|_| RequestHeadError::Malformed("its Host is not valid"))?,
    };
    if request_head::is_host(host.as_bytes()) {
        Ok(host)
    } else {
        Err(RequestHeadError::Malformed("its Host is not valid"))
    }
}

/// HTTP/2 may cut the cookies into several fields; HTTP/1.1 has one (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let crumbs: Vec<&[u8]> = headers
        .get_all(header::COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if crumbs.len() > 1
        && let Ok(cookies) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        headers.insert(header::COOKIE, cookies);
    }
}

/// The requests of a connection.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    state: Mutex<StreamsState>,
    /// Cancelled when the visitor has given up too many requests.
    pub(crate) is_flooded: CancellationToken,
}

#[derive(Debug)]
struct StreamsState {
    open: usize,
    /// Since when none is open and what was sent is in the socket, as far as was looked.
    idle_since: Instant,
    /// What those that were given up cost, less what others have paid back.
    abandoned: usize,
    sending: Vec<Weak<Mutex<Sending>>>,
}

impl Default for StreamsState {
    fn default() -> Self {
        Self {
            open: 0,
            idle_since: Instant::now(),
            abandoned: 0,
            sending: Vec::new(),
        }
    }
}

impl Streams {
    /// Counts a request until the value is dropped.
    pub(crate) fn open(self: &Arc<Self>, method: &Method) -> OpenStream {
        self.state().open += 1;
        OpenStream {
            streams: self.clone(),
            is_head: method == Method::HEAD,
            is_of_tunnel: false,
            is_answered: false,
        }
    }

    /// How long no request has been open and the socket has had room; `None` while a request is.
    pub(crate) fn idle(&self) -> Option<Duration> {
        let state = self.state();
        (state.open == 0).then(|| state.idle_since.elapsed())
    }

    /// Breaks off responses of which the visitor has taken nothing for [`MAX_STALL`] while the socket had room. What they hold is
    /// free then, but for what hyper was given, and the visitor sees it only once it reads on. Tells whether one has been stuck for
    /// as long again: only the end of the connection frees that one.
    pub(crate) fn check(&self, is_socket_full: bool) -> bool {
        let now = Instant::now();
        let mut is_stuck = false;
        let mut state = self.state();
        if is_socket_full {
            state.idle_since = now;
        }
        state.sending.retain(|sending| {
            let Some(sending) = sending.upgrade() else {
                return false;
            };
            let mut sending = lock(&sending);
            let Some(given_at) = sending.given_at else {
                return true;
            };
            if is_socket_full {
                // The way to the visitor is slow. Whether it would take more of this response will show.
                sending.given_at = Some(now);
                return true;
            }
            let stalled = now.duration_since(given_at);
            if stalled >= MAX_STALL {
                sending.body = None;
            }
            is_stuck |= stalled >= 2 * MAX_STALL;
            true
        });
        is_stuck
    }

    fn state(&self) -> MutexGuard<'_, StreamsState> {
        lock(&self.state)
    }
}

/// A request that is being served.
#[derive(Debug)]
pub(crate) struct OpenStream {
    streams: Arc<Streams>,
    is_head: bool,
    /// Whether a tunnel answers it.
    is_of_tunnel: bool,
    is_answered: bool,
}

impl OpenStream {
    /// The response as it is sent on this stream.
    pub(crate) fn answer(
        mut self,
        response: Response<ResponseBody>,
        noted: Option<Arc<Visit>>,
    ) -> Response<StreamBody> {
        self.is_of_tunnel = response.extensions().get::<ServedTunnel>().is_some();
        let response = if self.is_head {
            without_body(response)
        } else {
            response
        };
        let mut response = response.map(|body| {
            let sending = Arc::new(Mutex::new(Sending {
                body: Some(body),
                given_at: None,
            }));
            self.streams.state().sending.push(Arc::downgrade(&sending));
            StreamBody {
                sending,
                broken: None,
                noted,
                stream: self,
            }
        });
        // What is said of the connection is for HTTP/1.1 (RFC 9113, 8.2.2).
        for name in [header::CONNECTION, header::UPGRADE] {
            response.headers_mut().remove(name);
        }
        response
    }
}

/// The answer to a HEAD request. Over HTTP/2 hyper would send the body.
fn without_body(mut response: Response<ResponseBody>) -> Response<ResponseBody> {
    let length = response.body().size_hint().exact();
    if let Some(length) = length.filter(|length| *length > 0) {
        let fields = response.headers_mut();
        fields
            .entry(header::CONTENT_LENGTH)
            .or_insert_with(|| length.into());
    }
    response.map(|_| whole(Bytes::new()))
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        let mut state = self.streams.state();
        state.open -= 1;
        state.idle_since = Instant::now();
        if self.is_answered {
            let paid = usize::from(self.is_of_tunnel);
            state.abandoned = state.abandoned.saturating_sub(paid);
            return;
        }
        state.abandoned += ABANDONED_COST;
        if state.abandoned > MAX_ABANDONED {
            self.streams.is_flooded.cancel();
        }
    }
}

/// A response's body on its way.
#[derive(Debug)]
struct Sending {
    /// `None` once it was broken off.
    body: Option<ResponseBody>,
    /// When hyper was given bytes, if it has not asked for more since: it does when the visitor has taken them.
    given_at: Option<Instant>,
}

/// Why a response's body breaks off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamBodyError {
    /// The body did.
    #[error(transparent)]
    Body(#[from] ResponseBodyError),
    /// The visitor has not taken it.
    #[error("the visitor has taken nothing for {} s", MAX_STALL.as_secs())]
    Stalled,
}

/// A response's body. If it breaks off, its stream is reset.
#[derive(Debug)]
pub(crate) struct StreamBody {
    sending: Arc<Mutex<Sending>>,
    broken: Option<(StreamBodyError, Pin<Box<Sleep>>)>,
    /// What is noted of the request, unless it is an agent's.
    noted: Option<Arc<Visit>>,
    stream: OpenStream,
}

impl StreamBody {
    /// Notes what is given out, and whether it is the end.
    fn note(&mut self, frame: Option<&Frame<Bytes>>, is_end: bool) {
        self.stream.is_answered = is_end;
        let Some(noted) = &self.noted else {
            return;
        };
        noted.sent(frame.and_then(Frame::data_ref).map_or(0, Bytes::len));
        if is_end {
            noted.completed();
        }
    }
}

impl Body for StreamBody {
    type Data = Bytes;
    type Error = StreamBodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamBodyError>>> {
        let this = self.get_mut();
        if this.broken.is_none() {
            let mut sending = lock(&this.sending);
            sending.given_at = None;
            let error = match &mut sending.body {
                None => StreamBodyError::Stalled,
                Some(body) => match ready!(Pin::new(body).poll_frame(context)) {
                    Some(Err(error)) => error.into(),
                    Some(Ok(frame)) => {
                        sending.given_at = Some(Instant::now());
                        let is_end = body_ended(&sending);
                        drop(sending);
                        this.note(Some(&frame), is_end);
                        return Poll::Ready(Some(Ok(frame)));
                    }
                    None => {
                        drop(sending);
                        this.note(None, true);
                        return Poll::Ready(None);
                    }
                },
            };
            if let Some(noted) = &this.noted {
                noted.broke_off();
            }
            // A reset takes back what was not sent yet.
            this.broken = Some((error, Box::pin(sleep(RESET_DELAY))));
        }
        let Some((_, sent)) = &mut this.broken else {
            return Poll::Ready(None);
        };
        ready!(sent.as_mut().poll(context));
        this.stream.is_answered = true;
        let broken = mem::take(&mut this.broken);
        Poll::Ready(broken.map(|(error, _)| Err(error)))
    }

    fn is_end_stream(&self) -> bool {
        self.broken.is_none() && body_ended(&lock(&self.sending))
    }

    fn size_hint(&self) -> SizeHint {
        let sending = lock(&self.sending);
        sending
            .body
            .as_ref()
            .map_or_else(SizeHint::default, Body::size_hint)
    }
}

impl Drop for StreamBody {
    fn drop(&mut self) {
        // hyper does not ask for the end of a body that it knows to be over.
        if self.is_end_stream() {
            self.note(None, true);
        }
    }
}

fn body_ended(sending: &Sending) -> bool {
    sending.body.as_ref().is_some_and(Body::is_end_stream)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use futures_util::{StreamExt, stream};
    use http_body_util::{BodyExt, StreamBody as StreamedBody};

    use super::*;

    fn request(uri: &str, fields: &[(&'static str, &'static str)]) -> Request<()> {
        let mut request = Request::get(uri);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).expect("a request")
    }

    #[test]
    fn a_request_becomes_what_it_is_over_http_1() {
        let crumbs = [("cookie", "a=1"), ("cookie", "b=2"), ("cookie", "c=3")];
        let mut whole = request("https://t.example.com:8443/a%20b?c=d", &crumbs);
        assert_eq!(check(&mut whole), Ok(()));
        assert_eq!(whole.uri(), "/a%20b?c=d");
        assert_eq!(whole.headers()["host"], "t.example.com:8443");
        assert_eq!(whole.headers()["cookie"], "a=1; b=2; c=3");
        assert_eq!(whole.headers().get_all("cookie").iter().count(), 1);
        let mut same = request("https://t.example.com/", &[("host", "T.Example.com")]);
        assert_eq!(check(&mut same), Ok(()));
        let mut field_only = request("/", &[("host", "t.example.com")]);
        assert_eq!(check(&mut field_only), Ok(()));
    }

    #[test]
    fn a_request_that_contradicts_itself_is_refused() {
        use RequestHeadError::Malformed;
        for (uri, fields, expected) in [
            ("/", &[][..], Malformed("it has no Host")),
            (
                "https://a.example/",
                &[("host", "b.example")],
                Malformed("its Host is not the one in its address"),
            ),
            (
                "https://a.example/",
                &[("host", "a.example"), ("host", "a.example")],
                Malformed("it has several Host fields"),
            ),
            (
                "https://u@a.example/",
                &[],
                Malformed("its Host is not valid"),
            ),
            (
                "https://a.example/",
                &[("content-length", "1"), ("content-length", "1")],
                Malformed("it has several Content-Length fields"),
            ),
            (
                "https://a.example/",
                &[("content-length", "+1")],
                Malformed("its Content-Length is not a number"),
            ),
        ] {
            let mut request = request(uri, fields);
            assert_eq!(check(&mut request), Err(expected), "{uri} {fields:?}");
        }
        let mut connect = request("a.example:443", &[]);
        *connect.method_mut() = Method::CONNECT;
        assert!(matches!(check(&mut connect), Err(Malformed(_))));
    }

    /// A response that has more to say whenever it is asked.
    fn endless() -> Response<ResponseBody> {
        let bytes = stream::repeat_with(|| Ok(Frame::data(Bytes::from_static(b"more"))));
        let body: ResponseBody = BodyExt::boxed_unsync(StreamedBody::new(bytes.boxed()));
        Response::new(body)
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_that_a_visitor_does_not_take_is_broken_off_after_a_minute() {
        let streams = Arc::new(Streams::default());
        let mut slow = streams
            .open(&Method::GET)
            .answer(endless(), None)
            .into_body();
        slow.frame().await.expect("a frame").expect("no error");
        tokio::time::advance(MAX_STALL - Duration::from_secs(1)).await;
        assert!(!streams.check(false));
        slow.frame().await.expect("a frame").expect("no error");
        tokio::time::advance(MAX_STALL).await;
        assert!(!streams.check(false));
        let error = slow.frame().await.expect("an end").expect_err("broken");
        assert!(matches!(error, StreamBodyError::Stalled), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_socket_is_no_stall_of_a_response() {
        let streams = Arc::new(Streams::default());
        let mut slow = streams
            .open(&Method::GET)
            .answer(endless(), None)
            .into_body();
        slow.frame().await.expect("a frame").expect("no error");
        for _ in 0..5 {
            tokio::time::advance(MAX_STALL - Duration::from_secs(1)).await;
            assert!(!streams.check(true));
        }
        tokio::time::advance(MAX_STALL - Duration::from_secs(1)).await;
        assert!(!streams.check(false));
        slow.frame().await.expect("a frame").expect("no error");
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_that_hyper_cannot_pass_on_ends_the_connection() {
        let streams = Arc::new(Streams::default());
        let mut stuck = streams
            .open(&Method::GET)
            .answer(endless(), None)
            .into_body();
        stuck.frame().await.expect("a frame").expect("no error");
        tokio::time::advance(MAX_STALL).await;
        assert!(!streams.check(false));
        tokio::time::advance(MAX_STALL).await;
        assert!(streams.check(false));
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_while_no_request_is_open_and_nothing_waits_for_the_socket() {
        let streams = Arc::new(Streams::default());
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(streams.idle(), Some(Duration::from_secs(5)));
        let open = streams.open(&Method::GET);
        assert_eq!(streams.idle(), None);
        drop(open);
        assert_eq!(streams.idle(), Some(Duration::ZERO));
        tokio::time::advance(Duration::from_secs(5)).await;
        streams.check(true);
        assert_eq!(streams.idle(), Some(Duration::ZERO));
        tokio::time::advance(Duration::from_secs(5)).await;
        streams.check(false);
        assert_eq!(streams.idle(), Some(Duration::from_secs(5)));
    }

    #[tokio::test]
    async fn only_answers_of_tunnels_make_up_for_requests_that_were_given_up() {
        for is_of_tunnel in [false, true] {
            let streams = Arc::new(Streams::default());
            let give_up = || drop(streams.open(&Method::GET));
            for _ in 0..MAX_ABANDONED / ABANDONED_COST {
                give_up();
            }
            for _ in 0..ABANDONED_COST {
                let mut response = Response::new(whole("hello"));
                if is_of_tunnel {
                    let id = "my-app".parse().expect("an id");
                    response.extensions_mut().insert(ServedTunnel(id));
                }
                let stream = streams.open(&Method::GET);
                let mut answered = stream.answer(response, None).into_body();
                let frame = poll_fn(|context| Pin::new(&mut answered).poll_frame(context)).await;
                frame.expect("a frame").expect("no error");
            }
            assert!(!streams.is_flooded.is_cancelled());
            give_up();
            assert_eq!(streams.is_flooded.is_cancelled(), !is_of_tunnel);
        }
    }
}
