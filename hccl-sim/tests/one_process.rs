//! What the simulated libraries ask of one process.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::ptr;
use std::time::{Duration, Instant};

use hccl_sim::Profile;
use support::*;

const SIGSEGV: i32 = 11;
const SIGABRT: i32 = 6;

/// What memory holds that nobody has written to.
const POISON: u8 = 0xb5;

#[test]
fn nothing_works_before_init_and_a_second_init_says_so() {
    processes(1, &[], |process| {
        let api = &process.api;
        assert_eq!(api.aclrtSetDevice(0), 100001);
        assert_eq!(api.aclInit(ptr::null()), 0);
        assert_eq!(api.aclInit(ptr::null()), 100002);
        process.ok(api.aclrtSetDevice(0));
        process.ok(api.aclFinalize());
        assert_eq!(api.aclrtSetDevice(0), 100001);
        assert_eq!(api.aclInit(ptr::null()), 500001, "not twice in a process");
    });
}

#[test]
fn a_device_is_chosen_by_each_thread_for_itself() {
    processes(1, &[], |process| {
        let api = &process.api;
        process.ok(api.aclInit(ptr::null()));
        let mut stream = ptr::null_mut();
        assert_eq!(api.aclrtCreateStream(&raw mut stream), 107002);
        for device in [-1, 8] {
            assert_eq!(api.aclrtSetDevice(device), 107001);
        }
        process.ok(api.aclrtSetDevice(0));
        let stream = Sent(process.stream());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(api.aclrtSynchronizeStream(stream.get()), 107002, "no device");
                process.ok(api.aclrtSetDevice(1));
                assert_eq!(api.aclrtSynchronizeStream(stream.get()), 107003, "another one");
                let mut info = vec![0; ROOT_INFO];
                process.ok(api.HcclGetRootInfo(info.as_mut_ptr()));
                process.ok(api.aclrtSetDevice(0));
                process.ok(api.aclrtSynchronizeStream(stream.get()));
            });
            scope.spawn(|| {
                let mut info = vec![0; ROOT_INFO];
                assert_eq!(api.HcclGetRootInfo(info.as_mut_ptr()), 15, "no device");
            });
        });
        process.ok(api.aclrtResetDevice(0));
    });
}

#[test]
fn a_reset_device_takes_its_memory_and_streams_with_it() {
    processes(1, &[], |process| {
        process.begin();
        let (stream, buffer) = (process.stream(), process.device(&[1; 64]));
        let api = &process.api;
        process.ok(api.aclrtSetDevice(0));
        process.ok(api.aclrtResetDevice(0));
        process.ok(api.aclrtSynchronizeStream(stream));
        // As often as it was set, by whatever thread.
        std::thread::scope(|scope| {
            scope.spawn(|| process.ok(api.aclrtResetDevice(0)));
        });
        assert_eq!(api.aclrtSynchronizeStream(stream), 107002);
        process.ok(api.aclrtSetDevice(0));
        assert_eq!(process.api.aclrtSynchronizeStream(stream), 107003, "of the old context");
        assert_eq!(process.api.aclrtMemset(buffer, 64, 0, 64), 507053, "freed");
    });
}

#[test]
fn visible_devices_are_counted_anew() {
    processes(1, &[("ASCEND_RT_VISIBLE_DEVICES", "5,2")], |process| {
        process.begin();
        let mut count = 0;
        process.ok(process.api.aclrtGetDeviceCount(&raw mut count));
        assert_eq!(count, 2);
        process.ok(process.api.aclrtSetDevice(1));
        assert_eq!(process.api.aclrtSetDevice(2), 107001);
    });
}

#[test]
fn the_host_cannot_read_device_memory() {
    let outputs = outputs(1, &[], |process| {
        process.begin();
        let buffer = process.device(&[7; 4096]);
        assert_eq!(process.bytes(buffer, 4096), [7; 4096]);
        // SAFETY: it is not: the test is that the process ends here.
        let byte = unsafe { buffer.cast::<u8>().read_volatile() };
        std::process::exit(byte.into());
    });
    for output in outputs {
        assert_eq!(output.status.signal(), Some(SIGSEGV), "{output:?}");
    }
}

