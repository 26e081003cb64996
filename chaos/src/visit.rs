//! One visitor's request, and what came of it.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use rand::{RngExt, rngs::StdRng};
use tokio::{
    net::TcpSocket,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    content::{Side, content, hash},
    service::Wish,
};

/// A request that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(90);
/// What a slow reader's kernel takes for it.
const SMALL_BUFFER: u32 = 8 * 1024;
/// A slow visitor's pause between pieces.
const PAUSE: Duration = Duration::from_millis(15);
const PIECE: usize = 8 * 1024;

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What a visitor does.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// For reports.
    pub(crate) kind: &'static str,
    pub(crate) method: Method,
    pub(crate) wish: Wish,
    pub(crate) is_chunked: bool,
    pub(crate) is_slow: bool,
    pub(crate) leaves: Option<Leave>,
}

/// When a visitor goes away.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Leave {
    /// With half of the upload sent.
    InUpload,
    /// After this time, whatever has come by then.
    After(Duration),
    /// With the answer's head.
    AtHead,
}

/// What a visitor got.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Outcome {
    /// The right bytes, all of them.
    Right,
    /// An error of the tunnel's.
    Refused(StatusCode, String),
    /// The connection could not be made or ended before the answer did.
    Broken(String),
    /// The visitor went away.
    Left,
    /// What must never be.
    Wrong(String),
}

/// A request that was made.
#[derive(Clone, Debug)]
pub(crate) struct Visit {
    pub(crate) plan: Plan,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    pub(crate) outcome: Outcome,
}

impl Plan {
    /// A quick GET.
    pub(crate) fn get(kind: &'static str, number: u64, answer: usize) -> Self {
        let wish = Wish {
            number,
            answer,
            ..Wish::default()
        };
        Self {
            kind,
            method: Method::GET,
            wish,
            is_chunked: false,
            is_slow: false,
            leaves: None,
        }
    }

    /// One of all kinds. None takes longer than two or three seconds by itself, so that none has to outlive a connection of ten.
    pub(crate) fn random(number: u64, random: &mut StdRng) -> Self {
        const LARGEST: usize = 1024 * 1024;
        let mut plan = Self::get("get", number, random.random_range(0..4096));
        plan.wish.is_text = random.random_bool(0.5);
        let size = |random: &mut StdRng| match random.random_range(0..4) {
            0 => random.random_range(0..64),
            1 => random.random_range(0..16 * 1024),
            2 => random.random_range(0..256 * 1024),
            _ => random.random_range(0..=LARGEST),
        };
        match random.random_range(0..20) {
            0..5 => {}
            5..7 => (plan.kind, plan.wish.answer) = ("large get", size(random)),
            7..12 => {
                (plan.kind, plan.method, plan.wish.upload) = ("post", Method::POST, size(random));
                plan.is_chunked = random.random_bool(0.3);
            }
            12 => {
                (plan.kind, plan.method, plan.wish.upload) = (
                    "slow post",
                    Method::POST,
                    random.random_range(0..512 * 1024),
                );
                (plan.is_chunked, plan.is_slow) = (random.random_bool(0.5), true);
            }
            13 => {
                (plan.kind, plan.wish.answer, plan.is_slow) =
                    ("slow reader", random.random_range(0..LARGEST), true);
            }
            14 => {
                (plan.kind, plan.wish.answer, plan.wish.drips) =
                    ("drip", random.random_range(0..LARGEST), true);
            }
            15 => (plan.kind, plan.wish.wait_ms) = ("slow get", random.random_range(100..2000)),
            16 => {
                (plan.kind, plan.method, plan.wish.upload) =
                    ("slow answer to post", Method::POST, size(random));
                plan.wish.wait_ms = random.random_range(100..2000);
            }
            17 => {
                (plan.kind, plan.method, plan.wish.upload) = (
                    "leaver in upload",
                    Method::POST,
                    random.random_range(10..LARGEST),
                );
                (plan.leaves, plan.is_chunked) = (Some(Leave::InUpload), random.random_bool(0.5));
            }
            18 => {
                (plan.kind, plan.method, plan.wish.upload) = ("leaver", Method::POST, size(random));
                plan.wish.wait_ms = random.random_range(0..3000);
                plan.leaves = Some(Leave::After(Duration::from_millis(
                    random.random_range(0..500),
                )));
            }
            _ => {
                (plan.kind, plan.wish.answer, plan.wish.drips) =
                    ("leaver at head", random.random_range(0..LARGEST), true);
                plan.leaves = Some(Leave::AtHead);
            }
        }
        plan
    }
}

/// Makes requests one after the other on one connection.
pub(crate) async fn visit(service: SocketAddr, prefix: &str, plans: Vec<Plan>) -> Vec<Visit> {
    let mut visits = Vec::new();
    let mut connection = None;
    for plan in plans {
        let began = Instant::now();
        let outcome =
            match timeout(PATIENCE, attempt(service, prefix, &plan, &mut connection)).await {
                Ok(outcome) => outcome,
                Err(_) => Outcome::Wrong(format!("no answer and no error within {PATIENCE:?}")),
            };
        if outcome != Outcome::Right {
            connection = None;
        }
        visits.push(Visit {
            plan,
            began,
            ended: Instant::now(),
            outcome,
        });
    }
    visits
}

/// A visitor's connection, which closes when dropped.
struct Connection {
    sender: SendRequest<Body>,
    _driving: JoinSet<Result<(), hyper::Error>>,
}

