//! What is the naive engine's own: memory is handed over and may be kept, and an engine that is gone is missed at once.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use backend_naive::BACKEND;
use engine_core::{
    CheckpointEngineConfig, DType, EngineContext, ErrorKind, Placement, PreparedRollout,
    PreparedTrainer, Rank, ReceivedWeights, Recovery, Result, RolloutEngine, TensorMap,
    TrainerEngine, Version, Weight, clock, ensure_async_iterator, form_local_group,
};
use futures::executor::block_on;
use futures::future::{join, join4, try_join};

/// Longer than anything here takes.
const LONG: f64 = 60.0;

fn context(timeout_seconds: f64) -> EngineContext {
    EngineContext::new({
        let mut config = CheckpointEngineConfig::new("naive");
        config.update_weights_bucket_megabytes = Some(1);
        config.timeout_seconds = timeout_seconds;
        config
    })
}

type Formed = (Box<dyn TrainerEngine>, Vec<Box<dyn RolloutEngine>>);

async fn prepare(timeout: f64, count: u32) -> (PreparedTrainer, Vec<PreparedRollout>) {
    let trainer = BACKEND.prepare_trainer(context(timeout)).await.unwrap();
    let mut rollouts = Vec::new();
    for rank in 1..=count {
        let context = context(timeout).with_rank(Rank(rank));
        rollouts.push(BACKEND.prepare_rollout(context).await.unwrap());
    }
    (trainer, rollouts)
}

async fn form(timeout: f64, count: u32) -> Formed {
    let (trainer, rollouts) = prepare(timeout, count).await;
    let formed = form_local_group(BACKEND, vec![trainer], rollouts).await;
    let (mut trainers, rollouts) = formed.unwrap();
    (trainers.remove(0), rollouts)
}

/// A weight that is nearly a bucket.
fn weight(index: u64) -> Weight {
    Weight::new(format!("w{index}"), DType::U8, [900_000], vec![index as u8; 900_000]).unwrap()
}

fn weights(count: u64) -> Vec<Weight> {
    (0..count).map(weight).collect()
}

async fn all(mut received: ReceivedWeights<'_>) -> Result<Vec<Weight>> {
    let mut tensors = Vec::new();
    while let Some(tensor) = received.next_tensor().await? {
        tensors.push(tensor);
    }
    Ok(tensors)
}

fn address(weight: &Weight) -> *const u8 {
    weight.contiguous_bytes().unwrap().as_ptr()
}

#[test]
fn weights_arrive_as_the_memory_that_they_are_and_stay_as_long_as_they_are_kept() {
    block_on(async {
        let (mut trainer, mut rollouts) = form(LONG, 2).await;
        // Small ones, one that is larger than a bucket, and one that is encoded: for all rollouts once.
        let mut sent = weights(5);
        sent.push(Weight::new("huge", DType::U8, [5_000_000], vec![7; 5_000_000]).unwrap());
        let tiny = |i| Weight::new(format!("t{i}"), DType::U8, [2], vec![i; 2]).unwrap();
        sent.extend((0..100).map(tiny));
        let storage = vec![3; 64];
        sent.push(Weight::strided("s", DType::F32, [2, 8], [1_i64, 2], 0, storage).unwrap());
        let mut kept = Vec::new();
        for version in 1..4 {
            let weights = ensure_async_iterator(sent.clone());
            let (one, two) = rollouts.split_at_mut(1);
            let one = async { all(one[0].receive_weights(None).await?).await };
            let two = async { all(two[0].receive_weights(None).await?).await };
            let (report, (one, two)) =
                try_join(trainer.send_weights(weights, Version(version)), try_join(one, two))
                    .await
                    .unwrap();
            assert_eq!((report.digest, report.plan_reused), (None, version > 1));
            assert!(report.buckets < 12, "{} buckets", report.buckets);
            assert_eq!((one.len(), two.len()), (sent.len(), sent.len()));
            for ((sent, one), two) in sent.iter().zip(&one).zip(&two) {
                assert_eq!(sent.to_bytes().unwrap(), one.to_bytes().unwrap(), "{}", sent.name());
                assert_eq!(address(one), address(two), "{}", sent.name());
                if sent.name() != "s" {
                    assert_eq!(address(one), address(sent), "{}", sent.name());
                }
            }
            kept.push((one, two));
        }
    });
}

