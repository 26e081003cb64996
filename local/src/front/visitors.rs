//! Visitors' requests, straight to `forward`.
//!
//! What an event would carry is handed over as it is, because an event cannot carry a stream and payload 2.0 joins repeated
//! fields. From there on the way is that of a function URL.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tunnel_forward::{
    Forward,
    error::ForwardError,
    request::{RequestSource, VisitorRequest, wants_html},
    response::{self, ResponseBody, ResponseBodyError},
};
use tunnel_service::aside::aside;

use crate::{
    front::{
        forwarded::TrustedProxies,
        host::{ForeignHostError, HostPolicy},
        listener::ConnectionPermit,
        response::last,
        socket::VisitorSocket,
        upgrade::Upgrade,
        visitor_sockets::VisitorSockets,
    },
    operator::Visit,
    subsystem::Subsystem,
};

/// Serves visitors.
#[derive(Clone, Debug)]
pub(crate) struct VisitorFront {
    /// The function.
    pub(crate) forward: Forward,
    /// Whose forwarding fields are believed.
    pub(crate) proxies: Arc<TrustedProxies>,
    /// Which hosts are served.
    pub(crate) hosts: HostPolicy,
    /// The scheme of visitors that come without a proxy.
    pub(crate) scheme: Arc<str>,
    /// Carries upgraded connections.
    pub(crate) subsystem: Subsystem,
    /// Where WebSockets are, if every step is as in AWS.
    pub(crate) sockets: Option<Arc<VisitorSockets>>,
}

impl VisitorFront {
    /// Serves a request that came over `socket`.
    pub(crate) async fn serve(
        &self,
        mut request: Box<Request<Incoming>>,
        socket: &Arc<VisitorSocket>,
        permit: ConnectionPermit,
        noted: &Arc<Visit>,
    ) -> Response<ResponseBody> {
        let wants_html = wants_html(request.headers());
        let is_read = Arc::new(AtomicBool::new(request.body().is_end_stream()));
        let upgraded = hyper::upgrade::on(&mut *request);
        let mut visit = match self.visit(request, socket, is_read.clone(), noted) {
            Ok(visit) => visit,
            Err(error) => return last(ForwardError::from(error).into_response(wants_html)),
        };
        let is_websocket =
            |protocol: &HeaderValue| protocol.as_bytes().eq_ignore_ascii_case(b"websocket");
        if let Some(sockets) = &self.sockets
            && visit.upgrade.as_ref().is_some_and(is_websocket)
        {
            let response = aside(|| sockets.accept(upgraded, visit)).await;
            if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                socket.upgrade();
            }
            return response;
        }
        let upgrade = visit.upgrade.is_some().then(|| {
            let (upgrade, body) = Upgrade::new(upgraded, permit.clone(), noted.clone());
            visit.body = body;
            upgrade
        });
        let response = self.forward.serve(visit).await;
        if let Some(upgrade) = upgrade
            && response.status() == StatusCode::SWITCHING_PROTOCOLS
        {
            socket.upgrade();
            return self.carry(upgrade, response, socket.clone(), permit);
        }
        if is_read.load(Ordering::Relaxed) {
            response
        } else {
            // What is left of the request's body would look like the next request.
            last(response)
        }
    }

    /// Gives the connection over to what the two sides then say to each other.
    fn carry(
        &self,
        upgrade: Upgrade,
        response: Response<ResponseBody>,
        socket: Arc<VisitorSocket>,
        permit: ConnectionPermit,
    ) -> Response<ResponseBody> {
        let (head, body) = response.into_parts();
        let stopping = self.subsystem.stopping().clone();
        self.subsystem.spawn(async move {
            tokio::select! {
                _ = stopping.run_until_cancelled(upgrade.carry(body)) => {}
                () = socket.closed() => {}
            }
            drop(permit);
        });
        Response::from_parts(head, response::whole(Bytes::new()))
    }

    fn visit(
        &self,
        request: Box<Request<Incoming>>,
        socket: &VisitorSocket,
        is_read: Arc<AtomicBool>,
        noted: &Arc<Visit>,
    ) -> Result<Box<VisitorRequest>, ForeignHostError> {
        let (mut head, body) = request.into_parts();
        let origin = self.proxies.origin(&socket.peer, &head.headers);
        let host = match origin.host {
            Some(host) => host,
            None => {
                let asked = head.headers.get(header::HOST);
                self.hosts.host(asked.and_then(|host| host.to_str().ok()))?
            }
        };
        // The local service sees no other host than the one that counts.
        if let Ok(value) = HeaderValue::from_str(&host) {
            head.headers.insert(header::HOST, value);
        }
        let source = RequestSource {
            address: origin.address,
            scheme: origin.scheme.unwrap_or_else(|| self.scheme.to_string()),
            host,
        };
        let body = RequestBody {
            body,
            is_read,
            noted: noted.clone(),
        };
        let body = body.map_err(Into::into).boxed_unsync();
        Ok(Box::new(VisitorRequest::from_http(head, body, source)))
    }
}

