//! Visitors' requests: route, find the tunnel, send to its agent, wait for the reply, answer.
//!
//! The life of a request follows the files: [`request`] reads what a front received, `lookup` finds the tunnel's connection and
//! with it the visitor policy, `rate_limit` counts the requests that it already has, `first_message` is what the agent gets, `exchange`
//! sends it and the rest of its body, `reply` waits for the reply's parts, some of which come over `reply_connection`,
//! `response_body` gives them out, [`response`] puts them in the form that the front takes, and [`error`] is what the visitor sees
//! when any of that fails; `edge` is who is believed about a visitor; `request_log` is for the log and CloudWatch. `status` answers owners who ask how their tunnel is.

pub mod edge;
pub mod error;
mod exchange;
mod first_message;
mod login;
mod lookup;
mod pages;
pub mod rate_limit;
mod reply;
mod reply_connection;
pub mod request;
mod request_log;
pub mod response;
mod response_body;
mod status;

use std::{sync::Arc, time::Duration};

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use futures_util::{StreamExt, stream};
use http::{HeaderValue, Method, Response, header};
use lambda_http::request::LambdaRequest;
use lambda_runtime::FunctionResponse;
use tokio::time::{Instant, timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, warn};
use tunnel_protocol::id::TunnelId;
use tunnel_service::{
    agent_path::AgentPath,
    agents::AgentConnections,
    aside::aside,
    auth::{AuthSettings, Authenticator},
    aws::sdk::SdkConfig,
    replies::{Replies, ReplyPath},
    routing::{PublicUrl, Route, Routing},
    settings::{SettingsError, Variables},
    tables::connections::ConnectionsTable,
    tables::logins::LoginsTable,
    tables::tunnels::TunnelsTable,
};

use crate::{
    edge::EdgeSecrets,
    error::ForwardError,
    exchange::Visitor,
    login::{LoginCookie, LoginForm, Logins},
    lookup::Lookup,
    pages::{Home, Page},
    rate_limit::{MAX_CONCURRENT_REQUESTS, RateLimiter},
    reply_connection::ReplyConnection,
    request::{ANSWER_MARGIN, EventError, Ingress, Payload, VisitorRequest},
    request_log::RequestLog,
    response::{BufferedResponse, ResponseBody, ResponseStream},
    status::Status,
};

/// Where an owner asks how a tunnel is: its id follows.
const STATUS: &str = "/_status/";

/// How long a Lambda function keeps its visitor waiting for the end of a complete answer, because an upload goes on.
const MAX_UPLOAD_LINGER: Duration = Duration::from_secs(1);

/// What the function needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How owners who ask for a tunnel's status authenticate, as agents do.
    pub auth: AuthSettings,
    /// The name of the tunnels table.
    pub tunnels_table: String,
    /// The name of the connections table.
    pub connections_table: String,
    /// The way to agents, and of their replies.
    pub agent_path: AgentPath,
    /// Where visitors find the tunnels.
    pub public_url: PublicUrl,
    /// How public addresses name a tunnel.
    pub routing: Routing,
    /// The function URL, for visitors whose response is too long for the HTTP API.
    pub streaming_url: Option<PublicUrl>,
    /// Most requests of one tunnel at once; 0 means no limit.
    pub max_concurrent_requests: u32,
    /// Most new requests of one tunnel per second; 0 means no limit.
    pub max_requests_per_second: u32,
    /// By which CloudFront is known.
    pub edge_secrets: EdgeSecrets,
    /// Whether streamed answers without a body get one, of a line end.
    pub pad_empty_streams: bool,
    /// The Lambda function's name; `None` outside Lambda.
    pub lambda: Option<String>,
}

impl Settings {
    /// Reads the settings.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn read(variables: Variables<'_>) -> Result<Self, SettingsError> {
        let auth = AuthSettings::read(&variables);
        let tunnels_table = variables.required("TUNNELS_TABLE");
        let connections_table = variables.required("CONNECTIONS_TABLE");
        let agent_path = AgentPath::read(&variables);
        let public_url = variables.required("PUBLIC_URL");
        let routing = variables.or("ROUTING", Routing::Path);
        let streaming_url = variables.optional("STREAMING_URL");
        let max_concurrent = variables.or("MAX_CONCURRENT_REQUESTS", MAX_CONCURRENT_REQUESTS);
        let max_per_second = variables.or("MAX_REQUESTS_PER_SECOND", 0);
        let edge_secrets = variables.or("EDGE_SECRETS", EdgeSecrets::default());
        let pad_empty_streams = variables.or("PAD_EMPTY_STREAMS", false);
        let lambda = variables.raw("AWS_LAMBDA_FUNCTION_NAME");
        variables.finish(|| {
            Some(Self {
                auth: auth?,
                tunnels_table: tunnels_table?,
                connections_table: connections_table?,
                agent_path: agent_path?,
                public_url: public_url?,
                routing: routing?,
                streaming_url: streaming_url?,
                max_concurrent_requests: max_concurrent?,
                max_requests_per_second: max_per_second?,
                edge_secrets: edge_secrets?,
                pad_empty_streams: pad_empty_streams?,
                lambda,
            })
        })
    }
}

