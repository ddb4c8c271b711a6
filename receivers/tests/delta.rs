//! Updates of servers that take what has changed: positions and values, by vLLM's contract.

mod support;

use engine_core::{DType, ErrorKind, Rank, TrainerEngine, Version, Weight, ensure_async_iterator};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::json;
use support::server::{Server, Started, Wrong, tensors};
use support::{trainer, trainer_with};

/// A model that is trained: each step changes some elements.
#[derive(Clone, Debug)]
struct Model(Vec<(String, DType, Vec<u64>, Vec<u8>)>);

impl Model {
    fn new() -> Self {
        let tensor = |name: &str, dtype: DType, shape: &[u64]| {
            let elements = shape.iter().product::<u64>();
            let bytes = match dtype {
                DType::BF16 => (0..elements)
                    .flat_map(|at| half::bf16::from_f32(at as f32 / 7.0).to_le_bytes())
                    .collect(),
                _ => (0..elements).flat_map(|at| (at as f32 / 3.0).to_le_bytes()).collect(),
            };
            (name.to_owned(), dtype, shape.to_vec(), bytes)
        };
        let mut tensors = vec![tensor("embed.weight", DType::BF16, &[151, 64])];
        for layer in 0..3 {
            tensors.push(tensor(&format!("layers.{layer}.proj.weight"), DType::BF16, &[33, 65]));
            tensors.push(tensor(&format!("layers.{layer}.norm.weight"), DType::F32, &[65]));
        }
        tensors.push(tensor("scale", DType::F32, &[]));
        tensors.push(tensor("none", DType::BF16, &[0, 4]));
        Self(tensors)
    }

    /// Changes an element of a tensor.
    fn step(&mut self, tensor: usize, at: usize, value: f32) {
        let (_, dtype, _, bytes) = &mut self.0[tensor];
        let value = match *dtype {
            DType::BF16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        };
        let elements = bytes.len() / value.len();
        if elements > 0 {
            let at = at % elements * value.len();
            bytes[at..at + value.len()].copy_from_slice(&value);
        }
    }

    fn weights(&self) -> Vec<Weight> {
        let weight = |(name, dtype, shape, bytes): &(String, DType, Vec<u64>, Vec<u8>)| {
            Weight::new(&**name, *dtype, &**shape, bytes.clone()).expect("a weight")
        };
        self.0.iter().map(weight).collect()
    }

    fn elements(&self) -> u64 {
        self.0.iter().map(|(_, _, shape, _)| shape.iter().product::<u64>()).sum()
    }
}

fn patched() -> Started {
    Started { backend: Some("sparse_nccl"), ..Default::default() }
}

async fn start(model: &Model) -> Server {
    Server::start(&model.weights(), patched()).await
}

fn delta() -> serde_json::Value {
    json!({ "delta": true })
}

fn has(server: &Server, model: &Model, version: u64) {
    let (said, weights) = server.generate().expect("it generates");
    assert_eq!(said, version.to_string());
    assert!(weights == tensors(&model.weights()), "other bytes than version {version} has");
}

async fn send(
    trainer: &mut dyn TrainerEngine,
    model: &Model,
    version: u64,
) -> engine_core::Result<engine_core::SendReport> {
    trainer.send_weights(ensure_async_iterator(model.weights()), Version(version)).await
}

/// What the report of an update says of changes.
fn said(report: &engine_core::SendReport) -> (Option<u64>, u64) {
    let said = &report.receivers[0].notes["delta"];
    (said["base"].as_u64(), said["elements"].as_u64().expect("a number"))
}

#[tokio::test]
async fn after_all_elements_of_the_first_update_a_server_is_sent_those_that_changed() {
    let mut model = Model::new();
    let server = Server::start(&model.weights(), Started { workers: 2, ..patched() }).await;
    let mut trainer = trainer(&[&server], delta()).await;
    let report = send(&mut *trainer, &model, 1).await.expect("an update");
    assert_eq!(said(&report), (None, model.elements()));
    let bytes: u64 = model.weights().iter().map(Weight::byte_len).sum();
    assert_eq!(report.receivers[0].notes["delta"]["shadow_bytes"], bytes);
    assert!(report.buckets > 2, "one bucket shows nothing of the next");
    has(&server, &model, 1);
    model.step(0, 77, -3.5);
    model.step(3, 5, 9.0);
    model.step(7, 0, 1.5);
    let report = send(&mut *trainer, &model, 2).await.expect("an update");
    assert_eq!(said(&report), (Some(1), 3));
    has(&server, &model, 2);
    // Nothing changed, and the version is another all the same.
    let report = send(&mut *trainer, &model, 3).await.expect("an update");
    assert_eq!((said(&report), report.buckets), ((Some(2), 0), 0));
    has(&server, &model, 3);
}

