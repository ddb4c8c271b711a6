//! A trainer that sends what changed.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use engine_core::changes::{Compared, Cut, Difference, ShadowBytes};
use engine_core::memory::Work;
use engine_core::{
    Base, Bases, ChangedElements, CheckpointEngine, DeltaReport, EngineContext, Entrant, Error,
    ErrorKind, PartSet, Prepared, PreparedTrainer, Rank, Result, SendReport, Storage, TensorCounts,
    TrainerEngine, Version, Weight, WeightStream,
};
use futures::channel::oneshot;
use futures::{FutureExt, StreamExt};

use crate::ATTESTED_EVERY;
use crate::message::{self, Head, Record};
use crate::parts;
use crate::shadow::{Change, Copies, Entry, Shadow};

pub(crate) fn in_front(
    prepared: PreparedTrainer,
    context: &EngineContext,
    copies: Copies,
) -> Result<PreparedTrainer> {
    let bases = context.bases.clone();
    bases.want();
    let batch = copies.memory.batch();
    let batch = context.config.bucket_bytes().unwrap_or(batch).min(batch);
    let metadata = prepared.metadata().clone();
    Ok(Prepared::new(metadata, move |place| async move {
        let engine = prepared.join(place).await?;
        let trainer = DeltaTrainer { engine, bases, copies, batch, kept: Kept::default() };
        Ok(Box::new(trainer) as Box<dyn TrainerEngine>)
    }))
}

/// A bucket has the changes of at most so many batches: rollouts apply them while others are compared. Changes of a whole model would fit into
/// one bucket, which is sent when it ends.
const BATCHES_OF_A_BUCKET: u64 = 4;

#[derive(Debug)]
struct DeltaTrainer {
    engine: Box<dyn TrainerEngine>,
    bases: Bases,
    copies: Copies,
    /// Bytes that are encoded or compared at a time, as long as the stream has weights. At most a bucket, because an engine allows the
    /// deadline for one bucket.
    batch: u64,
    kept: Kept,
}

/// What the trainer keeps of the version that was committed last.
#[derive(Debug)]
struct Kept {
    shadow: Arc<Mutex<Copied>>,
    /// The work that moves the copy to the version that was committed.
    moving: Option<Work<Shadow>>,
    version: Version,
    /// Versions that were sent as changes since the sums were last computed from memory.
    since_attested: u64,
}

/// A copy, or why there is none.
type Copied = std::result::Result<Arc<Shadow>, String>;

impl Default for Kept {
    fn default() -> Self {
        Self {
            shadow: Arc::new(Mutex::new(Err("nothing was sent before".to_owned()))),
            moving: None,
            version: Version(0),
            since_attested: 0,
        }
    }
}

impl Kept {
    /// Waits until the copy is at the version that was committed last.
    async fn settle(&mut self) {
        let Some(moving) = self.moving.take() else { return };
        let moved = moving.await;
        *lock(&self.shadow) = moved.map(Arc::new).map_err(|error| error.to_string());
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
        self.kept.settle().await;
        let is_due = self.kept.since_attested + 1 >= ATTESTED_EVERY;
        let attests = if is_due { Attests::Due } else { Attests::Not };
        self.update(weights, version, false, attests).await
    }

    async fn send_part(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        self.require_copy(message::SENDING_A_PART).await?;
        self.update(weights, version, true, Attests::Not).await
    }

    async fn attest(&mut self) -> Result<SendReport> {
        self.require_copy(message::ATTESTING).await?;
        let nothing = WeightStream::new(futures::stream::empty());
        self.update(nothing, self.kept.version, true, Attests::Asked).await
    }
}

impl DeltaTrainer {
    /// # Errors
    ///
    /// `State` if there is no copy of the version that was committed last.
    async fn require_copy(&mut self, operation: &str) -> Result<()> {
        self.kept.settle().await;
        lock(&self.kept.shadow).as_ref().map(drop).map_err(|why| {
            let message = format!("the trainer has no copy of a version: {why}");
            Error::new(ErrorKind::State, operation, message)
        })
    }

