//! A trainer and its rollouts, as tasks of one process.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use control_plane::{ControlConfig, ControlPlane, Token};
use engine_core::observe::{Observer, Progress};
use engine_core::{
    ArenaArc, CheckpointEngine, DType, EngineContext, Error, Rank, Result, Role, RolloutEngine,
    SendReport, TensorMeta, TrainerEngine, Version, VersionState, Weight, WeightStream,
    ensure_async_iterator, form_local_group,
};
use futures::StreamExt;
use futures::future::{BoxFuture, Either, join_all, select};

use crate::{Place, Suite};

pub(crate) struct Group {
    suite: Suite,
    pub(crate) trainer: Box<dyn TrainerEngine>,
    pub(crate) rollouts: Vec<Box<dyn RolloutEngine>>,
    /// The ranks of the group, those of trainers first.
    ranks: Vec<Rank>,
    pub(crate) controls: Vec<ControlPlane>,
    /// Where further ranks join, if the suite has control planes.
    pub(crate) at: Option<ControlConfig>,
    /// The ranks whose confirmation the trainer has received, in order.
    pub(crate) ready: Arc<Ready>,
}

/// Records the ranks that are ready.
#[derive(Debug, Default)]
pub(crate) struct Ready(Mutex<Vec<Rank>>);

impl Ready {
    pub(crate) fn has(&self, rank: Rank) -> bool {
        self.0.lock().expect("no panic").contains(&rank)
    }
}

impl Observer for Ready {
    fn observe(&self, progress: &Progress) {
        if let Progress::State { rank, state: VersionState::Ready } = progress {
            self.0.lock().expect("no panic").push(*rank);
        }
    }
}

/// A trainer's engine whose weights are moved before they are sent.
#[derive(Debug)]
struct Placed {
    engine: Box<dyn TrainerEngine>,
    place: Place,
}

#[async_trait]
impl CheckpointEngine for Placed {
    async fn finalize(self: Box<Self>) -> Result<()> {
        self.engine.finalize().await
    }
}

#[async_trait]
impl TrainerEngine for Placed {
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        self.engine.send_weights(placed(weights, self.place), version).await
    }

    async fn send_part(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        self.engine.send_part(placed(weights, self.place), version).await
    }

    async fn attest(&mut self) -> Result<SendReport> {
        self.engine.attest().await
    }
}

fn placed(weights: WeightStream<'_>, place: Place) -> WeightStream<'_> {
    WeightStream::new(weights.map(move |weight| {
        let weight = weight?;
        let (full, region) = (weight.full_meta().shape.clone(), weight.region());
        place(weight)?.of_box(full, region)
    }))
}

/// The engines of all trainers as one. Each gets the same weights. The result is the leader's.
#[derive(Debug)]
struct Trainers {
    leader: Box<dyn TrainerEngine>,
    others: Vec<Box<dyn TrainerEngine>>,
}

#[async_trait]
impl CheckpointEngine for Trainers {
    async fn finalize(self: Box<Self>) -> Result<()> {
        for other in self.others {
            // If the leader fails, so do these.
            drop(other.finalize().await);
        }
        self.leader.finalize().await
    }
}

/// What all trainers do in an update.
type Send = for<'a> fn(
    &'a mut dyn TrainerEngine,
    WeightStream<'a>,
    Version,
) -> BoxFuture<'a, Result<SendReport>>;

