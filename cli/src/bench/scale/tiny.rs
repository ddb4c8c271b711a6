//! A transport on which nothing travels.

use async_trait::async_trait;
use checkpoint_engine::backend::memory::{Job, Pool};
use checkpoint_engine::backend::protocol::{ReceiveLink, Receiver, SendLink, Sender};
use checkpoint_engine::backend::{
    Availability, Backend, EngineContext, Prepared, PreparedRollout, PreparedTrainer, Storage,
};
use checkpoint_engine::{
    Placement, Rank, Result, Role, RolloutEngine, TrainerEngine, WorkerMetadata,
};

/// Its name in configurations.
pub(super) const NAME: &str = "tiny";

/// Two buckets of the trainer's memory, which rollouts do not see: they read zeros.
#[derive(Debug)]
pub(super) struct Tiny {
    pub(super) bucket_bytes: u64,
    /// Shared by all ranks of the process.
    pub(super) pool: Pool,
}

#[derive(Debug)]
struct Outgoing {
    bucket_bytes: u64,
    /// One is enough where nobody reads it.
    bucket: Vec<u8>,
    pool: Pool,
}

#[async_trait]
impl SendLink for Outgoing {
    fn slots(&self) -> usize {
        2
    }

    fn bucket_bytes(&self) -> u64 {
        self.bucket_bytes
    }

    async fn fill(&mut self, _: usize, jobs: Vec<Job>, digests: bool) -> Result<u64> {
        let mut bucket = std::mem::take(&mut self.bucket);
        bucket.resize(self.bucket_bytes as usize, 0);
        let pool = self.pool.clone();
        let work = move || Ok((pool.encode(&jobs, &mut bucket, digests)?, bucket));
        let (sum, bucket) = self.pool.start(work).await?;
        self.bucket = bucket;
        Ok(sum)
    }

    async fn publish(&mut self, _: usize, _: u64) -> Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct Incoming;

#[async_trait]
impl ReceiveLink for Incoming {
    async fn fetch(&mut self, _: u32, filled: u64) -> Result<Storage> {
        // Memory of zeros that nobody reads is not there.
        Ok(vec![0; filled as usize].into())
    }
}

#[async_trait]
impl Backend for Tiny {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "a transport on which nothing travels, to measure what else an update costs"
    }

    fn probe(&self) -> Availability {
        Availability::Usable { details: "always".into() }
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        let control = context.require_control()?;
        let (rank, nothing) = (control.rank(), serde_json::Value::Null);
        let metadata = WorkerMetadata::of_this_process(NAME, rank, Role::Trainer, nothing);
        let (bucket_bytes, pool) = (self.bucket_bytes, self.pool.clone());
        Ok(Prepared::new(metadata, move |place: Placement| async move {
            let link = Outgoing { bucket_bytes, bucket: Vec::new(), pool };
            let engine = Sender::new(link, &context, control, place.rollouts());
            Ok(Box::new(engine) as Box<dyn TrainerEngine>)
        }))
    }

    async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
        let control = context.require_control()?;
        let (rank, nothing) = (control.rank(), serde_json::Value::Null);
        let metadata = WorkerMetadata::of_this_process(NAME, rank, Role::Rollout, nothing);
        let pool = self.pool.clone();
        Ok(Prepared::new(metadata, move |place: Placement| async move {
            place.peer(Rank::LEADER)?;
            let engine = Receiver::new(Incoming, &context, control, pool);
            Ok(Box::new(engine) as Box<dyn RolloutEngine>)
        }))
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        Placement::for_all(NAME, workers)
    }
}
