//! Which parameters are quantised.
//!
//! Rules look at a parameter by itself; the first that applies decides:
//!
//! 1. The receiver's [`Manifest`], if it sent one.
//! 2. What is FP8 already passes through, with its scale.
//! 3. Layers that the user or the checkpoint says to ignore are kept.
//! 4. What is not a matrix (or the stacked matrices of experts), or is narrower than 128, is kept.
//! 5. What no receiver expects in FP8 is kept: embeddings, heads, norms, routers, towers for other
//!    kinds of input than text.
//! 6. Projections are quantised, if their shape is one that the [receiver](Receiver) can load.
//! 7. Other matrices are kept and reported, or are an error in strict mode.
//!
//! Then a layer that the receiver makes of several weights is looked at as a whole: if one of them is
//! kept, all are.
//!
//! Names are compared by whole dotted segments, never by substrings: `gate` is not `gate_proj`.
//!
//! [`Rules`] decide on streams; [`QuantPlan`] decides on a model, and writes
//! the `quantization_config` that tells a receiver exactly what was done.

mod layers;
mod names;
mod plan;
mod profile;

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) use layers::Window;
pub(crate) use plan::Consistency;
pub use plan::{PlanEntry, QuantPlan, Share};
pub use profile::{Fused, Profile, Receiver, WholeRows};

use self::names::{Kind, is_projection, join, kind, module, split_last};
use crate::{Fp8Format, Granularity, QuantError};

/// The environment variable in which SGLang users name layers to leave alone, comma-separated.
pub const IGNORED_LAYERS_VARIABLE: &str = "SGLANG_FP8_IGNORED_LAYERS";

/// Matrices with a side shorter than this are kept: small projections and gates, for which a
/// receiver has no FP8 kernel and whose error would cost more than their bytes.
const NARROW: usize = 128;

/// What a parameter's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stored {
    /// BF16, F16 or F32: can be quantised.
    Float,
    /// FP8 codes.
    Fp8,
    /// Anything else, such as packed integers: never touched.
    Other,
}

/// What happens to a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// It becomes FP8 codes, followed by their scales.
    Quantize,
    /// It is sent as it is, in its high precision.
    Keep,
    /// It is FP8 already, or the scale of such a weight, and is sent as it is.
    Pass,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Quantize => "quantize",
            Self::Keep => "keep",
            Self::Pass => "pass",
        })
    }
}

/// Why. [`id`](Rule::id) is stable; `Display` is for people.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rule {
    /// Rule 1: the receiver declared the parameter.
    Manifest,
    /// Rule 2: its type is FP8.
    AlreadyFp8,
    /// Rule 2: its scale comes with it, whatever its type.
    HasScale,
    /// Rule 2: it is the scale of another parameter.
    IsScale,
    /// Rule 3: this entry ignores it.
    Ignored(String),
    /// Rule 4: it is neither a matrix nor the stacked matrices of experts.
    NotAMatrix,
    /// Rule 4: its elements are not floating point.
    NotFloat,
    /// Rule 4: a side is shorter than 128.
    Narrow,
    /// Rule 5: this segment of its name is never quantised.
    KeptSegment(String),
    /// Rule 6: the last segment of its name is always quantised.
    QuantizedSegment(String),
    /// Rule 6: the receiver needs whole blocks there.
    Unaligned {
        /// Which side.
        side: &'static str,
        /// Its size.
        size: usize,
        /// The size of a block in that direction.
        block: usize,
    },
    /// Rule 6: the receiver does not load it in FP8, for this reason.
    Receiver(String),
    /// It is a part of the same layer as this weight, which is kept.
    Layer(String),
    /// Rule 7: nothing is known about it.
    Unlisted,
}

