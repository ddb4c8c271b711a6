//! A checkpoint engine over HCCL: broadcasts between Ascend NPUs of any hosts.
//!
//! Every rank has slots for buckets on its NPU. The trainer encodes a bucket on the host, in pinned
//! memory, copies it to a slot, and HCCL broadcasts it to the slots of all rollouts. One thread for each
//! engine makes all calls of ACL and HCCL, which bind devices to threads. Rollouts on the trainer's NPU read
//! its slots there.
//!
//! With the option `placed`, any number of trainers broadcast the weights that they hold to the rollouts that [`lend`] tensors for them, in
//! groups of two. The crate `collective` has the protocol.
//!
//! Neither ACL nor HCCL is linked. Their libraries are searched for when an engine is prepared: in the
//! folder that [`HcclOptions::library_dir`] or `CKPT_ENGINE_HCCL_DIR` names; else where CANN is
//! installed, and where `LD_LIBRARY_PATH` leads.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("CANN's libraries are for 64-bit Linux");

#[cfg(test)]
mod alone;
mod comm;
pub mod doctor;
mod engine;
mod environment;
mod error;
mod ffi;
#[cfg(test)]
mod foreign;
#[cfg(test)]
mod headers;
mod mutation;
mod slots;
mod sys;

use collective::build_topology;
use engine_core::{
    Availability, Backend, Devices, EngineContext, Placement, PreparedRollout, PreparedTrainer,
    Result, WorkerMetadata,
};

pub use engine::{HcclOptions, lend, lend_tensors};
pub use placed::LentTensor;

/// The transport's name in configurations.
const NAME: &str = "hccl";
/// The kind of its devices.
const DEVICE: &str = "npu";

/// The transport as a value, to be registered.
pub static BACKEND: &dyn Backend = &Hccl;

#[derive(Debug)]
struct Hccl;

#[async_trait::async_trait]
impl Backend for Hccl {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "Ascend NPUs of any hosts, by broadcast over HCCL"
    }

    fn devices(&self) -> Devices {
        Devices::Kinds(&[DEVICE])
    }

    fn probe(&self) -> Availability {
        match doctor::probe() {
            Ok(details) => Availability::Usable { details },
            Err(error) => {
                Availability::Unusable { reason: error.to_string(), remedy: error::REMEDY.into() }
            }
        }
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        engine::prepare_trainer(context).await
    }

    async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
        engine::prepare_rollout(context).await
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        build_topology(NAME, workers)
    }
}

/// Whether the libraries that this process has loaded are a simulator's; false if it has loaded none. Label results
/// of a simulator as simulated.
pub fn is_simulated() -> bool {
    sys::loaded().is_some_and(comm::is_simulated)
}
