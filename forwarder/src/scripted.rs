//! Local services for tests that do, byte by byte, what a test says.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tunnel_protocol::{
    id::RequestId,
    message::{Body, HttpRequest},
};

use crate::settings::{Layer, Settings};

/// Longer than anything takes here.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for what must come.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("timed out waiting for {what}"))
}

/// A service that runs a script on each of its connections.
pub(crate) struct Service {
    pub(crate) address: SocketAddr,
    connections: Arc<AtomicUsize>,
    _serving: JoinSet<()>,
}

impl Service {
    pub(crate) async fn running<F: Future<Output = ()> + Send + 'static>(
        script: impl Fn(TcpStream) -> F + Send + Sync + 'static,
    ) -> Self {
        Self::at("127.0.0.1:0", script).await
    }

    pub(crate) async fn at<F: Future<Output = ()> + Send + 'static>(
        address: &str,
        script: impl Fn(TcpStream) -> F + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let connections = Arc::new(AtomicUsize::new(0));
        let count = connections.clone();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut running = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                running.spawn(script(stream));
            }
        });
        Self {
            address,
            connections,
            _serving: serving,
        }
    }

    /// How many connections it has accepted.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Settings of an agent that has it for target.
    pub(crate) fn settings(&self) -> Settings {
        settings(&self.address.to_string())
    }
}

/// Settings of an agent with this target.
pub(crate) fn settings(target: &str) -> Settings {
    let layer = Layer {
        endpoint: Some("ws://127.0.0.1:1".parse().expect("an endpoint")),
        target: Some(target.parse().expect("a target")),
        ..Layer::default()
    };
    layer.settings("test").expect("settings")
}

/// A request as the service sends it.
pub(crate) fn request(method: &str, uri: &str, fields: &[(&str, &str)], body: &str) -> HttpRequest {
    let fields = fields.iter().map(|(name, value)| {
        (
            name.parse::<HeaderName>().expect("a name"),
            HeaderValue::from_str(value).expect("a value"),
        )
    });
    HttpRequest {
        request_id: RequestId::generate(),
        method: method.to_owned(),
        uri: uri.to_owned(),
        headers: HeaderMap::from_iter(fields),
        upgrade: None,
        websocket: None,
        body: Body(Bytes::copy_from_slice(body.as_bytes())),
        encoding: None,
        timestamp: 0,
        more: false,
        deadline_ms: 0,
        reply_to: None,
    }
}

/// Reads a request's head; empty at the end of the connection.
pub(crate) async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return String::new(),
        }
    }
    String::from_utf8(head).expect("a text")
}
