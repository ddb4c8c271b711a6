//! Placed updates, of memory of the transport and of a program's own tensors, in tasks and between processes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unsafe_code, reason = "shared memory of a program's own")]

use std::cell::Cell;

use ::placed::{PlacedRollout, Wanted};
use backend_ipc::{BACKEND, LentTensor, lend, lend_tensors};
use bytes::Bytes;
use conformance::placed::{self, Lends, own_memory, processes};
use conformance::processes::{address, context, control, runtime};
use control_plane::ControlPlane;
use engine_core::{
    CheckpointEngineConfig, DType, EngineContext, ErrorKind, Prepared, Result, Storage, TensorMeta,
};
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

/// Where rollouts' tensors are, in this process and in those that it starts; in host memory without it.
const DEVICE: &str = "CKPT_ENGINE_TEST_DEVICE";

fn lends(
    threads: usize,
    lend: fn(EngineContext, Vec<Wanted>) -> Result<Prepared<PlacedRollout>>,
) -> Lends {
    let mut config = CheckpointEngineConfig::new("ipc");
    config.timeout_seconds = 8.0;
    config.threads = std::num::NonZeroUsize::new(threads);
    if let Ok(device) = std::env::var(DEVICE) {
        config.device = device.parse().unwrap();
    }
    config.engine_kwargs.entry("ipc".into()).or_default().insert("placed".into(), true.into());
    Lends { backend: BACKEND, config, lend, put: Ok }
}

fn between_processes() -> Lends {
    lends(1, lend)
}

/// With rollouts whose tensors are in memory that no other process can open. Processes that are started know them by their size of buckets.
fn staged_between_processes() -> Lends {
    let mut lends = lends(1, lend_private);
    lends.config.update_weights_bucket_megabytes = Some(1);
    lends
}

/// What a child process does; nothing when this file's tests are run.
#[test]
fn a_process_of_a_group() {
    processes::be_a_child(&lends(1, |context, wanted| {
        match context.config.update_weights_bucket_megabytes {
            None => lend(context, wanted),
            Some(_) => lend_private(context, wanted),
        }
    }));
}

