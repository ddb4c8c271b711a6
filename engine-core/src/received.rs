//! What a receiver gets: buckets of weights, viewed in place.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use futures::stream::{BoxStream, Stream, StreamExt};

use crate::memory::{Pool, TensorMemory};
use crate::plan::{BucketLayout, Piece};
use crate::report::ReceiveReport;
use crate::{
    ArenaArc, Error, ErrorKind, ErrorReport, Expected, Result, Storage, TensorMeta, Version,
    Weight, WeightStream, check_names,
};

/// The weights of one update, as they arrive.
///
/// Read them bucket by bucket ([`next_bucket`](Self::next_bucket)) or tensor by tensor
/// ([`next_tensor`](Self::next_tensor)), or [`install`](Self::install) them. Every byte was verified
/// before it is offered.
///
/// # Contract
///
/// Views keep their bucket: the trainer does not write to it before the last view is dropped, and
/// an update has two buckets. A receiver that keeps views therefore stops the update, until the
/// trainer's deadline ends it with an error that names this rank. Copy what has to stay. (Of an engine within the
/// process, `naive`, views are the trainer's own memory and may stay as long as they like.)
///
/// The version is complete when the stream has ended without an error: every receiver has verified it then. Before
/// that, it must not be used.
///
/// # Cancel safety
///
/// Dropping it before the end aborts the update on every rank. [`fail`](Self::fail) does the same
/// and says why.
pub struct ReceivedWeights<'a> {
    version: Version,
    outcome: Outcome,
    state: State<'a>,
    /// Where the engine looks for what copies buckets out, if they come here as they are.
    one_pass: Option<OnePass>,
    /// Ends what this receiver has begun there.
    copying: Option<Copying>,
}

/// An end is never forgotten: asking again gives the same answer.
enum State<'a> {
    Open(Open<'a>),
    Complete,
    Failed(ErrorReport),
}

struct Open<'a> {
    buckets: BoxStream<'a, Result<ReceivedBucket>>,
    /// The bucket that tensors are taken from, and the next piece of it.
    current: Option<(ReceivedBucket, usize)>,
    partial: Option<Partial>,
}

/// A tensor larger than a bucket, of which a part has arrived.
struct Partial {
    meta: ArenaArc<TensorMeta>,
    memory: TensorMemory,
}

/// Where the engine leaves its report at the end, and the receiver its reason for giving up.
#[derive(Clone, Debug, Default)]
pub struct Outcome(Arc<Mutex<OutcomeState>>);

#[derive(Default)]
struct OutcomeState {
    report: Option<ReceiveReport>,
    failure: Option<Error>,
    notes: serde_json::Value,
    checks: Vec<Check>,
}

type Check = Box<dyn FnOnce() -> Result<()> + Send>;

impl fmt::Debug for OutcomeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { report, failure, notes, checks } = self;
        f.debug_struct("OutcomeState")
            .field("report", report)
            .field("failure", failure)
            .field("notes", notes)
            .field("checks", &checks.len())
            .finish()
    }
}

impl Outcome {
    /// Leaves the report of a version that is complete.
    pub fn complete(&self, report: ReceiveReport) {
        self.lock().report = Some(report);
    }

    /// The receiver's reason for giving up, for the engine to tell the others.
    pub fn take_failure(&self) -> Option<Error> {
        self.lock().failure.take()
    }

    /// What the receiver wants the trainer to know, for the engine to send with the confirmation.
    pub fn take_notes(&self) -> serde_json::Value {
        self.lock().notes.take()
    }

    /// What the receiver wants to be asked before its engine confirms the version, as in
    /// [`ReceivedWeights::before_confirm`].
    ///
    /// # Contract
    ///
    /// For engines: called when all weights were offered and verified, before the others hear that
    /// this rank has the version.
    ///
    /// # Errors
    ///
    /// The receiver's; the version must not be confirmed.
    pub fn check(&self) -> Result<()> {
        let checks = std::mem::take(&mut self.lock().checks);
        let checked = checks.into_iter().try_for_each(|check| check());
        checked.map_err(|error| self.fail_with(error, ()))
    }

