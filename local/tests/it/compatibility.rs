//! Agents and services of earlier versions.
//!
//! recorded/exchange.jsonl is what an agent and a service that announced all features up to `access` said to each other: one JSON
//! text a line, in the order in which they were sent. Each test plays one side of it again. It says word for word what was said
//! then, but for ids that the other side chose, and never before the protocol allowed it.

use std::collections::VecDeque;

use bytes::Bytes;
use forwarder::tunnel::TunnelError;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use serde_json::{Value, json};
use tunnel_protocol::{
    body::{BodyReceiver, Part, budget::BodyBudget},
    limits::INITIAL_WINDOW_PARTS,
    message::{BodyPart, HttpRequest, HttpResponse},
};

use crate::harness::{
    Agent, Answer, Origin, ScriptedAgent, ScriptedService, reply, settings_for, stack, visit,
};

/// A message of the recording, and whether the agent sent it.
struct Recorded {
    is_from_agent: bool,
    message: Value,
}

fn recording() -> Vec<Recorded> {
    let lines = include_str!("recorded/exchange.jsonl").lines();
    lines
        .map(|line| {
            let mut line: Value = serde_json::from_str(line).expect("JSON");
            Recorded {
                is_from_agent: line["from"] == "agent",
                message: line["message"].take(),
            }
        })
        .collect()
}

/// The first message of this type.
fn recorded(message_type: &str) -> Value {
    let found = recording()
        .into_iter()
        .find(|recorded| recorded.message["type"] == message_type);
    found.expect("a message of this type").message
}

/// What the two sides said about one request.
struct Exchange {
    by_service: Vec<Value>,
    by_agent: Vec<Value>,
}

impl Exchange {
    fn all() -> Vec<Self> {
        let (mut exchanges, recording) = (Vec::new(), recording());
        for request in &recording {
            if request.message["type"] != "http_request" {
                continue;
            }
            let said_by = |is_agent: bool| {
                let about = recording.iter().filter(|recorded| {
                    recorded.is_from_agent == is_agent
                        && recorded.message["request_id"] == request.message["request_id"]
                });
                about.map(|recorded| recorded.message.clone()).collect()
            };
            exchanges.push(Self {
                by_service: said_by(false),
                by_agent: said_by(true),
            });
        }
        assert_eq!(exchanges.len(), 8);
        exchanges
    }

    fn request(&self) -> HttpRequest {
        serde_json::from_value(self.by_service[0].clone()).expect("a request")
    }

    /// The head of the response, if the local service gave one.
    fn response(&self) -> Option<HttpResponse> {
        let mut messages = self.by_agent.iter();
        let head = messages.find(|message| message["type"] == "http_response")?;
        Some(serde_json::from_value(head.clone()).expect("a response"))
    }

    fn is_cancelled(&self) -> bool {
        let mut messages = self.by_service.iter();
        messages.any(|message| message["type"] == "cancel")
    }

    /// The visitor's request, as it was before the tunnel added to it.
    fn visit(&self, url: &str) -> Request<Bytes> {
        let head = self.request();
        let mut request = Request::builder()
            .method(&*head.method)
            .uri(format!("{url}{}", head.uri));
        for (name, value) in &head.headers {
            if !name.as_str().starts_with("x-forwarded-") && name != "host" {
                request = request.header(name, value);
            }
        }
        request.body(body(&self.by_service)).expect("a request")
    }
}

/// The body that the parts among these messages carry.
fn body(messages: &[Value]) -> Bytes {
    let mut receiver = BodyReceiver::new(&BodyBudget::default());
    let mut bytes = Vec::new();
    for message in messages {
        let message = message.clone();
        let part = match message["type"].as_str() {
            Some("http_request") => Part {
                number: 0,
                chunk: serde_json::from_value::<HttpRequest>(message)
                    .expect("a request")
                    .take_chunk(),
            },
            Some("http_response") => Part {
                number: 0,
                chunk: serde_json::from_value::<HttpResponse>(message)
                    .expect("a response")
                    .take_chunk(),
            },
            Some("body_part") => serde_json::from_value::<BodyPart>(message)
                .expect("a part")
                .into(),
            _ => continue,
        };
        receiver.insert(part.number, part.chunk).expect("room");
        while let Some(chunk) = receiver.next_chunk().expect("bytes") {
            bytes.extend(chunk.bytes);
        }
    }
    bytes.into()
}

