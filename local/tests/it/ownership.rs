//! Whose a name is: kept over restarts, given up on request, asked after, and never anybody else's.

use std::{sync::Arc, time::Duration};

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use forwarder::{
    handshake::{self, HandshakeError},
    settings::{Secret, Settings},
    tunnel::TunnelError,
};
use http::{Request, StatusCode};
use local::{Options, Server};
use serde_json::json;
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet, time::timeout};
use tokio_tungstenite::tungstenite;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tunnel_connect::Connect;
use tunnel_default::DefaultRoute;
use tunnel_local_aws::{
    caller::AccessKey,
    dynamodb,
    management::{ConnectionCommand, ConnectionRegistry},
    quotas::Quotas,
};
use tunnel_protocol::id::TunnelId;
use tunnel_service::{
    agent_path::{AgentPath, InProcess},
    auth::{AuthMode, AuthSettings, Credentials, owner::Owner, token::TokenHash},
    aws::sdk,
    now,
    replies::Replies,
    routing::Routing,
};

use crate::harness::{
    Agent, Got, Origin, ScriptedAgent, agent, get, settings, stack, stack_with, visit,
};

/// A stack that asks for tokens and checks open connections this often, and two tokens.
async fn two_owners(recheck: Duration) -> (Server, String, String) {
    let quotas = Quotas {
        recheck,
        ..Quotas::default()
    };
    let mut stack = stack_with(Options {
        auth: AuthMode::Token,
        quotas,
        ..Options::default()
    })
    .await;
    let ours = stack.first_token.take().expect("a first token");
    let theirs = stack.create_token("theirs").await.expect("another token");
    (stack, ours, theirs)
}

/// Longer than any test: the connections are not checked by themselves.
const NEVER: Duration = Duration::from_secs(3600);
const OFTEN: Duration = Duration::from_millis(20);

fn with_token(stack: &Server, origin: &Origin, token: &str) -> Settings {
    Settings {
        token: Some(Secret::from(token.to_owned())),
        ..settings(stack, origin.address)
    }
}

fn id(name: &str) -> TunnelId {
    name.parse().expect("an id")
}

async fn owner_of(stack: &Server, name: &str) -> Option<Owner> {
    stack
        .tunnels()
        .get(&id(name), now())
        .await
        .expect("an answer")
        .map(|tunnel| tunnel.identity.owner)
}

/// The status with which a handshake is refused; 101 if it is not.
async fn handshake(stack: &Server, query: &str, token: &str) -> u16 {
    match ScriptedAgent::try_connect(stack, query, Some(token)).await {
        Ok(_) => 101,
        Err(tungstenite::Error::Http(response)) => response.status().as_u16(),
        Err(error) => panic!("{error}"),
    }
}

/// An agent without a wish for a name, that remembers in this file the one it gets.
fn forgetful(stack: &Server, origin: &Origin, file: &std::path::Path) -> Settings {
    Settings {
        tunnel_id: None,
        memory: Some(file.to_owned()),
        ..settings(stack, origin.address)
    }
}

#[tokio::test]
async fn an_agent_without_a_chosen_name_has_the_same_address_after_a_restart() {
    let (stack, origin, other) = (stack().await, Origin::echo().await, Origin::echo().await);
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("ttf/tunnels.toml");

    let first = Agent::online(forgetful(&stack, &origin, &file)).await;
    let beside = Agent::online(forgetful(&stack, &other, &file)).await;
    let twin = Agent::online(forgetful(&stack, &origin, &file)).await;
    assert!(
        first.url != beside.url && first.url != twin.url && beside.url != twin.url,
        "agents share a name"
    );
    assert_eq!(
        get(&first.url).await.status,
        StatusCode::OK,
        "its twin has taken its name"
    );

    let url = first.url.clone();
    for agent in [first, beside, twin] {
        agent.stop().await.expect("stopped as asked");
    }
    let again = Agent::online(forgetful(&stack, &origin, &file)).await;
    assert_eq!(again.url, url);
    again.stop().await.expect("stopped as asked");

    std::fs::write(&file, "spoilt").expect("written");
    let fresh = Agent::online(forgetful(&stack, &origin, &file)).await;
    assert_ne!(fresh.url, url);
}

