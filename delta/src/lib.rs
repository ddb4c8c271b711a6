//! Updates that carry only what changed.
//!
//! In a step of reinforcement learning, about one BF16 weight in a hundred gets another value, and an FP8 code ten times less often. With
//! `delta: true`, a trainer compares what is about to travel with what travelled last, and sends the difference. Every rollout applies it
//! to its own copy, which gives it whole weights. [`LAYER`] puts this in front of any engine. The engine moves the changes as it moves
//! weights, and knows nothing of deltas.
//!
//! - **The layer compares what travels**: codes, scales and whatever the layers that convert weights produce. So a rollout gets bit for bit
//!   what an update without deltas would have brought, whatever the type or the encoding.
//! - **Both sides keep a copy** (a *shadow*), as large as what travels: on the device that a rank's configuration names, if that kind of
//!   memory can have it ([`MemoryKind::shadows`](engine_core::provider::MemoryKind::shadows)), else in host memory. Engines, encodings and
//!   rollouts read weights from it in place. What finds and applies changes there is a
//!   [`ShadowMemory`](engine_core::changes::ShadowMemory). This crate has that of the host, and knows no device.
//! - **The trainer's copy moves to the new version when the update is committed.** A rollout changes its copy as changes come, and changes
//!   it back if the update fails. The trainer does not track what a rollout has: each rollout states it when it enters an update
//!   ([`Base`](engine_core::Base)). If one has another version or none, all get whole weights in that update.
//! - **The whole version is proven**, not only what travelled. Each weight has a digest sum that is updated with the words that change.
//!   Before it confirms, the rollout compares the combined sums with the trainer's. At intervals both compute the sums anew from memory.
//! - Weights that are new, or have another shape, travel whole beside the changes of the others. Weights that are not sent are removed from
//!   the copy.
//!
//! Values are absolute, and positions count within a weight, so names do not travel again. Tiles of at most 64 KiB keep positions short: an
//! FP8 code that changed takes three bytes. [`engine_core::changes`] has the format.

#![forbid(unsafe_code)]

#[cfg(fuzzing)]
pub mod fuzzing;
mod host;
mod message;
mod parts;
mod rollout;
mod shadow;
mod trainer;

use engine_core::{
    CheckpointEngineConfig, EngineContext, Layer, PreparedRollout, PreparedTrainer, Result, Role,
};
use serde::{Deserialize, Serialize};

use crate::shadow::Copies;

/// The layer that sends deltas if the configuration says `delta: true`. Pass it to
/// [`Registry::with_layer`](engine_core::Registry::with_layer) before the layers that convert weights, so that it compares what they
/// produce.
pub const LAYER: Layer =
    Layer::new("delta", &DeltaConfig::KEYS, in_front_of_trainer, in_front_of_rollout);

/// After this many versions that came as changes, all ranks compute sums again from memory.
const ATTESTED_EVERY: u64 = 64;

/// This layer's part of a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct DeltaConfig {
    /// Whether updates carry only what changed. Every rank then keeps a copy of what travelled: on its GPU, else in host memory.
    pub delta: bool,
    /// Whether that copy lies in host memory also on a rank with a GPU. The CPU then finds and applies changes.
    pub delta_on_host: bool,
}

impl DeltaConfig {
    const KEYS: [&str; 2] = ["delta", "delta_on_host"];

    /// Reads this layer's part of a configuration.
    ///
    /// # Errors
    ///
    /// `Config` if a key has another type.
    pub fn of(config: &CheckpointEngineConfig) -> Result<Self> {
        config.layer(&Self::KEYS)
    }
}

fn in_front_of_trainer(
    prepared: PreparedTrainer,
    context: &EngineContext,
) -> Result<PreparedTrainer> {
    let config = DeltaConfig::of(&context.config)?;
    if !config.delta {
        return Ok(prepared);
    }
    trainer::in_front(prepared, context, Copies::of(context, Role::Trainer, &config)?)
}

fn in_front_of_rollout(
    prepared: PreparedRollout,
    context: &EngineContext,
) -> Result<PreparedRollout> {
    let config = DeltaConfig::of(&context.config)?;
    if !config.delta {
        return Ok(prepared);
    }
    rollout::in_front(prepared, context, Copies::of(context, Role::Rollout, &config)?)
}
