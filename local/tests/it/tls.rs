//! HTTPS: certificates from files, with agents and visitors on one port.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use forwarder::settings::{AcceptedCertificates, Settings};
use futures_util::{SinkExt, StreamExt};
use http::StatusCode;
use local::{Options, Server, ServerError, TlsOptions};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, ServerName},
};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    front::{fill, leave_uploads},
    harness::{self, Agent, Origin, ScriptedAgent, settings, stack_with, within},
    responses::base64,
    websocket::EchoServer,
};

/// A pair of files as an operator has them.
pub(crate) struct Pair {
    directory: TempDir,
    certificate: CertificateDer<'static>,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut pair = Self {
            directory,
            certificate: CertificateDer::from(Vec::new()),
        };
        pair.replace();
        pair
    }

    /// Writes another certificate and its key.
    fn replace(&mut self) {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(names).expect("a certificate");
        std::fs::write(self.path("cert.pem"), cert.pem()).expect("written");
        std::fs::write(self.path("key.pem"), signing_key.serialize_pem()).expect("written");
        self.certificate = cert.der().clone();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn options(&self) -> Options {
        Options {
            tls: Some(TlsOptions::Files {
                certificate: self.path("cert.pem"),
                key: self.path("key.pem"),
            }),
            ..Options::default()
        }
    }

    /// A client that accepts this certificate only.
    fn client(&self, protocols: &[&[u8]]) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).expect("a certificate");
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        Arc::new(config)
    }

    /// A connection of a visitor that speaks one of these protocols.
    pub(crate) async fn connect(
        &self,
        address: SocketAddr,
        protocols: &[&[u8]],
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from("localhost").expect("a name");
        TlsConnector::from(self.client(protocols))
            .connect(name, stream)
            .await
    }

    pub(crate) fn agent_settings(&self, server: &Server, target: SocketAddr) -> Settings {
        Settings {
            endpoint_tls: AcceptedCertificates::Authorities([self.certificate.clone()].into()),
            ..settings(server, target)
        }
    }
}

/// What a visitor gets who sends these bytes over TLS.
async fn raw(pair: &Pair, server: &Server, request: &str) -> String {
    let mut stream = pair
        .connect(server.address, &[])
        .await
        .expect("a handshake");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    within("the end", stream.read_to_string(&mut answer))
        .await
        .expect("an end as TLS wants it");
    answer
}

#[tokio::test]
async fn agents_and_visitors_use_https_on_one_port() {
    let pair = Pair::new();
    let server = stack_with(pair.options()).await;
    let origin = Origin::echo().await;
    let agent = Agent::online(pair.agent_settings(&server, origin.address)).await;
    assert_eq!(agent.url, format!("https://{}/my-app", server.address));
    assert!(server.endpoint.starts_with("wss://"), "{}", server.endpoint);
    let request = "POST /my-app/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello";
    let answer = raw(&pair, &server, request).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.ends_with("\r\n\r\nhello"), "{answer}");
    assert_eq!(origin.last().header("x-forwarded-proto"), Some("https"));
    server.stop().await;
}

