//! A cache of the last complete version, in front of any engine.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use crate::memory::TensorMemory;
use crate::{
    CheckpointEngine, CheckpointEngineWithCache, Error, ErrorKind, Newcomer, Placement,
    ReceivedBucket, ReceivedWeights, Result, SendReport, Version, Weight, WeightStream,
    WorkerMetadata, ensure_async_iterator,
};

/// An engine whose rollout keeps the last complete version in host memory.
///
/// It works with every transport. The cache takes the memory of one model, and of a second one while
/// an update arrives: the old version stays whole until the new one is verified.
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
    /// Those of receiving.
    pub async fn take_over(&mut self, from: &mut Newcomer) -> Result<Version> {
        Ok(self.cache.fill(from.receive().await?).await?.complete_if_newer())
    }

    /// The cache, for whoever generates while this engine receives.
    pub fn cache(&self) -> WeightCache {
        self.cache.clone()
    }
}

/// The last complete version at a rollout. Clones are the same cache.
///
/// # Contract
///
/// What it gives is always a whole version that was verified and committed on every rank: the old
/// one until the new one is, then the new one. A version that is aborted is never given, and
/// weights that were given stay as they are for as long as they are held.
#[derive(Clone, Debug, Default)]
pub struct WeightCache {
    state: Arc<Mutex<State>>,
    max_staleness: Option<u64>,
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
        let refuse = |message: String| Error::new(ErrorKind::State, "reading the cache", message);
        let (version, weights) = {
            let state = self.state();
            let cached = state.cached.clone();
            let cached = cached.ok_or_else(|| refuse("no version is complete yet".into()))?;
            let behind = state.newest.0.saturating_sub(cached.0.0);
            if let Some(most) = self.max_staleness.filter(|most| behind > *most) {
                let newest = state.newest;
                return Err(refuse(format!(
                    "the last complete version is {behind} behind version {newest}; \
                     `max_staleness` is {most}"
                ))
                .version(cached.0));
            }
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
        Ok(self.cache.fill(received).await?.complete())
    }

    fn get_weights(&self) -> Result<(Version, WeightStream<'static>)> {
        self.cache.get_weights()
    }
}

impl WeightCache {
    /// Begins to put a version into the cache, bucket by bucket: for a rollout that does other things with
    /// buckets as well. [`CachedEngine`] does all of it.
    pub fn begin(&self, version: Version) -> CacheUpdate {
        let mut state = self.state();
        state.newest = state.newest.max(version);
        CacheUpdate { cache: self.clone(), version, weights: Vec::new(), open: None }
    }

    /// Keeps what arrives, once it is complete.
    async fn fill(&self, mut received: ReceivedWeights<'_>) -> Result<CacheUpdate> {
        let mut update = self.begin(received.version());
        while let Some(bucket) = received.next_bucket().await? {
            update.add(&bucket)?;
        }
        received.finish().await?;
        Ok(update)
    }
}

/// A version on its way into a [`WeightCache`], which is as it was until
/// [`complete`](Self::complete).
#[derive(Debug)]
pub struct CacheUpdate {
    cache: WeightCache,
    version: Version,
    weights: Vec<Weight>,
    open: Option<TensorMemory>,
}

impl CacheUpdate {
    /// Copies a bucket, the next one of the version.
    ///
    /// # Errors
    ///
    /// `Resource` if there is no memory for its weights.
    pub fn add(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        for piece in bucket.pieces() {
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
                self.weights.push(Weight::from_meta(piece.meta, memory.freeze())?);
            }
        }
        Ok(())
    }

    /// The version is complete and committed: it takes the place of the one before it.
    pub fn complete(self) -> Version {
        self.cache.state().cached = Some((self.version, self.weights.into()));
        self.version
    }

    /// The same, unless what is here is newer.
    fn complete_if_newer(self) -> Version {
        let held = self.cache.version();
        if held.is_none_or(|held| held <= self.version) { self.complete() } else { self.version }
    }
}
