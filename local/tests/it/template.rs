//! template.yaml and the code agree: tables, variables, and the calls each function is allowed.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
};

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use axum::{Router, body::Bytes, extract::State, http::HeaderMap, response::IntoResponse};
use lambda_http::request::LambdaRequest;
use lambda_runtime::FunctionResponse;
use serde_yaml_ng::Value;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tunnel_connect::Connect;
use tunnel_default::DefaultRoute;
use tunnel_disconnect::Disconnect;
use tunnel_forward::Forward;
use tunnel_local_aws::{caller::AccessKey, dynamodb};
use tunnel_protocol::limits::LAMBDA_TIMEOUT;
use tunnel_service::{
    auth::token::TokenHash,
    aws::route_event::VISITORS_STAGE,
    aws::sdk,
    aws::sdk::SdkConfig,
    now,
    settings::{SettingsError, Variables},
    tables::{
        connections::ConnectionsTable,
        tokens::{Token, TokensTable},
    },
};

use crate::harness::within;

const FUNCTIONS: [&str; 4] = [
    "ConnectFunction",
    "DisconnectFunction",
    "DefaultFunction",
    "ForwardFunction",
];

fn template() -> Value {
    serde_yaml_ng::from_str(include_str!("../../../template.yaml")).expect("YAML")
}

fn properties(template: &Value, resource: &str) -> Value {
    template["Resources"][resource]["Properties"].clone()
}

#[test]
fn the_template_describes_the_tables_that_the_functions_use() {
    let tables = dynamodb::tables().expect("a template");
    let keys: Vec<(&str, Vec<&str>)> = tables
        .iter()
        .map(|table| {
            (
                table.logical_id.as_str(),
                table.keys.iter().map(|(name, _)| name.as_str()).collect(),
            )
        })
        .collect();
    assert_eq!(
        keys,
        [
            (dynamodb::TUNNELS, vec!["tunnelId"]),
            (dynamodb::CONNECTIONS, vec!["connectionId"]),
            (dynamodb::PENDING_REQUESTS, vec!["requestKey", "part"]),
            (dynamodb::TOKENS, vec!["tokenHash"]),
        ]
    );
    assert!(
        tables
            .iter()
            .all(|table| table.ttl.as_deref() == Some("ttl")),
        "{tables:?}"
    );
}

/// The variables that a function reads, found by loading it.
fn asked_for<T>(
    load: impl Fn(Variables<'_>, &SdkConfig) -> Result<T, SettingsError>,
) -> BTreeSet<String> {
    let asked = RefCell::new(BTreeSet::new());
    let read = |name: &str| {
        asked.borrow_mut().insert(name.to_owned());
        None
    };
    let loaded = load(
        Variables::new(read),
        &sdk::for_loopback("http://127.0.0.1:9", "nobody"),
    );
    assert!(loaded.is_err(), "a function does without any settings");
    asked.into_inner()
}

#[test]
fn each_function_gets_exactly_the_variables_it_reads() {
    let template = template();
    let asked = [
        asked_for(Connect::load),
        asked_for(Disconnect::load),
        asked_for(DefaultRoute::load),
        asked_for(Forward::load),
    ];
    for (function, mut asked) in FUNCTIONS.into_iter().zip(asked) {
        // Set by Lambda, read by the SDK, and read when logging starts.
        asked.remove("AWS_LAMBDA_FUNCTION_NAME");
        // For emulators, whose @connections may be at another address.
        asked.remove("AWS_ENDPOINT_URL_APIGATEWAYMANAGEMENTAPI");
        asked.insert("AWS_ENDPOINT_URL_DYNAMODB".to_owned());
        asked.insert("LOG_LEVEL".to_owned());
        let mut given: BTreeSet<String> = BTreeSet::new();
        for variables in [
            &template["Globals"]["Function"]["Environment"]["Variables"],
            &properties(&template, function)["Environment"]["Variables"],
        ] {
            let names = variables
                .as_mapping()
                .into_iter()
                .flatten()
                .filter_map(|(name, _)| name.as_str());
            given.extend(names.map(str::to_owned));
        }
        assert_eq!(given, asked, "{function}");
    }
}

/// The calls that a function's policies allow: `dynamodb:GetItem TunnelsTable`, `execute-api POST`.
fn allowed(template: &Value, function: &str) -> BTreeSet<String> {
    let list = |value: &Value| match value {
        Value::Sequence(values) => values.clone(),
        other => vec![other.clone()],
    };
    let text = |value: &Value| match value {
        Value::Tagged(tagged) => tagged.value.as_str().unwrap_or_default().to_owned(),
        other => other.as_str().unwrap_or_default().to_owned(),
    };
    let mut allowed = BTreeSet::new();
    for policy in list(&properties(template, function)["Policies"]) {
        for statement in list(&policy["Statement"]) {
            for (action, resource) in list(&statement["Action"]).iter().flat_map(|action| {
                list(&statement["Resource"])
                    .into_iter()
                    .map(move |resource| (action.clone(), resource))
            }) {
                let (action, resource) = (text(&action), text(&resource));
                if action == "execute-api:ManageConnections" {
                    let route = resource.rsplit(':').next().unwrap_or_default();
                    let [_, stage, method, "@connections", "*"] =
                        route.split('/').collect::<Vec<_>>()[..]
                    else {
                        panic!("{resource}: not an API, a stage, a method and all connections")
                    };
                    allowed.insert(format!("@connections {stage} {method}"));
                } else {
                    let resource = resource.replace("${", "").replace('}', "");
                    let (table, index) = resource.split_once(".Arn").expect("a table");
                    let keys =
                        &statement["Condition"]["ForAllValues:StringLike"]["dynamodb:LeadingKeys"];
                    let call = format!("{action} {table}{index}");
                    match keys.as_sequence() {
                        None => drop(allowed.insert(call)),
                        Some(keys) => {
                            allowed
                                .extend(keys.iter().map(|keys| format!("{call} {}", text(keys))));
                        }
                    }
                }
            }
        }
    }
    assert!(!allowed.is_empty(), "{function} has no policies");
    allowed
}

/// Calls that were made, by function.
type Calls = Arc<Mutex<BTreeSet<String>>>;

/// Held between awaits only.
fn made(calls: &Calls) -> MutexGuard<'_, BTreeSet<String>> {
    calls.lock().expect("not poisoned")
}

#[derive(Clone)]
struct Spy {
    calls: Calls,
    dynamodb: String,
    client: hyper_util::client::legacy::Client<
        hyper_util::client::legacy::connect::HttpConnector,
        http_body_util::Full<Bytes>,
    >,
}