impl Trainers {
    async fn all(
        &mut self,
        mut weights: WeightStream<'_>,
        version: Version,
        send: Send,
    ) -> Result<SendReport> {
        let (feeds, streams): (Vec<_>, Vec<_>) = (0..=self.others.len())
            .map(|_| futures::channel::mpsc::unbounded::<Result<Weight>>())
            .unzip();
        let feed = async move {
            while let Some(weight) = weights.next().await {
                for feed in &feeds {
                    let weight = match &weight {
                        Ok(weight) => Ok(weight.clone()),
                        Err(error) => Err(error.report().clone().into()),
                    };
                    // A trainer that has given up takes no more weights.
                    drop(feed.unbounded_send(weight));
                }
            }
        };
        let engines = std::iter::once(&mut self.leader).chain(&mut self.others);
        let sends = engines
            .zip(streams)
            .map(|(engine, stream)| send(&mut **engine, ensure_async_iterator(stream), version));
        let sends = futures::future::join_all(sends);
        let mut reports = match futures::future::select(Box::pin(feed), sends).await {
            futures::future::Either::Left(((), sends)) => sends.await,
            futures::future::Either::Right((reports, _)) => reports,
        };
        let others = reports.split_off(1);
        let leader = reports.pop().expect("the leader's report");
        let leader = match leader {
            Err(error) if others.iter().any(Result::is_ok) => {
                let message = format!("a trainer reports success where the leader says: {error}");
                return Err(Error::new(engine_core::ErrorKind::State, "comparing", message));
            }
            leader => leader?,
        };
        for other in others {
            let other = other?;
            if other.counts != leader.counts {
                let message = format!("a trainer counted {:?}", other.counts);
                return Err(Error::new(engine_core::ErrorKind::Mismatch, "comparing", message));
            }
        }
        Ok(leader)
    }
}

#[async_trait]
impl TrainerEngine for Trainers {
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        self.all(weights, version, |engine, stream, version| engine.send_weights(stream, version))
            .await
    }

    async fn send_part(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        self.all(weights, version, |engine, stream, version| engine.send_part(stream, version))
            .await
    }

    async fn attest(&mut self) -> Result<SendReport> {
        self.leader.attest().await
    }
}

/// A received tensor.
pub(crate) type Received = (ArenaArc<TensorMeta>, Vec<u8>);

impl Group {
    pub(crate) async fn form(suite: &Suite, rollouts: u32) -> Result<Self> {
        let trainers = suite.trainers;
        static GROUPS: AtomicU32 = AtomicU32::new(0);
        let (mut controls, mut at) = (Vec::new(), None);
        if suite.control {
            let number = GROUPS.fetch_add(1, Ordering::Relaxed);
            let address = format!("unix:@conformance-{}-{number}", std::process::id());
            let config = ControlConfig::new(address.parse()?, Token::generate()?);
            controls.push(ControlPlane::lead(config.clone()).await?);
            for rank in 1..trainers + rollouts {
                let role = if rank < trainers { Role::Trainer } else { Role::Rollout };
                controls.push(ControlPlane::join(config.clone(), role, Some(Rank(rank))).await?);
            }
            at = Some(config);
        }
        Self::on(suite, (0..trainers + rollouts).map(Rank).collect(), controls, at).await
    }

    /// Ends the engines and forms the group again, over the same control planes.
    pub(crate) async fn anew(self) -> Result<Self> {
        let Self { suite, trainer, rollouts, ranks, controls, at, .. } = self;
        Self::end(trainer, rollouts).await?;
        Self::on(&suite, ranks, controls, at).await
    }

    /// Ends the engines, makes a rollout leave, and forms the group again from all others, over the same control planes.
    pub(crate) async fn without(self, rollout: u32) -> Result<Self> {
        let index = (self.suite.trainers + rollout) as usize;
        let Self { suite, trainer, rollouts, mut ranks, mut controls, at, .. } = self;
        Self::end(trainer, rollouts).await?;
        ranks.remove(index);
        if suite.control {
            controls.remove(index).close().await?;
        }
        Self::on(&suite, ranks, controls, at).await
    }

    async fn end(
        trainer: Box<dyn TrainerEngine>,
        rollouts: Vec<Box<dyn RolloutEngine>>,
    ) -> Result<()> {
        trainer.finalize().await?;
        for rollout in rollouts {
            rollout.finalize().await?;
        }
        Ok(())
    }

