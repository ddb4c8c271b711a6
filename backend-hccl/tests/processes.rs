//! Groups whose ranks are processes with simulated NPUs, in which things go wrong: every failure is a typed
//! error that names a rank, and the bucket if one was on its way; the next update works; and in the end, no
//! process holds anything of the libraries any more.
//!
//! The NPUs have room for one group's communicator, and links for no more than one: a communicator that
//! was left behind would make the next update fail.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::TcpListener;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use backend_hccl::BACKEND;
use conformance::processes::{
    self, Process, WEIGHTS, address, context, control, model, receivers, runtime, say, value,
};
use control_plane::{Address, ControlPlane};
use engine_core::{
    CheckpointEngineConfig, Error, ErrorKind, Rank, Result, Role, RolloutEngine, Version, Weight,
    ensure_async_iterator,
};
use hccl_sim::Profile;

const ROLE: &str = "CKPT_ENGINE_TEST_ROLE";
const ADDRESS: &str = "CKPT_ENGINE_TEST_ADDRESS";
const RANK: &str = "CKPT_ENGINE_TEST_RANK";
const DEVICE: &str = "CKPT_ENGINE_TEST_DEVICE";
const REBUILD: &str = "CKPT_ENGINE_TEST_REBUILD";
/// Another size of buckets.
const BUCKET: &str = "CKPT_ENGINE_TEST_BUCKET";
/// A rollout that has the first tensor says so, and goes on when it is told to.
const HOLD: &str = "CKPT_ENGINE_TEST_HOLD";
/// A rollout that keeps the last tensor of its last update.
const KEEP: &str = "CKPT_ENGINE_TEST_KEEP";
const LIBRARIES: &str = "CKPT_ENGINE_HCCL_DIR";
/// The ranks of a group at its beginning: a trainer and two rollouts.
const RANKS: u32 = 3;
/// What a child process does; nothing when this file's tests are run.
#[test]
fn a_process_of_a_group() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let address: Address = std::env::var(ADDRESS).unwrap().parse().unwrap();
    let done = runtime().block_on(async {
        match role.as_str() {
            "trainer" => trainer(address).await,
            _ => rollout(address).await,
        }
    });
    if let Err(error) = done {
        say(&in_words(&error));
    }
    let held = hccl_sim::held(std::env::var_os(LIBRARIES).unwrap().as_ref()).unwrap();
    say(&format!("holds {}", if held.is_empty() { "nothing" } else { &held }));
}

fn config() -> CheckpointEngineConfig {
    let mut config = CheckpointEngineConfig::new("hccl");
    config.update_weights_bucket_megabytes =
        Some(std::env::var(BUCKET).map_or(1, |text| text.parse().unwrap()));
    config.timeout_seconds = 4.0;
    config.threads = std::num::NonZeroUsize::new(1);
    config.device = std::env::var(DEVICE).unwrap().parse().unwrap();
    if std::env::var_os(REBUILD).is_some() {
        let section = config.engine_kwargs.entry("hccl".into()).or_default();
        section.insert("rebuild_group".into(), true.into());
    }
    config
}

/// What a trainer is told.
const ANEW: &str = "anew";

/// Sends a version whenever a line comes from standard input, and says what became of it. When told to, it
/// ends its engine and prepares another one, which has room only if nothing is left of the first.
async fn trainer(address: Address) -> Result<()> {
    let control = ControlPlane::lead(control(address)).await?;
    let mut engine = match processes::trainer(BACKEND, &control, config(), RANKS).await {
        Ok(engine) => engine,
        Err(error) => {
            // The others find it out for themselves, if they hear of one another before this process ends.
            control.close().await?;
            return Err(error);
        }
    };
    say("ready");
    for version in 1.. {
        let mut line = String::new();
        if tokio::task::block_in_place(|| std::io::stdin().read_line(&mut line)).unwrap() == 0 {
            break;
        }
        if line.trim() == ANEW {
            engine.finalize().await?;
            BACKEND.prepare_trainer(context(&control, config())).await?;
            say("prepared");
            return Ok(());
        }
        match engine.send_weights(ensure_async_iterator(model(version)), Version(version)).await {
            Ok(report) => {
                let ranks = receivers(&report).into_iter().map(|rank| rank.0);
                say(&format!("sent {version} to {:?}", ranks.collect::<Vec<u32>>()));
            }
            Err(error) => say(&in_words(&error)),
        }
    }
    engine.finalize().await
}

