//! A directory as the local service: its files, served within the process.

use std::{
    convert::Infallible,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{io::DuplexStream, task::spawn_blocking};
use tokio_util::task::TaskTracker;
use tower_http::services::{ServeDir, ServeFile};
use tower_service::Service;
use tracing::debug;

/// What is on its way between the agent and the files, in bytes.
const BUFFER_BYTES: usize = 64 * 1024;

type FileBody = UnsyncBoxBody<bytes::Bytes, io::Error>;

/// Files under a directory. Names that begin with a dot are not served, except `.well-known`, and neither is what a link leads out to.
#[derive(Clone, Debug)]
pub(crate) struct Directory {
    /// Without links, so that what is under it can be told by its path.
    root: Arc<Path>,
    /// Paths that lead nowhere get the page at the root, which finds its way itself.
    is_single_page: bool,
    connections: TaskTracker,
}

impl Directory {
    /// The files under `root`, an absolute path without links.
    pub(crate) fn new(root: &Path, is_single_page: bool) -> Self {
        Self {
            root: root.into(),
            is_single_page,
            connections: TaskTracker::new(),
        }
    }

    /// A connection to them, served until the other end is dropped.
    pub(crate) fn connect(&self) -> DuplexStream {
        let (agent, files) = tokio::io::duplex(BUFFER_BYTES);
        let directory = self.clone();
        self.connections.spawn(async move {
            let service = service_fn(|request| {
                let directory = directory.clone();
                async move { Ok::<_, Infallible>(directory.respond(request).await) }
            });
            let connection = http1::Builder::new().serve_connection(TokioIo::new(files), service);
            if let Err(error) = connection.await {
                debug!(
                    error = &error as &dyn std::error::Error,
                    "files were not taken"
                );
            }
        });
        agent
    }

    async fn respond(&self, request: Request<Incoming>) -> Response<FileBody> {
        let wants_page = self.is_single_page && is_for_a_page(&request);
        let found = match self.find(request.uri().path()).await {
            Some(_) => self.serve(request).await,
            None => not_found(),
        };
        if found.status() == StatusCode::NOT_FOUND && wants_page && self.find("/").await.is_some() {
            return self.serve_page().await;
        }
        found
    }

    async fn serve(&self, request: Request<Incoming>) -> Response<FileBody> {
        let Ok(response) = ServeDir::new(&*self.root).call(request).await;
        response.map(|body| body.map_err(io::Error::other).boxed_unsync())
    }

    async fn serve_page(&self) -> Response<FileBody> {
        let page = ServeFile::new(self.root.join("index.html"))
            .call(Request::new(Full::<bytes::Bytes>::default()));
        let Ok(response) = page.await;
        response.map(|body| body.map_err(io::Error::other).boxed_unsync())
    }

    /// What a path names, if it may be served.
    async fn find(&self, path: &str) -> Option<PathBuf> {
        let path = percent_encoding::percent_decode_str(path)
            .decode_utf8()
            .ok()?;
        let mut file = self.root.to_path_buf();
        for segment in path.split('/').filter(|segment| !segment.is_empty()) {
            if (segment.starts_with('.') && segment != ".well-known")
                || segment.contains(['\\', '\0'])
            {
                return None;
            }
            file.push(segment);
        }
        let root = self.root.clone();
        let found = spawn_blocking(move || {
            let file = if file.is_dir() {
                file.join("index.html")
            } else {
                file
            };
            // Links are followed as long as they stay under the root.
            let file = file.canonicalize().ok()?;
            file.starts_with(&root).then_some(file)
        });
        found.await.ok().flatten()
    }
}

/// Whether a browser asks for a page, and not for a part of one.
fn is_for_a_page(request: &Request<Incoming>) -> bool {
    let accepts_html = request
        .headers()
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("text/html"));
    matches!(*request.method(), Method::GET | Method::HEAD) && accepts_html
}

fn not_found() -> Response<FileBody> {
    let body = Full::from("404 Not Found\n").map_err(|never| match never {});
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = StatusCode::NOT_FOUND;
    let text = http::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, text);
    response
}
