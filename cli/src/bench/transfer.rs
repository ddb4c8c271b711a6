//! What a transport reaches, beside what the machine can do in the same run.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use checkpoint_engine::{
    CheckpointEngineConfig, DType, DeviceChoice, Result, SendReport, StageTimes, Version, Weight,
    WeightStream, ensure_async_iterator,
};
use serde::Serialize;

use crate::device;
use crate::memory::{PeakMemory, memcpy_gb_per_s};
use crate::source::{Source, SourceSpec};
use crate::sync::{Processes, SyncOptions};

/// What to measure.
#[derive(Clone, Debug)]
pub struct TransferOptions {
    /// The model; it is kept in memory and does not change.
    pub source: SourceSpec,
    /// The engine's configuration; its backend is one whose rollouts are processes.
    pub config: CheckpointEngineConfig,
    /// Updates that are measured for each setting, after two that are not.
    pub repeats: usize,
}

/// One setting's result. Rates and times are medians.
#[derive(Clone, Debug, Serialize)]
pub struct TransferLine {
    /// What was sent: the model's size in words, or `tiny tensors`.
    pub what: &'static str,
    /// The transport.
    pub backend: String,
    /// Whether the transport's devices are simulated: then no figure says anything of hardware.
    pub simulated: bool,
    /// Where weights and buckets were.
    pub device: String,
    /// Rollouts. They read the buckets in place; on a device they copy every tensor out.
    pub rollouts: u32,
    /// Whether buckets were guarded by digests.
    pub digests: bool,
    /// The size of a bucket.
    pub bucket_bytes: u64,
    /// Tensors of an update.
    pub tensors: u64,
    /// Bytes of an update.
    pub source_bytes: u64,
    /// Seconds of an update.
    pub seconds: f64,
    /// Seconds of the first update, which allocates, compiles kernels and plans.
    pub first_seconds: f64,
    /// What the trainer spent it with.
    pub stages: StageSeconds,
    /// The same of the first update.
    pub first_stages: StageSeconds,
    /// Source bytes per second.
    pub gb_per_s: f64,
    /// One thread's copy of the same bytes into shared memory, before and after; the mean of both. On a
    /// device, the driver's copy within it.
    pub memcpy_gb_per_s: f64,
    /// The transfer's rate over the copy's.
    pub ratio: f64,
    /// Microseconds for each tensor.
    pub us_per_tensor: f64,
    /// The most memory beyond what there was before the engine was prepared.
    pub extra_peak_bytes: u64,
}

/// [`StageTimes`] in seconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct StageSeconds {
    /// Waiting for the trainer's own stream.
    pub source: f64,
    /// Waiting for rollouts to release a bucket.
    pub release: f64,
    /// Encoding.
    pub encode: f64,
    /// Waiting for confirmations.
    pub confirm: f64,
}

impl From<StageTimes> for StageSeconds {
    fn from(stages: StageTimes) -> Self {
        Self {
            source: stages.source.as_secs_f64(),
            release: stages.release.as_secs_f64(),
            encode: stages.encode.as_secs_f64(),
            confirm: stages.confirm.as_secs_f64(),
        }
    }
}

/// Tensors of the measurement that is about tensors and not about bytes, and the size of each.
const TINY: (u64, u64) = (100_000, 1024);

