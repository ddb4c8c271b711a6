//! The cases.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use control_plane::{ControlPlane, UPDATES};
use engine_core::{
    DType, Encoding, EngineContext, Error, ErrorKind, Rank, ReceivedBucket, ReceivedPiece,
    Registry, Role, Storage, TensorBox, TensorMap, TensorMeta, Treatment, Version, VersionState,
    Weight, ensure_async_iterator,
};
use futures::StreamExt;
use tokio::time::sleep;

use crate::group::{Group, Received, collect, compare, model, weight, words};
use crate::{Case, Suite};

type Verdict = Result<(), String>;

macro_rules! ensure {
    ($condition:expr, $($words:tt)+) => {
        if !$condition {
            return Err(format!($($words)+));
        }
    };
}

macro_rules! cases {
    ($($name:ident $(($lacking:ident))?)*) => {
        /// All cases.
        pub static CASES: &[Case] = &[$(Case {
            name: stringify!($name),
            lacking: cases!(@ $($lacking)?),
            run: |suite| Box::pin($name(suite)),
        }),*];

        /// Makes a test of every case, for the suite of the expression. With `within a process` after it, for an engine that hands memory
        /// over there, the cases about buffers and control planes are ignored. With `ignored = "reason"` all are ignored, because most
        /// machines cannot run them.
        #[macro_export]
        macro_rules! suite {
            ($suite:expr) => {
                $($crate::case!([] $name, $suite);)*
            };
            ($suite:expr, within a process) => {
                $($crate::case!([$($lacking)?] $name, $suite);)*
            };
            ($suite:expr, ignored = $reason:literal) => {
                $($crate::case!([$reason] $name, $suite);)*
            };
        }
    };
    (@ buffers) => { Some($crate::Lacking::Buffers) };
    (@ control) => { Some($crate::Lacking::ControlPlane) };
    (@) => { None };
}

/// A test of one case.
#[doc(hidden)]
#[macro_export]
macro_rules! case {
    ([] $name:ident, $suite:expr) => {
        #[test]
        fn $name() {
            $suite.test(stringify!($name));
        }
    };
    ([buffers] $name:ident, $suite:expr) => {
        $crate::case!(["this engine hands memory over and has no buffers"] $name, $suite);
    };
    ([control] $name:ident, $suite:expr) => {
        $crate::case!(["this engine stays within a process"] $name, $suite);
    };
    ([$reason:literal] $name:ident, $suite:expr) => {
        #[test]
        #[ignore = $reason]
        fn $name() {
            $suite.test(stringify!($name));
        }
    };
}

cases! {
    every_weight_arrives_once_in_order_and_bit_for_bit
    every_rollout_gets_every_weight
    an_empty_stream_is_an_update_of_no_tensors
    scalars_empty_tensors_and_all_types_arrive
    a_tensor_larger_than_a_bucket_arrives_whole
    thousands_of_tiny_tensors_arrive
    strided_and_cast_weights_arrive_as_contiguous_ones
    the_same_shapes_again_send_no_metadata
    other_shapes_in_the_next_update_arrive
    views_are_aligned(buffers)
    a_slow_receiver_gets_everything
    a_slow_trainer_sends_everything
    installing_fills_a_map_of_tensors
    a_receiver_that_drops_the_stream_ends_the_update_everywhere
    a_receiver_says_why_it_gives_up
    an_error_of_the_source_ends_the_update_everywhere
    a_part_of_a_tensor_is_refused_by_name
    a_name_used_twice_is_refused
    a_send_that_is_dropped_ends_the_update_everywhere
    a_receiver_that_never_comes_is_a_timeout_that_names_it
    another_version_than_expected_is_a_mismatch
    a_receiver_whose_engine_is_gone_is_an_error
    a_rollouts_note_reaches_the_report
    a_group_that_has_gaps_in_its_ranks_is_updated_whole
    a_view_of_a_group_that_is_no_more_frees_nothing_of_the_one_that_follows
    a_stream_that_is_dropped_after_the_commit_costs_no_later_update
    an_error_stays_whatever_is_asked_after_it
    a_wait_for_an_update_that_is_dropped_loses_nothing
    versions_may_go_back
    a_version_is_attested_or_the_error_says_that_there_are_no_copies
    a_part_of_a_version_leaves_all_others_or_the_error_says_that_there_are_no_copies
    a_rollout_gets_the_parts_that_it_wants_and_nothing_else_or_is_refused
    a_part_that_the_trainer_does_not_have_is_a_mismatch_that_names_the_rank
    a_rollout_that_wants_some_parts_and_dies_keeps_no_other_from_its_own
    ranks_that_come_and_go_keep_no_wait_alive(control)
    a_rollout_that_is_slow_within_the_deadline_is_waited_for_by_all
    nothing_is_read_of_the_weights_when_a_failed_send_has_returned
    other_names_than_before_are_refused_everywhere
    garbage_of_a_rank_without_a_part_in_updates_is_dropped(control)
    an_engine_runs_on_any_executor_and_its_deadlines_with_it
    a_backend_refuses_a_group_without_a_trainer
}

async fn every_weight_arrives_once_in_order_and_bit_for_bit(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    let report = group.exact(model(20, 1), 1).await?;
    ensure!(report.version == Version(1), "the report is of version {}", report.version);
    let tensors = suite.on_the_wire(model(20, 1));
    let tensors = tensors.iter().filter(|weight| *weight.treatment() != Treatment::Added).count();
    let counted = report.counts.tensors;
    ensure!(counted == tensors as u64, "{counted} of {tensors} tensors were counted");
    let active = report.receivers.iter().all(|receiver| receiver.state == VersionState::Active);
    ensure!(active, "a receiver is not active");
    group.trainer.finalize().await.map_err(words)
}

async fn every_rollout_gets_every_weight(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 4).await.map_err(words)?;
    for version in 1..4 {
        group.exact(model(8, version), version).await?;
    }
    Ok(())
}

