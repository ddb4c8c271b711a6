//! Groups whose ranks are processes, some of which are killed during an update.
//!
//! The leading trainer is in the test's own process. All other ranks are children that run the same test program, with the name of the one
//! test that becomes a rank in a child:
//!
//! ```no_run
//! # static BACKEND: &dyn engine_core::Backend = backend_naive::BACKEND;
//! #[test]
//! fn a_process_of_a_group() {
//!     conformance::processes::be_a_child(BACKEND);
//! }
//! ```
//!
//! Tests whose ranks do other things have their own program, and use the parts from here.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use control_plane::{Address, ControlConfig, ControlPlane, Token, join_group};
use engine_core::{
    Backend, CheckpointEngineConfig, DType, DeviceChoice, EngineContext, Error, ErrorKind, Parts,
    Rank, ReceivedWeights, Result, Role, RolloutEngine, SendReport, TrainerEngine, Version, Weight,
    ensure_async_iterator,
};

use crate::log;

const SECRET: &[u8] = b"the secret of a group of tests, long enough";
const CHILD: &str = "CKPT_ENGINE_TEST_CHILD";
/// The variable with the number of devices, if the configuration names a kind and no number: each rank takes the next device. Without it
/// all share the first one.
const DEVICES: &str = "CKPT_ENGINE_TEST_DEVICES";
/// The test that becomes a rank.
const TEST: &str = "a_process_of_a_group";
/// How long anything may take before it counts as hanging.
pub const LIMIT: Duration = Duration::from_secs(90);
/// The number of weights of an update.
pub const WEIGHTS: usize = 12;
/// Bytes of a weight: two of them are a bucket of 1 MiB.
pub const WEIGHT_BYTES: usize = 500_000;

/// The orders for a child.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
struct Orders {
    address: String,
    /// The rank to take; without it, the leader assigns one.
    rank: Option<Rank>,
    role: Role,
    ranks: u32,
    config: serde_json::Value,
    /// The version in whose update a rollout drops its engine.
    drops_in: Option<Version>,
}

impl Orders {
    fn start(&self) -> Process {
        let mut program = Process::program();
        program.env(CHILD, serde_json::to_string(self).expect("orders"));
        Process::start(program)
    }
}

/// A model whose every byte depends on its version.
///
/// # Panics
///
/// Never: its tensors are small.
pub fn model(version: u64) -> Vec<Weight> {
    let weight = |index: usize| {
        let bytes = vec![value(Version(version), index); WEIGHT_BYTES];
        Weight::new(format!("w{index}"), DType::U8, [WEIGHT_BYTES as u64], bytes)
            .expect("a small tensor")
    };
    (0..WEIGHTS).map(weight).collect()
}

/// The value of every byte of the weight at `index`.
pub fn value(version: Version, index: usize) -> u8 {
    (version.0 * 16 + index as u64) as u8
}

/// The control plane of a group, which notices silent ranks soon.
///
/// # Panics
///
/// Never: the token is long enough.
pub fn control(address: Address) -> ControlConfig {
    let mut config = ControlConfig::new(address, Token::new(SECRET).expect("a long token"));
    config.heartbeat_interval = Duration::from_millis(300);
    config.heartbeat_timeout = Duration::from_secs(3);
    config
}

/// A unique address of this host for a group.
///
/// # Panics
///
/// Never: it is an address.
pub fn address() -> Address {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("unix:@processes-{}-{count}", std::process::id()).parse().expect("an address")
}

/// The runtime of a rank.
///
/// # Panics
///
/// If its threads cannot be started.
pub fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().expect("a runtime")
}

/// Joins a trainer to a group of this many ranks.
///
/// # Errors
///
/// What the engine or the control plane reports.
pub async fn trainer(
    backend: &dyn Backend,
    control: &ControlPlane,
    config: CheckpointEngineConfig,
    ranks: u32,
) -> Result<Box<dyn TrainerEngine>> {
    let prepared = backend.prepare_trainer(context(control, config)).await?;
    Ok(join_group(prepared, backend, control, Some(ranks), LIMIT).await?.0)
}

