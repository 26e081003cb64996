//! Lambda: runs a function's executable in as many environments as are needed at once, each with one
//! event at a time, frozen between events. The protocol is described in "Using the Lambda runtime API
//! for custom runtimes" in Lambda's developer guide.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use axum::{
    Router,
    body::Body,
    extract::{Path as Segments, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing,
};
use bytes::Bytes;
use futures_util::StreamExt;
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use tokio::{
    sync::{mpsc, oneshot},
    task::spawn_blocking,
    time::timeout,
};
use tokio_util::task::TaskTracker;
use tunnel_protocol::{id::RequestId, limits::MAX_LAMBDA_PAYLOAD_BYTES};
use tunnel_service::now;

use crate::{
    latency::{self, Latency},
    meter::{Meter, UnderWay},
};

/// The memory size reported to the functions, in MB: the template's default.
pub const MEMORY: u32 = 256;
/// Chunks of a streamed response on their way to the visitor.
const STREAMED: usize = 64;

/// The outcome of an event.
#[derive(Debug)]
pub enum Outcome {
    /// A complete response.
    Whole(Bytes),
    /// A streamed response, prelude first. An error says that it broke off.
    Stream(mpsc::Receiver<Result<Bytes, axum::Error>>),
    /// The function returned an error, exited, or took too long.
    Failed(String),
}

/// An event on its way to an environment.
struct Call {
    event: Vec<u8>,
    limit: Duration,
    answer: oneshot::Sender<Outcome>,
}

/// The invocation that an environment is handling.
struct Running {
    id: String,
    since: Instant,
    answer: oneshot::Sender<Outcome>,
}

struct Environment {
    id: usize,
    function: &'static str,
    process: Pid,
    born: Instant,
    calls: mpsc::Sender<Call>,
    queue: tokio::sync::Mutex<mpsc::Receiver<Call>>,
    state: Mutex<Doing>,
}

#[derive(Default)]
struct Doing {
    has_polled: bool,
    running: Option<Running>,
    busy: Option<UnderWay>,
}

impl Environment {
    fn signal(&self, signal: Signal) {
        // It may have exited already.
        let _ = kill_process(self.process, signal);
    }

    /// Never held across an await.
    fn state(&self) -> MutexGuard<'_, Doing> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All functions, and the API that their environments poll.
pub struct Lambda {
    executables: PathBuf,
    variables: Vec<(String, String)>,
    /// Where the runtime API is served: `127.0.0.1:port`.
    address: String,
    log: std::fs::File,
    latency: Latency,
    meter: Meter,
    tasks: TaskTracker,
    numbers: AtomicUsize,
    environments: Mutex<HashMap<usize, Arc<Environment>>>,
    idle: Mutex<Vec<Arc<Environment>>>,
}

impl Lambda {
    /// Functions whose executables are in a directory, under the functions' names. All get the same
    /// environment variables. Their logs are written to `log`. `address` is where [`router`] will be served.
    ///
    /// # Errors
    /// If the log cannot be written.
    pub fn new(
        executables: &Path,
        variables: Vec<(String, String)>,
        address: String,
        log: &Path,
        latency: Latency,
        meter: Meter,
    ) -> anyhow::Result<Arc<Self>> {
        let log = std::fs::File::create(log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let executables = executables.to_owned();
        let (tasks, numbers, environments, idle) = Default::default();
        Ok(Arc::new(Self {
            executables,
            variables,
            address,
            log,
            latency,
            meter,
            tasks,
            numbers,
            environments,
            idle,
        }))
    }

    /// Invokes a function with an event, for at most `limit`.
    pub async fn invoke(
        self: &Arc<Self>,
        function: &'static str,
        event: &impl Serialize,
        limit: Duration,
    ) -> Outcome {
        let _under_way = self.meter.begin();
        let event = serde_json::to_vec(event).expect("an event can always be encoded as JSON");
        self.latency.pause(latency::INVOKE).await;
        let environment = match self.take_idle(function) {
            Some(environment) => environment,
            None => match self.start(function) {
                Ok(environment) => environment,
                Err(error) => return Outcome::Failed(format!("{error:#}")),
            },
        };
        environment.state().busy = Some(self.meter.begin());
        environment.signal(Signal::CONT);
        let (answer, answered) = oneshot::channel();
        if environment
            .calls
            .send(Call {
                event,
                limit,
                answer,
            })
            .await
            .is_err()
        {
            return Outcome::Failed("the environment ended".to_owned());
        }
        match timeout(limit, answered).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Outcome::Failed("the function ended".to_owned()),
            Err(_) => {
                environment.signal(Signal::KILL);
                Outcome::Failed("the function timed out".to_owned())
            }
        }
    }

    /// Ends all idle environments, so that the next invocations start new ones.
    pub fn retire_environments(&self) {
        for environment in self.idle().drain(..) {
            environment.signal(Signal::KILL);
        }
    }

    /// Ends all environments.
    pub fn kill(&self) {
        for environment in self.environments().values() {
            environment.signal(Signal::KILL);
        }
    }

