//! Any sequence of updates, failures, joins and other bases ends in exactly the trainer's bytes.

use std::future::Future;
use std::sync::Arc;

use delta::LAYER;
use engine_core::{
    ArenaArc, CheckpointEngineConfig, DType, EngineContext, Error, ErrorKind, Registry, Result,
    RolloutEngine, SendReport, TensorBox, TensorMeta, TrainerEngine, Version, Weight,
    ensure_async_iterator, form_local_group,
};
use proptest::prelude::*;

const DTYPES: [DType; 4] = [DType::F8_E4M3, DType::BF16, DType::F32, DType::U8];

fn config(delta: bool) -> EngineContext {
    let mut config = CheckpointEngineConfig::default();
    config.timeout_seconds = 20.0;
    config.layers.insert("delta".into(), delta.into());
    EngineContext::new(config)
}

/// A trainer, and rollouts of which those that are named know nothing of deltas.
async fn group(deltas: &[bool]) -> Result<(Box<dyn TrainerEngine>, Vec<Box<dyn RolloutEngine>>)> {
    let registry = Registry::new().with(backend_naive::BACKEND).with_layer(LAYER);
    let backend = backend_naive::BACKEND;
    let trainer = registry.prepare_trainer(config(true).with_rank(engine_core::Rank(0))).await?;
    let mut rollouts = Vec::new();
    for (at, delta) in deltas.iter().enumerate() {
        let rank = engine_core::Rank(at as u32 + 1);
        rollouts.push(registry.prepare_rollout(config(*delta).with_rank(rank)).await?);
    }
    let (mut trainers, rollouts) = form_local_group(backend, vec![trainer], rollouts).await?;
    Ok((trainers.remove(0), rollouts))
}

/// A model: names, types and bytes.
type Model = Vec<(ArenaArc<TensorMeta>, Arc<Vec<u8>>)>;

fn weights(model: &Model) -> Vec<Weight> {
    let weight = |(meta, bytes): &(ArenaArc<TensorMeta>, Arc<Vec<u8>>)| {
        Weight::from_meta(meta.clone(), (**bytes).clone()).expect("a weight")
    };
    model.iter().map(weight).collect()
}

async fn take(rollout: &mut dyn RolloutEngine, version: u64) -> Result<Model> {
    let mut received = rollout.receive_weights(Some(Version(version))).await?;
    let mut model = Model::new();
    let mut held = Vec::new();
    while let Some(weight) = received.next_tensor().await? {
        let bytes = weight.contiguous_bytes().expect("host memory").to_vec();
        model.push((weight.meta().clone(), Arc::new(bytes)));
        held.push(weight);
    }
    let report = received.finish().await?;
    assert_eq!(report.tensors, model.len() as u64);
    for (weight, (_, bytes)) in held.iter().zip(&model) {
        assert_eq!(weight.contiguous_bytes().expect("host memory")[..], bytes[..]);
    }
    Ok(model)
}

/// What one rollout does in an update.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Does {
    Takes,
    /// It gives the update up after some buckets.
    GivesUp(u8),
    /// It refuses the version when it has all of it.
    Refuses,
}

async fn fails(rollout: &mut dyn RolloutEngine, does: Does) -> Result<()> {
    let mut received = rollout.receive_weights(None).await?;
    let error = || Error::new(ErrorKind::Resource, "installing", "no room");
    if let Does::GivesUp(after) = does {
        for _ in 0..after {
            if received.next_bucket().await?.is_none() {
                // It came too late.
                return Ok(());
            }
        }
        received.fail(error());
        return Err(error());
    }
    received.before_confirm(move || Err(error()));
    received.finish().await.map(drop)
}

async fn update(
    trainer: &mut dyn TrainerEngine,
    rollouts: &mut [Box<dyn RolloutEngine>],
    model: &Model,
    version: u64,
    does: &[Does],
) -> Result<SendReport> {
    let send = trainer.send_weights(ensure_async_iterator(weights(model)), Version(version));
    expect(send, rollouts, model, version, does).await
}

/// Runs an update beside the rollouts, of which those that take it must get these weights.
async fn expect(
    send: impl Future<Output = Result<SendReport>>,
    rollouts: &mut [Box<dyn RolloutEngine>],
    model: &Model,
    version: u64,
    does: &[Does],
) -> Result<SendReport> {
    let receive = rollouts.iter_mut().zip(does).map(|(rollout, does)| async move {
        match does {
            Does::Takes => take(&mut **rollout, version).await.map(Some),
            does => fails(&mut **rollout, *does).await.map(|()| None),
        }
    });
    let (sent, received) = futures::join!(send, futures::future::join_all(receive));
    let report = sent?;
    for taken in received {
        assert!(taken?.is_none_or(|taken| taken == *model), "other bytes than the trainer's");
    }
    Ok(report)
}

