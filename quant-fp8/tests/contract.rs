//! The format contract: what the flag and the section of each rank lead to.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use engine_core::{
    ArenaArc, CheckpointEngineConfig, DType, EngineContext, Error, ErrorKind, Placement,
    PreparedRollout, PreparedTrainer, Rank, Registry, Result, RolloutEngine, SendReport,
    TensorMeta, TrainerEngine, Version, Weight, WorkerMetadata, ensure_async_iterator,
};
use futures::future::join;
use quant_fp8::LAYER;
use serde_json::{Value, json};

/// A rank with its flag and its section.
///
/// Tests run beside one another: without a number each engine takes the lowest that is free in the process.
fn context(rank: u32, trainer_quantizes: bool, section: &Value) -> EngineContext {
    let mut config = CheckpointEngineConfig::default();
    config.layers = json!({"trainer_quantize_fp8": trainer_quantizes, "quantization": section})
        .as_object()
        .unwrap()
        .clone();
    config.timeout_seconds = 5.0;
    EngineContext::new(config).with_rank(Rank(rank))
}

async fn trainer(quantizes: bool, section: &Value) -> Result<PreparedTrainer> {
    let context = context(0, quantizes, section);
    Registry::new().with(backend_naive::BACKEND).with_layer(LAYER).prepare_trainer(context).await
}

async fn rollout(trainer_quantizes: bool, section: &Value) -> Result<PreparedRollout> {
    let context = context(1, trainer_quantizes, section);
    Registry::new().with(backend_naive::BACKEND).with_layer(LAYER).prepare_rollout(context).await
}

#[derive(Debug)]
struct Pair {
    trainer: Box<dyn TrainerEngine>,
    rollout: Box<dyn RolloutEngine>,
}

/// A group of a trainer and a rollout; the same verdict on both.
async fn form(quantizes: bool, trainers: Value, rollouts: Value) -> Result<Pair> {
    let rollout = rollout(false, &rollouts).await?;
    joined(trainer(quantizes, &trainers).await?, rollout).await
}

async fn joined(trainer: PreparedTrainer, rollout: PreparedRollout) -> Result<Pair> {
    let workers = [trainer.metadata().clone(), rollout.metadata().clone()];
    let places = backend_naive::BACKEND.build_topology(&workers)?;
    let place = |worker: &WorkerMetadata| Placement::of_rank(places.clone(), worker.rank).unwrap();
    let rollout = rollout.join(place(&workers[1])).await;
    let trainer = trainer.join(place(&workers[0])).await;
    match (trainer, rollout) {
        (Ok(trainer), Ok(rollout)) => Ok(Pair { trainer, rollout }),
        (Err(error), Err(other)) => {
            assert_eq!(error.to_string(), other.to_string());
            Err(error)
        }
        (trainer, rollout) => panic!("one side forms: {trainer:?} {rollout:?}"),
    }
}

impl Pair {
    async fn update(
        &mut self,
        weights: Vec<Weight>,
    ) -> (Result<SendReport>, Result<Vec<Received>>) {
        let send = self.trainer.send_weights(ensure_async_iterator(weights), Version(1));
        let receive = async {
            let mut received = self.rollout.receive_weights(None).await?;
            let mut tensors = Vec::new();
            while let Some(tensor) = received.next_tensor().await? {
                tensors.push((tensor.meta().clone(), tensor.to_bytes()?.to_vec()));
            }
            Ok(tensors)
        };
        join(send, receive).await
    }
}

type Received = (ArenaArc<TensorMeta>, Vec<u8>);

const UP: &str = "model.layers.0.mlp.up_proj.weight";
const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

fn model() -> Vec<Weight> {
    let matrix = |name: &str| {
        let bytes: Vec<u8> = (0..256 * 256_u32)
            .flat_map(|i| half::bf16::from_f32((i as f32).sin() / 3.0).to_le_bytes())
            .collect();
        Weight::new(name, DType::BF16, [256, 256], bytes).unwrap()
    };
    let norm = Weight::new("model.norm.weight", DType::BF16, [256], vec![0; 512]).unwrap();
    vec![matrix(UP), matrix(DOWN), norm]
}

fn names(received: &[Received]) -> Vec<&str> {
    received.iter().map(|(meta, _)| &*meta.name).collect()
}

