//! How the weights of a checkpoint are stored: what its files of configuration say, and what its
//! tensors are.
//!
//! A conversion starts from a [`Scheme`]. There is one for everything that is understood completely,
//! each tensor's type and what belongs to it; everything else is an error that names the scheme and
//! the first tensor of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use checkpoint_engine::fp8::rules::{RulesConfig, weight_of_scale};
use engine_core::{DType, Error, ErrorKind, Result, TensorMeta};
use serde_json::Value;

use crate::checkpoint::{Checkpoint, JsonText};

/// The model's configuration.
pub const CONFIG: &str = "config.json";
/// ModelOpt's description of a quantisation.
pub const HF_QUANT_CONFIG: &str = "hf_quant_config.json";
/// Mistral's configuration.
pub const PARAMS: &str = "params.json";

/// The keys of `config.json`, at any depth, that describe a quantisation.
const KEYS: [&str; 2] = ["quantization_config", "compression_config"];

/// Files whose presence says that weights are packed, and by what.
const FOREIGN: [(&str, &str); 2] = [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")];

/// Last segments of names of tensors that have a meaning only for quantised layers: scales of what
/// goes into a layer, or into the cache of keys and values.
const ACTIVATIONS: [&str; 13] = [
    "input_scale",
    "input_scale_inv",
    "input_scale_ub",
    "activation_scale",
    "activation_scale_inv",
    "act_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "kv_scale",
    "kv_cache_scale",
    "prob_output_scale",
];

/// How the weights of a checkpoint are stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Scheme {
    /// As they are trained: no tensor is quantised, and nothing says that one is.
    Plain,
    /// Some or all matrices are e4m3 codes with scales.
    Fp8(Fp8Scheme),
}

/// An FP8 checkpoint, understood to the last tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Fp8Scheme {
    /// Who says so.
    pub method: Method,
    /// Which elements share a scale, where that was said or every weight has it alike.
    pub layout: Option<Layout>,
    /// Whether activations have scales of their own in the checkpoint.
    pub static_activations: bool,
    /// The `scale_fmt` that the description has: `ue8m0` for scales that are powers of two.
    pub scale_fmt: Option<String>,
    /// The FP8 weights by name.
    pub weights: BTreeMap<String, Fp8Weight>,
    /// All tensors that mean something only beside FP8 weights: scales of weights and activations.
    pub companions: BTreeSet<String>,
}

/// What describes an FP8 checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Nothing: it follows from types, names and shapes.
    Undescribed,
    /// `quant_method: fp8`.
    Fp8,
    /// `quant_method: fbgemm_fp8`.
    Fbgemm,
    /// `quant_method: compressed-tensors`, or `compression_config`.
    CompressedTensors,
    /// ModelOpt's `hf_quant_config.json`, or `quant_method: modelopt`.
    ModelOpt,
}

/// Which elements of a weight share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Blocks of so many rows and columns.
    Blocks {
        /// Rows of a block.
        rows: u64,
        /// Columns of a block.
        cols: u64,
    },
    /// All of a matrix.
    Tensor,
    /// Those of one output channel.
    Channel,
}

/// An FP8 weight and what its codes are multiplied with.
#[derive(Clone, Debug, PartialEq)]
pub struct Fp8Weight {
    /// The name of its scales.
    pub scale: String,
    /// The type of its scales.
    pub scale_type: ScaleType,
    /// Where its scales apply.
    pub grid: Grid,
}

/// The types of scales that have one meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Powers of two: the exponent plus 127, in a byte.
    E8m0,
}

/// Scales laid over a weight, which is a stack of matrices: the scale of an element is found by
/// dividing its row and its column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Rows of a matrix.
    pub rows: u64,
    /// Columns of a matrix.
    pub cols: u64,
    /// Rows that share a scale.
    pub block_rows: u64,
    /// Columns that share a scale.
    pub block_cols: u64,
    /// Scales of a row of blocks.
    pub per_band: u64,
    /// Scales of a matrix; 0 if all matrices share them.
    pub per_matrix: u64,
}

impl Grid {
    /// The scale of an element of the whole tensor.
    pub fn scale_of(&self, element: u64) -> u64 {
        let (row, col) = (element / self.cols, element % self.cols);
        let (matrix, row) = (row / self.rows, row % self.rows);
        matrix * self.per_matrix + row / self.block_rows * self.per_band + col / self.block_cols
    }

