//! Communicators whose ranks are processes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::redundant_closure, reason = "a closure's type names the test that it is in")]

mod support;

use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::ptr;
use std::time::{Duration, Instant};

use support::*;

const SIGKILL: i32 = 9;

/// Waits for a stream, and gives the code.
fn wait(process: &Process, stream: Pointer) -> i32 {
    process.api.aclrtSynchronizeStream(stream)
}

/// Enough for several chunks, and not a multiple of anything.
const LARGE: usize = 3_000_001;

fn pattern(seed: u32) -> Vec<u8> {
    (0..LARGE as u32)
        .map(|index| (index.wrapping_mul(2_654_435_761).rotate_left(7) ^ seed) as u8)
        .collect()
}

/// Every kind of operation among three ranks.
fn all_operations(process: &Process) {
    process.begin();
    let (api, rank) = (&process.api, process.rank);
    let (comm, stream) = (process.comm("root"), process.stream());
    let (mut ranks, mut own) = (0, 9);
    process.ok(api.HcclGetRankSize(comm, &raw mut ranks));
    process.ok(api.HcclGetRankId(comm, &raw mut own));
    assert_eq!((ranks, own), (3, rank));

    let buffer = process.device(&pattern(rank));
    for root in [0, 2] {
        process.ok(api.HcclBroadcast(buffer, LARGE as u64, UINT8, root, comm, stream));
        process.ok(wait(process, stream));
        assert_eq!(process.bytes(buffer, LARGE), pattern(0), "from {root}: rank 0's by now");
    }

    let numbers: Vec<u8> = [1.5_f32, -2.0, 3.0]
        .iter()
        .flat_map(|one| (one * (rank + 1) as f32).to_le_bytes())
        .collect();
    let (send, receive) = (process.device(&numbers), process.device(&[0; 12]));
    process.ok(api.HcclAllReduce(send, receive, 3, FP32, SUM, comm, stream));
    process.ok(wait(process, stream));
    let sums: Vec<u8> = [9.0_f32, -12.0, 18.0].iter().flat_map(|one| one.to_le_bytes()).collect();
    assert_eq!(process.bytes(receive, 12), sums);

    let small = process.device(&[rank as u8 + 1; 4]);
    for (op, result) in [(0, 6), (1, 6), (2, 3), (3, 1)] {
        process.ok(api.HcclAllReduce(small, receive, 4, INT8, op, comm, stream));
        process.ok(wait(process, stream));
        assert_eq!(process.bytes(receive, 4), [result; 4], "reduction {op}");
    }
    process.ok(api.HcclAllReduce(small, receive, 1, INT32, 2, comm, stream));
    process.ok(wait(process, stream));
    assert_eq!(process.bytes(receive, 4), [3; 4]);

    process.ok(api.HcclAllGather(small, receive, 4, UINT8, comm, stream));
    process.ok(wait(process, stream));
    assert_eq!(process.bytes(receive, 12), [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]);

    // Round and round, so that everyone sends and receives.
    let (next, previous) = ((rank + 1) % 3, (rank + 2) % 3);
    let passes = |send: bool| {
        if send {
            process.ok(api.HcclSend(small, 4, UINT8, next, comm, stream));
        } else {
            process.ok(api.HcclRecv(receive, 4, UINT8, previous, comm, stream));
        }
    };
    passes(rank == 0);
    passes(rank != 0);
    process.ok(wait(process, stream));
    assert_eq!(process.bytes(receive, 4), [previous as u8 + 1; 4]);

    process.ok(api.HcclBarrier(comm, stream));
    process.ok(wait(process, stream));
    process.ok(api.HcclCommDestroy(comm));
}

#[test]
fn three_ranks_move_bytes_by_every_operation() {
    processes(3, &[], |process| all_operations(process));
}

#[test]
fn the_root_info_is_random_and_says_where_to_come() {
    processes(1, &[], |process| {
        process.begin();
        let (one, other) = (process.root_info(), process.root_info());
        let different = one.iter().zip(&other).filter(|(a, b)| a != b).count();
        assert!(different > ROOT_INFO * 9 / 10, "no part of it can be compared");
        let mut comm = ptr::null_mut();
        for rank in [1, 2, u32::MAX] {
            assert_eq!(process.init(&one, rank).0, 1, "rank {rank} of 1");
        }
        let null = process.api.HcclCommInitRootInfo(1, ptr::null(), 0, &raw mut comm);
        assert_eq!(null, 2);
        let (code, comm) = process.init(&one, 0);
        process.ok(code);
        assert!(!comm.is_null());
    });
}