/// The permissions that a DynamoDB call needs, as the policies have them: `dynamodb:GetItem TunnelsTable`.
fn permissions_for(operation: &str, request: &serde_json::Value) -> Vec<String> {
    let on = |action: &str, request: &serde_json::Value| {
        let table = request["TableName"].as_str().expect("a table");
        let id = [&request["Key"], &request["Item"]]
            .iter()
            .find_map(|item| item["connectionId"]["S"].as_str());
        match request["IndexName"].as_str() {
            Some(index) => format!("dynamodb:{action} {table}/index/{index}"),
            None => match id.and_then(|id| id.split_once('/')) {
                Some((kind, _)) => format!("dynamodb:{action} {table} {kind}/*"),
                None => format!("dynamodb:{action} {table}"),
            },
        }
    };
    match request["TransactItems"].as_array() {
        None => vec![on(operation, request)],
        // A transaction needs the permissions of its steps ("IAM policies for transactions" in the developer guide).
        Some(steps) => steps
            .iter()
            .flat_map(|step| step.as_object().expect("a step"))
            .map(|(kind, step)| {
                let action = if kind == "ConditionCheck" {
                    "ConditionCheckItem".to_owned()
                } else {
                    format!("{kind}Item")
                };
                on(&action, step)
            })
            .collect(),
    }
}

/// Notes a DynamoDB call, then passes it on.
async fn note_call(State(spy): State<Spy>, headers: HeaderMap, body: Bytes) -> impl IntoResponse {
    let (_, operation) = headers["x-amz-target"]
        .to_str()
        .expect("text")
        .split_once('.')
        .expect("a target");
    let request: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
    made(&spy.calls).extend(permissions_for(operation, &request));
    let mut on = http::Request::post(&spy.dynamodb)
        .body(http_body_util::Full::new(body))
        .expect("a request");
    for (name, value) in headers.iter().filter(|(name, _)| *name != "host") {
        on.headers_mut().append(name, value.clone());
    }
    spy.client
        .request(on)
        .await
        .expect("an answer")
        .map(axum::body::Body::new)
}

/// What connections were sent, and that they were.
#[derive(Clone, Default)]
struct Posts {
    calls: Calls,
    texts: Arc<Mutex<Vec<String>>>,
}

/// Stands for connections: `gone` is, all others take what they are sent.
async fn note_post(
    State(posts): State<Posts>,
    method: http::Method,
    uri: http::Uri,
    body: String,
) -> http::StatusCode {
    // Any other GET is an attempt to open a reply connection, which needs no permission.
    if let ["", stage, "@connections", ..] = uri.path().split('/').collect::<Vec<_>>()[..] {
        made(&posts.calls).insert(format!("@connections {stage} {method}"));
        posts.texts.lock().expect("not poisoned").push(body);
    }
    if uri.path().ends_with("gone") {
        http::StatusCode::GONE
    } else {
        http::StatusCode::OK
    }
}

/// A function's surroundings, in which every call is noted.
struct Surroundings {
    calls: Calls,
    sdk: SdkConfig,
    connections: String,
    /// What was posted to connections.
    texts: Arc<Mutex<Vec<String>>>,
    _serving: JoinSet<()>,
}

async fn surroundings(dynamodb: &str) -> Surroundings {
    let calls = Calls::default();
    let client = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
        .build_http();
    let spy = Router::new().fallback(note_call).with_state(Spy {
        calls: calls.clone(),
        dynamodb: dynamodb.to_owned(),
        client,
    });
    let posts = Posts {
        calls: calls.clone(),
        ..Posts::default()
    };
    let texts = posts.texts.clone();
    let posts = Router::new().fallback(note_post).with_state(posts);
    let mut serving = JoinSet::new();
    let mut addresses = Vec::new();
    for router in [spy, posts] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        addresses.push(listener.local_addr().expect("an address"));
        serving.spawn(async move { axum::serve(listener, router).await.expect("served") });
    }
    Surroundings {
        calls,
        sdk: sdk::for_loopback(&format!("http://{}", addresses[0]), "key"),
        connections: format!("http://{}", addresses[1]),
        texts,
        _serving: serving,
    }
}

impl Surroundings {
    fn load<T>(&self, load: impl Fn(Variables<'_>, &SdkConfig) -> Result<T, SettingsError>) -> T {
        let read = |name: &str| {
            Some(match name {
                "WEBSOCKET_API_ENDPOINT" => format!("{}/v1", self.connections),
                "VISITOR_SOCKETS_ENDPOINT" => format!("{}/visitors", self.connections),
                "EDGE_SECRETS" => EDGE_SECRET.to_owned(),
                "PUBLIC_URL" => "https://tunnel.example.com".to_owned(),
                table => return dynamodb::table_of_variable(table).map(str::to_owned),
            })
        };
        load(Variables::new(read), &self.sdk).expect("settings")
    }
}

fn websocket(event: &str, replace: &[(&str, &str)]) -> ApiGatewayWebsocketProxyRequest {
    let event = replace.iter().fold(event.to_owned(), |event, (from, to)| {
        event.replace(from, to)
    });
    serde_json::from_str(&event).expect("an event")
}

/// DynamoDB with the service's tables and one token, "sample".
struct Database {
    address: String,
    sdk: SdkConfig,
    tokens: TokensTable,
    _stop: DropGuard,
}

impl Database {
    async fn start() -> Self {
        let stop = CancellationToken::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        dynamodb::serve(
            dynamodb::open(None).expect("a database"),
            listener,
            AccessKey::only("key"),
            &TaskTracker::new(),
            &stop,
        );
        let sdk = sdk::for_loopback(&address, "key");
        dynamodb::create_tables(&aws_sdk_dynamodb::Client::new(&sdk))
            .await
            .expect("tables");
        let tokens = TokensTable::new(&sdk, dynamodb::TOKENS.to_owned());
        let token = Token {
            hash: TokenHash::of("sample"),
            name: "sample".to_owned(),
            created_at: 0,
            expires_at: None,
            revoked: false,
        };
        tokens.put(&token).await.expect("a token");
        Self {
            address,
            sdk,
            tokens,
            _stop: stop.drop_guard(),
        }
    }
}

/// The connection id in the sample events.
const ID: &str = "L0SM9cOFvHcCIhw=";
/// What stands for `ready` in the sample event when the agent names its features, as JSON within JSON.
const READY_TO_BE_REPLACED: &str = r#"ready\",\"features\":[\"notices\"],\"agent\":\"x"#;
const READY_TO_REPLY: &str = r#"ready\",\"features\":[\"reply_to\"],\"agent\":\"x"#;

const READY_FOR_SOCKETS: &str = r#"ready\",\"features\":[\"websockets\"],\"agent\":\"x"#;

const READY_WITH_A_PASSWORD: &str = r#"ready\",\"access\":{\"salt\":\"AAAAAAAAAAAAAAAAAAAAAA==\",\"basic\":[\"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"]},\"agent\":\"x"#;

/// By which `forward` knows the edge.
const EDGE_SECRET: &str = "0123456789abcdef0123456789abcdef";

/// A function in surroundings of its own.
struct Observed<F> {
    function: F,
    surroundings: Surroundings,
}

impl<F> Observed<F> {
    async fn load(
        database: &Database,
        load: impl Fn(Variables<'_>, &SdkConfig) -> Result<F, SettingsError>,
    ) -> Self {
        let surroundings = surroundings(&database.address).await;
        Self {
            function: surroundings.load(load),
            surroundings,
        }
    }
}

/// All functions. They are sent the sample events, with some texts replaced.
struct Functions {
    connect: Observed<Connect>,
    disconnect: Observed<Disconnect>,
    default: Observed<DefaultRoute>,
    forward: Observed<Forward>,
}

impl Functions {
    async fn load(database: &Database) -> Self {
        Self {
            connect: Observed::load(database, Connect::load).await,
            disconnect: Observed::load(database, Disconnect::load).await,
            default: Observed::load(database, DefaultRoute::load).await,
            forward: Observed::load(database, Forward::load).await,
        }
    }

