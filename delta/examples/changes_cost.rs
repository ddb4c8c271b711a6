//! What an update of changes costs the host for each tensor, beside encoding, comparing and applying.
//!
//! ```text
//! cargo run --release -p checkpoint-engine-delta --example changes_cost
//! ```
//!
//! 18 432 small matrices travel as FP8 with their scales, from a trainer to a rollout of the same process, and one element of each changes.
//! Prints the median of eleven updates, as microseconds for each tensor.

use std::io::Write;
use std::time::Instant;

use delta::LAYER;
use engine_core::{
    CheckpointEngineConfig, DType, EngineContext, Rank, Registry, RolloutEngine, TrainerEngine,
    Version, Weight, ensure_async_iterator, form_local_group,
};

type Failure = Box<dyn std::error::Error>;

const SHAPE: [u64; 2] = [16, 128];
const UPDATES: usize = 12;

/// The model of a version.
fn model(version: u64) -> Result<Vec<Weight>, Failure> {
    let mut values = vec![0x3f80_u16; SHAPE.iter().product::<u64>() as usize];
    values[0] = 0x4000 + version as u16;
    let bytes: bytes::Bytes =
        values.into_iter().flat_map(u16::to_le_bytes).collect::<Vec<u8>>().into();
    let mut weights = Vec::new();
    for layer in 0..48 {
        for expert in 0..128 {
            for name in ["gate_proj", "up_proj", "down_proj"] {
                let name = format!("model.layers.{layer}.mlp.experts.{expert}.{name}.weight");
                weights.push(Weight::new(name, DType::BF16, SHAPE, bytes.clone())?);
            }
        }
    }
    Ok(weights)
}

async fn group() -> Result<(Box<dyn TrainerEngine>, Box<dyn RolloutEngine>), Failure> {
    let registry =
        Registry::new().with(backend_naive::BACKEND).with_layer(LAYER).with_layer(quant_fp8::LAYER);
    let context = |rank: u32| {
        let mut config = CheckpointEngineConfig::default();
        config.layers.insert("delta".into(), true.into());
        config.layers.insert("trainer_quantize_fp8".into(), (rank == 0).into());
        EngineContext::new(config).with_rank(Rank(rank))
    };
    let trainer = registry.prepare_trainer(context(0)).await?;
    let rollout = registry.prepare_rollout(context(1)).await?;
    let formed = form_local_group(backend_naive::BACKEND, vec![trainer], vec![rollout]).await;
    let (mut trainers, mut rollouts) = formed?;
    Ok((trainers.remove(0), rollouts.remove(0)))
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let (mut trainer, mut rollout) = group().await?;
    let mut all = Vec::new();
    let mut tensors = 0;
    for version in 1..=UPDATES as u64 {
        let weights = model(version)?;
        let begun = Instant::now();
        let receive = async {
            let mut received = rollout.receive_weights(None).await?;
            let mut seen = 0;
            while let Some(bucket) = received.next_bucket().await? {
                seen += bucket.layout().pieces().len();
            }
            received.finish().await?;
            Ok::<_, engine_core::Error>((seen, begun.elapsed()))
        };
        let send = async {
            let sent = trainer.send_weights(ensure_async_iterator(weights), Version(version)).await;
            sent.map(|report| (report, begun.elapsed()))
        };
        let (sent, received) = futures::join!(send, receive);
        let (report, _) = sent?;
        let (seen, _) = received?;
        tensors = seen;
        // The first one sends everything.
        if version > 1 {
            assert!(report.delta.is_some_and(|delta| delta.whole.is_none()));
            all.push(begun.elapsed().as_secs_f64() * 1e6 / seen as f64);
        }
    }
    all.sort_by(f64::total_cmp);
    let each = all[all.len() / 2];
    writeln!(
        std::io::stdout(),
        "{tensors} tensors, {each:.2} µs for each in an update of changes"
    )?;
    Ok(())
}
