//! What agents cost `tunnel-local` that are connected and silent.

use std::{fmt::Write, path::Path, time::Duration};

use anyhow::{Context, bail, ensure};
use futures_util::{SinkExt, StreamExt};
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async, tungstenite::Message};
use tunnel_protocol::message::{self, FEATURES, FromAgent, Ready, ToAgent, VERSION};

use crate::{load, origin::Origin, processes};

/// How many agents there are.
const AGENTS: [usize; 3] = [100, 1000, 4000];
/// How many connect at once.
const AT_ONCE: usize = 100;
/// Longer than any agent takes to connect.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long memory may take to be given back after the agents have connected.
const SETTLING: Duration = Duration::from_secs(15);
/// How long processor time is measured: as long as three checks of each agent take.
const IDLE: Duration = Duration::from_secs(60);
/// Visits to a tunnel among them.
const VISITS: usize = 300;

/// Measures the `tunnel-local` in `deployed`, and returns a table.
///
/// # Errors
/// If it does not start, or an agent does not connect.
pub(crate) async fn measure(deployed: &Path, say: impl Fn(&str)) -> anyhow::Result<String> {
    rlimit::increase_nofile_limit(u64::MAX)?;
    let mut table = format!(
        "\nAgents that are connected and silent, all in the process of the benchmark. Memory and processor time are those of `tunnel-local`, over \
         {} s;\nthe visits are to one more agent, which is `ttf`.\n\n\
         | agents | connected in s | KB each | % of a core | visit p50 ms | visit p99 ms | stopped in s |\n|---|---|---|---|---|---|---|\n",
        IDLE.as_secs()
    );
    for agents in AGENTS {
        let limits = [
            "--max-tunnel-ids-per-owner",
            "0",
            "--max-agents-per-token",
            "5000",
        ];
        let (server, endpoint) = processes::server(deployed, &limits).await?;
        let origin = Origin::start().await?;
        let agent = processes::agent(deployed, &endpoint, None, &origin.address);
        let (_agent, url) = agent.await?;
        let visit = format!("{url}/bytes/1024");
        load::run(&visit, 1024, VISITS, 1).await;
        let before = server.memory()?;
        let began = Instant::now();
        let mut idle = connect(agents, &endpoint).await?;
        let connected = began.elapsed();
        sleep(SETTLING).await;
        let each = (server.memory()? - before) / agents as f64;
        let busy = server.processor_time()?;
        sleep(IDLE).await;
        let busy = (server.processor_time()? - busy) / IDLE.as_secs_f64();
        let visits = load::run(&visit, 1024, VISITS, 1).await;
        ensure!(visits.failures.is_empty(), "{:?}", visits.failures);
        ensure!(
            idle.try_join_next().is_none(),
            "an agent's connection ended"
        );
        let began = Instant::now();
        server.stop().await?;
        let line = format!(
            "| {agents} | {:.1} | {:.1} | {:.2} | {:.2} | {:.2} | {:.1} |",
            connected.as_secs_f64(),
            each / 1e3,
            busy * 100.0,
            visits.quantile(0.5).as_secs_f64() * 1e3,
            visits.quantile(0.99).as_secs_f64() * 1e3,
            began.elapsed().as_secs_f64(),
        );
        say(&line);
        writeln!(table, "{line}")?;
    }
    Ok(table)
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Connects agents, which then do nothing but answer what the connection itself asks.
async fn connect(agents: usize, endpoint: &str) -> anyhow::Result<JoinSet<()>> {
    let (mut connecting, mut idle) = (JoinSet::new(), JoinSet::new());
    for number in 0..agents {
        if connecting.len() >= AT_ONCE {
            keep(connecting.join_next().await, &mut idle)?;
        }
        let url = format!("{endpoint}?tunnel_id=idle-{number}");
        connecting.spawn(async move { timeout(PATIENCE, open(&url)).await? });
    }
    while let Some(opened) = connecting.join_next().await {
        keep(Some(opened), &mut idle)?;
    }
    Ok(idle)
}

fn keep(
    opened: Option<Result<anyhow::Result<Socket>, tokio::task::JoinError>>,
    idle: &mut JoinSet<()>,
) -> anyhow::Result<()> {
    let mut socket = opened.context("an agent")???;
    idle.spawn(async move { while let Some(Ok(_)) = socket.next().await {} });
    Ok(())
}

async fn open(url: &str) -> anyhow::Result<Socket> {
    let (mut socket, _) = connect_async(url).await?;
    let ready = FromAgent::Ready(Ready {
        protocol: Some(VERSION),
        features: FEATURES.to_vec(),
        ..Ready::default()
    });
    let ready = Message::text(message::encode(&ready));
    socket.send(ready).await?;
    while let Some(message) = socket.next().await {
        if let Message::Text(text) = message?
            && let Ok(ToAgent::ConnectionEstablished(_)) = message::decode(&text)
        {
            return Ok(socket);
        }
    }
    bail!("an agent's connection ended")
}
