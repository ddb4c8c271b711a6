//! The engines: buckets that other processes of the host map, and tensors that rollouts lend.

use std::sync::Arc;

use engine_core::memory::Pool;
use engine_core::{
    DeviceChoice, EngineContext, Error, ErrorKind, Prepared, PreparedRollout, PreparedTrainer,
    Result, Role, RolloutEngine, TrainerEngine, WorkerMetadata,
};
use placed::{Layout, Lender, PlacedRollout, PlacedTrainer, Wanted};
use protocol::{Receiver, Sender};

use crate::buckets::{Buckets, Incoming};
use crate::lent::{LentMemory, Neighbours};
#[cfg(feature = "cuda")]
use crate::lent_cuda::LentCuda;
use crate::{LentTensor, NAME};

/// The transport's options.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Kwargs {
    /// Whether trainers write into tensors that rollouts lend.
    placed: bool,
}

/// The metadata of a rank of placed updates.
const PLACED: &str = "placed";

/// Whether a rank takes part in placed updates.
pub(crate) fn is_placed(worker: &WorkerMetadata) -> bool {
    worker.details == PLACED
}

fn placed_metadata(context: &EngineContext, role: Role) -> Result<WorkerMetadata> {
    let rank = context.require_control()?.rank();
    Ok(WorkerMetadata::of_this_process(NAME, rank, role, PLACED.into()))
}

/// Prepares a rollout that lends its tensors. They are in memory on the device of its configuration, and trainers of its
/// host write to them in every update.
///
/// Its trainers need the option `placed` of this transport. They reach memory of a CUDA device if their own device is the
/// same one, or one with peer access to it.
///
/// # Errors
///
/// `Config` without a control plane, and for tensors that cannot be placed; `Backend` for device memory that other
/// processes cannot open; `Weight`, which names the tensor, for a box outside of its tensor; `Resource` if there is no
/// memory.
pub fn lend(
    context: EngineContext,
    wanted: impl IntoIterator<Item = Wanted>,
) -> Result<Prepared<PlacedRollout>> {
    let metadata = placed_metadata(&context, Role::Rollout)?;
    let layout = Layout::new(wanted)?;
    let memory = memory_to_lend(&context.config.device, layout.bytes())?;
    Ok(Prepared::new(
        metadata,
        move |_| async move { PlacedRollout::new(&context, layout, memory) },
    ))
}

/// As [`lend`], of tensors that the rollout's program has made: updates are written to where they are. They are all on the device of the
/// rollout's configuration.
///
/// Host memory has to be shared memory of this process that other processes can open, by a path or by a descriptor of this process, such
/// as that of PyTorch's `share_memory_()`. Memory of a CUDA device has to be in allocations that the driver can export.
///
/// # Errors
///
/// As [`lend`]. `Weight`, which names the tensor, for memory that no other process can open, and for tensors that share memory; `Mismatch`
/// for a tensor on another device.
pub fn lend_tensors(
    context: EngineContext,
    tensors: impl IntoIterator<Item = LentTensor>,
) -> Result<Prepared<PlacedRollout>> {
    let metadata = placed_metadata(&context, Role::Rollout)?;
    let (layout, memory) = place_tensors(&context.config.device, tensors.into_iter().collect())?;
    Ok(Prepared::new(
        metadata,
        move |_| async move { PlacedRollout::new(&context, layout, memory) },
    ))
}

fn place_tensors(
    device: &DeviceChoice,
    tensors: Vec<LentTensor>,
) -> Result<(Layout, Box<dyn Lender>)> {
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        let (layout, memory) = LentCuda::of_tensors(device, tensors)?;
        return Ok((layout, Box::new(memory)));
    }
    let _ = device;
    let (layout, memory) = LentMemory::of_tensors(tensors)?;
    Ok((layout, Box::new(memory)))
}

fn memory_to_lend(device: &DeviceChoice, bytes: u64) -> Result<Box<dyn Lender>> {
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        return Ok(Box::new(LentCuda::create(device, bytes)?));
    }
    let _ = device;
    Ok(Box::new(LentMemory::create(bytes)?))
}

fn prepare_placed_trainer(context: EngineContext) -> Result<PreparedTrainer> {
    let metadata = placed_metadata(&context, Role::Trainer)?;
    let reach = Arc::new(Neighbours::new(&context.config.device)?);
    Ok(Prepared::new(metadata, move |place| async move {
        let ranks = place.peers.iter().map(|peer| (peer.rank, peer.role)).collect();
        let engine = PlacedTrainer::new(&context, ranks, reach)?;
        Ok(Box::new(engine) as Box<dyn TrainerEngine>)
    }))
}

pub(crate) async fn prepare_trainer(context: EngineContext) -> Result<PreparedTrainer> {
    if context.config.kwargs::<Kwargs>(NAME)?.placed {
        return prepare_placed_trainer(context);
    }
    let control = context.require_control()?;
    let pool = Pool::new(context.threads(Role::Trainer))?;
    let buckets = Buckets::create(&context)?;
    let offer = serde_json::to_value(buckets.offer()).map_err(|error| {
        Error::new(ErrorKind::Protocol, "preparing", error.to_string()).with_source(error)
    })?;
    let metadata = WorkerMetadata::of_this_process(NAME, control.rank(), Role::Trainer, offer);
    Ok(Prepared::new(metadata, move |place| async move {
        let link = buckets.into_link(pool);
        let engine = Sender::new(link, &context, control, place.rollouts());
        Ok(Box::new(engine) as Box<dyn TrainerEngine>)
    }))
}

pub(crate) async fn prepare_rollout(context: EngineContext) -> Result<PreparedRollout> {
    if context.config.kwargs::<Kwargs>(NAME)?.placed {
        let message = "a rollout of placed updates says what it wants: `lend`";
        return Err(Error::new(ErrorKind::Config, "preparing", message));
    }
    let control = context.require_control()?;
    let pool = Pool::new(context.threads(Role::Rollout))?;
    let nothing = serde_json::Value::Null;
    let metadata = WorkerMetadata::of_this_process(NAME, control.rank(), Role::Rollout, nothing);
    Ok(Prepared::new(metadata, move |place| async move {
        let link = Incoming::open(&place, &context)?;
        let engine = Receiver::new(link, &context, control, pool);
        Ok(Box::new(engine) as Box<dyn RolloutEngine>)
    }))
}
