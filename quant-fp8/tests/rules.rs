//! Which parameters are quantised, and how the decision is written down.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use quant_fp8::rules::{
    Decision, Declared, Manifest, QuantPlan, Receiver, Rules, RulesConfig, Stored,
    parse_ignored_layers, weight_of_scale,
};
use quant_fp8::{Fp8Format, Granularity, Mode, QuantError, ScaleName};
use serde_json::json;

type Parameter = (String, Vec<usize>, Stored);

fn float(name: &str, shape: &[usize]) -> Parameter {
    (name.to_owned(), shape.to_vec(), Stored::Float)
}

fn matrix(name: &str) -> Parameter {
    float(name, &[1024, 1024])
}

fn fp8(name: &str) -> Parameter {
    (name.to_owned(), vec![1024, 1024], Stored::Fp8)
}

fn ignoring(entries: &[&str]) -> RulesConfig {
    let ignored_layers = entries.iter().map(|&entry| entry.to_owned()).collect();
    let mut rules = RulesConfig::default();
    rules.ignored_layers = ignored_layers;
    rules
}

fn decide(config: &RulesConfig, (name, shape, stored): &Parameter) -> String {
    let (decision, rule) = Rules::new(config).unwrap().decide(name, shape, *stored).unwrap();
    format!("{decision} {}", rule.id())
}

#[test]
fn all_58_labelled_names_are_decided_as_expected() {
    let table = include_str!("data/layer-names.tsv");
    let rules = Rules::new(&RulesConfig::default()).unwrap();
    let mut names = 0;
    for line in table.lines().filter(|line| !line.starts_with('#')) {
        let [_, name, shape, expected, ..] = line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        let shape: Vec<usize> = shape.split('x').map(|side| side.parse().unwrap()).collect();
        let (decision, rule) = rules.decide(name, &shape, Stored::Float).unwrap();
        assert_eq!(decision.to_string(), expected, "{name}: {rule}");
        names += 1;
    }
    assert_eq!(names, 58);
}

#[test]
fn segments_count_as_wholes_and_never_as_substrings() {
    let config = RulesConfig::default();
    assert_eq!(decide(&config, &matrix("a.mlp.gate.weight")), "keep kept-segment");
    assert_eq!(decide(&config, &matrix("a.mlp.gate_proj.weight")), "quantize quantized-segment");
    assert_eq!(decide(&config, &matrix("a.visually.q_proj.weight")), "quantize quantized-segment");
    assert_eq!(decide(&config, &matrix("a.qk_norm.q_proj.weight")), "keep kept-segment");
    let config = ignoring(&["layers.1"]);
    assert_eq!(decide(&config, &matrix("model.layers.1.o_proj.weight")), "keep ignored");
    assert_eq!(
        decide(&config, &matrix("model.layers.11.o_proj.weight")),
        "quantize quantized-segment"
    );
    assert_eq!(
        decide(&config, &matrix("model.my_layers.1.o_proj.weight")),
        "quantize quantized-segment"
    );
}

#[test]
fn biases_of_experts_are_kept_even_when_they_are_large_matrices() {
    let name = "model.layers.0.mlp.experts.gate_up_proj_bias";
    assert_eq!(decide(&RulesConfig::default(), &float(name, &[128, 5760])), "keep kept-segment");
}

#[test]
fn stacked_matrices_are_quantised_only_for_experts() {
    let config = RulesConfig::default();
    let shape = &[8, 256, 256];
    assert_eq!(decide(&config, &float("m.experts.down_proj", shape)), "quantize quantized-segment");
    assert_eq!(decide(&config, &float("m.mixer.down_proj", shape)), "keep not-a-matrix");
}

#[test]
fn a_side_of_127_is_kept_and_128_is_quantised() {
    let config = RulesConfig::default();
    assert_eq!(decide(&config, &float("a.o_proj.weight", &[127, 4096])), "keep narrow");
    assert_eq!(decide(&config, &float("a.o_proj.weight", &[4096, 127])), "keep narrow");
    assert_eq!(
        decide(&config, &float("a.o_proj.weight", &[128, 128])),
        "quantize quantized-segment"
    );
}

#[test]
fn packed_integers_are_never_touched() {
    let packed = ("a.o_proj.weight".to_owned(), vec![1024, 1024], Stored::Other);
    assert_eq!(decide(&RulesConfig::default(), &packed), "keep not-float");
}

