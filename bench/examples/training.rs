//! Puts load on executables that count what they do, from which the compiler then learns what matters: `training DIRECTORY`.
//! `.ci/deployed` runs it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::{ClientConfig, RootCertStore, pki_types::CertificateDer};
use tokio::{task::JoinSet, time::timeout};
use tunnel_bench::{origin::Origin, processes};

/// Longer than all requests of a scene take.
const PATIENCE: Duration = Duration::from_secs(10 * 60);
/// A short body, in bytes.
const SHORT: usize = 1024;
/// A long body, in bytes.
const LONG: usize = 10_000_000;
/// What a browser says besides `Host`.
const FIELDS: [(&str, &str); 7] = [
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0)"),
    ("accept", "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"),
    ("accept-language", "en-US,en;q=0.5"),
    ("accept-encoding", "gzip, deflate, br"),
    ("cookie", "session=0123456789abcdef; theme=dark"),
    ("sec-fetch-mode", "navigate"),
    ("priority", "u=0, i"),
];

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let executables = std::env::args().nth(1).map(PathBuf::from);
    let executables = executables.context("usage: training DIRECTORY")?;
    let work = tempfile::tempdir()?;
    let certificate = Certificate::write(work.path())?;
    let origin = Origin::start().await?;
    for certificate in [None, Some(&certificate)] {
        let flags = certificate.map(Certificate::flags).unwrap_or_default();
        let (server, endpoint) = processes::server(&executables, &flags).await?;
        let variable = certificate.map(|certificate| ("TTF_ENDPOINT_CA", &*certificate.file));
        let agent = processes::agent(&executables, &endpoint, variable, &origin.address);
        let (agent, url) = agent.await?;
        let visitors = Visitors::new(&url, certificate)?;
        timeout(PATIENCE, visitors.come()).await??;
        // The counts are written when a process ends in order.
        agent.stop().await?;
        server.stop().await?;
    }
    Ok(())
}

/// Of the server at 127.0.0.1.
struct Certificate {
    certificate: CertificateDer<'static>,
    file: String,
    key_file: String,
}

impl Certificate {
    fn write(directory: &Path) -> anyhow::Result<Self> {
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(["127.0.0.1".to_owned()])?;
        let path = |name| directory.join(name).display().to_string();
        let (file, key_file) = (path("certificate.pem"), path("key.pem"));
        std::fs::write(&file, cert.pem())?;
        std::fs::write(&key_file, signing_key.serialize_pem())?;
        Ok(Self {
            certificate: cert.der().clone(),
            file,
            key_file,
        })
    }

    fn flags(&self) -> Vec<&str> {
        vec!["--tls-cert", &self.file, "--tls-key", &self.key_file]
    }
}

type Visitor = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// What visitors ask for, and of whom.
#[derive(Clone)]
struct Visitors {
    url: String,
    tls: ClientConfig,
}

impl Visitors {
    fn new(url: &str, certificate: Option<&Certificate>) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        if let Some(certificate) = certificate {
            roots.add(certificate.certificate.clone())?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            url: url.to_owned(),
            tls,
        })
    }

    async fn come(&self) -> anyhow::Result<()> {
        let json = tunnel_bench::origin::json(SHORT);
        let (json, long) = (Bytes::from(json), Bytes::from(vec![b'x'; LONG]));
        for (at_once, requests) in [(1, 3_000), (32, 20_000), (256, 20_000)] {
            let path = format!("/bytes/{SHORT}");
            self.repeat(at_once, requests, &path, None, SHORT).await?;
        }
        self.repeat(32, 10_000, "/received", Some(json), 4).await?;
        let path = format!("/json/{}", 64 * SHORT);
        self.repeat(4, 400, &path, None, 64 * SHORT).await?;
        let path = format!("/bytes/{LONG}");
        self.repeat(4, 80, &path, None, LONG).await?;
        self.repeat(4, 80, "/received", Some(long), 8).await
    }

    /// Makes `requests`, `at_once` at a time: GET, or POST of `body`. Each response has `length` bytes.
    async fn repeat(
        &self,
        at_once: usize,
        requests: usize,
        path: &str,
        body: Option<Bytes>,
        length: usize,
    ) -> anyhow::Result<()> {
        let mut visitors = JoinSet::new();
        for _ in 0..at_once {
            let (visitor, body) = (self.visitor(), body.clone());
            let url = format!("{}{path}", self.url);
            visitors.spawn(async move {
                for _ in 0..requests / at_once {
                    request(&visitor, &url, body.clone(), length).await?;
                }
                anyhow::Ok(())
            });
        }
        visitors.join_all().await.into_iter().collect()
    }

    fn visitor(&self) -> Visitor {
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(self.tls.clone())
            .https_or_http()
            .enable_http1()
            .build();
        Client::builder(TokioExecutor::new()).build(connector)
    }
}

async fn request(
    visitor: &Visitor,
    url: &str,
    body: Option<Bytes>,
    length: usize,
) -> anyhow::Result<()> {
    let mut request = Request::builder().uri(url);
    for (name, value) in FIELDS {
        request = request.header(name, value);
    }
    if body.is_some() {
        request = request
            .method(Method::POST)
            .header("content-type", "application/json");
    }
    let request = request.body(Full::new(body.unwrap_or_default()))?;
    let response = visitor.request(request).await?;
    let status = response.status();
    let received = response.into_body().collect().await?.to_bytes().len();
    ensure!(
        status == 200 && received == length,
        "{url}: {status} with {received} bytes"
    );
    Ok(())
}
