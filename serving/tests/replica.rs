//! A rollout that stays up to date by itself.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use control_plane::{ControlConfig, ControlPlane, Token, form_group};
use engine_core::{
    CheckpointEngineConfig, ErrorKind, Rank, Registry, Result, TrainerEngine, Version, Weight,
    ensure_async_iterator,
};
use serving::{Newcomer, Replica, WeightCache};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinHandle;

const LIMIT: Duration = Duration::from_secs(20);

fn address() -> ControlConfig {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let address = format!("unix:@replica-{}-{count}", std::process::id()).parse().unwrap();
    let mut at = ControlConfig::new(address, Token::generate().unwrap());
    at.heartbeat_interval = Duration::from_millis(100);
    at.heartbeat_timeout = Duration::from_secs(2);
    at
}

fn config() -> CheckpointEngineConfig {
    let mut config = CheckpointEngineConfig::new("naive");
    config.timeout_seconds = 1.0;
    config
}

struct Trainer {
    control: ControlPlane,
    engine: Box<dyn TrainerEngine>,
}

impl Trainer {
    async fn lead(at: &ControlConfig, ranks: u32) -> Self {
        let control = ControlPlane::lead(at.clone()).await.unwrap();
        let registry = Registry::new().with(backend_naive::BACKEND);
        let group = form_group(&registry, config(), &control).world_size(ranks).deadline(LIMIT);
        let (engine, _) = group.trainer().await.unwrap();
        Self { control, engine }
    }

    async fn send(&mut self, version: u64) -> Result<()> {
        let weight = Weight::of("w", [4], Arc::new(vec![version as f32; 4]));
        let weights = ensure_async_iterator([weight]);
        self.engine.send_weights(weights, Version(version)).await.map(drop)
    }

    async fn leave(self) {
        self.engine.finalize().await.unwrap();
        self.control.close().await.unwrap();
    }
}

/// A replica at work, and what it has heard.
struct Running {
    cache: WeightCache,
    heard: UnboundedReceiver<Result<Version, ErrorKind>>,
    task: JoinHandle<Result<()>>,
}

impl Running {
    fn start(replica: Replica) -> Self {
        let (said, heard) = unbounded_channel();
        let cache = replica.cache();
        let task = tokio::spawn(replica.run(move |what| {
            let what = what.as_ref().copied().map_err(engine_core::Error::kind);
            said.send(what).expect("a test that listens");
        }));
        Self { cache, heard, task }
    }

    async fn hears(&mut self) -> Result<Version, ErrorKind> {
        tokio::time::timeout(LIMIT, self.heard.recv()).await.unwrap().unwrap()
    }

    fn first(&self) -> f32 {
        let current = self.cache.current().unwrap();
        let bytes = current.get("w").unwrap().to_bytes().unwrap();
        f32::from_le_bytes(bytes[..4].try_into().unwrap())
    }
}

fn replica(at: &ControlConfig) -> Replica {
    Replica::new(Registry::new().with(backend_naive::BACKEND), config(), at.clone())
}

