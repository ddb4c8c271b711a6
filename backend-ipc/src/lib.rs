//! A checkpoint engine between processes of one host. Its buckets are in shared memory, or in the memory of a device
//! whose kind the registry knows. The rollouts map them and read them in place.
//!
//! The number of buckets does not depend on the number of rollouts: two in host memory, four of half the size on a
//! device. While all rollouts read one, the trainer packs another.
//!
//! Shared memory is an anonymous file (`memfd_create`). It does not outlive its processes. It is not in `/dev/shm`, so
//! the size of that does not limit it. It is sealed: no process can shorten it while others read it, and on Linux 5.1
//! or later only the trainer can write to it. The rollouts open it through the trainer's process
//! (`/proc/<pid>/fd`), so they need the same user and a common PID namespace.
//!
//! With the option `placed`, any number of trainers write the weights that they hold straight into tensors that
//! rollouts [`lend`], or into a program's own tensors ([`lend_tensors`]). The crate `placed` has the protocol.
//!
//! A [`SharedCache`] keeps the last complete version of a rollout with any backend in shared memory,
//! for other processes of its host.

mod buckets;
mod cache;
mod engine;
mod error;
mod ffi;
mod lease;
mod lent;
#[cfg(feature = "cuda")]
mod lent_cuda;
mod mapped;
mod memfile;
mod segment;
mod staged;

use engine_core::{
    Availability, Backend, Devices, EngineContext, Error, ErrorKind, Placement, PreparedRollout,
    PreparedTrainer, Result, Role, WorkerMetadata,
};

pub use cache::{CacheAddress, SharedCache, SharedCacheReader};
pub use engine::{lend, lend_tensors};
pub use placed::LentTensor;

/// The transport's name in configurations.
const NAME: &str = "ipc";

/// The transport as a value, for a registry.
pub static BACKEND: &dyn Backend = &Ipc;

#[derive(Debug)]
struct Ipc;

#[async_trait::async_trait]
impl Backend for Ipc {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "other processes of this host, over shared memory"
    }

    fn devices(&self) -> Devices {
        Devices::Registered
    }

    fn sends_parts(&self) -> bool {
        true
    }

    fn probe(&self) -> Availability {
        match segment::probe() {
            Ok(details) => Availability::Usable { details },
            Err(error) => Availability::Unusable {
                reason: Error::from(error).to_string(),
                remedy: "it takes Linux, memory and `memfd_create`, which a sandbox may forbid"
                    .into(),
            },
        }
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        engine::prepare_trainer(context).await
    }

    async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
        engine::prepare_rollout(context).await
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        let places = Placement::for_all(NAME, workers)?;
        let refuse =
            |message: String| Error::new(ErrorKind::Mismatch, "building the topology", message);
        let trainer = places[0].own()?;
        let placed = placed::are_placed(&places)?;
        for place in &places[1..] {
            let peer = place.own()?;
            if peer.role == Role::Trainer && !placed {
                let message = "ipc sends from one trainer rank: gather the weights on rank 0, or have rollouts lend their \
                               tensors (placed)";
                return Err(refuse(message.into()).rank(place.rank));
            }
            if peer.host != trainer.host {
                return Err(refuse(format!(
                    "it runs on the host {}, the trainer on {}: ipc reaches processes of one host",
                    peer.host, trainer.host
                ))
                .rank(place.rank));
            }
        }
        Ok(places)
    }
}