#[test]
fn a_root_info_is_good_for_one_communicator() {
    processes(1, &[("HCCL_SIM_TIME_SCALE", "0.005")], |process| {
        process.begin();
        let info = process.root_info();
        process.ok(process.init(&info, 0).0);
        let start = Instant::now();
        let (code, comm) = process.init(&info, 0);
        assert_eq!(code, 9);
        assert!(comm.is_null());
        assert!(start.elapsed() >= Duration::from_millis(600), "it waits for its time");
    });
}

#[test]
fn joining_blocks_until_a_timeout_if_a_rank_does_not_come() {
    processes(1, &[("HCCL_SIM_TIME_SCALE", "0.005")], |process| {
        process.begin();
        let info = process.root_info();
        let mut comm = ptr::null_mut();
        let start = Instant::now();
        let code = process.api.HcclCommInitRootInfo(2, info.as_ptr(), 0, &raw mut comm);
        assert_eq!(code, 9);
        assert!(start.elapsed() >= Duration::from_millis(600));
    });
}

#[test]
fn a_communicator_can_be_made_to_reach_nobody_and_the_next_one_works() {
    let variables = [("HCCL_SIM_TIME_SCALE", "0.005"), ("1:HCCL_SIM_LOST_AT", "1")];
    processes(2, &variables, |process| {
        process.begin();
        let start = Instant::now();
        assert_eq!(process.try_comm("lost").0, 9);
        assert!(start.elapsed() >= Duration::from_millis(600), "it waits for its time");
        process.comm("found");
    });
}

#[test]
fn two_ranks_on_one_chip_are_refused() {
    // All are told, also the third one.
    processes(3, &[("ASCEND_RT_VISIBLE_DEVICES", "3,4,3")], |process| {
        process.begin();
        let (code, _) = process.try_comm("root");
        assert_eq!(code, 1, "{}", process.message());
    });
}

#[test]
fn chips_of_different_machines_may_have_the_same_number() {
    let variables = [
        ("ASCEND_RT_VISIBLE_DEVICES", "3,3"),
        ("0:HCCL_SIM_MACHINE", "a"),
        ("1:HCCL_SIM_MACHINE", "b"),
    ];
    processes(2, &variables, |process| {
        process.begin();
        process.comm("root");
    });
}

#[test]
fn processes_share_a_chip_only_with_both_port_ranges_automatic() {
    let machine = format!("machine-{}", std::process::id());
    let shared = std::env::var("HCCL_SIM_MACHINE").unwrap_or(machine);
    for (range, code) in [("auto", 0), ("61000-61015", 7)] {
        if std::env::var("HCCL_NPU_SOCKET_PORT_RANGE").is_ok_and(|own| own != range) {
            continue; // In the process of another round.
        }
        let variables = [
            ("HCCL_NPU_SOCKET_PORT_RANGE", range),
            ("HCCL_SIM_MACHINE", &*shared),
            ("ASCEND_RT_VISIBLE_DEVICES", "0,0"),
        ];
        processes(2, &variables, |process| {
            process.begin();
            let alone = || {
                let (info, mut comm) = (process.root_info(), ptr::null_mut());
                process.api.HcclCommInitRootInfo(1, info.as_ptr(), 0, &raw mut comm)
            };
            if process.rank == 0 {
                process.ok(alone());
            }
            process.meet("first");
            if process.rank == 1 {
                assert_eq!(alone(), code, "{}", process.message());
            }
            process.meet("second");
        });
    }
}

#[test]
fn a_root_needs_a_free_port_of_its_range() {
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let range = format!("{port}-{port}");
    processes(1, &[("HCCL_HOST_SOCKET_PORT_RANGE", &range)], |process| {
        process.begin();
        let mut info = vec![0; ROOT_INFO];
        assert_eq!(process.api.HcclGetRootInfo(info.as_mut_ptr()), 7);
    });
}

