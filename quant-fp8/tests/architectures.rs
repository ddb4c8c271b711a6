//! What the rules make of 220 families of models, judged by what the receivers themselves check.
//!
//! `data/architectures.tsv` has the names and shapes that transformers' classes have by default (and some
//! published sizes), each shape of a family once, and which of them transformers' own FP8 would take. The
//! checks below are written from the receivers' sources and share no code with the rules.
//!
//! `CKPT_ENGINE_WRITE_GOLDEN=1 cargo test -p checkpoint-engine-fp8 --test architectures` writes `data/shares.tsv` anew.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Write as _;

use quant_fp8::rules::{Decision, QuantPlan, Receiver, RulesConfig, Stored};

const RECEIVERS: [Receiver; 4] =
    [Receiver::Common, Receiver::Vllm, Receiver::Sglang, Receiver::Transformers];

struct Parameter {
    name: String,
    shape: Vec<usize>,
    /// Whether transformers would quantise it: a hint, not the truth.
    hint: bool,
}

impl Parameter {
    fn elements(&self) -> u64 {
        self.shape.iter().map(|&side| side as u64).product()
    }

    fn module(&self) -> &str {
        self.name.strip_suffix(".weight").unwrap_or(&self.name)
    }

    fn parent(&self) -> &str {
        self.module().rsplit_once('.').map_or("", |(parent, _)| parent)
    }

    fn last(&self) -> &str {
        self.module().rsplit('.').next().unwrap_or_default()
    }

    /// The module of all experts: what a receiver makes one layer of.
    fn experts(&self) -> Option<String> {
        let (module, _) = format!("{}.", self.name)
            .split_once(".experts.")
            .map(|(before, after)| (format!("{before}.experts"), after.to_owned()))?;
        Some(module)
    }
}

struct Family {
    name: String,
    parameters: Vec<Parameter>,
}

fn families() -> Vec<Family> {
    let mut families: Vec<Family> = Vec::new();
    for line in include_str!("data/architectures.tsv").lines().filter(|line| !line.starts_with('#'))
    {
        if let Some(name) = line.strip_prefix("= ") {
            families.push(Family { name: name.to_owned(), parameters: Vec::new() });
            continue;
        }
        let columns: Vec<&str> = line.split('\t').collect();
        let shape = columns[1].split('x').map(|side| side.parse().unwrap()).collect();
        let hint = columns.get(2) == Some(&"fp8");
        let parameter = Parameter { name: columns[0].to_owned(), shape, hint };
        families.last_mut().unwrap().parameters.push(parameter);
    }
    assert_eq!(families.len(), 220);
    families
}

fn plan(family: &Family, receiver: Receiver) -> QuantPlan {
    let parameters = family.parameters.iter().map(|p| (&*p.name, p.shape.clone(), Stored::Float));
    let mut config = RulesConfig::default();
    config.receiver = receiver;
    QuantPlan::resolve(parameters, &config)
        .unwrap_or_else(|error| panic!("{} for {receiver}: {error}", family.name))
}

/// Every family with its plan for each receiver, and which parameters are quantised.
fn each(mut check: impl FnMut(&Family, Receiver, &QuantPlan, &dyn Fn(&Parameter) -> bool)) {
    for family in families() {
        for receiver in RECEIVERS {
            let plan = plan(&family, receiver);
            let quantized =
                |p: &Parameter| plan.get(&p.name).unwrap().decision == Decision::Quantize;
            check(&family, receiver, &plan, &quantized);
        }
    }
}

/// Activations are quantised in groups of 128 columns: an assertion in both engines' kernels, and in
/// transformers the grid of scales has to divide the weight in both directions.
#[test]
fn what_is_quantised_has_whole_blocks_where_the_receiver_checks_them() {
    each(|family, receiver, _, quantized| {
        for p in family.parameters.iter().filter(|p| quantized(p)) {
            let [.., rows, cols] = p.shape[..] else { panic!("{}", p.name) };
            assert!(cols % 128 == 0, "{} for {receiver}: {} {:?}", family.name, p.name, p.shape);
            let rows_too = receiver == Receiver::Transformers;
            assert!(!rows_too || rows % 128 == 0, "{}: {} {:?}", family.name, p.name, p.shape);
        }
    });
}