    /// Sends a version whose weights are those of the stream and, if it is only a part of it, those of the base that the stream does not
    /// bring.
    async fn update(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
        is_part: bool,
        attests: Attests,
    ) -> Result<SendReport> {
        let Self { engine, bases, copies, batch, kept } = self;
        // Discards what was said for an update that did not get this far.
        drop(bases.take());
        let made = Arc::new(Mutex::new(Made::default()));
        let sending = Sending {
            weights,
            has_ended: false,
            is_part,
            bases: bases.clone(),
            kept: kept.shadow.clone(),
            attests,
            copies: copies.clone(),
            batch: *batch,
            made: made.clone(),
            form: Form::Undecided,
            begun: None,
            held: None,
            at_work: VecDeque::new(),
            ready: VecDeque::new(),
            followed: None,
            tensors: 0,
            batches: 0,
        };
        let stream = futures::stream::try_unfold(sending, |mut sending| async move {
            Ok(sending.next().await?.map(|weight| (weight, sending)))
        });
        let sent = engine.send_weights(WeightStream::new(stream), version).await;
        let Made { weights, changes, counts, report: mut delta, reused, wanted, at_work } =
            std::mem::take(&mut *lock(&made));
        for at_work in at_work {
            // The caller may change its weights once this returns, so whatever still reads them ends first. The sender is dropped, never
            // used.
            at_work.await.unwrap_or_default();
        }
        let mut report = sent?;
        report.plan_reused = reused.unwrap_or(report.plan_reused);
        let wire_bytes = std::mem::replace(&mut report.counts, counts).wire_bytes;
        report.counts.wire_bytes = wire_bytes;
        kept.version = version;
        kept.since_attested = if delta.attested { 0 } else { kept.since_attested + 1 };
        let copied = &mut *lock(&kept.shadow);
        match std::mem::replace(copied, Err("it moves to the version that was sent".to_owned())) {
            Ok(base) => {
                delta.shadow_bytes = base.bytes();
                delta.parts = parts::report(&copies.parts, reported(&weights, &base, &delta));
                let work = copies.clone();
                kept.moving = Some(copies.pool.start(move || moved(base, weights, changes, &work)));
            }
            Err(_) if !weights.is_empty() => {
                let entries = weights.into_iter().filter_map(Sent::into_new).collect();
                let shadow = Shadow { entries };
                delta.shadow_bytes = shadow.bytes();
                let whole = shadow.entries.iter().map(|it| (it, 0, true));
                delta.parts = parts::report(&copies.parts, whole);
                *copied = Ok(Arc::new(shadow));
                kept.since_attested = 0;
            }
            Err(lost) => *copied = Err(delta.whole.clone().unwrap_or(lost)),
        }
        if let Some(wanted) = wanted {
            // Nothing of the others has travelled.
            let wanted = copies.parts.named(&wanted);
            let others = delta.parts.iter_mut().filter(|(name, _)| !wanted.contains(name));
            others.for_each(|(_, part)| part.sent = 0);
        }
        report.delta = Some(delta);
        Ok(report)
    }
}

/// The weights of the version that was committed, each with the change of its digest sum since the base, and whether anything of it
/// travelled.
fn reported<'a>(
    weights: &'a [Sent],
    base: &'a Shadow,
    delta: &DeltaReport,
) -> impl Iterator<Item = (&'a Entry, u64, bool)> {
    let is_whole = delta.whole.is_some();
    weights.iter().map(move |sent| match sent {
        Sent::New(entry) => (entry, 0, true),
        Sent::Kept { at, sum, changed, .. } => (&base.entries[*at], *sum, *changed || is_whole),
    })
}

