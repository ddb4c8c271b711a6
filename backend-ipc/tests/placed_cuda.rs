//! Placed updates in memory of a CUDA device, wherever trainers have their weights.
//!
//! The tests of `placed.rs`, with trainers that are killed and stopped, run in memory of a device with `CKPT_ENGINE_TEST_DEVICE=cuda:0`.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::LazyLock;

use backend_ipc::{BACKEND, lend};
use conformance::placed::Lends;
use device_cuda::{Device, upload};
use engine_core::{CheckpointEngineConfig, Result, Weight};

fn on_the_device(weight: Weight) -> Result<Weight> {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| Device::open(0).expect("a device"));
    upload(&DEVICE, &weight)
}

/// Device and host are mixed on every trainer.
fn partly_on_the_device(weight: Weight) -> Result<Weight> {
    if weight.name().len() % 2 == 1 { on_the_device(weight) } else { Ok(weight) }
}

fn lends(put: fn(Weight) -> Result<Weight>) -> Lends {
    let mut config = CheckpointEngineConfig::new("ipc");
    config.device = "cuda:0".parse().unwrap();
    // A trainer that gives up before it has heard of an update is waited for so long.
    config.timeout_seconds = 8.0;
    config.threads = std::num::NonZeroUsize::new(2);
    config.engine_kwargs.entry("ipc".into()).or_default().insert("placed".into(), true.into());
    Lends { backend: BACKEND, config, lend: |context, wanted| lend(context, wanted), put }
}

macro_rules! cases {
    ($name:ident, $put:expr) => {
        mod $name {
            #[test]
            #[ignore = "needs a CUDA device"]
            fn every_box_is_bit_for_bit_that_of_the_unsharded_tensor() {
                conformance::placed::every_box_is_bit_for_bit_that_of_the_unsharded_tensor(
                    &super::lends($put),
                );
            }

            #[test]
            #[ignore = "needs a CUDA device"]
            fn what_nobody_holds_is_named_and_leaves_the_version_that_is_there() {
                conformance::placed::what_nobody_holds_is_named_and_leaves_the_version_that_is_there(
                    &super::lends($put),
                );
            }

            #[test]
            #[ignore = "needs a CUDA device"]
            fn a_call_that_is_given_up_ends_the_update_everywhere_and_the_next_one_works() {
                conformance::placed::a_call_that_is_given_up_ends_the_update_everywhere_and_the_next_one_works(
                    &super::lends($put),
                );
            }
        }
    };
}

cases!(weights_on_the_device, super::on_the_device);
cases!(weights_on_the_host, Ok);
cases!(weights_on_both, super::partly_on_the_device);
