//! Placed updates in memory of a CUDA device, wherever trainers have their weights.
//!
//! The tests of `placed.rs`, with trainers that are killed and stopped, run in memory of a device and with weights there with
//! `CKPT_ENGINE_TEST_DEVICE=cuda:0`. In one process, as here, UCX uses no CUDA IPC: bytes go over host memory, and what arrives is the same.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(unsafe_code, reason = "memory of a program's own")]

use std::sync::LazyLock;

use backend_nixl::{BACKEND, LentTensor, lend, lend_tensors};
use conformance::placed::{Lends, own_memory};
use device_cuda::{CudaMemory, Device, upload};
use engine_core::{CheckpointEngineConfig, EngineContext, Prepared, Result, Storage, Weight};
use placed::{PlacedRollout, Wanted};
use serde_json::json;

static DEVICE: LazyLock<Device> = LazyLock::new(|| Device::open(0).expect("a device"));

fn on_the_device(weight: Weight) -> Result<Weight> {
    upload(&DEVICE, &weight)
}

/// Device and host are mixed on every trainer.
fn partly_on_the_device(weight: Weight) -> Result<Weight> {
    if weight.name().len() % 2 == 1 { on_the_device(weight) } else { Ok(weight) }
}

fn memory(bytes: u64) -> Storage {
    CudaMemory::for_life(&DEVICE, bytes as usize).expect("memory").all().storage()
}

/// Lends tensors that are in two allocations, neither in order nor one directly behind the other.
fn lend_own(context: EngineContext, wanted: Vec<Wanted>) -> Result<Prepared<PlacedRollout>> {
    let tensors = own_memory(wanted, memory)?.into_iter().map(|(wanted, [elements, scales])| {
        // SAFETY: it is memory that only this tensor has.
        unsafe { LentTensor::new(wanted, elements, Some(scales)) }
    });
    lend_tensors(context, tensors.collect::<Result<Vec<_>>>()?)
}

/// `transports` are those of UCX; all of them if it is empty.
fn lends(
    transports: &str,
    lend: fn(EngineContext, Vec<Wanted>) -> Result<Prepared<PlacedRollout>>,
    put: fn(Weight) -> Result<Weight>,
) -> Lends {
    let mut config = CheckpointEngineConfig::new("nixl");
    config.device = "cuda:0".parse().unwrap();
    // A trainer that gives up before it has heard of an update is waited for so long.
    config.timeout_seconds = 8.0;
    config.threads = std::num::NonZeroUsize::new(2);
    config.update_weights_bucket_megabytes = Some(1);
    let options = json!({ "placed": true, "transports": transports });
    config.engine_kwargs.insert("nixl".into(), options.as_object().unwrap().clone());
    Lends { backend: BACKEND, config, lend, put }
}

macro_rules! cases {
    ($name:ident, $lends:expr) => {
        mod $name {
            use super::*;

            #[test]
            #[ignore = "needs a CUDA device"]
            fn every_box_is_bit_for_bit_that_of_the_unsharded_tensor() {
                conformance::placed::every_box_is_bit_for_bit_that_of_the_unsharded_tensor(&$lends);
            }

            #[test]
            #[ignore = "needs a CUDA device"]
            fn what_nobody_holds_is_named_and_leaves_the_version_that_is_there() {
                conformance::placed::what_nobody_holds_is_named_and_leaves_the_version_that_is_there(
                    &$lends,
                );
            }

            #[test]
            #[ignore = "needs a CUDA device"]
            fn a_call_that_is_given_up_ends_the_update_everywhere_and_the_next_one_works() {
                conformance::placed::a_call_that_is_given_up_ends_the_update_everywhere_and_the_next_one_works(
                    &$lends,
                );
            }
        }
    };
}

cases!(weights_on_the_device, lends("", lend, on_the_device));
cases!(weights_on_the_host, lends("", lend, Ok));
cases!(weights_on_both, lends("", lend, partly_on_the_device));
cases!(tensors_of_the_program, lends("", lend_own, on_the_device));
