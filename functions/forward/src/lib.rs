//! Visitors' requests: route, find the tunnel, send to its agent, wait for the reply, answer.
//!
//! The life of a request is told by the files: [`request`] reads what a front received, `lookup` finds the tunnel's connection and
//! with it whom the tunnel lets in, `rate_limit` counts what it has already,
//! `exchange` sends the request to the agent and puts the reply together, `reply` waits for the reply's parts, which come over
//! `reply_connection`, [`response`] gives it back to the front, and [`error`] is what the visitor sees when any of that fails;
//! `request_log` tells the log and CloudWatch. `status` answers owners who ask how their tunnel is.

pub mod error;
mod exchange;
mod lookup;
pub mod rate_limit;
mod reply;
mod reply_connection;
pub mod request;
mod request_log;
pub mod response;
mod status;

use std::{sync::Arc, time::Duration};

use http::{HeaderValue, Method, Response, header};
use lambda_http::request::LambdaRequest;
use lambda_runtime::FunctionResponse;
use tokio_util::task::TaskTracker;
use tracing::error;
use tunnel_protocol::id::ConnectionId;
use tunnel_service::{
    agents::{AgentConnections, InProcess, use_compression},
    auth::{AuthSettings, Authenticator},
    aws::sdk::SdkConfig,
    replies::Replies,
    routing::{PublicUrl, Route, Routing},
    settings::{SettingsError, Variables},
    tables::connections::ConnectionsTable,
    tables::mailbox::MailboxTable,
    tables::tunnels::TunnelsTable,
};

use crate::{
    error::ForwardError,
    lookup::Lookup,
    rate_limit::{MAX_CONCURRENT_REQUESTS, RateLimiter},
    reply::Source,
    reply_connection::ReplyConnection,
    request::{ANSWER_MARGIN, EventError, Ingress, VisitorRequest},
    request_log::RequestLog,
    response::{BufferedResponse, ResponseBody, ResponseStream},
    status::Status,
};

/// Where an owner asks how a tunnel is: its id follows.
const STATUS: &str = "/_status/";

/// The function: its settings and clients, made once per execution environment. Clones share everything.
#[derive(Clone, Debug)]
pub struct Forward(Arc<State>);

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) lookup: Lookup,
    pub(crate) throttle: RateLimiter,
    pub(crate) agents: AgentConnections,
    pub(crate) replies: Replies,
    reply_path: ReplyPath,
    status: Status,
    /// Request bodies are packed where it pays.
    pub(crate) packs: bool,
    /// The function URL, for visitors whose response is too long for the HTTP API.
    streaming_url: Option<PublicUrl>,
    /// The Lambda function's name; none outside Lambda.
    lambda: Option<String>,
    /// What outlives the visit that started it: uploads while the reply streams, and cancellations.
    pub(crate) tasks: TaskTracker,
}

/// How replies reach this process.
#[derive(Debug)]
enum ReplyPath {
    InProcess,
    Cloud {
        mailbox: MailboxTable,
        connections: ConnectionsTable,
        reply_connection: ReplyConnection,
    },
}

impl State {
    /// Where the reply to a request will come from, and the reply connection that the request is to name; only agents that
    /// `send_it_back` are told one.
    pub(crate) async fn reply_path(&self, send_it_back: bool) -> (Source, Option<ConnectionId>) {
        match &self.reply_path {
            ReplyPath::InProcess => (Source::InProcess, None),
            ReplyPath::Cloud {
                mailbox,
                connections,
                reply_connection,
            } => {
                let reply_to = if send_it_back {
                    reply_connection.id().await
                } else {
                    None
                };
                let (mailbox, connections) = (mailbox.clone(), connections.clone());
                (
                    Source::Cloud {
                        mailbox,
                        connections,
                        is_pushed: reply_to.is_some(),
                    },
                    reply_to,
                )
            }
        }
    }
}