    /// The calls of each function, in the order of [`FUNCTIONS`].
    fn calls(&self) -> [&Calls; 4] {
        [
            &self.connect.surroundings.calls,
            &self.disconnect.surroundings.calls,
            &self.default.surroundings.calls,
            &self.forward.surroundings.calls,
        ]
    }

    /// The status with which a handshake is answered.
    async fn connect(&self, replace: &[(&str, &str)]) -> u16 {
        let event = websocket(include_str!("../../../events/connect.json"), replace);
        let answer = self.connect.function.handle(event).await;
        answer.expect("handled").status_code
    }

    /// The status that the `ready` of an agent gets, or what stands in its place.
    async fn ready(&self, id: &str, ready: &str) -> u16 {
        let event = include_str!("../../../events/ready.json");
        self.message(event, &[(ID, id), ("ready", ready)]).await
    }

    async fn message(&self, event: &str, replace: &[(&str, &str)]) -> u16 {
        let answer = self
            .default
            .function
            .handle(websocket(event, replace))
            .await;
        answer.expect("handled").status_code
    }

    async fn disconnect(&self, id: &str) {
        let event = include_str!("../../../events/disconnect.json");
        let answer = self
            .disconnect
            .function
            .handle(websocket(event, &[(ID, id)]));
        answer.await.expect("handled");
    }
}

/// Asserts that a visitor's request is answered, if only with an error.
async fn assert_answered(forward: &Forward, why: &str) {
    let event = serde_json::from_str::<LambdaRequest>(include_str!("../../../events/http-v2.json"))
        .expect("an event");
    assert!(forward.handle(event, LAMBDA_TIMEOUT).await.is_ok(), "{why}");
}

/// Agents' connections, one that releases a tunnel id, and the reply connection.
async fn open_connections(functions: &Functions, database: &Database) {
    for id in [ID, "second=", "third=", "gone"] {
        assert_eq!(functions.connect(&[(ID, id)]).await, 200);
    }
    let releases = [(ID, "releases="), ("\"tunnel_id\"", "\"release\"")];
    assert_eq!(functions.connect(&releases).await, 200);
    let ticket = ConnectionsTable::new(&database.sdk, dynamodb::CONNECTIONS.to_owned())
        .issue_ticket(now())
        .await
        .expect("a ticket");
    let bearer = format!("Bearer {ticket}");
    for (connection, status) in [("reply=", 200), ("reply=", 200), ("another=", 401)] {
        let handshake = [
            (ID, connection),
            ("tunnel_id", "reply"),
            ("Bearer sample", &bearer),
        ];
        assert_eq!(
            functions.connect(&handshake).await,
            status,
            "a ticket is good for one connection"
        );
    }
}

/// Every message that agents send. In the end the tunnel belongs to a connection that is gone.
async fn send_messages(functions: &Functions) {
    // An old agent, then one that knows of being replaced, then one that replaces it, then one that is gone.
    for (id, ready) in [
        (ID, "ready"),
        ("second=", READY_TO_BE_REPLACED),
        ("third=", "ready"),
        ("gone", "ready"),
        ("reply=", "ready"),
    ] {
        functions.ready(id, ready).await;
    }
    let response = include_str!("../../../events/http-response.json");
    functions.message(response, &[]).await;
    let ping = include_str!("../../../events/ping.json");
    functions.message(ping, &[(ID, "third=")]).await;
    assert_eq!(functions.ready("releases=", "release").await, 200);
    // The tunnel is nobody's now; the next steps need it again.
    assert_eq!(functions.connect(&[(ID, "gone")]).await, 200);
    functions.ready("gone", "ready").await;
}

/// Nobody answers a request, so `forward` looks into the mailbox, doubts, and finds the connection gone once it is.
async fn lose_an_agent(functions: &Functions) {
    functions.ready("third=", READY_TO_REPLY).await;
    let forward = &functions.forward;
    let answered = assert_answered(&forward.function, "the agent is lost, which is an answer");
    tokio::join!(answered, async {
        within("a look at the connection", async {
            let expected = [
                "dynamodb:GetItem ConnectionsTable",
                "dynamodb:PutItem ConnectionsTable ticket/*",
            ];
            let is_made = |call: &&str| made(&forward.surroundings.calls).contains(*call);
            while !expected.iter().all(is_made) {
                tokio::task::yield_now().await;
            }
        })
        .await;
        functions.disconnect("third=").await;
    });
}

/// An agent whose token is revoked is closed; a function that starts afresh has not seen the token when it was good.
async fn revoke_a_token(functions: &Functions, database: &Database) {
    assert_eq!(functions.connect(&[(ID, "third=")]).await, 200);
    functions.ready("third=", READY_TO_REPLY).await;
    database.tokens.revoke("sample").await.expect("revoked");
    let afresh = functions.forward.surroundings.load(Forward::load);
    assert_answered(&afresh, "the tunnel is offline, which is an answer").await;
}

/// An event of the visitors' WebSocket API.
fn of_visitor(event: &str, visitor: &str) -> serde_json::Value {
    let mut event: serde_json::Value = serde_json::from_str(event).expect("JSON");
    event["requestContext"]["stage"] = "visitors".into();
    event["requestContext"]["connectionId"] = visitor.into();
    event
}

fn typed(event: serde_json::Value) -> ApiGatewayWebsocketProxyRequest {
    serde_json::from_value(event).expect("an event")
}

/// Opens a visitor's WebSocket, whose other end is the connection `third=`, and returns the request that opened it.
async fn open_visitor_socket(functions: &Functions, visitor: &str) -> String {
    let mut handshake = of_visitor(include_str!("../../../events/connect.json"), visitor);
    for (name, value) in [
        ("X-Tunnel-Edge", EDGE_SECRET),
        ("X-Tunnel-Host", "tunnel.example.com"),
        ("X-Tunnel-Address", "203.0.113.9"),
        ("X-Tunnel-Target", "/sample/chat"),
    ] {
        handshake["multiValueHeaders"][name] = serde_json::json!([value]);
    }
    let event: LambdaRequest = serde_json::from_value(handshake).expect("an event");
    let forward = &functions.forward;
    let accepting = forward.function.handle(event, LAMBDA_TIMEOUT);
    let (accepted, request) = tokio::join!(accepting, async {
        let request = within("the handshake at the agent", async {
            loop {
                let texts = forward
                    .surroundings
                    .texts
                    .lock()
                    .expect("not poisoned")
                    .clone();
                let asked = texts.iter().rev().find(|text| text.contains(visitor));
                match asked.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok()) {
                    Some(request) => {
                        return request["request_id"].as_str().expect("an id").to_owned();
                    }
                    None => tokio::task::yield_now().await,
                }
            }
        })
        .await;
        let response = include_str!("../../../events/http-response.json");
        let mut response: serde_json::Value = serde_json::from_str(response).expect("JSON");
        response["requestContext"]["connectionId"] = "third=".into();
        response["body"] = serde_json::json!({ "type": "http_response", "request_id": request, "status_code": 101, "headers": {} }).to_string().into();
        let answer = functions.default.function.handle(typed(response)).await;
        assert_eq!(answer.expect("handled").status_code, 200);
        request
    });
    let Ok(FunctionResponse::BufferedResponse(answer)) = accepted else {
        panic!("not a whole answer")
    };
    let answer = serde_json::to_value(&answer).expect("JSON");
    assert_eq!(answer["statusCode"], 200, "{answer}");
    request
}

/// Opens, uses and closes visitors' WebSockets.
async fn use_visitor_sockets(functions: &Functions) {
    assert_eq!(functions.connect(&[(ID, "third=")]).await, 200);
    assert_eq!(functions.ready("third=", READY_FOR_SOCKETS).await, 200);
    for visitor in ["visitor1=", "visitor2="] {
        let request = open_visitor_socket(functions, visitor).await;
        let said = of_visitor(include_str!("../../../events/ping.json"), visitor);
        let answer = functions.default.function.handle(typed(said)).await;
        assert_eq!(answer.expect("handled").status_code, 200);
        for message in [
            serde_json::json!({ "type": "websocket_batch", "request_id": request, "websocket": visitor, "batch": 0, "texts": ["hello"] }),
            serde_json::json!({ "type": "websocket_close", "request_id": request, "websocket": visitor }),
        ] {
            let event = include_str!("../../../events/ping.json");
            let mut event: serde_json::Value = serde_json::from_str(event).expect("JSON");
            event["requestContext"]["connectionId"] = "third=".into();
            event["body"] = message.to_string().into();
            let answer = functions.default.function.handle(typed(event)).await;
            assert_eq!(answer.expect("handled").status_code, 200);
        }
    }
    let left = of_visitor(include_str!("../../../events/disconnect.json"), "visitor1=");
    let answer = functions.disconnect.function.handle(typed(left)).await;
    assert_eq!(answer.expect("handled").status_code, 200);
    // The second is open when its agent leaves.
    functions.disconnect("third=").await;
}

/// A tunnel that wants a password, and visitors who have a cookie that is none, or a password that is wrong.
async fn ask_for_a_password(functions: &Functions) {
    assert_eq!(functions.connect(&[(ID, "third=")]).await, 200);
    assert_eq!(functions.ready("third=", READY_WITH_A_PASSWORD).await, 200);
    let forward = functions.forward.surroundings.load(Forward::load);
    for (field, value) in [
        ("cookies", serde_json::json!(["ttf_login=AAAA"])),
        ("authorization", serde_json::json!("Basic d3Jvbmc=")),
    ] {
        let event = include_str!("../../../events/http-v2.json");
        let mut event: serde_json::Value = serde_json::from_str(event).expect("JSON");
        if field == "cookies" {
            event[field] = value;
        } else {
            event["headers"][field] = value;
        }
        let event: LambdaRequest = serde_json::from_value(event).expect("an event");
        let answer = forward.handle(event, LAMBDA_TIMEOUT).await;
        let Ok(FunctionResponse::BufferedResponse(answer)) = answer else {
            panic!("not a whole answer")
        };
        let answer = serde_json::to_value(&answer).expect("JSON");
        assert_eq!(answer["statusCode"], 401, "{answer}");
    }
}

#[tokio::test]
async fn each_functions_policy_allows_exactly_the_calls_it_makes() {
    let database = Database::start().await;
    let functions = Functions::load(&database).await;
    open_connections(&functions, &database).await;
    send_messages(&functions).await;
    let why = "the tunnel's agent is gone, which is an answer";
    assert_answered(&functions.forward.function, why).await;
    lose_an_agent(&functions).await;
    use_visitor_sockets(&functions).await;
    ask_for_a_password(&functions).await;
    revoke_a_token(&functions, &database).await;

    let template = template();
    for (function, calls) in FUNCTIONS.into_iter().zip(functions.calls()) {
        let allowed = allowed(&template, function);
        // What is allowed for all items is allowed for those of one kind.
        let of_all_items = |call: &String| {
            let (call, kind) = call.rsplit_once(' ').unwrap_or_default();
            kind.ends_with("/*") && allowed.contains(call)
        };
        let mut made = made(calls).clone();
        made.retain(|call| !of_all_items(call));
        assert_eq!(made, allowed, "{function}: made, allowed");
    }
}

/// A value as it stands in the template: `!Ref X`, `!GetAtt X.Arn`, `!Sub text`, and lists and maps in brackets.
fn written(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
        Value::Sequence(values) => {
            let values: Vec<String> = values.iter().map(written).collect();
            format!("[{}]", values.join(", "))
        }
        Value::Mapping(entries) => {
            let entries = entries
                .iter()
                .map(|(name, value)| format!("{}: {}", written(name), written(value)));
            format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
        }
        Value::Tagged(tagged) => format!("{} {}", tagged.tag, written(&tagged.value)),
    }
}

