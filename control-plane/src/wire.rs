//! Frames, and how they cross a socket.
//!
//! A frame is a big-endian `u32` length and that many bytes. The first byte is the kind. What follows depends on it:
//!
//! - A message: the number of its channel, a big-endian `u16`, and the unchanged body of the caller. A message that may
//!   wait for others has a kind of its own.
//! - A reply: the number of its call, a big-endian `u64`, and the outcome.
//! - A carried frame: the set of its seats in postcard, as blocks of 64, and the frame without its length.
//! - A signal: a [`Signal`] in postcard.
//!
//! The first frame of each side crosses the socket as it is, all others in sealed records.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_util::codec::{Decoder, LengthDelimitedCodec};

use crate::seal::{Handshake, Opener, Sealer};
use crate::{ChannelId, Peer, Role};
use engine_core::{BitSet, Error, ErrorKind, ErrorReport, Rank, Result};

pub(super) const MAGIC: [u8; 8] = *b"ckpt-eng";
/// The longest frame that is accepted from a peer before its authentication.
pub(super) const HANDSHAKE_FRAME: usize = 1024;
/// The room that a frame needs beyond its body.
pub(super) const FRAME_OVERHEAD: usize = 64;

const MESSAGE: u8 = 0;
const SIGNAL: u8 = 1;
const REPLY: u8 = 2;
const CARRIED: u8 = 3;
const PATIENT: u8 = 4;
/// The bytes that are read, or gathered for writing, at once.
const CHUNK: usize = 64 * 1024;
/// The bytes of a long body that are copied for a connection at once. The body itself is shared by all connections.
const PIECE: usize = 16 * 1024;
/// The room that the seats of a carried frame need, at most.
pub(super) const SEATS_ROOM: usize = 64 * 1024;
/// The most blocks of seats of one carried frame. Each takes at most 14 bytes.
pub(super) const SEAT_BLOCKS: usize = 4 * 1024;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Frame {
    /// The bytes of the channel's user, which no serialiser touches.
    Message {
        channel: ChannelId,
        body: Bytes,
        /// Whether a relay may hold it back for the equal messages of others.
        patient: bool,
    },
    Signal(Signal),
    /// How a call ended. `outcome` is an [`Outcome`], encoded once for all ranks that receive it.
    Reply {
        id: u64,
        outcome: Bytes,
    },
    /// The same frame from or for several ranks, on the connection of their relay.
    Carried {
        seats: BitSet<u32>,
        frame: Box<Self>,
    },
}

/// A message of the control plane itself.
///
/// `Hello` and `Refused` keep their place and shape in every version of the protocol, so that any
/// two versions can tell each other that they differ.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Signal {
    Hello(Hello),
    Refused(ErrorReport),
    /// The second message of the Noise handshake.
    Answer(Bytes),
    Introduction(Introduction),
    Welcome {
        rank: Rank,
        terms: Terms,
        /// The unread bytes, by channel, of the process that had the rank before.
        unread: Vec<(ChannelId, u64)>,
    },
    Call {
        id: u64,
        call: Call,
    },
    Withdraw {
        id: u64,
    },
    Heartbeat,
    Goodbye,
    /// How many bytes of the receiver's messages were read, by channel.
    Read {
        bytes: Vec<(ChannelId, u64)>,
    },
    /// A relay introduces itself. The answer is another `Relay`.
    Relay(Terms),
    /// From a relay: the connection of a rank has ended, for this reason. To a relay: end it.
    Lost(ErrorReport),
    /// From a relay: how long nothing was heard of a rank, although its heartbeats were due.
    Silent(Duration),
}

impl Signal {
    /// Whether it is the last frame of a seat.
    pub(super) fn is_last(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::Goodbye | Self::Lost(_))
    }
}

/// The first frame: fields that every version understands, and a body that only the same version does (the first
/// message of the Noise handshake).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) magic: [u8; 8],
    pub(super) version: u32,
    pub(super) body: Bytes,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Introduction {
    pub(super) role: Role,
    pub(super) rank: Option<Rank>,
    pub(super) terms: Terms,
}

/// What a side demands of the other side.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Terms {
    /// The longest frame that it accepts.
    pub(super) max_frame: u32,
    /// How often it sends a heartbeat, unless the other side needs them more often.
    pub(super) heartbeat_interval: Duration,
    /// The silence after which it gives the other side up.
    pub(super) heartbeat_timeout: Duration,
}

