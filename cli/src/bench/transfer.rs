//! What a transport reaches, beside what the machine can do in the same run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use checkpoint_engine::nixl::bare;
use checkpoint_engine::{
    CheckpointEngineConfig, DType, DeltaReport, DeviceChoice, Rank, Result, SendReport, StageTimes,
    Version, Weight, WeightStream, ensure_async_iterator,
};
use serde::Serialize;

use crate::device;
use crate::memory::{PeakMemory, memcpy_gb_per_s};
use crate::placed::Placing;
use crate::processes::Processes;
use crate::roles::{BARE, stream};
use crate::runtime::aside;
use crate::source::{Source, SourceSpec};
use crate::sync::SyncOptions;

/// What to measure.
#[derive(Clone, Debug)]
pub struct TransferOptions {
    /// The model; it is kept in memory and does not change.
    pub source: SourceSpec,
    /// The engine's configuration; its backend is one whose rollouts are processes.
    pub config: CheckpointEngineConfig,
    /// Whether rollouts compare every element of every box, which placed updates alone can: it takes longer than they do.
    pub verify: bool,
    /// Updates that are measured for each setting, after two that are not.
    pub repeats: usize,
    /// How many trainers; all of them have the model.
    pub trainers: u32,
    /// Who has which part of the model, where trainers write into rollouts' tensors: their layouts say how many ranks there are.
    pub placing: Option<Placing>,
    /// The numbers of rollouts to measure with; the usual ones if there are none.
    pub rollouts: Vec<u32>,
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
    /// Trainers that have the model.
    pub trainers: u32,
    /// The layouts of trainers and rollouts, where trainers write into rollouts' tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placed: Option<[String; 2]>,
    /// Whether rollouts compared every element in every update.
    pub verified: bool,
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
    /// Bytes of an update that travelled.
    pub wire_bytes: u64,
    /// What had changed, where only that travels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<DeltaReport>,
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
    /// With `nixl` and one rollout: what bare transfers of as many bytes as travelled reached, slot by
    /// slot between the same two processes, one after each update.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bare_gb_per_s: Option<f64>,
    /// Their time over the update's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bare_ratio: Option<f64>,
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
    /// Handing filled buckets to the transport.
    pub publish: f64,
    /// Waiting for confirmations.
    pub confirm: f64,
}

impl From<StageTimes> for StageSeconds {
    fn from(stages: StageTimes) -> Self {
        Self {
            source: stages.source.as_secs_f64(),
            release: stages.release.as_secs_f64(),
            encode: stages.encode.as_secs_f64(),
            publish: stages.publish.as_secs_f64(),
            confirm: stages.confirm.as_secs_f64(),
        }
    }
}

/// Tensors of the measurement that is about tensors and not about bytes, and the size of each.
const TINY: (u64, u64) = (100_000, 1024);

