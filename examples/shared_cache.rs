//! One process receives, others generate: the version lies in shared memory.

use std::sync::Arc;

use checkpoint_engine::prelude::*;
use checkpoint_engine::{EngineContext, form_local_group, ipc};
use futures::TryStreamExt;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let config = CheckpointEngineConfig::new("naive");
    let registry = registry();
    let trainer = registry.prepare_trainer(EngineContext::new(config.clone())).await?;
    let rollout = registry.prepare_rollout(EngineContext::new(config.clone())).await?;
    let backend = registry.get(&config.backend)?;
    let (mut trainers, mut rollouts) =
        form_local_group(backend, vec![trainer], vec![rollout]).await?;
    let (trainer, engine) = (&mut trainers[0], rollouts.remove(0));
    // ANCHOR: receiver
    let cache = ipc::SharedCache::create()?;
    let address = cache.address(); // serialisable
    let mut receiver = CachedEngine::with_store(engine, Arc::new(cache));
    // ANCHOR_END: receiver

    let weights = [Weight::new("layers.0.weight", DType::BF16, [4, 4], vec![7; 32])];
    let send = trainer.send_weights(ensure_async_iterator(weights), Version(1));
    let (_, version) = tokio::try_join!(send, receiver.update_cache(None))?;

    // ANCHOR: reader
    // In any process of this host.
    let reader = ipc::SharedCacheReader::open(address)?.with_max_staleness(Some(1));
    let (read, weights) = reader.get_weights()?;
    // ANCHOR_END: reader
    assert_eq!(read, version);
    let weights: Vec<Weight> = weights.try_collect().await?;
    assert!(weights[0].to_bytes()?.iter().all(|&byte| byte == 7));
    Ok(())
}
