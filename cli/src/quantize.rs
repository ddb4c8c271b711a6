//! Checkpoints in FP8 and back.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use checkpoint_engine::fp8::rules::{Decision, QuantPlan, RulesConfig, weight_of_scale};
use checkpoint_engine::fp8::{
    BlockGrid, Codec, Fp8Quantizer, Granularity, QuantizeFp8, SourceType, stored,
};
use engine_core::{DType, Error, ErrorKind, Result, TensorMeta, Treatment, Weight};
use futures::StreamExt;
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, CheckpointWriter};

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";

/// What a conversion did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// Tensors whose bytes changed.
    pub converted: u64,
    /// Tensors that were left as they are, by the reason.
    pub kept: BTreeMap<String, u64>,
    /// Bytes of all tensors before.
    pub bytes_before: u64,
    /// Bytes of all tensors after.
    pub bytes_after: u64,
}

/// The plan of a checkpoint, with the rules that its `config.json` adds.
///
/// # Errors
///
/// What the rules refuse; `Io` for a `config.json` that cannot be read.
pub fn plan_of(checkpoint: &Checkpoint, rules: &RulesConfig) -> Result<QuantPlan> {
    let mut rules = rules.clone();
    if let Some(config) = model_config(checkpoint.path())? {
        let own = config.get("quantization_config").filter(|own| !own.is_null());
        rules.quantization_config = rules.quantization_config.or_else(|| own.cloned());
    }
    let parameters = checkpoint.metas().map(|meta| {
        let shape = meta.shape.iter().map(|&side| side as usize).collect();
        (meta.name.to_string(), shape, stored(meta.dtype))
    });
    Ok(QuantPlan::resolve(parameters, &rules)?)
}

/// Writes a checkpoint in FP8, as vLLM and SGLang load it: the same shards, an index of what is in
/// them, and a `config.json` with the `quantization_config`.
///
/// `output` is a `.safetensors` file for a file, a folder for a folder. `progress` is told of the
/// bytes that were read.
///
/// # Contract
///
/// Memory is bounded by a few MiB beyond the mapped files. What is there under the name `output` is
/// complete: a folder is filled under another name and renamed at the end.
///
/// # Errors
///
/// `Config` if `output` exists; what the rules refuse; the first block that is not finite; `Io`.
pub fn quantize(
    input: &Checkpoint,
    output: &Path,
    rules: &RulesConfig,
    progress: impl FnMut(u64),
) -> Result<Converted> {
    let plan = plan_of(input, rules)?;
    let quantization = plan.quantization_config()?;
    let quantizer = Fp8Quantizer::from(plan.clone());
    let weights = |weights: Vec<Weight>| -> Vec<Result<Weight>> {
        // Every shard by itself: whether halves have their other halves is asked of the whole, by
        // the plan.
        weights.into_iter().flat_map(|weight| one(weight, &plan, &quantizer)).collect()
    };
    let change = |config: &mut Value| config["quantization_config"] = quantization.clone();
    convert(input, output, weights, change, progress)
}

/// A weight as it is in the FP8 checkpoint: itself, or its codes and scales.
fn one(weight: Weight, plan: &QuantPlan, quantizer: &Fp8Quantizer) -> Vec<Result<Weight>> {
    let entry = plan.get(weight.name());
    match entry.map(|entry| (entry.decision, &entry.rule)) {
        Some((Decision::Quantize, _)) => {
            let stream = vec![weight].quantize_fp8(quantizer);
            futures::executor::block_on(stream.collect())
        }
        Some((Decision::Keep, rule)) => {
            vec![Ok(weight.with_treatment(Treatment::Kept(rule.to_string().into())))]
        }
        _ => vec![Ok(weight.with_treatment(Treatment::PassedThrough))],
    }
}

/// Writes an FP8 checkpoint in `ty` again, without scales and without `quantization_config`.
///
/// # Errors
///
/// As [`quantize`]; `Weight` for FP8 weights without scales or with scales of another shape than
/// blocks have.
pub fn dequantize(
    input: &Checkpoint,
    output: &Path,
    ty: SourceType,
    progress: impl FnMut(u64),
) -> Result<Converted> {
    let block = model_config(input.path())?.and_then(|config| {
        let size = config.get("quantization_config")?.get("weight_block_size")?;
        serde_json::from_value::<[usize; 2]>(size.clone()).ok()
    });
    let mut scales = HashMap::new();
    for meta in input.metas() {
        if let Some(weight) = weight_of_scale(&meta.name) {
            scales.insert(weight.to_owned(), meta.name.to_string());
        }
    }
    let weights = |weights: Vec<Weight>| -> Vec<Result<Weight>> {
        let is_fp8 = |name: &str| input.meta(name).is_some_and(|m| m.dtype == DType::F8_E4M3);
        let convert = |weight: Weight| -> Option<Result<Weight>> {
            if weight.meta().dtype == DType::F8_E4M3 {
                let scale = scales.get(weight.name()).and_then(|name| input.get(name));
                return Some(wide(&weight, scale, block, ty));
            }
            let of_fp8 = weight_of_scale(weight.name()).is_some_and(is_fp8);
            let kept = Treatment::Kept("is not FP8".into());
            (!of_fp8).then(|| Ok(weight.with_treatment(kept)))
        };
        weights.into_iter().filter_map(convert).collect()
    };
    let change = |config: &mut Value| {
        if let Some(config) = config.as_object_mut() {
            config.remove("quantization_config");
        }
    };
    convert(input, output, weights, change, progress)
}

