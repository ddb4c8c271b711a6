//! Versions in a folder: what readers find there while trainers publish, end, fail and start again.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use backend_dir::{BACKEND, Versions};
use engine_core::{
    CheckpointEngineConfig, DType, EngineContext, Error, ErrorKind, Rank, Result, TrainerEngine,
    Version, Weight, ensure_async_iterator, form_local_group,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn config(path: &Path, options: Value) -> CheckpointEngineConfig {
    let mut config = CheckpointEngineConfig::new("dir");
    config.update_weights_bucket_megabytes = Some(1);
    config.threads = std::num::NonZeroUsize::new(2);
    let section = config.engine_kwargs.entry("dir".into()).or_default();
    section.insert("path".into(), path.to_str().unwrap().into());
    if let Value::Object(options) = options {
        section.extend(options);
    }
    config
}

/// A trainer that only publishes.
async fn publisher(path: &Path, options: Value) -> Result<Box<dyn TrainerEngine>> {
    let context = EngineContext::new(config(path, options)).with_rank(Rank::LEADER);
    let prepared = BACKEND.prepare_trainer(context).await?;
    let (mut trainers, _) = form_local_group(BACKEND, vec![prepared], Vec::new()).await?;
    Ok(trainers.remove(0))
}

/// Tensors, one of them larger than a bucket, whose bytes depend on a seed in a few places.
fn model(seed: u64) -> Vec<Weight> {
    let weight = |name: &str, dtype: DType, shape: &[u64], place: usize| {
        let len = shape.iter().product::<u64>() * dtype.bytes().unwrap();
        let mut bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
        for (at, byte) in bytes.iter_mut().enumerate().filter(|(at, _)| at % 1000 == place) {
            *byte ^= (seed as u8).wrapping_mul(at as u8 | 1);
        }
        Weight::new(name, dtype, shape, bytes).unwrap()
    };
    vec![
        weight("embed", DType::BF16, &[600, 1024], 3),
        weight("norm", DType::F32, &[7], 1),
        weight("frozen", DType::U8, &[900], 5000),
        weight("empty", DType::F32, &[0, 4], 0),
        weight("head", DType::F8_E4M3, &[300, 100], 7),
    ]
}

async fn publish(trainer: &mut dyn TrainerEngine, version: u64, weights: Vec<Weight>) {
    trainer.send_weights(ensure_async_iterator(weights), Version(version)).await.unwrap();
}

/// What a version has, by name.
fn read(versions: &Versions, version: u64) -> Result<BTreeMap<String, Vec<u8>>> {
    let weights = versions.open(Version(version))?.weights();
    weights.map(|weight| weight.and_then(|weight| named(&weight))).collect()
}

fn named(weight: &Weight) -> Result<(String, Vec<u8>)> {
    Ok((weight.name().to_owned(), weight.to_bytes()?.to_vec()))
}

fn contents(weights: &[Weight]) -> BTreeMap<String, Vec<u8>> {
    weights.iter().map(|weight| named(weight).unwrap()).collect()
}

fn numbers(path: &Path) -> Vec<u64> {
    Versions::new(path).list().unwrap().into_iter().map(|version| version.0).collect()
}

/// What is in the folder beside versions.
fn hidden(path: &Path) -> Vec<String> {
    let names = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name());
    let names = names.map(|name| name.into_string().unwrap());
    names.filter(|name| name.starts_with(".staging") || name.starts_with(".removed")).collect()
}

/// What a failed update has written is removed beside its end.
async fn is_tidied(path: &Path) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !hidden(path).is_empty() {
        assert!(std::time::Instant::now() < end, "{:?}", hidden(path));
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

fn refused<T>(result: Result<T>, kind: ErrorKind, words: &str) -> Error {
    let error = result.err().expect("an error");
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(words), "{error}");
    error
}

#[test]
fn a_version_is_a_checkpoint_whose_files_the_formats_own_library_reads() {
    let folder = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut trainer = publisher(folder.path(), json!({})).await.unwrap();
        publish(&mut *trainer, 7, model(1)).await;
        trainer.finalize().await.unwrap();
    });
    let version = folder.path().join("weight_v000007");
    let index = fs::read(version.join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["metadata"]["version"], "000007");
    assert_eq!(index["metadata"].get("delta_encoding"), None);
    let mut found = BTreeMap::new();
    for (name, file) in index["weight_map"].as_object().unwrap() {
        let bytes = fs::read(version.join(file.as_str().unwrap())).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        found.insert(name.clone(), tensors.tensor(name).unwrap().data().to_vec());
    }
    assert_eq!(found, contents(&model(1)));
    assert_eq!(read(&Versions::new(folder.path()), 7).unwrap(), found);
}