/// What the models of vLLM 0.33 and SGLang 0.5 say in `packed_modules_mapping`, and which of them only
/// vLLM fuses when weights are FP8. Only families that have all parts of `needs` have the layer.
const PACKED: [(&str, &[&str], &[&str], bool); 17] = [
    ("qkv_proj", &["q_proj", "k_proj", "v_proj"], &["k_proj"], false),
    ("merged_qkv", &["wq", "wk", "wv"], &["wk", "wv"], false),
    ("gate_up_proj", &["gate_proj", "up_proj"], &["gate_proj", "up_proj"], false),
    ("gate_up_proj", &["w1", "w3"], &["w1", "w3"], false),
    ("gate_up_proj", &["c_fc_0", "c_fc_1"], &["c_fc_0"], false),
    ("fused_qkv_a_proj", &["q_a_proj", "kv_a_proj_with_mqa"], &["q_a_proj"], false),
    ("fused_wqa_wkv", &["wq_a", "wkv"], &["wq_a", "wkv"], false),
    ("in_proj_qkvz", &["in_proj_qkv", "in_proj_z"], &["in_proj_qkv"], false),
    ("in_proj_ba", &["in_proj_b", "in_proj_a"], &["in_proj_b"], false),
    ("w13", &["w1", "w3"], &["w1", "w3"], false),
    ("index_qkv_proj", &["index_q_proj", "index_k_proj"], &["index_q_proj"], false),
    ("qkvr", &["wq_du", "wk_dv", "wv_dv", "wr_du"], &["wr_du"], false),
    ("kv_proj", &["k_proj", "v_proj"], &["k_proj"], false),
    ("qkvb_proj", &["q_proj", "k_proj", "v_proj", "b_proj"], &["b_proj", "q_proj"], true),
    (
        "in_proj_qkvgfab",
        &["q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj"],
        &["f_a_proj", "b_proj", "q_proj"],
        true,
    ),
    (
        "in_proj_qkvg",
        &["q_proj", "k_proj", "v_proj", "g_proj"],
        &["g_proj", "b_proj", "q_proj"],
        true,
    ),
    ("merged_gate_up", &["linear_gate", "up_proj"], &["linear_gate", "up_proj"], false),
];

/// The parts of every fused layer of a family.
fn fused(
    family: &Family,
    receiver: Receiver,
) -> impl Iterator<Item = (String, Vec<&Parameter>, &'static [&'static str])> {
    let mut by_parent: BTreeMap<&str, HashMap<&str, &Parameter>> = BTreeMap::new();
    for p in family.parameters.iter().filter(|p| p.shape.len() == 2) {
        by_parent.entry(p.parent()).or_default().insert(p.last(), p);
    }
    by_parent.into_iter().flat_map(move |(parent, of)| {
        let layers = PACKED.iter().filter(move |(.., only_vllm)| match receiver {
            Receiver::Transformers => false,
            Receiver::Sglang => !only_vllm,
            _ => true,
        });
        layers
            .filter_map(|(layer, parts, needs, _)| {
                let there: Vec<&Parameter> =
                    parts.iter().filter_map(|part| of.get(part).copied()).collect();
                let whole = needs.iter().all(|part| of.contains_key(part)) && there.len() > 1;
                whole.then(|| (format!("{parent}.{layer}"), there, *parts))
            })
            .collect::<Vec<_>>()
    })
}

#[test]
fn no_fused_layer_is_quantised_in_part_or_cuts_through_blocks() {
    let mut layers = 0;
    each(|family, receiver, _, quantized| {
        for (layer, parts, _) in fused(family, receiver) {
            let fp8 = parts.iter().filter(|p| quantized(p)).count();
            let place = format!("{layer} of {} for {receiver}", family.name);
            assert!(fp8 == 0 || fp8 == parts.len(), "{place} is quantised in part");
            // vLLM lets the last one pass, SGLang does not.
            let last_passes = receiver == Receiver::Vllm || layer.ends_with("fused_qkv_a_proj");
            let checked = parts.len() - usize::from(last_passes);
            // SGLang makes the inputs of MLA as one partition.
            for p in parts.iter().take(checked).filter(|_| fp8 > 0) {
                assert!(p.shape[0] % 128 == 0, "{place}: {} {:?}", p.name, p.shape);
            }
            layers += usize::from(fp8 > 0);
        }
        // Layers that are one in the checkpoint and several partitions in the receiver.
        for p in family.parameters.iter().filter(|p| quantized(p) && p.shape.len() == 2) {
            if p.last() == "gate_up_proj" && receiver != Receiver::Transformers {
                assert!(p.shape[0] % 256 == 0, "{} {:?}", p.name, p.shape);
            }
        }
    });
    assert!(layers > 1000, "only {layers} fused layers were looked at");
}

