//! The engine behaves as every engine has to, with NIXL itself, as a star and as a ring,
//! whoever moves the bytes.

use engine_core::CheckpointEngineConfig;
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
