//! Checkpoints in FP8 and back.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use checkpoint_engine::fp8::rules::{Decision, QuantPlan, RulesConfig, Stored};
use checkpoint_engine::fp8::{
    Fp8Format, Fp8Quantizer, Granularity, Mode, QuantizeFp8, ScaleName, SourceType, stored,
};
use engine_core::{DType, Error, ErrorKind, Result, TensorMeta, Treatment, Weight};
use futures::StreamExt;
use serde_json::{Map, Value, json};

use crate::checkpoint::{Beside, Checkpoint, CheckpointWriter, Staging, sync_folder};
use crate::dequantize::wide;
use crate::scheme::{
    CONFIG, Descriptions, Fp8Scheme, HF_QUANT_CONFIG, Layout, Method, PARAMS, Scheme, read_json,
    with_own,
};

/// What a conversion did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// Tensors whose bytes changed.
    pub converted: u64,
    /// Tensors that were left as they are, by the reason.
    pub kept: BTreeMap<String, u64>,
    /// Tensors that the output does not have: scales, of weights that are FP8 no more.
    pub removed: u64,
    /// Bytes of all tensors before.
    pub bytes_before: u64,
    /// Bytes of all tensors after.
    pub bytes_after: u64,
    /// What else there is to know: files that were not converted or not copied, what is not described.
    pub notes: Vec<String>,
}

/// The plan of a checkpoint, with the rules that its own description adds.
///
/// # Errors
///
/// What the rules refuse; `Io` for files that cannot be read, `Config` for a `config.json` that is none.
pub fn plan_of(checkpoint: &Checkpoint, rules: &RulesConfig) -> Result<QuantPlan> {
    planned(checkpoint, &Descriptions::read(checkpoint.folder())?, rules)
}

fn planned(
    checkpoint: &Checkpoint,
    descriptions: &Descriptions,
    rules: &RulesConfig,
) -> Result<QuantPlan> {
    let parameters = checkpoint.metas().map(|meta| {
        let shape = meta.shape.iter().map(|&side| side as usize).collect();
        // The rules know scales by the name of their weight; `x.scale` is that of `x.weight`, too.
        let layer = meta.name.strip_suffix(".scale");
        let weight = layer.map(|layer| format!("{layer}.weight"));
        let weight = weight.filter(|weight| {
            checkpoint.meta(weight).is_some_and(|weight| weight.dtype == DType::F8_E4M3)
        });
        let name = weight.map_or(meta.name.to_string(), |weight| format!("{weight}_scale"));
        (name, shape, stored(meta.dtype))
    });
    Ok(QuantPlan::resolve(parameters, &with_own(descriptions, rules))?)
}

/// Writes a checkpoint in FP8, as vLLM and SGLang load it: the same shards, an index of what is in
/// them, and a `config.json` with the `quantization_config`.
///
/// `output` is a `.safetensors` file for a file, else a folder. Everything else of the model's folder
/// is copied, sub-folders included; other copies of the weights are left out and named. `progress` is
/// told of the bytes that were read.
///
/// A checkpoint that is FP8 already passes as it is, with its own description to the last byte. If
/// matrices are left that can be quantised in the same format, they are, and its list of layers is
/// extended.
///
/// # Contract
///
/// Memory is bounded by a few MiB for each thread beyond the mapped files. What is there under the
/// name `output` is complete: it is made under another name and renamed at the end. What a process
/// left there that was killed is removed.
///
/// # Errors
///
/// `Config` if `output` exists; [`Scheme::of`]'s for what is not understood completely; `Config` for
/// matrices that would be quantised beside weights of another format; what the rules refuse; the first
/// block that is not finite; `Io`; `Source` for an incomplete download.
pub fn quantize(
    input: &Checkpoint,
    output: &Path,
    rules: &RulesConfig,
    progress: impl FnMut(u64),
) -> Result<Converted> {
    let mut rules = rules.clone();
    if rules.format.granularity == Granularity::PerTensor {
        // What receivers call the scale of a tensor that has only one.
        rules.format.scale_name = ScaleName::WeightScale;
    }
    let mut descriptions = Descriptions::read(input.folder())?;
    let scheme = Scheme::of(input, &descriptions)?;
    let plan = planned(input, &descriptions, &rules)?;
    let beside = beside(input)?;
    let first = plan.entries().iter().find(|entry| entry.decision == Decision::Quantize);
    let mut notes = Vec::new();
    match (&scheme, first) {
        (Scheme::Plain, None) => notes.push(
            "nothing is to be quantised: the output has the tensors and the config.json of the \
             input"
                .into(),
        ),
        (Scheme::Plain, Some(_)) => {
            describe(&mut descriptions, described(&plan, input, &beside)?, &mut notes);
        }
        (Scheme::Fp8(own), first) => match (own.method, difference(own, &rules.format), first) {
            (Method::Undescribed, None, _) => {
                describe(&mut descriptions, described(&plan, input, &beside)?, &mut notes);
            }
            // Its own description says what passes as it is.
            (_, _, None) => {}
            (_, Some(difference), Some(first)) => {
                let message = format!(
                    "the checkpoint is {own}; this would be quantised beside it, but {difference}, \
                     and no receiver loads both"
                );
                let error = Error::new(ErrorKind::Config, "quantising a checkpoint", message);
                return Err(error.tensor(&first.name));
            }
            (_, None, Some(_)) => {
                extend(&mut descriptions, own, &described(&plan, input, &beside)?);
            }
        },
    }
    let quantizer = Fp8Quantizer::from(plan.clone());
    let weights = |weight: Weight| one(weight, &plan, &quantizer);
    let mut job = Job::new(input, output, descriptions, beside, weights, progress)?;
    job.done.notes.extend(notes);
    job.run()
}