/// The function: its settings and clients, made once per execution environment. Clones share everything.
#[derive(Clone, Debug)]
pub struct Forward(Arc<State>);

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) lookup: Lookup,
    pub(crate) rate_limiter: RateLimiter,
    pub(crate) agents: AgentConnections,
    pub(crate) replies: Replies,
    pub(crate) reply_path: ReplyPath,
    /// Where agents send replies directly; `None` in a process that holds agents' connections itself.
    pub(crate) reply_connection: Option<ReplyConnection>,
    status: Status,
    pub(crate) use_compression: bool,
    /// The function URL, for visitors whose response is too long for the HTTP API.
    streaming_url: Option<PublicUrl>,
    edge: EdgeSecrets,
    pub(crate) logins: Logins,
    /// Whether streamed answers without a body get one, of a line end.
    pad_empty_streams: bool,
    /// The Lambda function's name; `None` outside Lambda.
    lambda: Option<String>,
    /// Messages on their way to agents, such as cancellations. They may outlive their request.
    pub(crate) tasks: TaskTracker,
    /// Uploads. They may outlive the reply to their request.
    pub(crate) uploads: TaskTracker,
    /// Cancelled when a streamed answer has broken off.
    broken_off: CancellationToken,
}

/// The tunnel that a request was for, if there is one of that name: an extension of the response.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServedTunnel(pub TunnelId);

/// Where a request goes: the tunnel, and the address within it.
#[derive(Clone, Debug)]
pub(crate) struct TunnelPath {
    pub(crate) tunnel: TunnelId,
    /// What the public path has before the tunnel's own; empty with a host name of the tunnel's own.
    pub(crate) prefix: String,
    /// The percent-encoded path.
    pub(crate) path: String,
}