    /// Ends an update with an error: leaves it as the reason and drops what is left of the update,
    /// so that the engine tells the others.
    fn fail_with(&self, error: Error, rest: impl Sized) -> Error {
        let report = ErrorReport::from(&error);
        self.lock().failure.get_or_insert_with(|| report.into());
        drop(rest);
        error
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, OutcomeState> {
        // Every change is one assignment: a panic elsewhere leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> ReceivedWeights<'a> {
    /// Wraps an engine's stream of verified buckets.
    ///
    /// # Contract
    ///
    /// For engines. The stream ends only when the version is complete, after leaving the report in
    /// `outcome`; anything else ends with an error. Dropped before that, it aborts the update,
    /// giving the failure in `outcome` as the reason.
    pub fn new(
        version: Version,
        outcome: Outcome,
        buckets: impl Stream<Item = Result<ReceivedBucket>> + Send + 'a,
    ) -> Self {
        let open = Open { buckets: buckets.boxed(), current: None, partial: None };
        Self { version, outcome, state: State::Open(open), one_pass: None, copying: None }
    }

    /// For engines that verify each bucket by what is in `one_pass` then, if it can.
    #[must_use]
    pub fn in_one_pass(self, one_pass: OnePass) -> Self {
        Self { one_pass: Some(one_pass), ..self }
    }

    /// Lets the engine copy buckets to their destination as it verifies them, so that it reads each only once. A bucket that
    /// was copied so [says so](ReceivedBucket::was_copied_by). [`install`](Self::install) does this by itself.
    ///
    /// # Contract
    ///
    /// The destination is written from the first bucket on, before that is known to be right, and not any more when this is
    /// dropped, which waits for a copy that is under way. Only a version that is complete has written what was sent.
    pub fn copy_by(&mut self, copies: Arc<dyn CopyOut>) {
        self.copying = self.one_pass.as_ref().map(|one_pass| one_pass.begin(copies));
    }

    /// The version that is arriving.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The next bucket, or `None` when the version is complete on every rank.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// Why the update failed. Further calls give the same error.
    pub async fn next_bucket(&mut self) -> Result<Option<ReceivedBucket>> {
        let open = match &mut self.state {
            State::Open(open) => open,
            State::Complete => return Ok(None),
            State::Failed(report) => return Err(report.clone().into()),
        };
        match open.buckets.next().await {
            Some(Ok(bucket)) => Ok(Some(bucket)),
            Some(Err(error)) => {
                self.state = State::Failed(ErrorReport::from(&error));
                Err(error)
            }
            None => {
                self.state = State::Complete;
                Ok(None)
            }
        }
    }

    /// The next whole tensor, or `None` when the version is complete on every rank.
    ///
    /// A tensor that fits into a bucket is viewed in place. A larger one is put together in host memory
    /// of its own; use [`next_bucket`](Self::next_bucket) or [`install`](Self::install) where that
    /// is too much.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// As [`next_bucket`](Self::next_bucket); `Resource` if a large tensor finds no memory. Either ends the update on
    /// every rank: a version without one of its tensors is not complete.
    pub async fn next_tensor(&mut self) -> Result<Option<Weight>> {
        loop {
            if let State::Open(open) = &mut self.state
                && let Some((bucket, next)) = &mut open.current
            {
                let Some(piece) = bucket.piece(*next) else {
                    // The exhausted bucket is released before the next one is waited for.
                    open.current = None;
                    continue;
                };
                *next += 1;
                match open.assemble(piece) {
                    Ok(None) => continue,
                    Ok(weight) => return Ok(weight),
                    Err(error) => return Err(self.fail_with(error.version(self.version))),
                }
            }
            match (self.next_bucket().await?, &mut self.state) {
                (Some(bucket), State::Open(open)) => open.current = Some((bucket, 0)),
                _ => return Ok(None),
            }
        }
    }

    /// Ends the update on every rank. Further calls give the same error.
    fn fail_with(&mut self, error: Error) -> Error {
        let failed = State::Failed(ErrorReport::from(&error));
        let rest = std::mem::replace(&mut self.state, failed);
        self.outcome.fail_with(error, rest)
    }
    /// Calls a function when all weights were offered, before this rank confirms the version. An error of the
    /// function aborts the update on every rank.
    ///
    /// It is the last moment at which a receiver can refuse a version for all.
    pub fn before_confirm(&self, check: impl FnOnce() -> Result<()> + Send + 'static) {
        self.outcome.lock().checks.push(Box::new(check));
    }

    /// Hands every bucket to a destination as a whole, to the end.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future aborts the update; the destination may then hold a part of it.
    ///
    /// # Errors
    ///
    /// As [`next_bucket`](Self::next_bucket), and the destination's own, which abort the update on
    /// every rank.
    pub async fn install(mut self, destination: &mut dyn Install) -> Result<ReceiveReport> {
        let names = Names::default();
        if let Some(copies) = destination.copies() {
            self.copy_by(copies);
        }
        if let Some(expected) = destination.expects() {
            let came = names.clone();
            self.before_confirm(move || check_names(&expected, &came.lock()));
        }
        loop {
            let error = match self.next_bucket().await? {
                None => {
                    destination.completed(std::mem::take(&mut *names.lock()));
                    return self.finish().await;
                }
                Some(bucket) => match destination.install(&bucket) {
                    Ok(()) => {
                        names.add(&bucket);
                        continue;
                    }
                    Err(error) => error.bucket(bucket.index()).version(self.version),
                },
            };
            let report = crate::ErrorReport::from(&error);
            self.fail(error);
            return Err(report.into());
        }
    }

    /// Waits for the rest, ignoring it, and returns the report.
    ///
    /// # Errors
    ///
    /// As [`next_bucket`](Self::next_bucket).
    pub async fn finish(mut self) -> Result<ReceiveReport> {
        if let State::Open(open) = &mut self.state {
            open.current = None;
        }
        while self.next_bucket().await?.is_some() {}
        let report = self.outcome.lock().report.take();
        report.ok_or_else(|| {
            Error::new(ErrorKind::Aborted, "receiving weights", "the update failed before")
                .version(self.version)
        })
    }

    /// Sends a note to the trainer with this rank's confirmation. It appears in the update's report.
    pub fn note(&self, notes: serde_json::Value) {
        self.outcome.lock().notes = notes;
    }

    /// Gives the update up, and tells every rank why.
    pub fn fail(self, error: Error) {
        self.outcome.lock().failure = Some(error);
    }

    /// Puts a combinator between the engine and the receiver. The receiver gets what the combinator yields, each
    /// tensor in a bucket of its own.
    ///
    /// # Errors
    ///
    /// An error of the combinator, or of encoding what it yields, aborts the update on every rank.
    #[must_use]
    pub fn map_weights(
        self,
        pool: Pool,
        combinator: impl FnOnce(WeightStream<'a>) -> WeightStream<'a>,
    ) -> Self {
        let (version, outcome) = (self.version, self.outcome.clone());
        let weights = combinator(self.into_weight_stream());
        let failing = outcome.clone();
        let buckets = futures::stream::try_unfold((weights, 0), move |(mut weights, index)| {
            let (pool, failing) = (pool.clone(), failing.clone());
            async move {
                let Some(weight) = weights.next().await else { return Ok(None) };
                let bucket = match weight {
                    Ok(weight) => ReceivedBucket::of_weight(weight, index, &pool).await,
                    Err(error) => Err(error),
                };
                match bucket {
                    Ok(bucket) => Ok(Some((bucket, (weights, index + 1)))),
                    Err(error) => Err(failing.fail_with(error.version(version), weights)),
                }
            }
        });
        Self::new(version, outcome, buckets)
    }

    /// Lets a function look at every bucket before the receiver gets it.
    ///
    /// # Errors
    ///
    /// An error of the function aborts the update on every rank.
    #[must_use]
    pub fn inspect_buckets(
        self,
        inspect: impl FnMut(&ReceivedBucket) -> Result<()> + Send + 'a,
    ) -> Self {
        let (version, outcome, one_pass) =
            (self.version, self.outcome.clone(), self.one_pass.clone());
        let failing = outcome.clone();
        let state = (self, inspect);
        let buckets = futures::stream::try_unfold(state, move |(mut received, mut inspect)| {
            let failing = failing.clone();
            async move {
                let Some(bucket) = received.next_bucket().await? else { return Ok(None) };
                match inspect(&bucket) {
                    Ok(()) => Ok(Some((bucket, (received, inspect)))),
                    Err(error) => {
                        let error = error.bucket(bucket.index()).version(version);
                        Err(failing.fail_with(error, (received, bucket)))
                    }
                }
            }
        });
        // They are the engine's buckets.
        Self { one_pass, ..Self::new(version, outcome, buckets) }
    }

    /// Puts a stream between the engine and the receiver that takes the engine's buckets and yields buckets, the same
    /// or others. Those of the engine may still be [copied out](Self::copy_by) as they are verified.
    ///
    /// # Contract
    ///
    /// The stream ends without an error only when that of the engine has. One that ends it with an error of its own has given
    /// the update [up](Self::fail) for this reason.
    #[must_use]
    pub fn through<S>(self, between: impl FnOnce(Self) -> S) -> Self
    where
        S: Stream<Item = Result<ReceivedBucket>> + Send + 'a,
    {
        let (version, outcome, one_pass) =
            (self.version, self.outcome.clone(), self.one_pass.clone());
        Self { one_pass, ..Self::new(version, outcome, between(self)) }
    }

    /// Puts the last bucket back, so that its tensors can be taken one by one.
    pub fn put_back(&mut self, bucket: ReceivedBucket) {
        if let State::Open(open) = &mut self.state {
            open.current = Some((bucket, 0));
        }
    }

    /// Changes the report of a version when it is complete. It is for layers between the engine and the receiver.
    pub fn amend(&self, amend: impl FnOnce(&mut ReceiveReport)) {
        if let Some(report) = &mut self.outcome.lock().report {
            amend(report);
        }
    }

    /// The tensors as a stream that another engine can send, or a combinator take.
    pub fn into_weight_stream(self) -> WeightStream<'a> {
        WeightStream::new(futures::stream::try_unfold(self, |mut received| async move {
            Ok(received.next_tensor().await?.map(|weight| (weight, received)))
        }))
    }
}

/// Copies whole buckets to a destination, and sums up what it reads of them.
pub trait CopyOut: Send + Sync {
    /// Copies all parts of a bucket to their place and returns the bucket's digest sum, as [`Pool::digest`] does. `None` if
    /// it does not know such a bucket, and then nothing was copied. Blocks.
    ///
    /// # Errors
    ///
    /// Those of the destination's memory.
    fn copy_out(&self, layout: &BucketLayout, bucket: &Storage) -> Result<Option<u64>>;
}

/// What copies the buckets of an update out, if its receiver has such: between the receiver and its engine, which verifies
/// buckets by it.
#[derive(Clone, Default)]
pub struct OnePass(Arc<Mutex<Option<Arc<dyn CopyOut>>>>);

/// A bucket that was copied out.
pub struct CopiedOut {
    sum: u64,
    by: Arc<dyn CopyOut>,
}

impl fmt::Debug for OnePass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnePass(..)")
    }
}