    /// How the scales of `shape` lie over a weight of `weight`, if they can lie there so.
    fn of(layout: Layout, weight: &[u64], scale: &[u64], is_said: bool) -> Option<Self> {
        let (matrices, rows, cols) = match *weight {
            [cols] => (1, 1, cols),
            [rows, cols] => (1, rows, cols),
            [matrices, rows, cols] => (matrices, rows, cols),
            _ => return None,
        };
        let stacked = weight.len() == 3;
        // ModelOpt leaves sides of 1 where blocks were: [R/128, 1, C/128, 1].
        let squeezed;
        let scale = match *scale {
            [bands, 1, blocks, 1] if !stacked => {
                squeezed = [bands, blocks];
                &squeezed[..]
            }
            _ => scale,
        };
        let grid = |block_rows: u64, block_cols: u64, per_band: u64, per_matrix: u64| Self {
            rows: rows.max(1),
            cols: cols.max(1),
            block_rows: block_rows.max(1),
            block_cols: block_cols.max(1),
            per_band,
            per_matrix,
        };
        let own = |shape: &[u64]| match stacked {
            true => scale.split_first().is_some_and(|(n, rest)| *n == matrices && rest == shape),
            false => scale == shape,
        };
        match layout {
            Layout::Blocks { rows: a, cols: b } => {
                let (bands, blocks) = (rows.div_ceil(a), cols.div_ceil(b));
                own(&[bands, blocks]).then(|| grid(a, b, blocks, bands * blocks))
            }
            Layout::Tensor if matches!(scale, [] | [1] | [1, 1]) => Some(grid(rows, cols, 1, 0)),
            Layout::Tensor => {
                let each = stacked && (own(&[]) || own(&[1]) || own(&[1, 1]));
                each.then(|| grid(rows, cols, 1, 1))
            }
            Layout::Channel if own(&[rows, 1]) => Some(grid(1, cols, 1, rows)),
            // A vector could also be one scale for each column; a description says which.
            Layout::Channel if is_said && own(&[rows]) => Some(grid(1, cols, 1, rows)),
            // A stack that is stored transposed, [experts, in, out].
            Layout::Channel if stacked && own(&[1, cols]) => Some(grid(rows, 1, cols, cols)),
            Layout::Channel => None,
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocks { rows, cols } => write!(f, "blocks of {rows}x{cols}"),
            Self::Tensor => f.write_str("one scale per tensor"),
            Self::Channel => f.write_str("one scale per output channel"),
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Undescribed => "FP8 without a description",
            Self::Fp8 => "FP8 (quant_method fp8)",
            Self::Fbgemm => "FP8 (quant_method fbgemm_fp8)",
            Self::CompressedTensors => "FP8 of compressed-tensors",
            Self::ModelOpt => "FP8 of ModelOpt",
        })
    }
}

impl fmt::Display for Fp8Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.method)?;
        if let Some(layout) = self.layout {
            write!(f, ", {layout}")?;
        }
        if self.static_activations {
            f.write_str(", static activation scales")?;
        }
        Ok(())
    }
}

/// A checkpoint's files of configuration, as far as they describe a quantisation.
#[derive(Clone, Debug, Default)]
pub struct Descriptions {
    /// `config.json`, if there is one.
    pub config: Option<JsonText>,
    /// Where in `config.json` a quantisation is described: keys from the outermost object on.
    pub places: Vec<Vec<String>>,
    /// `hf_quant_config.json`, if it describes one.
    pub hf_quant_config: Option<JsonText>,
    /// `params.json`, if it describes one.
    pub params: Option<JsonText>,
}

impl Descriptions {
    /// Reads the files in the folder of a checkpoint.
    ///
    /// # Errors
    ///
    /// `Io`, and `Config` with the place for what is no JSON object.
    pub fn read(folder: &Path) -> Result<Self> {
        let config = read_json(&folder.join(CONFIG))?;
        let mut places = Vec::new();
        if let Some(config) = &config {
            for place in KEYS.iter().flat_map(|key| config.paths_of(key)) {
                let path: Vec<&str> = place.iter().map(String::as_str).collect();
                let value = config.get(&path);
                if value.is_some_and(|value| !value.is_null()) && !places.contains(&place) {
                    places.push(place);
                }
            }
        }
        let describes =
            |json: &JsonText, path: &[&str]| json.get(path).is_some_and(|value| !value.is_null());
        let hf_quant_config = read_json(&folder.join(HF_QUANT_CONFIG))?
            .filter(|json| describes(json, &["quantization", "quant_algo"]));
        let params =
            read_json(&folder.join(PARAMS))?.filter(|json| describes(json, &["quantization"]));
        Ok(Self { config, places, hf_quant_config, params })
    }

