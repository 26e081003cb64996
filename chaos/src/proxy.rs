//! The network between agent and service: a TCP proxy that can be told to misbehave.

use std::{io, net::SocketAddr, time::Duration};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

use crate::message::{Message, Messages, Order};

/// Bytes on the way in one direction: this many pieces of [`PIECE`].
const PIECES: usize = 64;
const PIECE: usize = 16 * 1024;
/// How many of the messages that may wait do so while [`Mode::reorders`], and for how long at most.
const LATE_SHARE: f64 = 0.3;
const LATEST: Duration = Duration::from_millis(150);

/// How the network is. Connections are numbered as they come; `..._before` is about those with smaller numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mode {
    /// Nothing moves, and nothing is lost: what TCP makes of lost packets. New connections wait.
    pub(crate) holds: bool,
    /// What is sent vanishes. New connections wait.
    pub(crate) swallows: bool,
    /// New connections are reset.
    pub(crate) refuses: bool,
    /// Each way.
    pub(crate) delay: Duration,
    /// Each way, for each connection.
    pub(crate) bytes_per_second: Option<u32>,
    /// Messages overtake each other, as those of a WebSocket API do.
    pub(crate) reorders: bool,
    /// Are reset.
    pub(crate) reset_before: u64,
    /// Vanish, as behind a router that has forgotten them, and are not told.
    pub(crate) forget_before: u64,
    /// Are closed on the way to the agent, and stay open on the way to the service.
    pub(crate) close_to_agent_before: u64,
    /// The other way round.
    pub(crate) close_to_service_before: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    ToAgent,
    ToService,
}

impl Mode {
    fn is_closed(&self, connection: u64, way: Way) -> bool {
        connection
            < match way {
                Way::ToAgent => self.close_to_agent_before,
                Way::ToService => self.close_to_service_before,
            }
    }

    fn loses(&self, connection: u64) -> bool {
        self.swallows || connection < self.forget_before
    }
}

/// The proxy, which ends when dropped.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    mode: watch::Sender<Mode>,
    /// The number of the next connection.
    next: watch::Receiver<u64>,
    _serving: JoinSet<()>,
}

impl Proxy {
    /// Passes connections on to `service`, from the address `from` if there is one.
    pub(crate) async fn start(service: SocketAddr, from: Option<SocketAddr>) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (mode, seen) = watch::channel(Mode::default());
        let (count, next) = watch::channel(0);
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((agent, _)) = listener.accept().await else {
                    continue;
                };
                while connections.try_join_next().is_some() {}
                let number = *count.borrow();
                count.send_replace(number + 1);
                connections.spawn(pass_on(agent, service, from, number, seen.clone()));
            }
        });
        Ok(Self {
            address,
            mode,
            next,
            _serving: serving,
        })
    }

    /// Changes how the network is; the number is that of the next connection.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Mode, u64)) {
        let next = *self.next.borrow();
        self.mode.send_modify(|mode| change(mode, next));
    }
}

async fn pass_on(
    mut agent: TcpStream,
    service: SocketAddr,
    from: Option<SocketAddr>,
    number: u64,
    mode: watch::Receiver<Mode>,
) {
    if mode.borrow().refuses {
        let _ = agent.set_zero_linger();
        return;
    }
    let mut waits = mode.clone();
    if waits
        .wait_for(|mode| !mode.holds && !mode.swallows)
        .await
        .is_err()
    {
        return;
    }
    let Ok(mut upstream) = connect(service, from).await else {
        let _ = agent.set_zero_linger();
        return;
    };
    let (_, _) = (agent.set_nodelay(true), upstream.set_nodelay(true));
    let is_reset = {
        let (from_agent, to_agent) = agent.split();
        let (from_service, to_service) = upstream.split();
        let mut resets = mode.clone();
        tokio::select! {
            _ = resets.wait_for(|mode| number < mode.reset_before) => true,
            ((), ()) = async { tokio::join!(
                pump(from_agent, to_service, number, Way::ToService, mode.clone()),
                pump(from_service, to_agent, number, Way::ToAgent, mode.clone()),
            ) } => false,
        }
    };
    if is_reset {
        let (_, _) = (agent.set_zero_linger(), upstream.set_zero_linger());
    }
}

async fn connect(service: SocketAddr, from: Option<SocketAddr>) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    if let Some(from) = from {
        socket.bind(from)?;
    }
    socket.connect(service).await
}

async fn pump(
    reader: impl AsyncRead + Unpin,
    writer: impl AsyncWrite + Unpin,
    number: u64,
    way: Way,
    mode: watch::Receiver<Mode>,
) {
    let (send, receive) = mpsc::channel(PIECES);
    tokio::join!(
        read(reader, send, number, mode.clone()),
        write(writer, receive, number, way, mode)
    );
}

