//! Directories as local services, rules about header fields, and lines for programs.

use std::{fs, os::unix::fs::symlink, path::Path};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    sync::mpsc,
};

use crate::harness::{Agent, Service, Ttf, within};

/// Requests a path of a page, and returns the response.
async fn get(agent: &mut Agent, id: usize, path: &str) -> Value {
    agent
        .send(json!({
            "type": "http_request", "request_id": format!("r{id}"), "method": "GET", "uri": path,
            "headers": {
                "accept": ["text/html"], "origin": ["https://t.example.com"],
                "x-forwarded-for": ["203.0.113.9"], "x-forwarded-host": ["t.example.com"],
                "x-forwarded-proto": ["https"],
            },
        }))
        .await;
    agent.next("http_response").await.expect("a response")
}

/// The responses that a tunnel gives to these paths.
async fn responses(
    arguments: &[&str],
    paths: &'static [&'static str],
) -> (Vec<Value>, Vec<String>) {
    let (send, mut all) = mpsc::channel(1);
    let service = Service::online("http://t.example.com/my-app", move |mut agent: Agent| {
        let send = send.clone();
        async move {
            let mut responses = Vec::new();
            for (id, path) in paths.iter().enumerate() {
                responses.push(get(&mut agent, id, path).await);
            }
            let _ = send.send(responses).await;
            agent.until_closed().await;
        }
    })
    .await;
    let arguments = [
        arguments,
        &[
            "-e",
            &service.endpoint,
            "--remember=false",
            "--inspect=false",
        ],
    ]
    .concat();
    let ttf = Ttf::start(&arguments);
    let responses = within("the responses", all.recv())
        .await
        .expect("responses");
    ttf.signal(rustix::process::Signal::TERM);
    let ended = ttf.ended().await;
    assert_eq!(ended.code, Some(0));
    (responses, ended.stderr)
}

fn statuses(responses: &[Value]) -> Vec<u64> {
    responses
        .iter()
        .filter_map(|response| response["status_code"].as_u64())
        .collect()
}

fn site(root: &Path) {
    fs::create_dir_all(root.join("docs")).expect("a directory");
    fs::create_dir_all(root.join("empty")).expect("a directory");
    for (name, text) in [
        ("index.html", "<h1>home</h1>"),
        ("docs/index.html", "<h1>docs</h1>"),
        ("docs/a b.txt", "text"),
        (".env", "secret"),
    ] {
        fs::write(root.join(name), text).expect("written");
    }
    symlink("/etc/hosts", root.join("out")).expect("a link");
    symlink("docs/index.html", root.join("in.html")).expect("a link");
}

#[tokio::test]
async fn a_directory_is_served_without_hidden_files_and_links_out() {
    let directory = tempfile::tempdir().expect("a directory");
    site(directory.path());
    let root = directory.path().to_str().expect("a path");
    const PATHS: &[&str] = &[
        "/",
        "/docs/",
        "/docs",
        "/docs/a%20b.txt",
        "/in.html",
        "/.env",
        "/%2eenv",
        "/out",
        "/docs/../.env",
        "/docs/..%2f.env",
        "/empty/",
        "/nope",
    ];
    let (found, _) = responses(&["http", root], PATHS).await;
    assert_eq!(
        statuses(&found),
        [200, 200, 307, 200, 200, 404, 404, 404, 404, 404, 404, 404]
    );
    let (found, _) = responses(
        &["http", root, "--spa"],
        &["/nope", "/some/page", "/.env", "/out"],
    )
    .await;
    assert_eq!(statuses(&found), [200, 200, 200, 200]);
    assert!(
        found
            .iter()
            .all(|page| page["headers"]["content-type"][0] == "text/html"),
        "{found:?}"
    );
}

#[tokio::test]
async fn rules_change_the_header_of_responses() {
    let directory = tempfile::tempdir().expect("a directory");
    site(directory.path());
    let root = directory.path().to_str().expect("a path");
    let rules = [
        "--response-header",
        "Access-Control-Allow-Origin: *",
        "--response-header=-Last-Modified",
    ];
    let (found, _) = responses(&[&["http", root], &rules[..]].concat(), &["/"]).await;
    assert_eq!(found[0]["headers"]["access-control-allow-origin"][0], "*");
    assert!(found[0]["headers"].get("last-modified").is_none());
}

#[tokio::test]
async fn rules_have_the_last_word_about_fields_with_addresses() {
    let service = Service::running(|stream| async move {
        let mut stream = BufReader::new(stream);
        let mut origin = String::new();
        let mut line = String::new();
        while stream.read_line(&mut line).await.expect("a line") > 2 {
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("origin: ") {
                origin = value.trim().to_owned();
            }
            line.clear();
        }
        let response = format!(
            "HTTP/1.1 302 Found\r\nlocation: /next\r\nx-seen-origin: {origin}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        );
        let _ = stream.write_all(response.as_bytes()).await;
    })
    .await;
    let (address, _) = service.endpoint["ws://".len()..]
        .split_once('/')
        .expect("a path");
    let own = format!("http://{address}");

    let (found, _) = responses(&["http", address], &["/"]).await;
    let fields = &found[0]["headers"];
    assert_eq!(fields["x-seen-origin"][0], own.as_str());

    // Each is an address that would otherwise be translated.
    let location = format!("Location: {own}/inside");
    let rules = [
        "--header",
        "Origin: https://t.example.com",
        "--response-header",
        &location,
    ];
    let (found, _) = responses(&[&["http", address], &rules[..]].concat(), &["/"]).await;
    let fields = &found[0]["headers"];
    assert_eq!(fields["x-seen-origin"][0], "https://t.example.com");
    assert_eq!(fields["location"][0], format!("{own}/inside"));
}

#[tokio::test]
async fn a_line_for_a_program_is_an_object() {
    let directory = tempfile::tempdir().expect("a directory");
    site(directory.path());
    let root = directory.path().to_str().expect("a path");
    let (_, lines) = responses(&["http", root, "--log-format", "json"], &["/"]).await;
    let lines: Vec<Value> = lines
        .iter()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let of_kind = |kind: &str| {
        let line = lines.iter().find(|line| line["event"] == kind);
        line.unwrap_or_else(|| panic!("no {kind}: {lines:?}"))
    };
    assert_eq!(
        of_kind("online")["public_url"],
        "http://t.example.com/my-app"
    );
    assert_eq!(of_kind("request")["visitor"], "203.0.113.9");
    assert_eq!(of_kind("request")["status"], 200);
    assert_eq!(of_kind("draining")["level"], "INFO");
    let (_, quiet) = responses(&["http", root, "-q"], &["/"]).await;
    assert_eq!(quiet, [""; 0]);
}