    /// What `config.json` says at its first place.
    pub fn first(&self) -> Option<Value> {
        let place: Vec<&str> = self.places.first()?.iter().map(String::as_str).collect();
        self.config.as_ref()?.get(&place)
    }

    /// Everything that is said, in the words of one place each.
    fn declared(&self) -> Result<Vec<Declared>, Refused> {
        let mut all = Vec::new();
        for place in &self.places {
            let path: Vec<&str> = place.iter().map(String::as_str).collect();
            let value = self.config.as_ref().and_then(|config| config.get(&path));
            let key = place.join(".");
            let declared = Declared::parse(&value.unwrap_or_default(), &key);
            all.push(declared.map_err(|refused| refused.by(format!("{CONFIG}, {key}")))?);
        }
        if let Some(json) = &self.hf_quant_config {
            let value = json.get(&["quantization"]).unwrap_or_default();
            let declared = Declared::modelopt(&value);
            all.push(declared.map_err(|refused| refused.by(HF_QUANT_CONFIG.into()))?);
        }
        if all.is_empty() && self.params.is_some() {
            return Err(Refused::new("Mistral's own quantisation").by(PARAMS.into()));
        }
        Ok(all)
    }
}

/// Reads a JSON object; `None` if there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Option<JsonText>> {
    let operation = || format!("reading {}", path.display());
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if path.symlink_metadata().is_err() {
                return Ok(None);
            }
            let message =
                "it is a link that leads nowhere: the model was not downloaded to the end";
            return Err(Error::new(ErrorKind::Source, operation(), message));
        }
        result => result.map_err(|error| Error::io(operation(), error))?,
    };
    JsonText::parse(text).map(Some).map_err(|error| {
        Error::new(ErrorKind::Config, operation(), error.to_string()).with_source(error)
    })
}

/// A scheme that is not understood, and who says that it is there.
#[derive(Clone, Debug)]
struct Refused {
    scheme: String,
    by: Option<String>,
    tensor: Option<(String, String)>,
}

impl Refused {
    fn new(scheme: impl Into<String>) -> Self {
        Self { scheme: scheme.into(), by: None, tensor: None }
    }

    fn by(mut self, place: String) -> Self {
        self.by.get_or_insert(place);
        self
    }

    fn of(scheme: impl Into<String>, meta: &TensorMeta) -> Self {
        let seen = format!("{} {:?}", meta.dtype, meta.shape);
        Self { tensor: Some((meta.name.to_string(), seen)), ..Self::new(scheme) }
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        let Refused { scheme, by, tensor } = refused;
        let mut message = format!("{scheme} is not converted here");
        if let Some(by) = by {
            message.push_str(&format!(" (it is what {by} says)"));
        }
        if let Some((_, seen)) = &tensor {
            message.push_str(&format!("; the first tensor of it is {seen}"));
        }
        let error = Self::new(ErrorKind::Weight, OPERATION, message);
        match tensor {
            Some((name, _)) => error.tensor(name),
            None => error,
        }
    }
}

const OPERATION: &str = "looking how the checkpoint is stored";

/// What one description says.
#[derive(Clone, Debug, PartialEq)]
struct Declared {
    method: Method,
    /// The layouts that weights may have; all that are understood, if none is said.
    layouts: Vec<Layout>,
    static_activations: bool,
    scale_fmt: Option<String>,
}

/// What may be found where nothing is said.
const UNSAID: [Layout; 3] =
    [Layout::Blocks { rows: 128, cols: 128 }, Layout::Channel, Layout::Tensor];