#[test]
fn the_first_operation_of_a_kind_compares_arguments_on_the_host() {
    processes(2, &[("HCCL_SIM_LAZY", "1")], |process| {
        process.begin();
        let (api, comm, stream) = (&process.api, process.comm("root"), process.stream());
        let buffer = process.device(&[process.rank as u8; 64]);
        let count = 32 + u64::from(process.rank);
        assert_eq!(api.HcclBroadcast(buffer, count, UINT8, 0, comm, stream), 1, "another count");
        assert_eq!(
            api.HcclBroadcast(buffer, 32, UINT8, process.rank, comm, stream),
            1,
            "another root"
        );
        // It blocks the host until the other rank comes.
        if process.rank == 1 {
            std::thread::sleep(Duration::from_millis(300));
            process.put("late", &[]);
        }
        process.ok(api.HcclBroadcast(buffer, 64, UINT8, 0, comm, stream));
        process.meet("after");
        process.get("late");
        // A later one does not.
        if process.rank == 0 {
            process.ok(api.HcclBroadcast(buffer, 64, UINT8, 0, comm, stream));
        }
        process.meet("enqueued");
        if process.rank == 1 {
            process.ok(api.HcclBroadcast(buffer, 64, UINT8, 0, comm, stream));
        }
        process.ok(wait(process, stream));
        assert_eq!(process.bytes(buffer, 64), [0; 64]);
    });
}

#[test]
fn the_first_operation_waits_no_longer_than_joining() {
    processes(2, &[("HCCL_SIM_TIME_SCALE", "0.05")], |process| {
        process.begin();
        let (api, comm, stream) = (&process.api, process.comm("root"), process.stream());
        let buffer = process.device(&[0; 64]);
        if process.rank == 0 {
            let start = Instant::now();
            assert_eq!(api.HcclBroadcast(buffer, 64, UINT8, 0, comm, stream), 9);
            assert!(start.elapsed() >= Duration::from_secs(6));
        }
        process.meet("end");
    });
}

#[test]
fn a_later_mismatch_hangs_until_the_execution_timeout() {
    let variables = [("HCCL_EXEC_TIMEOUT", "12")];
    processes(2, &variables, |process| {
        process.begin();
        let (api, comm, stream) = (&process.api, process.comm("root"), process.stream());
        let buffer = process.device(&[0; 64]);
        process.ok(api.HcclBroadcast(buffer, 64, UINT8, 0, comm, stream));
        process.ok(wait(process, stream));
        let count = 32 + u64::from(process.rank);
        process.ok(api.HcclBroadcast(buffer, count, UINT8, 0, comm, stream));
        assert_eq!(api.aclrtSynchronizeStreamWithTimeout(stream, 50), 507046, "it hangs");
        assert_eq!(api.HcclCommDestroy(comm), 20, "it is in use");
        assert_eq!(wait(process, stream), 507048);
        process.ok(api.HcclCommDestroy(comm));
    });
}

#[test]
fn operations_check_their_arguments_before_they_wait_for_anyone() {
    processes(1, &[], |process| {
        process.begin();
        let (api, comm, stream) = (&process.api, process.comm("root"), process.stream());
        let (buffer, null) = (process.device(&[0; 64]), ptr::null_mut());
        let broadcast =
            |count, dtype, root| api.HcclBroadcast(buffer, count, dtype, root, comm, stream);
        assert_eq!(api.HcclBroadcast(buffer, 64, UINT8, 0, comm, null), 2, "a null stream");
        assert_eq!(api.HcclBroadcast(buffer, 64, UINT8, 0, null, stream), 2, "a null communicator");
        assert_eq!(api.HcclBroadcast(null, 64, UINT8, 0, comm, stream), 2, "a null buffer");
        assert_eq!(broadcast(64, UINT8, 1), 1, "a root that is no rank");
        assert_eq!(broadcast(0x7_ffff_ffff + 1, UINT8, 0), 1, "too many");
        assert_eq!(broadcast(64, 255, 0), 5, "no type");
        assert_eq!(broadcast(64, 12, 0), 5, "a type that cannot be moved");
        let nothing = api.HcclBroadcast(null, 0, UINT8, 0, comm, stream);
        assert_eq!(nothing, 0, "there is nothing to do");
        let reduce = |dtype, op| api.HcclAllReduce(buffer, buffer, 8, dtype, op, comm, stream);
        for dtype in [UINT8, 6, 8, 9, 10, 15] {
            assert_eq!(reduce(dtype, SUM), 5, "type {dtype} cannot be reduced");
        }
        for dtype in [1, 11] {
            process.ok(reduce(dtype, SUM));
            assert_eq!(reduce(dtype, 1), 5, "type {dtype} has no products");
        }
        assert_eq!(reduce(FP32, 4), 5, "no reduction");
        assert_eq!(api.HcclSend(buffer, 1, UINT8, 0, comm, stream), 1, "to itself");
        process.ok(wait(process, stream));
        process.ok(api.HcclCommDestroy(comm));
        assert_eq!(api.HcclBroadcast(buffer, 64, UINT8, 0, comm, stream), 1, "destroyed");
        assert_eq!(api.HcclCommDestroy(comm), 1, "destroyed");
    });
}

