//! Synthetic models, and sources of weights that change from update to update.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use cli::checkpoint::CheckpointWriter;
use cli::roles::Trainer;
use cli::source::{ModelSpec, Source, SourceSpec, perturbed};
use cli::synthetic::{Residency, ResidentModel, StreamedModel, SyntheticModel, compare, fill};
use engine_core::{
    CheckpointEngine, DType, ErrorKind, Result, SendReport, TensorMeta, TrainerEngine, Version,
    Weight, WeightStream, no_copies,
};
use half::{bf16, f16};
use proptest::prelude::*;

type IsNan = fn(u8) -> bool;

fn bytes(meta: &TensorMeta, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; meta.byte_len().unwrap() as usize];
    fill(meta, Version(version), 0..bytes.len() as u64, &mut bytes);
    bytes
}

fn synthetic(layers: Option<u32>) -> ModelSpec {
    ModelSpec::Synthetic { name: SyntheticModel::TinyMoe, layers }
}

#[test]
fn models_have_the_published_numbers_of_parameters_and_tensors() {
    for (model, parameters, tensors) in [
        (SyntheticModel::Qwen2_5_0_5B, 494_032_768, 290),
        (SyntheticModel::Qwen2_5_7B, 7_615_616_512, 339),
        (SyntheticModel::Qwen3_30BA3B, 30_532_122_624, 18_867),
    ] {
        let metas = model.metas(None).unwrap();
        let sum: u64 = metas.iter().map(|meta| meta.elements().unwrap()).sum();
        assert_eq!(sum, parameters, "{model}");
        assert_eq!(metas.len(), tensors, "{model}");
        assert!(metas.iter().all(|meta| meta.dtype == DType::BF16));
        assert_eq!(model.name().parse::<SyntheticModel>().unwrap(), model);
    }
}

#[test]
fn the_largest_models_have_the_published_billions_of_parameters() {
    for (model, billions, experts) in
        [(SyntheticModel::DeepSeekV3, 671, 58 * 256), (SyntheticModel::KimiK2, 1026, 60 * 384)]
    {
        let metas = model.metas(None).unwrap();
        let sum: u64 = metas.iter().map(|meta| meta.elements().unwrap()).sum();
        assert_eq!(sum / 1_000_000_000, billions, "{model}");
        let is_expert = |meta: &&TensorMeta| meta.name.contains(".experts.");
        assert_eq!(metas.iter().filter(is_expert).count(), experts * 3, "{model}");
        let shape = |name: &str| {
            let name = format!("model.layers.60.{name}");
            metas.iter().find(|meta| *meta.name == name).unwrap().shape.to_vec()
        };
        assert_eq!(shape("mlp.experts.255.down_proj.weight"), [7168, 2048]);
        assert_eq!(shape("self_attn.kv_a_proj_with_mqa.weight"), [576, 7168]);
        assert_eq!(
            shape("mlp.gate.e_score_correction_bias"),
            [experts as u64 / (61 - if billions == 671 { 3 } else { 1 })]
        );
    }
}

#[test]
fn models_have_the_names_and_shapes_of_their_checkpoints() {
    let shape = |model: SyntheticModel, name: &str| {
        let metas = model.metas(None).unwrap();
        metas.iter().find(|meta| &*meta.name == name).map(|meta| meta.shape.to_vec())
    };
    let (small, dense, experts) =
        (SyntheticModel::Qwen2_5_0_5B, SyntheticModel::Qwen2_5_7B, SyntheticModel::Qwen3_30BA3B);
    assert_eq!(shape(small, "lm_head.weight"), None);
    assert_eq!(shape(small, "model.layers.23.self_attn.k_proj.bias"), Some(vec![128]));
    assert_eq!(shape(dense, "lm_head.weight"), Some(vec![152_064, 3584]));
    assert_eq!(shape(dense, "model.layers.27.mlp.down_proj.weight"), Some(vec![3584, 18_944]));
    assert_eq!(shape(experts, "model.layers.47.mlp.gate.weight"), Some(vec![128, 2048]));
    assert_eq!(
        shape(experts, "model.layers.0.mlp.experts.127.down_proj.weight"),
        Some(vec![2048, 768])
    );
    assert_eq!(shape(experts, "model.layers.0.self_attn.q_norm.weight"), Some(vec![128]));
    assert_eq!(shape(experts, "model.layers.0.self_attn.o_proj.weight"), Some(vec![2048, 4096]));
    assert_eq!(shape(experts, "model.layers.0.self_attn.q_proj.bias"), None);
}

