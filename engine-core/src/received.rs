//! What a receiver gets: buckets of weights, viewed in place.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use futures::stream::{BoxStream, Stream, StreamExt};

use crate::memory::{Job, Pool, TensorMemory};
use crate::plan::{BucketLayout, Piece};
use crate::report::ReceiveReport;
use crate::{
    Error, ErrorKind, ErrorReport, Result, Storage, TensorMeta, Version, Weight, WeightStream,
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
/// trainer's deadline ends it with an error that names this rank. Copy what has to stay.
///
/// The version is complete when the end was reached without an error: every receiver has then
/// verified it. Until then it must not be used.
///
/// # Cancel safety
///
/// Dropping it before the end aborts the update on every rank. [`fail`](Self::fail) does the same
/// and says why.
pub struct ReceivedWeights<'a> {
    version: Version,
    outcome: Outcome,
    state: State<'a>,
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
    meta: TensorMeta,
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
        checks.into_iter().try_for_each(|check| check())
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
        Self { version, outcome, state: State::Open(open) }
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
    /// Why the update failed; the same again whenever it is asked for more.
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
    /// As [`next_bucket`](Self::next_bucket); `Resource` if a large tensor finds no memory. Either ends
    /// the update on every rank: no version can be complete without a tensor that could not be had.
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

    /// Ends the update here and everywhere, for a reason that stays.
    fn fail_with(&mut self, error: Error) -> Error {
        let failed = State::Failed(ErrorReport::from(&error));
        let rest = std::mem::replace(&mut self.state, failed);
        self.outcome.fail_with(error, rest)
    }
    /// Has the receiver asked once more when it was offered everything, before this rank confirms the
    /// version: an error of the function aborts the update on every rank.
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
        loop {
            let error = match self.next_bucket().await? {
                None => return self.finish().await,
                Some(bucket) => match destination.install(&bucket) {
                    Ok(()) => continue,
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

    /// Tells the trainer something with this rank's confirmation; it appears in the update's report.
    pub fn note(&self, notes: serde_json::Value) {
        self.outcome.lock().notes = notes;
    }

    /// Gives the update up, and tells every rank why.
    pub fn fail(self, error: Error) {
        self.outcome.lock().failure = Some(error);
    }

    /// Puts a combinator between the engine and the receiver, which gets what that yields, every
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
        let (version, outcome) = (self.version, self.outcome.clone());
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
        Self::new(version, outcome, buckets)
    }

    /// The tensors as a stream that another engine can send, or a combinator take.
    pub fn into_weight_stream(self) -> WeightStream<'a> {
        WeightStream::new(futures::stream::try_unfold(self, |mut received| async move {
            Ok(received.next_tensor().await?.map(|weight| (weight, received)))
        }))
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
        piece.bytes.read(0, &mut memory.as_mut()[piece.start as usize..end as usize])?;
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

/// A bucket whose bytes arrived and were verified.
///
/// The trainer does not write to it before this and all views into it are dropped.
#[derive(Clone, Debug)]
pub struct ReceivedBucket {
    index: u64,
    layout: Arc<BucketLayout>,
    bytes: Storage,
}

impl ReceivedBucket {
    /// A bucket of an engine: its number, its layout, and its filled bytes.
    ///
    /// # Errors
    ///
    /// `Protocol` if the layout describes other than the bytes.
    pub fn new(index: u64, layout: Arc<BucketLayout>, bytes: impl Into<Storage>) -> Result<Self> {
        let bytes = bytes.into();
        if layout.filled() != bytes.len() {
            let message = format!("{} bytes for a layout of {}", bytes.len(), layout.filled());
            return Err(Error::new(ErrorKind::Protocol, "opening a bucket", message).bucket(index));
        }
        Ok(Self { index, layout, bytes })
    }

    /// A weight as a bucket of its own: in place where its bytes are contiguous, else encoded by
    /// all threads of the pool.
    ///
    /// # Errors
    ///
    /// Those of the weight's encoding; `Resource` if there is no memory for it.
    pub async fn of_weight(weight: Weight, index: u64, pool: &Pool) -> Result<Self> {
        let (meta, len) = (weight.meta().clone(), weight.byte_len());
        let bytes = match weight.storage() {
            Some(bytes) => bytes.clone(),
            None => {
                let memory = TensorMemory::new(len, "encoding a weight");
                let mut memory = memory.map_err(|error| error.tensor(weight.name()))?;
                let threads = pool.clone();
                let job = Job { weight, start: 0, len, offset: 0 };
                let encoded = pool.start(move || {
                    threads.encode(&[job], memory.as_mut(), false)?;
                    Ok(memory)
                });
                encoded.await?.freeze().into()
            }
        };
        let layout = Arc::new(BucketLayout::new(vec![Piece { meta, start: 0, len, offset: 0 }]));
        Self::new(index, layout, bytes)
    }

    /// Its number within the update, from 0.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// The parts of weights in it, in the order sent.
    pub fn pieces(&self) -> impl ExactSizeIterator<Item = ReceivedPiece> + '_ {
        self.layout.pieces().iter().map(|piece| self.view(piece))
    }

    fn piece(&self, index: usize) -> Option<ReceivedPiece> {
        self.layout.pieces().get(index).map(|piece| self.view(piece))
    }

    fn view(&self, piece: &crate::plan::Piece) -> ReceivedPiece {
        ReceivedPiece {
            meta: piece.meta.clone(),
            start: piece.start,
            bytes: self.bytes.slice(piece.offset..piece.offset + piece.len),
        }
    }
}

/// A part of a weight: all of it, or a chunk of one that is larger than a bucket.
#[derive(Clone, Debug)]
pub struct ReceivedPiece {
    /// The weight.
    pub meta: TensorMeta,
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
    /// Whatever keeps a tensor from its place; it aborts the update on every rank.
    fn install(&mut self, bucket: &ReceivedBucket) -> Result<()>;
}

/// A model's tensors in host memory, by name: a destination that grows as weights arrive.
///
/// Memory is allocated at the first update and reused for tensors whose size stays.
#[derive(Debug, Default)]
pub struct TensorMap(BTreeMap<Arc<str>, (TensorMeta, Vec<u8>)>);

impl TensorMap {
    /// A map without tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of tensors.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A tensor's description and bytes.
    pub fn get(&self, name: &str) -> Option<(&TensorMeta, &[u8])> {
        self.0.get(name).map(|(meta, bytes)| (meta, bytes.as_slice()))
    }

    /// All tensors, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&TensorMeta, &[u8])> {
        self.0.values().map(|(meta, bytes)| (meta, bytes.as_slice()))
    }
}

impl Install for TensorMap {
    fn install(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        use rayon::prelude::*;

        // Each destination is taken out of the map, so that all can be written in parallel.
        let mut places = Vec::with_capacity(bucket.pieces().len());
        for piece in bucket.pieces() {
            let name = piece.meta.name.clone();
            let mut bytes = match self.0.remove(&name) {
                Some((_, bytes)) => bytes,
                None => Vec::new(),
            };
            let byte_len = piece.meta.byte_len()? as usize;
            bytes.resize(byte_len, 0);
            places.push((name, piece, bytes));
        }
        places.par_iter_mut().with_min_len(16).try_for_each(|(_, piece, bytes)| {
            let start = piece.start as usize;
            piece.bytes.read(0, &mut bytes[start..start + piece.bytes.len() as usize])
        })?;
        for (name, piece, bytes) in places {
            self.0.insert(name, (piece.meta, bytes));
        }
        Ok(())
    }
}
