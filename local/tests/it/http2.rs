//! Visitors that speak HTTP/2.

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use hyper::{
    body::Incoming,
    client::conn::http2::{self, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use local::{Options, Server};
use serde_json::json;
use tokio::task::JoinSet;

use crate::{
    harness::{Agent, Origin, reply_with, response, stack_with, within},
    responses::base64,
    tls::{Pair, scripted},
};

/// A visitor's connection.
struct Visitor {
    sender: SendRequest<Full<Bytes>>,
    driving: JoinSet<hyper::Result<()>>,
}

impl Visitor {
    async fn new(pair: &Pair, server: &Server) -> Self {
        let stream = pair.connect(server.address, &[b"h2", b"http/1.1"]).await;
        let stream = stream.expect("a handshake");
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
        let (sender, connection) = handshake.expect("HTTP/2");
        let mut driving = JoinSet::new();
        driving.spawn(connection);
        Self { sender, driving }
    }

    /// Makes a request and returns what comes as it comes.
    async fn send(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        let mut sender = self.sender.clone();
        within("a response", sender.send_request(request))
            .await
            .expect("a response")
    }

    /// Makes a request and returns all of the response.
    async fn ask(&self, request: Request<Full<Bytes>>) -> Response<Bytes> {
        let (head, body) = self.send(request).await.into_parts();
        let body = within("a body", body.collect()).await.expect("all of it");
        Response::from_parts(head, body.to_bytes())
    }
}

fn get(path: &str) -> http::request::Builder {
    Request::get(format!("https://localhost/my-app{path}"))
}

fn empty(request: http::request::Builder) -> Request<Full<Bytes>> {
    request.body(Full::default()).expect("a request")
}

#[tokio::test]
async fn requests_over_http_2_reach_the_local_service_as_over_http_1() {
    let pair = Pair::new();
    let server = stack_with(pair.options()).await;
    let origin = Origin::answering(|seen| {
        let fields: &[(&'static str, &[u8])] = &[("set-cookie", b"a=1"), ("set-cookie", b"b=2")];
        Some(reply_with(StatusCode::OK, fields, seen.body.clone()))
    })
    .await;
    let _agent = Agent::online(pair.agent_settings(&server, origin.address)).await;
    let visitor = Visitor::new(&pair, &server).await;

    let request = get("/a%20b?c=d")
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .header("te", "trailers");
    let got = visitor.ask(empty(request)).await;
    assert_eq!(
        (got.status(), got.version()),
        (StatusCode::OK, Version::HTTP_2)
    );
    assert_eq!(got.headers().get_all("set-cookie").iter().count(), 2);
    let seen = origin.last();
    assert_eq!(seen.uri, "/a%20b?c=d");
    assert_eq!(seen.header("cookie"), Some("a=1; b=2"));
    assert_eq!(seen.header("x-forwarded-proto"), Some("https"));
    assert_eq!(seen.header("x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(seen.header("te"), None);

    let upload = Bytes::from(vec![b'x'; 5 * 1024 * 1024]);
    let request = get("/up").method(Method::POST);
    let request = request.body(Full::new(upload.clone())).expect("a request");
    let got = visitor.ask(request).await;
    assert!(*got.body() == upload, "{} bytes", got.body().len());

    let got = visitor.ask(empty(get("/").method(Method::HEAD))).await;
    assert_eq!((got.status(), got.body().len()), (StatusCode::OK, 0));
    server.stop().await;
}

#[tokio::test]
async fn a_hundred_requests_are_served_at_once_over_one_connection() {
    let pair = Pair::new();
    let server = stack_with(pair.options()).await;
    let mut agent = scripted(&pair, &server).await;
    let visitor = Visitor::new(&pair, &server).await;
    let asked = join_all((0..100).map(|number| {
        let request = get(&format!("/{number}"));
        visitor.ask(empty(request))
    }));
    let answered = async {
        let mut requests = Vec::new();
        while requests.len() < 100 {
            requests.push(agent.hear_type("http_request").await);
        }
        // The last to come is the first to be answered.
        for request in requests.iter().rev() {
            let path = request["uri"].as_str().expect("a path");
            agent
                .say(&response(request, &base64(path.as_bytes())))
                .await;
        }
    };
    let (got, ()) = tokio::join!(asked, answered);
    for (number, got) in got.iter().enumerate() {
        assert_eq!(got.body(), &Bytes::from(format!("/{number}")));
    }
    server.stop().await;
}

#[tokio::test]
async fn what_comes_piece_by_piece_is_passed_on_as_it_comes_and_a_break_resets_the_stream() {
    let pair = Pair::new();
    let server = stack_with(pair.options()).await;
    let mut agent = scripted(&pair, &server).await;
    let visitor = Visitor::new(&pair, &server).await;
    let asked = visitor.send(empty(get("/events")));
    let first = async {
        let request = agent.hear_type("http_request").await;
        agent.say(&json!({ "type": "http_response", "request_id": request["request_id"], "status_code": 200, "headers": { "content-type": ["text/event-stream"] }, "body": "b25l", "more": true })).await;
        request["request_id"].clone()
    };
    let (got, id) = tokio::join!(asked, first);
    let mut body = got.into_body();
    let mut frame = async || within("a piece", body.frame()).await;
    let one = frame().await.expect("a piece").expect("no error");
    assert_eq!(one.into_data().expect("data"), "one");
    agent.say(&json!({ "type": "body_part", "request_id": id, "part": 1, "body": "dHdv", "more": true })).await;
    let two = frame().await.expect("a piece").expect("no error");
    assert_eq!(two.into_data().expect("data"), "two");
    agent.say(&json!({ "type": "error", "request_id": id, "code": "local_service_unavailable", "message": "it has gone" })).await;
    frame().await.expect("an end").expect_err("a reset");
    // The connection goes on.
    let (got, ()) = tokio::join!(visitor.ask(empty(get("/"))), async {
        let request = agent.hear_type("http_request").await;
        agent.say(&response(&request, &base64(b"next"))).await;
    });
    assert_eq!(got.body(), "next");
    server.stop().await;
}

#[tokio::test]
async fn a_visitor_that_gives_up_a_request_cancels_it() {
    let pair = Pair::new();
    let server = stack_with(pair.options()).await;
    let mut agent = scripted(&pair, &server).await;
    let visitor = Visitor::new(&pair, &server).await;
    let mut asking = Box::pin(visitor.send(empty(get("/"))));
    let request = tokio::select! {
        _ = &mut asking => panic!("answered"),
        request = agent.hear_type("http_request") => request,
    };
    drop(asking);
    let cancel = agent.hear_type("cancel").await;
    assert_eq!(cancel["request_id"], request["request_id"]);
    server.stop().await;
}

#[tokio::test]
async fn requests_that_contradict_themselves_are_refused() {
    let pair = Pair::new();
    let server = stack_with(pair.options()).await;
    let visitor = Visitor::new(&pair, &server).await;
    let mut many = get("/");
    for number in 0..300 {
        many = many.header(format!("x-{number}"), "1");
    }
    for (what, request, status, code) in [
        (
            "another host",
            get("/").header("host", "other.example"),
            400,
            "bad_request",
        ),
        (
            "two lengths",
            get("/")
                .header("content-length", "0")
                .header("content-length", "0"),
            400,
            "bad_request",
        ),
        ("many fields", many, 431, "head_too_large"),
        (
            "an agent's path",
            Request::get("https://localhost/_ws"),
            426,
            "",
        ),
    ] {
        let got = visitor.ask(empty(request)).await;
        assert_eq!(got.status().as_u16(), status, "{what}");
        let error = got.headers().get("x-tunnel-error");
        let error = error.map_or("", |error| error.to_str().expect("text"));
        assert_eq!(error, code, "{what}");
    }
    server.stop().await;
}

#[tokio::test]
async fn answers_of_the_server_s_own_to_head_have_a_length_and_no_body() {
    let pair = Pair::new();
    let server = stack_with(pair.options()).await;
    let visitor = Visitor::new(&pair, &server).await;
    let unknown = || Request::builder().uri("https://localhost/nobody/");
    let health = || Request::builder().uri("https://localhost/_health");
    let agents = || Request::builder().uri("https://localhost/_ws");
    let malformed = || get("/").header("host", "other.example");
    for request in [unknown, health, agents, malformed] {
        let whole = visitor.ask(empty(request())).await;
        assert!(!whole.body().is_empty(), "{whole:?}");
        let got = visitor.ask(empty(request().method(Method::HEAD))).await;
        assert_eq!(got.status(), whole.status());
        assert_eq!(got.body(), "");
        let length = got.headers().get("content-length").expect("a length");
        assert_eq!(length, &whole.body().len().to_string());
    }
    server.stop().await;
}

#[tokio::test]
async fn stopping_lets_requests_finish_and_takes_no_new_ones() {
    let pair = Pair::new();
    let server = stack_with(pair.options()).await;
    let mut agent = scripted(&pair, &server).await;
    let mut visitor = Visitor::new(&pair, &server).await;
    let mut asking = Box::pin(visitor.ask(empty(get("/"))));
    let request = tokio::select! {
        _ = &mut asking => panic!("answered"),
        request = agent.hear_type("http_request") => request,
    };
    let (got, (), ()) = tokio::join!(asking, server.stop(), async {
        agent.say(&response(&request, &base64(b"finished"))).await;
    });
    assert_eq!(got.body(), "finished");
    within("the connection to end", visitor.driving.join_next()).await;
}

#[tokio::test]
async fn a_visitor_that_gives_up_one_request_after_another_is_cut_off() {
    let pair = Pair::new();
    let server = stack_with(Options {
        max_concurrent_requests: 0,
        ..pair.options()
    })
    .await;
    let mut agent = scripted(&pair, &server).await;
    let visitor = Visitor::new(&pair, &server).await;
    let Visitor {
        sender,
        mut driving,
    } = visitor;
    let mut given_up = 0;
    let ended = within("the connection to be cut", async {
        loop {
            let mut sender = sender.clone();
            tokio::select! {
                answer = sender.send_request(empty(get("/"))) => assert!(answer.is_err(), "answered"),
                ended = driving.join_next() => return ended,
                _ = agent.hear_type("http_request") => given_up += 1,
            }
        }
    })
    .await;
    assert!(matches!(ended, Some(Ok(Err(_)))), "{ended:?}");
    assert!(given_up > 100, "after {given_up} already");
    server.stop().await;
}
