//! Placed updates with NCCL itself, between processes some of which are killed. They take a GPU for each rank of a group, up to four:
//! `CKPT_ENGINE_TEST_DEVICES=4`. On fewer, set `NCCL_MULTI_RANK_GPU_ENABLE=1`, `NCCL_NVLS_ENABLE=0` and `CUDA_DEVICE_MAX_CONNECTIONS=32`.
//!
//! Rollouts lend memory of the transport. With `CKPT_ENGINE_TEST_OWN_TENSORS=1` they lend tensors of a program.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unsafe_code, reason = "memory of a program's own")]

use backend_nccl::{BACKEND, LentTensor, lend, lend_tensors};
use conformance::placed::{Lends, own_memory, processes};
use device_cuda::{CudaMemory, Device};
use engine_core::{CheckpointEngineConfig, EngineContext, Prepared, Result};
use placed::{PlacedRollout, Wanted};
use serde_json::json;

fn lend_own(context: EngineContext, wanted: Vec<Wanted>) -> Result<Prepared<PlacedRollout>> {
    let device = Device::of(&context.config.device)?;
    // It lives to the end of the process.
    let memory = |bytes: u64| {
        let memory = CudaMemory::new(&device, bytes as usize).unwrap();
        let all = memory.all().storage();
        std::mem::forget(memory);
        all
    };
    let tensors = own_memory(wanted, memory)?.into_iter().map(|(wanted, [elements, scales])| {
        // SAFETY: it is memory that only this tensor has.
        unsafe { LentTensor::new(wanted, elements, Some(scales)) }
    });
    lend_tensors(context, tensors.collect::<Result<Vec<_>>>()?)
}

fn between_processes() -> Lends {
    let mut config = CheckpointEngineConfig::new("nccl");
    config.device = "cuda".parse().unwrap();
    config.timeout_seconds = 20.0;
    config.threads = std::num::NonZeroUsize::new(2);
    config.update_weights_bucket_megabytes = Some(1);
    let options = json!({ "placed": true });
    config.engine_kwargs.insert("nccl".into(), options.as_object().unwrap().clone());
    let own = std::env::var_os("CKPT_ENGINE_TEST_OWN_TENSORS").is_some();
    Lends { backend: BACKEND, config, lend: if own { lend_own } else { lend }, put: Ok }
}

/// What a child process does; nothing when this file's tests are run.
#[test]
fn a_process_of_a_group() {
    processes::be_a_child(&between_processes());
}

macro_rules! cases {
    ($($case:ident)*) => {
        /// A process for each rank: ranks of a process share what the driver has of a GPU, where memory is freed and kernels are loaded when no
        /// head of another rank is waited for any more.
        mod processes_of_a_host {
            use super::*;

            $(
                #[test]
                #[ignore = "needs up to four CUDA devices and NCCL"]
                fn $case() {
                    processes::$case(&between_processes());
                }
            )*
        }
    };
}

cases! {
    a_trainer_that_is_killed_while_it_writes_is_named_and_the_next_update_makes_tensors_whole
    a_trainer_that_is_stopped_while_it_writes_is_cut_off_and_writes_nothing_when_it_continues
    a_rollout_that_is_killed_while_it_is_written_is_named_and_the_others_are_updated_without_it
    a_leader_that_is_killed_while_tensors_are_written_is_an_error_on_the_rollout_which_has_no_version
    ranks_of_placed_updates_and_others_do_not_form_a_group
}
