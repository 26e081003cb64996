//! One request and its reply: admitted, sent to the agent, sent once more where that is safe, and answered.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::{HeaderMap, StatusCode, header};
use tokio::{
    sync::oneshot,
    task::AbortHandle,
    time::{Instant, timeout},
};
use tracing::{Instrument, Span, debug};
use tunnel_protocol::{
    body::{BodySender, ReceivedChunk, SendBodyError, window::SendWindow},
    id::{RequestId, TunnelId},
    message,
    message::{Body, CarriesBody, Feature, HeadRef, ToAgent, Window},
    visitor_policy::DeniedError,
};
use tunnel_service::{
    agents::PostError,
    aside::aside,
    now,
    replies::{ReplyHead, ReplyPath},
    tables::tunnels::Online,
    tables::visitor_sockets::{VisitorSocket, VisitorSocketsTable},
};

use crate::{
    State, TunnelPath,
    error::ForwardError,
    first_message::{FirstMessage, broken_off},
    login::LoginCookie,
    rate_limit::Permit,
    reply::PendingReply,
    request::{Ingress, VisitorBody, VisitorRequest},
    request_log::RequestLog,
    response_body::Replying,
};

/// How long an agent may be busy before its visitor gets an error.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an upload whose response is complete may stand still before it is given up.
const IDLE_UPLOAD_TIMEOUT: Duration = Duration::from_secs(60);

/// Sends a request to the tunnel's agent and returns when the reply's head is there.
///
/// # Errors
/// Everything that leaves the visitor without a response.
pub(crate) async fn run(
    state: &Arc<State>,
    mut request: Box<VisitorRequest>,
    path: &TunnelPath,
    log: &mut RequestLog,
) -> Result<Replying, ForwardError> {
    let head_deadline = Instant::now() + request.response_timeout;
    if request.websocket.is_none() && !matches!(state.reply_path, ReplyPath::InProcess(_)) {
        request.without_upgrade("this address carries none; a deployment on AWS needs its edge")?;
    }
    let deadline = matches!(request.ingress, Ingress::HttpApi(_)).then_some(head_deadline);
    let method = request.method.clone();
    let visitor = Visitor::of(&mut request);
    // Before the request is counted: a visitor who is refused uses up none of the tunnel's requests.
    let mut online = visitor.admitted_slowly(state, &path.tunnel).await?;
    let mut permit = Some(state.rate_limiter.acquire(&path.tunnel, Instant::now())?);
    request.headers.clone_from(&visitor.fields);
    let mut first = {
        let format = state.agents.format(&online.features);
        FirstMessage::build(request, path, &online, state.use_compression, format).await?
    };
    log.request_bytes()
        .store(first.body_bytes, Ordering::Relaxed);
    let is_upgrade = first.message.upgrade.is_some();
    for attempt in 0..=1 {
        let mut exchange =
            Exchange::start(state, path, &visitor, online, &mut first, deadline).await?;
        exchange.permit = permit.take();
        log.sent(&exchange.online.connection_id, &first.message.request_id);
        if let Some(rest) = first.rest.take() {
            exchange.upload(rest, log.request_bytes());
        }
        match exchange.head(head_deadline).await {
            Ok((head, chunk)) => {
                if is_upgrade && head.status_code == StatusCode::SWITCHING_PROTOCOLS.as_u16() {
                    exchange.replies.expected().upgraded();
                    exchange.record_websocket(&first.message).await?;
                    return Ok(Replying::upgraded(exchange, head, chunk, log));
                }
                if is_upgrade {
                    exchange.stop_upload();
                }
                return Replying::new(exchange, head, chunk, &method, log);
            }
            Err(error) if attempt == 0 && exchange.may_be_sent_again(&error, &first) => {
                online = visitor
                    .moved(state, &path.tunnel, &exchange.online, error)
                    .await?;
                permit = exchange.permit.take();
                first.message.request_id = RequestId::generate();
            }
            Err(error) => return Err(error),
        }
    }
    Err(ForwardError::Moved)
}

/// The visitor, as the policy sees it. Each connection that a request may be sent to has its own policy.
pub(crate) struct Visitor {
    /// `None` when what the front says is not an address.
    pub(crate) address: Option<IpAddr>,
    /// As they came, with what is meant for the tunnel and not for the local service.
    pub(crate) fields: HeaderMap,
    login: LoginCookie,
}

impl Visitor {
    fn of(request: &mut VisitorRequest) -> Self {
        Self {
            address: request.source_ip.parse().ok(),
            fields: std::mem::take(&mut request.headers),
            login: std::mem::take(&mut request.login),
        }
    }

