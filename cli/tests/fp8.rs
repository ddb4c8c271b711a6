//! `sync` with quantisation, `quantize`, `dequantize` and `plan` as their users run them.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use cli::checkpoint::{Checkpoint, CheckpointWriter};
use engine_core::{DType, Weight};

fn run(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
    command.args(args).stdin(Stdio::null()).output().expect("the program starts")
}

fn succeeds(args: &[&str]) -> String {
    let output = run(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    String::from_utf8(output.stdout).expect("text")
}

fn fails(args: &[&str], words: &str) {
    let output = run(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {errors}");
    assert!(errors.contains(words), "{args:?}: {errors}");
}

#[test]
fn every_backend_brings_verified_fp8_quantised_on_either_side_and_in_every_mode() {
    // No engine would load FP8 of its shapes.
    let sync = [
        "sync",
        "--synthetic",
        "tiny-moe",
        "--rollouts",
        "2",
        "--updates",
        "2",
        "--receiver",
        "any",
    ];
    for backend in ["naive", "ipc"] {
        for (extra, on_trainer) in [
            (&["--trainer-quantize-fp8"][..], true),
            (&["--trainer-quantize-fp8", "--quant-mode", "ue8m0", "--bucket-mb", "1"], true),
            (
                &["--trainer-quantize-fp8", "--quant-mode", "pytorch", "--quant-block", "32x64"],
                true,
            ),
            (&["--quantize-on-receive"], false),
        ] {
            let args = [&sync[..], &["--verify", "--json", "--backend", backend], extra].concat();
            for line in succeeds(&args).lines() {
                let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
                assert_eq!(line["verified"], true, "{args:?}");
                let count = |key: &str| line[key].as_u64().expect(key);
                assert_eq!(count("quantized") > 0, on_trainer, "{args:?}");
                if on_trainer {
                    assert_eq!(count("quantized") + count("kept"), count("tensors"));
                    assert!(count("wire_bytes") < count("source_bytes"));
                }
            }
        }
    }
    fails(&[&sync[..], &["--trainer-quantize-fp8", "--quant-mode", "triton-gpu"]].concat(), "CUDA");
}

/// A folder of two shards as Hugging Face has them.
fn model(folder: &Path) {
    std::fs::create_dir(folder).expect("a folder");
    let matrix = |name: &str, rows: u64, cols: u64| {
        let values = (0..rows * cols).map(|i| (i as f32 * 0.37).sin() / 3.0);
        let bytes: Vec<u8> =
            values.flat_map(|value| half::bf16::from_f32(value).to_le_bytes()).collect();
        Weight::new(name, DType::BF16, [rows, cols], bytes).expect("a weight")
    };
    let shards = [
        vec![
            matrix("model.embed_tokens.weight", 300, 200),
            matrix("model.layers.0.self_attn.q_proj.weight", 256, 200),
        ],
        vec![
            matrix("model.layers.0.self_attn.k_proj.weight", 128, 200),
            matrix("model.layers.0.mlp.down_proj.weight", 200, 515),
            matrix("model.layers.0.mlp.gate.weight", 130, 200),
        ],
    ];
    let mut map = serde_json::Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-00002.safetensors", index + 1);
        let mut writer = CheckpointWriter::create(folder.join(&name)).expect("a writer");
        for weight in shard {
            writer.write_weight(weight).expect("written");
            map.insert(weight.name().into(), name.clone().into());
        }
        writer.finish().expect("a file");
    }
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).expect("a file");
    write("model.safetensors.index.json", serde_json::json!({"weight_map": map}).to_string());
    write("config.json", r#"{"model_type": "qwen2", "torch_dtype": "bfloat16"}"#.into());
    write("tokenizer.json", "{}".into());
}

#[test]
fn a_folder_becomes_an_fp8_folder_and_back_with_the_error_of_fp8() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (bf16, fp8, back) = (path("bf16"), path("fp8"), path("back"));
    model(Path::new(&bf16));
    let text = succeeds(&["quantize", &bf16, &fp8, "--receiver", "any"]);
    assert!(text.contains("3 tensors quantised, 2 kept"), "{text}");

    let checkpoint = Checkpoint::open(&fp8).expect("a checkpoint");
    assert_eq!((checkpoint.shards().len(), checkpoint.len()), (2, 8));
    let scale = checkpoint.meta("model.layers.0.mlp.down_proj.weight_scale_inv").expect("scales");
    assert_eq!((scale.dtype, &*scale.shape), (DType::F32, &[2, 5][..]));
    let read = |name: &str| std::fs::read_to_string(Path::new(&fp8).join(name)).expect(name);
    let config: serde_json::Value = serde_json::from_str(&read("config.json")).expect("JSON");
    assert_eq!(config["model_type"], "qwen2");
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["weight_block_size"], serde_json::json!([128, 128]));
    assert_eq!(
        quantization["modules_to_not_convert"],
        serde_json::json!(["model.embed_tokens", "model.layers.0.mlp.gate"])
    );
    assert_eq!(read("tokenizer.json"), "{}");
    assert!(read("model.safetensors.index.json").contains("down_proj.weight_scale_inv"));

    // What is FP8 already passes: nothing is quantised twice.
    let again = path("again");
    assert!(succeeds(&["quantize", &fp8, &again]).starts_with("0 tensors"));
    succeeds(&["verify", &fp8, &again]);

    succeeds(&["dequantize", &fp8, &back]);
    let (before, after) =
        (Checkpoint::open(&bf16).expect("it"), Checkpoint::open(&back).expect("it"));
    assert_eq!(before.len(), after.len());
    for meta in before.metas() {
        assert_eq!(after.meta(&meta.name), Some(meta));
        let values = |checkpoint: &Checkpoint| -> Vec<f64> {
            let bytes = checkpoint.bytes(&meta.name).expect("bytes");
            let value = |b: &[u8; 2]| half::bf16::from_le_bytes(*b).to_f64();
            bytes.as_chunks::<2>().0.iter().map(value).collect()
        };
        let (a, b) = (values(&before), values(&after));
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
        let error =
            square(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / square(&mut a.iter().copied());
        let quantised = checkpoint.meta(&meta.name).is_some_and(|m| m.dtype == DType::F8_E4M3);
        let error = error.sqrt();
        assert!(if quantised { (0.01..0.04).contains(&error) } else { error == 0.0 }, "{error}");
    }
    let config = std::fs::read_to_string(Path::new(&back).join("config.json")).expect("it");
    assert!(!config.contains("quantization_config"));

    fails(&["quantize", &bf16, &fp8], "exists already");
    let left: Vec<_> = std::fs::read_dir(folder.path()).expect("it").collect();
    assert_eq!(left.len(), 4, "{left:?}");
}