/// An operation that ends when other ranks take part too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Call {
    /// Members may leave the size to the leader.
    Gather {
        world_size: Option<u32>,
        payload: Bytes,
    },
    Barrier {
        name: String,
    },
}

/// How a call ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Outcome {
    /// The ranks of the group, and how many updates have begun on the leader.
    Table {
        peers: Vec<Peer>,
        updates: u64,
    },
    Passed,
    /// The call was withdrawn while these ranks were missing.
    Missing(Vec<Rank>),
    Failed(ErrorReport),
}

impl Frame {
    /// The approximate number of bytes that it takes while it waits.
    pub(super) fn cost(&self) -> usize {
        let body = match self {
            Self::Message { body, .. } | Self::Reply { outcome: body, .. } => body.len(),
            Self::Signal(Signal::Call { call: Call::Gather { payload, .. }, .. }) => payload.len(),
            Self::Signal(_) => 0,
            Self::Carried { seats, frame } => {
                seats.blocks() * size_of::<(u32, u64)>() + frame.cost()
            }
        };
        body + FRAME_OVERHEAD
    }

    pub(super) fn decode(mut bytes: BytesMut) -> Result<Self> {
        if bytes.first() != Some(&CARRIED) {
            return Self::decode_plain(bytes);
        }
        // A block takes less room there than here, so a peer could have memory taken with a long list.
        let room = &bytes[1..bytes.len().min(1 + SEATS_ROOM)];
        let (seats, rest) = postcard::take_from_bytes(room)
            .map_err(|error| malformed("its seats do not decode").with_source(error))?;
        let length = 1 + room.len() - rest.len();
        bytes.advance(length);
        Ok(Self::Carried { seats, frame: Box::new(Self::decode_plain(bytes)?) })
    }

    /// Decodes any frame but a carried one, because carried frames do not nest.
    fn decode_plain(mut bytes: BytesMut) -> Result<Self> {
        match bytes.first() {
            Some(&kind @ (MESSAGE | PATIENT)) => {
                bytes.advance(1);
                let number =
                    bytes.try_get_u16().map_err(|_| malformed("a message of no channel"))?;
                let (channel, body) = (ChannelId(number), bytes.freeze());
                Ok(Self::Message { channel, body, patient: kind == PATIENT })
            }
            Some(&SIGNAL) => Ok(Self::Signal(decode(&bytes[1..])?)),
            Some(&REPLY) => {
                bytes.advance(1);
                let id = bytes.try_get_u64().map_err(|_| malformed("a reply to no call"))?;
                Ok(Self::Reply { id, outcome: bytes.freeze() })
            }
            Some(kind) => Err(malformed(format!("frames of kind {kind} do not exist"))),
            None => Err(malformed("an empty frame")),
        }
    }

    /// Writes the frame without its length and its body. Returns the body, which is shared, not copied.
    fn put(&self, out: &mut BytesMut) -> Result<Bytes> {
        match self {
            Self::Message { channel, body, patient } => {
                out.put_u8(if *patient { PATIENT } else { MESSAGE });
                out.put_u16(channel.0);
                Ok(body.clone())
            }
            Self::Reply { id, outcome } => {
                out.put_u8(REPLY);
                out.put_u64(*id);
                Ok(outcome.clone())
            }
            Self::Signal(signal) => {
                out.put_u8(SIGNAL);
                out.put_slice(&encode(signal)?);
                Ok(Bytes::new())
            }
            Self::Carried { seats, frame } => {
                out.put_u8(CARRIED);
                out.put_slice(&encode(seats)?);
                frame.put(out)
            }
        }
    }

    /// Writes the frame with its length but without its body. Returns the body.
    pub(super) fn encode_head(&self, out: &mut BytesMut) -> Result<Bytes> {
        let start = out.len();
        out.put_u32(0);
        let body = self.put(out)?;
        let length = out.len() - start - size_of::<u32>() + body.len();
        let length = u32::try_from(length)
            .map_err(|_| malformed(format!("a frame of {length} bytes is too long")))?;
        out[start..start + size_of::<u32>()].copy_from_slice(&length.to_be_bytes());
        Ok(body)
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn encode(&self, out: &mut BytesMut) -> Result<()> {
        let body = self.encode_head(out)?;
        out.put_slice(&body);
        Ok(())
    }
}

pub(super) fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_stdvec(value).map_err(|error| {
        Error::new(ErrorKind::Protocol, "writing a frame", "it cannot be encoded")
            .with_source(error)
    })
}

