//! A checkpoint engine over NCCL: trainers broadcast buckets to the GPUs of all rollouts.
//!
//! Every rank has a few slots on its GPU. The engine is the one that all collective libraries share
//! ([`collective`]); this crate brings NCCL's calls, made by one thread, and slots that are
//! packed, quantised, digested and copied out by the kernels of `device-cuda`. No call of NCCL blocks
//! that thread for longer than a deadline: communicators are made without blocking, watched while
//! anything is under way, and aborted if it takes too long.
//!
//! With the option `placed`, any number of trainers broadcast the weights that they hold to the rollouts that [`lend`] tensors for them, in
//! groups of two. The crate `collective` has the protocol.
//!
//! NCCL is not linked. Its library is searched for when an engine is prepared: the file that
//! [`NcclOptions::library`] or `CKPT_ENGINE_NCCL_LIB` names; else the folder `native` beside the
//! program's own, installed Python wheels, and where packages put libraries. All ranks need the same
//! version.

mod alone;
pub mod bare;
mod comm;
mod error;
mod ffi;
mod library;
mod placed;
mod sys;

use std::path::PathBuf;

use collective::{CollectiveEngine, CollectiveOptions, Library, build_topology};
use engine_core::{
    Availability, Backend, DeviceChoice, Devices, EngineContext, Placement, PreparedRollout,
    PreparedTrainer, Result, WorkerMetadata,
};
use serde::{Deserialize, Serialize};

use crate::library::NcclLibrary;

pub use crate::placed::{lend, lend_tensors};
pub use ::placed::LentTensor;

/// The transport's name in configurations.
const NAME: &str = "nccl";

/// The transport as a value, to be registered.
pub static BACKEND: &dyn Backend = &NcclBackend;

/// The transport's options: `engine_kwargs.nccl` of the configuration.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct NcclOptions {
    /// How many trainers send, each a part of the buckets: those of the lowest ranks. Each uses the
    /// network interfaces near its own GPU.
    pub senders: u32,
    /// Whether other trainers of the leader's host take part, so that NCCL can pass buckets on over the
    /// network interfaces near their GPUs.
    pub relays: bool,
    /// Whether to make communicators anew for every update.
    pub rebuild_group: bool,
    /// Whether trainers write into tensors that rollouts lend. The same on all trainers.
    pub placed: bool,
    /// The file `libnccl.so.2`; searched for without it.
    pub library: Option<PathBuf>,
}

impl Default for NcclOptions {
    fn default() -> Self {
        let CollectiveOptions { senders, relays, rebuild_group } = CollectiveOptions::default();
        Self { senders, relays, rebuild_group, placed: false, library: None }
    }
}

/// What the configuration says.
struct Configured {
    library: NcclLibrary,
    options: CollectiveOptions,
    placed: bool,
}

impl Configured {
    fn of(context: &EngineContext) -> Result<Self> {
        let options = context.config.kwargs::<NcclOptions>(NAME)?;
        let NcclOptions { senders, relays, rebuild_group, placed, library } = options;
        let options = CollectiveOptions { senders, relays, rebuild_group };
        Ok(Self { library: NcclLibrary { library }, options, placed })
    }
}

/// NCCL as a library of collectives, for engines that send to inference servers. Its file is searched for unless it
/// is named.
pub fn collectives(library: Option<PathBuf>) -> impl Library {
    NcclLibrary { library }
}

/// Slots like those of NCCL, but without NCCL. Other processes of the host read them: on these GPUs, to each of which
/// a filled slot is copied, or on the GPU where it was filled if none are named.
pub fn shared_slots(readers: Vec<DeviceChoice>) -> impl Library {
    alone::SharedSlots { readers }
}

#[derive(Debug)]
struct NcclBackend;

#[async_trait::async_trait]
impl Backend for NcclBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "GPUs of any hosts, by broadcast over NCCL"
    }

    fn devices(&self) -> Devices {
        Devices::Kinds(&["cuda"])
    }

    fn probe(&self) -> Availability {
        let unusable =
            |reason: String, remedy: &str| Availability::Unusable { reason, remedy: remedy.into() };
        let api = match sys::load(None) {
            Ok(api) => api,
            Err(error) => return unusable(error.to_string(), error::REMEDY),
        };
        let found = &api.found;
        let can = |what: bool| if what { "can" } else { "cannot" };
        let words = format!(
            "NCCL {} at {}; it {} leave ranks out of a group, {} register buckets, {} run several \
             ranks on one GPU",
            found.version(),
            found.path.display(),
            can(api.shrink.is_some()),
            can(api.register.is_some()),
            can(found.can_share_gpus()),
        );
        match device_cuda::count() {
            Ok(count) if count > 0 => {
                Availability::Usable { details: format!("{words}; {count} GPUs") }
            }
            Ok(_) => unusable(format!("{words}; there is no GPU"), "run it where a GPU is"),
            Err(error) => unusable(format!("{words}; {error}"), "install NVIDIA's driver"),
        }
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        let Configured { library, options, placed } = Configured::of(&context)?;
        if placed {
            let encoder = placed::encoder(&context)?;
            return collective::prepare_placed_trainer(library, context, Some(encoder)).await;
        }
        CollectiveEngine::prepare_trainer(library, context, options).await
    }

    async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
        let Configured { library, options, placed } = Configured::of(&context)?;
        if placed {
            return Err(::placed::says_nothing_of_what_it_wants());
        }
        CollectiveEngine::prepare_rollout(library, context, options).await
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        build_topology(NAME, workers)
    }
}
