//! Placed updates between processes: some of them are killed or stopped while tensors are written.
//!
//! The cases run in the test's own process. Slow trainers, and ranks that are to be killed, are children that run the same test program,
//! with the name of the one test that becomes a rank in a child ([`be_a_child`]).

use std::ops::Range;
use std::process::Command;
use std::sync::{Arc, Once};
use std::time::Duration;

use control_plane::{Address, ControlPlane, join_group};
use engine_core::{
    Backend, CheckpointEngineConfig, DType, DeviceChoice, Devices, Encoding, Error, ErrorKind,
    Rank, Result, Role, SendReport, TensorBox, TensorMeta, TrainerEngine, Treatment, Version,
    Weight, ensure_async_iterator,
};
use futures::future::join;
use placed::{PlacedRollout, TensorState, Wanted};

use super::Lends;
use crate::hosts::Hosts;
use crate::processes::{LIMIT, Process, address, context, control, runtime, say};

const ROLE: &str = "CKPT_ENGINE_TEST_ROLE";
const ADDRESS: &str = "CKPT_ENGINE_TEST_ADDRESS";
const CONFIG: &str = "CKPT_ENGINE_TEST_CONFIG";
const SHAPE: [u64; 2] = [64, 1 << 16];
/// The version in which a slow trainer is slow.
const SLOW: u64 = 2;

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
    said: Once,
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
            self.said.call_once(|| say("writing"));
            std::thread::sleep(Duration::from_millis(20));
        }
        for (at, byte) in range.zip(destination) {
            *byte = value(self.version, at / SHAPE[1], at % SHAPE[1]);
        }
        Ok(())
    }
}

fn weights(version: u64, slow: bool) -> Vec<Weight> {
    let made = Made { version, slow: slow && version == SLOW, said: Once::new() };
    vec![Weight::encoded(meta(), Arc::new(made), Treatment::Plain).expect("a weight")]
}

/// A trainer, and its connection to the group.
type Trainer = (ControlPlane, Box<dyn TrainerEngine>);

/// A rollout, and its connection to the group.
type Rollout = (ControlPlane, PlacedRollout);

async fn trainer(lends: &Lends, address: Address, rank: u32, ranks: u32) -> Trainer {
    let plane = match rank {
        0 => ControlPlane::lead(control(address)).await,
        _ => ControlPlane::join(control(address), Role::Trainer, Some(Rank(rank))).await,
    };
    let plane = plane.expect("a control plane");
    let context = context(&plane, lends.config.clone());
    let prepared = lends.backend.prepare_trainer(context).await.expect("a trainer");
    let joined = join_group(prepared, lends.backend, &plane, Some(ranks), LIMIT).await;
    let (engine, _) = joined.expect("a group");
    (plane, engine)
}

async fn rollout(lends: &Lends, address: Address, rank: u32, ranks: u32) -> Rollout {
    let rank = Some(Rank(rank));
    let joined = ControlPlane::join(control(address), Role::Rollout, rank).await;
    let plane = joined.expect("the leader");
    // The right half of the columns.
    let half = TensorBox::new(&[0, SHAPE[1] / 2], &[SHAPE[0], SHAPE[1] / 2]).expect("a box");
    let wanted = Wanted::whole(meta()).part(half);
    let prepared = (lends.lend)(context(&plane, lends.of_rollouts()), vec![wanted]);
    let prepared = prepared.expect("memory");
    let joined = join_group(prepared, lends.backend, &plane, Some(ranks), LIMIT).await;
    let (engine, _) = joined.expect("a group");
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
    assert_eq!(read.expect("a version"), Version(version));
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

/// Makes an update that must succeed for a trainer and a rollout of this process, and looks at every byte.
async fn works(leads: &mut Trainer, lent: &mut Rollout, version: u64) -> SendReport {
    let (sent, taken) = join(send(&mut *leads.1, version), take(&mut lent.1)).await;
    let report = sent.expect("an update");
    assert_eq!(taken.expect("an update"), Version(version));
    check(&lent.1, version);
    report
}

/// Makes an update that must fail. Returns the errors of the trainer and of the rollout.
async fn fails(leads: &mut Trainer, lent: &mut Rollout, version: u64) -> [Error; 2] {
    let (sent, taken) = join(send(&mut *leads.1, version), take(&mut lent.1)).await;
    has_none(&lent.1, SLOW);
    [sent.expect_err("no update"), taken.expect_err("no update")]
}

/// Waits for a line from the process that started this one. Ends this one if that is gone.
fn wait_for_a_line() {
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line).is_ok_and(|bytes| bytes == 0) {
        std::process::exit(0);
    }
}

