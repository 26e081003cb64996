//! Visitors' requests: route, find the tunnel, send to its agent, wait for the reply, answer.
//!
//! The life of a request is told by the files: [`visit`] reads what a front received, `exchange` sends it to the agent and
//! puts the reply together, [`reply`] waits for the reply's parts, [`answer`] gives it back to the front, and [`refusal`] is what
//! the visitor sees when any of that fails; `record` tells the log and CloudWatch.

pub mod answer;
mod exchange;
mod record;
pub mod refusal;
pub mod reply;
pub mod visit;

use std::sync::Arc;

use http::{HeaderValue, Method, Response, header};
use lambda_http::request::LambdaRequest;
use lambda_runtime::FunctionResponse;
use tokio_util::task::TaskTracker;
use tracing::error;
use tunnel_shared::{
    cloud::{
        connections::Connections,
        mailbox::Mailbox,
        sdk::SdkConfig,
        settings::{Faults, Variables},
        tunnels::Tunnels,
        websocket::{ManagementEndpoint, WebSocketApi},
    },
    routing::{PublicUrl, Route, Routing},
};

use crate::{
    answer::{Answer, AnswerBody, AnswerStream},
    record::Record,
    refusal::Refusal,
    visit::{BadEvent, Front, Visit},
};

/// The function: its settings and clients, made once per execution environment. Clones share everything.
#[derive(Clone, Debug)]
pub struct Forward(Arc<Parts>);

#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) tunnels: Tunnels,
    pub(crate) connections: Connections,
    pub(crate) mailbox: Mailbox,
    pub(crate) agents: WebSocketApi,
    public_url: PublicUrl,
    routing: Routing,
    /// The Lambda function's name; none outside Lambda.
    lambda: Option<String>,
    /// What outlives the visit that started it: uploads while the reply streams, and cancellations.
    pub(crate) tasks: TaskTracker,
}

impl Forward {
    /// Reads the settings.
    ///
    /// # Errors
    /// All variables that are missing or faulty.
    pub fn load(variables: Variables<'_>, sdk: &SdkConfig) -> Result<Self, Faults> {
        let tunnels = variables.required("TUNNELS_TABLE");
        let connections = variables.required("CONNECTIONS_TABLE");
        let mailbox = variables.required("PENDING_REQUESTS_TABLE");
        let endpoint = variables.required::<ManagementEndpoint>("WEBSOCKET_API_ENDPOINT");
        let public_url = variables.required("PUBLIC_URL");
        let routing = variables.optional("ROUTING", Routing::Path);
        let lambda = variables.given_by_lambda("AWS_LAMBDA_FUNCTION_NAME");
        variables.finish(|| {
            Some(Self(Arc::new(Parts {
                tunnels: Tunnels::new(sdk, tunnels?),
                connections: Connections::new(sdk, connections?),
                mailbox: Mailbox::new(sdk, mailbox?),
                agents: WebSocketApi::new(sdk, &endpoint?),
                public_url: public_url?,
                routing: routing?,
                lambda,
                tasks: TaskTracker::new(),
            })))
        })
    }

    /// Handles an event, and answers whole or streamed as the front that sent it wants.
    ///
    /// # Errors
    /// Only when the event is none of an HTTP front. Whatever else goes wrong is an answer.
    pub async fn handle(&self, event: LambdaRequest) -> Result<FunctionResponse<Answer, AnswerStream>, BadEvent> {
        let visit = Visit::from_event(event)?;
        let (front, is_head) = (visit.front, visit.method == Method::HEAD);
        let wants_html = visit.wants_html();
        let response = self.serve(visit).await;
        Ok(match front {
            Front::HttpApi(payload) => {
                let answer = match answer::buffer(response, payload, is_head).await {
                    Ok(answer) => answer,
                    Err(refusal) => answer::buffer(refusal.into_response(wants_html), payload, is_head).await.unwrap_or_default(),
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
        match Route::of(self.0.routing, &self.0.public_url, &visit.host, &visit.path) {
            Route::Tunnel { id, prefix, path } => {
                let mut record = Record::new(self.0.lambda.clone(), id.clone());
                match exchange::run(&self.0, visit, &id, &prefix, &path, &mut record).await {
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
                response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
                response
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