/// Why a checkpoint's FP8 weights are not what the format would make of others; nothing if they are.
fn difference(own: &Fp8Scheme, format: &Fp8Format) -> Option<String> {
    let wanted = match format.granularity {
        Granularity::Block { rows, cols } => {
            Layout::Blocks { rows: rows as u64, cols: cols as u64 }
        }
        Granularity::PerRow => Layout::Channel,
        Granularity::PerTensor => Layout::Tensor,
    };
    if !matches!(own.method, Method::Fp8 | Method::Undescribed) {
        return Some("it would have another description".into());
    }
    if own.layout != Some(wanted) {
        return Some(format!("it would have {wanted}"));
    }
    if own.static_activations {
        return Some("it would have no activation scale".into());
    }
    let suffix = format.scale_name.suffix();
    let other = own.weights.iter().find(|(name, weight)| weight.scale != format!("{name}{suffix}"));
    if let Some((_, other)) = other {
        return Some(format!("its scale would not be named like {}", other.scale));
    }
    let powers = own.scale_fmt.as_deref() == Some("ue8m0");
    match (powers, format.mode == Mode::Ue8m0) {
        (true, false) => Some("its scales would not be powers of two (--mode ue8m0)".into()),
        (false, true) if !own.weights.is_empty() => {
            Some("only its scales would be powers of two (--mode ue8m0)".into())
        }
        _ => None,
    }
}

/// What belongs to the model beside the checkpoint; nothing belongs to a file.
fn beside(input: &Checkpoint) -> Result<Beside> {
    if input.is_file() { Ok(Beside::default()) } else { Beside::of(input) }
}

/// The plan's `quantization_config`, which also leaves alone what is in further files of weights: they are
/// loaded with the checkpoint, and copied as they are.
fn described(plan: &QuantPlan, input: &Checkpoint, beside: &Beside) -> Result<Value> {
    let mut quantization = plan.quantization_config()?;
    let files = beside.weights.iter().filter(|name| {
        name.components().count() == 1 && name.to_string_lossy().ends_with(".safetensors")
    });
    for name in files {
        let further = Checkpoint::open(input.folder().join(name)).map_err(Error::from)?;
        let matrices = further.metas().filter(|meta| meta.shape.len() >= 2);
        for meta in matrices.filter(|meta| stored(meta.dtype) == Stored::Float) {
            let layer = json!(meta.name.strip_suffix(".weight").unwrap_or(&meta.name));
            if let Some(layers) = quantization["modules_to_not_convert"].as_array_mut()
                && !layers.contains(&layer)
            {
                layers.push(layer);
            }
        }
    }
    Ok(quantization)
}

/// Puts a `quantization_config` into a `config.json` that has none.
fn describe(descriptions: &mut Descriptions, quantization: Value, notes: &mut Vec<String>) {
    match &mut descriptions.config {
        // The document is an object.
        Some(config) => drop(config.set(&["quantization_config"], &quantization)),
        None => notes.push(format!(
            "there is no {CONFIG}; the engine that loads the output needs the quantization_config \
             {quantization}"
        )),
    }
}

