//! CUDA devices.

use std::ops::Range;

use checkpoint_engine::cuda::{
    self, CudaMemory, CudaTensorMap, Device, DeviceJob, Event, Kernels, Launch, Stream,
    driver_version,
};
use checkpoint_engine::{
    ArenaArc, DeviceChoice, Error, ErrorKind, Install, Result, TensorMeta, Weight,
};

use crate::bench::quant::{QuantLine, QuantOptions, median};
use crate::threads::pool;

/// Where tensors begin in memory.
const ALIGNMENT: usize = 256;
/// Bytes that are made at a time and then copied to the device.
const STAGE: usize = 64 << 20;
/// Bytes that one thread makes at a time.
const JOB: usize = 1 << 20;

pub(super) fn open(device: &DeviceChoice) -> Result<Device> {
    let ordinal = i32::try_from(device.ordinal().unwrap_or(0)).unwrap_or(i32::MAX);
    Ok(Device::open(ordinal)?)
}

pub(super) fn count(_: &DeviceChoice) -> Result<u32> {
    Ok(cuda::count()?.unsigned_abs())
}

pub(super) fn destination(device: &DeviceChoice, bytes: u64) -> Result<Box<dyn Install>> {
    let mut tensors = CudaTensorMap::new(&open(device)?)?;
    tensors.reserve(bytes)?;
    Ok(Box::new(tensors))
}

pub(super) fn copy_gb_per_s(device: &DeviceChoice, bytes: u64) -> Result<f64> {
    const REPEATS: usize = 15;

    let device = open(device)?;
    // Larger than any cache, and small beside the model.
    let len = bytes.clamp(1 << 20, 2 << 30) as usize;
    let (from, to) = (CudaMemory::new(&device, len)?, CudaMemory::new(&device, len)?);
    let stream = Stream::new(&device)?;
    let mut rates = Vec::new();
    for _ in 0..REPEATS {
        let (before, after) = (Event::new(&device, true)?, Event::new(&device, true)?);
        before.record(&stream)?;
        to.all().copy_from(&from.all(), &stream)?;
        after.record(&stream)?;
        stream.synchronize()?;
        rates.push(len as f64 / 1e9 / after.seconds_since(&before)?.max(1e-9));
    }
    rates.sort_by(f64::total_cmp);
    Ok(rates[REPEATS / 2])
}

pub(super) fn quantize_rate(options: &QuantOptions) -> Result<QuantLine> {
    let QuantOptions { shape, ty, format, repeats, count, .. } = options;
    let device = open(&options.device)?;
    let grid = format.granularity.grid(shape)?;
    let (elements, scales) = (grid.elements(), grid.scales() * size_of::<f32>());
    let bytes = elements * ty.size();
    let memory = |len: usize| CudaMemory::new(&device, len * count);
    let pitch = |len: usize| len.next_multiple_of(ALIGNMENT);
    let source = memory(pitch(bytes))?;
    let (codes, results) = (memory(pitch(elements))?, memory(pitch(scales))?);
    let mut kernels = Kernels::load(&device)?;
    let stream = kernels.stream().clone();
    // Numbers of the size that weights have, in every type.
    source.all().fill(0x3c, &stream)?;
    let jobs = (0..*count).map(|index| {
        Ok(DeviceJob::Fp8 {
            source: source.slice(index * pitch(bytes), bytes)?,
            ty: *ty,
            shape: shape.clone(),
            codes: codes.slice(index * pitch(elements), elements)?,
            scales: results.slice(index * pitch(scales), scales)?,
        })
    });
    let jobs: Vec<DeviceJob> = jobs.collect::<Result<_>>()?;
    let launch = Launch::Encode { jobs: &jobs, format, summed: None };
    let prepared = kernels.prepare(&[launch])?;

    // As many bytes, half of them read and half written.
    let moved = (bytes + elements + scales) * count;
    let (from, to) = (CudaMemory::new(&device, moved / 2)?, CudaMemory::new(&device, moved / 2)?);
    let time = |work: &mut dyn FnMut() -> std::result::Result<(), cuda::CudaError>| {
        let (before, after) = (Event::new(&device, true)?, Event::new(&device, true)?);
        before.record(&stream)?;
        work()?;
        after.record(&stream)?;
        stream.synchronize()?;
        Ok::<_, Error>(after.seconds_since(&before)?.max(1e-9))
    };
    let (mut copies, mut encodes) = (Vec::new(), Vec::new());
    for repeat in 0..repeats + 3 {
        let copy = time(&mut || to.all().copy_from(&from.all(), &stream))?;
        let encode = time(&mut || kernels.launch(&prepared))?;
        // The first ones find the device asleep.
        if repeat >= 3 {
            copies.push(copy);
            encodes.push(encode);
        }
    }
    let ratios = copies.iter().zip(&encodes).map(|(copy, encode)| copy / encode).collect();
    let rate = |seconds: Vec<f64>| moved as f64 / median(seconds) / 1e9;
    Ok(QuantLine {
        codec: options.device.to_string(),
        dtype: *ty,
        shape: shape.clone(),
        threads: 0,
        ratio: median(ratios),
        gb_per_s: rate(encodes),
        copy_gb_per_s: rate(copies),
    })
}

