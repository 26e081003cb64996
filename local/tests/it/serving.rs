//! Who serves a tunnel, whatever is late, lost or repeated: the functions of the agents' side on real tables, step by step.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tunnel_connect::{Admission, Connect, Handshake, HandshakeRefusal, Purpose};
use tunnel_default::{DefaultRoute, DefaultRouteError};
use tunnel_disconnect::{Disconnect, Ended};
use tunnel_local_aws::{
    caller::AccessKey,
    dynamodb,
    management::{ConnectionCommand, ConnectionRegistry},
};
use tunnel_protocol::id::{ConnectionId, TunnelId};
use tunnel_service::{
    agent_path::{AgentPath, InProcess},
    auth::{AuthMode, AuthSettings, Credentials, owner::Owner, token::TokenHash},
    aws::sdk::{self, SdkConfig},
    now,
    replies::Replies,
    routing::Routing,
    tables::{
        connections::ConnectionsTable,
        tokens::{Token, TokensTable},
        tunnels::{Claim, NAME_LEASE, Online, Tunnel, TunnelsTable},
    },
};

const TUNNEL: &str = "my-app";
/// When the first connection was opened, in milliseconds since 1970.
const START_MS: u64 = 1_800_000_000_000;
/// As often as the SDK tries.
const ALL_ATTEMPTS: u32 = 3;

