//! The engine of a trainer.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use engine_core::control::Control;
use engine_core::memory::Pool;
use engine_core::{
    CheckpointEngine, EngineContext, Error, ErrorKind, Rank, Result, Role, SendReport,
    TensorCounts, TrainerEngine, Version, Weight, WeightStream, clock, digest,
};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use protocol::encode;
use reshard::Planner;
use tokio::sync::Mutex as Lock;

use crate::coordinator::{Coordinator, digest_of};
use crate::declared::{Declaration, Held, Table, table};
use crate::encode::{Going, Sources};
use crate::member::{Done, Member, Task};
use crate::memory::{Reach, Reached};
use crate::message::{Declared, Digest};
use crate::seat::{Seat, Worker, busy, ready};

const COLLECTING: &str = "collecting the trainer's weights";

/// A trainer that writes the boxes that it holds straight into the tensors of rollouts.
///
/// All trainers of a group call [`send_weights`](TrainerEngine::send_weights) for every update, each with the
/// [boxes](Weight::of_box) that it holds. The stream is read to its end before anything is sent. So all its weights are
/// held at the same time: they should refer to memory that exists already, not to copies.
#[derive(Debug)]
pub struct PlacedTrainer {
    seat: Seat,
    deadline: Duration,
    digests: bool,
    worker: Writer,
}

/// The plan of the last set of declarations, and what the next plan can reuse of it.
#[derive(Debug, Default)]
pub(crate) struct Plans {
    planner: Planner,
    declared: Option<(Digest, Arc<Vec<Declared>>)>,
    table: Option<Arc<Table>>,
}

impl Plans {
    /// The digest of the known set of declarations.
    pub(crate) fn known(&self) -> Option<Digest> {
        self.table.as_ref().map(|table| table.set)
    }

    pub(crate) fn table(
        &mut self,
        rank: Rank,
        set: Digest,
        declared: Option<Vec<Declared>>,
    ) -> Result<Arc<Table>> {
        if let Some(known) = self.table.as_ref().filter(|table| table.set == set) {
            return Ok(known.clone());
        }
        if let Some(declared) = declared {
            self.declared = Some((set, declared.into()));
        }
        let declared = self.declared.as_ref().filter(|(known, _)| *known == set);
        let (_, declared) = declared.ok_or_else(|| {
            let message = "the trainer takes a set of declarations for known that is not";
            Error::new(ErrorKind::Protocol, "planning", message).rank(Rank::LEADER)
        })?;
        let found = Arc::new(table(&mut self.planner, rank, set, declared)?);
        self.table = Some(found.clone());
        Ok(found)
    }
}

#[derive(Debug)]
struct Writer {
    rank: Rank,
    reach: Arc<dyn Reach>,
    pool: Pool,
    plans: Arc<Mutex<Plans>>,
    /// Held while work goes on.
    working: Arc<Lock<()>>,
    /// The weights of this update, and their declaration.
    sources: Option<Arc<Mutex<Sources>>>,
    declared: Option<(Digest, Bytes)>,
    /// The boxes in the declaration.
    last: Vec<Held>,
    table: Arc<Mutex<Option<Arc<Table>>>>,
    /// How many weights on a device the last update has encoded on the CPU.
    through_host: Arc<AtomicU64>,
}

impl PlacedTrainer {
    /// A trainer of a group with these ranks. Its control plane is in the context. Rank 0 leads the group.
    ///
    /// # Errors
    ///
    /// `Config` without a control plane; `Resource` if its threads cannot be started.
    pub fn new(
        context: &EngineContext,
        ranks: BTreeMap<Rank, Role>,
        reach: Arc<dyn Reach>,
    ) -> Result<Self> {
        let control: Arc<dyn Control> = context.require_control()?;
        let (rank, deadline) = (control.rank(), context.deadline());
        let pool = Pool::new(context.threads(Role::Trainer))?;
        let coordinator = (rank == Rank::LEADER).then(|| Coordinator::new(ranks, deadline));
        let seat = Seat::new(control, deadline, Member::new(Role::Trainer, deadline), coordinator);
        let worker = Writer {
            rank,
            reach,
            pool,
            plans: Arc::default(),
            working: Arc::default(),
            sources: None,
            declared: None,
            last: Vec::new(),
            table: Arc::default(),
            through_host: Arc::default(),
        };
        Ok(Self { seat, deadline, digests: context.config.digests, worker })
    }

    async fn collect(&self, mut weights: WeightStream<'_>) -> Result<Vec<Weight>> {
        let mut all = Vec::new();
        loop {
            // Only a weight that is not ready gets a timer: thousands of timers would take noticeable time.
            let next = match weights.next().now_or_never() {
                Some(next) => next,
                None => clock::within(self.deadline, weights.next()).await.ok_or_else(|| {
                    let message = format!("no weight within {:.1} s", self.deadline.as_secs_f64());
                    Error::new(ErrorKind::Timeout, COLLECTING, message)
                })?,
            };
            match next.transpose()? {
                None => return Ok(all),
                Some(weight) if weight.is_deferred() => {
                    let message = "scales that are computed with their weight: in placed updates rollouts say what is quantised";
                    let error = Error::new(ErrorKind::Weight, COLLECTING, message);
                    return Err(error.tensor(weight.name()));
                }
                Some(weight) => all.push(weight),
            }
        }
    }
}

#[async_trait]
impl CheckpointEngine for PlacedTrainer {
    async fn finalize(self: Box<Self>) -> Result<()> {
        Seat::idle(&self.worker.working).await;
        Ok(())
    }
}

