//! Groups whose ranks are processes: some are killed within an update, and others take weights from a
//! rollout's cache.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use backend_ipc::{BACKEND, CacheAddress, SharedCache, SharedCacheReader};
use bytes::Bytes;
use conformance::processes::{
    self, LIMIT, Process, Processes, WEIGHTS, address, be_a_child, control, model, receive,
    receivers, runtime, say, send, value,
};
use control_plane::{Address, ChannelId, ControlPlane, Event};
use engine_core::{
    CheckpointEngineConfig, CheckpointEngineWithCache, EngineContext, Error, ErrorKind, Expected,
    Rank, Result, Role, RolloutEngine, TrainerEngine, Version, Weight, ensure_async_iterator,
    form_local_group,
};
use futures::StreamExt;
use futures::future::{join, join_all, try_join};
use serving::CachedEngine;
use tokio::sync::Barrier;

const ROLE: &str = "CKPT_ENGINE_TEST_ROLE";
const ADDRESS: &str = "CKPT_ENGINE_TEST_ADDRESS";
const RANKS: &str = "CKPT_ENGINE_TEST_RANKS";

/// A model has six buckets then.
fn config(backend: &str) -> CheckpointEngineConfig {
    let mut config = CheckpointEngineConfig::new(backend);
    config.update_weights_bucket_megabytes = Some(1);
    config.timeout_seconds = 8.0;
    config.threads = std::num::NonZeroUsize::new(1);
    config
}

async fn lead(address: Address, ranks: u32) -> (ControlPlane, Box<dyn TrainerEngine>) {
    let control = ControlPlane::lead(control(address)).await.unwrap();
    let engine = processes::trainer(BACKEND, &control, config("ipc"), ranks).await.unwrap();
    (control, engine)
}

async fn follow(address: Address, ranks: u32) -> Box<dyn RolloutEngine> {
    let control = ControlPlane::join(control(address), Role::Rollout, None).await.unwrap();
    processes::rollout(BACKEND, &control, config("ipc"), ranks).await.unwrap()
}

/// What a child process does; nothing when this file's tests are run.
#[test]
fn a_process_of_a_group() {
    be_a_child(BACKEND);
    let Ok(role) = std::env::var(ROLE) else { return };
    let address: Address = std::env::var(ADDRESS).unwrap().parse().unwrap();
    let ranks: u32 = std::env::var(RANKS).unwrap().parse().unwrap();
    runtime().block_on(async {
        match role.as_str() {
            "trainer" => trainer(address, ranks).await,
            _ => caching_rollout(follow(address, ranks).await).await,
        }
    });
}

fn start(role: &str, address: &Address, ranks: u32) -> Process {
    let mut program = Process::program();
    program.env(ROLE, role).env(ADDRESS, address.to_string()).env(RANKS, ranks.to_string());
    Process::start(program)
}

/// Sends one version, and half of another one.
async fn trainer(address: Address, ranks: u32) {
    let (_control, mut engine) = lead(address, ranks).await;
    engine.send_weights(ensure_async_iterator(model(1)), Version(1)).await.unwrap();
    let endless = futures::stream::iter(model(2)).chain(futures::stream::pending());
    engine.send_weights(ensure_async_iterator(endless), Version(2)).await.unwrap();
}

/// A rollout whose cache others read.
async fn caching_rollout(engine: Box<dyn RolloutEngine>) {
    let cache = SharedCache::create().unwrap();
    say(&serde_json::to_string(&cache.address()).unwrap());
    let mut engine = CachedEngine::with_store(engine, Arc::new(cache));
    loop {
        match engine.update_cache(None).await {
            Ok(version) => say(&format!("cached {version}")),
            Err(error) if error.kind() == ErrorKind::Timeout => {}
            Err(error) => {
                say(&format!("{:?}", error.kind()));
                if error.report().rank == Some(Rank::LEADER) {
                    return;
                }
            }
        }
    }
}

