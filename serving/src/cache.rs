//! A cache of the last complete version, in front of any engine.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use async_trait::async_trait;

use engine_core::memory::TensorMemory;
use engine_core::{
    CacheStore, CacheWriter, CheckpointEngine, CheckpointEngineWithCache, Error, ErrorKind,
    ErrorReport, Expected, ReceivedBucket, ReceivedPiece, ReceivedWeights, Result, RolloutEngine,
    Version, Weight, WeightStream, check_names, ensure_async_iterator, ensure_fresh,
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
/// # use engine_core::{CheckpointEngineWithCache, Result, RolloutEngine};
/// # use serving::CachedEngine;
/// # async fn example(engine: Box<dyn RolloutEngine>) -> Result<()> {
/// let mut rollout = CachedEngine::new(engine);
/// // The inference server reads a clone of the cache, while this task receives.
/// let cache = rollout.cache();
/// rollout.update_cache(None).await?;
/// let current = cache.current()?;
/// for weight in current.weights() {
///     println!("{}: {}", current.version(), weight.name());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct CachedEngine {
    engine: Box<dyn RolloutEngine>,
    cache: WeightCache,
}

impl CachedEngine {
    /// An engine whose cache is empty.
    pub fn new(engine: Box<dyn RolloutEngine>) -> Self {
        Self::with_cache(engine, WeightCache::default())
    }

    /// An engine that fills a cache which is there already: one that others read, or that is
    /// [held](crate::Holder) for others.
    pub fn with_cache(engine: Box<dyn RolloutEngine>, cache: WeightCache) -> Self {
        Self { engine, cache }
    }

    /// An engine that keeps what arrives in a store.
    pub fn with_store(engine: Box<dyn RolloutEngine>, store: Arc<dyn CacheStore>) -> Self {
        Self::with_cache(engine, WeightCache::in_store(store))
    }

    /// Refuses cached weights when more than this number of updates have begun to arrive since theirs:
    /// [`max_staleness`](engine_core::CheckpointEngineConfig::max_staleness) of the configuration. `None`
    /// refuses none.
    #[must_use]
    pub fn with_max_staleness(mut self, updates: Option<u64>) -> Self {
        self.cache.max_staleness = updates;
        self
    }

    /// Says which tensors updates bring: all of the last version's unless this says otherwise.
    #[must_use]
    pub fn with_expected(mut self, expected: Expected) -> Self {
        self.cache.expected = expected;
        self
    }

    /// Fills the cache with the version that another rollout holds and gives. One of a higher number that is here
    /// already stays.
    ///
    /// # Errors
    ///
    /// Those of receiving, and of the store.
    pub async fn take_over(&mut self, received: ReceivedWeights<'_>) -> Result<Version> {
        self.cache.take_over(self.engine.adopt(received)).await
    }

    /// The cache, for what generates while this engine receives.
    pub fn cache(&self) -> WeightCache {
        self.cache.clone()
    }
}

/// A store of this process alone.
#[derive(Debug)]
struct OwnMemory;

impl CacheStore for OwnMemory {
    fn begin(&self, _: Version, _: bool) -> Result<Box<dyn CacheWriter>> {
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
        piece.bytes.read(0, &mut memory.bytes_mut()[piece.start as usize..end as usize])?;
        if end < byte_len {
            self.open = Some(memory);
        } else {
            self.weights.push(Weight::from_meta(piece.meta.clone(), memory.freeze())?);
        }
        Ok(())
    }

