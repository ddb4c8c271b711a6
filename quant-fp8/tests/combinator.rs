//! The combinator: what travels, in whatever pieces it is asked for, and what is refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use engine_core::{DType, Error, ErrorKind, Treatment, Weight, WeightStreamExt};
use futures::StreamExt;
use futures::executor::block_on;
use half::bf16;
use quant_fp8::rules::{QuantPlan, Receiver, Rules, RulesConfig, Stored};
use quant_fp8::{
    Codec, Fp8Format, Fp8Quantizer, Granularity, QuantizeFp8, Source, SourceType, Store,
};

fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x14057b7ef767814f);
        ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 3.0
    };
    (0..count).map(|_| next()).collect()
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect()
}

fn matrix(name: &str, shape: &[u64], seed: u64) -> Weight {
    let count = shape.iter().product::<u64>() as usize;
    Weight::new(name, DType::BF16, shape, bf16_bytes(&values(count, seed))).unwrap()
}

/// Rules that quantise whatever blocks can express, partial blocks too.
fn rules(config: RulesConfig) -> Rules {
    Rules::new(&{
        let mut rules = config;
        rules.receiver = Receiver::Any;
        rules
    })
    .unwrap()
}

fn quantized(
    weights: Vec<Weight>,
    quantizer: impl Into<Fp8Quantizer>,
) -> Result<Vec<Weight>, Error> {
    block_on(weights.quantize_fp8(quantizer).collect::<Vec<_>>()).into_iter().collect()
}

/// Codes and scales by the codec alone.
fn reference(bytes: &[u8], shape: &[usize], format: &Fp8Format) -> (Vec<u8>, Vec<u8>) {
    let grid = format.granularity.grid(shape).unwrap();
    let mut codes = vec![0; grid.elements()];
    let mut scales = vec![0.0_f32; grid.scales()];
    let source = Source::new(bytes, SourceType::Bf16, shape).unwrap();
    let all = 0..grid.elements();
    let codec = Codec::named("scalar").unwrap();
    codec.quantize(&source, format, all, &mut codes, &mut scales, Store::Cached).unwrap();
    (codes, scales.iter().flat_map(|scale| scale.to_le_bytes()).collect())
}

const NAME: &str = "model.layers.0.mlp.up_proj.weight";

#[test]
fn a_weight_becomes_its_codes_followed_by_its_scales() {
    let weights = vec![
        matrix("model.embed_tokens.weight", &[256, 128], 1),
        matrix(NAME, &[300, 515], 2),
        matrix("model.layers.0.mlp.experts.down_proj", &[3, 130, 129], 3),
    ];
    let sent = quantized(weights.clone(), rules(RulesConfig::default())).unwrap();
    let names: Vec<&str> = sent.iter().map(Weight::name).collect();
    assert_eq!(
        names,
        [
            "model.embed_tokens.weight",
            NAME,
            "model.layers.0.mlp.up_proj.weight_scale_inv",
            "model.layers.0.mlp.experts.down_proj",
            "model.layers.0.mlp.experts.down_proj_scale_inv",
        ]
    );
    assert!(matches!(sent[0].treatment(), Treatment::Kept(reason) if reason.contains("embed")));
    assert_eq!(sent[0].to_bytes().unwrap(), weights[0].to_bytes().unwrap());
    for (weight, pair) in weights[1..].iter().zip(sent[1..].chunks(2)) {
        let [codes, scales] = pair else { panic!("a pair") };
        let shape: Vec<usize> = weight.meta().shape.iter().map(|&side| side as usize).collect();
        let expected = reference(&weight.to_bytes().unwrap(), &shape, &Fp8Format::default());
        assert_eq!((codes.meta().dtype, scales.meta().dtype), (DType::F8_E4M3, DType::F32));
        assert_eq!(codes.meta().shape, weight.meta().shape);
        // The scales alone, before anybody has asked for the codes.
        assert_eq!(scales.to_bytes().unwrap(), expected.1);
        assert_eq!(codes.to_bytes().unwrap(), expected.0);
        assert_eq!(scales.to_bytes().unwrap(), expected.1);
        assert_eq!(codes.source_bytes() + scales.source_bytes(), weight.byte_len());
        assert_eq!(*codes.treatment(), Treatment::Converted);
        assert_eq!(*scales.treatment(), Treatment::Added);
    }
}