#[test]
fn a_rollout_killed_within_an_update_is_an_error_on_every_other_rank_and_the_next_update_works() {
    let mut group = Processes::form(BACKEND, &config("ipc"), 1, 2);
    group.works(1, 2);
    let error = group.update(2, 5, |rollouts| rollouts[0].kill()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
    assert_eq!(error.report().rank, Some(Rank(1)), "{error}");
    assert_eq!(error.report().version, Some(Version(2)), "{error}");
    drop(group.children.remove(0));
    group.children[0].says("failed PeerLost 1");

    let report = group.update(3, usize::MAX, |_| {}).unwrap();
    assert_eq!((receivers(&report), &*report.absent), (vec![Rank(2)], &[Rank(1)][..]));
    group.children[0].says("active 3");

    group.join();
    group.works(4, 2);
}

#[test]
fn a_rollout_of_some_parts_killed_within_an_update_is_an_error_on_all_and_none_has_its_parts() {
    let mut config = config("ipc");
    let late = (6..WEIGHTS).map(|index| (&*format!("w{index}")).into());
    config.parts.insert("late".into(), late.collect());
    for victim in [0, 1] {
        let wants: [&[&str]; 2] = [&["policy"], &["late"]];
        let mut group = Processes::form_wanting(BACKEND, &config, 1, 3, &wants);
        group.works(1, 3);
        // The rank is killed before weight 10 is given. The first rollout wants weights 0 to 5, and has them by then.
        let error = group.update(2, 10, |rollouts| rollouts[victim].kill()).unwrap_err();
        let rank = Rank(victim as u32 + 1);
        assert_eq!(
            (error.kind(), error.report().rank),
            (ErrorKind::PeerLost, Some(rank)),
            "{error}"
        );
        drop(group.children.remove(victim));
        group.children.iter().for_each(|child| child.says(&format!("failed PeerLost {rank}")));
        group.works(3, 2);
        // One that wants everything takes its place.
        group.join();
        group.works(4, 3);
    }
}

#[test]
fn a_trainer_killed_within_an_update_is_an_error_on_every_rollout_and_its_address_is_free() {
    runtime().block_on(async {
        let address = address();
        let mut trainer = start("trainer", &address, 3);
        let within = Barrier::new(3);
        let rollouts = (0..2).map(|_| async {
            let mut engine = follow(address.clone(), 3).await;
            assert_eq!(receive(&mut *engine).await.unwrap(), Version(1));
            let mut received = engine.receive_weights(None).await.unwrap();
            assert!(received.next_tensor().await.unwrap().is_some());
            within.wait().await;
            received.finish().await.unwrap_err()
        });
        let killer = async {
            within.wait().await;
            trainer.kill();
        };
        let all = join(join_all(rollouts), killer);
        let (errors, ()) = tokio::time::timeout(LIMIT, all).await.expect("no hang");
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
            assert_eq!(error.report().rank, Some(Rank::LEADER), "{error}");
        }
        // Its address is free, and a group forms there again.
        let mut next = start("trainer", &address, 2);
        let mut engine = follow(address, 2).await;
        assert_eq!(receive(&mut *engine).await.unwrap(), Version(1));
        next.kill();
    });
}

/// What a reader gives: the version that it says, and the one that every byte says.
async fn read(reader: &SharedCacheReader) -> Result<u64> {
    let (version, mut weights) = reader.get_weights()?;
    let mut index = 0;
    while let Some(weight) = weights.next().await {
        let weight = weight?;
        assert_eq!(weight.name(), format!("w{index}"));
        let bytes = weight.to_bytes()?;
        assert!(bytes.iter().all(|&byte| byte == value(version, index)), "other bytes");
        index += 1;
    }
    assert_eq!(index, WEIGHTS);
    Ok(version.0)
}

#[test]
fn another_process_reads_the_last_whole_version_while_the_next_arrives_and_none_that_failed() {
    runtime().block_on(async {
        let address = address();
        let mut owner = start("caching rollout", &address, 2);
        let (_control, mut engine) = lead(address, 2).await;
        let cache: CacheAddress = serde_json::from_str(&owner.next_line()).unwrap();
        let reader = SharedCacheReader::open(cache).unwrap();
        assert_eq!(reader.version().unwrap(), None);
        assert_eq!(read(&reader).await.unwrap_err().kind(), ErrorKind::State);

        send(&mut *engine, 1, usize::MAX, || Ok(())).await.unwrap();
        owner.says("cached 1");
        assert_eq!(read(&reader).await.unwrap(), 1);

        // One that has looked before, and one that looks for the first time.
        let held = reader.get_weights().unwrap().1;
        let fresh = SharedCacheReader::open(cache).unwrap();
        let mut during = Vec::new();
        let sent = send(&mut *engine, 2, 7, || {
            during = [&reader, &fresh].map(|reader| reader.get_weights().unwrap().0).to_vec();
            Ok(())
        });
        sent.await.unwrap();
        owner.says("cached 2");
        assert_eq!(during, [Version(1); 2]);
        assert_eq!((read(&reader).await.unwrap(), read(&fresh).await.unwrap()), (2, 2));
        let held: Vec<Weight> = held.map(|weight| weight.unwrap()).collect().await;
        assert!(
            held.iter()
                .zip(model(1))
                .all(|(held, sent)| { held.to_bytes().unwrap() == sent.to_bytes().unwrap() })
        );

        let strict = SharedCacheReader::open(cache).unwrap().with_max_staleness(Some(0));
        assert_eq!(read(&strict).await.unwrap(), 2);
        let broken = || Err(Error::new(ErrorKind::Source, "reading a disk", "it is broken"));
        send(&mut *engine, 3, 7, broken).await.unwrap_err();
        assert!(owner.next_line().starts_with("Source"));
        assert_eq!(read(&reader).await.unwrap(), 2);
        let error = read(&strict).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::State, "{error}");
        assert!(error.to_string().contains("1 updates have begun since"), "{error}");

        owner.kill();
        assert_eq!(read(&reader).await.unwrap(), 2, "what was taken goes with its owner");
        let error = SharedCacheReader::open(cache).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
    });
}