/// `validate_fp8_block_shape_moe` of vLLM and the same check in SGLang; all experts are one layer.
#[test]
fn the_experts_of_a_layer_are_quantised_all_or_none_and_in_whole_blocks() {
    each(|family, receiver, _, quantized| {
        let mut layers: BTreeMap<String, Vec<&Parameter>> = BTreeMap::new();
        let projections =
            ["gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "fc1", "fc2"];
        let stacks = ["input_linear", "output_linear"];
        for p in &family.parameters {
            let stack = p.shape.len() == 3
                && (p.parent().ends_with(".moe") || p.parent().ends_with(".block_sparse_moe"));
            let known = projections.contains(&p.last()) || stack && stacks.contains(&p.last());
            let experts = p.experts().or_else(|| stack.then(|| p.parent().to_owned()));
            if let Some(experts) = experts.filter(|_| known && p.shape.len() >= 2) {
                layers.entry(experts).or_default().push(p);
            }
        }
        for (layer, matrices) in layers {
            let fp8 = matrices.iter().filter(|p| quantized(p)).count();
            let place = format!("{layer} of {} for {receiver}", family.name);
            assert!(fp8 == 0 || fp8 == matrices.len(), "{place} is quantised in part");
            for p in matrices.iter().filter(|_| fp8 > 0) {
                let [.., rows, cols] = p.shape[..] else { panic!("{}", p.name) };
                assert!(rows % 128 == 0 && cols % 128 == 0, "{place}: {} {:?}", p.name, p.shape);
            }
            let side = |last: &str| {
                let stack = matrices.iter().find(|p| p.last() == last && p.shape.len() == 3);
                stack.map(|p| (p.shape[1], p.shape[2]))
            };
            if let (Some(up), Some(down), true) = (side("gate_up_proj"), side("down_proj"), fp8 > 0)
            {
                // [experts, out, in], or for vLLM's Llama 4 [experts, in, out].
                let inner = if up == (2 * down.1, down.0) { down.1 } else { down.0 };
                let stored_transposed = up != (2 * down.1, down.0);
                assert!(receiver == Receiver::Vllm || !stored_transposed, "{place} is transposed");
                assert!(inner % 128 == 0, "{place}: {inner}");
            }
        }
    });
}

/// Mamba-1 mixers have no quantisation config in vLLM and SGLang; the parts of Mamba-2's input
/// projection are partitions.
#[test]
fn mixers_of_state_space_models_are_quantised_only_where_receivers_can() {
    each(|family, receiver, _, quantized| {
        if receiver == Receiver::Transformers {
            return;
        }
        let find = |parent: &str, last: &str| {
            family.parameters.iter().find(|p| p.parent() == parent && p.last() == last)
        };
        for p in family.parameters.iter().filter(|p| p.last() == "in_proj" && quantized(p)) {
            let parent = p.parent();
            for last in ["x_proj", "x_proj_weight", "dt_proj", "dt_proj_weight"] {
                assert!(find(parent, last).is_none(), "{}: {}", family.name, p.name);
            }
            if let (Some(heads), Some(out)) = (find(parent, "A_log"), find(parent, "out_proj")) {
                let (heads, inner) = (heads.shape[0], out.shape[1]);
                let states = p.shape[0] - 2 * inner - heads;
                let parts = [inner, states / 2, heads];
                let whole = parts.iter().all(|part| part % 128 == 0);
                assert!(whole, "{} for {receiver}: {parts:?}", family.name);
            }
        }
    });
}

/// Substrings of what is no layer of a language model. The rules compare words and segments instead.
const NOT_LANGUAGE: [&str; 48] = [
    "embed",
    "lm_head",
    "router",
    "norm",
    "vision",
    "visual",
    "image",
    "img",
    "video",
    "audio",
    "speech",
    "sound",
    "acoustic",
    "semantic",
    "vit.",
    "vit_",
    "vpm",
    "resampler",
    "perceiver",
    "perception",
    "talker",
    "codec",
    "token2wav",
    "code2wav",
    "projector",
    "aligner",
    "connector",
    "qformer",
    "sam_",
    "protein",
    "ctc_",
    "tokenizer",
    "tower",
    "merger",
    "mlp1",
    "mlp_AR",
    "conv1d",
    "lora_",
    "shared_head",
    "eh_proj",
    "wpe",
    "wte",
    "pooler",
    "predictions",
    "classifier",
    "codebook",
    "diarization",
    "patch_",
];

#[test]
fn no_tower_router_embedding_or_head_is_touched() {
    // Where the layers of language models are.
    let roots = [
        "model",
        "language_model",
        "transformer",
        "backbone",
        "llm",
        "thinker",
        "text_model",
        "layers",
        "gpt_neox",
        "gpt_neox_japanese",
        "biogpt",
        "prophetnet",
        "paligemma_with_expert",
    ];
    each(|family, receiver, _, quantized| {
        for p in family.parameters.iter().filter(|p| quantized(p)) {
            let place = format!("{} of {} for {receiver}", p.name, family.name);
            if let Some(part) = NOT_LANGUAGE.iter().find(|part| p.name.contains(**part)) {
                panic!("{place} has {part}");
            }
            let gate = p.module().split('.').any(|segment| segment == "gate" || segment == "head");
            assert!(!gate, "{place}");
            let root = p.name.split('.').next().unwrap();
            assert!(roots.contains(&root), "{place}: {root} is no language model that is known");
        }
    });
}

/// vLLM's `is_layer_skipped`.
fn skipped_by_vllm(prefix: &str, parts: &[&str], ignored: &HashSet<&str>) -> Result<bool, ()> {
    let (parent, _) = prefix.rsplit_once('.').unwrap();
    if !parts.is_empty() {
        if ignored.contains(prefix) {
            return Ok(true);
        }
        let all: BTreeSet<bool> =
            parts.iter().map(|part| ignored.contains(&*format!("{parent}.{part}"))).collect();
        return if all.len() == 1 { Ok(all.contains(&true)) } else { Err(()) };
    }
    if prefix.contains("experts") {
        let experts = ignored.iter().filter(|name| name.contains("experts"));
        return Ok(experts.into_iter().any(|name| name.contains(prefix)));
    }
    Ok(ignored.contains(prefix))
}

/// SGLang's `is_layer_skipped`.
fn skipped_by_sglang(prefix: &str, parts: &[&str], ignored: &HashSet<&str>) -> Result<bool, ()> {
    let (parent, _) = prefix.rsplit_once('.').unwrap();
    let matches = |prefix: &str| {
        let padded = format!(".{prefix}.");
        ignored.iter().any(|name| padded.contains(&format!(".{name}.")))
    };
    if !parts.is_empty() {
        let all: BTreeSet<bool> =
            parts.iter().map(|part| matches(&format!("{parent}.{part}"))).collect();
        return if all.len() == 1 { Ok(all.contains(&true)) } else { Err(()) };
    }
    let inside = |name: &&&str| name.contains("experts") && name.contains(prefix);
    Ok(matches(prefix) || prefix.contains("experts") && ignored.iter().any(|n| inside(&n)))
}

#[test]
fn receivers_find_in_the_list_of_layers_exactly_what_was_kept() {
    let mut asked = 0;
    each(|family, receiver, plan, quantized| {
        let config = plan.quantization_config().unwrap();
        let list = config["modules_to_not_convert"].as_array().unwrap();
        let ignored: HashSet<&str> = list.iter().map(|name| name.as_str().unwrap()).collect();
        let mut questions: Vec<(String, Vec<&str>, bool)> = Vec::new();
        for (layer, parts, _) in fused(family, receiver) {
            // What fused layers are within experts is asked about below, all of them at once.
            if parts[0].experts().is_none() {
                let names = parts.iter().map(|p| p.last()).collect();
                questions.push((layer, names, quantized(parts[0])));
            }
        }
        for p in family.parameters.iter().filter(|p| p.name.ends_with("_proj.weight")) {
            if p.shape.len() == 2 && p.experts().is_none() {
                questions.push((p.module().to_owned(), vec![], quantized(p)));
            }
        }
        for p in family.parameters.iter().filter(|p| p.shape.len() >= 2) {
            let last = p.last();
            let stack = p.shape.len() == 3
                && (p.parent().ends_with(".moe") || p.parent().ends_with(".block_sparse_moe"));
            let matrix = last.ends_with("_proj") || ["w1", "w2", "w3"].contains(&last);
            if let Some(experts) = p.experts().filter(|_| matrix) {
                questions.push((experts, vec![], quantized(p)));
            } else if stack {
                questions.push((format!("{}.experts", p.parent()), vec![], quantized(p)));
            }
        }
        for (layer, parts, fp8) in questions.into_iter().filter(|(layer, ..)| layer.contains('.')) {
            asked += 1;
            let place = format!("{layer} of {} for {receiver}", family.name);
            let answer = skipped_by_vllm(&layer, &parts, &ignored);
            assert_eq!(answer, Ok(!fp8), "vLLM, {place}");
            // It has these two without being told.
            let parts = match layer.rsplit('.').next().unwrap() {
                "qkv_proj" => vec!["q_proj", "k_proj", "v_proj"],
                "gate_up_proj" if parts.is_empty() => vec!["gate_proj", "up_proj"],
                _ => parts,
            };
            let answer = skipped_by_sglang(&layer, &parts, &ignored);
            assert_eq!(answer, Ok(!fp8), "SGLang, {place}");
        }
    });
    assert!(asked > 5000, "only {asked}");
}

/// Why more than a tenth of what transformers would quantise stays, where it is not the shape that
/// decides (`unaligned`, `layer`) or the receiver (`receiver`).
fn reason(family: &str) -> Option<&'static str> {
    let encoders = [
        "bert",
        "bert-generation",
        "big_bird",
        "blip",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "evolla",
        "git",
        "megatron-bert",
        "rembert",
        "roberta",
        "roc_bert",
        "roformer",
        "vision-encoder-decoder",
        "xlm-roberta",
        "xlm-roberta-xl",
    ];
    let short = family.split_once('.').map_or(family, |(name, _)| name);
    Some(match short {
        name if encoders.contains(&name) => {
            "encoders with query, key, value: no rollout generates from them"
        }
        "udop" | "pix2struct" => "T5's and BERT's layers: no rollout generates from them",
        "prophetnet" => "feed_forward.intermediate and output: neither receiver has the model",
        "xlnet" | "xlstm" => "neither receiver has the model",
        "inkling2" | "inkling2_loop" | "inkling2_loop_text" | "inkling2_text"
        | "inkling_mm_model" => {
            "w13_weight and w2_weight: receivers expect scales of another scheme"
        }
        "recurrent_gemma" => "linear_x, linear_y: neither receiver has the model",
        "cosmos3_edge" | "cosmos3_omni" => "to_q, to_k, to_v: a generator of video",
        "pp_formulanet" => "lin1, lin2, qkv: its encoder sees images",
        "zamba2" | "zamba" => "linear: a layer of its own kind",
        _ => return None,
    })
}