#[test]
fn the_tiny_model_has_experts_a_scalar_and_two_types_in_a_few_megabytes() {
    let metas = SyntheticModel::TinyMoe.metas(None).unwrap();
    let size: u64 = metas.iter().map(|meta| meta.byte_len().unwrap()).sum();
    assert!((2_000_000..12_000_000).contains(&size), "{size}");
    assert!(metas.iter().any(|meta| meta.shape.is_empty() && meta.dtype == DType::F32));
    assert!(metas.iter().any(|meta| meta.name.contains("experts.15.")));
    assert!(metas.iter().any(|meta| meta.byte_len().unwrap() % 256 != 0));
}

#[test]
fn a_slice_of_layers_is_a_smaller_model_and_more_than_all_is_an_error() {
    let model = SyntheticModel::Qwen3_30BA3B;
    let two = model.metas(Some(2)).unwrap();
    assert_eq!(two.len(), 3 + 2 * 393);
    assert!(two.iter().all(|meta| !meta.name.contains("layers.2.")));
    assert_eq!(model.metas(Some(0)).unwrap().len(), 3);
    assert_eq!(model.metas(Some(49)).unwrap_err().kind(), ErrorKind::Config);
    let error = "qwen9".parse::<SyntheticModel>().unwrap_err();
    assert!(error.to_string().contains("qwen2.5-7b"), "{error}");
}

#[test]
fn values_are_finite_and_of_the_sizes_that_weights_have() {
    let magnitudes = |dtype, read: fn(&[u8]) -> f64| {
        let meta = TensorMeta::new("w", dtype, [10_000]);
        let size = (dtype.bits() / 8) as usize;
        let values: Vec<f64> = bytes(&meta, 1).chunks(size).map(read).collect();
        assert!(values.iter().all(|v| (2_f64.powi(-9)..0.5).contains(&v.abs())), "{dtype}");
        let negative = values.iter().filter(|v| **v < 0.0).count();
        assert!((4000..6000).contains(&negative), "{dtype}: {negative}");
        for exponent in -9..-1 {
            let here = values.iter().filter(|v| v.abs().log2().floor() as i32 == exponent).count();
            assert!((1000..1500).contains(&here), "{dtype}: {here} at {exponent}");
        }
    };
    magnitudes(DType::BF16, |b| bf16::from_le_bytes([b[0], b[1]]).to_f64());
    magnitudes(DType::F16, |b| f16::from_le_bytes([b[0], b[1]]).to_f64());
    magnitudes(DType::F32, |b| f32::from_le_bytes(b.try_into().unwrap()).into());
    magnitudes(DType::F64, |b| f64::from_le_bytes(b.try_into().unwrap()));
}

#[test]
fn no_8_bit_type_gets_a_nan() {
    let nan: [(DType, IsNan); 5] = [
        (DType::F8_E4M3, |b| b & 0x7f == 0x7f),
        (DType::F8_E5M2, |b| b & 0x7c == 0x7c),
        (DType::F8_E8M0, |b| b == 0xff),
        (DType::F8_E4M3FNUZ, |b| b == 0x80),
        (DType::F8_E5M2FNUZ, |b| b == 0x80),
    ];
    for (dtype, is_nan) in nan {
        let meta = TensorMeta::new("w", dtype, [100_000]);
        assert!(!bytes(&meta, 1).into_iter().any(is_nan), "{dtype}");
    }
}

#[test]
fn every_name_and_version_has_values_of_its_own() {
    let meta = |name: &str| TensorMeta::new(name, DType::BF16, [4096]);
    let base = bytes(&meta("layers.1.w"), 1);
    for other in [bytes(&meta("layers.2.w"), 1), bytes(&meta("layers.1.w"), 2)] {
        let same = base.chunks(2).zip(other.chunks(2)).filter(|(a, b)| a == b).count();
        assert!(same < 40, "{same} of 4096 values are the same");
    }
    // Nor do two places of a tensor look alike, so that a misplaced chunk is noticed.
    let halves = base.split_at(base.len() / 2);
    assert_ne!(halves.0, halves.1);
}