#[test]
fn a_checkpoint_with_a_nan_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let input = folder.path().join("model.safetensors");
    let mut bytes = vec![0; 256 * 256 * 2];
    bytes[100_000..100_002].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    let name = "model.layers.0.mlp.up_proj.weight";
    let mut writer = CheckpointWriter::create(&input).expect("a writer");
    writer
        .write_weight(&Weight::new(name, DType::BF16, [256, 256], bytes).expect("a weight"))
        .expect("written");
    writer.finish().expect("a file");
    let input = input.display().to_string();
    let output = folder.path().join("fp8.safetensors").display().to_string();
    fails(&["quantize", &input, &output], "block (1, 0)");
    fails(&["sync", "--model", &input, "--trainer-quantize-fp8"], name);
    let left: Vec<_> = std::fs::read_dir(folder.path()).expect("it").collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn plan_says_what_happens_to_names_and_by_which_rule() {
    let folder = tempfile::tempdir().expect("a folder");
    let names = folder.path().join("names");
    let lines = "# a comment\n\
                 model.layers.0.mlp.gate.weight\t256x1024\n\
                 model.layers.0.mlp.gate_proj.weight\t256x1024\n\
                 model.layers.0.mlp.up_proj.weight\t256x1024\n\
                 model.norm.weight\t1024\n";
    std::fs::write(&names, lines).expect("a file");
    let names = names.display().to_string();
    assert_eq!(
        succeeds(&["plan", "--names", &names]),
        "model.layers.0.mlp.gate.weight\tkeep\tkept-segment\n\
         model.layers.0.mlp.gate_proj.weight\tquantize\tquantized-segment\n\
         model.layers.0.mlp.up_proj.weight\tquantize\tquantized-segment\n\
         model.norm.weight\tkeep\tnot-a-matrix\n"
    );
    fails(&["plan", "--names", &names, "--ignored", "gate_proj"], "fused layer");
    let config = succeeds(&["plan", "--names", &names, "--config"]);
    assert!(config.contains("modules_to_not_convert"), "{config}");
    std::fs::write(&names, "no shape\n").expect("a file");
    fails(&["plan", "--names", &names], "line 1");
}

/// What the program says on standard error about a plan.
fn remarks(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}");
    String::from_utf8(output.stderr).expect("text")
}

