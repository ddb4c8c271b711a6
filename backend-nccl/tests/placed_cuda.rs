//! Placed updates with NCCL itself, of memory of the transport and of a program's own tensors, with weights on the GPU and on the host.
//!
//! All ranks are in one process and on one GPU, as in `cuda.rs`: `NCCL_MULTI_RANK_GPU_ENABLE=1`, `NCCL_NVLS_ENABLE=0` and
//! `CUDA_DEVICE_MAX_CONNECTIONS=32`. The cases with processes that are killed take a GPU for each rank of a group, up to four:
//! `CKPT_ENGINE_TEST_DEVICES=4`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unsafe_code, reason = "memory of a program's own")]

use std::sync::LazyLock;

use backend_nccl::{BACKEND, LentTensor, lend, lend_tensors};
use conformance::placed::{Lends, own_memory, processes};
use device_cuda::{CudaMemory, Device, upload};
use engine_core::{CheckpointEngineConfig, EngineContext, Prepared, Result, Storage, Weight};
use placed::{PlacedRollout, Wanted};
use serde_json::json;

static DEVICE: LazyLock<Device> = LazyLock::new(|| Device::open(0).expect("a device"));

fn on_the_device(weight: Weight) -> Result<Weight> {
    upload(&DEVICE, &weight)
}

/// Memory of this process, which lives to its end.
fn memory(bytes: u64) -> Storage {
    let memory = CudaMemory::new(&DEVICE, bytes as usize).unwrap();
    let all = memory.all().storage();
    std::mem::forget(memory);
    all
}

fn lend_own(context: EngineContext, wanted: Vec<Wanted>) -> Result<Prepared<PlacedRollout>> {
    let tensors = own_memory(wanted, memory)?.into_iter().map(|(wanted, [elements, scales])| {
        // SAFETY: it is memory that only this tensor has.
        unsafe { LentTensor::new(wanted, elements, Some(scales)) }
    });
    lend_tensors(context, tensors.collect::<Result<Vec<_>>>()?)
}

fn lends(
    device: &str,
    lend: fn(EngineContext, Vec<Wanted>) -> Result<Prepared<PlacedRollout>>,
    put: fn(Weight) -> Result<Weight>,
) -> Lends {
    let mut config = CheckpointEngineConfig::new("nccl");
    config.device = device.parse().unwrap();
    config.timeout_seconds = 20.0;
    config.threads = std::num::NonZeroUsize::new(2);
    config.update_weights_bucket_megabytes = Some(1);
    let options = json!({ "placed": true });
    config.engine_kwargs.insert("nccl".into(), options.as_object().unwrap().clone());
    Lends { backend: BACKEND, config, lend, put }
}

fn between_processes() -> Lends {
    lends("cuda", lend, Ok)
}

/// What a child process does; nothing when this file's tests are run.
#[test]
fn a_process_of_a_group() {
    processes::be_a_child(&between_processes());
}

macro_rules! cases {
    ($name:ident, $lends:expr, $ignored:literal, $module:path: $($case:ident)*) => {
        mod $name {
            use super::*;
            use $module as cases;

            $(
                #[test]
                #[ignore = $ignored]
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
            $name, $lends, "needs a CUDA device and NCCL 2.30", conformance::placed:
            every_box_is_bit_for_bit_that_of_the_unsharded_tensor
            what_nobody_holds_is_named_and_leaves_the_version_that_is_there
            a_call_that_is_given_up_ends_the_update_everywhere_and_the_next_one_works
        }
    )*};
}

within_a_process! {
    weights_on_the_device: lends("cuda:0", lend, on_the_device);
    weights_on_the_host: lends("cuda:0", lend, Ok);
    tensors_of_the_program: lends("cuda:0", lend_own, on_the_device);
}

cases! {
    processes_of_a_host, between_processes(), "needs up to four CUDA devices and NCCL", conformance::placed::processes:
    a_trainer_that_is_killed_while_it_writes_is_named_and_the_next_update_makes_tensors_whole
    a_trainer_that_is_stopped_while_it_writes_is_cut_off_and_writes_nothing_when_it_continues
    a_rollout_that_is_killed_while_it_is_written_is_named_and_the_others_are_updated_without_it
    a_leader_that_is_killed_while_tensors_are_written_is_an_error_on_the_rollout_which_has_no_version
    a_rollout_that_joins_later_is_in_the_next_update_and_one_that_leaves_in_none
    ranks_of_placed_updates_and_others_do_not_form_a_group
}
