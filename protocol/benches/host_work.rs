//! What an update costs the host beside its bytes: a mixture of experts whose buckets nobody fills and nobody reads.
//!
//! 18 432 matrices travel as FP8 with their scales, so that an update has 36 864 tensors. Each group's throughput counts
//! these, also where only a part of the way is measured.

use std::hint::black_box;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engine_core::control::Role;
use engine_core::memory::{Job, Pool};
use engine_core::{
    CheckpointEngineConfig, DType, DeviceBytes, DeviceMemory, EngineContext, Rank, Result,
    RolloutEngine, SendReport, Storage, TrainerEngine, Version, Weight, WeightStream,
    ensure_async_iterator,
};
use futures::StreamExt;
use protocol::{ReceiveLink, Receiver, SendLink, Sender, hub};
use quant_fp8::rules::{Rules, RulesConfig};
use quant_fp8::{Fp8Quantizer, QuantizeFp8};

const TENSORS: u64 = 2 * 48 * 128 * 3;
const BUCKET: u64 = 1 << 30;

/// Memory that is not there.
#[derive(Debug)]
struct Nowhere;

impl DeviceMemory for Nowhere {
    fn device(&self) -> String {
        "nowhere".into()
    }
    fn len(&self) -> u64 {
        BUCKET
    }
    fn read(&self, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
}

/// Buckets that stay empty.
#[derive(Debug)]
struct Empty;

#[async_trait]
impl SendLink for Empty {
    fn slots(&self) -> usize {
        4
    }
    fn bucket_bytes(&self) -> u64 {
        BUCKET
    }
    async fn fill(&mut self, _: usize, jobs: Vec<Job>, _: bool) -> Result<u64> {
        drop(black_box(jobs));
        Ok(0)
    }
    async fn publish(&mut self, _: usize, _: u64) -> Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct Unread(Storage);

#[async_trait]
impl ReceiveLink for Unread {
    async fn fetch(&mut self, _: u32, filled: u64) -> Result<Storage> {
        Ok(self.0.slice(0..filled))
    }
}

/// The experts' matrices, all of which are the same memory.
fn model() -> Vec<Weight> {
    let bytes = Bytes::from(vec![0; 768 * 2048 * 2]);
    let mut weights = Vec::new();
    for layer in 0..48 {
        for expert in 0..128 {
            for (name, shape) in
                [("gate_proj", [768, 2048]), ("up_proj", [768, 2048]), ("down_proj", [2048, 768])]
            {
                let name = format!("model.layers.{layer}.mlp.experts.{expert}.{name}.weight");
                let weight = Weight::new(name, DType::BF16, shape, bytes.clone());
                weights.push(weight.expect("a weight"));
            }
        }
    }
    weights
}

fn quantizer() -> Fp8Quantizer {
    Rules::new(&RulesConfig::default()).expect("rules").into()
}

async fn drained(mut stream: WeightStream<'_>) -> u64 {
    let mut bytes = 0;
    while let Some(weight) = stream.next().await {
        bytes += weight.expect("a weight").byte_len();
    }
    bytes
}

/// A trainer and a rollout of one process.
struct Group {
    sender: Sender<Empty>,
    receiver: Receiver<Unread>,
}

impl Group {
    fn new() -> Self {
        let (hub, member) = (hub::Hub::default(), hub::Member::new(Rank(1), Role::Rollout));
        hub.admit(&member).expect("a place");
        let mut config = CheckpointEngineConfig::default();
        config.digests = false;
        let context = EngineContext::new(config);
        let sender = Sender::new(Empty, &context, hub.control(), [Rank(1)]);
        let pool = Pool::new(1).expect("a thread");
        let nowhere = DeviceBytes::new(Arc::new(Nowhere)).into();
        let receiver = Receiver::new(Unread(nowhere), &context, member.control(), pool);
        Self { sender, receiver }
    }

    /// One update, of which the rollout looks at every tensor.
    async fn update(&mut self, weights: WeightStream<'_>, version: u64) -> SendReport {
        let receive = async {
            let mut received = self.receiver.receive_weights(None).await.expect("an update");
            let mut seen = 0;
            while let Some(bucket) = received.next_bucket().await.expect("a bucket") {
                seen += bucket.pieces().map(black_box).len() as u64;
            }
            seen
        };
        let (sent, seen) =
            futures::join!(self.sender.send_weights(weights, Version(version)), receive);
        assert_eq!(seen, TENSORS);
        sent.expect("sent")
    }
}

fn host_work(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let (weights, quantizer) = (model(), quantizer());
    let stream = || ensure_async_iterator(weights.iter().cloned());
    let mut group = criterion.benchmark_group("37 thousand tensors");
    group.throughput(Throughput::Elements(TENSORS)).sample_size(20);
    group.bench_function("the source alone", |bencher| {
        bencher.iter(|| runtime.block_on(drained(stream())));
    });
    group.bench_function("quantised", |bencher| {
        bencher.iter(|| runtime.block_on(drained(stream().quantize_fp8(&quantizer))));
    });
    let mut engines = Group::new();
    let mut version = 0;
    // As the report has it: from the moment at which a bucket's weights are asked for to its plan.
    group.bench_function("quantised, collected and planned", |bencher| {
        bencher.iter_custom(|updates| {
            let update = |_| {
                version += 1;
                let update = engines.update(stream().quantize_fp8(&quantizer), version);
                runtime.block_on(update).stages.source
            };
            (0..updates).map(update).sum()
        });
    });
    group.bench_function("an update, quantised", |bencher| {
        bencher.iter(|| {
            version += 1;
            let update = engines.update(stream().quantize_fp8(&quantizer), version);
            runtime.block_on(update)
        });
    });
    group.finish();
}

criterion_group!(benches, host_work);
criterion_main!(benches);