impl Declared {
    fn parse(value: &Value, key: &str) -> Result<Self, Refused> {
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        let is_compression = key.ends_with("compression_config");
        match text("quant_method") {
            Some("fp8") => Self::fp8(value),
            Some("fbgemm_fp8") => Ok(Self {
                method: Method::Fbgemm,
                layouts: vec![Layout::Channel],
                static_activations: false,
                scale_fmt: None,
            }),
            Some("compressed-tensors") => Self::compressed_tensors(value),
            Some("modelopt") => Self::modelopt(value),
            Some(other) => Err(Refused::new(format!("quantisation by {}", in_words(other, value)))),
            None if is_compression => Self::compressed_tensors(value),
            None if value.get("quant_algo").is_some() => Self::modelopt(value),
            None if value.get("config_groups").is_some() => Self::compressed_tensors(value),
            // Of checkpoints that were written before the key was.
            None if value.get("weight_block_size").is_some() => Self::fp8(value),
            None => Err(Refused::new("a quantisation without a quant_method")),
        }
    }

    fn fp8(value: &Value) -> Result<Self, Refused> {
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        if let Some(fmt) = text("fmt").filter(|fmt| !matches!(*fmt, "e4m3" | "float8_e4m3fn")) {
            return Err(Refused::new(format!("FP8 with weights of type {fmt}")));
        }
        let layout = match value.get("weight_block_size").filter(|size| !size.is_null()) {
            None => Layout::Tensor,
            Some(size) => match block_size(size) {
                Some(layout) => layout,
                None => {
                    return Err(Refused::new(format!("FP8 with a weight_block_size of {size}")));
                }
            },
        };
        let scheme = text("activation_scheme");
        if let Some(scheme) = scheme.filter(|scheme| !matches!(*scheme, "dynamic" | "static")) {
            return Err(Refused::new(format!("FP8 with an activation_scheme {scheme}")));
        }
        Ok(Self {
            method: Method::Fp8,
            layouts: vec![layout],
            static_activations: scheme == Some("static"),
            scale_fmt: text("scale_fmt").map(str::to_owned),
        })
    }

    fn compressed_tensors(value: &Value) -> Result<Self, Refused> {
        let refuse = |what: String| Err(Refused::new(format!("compressed-tensors {what}")));
        let format = value.get("format").and_then(Value::as_str);
        let understood = |format: &str| {
            matches!(format, "float-quantized" | "naive-quantized" | "mixed-precision")
        };
        if let Some(format) = format.filter(|format| !understood(format)) {
            return refuse(format!("of format {format}"));
        }
        let given = |key: &str| match value.get(key) {
            None | Some(Value::Null) => None,
            Some(Value::Object(map)) if map.is_empty() => None,
            Some(other) => Some(other),
        };
        if let Some(sparse) = given("sparsity_config") {
            let format = sparse.get("format").and_then(Value::as_str).unwrap_or("dense");
            if format != "dense" {
                return refuse(format!("with sparsity {format}"));
            }
        }
        if given("transform_config").is_some() {
            return refuse("with transforms of the weights".into());
        }
        let mut layouts = Vec::new();
        let mut static_activations = false;
        let groups = given("config_groups").and_then(Value::as_object);
        for group in groups.into_iter().flat_map(|groups| groups.values()) {
            let format = group.get("format").and_then(Value::as_str);
            if let Some(format) = format.filter(|format| !understood(format)) {
                return refuse(format!("of format {format}"));
            }
            let Some(weights) = group.get("weights").filter(|weights| !weights.is_null()) else {
                continue;
            };
            let text = |key: &str| weights.get(key).and_then(Value::as_str);
            let bits = weights.get("num_bits").and_then(Value::as_u64);
            let (bits, kind) = (bits.unwrap_or(8), text("type").unwrap_or("int"));
            if (bits, kind) != (8, "float") {
                return refuse(format!("with weights of {bits} bits, type {kind}"));
            }
            if weights.get("symmetric") == Some(&Value::Bool(false)) {
                return refuse("with weights that have zero points".into());
            }
            let layout = match text("strategy") {
                Some("tensor") => Layout::Tensor,
                Some("channel") => Layout::Channel,
                Some("block") => {
                    let size = weights.get("block_structure").cloned().unwrap_or_default();
                    match block_size(&size) {
                        Some(layout) => layout,
                        None => return refuse(format!("with blocks of {size}")),
                    }
                }
                other => {
                    return refuse(format!("with scales by {}", other.unwrap_or("no strategy")));
                }
            };
            if !layouts.contains(&layout) {
                layouts.push(layout);
            }
            let dynamic = group.get("input_activations").map(|input| {
                input.is_null()
                    || input.get("dynamic").is_some_and(|how| *how != Value::Bool(false))
            });
            static_activations |= dynamic == Some(false);
        }
        if layouts.is_empty() {
            layouts = UNSAID.into();
        }
        let method = Method::CompressedTensors;
        Ok(Self { method, layouts, static_activations, scale_fmt: None })
    }

