//! `quantize` and `dequantize` of checkpoints as others write them: understood completely, or refused by
//! name.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use cli::checkpoint::{Checkpoint, CheckpointWriter, verify};
use engine_core::{DType, TensorMeta};
use half::{bf16, f16};
use serde_json::{Value, json};
use tempfile::TempDir;

const O: &str = "model.layers.0.self_attn.o_proj";
const DOWN: &str = "model.layers.0.mlp.down_proj";

fn run(args: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
    command.args(args).stdin(Stdio::null()).output().expect("the program starts")
}

fn convert(command: &str, input: &Path, output: &Path) -> Output {
    run(&[Path::new(command), input, output])
}

#[track_caller]
fn converts(command: &str, input: &Path, output: &Path) -> String {
    let done = convert(command, input, output);
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{command}: {errors}");
    String::from_utf8(done.stdout).unwrap()
}

/// Fails with these words, leaving nothing.
#[track_caller]
fn refuses(command: &str, input: &Path, words: &[&str]) {
    let parent = tempfile::tempdir().unwrap();
    let done = convert(command, input, &parent.path().join("out"));
    let errors = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{command} {}: {errors}", input.display());
    for word in words {
        assert!(errors.contains(word), "{command} {}: `{word}` in {errors}", input.display());
    }
    assert_eq!(files(parent.path()), [""; 0], "{command}");
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<String> {
    fn below(folder: &Path, at: &Path, names: &mut Vec<String>) {
        for entry in fs::read_dir(folder.join(at)).unwrap() {
            let entry = entry.unwrap();
            let name = at.join(entry.file_name());
            match entry.path().is_dir() {
                true => below(folder, &name, names),
                false => names.push(name.to_str().unwrap().to_owned()),
            }
        }
    }
    let mut names = Vec::new();
    below(folder, Path::new(""), &mut names);
    names.sort();
    names
}

type Tensor = (String, DType, Vec<u64>, Vec<u8>);

fn tensor(name: &str, dtype: DType, shape: &[u64], bytes: Vec<u8>) -> Tensor {
    (name.to_owned(), dtype, shape.to_vec(), bytes)
}

fn bf16s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect()
}

fn f32s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// A matrix as it is trained.
fn matrix(name: &str, rows: u64, cols: u64) -> Tensor {
    let values = (0..rows * cols).map(|i| (i as f32 * 0.37).sin() / 3.0);
    tensor(&format!("{name}.weight"), DType::BF16, &[rows, cols], bf16s(values))
}

/// Codes of every finite value.
fn codes(count: u64) -> Vec<u8> {
    (0..count)
        .map(|i| (i.wrapping_mul(37) % 256) as u8)
        .map(|c| if c & 0x7f == 0x7f { 3 } else { c })
        .collect()
}

fn fp8(name: &str, shape: &[u64]) -> Tensor {
    tensor(name, DType::F8_E4M3, shape, codes(shape.iter().product()))
}

fn file(path: &Path, tensors: &[Tensor]) {
    let mut writer = CheckpointWriter::create(path).unwrap();
    for (name, dtype, shape, bytes) in tensors {
        let meta = TensorMeta::new(name.as_str(), *dtype, shape.clone());
        writer.write_chunk(&meta, 0, bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn text(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn read(folder: &Path, name: &str) -> String {
    fs::read_to_string(folder.join(name)).unwrap()
}

/// A folder with one file of weights, and a description of how they are quantised.
fn model(tensors: &[Tensor], quantization: Option<Value>) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let norm = tensor("model.norm.weight", DType::BF16, &[8], bf16s([1.0; 8]));
    file(&folder.path().join("model.safetensors"), &[tensors, &[norm]].concat());
    let mut config = json!({"model_type": "llama"});
    if let Some(quantization) = quantization {
        config["quantization_config"] = quantization;
    }
    text(folder.path(), "config.json", &config.to_string());
    folder
}

fn index(folder: &Path, name: &str, map: &[(&str, &str)]) {
    let map: BTreeMap<&str, &str> = map.iter().copied().collect();
    text(
        folder,
        name,
        &json!({"metadata": {"total_size": 0, "kept": 1}, "weight_map": map}).to_string(),
    );
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        Checkpoint::open(path).unwrap().metas().map(|meta| meta.name.to_string()).collect();
    names.sort();
    names
}

fn blocks() -> Value {
    json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128]})
}

fn compressed(strategy: &str) -> Value {
    json!({"quant_method": "compressed-tensors", "format": "float-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"], "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": true,
                "block_structure": [128, 128]},
            "input_activations": {"num_bits": 8, "type": "float", "dynamic": true}}}})
}