pub(super) fn describe() -> Vec<String> {
    let count = match cuda::count() {
        Ok(count) => count,
        Err(error) => return vec![format!("cuda: not usable: {error}")],
    };
    let mut lines = Vec::new();
    let version = |version: std::result::Result<(i32, i32), cuda::CudaError>| match version {
        Ok((major, minor)) => format!("{major}.{minor}"),
        Err(error) => error.to_string(),
    };
    lines.push(format!(
        "cuda: {count} devices, driver for CUDA {}, NVRTC {}",
        version(driver_version()),
        version(cuda::nvrtc())
    ));
    for ordinal in 0..count {
        let line = Device::open(ordinal).and_then(|device| {
            let (free, total) = device.memory()?;
            let (major, minor) = device.capability();
            let shared = match CudaMemory::new(&device, 1).and_then(|memory| memory.export()) {
                Ok(_) => "other processes can open its memory".to_owned(),
                Err(error) => format!("other processes cannot open its memory ({error})"),
            };
            Ok(format!(
                "cuda:{ordinal}: {}, sm_{major}{minor}, {} of {} MiB free, {shared}",
                device.name()?,
                free >> 20,
                total >> 20
            ))
        });
        lines.push(line.unwrap_or_else(|error| format!("cuda:{ordinal}: not usable: {error}")));
    }
    lines
}

/// A model on a device, as a trainer's is: allocated once, changed in place.
#[derive(Debug)]
pub struct DeviceModel {
    memory: CudaMemory,
    tensors: Vec<Placed>,
}

/// A tensor of a model, and the bytes of the model's memory that it has.
#[derive(Debug)]
struct Placed {
    meta: ArenaArc<TensorMeta>,
    bytes: Range<usize>,
}

impl DeviceModel {
    /// Allocates a model and puts weights there.
    pub(crate) fn new(device: &DeviceChoice, weights: super::HostWeights<'_>) -> Result<Self> {
        let weights: Vec<Weight> = weights.collect::<Result<_>>()?;
        let mut end = 0_usize;
        let place = |weight: &Weight| {
            let bytes = end..end + weight.byte_len() as usize;
            end = bytes.end.next_multiple_of(ALIGNMENT);
            Placed { meta: weight.meta().clone(), bytes }
        };
        let tensors = weights.iter().map(place).collect();
        let mut model = Self { memory: CudaMemory::new(&open(device)?, end)?, tensors };
        model.refill(&mut weights.into_iter().map(Ok))?;
        Ok(model)
    }

    /// Puts other values there.
    pub(crate) fn refill(&mut self, weights: super::HostWeights<'_>) -> Result<()> {
        let mut staging = vec![0; STAGE];
        let mut parts: Vec<Part> = Vec::new();
        for (Placed { meta, bytes }, weight) in self.tensors.iter().zip(weights) {
            let weight = weight?;
            if weight.meta() != meta {
                let message = "another tensor came in its place";
                return Err(Error::new(ErrorKind::State, "filling a model on a device", message)
                    .tensor(&*meta.name));
            }
            for at in bytes.clone().step_by(STAGE) {
                let to = at..bytes.end.min(at + STAGE);
                if parts.first().is_some_and(|first| to.end - first.to.start > STAGE) {
                    self.put(&parts, &mut staging)?;
                    parts.clear();
                }
                parts.push(Part { weight: weight.clone(), start: at - bytes.start, to });
            }
        }
        self.put(&parts, &mut staging)
    }

    /// Makes parts that follow one another, which `staging` has room for, on all cores: many of a model's tensors are too small for all of
    /// them. Then copies all at once: a copy of a single tensor takes longer to be waited for than to be made.
    fn put(&self, parts: &[Part], staging: &mut [u8]) -> Result<()> {
        let (Some(first), Some(last)) = (parts.first(), parts.last()) else { return Ok(()) };
        let all = first.to.start..last.to.end;
        let (mut jobs, mut rest, mut at) = (Vec::new(), &mut staging[..all.len()], all.start);
        for Part { weight, start, to } in parts {
            let (_, own) = rest.split_at_mut(to.start - at);
            let (own, others) = own.split_at_mut(to.len());
            (rest, at) = (others, to.end);
            let starts = (*start..).step_by(JOB);
            jobs.extend(starts.zip(own.chunks_mut(JOB)).map(|job| (weight, job)));
        }
        let encoded = pool()?.map(jobs, |(weight, (start, bytes))| {
            weight.encode(start as u64..(start + bytes.len()) as u64, bytes)
        });
        encoded.into_iter().collect::<Result<()>>()?;
        Ok(self.memory.slice(all.start, all.len())?.write(&staging[..all.len()])?)
    }

    /// All tensors, in place.
    pub(crate) fn weights(&self) -> Vec<Result<Weight>> {
        let weight = |Placed { meta, bytes }: &Placed| {
            let place = self.memory.slice(bytes.start, bytes.len())?;
            Weight::from_meta(meta.clone(), place.storage())
        };
        self.tensors.iter().map(weight).collect()
    }
}

/// A part of a weight, and its place in the model's memory.
struct Part {
    weight: Weight,
    /// Where it begins in the weight.
    start: usize,
    to: Range<usize>,
}
