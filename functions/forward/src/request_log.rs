//! What is logged of a request when it is over: one line with its figures. In Lambda the line is in CloudWatch's embedded metric
//! format, from which CloudWatch makes the metrics of the dashboard ("Embedded metric format specification" in its user guide).
//!
//! Never in it: bodies, header fields, paths and queries. They are the visitor's.

use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use serde_json::json;
use tracing::{Span, error_span, field, info, info_span};
use tunnel_protocol::id::{ConnectionId, RequestId, TunnelId};
use tunnel_service::now;

use crate::error::ForwardError;

/// The figures of one request, logged when this is dropped.
#[derive(Debug)]
pub(crate) struct RequestLog {
    /// The Lambda function, for whose metrics the line is meant; `None` outside Lambda.
    function: Option<String>,
    tunnel: TunnelId,
    started: Instant,
    outcome: &'static str,
    /// The connection that served it.
    connection: Option<ConnectionId>,
    request: Option<RequestId>,
    /// The local service's status.
    status: Option<u16>,
    /// Bytes of the request's body that were sent on.
    request_bytes: Arc<AtomicU64>,
    /// Bytes of the response's body that were taken.
    response_bytes: u64,
    /// Parts the reply came in.
    parts: u32,
    /// From the start to the reply's first part, in milliseconds.
    reply_ms: Option<u64>,
    /// Carries the ids for whatever is logged about the request. Where a request's own line is not logged, there is none, because
    /// it costs more than all else that is noted of a request.
    span: Span,
}

impl RequestLog {
    pub(crate) fn new(function: Option<String>, tunnel: TunnelId) -> Self {
        let span = info_span!(
            "request",
            %tunnel,
            connection = field::Empty,
            request = field::Empty
        );
        Self {
            function,
            tunnel,
            started: Instant::now(),
            // Until something else is known: the visitor did not wait for the end.
            outcome: "visitor_left",
            connection: None,
            request: None,
            status: None,
            request_bytes: Arc::default(),
            response_bytes: 0,
            parts: 0,
            reply_ms: None,
            span,
        }
    }

    /// The span in which the request is carried out.
    pub(crate) fn span(&self) -> Span {
        self.span.clone()
    }

    /// The span in which the request's failure is logged: it has the ids whatever is logged of requests.
    pub(crate) fn failure_span(&self) -> Span {
        if !self.span.is_disabled() {
            return self.span.clone();
        }
        error_span!(
            "request",
            tunnel = %self.tunnel,
            connection = self.connection.as_ref().map(field::display),
            request = self.request.as_ref().map(field::display),
        )
    }

    /// The request was sent over `connection`.
    pub(crate) fn sent(&mut self, connection: &ConnectionId, request: &RequestId) {
        if self.connection.is_none() {
            self.span.record("connection", connection.as_str());
            self.span.record("request", request.as_str());
        }
        self.connection = Some(connection.clone());
        self.request = Some(request.clone());
    }

    /// Counts the bytes of the request's body that have been sent on.
    pub(crate) fn request_bytes(&self) -> Arc<AtomicU64> {
        self.request_bytes.clone()
    }

    /// The visitor gets this much more of the reply's body.
    pub(crate) fn received(&mut self, bytes: usize) {
        self.parts += 1;
        self.response_bytes += bytes as u64;
    }

    /// The reply has begun.
    pub(crate) fn replied(&mut self, status: u16) {
        self.status = Some(status);
        self.reply_ms = Some(self.milliseconds());
    }

    /// The visitor has got all of the reply.
    pub(crate) fn completed(&mut self) {
        self.outcome = "ok";
    }

    /// The visitor has got this instead, or the reply broke off with it.
    pub(crate) fn refused(&mut self, refusal: &ForwardError) {
        self.outcome = refusal.code();
    }