#[test]
fn fp8_types_are_known_to_the_950_only() {
    for (chip, profile, code) in
        [("A2", "current", 5), ("A3", "current", 5), ("950", "8.1", 5), ("950", "current", 0)]
    {
        let own =
            std::env::var("HCCL_SIM_CHIP").map(|chip| (chip, std::env::var("EXPECTED").unwrap()));
        if own.is_ok_and(|(own, expected)| own != chip || expected != code.to_string()) {
            continue; // In the process of another round.
        }
        let text = code.to_string();
        let variables = [("HCCL_SIM_CHIP", chip), ("profile", profile), ("EXPECTED", &*text)];
        processes(1, &variables, |process| {
            process.begin();
            let (api, comm, stream) = (&process.api, process.comm("root"), process.stream());
            let buffer = process.device(&[0; 64]);
            let expected: i32 = std::env::var("EXPECTED").unwrap().parse().unwrap();
            for dtype in 14..=17 {
                assert_eq!(api.HcclBroadcast(buffer, 64, dtype, 0, comm, stream), expected);
            }
            process.ok(wait(process, stream));
        });
    }
}

#[test]
fn a_communicator_is_used_on_its_own_device_and_stream() {
    processes(1, &[], |process| {
        process.begin();
        let api = &process.api;
        let (comm, stream) = (Sent(process.comm("root")), Sent(process.stream()));
        let (buffer, info) = (Sent(process.device(&[0; 64])), process.root_info());
        let broadcast = || api.HcclBroadcast(buffer.get(), 64, UINT8, 0, comm.get(), stream.get());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(broadcast(), 15, "no device on this thread");
                assert_eq!(process.init(&info, 0).0, 15, "no device on this thread");
                assert_eq!(api.HcclCommDestroy(comm.get()), 15, "no device on this thread");
                process.ok(api.aclrtSetDevice(1));
                assert_eq!(broadcast(), 15, "another device");
                let own = process.stream();
                let mixed = api.HcclBroadcast(buffer.get(), 64, UINT8, 0, comm.get(), own);
                assert_eq!(mixed, 15, "a stream of this device, a communicator of the other");
            });
        });
        process.ok(broadcast());
        process.ok(wait(process, stream.get()));
    });
}

#[test]
fn a_host_pointer_or_freed_memory_fails_on_the_stream() {
    processes(1, &[("HCCL_SIM_LAZY", "1")], |process| {
        process.begin();
        let (api, comm) = (&process.api, process.comm("root"));
        let mut host = [0_u8; 64];
        let stream = process.stream();
        process.ok(api.HcclBroadcast(host.as_mut_ptr().cast(), 64, UINT8, 0, comm, stream));
        assert_eq!(wait(process, stream), 507018, "not device memory");
        let (stream, buffer) = (process.stream(), process.device(&[0; 64]));
        process.ok(api.HcclBroadcast(buffer, 64, UINT8, 0, comm, stream));
        process.ok(api.aclrtFree(buffer));
        assert_eq!(wait(process, stream), 507053, "freed");
        let (stream, buffer) = (process.stream(), process.device(&[0; 64]));
        process.ok(api.HcclBroadcast(buffer, 65, UINT8, 0, comm, stream));
        assert_eq!(wait(process, stream), 507053, "too long");
    });
}

/// A configuration of version 5, as bytes.
fn config(size: u64, magic: u32, version: u32) -> Vec<u8> {
    let mut bytes = vec![0_u8; 300];
    bytes[..8].copy_from_slice(&size.to_le_bytes());
    bytes[8..12].copy_from_slice(&magic.to_le_bytes());
    bytes[12..16].copy_from_slice(&version.to_le_bytes());
    for unset in [24, 28, 292, 296] {
        bytes[unset..unset + 4].fill(0xff);
    }
    bytes
}

