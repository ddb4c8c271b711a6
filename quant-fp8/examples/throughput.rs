//! Measures quantisation against a non-temporal copy of the same input.
//!
//! ```text
//! cargo run --release -p quant-fp8 --example throughput [ROWSxCOLS] [REPETITIONS] [FILTER]
//! ```
//!
//! Prints, per codec, type and number of threads, the median bandwidth of the input and the median
//! of the ratios: each repetition runs the copy and the codec right after one another, so that a
//! busy machine slows both. The best of each is what an idle machine would give.

use std::io::Write;
use std::time::Instant;

use half::{bf16, f16};
use quant_fp8::{Codec, Fp8Format, Precast, Source, SourceType, Store, copy_non_temporal};
use rayon::prelude::*;

type AnyError = Box<dyn std::error::Error>;

/// Bytes that start where a huge page might.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        // Ones, so that the pages exist before anything is measured.
        let bytes = vec![1; len + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self { bytes, start, len }
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// About normal, with a standard deviation of 0.02.
fn fill(out: &mut [u8], ty: SourceType) {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    for element in out.chunks_exact_mut(ty.size()) {
        let value = ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * 0.02;
        match ty {
            SourceType::Bf16 => element.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            SourceType::F16 => element.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            SourceType::F32 => element.copy_from_slice(&value.to_le_bytes()),
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn copy_parallel(source: &[u8], out: &mut [u8]) {
    const PIECE: usize = 1 << 19;
    source.par_chunks(PIECE).zip(out.par_chunks_mut(PIECE)).for_each(|(a, b)| {
        copy_non_temporal(a, b);
    });
}

fn main() -> Result<(), AnyError> {
    let mut arguments = std::env::args().skip(1);
    let shape = arguments.next().unwrap_or_else(|| "18944x3584".to_owned());
    let shape: Vec<usize> = shape.split('x').map(str::parse).collect::<Result<_, _>>()?;
    let repetitions = arguments.next().map_or(Ok(15), |n| n.parse())?;
    let elements = shape.iter().product::<usize>();
    let only = arguments.next();
    let mut stdout = std::io::stdout().lock();
    writeln!(
        stdout,
        "codec\tprecast\ttype\tthreads\tcopy GB/s\tquantise GB/s\tratio\tbest copy\tbest quantise"
    )?;

    for ty in [SourceType::Bf16, SourceType::F16, SourceType::F32] {
        let len = elements * ty.size();
        let (mut source, mut copied, mut codes) =
            (Aligned::new(len), Aligned::new(len), Aligned::new(elements));
        fill(source.get(), ty);
        let bytes = source.get();
        let source = Source::new(bytes, ty, &shape)?;
        for codec in Codec::available() {
            for precast in [Precast::Bf16, Precast::None] {
                let row = format!("{} {precast:?} {ty:?}", codec.name());
                let wanted = only.as_ref().is_none_or(|only| row.contains(only));
                if !wanted || precast == Precast::None && ty == SourceType::Bf16 {
                    continue;
                }
                let format = Fp8Format { precast, ..Fp8Format::default() };
                let mut scales = vec![0f32; format.granularity.grid(&shape)?.scales()];
                for threads in [1, rayon::current_num_threads()] {
                    let repetitions = if codec.name() == "scalar" { 1 } else { repetitions };
                    let (mut copies, mut codecs) = (Vec::new(), Vec::new());
                    for _ in 0..repetitions {
                        copies.push(seconds(|| match threads {
                            1 => copy_non_temporal(bytes, copied.get()),
                            _ => copy_parallel(bytes, copied.get()),
                        }));
                        let (all, codes, scales) = (0..elements, codes.get(), &mut scales[..]);
                        let store = Store::NonTemporal;
                        let mut result = Ok(());
                        codecs.push(seconds(|| {
                            result = match threads {
                                1 => codec.quantize(&source, &format, all, codes, scales, store),
                                _ => codec
                                    .quantize_parallel(&source, &format, all, codes, scales, store),
                            };
                        }));
                        result?;
                    }
                    let ratios = copies.iter().zip(&codecs).map(|(copy, codec)| copy / codec);
                    let ratio = median(ratios.collect());
                    let best = |times: &Vec<f64>| times.iter().copied().fold(f64::MAX, f64::min);
                    let (best_copy, best_codec) = (best(&copies), best(&codecs));
                    let speed = |seconds| len as f64 / seconds / 1e9;
                    writeln!(
                        stdout,
                        "{}\t{precast:?}\t{ty:?}\t{threads}\t{:.2}\t{:.2}\t{ratio:.3}\t{:.2}\t{:.2}",
                        codec.name(),
                        speed(median(copies)),
                        speed(median(codecs)),
                        speed(best_copy),
                        speed(best_codec),
                    )?;
                }
            }
        }
    }
    Ok(())
}