async fn read(
    mut reader: impl AsyncRead + Unpin,
    send: mpsc::Sender<(Instant, Bytes)>,
    number: u64,
    mode: watch::Receiver<Mode>,
) {
    let mut buffer = vec![0; PIECE];
    let (mut messages, mut line) = (Messages::default(), Line::new(send, mode.clone()));
    loop {
        let length = tokio::select! {
            read = reader.read(&mut buffer) => match read {
                Ok(length @ 1..) => length,
                _ => break,
            },
            () = line.until_one_is_due() => {
                if line.send_late(Instant::now()).await.is_err() {
                    return;
                }
                continue;
            }
        };
        if mode.borrow().loses(number) {
            continue;
        }
        messages.add(&buffer[..length]);
        while let Some(message) = messages.next() {
            if line.pass(message).await.is_err() {
                return;
            }
        }
    }
    if let Some(rest) = messages.rest() {
        let _ = line.pass(rest).await;
    }
    let _ = line.send_late(Instant::now() + LATEST).await;
    // That it has ended is lost as well.
    let mut mode = mode;
    let _ = mode.wait_for(|mode| !mode.loses(number)).await;
}

/// Messages in the order in which they go on.
struct Line {
    send: mpsc::Sender<(Instant, Bytes)>,
    mode: watch::Receiver<Mode>,
    /// Those that others overtake, and until when.
    late: Vec<(Instant, Bytes)>,
}

/// Nobody takes what is sent.
struct ClosedError;

impl Line {
    fn new(send: mpsc::Sender<(Instant, Bytes)>, mode: watch::Receiver<Mode>) -> Self {
        let late = Vec::new();
        Self { send, mode, late }
    }

    /// Sends a message on, or lets it wait.
    async fn pass(&mut self, message: Message) -> Result<(), ClosedError> {
        if message.order == Order::IsLast {
            self.send_late(Instant::now() + LATEST).await?;
        }
        let waits = message.order == Order::MayWait
            && self.mode.borrow().reorders
            && rand::random_bool(LATE_SHARE);
        if waits {
            let due = Instant::now() + LATEST.mul_f64(rand::random());
            let at = self.late.partition_point(|(other, _)| *other < due);
            self.late.insert(at, (due, message.bytes));
            return Ok(());
        }
        self.send(message.bytes).await
    }

    /// Sends on what has waited until `now`.
    async fn send_late(&mut self, now: Instant) -> Result<(), ClosedError> {
        let due = self.late.partition_point(|(due, _)| *due <= now);
        for (_, bytes) in self.late.drain(..due).collect::<Vec<_>>() {
            self.send(bytes).await?;
        }
        Ok(())
    }

    async fn until_one_is_due(&self) {
        match self.late.first() {
            Some((due, _)) => sleep_until(*due).await,
            None => std::future::pending().await,
        }
    }

    async fn send(&self, mut bytes: Bytes) -> Result<(), ClosedError> {
        let due = Instant::now() + self.mode.borrow().delay;
        while !bytes.is_empty() {
            let piece = bytes.split_to(PIECE.min(bytes.len()));
            self.send
                .send((due, piece))
                .await
                .map_err(|_| ClosedError)?;
        }
        Ok(())
    }
}

async fn write(
    mut writer: impl AsyncWrite + Unpin,
    mut receive: mpsc::Receiver<(Instant, Bytes)>,
    number: u64,
    way: Way,
    mut mode: watch::Receiver<Mode>,
) {
    let mut closes = mode.clone();
    loop {
        let next = tokio::select! {
            biased;
            _ = closes.wait_for(|mode| mode.is_closed(number, way)) => None,
            next = receive.recv() => next,
        };
        let Some((due, bytes)) = next else { break };
        sleep_until(due).await;
        let Ok(now) = mode
            .wait_for(|mode| !mode.holds)
            .await
            .map(|mode| mode.clone())
        else {
            return;
        };
        if let Some(rate) = now.bytes_per_second {
            sleep(Duration::from_secs_f64(
                f64::from(u32::try_from(bytes.len()).unwrap_or(u32::MAX)) / f64::from(rate),
            ))
            .await;
        }
        if now.loses(number) {
            continue;
        }
        if writer.write_all(&bytes).await.is_err() {
            break;
        }
    }
    let _ = mode.wait_for(|mode| !mode.holds).await;
    let _ = writer.shutdown().await;
    while receive.recv().await.is_some() {}
}