/// Attests the version that was sent last, and checks that rollouts get it once more.
async fn attest(
    trainer: &mut dyn TrainerEngine,
    rollouts: &mut [Box<dyn RolloutEngine>],
    model: &Model,
    version: u64,
) -> Result<SendReport> {
    expect(trainer.attest(), rollouts, model, version, &[Does::Takes; 2]).await
}

/// How a model changes from one update to the next.
#[derive(Clone, Debug)]
enum Step {
    /// Of each weight, every so-many-th byte from some on.
    Changes {
        every: usize,
        from: usize,
    },
    Nothing,
    /// A weight gets another shape.
    Reshaped(usize),
    Gone(usize),
    New(usize),
    Reversed,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..5000_usize, 0..7000_usize).prop_map(|(every, from)| Step::Changes { every, from }),
        1 => Just(Step::Nothing),
        1 => (0..9_usize).prop_map(Step::Reshaped),
        1 => (0..9_usize).prop_map(Step::Gone),
        1 => (0..9_usize).prop_map(Step::New),
        1 => Just(Step::Reversed),
    ]
}

fn weight(name: String, kind: usize, rows: u64) -> (ArenaArc<TensorMeta>, Arc<Vec<u8>>) {
    let meta = ArenaArc::from(TensorMeta::new(name, DTYPES[kind % 4], [rows, 33]));
    let len = meta.byte_len().expect("a size");
    (meta, Arc::new((0..len).map(|at| (at as usize * 7 + kind) as u8).collect()))
}

fn advance(model: &mut Model, step: &Step, version: u64) {
    let len = model.len().max(1);
    match *step {
        Step::Nothing => {}
        Step::Changes { every, from } => {
            for (_, bytes) in model {
                let bytes = Arc::make_mut(bytes);
                bytes.iter_mut().skip(from).step_by(every).for_each(|byte| *byte ^= version as u8);
            }
        }
        Step::Reshaped(at) => {
            if let Some(entry) = model.get_mut(at % len) {
                *entry = weight(entry.0.name.to_string(), at, version * 3);
            }
        }
        Step::Gone(at) if model.len() > 1 => drop(model.remove(at % len)),
        Step::Gone(_) => {}
        Step::New(at) => {
            model.insert(at % len, weight(format!("new.{version}"), at, 1 + version * 20));
        }
        Step::Reversed => model.reverse(),
    }
}

fn does() -> impl Strategy<Value = Does> {
    prop_oneof![
        8 => Just(Does::Takes),
        1 => (0..3_u8).prop_map(Does::GivesUp),
        1 => Just(Does::Refuses),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn any_sequence_of_updates_and_failures_ends_in_exactly_the_trainers_bytes(
        steps in proptest::collection::vec((step(), does(), does()), 1..12),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let (mut trainer, mut rollouts) = group(&[true, true]).await.expect("a group");
            let mut model: Model = (0..6).map(|at| weight(format!("w{at}"), at, 200)).collect();
            // Whether a version was committed, and so is the base of the next, whatever failed in between.
            let mut has_base = false;
            for (version, (step, one, other)) in (1..).zip(&steps) {
                advance(&mut model, step, version);
                let does = [*one, *other];
                let sent = update(&mut *trainer, &mut rollouts, &model, version, &does).await;
                let fails = does.iter().any(|does| *does != Does::Takes);
                assert!(fails || sent.is_ok(), "{step:?} {does:?}: {sent:?}");
                let bytes: usize = model.iter().map(|(_, bytes)| bytes.len()).sum();
                if let Ok(report) = sent {
                    let whole = report.delta.expect("a report").whole;
                    assert_eq!(whole.is_some(), !has_base, "{whole:?}");
                    has_base = true;
                }
                // A rank that fails three times in a row is expelled.
                for once_more in [1, 2] {
                    let version = version + 1000 * once_more;
                    let all = update(&mut *trainer, &mut rollouts, &model, version, &[Does::Takes; 2]);
                    let whole = all.await.expect("nothing failed").delta.expect("a report").whole;
                    assert_eq!(whole.is_some(), !has_base, "{whole:?}");
                    has_base = true;
                }
                let again = update(&mut *trainer, &mut rollouts, &model, 3000 + version, &[Does::Takes; 2]);
                let report = again.await.expect("the same once more");
                let delta = report.delta.expect("a report");
                assert_eq!((delta.whole, delta.changed_weights), (None, 0));
                assert_eq!(delta.shadow_bytes, bytes as u64);
                assert_eq!(report.counts.tensors, model.len() as u64);
                assert!(report.counts.wire_bytes < 1000, "{} bytes for nothing", report.counts.wire_bytes);
                let attested = attest(&mut *trainer, &mut rollouts, &model, 3000 + version).await;
                assert!(attested.expect("nothing changed").delta.expect("a report").attested);
            }
        });
    }
}