/// Joins a rollout to a group of this many ranks, or to one that exists already.
///
/// # Errors
///
/// What the engine or the control plane reports.
pub async fn rollout(
    backend: &dyn Backend,
    control: &ControlPlane,
    config: CheckpointEngineConfig,
    ranks: u32,
) -> Result<Box<dyn RolloutEngine>> {
    let prepared = backend.prepare_rollout(context(control, config)).await?;
    Ok(join_group(prepared, backend, control, Some(ranks), LIMIT).await?.0)
}

/// A rank's context. If the configuration has no device number, each rank takes the next device.
pub fn context(control: &ControlPlane, mut config: CheckpointEngineConfig) -> EngineContext {
    if !config.device.is_cpu() && config.device.ordinal().is_none() {
        let devices = std::env::var(DEVICES).ok().and_then(|number| number.parse().ok());
        let number = control.rank().0 % devices.unwrap_or(1).max(1);
        config.device = DeviceChoice::new(config.device.kind(), number);
    }
    EngineContext::new(config).with_control(control.clone())
}

/// Sends a version's model. `happens` runs before the weight of index `before` is given.
///
/// # Errors
///
/// The error of the update, which `happens` may have caused.
///
/// # Panics
///
/// If it hangs.
pub async fn send(
    engine: &mut dyn TrainerEngine,
    version: u64,
    before: usize,
    mut happens: impl FnMut() -> Result<()> + Send,
) -> Result<SendReport> {
    let weights = model(version).into_iter().enumerate().map(|(index, weight)| {
        if index == before {
            happens()?;
        }
        Ok::<_, Error>(weight)
    });
    let sent = engine.send_weights(ensure_async_iterator(weights), Version(version));
    tokio::time::timeout(LIMIT, sent).await.expect("no hang")
}

/// The ranks that received an update.
pub fn receivers(report: &SendReport) -> Vec<Rank> {
    report.receivers.iter().map(|receiver| receiver.rank).collect()
}

/// Receives the next update, and compares every byte.
///
/// # Errors
///
/// The error of the update.
///
/// # Panics
///
/// If other bytes arrived.
pub async fn receive(engine: &mut dyn RolloutEngine) -> Result<Version> {
    check(engine.receive_weights(None).await?, 0..WEIGHTS).await
}

async fn check(
    mut received: ReceivedWeights<'_>,
    wanted: impl IntoIterator<Item = usize>,
) -> Result<Version> {
    let version = received.version();
    let mut wanted = wanted.into_iter();
    while let Some(tensor) = received.next_tensor().await? {
        let index = wanted.next().expect("no tensor after the last one");
        assert_eq!(tensor.name(), format!("w{index}"), "another tensor arrived");
        let expected = value(version, index);
        assert!(tensor.to_bytes()?.iter().all(|byte| *byte == expected), "other bytes arrived");
    }
    assert_eq!(wanted.next(), None, "tensors are missing");
    received.finish().await?;
    Ok(version)
}

/// The indices of the weights that a rank with this configuration wants.
fn wanted(config: &CheckpointEngineConfig) -> Vec<usize> {
    let parts = Parts::of(config).expect("parts");
    let wants = parts.wanted(config.wants.as_deref()).expect("parts that there are");
    (0..WEIGHTS).filter(|index| wants.contains(parts.part_of(&format!("w{index}")))).collect()
}

enum Joined {
    Trainer(Box<dyn TrainerEngine>),
    Rollout(Box<dyn RolloutEngine>),
}

