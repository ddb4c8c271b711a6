//! A cache of the last complete version, in front of any engine.

use std::sync::Arc;

use async_trait::async_trait;

use crate::memory::TensorMemory;
use crate::{
    CheckpointEngine, CheckpointEngineWithCache, Error, ErrorKind, Placement, ReceivedWeights,
    Result, SendReport, Version, Weight, WeightStream, WorkerMetadata, ensure_async_iterator,
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
    cached: Option<(Version, Arc<[Weight]>)>,
}

impl CachedEngine {
    /// An engine whose cache is empty.
    pub fn new(engine: Box<dyn CheckpointEngine>) -> Self {
        Self { engine, cached: None }
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
        let mut received = self.engine.receive_weights(version).await?;
        let version = received.version();
        let mut weights = Vec::new();
        let mut open: Option<TensorMemory> = None;
        while let Some(bucket) = received.next_bucket().await? {
            for piece in bucket.pieces() {
                let byte_len = piece.meta.byte_len()?;
                // The chunks of a weight follow one another, which the engine has checked.
                let mut memory = match open.take() {
                    Some(memory) => memory,
                    None => TensorMemory::new(byte_len, "filling the cache")
                        .map_err(|error| error.tensor(&*piece.meta.name))?,
                };
                let end = piece.start + piece.bytes.len();
                piece.bytes.read(0, &mut memory.as_mut()[piece.start as usize..end as usize])?;
                if end < byte_len {
                    open = Some(memory);
                } else {
                    weights.push(Weight::from_meta(piece.meta, memory.freeze())?);
                }
            }
        }
        received.finish().await?;
        self.cached = Some((version, weights.into()));
        Ok(version)
    }

    fn get_weights(&self) -> Result<(Version, WeightStream<'static>)> {
        let (version, weights) = self.cached.clone().ok_or_else(|| {
            Error::new(ErrorKind::State, "reading the cache", "no version is complete yet")
        })?;
        let weights = (0..weights.len()).map(move |index| weights[index].clone());
        Ok((version, ensure_async_iterator(weights)))
    }
}