/// Adds the layers that stay as they are to those that a checkpoint's own description leaves alone.
fn extend(descriptions: &mut Descriptions, own: &Fp8Scheme, quantization: &Value) {
    let added = quantization["modules_to_not_convert"].as_array().cloned().unwrap_or_default();
    let Some(config) = &mut descriptions.config else { return };
    for place in &descriptions.places {
        let at = |key: &'static str| -> Vec<&str> {
            place.iter().map(String::as_str).chain([key]).collect()
        };
        let list = |key| config.get(&at(key)).and_then(|list| list.as_array().cloned());
        let keys = ["modules_to_not_convert", "ignored_layers"];
        let key = keys.into_iter().find(|key| list(key).is_some()).unwrap_or(keys[0]);
        let mut layers = list(key).unwrap_or_default();
        for layer in &added {
            if !layers.contains(layer) {
                layers.push(layer.clone());
            }
        }
        config.set(&at(key), &Value::Array(layers));
        if own.scale_fmt.is_none() && quantization.get("scale_fmt").is_some() {
            config.set(&at("scale_fmt"), &quantization["scale_fmt"]);
        }
    }
}

/// A weight as it is in the FP8 checkpoint: itself, or its codes and scales.
fn one(weight: Weight, plan: &QuantPlan, quantizer: &Fp8Quantizer) -> Vec<Result<Weight>> {
    let entry = plan.get(weight.name());
    // Every weight by itself: whether parts have their other parts is asked of the whole, by the plan.
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

/// Writes an FP8 checkpoint in `ty` again, without scales and without anything that describes a
/// quantisation.
///
/// # Errors
///
/// As [`quantize`]; `Weight` for the first element that has no finite form in `ty`, naming it.
pub fn dequantize(
    input: &Checkpoint,
    output: &Path,
    ty: SourceType,
    progress: impl FnMut(u64),
) -> Result<Converted> {
    let mut descriptions = Descriptions::read(input.folder())?;
    let own = match Scheme::of(input, &descriptions)? {
        Scheme::Plain => None,
        Scheme::Fp8(own) => Some(own),
    };
    if let Some(config) = &mut descriptions.config {
        for place in &descriptions.places {
            let path: Vec<&str> = place.iter().map(String::as_str).collect();
            config.remove(&path);
        }
    }
    if let Some(params) = &mut descriptions.params {
        params.remove(&["quantization"]);
    }
    let weights = |weight: Weight| -> Vec<Result<Weight>> {
        if let Some(own) = &own {
            if let Some(how) = own.weights.get(weight.name()) {
                // The scheme was made of these tensors.
                let scale = input.get(&how.scale);
                return scale.map(|scale| wide(&weight, &scale, how, ty)).into_iter().collect();
            }
            if own.companions.contains(weight.name()) {
                return Vec::new();
            }
        }
        vec![Ok(weight.with_treatment(Treatment::Kept("is not FP8".into())))]
    };
    let described = descriptions.hf_quant_config.is_some();
    let mut job = Job::new(input, output, descriptions, beside(input)?, weights, progress)?;
    if described && job.beside.copied.remove(Path::new(HF_QUANT_CONFIG)) {
        job.beside.left_out.push((HF_QUANT_CONFIG.into(), "it describes the quantisation"));
    }
    job.run()
}

/// A conversion: every shard of a checkpoint with its weights changed, and all that belongs to it.
struct Job<'a, W, P> {
    input: &'a Checkpoint,
    output: &'a Path,
    /// The configuration as it is written.
    descriptions: Descriptions,
    beside: Beside,
    weights: W,
    progress: P,
    done: Converted,
}

impl<'a, W: Fn(Weight) -> Vec<Result<Weight>>, P: FnMut(u64)> Job<'a, W, P> {
    /// Looks at everything that can be refused before anything is written.
    fn new(
        input: &'a Checkpoint,
        output: &'a Path,
        descriptions: Descriptions,
        beside: Beside,
        weights: W,
        progress: P,
    ) -> Result<Self> {
        if output.symlink_metadata().is_ok() {
            return Err(exists(output));
        }
        let done = Converted::default();
        Ok(Self { input, output, descriptions, beside, weights, progress, done })
    }

