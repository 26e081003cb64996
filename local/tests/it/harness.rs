//! What the stories are told with: a local service that records, a stack, an agent, a visitor.

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use forwarder::{event::Event, inspector::Inspector, settings::Settings, tunnel::TunnelError};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use local::{Options, Server, Transport};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{self, Message, client::IntoClientRequest, protocol::WebSocketConfig},
};
use tokio_util::sync::CancellationToken;
use tunnel_local_aws::quotas::Quotas;
use tunnel_protocol::headers::LONG_FRAMES;

/// Longer than anything takes here; only a test that is about to fail waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for what must come.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("timed out waiting for {what}"))
}

/// A stack on free ports that forgets all.
pub(crate) async fn stack() -> Server {
    stack_with(Options::default()).await
}

/// A stack on a free port, otherwise with these options.
pub(crate) async fn stack_with(options: Options) -> Server {
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    Server::start(Options {
        listen,
        transport: shape(),
        ..options
    })
    .await
    .expect("a stack")
}

/// A stack that handles the messages of a connection one after another, so that the answer to one shows that those before it have
/// been dealt with. Otherwise they are handled side by side, as in AWS.
pub(crate) async fn stack_in_order() -> Server {
    let quotas = Quotas {
        handled_at_once: 1,
        ..Quotas::default()
    };
    stack_with(Options {
        quotas,
        ..Options::default()
    })
    .await
}

/// The shape that this run of the suite is about: every story is told in both.
#[expect(clippy::disallowed_methods, reason = "the suite's own setting")]
pub(crate) fn shape() -> Transport {
    match std::env::var("TUNNEL_TEST_SHAPE").as_deref() {
        Ok("as-in-aws") => Transport::Emulated,
        _ => Transport::InProcess,
    }
}

pub(crate) type Answer = Response<BoxBody<Bytes, std::io::Error>>;
type Answering = dyn Fn(&Seen) -> Option<Answer> + Send + Sync;

/// What a local service saw.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

/// A local service that records what it sees.
pub(crate) struct Origin {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<VecDeque<Seen>>>,
    _serving: JoinSet<()>,
}