#[tokio::test]
async fn whoever_speaks_http_to_the_https_port_is_told_the_address() {
    let pair = Pair::new();
    let server = stack_with(pair.options()).await;
    let mut stream = TcpStream::connect(server.address)
        .await
        .expect("a connection");
    let sent = stream.write_all(b"GET /my-app/ HTTP/1.1\r\nHost: x\r\n\r\n");
    sent.await.expect("sent");
    let mut answer = String::new();
    within("the end", stream.read_to_string(&mut answer))
        .await
        .expect("read");
    assert!(
        answer.starts_with("HTTP/1.1 400 Bad Request\r\n"),
        "{answer}"
    );
    let origin = format!("https://{}", server.address);
    assert!(answer.ends_with(&format!("Use {origin}\n")), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn visitors_at_the_http_address_are_sent_to_https() {
    let pair = Pair::new();
    let server = stack_with(Options {
        listen_http: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
        ..pair.options()
    })
    .await;
    let http = server.http_address.expect("an address");
    let got = harness::get(&format!("http://{http}/my-app/a%20b?c=d")).await;
    assert_eq!(got.status, StatusCode::PERMANENT_REDIRECT);
    let https = format!("https://{}/my-app/a%20b?c=d", server.address);
    assert_eq!(got.header("location"), Some(&*https));
    server.stop().await;
}

#[tokio::test]
async fn a_certificate_that_changes_is_served_without_a_restart() {
    let mut pair = Pair::new();
    let server = stack_with(pair.options()).await;
    pair.connect(server.address, &[])
        .await
        .expect("a handshake");
    pair.replace();
    within("the new certificate", async {
        while pair.connect(server.address, &[]).await.is_err() {}
    })
    .await;
    server.stop().await;
}

#[tokio::test]
async fn a_pair_that_does_not_belong_together_is_refused_at_the_start() {
    let (pair, other) = (Pair::new(), Pair::new());
    let options = Options {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        tls: Some(TlsOptions::Files {
            certificate: pair.path("cert.pem"),
            key: other.path("key.pem"),
        }),
        ..Options::default()
    };
    match Server::start(options).await {
        Err(ServerError::Tls(error)) => {
            let said = error.to_string();
            assert!(said.contains("cert.pem cannot be used with"), "{said}");
        }
        other => panic!("{other:?}"),
    }
}

/// A connection on which all was read that comes of itself: closed with that unread, it would be reset.
async fn connect_and_read(pair: &Pair, server: &Server) -> TlsStream<TcpStream> {
    let connected = pair.connect(server.address, &[]).await;
    let mut stream = connected.expect("a handshake");
    let nothing = timeout(Duration::from_millis(100), stream.read(&mut [0])).await;
    assert!(nothing.is_err(), "{nothing:?}");
    stream
}

#[tokio::test]
async fn a_visitor_over_tls_that_leaves_is_noticed_and_one_that_only_ends_its_side_is_answered() {
    let pair = Pair::new();
    let server = stack_with(pair.options()).await;
    let mut agent = scripted(&pair, &server).await;
    let request = "GET /my-app/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

    for behind in [Some(""), Some("X"), Some(request), None] {
        for by_reset in [false, true] {
            let mut leaving = connect_and_read(&pair, &server).await;
            leaving.write_all(request.as_bytes()).await.expect("sent");
            let first = agent.hear_type("http_request").await;
            match behind {
                Some(behind) => leaving.write_all(behind.as_bytes()).await.expect("sent"),
                None => fill(&mut leaving).await,
            }
            if by_reset {
                leaving.get_ref().0.set_zero_linger().expect("set");
            }
            drop(leaving);
            let cancel = agent.hear_type("cancel").await;
            assert_eq!(cancel["request_id"], first["request_id"]);
        }
    }

    // The end of a socket is not that of one side of TLS, and nothing may be written between its records.
    let mut closing = pair
        .connect(server.address, &[])
        .await
        .expect("a handshake");
    closing.write_all(request.as_bytes()).await.expect("sent");
    let first = agent.hear_type("http_request").await;
    closing.get_mut().0.shutdown().await.expect("ended");
    let cancel = agent.hear_type("cancel").await;
    assert_eq!(cancel["request_id"], first["request_id"]);

    let mut staying = pair
        .connect(server.address, &[])
        .await
        .expect("a handshake");
    staying.write_all(request.as_bytes()).await.expect("sent");
    let (_, connection) = staying.get_mut();
    connection.send_close_notify();
    staying.flush().await.expect("sent");
    let second = agent.hear_type("http_request").await;
    // Long enough for the front to ask whether it is still there.
    sleep(Duration::from_millis(900)).await;
    agent
        .say(&harness::response(&second, &base64(b"all of it")))
        .await;
    let mut answer = String::new();
    within("the end", staying.read_to_string(&mut answer))
        .await
        .expect("read");
    assert!(answer.ends_with("all of it"), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn a_visitor_over_tls_that_leaves_an_upload_that_nobody_reads_is_noticed() {
    let pair = Pair::new();
    let server = stack_with(pair.options()).await;
    let mut agent = scripted(&pair, &server).await;
    let connect = async || connect_and_read(&pair, &server).await;
    let set_reset =
        |stream: &TlsStream<TcpStream>| stream.get_ref().0.set_zero_linger().expect("set");
    leave_uploads(&mut agent, connect, set_reset).await;
    server.stop().await;
}

#[tokio::test]
async fn whoever_does_not_finish_a_handshake_is_cut_off() {
    let pair = Pair::new();
    let server = stack_with(pair.options()).await;
    for sent in [&b""[..], b"\x16\x03\x01\x02\x00\x01"] {
        let mut stream = TcpStream::connect(server.address)
            .await
            .expect("a connection");
        stream.write_all(sent).await.expect("sent");
        let ended = within("the end", stream.read(&mut [0])).await;
        // A reset: nothing is waited for behind it.
        assert!(ended.is_err(), "{ended:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn websockets_of_visitors_pass_over_tls() {
    let pair = Pair::new();
    let server = stack_with(pair.options()).await;
    let echo = EchoServer::start().await;
    let agent = Agent::online(pair.agent_settings(&server, echo.address)).await;
    let stream = pair
        .connect(server.address, &[b"http/1.1"])
        .await
        .expect("a handshake");
    let address = agent.url.replacen("https", "wss", 1);
    let opened = tokio_tungstenite::client_async(format!("{address}/chat"), stream).await;
    let (mut socket, _) = opened.expect("a WebSocket");
    for length in [5, 20_000] {
        let message = Message::text("x".repeat(length));
        socket.send(message.clone()).await.expect("sent");
        let echoed = within("the echo", socket.next()).await;
        assert_eq!(echoed.expect("a message").expect("no error"), message);
    }
    server.stop().await;
}

/// An agent that speaks by hand, over TLS.
pub(crate) async fn scripted(pair: &Pair, server: &Server) -> ScriptedAgent {
    let stream = pair
        .connect(server.address, &[])
        .await
        .expect("a handshake");
    let address = format!("{}?tunnel_id=my-app", server.endpoint);
    let mut agent = ScriptedAgent::over(stream, &address).await;
    let features = ["body_parts", "cancel", "window"];
    let ready = json!({ "type": "ready", "features": features });
    let established = agent.ready(&ready).await;
    assert_eq!(
        established["type"], "connection_established",
        "{established}"
    );
    agent
}