/// Says what becomes of every update, until the trainer is gone.
async fn rollout(address: Address) -> Result<()> {
    let rank = std::env::var(RANK).ok().map(|rank| Rank(rank.parse().unwrap()));
    let control = ControlPlane::join(control(address), Role::Rollout, rank).await?;
    let mut engine = processes::rollout(BACKEND, &control, config(), RANKS).await?;
    say("ready");
    let mut kept = None;
    loop {
        match update(&mut *engine, &mut kept).await {
            Ok(version) => say(&format!("active {version}")),
            Err(error) if error.says_trainer_is_gone() => {
                // Without a trainer there is no next update.
                engine.finalize().await?;
                return say_what_was_kept();
            }
            // No update has begun yet.
            Err(error)
                if error.report().version.is_none() && error.kind() == ErrorKind::Timeout => {}
            Err(error) => say(&in_words(&error)),
        }
    }
}

/// Names a version whose tensors a rollout keeps beyond the end of its engine.
const KEEP_VERSION: &str = "CKPT_ENGINE_TEST_KEEP_VERSION";
static KEPT: Mutex<Vec<(u8, Weight)>> = Mutex::new(Vec::new());

fn say_what_was_kept() -> Result<()> {
    let kept = std::mem::take(&mut *KEPT.lock().unwrap());
    for (value, tensor) in &kept {
        assert!(tensor.to_bytes()?.iter().all(|byte| byte == value), "other bytes are there");
    }
    if !kept.is_empty() {
        say(&format!("kept {} tensors", kept.len()));
    }
    Ok(())
}

async fn update(engine: &mut dyn RolloutEngine, kept: &mut Option<Weight>) -> Result<Version> {
    let mut received = engine.receive_weights(None).await?;
    let version = received.version();
    let mut tensors = 0;
    while let Some(tensor) = received.next_tensor().await? {
        if tensors == 0 && std::env::var_os(HOLD).is_some() {
            say("holding");
            let mut line = String::new();
            tokio::task::block_in_place(|| std::io::stdin().read_line(&mut line)).unwrap();
        }
        let expected = value(version, tensors);
        if std::env::var(KEEP_VERSION).is_ok_and(|keep| keep == version.to_string()) {
            KEPT.lock().unwrap().push((expected, tensor.clone()));
        }
        assert!(tensor.to_bytes()?.iter().all(|&byte| byte == expected), "other bytes arrived");
        tensors += 1;
        *kept = std::env::var_os(KEEP).map(|_| tensor);
    }
    received.finish().await.map(|_| version)
}

fn in_words(error: &Error) -> String {
    let report = error.report();
    let rank = report.rank.map_or("nobody".into(), |rank| rank.to_string());
    format!("failed {:?} of {rank}: {error}", error.kind()).replace('\n', " ")
}

/// Variables of a process's environment.
type Settings<'a> = &'a [(&'a str, &'a str)];

fn start(role: &str, address: &Address, rank: u32, settings: Settings<'_>) -> Process {
    let mut program = Process::program();
    program
        .env(ROLE, role)
        .env(ADDRESS, address.to_string())
        .env(RANK, rank.to_string())
        .env(DEVICE, format!("npu:{rank}"))
        .env(LIBRARIES, hccl_sim::libraries(Profile::Current).unwrap())
        .env("HCCL_SIM_TIME_SCALE", "0.05")
        .env("HCCL_EXEC_TIMEOUT", "1836")
        .env("HCCL_HOST_SOCKET_PORT_RANGE", "auto")
        .env("HCCL_NPU_SOCKET_PORT_RANGE", "auto")
        // A group takes 20 MB of each NPU, and its slots 4 MB; a rank has two others.
        .env("HCCL_BUFFSIZE", "10")
        .env("HCCL_SIM_DEVICE_MB", "40")
        .env("HCCL_SIM_LINKS", "2")
        .envs(settings.iter().copied());
    Process::start(program)
}

