//! What an exchange says to the service about its request.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use http::{HeaderMap, StatusCode};
use tunnel_protocol::{
    body::Part,
    id::{ConnectionId, RequestId},
    message::{
        AgentError, AgentErrorCode, Body, CarriesBody, Format, FromAgent, HttpRequest,
        HttpResponse, Window,
    },
    writer::{MessageSender, Receipt},
};

/// What an exchange says to the service.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing {
    messages: MessageSender,
    format: Format,
    request_id: RequestId,
    reply_to: Option<ConnectionId>,
    /// How many of the response's parts were sent; its head is one.
    parts: Arc<AtomicU32>,
}

impl Outgoing {
    /// For what is said about this request, over `messages`, to a service that reads `format`.
    pub(crate) fn about(request: &HttpRequest, messages: &MessageSender, format: Format) -> Self {
        Self {
            messages: messages.clone(),
            format,
            request_id: request.request_id.clone(),
            reply_to: request.reply_to.clone(),
            parts: Arc::default(),
        }
    }

    /// The request.
    pub(crate) fn request_id(&self) -> &RequestId {
        &self.request_id
    }

    /// The response's message, with no body yet.
    pub(crate) fn response(
        &self,
        status: StatusCode,
        headers: HeaderMap,
        processing_time_ms: u64,
    ) -> HttpResponse {
        HttpResponse {
            request_id: self.request_id.clone(),
            status_code: status.as_u16(),
            headers,
            body: Body::default(),
            encoding: None,
            processing_time_ms,
            more: false,
            reply_to: self.reply_to.clone(),
        }
    }

    /// Waits for room on the connection, which is what slows a fast local service down. With an exchange's last message it waits also
    /// until the socket has taken it, if it takes turns with bodies; with a short one, which goes first, it returns the receipt. When
    /// the connection has ended the exchange is about to be dropped with it.
    ///
    /// The message is encoded before that, so that whoever waits does not hold it.
    pub(crate) fn send(
        &self,
        mut message: FromAgent,
    ) -> impl Future<Output = Option<Receipt>> + use<'_> {
        let encoded = message.encode_as(self.format);
        let (part, is_last) = match &message {
            FromAgent::HttpResponse(response) => (Some(0), !response.more),
            FromAgent::BodyPart(part) => (Some(part.part), !part.more),
            FromAgent::Error(_) => (None, true),
            _ => (None, false),
        };
        if let Some(part) = part {
            self.parts.store(part.saturating_add(1), Ordering::Relaxed);
        }
        let goes_first = match message {
            // An error must not overtake the parts before it.
            FromAgent::Error(_) => false,
            // As long as a part, and to be in turn with parts.
            FromAgent::WebsocketBatch(_) => false,
            _ => encoded.is_control(),
        };
        async move {
            if goes_first {
                let receipt = self.messages.control(encoded).await.ok()?;
                return is_last.then_some(receipt);
            }
            let receipt = self.messages.body(encoded).await.ok()?;
            if is_last {
                let _ = receipt.taken().await;
            }
            None
        }
    }

    /// Closes the visitor's WebSocket.
    pub(crate) async fn close_websocket(&self, visitor: &ConnectionId) {
        self.send(FromAgent::WebsocketClose {
            request_id: self.request_id.clone(),
            websocket: visitor.clone(),
        })
        .await;
    }

    /// Allows the parts of the request's body with numbers below `parts`; 0 says that no more of it is wanted.
    pub(crate) async fn window(&self, parts: u32) {
        self.send(FromAgent::Window(Window {
            request_id: self.request_id.clone(),
            parts,
            reply_to: self.reply_to.clone(),
        }))
        .await;
    }

    /// How the service reads bodies.
    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Sends a part of the response's body.
    pub(crate) async fn part(&self, part: Part) {
        let message = part.into_message(self.request_id.clone(), self.reply_to.clone());
        self.send(FromAgent::BodyPart(message)).await;
    }

    /// Says that there is no response, or no more of it.
    pub(crate) async fn error(&self, code: AgentErrorCode, message: String) {
        let request_id = Some(self.request_id.clone());
        self.send(FromAgent::Error(AgentError {
            request_id,
            code,
            message,
            parts: self.parts.load(Ordering::Relaxed),
            reply_to: self.reply_to.clone(),
        }))
        .await;
    }
}
