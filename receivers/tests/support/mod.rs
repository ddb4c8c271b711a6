//! What the tests have instead of GPUs and servers: a library of collectives within the process, and a server that keeps
//! to vLLM's or SGLang's contract to the letter.

#![allow(dead_code, reason = "each test program uses a part")]

pub(crate) mod collectives;
pub(crate) mod ignored_layers;
pub(crate) mod python;
pub(crate) mod rep;
pub(crate) mod server;
mod sglang_contract;
mod unpickle;
mod vllm_contract;

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;

use async_trait::async_trait;
use engine_core::{
    Availability, Backend, CheckpointEngineConfig, DType, EngineContext, Placement,
    PreparedRollout, PreparedTrainer, Registry, Result, TrainerEngine, Version, Weight,
    WorkerMetadata, ensure_async_iterator, form_local_group,
};
use futures::FutureExt;
use serde_json::json;

use server::Contract;

/// The weights of a small model at a version: layers of several types, of sizes that fit no alignment, and one weight that
/// is larger than a bucket.
pub(crate) fn model(version: u64) -> Vec<Weight> {
    layers(version, 6, [33, 129])
}

/// The same with so many layers, whose projections have this shape.
pub(crate) fn layers(version: u64, count: usize, projection: [u64; 2]) -> Vec<Weight> {
    let tensor = |name: &str, dtype: DType, shape: &[u64]| {
        let len = shape.iter().product::<u64>() * dtype.bits() / 8;
        let seed = name.bytes().map(u64::from).sum::<u64>() + version * 7919;
        let bytes: Vec<u8> = (0..len).map(|at| (seed + at * 31) as u8).collect();
        Weight::new(name, dtype, shape, bytes).expect("a weight")
    };
    let mut weights = vec![tensor("embed.weight", DType::BF16, &[151, 64])];
    for layer in 0..count {
        let name = |part: &str| format!("layers.{layer}.{part}");
        weights.push(tensor(&name("proj.weight"), DType::F8_E4M3, &projection));
        weights.push(tensor(&name("proj.weight_scale_inv"), DType::F32, &[1, 2]));
        weights.push(tensor(&name("proj.bias"), DType::BF16, &[33]));
        weights.push(tensor(&name("norm.weight"), DType::F32, &[129]));
    }
    weights.push(tensor("head.weight", DType::BF16, &[101, 64]));
    weights
}

/// A backend, with a library of collectives within the process in the place of NCCL.
#[derive(Debug)]
struct OverTheProcess {
    contract: Contract,
    is_ring: bool,
}

impl OverTheProcess {
    fn real(&self) -> &'static dyn Backend {
        match self.contract {
            Contract::Vllm => receivers::VLLM,
            Contract::Sglang => receivers::SGLANG,
        }
    }
}

#[async_trait]
impl Backend for OverTheProcess {
    fn name(&self) -> &'static str {
        self.real().name()
    }

    fn summary(&self) -> &'static str {
        "for tests"
    }

    fn probe(&self) -> Availability {
        Availability::Usable { details: "always".into() }
    }

    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
        let (bucket_bytes, is_ring) = (BUCKET_BYTES, self.is_ring);
        let options = context.config.engine_kwargs.get(self.name());
        let devices = options.and_then(|options| options.get("devices")).cloned();
        let devices = devices.and_then(|devices| serde_json::from_value(devices).ok());
        let devices = devices.unwrap_or_default();
        let library = collectives::InProcess { bucket_bytes, is_ring, devices };
        match self.contract {
            Contract::Vllm => receivers::prepare_vllm(library, context).await,
            Contract::Sglang => receivers::prepare_sglang(library, context).await,
        }
    }

    async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
        self.real().prepare_rollout(context).await
    }

    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
        self.real().build_topology(workers)
    }
}

/// So small that an update of a small model has several buckets.
const BUCKET_BYTES: u64 = 16 << 10;

/// A trainer that sends to these servers.
pub(crate) async fn trainer(
    servers: &[&server::Server],
    options: serde_json::Value,
) -> Box<dyn TrainerEngine> {
    trainer_with(servers, options, 4.0).await.expect("a trainer")
}

/// The same with a deadline of its own.
pub(crate) async fn trainer_with(
    servers: &[&server::Server],
    options: serde_json::Value,
    seconds: f64,
) -> Result<Box<dyn TrainerEngine>> {
    let mut config = config(servers, options);
    config.timeout_seconds = seconds;
    join(config, false).await
}

/// What a trainer's configuration is.
pub(crate) fn config(
    servers: &[&server::Server],
    mut options: serde_json::Value,
) -> CheckpointEngineConfig {
    let backend = servers.first().map_or("vllm", |server| server.contract().backend());
    options["servers"] = servers.iter().map(|server| server.url()).collect();
    let mut config = CheckpointEngineConfig::new(backend);
    config.timeout_seconds = 4.0;
    config.threads = std::num::NonZeroUsize::new(1);
    config.engine_kwargs.insert(backend.into(), options.as_object().cloned().unwrap_or_default());
    config
}

/// The backends and the layer in front of them.
pub(crate) fn registry(is_ring: bool) -> Registry {
    Registry::new()
        .with(OverTheProcess { contract: Contract::Vllm, is_ring })
        .with(OverTheProcess { contract: Contract::Sglang, is_ring })
        .with_layer(quant_fp8::LAYER)
}

/// A trainer of a configuration; its broadcasts go round a ring if that is asked for.
pub(crate) async fn join(
    config: CheckpointEngineConfig,
    is_ring: bool,
) -> Result<Box<dyn TrainerEngine>> {
    let registry = registry(is_ring);
    let name = config.backend.clone();
    let prepared = registry.prepare_trainer(EngineContext::new(config)).await?;
    let backend = registry.get(&name)?;
    let (mut trainers, _) = form_local_group(backend, vec![prepared], Vec::new()).await?;
    Ok(trainers.remove(0))
}

/// Weights of one size, each of which fills a bucket: a bucket that is taken for another one is not told by its length.
pub(crate) fn even(version: u64) -> Vec<Weight> {
    let weight = |number: u64| {
        let bytes: Vec<u8> =
            (0..BUCKET_BYTES).map(|at| (version * 101 + number * 13 + at) as u8).collect();
        let shape = [BUCKET_BYTES / 2];
        Weight::new(format!("layers.{number}.weight"), DType::BF16, shape, bytes).expect("a weight")
    };
    (0..7).map(weight).collect()
}

/// Begins an update, and drops it when the stream is asked for its weight `at`. What servers were told just before is under way
/// then, and no server was told anything after it.
pub(crate) async fn drop_at(trainer: &mut dyn TrainerEngine, weights: Vec<Weight>, at: usize) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    let stream = ensure_async_iterator(weights.into_iter().inspect(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
    }));
    let mut sent = trainer.send_weights(stream, Version(1)).boxed();
    poll_fn(|context| match sent.poll_unpin(context) {
        Poll::Pending if asked.load(Ordering::Relaxed) <= at => Poll::Pending,
        _ => Poll::Ready(()),
    })
    .await;
}

/// Options without any.
pub(crate) fn plain() -> serde_json::Value {
    json!({})
}
