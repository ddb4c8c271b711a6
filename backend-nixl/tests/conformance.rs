//! The engine behaves as every engine has to, with NIXL itself, as a star and as a ring,
//! whether rollouts read or trainers write, quantised and not.

use engine_core::{CheckpointEngineConfig, Role, Weight};
use futures::StreamExt;
use futures::executor::block_on;
use quant_fp8::rules::{Receiver, Rules, RulesConfig};
use quant_fp8::{LAYER, QuantizeFp8};
use serde_json::{Value, json};

fn with(options: Value) -> impl FnOnce(&mut CheckpointEngineConfig) {
    move |config| {
        if let Value::Object(options) = options {
            config.engine_kwargs.insert("nixl".into(), options);
        }
    }
}

fn suite(options: Value) -> conformance::Suite {
    conformance::Suite::new(backend_nixl::BACKEND).with_control_plane().with_config(with(options))
}

fn quantized(weights: Vec<Weight>) -> Vec<Weight> {
    let mut config = RulesConfig::default();
    config.receiver = Receiver::Any;
    let rules = Rules::new(&config).expect("rules");
    block_on(weights.quantize_fp8(rules).map(|weight| weight.expect("a weight")).collect())
}

fn fp8(options: Value) -> conformance::Suite {
    suite(options).with_layer(LAYER, Role::Trainer, quantized).with_config(|config| {
        config.layers.insert("trainer_quantize_fp8".into(), true.into());
        // The suite's shapes are no engine's.
        config.layers.insert("quantization".into(), serde_json::json!({"receiver": "any"}));
    })
}

fn delta(options: Value) -> conformance::Suite {
    suite(options).with_layer(delta::LAYER, Role::Trainer, |weights| weights).with_config(
        |config| {
            config.layers.insert("delta".into(), true.into());
        },
    )
}

mod star {
    conformance::suite!(super::suite(super::json!({"topology": "star"})));
}

mod ring {
    conformance::suite!(super::suite(super::json!({"topology": "ring"})));
}

mod over_tcp {
    conformance::suite!(super::suite(super::json!({"transports": "tcp,self"})));
}

mod star_that_writes {
    conformance::suite!(super::suite(super::json!({"topology": "star", "transfer": "write"})));
}

mod ring_that_writes {
    conformance::suite!(super::suite(super::json!({"topology": "ring", "transfer": "write"})));
}

mod ring_quantised {
    conformance::suite!(super::fp8(super::json!({"topology": "ring"})));
}

mod star_that_writes_quantised {
    conformance::suite!(super::fp8(super::json!({"topology": "star", "transfer": "write"})));
}

mod ring_of_changes {
    conformance::suite!(super::delta(super::json!({"topology": "ring"})));
}