/// Bytes that are copied in place of a model's that changes.
const STAND_IN: u64 = 256 << 20;

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
    let is_on_host = !device::keeps_tensors(&place);
    let baseline = if is_on_host && options.source.change_rate.is_some() {
        // The model's own bytes change between updates. As many others are copied, more than a cache has room for at a time.
        let (whole, rest) = (source.byte_len() / STAND_IN, source.byte_len() % STAND_IN);
        let others = Bytes::from(vec![0x3c_u8; source.byte_len().min(STAND_IN) as usize]);
        let whole = std::iter::repeat_n(others.clone(), whole as usize);
        Baseline::Host(whole.chain([others.slice(..rest as usize)]).collect())
    } else if is_on_host {
        let weights = source.weights(Version(1))?;
        Baseline::Host(weights.map(|weight| weight?.to_bytes()).collect::<Result<_>>()?)
    } else {
        Baseline::Device(place.clone(), source.byte_len())
    };
    // A second rollout on a device would often find no room for its tensors.
    let settings: &[_] =
        if place.is_cpu() { &[(1, true), (1, false), (2, true)] } else { &[(1, true), (1, false)] };
    let chosen: Vec<_> =
        options.rollouts.iter().flat_map(|&count| [(count, true), (count, false)]).collect();
    let placed = options.placing.as_ref().map(|placing| placing.rollouts.ranks);
    let placed: Vec<_> = placed.into_iter().flat_map(|n| [(n, true), (n, false)]).collect();
    let settings = match (placed.is_empty(), chosen.is_empty()) {
        (false, _) => &placed,
        (true, false) => &chosen,
        (true, true) => settings,
    };
    let placing = options.placing.as_ref();
    let shard = placing.map(|placing| placing.shard(&source, Rank::LEADER)).transpose()?;
    for &(rollouts, digests) in settings {
        // Without a rate nothing changes, and the model is made once.
        let changes = options.source.change_rate.is_some();
        let weights = |version| {
            let values = if changes { version } else { Version(1) };
            let weights = source.weights(values)?;
            Ok(stream(options.source.sent(weights, version), shard.as_ref()))
        };
        each(&setting(options, "model", rollouts, digests, &baseline, weights).await?)?;
    }
    drop(baseline);
    if !place.is_cpu() || !options.rollouts.is_empty() || options.placing.is_some() {
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
    let weights = |_| Ok(ensure_async_iterator(tiny.iter().cloned()));
    let baseline = Baseline::Host(vec![storage.clone()]);
    let mut all = options.clone();
    all.source.only.clear();
    each(&setting(&all, "tiny tensors", 1, true, &baseline, weights).await?)?;
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
    mut weights: impl FnMut(Version) -> Result<WeightStream<'a>>,
) -> Result<TransferLine> {
    let mut config = options.config.clone();
    config.digests = digests;
    let default = match (config.device.is_cpu(), config.backend.as_str()) {
        (true, _) => 16,
        (false, "ipc") => 2048,
        (false, _) => 512,
    };
    let bucket_bytes = config.bucket_bytes().unwrap_or(default << 20);
    let before = baseline.gb_per_s(bucket_bytes)?;
    let memory = PeakMemory::start()?;
    let measured = 3..options.repeats as u64 + 3;
    let bare = rollouts == 1 && options.config.backend == "nixl" && options.placing.is_none();
    // The rollout ends after the last update, and bare transfers come after each that counts.
    let updates = measured.end - 1 + u64::from(bare);
    let run = SyncOptions {
        source: SourceSpec { updates, ..options.source.clone() },
        config,
        trainers: options.trainers,
        still: true,
        rollouts,
        devices: BTreeMap::new(),
        verify: options.verify,
        out: None,
        metrics: None,
        placing: options.placing.clone(),
        attests: false,
        bare,
    };
    let mut group = Processes::start(&run, Arc::new(())).await?;
    let mut engine = group.form(&run).await?;
    let target = group.workers.last().map(|rollout| rollout.attributes[BARE].clone());
    let target = target.filter(|_| run.bare);
    let mut engine_peak_bytes = None;
    let (mut reports, mut first, mut bare) = (Vec::<SendReport>::new(), None, Vec::new());
    for version in (1..=updates).map(Version) {
        let report = match run.source.is_part(version) {
            true => engine.send_part(weights(version)?, version).await?,
            false => engine.send_weights(weights(version)?, version).await?,
        };
        first.get_or_insert((report.elapsed.as_secs_f64(), report.stages));
        if version.0 == 2 && target.is_some() {
            // Bare transfers take memory of their own.
            engine_peak_bytes = Some(memory.extra_peak_bytes());
        }
        if measured.contains(&version.0) {
            if let Some(target) = &target {
                bare.push(bare_seconds(&run.config, target, report.counts.wire_bytes).await?);
            }
            reports.push(report);
        }
    }
    engine.finalize().await?;
    group.stop(Duration::from_secs(10)).await?;
    let extra_peak_bytes = engine_peak_bytes.unwrap_or(memory.extra_peak_bytes());
    let memcpy_gb_per_s = (before + baseline.gb_per_s(bucket_bytes)?) / 2.0;
    reports.sort_by_key(|report| report.elapsed);
    let report = &reports[reports.len() / 2];
    let seconds = report.elapsed.as_secs_f64();
    bare.sort_by(f64::total_cmp);
    let bare = bare.get(bare.len() / 2).copied();
    let (first_seconds, first_stages) = first.unwrap_or((seconds, report.stages));
    Ok(TransferLine {
        what,
        device: run.config.device.to_string(),
        simulated: crate::device::is_simulated(&run.config.backend),
        backend: run.config.backend,
        trainers: options.trainers,
        placed: options
            .placing
            .as_ref()
            .map(|placing| [placing.trainers.to_string(), placing.rollouts.to_string()]),
        verified: options.verify,
        rollouts,
        digests,
        bucket_bytes,
        tensors: report.counts.tensors,
        source_bytes: report.counts.source_bytes,
        wire_bytes: report.counts.wire_bytes,
        delta: report.delta.clone(),
        seconds,
        first_seconds,
        stages: report.stages.into(),
        first_stages: first_stages.into(),
        gb_per_s: report.gb_per_s(),
        memcpy_gb_per_s,
        ratio: report.gb_per_s() / memcpy_gb_per_s,
        bare_gb_per_s: bare.map(|bare| report.counts.wire_bytes as f64 / 1e9 / bare),
        bare_ratio: bare.map(|bare| bare / seconds),
        us_per_tensor: seconds * 1e6 / report.counts.tensors.max(1) as f64,
        extra_peak_bytes,
    })
}

/// What a bare transfer to or from the rollout's process takes.
async fn bare_seconds(
    config: &CheckpointEngineConfig,
    target: &serde_json::Value,
    bytes: u64,
) -> Result<f64> {
    let device = device::of_rank(&config.device, 0)?;
    let mut config = config.clone();
    config.device = device;
    let target = target.clone();
    let memory = checkpoint_engine::registry().memory(&config.device);
    aside(move || bare::seconds(&config, memory, &target, bytes)).await?
}