/// A request's body that notes when it has been read to its end.
#[derive(Debug)]
struct RequestBody {
    body: Incoming,
    is_read: Arc<AtomicBool>,
    noted: Arc<Visit>,
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(Ok(frame)) = &frame
            && let Some(bytes) = frame.data_ref()
        {
            self.noted.received(bytes.len());
        }
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

/// A response's body. If it breaks off, it does so once all before the break has been sent, and in a way that the visitor sees.
#[derive(Debug)]
pub(crate) struct VisitorBody {
    body: ResponseBody,
    socket: Arc<VisitorSocket>,
    broken: Option<ResponseBodyError>,
    /// How many bytes are still to come, where that is known: nobody asks for more then.
    left: Option<u64>,
    /// What is noted of the request, unless it is an agent's.
    noted: Option<Arc<Visit>>,
}

impl VisitorBody {
    /// The response as it is sent over `socket`.
    pub(crate) fn of(
        response: Response<ResponseBody>,
        socket: Arc<VisitorSocket>,
        noted: Option<Arc<Visit>>,
    ) -> Response<Self> {
        let stated = response.headers().get(header::CONTENT_LENGTH);
        let has_length = stated.is_some() || response.body().size_hint().exact().is_some();
        let left = stated.and_then(|length| length.to_str().ok()?.parse().ok());
        socket.begin_response(!has_length && !response.body().is_end_stream());
        response.map(|body| Self {
            left: left.or_else(|| body.size_hint().exact()),
            body,
            socket,
            broken: None,
            noted,
        })
    }

    /// Notes what is given out, and whether it is the end.
    fn note(&mut self, frame: Option<&Frame<Bytes>>) {
        let Some(noted) = &self.noted else {
            return;
        };
        let bytes = frame.and_then(Frame::data_ref).map_or(0, Bytes::len);
        noted.sent(bytes);
        self.left = self.left.map(|left| left.saturating_sub(bytes as u64));
        if frame.is_none() || self.left == Some(0) || self.body.is_end_stream() {
            noted.completed();
        }
    }
}

impl Body for VisitorBody {
    type Data = Bytes;
    type Error = ResponseBodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ResponseBodyError>>> {
        let this = self.get_mut();
        if this.broken.is_none() {
            match ready!(Pin::new(&mut this.body).poll_frame(context)) {
                Some(Err(error)) => {
                    if let Some(noted) = &this.noted {
                        noted.broke_off();
                    }
                    this.broken = Some(error);
                    this.socket.expect_flush();
                }
                Some(Ok(frame)) => {
                    this.note(Some(&frame));
                    return Poll::Ready(Some(Ok(frame)));
                }
                None => {
                    this.note(None);
                    return Poll::Ready(None);
                }
            }
        }
        // hyper drops what it has not sent when a body fails.
        ready!(this.socket.poll_sent(context));
        let Some(error) = this.broken.take() else {
            return Poll::Ready(None);
        };
        this.socket.break_off();
        Poll::Ready(Some(Err(error)))
    }

    fn is_end_stream(&self) -> bool {
        self.broken.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for VisitorBody {
    fn drop(&mut self) {
        if self.broken.is_none() && self.body.is_end_stream() {
            // Nobody asks a body without bytes for any.
            self.note(None);
        }
        self.socket.end_response();
    }
}
