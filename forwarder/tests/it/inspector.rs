//! Where the executable's inspector is.

use std::net::SocketAddr;

use rustix::process::Signal;
use tokio::net::{TcpListener, TcpStream};

use crate::harness::{Agent, Service, Ttf, within};

const LINE: &str = "inspector: http://";

async fn service() -> Service {
    Service::online("http://t.example.com/my-app", Agent::until_closed).await
}

async fn address(ttf: &mut Ttf) -> SocketAddr {
    let lines = ttf.stderr.as_mut().expect("stderr is read");
    within("the inspector's address", async {
        loop {
            let line = lines.next_line().await.expect("a pipe");
            if let Some(address) = line.expect("another line").strip_prefix(LINE) {
                return address.parse().expect("an address");
            }
        }
    })
    .await
}

#[tokio::test]
async fn each_process_has_one_on_loopback_and_serves_it() {
    let service = service().await;
    let mut ttfs = [(); 2].map(|()| Ttf::tunnel(&service, &[]));
    let mut addresses = Vec::new();
    for ttf in &mut ttfs {
        addresses.push(address(ttf).await);
    }
    assert_ne!(addresses[0], addresses[1]);
    for address in addresses {
        assert!(address.ip().is_loopback(), "{address}");
        within("a connection", TcpStream::connect(address))
            .await
            .expect("it listens");
    }
}

#[tokio::test]
async fn it_is_where_the_flag_or_the_file_says() {
    let service = service().await;
    let directory = tempfile::tempdir().expect("a directory");
    for (flag, file, is_on) in [
        ("--inspect=127.0.0.1:0", "", true),
        ("--inspect=false", "", false),
        ("--inspect-size=1MiB", "inspect = false\n", false),
        ("--inspect-size=1MiB", "inspect = '127.0.0.1:0'\n", true),
        (
            "--inspect=127.0.0.1:0",
            "inspect = false\ninspect_size = '1 GiB'\n",
            true,
        ),
    ] {
        let path = directory.path().join("ttf.toml");
        std::fs::write(&path, file).expect("written");
        let path = path.to_str().expect("a path");
        let mut ttf = Ttf::tunnel(&service, &["--config", path, flag]);
        let mut has_line = false;
        let lines = ttf.stderr.as_mut().expect("stderr is read");
        within("the tunnel", async {
            loop {
                let line = lines.next_line().await.expect("a pipe");
                let line = line.expect("another line");
                has_line |= line.starts_with(LINE);
                if line.starts_with("online: ") {
                    return;
                }
            }
        })
        .await;
        assert_eq!(has_line, is_on, "{flag} {file}");
        ttf.signal(Signal::TERM);
        assert_eq!(ttf.ended().await.code, Some(0));
    }
}

#[tokio::test]
async fn what_cannot_be_ends_it_with_a_reason() {
    let service = service().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let taken = listener.local_addr().expect("an address").to_string();
    let directory = tempfile::tempdir().expect("a directory");
    let missing = directory.path().join("missing/history.db");
    let missing = missing.to_str().expect("a path");
    for (arguments, code, words) in [
        (&["--inspect", taken.as_str()][..], 1, "--inspect false"),
        (&["--inspect", "nowhere"], 2, "127.0.0.1:4040"),
        (&["--inspect-size", "5"], 2, "at least 1 MiB"),
        (
            &["--inspect", "127.0.0.1:0", "--inspect-history", missing],
            1,
            "missing/history.db",
        ),
    ] {
        let ended = Ttf::tunnel(&service, arguments).ended().await;
        let said = ended.stderr.join("\n");
        assert!(
            ended.code == Some(code) && said.contains(words),
            "{arguments:?}: {said}"
        );
    }
}
