//! What answers at the address of `--admin`: metrics, health, and who is connected. Everybody who can connect to it may ask.

use std::{collections::HashSet, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tunnel_protocol::{
    body::budget::MAX_HELD_BODY_BYTES,
    id::{ConnectionId, TunnelId},
};
use tunnel_service::{
    now,
    replies::Replies,
    routing::PublicUrl,
    tables::{dynamodb::StoreError, tokens::TokensTable, tunnels::TunnelsTable},
};

use super::{AccessLog, Observer, exposition::CONTENT_TYPE, listing, metrics::Readings};
use crate::{
    console::escape_json,
    front::{host::HostPolicy, listener::MAX_OPEN_CONNECTIONS},
};

/// A server whose tables do not answer within this time is not ready.
const TABLES_TIMEOUT: Duration = Duration::from_secs(2);
/// A tunnel id that is looked up to see whether the tables answer.
const PROBE: &str = "readiness-probe";

/// What the answers are made of.
#[derive(Clone, Debug)]
pub(crate) struct AdminApi {
    pub(crate) observer: Arc<Observer>,
    pub(crate) tokens: TokensTable,
    pub(crate) tunnels: TunnelsTable,
    pub(crate) replies: Replies,
    /// Cancelled when no more requests are taken.
    pub(crate) stopping: CancellationToken,
}

impl AdminApi {
    /// The API at `address`, which is asked for by its IP address or by a name of this machine. Other names could have been pointed
    /// here by a web page (DNS rebinding).
    pub(crate) fn router(self, address: SocketAddr) -> Router {
        let own: Option<PublicUrl> = format!("http://127.0.0.1:{}", address.port()).parse().ok();
        let hosts = own.map(|own| HostPolicy::new(own, false));
        Router::new()
            .route("/metrics", get(metrics))
            .route("/healthz", get(health))
            .route("/readyz", get(ready))
            .route("/agents", get(agents))
            .route("/tunnels", get(tunnels))
            .with_state(self)
            .layer(middleware::from_fn_with_state(hosts, check_host))
    }

    /// Why the server is not ready, if it is not.
    async fn unreadiness(&self) -> Option<&'static str> {
        if self.stopping.is_cancelled() {
            return Some("the server is stopping");
        }
        let probe: TunnelId = PROBE.parse().ok()?;
        match timeout(TABLES_TIMEOUT, self.tunnels.get(&probe, now())).await {
            Ok(Ok(_)) => None,
            Ok(Err(_)) => Some("the tables fail"),
            Err(_) => Some("the tables do not answer"),
        }
    }
}

async fn check_host(
    State(hosts): State<Option<HostPolicy>>,
    request: Request,
    next: Next,
) -> Response {
    let asked = request.headers().get(header::HOST);
    let asked = asked.and_then(|host| host.to_str().ok());
    let is_served = hosts.is_some_and(|hosts| asked.is_some() && hosts.host(asked).is_ok());
    if is_served {
        return next.run(request).await;
    }
    let message = "Ask for localhost, for an IP address, or for a name without a dot.";
    let refusal = json!({ "error": "foreign_host", "message": message });
    object(StatusCode::MISDIRECTED_REQUEST, &refusal)
}

async fn metrics(State(api): State<AdminApi>) -> Response {
    let access_log = api.observer.access_log.as_ref();
    let readings = Readings {
        max_connections: MAX_OPEN_CONNECTIONS,
        agents: api.observer.agent_count(),
        held_body_bytes: api.replies.held_body_bytes(),
        max_body_bytes: MAX_HELD_BODY_BYTES,
        lost_lines: access_log.map_or(0, AccessLog::lost_lines),
    };
    let page = api.observer.metrics.page(readings);
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], page).into_response()
}

async fn health() -> Response {
    object(StatusCode::OK, &json!({ "status": "ok" }))
}

async fn ready(State(api): State<AdminApi>) -> Response {
    match api.unreadiness().await {
        None => object(StatusCode::OK, &json!({ "status": "ready" })),
        Some(reason) => {
            let said = json!({ "status": "not ready", "reason": reason });
            object(StatusCode::SERVICE_UNAVAILABLE, &said)
        }
    }
}

async fn agents(State(api): State<AdminApi>) -> Result<Response, TablesFailed> {
    let tokens = api.tokens.list().await?;
    let tunnels = api.tunnels.list(now()).await?;
    let serving: HashSet<&ConnectionId> = tunnels
        .iter()
        .filter_map(|(_, tunnel)| Some(&tunnel.online.as_ref()?.connection_id))
        .collect();
    let agents = api.observer.open_agents();
    let agents = agents.iter().map(|(connection, agent)| {
        json!({
            "connection": connection.as_str(),
            "tunnel": agent.tunnel.as_str(),
            "owner": listing::owner_name(&agent.owner, &tokens),
            "address": agent.address,
            "connected_at": listing::time(agent.connected_at.as_secs()),
            "serves": serving.contains(connection),
        })
    });
    let agents: Vec<Value> = agents.collect();
    Ok(object(StatusCode::OK, &json!({ "agents": agents })))
}

async fn tunnels(State(api): State<AdminApi>) -> Result<Response, TablesFailed> {
    let tokens = api.tokens.list().await?;
    let tunnels = api.tunnels.list(now()).await?;
    let tunnels = tunnels
        .iter()
        .map(|(id, tunnel)| listing::tunnel(id, tunnel, &tokens));
    let tunnels: Vec<Value> = tunnels.collect();
    Ok(object(StatusCode::OK, &json!({ "tunnels": tunnels })))
}

fn object(status: StatusCode, object: &Value) -> Response {
    let mut response = Response::new(Body::from(escape_json(&object.to_string()) + "\n"));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("application/json"),
    );
    response
}

/// The tables could not be asked.
struct TablesFailed(StoreError);

impl From<StoreError> for TablesFailed {
    fn from(error: StoreError) -> Self {
        Self(error)
    }
}

impl IntoResponse for TablesFailed {
    fn into_response(self) -> Response {
        let said = json!({ "error": "internal_error", "message": self.0.to_string() });
        object(StatusCode::INTERNAL_SERVER_ERROR, &said)
    }
}