/// Runs a child process's rank. Does nothing in a process that is not a child.
pub fn be_a_child(backend: &'static dyn Backend) {
    let Ok(orders) = std::env::var(CHILD) else { return };
    log();
    let orders: Orders = serde_json::from_str(&orders).expect("orders");
    let config = serde_json::from_value(orders.config).expect("a configuration");
    let wanted = wanted(&config);
    runtime().block_on(async {
        let address = orders.address.parse().expect("an address");
        let joined = ControlPlane::join(control(address), orders.role, orders.rank).await;
        let plane = joined.expect("the leader");
        let joined = match orders.role {
            Role::Trainer => {
                trainer(backend, &plane, config, orders.ranks).await.map(Joined::Trainer)
            }
            Role::Rollout => {
                rollout(backend, &plane, config, orders.ranks).await.map(Joined::Rollout)
            }
        };
        let mut joined = match joined {
            Ok(joined) => joined,
            Err(error) => return say(&format!("refused {:?}: {error}", error.kind())),
        };
        say("joined");
        for version in 1.. {
            let result = match &mut joined {
                Joined::Rollout(engine) => {
                    match receive_unless(&mut **engine, orders.drops_in, &wanted).await {
                        Ok(None) => {
                            drop(joined);
                            say("dropped its engine");
                            // The process stays, and so do its connections to the leader.
                            return std::future::pending().await;
                        }
                        Ok(Some(version)) => Ok(version),
                        Err(error) => Err(error),
                    }
                }
                Joined::Trainer(engine) => {
                    let weights = ensure_async_iterator(model(version));
                    let sent = engine.send_weights(weights, Version(version)).await;
                    sent.map(|report| report.version)
                }
            };
            match result {
                Ok(version) => say(&format!("active {version}")),
                Err(error)
                    if orders.role == Role::Rollout && error.kind() == ErrorKind::Timeout => {}
                Err(error) => {
                    say(&format!("failed {:?} {}", error.kind(), rank_in_words(&error)));
                    if error.says_trainer_is_gone()
                        || error.kind() == ErrorKind::PeerLost && plane.peers().is_empty()
                    {
                        return;
                    }
                }
            }
        }
    });
}

fn rank_in_words(error: &engine_core::Error) -> String {
    error.report().rank.map_or_else(|| "nobody".into(), |rank| rank.to_string())
}

/// Receives the next update. `None` if its version is the one in which the engine is to be dropped, of which it then has one bucket.
async fn receive_unless(
    engine: &mut dyn RolloutEngine,
    drops_in: Option<Version>,
    wanted: &[usize],
) -> Result<Option<Version>> {
    let mut received = engine.receive_weights(None).await?;
    if drops_in == Some(received.version()) {
        drop(received.next_bucket().await?);
        return Ok(None);
    }
    check(received, wanted.iter().copied()).await.map(Some)
}

/// Writes a line to the process that started this one.
///
/// # Panics
///
/// If that no longer reads.
pub fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    writeln!(output, "\n>{line}").and_then(|()| output.flush()).expect("a parent that listens");
}

/// A child process, killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    said: Receiver<String>,
}