#[test]
fn device_memory_is_aligned_and_poisoned_and_limited() {
    processes(1, &[("HCCL_SIM_DEVICE_MB", "8")], |process| {
        process.begin();
        let api = &process.api;
        let mut buffer = ptr::null_mut();
        assert_eq!(api.aclrtMalloc(&raw mut buffer, 0, HUGE_FIRST), 100000);
        assert_eq!(api.aclrtMalloc(ptr::null_mut(), 64, HUGE_FIRST), 100000);
        process.ok(api.aclrtMalloc(&raw mut buffer, 1000, NORMAL_ONLY));
        assert_eq!(buffer as usize % 64, 0);
        assert_ne!(buffer as usize % 128, 0, "no more than promised");
        assert_eq!(process.bytes(buffer, 1000), [POISON; 1000]);
        let mut large = ptr::null_mut();
        process.ok(api.aclrtMalloc(&raw mut large, (4 << 20) + 1, HUGE_FIRST));
        assert_eq!(process.free_memory(), (2 << 20) - 4096, "whole huge pages");
        let mut more = ptr::null_mut();
        assert_eq!(api.aclrtMalloc(&raw mut more, 2 << 20, HUGE_FIRST), 207001);
        process.ok(api.aclrtFree(large));
        process.ok(api.aclrtMalloc(&raw mut more, 2 << 20, HUGE_FIRST));
        assert_eq!(api.aclrtFree(ptr::null_mut()), 100000);
        assert_eq!(api.aclrtFree(large), 107000, "twice");
    });
}

#[test]
fn an_allocation_can_be_made_to_fail() {
    processes(1, &[("HCCL_SIM_OOM_AT", "2")], |process| {
        process.begin();
        let mut buffer = ptr::null_mut();
        for code in [0, 207001, 0] {
            assert_eq!(process.api.aclrtMalloc(&raw mut buffer, 64, HUGE_FIRST), code);
        }
    });
}

#[test]
fn what_a_process_has_not_given_back_is_listed() {
    processes(1, &[], |process| {
        let api = &process.api;
        let held = || text(api.HcclSimHeld());
        assert_eq!(held(), "");
        process.begin();
        assert_eq!(held(), "", "a device that was chosen is nothing");
        let (mut event, mut host, mut key) = (ptr::null_mut(), ptr::null_mut(), [0; 65]);
        let comm = process.comm("root");
        assert_eq!(held(), "1 communicators");
        let streams = [process.stream(), process.stream()];
        process.ok(api.aclrtCreateEvent(&raw mut event));
        let mut buffer = ptr::null_mut();
        process.ok(api.aclrtMalloc(&raw mut buffer, 2 << 20, HUGE_FIRST));
        process.ok(api.aclrtMallocHost(&raw mut host, 100));
        process.ok(api.aclrtIpcMemGetExportKey(buffer, 2 << 20, key.as_mut_ptr(), 65, 1));
        let all = "1 communicators, 2 streams, 1 events, 1 allocations of devices, \
                   1 allocations of the host, 1 keys of shared memory";
        assert_eq!(held(), all);
        process.ok(api.aclrtIpcMemClose(key.as_ptr()));
        process.ok(api.aclrtFree(buffer));
        process.ok(api.aclrtFreeHost(host));
        process.ok(api.aclrtDestroyEvent(event));
        assert_eq!(held(), "1 communicators, 2 streams");
        streams.iter().for_each(|stream| process.ok(api.aclrtDestroyStream(*stream)));
        process.ok(api.HcclCommDestroy(comm));
        assert_eq!(held(), "");
    });
}

#[test]
fn a_communicator_can_be_made_to_find_no_memory() {
    processes(1, &[("HCCL_SIM_COMM_OOM_AT", "2")], |process| {
        process.begin();
        for code in [0, 3, 0] {
            let info = process.root_info();
            assert_eq!(process.init(&info, 0).0, code);
        }
    });
}

#[test]
fn memory_that_was_freed_is_never_used_again() {
    processes(1, &[("HCCL_SIM_LAZY", "1")], |process| {
        process.begin();
        let (api, stream) = (&process.api, process.stream());
        let buffer = process.device(&[1; 4096]);
        process.ok(api.aclrtMemsetAsync(buffer, 4096, 2, 4096, stream));
        // At once: nobody waits for the stream.
        process.ok(api.aclrtFree(buffer));
        let next = process.device(&[3; 4096]);
        assert_ne!(next, buffer);
        assert_eq!(api.aclrtSynchronizeStream(stream), 507053);
        assert_eq!(api.aclrtMemset(buffer, 4096, 0, 4096), 507053);
        assert_eq!(process.bytes(next, 4096), [3; 4096]);
    });
}