    fn modelopt(value: &Value) -> Result<Self, Refused> {
        let algorithm = value.get("quant_algo").and_then(Value::as_str).unwrap_or("none");
        let layout = match algorithm {
            "FP8" => Layout::Tensor,
            "FP8_PB_WO" => Layout::Blocks { rows: 128, cols: 128 },
            "FP8_PER_CHANNEL_PER_TOKEN" => Layout::Channel,
            other => return Err(Refused::new(format!("ModelOpt's {other}"))),
        };
        Ok(Self {
            method: Method::ModelOpt,
            layouts: vec![layout],
            static_activations: algorithm == "FP8",
            scale_fmt: None,
        })
    }
}

/// `[rows, cols]`, neither of them zero.
fn block_size(size: &Value) -> Option<Layout> {
    let [rows, cols] = serde_json::from_value(size.clone()).ok()?;
    (rows > 0 && cols > 0).then_some(Layout::Blocks { rows, cols })
}

/// A method with its width, where it says one.
fn in_words(method: &str, value: &Value) -> String {
    let bits = value.get("bits").or_else(|| value.get("w_bit")).and_then(Value::as_u64);
    let four = value.get("load_in_4bit") == Some(&Value::Bool(true));
    match bits.or(four.then_some(4)) {
        Some(bits) => format!("{method} ({bits} bits)"),
        None => method.to_owned(),
    }
}

/// The words for a tensor whose type or name shows a scheme that is not understood.
fn foreign(checkpoint: &Checkpoint, meta: &TensorMeta) -> Option<String> {
    let name = &*meta.name;
    let last = name.rsplit_once('.').map_or(name, |(_, last)| last);
    let has = |other: String| checkpoint.meta(&other).is_some();
    let integer = matches!(
        meta.dtype,
        DType::I8 | DType::U8 | DType::I16 | DType::U16 | DType::I32 | DType::U32
    );
    let layer = name.strip_suffix(".weight").unwrap_or(name);
    let of_e8m0 = scale_names(name)
        .iter()
        .any(|name| checkpoint.meta(name).is_some_and(|meta| meta.dtype == DType::F8_E8M0));
    let words = match meta.dtype {
        DType::F8_E5M2 => "FP8 of type e5m2",
        DType::F8_E4M3FNUZ | DType::F8_E5M2FNUZ => "FP8 of type fnuz",
        DType::F4 => "FP4",
        DType::F6_E2M3 | DType::F6_E3M2 => "FP6",
        _ if last == "weight_packed"
            && has(name.replace("weight_packed", "weight_global_scale")) =>
        {
            "NVFP4 of compressed-tensors"
        }
        _ if last == "weight_packed" => "packed weights of compressed-tensors",
        _ if integer && matches!(last, "qweight" | "qzeros" | "g_idx") => "AWQ or GPTQ",
        _ if integer && has(format!("{layer}.SCB")) => "bitsandbytes (8 bits)",
        _ if integer && has(format!("{name}.absmax")) => "bitsandbytes (4 bits)",
        _ if integer && last.ends_with("_blocks") => "MXFP4",
        _ if integer && has(format!("{name}_scale_2")) => "NVFP4 of ModelOpt",
        DType::U8 | DType::I8 if of_e8m0 => "MXFP4",
        DType::U8 if has(format!("{name}_scale")) || has(format!("{layer}.scale")) => {
            "packed weights with scales"
        }
        DType::I8 if scale_names(name).into_iter().any(has) => "INT8",
        _ if integer && scale_names(name).into_iter().any(has) => "integers with scales",
        _ if last.ends_with("weight_zero_point") => "asymmetric quantisation",
        _ => return None,
    };
    Some(words.to_owned())
}