/// The copy of the version that was committed, made from the base and the changes. Blocks.
fn moved(
    base: Arc<Shadow>,
    weights: Vec<Sent>,
    changes: Vec<Changed>,
    copies: &Copies,
) -> Result<Shadow> {
    let base = Arc::try_unwrap(base).map_err(|_| lost("the copy of what was sent last is read"))?;
    let mut base: Vec<Option<Entry>> = base.entries.into_iter().map(Some).collect();
    let twice = || lost("a weight was sent twice");
    for Changed { of, values } in changes {
        let due = of.into_iter().map(|(at, change)| Some((at, base.get_mut(at)?.take()?, change)));
        let mut due = due.collect::<Option<Vec<_>>>().ok_or_else(twice)?;
        copies.apply(&mut due, &values, false)?;
        due.into_iter().for_each(|(at, entry, _)| base[at] = Some(entry));
    }
    let entries = weights.into_iter().map(|sent| match sent {
        Sent::New(entry) => Some(entry),
        Sent::Kept { at, follows, .. } => {
            base.get_mut(at)?.take().map(|entry| entry.following(follows))
        }
    });
    Ok(Shadow { entries: entries.collect::<Option<_>>().ok_or_else(twice)? })
}

fn lost(words: &str) -> Error {
    Error::new(ErrorKind::State, message::COMPARING, words)
}

/// A weight of the version that is being sent.
#[derive(Debug)]
enum Sent {
    /// It is at this index of the base, and its changes change its digest sum by this.
    Kept {
        at: usize,
        sum: u64,
        changed: bool,
        follows: Option<Arc<str>>,
    },
    New(Entry),
}

/// Weights of the base that changed, by their index, and the values of all of them.
#[derive(Debug)]
struct Changed {
    of: Vec<(usize, Change)>,
    values: Storage,
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
    changes: Vec<Changed>,
    counts: TensorCounts,
    report: DeltaReport,
    /// Whether the weights were those of the base, in its order, if changes were sent.
    reused: Option<bool>,
    /// The parts that any rollout wants, unless all want all.
    wanted: Option<PartSet>,
    /// Complete when nothing reads weights any more.
    at_work: Vec<oneshot::Receiver<()>>,
}

/// Whether all ranks compute the sums of their copies anew from memory in an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attests {
    Not,
    /// So many versions have come as changes since the last time.
    Due,
    /// It was asked for. The update has to be one of changes.
    Asked,
}

/// How an update's weights travel.
enum Form {
    /// The engine has not asked for a weight yet.
    Undecided,
    /// As they are, without a copy of them.
    Plain,
    /// Whole, out of the copy. With the base, whose other weights follow, if the stream is a part of a version.
    Whole(Option<Comparison>),
    /// As changes to the base.
    Changes(Comparison),
    /// All have travelled.
    Ended,
}

/// Which weights of the base have come again.
struct Comparison {
    base: Arc<Shadow>,
    /// The index of each weight within its part, where each part travels alone.
    within: Vec<u32>,
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
            within: Vec::new(),
            met: vec![false; base.entries.len()],
            base,
            next: 0,
            places: None,
            new: HashSet::new(),
        }
    }

    /// Counts the weights of each part.
    fn count(&mut self) {
        let mut counts = BTreeMap::<u32, u32>::new();
        let within = self.base.entries.iter().map(|entry| {
            let count = counts.entry(entry.part()).or_default();
            *count += 1;
            *count - 1
        });
        self.within = within.collect();
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

    /// The indices of the weights that the stream did not bring, in their order. What was added to a weight that has come again is none of
    /// them: it has come with it, or is not there any more.
    fn left(&mut self) -> Vec<usize> {
        let entries = &self.base.entries;
        let mut left: Vec<usize> = (0..entries.len()).filter(|at| !self.met[*at]).collect();
        if left.iter().any(|at| entries[*at].follows().is_some()) {
            let places = self.places.get_or_insert_with(|| self.base.places());
            let has_come = |name: &Arc<str>| places.get(name).is_some_and(|at| self.met[*at]);
            left.retain(|at| !entries[*at].follows().is_some_and(has_come));
        }
        left
    }
}

/// A weight of the base that comes again.
struct Again {
    at: usize,
    difference: Difference,
    follows: Option<Arc<str>>,
}