/// The logical ids of all resources of a type, in the template's order.
fn resources_of(template: &Value, kind: &str) -> Vec<String> {
    template["Resources"]
        .as_mapping()
        .expect("resources")
        .iter()
        .filter(|(_, resource)| resource["Type"] == kind)
        .map(|(id, _)| id.as_str().expect("a logical id").to_owned())
        .collect()
}

/// Asserts that properties of a resource are what is written here.
fn assert_written(template: &Value, resource: &str, expected: &[(&str, &str)]) {
    let properties = properties(template, resource);
    for (path, expected) in expected {
        let value = path
            .split('/')
            .fold(properties.clone(), |value, name| value[name].clone());
        assert_eq!(written(&value), *expected, "{resource} {path}");
    }
}

#[test]
fn only_the_fronts_may_invoke_forward() {
    let template = template();
    let permissions = resources_of(&template, "AWS::Lambda::Permission");
    assert_eq!(
        permissions,
        [
            "HttpPermission",
            "StreamingUrlPermission",
            "StreamingInvokePermission"
        ]
    );
    assert_written(
        &template,
        "HttpPermission",
        &[
            ("Action", "lambda:InvokeFunction"),
            ("FunctionName", "!Ref ForwardFunction"),
            ("Principal", "apigateway.amazonaws.com"),
            (
                "SourceArn",
                "!Sub arn:${AWS::Partition}:execute-api:${AWS::Region}:${AWS::AccountId}:${HttpApi}/$default/$default",
            ),
        ],
    );
    // A public function URL needs both since October 2025.
    assert_written(
        &template,
        "StreamingUrlPermission",
        &[
            ("Action", "lambda:InvokeFunctionUrl"),
            ("FunctionName", "!Ref ForwardFunction"),
            ("Principal", "*"),
            ("FunctionUrlAuthType", "NONE"),
        ],
    );
    assert_written(
        &template,
        "StreamingInvokePermission",
        &[
            ("Action", "lambda:InvokeFunction"),
            ("FunctionName", "!Ref ForwardFunction"),
            ("Principal", "*"),
            ("InvokedViaFunctionUrl", "true"),
        ],
    );
}

