//! Placed updates between processes: some of them are killed or stopped while tensors are written.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unsafe_code, reason = "shared memory of a program's own")]

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use backend_ipc::{BACKEND, LentTensor, lend, lend_tensors};
use bytes::Bytes;
use conformance::placed::Lends;
use conformance::processes::{LIMIT, Process, address, context, control, runtime, say};
use control_plane::{Address, ControlPlane, join_group};
use engine_core::{
    CheckpointEngineConfig, DType, Encoding, EngineContext, Error, ErrorKind, Rank, Result, Role,
    SendReport, Storage, TensorBox, TensorMeta, TrainerEngine, Treatment, Version, Weight,
    ensure_async_iterator,
};
use futures::future::join;
use placed::{PlacedRollout, TensorState, Wanted};
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

const ROLE: &str = "CKPT_ENGINE_TEST_ROLE";
const ADDRESS: &str = "CKPT_ENGINE_TEST_ADDRESS";
/// Where rollouts' tensors are, in this process and in those that it starts; in host memory without it.
const DEVICE: &str = "CKPT_ENGINE_TEST_DEVICE";
const SHAPE: [u64; 2] = [64, 1 << 16];
/// The version in which a slow trainer is slow.
const SLOW: u64 = 2;

fn config(placed: bool) -> CheckpointEngineConfig {
    let mut config = CheckpointEngineConfig::new("ipc");
    config.timeout_seconds = 8.0;
    config.threads = std::num::NonZeroUsize::new(1);
    if let Ok(device) = std::env::var(DEVICE) {
        config.device = device.parse().unwrap();
    }
    if placed {
        config.engine_kwargs.entry("ipc".into()).or_default().insert("placed".into(), true.into());
    }
    config
}

fn meta() -> TensorMeta {
    TensorMeta::new("w", DType::U8, SHAPE)
}

fn value(version: u64, row: u64, col: u64) -> u8 {
    (version * 31 + row * 7 + col) as u8
}

/// The tensor of a version, made as it is read; a slow one says when it is read first, and takes its time.
#[derive(Debug)]
struct Made {
    version: u64,
    slow: bool,
}

impl Encoding for Made {
    fn name(&self) -> &'static str {
        "made"
    }

    fn source_bytes(&self) -> u64 {
        SHAPE[0] * SHAPE[1]
    }

    fn encode_host(&self, range: Range<u64>, destination: &mut [u8]) -> Result<()> {
        if self.slow {
            say("writing");
            std::thread::sleep(Duration::from_millis(20));
        }
        for (at, byte) in range.zip(destination) {
            *byte = value(self.version, at / SHAPE[1], at % SHAPE[1]);
        }
        Ok(())
    }
}

fn weights(version: u64, slow: bool) -> Vec<Weight> {
    let made = Arc::new(Made { version, slow: slow && version == SLOW });
    vec![Weight::encoded(meta(), made, Treatment::Plain).unwrap()]
}

async fn trainer(
    address: Address,
    rank: u32,
    ranks: u32,
) -> (ControlPlane, Box<dyn TrainerEngine>) {
    let plane = match rank {
        0 => ControlPlane::lead(control(address)).await.unwrap(),
        _ => ControlPlane::join(control(address), Role::Trainer, Some(Rank(rank))).await.unwrap(),
    };
    let prepared = BACKEND.prepare_trainer(context(&plane, config(true))).await.unwrap();
    let (engine, _) = join_group(prepared, BACKEND, &plane, Some(ranks), LIMIT).await.unwrap();
    (plane, engine)
}

async fn rollout(address: Address, rank: u32, ranks: u32) -> (ControlPlane, PlacedRollout) {
    let rank = Some(Rank(rank));
    let plane = ControlPlane::join(control(address), Role::Rollout, rank).await.unwrap();
    // The right half of the columns.
    let half = TensorBox::new(&[0, SHAPE[1] / 2], &[SHAPE[0], SHAPE[1] / 2]).unwrap();
    let wanted = Wanted::whole(meta()).part(half);
    let prepared = lend(context(&plane, config(false)), [wanted]).unwrap();
    let (engine, _) = join_group(prepared, BACKEND, &plane, Some(ranks), LIMIT).await.unwrap();
    (plane, engine)
}

