//! The trainer quantises to FP8 what it sends: one flag, and what the rollout then sees.

use checkpoint_engine::prelude::*;
use checkpoint_engine::{EngineContext, config, form_local_group};

// ANCHOR: config
const CONFIG: &str = "
checkpoint_engine:
  backend: naive
  trainer_quantize_fp8: true
  quantization:
    ignored_layers: [model.layers.1]
";
// ANCHOR_END: config

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let config = config::parse(CONFIG, config::Format::Yaml)?;
    // ANCHOR: contract
    // What a rollout says that it can load; the group does not form if the two contradict.
    let contract = "{quantization: {accepts: fp8, granularity: 128x128}}";
    let contract = config::parse(contract, config::Format::Yaml)?;
    // ANCHOR_END: contract

    let registry = registry();
    let trainer = registry.prepare_trainer(EngineContext::new(config.clone())).await?;
    let rollout = registry.prepare_rollout(EngineContext::new(contract)).await?;
    let backend = registry.get(&config.backend)?;
    let (mut trainers, mut rollouts) =
        form_local_group(backend, vec![trainer], vec![rollout]).await?;
    let (trainer, rollout) = (&mut trainers[0], &mut rollouts[0]);

    let weights = (0..2).map(|layer| {
        let name = format!("model.layers.{layer}.mlp.down_proj.weight");
        let bytes = [0x20, 0x3e].repeat(256 * 384); // 0.15625 in BF16
        Weight::new(name, DType::BF16, [256, 384], bytes)
    });
    let send = trainer.send_weights(ensure_async_iterator(weights), Version(1));
    let receive = async {
        let mut received = rollout.receive_weights(None).await?;
        let mut seen = Vec::new();
        while let Some(tensor) = received.next_tensor().await? {
            let meta = tensor.meta();
            eprintln!("{} {} {:?}", meta.name, meta.dtype, meta.shape);
            seen.push((meta.dtype, meta.shape.to_vec()));
        }
        Ok(seen)
    };
    let (report, seen) = tokio::try_join!(send, receive)?;

    // The first weight as codes with a scale for each block, the second as it was.
    assert_eq!(seen[0], (DType::F8_E4M3, vec![256, 384]));
    assert_eq!(seen[1], (DType::F32, vec![2, 3]));
    assert_eq!(seen[2], (DType::BF16, vec![256, 384]));
    assert_eq!((report.counts.converted, report.counts.kept), (1, 1));
    eprintln!("kept: {:?}", report.counts.kept_reasons);
    Ok(())
}
