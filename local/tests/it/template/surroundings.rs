//! Surroundings in which a function runs, and every call that it makes is noted.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard},
};

use axum::{Router, body::Bytes, extract::State, http::HeaderMap, response::IntoResponse};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tunnel_local_aws::{caller::AccessKey, dynamodb};
use tunnel_service::{
    auth::token::TokenHash,
    aws::sdk,
    aws::sdk::SdkConfig,
    settings::{SettingsError, Variables},
    tables::tokens::{Token, TokensTable},
};

/// Calls that were made, by function.
pub(super) type Calls = Arc<Mutex<BTreeSet<String>>>;

/// Held between awaits only.
pub(super) fn made(calls: &Calls) -> MutexGuard<'_, BTreeSet<String>> {
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
pub(super) struct Surroundings {
    pub(super) calls: Calls,
    sdk: SdkConfig,
    connections: String,
    /// What was posted to connections.
    pub(super) texts: Arc<Mutex<Vec<String>>>,
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
    pub(super) fn load<T>(
        &self,
        load: impl Fn(Variables<'_>, &SdkConfig) -> Result<T, SettingsError>,
    ) -> T {
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

/// DynamoDB with the service's tables and one token, "sample".
pub(super) struct Database {
    address: String,
    pub(super) sdk: SdkConfig,
    pub(super) tokens: TokensTable,
    _stop: DropGuard,
}

impl Database {
    pub(super) async fn start() -> Self {
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

/// By which `forward` knows the edge.
pub(super) const EDGE_SECRET: &str = "0123456789abcdef0123456789abcdef";

/// A function in surroundings of its own.
pub(super) struct Observed<F> {
    pub(super) function: F,
    pub(super) surroundings: Surroundings,
}

impl<F> Observed<F> {
    pub(super) async fn load(
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
