//! The messages of a placed update. Private: both ends are of the same protocol version.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use engine_core::{ErrorReport, Rank, Role, Version};

/// A SHA-256 digest.
pub(crate) type Digest = [u8; 32];

/// What a rank says of itself: a [`Declaration`](crate::declared::Declaration), encoded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Declared {
    pub(crate) rank: Rank,
    pub(crate) role: Role,
    pub(crate) body: Bytes,
}

/// From the leading trainer to every rank, itself included. `update` is a number that is used once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum ToMember {
    Begin {
        update: u64,
        version: Version,
        digests: bool,
    },
    /// All ranks are in the update. What they declare is written out for those that do not know it.
    Plan {
        update: u64,
        set: Digest,
        declared: Option<Vec<Declared>>,
    },
    /// To a trainer: what another one finds in its parts of blocks that both have a part of.
    Maxima {
        update: u64,
        from: Rank,
        values: Vec<u32>,
    },
    /// To a trainer: all ranks have the same plan, and each rollout lends its tensors on the terms that it gave.
    Write {
        update: u64,
        terms: Vec<(Rank, Bytes)>,
    },
    /// To a rollout: all trainers have written; the digests of what each of them wrote there.
    Verify {
        update: u64,
        written: Vec<(Rank, Vec<u64>)>,
    },
    Commit {
        update: u64,
    },
    /// `touched` says whether a rollout's tensors may have been written.
    Abort {
        update: u64,
        touched: bool,
        error: ErrorReport,
    },
    /// The leader is alive and waits; its own waits have deadlines.
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
            | Self::Verify { update, .. }
            | Self::Commit { update }
            | Self::Abort { update, .. }
            | Self::Alive { update } => *update,
        }
    }
}

/// From a rank to the leading trainer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum ToLeader {
    /// The rank is in this update. What it declares is written out unless the leader knows it.
    Entered {
        update: u64,
        digest: Digest,
        body: Option<Bytes>,
        /// The set of declarations that it knows.
        known: Option<Digest>,
    },
    /// To be passed on to another trainer.
    Maxima { update: u64, to: Rank, values: Vec<u32> },
    /// The rank has the plan, and has sent its maxima. A rollout lends its tensors on these terms.
    Planned { update: u64, plan: Digest, terms: Bytes },
    /// Everything was written, and nothing will be any more: for each rollout the digests of what went there.
    Written { update: u64, sums: Vec<(Rank, Vec<u64>)>, source_bytes: u64 },
    /// What is in the tensors is what was written.
    Verified { update: u64, digest: u64, bytes: u64, inspected: u64 },
    /// The rank's work goes on.
    Progress { update: u64 },
    /// The rank gave up.
    Failed { update: u64, error: ErrorReport },
}

impl ToLeader {
    pub(crate) fn update(&self) -> u64 {
        match self {
            Self::Entered { update, .. }
            | Self::Maxima { update, .. }
            | Self::Planned { update, .. }
            | Self::Written { update, .. }
            | Self::Verified { update, .. }
            | Self::Progress { update }
            | Self::Failed { update, .. } => *update,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::decode;

    proptest! {
        #[test]
        fn arbitrary_bytes_are_an_error_or_a_message_but_never_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            drop(decode::<ToMember>(&bytes));
            drop(decode::<ToLeader>(&bytes));
        }
    }
}
