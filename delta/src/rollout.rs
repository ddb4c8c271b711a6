//! A rollout that receives changes and returns whole weights.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use engine_core::memory::Pool;
use engine_core::plan::{ALIGNMENT, BucketLayout, Piece};
use engine_core::{
    Base, Bases, BucketContent, CheckpointEngine, EngineContext, Error, ErrorKind, Prepared,
    PreparedRollout, ReceivedBucket, ReceivedWeights, Result, Role, RolloutEngine, Storage,
    Version, Weight,
};

use crate::ATTESTED_EVERY;
use crate::message::{self, APPLYING, Head, Record};
use crate::shadow::{self, Entry, Shadow};
use crate::tiles::Cut;

pub(crate) fn in_front(
    prepared: PreparedRollout,
    context: &EngineContext,
) -> Result<PreparedRollout> {
    let bases = context.bases.clone();
    let pool = Pool::new(context.threads(Role::Rollout))?;
    let metadata = prepared.metadata().clone();
    Ok(Prepared::new(metadata, move |place| async move {
        let engine = prepared.join(place).await?;
        let rollout = DeltaRollout { engine, bases, pool, kept: Kept::default() };
        Ok(Box::new(rollout) as Box<dyn RolloutEngine>)
    }))
}

#[derive(Debug)]
struct DeltaRollout {
    engine: Box<dyn RolloutEngine>,
    bases: Bases,
    pool: Pool,
    kept: Kept,
}

/// What the rollout keeps of the last version that was complete here.
#[derive(Debug, Default)]
struct Kept {
    shadow: Option<Shadow>,
    /// Versions that came as changes since the sums were last computed from memory.
    since_attested: u64,
    /// How the last changes' weights lay in buckets: a digest of many names takes time, and most updates have the same.
    layouts: Vec<Arc<BucketLayout>>,
}

impl Kept {
    /// The layout of these parts: the one that the last update had in this place, if it is the same.
    fn layout(&mut self, index: usize, pieces: Vec<Piece>) -> Arc<BucketLayout> {
        if let Some(layout) = self.layouts.get(index).filter(|it| it.pieces() == pieces) {
            return layout.clone();
        }
        let layout = Arc::new(BucketLayout::new(pieces));
        self.layouts.truncate(index);
        self.layouts.push(layout.clone());
        layout
    }
}

#[async_trait]
impl CheckpointEngine for DeltaRollout {
    async fn finalize(self: Box<Self>) -> Result<()> {
        self.engine.finalize().await
    }
}

#[async_trait]
impl RolloutEngine for DeltaRollout {
    async fn receive_weights(&mut self, version: Option<Version>) -> Result<ReceivedWeights<'_>> {
        let Self { engine, bases, pool, kept } = self;
        let has = kept.shadow.as_ref().map(|shadow| Base::Has(shadow.version()));
        bases.say(has.unwrap_or(Base::Missing));
        let received = engine.receive_weights(version).await?;
        Ok(received.through(|received| {
            let receiving = Receiving { received, pool, form: Form::Unknown(kept) };
            futures::stream::try_unfold(receiving, |mut receiving| async move {
                match receiving.next().await {
                    Ok(bucket) => Ok(bucket.map(|bucket| (bucket, receiving))),
                    Err(Ended::ByEngine(error)) => Err(error),
                    Err(Ended::Here(error)) => {
                        let report = engine_core::ErrorReport::from(&error);
                        receiving.received.fail(error);
                        Err(report.into())
                    }
                }
            })
        }))
    }
}

/// Why an update ended.
enum Ended {
    ByEngine(Error),
    Here(Error),
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Self::Here(error)
    }
}

/// An update that is being received.
struct Receiving<'a, 'k> {
    received: ReceivedWeights<'a>,
    pool: &'k Pool,
    form: Form<'k>,
}

