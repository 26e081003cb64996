use std::{pin::pin, sync::Arc};

use futures_util::{StreamExt, stream};
use http_body::Frame;
use http_body_util::StreamBody;
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::{
    scripted::{Service, read_head, request, settings, within},
    settings::AcceptedCertificates,
};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

async fn call(
    origin: &Origin,
    method: &str,
    body: &str,
) -> Result<Response<ResponseBody>, OriginError> {
    send(origin, request(method, "/x", &[], body)).await
}

async fn send(
    origin: &Origin,
    mut message: HttpRequest,
) -> Result<Response<ResponseBody>, OriginError> {
    let body = OriginBody::Whole(std::mem::take(&mut message.body.0));
    let addresses = origin.addresses(&message);
    within("a response", origin.call(&message, &addresses, body)).await
}

/// The status of the response, whose body is read, or why the call failed.
async fn status(origin: &Origin, method: &str, body: &str) -> Result<u16, String> {
    match call(origin, method, body).await {
        Ok(response) => {
            let status = response.status().as_u16();
            response.into_body().collect().await.expect("a body");
            Ok(status)
        }
        Err(error) => Err(error.for_user().to_owned()),
    }
}

/// A service that says this and ends.
async fn saying(response: &'static [u8]) -> Service {
    Service::running(move |mut stream| async move {
        read_head(&mut stream).await;
        let _ = stream.write_all(response).await;
    })
    .await
}

#[tokio::test]
async fn a_response_with_as_many_fields_as_a_message_may_have_is_passed_on_and_none_with_more() {
    for (count, outcome) in [
        (MAX_HEADER_FIELDS, Ok(200)),
        (
            MAX_HEADER_FIELDS + 1,
            Err("the head of its response is too long"),
        ),
        (
            MAX_HEADER_FIELDS + 2,
            Err("the head of its response is too long"),
        ),
    ] {
        let service = Service::running(move |mut stream| async move {
            read_head(&mut stream).await;
            let fields = "x-a: 1\r\n".repeat(count - 1);
            let response = format!("HTTP/1.1 200 OK\r\n{fields}content-length: 0\r\n\r\n");
            let _ = stream.write_all(response.as_bytes()).await;
        })
        .await;
        let origin = Origin::new(&service.settings());
        let status = status(&origin, "GET", "").await;
        assert_eq!(status, outcome.map_err(str::to_owned), "{count} fields");
    }
}

#[tokio::test]
async fn a_request_that_meets_a_closing_connection_is_made_once_more_if_it_may_be() {
    // The second request of each connection is answered with its end.
    let closing = |mut stream: TcpStream| async move {
        read_head(&mut stream).await;
        let _ = stream.write_all(OK).await;
        read_head(&mut stream).await;
    };
    for (method, body) in [
        ("GET", ""),
        ("HEAD", ""),
        ("OPTIONS", ""),
        ("TRACE", ""),
        ("DELETE", ""),
        ("PUT", "body"),
    ] {
        let service = Service::running(closing).await;
        let origin = Origin::new(&service.settings());
        assert_eq!(status(&origin, "GET", "").await, Ok(200));
        assert_eq!(status(&origin, method, body).await, Ok(200), "{method}");
        assert_eq!(service.connections(), 2, "{method}");
    }
    for (method, body) in [("POST", "body"), ("POST", ""), ("PATCH", "")] {
        let service = Service::running(closing).await;
        let origin = Origin::new(&service.settings());
        assert_eq!(status(&origin, "GET", "").await, Ok(200));
        assert!(status(&origin, method, body).await.is_err(), "{method}");
        assert_eq!(service.connections(), 1, "{method} was made twice");
    }
}

#[tokio::test]
async fn a_request_is_not_made_again_where_it_may_have_been_carried_out() {
    let on_a_fresh_connection = Service::running(|mut stream: TcpStream| async move {
        read_head(&mut stream).await;
    })
    .await;
    let origin = Origin::new(&on_a_fresh_connection.settings());
    assert!(status(&origin, "GET", "").await.is_err());
    assert_eq!(on_a_fresh_connection.connections(), 1);

    let after_a_byte = Service::running(|mut stream: TcpStream| async move {
        read_head(&mut stream).await;
        let _ = stream.write_all(OK).await;
        read_head(&mut stream).await;
        let _ = stream.write_all(b"H").await;
    })
    .await;
    let origin = Origin::new(&after_a_byte.settings());
    assert_eq!(status(&origin, "GET", "").await, Ok(200));
    assert!(status(&origin, "GET", "").await.is_err());
    assert_eq!(after_a_byte.connections(), 1);
}