impl Forward {
    /// Reads the settings. `in_process` is for a process that holds agents' connections itself.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn load(
        variables: Variables<'_>,
        sdk: &SdkConfig,
        in_process: Option<&InProcess>,
    ) -> Result<Self, SettingsError> {
        let auth = AuthSettings::read(&variables);
        let tunnels = variables.required("TUNNELS_TABLE");
        let connections = variables.required("CONNECTIONS_TABLE");
        let mailbox = variables.required("PENDING_REQUESTS_TABLE");
        let endpoint = variables.required::<String>("WEBSOCKET_API_ENDPOINT");
        let agents = AgentConnections::load(&variables, sdk, in_process);
        let public_url = variables.required("PUBLIC_URL");
        let routing = variables.or("ROUTING", Routing::Path);
        let streaming_url = variables.optional("STREAMING_URL");
        let at_once = variables.or("MAX_CONCURRENT_REQUESTS", MAX_CONCURRENT_REQUESTS);
        let per_second = variables.or("MAX_REQUESTS_PER_SECOND", 0);
        let lambda = variables.raw("AWS_LAMBDA_FUNCTION_NAME");
        let replies = in_process
            .map(|in_process| in_process.replies.clone())
            .unwrap_or_default();
        variables.finish(|| {
            let public_url: PublicUrl = public_url?;
            let (connections, mailbox) = (
                ConnectionsTable::new(sdk, connections?),
                MailboxTable::new(sdk, mailbox?),
            );
            let reply_path = match (in_process, endpoint?) {
                (Some(_), _) => ReplyPath::InProcess,
                (None, endpoint) => {
                    let reply_connection =
                        ReplyConnection::new(&endpoint, connections.clone(), replies.clone());
                    ReplyPath::Cloud {
                        mailbox,
                        connections,
                        reply_connection,
                    }
                }
            };
            let access = Authenticator::new(auth?, sdk);
            let (tunnels, agents) = (TunnelsTable::new(sdk, tunnels?), agents?);
            Some(Self(Arc::new(State {
                lookup: Lookup::new(tunnels.clone(), access.revalidator(), agents.clone()),
                throttle: RateLimiter::new(at_once?, per_second?),
                agents,
                replies,
                reply_path,
                packs: use_compression(in_process, &public_url),
                status: Status {
                    access,
                    tunnels,
                    public_url,
                    routing: routing?,
                },
                streaming_url: streaming_url?,
                lambda,
                tasks: TaskTracker::new(),
            })))
        })
    }

    /// Handles an event, and answers whole or streamed as the front that sent it wants. `time` is how long Lambda lets it.
    ///
    /// # Errors
    /// Only when the event is none of an HTTP front. Whatever else goes wrong is an answer.
    pub async fn handle(
        &self,
        event: LambdaRequest,
        time: Duration,
    ) -> Result<FunctionResponse<BufferedResponse, ResponseStream>, EventError> {
        let mut visit = VisitorRequest::from_event(event, self.0.streaming_url.as_ref())?;
        visit.response_timeout = visit
            .response_timeout
            .min(time.saturating_sub(ANSWER_MARGIN));
        let (front, is_head) = (visit.front, visit.method == Method::HEAD);
        let wants_html = visit.wants_html();
        let response = self.serve(visit).await;
        Ok(match front {
            Ingress::HttpApi(payload) => {
                let streaming_url = self.0.streaming_url.as_ref();
                let answer = match response::buffer(response, payload, is_head, streaming_url).await
                {
                    Ok(answer) => answer,
                    Err(refusal) => {
                        let response = refusal.into_response(wants_html);
                        response::buffer(response, payload, is_head, streaming_url)
                            .await
                            .unwrap_or_default()
                    }
                };
                // Once this returns the environment is frozen, and a cancellation would reach the agent much later.
                self.finish().await;
                FunctionResponse::BufferedResponse(answer)
            }
            Ingress::Streaming => FunctionResponse::StreamingResponse(response::stream(response)),
        })
    }

    /// Serves a visit. What cannot be served is answered with a [`ForwardError`].
    pub async fn serve(&self, visit: VisitorRequest) -> Response<ResponseBody> {
        let wants_html = visit.wants_html();
        let Status {
            routing,
            public_url,
            ..
        } = &self.0.status;
        match Route::of(*routing, public_url, &visit.host, &visit.path) {
            Route::Tunnel { id, prefix, path } => {
                let mut log = RequestLog::new(self.0.lambda.clone(), id.clone());
                // Boxed, as are the calls of AWS below it: without them it is small, and they are rare.
                match Box::pin(exchange::run(&self.0, visit, &id, &prefix, &path, &mut log)).await {
                    Ok(replying) => replying.into_response(log),
                    Err(refusal) => {
                        if let ForwardError::Internal(cause) = &refusal {
                            error!(tunnel = %id, error = &**cause as &dyn std::error::Error, "request failed");
                        }
                        log.refused(&refusal);
                        refusal.into_response(wants_html)
                    }
                }
            }
            Route::OwnOrigin { id, path } => {
                let query = visit
                    .query
                    .map(|query| format!("?{query}"))
                    .unwrap_or_default();
                let location = format!("{}{path}{query}", public_url.by_subdomain(&id));
                response::moved_permanently(&location)
            }
            Route::Own(path) if path == "/_health" => {
                let mut response = Response::new(response::whole(r#"{"status":"ok"}"#));
                response.headers_mut().insert(
                    header::CONTENT_TYPE,
                    HeaderValue::from_static("application/json"),
                );
                response
            }
            Route::Own(path)
                if path.starts_with(STATUS)
                    && matches!(visit.method, Method::GET | Method::HEAD) =>
            {
                let answer = self
                    .0
                    .status
                    .answer(&path[STATUS.len()..], &visit.headers)
                    .await;
                answer.unwrap_or_else(|refusal| {
                    if let ForwardError::Internal(cause) = &refusal {
                        error!(error = &**cause as &dyn std::error::Error, "status failed");
                    }
                    refusal.into_response(wants_html)
                })
            }
            Route::Own(_) | Route::None => ForwardError::NoSuchTunnel.into_response(wants_html),
        }
    }

    /// Waits for what visits have left behind, such as cancellations on their way to agents.
    pub async fn finish(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }
}