/// Whether every byte that a rollout has is that of a version.
fn check(rollout: &PlacedRollout, version: u64) {
    let read = rollout.read(|tensor| {
        for (at, byte) in (0..).zip(&*tensor.bytes()?) {
            let (row, col) = (at / (SHAPE[1] / 2), at % (SHAPE[1] / 2) + SHAPE[1] / 2);
            assert_eq!(*byte, value(version, row, col), "row {row}, column {col}");
        }
        Ok(())
    });
    assert_eq!(read.unwrap(), Version(version));
}

async fn send(engine: &mut dyn TrainerEngine, version: u64) -> Result<SendReport> {
    let sent =
        engine.send_weights(ensure_async_iterator(weights(version, false)), Version(version));
    tokio::time::timeout(LIMIT, sent).await.expect("no hang")
}

async fn take(engine: &mut PlacedRollout) -> Result<Version> {
    let taken = tokio::time::timeout(LIMIT, engine.update(None)).await.expect("no hang");
    taken.map(|report| report.version)
}

/// What a child process does; nothing when this file's tests are run.
#[test]
fn a_process_of_a_group() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let address: Address = std::env::var(ADDRESS).unwrap().parse().unwrap();
    let parts: Vec<&str> = role.split(' ').collect();
    let (rank, ranks) = (parts[1].parse().unwrap(), parts[2].parse().unwrap());
    runtime().block_on(async {
        if parts[0] == "trainer" {
            let (_plane, mut engine) = trainer(address, rank, ranks).await;
            for version in 1.. {
                let weights = ensure_async_iterator(weights(version, true));
                match engine.send_weights(weights, Version(version)).await {
                    Ok(_) => say(&format!("sent {version}")),
                    Err(error) => {
                        say(&format!("failed {:?}", error.kind()));
                        if error.says_trainer_is_gone() {
                            // It lives on, with all that it has open.
                            return std::future::pending().await;
                        }
                    }
                }
            }
        } else {
            let (_plane, mut engine) = rollout(address, rank, ranks).await;
            loop {
                match engine.update(None).await {
                    Ok(report) => say(&format!("active {}", report.version)),
                    Err(error) if error.kind() == ErrorKind::Timeout => {}
                    Err(error) => say(&format!("failed {:?}", error.kind())),
                }
            }
        }
    });
}

fn start(role: &str, address: &Address) -> Process {
    let mut program = Process::program();
    program.env(ROLE, role).env(ADDRESS, address.to_string());
    Process::start(program)
}

/// The next thing that a process says beside that it writes is that its update has failed.
fn says_failed(process: &Process) {
    let line = (0..100).map(|_| process.next_line()).find(|line| line != "writing");
    assert!(line.as_ref().is_some_and(|line| line.starts_with("failed")), "{line:?}");
}

fn signal(signal: &str, process: &Process) {
    let pid = process.id().to_string();
    assert!(std::process::Command::new("kill").args([signal, &pid]).status().unwrap().success());
}

/// A trainer and a rollout here, and a slow trainer in a process of its own, that have had an update.
async fn with_slow_trainer()
-> (ControlPlane, Box<dyn TrainerEngine>, ControlPlane, PlacedRollout, Process) {
    let address = address();
    let slow = start("trainer 1 3", &address);
    let both = join(trainer(address.clone(), 0, 3), rollout(address, 2, 3)).await;
    let ((plane, mut engine), (other, mut tensors)) = both;
    let (sent, taken) = join(send(&mut *engine, 1), take(&mut tensors)).await;
    assert_eq!((sent.unwrap().version, taken.unwrap()), (Version(1), Version(1)));
    slow.says("sent 1");
    check(&tensors, 1);
    (plane, engine, other, tensors, slow)
}