/// Sends it a signal.
fn signal(process: &Process, name: &str) {
    let mut kill = Command::new("kill");
    kill.args([format!("-{name}"), process.id().to_string()]);
    assert!(kill.status().unwrap().success());
}

/// It says an error of a kind, naming a rank, with these words; the bucket that it names.
fn fails(process: &Process, kind: &str, rank: u32, words: &str) -> Option<u64> {
    let line = process.next_line();
    assert!(line.starts_with(&format!("failed {kind} of {rank}: ")), "{line}");
    assert!(line.contains(words), "{line}");
    let (_, bucket) = line.rsplit_once(", bucket ")?;
    bucket.split([',', ')']).next().unwrap().parse().ok()
}

/// A trainer and two rollouts, in the order of their ranks.
struct Group {
    address: Address,
    trainer: Process,
    rollouts: Vec<Process>,
}

impl Group {
    /// A group that is ready; each rank with settings of its own.
    fn form(settings: [Settings<'_>; 3]) -> Self {
        let address = address();
        let trainer = start("trainer", &address, 0, settings[0]);
        let rollout = |rank| start("rollout", &address, rank, settings[rank as usize]);
        let rollouts = vec![rollout(1), rollout(2)];
        let group = Self { address, trainer, rollouts };
        group.is_ready();
        group
    }

    fn is_ready(&self) {
        self.trainer.says("ready");
        self.rollouts.iter().for_each(|rollout| rollout.says("ready"));
    }

    fn begin(&mut self) {
        self.trainer.tell("");
    }

    /// A rollout that joins late.
    fn join(&mut self, rank: u32, settings: Settings<'_>) {
        let newcomer = start("rollout", &self.address, rank, settings);
        newcomer.says("ready");
        self.rollouts.push(newcomer);
    }

    /// The next update fails on all ranks, with an error that names a rank; and the buckets that they name.
    fn fails(&mut self, kind: &str, rank: u32, words: &str) -> Vec<Option<u64>> {
        self.begin();
        let all = std::iter::once(&self.trainer).chain(&self.rollouts);
        all.map(|process| fails(process, kind, rank, words)).collect()
    }

    /// Ends a rollout from outside.
    fn kill(&mut self, rank: u32) {
        drop(self.rollouts.remove(rank as usize - 1));
    }

    /// All finalize, and nothing is left of what they had.
    fn ends(mut self) {
        self.trainer.hang_up();
        self.trainer.says("holds nothing");
        self.rollouts.iter().for_each(|rollout| rollout.says("holds nothing"));
    }

    /// An update that has to arrive at these rollouts.
    fn works(&mut self, version: u64, ranks: &[u32]) {
        self.begin();
        self.trainer.says(&format!("sent {version} to {ranks:?}"));
        self.rollouts.iter().for_each(|rollout| rollout.says(&format!("active {version}")));
    }
}

/// What the simulator's operations are numbered from: the first two are those that every group begins with.
const FOURTH_BUCKET: &str = "6";

/// Whether a bucket was on its way when the fourth one did not arrive: the one before, whose end was not noticed
/// yet; four that are in the slots; or one that waits for a slot.
fn is_on_its_way(bucket: Option<u64>) -> bool {
    bucket.is_some_and(|bucket| (2..=7).contains(&bucket))
}

#[test]
fn an_update_goes_on_after_a_peer_is_killed_in_the_middle_of_a_broadcast() {
    let mut group = Group::form([&[], &[], &[("HCCL_SIM_KILL_AT", FOURTH_BUCKET)]]);
    group.begin();
    let bucket = fails(&group.trainer, "PeerLost", 2, "version 1");
    assert!(is_on_its_way(bucket), "{bucket:?}");
    group.kill(2);
    let bucket = fails(&group.rollouts[0], "PeerLost", 2, "version 1");
    assert!(is_on_its_way(bucket), "{bucket:?}");
    group.works(2, &[1]);
    group.join(2, &[]);
    group.works(3, &[1, 2]);
    group.ends();
}

#[test]
fn an_asynchronous_error_of_a_link_ends_the_update_and_the_next_one_works() {
    let mut group = Group::form([&[], &[("HCCL_SIM_ASYNC_ERROR_AT", FOURTH_BUCKET)], &[]]);
    // HCCL does not say which peer it was: the rank that it has failed on is named.
    let buckets = group.fails("Io", 1, "asynchronous error 21");
    assert!(buckets.iter().all(|bucket| is_on_its_way(*bucket)), "{buckets:?}");
    group.works(2, &[1, 2]);
    group.works(3, &[1, 2]);
    group.ends();
}

#[test]
fn a_broadcast_that_hangs_is_a_timeout_and_the_next_update_works() {
    let mut group = Group::form([&[], &[("HCCL_SIM_HANG_AT", FOURTH_BUCKET)], &[]]);
    // It was the sender's, as far as anybody knows.
    let buckets = group.fails("Timeout", 0, "broadcasting a bucket");
    assert!(buckets.iter().all(|bucket| is_on_its_way(*bucket)), "{buckets:?}");
    group.works(2, &[1, 2]);
    group.ends();
}

#[test]
fn a_member_that_does_not_come_on_when_a_group_forms_is_a_timeout_and_the_next_update_works() {
    let mut group = Group::form([&[], &[], &[("HCCL_SIM_HANG_AT", "1")]]);
    group.begin();
    // No bucket is on its way yet. All wait for one another, and whose time is over first is named.
    for process in std::iter::once(&group.trainer).chain(&group.rollouts) {
        let line = process.next_line();
        assert!(line.starts_with("failed Timeout of "), "{line}");
        assert!(!line.contains("of nobody") && line.contains("joining a group"), "{line}");
    }
    group.works(2, &[1, 2]);
    group.ends();
}

#[test]
fn a_group_that_a_member_does_not_reach_is_a_timeout_of_the_library_and_the_next_update_works() {
    // HCCL waits for 1.2 s, which is less than the deadline.
    let short: (&str, &str) = ("HCCL_SIM_TIME_SCALE", "0.01");
    let mut group = Group::form([&[short], &[short, ("HCCL_SIM_LOST_AT", "1")], &[short]]);
    group.begin();
    for process in std::iter::once(&group.trainer).chain(&group.rollouts) {
        let line = process.next_line();
        assert!(line.starts_with("failed Timeout of "), "{line}");
        assert!(!line.contains("of nobody"), "{line}");
        assert!(line.contains("HCCL_CONNECT_TIMEOUT says how long it waits"), "{line}");
    }
    group.works(2, &[1, 2]);
    group.ends();
}

#[test]
fn two_rollouts_on_one_chip_that_is_not_the_trainers_are_an_error_that_says_what_to_do() {
    let address = address();
    let start = |(rank, npu)| {
        let role = if rank == 0 { "trainer" } else { "rollout" };
        start(role, &address, rank, &[(DEVICE, npu)])
    };
    let ranks = [(0, "npu:0"), (1, "npu:1"), (2, "npu:1")].map(start);
    for process in &ranks {
        fails(process, "Mismatch", 2, "ranks 1 and 2 are both on NPU 1 of one host");
    }
}

/// As large as it takes for no NPU to have room for a communicator.
const NO_ROOM: (&str, &str) = ("HCCL_BUFFSIZE", "100");
const ON_0: (&str, &str) = (DEVICE, "npu:0");

#[test]
fn rollouts_on_the_trainers_npu_read_its_buckets_there_and_no_group_forms() {
    let split = hccl_sim::libraries(Profile::Split).unwrap();
    let split = (LIBRARIES, split.to_str().unwrap());
    let mut group =
        Group::form([&[NO_ROOM, split], &[NO_ROOM, split, ON_0], &[NO_ROOM, split, ON_0]]);
    group.works(1, &[1, 2]);
    group.works(2, &[1, 2]);
    group.join(3, &[NO_ROOM, split, ON_0]);
    group.works(3, &[1, 2, 3]);
    group.ends();
}

#[test]
fn a_rollout_on_the_trainers_npu_reads_there_what_the_others_get_by_broadcast() {
    let mut group = Group::form([&[], &[ON_0, NO_ROOM], &[]]);
    group.works(1, &[1, 2]);
    group.join(3, &[ON_0, NO_ROOM]);
    group.join(4, &[]);
    // The last one has a link to the trainer, and one to the other member: as many as there are.
    group.works(2, &[1, 2, 3, 4]);
    group.works(3, &[1, 2, 3, 4]);
    group.ends();
}

#[test]
fn an_update_goes_on_after_a_rollout_on_the_trainers_npu_is_killed_while_it_reads() {
    let mut group = Group::form([&[("HCCL_SIM_DEVICE_MB", "27")], &[ON_0, (HOLD, "1")], &[]]);
    group.begin();
    group.rollouts[0].says("holding");
    drop(group.rollouts.remove(0));
    fails(&group.trainer, "PeerLost", 1, "bucket");
    fails(&group.rollouts[0], "PeerLost", 1, "version 1");
    group.works(2, &[2]);
    group.join(1, &[ON_0]);
    group.works(3, &[1, 2]);
    // Nothing keeps the trainer from freeing its memory, not even the one that was killed.
    group.rollouts.clear();
    group.trainer.tell(ANEW);
    group.trainer.says("prepared");
    group.trainer.says("holds nothing");
}

#[test]
fn a_rollout_on_the_trainers_npu_that_was_given_up_sees_no_bytes_of_another_version() {
    // All weights are in one bucket, which is not read at once.
    let large: Settings<'_> = &[(BUCKET, "16"), ("HCCL_SIM_DEVICE_MB", "100")];
    let mut group = Group::form([large, &[large, &[ON_0, (HOLD, "1")]].concat(), large]);
    group.begin();
    group.rollouts[0].says("holding");
    // Longer than it may be silent.
    signal(&group.rollouts[0], "STOP");
    fails(&group.trainer, "PeerLost", 1, "the peer was silent");
    let mut stopped = group.rollouts.remove(0);
    fails(&group.rollouts[0], "PeerLost", 1, "the peer was silent");
    group.works(2, &[2]);
    signal(&stopped, "CONT");
    stopped.tell("");
    let line = stopped.next_line();
    assert!(line.contains("the leader has filled the slot anew"), "{line}");
}

#[test]
fn the_trainer_frees_its_memory_after_rollouts_have_closed_it_and_waits_for_none_for_long() {
    let small = ("HCCL_SIM_DEVICE_MB", "5");
    for (settings, said) in [([ON_0, NO_ROOM], "prepared"), ([ON_0, (KEEP, "1")], "no memory")] {
        let mut group = Group::form([&[small], &settings, &[ON_0]]);
        group.works(1, &[1, 2]);
        let begun = Instant::now();
        group.trainer.tell(ANEW);
        let line = group.trainer.next_line();
        assert!(line.contains(said), "{line}");
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    }
}

#[test]
fn libraries_that_cannot_share_memory_are_an_error_that_says_what_to_do() {
    let old = hccl_sim::libraries(Profile::Cann81).unwrap();
    let old = (LIBRARIES, old.to_str().unwrap());
    let address = address();
    let start = |(rank, npu)| {
        let role = if rank == 0 { "trainer" } else { "rollout" };
        start(role, &address, rank, &[old, (DEVICE, npu)])
    };
    let ranks = [(0, "npu:0"), (1, "npu:1"), (2, "npu:0")].map(start);
    for process in &ranks {
        let line = process.next_line();
        assert!(line.starts_with("failed Mismatch of 2: "), "{line}");
        assert!(line.contains("lack aclrtIpcMemGetExportKey"), "{line}");
        assert!(line.contains("a later CANN has it"), "{line}");
        assert!(line.contains("give it a device of its own"), "{line}");
    }
}

#[test]
fn npus_are_the_same_by_what_they_are_and_not_by_the_numbers_that_processes_give_them() {
    const VISIBLE: &str = "ASCEND_RT_VISIBLE_DEVICES";
    let mut group = Group::form([
        &[ON_0, (VISIBLE, "3,1")],
        &[(DEVICE, "npu:1"), (VISIBLE, "0,3"), NO_ROOM],
        &[ON_0, (VISIBLE, "0")],
    ]);
    group.works(1, &[1, 2]);
    // Old libraries do not say which NPU it is, but the list does.
    let old = hccl_sim::libraries(Profile::Cann81).unwrap();
    let old = (LIBRARIES, old.to_str().unwrap());
    let on = |list| [ON_0, old, (VISIBLE, list)];
    let mut group = Group::form([&on("3"), &on("0"), &on("1")]);
    group.works(1, &[1, 2]);
}

#[test]
fn a_port_that_is_in_use_is_an_error_that_says_what_to_set_and_the_next_update_works() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let range = format!("{port}-{port}");
    let mut group = Group::form([&[("HCCL_HOST_SOCKET_PORT_RANGE", &range)], &[], &[]]);
    group.begin();
    fails(&group.trainer, "Resource", 0, "set HCCL_HOST_SOCKET_PORT_RANGE=auto");
    drop(taken);
    // Nothing of the first one was announced.
    group.works(2, &[1, 2]);
    group.ends();
}

