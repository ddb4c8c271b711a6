//! What known receivers can load: one value for each.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Granularity, QuantError, ScaleName};

/// Whom the quantised weights are for.
///
/// Part of the format contract: ranks that name different ones do not form a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub enum Receiver {
    /// What vLLM and SGLang both load.
    #[default]
    Common,
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// Hugging Face transformers.
    Transformers,
    /// A loader of your own: whatever blocks can express. Shapes and layouts are no reason to keep a
    /// weight.
    Any,
}

impl Receiver {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Common, Self::Vllm, Self::Sglang, Self::Transformers, Self::Any];

    /// The name in configurations and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Common => "common",
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::Transformers => "transformers",
            Self::Any => "any",
        }
    }

    /// What it can load.
    pub fn profile(self) -> &'static Profile {
        match self {
            Self::Common => &COMMON,
            Self::Vllm => &VLLM,
            Self::Sglang => &SGLANG,
            Self::Transformers => &TRANSFORMERS,
            Self::Any => &ANY,
        }
    }
}

impl fmt::Display for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Receiver {
    type Err = QuantError;

    fn from_str(text: &str) -> Result<Self, QuantError> {
        Self::ALL.into_iter().find(|receiver| receiver.name() == text).ok_or_else(|| {
            QuantError::InvalidFormat {
                reason: format!("{text} is no receiver: common, vllm, sglang, transformers or any"),
            }
        })
    }
}

/// What a receiver can load, as data.
#[derive(Debug)]
#[non_exhaustive]
pub struct Profile {
    /// The receiver, for people.
    pub title: &'static str,
    /// Whether columns have to be whole blocks: activations are quantised in groups of a block's
    /// columns.
    pub whole_columns: bool,
    /// Which rows have to be whole blocks.
    pub whole_rows: WholeRows,
    /// The layers that it makes of several weights of a checkpoint.
    pub fused: &'static [&'static [Fused]],
    /// Whether it loads stacks of experts that are stored `[experts, in, out]`.
    pub transposed_stacks: bool,
    /// Whether it loads stacks of experts right under `moe` or `block_sparse_moe`, called
    /// `gate_proj`, `up_proj` and `down_proj`.
    pub moe_stacks: bool,
    /// Whether it loads the scales of stacks that are called `input_linear` and `output_linear` there.
    pub linear_stacks: bool,
    /// Whether the projections of a Mamba-1 mixer can be FP8.
    pub mamba1: bool,
    /// Whether each of the parts that a Mamba-2 mixer's `in_proj` consists of has to be whole blocks.
    pub whole_mamba2_parts: bool,
}

/// Which rows have to be whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WholeRows {
    /// None.
    No,
    /// Those of the parts of fused layers, except for the last part.
    PartsButTheLast,
    /// Those of all parts of fused layers.
    Parts,
    /// Those of every weight.
    All,
}

/// A layer that a receiver makes of several weights, one below the other.
#[derive(Debug)]
#[non_exhaustive]
pub struct Fused {
    /// The layer's name in the receiver: in the list of ignored layers it stands for its parts.
    pub layer: &'static str,
    /// Its parts, from the first row on. A part that a model does not have is left out.
    pub parts: &'static [&'static str],
    /// Parts without which it is no layer.
    pub when: &'static [&'static str],
    /// Whether all parts have the same shape, so that one shows what the others are like.
    pub alike: bool,
    /// Whether every receiver makes one partition of it, so that its last rows need not fill a block.
    pub one_partition: bool,
}