fn is_named(error: &Error, kind: ErrorKind, rank: u32) {
    assert_eq!((error.kind(), error.report().rank), (kind, Some(Rank(rank))), "{error}");
}

fn has_none(rollout: &PlacedRollout, version: u64) {
    let TensorState::Updating { version: of, failed: Some(_) } = rollout.state() else {
        panic!("{:?}", rollout.state())
    };
    assert_eq!(*of, Version(version));
    assert_eq!(rollout.read(|_| Ok(())).unwrap_err().kind(), ErrorKind::State);
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

/// Lends tensors that are in two files, neither in order nor one directly behind the other.
fn lend_own(
    context: EngineContext,
    wanted: Vec<Wanted>,
) -> Result<engine_core::Prepared<PlacedRollout>> {
    let sizes: Vec<(u64, u64)> =
        wanted.iter().map(|wanted| wanted.validate()).collect::<Result<_>>()?;
    let all: u64 = sizes.iter().map(|(elements, scales)| elements + scales + 64).sum();
    let files = [shared(all + 4096), shared(all + 4096)];
    let mut ends = files.each_ref().map(Storage::len);
    let mut room = |number: usize, bytes: u64| {
        let end = &mut ends[number % 2];
        // As a view of another tensor may begin: at a whole element, and nothing more.
        *end = (*end - bytes) / 8 * 8 - 12;
        files[number % 2].slice(*end..*end + bytes)
    };
    let tensors = wanted.into_iter().zip(sizes).enumerate();
    let tensors = tensors.map(|(number, (wanted, (elements, scales)))| {
        let (elements, scales) = (room(number, elements), room(number + 1, scales));
        // SAFETY: it is shared memory that only this tensor has.
        unsafe { LentTensor::new(wanted, elements, Some(scales)) }
    });
    lend_tensors(context, tensors.collect::<Result<Vec<_>>>()?)
}

macro_rules! cases {
    ($name:ident, $lend:expr) => {
        mod $name {
            use super::*;

            fn lends() -> Lends {
                let mut config = config(true);
                config.threads = std::num::NonZeroUsize::new(2);
                Lends { backend: BACKEND, config, lend: $lend, put: Ok }
            }

            #[test]
            fn every_box_is_bit_for_bit_that_of_the_unsharded_tensor() {
                conformance::placed::every_box_is_bit_for_bit_that_of_the_unsharded_tensor(
                    &lends(),
                );
            }

            #[test]
            fn what_nobody_holds_is_named_and_leaves_the_version_that_is_there() {
                conformance::placed::what_nobody_holds_is_named_and_leaves_the_version_that_is_there(
                    &lends(),
                );
            }

            #[test]
            fn a_call_that_is_given_up_ends_the_update_everywhere_and_the_next_one_works() {
                conformance::placed::a_call_that_is_given_up_ends_the_update_everywhere_and_the_next_one_works(
                    &lends(),
                );
            }
        }
    };
}

cases!(memory_of_the_transport, |context, wanted| lend(context, wanted));
cases!(tensors_of_the_program, lend_own);

#[test]
fn tensors_that_no_other_process_can_write_to_or_that_share_memory_are_refused_by_name() {
    runtime().block_on(async {
        let plane = ControlPlane::lead(control(address())).await.unwrap();
        let lends = |tensors: [(&str, Storage); 2]| {
            let tensors = tensors.map(|(name, bytes)| {
                let wanted = Wanted::whole(TensorMeta::new(name, DType::U8, [bytes.len()]));
                // SAFETY: nothing is written: it is refused.
                unsafe { LentTensor::new(wanted, bytes, None) }.unwrap()
            });
            lend_tensors(context(&plane, config(true)), tensors).map(drop)
        };
        let refused = |tensors, words: &str| {
            let error = lends(tensors).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Weight, "{error}");
            assert_eq!(error.report().tensor.as_deref(), Some("second"), "{error}");
            assert!(error.to_string().contains(words), "{error}");
        };
        let whole = shared(8192);
        refused([("first", whole.clone()), ("second", vec![0; 64].into())], "not shared");
        refused([("first", whole.slice(0..100)), ("second", whole.slice(99..200))], "overlaps");
        lends([("first", whole.slice(0..100)), ("second", whole.slice(100..200))]).unwrap();
        let wanted = Wanted::whole(TensorMeta::new("short", DType::F32, [4]));
        // SAFETY: it is refused.
        let error = unsafe { LentTensor::new(wanted, whole.slice(0..12), None) }.unwrap_err();
        assert_eq!(error.report().tensor.as_deref(), Some("short"), "{error}");
    });
}

