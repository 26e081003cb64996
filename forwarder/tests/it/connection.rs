//! The agent against a service that says what a test wants it to say.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use forwarder::{
    Observer, event::Event, inspector::Inspector, session::SOLE_PING_MESSAGE_INTERVAL,
    settings::Settings, tunnel::TunnelError,
};
use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_tungstenite::{WebSocketStream, tungstenite::Message};
use tokio_util::sync::CancellationToken;
use tunnel_protocol::{
    id::RequestId,
    message::{
        self, AgentErrorCode, ConnectionEstablished, Feature, FromAgent, HttpRequest, Ready,
        ToAgent, Window,
    },
};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// A service that takes one connection after the other.
struct Service {
    listener: TcpListener,
    connections: usize,
}

struct Connection {
    socket: WebSocketStream<TcpStream>,
    ready: Ready,
    id: String,
}

impl Service {
    /// Its sockets hold little, so that an agent soon notices when it does not read.
    fn start() -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(16 * 1024).expect("set");
        socket
            .bind(SocketAddr::from(([127, 0, 0, 1], 0)))
            .expect("a port");
        Self {
            listener: socket.listen(16).expect("listening"),
            connections: 0,
        }
    }

    fn endpoint(&self) -> String {
        let address = self.listener.local_addr().expect("bound");
        format!("ws://{address}/ws")
    }

    async fn accept(&mut self) -> Connection {
        let accepted = async {
            let (stream, _) = self.listener.accept().await.expect("an agent");
            tokio_tungstenite::accept_async(stream)
                .await
                .expect("a handshake")
        };
        let socket = timeout(PATIENCE, accepted).await.expect("in time");
        self.connections += 1;
        let mut connection = Connection {
            socket,
            ready: Ready::default(),
            id: format!("c{}", self.connections),
        };
        match connection.hear().await {
            FromAgent::Ready(ready) => connection.ready = ready,
            other => panic!("{other:?}"),
        }
        connection
    }
}

impl Connection {
    async fn say(&mut self, message: &ToAgent) {
        let text = message::encode(message);
        self.socket.send(Message::text(text)).await.expect("sent");
    }

    async fn establish(&mut self, features: &[Feature], life: Option<Duration>) {
        let established = ConnectionEstablished {
            connection_id: self.id.parse().expect("an id"),
            tunnel_id: "my-app".parse().expect("an id"),
            public_url: "http://tunnel.example/my-app".to_owned(),
            subdomain_url: None,
            path_based_url: None,
            protocol: Some(message::VERSION),
            features: features.to_vec(),
            life_ms: life.map(|life| u64::try_from(life.as_millis()).expect("short")),
        };
        self.say(&ToAgent::ConnectionEstablished(established)).await;
    }

    async fn request(&mut self, id: &str) {
        self.say(&ToAgent::HttpRequest(HttpRequest {
            request_id: id.parse().expect("an id"),
            method: "GET".to_owned(),
            uri: "/".to_owned(),
            headers: http::HeaderMap::new(),
            upgrade: None,
            websocket: None,
            body: message::Body::default(),
            encoding: None,
            timestamp: 0,
            more: false,
            deadline_ms: 0,
            reply_to: None,
        }))
        .await;
    }

    /// Waits until the agent has read all that came before.
    async fn until_read(&mut self) {
        let unreadable = r#"{"type":"http_request","request_id":"unreadable"}"#;
        let sent = self.socket.send(Message::text(unreadable)).await;
        sent.expect("sent");
        assert_eq!(self.refusal().await, AgentErrorCode::InvalidRequest);
    }

    /// Waits until the agent can send nothing more, because nobody reads.
    async fn until_full(&mut self) {
        // More than a socket holds that nobody reads.
        let mut all = vec![0; 16 * 1024 * 1024];
        let (mut unread, mut unchanged) = (0, 0);
        while unchanged < 5 {
            sleep(Duration::from_millis(100)).await;
            let now = self.socket.get_ref().peek(&mut all).await.expect("open");
            assert!((1..all.len()).contains(&now), "{now}");
            unchanged = if now == unread { unchanged + 1 } else { 0 };
            unread = now;
        }
    }

