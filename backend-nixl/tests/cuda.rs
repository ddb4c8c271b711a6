//! The engine behaves as every engine has to with its buckets on a CUDA device, wherever the weights are,
//! quantised and not, whether rollouts read or trainers write.
//!
//! All ranks of the suite are in one process, where UCX uses no CUDA IPC between them: it goes over
//! host memory, and what arrives is the same.

use std::sync::LazyLock;

use conformance::{Suite, on_memory};
use device_cuda::{Device, upload};
use engine_core::{Backend, Result, Role, Weight};
use futures::StreamExt;
use futures::executor::block_on;
use quant_fp8::rules::{Receiver, Rules, RulesConfig};
use quant_fp8::{LAYER, QuantizeFp8};
use serde_json::{Value, json};

fn backend() -> &'static dyn Backend {
    on_memory(backend_nixl::BACKEND, device_cuda::MEMORY)
}

/// A weight with the same bytes on the device.
fn on_the_device(weight: Weight) -> Result<Weight> {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| Device::open(0).expect("a device"));
    upload(&DEVICE, &weight)
}

fn quantized(weights: Vec<Weight>) -> Vec<Weight> {
    let mut config = RulesConfig::default();
    config.receiver = Receiver::Any;
    let rules = Rules::new(&config).expect("rules");
    block_on(weights.quantize_fp8(rules).map(|weight| weight.expect("a weight")).collect())
}

fn suite(options: Value) -> Suite {
    Suite::new(backend()).with_control_plane().with_config(|config| {
        config.device = "cuda:0".parse().expect("a device");
        // Contexts and kernels are made at the beginning of every case.
        config.timeout_seconds = 8.0;
        if let Value::Object(options) = options {
            config.engine_kwargs.insert("nixl".into(), options);
        }
    })
}

fn fp8(options: Value) -> Suite {
    suite(options).with_layer(LAYER, Role::Trainer, quantized).with_config(|config| {
        config.layers.insert("trainer_quantize_fp8".into(), true.into());
        // The suite's shapes are no engine's.
        config.layers.insert("quantization".into(), serde_json::json!({"receiver": "any"}));
    })
}

mod star {
    conformance::suite!(
        super::suite(super::json!({"topology": "star"})).with_weights_placed(super::on_the_device),
        ignored = "needs a CUDA device"
    );
}

mod ring_that_writes {
    conformance::suite!(
        super::suite(super::json!({"topology": "ring", "transfer": "write"})),
        ignored = "needs a CUDA device"
    );
}

mod ring_quantised {
    conformance::suite!(
        super::fp8(super::json!({"topology": "ring"})).with_weights_placed(super::on_the_device),
        ignored = "needs a CUDA device"
    );
}
