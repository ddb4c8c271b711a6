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
    /// `deepseek-ai/DeepSeek-V3` without the layer that predicts several tokens: 671 billion parameters in 45 395 tensors, 256
    /// experts in all layers but the first three.
    #[serde(rename = "deepseek-v3")]
    DeepSeekV3,
    /// `moonshotai/Kimi-K2-Instruct`: 1026 billion parameters in 69 975 tensors, 384 experts in all layers but the first.
    #[serde(rename = "kimi-k2")]
    KimiK2,
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
    attention: Attention,
    tie_word_embeddings: bool,
    /// Biases on the query, key and value projections: Qwen2 has them, Qwen3 does not.
    attention_bias: bool,
    /// Norms of each head's queries and keys: Qwen3 has them.
    head_norms: bool,
    mlp: Mlp,
    /// What only `tiny-moe` has: F32 tensors.
    extras: bool,
}

enum Attention {
    Grouped {
        num_key_value_heads: u64,
        head_dim: u64,
    },
    /// Keys and values come of a latent vector, with the dimensions that DeepSeek-V3 gives them.
    Latent,
}

enum Mlp {
    Dense {
        intermediate_size: u64,
    },
    Experts {
        num_experts: u64,
        moe_intermediate_size: u64,
    },
    /// Beside a shared expert, after some dense layers.
    RoutedExperts {
        first_k_dense_replace: u32,
        intermediate_size: u64,
        n_routed_experts: u64,
        moe_intermediate_size: u64,
    },
}

impl SyntheticModel {
    /// Every model, smallest first.
    pub const ALL: [Self; 6] = [
        Self::TinyMoe,
        Self::Qwen2_5_0_5B,
        Self::Qwen2_5_7B,
        Self::Qwen3_30BA3B,
        Self::DeepSeekV3,
        Self::KimiK2,
    ];

    /// The name that the command line and [`FromStr`] know it by.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qwen2_5_0_5B => "qwen2.5-0.5b",
            Self::Qwen2_5_7B => "qwen2.5-7b",
            Self::Qwen3_30BA3B => "qwen3-30b-a3b",
            Self::DeepSeekV3 => "deepseek-v3",
            Self::KimiK2 => "kimi-k2",
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
                attention: Attention::Grouped { num_key_value_heads: 2, head_dim: 64 },
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
                attention: Attention::Grouped { num_key_value_heads: 4, head_dim: 128 },
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
                attention: Attention::Grouped { num_key_value_heads: 4, head_dim: 128 },
                tie_word_embeddings: false,
                attention_bias: false,
                head_norms: true,
                mlp: Mlp::Experts { num_experts: 128, moe_intermediate_size: 768 },
                extras: false,
            },
            Self::DeepSeekV3 => Config::latent(129_280, 128, 3, 256),
            Self::KimiK2 => Config::latent(163_840, 64, 1, 384),
            Self::TinyMoe => Config {
                vocab_size: 1009,
                hidden_size: 160,
                num_hidden_layers: 4,
                num_attention_heads: 5,
                attention: Attention::Grouped { num_key_value_heads: 1, head_dim: 129 },
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
    /// DeepSeek-V3, and what has its dimensions but for these.
    fn latent(vocab: u64, heads: u64, dense_layers: u32, experts: u64) -> Self {
        Self {
            vocab_size: vocab,
            hidden_size: 7168,
            num_hidden_layers: 61,
            num_attention_heads: heads,
            attention: Attention::Latent,
            tie_word_embeddings: false,
            attention_bias: false,
            head_norms: false,
            mlp: Mlp::RoutedExperts {
                first_k_dense_replace: dense_layers,
                intermediate_size: 18_432,
                n_routed_experts: experts,
                moe_intermediate_size: 2048,
            },
            extras: false,
        }
    }

    fn metas(&self, layers: u32) -> Vec<TensorMeta> {
        let (mut metas, mut biases) = (Vec::new(), Vec::new());
        let mut bf16 = |name: String, shape: &[u64]| {
            metas.push(TensorMeta::new(name, DType::BF16, shape));
        };
        let hidden = self.hidden_size;
        bf16("model.embed_tokens.weight".into(), &[self.vocab_size, hidden]);
        for layer in 0..layers {
            let number = layer;
            let layer = format!("model.layers.{layer}");
            let heads = self.num_attention_heads;
            match self.attention {
                Attention::Grouped { num_key_value_heads, head_dim } => {
                    let (queries, keys) = (heads * head_dim, num_key_value_heads * head_dim);
                    for (projection, out) in [("q", queries), ("k", keys), ("v", keys)] {
                        let name = format!("{layer}.self_attn.{projection}_proj");
                        bf16(format!("{name}.weight"), &[out, hidden]);
                        if self.attention_bias {
                            bf16(format!("{name}.bias"), &[out]);
                        }
                    }
                    bf16(format!("{layer}.self_attn.o_proj.weight"), &[hidden, queries]);
                    if self.head_norms {
                        bf16(format!("{layer}.self_attn.q_norm.weight"), &[head_dim]);
                        bf16(format!("{layer}.self_attn.k_norm.weight"), &[head_dim]);
                    }
                }
                Attention::Latent => {
                    // q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim and v_head_dim.
                    let (queries, keys, nope, rope, values) = (1536, 512, 128, 64, 128);
                    for (name, shape) in [
                        ("q_a_proj", &[queries, hidden][..]),
                        ("q_a_layernorm", &[queries]),
                        ("q_b_proj", &[heads * (nope + rope), queries]),
                        ("kv_a_proj_with_mqa", &[keys + rope, hidden]),
                        ("kv_a_layernorm", &[keys]),
                        ("kv_b_proj", &[heads * (nope + values), keys]),
                        ("o_proj", &[hidden, heads * values]),
                    ] {
                        bf16(format!("{layer}.self_attn.{name}.weight"), shape);
                    }
                }
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
                Mlp::RoutedExperts { first_k_dense_replace, intermediate_size, .. }
                    if number < first_k_dense_replace =>
                {
                    mlp(format!("{layer}.mlp"), intermediate_size);
                }
                Mlp::RoutedExperts { n_routed_experts, moe_intermediate_size, .. } => {
                    for expert in 0..n_routed_experts {
                        mlp(format!("{layer}.mlp.experts.{expert}"), moe_intermediate_size);
                    }
                    mlp(format!("{layer}.mlp.shared_experts"), moe_intermediate_size);
                    bf16(format!("{layer}.mlp.gate.weight"), &[n_routed_experts, hidden]);
                    biases.push(TensorMeta::new(
                        format!("{layer}.mlp.gate.e_score_correction_bias"),
                        DType::F32,
                        [n_routed_experts],
                    ));
                }
            }
            bf16(format!("{layer}.input_layernorm.weight"), &[hidden]);
            bf16(format!("{layer}.post_attention_layernorm.weight"), &[hidden]);
        }
        bf16("model.norm.weight".into(), &[hidden]);
        if !self.tie_word_embeddings {
            bf16("lm_head.weight".into(), &[self.vocab_size, hidden]);
        }
        metas.extend(biases);
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