#[test]
fn the_function_url_streams_for_as_long_as_its_parameter_says() {
    let template = template();
    assert_eq!(
        resources_of(&template, "AWS::Lambda::Url"),
        ["StreamingUrl"]
    );
    assert_written(
        &template,
        "StreamingUrl",
        &[
            ("InvokeMode", "RESPONSE_STREAM"),
            ("AuthType", "NONE"),
            ("TargetFunctionArn", "!Ref ForwardFunction"),
        ],
    );
    assert_written(
        &template,
        "ForwardFunction",
        &[("Timeout", "!Ref StreamTimeout")],
    );
    let timeout = &template["Parameters"]["StreamTimeout"];
    assert_eq!(
        (
            written(&timeout["Default"]),
            written(&timeout["MinValue"]),
            written(&timeout["MaxValue"])
        ),
        ("900".to_owned(), "30".to_owned(), "900".to_owned())
    );
}

#[test]
fn the_other_functions_time_out_when_a_websocket_api_does() {
    let template = template();
    assert_eq!(
        written(&template["Globals"]["Function"]["Timeout"]),
        "29",
        "seconds"
    );
    for function in ["ConnectFunction", "DisconnectFunction", "DefaultFunction"] {
        assert_written(&template, function, &[("Timeout", "")]);
    }
}

#[test]
fn each_route_of_the_websocket_api_calls_its_function() {
    assert_written(
        &template(),
        "WebSocketApi",
        &[
            ("StageName", "v1"),
            // A constant: no message can choose another route.
            ("RouteSelectionExpression", r"\$default"),
            ("Routes/$connect/FunctionArn", "!GetAtt ConnectFunction.Arn"),
            (
                "Routes/$disconnect/FunctionArn",
                "!GetAtt DisconnectFunction.Arn",
            ),
            ("Routes/$default/FunctionArn", "!GetAtt DefaultFunction.Arn"),
        ],
    );
}

#[test]
fn the_http_api_sends_every_request_to_forward_in_payload_format_2() {
    let template = template();
    assert_written(
        &template,
        "HttpIntegration",
        &[
            ("ApiId", "!Ref HttpApi"),
            ("IntegrationType", "AWS_PROXY"),
            ("IntegrationUri", "!GetAtt ForwardFunction.Arn"),
            ("PayloadFormatVersion", "2.0"),
            ("TimeoutInMillis", "30000"),
        ],
    );
    assert_written(
        &template,
        "HttpRoute",
        &[
            ("ApiId", "!Ref HttpApi"),
            ("RouteKey", "$default"),
            ("Target", "!Sub integrations/${HttpIntegration}"),
        ],
    );
    assert_written(
        &template,
        "HttpStage",
        &[
            ("ApiId", "!Ref HttpApi"),
            ("StageName", "$default"),
            ("AutoDeploy", "true"),
        ],
    );
    // With it, API Gateway would answer OPTIONS in the local service's stead.
    assert_written(&template, "HttpApi", &[("CorsConfiguration", "")]);
}

/// The variables of each function that say where something is, or who may do something.
#[test]
fn each_function_gets_its_own_tables_addresses_and_rules() {
    let template = template();
    let tables = [
        ("TUNNELS_TABLE", "!Ref TunnelsTable"),
        ("CONNECTIONS_TABLE", "!Ref ConnectionsTable"),
        ("PENDING_REQUESTS_TABLE", "!Ref PendingRequestsTable"),
        ("TOKENS_TABLE", "!Ref TokensTable"),
    ];
    let others = [
        ("AUTH", "!Ref Auth"),
        ("JWT_ISSUER", "!Ref JwtIssuer"),
        ("JWT_AUDIENCE", "!Ref JwtAudience"),
        ("JWT_JWKS_URL", "!Ref JwtJwksUrl"),
        (
            "WEBSOCKET_API_ENDPOINT",
            "!Sub wss://${WebSocketApi}.execute-api.${AWS::Region}.${AWS::URLSuffix}/v1",
        ),
        (
            "PUBLIC_URL",
            "!If [HasDomain, !Sub https://${DomainName}, !Sub https://${HttpApi}.execute-api.${AWS::Region}.${AWS::URLSuffix}]",
        ),
        ("STREAMING_URL", "!Ref KnownStreamingUrl"),
        ("PAD_EMPTY_STREAMS", "!Ref PadEmptyStreams"),
        (
            "VISITOR_SOCKETS_ENDPOINT",
            "!Sub wss://${VisitorSockets}.execute-api.${AWS::Region}.${AWS::URLSuffix}/visitors",
        ),
        ("ROUTING", "!Ref Routing"),
        ("MAX_TUNNEL_IDS_PER_OWNER", "!Ref MaxTunnelIdsPerOwner"),
        ("MAX_CONCURRENT_REQUESTS", "!Ref MaxConcurrentRequests"),
        ("MAX_REQUESTS_PER_SECOND", "!Ref MaxRequestsPerSecond"),
        ("LOG_LEVEL", "!Ref LogLevel"),
        // Named for sam local, which passes on only what the template names; it has no value once deployed.
        ("AWS_ENDPOINT_URL_DYNAMODB", "!Ref AWS::NoValue"),
    ];
    let expected: BTreeMap<&str, &str> = tables.into_iter().chain(others).collect();
    for function in FUNCTIONS {
        let variables = properties(&template, function)["Environment"]["Variables"].clone();
        for (name, value) in variables.as_mapping().expect("variables") {
            let name = name.as_str().expect("a name");
            // Those are in the next test.
            if matches!(name, "EDGE_SECRETS" | "JWT_SECRET") {
                continue;
            }
            assert_eq!(
                Some(written(value).as_str()),
                expected.get(name).copied(),
                "{function} {name}"
            );
        }
    }
}

#[test]
fn secrets_and_log_levels_are_those_of_their_parameters() {
    let template = template();
    let versioned = |condition: &str, secret: &str, version: &str| {
        format!(
            "!If [{condition}, !Sub {{{{resolve:secretsmanager:${{{secret}}}:SecretString:::${{{version}}}}}}}, \
             !Sub {{{{resolve:secretsmanager:${{{secret}}}}}}}]"
        )
    };
    let jwt = versioned("HasJwtSecretVersion", "JwtSecretName", "JwtSecretVersion");
    let jwt = format!("!If [HasJwtSecret, {jwt}, ]");
    let edge = versioned("HasEdgeSecretVersion", "EdgeSecret", "EdgeSecretVersion");
    // While the secret changes, CloudFront may send either.
    let previous = "!If [HasPreviousEdgeSecretVersion, !Sub {{resolve:secretsmanager:${EdgeSecret}:SecretString:::${PreviousEdgeSecretVersion}}}, ]";
    let edge = format!("!If [HasEdge, !Join [ , [{edge}, {previous}]], ]");
    for (function, variable, expected) in [
        ("ConnectFunction", "JWT_SECRET", &jwt),
        ("ForwardFunction", "JWT_SECRET", &jwt),
        ("ForwardFunction", "EDGE_SECRETS", &edge),
    ] {
        let variable = format!("Environment/Variables/{variable}");
        assert_written(&template, function, &[(&variable, expected)]);
    }
    let logging = &template["Globals"]["Function"]["LoggingConfig"];
    // Lambda passes on everything: what is logged is for LOG_LEVEL to decide.
    assert_eq!(
        written(logging),
        "{LogFormat: JSON, ApplicationLogLevel: TRACE, SystemLogLevel: WARN}"
    );
}

