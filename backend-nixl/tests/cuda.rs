//! The engine behaves as every engine has to with its buckets on a CUDA device, as a star and as a ring.

#![cfg(feature = "cuda")]

use std::sync::LazyLock;

use conformance::Suite;
use device_cuda::{Device, upload};
use engine_core::{Result, Weight};

fn on_the_device(weight: Weight) -> Result<Weight> {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| Device::open(0).expect("a device"));
    upload(&DEVICE, &weight)
}

fn suite(topology: &str) -> Suite {
    Suite::new(backend_nixl::BACKEND)
        .with_control_plane()
        .with_weights_placed(on_the_device)
        .with_config(|config| {
            config.device = "cuda:0".parse().expect("a device");
            // Contexts, kernels and agents are made at the beginning of every case.
            config.timeout_seconds = 6.0;
            let options = serde_json::json!({ "topology": topology });
            let options = options.as_object().expect("an object").clone();
            config.engine_kwargs.insert("nixl".into(), options);
        })
}

mod star {
    conformance::suite!(super::suite("star"), ignored = "needs a CUDA device");
}

mod ring {
    conformance::suite!(super::suite("ring"), ignored = "needs a CUDA device");
}