#[tokio::test]
async fn a_remembered_name_that_now_has_another_owner_is_replaced_by_a_new_one() {
    let (stack, ours, theirs) = two_owners(NEVER).await;
    let origin = Origin::echo().await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("tunnels.toml");
    let mine = |token: &str| Settings {
        token: Some(Secret::from(token.to_owned())),
        ..forgetful(&stack, &origin, &file)
    };
    let first = Agent::online(mine(&ours)).await;
    let url = first.url.clone();
    first.stop().await.expect("stopped as asked");

    let second = Agent::online(mine(&theirs)).await;
    let new = second.url.clone();
    assert_ne!(new, url);
    second.stop().await.expect("stopped as asked");

    assert_eq!(
        Agent::online(mine(&theirs)).await.url,
        new,
        "the new one is remembered"
    );
    let chosen = Settings {
        tunnel_id: Some(id(url.rsplit('/').next().expect("a name"))),
        ..mine(&theirs)
    };
    assert!(
        matches!(
            Agent::start(chosen).ended().await,
            Err(TunnelError::NameTaken(_))
        ),
        "a chosen name is no remembered one"
    );
}

#[tokio::test]
async fn a_released_name_can_be_claimed_by_anyone_and_its_agent_exits() {
    let (stack, ours, theirs) = two_owners(NEVER).await;
    let (origin, other) = (Origin::echo().await, Origin::echo().await);
    let mut agent = Agent::online(with_token(&stack, &origin, &ours)).await;
    let name = id("my-app");

    let stranger = with_token(&stack, &other, &theirs);
    assert_eq!(
        handshake::release(&stranger, &name).await,
        Err(HandshakeError::NameTaken)
    );
    assert_eq!(
        handshake::release(&with_token(&stack, &other, "wrong"), &name).await,
        Err(HandshakeError::Unauthorized)
    );
    assert_eq!(
        get(&agent.url).await.status,
        StatusCode::OK,
        "a stranger has released it"
    );

    assert_eq!(
        handshake::release(&with_token(&stack, &origin, &ours), &name).await,
        Ok(true)
    );
    let Err(TunnelError::Replaced(reason)) = agent.ended().await else {
        panic!("the agent goes on without its name")
    };
    assert!(reason.contains("released"), "{reason}");
    assert_eq!(owner_of(&stack, "my-app").await, None);

    let new = Agent::online(stranger).await;
    assert_eq!(get(&new.url).await.status, StatusCode::OK);
    assert_eq!((origin.count(), other.count()), (1, 1));
}

#[tokio::test]
async fn releasing_an_unclaimed_name_says_so_and_claims_nothing() {
    let (stack, ours, _) = two_owners(NEVER).await;
    let origin = Origin::echo().await;
    assert_eq!(
        handshake::release(&with_token(&stack, &origin, &ours), &id("nobodys")).await,
        Ok(false)
    );
    assert_eq!(owner_of(&stack, "nobodys").await, None);

    // Whoever breaks off in between has claimed nothing either.
    drop(
        ScriptedAgent::try_connect(&stack, "?release=nobodys", Some(&ours))
            .await
            .expect("a connection"),
    );
    assert_eq!(owner_of(&stack, "nobodys").await, None);
}

#[tokio::test]
async fn an_old_agent_whose_name_is_released_is_closed() {
    let (stack, ours, _) = two_owners(NEVER).await;
    let origin = Origin::echo().await;
    let mut old = ScriptedAgent::try_connect(&stack, "?tunnel_id=my-app", Some(&ours))
        .await
        .expect("a connection");
    old.ready(&json!({ "type": "ready" })).await;
    assert_eq!(
        handshake::release(&with_token(&stack, &origin, &ours), &id("my-app")).await,
        Ok(true)
    );
    assert_eq!(old.close_code().await, 1000);
}