/// What a version is of which only some weights were sent: these, and then all others as they were.
fn with_part(part: &Model, before: &Model) -> Model {
    let is_new = |(meta, _): &&(ArenaArc<TensorMeta>, Arc<Vec<u8>>)| {
        part.iter().all(|(sent, _)| sent.name != meta.name)
    };
    part.iter().chain(before.iter().filter(is_new)).cloned().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn any_sequence_of_whole_and_partial_updates_is_what_a_model_of_both_says(
        steps in proptest::collection::vec((step(), proptest::option::of(any::<u8>()), does()), 1..10),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let (mut trainer, mut rollouts) = group(&[true, true]).await.expect("a group");
            let mut model: Model = (0..6).map(|at| weight(format!("w{at}"), at, 200)).collect();
            update(&mut *trainer, &mut rollouts, &model, 1, &[Does::Takes; 2]).await.expect("the first");
            for (version, (step, part, does)) in (2..).zip(steps) {
                let mut next = model.clone();
                advance(&mut next, &step, version);
                if let Some(part) = part {
                    // What changed of the others stays with the trainer.
                    let mut at = 0..;
                    next.retain(|_| at.next().is_some_and(|at| part & 1 << (at % 8) != 0));
                }
                let expected = if part.is_some() { with_part(&next, &model) } else { next.clone() };
                for (version, does) in [(version, does), (version + 1000, Does::Takes)] {
                    let (stream, version_sent) = (ensure_async_iterator(weights(&next)), Version(version));
                    let send = match part {
                        Some(_) => trainer.send_part(stream, version_sent),
                        None => trainer.send_weights(stream, version_sent),
                    };
                    let sent = expect(send, &mut rollouts, &expected, version, &[does, Does::Takes]).await;
                    let Ok(report) = sent else {
                        assert!(does != Does::Takes, "{step:?} {part:?}: {sent:?}");
                        continue;
                    };
                    assert_eq!(report.delta.expect("a report").whole, None);
                    assert_eq!(report.counts.tensors, next.len() as u64);
                    model = expected;
                    let attested = attest(&mut *trainer, &mut rollouts, &model, version).await;
                    attested.expect("nothing changed");
                    break;
                }
            }
        });
    }
}

#[tokio::test]
async fn what_changed_of_weights_that_are_not_sent_travels_with_the_next_full_stream() {
    let (mut trainer, mut rollouts) = group(&[true]).await.expect("a group");
    let takes = [Does::Takes];
    let mut policy: Model = (0..5).map(|at| weight(format!("model.w{at}"), at, 300)).collect();
    let stream = |model: &Model| ensure_async_iterator(weights(model));
    let error = trainer.send_part(stream(&policy), Version(1)).await.expect_err("no version");
    assert_eq!(error.kind(), ErrorKind::State);
    update(&mut *trainer, &mut rollouts, &policy, 1, &takes).await.expect("an update");
    let before = policy.clone();
    advance(&mut policy, &Step::Changes { every: 1, from: 0 }, 2);
    // In PEFT's names.
    let lora = |half: &str| format!("base_model.model.w0.lora_{half}.weight");
    let adapter: Model = vec![weight(lora("A"), 1, 8), weight(lora("B"), 1, 8)];
    let expected = with_part(&adapter, &before);
    let send = trainer.send_part(stream(&adapter), Version(2));
    let report = expect(send, &mut rollouts, &expected, 2, &takes).await.expect("the adapter");
    assert!(report.counts.wire_bytes < 2000, "{} bytes for an adapter", report.counts.wire_bytes);
    assert_eq!(report.counts.source_bytes, 2 * 8 * 33 * 2);
    let all: Model = policy.iter().chain(&adapter).cloned().collect();
    let report = update(&mut *trainer, &mut rollouts, &all, 3, &takes).await.expect("all");
    assert_eq!(report.delta.expect("a report").changed_weights, 5);
}

