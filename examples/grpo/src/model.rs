//! A decoder-only transformer, its parameters named as Llama's.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;
use candle_nn::ops::{log_softmax, softmax};

use crate::random::Random;

/// Multiples of 128, so that every FP8 block is a whole one.
const HIDDEN: usize = 128;
const INNER: usize = 256;
const LAYERS: usize = 2;
const HEADS: usize = 4;
/// More than the task's characters need, for the same reason.
const VOCABULARY: usize = 128;

/// The shapes of all parameters.
fn shapes() -> Vec<(String, Vec<usize>)> {
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ("lm_head.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        };
        for projection in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            add(&format!("self_attn.{projection}"), &[HIDDEN, HIDDEN]);
        }
        add("mlp.gate_proj", &[INNER, HIDDEN]);
        add("mlp.up_proj", &[INNER, HIDDEN]);
        add("mlp.down_proj", &[HIDDEN, INNER]);
        add("input_layernorm", &[HIDDEN]);
        add("post_attention_layernorm", &[HIDDEN]);
    }
    shapes
}

/// New parameters, the same for the same seed.
pub(crate) fn initial(random: &mut Random) -> Result<HashMap<String, Var>> {
    let mut vars = HashMap::new();
    for (name, shape) in shapes() {
        let count = shape.iter().product();
        let values: Vec<f32> = match *shape {
            [_] => vec![1.0; count],
            _ => {
                let width = shape[shape.len() - 1] as f32;
                (0..count).map(|_| random.normal() / width.sqrt()).collect()
            }
        };
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
        vars.insert(name, Var::from_tensor(&tensor)?);
    }
    Ok(vars)
}

struct Layer {
    input_norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    post_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

pub(crate) struct Model {
    embed: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
}

impl Model {
    /// A model of F32 parameters; of the trainer's variables, or of what arrived at a rollout.
    pub(crate) fn new(tensors: HashMap<String, Tensor>) -> Result<Self> {
        let all = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let norm = |vb: VarBuilder<'_>| vb.get(HIDDEN, "weight");
        let matrix = |vb: VarBuilder<'_>, rows, cols| vb.get((rows, cols), "weight");
        let layers = (0..LAYERS).map(|layer| {
            let vb = all.pp(format!("model.layers.{layer}"));
            let (attention, mlp) = (vb.pp("self_attn"), vb.pp("mlp"));
            Ok(Layer {
                input_norm: norm(vb.pp("input_layernorm"))?,
                q: matrix(attention.pp("q_proj"), HIDDEN, HIDDEN)?,
                k: matrix(attention.pp("k_proj"), HIDDEN, HIDDEN)?,
                v: matrix(attention.pp("v_proj"), HIDDEN, HIDDEN)?,
                o: matrix(attention.pp("o_proj"), HIDDEN, HIDDEN)?,
                post_norm: norm(vb.pp("post_attention_layernorm"))?,
                gate: matrix(mlp.pp("gate_proj"), INNER, HIDDEN)?,
                up: matrix(mlp.pp("up_proj"), INNER, HIDDEN)?,
                down: matrix(mlp.pp("down_proj"), HIDDEN, INNER)?,
            })
        });
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            embed: matrix(all.pp("model.embed_tokens"), VOCABULARY, HIDDEN)?,
            norm: norm(all.pp("model.norm"))?,
            head: matrix(all.pp("lm_head"), VOCABULARY, HIDDEN)?,
        })
    }

    /// The logarithms of the probabilities of what follows each token: `[batch, length, vocabulary]`.
    pub(crate) fn log_probabilities(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, length) = tokens.dims2()?;
        let (cos, sin) = rotations(length)?;
        let mask = causal_mask(length)?;
        let mut x = self.embed.embedding(&tokens.flatten_all()?)?;
        x = x.reshape((batch, length, HIDDEN))?;
        for layer in &self.layers {
            let normed = rms_norm(&x, &layer.input_norm)?;
            let heads = |weight: &Tensor| {
                linear(&normed, weight)?
                    .reshape((batch, length, HEADS, HIDDEN / HEADS))?
                    .transpose(1, 2)?
                    .contiguous()
            };
            let q = rotate(&heads(&layer.q)?, &cos, &sin)?;
            let k = rotate(&heads(&layer.k)?, &cos, &sin)?;
            let scores = (q.matmul(&k.t()?.contiguous()?)? / ((HIDDEN / HEADS) as f64).sqrt())?;
            let attention = softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
            let mixed = attention.matmul(&heads(&layer.v)?)?;
            let mixed = mixed.transpose(1, 2)?.contiguous()?.reshape((batch, length, HIDDEN))?;
            x = (x + linear(&mixed, &layer.o)?)?;
            let normed = rms_norm(&x, &layer.post_norm)?;
            let inner = (linear(&normed, &layer.gate)?.silu()? * linear(&normed, &layer.up)?)?;
            x = (x + linear(&inner, &layer.down)?)?;
        }
        log_softmax(&linear(&rms_norm(&x, &self.norm)?, &self.head)?, D::Minus1)
    }
}

fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (batch, length, width) = x.dims3()?;
    let product = x.reshape((batch * length, width))?.matmul(&weight.t()?)?;
    product.reshape((batch, length, weight.dim(0)?))
}

fn rms_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?;
    x.broadcast_div(&scale)?.broadcast_mul(weight)
}

fn rotations(length: usize) -> Result<(Tensor, Tensor)> {
    let half = HIDDEN / HEADS / 2;
    let angles: Vec<f32> = (0..length)
        .flat_map(|at| {
            (0..half).map(move |pair| at as f32 / 10000_f32.powf(pair as f32 / half as f32))
        })
        .collect();
    let angles = Tensor::from_vec(angles, (length, half), &Device::Cpu)?;
    Ok((angles.cos()?, angles.sin()?))
}

fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)?.contiguous()
}

fn causal_mask(length: usize) -> Result<Tensor> {
    let values: Vec<f32> = (0..length)
        .flat_map(|row| (0..length).map(move |col| if col > row { -1e9 } else { 0.0 }))
        .collect();
    Tensor::from_vec(values, (length, length), &Device::Cpu)
}