/// Runs a child process's rank: it says on standard output what becomes of every update. One that is `told` waits for a line before each.
/// Does nothing in a process that is not a child.
///
/// # Panics
///
/// If the group does not form.
pub fn be_a_child(lends: &Lends) {
    let Ok(role) = std::env::var(ROLE) else { return };
    crate::log();
    let told = |name| std::env::var(name).expect("what a child is told");
    let address: Address = told(ADDRESS).parse().expect("an address");
    let config: CheckpointEngineConfig =
        serde_json::from_str(&told(CONFIG)).expect("a configuration");
    let lends = Lends { config, ..lends.clone() };
    let parts: Vec<&str> = role.split(' ').collect();
    let number = |at: usize| parts[at].parse::<u32>().expect("a number");
    let (rank, ranks, is_told) = (number(1), number(2), parts.get(3) == Some(&"told"));
    runtime().block_on(async {
        if parts[0] == "trainer" {
            let (_plane, mut engine) = trainer(&lends, address, rank, ranks).await;
            for version in 1.. {
                if is_told {
                    wait_for_a_line();
                }
                // Of several that are told, the leader is not slow.
                let slow = rank > 0 || !is_told;
                let weights = ensure_async_iterator(weights(version, slow));
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
            let (_plane, mut engine) = rollout(&lends, address, rank, ranks).await;
            loop {
                if is_told {
                    wait_for_a_line();
                }
                // Nothing has arrived since.
                if let TensorState::Active(version) = *engine.state() {
                    check(&engine, version.0);
                }
                match engine.update(None).await {
                    Ok(report) => {
                        check(&engine, report.version.0);
                        say(&format!("active {}", report.version));
                    }
                    Err(error) if error.kind() == ErrorKind::Timeout => {}
                    Err(error) => say(&format!("failed {:?}", error.kind())),
                }
            }
        }
    });
}

fn start(lends: &Lends, role: &str, address: &Address) -> Process {
    start_with(Process::program(), lends, role, address)
}

fn start_with(mut program: Command, lends: &Lends, role: &str, address: &Address) -> Process {
    let config = serde_json::to_string(&lends.config).expect("a configuration");
    program.env(ROLE, role).env(ADDRESS, address.to_string()).env(CONFIG, config);
    Process::start(program)
}

/// The next thing that a process says is that its update has failed.
fn says_failed(process: &Process) {
    let line = process.next_line();
    assert!(line.starts_with("failed"), "{line:?}");
}

fn signal(signal: &str, process: &Process) {
    let pid = process.id().to_string();
    let sent = Command::new("kill").args([signal, &pid]).status();
    assert!(sent.is_ok_and(|status| status.success()));
}

/// A trainer and a rollout here, and a slow trainer in a process of its own, that have had an update.
async fn with_slow_trainer(lends: &Lends) -> (Trainer, Rollout, Process) {
    let address = address();
    let slow = start(lends, "trainer 1 3", &address);
    let both = join(trainer(lends, address.clone(), 0, 3), rollout(lends, address, 2, 3)).await;
    let (mut leads, mut lent) = both;
    works(&mut leads, &mut lent, 1).await;
    slow.says("sent 1");
    (leads, lent, slow)
}

/// Makes the update in which a process is slow. As soon as it writes, something happens.
async fn fails_as_it_writes(
    leads: &mut Trainer,
    lent: &mut Rollout,
    slow: Process,
    happens: impl FnOnce(&mut Process) + Send + 'static,
) -> ([Error; 2], Process) {
    let happening = std::thread::spawn(move || {
        let mut slow = slow;
        slow.says("writing");
        happens(&mut slow);
        slow
    });
    let errors = fails(leads, lent, SLOW).await;
    (errors, happening.join().expect("what happens"))
}

/// The same, in which the slow trainer is stopped. All errors name it.
async fn is_stopped_as_it_writes(lends: &Lends) -> (Trainer, Rollout, Process) {
    let (mut leads, mut lent, slow) = with_slow_trainer(lends).await;
    let stop = |slow: &mut Process| signal("-STOP", slow);
    let (errors, slow) = fails_as_it_writes(&mut leads, &mut lent, slow, stop).await;
    for error in errors {
        assert_eq!(error.report().rank, Some(Rank(1)), "{error}");
    }
    (leads, lent, slow)
}

fn is_named(error: &Error, kind: ErrorKind, rank: u32) {
    assert_eq!((error.kind(), error.report().rank), (kind, Some(Rank(rank))), "{error}");
}

fn has_none(rollout: &PlacedRollout, version: u64) {
    let TensorState::Updating { version: of, failed: Some(_) } = rollout.state() else {
        panic!("{:?}", rollout.state())
    };
    assert_eq!(*of, Version(version));
    assert_eq!(rollout.read(|_| Ok(())).expect_err("no version").kind(), ErrorKind::State);
}

/// # Panics
///
/// If it does not hold.
pub fn a_trainer_that_is_killed_while_it_writes_is_named_and_the_next_update_makes_tensors_whole(
    lends: &Lends,
) {
    runtime().block_on(async {
        let (mut leads, mut lent, slow) = with_slow_trainer(lends).await;
        let (errors, _) = fails_as_it_writes(&mut leads, &mut lent, slow, Process::kill).await;
        errors.iter().for_each(|error| is_named(error, ErrorKind::PeerLost, 1));
        assert_eq!(works(&mut leads, &mut lent, 3).await.absent, [Rank(1)]);
    });
}

/// For transports that cannot keep a trainer which is still there from writing.
///
/// # Panics
///
/// If it does not hold.
pub fn a_trainer_that_is_stopped_while_it_writes_keeps_updates_from_succeeding_until_it_has_let_go(
    lends: &Lends,
) {
    runtime().block_on(async {
        let (mut leads, mut lent, slow) = is_stopped_as_it_writes(lends).await;
        // It may go on at any time, and then write what it was about to.
        let [error, taken] = fails(&mut leads, &mut lent, 3).await;
        is_named(&error, ErrorKind::Timeout, 2);
        assert!(error.to_string().contains("may still write"), "{error}");
        assert_eq!(taken.kind(), ErrorKind::Timeout);

        signal("-CONT", &slow);
        says_failed(&slow);
        works(&mut leads, &mut lent, 4).await;
        tokio::time::sleep(Duration::from_millis(700)).await;
        check(&lent.1, 4);
    });
}

/// For transports that end a trainer's connections: then updates succeed while it is stopped, and what it goes on to write when it
/// continues does not arrive.
///
/// # Panics
///
/// If it does not hold.
pub fn a_trainer_that_is_stopped_while_it_writes_is_cut_off_and_writes_nothing_when_it_continues(
    lends: &Lends,
) {
    runtime().block_on(async {
        let (mut leads, mut lent, slow) = is_stopped_as_it_writes(lends).await;
        assert_eq!(works(&mut leads, &mut lent, 3).await.absent, [Rank(1)]);
        signal("-CONT", &slow);
        says_failed(&slow);
        for _ in 0..7 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            check(&lent.1, 3);
        }
        works(&mut leads, &mut lent, 4).await;
    });
}

