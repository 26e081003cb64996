//! Reaching the service's machine: directly or through a proxy, with or without TLS.

use std::{error::Error, io, sync::Arc, time::Duration};

use http::Uri;
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::{
    client::legacy::connect::{
        HttpConnector,
        proxy::{SocksV5, Tunnel},
    },
    rt::TokioIo,
};
use rustls::ClientConfig;
use tokio::net::{TcpStream, lookup_host};
use tower_service::Service;
use tunnel_protocol::writer;

use crate::{
    endpoint::Endpoint,
    failure::{causes, find},
    handshake::HandshakeError,
    proxy::{Proxy, ProxyKind},
    tls,
};

/// How long reaching a machine may take, over IPv6 and over IPv4, shared by the addresses of each. Short, because a network that has
/// just come back is found by the next try.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the addresses of the family that the resolver prefers are tried alone (RFC 8305, 5).
const HAPPY_EYEBALLS_DELAY: Duration = Duration::from_millis(250);

/// The bytes between this machine and the service's, under the endpoint's own TLS.
pub(crate) type ServiceStream = TokioIo<MaybeHttpsStream<TokioIo<TcpStream>>>;

type SocksError = <SocksV5<HttpsConnector<HttpConnector>> as Service<Uri>>::Error;

/// Connects to the endpoint's machine, over whichever of its addresses answers first (RFC 8305), or to the proxy's and through it.
pub(crate) async fn dial(
    endpoint: &Endpoint,
    proxy: Option<&Proxy>,
    tls: &Arc<ClientConfig>,
) -> Result<ServiceStream, HandshakeError> {
    let mut tcp = racing(HttpConnector::new());
    let destination = endpoint.as_http();
    let stream = match proxy {
        None => tcp
            .call(destination)
            .await
            .map(MaybeHttpsStream::Http)
            .map_err(|error| unreachable(&endpoint.address(), &error))?,
        Some(proxy) => {
            let destination = match proxy.kind() {
                ProxyKind::Socks { local_dns: true } => looked_up(&endpoint.address())
                    .await
                    .map_err(|error| unreachable(&endpoint.address(), &error))?,
                _ => destination,
            };
            through(proxy, tcp, destination, tls)
                .await
                .map_err(|error| unreachable_through(proxy, &endpoint.address(), error.as_ref()))?
        }
    };
    writer::tune(match &stream {
        MaybeHttpsStream::Http(tcp) => tcp.inner(),
        MaybeHttpsStream::Https(tls) => tls.inner().get_ref().0.inner().inner(),
    });
    Ok(TokioIo::new(stream))
}

/// Lets a connector try further addresses of a name while the first ones do not answer.
fn racing<R>(mut tcp: HttpConnector<R>) -> HttpConnector<R> {
    tcp.enforce_http(false);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    tcp.set_happy_eyeballs_timeout(Some(HAPPY_EYEBALLS_DELAY));
    tcp
}

/// An address of a name, for a proxy that does not look names up.
async fn looked_up(address: &str) -> io::Result<Uri> {
    let found = lookup_host(address).await?.next();
    let found = found.ok_or_else(|| io::Error::other("No address associated with hostname"))?;
    Uri::try_from(format!("http://{found}/")).map_err(io::Error::other)
}

async fn through(
    proxy: &Proxy,
    tcp: HttpConnector,
    destination: Uri,
    tls: &Arc<ClientConfig>,
) -> Result<MaybeHttpsStream<TokioIo<TcpStream>>, Box<dyn Error + Send + Sync>> {
    let connector = HttpsConnector::from((tcp, tls.clone()));
    let address = proxy.address().clone();
    match proxy.kind() {
        ProxyKind::Http | ProxyKind::Https => {
            let mut tunnel = Tunnel::new(address, connector);
            if let Some(credentials) = proxy.basic_auth() {
                tunnel = tunnel.with_auth(credentials.clone());
            }
            Ok(tunnel.call(destination).await?)
        }
        ProxyKind::Socks { .. } => {
            let mut socks = SocksV5::new(address, connector);
            if let Some((user, password)) = proxy.credentials() {
                socks = socks.with_auth(user.to_owned(), password.reveal().to_owned());
            }
            // These do not name their sources.
            socks.call(destination).await.map_err(|error| match error {
                SocksError::Inner(cause) => cause,
                SocksError::Io(cause) => cause.into(),
                error => error.into(),
            })
        }
    }
}