/// The form in which its weights come.
enum Form<'k> {
    /// Nothing has come yet.
    Unknown(&'k mut Kept),
    Whole(Absorbing<'k>),
    Changes(Box<Patching<'k>>),
    /// The update is complete.
    Over,
}

impl Receiving<'_, '_> {
    async fn next(&mut self) -> std::result::Result<Option<ReceivedBucket>, Ended> {
        loop {
            match &mut self.form {
                Form::Unknown(_) => {
                    let first = self.received.next_bucket().await.map_err(Ended::ByEngine)?;
                    let piece = first.as_ref().and_then(|first| first.layout().pieces().first());
                    let has_changes = piece.is_some_and(|p| message::is_reserved(&p.meta.name));
                    let Form::Unknown(kept) = std::mem::replace(&mut self.form, Form::Over) else {
                        return Ok(None);
                    };
                    let Some(first) = first else {
                        kept.shadow = Some(Shadow::default());
                        return Ok(None);
                    };
                    if has_changes {
                        self.received.put_back(first);
                        let patching = Patching::new(kept);
                        let is_proven = patching.is_proven.clone();
                        self.received.before_confirm(move || match is_proven.load(ORDER) {
                            true => Ok(()),
                            false => Err(refused("the changes have no end")),
                        });
                        self.form = Form::Changes(Box::new(patching));
                    } else {
                        let mut absorbing = Absorbing::new(kept);
                        absorbing.bucket(&first, self.pool)?;
                        self.form = Form::Whole(absorbing);
                        return Ok(Some(first));
                    }
                }
                Form::Whole(absorbing) => {
                    let next = self.received.next_bucket().await.map_err(Ended::ByEngine)?;
                    match &next {
                        Some(bucket) => absorbing.bucket(bucket, self.pool)?,
                        None => {
                            absorbing.complete();
                            self.form = Form::Over;
                        }
                    }
                    return Ok(next);
                }
                Form::Changes(patching) => {
                    let next = self.received.next_tensor().await.map_err(Ended::ByEngine)?;
                    let Some(tensor) = next else {
                        let (tensors, bytes) = patching.complete();
                        self.received.amend(|report| {
                            (report.tensors, report.bytes) = (tensors, bytes);
                        });
                        self.form = Form::Over;
                        return Ok(None);
                    };
                    if let Some(bucket) = patching.tensor(tensor, self.pool).await? {
                        return Ok(Some(bucket.with_pool(self.pool.clone())));
                    }
                }
                Form::Over => return Ok(None),
            }
        }
    }
}

/// Enough, because the engine reads it on the task that wrote it.
const ORDER: Ordering = Ordering::Relaxed;

fn refused(words: impl Into<String>) -> Error {
    Error::new(ErrorKind::Protocol, APPLYING, words)
}

/// Copies whole weights as they come.
struct Absorbing<'k> {
    kept: &'k mut Kept,
    /// Memory of the previous version, which is used again, so that only one copy exists.
    old: HashMap<Arc<str>, Entry>,
    entries: Vec<Entry>,
    /// There was no memory for a copy. The rollout goes on without one.
    has_no_room: bool,
}

impl<'k> Absorbing<'k> {
    fn new(kept: &'k mut Kept) -> Self {
        let old = kept.shadow.take().map(|shadow| shadow.entries).unwrap_or_default();
        let old = old.into_iter().map(|entry| (entry.meta.name.clone(), entry)).collect();
        Self { kept, old, entries: Vec::new(), has_no_room: false }
    }

    /// Copies the parts of a bucket.
    ///
    /// # Errors
    ///
    /// Those of reading the bucket. A lack of memory for the copy is not an error.
    fn bucket(&mut self, bucket: &ReceivedBucket, pool: &Pool) -> Result<()> {
        if self.has_no_room {
            return Ok(());
        }
        match self.copy(bucket, pool) {
            Err(error) if error.kind() == ErrorKind::Resource => {
                tracing::warn!(%error, "no copy is kept: the next version comes whole as well");
                self.has_no_room = true;
                (self.old, self.entries) = Default::default();
                Ok(())
            }
            copied => copied,
        }
    }

    fn copy(&mut self, bucket: &ReceivedBucket, pool: &Pool) -> Result<()> {
        let mut whole = Vec::new();
        for piece in bucket.pieces() {
            if piece.start == 0 {
                let old = self.old.remove(&piece.meta.name).filter(|old| old.meta == piece.meta);
                let entry = old.map_or_else(|| Entry::new(piece.meta.clone()), Ok)?;
                if piece.bytes.len() == piece.meta.byte_len()? {
                    whole.push((self.entries.len(), piece.bytes));
                    self.entries.push(entry);
                    continue;
                }
                self.entries.push(entry);
            }
            // A part of a large weight. The engine has checked that the parts follow one another.
            if let Some(entry) = self.entries.last_mut() {
                entry.write(piece.start, &piece.bytes)?;
                if piece.start + piece.bytes.len() == piece.meta.byte_len()? {
                    entry.seal(pool);
                }
            }
        }
        let mut parts = whole.into_iter().peekable();
        let Some((first, _)) = parts.peek() else { return Ok(()) };
        let first = *first;
        let due = self.entries[first..].iter_mut().enumerate().filter_map(|(at, entry)| {
            let (_, bytes) = parts.next_if(|(index, _)| *index == first + at)?;
            Some((entry, bytes))
        });
        let copied = pool.map(due, |(entry, bytes)| {
            entry.write(0, &bytes)?;
            entry.seal(pool);
            Ok(())
        });
        copied.into_iter().collect()
    }

    fn complete(&mut self) {
        self.kept.since_attested = 0;
        if !self.has_no_room {
            self.kept.shadow = Some(Shadow { entries: std::mem::take(&mut self.entries) });
        }
    }
}

/// A weight of the version that comes as changes.
enum Came {
    /// At this index of the base.
    Kept(usize),
    /// The next new weight.
    New,
}

/// Applies changes as they come. Takes them back if it is dropped before the version is complete.
struct Patching<'k> {
    kept: &'k mut Kept,
    /// The weights of the base; `None` where one is with the threads.
    base: Vec<Option<Entry>>,
    number: Option<u64>,
    met: Vec<bool>,
    /// Old values, with which the changes are taken back.
    undo: Vec<(usize, Cut, Vec<u8>)>,
    came: Vec<Came>,
    new: Vec<Entry>,
    names: HashSet<Arc<str>>,
    has_begun: bool,
    is_proven: Arc<AtomicBool>,
    /// The base can no longer be restored.
    is_damaged: bool,
    index: u64,
}

