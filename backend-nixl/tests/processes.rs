//! Groups whose ranks are processes, some of which are killed or cut off within an update.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use backend_nixl::BACKEND;
use conformance::hosts::Hosts;
use conformance::processes::{
    self, LIMIT, Process, WEIGHT_BYTES, WEIGHTS, address, context, control, model, receive,
    receivers, runtime, say, send, value,
};
use control_plane::{Address, ControlPlane, join_group};
use engine_core::{
    CheckpointEngineConfig, CheckpointEngineWithCache, ErrorKind, Rank, Result, Role,
    RolloutEngine, SendReport, TrainerEngine, Version, WeightStreamExt, ensure_async_iterator,
};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::json;
use serving::{CachedEngine, Holder, Newcomer, WeightCache};
use tokio::sync::Barrier;

const ROLE: &str = "CKPT_ENGINE_TEST_ROLE";
const ADDRESS: &str = "CKPT_ENGINE_TEST_ADDRESS";
const RANK: &str = "CKPT_ENGINE_TEST_RANK";
const OPTIONS: &str = "CKPT_ENGINE_TEST_OPTIONS";
/// The stage of an update at which a rollout kills itself, or up to which a trainer goes.
const STAGE: &str = "CKPT_ENGINE_TEST_STAGE";
/// The ranks of a group at its beginning; those that join later may say any number.
const RANKS: u32 = 4;
fn config(options: &str) -> CheckpointEngineConfig {
    let mut config = CheckpointEngineConfig::new("nixl");
    config.update_weights_bucket_megabytes = Some(1);
    config.timeout_seconds = 8.0;
    config.threads = std::num::NonZeroUsize::new(1);
    let options: serde_json::Value = serde_json::from_str(options).unwrap();
    config.engine_kwargs.insert("nixl".into(), options.as_object().unwrap().clone());
    config
}

/// What a child process does; nothing when this file's tests are run.
#[test]
fn a_process_of_a_group() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let address: Address = std::env::var(ADDRESS).unwrap().parse().unwrap();
    let config = config(&std::env::var(OPTIONS).unwrap());
    runtime().block_on(async {
        match role.as_str() {
            "rollout" => rollout(address, config).await,
            "holding rollout" => holding_rollout(address, config).await,
            "rejoining rollout" => loop {
                rollout(address.clone(), config.clone()).await;
            },
            "halting trainer" => halting_trainer(address, config).await,
            _ => trainer(address, config).await,
        }
    });
}

/// How far a rank is in an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
enum Stage {
    /// Between updates.
    Before,
    /// The update has begun, the rollout has not entered it.
    Begun,
    /// Weights are collected and encoded.
    Collecting,
    /// The rollout has entered; it is told of buckets and fetches none.
    Entered,
    /// It fetches.
    Fetching,
    /// It has a view of a bucket.
    Viewing,
    /// It has all buckets and has not confirmed them.
    Complete,
    /// It has confirmed them, and another one has not: nothing is committed.
    Confirmed,
}

impl Stage {
    const ALL: [Self; 8] = [
        Self::Before,
        Self::Begun,
        Self::Collecting,
        Self::Entered,
        Self::Fetching,
        Self::Viewing,
        Self::Complete,
        Self::Confirmed,
    ];

    /// What this process was told.
    fn told() -> Option<Self> {
        let words = std::env::var(STAGE).ok()?;
        Some(serde_json::from_str(&words).unwrap())
    }

    fn words(self) -> String {
        json!(self).to_string()
    }
}

/// The version that rollouts that are not to be killed are slow to confirm.
const SLOW: Version = Version(77);

/// Says on standard output what becomes of every update, until the trainer is gone. If it was told a
/// stage, it kills itself there in its first update.
async fn rollout(address: Address, config: CheckpointEngineConfig) {
    let rank = std::env::var(RANK).ok().map(|rank| Rank(rank.parse().unwrap()));
    let control = ControlPlane::join(control(address), Role::Rollout, rank).await.unwrap();
    let mut engine = processes::rollout(BACKEND, &control, config, RANKS).await.unwrap();
    say("joined");
    let told = Stage::told();
    loop {
        let result = update_with(&mut *engine, async |stage| {
            if told == Some(stage) {
                kill_this_process().await;
            }
        });
        match result.await {
            Ok(version) => say(&format!("active {version}")),
            Err(error) if error.kind() == ErrorKind::Timeout => {}
            Err(error) => {
                say(&format!("failed {:?}", error.kind()));
                if error.says_trainer_is_gone() || error.kind() == ErrorKind::PeerLost {
                    return;
                }
            }
        }
    }
}

