//! Which parameters are quantised, and how the decision is written down.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use quant_fp8::rules::{
    Decision, Declared, Manifest, QuantPlan, Rules, RulesConfig, Stored, parse_ignored_layers,
    weight_of_scale,
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
    RulesConfig { ignored_layers, ..RulesConfig::default() }
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
        let config = RulesConfig {
            modules_to_not_convert: vec![entry.to_owned()],
            ..RulesConfig::default()
        };
        assert_eq!(decide(&config, &name), "keep ignored", "{entry}");
        for key in ["ignored_layers", "modules_to_not_convert", "ignore"] {
            let own = json!({"quant_method": "fp8", key: [entry]});
            let config = RulesConfig { quantization_config: Some(own), ..RulesConfig::default() };
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
    let with = |own| RulesConfig { quantization_config: Some(own), ..RulesConfig::default() };
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
    let strict = RulesConfig { strict: true, ..RulesConfig::default() };
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
    let config = RulesConfig {
        manifest: Some(manifest),
        ignored_layers: vec!["lm_head".to_owned()],
        ..RulesConfig::default()
    };
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
    let again = RulesConfig { quantization_config: Some(config), ..RulesConfig::default() };
    let again = QuantPlan::resolve(parameters, &again).unwrap();
    for (a, b) in plan.entries().iter().zip(again.entries()) {
        assert_eq!(a.decision, b.decision, "{}", a.name);
    }
}

#[test]
fn formats_that_the_config_cannot_express_are_errors() {
    let write = |format: Fp8Format| {
        let config = RulesConfig { format, ..RulesConfig::default() };
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