/// A weight and its changes, while the threads have them.
struct Due {
    at: usize,
    entry: Entry,
    cut: Cut,
    changes: Vec<u8>,
}

impl<'k> Patching<'k> {
    fn new(kept: &'k mut Kept) -> Self {
        let shadow = kept.shadow.take();
        let number = shadow.as_ref().map(Shadow::version);
        let base: Vec<_> =
            shadow.map(|shadow| shadow.entries).unwrap_or_default().into_iter().map(Some).collect();
        Self {
            kept,
            met: vec![false; base.len()],
            base,
            number,
            undo: Vec::new(),
            came: Vec::new(),
            new: Vec::new(),
            names: HashSet::new(),
            has_begun: false,
            is_proven: Arc::default(),
            is_damaged: false,
            index: 0,
        }
    }

    /// Processes a tensor. Returns the weights that it brings.
    async fn tensor(&mut self, tensor: Weight, pool: &Pool) -> Result<Option<ReceivedBucket>> {
        if self.is_proven.load(ORDER) {
            return Err(refused("a weight after the last one").tensor(tensor.name()));
        }
        let storage = tensor.storage().ok_or_else(|| refused("a tensor without bytes"))?;
        if !message::is_reserved(tensor.name()) {
            return self.new_weight(&tensor, storage, pool).map(Some);
        }
        let (head, bodies) = message::read(&storage.to_host()?)?;
        match head {
            Head::Begin { base } if !self.has_begun => {
                self.has_begun = true;
                if self.number != Some(base) {
                    let message = "these are changes to another version than this rank has";
                    return Err(Error::new(ErrorKind::Mismatch, APPLYING, message));
                }
                Ok(None)
            }
            Head::Weights(records) if self.has_begun => {
                let due = self.due(&records, &bodies)?;
                drop((tensor, bodies));
                self.apply(due, pool).await.map(Some)
            }
            Head::End { version } if self.has_begun => {
                self.prove(version, pool)?;
                Ok(None)
            }
            _ => Err(refused("changes in another order than they have")),
        }
    }

    /// Takes the weights that the records name out of the base.
    fn due(&mut self, records: &[Record], bodies: &[u8]) -> Result<Vec<Due>> {
        let mut rest = bodies;
        let mut due = Vec::with_capacity(records.len());
        for record in records {
            let at = record.weight as usize;
            let body = usize::try_from(record.len).ok().and_then(|len| rest.split_at_checked(len));
            let entry = self.base.get_mut(at).filter(|_| !self.met[at]).and_then(Option::take);
            let Some(entry) = entry else {
                self.put_back(due);
                return Err(refused(format!(
                    "there is no weight {at} in the base, or it came already"
                )));
            };
            let cut = Cut::of(entry.meta.dtype, record.tile);
            let name = entry.meta.name.clone();
            let (Some((body, others)), Some(cut)) = (body, cut) else {
                self.base[at] = Some(entry);
                self.put_back(due);
                return Err(refused("changes of another size than is there").tensor(&*name));
            };
            rest = others;
            self.met[at] = true;
            due.push(Due { at, entry, cut, changes: body.to_vec() });
        }
        if !rest.is_empty() {
            self.put_back(due);
            return Err(refused(format!("{} bytes of changes too many", rest.len())));
        }
        Ok(due)
    }

    fn put_back(&mut self, due: Vec<Due>) {
        due.into_iter().for_each(|Due { at, entry, .. }| self.base[at] = Some(entry));
    }