/// A rollout that keeps the last version, holds it for others, and takes over what one of them holds.
async fn holding_rollout(address: Address, config: CheckpointEngineConfig) {
    let plane = ControlPlane::join(control(address), Role::Rollout, None).await.unwrap();
    let cache = WeightCache::default();
    let own_address = format!("unix:@nixl-holder-{}", std::process::id()).parse().unwrap();
    let at = |address: &Address| control(address.clone());
    let backend = Arc::new(BACKEND);
    let holder = Holder::listen(cache.clone(), backend, config.clone(), at(&own_address));
    let holder = holder.await.unwrap();
    let prepared = BACKEND.prepare_rollout(context(&plane, config.clone())).await.unwrap();
    let prepared = prepared.with_attributes(holder.announcement());
    tokio::spawn(holder.run());
    // Of two that join at once, the second one may be here first: ranks have gaps.
    let group = join_group(prepared, BACKEND, &plane, None, LIMIT).await;
    let (engine, place) = group.unwrap();
    let mut engine = CachedEngine::with_cache(engine, cache);
    let holders = Newcomer::holders(&place.peers);
    say("joined");
    for other in holders.iter().filter(|other| **other != own_address) {
        let newcomer = Newcomer::join(BACKEND, config.clone(), at(other)).await.unwrap();
        if let Some(mut newcomer) = newcomer {
            engine.take_over(newcomer.receive().await.unwrap()).await.unwrap();
            newcomer.leave().await.unwrap();
            break;
        }
    }
    loop {
        if let Ok((version, mut weights)) = engine.get_weights() {
            let expected = model(version.0);
            for weight in expected {
                let here = weights.next().await.unwrap().unwrap();
                assert_eq!(here.meta(), weight.meta());
                assert_eq!(here.to_bytes().unwrap(), weight.to_bytes().unwrap());
            }
            say(&format!("has {version}"));
        }
        match engine.update_cache(None).await {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Timeout => {}
            Err(_) => return,
        }
    }
}

async fn kill_this_process() {
    let own = rustix::process::getpid();
    rustix::process::kill_process(own, rustix::process::Signal::KILL).unwrap();
    std::future::pending().await
}

/// Receives one version, looks at every byte of it, and does something at every stage that is reached.
async fn update_with(
    engine: &mut dyn RolloutEngine,
    mut at: impl AsyncFnMut(Stage),
) -> Result<Version> {
    at(Stage::Begun).await;
    let mut received = engine.receive_weights(None).await?;
    let version = received.version();
    at(Stage::Entered).await;
    // Looking at it once begins what there is to begin.
    let begun = tokio::time::timeout(Duration::from_micros(50), received.next_bucket()).await;
    at(Stage::Fetching).await;
    let mut first = begun.unwrap_or(Ok(None))?;
    if first.is_none() {
        first = received.next_bucket().await?;
    }
    at(Stage::Viewing).await;
    let mut bytes = 0;
    let mut next = first;
    while let Some(bucket) = next {
        for piece in bucket.pieces() {
            let expected = value(version, piece.meta.name[1..].parse().unwrap());
            let here = piece.bytes.to_host()?;
            assert!(here.iter().all(|&byte| byte == expected), "other bytes arrived");
            bytes += here.len();
        }
        drop(bucket);
        if bytes == WEIGHTS * WEIGHT_BYTES {
            at(Stage::Complete).await;
            if version == SLOW && Stage::told() != Some(Stage::Confirmed) {
                tokio::time::sleep(Duration::from_millis(400)).await;
            }
            break;
        }
        next = received.next_bucket().await?;
    }
    let mut finish = std::pin::pin!(received.finish());
    let soon = tokio::time::timeout(Duration::from_millis(100), &mut finish).await;
    let report = match soon {
        Ok(report) => report,
        Err(_) => {
            at(Stage::Confirmed).await;
            finish.await
        }
    };
    report.map(|report| {
        assert_eq!(report.tensors, WEIGHTS as u64);
        version
    })
}