/// DynamoDB behind a network that carries calls there, and loses some of the answers.
#[derive(Clone)]
struct Lossy {
    engine: String,
    client: hyper_util::client::legacy::Client<
        hyper_util::client::legacy::connect::HttpConnector,
        http_body_util::Full<Bytes>,
    >,
    /// The call whose answers are lost, and how many of them are.
    losing: Arc<Mutex<(&'static str, u32)>>,
}

async fn carry(State(lossy): State<Lossy>, headers: HeaderMap, body: Bytes) -> Response {
    let target = headers["x-amz-target"].to_str().expect("text").to_owned();
    let mut request = http::Request::post(&lossy.engine)
        .body(http_body_util::Full::new(body))
        .expect("a request");
    for (name, value) in headers.iter().filter(|(name, _)| *name != "host") {
        request.headers_mut().append(name, value.clone());
    }
    let answer = lossy.client.request(request).await.expect("an answer");
    let mut losing = lossy.losing.lock().expect("not poisoned");
    if losing.1 > 0 && target.ends_with(losing.0) {
        losing.1 -= 1;
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    answer.map(axum::body::Body::new)
}

/// The service, with the connections between it and its agents in the hands of the test.
struct Service {
    sdk: SdkConfig,
    registry: ConnectionRegistry,
    queues: Mutex<HashMap<ConnectionId, mpsc::Receiver<ConnectionCommand>>>,
    connect: Connect,
    default: DefaultRoute,
    disconnect: Disconnect,
    opened: AtomicU32,
    lossy: Lossy,
    _serving: JoinSet<()>,
    _stop: tokio_util::sync::DropGuard,
}

/// The functions of the agents' side, with tables behind `sdk`.
fn functions(sdk: &SdkConfig, in_process: InProcess) -> (Connect, DefaultRoute, Disconnect) {
    let auth = AuthSettings {
        credentials: Credentials::Token,
        tokens_table: dynamodb::TOKENS.to_owned(),
    };
    let connect = tunnel_connect::Settings {
        auth,
        tunnels_table: dynamodb::TUNNELS.to_owned(),
        connections_table: dynamodb::CONNECTIONS.to_owned(),
        max_tunnel_ids: 3,
    };
    let default = tunnel_default::Settings {
        auth: AuthMode::Token,
        tokens_table: dynamodb::TOKENS.to_owned(),
        tunnels_table: dynamodb::TUNNELS.to_owned(),
        connections_table: dynamodb::CONNECTIONS.to_owned(),
        agent_path: AgentPath::InProcess(in_process),
        public_url: "https://tunnel.example.com".parse().expect("a URL"),
        routing: Routing::Path,
        visitor_sockets: None,
    };
    let disconnect = tunnel_disconnect::Settings {
        tunnels_table: dynamodb::TUNNELS.to_owned(),
        connections_table: dynamodb::CONNECTIONS.to_owned(),
        websockets: None,
    };
    (
        Connect::new(connect, sdk),
        DefaultRoute::new(default, sdk),
        Disconnect::new(disconnect, sdk),
    )
}

impl Service {
    async fn new() -> Self {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let engine = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let network = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let lossy = Lossy {
            engine: format!("http://{}", engine.local_addr().expect("an address")),
            client: hyper_util::client::legacy::Client::builder(
                hyper_util::rt::TokioExecutor::new(),
            )
            .build_http(),
            losing: Arc::default(),
        };
        let address = format!("http://{}", network.local_addr().expect("an address"));
        let sdk = sdk::for_loopback(&address, "test");
        dynamodb::serve(
            dynamodb::open(None).expect("a database"),
            engine,
            AccessKey::only("test"),
            &tasks,
            &stop,
        );
        let mut serving = JoinSet::new();
        let router = Router::new().fallback(carry).with_state(lossy.clone());
        serving.spawn(async move { axum::serve(network, router).await.expect("served") });
        dynamodb::create_tables(&aws_sdk_dynamodb::Client::new(&sdk))
            .await
            .expect("tables");
        for owner in ["ours", "theirs"] {
            let token = Token {
                hash: TokenHash::of(owner),
                name: owner.to_owned(),
                created_at: 0,
                expires_at: None,
                revoked: false,
            };
            let tokens = TokensTable::new(&sdk, dynamodb::TOKENS.to_owned());
            tokens.put(&token).await.expect("a token");
        }
        let registry = ConnectionRegistry::default();
        let in_process = InProcess {
            connections: Arc::new(registry.clone()),
            replies: Replies::default(),
            life: None,
        };
        let (connect, default, disconnect) = functions(&sdk, in_process);
        Self {
            connect,
            default,
            disconnect,
            sdk,
            registry,
            queues: Mutex::default(),
            opened: AtomicU32::new(0),
            lossy,
            _serving: serving,
            _stop: stop.drop_guard(),
        }
    }

    /// The next answers of a call are lost, though it is carried out.
    fn lose_answers(&self, call: &'static str, times: u32) {
        *self.lossy.losing.lock().expect("not poisoned") = (call, times);
    }

    async fn shake_hands(
        &self,
        owner: &str,
        name: &str,
        purpose: Purpose,
    ) -> (ConnectionId, Admission) {
        let connection: ConnectionId = format!("{name}=").parse().expect("an id");
        // Each is opened a second after the one before.
        let number = u64::from(self.opened.fetch_add(1, Ordering::Relaxed));
        let authorization = http::HeaderValue::from_str(&format!("Bearer {owner}"));
        let handshake = Handshake {
            connection: connection.clone(),
            connected_at: Duration::from_millis(START_MS + 1000 * number),
            headers: HeaderMap::from_iter([(
                http::header::AUTHORIZATION,
                authorization.expect("a value"),
            )]),
            purpose,
        };
        let admission = self.connect.serve(&handshake).await.expect("an answer");
        (connection, admission)
    }

    /// Opens a connection that asks for the tunnel.
    async fn open(&self, name: &str) -> ConnectionId {
        let purpose = Purpose::Serve(Some(TUNNEL.to_owned()));
        let (connection, admission) = self.shake_hands("ours", name, purpose).await;
        assert!(
            matches!(admission, Admission::Agent { .. }),
            "{admission:?}"
        );
        self.attach(&connection, 16);
        connection
    }

    /// From now on the connection can be reached, and holds so many messages that its agent has not read.
    fn attach(&self, connection: &ConnectionId, room: usize) {
        let (commands, queue) = mpsc::channel(room);
        self.registry.insert(connection.clone(), commands);
        let mut queues = self.queues.lock().expect("not poisoned");
        queues.insert(connection.clone(), queue);
    }

    /// The connection breaks, and the service is not told.
    fn break_off(&self, connection: &ConnectionId) {
        self.registry.remove(connection);
    }

    async fn say(&self, from: &ConnectionId, message: &Value) -> Result<u16, DefaultRouteError> {
        let answer = self.default.message(from, &message.to_string()).await?;
        Ok(answer.status_code)
    }

    async fn ready(&self, connection: &ConnectionId) {
        let ready = json!({ "type": "ready", "features": ["notices"] });
        self.say(connection, &ready).await.expect("handled");
    }

    async fn ping(&self, connection: &ConnectionId) {
        let ping = json!({ "type": "ping" });
        self.say(connection, &ping).await.expect("handled");
    }

    async fn end(&self, connection: &ConnectionId) {
        self.break_off(connection);
        let ended = Ended {
            connection: connection.clone(),
            code: Some(1006),
        };
        self.disconnect.serve(&ended).await.expect("handled");
    }

    /// The types of the messages that an agent was sent since it was asked last, and `closed`.
    fn heard(&self, connection: &ConnectionId) -> Vec<String> {
        let mut queues = self.queues.lock().expect("not poisoned");
        let queue = queues.get_mut(connection).expect("a connection");
        std::iter::from_fn(|| queue.try_recv().ok())
            .map(|command| match command {
                ConnectionCommand::Send(text) => {
                    let message: Value = serde_json::from_str(&text).expect("JSON");
                    message["type"].as_str().expect("a type").to_owned()
                }
                ConnectionCommand::Close(..) => "closed".to_owned(),
            })
            .collect()
    }

    fn tunnels(&self) -> TunnelsTable {
        TunnelsTable::new(&self.sdk, dynamodb::TUNNELS.to_owned())
    }

    fn tokens(&self) -> TokensTable {
        TokensTable::new(&self.sdk, dynamodb::TOKENS.to_owned())
    }

    fn connections(&self) -> ConnectionsTable {
        ConnectionsTable::new(&self.sdk, dynamodb::CONNECTIONS.to_owned())
    }

    async fn tunnel(&self) -> Tunnel {
        let tunnel = self.tunnels().get(&id(TUNNEL), now()).await;
        tunnel.expect("an answer").expect("a tunnel")
    }

    /// The connection that visitors' requests go to.
    async fn serving(&self) -> Option<ConnectionId> {
        Some(self.tunnel().await.online?.connection_id)
    }
}

fn id(name: &str) -> TunnelId {
    name.parse().expect("an id")
}

fn ours() -> Owner {
    Owner::Token(TokenHash::of("ours"))
}

#[tokio::test]
async fn a_connection_that_has_ended_does_not_take_its_tunnel_over() {
    let service = Service::new().await;
    let old = service.open("old").await;
    let new = service.open("new").await;
    service.ready(&new).await;
    let dead = service.open("dead").await;
    service.end(&dead).await;

    for late in [&old, &dead] {
        service.end(late).await;
        service.ready(late).await;
        service.ping(late).await;
    }

    assert_eq!(service.serving().await, Some(new.clone()));
    assert_eq!(service.heard(&new), ["connection_established"]);
}

#[tokio::test]
async fn an_older_connection_does_not_take_over_from_a_newer_one_and_is_notified() {
    let service = Service::new().await;
    let old = service.open("old").await;
    let new = service.open("new").await;
    service.ready(&new).await;
    service.ready(&old).await;

    assert_eq!(service.serving().await, Some(new.clone()));
    assert_eq!(service.heard(&old), ["connection_established", "replaced"]);
    assert!(!service.heard(&new).contains(&"replaced".to_owned()));
}

#[tokio::test]
async fn of_two_connections_of_one_millisecond_one_serves_in_whichever_order_they_are_ready() {
    for order in [["a", "b"], ["b", "a"]] {
        let service = Service::new().await;
        for name in ["a", "b"] {
            service.opened.store(0, Ordering::Relaxed);
            service.open(name).await;
        }
        for name in order {
            service
                .ready(&format!("{name}=").parse().expect("an id"))
                .await;
        }
        let serving = service.serving().await.expect("online");
        assert_eq!(serving.as_str(), "b=", "{order:?}");
    }
}

#[tokio::test]
async fn the_next_connection_of_an_agent_takes_over_whatever_the_clocks_say() {
    let service = Service::new().await;
    service.opened.store(60, Ordering::Relaxed);
    let ahead = service.open("ahead").await;
    service.ready(&ahead).await;
    service.opened.store(0, Ordering::Relaxed);
    let next = service.open("next").await;
    let ready = json!({ "type": "ready", "features": ["notices"], "previous": ahead.as_str() });
    service.say(&next, &ready).await.expect("handled");
    assert_eq!(service.serving().await, Some(next));
}

#[tokio::test]
async fn a_connection_that_breaks_before_it_is_notified_leaves_the_tunnel_to_the_one_before() {
    for features in [json!(["notices"]), json!([])] {
        let service = Service::new().await;
        let live = service.open("live").await;
        let rules = json!({ "allow": ["192.0.2.0/24"] });
        let ready = json!({ "type": "ready", "features": features, "access": rules });
        service.say(&live, &ready).await.expect("handled");
        let before = service.tunnel().await;
        let dead = service.open("dead").await;
        service.break_off(&dead);
        service.ready(&dead).await;

        assert_eq!(service.tunnel().await.online, before.online);
        assert_eq!(service.heard(&live), ["connection_established"]);
    }
}

#[tokio::test]
async fn a_connection_that_breaks_before_it_is_notified_leaves_no_tunnel_online() {
    let service = Service::new().await;
    let dead = service.open("dead").await;
    service.break_off(&dead);
    service.ready(&dead).await;
    assert_eq!(service.serving().await, None);
}

#[tokio::test]
async fn a_tunnel_is_offline_after_a_ready_and_a_disconnect_at_once() {
    let service = Service::new().await;
    for number in 0..40 {
        let connection = service.open(&format!("c{number}")).await;
        tokio::join!(
            async {
                // Somewhere within the other's steps.
                for _ in 0..number {
                    tokio::task::yield_now().await;
                }
                service.ready(&connection).await;
            },
            service.end(&connection),
        );
        assert_eq!(service.serving().await, None, "round {number}");
    }
}

#[tokio::test]
async fn a_ready_that_takes_the_tunnel_while_its_connection_is_ended_does_not_keep_it() {
    let service = Service::new().await;
    let connection = service.open("connection").await;
    service.connections().end(&connection).await.expect("ended");
    service.ready(&connection).await;
    assert_eq!(service.serving().await, None);
    // The function ended between its steps, and is called again.
    service.end(&connection).await;
    let recorded = service.connections().get(&connection, now()).await;
    assert_eq!(recorded.expect("an answer"), None);
}

#[tokio::test]
async fn a_write_that_is_repeated_late_makes_no_revoked_token_valid_again() {
    let service = Service::new().await;
    let tokens = service.tokens();
    let hash = TokenHash::of("ours");
    let token = tokens.good(&hash, now()).await.expect("an answer");
    let token = token.expect("a token that is valid");
    assert_eq!(tokens.revoke("ours").await.expect("an answer"), 1);
    // The first attempt of the write that made it, of which the second was answered.
    tokens.put(&token).await.expect("an answer");
    assert_eq!(tokens.good(&hash, now()).await.expect("an answer"), None);
    assert_eq!(tokens.revoke("ours").await.expect("an answer"), 0);
}

#[tokio::test]
async fn the_newest_connection_takes_over_at_its_next_ping_if_its_ready_had_no_effect() {
    let service = Service::new().await;
    let old = service.open("old").await;
    service.ready(&old).await;
    let new = service.open("new").await;
    service.ready(&new).await;
    // As if the older one had been written last.
    let (tunnel, tunnels) = (service.tunnel().await, service.tunnels());
    let online = tunnel.online.clone().expect("online");
    let wrong = Online {
        connection_id: old.clone(),
        connected_at_ms: START_MS,
        ..online
    };
    let is_written = tunnels
        .hand_over(
            &id(TUNNEL),
            Some(&new),
            &wrong,
            &tunnel.identity,
            &service.connections(),
            now(),
        )
        .await;
    assert!(is_written.expect("an answer"));
    service.heard(&old);

    service.ping(&new).await;

    assert_eq!(service.serving().await, Some(new));
    assert_eq!(service.heard(&old), ["replaced"]);
}

#[tokio::test]
async fn a_live_connection_takes_over_from_a_newer_one_that_broke_without_a_disconnect() {
    let service = Service::new().await;
    let live = service.open("live").await;
    service.ready(&live).await;
    let newer = service.open("newer").await;
    service.ready(&newer).await;
    service.heard(&live);
    service.break_off(&newer);

    service.ping(&live).await;

    assert_eq!(service.serving().await, Some(live.clone()));
    assert_eq!(service.heard(&live), ["pong"]);
}

#[tokio::test]
async fn a_connection_whose_replaced_was_lost_receives_it_in_answer_to_each_ping() {
    let service = Service::new().await;
    let old = service.open("old").await;
    service.attach(&old, 1);
    service.ready(&old).await;
    let new = service.open("new").await;
    // Its agent has not read, so there is no room for another message.
    service.ready(&new).await;
    assert_eq!(service.heard(&old), ["connection_established"]);

    for _ in 0..2 {
        service.ping(&old).await;
        assert_eq!(service.heard(&old), ["replaced"]);
    }
    service.ping(&new).await;
    assert!(service.heard(&new).ends_with(&["pong".to_owned()]));
}

#[tokio::test]
async fn only_the_connection_named_as_previous_is_left_in_peace() {
    let service = Service::new().await;
    let stranger = service.open("stranger").await;
    service.ready(&stranger).await;
    let first = service.open("first").await;
    service.ready(&first).await;
    let second = service.open("second").await;
    let ready = json!({ "type": "ready", "features": ["notices"], "previous": first.as_str() });
    service.say(&second, &ready).await.expect("handled");
    service.heard(&stranger);
    service.heard(&first);

    service.ping(&first).await;
    service.ping(&stranger).await;
    assert_eq!(service.heard(&first), ["pong"]);
    assert_eq!(service.heard(&stranger), ["replaced"]);

    let third = service.open("third").await;
    let ready = json!({ "type": "ready", "features": ["notices"], "previous": "another=" });
    service.say(&third, &ready).await.expect("handled");
    assert!(service.heard(&second).ends_with(&["replaced".to_owned()]));
}

#[tokio::test]
async fn an_agent_that_does_not_know_replaced_is_closed_at_its_ping() {
    let service = Service::new().await;
    let old = service.open("old").await;
    let bare = json!({ "type": "ready" });
    service.say(&old, &bare).await.expect("handled");
    let new = service.open("new").await;
    service.ready(&new).await;
    assert_eq!(service.heard(&old), ["connection_established", "closed"]);
    service.ping(&old).await;
    assert!(service.heard(&old).contains(&"closed".to_owned()));
}

#[tokio::test]
async fn a_live_tunnel_that_was_marked_offline_is_online_again_after_a_ping_as_it_was() {
    let service = Service::new().await;
    let connection = service.open("connection").await;
    let rules = json!({ "allow": ["192.0.2.0/24"] });
    let ready = json!({ "type": "ready", "features": ["notices", "cancel"], "access": rules });
    service.say(&connection, &ready).await.expect("handled");
    let before = service.tunnel().await.online;
    let tunnels = service.tunnels();
    let went = tunnels.mark_offline(&id(TUNNEL), &connection, now()).await;
    assert!(went.expect("an answer"));

    service.ping(&connection).await;

    assert!(before.is_some());
    assert_eq!(service.tunnel().await.online, before);
    assert_eq!(
        service.heard(&connection),
        ["connection_established", "pong"]
    );
}

#[tokio::test]
async fn a_connection_that_is_recorded_again_later_is_still_ready() {
    let service = Service::new().await;
    let connection = service.open("connection").await;
    service.ready(&connection).await;
    // The first attempt of a write whose second was answered.
    let purpose = Purpose::Serve(Some(TUNNEL.to_owned()));
    service.shake_hands("ours", "connection", purpose).await;
    let tunnels = service.tunnels();
    let went = tunnels.mark_offline(&id(TUNNEL), &connection, now()).await;
    assert!(went.expect("an answer"));

    service.ping(&connection).await;

    assert_eq!(service.serving().await, Some(connection));
}

#[tokio::test]
async fn a_connection_without_a_record_is_closed_at_its_next_message() {
    let service = Service::new().await;
    let connection: ConnectionId = "unknown=".parse().expect("an id");
    service.attach(&connection, 16);
    service.ping(&connection).await;
    service.ready(&connection).await;
    assert_eq!(service.heard(&connection), ["closed", "closed"]);
}

#[tokio::test]
async fn the_previous_connection_is_notified_although_the_answer_of_the_write_was_lost() {
    for lost in [1, ALL_ATTEMPTS - 1] {
        let service = Service::new().await;
        let old = service.open("old").await;
        service.ready(&old).await;
        let new = service.open("new").await;
        service.lose_answers("TransactWriteItems", lost);
        service.ready(&new).await;
        assert_eq!(service.serving().await, Some(new.clone()), "{lost}");
        assert_eq!(service.heard(&new), ["connection_established"], "{lost}");
        assert_eq!(
            service.heard(&old),
            ["connection_established", "replaced"],
            "{lost}"
        );
    }
}

#[tokio::test]
async fn after_a_write_of_unknown_outcome_the_next_pings_set_everything_right() {
    let service = Service::new().await;
    let old = service.open("old").await;
    service.ready(&old).await;
    let new = service.open("new").await;
    service.lose_answers("TransactWriteItems", ALL_ATTEMPTS);
    let ready = json!({ "type": "ready", "features": ["notices"] });
    assert!(service.say(&new, &ready).await.is_err());
    service.heard(&old);

    service.ping(&new).await;
    service.ping(&old).await;

    assert_eq!(service.serving().await, Some(new.clone()));
    assert_eq!(service.heard(&old), ["replaced"]);
    assert!(service.heard(&new).ends_with(&["pong".to_owned()]));
}

#[tokio::test]
async fn a_disconnect_marks_its_tunnel_offline_whichever_answer_is_lost() {
    for call in ["UpdateItem", "DeleteItem", "GetItem"] {
        for lost in [1, 2] {
            let service = Service::new().await;
            let connection = service.open("connection").await;
            service.ready(&connection).await;
            service.lose_answers(call, lost);
            service.end(&connection).await;
            assert_eq!(service.serving().await, None, "{lost} of {call}");
        }
    }
}

#[tokio::test]
async fn a_release_is_reported_and_notified_although_its_answer_was_lost() {
    let service = Service::new().await;
    let serving = service.open("serving").await;
    service.ready(&serving).await;
    let purpose = Purpose::Release(TUNNEL.to_owned());
    let (releasing, _) = service.shake_hands("ours", "releasing", purpose).await;
    service.attach(&releasing, 16);
    service.lose_answers("DeleteItem", 1);

    let release = json!({ "type": "release" });
    service.say(&releasing, &release).await.expect("handled");

    let mut queues = service.queues.lock().expect("not poisoned");
    let queue = queues.get_mut(&releasing).expect("a connection");
    let Ok(ConnectionCommand::Send(text)) = queue.try_recv() else {
        panic!("no answer")
    };
    drop(queues);
    let released: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(released["existed"], true);
    assert!(service.heard(&serving).contains(&"replaced".to_owned()));
}

#[tokio::test]
async fn a_ticket_admits_one_connection_though_the_first_answer_was_lost() {
    let service = Service::new().await;
    let ticket = service.connections().issue_ticket(now()).await;
    let ticket = ticket.expect("a ticket");
    service.lose_answers("UpdateItem", 1);
    for (name, is_admitted) in [("reply", true), ("thief", false)] {
        let (_, admission) = service
            .shake_hands(&ticket, name, Purpose::TakeReplies)
            .await;
        assert_eq!(
            admission == Admission::ReplyConnection,
            is_admitted,
            "{name}"
        );
    }
}

#[tokio::test]
async fn a_ticket_is_good_for_a_minute() {
    let service = Service::new().await;
    for (age, is_admitted) in [(50, true), (61, false)] {
        let issued = now() - Duration::from_secs(age);
        let ticket = service.connections().issue_ticket(issued).await;
        let ticket = ticket.expect("a ticket");
        let (_, admission) = service
            .shake_hands(&ticket, "reply", Purpose::TakeReplies)
            .await;
        assert_eq!(
            admission == Admission::ReplyConnection,
            is_admitted,
            "after {age} s"
        );
    }
}

#[tokio::test]
async fn two_authorization_fields_prove_nothing() {
    let service = Service::new().await;
    let mut headers = HeaderMap::new();
    for token in ["Bearer theirs", "Bearer ours"] {
        headers.append(
            http::header::AUTHORIZATION,
            http::HeaderValue::from_static(token),
        );
    }
    let handshake = Handshake {
        connection: "two=".parse().expect("an id"),
        connected_at: now(),
        headers,
        purpose: Purpose::Serve(None),
    };
    let admission = service.connect.serve(&handshake).await.expect("an answer");
    assert_eq!(
        admission,
        Admission::Refused(HandshakeRefusal::NotAuthorized)
    );
}

#[tokio::test]
async fn an_expired_id_goes_to_its_new_owner_without_what_the_old_one_left() {
    let service = Service::new().await;
    let connection = service.open("connection").await;
    let rules = json!({ "allow": ["192.0.2.0/24"] });
    let ready = json!({ "type": "ready", "features": ["notices"], "access": rules });
    service.say(&connection, &ready).await.expect("handled");
    let later = now() + NAME_LEASE + Duration::from_secs(60);
    let theirs = Owner::Token(TokenHash::of("theirs"));
    let tunnels = service.tunnels();

    let claim = tunnels.claim(&id(TUNNEL), &theirs, 0, now()).await;
    assert_eq!(claim.expect("an answer"), Claim::Taken);
    let claim = tunnels.claim(&id(TUNNEL), &theirs, 0, later).await;
    assert_eq!(claim.expect("an answer"), Claim::Owned);

    let tunnel = tunnels.get(&id(TUNNEL), later).await.expect("an answer");
    let tunnel = tunnel.expect("a tunnel");
    assert_eq!((tunnel.online, tunnel.since), (None, 0));
    assert_eq!(tunnel.identity.owner, theirs);
    // And the old owner's connection learns of it.
    service.heard(&connection);
    service.ping(&connection).await;
    assert_eq!(service.heard(&connection), ["replaced"]);
}

#[tokio::test]
async fn an_owner_has_no_more_ids_than_allowed_and_keeps_those_it_has() {
    let service = Service::new().await;
    let claim = async |owner: &str, name: &str| {
        let purpose = Purpose::Serve(Some(name.to_owned()));
        service.shake_hands(owner, name, purpose).await.1
    };
    for name in ["one", "two", "three"] {
        service.lose_answers("UpdateItem", 1);
        let admission = claim("ours", name).await;
        assert!(
            matches!(admission, Admission::Agent { .. }),
            "{admission:?}"
        );
    }
    let refused = Admission::Refused(HandshakeRefusal::TooManyTunnelIds(3));
    assert_eq!(claim("ours", "four").await, refused);
    assert!(matches!(
        claim("ours", "two").await,
        Admission::Agent { .. }
    ));
    assert!(matches!(
        claim("theirs", "four").await,
        Admission::Agent { .. }
    ));

    let tunnels = service.tunnels();
    let released = tunnels.release_owned(&id("one"), &ours(), now()).await;
    assert!(released.expect("an answer").is_some());
    assert!(matches!(
        claim("ours", "five").await,
        Admission::Agent { .. }
    ));
    assert_eq!(claim("ours", "six").await, refused);
}

#[tokio::test]
async fn two_agents_that_claim_an_owners_last_id_at_once_both_get_it() {
    let service = Service::new().await;
    let claim = async |name: &str, connection: String| {
        let purpose = Purpose::Serve(Some(name.to_owned()));
        service.shake_hands("ours", &connection, purpose).await.1
    };
    claim("one", "one".to_owned()).await;
    claim("two", "two".to_owned()).await;

    // The second looks the id up and counts in any relation to the first.
    for delay in 0..60 {
        let second = async {
            for _ in 0..delay {
                tokio::task::yield_now().await;
            }
            claim("last", format!("second-{delay}")).await
        };
        let (first, second) = tokio::join!(claim("last", format!("first-{delay}")), second);
        for admission in [first, second] {
            assert!(
                matches!(admission, Admission::Agent { .. }),
                "delay {delay}: {admission:?}"
            );
        }
        let (tunnels, last) = (service.tunnels(), id("last"));
        let released = tunnels.release_owned(&last, &ours(), now()).await;
        assert!(released.expect("an answer").is_some());
    }
}
