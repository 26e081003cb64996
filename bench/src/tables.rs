//! DynamoDB: the embedded engine of `local` behind a proxy that adds DynamoDB's latency and counts its units.

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::header;
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};

use crate::{
    latency::{self, Latency},
    meter::Meter,
};

/// Longest request body that is passed on; items are at most 400 KB.
const LONGEST: usize = 2 * 1024 * 1024;

/// The proxy.
#[derive(Clone)]
pub struct Tables {
    engine: String,
    client: Client<HttpConnector, Full<Bytes>>,
    latency: Latency,
    meter: Meter,
}

impl Tables {
    /// A proxy in front of the engine at this address.
    pub fn new(engine: String, latency: Latency, meter: Meter) -> Self {
        Self {
            engine,
            client: Client::builder(TokioExecutor::new()).build_http(),
            latency,
            meter,
        }
    }

    async fn pass_on(&self, request: Request) -> anyhow::Result<Response> {
        let (head, body) = request.into_parts();
        let target = head
            .headers
            .get("x-amz-target")
            .and_then(|target| target.to_str().ok())
            .unwrap_or_default();
        let operation = target.rsplit('.').next().unwrap_or_default().to_owned();
        let mut question: Value =
            serde_json::from_slice(&axum::body::to_bytes(body, LONGEST).await?)?;
        question["ReturnConsumedCapacity"] = json!("TOTAL");
        self.latency.pause(latency::of_dynamodb(&operation)).await;
        let mut on = http::Request::post(&self.engine);
        for (name, value) in head
            .headers
            .iter()
            .filter(|(name, _)| !matches!(**name, header::HOST | header::CONTENT_LENGTH))
        {
            on = on.header(name, value);
        }
        let answer = self
            .client
            .request(on.body(Full::new(serde_json::to_vec(&question)?.into()))?)
            .await?;
        let (head, body) = answer.into_parts();
        let body = body.collect().await?.to_bytes();
        let consumed =
            units(&serde_json::from_slice::<Value>(&body).unwrap_or_default()["ConsumedCapacity"]);
        self.meter.count(|counts| {
            counts.dynamodb_requests += 1;
            let is_read = matches!(
                operation.as_str(),
                "GetItem" | "Query" | "Scan" | "BatchGetItem" | "TransactGetItems"
            );
            *(if is_read {
                &mut counts.reads
            } else {
                &mut counts.writes
            }) += consumed;
        });
        let mut response = Response::new(Body::from(body));
        (*response.status_mut(), *response.headers_mut()) = (head.status, head.headers);
        response.headers_mut().remove(header::CONTENT_LENGTH);
        Ok(response)
    }
}

/// The units of one or several tables.
fn units(consumed: &Value) -> f64 {
    match consumed {
        Value::Array(tables) => tables.iter().map(units).sum(),
        table => table["CapacityUnits"].as_f64().unwrap_or_default(),
    }
}

/// DynamoDB accepts every operation at the root of its address.
pub fn router(tables: Tables) -> Router {
    let pass_on = async |State(tables): State<Tables>, request: Request| {
        tables
            .pass_on(request)
            .await
            .unwrap_or_else(|error| (StatusCode::BAD_GATEWAY, format!("{error:#}")).into_response())
    };
    Router::new().fallback(pass_on).with_state(tables)
}