impl Rule {
    /// A short identifier that does not change between releases.
    pub fn id(&self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::AlreadyFp8 => "already-fp8",
            Self::HasScale => "has-scale",
            Self::IsScale => "is-scale",
            Self::Ignored(_) => "ignored",
            Self::NotAMatrix => "not-a-matrix",
            Self::NotFloat => "not-float",
            Self::Narrow => "narrow",
            Self::KeptSegment(_) => "kept-segment",
            Self::QuantizedSegment(_) => "quantized-segment",
            Self::Unaligned { .. } => "unaligned",
            Self::Receiver(_) => "receiver",
            Self::Layer(_) => "layer",
            Self::Unlisted => "unlisted",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifest => f.write_str("the receiver declared it"),
            Self::AlreadyFp8 => f.write_str("is FP8 already"),
            Self::HasScale => f.write_str("comes with its own scale"),
            Self::IsScale => f.write_str("is the scale of a quantised weight"),
            Self::Ignored(entry) => write!(f, "ignored by {entry}"),
            Self::NotAMatrix => f.write_str("is not a matrix"),
            Self::NotFloat => f.write_str("is not floating point"),
            Self::Narrow => write!(f, "has a side shorter than {NARROW}"),
            Self::KeptSegment(segment) => write!(f, "{segment} is never quantised"),
            Self::QuantizedSegment(segment) => write!(f, "{segment} is always quantised"),
            Self::Unaligned { side, size, block } => {
                write!(f, "its {size} {side} are no multiple of {block}")
            }
            Self::Receiver(reason) => f.write_str(reason),
            Self::Layer(other) => write!(f, "is a part of the same layer as {other}"),
            Self::Unlisted => f.write_str("no rule knows it"),
        }
    }
}

/// What a receiver declares about its parameters, by name. It overrides all rules: a parameter that it does not
/// declare, or declares with another shape, is an error.
pub type Manifest = BTreeMap<String, Declared>;

/// One parameter of a [`Manifest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Declared {
    /// The type, in the words of safetensors (`F8_E4M3`), PyTorch (`float8_e4m3fn`) or vLLM
    /// (`fp8`).
    pub dtype: String,
    /// The shape.
    pub shape: Vec<usize>,
}

impl Declared {
    fn is_fp8(&self) -> bool {
        let dtype = self.dtype.to_ascii_lowercase();
        let dtype = dtype.strip_prefix("torch.").unwrap_or(&dtype);
        matches!(dtype, "f8_e4m3" | "f8_e4m3fn" | "float8_e4m3fn" | "fp8" | "fp8_e4m3")
    }
}

/// What the rules depend on, besides the names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[non_exhaustive]
pub struct RulesConfig {
    /// What quantised weights look like.
    pub format: Fp8Format,
    /// Whom they are for.
    pub receiver: Receiver,
    /// Layers to keep. An entry is one or more whole dotted segments, found anywhere in a name, or
    /// `re:` and a regular expression, matched from the start of the name. A fused layer
    /// (`qkv_proj`, `gate_up_proj`) stands for its parts, `experts` for all stacks of experts.
    pub ignored_layers: Vec<String>,
    /// The same, under the name that `quantization_config` has for it.
    pub modules_to_not_convert: Vec<String>,
    /// The `quantization_config` of the checkpoint's `config.json`, if it has one. Its ignored
    /// layers are added; the rest must agree with the format.
    pub quantization_config: Option<Value>,
    /// What the receiver declared, if it did.
    pub manifest: Option<Manifest>,
    /// Whether a matrix that no rule knows is an error.
    pub strict: bool,
}

/// The entries of [`IGNORED_LAYERS_VARIABLE`], to be appended to
/// [`ignored_layers`](RulesConfig::ignored_layers). Empty if it is not set.
pub fn ignored_layers_from_env() -> Vec<String> {
    std::env::var(IGNORED_LAYERS_VARIABLE)
        .map(|list| parse_ignored_layers(&list))
        .unwrap_or_default()
}

/// Splits a comma-separated list of ignored layers. White space and empty entries do not count. A
/// regular expression cannot contain a comma.
pub fn parse_ignored_layers(list: &str) -> Vec<String> {
    list.split(',').map(str::trim).filter(|entry| !entry.is_empty()).map(str::to_owned).collect()
}