    fn keep(&mut self, weight: &Weight) -> Result<()> {
        self.weights.push(weight.clone());
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
/// weights that were given stay as they are for as long as they are held. An update that does not bring
/// the tensors that are [expected](CachedEngine::with_expected) takes nobody's place: the version before it
/// stays. With [`Expected::Partial`] weights that did not come follow those that did.
#[derive(Clone, Debug)]
pub struct WeightCache {
    state: Arc<Mutex<State>>,
    max_staleness: Option<u64>,
    expected: Expected,
    store: Arc<dyn CacheStore>,
}

impl Default for WeightCache {
    fn default() -> Self {
        Self {
            state: Arc::default(),
            max_staleness: None,
            expected: Expected::default(),
            store: Arc::new(OwnMemory),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    cached: Option<Cached>,
    /// How many updates began to arrive, whether or not they were completed.
    begun: u64,
    /// The version of the last of them.
    newest: Version,
}

#[derive(Clone, Debug)]
struct Cached {
    version: CachedVersion,
    /// How many updates had begun with its own.
    begun: u64,
}

/// A complete version that a cache gave. Clones share it; it stays as it is for as long as it is held.
#[derive(Clone, Debug)]
pub struct CachedVersion(Arc<Whole>);

#[derive(Debug)]
struct Whole {
    version: Version,
    weights: Vec<Weight>,
    /// Where the weight of a name is, once somebody has asked for one.
    index: OnceLock<HashMap<Arc<str>, usize>>,
}

impl CachedVersion {
    fn new(version: Version, weights: Vec<Weight>) -> Self {
        Self(Arc::new(Whole { version, weights, index: OnceLock::new() }))
    }

    /// Its number.
    pub fn version(&self) -> Version {
        self.0.version
    }

    /// All weights, in the order sent.
    pub fn weights(&self) -> &[Weight] {
        &self.0.weights
    }

    /// The weight of a name.
    pub fn get(&self, name: &str) -> Option<&Weight> {
        let Whole { weights, index, .. } = &*self.0;
        let index = index.get_or_init(|| {
            let names = weights.iter().map(|weight| Arc::clone(&weight.meta().name));
            names.zip(0..).collect()
        });
        index.get(name).map(|&at| &weights[at])
    }
}

impl WeightCache {
    /// The version that [`get_weights`](Self::get_weights) would give, however old it is.
    pub fn version(&self) -> Option<Version> {
        self.state().cached.as_ref().map(|cached| cached.version.version())
    }

    /// The last complete version; shared, not copied.
    ///
    /// # Errors
    ///
    /// `State` if no version is complete yet, or if more updates have begun since than is allowed: the
    /// trainer has begun to send others and they failed.
    pub fn current(&self) -> Result<CachedVersion> {
        let state = self.state();
        let cached = state.cached.clone().ok_or_else(|| {
            Error::new(ErrorKind::State, "reading the cache", "no version is complete yet")
        })?;
        let since = state.begun - cached.begun;
        ensure_fresh(cached.version.version(), since, state.newest, self.max_staleness)?;
        Ok(cached.version)
    }

    /// The last complete version and its weights as a stream, in the order sent; shared, not copied.
    ///
    /// # Errors
    ///
    /// Those of [`current`](Self::current).
    pub fn get_weights(&self) -> Result<(Version, WeightStream<'static>)> {
        let current = self.current()?;
        let version = current.version();
        let weights = (0..current.weights().len()).map(move |at| current.weights()[at].clone());
        Ok((version, ensure_async_iterator(weights)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment; a panic elsewhere leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl CheckpointEngine for CachedEngine {
    async fn finalize(self: Box<Self>) -> Result<()> {
        self.engine.finalize().await
    }
}

#[async_trait]
impl RolloutEngine for CachedEngine {
    async fn receive_weights(&mut self, version: Option<Version>) -> Result<ReceivedWeights<'_>> {
        self.engine.receive_weights(version).await
    }

    fn adopt<'a>(&'a mut self, received: ReceivedWeights<'a>) -> ReceivedWeights<'a> {
        self.engine.adopt(received)
    }
}

#[async_trait]
impl CheckpointEngineWithCache for CachedEngine {
    async fn update_cache(&mut self, version: Option<Version>) -> Result<Version> {
        self.cache.fill(self.engine.receive_weights(version).await?).await
    }

    fn get_weights(&self) -> Result<(Version, WeightStream<'static>)> {
        self.cache.get_weights()
    }
}

impl WeightCache {
    /// A cache that keeps versions in a store: in shared memory, say.
    pub fn in_store(store: Arc<dyn CacheStore>) -> Self {
        Self { store, ..Self::default() }
    }

    /// Takes an update; it replaces the cached version when it is complete and verified, and leaves it untouched
    /// otherwise.
    ///
    /// # Errors
    ///
    /// Those of receiving, and of the store; `Mismatch` if it does not bring the tensors that are expected.
    pub async fn fill(&self, received: ReceivedWeights<'_>) -> Result<Version> {
        let update = self.begin(received.version())?;
        fill(received, update).await?.complete()
    }

    /// Takes the version that another rollout holds and gives. One of a higher number that is here already stays.
    ///
    /// # Errors
    ///
    /// Those of [`fill`](Self::fill).
    pub async fn take_over(&self, received: ReceivedWeights<'_>) -> Result<Version> {
        let update = self.begins(received.version(), false)?;
        fill(received, update).await?.complete_if_newer()
    }

    /// Refuses cached weights when more than this number of updates have begun to arrive since theirs; `None`
    /// refuses none. It holds for this handle and its clones.
    #[must_use]
    pub fn with_max_staleness(mut self, updates: Option<u64>) -> Self {
        self.max_staleness = updates;
        self
    }

    /// Begins to put a version into the cache, bucket by bucket: for a rollout that does other things with
    /// buckets as well. [`CachedEngine`] does all of it.
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub fn begin(&self, version: Version) -> Result<CacheUpdate> {
        self.begins(version, true)
    }

    /// Whether an update of these names may take the place of what is here.
    fn check(&self, names: &[Arc<str>]) -> Result<()> {
        let state = self.state();
        match (&state.cached, self.expected) {
            (None, _) | (_, Expected::Partial) => Ok(()),
            (Some(cached), Expected::SameNames) => {
                let last = cached.version.weights().iter().map(|weight| weight.meta().name.clone());
                check_names(&last.collect::<Vec<_>>(), names)
            }
        }
    }

    fn begins(&self, version: Version, is_update: bool) -> Result<CacheUpdate> {
        let begun = {
            let mut state = self.state();
            if is_update {
                state.begun += 1;
                state.newest = version;
            }
            state.begun
        };
        let writer = self.store.begin(version, is_update)?;
        let cache = self.clone();
        Ok(CacheUpdate { cache, version, begun, names: Arc::default(), writer })
    }
}

fn names(names: &Mutex<Vec<Arc<str>>>) -> MutexGuard<'_, Vec<Arc<str>>> {
    // Names are added one by one.
    names.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps what arrives, once it is complete.
async fn fill(mut received: ReceivedWeights<'_>, mut update: CacheUpdate) -> Result<CacheUpdate> {
    update.check_before(&received);
    while let Some(bucket) = received.next_bucket().await? {
        if let Err(error) = update.add(&bucket) {
            let report = ErrorReport::from(&error);
            received.fail(error);
            return Err(report.into());
        }
    }
    received.finish().await?;
    Ok(update)
}

/// A version on its way into a [`WeightCache`], which is as it was until
/// [`complete`](Self::complete).
pub struct CacheUpdate {
    cache: WeightCache,
    version: Version,
    /// How many updates had begun with this one.
    begun: u64,
    /// The names that have arrived.
    names: Arc<Mutex<Vec<Arc<str>>>>,
    writer: Box<dyn CacheWriter>,
}

impl fmt::Debug for CacheUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheUpdate").field("version", &self.version).finish_non_exhaustive()
    }
}

impl CacheUpdate {
    /// Has the update refused on every rank if it turns out at its end that it does not bring the tensors
    /// that are [expected](CachedEngine::with_expected). Without this, they are compared in
    /// [`complete`](Self::complete), when other ranks have the version.
    pub fn check_before(&self, received: &ReceivedWeights<'_>) {
        let (cache, names, version) = (self.cache.clone(), Arc::clone(&self.names), self.version);
        let check = move || cache.check(&self::names(&names));
        received.before_confirm(move || check().map_err(|error| error.version(version)));
    }

    fn check(&self) -> Result<()> {
        self.cache.check(&names(&self.names))
    }

    /// Copies a bucket, the next one of the version.
    ///
    /// # Errors
    ///
    /// `Resource` if there is no memory for its weights.
    pub fn add(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        for piece in bucket.pieces() {
            self.writer.write(&piece)?;
            if piece.start == 0 {
                names(&self.names).push(Arc::clone(&piece.meta.name));
            }
        }
        Ok(())
    }

    /// The version is complete and committed: it takes the place of the one before it.
    ///
    /// # Errors
    ///
    /// `Mismatch` if it has other tensors than are [expected](CachedEngine::with_expected); those of the
    /// store. The version before it stays.
    pub fn complete(mut self) -> Result<Version> {
        self.check().map_err(|error| error.version(self.version))?;
        let before = self.cache.state().cached.clone();
        if let Some(before) = before {
            let names = names(&self.names);
            let names: HashSet<&str> = names.iter().map(|name| &**name).collect();
            for weight in
                before.version.weights().iter().filter(|weight| !names.contains(weight.name()))
            {
                self.writer.keep(weight)?;
            }
        }
        let weights = self.writer.commit()?;
        let Self { version, begun, .. } = self;
        let cached = Cached { version: CachedVersion::new(version, weights), begun };
        self.cache.state().cached = Some(cached);
        Ok(version)
    }

    /// The same, unless what is here has a higher number.
    fn complete_if_newer(self) -> Result<Version> {
        let held = self.cache.version();
        if held.is_none_or(|held| held <= self.version) {
            self.complete()
        } else {
            Ok(self.version)
        }
    }
}