/// The same bytes at the end of a page, with a page behind it that cannot be read.
fn guarded(bytes: &[u8]) -> *const u8 {
    let page = 4096;
    // SAFETY: a mapping of its own at an address that the kernel chooses.
    let map = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            2 * page,
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::PRIVATE,
        )
    }
    .unwrap();
    let behind = map.wrapping_byte_add(page);
    // SAFETY: the second page of that mapping.
    unsafe { rustix::mm::mprotect(behind, page, rustix::mm::MprotectFlags::empty()) }.unwrap();
    let start = behind.wrapping_byte_sub(bytes.len()).cast::<u8>();
    // SAFETY: so many bytes before the second page are in the first.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len()) };
    start
}

#[test]
fn a_configuration_is_read_by_its_size_version_and_magic_word() {
    processes(1, &[("HCCL_SIM_DEVICE_MB", "1000")], |process| {
        process.begin();
        let init = |config: *const u8| {
            let (info, mut comm) = (process.root_info(), ptr::null_mut());
            let api = &process.api;
            let code = api.HcclCommInitRootInfoConfig(1, info.as_ptr(), 0, config, &raw mut comm);
            (code, comm)
        };
        let magic = 0xf0f0_f0f0;
        assert_eq!(init(ptr::null()).0, 2);
        assert_eq!(init(guarded(&config(300, magic + 1, 5))).0, 1, "another magic word");
        assert_eq!(init(guarded(&config(292, magic, 5))).0, 1, "a size of version 4");
        assert_eq!(init(guarded(&config(300, magic, 77))).0, 1, "no such version");
        assert_eq!(init(guarded(&config(1 << 40, magic, 5))).0, 1, "no such size");
        let mut zero = config(300, magic, 5);
        zero[24..28].fill(0);
        assert_eq!(init(guarded(&zero)).0, 1, "no buffers");
        let mut endless = config(300, magic, 5);
        endless[32..160].fill(b'n');
        assert_eq!(init(guarded(&endless)).0, 1, "a name without an end");

        // Not a byte beyond the size is read, and what is in it counts.
        let mut good = config(300, magic, 5);
        good[24..28].copy_from_slice(&50_u32.to_le_bytes());
        good[32..36].copy_from_slice(b"name");
        let (code, comm) = init(guarded(&good));
        process.ok(code);
        let mut name = [1_u8; 128];
        process.ok(process.api.HcclGetCommName(comm, name.as_mut_ptr().cast()));
        assert_eq!(&name[..5], b"name\0");
        assert_eq!(process.free_memory(), (1000 - 100) << 20, "twice its own 50 MB");
    });
}

#[test]
fn a_configuration_shorter_than_it_says_is_found_out() {
    let outputs = outputs(1, &[], |process| {
        process.begin();
        let mut bytes = config(2240, 0xf0f0_f0f0, 10);
        bytes.truncate(300);
        let (info, mut comm) = (process.root_info(), ptr::null_mut());
        let config = guarded(&bytes);
        process.api.HcclCommInitRootInfoConfig(1, info.as_ptr(), 0, config, &raw mut comm);
    });
    for output in outputs {
        assert_eq!(output.status.signal(), Some(11), "{output:?}");
    }
}

#[test]
fn a_communicator_takes_memory_and_gives_it_back() {
    let variables = [("HCCL_SIM_DEVICE_MB", "100"), ("HCCL_BUFFSIZE", "30")];
    processes(1, &variables, |process| {
        process.begin();
        let comm = process.comm("root");
        assert_eq!(process.free_memory(), 40 << 20);
        let info = process.root_info();
        assert_eq!(process.init(&info, 0).0, 3, "no memory for another one");
        process.ok(process.api.HcclCommDestroy(comm));
        assert_eq!(process.free_memory(), 100 << 20);
        process.ok(process.init(&info, 0).0);
    });
}

#[test]
fn communicators_that_are_not_destroyed_use_up_the_links() {
    processes(2, &[("HCCL_SIM_LINKS", "5")], |process| {
        process.begin();
        for round in 0..12 {
            let comm = process.comm(&format!("destroyed {round}"));
            process.ok(process.api.HcclCommDestroy(comm));
        }
        for round in 0..5 {
            process.comm(&format!("leaked {round}"));
        }
        assert_eq!(process.try_comm("too many").0, 6);
    });
}

