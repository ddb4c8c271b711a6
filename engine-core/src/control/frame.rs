//! What travels on a control connection: a tag and a body, within a length-delimited frame.
//!
//! `Hello` and `Refused` have the same form in every version of the protocol, so that peers of
//! different versions can tell each other so.

use bytes::{BufMut, Bytes, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::auth::{Nonce, Proof};
use super::{Peer, Role};
use crate::{Error, ErrorKind, ErrorReport, Rank, Result};

/// The version of the protocol, of the messages of an update included.
pub(super) const VERSION: u16 = 1;

const MAGIC: &[u8; 8] = b"CKPTENGN";

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Frame {
    /// The first frame of a joining rank.
    Hello { version: u16, body: Bytes },
    /// The connection is refused, in words.
    Refused { version: u16, words: String },
    Challenge { nonce: Nonce, proof: Proof },
    Proof { proof: Proof },
    Welcome { rank: Rank },
    Heartbeat,
    Goodbye,
    Message { body: Bytes },
    Gather { world_size: u32, payload: Bytes },
    /// The group is formed.
    Table { peers: Vec<Peer> },
    GatherRefused { error: ErrorReport },
    Barrier { name: String },
    BarrierPassed { name: String },
}

/// What a joining rank says of itself, in the body of its hello.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) role: Role,
    pub(super) rank: Option<Rank>,
    pub(super) nonce: Nonce,
}

impl Hello {
    pub(super) fn encode(&self) -> Result<Bytes> {
        write(self).map(Bytes::from)
    }

    pub(super) fn decode(body: &[u8]) -> Result<Self> {
        read(body)
    }
}

impl Frame {
    pub(super) fn encode(&self) -> Result<Bytes> {
        let mut bytes = BytesMut::new();
        let with = |mut bytes: BytesMut, tag: u8, body: &[u8]| {
            bytes.reserve(1 + body.len());
            bytes.put_u8(tag);
            bytes.put_slice(body);
            bytes
        };
        Ok(match self {
            Self::Hello { version, body } => {
                bytes.put_u8(0);
                bytes.put_slice(MAGIC);
                bytes.put_u16_le(*version);
                bytes.put_slice(body);
                bytes
            }
            Self::Refused { version, words } => {
                bytes.put_u8(1);
                bytes.put_u16_le(*version);
                bytes.put_slice(words.as_bytes());
                bytes
            }
            Self::Challenge { nonce, proof } => with(bytes, 2, &write(&(nonce, proof))?),
            Self::Proof { proof } => with(bytes, 3, proof),
            Self::Welcome { rank } => with(bytes, 4, &write(rank)?),
            Self::Heartbeat => with(bytes, 5, &[]),
            Self::Goodbye => with(bytes, 6, &[]),
            Self::Message { body } => with(bytes, 7, body),
            Self::Gather { world_size, payload } => {
                bytes.put_u8(8);
                bytes.put_u32_le(*world_size);
                bytes.put_slice(payload);
                bytes
            }
            Self::Table { peers } => with(bytes, 9, &write(peers)?),
            Self::GatherRefused { error } => with(bytes, 10, &write(error)?),
            Self::Barrier { name } => with(bytes, 11, name.as_bytes()),
            Self::BarrierPassed { name } => with(bytes, 12, name.as_bytes()),
        }
        .freeze())
    }

    /// # Errors
    ///
    /// `Protocol` for whatever is not a frame.
    pub(super) fn decode(mut bytes: Bytes) -> Result<Self> {
        let malformed = |words: &str| Error::new(ErrorKind::Protocol, "reading a frame", words);
        if bytes.is_empty() {
            return Err(malformed("an empty frame"));
        }
        let tag = bytes.split_to(1)[0];
        let number = |bytes: &mut Bytes| -> Result<u16> {
            if bytes.len() < 2 {
                return Err(malformed("a version is missing"));
            }
            let number = bytes.split_to(2);
            Ok(u16::from_le_bytes([number[0], number[1]]))
        };
        let text = |bytes: &Bytes| {
            String::from_utf8(bytes.to_vec()).map_err(|_| malformed("text that is not UTF-8"))
        };
        Ok(match tag {
            0 => {
                if bytes.len() < MAGIC.len() || bytes.split_to(MAGIC.len()) != MAGIC[..] {
                    return Err(malformed("the peer is no checkpoint engine"));
                }
                Self::Hello { version: number(&mut bytes)?, body: bytes }
            }
            1 => Self::Refused { version: number(&mut bytes)?, words: text(&bytes)? },
            2 => {
                let (nonce, proof) = read(&bytes)?;
                Self::Challenge { nonce, proof }
            }
            3 => Self::Proof {
                proof: bytes[..].try_into().map_err(|_| malformed("a proof of another length"))?,
            },
            4 => Self::Welcome { rank: read(&bytes)? },
            5 => Self::Heartbeat,
            6 => Self::Goodbye,
            7 => Self::Message { body: bytes },
            8 => {
                if bytes.len() < 4 {
                    return Err(malformed("a world size is missing"));
                }
                let size = bytes.split_to(4);
                let world_size = u32::from_le_bytes([size[0], size[1], size[2], size[3]]);
                Self::Gather { world_size, payload: bytes }
            }
            9 => Self::Table { peers: read(&bytes)? },
            10 => Self::GatherRefused { error: read(&bytes)? },
            11 => Self::Barrier { name: text(&bytes)? },
            12 => Self::BarrierPassed { name: text(&bytes)? },
            _ => return Err(malformed("an unknown tag")),
        })
    }
}

fn write(value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_stdvec(value).map_err(|error| {
        Error::new(ErrorKind::Protocol, "writing a frame", error.to_string()).with_source(error)
    })
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(Error::new(ErrorKind::Protocol, "reading a frame", "bytes too many")),
        Err(error) => Err(Error::new(ErrorKind::Protocol, "reading a frame", error.to_string())
            .with_source(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_are_an_error_or_a_frame_but_never_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), tag in 0_u8..14,
        ) {
            let mut tagged = vec![tag];
            tagged.extend(&bytes);
            for bytes in [bytes, tagged] {
                if let Ok(Frame::Hello { body, .. }) = Frame::decode(bytes.into()) {
                    let _ = Hello::decode(&body);
                }
            }
        }
    }

    #[test]
    fn every_frame_survives_its_way() {
        let error = Error::new(ErrorKind::Mismatch, "a", "b").rank(Rank(1));
        let peer =
            Peer { rank: Rank(3), role: Role::Rollout, payload: Bytes::from_static(b"payload") };
        let hello = Hello { role: Role::Rollout, rank: Some(Rank(7)), nonce: [1; 32] };
        for frame in [
            Frame::Hello { version: 9, body: hello.encode().unwrap() },
            Frame::Refused { version: 2, words: "no".into() },
            Frame::Challenge { nonce: [2; 32], proof: [3; 32] },
            Frame::Proof { proof: [4; 32] },
            Frame::Welcome { rank: Rank(300) },
            Frame::Heartbeat,
            Frame::Goodbye,
            Frame::Message { body: Bytes::from_static(b"body") },
            Frame::Gather { world_size: 5, payload: Bytes::from_static(b"x") },
            Frame::Table { peers: vec![peer] },
            Frame::GatherRefused { error: ErrorReport::from(&error) },
            Frame::Barrier { name: "start".into() },
            Frame::BarrierPassed { name: "start".into() },
        ] {
            assert_eq!(Frame::decode(frame.encode().unwrap()).unwrap(), frame);
        }
    }
}