impl fmt::Debug for CopiedOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopiedOut").field("sum", &self.sum).finish_non_exhaustive()
    }
}

impl CopiedOut {
    /// The digest sum of what was read.
    pub fn sum(&self) -> u64 {
        self.sum
    }
}

impl OnePass {
    /// Copies a bucket out, one at a time; `None` if nobody wants that, or if it is not [known](CopyOut::copy_out). Blocks.
    ///
    /// # Errors
    ///
    /// Those of the destination.
    pub fn copy_out(&self, layout: &BucketLayout, bucket: &Storage) -> Result<Option<CopiedOut>> {
        // Held until the copy has ended: ending the copying waits for it.
        let copies = self.lock();
        let Some(by) = &*copies else { return Ok(None) };
        let sum = by.copy_out(layout, bucket)?;
        Ok(sum.map(|sum| CopiedOut { sum, by: Arc::clone(by) }))
    }

    fn begin(&self, copies: Arc<dyn CopyOut>) -> Copying {
        *self.lock() = Some(copies);
        Copying(self.clone())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<dyn CopyOut>>> {
        // Every change is one assignment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As long as this is there, buckets are copied out.
#[derive(Debug)]
struct Copying(OnePass);

impl Drop for Copying {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

/// The names of the weights that have come so far.
#[derive(Clone, Debug, Default)]
struct Names(Arc<Mutex<Vec<Arc<str>>>>);

impl Names {
    fn add(&self, bucket: &ReceivedBucket) {
        let pieces = bucket.layout.pieces().iter().filter(|piece| piece.start == 0);
        self.lock().extend(pieces.map(|piece| piece.meta.name.clone()));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<str>>> {
        // Every change is complete before anything can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open<'_> {
    /// A whole tensor, if this piece completes one.
    fn assemble(&mut self, piece: ReceivedPiece) -> Result<Option<Weight>> {
        let byte_len = piece.meta.byte_len()?;
        if piece.bytes.len() == byte_len {
            return Weight::from_meta(piece.meta, piece.bytes).map(Some);
        }
        if piece.start == 0 {
            let memory = TensorMemory::new(byte_len, "putting a tensor together");
            let memory = memory.map_err(|error| error.tensor(&*piece.meta.name))?;
            self.partial = Some(Partial { meta: piece.meta, memory });
        }
        // The engine has checked that the chunks of a weight follow one another.
        let Some(Partial { memory, .. }) = &mut self.partial else { return Ok(None) };
        let end = piece.start + piece.bytes.len();
        piece.bytes.read(0, &mut memory.bytes_mut()[piece.start as usize..end as usize])?;
        if end != byte_len {
            return Ok(None);
        }
        match self.partial.take() {
            Some(Partial { meta, memory }) => Weight::from_meta(meta, memory.freeze()).map(Some),
            None => Ok(None),
        }
    }
}

impl fmt::Debug for ReceivedWeights<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReceivedWeights").field("version", &self.version).finish_non_exhaustive()
    }
}

/// The memory of a bucket, by its [kind](crate::plan::BucketKind).
#[derive(Clone, Debug)]
pub enum BucketContent {
    /// Of a buffer: its filled bytes.
    Buffer(Storage),
    /// Of a list: each weight's own.
    List(Arc<[Storage]>),
}

impl BucketContent {
    /// Whether it is what a layout describes.
    fn fits(&self, layout: &BucketLayout) -> bool {
        match self {
            Self::Buffer(bytes) => bytes.len() == layout.filled(),
            Self::List(all) => {
                let pieces = layout.pieces();
                let lens = all.iter().map(Storage::len);
                all.len() == pieces.len() && lens.eq(pieces.iter().map(|piece| piece.len))
            }
        }
    }
}

impl<S: Into<Storage>> From<S> for BucketContent {
    fn from(bytes: S) -> Self {
        Self::Buffer(bytes.into())
    }
}

/// A bucket whose bytes arrived and were verified.
///
/// The trainer does not write to it before this and all views into it are dropped.
#[derive(Clone)]
pub struct ReceivedBucket {
    index: u64,
    layout: Arc<BucketLayout>,
    content: BucketContent,
    /// The threads of the engine that it came from.
    pool: Option<Pool>,
    /// Who has it copied.
    copied_by: Option<Arc<dyn CopyOut>>,
}

impl fmt::Debug for ReceivedBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReceivedBucket")
            .field("index", &self.index)
            .field("content", &self.content)
            .field("is_copied", &self.copied_by.is_some())
            .finish_non_exhaustive()
    }
}

impl ReceivedBucket {
    /// A bucket of an engine: its number, its layout, and its memory.
    ///
    /// # Errors
    ///
    /// `Protocol` if the layout describes other than the memory.
    pub fn new(
        index: u64,
        layout: Arc<BucketLayout>,
        content: impl Into<BucketContent>,
    ) -> Result<Self> {
        let content = content.into();
        if !content.fits(&layout) {
            let message = match &content {
                BucketContent::Buffer(bytes) => {
                    format!("{} bytes for a layout of {}", bytes.len(), layout.filled())
                }
                BucketContent::List(_) => "other weights than its layout has".to_owned(),
            };
            return Err(Error::new(ErrorKind::Protocol, "opening a bucket", message).bucket(index));
        }
        Ok(Self { index, layout, content, pool: None, copied_by: None })
    }

    /// With the threads of its engine, for a destination to work with.
    #[must_use]
    pub fn with_pool(mut self, pool: Pool) -> Self {
        self.pool = Some(pool);
        self
    }

    /// As one that was copied out when it was verified.
    #[must_use]
    pub fn copied(self, copied: CopiedOut) -> Self {
        Self { copied_by: Some(copied.by), ..self }
    }

    /// Whether it was copied to where it belongs by this when it was verified: there is nothing left to be installed.
    pub fn was_copied_by(&self, copies: &Arc<dyn CopyOut>) -> bool {
        self.copied_by.as_ref().is_some_and(|by| Arc::ptr_eq(by, copies))
    }

    /// What is in it, and where.
    pub fn layout(&self) -> &Arc<BucketLayout> {
        &self.layout
    }

    /// All of its bytes; `None` of a list, whose weights lie apart.
    pub fn buffer(&self) -> Option<&Storage> {
        match &self.content {
            BucketContent::Buffer(bytes) => Some(bytes),
            BucketContent::List(_) => None,
        }
    }

    /// The threads for work on the bucket; without them the work runs on the caller's thread.
    pub fn pool(&self) -> Option<&Pool> {
        self.pool.as_ref()
    }

    /// Copies bytes of the bucket to where they belong in host memory, on all threads of its pool.
    ///
    /// # Panics
    ///
    /// If a source and its destination do not have one size.
    ///
    /// # Errors
    ///
    /// Those of [`Storage::read`], where they are on a device.
    pub fn copy_out(&self, mut copies: Vec<(&Storage, &mut [u8])>) -> Result<()> {
        let copy = |(source, target): &mut (&Storage, &mut [u8])| {
            assert_eq!(source.len(), target.len() as u64, "a copy into another size");
            source.read(0, target)
        };
        match &self.pool {
            Some(pool) => {
                let each = |some: &mut [_]| some.iter_mut().try_for_each(copy);
                pool.map(copies.chunks_mut(16), each).into_iter().collect()
            }
            None => copies.iter_mut().try_for_each(copy),
        }
    }

    /// A weight as a bucket of its own: in place where its bytes are contiguous, else encoded by
    /// all threads of the pool.
    ///
    /// # Errors
    ///
    /// Those of the weight's encoding; `Resource` if there is no memory for it.
    pub async fn of_weight(weight: Weight, index: u64, pool: &Pool) -> Result<Self> {
        let (meta, len) = (weight.meta().clone(), weight.byte_len());
        let bytes = pool.hand_over(vec![weight]).await?;
        let layout = Arc::new(BucketLayout::new(vec![Piece { meta, start: 0, len, offset: 0 }]));
        Ok(Self::new(index, layout, BucketContent::List(bytes.into()))?.with_pool(pool.clone()))
    }

    /// Its number within the update, from 0.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// The parts of weights in it, in the order sent.
    pub fn pieces(&self) -> impl ExactSizeIterator<Item = ReceivedPiece> + '_ {
        self.layout.pieces().iter().enumerate().map(|(at, piece)| self.view(at, piece))
    }

    fn piece(&self, index: usize) -> Option<ReceivedPiece> {
        self.layout.pieces().get(index).map(|piece| self.view(index, piece))
    }

    fn view(&self, index: usize, piece: &Piece) -> ReceivedPiece {
        let bytes = match &self.content {
            BucketContent::Buffer(bytes) => bytes.slice(piece.offset..piece.offset + piece.len),
            BucketContent::List(all) => all[index].clone(),
        };
        ReceivedPiece { meta: piece.meta.clone(), start: piece.start, bytes }
    }
}

/// A part of a weight: all of it, or a chunk of one that is larger than a bucket.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ReceivedPiece {
    /// The weight.
    pub meta: ArenaArc<TensorMeta>,
    /// Where the part begins in the weight, in bytes.
    pub start: u64,
    /// Its bytes, viewed in place.
    pub bytes: Storage,
}