#[test]
fn a_communicator_in_use_cannot_be_destroyed() {
    processes(1, &[("HCCL_SIM_LAZY", "1")], |process| {
        process.begin();
        let (api, comm, stream) = (&process.api, process.comm("root"), process.stream());
        let buffer = process.device(&[0; 64]);
        process.ok(api.HcclBroadcast(buffer, 64, UINT8, 0, comm, stream));
        assert_eq!(api.HcclCommDestroy(comm), 20);
        process.ok(wait(process, stream));
        process.ok(api.HcclCommDestroy(comm));
    });
}

const WHOLE: usize = 4 << 20;

/// A key as text with its end.
fn export(process: &Process, buffer: Pointer, flags: u64) -> Vec<u8> {
    let mut key = vec![1_u8; 65];
    let to = key.as_mut_ptr().cast();
    process.ok(process.api.aclrtIpcMemGetExportKey(buffer, WHOLE, to, 65, flags));
    assert!(key[..64].iter().all(u8::is_ascii_hexdigit) && key[64] == 0, "{key:?}");
    key
}

#[test]
fn memory_is_shared_by_a_key_and_closed_by_importers_first() {
    processes(2, &[("ASCEND_RT_VISIBLE_DEVICES", "0,0")], |process| {
        process.begin();
        let api = &process.api;
        let mut pid = 0;
        process.ok(api.aclrtDeviceGetBareTgid(&raw mut pid));
        assert_eq!(pid, std::process::id() as i32);
        if process.rank == 0 {
            let buffer = process.device(&vec![7; WHOLE]);
            let mut short = [0; 64];
            let key = short.as_mut_ptr();
            assert_eq!(api.aclrtIpcMemGetExportKey(buffer, WHOLE, key, 64, 0), 107000, "64 bytes");
            let mut long = [0; 65];
            let key = long.as_mut_ptr();
            let half = api.aclrtIpcMemGetExportKey(buffer, WHOLE / 2, key, 65, 0);
            assert_eq!(half, 107000, "not all of it");
            let part = process.device(&[0; 64]);
            assert_eq!(api.aclrtIpcMemGetExportKey(part, 64, key, 65, 0), 107000, "no pages");
            let key = export(process, buffer, 0);
            process.put("key", &key);
            let mut other = i32::from_le_bytes(process.get("pid").try_into().unwrap());
            process.get("denied");
            process.ok(api.aclrtIpcMemSetImportPid(key.as_ptr().cast(), &raw mut other, 1));
            process.put("allowed", &[]);
            process.get("written");
            assert_eq!(process.bytes(buffer, WHOLE), vec![8; WHOLE]);
            let close = || api.aclrtIpcMemClose(key.as_ptr().cast());
            assert_eq!(close(), 507022, "the importer has not closed it");
            assert_eq!(api.aclrtFree(buffer), 207002, "it is exported");
            process.put("close", &[]);
            process.get("closed");
            let deadline = Instant::now() + Duration::from_secs(10);
            while close() != 0 {
                assert!(Instant::now() < deadline, "{}", process.message());
                std::thread::sleep(Duration::from_millis(2));
            }
            process.ok(api.aclrtFree(buffer));
        } else {
            let key = process.get("key");
            process.put("pid", &pid.to_le_bytes());
            let mut shared = ptr::null_mut();
            let mut import = || api.aclrtIpcMemImportByKey(&raw mut shared, key.as_ptr().cast(), 0);
            assert_eq!(import(), 207006, "not on the list");
            process.put("denied", &[]);
            process.get("allowed");
            process.ok(import());
            assert_eq!(import(), 107000, "twice");
            assert_eq!(process.bytes(shared, WHOLE), vec![7; WHOLE]);
            process.ok(api.aclrtMemset(shared, WHOLE, 8, WHOLE));
            process.put("written", &[]);
            process.get("close");
            assert_eq!(api.aclrtFree(shared), 107000, "not allocated here");
            process.ok(api.aclrtIpcMemClose(key.as_ptr().cast()));
            assert_eq!(api.aclrtMemset(shared, WHOLE, 8, WHOLE), 507053, "closed");
            process.put("closed", &[]);
        }
    });
}

