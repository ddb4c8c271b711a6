//! A rollout that receives changes and returns whole weights.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use engine_core::changes::{Cut, ShadowPart};
use engine_core::plan::{ALIGNMENT, BucketLayout, Piece};
use engine_core::{
    ArenaArc, Base, Bases, BucketContent, CheckpointEngine, EngineContext, Error, ErrorKind,
    PartReport, Prepared, PreparedRollout, ReceivedBucket, ReceivedWeights, Result, RolloutEngine,
    Storage, TensorMeta, Version, Weight,
};

use crate::message::{self, APPLYING, Head, Record};
use crate::parts;
use crate::shadow::{Change, Copies, Entry, Shadow};

pub(crate) fn in_front(
    prepared: PreparedRollout,
    context: &EngineContext,
    copies: Copies,
) -> Result<PreparedRollout> {
    let bases = context.bases.clone();
    let metadata = prepared.metadata().clone();
    Ok(Prepared::new(metadata, move |place| async move {
        let engine = prepared.join(place).await?;
        let rollout = DeltaRollout { engine, bases, copies, kept: Kept::default() };
        Ok(Box::new(rollout) as Box<dyn RolloutEngine>)
    }))
}

#[derive(Debug)]
struct DeltaRollout {
    engine: Box<dyn RolloutEngine>,
    bases: Bases,
    copies: Copies,
    kept: Kept,
}

/// What the rollout keeps of the last version that was complete here.
#[derive(Debug, Default)]
struct Kept {
    shadow: Option<Shadow>,
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
        let Self { engine, bases, copies, kept } = self;
        let has = kept.shadow.as_ref().map(|shadow| Base::Has(shadow.version()));
        bases.say(has.unwrap_or(Base::Missing));
        let received = engine.receive_weights(version).await?;
        Ok(whole(received, copies, kept))
    }

    fn adopt<'a>(&'a mut self, received: ReceivedWeights<'a>) -> ReceivedWeights<'a> {
        whole(received, &self.copies, &mut self.kept)
    }
}

