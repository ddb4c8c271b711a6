//! Backends that only send: to inference servers as they are, by their own protocols.
//!
//! The trainer is a rank of this project's; the receivers are not. They have no deadlines and no digests, a failed update
//! leaves them half loaded while they say that they are healthy, and one that waits in a collective waits without an end. So this side is
//! the one that never hangs, and that says what happened.
//!
//! # vLLM over NCCL
//!
//! The backend `vllm` drives vLLM's HTTP routes for weight transfer, and broadcasts over NCCL. The trainer and all workers of all
//! servers are one world, of which the trainer is member 0.
//!
//! - **The stream becomes buckets** (`chunk.rs`): whole weights, one behind the other. A bucket is one call of
//!   `update_weights` with the names, types and shapes of its weights, and one broadcast. So the stream need not be known
//!   before it is sent, and nothing is outstanding in NCCL while the trainer waits for its next weight: a trainer whose
//!   stream fails leaves no server hanging. vLLM can also take a whole update by one call that reuses the names of the
//!   last; that saves the names and a request for each bucket, and costs this property.
//! - **Weights get into slots** by what `backend-nccl` does it with: packed and quantised by one launch where they are on the
//!   device, by the CPU where they are not. One of two slots is filled while the other travels.
//! - **Calls that can hang** are made by the thread of [`collective`], which gives a world up when a deadline passes: joining,
//!   warming up, a broadcast. The servers' own part of such a call is an HTTP request with the same deadline; when one
//!   side fails, the others get a few seconds more.
//! - **What happens to each server** is decided by a machine without IO (`fleet.rs`). A server that fails is left out and
//!   named in [`SendReport::receivers`], the update goes on in a world without it, and the next update tries it again:
//!   everything about it is asked anew, and it generates only once it has confirmed a version.
//! - **FP8** is none of this crate's business: the layer in front of the engine quantises the stream, in which a weight's scales
//!   follow its codes.
//!
//! Its group has one rank, the trainer. [`SendReport::receivers`] has the servers as the ranks 1, 2, … in the order of the
//! configuration, and their addresses in the notes.
//!
//! [`SendReport::receivers`]: engine_core::SendReport::receivers
#![forbid(unsafe_code)]

mod chunk;
mod engine;
mod fleet;
#[cfg(fuzzing)]
pub mod fuzzing;
mod http;
pub mod vllm;

use std::path::PathBuf;

use engine_core::{
    Availability, Backend, Devices, EngineContext, Error, ErrorKind, Placement, PreparedRollout,
    PreparedTrainer, Result, Role, WorkerMetadata,
};
use serde::{Deserialize, Serialize};

pub use engine::prepare_vllm;
pub use http::ServerUrl;

/// The name in configurations of what sends to vLLM.
const NAME: &str = "vllm";

/// What sends to vLLM, as a value to be registered.
pub static VLLM: &dyn Backend = &VllmBackend;

/// Options of the backend `vllm`: `engine_kwargs.vllm` of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct VllmOptions {
    /// The servers: `http://HOST:PORT` each.
    pub servers: Vec<ServerUrl>,
    /// How the weights get there.
    pub transport: Transport,
    /// What happens to requests that a server is at work on when an update begins.
    pub pause: vllm::Pause,
    /// The file `libnccl.so.2`; searched for without it.
    pub library: Option<PathBuf>,
}

/// How weights get to servers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Transport {
    /// By broadcast over NCCL, to GPUs of any hosts other than the trainer's own.
    #[default]
    Nccl,
}

#[derive(Debug)]
struct VllmBackend;

#[async_trait::async_trait]
impl Backend for VllmBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "vLLM's servers as they are, by broadcast over NCCL"
    }

    fn devices(&self) -> Devices {
        backend_nccl::BACKEND.devices()
    }

    fn probe(&self) -> Availability {
        backend_nccl::BACKEND.probe()
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        let VllmOptions { library, .. } = context.config.kwargs(NAME)?;
        prepare_vllm(backend_nccl::collectives(library), context).await
    }

    async fn prepare_rollout(&self, _: EngineContext) -> Result<PreparedRollout> {
        let message = "vllm only sends: its rollouts are the servers of engine_kwargs.vllm.servers";
        Err(Error::new(ErrorKind::Config, "preparing", message))
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        let [worker] = workers else {
            let message = format!(
                "{} ranks: vllm has one, the trainer that sends; gather the weights of others there",
                workers.len()
            );
            return Err(Error::new(ErrorKind::Mismatch, "building the topology", message));
        };
        if worker.role != Role::Trainer || worker.backend != NAME {
            let message = "vllm's only rank is a trainer that was prepared for it";
            return Err(
                Error::new(ErrorKind::Mismatch, "building the topology", message).rank(worker.rank)
            );
        }
        Ok(vec![Placement { rank: worker.rank, peers: workers.into() }])
    }
}
