//! What the kernels reach, beside copies in the same run; a JSON object a line.
//!
//! ```text
//! cargo run --release -p checkpoint-engine-cuda --example throughput
//! ```
//!
//! Bytes count reads and writes. Each figure is the median of 20 launches after 3, timed by events.

use std::io::Write;

use device_cuda::{CudaError, CudaMemory, Device, DeviceJob, Event, Kernels, Launch, Stream};
use quant_fp8::{Fp8Format, Mode, SourceType};

type Failure = Box<dyn std::error::Error>;

const REPEATS: usize = 20;

fn median_seconds(
    stream: &Stream,
    mut work: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    let (start, end) = (Event::new(stream.device(), true)?, Event::new(stream.device(), true)?);
    let mut seconds = Vec::new();
    for repeat in 0..REPEATS + 3 {
        start.record(stream)?;
        work()?;
        end.record(stream)?;
        end.synchronize()?;
        if repeat >= 3 {
            seconds.push(end.seconds_since(&start)?);
        }
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[REPEATS / 2])
}

/// Random bits with small exponents, as BF16 or F32: made on the host, copied over and over.
fn fill(memory: &CudaMemory, stream: &Stream) -> Result<(), CudaError> {
    const BLOCK: usize = 64 << 20;
    let mut state = 1_u64;
    let block: Vec<u8> = (0..BLOCK / 8)
        .flat_map(|_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            // BF16: no exponent above 2^0; read as F32 likewise.
            (state & 0xbf7f_bf7f_bf7f_bf7f).to_le_bytes()
        })
        .collect();
    let first = BLOCK.min(memory.len());
    memory.slice(0, first)?.write(&block[..first])?;
    let mut at = first;
    while at < memory.len() {
        let len = BLOCK.min(memory.len() - at);
        memory.slice(at, len)?.copy_from(&memory.slice(0, len)?, stream)?;
        at += len;
    }
    stream.synchronize()
}

fn main() -> Result<(), Failure> {
    let device = Device::open(0)?;
    let mut kernels = Kernels::load(&device)?;
    let stream = kernels.stream().clone();
    let mut out = std::io::stdout().lock();

    let len = 4_usize << 30;
    let (source, target) = (CudaMemory::new(&device, len)?, CudaMemory::new(&device, len)?);
    fill(&source, &stream)?;
    let copy = median_seconds(&stream, || target.all().copy_from(&source.all(), &stream))?;
    let copy_rate = 2.0 * len as f64 / copy / 1e9;
    let mut line = |what: &str, bytes: f64, seconds: f64| -> Result<(), Failure> {
        let rate = bytes / seconds / 1e9;
        let line = serde_json::json!({
            "device": device.name()?, "what": what, "gb_per_s": rate, "ratio": rate / copy_rate,
            "ms": seconds * 1e3,
        });
        Ok(writeln!(out, "{line}")?)
    };
    line("cuMemcpyDtoD of 4 GiB", 2.0 * len as f64, copy)?;
    let small = 18_944 * 3584 * 2;
    let (from, to) = (source.slice(0, small)?, target.slice(0, small)?);
    let seconds = median_seconds(&stream, || to.copy_from(&from, &stream))?;
    line("cuMemcpyDtoD of the bytes of 18944x3584 BF16", 2.0 * small as f64, seconds)?;

    // Copies, in one piece and as the tensors of a mixture of experts.
    for count in [1, 384, 18_432] {
        let each = (len / count) & !255;
        let jobs: Vec<DeviceJob> = (0..count)
            .map(|i| {
                let (source, target) =
                    (source.slice(i * each, each)?, target.slice(i * each, each)?);
                Ok(DeviceJob::Copy { source, target })
            })
            .collect::<Result<_, CudaError>>()?;
        let prepared = kernels.prepare(&[Launch::Encode {
            jobs: &jobs,
            format: &Fp8Format::default(),
            summed: None,
        }])?;
        let seconds = median_seconds(&stream, || kernels.launch(&prepared))?;
        line(&format!("grouped copy of {count}"), 2.0 * (each * count) as f64, seconds)?;
    }

    for (ty, mode, count, rows, cols) in [
        (SourceType::Bf16, Mode::Triton, 1, 18_944, 3584),
        (SourceType::Bf16, Mode::Pytorch, 1, 18_944, 3584),
        (SourceType::Bf16, Mode::Ue8m0, 1, 18_944, 3584),
        (SourceType::Bf16, Mode::TritonGpu, 1, 18_944, 3584),
        (SourceType::Bf16, Mode::Triton, 12, 18_944, 3584),
        (SourceType::Bf16, Mode::Triton, 384, 768, 2048),
        (SourceType::Bf16, Mode::Triton, 384, 2048, 768),
        (SourceType::Bf16, Mode::Triton, 64, 5000, 5001),
        (SourceType::F16, Mode::Triton, 12, 18_944, 3584),
        (SourceType::F32, Mode::Triton, 12, 18_944, 3584),
    ] {
        let format = Fp8Format { mode, ..Fp8Format::default() };
        let shape = vec![rows, cols];
        let grid = format.granularity.grid(&shape)?;
        let (elements, scales) = (grid.elements(), grid.scales() * 4);
        let step = (elements + scales).next_multiple_of(256) + 256;
        let jobs: Vec<DeviceJob> = (0..count)
            .map(|i| {
                let bytes = elements * ty.size();
                let at = ((i * bytes.next_multiple_of(256)) % (len - bytes)) & !255;
                let codes = (i * step % (len - step)) & !255;
                let after = (codes + elements).next_multiple_of(256);
                Ok(DeviceJob::Fp8 {
                    source: source.slice(at, bytes)?,
                    ty,
                    shape: shape.clone(),
                    codes: target.slice(codes, elements)?,
                    scales: target.slice(after, scales)?,
                })
            })
            .collect::<Result<_, CudaError>>()?;
        let bytes = count * (elements * (ty.size() + 1) + scales);
        let what = format!("{count} x {rows}x{cols} {ty:?} {mode:?}");
        let bucket = target.all();
        for (summed, with) in [(None, ""), (Some(&bucket), ", with the digest")] {
            let launch = Launch::Encode { jobs: &jobs, format: &format, summed };
            let prepared = kernels.prepare(&[launch])?;
            let seconds = median_seconds(&stream, || kernels.launch(&prepared))?;
            line(&format!("{what}{with}"), bytes as f64, seconds)?;
        }
    }

    for count in [1, 18_432] {
        let each = (len / count) & !255;
        let parts: Vec<_> = (0..count)
            .map(|i| Ok(((i * each) as u64, source.slice(i * each, each)?)))
            .collect::<Result<_, CudaError>>()?;
        let prepared = kernels.prepare(&[Launch::Digest(&parts)])?;
        let seconds = median_seconds(&stream, || kernels.launch(&prepared))?;
        line(&format!("digest of {count} parts"), (each * count) as f64, seconds)?;
    }
    Ok(())
}