    /// Forms a group of these ranks, over their control planes if the suite has any.
    async fn on(
        suite: &Suite,
        ranks: Vec<Rank>,
        controls: Vec<ControlPlane>,
        at: Option<ControlConfig>,
    ) -> Result<Self> {
        let trainers = suite.trainers as usize;
        let ready = Arc::new(Ready::default());
        let (mut leading, mut receiving) = (Vec::new(), Vec::new());
        for (index, rank) in ranks.iter().enumerate() {
            let mut context = EngineContext::new(suite.config_of(rank.0)).with_rank(*rank);
            context.control = controls.get(index).cloned().map(Into::into);
            context.memory = suite.memory;
            if index == 0 {
                context = context.with_observer(ready.clone());
            }
            if index >= trainers {
                let mut prepared = suite.backend.prepare_rollout(context.clone()).await?;
                if let Some(layered) = suite.layer {
                    prepared = (layered.layer.rollout)(prepared, &context)?;
                }
                receiving.push(prepared);
                continue;
            }
            let mut prepared = suite.backend.prepare_trainer(context.clone()).await?;
            if let Some(layered) = suite.layer {
                prepared = (layered.layer.trainer)(prepared, &context)?;
            }
            if let Some(place) = suite.place {
                prepared = prepared.map(move |engine| Box::new(Placed { engine, place }) as Box<_>);
            }
            leading.push(prepared);
        }
        if suite.control {
            let (world, deadline) = (ranks.len() as u32, Duration::from_secs(10));
            let gather =
                controls.iter().map(|control| control.gather(world, Bytes::new(), deadline));
            futures::future::try_join_all(gather).await?;
        }
        let (mut trainers, rollouts) = form_local_group(suite.backend, leading, receiving).await?;
        let mut trainer = trainers.remove(0);
        if !trainers.is_empty() {
            trainer = Box::new(Trainers { leader: trainer, others: trainers });
        }
        Ok(Self { suite: suite.clone(), trainer, rollouts, ranks, controls, at, ready })
    }

    /// The rank of a rollout.
    pub(crate) fn rank_of(&self, rollout: u32) -> Rank {
        self.ranks[(self.suite.trainers + rollout) as usize]
    }

    /// Makes one update. Returns the result of each rank.
    pub(crate) async fn update(
        &mut self,
        weights: Vec<Weight>,
        version: u64,
    ) -> (Result<SendReport>, Vec<Result<Vec<Received>>>) {
        let send = self.trainer.send_weights(ensure_async_iterator(weights), Version(version));
        let receive = self.rollouts.iter_mut().map(|rollout| collect(&mut **rollout, version));
        futures::future::join(send, futures::future::join_all(receive)).await
    }

    /// Attests the last version. Returns the trainer's report, and what each rollout received.
    ///
    /// # Errors
    ///
    /// The trainer's. Rollouts that wait for an update go on without one.
    pub(crate) async fn attest(
        &mut self,
        version: u64,
    ) -> Result<(SendReport, Vec<Result<Vec<Received>>>)> {
        let attest = self.trainer.attest();
        beside(attest, &mut self.rollouts, version).await
    }

    /// Sends a part of a version. Returns the trainer's report, and what each rollout received.
    ///
    /// # Errors
    ///
    /// As [`attest`](Self::attest).
    pub(crate) async fn send_part(
        &mut self,
        weights: Vec<Weight>,
        version: u64,
    ) -> Result<(SendReport, Vec<Result<Vec<Received>>>)> {
        let send = self.trainer.send_part(ensure_async_iterator(weights), Version(version));
        beside(send, &mut self.rollouts, version).await
    }

    /// What every rollout must get for these weights.
    pub(crate) fn expected(&self, weights: Vec<Weight>) -> Result<Vec<Received>, String> {
        let expected = self.suite.expected(weights);
        let expected =
            expected.iter().map(|weight| Ok((weight.meta().clone(), weight.to_bytes()?.to_vec())));
        expected.collect::<Result<_>>().map_err(words)
    }

    /// Makes an update that must succeed and bring every rollout exactly these weights.
    pub(crate) async fn exact(
        &mut self,
        weights: Vec<Weight>,
        version: u64,
    ) -> Result<SendReport, String> {
        let expected = self.expected(weights.clone())?;
        let (sent, received) = self.update(weights, version).await;
        let report = sent.map_err(words)?;
        for (rollout, received) in (0..).zip(received) {
            let rank = self.rank_of(rollout);
            compare(&expected, &received.map_err(words)?)
                .map_err(|w| format!("rank {rank}: {w}"))?;
        }
        if report.receivers.len() != self.rollouts.len() {
            return Err(format!("the report has {} receivers", report.receivers.len()));
        }
        Ok(report)
    }
}