/// Sends one version, and another one as far as it was told.
async fn trainer(address: Address, config: CheckpointEngineConfig) {
    let control = ControlPlane::lead(control(address)).await.unwrap();
    let mut engine = processes::trainer(BACKEND, &control, config, RANKS).await.unwrap();
    engine.send_weights(ensure_async_iterator(model(1)), Version(1)).await.unwrap();
    let weights = match Stage::told() {
        None => return,
        Some(Stage::Before) => std::future::pending().await,
        Some(Stage::Begun) => 0,
        Some(Stage::Complete | Stage::Confirmed) => {
            engine.send_weights(ensure_async_iterator(model(2)), Version(2)).await.unwrap();
            return;
        }
        Some(_) => WEIGHTS,
    };
    let some = model(2).into_iter().take(weights);
    let endless = futures::stream::iter(some).chain(futures::stream::pending());
    engine.send_weights(ensure_async_iterator(endless), Version(2)).await.unwrap();
}

/// Sends versions. Halts in the middle of each until a line comes from standard input.
async fn halting_trainer(address: Address, config: CheckpointEngineConfig) {
    let control = ControlPlane::lead(control(address)).await.unwrap();
    let mut engine = processes::trainer(BACKEND, &control, config, RANKS).await.unwrap();
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

/// Starts a rank.
fn start(role: &str, address: &Address, rank: Option<u32>, options: &str) -> Process {
    start_with(Process::program(), role, address, rank, options)
}

/// The same, going up to a stage of an update.
fn start_to(stage: Stage, role: &str, address: &Address, options: &str) -> Process {
    let mut program = Process::program();
    program.env(STAGE, stage.words());
    start_with(program, role, address, None, options)
}

/// The same, with a program of its own.
fn start_with(
    mut program: Command,
    role: &str,
    address: &Address,
    rank: Option<u32>,
    options: &str,
) -> Process {
    if let Some(rank) = rank {
        program.env(RANK, rank.to_string());
    }
    program.env(ROLE, role).env(ADDRESS, address.to_string()).env(OPTIONS, options);
    Process::start(program)
}

/// A trainer in this process, and three rollouts in processes of their own, in the order of their
/// ranks.
struct Group {
    engine: Box<dyn TrainerEngine>,
    control: ControlPlane,
    rollouts: Vec<Process>,
    options: String,
}

impl Group {
    async fn form(options: &str) -> Self {
        let control = ControlPlane::lead(control(address())).await.unwrap();
        let mut rollouts = Vec::new();
        for rank in 1..=3 {
            let rollout = start("rollout", control.address(), Some(rank), options);
            rollouts.push(rollout);
        }
        let engine = processes::trainer(BACKEND, &control, config(options), RANKS).await.unwrap();
        rollouts.iter().for_each(|rollout| rollout.says("joined"));
        Self { engine, control, rollouts, options: options.to_owned() }
    }

    /// Waits until the trainer knows that a rank is gone, so that another process can have it.
    async fn until_gone(&self, rank: u32) {
        let there = || self.control.peers().iter().any(|peer| peer.rank == Rank(rank));
        let gone = async {
            while there() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, gone).await.expect("it was killed");
    }

    /// One update, within which something happens before the weight of a number is given.
    async fn update(
        &mut self,
        version: u64,
        before: usize,
        mut happens: impl FnMut(&mut Vec<Process>) + Send,
    ) -> Result<SendReport> {
        let happens = || {
            happens(&mut self.rollouts);
            Ok(())
        };
        send(&mut *self.engine, version, before, happens).await
    }
}

/// At each of some stages of an update the rollout of a rank is killed, and then a new one joins. The
/// others finish that update, the next one without the rank, and the next one with it.
async fn survive(options: &str, victim: u32, stages: &[Stage]) {
    let mut group = Group::form(options).await;
    let at = victim as usize - 1;
    let left: Vec<Rank> = (1..4).filter(|rank| *rank != victim).map(Rank).collect();
    let mut version = 0;
    for &stage in stages {
        let what = format!("rank {victim} is killed when {stage:?} with {options}");
        // All are there, and those that kill themselves do it from here on.
        version += 1;
        let report = group.update(version, 99, |_| {}).await;
        let report = report.unwrap_or_else(|error| panic!("{what}: before that: {error}"));
        assert_eq!(receivers(&report), [Rank(1), Rank(2), Rank(3)], "{what}");
        for rollout in &group.rollouts {
            rollout.says(&format!("active {version}"));
        }

        let by_itself = !matches!(stage, Stage::Before | Stage::Collecting);
        if by_itself {
            drop(group.rollouts.remove(at));
            group.until_gone(victim).await;
            let (address, options) = (group.control.address(), &group.options);
            let dying = start_to(stage, "rollout", address, options);
            dying.says("joined");
            group.rollouts.insert(at, dying);
        }
        version = if stage == Stage::Confirmed { SLOW.0 } else { version + 1 };
        let before = if stage == Stage::Collecting { 5 } else { 99 };
        if stage == Stage::Before {
            group.rollouts[at].kill();
        }
        let report = group.update(version, before, |rollouts| rollouts[at].kill()).await;
        let report = report.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(receivers(&report), left, "{what}");
        assert_eq!(report.absent, [Rank(victim)], "{what}");
        drop(group.rollouts.remove(at));
        version += 1;
        let report = group.update(version, 99, |_| {}).await;
        let report = report.unwrap_or_else(|error| panic!("{what}: after that: {error}"));
        assert_eq!(receivers(&report), left, "{what}");
        for rollout in &group.rollouts {
            rollout.says(&format!("active {}", version - 1));
            rollout.says(&format!("active {version}"));
        }

        let newcomer = start("rollout", group.control.address(), None, &group.options);
        newcomer.says("joined");
        group.rollouts.insert(at, newcomer);
    }
}

macro_rules! deaths {
    ($($name:ident: $options:expr, $victim:expr, $stages:expr;)*) => {$(
        #[test]
        fn $name() {
            runtime().block_on(survive(&$options.to_string(), $victim, $stages));
        }
    )*};
}

/// Those at which bytes are under way or held.
const BYTES: &[Stage] = &[Stage::Collecting, Stage::Fetching, Stage::Viewing, Stage::Complete];

deaths! {
    a_ring_closes_around_a_killed_first_rollout: json!({"topology": "ring"}), 1, &Stage::ALL;
    a_ring_closes_around_a_killed_middle_rollout: json!({"topology": "ring"}), 2, &Stage::ALL;
    a_ring_goes_on_without_a_killed_last_rollout: json!({"topology": "ring"}), 3, &Stage::ALL;
    a_ring_over_tcp_closes_around_a_killed_rollout:
        json!({"topology": "ring", "transports": "tcp,self"}), 2, BYTES;
    a_ring_that_writes_closes_around_a_killed_first_rollout:
        json!({"topology": "ring", "transfer": "write"}), 1, BYTES;
    a_ring_that_writes_closes_around_a_killed_middle_rollout:
        json!({"topology": "ring", "transfer": "write"}), 2, &Stage::ALL;
    a_star_goes_on_without_a_killed_rollout: json!({"topology": "star"}), 1, &Stage::ALL;
    a_star_that_writes_goes_on_without_a_killed_rollout:
        json!({"topology": "star", "transfer": "write"}), 3, BYTES;
}

#[test]
fn an_update_without_any_rollout_left_is_an_error_and_a_newcomer_gets_the_next_one() {
    runtime().block_on(async {
        let mut group = Group::form("{}").await;
        let update = group.update(1, 5, |rollouts| rollouts.iter_mut().for_each(Process::kill));
        let error = update.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
        group.rollouts.clear();
        let newcomer = start("rollout", group.control.address(), None, "{}");
        newcomer.says("joined");
        assert_eq!(receivers(&group.update(2, 99, |_| {}).await.unwrap()).len(), 1);
        newcomer.says("active 2");
    });
}

/// The trainer is killed when every rollout is at a stage of its second update, or one of them at the
/// stage before that, if they cannot all be there.
async fn lose_the_trainer(options: &str, stage: Stage) {
    let address = address();
    let mut trainer = start_to(stage, "trainer", &address, options);
    let within = Arc::new(Barrier::new(4));
    let what = format!("{stage:?} with {options}");
    let rollouts = (1..=3).map(|rank| {
        let (control, config, within) = (control(address.clone()), config(options), &within);
        async move {
            let rank = Some(Rank(rank));
            let control = ControlPlane::join(control, Role::Rollout, rank).await.unwrap();
            let mut engine = processes::rollout(BACKEND, &control, config, RANKS).await.unwrap();
            assert_eq!(receive(&mut *engine).await.unwrap(), Version(1));
            let here = match stage {
                // A trainer that has nothing to send is waited for.
                Stage::Before => Stage::Begun,
                Stage::Collecting => Stage::Viewing,
                // Without this one there is no commit.
                Stage::Confirmed if rank == Some(Rank(2)) => Stage::Complete,
                stage => stage,
            };
            let mut waited = false;
            let result = update_with(&mut *engine, async |now| {
                if now == here && !std::mem::replace(&mut waited, true) {
                    within.wait().await;
                    // Until the trainer is no more.
                    within.wait().await;
                }
            });
            let error = result.await.expect_err("there is no trainer");
            assert!(waited, "the stage was reached");
            engine.finalize().await.unwrap();
            error
        }
    });
    let killer = async {
        within.wait().await;
        trainer.kill();
        within.wait().await;
    };
    let all = futures::future::join(futures::future::join_all(rollouts), killer);
    let (errors, ()) = tokio::time::timeout(LIMIT, all).await.expect("no hang");
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{what}: {error}");
        assert_eq!(error.report().rank, Some(Rank::LEADER), "{what}: {error}");
    }
}

