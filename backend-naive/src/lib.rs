//! A checkpoint engine for trainers and rollouts of one process: it hands weights over without a copy.
//!
//! A weight that is contiguous in memory arrives as that memory, shared, on whatever device it is. A weight that is encoded on the way
//! (cast, strided, quantised) is encoded once, for all rollouts. A rollout may keep what it received for as long as it likes. There are no
//! digests, because nothing travels.
//!
//! The ranks exchange the same messages as those of any other engine, through queues: it needs no control plane.

mod buckets;
mod engine;
mod rank;

use async_trait::async_trait;
use engine_core::{
    Availability, Backend, Devices, EngineContext, Error, ErrorKind, Placement, PreparedRollout,
    PreparedTrainer, Result, Role, WorkerMetadata,
};

/// The transport's name in configurations.
const NAME: &str = "naive";

/// The backend, to be registered.
pub static BACKEND: &dyn Backend = &Naive;

#[derive(Debug)]
struct Naive;

#[async_trait]
impl Backend for Naive {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "trainer and rollouts in one process, without a copy"
    }

    fn devices(&self) -> Devices {
        Devices::Any
    }

    fn sends_parts(&self) -> bool {
        true
    }

    fn probe(&self) -> Availability {
        Availability::Usable { details: "always".into() }
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        engine::prepare_trainer(context)
    }

    async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
        engine::prepare_rollout(context)
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        let places = Placement::for_all(NAME, workers)?;
        let trainer = places[0].own()?;
        for place in &places[1..] {
            let peer = place.own()?;
            let message = if peer.role == Role::Trainer {
                "naive has one trainer rank"
            } else if (&peer.host, peer.pid) != (&trainer.host, trainer.pid) {
                "it is another process than the trainer's: naive stays within one, use ipc"
            } else {
                continue;
            };
            return Err(
                Error::new(ErrorKind::Mismatch, "building the topology", message).rank(place.rank)
            );
        }
        Ok(places)
    }
}
