//! What every rank does before the first update.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use engine_core::observe::Observer;
use engine_core::{
    Backend, CheckpointEngineConfig, EngineContext, Error, ErrorKind, Placement, Prepared,
    Registry, Result, RolloutEngine, TrainerEngine, WorkerMetadata,
};

use crate::ControlPlane;

/// Prepares the engine that a configuration names and joins it to the group of a control plane, in one call: what every
/// rank does before the first update, and again to form a group anew.
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

/// How a group is to be formed: made by [`form_group`], ended by [`trainer`](Self::trainer) or
/// [`rollout`](Self::rollout).
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
    /// How many ranks the group has, this one counted. The leader has to say it; others need not know it.
    pub fn world_size(mut self, ranks: impl Into<Option<u32>>) -> Self {
        self.world_size = ranks.into();
        self
    }

    /// What this rank tells the others of itself, beside what its engine says: the keys of an object.
    pub fn attributes(mut self, attributes: serde_json::Value) -> Self {
        self.attributes = attributes;
        self
    }

    /// How long the ranks are waited for: `timeout_seconds` of the configuration, unless this says otherwise.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Who is told of the progress of updates.
    pub fn observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.context = self.context.with_observer(observer);
        self
    }

    /// Joins as a trainer: its engine, and its place with the metadata of all ranks.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the rank has no part in the group.
    ///
    /// # Errors
    ///
    /// Those of [`Registry::prepare_trainer`] and [`join_group`].
    pub async fn trainer(self) -> Result<(Box<dyn TrainerEngine>, Placement)> {
        let prepared = self.registry.prepare_trainer(self.context.clone()).await?;
        self.join(prepared).await
    }

    /// Joins as a rollout; see [`trainer`](Self::trainer).
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

/// Exchanges metadata with all other ranks over the control plane, and joins the group: for a rank that was prepared by
/// other means than [`form_group`].
///
/// Ends when so many ranks are there as the leader says. Returns the engine, and its place with the metadata of all
/// ranks.
///
/// # Errors
///
/// Those of [`ControlPlane::gather`], [`Backend::build_topology`] and [`Prepared::join`]; `Protocol` if a rank's metadata
/// cannot be read; `Mismatch` if a rank says another rank of itself than the control plane gave it.
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
