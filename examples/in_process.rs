//! The smallest use: a trainer and a rollout in one process, two updates.

use checkpoint_engine::{
    CheckpointEngineConfig, DType, EngineContext, Result, Role, TensorMap, Version, Weight,
    ensure_async_iterator, form_local_group, registry,
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    // ANCHOR: engines
    let config = CheckpointEngineConfig { backend: "naive".into(), ..Default::default() };
    let registry = registry();
    let mut trainer = registry.create(EngineContext::new(config.clone(), Role::Trainer))?;
    let mut rollout = registry.create(EngineContext::new(config.clone(), Role::Rollout))?;
    // ANCHOR_END: engines

    // ANCHOR: form
    // Prepares both, builds the topology, and joins each in its place; ranks of several processes have
    // `form_group` for that, and a control plane in their contexts.
    let backend = registry.get(&config.backend)?;
    form_local_group(&mut [&mut *trainer, &mut *rollout], backend).await?;
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
