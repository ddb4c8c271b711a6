//! What the tests have instead of GPUs and servers: a library of collectives within the process, and a server that keeps
//! to vLLM's contract to the letter.

#![allow(dead_code, reason = "each test program uses a part")]

pub(crate) mod collectives;
pub(crate) mod server;

use engine_core::{
    CheckpointEngineConfig, DType, EngineContext, Placement, Result, TrainerEngine, Weight,
};
use serde_json::json;

/// The weights of a small model at a version: layers of several types, of sizes that fit no alignment, and one weight that
/// is larger than a bucket.
pub(crate) fn model(version: u64) -> Vec<Weight> {
    let tensor = |name: &str, dtype: DType, shape: &[u64]| {
        let len = shape.iter().product::<u64>() * dtype.bits() / 8;
        let seed = name.bytes().map(u64::from).sum::<u64>() + version * 7919;
        let bytes: Vec<u8> = (0..len).map(|at| (seed + at * 31) as u8).collect();
        Weight::new(name, dtype, shape, bytes).expect("a weight")
    };
    let mut weights = vec![tensor("embed.weight", DType::BF16, &[151, 64])];
    for layer in 0..6 {
        let name = |part: &str| format!("layers.{layer}.{part}");
        weights.push(tensor(&name("proj.weight"), DType::F8_E4M3, &[33, 129]));
        weights.push(tensor(&name("proj.weight_scale_inv"), DType::F32, &[1, 2]));
        weights.push(tensor(&name("proj.bias"), DType::BF16, &[33]));
        weights.push(tensor(&name("norm.weight"), DType::F32, &[129]));
    }
    weights.push(tensor("head.weight", DType::BF16, &[101, 64]));
    weights
}

/// A trainer that sends to these servers, in buckets of a MiB at most, over the library within the process.
pub(crate) async fn trainer(
    servers: &[&server::Server],
    options: serde_json::Value,
) -> Box<dyn TrainerEngine> {
    trainer_with(servers, options, 4.0).await.expect("a trainer")
}

pub(crate) async fn trainer_with(
    servers: &[&server::Server],
    mut options: serde_json::Value,
    seconds: f64,
) -> Result<Box<dyn TrainerEngine>> {
    options["servers"] = servers.iter().map(|server| server.url()).collect();
    let mut config = CheckpointEngineConfig {
        backend: "vllm".into(),
        timeout_seconds: seconds,
        update_weights_bucket_megabytes: Some(1),
        threads: std::num::NonZeroUsize::new(1),
        ..Default::default()
    };
    config.engine_kwargs.insert("vllm".into(), options.as_object().cloned().unwrap_or_default());
    let library = collectives::InProcess { bucket_bytes: 16 << 10 };
    // Smaller buckets than the configuration has, so that an update has several.
    config.update_weights_bucket_megabytes = None;
    let prepared = receivers::prepare_vllm(library, EngineContext::new(config)).await?;
    let workers = [prepared.metadata().clone()];
    let place = Placement::of_rank(receivers::VLLM.build_topology(&workers)?, workers[0].rank)?;
    prepared.join(place).await
}

/// Options without any.
pub(crate) fn plain() -> serde_json::Value {
    json!({})
}