macro_rules! lost_trainers {
    ($($name:ident: $options:expr;)*) => {$(
        #[test]
        fn $name() {
            for stage in Stage::ALL {
                runtime().block_on(lose_the_trainer(&$options.to_string(), stage));
            }
        }
    )*};
}

lost_trainers! {
    a_killed_trainer_of_a_ring_is_an_error_on_every_rollout: json!({"topology": "ring"});
    a_killed_trainer_of_a_star_is_an_error_on_every_rollout: json!({"topology": "star"});
    a_killed_trainer_of_a_ring_that_writes_is_an_error_on_every_rollout:
        json!({"topology": "ring", "transfer": "write"});
}

#[test]
fn newcomers_get_the_current_version_from_one_that_holds_it_while_the_trainer_does_nothing() {
    for options in ["{}", r#"{"transfer": "write"}"#] {
        runtime().block_on(async {
            let plane = ControlPlane::lead(control(address())).await.unwrap();
            let holding = || start("holding rollout", plane.address(), None, options);
            let mut rollouts = vec![holding(), holding()];
            let mut engine = processes::trainer(BACKEND, &plane, config(options), 3).await.unwrap();
            rollouts.iter().for_each(|rollout| rollout.says("joined"));
            let update = engine.send_weights(ensure_async_iterator(model(1)), Version(1));
            assert_eq!(receivers(&update.await.unwrap()).len(), 2);
            rollouts.iter().for_each(|rollout| rollout.says("has 1"));

            // Two at once, of whom the holder can serve one.
            let newcomers = [holding(), holding()];
            for newcomer in &newcomers {
                newcomer.says("joined");
                newcomer.says("has 1");
            }
            // What they took over, they hold as well as anyone.
            rollouts.drain(..).for_each(drop);
            let newcomer = holding();
            newcomer.says("joined");
            newcomer.says("has 1");

            rollouts.extend(newcomers);
            rollouts.push(newcomer);
            let update = engine.send_weights(ensure_async_iterator(model(2)), Version(2));
            assert_eq!(receivers(&update.await.unwrap()).len(), 3);
            rollouts.iter().for_each(|rollout| rollout.says("has 2"));
        });
    }
}

