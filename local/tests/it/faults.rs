//! AWS when it does not do as asked: what visitors and agents see then. The functions as in Lambda, with the SDK's real clients,
//! before a DynamoDB and an @connections that answer with errors.

use std::sync::{Arc, Mutex};

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, HeaderName, Method, StatusCode},
    response::{IntoResponse, Response},
};
use lambda_http::request::LambdaRequest;
use lambda_runtime::FunctionResponse;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};
use tunnel_connect::Connect;
use tunnel_default::DefaultRoute;
use tunnel_disconnect::Disconnect;
use tunnel_forward::Forward;
use tunnel_local_aws::dynamodb;
use tunnel_protocol::limits::LAMBDA_TIMEOUT;
use tunnel_service::{
    aws::route_event::VISITORS_STAGE,
    aws::sdk,
    aws::sdk::SdkConfig,
    now,
    settings::{SettingsError, Variables},
    tables::{connections::ConnectionsTable, tunnels::TunnelsTable},
};

use crate::harness::within;

/// An error that is answered so many times before all goes well.
#[derive(Clone, Copy)]
struct Fault(usize, u16, &'static str);

const NONE: Fault = Fault(0, 0, "");
const ALWAYS: usize = usize::MAX;

/// One of the two services.
#[derive(Clone)]
struct Service {
    fault: Arc<Mutex<Fault>>,
    calls: Arc<Mutex<Vec<String>>>,
}

impl Service {
    fn new(fault: Fault, calls: &Arc<Mutex<Vec<String>>>) -> Self {
        Self {
            fault: Arc::new(Mutex::new(fault)),
            calls: calls.clone(),
        }
    }

    /// Notes a call and says how it fails, if it does.
    fn called(&self, call: String) -> Option<Response> {
        self.calls.lock().expect("not poisoned").push(call);
        let mut fault = self.fault.lock().expect("not poisoned");
        let Fault(times, status, name) = *fault;
        fault.0 = times.checked_sub(1)?;
        let error_type = [(HeaderName::from_static("x-amzn-errortype"), name)];
        let body = json!({ "__type": format!("com.amazonaws#{name}"), "message": "as the story wants it" }).to_string();
        Some(
            (
                StatusCode::from_u16(status).expect("a status"),
                error_type,
                body,
            )
                .into_response(),
        )
    }
}

/// One tunnel that is online, one connection, and a reply to whatever is asked.
async fn dynamodb(State(service): State<Service>, headers: HeaderMap, body: Bytes) -> Response {
    let operation = headers["x-amz-target"]
        .to_str()
        .expect("text")
        .split_once('.')
        .expect("a target")
        .1
        .to_owned();
    let request: Value = serde_json::from_slice(&body).expect("JSON");
    let table = request["TableName"].as_str().unwrap_or("several");
    if let Some(failed) = service.called(format!("{operation} {table}")) {
        return failed;
    }
    let answer = match (&*operation, table) {
        ("GetItem", dynamodb::TUNNELS) => {
            json!({ "Item": { "tunnelId": { "S": "my-app" }, "owner": { "S": "open" }, "connectionId": { "S": "agent=" } } })
        }
        ("GetItem", dynamodb::CONNECTIONS) => {
            // Also the record of a visitor's WebSocket, whose other end is the same connection.
            json!({ "Item": { "connectionId": { "S": "agent=" }, "kind": { "S": "agent" }, "tunnelId": { "S": "my-app" }, "owner": { "S": "open" }, "agent": { "S": "agent=" }, "request": { "S": "r1" } } })
        }
        ("Query", _) => {
            let head =
                json!({ "status_code": 200, "headers": {}, "processing_time_ms": 1 }).to_string();
            json!({ "Items": [{ "part": { "N": "0" }, "head": { "S": head }, "body": { "B": "aGk=" }, "more": { "BOOL": false } }], "Count": 1 })
        }
        _ => json!({}),
    };
    (
        [(
            HeaderName::from_static("content-type"),
            "application/x-amz-json-1.0",
        )],
        answer.to_string(),
    )
        .into_response()
}

async fn connections(State(service): State<Service>, method: Method) -> Response {
    service
        .called(format!("{method} @connections"))
        .unwrap_or_else(|| StatusCode::OK.into_response())
}

/// What the functions run before.
struct Aws {
    calls: Arc<Mutex<Vec<String>>>,
    sdk: SdkConfig,
    endpoint: String,
    _serving: JoinSet<()>,
}

impl Aws {
    async fn failing(dynamodb_fault: Fault, connections_fault: Fault) -> Self {
        let calls = Arc::default();
        let tables = Router::new()
            .fallback(dynamodb)
            .with_state(Service::new(dynamodb_fault, &calls));
        let management = Router::new()
            .fallback(connections)
            .with_state(Service::new(connections_fault, &calls));
        let (mut serving, mut addresses) = (JoinSet::new(), Vec::new());
        for router in [tables, management] {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            addresses.push(listener.local_addr().expect("an address"));
            serving.spawn(async move { axum::serve(listener, router).await.expect("served") });
        }
        let sdk = sdk::for_loopback(&format!("http://{}", addresses[0]), "anybody");
        Self {
            calls,
            sdk,
            endpoint: format!("http://{}", addresses[1]),
            _serving: serving,
        }
    }

    fn load<T>(&self, load: impl Fn(Variables<'_>, &SdkConfig) -> Result<T, SettingsError>) -> T {
        let read = |name: &str| {
            Some(match name {
                "WEBSOCKET_API_ENDPOINT" => format!("{}/v1", self.endpoint),
                "VISITOR_SOCKETS_ENDPOINT" => format!("{}/{VISITORS_STAGE}", self.endpoint),
                "PUBLIC_URL" => "https://tunnel.example.com".to_owned(),
                "AUTH" => "open".to_owned(),
                table => return dynamodb::table_of_variable(table).map(str::to_owned),
            })
        };
        load(Variables::new(read), &self.sdk).expect("settings")
    }

    fn count(&self, call: &str) -> usize {
        self.calls
            .lock()
            .expect("not poisoned")
            .iter()
            .filter(|made| *made == call)
            .count()
    }

    /// What a visitor of the HTTP API gets: the status and the tunnel's code.
    async fn visit(&self) -> (u64, Option<String>) {
        let forward = self.load(Forward::load);
        let event = include_str!("../../../events/http-v2.json").replace("\"POST\"", "\"GET\"");
        let event = serde_json::from_str::<LambdaRequest>(&event).expect("an event");
        let answer = within("an answer", forward.handle(event, LAMBDA_TIMEOUT))
            .await
            .expect("an HTTP event");
        let FunctionResponse::BufferedResponse(answer) = answer else {
            panic!("a stream")
        };
        let answer = serde_json::to_value(answer).expect("JSON");
        (
            answer["statusCode"].as_u64().expect("a status"),
            answer["headers"]["x-tunnel-error"]
                .as_str()
                .map(str::to_owned),
        )
    }

    /// Whether an agent's message is handled.
    async fn takes(&self, event: &str) -> bool {
        let default = self.load(DefaultRoute::load);
        within("an answer", default.handle(websocket(event)))
            .await
            .is_ok()
    }
}

fn websocket(event: &str) -> ApiGatewayWebsocketProxyRequest {
    serde_json::from_str(event).expect("an event")
}

const POST: &str = "POST @connections";
const READY: &str = include_str!("../../../events/ready.json");
const RESPONSE: &str = include_str!("../../../events/http-response.json");

#[tokio::test]
async fn an_agent_that_is_busy_for_a_moment_costs_no_request() {
    for fault in [
        Fault(2, 429, "LimitExceededException"),
        Fault(5, 429, "LimitExceededException"),
        Fault(2, 500, "InternalServerError"),
    ] {
        let aws = Aws::failing(NONE, fault).await;
        assert_eq!(aws.visit().await, (200, None), "{} x {}", fault.0, fault.1);
        assert_eq!(aws.count(POST), fault.0 + 1);
    }
}

#[tokio::test]
async fn an_agent_that_accepts_nothing_is_reported_as_busy() {
    let aws = Aws::failing(NONE, Fault(ALWAYS, 429, "LimitExceededException")).await;
    assert_eq!(aws.visit().await, (503, Some("agent_busy".to_owned())));
}

#[tokio::test]
async fn a_connection_that_is_gone_takes_its_tunnel_offline() {
    let aws = Aws::failing(NONE, Fault(ALWAYS, 410, "GoneException")).await;
    assert_eq!(aws.visit().await, (503, Some("tunnel_offline".to_owned())));
    assert_eq!(
        (aws.count(POST), aws.count("UpdateItem TunnelsTable")),
        (1, 1)
    );
}

#[tokio::test]
async fn errors_only_the_operator_can_fix_are_internal_errors_at_once() {
    for (dynamodb, connections) in [
        (NONE, Fault(ALWAYS, 413, "PayloadTooLargeException")),
        (NONE, Fault(ALWAYS, 403, "ForbiddenException")),
        (Fault(ALWAYS, 400, "ResourceNotFoundException"), NONE),
        (Fault(ALWAYS, 400, "AccessDeniedException"), NONE),
    ] {
        let aws = Aws::failing(dynamodb, connections).await;
        assert_eq!(
            aws.visit().await,
            (500, Some("internal_error".to_owned())),
            "{} {}",
            dynamodb.2,
            connections.2
        );
        let failed = if dynamodb.0 > 0 {
            "GetItem TunnelsTable"
        } else {
            POST
        };
        assert_eq!(
            aws.count(failed),
            1,
            "{} {} was tried again",
            dynamodb.2,
            connections.2
        );
    }
}

#[tokio::test]
async fn failures_of_aws_are_retried_and_then_reported() {
    for (status, name) in [
        (400, "ProvisionedThroughputExceededException"),
        (400, "ThrottlingException"),
        (500, "InternalServerError"),
        (503, "ServiceUnavailable"),
    ] {
        let aws = Aws::failing(Fault(2, status, name), NONE).await;
        assert_eq!(aws.visit().await, (200, None), "{name}");
        let aws = Aws::failing(Fault(ALWAYS, status, name), NONE).await;
        assert_eq!(
            aws.visit().await,
            (500, Some("internal_error".to_owned())),
            "{name}"
        );
        assert_eq!(aws.count("GetItem TunnelsTable"), 3, "{name}");
        assert_eq!(
            aws.count(POST),
            0,
            "{name}: something was sent to the agent of a tunnel that was not found"
        );
    }
    let aws = Aws::failing(NONE, Fault(ALWAYS, 500, "InternalServerError")).await;
    assert_eq!(aws.visit().await, (500, Some("internal_error".to_owned())));
    assert_eq!(aws.count(POST), 3);
}

#[tokio::test]
async fn every_kind_of_write_is_tried_again_after_a_conflict_with_a_transaction() {
    let conflict = Fault(2, 400, "TransactionConflictException");
    let (connection, tunnel) = (
        "agent=".parse().expect("an id"),
        "my-app".parse().expect("an id"),
    );
    let aws = Aws::failing(conflict, NONE).await;
    let connections = ConnectionsTable::new(&aws.sdk, dynamodb::CONNECTIONS.to_owned());
    within("an answer", connections.remove(&connection))
        .await
        .expect("deleted");
    assert_eq!(aws.count("DeleteItem ConnectionsTable"), 3);
    let aws = Aws::failing(conflict, NONE).await;
    let connections = ConnectionsTable::new(&aws.sdk, dynamodb::CONNECTIONS.to_owned());
    within("an answer", connections.issue_ticket(now()))
        .await
        .expect("put");
    assert_eq!(aws.count("PutItem ConnectionsTable"), 3);
    let aws = Aws::failing(conflict, NONE).await;
    let tunnels = TunnelsTable::new(&aws.sdk, dynamodb::TUNNELS.to_owned());
    within(
        "an answer",
        tunnels.mark_offline(&tunnel, &connection, now()),
    )
    .await
    .expect("updated");
    assert_eq!(aws.count("UpdateItem TunnelsTable"), 3);
}

#[tokio::test]
async fn an_agents_message_is_stored_despite_throttling_or_is_an_error() {
    let throttle = "ProvisionedThroughputExceededException";
    let aws = Aws::failing(Fault(2, 400, throttle), NONE).await;
    assert!(aws.takes(RESPONSE).await);
    assert_eq!(aws.count("PutItem PendingRequestsTable"), 3);
    let aws = Aws::failing(Fault(ALWAYS, 400, throttle), NONE).await;
    assert!(
        !aws.takes(RESPONSE).await,
        "the agent is not told that its reply is lost"
    );
}

#[tokio::test]
async fn an_agent_becomes_ready_despite_a_fault_or_gets_an_error() {
    for (fault, is_taken) in [
        (Fault(2, 429, "LimitExceededException"), true),
        (Fault(ALWAYS, 429, "LimitExceededException"), false),
        (Fault(ALWAYS, 403, "ForbiddenException"), false),
        // It has left before it could be told.
        (Fault(ALWAYS, 410, "GoneException"), true),
    ] {
        let aws = Aws::failing(NONE, fault).await;
        assert_eq!(
            aws.takes(READY).await,
            is_taken,
            "{} x {}",
            fault.0,
            fault.1
        );
    }
    assert!(
        !Aws::failing(Fault(ALWAYS, 500, "InternalServerError"), NONE)
            .await
            .takes(READY)
            .await
    );
}

#[tokio::test]
async fn a_visitor_whose_message_cannot_be_passed_on_is_closed() {
    let mut said: Value =
        serde_json::from_str(include_str!("../../../events/ping.json")).expect("JSON");
    said["requestContext"]["stage"] = VISITORS_STAGE.into();
    said["requestContext"]["connectionId"] = "visitor=".into();
    for (fault, closed) in [(NONE, 0), (Fault(1, 410, "GoneException"), 1)] {
        let aws = Aws::failing(NONE, fault).await;
        assert!(aws.takes(&said.to_string()).await);
        assert_eq!(
            (aws.count(POST), aws.count("DELETE @connections")),
            (1, closed)
        );
    }
}

#[tokio::test]
async fn no_agent_is_admitted_or_forgotten_while_the_database_does_not_answer() {
    let connect_event = || websocket(include_str!("../../../events/connect.json"));
    let disconnect_event = || websocket(include_str!("../../../events/disconnect.json"));
    for (times, is_good) in [(2, true), (ALWAYS, false)] {
        let throttled = Fault(times, 400, "ThrottlingException");
        let aws = Aws::failing(throttled, NONE).await;
        let connected = within("an answer", aws.load(Connect::load).handle(connect_event())).await;
        assert_eq!(
            connected.is_ok_and(|answer| answer.status_code == 200),
            is_good
        );
        let aws = Aws::failing(throttled, NONE).await;
        let disconnected = within(
            "an answer",
            aws.load(Disconnect::load).handle(disconnect_event()),
        )
        .await;
        assert_eq!(disconnected.is_ok(), is_good);
    }
}
