//! Engines behave as engines have to with deltas in front of them, and bring the same weights. Backends over native
//! libraries have such suites of their own.

use std::sync::LazyLock;

use conformance::{Suite, on_memory};
use delta::LAYER;
use device_cuda::{Device, upload};
use engine_core::{Backend, Result, Role, Weight};

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

/// With the copies on a CUDA device.
fn on_cuda(backend: &'static dyn Backend) -> Suite {
    let memory = device_cuda::MEMORY;
    suite(on_memory(backend, memory)).with_memory(memory).with_config(|config| {
        config.device = "cuda:0".parse().expect("a device");
        // Contexts and kernels are made at the beginning of every case.
        config.timeout_seconds = 4.0;
    })
}

fn on_the_device(weight: Weight) -> Result<Weight> {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| Device::open(0).expect("a device"));
    upload(&DEVICE, &weight)
}

mod ipc_on_cuda {
    conformance::suite!(
        super::on_cuda(backend_ipc::BACKEND)
            .with_control_plane()
            .with_weights_placed(super::on_the_device),
        ignored = "needs a CUDA device"
    );
}

mod ipc_on_cuda_from_the_host {
    conformance::suite!(
        super::on_cuda(backend_ipc::BACKEND).with_control_plane(),
        ignored = "needs a CUDA device"
    );
}
