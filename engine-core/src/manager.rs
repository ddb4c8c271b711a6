//! Drives all phases for a whole set of workers.

use async_trait::async_trait;
use futures::future::{join, join_all, try_join_all};

use crate::{
    Backend, CheckpointEngine, Install, Placement, ReceiveReport, Result, SendReport, Version,
    WeightStream, WorkerMetadata,
};

/// A rollout as the manager drives it: in this process ([`LocalRollout`]), or anywhere, behind the
/// embedding program's own remote calls.
///
/// The hooks do nothing unless they are implemented.
#[async_trait]
pub trait RolloutWorker: Send {
    /// See [`CheckpointEngine::prepare`].
    async fn prepare(&mut self) -> Result<WorkerMetadata>;

    /// See [`CheckpointEngine::init_process_group`].
    async fn init_process_group(&mut self, place: Placement) -> Result<()>;

    /// Receives a version and installs it.
    async fn update(&mut self, version: Version) -> Result<ReceiveReport>;

    /// See [`CheckpointEngine::finalize`].
    async fn finalize(&mut self) -> Result<()>;

    /// Before an update: finish or set aside the requests in flight.
    async fn pause(&mut self) -> Result<()> {
        Ok(())
    }

    /// After the pause: give up memory that the update needs, such as the key/value cache.
    async fn release_cache(&mut self) -> Result<()> {
        Ok(())
    }

    /// After an update, however it ended: go on, with the version if it is active.
    async fn resume(&mut self, active: Option<Version>) -> Result<()> {
        let _ = active;
        Ok(())
    }
}

/// A rollout of this process: an engine, and where the weights go.
#[derive(Debug)]
pub struct LocalRollout<D> {
    engine: Box<dyn CheckpointEngine>,
    destination: D,
}

impl<D: Install> LocalRollout<D> {
    /// A rollout that installs into a destination.
    pub fn new(engine: Box<dyn CheckpointEngine>, destination: D) -> Self {
        Self { engine, destination }
    }

    /// Where the weights are.
    pub fn destination(&self) -> &D {
        &self.destination
    }
}

#[async_trait]
impl<D: Install> RolloutWorker for LocalRollout<D> {
    async fn prepare(&mut self) -> Result<WorkerMetadata> {
        self.engine.prepare().await
    }

    async fn init_process_group(&mut self, place: Placement) -> Result<()> {
        self.engine.init_process_group(place).await
    }

    async fn update(&mut self, version: Version) -> Result<ReceiveReport> {
        let received = self.engine.receive_weights(Some(version)).await?;
        received.install(&mut self.destination).await
    }

    async fn finalize(&mut self) -> Result<()> {
        self.engine.finalize().await
    }
}

/// A trainer and its rollouts, driven through all phases together.
pub struct CheckpointEngineManager<'a> {
    backend: &'static dyn Backend,
    trainer: Box<dyn CheckpointEngine>,
    rollouts: Vec<Box<dyn RolloutWorker + 'a>>,
    /// Whether an update has paused rollouts and not resumed them.
    paused: bool,
}

impl<'a> CheckpointEngineManager<'a> {
    /// A manager of one trainer and its rollouts, which have the ranks of their engines.
    pub fn new(
        backend: &'static dyn Backend,
        trainer: Box<dyn CheckpointEngine>,
        rollouts: Vec<Box<dyn RolloutWorker + 'a>>,
    ) -> Self {
        Self { backend, trainer, rollouts, paused: false }
    }

    /// Prepares every worker, builds the topology, and forms the group.
    ///
    /// # Errors
    ///
    /// The first worker's that fails.
    pub async fn init(&mut self) -> Result<()> {
        let mut metadata = vec![self.trainer.prepare().await?];
        metadata.extend(try_join_all(self.rollouts.iter_mut().map(|r| r.prepare())).await?);
        let places = self.backend.build_topology(&metadata)?;
        let place =
            |worker: &WorkerMetadata| Placement::of_rank(places.iter().cloned(), worker.rank);
        let trainer = self.trainer.init_process_group(place(&metadata[0])?);
        let rollouts = self.rollouts.iter_mut().zip(&metadata[1..]).map(|(rollout, worker)| {
            let place = place(worker);
            async move { rollout.init_process_group(place?).await }
        });
        let (trainer, rollouts) = join(trainer, join_all(rollouts)).await;
        trainer?;
        rollouts.into_iter().collect()
    }

    /// Runs one update: pauses all rollouts, frees their caches, sends, installs, and resumes them
    /// whatever happened.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future aborts the update on every rank. Rollouts that it has paused stay so until
    /// [`resume`](Self::resume), which the next update and [`finalize`](Self::finalize) begin with.
    ///
    /// # Errors
    ///
    /// The trainer's error if it has one, since it names the cause; else the first of a rollout.
    pub async fn update_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<(SendReport, Vec<ReceiveReport>)> {
        self.resume().await?;
        self.paused = true;
        let result = self.run(weights, version).await;
        let resumed = self.resume_with(result.as_ref().ok().map(|_| version)).await;
        let result = result?;
        resumed?;
        Ok(result)
    }

    /// Resumes the rollouts that an update has paused whose future was dropped, with the version that they
    /// had before it; does nothing otherwise.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves rollouts paused; call it again.
    ///
    /// # Errors
    ///
    /// The first rollout's that fails; all others are resumed all the same.
    pub async fn resume(&mut self) -> Result<()> {
        if self.paused { self.resume_with(None).await } else { Ok(()) }
    }

    async fn resume_with(&mut self, active: Option<Version>) -> Result<()> {
        let resumed = join_all(self.rollouts.iter_mut().map(|r| r.resume(active))).await;
        self.paused = false;
        resumed.into_iter().collect()
    }

    async fn run(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<(SendReport, Vec<ReceiveReport>)> {
        try_join_all(self.rollouts.iter_mut().map(|rollout| rollout.pause())).await?;
        try_join_all(self.rollouts.iter_mut().map(|rollout| rollout.release_cache())).await?;
        let receive = join_all(self.rollouts.iter_mut().map(|rollout| rollout.update(version)));
        let (sent, received) = join(self.trainer.send_weights(weights, version), receive).await;
        Ok((sent?, received.into_iter().collect::<Result<_>>()?))
    }

    /// Ends every worker's part in the group.
    ///
    /// # Errors
    ///
    /// The first failure; all workers are finalized all the same.
    pub async fn finalize(&mut self) -> Result<()> {
        let resumed = self.resume().await;
        let trainer = self.trainer.finalize().await;
        let rollouts = join_all(self.rollouts.iter_mut().map(|rollout| rollout.finalize())).await;
        trainer?;
        resumed?;
        rollouts.into_iter().collect()
    }
}

impl std::fmt::Debug for CheckpointEngineManager<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckpointEngineManager")
            .field("backend", &self.backend)
            .field("rollouts", &self.rollouts.len())
            .finish_non_exhaustive()
    }
}