proptest! {
    #[test]
    fn any_division_of_a_tensor_gives_the_same_bytes(
        cuts in prop::collection::vec(0..5000_u64, 0..12),
        dtype in prop::sample::select(vec![DType::BF16, DType::F32, DType::U8]),
    ) {
        let len = 5000 * dtype.bits() / 8;
        let meta = TensorMeta::new("w", dtype, [5000]);
        let whole = bytes(&meta, 7);
        let mut edges = [cuts, vec![0, len]].concat();
        edges.sort_unstable();
        for edge in edges.windows(2) {
            let mut part = vec![0; (edge[1] - edge[0]) as usize];
            fill(&meta, Version(7), edge[0]..edge[1], &mut part);
            prop_assert_eq!(&part, &whole[edge[0] as usize..edge[1] as usize]);
            prop_assert_eq!(compare(&meta, Version(7), edge[0], &part), Ok(()));
        }
    }

    #[test]
    fn compare_finds_the_first_wrong_byte(
        offset in 0..3000_u64, len in 1..20_000_usize, at in any::<prop::sample::Index>(),
    ) {
        let meta = TensorMeta::new("w", DType::BF16, [20_000]);
        let mut part = vec![0; len];
        fill(&meta, Version(7), offset..offset + len as u64, &mut part);
        let at = at.index(len);
        part[at] ^= 1;
        *part.last_mut().unwrap() ^= 2;
        prop_assert_eq!(compare(&meta, Version(7), offset, &part), Err(offset + at as u64));
    }

    #[test]
    fn any_division_of_a_perturbed_weight_gives_the_same_bytes(
        cuts in prop::collection::vec(0..40_000_u64, 0..12), steps in 0..4_u64,
        dtype in prop::sample::select(vec![DType::BF16, DType::F32, DType::F8_E4M3, DType::F4]),
    ) {
        let len = 40_000_u64;
        let data: Vec<u8> = (0..len).map(|i| (i * i / 7) as u8).collect();
        let shape = [len * 8 / dtype.bits()];
        let weight = perturbed(Weight::new("w", dtype, shape, data).unwrap(), steps).unwrap();
        let whole = weight.to_bytes().unwrap();
        let mut edges = [cuts, vec![0, len]].concat();
        edges.sort_unstable();
        for edge in edges.windows(2) {
            let mut part = vec![0; (edge[1] - edge[0]) as usize];
            weight.encode(edge[0]..edge[1], &mut part).unwrap();
            prop_assert_eq!(&part[..], &whole[edge[0] as usize..edge[1] as usize]);
        }
    }
}

#[test]
fn a_resident_model_and_a_streamed_one_have_the_same_weights() {
    let metas = SyntheticModel::TinyMoe.metas(None).unwrap();
    let resident = ResidentModel::new(metas.clone(), Version(5)).unwrap();
    let streamed = StreamedModel::new(metas.clone());
    let weights: Vec<_> = resident.weights().zip(streamed.weights(Version(5))).collect();
    assert_eq!(weights.len(), metas.len());
    for ((a, b), meta) in weights.into_iter().zip(metas) {
        let (a, b) = (a.unwrap(), b.unwrap());
        assert_eq!((&**a.meta(), &**b.meta()), (&meta, &meta));
        assert_eq!(a.to_bytes().unwrap(), b.to_bytes().unwrap());
        assert_eq!(a.contiguous_bytes().unwrap(), &bytes(&meta, 5));
    }
}

#[test]
fn a_resident_model_advances_in_place_once_nobody_reads_it() {
    let metas = SyntheticModel::TinyMoe.metas(Some(1)).unwrap();
    let mut model = ResidentModel::new(metas, Version(1)).unwrap();
    let weight = model.weights().next().unwrap().unwrap();
    let place = weight.contiguous_bytes().unwrap().as_ptr();
    let before = weight.to_bytes().unwrap().to_vec();
    assert_eq!(model.advance(Version(2)).unwrap_err().kind(), ErrorKind::State);
    assert_eq!(model.version(), Version(1));
    drop(weight);
    model.advance(Version(2)).unwrap();
    let weight = model.weights().next().unwrap().unwrap();
    assert_eq!(weight.contiguous_bytes().unwrap().as_ptr(), place);
    assert_ne!(weight.contiguous_bytes().unwrap()[..], before[..]);
}