#[test]
fn each_function_is_built_from_its_own_crate_and_logs_to_its_own_group() {
    let template = template();
    for (function, name) in
        FUNCTIONS
            .into_iter()
            .zip(["connect", "disconnect", "default", "forward"])
    {
        let metadata = &template["Resources"][function]["Metadata"];
        assert_eq!(written(&metadata["BuildMethod"]), "rust-cargolambda");
        assert_eq!(
            written(&metadata["BuildProperties"]["Binary"]),
            format!("tunnel-{name}")
        );
        let logs = function.replace("Function", "Logs");
        assert_written(
            &template,
            function,
            &[
                ("CodeUri", format!("functions/{name}").as_str()),
                ("LoggingConfig/LogGroup", format!("!Ref {logs}").as_str()),
            ],
        );
        assert_written(
            &template,
            &logs,
            &[
                (
                    "LogGroupName",
                    format!("!Sub /aws/lambda/${{AWS::StackName}}/{name}").as_str(),
                ),
                ("RetentionInDays", "!Ref LogRetentionDays"),
            ],
        );
    }
    let shared = &template["Globals"]["Function"];
    assert_eq!(
        (
            written(&shared["Runtime"]),
            written(&shared["Handler"]),
            written(&shared["Architectures"]),
            written(&shared["MemorySize"])
        ),
        (
            "provided.al2023".to_owned(),
            "bootstrap".to_owned(),
            "[!Ref Architecture]".to_owned(),
            "!Ref MemorySize".to_owned()
        )
    );
}

#[test]
fn each_functions_errors_raise_its_own_alarm() {
    let template = template();
    for function in FUNCTIONS {
        assert_written(
            &template,
            &function.replace("Function", "Alarm"),
            &[
                ("Namespace", "AWS/Lambda"),
                ("MetricName", "Errors"),
                (
                    "Dimensions",
                    format!("[{{Name: FunctionName, Value: !Ref {function}}}]").as_str(),
                ),
                ("ComparisonOperator", "GreaterThanThreshold"),
                ("Threshold", "0"),
            ],
        );
    }
    assert_written(
        &template,
        "GatewayAlarm",
        &[(
            "Dimensions",
            "[{Name: ApiId, Value: !Ref WebSocketApi}, {Name: Stage, Value: v1}]",
        )],
    );
    for alarm in resources_of(&template, "AWS::CloudWatch::Alarm") {
        assert_written(
            &template,
            &alarm,
            &[(
                "AlarmActions",
                "!If [HasAlarmTopic, [!Ref AlarmTopicArn], !Ref AWS::NoValue]",
            )],
        );
    }
}

#[test]
fn only_tables_that_cannot_be_rebuilt_are_backed_up_and_protected() {
    let template = template();
    for table in resources_of(&template, "AWS::DynamoDB::Table") {
        let is_kept = matches!(table.as_str(), dynamodb::TUNNELS | dynamodb::TOKENS);
        let kept = |text: &'static str| if is_kept { text } else { "" };
        assert_written(
            &template,
            &table,
            &[
                ("BillingMode", "PAY_PER_REQUEST"),
                ("TimeToLiveSpecification/Enabled", "true"),
                (
                    "PointInTimeRecoverySpecification/PointInTimeRecoveryEnabled",
                    kept("!Ref PointInTimeRecovery"),
                ),
                ("DeletionProtectionEnabled", kept("!Ref DeletionProtection")),
            ],
        );
        assert_eq!(
            written(&template["Resources"][table.as_str()]["UpdateReplacePolicy"]),
            if is_kept { "Retain" } else { "Delete" },
            "{table}: a table that an update replaces"
        );
    }
}

#[test]
fn an_owners_tunnel_ids_can_be_counted() {
    assert_written(
        &template(),
        dynamodb::TUNNELS,
        &[(
            "GlobalSecondaryIndexes",
            "[{IndexName: byOwner, KeySchema: [{AttributeName: owner, KeyType: HASH}], Projection: {ProjectionType: KEYS_ONLY}}]",
        )],
    );
}

#[test]
fn a_domain_leads_to_the_http_api() {
    let template = template();
    for (mapping, domain, record, name) in [
        ("DomainMapping", "Domain", "DomainRecord", "!Ref DomainName"),
        (
            "WildcardMapping",
            "Wildcard",
            "WildcardRecord",
            "!Sub *.${DomainName}",
        ),
    ] {
        assert_written(
            &template,
            mapping,
            &[
                ("ApiId", "!Ref HttpApi"),
                ("Stage", "!Ref HttpStage"),
                ("DomainName", format!("!Ref {domain}").as_str()),
            ],
        );
        assert_written(&template, domain, &[("DomainName", name)]);
        assert_written(
            &template,
            record,
            &[
                ("Name", name),
                ("Type", "A"),
                (
                    "AliasTarget/DNSName",
                    format!("!GetAtt {domain}.RegionalDomainName").as_str(),
                ),
            ],
        );
        let [mut ipv4, mut ipv6] = [record.to_owned(), format!("{record}Ipv6")]
            .map(|record| properties(&template, &record));
        assert_eq!(written(&ipv6["Type"]), "AAAA");
        for record in [&mut ipv4, &mut ipv6] {
            record["Type"] = Value::Null;
        }
        assert_eq!(written(&ipv4), written(&ipv6), "{record}");
    }
}

/// The WebSocket APIs, each with its functions.
#[test]
fn visitors_have_a_websocket_api_of_their_own() {
    let template = template();
    assert_eq!(
        resources_of(&template, "AWS::Serverless::WebSocketApi"),
        ["WebSocketApi", "VisitorSockets"]
    );
    let visitors = properties(&template, "VisitorSockets");
    assert_eq!(written(&visitors["StageName"]), VISITORS_STAGE);
    // A constant: no message can choose another route.
    assert_eq!(written(&visitors["RouteSelectionExpression"]), r"\$default");
    for (route, function) in [
        ("$connect", "ForwardFunction"),
        ("$disconnect", "DisconnectFunction"),
        ("$default", "DefaultFunction"),
    ] {
        assert_eq!(
            written(&visitors["Routes"][route]["FunctionArn"]),
            format!("!GetAtt {function}.Arn"),
            "{route}"
        );
    }
}

