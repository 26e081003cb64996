//! What changes, as server-sent events for whoever follows it.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use http::HeaderMap;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    json,
    reply::{Reply, with_body},
    shared::Shared,
};

/// How often changes are sent at most, however many there are.
const MIN_INTERVAL: Duration = Duration::from_millis(50);
/// How often something is sent at least, so that a reader who is gone is noticed.
const MAX_SILENCE: Duration = Duration::from_secs(15);
/// The version that one has who has seen nothing.
const NOTHING: u64 = 0;

struct Follower {
    shared: Arc<Shared>,
    versions: watch::Receiver<u64>,
    seen: u64,
    is_first: bool,
}

/// Changes since the version that `Last-Event-ID` names, and from then on. Between two events changes are collected, so that a
/// reader who is slow gets fewer events, and nothing has to be kept for them.
pub(crate) fn events(shared: Arc<Shared>, headers: &HeaderMap) -> Reply {
    let seen = headers
        .get("last-event-id")
        .and_then(|value| value.to_str().ok())
        .and_then(|id| {
            id.strip_prefix(&format!("{}-", shared.process))?
                .parse()
                .ok()
        });
    let follower = Follower {
        versions: shared.store.follow(),
        seen: seen.unwrap_or(NOTHING),
        is_first: seen.is_none(),
        shared,
    };
    let events = stream::unfold(follower, |mut follower| async move {
        let event = follower.next().await?;
        let frame: Result<_, Infallible> = Ok(Frame::data(event));
        Some((frame, follower))
    });
    with_body("text/event-stream", StreamBody::new(events).boxed_unsync())
}

impl Follower {
    /// The next event; `None` when the inspector ends.
    async fn next(&mut self) -> Option<Bytes> {
        if !self.is_first {
            match timeout(MAX_SILENCE, self.changed()).await {
                Ok(changed) => changed?,
                Err(_) => return Some(Bytes::from_static(b": nothing has changed\n\n")),
            }
            sleep(MIN_INTERVAL).await;
        }
        self.versions.mark_unchanged();
        let event = self.event();
        Some(event.into())
    }

    async fn changed(&mut self) -> Option<()> {
        self.versions
            .wait_for(|&version| version > self.seen)
            .await
            .ok()?;
        Some(())
    }

    fn event(&mut self) -> String {
        let changes = self.shared.store.changes_since(self.seen);
        let is_first = std::mem::take(&mut self.is_first);
        self.seen = changes.version;
        let exchanges: Vec<Value> = changes
            .changed
            .iter()
            .map(|slot| slot.read(json::summary))
            .collect();
        let tunnels: Vec<Value> = self
            .shared
            .tunnels
            .iter()
            .filter_map(|tunnel| json::tunnel(tunnel, &self.shared))
            .collect();
        let data = json!({
            // Whoever has seen exchanges of another process forgets them.
            "cleared": changes.cleared || is_first,
            "oldest": changes.oldest,
            "exchanges": exchanges,
            "tunnels": tunnels,
        });
        let id = format!("{}-{}", self.shared.process, self.seen);
        format!("event: exchanges\nid: {id}\ndata: {data}\n\n")
    }
}