/// A destination that whole buckets are installed into.
pub trait Install: Send {
    /// Copies everything of a bucket to its place.
    ///
    /// # Errors
    ///
    /// Why a tensor cannot be stored. The error aborts the update on every rank.
    fn install(&mut self, bucket: &ReceivedBucket) -> Result<()>;

    /// What copies buckets here as they are verified, if there is such: [`install`](Self::install) is called for these all
    /// the same, and [need not](ReceivedBucket::was_copied_by) copy them again.
    fn copies(&self) -> Option<Arc<dyn CopyOut>> {
        None
    }

    /// The names that an update has to bring, all of them and no others; `None` for any. An update
    /// that brings others is refused on every rank, before it is active anywhere.
    fn expects(&self) -> Option<Arc<[Arc<str>]>> {
        None
    }

    /// Everything was installed, and the version is active; these are the names that came.
    fn completed(&mut self, names: Vec<Arc<str>>) {
        let _ = names;
    }
}

/// A model's tensors in host memory, by name: a destination that grows as weights arrive.
///
/// Memory is allocated at the first update and reused for tensors whose size stays. An update that
/// brings other names than the one before is refused, unless the map is [partial](Self::partial).
#[derive(Debug, Default)]
pub struct TensorMap {
    tensors: BTreeMap<Arc<str>, (ArenaArc<TensorMeta>, Vec<u8>)>,
    expected: Expected,
    /// The names of the last update that was complete.
    names: Option<Arc<[Arc<str>]>>,
}