#[test]
fn a_trainer_that_is_killed_while_it_writes_is_named_and_the_next_update_makes_tensors_whole() {
    runtime().block_on(async {
        let (_plane, mut engine, _other, mut tensors, mut slow) = with_slow_trainer().await;
        let killer = std::thread::spawn(move || {
            slow.says("writing");
            slow.kill();
        });
        let (sent, taken) = join(send(&mut *engine, 2), take(&mut tensors)).await;
        killer.join().unwrap();
        is_named(&sent.unwrap_err(), ErrorKind::PeerLost, 1);
        is_named(&taken.unwrap_err(), ErrorKind::PeerLost, 1);
        has_none(&tensors, 2);
        let (sent, taken) = join(send(&mut *engine, 3), take(&mut tensors)).await;
        assert_eq!(sent.unwrap().absent, [Rank(1)]);
        taken.unwrap();
        check(&tensors, 3);
    });
}

#[test]
fn a_trainer_that_is_stopped_while_it_writes_keeps_updates_from_succeeding_until_it_has_let_go() {
    runtime().block_on(async {
        let (_plane, mut engine, _other, mut tensors, slow) = with_slow_trainer().await;
        let stopper = std::thread::spawn(move || {
            slow.says("writing");
            signal("-STOP", &slow);
            slow
        });
        let (sent, taken) = join(send(&mut *engine, 2), take(&mut tensors)).await;
        let slow = stopper.join().unwrap();
        for error in [sent.unwrap_err(), taken.unwrap_err()] {
            assert_eq!(error.report().rank, Some(Rank(1)), "{error}");
        }
        // It may go on at any time, and then write what it was about to.
        let (sent, taken) = join(send(&mut *engine, 3), take(&mut tensors)).await;
        let error = sent.unwrap_err();
        is_named(&error, ErrorKind::Timeout, 2);
        assert!(error.to_string().contains("may still write"), "{error}");
        assert_eq!(taken.unwrap_err().kind(), ErrorKind::Timeout);
        has_none(&tensors, 2);

        signal("-CONT", &slow);
        says_failed(&slow);
        let (sent, taken) = join(send(&mut *engine, 4), take(&mut tensors)).await;
        sent.unwrap();
        taken.unwrap();
        check(&tensors, 4);
        tokio::time::sleep(Duration::from_millis(700)).await;
        check(&tensors, 4);
    });
}

#[test]
fn a_rollout_that_is_killed_while_it_is_written_is_named_and_the_others_are_updated_without_it() {
    runtime().block_on(async {
        let address = address();
        let slow = start("trainer 1 4", &address);
        let mut victim = start("rollout 3 4", &address);
        let both = join(trainer(address.clone(), 0, 4), rollout(address, 2, 4)).await;
        let ((_plane, mut engine), (_other, mut tensors)) = both;
        let (sent, taken) = join(send(&mut *engine, 1), take(&mut tensors)).await;
        assert_eq!(sent.unwrap().receivers.len(), 2);
        taken.unwrap();
        victim.says("active 1");
        slow.says("sent 1");
        let killer = std::thread::spawn(move || {
            slow.says("writing");
            victim.kill();
            slow
        });
        let (sent, taken) = join(send(&mut *engine, 2), take(&mut tensors)).await;
        is_named(&sent.unwrap_err(), ErrorKind::PeerLost, 3);
        is_named(&taken.unwrap_err(), ErrorKind::PeerLost, 3);
        has_none(&tensors, 2);
        let _slow = killer.join().unwrap();
        let (sent, taken) = join(send(&mut *engine, 3), take(&mut tensors)).await;
        assert_eq!(sent.unwrap().absent, [Rank(3)]);
        taken.unwrap();
        check(&tensors, 3);
    });
}