#[test]
fn a_rollout_that_keeps_its_buckets_gets_all_of_them_and_one_that_asks_for_no_more_stops_the_trainer()
 {
    block_on(async {
        let (mut trainer, mut rollouts) = form(1.0, 1).await;
        let send = trainer.send_weights(ensure_async_iterator(weights(20)), Version(1));
        let receive = async {
            let mut received = rollouts[0].receive_weights(None).await?;
            let mut kept = Vec::new();
            while let Some(bucket) = received.next_bucket().await? {
                kept.push(bucket);
            }
            Ok(kept.len())
        };
        let (_, kept) = try_join(send, receive).await.unwrap();
        assert_eq!(kept, 20);

        // The stream is asked for three buckets: the one that the rollout has, and what follows in two slots.
        let taken = std::sync::atomic::AtomicU64::new(0);
        let counted = weights(20).into_iter().inspect(|_| {
            taken.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        });
        let send = trainer.send_weights(ensure_async_iterator(counted), Version(2));
        let receive = async {
            let mut received = rollouts[0].receive_weights(None).await.unwrap();
            drop(received.next_bucket().await.unwrap());
            clock::sleep(Duration::from_secs(30)).await;
        };
        let (mut send, mut receive) = (std::pin::pin!(send), std::pin::pin!(receive));
        let sent = futures::future::select(&mut send, &mut receive).await;
        let futures::future::Either::Left((Err(error), _)) = sent else { panic!("it is sent") };
        assert_eq!((error.kind(), error.report().rank), (ErrorKind::Timeout, Some(Rank(1))));
        assert!(
            taken.load(std::sync::atomic::Ordering::SeqCst) <= 4,
            "the stream was read far ahead"
        );
    });
}

/// The trainer says that it is alive while it waits for others.
#[test]
fn a_rollout_waits_as_long_as_the_trainer_waits_for_others() {
    let deadline = 2.0;
    block_on(async {
        let (mut trainer, mut rollouts) = form(deadline, 3).await;
        let [slow, slower, fast] = &mut rollouts[..] else { panic!("three rollouts") };
        let send = trainer.send_weights(ensure_async_iterator(weights(3)), Version(1));
        let receive = async |engine: &mut dyn RolloutEngine, pauses: &[f64]| {
            let mut received = engine.receive_weights(None).await?;
            for pause in pauses {
                received.next_bucket().await?.expect("a bucket");
                clock::sleep(Duration::from_secs_f64(deadline * pause)).await;
            }
            received.finish().await
        };
        let all = join4(
            send,
            receive(&mut **slow, &[0.8]),
            // Together longer than anybody's deadline.
            receive(&mut **slower, &[0.8, 0.8, 0.8]),
            receive(&mut **fast, &[]),
        );
        let (sent, slow, slower, fast) = all.await;
        sent.unwrap();
        for received in [slow, slower, fast] {
            received.unwrap();
        }
    });
}

async fn installs(rollout: &mut dyn RolloutEngine) -> Result<()> {
    rollout.receive_weights(None).await?.install(&mut TensorMap::new()).await.map(drop)
}

