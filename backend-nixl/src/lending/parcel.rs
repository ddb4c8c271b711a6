//! What is written to a rollout at once.

use super::staging::Staged;
use crate::arena::Memory;

/// Addresses and lengths.
pub(crate) type Ranges = Vec<(usize, usize)>;

/// The most runs of a write.
pub(super) const RUNS: usize = 1024;

/// Bytes of this process on their way to a rollout's memory, in runs that lie together at both ends.
#[derive(Debug)]
pub(crate) enum Parcel {
    /// What the CPU has gathered.
    Gathered(Staged),
    /// What a device has encoded.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only devices encode"))]
    Encoded(Box<Encoded>),
}

/// Bytes that a device has encoded.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(super) memory: Memory,
    /// The addresses and lengths of its runs, here and at the rollout.
    pub(super) sides: (Ranges, Ranges),
    /// Dropped when nothing reads the bytes any more.
    pub(super) _reading: Box<dyn std::fmt::Debug + Send>,
}

impl Parcel {
    /// The addresses and lengths of its runs, here and at the rollout.
    pub(crate) fn sides(&self) -> (Ranges, Ranges) {
        match self {
            Self::Gathered(staged) => staged.sides(),
            Self::Encoded(encoded) => encoded.sides.clone(),
        }
    }

    /// The number of the device that its bytes are on; `None` for host memory.
    pub(crate) fn device(&self) -> Option<u32> {
        match self {
            Self::Gathered(_) => None,
            Self::Encoded(encoded) => encoded.memory.device(),
        }
    }
}
