//! `tunnel-local health`: whether the server that runs with the same settings serves.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, bail};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// How long the server may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The first line of an answer, as far as its status.
const STATUS_LINE: &[u8] = b"HTTP/1.1 200";

/// Asks the server that listens there, at its address for operators if it has one.
///
/// # Errors
/// If it does not answer that it serves.
pub(crate) async fn check(
    listen: SocketAddr,
    admin: Option<SocketAddr>,
    is_https: bool,
) -> anyhow::Result<()> {
    let (address, path) = match admin {
        Some(admin) => (reachable(admin), "/readyz"),
        None if is_https => bail!("a server with HTTPS is asked at its --admin address: set one"),
        None => (reachable(listen), "/_health"),
    };
    timeout(ANSWER_TIMEOUT, ask(address, path))
        .await
        .unwrap_or_else(|_| bail!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))
        .with_context(|| format!("the server at {address} does not serve"))
}

async fn ask(address: SocketAddr, path: &str) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut start = [0; STATUS_LINE.len()];
    stream.read_exact(&mut start).await?;
    if start != STATUS_LINE {
        bail!("it answered {}", String::from_utf8_lossy(&start));
    }
    Ok(())
}

/// Where a process on the same machine reaches a server that listens on this address.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let loopback: std::net::IpAddr = match listen {
        _ if !listen.ip().is_unspecified() => listen.ip(),
        SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(loopback, listen.port())
}
