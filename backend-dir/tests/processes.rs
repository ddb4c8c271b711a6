//! Groups whose ranks are processes, some of which are killed within an update.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use backend_dir::{BACKEND, Versions};
use conformance::processes::{
    Process, Processes, address, be_a_child, control, model, receive, receivers, runtime, send,
    trainer,
};
use control_plane::{Address, ControlPlane};
use engine_core::{
    CheckpointEngineConfig, ErrorKind, Rank, Role, Version, Weight, ensure_async_iterator,
};

const ADDRESS: &str = "CKPT_ENGINE_TEST_ADDRESS";
const FOLDER: &str = "CKPT_ENGINE_TEST_FOLDER";

fn config(path: &Path) -> CheckpointEngineConfig {
    let mut config = CheckpointEngineConfig::new("dir");
    config.update_weights_bucket_megabytes = Some(1);
    config.timeout_seconds = 8.0;
    config.threads = std::num::NonZeroUsize::new(1);
    let section = config.engine_kwargs.entry("dir".into()).or_default();
    section.insert("path".into(), path.to_str().unwrap().into());
    config
}

#[test]
fn a_process_of_a_group() {
    be_a_child(BACKEND);
    let Ok(address) = std::env::var(ADDRESS) else { return };
    let address: Address = address.parse().unwrap();
    let folder = std::env::var(FOLDER).unwrap();
    runtime().block_on(async {
        let control = ControlPlane::lead(control(address)).await.unwrap();
        let mut engine = trainer(BACKEND, &control, config(folder.as_ref()), 2).await.unwrap();
        send(&mut *engine, 1, usize::MAX, || Ok(())).await.unwrap();
        let endless = futures::stream::iter(model(2)).chain(futures::stream::pending());
        use futures::StreamExt;
        engine.send_weights(ensure_async_iterator(endless), Version(2)).await.unwrap();
    });
}

fn numbers(path: &Path) -> Vec<u64> {
    Versions::new(path).list().unwrap().into_iter().map(|version| version.0).collect()
}

/// Whether a version in the folder is the model of its number.
fn is_whole(path: &Path, version: u64) -> bool {
    let here: Vec<Weight> =
        Versions::new(path).open(Version(version)).unwrap().weights().map(Result::unwrap).collect();
    let bytes = |weight: &Weight| weight.to_bytes().unwrap();
    let sent: Vec<_> = model(version).iter().map(|w| (w.name().to_owned(), bytes(w))).collect();
    let mut here: Vec<_> = here.iter().map(|w| (w.name().to_owned(), bytes(w))).collect();
    here.sort_by_key(|(name, _)| sent.iter().position(|(other, _)| other == name));
    here == sent
}

#[test]
fn a_rollout_killed_within_an_update_is_an_error_the_folder_stays_and_the_next_update_works() {
    let folder = tempfile::tempdir().unwrap();
    let mut group = Processes::form(BACKEND, &config(folder.path()), 1, 2);
    group.works(1, 2);
    let error = group.update(2, 5, |rollouts| rollouts[0].kill()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
    assert_eq!(error.report().rank, Some(Rank(1)), "{error}");
    drop(group.children.remove(0));
    group.children[0].says("failed PeerLost 1");
    assert_eq!(numbers(folder.path()), [1]);

    let report = group.update(3, usize::MAX, |_| {}).unwrap();
    assert_eq!((receivers(&report), &*report.absent), (vec![Rank(2)], &[Rank(1)][..]));
    group.children[0].says("active 3");
    group.join();
    group.works(4, 2);
    assert_eq!(numbers(folder.path()), [3, 4]);
    assert!(is_whole(folder.path(), 3) && is_whole(folder.path(), 4));
}

#[test]
fn a_trainer_killed_within_an_update_leaves_the_version_before_and_another_one_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let address = address();
    let start = || {
        let mut program = Process::program();
        program.env(ADDRESS, address.to_string()).env(FOLDER, path);
        Process::start(program)
    };
    runtime().block_on(async {
        for _ in 0..2 {
            let mut leader = start();
            let control =
                ControlPlane::join(control(address.clone()), Role::Rollout, None).await.unwrap();
            let rollout = conformance::processes::rollout(BACKEND, &control, config(path), 2);
            let mut rollout = rollout.await.unwrap();
            assert_eq!(receive(&mut *rollout).await.unwrap(), Version(1));
            let mut received = rollout.receive_weights(None).await.unwrap();
            assert!(received.next_tensor().await.unwrap().is_some());
            leader.kill();
            let error = received.finish().await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
            assert_eq!(numbers(path), [1]);
            assert!(is_whole(path, 1));
        }
    });
}

#[test]
fn a_rollout_whose_folder_is_another_one_is_told_so() {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let address = address();
    let mut program = Process::program();
    program.env(ADDRESS, address.to_string()).env(FOLDER, theirs.path());
    let _leader = Process::start(program);
    runtime().block_on(async {
        let control = ControlPlane::join(control(address), Role::Rollout, None).await.unwrap();
        let joined =
            conformance::processes::rollout(BACKEND, &control, config(ours.path()), 2).await;
        let error = joined.expect_err("another folder");
        assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
        let path = theirs.path().to_str().unwrap();
        assert!(error.to_string().contains(path), "{error}");
    });
}