fn unreachable(address: &str, error: &(dyn Error + 'static)) -> HandshakeError {
    let cause = root_cause(error);
    if is_unknown_host(&cause) {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        return HandshakeError::Misdirected(format!(
            "there is no host {host}: check the endpoint's spelling ({cause})"
        ));
    }
    HandshakeError::Unreachable(format!("cannot connect to {address}: {cause}"))
}

fn unreachable_through(
    proxy: &Proxy,
    address: &str,
    error: &(dyn Error + 'static),
) -> HandshakeError {
    if let Some(fault) = find::<rustls::Error>(error) {
        let host = proxy.address().host().unwrap_or_default();
        let fault = tls::explain(fault, host, "pass --endpoint-ca FILE to accept it");
        return HandshakeError::Misdirected(format!("the proxy {proxy} cannot be used: {fault}"));
    }
    let cause = root_cause(error);
    if is_unknown_host(&cause) {
        return HandshakeError::Misdirected(format!("there is no proxy {proxy}: {cause}"));
    }
    // How a SOCKS proxy turns down the only way to authenticate that it was offered.
    let takes_another_way = cause.contains("user/pass") || cause.contains("authentication");
    if takes_another_way && proxy.has_credentials() {
        return HandshakeError::Misdirected(format!(
            "the proxy {proxy} takes no user name and password: leave them out"
        ));
    }
    if takes_another_way
        || cause.contains("authorization required")
        || cause.contains("credentials")
    {
        return HandshakeError::Misdirected(format!(
            "the proxy {proxy} requires a user name and password, or refuses them: pass --proxy with user:password@ before the host"
        ));
    }
    if cause.contains("unsuccessful") {
        let password = if proxy.has_credentials() {
            ", or the user name or password is wrong"
        } else {
            ""
        };
        return HandshakeError::Unreachable(format!(
            "the proxy {proxy} refused to connect to {address}: it does not allow that, or cannot reach it{password}"
        ));
    }
    HandshakeError::Unreachable(format!(
        "cannot connect to {address} through the proxy {proxy}: {cause}"
    ))
}

/// What is behind an error that only says which step failed.
fn root_cause(error: &(dyn Error + 'static)) -> String {
    causes(error)
        .last()
        .map(ToString::to_string)
        .unwrap_or_default()
}

/// Whether a resolver says that a name does not exist, and not that it cannot ask. Its words are all that there is to tell by.
fn is_unknown_host(cause: &str) -> bool {
    [
        "Name or service not known",
        "nodename nor servname",
        "No such host",
        "Name does not resolve",
        "No address associated",
    ]
    .iter()
    .any(|words| cause.contains(words))
}

/// Why the endpoint's TLS or its answer to the upgrade failed, if that will not be better at the next try.
pub(crate) fn misdirected(
    error: &(dyn Error + 'static),
    endpoint: &Endpoint,
) -> Option<HandshakeError> {
    if let Some(fault) = find::<rustls::Error>(error) {
        let remedy = "pass --endpoint-ca FILE to accept it";
        let fault = match fault {
            rustls::Error::InvalidMessage(_) => {
                "it does not speak TLS; on this machine write ws:// in place of wss://".to_owned()
            }
            fault => tls::explain(fault, endpoint.host(), remedy),
        };
        return Some(HandshakeError::Misdirected(format!(
            "{endpoint} cannot be used: {fault}"
        )));
    }
    let is_foreign = find::<io::Error>(error).is_none();
    is_foreign.then(|| {
        HandshakeError::Misdirected(format!(
            "{endpoint} is not the service: it does not speak HTTP ({error})"
        ))
    })
}

#[cfg(test)]
mod tests {
    use std::{
        future::{Ready, ready},
        io,
        net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
        task::{Context, Poll},
    };

    use hyper_util::client::legacy::connect::dns::Name;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpSocket},
    };

    use super::*;
    use crate::settings::AcceptedCertificates;

    /// Knows these addresses, in this order, of every name.
    #[derive(Clone, Debug)]
    struct Resolver(Vec<SocketAddr>);

    impl Service<Name> for Resolver {
        type Response = std::vec::IntoIter<SocketAddr>;
        type Error = io::Error;
        type Future = Ready<io::Result<Self::Response>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Name) -> Self::Future {
            ready(Ok(self.0.clone().into_iter()))
        }
    }

    /// A socket that answers nobody: its queue has one place, which is taken.
    async fn dead(address: SocketAddr) -> (TcpListener, TcpStream) {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        };
        let socket = socket.expect("a socket");
        socket.bind(address).expect("a free address");
        let listener = socket.listen(0).expect("a listener");
        let connection = TcpStream::connect(address).await.expect("a place");
        (listener, connection)
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_does_not_hide_the_next_one() {
        for first in [
            IpAddr::V6(Ipv6Addr::LOCALHOST),
            IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)),
        ] {
            let live = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let second = live.local_addr().expect("an address");
            let first = SocketAddr::new(first, second.port());
            let _dead = dead(first).await;

            let connector = HttpConnector::new_with_resolver(Resolver(vec![first, second]));
            let uri = format!("http://service.example:{}", second.port());
            let stream = racing(connector).call(uri.parse().expect("a URI")).await;

            let stream = stream.expect("a connection").into_inner();
            assert_eq!(stream.peer_addr().expect("an address"), second);
        }
    }

    /// How a proxy is named, what it says (nobody listens there if nothing), whether the agent ends, and what it says then.
    const REFUSALS: [(&str, &[u8], bool, &str); 9] = [
        ("socks5h://", b"", false, "Connection refused"),
        ("http://", b"", false, "Connection refused"),
        ("socks5h://", &[5, 0xff], true, "requires a user name"),
        (
            "socks5h://al:hunter2@",
            &[5, 0xff],
            true,
            "takes no user name",
        ),
        (
            "socks5h://al:hunter2@",
            &[5, 2, 1, 1],
            true,
            "or refuses them",
        ),
        (
            "socks5h://",
            &[5, 0, 5, 4, 0, 1, 0, 0, 0, 0, 0, 0],
            false,
            "host unreachable",
        ),
        (
            "http://",
            b"HTTP/1.1 503 Service Unavailable\r\n\r\n",
            false,
            "it does not allow that, or cannot reach it",
        ),
        (
            "http://al:hunter2@",
            b"HTTP/1.1 401 Unauthorized\r\n\r\n",
            false,
            "or the user name or password is wrong",
        ),
        (
            "http://al:hunter2@",
            b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
            true,
            "requires a user name and password, or refuses them",
        ),
    ];

    #[tokio::test]
    async fn the_reason_why_a_proxy_leads_nowhere_is_said() {
        let endpoint: Endpoint = "wss://t.example.com".parse().expect("an endpoint");
        let tls = tls::client_config(true, &AcceptedCertificates::System).into();
        for (scheme, answer, ends, reason) in REFUSALS {
            let socket = TcpSocket::new_v4().expect("a socket");
            let any = "127.0.0.1:0".parse().expect("an address");
            socket.bind(any).expect("a free port");
            let address = socket.local_addr().expect("an address");
            let proxy: Proxy = format!("{scheme}{address}").parse().expect("a proxy");
            let dialled = dial(&endpoint, Some(&proxy), &tls);
            let outcome = if answer.is_empty() {
                dialled.await
            } else {
                let listener = socket.listen(1).expect("a listener");
                let answered = async {
                    let (mut stream, _) = listener.accept().await.expect("a connection");
                    stream.write_all(answer).await.expect("written");
                    let _ = stream.read_to_end(&mut Vec::new()).await;
                };
                tokio::join!(dialled, answered).0
            };
            let error = outcome.expect_err(reason);
            let said = error.to_string();
            assert!(said.contains(reason), "{said}");
            assert!(said.contains(&proxy.to_string()), "{said}");
            assert!(!said.contains("hunter2"), "{said}");
            let does_end = matches!(error, HandshakeError::Misdirected(_));
            assert_eq!(does_end, ends, "{said}");
        }
    }

    #[tokio::test]
    async fn a_name_that_only_the_proxy_could_look_up_is_not_taken_for_the_proxys() {
        let endpoint: Endpoint = "wss://nobody.invalid".parse().expect("an endpoint");
        let tls = tls::client_config(true, &AcceptedCertificates::System).into();
        let proxy: Proxy = "socks5://127.0.0.1:9".parse().expect("a proxy");
        let error = dial(&endpoint, Some(&proxy), &tls).await.expect_err("none");
        assert!(error.to_string().contains("nobody.invalid"), "{error}");
    }
}