#[test]
fn a_model_is_kept_in_memory_if_it_takes_at_most_75_percent_of_what_is_free() {
    let residency = |model, available| Residency { model, available };
    assert!(residency(75, Some(100)).is_resident());
    assert!(!residency(76, Some(100)).is_resident());
    assert!(residency(76, None).is_resident());
    assert!(residency(76, Some(100)).to_string().contains("generated"));
    assert!(Residency::of(1 << 20).is_resident());
    assert!(!Residency::of(1 << 60).is_resident());
}

#[test]
fn perturbing_changes_some_lowest_bits_and_differs_from_step_to_step() {
    let meta = TensorMeta::new("w", DType::BF16, [80_000]);
    let weight = Weight::from_meta(meta.clone(), bytes(&meta, 0)).unwrap();
    let original = weight.to_bytes().unwrap();
    let steps: Vec<_> =
        (0..3).map(|steps| perturbed(weight.clone(), steps).unwrap().to_bytes().unwrap()).collect();
    assert_eq!(steps[0], original);
    for (a, b, odds) in [(0, 1, 0.125), (0, 2, 0.125), (1, 2, 0.21875)] {
        let pairs = steps[a].chunks(2).zip(steps[b].chunks(2));
        let changed = pairs.filter(|(a, b)| a != b).count() as f64 / 80_000.0;
        assert!((changed - odds).abs() < 0.01, "{a} {b}: {changed}");
    }
    assert!(steps[0].iter().zip(&steps[1]).all(|(a, b)| (a ^ b) & !1 == 0));
}

#[test]
fn perturbing_keeps_finite_values_finite_and_integers_as_they_are() {
    let every = |dtype, bytes: Vec<u8>| {
        let elements = bytes.len() as u64 * 8 / DType::bits(dtype);
        let weight = Weight::new("w", dtype, [elements], bytes.clone()).unwrap();
        (bytes, perturbed(weight, 1).unwrap().to_bytes().unwrap().to_vec())
    };
    let words: Vec<u8> = (0..8).flat_map(|_| (0..=u16::MAX).flat_map(u16::to_le_bytes)).collect();
    let finite: [fn([u8; 2]) -> bool; 2] =
        [|b| bf16::from_le_bytes(b).is_finite(), |b| f16::from_le_bytes(b).is_finite()];
    for (dtype, finite) in [DType::BF16, DType::F16].into_iter().zip(finite) {
        let (before, after) = every(dtype, words.clone());
        for (a, b) in before.as_chunks().0.iter().zip(after.as_chunks().0) {
            assert_eq!(finite(*a), finite(*b), "{dtype} {a:?} {b:?}");
        }
        assert_ne!(before, after);
    }
    let narrow: Vec<u8> = (0..64).flat_map(|_| 0..=u8::MAX).collect();
    let nan: [(DType, IsNan); 3] = [
        (DType::F8_E4M3, |b| b & 0x7f == 0x7f),
        (DType::F8_E4M3FNUZ, |b| b == 0x80),
        (DType::F8_E5M2FNUZ, |b| b == 0x80),
    ];
    for (dtype, is_nan) in nan {
        let (before, after) = every(dtype, narrow.clone());
        assert!(before.iter().zip(&after).all(|(&a, &b)| is_nan(a) == is_nan(b)), "{dtype}");
        assert_ne!(before, after);
    }
    for dtype in [DType::I64, DType::BOOL, DType::F8_E8M0, DType::F6_E2M3] {
        let (before, after) = every(dtype, narrow[..3072].to_vec());
        assert_eq!(before, after, "{dtype}");
    }
}

/// Sends every weight of an update in chunks, and checks each on a receiver opened from the
/// specification as it travels.
fn transfer(trainer: &mut Source, version: u64) {
    let spec = serde_json::to_string(trainer.spec()).unwrap();
    let rollout = Source::open(serde_json::from_str(&spec).unwrap()).unwrap();
    let mut seen = 0;
    for weight in trainer.weights(Version(version)).unwrap() {
        let weight = weight.unwrap();
        let bytes = weight.to_bytes().unwrap();
        for (chunk, at) in bytes.chunks(1003).zip((0..).step_by(1003)) {
            rollout.check(weight.meta(), Version(version), at, chunk).unwrap();
        }
        if bytes.len() > 64 {
            let late = rollout.check(weight.meta(), Version(version + 1), 0, &bytes);
            assert_eq!(late.unwrap_err().kind(), ErrorKind::Digest, "{}", weight.name());
        }
        seen += 1;
    }
    assert_eq!(seen, trainer.tensors());
}

