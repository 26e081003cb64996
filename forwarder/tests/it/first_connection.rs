//! What time does not mend ends an agent that has never been online.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Service, Ttf};

async fn said(arguments: &[&str]) -> (Option<i32>, String) {
    let ended = Ttf::start(arguments).ended().await;
    (ended.code, ended.stderr.last().cloned().unwrap_or_default())
}

#[tokio::test]
async fn an_answer_of_somebody_else_ends_it_with_a_sentence() {
    for status in [
        "200 OK",
        "301 Moved Permanently",
        "404 Not Found",
        "405 Method Not Allowed",
    ] {
        let service = Service::refusing(status).await;
        let (code, said) = said(&["http", "1", "-e", &service.endpoint]).await;
        assert_eq!(code, Some(1), "{status}: {said}");
        let words = [
            "error: ",
            status,
            "not where agents connect",
            "--keep-trying",
        ];
        assert!(words.iter().all(|words| said.contains(words)), "{said}");
    }
}

#[tokio::test]
async fn it_keeps_trying_when_told_to_or_when_the_service_may_come_back() {
    let gone = Service::refusing("404 Not Found").await;
    let mut told = Ttf::tunnel(&gone, &["--keep-trying"]);
    told.until_line("offline: ").await;
    let busy = Service::refusing("503 Service Unavailable").await;
    let mut untold = Ttf::tunnel(&busy, &[]);
    untold
        .until_line("offline: the service answered the handshake with 503")
        .await;
}

#[tokio::test]
async fn an_address_that_cannot_be_the_service_is_explained() {
    for (scheme, greeting, words) in [
        (
            "wss://",
            "HTTP/1.1 400 Bad Request\r\n\r\n",
            "does not speak TLS",
        ),
        ("ws://", "SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP"),
    ] {
        let other = Service::running(move |mut stream| async move {
            let _ = stream.read_u8().await;
            let _ = stream.write_all(greeting.as_bytes()).await;
            let _ = stream.read_to_end(&mut Vec::new()).await;
        })
        .await;
        let endpoint = other.endpoint.replace("ws://", scheme);
        let (code, said) = said(&["http", "1", "-e", &endpoint]).await;
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(words), "{said}");
    }
}