/// Makes whole weights of what comes, and keeps a copy of them.
fn whole<'a>(
    received: ReceivedWeights<'a>,
    copies: &'a Copies,
    kept: &'a mut Kept,
) -> ReceivedWeights<'a> {
    received.through(|received| {
        let receiving = Receiving { received, copies, form: Form::Unknown(kept) };
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
    })
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
    copies: &'k Copies,
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
                        let patching = Patching::new(kept, self.copies);
                        let is_proven = patching.is_proven.clone();
                        self.received.before_confirm(move || match is_proven.load(ORDER) {
                            true => Ok(()),
                            false => Err(refused("the changes have no end")),
                        });
                        self.form = Form::Changes(Box::new(patching));
                    } else {
                        let mut absorbing = Absorbing::new(kept, self.copies);
                        absorbing.bucket(&first)?;
                        self.form = Form::Whole(absorbing);
                        return Ok(Some(first));
                    }
                }
                Form::Whole(absorbing) => {
                    let next = self.received.next_bucket().await.map_err(Ended::ByEngine)?;
                    match &next {
                        Some(bucket) => absorbing.bucket(bucket)?,
                        None => {
                            let parts = absorbing.complete();
                            self.received.amend(|report| report.parts = parts);
                            self.form = Form::Over;
                        }
                    }
                    return Ok(next);
                }
                Form::Changes(patching) => {
                    let next = self.received.next_tensor().await.map_err(Ended::ByEngine)?;
                    let Some(tensor) = next else {
                        let (tensors, bytes, parts) = patching.complete();
                        self.received.amend(|report| {
                            (report.tensors, report.bytes) = (tensors, bytes);
                            report.parts = parts;
                        });
                        self.form = Form::Over;
                        return Ok(None);
                    };
                    if let Some(bucket) = patching.tensor(tensor).await? {
                        return Ok(Some(bucket.with_pool(self.copies.pool.clone())));
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
    copies: &'k Copies,
    /// Memory of the previous version, which is used again, so that only one copy exists.
    old: HashMap<Arc<str>, Entry>,
    entries: Vec<Entry>,
    /// There was no memory for a copy. The rollout goes on without one.
    has_no_room: bool,
}

impl<'k> Absorbing<'k> {
    fn new(kept: &'k mut Kept, copies: &'k Copies) -> Self {
        let old = kept.shadow.take().map(|shadow| shadow.entries).unwrap_or_default();
        let old = old.into_iter().map(|entry| (entry.meta.name.clone(), entry)).collect();
        Self { kept, copies, old, entries: Vec::new(), has_no_room: false }
    }

    /// Copies the parts of a bucket.
    ///
    /// # Errors
    ///
    /// Those of reading the bucket. A lack of memory for the copy is not an error.
    fn bucket(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        if self.has_no_room {
            return Ok(());
        }
        match self.copy(bucket) {
            Err(error) if error.kind() == ErrorKind::Resource => {
                tracing::warn!(%error, "no copy is kept: the next version comes whole as well");
                self.has_no_room = true;
                (self.old, self.entries) = Default::default();
                Ok(())
            }
            copied => copied,
        }
    }

    fn copy(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        // A bucket may begin within a weight. The engine has checked that the parts follow one another.
        let first = self.entries.len().saturating_sub(1);
        let mut parts = Vec::new();
        let (mut places, mut new) = (Vec::new(), Vec::new());
        let mut next = self.entries.len();
        for piece in bucket.pieces() {
            if piece.start == 0 {
                let old = self.old.remove(&piece.meta.name).filter(|old| old.meta == piece.meta);
                if old.is_none() {
                    new.push(piece.meta.clone());
                }
                places.push(old);
                next += 1;
            }
            let of = next.saturating_sub(1 + first);
            parts.push(ShadowPart { of, start: piece.start, bytes: piece.bytes });
        }
        let mut new = self.copies.allocate(new)?.into_iter();
        self.entries.extend(places.into_iter().filter_map(|old| old.or_else(|| new.next())));
        let entries = self.entries.get_mut(first..).unwrap_or_default();
        self.copies.write(entries, &parts)?;
        let from = usize::from(parts.iter().all(|part| part.of > 0));
        let is_whole = parts
            .last()
            .zip(entries.last())
            .is_none_or(|(part, entry)| part.start + part.bytes.len() == entry.bytes().len());
        let to = entries.len() - usize::from(!is_whole);
        self.copies.seal(entries.get_mut(from..to).unwrap_or_default())
    }

    /// Makes the version the base of later changes. Returns its parts; none without a copy.
    fn complete(&mut self) -> BTreeMap<String, PartReport> {
        if self.has_no_room {
            return BTreeMap::new();
        }
        let shadow = Shadow { entries: std::mem::take(&mut self.entries) };
        let parts =
            parts::report(&self.copies.parts, shadow.entries.iter().map(|it| (it, 0, true)));
        self.kept.shadow = Some(shadow);
        parts
    }
}

/// A weight of the version that comes as changes.
enum Came {
    /// At this index of the base.
    Kept(usize),
    /// The next new weight.
    New,
}

/// Whether a weight is in a part; all are in the whole version.
fn is_of(entry: Option<&Entry>, part: Option<u32>) -> bool {
    part.is_none_or(|part| entry.is_some_and(|entry| entry.part() == part))
}

fn other_parts(of: &str) -> Error {
    let message = format!(
        "these are changes of the part `{of}`, which this rank's `parts` do not have: name them as the trainer does"
    );
    Error::new(ErrorKind::Mismatch, APPLYING, message)
}

fn twice(name: &str) -> Error {
    refused("a weight of this name came already").tensor(name)
}

/// The changes of a part, or of the whole version.
#[derive(Debug)]
struct Section {
    /// Where its weights are in the base.
    places: Vec<usize>,
    /// Whether all of it has come, and is what the trainer has.
    is_proven: bool,
}

/// Applies changes as they come. Takes them back if it is dropped before the version is complete.
struct Patching<'k> {
    kept: &'k mut Kept,
    copies: &'k Copies,
    /// The weights of the base; `None` where one is with the threads.
    base: Vec<Option<Entry>>,
    has_base: bool,
    /// What its heads are about: the whole version, or its parts by their numbers.
    sections: BTreeMap<Option<u32>, Section>,
    met: Vec<bool>,
    /// Weights whose values are the next tensor.
    due: Vec<(usize, Change)>,
    /// Old values, with which changes are taken back.
    undo: Vec<(Vec<(usize, Change)>, Storage)>,
    came: Vec<Came>,
    new: Vec<Entry>,
    /// Names of new weights.
    new_names: HashSet<Arc<str>>,
    /// The indices of the base's weights by their names, once there is a new weight.
    places: Option<HashMap<Arc<str>, usize>>,
    is_proven: Arc<AtomicBool>,
    /// The base can no longer be restored.
    is_damaged: bool,
    index: u64,
}

