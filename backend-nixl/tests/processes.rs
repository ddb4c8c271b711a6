//! Groups whose ranks are processes, some of which are killed or cut off within an update.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use engine_core::control::{Address, ControlConfig, Token};
use engine_core::{
    CheckpointEngine, CheckpointEngineConfig, ControlPlane, DType, EngineContext, ErrorKind, Rank,
    Result, Role, SendReport, Version, Weight, WeightStreamExt, WorkerMetadata,
    ensure_async_iterator,
};
use futures::StreamExt;
use serde_json::json;
use tokio::sync::Barrier;

const SECRET: &[u8] = b"the secret of a group of tests, long enough";
const ROLE: &str = "CKPT_ENGINE_TEST_ROLE";
const ADDRESS: &str = "CKPT_ENGINE_TEST_ADDRESS";
const RANK: &str = "CKPT_ENGINE_TEST_RANK";
const OPTIONS: &str = "CKPT_ENGINE_TEST_OPTIONS";
/// The ranks of a group at its beginning; those that join later may say any number.
const RANKS: u32 = 4;
/// How long anything here may take before it counts as a hang.
const LIMIT: Duration = Duration::from_secs(40);

fn config(options: &str) -> CheckpointEngineConfig {
    let mut config = CheckpointEngineConfig {
        backend: "nixl".into(),
        update_weights_bucket_megabytes: Some(1),
        timeout_seconds: 8.0,
        threads: std::num::NonZeroUsize::new(1),
        ..Default::default()
    };
    let options: serde_json::Value = serde_json::from_str(options).unwrap();
    config.engine_kwargs.insert("nixl".into(), options.as_object().unwrap().clone());
    config
}

fn control(address: &Address) -> ControlConfig {
    let mut config = ControlConfig::new(address.clone(), Token::new(SECRET).unwrap());
    config.heartbeat_interval = Duration::from_millis(300);
    config.heartbeat_timeout = Duration::from_secs(3);
    config
}

/// Joins an engine with a group of so many ranks, or with one that is there already.
async fn form(
    control: &ControlPlane,
    config: CheckpointEngineConfig,
    ranks: u32,
) -> Result<Box<dyn CheckpointEngine>> {
    let context = EngineContext::new(config, control.role()).with_control(control.clone());
    let mut engine = backend_nixl::BACKEND.create(context)?;
    let own = serde_json::to_vec(&engine.prepare().await?).unwrap();
    let peers = control.gather(ranks, own.into(), LIMIT).await?;
    let workers: Vec<WorkerMetadata> =
        peers.iter().map(|peer| serde_json::from_slice(&peer.payload).unwrap()).collect();
    let places = backend_nixl::BACKEND.build_topology(&workers)?;
    let place = places.into_iter().find(|place| place.rank == control.rank()).unwrap();
    engine.init_process_group(place).await?;
    Ok(engine)
}

/// A model of ten buckets, which says its version in every byte.
fn model(version: u64) -> Vec<Weight> {
    (0..10)
        .map(|index| {
            let bytes = vec![(version * 16 + index) as u8; 500_000];
            Weight::new(format!("w{index}"), DType::U8, [500_000], bytes).unwrap()
        })
        .collect()
}

/// What a child process does; nothing when this file's tests are run.
#[test]
fn a_process_of_a_group() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let address: Address = std::env::var(ADDRESS).unwrap().parse().unwrap();
    let config = config(&std::env::var(OPTIONS).unwrap());
    runtime().block_on(async {
        match role.as_str() {
            "rollout" => rollout(&address, config).await,
            "rejoining rollout" => loop {
                rollout(&address, config.clone()).await;
            },
            "halting trainer" => halting_trainer(&address, config).await,
            _ => trainer(&address, config).await,
        }
    });
}

/// Says on standard output what becomes of every update, until the trainer is gone.
async fn rollout(address: &Address, config: CheckpointEngineConfig) {
    let rank = std::env::var(RANK).ok().map(|rank| Rank(rank.parse().unwrap()));
    let control = ControlPlane::join(control(address), Role::Rollout, rank).await.unwrap();
    let mut engine = form(&control, config, RANKS).await.unwrap();
    say("joined");
    loop {
        let result = update(&mut *engine).await;
        match result {
            Ok(version) => say(&format!("active {version}")),
            Err(error) if error.kind() == ErrorKind::Timeout => {}
            Err(error) => {
                say(&format!("failed {:?}", error.kind()));
                if error.kind() == ErrorKind::PeerLost {
                    return;
                }
            }
        }
    }
}

