//! What is noted of one request, until it has ended.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http::{Request, Response, StatusCode};
use tunnel_forward::ServedTunnel;
use tunnel_protocol::{headers::TUNNEL_ERROR, id::TunnelId};

use super::{
    Observer,
    access_log::{Entry, RequestLine},
    metrics::{Ended, Outcome},
};
use crate::front::forwarded::Peer;

/// One request of a visitor. It is counted, and gets its line in the access log, when the last who holds it drops it.
#[derive(Debug)]
pub(crate) struct Visit {
    observer: Arc<Observer>,
    started: Instant,
    /// Only where there is an access log.
    line: Option<Box<RequestLine>>,
    /// How long the response's head took; unset until there is one.
    head: OnceLock<Duration>,
    /// 0 until there is a response.
    status: AtomicU16,
    /// A number of [`Outcome`].
    outcome: AtomicU8,
    code: OnceLock<String>,
    tunnel: OnceLock<TunnelId>,
    request_bytes: AtomicU64,
    response_bytes: AtomicU64,
}

impl Visit {
    pub(super) fn new<B>(observer: Arc<Observer>, request: &Request<B>, peer: &Peer) -> Self {
        observer.metrics.begun();
        let line = observer.access_log.is_some().then(|| {
            let origin = observer.proxies.origin(peer, request.headers());
            Box::new(RequestLine::of(request, origin))
        });
        Self {
            observer,
            started: Instant::now(),
            line,
            head: OnceLock::new(),
            status: AtomicU16::new(0),
            outcome: AtomicU8::new(Outcome::VisitorLeft as u8),
            code: OnceLock::new(),
            tunnel: OnceLock::new(),
            request_bytes: AtomicU64::new(0),
            response_bytes: AtomicU64::new(0),
        }
    }

    /// The response's head is ready.
    pub(crate) fn answered<B>(&self, response: &Response<B>) {
        let after = self.started.elapsed();
        let status = response.status();
        let code = response.headers().get(TUNNEL_ERROR);
        let code = code.and_then(|code| code.to_str().ok());
        if self.head.set(after).is_ok() {
            self.observer.metrics.answered(after, code);
        }
        self.status.store(status.as_u16(), Relaxed);
        if let Some(code) = code {
            let _ = self.code.set(code.to_owned());
            let outcome = if status.is_server_error() {
                Outcome::Failed
            } else {
                Outcome::Refused
            };
            self.outcome.store(outcome as u8, Relaxed);
        }
        if let Some(ServedTunnel(id)) = response.extensions().get() {
            let _ = self.tunnel.set(id.clone());
        }
    }

    /// A part of the request's body has come.
    pub(crate) fn received(&self, bytes: usize) {
        self.request_bytes.fetch_add(bytes as u64, Relaxed);
        self.observer.metrics.received(bytes as u64);
    }

    /// A part of the response's body has gone.
    pub(crate) fn sent(&self, bytes: usize) {
        self.response_bytes.fetch_add(bytes as u64, Relaxed);
        self.observer.metrics.sent(bytes as u64);
    }

    /// The response was handed over whole.
    pub(crate) fn completed(&self) {
        self.unless_ended(Outcome::Ok);
    }

    /// The response has broken off.
    pub(crate) fn broke_off(&self) {
        self.unless_ended(Outcome::BrokeOff);
    }

    /// The connection was upgraded. It is open until what is returned is dropped.
    pub(crate) fn upgraded(self: &Arc<Self>) -> UpgradedVisit {
        self.observer.metrics.upgraded();
        UpgradedVisit(self.clone())
    }

    fn unless_ended(&self, outcome: Outcome) {
        let (open, outcome) = (Outcome::VisitorLeft as u8, outcome as u8);
        let _ = self
            .outcome
            .compare_exchange(open, outcome, Relaxed, Relaxed);
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let status = StatusCode::from_u16(self.status.load(Relaxed)).ok();
        let outcome = usize::from(self.outcome.load(Relaxed));
        let outcome = Outcome::ALL.get(outcome).copied();
        let ended = Ended {
            outcome: outcome.unwrap_or(Outcome::VisitorLeft),
            status,
            tunnel: self.tunnel.get(),
            request_bytes: self.request_bytes.load(Relaxed),
            response_bytes: self.response_bytes.load(Relaxed),
        };
        self.observer.metrics.ended(ended);
        if let (Some(log), Some(line)) = (&self.observer.access_log, &self.line) {
            let entry = Entry {
                request: line,
                ended,
                code: self.code.get().map(String::as_str),
                head: self.head.get().copied(),
                took: self.started.elapsed(),
            };
            log.write(&entry);
        }
    }
}

/// An upgraded connection that is open.
#[derive(Debug)]
pub(crate) struct UpgradedVisit(Arc<Visit>);

impl UpgradedVisit {
    /// A part of what the local service says has gone to the visitor.
    pub(crate) fn sent(&self, bytes: usize) {
        self.0.sent(bytes);
    }
}

impl Drop for UpgradedVisit {
    fn drop(&mut self) {
        self.0.observer.metrics.upgraded_ended();
    }
}
