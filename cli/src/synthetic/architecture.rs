//! The names and shapes of known models, out of the values of their `config.json`.

use std::fmt;
use std::str::FromStr;

use engine_core::{DType, Error, ErrorKind, TensorMeta};
use serde::{Deserialize, Serialize};

/// A model whose names and shapes are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SyntheticModel {
    /// `Qwen/Qwen2.5-0.5B`: 494 032 768 parameters in 290 tensors; the output head is tied to the
    /// embedding and so not a tensor of its own.
    #[serde(rename = "qwen2.5-0.5b")]
    Qwen2_5_0_5B,
    /// `Qwen/Qwen2.5-7B`: 7 615 616 512 parameters in 339 tensors.
    #[serde(rename = "qwen2.5-7b")]
    Qwen2_5_7B,
    /// `Qwen/Qwen3-30B-A3B`: 30 532 122 624 parameters in 18 867 tensors, 128 experts a layer.
    #[serde(rename = "qwen3-30b-a3b")]
    Qwen3_30BA3B,
    /// A few megabytes of a mixture of experts that never existed, with dimensions that no block
    /// size divides, an F32 vector in every layer and an F32 scalar at the end.
    #[serde(rename = "tiny-moe")]
    TinyMoe,
}

/// The values of a `config.json`, by its own names.
struct Config {
    vocab_size: u64,
    hidden_size: u64,
    num_hidden_layers: u32,
    num_attention_heads: u64,
    num_key_value_heads: u64,
    head_dim: u64,
    tie_word_embeddings: bool,
    /// Biases on the query, key and value projections: Qwen2 has them, Qwen3 does not.
    attention_bias: bool,
    /// Norms of each head's queries and keys: Qwen3 has them.
    head_norms: bool,
    mlp: Mlp,
    /// What only `tiny-moe` has: F32 tensors.
    extras: bool,
}

enum Mlp {
    Dense { intermediate_size: u64 },
    Experts { num_experts: u64, moe_intermediate_size: u64 },
}

impl SyntheticModel {
    /// Every model, smallest first.
    pub const ALL: [Self; 4] =
        [Self::TinyMoe, Self::Qwen2_5_0_5B, Self::Qwen2_5_7B, Self::Qwen3_30BA3B];

    /// The name that the command line and [`FromStr`] know it by.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qwen2_5_0_5B => "qwen2.5-0.5b",
            Self::Qwen2_5_7B => "qwen2.5-7b",
            Self::Qwen3_30BA3B => "qwen3-30b-a3b",
            Self::TinyMoe => "tiny-moe",
        }
    }

    /// The number of layers of the whole model: `num_hidden_layers`.
    pub fn layers(self) -> u32 {
        self.config().num_hidden_layers
    }

    /// All tensors in the order of the modules of the `transformers` implementation, or those of a
    /// model that has only the first `layers` layers.
    ///
    /// Linear layers are `[out_features, in_features]`.
    ///
    /// # Errors
    ///
    /// `Config` if the model has fewer layers than asked for.
    pub fn metas(self, layers: Option<u32>) -> Result<Vec<TensorMeta>, Error> {
        let config = self.config();
        let all = config.num_hidden_layers;
        let layers = layers.unwrap_or(all);
        if layers > all {
            return Err(Error::new(
                ErrorKind::Config,
                "choosing a synthetic model",
                format!("{layers} layers of {self}, which has {all}"),
            ));
        }
        Ok(config.metas(layers))
    }

    fn config(self) -> Config {
        match self {
            Self::Qwen2_5_0_5B => Config {
                vocab_size: 151_936,
                hidden_size: 896,
                num_hidden_layers: 24,
                num_attention_heads: 14,
                num_key_value_heads: 2,
                head_dim: 64,
                tie_word_embeddings: true,
                attention_bias: true,
                head_norms: false,
                mlp: Mlp::Dense { intermediate_size: 4864 },
                extras: false,
            },
            Self::Qwen2_5_7B => Config {
                vocab_size: 152_064,
                hidden_size: 3584,
                num_hidden_layers: 28,
                num_attention_heads: 28,
                num_key_value_heads: 4,
                head_dim: 128,
                tie_word_embeddings: false,
                attention_bias: true,
                head_norms: false,
                mlp: Mlp::Dense { intermediate_size: 18_944 },
                extras: false,
            },
            Self::Qwen3_30BA3B => Config {
                vocab_size: 151_936,
                hidden_size: 2048,
                num_hidden_layers: 48,
                num_attention_heads: 32,
                num_key_value_heads: 4,
                head_dim: 128,
                tie_word_embeddings: false,
                attention_bias: false,
                head_norms: true,
                mlp: Mlp::Experts { num_experts: 128, moe_intermediate_size: 768 },
                extras: false,
            },
            Self::TinyMoe => Config {
                vocab_size: 1009,
                hidden_size: 160,
                num_hidden_layers: 4,
                num_attention_heads: 5,
                num_key_value_heads: 1,
                head_dim: 129,
                tie_word_embeddings: false,
                attention_bias: true,
                head_norms: true,
                mlp: Mlp::Experts { num_experts: 16, moe_intermediate_size: 136 },
                extras: true,
            },
        }
    }
}