impl TensorMap {
    /// A map without tensors, for updates that bring the whole model.
    pub fn new() -> Self {
        Self::default()
    }

    /// A map without tensors, for updates that may each bring a part of the model: what does not come
    /// stays as it is.
    pub fn partial() -> Self {
        Self { expected: Expected::Partial, ..Self::default() }
    }

    /// The number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// A tensor's description and bytes.
    pub fn get(&self, name: &str) -> Option<(&ArenaArc<TensorMeta>, &[u8])> {
        self.tensors.get(name).map(|(meta, bytes)| (meta, bytes.as_slice()))
    }

    /// All tensors, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&ArenaArc<TensorMeta>, &[u8])> {
        self.tensors.values().map(|(meta, bytes)| (meta, bytes.as_slice()))
    }
}

/// Makes memory as long as a tensor.
///
/// # Errors
///
/// `Resource` if there is none: the size comes from a peer.
fn resize(bytes: &mut Vec<u8>, meta: &TensorMeta) -> Result<()> {
    let len = meta.byte_len()?;
    let refuse = || {
        let message = format!("no memory for {len} bytes");
        Error::new(ErrorKind::Resource, "installing a tensor", message).tensor(&*meta.name)
    };
    let size = usize::try_from(len).map_err(|_| refuse())?;
    bytes.try_reserve_exact(size.saturating_sub(bytes.len())).map_err(|_| refuse())?;
    bytes.resize(size, 0);
    Ok(())
}

