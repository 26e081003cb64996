//! The service as it is in AWS: API Gateway, the functions, and their tables, in any weather.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aws_sdk_dynamodb::Client;
use http::{HeaderMap, HeaderValue, Uri, header};
use lambda_runtime::FunctionResponse;
use serde_json::{Value, json};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tunnel_connect::Connect;
use tunnel_default::DefaultRoute;
use tunnel_disconnect::Disconnect;
use tunnel_forward::Forward;
use tunnel_local_aws::{
    caller::AccessKey,
    dynamodb,
    events::EventSource,
    management::{self, ConnectionCommand, ConnectionRegistry},
    quotas::Quotas,
};
use tunnel_protocol::id::{ConnectionId, TunnelId};
use tunnel_service::{
    aws::sdk, now, settings::Variables, tables::tokens::TokensTable, tables::tunnels::TunnelsTable,
};

use crate::{
    weather::{Passage, Weather},
    wire::Wire,
};

/// How long a function may take ("Timeout" in template.yaml).
const FUNCTION_TIMEOUT: Duration = Duration::from_secs(29);
/// How far apart the clocks of API Gateway's machines are at most.
const CLOCK_SKEW: Duration = Duration::from_millis(50);
/// Messages that wait for an agent.
const QUEUE: usize = 128;
/// How many execution environments of `forward` there are, each with its own memory.
const FORWARDS: usize = 2;
/// The tunnel that everything is about.
pub(crate) const TUNNEL: &str = "adversary";

/// Everything. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Cloud(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    weather: Weather,
    connect: Connect,
    default: DefaultRoute,
    disconnect: Disconnect,
    forwards: Vec<Forward>,
    tunnels: TunnelsTable,
    tokens: TokensTable,
    registry: ConnectionRegistry,
    began: Instant,
    /// In milliseconds since 1970.
    began_at: u64,
    /// What each connection that is not closed has in common with its events.
    open: Mutex<HashMap<ConnectionId, EventSource>>,
    tasks: TaskTracker,
}

/// One end of a connection: the agent's.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) id: ConnectionId,
    pub(crate) connected_at: u64,
    /// Messages as they arrive. Ends when the service has closed the connection.
    pub(crate) inbox: mpsc::UnboundedReceiver<String>,
    /// The agent is not there any more once this is cancelled.
    pub(crate) left: CancellationToken,
}

/// How a visit ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) code: Option<String>,
}

impl Cloud {
    pub(crate) async fn start(weather: Weather) -> Self {
        let registry = ConnectionRegistry::default();
        let database = dynamodb::open(None).expect("a database in memory");
        let tasks = TaskTracker::new();
        let wire = Wire {
            weather: weather.clone(),
            dynamodb: dynamodb::router(database, AccessKey::any()),
            management: management::router(registry.clone(), Quotas::default(), AccessKey::any()),
            tasks: tasks.clone(),
        };
        let sdk = sdk::for_loopback("http://dynamodb.localhost", "adversary")
            .into_builder()
            .http_client(wire)
            .build();
        dynamodb::create_tables(&Client::new(&sdk))
            .await
            .expect("tables");
        let variables = || {
            Variables::new(|name| {
                Some(match name {
                    "WEBSOCKET_API_ENDPOINT" => format!("ws://127.0.0.1:1/{}", management::STAGE),
                    "PUBLIC_URL" => "https://tunnel.example.com".to_owned(),
                    "AUTH" => "token".to_owned(),
                    table => return dynamodb::table_of_variable(table).map(str::to_owned),
                })
            })
        };
        let forward = || Forward::load(variables(), &sdk).expect("forward");
        Self(Arc::new(Inner {
            connect: Connect::load(variables(), &sdk).expect("connect"),
            default: DefaultRoute::load(variables(), &sdk).expect("default"),
            disconnect: Disconnect::load(variables(), &sdk).expect("disconnect"),
            forwards: (0..FORWARDS).map(|_| forward()).collect(),
            tunnels: TunnelsTable::new(&sdk, dynamodb::TUNNELS.to_owned()),
            tokens: TokensTable::new(&sdk, dynamodb::TOKENS.to_owned()),
            registry,
            began: Instant::now(),
            began_at: u64::try_from(now().as_millis()).expect("a time"),
            open: Mutex::default(),
            tasks,
            weather,
        }))
    }

    pub(crate) fn weather(&self) -> &Weather {
        &self.0.weather
    }

    pub(crate) async fn create_token(&self, name: &str) -> String {
        self.0
            .tokens
            .create(name, None, now())
            .await
            .expect("a token")
    }

    /// The connection that serves the tunnel, as the table has it.
    pub(crate) async fn serving(&self) -> Option<ConnectionId> {
        let id: TunnelId = TUNNEL.parse().expect("an id");
        let tunnel = self.0.tunnels.get(&id, now()).await.expect("an answer");
        tunnel?.online.map(|online| online.connection_id)
    }