impl<'k> Patching<'k> {
    fn new(kept: &'k mut Kept, copies: &'k Copies) -> Self {
        let shadow = kept.shadow.take();
        let has_base = shadow.is_some();
        let base: Vec<_> =
            shadow.map(|shadow| shadow.entries).unwrap_or_default().into_iter().map(Some).collect();
        Self {
            kept,
            copies,
            met: vec![false; base.len()],
            base,
            has_base,
            sections: BTreeMap::new(),
            due: Vec::new(),
            undo: Vec::new(),
            came: Vec::new(),
            new: Vec::new(),
            new_names: HashSet::new(),
            places: None,
            is_proven: Arc::default(),
            is_damaged: false,
            index: 0,
        }
    }

    /// Processes a tensor. Returns the weights that it brings.
    async fn tensor(&mut self, tensor: Weight) -> Result<Option<ReceivedBucket>> {
        let storage = tensor.storage().ok_or_else(|| refused("a tensor without bytes"))?.clone();
        let is_reserved = message::is_reserved(tensor.name());
        if !self.due.is_empty() {
            if !is_reserved {
                return Err(refused("a weight in place of values").tensor(tensor.name()));
            }
            let due = std::mem::take(&mut self.due);
            drop(tensor);
            return self.apply(due, storage).await.map(Some);
        }
        if !is_reserved {
            return self.new_weight(&tensor, storage).map(Some);
        }
        let (head, words) = message::read(&storage.to_host()?)?;
        match head {
            Head::Begin { of, base } => {
                self.begin(of.as_deref(), base)?;
                Ok(None)
            }
            Head::Weights { of, records } => {
                let part = self.number_of(of.as_deref())?;
                let due = self.due(part, &records, &words)?;
                if records.iter().any(|record| record.len > 0) {
                    self.due = due;
                    return Ok(None);
                }
                self.apply(due, Vec::new().into()).await.map(Some)
            }
            Head::End { of, version, attested } => {
                let part = self.number_of(of.as_deref())?;
                self.section(part)?;
                self.compare(part, version)?;
                if attested {
                    self.attest(part).await?;
                }
                self.section(part)?.is_proven = true;
                let is_proven = self.sections.values().all(|section| section.is_proven);
                self.is_proven.store(is_proven, ORDER);
                Ok(None)
            }
        }
    }

    /// The number of a part here; `None` for the whole version.
    fn number_of(&self, of: Option<&str>) -> Result<Option<u32>> {
        let Some(of) = of else { return Ok(None) };
        let number = self.copies.parts.names().position(|name| name == of);
        number.map(|number| Some(number as u32)).ok_or_else(|| other_parts(of))
    }

    /// Begins the changes of a part, or of the version.
    fn begin(&mut self, of: Option<&str>, base: u64) -> Result<()> {
        let part = self.number_of(of)?;
        // Either the whole version comes, or parts of it.
        let is_other = |begun: &Option<u32>| begun.is_none() || part.is_none() || *begun == part;
        if self.sections.keys().any(is_other) {
            return Err(refused("changes that have begun begin again"));
        }
        let is_in = |entry: &Option<Entry>| is_of(entry.as_ref(), part);
        let places = self.base.iter().enumerate().filter(|(_, entry)| is_in(entry));
        let places: Vec<usize> = places.map(|(at, _)| at).collect();
        let here = places.iter().filter_map(|at| self.base[*at].as_ref());
        let here = here.fold(0, |version, entry| entry.add_to(version, 0));
        if !self.has_base || here != base {
            let message = match of {
                None => "these are changes to another version than this rank has".to_owned(),
                Some(of) => format!(
                    "these are changes to another `{of}` than this rank has, or its `parts` are not the trainer's"
                ),
            };
            return Err(Error::new(ErrorKind::Mismatch, APPLYING, message));
        }
        self.sections.insert(part, Section { places, is_proven: false });
        self.is_proven.store(false, ORDER);
        Ok(())
    }

