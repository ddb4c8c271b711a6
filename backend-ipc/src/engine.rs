//! The engines: buckets that other processes of the host map, and tensors that rollouts lend.

use std::future::ready;
use std::sync::Arc;

use engine_core::memory::Pool;
use engine_core::{
    CheckpointEngineConfig, DeviceChoice, EngineContext, Error, ErrorKind, Prepared,
    PreparedRollout, PreparedTrainer, Result, Role, RolloutEngine, TrainerEngine, WorkerMetadata,
};
use placed::{Layout, Lender, LentTensor, PlacedRollout, Wanted};
use protocol::{Receiver, Sender};

use crate::NAME;
use crate::buckets::{Buckets, Incoming};
use crate::lent::{LentMemory, Neighbours};
#[cfg(feature = "cuda")]
use crate::lent_cuda::LentCuda;

/// The default size of the memory through which a rollout takes parcels.
const DEFAULT_MEGABYTES: u64 = 16;

/// The transport's options.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Kwargs {
    /// Whether trainers write into tensors that rollouts lend.
    placed: bool,
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
    let layout = Layout::new(wanted)?;
    let memory = memory_to_lend(&context.config.device, layout.bytes())?;
    placed::prepare_rollout(NAME, context, layout, ready(Ok(memory)))
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
    let staging = bucket_bytes(&context.config);
    let tensors = tensors.into_iter().collect();
    let (layout, memory) = place_tensors(&context.config.device, tensors, staging)?;
    placed::prepare_rollout(NAME, context, layout, ready(Ok(memory)))
}

/// The size of the memory through which parcels go.
fn bucket_bytes(config: &CheckpointEngineConfig) -> u64 {
    config.update_weights_bucket_megabytes.map_or(DEFAULT_MEGABYTES, u64::from) << 20
}

fn place_tensors(
    device: &DeviceChoice,
    tensors: Vec<LentTensor>,
    staging: u64,
) -> Result<(Layout, Box<dyn Lender>)> {
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        let (layout, memory) = LentCuda::of_tensors(device, tensors, staging)?;
        return Ok((layout, Box::new(memory)));
    }
    let _ = device;
    let (layout, memory) = LentMemory::of_tensors(tensors, staging)?;
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

pub(crate) async fn prepare_trainer(context: EngineContext) -> Result<PreparedTrainer> {
    if context.config.kwargs::<Kwargs>(NAME)?.placed {
        let rank = context.require_control()?.rank();
        let limit = context.deadline().mul_f64(0.75);
        let reach = Arc::new(Neighbours::new(&context.config.device, rank, limit)?);
        return placed::prepare_trainer(NAME, context, reach);
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
        return Err(placed::says_nothing_of_what_it_wants());
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