/// The rules, ready to decide on parameters.
///
/// Deciding takes about a microsecond and depends only on the arguments, so that a stream which repeats every step
/// can keep the decisions.
#[derive(Clone, Debug)]
pub struct Rules {
    format: Fp8Format,
    profile: &'static Profile,
    /// The rows and columns of a block, where blocks have a size.
    block: Option<(usize, usize)>,
    /// What entries without `re:` stand for, and the entry.
    ignored: HashMap<String, String>,
    patterns: Vec<(String, Regex)>,
    /// All entries, as they were given.
    entries: Vec<String>,
    manifest: Option<Manifest>,
    strict: bool,
}

impl Rules {
    /// Compiles the rules.
    ///
    /// # Errors
    ///
    /// [`QuantError::Pattern`] for an entry that is no regular expression, [`QuantError::Config`]
    /// for a `quantization_config` that contradicts the format, [`QuantError::InvalidFormat`].
    pub fn new(config: &RulesConfig) -> Result<Self, QuantError> {
        config.format.validate()?;
        let own = config.quantization_config.as_ref();
        let own = own.map(|own| ignored_by_checkpoint(own, &config.format)).transpose()?;
        let entries = config
            .ignored_layers
            .iter()
            .chain(&config.modules_to_not_convert)
            .cloned()
            .chain(own.unwrap_or_default());
        let (mut ignored, mut patterns, mut all) = (HashMap::new(), Vec::new(), Vec::new());
        for entry in entries {
            all.push(entry.clone());
            if let Some(pattern) = entry.strip_prefix("re:") {
                let pattern = Regex::new(&format!("^(?:{pattern})"))
                    .map_err(|source| QuantError::Pattern { entry: entry.clone(), source })?;
                patterns.push((entry, pattern));
                continue;
            }
            // An entry may name the parameter rather than the layer.
            let layer = module(&entry).to_owned();
            let (parent, last) = split_last(&layer);
            for part in profile::parts_of(last) {
                ignored.entry(join(parent, part)).or_insert_with(|| entry.clone());
            }
            ignored.insert(layer, entry);
        }
        Ok(Self {
            format: config.format,
            profile: config.receiver.profile(),
            block: match config.format.granularity {
                Granularity::Block { rows, cols } => Some((rows, cols)),
                Granularity::PerRow | Granularity::PerTensor => None,
            },
            ignored,
            patterns,
            entries: all,
            manifest: config.manifest.clone(),
            strict: config.strict,
        })
    }

    /// What quantised weights look like.
    pub fn format(&self) -> &Fp8Format {
        &self.format
    }

    /// What happens to a parameter by itself, and by which rule.
    ///
    /// What its layer adds is left to [`QuantPlan`] and to streams: a part of a fused layer is kept if
    /// another part is. A parameter does not show either whether a scale comes with it, so
    /// [`Rule::HasScale`] is left to them too.
    ///
    /// # Errors
    ///
    /// [`QuantError::Manifest`] if the receiver declared something that cannot be had, and
    /// [`QuantError::Unlisted`] in strict mode.
    pub fn decide(
        &self,
        name: &str,
        shape: &[usize],
        stored: Stored,
    ) -> Result<(Decision, Rule), QuantError> {
        if let Some(manifest) = &self.manifest {
            return Ok((declared(manifest, name, shape, stored)?, Rule::Manifest));
        }
        if stored == Stored::Fp8 {
            return Ok((Decision::Pass, Rule::AlreadyFp8));
        }
        if weight_of_scale(name).is_some() {
            return Ok((Decision::Pass, Rule::IsScale));
        }
        if let Some(entry) = self.ignored_by(name, shape).next() {
            return Ok((Decision::Keep, Rule::Ignored(entry.to_owned())));
        }
        if stored != Stored::Float {
            return Ok((Decision::Keep, Rule::NotFloat));
        }
        let experts = names::experts_of(name, shape).is_some();
        let (rows, cols) = match *shape {
            [rows, cols] => (rows, cols),
            [_, rows, cols] if experts => (rows, cols),
            _ => return Ok((Decision::Keep, Rule::NotAMatrix)),
        };
        if rows < NARROW || cols < NARROW {
            return Ok((Decision::Keep, Rule::Narrow));
        }
        match kind(name, shape) {
            Kind::Kept(segment) => Ok((Decision::Keep, Rule::KeptSegment(segment.to_owned()))),
            Kind::Projection => Ok(match self.unfit(name, shape, rows, cols) {
                Some(rule) => (Decision::Keep, rule),
                None => (Decision::Quantize, Rule::QuantizedSegment(names::part(name).to_owned())),
            }),
            Kind::Unknown if self.strict => Err(QuantError::Unlisted { tensor: name.to_owned() }),
            Kind::Unknown => Ok((Decision::Keep, Rule::Unlisted)),
        }
    }