    fn run(mut self) -> Result<Converted> {
        if self.input.is_file() {
            self.shard(0, self.output)?;
            if self.descriptions.config.is_some() || self.descriptions.hf_quant_config.is_some() {
                let note =
                    "only the file was converted: nothing beside it, no configuration either";
                self.done.notes.push(note.into());
            }
            return Ok(self.done);
        }
        let parent = match self.output.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let operation = format!("writing {}", self.output.display());
        let failed = |error| Error::io(&*operation, error);
        std::fs::create_dir_all(parent).map_err(failed)?;
        let staging = Staging::folder(parent).map_err(failed)?;
        let folder = staging.path().to_owned();
        let mut map = Map::new();
        for (index, shard) in self.input.shards().iter().enumerate() {
            let names = self.shard(index, &folder.join(shard.name()))?;
            let file = shard.name().to_string_lossy().into_owned();
            map.extend(names.into_iter().map(|tensor| (tensor, file.clone().into())));
        }
        self.index(&folder, map)?;
        let replaced =
            [(CONFIG, self.descriptions.config.take()), (PARAMS, self.descriptions.params.take())];
        for (name, text) in replaced {
            if let Some(text) = text {
                write(&folder.join(name), text.as_str())?;
                self.beside.copied.remove(Path::new(name));
            }
        }
        let mut folders = BTreeSet::from([folder.clone()]);
        for name in &self.beside.copied {
            let (from, to) = (self.input.folder().join(name), folder.join(name));
            if let Some(within) = to.parent() {
                std::fs::create_dir_all(within).map_err(failed)?;
                folders
                    .extend(within.ancestors().take_while(|at| *at != parent).map(PathBuf::from));
            }
            let copied =
                std::fs::copy(&from, &to).and_then(|_| std::fs::File::open(&to)?.sync_all());
            copied.map_err(|error| Error::io(format!("copying {}", from.display()), error))?;
        }
        for folder in folders.iter().rev() {
            sync_folder(folder).map_err(failed)?;
        }
        staging.finish(self.output, false).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => exists(self.output),
            _ => failed(error),
        })?;
        sync_folder(parent).map_err(failed)?;
        let unchanged = self.beside.weights.iter();
        let unchanged = unchanged.map(|name| format!("copied as it is: {}", name.display()));
        self.done.notes.extend(unchanged);
        let left_out = self.beside.left_out.iter();
        let left_out = left_out.map(|(name, why)| format!("left out: {} ({why})", name.display()));
        self.done.notes.extend(left_out);
        Ok(self.done)
    }

    /// Writes the index, where the input has one.
    fn index(&self, folder: &Path, map: Map<String, Value>) -> Result<()> {
        let Some(index) = self.input.index() else { return Ok(()) };
        let Some(mut json) = read_json(index)? else { return Ok(()) };
        let total = json!(self.done.bytes_after);
        if !json.set(&["metadata", "total_size"], &total) {
            json.set(&["metadata"], &json!({ "total_size": total }));
        }
        json.set(&["weight_map"], &Value::Object(map));
        let name = index.file_name().unwrap_or_default();
        write(&folder.join(name), json.as_str())
    }

    /// Writes one shard; returns the names of its tensors.
    fn shard(&mut self, index: usize, output: &Path) -> Result<Vec<String>> {
        let shard = &self.input.shards()[index];
        let of_shard = |name: &str| {
            self.input.shard_of(name).is_some_and(|holder| holder.name() == shard.name())
        };
        let mut weights = Vec::new();
        for weight in self.input.weights().filter(|weight| of_shard(weight.name())) {
            let before = weight.byte_len();
            self.done.bytes_before += before;
            let made = (self.weights)(weight);
            self.done.removed += u64::from(made.is_empty());
            // The bytes are read with the first tensor that comes of them.
            let mut before = Some(before);
            for weight in made {
                weights.push((before.take().unwrap_or(0), weight?));
            }
            (self.progress)(before.unwrap_or(0));
        }
        let metas: Vec<&TensorMeta> = weights.iter().map(|(_, weight)| &**weight.meta()).collect();
        let metadata = match shard.metadata().is_empty() {
            true => BTreeMap::from([("format".into(), "pt".into())]),
            false => shard.metadata().clone(),
        };
        let writer = CheckpointWriter::with_tensors(output, metadata, metas.iter().copied());
        let mut writer = writer.map_err(Error::from)?.without_replacing();
        let mut names = Vec::new();
        for (before, weight) in &weights {
            match weight.treatment() {
                Treatment::Converted => self.done.converted += 1,
                Treatment::Kept(reason) => {
                    *self.done.kept.entry(reason.to_string()).or_default() += 1;
                }
                _ => {}
            }
            self.done.bytes_after += weight.byte_len();
            names.push(weight.name().to_owned());
            writer.write_weight(weight)?;
            (self.progress)(*before);
        }
        writer.finish().map_err(Error::from)?;
        Ok(names)
    }
}

fn exists(path: &Path) -> Error {
    let message = format!("{} exists already", path.display());
    Error::new(ErrorKind::Config, "writing a checkpoint", message)
}

fn write(path: &Path, text: &str) -> Result<()> {
    let operation = format!("writing {}", path.display());
    let written = std::fs::File::create(path).and_then(|mut file| {
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|error| Error::io(operation, error))
}