impl Config {
    fn metas(&self, layers: u32) -> Vec<TensorMeta> {
        let mut metas = Vec::new();
        let mut bf16 = |name: String, shape: &[u64]| {
            metas.push(TensorMeta::new(name, DType::BF16, shape));
        };
        let hidden = self.hidden_size;
        bf16("model.embed_tokens.weight".into(), &[self.vocab_size, hidden]);
        for layer in 0..layers {
            let layer = format!("model.layers.{layer}");
            let queries = self.num_attention_heads * self.head_dim;
            let keys = self.num_key_value_heads * self.head_dim;
            for (projection, out) in [("q", queries), ("k", keys), ("v", keys)] {
                let name = format!("{layer}.self_attn.{projection}_proj");
                bf16(format!("{name}.weight"), &[out, hidden]);
                if self.attention_bias {
                    bf16(format!("{name}.bias"), &[out]);
                }
            }
            bf16(format!("{layer}.self_attn.o_proj.weight"), &[hidden, queries]);
            if self.head_norms {
                bf16(format!("{layer}.self_attn.q_norm.weight"), &[self.head_dim]);
                bf16(format!("{layer}.self_attn.k_norm.weight"), &[self.head_dim]);
            }
            let mut mlp = |name: String, width: u64| {
                bf16(format!("{name}.gate_proj.weight"), &[width, hidden]);
                bf16(format!("{name}.up_proj.weight"), &[width, hidden]);
                bf16(format!("{name}.down_proj.weight"), &[hidden, width]);
            };
            match self.mlp {
                Mlp::Dense { intermediate_size } => mlp(format!("{layer}.mlp"), intermediate_size),
                Mlp::Experts { num_experts, moe_intermediate_size } => {
                    for expert in 0..num_experts {
                        mlp(format!("{layer}.mlp.experts.{expert}"), moe_intermediate_size);
                    }
                    bf16(format!("{layer}.mlp.gate.weight"), &[num_experts, hidden]);
                }
            }
            bf16(format!("{layer}.input_layernorm.weight"), &[hidden]);
            bf16(format!("{layer}.post_attention_layernorm.weight"), &[hidden]);
        }
        bf16("model.norm.weight".into(), &[hidden]);
        if !self.tie_word_embeddings {
            bf16("lm_head.weight".into(), &[self.vocab_size, hidden]);
        }
        if self.extras {
            if let Mlp::Experts { num_experts, .. } = self.mlp {
                metas.extend((0..layers).map(|layer| {
                    let name = format!("model.layers.{layer}.mlp.gate.e_score_correction_bias");
                    TensorMeta::new(name, DType::F32, [num_experts])
                }));
            }
            metas.push(TensorMeta::new("logit_scale", DType::F32, []));
        }
        metas
    }
}

impl fmt::Display for SyntheticModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SyntheticModel {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|model| model.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            Error::new(
                ErrorKind::Config,
                "choosing a synthetic model",
                format!("there is none named `{name}`; known are {known}"),
            )
        })
    }
}