    /// The agent's next message; `None` once it has said goodbye and was answered.
    async fn next(&mut self) -> Option<FromAgent> {
        loop {
            let message = timeout(PATIENCE, self.socket.next())
                .await
                .expect("in time");
            match message? {
                Ok(Message::Text(text)) => return Some(message::decode(&text).expect("a message")),
                // The library answers it when it is asked for more.
                Ok(_) => {}
                Err(error) => panic!("not closed but broken: {error}"),
            }
        }
    }

    async fn hear(&mut self) -> FromAgent {
        self.next().await.expect("open")
    }

    async fn response(&mut self) -> RequestId {
        match self.hear().await {
            FromAgent::HttpResponse(response) => response.request_id,
            other => panic!("{other:?}"),
        }
    }

    async fn refusal(&mut self) -> AgentErrorCode {
        self.refused().await.1
    }

    /// Which request is refused, and how.
    async fn refused(&mut self) -> (String, AgentErrorCode) {
        match self.hear().await {
            FromAgent::Error(error) => {
                let id = error.request_id.expect("of a request");
                (id.as_str().to_owned(), error.code)
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A local service that answers requests with as many bytes each.
struct Origin {
    address: SocketAddr,
    answered: Arc<AtomicUsize>,
    may_answer: Arc<Semaphore>,
    _tasks: JoinSet<()>,
}

impl Origin {
    async fn start(bytes: usize) -> Self {
        Self::that_answers(Semaphore::MAX_PERMITS, bytes).await
    }

    /// One that answers so many requests, and the others when `may_answer` has permits for them.
    async fn that_answers(requests: usize, bytes: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let answered = Arc::<AtomicUsize>::default();
        let may_answer = Arc::new(Semaphore::new(requests));
        let mut tasks = JoinSet::new();
        let count = answered.clone();
        let permits = may_answer.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(answer(stream, bytes, count.clone(), permits.clone()));
            }
        });
        Self {
            address,
            answered,
            may_answer,
            _tasks: tasks,
        }
    }

    fn answered(&self) -> usize {
        self.answered.load(Ordering::SeqCst)
    }
}

async fn answer(
    mut stream: TcpStream,
    bytes: usize,
    count: Arc<AtomicUsize>,
    may_answer: Arc<Semaphore>,
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    may_answer.acquire().await.expect("open").forget();
    count.fetch_add(1, Ordering::SeqCst);
    let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {bytes}\r\n\r\n");
    let _ = stream.write_all(head.as_bytes()).await;
    let _ = stream.write_all(&vec![b'x'; bytes]).await;
}

struct Agent {
    events: mpsc::UnboundedReceiver<Event>,
    stop: CancellationToken,
    running: JoinSet<Result<(), TunnelError>>,
}

impl Agent {
    fn start(service: &Service, origin: &Origin) -> Self {
        Self::with(settings(service, origin))
    }

    fn with(settings: Settings) -> Self {
        let (send, events) = mpsc::unbounded_channel();
        let observer: Observer = Arc::new(move |_, event| {
            let _ = send.send(event);
        });
        let stop = CancellationToken::new();
        let mut running = JoinSet::new();
        running.spawn(forwarder::run(
            vec![settings],
            observer,
            Inspector::default(),
            stop.clone(),
        ));
        Self {
            events,
            stop,
            running,
        }
    }

    async fn end(&mut self) -> Result<(), TunnelError> {
        timeout(PATIENCE, self.running.join_next())
            .await
            .expect("in time")
            .expect("one")
            .expect("no panic")
    }

    /// Waits for an event of a kind.
    async fn until(&mut self, is_it: impl Fn(&Event) -> bool) {
        let it = async { while !is_it(&self.events.recv().await.expect("running")) {} };
        timeout(PATIENCE, it).await.expect("in time");
    }

