//! The socket of `--admin`: few connections at a time, none of which may be slow in asking.

use std::sync::Arc;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tracing::{debug, warn};

use crate::{
    front::listener::{ACCEPT_RETRY_DELAY, HEAD_TIMEOUT},
    subsystem::Subsystem,
};

/// Most open connections; more wait to be accepted.
const MAX_CONNECTIONS: usize = 64;

/// Serves an API until the subsystem is stopped.
pub(crate) async fn listen(listener: TcpListener, api: Router, subsystem: Subsystem) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await;
            let place = place.expect("the semaphore is never closed");
            Ok::<_, std::io::Error>((listener.accept().await?.0, place))
        };
        match subsystem.stopping().run_until_cancelled(next).await {
            None => return,
            Some(Ok((stream, place))) => {
                let serving = serve(stream, api.clone(), subsystem.clone());
                subsystem.spawn(async move {
                    serving.await;
                    drop(place);
                });
            }
            Some(Err(error)) => {
                warn!(%error, "--admin cannot accept");
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, api: Router, subsystem: Subsystem) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(api));
    let mut connection = std::pin::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = subsystem.stopping().cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        debug!(
            error = &error as &dyn std::error::Error,
            "a connection of --admin ended"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, time::Duration};

    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::{Instant, timeout},
    };

    use super::*;

    async fn start() -> (SocketAddr, Subsystem) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let subsystem = Subsystem::default();
        let api = Router::new().route("/", get(async || "here"));
        subsystem.spawn(listen(listener, api, subsystem.clone()));
        (address, subsystem)
    }

    /// A connection on which this has been sent.
    async fn send(address: SocketAddr, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.expect("a connection");
        stream.write_all(text.as_bytes()).await.expect("sent");
        stream
    }

    /// All that comes on a connection until its end.
    async fn receive(mut stream: TcpStream) -> String {
        let mut received = String::new();
        let end = stream.read_to_string(&mut received);
        let end = timeout(Duration::from_secs(3600), end).await;
        end.expect("it ends").expect("a text");
        received
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_does_not_finish_a_head_holds_a_connection_no_longer_than_the_timeout() {
        let (address, subsystem) = start().await;
        let mut slow = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            slow.push(send(address, "GET / HTTP/1.1\r\n").await);
        }
        let begin = Instant::now();
        let next = "GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        let answer = receive(send(address, next).await).await;
        assert!(answer.ends_with("here"), "{answer}");
        assert!(begin.elapsed() >= HEAD_TIMEOUT, "it waits for a place");
        subsystem.stop("test", Instant::now() + HEAD_TIMEOUT).await;
        drop(slow);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_a_request_does_not_hinder_stopping() {
        let (address, subsystem) = start().await;
        let mut idle = send(address, "GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
        let mut answer = [0; 12];
        idle.read_exact(&mut answer).await.expect("an answer");
        assert_eq!(&answer, b"HTTP/1.1 200");
        let begin = Instant::now();
        subsystem.stop("test", begin + HEAD_TIMEOUT).await;
        assert!(begin.elapsed() < HEAD_TIMEOUT, "{:?}", begin.elapsed());
    }
}
