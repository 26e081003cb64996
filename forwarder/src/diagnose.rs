//! `ttf diagnose`: every step from this machine to the service and to the local service, tried one by one.

use std::{
    future::Future,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use tokio::{
    net::{TcpStream, lookup_host},
    time::{Instant, timeout},
};

use crate::{
    dial,
    handshake::{self, Probe},
    settings::Settings,
    target::{Target, TargetTransport},
    tls,
};

/// How long one step may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);
/// How far the clocks of this machine and the service may be apart before certificates and tokens are at risk.
const MAX_CLOCK_DIFFERENCE: Duration = Duration::from_secs(60);

/// What came of a step.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Good,
    /// Worth knowing, and no fault.
    Note,
    Bad,
    /// An earlier step is in its way.
    Skipped,
}

/// A step, tried.
#[derive(Debug)]
struct Step {
    name: &'static str,
    verdict: Verdict,
    detail: String,
    took: Duration,
}

/// All steps.
#[derive(Debug)]
pub(crate) struct Diagnosis(Vec<Step>);

impl Diagnosis {
    /// Whether a tunnel can be opened and used.
    pub(crate) fn is_good(&self) -> bool {
        self.0.iter().all(|step| step.verdict != Verdict::Bad)
    }

    /// A table for people.
    pub(crate) fn to_lines(&self) -> Vec<String> {
        let line = |step: &Step| {
            let verdict = match step.verdict {
                Verdict::Good => "[ OK ]",
                Verdict::Note => "[NOTE]",
                Verdict::Bad => "[FAIL]",
                Verdict::Skipped => "[SKIP]",
            };
            format!(
                "{verdict} {:<10} {} ({} ms)",
                step.name,
                step.detail,
                step.took.as_millis()
            )
        };
        self.0.iter().map(line).collect()
    }

    /// The same for programs.
    pub(crate) fn to_json(&self) -> Value {
        let step = |step: &Step| {
            let verdict = match step.verdict {
                Verdict::Good => "ok",
                Verdict::Note => "note",
                Verdict::Bad => "fail",
                Verdict::Skipped => "skip",
            };
            let took = u64::try_from(step.took.as_millis()).unwrap_or(u64::MAX);
            json!({ "step": step.name, "verdict": verdict, "detail": step.detail, "took_ms": took })
        };
        let steps: Vec<Value> = self.0.iter().map(step).collect();
        json!({ "ok": self.is_good(), "steps": steps })
    }

    fn add(&mut self, name: &'static str, verdict: Verdict, detail: impl Into<String>) {
        self.0.push(Step {
            name,
            verdict,
            detail: detail.into(),
            took: Duration::ZERO,
        });
    }

    /// Tries a step, and returns what it brings.
    async fn step<T>(
        &mut self,
        name: &'static str,
        step: impl Future<Output = Result<(T, String), String>>,
    ) -> Option<T> {
        let started = Instant::now();
        let outcome = timeout(STEP_TIMEOUT, step)
            .await
            .unwrap_or_else(|_| Err(format!("nothing happened within {STEP_TIMEOUT:?}")));
        let (value, verdict, detail) = match outcome {
            Ok((value, detail)) => (Some(value), Verdict::Good, detail),
            Err(detail) => (None, Verdict::Bad, detail),
        };
        self.0.push(Step {
            name,
            verdict,
            detail,
            took: started.elapsed(),
        });
        value
    }
}

/// Tries every step of a tunnel with these settings, and these local services.
pub(crate) async fn diagnose(settings: &Settings, targets: &[Target]) -> Diagnosis {
    let mut diagnosis = Diagnosis(Vec::new());
    let version = env!("CARGO_PKG_VERSION");
    let system = format!(
        "ttf {version}, {} {}",
        std::env::consts::OS,
        std::env::consts::ARCH
    );
    diagnosis.add("version", Verdict::Good, system);
    diagnosis.add("endpoint", Verdict::Good, settings.endpoint.to_string());
    match &settings.proxy {
        // The proxy looks names up.
        Some(proxy) => diagnosis.add("proxy", Verdict::Note, proxy.to_string()),
        None => {
            diagnosis.step("name", resolve(settings)).await;
        }
    }
    let reached = diagnosis.step("connection", connect(settings)).await;
    let probe = match reached {
        Some(()) => diagnosis.step("handshake", shake_hands(settings)).await,
        None => {
            diagnosis.add("handshake", Verdict::Skipped, "there is no connection");
            None
        }
    };
    match probe {
        Some(probe) => {
            clock(&mut diagnosis, &probe);
            ping(&mut diagnosis, &probe);
        }
        None => {
            diagnosis.add("clock", Verdict::Skipped, "there is no handshake");
            diagnosis.add("ping", Verdict::Skipped, "there is no handshake");
        }
    }
    for target in targets {
        diagnosis.step("target", reach(target)).await;
    }
    diagnosis
}

