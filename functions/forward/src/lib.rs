//! Visitors' requests: route, find the tunnel, send to its agent, wait for the reply, answer.
//!
//! The life of a request is told by the files: [`visit`] reads what a front received, `lookup` finds the tunnel's connection and
//! with it whom the tunnel lets in, `throttle` counts what it has already,
//! `exchange` sends the request to the agent and puts the reply together, `reply` waits for the reply's parts, which come over
//! `reply_connection`, [`answer`] gives it back to the front, and [`refusal`] is what the visitor sees when any of that fails;
//! `record` tells the log and CloudWatch. `status` answers owners who ask how their tunnel is.

pub mod answer;
mod exchange;
mod lookup;
mod record;
pub mod refusal;
mod reply;
mod reply_connection;
mod status;
pub mod throttle;
pub mod visit;

use std::{sync::Arc, time::Duration};

use http::{HeaderValue, Method, Response, header};
use lambda_http::request::LambdaRequest;
use lambda_runtime::FunctionResponse;
use tokio_util::task::TaskTracker;
use tracing::error;
use tunnel_shared::{
    cloud::{
        access::Access,
        connections::Connections,
        mailbox::Mailbox,
        replies::Replies,
        sdk::SdkConfig,
        settings::{Faults, Variables},
        tunnels::Tunnels,
        websocket::{InProcess, WebSocketApi, packing_pays},
    },
    id::ConnectionId,
    routing::{PublicUrl, Route, Routing},
};

use crate::{
    answer::{Answer, AnswerBody, AnswerStream},
    lookup::Lookup,
    record::Record,
    refusal::Refusal,
    reply::Source,
    reply_connection::ReplyConnection,
    status::Status,
    throttle::{AT_ONCE, Throttle},
    visit::{BadEvent, Front, HEAD_START, Visit},
};

/// Where an owner asks how a tunnel is: its id follows.
const STATUS: &str = "/_status/";

/// The function: its settings and clients, made once per execution environment. Clones share everything.
#[derive(Clone, Debug)]
pub struct Forward(Arc<Parts>);

#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) lookup: Lookup,
    pub(crate) throttle: Throttle,
    pub(crate) agents: WebSocketApi,
    pub(crate) replies: Replies,
    ways_back: WaysBack,
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
enum WaysBack {
    InProcess,
    Cloud {
        mailbox: Mailbox,
        connections: Connections,
        reply_connection: ReplyConnection,
    },
}

impl Parts {
    /// Where the reply to a request will come from, and the reply connection that the request is to name; only agents that
    /// `send_it_back` are told one.
    pub(crate) async fn way_back(&self, send_it_back: bool) -> (Source, Option<ConnectionId>) {
        match &self.ways_back {
            WaysBack::InProcess => (Source::InProcess, None),
            WaysBack::Cloud {
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
    ) -> Result<Self, Faults> {
        let access = Access::load(&variables, sdk);
        let tunnels = variables.required("TUNNELS_TABLE");
        let connections = variables.required("CONNECTIONS_TABLE");
        let mailbox = variables.required("PENDING_REQUESTS_TABLE");
        let endpoint = variables.required::<String>("WEBSOCKET_API_ENDPOINT");
        let agents = WebSocketApi::load(&variables, sdk, in_process);
        let public_url = variables.required("PUBLIC_URL");
        let routing = variables.optional("ROUTING", Routing::Path);
        let streaming_url = variables.possible("STREAMING_URL");
        let at_once = variables.optional("MAX_CONCURRENT_REQUESTS", AT_ONCE);
        let per_second = variables.optional("MAX_REQUESTS_PER_SECOND", 0);
        let lambda = variables.given_by_lambda("AWS_LAMBDA_FUNCTION_NAME");
        let replies = in_process
            .map(|in_process| in_process.replies.clone())
            .unwrap_or_default();
        variables.finish(|| {
            let public_url: PublicUrl = public_url?;
            let (connections, mailbox) = (
                Connections::new(sdk, connections?),
                Mailbox::new(sdk, mailbox?),
            );
            let ways_back = match (in_process, endpoint?) {
                (Some(_), _) => WaysBack::InProcess,
                (None, endpoint) => {
                    let reply_connection =
                        ReplyConnection::new(&endpoint, connections.clone(), replies.clone());
                    WaysBack::Cloud {
                        mailbox,
                        connections,
                        reply_connection,
                    }
                }
            };
            let (access, tunnels, agents) = (access?, Tunnels::new(sdk, tunnels?), agents?);
            Some(Self(Arc::new(Parts {
                lookup: Lookup::new(tunnels.clone(), access.standing().clone(), agents.clone()),
                throttle: Throttle::new(at_once?, per_second?),
                agents,
                replies,
                ways_back,
                packs: packing_pays(in_process, &public_url),
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
    ) -> Result<FunctionResponse<Answer, AnswerStream>, BadEvent> {
        let mut visit = Visit::from_event(event, self.0.streaming_url.as_ref())?;
        visit.patience = visit.patience.min(time.saturating_sub(HEAD_START));
        let (front, is_head) = (visit.front, visit.method == Method::HEAD);
        let wants_html = visit.wants_html();
        let response = self.serve(visit).await;
        Ok(match front {
            Front::HttpApi(payload) => {
                let streaming_url = self.0.streaming_url.as_ref();
                let answer = match answer::buffer(response, payload, is_head, streaming_url).await {
                    Ok(answer) => answer,
                    Err(refusal) => {
                        let response = refusal.into_response(wants_html);
                        answer::buffer(response, payload, is_head, streaming_url)
                            .await
                            .unwrap_or_default()
                    }
                };
                // Once this returns the environment is frozen, and a cancellation would reach the agent much later.
                self.finish().await;
                FunctionResponse::BufferedResponse(answer)
            }
            Front::Streaming => FunctionResponse::StreamingResponse(answer::stream(response)),
        })
    }

    /// Serves a visit. What cannot be served is answered with a [`Refusal`].
    pub async fn serve(&self, visit: Visit) -> Response<AnswerBody> {
        let wants_html = visit.wants_html();
        let Status {
            routing,
            public_url,
            ..
        } = &self.0.status;
        match Route::of(*routing, public_url, &visit.host, &visit.path) {
            Route::Tunnel { id, prefix, path } => {
                let mut record = Record::new(self.0.lambda.clone(), id.clone());
                // Boxed, as are the calls of AWS below it: without them it is small, and they are rare.
                match Box::pin(exchange::run(
                    &self.0,
                    visit,
                    &id,
                    &prefix,
                    &path,
                    &mut record,
                ))
                .await
                {
                    Ok(replying) => replying.into_response(record),
                    Err(refusal) => {
                        if let Refusal::Internal(cause) = &refusal {
                            error!(tunnel = %id, error = &**cause as &dyn std::error::Error, "request failed");
                        }
                        record.refused(&refusal);
                        refusal.into_response(wants_html)
                    }
                }
            }
            Route::Own(path) if path == "/_health" => {
                let mut response = Response::new(answer::whole(r#"{"status":"ok"}"#));
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
                    if let Refusal::Internal(cause) = &refusal {
                        error!(error = &**cause as &dyn std::error::Error, "status failed");
                    }
                    refusal.into_response(wants_html)
                })
            }
            Route::Own(_) | Route::None => Refusal::NoSuchTunnel.into_response(wants_html),
        }
    }

    /// Waits for what visits have left behind, such as cancellations on their way to agents.
    pub async fn finish(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }
}