/// Two shards of one matrix each.
fn shards(folder: &Path, first: &str, second: &str) {
    file(&folder.join(first), &[matrix(O, 256, 256)]);
    file(&folder.join(second), &[matrix(DOWN, 256, 256)]);
    text(folder, "config.json", "{}");
    let (a, b) = (format!("{O}.weight"), format!("{DOWN}.weight"));
    index(folder, "model.safetensors.index.json", &[(&a, first), (&b, second)]);
}

#[test]
fn an_index_as_input_stands_for_all_of_its_shards() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    shards(&input, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let (from_index, from_folder, back) =
        (folder.path().join("a"), folder.path().join("b"), folder.path().join("c"));
    converts("quantize", &input.join("model.safetensors.index.json"), &from_index);
    converts("quantize", &input, &from_folder);
    assert_eq!(files(&from_index), files(&from_folder));
    assert_eq!(names(&from_index).len(), 4);
    for name in files(&from_folder) {
        assert_eq!(
            fs::read(from_index.join(&name)).unwrap(),
            fs::read(from_folder.join(&name)).unwrap()
        );
    }
    converts("dequantize", &from_index.join("model.safetensors.index.json"), &back);
    assert_eq!(names(&back), names(&input));
}

#[test]
fn shards_of_one_name_in_two_sub_folders_stay_two() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in"), folder.path().join("out"));
    shards(&input, "a/model.safetensors", "b/model.safetensors");
    converts("quantize", &input, &output);
    let expected = [
        "a/model.safetensors",
        "b/model.safetensors",
        "config.json",
        "model.safetensors.index.json",
    ];
    assert_eq!(files(&output), expected);
    assert_eq!(names(&output).len(), 4);
}

#[test]
fn a_model_of_one_shard_keeps_its_index_and_what_else_that_says() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in"), folder.path().join("out"));
    let name = "model-00001-of-00001.safetensors";
    file(&input.join(name), &[matrix(O, 256, 256)]);
    text(&input, "config.json", "{}");
    index(&input, "model.safetensors.index.json", &[(&format!("{O}.weight"), name)]);
    converts("quantize", &input, &output);
    let index: Value =
        serde_json::from_str(&read(&output, "model.safetensors.index.json")).unwrap();
    assert_eq!(index["metadata"], json!({"total_size": 256 * 256 + 16, "kept": 1}));
    assert_eq!(index["weight_map"][format!("{O}.weight_scale_inv")], name);
}

#[test]
fn of_two_indices_the_one_that_transformers_takes_is_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in"), folder.path().join("out"));
    shards(&input, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let other = "consolidated-00001-of-00001.safetensors";
    file(&input.join(other), &[matrix("layers.0.attention.wo", 256, 256)]);
    let entry = [("layers.0.attention.wo.weight", other)];
    index(&input, "consolidated.safetensors.index.json", &entry);
    let words = converts("quantize", &input, &output);
    assert!(words.contains(&format!("left out: {other}")), "{words}");
    assert!(words.contains("left out: consolidated.safetensors.index.json"), "{words}");
    assert_eq!(names(&output).len(), 4);
    assert_eq!(files(&output).len(), 4);
}