#[test]
fn an_npu_without_memory_for_the_slots_is_an_error_that_says_how_much_there_is() {
    let full: Settings<'_> = &[("HCCL_SIM_DEVICE_MB", "1")];
    let words = |npu| format!("bytes of buckets on NPU {npu}, 1048576 of 1048576 are free");
    let trainer = start("trainer", &address(), 0, full);
    fails(&trainer, "Resource", 0, &words(0));
    trainer.says("holds nothing");
    // The group comes about with another process, and updates work.
    let address = address();
    let trainer = start("trainer", &address, 0, &[]);
    let lacking = start("rollout", &address, 1, full);
    fails(&lacking, "Resource", 1, &words(1));
    lacking.says("holds nothing");
    drop(lacking);
    let rollouts = [1, 2].map(|rank| start("rollout", &address, rank, &[])).into();
    let mut group = Group { address, trainer, rollouts };
    group.is_ready();
    group.works(1, &[1, 2]);
    group.ends();
}

#[test]
fn an_npu_without_memory_for_a_communicator_is_an_error_of_its_rank_and_the_next_update_works() {
    let mut group = Group::form([&[], &[("HCCL_SIM_COMM_OOM_AT", "1")], &[]]);
    assert_eq!(group.fails("Resource", 1, "twice HCCL_BUFFSIZE"), [None; 3]);
    group.works(2, &[1, 2]);
    group.ends();
}

