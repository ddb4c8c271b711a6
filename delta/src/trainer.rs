//! A trainer that sends what changed.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use engine_core::memory::{Pool, Work};
use engine_core::{
    Base, Bases, ChangedElements, CheckpointEngine, DeltaReport, EngineContext, Error, ErrorKind,
    Prepared, PreparedTrainer, Rank, Result, Role, SendReport, TensorCounts, TrainerEngine,
    Version, Weight, WeightStream,
};
use futures::channel::oneshot;
use futures::{FutureExt, StreamExt};

use crate::ATTESTED_EVERY;
use crate::message::{self, Head, Record};
use crate::shadow::{Entry, Shadow};
use crate::tiles::{Changes, Cut};

/// Bytes that are encoded or compared at a time, as long as the stream has weights. At most a bucket, because an engine allows the deadline
/// for one bucket.
const BATCH: u64 = 32 << 20;
/// Bytes of a weight that one thread encodes and compares at a time, so that they stay in its cache.
const STEP: usize = 256 << 10;
/// The same for weights that are read from a device.
const DEVICE_STEP: usize = 4 << 20;

pub(crate) fn in_front(
    prepared: PreparedTrainer,
    context: &EngineContext,
) -> Result<PreparedTrainer> {
    let bases = context.bases.clone();
    bases.want();
    let pool = Pool::new(context.threads(Role::Trainer))?;
    let batch = context.config.bucket_bytes().unwrap_or(BATCH).min(BATCH);
    let metadata = prepared.metadata().clone();
    Ok(Prepared::new(metadata, move |place| async move {
        let engine = prepared.join(place).await?;
        let trainer = DeltaTrainer { engine, bases, pool, batch, kept: Kept::default() };
        Ok(Box::new(trainer) as Box<dyn TrainerEngine>)
    }))
}

#[derive(Debug)]
struct DeltaTrainer {
    engine: Box<dyn TrainerEngine>,
    bases: Bases,
    pool: Pool,
    /// Bytes that are encoded or compared at a time.
    batch: u64,
    kept: Kept,
}

/// What the trainer keeps of the version that was committed last.
#[derive(Debug, Default)]
struct Kept {
    shadow: Arc<Mutex<Option<Arc<Shadow>>>>,
    /// The work that moves the copy to the version that was committed.
    moving: Option<Work<Shadow>>,
    /// Versions that were sent as changes since the sums were last computed from memory.
    since_attested: u64,
}

