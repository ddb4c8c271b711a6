//! A cache of the last complete version, in front of any engine.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    CheckpointEngine, CheckpointEngineWithCache, Error, ErrorKind, Placement, ReceivedWeights,
    Result, SendReport, TensorMeta, Version, Weight, WeightStream, WorkerMetadata,
    ensure_async_iterator,
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
        let mut open: Option<(TensorMeta, Vec<u8>)> = None;
        while let Some(bucket) = received.next_bucket().await? {
            for piece in bucket.pieces() {
                let byte_len = piece.meta.byte_len()?;
                let (meta, mut bytes) = match open.take() {
                    Some(open) => open,
                    None => (piece.meta, memory_for(byte_len)?),
                };
                bytes.extend_from_slice(&piece.bytes);
                // The plan sends the chunks of a weight one after the other, and checks it.
                if (bytes.len() as u64) < byte_len {
                    open = Some((meta, bytes));
                } else {
                    weights.push(Weight::from_meta(meta, Bytes::from(bytes))?);
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

fn memory_for(bytes: u64) -> Result<Vec<u8>> {
    let mut memory = Vec::new();
    memory.try_reserve_exact(bytes as usize).map_err(|_| {
        let message = format!("no memory for {bytes} bytes");
        Error::new(ErrorKind::Resource, "filling the cache", message)
    })?;
    Ok(memory)
}
