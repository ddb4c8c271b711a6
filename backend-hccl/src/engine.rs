//! The engine: HCCL as the library of the collective engine.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use collective::{
    CollectiveEngine, CollectiveOptions, Library, MemorySlots, Opened, Shape, Thread, Wait,
};
use engine_core::memory::Pool;
use engine_core::{
    EngineContext, Error, ErrorKind, Prepared, PreparedRollout, PreparedTrainer, Rank, Result,
};
use placed::{LentTensor, PlacedRollout, Wanted};
use serde::{Deserialize, Serialize};

use crate::comm::{HcclCommunicator, Plan};
use crate::slots::NpuMemory;
use crate::{DEVICE, NAME};

/// The size of each of the two buckets unless one is configured.
const DEFAULT_BUCKET_BYTES: u64 = 256 << 20;

/// The transport's options: `engine_kwargs.hccl` of the configuration.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct HcclOptions {
    /// How many trainers send. HCCL supports one only.
    pub senders: u32,
    /// Whether other trainers of the leader's host take part, for HCCL to pass buckets on from their
    /// NPUs.
    pub relays: bool,
    /// Whether to form the group anew for every update.
    pub rebuild_group: bool,
    /// Whether trainers write into tensors that rollouts lend. The same on all trainers.
    pub placed: bool,
    /// The folder of `libascendcl.so` and `libhccl.so`; searched for without it.
    pub library_dir: Option<PathBuf>,
}

impl Default for HcclOptions {
    fn default() -> Self {
        let CollectiveOptions { senders, relays, rebuild_group } = CollectiveOptions::default();
        Self { senders, relays, rebuild_group, placed: false, library_dir: None }
    }
}

/// HCCL, as the collective engine uses it.
#[derive(Clone, Debug)]
pub(crate) struct HcclLibrary {
    options: HcclOptions,
}

pub(crate) async fn prepare_trainer(context: EngineContext) -> Result<PreparedTrainer> {
    let (library, options) = library(&context)?;
    if library.options.placed {
        return collective::prepare_placed_trainer(library, context, None).await;
    }
    CollectiveEngine::prepare_trainer(library, context, options).await
}

pub(crate) async fn prepare_rollout(context: EngineContext) -> Result<PreparedRollout> {
    let (library, options) = library(&context)?;
    if library.options.placed {
        return Err(placed::says_nothing_of_what_it_wants());
    }
    CollectiveEngine::prepare_rollout(library, context, options).await
}

/// Prepares a rollout that lends its tensors, which are in host memory: what trainers broadcast to its NPU is copied there. Each trainer that
/// has a part of them forms a group of two with it.
///
/// Its trainers need the option `placed` of this transport, and an NPU other than this rank's.
///
/// # Errors
///
/// `Config` without a control plane, for a `device` that is no NPU, and for tensors that cannot be placed; `Weight`, which names the tensor, for
/// a box outside of its tensor; `Resource` if there is no memory. Those of the library come when the rank joins.
pub fn lend(
    context: EngineContext,
    wanted: impl IntoIterator<Item = Wanted>,
) -> Result<Prepared<PlacedRollout>> {
    let (library, _) = library(&context)?;
    let (layout, tensors) = collective::host_tensors(wanted)?;
    collective::prepare_placed_rollout(library, context, layout, tensors)
}

/// As [`lend`], of tensors that the rollout's program has made in host memory of any kind: updates are written to where they are.
///
/// # Errors
///
/// As [`lend`]. `Weight`, which names the tensor, for tensors that share memory; `Mismatch` for a tensor on a device.
pub fn lend_tensors(
    context: EngineContext,
    tensors: impl IntoIterator<Item = LentTensor>,
) -> Result<Prepared<PlacedRollout>> {
    let (library, _) = library(&context)?;
    let (layout, tensors) = collective::own_host_tensors(tensors)?;
    collective::prepare_placed_rollout(library, context, layout, tensors)
}

/// The library and its options, as the configuration has them.
fn library(context: &EngineContext) -> Result<(HcclLibrary, CollectiveOptions)> {
    let options = context.config.kwargs::<HcclOptions>(NAME)?;
    let refuse = |message: String| Error::new(ErrorKind::Config, "preparing", message);
    if options.senders != 1 {
        return Err(refuse(format!(
            "senders: {}: HCCL sends from one trainer: each sender needs a communicator of its own, \
             which takes twice HCCL_BUFFSIZE of every NPU, and operations of two communicators on one \
             NPU may wait for one another",
            options.senders
        )));
    }
    if context.config.device.kind() != DEVICE {
        return Err(refuse(format!(
            "device: `{}`: HCCL has its buckets on NPUs: set device to npu (by rank) or npu:N",
            context.config.device
        )));
    }
    let HcclOptions { senders, relays, rebuild_group, .. } = options;
    let collective = CollectiveOptions { senders, relays, rebuild_group };
    Ok((HcclLibrary { options }, collective))
}

#[async_trait]
impl Library for HcclLibrary {
    type Communicator = HcclCommunicator;

    fn name(&self) -> &'static str {
        NAME
    }

    fn default_bucket_bytes(&self) -> u64 {
        DEFAULT_BUCKET_BYTES
    }

    async fn open(
        &self,
        context: &EngineContext,
        shape: Shape,
        _: &Pool,
    ) -> Result<Opened<HcclCommunicator>> {
        let deadline = context.deadline().mul_f64(0.75);
        let rank = context.require_control()?.rank();
        let plan = Plan {
            library_dir: self.options.library_dir.clone(),
            device: context.config.device.ordinal(),
            rank: rank.0,
            shape,
            deadline,
            shares: rank == Rank::LEADER,
        };
        let make =
            move || HcclCommunicator::open(&plan).map_err(|error| Error::from(error).rank(rank));
        let thread = Thread::start("ckpt-hccl", make).await?;
        let say = |own: &mut HcclCommunicator, _: &Wait<'_>| {
            let device = format!("{DEVICE}:{}", own.device().number());
            Ok((own.version().to_owned(), device, own.views().clone(), own.share()))
        };
        let (version, device, views, share) = thread.run(deadline, say).await?;
        let memory = NpuMemory::new(thread.clone(), shape, deadline, device, views);
        let slots = Arc::new(MemorySlots::of(memory.cut()));
        Ok(Opened { thread, slots, version, share: Some(share) })
    }
}