impl Kept {
    /// Waits until the copy is at the version that was committed last. Returns the reason if it cannot be.
    async fn settle(&mut self) -> Option<String> {
        let moved = self.moving.take()?.await;
        let (shadow, lost) = match moved {
            Ok(shadow) => (Some(Arc::new(shadow)), None),
            Err(error) => (None, Some(error.to_string())),
        };
        *lock(&self.shadow) = shadow;
        lost
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is complete before anything can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl CheckpointEngine for DeltaTrainer {
    async fn finalize(self: Box<Self>) -> Result<()> {
        self.engine.finalize().await
    }
}

#[async_trait]
impl TrainerEngine for DeltaTrainer {
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        let Self { engine, bases, pool, batch, kept } = self;
        let lost = kept.settle().await;
        // Discards what was said for an update that did not get this far.
        drop(bases.take());
        let made = Arc::new(Mutex::new(Made::default()));
        let sending = Sending {
            weights,
            has_ended: false,
            bases: bases.clone(),
            kept: kept.shadow.clone(),
            lost,
            attests: kept.since_attested + 1 >= ATTESTED_EVERY,
            pool: pool.clone(),
            batch: *batch,
            made: made.clone(),
            form: Form::Undecided,
            ready: VecDeque::new(),
            tensors: 0,
        };
        let stream = futures::stream::try_unfold(sending, |mut sending| async move {
            Ok(sending.next().await?.map(|weight| (weight, sending)))
        });
        let sent = engine.send_weights(WeightStream::new(stream), version).await;
        let Made { weights, counts, report: mut delta, attested, reused, at_work } =
            std::mem::take(&mut *lock(&made));
        if let Some(at_work) = at_work {
            // The caller may change its weights once this returns, so whatever still reads them ends first. The sender is dropped, never
            // used.
            at_work.await.unwrap_or_default();
        }
        let mut report = sent?;
        report.plan_reused = reused.unwrap_or(report.plan_reused);
        let wire_bytes = std::mem::replace(&mut report.counts, counts).wire_bytes;
        report.counts.wire_bytes = wire_bytes;
        let base = lock(&kept.shadow).take();
        kept.since_attested = if attested { 0 } else { kept.since_attested + 1 };
        match base {
            Some(base) => {
                delta.shadow_bytes = base.bytes();
                let threads = pool.clone();
                kept.moving = Some(pool.start(move || moved(base, weights, &threads)));
            }
            None if delta.whole.is_some() && !weights.is_empty() => {
                let entries = weights.into_iter().filter_map(Sent::into_new).collect();
                let shadow = Shadow { entries };
                delta.shadow_bytes = shadow.bytes();
                *lock(&kept.shadow) = Some(Arc::new(shadow));
                kept.since_attested = 0;
            }
            None => {}
        }
        report.delta = Some(delta);
        Ok(report)
    }
}

/// The copy of the version that was committed, made from the base and the changes. Blocks.
fn moved(base: Arc<Shadow>, weights: Vec<Sent>, pool: &Pool) -> Result<Shadow> {
    let base = Arc::try_unwrap(base).map_err(|_| lost("the copy of what was sent last is read"))?;
    let mut base: Vec<Option<Entry>> = base.entries.into_iter().map(Some).collect();
    let entries = weights.into_iter().map(|sent| match sent {
        Sent::New(entry) => Some((entry, None)),
        Sent::Kept { at, cut, changes, .. } => {
            base.get_mut(at)?.take().map(|entry| (entry, Some((cut, changes))))
        }
    });
    let entries: Option<Vec<_>> = entries.collect();
    let entries = entries.ok_or_else(|| lost("a weight was sent twice"))?;
    let moved = pool.map(entries, |(mut entry, change)| {
        if let Some((cut, changes)) = change.filter(|(_, changes)| !changes.is_empty()) {
            entry.exchange(cut, &mut changes.to_vec())?;
        }
        Ok(entry)
    });
    Ok(Shadow { entries: moved.into_iter().collect::<Result<_>>()? })
}

fn lost(words: &str) -> Error {
    Error::new(ErrorKind::State, message::COMPARING, words)
}

/// A weight of the version that is being sent.
#[derive(Debug)]
enum Sent {
    /// It is at this index of the base, and has these changes, which are empty if it did not change.
    Kept {
        at: usize,
        cut: Cut,
        changes: Bytes,
        sum: u64,
    },
    New(Entry),
}

impl Sent {
    fn into_new(self) -> Option<Entry> {
        match self {
            Self::New(entry) => Some(entry),
            Self::Kept { .. } => None,
        }
    }
}

/// What the stream leaves for the end of the update.
#[derive(Debug, Default)]
struct Made {
    weights: Vec<Sent>,
    counts: TensorCounts,
    report: DeltaReport,
    /// Whether sums were computed from memory.
    attested: bool,
    /// Whether the weights were those of the base, in its order, if changes were sent.
    reused: Option<bool>,
    /// Completes when nothing reads weights any more.
    at_work: Option<oneshot::Receiver<()>>,
}

/// How an update's weights travel.
enum Form {
    /// The engine has not asked for a weight yet.
    Undecided,
    /// As they are, without a copy of them.
    Plain,
    /// Whole, out of the copy.
    Whole,
    /// As changes to the base.
    Changes(Comparison),
    /// All have travelled.
    Ended,
}

/// Which weights of the base have come again.
struct Comparison {
    base: Arc<Shadow>,
    met: Vec<bool>,
    /// The index of the next weight if the order is that of the base.
    next: usize,
    /// The indices of weights by name, once the order differs.
    places: Option<HashMap<Arc<str>, usize>>,
    /// Names of weights that the base does not have.
    new: HashSet<Arc<str>>,
}

impl Comparison {
    fn new(base: Arc<Shadow>) -> Self {
        Self {
            met: vec![false; base.entries.len()],
            base,
            next: 0,
            places: None,
            new: HashSet::new(),
        }
    }