#[test]
fn ignored_layers_come_from_lists_patterns_and_the_checkpoint_alike() {
    let name = matrix("model.layers.3.self_attn.o_proj.weight");
    for entry in [
        "o_proj",
        "model.layers.3",
        "model.layers.3.self_attn.o_proj",
        "model.layers.3.self_attn.o_proj.weight",
        "re:.*\\.self_attn\\..*",
        "re:model\\.layers\\.[0-3]\\.",
    ] {
        assert_eq!(decide(&ignoring(&[entry]), &name), "keep ignored", "{entry}");
        let mut config = RulesConfig::default();
        config.modules_to_not_convert = vec![entry.to_owned()];
        assert_eq!(decide(&config, &name), "keep ignored", "{entry}");
        for key in ["ignored_layers", "modules_to_not_convert", "ignore"] {
            let own = json!({"quant_method": "fp8", key: [entry]});
            let mut config = RulesConfig::default();
            config.quantization_config = Some(own);
            assert_eq!(decide(&config, &name), "keep ignored", "{key} {entry}");
        }
    }
    for entry in ["self_attn.q_proj", "o_pro", "re:self_attn", "3.o_proj"] {
        assert_eq!(decide(&ignoring(&[entry]), &name), "quantize quantized-segment", "{entry}");
    }
}

#[test]
fn a_fused_layer_in_the_list_stands_for_its_parts() {
    let config = ignoring(&["a.qkv_proj", "gate_up_proj"]);
    for part in ["a.q_proj", "a.k_proj", "a.v_proj", "a.qkv_proj", "b.gate_proj", "b.up_proj"] {
        assert_eq!(decide(&config, &matrix(&format!("{part}.weight"))), "keep ignored");
    }
    assert_eq!(decide(&config, &matrix("b.q_proj.weight")), "quantize quantized-segment");
}

#[test]
fn a_list_from_the_environment_is_split_at_commas() {
    assert_eq!(parse_ignored_layers(" a.b, lm_head ,,re:x.*"), ["a.b", "lm_head", "re:x.*"]);
    assert!(parse_ignored_layers("").is_empty());
}

#[test]
fn a_pattern_that_does_not_parse_is_named() {
    let error = Rules::new(&ignoring(&["re:("])).unwrap_err();
    assert!(matches!(&error, QuantError::Pattern { entry, .. } if entry == "re:("), "{error}");
}

#[test]
fn a_checkpoint_that_is_quantised_otherwise_is_an_error() {
    let with = |own| {
        let mut rules = RulesConfig::default();
        rules.quantization_config = Some(own);
        rules
    };
    for own in [
        json!({"quant_method": "awq"}),
        json!({"quant_method": "fp8", "weight_block_size": [64, 128]}),
        json!({"quant_method": "fp8", "ignored_layers": "lm_head"}),
        json!(["fp8"]),
    ] {
        let error = Rules::new(&with(own.clone())).unwrap_err();
        assert!(matches!(error, QuantError::Config { .. }), "{own}: {error}");
    }
    let same = json!({"quant_method": "fp8", "weight_block_size": [128, 128], "ignore": null});
    Rules::new(&with(same)).unwrap();
}

#[test]
fn what_is_fp8_already_passes_with_its_scale() {
    for scale in ["a.o_proj.weight_scale_inv", "a.o_proj.weight_scale"] {
        let plan = QuantPlan::resolve(
            [fp8("a.o_proj.weight"), float(scale, &[8, 8])],
            &ignoring(&["o_proj"]),
        )
        .unwrap();
        let decisions: Vec<_> = plan.entries().iter().map(|e| (e.decision, e.rule.id())).collect();
        assert_eq!(decisions, [(Decision::Pass, "already-fp8"), (Decision::Pass, "is-scale")]);
    }
}

#[test]
fn a_weight_whose_scale_comes_along_passes_whatever_its_type() {
    let plan = QuantPlan::resolve(
        [matrix("a.o_proj.weight_scale_inv"), matrix("a.o_proj.weight")],
        &RulesConfig::default(),
    )
    .unwrap();
    let entry = plan.get("a.o_proj.weight").unwrap();
    assert_eq!((entry.decision, entry.rule.id()), (Decision::Pass, "has-scale"));
}