impl Process {
    /// Starts this test program as a rank, by `command`.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start(mut command: Command) -> Self {
        command.args(["--exact", TEST, "--nocapture", "--include-ignored"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("a child");
        let output = BufReader::new(child.stdout.take().expect("its output"));
        let (sender, said) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(std::io::Result::ok) {
                let Some(line) = line.strip_prefix('>') else { continue };
                if sender.send(line.to_owned()).is_err() {
                    return;
                }
            }
        });
        Self { child, said }
    }

    /// This test program.
    ///
    /// # Panics
    ///
    /// If its path is unknown.
    pub fn program() -> Command {
        Command::new(std::env::current_exe().expect("this program"))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills it with SIGKILL.
    ///
    /// # Panics
    ///
    /// If the system refuses.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child to kill");
        self.child.wait().expect("its end");
    }

    /// Its next line.
    ///
    /// # Panics
    ///
    /// If there is none in time.
    #[track_caller]
    pub fn next_line(&self) -> String {
        self.said.recv_timeout(LIMIT).expect("a child that says something")
    }

    /// Waits for its next line, which must be `what`.
    ///
    /// # Panics
    ///
    /// If it is anything else.
    #[track_caller]
    pub fn says(&self, what: &str) {
        assert_eq!(self.next_line(), what);
    }

    /// Writes a line to it.
    ///
    /// # Panics
    ///
    /// If it no longer reads.
    pub fn tell(&mut self, line: &str) {
        let input = self.child.stdin.as_mut().expect("it is told things");
        writeln!(input, "{line}").expect("a child that listens");
    }

    /// Closes its input.
    pub fn hang_up(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Its resident memory, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        resident_bytes(&self.child.id().to_string())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The resident memory of a process. `self` names this one.
pub fn resident_bytes(process: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    let number = line.split_ascii_whitespace().next().and_then(|number| number.parse::<u64>().ok());
    number.expect("a number") * 1024
}

/// A leading trainer in this process, and all other ranks in processes of their own.
#[derive(Debug)]
pub struct Processes {
    runtime: tokio::runtime::Runtime,
    engine: Box<dyn TrainerEngine>,
    orders: Orders,
    control: ControlPlane,
    /// In the order of their ranks, from 1 on: trainers, then rollouts.
    pub children: Vec<Process>,
}

impl Processes {
    /// Forms a group.
    ///
    /// # Panics
    ///
    /// If it does not form.
    pub fn form(
        backend: &'static dyn Backend,
        config: &CheckpointEngineConfig,
        trainers: u32,
        rollouts: u32,
    ) -> Self {
        Self::form_wanting(backend, config, trainers, rollouts, &[])
    }

    /// As [`form`](Self::form). Of the configuration's parts, rollouts want these, in the order of their ranks; further ones want all.
    ///
    /// # Panics
    ///
    /// If it does not form.
    pub fn form_wanting(
        backend: &'static dyn Backend,
        config: &CheckpointEngineConfig,
        trainers: u32,
        rollouts: u32,
        wants: &[&[&str]],
    ) -> Self {
        log();
        let address = address();
        let runtime = runtime();
        let lead = ControlPlane::lead(control(address.clone()));
        let plane = runtime.block_on(lead).expect("an address to listen at");
        let ranks = trainers + rollouts;
        let config_of = |rollout: Option<u32>| {
            let mut config = config.clone();
            let wants = rollout.and_then(|rollout| wants.get(rollout as usize));
            config.wants = wants.map(|wants| wants.iter().map(|part| (*part).into()).collect());
            serde_json::to_value(config).expect("a configuration")
        };
        let mut orders = Orders {
            address: address.to_string(),
            rank: None,
            role: Role::Trainer,
            ranks,
            config: config_of(None),
            drops_in: None,
        };
        let mut children = Vec::new();
        for rank in 1..ranks {
            orders.rank = Some(Rank(rank));
            orders.role = if rank < trainers { Role::Trainer } else { Role::Rollout };
            orders.config = config_of(rank.checked_sub(trainers));
            children.push(orders.start());
        }
        let engine = runtime.block_on(trainer(backend, &plane, config.clone(), ranks));
        let engine = engine.expect("a group");
        // Those that join late want all.
        orders.config = config_of(None);
        children.iter().for_each(|child| child.says("joined"));
        Self { runtime, engine, orders, control: plane, children }
    }

    /// Starts a rollout that joins late. The leader assigns its rank.
    pub fn join(&mut self) {
        self.join_and_drop_in(None);
    }

    /// As [`join`](Self::join). The rollout drops its engine during the update of `version`, and its process stays.
    pub fn join_and_drop_in(&mut self, version: Option<Version>) {
        let orders =
            Orders { rank: None, role: Role::Rollout, drops_in: version, ..self.orders.clone() };
        let child = orders.start();
        child.says("joined");
        self.children.push(child);
    }

    /// Makes one update. `happens` runs before the weight of index `before` is given.
    ///
    /// # Errors
    ///
    /// The error of the update.
    ///
    /// # Panics
    ///
    /// If it hangs.
    pub fn update(
        &mut self,
        version: u64,
        before: usize,
        mut happens: impl FnMut(&mut Vec<Process>) + Send,
    ) -> Result<SendReport> {
        let Self { runtime, engine, children, .. } = self;
        let happens = || {
            happens(children);
            Ok(())
        };
        runtime.block_on(send(&mut **engine, version, before, happens))
    }

    /// Makes an update that must succeed for `rollouts` rollouts, all of which confirm it.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn works(&mut self, version: u64, rollouts: usize) {
        let report = self.update(version, usize::MAX, |_| {});
        let report = report.unwrap_or_else(|error| panic!("version {version}: {error}"));
        assert_eq!(report.receivers.len(), rollouts, "of version {version}");
        for child in &self.children {
            child.says(&format!("active {version}"));
        }
    }

    /// Ends the group, like an embedding program.
    ///
    /// # Panics
    ///
    /// If it cannot be ended.
    pub fn close(self) {
        self.runtime.block_on(self.engine.finalize()).expect("an end");
        self.runtime.block_on(self.control.close()).expect("an end");
    }
}