#[test]
fn the_edge_proves_itself_to_both_origins_and_stores_nothing() {
    let template = template();
    let distribution = properties(&template, "Distribution")["DistributionConfig"].clone();
    let origins = distribution["Origins"].as_sequence().expect("origins");
    let proof = "[{HeaderName: x-tunnel-edge, HeaderValue: !If [HasEdgeSecretVersion, \
                 !Sub {{resolve:secretsmanager:${EdgeSecret}:SecretString:::${EdgeSecretVersion}}}, \
                 !Sub {{resolve:secretsmanager:${EdgeSecret}}}]}]";
    let expected = [
        (
            "requests",
            "!Select [2, !Split [/, !GetAtt StreamingUrl.FunctionUrl]]",
        ),
        (
            "sockets",
            "!Sub ${VisitorSockets}.execute-api.${AWS::Region}.${AWS::URLSuffix}",
        ),
    ];
    assert_eq!(origins.len(), expected.len());
    for (origin, (id, domain)) in origins.iter().zip(expected) {
        assert_eq!(written(&origin["Id"]), id);
        assert_eq!(written(&origin["DomainName"]), domain);
        assert_eq!(written(&origin["OriginCustomHeaders"]), proof, "{id}");
        // A request whose outcome is unknown is not for CloudFront to repeat.
        assert_eq!(written(&origin["ConnectionAttempts"]), "1", "{id}");
    }
    let behavior = &distribution["DefaultCacheBehavior"];
    for (property, expected) in [
        ("TargetOriginId", "requests"),
        (
            "AllowedMethods",
            "[GET, HEAD, OPTIONS, PUT, POST, PATCH, DELETE]",
        ),
        // CachingDisabled, AllViewerExceptHostHeader.
        ("CachePolicyId", "4135ea2d-6df8-44a3-9df3-4b5a84be39ad"),
        (
            "OriginRequestPolicyId",
            "b689b0a8-53d0-40ab-baf2-68738e2966ac",
        ),
        (
            "FunctionAssociations",
            "[{EventType: viewer-request, FunctionARN: !GetAtt EdgeFunction.FunctionARN}]",
        ),
    ] {
        assert_eq!(written(&behavior[property]), expected, "{property}");
    }
}

#[test]
fn the_edges_code_is_that_of_its_file() {
    let function = properties(&template(), "EdgeFunction");
    assert_eq!(
        written(&function["FunctionCode"]),
        include_str!("../../../edge/viewer-request.js")
    );
}

#[test]
fn the_domain_is_the_edges_where_there_is_one() {
    let template = template();
    for (resource, condition) in [
        ("Domain", "HasApiDomain"),
        ("DomainMapping", "HasApiDomain"),
        ("DomainRecord", "HasDomainRecord"),
        ("Wildcard", "HasWildcard"),
        ("Distribution", "HasEdge"),
        ("EdgeFunction", "HasEdge"),
        ("EdgeSecret", "HasEdge"),
        ("EdgeRecord", "HasEdgeRecord"),
        ("EdgeRecordIpv6", "HasEdgeRecord"),
        ("EdgeWildcardRecord", "HasEdgeWildcardRecord"),
        ("EdgeWildcardRecordIpv6", "HasEdgeWildcardRecord"),
    ] {
        assert_eq!(
            written(&template["Resources"][resource]["Condition"]),
            condition,
            "{resource}"
        );
    }
}

#[test]
fn limits_of_agents_and_of_visitors_apply_to_their_own_apis() {
    let template = template();
    for (resource, condition, parameters) in [
        ("WebSocketApi", "LimitsAgents", "Agents"),
        ("HttpStage", "LimitsVisitors", "Visitors"),
        ("VisitorSockets", "LimitsVisitors", "Visitors"),
    ] {
        let expected = format!(
            "!If [{condition}, {{ThrottlingRateLimit: !Ref {parameters}RateLimit, \
             ThrottlingBurstLimit: !Ref {parameters}BurstLimit}}, !Ref AWS::NoValue]"
        );
        assert_written(&template, resource, &[("DefaultRouteSettings", &expected)]);
    }
}

#[test]
fn each_condition_is_what_its_name_says() {
    let is_given = |parameter: &str| format!("!Not [!Equals [!Ref {parameter}, ]]");
    let is_not_0 = |parameter: &str| format!("!Not [!Equals [!Ref {parameter}, 0]]");
    let both = |one: &str, other: &str| format!("!And [!Condition {one}, !Condition {other}]");
    let expected = [
        ("HasJwtSecret", is_given("JwtSecretName")),
        ("HasJwtSecretVersion", is_given("JwtSecretVersion")),
        ("HasDomain", is_given("DomainName")),
        ("HasHostedZone", is_given("HostedZoneId")),
        (
            "HasSubdomains",
            "!Equals [!Ref Routing, subdomain]".to_owned(),
        ),
        ("HasEdge", "!Equals [!Ref Edge, CloudFront]".to_owned()),
        ("HasEdgeRecord", both("HasEdge", "HasHostedZone")),
        (
            "HasEdgeWildcardRecord",
            both("HasEdgeRecord", "HasSubdomains"),
        ),
        ("HasEdgeSecretVersion", is_given("EdgeSecretVersion")),
        (
            "HasPreviousEdgeSecretVersion",
            is_given("PreviousEdgeSecretVersion"),
        ),
        (
            "HasApiDomain",
            "!And [!Condition HasDomain, !Not [!Condition HasEdge]]".to_owned(),
        ),
        ("HasDomainRecord", both("HasApiDomain", "HasHostedZone")),
        ("HasWildcard", both("HasApiDomain", "HasSubdomains")),
        ("HasWildcardRecord", both("HasWildcard", "HasDomainRecord")),
        ("LimitsVisitors", is_not_0("VisitorsRateLimit")),
        ("LimitsAgents", is_not_0("AgentsRateLimit")),
        ("ReservesForAgents", is_not_0("AgentsConcurrency")),
        ("CapsVisitors", is_not_0("VisitorsConcurrency")),
        ("KnowsQuota", is_not_0("AccountConcurrency")),
        (
            "LogsAccess",
            "!Equals [!Ref AccessLogs, Enabled]".to_owned(),
        ),
        ("HasAlarmTopic", is_given("AlarmTopicArn")),
    ];
    let template = template();
    let conditions = template["Conditions"].as_mapping().expect("conditions");
    let conditions: Vec<(String, String)> = conditions
        .iter()
        .map(|(name, condition)| (written(name), written(condition)))
        .collect();
    let expected = expected.map(|(name, condition)| (name.to_owned(), condition));
    assert_eq!(conditions, expected);
}

#[test]
fn the_outputs_are_the_addresses_that_the_functions_know() {
    let template = template();
    let output = |name: &str| written(&template["Outputs"][name]["Value"]);
    let variables = properties(&template, "DefaultFunction")["Environment"]["Variables"].clone();
    assert_eq!(
        output("AgentEndpoint"),
        written(&variables["WEBSOCKET_API_ENDPOINT"])
    );
    assert_eq!(output("PublicUrl"), written(&variables["PUBLIC_URL"]));
    for (name, value) in [
        ("StreamingUrl", "!GetAtt StreamingUrl.FunctionUrl"),
        ("DomainTarget", "!GetAtt Domain.RegionalDomainName"),
        ("WildcardTarget", "!GetAtt Wildcard.RegionalDomainName"),
        ("EdgeTarget", "!GetAtt Distribution.DomainName"),
        ("EdgeSecret", "!Ref EdgeSecret"),
    ] {
        assert_eq!(output(name), value, "{name}");
    }
}