    /// The visitor of a request that may yet be sent on.
    pub(crate) fn copy_of(request: &VisitorRequest) -> Self {
        Self {
            address: request.source_ip.parse().ok(),
            fields: request.headers.clone(),
            login: request.login.clone(),
        }
    }

    /// Whether the tunnel wants a user name and a password of the visitor that it has not sent.
    pub(crate) async fn is_stranger(&self, state: &State, tunnel: &TunnelId) -> bool {
        let admitted = self.admitted(state, tunnel).await;
        matches!(admitted, Err(ForwardError::Unauthorized(_)))
    }

    /// The same visitor, had it sent these fields.
    pub(crate) fn with(&self, fields: HeaderMap) -> Self {
        Self {
            address: self.address,
            fields,
            login: LoginCookie::default(),
        }
    }

    /// The connection that serves the tunnel, if it lets this visitor in. Nothing is sent to one that was not asked here.
    pub(crate) async fn admitted(
        &self,
        state: &State,
        tunnel: &TunnelId,
    ) -> Result<Online, ForwardError> {
        let online = state.lookup.find(tunnel).await?;
        let Some(policy) = &online.policy else {
            return Ok(online);
        };
        match policy.admit(self.address, &self.fields) {
            Ok(()) => Ok(online),
            Err(denied @ DeniedError::Unauthorized) => {
                let logged_in = state
                    .logins
                    .fields(&self.login, tunnel, &self.fields)
                    .await?;
                match logged_in {
                    Some(fields) if policy.admit(self.address, &fields).is_ok() => Ok(online),
                    _ => Err(ForwardError::of_denied(denied, tunnel)),
                }
            }
            Err(denied) => Err(ForwardError::of_denied(denied, tunnel)),
        }
    }

    /// Like [`Visitor::admitted`], where guessing passwords is slowed down.
    async fn admitted_slowly(
        &self,
        state: &State,
        tunnel: &TunnelId,
    ) -> Result<Online, ForwardError> {
        let has_tried = self.fields.contains_key(header::AUTHORIZATION);
        if has_tried {
            state.logins.check(tunnel, self.address)?;
        }
        let admitted = self.admitted(state, tunnel).await;
        if has_tried && matches!(admitted, Err(ForwardError::Unauthorized(_))) {
            aside(|| state.logins.count(tunnel, self.address)).await?;
        }
        admitted
    }

    /// The connection that serves the tunnel after `former` has refused the request with `refusal`.
    async fn moved(
        &self,
        state: &State,
        tunnel: &TunnelId,
        former: &Online,
        refusal: ForwardError,
    ) -> Result<Online, ForwardError> {
        state.lookup.forget(tunnel, former);
        match self.admitted(state, tunnel).await {
            Ok(online) if online != *former => Ok(online),
            Err(denied @ (ForwardError::Unauthorized(_) | ForwardError::Forbidden(_))) => {
                Err(denied)
            }
            _ => Err(refusal),
        }
    }
}

/// An upload that continues while the reply is awaited.
struct Upload {
    task: AbortHandle,
    /// Receives why the upload failed; closed without a word when it did not.
    failed: oneshot::Receiver<ForwardError>,
    sent_bytes: Arc<AtomicU64>,
}

/// A request that has been sent to its agent. If dropped before its end, it tells the agent to cancel it.
pub(crate) struct Exchange {
    state: Arc<State>,
    online: Online,
    replies: PendingReply,
    upload: Option<Upload>,
    /// The window's last update, as long as it is on its way.
    window_update: Option<AbortHandle>,
    permit: Option<Permit>,
    /// Nothing of it is left for the agent to drop.
    is_over: bool,
}

impl Exchange {
    /// Posts the first message. Where the tunnel has just moved to another connection, it is posted there: the first one did not
    /// take it, so nothing is sent twice.
    async fn start(
        state: &Arc<State>,
        path: &TunnelPath,
        visitor: &Visitor,
        online: Online,
        first: &mut FirstMessage,
        deadline: Option<Instant>,
    ) -> Result<Self, ForwardError> {
        let mut former = Vec::new();
        let mut online = online;
        loop {
            if !first.is_readable_with(&online.features, state.agents.format(&online.features)) {
                // It was made for a connection that is gone.
                return Err(ForwardError::Moved);
            }
            match Self::post_first(state, &online, first, deadline).await {
                Ok(replies) => {
                    return Ok(Self {
                        state: state.clone(),
                        online,
                        replies,
                        upload: None,
                        window_update: None,
                        permit: None,
                        is_over: false,
                    });
                }
                Err(PostError::Gone) => {
                    state.lookup.lost(&path.tunnel, &online).await?;
                    former.push(online);
                    online = visitor.admitted(state, &path.tunnel).await?;
                    if former.contains(&online) {
                        return Err(ForwardError::Offline);
                    }
                }
                Err(error) => return Err(ForwardError::before_start(error)),
            }
        }
    }

