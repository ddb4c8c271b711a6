//! The other side is slime's own code: its reader of disk deltas, and its writer.
//!
//! `CKPT_ENGINE_SLIME` is a folder with slime's sources, `CKPT_ENGINE_SLIME_PYTHON` a Python with what
//! `xtask/tools/slime_peer.py` needs.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use backend_dir::{BACKEND, Versions};
use engine_core::{
    CheckpointEngineConfig, DType, EngineContext, Rank, Version, Weight, ensure_async_iterator,
    form_local_group,
};
use serde_json::{Value, json};

type Contents = BTreeMap<String, Vec<u8>>;

/// Tensors that are the same in most places whatever the seed, one of them always.
fn model(seed: u64) -> Vec<Weight> {
    let weight = |name: &str, dtype: DType, shape: &[u64], stride: usize| {
        let len = shape.iter().product::<u64>() * dtype.bytes().unwrap();
        let mut bytes: Vec<u8> = (0..len).map(|at| (at * 7 % 251) as u8).collect();
        for byte in bytes.iter_mut().step_by(stride) {
            *byte = byte.wrapping_add(seed as u8);
        }
        Weight::new(name, dtype, shape, bytes).unwrap()
    };
    let frozen = Weight::new("frozen", DType::U8, [500], vec![9; 500]).unwrap();
    vec![
        weight("model.embed_tokens.weight", DType::BF16, &[1500, 800], 997),
        weight("model.layers.0.mlp.up_proj.weight", DType::F8_E4M3, &[300, 128], 101),
        weight("model.layers.0.mlp.up_proj.weight_scale_inv", DType::F32, &[3, 1], 5),
        weight("model.norm.weight", DType::BF16, &[33], 11),
        frozen,
    ]
}

fn contents(weights: &[Weight]) -> Contents {
    let bytes = |weight: &Weight| weight.to_bytes().unwrap().to_vec();
    weights.iter().map(|weight| (weight.name().to_owned(), bytes(weight))).collect()
}

/// Publishes these models, one version each, beginning with version 1.
fn publish(path: &Path, options: &Value, seeds: impl IntoIterator<Item = u64>) {
    let mut config = CheckpointEngineConfig::new("dir");
    config.update_weights_bucket_megabytes = Some(1);
    let section = config.engine_kwargs.entry("dir".into()).or_default();
    section.insert("path".into(), path.to_str().unwrap().into());
    section.extend(options.as_object().unwrap().clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let context = EngineContext::new(config).with_rank(Rank::LEADER);
        let prepared = BACKEND.prepare_trainer(context).await.unwrap();
        let (mut trainers, _) = form_local_group(BACKEND, vec![prepared], vec![]).await.unwrap();
        for (version, seed) in (1..).map(Version).zip(seeds) {
            let weights = ensure_async_iterator(model(seed));
            trainers[0].send_weights(weights, version).await.unwrap();
        }
    });
}

/// Runs slime's code; what it says if it fails.
fn slime(args: &[&str]) -> Result<(), String> {
    let sources = std::env::var("CKPT_ENGINE_SLIME").expect("a folder with slime's sources");
    let python = std::env::var("CKPT_ENGINE_SLIME_PYTHON").unwrap_or("python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../xtask/tools/slime_peer.py");
    let output = Command::new(python).arg(script).arg(sources).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(said) }
}

/// The tensors of a checkpoint, by the format's own library.
fn checkpoint(path: &Path) -> Contents {
    let mut contents = Contents::new();
    for entry in fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = fs::read(path).unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            contents.extend(tensors.iter().map(|(name, view)| (name.into(), view.data().to_vec())));
        }
    }
    contents
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A checkpoint of a model, as slime's engines start from.
fn base(folder: &Path, seed: u64) -> PathBuf {
    let path = folder.join(format!("checkpoint-{seed}"));
    publish(&path, &json!({}), [seed]);
    path.join("weight_v000001")
}

#[test]
#[ignore = "needs slime's sources (CKPT_ENGINE_SLIME) and Python with numpy, zstandard, xxhash, blake3"]
fn slimes_reader_takes_every_version_one_after_the_other_or_late() {
    for (changes, checksum) in [
        (Value::Null, "xxh3-128"),
        (json!("xor"), "xxh3-128"),
        (json!("overwrite"), "blake3"),
        (json!("xor"), "adler32"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        let options = json!({
            "changes": changes, "checksum": checksum, "anchor_every": 3, "keep": 9,
        });
        publish(&source, &options, [1, 2, 2, 4, 5, 6]);
        let base = base(folder.path(), 100);
        let follower = folder.path().join("follower");
        for (version, seed) in [(1, 1), (2, 2), (3, 2), (4, 4), (5, 5), (6, 6)] {
            let late = folder.path().join(format!("late-{version}"));
            for local in [&follower, &late] {
                let number = version.to_string();
                slime(&["pull", text(&source), text(&base), text(local), &number]).unwrap();
                assert!(checkpoint(local) == contents(&model(seed)), "{changes} {version}");
            }
        }
    }
}

#[test]
#[ignore = "needs slime's sources (CKPT_ENGINE_SLIME) and Python with numpy, zstandard, xxhash, blake3"]
fn slimes_reader_refuses_a_version_of_ours_that_was_changed() {
    let folder = tempfile::tempdir().unwrap();
    let (source, local) = (folder.path().join("source"), folder.path().join("local"));
    publish(&source, &json!({"changes": "overwrite", "keep": 9}), [1, 2]);
    let file = source.join("weight_v000002/model-00000.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(bytes[8..8 + len].to_vec()).unwrap();
    let digest =
        header.find("model.norm.weight\":\"").unwrap() + 8 + "model.norm.weight\":\"".len();
    bytes[digest] = if bytes[digest] == b'0' { b'1' } else { b'0' };
    fs::write(file, bytes).unwrap();
    let pulled = slime(&["pull", text(&source), "/nowhere", text(&local), "2"]);
    let said = pulled.expect_err("a wrong digest");
    assert!(said.contains("checksum mismatch") && said.contains("model.norm.weight"), "{said}");
}

#[test]
#[ignore = "needs slime's sources (CKPT_ENGINE_SLIME) and Python with torch, numpy, zstandard, xxhash, blake3"]
fn versions_that_slimes_writer_wrote_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let base = base(folder.path(), 100);
    let seeds = [1, 2, 2, 4];
    let steps: Vec<PathBuf> = seeds
        .iter()
        .map(|seed| {
            let folder = folder.path().join(format!("step-{seed}"));
            if folder.exists() {
                folder.join("weight_v000001")
            } else {
                publish(&folder, &json!({}), [*seed]);
                folder.join("weight_v000001")
            }
        })
        .collect();
    for (encoding, checksum) in [
        ("xor", "xxh3-128"),
        ("overwrite", "blake3"),
        ("xor", "adler32"),
        ("overwrite", "xxh3-128"),
    ] {
        let source = folder.path().join(format!("{encoding}-{checksum}"));
        let mut args = vec!["publish", text(&base), text(&source), encoding, checksum];
        args.extend(steps.iter().map(|step| text(step)));
        slime(&args).unwrap();
        let versions = Versions::new(&source).with_base(&base);
        assert_eq!(versions.newest().unwrap(), Some(Version(4)));
        for (version, seed) in (1..).map(Version).zip(seeds) {
            let reader = versions.open(version).unwrap();
            let weights: Vec<Weight> = reader.weights().map(Result::unwrap).collect();
            assert!(
                contents(&weights) == contents(&model(seed)),
                "{encoding} {checksum} {version}"
            );
        }
    }
}
