//! What an update does to a bucket on the host: planning, encoding, digests.
//!
//! Rates mean something beside the copy of the same bytes, which each group measures as well.

use std::hint::black_box;
use std::sync::Arc;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine_core::memory::{Job, Pool};
use engine_core::plan::{BucketLayout, BucketPlanner, Piece};
use engine_core::{DType, TensorMeta, Weight, digest};

const BUCKET: u64 = 16 << 20;

/// Bytes that are not all the same.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 31 % 251) as u8).collect()
}

fn digests(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("digest");
    for len in [64 << 10, 16 << 20] {
        let (source, mut copy) = (bytes(len), vec![0; len]);
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::new("sum", len), |bencher| {
            bencher.iter(|| digest::sum(0, black_box(&source)));
        });
        for (unit, sum) in digest::units() {
            let rows = source.as_chunks().0;
            group.bench_function(BenchmarkId::new(unit, len), |bencher| {
                bencher.iter(|| sum(0, black_box(rows)));
            });
        }
        group.bench_function(BenchmarkId::new("copy", len), |bencher| {
            bencher.iter(|| copy.copy_from_slice(black_box(&source)));
        });
    }
    group.finish();
}

/// Names and sizes in bytes of a mixture of experts.
fn model() -> Vec<(Arc<str>, u64)> {
    let experts = (0..48).flat_map(|layer| (0..128).map(move |expert| (layer, expert)));
    experts
        .flat_map(|(layer, expert)| {
            ["gate_proj", "up_proj", "down_proj"].map(|name| {
                let name = format!("model.layers.{layer}.mlp.experts.{expert}.{name}.weight");
                (name.into(), 768 * 2048 * 2)
            })
        })
        .collect()
}

fn plans(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    let model = model();
    group.throughput(Throughput::Elements(model.len() as u64));
    group.bench_function("place", |bencher| {
        bencher.iter(|| {
            let mut planner = BucketPlanner::new(BUCKET).expect("a planner");
            let mut buckets = 0_u64;
            for (name, len) in black_box(&model) {
                while planner.place(name.len(), *len, *len, 2).is_none() {
                    planner.close();
                    buckets += 1;
                }
            }
            buckets
        });
    });
    // A bucket of as many small weights as a mixture of experts has.
    let pieces: Vec<Piece> = (0..)
        .zip(&model)
        .map(|(index, (name, _))| {
            let meta = TensorMeta::new(name.clone(), DType::BF16, [64, 4]).into();
            Piece { meta, start: 0, len: 512, offset: index * 512 }
        })
        .collect();
    group.bench_function("layout", |bencher| {
        bencher.iter_batched(
            || pieces.clone(),
            |pieces| BucketLayout::new(pieces).digest(),
            criterion::BatchSize::LargeInput,
        );
    });
    group.finish();
}

fn encoding(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("encode");
    let pool = Pool::new(1).expect("a thread");
    let mut bucket = vec![0; BUCKET as usize];
    for len in [1 << 10, 256 << 10, BUCKET] {
        let source = Bytes::from(bytes(len as usize));
        let jobs: Vec<Job> = (0..BUCKET / len)
            .map(|index| {
                let name = format!("layers.{index}.weight");
                let weight = Weight::new(name, DType::U8, [len], source.clone()).expect("a weight");
                Job { weight, start: 0, len, offset: index * len }
            })
            .collect();
        group.throughput(Throughput::Bytes(BUCKET));
        for (what, digests) in [("plain", false), ("with digest", true)] {
            group.bench_function(BenchmarkId::new(what, len), |bencher| {
                bencher.iter(|| pool.encode(black_box(&jobs), &mut bucket, digests));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, digests, plans, encoding);
criterion_main!(benches);