    /// Why the receiver cannot load a projection in FP8, as far as the parameter alone shows it.
    fn unfit(&self, name: &str, shape: &[usize], rows: usize, cols: usize) -> Option<Rule> {
        let profile = self.profile;
        let part = names::part(name);
        if names::is_moe_stack(name, shape) {
            let linear = matches!(part, "input_linear" | "output_linear");
            if !(if linear { profile.linear_stacks } else { profile.moe_stacks }) {
                let title = profile.title;
                let reason = format!("{title}: no place for the scales of stacks named {part}");
                return Some(Rule::Receiver(reason));
            }
        }
        let (block_rows, block_cols) = self.block?;
        if profile.whole_columns && !cols.is_multiple_of(block_cols) {
            return Some(Rule::Unaligned { side: "columns", size: cols, block: block_cols });
        }
        // What is one in the checkpoint may be two of half the rows.
        let in_two = part == "gate_up_proj" && shape.len() == 2;
        let experts = profile.whole_columns && names::experts_of(name, shape).is_some();
        let parts = !matches!(profile.whole_rows, WholeRows::No | WholeRows::All);
        let size = if in_two && parts { rows / 2 } else { rows };
        let whole = profile.whole_rows == WholeRows::All || experts || in_two && parts;
        (whole && !size.is_multiple_of(block_rows)).then_some(Rule::Unaligned {
            side: if size < rows { "rows of a part" } else { "rows" },
            size,
            block: block_rows,
        })
    }

    /// The entries that ignore a parameter, the most specific one first.
    fn ignored_by<'a>(&'a self, name: &'a str, shape: &[usize]) -> impl Iterator<Item = &'a str> {
        let layer = module(name);
        let mut found = Vec::new();
        if !self.ignored.is_empty() {
            // A stack right under `moe` is what receivers call its experts.
            let experts =
                names::experts_of(name, shape).filter(|_| names::is_moe_stack(name, shape));
            // All runs of whole segments, longest first: a dozen look-ups, however many entries.
            let starts = std::iter::once(0).chain(layer.match_indices('.').map(|(at, _)| at + 1));
            // Of a receiver's own name only those from its beginning: a short entry means the checkpoint's.
            let other = names::alias(layer);
            for mut run in starts.map(|start| &layer[start..]).chain(other.as_deref()) {
                loop {
                    found.extend(self.ignored.get(run).map(String::as_str));
                    let Some((shorter, _)) = run.rsplit_once('.') else { break };
                    run = shorter;
                }
            }
            let of_experts = experts.as_deref().and_then(names::alias);
            let of_experts = experts.into_iter().chain(of_experts);
            found.extend(of_experts.filter_map(|e| self.ignored.get(&e)).map(String::as_str));
        }
        let (parent, last) = split_last(layer);
        for part in names::packed_parts(last).iter().filter(|_| shape.len() == 2) {
            found.extend(self.ignored.get(&join(parent, part)).map(String::as_str));
        }
        let patterns = self.patterns.iter().filter(|(_, pattern)| pattern.is_match(name));
        found.into_iter().chain(patterns.map(|(entry, _)| entry.as_str()))
    }
}