    /// The index of a weight in the base; `None` if the base has none of this name, type and shape.
    ///
    /// # Errors
    ///
    /// `Weight` if a weight of this name came before.
    fn find(&mut self, weight: &Weight) -> Result<Option<usize>> {
        let is_it = |at: usize| {
            let entry = self.base.entries.get(at);
            entry.is_some_and(|entry| entry.meta == *weight.meta()) && !self.met[at]
        };
        let at = match is_it(self.next) {
            true => Some(self.next),
            false => {
                let places = self.places.get_or_insert_with(|| self.base.places());
                places.get(weight.name()).copied()
            }
        };
        let is_new = match at {
            Some(at) => !std::mem::replace(&mut self.met[at], true),
            None => self.new.insert(weight.meta().name.clone()),
        };
        if !is_new {
            let message = "the stream has a weight of this name already";
            return Err(
                Error::new(ErrorKind::Weight, message::COMPARING, message).tensor(weight.name())
            );
        }
        let at = at.filter(|at| self.base.entries[*at].meta == *weight.meta());
        self.next = at.map_or(self.next, |at| at + 1);
        Ok(at)
    }
}

/// The stream that the engine gets.
struct Sending<'a> {
    weights: WeightStream<'a>,
    has_ended: bool,
    bases: Bases,
    kept: Arc<Mutex<Option<Arc<Shadow>>>>,
    /// Why there is no copy, if there should be one.
    lost: Option<String>,
    attests: bool,
    pool: Pool,
    batch: u64,
    made: Arc<Mutex<Made>>,
    form: Form,
    ready: VecDeque<Weight>,
    /// The number of tensors that carried changes so far.
    tensors: u64,
}