#[tokio::test]
async fn an_update_that_fails_leaves_the_base_on_both_sides() {
    let (mut trainer, mut rollouts) = group(&[true, true]).await.expect("a group");
    let mut model: Model = (0..6).map(|at| weight(format!("w{at}"), at, 200)).collect();
    let takes = [Does::Takes; 2];
    update(&mut *trainer, &mut rollouts, &model, 1, &takes).await.expect("the first");
    for (version, does) in (2..).zip([Does::Refuses, Does::GivesUp(1)]) {
        advance(&mut model, &Step::Changes { every: 100, from: version as usize }, version);
        let failed =
            update(&mut *trainer, &mut rollouts, &model, version, &[Does::Takes, does]).await;
        assert_eq!(failed.expect_err("it was refused").kind(), ErrorKind::Resource);
    }
    let report = update(&mut *trainer, &mut rollouts, &model, 9, &takes).await.expect("the next");
    let delta = report.delta.expect("a report");
    assert_eq!((delta.whole, delta.changed_weights), (None, 6));
    let bf16 = delta.elements["BF16"];
    assert_eq!(bf16.compared, 2 * 200 * 33);
    assert!(bf16.changed > 0 && bf16.changed < bf16.compared / 10, "{bf16:?}");
}

#[tokio::test]
async fn a_rollout_without_deltas_gets_whole_weights_and_the_report_names_it() {
    let (mut trainer, mut rollouts) = group(&[true, false]).await.expect("a group");
    let model: Model = (0..3).map(|at| weight(format!("w{at}"), at, 20)).collect();
    for version in 1..4 {
        let report = update(&mut *trainer, &mut rollouts, &model, version, &[Does::Takes; 2]).await;
        let delta = report.expect("an update").delta.expect("a report");
        let whole = delta.whole.expect("a reason");
        assert!(whole.contains("rank 2") && !whole.contains("rank 1"), "{whole}");
        assert_eq!(delta.shadow_bytes, 0);
    }
}

#[tokio::test]
async fn a_weight_that_would_be_taken_for_changes_is_refused() {
    let (mut trainer, mut rollouts) = group(&[true]).await.expect("a group");
    let model = vec![weight("checkpoint-engine/delta/0".into(), 0, 1)];
    let error = update(&mut *trainer, &mut rollouts, &model, 1, &[Does::Takes]).await;
    let error = error.expect_err("a reserved name");
    assert_eq!(error.kind(), ErrorKind::Weight);
    assert!(error.to_string().contains("checkpoint-engine/delta/0"), "{error}");
}

#[tokio::test]
async fn a_part_of_a_tensor_is_refused_by_name() {
    let (mut trainer, mut rollouts) = group(&[true]).await.expect("a group");
    let part = Weight::new("part", DType::U8, [2], vec![1, 2]).expect("a weight");
    let region = TensorBox::new(&[1], &[2]).expect("a box");
    let part = part.of_box([4], region).expect("a part");
    let send = trainer.send_weights(ensure_async_iterator([part]), Version(1));
    let (sent, received) = futures::join!(send, take(&mut *rollouts[0], 1));
    let error = sent.expect_err("a part");
    assert_eq!(error.kind(), ErrorKind::Weight);
    assert!(error.to_string().contains("part") && received.is_err(), "{error}");
}

#[tokio::test]
async fn updates_of_the_same_weights_have_the_layouts_of_the_last_one() {
    let (mut trainer, mut rollouts) = group(&[true]).await.expect("a group");
    let mut model: Model = (0..5).map(|at| weight(format!("w{at}"), at, 30)).collect();
    let mut layouts = Vec::new();
    for version in 1..=4 {
        if version == 4 {
            model.truncate(4);
        }
        let send = trainer.send_weights(ensure_async_iterator(weights(&model)), Version(version));
        let receive = async {
            let mut received = rollouts[0].receive_weights(None).await?;
            let mut here = Vec::new();
            while let Some(bucket) = received.next_bucket().await? {
                here.push(bucket.layout().clone());
            }
            received.finish().await.map(|_| here)
        };
        let (sent, received) = futures::join!(send, receive);
        sent.expect("an update");
        layouts.push(received.expect("an update"));
    }
    let [_, second, third, fourth] = &layouts[..] else { panic!("four updates") };
    assert!(!second.is_empty() && second.len() == third.len());
    assert!(second.iter().zip(third).all(|(one, other)| Arc::ptr_eq(one, other)));
    let names = |all: &[Arc<engine_core::plan::BucketLayout>]| -> usize {
        all.iter().map(|layout| layout.pieces().len()).sum()
    };
    assert_eq!((names(third), names(fourth)), (5, 4));
}

