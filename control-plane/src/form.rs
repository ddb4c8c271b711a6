//! Forming the group, which every rank does before the first update.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use engine_core::observe::Observer;
use engine_core::{
    Backend, CheckpointEngineConfig, EngineContext, Error, ErrorKind, Placement, Prepared,
    Registry, Result, RolloutEngine, TrainerEngine, WorkerMetadata,
};

use crate::ControlPlane;

/// Prepares the engine that a configuration names, and joins it to the group of a control plane. Every rank does this
/// before the first update, and again to form a group anew.
///
/// # Examples
///
/// ```no_run
/// # use control_plane::{ControlPlane, form_group};
/// # use engine_core::{CheckpointEngineConfig, Registry, Result};
/// # async fn example(control: ControlPlane, registry: Registry, config: CheckpointEngineConfig) -> Result<()> {
/// // On the trainer, which waits for two rollouts:
/// let (engine, place) = form_group(&registry, config.clone(), &control).world_size(3).trainer().await?;
/// // On a rollout:
/// let (engine, place) = form_group(&registry, config, &control).rollout().await?;
/// # Ok(())
/// # }
/// ```
pub fn form_group<'a>(
    registry: &'a Registry,
    config: CheckpointEngineConfig,
    control: &'a ControlPlane,
) -> FormGroup<'a> {
    let deadline = config.timeout();
    let context = EngineContext::new(config).with_control(control.clone());
    let attributes = serde_json::Value::Null;
    FormGroup { registry, context, control, world_size: None, attributes, deadline }
}

/// The settings for forming a group. [`form_group`] makes them; [`trainer`](Self::trainer) or
/// [`rollout`](Self::rollout) forms the group.
#[derive(Debug)]
#[must_use = "no group is formed before `trainer` or `rollout`"]
pub struct FormGroup<'a> {
    registry: &'a Registry,
    context: EngineContext,
    control: &'a ControlPlane,
    world_size: Option<u32>,
    attributes: serde_json::Value,
    deadline: Duration,
}

impl FormGroup<'_> {
    /// Sets the number of ranks of the group, this one included. The leader has to set it, others need not.
    pub fn world_size(mut self, ranks: impl Into<Option<u32>>) -> Self {
        self.world_size = ranks.into();
        self
    }

    /// Sets what this rank tells the others about itself, in addition to what its engine says: a JSON object.
    pub fn attributes(mut self, attributes: serde_json::Value) -> Self {
        self.attributes = attributes;
        self
    }

    /// Sets how long to wait for the other ranks. Default: `timeout_seconds` of the configuration.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Sets the observer of the progress of updates.
    pub fn observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.context = self.context.with_observer(observer);
        self
    }

    /// Joins as a trainer. Returns its engine, and its place with the metadata of all ranks.
    ///
    /// # Cancel safety
    ///
    /// Before all ranks have exchanged their metadata, dropping the future takes this rank out. Afterwards the others
    /// count this rank in, although it has no engine: form the group anew.
    ///
    /// # Errors
    ///
    /// Those of [`Registry::prepare_trainer`] and [`join_group`].
    pub async fn trainer(self) -> Result<(Box<dyn TrainerEngine>, Placement)> {
        let prepared = self.registry.prepare_trainer(self.context.clone()).await?;
        self.join(prepared).await
    }

    /// Joins as a rollout. For the rest see [`trainer`](Self::trainer).
    ///
    /// # Errors
    ///
    /// Those of [`Registry::prepare_rollout`] and [`join_group`].
    pub async fn rollout(self) -> Result<(Box<dyn RolloutEngine>, Placement)> {
        let prepared = self.registry.prepare_rollout(self.context.clone()).await?;
        self.join(prepared).await
    }

    async fn join<E>(self, prepared: Prepared<E>) -> Result<(E, Placement)> {
        let backend = self.registry.get(&self.context.config.backend)?;
        let prepared = prepared.with_attributes(self.attributes);
        join_group(prepared, backend, self.control, self.world_size, self.deadline).await
    }
}

/// Exchanges metadata with all other ranks over the control plane, and joins the group. For a rank that was not prepared
/// by [`form_group`].
///
/// Ends when as many ranks are there as the leader says. Returns the engine, and its place with the metadata of all
/// ranks.
///
/// # Errors
///
/// Those of [`ControlPlane::gather`], [`Backend::build_topology`] and [`Prepared::join`]; `Protocol` if a rank's metadata
/// cannot be decoded; `Mismatch` if a rank's metadata names another rank than the control plane gave it.
pub async fn join_group<E>(
    prepared: Prepared<E>,
    backend: &dyn Backend,
    control: &ControlPlane,
    world_size: Option<u32>,
    deadline: Duration,
) -> Result<(E, Placement)> {
    let operation = "forming the group";
    let malformed = |error: serde_json::Error| {
        Error::new(ErrorKind::Protocol, operation, error.to_string()).with_source(error)
    };
    let payload = Bytes::from(serde_json::to_vec(prepared.metadata()).map_err(malformed)?);
    let peers = control.gather(world_size, payload, deadline).await?;
    let mut workers = Vec::with_capacity(peers.len());
    for peer in &peers {
        let worker: WorkerMetadata = serde_json::from_slice(&peer.payload)
            .map_err(|error| malformed(error).rank(peer.rank))?;
        if worker.rank != peer.rank {
            let message = format!("its engine says that it is rank {}", worker.rank);
            return Err(Error::new(ErrorKind::Mismatch, operation, message).rank(peer.rank));
        }
        workers.push(worker);
    }
    let place = Placement::of_rank(backend.build_topology(&workers)?, control.rank())?;
    Ok((prepared.join(place.clone()).await?, place))
}
