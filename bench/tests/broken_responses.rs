//! What visitors get of a response that breaks off behind the functions' own executables: all that came before, and no end that looks
//! like one.

#![allow(clippy::panic, reason = "a story that goes wrong ends here")]
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "so does this")]

use std::{path::Path, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tunnel_bench::{cloud::Cloud, latency::Latency, processes};

/// Answers each request with `answer`, and closes the connection.
async fn local_service(answer: &'static [u8]) -> (String, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
                    break;
                }
            }
            let _ = stream.write_all(answer).await;
        }
    });
    (address, serving)
}

/// All bytes that a front answers with.
async fn answer(front: &str, path: &str) -> String {
    let authority = front.trim_start_matches("http://");
    let mut stream = TcpStream::connect(authority).await.expect("a connection");
    let request = format!("GET {path} HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).expect("text")
}

async fn tell(executables: &Path) {
    let work = tempfile::tempdir().expect("a directory");
    let log = work.path().join("functions.log");
    let cloud = Cloud::start(executables, &log, Latency::Zero)
        .await
        .expect("a stand-in");
    let cut = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n5\r\nse";
    let (address, _serving) = local_service(cut).await;
    let token = ("TTF_TOKEN", &*cloud.token);
    let (_agent, url) = processes::agent(executables, &cloud.agent_endpoint, Some(token), &address)
        .await
        .expect("an agent");
    let path = url
        .strip_prefix(&cloud.http_api)
        .expect("a path")
        .to_owned()
        + "/";

    // Twice: the environment that breaks a response off ends, and the next one is new.
    for _ in 0..2 {
        let streamed = answer(&cloud.function_url, &path).await;
        let (head, body) = streamed.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 200 OK"), "{streamed}");
        let sent: String = body.split("\r\n").skip(1).step_by(2).collect();
        assert_eq!(sent, "firstse", "{streamed}");
        assert!(!body.ends_with("0\r\n\r\n"), "{streamed}");
    }
    let whole = answer(&cloud.http_api, &path).await;
    assert!(whole.starts_with("HTTP/1.1 502 "), "{whole}");
    assert!(
        whole.contains("x-tunnel-error: local_unreachable"),
        "{whole}"
    );
    cloud.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_that_breaks_off_never_looks_complete() {
    let executables = processes::build().expect("executables");
    timeout(Duration::from_secs(120), tell(&executables))
        .await
        .expect("in time");
}
