//! A checkpoint engine over a folder that the trainer and its rollouts share: a local file system, NFS, a mounted bucket.
//!
//! The trainer writes a version's buckets to safetensors files, and rollouts read them from there. The control plane says
//! what is there, as for any other backend: a rollout verifies every bucket by its digest, and the version is active when
//! all have it. Then the version gets its name in the folder, as a checkpoint that others can read at any time, without a
//! connection: engines that load checkpoints, rollouts that join later, and readers of slime's disk deltas, whose format it is.
//!
//! A trainer without rollouts only publishes. [`DirOptions::changes`] publishes what changed since the version before.

mod changes;
mod engine;
mod error;
mod folder;
mod format;
#[cfg(fuzzing)]
pub mod fuzzing;
mod leases;
mod links;
mod publish;
mod shards;
mod staged;
mod tensors;
mod version;

use std::path::PathBuf;

use engine_core::{
    Availability, Backend, EngineContext, Error, ErrorKind, Placement, PreparedRollout,
    PreparedTrainer, Result, Role, WorkerMetadata,
};
use serde::{Deserialize, Serialize};

pub use format::{Checksum, Encoding};
pub use version::{VersionReader, Versions};

/// The transport's name in configurations.
const NAME: &str = "dir";

/// The transport as a value, for a registry.
pub static BACKEND: &dyn Backend = &Dir;

/// The transport's options: `engine_kwargs.dir` of the configuration.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct DirOptions {
    /// The folder, as this rank's host has it. The trainer makes it if it is missing.
    pub path: Option<PathBuf>,
    /// How many versions stay in the folder. With 0 none does: the folder only carries updates.
    pub keep: usize,
    /// Whether versions are published as what changed since the version before (`xor` or `overwrite`); else whole.
    pub changes: Option<Encoding>,
    /// With `changes`, a version is whole after so many that are not.
    pub anchor_every: u64,
    /// The digest of each tensor of a version: `xxh3-128`, `blake3` or `adler32`.
    pub checksum: Checksum,
}

impl Default for DirOptions {
    fn default() -> Self {
        let checksum = Checksum::default();
        Self { path: None, keep: 2, changes: None, anchor_every: 20, checksum }
    }
}

#[derive(Debug)]
struct Dir;

#[async_trait::async_trait]
impl Backend for Dir {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "processes of any hosts that share a folder"
    }

    fn sends_parts(&self) -> bool {
        true
    }

    fn probe(&self) -> Availability {
        Availability::Usable { details: "wherever ranks share a folder".into() }
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        engine::prepare_trainer(context).await
    }

    async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
        engine::prepare_rollout(context).await
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        if let [worker] = workers
            && worker.role == Role::Trainer
            && worker.backend == NAME
        {
            // It only publishes.
            return Ok(vec![Placement::new(worker.rank, workers)]);
        }
        let places = Placement::for_all(NAME, workers)?;
        for place in &places[1..] {
            if place.own()?.role == Role::Trainer {
                let message = "dir has one trainer rank: gather the weights on rank 0";
                let error = Error::new(ErrorKind::Mismatch, "building the topology", message);
                return Err(error.rank(place.rank));
            }
        }
        Ok(places)
    }
}