#[test]
fn ranks_that_wait_for_a_member_in_vain_take_part_in_the_next_update() {
    // The rollouts are in the call that joins, which nothing ends but HCCL's own timeout: 6 s, twice as long as
    // any wait may take.
    let mut group = Group::form([&[("HCCL_SIM_COMM_OOM_AT", "1")], &[], &[]]);
    assert_eq!(group.fails("Resource", 0, "twice HCCL_BUFFSIZE"), [None; 3]);
    group.works(2, &[1, 2]);
    group.ends();
}

#[test]
fn groups_that_form_anew_for_every_update_leave_nothing_behind() {
    let rebuild: Settings<'_> = &[(REBUILD, "1")];
    let mut group = Group::form([rebuild; 3]);
    for version in 1..=40 {
        group.works(version, &[1, 2]);
    }
    group.ends();
}

#[test]
fn tensors_that_are_kept_can_be_read_after_the_end_of_their_engine() {
    // The whole model is one bucket, of more bytes than are read at a time.
    let large = [(BUCKET, "12"), ("HCCL_SIM_DEVICE_MB", "80")];
    let keeping = [large[0], large[1], (KEEP_VERSION, "2")];
    let mut group = Group::form([&large, &keeping, &large]);
    group.works(1, &[1, 2]);
    group.works(2, &[1, 2]);
    group.trainer.hang_up();
    group.rollouts[0].says(&format!("kept {WEIGHTS} tensors"));
    group.ends();
}