#[test]
fn a_rollout_that_is_dropped_within_an_update_or_before_it_is_missed_at_once() {
    block_on(async {
        let (mut trainer, mut rollouts) = form(LONG, 3).await;
        let mut second = rollouts.remove(1);
        let send = trainer.send_weights(ensure_async_iterator(weights(20)), Version(1));
        let receive = async move {
            // It has entered, and its engine is dropped by a panic, say.
            let received = second.receive_weights(None).await.unwrap();
            std::mem::forget(received);
        };
        let (one, three) = rollouts.split_at_mut(1);
        let others = join(installs(&mut *one[0]), installs(&mut *three[0]));
        let (sent, (), (one, three)) = futures::future::join3(send, receive, others).await;
        let error = sent.unwrap_err();
        assert_eq!((error.kind(), error.report().rank), (ErrorKind::PeerLost, Some(Rank(2))));
        for error in [one.unwrap_err(), three.unwrap_err()] {
            assert_eq!((error.kind(), error.report().rank), (ErrorKind::PeerLost, Some(Rank(2))));
        }
        // One leaves in order between updates: the report says who is missing.
        rollouts.remove(1).finalize().await.unwrap();
        let send = trainer.send_weights(ensure_async_iterator(weights(2)), Version(2));
        let (report, ()) = try_join(send, installs(&mut *rollouts[0])).await.unwrap();
        assert_eq!(report.absent, [Rank(2), Rank(3)]);
        drop(rollouts);
        let sent = trainer.send_weights(ensure_async_iterator(weights(2)), Version(3)).await;
        assert_eq!(sent.unwrap_err().kind(), ErrorKind::PeerLost);
    });
}

#[test]
fn a_rollout_hears_whether_its_trainer_was_lost_or_has_left_whatever_views_it_keeps() {
    for in_order in [false, true] {
        block_on(async {
            let (mut trainer, mut rollouts) = form(LONG, 1).await;
            let send = trainer.send_weights(ensure_async_iterator(weights(3)), Version(1));
            let receive = async {
                let received = rollouts[0].receive_weights(None).await?;
                all(received).await
            };
            let (_, views) = try_join(send, receive).await.unwrap();
            match in_order {
                true => trainer.finalize().await.unwrap(),
                false => drop(trainer),
            }
            let kind = if in_order { ErrorKind::TrainerLeft } else { ErrorKind::PeerLost };
            for _ in 0..2 {
                let error = rollouts[0].receive_weights(None).await.map(drop).unwrap_err();
                let told = error.report();
                assert_eq!((told.kind, told.rank), (kind, Some(Rank::LEADER)), "{error}");
                assert_eq!(told.recovery, Recovery::Reconnect, "{error}");
            }
            assert_eq!(views[2].to_bytes().unwrap()[..], [2; 900_000]);
        });
    }
}

#[test]
fn a_trainer_that_joins_names_the_rollout_that_is_gone_and_the_others_hear_of_it() {
    block_on(async {
        let (trainer, mut rollouts) = prepare(LONG, 2).await;
        let workers = [&trainer.metadata().clone(), rollouts[0].metadata(), rollouts[1].metadata()];
        let places = BACKEND.build_topology(&workers.map(Clone::clone)).unwrap();
        let place = |rank| Placement::of_rank(places.clone(), Rank(rank)).unwrap();
        drop(rollouts.remove(1));
        let mut first = rollouts.remove(0).join(place(1)).await.unwrap();
        let error = trainer.join(place(0)).await.map(drop).unwrap_err();
        assert_eq!((error.kind(), error.report().rank), (ErrorKind::PeerLost, Some(Rank(2))));
        let error = first.receive_weights(None).await.map(drop).unwrap_err();
        assert_eq!((error.kind(), error.report().rank), (ErrorKind::PeerLost, Some(Rank(0))));
    });
}

#[test]
fn a_group_of_another_process_or_of_two_trainers_is_refused() {
    block_on(async {
        let (trainer, rollouts) = prepare(LONG, 1).await;
        let mut elsewhere = rollouts[0].metadata().clone();
        elsewhere.pid += 1;
        let error = BACKEND.build_topology(&[trainer.metadata().clone(), elsewhere]).unwrap_err();
        assert_eq!((error.kind(), error.report().rank), (ErrorKind::Mismatch, Some(Rank(1))));
        let mut second = trainer.metadata().clone();
        second.rank = Rank(2);
        let all = [trainer.metadata().clone(), rollouts[0].metadata().clone(), second];
        let error = BACKEND.build_topology(&all).unwrap_err();
        assert_eq!((error.kind(), error.report().rank), (ErrorKind::Mismatch, Some(Rank(2))));
    });
}