impl Forward {
    /// Reads the settings and makes the function.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn load(variables: Variables<'_>, sdk: &SdkConfig) -> Result<Self, SettingsError> {
        Ok(Self::new(Settings::read(variables)?, sdk))
    }

    /// Makes the function.
    pub fn new(settings: Settings, sdk: &SdkConfig) -> Self {
        let agents = settings.agent_path.agents(sdk);
        let tunnels = TunnelsTable::new(sdk, settings.tunnels_table);
        let connections = ConnectionsTable::new(sdk, settings.connections_table);
        let authenticator = Authenticator::new(settings.auth, sdk);
        let logins = Logins::new(LoginsTable::new(&connections));
        let (replies, reply_connection) = match &settings.agent_path {
            AgentPath::InProcess(process) => (process.replies.clone(), None),
            AgentPath::Cloud(path) => {
                let replies = Replies::default();
                let connection =
                    ReplyConnection::new(&path.websocket_api, connections.clone(), replies.clone());
                (replies, Some(connection))
            }
        };
        Self(Arc::new(State {
            lookup: Lookup::new(tunnels.clone(), authenticator.revalidator(), agents.clone()),
            rate_limiter: RateLimiter::new(
                settings.max_concurrent_requests,
                settings.max_requests_per_second,
            ),
            agents,
            replies,
            reply_path: settings.agent_path.replies(sdk, connections),
            reply_connection,
            use_compression: settings.agent_path.use_compression(&settings.public_url),
            status: Status {
                authenticator,
                tunnels,
                public_url: settings.public_url,
                routing: settings.routing,
            },
            streaming_url: settings.streaming_url,
            edge: settings.edge_secrets,
            logins,
            pad_empty_streams: settings.pad_empty_streams,
            lambda: settings.lambda,
            tasks: TaskTracker::new(),
            uploads: TaskTracker::new(),
            broken_off: CancellationToken::new(),
        }))
    }

    /// Handles an event, and answers whole or streamed as the front that sent it wants. `time` is how long Lambda lets it run.
    ///
    /// # Errors
    /// Only when the event is not from an HTTP front. Whatever else goes wrong is an answer.
    pub async fn handle(
        &self,
        event: LambdaRequest,
        time: Duration,
    ) -> Result<FunctionResponse<BufferedResponse, ResponseStream>, EventError> {
        if let LambdaRequest::WebSocket(event) = event {
            let answer = self.handshake(event).await?;
            return Ok(FunctionResponse::BufferedResponse(answer));
        }
        let started = Instant::now();
        let mut request = Box::new(VisitorRequest::from_event(
            event,
            self.0.streaming_url.as_ref(),
        )?);
        self.0.edge.apply(&mut request);
        request.response_timeout = request
            .response_timeout
            .min(time.saturating_sub(ANSWER_MARGIN));
        Ok(match request.ingress {
            Ingress::HttpApi(payload) => {
                let deadline = started + request.response_timeout + ANSWER_MARGIN / 2;
                let answer = self.buffered(request, payload).await;
                // Once this returns the environment is frozen, and a cancellation would reach the agent much later. But no agent
                // that takes no messages may cost the visitor the answer.
                self.finish_by(deadline).await;
                FunctionResponse::BufferedResponse(answer)
            }
            Ingress::Streaming | Ingress::WebSocketApi => {
                let mut answer = response::stream(self.serve(request).await);
                if self.0.pad_empty_streams {
                    answer.stream = response::padded(answer.stream);
                }
                answer.stream = self.to_its_end(answer.stream, started + time);
                FunctionResponse::StreamingResponse(answer)
            }
        })
    }

    /// Answers a handshake at the visitors' WebSocket API: with a status, and the subprotocol that the local service chose.
    ///
    /// # Errors
    /// If the event is another one.
    pub async fn handshake(
        &self,
        event: ApiGatewayWebsocketProxyRequest,
    ) -> Result<BufferedResponse, EventError> {
        let mut request = Box::new(VisitorRequest::from_handshake(event)?);
        let deadline = Instant::now() + request.response_timeout + ANSWER_MARGIN;
        let response = if self.0.edge.apply(&mut request) {
            self.serve(request).await
        } else {
            let why = "only the edge leads to this address";
            ForwardError::NoUpgrade(why).into_response(false)
        };
        self.finish_by(deadline).await;
        Ok(response::handshake(&response))
    }

    async fn buffered(&self, request: Box<VisitorRequest>, payload: Payload) -> BufferedResponse {
        let is_head = request.method == Method::HEAD;
        let wants_html = request.wants_html();
        let streaming_url = self.0.streaming_url.as_ref();
        let response = self.serve(request).await;
        match response::buffer(response, payload, is_head, streaming_url).await {
            Ok(answer) => answer,
            Err(error) => {
                let response = error.into_response(wants_html);
                response::buffer(response, payload, is_head, streaming_url)
                    .await
                    .unwrap_or_default()
            }
        }
    }

    /// A streamed answer that ends when nothing is left to do for it: then the environment is frozen.
    ///
    /// One that breaks off does not end. The runtime would write the error into the body and end it as if it were complete, so
    /// [`Forward::broken_off`] is for the process to end itself.
    fn to_its_end(&self, answer: ResponseStream, deadline: Instant) -> ResponseStream {
        let start = (answer, self.clone());
        Box::pin(stream::unfold(
            start,
            move |(mut answer, function)| async move {
                match answer.next().await {
                    Some(Ok(bytes)) => Some((Ok(bytes), (answer, function))),
                    None => {
                        drop(answer);
                        function.finish_by(deadline).await;
                        None
                    }
                    Some(Err(error)) => {
                        drop(answer);
                        warn!(
                            error = &error as &dyn std::error::Error,
                            "a streamed answer broke off"
                        );
                        function.finish_by(deadline).await;
                        function.0.broken_off.cancel();
                        std::future::pending().await
                    }
                }
            },
        ))
    }

    /// Waits until a streamed answer has broken off. Its visitor sees that once the process has ended, which closes the connection
    /// that carries the answer.
    pub async fn broken_off(&self) {
        self.0.broken_off.cancelled().await;
    }

    /// Serves a request, which is boxed because it is long and goes from hand to hand. What cannot be served is answered with a
    /// [`ForwardError`].
    pub async fn serve(&self, mut request: Box<VisitorRequest>) -> Response<ResponseBody> {
        let Status {
            routing,
            public_url,
            ..
        } = &self.0.status;
        let mut route = Route::of(*routing, public_url, &request.host, &request.path);
        if let Some(redirect) = pages::final_slash(&route, &request) {
            return redirect;
        }
        let mut page = Page::of(*routing, public_url, &route, &request);
        let homes = std::mem::take(&mut page.homes);
        if request.upgrade.is_some() && !self.names_a_tunnel(&route).await {
            let home = self.first_tunnel(&homes).await;
            route = home.map_or(route, |home| home.clone().into_route());
        }
        pages::take_cookie(&mut request.headers, pages::COOKIE);
        request.login = LoginCookie::take(&mut request.headers);
        let wants_html = request.wants_html();
        let served = match &route {
            Route::Tunnel { id, .. } => Some(ServedTunnel(id.clone())),
            Route::OwnOrigin { .. } | Route::Own(_) | Route::None => None,
        };
        let mut response = match self.serve_route(request, route).await {
            Ok(mut response) => {
                page.mark(&mut response);
                response
            }
            Err(error @ ForwardError::NoSuchTunnel) => {
                let home = self.first_tunnel(&homes).await;
                return home
                    .and_then(Home::redirect)
                    .unwrap_or_else(|| error.into_response(wants_html));
            }
            Err(error) => error.into_response(wants_html),
        };
        if let Some(served) = served {
            response.extensions_mut().insert(served);
        }
        response
    }

    /// Whether an address is a tunnel's that exists.
    async fn names_a_tunnel(&self, route: &Route) -> bool {
        match route {
            Route::Tunnel { id, .. } => self.exists(id).await,
            Route::OwnOrigin { .. } => true,
            Route::Own(_) | Route::None => false,
        }
    }

    /// The first of these places that is a tunnel's.
    async fn first_tunnel<'h>(&self, homes: &'h [Home]) -> Option<&'h Home> {
        for home in homes {
            if self.exists(&home.id).await {
                return Some(home);
            }
        }
        None
    }

    /// Whether a tunnel exists. Where that cannot be looked up, serving the request will say so.
    async fn exists(&self, id: &TunnelId) -> bool {
        let found = self.0.lookup.find(id).await;
        !matches!(found, Err(ForwardError::NoSuchTunnel))
    }

    async fn serve_route(
        &self,
        request: Box<VisitorRequest>,
        route: Route,
    ) -> Result<Response<ResponseBody>, ForwardError> {
        let is_read = matches!(request.method, Method::GET | Method::HEAD);
        match route {
            Route::Tunnel { id, prefix, path } => {
                let path = TunnelPath {
                    tunnel: id,
                    prefix,
                    path,
                };
                self.serve_tunnel(request, path).await
            }
            Route::OwnOrigin { id, path } => {
                let query = request
                    .query
                    .map(|query| format!("?{query}"))
                    .unwrap_or_default();
                let own = self.0.status.public_url.by_subdomain(&id);
                Ok(response::moved_permanently(&format!("{own}{path}{query}")))
            }
            Route::Own(path) if path == "/_health" => Ok(health()),
            Route::Own(path) if path.starts_with(STATUS) && is_read => {
                let name = &path[STATUS.len()..];
                let answer = aside(|| self.0.status.answer(name, &request.headers)).await;
                answer.inspect_err(ForwardError::log_cause)
            }
            Route::Own(_) | Route::None => Err(ForwardError::NoSuchTunnel),
        }
    }

    async fn serve_tunnel(
        &self,
        request: Box<VisitorRequest>,
        path: TunnelPath,
    ) -> Result<Response<ResponseBody>, ForwardError> {
        let mut log = RequestLog::new(self.0.lambda.clone(), path.tunnel.clone());
        let span = log.span();
        let serve = async {
            let stranger = LoginForm::may_be(&request).then(|| Visitor::copy_of(&request));
            if let Some(visitor) = stranger
                && visitor.is_stranger(&self.0, &path.tunnel).await
            {
                return aside(|| self.log_in(request, &path, visitor)).await;
            }
            // Boxed, because it is long and is moved about.
            match Box::pin(exchange::run(&self.0, request, &path, &mut log)).await {
                Ok(replying) => Ok(replying.into_response(log)),
                Err(refusal) => {
                    log.failure_span().in_scope(|| refusal.log_cause());
                    log.refused(&refusal);
                    Err(refusal)
                }
            }
        };
        serve.instrument(span).await
    }

    /// Answers the form of the 401 page, or what was sent in its place.
    async fn log_in(
        &self,
        request: Box<VisitorRequest>,
        path: &TunnelPath,
        visitor: Visitor,
    ) -> Result<Response<ResponseBody>, ForwardError> {
        let page = login::Page::of(&request);
        let unauthorized = || ForwardError::Unauthorized(path.tunnel.clone());
        let form = LoginForm::read(request).await.ok_or_else(unauthorized)?;
        let logins = &self.0.logins;
        logins.count(&path.tunnel, visitor.address).await?;
        visitor
            .with(form.fields(&visitor.fields))
            .admitted(&self.0, &path.tunnel)
            .await?;
        logins.welcome(&form, path, &page).await
    }

    /// Changes the limits for requests that come from now on: those of one tunnel at once and per second; 0 means no limit.
    pub fn set_limits(&self, max_concurrent_requests: u32, max_requests_per_second: u32) {
        self.0
            .rate_limiter
            .set(max_concurrent_requests, max_requests_per_second);
    }

    /// Waits for what requests have left behind: uploads, and messages on their way to agents, such as cancellations.
    pub async fn finish(&self) {
        finish(&self.0.uploads).await;
        // Last, because an upload may leave messages behind.
        finish(&self.0.tasks).await;
    }

    /// [`Forward::finish`] for a Lambda function, whose visitor waits for it.
    async fn finish_by(&self, deadline: Instant) {
        // What is not done by then is done at the next event, or not at all: agents have limits of their own.
        let uploads_deadline = deadline.min(Instant::now() + MAX_UPLOAD_LINGER);
        let _ = timeout_at(uploads_deadline, finish(&self.0.uploads)).await;
        let _ = timeout_at(deadline, finish(&self.0.tasks)).await;
    }
}