#[test]
fn any_division_of_any_source_gives_the_same_codes_and_scales() {
    let shape = [2_u64, 130, 260];
    let values = values(2 * 130 * 260, 7);
    let bytes = bf16_bytes(&values);
    let name = "model.layers.0.mlp.experts.up_proj";
    // Contiguous; transposed in memory; cast on the way.
    let plain = Weight::new(name, DType::BF16, shape, bytes.clone()).unwrap();
    let mut storage = vec![0; bytes.len()];
    for e in 0..2 {
        for r in 0..130 {
            for c in 0..260 {
                let (from, to) = (((e * 130 + r) * 260 + c) * 2, ((e * 260 + c) * 130 + r) * 2);
                storage[to..to + 2].copy_from_slice(&bytes[from..from + 2]);
            }
        }
    }
    let strides = [130 * 260_i64, 1, 130];
    let strided = Weight::strided(name, DType::BF16, shape, strides, 0, storage).unwrap();
    let wide: Vec<u8> = bytes
        .as_chunks::<2>()
        .0
        .iter()
        .flat_map(|value| bf16::from_le_bytes(*value).to_f32().to_le_bytes())
        .collect();
    let wide = Weight::new(name, DType::F32, shape, wide).unwrap();
    let cast = block_on(vec![wide].cast(DType::BF16).next()).unwrap().unwrap();

    let expected = reference(&bytes, &[2, 130, 260], &Fp8Format::default());
    for source in [plain, strided, cast] {
        for step in [1000_u64, 4096, 33_280, 67_600] {
            let sent = quantized(vec![source.clone()], rules(RulesConfig::default())).unwrap();
            let mut codes = vec![0; 67_600];
            for start in (0..67_600).step_by(step as usize) {
                let end = (start + step).min(67_600);
                sent[0].encode(start..end, &mut codes[start as usize..end as usize]).unwrap();
            }
            assert!(codes == expected.0, "in steps of {step}");
            let mut scales = vec![0; expected.1.len()];
            // Not at the scales' own bounds.
            let (low, high) = scales.split_at_mut(7);
            sent[1].encode(0..7, low).unwrap();
            sent[1].encode(7..expected.1.len() as u64, high).unwrap();
            assert_eq!(scales, expected.1);
        }
    }
}

#[test]
fn other_granularities_and_names_give_scales_of_their_shapes() {
    for (granularity, shape) in [
        (Granularity::PerRow, vec![300, 1]),
        (Granularity::PerTensor, vec![1]),
        (Granularity::Block { rows: 32, cols: 64 }, vec![10, 9]),
    ] {
        let format = Fp8Format {
            granularity,
            scale_name: quant_fp8::ScaleName::WeightScale,
            ..Default::default()
        };
        let weight = matrix(NAME, &[300, 515], 5);
        let mut config = RulesConfig::default();
        config.format = format;
        let sent = quantized(vec![weight.clone()], rules(config)).unwrap();
        assert_eq!(sent[1].name(), "model.layers.0.mlp.up_proj.weight_scale");
        assert_eq!(sent[1].meta().shape.to_vec(), shape);
        let expected = reference(&weight.to_bytes().unwrap(), &[300, 515], &format);
        assert_eq!(sent[0].to_bytes().unwrap(), expected.0);
        assert_eq!(sent[1].to_bytes().unwrap(), expected.1);
    }
}

