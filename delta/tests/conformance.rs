//! Engines behave as engines have to with deltas in front of them, and bring the same weights. Backends over native
//! libraries have such suites of their own.

use conformance::Suite;
use delta::LAYER;
use engine_core::{Backend, Role};

fn suite(backend: &'static dyn Backend) -> Suite {
    Suite::new(backend).with_layer(LAYER, Role::Trainer, |weights| weights).with_config(|config| {
        config.layers.insert("delta".into(), true.into());
    })
}

mod naive {
    conformance::suite!(super::suite(backend_naive::BACKEND), within a process);
}

mod ipc {
    conformance::suite!(super::suite(backend_ipc::BACKEND).with_control_plane());
}