/// An FP8 weight that is dequantised while it is written.
#[derive(Debug)]
struct Wide {
    codes: Bytes,
    scales: Vec<f32>,
    grid: BlockGrid,
    ty: SourceType,
    codec: Codec,
    row: u64,
}

fn wide(
    weight: &Weight,
    scale: Option<Weight>,
    block: Option<[usize; 2]>,
    ty: SourceType,
) -> Result<Weight> {
    let meta = weight.meta().clone();
    let refuse = |message: String| {
        Error::new(ErrorKind::Weight, "dequantising", message).tensor(&*meta.name)
    };
    let scale = scale.ok_or_else(|| refuse("it is FP8 but its scale is missing".into()))?;
    let shape: Vec<usize> = meta.shape.iter().map(|&side| side as usize).collect();
    let scale_shape: Vec<usize> = scale.meta().shape.iter().map(|&side| side as usize).collect();
    let blocks = block.map(|[rows, cols]| Granularity::Block { rows, cols });
    let candidates = [blocks.unwrap_or_default(), Granularity::PerRow, Granularity::PerTensor];
    let grids = candidates.iter().filter_map(|granularity| granularity.grid(&shape).ok());
    let fits = |grid: &BlockGrid| {
        // A scale of a whole tensor is also written without dimensions.
        grid.scale_shape() == scale_shape || grid.scales() == 1 && scale_shape.is_empty()
    };
    let grid = grids.into_iter().find(fits).ok_or_else(|| {
        refuse(format!("scales of shape {scale_shape:?} for a weight of shape {shape:?}"))
    })?;
    let bytes = scale.to_bytes()?;
    let scales: Vec<f32> = match scale.meta().dtype {
        DType::F32 => bytes.as_chunks::<4>().0.iter().map(|s| f32::from_le_bytes(*s)).collect(),
        DType::BF16 => {
            let scale = |s: &[u8; 2]| half::bf16::from_le_bytes(*s).to_f32();
            bytes.as_chunks::<2>().0.iter().map(scale).collect()
        }
        other => return Err(refuse(format!("scales of type {other}"))),
    };
    let dtype = match ty {
        SourceType::Bf16 => DType::BF16,
        SourceType::F16 => DType::F16,
        SourceType::F32 => DType::F32,
    };
    let row = meta.shape.last().copied().unwrap_or(1) * ty.size() as u64;
    let codes = weight.to_bytes()?;
    let wide = Wide { codes, scales, grid, ty, codec: Codec::best(), row };
    Weight::encoded(TensorMeta { dtype, ..meta }, Arc::new(wide), Treatment::Quantized)
}

impl engine_core::Encoding for Wide {
    fn name(&self) -> &'static str {
        "dequantise"
    }

    fn source_bytes(&self) -> u64 {
        self.codes.len() as u64
    }

    fn granule(&self) -> u64 {
        self.row
    }

    fn encode_host(&self, range: std::ops::Range<u64>, destination: &mut [u8]) -> Result<()> {
        let size = self.ty.size() as u64;
        // Whole elements, of which the first and the last may be wanted in part.
        let elements = (range.start / size) as usize..range.end.div_ceil(size) as usize;
        let mut values = vec![0; elements.len() * self.ty.size()];
        let codes = &self.codes[elements.clone()];
        let scales = &self.scales[self.grid.scales_of(&elements)];
        self.codec.dequantize(codes, &self.grid, elements, scales, self.ty, &mut values)?;
        let skip = (range.start % size) as usize;
        destination.copy_from_slice(&values[skip..skip + destination.len()]);
        Ok(())
    }
}