/// Runs what the trainer does beside the rollouts. If it fails, these wait for an update that may never begin.
async fn beside(
    sending: BoxFuture<'_, Result<SendReport>>,
    rollouts: &mut [Box<dyn RolloutEngine>],
    version: u64,
) -> Result<(SendReport, Vec<Result<Vec<Received>>>)> {
    let receive = rollouts.iter_mut().map(|rollout| collect(&mut **rollout, version));
    match select(sending, join_all(receive)).await {
        Either::Left((sent, receiving)) => Ok((sent?, receiving.await)),
        Either::Right((received, sending)) => Ok((sending.await?, received)),
    }
}

pub(crate) fn compare(expected: &[Received], received: &[Received]) -> Result<(), String> {
    for (index, (sent, got)) in expected.iter().zip(received).enumerate() {
        if sent.0 != got.0 {
            return Err(format!("tensor {index} is {:?}, {:?} was sent", got.0, sent.0));
        }
        if sent.1 != got.1 {
            return Err(format!("`{}` has other bytes than were sent", sent.0.name));
        }
    }
    if expected.len() == received.len() {
        return Ok(());
    }
    Err(format!("{} tensors arrived, {} were sent", received.len(), expected.len()))
}

pub(crate) async fn collect(engine: &mut dyn RolloutEngine, version: u64) -> Result<Vec<Received>> {
    let mut received = engine.receive_weights(Some(Version(version))).await?;
    let mut tensors = Vec::new();
    while let Some(tensor) = received.next_tensor().await? {
        tensors.push((tensor.meta().clone(), tensor.to_bytes()?.to_vec()));
    }
    Ok(tensors)
}

pub(crate) fn words(error: Error) -> String {
    error.to_string()
}

/// A tensor whose bytes depend on its name, their position and the seed.
pub(crate) fn weight(name: &str, dtype: DType, shape: &[u64], seed: u64) -> Weight {
    let meta = TensorMeta::new(name, dtype, shape);
    let len = meta.byte_len().expect("a small tensor");
    let start = name.bytes().fold(seed, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let bytes: Vec<u8> = (0..len)
        .map(|at| (start.wrapping_add(at).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect();
    Weight::from_meta(meta, bytes).expect("a small tensor")
}

/// A matrix of finite floating-point numbers, which can be quantised.
pub(crate) fn floats(name: &str, dtype: DType, shape: &[u64], seed: u64) -> Weight {
    let bytes = weight(name, dtype, shape, seed).to_bytes().expect("a small tensor");
    let size = dtype.bytes().expect("whole bytes") as usize;
    let mut bytes = bytes.to_vec();
    // A bit of the exponent is cleared, so no number is infinite.
    bytes.iter_mut().skip(size - 1).step_by(size).for_each(|byte| *byte &= 0xbf);
    Weight::new(name, dtype, shape, bytes).expect("a small tensor")
}

/// A model of some layers, with all kinds of shapes. A part of it is quantised if quantisation is on.
pub(crate) fn model(layers: u64, seed: u64) -> Vec<Weight> {
    let mut weights = vec![weight("embed", DType::BF16, &[1000, 64], seed)];
    for layer in 0..layers {
        let name = |part: &str| -> Arc<str> { format!("layers.{layer}.{part}").into() };
        weights.push(weight(&name("norm"), DType::F32, &[65], seed));
        weights.push(floats(&name("up_proj.weight"), DType::BF16, &[129, 300], seed));
        weights.push(weight(&name("codes.weight"), DType::F8_E4M3, &[3, 7], seed));
        weights.push(weight(&name("codes.weight_scale_inv"), DType::F32, &[1, 1], seed));
        weights.push(floats(&name("down_proj.weight"), DType::F32, &[300, 129], seed));
    }
    weights
}
