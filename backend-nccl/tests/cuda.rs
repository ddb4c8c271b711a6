//! The engine behaves as every engine has to, with NCCL itself, the weights quantised and not, with one
//! sender and with several.
//!
//! All ranks of the suite are in one process and on one GPU, which NCCL allows since 2.30 with
//! `NCCL_MULTI_RANK_GPU_ENABLE=1` and `NCCL_NVLS_ENABLE=0`. They have more streams than the 8 queues that a context
//! has by default, and streams that share a queue wait for one another: `CUDA_DEVICE_MAX_CONNECTIONS=32`.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use conformance::Suite;
use device_cuda::{CudaMemory, Device};
use engine_core::{Result, Role, Weight};
use futures::StreamExt;
use futures::executor::block_on;
use quant_fp8::rules::{Receiver, Rules, RulesConfig};
use quant_fp8::{LAYER, QuantizeFp8};
use serde_json::{Value, json};

/// A weight with the same bytes on the device.
///
/// In memory that is never given back: freeing some waits for all work of the process on the device, and
/// here that would be broadcasts which wait for other ranks of the same process.
fn on_the_device(weight: Weight) -> Result<Weight> {
    static MEMORY: LazyLock<(CudaMemory, AtomicUsize)> = LazyLock::new(|| {
        let device = Device::open(0).expect("a device");
        (CudaMemory::new(&device, 1 << 30).expect("a GiB"), AtomicUsize::new(0))
    });
    let (memory, taken) = &*MEMORY;
    let bytes = weight.to_bytes()?;
    let at = taken.fetch_add(bytes.len().next_multiple_of(256), Ordering::Relaxed);
    let slice = memory.slice(at, bytes.len())?;
    slice.write(&bytes)?;
    Weight::from_meta(weight.meta().clone(), slice.storage())
}

fn quantized(weights: Vec<Weight>) -> Vec<Weight> {
    let mut config = RulesConfig::default();
    config.receiver = Receiver::Any;
    let rules = Rules::new(&config).expect("rules");
    block_on(weights.quantize_fp8(rules).map(|weight| weight.expect("a weight")).collect())
}

fn suite(options: Value) -> Suite {
    Suite::new(backend_nccl::BACKEND).with_control_plane().with_config(|config| {
        config.device = "cuda:0".parse().expect("a device");
        // Contexts, kernels and communicators are made at the beginning of every case, while others do the same.
        config.timeout_seconds = 20.0;
        if let Value::Object(options) = options {
            config.engine_kwargs.insert("nccl".into(), options);
        }
    })
}

mod one_sender {
    conformance::suite!(
        super::suite(super::json!({})).with_weights_placed(super::on_the_device),
        ignored = "needs a CUDA device and NCCL 2.30"
    );
}

mod two_senders_quantised {
    conformance::suite!(
        super::suite(super::json!({"senders": 2}))
            .with_trainers(2)
            .with_layer(super::LAYER, super::Role::Trainer, super::quantized)
            .with_config(|config| {
                config.layers.insert("trainer_quantize_fp8".into(), true.into());
                // The suite's shapes are no engine's.
                config.layers.insert("quantization".into(), serde_json::json!({"receiver": "any"}));
            })
            .with_weights_placed(super::on_the_device),
        ignored = "needs a CUDA device and NCCL 2.30"
    );
}

mod a_relay_and_weights_on_the_host_without_digests {
    conformance::suite!(
        super::suite(super::json!({}))
            .with_trainers(2)
            .with_config(|config| config.digests = false),
        ignored = "needs a CUDA device and NCCL 2.30"
    );
}
