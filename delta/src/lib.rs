//! Updates that carry only what changed.
//!
//! In a step of reinforcement learning about one BF16 weight in a hundred gets another value, and an FP8 code ten times less often.
//! With `delta: true`, a trainer compares what is about to travel with what travelled last, and sends the difference; every rollout
//! applies it to its own copy, and gets whole weights from that. [`LAYER`] puts this in front of any engine, which moves the changes
//! as it moves weights, and knows nothing of it.
//!
//! - **What is compared is what travels**: codes, scales and whatever a layer in front of this one makes. So everything is bit for
//!   bit what an update without it would have brought, whatever the type or the encoding.
//! - **Both sides keep a copy** in host memory (a *shadow*), of the size of what travels. Engines, encodings and
//!   rollouts read weights from it in place.
//! - **The trainer's copy moves to the new version when the update is committed**; a rollout's is changed as changes come, and changed
//!   back if the update fails. Nobody remembers for a rollout what it has: it says so whenever it enters an update
//!   ([`Base`](engine_core::Base)). Where one has another version or none, all get whole weights in that update.
//! - **The whole version is proven**, not what travelled: each weight has a digest's sum that follows the words that change, and the
//!   rollout compares what comes of all of them with what the trainer has, before it confirms. After some versions both compute
//!   the sums anew from memory.
//! - Weights that are new, or have another shape, travel whole beside the changes of the others. Those that are gone are gone.
//!
//! Values are absolute, and places are counted in a weight, so that no name travels a second time. Tiles of at most 64 KiB
//! keep places short: an FP8 code that changed takes three bytes.

#![forbid(unsafe_code)]

#[cfg(fuzzing)]
pub mod fuzzing;
mod message;
mod rollout;
mod shadow;
mod tiles;
mod trainer;

use engine_core::{
    CheckpointEngineConfig, EngineContext, Layer, PreparedRollout, PreparedTrainer, Result,
};
use serde::{Deserialize, Serialize};

/// Deltas in front of an engine, where its configuration says `delta: true`: to be given to
/// [`Registry::with_layer`](engine_core::Registry::with_layer), before layers that convert weights, which then convert what this
/// compares.
pub const LAYER: Layer =
    Layer::new("delta", &DeltaConfig::KEYS, in_front_of_trainer, in_front_of_rollout);

/// After so many versions that came as changes, sums are computed anew from memory.
const ATTESTED_EVERY: u64 = 64;

/// This layer's part of a configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct DeltaConfig {
    /// Whether updates carry only what changed. Every rank keeps a copy of what travelled, in host memory.
    pub delta: bool,
}

impl DeltaConfig {
    const KEYS: [&str; 1] = ["delta"];

    /// What a configuration says.
    ///
    /// # Errors
    ///
    /// `Config` if the key has another type.
    pub fn of(config: &CheckpointEngineConfig) -> Result<Self> {
        config.layer(&Self::KEYS)
    }
}

fn in_front_of_trainer(
    prepared: PreparedTrainer,
    context: &EngineContext,
) -> Result<PreparedTrainer> {
    if !DeltaConfig::of(&context.config)?.delta {
        return Ok(prepared);
    }
    trainer::in_front(prepared, context)
}

fn in_front_of_rollout(
    prepared: PreparedRollout,
    context: &EngineContext,
) -> Result<PreparedRollout> {
    if !DeltaConfig::of(&context.config)?.delta {
        return Ok(prepared);
    }
    rollout::in_front(prepared, context)
}