/// Measures a model with one rollout, digests on and off, with two rollouts, and 100 000 tensors of
/// 1 KiB.
///
/// # Errors
///
/// The first failure of any update.
pub async fn transfer(
    options: &TransferOptions,
    mut each: impl FnMut(&TransferLine) -> Result<()>,
) -> Result<()> {
    let place = device::of_rank(&options.config.device, 0)?;
    let mut source = Source::open(options.source.clone())?.on_device(&place);
    source.advance(Version(1))?;
    let baseline = if place.is_cpu() {
        let weights = source.weights(Version(1))?;
        Baseline::Host(weights.map(|weight| weight?.to_bytes()).collect::<Result<_>>()?)
    } else {
        Baseline::Device(place.clone(), source.byte_len())
    };
    // A second rollout on a device would often find no room for its tensors.
    let settings: &[_] =
        if place.is_cpu() { &[(1, true), (1, false), (2, true)] } else { &[(1, true), (1, false)] };
    for &(rollouts, digests) in settings {
        let weights = || Ok(ensure_async_iterator(source.weights(Version(1))?));
        each(&setting(options, "model", rollouts, digests, &baseline, weights).await?)?;
    }
    drop(baseline);
    if !place.is_cpu() {
        return Ok(());
    }
    let (count, len) = TINY;
    let storage = Bytes::from(vec![0x3c_u8; (count * len) as usize]);
    let tiny: Vec<Weight> = (0..count)
        .map(|index| {
            let at = (index * len) as usize;
            let bytes = storage.slice(at..at + len as usize);
            Weight::new(format!("tiny.{index}.weight"), DType::BF16, [len / 2], bytes)
        })
        .collect::<Result<_>>()?;
    let weights = || Ok(ensure_async_iterator(tiny.iter().cloned()));
    let baseline = Baseline::Host(vec![storage.clone()]);
    each(&setting(options, "tiny tensors", 1, true, &baseline, weights).await?)?;
    Ok(())
}

/// What an update is compared with.
enum Baseline {
    /// A copy of these bytes into shared memory.
    Host(Vec<Bytes>),
    /// A copy of so many bytes within a device.
    Device(DeviceChoice, u64),
}

impl Baseline {
    fn gb_per_s(&self, bucket_bytes: u64) -> Result<f64> {
        match self {
            Self::Host(bytes) => {
                let parts: Vec<&[u8]> = bytes.iter().map(|part| &part[..]).collect();
                memcpy_gb_per_s(&parts, bucket_bytes, 1)
            }
            Self::Device(device, bytes) => device::copy_gb_per_s(device, *bytes),
        }
    }
}

async fn setting<'a>(
    options: &TransferOptions,
    what: &'static str,
    rollouts: u32,
    digests: bool,
    baseline: &Baseline,
    mut weights: impl FnMut() -> Result<WeightStream<'a>>,
) -> Result<TransferLine> {
    let config = CheckpointEngineConfig { digests, ..options.config.clone() };
    let default = if config.device.is_cpu() { 16 } else { 2048 };
    let bucket_bytes = config.bucket_bytes().unwrap_or(default << 20);
    let before = baseline.gb_per_s(bucket_bytes)?;
    let memory = PeakMemory::start()?;
    let updates = options.repeats as u64 + 2;
    let run = SyncOptions {
        source: SourceSpec { updates, ..options.source.clone() },
        config,
        rollouts,
        verify: false,
        out: None,
        metrics: None,
    };
    let mut group = Processes::start(&run, Arc::new(())).await?;
    let mut engine = group.form(&run.source).await?;
    let (mut reports, mut first) = (Vec::<SendReport>::new(), None);
    for version in (1..=updates).map(Version) {
        let report = engine.send_weights(weights()?, version).await?;
        first.get_or_insert((report.elapsed.as_secs_f64(), report.stages));
        if version.0 > 2 {
            reports.push(report);
        }
    }
    engine.finalize().await?;
    group.stop(Duration::from_secs(10)).await?;
    let extra_peak_bytes = memory.extra_peak_bytes();
    let memcpy_gb_per_s = (before + baseline.gb_per_s(bucket_bytes)?) / 2.0;
    reports.sort_by_key(|report| report.elapsed);
    let report = &reports[reports.len() / 2];
    let seconds = report.elapsed.as_secs_f64();
    let (first_seconds, first_stages) = first.unwrap_or((seconds, report.stages));
    Ok(TransferLine {
        what,
        device: run.config.device.to_string(),
        simulated: crate::device::is_simulated(&run.config.backend),
        backend: run.config.backend,
        rollouts,
        digests,
        bucket_bytes,
        tensors: report.counts.tensors,
        source_bytes: report.counts.source_bytes,
        seconds,
        first_seconds,
        stages: report.stages.into(),
        first_stages: first_stages.into(),
        gb_per_s: report.gb_per_s(),
        memcpy_gb_per_s,
        ratio: report.gb_per_s() / memcpy_gb_per_s,
        us_per_tensor: seconds * 1e6 / report.counts.tensors.max(1) as f64,
        extra_peak_bytes,
    })
}