/// The names that the scales of a weight may have.
fn scale_names(weight: &str) -> Vec<String> {
    let mut names = vec![format!("{weight}_scale_inv"), format!("{weight}_scale")];
    if let Some(layer) = weight.strip_suffix(".weight") {
        names.push(format!("{layer}.scale"));
    }
    names
}

impl Scheme {
    /// Looks at all tensors and all that is said about them.
    ///
    /// # Errors
    ///
    /// `Weight` for a scheme that is not understood, naming it, who says so, and its first tensor;
    /// for FP8 weights without scales or with scales that do not fit them; for scales without
    /// weights; for descriptions that contradict each other or the tensors.
    pub fn of(checkpoint: &Checkpoint, descriptions: &Descriptions) -> Result<Self> {
        let seen = checkpoint
            .metas()
            .find_map(|meta| foreign(checkpoint, meta).map(|scheme| Refused::of(scheme, meta)));
        let declared = match (descriptions.declared(), seen) {
            // The description has the better words, the tensors the proof.
            (Err(said), seen) => {
                let tensor = seen.and_then(|seen| seen.tensor);
                return Err(Refused { tensor, ..said }.into());
            }
            (Ok(_), Some(seen)) => return Err(seen.into()),
            (Ok(declared), None) => declared,
        };
        if let Some((file, scheme)) =
            FOREIGN.iter().find(|(file, _)| checkpoint.folder().join(file).exists())
            && declared.is_empty()
            && !checkpoint.is_file()
        {
            return Err(Refused::new(*scheme).by((*file).to_owned()).into());
        }
        let first = declared.first().cloned();
        if let Some(first) = &first
            && let Some(other) = declared
                .iter()
                .find(|other| (other.method, &other.layouts) != (first.method, &first.layouts))
        {
            let message = format!(
                "its descriptions contradict each other: {} ({}), and {} ({})",
                first.method,
                listed(&first.layouts),
                other.method,
                listed(&other.layouts)
            );
            return Err(Error::new(ErrorKind::Config, OPERATION, message));
        }
        Self::of_tensors(checkpoint, first)
    }

    fn of_tensors(checkpoint: &Checkpoint, declared: Option<Declared>) -> Result<Self> {
        let is_said = declared.is_some();
        let declared = declared.unwrap_or(Declared {
            method: Method::Undescribed,
            layouts: UNSAID.into(),
            static_activations: false,
            scale_fmt: None,
        });
        let mut weights = BTreeMap::new();
        let mut companions = BTreeSet::new();
        let mut found = Vec::new();
        for meta in checkpoint.metas().filter(|meta| meta.dtype == DType::F8_E4M3) {
            let (weight, layout) = fp8_weight(checkpoint, meta, &declared, is_said)?;
            if !found.contains(&layout) {
                found.push(layout);
            }
            companions.insert(weight.scale.clone());
            weights.insert(meta.name.to_string(), weight);
        }
        for meta in checkpoint.metas() {
            let name = &*meta.name;
            let refuse =
                |message: &str| Err(Error::new(ErrorKind::Weight, OPERATION, message).tensor(name));
            if companions.contains(name) || weights.contains_key(name) {
                continue;
            }
            let last = name.rsplit_once('.').map_or(name, |(_, last)| last);
            // Stacks of experts have them under the stack's own name: `down_proj_input_scale`.
            let is_activation = ACTIVATIONS.iter().any(|ending| {
                last == *ending
                    || last.strip_suffix(ending).is_some_and(|stack| {
                        let stack = stack.strip_suffix('_').unwrap_or("");
                        stack.ends_with("_proj")
                    })
            });
            if is_activation && (is_said || !weights.is_empty()) {
                companions.insert(name.to_owned());
                continue;
            }
            if let Some(weight) = weight_of_scale(name) {
                return match checkpoint.meta(weight) {
                    Some(_) => refuse("it is a scale, but its weight is not FP8"),
                    None => refuse("it is a scale, but its weight is missing"),
                };
            }
            if meta.dtype == DType::F8_E8M0 {
                return Err(Refused::of("MX (a type of scales for what is not FP8)", meta).into());
            }
        }
        if weights.is_empty() && !is_said {
            return Ok(Self::Plain);
        }
        let layout = match (declared.layouts.as_slice(), found.as_slice()) {
            (_, [layout]) | ([layout], []) => Some(*layout),
            _ => None,
        };
        Ok(Self::Fp8(Fp8Scheme {
            method: declared.method,
            layout,
            static_activations: declared.static_activations
                || companions.len() > weights.len() && !is_said,
            scale_fmt: declared.scale_fmt,
            weights,
            companions,
        }))
    }
}