    async fn post_first(
        state: &State,
        online: &Online,
        first: &mut FirstMessage,
        deadline: Option<Instant>,
    ) -> Result<PendingReply, PostError> {
        let message = &mut first.message;
        message.reply_to = match &state.reply_connection {
            Some(connection) if online.features.contains(&Feature::ReplyTo) => {
                connection.id().await
            }
            _ => None,
        };
        if let Some(policy) = &online.policy {
            policy.remove_secrets(&mut message.headers);
        }
        // Before it is sent: the reply may be here before the answer to the post.
        let expected = state
            .replies
            .expect(online.connection_id.clone(), message.request_id.clone());
        let has_reply_connection = message.reply_to.is_some();
        let mut request = ToAgentRef::HttpRequest(message);
        let format = state.agents.format(&online.features);
        state
            .agents
            .post_in(format, &online.connection_id, &mut request, BUSY_TIMEOUT)
            .await?;
        Ok(PendingReply::new(
            expected,
            &state.reply_path,
            has_reply_connection,
            deadline,
        ))
    }

    /// Whether the request may be sent to another connection after this one has refused it: the agent says that it did nothing
    /// with it, or it cannot say any more, but the method is one that changes nothing.
    fn may_be_sent_again(&self, error: &ForwardError, first: &FirstMessage) -> bool {
        match error {
            ForwardError::Moved => !first.has_rest,
            ForwardError::AgentLost => first.may_repeat() && self.replies.expected().has_nothing(),
            _ => false,
        }
    }

    /// Records who has the other end of a visitor's WebSocket that the local service has accepted.
    async fn record_websocket(&self, request: &message::HttpRequest) -> Result<(), ForwardError> {
        let (Some(visitor), ReplyPath::Cloud { connections, .. }) =
            (&request.websocket, &self.state.reply_path)
        else {
            return Ok(());
        };
        let socket = VisitorSocket {
            agent: self.online.connection_id.clone(),
            request: request.request_id.clone(),
        };
        let table = VisitorSocketsTable::new(connections);
        aside(|| table.open(visitor, &socket, now())).await?;
        Ok(())
    }

    /// Sends the rest of the body while the reply is awaited.
    fn upload(&mut self, body: BodySender<VisitorBody>, sent_bytes: Arc<AtomicU64>) {
        let window = self
            .online
            .features
            .contains(&Feature::Window)
            .then(|| self.replies.expected().window());
        let send = send_rest(
            self.state.clone(),
            self.online.clone(),
            self.replies.expected().request().clone(),
            body,
            window,
            sent_bytes.clone(),
        );
        let (fail, failed) = oneshot::channel();
        let task = self.state.uploads.spawn(
            async move {
                if let Err(error) = send.await {
                    // The exchange may have ended meanwhile; then the error interests no one.
                    let _ = fail.send(error);
                }
            }
            .instrument(Span::current()),
        );
        self.upload = Some(Upload {
            task: task.abort_handle(),
            failed,
            sent_bytes,
        });
    }

    async fn head(&mut self, until: Instant) -> Result<(ReplyHead, ReceivedChunk), ForwardError> {
        let outcome = tokio::select! {
            biased;
            head = self.replies.head(until) => head,
            error = upload_failed(&mut self.upload) => Err(error),
        };
        self.note(outcome)
    }

    /// The next bytes of the reply's body, unless the upload fails first.
    pub(crate) async fn next(&mut self) -> Result<ReceivedChunk, ForwardError> {
        let outcome = tokio::select! {
            biased;
            chunk = self.replies.next(None) => chunk,
            error = upload_failed(&mut self.upload) => Err(error),
        };
        self.note(outcome)
    }

    /// Notes if there is nothing left for the agent to drop.
    fn note<T>(&mut self, outcome: Result<T, ForwardError>) -> Result<T, ForwardError> {
        self.is_over |= matches!(
            outcome,
            Err(ForwardError::AgentLost
                | ForwardError::Offline
                | ForwardError::Moved
                | ForwardError::LocalUnreachable(_))
        );
        outcome
    }