#[test]
fn a_scheme_that_is_not_understood_is_refused_by_its_name_and_first_tensor() {
    let weight = format!("{O}.weight");
    let ones = |bytes: usize| vec![1; bytes];
    let scale = |dtype: DType, shape: &[u64]| {
        let bytes = shape.iter().product::<u64>() * dtype.bits() / 8;
        tensor(&format!("{weight}_scale"), dtype, shape, ones(bytes as usize))
    };
    let inverse = tensor(&format!("{weight}_scale_inv"), DType::F32, &[2, 2], f32s([0.01; 4]));
    let own = |name: &str, dtype: DType, shape: &[u64]| {
        let bytes = shape.iter().product::<u64>() * dtype.bits() / 8;
        tensor(&format!("{O}.{name}"), dtype, shape, ones(bytes as usize))
    };
    let mut int8 = compressed("channel");
    int8["format"] = "int-quantized".into();
    let mut asymmetric = compressed("channel");
    asymmetric["config_groups"]["group_0"]["weights"]["symmetric"] = false.into();
    let int8_tensors = vec![own("weight", DType::I8, &[256, 256]), scale(DType::BF16, &[256, 1])];
    let cases: Vec<(Vec<Tensor>, Option<Value>, &[&str])> = vec![
        (
            int8_tensors.clone(),
            Some(int8),
            &["compressed-tensors of format int-quantized", "o_proj.weight"],
        ),
        (int8_tensors, None, &["INT8", "o_proj.weight"]),
        (
            vec![own("qweight", DType::I32, &[256, 32]), own("scales", DType::F16, &[2, 256])],
            Some(json!({"quant_method": "awq", "bits": 4})),
            &["awq (4 bits)", "o_proj.qweight"],
        ),
        (vec![own("qweight", DType::I32, &[256, 32])], None, &["AWQ or GPTQ", "o_proj.qweight"]),
        (
            vec![tensor(
                "model.layers.0.mlp.experts.down_proj_blocks",
                DType::U8,
                &[2, 8, 2, 16],
                ones(512),
            )],
            Some(json!({"quant_method": "mxfp4"})),
            &["mxfp4", "down_proj_blocks"],
        ),
        (
            vec![own("weight", DType::U8, &[256, 128]), own("weight_scale_2", DType::F32, &[])],
            None,
            &["NVFP4 of ModelOpt", "o_proj.weight"],
        ),
        (
            vec![
                own("weight_packed", DType::U8, &[256, 128]),
                own("weight_global_scale", DType::F32, &[1]),
            ],
            None,
            &["NVFP4 of compressed-tensors", "weight_packed"],
        ),
        (
            vec![own("weight", DType::I8, &[256, 256]), own("SCB", DType::F32, &[256])],
            None,
            &["bitsandbytes"],
        ),
        (
            vec![own("weight", DType::F8_E5M2, &[256, 256]), inverse.clone()],
            Some(blocks()),
            &["e5m2"],
        ),
        (
            vec![own("weight", DType::F8_E4M3FNUZ, &[256, 256]), inverse.clone()],
            Some(blocks()),
            &["fnuz"],
        ),
        (vec![own("weight", DType::F4, &[256, 256])], None, &["FP4", "o_proj.weight"]),
        (
            vec![fp8(&weight, &[256, 256])],
            Some(blocks()),
            &["its scale is missing", "o_proj.weight"],
        ),
        (vec![inverse.clone()], Some(blocks()), &["its weight is missing", "weight_scale_inv"]),
        (
            vec![matrix(O, 256, 256), inverse.clone()],
            Some(blocks()),
            &["its weight is not FP8", "weight_scale_inv"],
        ),
        (
            vec![fp8(&weight, &[256, 256]), inverse.clone(), scale(DType::F32, &[])],
            Some(blocks()),
            &["two scales"],
        ),
        (
            vec![fp8(&weight, &[256, 256]), scale(DType::U8, &[2, 2])],
            Some(blocks()),
            &["of type U8, whose meaning nothing says"],
        ),
        (
            vec![fp8(&weight, &[256, 256]), scale(DType::F32, &[256, 1])],
            Some(blocks()),
            &["[256, 1]", "blocks of 128x128"],
        ),
        (
            vec![fp8(&weight, &[256, 256]), scale(DType::F32, &[256, 1])],
            Some(asymmetric),
            &["zero points"],
        ),
        (vec![matrix(O, 256, 256)], Some(json!({"bits": 4})), &["without a quant_method"]),
        (
            vec![fp8(&weight, &[256, 256]), inverse],
            Some(json!({"quant_method": "fp8", "weight_block_size": "all"})),
            &["weight_block_size of \"all\""],
        ),
    ];
    for (tensors, quantization, words) in cases {
        let folder = model(&tensors, quantization);
        for command in ["quantize", "dequantize"] {
            refuses(command, folder.path(), words);
        }
    }
}

