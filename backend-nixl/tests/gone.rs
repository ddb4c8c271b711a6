//! A receiver that is gone in the middle of an update, with every rank a process of its own, on the host and
//! with the buckets on a CUDA device, where ranks of one process would not be what ranks are.

use conformance::on_memory;
use conformance::processes::{Processes, be_a_child};
use engine_core::{Backend, CheckpointEngineConfig, ErrorKind, Rank, Version};
use serde_json::Value;

fn backend() -> &'static dyn Backend {
    on_memory(backend_nixl::BACKEND, device_cuda::MEMORY)
}

#[test]
fn a_process_of_a_group() {
    be_a_child(backend());
}

fn form(device: &str, options: &Value, rollouts: u32) -> Processes {
    let mut config = CheckpointEngineConfig::new("nixl");
    config.update_weights_bucket_megabytes = Some(1);
    config.timeout_seconds = 10.0;
    config.device = device.parse().expect("a device");
    if let Value::Object(options) = options {
        config.engine_kwargs.insert("nixl".into(), options.clone());
    }
    Processes::form(backend(), &config, 1, rollouts)
}

/// The engine of a rollout is dropped within an update, and its process stays: an error that names it, and
/// no rank has a complete version. The next update works, without it and then with another one.
fn an_engine_is_dropped(device: &str, options: &Value) {
    let mut group = form(device, options, 2);
    group.works(1, 2);
    group.join_and_drop_in(Some(Version(2)));
    let sent = group.update(2, usize::MAX, |_| {});
    let error = sent.expect_err("a rollout that has no engine is no receiver");
    assert_eq!(error.report().rank, Some(Rank(3)), "{options}: {error}");
    let mut gone = group.children.pop().expect("the one that joined");
    gone.says("dropped its engine");
    for child in &group.children {
        let said = child.next_line();
        assert!(said.starts_with("failed "), "{options}: {said}");
    }
    gone.kill();
    group.works(3, 2);
    group.join();
    group.works(4, 3);
    group.close();
}

/// A rollout is killed before the weight of a number is given: the others finish that update, and the next
/// one works, without it and then with another one.
fn a_rollout_is_killed(device: &str, options: &Value) {
    for (victim, before) in [(1, 1), (2, 6), (1, 11)] {
        let what = format!("rank {victim} killed before {before} with {options}");
        let mut group = form(device, options, 3);
        group.works(1, 3);
        let at = victim as usize - 1;
        let sent = group.update(2, before, |children| children[at].kill());
        match sent {
            Ok(report) => {
                assert_eq!(report.receivers.len(), 2, "{what}");
                assert_eq!(report.absent, [Rank(victim)], "{what}");
            }
            Err(error) => panic!("{what}: {:?} {error}", error.kind()),
        }
        drop(group.children.remove(at));
        for child in &group.children {
            assert_eq!(child.next_line(), "active 2", "{what}");
        }
        group.works(3, 2);
        group.join();
        group.works(4, 3);
        group.close();
    }
}

/// All receivers at once: an error, and a newcomer gets the next version.
fn all_rollouts_are_killed(device: &str, options: &Value) {
    let mut group = form(device, options, 2);
    group.works(1, 2);
    let sent = group.update(2, 6, |children| children.iter_mut().for_each(|child| child.kill()));
    let error = sent.expect_err("nobody is left");
    assert_eq!(error.kind(), ErrorKind::PeerLost, "{options}: {error}");
    group.children.clear();
    group.join();
    group.works(3, 1);
    group.close();
}

macro_rules! mode {
    ($(#[$attribute:meta])* $mode:ident: $device:expr, $options:tt) => {
        mod $mode {
            #[test]
            $(#[$attribute])*
            fn a_dropped_engine_is_an_error_and_the_next_update_works() {
                crate::an_engine_is_dropped($device, &serde_json::json!($options));
            }

            #[test]
            $(#[$attribute])*
            fn others_finish_when_a_rollout_is_killed() {
                crate::a_rollout_is_killed($device, &serde_json::json!($options));
            }

            #[test]
            $(#[$attribute])*
            fn without_any_rollout_it_is_an_error_and_a_newcomer_gets_the_next_version() {
                crate::all_rollouts_are_killed($device, &serde_json::json!($options));
            }
        }
    };
}

mod on_the_host {
    mode!(ring: "cpu", {"topology": "ring"});
}

mod on_a_device {
    mode!(#[ignore = "needs a CUDA device"] star: "cuda", {"topology": "star"});
    mode!(#[ignore = "needs a CUDA device"] ring: "cuda", {"topology": "ring"});
    mode!(
        #[ignore = "needs a CUDA device"]
        ring_that_writes: "cuda", {"topology": "ring", "transfer": "write"}
    );
}