/// The `config.json` beside a checkpoint.
fn model_config(path: &Path) -> Result<Option<Value>> {
    let folder = if path.is_dir() { Some(path) } else { path.parent() };
    let Some(file) = folder.map(|folder| folder.join(CONFIG)).filter(|file| file.is_file()) else {
        return Ok(None);
    };
    let operation = format!("reading {}", file.display());
    let text = std::fs::read_to_string(&file).map_err(|error| Error::io(&*operation, error))?;
    serde_json::from_str(&text).map(Some).map_err(|error| {
        Error::new(ErrorKind::Config, operation, error.to_string()).with_source(error)
    })
}

/// Writes every shard of a checkpoint with its weights changed, and all that belongs to it.
fn convert(
    input: &Checkpoint,
    output: &Path,
    weights: impl Fn(Vec<Weight>) -> Vec<Result<Weight>>,
    change: impl Fn(&mut Value),
    mut progress: impl FnMut(u64),
) -> Result<Converted> {
    let exists = |path: &Path| {
        let message = format!("{} exists already", path.display());
        Error::new(ErrorKind::Config, "writing a checkpoint", message)
    };
    if output.exists() {
        return Err(exists(output));
    }
    let mut done = Converted::default();
    if !input.path().is_dir() {
        write_shard(input, 0, output, &weights, &mut done, &mut progress)?;
        return Ok(done);
    }
    let parent = match output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let operation = format!("writing {}", output.display());
    let failed = |error| Error::io(&*operation, error);
    std::fs::create_dir_all(parent).map_err(failed)?;
    // Removed when something fails; a crash leaves it under a name that nobody takes for a model.
    let unfinished =
        tempfile::Builder::new().prefix(".unfinished-").tempdir_in(parent).map_err(failed)?;
    let folder = unfinished.path();
    let mut map = BTreeMap::new();
    for (index, shard) in input.shards().iter().enumerate() {
        let name = file_name(shard.path());
        let names =
            write_shard(input, index, &folder.join(&name), &weights, &mut done, &mut progress)?;
        map.extend(names.into_iter().map(|tensor| (tensor, name.clone())));
    }
    if input.shards().len() > 1 {
        let index = json!({"metadata": {"total_size": done.bytes_after}, "weight_map": map});
        write_json(&folder.join(INDEX), &index)?;
    }
    for entry in std::fs::read_dir(input.path()).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = file_name(&path);
        let replaced = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
        if !path.is_file() || replaced || name == CONFIG || name.starts_with('.') {
            continue;
        }
        std::fs::copy(&path, folder.join(&name)).map_err(failed)?;
    }
    let mut config = model_config(input.path())?.unwrap_or_else(|| json!({}));
    change(&mut config);
    write_json(&folder.join(CONFIG), &config)?;
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
    if output.exists() {
        return Err(exists(output));
    }
    readable(folder).map_err(failed)?;
    std::fs::rename(folder, output).map_err(failed)?;
    std::fs::File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed)?;
    Ok(done)
}

/// Gives a temporary folder, which only its owner may read, the permissions of any other.
fn readable(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let probe = folder.join(".permissions");
    std::fs::create_dir(&probe)?;
    let mode = std::fs::metadata(&probe)?.permissions().mode();
    std::fs::remove_dir(&probe)?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(mode))
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn write_json(path: &PathBuf, value: &Value) -> Result<()> {
    let operation = format!("writing {}", path.display());
    let text = serde_json::to_string_pretty(value).map_err(|error| {
        Error::new(ErrorKind::Io, operation.clone(), error.to_string()).with_source(error)
    })?;
    let written = std::fs::File::create(path).and_then(|mut file| {
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|error| Error::io(operation, error))
}

/// Writes one shard; returns the names of its tensors.
fn write_shard(
    input: &Checkpoint,
    index: usize,
    output: &Path,
    weights: impl Fn(Vec<Weight>) -> Vec<Result<Weight>>,
    done: &mut Converted,
    progress: &mut impl FnMut(u64),
) -> Result<Vec<String>> {
    let shard = &input.shards()[index];
    let mut writer = CheckpointWriter::create(output).map_err(Error::from)?;
    if !shard.metadata().is_empty() {
        writer = writer.with_metadata(shard.metadata().clone());
    }
    let mut names = Vec::new();
    let own = input
        .weights()
        .filter(|weight| input.shard_of(weight.name()).is_some_and(|of| of.path() == shard.path()));
    for weight in own {
        let before = weight.byte_len();
        done.bytes_before += before;
        for weight in weights(vec![weight]) {
            let weight = weight?;
            match weight.treatment() {
                Treatment::Quantized => done.converted += 1,
                Treatment::Kept(reason) => *done.kept.entry(reason.to_string()).or_default() += 1,
                _ => {}
            }
            done.bytes_after += weight.byte_len();
            names.push(weight.name().to_owned());
            writer.write_weight(&weight)?;
        }
        progress(before);
    }
    writer.finish().map_err(Error::from)?;
    Ok(names)
}