#[tokio::test]
async fn a_server_that_has_something_else_is_sent_all_elements() {
    let mut model = Model::new();
    let (one, other) = (start(&model).await, start(&model).await);
    let mut sends = trainer(&[&one, &other], delta()).await;
    send(&mut *sends, &model, 1).await.expect("an update");
    // It was started anew, with what its checkpoint has.
    let other = other.start_anew(&Model::new().weights()).await;
    model.step(0, 3, 8.0);
    let report = send(&mut *sends, &model, 2).await.expect("an update");
    assert_eq!(said(&report), (None, model.elements()));
    has(&one, &model, 2);
    has(&other, &model, 2);
    // Another trainer has sent it the same version of something else.
    let mut strange = model.clone();
    strange.step(2, 2, 2.0);
    let mut second = trainer(&[&other], delta()).await;
    send(&mut *second, &strange, 7).await.expect("an update");
    model.step(0, 4, 8.0);
    let report = send(&mut *sends, &model, 3).await.expect("an update");
    assert_eq!(said(&report).0, None);
    has(&other, &model, 3);
}

#[tokio::test]
async fn a_server_that_fails_within_an_update_is_sent_all_elements_by_the_next_one() {
    for (path, nth) in [
        ("/start_weight_update", 0),
        ("/update_weights", 0),
        ("/update_weights", 1),
        ("/finish_weight_update", 0),
    ] {
        let mut model = Model::new();
        let (good, bad) = (start(&model).await, start(&model).await);
        let mut trainer = trainer(&[&good, &bad], delta()).await;
        send(&mut *trainer, &model, 1).await.expect("an update");
        (0..8).for_each(|tensor| model.step(tensor, 11, 6.25));
        bad.wrong(path, nth, Wrong::FailsAfterwards("CUDA out of memory"));
        let report = send(&mut *trainer, &model, 2).await.expect("an update");
        assert_eq!(
            (said(&report).0, &report.absent[..]),
            (Some(1), &[Rank(2)][..]),
            "{path} {nth}"
        );
        has(&good, &model, 2);
        bad.generate().expect_err("it is half loaded");
        model.step(1, 1, 1.0);
        let report = send(&mut *trainer, &model, 3).await.expect("an update");
        assert_eq!((said(&report).0, report.absent.len()), (None, 0), "{path} {nth}");
        has(&good, &model, 3);
        has(&bad, &model, 3);
        model.step(1, 2, 1.0);
        let report = send(&mut *trainer, &model, 4).await.expect("an update");
        assert_eq!(said(&report), (Some(3), 1));
        has(&bad, &model, 4);
    }
}

#[tokio::test]
async fn an_update_that_fails_before_a_server_was_told_of_it_leaves_what_changes_are_sent_against()
{
    let mut model = Model::new();
    let server = start(&model).await;
    let mut trainer = trainer(&[&server], delta()).await;
    send(&mut *trainer, &model, 1).await.expect("an update");
    model.step(0, 1, 5.0);
    server.wrong("/pause", 0, Wrong::Refuses("not now"));
    send(&mut *trainer, &model, 2).await.expect_err("it is not paused");
    model.step(0, 2, 5.0);
    let report = send(&mut *trainer, &model, 2).await.expect("an update");
    assert_eq!(said(&report), (Some(1), 2));
    has(&server, &model, 2);
    // What the failed one would have sent is nowhere: it is a change when it comes again.
    let before = model.clone();
    model.step(0, 3, 7.5);
    server.wrong("/pause", 0, Wrong::Refuses("not now"));
    send(&mut *trainer, &model, 3).await.expect_err("it is not paused");
    let failed = std::mem::replace(&mut model, before);
    send(&mut *trainer, &model, 4).await.expect("an update");
    let report = send(&mut *trainer, &failed, 5).await.expect("an update");
    assert_eq!(said(&report), (Some(4), 1));
    has(&server, &failed, 5);
}

#[tokio::test]
async fn a_stream_that_fails_within_an_update_leaves_no_server_with_a_mixture() {
    let mut model = Model::new();
    let server = start(&model).await;
    let mut trainer = trainer(&[&server], delta()).await;
    send(&mut *trainer, &model, 1).await.expect("an update");
    for at in 1..model.0.len() {
        (0..8).for_each(|tensor| model.step(tensor, 20 + at, 0.5));
        let mut weights: Vec<std::io::Result<_>> =
            model.weights().into_iter().take(at).map(Ok).collect();
        weights.push(Err(std::io::Error::other("the gather failed")));
        let sent = trainer.send_weights(ensure_async_iterator(weights), Version(2)).await;
        assert_eq!(sent.expect_err("it fails").kind(), ErrorKind::Source);
        (0..8).for_each(|tensor| model.step(tensor, 20 + at, 0.75));
        send(&mut *trainer, &model, 3).await.expect("the next one is whole");
        has(&server, &model, 3);
    }
}

