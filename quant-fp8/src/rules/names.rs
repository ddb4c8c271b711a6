//! What the name of a parameter says: which layer it belongs to, and what kind of parameter it is.
//!
//! Names are compared by whole dotted segments, and segments by whole words (`vision_tower` has the
//! words `vision` and `tower`), never by substrings.

/// Segments, anywhere in a name, whose parameters are kept.
const KEPT_SEGMENTS: [&str; 26] = [
    "lm_head",
    "shared_head",
    "head",
    "output_head",
    "wte",
    "wpe",
    "gate",
    "router",
    "shared_expert_gate",
    "weights_proj",
    "eh_proj",
    "compressor",
    "conv1d",
    "lora_A",
    "lora_B",
    "bias",
    "pooler",
    "classifier",
    "score",
    "predictions",
    "generator_predictions",
    // The feed-forward layers of T5, of which transformers keeps the second in F32.
    "DenseReluDense",
    "merger",
    "deepstack_merger_list",
    "mlp1",
    "mlp_AR",
];

/// Words of segments whose parameters are kept: embeddings, adapters, and the towers of other kinds
/// of input or output than text, with what joins them to the language model. Receivers make these
/// without a quantisation config, and published FP8 checkpoints leave them alone.
const KEPT_WORDS: [&str; 62] = [
    "embed",
    "embeds",
    "embedding",
    "embeddings",
    "embedder",
    "unembed",
    "adapter",
    "vision",
    "visual",
    "image",
    "images",
    "img",
    "video",
    "pixel",
    "patch",
    "vit",
    "vpm",
    "siglip",
    "clip",
    "sam",
    "radio",
    "pixtral",
    "ocr",
    "audio",
    "speech",
    "sound",
    "acoustic",
    "semantic",
    "asr",
    "ctc",
    "whisper",
    "diarization",
    "sortformer",
    "spk",
    "speaker",
    "talker",
    "vocoder",
    "bigvgan",
    "code2wav",
    "token2wav",
    "tts",
    "dit",
    "codec",
    "codebook",
    "quantizer",
    "tokenizer",
    "perception",
    "perceiver",
    "perceive",
    "resampler",
    "qformer",
    "protein",
    "action",
    "modal",
    "multimodal",
    "modality",
    "projector",
    "aligner",
    "connector",
    "tower",
    "diffusion",
    "mm",
];

/// Endings of segments whose parameters are kept. Biases of experts are matrices.
const KEPT_ENDINGS: [&str; 3] = ["norm", "_bias", "_embeddings"];

/// Last segments of names that are quantised, besides those that end in `_proj`.
const QUANTIZED_SEGMENTS: [&str; 33] = [
    "in_proj_qkv",
    "in_proj_qkvz",
    "in_proj_z",
    "kv_a_proj_with_mqa",
    "wq",
    "wk",
    "wv",
    "wqkv",
    "Wqkv",
    "wq_a",
    "wq_b",
    "wkv",
    "wkv_a_with_mqa",
    "wkv_b",
    "wo_a",
    "wo_b",
    "w1",
    "w2",
    "w3",
    "out_proj",
    "output_gate",
    "query_key_value",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "fc1",
    "fc2",
    "fc_in",
    "fc_out",
    "c_fc_0",
    "c_fc_1",
    "linear_gate",
    "attn_out",
    "qkv_proj",
];

/// Modules right under which stacks of experts are stored.
const MOE: [&str; 2] = ["moe", "block_sparse_moe"];

/// What a name says about a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind<'a> {
    /// This segment is never quantised.
    Kept(&'a str),
    /// It is a projection.
    Projection,
    /// Nothing is known.
    Unknown,
}

/// The layer that a parameter belongs to: its name without a last segment `weight`, and without
/// `base_layer`, which PEFT puts around the layers that have an adapter. Experts fused into one
/// tensor are parameters without `weight`.
pub(crate) fn module(name: &str) -> &str {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    module.strip_suffix(".base_layer").unwrap_or(module)
}

/// The last segment that says what a layer is: a `linear` within `q_proj` is the projection.
pub(crate) fn part(name: &str) -> &str {
    split_last(unwrapped(name)).1
}

/// The module whose child the layer is.
pub(crate) fn parent(name: &str) -> &str {
    split_last(unwrapped(name)).0
}

fn unwrapped(name: &str) -> &str {
    let module = module(name);
    match module.strip_suffix(".linear") {
        Some(inner) if split_last(inner).1.ends_with("_proj") => inner,
        _ => module,
    }
}