/// Says what one side said about a request, each message when the protocol allows it, and returns all that the other side says about
/// it. `heard` is what it has said already.
///
/// How many parts a body comes in depends on how fast it is read. So where windows were said they are said now by the same rule:
/// 16 parts more each time that 16 have been used.
async fn play(
    connection: &mut ScriptedAgent,
    lines: Vec<Value>,
    mut heard: Vec<Value>,
) -> Vec<Value> {
    let request_id = lines[0]["request_id"].clone();
    let (mut windows, lines): (Vec<Value>, Vec<Value>) = lines
        .into_iter()
        .partition(|message| message["type"] == "window");
    let mut lines = VecDeque::from(lines);
    let (mut allowed, mut granted) = (INITIAL_WINDOW_PARTS, INITIAL_WINDOW_PARTS);
    loop {
        let is_over = heard.last().is_some_and(|last| last["more"] != true);
        while let Some(next) = lines.front() {
            let is_allowed = match next["type"].as_str() {
                // The local service reads first, and answers then.
                Some("http_response") => is_over,
                Some("body_part") => next["part"].as_u64().expect("a number") < allowed.into(),
                _ => true,
            };
            if !is_allowed {
                break;
            }
            connection.say(next).await;
            lines.pop_front();
        }
        if lines.is_empty() && is_over {
            return heard;
        }
        let message = connection.hear().await;
        if message["request_id"] != request_id {
            // An allowance that is late for the request before.
            assert_eq!(message["type"], "window");
        } else if message["type"] == "window" {
            let parts = message["parts"].as_u64().expect("a number");
            allowed = u32::try_from(parts).expect("a number of parts");
        } else {
            heard.push(message);
            let used = u32::try_from(heard.len()).expect("few");
            if let Some(window) = windows.first_mut()
                && granted - used <= INITIAL_WINDOW_PARTS / 2
            {
                granted = used + INITIAL_WINDOW_PARTS;
                window["parts"] = granted.into();
                connection.say(window).await;
            }
        }
    }
}

/// What an agent of then says about a request of now.
fn lines_for(request: &Value, exchange: &Exchange) -> Vec<Value> {
    let mut lines = exchange.by_agent.clone();
    for line in &mut lines {
        line["request_id"] = request["request_id"].clone();
        if let Some(reply_to) = request.get("reply_to") {
            line["reply_to"] = reply_to.clone();
        }
    }
    lines
}

#[tokio::test]
async fn an_agent_of_an_earlier_version_serves_as_it_did() {
    let stack = stack().await;
    let mut agent = ScriptedAgent::connect(&stack, "?tunnel_id=my-app").await;
    let established = agent.ready(&recorded("ready")).await;
    assert_eq!(established["type"], "connection_established");
    let url = established["public_url"]
        .as_str()
        .expect("an address")
        .to_owned();

    for exchange in Exchange::all() {
        let uri = exchange.request().uri;
        if exchange.is_cancelled() {
            let request = tokio::select! {
                got = visit(exchange.visit(&url)) => panic!("a stream ended: {got:?}"),
                request = async {
                    let request = agent.hear_type("http_request").await;
                    for line in lines_for(&request, &exchange) {
                        agent.say(&line).await;
                    }
                    request
                } => request,
            };
            let cancelled = agent.hear().await;
            let expected = json!({ "type": "cancel", "request_id": request["request_id"] });
            assert_eq!(cancelled, expected);
            continue;
        }
        let (got, heard) = tokio::join!(visit(exchange.visit(&url)), async {
            let request = agent.hear_type("http_request").await;
            let lines = lines_for(&request, &exchange);
            play(&mut agent, lines, vec![request]).await
        });
        assert_eq!(
            (&heard[0]["uri"], &heard[0]["method"]),
            (&json!(uri), &json!(exchange.request().method))
        );
        assert!(
            body(&heard) == body(&exchange.by_service),
            "{uri}: another body"
        );
        let Some(response) = exchange.response() else {
            assert_eq!(
                (got.status, got.error()),
                (StatusCode::BAD_GATEWAY, Some("local_unreachable"))
            );
            continue;
        };
        assert_eq!(got.status.as_u16(), response.status_code, "{uri}");
        assert_eq!(kept(&got.headers), kept(&response.headers), "{uri}");
        assert!(got.body == body(&exchange.by_agent), "{uri}: another body");
    }

    // Another connection of its owner opens the tunnel.
    let _next = ScriptedAgent::online(&stack, "my-app", &[]).await;
    assert_eq!(agent.hear().await["type"], "replaced");
}

