//! Trainers that hold a model in one layout, and rollouts that lend tensors of another.

use std::collections::HashMap;
use std::sync::Arc;

use checkpoint_engine::control::ControlConfig;
use checkpoint_engine::fp8::rules::{Decision, QuantPlan};
use checkpoint_engine::fp8::{Codec, Fp8Config, Source as Matrix, SourceType, Store, stored};
use checkpoint_engine::placed::{PlacedTensor, Wanted};
use checkpoint_engine::reshard::{Parallelism, ShardedTensor};
use checkpoint_engine::{
    CheckpointEngineConfig, ControlPlane, DType, EngineContext, Error, ErrorKind, Rank,
    ReceiveReport, Recovery, Result, Role, TensorBox, TensorMeta, Version, Weight, join_group,
    registry,
};

use crate::roles::Parent;
use crate::source::{Source, SourceSpec};

const VERIFYING: &str = "verifying what was written";

/// How trainers hold a model and how rollouts want it. The ranks of trainers are the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placing {
    /// The layout of the trainers.
    pub trainers: Parallelism,
    /// The layout of the rollouts.
    pub rollouts: Parallelism,
}

/// What one trainer holds of every tensor.
#[derive(Debug)]
pub struct Shard(HashMap<Arc<str>, Boxes>);

/// What a trainer holds of a tensor.
#[derive(Debug)]
enum Boxes {
    Whole,
    Parts(Vec<TensorBox>),
}

impl Placing {
    /// The configuration of trainers: they write into tensors that are lent, and what is quantised is for rollouts to say.
    ///
    /// # Errors
    ///
    /// `Config` for a backend or a device that has no placed updates, and for quantisation on the rollouts.
    pub fn of_trainers(&self, config: &CheckpointEngineConfig) -> Result<CheckpointEngineConfig> {
        let refuse = |message: String| Error::new(ErrorKind::Config, "placing a model", message);
        let mut config = config.clone();
        if !["ipc", "nixl", "nccl", "hccl"].contains(&&*config.backend) {
            let backend = &config.backend;
            return Err(refuse(format!(
                "{backend} has no placed updates: ipc, nixl, nccl and hccl have"
            )));
        }
        let mut fp8 = Fp8Config::of(&config)?;
        if fp8.quantization.quantize_on_receive {
            let message = "nothing is left to quantise on a rollout that trainers write to";
            return Err(refuse(message.into()));
        }
        fp8.trainer_quantize_fp8 = false;
        fp8.put_into(&mut config)?;
        let section = config.engine_kwargs.entry(config.backend.clone()).or_default();
        section.insert("placed".into(), true.into());
        Ok(config)
    }

    /// What a trainer holds.
    ///
    /// # Errors
    ///
    /// `Config` if the layout does not fit the model.
    pub fn shard(&self, source: &Source, rank: Rank) -> Result<Shard> {
        let tensors = source.metas().map(|meta| (meta.clone(), [].into()));
        let sharding = self.trainers.sharding(Rank::LEADER, tensors)?;
        let boxes = |tensor: &ShardedTensor| {
            let parts: Vec<TensorBox> = tensor.layout.boxes_of(rank).cloned().collect();
            let boxes = match &parts[..] {
                [only] if only.is_whole(&tensor.meta.shape) => Boxes::Whole,
                _ => Boxes::Parts(parts),
            };
            (tensor.meta.name.clone(), boxes)
        };
        Ok(Shard(sharding.tensors().map(boxes).collect()))
    }

    /// What a rollout wants: quantised where the configuration has trainers quantise.
    ///
    /// # Errors
    ///
    /// `Config` if the layout does not fit the model, or its rules for quantisation.
    pub fn wants(
        &self,
        source: &Source,
        config: &CheckpointEngineConfig,
        rank: Rank,
    ) -> Result<Vec<Wanted>> {
        let fp8 = Fp8Config::of(config)?;
        let parameter = |meta: &TensorMeta| {
            let shape = meta.shape.iter().map(|&side| side as usize).collect();
            (meta.name.to_string(), shape, stored(meta.dtype))
        };
        let plan = match fp8.trainer_quantize_fp8 {
            false => None,
            true => {
                Some(QuantPlan::resolve(source.metas().map(parameter), &fp8.quantization.rules())?)
            }
        };
        let tensors = source.metas().map(|meta| (meta.clone(), [].into()));
        let sharding = self.rollouts.sharding(Rank(self.trainers.ranks), tensors)?;
        let wanted = source.metas().flat_map(|meta| {
            let tensor = sharding.get(&meta.name);
            let boxes = tensor.into_iter().flat_map(|tensor| tensor.layout.boxes_of(rank));
            let format = plan.as_ref().and_then(|plan| {
                let quantized = plan.get(&meta.name)?.decision == Decision::Quantize;
                quantized.then(|| *plan.format())
            });
            boxes.map(move |region| {
                let wanted = Wanted::whole(meta.clone()).part(region.clone());
                match format {
                    Some(format) => wanted.quantized(format),
                    None => wanted,
                }
            })
        });
        Ok(wanted.collect())
    }
}