    /// Changes that have begun and not ended.
    fn section(&mut self, part: Option<u32>) -> Result<&mut Section> {
        let section = self.sections.get_mut(&part).filter(|section| !section.is_proven);
        section.ok_or_else(|| refused("changes in another order than they have"))
    }

    /// The changes of the weights that the records name.
    fn due(
        &mut self,
        part: Option<u32>,
        records: &[Record],
        words: &[u32],
    ) -> Result<Vec<(usize, Change)>> {
        self.section(part)?;
        let places = self.sections.get(&part).map(|section| &*section.places).unwrap_or_default();
        let mut rest = words;
        let mut due = Vec::with_capacity(records.len());
        for record in records {
            let at = places.get(record.weight as usize).copied().unwrap_or(usize::MAX);
            let entry = self.base.get(at).and_then(Option::as_ref).filter(|_| !self.met[at]);
            let Some(entry) = entry else {
                let at = record.weight;
                let message = format!("there is no weight {at} in the base, or it came already");
                return Err(refused(message));
            };
            let len = entry.bytes().len();
            let cut = Cut::of(entry.meta.dtype, record.tile);
            let own = cut.filter(|_| record.len > 0).map_or(0, |cut| cut.tiles(len));
            let own = usize::try_from(own).ok().and_then(|own| rest.split_at_checked(own));
            let (Some((own, others)), Some(cut)) = (own, cut) else {
                let message = "changes of another size than is there";
                return Err(refused(message).tensor(&*entry.meta.name));
            };
            rest = others;
            if self.new_names.contains(&entry.meta.name) {
                return Err(twice(&entry.meta.name));
            }
            self.met[at] = true;
            due.push((at, Change { cut, words: own.to_vec() }));
        }
        if !rest.is_empty() {
            return Err(refused(format!("{} words of changes too many", rest.len())));
        }
        Ok(due)
    }

    /// Applies changes on all threads. Returns the whole weights.
    async fn apply(
        &mut self,
        due: Vec<(usize, Change)>,
        values: Storage,
    ) -> Result<ReceivedBucket> {
        // The base lacks what the threads have, so an update that is dropped meanwhile cannot restore it.
        let was_damaged = std::mem::replace(&mut self.is_damaged, true);
        let mut taken = Vec::with_capacity(due.len());
        for (at, change) in due {
            let entry = self.base.get_mut(at).and_then(Option::take);
            taken.push((at, entry.ok_or_else(|| refused("a weight twice"))?, change));
        }
        let copies = self.copies.clone();
        let work = self.copies.pool.start(move || {
            let applied = match values.is_empty() {
                true => Ok(None),
                false => copies.apply(&mut taken, &values, true),
            };
            Ok((taken, applied))
        });
        let (taken, applied) = work.await?;
        let (mut views, mut changed) = (Vec::with_capacity(taken.len()), Vec::new());
        for (at, entry, change) in taken {
            self.came.push(Came::Kept(at));
            views.push((entry.meta.clone(), entry.view()));
            if !change.words.is_empty() {
                changed.push((at, change));
            }
            self.base[at] = Some(entry);
        }
        if let Some(undo) = applied? {
            self.undo.push((changed, undo));
        }
        self.is_damaged = was_damaged;
        self.bucket(views)
    }

    fn new_weight(&mut self, tensor: &Weight, storage: Storage) -> Result<ReceivedBucket> {
        let part = match self.sections.contains_key(&None) {
            true => None,
            false => Some(self.copies.parts.part_of(tensor.name())),
        };
        self.section(part).map_err(|error| error.tensor(tensor.name()))?;
        let base = self.base.iter().enumerate();
        let named = base.filter_map(|(at, entry)| Some((entry.as_ref()?.meta.name.clone(), at)));
        let places = self.places.get_or_insert_with(|| named.collect());
        let has_come = places.get(tensor.name()).is_some_and(|at| self.met[*at]);
        if has_come || !self.new_names.insert(tensor.meta().name.clone()) {
            return Err(twice(tensor.name()));
        }
        let mut entries = self.copies.allocate(vec![tensor.meta().clone()])?;
        self.copies.write(&mut entries, &[ShadowPart { of: 0, start: 0, bytes: storage }])?;
        self.copies.seal(&mut entries)?;
        let views = entries.iter().map(|entry| (entry.meta.clone(), entry.view())).collect();
        self.came.push(Came::New);
        self.new.extend(entries);
        self.bucket(views)
    }

