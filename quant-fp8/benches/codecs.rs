//! The codecs on one core, beside a copy of the same input past the caches.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use quant_fp8::{Codec, Fp8Format, Mode, Source, SourceType, Store, copy_non_temporal};

const SHAPE: [usize; 2] = [2048, 4096];

/// Numbers between -0.02 and 0.02, of many exponents.
fn weights(ty: SourceType) -> Vec<u8> {
    let numbers = (0..SHAPE[0] * SHAPE[1]).map(|index| {
        let uniform = (index as u32).wrapping_mul(2_654_435_761) >> 8;
        (uniform as f32 / (1 << 24) as f32 - 0.5) * 0.04
    });
    match ty {
        SourceType::Bf16 => {
            numbers.flat_map(|number| half::bf16::from_f32(number).to_le_bytes()).collect()
        }
        SourceType::F16 => {
            numbers.flat_map(|number| half::f16::from_f32(number).to_le_bytes()).collect()
        }
        SourceType::F32 => numbers.flat_map(f32::to_le_bytes).collect(),
    }
}

fn quantising(criterion: &mut Criterion) {
    let elements = SHAPE[0] * SHAPE[1];
    for ty in [SourceType::Bf16, SourceType::F32] {
        let mut group = criterion.benchmark_group(format!("quantize {ty:?}"));
        group.sample_size(20);
        let source = weights(ty);
        let matrix = Source::new(&source, ty, &SHAPE).expect("a matrix");
        group.throughput(Throughput::Bytes(source.len() as u64));
        let mut copy = vec![0; source.len()];
        group.bench_function("copy", |bencher| {
            bencher.iter(|| copy_non_temporal(black_box(&source), &mut copy));
        });
        let mut codes = vec![0; elements];
        for mode in [Mode::Triton, Mode::Ue8m0] {
            let format = Fp8Format { mode, ..Default::default() };
            let grid = format.granularity.grid(&SHAPE).expect("blocks");
            let mut scales = vec![0.0; grid.scales()];
            for codec in Codec::available() {
                let id = BenchmarkId::new(codec.name(), format!("{mode:?}"));
                group.bench_function(id, |bencher| {
                    bencher.iter(|| {
                        let (codes, scales) = (&mut codes, &mut scales);
                        let store = Store::NonTemporal;
                        codec
                            .quantize(
                                black_box(&matrix),
                                &format,
                                0..elements,
                                codes,
                                scales,
                                store,
                            )
                            .expect("finite numbers")
                    });
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, quantising);
criterion_main!(benches);