#[tokio::test]
async fn trainer_and_rollout_quantise_to_the_same_bytes_and_the_report_counts() {
    let mut on_trainer = form(true, json!({}), json!({})).await.unwrap();
    let (report, a) = on_trainer.update(model()).await;
    let counts = report.unwrap().counts;
    assert_eq!((counts.tensors, counts.converted, counts.kept), (3, 2, 1));
    assert!(counts.wire_bytes < counts.source_bytes * 52 / 100, "{counts:?}");
    let mut on_rollout =
        form(false, json!({}), json!({"quantize_on_receive": true})).await.unwrap();
    let (report, b) = on_rollout.update(model()).await;
    assert_eq!(report.unwrap().counts.converted, 0);
    let (a, b) = (a.unwrap(), b.unwrap());
    assert_eq!(names(&a).len(), 5);
    assert!(a == b, "{:?} and {:?}", names(&a), names(&b));
    // What arrives quantised is recognised.
    let mut both = form(true, json!({}), json!({"quantize_on_receive": true})).await.unwrap();
    assert!(both.update(model()).await.1.unwrap() == a);
}

#[tokio::test]
async fn the_trainer_obeys_what_the_rollout_declares() {
    let contract = json!({
        "accepts": "fp8", "mode": "ue8m0", "granularity": "128x64", "scale_name": "weight_scale",
        "ignored_layers": ["model.layers.1"],
    });
    let mut pair = form(true, json!({}), contract).await.unwrap();
    // The rollout accepts FP8 only, and has itself said that this layer is to be left alone.
    let received = pair.update(model()).await.1.unwrap();
    let scale = "model.layers.0.mlp.up_proj.weight_scale";
    assert_eq!(names(&received), [UP, scale, DOWN, "model.norm.weight"]);
    assert_eq!(received[1].0.shape.to_vec(), [2, 4]);
    let powers = received[1].1.as_chunks::<4>().0;
    assert!(powers.iter().all(|scale| u32::from_le_bytes(*scale) << 9 == 0));
}

#[tokio::test]
async fn the_receiver_that_any_rank_names_decides_for_all() {
    let part = |name: &str, rows: u64| {
        let name = format!("model.layers.0.self_attn.{name}.weight");
        Weight::new(name, DType::BF16, [rows, 128], vec![0; rows as usize * 256]).unwrap()
    };
    // vLLM lets the last part of a layer end within a block.
    let weights = || vec![part("q_proj", 256), part("k_proj", 128), part("v_proj", 192)];
    for (rollout, quantized) in [(json!({}), 0), (json!({"receiver": "vllm"}), 3)] {
        let mut pair = form(true, json!({}), rollout).await.unwrap();
        let (report, received) = pair.update(weights()).await;
        assert_eq!(report.unwrap().counts.converted, quantized);
        received.unwrap();
    }
    // A rank that accepts FP8 only gets what has no FP8 for its receiver as it is.
    let contract = json!({"accepts": "fp8", "granularity": "128x128"});
    let mut pair = form(true, json!({}), contract).await.unwrap();
    assert_eq!(pair.update(weights()).await.1.unwrap().len(), 3);
}

#[tokio::test]
async fn a_group_whose_sides_want_different_formats_does_not_form_and_says_who_wants_what() {
    for (quantizes, trainer, rollout, words) in [
        (true, json!({}), json!({"accepts": "unquantized"}), "unquantized weights only"),
        (false, json!({}), json!({"accepts": "fp8"}), "trainer_quantize_fp8"),
        (true, json!({"mode": "triton"}), json!({"mode": "ue8m0"}), "Ue8m0"),
        (true, json!({"receiver": "vllm"}), json!({"receiver": "sglang"}), "Sglang"),
        (true, json!({"granularity": "64x64"}), json!({"granularity": "128x128"}), "128"),
        (
            true,
            json!({"scale_name": "weight_scale"}),
            json!({"scale_name": "weight_scale_inv"}),
            "WeightScaleInv",
        ),
    ] {
        let error = form(quantizes, trainer, rollout).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Mismatch);
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.to_string().contains("rank 1"), "{error}");
    }
}

