//! The smallest use: a trainer and a rollout in one process, two updates.

use checkpoint_engine::prelude::*;
use checkpoint_engine::{EngineContext, form_local_group};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    // ANCHOR: engines
    let config = CheckpointEngineConfig::new("naive");
    let registry = registry();
    let trainer = registry.prepare_trainer(EngineContext::new(config.clone())).await?;
    let rollout = registry.prepare_rollout(EngineContext::new(config.clone())).await?;
    // ANCHOR_END: engines

    // ANCHOR: form
    // Builds the topology and joins each rank in its place. Ranks of several processes have `form_group`, which prepares
    // and joins in one call.
    let backend = registry.get(&config.backend)?;
    let (mut trainers, mut rollouts) =
        form_local_group(backend, vec![trainer], vec![rollout]).await?;
    let (trainer, rollout) = (&mut trainers[0], &mut rollouts[0]);
    // ANCHOR_END: form

    // ANCHOR: update
    let mut model = TensorMap::new();
    for step in 1..=2_u8 {
        let weights = (0..3).map(|layer| {
            let bytes = vec![step; 4 * 4 * 2];
            Weight::new(format!("layers.{layer}.weight"), DType::BF16, [4, 4], bytes)
        });
        let version = Version(step.into());
        let send = trainer.send_weights(ensure_async_iterator(weights), version);
        let receive =
            async { rollout.receive_weights(Some(version)).await?.install(&mut model).await };
        let (sent, received) = tokio::try_join!(send, receive)?;
        // ANCHOR_END: update
        assert_eq!(sent.counts.tensors, received.tensors);
        assert!(model.iter().all(|(_, bytes)| bytes.iter().all(|&byte| byte == step)));
    }
    Ok(())
}