    /// Starts something that goes on by itself.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.0.tasks.spawn(task);
    }

    /// Runs a function. It may die between any two steps, and its environment stops it in the end.
    async fn invoke<T>(&self, function: impl Future<Output = T>) -> Option<T> {
        let weather = self.weather();
        let mut life = FUNCTION_TIMEOUT;
        if weather.strikes() {
            life = weather.time(Duration::from_millis(200));
        }
        timeout(life, function).await.ok()
    }

    /// An agent's handshake. The error is the status that it was answered with.
    pub(crate) async fn connect(&self, token: &str) -> Result<Line, u16> {
        let weather = self.weather();
        let source = EventSource {
            connection_id: weather.connection_id(),
            connected_at: self.clock(),
            source_ip: "192.0.2.1".to_owned(),
            stage: management::STAGE,
        };
        let mut headers = HeaderMap::new();
        let credential = HeaderValue::from_str(&format!("Bearer {token}")).expect("a token");
        headers.insert(header::AUTHORIZATION, credential);
        let uri: Uri = format!("/?tunnel_id={TUNNEL}").parse().expect("a URI");
        sleep(weather.delay()).await;
        let admitted = self
            .invoke(self.0.connect.handle(source.connect(&headers, &uri)))
            .await;
        match admitted {
            Some(Ok(route)) if route.status_code == 200 => Ok(self.open(source)),
            Some(Ok(route)) => Err(route.status_code),
            Some(Err(_)) | None => Err(500),
        }
    }

    /// The time of one of API Gateway's machines: to the millisecond, and not quite that of the others.
    fn clock(&self) -> u64 {
        let since = self.0.began.elapsed() + self.weather().time(CLOCK_SKEW);
        self.0.began_at + u64::try_from(since.as_millis()).expect("a time")
    }

    fn open(&self, source: EventSource) -> Line {
        let (commands, mut queue) = mpsc::channel(QUEUE);
        let (deliver, inbox) = mpsc::unbounded_channel();
        let left = CancellationToken::new();
        let line = Line {
            id: source.connection_id.clone(),
            connected_at: source.connected_at,
            inbox,
            left: left.clone(),
        };
        self.0.registry.insert(line.id.clone(), commands);
        self.lock().insert(line.id.clone(), source.clone());
        let cloud = self.clone();
        self.spawn(async move {
            let id = source.connection_id.clone();
            loop {
                tokio::select! {
                    biased;
                    command = queue.recv() => match command {
                        Some(ConnectionCommand::Send(text)) => cloud.deliver(&deliver, &text),
                        Some(ConnectionCommand::Close(..)) | None => break,
                    },
                    () = left.cancelled() => {
                        // The network may have swallowed the goodbye.
                        if cloud.weather().strikes() {
                            sleep(cloud.weather().time(Duration::from_secs(20))).await;
                        }
                        break;
                    }
                }
            }
            cloud.0.registry.remove(&id);
            cloud.lock().remove(&id);
            drop(deliver);
            cloud.disconnected(&source).await;
        });
        line
    }

    /// Passes a message on to its agent, at its own pace: messages overtake each other.
    fn deliver(&self, deliver: &mpsc::UnboundedSender<String>, text: &str) {
        let weather = self.weather();
        // A request that was taken and lost is a visitor's timeout, which nobody can help.
        let passage = match weather.passage() {
            Passage::Never if text.contains("http_request") => Passage::Once,
            passage => passage,
        };
        let times = match passage {
            Passage::Never => 0,
            Passage::Once => 1,
            Passage::Twice => 2,
        };
        for _ in 0..times {
            let (delay, deliver, text) = (weather.delay(), deliver.clone(), text.to_owned());
            self.spawn(async move {
                sleep(delay).await;
                // The agent may be gone.
                let _ = deliver.send(text);
            });
        }
    }

    async fn disconnected(&self, source: &EventSource) {
        let passage = self.weather().passage();
        if passage == Passage::Never {
            return;
        }
        sleep(self.weather().delay()).await;
        self.invoke(self.0.disconnect.handle(source.disconnect(1006, "")))
            .await;
        if passage == Passage::Twice {
            self.invoke(self.0.disconnect.handle(source.disconnect(1006, "")))
                .await;
        }
    }

    /// An agent's message. It does not wait for what comes of it.
    pub(crate) fn send(&self, from: &ConnectionId, message: &Value) {
        let Some(source) = self.lock().get(from).cloned() else {
            return;
        };
        let times = match self.weather().passage() {
            Passage::Never => 0,
            Passage::Once => 1,
            Passage::Twice => 2,
        };
        for _ in 0..times {
            let (cloud, delay) = (self.clone(), self.weather().delay());
            let event = source.message(message.to_string());
            self.spawn(async move {
                sleep(delay).await;
                cloud.invoke(cloud.0.default.handle(event)).await;
            });
        }
    }

    /// A visitor's request that must not be carried out twice.
    pub(crate) async fn visit(&self, number: usize) -> Answer {
        let which = usize::from(self.weather().one_in(2));
        let event = json!({
            "version": "2.0",
            "routeKey": "$default",
            "rawPath": format!("/{TUNNEL}/{number}"),
            "rawQueryString": "",
            "headers": { "host": "tunnel.example.com" },
            "requestContext": {
                "accountId": "1", "apiId": "1", "domainName": "tunnel.example.com", "domainPrefix": "tunnel",
                "http": { "method": "POST", "path": format!("/{TUNNEL}/{number}"), "protocol": "HTTP/1.1", "sourceIp": "192.0.2.2", "userAgent": "" },
                "requestId": number.to_string(), "routeKey": "$default", "stage": "$default",
                "time": "15/Jan/2026:10:00:05 +0000", "timeEpoch": 1_768_471_205_000_u64
            },
            "isBase64Encoded": false
        });
        let event = serde_json::from_value(event).expect("an event of the HTTP API");
        let answered = self.0.forwards[which]
            .handle(event, FUNCTION_TIMEOUT)
            .await
            .expect("an answer");
        let FunctionResponse::BufferedResponse(answer) = answered else {
            panic!("the HTTP API is answered as a whole");
        };
        let answer = serde_json::to_value(answer).expect("JSON");
        let code = answer["headers"]["x-tunnel-error"].as_str();
        Answer {
            status: u16::try_from(answer["statusCode"].as_u64().unwrap_or_default())
                .expect("a status"),
            code: code.map(str::to_owned),
        }
    }

    /// Held between awaits only.
    fn lock(&self) -> MutexGuard<'_, HashMap<ConnectionId, EventSource>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