#[test]
fn a_version_that_fails_when_all_its_buckets_are_there_does_not_get_into_the_cache() {
    runtime().block_on(async {
        let address = address();
        let owner = start("caching rollout", &address, 3);
        let (lead, follow) = join(lead(address.clone(), 3), follow(address.clone(), 3)).await;
        let ((_control, mut engine), mut other) = (lead, follow);
        let cache: CacheAddress = serde_json::from_str(&owner.next_line()).unwrap();
        let reader = SharedCacheReader::open(cache).unwrap();
        let sent = send(&mut *engine, 1, usize::MAX, || Ok(()));
        let (sent, received) = join(sent, receive(&mut *other)).await;
        assert_eq!((sent.unwrap().version, received.unwrap()), (Version(1), Version(1)));
        owner.says("cached 1");

        let fails = async {
            let mut received = other.receive_weights(None).await.unwrap();
            for _ in 0..WEIGHTS {
                assert!(received.next_tensor().await.unwrap().is_some());
            }
            // The owner has them as well.
            tokio::time::sleep(Duration::from_millis(300)).await;
            received.fail(Error::new(
                ErrorKind::Resource,
                "installing",
                "the last layer is missing",
            ));
        };
        let (sent, ()) = join(send(&mut *engine, 2, usize::MAX, || Ok(())), fails).await;
        assert_eq!(sent.unwrap_err().kind(), ErrorKind::Resource);
        owner.says("Resource");
        assert_eq!(read(&reader).await.unwrap(), 1);

        let sent = send(&mut *engine, 3, usize::MAX, || Ok(()));
        let (sent, received) = join(sent, receive(&mut *other)).await;
        assert_eq!((sent.unwrap().version, received.unwrap()), (Version(3), Version(3)));
        owner.says("cached 3");
        assert_eq!(read(&reader).await.unwrap(), 3);
    });
}

#[test]
fn a_rollout_that_is_stopped_is_a_timeout_that_says_so() {
    let mut config = config("ipc");
    config.timeout_seconds = 1.5;
    let mut group = Processes::form(BACKEND, &config, 1, 1);
    group.works(1, 1);
    let signal = |signal: &str, pid: u32| {
        let sent = std::process::Command::new("kill").args([signal, &pid.to_string()]).status();
        assert!(sent.unwrap().success());
    };
    let rollout = group.children[0].id();
    signal("-STOP", rollout);
    // It is lost for its silence a little later: after 3 s.
    let error = group.update(2, usize::MAX, |_| {}).unwrap_err();
    signal("-CONT", rollout);
    assert_eq!((error.kind(), error.report().rank), (ErrorKind::Timeout, Some(Rank(1))), "{error}");
    assert!(error.to_string().contains("its process is stopped"), "{error}");
}

#[test]
fn messages_of_the_embedding_program_do_not_disturb_updates() {
    const TALK: ChannelId = ChannelId::FIRST_FREE;
    const UNREAD: ChannelId = ChannelId(17);
    runtime().block_on(async {
        let address = address();
        let follow = async {
            let plane = ControlPlane::join(control(address.clone()), Role::Rollout, None).await;
            let plane = plane.unwrap();
            let engine = processes::rollout(BACKEND, &plane, config("ipc"), 2).await.unwrap();
            (plane, engine)
        };
        let (lead, follow) = join(lead(address.clone(), 2), follow).await;
        let ((trainer, mut engine), (rollout, mut other)) = (lead, follow);
        // One channel is full in both directions, and nobody ever reads it.
        let message = Bytes::from(vec![7; 1 << 20]);
        for (from, to) in [(&trainer, Rank(1)), (&rollout, Rank(0))] {
            let channel = from.channel(UNREAD);
            let is_full = |error: &Error| error.to_string().contains("channel 17 is full");
            while !channel.send(to, message.clone()).is_err_and(|error| is_full(&error)) {}
        }
        // On another one, both sides talk all the time.
        let talk = async {
            let [ours, theirs] = [&trainer, &rollout].map(|plane| plane.channel(TALK));
            for number in 0..1000_u32 {
                let body = Bytes::copy_from_slice(&number.to_le_bytes());
                ours.send(Rank(1), body.clone()).unwrap();
                let heard = theirs.recv(LIMIT).await.unwrap();
                assert_eq!(heard, Some(Event::Message { from: Rank(0), body: body.clone() }));
                theirs.send(Rank(0), body.clone()).unwrap();
                let heard = ours.recv(LIMIT).await.unwrap();
                assert_eq!(heard, Some(Event::Message { from: Rank(1), body }));
            }
        };
        let updates = async {
            for version in 1..=5 {
                let sent = send(&mut *engine, version, usize::MAX, || Ok(()));
                let (sent, received) = join(sent, receive(&mut *other)).await;
                let both = (sent.unwrap().version, received.unwrap());
                assert_eq!(both, (Version(version), Version(version)));
            }
        };
        join(talk, updates).await;
    });
}