/// Starts a rank on a host.
fn start_on(hosts: &Hosts, host: usize, role: &str, address: &Address, options: &str) -> Process {
    let mut program = hosts.command(host);
    program.arg(std::env::current_exe().unwrap());
    // The engine finds the interface: for UCX all of these are one host, which the loopback interface leads to.
    program.env_remove("UCX_NET_DEVICES");
    let rank = (host > 0).then_some(host as u32);
    start_with(program, role, address, rank, options)
}

/// A link is cut in the middle of an update, and is there again after it.
fn cut_off(topology: &str, cut: u32) {
    let address: Address = "10.99.0.1:18765".parse().unwrap();
    let joined = |ranks: &[u32]| {
        let ranks: Vec<Rank> = ranks.iter().copied().map(Rank).collect();
        format!("{ranks:?}")
    };
    let options = json!({ "topology": topology, "transports": "tcp,self" }).to_string();
    let hosts = Hosts::new(4);
    let mut trainer = start_on(&hosts, 0, "halting trainer", &address, &options);
    let start = |host| start_on(&hosts, host, "rejoining rollout", &address, &options);
    let rollouts = [1, 2, 3].map(start);
    let says = |rank: u32, what: &str| rollouts[rank as usize - 1].says(what);
    let (all, mut left) = ([1, 2, 3], vec![1, 2, 3]);
    left.retain(|rank| *rank != cut);
    all.iter().for_each(|rank| says(*rank, "joined"));
    trainer.says("halfway 1");
    trainer.tell("");
    trainer.says(&format!("sent 1 to {}", joined(&all)));
    all.iter().for_each(|rank| says(*rank, "active 1"));

    trainer.says("halfway 2");
    hosts.link(cut, "down");
    trainer.tell("");
    trainer.says(&format!("sent 2 to {}", joined(&left)));
    left.iter().for_each(|rank| says(*rank, "active 2"));
    says(cut, "failed PeerLost");

    trainer.says("halfway 3");
    hosts.link(cut, "up");
    says(cut, "joined");
    trainer.tell("");
    trainer.says(&format!("sent 3 to {}", joined(&left)));
    left.iter().for_each(|rank| says(*rank, "active 3"));
    trainer.says("halfway 4");
    trainer.tell("");
    trainer.says(&format!("sent 4 to {}", joined(&all)));
    all.iter().for_each(|rank| says(*rank, "active 4"));
}

