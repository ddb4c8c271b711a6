//! Groups whose ranks are processes, some of which are killed within an update: all on one GPU, or each on the
//! next one of as many as `CKPT_ENGINE_TEST_DEVICES` says. Where there are more ranks than GPUs, NCCL has to be told
//! by `NCCL_MULTI_RANK_GPU_ENABLE=1` and `NCCL_NVLS_ENABLE=0`.

use conformance::processes::{Processes, be_a_child, resident_bytes};
use engine_core::{CheckpointEngineConfig, ErrorKind, Rank};
use serde_json::{Value, json};

#[test]
fn a_process_of_a_group() {
    be_a_child(backend_nccl::BACKEND);
}

fn config(options: Value) -> CheckpointEngineConfig {
    let mut config = CheckpointEngineConfig::new("nccl");
    config.update_weights_bucket_megabytes = Some(1);
    config.timeout_seconds = 10.0;
    config.device = "cuda".parse().expect("a device");
    if let Value::Object(options) = options {
        config.engine_kwargs.insert("nccl".into(), options);
    }
    config
}

fn form(options: Value, trainers: u32, rollouts: u32) -> Processes {
    let gpus = std::env::var("CKPT_ENGINE_TEST_DEVICES").ok();
    let gpus = gpus.and_then(|gpus| gpus.parse().ok()).unwrap_or(1);
    let ranks = trainers + rollouts;
    // NCCL answers two ranks on a GPU with a group that hangs or with an error about another rank.
    assert!(
        ranks <= gpus || std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").as_deref() == Ok("1"),
        "{ranks} ranks on {gpus} GPUs: set NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL_NVLS_ENABLE=0"
    );
    Processes::form(backend_nccl::BACKEND, &config(options), trainers, rollouts)
}

/// Kills a rank before the weight of a number is given: an error everywhere, and the next update runs
/// with those that are left.
fn survives(options: Value, trainers: u32, victim: u32, before: usize) {
    let what = format!("rank {victim} of {trainers} trainers killed before {before}, {options}");
    let mut group = form(options, trainers, 2);
    group.works(1, 2);
    let at = victim as usize - 1;
    let error = group.update(2, before, |children| children[at].kill());
    let error = error.expect_err(&what);
    assert_eq!(error.kind(), ErrorKind::PeerLost, "{what}: {error}");
    assert_eq!(error.report().rank, Some(Rank(victim)), "{what}: {error}");
    drop(group.children.remove(at));
    for child in &group.children {
        let said = child.next_line();
        assert!(said.starts_with("failed PeerLost"), "{what}: {said}");
    }
    let rollouts = if victim < trainers { 2 } else { 1 };
    group.works(3, rollouts);
    group.works(4, rollouts);
}

#[test]
#[ignore = "needs a CUDA device and NCCL 2.30"]
fn a_rollout_that_is_killed_within_an_update_is_an_error_and_the_next_one_runs_without_it() {
    for before in [1, 6, 11] {
        survives(json!({}), 1, 2, before);
    }
}

#[test]
#[ignore = "needs a CUDA device and NCCL 2.30"]
fn a_sender_or_a_relay_that_is_killed_is_an_error_and_the_next_update_runs_without_it() {
    survives(json!({"senders": 2}), 2, 1, 6);
    survives(json!({}), 2, 1, 6);
}

#[test]
#[ignore = "needs a CUDA device and NCCL 2.30"]
fn rollouts_leave_and_join_between_updates() {
    for options in [json!({}), json!({"senders": 2})] {
        let trainers = if options == json!({}) { 1 } else { 2 };
        let mut group = form(options, trainers, 3);
        group.works(1, 3);
        let mut gone = group.children.remove(trainers as usize);
        gone.kill();
        // Its connection ends at once; the leader hears of it before the next update begins.
        std::thread::sleep(std::time::Duration::from_millis(300));
        group.works(2, 2);
        group.works(3, 2);
        group.join();
        group.works(4, 3);
        group.works(5, 3);
        group.close();
    }
}

#[test]
#[ignore = "needs a CUDA device and NCCL 2.30"]
fn a_leader_that_is_gone_is_an_error_on_every_rank() {
    let mut group = form(json!({}), 2, 2);
    group.works(1, 2);
    // The leader is this process, which says goodbye: it is not killed.
    let children = std::mem::take(&mut group.children);
    drop(group);
    for child in &children {
        let said = child.next_line();
        assert!(said.starts_with("failed TrainerLeft 0"), "{said}");
    }
}

#[test]
#[ignore = "needs a CUDA device and NCCL 2.30"]
fn two_hundred_updates_take_no_more_memory_than_twenty() {
    let mut group = form(json!({}), 1, 2);
    let device = device_cuda::Device::open(0).expect("a device");
    let memory = |group: &Processes| {
        let (free, _) = device.memory().expect("its memory");
        let ranks = group.children.iter().map(|child| child.resident_bytes());
        (free, resident_bytes("self") + ranks.sum::<u64>())
    };
    for version in 1..=20 {
        group.works(version, 2);
    }
    let before = memory(&group);
    for version in 21..=200 {
        group.works(version, 2);
    }
    let after = memory(&group);
    assert!(before.0 <= after.0 + (4 << 20), "device memory: {} free, then {}", before.0, after.0);
    assert!(after.1 <= before.1 + (48 << 20), "host memory: {} bytes, then {}", before.1, after.1);
}