async fn an_empty_stream_is_an_update_of_no_tensors(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    for version in 1..3 {
        group.exact(Vec::new(), version).await?;
    }
    group.exact(model(1, 3), 3).await.map(drop)
}

async fn scalars_empty_tensors_and_all_types_arrive(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    let mut weights = vec![
        weight("scalar", DType::F32, &[], 1),
        weight("none", DType::BF16, &[0, 7], 1),
        weight("odd", DType::U8, &[3], 1),
    ];
    for dtype in DType::ALL {
        weights.push(weight(&format!("{}.weight", dtype.name()), dtype, &[8, 4], 2));
        if dtype.name().starts_with("F8_") {
            let scale = format!("{}.weight_scale_inv", dtype.name());
            weights.push(weight(&scale, DType::F32, &[1, 1], 2));
        }
    }
    weights.push(weight("last and empty", DType::U8, &[0], 1));
    group.exact(weights, 1).await.map(drop)
}

async fn a_tensor_larger_than_a_bucket_arrives_whole(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    let weights = vec![
        weight("before", DType::U8, &[100], 1),
        weight("huge", DType::BF16, &[1711, 1001], 1),
        weight("after", DType::F32, &[5], 1),
    ];
    group.exact(weights.clone(), 1).await?;
    group.exact(weights, 2).await.map(drop)
}

async fn thousands_of_tiny_tensors_arrive(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    let tiny = |seed| -> Vec<Weight> {
        (0..9000).map(|i| weight(&format!("tiny.{i}"), DType::BF16, &[1 + i % 7], seed)).collect()
    };
    group.exact(tiny(1), 1).await?;
    group.exact(tiny(2), 2).await.map(drop)
}

async fn strided_and_cast_weights_arrive_as_contiguous_ones(suite: &Suite) -> Verdict {
    use engine_core::WeightStreamExt;
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    let storage = weight("s", DType::F32, &[64, 48], 5).to_bytes().map_err(words)?;
    let transposed = Weight::strided("t", DType::F32, [48, 64], [1_i64, 48], 0, storage);
    let transposed = transposed.map_err(words)?;
    let cast: Vec<_> =
        vec![weight("c", DType::BF16, &[500, 1300], 1)].cast(DType::F32).collect().await;
    let mut weights = vec![transposed];
    for weight in cast {
        weights.push(weight.map_err(words)?);
    }
    group.exact(weights, 1).await.map(drop)
}

async fn the_same_shapes_again_send_no_metadata(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    let reused = [false, true, true, false, true];
    let layers = [9, 9, 9, 8, 8];
    for (version, (layers, reused)) in (1..).zip(layers.into_iter().zip(reused)) {
        let report = group.exact(model(layers, version), version).await?;
        ensure!(report.plan_reused == reused, "update {version}: plan_reused is {}", !reused);
    }
    Ok(())
}

async fn other_shapes_in_the_next_update_arrive(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    group.exact(model(30, 1), 1).await?;
    let mut changed = model(30, 2);
    changed[77] = weight("another", DType::I64, &[11, 3], 2);
    group.exact(changed, 2).await?;
    let mut fewer = model(30, 3);
    fewer.truncate(50);
    group.exact(fewer, 3).await?;
    group.exact(model(40, 4), 4).await.map(drop)
}

async fn views_are_aligned(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    let send = group.trainer.send_weights(ensure_async_iterator(model(10, 1)), Version(1));
    let rollout = &mut group.rollouts[0];
    let receive = async {
        let mut received = rollout.receive_weights(None).await.map_err(words)?;
        while let Some(bucket) = received.next_bucket().await.map_err(words)? {
            for piece in bucket.pieces() {
                let address = match &piece.bytes {
                    Storage::Host(bytes) => bytes.as_ptr().addr() as u64,
                    // The allocation itself is aligned, on every device.
                    Storage::Device(bytes) => bytes.start(),
                };
                ensure!(address.is_multiple_of(256), "`{}` is not aligned", piece.meta.name);
            }
        }
        Ok(())
    };
    let (sent, received) = futures::future::join(send, receive).await;
    sent.map_err(words)?;
    received
}

async fn a_slow_receiver_gets_everything(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    let weights = || (0..5).map(|i| weight(&format!("w{i}"), DType::U8, &[700_000], i)).collect();
    let weights: Vec<Weight> = weights();
    let send = group.trainer.send_weights(ensure_async_iterator(weights.clone()), Version(1));
    let (slow, fast) = group.rollouts.split_at_mut(1);
    let slow = async {
        let mut received = slow[0].receive_weights(None).await.map_err(words)?;
        let mut index = 0;
        while let Some(tensor) = received.next_tensor().await.map_err(words)? {
            sleep(Duration::from_millis(60)).await;
            let sent = weights[index].to_bytes().map_err(words)?;
            ensure!(tensor.to_bytes().map_err(words)? == sent, "tensor {index} was overwritten");
            index += 1;
        }
        ensure!(index == 5, "{index} tensors arrived");
        Ok(())
    };
    let fast = collect(&mut *fast[0], 1);
    let (sent, slow, fast) = futures::future::join3(send, slow, fast).await;
    sent.map_err(words)?;
    fast.map_err(words)?;
    slow
}

async fn a_slow_trainer_sends_everything(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    let weights = model(3, 1);
    let count = suite.expected(weights.clone()).len();
    let slow = futures::stream::iter(weights).then(|weight| async {
        sleep(Duration::from_millis(30)).await;
        weight
    });
    let send = group.trainer.send_weights(ensure_async_iterator(slow), Version(1));
    let (sent, received) = futures::future::join(send, collect(&mut *group.rollouts[0], 1)).await;
    sent.map_err(words)?;
    let arrived = received.map_err(words)?.len();
    ensure!(arrived == count, "{arrived} of {count} tensors arrived");
    Ok(())
}