#[test]
#[ignore = "makes network namespaces, which takes root and iproute2"]
fn hosts_with_a_further_interface_in_one_subnet_are_connected_by_the_one_that_leads_to_the_trainer()
{
    // UCX by default, too, which tries more than TCP.
    for options in [json!({ "transports": "tcp,self" }), json!({})] {
        let (options, address) = (options.to_string(), "10.99.0.1:18766".parse().unwrap());
        let hosts = Hosts::new(4);
        let mut trainer = start_on(&hosts, 0, "halting trainer", &address, &options);
        let rollouts = [1, 2, 3].map(|host| start_on(&hosts, host, "rollout", &address, &options));
        rollouts.iter().for_each(|rollout| rollout.says("joined"));
        for version in 1..3 {
            trainer.says(&format!("halfway {version}"));
            trainer.tell("");
            trainer.says(&format!("sent {version} to [Rank(1), Rank(2), Rank(3)]"));
            rollouts.iter().for_each(|rollout| rollout.says(&format!("active {version}")));
        }
    }
}

macro_rules! cuts {
    ($($name:ident: $topology:expr, $cut:expr;)*) => {$(
        #[test]
        #[ignore = "makes network namespaces, which takes root and iproute2"]
        fn $name() {
            cut_off($topology, $cut);
        }
    )*};
}

cuts! {
    a_first_rollout_of_a_ring_that_is_cut_off_is_left_out_and_comes_back: "ring", 1;
    a_middle_rollout_of_a_ring_that_is_cut_off_is_left_out_and_comes_back: "ring", 2;
    a_last_rollout_of_a_ring_that_is_cut_off_is_left_out_and_comes_back: "ring", 3;
    a_rollout_of_a_star_that_is_cut_off_is_left_out_and_comes_back: "star", 1;
}