impl Sending<'_> {
    async fn next(&mut self) -> Result<Option<Weight>> {
        loop {
            if let Some(weight) = self.ready.pop_front() {
                return Ok(Some(weight));
            }
            match &self.form {
                Form::Undecided => self.decide().await?,
                Form::Plain => return self.next_of_trainer().await,
                Form::Ended => return Ok(None),
                Form::Whole | Form::Changes(_) => {
                    let batch = self.gather().await?;
                    if batch.is_empty() {
                        self.end()?;
                    } else {
                        self.take(batch).await?;
                    }
                }
            }
        }
    }

    /// Chooses how the weights travel, by what the rollouts have said.
    async fn decide(&mut self) -> Result<()> {
        let said = self.bases.take();
        let kept = lock(&self.kept).clone();
        let number = kept.as_ref().map(|shadow| shadow.version());
        let ranks = |is: &dyn Fn(Base) -> bool| -> Vec<Rank> {
            let said = said.iter().flatten();
            said.filter(|(_, base)| is(*base)).map(|(rank, _)| *rank).collect()
        };
        let unable = ranks(&|base| base == Base::Unable);
        let others = ranks(&|base| number.is_none_or(|number| base != Base::Has(number)));
        let (form, mut why) = match kept {
            _ if said.is_none() => {
                let why = "the engine does not ask rollouts which version they have, or several trainers share the sending";
                (Form::Plain, Some(why.to_owned()))
            }
            _ if !unable.is_empty() => {
                (Form::Plain, Some(format!("{} without `delta`", ranked(&unable))))
            }
            None => (Form::Whole, Some(self.lost.take().unwrap_or_else(|| NOTHING.to_owned()))),
            Some(_) if !others.is_empty() => {
                let why = format!("{} without the version that was sent last", ranked(&others));
                (Form::Whole, Some(why))
            }
            Some(base) => (Form::Changes(Comparison::new(base)), None),
        };
        self.form = form;
        if let (Form::Changes(comparison), true) = (&self.form, self.attests) {
            let (base, pool) = (comparison.base.clone(), self.pool.clone());
            lock(&self.made).attested = true;
            if let Err(error) = self.pool.start(move || base.attest(&pool)).await {
                tracing::error!(%error, "the copy of what was sent last is damaged: whole weights are sent");
                (self.form, why) = (Form::Whole, Some(error.to_string()));
            }
        }
        match &self.form {
            Form::Changes(_) => {
                let base = number.unwrap_or_default();
                self.queue(&Head::Begin { base }, &[])?;
            }
            // Freed first, so that there is only one copy at a time.
            _ => *lock(&self.kept) = None,
        }
        lock(&self.made).report.whole = why;
        Ok(())
    }

    /// The trainer's next weight.
    async fn next_of_trainer(&mut self) -> Result<Option<Weight>> {
        if self.has_ended {
            return Ok(None);
        }
        let next = self.weights.next().await;
        self.came(next)
    }

    fn came(&mut self, next: Option<Result<Weight>>) -> Result<Option<Weight>> {
        let Some(weight) = next.transpose()? else {
            self.has_ended = true;
            return Ok(None);
        };
        message::refuse_reserved(&weight)?;
        lock(&self.made).counts.add(&weight);
        Ok(Some(weight))
    }

    /// The next weights: those that are ready, or the first one after a wait.
    async fn gather(&mut self) -> Result<Vec<Weight>> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while bytes < self.batch && !self.has_ended {
            let next = match self.weights.next().now_or_never() {
                Some(next) => self.came(next)?,
                None if batch.is_empty() => self.next_of_trainer().await?,
                None => break,
            };
            let Some(weight) = next else { break };
            weight.require_whole(message::COMPARING)?;
            bytes += weight.byte_len();
            batch.push(weight);
        }
        Ok(batch)
    }

    /// Encodes weights, and compares them if changes are sent.
    async fn take(&mut self, batch: Vec<Weight>) -> Result<()> {
        let (base, found): (_, Vec<Option<usize>>) = match &mut self.form {
            Form::Changes(comparison) => {
                let found: Result<_> = batch.iter().map(|weight| comparison.find(weight)).collect();
                (Some(comparison.base.clone()), found?)
            }
            _ => (None, vec![None; batch.len()]),
        };
        let pool = self.pool.clone();
        let (reads, at_work) = oneshot::channel();
        lock(&self.made).at_work = Some(at_work);
        let work = self.pool.start(move || {
            let compared = compare_all(&batch, &found, base.as_deref(), &pool)?;
            // Returned in this order, in which they are dropped: `reads` last.
            Ok((batch, compared, reads))
        });
        let (batch, compared, _) = work.await?;
        let (mut records, mut bodies, mut sent) = (Vec::new(), Vec::new(), Vec::new());
        for (weight, compared) in batch.iter().zip(compared) {
            match compared {
                Compared::Kept { at, cut, changes, sum, units } => {
                    let tile = cut.tile() as u32;
                    let len = changes.len() as u64;
                    records.push(Record { weight: at as u32, tile, len });
                    bodies.push(changes);
                    sent.push((at, cut, sum, len));
                    let report = &mut lock(&self.made).report;
                    let name = weight.meta().dtype.name();
                    let of_type: &mut ChangedElements = match report.elements.get_mut(name) {
                        Some(counts) => counts,
                        None => report.elements.entry(name.to_owned()).or_default(),
                    };
                    of_type.compared += weight.meta().elements()?;
                    of_type.changed += units;
                    report.changed_weights += u64::from(units > 0);
                }
                Compared::New(entry) => {
                    self.flush(&mut records, &mut bodies, &mut sent)?;
                    let whole = Weight::from_meta(entry.meta.clone(), entry.view())?;
                    self.ready.push_back(whole.with_treatment(weight.treatment().clone()));
                    lock(&self.made).weights.push(Sent::New(entry));
                }
            }
        }
        self.flush(&mut records, &mut bodies, &mut sent)
    }

    /// Makes a tensor of the records and their bodies.
    fn flush(
        &mut self,
        records: &mut Vec<Record>,
        bodies: &mut Vec<Vec<u8>>,
        sent: &mut Vec<(usize, Cut, u64, u64)>,
    ) -> Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let all = self.queue(&Head::Weights(std::mem::take(records)), bodies)?;
        bodies.clear();
        let mut from = 0;
        let kept = sent.drain(..).map(|(at, cut, sum, len)| {
            let changes = all.slice(from..from + len as usize);
            from += len as usize;
            Sent::Kept { at, cut, changes, sum }
        });
        lock(&self.made).weights.extend(kept);
        Ok(())
    }

    fn queue(&mut self, head: &Head, bodies: &[Vec<u8>]) -> Result<Bytes> {
        let (tensor, bodies) = message::tensor(self.tensors, head, bodies)?;
        self.tensors += 1;
        self.ready.push_back(tensor);
        Ok(bodies)
    }

    /// Ends the update after the last weight.
    fn end(&mut self) -> Result<()> {
        if let Form::Changes(comparison) = &self.form {
            let mut made = lock(&self.made);
            let all = made.weights.len() == comparison.base.entries.len();
            let in_order =
                |(n, sent): (usize, &Sent)| matches!(sent, Sent::Kept { at, .. } if *at == n);
            made.reused = Some(all && made.weights.iter().enumerate().all(in_order));
            let version = made.weights.iter().fold(0, |version, sent| match sent {
                Sent::New(entry) => entry.add_to(version, 0),
                Sent::Kept { at, sum, .. } => comparison.base.entries[*at].add_to(version, *sum),
            });
            drop(made);
            self.queue(&Head::End { version }, &[])?;
        }
        self.form = Form::Ended;
        Ok(())
    }
}

