//! The connections to the local service: a request takes one that waits, or a new one, and it waits again once the response has been
//! read.

use std::{
    collections::VecDeque,
    future::poll_fn,
    mem,
    pin::pin,
    sync::{Arc, Mutex, Weak},
    task::Context,
    time::Duration,
};

use http::{Request, Response, uri::Uri};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1},
};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use tokio_util::task::TaskTracker;
use tower_service::Service;
use tracing::debug;
use tunnel_protocol::limits::MAX_HYPER_FIELDS;

use crate::{
    connector::{BoxError, Connector, Record},
    lock::lock,
    origin::StreamedBody,
    origin_driver::Driver,
    origin_socket::Responses,
};

/// How long a connection waits for its next request. Shorter than servers keep theirs (Node: 5 s), so that few are used while the
/// server closes them.
const MAX_IDLE_TIME: Duration = Duration::from_secs(3);

/// The connections to one local service. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct OriginPool(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    connector: Connector,
    /// Scheme and authority of the service.
    address: Uri,
    waiting: Mutex<Waiting>,
    /// Tells one request that a connection waits.
    freed: Notify,
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct Waiting {
    /// The one that has waited longest is first.
    connections: VecDeque<(OriginConnection, Instant)>,
    /// A task closes those that have waited too long.
    is_watched: bool,
}

/// A connection to the local service, with no request or one.
#[derive(Debug)]
pub(crate) struct OriginConnection {
    // Dropped before the driver, which then closes the connection.
    sender: http1::SendRequest<StreamedBody>,
    /// Drives it.
    pub(crate) driver: Driver,
    /// What it was used for.
    pub(crate) record: Record,
    /// Tells its socket when responses have been read.
    pub(crate) responses: Responses,
}

impl OriginConnection {
    /// Sends a request, and returns the response once its head is there. Whoever reads its body drives the connection.
    ///
    /// # Errors
    /// If there is no response. The request comes back if none of it was written.
    pub(crate) async fn send(
        &mut self,
        request: Request<StreamedBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<StreamedBody>>> {
        self.responses.expect();
        let mut response = pin!(self.sender.try_send_request(request));
        let driver = &mut self.driver;
        poll_fn(|cx| driver.poll_beside(cx, |cx| response.as_mut().poll(cx))).await
    }

    /// Whether it can have the next request, and no task drives it.
    fn is_ready(&self) -> bool {
        self.sender.is_ready() && self.driver.is_attached()
    }

    /// Waits until it can have the next request, and no task drives it.
    ///
    /// # Errors
    /// If it has ended.
    async fn ready(&mut self) -> hyper::Result<()> {
        self.driver.attach().await;
        let (driver, sender) = (&mut self.driver, &mut self.sender);
        let poll = |cx: &mut Context<'_>| {
            // hyper may write the last of a request in one turn, and say only in the next that it is ready, without waking anybody.
            driver.drive(cx);
            driver.poll_beside(cx, |cx| sender.poll_ready(cx))
        };
        poll_fn(poll).await
    }
}

impl OriginPool {
    /// Connects to the service at `address` as `connector` does. Scheme and authority of the address count.
    pub(crate) fn new(connector: Connector, address: Uri) -> Self {
        Self(Arc::new(Pool {
            connector,
            address,
            waiting: Mutex::default(),
            freed: Notify::new(),
            tasks: TaskTracker::new(),
        }))
    }

    /// The connection that has waited the shortest time, which the service has most likely kept open.
    fn waiting(&self) -> Option<OriginConnection> {
        loop {
            // The lock is not held while a connection is closed.
            let (connection, since) = lock(&self.0.waiting).connections.pop_back()?;
            if connection.sender.is_ready() && since.elapsed() < MAX_IDLE_TIME {
                return Some(connection);
            }
        }
    }

    /// A connection that waits or, until there is one, a new one. Returns also whether it has waited.
    ///
    /// # Errors
    /// If none waits, and the service cannot be reached.
    pub(crate) async fn take(&self) -> Result<(OriginConnection, bool), BoxError> {
        if let Some(connection) = self.waiting() {
            return Ok((connection, true));
        }
        // Boxed, so that requests for which one waits do not carry its room about.
        let mut connecting = Box::pin(self.connect());
        loop {
            tokio::select! {
                connected = &mut connecting => return Ok((connected?, false)),
                () = self.0.freed.notified() => if let Some(connection) = self.waiting() {
                    return Ok((connection, true));
                },
            }
        }
    }

    /// A new connection.
    ///
    /// # Errors
    /// If the service cannot be reached.
    pub(crate) async fn connect(&self) -> Result<OriginConnection, BoxError> {
        let mut connector = self.0.connector.clone();
        poll_fn(|cx| connector.poll_ready(cx)).await?;
        let stream = connector.call(self.0.address.clone()).await?;
        let (record, responses) = (
            stream.inner().record.clone(),
            stream.inner().responses.clone(),
        );
        let (sender, connection) = http1::Builder::new()
            .max_headers(MAX_HYPER_FIELDS)
            .handshake(stream)
            .await?;
        let driving = async move {
            if let Err(error) = connection.with_upgrades().await {
                let error = &error as &dyn std::error::Error;
                debug!(error, "a connection to the local service broke");
            }
        };
        Ok(OriginConnection {
            sender,
            driver: Driver::new(driving, self.0.tasks.clone()),
            record,
            responses,
        })
    }