/// # Panics
///
/// If it does not hold.
pub fn a_rollout_that_is_killed_while_it_is_written_is_named_and_the_others_are_updated_without_it(
    lends: &Lends,
) {
    runtime().block_on(async {
        let address = address();
        let slow = start(lends, "trainer 1 4", &address);
        let mut victim = start(lends, "rollout 3 4", &address);
        let both = join(trainer(lends, address.clone(), 0, 4), rollout(lends, address, 2, 4)).await;
        let (mut leads, mut lent) = both;
        assert_eq!(works(&mut leads, &mut lent, 1).await.receivers.len(), 2);
        victim.says("active 1");
        slow.says("sent 1");
        let kill = move |_: &mut Process| victim.kill();
        let (errors, _slow) = fails_as_it_writes(&mut leads, &mut lent, slow, kill).await;
        for error in errors {
            // The first to see it may be a write.
            let is_one = matches!(error.kind(), ErrorKind::PeerLost | ErrorKind::Io);
            assert!(is_one && error.report().rank == Some(Rank(3)), "{error}");
        }
        assert_eq!(works(&mut leads, &mut lent, 3).await.absent, [Rank(3)]);
    });
}

/// # Panics
///
/// If it does not hold.
pub fn a_leader_that_is_killed_while_tensors_are_written_is_an_error_on_the_rollout_which_has_no_version(
    lends: &Lends,
) {
    runtime().block_on(async {
        let address = address();
        let mut leader = start(lends, "trainer 0 2", &address);
        let (_plane, mut tensors) = rollout(lends, address, 1, 2).await;
        assert_eq!(take(&mut tensors).await.expect("an update"), Version(1));
        let killer = std::thread::spawn(move || {
            leader.says("sent 1");
            leader.says("writing");
            leader.kill();
        });
        let error = take(&mut tensors).await.expect_err("no leader");
        killer.join().expect("its end");
        is_named(&error, ErrorKind::PeerLost, 0);
        has_none(&tensors, SLOW);
    });
}