#[tokio::test]
async fn an_agent_is_notified_when_the_operator_releases_its_name() {
    let (stack, ours, _) = two_owners(OFTEN).await;
    let origin = Origin::echo().await;
    let mut agent = Agent::online(with_token(&stack, &origin, &ours)).await;

    assert!(
        stack
            .tunnels()
            .release(&id("my-app"))
            .await
            .expect("released")
    );

    assert!(matches!(agent.ended().await, Err(TunnelError::Replaced(_))));
    assert_eq!(
        owner_of(&stack, "my-app").await,
        None,
        "the agent has taken it again"
    );
}

async fn status(stack: &Server, name: &str, token: Option<&str>) -> Got {
    let request = Request::get(format!("{}/_status/{name}", stack.public_url));
    let request = token.into_iter().fold(request, |request, token| {
        request.header("authorization", format!("Bearer {token}"))
    });
    visit(request.body("".into()).expect("a request")).await
}

#[tokio::test]
async fn only_its_owner_can_see_the_status_of_a_tunnel() {
    let (stack, ours, theirs) = two_owners(NEVER).await;
    let origin = Origin::echo().await;
    let started = now().as_secs();
    let agent = Agent::online(with_token(&stack, &origin, &ours)).await;

    let got = status(&stack, "my-app", Some(&ours)).await;
    assert_eq!(
        (got.status, got.header("cache-control")),
        (StatusCode::OK, Some("no-store"))
    );
    let told: serde_json::Value = serde_json::from_slice(&got.body).expect("JSON");
    assert_eq!(
        (&told["tunnel_id"], &told["status"], &told["public_url"]),
        (&json!("my-app"), &json!("online"), &json!(agent.url))
    );
    let since = told["since_seconds"].as_u64().expect("a number");
    assert!((started..=now().as_secs()).contains(&since), "{told}");
    let text = told["since"].as_str().expect("a text");
    assert!(
        text.len() == "2026-01-01T00:00:00Z".len() && text.ends_with('Z') && text.starts_with("20"),
        "{text}"
    );

    for (token, name) in [
        (None, "my-app"),
        (None, "nobodys"),
        (Some("wrong"), "my-app"),
        (Some(""), "my-app"),
    ] {
        let got = status(&stack, name, token).await;
        assert_eq!(
            (got.status, got.error()),
            (StatusCode::UNAUTHORIZED, Some("unauthorized")),
            "{token:?} {name}"
        );
        assert!(got.header("www-authenticate").is_some());
    }
    let (theirs, unknown) = (
        status(&stack, "my-app", Some(&theirs)).await,
        status(&stack, "nobodys", Some(&theirs)).await,
    );
    assert_eq!(theirs.status, StatusCode::NOT_FOUND);
    assert_eq!(
        (theirs.status, &theirs.body, theirs.headers.len()),
        (unknown.status, &unknown.body, unknown.headers.len())
    );
    assert_eq!(
        status(&stack, "No/such", Some(&ours)).await.status,
        StatusCode::NOT_FOUND
    );

    assert_eq!(
        origin.count(),
        0,
        "a question about the tunnel reached the local service"
    );
}

#[tokio::test]
async fn the_status_of_a_tunnel_whose_agent_has_stopped_is_offline() {
    let (stack, ours, _) = two_owners(NEVER).await;
    let origin = Origin::echo().await;
    let agent = Agent::online(with_token(&stack, &origin, &ours)).await;
    agent.stop().await.expect("stopped as asked");
    let url = format!("{}/my-app", stack.public_url);
    assert_eq!(
        get(&url).await.status,
        StatusCode::SERVICE_UNAVAILABLE,
        "offline for everybody"
    );
    let told: serde_json::Value =
        serde_json::from_slice(&status(&stack, "my-app", Some(&ours)).await.body).expect("JSON");
    assert_eq!(told["status"], "offline");
}

