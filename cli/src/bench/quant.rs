//! Quantisation beside a copy of the same input.

use std::time::Instant;

use checkpoint_engine::backend::memory::Pool;
use checkpoint_engine::fp8::{Codec, Fp8Format, Source, SourceType, Store, copy_non_temporal};
use checkpoint_engine::{DeviceChoice, Result};
use serde::Serialize;

use crate::device;

/// What to measure.
#[derive(Clone, Debug)]
pub struct QuantOptions {
    /// The matrix, or a stack of them.
    pub shape: Vec<usize>,
    /// The type of its elements.
    pub ty: SourceType,
    /// What becomes of it.
    pub format: Fp8Format,
    /// How many threads; one codec at a time uses all of them.
    pub threads: usize,
    /// Repetitions of each codec.
    pub repeats: usize,
    /// The device that does it instead of the threads.
    pub device: DeviceChoice,
    /// How many such matrices a launch on the device quantises.
    pub count: usize,
}

/// One codec's result. Rates are medians of the input's bytes; a ratio is the median of those of
/// single repetitions, whose copy ran right before, so that a busy machine slows both. On a device, where
/// reading and writing share one bandwidth, bytes are those read and written, of both.
#[derive(Clone, Debug, Serialize)]
pub struct QuantLine {
    /// The codec: `avx512`, `avx2` or `scalar`, or the device.
    pub codec: String,
    /// The type of the source.
    pub dtype: SourceType,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Threads.
    pub threads: usize,
    /// Input bytes per second, in 10⁹.
    pub gb_per_s: f64,
    /// Bytes per second of a copy of the input past the caches, by as many threads.
    pub copy_gb_per_s: f64,
    /// The first over the second.
    pub ratio: f64,
}

/// Bytes that start where a huge page might.
struct Pages {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Pages {
    fn new(len: usize) -> Self {
        const PAGE: usize = 4096;
        // Ones, so that the pages exist before anything is measured.
        let bytes = vec![1; len + PAGE];
        let start = bytes.as_ptr().align_offset(PAGE).min(PAGE);
        Self { bytes, start, len }
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Fills with numbers that are about normal, with a standard deviation of 0.02, as weights are.
fn fill(out: &mut [u8], ty: SourceType) {
    let mut state = 1_u64;
    let mut uniform = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 40) as f32 / (1_u64 << 24) as f32
    };
    for element in out.chunks_exact_mut(ty.size()) {
        let value = ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * 0.02;
        match ty {
            SourceType::Bf16 => {
                element.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
            }
            SourceType::F16 => element.copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
            SourceType::F32 => element.copy_from_slice(&value.to_le_bytes()),
        }
    }
}

fn copy(pool: &Pool, source: &[u8], out: &mut [u8]) {
    const PIECE: usize = 1 << 19;
    let pieces = source.chunks(PIECE).zip(out.chunks_mut(PIECE));
    pool.map(pieces, |(a, b)| copy_non_temporal(a, b));
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Measures every codec of this machine, the fastest first; the scalar one once.
///
/// # Errors
///
/// Those of the codecs; `Resource` if the threads cannot be started.
pub fn quant(options: &QuantOptions, mut each: impl FnMut(&QuantLine) -> Result<()>) -> Result<()> {
    if !options.device.is_cpu() {
        return each(&device::quantize_rate(options)?);
    }
    let QuantOptions { shape, ty, format, threads, repeats, .. } = options;
    let pool = Pool::new(*threads)?;
    let grid = format.granularity.grid(shape)?;
    let len = grid.elements() * ty.size();
    let (mut source, mut copied) = (Pages::new(len), Pages::new(len));
    let mut codes = Pages::new(grid.elements());
    let mut scales = vec![0.0; grid.scales()];
    fill(source.get(), *ty);
    let bytes = &*source.get();
    let matrix = Source::new(bytes, *ty, shape)?;
    for codec in Codec::available() {
        let repeats = if codec.name() == "scalar" { 1 } else { *repeats };
        let (mut copies, mut codecs) = (Vec::new(), Vec::new());
        for _ in 0..repeats {
            let started = Instant::now();
            copy(&pool, bytes, copied.get());
            copies.push(started.elapsed().as_secs_f64().max(1e-9));
            let (codes, scales, store) = (codes.get(), &mut scales[..], Store::NonTemporal);
            let started = Instant::now();
            codec.quantize_parallel(&pool, &matrix, format, codes, scales, store)?;
            codecs.push(started.elapsed().as_secs_f64().max(1e-9));
        }
        let ratios = copies.iter().zip(&codecs).map(|(copy, codec)| copy / codec);
        let ratio = median(ratios.collect());
        let rate = |seconds| len as f64 / seconds / 1e9;
        each(&QuantLine {
            codec: codec.name().to_owned(),
            dtype: *ty,
            shape: shape.clone(),
            threads: *threads,
            gb_per_s: rate(median(codecs)),
            copy_gb_per_s: rate(median(copies)),
            ratio,
        })?;
    }
    Ok(())
}
