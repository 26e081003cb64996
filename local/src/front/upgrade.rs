//! A visitor's upgraded connection, such as a WebSocket: what the visitor sends is the request's body, and what the local service
//! sends is the body of the response that changed the protocol.

use std::{io, sync::Arc};

use bytes::{Buf, Bytes};
use futures_util::{StreamExt, TryStreamExt, stream};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncWriteExt, ReadHalf, WriteHalf, split},
    sync::oneshot,
    time::timeout,
};
use tokio_util::io::ReaderStream;
use tracing::debug;
use tunnel_forward::{request::VisitorBody, response::ResponseBody};

use crate::{
    front::{listener::ConnectionPermit, socket::MAX_STALL},
    operator::{UpgradedVisit, Visit},
};

/// How many bytes are read from a visitor at once.
const READ_BYTES: usize = 32 * 1024;

type Socket = TokioIo<Upgraded>;

/// A connection whose protocol is changed once its response says so.
#[derive(Debug)]
pub(crate) struct Upgrade {
    upgraded: OnUpgrade,
    reading: oneshot::Sender<ReadHalf<Socket>>,
    noted: Arc<Visit>,
}

impl Upgrade {
    /// The connection, and what the visitor will send over it.
    pub(crate) fn new(
        upgraded: OnUpgrade,
        permit: ConnectionPermit,
        noted: Arc<Visit>,
    ) -> (Self, VisitorBody) {
        let (reading, received) = oneshot::channel();
        let reader = noted.clone();
        let body = stream::once(received)
            .map_err(|_| io::Error::other("the protocol was not changed"))
            .map_ok(|reading| ReaderStream::with_capacity(reading, READ_BYTES))
            .try_flatten()
            .map(move |bytes| {
                // The connection is open for as long as it is read.
                let _open = &permit;
                let bytes = bytes?;
                reader.received(bytes.len());
                Ok(Frame::data(bytes))
            });
        (
            Self {
                upgraded,
                reading,
                noted,
            },
            BodyExt::boxed_unsync(StreamBody::new(body)),
        )
    }

    /// Sends the visitor what the local service sends, until that ends. If it breaks off, so does the connection.
    pub(crate) async fn carry(self, body: ResponseBody) {
        let upgraded = match self.upgraded.await {
            Ok(upgraded) => upgraded,
            Err(error) => {
                return debug!(%error, "the visitor left before the protocol was changed");
            }
        };
        let (reading, writing) = split(TokioIo::new(upgraded));
        // Without a reader the exchange has ended already, and the body says why.
        let _ = self.reading.send(reading);
        let noted = self.noted.upgraded();
        if let Err(error) = write(body, writing, &noted).await {
            debug!(
                error = &*error as &dyn std::error::Error,
                "an upgraded connection broke"
            );
        }
    }
}

async fn write(
    mut body: ResponseBody,
    mut writing: WriteHalf<Socket>,
    noted: &UpgradedVisit,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    while let Some(frame) = body.frame().await {
        let mut bytes: Bytes = frame?.into_data().unwrap_or_default();
        noted.sent(bytes.len());
        while !bytes.is_empty() {
            let taken = timeout(MAX_STALL, writing.write(&bytes)).await??;
            bytes.advance(taken);
        }
        timeout(MAX_STALL, writing.flush()).await??;
    }
    Ok(writing.shutdown().await?)
}