#[tokio::test]
async fn if_agents_do_not_authenticate_anyone_may_see_the_status() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let _agent = agent(&stack, &origin).await;
    assert_eq!(status(&stack, "my-app", None).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_revoked_token_ends_its_open_connection_even_without_visitors() {
    let (stack, _, theirs) = two_owners(OFTEN).await;
    let origin = Origin::echo().await;
    let mut agent = Agent::online(with_token(&stack, &origin, &theirs)).await;
    assert_eq!(get(&agent.url).await.status, StatusCode::OK);

    assert_eq!(stack.tokens().revoke("theirs").await.expect("revoked"), 1);

    assert_eq!(agent.ended().await, Err(TunnelError::Unauthorized));
    let got = get(&agent.url).await;
    assert_eq!(
        (got.status, got.error()),
        (StatusCode::SERVICE_UNAVAILABLE, Some("tunnel_offline"))
    );
}

#[tokio::test]
async fn an_expired_token_ends_its_open_connection() {
    let (stack, _, _) = two_owners(OFTEN).await;
    let origin = Origin::echo().await;
    // Seconds are counted whole, so one second may be none.
    let token = stack
        .tokens()
        .create("brief", Some(Duration::from_secs(2)), now())
        .await
        .expect("a token");
    let mut agent = Agent::online(with_token(&stack, &origin, &token)).await;
    assert_eq!(agent.ended().await, Err(TunnelError::Unauthorized));
}

#[tokio::test]
async fn visitors_of_a_revoked_token_are_refused_and_its_agent_ends() {
    let (stack, _, theirs) = two_owners(NEVER).await;
    let origin = Origin::echo().await;
    let mut agent = Agent::online(with_token(&stack, &origin, &theirs)).await;

    stack.tokens().revoke("theirs").await.expect("revoked");

    let got = get(&agent.url).await;
    assert_eq!(
        (got.status, got.error()),
        (StatusCode::SERVICE_UNAVAILABLE, Some("tunnel_offline"))
    );
    assert_eq!(agent.ended().await, Err(TunnelError::Unauthorized));
    assert_eq!(origin.count(), 0);
}

#[tokio::test]
async fn an_agent_whose_token_was_revoked_is_closed_at_its_next_message() {
    let (stack, _, theirs) = two_owners(NEVER).await;
    let mut agents = Vec::new();
    for name in ["pings", "opens", "releases"] {
        agents.push(
            ScriptedAgent::try_connect(&stack, &format!("?tunnel_id={name}"), Some(&theirs))
                .await
                .expect("a connection"),
        );
    }
    agents[0].say(&json!({ "type": "ping" })).await;
    assert_eq!(agents[0].hear().await, json!({ "type": "pong" }));

    stack.tokens().revoke("theirs").await.expect("revoked");

    for (agent, word) in agents.iter_mut().zip(["ping", "ready", "release"]) {
        agent.say(&json!({ "type": word })).await;
        assert_eq!(agent.close_code().await, 1000, "{word}");
    }
    for name in ["pings", "opens", "releases"] {
        let tunnel = stack
            .tunnels()
            .get(&id(name), now())
            .await
            .expect("an answer")
            .expect("still its owner's");
        assert_eq!(tunnel.online, None, "{name}");
    }
}

/// The functions of the agents' side with an agent's connection between them, deployed again and again.
struct Deployment {
    sdk: sdk::SdkConfig,
    in_process: InProcess,
    sent: mpsc::Receiver<ConnectionCommand>,
    _stop: tokio_util::sync::DropGuard,
}

impl Deployment {
    async fn new() -> Self {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let sdk = sdk::for_loopback(
            &format!("http://{}", listener.local_addr().expect("an address")),
            "test",
        );
        dynamodb::serve(
            dynamodb::open(None).expect("a database"),
            listener,
            AccessKey::only("test"),
            &tasks,
            &stop,
        );
        dynamodb::create_tables(&aws_sdk_dynamodb::Client::new(&sdk))
            .await
            .expect("tables");
        let connections = ConnectionRegistry::default();
        let (commands, sent) = mpsc::channel(8);
        connections.insert(Self::connection(), commands);
        let in_process = InProcess {
            connections: Arc::new(connections),
            replies: Replies::default(),
            life: None,
        };
        Self {
            sdk,
            in_process,
            sent,
            _stop: stop.drop_guard(),
        }
    }

    fn connection() -> tunnel_protocol::id::ConnectionId {
        "L0SM9cOFvHcCIhw=".parse().expect("an id")
    }

    fn connect(&self) -> Connect {
        let settings = tunnel_connect::Settings {
            auth: AuthSettings {
                credentials: Credentials::Open,
                tokens_table: dynamodb::TOKENS.to_owned(),
            },
            tunnels_table: dynamodb::TUNNELS.to_owned(),
            connections_table: dynamodb::CONNECTIONS.to_owned(),
            max_tunnel_ids: 0,
        };
        Connect::new(settings, &self.sdk)
    }

    fn default_at(&self, public_url: &str) -> DefaultRoute {
        let settings = tunnel_default::Settings {
            auth: AuthMode::Open,
            tokens_table: dynamodb::TOKENS.to_owned(),
            tunnels_table: dynamodb::TUNNELS.to_owned(),
            connections_table: dynamodb::CONNECTIONS.to_owned(),
            agent_path: AgentPath::InProcess(self.in_process.clone()),
            public_url: public_url.parse().expect("a URL"),
            routing: Routing::Path,
            visitor_sockets: None,
        };
        DefaultRoute::new(settings, &self.sdk)
    }

    /// Lets the service at this address handle a message, and returns what the agent is told.
    async fn hears(
        &mut self,
        public_url: &str,
        message: &serde_json::Value,
    ) -> Vec<serde_json::Value> {
        let default = self.default_at(public_url);
        default
            .message(&Self::connection(), &message.to_string())
            .await
            .expect("handled");
        let mut told = Vec::new();
        while let Ok(ConnectionCommand::Send(text)) = self.sent.try_recv() {
            told.push(serde_json::from_str(&text).expect("JSON"));
        }
        told
    }
}

#[tokio::test]
async fn an_agent_is_notified_once_when_the_services_address_changes() {
    let event: ApiGatewayWebsocketProxyRequest =
        serde_json::from_str(include_str!("../../../events/connect.json")).expect("an event");
    let (old, new) = ("https://old.example.com", "https://new.example.com");
    let (ping, pong) = (json!({ "type": "ping" }), json!({ "type": "pong" }));
    for (features, is_told) in [(&["notices"][..], true), (&["cancel"], false)] {
        let mut service = Deployment::new().await;
        let connect = service.connect();
        assert_eq!(
            connect
                .handle(event.clone())
                .await
                .expect("handled")
                .status_code,
            200
        );
        let established = service
            .hears(old, &json!({ "type": "ready", "features": features }))
            .await;
        assert_eq!(established[0]["public_url"], format!("{old}/sample"));
        assert_eq!(service.hears(old, &ping).await, std::slice::from_ref(&pong));

        let told = service.hears(new, &ping).await;
        let expected = json!({ "type": "url_updated", "public_url": format!("{new}/sample") });
        assert_eq!(
            told,
            if is_told {
                vec![expected, pong.clone()]
            } else {
                vec![pong.clone()]
            }
        );
        assert_eq!(
            service.hears(new, &ping).await,
            std::slice::from_ref(&pong),
            "it is told twice"
        );
    }
}

/// How many names are fought for at once, and how often each.
const NAMES: usize = 25;
const ROUNDS: usize = 40;

/// What the owner of a name does in a round: comes and goes, opens its tunnel, moves it to another connection, or asks how it is.
async fn own(stack: &Server, name: &str, token: &str, round: usize) {
    let query = format!("?tunnel_id={name}");
    let connect = async || {
        ScriptedAgent::try_connect(stack, &query, Some(token))
            .await
            .expect("the owner is let in")
    };
    match round % 4 {
        0 => drop(connect().await),
        1 => assert_eq!(
            connect().await.ready(&json!({ "type": "ready" })).await["tunnel_id"],
            name
        ),
        2 => {
            let (mut first, mut second) = tokio::join!(connect(), connect());
            for connection in [&mut first, &mut second] {
                assert_eq!(
                    connection.ready(&json!({ "type": "ready" })).await["tunnel_id"],
                    name
                );
            }
        }
        _ => assert_eq!(
            status(stack, name, Some(token)).await.status,
            StatusCode::OK
        ),
    }
}

/// What somebody else tries meanwhile.
async fn covet(stack: &Server, name: &str, token: &str, own: &mut ScriptedAgent, round: usize) {
    match round % 5 {
        0 | 1 => assert_eq!(
            handshake(stack, &format!("?tunnel_id={name}"), token).await,
            409,
            "{name} was taken"
        ),
        2 => assert_eq!(
            handshake(stack, &format!("?release={name}"), token).await,
            409,
            "{name} could be released"
        ),
        3 => assert_eq!(
            status(stack, name, Some(token)).await.status,
            StatusCode::NOT_FOUND,
            "{name} was told of"
        ),
        // Over its own connection it can say what it likes: the name is what its handshake said.
        _ => {
            let established = own
                .ready(&json!({ "type": "ready", "tunnel_id": name, "public_url": name }))
                .await;
            assert_ne!(established["tunnel_id"], name);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_thousand_interleavings_a_name_keeps_its_owner() {
    let (stack, ours, theirs) = two_owners(Duration::from_millis(500)).await;
    let stack = Arc::new(stack);
    let mut names = JoinSet::new();
    for number in 0..NAMES {
        let (stack, ours, theirs) = (stack.clone(), ours.clone(), theirs.clone());
        names.spawn(async move {
            let (name, other) = (format!("ours-{number}"), format!("theirs-{number}"));
            assert_eq!(
                handshake(&stack, &format!("?tunnel_id={name}"), &ours).await,
                101
            );
            let mut their_own =
                ScriptedAgent::try_connect(&stack, &format!("?tunnel_id={other}"), Some(&theirs))
                    .await
                    .expect("let in");
            for round in 0..ROUNDS {
                tokio::join!(
                    own(&stack, &name, &ours, round),
                    covet(&stack, &name, &theirs, &mut their_own, round)
                );
            }
        });
    }
    // As long as a slow machine needs, with all the other tests beside it.
    timeout(Duration::from_secs(300), names.join_all())
        .await
        .expect("a thousand rounds");
    let (owner, stranger) = (
        Owner::Token(TokenHash::of(&ours)),
        Owner::Token(TokenHash::of(&theirs)),
    );
    for number in 0..NAMES {
        assert_eq!(
            owner_of(&stack, &format!("ours-{number}")).await.as_ref(),
            Some(&owner)
        );
        assert_eq!(
            owner_of(&stack, &format!("theirs-{number}")).await.as_ref(),
            Some(&stranger)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn if_many_agents_claim_a_free_name_at_once_one_owner_gets_it() {
    let (stack, ours, theirs) = two_owners(NEVER).await;
    let stack = Arc::new(stack);
    for number in 0..20 {
        let query = format!("?tunnel_id=free-{number}");
        let mut asking = JoinSet::new();
        for token in [&ours, &theirs, &ours, &theirs] {
            let (stack, query, token) = (stack.clone(), query.clone(), token.clone());
            asking.spawn(async move { (handshake(&stack, &query, &token).await, token) });
        }
        let mut admitted: Vec<String> = Vec::new();
        for (status, token) in asking.join_all().await {
            match status {
                101 => admitted.push(token),
                status => assert_eq!(status, 409),
            }
        }
        admitted.sort();
        admitted.dedup();
        let [winner] = &admitted[..] else {
            panic!("{} owners got {query}", admitted.len())
        };
        assert_eq!(
            owner_of(&stack, &format!("free-{number}")).await,
            Some(Owner::Token(TokenHash::of(winner)))
        );
    }
}