/// Decodes a value that fills `bytes` entirely.
pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(malformed(format!("{} bytes too many", rest.len()))),
        Err(error) => Err(malformed("it does not decode").with_source(error)),
    }
}

pub(super) fn malformed(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Protocol, "reading a frame", why)
}

/// The error for a frame that was not expected.
pub(super) fn unexpected(frame: &Frame) -> Error {
    malformed(match frame {
        Frame::Message { .. } => "a message was not due".to_owned(),
        Frame::Reply { .. } => "a reply was not due".to_owned(),
        Frame::Carried { .. } => "a carried frame was not due".to_owned(),
        Frame::Signal(signal) => {
            let text = format!("{signal:?}");
            let name = text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
            format!("`{name}` was not due")
        }
    })
}

/// A connected socket.
pub(super) struct Wire {
    pub(super) reader: FrameReader,
    pub(super) writer: FrameWriter,
}

/// When bytes of a peer came last. Clones share the time.
#[derive(Clone, Debug)]
pub(super) struct Heard(Arc<Mutex<Instant>>);

impl Default for Heard {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }
}

impl Heard {
    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub(super) fn ago(&self) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

/// The traffic over the connections of a control plane so far, both ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct TrafficCounts {
    /// Frames: messages, and frames of the control plane itself.
    pub frames_sent: u64,
    /// As `frames_sent`, the other way.
    pub frames_received: u64,
    /// Bytes on the wire.
    pub bytes_sent: u64,
    /// As `bytes_sent`, the other way.
    pub bytes_received: u64,
}

/// Counts the traffic over connections. Relaxed order suffices, because the numbers are only reported.
#[derive(Debug, Default)]
pub(super) struct Counters {
    frames_sent: AtomicU64,
    frames_received: AtomicU64,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
}

impl Counters {
    pub(super) fn read(&self) -> TrafficCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TrafficCounts {
            frames_sent: read(&self.frames_sent),
            frames_received: read(&self.frames_received),
            bytes_sent: read(&self.bytes_sent),
            bytes_received: read(&self.bytes_received),
        }
    }
}

fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

pub(super) struct FrameReader {
    pub(super) heard: Heard,
    counters: Arc<Counters>,
    io: Pin<Box<dyn AsyncRead + Send>>,
    /// Decrypted frames, or the beginning of one.
    buffer: BytesMut,
    /// Encrypted records, or the beginning of one.
    sealed: BytesMut,
    opener: Option<Opener>,
    codec: LengthDelimitedCodec,
}

pub(super) struct FrameWriter {
    counters: Arc<Counters>,
    io: Pin<Box<dyn AsyncWrite + Send>>,
    buffer: BytesMut,
    /// The rest of a long body, to be written after the buffer.
    rest: Bytes,
    sealed: BytesMut,
    sealer: Option<Sealer>,
}

impl Wire {
    pub(super) fn new(
        reader: Box<dyn AsyncRead + Send>,
        writer: Box<dyn AsyncWrite + Send>,
    ) -> Self {
        let codec = LengthDelimitedCodec::builder().max_frame_length(HANDSHAKE_FRAME).new_codec();
        Self {
            reader: FrameReader {
                heard: Heard::default(),
                counters: Arc::default(),
                io: reader.into(),
                buffer: BytesMut::new(),
                sealed: BytesMut::new(),
                opener: None,
                codec,
            },
            writer: FrameWriter {
                counters: Arc::default(),
                io: writer.into(),
                buffer: BytesMut::new(),
                rest: Bytes::new(),
                sealed: BytesMut::new(),
                sealer: None,
            },
        }
    }

    /// Counts its traffic from here on.
    pub(super) fn count(&mut self, counters: &Arc<Counters>) {
        self.reader.counters = Arc::clone(counters);
        self.writer.counters = Arc::clone(counters);
    }