#[tokio::test]
async fn a_response_that_begins_while_the_body_is_written_has_begun() {
    // More than sockets hold, so that the body is still being written when the response begins.
    const BODY_BYTES: usize = 32_000_000;
    let service = Service::running(|mut stream| async move {
        read_head(&mut stream).await;
        let _ = stream.write_all(OK).await;
        read_head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 O").await;
        let mut body = stream.take(BODY_BYTES as u64);
        let _ = tokio::io::copy(&mut body, &mut tokio::io::sink()).await;
    })
    .await;
    let origin = Origin::new(&service.settings());
    assert_eq!(status(&origin, "GET", "").await, Ok(200));
    let outcome = status(&origin, "PUT", &"x".repeat(BODY_BYTES)).await;
    assert!(outcome.is_err(), "{outcome:?}");
    assert_eq!(service.connections(), 1);
}

#[tokio::test]
async fn a_write_to_an_upgraded_connection_that_was_reset_fails() {
    let service = Service::running(|mut stream| async move {
        read_head(&mut stream).await;
        let head = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";
        let _ = stream.write_all(head).await;
        let _ = stream.read_u8().await;
        let _ = stream.write_all(b"!").await;
        let _ = stream.read_u8().await;
        stream.set_zero_linger().expect("set");
    })
    .await;
    let origin = Origin::new(&service.settings());
    let mut message = request("GET", "/x", &[], "");
    message.upgrade = Some("x".to_owned());
    let response = send(&origin, message).await.expect("a response");
    let upgraded = hyper::upgrade::on(response).await.expect("a connection");
    let mut upgraded = TokioIo::new(upgraded);
    upgraded.write_all(b"?").await.expect("written");
    assert_eq!(upgraded.read_u8().await.expect("a byte"), b'!');
    let write = async { while upgraded.write_all(b"?").await.is_ok() {} };
    within("a failure", write).await;
}

#[tokio::test]
async fn a_request_is_made_once_more_and_not_for_ever() {
    let never_twice = Service::running(|mut stream: TcpStream| async move {
        if !read_head(&mut stream).await.contains("DELETE") {
            let _ = stream.write_all(OK).await;
            read_head(&mut stream).await;
        }
    })
    .await;
    let origin = Origin::new(&never_twice.settings());
    assert_eq!(status(&origin, "GET", "").await, Ok(200));
    assert!(status(&origin, "DELETE", "").await.is_err());
    assert_eq!(never_twice.connections(), 2);
}

#[tokio::test]
async fn a_port_alone_reaches_a_service_on_either_loopback_address() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let service = Service::at(address, |mut stream| async move {
            let head = read_head(&mut stream).await;
            assert!(head.contains("host: 127.0.0.1:"), "{head}");
            let _ = stream.write_all(OK).await;
        })
        .await;
        let origin = Origin::new(&settings(&service.address.port().to_string()));
        assert_eq!(status(&origin, "GET", "").await, Ok(200), "{address}");
    }
    let unused = Service::running(|_| async {}).await.address.port();
    let origin = Origin::new(&settings(&unused.to_string()));
    assert_eq!(
        status(&origin, "GET", "").await,
        Err("it refused the connection".to_owned())
    );
}