    /// Applies changes on all threads. Returns the whole weights.
    async fn apply(&mut self, due: Vec<Due>, pool: &Pool) -> Result<ReceivedBucket> {
        // The base lacks what the threads have, so an update that is dropped meanwhile cannot restore it.
        let was_damaged = std::mem::replace(&mut self.is_damaged, true);
        let threads = pool.clone();
        let work = pool.start(move || {
            Ok(threads.map(due, |mut due| {
                let applied = match due.changes.is_empty() {
                    true => Ok(()),
                    false => due.entry.exchange(due.cut, &mut due.changes),
                };
                (due, applied)
            }))
        });
        let mut applied = Ok(());
        let mut views = Vec::new();
        for (due, result) in work.await? {
            let Due { at, entry, cut, changes } = due;
            applied = applied.and(result);
            self.came.push(Came::Kept(at));
            views.push((entry.meta.clone(), entry.view()));
            if !changes.is_empty() {
                self.undo.push((at, cut, changes));
            }
            self.base[at] = Some(entry);
        }
        applied?;
        self.is_damaged = was_damaged;
        self.bucket(views)
    }

    fn new_weight(
        &mut self,
        tensor: &Weight,
        storage: &Storage,
        pool: &Pool,
    ) -> Result<ReceivedBucket> {
        if !self.has_begun {
            return Err(refused("a weight before the changes").tensor(tensor.name()));
        }
        let mut entry = Entry::new(tensor.meta().clone())?;
        entry.write(0, storage)?;
        entry.seal(pool);
        let view = (entry.meta.clone(), entry.view());
        self.came.push(Came::New);
        self.new.push(entry);
        self.bucket(vec![view])
    }

    /// Makes a bucket of weights.
    fn bucket(&mut self, views: Vec<(engine_core::TensorMeta, Storage)>) -> Result<ReceivedBucket> {
        let (mut pieces, mut content, mut offset) = (Vec::new(), Vec::new(), 0_u64);
        for (meta, bytes) in views {
            if !self.names.insert(meta.name.clone()) {
                return Err(refused("a weight of this name came already").tensor(&*meta.name));
            }
            let len = bytes.len();
            pieces.push(Piece { meta, start: 0, len, offset });
            offset = (offset + len).next_multiple_of(ALIGNMENT);
            content.push(bytes);
        }
        let index = self.index;
        self.index += 1;
        let layout = self.kept.layout(index as usize, pieces);
        ReceivedBucket::new(index, layout, BucketContent::List(content.into()))
    }

    /// The weights of the new version, in its order.
    fn entries(&self) -> impl Iterator<Item = &Entry> {
        let mut new = self.new.iter();
        self.came.iter().filter_map(move |came| match came {
            Came::Kept(at) => self.base[*at].as_ref(),
            Came::New => new.next(),
        })
    }

    /// Compares the whole version with the trainer's.
    fn prove(&mut self, version: u64, pool: &Pool) -> Result<()> {
        let here = self.entries().fold(0, |version, entry| entry.add_to(version, 0));
        if here != version {
            self.is_damaged = true;
            let message = "the version that came of the changes is not the trainer's";
            return Err(Error::new(ErrorKind::Digest, APPLYING, message));
        }
        if self.kept.since_attested + 1 >= ATTESTED_EVERY {
            shadow::attest(self.entries(), pool).inspect_err(|_| self.is_damaged = true)?;
            self.kept.since_attested = 0;
        } else {
            self.kept.since_attested += 1;
        }
        self.is_proven.store(true, ORDER);
        Ok(())
    }

    /// Makes the version the base of later changes, now that it is active. Returns its number of weights, and their bytes.
    fn complete(&mut self) -> (u64, u64) {
        self.undo.clear();
        let mut new = std::mem::take(&mut self.new).into_iter();
        let came = std::mem::take(&mut self.came);
        let entries = came.into_iter().filter_map(|came| match came {
            Came::Kept(at) => self.base[at].take(),
            Came::New => new.next(),
        });
        let shadow = Shadow { entries: entries.collect() };
        let counts = (shadow.entries.len() as u64, shadow.bytes());
        self.kept.shadow = Some(shadow);
        self.base.clear();
        counts
    }
}

impl Drop for Patching<'_> {
    fn drop(&mut self) {
        if self.base.is_empty() || self.is_damaged {
            return;
        }
        for (at, cut, mut changes) in std::mem::take(&mut self.undo) {
            let taken_back = self.base[at].as_mut().map(|entry| entry.exchange(cut, &mut changes));
            if let Some(Err(error)) = taken_back {
                tracing::warn!(%error, "changes cannot be taken back: the next version comes whole");
                return;
            }
        }
        let entries: Option<Vec<Entry>> = std::mem::take(&mut self.base).into_iter().collect();
        self.kept.shadow = entries.map(|entries| Shadow { entries });
    }
}
