//! A checkpoint engine over HCCL: broadcasts between Ascend NPUs of any hosts.
//!
//! Every rank has slots for buckets on its NPU. The trainer encodes a bucket on the host, in pinned
//! memory, copies it to a slot, and HCCL broadcasts it to the slots of all rollouts. One thread for each
//! engine makes all calls of ACL and HCCL, which bind devices to threads.
//!
//! Neither ACL nor HCCL is linked. Their libraries are searched for when an engine is prepared: in the
//! folder that [`HcclOptions::library_dir`] or `CKPT_ENGINE_HCCL_DIR` names; else where CANN is
//! installed, and where `LD_LIBRARY_PATH` leads.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("CANN's libraries are for 64-bit Linux");

mod comm;
pub mod doctor;
mod engine;
mod environment;
mod error;
mod ffi;
mod mutation;
mod slots;
mod sys;

use std::path::Path;
use std::time::Duration;

use engine_core::collective::build_topology;
use engine_core::{
    Availability, Backend, CheckpointEngine, EngineContext, Placement, Result, WorkerMetadata,
};

pub use engine::HcclOptions;

/// The transport's name in configurations.
const NAME: &str = "hccl";
/// The kind of its devices.
const DEVICE: &str = "npu";

/// The transport as a value, to be registered.
pub static BACKEND: &dyn Backend = &Hccl;

#[derive(Debug)]
struct Hccl;

impl Backend for Hccl {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "Ascend NPUs of any hosts, by broadcast over HCCL"
    }

    fn devices(&self) -> &'static [&'static str] {
        &[DEVICE]
    }

    fn probe(&self) -> Availability {
        match doctor::probe(None) {
            Ok(details) => Availability::Usable { details },
            Err(error) => {
                Availability::Unusable { reason: error.to_string(), remedy: error::REMEDY.into() }
            }
        }
    }

    fn create(&self, context: EngineContext) -> Result<Box<dyn CheckpointEngine>> {
        Ok(Box::new(engine::engine(context)?))
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        build_topology(NAME, workers)
    }
}

/// What a simulator says of itself if the libraries are one's, and `None` if they are real. What is found
/// out with it has to be labelled as simulated.
///
/// Loads the libraries, as an engine of this process would.
///
/// # Errors
///
/// `Backend` if they are not there.
pub fn simulator(library_dir: Option<&Path>) -> Result<Option<String>> {
    let api = comm::load(library_dir, Duration::from_secs(60))?;
    if !comm::is_simulated(api) {
        return Ok(None);
    }
    let words = api.found.simulated.clone().or_else(|| ffi::soc_name(api));
    Ok(Some(words.unwrap_or_default()))
}