/// Receives one version and looks at every byte of it.
async fn update(engine: &mut dyn CheckpointEngine) -> Result<Version> {
    let mut received = engine.receive_weights(None).await?;
    let version = received.version();
    let mut tensors = 0;
    while let Some(tensor) = received.next_tensor().await? {
        let expected = (version.0 * 16 + tensors) as u8;
        assert!(tensor.to_bytes()?.iter().all(|&byte| byte == expected), "other bytes arrived");
        tensors += 1;
    }
    received.finish().await.map(|report| {
        assert_eq!(report.tensors, 10);
        version
    })
}

/// Sends one version, and another one that does not end.
async fn trainer(address: &Address, config: CheckpointEngineConfig) {
    let control = ControlPlane::lead(control(address)).await.unwrap();
    let mut engine = form(&control, config, RANKS).await.unwrap();
    engine.send_weights(ensure_async_iterator(model(1)), Version(1)).await.unwrap();
    let endless = futures::stream::iter(model(2)).chain(futures::stream::pending());
    engine.send_weights(ensure_async_iterator(endless), Version(2)).await.unwrap();
}

/// Sends versions. Halts in the middle of each until a line comes from standard input.
async fn halting_trainer(address: &Address, config: CheckpointEngineConfig) {
    let control = ControlPlane::lead(control(address)).await.unwrap();
    let mut engine = form(&control, config, RANKS).await.unwrap();
    for version in 1.. {
        let halting = model(version).into_iter().enumerate().map(move |(index, weight)| {
            if index == 5 {
                say(&format!("halfway {version}"));
                let mut line = String::new();
                if std::io::stdin().read_line(&mut line).unwrap() == 0 {
                    std::process::exit(0);
                }
            }
            weight
        });
        match engine.send_weights(halting.off_executor(1), Version(version)).await {
            Ok(report) => say(&format!("sent {version} to {:?}", receivers(&report))),
            Err(error) => say(&format!("failed {:?}", error.kind())),
        }
    }
}

