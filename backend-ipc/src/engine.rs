//! The engine: buckets that other processes of the host map, in its memory or on its devices.

use std::sync::Arc;

use engine_core::memory::Pool;
use engine_core::{
    DeviceChoice, EngineContext, Error, ErrorKind, Placement, Prepared, PreparedRollout,
    PreparedTrainer, Rank, Result, Role, RolloutEngine, TrainerEngine, WorkerMetadata,
};
use placed::{Layout, Lender, PlacedRollout, PlacedTrainer, Wanted};
use protocol::{ReceiveLink, Receiver, SendLink, Sender};

use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::lent::{LentMemory, Neighbours};
#[cfg(feature = "cuda")]
use crate::lent_cuda::LentCuda;
use crate::segment::{MappedSegment, Segment, SegmentInfo};
use crate::{NAME, shared};

/// Buckets of the trainer: one is packed while the rollouts read the other.
const SLOTS: u32 = 2;

/// The size of a bucket unless one is configured, for so many threads of the trainer. Two of them fit into
/// the last-level cache of a server, so that the rollouts read from there what the trainer has just
/// written; many threads need larger ones to have enough to do in each.
fn default_bucket_megabytes(threads: usize) -> u64 {
    (4 * threads as u64).clamp(16, 64)
}

/// The trainer's buckets.
#[derive(Debug)]
enum Buckets {
    /// With the reason, if they should be on a device.
    Shared(Arc<Segment>, Option<String>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<cuda::Buckets>),
}

/// What the trainer tells of its buckets.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Offer {
    Shared(SegmentInfo),
    #[cfg(feature = "cuda")]
    Cuda(cuda::CudaInfo),
}

impl Buckets {
    fn create(context: &EngineContext) -> Result<Self> {
        let config = &context.config;
        let bytes = |default: u64| config.bucket_bytes().unwrap_or(default << 20);
        #[cfg_attr(not(feature = "cuda"), expect(unused_mut, reason = "nothing can fall back"))]
        let mut slower = None;
        #[cfg(feature = "cuda")]
        if !config.device.is_cpu() {
            let bytes = bytes(cuda::DEFAULT_BUCKET_MEGABYTES);
            match cuda::Buckets::create(&config.device, bytes)? {
                Ok(buckets) => return Ok(Self::Cuda(Arc::new(buckets))),
                Err(reason) => {
                    slower = Some(format!(
                        "weights go through shared memory of the host, because other processes cannot open \
                         this device's memory: {reason}"
                    ));
                }
            }
        }
        if let Some(why) = &slower {
            tracing::warn!("{why}");
        }
        let default = default_bucket_megabytes(context.threads(Role::Trainer));
        let segment = Segment::create(SLOTS, bytes(default))?;
        Ok(Self::Shared(Arc::new(segment), slower))
    }

    fn offer(&self) -> Offer {
        match self {
            Self::Shared(segment, _) => Offer::Shared(segment.info().clone()),
            #[cfg(feature = "cuda")]
            Self::Cuda(buckets) => Offer::Cuda(buckets.info().clone()),
        }
    }

    fn into_link(self, pool: Pool) -> Box<dyn SendLink> {
        match self {
            Self::Shared(segment, slower) => Box::new(shared::Outgoing { segment, slower, pool }),
            #[cfg(feature = "cuda")]
            Self::Cuda(buckets) => Box::new(cuda::Outgoing { buckets, pool }),
        }
    }
}

/// The receiving end of the trainer's buckets.
fn open(place: &Placement, device: &DeviceChoice) -> Result<Box<dyn ReceiveLink>> {
    let details = place.peer(Rank::LEADER)?.details.clone();
    let offer = serde_json::from_value(details).map_err(|error| {
        let words = format!("the trainer's buckets are not what ipc knows: {error}");
        Error::new(ErrorKind::Protocol, "joining the group", words)
            .rank(Rank::LEADER)
            .with_source(error)
    })?;
    match offer {
        Offer::Shared(info) => {
            let _ = device;
            let segment =
                MappedSegment::open(info).map_err(|error| Error::from(error).rank(Rank::LEADER))?;
            Ok(Box::new(shared::Incoming { segment }))
        }
        #[cfg(feature = "cuda")]
        Offer::Cuda(info) => Ok(Box::new(cuda::Incoming::open(&info, device)?)),
    }
}

/// The transport's options.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Kwargs {
    /// Whether trainers write into tensors that rollouts lend.
    placed: bool,
}

/// What a rank of placed updates says of itself.
const PLACED: &str = "placed";

/// Whether a rank takes part in placed updates.
pub(crate) fn is_placed(worker: &WorkerMetadata) -> bool {
    worker.details == PLACED
}

fn placed_metadata(context: &EngineContext, role: Role) -> Result<WorkerMetadata> {
    let rank = context.require_control()?.rank();
    Ok(WorkerMetadata::of_this_process(NAME, rank, role, PLACED.into()))
}

/// Prepares a rollout that lends its tensors: memory for what it wants, on the device of its configuration, which trainers of its host
/// write to in every update.
///
/// Its trainers have the option `placed` of this transport. They reach memory of a CUDA device if their own is the same one, or one with
/// peer access to it.
///
/// # Errors
///
/// `Config` without a control plane, and for what cannot be placed; `Backend` for device memory that other processes cannot open; `Weight`, naming the tensor, for boxes
/// outside of it; `Resource` if there is no memory.
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
        let link = open(&place, &context.config.device)?;
        let engine = Receiver::new(link, &context, control, pool);
        Ok(Box::new(engine) as Box<dyn RolloutEngine>)
    }))
}
