//! What a trainer and a rollout do, in a process of their own or as a child: run updates.

mod parent;
mod receiving;
mod rollout;
mod trainer;

pub(crate) use parent::Parent;
pub use receiving::{Destination, Rollout};
pub use rollout::{BARE, RolloutOptions, rollout};
pub use trainer::{CoTrainerOptions, Trainer, co_trainer, stream};

use serde::{Deserialize, Serialize};

use crate::source::SourceSpec;

/// What the trainer tells the rollouts of the weights that will come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Announcement {
    /// Where they come from, so that rollouts can check them.
    pub source: SourceSpec,
    /// Whether each version comes once more, to be attested.
    #[serde(default)]
    pub attests: bool,
}

/// What a rollout tells the trainer with its confirmation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolloutNotes {
    /// Tensors of the update that were compared with the source, bit for bit.
    pub verified_tensors: u64,
    /// The bytes of the source that they stand for, before any quantisation.
    pub verified_bytes: u64,
    /// The most memory that the rollout took beyond what it had before it joined, in bytes.
    pub extra_peak_bytes: u64,
}