async fn installing_fills_a_map_of_tensors(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    let mut map = TensorMap::new();
    for version in 1..3 {
        let mut weights = model(12, version);
        weights.push(weight("huge", DType::U8, &[3_000_000], version));
        let send =
            group.trainer.send_weights(ensure_async_iterator(weights.clone()), Version(version));
        let rollout = &mut group.rollouts[0];
        let receive = async { rollout.receive_weights(None).await?.install(&mut map).await };
        let (sent, received) = futures::future::join(send, receive).await;
        sent.map_err(words)?;
        let report = received.map_err(words)?;
        let on_the_wire = suite.on_the_wire(weights.clone()).len() as u64;
        ensure!(report.tensors == on_the_wire, "{} tensors were counted", report.tensors);
        let weights = suite.expected(weights);
        for weight in &weights {
            let sent = weight.to_bytes().map_err(words)?;
            let here = map.get(weight.name()).map(|(_, bytes)| bytes);
            ensure!(here == Some(&sent[..]), "`{}` is not what was sent", weight.name());
        }
    }
    Ok(())
}

/// The number of buckets of a long model.
const LONG: u64 = 8;

/// A model of several buckets.
fn long(seed: u64) -> Vec<Weight> {
    (0..LONG).map(|i| weight(&format!("w{i}"), DType::U8, &[900_000], seed + i)).collect()
}