async fn resolve(settings: &Settings) -> Result<((), String), String> {
    let address = settings.endpoint.address();
    let found = lookup_host(&address)
        .await
        .map_err(|error| error.to_string())?;
    let found: Vec<String> = found.map(|address| address.ip().to_string()).collect();
    Ok(((), found.join(", ")))
}

async fn connect(settings: &Settings) -> Result<((), String), String> {
    let tls = tls::client_config(settings.proxy.is_some(), &settings.endpoint_tls).into();
    dial::dial(&settings.endpoint, settings.proxy.as_ref(), &tls)
        .await
        .map_err(|error| error.to_string())?;
    let address = settings.endpoint.address();
    Ok((
        (),
        match &settings.proxy {
            Some(proxy) => format!("{address} through {proxy}"),
            None => address,
        },
    ))
}

async fn shake_hands(settings: &Settings) -> Result<(Probe, String), String> {
    let probe = handshake::probe(settings)
        .await
        .map_err(|error| error.to_string())?;
    let tls = if settings.endpoint.is_secure() {
        "over TLS"
    } else {
        "without TLS"
    };
    let token = if settings.token.is_some() {
        "with a token"
    } else {
        "without a token"
    };
    Ok((probe, format!("accepted {tls}, {token}")))
}

fn clock(diagnosis: &mut Diagnosis, probe: &Probe) {
    let Some(service) = probe.date else {
        return diagnosis.add("clock", Verdict::Note, "the service does not tell its time");
    };
    let now = SystemTime::now();
    let apart = now
        .duration_since(service)
        .unwrap_or_else(|error| error.duration());
    let seconds = apart.as_secs();
    if apart > MAX_CLOCK_DIFFERENCE {
        let detail =
            format!("this machine's clock and the service's differ by {seconds} s: set it");
        diagnosis.add("clock", Verdict::Bad, detail);
    } else {
        diagnosis.add(
            "clock",
            Verdict::Good,
            format!("{seconds} s from the service's"),
        );
    }
}

fn ping(diagnosis: &mut Diagnosis, probe: &Probe) {
    match probe.pong {
        Some(took) => {
            diagnosis.add(
                "ping",
                Verdict::Good,
                format!("answered in {} ms", took.as_millis()),
            );
        }
        None => {
            let detail = "ping frames are not answered; messages are sent in their place";
            diagnosis.add("ping", Verdict::Note, detail);
        }
    }
}

async fn reach(target: &Target) -> Result<((), String), String> {
    let refused = |error: std::io::Error| format!("nothing answers at {target}: {error}");
    match &target.transport {
        TargetTransport::Tcp | TargetTransport::Loopback => {
            let port = target.port();
            let hosts = match target.transport {
                TargetTransport::Loopback => ["127.0.0.1", "::1"].as_slice(),
                _ => &[target
                    .authority
                    .host()
                    .trim_start_matches('[')
                    .trim_end_matches(']')],
            };
            let mut outcome = Ok(());
            for host in hosts {
                outcome = TcpStream::connect((*host, port)).await.map(drop);
                if outcome.is_ok() {
                    break;
                }
            }
            outcome.map_err(refused)?;
        }
        #[cfg(unix)]
        TargetTransport::Unix(path) => {
            tokio::net::UnixStream::connect(path)
                .await
                .map_err(refused)?;
        }
        #[cfg(not(unix))]
        TargetTransport::Unix(_) => {}
        // It was there when its path was read.
        TargetTransport::Directory(_) => {}
    }
    Ok(((), format!("{target} takes connections")))
}