#[test]
fn parameters_that_are_merely_named_after_scales_are_not_scales() {
    assert_eq!(weight_of_scale("model.logit_scale"), None);
    assert_eq!(weight_of_scale("a.self_attn.k_scale"), None);
    assert_eq!(weight_of_scale("a.weight_scale"), Some("a.weight"));
    assert_eq!(weight_of_scale("m.experts.down_proj_scale_inv"), Some("m.experts.down_proj"));
}

#[test]
fn halves_without_their_other_half_are_named() {
    let error = QuantPlan::resolve([fp8("a.o_proj.weight")], &RulesConfig::default()).unwrap_err();
    assert!(
        matches!(&error, QuantError::MissingScale { tensor } if tensor == "a.o_proj.weight"),
        "{error}"
    );
    let scale = float("a.o_proj.weight_scale_inv", &[8, 8]);
    let error = QuantPlan::resolve([scale], &RulesConfig::default()).unwrap_err();
    assert!(
        matches!(&error, QuantError::MissingWeight { tensor }
            if tensor == "a.o_proj.weight_scale_inv"),
        "{error}"
    );
}

#[test]
fn parts_of_a_fused_layer_that_disagree_are_both_named() {
    for (ignored, first, second) in
        [("a.k_proj", "a.q_proj", "a.k_proj"), ("a.up_proj", "a.gate_proj", "a.up_proj")]
    {
        let parameters = [matrix(&format!("{first}.weight")), matrix(&format!("{second}.weight"))];
        QuantPlan::resolve(parameters.clone(), &RulesConfig::default()).unwrap();
        QuantPlan::resolve(parameters.clone(), &ignoring(&["a"])).unwrap();
        let error = QuantPlan::resolve(parameters, &ignoring(&[ignored])).unwrap_err();
        let QuantError::FusedPartsDisagree { first: one, second: other, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!([one, other], [&format!("{first}.weight"), &format!("{second}.weight")]);
    }
}

#[test]
fn fused_parts_of_different_layers_may_differ_and_their_biases_do_not_count() {
    let parameters = [
        matrix("a.q_proj.weight"),
        float("a.q_proj.bias", &[1024]),
        float("a.k_proj.bias", &[1024]),
        matrix("a.k_proj.weight"),
        matrix("b.k_proj.weight"),
    ];
    QuantPlan::resolve(parameters, &ignoring(&["b"])).unwrap();
}

#[test]
fn unknown_matrices_are_kept_and_listed_and_strict_mode_refuses_them() {
    let parameters = [matrix("a.mystery.weight"), matrix("a.o_proj.weight")];
    let plan = QuantPlan::resolve(parameters.clone(), &RulesConfig::default()).unwrap();
    let unlisted: Vec<_> = plan.unlisted().map(|entry| entry.name.as_str()).collect();
    assert_eq!(unlisted, ["a.mystery.weight"]);
    let mut strict = RulesConfig::default();
    strict.strict = true;
    let error = QuantPlan::resolve(parameters, &strict).unwrap_err();
    assert!(
        matches!(&error, QuantError::Unlisted { tensor } if tensor == "a.mystery.weight"),
        "{error}"
    );
}

#[test]
fn a_name_that_occurs_twice_is_an_error() {
    let twice = [matrix("a.o_proj.weight"), matrix("a.o_proj.weight")];
    let error = QuantPlan::resolve(twice, &RulesConfig::default()).unwrap_err();
    assert!(matches!(error, QuantError::Duplicate { .. }), "{error}");
}

#[test]
fn the_receivers_manifest_comes_before_every_other_rule() {
    let declare = |dtype: &str| Declared { dtype: dtype.to_owned(), shape: vec![1024, 1024] };
    let manifest = Manifest::from([
        ("lm_head.weight".to_owned(), declare("F8_E4M3")),
        ("a.o_proj.weight".to_owned(), declare("BF16")),
    ]);
    let mut config = RulesConfig::default();
    config.manifest = Some(manifest);
    config.ignored_layers = vec!["lm_head".to_owned()];
    assert_eq!(decide(&config, &matrix("lm_head.weight")), "quantize manifest");
    assert_eq!(decide(&config, &fp8("lm_head.weight")), "pass manifest");
    assert_eq!(decide(&config, &float("lm_head.weight_scale_inv", &[8, 8])), "pass manifest");
    assert_eq!(decide(&config, &matrix("a.o_proj.weight")), "keep manifest");
    let rules = Rules::new(&config).unwrap();
    for (name, shape, stored) in
        [fp8("a.o_proj.weight"), float("lm_head.weight", &[4, 4]), matrix("b.o_proj.weight")]
    {
        let error = rules.decide(&name, &shape, stored).unwrap_err();
        assert!(matches!(&error, QuantError::Manifest { tensor, .. } if *tensor == name));
    }
}

#[test]
fn the_plan_writes_a_config_that_lists_exactly_the_kept_layers() {
    let parameters = [
        matrix("model.embed_tokens.weight"),
        matrix("model.layers.0.self_attn.q_proj.weight"),
        float("model.layers.0.self_attn.q_proj.bias", &[1024]),
        float("model.layers.0.input_layernorm.weight", &[1024]),
        float("model.layers.0.mlp.gate.weight", &[64, 1024]),
        float("model.layers.0.mlp.experts.gate_up_proj", &[4, 256, 1024]),
        float("model.layers.0.mlp.experts.gate_up_proj_bias", &[128, 2048]),
        matrix("lm_head.weight"),
    ];
    let plan = QuantPlan::resolve(parameters.clone(), &RulesConfig::default()).unwrap();
    let config = plan.quantization_config().unwrap();
    assert_eq!(
        config,
        json!({
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert":
                ["model.embed_tokens", "model.layers.0.mlp.gate", "lm_head"],
        })
    );
    // Reading it back decides the same, so that stream and engine cannot disagree.
    let mut again = RulesConfig::default();
    again.quantization_config = Some(config);
    let again = QuantPlan::resolve(parameters, &again).unwrap();
    for (a, b) in plan.entries().iter().zip(again.entries()) {
        assert_eq!(a.decision, b.decision, "{}", a.name);
    }
}

#[test]
fn formats_that_the_config_cannot_express_are_errors() {
    let write = |format: Fp8Format| {
        let mut config = RulesConfig::default();
        config.format = format;
        QuantPlan::resolve([matrix("a.o_proj.weight")], &config).unwrap().quantization_config()
    };
    let base = Fp8Format::default();
    assert!(write(Fp8Format { granularity: Granularity::PerRow, ..base }).is_err());
    assert!(write(Fp8Format { scale_name: ScaleName::WeightScale, ..base }).is_err());
    // Receivers read scales of that name as those of blocks.
    let per_tensor = Fp8Format { granularity: Granularity::PerTensor, ..base };
    assert!(write(per_tensor).is_err());
    let per_tensor = Fp8Format { scale_name: ScaleName::WeightScale, ..per_tensor };
    let per_tensor = write(per_tensor).unwrap();
    assert!(per_tensor.get("weight_block_size").is_none());
    let ue8m0 = write(Fp8Format { mode: Mode::Ue8m0, ..base }).unwrap();
    assert_eq!(ue8m0["scale_fmt"], "ue8m0");
}

/// What a receiver gets of some parameters: the part of each name, and whether it is quantised.
fn quantized(receiver: Receiver, parameters: &[(&str, &[usize])]) -> Vec<bool> {
    let mut config = RulesConfig::default();
    config.receiver = receiver;
    let all = parameters.iter().map(|(name, shape)| float(name, shape));
    let plan = QuantPlan::resolve(all, &config).unwrap();
    plan.entries().iter().map(|entry| entry.decision == Decision::Quantize).collect()
}

const ENGINES: [Receiver; 3] = [Receiver::Common, Receiver::Vllm, Receiver::Sglang];

#[test]
fn columns_that_are_no_whole_blocks_and_rows_of_parts_that_are_not_are_kept() {
    for receiver in ENGINES {
        // Alone, rows may end within a block.
        let fp8 = quantized(
            receiver,
            &[
                ("a.mlp.gate_proj.weight", &[10944, 4096]),
                ("a.mlp.up_proj.weight", &[10944, 4096]),
                ("a.mlp.down_proj.weight", &[4096, 10944]),
                ("b.mlp.up_proj.weight", &[15680, 4480]),
                ("b.self_attn.kv_a_proj_with_mqa.weight", &[576, 2048]),
            ],
        );
        assert_eq!(fp8, [false, false, false, true, true], "{receiver}");
        // What is one in the checkpoint is two halves there.
        let fp8 = quantized(
            receiver,
            &[
                ("a.mlp.gate_up_proj.weight", &[384, 256]),
                ("b.mlp.gate_up_proj.weight", &[512, 256]),
                ("c.self_attn.qkv_proj.weight", &[384, 256]),
                ("c.self_attn.o_proj.weight", &[256, 256]),
            ],
        );
        assert_eq!(fp8, [false, true, false, true], "{receiver}");
    }
    let own = quantized(Receiver::Any, &[("a.mlp.down_proj.weight", &[200, 515])]);
    assert_eq!(own, [true]);
}

#[test]
fn the_last_part_of_a_layer_may_end_within_a_block_where_the_receiver_lets_it() {
    let parts: [(&str, &[usize]); 3] = [
        ("a.q_proj.weight", &[256, 256]),
        ("a.k_proj.weight", &[128, 256]),
        ("a.v_proj.weight", &[192, 256]),
    ];
    assert_eq!(quantized(Receiver::Vllm, &parts), [true; 3]);
    assert_eq!(quantized(Receiver::Sglang, &parts), [false; 3]);
    assert_eq!(quantized(Receiver::Common, &parts), [false; 3]);
    // Latent projections are one partition for both, as in DeepSeek-V3's own FP8.
    let latent: [(&str, &[usize]); 2] =
        [("a.q_a_proj.weight", &[1536, 7168]), ("a.kv_a_proj_with_mqa.weight", &[576, 7168])];
    for receiver in ENGINES {
        assert_eq!(quantized(receiver, &latent), [true; 2], "{receiver}");
    }
    let latent: [(&str, &[usize]); 2] =
        [("a.q_a_proj.weight", &[1600, 7168]), ("a.kv_a_proj_with_mqa.weight", &[512, 7168])];
    for receiver in ENGINES {
        assert_eq!(quantized(receiver, &latent), [false; 2], "{receiver}");
    }
}

#[test]
fn a_narrow_part_keeps_its_whole_layer() {
    for (parts, rest) in [(["q_proj", "k_proj", "v_proj"], "o_proj"), (["wq", "wk", "wv"], "wo")] {
        let names = parts.map(|part| format!("a.attention.{part}.weight"));
        let rest = format!("a.attention.{rest}.weight");
        let parameters: [(&str, &[usize]); 4] = [
            (&names[0], &[256, 256]),
            (&names[1], &[64, 256]),
            (&names[2], &[64, 256]),
            (&rest, &[256, 256]),
        ];
        assert_eq!(quantized(Receiver::Common, &parameters), [false, false, false, true]);
    }
    // `b_proj` belongs to the layer where a delta rule is, and only vLLM fuses that one.
    let delta: [(&str, &[usize]); 4] = [
        ("a.q_proj.weight", &[4096, 2304]),
        ("a.k_proj.weight", &[4096, 2304]),
        ("a.f_a_proj.weight", &[128, 2304]),
        ("a.b_proj.weight", &[32, 2304]),
    ];
    assert_eq!(quantized(Receiver::Common, &delta), [false; 4]);
    assert_eq!(quantized(Receiver::Vllm, &delta), [false; 4]);
    assert_eq!(quantized(Receiver::Sglang, &delta), [true, true, true, false]);
}

#[test]
fn experts_are_one_layer() {
    for (inner, expected) in [(64, false), (192, false), (256, true)] {
        for stacked in [false, true] {
            let parameters: Vec<(String, Vec<usize>)> = if stacked {
                vec![
                    ("a.experts.gate_up_proj".into(), vec![4, 2 * inner, 256]),
                    ("a.experts.down_proj".into(), vec![4, 256, inner]),
                ]
            } else {
                let of = |part: &str, shape: [usize; 2]| {
                    (format!("a.experts.3.{part}.weight"), shape.to_vec())
                };
                vec![
                    of("gate_proj", [inner, 256]),
                    of("down_proj", [256, inner]),
                    of("up_proj", [inner, 256]),
                ]
            };
            let all: Vec<(&str, &[usize])> =
                parameters.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect();
            for receiver in ENGINES {
                let fp8 = quantized(receiver, &all);
                assert!(
                    fp8.iter().all(|fp8| *fp8 == expected),
                    "{receiver} {parameters:?}: {fp8:?}"
                );
            }
        }
    }
    // One that no rule knows, of all of a module.
    let fp8 = quantized(
        Receiver::Common,
        &[
            ("a.experts.mlp.w1", &[1024, 256]),
            ("a.experts.mlp.v1", &[1024, 256]),
            ("a.experts.router.weight", &[256, 256]),
        ],
    );
    assert_eq!(fp8, [false; 3]);
}

#[test]
fn stacks_of_experts_are_quantised_where_the_receiver_loads_their_layout() {
    // [experts, in, out].
    let transposed: [(&str, &[usize]); 2] = [
        ("a.feed_forward.experts.gate_up_proj", &[4, 512, 2048]),
        ("a.feed_forward.experts.down_proj", &[4, 1024, 512]),
    ];
    assert_eq!(quantized(Receiver::Vllm, &transposed), [true; 2]);
    assert_eq!(quantized(Receiver::Sglang, &transposed), [false; 2]);
    assert_eq!(quantized(Receiver::Common, &transposed), [false; 2]);
    assert_eq!(quantized(Receiver::Transformers, &transposed), [false; 2]);
    // With biases it is gpt-oss, whose scales vLLM has no place for.
    let mut with_biases = transposed.to_vec();
    with_biases.push(("a.feed_forward.experts.gate_up_proj_bias", &[4, 2048]));
    assert_eq!(quantized(Receiver::Vllm, &with_biases), [false; 3]);
    // Right under `moe`, as Step has them.
    let moe: [(&str, &[usize]); 4] = [
        ("a.moe.gate_proj.weight", &[4, 256, 512]),
        ("a.moe.up_proj.weight", &[4, 256, 512]),
        ("a.moe.down_proj.weight", &[4, 512, 256]),
        ("a.moe.gate.weight", &[256, 512]),
    ];
    for r in ENGINES {
        assert_eq!(quantized(r, &moe), [true, true, true, false], "{r}");
    }
}

#[test]
fn a_kept_stack_is_listed_under_the_name_that_receivers_have_for_the_experts() {
    let parameters = [
        float("m.0.block_sparse_moe.input_linear.weight", &[4, 512, 256]),
        float("m.0.block_sparse_moe.output_linear.weight", &[4, 256, 256]),
        float("m.1.mlp.experts.0.gate_proj.weight", &[192, 256]),
        float("m.1.mlp.experts.0.up_proj.weight", &[192, 256]),
        float("m.1.mlp.experts.0.down_proj.weight", &[256, 192]),
        float("m.1.mlp.experts.1.down_proj.weight", &[256, 192]),
    ];
    let plan = QuantPlan::resolve(parameters.clone(), &RulesConfig::default()).unwrap();
    let config = plan.quantization_config().unwrap();
    assert_eq!(
        config["modules_to_not_convert"],
        json!([
            "m.0.block_sparse_moe.experts",
            "m.0.mlp.experts",
            "m.0.block_sparse_moe.input_linear",
            "m.0.mlp.input_linear",
            "m.0.block_sparse_moe.output_linear",
            "m.0.mlp.output_linear",
            "m.1.mlp.experts",
        ])
    );
    // Read back, every entry is one that means something.
    let mut own = RulesConfig::default();
    own.quantization_config = Some(config);
    let again = QuantPlan::resolve(parameters, &own).unwrap();
    assert_eq!(again.unmatched(), [] as [&str; 0]);
    assert!(again.entries().iter().all(|entry| entry.decision == Decision::Keep));
}

#[test]
fn what_a_checkpoint_has_as_one_is_listed_with_the_parts_that_receivers_look_for() {
    let parameters = [float("a.gate_up_proj.weight", &[384, 256]), matrix("b.gate_up_proj.weight")];
    let plan = QuantPlan::resolve(parameters.clone(), &RulesConfig::default()).unwrap();
    let config = plan.quantization_config().unwrap();
    let list = json!(["a.gate_up_proj", "a.gate_proj", "a.up_proj"]);
    assert_eq!(config["modules_to_not_convert"], list);
    let mut own = RulesConfig::default();
    own.quantization_config = Some(config);
    assert!(QuantPlan::resolve(parameters, &own).unwrap().unmatched().is_empty());
}

#[test]
fn mixers_of_mamba_1_are_kept_and_those_of_mamba_2_if_a_part_is_no_whole_blocks() {
    for x_proj in ["a.mixer.x_proj.weight", "a.mixer.x_proj_weight"] {
        let mamba1: [(&str, &[usize]); 3] = [
            ("a.mixer.in_proj.weight", &[1024, 256]),
            (x_proj, &[288, 512]),
            ("a.mixer.out_proj.weight", &[256, 512]),
        ];
        for receiver in ENGINES {
            assert_eq!(quantized(receiver, &mamba1), [false; 3], "{receiver}");
        }
    }
    for (heads, expected) in [(64, false), (128, true)] {
        let rows = 2 * 512 + 2 * 128 + heads;
        let mamba2: [(&str, &[usize]); 4] = [
            ("a.mixer.A_log", &[heads]),
            ("a.mixer.conv1d.weight", &[512 + 2 * 128, 1, 4]),
            ("a.mixer.in_proj.weight", &[rows, 256]),
            ("a.mixer.out_proj.weight", &[256, 512]),
        ];
        let expected = [false, false, expected, true];
        for receiver in ENGINES {
            assert_eq!(quantized(receiver, &mamba2), expected, "{receiver}");
        }
    }
}

#[test]
fn a_kept_mixer_is_listed_under_the_name_that_vllm_builds_it_with_as_well() {
    let parameters = [
        float("l.0.mamba.conv1d.weight", &[1280, 1, 4]),
        float("l.0.mamba.in_proj.weight", &[2320, 512]),
        float("l.0.mamba.A_log", &[16]),
        matrix("l.0.mamba.out_proj.weight"),
    ];
    let plan = QuantPlan::resolve(parameters.clone(), &RulesConfig::default()).unwrap();
    let config = plan.quantization_config().unwrap();
    let list =
        json!(["l.0.mamba.conv1d", "l.0.mixer.conv1d", "l.0.mamba.in_proj", "l.0.mixer.in_proj"]);
    assert_eq!(config["modules_to_not_convert"], list);
    // Read back, every entry means something, and means the same.
    let mut own = RulesConfig::default();
    own.quantization_config = Some(config);
    let again = QuantPlan::resolve(parameters, &own).unwrap();
    assert_eq!(again.unmatched(), [] as [&str; 0]);
    for (entry, before) in again.entries().iter().zip(plan.entries()) {
        assert_eq!(entry.decision, before.decision, "{}", entry.name);
    }
}

#[test]
fn a_kept_mixer_beside_attention_is_listed_under_the_number_that_vllm_gives_it() {
    let layer = |number: usize| {
        [
            float(&format!("model.layers.{number}.mamba.in_proj.weight"), &[2320, 512]),
            float(&format!("model.layers.{number}.mamba.conv1d.weight"), &[1280, 1, 4]),
            float(&format!("model.layers.{number}.mamba.A_log"), &[16]),
            matrix(&format!("model.layers.{number}.mamba.out_proj.weight")),
            matrix(&format!("model.layers.{number}.self_attn.o_proj.weight")),
        ]
    };
    let parameters = layer(0).into_iter().chain(layer(1));
    let plan = QuantPlan::resolve(parameters, &RulesConfig::default()).unwrap();
    let config = plan.quantization_config().unwrap();
    let list: Vec<_> = config["modules_to_not_convert"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|name| name.as_str().unwrap().ends_with("in_proj"))
        .collect();
    let expected = [
        "model.layers.0.mamba.in_proj",
        "model.layers.0.mixer.in_proj",
        "model.2.mixer.in_proj",
        "model.layers.1.mamba.in_proj",
        "model.layers.1.mixer.in_proj",
        "model.3.mixer.in_proj",
    ];
    assert_eq!(list, expected);
}

#[test]
fn names_are_read_through_what_adapters_put_around_layers() {
    let plan = QuantPlan::resolve(
        [
            matrix("a.q_proj.base_layer.weight"),
            float("a.q_proj.lora_A.default.weight", &[128, 1024]),
            float("a.k_proj.base_layer.weight", &[64, 1024]),
        ],
        &RulesConfig::default(),
    )
    .unwrap();
    let rules: Vec<_> = plan.entries().iter().map(|entry| entry.rule.id()).collect();
    assert_eq!(rules, ["layer", "kept-segment", "narrow"]);
    let config = plan.quantization_config().unwrap();
    let list = config["modules_to_not_convert"].as_array().unwrap();
    assert!(list.contains(&json!("a.q_proj")), "{list:?}");
    let alone = [matrix("a.o_proj.base_layer.weight")];
    let plan = QuantPlan::resolve(alone, &RulesConfig::default()).unwrap();
    assert_eq!(plan.entries()[0].decision, Decision::Quantize);
}

#[test]
fn a_part_that_is_left_out_by_name_is_an_error_for_every_fused_layer() {
    for (ignored, first, second) in [
        ("kv_a_proj_with_mqa", "a.q_a_proj", "a.kv_a_proj_with_mqa"),
        ("w1", "a.experts.0.w1", "a.experts.0.w3"),
        ("in_proj_z", "a.in_proj_qkv", "a.in_proj_z"),
        ("experts.0", "a.experts.0.up_proj", "a.experts.1.up_proj"),
        ("wk", "a.wq", "a.wk"),
    ] {
        let parameters = [matrix(&format!("{first}.weight")), matrix(&format!("{second}.weight"))];
        let error = QuantPlan::resolve(parameters.clone(), &ignoring(&[ignored])).unwrap_err();
        let QuantError::FusedPartsDisagree { layer, .. } = &error else { panic!("{error}") };
        assert!(error.to_string().contains(first) && error.to_string().contains(second), "{error}");
        // What the error says is a way out.
        QuantPlan::resolve(parameters, &ignoring(&[layer])).unwrap();
    }
    // What is kept anyway may be left out in part.
    let kept = [float("a.q_proj.weight", &[192, 1024]), matrix("a.k_proj.weight")];
    QuantPlan::resolve(kept, &ignoring(&["a.k_proj"])).unwrap();
}

#[test]
fn towers_and_layers_of_gpt_2_are_kept_whatever_their_projections_are_called() {
    for name in [
        "model.vision_encoder.layers.0.self_attn.q_proj",
        "vit.layers.0.mlp.dense_h_to_4h",
        "vpm.encoder.layers.0.mlp.fc1",
        "resampler.attn.out_proj",
        "model.vision_backbone.image_vit.resblocks.0.attention.wq",
        "image_tower.encoder.layers.0.mlp.fc2",
        "model.img_processor.q_proj",
        "speech_encoder.layers.0.o_proj",
        "sound_encoder.o_proj",
        "perception.encoder.o_proj",
        "model.connector.perceiver_resampler.o_proj",
        "model.aligner.o_proj",
        "talker.model.layers.0.o_proj",
        "codec_model.layers.0.o_proj",
        "embed_tokens_extend.audio_embed.o_proj",
        "mtp_layers.0.input_proj",
    ] {
        let name = format!("{name}.weight");
        assert_eq!(decide(&RulesConfig::default(), &matrix(&name)), "keep kept-segment", "{name}");
    }
    let config = RulesConfig::default();
    assert_eq!(decide(&config, &float("h.0.mlp.c_fc.weight", &[768, 3072])), "keep unlisted");
    assert!(decide(&config, &float("h.0.mlp.c_fc.weight", &[3072, 768])).starts_with("quantize"));
    for name in
        ["self_attn.dense", "attention.query_key_value", "mlp.fc1", "mlp.c_fc_0", "attn.wq_a"]
    {
        let name = format!("model.layers.0.{name}.weight");
        assert!(decide(&config, &matrix(&name)).starts_with("quantize"), "{name}");
    }
}

#[test]
fn entries_that_match_nothing_are_told() {
    let own = json!({"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "visual"]});
    let mut config =
        ignoring(&["o_porj", "*.o_proj", "a.qkv_proj", "re:b\\..*", "re:c.*", "model.a"]);
    config.quantization_config = Some(own);
    let parameters = [
        matrix("a.o_proj.weight"),
        matrix("a.q_proj.weight"),
        matrix("b.o_proj.weight"),
        matrix("lm_head.weight"),
    ];
    let plan = QuantPlan::resolve(parameters, &config).unwrap();
    assert_eq!(plan.unmatched(), ["o_porj", "*.o_proj", "re:c.*", "model.a", "visual"]);
}

#[test]
fn the_share_counts_what_could_be_fp8_and_says_which_rules_keep_the_rest() {
    let plan = QuantPlan::resolve(
        [
            float("model.embed_tokens.weight", &[1000, 256]),
            float("a.o_proj.weight", &[256, 256]),
            float("a.mystery.weight", &[256, 128]),
            float("a.conv.weight", &[256, 1, 4]),
            float("a.mlp.down_proj.weight", &[256, 192]),
        ],
        &RulesConfig::default(),
    )
    .unwrap();
    let share = plan.share();
    assert_eq!(share.quantized, 256 * 256);
    let kept: Vec<_> = share.kept.iter().map(|(rule, elements)| (*rule, *elements)).collect();
    assert_eq!(kept, [("unaligned", 256 * 192), ("unlisted", 256 * 128)]);
    assert!((share.kept_part() - 320.0 / 576.0).abs() < 1e-9);
}