    /// Makes a bucket of weights.
    fn bucket(&mut self, views: Vec<(ArenaArc<TensorMeta>, Storage)>) -> Result<ReceivedBucket> {
        let (mut pieces, mut content, mut offset) = (Vec::new(), Vec::new(), 0_u64);
        for (meta, bytes) in views {
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

    /// Compares a part, or the whole version, with the trainer's.
    fn compare(&mut self, part: Option<u32>, version: u64) -> Result<()> {
        let entries = self.entries().filter(|entry| is_of(Some(*entry), part));
        let here = entries.fold(0, |version, entry| entry.add_to(version, 0));
        if here != version {
            self.is_damaged = true;
            let message = "the version that came of the changes is not the trainer's";
            return Err(Error::new(ErrorKind::Digest, APPLYING, message));
        }
        Ok(())
    }

    /// Computes the sums of a part or of all weights anew from memory, on all threads.
    async fn attest(&mut self, part: Option<u32>) -> Result<()> {
        // As in `apply`: the threads have what the base lacks meanwhile.
        let was_damaged = std::mem::replace(&mut self.is_damaged, true);
        let (base, new) = (std::mem::take(&mut self.base), std::mem::take(&mut self.new));
        let copies = self.copies.clone();
        let work = self.copies.pool.start(move || {
            let all = base.iter().flatten().chain(&new);
            copies.attest(all.filter(|entry| is_of(Some(*entry), part)))?;
            Ok((base, new))
        });
        (self.base, self.new) = work.await?;
        self.is_damaged = was_damaged;
        Ok(())
    }

    /// Makes the version the base of later changes, now that it is active. Returns its number of weights, their bytes, and its parts.
    fn complete(&mut self) -> (u64, u64, BTreeMap<String, PartReport>) {
        let undo = std::mem::take(&mut self.undo);
        let mut changed = vec![false; self.base.len()];
        undo.iter().flat_map(|(changed, _)| changed).for_each(|(at, _)| changed[*at] = true);
        let mut was_sent = Vec::with_capacity(self.came.len());
        was_sent.extend(self.came.iter().map(|came| match came {
            Came::Kept(at) => changed[*at],
            Came::New => true,
        }));
        let mut new = std::mem::take(&mut self.new).into_iter();
        let came = std::mem::take(&mut self.came);
        let entries = came.into_iter().filter_map(|came| match came {
            Came::Kept(at) => self.base[at].take(),
            Came::New => new.next(),
        });
        let shadow = Shadow { entries: entries.collect() };
        let sent = shadow.entries.iter().zip(was_sent).map(|(entry, sent)| (entry, 0, sent));
        let parts = parts::report(&self.copies.parts, sent);
        let (tensors, bytes) = (shadow.entries.len() as u64, shadow.bytes());
        self.kept.shadow = Some(shadow);
        self.base.clear();
        (tensors, bytes, parts)
    }
}

impl Drop for Patching<'_> {
    fn drop(&mut self) {
        if self.base.is_empty() || self.is_damaged {
            return;
        }
        for (changed, values) in std::mem::take(&mut self.undo) {
            let due = changed.into_iter().filter_map(|(at, change)| {
                let entry = self.base[at].take()?;
                Some((at, entry, change))
            });
            let mut due: Vec<_> = due.collect();
            if let Err(error) = self.copies.apply(&mut due, &values, false) {
                tracing::warn!(%error, "changes cannot be taken back: the next version comes whole");
                return;
            }
            due.into_iter().for_each(|(at, entry, _)| self.base[at] = Some(entry));
        }
        let entries: Option<Vec<Entry>> = std::mem::take(&mut self.base).into_iter().collect();
        self.kept.shadow = entries.map(|entries| Shadow { entries });
    }
}
