//! Buckets on a CUDA device, and processes that have them open.

use std::time::{Duration, Instant};

use conformance::on_memory;
use conformance::processes::{Processes, be_a_child};
use device_cuda::Device;
use engine_core::{Backend, CheckpointEngineConfig};

fn backend() -> &'static dyn Backend {
    on_memory(backend_ipc::BACKEND, device_cuda::MEMORY)
}

#[test]
fn a_process_of_a_group() {
    be_a_child(backend());
}

const BUCKETS: usize = 512 << 20;

fn form() -> Processes {
    let mut config = CheckpointEngineConfig::new("ipc");
    config.update_weights_bucket_megabytes = Some(256);
    config.timeout_seconds = 10.0;
    config.device = "cuda".parse().expect("a device");
    Processes::form(backend(), &config, 1, 1)
}

#[test]
#[ignore = "needs a CUDA device"]
fn buckets_are_not_freed_while_a_rollout_has_them_open_and_are_when_it_has_ended() {
    let device = Device::open(0).expect("a device");
    let free = || device.memory().expect("its memory").0;
    // Contexts and kernels are made by the first group.
    let mut group = form();
    group.works(1, 1);
    let mut children = std::mem::take(&mut group.children);
    children.iter_mut().for_each(|child| child.kill());
    group.close();
    let before = free();

    let mut group = form();
    group.works(1, 1);
    let mut children = std::mem::take(&mut group.children);
    let id = children[0].id().to_string();
    let stopped = std::process::Command::new("kill").args(["-STOP", &id]).status();
    assert!(stopped.expect("kill").success());
    let during = free();
    let begun = Instant::now();
    group.close();
    assert!(begun.elapsed() >= Duration::from_secs(2), "nobody waited for the rollout");
    let after = free();
    assert!(after < during + BUCKETS / 2, "{during} bytes were free, {after} are: freed under it");
    children.iter_mut().for_each(|child| child.kill());

    // The next buckets of the process come after the old ones went.
    let mut group = form();
    group.works(1, 1);
    let mut children = std::mem::take(&mut group.children);
    children.iter_mut().for_each(|child| child.kill());
    let begun = Instant::now();
    group.close();
    assert!(begun.elapsed() < Duration::from_secs(2), "a rollout that has ended was waited for");
    let now = free();
    assert!(now + BUCKETS / 2 >= before, "{before} bytes were free, {now} are");
}
