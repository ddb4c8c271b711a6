//! The engine for trainers and rollouts of one process: hands the weights over without a copy.
//!
//! A weight that is contiguous in memory arrives as that memory, shared; one that is encoded on the
//! way (cast, say) is encoded once, for all rollouts. There are no buckets, and nothing travels
//! that a digest could guard.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use crate::clock::within;
use crate::memory::Pool;
use crate::observe::{Observer as _, Progress};
use crate::telemetry::{Meter, ReceiveStages};
use crate::{
    Availability, Backend, CheckpointEngine, Devices, EngineContext, Error, ErrorKind, ErrorReport,
    Outcome, Placement, Prepared, PreparedRollout, PreparedTrainer, Rank, ReceiveReport,
    ReceivedBucket, ReceivedWeights, ReceiverReport, Result, Role, RolloutEngine, SendReport,
    StageTimes, TensorCounts, TrainerEngine, Version, VersionState, WeightStream, WorkerMetadata,
};

const NAME: &str = "naive";

/// How often the trainer says that it is alive.
const ALIVE: Duration = Duration::from_secs(1);

/// The transport as a value, to be registered.
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

    fn probe(&self) -> Availability {
        Availability::Usable { details: "always".into() }
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        check_options(&context)?;
        let pool = Pool::new(context.threads(Role::Trainer))?;
        let rank = OwnRank::of(&context, Role::Trainer);
        let details = serde_json::Value::Null;
        let metadata = WorkerMetadata::of_this_process(NAME, rank.rank, Role::Trainer, details);
        Ok(Prepared::new(metadata, move |place| async move {
            let mut rollouts = Vec::new();
            for peer in place.peers.iter().filter(|peer| peer.rank != place.rank) {
                let rank = peer.rank;
                let details: Details =
                    serde_json::from_value(peer.details.clone()).map_err(|error| {
                        let words = "the rollout's metadata is not naive's";
                        Error::new(ErrorKind::Protocol, "joining the group", words)
                            .rank(rank)
                            .with_source(error)
                    })?;
                let offers = waiting().remove(&details.id).ok_or_else(|| {
                    let words = "the rollout is gone, or in another group";
                    Error::new(ErrorKind::PeerLost, "joining the group", words).rank(rank)
                })?;
                rollouts.push((rank, offers));
            }
            let engine = NaiveTrainer { context, pool, _rank: rank, rollouts, absent: Vec::new() };
            Ok(Box::new(engine) as Box<dyn TrainerEngine>)
        }))
    }

    async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        check_options(&context)?;
        let rank = OwnRank::of(&context, Role::Rollout);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let (sender, offers) = mpsc::unbounded_channel();
        waiting().insert(id, sender);
        let waits = Waits(id);
        let details = serde_json::json!(Details { id });
        let metadata = WorkerMetadata::of_this_process(NAME, rank.rank, Role::Rollout, details);
        Ok(Prepared::new(metadata, move |place| async move {
            let engine =
                NaiveRollout { context, _own: rank, rank: place.rank, offers, _waits: waits };
            Ok(Box::new(engine) as Box<dyn RolloutEngine>)
        }))
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

/// Rollouts that were prepared in this process, until their trainer joins the group.
static WAITING: LazyLock<Mutex<HashMap<u64, mpsc::UnboundedSender<Offer>>>> =
    LazyLock::new(Mutex::default);

#[derive(Debug)]
struct NaiveTrainer {
    context: EngineContext,
    pool: Pool,
    _rank: OwnRank,
    rollouts: Vec<(Rank, mpsc::UnboundedSender<Offer>)>,
    absent: Vec<Rank>,
}

#[derive(Debug)]
struct NaiveRollout {
    context: EngineContext,
    _own: OwnRank,
    rank: Rank,
    offers: mpsc::UnboundedReceiver<Offer>,
    _waits: Waits,
}

/// A rollout in [`WAITING`], until this is dropped.
#[derive(Debug)]
struct Waits(u64);

impl Drop for Waits {
    fn drop(&mut self) {
        waiting().remove(&self.0);
    }
}