/// # Panics
///
/// If it does not hold.
pub fn a_rollout_that_joins_later_is_in_the_next_update_and_one_that_leaves_in_none(lends: &Lends) {
    runtime().block_on(async {
        let address = address();
        let both =
            join(trainer(lends, address.clone(), 0, 2), rollout(lends, address.clone(), 1, 2));
        let (mut leads, mut first) = both.await;
        assert_eq!(works(&mut leads, &mut first, 1).await.receivers.len(), 1);
        let (_second, mut other) = rollout(lends, address, 2, 2).await;
        let both = join(works(&mut leads, &mut first, 2), take(&mut other)).await;
        assert_eq!(both.0.receivers.len(), 2);
        assert_eq!(both.1.expect("an update"), Version(2));
        check(&other, 2);
        let (plane, one) = first;
        one.finalize().await.expect("an end");
        plane.close().await.expect("an end");
        let mut second = (_second, other);
        assert_eq!(works(&mut leads, &mut second, 3).await.absent, [Rank(1)]);
    });
}

/// Two trainers, of which the second is slow, and two rollouts, each on a host. They have had an update.
struct OnHosts {
    hosts: Hosts,
    ranks: Vec<Process>,
}

impl OnHosts {
    fn form(lends: &Lends, port: u16) -> Self {
        let hosts = Hosts::new(4);
        let address: Address = format!("{}:{port}", hosts.address(0)).parse().expect("an address");
        let start = |rank: usize| {
            let mut program = hosts.command(rank);
            program.arg(std::env::current_exe().expect("this program"));
            // The engine finds the interface that leads to the others.
            program.env_remove("UCX_NET_DEVICES");
            let role = if rank < 2 { "trainer" } else { "rollout" };
            start_with(program, lends, &format!("{role} {rank} 4 told"), &address)
        };
        let ranks = (0..4).map(start).collect();
        let mut this = Self { hosts, ranks };
        this.works(&[0, 1, 2, 3], 1);
        this
    }