    /// Ends everything and waits until it has ended.
    pub async fn stop(&self) {
        self.kill();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn take_idle(&self, function: &str) -> Option<Arc<Environment>> {
        let mut idle = self.idle();
        // The one used last, so that as few environments as possible stay in use.
        let at = idle
            .iter()
            .rposition(|environment| environment.function == function)?;
        Some(idle.remove(at))
    }

    fn start(self: &Arc<Self>, function: &'static str) -> anyhow::Result<Arc<Environment>> {
        let id = self.numbers.fetch_add(1, Ordering::Relaxed);
        let executable = self.executables.join(function);
        let mut command = Command::new(&executable);
        command
            .env_clear()
            .envs(self.variables.iter().cloned())
            .env(
                "AWS_LAMBDA_RUNTIME_API",
                format!("http://{}/{id}", self.address),
            )
            .env("AWS_LAMBDA_FUNCTION_NAME", function)
            .env("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST")
            .env("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", MEMORY.to_string())
            .stdin(Stdio::null())
            .stdout(self.log.try_clone()?)
            .stderr(self.log.try_clone()?);
        let born = Instant::now();
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", executable.display()))?;
        let process = Pid::from_child(&child);
        let (calls, queue) = mpsc::channel(1);
        let environment = Arc::new(Environment {
            id,
            function,
            process,
            born,
            calls,
            queue: queue.into(),
            state: Mutex::default(),
        });
        self.environments().insert(id, environment.clone());
        self.tasks
            .spawn(self.clone().watch(child, environment.clone()));
        Ok(environment)
    }

    /// Waits for the end of an environment, and for all that wait for it.
    async fn watch(self: Arc<Self>, mut child: Child, environment: Arc<Environment>) {
        // Nothing can be done about a failure; further signals to the process have no effect then.
        let _ = spawn_blocking(move || child.wait()).await;
        self.environments().remove(&environment.id);
        self.idle().retain(|other| other.id != environment.id);
        *environment.state() = Doing::default();
        environment.queue.lock().await.close();
        while environment.queue.lock().await.recv().await.is_some() {}
    }

    fn find(&self, id: usize) -> Result<Arc<Environment>, StatusCode> {
        self.environments()
            .get(&id)
            .cloned()
            .ok_or(StatusCode::NOT_FOUND)
    }

    /// Held between awaits only, as the next.
    fn environments(&self) -> MutexGuard<'_, HashMap<usize, Arc<Environment>>> {
        self.environments
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Arc<Environment>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ran(&self, environment: &Environment, since: Instant) {
        self.meter.count(|counts| {
            counts
                .functions
                .entry(environment.function)
                .or_default()
                .calls
                .push(since.elapsed());
        });
    }
}

/// The runtime API. The first segment of the path identifies the environment.
pub fn router(lambda: Arc<Lambda>) -> Router {
    Router::new()
        .route(
            "/{environment}/2018-06-01/runtime/invocation/next",
            routing::get(next),
        )
        .route(
            "/{environment}/2018-06-01/runtime/invocation/{call}/{kind}",
            routing::post(answer),
        )
        .with_state(lambda)
}

async fn next(
    State(lambda): State<Arc<Lambda>>,
    Segments(id): Segments<usize>,
) -> Result<Response, StatusCode> {
    let environment = lambda.find(id)?;
    let is_new = !std::mem::replace(&mut environment.state().has_polled, true);
    if is_new {
        let took = environment.born.elapsed();
        lambda.meter.count(|counts| {
            counts
                .functions
                .entry(environment.function)
                .or_default()
                .starts
                .push(took);
        });
    }
    let mut queue = environment.queue.lock().await;
    let call = match queue.try_recv() {
        Ok(call) => call,
        Err(_) => {
            // Frozen before it can be thawed for the next event.
            environment.signal(Signal::STOP);
            lambda.idle().push(environment.clone());
            environment.state().busy = None;
            queue.recv().await.ok_or(StatusCode::GONE)?
        }
    };
    let request_id = RequestId::generate().to_string();
    environment.state().running = Some(Running {
        id: request_id.clone(),
        since: Instant::now(),
        answer: call.answer,
    });
    let headers = [
        ("lambda-runtime-aws-request-id", request_id),
        (
            "lambda-runtime-deadline-ms",
            (now() + call.limit).as_millis().to_string(),
        ),
        (
            "lambda-runtime-invoked-function-arn",
            format!(
                "arn:aws:lambda:us-east-1:123456789012:function:{}",
                environment.function
            ),
        ),
        (
            "lambda-runtime-trace-id",
            "Root=1-6968ba25-89abcdef0123456789abcdef;Sampled=0".to_owned(),
        ),
        ("content-type", "application/json".to_owned()),
    ];
    Ok((headers, call.event).into_response())
}

async fn answer(
    State(lambda): State<Arc<Lambda>>,
    Segments((id, call, kind)): Segments<(usize, String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, StatusCode> {
    let environment = lambda.find(id)?;
    let running = environment
        .state()
        .running
        .take_if(|running| running.id == call)
        .ok_or(StatusCode::BAD_REQUEST)?;
    let is_stream = headers
        .get("lambda-runtime-function-response-mode")
        .is_some_and(|mode| mode == "streaming");
    if kind == "response" && is_stream {
        let (chunks, receiver) = mpsc::channel(STREAMED);
        // The visitor may have left; as in AWS, the function is not notified.
        let _ = running.answer.send(Outcome::Stream(receiver));
        let mut body = body.into_data_stream();
        while let Some(chunk) = body.next().await {
            let _ = chunks.send(chunk).await;
        }
        lambda.ran(&environment, running.since);
    } else {
        let body = axum::body::to_bytes(body, 2 * MAX_LAMBDA_PAYLOAD_BYTES)
            .await
            .map_err(|_| StatusCode::PAYLOAD_TOO_LARGE)?;
        lambda.ran(&environment, running.since);
        let outcome = match kind.as_str() {
            "response" if body.len() <= MAX_LAMBDA_PAYLOAD_BYTES => Outcome::Whole(body),
            "response" => Outcome::Failed("the answer is longer than Lambda takes".to_owned()),
            _ => Outcome::Failed(String::from_utf8_lossy(&body).into_owned()),
        };
        let _ = running.answer.send(outcome);
    }
    Ok(StatusCode::ACCEPTED)
}
