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
    /// To a rollout: all trainers have written. These are the digests of what each of them wrote there.
    Verify {
        update: u64,
        written: Vec<(Rank, Vec<u64>)>,
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
            | Self::Verify { update, .. }
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
    /// The trainer has written everything, and writes no more. With the digests of what went to each rollout.
    Written { update: u64, sums: Vec<(Rank, Vec<u64>)>, source_bytes: u64 },
    /// The tensors hold what was written.
    Verified { update: u64, digest: u64, bytes: u64, inspected: u64 },
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