impl Shard {
    /// The boxes that the trainer holds of a tensor, in the memory that the whole tensor has.
    ///
    /// # Errors
    ///
    /// Those of the weight.
    pub fn of(&self, weight: Weight) -> Result<Vec<Weight>> {
        let parts = match self.0.get(weight.name()) {
            None => return Ok(Vec::new()),
            Some(Boxes::Whole) => return Ok(vec![weight]),
            Some(Boxes::Parts(parts)) => parts,
        };
        let shape = weight.meta().shape.clone();
        let mut strides = vec![1_i64; shape.len()];
        for at in (1..shape.len()).rev() {
            strides[at - 1] = strides[at] * shape[at] as i64;
        }
        let boxes = parts.iter().map(|region| {
            let ranges = region.ranges();
            let extent: Vec<u64> = ranges.iter().map(|range| range.end - range.start).collect();
            let offset =
                ranges.iter().zip(&strides).map(|(range, stride)| range.start * *stride as u64);
            let (name, dtype) = (weight.meta().name.clone(), weight.meta().dtype);
            let offset: u64 = offset.sum();
            // On a device a box is sent from there if it is in one piece. Others are read: frameworks have theirs in one piece.
            if let Some(storage) = weight.storage().filter(|_| region.runs(&shape) == 1)
                && let Some(size) = dtype.bytes()
            {
                let bytes = storage.slice(offset * size..(offset + region.elements()) * size);
                let meta = TensorMeta::new(name, dtype, extent);
                return Weight::from_meta(meta, bytes)?.of_box(shape.clone(), region.clone());
            }
            let bytes = weight.to_bytes()?;
            Weight::strided(name, dtype, extent, strides.clone(), offset, bytes)?
                .of_box(shape.clone(), region.clone())
        });
        boxes.collect()
    }
}

/// The first element of a box that is not the one that the whole tensor has there.
fn first_other(
    got: &[u8],
    size: usize,
    whole: &[u8],
    shape: &[u64],
    region: &TensorBox,
) -> Option<usize> {
    let ranges = region.ranges();
    let (cols, first) = match ranges.last() {
        Some(last) => ((last.end - last.start) as usize, last.start as usize),
        None => (1, 0),
    };
    let rows = got.chunks(cols.max(1) * size).enumerate();
    rows.filter_map(|(row, got)| {
        let (mut rest, mut at, mut stride) = (row as u64, 0, 1);
        let outer = ranges.iter().zip(shape);
        for (range, side) in outer.take(ranges.len().saturating_sub(1)).rev() {
            at += (range.start + rest % (range.end - range.start)) * stride;
            rest /= range.end - range.start;
            stride *= side;
        }
        let start = (at as usize * shape.last().map_or(1, |&side| side as usize) + first) * size;
        let expected = whole.get(start..start + got.len());
        match expected {
            Some(expected) if expected == got => None,
            Some(expected) => {
                let differs = got.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(0);
                Some(row * cols + differs / size)
            }
            None => Some(row * cols),
        }
    })
    .next()
}

