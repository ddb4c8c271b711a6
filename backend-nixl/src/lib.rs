//! A checkpoint engine over NIXL: one-sided transfers between hosts, by whatever network UCX finds
//! (RDMA, TCP) or between processes of one host (shared memory).
//!
//! Every rank has one piece of memory, registered once, with a few slots for buckets. Rollouts read buckets from the trainer's slots, or,
//! in a ring, from the slots of the rollout before them, which reads the next bucket meanwhile: an update of many rollouts in a ring takes
//! hardly longer than that of one. Rollouts join and leave between updates. One that dies within an update is left out, and the others
//! finish.
//!
//! With the option `placed`, any number of trainers write the weights that they hold straight into host memory that rollouts [`lend`], or
//! into a program's own tensors ([`lend_tensors`]). The crate `placed` has the protocol.
//!
//! NIXL is not linked. Its library is searched for when an engine is prepared: in the folder that [`NixlOptions::library_dir`] or
//! `CKPT_ENGINE_NIXL_DIR` names, else in the folder `native` beside the program, in installed Python wheels, and where packages put
//! libraries.

mod agent;
mod arena;
pub mod bare;
mod engine;
mod error;
mod ffi;
#[cfg(fuzzing)]
pub mod fuzzing;
mod host;
mod interface;
mod lending;
mod lent;
mod room;
mod sys;

use engine_core::{
    Availability, Backend, Devices, EngineContext, Error, ErrorKind, Placement, PreparedRollout,
    PreparedTrainer, Result, Role, WorkerMetadata,
};

pub use engine::{ErrorHandling, NixlOptions, Topology, Transfer};
pub use lending::{lend, lend_tensors};
pub use placed::LentTensor;

/// The transport's name in configurations.
const NAME: &str = "nixl";

/// The backend, to be registered.
pub static BACKEND: &dyn Backend = &Nixl;

#[derive(Debug)]
struct Nixl;

#[async_trait::async_trait]
impl Backend for Nixl {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "processes of any hosts, one-sided over NIXL and UCX (RDMA, TCP, shared memory)"
    }

    fn devices(&self) -> Devices {
        Devices::Registered
    }

    fn sends_parts(&self) -> bool {
        true
    }

    fn probe(&self) -> Availability {
        match agent::probe() {
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
        let places = Placement::for_all(NAME, workers)?;
        if placed::are_placed(&places)? {
            return Ok(places);
        }
        let refuse =
            |message: String| Error::new(ErrorKind::Mismatch, "building the topology", message);
        let details = |worker: &WorkerMetadata| {
            serde_json::from_value::<engine::Details>(worker.details.clone())
                .map_err(|error| refuse(format!("its metadata is not NIXL's: {error}")))
        };
        let trainer = details(places[0].own()?)?;
        for place in &places[1..] {
            let peer = place.own()?;
            if peer.role == Role::Trainer {
                let message = "nixl sends from one trainer rank: gather the weights on rank 0, or have rollouts lend their \
                               tensors (placed)";
                return Err(refuse(message.into()).rank(place.rank));
            }
            let own = details(peer).map_err(|error| error.rank(place.rank))?;
            if (own.slots, own.slot_bytes) != (trainer.slots, trainer.slot_bytes) {
                return Err(refuse(format!(
                    "it has {} slots of {} bytes, the trainer {} of {}: configure the same \
                     update_weights_bucket_megabytes",
                    own.slots, own.slot_bytes, trainer.slots, trainer.slot_bytes
                ))
                .rank(place.rank));
            }
            if own.transfer != trainer.transfer {
                let message = "its option `transfer` is not the trainer's: configure the same";
                return Err(refuse(message.into()).rank(place.rank));
            }
        }
        Ok(places)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use engine_core::Rank;

    fn worker(rank: u32, role: Role, slot_bytes: u64, transfer: Transfer) -> WorkerMetadata {
        let details = engine::Details { slots: 4, slot_bytes, transfer };
        WorkerMetadata::of_this_process(NAME, Rank(rank), role, serde_json::json!(details))
    }

    #[test]
    fn ranks_with_other_slots_or_another_way_of_moving_bytes_are_refused_by_their_rank() {
        let trainer = worker(0, Role::Trainer, 1 << 20, Transfer::Read);
        let alike = worker(1, Role::Rollout, 1 << 20, Transfer::Read);
        BACKEND.build_topology(&[trainer.clone(), alike.clone()]).unwrap();
        for other in [
            worker(2, Role::Rollout, 2 << 20, Transfer::Read),
            worker(2, Role::Rollout, 1 << 20, Transfer::Write),
            worker(2, Role::Trainer, 1 << 20, Transfer::Read),
        ] {
            let error =
                BACKEND.build_topology(&[trainer.clone(), alike.clone(), other]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
            assert_eq!(error.report().rank, Some(Rank(2)), "{error}");
        }
    }
}