    fn has_finished_a_request(&mut self) -> bool {
        std::iter::from_fn(|| self.events.try_recv().ok()).any(|event| is_request(&event))
    }
}

fn settings(service: &Service, origin: &Origin) -> Settings {
    Settings {
        name: "test".to_owned(),
        tunnel_id: Some("my-app".parse().expect("an id")),
        target: origin.address.to_string().parse().expect("a target"),
        request_timeout: PATIENCE,
        compression: false,
        ..Settings::new(service.endpoint().parse().expect("an endpoint"))
    }
}

fn is_request(event: &Event) -> bool {
    matches!(event, Event::Request { .. })
}

fn is_draining(event: &Event) -> bool {
    matches!(event, Event::Draining { .. })
}

fn is_online(event: &Event) -> bool {
    matches!(event, Event::Online { .. })
}

/// A service that can be asked whether a connection serves.
const CONFIRMS_WITH_IDS: [Feature; 3] =
    [Feature::Notices, Feature::ConfirmReplaced, Feature::PingIds];

fn replaced() -> ToAgent {
    answered_replaced(None)
}

fn answered_replaced(id: Option<u32>) -> ToAgent {
    ToAgent::Replaced {
        reason: "another agent".to_owned(),
        id,
    }
}

fn ping(id: u32) -> FromAgent {
    FromAgent::Ping { id: Some(id) }
}

fn pong(id: u32) -> ToAgent {
    ToAgent::Pong { id: Some(id) }
}

/// Lets time pass for all timers, and for nothing else.
async fn advance(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

fn taken_over() -> Result<(), TunnelError> {
    Err(TunnelError::Replaced("another agent".to_owned()))
}

#[tokio::test]
async fn a_request_that_overtakes_the_first_answer_is_carried_out() {
    let mut service = Service::start();
    let origin = Origin::start(2).await;
    let _agent = Agent::start(&service, &origin);
    let mut connection = service.accept().await;
    connection.request("early").await;
    connection.establish(&[], None).await;
    assert_eq!(connection.response().await.as_str(), "early");
}

#[tokio::test]
async fn a_takeover_that_overtakes_the_first_answer_ends_the_agent() {
    let mut service = Service::start();
    let origin = Origin::start(2).await;
    let mut agent = Agent::start(&service, &origin);
    let mut connection = service.accept().await;
    connection.say(&replaced()).await;
    connection.establish(&[Feature::Notices], None).await;
    assert_eq!(connection.next().await, None);
    assert_eq!(agent.end().await, taken_over());
}

#[tokio::test]
async fn a_takeover_is_believed_when_the_service_confirms_it() {
    let mut service = Service::start();
    let origin = Origin::start(2).await;
    let mut agent = Agent::start(&service, &origin);
    let mut connection = service.accept().await;
    connection.establish(&CONFIRMS_WITH_IDS, None).await;
    // One that was on its way for long, and comes twice.
    connection.say(&replaced()).await;
    assert_eq!(connection.hear().await, ping(1));
    connection.say(&replaced()).await;
    assert_eq!(connection.hear().await, ping(2));
    connection.say(&answered_replaced(Some(1))).await;
    connection.say(&pong(2)).await;
    connection.request("still-served").await;
    assert_eq!(connection.response().await.as_str(), "still-served");
    // One that is true.
    connection.say(&replaced()).await;
    assert_eq!(connection.hear().await, ping(3));
    connection.request("before-the-answer").await;
    assert_eq!(connection.response().await.as_str(), "before-the-answer");
    connection.say(&answered_replaced(Some(3))).await;
    assert_eq!(connection.next().await, None);
    assert_eq!(agent.end().await, taken_over());
}

#[tokio::test]
async fn a_takeover_is_believed_when_a_service_without_ping_ids_says_it_again() {
    const PING: FromAgent = FromAgent::Ping { id: None };
    let mut service = Service::start();
    let origin = Origin::start(2).await;
    let mut agent = Agent::start(&service, &origin);
    let mut connection = service.accept().await;
    connection
        .establish(&[Feature::Notices, Feature::ConfirmReplaced], None)
        .await;
    // One that is not true any more.
    connection.say(&replaced()).await;
    assert_eq!(connection.hear().await, PING);
    connection.say(&ToAgent::Pong { id: None }).await;
    connection.request("still-served").await;
    assert_eq!(connection.response().await.as_str(), "still-served");
    // One that is true.
    connection.say(&replaced()).await;
    assert_eq!(connection.hear().await, PING);
    connection.say(&replaced()).await;
    assert_eq!(connection.next().await, None);
    assert_eq!(agent.end().await, taken_over());
}

#[tokio::test]
async fn a_ping_answered_late_or_with_a_takeover_leaves_no_doubt_behind() {
    for answer in [pong(2), answered_replaced(Some(3))] {
        let mut service = Service::start();
        let origin = Origin::start(2).await;
        let mut agent = Agent::start(&service, &origin);
        let mut connection = service.accept().await;
        connection.establish(&CONFIRMS_WITH_IDS, None).await;
        agent.until(is_online).await;
        advance(SOLE_PING_MESSAGE_INTERVAL).await;
        assert_eq!(connection.hear().await, ping(1));
        connection.say(&replaced()).await;
        assert_eq!(connection.hear().await, ping(2));
        // Of the two `ping`, the later one's answer counts, whichever comes first.
        connection.say(&pong(1)).await;
        connection.say(&replaced()).await;
        assert_eq!(connection.hear().await, ping(3));
        connection.say(&answer).await;
        if answer == pong(2) {
            connection.say(&answered_replaced(Some(2))).await;
            connection.request("still-served").await;
            assert_eq!(connection.response().await.as_str(), "still-served");
        } else {
            assert_eq!(connection.next().await, None);
            assert_eq!(agent.end().await, taken_over());
        }
    }
}

#[tokio::test]
async fn a_request_repeated_over_another_connection_is_not_carried_out_again() {
    let mut service = Service::start();
    let origin = Origin::start(2).await;
    let _agent = Agent::start(&service, &origin);
    let mut first = service.accept().await;
    first.establish(&[], None).await;
    first.request("once").await;
    assert_eq!(first.response().await.as_str(), "once");
    drop(first);
    let mut second = service.accept().await;
    second.establish(&[], None).await;
    second.request("once").await;
    assert_eq!(second.refusal().await, AgentErrorCode::InternalError);
    assert_eq!(origin.answered(), 1);
}

#[tokio::test]
async fn a_repeated_request_is_not_refused_as_one_that_may_be_sent_elsewhere() {
    let mut service = Service::start();
    let origin = Origin::that_answers(1, 2).await;
    let mut agent = Agent::with(Settings {
        max_concurrent: 1,
        ..settings(&service, &origin)
    });
    let mut old = service.accept().await;
    old.establish(&[], Some(Duration::from_secs(2))).await;
    old.request("once").await;
    assert_eq!(old.response().await.as_str(), "once");
    agent.until(is_request).await;
    old.request("pending").await;
    // The agent is full.
    old.request("once").await;
    old.request("other").await;
    let busy = AgentErrorCode::Busy;
    assert_eq!(old.refused().await, ("other".to_owned(), busy));
    let mut new = service.accept().await;
    new.establish(&[], None).await;
    new.request("once").await;
    let carried_out = AgentErrorCode::InternalError;
    assert_eq!(new.refused().await, ("once".to_owned(), carried_out));
    // The agent is stopping.
    agent.stop.cancel();
    agent.until(is_draining).await;
    agent.until(is_draining).await;
    old.request("once").await;
    old.request("another").await;
    assert_eq!(old.refused().await.0, "another");
    assert_eq!(origin.answered(), 1);
}

#[tokio::test]
async fn a_stopping_agent_says_whether_a_request_may_be_sent_elsewhere() {
    let mut service = Service::start();
    let origin = Origin::that_answers(0, 2).await;
    let mut agent = Agent::start(&service, &origin);
    let mut old = service.accept().await;
    old.establish(&[], Some(Duration::from_secs(2))).await;
    old.request("pending").await;
    old.until_read().await;
    let mut new = service.accept().await;
    new.establish(&[], None).await;
    agent.until(is_online).await;
    agent.until(is_online).await;
    new.request("pending-too").await;
    new.until_read().await;
    agent.stop.cancel();
    agent.until(is_draining).await;
    agent.until(is_draining).await;
    new.request("nowhere").await;
    assert_eq!(new.refusal().await, AgentErrorCode::Busy);
    old.request("elsewhere").await;
    assert_eq!(old.refusal().await, AgentErrorCode::Replaced);
}

#[tokio::test]
async fn a_takeover_does_not_restart_the_end_of_a_stopping_agent() {
    let mut service = Service::start();
    let origin = Origin::that_answers(0, 2).await;
    let mut agent = Agent::start(&service, &origin);
    let mut connection = service.accept().await;
    connection.establish(&[Feature::Notices], None).await;
    connection.request("pending").await;
    connection.until_read().await;
    agent.stop.cancel();
    agent.until(is_draining).await;
    connection.say(&replaced()).await;
    connection.request("elsewhere").await;
    assert_eq!(connection.refusal().await, AgentErrorCode::Replaced);
    origin.may_answer.add_permits(1);
    assert_eq!(connection.response().await.as_str(), "pending");
    assert_eq!(connection.next().await, None);
    assert_eq!(agent.end().await, Ok(()));
    let more = std::iter::from_fn(|| agent.events.try_recv().ok());
    assert_eq!(more.filter(is_draining).count(), 0);
}

#[tokio::test]
async fn a_second_reason_to_leave_gives_a_connection_no_more_time() {
    // The connection may take 10 s from the first reason on; 10 s from the second one would be 19.
    const BEFORE: Duration = Duration::from_secs(9);
    const AFTER: Duration = Duration::from_secs(2);
    for is_stopped in [true, false] {
        let mut service = Service::start();
        let origin = Origin::that_answers(0, 2).await;
        let mut agent = Agent::start(&service, &origin);
        let mut connection = service.accept().await;
        connection.establish(&[Feature::Notices], None).await;
        connection.request("pending").await;
        connection.until_read().await;
        let first = Instant::now();
        connection.say(&replaced()).await;
        connection.request("elsewhere").await;
        assert_eq!(connection.refusal().await, AgentErrorCode::Replaced);
        advance(BEFORE).await;
        if is_stopped {
            agent.stop.cancel();
            agent.until(is_draining).await;
        } else {
            connection.say(&replaced()).await;
            connection.until_read().await;
        }
        advance(AFTER).await;
        while connection.next().await.is_some() {}
        let took = first.elapsed();
        assert!(took < Duration::from_secs(19), "{took:?}");
        let expected = if is_stopped { Ok(()) } else { taken_over() };
        assert_eq!(agent.end().await, expected);
    }
}

/// The service has let the next connection take over from the agent that this one was replaced by, and has told that agent so: if
/// this one ended, too, nobody would be left.
#[tokio::test]
async fn an_agent_that_is_replaced_while_it_moves_serves_if_its_next_connection_may() {
    for (closes, answers) in [(false, true), (true, true), (false, false)] {
        let mut service = Service::start();
        let origin = Origin::that_answers(1, 2).await;
        let mut agent = Agent::start(&service, &origin);
        let mut old = service.accept().await;
        let features = [Feature::Notices];
        old.establish(&features, Some(Duration::from_secs(2))).await;
        agent.until(is_online).await;
        let mut new = service.accept().await;
        if closes {
            drop(old);
        } else {
            old.say(&replaced()).await;
            while old.next().await.is_some() {}
        }
        if !answers {
            // Whether it took over is not known.
            drop(new);
            new = service.accept().await;
        }
        new.establish(&features, None).await;
        new.request("a").await;
        assert_eq!(new.response().await.as_str(), "a");
    }
}

#[tokio::test]
async fn requests_of_both_connections_count_during_a_move() {
    let mut service = Service::start();
    let origin = Origin::that_answers(0, 2).await;
    let _agent = Agent::with(Settings {
        max_concurrent: 1,
        ..settings(&service, &origin)
    });
    let mut old = service.accept().await;
    old.establish(&[], Some(Duration::from_secs(2))).await;
    old.request("a").await;
    let mut new = service.accept().await;
    assert_eq!(
        new.ready.previous.as_ref().map(|id| id.as_str()),
        Some("c1")
    );
    new.establish(&[], None).await;
    new.request("b").await;
    assert_eq!(new.refusal().await, AgentErrorCode::Busy);
}

#[tokio::test]
async fn a_request_is_finished_when_the_socket_has_taken_it_and_stopping_loses_nothing() {
    const BYTES: usize = 2_000_000;
    let mut service = Service::start();
    let origin = Origin::start(BYTES).await;
    let mut agent = Agent::start(&service, &origin);
    let mut connection = service.accept().await;
    connection
        .establish(&[Feature::BodyParts, Feature::Window], None)
        .await;
    connection.request("long").await;
    let FromAgent::HttpResponse(head) = connection.hear().await else {
        panic!("not a response");
    };
    let mut received = head.body.0.len();
    agent.stop.cancel();
    let mut ended = false;
    while let Some(message) = connection.next().await {
        // What the agent would leave unread, were it gone.
        connection
            .say(&ToAgent::Window(Window {
                request_id: head.request_id.clone(),
                parts: 1000,
                reply_to: None,
            }))
            .await;
        let FromAgent::BodyPart(part) = message else {
            panic!("{message:?}");
        };
        if received < BYTES / 2 {
            assert!(!agent.has_finished_a_request(), "after {received} bytes");
        }
        received += part.body.0.len();
        ended |= !part.more;
    }
    assert!(ended);
    assert_eq!(received, BYTES);
    assert!(agent.has_finished_a_request());
    assert_eq!(agent.end().await, Ok(()));
}

#[tokio::test]
async fn a_stopping_agent_refuses_what_arrives_while_short_answers_wait_and_delivers_them() {
    const ANSWERS: usize = 100;
    let mut service = Service::start();
    let origin = Origin::start(4000).await;
    let mut agent = Agent::start(&service, &origin);
    let mut connection = service.accept().await;
    connection.establish(&[Feature::BodyParts], None).await;
    for number in 0..ANSWERS {
        connection.request(&format!("r{number}")).await;
    }
    for _ in 0..ANSWERS {
        agent.until(is_request).await;
    }
    agent.stop.cancel();
    agent.until(is_draining).await;
    connection.request("late").await;
    for _ in 0..ANSWERS {
        connection.response().await;
    }
    let late = ("late".to_owned(), AgentErrorCode::Busy);
    assert_eq!(connection.refused().await, late);
    assert_eq!(connection.next().await, None);
    assert_eq!(agent.end().await, Ok(()));
}

#[tokio::test]
async fn a_connection_that_takes_nothing_more_is_given_up_and_its_requests_make_room() {
    let mut service = Service::start();
    let origin = Origin::start(20_000_000).await;
    let mut agent = Agent::with(Settings {
        max_concurrent: 1,
        ..settings(&service, &origin)
    });
    let mut old = service.accept().await;
    old.establish(&[Feature::BodyParts], None).await;
    // It answers ping frames, so that no other is asked of it.
    let pong = Message::Pong(Vec::new().into());
    old.socket.send(pong).await.expect("sent");
    old.request("a").await;
    assert_eq!(old.response().await.as_str(), "a");
    // From here on its network swallows what is sent.
    old.until_full().await;
    tokio::time::pause();
    agent
        .until(|event| matches!(event, Event::Reconnecting { reason, .. } if reason.contains("nothing was heard")))
        .await;
    tokio::time::resume();
    let mut new = service.accept().await;
    new.establish(&[Feature::BodyParts], None).await;
    new.request("b").await;
    assert_eq!(new.response().await.as_str(), "b");
}
