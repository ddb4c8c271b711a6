//! One connection: frames in and out, heartbeats, and how its end shows.

use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio_util::codec::{FramedRead, FramedWrite, LengthDelimitedCodec};

use super::frame::Frame;
use super::ControlConfig;
use crate::{Error, ErrorKind, Result};

type Reader = FramedRead<Box<dyn AsyncRead + Send + Unpin>, LengthDelimitedCodec>;
type Writer = FramedWrite<Box<dyn AsyncWrite + Send + Unpin>, LengthDelimitedCodec>;

/// The longest frame before a peer has proved that it belongs to the group, in bytes.
const MAX_STRANGER_BYTES: usize = 1024;

/// How long a peer may take to prove that it belongs to the group.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(5);

/// A connection over any kind of socket.
pub(super) struct Connection {
    reader: Reader,
    writer: Writer,
}

impl Connection {
    pub(super) fn new(
        reader: impl AsyncRead + Send + Unpin + 'static,
        writer: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Self {
        let codec = || {
            LengthDelimitedCodec::builder().max_frame_length(MAX_STRANGER_BYTES).new_codec()
        };
        Self {
            reader: FramedRead::new(Box::new(reader), codec()),
            writer: FramedWrite::new(Box::new(writer), codec()),
        }
    }

    /// The next frame of a handshake.
    pub(super) async fn receive(&mut self) -> Result<Frame> {
        receive(&mut self.reader).await
    }

    pub(super) async fn send(&mut self, frame: &Frame) -> Result<()> {
        self.writer.send(frame.encode()?).await.map_err(broken)
    }

    /// Raises the limit of frames, for a peer that belongs to the group.
    pub(super) fn trust(&mut self, config: &ControlConfig) {
        // A message's frame has its tag besides the body.
        self.reader.decoder_mut().set_max_frame_length(config.max_frame_bytes + 1);
        self.writer.encoder_mut().set_max_frame_length(config.max_frame_bytes + 1);
    }

    pub(super) fn split(self) -> (Reader, Writer) {
        (self.reader, self.writer)
    }
}

async fn receive(reader: &mut Reader) -> Result<Frame> {
    match reader.next().await {
        Some(Ok(bytes)) => Frame::decode(bytes.freeze()),
        Some(Err(error)) if error.kind() == std::io::ErrorKind::InvalidData => {
            Err(Error::new(ErrorKind::Protocol, "reading a frame", error.to_string())
                .with_source(error))
        }
        Some(Err(error)) => Err(broken(error)),
        None => Err(Error::new(
            ErrorKind::PeerLost,
            "reading a frame",
            "the peer closed the connection: its process ended",
        )),
    }
}

fn broken(error: std::io::Error) -> Error {
    Error::new(ErrorKind::PeerLost, "using a control connection", error.to_string())
        .with_source(error)
}

/// Hands every frame to `take` until the connection ends; heartbeats only prove life.
pub(super) async fn read_frames(
    mut reader: Reader,
    config: &ControlConfig,
    mut take: impl FnMut(Frame) -> Result<()>,
) -> Error {
    loop {
        match tokio::time::timeout(config.heartbeat_timeout, receive(&mut reader)).await {
            Ok(Ok(Frame::Heartbeat)) => {}
            Ok(Ok(frame)) => {
                if let Err(error) = take(frame) {
                    return error;
                }
            }
            Ok(Err(error)) => return error,
            Err(_) => {
                let seconds = config.heartbeat_timeout.as_secs_f64();
                let words = format!("no sign of life for {seconds:.1} s");
                return Error::new(ErrorKind::PeerLost, "reading a frame", words);
            }
        }
    }
}

/// Writes what is queued, and heartbeats, until the shutdown or a failure.
///
/// A failure shows at the reader too, whose error is the one that counts.
pub(super) async fn write_frames(
    mut writer: Writer,
    mut queue: mpsc::UnboundedReceiver<Frame>,
    mut shutdown: watch::Receiver<bool>,
    config: &ControlConfig,
) {
    let mut heartbeat = tokio::time::interval(config.heartbeat_interval);
    heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let (first, last) = tokio::select! {
            biased;
            frame = queue.recv() => match frame {
                Some(frame) => (frame, false),
                None => (Frame::Goodbye, true),
            },
            _ = shutdown.wait_for(|closing| *closing) => (Frame::Goodbye, true),
            _ = heartbeat.tick() => (Frame::Heartbeat, false),
        };
        let write = async {
            feed(&mut writer, &first).await?;
            // All that is queued goes out in as few system calls as possible.
            while let Ok(frame) = queue.try_recv() {
                feed(&mut writer, &frame).await?;
            }
            <Writer as SinkExt<Bytes>>::flush(&mut writer).await.map_err(broken)
        };
        match tokio::time::timeout(config.heartbeat_timeout, write).await {
            Ok(Ok(())) if !last => {}
            Ok(Ok(())) => return,
            Ok(Err(error)) => {
                tracing::debug!(%error, "a control connection ended while writing");
                return;
            }
            Err(_) => {
                tracing::warn!("a peer accepts no bytes any more; its connection is given up");
                return;
            }
        }
    }
}

async fn feed(writer: &mut Writer, frame: &Frame) -> Result<()> {
    let bytes: Bytes = frame.encode()?;
    writer.feed(bytes).await.map_err(broken)
}