    /// Encrypts both directions from here on.
    pub(super) fn seal(&mut self, handshake: Handshake) -> Result<()> {
        let (sealer, opener) = handshake.finish()?;
        // Bytes that came after the last frame of the handshake are encrypted already.
        self.reader.sealed = self.reader.buffer.split();
        (self.writer.sealer, self.reader.opener) = (Some(sealer), Some(opener));
        self.reader.unseal()
    }
}

impl FrameReader {
    pub(super) fn set_max_frame(&mut self, bytes: usize) {
        self.codec.set_max_frame_length(bytes);
    }

    /// The next frame; `None` when the peer closed the connection between two frames. It is a timeout if no byte
    /// comes for `patience`. A large frame may take longer.
    pub(super) async fn next(&mut self, patience: Duration) -> Result<Option<Frame>> {
        loop {
            // The codec checks the length against its limit before it reserves room for the frame.
            match self.codec.decode(&mut self.buffer) {
                Ok(Some(bytes)) => {
                    count(&self.counters.frames_received, 1);
                    return Frame::decode(bytes).map(Some);
                }
                Ok(None) => {}
                Err(error) => {
                    return Err(malformed(format!(
                        "a frame of more than {} bytes",
                        self.codec.max_frame_length()
                    ))
                    .with_source(error));
                }
            }
            let arriving = if self.opener.is_some() { &mut self.sealed } else { &mut self.buffer };
            if arriving.capacity() - arriving.len() < CHUNK / 16 {
                arriving.reserve(CHUNK);
            }
            let read = timeout(patience, self.io.read_buf(arriving)).await;
            if let Ok(Ok(bytes @ 1..)) = read {
                count(&self.counters.bytes_received, bytes);
                self.heard.note();
            }
            match read {
                Ok(Ok(0)) if self.buffer.is_empty() && self.sealed.is_empty() => return Ok(None),
                Ok(Ok(0)) => {
                    let error = io::Error::from(io::ErrorKind::UnexpectedEof);
                    return Err(Error::io("reading a frame", error));
                }
                Ok(Ok(_)) => self.unseal()?,
                Ok(Err(error)) => return Err(Error::io("reading a frame", error)),
                Err(_) => return Err(silent("reading a frame", patience)),
            }
        }
    }

    fn unseal(&mut self) -> Result<()> {
        match &mut self.opener {
            Some(opener) => opener.open(&mut self.sealed, &mut self.buffer),
            None => Ok(()),
        }
    }
}

impl FrameWriter {
    /// Adds a frame to the next flush. Returns whether that has to come before the next frame is added.
    pub(super) fn push(&mut self, frame: &Frame) -> Result<bool> {
        debug_assert!(self.rest.is_empty(), "a long body was not flushed");
        let body = frame.encode_head(&mut self.buffer)?;
        if body.len() > PIECE {
            self.rest = body;
        } else {
            self.buffer.put_slice(&body);
        }
        count(&self.counters.frames_sent, 1);
        Ok(!self.rest.is_empty() || self.buffer.len() >= CHUNK)
    }

    /// Writes what was pushed. It is a timeout if the peer accepts no byte for `patience`.
    pub(super) async fn flush(&mut self, patience: Duration) -> Result<()> {
        loop {
            if self.buffer.is_empty() && !self.rest.is_empty() {
                self.buffer.put_slice(&self.rest.split_to(self.rest.len().min(PIECE)));
            }
            if self.buffer.is_empty() && self.sealed.is_empty() {
                break;
            }
            if let Some(sealer) = &mut self.sealer
                && self.sealed.is_empty()
            {
                sealer.seal(&mut self.buffer, &mut self.sealed)?;
            }
            let leaving = if self.sealer.is_some() { &mut self.sealed } else { &mut self.buffer };
            match timeout(patience, self.io.write_buf(leaving)).await {
                Ok(Ok(0)) => {
                    let error = io::Error::from(io::ErrorKind::BrokenPipe);
                    return Err(Error::io("writing a frame", error));
                }
                Ok(Ok(bytes)) => count(&self.counters.bytes_sent, bytes),
                Ok(Err(error)) => return Err(Error::io("writing a frame", error)),
                Err(_) => return Err(silent("writing a frame", patience)),
            }
        }
        // Every connection has these buffers, so large ones are not kept.
        for buffer in [&mut self.buffer, &mut self.sealed] {
            if buffer.capacity() > PIECE {
                *buffer = BytesMut::new();
            }
        }
        Ok(())
    }

