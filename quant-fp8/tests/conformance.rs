//! Engines behave as engines have to with quantisation in front of them, and bring exactly what the
//! combinator makes of the weights: quantised by the trainer, and quantised by the rollout. Backends over native
//! libraries have such suites of their own.

use conformance::Suite;
use engine_core::{Backend, Role, Weight};
use futures::StreamExt;
use futures::executor::block_on;
use quant_fp8::rules::{Receiver, Rules, RulesConfig};
use quant_fp8::{LAYER, QuantizeFp8};

fn quantized(weights: Vec<Weight>) -> Vec<Weight> {
    let mut config = RulesConfig::default();
    config.receiver = Receiver::Any;
    let rules = Rules::new(&config).expect("rules");
    block_on(weights.quantize_fp8(rules).map(|weight| weight.expect("a weight")).collect())
}

fn on_the_trainer(backend: &'static dyn Backend) -> Suite {
    Suite::new(backend).with_layer(LAYER, Role::Trainer, quantized).with_config(|config| {
        config.layers.insert("trainer_quantize_fp8".into(), true.into());
        // The suite's shapes are no engine's.
        config.layers.insert("quantization".into(), serde_json::json!({"receiver": "any"}));
    })
}

fn on_the_rollout(backend: &'static dyn Backend) -> Suite {
    Suite::new(backend).with_layer(LAYER, Role::Rollout, quantized).with_config(|config| {
        let section = serde_json::json!({"quantize_on_receive": true, "receiver": "any"});
        config.layers.insert("quantization".into(), section);
    })
}

mod naive_with_the_trainer_quantising {
    conformance::suite!(super::on_the_trainer(backend_naive::BACKEND), within a process);
}

mod ipc_with_the_trainer_quantising {
    conformance::suite!(super::on_the_trainer(backend_ipc::BACKEND).with_control_plane());
}

mod naive_with_the_rollout_quantising {
    conformance::suite!(super::on_the_rollout(backend_naive::BACKEND), within a process);
}

mod ipc_with_the_rollout_quantising {
    conformance::suite!(super::on_the_rollout(backend_ipc::BACKEND).with_control_plane());
}