    /// Has a connection wait for its next request, once it is ready for one. Its response has been read, but its last request may
    /// not be written yet; then a task writes the rest.
    pub(crate) fn keep(&self, mut connection: OriginConnection) {
        if connection.is_ready() {
            self.put(connection);
        } else if !connection.sender.is_closed() {
            let pool = self.clone();
            self.0.tasks.spawn(async move {
                if connection.ready().await.is_ok() {
                    pool.put(connection);
                }
            });
        }
    }

    fn put(&self, connection: OriginConnection) {
        let mut waiting = lock(&self.0.waiting);
        waiting.connections.push_back((connection, Instant::now()));
        if !mem::replace(&mut waiting.is_watched, true) {
            self.0.tasks.spawn(watch(Arc::downgrade(&self.0)));
        }
        self.0.freed.notify_one();
    }
}

/// Closes connections that have waited too long, until none is left.
async fn watch(pool: Weak<Pool>) {
    while let Some(due) = pool.upgrade().and_then(|pool| pool.close_unused()) {
        sleep_until(due).await;
    }
}

impl Pool {
    /// Closes what has waited too long, and returns when to look again.
    fn close_unused(&self) -> Option<Instant> {
        let mut unused = Vec::new();
        let mut waiting = lock(&self.waiting);
        loop {
            match waiting.connections.front() {
                None => {
                    waiting.is_watched = false;
                    return None;
                }
                Some((_, since)) if since.elapsed() < MAX_IDLE_TIME => {
                    return Some(*since + MAX_IDLE_TIME);
                }
                Some(_) => unused.extend(waiting.connections.pop_front()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http_body_util::BodyExt;
    use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        sync::mpsc,
    };
    use tokio_rustls::TlsAcceptor;

    use super::*;
    use crate::{
        origin::{MAX_SHORT_BODY_BYTES, Origin, OriginBody},
        origin_socket::ResponseBody,
        scripted::{Service, read_head, request, settings, within},
        settings::{AcceptedCertificates, Settings},
    };

    const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n";

    /// A service that answers every request, and says when a connection has ended.
    async fn answering() -> (Service, mpsc::UnboundedReceiver<()>) {
        let (ended, endings) = mpsc::unbounded_channel();
        let service = Service::running(move |mut stream: TcpStream| {
            let ended = ended.clone();
            async move {
                while !read_head(&mut stream).await.is_empty() {
                    let _ = stream.write_all(&[HEAD, b"ok"].concat()).await;
                }
                let _ = ended.send(());
            }
        });
        (service.await, endings)
    }

    async fn call(origin: &Origin) -> Response<ResponseBody> {
        let message = request("POST", "/x", &[], "");
        let addresses = origin.addresses(&message);
        let called = origin.call(&message, &addresses, OriginBody::Whole("body".into()));
        within("a response", called).await.expect("a response")
    }

    async fn read(response: Response<ResponseBody>) {
        let body = within("the body", response.into_body().collect()).await;
        assert_eq!(body.expect("a body").to_bytes(), "ok");
    }

    #[tokio::test]
    async fn a_connection_carries_the_next_request_once_its_response_has_been_read() {
        let (service, _endings) = answering().await;
        let origin = Origin::new(&service.settings());
        for _ in 0..3 {
            read(call(&origin).await).await;
        }
        assert_eq!(service.connections(), 1);
        let (first, second) = (call(&origin).await, call(&origin).await);
        assert_eq!(service.connections(), 2, "the first response is not read");
        read(second).await;
        read(first).await;
        let both = (call(&origin).await, call(&origin).await);
        assert_eq!(service.connections(), 2, "both wait again");
        drop(both);
    }

    #[tokio::test]
    async fn a_connection_whose_response_is_not_read_is_closed() {
        let (ended, mut endings) = mpsc::unbounded_channel();
        let service = Service::running(move |mut stream: TcpStream| {
            let ended = ended.clone();
            async move {
                read_head(&mut stream).await;
                let _ = stream.write_all(HEAD).await;
                // The body of the request, and then the end.
                while read_byte(&mut stream).await {}
                let _ = ended.send(());
            }
        });
        let service = service.await;
        let origin = Origin::new(&service.settings());
        drop(call(&origin).await);
        within("the end", endings.recv()).await.expect("ended");
        drop(call(&origin).await);
        assert_eq!(service.connections(), 2);
    }

    /// Accepts TLS connections.
    fn acceptor() -> TlsAcceptor {
        let identity = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]);
        let rcgen::CertifiedKey { cert, signing_key } = identity.expect("a certificate");
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key);
        TlsAcceptor::from(Arc::new(config.expect("a configuration")))
    }

