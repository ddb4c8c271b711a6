//! The messages of an update. They are no public format: both ends have the same protocol version.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use engine_core::plan::Piece;
use engine_core::{Base, Error, ErrorKind, ErrorReport, Rank, Result, Version};

/// From the leading trainer to the other ranks. `update` is a number of the leader's control plane
/// ([`next_update`](engine_core::control::Control::next_update)) that is used once. So a late message of an
/// aborted update is never taken for a part of another update, even if that has the same version or
/// the group was formed anew in between.
///
/// Before a rank has entered an update, it is sent only the update's `Begin` and `Abort`. An idle rank enters no
/// update: it is sent `Alive` and `Commit` as well.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum ToReceiver {
    Begin(Begin),
    Bucket {
        update: u64,
        index: u64,
        slot: u32,
        digest: u64,
        layout: Layout,
    },
    /// A rank has the bucket; its card says how to reach it. A second `Fetch` for the same bucket replaces
    /// the first.
    Fetch {
        update: u64,
        index: u64,
        from: Rank,
        card: Bytes,
    },
    /// To a trainer that sends a part of the buckets: the slot is free for its next bucket.
    Fill {
        update: u64,
        index: u64,
        slot: u32,
        /// The digest of the bucket's layout on the leader.
        layout: u64,
    },
    End {
        update: u64,
        buckets: u64,
        digest: u64,
        plan: u64,
    },
    Commit {
        update: u64,
    },
    Abort {
        update: u64,
        error: ErrorReport,
    },
    /// All ranks are in the update, and join one another now.
    Join {
        update: u64,
    },
    /// The leader is alive. `awaited` is the rank that it waits for, if it waits for one.
    Alive {
        update: u64,
        awaited: Option<Rank>,
    },
}

/// The announcement of an update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Begin {
    pub(super) update: u64,
    pub(super) version: Version,
    pub(super) bucket_bytes: u64,
    /// The number of buckets of each rank.
    pub(super) slots: u32,
    pub(super) digests: bool,
    /// Whether a rank fetches a bucket only when a `Fetch` names its source.
    pub(super) routed: bool,
    /// The trainers that send, the leader first. Bucket `n` comes from the one at index `n` modulo their number.
    pub(super) senders: Vec<Rank>,
    /// What ranks need to join one another for this update, if the transport asks for that.
    pub(super) ticket: Option<Ticket>,
}

/// What the ranks of an update need to join one another for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// Opaque bytes of the transport.
    pub bytes: Bytes,
    /// Whether all ranks have to join at the same time. If so, they start when all have entered the
    /// update, and no bucket is sent before all have joined. If not, each rank joins on its own.
    pub together: bool,
}

impl Begin {
    /// Who sends a bucket.
    pub(super) fn sender_of(&self, bucket: u64) -> Rank {
        sender_of(&self.senders, bucket)
    }
}

/// The trainer of these that sends a bucket.
pub(super) fn sender_of(senders: &[Rank], bucket: u64) -> Rank {
    let at = bucket.checked_rem(senders.len() as u64).unwrap_or(0);
    senders.get(at as usize).copied().unwrap_or(Rank::LEADER)
}

/// A bucket's layout: the digest of the one that the receiver has from the last update, or written out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Layout {
    Known { digest: u64 },
    Explicit { pieces: Vec<Piece> },
}

/// From another rank to the leading trainer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum ToSender {
    /// The rank is in this update. The leader knows the state of a rank only from this message.
    Entered {
        update: u64,
        /// How to fetch from the rank.
        card: Bytes,
        /// The digest of the plan that the rank knows.
        plan: Option<u64>,
        /// The buckets of this group's earlier updates that are still read there: update and index.
        held: Vec<(u64, u64)>,
        /// The parts of the version that the rank wants, by their names; `None` for all.
        wants: Option<Vec<String>>,
        /// The version there that a delta could be applied to.
        base: Base,
    },
    /// A bucket was fetched, and others may fetch it from here.
    Fetched { update: u64, index: u64 },
    /// A bucket could not be fetched from a rank other than the trainer.
    Missed { update: u64, index: u64, from: Rank, error: ErrorReport },
    /// The rank has joined the others.
    Joined { update: u64 },
    /// A trainer that sends a part of the buckets has filled and published one.
    Filled { update: u64, index: u64, digest: u64 },
    /// The rank no longer reads a bucket.
    Release { update: u64, index: u64 },
    /// Everything arrived and was verified. `notes` is JSON.
    Confirm { update: u64, digest: u64, seconds: f64, notes: String },
    /// The rank has given up.
    Failed { update: u64, error: ErrorReport },
}