    /// Allows the agent more of the body, if it waits for that.
    pub(crate) fn allow(&mut self, parts: u32) {
        if self.online.features.contains(&Feature::Window) {
            self.window_update = Some(self.notify(ToAgent::Window(Window {
                request_id: self.replies.expected().request().clone(),
                parts,
                reply_to: None,
            })));
        }
    }

    /// Stops what is sent of the body, because the protocol was not changed: there is none.
    fn stop_upload(&mut self) {
        if let Some(upload) = self.upload.take() {
            upload.task.abort();
        }
    }

    /// Records that the reply is complete. An upload continues to its end, as it does when a service on the visitor's own machine
    /// answers early.
    pub(crate) fn complete(mut self) {
        self.is_over = true;
        let Some(upload) = self.upload.take() else {
            return;
        };
        let uploads = self.state.uploads.clone();
        uploads.spawn(self.finish_upload(upload).instrument(Span::current()));
    }

    async fn finish_upload(mut self, mut upload: Upload) {
        loop {
            let before = upload.sent_bytes.load(Ordering::Relaxed);
            let ended = timeout(IDLE_UPLOAD_TIMEOUT, async {
                tokio::select! {
                    failed = &mut upload.failed => failed.is_err(),
                    () = self.replies.ended() => true,
                }
            });
            let ended = ended.await;
            let is_stalled = upload.sent_bytes.load(Ordering::Relaxed) == before;
            match ended {
                Ok(is_complete) => self.is_over = is_complete,
                // The agent would wait for the rest for ever.
                Err(_) if is_stalled => self.is_over = false,
                Err(_) => continue,
            }
            return upload.task.abort();
        }
    }

    /// Sends the agent a message whose arrival is not waited for.
    fn notify(&self, message: ToAgent) -> AbortHandle {
        let (state, connection) = (self.state.clone(), self.online.connection_id.clone());
        let post = async move {
            if let Err(error) = state
                .agents
                .post_patiently(&connection, &message, BUSY_TIMEOUT)
                .await
            {
                debug!(
                    error = &error as &dyn std::error::Error,
                    "the agent could not be notified"
                );
            }
        };
        self.state
            .tasks
            .spawn(post.instrument(Span::current()))
            .abort_handle()
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Some(upload) = &self.upload {
            upload.task.abort();
        }
        if let Some(update) = &self.window_update {
            update.abort();
        }
        if !self.is_over && self.online.features.contains(&Feature::Cancel) {
            self.notify(ToAgent::Cancel {
                request_id: self.replies.expected().request().clone(),
            });
        }
    }
}

/// A message that is encoded where it stands.
#[derive(serde::Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ToAgentRef<'m> {
    HttpRequest(&'m mut message::HttpRequest),
}

impl CarriesBody for ToAgentRef<'_> {
    fn body_mut(&mut self) -> Option<&mut Body> {
        let Self::HttpRequest(request) = self;
        Some(&mut request.body)
    }

    fn head(&self) -> Option<HeadRef<'_>> {
        let Self::HttpRequest(request) = self;
        Some(HeadRef::Request(request))
    }
}

async fn send_rest(
    state: Arc<State>,
    online: Online,
    request_id: RequestId,
    mut body: BodySender<VisitorBody>,
    mut window: Option<SendWindow>,
    sent_bytes: Arc<AtomicU64>,
) -> Result<(), ForwardError> {
    let format = state.agents.format(&online.features);
    loop {
        let part = match body.next_part(window.as_mut()).await {
            Ok(Some(part)) => part,
            // A closed window means that the reply is not waited for any more.
            Ok(None) | Err(SendBodyError::WindowClosed(_)) => return Ok(()),
            Err(SendBodyError::Body(error)) => return Err(broken_off(error)),
        };
        sent_bytes.fetch_max(body.sent_bytes(), Ordering::Relaxed);
        let mut message = ToAgent::BodyPart(part.into_message(request_id.clone(), None));
        state
            .agents
            .post_in(format, &online.connection_id, &mut message, BUSY_TIMEOUT)
            .await
            .map_err(ForwardError::after_start)?;
    }
}

/// Waits until the upload fails, which may be never.
async fn upload_failed(upload: &mut Option<Upload>) -> ForwardError {
    if let Some(running) = upload {
        if let Ok(error) = (&mut running.failed).await {
            *upload = None;
            return error;
        }
        *upload = None;
    }
    std::future::pending().await
}