#[test]
fn a_reader_that_never_took_a_version_hears_that_its_owner_is_gone() {
    runtime().block_on(async {
        let address = address();
        let mut owner = start("caching rollout", &address, 2);
        let (_control, mut engine) = lead(address, 2).await;
        let reader =
            SharedCacheReader::open(serde_json::from_str(&owner.next_line()).unwrap()).unwrap();
        send(&mut *engine, 1, usize::MAX, || Ok(())).await.unwrap();
        owner.says("cached 1");
        owner.kill();
        let error = read(&reader).await.unwrap_err();
        assert_eq!((error.kind(), error.report().version), (ErrorKind::PeerLost, Some(Version(1))));
    });
}

/// A trainer and a rollout of this process, whose weights others read.
async fn in_one_process(cache: SharedCache) -> (Box<dyn TrainerEngine>, CachedEngine) {
    let context = EngineContext::new(config("naive"));
    let trainer = backend_naive::BACKEND.prepare_trainer(context.clone()).await.unwrap();
    let rollout = backend_naive::BACKEND.prepare_rollout(context).await.unwrap();
    let formed = form_local_group(backend_naive::BACKEND, vec![trainer], vec![rollout]).await;
    let (mut trainers, mut rollouts) = formed.unwrap();
    (trainers.remove(0), CachedEngine::with_store(rollouts.remove(0), Arc::new(cache)))
}

#[test]
fn readers_of_a_shared_cache_see_versions_go_back_as_fresh_and_never_a_part_of_a_model() {
    runtime().block_on(async {
        let cache = SharedCache::create().unwrap();
        let reader = SharedCacheReader::open(cache.address()).unwrap().with_max_staleness(Some(0));
        let (mut trainer, mut rollout) = in_one_process(cache).await;
        for version in [150, 100] {
            let sent = send(&mut *trainer, version, usize::MAX, || Ok(()));
            try_join(sent, rollout.update_cache(None)).await.unwrap();
            assert_eq!(read(&reader).await.unwrap(), version);
        }
        let part = || ensure_async_iterator(model(7).split_off(1));
        let sent = trainer.send_weights(part(), Version(7));
        let error = join(sent, rollout.update_cache(None)).await.1.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
        let error = read(&reader).await.unwrap_err();
        assert!(error.to_string().contains("`max_staleness` is 0"), "{error}");

        let mut rollout = rollout.with_expected(Expected::Partial);
        let sent = trainer.send_weights(part(), Version(7));
        try_join(sent, rollout.update_cache(None)).await.unwrap();
        let (version, weights) = reader.get_weights().unwrap();
        let firsts = weights.map(|weight| weight.unwrap().to_bytes().unwrap()[0]);
        let expected = (1..WEIGHTS).map(|index| value(Version(7), index));
        let expected: Vec<u8> = expected.chain([value(Version(100), 0)]).collect();
        assert_eq!((version, firsts.collect::<Vec<u8>>().await), (Version(7), expected));
    });
}

#[test]
fn a_reader_that_looks_all_the_time_sees_whole_versions_only_and_never_an_older_one() {
    runtime().block_on(async {
        let cache = SharedCache::create().unwrap();
        let reader = SharedCacheReader::open(cache.address()).unwrap();
        let (mut trainer, mut rollout) = in_one_process(cache).await;
        let looking = std::thread::spawn(move || {
            let mut seen = vec![0];
            while seen.last() != Some(&20) {
                match futures::executor::block_on(read(&reader)) {
                    Ok(version) if seen.last() != Some(&version) => seen.push(version),
                    Ok(_) => {}
                    Err(error) => assert_eq!(error.kind(), ErrorKind::State, "{error}"),
                }
            }
            seen
        });
        for version in 1..=20 {
            let weights = ensure_async_iterator(model(version));
            let sent = trainer.send_weights(weights, Version(version));
            try_join(sent, rollout.update_cache(None)).await.unwrap();
            let (own, mut weights) = rollout.get_weights().unwrap();
            assert_eq!(own, Version(version));
            let first = weights.next().await.unwrap().unwrap().to_bytes().unwrap();
            assert_eq!(first[0], (version * 16) as u8);
        }
        let seen = looking.join().unwrap();
        assert!(seen.is_sorted(), "{seen:?}");
    });
}