/// The update must fail on the trainer, naming the first rollout, and on the second rollout. The next update must succeed.
async fn fails_and_recovers(
    mut group: Group,
    kind: ErrorKind,
    give_up: impl AsyncFnOnce(engine_core::ReceivedWeights<'_>),
) -> Verdict {
    let first = group.rank_of(0);
    let send = group.trainer.send_weights(ensure_async_iterator(long(1)), Version(1));
    let (one, two) = group.rollouts.split_at_mut(1);
    let one = async {
        let mut received = one[0].receive_weights(None).await.map_err(words)?;
        let bucket = received.next_bucket().await.map_err(words)?;
        ensure!(bucket.is_some(), "no bucket arrived");
        drop(bucket);
        give_up(received).await;
        Ok(())
    };
    let (sent, one, two) = futures::future::join3(send, one, collect(&mut *two[0], 1)).await;
    one?;
    let Err(error) = sent else { return Err("the trainer reports success".into()) };
    ensure!(error.report().rank == Some(first), "the error does not name rank {first}: {error}");
    ensure!(error.kind() == kind, "the trainer's error is {:?}: {error}", error.kind());
    ensure!(two.is_err(), "the other rollout has a complete version");
    group.exact(long(2), 2).await.map(drop)
}

async fn a_receiver_that_drops_the_stream_ends_the_update_everywhere(suite: &Suite) -> Verdict {
    let group = Group::form(suite, 2).await.map_err(words)?;
    fails_and_recovers(group, ErrorKind::Aborted, async |received| drop(received)).await
}

async fn a_receiver_says_why_it_gives_up(suite: &Suite) -> Verdict {
    let group = Group::form(suite, 2).await.map_err(words)?;
    let why = Error::new(ErrorKind::Resource, "installing", "no memory for the cache");
    fails_and_recovers(group, ErrorKind::Resource, async |received| received.fail(why)).await
}

async fn an_error_of_the_source_ends_the_update_everywhere(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    let broken = long(1).into_iter().map(Ok).chain([Err(std::io::Error::other("shard 3 is gone"))]);
    let send = group.trainer.send_weights(ensure_async_iterator(broken), Version(1));
    let receive = group.rollouts.iter_mut().map(|rollout| collect(&mut **rollout, 1));
    let receive = futures::future::join_all(receive);
    let (sent, received) = futures::future::join(send, receive).await;
    let Err(error) = sent else { return Err("the trainer reports success".into()) };
    ensure!(error.kind() == ErrorKind::Source, "the trainer's error is {error}");
    for received in received {
        let Err(error) = received else { return Err("a rollout has a complete version".into()) };
        ensure!(error.to_string().contains("shard 3"), "a rollout is not told why: {error}");
    }
    group.exact(long(2), 2).await.map(drop)
}

async fn a_part_of_a_tensor_is_refused_by_name(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    group.exact(model(5, 1), 1).await?;
    let mut weights = model(5, 2);
    let part = weights[1].clone();
    let (mut full, mut offset) = (part.meta().shape.to_vec(), vec![0; part.meta().shape.len()]);
    let Some((side, first)) = full.first_mut().zip(offset.first_mut()) else {
        return Err("the case needs a weight with dimensions".into());
    };
    *first = 1;
    *side += 1;
    let region = TensorBox::new(&offset, &part.meta().shape).map_err(words)?;
    weights[1] = part.of_box(full, region).map_err(words)?;
    let (sent, received) = group.update(weights, 2).await;
    let Err(error) = sent else { return Err("the trainer reports success".into()) };
    let named = error.report().tensor.as_deref() == Some("layers.0.norm");
    ensure!(error.kind() == ErrorKind::Weight && named, "the error is {error}");
    ensure!(received[0].is_err(), "the rollout has a complete version");
    group.exact(model(5, 3), 3).await.map(drop)
}

async fn a_name_used_twice_is_refused(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    group.exact(model(5, 1), 1).await?;
    // Once within the part that equals the last update, once after it.
    for (version, at) in [(2, 3), (3, 21)] {
        let mut weights = model(5, version);
        let twice = weights[1].clone();
        weights.insert(at, twice);
        let (sent, received) = group.update(weights, version).await;
        let Err(error) = sent else { return Err("the trainer reports success".into()) };
        let named = error.report().tensor.as_deref() == Some("layers.0.norm");
        ensure!(error.kind() == ErrorKind::Weight && named, "the error is {error}");
        ensure!(received[0].is_err(), "the rollout has a complete version");
    }
    group.exact(model(5, 4), 4).await.map(drop)
}

async fn a_send_that_is_dropped_ends_the_update_everywhere(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    let stuck = futures::stream::iter(long(1)).chain(futures::stream::pending());
    let send = group.trainer.send_weights(ensure_async_iterator(stuck), Version(1));
    let send = tokio::time::timeout(Duration::from_millis(300), send);
    let receive = group.rollouts.iter_mut().map(|rollout| collect(&mut **rollout, 1));
    let receive = futures::future::join_all(receive);
    let (sent, received) = futures::future::join(send, receive).await;
    ensure!(sent.is_err(), "the send ended by itself");
    ensure!(received.iter().all(Result::is_err), "a rollout has a complete version");
    group.exact(long(2), 2).await.map(drop)
}

async fn a_receiver_that_never_comes_is_a_timeout_that_names_it(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    let second = group.rank_of(1);
    let send = group.trainer.send_weights(ensure_async_iterator(long(1)), Version(1));
    let present = collect(&mut *group.rollouts[0], 1);
    let (sent, present) = futures::future::join(send, present).await;
    let Err(error) = sent else { return Err("the trainer reports success".into()) };
    ensure!(error.kind() == ErrorKind::Timeout, "the error is {error}");
    ensure!(error.report().rank == Some(second), "the error does not name rank {second}: {error}");
    ensure!(present.is_err(), "the present rollout has a complete version");
    group.exact(long(2), 2).await.map(drop)
}

async fn another_version_than_expected_is_a_mismatch(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    let send = group.trainer.send_weights(ensure_async_iterator(long(1)), Version(7));
    let receive = collect(&mut *group.rollouts[0], 8);
    let (sent, received) = futures::future::join(send, receive).await;
    for error in [sent.err(), received.err()] {
        let Some(error) = error else { return Err("one side reports success".into()) };
        ensure!(error.kind() == ErrorKind::Mismatch, "the error is {error}");
    }
    group.exact(long(2), 9).await.map(drop)
}

async fn a_receiver_whose_engine_is_gone_is_an_error(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    let second = group.rank_of(1);
    let mut gone = group.rollouts.remove(1);
    let receiving = tokio::spawn(async move {
        if let Ok(mut received) = gone.receive_weights(None).await {
            // The first bucket is read, and then this rollout is dropped.
            drop(received.next_bucket().await);
        }
    });
    let send = group.trainer.send_weights(ensure_async_iterator(long(1)), Version(1));
    let survivor = collect(&mut *group.rollouts[0], 1);
    let (sent, survivor) = futures::future::join(send, survivor).await;
    receiving.await.map_err(|error| error.to_string())?;
    let Err(error) = sent else { return Err("the trainer reports success".into()) };
    ensure!(error.report().rank == Some(second), "the error does not name rank {second}: {error}");
    ensure!(survivor.is_err(), "the survivor has a complete version");
    Ok(())
}

async fn a_rollouts_note_reaches_the_report(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    let send = group.trainer.send_weights(ensure_async_iterator(model(2, 1)), Version(1));
    let rollout = &mut group.rollouts[0];
    let receive = async {
        let received = rollout.receive_weights(None).await?;
        received.note("installed in 3 ms".into());
        received.finish().await
    };
    let (sent, received) = futures::future::join(send, receive).await;
    received.map_err(words)?;
    let report = sent.map_err(words)?;
    ensure!(report.receivers[0].notes == "installed in 3 ms", "the report is {report:?}");
    Ok(())
}

async fn an_engine_runs_on_any_executor_and_its_deadlines_with_it(suite: &Suite) -> Verdict {
    // On a thread without a runtime.
    let suite = suite.clone();
    let updates = async move {
        let mut group = Group::form(&suite, 1).await.map_err(words)?;
        group.exact(model(1, 1), 1).await?;
        let late = group.rollouts[0].receive_weights(None).await.map(drop);
        let kind = late.as_ref().map_err(Error::kind);
        ensure!(kind == Err(ErrorKind::Timeout), "nothing was sent, and the rollout got {late:?}");
        let sent = group.trainer.send_weights(ensure_async_iterator(model(1, 2)), Version(2));
        let sent = sent.await.map(drop);
        let kind = sent.as_ref().map_err(Error::kind);
        ensure!(kind == Err(ErrorKind::Timeout), "nobody received, and the trainer got {sent:?}");
        Ok(())
    };
    let (tell, told) = futures::channel::oneshot::channel();
    std::thread::spawn(move || drop(tell.send(futures::executor::block_on(updates))));
    told.await.unwrap_or_else(|_| Err("it panicked".into()))
}

async fn a_group_that_has_gaps_in_its_ranks_is_updated_whole(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 3).await.map_err(words)?;
    group.exact(model(1, 1), 1).await?;
    // The remaining ranks have a gap, and each is updated under its own rank.
    let mut group = group.without(0).await.map_err(words)?;
    for version in 2..4 {
        let report = group.exact(model(1, version), version).await?;
        let ranks: Vec<Rank> = report.receivers.iter().map(|receiver| receiver.rank).collect();
        let expected = [group.rank_of(0), group.rank_of(1)];
        ensure!(ranks == expected, "ranks {ranks:?} were updated, not {expected:?}");
        ensure!(report.absent.is_empty(), "{:?} are absent", report.absent);
    }
    Ok(())
}

async fn a_backend_refuses_a_group_without_a_trainer(suite: &Suite) -> Verdict {
    let refused = |workers: &[_]| match suite.backend.build_topology(workers) {
        Err(error) if error.kind() == ErrorKind::Mismatch => Ok(()),
        other => Err(format!("not refused: {other:?}")),
    };
    refused(&[])
}

/// All bytes of a bucket, or the reason why they cannot be read.
fn content(bucket: &ReceivedBucket) -> engine_core::Result<Vec<u8>> {
    let mut content = Vec::new();
    for piece in bucket.pieces() {
        let start = content.len();
        content.resize(start + piece.bytes.len() as usize, 0);
        piece.bytes.read(0, &mut content[start..])?;
    }
    Ok(content)
}