#[tokio::test]
async fn a_rollout_alone_that_has_it_that_the_trainer_quantises_is_refused_and_told_what_to_do() {
    let (alone, nothing) = (rollout(true, &json!({})).await.unwrap(), json!({}));
    let error = joined(trainer(false, &nothing).await.unwrap(), alone).await.unwrap_err();
    assert_eq!((error.kind(), error.report().rank), (ErrorKind::Mismatch, Some(Rank(1))));
    for words in ["rank 1", "set it on the trainer", "quantize_on_receive on the rollout"] {
        assert!(error.to_string().contains(words), "{error}");
    }
    // What it is told to do helps.
    for (quantizes, section) in [(true, json!({})), (false, json!({"quantize_on_receive": true}))] {
        let rollout = rollout(true, &section).await.unwrap();
        let pair = joined(trainer(quantizes, &nothing).await.unwrap(), rollout).await;
        let received = pair.unwrap().update(model()).await.1.unwrap();
        assert_eq!(received[0].0.dtype, DType::F8_E4M3, "{section}");
    }
}

#[tokio::test]
async fn a_rollouts_manifest_is_the_truth() {
    let declared = |dtype: &str, shape: &[u64]| json!({"dtype": dtype, "shape": shape});
    let manifest = |up: &str| {
        json!({"manifest": {
            UP: declared(up, &[256, 256]),
            DOWN: declared("BF16", &[256, 256]),
            "model.norm.weight": declared("BF16", &[256]),
        }})
    };
    let mut pair = form(true, json!({}), manifest("F8_E4M3")).await.unwrap();
    let received = pair.update(model()).await.1.unwrap();
    assert_eq!(received[0].0.dtype, DType::F8_E4M3);
    assert_eq!(received[2].0.dtype, DType::BF16, "quantised although BF16 is declared");

    let mut fewer = manifest("F8_E4M3");
    fewer["manifest"].as_object_mut().unwrap().remove("model.norm.weight");
    let mut pair = form(true, json!({}), fewer).await.unwrap();
    let (sent, received) = pair.update(model()).await;
    let error = sent.unwrap_err();
    assert_eq!(error.report().tensor.as_deref(), Some("model.norm.weight"), "{error}");
    assert!(received.is_err());
}

/// A trainer of a program without quantisation, whose checkpoint is FP8 already.
async fn with_a_foreign_trainer(section: Value) -> Pair {
    let mut config = CheckpointEngineConfig::default();
    config.timeout_seconds = 5.0;
    let context = EngineContext::new(config).with_rank(Rank(0));
    let trainer =
        Registry::new().with(backend_naive::BACKEND).prepare_trainer(context).await.unwrap();
    let rollout = rollout(false, &section).await.unwrap();
    joined(trainer, rollout).await.unwrap()
}

#[tokio::test]
async fn what_arrives_in_another_format_than_declared_is_an_error_on_both_sides() {
    let fp8 = |shape: [u64; 2], scale: f32| {
        let codes = Weight::new(UP, DType::F8_E4M3, [256, 256], vec![0; 65536]).unwrap();
        let name = format!("{UP}_scale_inv");
        let scales = scale.to_le_bytes().repeat((shape[0] * shape[1]) as usize);
        vec![codes, Weight::new(name, DType::F32, shape, scales).unwrap()]
    };
    for (section, weights) in [
        (json!({"granularity": "128x128"}), fp8([4, 4], 0.5)),
        (json!({"mode": "ue8m0"}), fp8([2, 2], 0.3)),
        (json!({"scale_name": "weight_scale"}), fp8([2, 2], 0.5)),
        (json!({"accepts": "unquantized"}), fp8([2, 2], 0.5)),
    ] {
        let mut pair = with_a_foreign_trainer(section).await;
        let (sent, received) = pair.update(weights).await;
        let errors: [Error; 2] = [sent.unwrap_err(), received.unwrap_err()];
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
        }
        // The right one is taken.
        let mut pair =
            with_a_foreign_trainer(json!({"mode": "ue8m0", "granularity": "128x128"})).await;
        pair.update(fp8([2, 2], 0.5)).await.1.unwrap();
    }
}

#[tokio::test]
async fn an_unknown_key_of_the_section_is_an_error_that_lists_the_known_ones() {
    let error = trainer(true, &json!({"modus": "triton"})).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("`mode`"), "{error}");
    let error = trainer(true, &json!({"granularity": "100x100"})).await.unwrap_err();
    assert!(error.to_string().contains("32"), "{error}");
}