#[test]
fn plan_tells_the_share_that_stays_and_what_may_be_a_mistake() {
    let folder = tempfile::tempdir().expect("a folder");
    let names = folder.path().join("names");
    let write = |lines: &str| std::fs::write(&names, lines).expect("a file");
    let path = names.display().to_string();
    let attention = "m.self_attn.q_proj.weight\t256x256\nm.self_attn.k_proj.weight\t64x256\n";
    write(&format!("{attention}m.self_attn.o_proj.weight\t256x256\n"));
    let text = remarks(&["plan", "--names", &path]);
    assert!(text.contains("50.0% of what could be FP8 stays as it is: layer 50.0%"), "{text}");
    assert!(!text.contains("warning"), "{text}");
    assert!(!remarks(&["plan", "--names", &path, "--receiver", "transformers"]).contains("layer"));

    write(&format!("{attention}m.self_attn.o_proj.weight\t128x256\n"));
    let text = remarks(&["plan", "--names", &path]);
    assert!(text.contains("warning: more than half stays as it is for vLLM and SGLang"), "{text}");
    write(attention);
    let text = remarks(&["plan", "--names", &path, "--ignored", "o_porj,self_attn"]);
    assert!(text.contains("warning: nothing is quantised"), "{text}");
    assert!(text.contains("match no parameter: o_porj\n"), "{text}");
    assert_eq!(run(&["plan", "--names", &path, "--receiver", "tgi"]).status.code(), Some(2));
}

#[test]
fn an_update_that_quantises_warns_of_what_plan_warns_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model");
    parted(&model);
    let model = model.display().to_string();
    let sync = |source: &[&str], who: &str| {
        let options = ["--backend", "naive", who, "--ignored", "o_porj,q_proj"];
        remarks(&[&["sync"], source, &options].concat())
    };
    for who in ["--trainer-quantize-fp8", "--quantize-on-receive"] {
        let text = sync(&["--model", &model], who);
        assert!(text.contains("match no parameter: o_porj\n"), "{text}");
        assert!(!text.contains("nothing"), "{text}");
        let text = sync(&["--synthetic", "tiny-moe"], who);
        assert!(text.contains("warning: nothing is quantised\n"), "{text}");
        assert!(text.contains("match no parameter: o_porj\n"), "{text}");
    }
    let text = remarks(&["sync", "--synthetic", "tiny-moe", "--backend", "naive"]);
    assert!(!text.contains("warning"), "{text}");
}

/// A checkpoint of two files with a layer that is parted by them, narrow keys, and a list of its own.
fn parted(folder: &Path) {
    std::fs::create_dir(folder).expect("a folder");
    let matrix = |name: &str, rows: u64| {
        let bytes = (0..rows * 256).flat_map(|i| half::bf16::from_f32(i as f32).to_le_bytes());
        let name = format!("model.layers.{name}.weight");
        Weight::new(&*name, DType::BF16, [rows, 256], bytes.collect::<Vec<u8>>()).expect("a weight")
    };
    let shards = [
        vec![matrix("0.self_attn.q_proj", 256), matrix("1.self_attn.o_proj", 256)],
        vec![matrix("0.self_attn.k_proj", 64), matrix("0.self_attn.o_proj", 256)],
    ];
    let mut map = serde_json::Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-00002.safetensors", index + 1);
        let mut writer = CheckpointWriter::create(folder.join(&name)).expect("a writer");
        for weight in shard {
            writer.write_weight(weight).expect("written");
            map.insert(weight.name().into(), name.clone().into());
        }
        writer.finish().expect("a file");
    }
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).expect("a file");
    write("model.safetensors.index.json", serde_json::json!({"weight_map": map}).to_string());
    let own = r#"{"quant_method": "fp8", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.layers.1"]}"#;
    write("config.json", format!("{{\"quantization_config\": {own}}}"));
}

#[test]
fn sync_quantises_a_checkpoint_as_plan_and_quantize_do_whatever_order_its_weights_have() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (model, fp8, out) = (path("model"), path("fp8"), path("out"));
    parted(Path::new(&model));
    let plan = succeeds(&["plan", "--model", &model]);
    let quantized: Vec<&str> = plan.lines().filter(|line| line.contains("\tquantize\t")).collect();
    assert_eq!(quantized.len(), 1, "{plan}");
    assert!(quantized[0].starts_with("model.layers.0.self_attn.o_proj.weight\t"), "{plan}");
    succeeds(&["quantize", &model, &fp8]);
    for backend in ["naive", "ipc"] {
        for who in ["--trainer-quantize-fp8", "--quantize-on-receive"] {
            let sync = ["sync", "--model", &model, "--backend", backend, who];
            succeeds(&[&sync[..], &["--verify", "--out", &out]].concat());
            succeeds(&["verify", &fp8, &format!("{out}/rollout-0")]);
            std::fs::remove_dir_all(&out).expect("removed");
        }
    }
}