#[cfg(unix)]
#[tokio::test]
async fn a_service_on_a_unix_socket_is_reached_by_its_path() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("app.sock");
    let target = format!("unix:{}", path.display());
    let origin = Origin::new(&settings(&target));
    assert_eq!(
        status(&origin, "GET", "").await,
        Err(format!("{target} does not exist"))
    );
    let listener = tokio::net::UnixListener::bind(&path).expect("a socket");
    let serve = async {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let head = read_head(&mut stream).await;
        stream.write_all(OK).await.expect("written");
        head
    };
    let (status, head) = tokio::join!(status(&origin, "GET", ""), serve);
    assert_eq!(status, Ok(200));
    assert!(head.starts_with("GET /x HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("host: localhost\r\n"), "{head}");
}

#[tokio::test]
async fn this_hop_is_added_to_via() {
    let service = Service::running(|mut stream| async move {
        let head = read_head(&mut stream).await;
        let via: Vec<_> = head
            .lines()
            .filter(|line| line.starts_with("via"))
            .collect();
        assert_eq!(via, ["via: 1.0 front", "via: 1.1 ttf"]);
        let _ = stream.write_all(OK).await;
    })
    .await;
    let origin = Origin::new(&service.settings());
    let message = request("GET", "/", &[("via", "1.0 front")], "");
    assert!(send(&origin, message).await.is_ok());
}

#[tokio::test]
async fn a_length_counts_for_nothing_beside_chunks_and_without_a_body() {
    for response in [
        &b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"[..],
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\ncontent-length: 50\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ] {
        let service = saying(response).await;
        let response = call(&Origin::new(&service.settings()), "GET", "").await.expect("a response");
        assert!(!response.headers().contains_key(header::CONTENT_LENGTH));
        let body = response.into_body().collect().await.expect("a body");
        assert_eq!(body.to_bytes(), "hello");
    }
    let service = saying(b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\n").await;
    let response = call(&Origin::new(&service.settings()), "GET", "")
        .await
        .expect("a response");
    assert!(!response.headers().contains_key(header::CONTENT_LENGTH));
    for (method, head) in [
        ("HEAD", &b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"[..]),
        (
            "GET",
            b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n",
        ),
    ] {
        let service = saying(head).await;
        let response = call(&Origin::new(&service.settings()), method, "")
            .await
            .expect("a response");
        assert_eq!(response.headers()[header::CONTENT_LENGTH], "5", "{method}");
    }
}

#[tokio::test]
async fn a_response_that_http_does_not_allow_is_refused_with_its_reason() {
    for (response, reason) in [
        (&b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"[..], "Transfer-Encoding: gzip, chunked"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "Transfer-Encoding: gzip, chunked"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: identity\r\n\r\nhello", "Transfer-Encoding: identity"),
        (b"HTTP/1.1 999 What\r\ncontent-length: 0\r\n\r\n", "status is 999"),
        (b"HTTP/1.1 600 What\r\ncontent-length: 0\r\n\r\n", "status is 600"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "status is 101"),
        (b"HTTP/1.1 200 OK\r\nA: b\r\nX-A : b\r\n\r\n", "line 3 of its response is not valid HTTP: X-A : b"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "line 2 of its response"),
        (b"SSH-2.0-OpenSSH\r\n", "line 1 of its response is not valid HTTP: SSH-2.0-OpenSSH"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: +5\r\n\r\nhello", "its response is not HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello", "its response is not HTTP"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "it speaks TLS; write https:// before the target"),
        (b"", "it closed the connection without a response; if it speaks TLS, write https:// before the target"),
    ] {
        let service = saying(response).await;
        let reason_given = status(&Origin::new(&service.settings()), "GET", "").await;
        let shown = String::from_utf8_lossy(response);
        assert!(
            reason_given.as_ref().is_err_and(|given| given.contains(reason)),
            "{shown}: {reason_given:?}"
        );
    }
}

/// A certificate with its key.
struct Signed {
    chain: Vec<rustls::pki_types::CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn key_of(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivatePkcs8KeyDer::from(key.serialize_der()).into()
}

/// A certificate as `openssl req -x509` makes it: an authority that has signed itself.
fn self_signed() -> Signed {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).expect("a certificate");
    Signed {
        chain: vec![certificate.der().clone()],
        key: key_of(&key),
    }
}

/// An authority, and a certificate that it has signed.
fn signed(name: &str, change: impl FnOnce(&mut CertificateParams)) -> (Signed, Signed) {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    let key_der = key_of(&key);
    let authority = CertifiedIssuer::self_signed(authority, key).expect("an authority");
    let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
    change(&mut params);
    let key = KeyPair::generate().expect("a key");
    let certificate = params.signed_by(&key, &authority).expect("a certificate");
    let signed = Signed {
        chain: vec![certificate.der().clone()],
        key: key_of(&key),
    };
    let authority = Signed {
        chain: vec![authority.der().clone()],
        key: key_der,
    };
    (authority, signed)
}

async fn serving_tls(signed: &Signed) -> Service {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(signed.chain.clone(), signed.key.clone_key())
        .expect("a certificate");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    Service::running(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(mut stream) = acceptor.accept(stream).await else {
                return;
            };
            read_head(&mut stream).await;
            let _ = stream.write_all(OK).await;
            let _ = stream.shutdown().await;
        }
    })
    .await
}

async fn status_with(service: &Service, accepted: AcceptedCertificates) -> Result<u16, String> {
    let target = format!("https://localhost:{}", service.address.port());
    let origin = Origin::new(&Settings {
        target_tls: accepted,
        ..settings(&target)
    });
    status(&origin, "GET", "").await
}

#[tokio::test]
async fn a_certificate_is_accepted_as_configured_and_otherwise_refused_with_a_reason() {
    let accept = |signed: &Signed| AcceptedCertificates::Authorities(signed.chain.clone().into());
    let own = self_signed();
    let service = serving_tls(&own).await;
    assert_eq!(
        status_with(&service, AcceptedCertificates::Insecure).await,
        Ok(200)
    );
    assert_eq!(status_with(&service, accept(&own)).await, Ok(200));
    let hint = "pass --target-insecure or --target-ca FILE";
    let refused = status_with(&service, AcceptedCertificates::System)
        .await
        .expect_err("self-signed");
    assert!(
        refused.contains("self-signed") && refused.contains(hint),
        "{refused}"
    );
    assert!(
        status_with(&service, accept(&self_signed())).await.is_err(),
        "another certificate"
    );

    let (authority, good) = signed("localhost", |_| {});
    let service = serving_tls(&good).await;
    assert_eq!(status_with(&service, accept(&authority)).await, Ok(200));
    let refused = status_with(&service, AcceptedCertificates::System)
        .await
        .expect_err("unknown authority");
    assert!(
        refused.contains("authority") && refused.contains(hint),
        "{refused}"
    );

    let (authority, other) = signed("example.com", |_| {});
    let service = serving_tls(&other).await;
    let refused = status_with(&service, accept(&authority))
        .await
        .expect_err("another name");
    assert!(refused.contains("not for the name localhost"), "{refused}");

    let (authority, old) = signed("localhost", |params| {
        params.not_after = rcgen::date_time_ymd(2001, 1, 1);
    });
    let service = serving_tls(&old).await;
    let refused = status_with(&service, accept(&authority))
        .await
        .expect_err("expired");
    assert!(refused.contains("has expired"), "{refused}");
}

#[tokio::test]
async fn a_service_without_tls_is_named_as_such() {
    let service = Service::running(|mut stream: TcpStream| async move {
        let mut hello = [0; 1];
        let _ = stream.read(&mut hello).await;
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    })
    .await;
    let refused = status_with(&service, AcceptedCertificates::System)
        .await
        .expect_err("no TLS");
    assert!(refused.contains("does not speak TLS"), "{refused}");
}

#[tokio::test]
async fn a_tls_handshake_that_does_not_come_counts_as_connecting() {
    let service = Service::running(|stream: TcpStream| async move {
        let _open = stream;
        std::future::pending::<()>().await;
    })
    .await;
    let refused = status_with(&service, AcceptedCertificates::System)
        .await
        .expect_err("no handshake");
    assert_eq!(refused, "no connection could be made within 5 s");
}

#[test]
fn rules_change_the_header_of_requests() {
    let rules = ["X-A: 1".to_owned(), "-Cookie".to_owned()].map(Into::into);
    let settings = Settings {
        request_headers: crate::header_rules::HeaderRules::parse(&rules).expect("rules"),
        ..settings("3000")
    };
    let message = request("GET", "/", &[("cookie", "a=1")], "");
    let origin = Origin::new(&settings);
    let addresses = origin.addresses(&message);
    let made = origin
        .request(&message, &addresses, OriginBody::Whole(Bytes::new()))
        .expect("a request");
    assert_eq!(
        made.head.headers.get("x-a"),
        Some(&HeaderValue::from_static("1"))
    );
    assert!(made.head.headers.get("cookie").is_none());
}

#[tokio::test]
async fn a_long_body_is_written_although_nobody_reads_the_response() {
    const BYTES: usize = 20_000_000;
    let (received, mut bodies) = mpsc::unbounded_channel();
    let service = Service::running(move |mut stream| {
        let received = received.clone();
        async move {
            read_head(&mut stream).await;
            let head = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n";
            let _ = stream.write_all(head).await;
            let mut body = vec![0; BYTES];
            let read = stream.read_exact(&mut body).await;
            let _ = received.send(read.expect("a body"));
            // The response goes on once the body is there.
            let _ = stream.write_all(b"ok").await;
        }
    })
    .await;
    let origin = Origin::new(&service.settings());
    let response = call(&origin, "POST", &"x".repeat(BYTES)).await;
    let response = response.expect("a response");
    assert_eq!(within("the body", bodies.recv()).await, Some(BYTES));
    let body = within("ok", response.into_body().collect()).await;
    assert_eq!(body.expect("a body").to_bytes(), "ok");
}

const EARLY_HEAD: &[u8] = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 40000\r\n\r\n";
/// More than is read at once, and less than sockets hold.
const EARLY_BODY_BYTES: usize = 40_000;

/// A service answers the second request of a connection early and ends. Returns how many bytes of the answer's body come if
/// `taken_after` bytes of the answer are there while the request's body is still taken.
async fn early_answer_on_a_kept_connection(taken_after: usize) -> usize {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let target = listener.local_addr().expect("an address").to_string();
    let origin = Origin::new(&settings(&target));
    let (before, mut stream) = tokio::join!(call(&origin, "GET", ""), async {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        read_head(&mut stream).await;
        stream.write_all(OK).await.expect("sent");
        stream
    });
    let before = before.expect("a response").into_body().collect();
    let before = within("ok", before).await.expect("a body").to_bytes();
    assert_eq!(before, "ok");

    let (feed, chunks) = mpsc::unbounded_channel();
    let frames = stream::unfold(chunks, async |mut chunks| {
        Some((chunks.recv().await?, chunks))
    });
    let body = StreamBody::new(frames.map(|bytes| Ok(Frame::data(bytes)))).boxed_unsync();
    let message = request("POST", "/x", &[], "");
    let addresses = origin.addresses(&message);
    let mut calling = pin!(origin.call(&message, &addresses, OriginBody::Streamed(body)));
    // The call goes on by itself once it is sent, but does not learn of its response.
    tokio::select! {
        _ = &mut calling => panic!("no response was sent"),
        _ = within("the request", read_head(&mut stream)) => {}
    }
    let answer = [EARLY_HEAD, &[b'x'; EARLY_BODY_BYTES]].concat();
    let (first, rest) = answer.split_at(taken_after);
    stream.write_all(first).await.expect("sent");
    // What was sent before has been read when the second chunk arrives.
    for _ in 0..2 {
        feed.send(Bytes::from_static(b"more")).expect("read");
        let mut chunk = [0; 9];
        let read = within("a chunk", stream.read_exact(&mut chunk)).await;
        read.expect("a chunk");
    }
    stream.write_all(rest).await.expect("sent");
    stream.set_zero_linger().expect("set");
    drop(stream);
    for _ in 0..1000 {
        // Fails once the connection was given up.
        let _ = feed.send(Bytes::from_static(b"more"));
        tokio::task::yield_now().await;
    }
    let response = within("the answer", calling).await.expect("an answer");
    let mut body = response.into_body();
    let mut bytes = 0;
    while let Some(Ok(frame)) = within("more", body.frame()).await {
        bytes += frame.into_data().expect("data").len();
    }
    bytes
}

#[tokio::test]
async fn an_early_answer_on_a_kept_connection_is_read_to_its_end() {
    let head = EARLY_HEAD.len();
    for taken_after in [0, 20, head - 1, head, head + 1, head + EARLY_BODY_BYTES] {
        let bytes = early_answer_on_a_kept_connection(taken_after).await;
        assert_eq!(bytes, EARLY_BODY_BYTES, "{taken_after} bytes were there");
    }
}