impl Origin {
    /// Answers with what `answering` returns; breaks the connection off where it returns nothing.
    pub(crate) async fn answering(
        answering: impl Fn(&Seen) -> Option<Answer> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let seen = Arc::new(Mutex::new(VecDeque::new()));
        let (answering, record): (Arc<Answering>, _) = (Arc::new(answering), seen.clone());
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (answering, record) = (answering.clone(), record.clone());
                connections.spawn(async move {
                    let service = service_fn(move |request| {
                        serve(request, answering.clone(), record.clone())
                    });
                    // A connection that breaks off is what some stories are about.
                    let _ = http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self {
            address,
            seen,
            _serving: serving,
        }
    }

    /// Echoes each request's body.
    pub(crate) async fn echo() -> Self {
        Self::answering(|seen| Some(reply(StatusCode::OK, seen.body.clone()))).await
    }

    /// The last request it saw.
    pub(crate) fn last(&self) -> Seen {
        self.seen
            .lock()
            .expect("not poisoned")
            .back()
            .cloned()
            .expect("a request")
    }

    /// How many requests it saw.
    pub(crate) fn count(&self) -> usize {
        self.seen.lock().expect("not poisoned").len()
    }
}

async fn serve(
    request: Request<Incoming>,
    answering: Arc<Answering>,
    record: Arc<Mutex<VecDeque<Seen>>>,
) -> Result<Answer, std::io::Error> {
    let (head, body) = request.into_parts();
    let body = body
        .collect()
        .await
        .map_err(std::io::Error::other)?
        .to_bytes();
    let seen = Seen {
        method: head.method,
        uri: head.uri,
        headers: head.headers,
        body,
    };
    record.lock().expect("not poisoned").push_back(seen.clone());
    answering(&seen).ok_or_else(|| std::io::Error::other("breaks off"))
}

/// An answer with this body.
pub(crate) fn reply(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(
        Full::new(body.into())
            .map_err(|never: Infallible| match never {})
            .boxed(),
    );
    *response.status_mut() = status;
    response
}

/// An answer with these header fields.
pub(crate) fn reply_with(
    status: StatusCode,
    fields: &[(&'static str, &[u8])],
    body: impl Into<Bytes>,
) -> Answer {
    let mut response = reply(status, body);
    for (name, value) in fields {
        response
            .headers_mut()
            .append(*name, HeaderValue::from_bytes(value).expect("a value"));
    }
    response
}

/// An agent in this process.
pub(crate) struct Agent {
    /// Where visitors reach the tunnel.
    pub(crate) url: String,
    events: mpsc::UnboundedReceiver<Event>,
    stop: CancellationToken,
    running: JoinSet<Result<(), TunnelError>>,
}

/// The settings of an agent that opens the tunnel `my-app` on `stack` for `target`.
pub(crate) fn settings(stack: &Server, target: SocketAddr) -> Settings {
    settings_for(&stack.endpoint, target)
}

/// The same for the service at `endpoint`.
pub(crate) fn settings_for(endpoint: &str, target: SocketAddr) -> Settings {
    Settings {
        name: "test".to_owned(),
        tunnel_id: Some("my-app".parse().expect("an id")),
        target: target.to_string().parse().expect("a target"),
        request_timeout: PATIENCE,
        ..Settings::new(endpoint.parse().expect("an endpoint"))
    }
}

impl Agent {
    /// Starts an agent that does not have to come online.
    pub(crate) fn start(settings: Settings) -> Self {
        Self::inspected(settings, Inspector::default())
    }

    /// The same, with an inspector.
    pub(crate) fn inspected(settings: Settings, inspector: Inspector) -> Self {
        let (send, events) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let mut running = JoinSet::new();
        let observing = inspector.clone();
        let observer: forwarder::Observer = Arc::new(move |tunnel, event| {
            observing.observe(tunnel, &event);
            let _ = send.send(event);
        });
        running.spawn(forwarder::run(
            vec![settings],
            observer,
            inspector,
            stop.clone(),
        ));
        Self {
            url: String::new(),
            events,
            stop,
            running,
        }
    }

    /// Starts an agent and waits until its tunnel is open.
    pub(crate) async fn online(settings: Settings) -> Self {
        let mut agent = Self::start(settings);
        agent.url = agent.until_online().await;
        agent
    }

    /// Waits until the tunnel is open, again, and returns its address.
    pub(crate) async fn until_online(&mut self) -> String {
        self.until("the tunnel to open", |event| match event {
            Event::Online { public_url, .. } => Some(public_url),
            _ => None,
        })
        .await
    }

    /// Waits for an event that `is_wanted`.
    pub(crate) async fn until<T>(
        &mut self,
        what: &str,
        is_wanted: impl Fn(Event) -> Option<T>,
    ) -> T {
        within(what, async {
            loop {
                let event = self.events.recv().await.expect("the agent to run");
                if let Some(wanted) = is_wanted(event) {
                    return wanted;
                }
            }
        })
        .await
    }

    /// Asks the agent to stop.
    pub(crate) fn stop_soon(&self) {
        self.stop.cancel();
    }

    /// Asks the agent to stop and returns how it ended.
    pub(crate) async fn stop(mut self) -> Result<(), TunnelError> {
        self.stop_soon();
        self.ended().await
    }

    /// Waits until the agent ends by itself.
    pub(crate) async fn ended(&mut self) -> Result<(), TunnelError> {
        within("the agent to end", self.running.join_next())
            .await
            .expect("one task")
            .expect("no panic")
    }
}

/// Opens the tunnel `my-app` for a local service.
pub(crate) async fn agent(stack: &Server, origin: &Origin) -> Agent {
    Agent::online(settings(stack, origin.address)).await
}

/// What a visitor got.
#[derive(Debug)]
pub(crate) struct Got {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Got {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The code of an answer of the tunnel's own.
    pub(crate) fn error(&self) -> Option<&str> {
        self.header("x-tunnel-error")
    }

    pub(crate) fn all(&self, name: &str) -> Vec<&[u8]> {
        self.headers
            .get_all(name)
            .iter()
            .map(HeaderValue::as_bytes)
            .collect()
    }
}

/// Visits an address with GET.
pub(crate) async fn get(url: &str) -> Got {
    visit(Request::get(url).body(Bytes::new()).expect("a request")).await
}

/// Visits an address with POST.
pub(crate) async fn post(url: &str, body: impl Into<Bytes>) -> Got {
    visit(Request::post(url).body(body.into()).expect("a request")).await
}

/// Makes one request over a connection of its own. Redirects are not followed.
pub(crate) async fn visit(request: Request<Bytes>) -> Got {
    within("an answer", try_visit(request))
        .await
        .expect("an answer")
}

/// Like [`visit`], for stories in which the connection breaks off.
pub(crate) async fn try_visit(request: Request<Bytes>) -> Result<Got, hyper::Error> {
    let (mut head, body) = request.into_parts();
    let authority = head.uri.authority().expect("an address").clone();
    head.uri = Uri::from(head.uri.into_parts().path_and_query.expect("a path"));
    head.headers
        .entry("host")
        .or_insert_with(|| HeaderValue::from_str(authority.as_str()).expect("a host"));
    let stream = TcpStream::connect(authority.as_str())
        .await
        .expect("a connection");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut driving = JoinSet::new();
    driving.spawn(connection);
    let (head, body) = sender
        .send_request(Request::from_parts(head, Full::new(body)))
        .await?
        .into_parts();
    Ok(Got {
        status: head.status,
        headers: head.headers,
        body: body.collect().await?.to_bytes(),
    })
}

/// Like [`get`], for stories in which the connection breaks off.
pub(crate) async fn try_get(url: &str) -> Result<Got, hyper::Error> {
    within(
        "an answer",
        try_visit(Request::get(url).body(Bytes::new()).expect("a request")),
    )
    .await
}

/// Sends bytes as they are to the stack's front and returns all that comes back until it closes.
pub(crate) async fn raw(stack: &Server, request: &[u8]) -> String {
    let authority = stack.public_url.to_string().split_off("http://".len());
    let mut stream = TcpStream::connect(authority).await.expect("a connection");
    stream.write_all(request).await.expect("sent");
    let mut answer = Vec::new();
    within("the connection to close", stream.read_to_end(&mut answer))
        .await
        .expect("read");
    String::from_utf8_lossy(&answer).into_owned()
}

/// The response 200 to a request.
pub(crate) fn response(request: &Value, body: &str) -> Value {
    response_with(request, body, &json!({}))
}

/// The same, with what `more` adds to the message.
pub(crate) fn response_with(request: &Value, body: &str, more: &Value) -> Value {
    let mut response = json!({ "type": "http_response", "request_id": request["request_id"], "status_code": 200, "headers": {}, "body": body });
    let fields = more.as_object().expect("an object").clone();
    response.as_object_mut().expect("an object").extend(fields);
    response
}

/// An agent that says what the story wants it to say; or the connection to one of ours, of a service that does.
pub(crate) struct ScriptedAgent(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl ScriptedAgent {
    /// Connects and opens a tunnel, as an agent that knows these features.
    pub(crate) async fn online(stack: &Server, tunnel_id: &str, features: &[&str]) -> Self {
        let mut agent = Self::connect(stack, &format!("?tunnel_id={tunnel_id}")).await;
        let mut ready = json!({ "type": "ready" });
        if !features.is_empty() {
            ready["features"] = json!(features);
        }
        let established = agent.ready(&ready).await;
        assert_eq!(
            established["type"], "connection_established",
            "{established}"
        );
        agent
    }

    /// Connects without saying anything.
    pub(crate) async fn connect(stack: &Server, query: &str) -> Self {
        Self::try_connect(stack, query, None)
            .await
            .expect("a connection")
    }

    /// Tries to connect.
    pub(crate) async fn try_connect(
        stack: &Server,
        query: &str,
        token: Option<&str>,
    ) -> Result<Self, tungstenite::Error> {
        let mut request = format!("{}{query}", stack.endpoint).into_client_request()?;
        if let Some(token) = token {
            request.headers_mut().insert(
                "authorization",
                HeaderValue::from_str(&format!("Bearer {token}")).expect("a value"),
            );
        }
        tokio_tungstenite::connect_async(request)
            .await
            .map(|(socket, _)| Self(socket))
    }

    /// Connects without saying anything, as an agent whose binary messages come in one frame each. Returns whether the service agrees.
    pub(crate) async fn with_long_frames(stack: &Server) -> (Self, bool) {
        let mut request = (&*stack.endpoint).into_client_request().expect("a request");
        request
            .headers_mut()
            .insert(LONG_FRAMES, HeaderValue::from_static("yes"));
        let connected = tokio_tungstenite::connect_async(request).await;
        let (socket, answer) = connected.expect("a connection");
        (Self(socket), answer.headers().contains_key(LONG_FRAMES))
    }

    /// Connects without saying anything, and takes no frames that are longer than this.
    pub(crate) async fn for_frames_of(stack: &Server, longest: usize) -> Self {
        let config = WebSocketConfig::default().max_frame_size(Some(longest));
        let address = &*stack.endpoint;
        let connected = tokio_tungstenite::connect_async_with_config(address, Some(config), false);
        Self(connected.await.expect("a connection").0)
    }

    /// Whether the next message can be read.
    pub(crate) async fn can_read(&mut self) -> bool {
        let next = within("a message", self.0.next()).await;
        next.is_some_and(|message| message.is_ok())
    }

    /// Connects to this address over a connection that is open already.
    pub(crate) async fn over(stream: TlsStream<TcpStream>, address: &str) -> Self {
        let stream = MaybeTlsStream::Rustls(stream);
        let (socket, _) = tokio_tungstenite::client_async(address, stream)
            .await
            .expect("a handshake");
        Self(socket)
    }

    pub(crate) async fn send(&mut self, message: impl Into<Message>) {
        self.0.send(message.into()).await.expect("sent");
    }

    pub(crate) async fn say(&mut self, json: &Value) {
        self.send(Message::text(json.to_string())).await;
    }

    /// The next message of the service.
    pub(crate) async fn hear(&mut self) -> Value {
        match self.hear_anything().await {
            Some(Message::Text(text)) => serde_json::from_str(&text).expect("JSON"),
            other => panic!("heard {other:?}"),
        }
    }

    /// The next message of the service, which is binary.
    pub(crate) async fn hear_binary(&mut self) -> Bytes {
        match self.hear_anything().await {
            Some(Message::Binary(bytes)) => bytes,
            other => panic!("heard {other:?}"),
        }
    }

    /// The close code with which the service ends the connection.
    pub(crate) async fn close_code(&mut self) -> u16 {
        loop {
            match self.hear_anything().await {
                Some(Message::Close(frame)) => {
                    return frame.map_or(1005, |frame| frame.code.into());
                }
                Some(_) => {}
                None => panic!("ended without a close frame"),
            }
        }
    }

    async fn hear_anything(&mut self) -> Option<Message> {
        // Pings are no message, however long they go on.
        within("a message", async {
            loop {
                match self.0.next().await {
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    Some(Ok(message)) => return Some(message),
                    Some(Err(error)) => panic!("the connection broke: {error}"),
                    None => return None,
                }
            }
        })
        .await
    }

    /// The next message of this type, past whatever else comes before it.
    pub(crate) async fn hear_type(&mut self, message_type: &str) -> Value {
        loop {
            let heard = self.hear().await;
            if heard["type"] == message_type {
                return heard;
            }
        }
    }

    /// What a visitor gets whose request the agent answers with these messages.
    pub(crate) async fn answer(
        &mut self,
        url: &str,
        messages: impl FnOnce(&Value) -> Vec<Value>,
    ) -> Got {
        let (got, ()) = tokio::join!(get(url), async {
            let request = self.hear_type("http_request").await;
            for message in messages(&request) {
                self.say(&message).await;
            }
        });
        got
    }

    /// Asks a question and expects its answer next: the service has sent nothing before it.
    pub(crate) async fn expect_quiet(&mut self, otherwise: &str) {
        self.say(&json!({ "type": "ping" })).await;
        assert_eq!(self.hear().await, json!({ "type": "pong" }), "{otherwise}");
    }

    /// As a service: tells the agent that its tunnel is open.
    pub(crate) async fn establish(&mut self, tunnel_id: &str, features: &[&str]) {
        let url = format!("https://tunnel.example.com/{tunnel_id}");
        self.say(&json!({ "type": "connection_established", "connection_id": "c=", "tunnel_id": tunnel_id, "public_url": url, "features": features })).await;
    }

    /// Becomes ready with these words and returns what the service answers.
    pub(crate) async fn ready(&mut self, ready: &Value) -> Value {
        self.say(ready).await;
        self.hear().await
    }
}

/// A service that says what the story wants it to say.
pub(crate) struct ScriptedService {
    /// Where agents connect.
    pub(crate) endpoint: String,
    listener: TcpListener,
}

impl ScriptedService {
    pub(crate) async fn listening() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        Self {
            endpoint: format!("ws://{}/_ws", listener.local_addr().expect("an address")),
            listener,
        }
    }

    /// The next agent's connection.
    pub(crate) async fn accept(&self) -> ScriptedAgent {
        let (stream, _) = within("an agent", self.listener.accept())
            .await
            .expect("a connection");
        ScriptedAgent(
            tokio_tungstenite::accept_async(MaybeTlsStream::Plain(stream))
                .await
                .expect("a handshake"),
        )
    }
}