    fn settings_tls(service: &Service) -> Settings {
        let mut settings = settings(&format!("https://{}", service.address));
        settings.target_tls = AcceptedCertificates::Insecure;
        settings
    }

    #[tokio::test]
    async fn a_tls_connection_that_is_closed_says_so() {
        let (ended, mut ends) = mpsc::unbounded_channel();
        let acceptor = acceptor();
        let service = Service::running(move |stream: TcpStream| {
            let (acceptor, ended) = (acceptor.clone(), ended.clone());
            async move {
                let mut stream = acceptor.accept(stream).await.expect("a handshake");
                read_head(&mut stream).await;
                let _ = stream.write_all(HEAD).await;
                // The body of the request, and then the end. rustls tells one that is not said as an error.
                let end = stream.read_to_end(&mut Vec::new()).await;
                let _ = ended.send(end.map(drop).map_err(|error| error.kind()));
            }
        });
        let service = service.await;
        let origin = Origin::new(&settings_tls(&service));
        let response = call(&origin).await;
        drop(response);
        assert_eq!(within("the end", ends.recv()).await, Some(Ok(())));
    }

    #[tokio::test]
    async fn a_connection_is_kept_whose_response_comes_before_its_request_is_read() {
        const SECOND: &[u8] = b"second";
        for bytes in [0, 1, MAX_SHORT_BODY_BYTES, 100_000, 20_000_000] {
            let (may_read, reads) = tokio::sync::watch::channel(false);
            let service = Service::running(move |mut stream: TcpStream| {
                let mut reads = reads.clone();
                async move {
                    for body in [bytes, SECOND.len()] {
                        read_head(&mut stream).await;
                        let _ = stream.write_all(&[HEAD, b"ok"].concat()).await;
                        let _ = reads.wait_for(|may_read| *may_read).await;
                        let mut read = vec![0; body];
                        stream.read_exact(&mut read).await.expect("a body");
                        assert!(read.iter().all(|byte| *byte == b'x') || read == SECOND);
                    }
                }
            });
            let service = service.await;
            let origin = Origin::new(&service.settings());
            let post = async |body: Bytes| {
                let message = request("POST", "/x", &[], "");
                let addresses = origin.addresses(&message);
                let called = origin.call(&message, &addresses, OriginBody::Whole(body));
                read(within("a response", called).await.expect("a response")).await;
            };
            post(vec![b'x'; bytes].into()).await;
            may_read.send(true).expect("a service");
            within("the connection", origin.pool().0.freed.notified()).await;
            post(SECOND.into()).await;
            assert_eq!(service.connections(), 1, "{bytes} bytes");
        }
    }

    async fn read_byte(stream: &mut TcpStream) -> bool {
        stream.read_u8().await.is_ok()
    }

    #[tokio::test]
    async fn a_connection_that_has_waited_is_closed() {
        let (service, mut endings) = answering().await;
        let origin = Origin::new(&service.settings());
        let since = Instant::now();
        read(call(&origin).await).await;
        within("the end", endings.recv()).await.expect("ended");
        assert!(since.elapsed() >= MAX_IDLE_TIME, "{:?}", since.elapsed());
        read(call(&origin).await).await;
        assert_eq!(service.connections(), 2);
    }

    #[tokio::test]
    async fn a_request_that_meets_a_closed_connection_goes_to_a_new_one() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let origin = Origin::new(&settings(&address));
        let answer = async || {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            read_head(&mut stream).await;
            let answer = [HEAD, b"ok"].concat();
            stream.write_all(&answer).await.expect("sent");
            stream
        };
        let (response, stream) = tokio::join!(call(&origin), answer());
        read(response).await;
        // Its end is there when the connection is driven the next time, with the next request.
        drop(stream);
        tokio::task::yield_now().await;
        let (response, _stream) = tokio::join!(call(&origin), answer());
        read(response).await;
    }

    #[tokio::test]
    async fn a_request_takes_a_connection_that_waits_before_its_own_is_made() {
        // Takes one connection at a time: the other's handshake does not come.
        let acceptor = acceptor();
        let only = Arc::new(tokio::sync::Mutex::new(()));
        let service = Service::running(move |stream: TcpStream| {
            let (acceptor, only) = (acceptor.clone(), only.clone());
            async move {
                let _only = only.lock().await;
                let mut stream = acceptor.accept(stream).await.expect("a handshake");
                while !read_head(&mut stream).await.is_empty() {
                    let _ = stream.write_all(&[HEAD, b"ok"].concat()).await;
                }
            }
        });
        let service = service.await;
        let origin = Origin::new(&settings_tls(&service));
        let since = Instant::now();
        let answered = async || read(call(&origin).await).await;
        tokio::join!(answered(), answered(), answered());
        assert!(since.elapsed() < MAX_IDLE_TIME, "{:?}", since.elapsed());
    }
}
