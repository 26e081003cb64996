//! A local service that serves bodies to measure with.

use axum::{
    Router,
    body::Body,
    extract::{Path, State},
    http::{StatusCode, header},
    response::IntoResponse,
    routing,
};
use bytes::Bytes;
use futures_util::StreamExt;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{net::TcpListener, task::JoinSet};

/// Longest body.
const LONGEST: usize = 10 * 1024 * 1024;

/// A local service that runs until it is dropped.
pub struct Origin {
    /// Its address.
    pub address: String,
    _serving: JoinSet<()>,
}

impl Origin {
    /// Serves `/bytes/N`, N bytes that cannot be compressed, and `/json/N`, N bytes of JSON like a web API's response. `/received`
    /// answers a POST with its length.
    ///
    /// # Errors
    /// If there is no free port.
    pub async fn start() -> anyhow::Result<Self> {
        let mut bytes = vec![0; LONGEST];
        StdRng::seed_from_u64(1).fill(&mut bytes[..]);
        let bodies = (Bytes::from(bytes), Bytes::from(json(LONGEST)));
        let answer = |kind: &'static str, body: fn(&(Bytes, Bytes)) -> &Bytes| {
            routing::get(
                async move |State(bodies): State<(Bytes, Bytes)>, Path(length): Path<usize>| {
                    (
                        [(header::CONTENT_TYPE, kind)],
                        body(&bodies).slice(..length.min(LONGEST)),
                    )
                        .into_response()
                },
            )
        };
        let router = Router::new()
            .route(
                "/bytes/{length}",
                answer("application/octet-stream", |(bytes, _)| bytes),
            )
            .route(
                "/json/{length}",
                answer("application/json", |(_, json)| json),
            )
            .route("/received", routing::post(received))
            .with_state(bodies);
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            // It ends when this process ends.
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self {
            address,
            _serving: serving,
        })
    }
}

async fn received(body: Body) -> Result<String, StatusCode> {
    let mut body = body.into_data_stream();
    let mut length = 0;
    while let Some(bytes) = body.next().await {
        length += bytes.map_err(|_| StatusCode::BAD_REQUEST)?.len();
    }
    Ok(length.to_string())
}

/// A list of records such as an API returns: keys repeat, values do not.
pub fn json(length: usize) -> String {
    let mut random = StdRng::seed_from_u64(2);
    let mut text = String::from("[");
    for id in 1.. {
        if text.len() >= length {
            break;
        }
        let (key, cents, day) = (
            random.random::<u64>(),
            random.random_range(100..100_000u32),
            random.random_range(1..29u32),
        );
        let status = ["open", "paid", "shipped", "cancelled"][random.random_range(0..4usize)];
        text += &format!(
            "{{\"id\":{id},\"key\":\"{key:016x}\",\"customer\":\"customer-{}\",\"status\":\"{status}\",\"total\":{}.{:02},\"currency\":\"EUR\",\
             \"created_at\":\"2026-01-{day:02}T{:02}:{:02}:00Z\"}},",
            key % 997,
            cents / 100,
            cents % 100,
            key % 24,
            key % 60,
        );
    }
    text.truncate(length);
    text
}