const fn fused(layer: &'static str, parts: &'static [&'static str]) -> Fused {
    Fused { layer, parts, when: &[], alike: false, one_partition: false }
}

/// Of one shape: their outputs are multiplied with one another.
const fn alike(layer: &'static str, parts: &'static [&'static str]) -> Fused {
    Fused { layer, parts, when: &[], alike: true, one_partition: false }
}

/// The projections to latent states, which are replicated and not split.
const fn latent(layer: &'static str, parts: &'static [&'static str]) -> Fused {
    Fused { layer, parts, when: &[], alike: false, one_partition: true }
}

/// Only where all parts of `when` are there.
const fn only(
    layer: &'static str,
    parts: &'static [&'static str],
    when: &'static [&'static str],
) -> Fused {
    Fused { layer, parts, when, alike: false, one_partition: false }
}

/// What vLLM and SGLang both fuse.
const FUSED: &[Fused] = &[
    fused("qkv_proj", &["q_proj", "k_proj", "v_proj"]),
    fused("qkv", &["wq", "wk", "wv"]),
    only(
        "qkv_gate_proj",
        &["q_proj", "k_proj", "v_proj", "output_gate_proj"],
        &["output_gate_proj"],
    ),
    alike("gate_up_proj", &["gate_proj", "up_proj"]),
    alike("gate_up_proj", &["linear_gate", "up_proj"]),
    alike("gate_up_proj", &["c_fc_0", "c_fc_1"]),
    alike("w13", &["w1", "w3"]),
    fused("in_proj_qkvz", &["in_proj_qkv", "in_proj_z"]),
    alike("in_proj_ba", &["in_proj_b", "in_proj_a"]),
    latent("fused_qkv_a_proj", &["q_a_proj", "kv_a_proj_with_mqa"]),
    only(
        "fused_qkv_a_g_proj",
        &["q_a_proj", "kv_a_proj_with_mqa", "g_proj"],
        &["q_a_proj", "kv_a_proj_with_mqa", "g_proj"],
    ),
    latent("fused_wqa_wkv", &["wq_a", "wkv"]),
    latent("fused_wqa_wkv_a", &["wq_a", "wkv_a_with_mqa"]),
    fused("index_qkv_proj", &["index_q_proj", "index_k_proj"]),
];

/// What only vLLM fuses: the inputs of linear attention with a delta rule, which `b_proj` belongs to.
const DELTA_RULE: &[Fused] = &[only(
    "in_proj_qkvgfab",
    &["q_proj", "k_proj", "v_proj", "g_proj", "f_a_proj", "b_proj"],
    &["q_proj", "b_proj"],
)];

static COMMON: Profile = Profile {
    title: "vLLM and SGLang",
    whole_columns: true,
    whole_rows: WholeRows::Parts,
    fused: &[FUSED, DELTA_RULE],
    transposed_stacks: false,
    moe_stacks: true,
    linear_stacks: false,
    mamba1: false,
    whole_mamba2_parts: true,
};

static VLLM: Profile = Profile {
    title: "vLLM",
    whole_columns: true,
    whole_rows: WholeRows::PartsButTheLast,
    fused: &[FUSED, DELTA_RULE],
    transposed_stacks: true,
    moe_stacks: true,
    linear_stacks: false,
    mamba1: false,
    whole_mamba2_parts: true,
};

static SGLANG: Profile = Profile {
    title: "SGLang",
    whole_columns: true,
    whole_rows: WholeRows::Parts,
    fused: &[FUSED],
    transposed_stacks: false,
    moe_stacks: true,
    linear_stacks: false,
    mamba1: false,
    whole_mamba2_parts: true,
};

/// It fuses nothing that a checkpoint has apart, but its grid of scales has to divide the weight.
static TRANSFORMERS: Profile = Profile {
    title: "transformers",
    whole_columns: true,
    whole_rows: WholeRows::All,
    fused: &[],
    transposed_stacks: false,
    moe_stacks: true,
    linear_stacks: false,
    mamba1: true,
    whole_mamba2_parts: false,
};

static ANY: Profile = Profile {
    title: "any receiver",
    whole_columns: false,
    whole_rows: WholeRows::No,
    fused: &[FUSED],
    transposed_stacks: true,
    moe_stacks: true,
    linear_stacks: true,
    mamba1: true,
    whole_mamba2_parts: false,
};

impl Profile {
    /// What it calls the scales of a granularity: those of blocks are multiplied under the name
    /// `weight_scale_inv`, all others under `weight_scale`.
    pub fn scale_name(&self, granularity: Granularity) -> ScaleName {
        match granularity {
            Granularity::Block { .. } => ScaleName::WeightScaleInv,
            Granularity::PerRow | Granularity::PerTensor => ScaleName::WeightScale,
        }
    }

    /// Its fused layers.
    pub(crate) fn fused(&self) -> impl Iterator<Item = &'static Fused> {
        self.fused.iter().flat_map(|group| group.iter())
    }
}

/// The parts of a fused layer by its name, whatever receiver fuses it.
pub(crate) fn parts_of(layer: &str) -> impl Iterator<Item = &'static str> {
    let all = FUSED.iter().chain(DELTA_RULE).filter(move |fused| fused.layer == layer);
    all.flat_map(|fused| fused.parts).copied()
}