/// Weights that are being encoded, and compared if the base has them.
struct AtWork {
    work: Work<(Worked, oneshot::Sender<()>)>,
    batch: Vec<Weight>,
    /// The index of each in the base.
    found: Vec<Option<usize>>,
}

/// What comes of a batch, in its order.
struct Worked {
    compared: Compared,
    new: Vec<Entry>,
}

/// The stream that the engine gets.
struct Sending<'a> {
    weights: WeightStream<'a>,
    has_ended: bool,
    /// Whether weights of the base that the stream does not bring are part of the version.
    is_part: bool,
    bases: Bases,
    kept: Arc<Mutex<Copied>>,
    attests: Attests,
    copies: Copies,
    batch: u64,
    made: Arc<Mutex<Made>>,
    form: Form,
    /// The parts whose changes have begun, where each part travels alone.
    begun: Option<PartSet>,
    /// A weight of the stream that is not in a batch yet.
    held: Option<Weight>,
    /// The batches that the threads have.
    at_work: VecDeque<AtWork>,
    ready: VecDeque<Weight>,
    /// The last weight that was not added to another one.
    followed: Option<Arc<str>>,
    /// The number of tensors that carried changes so far.
    tensors: u64,
    /// The number of batches of which tensors were made.
    batches: u64,
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
                Form::Whole(_) | Form::Changes(_) => {
                    // Gathered while the threads have others; the tensors of the first are made while they have this one.
                    let batch = self.gather().await?;
                    let is_full = self.at_work.len() >= self.copies.batches;
                    let first = match batch.is_empty() || is_full {
                        true => self.at_work.pop_front(),
                        false => None,
                    };
                    let is_over = batch.is_empty() && first.is_none();
                    let worked = match first {
                        Some(first) => self.worked(first).await?,
                        None => None,
                    };
                    match self.form {
                        Form::Plain => self.ready.extend(batch),
                        _ if !batch.is_empty() => self.start(batch)?,
                        _ if is_over => self.end()?,
                        _ => {}
                    }
                    if let Some((worked, batch, found)) = worked {
                        self.take(worked, &batch, &found)?;
                    }
                }
            }
        }
    }

    /// Chooses how the weights travel, by what the rollouts have said.
    async fn decide(&mut self) -> Result<()> {
        let said = self.bases.take();
        let kept = lock(&self.kept).clone();
        // The numbers of the base, as far as ranks want it: most want the same.
        let all = self.copies.parts.all();
        let mut numbers = BTreeMap::<&PartSet, Option<u64>>::new();
        for said in said.iter().flatten() {
            let number = || {
                let kept = kept.as_ref().ok()?;
                Some(if said.wants == all { kept.version() } else { kept.version_of(&said.wants) })
            };
            numbers.entry(&said.wants).or_insert_with(number);
        }
        let ranks = |is: &dyn Fn(&Entrant) -> bool| -> Vec<Rank> {
            let said = said.iter().flatten();
            said.filter(|said| is(said)).map(|said| said.rank).collect()
        };
        let unable = ranks(&|said| said.base == Base::Unable);
        let others = ranks(&|said| {
            let number = numbers.get(&said.wants).copied().flatten();
            number.is_none_or(|number| said.base != Base::Has(number))
        });
        let is_apart = said.iter().flatten().any(|said| said.wants != all);
        if is_apart {
            let mut wanted = PartSet::new();
            said.iter().flatten().for_each(|said| wanted.unite(&said.wants));
            lock(&self.made).wanted = Some(wanted);
        }
        let (form, mut why) = match kept {
            _ if said.is_none() => {
                let why = "the engine does not ask rollouts which version they have, or several trainers share the sending";
                (Form::Plain, Some(why.to_owned()))
            }
            Ok(base) if self.is_part && !others.is_empty() => {
                let why = format!("{} without the version that was sent last", ranked(&others));
                (Form::Whole(Some(Comparison::new(base))), Some(why))
            }
            _ if !unable.is_empty() => {
                (Form::Plain, Some(format!("{} without `delta`", ranked(&unable))))
            }
            Err(lost) => (Form::Whole(None), Some(lost)),
            Ok(_) if !others.is_empty() => {
                let why = format!("{} without the version that was sent last", ranked(&others));
                (Form::Whole(None), Some(why))
            }
            Ok(base) => (Form::Changes(Comparison::new(base)), None),
        };
        let asked = self.attests == Attests::Asked;
        if let Some(why) = &why
            && (asked || self.is_part && !matches!(form, Form::Whole(Some(_))))
        {
            let operation = if asked { message::ATTESTING } else { message::SENDING_A_PART };
            let error = Error::new(ErrorKind::Mismatch, operation, why);
            return Err(others.iter().fold(error, |error, rank| error.rank(*rank)));
        }
        self.form = form;
        // Rollouts take what is sent whole out of the copy as it is: nothing else would find damage there.
        let proven = match &self.form {
            Form::Changes(comparison) if self.attests != Attests::Not => {
                Some(comparison.base.clone())
            }
            Form::Whole(Some(comparison)) => Some(comparison.base.clone()),
            _ => None,
        };
        if let Some(base) = proven {
            let copies = self.copies.clone();
            let attested = self.copies.pool.start(move || copies.attest(&base.entries)).await;
            if let Err(error) = attested {
                tracing::error!(%error, "the copy of what was sent last is damaged");
                if self.is_part {
                    *lock(&self.kept) = Err(error.to_string());
                    return Err(error.rank(Rank::LEADER));
                }
                (self.form, why) = (Form::Whole(None), Some(error.to_string()));
            }
        }
        let attests = self.attests != Attests::Not && matches!(self.form, Form::Changes(_));
        lock(&self.made).report.attested = attests;
        match &mut self.form {
            // Each begins with the first of its weights.
            Form::Changes(comparison) if is_apart => {
                comparison.count();
                self.begun = Some(PartSet::new());
            }
            Form::Changes(comparison) => {
                let base = comparison.base.version();
                self.queue(None, &Head::Begin { of: None, base }, &[])?;
            }
            Form::Whole(Some(_)) => {}
            // Freed first, so that there is only one copy at a time.
            _ => {
                let lost = "whole weights were sent, and that update failed";
                *lock(&self.kept) = Err(lost.to_owned());
            }
        }
        lock(&self.made).report.whole = why;
        Ok(())
    }

    /// Makes tensors of the weights of the base that the stream did not bring, in their order: as unchanged, or whole.
    fn rest(&mut self) -> Result<()> {
        let (comparison, is_whole) = match &mut self.form {
            Form::Changes(comparison) => (comparison, false),
            Form::Whole(Some(comparison)) => (comparison, true),
            _ => return Ok(()),
        };
        let base = comparison.base.clone();
        let left = comparison.left();
        let (mut run, mut bytes) = (Vec::new(), 0);
        for at in left {
            let entry = &base.entries[at];
            let follows = entry.follows().cloned();
            if is_whole {
                let weight = Weight::from_meta(entry.meta.clone(), entry.view())?;
                self.ready.push_back(weight);
                lock(&self.made).weights.push(Sent::Kept { at, sum: 0, changed: false, follows });
                continue;
            }
            if bytes >= self.batch || self.is_of_another_part(&run, at) {
                self.flush(&mut run, Vec::new().into())?;
                bytes = 0;
            }
            bytes += entry.bytes().len();
            let cut = Cut::at(entry.meta.dtype, 1);
            let difference = Difference { cut, words: Vec::new(), len: 0, units: 0, sum: 0 };
            run.push(Again { at, difference, follows });
        }
        self.flush(&mut run, Vec::new().into())
    }

    /// The trainer's next weight.
    async fn next_of_trainer(&mut self) -> Result<Option<Weight>> {
        if self.held.is_some() || self.has_ended {
            return Ok(self.held.take());
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

    /// The next weights: those that are ready, or the first one after a wait if the threads have nothing to do. Deferred weights are in the
    /// batch of those that they follow.
    async fn gather(&mut self) -> Result<Vec<Weight>> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        loop {
            let is_there = self.held.is_some() || self.has_ended;
            let next = match is_there {
                true => self.held.take(),
                false => match self.weights.next().now_or_never() {
                    Some(next) => self.came(next)?,
                    None if batch.is_empty() && self.at_work.is_empty() => {
                        self.next_of_trainer().await?
                    }
                    None => break,
                },
            };
            let Some(weight) = next else { break };
            if bytes >= self.batch && !weight.is_deferred() {
                self.held = Some(weight);
                break;
            }
            weight.require_whole(message::COMPARING)?;
            bytes += weight.byte_len();
            batch.push(weight);
        }
        Ok(batch)
    }

    /// Has the threads encode weights, and compare those that the base has.
    fn start(&mut self, batch: Vec<Weight>) -> Result<()> {
        let find = |comparison: &mut Comparison| -> Result<Vec<Option<usize>>> {
            batch.iter().map(|weight| comparison.find(weight)).collect()
        };
        let (base, found) = match &mut self.form {
            Form::Changes(comparison) => {
                let found = find(comparison)?;
                (Some(comparison.base.clone()), found)
            }
            Form::Whole(Some(comparison)) => {
                // They replace those of the base, which are not sent then.
                find(comparison)?;
                (None, vec![None; batch.len()])
            }
            _ => (None, vec![None; batch.len()]),
        };
        let (copies, weights, places) = (self.copies.clone(), batch.clone(), found.clone());
        let (reads, at_work) = oneshot::channel();
        lock(&self.made).at_work.push(at_work);
        let work = self.copies.pool.start(move || {
            let worked = work_on(&weights, &places, base.as_deref(), &copies);
            // Nothing reads the base or the weights any more when `reads` is dropped.
            drop((weights, base));
            Ok((worked?, reads))
        });
        self.at_work.push_back(AtWork { work, batch, found });
        Ok(())
    }

    /// Waits for a batch. Returns what came of it; nothing if there is no memory for a copy: then the weights are sent as they are.
    async fn worked(
        &mut self,
        AtWork { work, batch, found }: AtWork,
    ) -> Result<Option<(Worked, Vec<Weight>, Vec<Option<usize>>)>> {
        match work.await {
            Ok((worked, _)) => Ok(Some((worked, batch, found))),
            Err(error)
                if error.kind() == ErrorKind::Resource
                    && matches!(self.form, Form::Whole(None)) =>
            {
                self.form = Form::Plain;
                self.ready.extend(batch);
                // What is made of the others is not needed. Copies are dropped when nobody writes to them.
                for AtWork { work, batch, .. } in std::mem::take(&mut self.at_work) {
                    drop(work.await);
                    self.ready.extend(batch);
                }
                let made = &mut *lock(&self.made);
                made.weights.clear();
                made.report.whole = Some(format!("no copy is kept: {error}"));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes tensors of what came of a batch.
    fn take(&mut self, worked: Worked, batch: &[Weight], found: &[Option<usize>]) -> Result<()> {
        let Worked { compared: Compared { weights, values }, new } = worked;
        let (mut differences, mut new) = (weights.into_iter(), new.into_iter());
        let (mut run, mut begin, mut end) = (Vec::new(), 0, 0);
        for (weight, found) in batch.iter().zip(found) {
            let follows = match weight.is_deferred() {
                true => self.followed.clone(),
                false => {
                    self.followed = Some(weight.meta().name.clone());
                    None
                }
            };
            match found {
                Some(at) => {
                    let Some(difference) = differences.next() else { continue };
                    // A batch may be a little more than a bucket. A tensor that is more than one is put together in host memory.
                    let is_full = end > begin && end - begin + difference.len > self.batch;
                    if is_full || self.is_of_another_part(&run, *at) {
                        self.flush(&mut run, values.slice(begin..end))?;
                        begin = end;
                    }
                    let report = &mut lock(&self.made).report;
                    let name = weight.meta().dtype.name();
                    let of_type: &mut ChangedElements = match report.elements.get_mut(name) {
                        Some(counts) => counts,
                        None => report.elements.entry(name.to_owned()).or_default(),
                    };
                    of_type.compared += weight.meta().elements()?;
                    of_type.changed += difference.units;
                    report.changed_weights += u64::from(difference.units > 0);
                    end += difference.len;
                    run.push(Again { at: *at, difference, follows });
                }
                None => {
                    self.flush(&mut run, values.slice(begin..end))?;
                    begin = end;
                    let Some(entry) = new.next() else { continue };
                    let entry = entry.following(follows);
                    self.begin(entry.part())?;
                    let whole = Weight::from_meta(entry.meta.clone(), entry.view())?;
                    self.ready.push_back(whole.with_treatment(weight.treatment().clone()));
                    lock(&self.made).weights.push(Sent::New(entry));
                }
            }
        }
        self.flush(&mut run, values.slice(begin..end))?;
        self.batches += 1;
        if self.batches.is_multiple_of(BATCHES_OF_A_BUCKET)
            && let Some(last) = self.ready.pop_back()
        {
            self.ready.push_back(last.ending_bucket());
        }
        Ok(())
    }

    /// Makes tensors of weights that follow one another, and of their values.
    fn flush(&mut self, run: &mut Vec<Again>, values: Storage) -> Result<()> {
        if run.is_empty() {
            return Ok(());
        }
        let part = self.begin_part(run[0].at)?;
        let within = match &self.form {
            Form::Changes(comparison) if part.is_some() => Some(&comparison.within),
            _ => None,
        };
        let record = |again: &Again| Record {
            weight: within.map_or(again.at as u32, |within| within[again.at]),
            tile: again.difference.cut.tile() as u32,
            len: again.difference.len,
        };
        let (of, records) = (self.name_of(part), run.iter().map(record).collect());
        let words = run.iter().flat_map(|again| &again.difference.words);
        self.queue(part, &Head::Weights { of, records }, words)?;
        if !values.is_empty() {
            let values = message::values(self.tensors, values.clone())?;
            self.ready.push_back(of_part(values, part));
            self.tensors += 1;
        }
        let made = &mut *lock(&self.made);
        let mut of = Vec::new();
        for Again { at, difference: Difference { cut, words, units, sum, .. }, follows } in
            run.drain(..)
        {
            made.weights.push(Sent::Kept { at, sum, changed: units > 0, follows });
            if units > 0 {
                of.push((at, Change { cut, words }));
            }
        }
        if !of.is_empty() {
            made.changes.push(Changed { of, values });
        }
        Ok(())
    }

    fn queue<'w>(
        &mut self,
        part: Option<u32>,
        head: &Head,
        words: impl IntoIterator<Item = &'w u32>,
    ) -> Result<()> {
        self.ready.push_back(of_part(message::tensor(self.tensors, head, words)?, part));
        self.tensors += 1;
        Ok(())
    }

    /// Whether a weight of the base is in another part than those before it, and parts travel alone.
    fn is_of_another_part(&self, run: &[Again], at: usize) -> bool {
        let (Form::Changes(comparison), Some(_), Some(last)) =
            (&self.form, &self.begun, run.last())
        else {
            return false;
        };
        let part = |at: usize| comparison.base.entries.get(at).map(Entry::part);
        part(last.at) != part(at)
    }

    /// The part of a weight of the base, whose changes have begun then; `None` where parts do not travel alone.
    fn begin_part(&mut self, at: usize) -> Result<Option<u32>> {
        let (Form::Changes(comparison), Some(_)) = (&self.form, &self.begun) else {
            return Ok(None);
        };
        let Some(part) = comparison.base.entries.get(at).map(Entry::part) else { return Ok(None) };
        self.begin(part)?;
        Ok(Some(part))
    }

    /// Begins the changes of a part, unless they have.
    fn begin(&mut self, part: u32) -> Result<()> {
        let (Form::Changes(comparison), Some(begun)) = (&self.form, &mut self.begun) else {
            return Ok(());
        };
        if !begun.insert(part) {
            return Ok(());
        }
        let (of, base) = (self.name_of(Some(part)), comparison.base.version_of(&[part].into()));
        self.queue(Some(part), &Head::Begin { of, base }, &[])
    }

    fn name_of(&self, part: Option<u32>) -> message::Of {
        let names = part.map(|part| self.copies.parts.named(&[part].into()));
        names.and_then(|mut names| names.pop())
    }

    /// Ends the changes of a part or of the version.
    fn end_part(&mut self, part: Option<u32>) -> Result<()> {
        let Form::Changes(comparison) = &self.form else { return Ok(()) };
        let made = lock(&self.made);
        let is_in = |entry: &Entry| part.is_none_or(|part| entry.part() == part);
        let version = made.weights.iter().fold(0, |version, sent| {
            let (entry, sum) = match sent {
                Sent::New(entry) => (entry, 0),
                Sent::Kept { at, sum, .. } => (&comparison.base.entries[*at], *sum),
            };
            if is_in(entry) { entry.add_to(version, sum) } else { version }
        });
        let attested = made.report.attested;
        drop(made);
        let of = self.name_of(part);
        self.queue(part, &Head::End { of, version, attested }, &[])
    }

    /// Ends the update after the last weight.
    fn end(&mut self) -> Result<()> {
        if self.is_part {
            self.rest()?;
        }
        if let Form::Changes(comparison) = &self.form {
            let mut made = lock(&self.made);
            let all = made.weights.len() == comparison.base.entries.len();
            let in_order =
                |(n, sent): (usize, &Sent)| matches!(sent, Sent::Kept { at, .. } if *at == n);
            made.reused = Some(all && made.weights.iter().enumerate().all(in_order));
            drop(made);
            match self.begun.is_some() {
                false => self.end_part(None)?,
                true => {
                    for part in self.copies.parts.all().iter() {
                        self.begin(part)?;
                        self.end_part(Some(part))?;
                    }
                }
            }
        }
        self.form = Form::Ended;
        Ok(())
    }
}

/// A tensor of changes as one of the part that it is about.
fn of_part(tensor: Weight, part: Option<u32>) -> Weight {
    match part {
        Some(part) => tensor.in_part(part),
        None => tensor,
    }
}

/// Ranks, for a message.
fn ranked(ranks: &[Rank]) -> String {
    let named: Vec<String> = ranks.iter().take(8).map(Rank::to_string).collect();
    let more = if ranks.len() > named.len() { ", …" } else { "" };
    format!("{} rollouts (rank {}{more}) are", ranks.len(), named.join(", "))
}

/// Encodes weights, and compares those that the base has. Blocks.
///
/// # Errors
///
/// Those of encoding; `Resource` if there is no memory for a new weight.
fn work_on(
    batch: &[Weight],
    found: &[Option<usize>],
    base: Option<&Shadow>,
    copies: &Copies,
) -> Result<Worked> {
    let mut kept: Vec<(&Weight, &dyn ShadowBytes)> = Vec::new();
    let (mut new, mut late) = (Vec::new(), Vec::new());
    for (weight, found) in batch.iter().zip(found) {
        match found.and_then(|at| base?.entries.get(at)) {
            Some(entry) => kept.push((weight, entry.bytes())),
            None if weight.is_deferred() && !kept.is_empty() => late.push(weight.clone()),
            None => new.push(weight.clone()),
        }
    }
    // Deferred weights get their bytes when the others are encoded.
    let mut encoded = copies.encoded(&new)?.into_iter();
    let compared = copies.memory.compare(&kept, &copies.pool)?;
    let mut late = copies.encoded(&late)?.into_iter().peekable();
    let is_new = batch.iter().zip(found).filter(|(_, found)| found.is_none());
    let new = is_new.filter_map(|(weight, _)| {
        let is_late = late.peek().is_some_and(|entry| entry.meta == *weight.meta());
        if is_late { late.next() } else { encoded.next() }
    });
    let new = new.collect();
    Ok(Worked { compared, new })
}