async fn a_view_of_a_group_that_is_no_more_frees_nothing_of_the_one_that_follows(
    suite: &Suite,
) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    let send = group.trainer.send_weights(ensure_async_iterator(long(1)), Version(1));
    let rollout = &mut group.rollouts[0];
    let receive = async {
        let mut received = rollout.receive_weights(None).await.map_err(words)?;
        let kept = received.next_bucket().await.map_err(words)?.ok_or("no bucket arrived")?;
        // The update is given up while a view of it remains.
        drop(received);
        Ok::<_, String>(kept)
    };
    let (sent, kept) = futures::future::join(send, receive).await;
    ensure!(sent.is_err(), "the trainer reports success");
    let kept = kept?;
    let before = content(&kept).map_err(words)?;
    let mut group = group.anew().await.map_err(words)?;
    // A backend may end views with their group, but must never change their bytes.
    if let Ok(after) = content(&kept) {
        ensure!(after == before, "a view changed when its group ended");
    }
    let send = group.trainer.send_weights(ensure_async_iterator(long(100)), Version(1));
    let rollout = &mut group.rollouts[0];
    let receive = async {
        let mut received = rollout.receive_weights(None).await.map_err(words)?;
        let bucket = received.next_bucket().await.map_err(words)?.ok_or("no bucket arrived")?;
        let before = content(&bucket).map_err(words)?;
        drop(kept);
        // The trainer fills every slot that it considers free.
        sleep(Duration::from_millis(300)).await;
        let after = content(&bucket).map_err(words)?;
        ensure!(after == before, "a verified bucket was overwritten while it was read");
        drop(bucket);
        received.finish().await.map_err(words)
    };
    let (sent, received) = futures::future::join(send, receive).await;
    sent.map_err(words)?;
    received?;
    group.exact(long(3), 2).await.map(drop)
}