/// The fields of a response that the local service chose.
fn kept(headers: &HeaderMap) -> Vec<Vec<&HeaderValue>> {
    ["content-type", "location", "set-cookie"]
        .map(|name| headers.get_all(name).iter().collect())
        .into()
}

/// What the local service of the recording answered, before the agent put the tunnel's prefix before its paths.
fn recorded_answer(exchange: &Exchange) -> Option<Answer> {
    let response = exchange.response()?;
    let bytes = body(&exchange.by_agent);
    let mut answer = if exchange.is_cancelled() {
        let start = stream::iter([Ok(Frame::data(bytes))]);
        Response::new(BodyExt::boxed(StreamBody::new(
            start.chain(stream::pending()),
        )))
    } else {
        reply(StatusCode::OK, bytes)
    };
    *answer.status_mut() = StatusCode::from_u16(response.status_code).expect("a status");
    for (name, value) in &response.headers {
        if name != "content-length" {
            let text = value.to_str().expect("text").replace("/my-app/", "/");
            let text = text.replace("/my-app", "/");
            answer
                .headers_mut()
                .append(name, text.parse().expect("a value"));
        }
    }
    Some(answer)
}

async fn recorded_origin() -> Origin {
    let exchanges = Exchange::all();
    Origin::answering(move |seen| {
        let mut exchanges = exchanges.iter();
        recorded_answer(exchanges.find(|exchange| seen.uri == *exchange.request().uri)?)
    })
    .await
}

#[tokio::test]
async fn an_agent_serves_a_service_of_an_earlier_version() {
    let (service, origin) = (ScriptedService::listening().await, recorded_origin().await);
    let mut agent = Agent::start(settings_for(&service.endpoint, origin.address));
    let mut connection = service.accept().await;
    assert_eq!(connection.hear().await["type"], "ready");
    connection.say(&recorded("connection_established")).await;
    assert_eq!(
        agent.until_online().await,
        "https://tunnel.example.com/my-app"
    );

    for exchange in Exchange::all() {
        let request = exchange.request();
        let uri = &request.uri;
        if exchange.is_cancelled() {
            connection.say(&exchange.by_service[0]).await;
            assert_eq!(connection.hear().await["type"], "http_response");
            connection.say(&exchange.by_service[1]).await;
            continue;
        }
        let heard = play(&mut connection, exchange.by_service.clone(), Vec::new()).await;
        let Some(response) = exchange.response() else {
            assert_eq!(
                (&heard[0]["type"], &heard[0]["code"]),
                (&json!("error"), &json!("local_service_unavailable"))
            );
            continue;
        };
        assert_eq!(origin.last().body, body(&exchange.by_service));
        let mut heard_heads = heard
            .iter()
            .filter(|message| message["type"] == "http_response");
        let head: HttpResponse =
            serde_json::from_value(heard_heads.next().expect("a head").clone())
                .expect("a response");
        assert_eq!(head.status_code, response.status_code, "{uri}");
        assert_eq!(kept(&head.headers), kept(&response.headers), "{uri}");
        assert!(
            body(&heard) == body(&exchange.by_agent),
            "{uri}: another body"
        );
    }

    connection.say(&recorded("replaced")).await;
    assert!(matches!(agent.ended().await, Err(TunnelError::Replaced(_))));
}
