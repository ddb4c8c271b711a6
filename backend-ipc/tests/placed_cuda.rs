//! Placed updates in memory of a CUDA device, wherever trainers have their weights.
//!
//! The tests of `placed.rs`, with trainers that are killed and stopped, run in memory of a device with `CKPT_ENGINE_TEST_DEVICE=cuda:0`.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(unsafe_code, reason = "memory that the driver does not export")]

use std::cell::Cell;
use std::ffi::c_void;
use std::sync::{Arc, LazyLock};

use backend_ipc::{BACKEND, LentTensor, lend, lend_tensors};
use conformance::placed::{Lends, own_memory};
use device_cuda::{CudaMemory, Device, upload};
use engine_core::{CheckpointEngineConfig, EngineContext, Prepared, Result, Storage, Weight};
use placed::{PlacedRollout, Wanted};

fn on_the_device(weight: Weight) -> Result<Weight> {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| Device::open(0).expect("a device"));
    upload(&DEVICE, &weight)
}

/// Device and host are mixed on every trainer.
fn partly_on_the_device(weight: Weight) -> Result<Weight> {
    if weight.name().len() % 2 == 1 { on_the_device(weight) } else { Ok(weight) }
}

/// Memory of the driver's asynchronous allocator, which it does not export. It is never freed.
fn not_exported(bytes: u64) -> Storage {
    type Allocate = unsafe extern "C" fn(*mut u64, usize, *mut c_void) -> i32;
    type Wait = unsafe extern "C" fn() -> i32;
    static DEVICE: LazyLock<Device> = LazyLock::new(|| Device::open(0).expect("a device"));
    DEVICE.enter().expect("a context");
    let mut address = 0;
    // SAFETY: the driver is loaded already.
    let driver = unsafe { libloading::Library::new("libcuda.so.1") }.expect("the driver");
    // SAFETY: the function has this type.
    let allocate = unsafe { driver.get::<Allocate>(b"cuMemAllocAsync") }.expect("CUDA 11.2");
    // SAFETY: it writes an address; the stream is the default one.
    let allocated = unsafe { allocate(&mut address, bytes as usize, std::ptr::null_mut()) };
    // SAFETY: the function has this type.
    let wait = unsafe { driver.get::<Wait>(b"cuCtxSynchronize") }.expect("CUDA");
    // SAFETY: it waits for the allocation.
    let waited = unsafe { wait() };
    assert_eq!((allocated, waited), (0, 0));
    // SAFETY: so many bytes of the device are there for ever.
    let memory = unsafe { CudaMemory::borrowed(&DEVICE, address, bytes as usize, Arc::new(())) };
    memory.all().storage()
}

fn lend_in(
    context: EngineContext,
    wanted: Vec<Wanted>,
    allocate: impl Fn(u64) -> Storage,
) -> Result<Prepared<PlacedRollout>> {
    let tensors = own_memory(wanted, allocate)?.into_iter().map(|(wanted, [elements, scales])| {
        // SAFETY: it is memory that only this tensor has.
        unsafe { LentTensor::new(wanted, elements, Some(scales)) }
    });
    lend_tensors(context, tensors.collect::<Result<Vec<_>>>()?)
}

fn lend_not_exported(
    context: EngineContext,
    wanted: Vec<Wanted>,
) -> Result<Prepared<PlacedRollout>> {
    lend_in(context, wanted, not_exported)
}

/// One of the two allocations can be exported. So can one of the elements and the scales of each tensor.
fn lend_mixed(context: EngineContext, wanted: Vec<Wanted>) -> Result<Prepared<PlacedRollout>> {
    let is_exported = Cell::new(true);
    lend_in(context, wanted, |bytes| match is_exported.replace(false) {
        true => {
            let device = Device::open(0).expect("a device");
            CudaMemory::new(&device, bytes as usize).expect("memory").all().storage()
        }
        false => not_exported(bytes),
    })
}

fn lends(put: fn(Weight) -> Result<Weight>) -> Lends {
    lends_with(put, lend)
}

fn lends_with(
    put: fn(Weight) -> Result<Weight>,
    lend: fn(EngineContext, Vec<Wanted>) -> Result<Prepared<PlacedRollout>>,
) -> Lends {
    let mut config = CheckpointEngineConfig::new("ipc");
    config.device = "cuda:0".parse().unwrap();
    // A trainer that gives up before it has heard of an update is waited for so long.
    config.timeout_seconds = 8.0;
    config.threads = std::num::NonZeroUsize::new(2);
    config.engine_kwargs.entry("ipc".into()).or_default().insert("placed".into(), true.into());
    Lends { backend: BACKEND, config, lend, put }
}

macro_rules! cases {
    ($name:ident, $lends:expr) => {
        mod $name {
            #[test]
            #[ignore = "needs a CUDA device"]
            fn every_box_is_bit_for_bit_that_of_the_unsharded_tensor() {
                conformance::placed::every_box_is_bit_for_bit_that_of_the_unsharded_tensor(
                    &$lends,
                );
            }

            #[test]
            #[ignore = "needs a CUDA device"]
            fn what_nobody_holds_is_named_and_leaves_the_version_that_is_there() {
                conformance::placed::what_nobody_holds_is_named_and_leaves_the_version_that_is_there(
                    &$lends,
                );
            }

            #[test]
            #[ignore = "needs a CUDA device"]
            fn a_call_that_is_given_up_ends_the_update_everywhere_and_the_next_one_works() {
                conformance::placed::a_call_that_is_given_up_ends_the_update_everywhere_and_the_next_one_works(
                    &$lends,
                );
            }
        }
    };
}

cases!(weights_on_the_device, super::lends(super::on_the_device));
cases!(weights_on_the_host, super::lends(Ok));
cases!(weights_on_both, super::lends(super::partly_on_the_device));
cases!(
    memory_that_is_not_exported,
    super::lends_with(super::partly_on_the_device, super::lend_not_exported)
);
cases!(
    memory_of_which_some_is_exported,
    super::lends_with(super::on_the_device, super::lend_mixed)
);

#[test]
#[ignore = "needs a CUDA device"]
fn reports_say_which_tensors_go_through_staging_memory_and_why() {
    let lends = lends_with(Ok, lend_not_exported);
    let (leaders, own) = conformance::placed::what_made_an_update_slower(&lends);
    assert_eq!(leaders, [format!("rank 2: {}", own[0][0]), format!("rank 3: {}", own[1][0])]);
    assert!(own[0][0].contains("expandable segments"), "{own:?}");
}
