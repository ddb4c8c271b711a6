//! A cache of the last complete version, in front of any engine.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use crate::memory::TensorMemory;
use crate::{
    CheckpointEngine, CheckpointEngineWithCache, Error, ErrorKind, Newcomer, Placement,
    ReceivedBucket, ReceivedPiece, ReceivedWeights, Result, SendReport, Version, Weight,
    WeightStream, WorkerMetadata, ensure_async_iterator,
};

/// An engine whose rollout keeps the last complete version in host memory.
///
/// It works with every transport. The cache takes the memory of one model, and of a second one while
/// an update arrives: the old version stays whole until the new one is verified. That memory is this
/// process's own, or what a [`CacheStore`] has: shared memory, so that other processes of the host
/// take weights from the same cache.
///
/// # Examples
///
/// ```
/// # use engine_core::{CachedEngine, CheckpointEngine, CheckpointEngineWithCache, Result, Weight};
/// # async fn example(engine: Box<dyn CheckpointEngine>) -> Result<()> {
/// use futures::StreamExt;
///
/// let mut rollout = CachedEngine::new(engine);
/// rollout.update_cache(None).await?;
/// let (version, mut weights) = rollout.get_weights()?;
/// while let Some(weight) = weights.next().await {
///     println!("{version}: {}", weight?.name());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct CachedEngine {
    engine: Box<dyn CheckpointEngine>,
    cache: WeightCache,
}

impl CachedEngine {
    /// An engine whose cache is empty.
    pub fn new(engine: Box<dyn CheckpointEngine>) -> Self {
        Self { engine, cache: WeightCache::default() }
    }

    /// An engine that keeps what arrives in a store.
    pub fn with_store(engine: Box<dyn CheckpointEngine>, store: Arc<dyn CacheStore>) -> Self {
        Self { engine, cache: WeightCache { store, ..WeightCache::default() } }
    }

    /// Refuses cached weights that are more than so many versions behind the newest one that began
    /// to arrive: [`max_staleness`](crate::CheckpointEngineConfig::max_staleness) of the
    /// configuration. `None` refuses none.
    #[must_use]
    pub fn with_max_staleness(mut self, versions: Option<u64>) -> Self {
        self.cache.max_staleness = versions;
        self
    }

    /// Fills the cache with the version that another rollout holds. A newer one that is here already
    /// stays.
    ///
    /// # Errors
    ///
    /// Those of receiving, and of the store.
    pub async fn take_over(&mut self, from: &mut Newcomer) -> Result<Version> {
        self.cache.fill(from.receive().await?).await?.complete_if_newer()
    }

    /// The cache, for whoever generates while this engine receives.
    pub fn cache(&self) -> WeightCache {
        self.cache.clone()
    }
}

/// The memory that a [`CachedEngine`] keeps versions in.
pub trait CacheStore: fmt::Debug + Send + Sync {
    /// A place for a version that begins to arrive. Dropping it gives the version up.
    ///
    /// # Errors
    ///
    /// `Resource` if there is no room.
    fn begin(&self, version: Version) -> Result<Box<dyn CacheWriter>>;
}

/// A version on its way into a [`CacheStore`].
pub trait CacheWriter: Send {
    /// Takes the next part of a weight. The parts of one follow one another, from its beginning.
    ///
    /// # Errors
    ///
    /// `Resource` if there is no room.
    fn write(&mut self, piece: &ReceivedPiece) -> Result<()>;

    /// The version is complete and active everywhere: gives its weights in the order of their
    /// parts, and replaces the version before it wherever the store shows one.
    ///
    /// # Errors
    ///
    /// `Resource` or `Io`; the version before it stays.
    fn commit(self: Box<Self>) -> Result<Vec<Weight>>;
}

/// Whether a cached version may be given: an error if more than `most` newer versions began to
/// arrive, `newest` the last of them.
///
/// # Errors
///
/// `State`.
pub fn ensure_fresh(cached: Version, newest: Version, most: Option<u64>) -> Result<()> {
    let behind = newest.0.saturating_sub(cached.0);
    match most {
        Some(most) if behind > most => {
            let message = format!(
                "the last complete version is {behind} behind version {newest}; `max_staleness` \
                 is {most}"
            );
            Err(Error::new(ErrorKind::State, READING, message).version(cached))
        }
        _ => Ok(()),
    }
}

const READING: &str = "reading the cache";

/// A store of this process alone.
#[derive(Debug)]
struct OwnMemory;

impl CacheStore for OwnMemory {
    fn begin(&self, _: Version) -> Result<Box<dyn CacheWriter>> {
        Ok(Box::new(Own { weights: Vec::new(), open: None }))
    }
}

struct Own {
    weights: Vec<Weight>,
    open: Option<TensorMemory>,
}

impl CacheWriter for Own {
    fn write(&mut self, piece: &ReceivedPiece) -> Result<()> {
        let byte_len = piece.meta.byte_len()?;
        // The chunks of a weight follow one another, which the engine has checked.
        let mut memory = match self.open.take() {
            Some(memory) => memory,
            None => TensorMemory::new(byte_len, "filling the cache")
                .map_err(|error| error.tensor(&*piece.meta.name))?,
        };
        let end = piece.start + piece.bytes.len();
        piece.bytes.read(0, &mut memory.as_mut()[piece.start as usize..end as usize])?;
        if end < byte_len {
            self.open = Some(memory);
        } else {
            self.weights.push(Weight::from_meta(piece.meta.clone(), memory.freeze())?);
        }
        Ok(())
    }

