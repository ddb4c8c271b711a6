//! Drives a trainer and its rollouts through all phases of updates.

use std::pin::pin;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::channel::mpsc;
use futures::future::{Either, join, join_all, pending, select, try_join, try_join_all};

use engine_core::{
    Backend, Error, ErrorKind, Install, Placement, Prepared, PreparedTrainer, ReceiveReport,
    Result, RolloutEngine, SendReport, TrainerEngine, Version, WeightStream, WorkerMetadata,
};

/// A rollout as the manager drives it: in this process ([`LocalRollout`]), or anywhere, behind the
/// embedding program's own remote calls.
///
/// The hooks do nothing unless they are implemented.
#[async_trait]
pub trait RolloutWorker: Send {
    /// Receives a version and installs it.
    async fn update(&mut self, version: Version) -> Result<ReceiveReport>;

    /// See [`CheckpointEngine::finalize`](engine_core::CheckpointEngine::finalize).
    async fn finalize(self: Box<Self>) -> Result<()>;

    /// Before an update: finish or set aside the requests in flight.
    async fn pause(&mut self) -> Result<()> {
        Ok(())
    }

    /// After the pause: give up memory that the update needs, such as the key/value cache.
    async fn release_cache(&mut self) -> Result<()> {
        Ok(())
    }

    /// After an update, however it ended: go on, with the version if it is active. After a failed one the version before is, except on a
    /// rollout that lends its tensors: they may hold no version, as its `state` says, and then it must not serve.
    async fn resume(&mut self, active: Option<Version>) -> Result<()> {
        let _ = active;
        Ok(())
    }
}

/// A rollout that has not joined its group. For a rollout of this process, [`Prepared::map`] makes one; for a rollout
/// behind remote calls, [`Prepared::new`] does, from its metadata and the call that joins it.
pub type PreparedWorker = Prepared<Box<dyn RolloutWorker>>;

/// A rollout of this process: an engine, and where the weights go.
#[derive(Debug)]
pub struct LocalRollout<D> {
    engine: Box<dyn RolloutEngine>,
    destination: D,
}

impl<D: Install> LocalRollout<D> {
    /// A rollout that installs into a destination.
    pub fn new(engine: Box<dyn RolloutEngine>, destination: D) -> Self {
        Self { engine, destination }
    }

    /// Where the weights are.
    pub fn destination(&self) -> &D {
        &self.destination
    }
}

#[async_trait]
impl<D: Install> RolloutWorker for LocalRollout<D> {
    async fn update(&mut self, version: Version) -> Result<ReceiveReport> {
        let received = self.engine.receive_weights(Some(version)).await?;
        received.install(&mut self.destination).await
    }

    async fn finalize(self: Box<Self>) -> Result<()> {
        self.engine.finalize().await
    }
}

/// A rollout that lends its tensors: trainers write into them, and nothing is left to install.
#[cfg(feature = "placed")]
#[async_trait]
impl RolloutWorker for placed::PlacedRollout {
    async fn update(&mut self, version: Version) -> Result<ReceiveReport> {
        Self::update(self, Some(version)).await
    }

    async fn finalize(self: Box<Self>) -> Result<()> {
        Self::finalize(*self).await
    }
}

/// A rollout that failed may never have entered the update: the trainer would wait for it to its deadline. It has this long to
/// fail by itself, since its error names the cause.
const GRACE: Duration = Duration::from_secs(1);

/// A trainer and its rollouts, driven together.
pub struct CheckpointEngineManager {
    trainer: Box<dyn TrainerEngine>,
    rollouts: Vec<Box<dyn RolloutWorker>>,
    /// Whether an update has paused rollouts and not resumed them.
    paused: bool,
}

impl CheckpointEngineManager {
    /// Builds the topology of a trainer and its rollouts, and joins all of them to the group.
    ///
    /// # Errors
    ///
    /// Those of [`Backend::build_topology`]; the trainer's, or the first rollout's that fails.
    pub async fn form(
        backend: &dyn Backend,
        trainer: PreparedTrainer,
        rollouts: Vec<PreparedWorker>,
    ) -> Result<Self> {
        let all =
            std::iter::once(trainer.metadata()).chain(rollouts.iter().map(Prepared::metadata));
        let workers: Vec<WorkerMetadata> = all.cloned().collect();
        let places = backend.build_topology(&workers)?;
        let place =
            |worker: &WorkerMetadata| Placement::of_rank(places.iter().cloned(), worker.rank);
        let own = place(trainer.metadata())?;
        let rollouts = rollouts.into_iter().map(|rollout| {
            let place = place(rollout.metadata());
            async move { rollout.join(place?).await }
        });
        let (trainer, rollouts) = try_join(trainer.join(own), try_join_all(rollouts)).await?;
        Ok(Self { trainer, rollouts, paused: false })
    }

    /// Runs one update: pauses all rollouts, frees their caches, sends, installs, and resumes them even after a
    /// failure.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future aborts the update on every rank. Rollouts that it has paused stay so until
    /// [`resume`](Self::resume), which the next update and [`finalize`](Self::finalize) begin with.
    ///
    /// # Errors
    ///
    /// The trainer's error if it has one within a second of a rollout's, since it names the cause; else the first of a
    /// rollout, and the update is aborted on every rank.
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
    /// The error of the first rollout that fails; all others are resumed nevertheless.
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
        let (failures, mut failed) = mpsc::unbounded();
        let receive = join_all(self.rollouts.iter_mut().enumerate().map(|(index, rollout)| {
            let failures = failures.clone();
            async move {
                let received = rollout.update(version).await;
                if received.is_err() {
                    // Nobody hears of it where another one was the first, or the trainer has ended.
                    drop(failures.unbounded_send(index));
                }
                received
            }
        }));
        drop(failures);
        let mut first = None;
        let give_up = async {
            first = failed.next().await;
            match first {
                Some(_) => engine_core::clock::sleep(GRACE).await,
                None => pending().await,
            }
        };
        let send = self.trainer.send_weights(weights, version);
        let send = async {
            match select(send, pin!(give_up)).await {
                Either::Left((sent, _)) => Some(sent),
                Either::Right(_) => None,
            }
        };
        let (sent, mut received) = join(send, receive).await;
        let sent = sent.transpose()?;
        // What others failed with after it may be what came of it.
        if let Some(first) = first {
            received.swap(0, first);
        }
        let received = received.into_iter().collect::<Result<_>>()?;
        let given_up = || Error::new(ErrorKind::State, "updating rollouts", "it was given up");
        Ok((sent.ok_or_else(given_up)?, received))
    }

    /// Ends every worker's part in the group.
    ///
    /// # Errors
    ///
    /// The first failure; all workers are finalized nevertheless.
    pub async fn finalize(mut self) -> Result<()> {
        let resumed = self.resume().await;
        let trainer = self.trainer.finalize().await;
        let rollouts = self.rollouts.into_iter().map(|rollout| rollout.finalize());
        let rollouts = join_all(rollouts).await;
        trainer?;
        resumed?;
        rollouts.into_iter().collect()
    }
}

impl std::fmt::Debug for CheckpointEngineManager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckpointEngineManager")
            .field("trainer", &self.trainer)
            .field("rollouts", &self.rollouts.len())
            .finish_non_exhaustive()
    }
}