#[test]
fn copies_check_what_their_addresses_are() {
    processes(1, &[], |process| {
        process.begin();
        let (api, stream) = (&process.api, process.stream());
        let buffer = process.device(&[1; 4096]);
        let mut host = vec![2_u8; 4096];
        let own = host.as_mut_ptr().cast();
        for kind in [0, DEVICE_TO_HOST, DEVICE_TO_DEVICE, 9] {
            assert_eq!(api.aclrtMemcpy(buffer, 4096, own, 4096, kind), 107000, "{kind}");
        }
        assert_eq!(api.aclrtMemcpy(buffer, 100, own, 101, HOST_TO_DEVICE), 100000, "too long");
        assert_eq!(api.aclrtMemcpy(buffer, 8192, own, 4097, HOST_TO_DEVICE), 507053, "too long");
        assert_eq!(api.aclrtMemset(own, 4096, 0, 4096), 107000, "not device memory");
        let pageable = api.aclrtMemcpyAsync(buffer, 4096, own, 4096, HOST_TO_DEVICE, stream);
        assert_eq!(pageable, 107000, "not pinned");
        assert_eq!(process.bytes(buffer, 4096), [1; 4096], "nothing of that was done");

        let mut pinned = ptr::null_mut();
        process.ok(api.aclrtMallocHost(&raw mut pinned, 4096));
        process.ok(api.aclrtMemcpy(pinned, 4096, own, 4096, 0));
        process.ok(api.aclrtMemcpyAsync(buffer, 4096, pinned, 4096, HOST_TO_DEVICE, stream));
        process.ok(api.aclrtSynchronizeStream(stream));
        assert_eq!(process.bytes(buffer, 4096), [2; 4096]);

        let odd = buffer.wrapping_byte_add(32);
        let within = api.aclrtMemcpyAsync(odd, 64, buffer, 32, DEVICE_TO_DEVICE, stream);
        assert_eq!(within, 107008, "not a multiple of 64");
        let even = buffer.wrapping_byte_add(2048);
        process.ok(api.aclrtMemcpyAsync(even, 64, buffer, 32, DEVICE_TO_DEVICE, stream));
        process.ok(api.aclrtSynchronizeStream(stream));
    });
}