/// The weight that a scale belongs to: for `a.weight_scale_inv` and `a.weight_scale` that is
/// `a.weight`, for those of fused experts `a.down_proj_scale_inv` it is `a.down_proj`. Nothing for
/// other parameters that are named after scales, such as `logit_scale`.
pub fn weight_of_scale(name: &str) -> Option<&str> {
    let weight = name.strip_suffix("_scale_inv").or_else(|| name.strip_suffix("_scale"))?;
    let last = split_last(weight).1;
    (last == "weight" || is_projection(last)).then_some(weight)
}

/// Rule 1.
fn declared(
    manifest: &Manifest,
    name: &str,
    shape: &[usize],
    stored: Stored,
) -> Result<Decision, QuantError> {
    let contradiction = |reason: String| QuantError::Manifest { tensor: name.to_owned(), reason };
    let Some(declared) = manifest.get(name) else {
        // Receivers declare weights; their scales follow from that.
        let of_declared = weight_of_scale(name).is_some_and(|weight| manifest.contains_key(weight));
        return if of_declared {
            Ok(Decision::Pass)
        } else {
            Err(contradiction("the receiver does not declare it".to_owned()))
        };
    };
    if declared.shape != shape {
        return Err(contradiction(format!(
            "its shape is {shape:?}, the receiver declares {:?}",
            declared.shape
        )));
    }
    match (declared.is_fp8(), stored) {
        (true, Stored::Float) if matches!(shape.len(), 2 | 3) => Ok(Decision::Quantize),
        (true, Stored::Float) => {
            Err(contradiction(format!("shape {shape:?} cannot have the declared FP8 blocks")))
        }
        (true, Stored::Other) => {
            Err(contradiction("FP8 is declared, but it is not floating point".to_owned()))
        }
        (true, Stored::Fp8) => Ok(Decision::Pass),
        (false, Stored::Fp8) => {
            Err(contradiction(format!("it is FP8, the receiver declares {}", declared.dtype)))
        }
        (false, _) if weight_of_scale(name).is_some() => Ok(Decision::Pass),
        (false, _) => Ok(Decision::Keep),
    }
}

/// Reads a checkpoint's own `quantization_config`: checks that it is the format, and returns the
/// layers that it ignores.
fn ignored_by_checkpoint(config: &Value, format: &Fp8Format) -> Result<Vec<String>, QuantError> {
    let wrong = |reason: String| QuantError::Config { reason };
    let config = config.as_object().ok_or_else(|| wrong("is not an object".to_owned()))?;
    let method = config.get("quant_method").and_then(Value::as_str);
    if !matches!(method, None | Some("fp8" | "compressed-tensors")) {
        return Err(wrong(format!("quant_method is {method:?}, not fp8")));
    }
    if let Some(size) = config.get("weight_block_size").filter(|size| !size.is_null()) {
        let ours = match format.granularity {
            Granularity::Block { rows, cols } => serde_json::json!([rows, cols]),
            Granularity::PerRow | Granularity::PerTensor => Value::Null,
        };
        if *size != ours {
            return Err(wrong(format!(
                "weight_block_size is {size}, the format has {}",
                format.granularity
            )));
        }
    }
    let mut ignored = Vec::new();
    // The last is compressed-tensors' name for the same thing.
    for key in ["ignored_layers", "modules_to_not_convert", "ignore"] {
        match config.get(key) {
            None | Some(Value::Null) => {}
            Some(list) => {
                let list: Vec<String> = serde_json::from_value(list.clone())
                    .map_err(|error| wrong(format!("{key} is not a list of names: {error}")))?;
                ignored.extend(list);
            }
        }
    }
    Ok(ignored)
}