#[test]
fn a_leader_that_is_killed_while_tensors_are_written_is_an_error_on_the_rollout_which_has_no_version()
 {
    runtime().block_on(async {
        let address = address();
        let mut leader = start("trainer 0 2", &address);
        let (_plane, mut tensors) = rollout(address, 1, 2).await;
        assert_eq!(take(&mut tensors).await.unwrap(), Version(1));
        let killer = std::thread::spawn(move || {
            leader.says("sent 1");
            leader.says("writing");
            leader.kill();
        });
        let error = take(&mut tensors).await.unwrap_err();
        killer.join().unwrap();
        is_named(&error, ErrorKind::PeerLost, 0);
        has_none(&tensors, 2);
    });
}

#[test]
fn a_rollout_that_joins_later_is_in_the_next_update_and_one_that_leaves_in_none() {
    runtime().block_on(async {
        let address = address();
        let both = join(trainer(address.clone(), 0, 2), rollout(address.clone(), 1, 2)).await;
        let ((_plane, mut engine), (first, mut one)) = both;
        let (sent, taken) = join(send(&mut *engine, 1), take(&mut one)).await;
        assert_eq!((sent.unwrap().receivers.len(), taken.unwrap()), (1, Version(1)));
        let (_second, mut other) = rollout(address, 2, 2).await;
        let (sent, (one_took, other_took)) =
            join(send(&mut *engine, 2), join(take(&mut one), take(&mut other))).await;
        assert_eq!(sent.unwrap().receivers.len(), 2);
        assert_eq!((one_took.unwrap(), other_took.unwrap()), (Version(2), Version(2)));
        check(&one, 2);
        check(&other, 2);
        one.finalize().await.unwrap();
        first.close().await.unwrap();
        let (sent, taken) = join(send(&mut *engine, 3), take(&mut other)).await;
        assert_eq!((sent.unwrap().absent, taken.unwrap()), (vec![Rank(1)], Version(3)));
        check(&other, 3);
    });
}

#[test]
fn ranks_of_placed_updates_and_others_do_not_form_a_group() {
    runtime().block_on(async {
        let address = address();
        let refused = async {
            let plane =
                ControlPlane::join(control(address.clone()), Role::Rollout, None).await.unwrap();
            let prepared = BACKEND.prepare_rollout(context(&plane, config(false))).await.unwrap();
            let joined = join_group(prepared, BACKEND, &plane, Some(2), LIMIT).await;
            joined.map(|_| ()).unwrap_err()
        };
        let leads = async {
            let plane = ControlPlane::lead(control(address.clone())).await.unwrap();
            let prepared = BACKEND.prepare_trainer(context(&plane, config(true))).await.unwrap();
            let joined = join_group(prepared, BACKEND, &plane, Some(2), LIMIT).await;
            (joined.map(|_| ()).unwrap_err(), plane)
        };
        let (one, (other, _plane)) = join(refused, leads).await;
        is_named(&one, ErrorKind::Mismatch, 1);
        is_named(&other, ErrorKind::Mismatch, 1);
        let plane = ControlPlane::lead(control(conformance::processes::address())).await.unwrap();
        let error = BACKEND.prepare_rollout(context(&plane, config(true))).await.unwrap_err();
        assert!(error.to_string().contains("`lend`"), "{error}");
    });
}