#[test]
fn a_lazy_stream_runs_nothing_before_somebody_asks() {
    processes(1, &[("HCCL_SIM_LAZY", "1")], |process| {
        process.begin();
        let (api, stream) = (&process.api, process.stream());
        let buffer = process.device(&[1; 64]);
        process.ok(api.aclrtMemsetAsync(buffer, 64, 2, 64, stream));
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(process.bytes(buffer, 64), [1; 64], "nobody has waited");
        process.ok(api.aclrtSynchronizeStream(stream));
        assert_eq!(process.bytes(buffer, 64), [2; 64]);
        // An event that another stream waits for is asked for as well.
        let (event, other) = (process.event(), process.stream());
        process.ok(api.aclrtMemsetAsync(buffer, 64, 3, 64, stream));
        process.ok(api.aclrtRecordEvent(event, stream));
        process.ok(api.aclrtStreamWaitEvent(other, event));
        process.ok(api.aclrtSynchronizeStream(other));
        assert_eq!(process.bytes(buffer, 64), [3; 64]);
        // So is what someone queries.
        process.ok(api.aclrtMemsetAsync(buffer, 64, 4, 64, stream));
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(process.bytes(buffer, 64), [3; 64]);
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut status = 1;
        while status != 0 {
            assert!(Instant::now() < deadline);
            process.ok(api.aclrtStreamQuery(stream, &raw mut status));
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(process.bytes(buffer, 64), [4; 64]);
    });
}

#[test]
fn an_eager_stream_runs_by_itself() {
    processes(1, &[], |process| {
        process.begin();
        let (api, stream) = (&process.api, process.stream());
        let buffer = process.device(&[1; 64]);
        process.ok(api.aclrtMemsetAsync(buffer, 64, 2, 64, stream));
        let deadline = Instant::now() + Duration::from_secs(20);
        while process.bytes(buffer, 64) != [2; 64] {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn a_stream_runs_things_after_random_delays() {
    let variables = [("HCCL_SIM_DELAY_US", "100000"), ("HCCL_SIM_SEED", "7")];
    processes(1, &variables, |process| {
        process.begin();
        let (api, stream) = (&process.api, process.stream());
        let buffer = process.device(&[1; 64]);
        let start = Instant::now();
        for _ in 0..20 {
            process.ok(api.aclrtMemsetAsync(buffer, 64, 2, 64, stream));
        }
        process.ok(api.aclrtSynchronizeStream(stream));
        // The sum of twenty delays, of which one is 50 ms on average and the seed decides.
        assert!(start.elapsed() > Duration::from_millis(300), "{:?}", start.elapsed());
    });
}

#[test]
fn stream_and_event_queries_mean_the_reverse_of_each_other() {
    processes(1, &[("HCCL_SIM_LAZY", "1")], |process| {
        process.begin();
        let (api, stream, event) = (&process.api, process.stream(), process.event());
        let (mut of_stream, mut of_event) = (9, 9);
        process.ok(api.aclrtQueryEventStatus(event, &raw mut of_event));
        assert_eq!(of_event, 0, "never recorded: not ready");
        assert_eq!(api.aclrtSynchronizeEvent(event), 107000, "never recorded");
        process.ok(api.aclrtStreamQuery(stream, &raw mut of_stream));
        assert_eq!(of_stream, 0, "nothing to do: complete");
        process.ok(api.aclrtRecordEvent(event, stream));
        process.ok(api.aclrtSynchronizeEvent(event));
        process.ok(api.aclrtQueryEventStatus(event, &raw mut of_event));
        assert_eq!(of_event, 1, "complete");
        process.ok(api.aclrtDestroyEvent(event));
        assert_eq!(api.aclrtQueryEventStatus(event, &raw mut of_event), 107000);
    });
}

#[test]
fn what_fails_on_a_stream_shows_when_it_is_synchronised() {
    processes(1, &[("HCCL_SIM_LAZY", "1")], |process| {
        process.begin();
        let (api, stream) = (&process.api, process.stream());
        let (gone, good) = (process.device(&[1; 64]), process.device(&[1; 64]));
        process.ok(api.aclrtMemsetAsync(gone, 64, 2, 64, stream));
        process.ok(api.aclrtMemsetAsync(good, 64, 2, 64, stream));
        process.ok(api.aclrtFree(gone));
        assert_eq!(api.aclrtSynchronizeStream(stream), 507053);
        assert!(process.message().contains("freed"), "{}", process.message());
        assert_eq!(process.bytes(good, 64), [1; 64], "what came after it was not run");
        process.ok(api.aclrtMemsetAsync(good, 64, 3, 64, stream));
        assert_eq!(api.aclrtSynchronizeStream(stream), 507053, "it stays so");
        let mut status = 9;
        assert_eq!(api.aclrtStreamQuery(stream, &raw mut status), 507053);
    });
}

#[test]
fn an_aborted_stream_drops_what_it_has_not_run() {
    processes(1, &[("HCCL_SIM_LAZY", "1")], |process| {
        process.begin();
        let (api, buffer) = (&process.api, process.device(&[1; 64]));
        let (stream, event) = (process.stream(), process.event());
        process.ok(api.aclrtMemsetAsync(buffer, 64, 2, 64, stream));
        process.ok(api.aclrtRecordEvent(event, stream));
        process.ok(api.aclrtStreamAbort(stream));
        assert_eq!(api.aclrtSynchronizeEvent(event), 107023);
        assert_eq!(api.aclrtSynchronizeStream(stream), 107023);
        assert_eq!(process.bytes(buffer, 64), [1; 64]);
        // Also if it has nothing to do.
        let (idle, mut status) = (process.stream(), 9);
        process.ok(api.aclrtStreamAbort(idle));
        assert_eq!(api.aclrtSynchronizeStream(idle), 107023);
        assert_eq!(api.aclrtStreamQuery(idle, &raw mut status), 107023);
        process.ok(api.aclrtDestroyStream(idle));
    });
}

#[test]
fn a_destroyed_stream_drops_what_it_has_not_run() {
    processes(1, &[("HCCL_SIM_LAZY", "1")], |process| {
        process.begin();
        let (api, stream, event) = (&process.api, process.stream(), process.event());
        let buffer = process.device(&[1; 64]);
        process.ok(api.aclrtMemsetAsync(buffer, 64, 2, 64, stream));
        process.ok(api.aclrtRecordEvent(event, stream));
        process.ok(api.aclrtDestroyStream(stream));
        assert_ne!(api.aclrtSynchronizeEvent(event), 0, "it is never reached");
        assert_eq!(process.bytes(buffer, 64), [1; 64]);
        assert_eq!(api.aclrtSynchronizeStream(stream), 107000, "no such stream");
        assert_eq!(api.aclrtSynchronizeStream(ptr::null_mut()), 107000);
    });
}

#[test]
fn each_profile_has_the_symbols_that_it_should() {
    const IPC: [&str; 5] = [
        "aclrtDeviceGetBareTgid",
        "aclrtIpcMemGetExportKey",
        "aclrtIpcMemSetImportPid",
        "aclrtIpcMemImportByKey",
        "aclrtIpcMemClose",
    ];
    const COMMUNICATORS: [&str; 4] =
        ["HcclGetRootInfo", "HcclCommInitRootInfo", "HcclCommDestroy", "HcclGetErrorString"];
    const OPERATIONS: [&str; 3] = ["HcclBroadcast", "HcclAllReduce", "HcclBarrier"];
    for profile in Profile::ALL {
        let folder = hccl_sim::libraries(profile).unwrap();
        let has = |file: &str, names: &[&str]| -> Vec<bool> {
            // SAFETY: the simulated libraries have no initialisers of their own.
            let library = unsafe { libloading::Library::new(folder.join(file)) }.unwrap();
            let get = |name: &&str| {
                // SAFETY: it is looked for and not called.
                unsafe { library.get::<fn()>(name.as_bytes()) }.is_ok()
            };
            names.iter().map(get).collect()
        };
        let new = profile != Profile::Cann81;
        let split = profile == Profile::Split;
        assert_eq!(has("libascendcl.so", &IPC), [new; 5], "{profile:?}");
        assert_eq!(has("libascendcl.so", &["aclInit", "aclrtMalloc"]), [true; 2], "{profile:?}");
        assert_eq!(has("libascendcl.so", &OPERATIONS), [false; 3], "{profile:?}");
        assert_eq!(has("libhccl.so", &OPERATIONS), [true; 3], "{profile:?}");
        assert_eq!(has("libhccl.so", &COMMUNICATORS), [!split; 4], "{profile:?}");
        assert_eq!(has("libhccl.so", &["aclInit"]), [false], "{profile:?}");
        assert_eq!(has("libhccl.so", &["HcclSimVersion"]), [true], "{profile:?}");
        assert_eq!(folder.join("libhcomm.so").exists(), split, "{profile:?}");
        if split {
            assert_eq!(has("libhcomm.so", &COMMUNICATORS), [true; 4]);
            assert_eq!(has("libhcomm.so", &OPERATIONS), [false; 3]);
        }
    }
}

#[test]
fn the_program_writes_libraries_for_use_by_hand() {
    let folder = tempfile::tempdir().unwrap();
    let program = || Command::new(env!("CARGO_BIN_EXE_hccl-sim"));
    let written = program().arg(folder.path()).args(["--profile", "split"]).status().unwrap();
    assert!(written.success());
    let version = text(Api::load(folder.path()).HcclSimVersion());
    assert!(version.contains("profile split"), "{version}");
    assert!(folder.path().join("libhcomm.so").is_file());
    for wrong in [&["/tmp", "--profile", "9.9"][..], &["--help"], &[]] {
        let output = program().args(wrong).output().unwrap();
        assert!(!output.status.success(), "{wrong:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("FOLDER"), "{wrong:?}");
    }
    let output = program().arg("--declarations").output().unwrap();
    let declarations = serde_json::from_slice::<hccl_sim::headers::Declarations>(&output.stdout);
    assert_eq!(declarations.unwrap(), hccl_sim::declarations());
}

#[test]
fn a_program_that_asks_is_told_that_this_is_a_simulator() {
    for (chip, name) in [("A2", "Ascend910B"), ("A3", "Ascend910_93"), ("950", "Ascend950")] {
        if std::env::var("HCCL_SIM_CHIP").is_ok_and(|own| own != chip) {
            continue; // In the process of another round.
        }
        processes(1, &[("HCCL_SIM_CHIP", chip), ("profile", "split")], |process| {
            let version = text(process.api.HcclSimVersion());
            assert!(version.ends_with(": simulated"), "{version}");
            assert!(version.contains("profile split"), "{version}");
            let chip = text(process.api.aclrtGetSocName());
            assert_eq!(chip, format!("{name}-simulated"));
            assert!(text(process.api.HcclGetErrorString(9)).contains("simulated"));
        });
    }
}

#[test]
fn a_setting_that_is_not_understood_ends_the_process() {
    for (name, value) in
        [("HCCL_SIM_LAZZY", "1"), ("HCCL_SIM_LINKS", "many"), ("HCCL_CONNECT_TIMEOUT", "5")]
    {
        if std::env::var(name).is_err() && std::env::var("CKPT_ENGINE_TEST_ROLE").is_ok() {
            continue; // In the process of another round.
        }
        let outputs = outputs(1, &[(name, value)], |process| process.begin());
        for output in outputs {
            assert_eq!(output.status.signal(), Some(SIGABRT), "{name}");
            assert!(String::from_utf8_lossy(&output.stderr).contains(name), "{output:?}");
        }
    }
}