#[test]
fn what_is_fp8_already_passes_through_with_its_scales_and_is_not_quantised_twice() {
    let weights = vec![matrix(NAME, &[256, 256], 1), matrix("model.norm.weight", &[256], 2)];
    let once = quantized(weights, rules(RulesConfig::default())).unwrap();
    let bytes: Vec<_> = once.iter().map(|weight| weight.to_bytes().unwrap()).collect();
    // As the same weights look that were read from an FP8 checkpoint.
    let plain: Vec<Weight> = once
        .iter()
        .zip(&bytes)
        .map(|(weight, bytes)| Weight::from_meta(weight.meta().clone(), bytes.clone()).unwrap())
        .collect();
    let passed = quantized(plain, rules(RulesConfig::default())).unwrap();
    assert_eq!(*passed[0].treatment(), Treatment::PassedThrough);
    assert_eq!(*passed[1].treatment(), Treatment::Added);
    for twice in [passed, quantized(once, rules(RulesConfig::default())).unwrap()] {
        assert_eq!(twice.len(), 3);
        for (weight, bytes) in twice.iter().zip(&bytes) {
            assert_eq!(weight.to_bytes().unwrap(), bytes);
        }
    }
}

#[test]
fn halves_without_their_other_half_end_the_stream() {
    let codes = Weight::new(NAME, DType::F8_E4M3, [128, 128], vec![0; 128 * 128]).unwrap();
    let scale_name = "model.layers.0.mlp.up_proj.weight_scale_inv";
    let scale = Weight::new(scale_name, DType::F32, [1, 1], vec![0; 4]).unwrap();
    for (weights, tensor) in [(vec![codes], NAME), (vec![scale], scale_name)] {
        let error = quantized(weights, rules(RulesConfig::default())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Weight, "{error}");
        assert_eq!(error.report().tensor.as_deref(), Some(tensor), "{error}");
    }
}

/// What engines load: the rules that are used if nobody says.
fn for_engines() -> Rules {
    Rules::new(&RulesConfig::default()).unwrap()
}

fn attention(parts: &[(&str, u64)]) -> Vec<Weight> {
    let name = |part: &str| format!("model.layers.0.self_attn.{part}.weight");
    let weights = parts.iter().map(|&(part, rows)| matrix(&name(part), &[rows, 128], 1));
    weights.chain([matrix("model.norm.weight", &[128], 1)]).collect()
}

fn types(weights: &[Weight]) -> Vec<(&str, bool)> {
    let scale = |weight: &&Weight| *weight.treatment() != Treatment::Added;
    let part = |weight: &Weight| weight.meta().dtype == DType::F8_E4M3;
    weights
        .iter()
        .filter(scale)
        .map(|weight| (weight.name().rsplit('.').nth(1).unwrap(), part(weight)))
        .collect()
}

#[test]
fn a_layer_one_part_of_which_is_kept_is_kept_in_whatever_order_its_parts_come() {
    let parts = [("q_proj", 256), ("k_proj", 64), ("v_proj", 64), ("o_proj", 128)];
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [0, 3, 2, 1]] {
        let parts = order.map(|index| parts[index]);
        let quantizer = Fp8Quantizer::from(for_engines());
        // The second stream repeats what the first one found out.
        for _ in 0..2 {
            let sent = quantized(attention(&parts), &quantizer).unwrap();
            let expected: Vec<(&str, bool)> =
                parts.iter().map(|&(part, _)| (part, part == "o_proj")).collect();
            assert_eq!(types(&sent)[..4], expected);
            assert_eq!(sent.last().unwrap().name(), "model.norm.weight", "the order stays");
        }
    }
    // The narrow one is not there for every receiver to find.
    let delta =
        [("q_proj", 128), ("k_proj", 128), ("v_proj", 128), ("o_proj", 128), ("b_proj", 32)];
    let sent = quantized(attention(&delta), for_engines()).unwrap();
    assert_eq!(types(&sent).iter().filter(|(_, fp8)| *fp8).count(), 1, "{:?}", types(&sent));
}

#[test]
fn a_stream_and_a_plan_of_the_same_weights_decide_alike() {
    let weights = attention(&[("q_proj", 256), ("k_proj", 192), ("v_proj", 192), ("o_proj", 128)]);
    let shapes = weights.iter().map(|weight| {
        let shape = weight.meta().shape.iter().map(|&side| side as usize).collect();
        (weight.name().to_owned(), shape, Stored::Float)
    });
    let plan = QuantPlan::resolve(shapes, &RulesConfig::default()).unwrap();
    let (one, other) =
        (quantized(weights.clone(), plan).unwrap(), quantized(weights, for_engines()).unwrap());
    assert_eq!(types(&one), types(&other));
    assert!(types(&one).contains(&("o_proj", true)) && types(&one).contains(&("q_proj", false)));
}

