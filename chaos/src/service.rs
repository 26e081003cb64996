//! The local service: a process of its own, so that it can be killed. It writes what it does into a ledger that outlives it.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    net::SocketAddr,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use http::{Request, Response, header};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, task::JoinSet, time::sleep};

use crate::content::{Side, content, hash};

/// Where it tells how many requests are open.
pub(crate) const OPEN: &str = "/open";
const CHUNK: usize = 16 * 1024;
/// A body that drips has this pause before each chunk.
const DRIP: Duration = Duration::from_millis(20);

type Answer = Response<UnsyncBoxBody<Bytes, std::io::Error>>;

/// What a request asks for in its query.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Wish {
    pub(crate) number: u64,
    pub(crate) upload: usize,
    pub(crate) answer: usize,
    pub(crate) is_text: bool,
    /// Before the answer begins.
    pub(crate) wait_ms: u64,
    pub(crate) drips: bool,
}

impl Wish {
    pub(crate) fn path(&self) -> String {
        let Self {
            number,
            upload,
            answer,
            is_text,
            wait_ms,
            drips,
        } = self;
        format!(
            "/{number}?upload={upload}&answer={answer}&text={}&wait={wait_ms}&drips={}",
            u8::from(*is_text),
            u8::from(*drips)
        )
    }

    fn of(path: &str, query: &str) -> Option<Self> {
        let mut wish = Self {
            number: path.rsplit('/').next()?.parse().ok()?,
            ..Self::default()
        };
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            match &*name {
                "upload" => wish.upload = value.parse().ok()?,
                "answer" => wish.answer = value.parse().ok()?,
                "text" => wish.is_text = value == "1",
                "wait" => wish.wait_ms = value.parse().ok()?,
                "drips" => wish.drips = value == "1",
                _ => return None,
            }
        }
        Some(wish)
    }
}

/// One per process.
#[derive(Clone, Debug)]
struct Service {
    ledger: Arc<File>,
    open: Arc<AtomicUsize>,
}

/// Counts as open until dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The process's whole life.
pub(crate) fn main(listen: SocketAddr, ledger: &Path) -> ExitCode {
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(ledger)
        .expect("a ledger can be written");
    let service = Service {
        ledger: Arc::new(file),
        open: Arc::default(),
    };
    let runtime = tokio::runtime::Runtime::new().expect("threads can be started");
    runtime.block_on(async {
        let listener = TcpListener::bind(listen)
            .await
            .expect("the port is this process's");
        let mut connections = JoinSet::new();
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                continue;
            };
            while connections.try_join_next().is_some() {}
            let service = service.clone();
            connections.spawn(async move {
                let serve = service_fn(move |request| service.clone().serve(request));
                // Connections that break off are what this is about.
                let _ = http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), serve)
                    .await;
            });
        }
    })
}

impl Service {
    async fn serve(self, request: Request<Incoming>) -> Result<Answer, std::io::Error> {
        if request.uri().path() == OPEN {
            let open = self.open.load(Ordering::Relaxed).to_string();
            return Ok(Response::new(body(open.into(), None)));
        }
        let Some(wish) = Wish::of(
            request.uri().path(),
            request.uri().query().unwrap_or_default(),
        ) else {
            self.note("stray", request.uri());
            return Err(std::io::Error::other("not a request of the suite"));
        };
        self.open.fetch_add(1, Ordering::Relaxed);
        let place = Place(self.open.clone());
        let method = request.method().clone();
        self.note(&format!("start-{method}"), wish.number);
        let Ok(uploaded) = request.into_body().collect().await else {
            self.note("broken", wish.number);
            return Err(std::io::Error::other("the upload broke off"));
        };
        let uploaded = uploaded.to_bytes();
        let is_whole = uploaded == content(wish.number, Side::Upload, wish.upload, wish.is_text);
        self.note(if is_whole { "whole" } else { "corrupt" }, wish.number);
        sleep(Duration::from_millis(wish.wait_ms)).await;
        let answer = content(wish.number, Side::Answer, wish.answer, wish.is_text);
        let mut response = Response::builder()
            .header("x-number", wish.number)
            .header("x-hash", hash(&uploaded))
            .header(
                header::CONTENT_TYPE,
                if wish.is_text {
                    "text/plain"
                } else {
                    "application/octet-stream"
                },
            );
        if !wish.drips {
            response = response.header(header::CONTENT_LENGTH, answer.len());
        }
        let pause = wish.drips.then_some(DRIP);
        Ok(response
            .body(held(place, answer, pause))
            .expect("these fields make a response"))
    }

    fn note(&self, what: &str, number: impl std::fmt::Display) {
        // In one write, so that lines of several threads do not mix.
        (&*self.ledger)
            .write_all(format!("{what} {number}\n").as_bytes())
            .expect("a ledger can be written");
    }
}

fn body(bytes: Bytes, pause: Option<Duration>) -> UnsyncBoxBody<Bytes, std::io::Error> {
    held(Place(Arc::new(AtomicUsize::new(1))), bytes, pause)
}

/// A body in chunks that keeps its request's place.
fn held(
    place: Place,
    bytes: Bytes,
    pause: Option<Duration>,
) -> UnsyncBoxBody<Bytes, std::io::Error> {
    let chunks = stream::unfold((place, bytes), move |(place, mut bytes)| async move {
        if bytes.is_empty() {
            return None;
        }
        if let Some(pause) = pause {
            sleep(pause).await;
        }
        let chunk = bytes.split_to(CHUNK.min(bytes.len()));
        Some((Ok(Frame::data(chunk)), (place, bytes)))
    });
    StreamBody::new(chunks).boxed_unsync()
}