/// Waits until all tasks have ended, those that are added meanwhile too.
async fn finish(tasks: &TaskTracker) {
    tasks.close();
    tasks.wait().await;
}

fn health() -> Response<ResponseBody> {
    let mut response = Response::new(response::whole(r#"{"status":"ok"}"#));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tunnel_service::aws::sdk;

    use super::*;
    use crate::response::ResponseBodyError;

    /// A function whose tables nothing here asks.
    fn function() -> Forward {
        let read = |name: &str| match name {
            "AUTH" => Some("open".to_owned()),
            "WEBSOCKET_API_ENDPOINT" => Some("wss://ws.example.com/v1".to_owned()),
            "PUBLIC_URL" => Some("https://tunnel.example.com".to_owned()),
            table if table.ends_with("_TABLE") => Some(table.to_owned()),
            _ => None,
        };
        let sdk = sdk::for_loopback("http://127.0.0.1:9", "key");
        Forward::load(Variables::new(read), &sdk).expect("settings")
    }

    fn answer(chunks: Vec<Result<&'static str, ForwardError>>) -> ResponseStream {
        let chunks = chunks.into_iter().map(|chunk| match chunk {
            Ok(text) => Ok(text.into()),
            Err(error) => Err(ResponseBodyError::from(error)),
        });
        Box::pin(stream::iter(chunks))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[tokio::test]
    async fn a_streamed_answer_that_breaks_off_neither_ends_nor_says_why_in_its_body() {
        let function = function();
        let chunks = vec![Ok("all there is"), Err(ForwardError::AgentLost)];
        let mut streamed = function.to_its_end(answer(chunks), soon());
        let first = streamed.next().await.expect("a chunk");
        assert_eq!(first.expect("bytes"), "all there is");
        assert!(function.broken_off().now_or_never().is_none());
        tokio::select! {
            next = streamed.next() => panic!("{next:?} looks like an end"),
            () = function.broken_off() => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_streamed_answer_ends_once_its_last_messages_are_out_but_in_time_and_soon_if_an_upload_goes_on()
     {
        for (posting_secs, uploading_secs, expected_secs) in
            [(3, 0, 3), (100, 0, 60), (0, 30, 1), (3, 30, 3)]
        {
            let function = function();
            let post = tokio::time::sleep(Duration::from_secs(posting_secs));
            function.0.tasks.spawn(post);
            let upload = tokio::time::sleep(Duration::from_secs(uploading_secs));
            function.0.uploads.spawn(upload);
            let started = Instant::now();
            let mut streamed = function.to_its_end(answer(vec![Ok("x")]), soon());
            while streamed.next().await.is_some() {}
            assert_eq!(started.elapsed().as_secs(), expected_secs);
            assert!(function.broken_off().now_or_never().is_none());
        }
    }
}
