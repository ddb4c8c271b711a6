//! The manager, and the cache of a rollout, over the engine of one process.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use engine_core::{
    CachedEngine, CheckpointEngine, CheckpointEngineConfig, CheckpointEngineManager,
    CheckpointEngineWithCache, DType, EngineContext, Error, ErrorKind, Install, LocalRollout,
    Placement, ReceiveReport, ReceivedBucket, Result, Role, RolloutWorker, TensorMap, Version,
    Weight, WorkerMetadata, ensure_async_iterator, naive,
};
use futures::StreamExt;

fn engine(role: Role) -> Box<dyn CheckpointEngine> {
    let config = CheckpointEngineConfig {
        backend: "naive".into(),
        timeout_seconds: 2.0,
        ..Default::default()
    };
    naive::BACKEND.create(EngineContext::new(config, role)).unwrap()
}

fn model(seed: u8) -> Vec<Weight> {
    let weight = |i: u8| Weight::new(format!("w{i}"), DType::U8, [64], vec![seed ^ i; 64]).unwrap();
    (0..10).map(weight).collect()
}

type Log = Arc<Mutex<Vec<String>>>;

/// A rollout that says which of its hooks ran, and can be made to fail.
struct Logged {
    rollout: LocalRollout<Fragile>,
    name: &'static str,
    log: Log,
}

/// A destination that refuses one version.
#[derive(Default)]
struct Fragile {
    map: TensorMap,
    refuses: bool,
}

impl Install for Fragile {
    fn install(&mut self, bucket: &ReceivedBucket) -> Result<()> {
        if std::mem::take(&mut self.refuses) {
            return Err(Error::new(ErrorKind::Resource, "installing", "the cache is in the way"));
        }
        self.map.install(bucket)
    }
}

impl Logged {
    fn new(name: &'static str, log: &Log, refuses: bool) -> Self {
        let destination = Fragile { refuses, ..Default::default() };
        let rollout = LocalRollout::new(engine(Role::Rollout), destination);
        Self { rollout, name, log: log.clone() }
    }

    fn say(&self, what: &str) {
        self.log.lock().unwrap().push(format!("{} {what}", self.name));
    }
}

#[async_trait]
impl RolloutWorker for Logged {
    async fn prepare(&mut self) -> Result<WorkerMetadata> {
        self.rollout.prepare().await
    }

    async fn init_process_group(&mut self, place: Placement) -> Result<()> {
        self.rollout.init_process_group(place).await
    }

    async fn update(&mut self, version: Version) -> Result<ReceiveReport> {
        self.say("updates");
        self.rollout.update(version).await
    }

    async fn finalize(&mut self) -> Result<()> {
        self.rollout.finalize().await
    }

    async fn pause(&mut self) -> Result<()> {
        self.say("pauses");
        Ok(())
    }

    async fn release_cache(&mut self) -> Result<()> {
        self.say("releases its cache");
        Ok(())
    }

    async fn resume(&mut self, active: Option<Version>) -> Result<()> {
        self.say(&format!("resumes with {:?}", active.map(|version| version.0)));
        Ok(())
    }
}

async fn manager(log: &Log, refuses: bool) -> CheckpointEngineManager<'static> {
    let rollouts: Vec<Box<dyn RolloutWorker>> =
        vec![Box::new(Logged::new("a", log, refuses)), Box::new(Logged::new("b", log, false))];
    let trainer = engine(Role::Trainer);
    let mut manager = CheckpointEngineManager::new(naive::BACKEND, trainer, rollouts);
    manager.init().await.unwrap();
    manager
}

#[tokio::test]
async fn rollouts_pause_release_their_caches_update_and_resume_in_this_order() {
    let log = Log::default();
    let mut manager = manager(&log, false).await;
    let weights = ensure_async_iterator(model(1));
    let (sent, received) = manager.update_weights(weights, Version(1)).await.unwrap();
    assert_eq!((sent.counts.tensors, received.len()), (10, 2));
    assert_eq!(
        *log.lock().unwrap(),
        [
            "a pauses",
            "b pauses",
            "a releases its cache",
            "b releases its cache",
            "a updates",
            "b updates",
            "a resumes with Some(1)",
            "b resumes with Some(1)",
        ]
    );
    manager.finalize().await.unwrap();
}

#[tokio::test]
async fn rollouts_resume_without_a_version_after_an_update_that_failed_and_the_next_one_works() {
    let log = Log::default();
    let mut manager = manager(&log, true).await;
    let failed = manager.update_weights(ensure_async_iterator(model(1)), Version(1)).await;
    assert_eq!(failed.unwrap_err().kind(), ErrorKind::Resource);
    assert_eq!(log.lock().unwrap()[6..], ["a resumes with None", "b resumes with None"]);
    manager.update_weights(ensure_async_iterator(model(2)), Version(2)).await.unwrap();
    assert_eq!(log.lock().unwrap()[14..], ["a resumes with Some(2)", "b resumes with Some(2)"]);
}

/// A trainer and a rollout with a cache, in a group.
async fn with_cache() -> (Box<dyn CheckpointEngine>, CachedEngine) {
    let mut trainer = engine(Role::Trainer);
    let mut rollout = CachedEngine::new(engine(Role::Rollout));
    let workers = [trainer.prepare().await.unwrap(), rollout.prepare().await.unwrap()];
    let mut places = naive::BACKEND.build_topology(&workers).unwrap();
    rollout.init_process_group(places.remove(1)).await.unwrap();
    trainer.init_process_group(places.remove(0)).await.unwrap();
    (trainer, rollout)
}

async fn cached(rollout: &CachedEngine) -> (Version, Vec<Vec<u8>>) {
    let (version, weights) = rollout.get_weights().unwrap();
    let bytes = weights.map(|weight| weight.unwrap().to_bytes().unwrap().to_vec());
    (version, bytes.collect().await)
}

#[tokio::test]
async fn the_cache_has_the_last_version_that_was_complete() {
    let (mut trainer, mut rollout) = with_cache().await;
    assert_eq!(rollout.get_weights().err().unwrap().kind(), ErrorKind::State);
    let bytes =
        |seed| model(seed).iter().map(|w| w.to_bytes().unwrap().to_vec()).collect::<Vec<_>>();

    let send = trainer.send_weights(ensure_async_iterator(model(1)), Version(1));
    let (sent, version) = futures::future::join(send, rollout.update_cache(None)).await;
    sent.unwrap();
    assert_eq!(version.unwrap(), Version(1));
    assert_eq!(cached(&rollout).await, (Version(1), bytes(1)));

    let broken = model(2).into_iter().map(Ok).chain([Err(std::io::Error::other("disk"))]);
    let send = trainer.send_weights(ensure_async_iterator(broken), Version(2));
    let (sent, version) = futures::future::join(send, rollout.update_cache(None)).await;
    assert!(sent.is_err() && version.is_err());
    assert_eq!(cached(&rollout).await, (Version(1), bytes(1)), "an update that failed shows");

    let send = trainer.send_weights(ensure_async_iterator(model(3)), Version(3));
    let (sent, version) = futures::future::join(send, rollout.update_cache(None)).await;
    sent.unwrap();
    assert_eq!(version.unwrap(), Version(3));
    assert_eq!(cached(&rollout).await, (Version(3), bytes(3)));
}
