//! Placed updates over the simulated libraries: in tasks of one process and between processes, of memory of the transport and of a program's own
//! tensors.
//!
//! The libraries read their settings from the environment once, so that every case is a process of its own: this program again, running one test.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unsafe_code, reason = "memory of a program's own")]

use std::process::Command;

use backend_hccl::{BACKEND, LentTensor, lend, lend_tensors};
use bytes::Bytes;
use conformance::placed::{Lends, own_memory, processes};
use engine_core::{CheckpointEngineConfig, EngineContext, Prepared, Result, Storage};
use hccl_sim::Profile;
use placed::{PlacedRollout, Wanted};
use serde_json::json;

const CASE: &str = "CKPT_ENGINE_TEST_CASE";
const OWN: &str = "CKPT_ENGINE_TEST_OWN_TENSORS";

/// Memory of this process, which lives to its end.
fn memory(bytes: u64) -> Storage {
    Bytes::from_static(Box::leak(vec![0_u8; bytes as usize].into_boxed_slice())).into()
}

/// Lends tensors that are in two allocations, neither in order nor one directly behind the other.
fn lend_own(context: EngineContext, wanted: Vec<Wanted>) -> Result<Prepared<PlacedRollout>> {
    let tensors = own_memory(wanted, memory)?.into_iter().map(|(wanted, [elements, scales])| {
        // SAFETY: it is memory that only this tensor has.
        unsafe { LentTensor::new(wanted, elements, Some(scales)) }
    });
    lend_tensors(context, tensors.collect::<Result<Vec<_>>>()?)
}

fn lends() -> Lends {
    let mut config = CheckpointEngineConfig::new("hccl");
    config.timeout_seconds = 8.0;
    config.threads = std::num::NonZeroUsize::new(2);
    config.update_weights_bucket_megabytes = Some(1);
    config.device = "npu".parse().unwrap();
    let options = json!({ "placed": true });
    config.engine_kwargs.insert("hccl".into(), options.as_object().unwrap().clone());
    let lend = if std::env::var_os(OWN).is_some() { lend_own } else { lend };
    Lends { backend: BACKEND, config, lend, put: Ok }
}

/// What a child process does; nothing when this file's tests are run.
#[test]
fn one_case() {
    let Ok(case) = std::env::var(CASE) else { return };
    let (_, case) = ALL.iter().find(|(name, _)| *name == case).expect("a case");
    case(&lends());
}

/// What a child process of a child process does.
#[test]
fn a_process_of_a_group() {
    if std::env::var_os(CASE).is_some() {
        processes::be_a_child(&lends());
    }
}

fn alone(case: &str, own: bool, lazy: bool) {
    let libraries = hccl_sim::libraries(Profile::Current).expect("the simulated libraries");
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child
        .args(["--exact", "one_case", "--nocapture"])
        .env(CASE, case)
        .env("CKPT_ENGINE_HCCL_DIR", libraries)
        .env("HCCL_SIM_LAZY", if lazy { "1" } else { "0" })
        // Each rank is on the NPU of its number.
        .env("CKPT_ENGINE_TEST_DEVICES", "8")
        .env("HCCL_SIM_TIME_SCALE", "0.02")
        .env("HCCL_EXEC_TIMEOUT", "1836")
        .env("HCCL_HOST_SOCKET_PORT_RANGE", "auto")
        .env("HCCL_NPU_SOCKET_PORT_RANGE", "auto");
    if own {
        child.env(OWN, "1");
    }
    let output = child.output().expect("a process");
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success(), "{text}");
    // A process that ran no case has not tested anything.
    assert!(text.contains("1 passed"), "{text}");
}

fn nothing_fell_back_to_something_slower(lends: &Lends) {
    let (leaders, own) = conformance::placed::what_made_an_update_slower(lends);
    assert!(leaders.is_empty() && own.concat().is_empty(), "{leaders:?} {own:?}");
}

type Case = fn(&Lends);

macro_rules! all {
    ($($module:path: $($case:ident)*;)*) => {
        const ALL: &[(&str, Case)] = &[
            ("nothing_fell_back_to_something_slower", nothing_fell_back_to_something_slower),
            $($((stringify!($case), { use $module as these; these::$case }),)*)*
        ];
        mod memory_of_the_transport {
            $($(
                #[test]
                fn $case() {
                    super::alone(stringify!($case), false, false);
                }
            )*)*
        }
    };
}

all! {
    conformance::placed:
    every_box_is_bit_for_bit_that_of_the_unsharded_tensor
    what_nobody_holds_is_named_and_leaves_the_version_that_is_there
    a_call_that_is_given_up_ends_the_update_everywhere_and_the_next_one_works;
    conformance::placed::processes:
    a_trainer_that_is_killed_while_it_writes_is_named_and_the_next_update_makes_tensors_whole
    a_trainer_that_is_stopped_while_it_writes_is_cut_off_and_writes_nothing_when_it_continues
    a_rollout_that_is_killed_while_it_is_written_is_named_and_the_others_are_updated_without_it
    a_leader_that_is_killed_while_tensors_are_written_is_an_error_on_the_rollout_which_has_no_version
    a_rollout_that_joins_later_is_in_the_next_update_and_one_that_leaves_in_none
    ranks_of_placed_updates_and_others_do_not_form_a_group;
}

macro_rules! variants {
    ($($name:ident, $case:ident, $own:expr, $lazy:expr;)*) => {$(
        #[test]
        fn $name() {
            alone(stringify!($case), $own, $lazy);
        }
    )*};
}

variants! {
    reports_say_that_nothing_fell_back_to_something_slower,
        nothing_fell_back_to_something_slower, false, false;
    every_box_of_a_programs_own_tensors_is_right,
        every_box_is_bit_for_bit_that_of_the_unsharded_tensor, true, false;
    every_box_is_right_when_streams_run_late,
        every_box_is_bit_for_bit_that_of_the_unsharded_tensor, false, true;
}