fn checkpoint(folder: &Path) {
    let mut writer = CheckpointWriter::in_folder(folder).unwrap();
    for (name, dtype) in [("a", DType::BF16), ("b", DType::F32), ("c", DType::F16)] {
        let meta = TensorMeta::new(name, dtype, [333, 7]);
        writer.write_chunk(&meta, 0, &bytes(&meta, 0)).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn a_receiver_checks_every_chunk_of_every_update_of_either_source() {
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path());
    for model in [synthetic(Some(1)), ModelSpec::Checkpoint { path: folder.path().into() }] {
        let mut trainer = Source::open(SourceSpec::new(model, 4)).unwrap();
        for version in 1..=3 {
            trainer.advance(Version(version)).unwrap();
            transfer(&mut trainer, version);
        }
    }
}

#[test]
fn the_last_update_of_a_checkpoint_carries_exactly_its_files() {
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path());
    let model = ModelSpec::Checkpoint { path: folder.path().into() };
    let mut source = Source::open(SourceSpec::new(model, 2)).unwrap();
    let files = cli::checkpoint::Checkpoint::open(folder.path()).unwrap();
    let mut equal = |version| -> Vec<bool> {
        let weights = source.weights(Version(version)).unwrap();
        weights
            .map(|weight| {
                let weight = weight.unwrap();
                weight.to_bytes().unwrap() == files.bytes(weight.name()).unwrap()
            })
            .collect()
    };
    assert_eq!(equal(1), [false; 3]);
    assert_eq!(equal(2), [true; 3]);
}

#[test]
fn a_wrong_byte_a_wrong_shape_and_a_wrong_name_are_told_apart() {
    let mut trainer = Source::open(SourceSpec::new(synthetic(None), 1)).unwrap();
    let version = Version(1);
    let weight = trainer.weights(version).unwrap().next().unwrap().unwrap();
    let mut bytes = weight.to_bytes().unwrap().to_vec();
    let meta = weight.meta().clone();
    bytes[4097] ^= 4;
    let error = trainer.check(&meta, version, 0, &bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Digest);
    assert!(error.to_string().contains("byte 4097"), "{error}");
    assert_eq!(error.report().tensor.as_deref(), Some(&*meta.name));
    let mismatch = |meta: &TensorMeta, offset| {
        let error = trainer.check(meta, version, offset, &bytes[..10]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
    };
    mismatch(&TensorMeta::new("model.other", DType::BF16, [1]), 0);
    mismatch(&TensorMeta { dtype: DType::F16, ..TensorMeta::clone(&meta) }, 0);
    mismatch(&meta, meta.byte_len().unwrap() - 9);
    mismatch(&meta, u64::MAX - 3);
}

#[test]
fn weights_of_the_last_update_must_be_gone_before_the_next() {
    let mut source = Source::open(SourceSpec::new(synthetic(Some(1)), 2)).unwrap();
    let held: Vec<_> = source.weights(Version(1)).unwrap().collect();
    assert_eq!(source.weights(Version(2)).err().unwrap().kind(), ErrorKind::State);
    drop(held);
    assert!(source.weights(Version(2)).is_ok());
}

/// An engine of a group without rollouts.
#[derive(Debug)]
struct Alone;

#[async_trait]
impl CheckpointEngine for Alone {
    async fn finalize(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl TrainerEngine for Alone {
    async fn send_weights(&mut self, _: WeightStream<'_>, version: Version) -> Result<SendReport> {
        Ok(SendReport::new(version))
    }

    async fn send_part(&mut self, _: WeightStream<'_>, _: Version) -> Result<SendReport> {
        Err(no_copies("sending a part of a version"))
    }

    async fn attest(&mut self) -> Result<SendReport> {
        Err(no_copies("attesting a version"))
    }
}

#[test]
fn a_trainer_waits_for_those_who_still_read_an_update_that_failed() {
    let spec = SourceSpec::new(synthetic(Some(1)), 2);
    let mut trainer = Trainer {
        engine: Box::new(Alone),
        source: Source::open(spec).unwrap(),
        shard: None,
        attests: false,
    };
    let held: Vec<_> = trainer.source.weights(Version(1)).unwrap().collect();
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(held);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let report = runtime.block_on(trainer.update(Version(2))).unwrap();
    assert_eq!(report.version, Version(2));
    reader.join().unwrap();
}