#[derive(Clone, Debug)]
enum Step {
    Publish {
        seed: u8,
    },
    /// Other tensors than before.
    Reshape,
    /// The source fails, so that the update does.
    Fail,
    /// The trainer's process ends, in order or not, and another one starts.
    Restart,
    /// The trainer goes back so many versions.
    Back(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0_u8..4).prop_map(|seed| Step::Publish { seed }),
        1 => Just(Step::Reshape),
        1 => Just(Step::Fail),
        1 => Just(Step::Restart),
        1 => (0_u64..4).prop_map(Step::Back),
    ];
    proptest::collection::vec(step, 1..16)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]

    #[test]
    fn whatever_happens_every_version_that_is_there_is_what_was_published_last_under_its_number(
        steps in steps(),
        changes in prop_oneof![Just(Value::Null), Just(json!("xor")), Just(json!("overwrite"))],
        checksum in prop_oneof![Just("xxh3-128"), Just("blake3"), Just("adler32")],
        (keep, anchor_every) in (1_usize..4, 1_u64..5),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let options = json!({
            "changes": changes, "checksum": checksum, "keep": keep, "anchor_every": anchor_every,
        });
        let mut published = BTreeMap::new();
        let (mut version, mut reshaped) = (0, false);
        runtime().block_on(async {
            let mut trainer = publisher(path, options.clone()).await.unwrap();
            for step in steps {
                match step {
                    Step::Publish { .. } | Step::Reshape => {
                        reshaped ^= matches!(step, Step::Reshape);
                        let seed = if let Step::Publish { seed } = step { seed } else { 0 };
                        let mut weights = model(seed.into());
                        if reshaped {
                            weights.remove(1);
                        }
                        version += 1;
                        published.retain(|number, _| *number < version);
                        let least = keep.min(published.len() + 1);
                        published.insert(version, contents(&weights));
                        publish(&mut *trainer, version, weights).await;
                        let here = numbers(path);
                        assert!(here.len() >= least, "{here:?} of which {least} are kept");
                        published.retain(|number, _| here.contains(number));
                    }
                    Step::Fail => {
                        let weights = model(9).into_iter().map(Ok);
                        let weights = weights.chain([Err(std::io::Error::other("gone"))]);
                        let weights = ensure_async_iterator(weights);
                        let sent = trainer.send_weights(weights, Version(version + 1)).await;
                        refused(sent, ErrorKind::Source, "gone");
                        is_tidied(path).await;
                    }
                    Step::Restart => {
                        drop(trainer);
                        trainer = publisher(path, options.clone()).await.unwrap();
                        assert!(hidden(path).is_empty());
                    }
                    Step::Back(by) => version = version.saturating_sub(by),
                }
                let versions = Versions::new(path);
                let here = numbers(path);
                assert!(here.iter().eq(published.keys()), "{here:?}");
                for number in here {
                    assert_eq!(read(&versions, number).unwrap(), published[&number], "{number}");
                }
            }
        });
    }
}

#[test]
fn only_so_many_versions_are_kept_and_what_they_are_based_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    runtime().block_on(async {
        let mut trainer = publisher(path, json!({"keep": 2})).await.unwrap();
        for version in 1..5 {
            publish(&mut *trainer, version, model(version)).await;
        }
        assert_eq!(numbers(path), [3, 4]);
        drop(trainer);
        let options = json!({"keep": 2, "changes": "xor", "anchor_every": 3});
        let mut trainer = publisher(path, options).await.unwrap();
        let mut seen = Vec::new();
        for version in 5..13 {
            publish(&mut *trainer, version, model(version)).await;
            seen.push(numbers(path));
        }
        // 4 is whole, 5 to 7 change it; 8 is whole, and so on.
        assert_eq!(seen[3], [4, 5, 6, 7, 8]);
        assert_eq!(seen[4], [8, 9]);
        assert_eq!(seen[7], [8, 9, 10, 11, 12]);
        assert_eq!(Versions::new(path).open(Version(11)).unwrap().changes(), 3);
        assert_eq!(Versions::new(path).open(Version(12)).unwrap().changes(), 0);
    });
}

#[test]
fn a_version_that_somebody_reads_stays_and_so_does_what_it_is_based_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    runtime().block_on(async {
        let options = json!({"keep": 1, "changes": "overwrite", "anchor_every": 2});
        let mut trainer = publisher(path, options).await.unwrap();
        publish(&mut *trainer, 1, model(1)).await;
        publish(&mut *trainer, 2, model(2)).await;
        let reader = Versions::new(path).open(Version(2)).unwrap();
        for version in 3..8 {
            publish(&mut *trainer, version, model(version)).await;
        }
        assert_eq!(numbers(path), [1, 2, 7]);
        let again = read(&Versions::new(path), 2).unwrap();
        assert_eq!(again, contents(&model(2)));
        drop(reader);
        publish(&mut *trainer, 8, model(8)).await;
        assert_eq!(numbers(path), [7, 8]);
    });
}