#[test]
fn the_edge_is_reached_by_every_name_and_reaches_its_origins_over_tls() {
    let template = template();
    let distribution = properties(&template, "Distribution")["DistributionConfig"].clone();
    for (property, expected) in [
        (
            "Aliases",
            "!If [HasSubdomains, [!Ref DomainName, !Sub *.${DomainName}], [!Ref DomainName]]",
        ),
        (
            "ViewerCertificate",
            "{AcmCertificateArn: !Ref CertificateArn, SslSupportMethod: sni-only, MinimumProtocolVersion: TLSv1.2_2021}",
        ),
    ] {
        assert_eq!(written(&distribution[property]), expected, "{property}");
    }
    let behavior = &distribution["DefaultCacheBehavior"];
    assert_eq!(
        written(&behavior["ViewerProtocolPolicy"]),
        "redirect-to-https"
    );
    let tls = "OriginProtocolPolicy: https-only, OriginSSLProtocols: [TLSv1.2]";
    assert_eq!(
        written(&distribution["Origins"][0]["CustomOriginConfig"]),
        // As long as CloudFront waits without a raised quota: a local service may take its time.
        format!("{{{tls}, OriginReadTimeout: 120, OriginKeepaliveTimeout: 60}}")
    );
    assert_eq!(
        written(&distribution["Origins"][1]["CustomOriginConfig"]),
        format!("{{{tls}}}")
    );
}

#[test]
fn each_record_leads_to_what_has_its_name() {
    let template = template();
    let api = |domain: &str| {
        format!(
            "{{DNSName: !GetAtt {domain}.RegionalDomainName, HostedZoneId: !GetAtt {domain}.RegionalHostedZoneId}}"
        )
    };
    let edge = "{DNSName: !GetAtt Distribution.DomainName, HostedZoneId: Z2FDTNDATAQYW2}";
    let wildcard = "!Sub *.${DomainName}";
    for (record, condition, name, target) in [
        (
            "DomainRecord",
            "HasDomainRecord",
            "!Ref DomainName",
            &*api("Domain"),
        ),
        (
            "WildcardRecord",
            "HasWildcardRecord",
            wildcard,
            &*api("Wildcard"),
        ),
        ("EdgeRecord", "HasEdgeRecord", "!Ref DomainName", edge),
        (
            "EdgeWildcardRecord",
            "HasEdgeWildcardRecord",
            wildcard,
            edge,
        ),
    ] {
        for (record, kind) in [(record.to_owned(), "A"), (format!("{record}Ipv6"), "AAAA")] {
            assert_eq!(
                written(&template["Resources"][record.as_str()]["Condition"]),
                condition,
                "{record}"
            );
            assert_written(
                &template,
                &record,
                &[
                    ("HostedZoneId", "!Ref HostedZoneId"),
                    ("Name", name),
                    ("Type", kind),
                    ("AliasTarget", target),
                ],
            );
        }
    }
    for domain in ["Domain", "Wildcard"] {
        assert_written(
            &template,
            domain,
            &[(
                "DomainNameConfigurations",
                "[{CertificateArn: !Ref CertificateArn, EndpointType: REGIONAL, IpAddressType: dualstack, SecurityPolicy: TLS_1_2}]",
            )],
        );
    }
}

#[test]
fn access_logs_hold_no_address_of_a_visitor_or_of_a_page() {
    let settings = written(&properties(&template(), "HttpStage")["AccessLogSettings"]);
    assert!(settings.contains("$context.requestId"), "{settings}");
    for secret in [
        "path",
        "Path",
        "query",
        "sourceIp",
        "routeKey",
        "authorizer",
    ] {
        assert!(!settings.contains(secret), "{settings}");
    }
}

#[test]
fn what_reserves_executions_needs_the_quota_and_the_quota_has_an_alarm() {
    let template = template();
    for (function, condition, parameter) in [
        ("ConnectFunction", "ReservesForAgents", "AgentsConcurrency"),
        (
            "DisconnectFunction",
            "ReservesForAgents",
            "AgentsConcurrency",
        ),
        ("DefaultFunction", "ReservesForAgents", "AgentsConcurrency"),
        ("ForwardFunction", "CapsVisitors", "VisitorsConcurrency"),
    ] {
        assert_written(
            &template,
            function,
            &[(
                "ReservedConcurrentExecutions",
                format!("!If [{condition}, !Ref {parameter}, !Ref AWS::NoValue]").as_str(),
            )],
        );
        let rule = &template["Rules"][format!("{parameter}NeedsQuota").as_str()];
        assert_eq!(
            written(&rule["RuleCondition"]),
            format!("!Not [!Equals [!Ref {parameter}, 0]]")
        );
        assert_eq!(
            written(&rule["Assertions"][0]["Assert"]),
            "!Not [!Contains [[0, 10, 50, 100], !Ref AccountConcurrency]]"
        );
    }
    assert_eq!(
        written(&template["Resources"]["ConcurrencyAlarm"]["Condition"]),
        "KnowsQuota"
    );
    let alarm = properties(&template, "ConcurrencyAlarm");
    assert_eq!(
        written(&alarm["Metrics"][0]["Expression"]),
        "!Sub 100 * executions / ${AccountConcurrency}"
    );
    assert_eq!(written(&alarm["Threshold"]), "80");
}

#[test]
fn the_dashboard_is_json_that_shows_every_function() {
    let template = template();
    let body = written(&properties(&template, "Dashboard")["DashboardBody"]);
    let body = body.strip_prefix("!Sub ").expect("a substitution");
    let dashboard: serde_json::Value = serde_json::from_str(body).expect("JSON");
    let widgets = dashboard["widgets"].as_array().expect("widgets");
    let of_title = |title: &str| {
        let widget = widgets
            .iter()
            .find(|widget| widget["properties"]["title"] == title);
        widget.unwrap_or_else(|| panic!("{title}")).to_string()
    };
    for title in [
        "Invocations",
        "Errors",
        "Function duration p99 (ms)",
        "Cost: Lambda GB-seconds",
    ] {
        let widget = of_title(title);
        for function in FUNCTIONS {
            assert!(
                widget.contains(&format!("${{{function}}}")),
                "{title}: {function}"
            );
        }
    }
    assert!(of_title("Errors").contains("\"4xx\""));
    // A sum of metrics has no point where one of them has none.
    assert_eq!(
        of_title("Cost: Lambda GB-seconds").matches("FILL(").count(),
        4
    );
}

#[test]
fn every_parameter_is_used_shown_and_described() {
    let text = include_str!("../../../template.yaml");
    let template = template();
    let shown: BTreeSet<String> =
        template["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
            .as_sequence()
            .expect("groups")
            .iter()
            .flat_map(|group| group["Parameters"].as_sequence().expect("parameters"))
            .map(written)
            .collect();
    let parameters = template["Parameters"].as_mapping().expect("parameters");
    for (name, parameter) in parameters {
        let name = name.as_str().expect("a name");
        assert!(shown.contains(name), "{name} is in no group");
        assert!(!written(&parameter["Description"]).is_empty(), "{name}");
        let uses = [
            format!("!Ref {name}"),
            format!("${{{name}}}"),
            format!("!Ref {name}]"),
        ];
        assert!(
            uses.iter().any(|used| text.contains(used.as_str())),
            "{name} is used nowhere"
        );
    }
    assert_eq!(shown.len(), parameters.len());
}