#[tokio::test]
async fn what_a_patch_cannot_carry_is_an_error_that_names_the_weight() {
    let mut model = Model::new();
    let server = start(&model).await;
    let mut sends = trainer(&[&server], delta()).await;
    send(&mut *sends, &model, 1).await.expect("an update");
    model.step(1, 4, f32::NAN);
    let error = send(&mut *sends, &model, 2).await.expect_err("a value that is no number");
    assert_eq!(error.report().tensor.as_deref(), Some("layers.0.proj.weight"));
    assert_eq!(server.generate().expect("nobody was stopped").0, "1");
    let codes = Weight::new("codes", DType::F8_E4M3, [4], vec![0_u8; 4]).expect("a weight");
    let sent = sends.send_weights(ensure_async_iterator(vec![codes]), Version(3)).await;
    let error = sent.expect_err("vLLM has no patches of it");
    assert!(error.kind() == ErrorKind::Weight && error.to_string().contains("codes"), "{error}");
}

#[tokio::test]
async fn servers_that_were_started_for_whole_weights_say_how_to_start_them_and_so_the_other_way_round()
 {
    let model = Model::new();
    for (backend, options, words) in [
        ("nccl", delta(), "\"backend\": \"sparse_nccl\""),
        ("ipc", delta(), "\"backend\": \"sparse_nccl\""),
        ("sparse_nccl", json!({}), "delta: true"),
    ] {
        let started = Started { backend: Some(backend), ..Default::default() };
        let server = Server::start(&model.weights(), started).await;
        let mut trainer = trainer(&[&server], options).await;
        let error = send(&mut *trainer, &model, 1).await.expect_err("it cannot be sent to");
        assert!(error.kind() == ErrorKind::Config && error.to_string().contains(words), "{error}");
    }
    let server = start(&model).await;
    for options in
        [json!({ "delta": true, "transport": "ipc" }), json!({ "delta": true, "unpacked": true })]
    {
        let error =
            trainer_with(&[&server], options, 1.0).await.expect_err("it goes with nothing else");
        assert!(error.to_string().contains("`delta`"), "{error}");
    }
}

/// Some steps of training, and what goes wrong in the update after them: nothing, for large numbers.
type Event = (Vec<(usize, usize, f32)>, usize);

fn schedules() -> impl Strategy<Value = Vec<Event>> {
    let step = (0..9_usize, 0..10_000_usize, -4.0..4.0_f32);
    proptest::collection::vec((proptest::collection::vec(step, 0..40), 0..12_usize), 12)
}

#[tokio::test]
async fn after_any_updates_of_which_some_fail_a_server_that_confirms_a_version_has_every_bit_of_it()
{
    let mut runner = TestRunner::deterministic();
    for _ in 0..25 {
        let schedule = schedules().new_tree(&mut runner).expect("a schedule").current();
        let mut model = Model::new();
        let mut servers = vec![start(&model).await, start(&model).await];
        let mut trainer = trainer(&servers.iter().collect::<Vec<_>>(), delta()).await;
        for (number, (steps, event)) in schedule.into_iter().enumerate() {
            for (tensor, at, value) in steps {
                model.step(tensor, at, value);
            }
            let victim = event % 2;
            match event {
                0 | 1 => servers[victim].wrong("/update_weights", 0, Wrong::FailsAfterwards("no")),
                2 | 3 => {
                    servers[victim].wrong("/finish_weight_update", 0, Wrong::FailsAfterwards("no"))
                }
                4 | 5 => {
                    let server = servers.remove(victim);
                    let anew = server.start_anew(&Model::new().weights()).await;
                    servers.insert(victim, anew);
                }
                6 | 7 => servers[victim].wrong("/pause", 0, Wrong::Refuses("not now")),
                _ => {}
            }
            // Versions come again: they name nothing by themselves.
            let version = number as u64 / 2;
            let sent = send(&mut *trainer, &model, version).await;
            let report = sent.unwrap_or_else(|error| panic!("{number}: {error}"));
            for (index, server) in servers.iter().enumerate() {
                if !report.absent.contains(&Rank(index as u32 + 1)) {
                    has(server, &model, version);
                }
            }
        }
    }
}