#[test]
fn a_bit_that_flipped_in_a_version_is_found_and_its_tensor_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    runtime().block_on(async {
        let options = json!({"changes": "xor"});
        let mut trainer = publisher(path, options).await.unwrap();
        publish(&mut *trainer, 1, model(1)).await;
        publish(&mut *trainer, 2, model(2)).await;
    });
    let flip = |version: u64, back: usize| {
        let file = path.join(format!("weight_v{version:06}/model-00000.safetensors"));
        let mut bytes = fs::read(&file).unwrap();
        let at = bytes.len() - back;
        bytes[at] ^= 4;
        fs::write(file, bytes).unwrap();
    };
    let versions = Versions::new(path);
    flip(1, 1);
    let error = refused(read(&versions, 1), ErrorKind::Digest, "its digest is");
    let tensor = error.report().tensor.clone();
    assert_eq!(
        refused(read(&versions, 2), ErrorKind::Digest, "its digest is").report().tensor,
        tensor
    );
    flip(1, 1);
    read(&versions, 2).unwrap();
    flip(2, 4);
    let error = read(&versions, 2).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Digest | ErrorKind::Protocol), "{error}");
    assert!(error.report().tensor.is_some(), "{error}");
}

#[test]
fn what_is_missing_in_a_folder_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    runtime().block_on(async {
        let mut trainer = publisher(path, json!({"changes": "xor", "keep": 9})).await.unwrap();
        for version in 1..4 {
            publish(&mut *trainer, version, model(version)).await;
        }
    });
    let versions = Versions::new(path);
    refused(versions.open(Version(9)), ErrorKind::State, "no such version");
    fs::remove_dir_all(path.join("weight_v000001")).unwrap();
    let error = refused(versions.open(Version(3)), ErrorKind::State, "based on version 1");
    assert_eq!(error.report().version, Some(Version(3)));
    let nowhere = Versions::new(path.join("nowhere"));
    assert_eq!(nowhere.newest().unwrap_err().kind(), ErrorKind::Io);
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(Versions::new(empty.path()).newest().unwrap(), None);
}

#[test]
fn configurations_that_cannot_be_meant_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    runtime().block_on(async {
        let nothing = EngineContext::new(CheckpointEngineConfig::new("dir"));
        refused(BACKEND.prepare_trainer(nothing).await, ErrorKind::Config, "set `path`");
        let both = publisher(path, json!({"changes": "xor", "keep": 0})).await;
        refused(both, ErrorKind::Config, "`keep` is 0");
        let unknown = publisher(path, json!({"changes": "add"})).await;
        refused(unknown, ErrorKind::Config, "add");
        let first = publisher(path, json!({})).await.unwrap();
        let second = publisher(path, json!({})).await;
        refused(second, ErrorKind::State, "another trainer publishes in");
        first.finalize().await.unwrap();
        publisher(path, json!({})).await.unwrap();
        let file = path.join("file");
        fs::write(&file, "no folder").unwrap();
        assert!(publisher(&file, json!({})).await.is_err());
    });
}

#[test]
fn nothing_stays_of_an_update_where_no_version_is_kept() {
    let folder: TempDir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut trainer = publisher(folder.path(), json!({"keep": 0})).await.unwrap();
        publish(&mut *trainer, 1, model(1)).await;
        trainer.finalize().await.unwrap();
    });
    assert!(numbers(folder.path()).is_empty());
    assert!(hidden(folder.path()).is_empty());
}

#[test]
fn a_trainer_that_was_killed_between_any_two_steps_of_publishing_is_followed_by_one_that_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let options = json!({"changes": "xor", "keep": 9});
    let (base, kept) = (path.join(".base"), path.join("kept"));
    runtime().block_on(async {
        let mut trainer = publisher(path, options.clone()).await.unwrap();
        publish(&mut *trainer, 1, model(1)).await;
        publish(&mut *trainer, 2, model(2)).await;
        fs::create_dir(&kept).unwrap();
        for entry in fs::read_dir(&base).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), kept.join(entry.file_name())).unwrap();
        }
        publish(&mut *trainer, 3, model(3)).await;
        drop(trainer);
        // Version 3 had its name, and the base was not replaced yet.
        fs::remove_dir_all(&base).unwrap();
        fs::rename(&kept, &base).unwrap();
        // A version was being written, and another one removed.
        fs::create_dir_all(path.join(".staging-a/b")).unwrap();
        fs::write(path.join(".staging-a/model-00000.safetensors"), "half").unwrap();
        fs::create_dir_all(path.join(".removed-c/version")).unwrap();
        let mut trainer = publisher(path, options.clone()).await.unwrap();
        assert!(hidden(path).is_empty());
        let versions = Versions::new(path);
        publish(&mut *trainer, 4, model(4)).await;
        assert_eq!(versions.open(Version(4)).unwrap().changes(), 0);
        publish(&mut *trainer, 5, model(5)).await;
        assert_eq!(versions.open(Version(5)).unwrap().changes(), 1);
        drop(trainer);
        // The base was put away, and its successor had not its place yet: the next one is whole.
        publish_and_lose_base(path, &options, &base).await;
        for version in 1..8 {
            assert_eq!(read(&versions, version).unwrap(), contents(&model(version)), "{version}");
        }
    });
}

async fn publish_and_lose_base(path: &Path, options: &Value, base: &Path) {
    let mut trainer = publisher(path, options.clone()).await.unwrap();
    publish(&mut *trainer, 6, model(6)).await;
    fs::remove_dir_all(base).unwrap();
    publish(&mut *trainer, 7, model(7)).await;
    assert_eq!(Versions::new(path).open(Version(7)).unwrap().changes(), 0);
}