    fn commit(self: Box<Self>) -> Result<Vec<Weight>> {
        Ok(self.weights)
    }
}

/// The last complete version at a rollout. Clones are the same cache.
///
/// # Contract
///
/// What it gives is always a whole version that was verified and committed on every rank: the old
/// one until the new one is, then the new one. A version that is aborted is never given, and
/// weights that were given stay as they are for as long as they are held.
#[derive(Clone, Debug)]
pub struct WeightCache {
    state: Arc<Mutex<State>>,
    max_staleness: Option<u64>,
    store: Arc<dyn CacheStore>,
}

impl Default for WeightCache {
    fn default() -> Self {
        Self { state: Arc::default(), max_staleness: None, store: Arc::new(OwnMemory) }
    }
}

#[derive(Debug, Default)]
struct State {
    cached: Option<(Version, Arc<[Weight]>)>,
    /// The newest version that began to arrive, whether or not it was completed.
    newest: Version,
}

impl WeightCache {
    /// The version that [`get_weights`](Self::get_weights) would give, however old it is.
    pub fn version(&self) -> Option<Version> {
        self.state().cached.as_ref().map(|(version, _)| *version)
    }

    /// The last complete version and its weights, in the order sent; shared, not copied.
    ///
    /// # Errors
    ///
    /// `State` if no version is complete yet, or if it is further behind than allowed: the trainer
    /// has begun to send newer ones and they failed.
    pub fn get_weights(&self) -> Result<(Version, WeightStream<'static>)> {
        let (version, weights) = {
            let state = self.state();
            let cached = state.cached.clone().ok_or_else(|| {
                Error::new(ErrorKind::State, READING, "no version is complete yet")
            })?;
            ensure_fresh(cached.0, state.newest, self.max_staleness)?;
            cached
        };
        let weights = (0..weights.len()).map(move |index| weights[index].clone());
        Ok((version, ensure_async_iterator(weights)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment; a panic elsewhere leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl CheckpointEngine for CachedEngine {
    async fn prepare(&mut self) -> Result<WorkerMetadata> {
        self.engine.prepare().await
    }

    async fn init_process_group(&mut self, place: Placement) -> Result<()> {
        self.engine.init_process_group(place).await
    }

    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        self.engine.send_weights(weights, version).await
    }

    async fn receive_weights(&mut self, version: Option<Version>) -> Result<ReceivedWeights<'_>> {
        self.engine.receive_weights(version).await
    }

    async fn finalize(&mut self) -> Result<()> {
        self.engine.finalize().await
    }
}

#[async_trait]
impl CheckpointEngineWithCache for CachedEngine {
    async fn update_cache(&mut self, version: Option<Version>) -> Result<Version> {
        let received = self.engine.receive_weights(version).await?;
        self.cache.fill(received).await?.complete()
    }

    fn get_weights(&self) -> Result<(Version, WeightStream<'static>)> {
        self.cache.get_weights()
    }
}

impl WeightCache {
    /// Begins to put a version into the cache, bucket by bucket: for a rollout that does other things with
    /// buckets as well. [`CachedEngine`] does all of it.
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub fn begin(&self, version: Version) -> Result<CacheUpdate> {
        {
            let mut state = self.state();
            state.newest = state.newest.max(version);
        }
        let writer = self.store.begin(version)?;
        Ok(CacheUpdate { cache: self.clone(), version, writer })
    }

    /// Keeps what arrives, once it is complete.
    async fn fill(&self, mut received: ReceivedWeights<'_>) -> Result<CacheUpdate> {
        let mut update = self.begin(received.version())?;
        while let Some(bucket) = received.next_bucket().await? {
            update.add(&bucket)?;
        }
        received.finish().await?;
        Ok(update)
    }
}

/// A version on its way into a [`WeightCache`], which is as it was until
/// [`complete`](Self::complete).
pub struct CacheUpdate {
    cache: WeightCache,
    version: Version,
    writer: Box<dyn CacheWriter>,
}

impl fmt::Debug for CacheUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheUpdate").field("version", &self.version).finish_non_exhaustive()
    }
}

impl CacheUpdate {
    /// Copies a bucket, the next one of the version.
    ///
    /// # Errors
    ///
    /// `Resource` if there is no memory for its weights.
    pub fn add(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        bucket.pieces().try_for_each(|piece| self.writer.write(&piece))
    }

    /// The version is complete and committed: it takes the place of the one before it.
    ///
    /// # Errors
    ///
    /// Those of the store; the version before it stays.
    pub fn complete(self) -> Result<Version> {
        let weights = self.writer.commit()?;
        self.cache.state().cached = Some((self.version, weights.into()));
        Ok(self.version)
    }

    /// The same, unless what is here is newer.
    fn complete_if_newer(self) -> Result<Version> {
        let held = self.cache.version();
        if held.is_none_or(|held| held <= self.version) {
            self.complete()
        } else {
            Ok(self.version)
        }
    }
}
