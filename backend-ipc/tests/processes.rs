//! Groups whose ranks are processes: some are killed within an update, and others take weights from a
//! rollout's cache.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use backend_ipc::{CacheAddress, SharedCache, SharedCacheReader};
use engine_core::control::{Address, ControlConfig, Token};
use engine_core::{
    CachedEngine, CheckpointEngine, CheckpointEngineConfig, CheckpointEngineWithCache,
    ControlPlane, DType, EngineContext, Error, ErrorKind, Rank, Result, Role, SendReport, Version,
    Weight, WorkerMetadata, ensure_async_iterator, naive,
};
use futures::StreamExt;
use futures::future::{join, join_all, try_join};
use tokio::sync::Barrier;

const SECRET: &[u8] = b"the secret of a group of tests, long enough";
const ROLE: &str = "CKPT_ENGINE_TEST_ROLE";
const ADDRESS: &str = "CKPT_ENGINE_TEST_ADDRESS";
const RANKS: &str = "CKPT_ENGINE_TEST_RANKS";
/// How long anything here may take before it counts as a hang.
const LIMIT: Duration = Duration::from_secs(40);
/// A weight's bytes: with ten of them, a model has five buckets.
const BYTES: usize = 500_000;

fn config(backend: &str) -> CheckpointEngineConfig {
    CheckpointEngineConfig {
        backend: backend.into(),
        update_weights_bucket_megabytes: Some(1),
        timeout_seconds: 8.0,
        threads: std::num::NonZeroUsize::new(1),
        ..Default::default()
    }
}

fn control(address: &Address) -> ControlConfig {
    let mut config = ControlConfig::new(address.clone(), Token::new(SECRET).unwrap());
    config.heartbeat_interval = Duration::from_millis(300);
    config.heartbeat_timeout = Duration::from_secs(3);
    config
}

/// Joins an engine with a group of so many ranks, or with one that is there already.
async fn form(control: &ControlPlane, ranks: u32) -> Box<dyn CheckpointEngine> {
    let context = EngineContext::new(config("ipc"), control.role()).with_control(control.clone());
    let mut engine = backend_ipc::BACKEND.create(context).unwrap();
    let own = serde_json::to_vec(&engine.prepare().await.unwrap()).unwrap();
    let peers = control.gather(ranks, own.into(), LIMIT).await.unwrap();
    let workers: Vec<WorkerMetadata> =
        peers.iter().map(|peer| serde_json::from_slice(&peer.payload).unwrap()).collect();
    let places = backend_ipc::BACKEND.build_topology(&workers).unwrap();
    let place = places.into_iter().find(|place| place.rank == control.rank()).unwrap();
    engine.init_process_group(place).await.unwrap();
    engine
}

/// A model that says its version in every byte.
fn model(version: u64) -> Vec<Weight> {
    let weight = |index| {
        let bytes = vec![(version * 16 + index) as u8; BYTES];
        Weight::new(format!("w{index}"), DType::U8, [BYTES as u64], bytes).unwrap()
    };
    (0..10).map(weight).collect()
}

/// What a child process does; nothing when this file's tests are run.
#[test]
fn a_process_of_a_group() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let address: Address = std::env::var(ADDRESS).unwrap().parse().unwrap();
    let ranks: u32 = std::env::var(RANKS).unwrap().parse().unwrap();
    runtime().block_on(async {
        if role == "trainer" {
            return trainer(&address, ranks).await;
        }
        let control = ControlPlane::join(control(&address), Role::Rollout, None).await.unwrap();
        let engine = form(&control, ranks).await;
        if role == "rollout" {
            rollout(engine).await;
        } else {
            caching_rollout(engine).await;
        }
    });
}

/// Sends one version, and half of another one.
async fn trainer(address: &Address, ranks: u32) {
    let control = ControlPlane::lead(control(address)).await.unwrap();
    let mut engine = form(&control, ranks).await;
    engine.send_weights(ensure_async_iterator(model(1)), Version(1)).await.unwrap();
    let endless = futures::stream::iter(model(2)).chain(futures::stream::pending());
    engine.send_weights(ensure_async_iterator(endless), Version(2)).await.unwrap();
}