fn say(line: &str) {
    use std::io::Write;
    let mut output = std::io::stdout().lock();
    writeln!(output, "\n>{line}").and_then(|()| output.flush()).unwrap();
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A child process, killed when dropped.
struct Process {
    child: Child,
    said: Receiver<String>,
}

impl Process {
    fn start(role: &str, address: &Address, rank: Option<u32>, options: &str) -> Self {
        let program = Command::new(std::env::current_exe().unwrap());
        Self::start_with(program, role, address, rank, options)
    }

    /// A process that another program may start.
    fn start_with(
        mut program: Command,
        role: &str,
        address: &Address,
        rank: Option<u32>,
        options: &str,
    ) -> Self {
        if let Some(rank) = rank {
            program.env(RANK, rank.to_string());
        }
        let mut child = program
            .args(["--exact", "a_process_of_a_group", "--nocapture"])
            .env(ROLE, role)
            .env(ADDRESS, address.to_string())
            .env(OPTIONS, options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, said: lines(output) }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Lets a halting trainer go on.
    fn go_on(&mut self) {
        use std::io::Write;
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    fn says(&self, what: &str) {
        let line = self.said.recv_timeout(LIMIT);
        assert_eq!(line.as_deref(), Ok(what));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn lines(output: BufReader<ChildStdout>) -> Receiver<String> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in output.lines().map_while(std::io::Result::ok) {
            let Some(said) = line.strip_prefix('>') else { continue };
            if sender.send(said.to_owned()).is_err() {
                return;
            }
        }
    });
    receiver
}

fn address() -> Address {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("unix:@nixl-processes-{}-{count}", std::process::id()).parse().unwrap()
}

/// A trainer in this process, and three rollouts in processes of their own, in the order of their
/// ranks.
struct Group {
    engine: Box<dyn CheckpointEngine>,
    control: ControlPlane,
    rollouts: Vec<Process>,
    options: String,
}

impl Group {
    async fn form(options: &str) -> Self {
        let control = ControlPlane::lead(control(&address())).await.unwrap();
        let mut rollouts = Vec::new();
        for rank in 1..=3 {
            let rollout = Process::start("rollout", control.address(), Some(rank), options);
            rollouts.push(rollout);
        }
        let engine = form(&control, config(options), RANKS).await.unwrap();
        rollouts.iter().for_each(|rollout| rollout.says("joined"));
        Self { engine, control, rollouts, options: options.to_owned() }
    }

    /// One update, within which something happens before the weight of a number is given.
    async fn update(
        &mut self,
        version: u64,
        before: usize,
        mut happens: impl FnMut(&mut Vec<Process>) + Send,
    ) -> Result<SendReport> {
        let rollouts = &mut self.rollouts;
        let count = model(version).len();
        let mut weights = model(version).into_iter();
        let source = std::iter::from_fn(move || {
            if count - weights.len() == before {
                happens(rollouts);
            }
            weights.next()
        });
        let sent = self.engine.send_weights(ensure_async_iterator(source), Version(version));
        tokio::time::timeout(LIMIT, sent).await.expect("no hang")
    }
}

fn receivers(report: &SendReport) -> Vec<Rank> {
    report.receivers.iter().map(|receiver| receiver.rank).collect()
}

/// Kills the rollout of a rank before the weight of a number is given, and lets a new one join.
async fn survive(options: &str, victim: u32, before: usize) {
    let mut group = Group::form(options).await;
    let what = format!("rank {victim} is killed before weight {before} with {options}");
    let at = victim as usize - 1;
    assert_eq!(receivers(&group.update(1, 99, |_| {}).await.unwrap()).len(), 3, "{what}");
    group.rollouts.iter().for_each(|rollout| rollout.says("active 1"));

    let report = group.update(2, before, |rollouts| rollouts[at].kill()).await;
    let report = report.unwrap_or_else(|error| panic!("{what}: {error}"));
    let left: Vec<Rank> = (1..4).filter(|rank| *rank != victim).map(Rank).collect();
    assert_eq!(receivers(&report), left, "{what}");
    assert_eq!(report.absent, [Rank(victim)], "{what}");
    drop(group.rollouts.remove(at));
    group.rollouts.iter().for_each(|rollout| rollout.says("active 2"));
    assert_eq!(receivers(&group.update(3, 99, |_| {}).await.unwrap()), left, "{what}");
    group.rollouts.iter().for_each(|rollout| rollout.says("active 3"));

    let newcomer = Process::start("rollout", group.control.address(), None, &group.options);
    newcomer.says("joined");
    group.rollouts.push(newcomer);
    let report = group.update(4, 99, |_| {}).await.unwrap();
    assert_eq!(receivers(&report), [Rank(1), Rank(2), Rank(3)], "{what}");
    group.rollouts.iter().for_each(|rollout| rollout.says("active 4"));
}

macro_rules! deaths {
    ($($name:ident: $options:expr, $victim:expr;)*) => {$(
        #[test]
        fn $name() {
            for before in [1, 5, 10] {
                runtime().block_on(survive(&$options.to_string(), $victim, before));
            }
        }
    )*};
}

deaths! {
    a_ring_closes_around_a_killed_first_rollout: json!({"topology": "ring"}), 1;
    a_ring_closes_around_a_killed_middle_rollout: json!({"topology": "ring"}), 2;
    a_ring_goes_on_without_a_killed_last_rollout: json!({"topology": "ring"}), 3;
    a_ring_over_tcp_closes_around_a_killed_rollout:
        json!({"topology": "ring", "transports": "tcp,self"}), 2;
    a_star_goes_on_without_a_killed_rollout: json!({"topology": "star"}), 1;
}

#[test]
fn an_update_without_any_rollout_left_is_an_error_and_a_newcomer_gets_the_next_one() {
    runtime().block_on(async {
        let mut group = Group::form("{}").await;
        let update = group.update(1, 5, |rollouts| rollouts.iter_mut().for_each(Process::kill));
        let error = update.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
        group.rollouts.clear();
        let newcomer = Process::start("rollout", group.control.address(), None, "{}");
        newcomer.says("joined");
        assert_eq!(receivers(&group.update(2, 99, |_| {}).await.unwrap()).len(), 1);
        newcomer.says("active 2");
    });
}

#[test]
fn a_killed_trainer_is_an_error_on_every_rollout() {
    for options in [json!({"topology": "ring"}), json!({"topology": "star"})] {
        runtime().block_on(async {
            let (address, options) = (address(), options.to_string());
            let mut trainer = Process::start("trainer", &address, None, &options);
            let within = Arc::new(Barrier::new(4));
            let rollouts = (0..3).map(|_| {
                let (control, config, within) = (control(&address), config(&options), &within);
                async move {
                    let control = ControlPlane::join(control, Role::Rollout, None).await.unwrap();
                    let mut engine = form(&control, config, RANKS).await.unwrap();
                    assert_eq!(update(&mut *engine).await.unwrap(), Version(1));
                    let mut received = engine.receive_weights(None).await.unwrap();
                    assert!(received.next_tensor().await.unwrap().is_some());
                    within.wait().await;
                    received.finish().await.unwrap_err()
                }
            });
            let killer = async {
                within.wait().await;
                trainer.kill();
            };
            let all = futures::future::join(futures::future::join_all(rollouts), killer);
            let (errors, ()) = tokio::time::timeout(LIMIT, all).await.expect("no hang");
            for error in errors {
                assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
                assert_eq!(error.report().rank, Some(Rank::LEADER), "{error}");
            }
        });
    }
}

/// Hosts, as far as a network is concerned: namespaces, each with one interface, joined by a bridge.
/// Removed when dropped.
struct Hosts {
    hub: String,
    hosts: Vec<String>,
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split_whitespace()).status();
    assert!(status.is_ok_and(|status| status.success()), "ip {arguments}");
}

impl Hosts {
    fn new(count: usize) -> Self {
        let name = |part: &str| format!("ckpt-{}-{part}", std::process::id());
        let this = Self {
            hub: name("hub"),
            hosts: (0..count).map(|index| name(&index.to_string())).collect(),
        };
        let Self { hub, hosts } = &this;
        ip(&format!("netns add {hub}"));
        ip(&format!("-n {hub} link add bridge type bridge"));
        ip(&format!("-n {hub} link set bridge up"));
        for (index, host) in hosts.iter().enumerate() {
            ip(&format!("netns add {host}"));
            ip(&format!("-n {host} link set lo up"));
            ip(&format!("-n {hub} link add port{index} type veth peer name wire netns {host}"));
            ip(&format!("-n {hub} link set port{index} master bridge up"));
            ip(&format!("-n {host} addr add 10.99.0.{}/24 dev wire", index + 1));
            ip(&format!("-n {host} link set wire up"));
        }
        this
    }

    fn start(&self, host: usize, role: &str, address: &Address, options: &str) -> Process {
        let mut program = Command::new("ip");
        program.args(["netns", "exec", &self.hosts[host]]);
        program.arg(std::env::current_exe().unwrap());
        // For UCX all of them are one host, which is reached by the loopback interface.
        program.env("UCX_NET_DEVICES", "wire");
        let rank = (host > 0).then_some(host as u32);
        Process::start_with(program, role, address, rank, options)
    }

    fn link(&self, host: u32, state: &str) {
        ip(&format!("-n {} link set port{host} {state}", self.hub));
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in self.hosts.iter().chain([&self.hub]) {
            // It may not have been made.
            drop(Command::new("ip").args(["netns", "del", name]).status());
        }
    }
}

#[test]
#[ignore = "makes network namespaces, which takes root and iproute2"]
fn a_rollout_that_is_cut_off_is_left_out_and_is_back_in_the_next_update() {
    let address: Address = "10.99.0.1:18765".parse().unwrap();
    let joined = |ranks: &[u32]| {
        let ranks: Vec<Rank> = ranks.iter().copied().map(Rank).collect();
        format!("{ranks:?}")
    };
    for (topology, cut) in [("ring", 1), ("ring", 2), ("ring", 3), ("star", 1)] {
        let options = json!({"topology": topology, "transports": "tcp,self"}).to_string();
        let hosts = Hosts::new(4);
        let mut trainer = hosts.start(0, "halting trainer", &address, &options);
        let start = |host| hosts.start(host, "rejoining rollout", &address, &options);
        let rollouts = [1, 2, 3].map(start);
        let says = |rank: u32, what: &str| rollouts[rank as usize - 1].says(what);
        let (all, mut left) = ([1, 2, 3], vec![1, 2, 3]);
        left.retain(|rank| *rank != cut);
        all.iter().for_each(|rank| says(*rank, "joined"));
        trainer.says("halfway 1");
        trainer.go_on();
        trainer.says(&format!("sent 1 to {}", joined(&all)));
        all.iter().for_each(|rank| says(*rank, "active 1"));

        trainer.says("halfway 2");
        hosts.link(cut, "down");
        trainer.go_on();
        trainer.says(&format!("sent 2 to {}", joined(&left)));
        left.iter().for_each(|rank| says(*rank, "active 2"));
        says(cut, "failed PeerLost");

        trainer.says("halfway 3");
        hosts.link(cut, "up");
        says(cut, "joined");
        trainer.go_on();
        trainer.says(&format!("sent 3 to {}", joined(&left)));
        left.iter().for_each(|rank| says(*rank, "active 3"));
        trainer.says("halfway 4");
        trainer.go_on();
        trainer.says(&format!("sent 4 to {}", joined(&all)));
        all.iter().for_each(|rank| says(*rank, "active 4"));
    }
}