    fn milliseconds(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn embedded_metrics(&self, function: &str) -> serde_json::Value {
        let mut metrics = vec![
            json!({ "Name": "Parts", "Unit": "Count" }),
            json!({ "Name": "RequestBytes", "Unit": "Bytes" }),
            json!({ "Name": "ResponseBytes", "Unit": "Bytes" }),
        ];
        if self.reply_ms.is_some() {
            metrics.push(json!({ "Name": "ReplyTime", "Unit": "Milliseconds" }));
        }
        json!({
            "_aws": {
                "Timestamp": u64::try_from(now().as_millis()).unwrap_or(u64::MAX),
                "CloudWatchMetrics": [
                    { "Namespace": "Tunnel", "Dimensions": [["FunctionName", "Outcome"]], "Metrics": [{ "Name": "Requests", "Unit": "Count" }] },
                    { "Namespace": "Tunnel", "Dimensions": [["FunctionName"]], "Metrics": metrics },
                ],
            },
            "FunctionName": function,
            "Outcome": self.outcome,
            "Requests": 1,
            "Parts": self.parts,
            "RequestBytes": self.request_bytes.load(Ordering::Relaxed),
            "ResponseBytes": self.response_bytes,
            "ReplyTime": self.reply_ms,
            "level": "INFO",
            "message": "request",
            "tunnel": self.tunnel.as_str(),
            "connection": self.connection.as_ref().map(ConnectionId::as_str),
            "request": self.request.as_ref().map(RequestId::as_str),
            "status": self.status,
            "milliseconds": self.milliseconds(),
        })
    }
}

impl Drop for RequestLog {
    fn drop(&mut self) {
        if let Some(function) = &self.function {
            // Lambda takes what is written as a log line. If stdout is closed, there is no log.
            let _ = writeln!(std::io::stdout(), "{}", self.embedded_metrics(function));
            return;
        }
        let _entered = self.span.enter();
        info!(
            outcome = self.outcome,
            status = self.status,
            request_bytes = self.request_bytes.load(Ordering::Relaxed),
            response_bytes = self.response_bytes,
            parts = self.parts,
            reply_ms = self.reply_ms,
            milliseconds = self.milliseconds(),
            "request"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Mutex};

    use tracing::{Level, error, subscriber::with_default};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("not poisoned").write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_failure_is_logged_with_the_ids_also_where_requests_are_not() {
        for level in [Level::ERROR, Level::INFO] {
            let lines = Lines::default();
            let writer = lines.clone();
            let subscriber = tracing_subscriber::fmt()
                .with_max_level(level)
                .with_ansi(false)
                .with_writer(move || writer.clone());
            with_default(subscriber.finish(), || {
                let mut log = RequestLog::new(None, "my-app".parse().expect("an id"));
                let connection = "L0SM9cOFvHcCIhw=".parse().expect("an id");
                let request = "01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().expect("an id");
                log.sent(&connection, &request);
                log.failure_span().in_scope(|| error!("it broke"));
            });
            let text = String::from_utf8(lines.0.lock().expect("not poisoned").clone());
            let text = text.expect("text");
            let line = text.lines().find(|line| line.contains("it broke"));
            let line = line.expect("a line");
            for id in ["my-app", "L0SM9cOFvHcCIhw=", "01ARZ3NDEKTSV4RRFFQ69G5FAV"] {
                assert_eq!(line.matches(id).count(), 1, "{line}");
            }
        }
    }

    #[test]
    fn every_metric_named_has_a_value_and_dimensions_that_exist() {
        let mut log = RequestLog::new(Some("forward".to_owned()), "my-app".parse().expect("an id"));
        for has_replied in [false, true] {
            if has_replied {
                log.replied(200);
            }
            let line = log.embedded_metrics("forward");
            let directives = line["_aws"]["CloudWatchMetrics"]
                .as_array()
                .expect("a list");
            assert_eq!(directives.len(), 2);
            for directive in directives {
                for metric in directive["Metrics"].as_array().expect("a list") {
                    let name = metric["Name"].as_str().expect("a name");
                    assert!(line[name].is_u64(), "{name} of {line}");
                }
                for dimension in directive["Dimensions"][0].as_array().expect("a list") {
                    assert!(
                        line[dimension.as_str().expect("a name")].is_string(),
                        "{dimension} of {line}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_request_is_counted_under_its_outcome() {
        let mut log = RequestLog::new(Some("forward".to_owned()), "my-app".parse().expect("an id"));
        assert_eq!(log.embedded_metrics("f")["Outcome"], "visitor_left");
        log.refused(&ForwardError::LocalTimeout);
        assert_eq!(log.embedded_metrics("f")["Outcome"], "local_timeout");
        log.completed();
        assert_eq!(log.embedded_metrics("f")["Outcome"], "ok");
    }
}