#[test]
fn a_key_without_a_list_is_for_everyone_but_its_maker_and_other_chips() {
    processes(2, &[], |process| {
        process.begin();
        let api = &process.api;
        let mut shared = ptr::null_mut();
        if process.rank == 0 {
            let key = export(process, process.device(&vec![7; WHOLE]), 1);
            let own = api.aclrtIpcMemImportByKey(&raw mut shared, key.as_ptr().cast(), 0);
            assert_eq!(own, 107000, "its own");
            process.put("key", &key);
        } else {
            let key = process.get("key");
            let mut import =
                |flags| api.aclrtIpcMemImportByKey(&raw mut shared, key.as_ptr().cast(), flags);
            assert_eq!(import(0), 107000, "of another chip");
            process.ok(import(1));
            assert_eq!(process.bytes(shared, WHOLE), vec![7; WHOLE]);
        }
        process.meet("end");
    });
}

#[test]
fn a_peer_killed_within_a_broadcast_is_noticed_by_the_timeout_only() {
    let variables = [("HCCL_EXEC_TIMEOUT", "12"), ("1:HCCL_SIM_KILL_AT", "2")];
    let outputs = outputs(3, &variables, |process| {
        process.begin();
        let (api, comm, stream) = (&process.api, process.comm("root"), process.stream());
        let buffer = process.device(&pattern(process.rank));
        let broadcast = || api.HcclBroadcast(buffer, LARGE as u64, UINT8, 0, comm, stream);
        process.ok(broadcast());
        process.ok(wait(process, stream));
        let start = Instant::now();
        process.ok(broadcast());
        let code = wait(process, stream);
        let mut error = 9;
        process.ok(api.HcclGetCommAsyncError(comm, &raw mut error));
        assert_eq!(error, 0, "this is no check of who lives");
        if process.rank == 0 {
            assert_eq!(code, 507048, "{}", process.message());
            assert!(start.elapsed() >= Duration::from_secs(3), "{:?}", start.elapsed());
        } else {
            process.ok(code);
        }
    });
    for (rank, output) in outputs.into_iter().enumerate() {
        let expected = (rank == 1).then_some(SIGKILL);
        let words = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), expected, "rank {rank}: {words}");
        assert_eq!(output.status.success(), rank != 1, "rank {rank}: {words}");
    }
}

#[test]
fn an_asynchronous_error_is_reported_by_its_communicator() {
    let variables = [("1:HCCL_SIM_ASYNC_ERROR_AT", "2"), ("HCCL_EXEC_TIMEOUT", "12")];
    processes(2, &variables, |process| {
        process.begin();
        let (api, comm, stream) = (&process.api, process.comm("root"), process.stream());
        let buffer = process.device(&[0; 64]);
        let failing = i32::from(process.rank == 1);
        for expected in [[0, 0], [507048, 507056]] {
            process.ok(api.HcclBroadcast(buffer, 64, UINT8, 0, comm, stream));
            assert_eq!(wait(process, stream), expected[process.rank as usize]);
        }
        let mut error = 9;
        process.ok(api.HcclGetCommAsyncError(comm, &raw mut error));
        assert_eq!(error, 21 * failing);
    });
}

#[test]
fn a_stream_that_is_aborted_ends_waits_with_107023() {
    processes(1, &[("HCCL_SIM_HANG_AT", "1")], |process| {
        process.begin();
        let api = &process.api;
        let (comm, stream) = (process.comm("root"), Sent(process.stream()));
        let buffer = process.device(&[0; 64]);
        process.ok(api.HcclBroadcast(buffer, 64, UINT8, 0, comm, stream.get()));
        assert_eq!(api.aclrtSynchronizeStreamWithTimeout(stream.get(), 100), 507046);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                process.ok(api.aclrtSetDevice(0));
                process.ok(api.aclrtStreamAbort(stream.get()));
            });
            assert_eq!(wait(process, stream.get()), 107023);
        });
        assert_eq!(api.aclrtMemsetAsync(buffer, 64, 0, 64, stream.get()), 107023, "it stays so");
        let deadline = Instant::now() + Duration::from_secs(10);
        while api.HcclCommDestroy(comm) == 20 {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(2));
        }
        process.ok(api.aclrtDestroyStream(stream.get()));
    });
}

#[test]
fn lazy_streams_and_the_other_profiles_move_the_same_bytes() {
    for (profile, lazy, machine) in
        [("split", "1", "one"), ("8.1", "1", "two"), ("8.1", "0", "three")]
    {
        if std::env::var("ROUND").is_ok_and(|own| own != machine) {
            continue; // In the process of another round.
        }
        let variables = [("profile", profile), ("HCCL_SIM_LAZY", lazy), ("ROUND", machine)];
        processes(3, &variables, |process| all_operations(process));
    }
}
