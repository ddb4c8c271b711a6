//! The engine behaves as every engine has to with its buckets on a CUDA device, wherever the weights are,
//! quantised and not.

use std::sync::LazyLock;

use conformance::{Suite, on_memory};
use device_cuda::{Device, upload};
use engine_core::{Backend, Result, Role, Weight};
use futures::StreamExt;
use futures::executor::block_on;
use quant_fp8::rules::{Receiver, Rules, RulesConfig};
use quant_fp8::{LAYER, QuantizeFp8};

fn backend() -> &'static dyn Backend {
    on_memory(backend_ipc::BACKEND, device_cuda::MEMORY)
}

/// A weight with the same bytes on the device.
fn on_the_device(weight: Weight) -> Result<Weight> {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| Device::open(0).expect("a device"));
    upload(&DEVICE, &weight)
}

/// Every weight whose name has an odd length, so that device and host are mixed in all buckets.
fn partly_on_the_device(weight: Weight) -> Result<Weight> {
    if weight.name().len() % 2 == 1 { on_the_device(weight) } else { Ok(weight) }
}

fn quantized(weights: Vec<Weight>) -> Vec<Weight> {
    let mut config = RulesConfig::default();
    config.receiver = Receiver::Any;
    let rules = Rules::new(&config).expect("rules");
    block_on(weights.quantize_fp8(rules).map(|weight| weight.expect("a weight")).collect())
}

fn suite() -> Suite {
    Suite::new(backend()).with_control_plane().with_config(|config| {
        config.device = "cuda:0".parse().expect("a device");
        // Contexts and kernels are made at the beginning of every case.
        config.timeout_seconds = 4.0;
    })
}

fn fp8() -> Suite {
    suite().with_layer(LAYER, Role::Trainer, quantized).with_config(|config| {
        config.layers.insert("trainer_quantize_fp8".into(), true.into());
        // The suite's shapes are no engine's.
        config.layers.insert("quantization".into(), serde_json::json!({"receiver": "any"}));
    })
}

mod weights_on_the_device {
    conformance::suite!(
        super::suite().with_weights_placed(super::on_the_device),
        ignored = "needs a CUDA device"
    );
}

mod weights_on_both {
    conformance::suite!(
        super::suite().with_weights_placed(super::partly_on_the_device),
        ignored = "needs a CUDA device"
    );
}

mod weights_on_the_host_without_digests {
    conformance::suite!(
        super::suite().with_config(|config| config.digests = false),
        ignored = "needs a CUDA device"
    );
}

mod quantised_on_the_device {
    conformance::suite!(
        super::fp8().with_weights_placed(super::on_the_device),
        ignored = "needs a CUDA device"
    );
}

mod quantised_on_both {
    conformance::suite!(
        super::fp8().with_weights_placed(super::partly_on_the_device),
        ignored = "needs a CUDA device"
    );
}
