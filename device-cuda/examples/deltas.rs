//! What finding and applying changes takes, of weights that lie on a GPU; a JSON object a line.
//!
//! ```text
//! cargo run --release -p checkpoint-engine-cuda --example deltas
//! ```
//!
//! 6144 matrices of 768 x 2048 in BF16, 19.3 GB, of which the lowest bit of one element in a hundred changes. Times are medians, of the host's
//! work as well.

use std::io::Write;
use std::time::Instant;

use device_cuda::{CudaMemory, CudaShadows, Device};
use engine_core::changes::{Compared, Due, ShadowBytes, ShadowMemory};
use engine_core::memory::Pool;
use engine_core::{DType, Weight};
use futures::StreamExt;
use quant_fp8::rules::{Receiver, Rules, RulesConfig};
use quant_fp8::{Fp8Quantizer, QuantizeFp8};

type Failure = Box<dyn std::error::Error>;

const SHAPE: [u64; 2] = [768, 2048];
const MATRICES: usize = 6144;

/// The values of a matrix, and the same with changes.
fn values() -> [Vec<u8>; 2] {
    let mut state = 9_u64;
    let mut next = |end: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % end
    };
    let elements = SHAPE.iter().product::<u64>();
    let bits = (0..elements).map(|_| {
        let value = (next(2000) as f32 - 1000.0) / 4096.0;
        (value.to_bits() >> 16) as u16
    });
    let before: Vec<u16> = bits.collect();
    let after = before.iter().map(|bits| bits ^ u16::from(next(100) == 0)).collect();
    [before, after].map(|all: Vec<u16>| all.into_iter().flat_map(u16::to_le_bytes).collect())
}

fn in_fp8(weights: Vec<Weight>) -> Result<Vec<Weight>, Failure> {
    let mut config = RulesConfig::default();
    config.receiver = Receiver::Any;
    let quantizer: Fp8Quantizer = Rules::new(&config)?.into();
    let all: Vec<_> = futures::executor::block_on(weights.quantize_fp8(&quantizer).collect());
    Ok(all.into_iter().collect::<engine_core::Result<_>>()?)
}

fn milliseconds(
    mut work: impl FnMut() -> engine_core::Result<()>,
) -> Result<f64, engine_core::Error> {
    let mut all = Vec::new();
    for _ in 0..5 {
        let begun = Instant::now();
        work()?;
        all.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    all.sort_by(f64::total_cmp);
    Ok(all[2])
}

fn main() -> Result<(), Failure> {
    let device = Device::open(0)?;
    let pool = Pool::new(8)?;
    let [before, after] = values();
    let memory = CudaMemory::new(&device, before.len() * MATRICES)?;
    let slices = (0..MATRICES).map(|at| memory.slice(at * before.len(), before.len()));
    let slices = slices.collect::<Result<Vec<_>, _>>()?;
    let fill = |bytes: &[u8]| slices.iter().try_for_each(|slice| slice.write(bytes));
    let plain = slices.iter().enumerate().map(|(at, slice)| {
        let name = format!("model.layers.0.mlp.experts.{at}.up_proj.weight");
        Weight::new(name, DType::BF16, SHAPE, slice.storage())
    });
    let plain: Vec<Weight> = plain.collect::<engine_core::Result<_>>()?;
    let fp8 = in_fp8(plain.clone())?;
    for (what, weights, batch) in
        [("FP8", &fp8, 32 << 20), ("FP8", &fp8, 256 << 20), ("BF16", &plain, 256 << 20)]
    {
        let shadows = CudaShadows::with_batch(&device, batch)?;
        fill(&before)?;
        let lens: Vec<u64> = weights.iter().map(Weight::byte_len).collect();
        let mut copies = shadows.allocate(&lens)?;
        shadows.encode(weights, &mut copies, &pool)?;
        fill(&after)?;
        let per = weights.len() * batch as usize / lens.iter().sum::<u64>() as usize;
        let compare = |copies: &[Box<dyn ShadowBytes>]| {
            let batches = weights.chunks(per).zip(copies.chunks(per));
            let found = batches.map(|(weights, copies)| {
                let pairs: Vec<_> =
                    weights.iter().zip(copies).map(|(one, copy)| (one, &**copy)).collect();
                shadows.compare(&pairs, &pool)
            });
            found.collect::<engine_core::Result<Vec<Compared>>>()
        };
        let mut found = Vec::new();
        let comparing = milliseconds(|| {
            found = compare(&copies)?;
            Ok(())
        })?;
        let applying = milliseconds(|| {
            for (Compared { weights, values }, copies) in found.iter().zip(copies.chunks_mut(per)) {
                let due = weights.iter().zip(copies).map(|(found, to)| Due {
                    name: "a matrix",
                    to,
                    cut: found.cut,
                    words: &found.words,
                });
                shadows.apply(&mut due.collect::<Vec<_>>(), values, true, &pool)?;
            }
            Ok(())
        })?;
        let line = serde_json::json!({
            "type": what,
            "batch_bytes": batch,
            "bytes": lens.iter().sum::<u64>(),
            "changes_bytes": found.iter().map(|found| found.values.len()).sum::<u64>(),
            "compare_ms": comparing,
            "apply_ms": applying,
        });
        writeln!(std::io::stdout(), "{line}")?;
    }
    Ok(())
}
