//! An upgraded connection, such as a WebSocket: bytes both ways between the service and the local service, until both sides have
//! ended. Nothing here reads them, so that every protocol passes.

use std::{future::pending, io, time::Duration};

use futures_util::TryStreamExt;
use http_body_util::StreamBody;
use hyper::{body::Frame, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncWriteExt, ReadHalf, WriteHalf, split},
    sync::oneshot,
    time::sleep,
};
use tokio_util::io::ReaderStream;
use tunnel_protocol::body::{BodySender, Mode, SendBodyError, window::SendWindow};

use crate::{
    inspector::{Recording, Side},
    outgoing::Outgoing,
    upload::{UploadProgress, UploadStream},
};

/// How many bytes are read from the local service at once.
const READ_BYTES: usize = 32 * 1024;
/// How long a visitor may say nothing to a local service that has ended its side.
const MAX_STALL: Duration = Duration::from_secs(60);

/// Carries bytes both ways, and returns how many the local service sent. One side may end before the other.
///
/// # Errors
/// When either side's connection breaks.
pub(crate) async fn carry(
    upgraded: Upgraded,
    upload: UploadStream,
    progress: UploadProgress,
    window: Option<&mut SendWindow>,
    outgoing: &Outgoing,
    recording: &Recording,
) -> io::Result<u64> {
    let (reading, writing) = split(TokioIo::new(upgraded));
    let (end, ended) = oneshot::channel();
    let to_service = async {
        let sent = to_service(reading, window, outgoing, recording).await;
        // The other direction may have ended already.
        let _ = end.send(());
        sent
    };
    let to_local_service = async {
        tokio::select! {
            sent = to_local_service(upload, writing, recording) => sent,
            () = stalled(ended, progress) => Ok(()),
        }
    };
    let (sent, ()) = tokio::try_join!(to_service, to_local_service)?;
    Ok(sent)
}

/// Completes when the local service has ended its side and nothing more has been sent to it for a while.
async fn stalled(ended: oneshot::Receiver<()>, progress: UploadProgress) {
    // An error ends both directions.
    if ended.await.is_err() {
        return pending().await;
    }
    loop {
        let before = progress.last();
        sleep(MAX_STALL).await;
        if progress.last() == before {
            return;
        }
    }
}

async fn to_service(
    reading: ReadHalf<TokioIo<Upgraded>>,
    mut window: Option<&mut SendWindow>,
    outgoing: &Outgoing,
    recording: &Recording,
) -> io::Result<u64> {
    let bytes = ReaderStream::with_capacity(reading, READ_BYTES).map_ok(|bytes| {
        recording.upgraded_bytes(Side::LocalService, &bytes);
        Frame::data(bytes)
    });
    let mut body = BodySender::new(StreamBody::new(bytes), Mode::Raw, outgoing.format());
    body.begin();
    loop {
        match body.next_part(window.as_deref_mut()).await {
            Ok(Some(part)) => outgoing.part(part).await,
            // A closed window means that the connection to the service has ended.
            Ok(None) | Err(SendBodyError::WindowClosed(_)) => return Ok(body.sent_bytes()),
            Err(SendBodyError::Body(error)) => return Err(error),
        }
    }
}

async fn to_local_service(
    mut upload: UploadStream,
    mut writing: WriteHalf<TokioIo<Upgraded>>,
    recording: &Recording,
) -> io::Result<()> {
    while let Some(bytes) = upload.next().await {
        let bytes = bytes?;
        recording.upgraded_bytes(Side::Visitor, &bytes);
        writing.write_all(&bytes).await?;
        writing.flush().await?;
    }
    writing.shutdown().await
}