#[test]
fn the_share_that_stays_unquantised_is_the_one_that_is_written_down() {
    let mut table = String::from(
        "# Of the elements that transformers would quantise in the language model: how many per mille stay as \
         they are,\n# for each receiver, and by which rules for the first. Each shape of a family counts once, \
         not by its layers.\n# family\tcommon\tvllm\tsglang\ttransformers\trules\treason\n",
    );
    for family in families() {
        let mut columns = Vec::new();
        let mut rules: BTreeMap<&str, u64> = BTreeMap::new();
        for receiver in RECEIVERS {
            let plan = plan(&family, receiver);
            let (mut all, mut kept) = (0, 0);
            for p in &family.parameters {
                let tower = NOT_LANGUAGE.iter().any(|part| p.name.contains(part));
                if !p.hint || tower {
                    continue;
                }
                all += p.elements();
                let entry = plan.get(&p.name).unwrap();
                if entry.decision == Decision::Keep {
                    kept += p.elements();
                    if receiver == Receiver::Common {
                        *rules.entry(entry.rule.id()).or_default() += p.elements();
                    }
                }
            }
            columns.push((kept * 1000).checked_div(all).unwrap_or(0));
        }
        let words: Vec<&str> = rules.keys().copied().collect();
        let reason = reason(&family.name);
        let by_shape = words.iter().any(|rule| ["unaligned", "layer", "receiver"].contains(rule));
        assert!(
            columns[0] <= 100 || by_shape || reason.is_some(),
            "{}: {} per mille are kept by {words:?} without a reason",
            family.name,
            columns[0]
        );
        let columns: Vec<String> = columns.iter().map(u64::to_string).collect();
        let (columns, words) = (columns.join("\t"), words.join(" "));
        writeln!(table, "{}\t{columns}\t{words}\t{}", family.name, reason.unwrap_or("")).unwrap();
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/shares.tsv");
    if std::env::var_os("CKPT_ENGINE_WRITE_GOLDEN").is_some() {
        std::fs::write(path, &table).unwrap();
    }
    let golden = std::fs::read_to_string(path).unwrap_or_default();
    for (line, (now, then)) in (1..).zip(table.lines().zip(golden.lines())) {
        assert_eq!(now, then, "line {line}; CKPT_ENGINE_WRITE_GOLDEN=1 writes the table anew");
    }
    assert_eq!(table.lines().count(), golden.lines().count());
}