impl Install for TensorMap {
    fn install(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        // Each destination is taken out of the map, so that all can be written in parallel, and put
        // back whether or not they could be.
        let mut places = Vec::with_capacity(bucket.pieces().len());
        let mut written = Ok(());
        for piece in bucket.pieces() {
            let name = piece.meta.name.clone();
            let old = self.tensors.remove(&name);
            let (bytes, fits) = match old {
                Some((meta, bytes)) if meta == piece.meta => (bytes, Ok(())),
                old => {
                    let mut bytes = old.map(|(_, bytes)| bytes).unwrap_or_default();
                    let fits = resize(&mut bytes, &piece.meta);
                    (bytes, fits)
                }
            };
            written = fits;
            places.push((piece, bytes));
            if written.is_err() {
                break;
            }
        }
        if written.is_ok() {
            let copies = places.iter_mut().map(|(piece, bytes)| {
                let start = piece.start as usize;
                (&piece.bytes, &mut bytes[start..start + piece.bytes.len() as usize])
            });
            written = bucket.copy_out(copies.collect());
        }
        for (piece, bytes) in places {
            // Without memory for it, a tensor is not there: a shorter one is none.
            if piece.meta.byte_len().is_ok_and(|len| len == bytes.len() as u64) {
                self.tensors.insert(piece.meta.name.clone(), (piece.meta, bytes));
            }
        }
        written
    }