async fn a_stream_that_is_dropped_after_the_commit_costs_no_later_update(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    let first = group.rank_of(0);
    let ready = group.ready.clone();
    let (one, two) = group.rollouts.split_at_mut(1);
    let (confirmed, wait) = futures::channel::oneshot::channel();
    let send = group.trainer.send_weights(ensure_async_iterator(long(1)), Version(1));
    let (committed, done) = futures::channel::oneshot::channel();
    let send = async {
        let sent = send.await;
        // The receiver is gone if the update failed.
        committed.send(()).ok();
        sent
    };
    let one = async {
        let mut received = one[0].receive_weights(None).await.map_err(words)?;
        loop {
            // Until the trainer has its confirmation. What follows is not checked.
            let more = async { received.next_bucket().await.map(|bucket| bucket.is_some()) };
            let heard = async {
                while !ready.has(first) {
                    sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::select! {
                biased;
                () = heard => break,
                more = more => ensure!(more.map_err(words)?, "the version is active too early"),
            }
        }
        confirmed.send(()).ok();
        done.await.ok();
        drop(received);
        Ok(())
    };
    let two = async {
        let mut received = two[0].receive_weights(None).await.map_err(words)?;
        // It becomes ready last, because it holds its last bucket until the other rollout is ready.
        loop {
            let bucket = received.next_bucket().await.map_err(words)?.ok_or("it ended early")?;
            let is_last = |piece: ReceivedPiece| {
                let end = piece.start + piece.bytes.len();
                *piece.meta.name == *format!("w{}", LONG - 1)
                    && piece.meta.byte_len().is_ok_and(|len| len == end)
            };
            if bucket.pieces().any(is_last) {
                wait.await.ok();
                break;
            }
        }
        received.finish().await.map(drop).map_err(words)
    };
    let (sent, one, two) = futures::future::join3(send, one, two).await;
    one?;
    two?;
    sent.map_err(words)?;
    for version in 2..5 {
        group.exact(long(version), version).await.map_err(|w| format!("update {version}: {w}"))?;
    }
    Ok(())
}

async fn an_error_stays_whatever_is_asked_after_it(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    let broken = long(1).into_iter().map(Ok).chain([Err(std::io::Error::other("shard 3 is gone"))]);
    let send = group.trainer.send_weights(ensure_async_iterator(broken), Version(1));
    let rollout = &mut group.rollouts[0];
    let receive = async {
        let mut received = rollout.receive_weights(None).await.map_err(words)?;
        let first = loop {
            match received.next_tensor().await {
                Ok(Some(_)) => {}
                Ok(None) => return Err("the version is complete".to_owned()),
                Err(error) => break error,
            }
        };
        for _ in 0..2 {
            let Err(again) = received.next_tensor().await else {
                return Err("after the error, the version is complete".into());
            };
            ensure!(again.kind() == first.kind(), "it was {first}, and then {again}");
            ensure!(received.next_bucket().await.is_err(), "after the error, there are buckets");
        }
        ensure!(received.finish().await.is_err(), "after the error, there is a report");
        Ok(())
    };
    let (sent, received) = futures::future::join(send, receive).await;
    ensure!(sent.is_err(), "the trainer reports success");
    received?;
    group.exact(long(2), 2).await.map(drop)
}

async fn a_wait_for_an_update_that_is_dropped_loses_nothing(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    // Before the update is announced.
    {
        let early = group.rollouts[0].receive_weights(None);
        let early = tokio::time::timeout(Duration::from_millis(20), early).await;
        ensure!(early.is_err(), "an update was received before one was sent");
    }
    group.exact(model(2, 1), 1).await?;
    // After the announcement. On a busy host the wait may have ended before it is dropped: then again.
    for version in 2..20 {
        let send = group.trainer.send_weights(ensure_async_iterator(long(1)), Version(version));
        let rollout = &mut group.rollouts[0];
        let receive = async {
            let other = rollout.receive_weights(Some(Version(version + 1000)));
            if let Ok(ended) = tokio::time::timeout(Duration::from_millis(100), other).await {
                let Err(error) = ended else {
                    return Err("an update of another version was received".into());
                };
                ensure!(error.kind() == ErrorKind::Mismatch, "the wait ended with {error}");
                return Ok(false);
            }
            let received = rollout.receive_weights(None).await.map_err(words)?;
            let report = received.finish().await.map_err(words)?;
            ensure!(report.version == Version(version), "version {} came", report.version);
            Ok(true)
        };
        let (sent, received) = futures::future::join(send, receive).await;
        if received? {
            return sent.map(drop).map_err(words);
        }
        // The trainer learns of the refusal: a wait that ended loses nothing.
        let Err(error) = sent else { return Err("a refused update was sent".into()) };
        ensure!(error.kind() == ErrorKind::Mismatch, "the trainer says {error}");
    }
    // An engine that refuses another version at once has no such wait.
    Ok(())
}

async fn versions_may_go_back(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    for (seed, version) in [(1, 150), (2, 100), (3, 100), (4, 101)] {
        group.exact(model(4, seed), version).await?;
    }
    Ok(())
}

/// Whether an error says that there are no copies.
fn has_no_copies(error: &Error) -> Verdict {
    match error.kind() {
        ErrorKind::Config | ErrorKind::State => Ok(()),
        _ => Err(format!("there are no copies, and the error is: {error}")),
    }
}

async fn a_version_is_attested_or_the_error_says_that_there_are_no_copies(
    suite: &Suite,
) -> Verdict {
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    let Err(early) = group.trainer.attest().await else {
        return Err("a version was attested before there was one".into());
    };
    has_no_copies(&early)?;
    group.exact(model(3, 1), 1).await?;
    group.exact(model(3, 2), 2).await?;
    match group.attest(2).await {
        Err(error) => has_no_copies(&error)?,
        Ok((report, received)) => {
            ensure!(report.version == Version(2), "version {} was attested", report.version);
            let is_proven = report.delta.is_some_and(|delta| delta.attested);
            ensure!(is_proven, "the report knows of no proof");
            ensure!(received.len() == 2, "{} rollouts took part", received.len());
            let expected = group.expected(model(3, 2))?;
            for received in received {
                compare(&expected, &received.map_err(words)?)?;
            }
        }
    }
    group.exact(model(3, 3), 3).await.map(drop)
}

async fn a_part_of_a_version_leaves_all_others_or_the_error_says_that_there_are_no_copies(
    suite: &Suite,
) -> Verdict {
    // The last layer.
    let part = |seed| model(3, seed).split_off(11);
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    let Err(early) = group.send_part(part(1), 1).await else {
        return Err("a part was sent before there was a version".into());
    };
    has_no_copies(&early)?;
    group.exact(model(3, 1), 1).await?;
    let keeps_copies = match group.send_part(part(2), 2).await {
        Err(error) => {
            has_no_copies(&error)?;
            false
        }
        Ok((report, received)) => {
            ensure!(report.version == Version(2), "version {} was sent", report.version);
            ensure!(report.counts.tensors == 5, "{} weights were sent", report.counts.tensors);
            ensure!(received.len() == 2, "{} rollouts took part", received.len());
            let mut expected = group.expected(part(2))?;
            let others = group.expected(model(3, 1))?.into_iter();
            let others: Vec<_> =
                others.filter(|(meta, _)| !meta.name.starts_with("layers.2.")).collect();
            expected.extend(others);
            for received in received {
                compare(&expected, &received.map_err(words)?)?;
            }
            true
        }
    };
    // Whoever has copies for the one has them for the other: no engine in between has forgotten to pass it on.
    let attests = group.attest(2).await.is_ok();
    ensure!(attests == keeps_copies, "a part: {keeps_copies}, attested: {attests}");
    group.exact(model(3, 3), 3).await.map(drop)
}

/// The parts of [`model`] here: its embedding and its last layers are the rest.
const PARTS: [(&str, &str); 2] = [("first", "layers.0.*"), ("second", "layers.1.*")];

/// Whether the backend can leave parts out. One that cannot has to refuse a rollout that wants that, and to say which backends can.
async fn leaves_parts_out(suite: &Suite) -> Result<bool, String> {
    if suite.backend.sends_parts() {
        return Ok(true);
    }
    let registry = Registry::new().with(suite.backend);
    let suite = suite.with_parts(&PARTS, &[Some(&["first"])]);
    let rank = suite.trainers;
    let mut config = suite.config_of(rank);
    config.layers.clear();
    let context = EngineContext::new(config).with_rank(Rank(rank));
    let Err(error) = registry.prepare_rollout(context).await else {
        return Err("a rollout that wants a part alone is not refused".into());
    };
    ensure!(error.kind() == ErrorKind::Config, "the error is {error}");
    ensure!(error.to_string().contains("backends that can"), "the error is {error}");
    ensure!(error.report().rank == Some(Rank(rank)), "the error does not name the rank: {error}");
    Ok(false)
}

/// What a rollout gets that wants these parts.
fn only(wants: Option<&[&str]>, all: &[Received]) -> Vec<Received> {
    let part = |name: &str| {
        let found =
            PARTS.iter().find(|(_, pattern)| name.starts_with(pattern.trim_end_matches('*')));
        found.map_or("policy", |(part, _)| part)
    };
    let is_wanted = |name: &str| wants.is_none_or(|wants| wants.contains(&part(name)));
    all.iter().filter(|(meta, _)| is_wanted(&meta.name)).cloned().collect()
}

async fn a_rollout_gets_the_parts_that_it_wants_and_nothing_else_or_is_refused(
    suite: &Suite,
) -> Verdict {
    if !leaves_parts_out(suite).await? {
        return Ok(());
    }
    let wants: [Option<&[&str]>; 4] =
        [None, Some(&["first"]), Some(&["policy", "second"]), Some(&["second"])];
    let mut group = Group::form(&suite.with_parts(&PARTS, &wants), 4).await.map_err(words)?;
    // Whole, with the same shapes again, with other ones, and without one of the parts.
    for (version, layers) in (1..).zip([3, 3, 3, 5, 5, 1, 3]) {
        let weights = model(layers, version);
        let all = group.expected(weights.clone())?;
        let (sent, received) = group.update(weights, version).await;
        let report = sent.map_err(words)?;
        for (rollout, (received, wants)) in (0..).zip(received.into_iter().zip(wants)) {
            let expected = only(wants, &all);
            let rank = group.rank_of(rollout);
            compare(&expected, &received.map_err(words)?)
                .map_err(|w| format!("version {version}, rank {rank}: {w}"))?;
            let told = &report.receivers[rollout as usize].parts;
            let all = ["first", "second", "policy"];
            let got = all.iter().filter(|part| wants.is_none_or(|wants| wants.contains(part)));
            ensure!(told.iter().eq(got), "the report says that rank {rank} got {told:?}");
        }
        let is_same = matches!(version, 2 | 3 | 5);
        ensure!(report.plan_reused == is_same, "version {version}: {report:?}");
    }
    Ok(())
}

async fn a_part_that_the_trainer_does_not_have_is_a_mismatch_that_names_the_rank(
    suite: &Suite,
) -> Verdict {
    if !leaves_parts_out(suite).await? {
        return Ok(());
    }
    let suite = suite.with_parts(&PARTS, &[None, Some(&["first", "critic"])]);
    let mut group = Group::form(&suite, 2).await.map_err(words)?;
    let second = group.rank_of(1);
    let (sent, received) = group.update(model(2, 1), 1).await;
    let Err(error) = sent else { return Err("the trainer reports success".into()) };
    ensure!(error.kind() == ErrorKind::Mismatch, "the error is {error}");
    ensure!(error.report().rank == Some(second), "the error does not name rank {second}: {error}");
    ensure!(error.to_string().contains("`critic`"), "the error does not name the part: {error}");
    ensure!(received.iter().all(Result::is_err), "a rollout has a complete version");
    Ok(())
}

async fn a_rollout_that_wants_some_parts_and_dies_keeps_no_other_from_its_own(
    suite: &Suite,
) -> Verdict {
    if !leaves_parts_out(suite).await? {
        return Ok(());
    }
    let wants: [Option<&[&str]>; 3] =
        [Some(&["policy"]), Some(&["first"]), Some(&["first", "second"])];
    let mut group = Group::form(&suite.with_parts(&PARTS, &wants), 3).await.map_err(words)?;
    let third = group.rank_of(2);
    let mut gone = group.rollouts.remove(2);
    let plane = group.controls.pop();
    let dying = async move {
        if let Ok(mut received) = gone.receive_weights(None).await {
            drop(received.next_bucket().await);
        }
        // Its engine and its connection are gone as well.
        drop(gone);
        if let Some(plane) = plane {
            drop(plane.close().await);
        }
    };
    let send = group.trainer.send_weights(ensure_async_iterator(model(3, 1)), Version(1));
    let receive = group.rollouts.iter_mut().map(|rollout| collect(&mut **rollout, 1));
    let update = futures::future::join3(send, futures::future::join_all(receive), dying);
    let (sent, received, ()) = update.await;
    match sent {
        // Where rollouts fetch from one another, the update goes on without it.
        Ok(report) => ensure!(report.absent == [third], "rank {third} is not absent: {report:?}"),
        Err(error) => {
            ensure!(error.report().rank == Some(third), "the error does not name {third}: {error}");
            ensure!(received.iter().all(Result::is_err), "a rollout has a complete version");
        }
    }
    // What the third wanted alone, nobody wants any more.
    for version in 2..4 {
        let weights = model(3, version);
        let all = group.expected(weights.clone())?;
        let (sent, received) = group.update(weights, version).await;
        sent.map_err(words)?;
        for (received, wants) in received.into_iter().zip(wants) {
            compare(&only(wants, &all), &received.map_err(words)?)?;
        }
    }
    Ok(())
}

async fn ranks_that_come_and_go_keep_no_wait_alive(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    let first = group.rank_of(0);
    let Some(at) = group.at.clone() else { return Err("the suite has no control plane".into()) };
    let flapping = async {
        loop {
            let joined = ControlPlane::join(at.clone(), Role::Rollout, None).await;
            sleep(Duration::from_millis(300)).await;
            if let Ok(plane) = joined {
                drop(plane.close().await);
            }
        }
    };
    let send = group.trainer.send_weights(ensure_async_iterator(long(1)), Version(1));
    let (one, two) = group.rollouts.split_at_mut(1);
    let receive = async {
        let mut received = one[0].receive_weights(None).await?;
        let kept = received.next_bucket().await?;
        // It holds the first bucket until the update has ended, and then takes the rest.
        while let Ok(Some(_)) = received.next_bucket().await {}
        sleep(Duration::from_secs(3600)).await;
        drop(kept);
        Ok::<_, Error>(())
    };
    let update = async {
        tokio::select! {
            sent = send => Some(sent),
            _ = receive => None,
            _ = async { drop(collect(&mut *two[0], 1).await); std::future::pending::<()>().await } => None,
            () = flapping => None,
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(30), update).await;
    let Ok(Some(sent)) = ended else { return Err("the wait has no end".into()) };
    let Err(error) = sent else { return Err("the trainer reports success".into()) };
    ensure!(error.kind() == ErrorKind::Timeout, "the error is {error}");
    ensure!(error.report().rank == Some(first), "the error does not name rank {first}: {error}");
    Ok(())
}

async fn a_rollout_that_is_slow_within_the_deadline_is_waited_for_by_all(suite: &Suite) -> Verdict {
    // Two buckets are left when the trainer has sent its last one. Together they take longer than any deadline, but each takes less. What a
    // deadline has left over is for a busy machine, which may take seconds to begin a pause.
    // The first group only counts buckets.
    let suite = suite.clone().with_config(|config| {
        config.timeout_seconds = config.timeout_seconds.max(9.0);
    });
    let pause = Duration::from_secs_f64(0.55 * suite.config.timeout_seconds);
    let mut buckets = 0;
    for is_slow in [false, true] {
        let mut group = Group::form(&suite, 2).await.map_err(words)?;
        let weights: Vec<Weight> = long(1).into_iter().take(2).collect();
        let send = group.trainer.send_weights(ensure_async_iterator(weights), Version(1));
        let (slow, fast) = group.rollouts.split_at_mut(1);
        let slow = async {
            let mut received = slow[0].receive_weights(None).await?;
            let mut seen = 0;
            while let Some(bucket) = received.next_bucket().await? {
                seen += 1;
                if is_slow && seen + 2 > buckets {
                    sleep(pause).await;
                }
                drop(bucket);
            }
            Ok::<_, Error>(seen)
        };
        let fast = collect(&mut *fast[0], 1);
        let (sent, slow, fast) = futures::future::join3(send, slow, fast).await;
        sent.map_err(words)?;
        buckets = slow.map_err(words)?;
        fast.map_err(words)?;
    }
    ensure!(buckets >= 2, "there were {buckets} buckets");
    Ok(())
}

/// Bytes that take a while to encode, and that record when they are.
#[derive(Debug, Default)]
struct Slow(AtomicU64);

impl Encoding for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn source_bytes(&self) -> u64 {
        0
    }

    fn encode_host(&self, _: std::ops::Range<u64>, to: &mut [u8]) -> engine_core::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(50));
        to.fill(1);
        self.0.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}

async fn nothing_is_read_of_the_weights_when_a_failed_send_has_returned(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    let slow = Arc::new(Slow::default());
    let weight = |i: u64| {
        let meta = TensorMeta::new(format!("w{i}"), DType::U8, [900_000]);
        Weight::encoded(meta, slow.clone(), Treatment::Plain)
    };
    // The source fails while the first bucket is filled.
    let weights = [weight(0), weight(1), Err(Error::new(ErrorKind::Source, "reading", "gone"))];
    let send = group.trainer.send_weights(ensure_async_iterator(weights), Version(1));
    // A trainer that changes its weights in place needs to be their only owner.
    let send = async {
        let sent = send.await;
        (sent, slow.0.load(Ordering::SeqCst), Arc::strong_count(&slow) - 1)
    };
    let receive = collect(&mut *group.rollouts[0], 1);
    let ((sent, reading, kept), received) = futures::future::join(send, receive).await;
    ensure!(sent.is_err() && received.is_err(), "the update did not fail");
    ensure!(reading == 0, "{reading} threads read weights after the send had returned");
    ensure!(kept == 0, "{kept} weights were kept after the send had returned");
    // The same when a rollout gives up.
    let send = group
        .trainer
        .send_weights(ensure_async_iterator((0..6).map(weight).collect::<Vec<_>>()), Version(1));
    let send = async {
        let sent = send.await;
        (sent, Arc::strong_count(&slow) - 1)
    };
    let rollout = &mut group.rollouts[0];
    let give_up = async {
        let mut received = rollout.receive_weights(None).await?;
        received.next_bucket().await?;
        received.fail(Error::new(ErrorKind::Resource, "installing", "no room"));
        Ok::<_, Error>(())
    };
    let ((sent, kept), gave_up) = futures::future::join(send, give_up).await;
    gave_up.map_err(words)?;
    ensure!(sent.is_err(), "an update that a rollout gave up was sent");
    ensure!(kept == 0, "{kept} weights were kept after the send had returned");
    group.exact(long(2), 2).await.map(drop)
}

async fn other_names_than_before_are_refused_everywhere(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 2).await.map_err(words)?;
    let mut map = TensorMap::new();
    let mut parts = TensorMap::partial();
    // Fewer weights, none, others; then all of them again.
    let all = model(3, 1);
    let without = |at: usize| {
        let mut weights = model(3, 2);
        weights.remove(at);
        weights
    };
    let updates = [(all.clone(), true), (without(1), false), (Vec::new(), false), (all, true)];
    for (version, (weights, is_whole)) in (1..).zip(updates) {
        let send = group.trainer.send_weights(ensure_async_iterator(weights), Version(version));
        let (one, two) = group.rollouts.split_at_mut(1);
        let one = async { one[0].receive_weights(None).await?.install(&mut map).await };
        let two = async { two[0].receive_weights(None).await?.install(&mut parts).await };
        let (sent, one, two) = futures::future::join3(send, one, two).await;
        for (who, ended) in [("trainer", sent.err()), ("map", one.err()), ("other", two.err())] {
            match ended {
                None => ensure!(is_whole, "update {version}: the {who} has a part of the model"),
                Some(error) if is_whole => return Err(format!("update {version}: {error}")),
                Some(error) => {
                    ensure!(error.kind() == ErrorKind::Mismatch, "the {who} says {error}");
                }
            }
        }
    }
    Ok(())
}

async fn garbage_of_a_rank_without_a_part_in_updates_is_dropped(suite: &Suite) -> Verdict {
    let mut group = Group::form(suite, 1).await.map_err(words)?;
    let Some(at) = group.at.clone() else { return Err("the suite has no control plane".into()) };
    // It has the token, but was never in the group.
    let stranger = ControlPlane::join(at, Role::Rollout, None).await.map_err(words)?;
    let send = group.trainer.send_weights(ensure_async_iterator(long(1)), Version(1));
    let rollout = &mut group.rollouts[0];
    let receive = async {
        let mut received = rollout.receive_weights(None).await.map_err(words)?;
        while let Some(bucket) = received.next_bucket().await.map_err(words)? {
            let garbage = Bytes::from_static(b"no message of an update");
            stranger.channel(UPDATES).send(Rank::LEADER, garbage).map_err(words)?;
            sleep(Duration::from_millis(5)).await;
            drop(bucket);
        }
        Ok::<_, String>(())
    };
    let (sent, received) = futures::future::join(send, receive).await;
    received?;
    sent.map(drop).map_err(words)
}
