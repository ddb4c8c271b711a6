//! Placed updates, of memory of the transport and of a program's own tensors, in tasks and between processes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unsafe_code, reason = "memory of a program's own")]

use std::sync::LazyLock;

use backend_nixl::{BACKEND, LentTensor, lend, lend_tensors};
use bytes::Bytes;
use conformance::placed::{Lends, own_memory, processes};
use conformance::processes::{address, context, control, runtime};
use control_plane::ControlPlane;
use device_cuda::{Device, upload};
use engine_core::{
    CheckpointEngineConfig, DType, EngineContext, ErrorKind, Prepared, Result, Storage, TensorMeta,
    Weight,
};
use placed::{PlacedRollout, Wanted};
use serde_json::json;

/// Where weights and rollouts' tensors are, in this process and in those that it starts; in host memory without it.
const DEVICE: &str = "CKPT_ENGINE_TEST_DEVICE";

/// `transports` are those of UCX; all of them if it is empty.
fn lends(
    threads: usize,
    transports: &str,
    lend: fn(EngineContext, Vec<Wanted>) -> Result<Prepared<PlacedRollout>>,
) -> Lends {
    let mut config = CheckpointEngineConfig::new("nixl");
    config.timeout_seconds = 8.0;
    config.threads = std::num::NonZeroUsize::new(threads);
    // Few blocks, so that they are used many times.
    config.update_weights_bucket_megabytes = Some(1);
    let options = json!({ "placed": true, "transports": transports });
    config.engine_kwargs.insert("nixl".into(), options.as_object().unwrap().clone());
    let mut put: fn(Weight) -> Result<Weight> = Ok;
    if let Ok(device) = std::env::var(DEVICE) {
        config.device = device.parse().unwrap();
        put = on_the_device;
    }
    Lends { backend: BACKEND, config, lend, put }
}

fn on_the_device(weight: Weight) -> Result<Weight> {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| Device::open(0).expect("a device"));
    upload(&DEVICE, &weight)
}

fn own() -> Lends {
    lends(2, "", lend)
}

fn between_processes(transports: &str) -> Lends {
    lends(1, transports, lend)
}

/// What a child process does; nothing when this file's tests are run.
#[test]
fn a_process_of_a_group() {
    processes::be_a_child(&own());
}

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

macro_rules! cases {
    ($name:ident, $lends:expr, $module:path: $($case:ident)*) => {
        mod $name {
            use super::*;
            use $module as cases;

            $(
                #[test]
                fn $case() {
                    cases::$case(&$lends);
                }
            )*
        }
    };
}

macro_rules! within_a_process {
    ($($name:ident: $lends:expr;)*) => {$(
        cases! {
            $name, $lends, conformance::placed:
            every_box_is_bit_for_bit_that_of_the_unsharded_tensor
            what_nobody_holds_is_named_and_leaves_the_version_that_is_there
            a_call_that_is_given_up_ends_the_update_everywhere_and_the_next_one_works
        }
    )*};
}

within_a_process! {
    memory_of_the_transport: own();
    tensors_of_the_program: lends(2, "", lend_own);
    memory_over_tcp: lends(2, "tcp,self", lend);
}

cases! {
    processes_of_a_host, between_processes(""), conformance::placed::processes:
    a_trainer_that_is_killed_while_it_writes_is_named_and_the_next_update_makes_tensors_whole
    a_trainer_that_is_stopped_while_it_writes_keeps_updates_from_succeeding_until_it_has_let_go
    a_rollout_that_is_killed_while_it_is_written_is_named_and_the_others_are_updated_without_it
    a_leader_that_is_killed_while_tensors_are_written_is_an_error_on_the_rollout_which_has_no_version
    a_rollout_that_joins_later_is_in_the_next_update_and_one_that_leaves_in_none
    ranks_of_placed_updates_and_others_do_not_form_a_group
}

cases! {
    processes_over_tcp, between_processes("tcp,self"), conformance::placed::processes:
    a_trainer_that_is_killed_while_it_writes_is_named_and_the_next_update_makes_tensors_whole
    a_trainer_that_is_stopped_while_it_writes_is_cut_off_and_writes_nothing_when_it_continues
    a_rollout_that_is_killed_while_it_is_written_is_named_and_the_others_are_updated_without_it
    a_leader_that_is_killed_while_tensors_are_written_is_an_error_on_the_rollout_which_has_no_version
    a_rollout_that_joins_later_is_in_the_next_update_and_one_that_leaves_in_none
}

#[test]
#[ignore = "makes network namespaces, which takes root and iproute2"]
fn a_trainer_that_is_cut_off_while_it_writes_is_left_out_and_nothing_of_it_arrives_later() {
    processes::a_trainer_that_is_cut_off_while_it_writes_is_left_out_and_nothing_of_it_arrives_later(
        &between_processes("tcp,self"),
    );
}

#[test]
#[ignore = "makes network namespaces, which takes root and iproute2"]
fn a_rollout_that_is_cut_off_while_it_is_written_is_left_out_and_the_others_are_updated() {
    processes::a_rollout_that_is_cut_off_while_it_is_written_is_left_out_and_the_others_are_updated(
        &between_processes("tcp,self"),
    );
}

#[test]
fn tensors_that_share_memory_are_refused_in_words() {
    runtime().block_on(async {
        let plane = ControlPlane::lead(control(address())).await.unwrap();
        let tensor = |name: &str, bytes: Storage| {
            let wanted = Wanted::whole(TensorMeta::new(name, DType::U8, [bytes.len()]));
            // SAFETY: nothing is written: no trainer ever reaches it.
            unsafe { LentTensor::new(wanted, bytes, None) }.unwrap()
        };
        let lends = |from: u64| {
            let whole = memory(200);
            let (first, second) = (whole.slice(0..100), whole.slice(from..200));
            let tensors = [tensor("first", first), tensor("second", second)];
            lend_tensors(context(&plane, own().config), tensors).map(drop)
        };
        lends(100).unwrap();
        let error = lends(99).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Weight, "{error}");
        assert_eq!(error.report().tensor.as_deref(), Some("second"), "{error}");
        assert!(error.to_string().contains("overlaps"), "{error}");
    });
}
