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
    TensorCounts, TrainerEngine, Version, Weight, WeightStream, digest, no_copies,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use protocol::encode;
use reshard::Planner;
use tokio::sync::Mutex as Lock;

use crate::arriving::{Arriving, Came, Waits};
use crate::coordinator::{Coordinator, digest_of};
use crate::declared::{Declaration, Held, Table, planned, table};
use crate::encode::{Going, Sending, Sources};
use crate::member::{Done, Member, Task};
use crate::memory::{Reach, Reached};
use crate::message::{Declared, Digest};
use crate::seat::{Seat, Worker, busy, ready};

/// A trainer that writes the boxes that it holds straight into the tensors of rollouts.
///
/// All trainers of a group call [`send_weights`](TrainerEngine::send_weights) for every update, each with the
/// [boxes](Weight::of_box) that it holds. Its weights are held until the update ends: they should refer to memory that exists already, not to
/// copies. In the first update the stream is read to its end before anything is written. Later, if it begins as that of the last update, the
/// trainer takes its boxes for those of the last update, and writes while it is read. If they turn out to be others, all ranks plan again.
#[derive(Debug)]
pub struct PlacedTrainer {
    seat: Seat,
    deadline: Duration,
    digests: bool,
    worker: Writer,
}

/// What a trainer declared last.
#[derive(Debug)]
struct Known {
    boxes: Arc<[Held]>,
    declared: Option<(Digest, Bytes)>,
}

impl Known {
    /// Declares weights, which are `same` as the known boxes or others.
    fn declare(&mut self, weights: &[Weight], same: bool) -> Result<(Digest, Bytes)> {
        if let Some(declared) = self.declared.as_ref().filter(|_| same) {
            return Ok(declared.clone());
        }
        let held = |weight: &Weight| Held { meta: weight.full_meta(), region: weight.region() };
        let boxes: Vec<Held> = weights.iter().map(held).collect();
        let body = encode(&Declaration::Holds(boxes.clone()))?;
        let declared = (digest_of(&body), body);
        (self.boxes, self.declared) = (boxes.into(), Some(declared.clone()));
        Ok(declared)
    }
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
    declared: Arc<Mutex<Known>>,
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
        let seat =
            Seat::new(control, deadline, Member::new(rank, Role::Trainer, deadline), coordinator);
        let worker = Writer {
            rank,
            reach,
            pool,
            plans: Arc::default(),
            working: Arc::default(),
            sources: None,
            declared: Arc::new(Mutex::new(Known { boxes: [].into(), declared: None })),
            table: Arc::default(),
            through_host: Arc::default(),
        };
        Ok(Self { seat, deadline, digests: context.config.digests, worker })
    }
}

#[async_trait]
impl CheckpointEngine for PlacedTrainer {
    async fn finalize(self: Box<Self>) -> Result<()> {
        Seat::idle(&self.worker.working).await;
        self.worker.reach.close().await;
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
        let expected = lock(&self.worker.declared).boxes.clone();
        let arriving = Arc::new(Arriving::new(expected));
        let sources = Arc::new(Mutex::new(Sources::new(arriving.clone())));
        self.worker.sources = Some(sources.clone());
        let mut reading = std::pin::pin!(arriving.read(weights, self.deadline));
        let result = self
            .seat
            .take_part(&mut self.worker, Some(version), self.digests, reading.as_mut())
            .await;
        self.worker.sources = None;
        let ended = result.map_err(|error| error.version(version))?;
        let mut counts = TensorCounts::default();
        lock(&sources).weights().iter().for_each(|weight| counts.add(weight));
        let (mut receivers, mut plan_reused, mut slower) = (Vec::new(), false, Vec::new());
        if let Some(committed) = ended.committed {
            (receivers, plan_reused) = (committed.receivers, committed.plan_reused);
            slower = committed.slower;
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
        let through_host = self.worker.through_host.load(Ordering::Relaxed);
        if through_host > 0 {
            slower.push(format!(
                "{through_host} weights on a device were encoded by the CPU: they are not where the kernels that write to the rollouts' \
                 tensors are, or there is none for what they are"
            ));
        }
        let elapsed = begun.elapsed();
        // The work that waited for weights counts as that of their source.
        let [source, planning, writing] = arriving.waited();
        let (plan, write) =
            (ended.times.plan.saturating_sub(planning), ended.times.write.saturating_sub(writing));
        let source = source + planning + writing;
        let known = source + plan + write;
        let mut report = SendReport::new(version);
        report.stages.source = source;
        report.stages.encode = write;
        report.stages.publish = plan;
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

    async fn send_part(&mut self, _: WeightStream<'_>, _: Version) -> Result<SendReport> {
        Err(no_copies("sending a part of a version"))
    }

    async fn attest(&mut self) -> Result<SendReport> {
        Err(no_copies("attesting a version"))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic may leave a change incomplete, but it also ends the update that the change belongs to.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker for Writer {
    fn start(&mut self, task: Task, going: Going) -> BoxFuture<'static, Result<Done>> {
        let Some(sources) = self.sources.clone() else {
            let error = Error::new(ErrorKind::State, "updating", "there is nothing to send");
            return ready(Err(error));
        };
        let (rank, pool, plans) = (self.rank, self.pool.clone(), self.plans.clone());
        let (working, present) = (self.working.clone(), self.table.clone());
        match task {
            Task::Prepare { sure } => {
                let declared = self.declared.clone();
                async move {
                    Seat::idle(&working).await;
                    let guard = busy(&working)?;
                    let work = pool.start(move || {
                        let _guard = guard;
                        let mut sources = lock(&sources);
                        let guess = lock(&declared).declared.clone();
                        sources.guessed = !sure && guess.is_some() && sources.begins(&going)?;
                        if let Some((digest, body)) = guess.filter(|_| sources.guessed) {
                            return Ok((digest, body, true));
                        }
                        let (weights, came) = sources.all(Waits::Before, &going)?;
                        let (digest, body) = lock(&declared).declare(weights, came == Came::All)?;
                        Ok((digest, body, false))
                    });
                    let (digest, body, guessed) = work.await?;
                    let known = lock(&plans).known();
                    Ok(Done::Prepared { digest, body, known, guessed })
                }
                .boxed()
            }
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
                        let Some(maxima) = maxima else {
                            return Ok(Done::Differs { wrote: false });
                        };
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
                        let table = planned(&present)?;
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
                        match sent {
                            Sending::Sent { through_host: count } => {
                                through_host.store(count, Ordering::Relaxed);
                            }
                            Sending::Differs { wrote } => return Ok(Done::Differs { wrote }),
                        }
                        // Let go of the rollouts' memory before the leader hears that everything is written.
                        drop(reached);
                        let source_bytes = table.source_bytes;
                        Ok(Done::Written { source_bytes })
                    })
                    .boxed()
            }
            Task::Check { .. } | Task::Verify { .. } => {
                let message = "a trainer was asked to verify";
                ready(Err(Error::new(ErrorKind::Protocol, "updating", message).rank(Rank::LEADER)))
            }
        }
    }
}