    pub(super) async fn send(&mut self, signal: Signal, patience: Duration) -> Result<()> {
        self.push(&Frame::Signal(signal))?;
        self.flush(patience).await
    }

    pub(super) async fn shutdown(&mut self) {
        if let Err(error) = self.io.shutdown().await {
            tracing::trace!(%error, "the connection was closed already");
        }
    }
}

fn silent(operation: &str, patience: Duration) -> Error {
    Error::new(ErrorKind::Timeout, operation, format!("the peer was silent for {patience:?}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::UPDATES;
    use engine_core::control::PROTOCOL_VERSION;

    fn message(channel: ChannelId, body: &'static [u8], patient: bool) -> Frame {
        Frame::Message { channel, body: Bytes::from_static(body), patient }
    }

    fn frames() -> Vec<Frame> {
        let introduction = Introduction {
            role: Role::Rollout,
            rank: Some(Rank(3)),
            terms: Terms {
                max_frame: 1 << 20,
                heartbeat_interval: Duration::from_secs(1),
                heartbeat_timeout: Duration::from_secs(10),
            },
        };
        let body = Bytes::from(encode(&introduction).unwrap());
        let error = Error::new(ErrorKind::Mismatch, "joining", "rank 3 is taken").rank(Rank(3));
        let peer = Peer { rank: Rank(1), role: Role::Rollout, payload: Bytes::from_static(b"p") };
        let outcome =
            Bytes::from(encode(&Outcome::Table { peers: vec![peer], updates: 0 }).unwrap());
        vec![
            message(UPDATES, b"", true),
            message(ChannelId(700), b"body", false),
            Frame::Signal(Signal::Hello(Hello { magic: MAGIC, version: 1, body })),
            Frame::Signal(Signal::Refused(ErrorReport::from(&error))),
            Frame::Signal(Signal::Answer(Bytes::from_static(&[1; 48]))),
            Frame::Signal(Signal::Introduction(introduction.clone())),
            Frame::Signal(Signal::Welcome {
                rank: Rank(3),
                terms: introduction.terms,
                unread: vec![(ChannelId(16), 80)],
            }),
            Frame::Signal(Signal::Call {
                id: 1,
                call: Call::Gather { world_size: Some(2), payload: Bytes::from_static(b"x") },
            }),
            Frame::Signal(Signal::Call { id: 2, call: Call::Barrier { name: "b".into() } }),
            Frame::Signal(Signal::Withdraw { id: 2 }),
            Frame::Reply { id: 1, outcome: outcome.clone() },
            Frame::Carried {
                seats: BitSet::from([0, 300]),
                frame: Box::new(message(UPDATES, b"other", true)),
            },
            Frame::Carried {
                seats: BitSet::from([7]),
                frame: Box::new(Frame::Reply { id: 1, outcome }),
            },
            Frame::Signal(Signal::Relay(introduction.terms)),
            Frame::Signal(Signal::Lost(ErrorReport::from(&error))),
            Frame::Signal(Signal::Silent(Duration::from_secs(3))),
            Frame::Signal(Signal::Heartbeat),
            Frame::Signal(Signal::Goodbye),
            Frame::Signal(Signal::Read {
                bytes: vec![(ChannelId(16), 80), (ChannelId(17), 1 << 40)],
            }),
        ]
    }

    #[test]
    fn every_frame_survives_the_wire() {
        let mut bytes = BytesMut::new();
        for frame in frames() {
            frame.encode(&mut bytes).unwrap();
        }
        let mut codec = LengthDelimitedCodec::new();
        for frame in frames() {
            let decoded = Frame::decode(codec.decode(&mut bytes).unwrap().unwrap()).unwrap();
            assert_eq!(decoded, frame);
        }
        assert!(bytes.is_empty());
    }

    /// Ranks of two builds must not decode each other's frames as different ones. Whoever changes the encoding has to
    /// change `PROTOCOL_VERSION` too.
    #[test]
    fn frames_are_encoded_as_this_protocol_version_encodes_them() {
        let encoded = |frame: Frame| {
            let mut bytes = BytesMut::new();
            frame.encode(&mut bytes).unwrap();
            bytes.to_vec()
        };
        assert_eq!(PROTOCOL_VERSION, 14);
        for (patient, kind) in [(false, 0), (true, 4)] {
            let message = message(ChannelId(0x0102), b"x", patient);
            assert_eq!(encoded(message), [0, 0, 0, 4, kind, 1, 2, b'x']);
        }
        let read = Signal::Read { bytes: vec![(ChannelId(16), 80)] };
        assert_eq!(encoded(Frame::Signal(read)), [0, 0, 0, 5, 1, 9, 1, 16, 80]);
        let payload = Bytes::from_static(b"x");
        let gather = |world_size| Signal::Call {
            id: 1,
            call: Call::Gather { world_size, payload: payload.clone() },
        };
        let (told, untold) = (encoded(Frame::Signal(gather(Some(2)))), gather(None));
        assert_eq!(told, [0, 0, 0, 8, 1, 5, 1, 0, 1, 2, 1, b'x']);
        assert_eq!(encoded(Frame::Signal(untold)), [0, 0, 0, 7, 1, 5, 1, 0, 0, 1, b'x']);
        assert_eq!(encoded(Frame::Signal(Signal::Goodbye)), [0, 0, 0, 2, 1, 8]);
        let reply = Frame::Reply { id: 0x0102, outcome: payload.clone() };
        let bytes = [0, 0, 0, 10, 2, 0, 0, 0, 0, 0, 0, 1, 2, b'x'];
        assert_eq!(encoded(reply.clone()), bytes);
        let carried = Frame::Carried { seats: BitSet::from([1, 2, 200]), frame: Box::new(reply) };
        let bytes = [0, 0, 0, 17, 3, 2, 0, 6, 3, 128, 2, 2, 0, 0, 0, 0, 0, 0, 1, 2, b'x'];
        assert_eq!(encoded(carried), bytes);
    }

    #[test]
    fn seats_beyond_their_room_are_refused_and_the_most_that_one_frame_carries_fit() {
        // Those that take the most room: far from one another, and the last of their blocks.
        let of = |blocks: u32| Frame::Carried {
            seats: (0..blocks).map(|block| u32::MAX - 64 * block).collect(),
            frame: Box::new(Frame::Signal(Signal::Goodbye)),
        };
        let decoded = |frame: &Frame| {
            let mut bytes = BytesMut::new();
            frame.encode(&mut bytes).unwrap();
            bytes.advance(4);
            Frame::decode(bytes)
        };
        let most = of(SEAT_BLOCKS as u32);
        assert_eq!(decoded(&most).unwrap(), most);
        let error = decoded(&of(2 * SEAT_BLOCKS as u32)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
    }

    #[test]
    fn bytes_after_the_end_of_a_frame_are_refused() {
        let mut bytes = BytesMut::new();
        Frame::Signal(Signal::Goodbye).encode(&mut bytes).unwrap();
        bytes.put_u8(0);
        bytes.advance(4);
        assert_eq!(Frame::decode(bytes).unwrap_err().kind(), ErrorKind::Protocol);
    }

    /// Gives bytes of an arbitrary peer to every decoder, which must return a value or a `Protocol` error.
    fn feed(bytes: &[u8]) {
        let refused = |error: Error| assert_eq!(error.kind(), ErrorKind::Protocol);
        let _frame = Frame::decode(BytesMut::from(bytes)).map_err(refused);
        let _signal = decode::<Signal>(bytes).map_err(refused);
        let _introduction = decode::<Introduction>(bytes).map_err(refused);
        let _outcome = decode::<Outcome>(bytes).map_err(refused);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_decode_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            feed(&bytes);
        }

        #[test]
        fn damaged_frames_decode_or_are_refused(
            which in 0..19usize,
            at in any::<prop::sample::Index>(),
            to in any::<u8>(),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = BytesMut::new();
            frames()[which].encode(&mut bytes).unwrap();
            bytes.advance(4);
            let at = at.index(bytes.len());
            bytes[at] = to;
            feed(&bytes);
            feed(&bytes[..cut.index(bytes.len())]);
        }

        #[test]
        fn arbitrary_streams_end_with_frames_or_an_error(
            bytes in prop::collection::vec(any::<u8>(), 0..2048),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                let io = Box::new(std::io::Cursor::new(bytes));
                let mut wire = Wire::new(io, Box::new(tokio::io::sink()));
                while let Ok(Some(_)) = wire.reader.next(Duration::from_secs(1)).await {}
            });
        }
    }
}