const NOTHING: &str = "nothing was sent before";

/// Ranks, for a message.
fn ranked(ranks: &[Rank]) -> String {
    let named: Vec<String> = ranks.iter().take(8).map(Rank::to_string).collect();
    let more = if ranks.len() > named.len() { ", …" } else { "" };
    format!("{} rollouts (rank {}{more}) are", ranks.len(), named.join(", "))
}

/// The result of comparing a weight.
enum Compared {
    Kept { at: usize, cut: Cut, changes: Vec<u8>, sum: u64, units: u64 },
    New(Entry),
}

/// Encodes weights, and compares those that the base has. Blocks.
///
/// # Errors
///
/// Those of encoding; `Resource` if there is no memory for a new weight.
fn compare_all(
    batch: &[Weight],
    found: &[Option<usize>],
    base: Option<&Shadow>,
    pool: &Pool,
) -> Result<Vec<Compared>> {
    let mut all: Vec<Option<Compared>> = batch.iter().map(|_| None).collect();
    // Deferred weights get their bytes when the others are encoded.
    for deferred in [false, true] {
        let due = batch.iter().zip(found).zip(&mut all);
        let due = due.filter(|((weight, _), _)| weight.is_deferred() == deferred);
        let each = |((weight, found), compared): ((&Weight, &Option<usize>), &mut Option<_>)| {
            let entry = found.and_then(|at| Some((at, base?.entries.get(at)?)));
            *compared = Some(match entry {
                Some((at, entry)) => compare(weight, at, entry, pool)?,
                None => Compared::New(Entry::encoded(weight, pool)?),
            });
            Ok(())
        };
        pool.map(due, each).into_iter().collect::<Result<()>>()?;
    }
    Ok(all.into_iter().flatten().collect())
}

/// Encodes a weight and compares it with the base, part by part, while a part is in the cache.
fn compare(weight: &Weight, at: usize, entry: &Entry, pool: &Pool) -> Result<Compared> {
    let old = entry.bytes();
    let cut = Cut::at(weight.meta().dtype, weight.granule());
    let step = step(cut, weight);
    let part = |from: usize| {
        let to = old.len().min(from.saturating_add(step));
        let mut changes = Changes::default();
        match weight.contiguous_bytes() {
            Some(bytes) => changes.compare(cut, from, &old[from..to], &bytes[from..to]),
            None => SCRATCH.with_borrow_mut(|scratch| {
                scratch.resize(scratch.len().max(to - from), 0);
                let new = &mut scratch[..to - from];
                weight.encode(from as u64..to as u64, new)?;
                changes.compare(cut, from, &old[from..to], new);
                Ok::<_, Error>(())
            })?,
        }
        Ok(changes)
    };
    let parts = match old.len() <= step {
        true => vec![part(0)?],
        false => {
            let parts = pool.map((0..old.len()).step_by(step), part);
            parts.into_iter().collect::<Result<_>>()?
        }
    };
    let mut changes = Vec::new();
    Changes::join(&parts, &mut changes);
    let sum = parts.iter().fold(0_u64, |sum, part| sum.wrapping_add(part.sum));
    let units = parts.iter().map(|part| part.units).sum();
    Ok(Compared::Kept { at, cut, changes, sum, units })
}

thread_local! {
    /// The buffer into which a thread encodes before it compares.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Bytes that are encoded at a time: whole tiles, and whole granules if these consist of tiles.
fn step(cut: Cut, weight: &Weight) -> usize {
    let granule = usize::try_from(weight.granule()).unwrap_or(usize::MAX);
    let tile = cut.tile();
    let whole = if granule.is_multiple_of(tile) { granule } else { tile };
    let most = if weight.reads_device() { DEVICE_STEP } else { STEP };
    whole.max(most / whole * whole)
}