#[tokio::test]
async fn changes_of_more_than_a_bucket_travel_as_several_tensors() {
    let mut context = config(true);
    context.config.update_weights_bucket_megabytes = Some(1);
    let registry = Registry::new().with(backend_naive::BACKEND).with_layer(LAYER);
    let trainer = registry.prepare_trainer(context.clone().with_rank(engine_core::Rank(0)));
    let rollout = registry.prepare_rollout(context.with_rank(engine_core::Rank(1)));
    let (trainer, rollout) = (trainer.await.expect("a trainer"), rollout.await.expect("a rollout"));
    let formed = form_local_group(backend_naive::BACKEND, vec![trainer], vec![rollout]).await;
    let (mut trainers, mut rollouts) = formed.expect("a group");
    let mut model: Model = (0..6).map(|at| weight(format!("w{at}"), 3, 20_000 + at)).collect();
    let mut buckets = Vec::new();
    for (version, every) in [(1, 1), (2, 900), (3, 1)] {
        advance(&mut model, &Step::Changes { every, from: 0 }, version);
        let report =
            update(&mut *trainers[0], &mut rollouts, &model, version, &[Does::Takes]).await;
        let report = report.expect("an update");
        assert_eq!(report.delta.expect("a report").whole.is_some(), version == 1);
        buckets.push(report.buckets);
    }
    // Few changes are one bucket. Of those that are as many as the weights, two weights' are more than a bucket.
    assert_eq!(buckets[1], 1);
    assert!(buckets[2] >= 4, "{buckets:?}");
}

#[tokio::test]
async fn a_thousand_versions_in_a_row_are_what_one_whole_one_is() {
    let (mut trainer, mut rollouts) = group(&[true]).await.expect("a group");
    let mut model: Model = (0..5).map(|at| weight(format!("w{at}"), at, 30)).collect();
    let mut rollouts_again = group(&[true]).await.expect("a group");
    for version in 1..=1000 {
        let (every, from) = (1 + version as usize * 31 % 700, version as usize * 17 % 900);
        advance(&mut model, &Step::Changes { every, from }, version);
        let report = update(&mut *trainer, &mut rollouts, &model, version, &[Does::Takes]).await;
        let whole = report.expect("an update").delta.expect("a report").whole;
        assert_eq!(whole.is_some(), version == 1, "version {version}: {whole:?}");
    }
    let (trainer, rollouts) = &mut rollouts_again;
    update(&mut **trainer, rollouts, &model, 1, &[Does::Takes]).await.expect("a whole one");
}

#[tokio::test]
async fn only_a_version_that_all_ranks_have_copies_of_can_be_attested() {
    let (mut trainer, rollouts) = group(&[true, false]).await.expect("a group");
    let error = trainer.attest().await.expect_err("nothing was sent");
    assert_eq!(error.kind(), ErrorKind::State, "{error}");
    let model: Model = (0..3).map(|at| weight(format!("w{at}"), at, 20)).collect();
    let mut rollouts = rollouts;
    update(&mut *trainer, &mut rollouts, &model, 1, &[Does::Takes; 2]).await.expect("an update");
    let error = trainer.attest().await.expect_err("rank 2 keeps no copy");
    assert_eq!(error.kind(), ErrorKind::State);
    assert!(error.to_string().contains("rank 2"), "{error}");
}

#[tokio::test]
async fn a_rank_that_is_lost_while_a_version_is_attested_ends_that_with_an_error_that_names_it() {
    let (mut trainer, mut rollouts) = group(&[true, true]).await.expect("a group");
    let mut model: Model = (0..6).map(|at| weight(format!("w{at}"), at, 200)).collect();
    update(&mut *trainer, &mut rollouts, &model, 1, &[Does::Takes; 2]).await.expect("an update");
    let mut lost = rollouts.pop().expect("rank 2");
    let dies = async move {
        let mut received = lost.receive_weights(None).await.expect("it is attested");
        let first = received.next_bucket().await.expect("weights");
        assert!(first.is_some());
        drop((first, received));
        drop(lost);
    };
    let stays = take(&mut *rollouts[0], 1);
    let begun = std::time::Instant::now();
    let (sent, received, ()) = futures::join!(trainer.attest(), stays, dies);
    let error = sent.expect_err("rank 2 is gone");
    assert_eq!(error.report().rank, Some(engine_core::Rank(2)), "{error}");
    assert!(received.is_err());
    assert!(begun.elapsed() < std::time::Duration::from_secs(20), "it took the deadline");
    // The other one has lost nothing.
    advance(&mut model, &Step::Changes { every: 100, from: 0 }, 2);
    let next = update(&mut *trainer, &mut rollouts, &model, 2, &[Does::Takes]).await;
    assert_eq!(next.expect("an update").delta.expect("a report").whole, None);
    attest(&mut *trainer, &mut rollouts, &model, 2).await.expect("nothing changed");
}
