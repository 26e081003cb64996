//! An upgraded connection, such as a WebSocket: bytes both ways between the service and the local service, until both sides have
//! ended. Nothing here reads them, so that every protocol passes.

use std::io;

use futures_util::TryStreamExt;
use http_body_util::StreamBody;
use hyper::{body::Frame, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio_util::io::ReaderStream;
use tunnel_protocol::body::{BodySender, Mode, SendBodyError, window::SendWindow};

use crate::{
    exchange::{Outgoing, UploadStream},
    upload::BodyParts,
};

/// How many bytes are read from the local service at once.
const READ_BYTES: usize = 32 * 1024;

/// Carries bytes both ways, and returns how many the local service sent. One side may end before the other.
///
/// # Errors
/// When either side's connection breaks.
pub(crate) async fn carry(
    upgraded: Upgraded,
    upload: UploadStream,
    window: Option<&mut SendWindow>,
    outgoing: &Outgoing,
) -> io::Result<u64> {
    let (reading, writing) = split(TokioIo::new(upgraded));
    let (sent, ()) = tokio::try_join!(
        to_service(reading, window, outgoing),
        to_local_service(upload, writing)
    )?;
    Ok(sent)
}

async fn to_service(
    reading: ReadHalf<TokioIo<Upgraded>>,
    mut window: Option<&mut SendWindow>,
    outgoing: &Outgoing,
) -> io::Result<u64> {
    let bytes = ReaderStream::with_capacity(reading, READ_BYTES).map_ok(Frame::data);
    let mut body = BodySender::new(StreamBody::new(bytes), Mode::Raw);
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
) -> io::Result<()> {
    let Some(mut parts): Option<BodyParts> = upload.begin() else {
        return Ok(());
    };
    loop {
        let (bytes, more) = upload.next(&mut parts).await;
        writing.write_all(&bytes?).await?;
        writing.flush().await?;
        if !more {
            return writing.shutdown().await;
        }
    }
}