/// Encodes a message between ranks of one build.
///
/// # Errors
///
/// `Protocol` if the message cannot be encoded. No message of this library causes it.
pub fn encode(message: &impl Serialize) -> Result<Bytes> {
    postcard::to_stdvec(message).map(Bytes::from).map_err(|error| {
        Error::new(ErrorKind::Protocol, "writing a message", error.to_string()).with_source(error)
    })
}

/// Decodes a message that fills `body` entirely.
///
/// # Errors
///
/// `Protocol` if the bytes are not a message, or more than one.
pub fn decode<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T> {
    let malformed = |words: String| Error::new(ErrorKind::Protocol, "reading a message", words);
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(malformed(format!("{} bytes too many", rest.len()))),
        Err(error) => Err(malformed(error.to_string()).with_source(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine_core::control::PROTOCOL_VERSION;
    use engine_core::{DType, TensorMeta};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_are_an_error_or_a_message_but_never_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            drop(decode::<ToReceiver>(&bytes));
            drop(decode::<ToSender>(&bytes));
        }
    }

    /// Ranks of two builds must not decode each other's messages as different ones. Whoever changes the encoding has
    /// to change `PROTOCOL_VERSION` too.
    #[test]
    fn messages_are_encoded_as_this_protocol_version_encodes_them() {
        let error = ErrorReport::from(&Error::new(ErrorKind::Timeout, "a", "b"));
        let begin = Begin {
            update: 1,
            version: Version(2),
            bucket_bytes: 3,
            slots: 4,
            digests: true,
            routed: false,
            senders: vec![Rank(5)],
            ticket: Some(Ticket { bytes: Bytes::from_static(b"t"), together: true }),
        };
        let meta = TensorMeta::new("n", DType::BF16, [6]).into();
        let pieces = vec![Piece { meta, start: 7, len: 8, offset: 9 }];
        let to_receiver = [
            ToReceiver::Begin(begin),
            ToReceiver::Bucket {
                update: 1,
                index: 2,
                slot: 3,
                digest: 4,
                layout: Layout::Explicit { pieces },
            },
            ToReceiver::Bucket {
                update: 1,
                index: 2,
                slot: 3,
                digest: 4,
                layout: Layout::Known { digest: 5 },
            },
            ToReceiver::Fetch { update: 1, index: 2, from: Rank(3), card: Bytes::new() },
            ToReceiver::Fill { update: 1, index: 2, slot: 3, layout: 4 },
            ToReceiver::End { update: 1, buckets: 2, digest: 3, plan: 4 },
            ToReceiver::Commit { update: 1 },
            ToReceiver::Abort { update: 1, error: error.clone() },
            ToReceiver::Join { update: 1 },
            ToReceiver::Alive { update: 1, awaited: Some(Rank(2)) },
        ];
        let to_sender = [
            ToSender::Entered {
                update: 1,
                card: Bytes::new(),
                plan: Some(2),
                held: vec![(3, 4)],
                base: Base::Has(5),
                wants: Some(vec!["w".into()]),
            },
            ToSender::Fetched { update: 1, index: 2 },
            ToSender::Missed { update: 1, index: 2, from: Rank(3), error: error.clone() },
            ToSender::Joined { update: 1 },
            ToSender::Filled { update: 1, index: 2, digest: 3 },
            ToSender::Release { update: 1, index: 2 },
            ToSender::Confirm { update: 1, digest: 2, seconds: 0.5, notes: "n".into() },
            ToSender::Failed { update: 1, error },
        ];
        let mut all = Vec::new();
        for bytes in to_receiver.iter().map(encode).chain(to_sender.iter().map(encode)) {
            let bytes = bytes.unwrap();
            all.push(bytes.len() as u8);
            all.extend(bytes);
        }
        let sum = engine_core::digest::sum(0, &all);
        assert_eq!((PROTOCOL_VERSION, all.len(), sum), (14, 153, 13_192_971_570_392_350_067));
    }

    #[test]
    fn a_message_survives_its_way_and_a_longer_one_is_refused() {
        let meta = TensorMeta::new("a", DType::BF16, [2, 3]).into();
        let message = ToReceiver::Bucket {
            update: 3,
            index: 1 << 40,
            slot: 1,
            digest: u64::MAX,
            layout: Layout::Explicit {
                pieces: vec![Piece { meta, start: 0, len: 12, offset: 256 }],
            },
        };
        let mut bytes = encode(&message).unwrap().to_vec();
        assert_eq!(decode::<ToReceiver>(&bytes).unwrap(), message);
        bytes.push(0);
        assert_eq!(decode::<ToReceiver>(&bytes).unwrap_err().kind(), ErrorKind::Protocol);
    }
}