/// The transport has no options of its own.
fn check_options(context: &EngineContext) -> Result<()> {
    #[derive(Default, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Kwargs {}
    context.config.kwargs::<Kwargs>(NAME).map(drop)
}

/// The ranks of engines that have them from nobody else, as long as these are there.
static RANKS: LazyLock<Mutex<BTreeSet<Rank>>> = LazyLock::new(Mutex::default);

/// A naive engine's rank: the one of its context, else one that no other naive engine of the process has
/// chosen. A trainer leads.
#[derive(Debug)]
struct OwnRank {
    rank: Rank,
    is_chosen: bool,
}

impl OwnRank {
    fn of(context: &EngineContext, role: Role) -> Self {
        let given = context.rank().or((role == Role::Trainer).then_some(Rank::LEADER));
        if let Some(rank) = given {
            return Self { rank, is_chosen: false };
        }
        let mut taken = RANKS.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rank = Rank(1);
        while !taken.insert(rank) {
            rank.0 += 1;
        }
        Self { rank, is_chosen: true }
    }
}

impl Drop for OwnRank {
    fn drop(&mut self) {
        if self.is_chosen {
            RANKS.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.rank);
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Details {
    id: u64,
}

/// An update, as a rollout gets it.
#[derive(Debug)]
struct Offer {
    version: Version,
    items: mpsc::Receiver<Item>,
    answer: oneshot::Sender<Answer>,
    /// Changes whenever the trainer says that it is alive.
    alive: watch::Receiver<()>,
    /// How the update ended.
    committed: oneshot::Receiver<Result<(), ErrorReport>>,
}

#[derive(Debug)]
enum Item {
    Bucket(ReceivedBucket),
    End,
}

#[derive(Debug)]
enum Answer {
    Confirmed { seconds: f64, notes: serde_json::Value },
    Failed(ErrorReport),
}

/// A rollout in the present update, as the trainer sees it.
struct Recipient {
    rank: Rank,
    items: mpsc::Sender<Item>,
    answer: oneshot::Receiver<Answer>,
    commit: oneshot::Sender<Result<(), ErrorReport>>,
}

impl Recipient {
    /// Hands over an item, or says why that cannot be.
    async fn give(&mut self, item: Item, deadline: Duration) -> Result<()> {
        let operation = "handing over weights";
        match within(deadline, self.items.send(item)).await {
            Some(Ok(())) => Ok(()),
            Some(Err(_)) => Err(match (&mut self.answer).await {
                Ok(Answer::Failed(report)) => report.into(),
                _ => Error::new(ErrorKind::PeerLost, operation, "the rollout's engine is gone"),
            }),
            None => Err(Error::new(
                ErrorKind::Timeout,
                operation,
                format!(
                    "the rollout took nothing within {:.1} s: it has not called receive_weights, \
                     or does not go on with it",
                    deadline.as_secs_f64()
                ),
            )),
        }
        .map_err(|error| error.rank(self.rank))
    }
}

#[async_trait]
impl CheckpointEngine for NaiveTrainer {
    async fn finalize(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl TrainerEngine for NaiveTrainer {
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let Self { rollouts, absent, .. } = self;
        let begun = Instant::now();
        let mut recipients = Vec::new();
        let (alive, hears) = watch::channel(());
        rollouts.retain(|(rank, offers)| {
            let (items, for_items) = mpsc::channel(1);
            let (for_answer, answer) = oneshot::channel();
            let (commit, committed) = oneshot::channel();
            let alive = hears.clone();
            let offer = Offer { version, items: for_items, answer: for_answer, alive, committed };
            let there = offers.send(offer).is_ok();
            if there {
                recipients.push(Recipient { rank: *rank, items, answer, commit });
            } else {
                absent.push(*rank);
            }
            there
        });
        if recipients.is_empty() {
            let words = "no receiver is left in the group";
            return Err(
                Error::new(ErrorKind::PeerLost, "beginning an update", words).version(version)
            );
        }
        let mut sending = Sending {
            meter: Meter::new(Rank::LEADER, self.context.observer.clone()),
            receivers: recipients.iter().map(|recipient| recipient.rank).collect(),
            committed: false,
        };
        let receivers = recipients.iter().map(|recipient| recipient.rank).collect();
        sending.meter.observe(&Progress::Began { version, receivers });
        let deadline = self.context.deadline();
        let sent = {
            let work = send(&sending.meter, &self.pool, &mut recipients, weights, deadline);
            let mut work = std::pin::pin!(work);
            loop {
                match within(ALIVE.min(deadline / 4), work.as_mut()).await {
                    Some(sent) => break sent,
                    None => alive.send_replace(()),
                }
            }
        };
        match sent {
            Ok((counts, stages, buckets, receivers)) => {
                for recipient in recipients {
                    // A rollout that left after confirming has the version all the same.
                    if recipient.commit.send(Ok(())).is_err() {
                        tracing::debug!(rank = %recipient.rank, "left before the commit");
                    }
                    sending.meter.observe(&Progress::State {
                        rank: recipient.rank,
                        state: VersionState::Active,
                    });
                }
                let report = SendReport {
                    version,
                    counts,
                    buckets,
                    plan_reused: false,
                    elapsed: begun.elapsed(),
                    stages,
                    digest: None,
                    receivers,
                    absent: absent.clone(),
                    slower: Vec::new(),
                };
                sending.committed = true;
                sending.meter.sent(&report);
                Ok(report)
            }
            Err(error) => {
                let error = error.version(version);
                for recipient in recipients {
                    // Said before the channel of the weights ends, which the rollout sees first.
                    // A rollout that gave up itself does not listen any more.
                    if recipient.commit.send(Err(ErrorReport::from(&error))).is_err() {
                        tracing::debug!(rank = %recipient.rank, "has left the update");
                    }
                }
                Err(error)
            }
        }
    }
}

#[async_trait]
impl CheckpointEngine for NaiveRollout {
    async fn finalize(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl RolloutEngine for NaiveRollout {
    async fn receive_weights(&mut self, version: Option<Version>) -> Result<ReceivedWeights<'_>> {
        let Self { offers, .. } = self;
        let (rank, deadline) = (self.rank, self.context.deadline());
        let operation = "waiting for an update to begin";
        let offer = loop {
            let offer = match within(deadline, offers.recv()).await {
                Some(Some(offer)) => offer,
                Some(None) => {
                    let words = "the trainer's engine is gone";
                    return Err(
                        Error::new(ErrorKind::PeerLost, operation, words).rank(Rank::LEADER)
                    );
                }
                None => {
                    let words = format!("nothing within {:.1} s", deadline.as_secs_f64());
                    return Err(Error::new(ErrorKind::Timeout, operation, words).rank(Rank::LEADER));
                }
            };
            match version {
                Some(expected) if expected != offer.version => {
                    if offer.items.is_closed() {
                        continue; // It was aborted while nobody listened here.
                    }
                    let message = format!(
                        "the trainer sends version {}, this rank expects {expected}",
                        offer.version
                    );
                    let error =
                        Error::new(ErrorKind::Mismatch, "receiving weights", message).rank(rank);
                    drop(offer.answer.send(Answer::Failed(ErrorReport::from(&error))));
                    return Err(error);
                }
                _ => break offer,
            }
        };
        let meter = Meter::new(rank, self.context.observer.clone());
        meter.observe(&Progress::Began { version: offer.version, receivers: vec![rank] });
        let outcome = Outcome::default();
        let version = offer.version;
        let Offer { items, answer, alive, committed, .. } = offer;
        let guard = Guard {
            rank,
            version,
            meter,
            committed: false,
            outcome: outcome.clone(),
            answer: Some(answer),
        };
        let deadline = deadline + deadline / 4;
        let session = Session {
            items,
            guard,
            alive,
            committed,
            begun: Instant::now(),
            deadline,
            counts: (0, 0, 0),
            stages: ReceiveStages::default(),
            installing: None,
        };
        let buckets = futures::stream::try_unfold(session, |mut session| async move {
            match session.next().await {
                Ok(Some(bucket)) => Ok(Some((bucket, session))),
                Ok(None) => Ok(None),
                Err(error) => Err(error.version(session.guard.version)),
            }
        });
        Ok(ReceivedWeights::new(version, outcome, buckets))
    }
}

type Sent = (TensorCounts, StageTimes, u64, Vec<ReceiverReport>);

async fn send(
    meter: &Meter,
    pool: &Pool,
    recipients: &mut [Recipient],
    mut weights: WeightStream<'_>,
    deadline: Duration,
) -> Result<Sent> {
    let (mut counts, mut stages) = (TensorCounts::default(), StageTimes::default());
    let mut names: HashSet<Arc<str>> = HashSet::new();
    let mut index = 0;
    loop {
        let started = Instant::now();
        let next = within(deadline, weights.next()).await.ok_or_else(|| {
            let words = format!("nothing within {:.1} s", deadline.as_secs_f64());
            Error::new(ErrorKind::Timeout, "waiting for the trainer's next weight", words)
        })?;
        stages.source += started.elapsed();
        let Some(weight) = next.transpose()? else { break };
        if !names.insert(weight.meta().name.clone()) {
            let words = "the stream has a weight of this name already";
            return Err(Error::new(ErrorKind::Weight, "reading the trainer's weights", words)
                .tensor(weight.name()));
        }
        counts.add(&weight);
        let started = Instant::now();
        let bytes = weight.source_bytes();
        let bucket = ReceivedBucket::of_weight(weight, index, pool).await?;
        stages.encode += started.elapsed();
        let started = Instant::now();
        for recipient in &mut *recipients {
            recipient
                .give(Item::Bucket(bucket.clone()), deadline)
                .await
                .map_err(|error| error.bucket(index))?;
        }
        stages.release += started.elapsed();
        meter.observe(&Progress::Bucket { index, bytes });
        index += 1;
    }
    let started = Instant::now();
    let mut receivers = Vec::new();
    for recipient in &mut *recipients {
        recipient.give(Item::End, deadline).await?;
    }
    for recipient in recipients {
        let rank = recipient.rank;
        let operation = "waiting for a receiver to confirm the version";
        let answer = within(deadline, &mut recipient.answer).await.ok_or_else(|| {
            let words = format!("nothing within {:.1} s", deadline.as_secs_f64());
            Error::new(ErrorKind::Timeout, operation, words).rank(rank)
        })?;
        match answer {
            Ok(Answer::Confirmed { seconds, notes }) => receivers.push(ReceiverReport {
                rank,
                state: VersionState::Active,
                seconds,
                digest: None,
                notes,
            }),
            Ok(Answer::Failed(report)) => return Err(Error::from(report).rank(rank)),
            Err(_) => {
                let words = "the rollout's engine is gone";
                return Err(Error::new(ErrorKind::PeerLost, operation, words).rank(rank));
            }
        }
    }
    stages.confirm = started.elapsed();
    Ok((counts, stages, index, receivers))
}

/// Counts the trainer's update as aborted when it is dropped before its end.
struct Sending {
    meter: Meter,
    receivers: Vec<Rank>,
    committed: bool,
}

impl Drop for Sending {
    fn drop(&mut self) {
        if !self.committed {
            self.meter.aborted(&self.receivers);
        }
    }
}

struct Session {
    items: mpsc::Receiver<Item>,
    guard: Guard,
    alive: watch::Receiver<()>,
    committed: oneshot::Receiver<Result<(), ErrorReport>>,
    begun: Instant,
    deadline: Duration,
    /// Tensors, bytes, buckets.
    counts: (u64, u64, u64),
    stages: ReceiveStages,
    /// Since when the caller has had the last weight.
    installing: Option<Instant>,
}

impl Session {
    async fn next(&mut self) -> Result<Option<ReceivedBucket>> {
        let dropped = || {
            let words = "the trainer dropped the update";
            Error::new(ErrorKind::Aborted, "receiving weights", words).rank(Rank::LEADER)
        };
        let late = |operation: &str| {
            let words = format!("nothing within {:.1} s", self.deadline.as_secs_f64());
            Error::new(ErrorKind::Timeout, operation, words).rank(Rank::LEADER)
        };
        if let Some(begun) = self.installing.take() {
            self.stages.install += begun.elapsed();
        }
        let waiting = Instant::now();
        let item = while_alive(self.deadline, &mut self.alive, self.items.recv()).await;
        self.stages.fetch += waiting.elapsed();
        match item {
            Some(Some(Item::Bucket(bucket))) => {
                let before = self.counts.1;
                for piece in bucket.pieces() {
                    self.counts.0 += 1;
                    self.counts.1 += piece.bytes.len();
                }
                let (index, bytes) = (self.counts.2, self.counts.1 - before);
                self.guard.meter.observe(&Progress::Bucket { index, bytes });
                self.counts.2 += 1;
                self.installing = Some(Instant::now());
                Ok(Some(bucket))
            }
            Some(None) => {
                self.guard.answer = None;
                Err(match self.committed.try_recv() {
                    Ok(Err(report)) => report.into(),
                    _ => dropped(),
                })
            }
            None => Err(late("waiting for the next weight").bucket(self.counts.2)),
            Some(Some(Item::End)) => {
                if let Err(error) = self.guard.outcome.check() {
                    let error = error.rank(self.guard.rank);
                    if let Some(answer) = self.guard.answer.take() {
                        // A trainer that is gone needs no telling.
                        drop(answer.send(Answer::Failed(ErrorReport::from(&error))));
                    }
                    return Err(error);
                }
                let notes = self.guard.outcome.take_notes();
                let seconds = self.begun.elapsed().as_secs_f64();
                if let Some(answer) = self.guard.answer.take() {
                    answer.send(Answer::Confirmed { seconds, notes }).map_err(|_| dropped())?;
                }
                match while_alive(self.deadline, &mut self.alive, &mut self.committed).await {
                    Some(Ok(Ok(()))) => {}
                    // Another receiver failed after this one confirmed.
                    Some(Ok(Err(report))) => return Err(report.into()),
                    Some(Err(_)) => return Err(dropped()),
                    None => return Err(late("waiting for the trainer to commit the version")),
                }
                let (tensors, bytes, buckets) = self.counts;
                self.guard.committed = true;
                self.guard.meter.received(bytes, self.begun.elapsed(), self.stages);
                self.guard.outcome.complete(ReceiveReport {
                    version: self.guard.version,
                    state: VersionState::Active,
                    tensors,
                    bytes,
                    buckets,
                    elapsed: self.begun.elapsed(),
                    digest: None,
                });
                Ok(None)
            }
        }
    }
}

/// What the trainer does, as long as it says that it is alive: its own waits have deadlines, and other rollouts may be
/// slow within theirs. `None` once it has been silent for so long.
async fn while_alive<T>(
    deadline: Duration,
    alive: &mut watch::Receiver<()>,
    work: impl Future<Output = T>,
) -> Option<T> {
    let mut work = std::pin::pin!(work);
    loop {
        let wait = async {
            tokio::select! {
                biased;
                done = &mut work => Some(done),
                // If the trainer is gone, the work says so.
                Ok(()) = alive.changed() => None,
            }
        };
        if let Some(done) = within(deadline, wait).await? {
            return Some(done);
        }
    }
}

/// Tells the trainer, when dropped before the end, that this rank gave up.
struct Guard {
    rank: Rank,
    version: Version,
    meter: Meter,
    committed: bool,
    outcome: Outcome,
    answer: Option<oneshot::Sender<Answer>>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.committed {
            self.meter.aborted(&[]);
        }
        let Some(answer) = self.answer.take() else { return };
        let error = self.outcome.take_failure().unwrap_or_else(|| {
            let words = "the receiver dropped the stream before its end";
            Error::new(ErrorKind::Aborted, "receiving weights", words)
        });
        let error = error.rank(self.rank).version(self.version);
        // A trainer that is gone needs no telling.
        drop(answer.send(Answer::Failed(ErrorReport::from(&error))));
    }
}

fn waiting() -> std::sync::MutexGuard<'static, HashMap<u64, mpsc::UnboundedSender<Offer>>> {
    // Insertions and removals are all that happens to the map.
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}