/// The name of the module of all experts that a parameter belongs to, as receivers call it.
pub(crate) fn experts_of(name: &str, shape: &[usize]) -> Option<String> {
    let module = module(name);
    let mut end = 0;
    for segment in module.split('.') {
        end += segment.len();
        if segment == "experts" && end < module.len() {
            return Some(module[..end].to_owned());
        }
        end += 1;
    }
    is_moe_stack(name, shape).then(|| join(parent(name), "experts"))
}

/// Modules that vLLM looks up in the list of ignored layers under another name than the checkpoint's: it
/// builds the state space mixers of Falcon-H1, Granite 4, Jamba and Zamba 2 as `mixer`, and MiniMax M2's
/// experts below `mlp`. Where only the checkpoint's name is listed it makes an FP8 layer, and casts into it
/// what is not FP8, without a scale and without an error.
const ALIASES: [(&str, &str); 2] = [("mamba", "mixer"), ("block_sparse_moe", "mlp")];

/// The name that a receiver may look a layer up by instead of the checkpoint's, if there is one.
pub(crate) fn alias(layer: &str) -> Option<String> {
    ALIASES.iter().find_map(|(own, other)| {
        let mut segments: Vec<&str> = layer.split('.').collect();
        let at = segments.iter().rposition(|segment| segment == own)?;
        segments[at] = other;
        Some(segments.join("."))
    })
}

/// The state space mixer of a layer that has attention beside it: the model, the layer and the rest of the
/// name, of `model.layers.3.mamba.in_proj`.
pub(crate) fn parallel_mixer(layer: &str) -> Option<(&str, usize, &str)> {
    let (model, rest) = layer.split_once(".layers.")?;
    let (number, rest) = rest.split_once('.')?;
    Some((model, number.parse().ok()?, rest.strip_prefix("mamba.")?))
}

/// Whether a parameter is a stack of experts right under `moe` or `block_sparse_moe`.
pub(crate) fn is_moe_stack(name: &str, shape: &[usize]) -> bool {
    shape.len() == 3 && MOE.contains(&split_last(parent(name)).1)
}

/// What the name says, with the shape where a name alone means two things.
pub(crate) fn kind<'a>(name: &'a str, shape: &[usize]) -> Kind<'a> {
    let mut segments = module(name).split('.');
    if let Some(segment) = segments.find(|segment| is_kept(segment)) {
        return Kind::Kept(segment);
    }
    let (above, last) = (split_last(parent(name)).1, part(name));
    // Right under the model, `output` is the head and `shared` the embedding.
    let at_the_top = parent(name).is_empty() && matches!(last, "output" | "shared");
    if at_the_top || is_mtp_entry(name, last) {
        return Kind::Kept(last);
    }
    let wide_or_tall = || match *shape {
        [rows, cols] => rows.cmp(&cols),
        _ => std::cmp::Ordering::Equal,
    };
    let projection = match last {
        // The layers of GPT-2 have the same names and are stored transposed.
        "c_fc" | "c_attn" => wide_or_tall().is_gt(),
        "c_proj" => wide_or_tall().is_lt(),
        // An encoder's `dense` is below `output` or `intermediate`, T5's `wo` in a feed-forward layer.
        "dense" | "wo" => matches!(above, "attention" | "self_attention" | "self_attn" | "attn"),
        // Right under the model it is the head.
        "ff_out" => above == "mlp",
        "input_linear" | "output_linear" => is_moe_stack(name, shape),
        last => is_projection(last),
    };
    if projection { Kind::Projection } else { Kind::Unknown }
}

/// Whether a last segment is that of a projection, wherever it is.
pub(crate) fn is_projection(last: &str) -> bool {
    last.ends_with("_proj") || QUANTIZED_SEGMENTS.contains(&last)
}

fn is_kept(segment: &str) -> bool {
    KEPT_SEGMENTS.contains(&segment)
        || KEPT_ENDINGS.iter().any(|ending| segment.ends_with(ending))
        || segment.split('_').any(|word| KEPT_WORDS.contains(&word))
}

/// The projection that joins the last hidden state with the next token, before a layer that predicts
/// further tokens: receivers make it without a quantisation config.
fn is_mtp_entry(name: &str, last: &str) -> bool {
    matches!(last, "input_proj" | "fc") && module(name).split('.').any(|s| s.starts_with("mtp"))
}

/// The parts that receivers fuse to what some checkpoints have as one already.
pub(crate) fn packed_parts(last: &str) -> &'static [&'static str] {
    match last {
        "qkv_proj" => &["q_proj", "k_proj", "v_proj"],
        "gate_up_proj" => &["gate_proj", "up_proj"],
        _ => &[],
    }
}

pub(crate) fn split_last(name: &str) -> (&str, &str) {
    name.rsplit_once('.').unwrap_or(("", name))
}

pub(crate) fn join(parent: &str, last: &str) -> String {
    if parent.is_empty() { last.to_owned() } else { format!("{parent}.{last}") }
}