fn listed(layouts: &[Layout]) -> String {
    layouts.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The scales of an FP8 weight, and how they lie over it.
fn fp8_weight(
    checkpoint: &Checkpoint,
    meta: &TensorMeta,
    declared: &Declared,
    is_said: bool,
) -> Result<(Fp8Weight, Layout)> {
    let refuse =
        |message: String| Error::new(ErrorKind::Weight, OPERATION, message).tensor(&*meta.name);
    let names = scale_names(&meta.name);
    let mut scales = names.iter().filter_map(|name| checkpoint.meta(name));
    let scale = scales.next().ok_or_else(|| refuse("it is FP8 but its scale is missing".into()))?;
    if let Some(other) = scales.next() {
        return Err(refuse(format!("it has two scales, {} and {}", scale.name, other.name)));
    }
    let powers = declared.scale_fmt.as_deref() == Some("ue8m0");
    let scale_type = match scale.dtype {
        DType::F32 => ScaleType::F32,
        DType::F16 => ScaleType::F16,
        DType::BF16 => ScaleType::Bf16,
        DType::F8_E8M0 => ScaleType::E8m0,
        // A byte has this one meaning where the description says that scales are ue8m0.
        DType::U8 if powers => ScaleType::E8m0,
        other => {
            return Err(refuse(format!(
                "its scales {} are of type {other}, whose meaning nothing says",
                scale.name
            )));
        }
    };
    let fits = |layout: &Layout| {
        Grid::of(*layout, &meta.shape, &scale.shape, is_said).map(|grid| (grid, *layout))
    };
    let (grid, layout) = declared.layouts.iter().find_map(fits).ok_or_else(|| {
        refuse(format!(
            "its scales {} have the shape {:?}, which for {:?} is none of: {}",
            scale.name,
            scale.shape,
            meta.shape,
            listed(&declared.layouts)
        ))
    })?;
    Ok((Fp8Weight { scale: scale.name.to_string(), scale_type, grid }, layout))
}

/// The rules, with what a checkpoint's own description adds: layers that it leaves alone, and the
/// format that it has.
///
/// # Errors
///
/// As [`Descriptions::read`].
pub fn rules_of(checkpoint: &Checkpoint, rules: &RulesConfig) -> Result<RulesConfig> {
    Ok(with_own(&Descriptions::read(checkpoint.folder())?, rules))
}

pub(crate) fn with_own(descriptions: &Descriptions, rules: &RulesConfig) -> RulesConfig {
    let mut rules = rules.clone();
    if let Some(own) = descriptions.first() {
        let method = own.get("quant_method").and_then(Value::as_str);
        if matches!(method, None | Some("fp8" | "compressed-tensors")) {
            rules.quantization_config = rules.quantization_config.or(Some(own));
        } else {
            // Others have names of their own for it.
            for key in ["modules_to_not_convert", "ignore", "exclude_modules"] {
                let list = own.get(key).and_then(Value::as_array);
                rules.ignored_layers.extend(list.into_iter().flatten().filter_map(as_entry));
            }
        }
    }
    let excluded = descriptions
        .hf_quant_config
        .as_ref()
        .and_then(|json| json.get(&["quantization", "exclude_modules"]));
    let excluded = excluded.as_ref().and_then(Value::as_array);
    rules.ignored_layers.extend(excluded.into_iter().flatten().filter_map(as_entry));
    rules
}

/// A name, or a pattern of a shell, as an entry of the ignored layers.
fn as_entry(value: &Value) -> Option<String> {
    let text = value.as_str()?;
    if !text.contains(['*', '?']) {
        return Some(text.to_owned());
    }
    let mut pattern = String::from("re:");
    for letter in text.chars() {
        match letter {
            '*' => pattern.push_str(".*"),
            '?' => pattern.push('.'),
            letter if letter.is_ascii_alphanumeric() || letter == '_' => pattern.push(letter),
            letter if letter.is_ascii() => pattern.extend(['\\', letter]),
            letter => pattern.push(letter),
        }
    }
    Some(pattern)
}