#[test]
fn a_layer_whose_parts_are_far_apart_is_an_error_rather_than_quantised_in_part() {
    let mut weights = attention(&[("q_proj", 256), ("o_proj", 128)]);
    weights.extend(attention(&[("k_proj", 64), ("v_proj", 64)]));
    weights.remove(2);
    weights.insert(2, matrix("model.layers.1.mlp.down_proj.weight", &[128, 128], 1));
    let error = quantized(weights.clone(), for_engines()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Weight);
    let text = error.to_string();
    for word in ["0.self_attn.q_proj", "0.self_attn.k_proj", "ignored_layers"] {
        assert!(text.contains(word), "{text}");
    }
    // As the error says.
    let mut config = RulesConfig::default();
    config.ignored_layers = vec!["model.layers.0.self_attn".into()];
    quantized(weights.clone(), Rules::new(&config).unwrap()).unwrap();
    // The other way round nothing has happened yet that could not be.
    weights.reverse();
    let sent = quantized(weights, for_engines()).unwrap();
    assert!(!types(&sent).contains(&("q_proj", true)));
}

#[test]
fn a_stream_that_differs_from_the_last_one_halfway_still_knows_what_went_before() {
    let quantizer = Fp8Quantizer::from(for_engines());
    let parts = [("q_proj", 256), ("k_proj", 128), ("v_proj", 128)];
    let sent = quantized(attention(&parts), &quantizer).unwrap();
    assert_eq!(types(&sent)[..3], parts.map(|(part, _)| (part, true)));
    let changed = [("q_proj", 256), ("k_proj", 64), ("v_proj", 64)];
    let error = quantized(attention(&changed), &quantizer).unwrap_err();
    assert!(error.to_string().contains("q_proj"), "{error}");
}

#[test]
fn a_block_that_is_not_finite_is_an_error_that_names_tensor_and_block_for_any_source() {
    let mut bytes = matrix(NAME, &[300, 300], 1).to_bytes().unwrap().to_vec();
    let at = (200 * 300 + 290) * 2;
    bytes[at..at + 2].copy_from_slice(&bf16::NAN.to_le_bytes());
    let plain = Weight::new(NAME, DType::BF16, [300, 300], bytes.clone()).unwrap();
    let wide = Weight::new(
        NAME,
        DType::F32,
        [300, 300],
        bytes
            .as_chunks::<2>()
            .0
            .iter()
            .flat_map(|value| bf16::from_le_bytes(*value).to_f32().to_le_bytes())
            .collect::<Vec<u8>>(),
    )
    .unwrap();
    let cast = block_on(vec![wide].cast(DType::BF16).next()).unwrap().unwrap();
    for weight in [plain, cast] {
        let sent = quantized(vec![weight], rules(RulesConfig::default())).unwrap();
        let error = sent[0].to_bytes().unwrap_err();
        assert_eq!(error.report().tensor.as_deref(), Some(NAME));
        assert!(error.to_string().contains("block (1, 2)"), "{error}");
    }
}

#[test]
fn a_plan_decides_as_it_was_resolved_and_refuses_what_it_does_not_know() {
    let known =
        [(NAME, vec![256, 256], Stored::Float), ("model.norm.weight", vec![256], Stored::Float)];
    let plan = QuantPlan::resolve(known, &RulesConfig::default()).unwrap();
    let quantizer = Fp8Quantizer::from(plan);
    let weights = vec![matrix(NAME, &[256, 256], 1), matrix("model.norm.weight", &[256], 1)];
    assert_eq!(quantized(weights, &quantizer).unwrap().len(), 3);
    for stranger in
        [matrix("model.layers.1.mlp.up_proj.weight", &[256, 256], 1), matrix(NAME, &[128, 256], 1)]
    {
        let error = quantized(vec![stranger], &quantizer).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
    }
}
