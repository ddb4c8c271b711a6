//! Engines behave as engines have to with quantisation in front of them, and bring exactly what the
//! combinator makes of the weights: quantised by the trainer, and quantised by the rollout. Backends over native
//! libraries have such suites of their own.

use conformance::Suite;
use engine_core::{Backend, Weight, naive};
use futures::StreamExt;
use futures::executor::block_on;
use quant_fp8::rules::{Receiver, Rules, RulesConfig};
use quant_fp8::{QuantizeFp8, with_fp8};

fn quantized(weights: Vec<Weight>) -> Vec<Weight> {
    let config = RulesConfig { receiver: Receiver::Any, ..RulesConfig::default() };
    let rules = Rules::new(&config).expect("rules");
    block_on(weights.quantize_fp8(rules).map(|weight| weight.expect("a weight")).collect())
}

fn on_the_trainer(backend: &'static dyn Backend) -> Suite {
    Suite::new(backend).with_quantizer(with_fp8, quantized).with_config(|config| {
        config.trainer_quantize_fp8 = true;
        // The suite's shapes are no engine's.
        config.quantization.insert("receiver".into(), "any".into());
    })
}

fn on_the_rollout(backend: &'static dyn Backend) -> Suite {
    Suite::new(backend).with_quantizer(with_fp8, quantized).with_config(|config| {
        config.quantization.insert("quantize_on_receive".into(), true.into());
        config.quantization.insert("receiver".into(), "any".into());
    })
}

mod naive_with_the_trainer_quantising {
    conformance::suite!(super::on_the_trainer(super::naive::BACKEND), without buckets);
}

mod ipc_with_the_trainer_quantising {
    conformance::suite!(super::on_the_trainer(backend_ipc::BACKEND).with_control_plane());
}

mod naive_with_the_rollout_quantising {
    conformance::suite!(super::on_the_rollout(super::naive::BACKEND), without buckets);
}

mod ipc_with_the_rollout_quantising {
    conformance::suite!(super::on_the_rollout(backend_ipc::BACKEND).with_control_plane());
}