#[test]
fn descriptions_that_contradict_each_other_are_refused() {
    let weights = [fp8(&format!("{O}.weight"), &[256, 256])];
    let folder = model(&weights, Some(blocks()));
    let modelopt = json!({"quantization": {"quant_algo": "FP8"}}).to_string();
    text(folder.path(), "hf_quant_config.json", &modelopt);
    refuses(
        "dequantize",
        folder.path(),
        &["contradict each other", "ModelOpt", "blocks of 128x128"],
    );
    text(folder.path(), "hf_quant_config.json", r#"{"quantization": {"quant_algo": "NVFP4"}}"#);
    refuses("quantize", folder.path(), &["ModelOpt's NVFP4", "hf_quant_config.json"]);
}

/// FP8 checkpoints as others write them: tensors, the description, and what each weight's scale is at
/// a row and a column.
type Layout = (&'static str, Vec<Tensor>, Option<Value>, fn(u64, u64, u64) -> f32);

fn layouts() -> Vec<Layout> {
    let w = format!("{O}.weight");
    let e = "model.layers.0.mlp.experts.gate_up_proj";
    let float = |name: String, dtype: DType, shape: &[u64], values: Vec<f32>| {
        let bytes = match dtype {
            DType::F32 => f32s(values),
            DType::BF16 => bf16s(values),
            DType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            // The exponent of a power of two.
            _ => values.iter().map(|v| (v.to_bits() >> 23) as u8).collect(),
        };
        tensor(&name, dtype, shape, bytes)
    };
    // Powers of two, which every type of scales can hold.
    let power =
        |count: u64| (0..count).map(|i| 2.0_f32.powi(i as i32 % 7 - 5)).collect::<Vec<f32>>();
    let inv = |dtype, shape: &[u64]| {
        float(format!("{w}_scale_inv"), dtype, shape, power(shape.iter().product()))
    };
    let scale = |dtype, shape: &[u64]| {
        float(format!("{w}_scale"), dtype, shape, power(shape.iter().product()))
    };
    let of_experts = |suffix: &str, shape: &[u64]| {
        float(format!("{e}{suffix}"), DType::F32, shape, power(shape.iter().product()))
    };
    let input = |name: &str| tensor(&format!("{O}.{name}"), DType::F32, &[], f32s([0.5]));
    let weight = fp8(&w, &[256, 384]);
    let experts = fp8(e, &[2, 256, 128]);
    let fixed = json!({"quant_method": "fp8", "activation_scheme": "static"});
    let with = |key: &str, value: Value| {
        let mut blocks = blocks();
        blocks[key] = value;
        blocks
    };
    let modelopt = |algorithm: &str| json!({"quant_method": "modelopt", "quant_algo": algorithm});
    fn p(index: u64) -> f32 {
        2.0_f32.powi(index as i32 % 7 - 5)
    }
    let one: fn(u64, u64, u64) -> f32 = |_, _, _| p(0);
    let by_row: fn(u64, u64, u64) -> f32 = |_, row, _| p(row);
    let by_block: fn(u64, u64, u64) -> f32 = |_, row, col| p(row / 128 * 3 + col / 128);
    vec![
        (
            "static",
            vec![weight.clone(), scale(DType::F32, &[]), input("input_scale")],
            Some(fixed.clone()),
            one,
        ),
        (
            "static [1]",
            vec![weight.clone(), scale(DType::F32, &[1]), input("input_scale")],
            Some(fixed.clone()),
            one,
        ),
        (
            "devstral",
            vec![weight.clone(), inv(DType::BF16, &[]), input("activation_scale")],
            Some(fixed),
            one,
        ),
        ("blocks", vec![weight.clone(), inv(DType::F32, &[2, 3])], Some(blocks()), by_block),
        ("undescribed", vec![weight.clone(), inv(DType::F32, &[2, 3])], None, by_block),
        (
            "blocks of 64",
            vec![weight.clone(), inv(DType::F32, &[4, 6])],
            Some(with("weight_block_size", json!([64, 64]))),
            |_, row, col| p(row / 64 * 6 + col / 64),
        ),
        (
            "groups of 1x128",
            vec![weight.clone(), inv(DType::F32, &[256, 3])],
            Some(with("weight_block_size", json!([1, 128]))),
            |_, row, col| p(row * 3 + col / 128),
        ),
        (
            "E8M0",
            vec![weight.clone(), inv(DType::F8_E8M0, &[2, 3])],
            Some(with("scale_fmt", "ue8m0".into())),
            by_block,
        ),
        (
            "E8M0 as U8",
            vec![weight.clone(), inv(DType::U8, &[2, 3])],
            Some(with("scale_fmt", "ue8m0".into())),
            by_block,
        ),
        (
            ".scale",
            vec![weight.clone(), float(format!("{O}.scale"), DType::F8_E8M0, &[2, 3], power(6))],
            Some(with("scale_fmt", "ue8m0".into())),
            by_block,
        ),
        (
            "channels",
            vec![weight.clone(), scale(DType::BF16, &[256, 1])],
            Some(compressed("channel")),
            by_row,
        ),
        (
            "channels in F16",
            vec![weight.clone(), scale(DType::F16, &[256, 1])],
            Some(compressed("channel")),
            by_row,
        ),
        (
            "channels [R]",
            vec![weight.clone(), scale(DType::F32, &[256])],
            Some(compressed("channel")),
            by_row,
        ),
        (
            "compressed-tensors' blocks",
            vec![weight.clone(), scale(DType::BF16, &[2, 3])],
            Some(compressed("block")),
            by_block,
        ),
        (
            "fbgemm",
            vec![weight.clone(), scale(DType::F32, &[256, 1]), input("input_scale_ub")],
            Some(json!({"quant_method": "fbgemm_fp8"})),
            by_row,
        ),
        (
            "modelopt",
            vec![weight.clone(), scale(DType::F32, &[]), input("input_scale"), input("k_scale")],
            Some(modelopt("FP8")),
            one,
        ),
        (
            "modelopt's blocks",
            vec![weight, scale(DType::F32, &[2, 1, 3, 1])],
            Some(modelopt("FP8_PB_WO")),
            by_block,
        ),
        (
            "experts",
            vec![experts.clone(), of_experts("_scale_inv", &[2, 2, 1])],
            Some(blocks()),
            |e, row, _| p(e * 2 + row / 128),
        ),
        (
            "experts, a scale each",
            vec![
                experts.clone(),
                of_experts("_scale_inv", &[2, 1, 1]),
                of_experts("_input_scale", &[2]),
            ],
            Some(json!({"quant_method": "fp8"})),
            |e, _, _| p(e),
        ),
        (
            "experts [E]",
            vec![experts.clone(), of_experts("_scale", &[2])],
            Some(json!({"quant_method": "fp8"})),
            |e, _, _| p(e),
        ),
        (
            "experts, transposed",
            vec![experts, of_experts("_scale", &[2, 1, 128])],
            Some(compressed("channel")),
            |e, _, col| p(e * 128 + col),
        ),
    ]
}

/// The value of an e4m3 code.
fn value(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

#[test]
fn every_layout_is_dequantised_exactly_and_leaves_no_trace() {
    let folder = tempfile::tempdir().unwrap();
    for (case, tensors, quantization, scale) in layouts() {
        let input = model(&tensors, quantization);
        let output = folder.path().join(case.replace('/', "-"));
        converts("dequantize", input.path(), &output);
        let (name, _, shape, codes) = &tensors[0];
        let mut expected = vec!["model.norm.weight".to_owned(), name.clone()];
        expected.sort();
        assert_eq!(names(&output), expected, "{case}");
        let (rows, cols) = (shape[shape.len() - 2], shape[shape.len() - 1]);
        let values = codes.iter().zip(0_u64..).map(|(code, at)| {
            let (row, col) = (at / cols, at % cols);
            value(*code) * scale(row / rows, row % rows, col)
        });
        let found = Checkpoint::open(&output).unwrap();
        assert!(found.bytes(name).unwrap() == bf16s(values), "{case}");
        assert_eq!(found.meta(name).unwrap().dtype, DType::BF16, "{case}");
        assert_eq!(read(&output, "config.json"), r#"{"model_type":"llama"}"#, "{case}");
    }
}

#[test]
fn what_is_fp8_already_passes_with_its_own_description_to_the_last_byte() {
    let folder = tempfile::tempdir().unwrap();
    for (case, tensors, quantization, _) in layouts() {
        if matches!(case, "undescribed" | "blocks of 64" | "groups of 1x128") {
            continue; // Described anew, and refused because the format has other blocks.
        }
        let input = model(&tensors, quantization);
        text(input.path(), "hf_quant_config.json", r#"{"quantization": {"quant_algo": null}}"#);
        let output = folder.path().join(case);
        let words = converts("quantize", input.path(), &output);
        assert!(words.starts_with("0 tensors quantised"), "{case}: {words}");
        for name in ["config.json", "hf_quant_config.json"] {
            assert_eq!(read(&output, name), read(input.path(), name), "{case}");
        }
        let open = |path: &Path| Checkpoint::open(path).unwrap();
        let same = verify(&open(input.path()), &open(&output), |_| {}).unwrap();
        assert!(same.is_equal(), "{case}");
    }
}

#[test]
fn every_description_of_a_quantisation_goes_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let weights = [
        fp8(&format!("{O}.weight"), &[256, 256]),
        tensor(&format!("{O}.weight_scale"), DType::F32, &[], f32s([0.5])),
    ];
    let input = model(&weights, None);
    let config = r#"{"text_config": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}, "a": 1}, "b": 2}"#;
    text(input.path(), "config.json", config);
    let hf = r#"{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}"#;
    text(input.path(), "hf_quant_config.json", hf);
    text(
        input.path(),
        "params.json",
        r#"{"dim": 8, "quantization": {"qformat_weight": "fp8_e4m3"}}"#,
    );
    let output = folder.path().join("out");
    let words = converts("dequantize", input.path(), &output);
    assert!(words.contains("left out: hf_quant_config.json"), "{words}");
    assert_eq!(files(&output), ["config.json", "model.safetensors", "params.json"]);
    assert_eq!(read(&output, "config.json"), r#"{"text_config": {"a": 1}, "b": 2}"#);
    assert_eq!(read(&output, "params.json"), r#"{"dim": 8}"#);
    // The other name for it.
    let channel = compressed("channel");
    let input = model(
        &[
            weights[0].clone(),
            tensor(&format!("{O}.weight_scale"), DType::BF16, &[256, 1], bf16s([0.5; 256])),
        ],
        None,
    );
    text(input.path(), "config.json", &json!({"compression_config": channel}).to_string());
    let output = folder.path().join("compression");
    converts("dequantize", input.path(), &output);
    assert_eq!(read(&output, "config.json"), "{}");
}

#[test]
fn a_description_within_the_text_model_is_obeyed_and_written_back_there() {
    let folder = tempfile::tempdir().unwrap();
    let input = model(&[matrix(O, 256, 256), matrix(DOWN, 256, 256)], None);
    let mut own = blocks();
    own["modules_to_not_convert"] = json!(["lm_head", DOWN]);
    text(
        input.path(),
        "config.json",
        &json!({"text_config": {"quantization_config": own}}).to_string(),
    );
    let output = folder.path().join("out");
    let words = converts("quantize", input.path(), &output);
    assert!(words.starts_with("1 tensors quantised"), "{words}");
    let config: Value = serde_json::from_str(&read(&output, "config.json")).unwrap();
    assert_eq!(config, json!({"text_config": {"quantization_config": own}}));
    assert!(names(&output).contains(&format!("{O}.weight_scale_inv")));
    assert!(!names(&output).contains(&format!("{DOWN}.weight_scale_inv")));
}

#[test]
fn what_is_not_fp8_yet_is_quantised_beside_what_is_if_a_receiver_can_load_both() {
    let folder = tempfile::tempdir().unwrap();
    let weight = format!("{O}.weight");
    let own = [
        fp8(&weight, &[256, 256]),
        matrix(DOWN, 256, 256),
        matrix("model.layers.0.mlp.gate", 256, 256),
    ];
    let scale = |name: &str, shape: &[u64]| {
        let count = shape.iter().product::<u64>() as usize;
        tensor(&format!("{weight}{name}"), DType::F32, shape, f32s(vec![0.5; count]))
    };
    let with = |scale: Tensor, quantization: Value| {
        model(&[&own[..], &[scale]].concat(), Some(quantization))
    };
    let mut listed = blocks();
    listed["ignored_layers"] = json!(["lm_head"]);
    listed["other"] = json!({"b": 1, "a": 2});
    let output = folder.path().join("out");
    converts("quantize", with(scale("_scale_inv", &[2, 2]), listed.clone()).path(), &output);
    let config: Value = serde_json::from_str(&read(&output, "config.json")).unwrap();
    listed["ignored_layers"] = json!(["lm_head", "model.layers.0.mlp.gate"]);
    assert_eq!(config["quantization_config"], listed);
    assert!(names(&output).contains(&format!("{DOWN}.weight_scale_inv")));

    let mut powers = blocks();
    powers["scale_fmt"] = "ue8m0".into();
    let mut fixed = blocks();
    fixed["activation_scheme"] = "static".into();
    for (scale, quantization, words) in [
        (scale("_scale_inv", &[2, 2]), powers, "--mode ue8m0"),
        (scale("_scale_inv", &[2, 2]), fixed, "activation scale"),
        (scale("_scale", &[2, 2]), blocks(), "named like"),
        (scale("_scale", &[]), json!({"quant_method": "fp8"}), "blocks of 128x128"),
        (scale("_scale", &[256, 1]), compressed("channel"), "another description"),
    ] {
        let input = with(scale, quantization);
        refuses("quantize", input.path(), &[words, DOWN, "no receiver loads both"]);
    }
}

#[test]
fn one_scale_a_tensor_has_the_name_that_receivers_know() {
    let folder = tempfile::tempdir().unwrap();
    let input = model(&[matrix(O, 256, 256)], None);
    let output = folder.path().join("out");
    let block = [Path::new("--block"), Path::new("per-tensor")];
    let done = run(&[&[Path::new("quantize"), input.path(), &output], &block[..]].concat());
    assert!(done.status.success());
    assert!(names(&output).contains(&format!("{O}.weight_scale")));
    let config: Value = serde_json::from_str(&read(&output, "config.json")).unwrap();
    assert_eq!(config["quantization_config"].get("weight_block_size"), None);
    // It is read back as what it says that it is.
    converts("dequantize", &output, &folder.path().join("back"));
}

#[test]
fn scales_per_row_cannot_be_described_and_the_error_says_what_can() {
    let input = model(&[matrix(O, 256, 256)], None);
    let parent = tempfile::tempdir().unwrap();
    let output = parent.path().join("out");
    let quantize = [Path::new("quantize"), input.path(), &output];
    let plan = [Path::new("plan"), Path::new("--config"), Path::new("--model"), input.path()];
    for command in [&quantize[..], &plan] {
        let block = [Path::new("--block"), Path::new("per-row")];
        let done = run(&[command, &block].concat());
        let errors = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{errors}");
        for words in ["scales per row", "128x128", "per-tensor"] {
            assert!(errors.contains(words), "`{words}` in {errors}");
        }
    }
    assert_eq!(files(parent.path()), [""; 0]);
}

#[test]
fn json_passes_unharmed() {
    let config = "{\n  \"time_step_limit\": [0.0, Infinity],\n  \"zeta\": -Infinity,\n  \"alpha\": NaN,\n  \
                  \"big\": 123456789012345678901234567890,\n  \"eps\": 1e-05,\n  \"x\": 1.0\n}\n";
    let folder = tempfile::tempdir().unwrap();
    let input = model(&[matrix(O, 256, 256)], None);
    text(input.path(), "config.json", config);
    text(input.path(), "generation_config.json", config);
    let (output, back) = (folder.path().join("out"), folder.path().join("back"));
    converts("quantize", input.path(), &output);
    let written = read(&output, "config.json");
    assert!(written.starts_with(config.trim_end_matches("\n}\n")), "{written}");
    assert!(written.contains("\"quantization_config\": {\n    \""), "{written}");
    converts("dequantize", &output, &back);
    assert_eq!(read(&back, "config.json"), config);
    assert_eq!(read(&back, "generation_config.json"), config);
    let planned = run(&[Path::new("plan"), Path::new("--model"), input.path()]);
    assert!(planned.status.success());
}

#[test]
fn json_of_another_shape_is_an_error_with_the_place() {
    let input = model(&[matrix(O, 256, 256)], None);
    for (config, words) in [
        ("[1, 2]", "expected an object at line 1 column 1"),
        ("\"x\"", "expected an object"),
        ("{\"a\": 1,\n}", "line 2 column 1"),
        ("", "expected an object"),
        (r#"{"quantization_config": [1]}"#, "without a quant_method"),
        (r#"{"quantization_config": "fp8"}"#, "without a quant_method"),
    ] {
        text(input.path(), "config.json", config);
        refuses("quantize", input.path(), &[words]);
        refuses("dequantize", input.path(), &[words]);
    }
}

#[test]
fn a_value_that_the_type_cannot_hold_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let weight = format!("{O}.weight");
    let input = |code: u8, scale: f32| {
        let path = folder.path().join("in.safetensors");
        let scale = tensor(&format!("{weight}_scale_inv"), DType::F32, &[1, 1], f32s([scale]));
        let mut codes = vec![0; 128 * 128];
        codes[3 * 128 + 5] = code;
        file(&path, &[tensor(&weight, DType::F8_E4M3, &[128, 128], codes), scale]);
        path
    };
    refuses("dequantize", &input(0x7f, 1.0), &["row 3, column 5", &weight]);
    refuses("dequantize", &input(0x38, f32::NAN), &["row 0, column 0", "NaN", &weight]);
    refuses("dequantize", &input(0x38, f32::INFINITY), &["inf", &weight]);
    refuses("dequantize", &input(0x7e, 1e37), &["row 3, column 5", "448", &weight]);
    let path = input(0x7e, 1000.0);
    let output = folder.path().join("out");
    let half = [Path::new("--dtype"), Path::new("f16")];
    let done = run(&[&[Path::new("dequantize"), &path, &output], &half[..]].concat());
    assert_eq!(done.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&done.stderr).contains("F16"));
    assert!(!output.exists());
    converts("dequantize", &path, &output);
}

#[test]
fn everything_that_belongs_to_a_model_is_copied_and_everything_else_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let input = model(&[matrix(O, 256, 256)], None);
    let root = input.path();
    for name in [
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "additional_chat_templates/rag.jinja",
        "modeling_custom.py",
        ".gitattributes",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "model.gguf",
        ".cache/huggingface/lock",
    ] {
        text(root, name, name);
    }
    file(&root.join("projector.safetensors"), &[matrix("linear_1", 256, 256)]);
    let blob = folder.path().join("blob");
    fs::write(&blob, "blob").unwrap();
    symlink(&blob, root.join("tokenizer.json")).unwrap();
    let output = folder.path().join("out");
    let words = converts("quantize", root, &output);
    let copied = [
        ".gitattributes",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "additional_chat_templates/rag.jinja",
        "modeling_custom.py",
    ];
    for name in copied {
        assert_eq!(read(&output, name), name);
    }
    assert_eq!(read(&output, "tokenizer.json"), "blob");
    assert_eq!(files(&output).len(), copied.len() + 4);
    // It is loaded with the model, so that its layers are listed as left alone.
    assert_eq!(names(&output.join("projector.safetensors")), ["linear_1.weight"]);
    let config: Value = serde_json::from_str(&read(&output, "config.json")).unwrap();
    assert_eq!(config["quantization_config"]["modules_to_not_convert"], json!(["linear_1"]));
    for name in ["pytorch_model.bin", "consolidated.00.pth", "model.gguf", ".cache"] {
        assert!(words.contains(&format!("left out: {name}")), "{words}");
    }
    for name in ["projector.safetensors", "2_Dense/model.safetensors"] {
        assert!(words.contains(&format!("copied as it is: {name}")), "{words}");
    }
    // A folder that contains itself has no end.
    symlink(root, root.join("again")).unwrap();
    refuses("quantize", root, &["contains itself"]);
}

#[test]
fn an_interrupted_download_is_refused() {
    for name in ["tokenizer.json", "config.json"] {
        let input = model(&[matrix(O, 256, 256)], None);
        let _there = fs::remove_file(input.path().join(name));
        symlink("../../blobs/gone", input.path().join(name)).unwrap();
        refuses("quantize", input.path(), &[name, "leads nowhere"]);
        refuses("dequantize", input.path(), &[name, "leads nowhere"]);
    }
    let input = tempfile::tempdir().unwrap();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:7\nsize 988097824\n";
    text(input.path(), "model.safetensors", pointer);
    refuses("quantize", input.path(), &["Git LFS pointer", "git lfs pull"]);
}

#[test]
fn metadata_that_is_null_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let header = br#"{"__metadata__":null,"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let path = folder.path().join("a.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header, &[0; 8]].concat()).unwrap();
    assert_eq!(names(&path), ["a"]);
}

#[test]
fn a_model_without_a_configuration_does_not_get_half_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let input = model(&[matrix(O, 256, 256)], None);
    fs::remove_file(input.path().join("config.json")).unwrap();
    let output = folder.path().join("out");
    let words = converts("quantize", input.path(), &output);
    assert!(words.contains("there is no config.json"), "{words}");
    assert_eq!(files(&output), ["model.safetensors"]);
}

/// A model of zeros that takes no room on disk, and a while to convert.
fn large(folder: &Path) -> PathBuf {
    let input = folder.join("in");
    let rows = 16_384_u64;
    let header = json!({format!("{O}.weight"):
        {"dtype": "BF16", "shape": [rows, 16_384], "data_offsets": [0, rows * 16_384 * 2]}});
    let header = header.to_string();
    fs::create_dir_all(&input).unwrap();
    let path = input.join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat())
        .unwrap();
    let size = 8 + header.len() as u64 + rows * 16_384 * 2;
    fs::File::options().write(true).open(&path).unwrap().set_len(size).unwrap();
    text(&input, "config.json", "{}");
    input
}

#[test]
fn a_signal_leaves_a_whole_output_or_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let input = large(folder.path());
    let mut killed = false;
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 129), ("KILL", 137)] {
        for (name, input) in [("folder", input.clone()), ("file", input.join("model.safetensors"))]
        {
            let parent = folder.path().join(format!("{signal}-{name}"));
            fs::create_dir(&parent).unwrap();
            let mut child = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"))
                .arg("quantize")
                .args([&input, &parent.join("out")])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            while fs::read_dir(&parent).unwrap().count() < 2 {
                if child.try_wait().unwrap().is_some() {
                    break;
                }
            }
            let sent = Command::new("kill")
                .args([format!("-{signal}"), child.id().to_string()])
                .status()
                .unwrap();
            assert!(sent.success());
            let status = child.wait().unwrap();
            let whole = parent.join("out").exists();
            if whole {
                continue; // It was faster than the signal.
            }
            use std::os::unix::process::ExitStatusExt;
            let ended = status.code().unwrap_or_else(|| 128 + status.signal().unwrap());
            assert_eq!(ended, code, "{signal} {name}");
            let left = fs::read_dir(&parent).unwrap().count();
            if signal != "KILL" {
                assert_eq!(left, 0, "{signal} {name}");
                continue;
            }
            killed = true;
            assert!(left > 0);
            // The next output there removes what the dead one left.
            let small = model(&[matrix(O, 256, 256)], None);
            converts("quantize", small.path(), &parent.join("next"));
            let left: Vec<String> = fs::read_dir(&parent)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            assert_eq!(left, ["next"]);
        }
    }
    assert!(killed, "one of two was killed in the middle");
}