    /// Lets ranks take part in the next update, which must succeed.
    fn works(&mut self, ranks: &[usize], version: u64) {
        ranks.iter().for_each(|rank| self.ranks[*rank].tell(""));
        for &rank in ranks {
            let done = if rank < 2 { "sent" } else { "active" };
            assert_eq!(self.ranks[rank].next_line(), format!("{done} {version}"), "rank {rank}");
        }
    }

    /// The update in which one is slow, in the middle of which the link of a rank is cut. It must fail on all others.
    fn fails_as_a_link_is_cut(&mut self, cut: u32) {
        self.ranks.iter_mut().for_each(|rank| rank.tell(""));
        self.ranks[1].says("writing");
        self.hosts.link(cut, "down");
        for (_, rank) in (0..).zip(&self.ranks).filter(|(rank, _)| *rank != cut) {
            says_failed(rank);
        }
    }
}

/// Makes network namespaces, which takes root and iproute2.
///
/// # Panics
///
/// If it does not hold.
pub fn a_trainer_that_is_cut_off_while_it_writes_is_left_out_and_nothing_of_it_arrives_later(
    lends: &Lends,
) {
    let mut group = OnHosts::form(lends, 18_775);
    group.fails_as_a_link_is_cut(1);
    group.works(&[0, 2, 3], 3);
    group.hosts.link(1, "up");
    says_failed(&group.ranks[1]);
    // What it had sent is tried again until it arrives.
    std::thread::sleep(Duration::from_secs(3));
    group.works(&[0, 2, 3], 4);
}

/// As above.
///
/// # Panics
///
/// If it does not hold.
pub fn a_rollout_that_is_cut_off_while_it_is_written_is_left_out_and_the_others_are_updated(
    lends: &Lends,
) {
    let mut group = OnHosts::form(lends, 18_776);
    group.fails_as_a_link_is_cut(3);
    for version in 3..5 {
        group.works(&[0, 1, 2], version);
    }
}

/// The same configuration with buckets in host memory if the transport does not bring its own: nobody has registered another kind.
fn on_the_host(
    backend: &dyn Backend,
    mut config: CheckpointEngineConfig,
) -> CheckpointEngineConfig {
    if !matches!(backend.devices(), Devices::Kinds(_)) {
        config.device = DeviceChoice::default();
    }
    config
}

/// # Panics
///
/// If it does not hold.
pub fn ranks_of_placed_updates_and_others_do_not_form_a_group(lends: &Lends) {
    runtime().block_on(async {
        let (address, backend) = (address(), lends.backend);
        let refused = async {
            let joined = ControlPlane::join(control(address.clone()), Role::Rollout, None).await;
            let plane = joined.expect("the leader");
            let config = on_the_host(backend, lends.of_rollouts());
            let prepared = backend.prepare_rollout(context(&plane, config)).await;
            let joined =
                join_group(prepared.expect("a rollout"), backend, &plane, Some(2), LIMIT).await;
            joined.map(|_| ()).expect_err("no group")
        };
        let leads = async {
            let leads = ControlPlane::lead(control(address.clone())).await;
            let plane = leads.expect("a free address");
            let config = on_the_host(backend, lends.config.clone());
            let prepared = backend.prepare_trainer(context(&plane, config)).await;
            let joined =
                join_group(prepared.expect("a trainer"), backend, &plane, Some(2), LIMIT).await;
            (joined.map(|_| ()).expect_err("no group"), plane)
        };
        let (one, (other, _plane)) = join(refused, leads).await;
        is_named(&one, ErrorKind::Mismatch, 1);
        is_named(&other, ErrorKind::Mismatch, 1);
        let leads = ControlPlane::lead(control(crate::processes::address())).await;
        let plane = leads.expect("a free address");
        let prepared = backend.prepare_rollout(context(&plane, lends.config.clone())).await;
        let error = prepared.expect_err("a rollout that says nothing of what it wants");
        assert!(error.to_string().contains("`lend`"), "{error}");
    });
}