#[async_trait]
impl TrainerEngine for PlacedTrainer {
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let begun = Instant::now();
        let collected = self.collect(weights).await.map_err(|error| error.version(version))?;
        let source = begun.elapsed();
        let mut counts = TensorCounts::default();
        collected.iter().for_each(|weight| counts.add(weight));
        self.worker.hold(collected)?;
        let result = self.seat.take_part(&mut self.worker, Some(version), self.digests).await;
        self.worker.sources = None;
        let ended = result.map_err(|error| error.version(version))?;
        let (mut receivers, mut plan_reused) = (Vec::new(), false);
        if let Some(committed) = ended.committed {
            (receivers, plan_reused) = (committed.receivers, committed.plan_reused);
            (counts.wire_bytes, counts.source_bytes) = (committed.bytes, committed.source_bytes);
            if let Some(table) = &*lock(&self.worker.table) {
                (counts.tensors, counts.converted) = (table.tensors, table.quantized);
            }
        }
        let whole = receivers.iter().filter_map(|receiver| receiver.digest);
        let digest = self.digests.then(|| whole.fold(0, digest::chain));
        if !self.digests {
            receivers.iter_mut().for_each(|receiver| receiver.digest = None);
        }
        let slower = match self.worker.through_host.load(Ordering::Relaxed) {
            0 => Vec::new(),
            count => vec![format!(
                "{count} weights on a device were encoded by the CPU: they are not where the kernels that write to the rollouts' \
                 tensors are, or there is none for what they are"
            )],
        };
        let elapsed = begun.elapsed();
        let known = source + ended.times.plan + ended.times.write;
        let mut report = SendReport::new(version);
        report.stages.source = source;
        report.stages.encode = ended.times.write;
        report.stages.publish = ended.times.plan;
        report.stages.confirm = elapsed.saturating_sub(known);
        report.counts = counts;
        report.plan_reused = plan_reused;
        report.elapsed = elapsed;
        report.digest = digest;
        report.receivers = receivers;
        report.absent = ended.absent;
        report.slower = slower;
        Ok(report)
    }
}

impl Writer {
    /// Takes the weights of the next update.
    fn hold(&mut self, weights: Vec<Weight>) -> Result<()> {
        let is_same = |(weight, held): (&Weight, &Held)| weight.is_box_of(&held.meta, &held.region);
        let same = weights.len() == self.last.len() && weights.iter().zip(&self.last).all(is_same);
        if !same || self.declared.is_none() {
            let held = |weight: &Weight| Held { meta: weight.full_meta(), region: weight.region() };
            self.last = weights.iter().map(held).collect();
            let body = encode(&Declaration::Holds(self.last.clone()))?;
            self.declared = Some((digest_of(&body), body));
        }
        self.sources = Some(Arc::new(Mutex::new(Sources::new(weights))));
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic may leave a change incomplete, but it also ends the update that the change belongs to.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker for Writer {
    fn start(&mut self, task: Task, going: Going) -> BoxFuture<'static, Result<Done>> {
        let (Some(sources), Some((digest, body))) = (self.sources.clone(), self.declared.clone())
        else {
            let error = Error::new(ErrorKind::State, "updating", "there is nothing to send");
            return ready(Err(error));
        };
        let (rank, pool, plans) = (self.rank, self.pool.clone(), self.plans.clone());
        let (working, present) = (self.working.clone(), self.table.clone());
        match task {
            Task::Prepare => async move {
                Seat::idle(&working).await;
                let known = lock(&plans).known();
                Ok(Done::Prepared { digest, body, known })
            }
            .boxed(),
            Task::Plan { set, declared } => {
                let guard = match busy(&working) {
                    Ok(guard) => guard,
                    Err(error) => return ready(Err(error)),
                };
                let (threads, reach) = (pool.clone(), self.reach.clone());
                threads
                    .start(move || {
                        let _guard = guard;
                        let table = lock(&plans).table(rank, set, declared)?;
                        let encoder = reach.encoder();
                        let maxima =
                            lock(&sources).find_maxima(rank, &table, encoder, &pool, &going)?;
                        *lock(&present) = Some(table.clone());
                        Ok(Done::Planned { plan: table.digest, terms: Bytes::new(), maxima })
                    })
                    .boxed()
            }
            Task::Write { terms, maxima, digests } => {
                let guard = match busy(&working) {
                    Ok(guard) => guard,
                    Err(error) => return ready(Err(error)),
                };
                let (reach, through_host) = (self.reach.clone(), self.through_host.clone());
                let threads = pool.clone();
                threads
                    .start(move || {
                        let _guard = guard;
                        let table = lock(&present).clone().ok_or_else(|| {
                            Error::new(ErrorKind::Protocol, "updating", "there is no plan")
                        })?;
                        let mut sources = lock(&sources);
                        sources.hear_maxima(rank, &table, &maxima)?;
                        let needed = |to: &Rank| table.pieces.iter().any(|p| p.peer == *to);
                        let terms: Vec<_> =
                            terms.into_iter().filter(|(to, _)| needed(to)).collect();
                        let reached = reach.reach(&terms)?;
                        let ranks = terms.iter().map(|(to, _)| *to);
                        let reached: HashMap<Rank, Arc<dyn Reached>> = ranks.zip(reached).collect();
                        let sent = sources.write(
                            &table,
                            &reached,
                            reach.encoder(),
                            digests,
                            &pool,
                            &going,
                        )?;
                        through_host.store(sent.through_host, Ordering::Relaxed);
                        // Let go of the rollouts' memory before the leader hears that everything is written.
                        drop(reached);
                        let source_bytes = table.source_bytes;
                        Ok(Done::Written { sums: sent.sums, source_bytes })
                    })
                    .boxed()
            }
            Task::Verify { .. } => {
                let message = "a trainer was asked to verify";
                ready(Err(Error::new(ErrorKind::Protocol, "updating", message).rank(Rank::LEADER)))
            }
        }
    }
}