/// Shared memory as a library makes it, whose file can become shorter. It stays mapped to the end of the process.
fn shared(bytes: u64) -> Storage {
    let file = rustix::fs::memfd_create("ckpt-engine-test", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses aliases nothing.
    let start = unsafe {
        rustix::mm::mmap(std::ptr::null_mut(), bytes as usize, access, MapFlags::SHARED, &file, 0)
    };
    std::mem::forget(file);
    // SAFETY: so many bytes are mapped, and nobody in this process writes to them.
    Bytes::from_static(unsafe { std::slice::from_raw_parts(start.unwrap().cast(), bytes as usize) })
        .into()
}

/// Memory of this process alone, which lives to its end.
fn private(bytes: u64) -> Storage {
    Bytes::from_static(Box::leak(vec![0_u8; bytes as usize].into_boxed_slice())).into()
}

/// Lends tensors that are in two allocations, neither in order nor one directly behind the other.
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

fn lend_own(context: EngineContext, wanted: Vec<Wanted>) -> Result<Prepared<PlacedRollout>> {
    lend_in(context, wanted, |bytes| shared(bytes + 4096))
}

fn lend_private(context: EngineContext, wanted: Vec<Wanted>) -> Result<Prepared<PlacedRollout>> {
    lend_in(context, wanted, private)
}

/// One of the two allocations is shared memory. So is one of the elements and the scales of each tensor.
fn lend_mixed(context: EngineContext, wanted: Vec<Wanted>) -> Result<Prepared<PlacedRollout>> {
    let is_shared = Cell::new(true);
    lend_in(context, wanted, |bytes| match is_shared.replace(false) {
        true => shared(bytes + 4096),
        false => private(bytes),
    })
}

macro_rules! cases {
    ($lends:expr, $module:path: $($case:ident)*) => {
        use $module as cases;

        $(
            #[test]
            fn $case() {
                cases::$case(&$lends);
            }
        )*
    };
}

macro_rules! within_a_process {
    ($name:ident, $lend:expr) => {
        mod $name {
            use super::*;

            cases! {
                lends(2, $lend), conformance::placed:
                every_box_is_bit_for_bit_that_of_the_unsharded_tensor
                what_nobody_holds_is_named_and_leaves_the_version_that_is_there
                a_call_that_is_given_up_ends_the_update_everywhere_and_the_next_one_works
            }
        }
    };
}

within_a_process!(memory_of_the_transport, lend);
within_a_process!(tensors_of_the_program, lend_own);
within_a_process!(tensors_that_no_other_process_can_open, lend_private);
within_a_process!(tensors_of_which_some_can_be_opened, lend_mixed);

macro_rules! between_processes {
    ($name:ident, $lends:expr) => {
        mod $name {
            use super::*;

            cases! {
                $lends, conformance::placed::processes:
                a_trainer_that_is_killed_while_it_writes_is_named_and_the_next_update_makes_tensors_whole
                a_trainer_that_is_stopped_while_it_writes_keeps_updates_from_succeeding_until_it_has_let_go
                a_rollout_that_is_killed_while_it_is_written_is_named_and_the_others_are_updated_without_it
                a_leader_that_is_killed_while_tensors_are_written_is_an_error_on_the_rollout_which_has_no_version
                a_rollout_that_joins_later_is_in_the_next_update_and_one_that_leaves_in_none
            }
        }
    };
}

between_processes!(processes_of_a_host, between_processes());
between_processes!(processes_with_private_tensors, staged_between_processes());

#[test]
fn ranks_of_placed_updates_and_others_do_not_form_a_group() {
    processes::ranks_of_placed_updates_and_others_do_not_form_a_group(&between_processes());
}

#[test]
fn reports_say_which_tensors_go_through_staging_memory_and_why() {
    let (leaders, own) = placed::what_made_an_update_slower(&lends(2, lend_private));
    assert_eq!(leaders, [format!("rank 2: {}", own[0][0]), format!("rank 3: {}", own[1][0])]);
    for own in own {
        for words in
            ["of 4 tensors (`norm` is the first) go through staging memory", "share_memory_"]
        {
            assert!(own[0].contains(words), "{own:?}");
        }
    }
    for lend in [lend, lend_own] {
        let (leaders, own) = placed::what_made_an_update_slower(&lends(2, lend));
        assert_eq!(leaders.into_iter().chain(own.concat()).collect::<Vec<_>>(), [""; 0]);
    }
}

#[test]
fn tensors_that_share_memory_are_refused_by_name() {
    runtime().block_on(async {
        let plane = ControlPlane::lead(control(address())).await.unwrap();
        let lends = |tensors: [(&str, Storage); 2]| {
            let tensors = tensors.map(|(name, bytes)| {
                let wanted = Wanted::whole(TensorMeta::new(name, DType::U8, [bytes.len()]));
                // SAFETY: nothing is written: it is refused.
                unsafe { LentTensor::new(wanted, bytes, None) }.unwrap()
            });
            lend_tensors(context(&plane, between_processes().config), tensors).map(drop)
        };
        let refused = |tensors, words: &str| {
            let error = lends(tensors).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Weight, "{error}");
            assert_eq!(error.report().tensor.as_deref(), Some("second"), "{error}");
            assert!(error.to_string().contains(words), "{error}");
        };
        let whole = shared(8192);
        refused([("first", whole.slice(0..100)), ("second", whole.slice(99..200))], "overlaps");
        let own = private(200);
        refused([("first", own.slice(0..100)), ("second", own.slice(99..200))], "overlaps");
        lends([("first", own.slice(0..100)), ("second", own.slice(100..200))]).unwrap();
        lends([("first", whole.slice(0..100)), ("second", whole.slice(100..200))]).unwrap();
        let wanted = Wanted::whole(TensorMeta::new("short", DType::F32, [4]));
        // SAFETY: it is refused.
        let error = unsafe { LentTensor::new(wanted, whole.slice(0..12), None) }.unwrap_err();
        assert_eq!(error.report().tensor.as_deref(), Some("short"), "{error}");
    });
}