    fn expects(&self) -> Option<Arc<[Arc<str>]>> {
        self.names.clone().filter(|_| self.expected == Expected::SameNames)
    }

    fn completed(&mut self, names: Vec<Arc<str>>) {
        let same = self.names.as_ref().is_some_and(|known| **known == *names);
        if !same {
            self.names = Some(names.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    fn bucket(index: u64, pieces: Vec<Piece>) -> Result<ReceivedBucket> {
        let layout = Arc::new(BucketLayout::new(pieces));
        let filled = layout.filled() as usize;
        ReceivedBucket::new(index, layout, vec![index as u8 + 1; filled])
    }

    fn piece(name: &str, len: u64, start: u64, offset: u64) -> Piece {
        let meta = TensorMeta::new(name, DType::U8, [len]).into();
        Piece { meta, start, len: len - start, offset }
    }

    /// A tensor of 2^60 bytes in two parts, and one that fits.
    fn too_large() -> ReceivedWeights<'static> {
        let huge: ArenaArc<_> = ArenaArc::from(TensorMeta::new("huge", DType::U8, [1_u64 << 60]));
        let part = |start| Piece { meta: huge.clone(), start, len: 8, offset: 0 };
        let buckets =
            vec![bucket(0, vec![part(0)]), bucket(1, vec![part(8), piece("small", 4, 0, 256)])];
        ReceivedWeights::new(Version(1), Outcome::default(), futures::stream::iter(buckets))
    }

    #[tokio::test]
    async fn a_failed_stream_gives_its_error_whenever_it_is_asked_again() {
        let lost = Error::new(ErrorKind::Digest, "verifying a bucket", "other bytes").bucket(1);
        let items = vec![bucket(0, vec![piece("a", 4, 0, 0)]), Err(lost)];
        let stream = futures::stream::iter(items);
        let mut received = ReceivedWeights::new(Version(1), Outcome::default(), stream);
        assert!(received.next_tensor().await.unwrap().is_some());
        for _ in 0..2 {
            let error = received.next_tensor().await.unwrap_err();
            assert_eq!((error.kind(), error.report().bucket), (ErrorKind::Digest, Some(1)));
            assert_eq!(received.next_bucket().await.unwrap_err().kind(), ErrorKind::Digest);
        }
        assert_eq!(received.finish().await.unwrap_err().kind(), ErrorKind::Digest);
    }

    #[test]
    fn a_list_is_a_bucket_only_with_the_weights_of_its_layout() {
        let layout = Arc::new(BucketLayout::new(vec![piece("a", 4, 0, 0), piece("b", 8, 0, 256)]));
        let list = |lens: &[usize]| -> BucketContent {
            BucketContent::List(lens.iter().map(|len| vec![*len as u8; *len].into()).collect())
        };
        let bucket = ReceivedBucket::new(0, layout.clone(), list(&[4, 8])).unwrap();
        let bytes: Vec<_> = bucket.pieces().map(|p| p.bytes.to_host().unwrap().to_vec()).collect();
        assert_eq!(bytes, [vec![4; 4], vec![8; 8]]);
        for lens in [&[4][..], &[4, 9], &[8, 4], &[4, 8, 1], &[]] {
            let error = ReceivedBucket::new(3, layout.clone(), list(lens)).unwrap_err();
            assert_eq!((error.kind(), error.report().bucket), (ErrorKind::Protocol, Some(3)));
        }
    }

    #[tokio::test]
    async fn a_tensor_that_finds_no_memory_ends_the_update_and_is_never_left_out() {
        let mut received = too_large();
        let outcome = received.outcome.clone();
        for _ in 0..3 {
            let error = received.next_tensor().await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Resource, "{error}");
            assert_eq!(error.report().tensor.as_deref(), Some("huge"));
        }
        // The engine tells the others.
        assert_eq!(outcome.take_failure().map(|error| error.kind()), Some(ErrorKind::Resource));
    }

    #[tokio::test]
    async fn a_map_without_room_for_a_tensor_refuses_it_and_keeps_the_others() {
        let mut map = TensorMap::new();
        map.install(&bucket(0, vec![piece("small", 4, 0, 0)]).unwrap()).unwrap();
        let error = too_large().install(&mut map).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Resource, "{error}");
        assert_eq!(map.len(), 1);
        assert_eq!(map.get("small").map(|(_, bytes)| bytes), Some(&[1; 4][..]));
    }