/// Compares a box with the whole tensor of the source, quantised as a whole if it is.
///
/// # Errors
///
/// `Digest`, naming the first element that is another; `Mismatch` for a tensor that the source does not have.
fn check(source: &Source, version: Version, tensor: &PlacedTensor<'_>) -> Result<()> {
    let wanted = tensor.wanted;
    let fail = |kind, message: String| {
        let error = Error::new(kind, VERIFYING, message).tensor(&*wanted.meta.name);
        // Writing it again makes the same bytes.
        error.version(version).recovery(Recovery::Abort)
    };
    let meta = source
        .meta(&wanted.meta.name)
        .ok_or_else(|| fail(ErrorKind::Mismatch, "the source has no such tensor".into()))?;
    let bytes = source.bytes_of(meta, version)?;
    let shape = &meta.shape;
    let compare =
        |what: &str, got: &[u8], size: usize, whole: &[u8], shape: &[u64], region: &TensorBox| {
            match first_other(got, size, whole, shape, region) {
                None => Ok(()),
                Some(at) => Err(fail(
                    ErrorKind::Digest,
                    format!("{what} {at} of the box {region} is not that of the whole tensor"),
                )),
            }
        };
    let Some(format) = &wanted.format else {
        let size = meta.dtype.bytes().unwrap_or(1) as usize;
        return compare("element", &tensor.bytes()?, size, &bytes, shape, &wanted.region);
    };
    let ty = match meta.dtype {
        DType::BF16 => SourceType::Bf16,
        DType::F16 => SourceType::F16,
        DType::F32 => SourceType::F32,
        other => return Err(fail(ErrorKind::Mismatch, format!("{other} has no FP8 form"))),
    };
    let sides: Vec<usize> = shape.iter().map(|&side| side as usize).collect();
    let grid = format.granularity.grid(&sides)?;
    let (mut codes, mut scales) = (vec![0; grid.elements()], vec![0.0; grid.scales()]);
    let all = 0..grid.elements();
    Matrix::new(&bytes, ty, &sides).and_then(|matrix| {
        Codec::best().quantize(&matrix, format, all, &mut codes, &mut scales, Store::Cached)
    })?;
    compare("code", &tensor.bytes()?, 1, &codes, shape, &wanted.region)?;
    let Some((of_scales, region)) = wanted.scales()? else { return Ok(()) };
    let scales: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    compare("scale", &tensor.scales()?, 4, &scales, &of_scales.shape, &region)
}

/// What the process of a rollout that lends its tensors was started with.
#[derive(Clone, Debug)]
pub struct PlacedOptions {
    /// Where the trainer is.
    pub control: ControlConfig,
    /// The rank to take.
    pub rank: Rank,
    /// The number of ranks of the group.
    pub world_size: u32,
    /// The engine's configuration.
    pub config: CheckpointEngineConfig,
    /// The model.
    pub source: SourceSpec,
    /// Who has which part of it.
    pub placing: Placing,
    /// Whether to compare every element with the source.
    pub verify: bool,
    /// Whether the weights stay the same from one update to the next.
    pub still: bool,
    /// Whether the trainer's process has started this one.
    pub is_child: bool,
}

/// The process of a rollout that lends its tensors: takes part in all updates, to the last one. Whether it has that; if not,
/// the trainer's process says why.
///
/// # Errors
///
/// Those of the group; an update that failed is reported to `each` and the next one waited for.
pub async fn placed_rollout(
    options: PlacedOptions,
    mut each: impl FnMut(&Result<ReceiveReport>) -> Result<()>,
) -> Result<bool> {
    let parent = Parent::new(options.is_child);
    let control = ControlPlane::join(options.control, Role::Rollout, Some(options.rank)).await?;
    let source = Source::open(options.source)?;
    let wanted = options.placing.wants(&source, &options.config, control.rank())?;
    let last = Version(source.spec().updates);
    let deadline = options.config.timeout();
    let registry = registry();
    let backend = registry.get(&options.config.backend)?;
    let context = EngineContext::new(options.config.clone()).with_control(control.clone());
    let prepared = checkpoint_engine::lend(context, wanted)?;
    let world_size = Some(options.world_size);
    let (mut rollout, _) = join_group(prepared, backend, &control, world_size, deadline).await?;
    if options.verify {
        let source = Arc::new(source);
        let still = options.still.then_some(Version(1));
        rollout = rollout.inspected_by(Arc::new(move |version, tensor| {
            check(&source, still.unwrap_or(version), &tensor)
        }));
    }
    loop {
        let result = match rollout.update(None).await {
            Err(error) if error.says_trainer_is_gone() => {
                return if parent.is_there().await { Ok(false) } else { Err(error) };
            }
            // No update began, which is no failure: trainers are training.
            Err(error)
                if error.kind() == ErrorKind::Timeout && error.report().version.is_none() =>
            {
                continue;
            }
            result => result,
        };
        if !result.as_ref().is_err_and(|error| parent.tells(error)) {
            each(&result)?;
        }
        if matches!(&result, Ok(report) if report.version == last) {
            break;
        }
    }
    rollout.finalize().await?;
    control.close().await?;
    Ok(true)
}