#[tokio::test]
async fn a_replica_has_every_version_and_ends_when_the_trainer_leaves() {
    let at = address();
    let mut rollout = Running::start(replica(&at));
    let mut trainer = Trainer::lead(&at, 2).await;
    for version in 1..4 {
        trainer.send(version).await.unwrap();
        assert_eq!(rollout.hears().await, Ok(Version(version)));
        assert_eq!(rollout.first(), version as f32);
    }
    trainer.leave().await;
    tokio::time::timeout(LIMIT, rollout.task).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_rollout_that_holds_some_parts_gives_them_to_who_wants_no_more_and_nothing_to_others() {
    let at = address();
    let registry = || Registry::new().with(backend_naive::BACKEND);
    let with_parts = |wants: Option<&[&str]>| {
        let mut config = config();
        config.parts.insert("draft".into(), vec!["mtp.*".into()]);
        config.parts.insert("adapter".into(), vec!["*.lora_*".into()]);
        config.wants = wants.map(|wants| wants.iter().map(|part| (*part).to_owned()).collect());
        config
    };
    let control = ControlPlane::lead(at.clone()).await.unwrap();
    let mut alone = at.clone();
    alone.address = format!("{}-holder", at.address).parse().unwrap();
    let holder = Replica::new(registry(), with_parts(Some(&["policy", "draft"])), at.clone());
    let mut holder = Running::start(holder.holding(alone.address.clone()));
    let registry = registry();
    let group = form_group(&registry, with_parts(None), &control).world_size(2).deadline(LIMIT);
    let (mut trainer, _) = group.trainer().await.unwrap();
    let weight = |name: &str| Weight::of(name, [4], Arc::new(vec![1_f32; 4]));
    let version = ["w", "mtp.w", "w.lora_A"].map(weight);
    trainer.send_weights(ensure_async_iterator(version), Version(1)).await.unwrap();
    assert_eq!(holder.hears().await, Ok(Version(1)));

    let names = |cache: &WeightCache| -> Vec<String> {
        let current = cache.current().unwrap();
        current.weights().iter().map(|weight| weight.name().to_owned()).collect()
    };
    assert_eq!(names(&holder.cache), ["w", "mtp.w"]);
    for (wants, gets) in [
        (Some(&["draft"][..]), Ok(&["mtp.w"][..])),
        (Some(&["draft", "policy"]), Ok(&["w", "mtp.w"])),
        (Some(&["adapter", "policy"]), Err("`adapter`")),
        (None, Err("wants all")),
    ] {
        let cache = WeightCache::default();
        let joined = Newcomer::join(backend_naive::BACKEND, with_parts(wants), alone.clone()).await;
        match (joined, gets) {
            (Ok(newcomer), Ok(gets)) => {
                let mut newcomer = newcomer.unwrap();
                cache.take_over(newcomer.receive().await.unwrap()).await.unwrap();
                newcomer.leave().await.unwrap();
                assert_eq!(names(&cache), gets);
            }
            (Err(error), Err(words)) => {
                assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
                assert!(error.to_string().contains(words), "{error}");
            }
            (joined, gets) => panic!("{joined:?}, {gets:?} was expected"),
        }
    }
}

#[tokio::test]
async fn a_replica_that_outlives_trainers_gets_the_versions_of_the_next_one() {
    let at = address();
    let mut rollout = Running::start(replica(&at).outliving_trainers());
    let mut first = Trainer::lead(&at, 2).await;
    first.send(1).await.unwrap();
    assert_eq!(rollout.hears().await, Ok(Version(1)));
    first.leave().await;
    let mut second = Trainer::lead(&at, 2).await;
    assert_eq!(rollout.first(), 1.0, "between two trainers it has the version of the first");
    second.send(2).await.unwrap();
    assert_eq!(rollout.hears().await, Ok(Version(2)));
    assert_eq!(rollout.first(), 2.0);
}

#[tokio::test]
async fn an_update_that_fails_is_heard_of_and_the_cache_keeps_the_version_before() {
    let at = address();
    let mut rollout = Running::start(replica(&at));
    let mut trainer = Trainer::lead(&at, 2).await;
    trainer.send(1).await.unwrap();
    assert_eq!(rollout.hears().await, Ok(Version(1)));
    let broken = [Err(std::io::Error::other("disk"))];
    let broken = ensure_async_iterator(broken.into_iter().map(|e: std::io::Result<Weight>| e));
    assert!(trainer.engine.send_weights(broken, Version(2)).await.is_err());
    assert!(rollout.hears().await.is_err());
    assert_eq!(rollout.first(), 1.0);
    trainer.send(3).await.unwrap();
    assert_eq!(rollout.hears().await, Ok(Version(3)));
}

#[tokio::test]
async fn a_replica_that_joins_late_has_the_version_that_another_one_holds_before_any_update() {
    let at = address();
    let hold = format!("unix:@replica-hold-{}", std::process::id()).parse().unwrap();
    let mut holds = Running::start(replica(&at).with_rank(Rank(1)).holding(hold));
    let mut trainer = Trainer::lead(&at, 2).await;
    trainer.send(7).await.unwrap();
    assert_eq!(holds.hears().await, Ok(Version(7)));
    let mut late = Running::start(replica(&at));
    assert_eq!(late.hears().await, Ok(Version(7)), "without an update");
    assert_eq!(late.first(), 7.0);
}

#[tokio::test]
async fn what_trying_again_does_not_help_ends_a_replica_with_the_reason() {
    let at = address();
    let trainer = ControlPlane::lead(at.clone()).await.unwrap();
    let mut other = at;
    other.token = Token::generate().unwrap();
    let ended = replica(&other).run(|_| {}).await;
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::Authentication);
    drop(trainer);
}