/// Says what becomes of every update, until the trainer is gone.
async fn rollout(mut engine: Box<dyn CheckpointEngine>) {
    say("joined");
    loop {
        match update(&mut *engine).await {
            Ok(version) => say(&format!("active {version}")),
            Err(error) if error.kind() == ErrorKind::Timeout => {}
            Err(error) => {
                say(&failure(&error));
                if error.report().rank == Some(Rank::LEADER) {
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

/// A rollout whose cache others read.
async fn caching_rollout(engine: Box<dyn CheckpointEngine>) {
    let cache = SharedCache::create().unwrap();
    say(&serde_json::to_string(&cache.address()).unwrap());
    let mut engine = CachedEngine::with_store(engine, Arc::new(cache));
    loop {
        match engine.update_cache(None).await {
            Ok(version) => say(&format!("cached {version}")),
            Err(error) if error.kind() == ErrorKind::Timeout => {}
            Err(error) => {
                say(&failure(&error));
                if error.report().rank == Some(Rank::LEADER) {
                    return;
                }
            }
        }
    }
}

fn failure(error: &Error) -> String {
    format!("{:?} of {:?}", error.kind(), error.report().rank.map(|rank| rank.0))
}

fn say(line: &str) {
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
    fn start(role: &str, address: &Address, ranks: u32) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_process_of_a_group", "--nocapture"])
            .env(ROLE, role)
            .env(ADDRESS, address.to_string())
            .env(RANKS, ranks.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, said) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(std::io::Result::ok) {
                let Some(said) = line.strip_prefix('>') else { continue };
                if sender.send(said.to_owned()).is_err() {
                    return;
                }
            }
        });
        Self { child, said }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn next(&self) -> String {
        self.said.recv_timeout(LIMIT).unwrap()
    }

    #[track_caller]
    fn says(&self, what: &str) {
        assert_eq!(self.next(), what);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn address() -> Address {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("unix:@ipc-processes-{}-{count}", std::process::id()).parse().unwrap()
}

/// Sends a version; something happens before its weight of a number is given.
async fn send(
    engine: &mut dyn CheckpointEngine,
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

fn receivers(report: &SendReport) -> Vec<u32> {
    report.receivers.iter().map(|receiver| receiver.rank.0).collect()
}

/// Names in shared memory that a process made.
fn left_by(pid: u32) -> Vec<String> {
    let names = std::fs::read_dir("/dev/shm").unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains(&format!("ckpt-engine-{pid}-"))).collect()
}

#[test]
fn a_rollout_killed_within_an_update_is_an_error_on_every_other_rank_and_the_next_update_works() {
    runtime().block_on(async {
        let control = ControlPlane::lead(control(&address())).await.unwrap();
        let start = || Process::start("rollout", control.address(), 3);
        let mut rollouts = [start(), start()];
        let mut engine = form(&control, 3).await;
        rollouts.iter().for_each(|rollout| rollout.says("joined"));
        assert_eq!(receivers(&send(&mut *engine, 1, 99, || Ok(())).await.unwrap()), [1, 2]);
        rollouts.iter().for_each(|rollout| rollout.says("active 1"));

        let [victim, other] = &mut rollouts;
        let killed = send(&mut *engine, 2, 5, || {
            victim.kill();
            Ok(())
        });
        let error = killed.await.unwrap_err();
        let lost = error.report().rank.unwrap();
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
        assert_eq!(error.report().version, Some(Version(2)), "{error}");
        other.says(&format!("PeerLost of {:?}", Some(lost.0)));

        let left = 3 - lost.0;
        let report = send(&mut *engine, 3, 99, || Ok(())).await.unwrap();
        assert_eq!((receivers(&report), report.absent), (vec![left], vec![lost]));
        other.says("active 3");

        let newcomer = start();
        newcomer.says("joined");
        assert_eq!(receivers(&send(&mut *engine, 4, 99, || Ok(())).await.unwrap()), [1, 2]);
        newcomer.says("active 4");
        assert_eq!(left_by(std::process::id()), Vec::<String>::new());
    });
}

#[test]
fn a_trainer_killed_within_an_update_is_an_error_on_every_rollout_and_leaves_nothing() {
    runtime().block_on(async {
        let address = address();
        let mut trainer = Process::start("trainer", &address, 3);
        let within = Barrier::new(3);
        let rollouts = (0..2).map(|_| async {
            let control = ControlPlane::join(control(&address), Role::Rollout, None).await.unwrap();
            let mut engine = form(&control, 3).await;
            assert_eq!(update(&mut *engine).await.unwrap(), Version(1));
            let mut received = engine.receive_weights(None).await.unwrap();
            assert!(received.next_tensor().await.unwrap().is_some());
            within.wait().await;
            received.finish().await.unwrap_err()
        });
        let killer = async {
            within.wait().await;
            trainer.kill();
        };
        let all = join(join_all(rollouts), killer);
        let (errors, ()) = tokio::time::timeout(LIMIT, all).await.expect("no hang");
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
            assert_eq!(error.report().rank, Some(Rank::LEADER), "{error}");
        }
        assert_eq!(left_by(trainer.child.id()), Vec::<String>::new());
        // Its address is free, and a group forms there again.
        let mut next = Process::start("trainer", &address, 2);
        let control = ControlPlane::join(control(&address), Role::Rollout, None).await.unwrap();
        let mut engine = form(&control, 2).await;
        assert_eq!(update(&mut *engine).await.unwrap(), Version(1));
        next.kill();
    });
}

/// What a reader gives: the version that it says, and the one that every byte says.
async fn read(reader: &SharedCacheReader) -> Result<u64> {
    let (version, mut weights) = reader.get_weights()?;
    let mut index = 0;
    while let Some(weight) = weights.next().await {
        let weight = weight?;
        assert_eq!(weight.name(), format!("w{index}"));
        let bytes = weight.to_bytes()?;
        assert!(bytes.iter().all(|&byte| byte == (version.0 * 16 + index) as u8), "other bytes");
        index += 1;
    }
    assert_eq!(index, 10);
    Ok(version.0)
}

#[test]
fn another_process_reads_the_last_whole_version_while_the_next_arrives_and_none_that_failed() {
    runtime().block_on(async {
        let control = ControlPlane::lead(control(&address())).await.unwrap();
        let mut owner = Process::start("caching rollout", control.address(), 2);
        let mut engine = form(&control, 2).await;
        let cache: CacheAddress = serde_json::from_str(&owner.next()).unwrap();
        let reader = SharedCacheReader::open(cache).unwrap();
        assert_eq!(reader.version().unwrap(), None);
        assert_eq!(read(&reader).await.unwrap_err().kind(), ErrorKind::State);

        send(&mut *engine, 1, 99, || Ok(())).await.unwrap();
        owner.says("cached 1");
        assert_eq!(read(&reader).await.unwrap(), 1);

        // One that has looked before, and one that looks for the first time.
        let held = reader.get_weights().unwrap().1;
        let fresh = SharedCacheReader::open(cache).unwrap();
        let mut during = Vec::new();
        let sent = send(&mut *engine, 2, 7, || {
            during = [&reader, &fresh].map(|reader| reader.get_weights().unwrap().0).to_vec();
            Ok(())
        });
        sent.await.unwrap();
        owner.says("cached 2");
        assert_eq!(during, [Version(1); 2]);
        assert_eq!((read(&reader).await.unwrap(), read(&fresh).await.unwrap()), (2, 2));
        let held: Vec<Weight> = held.map(|weight| weight.unwrap()).collect().await;
        assert!(
            held.iter()
                .zip(model(1))
                .all(|(held, sent)| { held.to_bytes().unwrap() == sent.to_bytes().unwrap() })
        );

        let strict = SharedCacheReader::open(cache).unwrap().with_max_staleness(Some(0));
        assert_eq!(read(&strict).await.unwrap(), 2);
        let broken = || Err(Error::new(ErrorKind::Source, "reading a disk", "it is broken"));
        send(&mut *engine, 3, 7, broken).await.unwrap_err();
        assert!(owner.next().starts_with("Source"));
        assert_eq!(read(&reader).await.unwrap(), 2);
        let error = read(&strict).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::State, "{error}");
        assert!(error.to_string().contains("1 behind version 3"), "{error}");

        owner.kill();
        assert_eq!(read(&reader).await.unwrap(), 2, "what was taken goes with its owner");
        let error = SharedCacheReader::open(cache).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
    });
}

#[test]
fn a_reader_that_never_took_a_version_hears_that_its_owner_is_gone() {
    runtime().block_on(async {
        let control = ControlPlane::lead(control(&address())).await.unwrap();
        let mut owner = Process::start("caching rollout", control.address(), 2);
        let mut engine = form(&control, 2).await;
        let reader = SharedCacheReader::open(serde_json::from_str(&owner.next()).unwrap()).unwrap();
        send(&mut *engine, 1, 99, || Ok(())).await.unwrap();
        owner.says("cached 1");
        owner.kill();
        let error = read(&reader).await.unwrap_err();
        assert_eq!((error.kind(), error.report().version), (ErrorKind::PeerLost, Some(Version(1))));
    });
}

#[test]
fn a_reader_that_looks_all_the_time_sees_whole_versions_only_and_never_an_older_one() {
    runtime().block_on(async {
        let engine = |role| naive::BACKEND.create(EngineContext::new(config("naive"), role));
        let (mut trainer, rollout) =
            (engine(Role::Trainer).unwrap(), engine(Role::Rollout).unwrap());
        let cache = SharedCache::create().unwrap();
        let reader = SharedCacheReader::open(cache.address()).unwrap();
        let mut rollout = CachedEngine::with_store(rollout, Arc::new(cache));
        let workers = [trainer.prepare().await.unwrap(), rollout.prepare().await.unwrap()];
        let mut places = naive::BACKEND.build_topology(&workers).unwrap();
        rollout.init_process_group(places.remove(1)).await.unwrap();
        trainer.init_process_group(places.remove(0)).await.unwrap();
        let looking = std::thread::spawn(move || {
            let mut seen = vec![0];
            while seen.last() != Some(&20) {
                match futures::executor::block_on(read(&reader)) {
                    Ok(version) if seen.last() != Some(&version) => seen.push(version),
                    Ok(_) => {}
                    Err(error) => assert_eq!(error.kind(), ErrorKind::State, "{error}"),
                }
            }
            seen
        });
        for version in 1..=20 {
            let weights = ensure_async_iterator(model(version));
            let sent = trainer.send_weights(weights, Version(version));
            try_join(sent, rollout.update_cache(None)).await.unwrap();
            let (own, mut weights) = rollout.get_weights().unwrap();
            assert_eq!(own, Version(version));
            let first = weights.next().await.unwrap().unwrap().to_bytes().unwrap();
            assert_eq!(first[0], (version * 16) as u8);
        }
        let seen = looking.join().unwrap();
        assert!(seen.is_sorted(), "{seen:?}");
    });
}
