//! The messages of a placed update. They are no public format: both ends have the same protocol version.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use engine_core::{ErrorReport, Rank, Role, Version};

/// A SHA-256 digest.
pub(crate) type Digest = [u8; 32];

/// A rank's encoded [`Declaration`](crate::declared::Declaration).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Declared {
    pub(crate) rank: Rank,
    pub(crate) role: Role,
    pub(crate) body: Bytes,
}

/// Pieces that a trainer has written to a rollout: those of its boxes with numbers below `until` that no batch before this one had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Batch {
    pub(crate) until: u64,
    /// Their digests, in the order of the boxes, and for each box in the order of the plan.
    pub(crate) digests: Vec<u64>,
}

/// From the leading trainer to every rank, itself included. `update` is a number that is used once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum ToMember {
    Begin {
        update: u64,
        version: Version,
        digests: bool,
    },
    /// All ranks are in the update. The declarations are written out only for a rank that does not know them.
    Plan {
        update: u64,
        set: Digest,
        declared: Option<Vec<Declared>>,
    },
    /// To a trainer: the maxima that another trainer finds in its parts of blocks that both share.
    Maxima {
        update: u64,
        from: Rank,
        values: Vec<u32>,
    },
    /// To a trainer: all ranks have the same plan. Each rollout lends its tensors on these terms.
    Write {
        update: u64,
        terms: Vec<(Rank, Bytes)>,
    },
    /// To a rollout: a trainer has written a batch of pieces there.
    Batch {
        update: u64,
        from: Rank,
        batch: Batch,
    },
    /// To a rollout: all trainers have written everything.
    Verify {
        update: u64,
    },
    Commit {
        update: u64,
    },
    /// A trainer may hold other boxes than it said: the update begins again. No trainer writes.
    Again {
        update: u64,
    },
    /// `touched` says whether a rollout's tensors may have been written.
    Abort {
        update: u64,
        touched: bool,
        error: ErrorReport,
    },
    /// The leader is alive. Its own waits have deadlines.
    Alive {
        update: u64,
    },
}

impl ToMember {
    pub(crate) fn update(&self) -> u64 {
        match self {
            Self::Begin { update, .. }
            | Self::Plan { update, .. }
            | Self::Maxima { update, .. }
            | Self::Write { update, .. }
            | Self::Batch { update, .. }
            | Self::Verify { update }
            | Self::Commit { update }
            | Self::Again { update }
            | Self::Abort { update, .. }
            | Self::Alive { update } => *update,
        }
    }
}

/// From a rank to the leading trainer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum ToLeader {
    /// The rank is in this update. Its declaration is written out unless the leader knows it.
    Entered {
        update: u64,
        digest: Digest,
        body: Option<Bytes>,
        /// The digest of the set of declarations that the rank knows.
        known: Option<Digest>,
        /// Whether it is a trainer that has not read its stream to the end.
        guessed: bool,
    },
    /// Maxima, to be passed on to another trainer.
    Maxima { update: u64, to: Rank, values: Vec<u32> },
    /// The rank has the plan, and has sent its maxima. A rollout lends its tensors on these terms.
    Planned { update: u64, plan: Digest, terms: Bytes },
    /// The trainer has written a batch of pieces, here those of one rollout. Not without digests.
    Batch { update: u64, to: Rank, batch: Batch },
    /// The trainer has written everything, and writes no more.
    Written { update: u64, source_bytes: u64 },
    /// The tensors hold what was written. `slower` says what made writing to them slower than possible.
    Verified { update: u64, digest: u64, bytes: u64, inspected: u64, slower: Vec<String> },
    /// The trainer's stream has other boxes than the rank said when it entered. It writes no more. `wrote` says whether it has written.
    Differs { update: u64, wrote: bool },
    /// The rank's work goes on.
    Progress { update: u64 },
    /// The rank has given up.
    Failed { update: u64, error: ErrorReport },
}

impl ToLeader {
    pub(crate) fn update(&self) -> u64 {
        match self {
            Self::Entered { update, .. }
            | Self::Maxima { update, .. }
            | Self::Planned { update, .. }
            | Self::Batch { update, .. }
            | Self::Written { update, .. }
            | Self::Verified { update, .. }
            | Self::Differs { update, .. }
            | Self::Progress { update }
            | Self::Failed { update, .. } => *update,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declared::{Declaration, Held, Wanted, lay_out};
    use engine_core::control::PROTOCOL_VERSION;
    use engine_core::{ArenaArc, DType, Error, ErrorKind, TensorBox, TensorMeta};
    use proptest::prelude::*;
    use protocol::{decode, encode};

    proptest! {
        #[test]
        fn arbitrary_bytes_are_an_error_or_a_message_but_never_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            drop(decode::<ToMember>(&bytes));
            drop(decode::<ToLeader>(&bytes));
        }
    }

    /// Ranks of two builds must not decode each other's messages as different ones. Whoever changes the encoding has
    /// to change `PROTOCOL_VERSION` too.
    #[test]
    fn messages_are_encoded_as_this_protocol_version_encodes_them() {
        let error = ErrorReport::from(&Error::new(ErrorKind::Timeout, "a", "b"));
        let (update, rank, body) = (1, Rank(2), Bytes::from_static(b"x"));
        let declared = Declared { rank, role: Role::Rollout, body: body.clone() };
        let to_member = [
            ToMember::Begin { update, version: Version(3), digests: true },
            ToMember::Plan { update, set: [4; 32], declared: Some(vec![declared]) },
            ToMember::Maxima { update, from: rank, values: vec![5] },
            ToMember::Write { update, terms: vec![(rank, body.clone())] },
            ToMember::Batch { update, from: rank, batch: Batch { until: 5, digests: vec![6] } },
            ToMember::Verify { update },
            ToMember::Commit { update },
            ToMember::Again { update },
            ToMember::Abort { update, touched: true, error: error.clone() },
            ToMember::Alive { update },
        ];
        let entered = ToLeader::Entered {
            update,
            digest: [7; 32],
            body: Some(body.clone()),
            known: Some([8; 32]),
            guessed: true,
        };
        let to_leader = [
            entered,
            ToLeader::Maxima { update, to: rank, values: vec![9] },
            ToLeader::Planned { update, plan: [10; 32], terms: body },
            ToLeader::Batch { update, to: rank, batch: Batch { until: 10, digests: vec![11] } },
            ToLeader::Written { update, source_bytes: 12 },
            ToLeader::Verified {
                update,
                digest: 13,
                bytes: 14,
                inspected: 15,
                slower: vec!["y".into()],
            },
            ToLeader::Differs { update, wrote: true },
            ToLeader::Progress { update },
            ToLeader::Failed { update, error },
        ];
        let meta = ArenaArc::from(TensorMeta::new("n", DType::BF16, [16]));
        let region = TensorBox::whole(&meta.shape);
        let (tensors, bytes) = lay_out(vec![Wanted::whole(meta.clone())]).unwrap();
        let declarations = [
            Declaration::Holds(vec![Held { meta, region }]),
            Declaration::Wants { tensors, bytes },
        ];
        let mut all = Vec::new();
        let encoded = to_member.iter().map(encode).chain(to_leader.iter().map(encode));
        for bytes in encoded.chain(declarations.iter().map(encode)) {
            let bytes = bytes.unwrap();
            all.push(bytes.len() as u8);
            all.extend(bytes);
        }
        let sum = engine_core::digest::sum(0, &all);
        assert_eq!((PROTOCOL_VERSION, all.len(), sum), (14, 275, 12_931_500_594_042_171_570));
    }
}
