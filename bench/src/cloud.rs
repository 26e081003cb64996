//! Starts the whole stand-in for AWS.

use std::{path::Path, pin::Pin, sync::Arc};

use anyhow::Context;
use axum::Router;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tunnel_local_aws::{caller::AccessKey, dynamodb, management::STAGE};
use tunnel_service::{aws::sdk, now, tables::tokens::TokensTable};

use crate::{
    lambda::{self, Lambda},
    latency::Latency,
    meter::Meter,
    tables::{self, Tables},
    visitors::{self, Fronts},
    websocket::{self, AgentConnections},
};

/// The executables of the functions.
pub const FUNCTIONS: [&str; 4] = [
    "tunnel-connect",
    "tunnel-default",
    "tunnel-disconnect",
    "tunnel-forward",
];

/// A running deployment.
pub struct Cloud {
    /// The counters.
    pub meter: Meter,
    /// The HTTP API's address.
    pub http_api: String,
    /// The function URL's address.
    pub function_url: String,
    /// Where agents connect.
    pub agent_endpoint: String,
    /// A token for agents.
    pub token: String,
    /// The functions' environments.
    pub lambda: Arc<Lambda>,
    /// The connections.
    pub websocket: Arc<AgentConnections>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Cloud {
    /// Starts everything. The directory `executables` contains those of [`FUNCTIONS`]; their logs go to `log`.
    ///
    /// # Errors
    /// If something is missing or does not start.
    pub fn start(
        executables: &Path,
        log: &Path,
        latency: Latency,
    ) -> Pin<Box<dyn Future<Output = anyhow::Result<Self>> + Send>> {
        // Boxed, so that the SDK's code below is compiled once and not in every caller.
        Box::pin(Self::start_here(
            executables.to_owned(),
            log.to_owned(),
            latency,
        ))
    }

    async fn start_here(
        executables: std::path::PathBuf,
        log: std::path::PathBuf,
        latency: Latency,
    ) -> anyhow::Result<Self> {
        let (tasks, stop, meter) = (
            TaskTracker::new(),
            CancellationToken::new(),
            Meter::default(),
        );
        let serve = |listener: TcpListener, router: Router| {
            let served = axum::serve(listener, router)
                .with_graceful_shutdown(stop.clone().cancelled_owned());
            tasks.spawn(async move { served.await.context("a part of the stand-in ended") });
        };
        let (engine, token) = start_engine(&tasks, &stop).await?;
        let (listener, dynamodb) = listen().await?;
        serve(
            listener,
            tables::router(Tables::new(
                format!("http://{engine}/"),
                latency,
                meter.clone(),
            )),
        );

        let (runtime, runtime_address) = listen().await?;
        let (visitors, http_api) = listen().await?;
        let (streaming, function_url) = listen().await?;
        let (agents, agent_address) = listen().await?;
        let agent_endpoint = format!("ws://{agent_address}/{STAGE}");
        let lambda = Lambda::new(
            &executables,
            variables(&agent_endpoint, &http_api, &dynamodb),
            runtime_address,
            &log,
            latency,
            meter.clone(),
        )?;
        serve(runtime, lambda::router(lambda.clone()));
        let fronts = Fronts {
            lambda: lambda.clone(),
            latency,
            meter: meter.clone(),
        };
        serve(visitors, visitors::http_api(fronts.clone()));
        serve(streaming, visitors::function_url(fronts));
        let websocket = AgentConnections::new(lambda.clone(), latency, meter.clone());
        serve(agents, websocket::router(&websocket));
        let (http_api, function_url) = (
            format!("http://{http_api}"),
            format!("http://{function_url}"),
        );
        Ok(Self {
            meter,
            http_api,
            function_url,
            agent_endpoint,
            token,
            lambda,
            websocket,
            tasks,
            stop,
        })
    }

    /// Stops everything.
    pub async fn stop(self) {
        self.websocket.stop().await;
        self.lambda.stop().await;
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        // A frozen process would stay for ever.
        self.lambda.kill();
    }
}

/// Starts the engine behind the tables. Returns its address and a token for agents.
async fn start_engine(
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> anyhow::Result<(String, String)> {
    let (listener, engine) = listen().await?;
    dynamodb::serve(
        dynamodb::open(None)?,
        listener,
        AccessKey::any(),
        tasks,
        stop,
    );
    let direct = sdk::for_loopback(&format!("http://{engine}"), "stand-in");
    dynamodb::create_tables(&aws_sdk_dynamodb::Client::new(&direct)).await?;
    let token = TokensTable::new(&direct, dynamodb::TOKENS.to_owned())
        .create("agent", None, now())
        .await?;
    Ok((engine, token))
}

/// The environment variables of the functions.
fn variables(agent_endpoint: &str, http_api: &str, dynamodb: &str) -> Vec<(String, String)> {
    let settings = [
        ("WEBSOCKET_API_ENDPOINT", agent_endpoint.to_owned()),
        ("PUBLIC_URL", format!("http://{http_api}")),
        ("AUTH", "token".to_owned()),
        ("LOG_LEVEL", "info".to_owned()),
        ("AWS_ENDPOINT_URL_DYNAMODB", format!("http://{dynamodb}")),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", "stand-in".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "stand-in".to_owned()),
    ];
    let tables = [
        "TUNNELS_TABLE",
        "CONNECTIONS_TABLE",
        "PENDING_REQUESTS_TABLE",
        "TOKENS_TABLE",
    ];
    let tables = tables
        .into_iter()
        .filter_map(|variable| Some((variable, dynamodb::table_of_variable(variable)?.to_owned())));
    settings
        .into_iter()
        .chain(tables)
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

async fn listen() -> anyhow::Result<(TcpListener, String)> {
    let listener = TcpListener::bind("127.0.0.1:0")
        .await
        .context("no loopback port")?;
    let address = listener.local_addr()?.to_string();
    Ok((listener, address))
}
