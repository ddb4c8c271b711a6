//! A checkpoint engine between processes of one host: buckets in shared memory, or in
//! that of a device whose kind the registry knows, which the rollouts map and read in place.
//!
//! The trainer has two buckets, however many rollouts there are: while all of them read one, it
//! packs the other. Shared memory is a file without a name (`memfd_create`), which does not outlive its
//! processes, is not in `/dev/shm` and so not bound by its size, and is sealed: no process can shorten it under
//! another's feet, and none but the trainer can write to it. The rollouts open it through the trainer's process
//! (`/proc/<pid>/fd`), which takes the same user and a common PID namespace.
//!
//! With the option `placed`, any number of trainers write what each of them holds straight into tensors that rollouts
//! [`lend`]: the crate `placed` has the protocol.
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
mod memfile;
mod segment;

use engine_core::{
    Availability, Backend, Devices, EngineContext, Error, ErrorKind, Placement, PreparedRollout,
    PreparedTrainer, Result, Role, WorkerMetadata,
};

pub use cache::{CacheAddress, SharedCache, SharedCacheReader};
pub use engine::lend;

/// The transport's name in configurations.
const NAME: &str = "ipc";

/// The transport as a value, to be registered.
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
        let placed = engine::is_placed(trainer);
        for place in &places[1..] {
            let peer = place.own()?;
            if engine::is_placed(peer) != placed {
                let (one, other) =
                    if placed { ("no", "placed") } else { ("a placed", "no placed") };
                let message =
                    format!("it takes part in {one} updates, the trainer in {other} ones");
                return Err(refuse(message).rank(place.rank));
            }
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