async fn attempt(
    service: SocketAddr,
    prefix: &str,
    plan: &Plan,
    connection: &mut Option<Connection>,
) -> Outcome {
    if connection.is_none() {
        match connect(service, plan.is_slow).await {
            Ok(new) => *connection = Some(new),
            Err(error) => return Outcome::Broken(error),
        }
    }
    let Some(Connection { sender, .. }) = connection else {
        return Outcome::Broken("not connected".to_owned());
    };
    if let Err(error) = sender.ready().await {
        return Outcome::Broken(error.to_string());
    }
    let upload = content(
        plan.wish.number,
        Side::Upload,
        plan.wish.upload,
        plan.wish.is_text,
    );
    let mut request = Request::builder()
        .method(plan.method.clone())
        .uri(format!("{prefix}{}", plan.wish.path()))
        .header(header::HOST, service.to_string())
        .header(
            header::CONTENT_TYPE,
            if plan.wish.is_text {
                "text/plain"
            } else {
                "application/octet-stream"
            },
        );
    if plan.method == Method::POST && !plan.is_chunked {
        request = request.header(header::CONTENT_LENGTH, upload.len());
    }
    let request = request
        .body(uploading(plan, upload.clone()))
        .expect("these fields make a request");
    let exchange = async {
        let response = match sender.send_request(request).await {
            Ok(response) => response,
            Err(error) => return Outcome::Broken(format!("before the answer's head: {error}")),
        };
        if plan.leaves == Some(Leave::AtHead) && response.status() == StatusCode::OK {
            return Outcome::Left;
        }
        check(response, plan, &upload).await
    };
    match plan.leaves {
        Some(Leave::After(time)) => timeout(time, exchange).await.unwrap_or(Outcome::Left),
        Some(Leave::InUpload) => timeout(Duration::from_millis(300), exchange)
            .await
            .unwrap_or(Outcome::Left),
        Some(Leave::AtHead) | None => exchange.await,
    }
}

async fn connect(service: SocketAddr, is_slow: bool) -> Result<Connection, String> {
    let socket = TcpSocket::new_v4().map_err(|error| error.to_string())?;
    if is_slow {
        let _ = socket.set_recv_buffer_size(SMALL_BUFFER);
    }
    let stream = socket
        .connect(service)
        .await
        .map_err(|error| format!("cannot connect: {error}"))?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let mut driving = JoinSet::new();
    driving.spawn(connection);
    Ok(Connection {
        sender,
        _driving: driving,
    })
}

fn uploading(plan: &Plan, bytes: Bytes) -> Body {
    let (pause, stops_at) = (
        plan.is_slow,
        (plan.leaves == Some(Leave::InUpload)).then_some(bytes.len() / 2),
    );
    let piece = if plan.is_slow { PIECE } else { 8 * PIECE };
    let pieces = stream::unfold(bytes, move |mut bytes| async move {
        if bytes.is_empty() {
            return None;
        }
        if stops_at.is_some_and(|at| bytes.len() <= at) {
            std::future::pending::<()>().await;
        }
        if pause {
            sleep(PAUSE).await;
        }
        let piece = bytes.split_to(
            piece
                .min(bytes.len())
                .min(stops_at.map_or(usize::MAX, |at| bytes.len() - at)),
        );
        Some((Ok(Frame::data(piece)), bytes))
    });
    StreamBody::new(pieces).boxed_unsync()
}

/// Compares an answer with what it must be.
async fn check(response: Response<Incoming>, plan: &Plan, upload: &Bytes) -> Outcome {
    let (head, body) = response.into_parts();
    let field = |name: &str| {
        head.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned)
    };
    if let Some(code) = field("x-tunnel-error") {
        return check_refusal(head.status, code, body).await;
    }
    if head.status != StatusCode::OK {
        return Outcome::Wrong(format!("{} without X-Tunnel-Error", head.status));
    }
    if field("x-number") != Some(plan.wish.number.to_string()) {
        return Outcome::Wrong(format!(
            "crossed: the answer to request {:?}",
            field("x-number")
        ));
    }
    if field("x-hash") != Some(hash(upload)) {
        return Outcome::Wrong("the local service got another upload".to_owned());
    }
    check_body(body, plan).await
}

/// An error of the tunnel's says the same in its header and in its body.
async fn check_refusal(status: StatusCode, code: String, body: Incoming) -> Outcome {
    let body = match body.collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return Outcome::Broken(format!("in an answer {code}: {error}")),
    };
    if String::from_utf8_lossy(&body).contains(&format!("\"{code}\"")) {
        Outcome::Refused(status, code)
    } else {
        Outcome::Wrong(format!("an answer {code} whose body says something else"))
    }
}

/// Reads a body as fast as the visitor does, and compares it with what the local service sent.
async fn check_body(mut body: Incoming, plan: &Plan) -> Outcome {
    let expected = content(
        plan.wish.number,
        Side::Answer,
        plan.wish.answer,
        plan.wish.is_text,
    );
    let mut read = 0;
    while let Some(frame) = body.frame().await {
        let bytes = match frame.map(Frame::into_data) {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(_)) => continue,
            Err(error) => {
                return Outcome::Broken(format!(
                    "after {read} of {} bytes: {error}",
                    expected.len()
                ));
            }
        };
        if expected.get(read..read + bytes.len()) != Some(&bytes[..]) {
            return Outcome::Wrong(format!(
                "other bytes than the local service sent, from byte {read} of {} on",
                expected.len()
            ));
        }
        read += bytes.len();
        if plan.is_slow {
            sleep(PAUSE).await;
        }
    }
    if read == expected.len() {
        Outcome::Right
    } else {
        Outcome::Wrong(format!(
            "cut: {read} of {} bytes, as if they were all",
            expected.len()
        ))
    }
}