    #[tokio::test]
    async fn what_the_receiver_checks_before_it_confirms_is_asked_once() {
        let stream = futures::stream::empty::<Result<ReceivedBucket>>();
        let outcome = Outcome::default();
        let received = ReceivedWeights::new(Version(1), outcome.clone(), stream);
        received.before_confirm(|| Err(Error::new(ErrorKind::Mismatch, "checking", "no")));
        assert_eq!(outcome.check().unwrap_err().kind(), ErrorKind::Mismatch);
        assert!(outcome.check().is_ok());
    }

    struct Known;

    impl CopyOut for Known {
        fn copy_out(&self, _: &BucketLayout, _: &Storage) -> Result<Option<u64>> {
            Ok(Some(7))
        }
    }

    #[test]
    fn buckets_are_copied_out_as_long_as_their_receiver_is_there_and_only_those_of_the_engine() {
        let layout = BucketLayout::new(vec![piece("a", 4, 0, 0)]);
        let copied = |one_pass: &OnePass| {
            one_pass.copy_out(&layout, &vec![0; 4].into()).unwrap().map(|copied| copied.sum)
        };
        let (one_pass, copies) = (OnePass::default(), Arc::new(Known));
        let received = || {
            let stream = futures::stream::empty::<Result<ReceivedBucket>>();
            ReceivedWeights::new(Version(1), Outcome::default(), stream)
                .in_one_pass(one_pass.clone())
        };
        let mut plain = received();
        assert_eq!(copied(&one_pass), None);
        plain.copy_by(copies.clone());
        assert_eq!(copied(&one_pass), Some(7));
        drop(plain);
        assert_eq!((copied(&one_pass), Arc::strong_count(&copies)), (None, 1));

        let mut inspected = received().inspect_buckets(|_| Ok(()));
        inspected.copy_by(copies.clone());
        assert_eq!(copied(&one_pass), Some(7));
        drop(inspected);
        assert_eq!(copied(&one_pass), None);

        // What comes of a combinator is not what the engine has.
        let mut mapped = received().map_weights(Pool::new(1).unwrap(), |weights| weights);
        mapped.copy_by(copies.clone());
        assert_eq!((copied(&one_pass), Arc::strong_count(&copies)), (None, 1));
    }
}
