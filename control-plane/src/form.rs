//! What every rank does before the first update.

use std::time::Duration;

use bytes::Bytes;
use engine_core::{Backend, CheckpointEngine, Error, ErrorKind, Placement, Result, WorkerMetadata};

use crate::ControlPlane;

/// Prepares an engine, exchanges metadata with all other ranks over the control plane, and joins the group:
/// what every rank does before the first update, and again to form a group anew.
///
/// Ends when `world_size` ranks are there; `attributes` are what this rank tells the others beside what its
/// engine says. Returns this rank's place, with the metadata of all ranks.
///
/// # Cancel safety
///
/// When the future is dropped, the engine has been prepared or not: finalize it, or drop it.
///
/// # Errors
///
/// Those of [`CheckpointEngine::prepare`], [`ControlPlane::gather`], [`Backend::build_topology`] and
/// [`CheckpointEngine::init_process_group`]; `Protocol` if a rank's metadata cannot be read; `Mismatch` if a
/// rank says another rank of itself than the control plane gave it.
///
/// # Examples
///
/// ```no_run
/// # use std::time::Duration;
/// # use control_plane::{ControlPlane, form_group};
/// # use engine_core::{EngineContext, CheckpointEngineConfig, Registry, Result};
/// # async fn example(control: ControlPlane, registry: Registry, config: CheckpointEngineConfig) -> Result<()> {
/// let backend = registry.get(&config.backend)?;
/// let context = EngineContext::new(config, control.role()).with_control(control.clone());
/// let mut engine = registry.create(context)?;
/// let deadline = Duration::from_secs(30);
/// form_group(&mut *engine, backend, &control, 3, serde_json::Value::Null, deadline).await?;
/// # Ok(())
/// # }
/// ```
pub async fn form_group(
    engine: &mut dyn CheckpointEngine,
    backend: &dyn Backend,
    control: &ControlPlane,
    world_size: u32,
    attributes: serde_json::Value,
    deadline: Duration,
) -> Result<Placement> {
    let operation = "forming the group";
    let malformed = |error: serde_json::Error| {
        Error::new(ErrorKind::Protocol, operation, error.to_string()).with_source(error)
    };
    let mut own = engine.prepare().await?;
    own.attributes = attributes;
    let payload = Bytes::from(serde_json::to_vec(&own).map_err(malformed)?);
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
    engine.init_process_group(place.clone()).await?;
    Ok(place)
}
