//! What can be said without a GPU: the kernels compile for every architecture, and a machine without
//! CUDA is told so.

use device_cuda::{CudaError, Device, compile, local_memory};

#[test]
#[ignore = "needs NVRTC: CKPT_ENGINE_NVRTC_DIR, or the CUDA toolkit; `cargo xtask test` installs it"]
fn the_kernels_compile_for_ampere_hopper_and_blackwell() {
    for capability in [(8, 0), (8, 9), (9, 0), (10, 0)] {
        let image = compile(capability).unwrap_or_else(|error| panic!("{capability:?}: {error}"));
        assert_eq!(image[..4], *b"\x7fELF", "{capability:?}");
    }
}

#[test]
#[ignore = "needs NVRTC: CKPT_ENGINE_NVRTC_DIR, or the CUDA toolkit; `cargo xtask test` installs it"]
fn no_kernel_keeps_anything_in_local_memory_on_ampere_ada_and_hopper() {
    for capability in [(8, 0), (8, 9), (9, 0)] {
        let said = local_memory(capability).unwrap_or_else(|error| panic!("{error}"));
        assert!(said.is_empty(), "{capability:?}: {said}");
    }
}

#[test]
fn a_machine_without_a_driver_or_device_says_so() {
    // Where there is one, a device of a number that no machine has.
    match Device::open(1 << 20) {
        Err(CudaError::NoDriver | CudaError::NoDevice { .. }) => {}
        Err(CudaError::Driver { words, .. }) => assert!(!words.is_empty()),
        other => panic!("{other:?}"),
    }
}
