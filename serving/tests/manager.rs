//! The manager, and the cache of a rollout, over the engine of one process.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use engine_core::{
    CheckpointEngineConfig, CheckpointEngineWithCache, DType, EngineContext, Error, ErrorKind,
    Expected, Install, PreparedRollout, PreparedTrainer, ReceiveReport, ReceivedBucket, Result,
    TensorMap, TrainerEngine, Version, Weight, ensure_async_iterator, form_local_group,
};
use futures::StreamExt;
use serving::{CachedEngine, CheckpointEngineManager, LocalRollout, PreparedWorker, RolloutWorker};

fn context() -> EngineContext {
    let mut config = CheckpointEngineConfig::new("naive");
    config.timeout_seconds = 2.0;
    EngineContext::new(config)
}

async fn trainer() -> PreparedTrainer {
    backend_naive::BACKEND.prepare_trainer(context()).await.unwrap()
}

async fn rollout() -> PreparedRollout {
    backend_naive::BACKEND.prepare_rollout(context()).await.unwrap()
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
    async fn prepared(name: &'static str, log: &Log, refuses: bool) -> PreparedWorker {
        let log = log.clone();
        rollout().await.map(move |engine| {
            let rollout = LocalRollout::new(engine, Fragile { refuses, ..Default::default() });
            Box::new(Self { rollout, name, log }) as Box<dyn RolloutWorker>
        })
    }

    fn say(&self, what: &str) {
        self.log.lock().unwrap().push(format!("{} {what}", self.name));
    }
}

#[async_trait]
impl RolloutWorker for Logged {
    async fn update(&mut self, version: Version) -> Result<ReceiveReport> {
        self.say("updates");
        self.rollout.update(version).await
    }

    async fn finalize(self: Box<Self>) -> Result<()> {
        Box::new(self.rollout).finalize().await
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

async fn manager(log: &Log, refuses: bool) -> CheckpointEngineManager {
    let rollouts =
        vec![Logged::prepared("a", log, refuses).await, Logged::prepared("b", log, false).await];
    CheckpointEngineManager::form(backend_naive::BACKEND, trainer().await, rollouts).await.unwrap()
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

#[tokio::test]
async fn rollouts_that_a_dropped_update_has_paused_are_resumed_before_the_next_one() {
    let log = Log::default();
    let mut manager = manager(&log, false).await;
    let never = ensure_async_iterator(futures::stream::pending::<Result<Weight>>());
    {
        let mut update = std::pin::pin!(manager.update_weights(never, Version(1)));
        while !log.lock().unwrap().iter().any(|line| line == "b updates") {
            assert!(futures::poll!(&mut update).is_pending());
        }
    }
    let before = log.lock().unwrap().len();
    manager.resume().await.unwrap();
    assert_eq!(log.lock().unwrap()[before..], ["a resumes with None", "b resumes with None"]);
    manager.resume().await.unwrap();
    assert_eq!(log.lock().unwrap().len(), before + 2, "they were not paused");

    let never = ensure_async_iterator(futures::stream::pending::<Result<Weight>>());
    assert!(futures::poll!(std::pin::pin!(manager.update_weights(never, Version(2)))).is_pending());
    let before = log.lock().unwrap().len();
    manager.update_weights(ensure_async_iterator(model(3)), Version(3)).await.unwrap();
    let log = log.lock().unwrap();
    assert_eq!(log[before..before + 2], ["a resumes with None", "b resumes with None"]);
    assert_eq!(log[log.len() - 2..], ["a resumes with Some(3)", "b resumes with Some(3)"]);
}

/// A trainer and a rollout with a cache, in a group.
async fn with_cache() -> (Box<dyn TrainerEngine>, CachedEngine) {
    let (trainers, rollouts) = (vec![trainer().await], vec![rollout().await]);
    let formed = form_local_group(backend_naive::BACKEND, trainers, rollouts).await.unwrap();
    let (mut trainers, mut rollouts) = formed;
    (trainers.remove(0), CachedEngine::new(rollouts.remove(0)))
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

#[tokio::test]
async fn a_rollout_generates_with_the_old_version_while_a_new_one_arrives_and_then_switches_at_once()
 {
    let (mut trainer, mut rollout) = with_cache().await;
    let cache = rollout.cache();
    let send = trainer.send_weights(ensure_async_iterator(model(1)), Version(1));
    futures::future::try_join(send, rollout.update_cache(None)).await.unwrap();

    // Every weight of the next version looks at what a rollout would generate with just then.
    let during = cache.clone();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sees = Arc::clone(&seen);
    let weights = model(2).into_iter().inspect(move |_| {
        sees.lock().unwrap().push(during.get_weights().unwrap().0);
    });
    let held = cache.get_weights().unwrap();
    let send = trainer.send_weights(ensure_async_iterator(weights), Version(2));
    futures::future::try_join(send, rollout.update_cache(None)).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), [Version(1); 10]);
    assert_eq!(cache.get_weights().unwrap().0, Version(2));

    // Who took the old version before the switch still has all of it.
    let bytes = held.1.map(|weight| weight.unwrap().to_bytes().unwrap());
    let expected: Vec<_> = model(1).iter().map(|weight| weight.to_bytes().unwrap()).collect();
    assert_eq!(bytes.collect::<Vec<_>>().await, expected);
}

#[tokio::test]
async fn a_cache_that_is_further_behind_than_max_staleness_is_refused_until_a_version_is_complete()
{
    let (mut trainer, rollout) = with_cache().await;
    let mut rollout = rollout.with_max_staleness(Some(1));
    let cache = rollout.cache();
    for (version, works) in [(1, true), (2, false), (3, false), (4, true)] {
        let broken = (!works).then(|| Err(std::io::Error::other("disk")));
        let weights = model(version).into_iter().map(Ok).chain(broken);
        let version = Version(version.into());
        let send = trainer.send_weights(ensure_async_iterator(weights), version);
        let (sent, received) = futures::future::join(send, rollout.update_cache(None)).await;
        assert_eq!((sent.is_ok(), received.is_ok()), (works, works), "version {version}");
        match version.0 {
            2 => assert_eq!(cache.get_weights().unwrap().0, Version(1), "one behind is allowed"),
            3 => {
                let error = cache.get_weights().map(|(version, _)| version).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::State);
                assert!(error.to_string().contains("2 updates have begun since the last complete version, the last of them version 3"), "{error}");
                assert_eq!(cache.version(), Some(Version(1)), "an aborted version shows");
            }
            version => assert_eq!(cache.get_weights().unwrap().0, Version(version)),
        }
    }
}

#[tokio::test]
async fn staleness_counts_updates_and_not_the_distance_of_versions_which_may_go_back() {
    let (mut trainer, rollout) = with_cache().await;
    let mut rollout = rollout.with_max_staleness(Some(1));
    for version in [150, 100, 5000] {
        let send = trainer.send_weights(ensure_async_iterator(model(1)), Version(version));
        futures::future::try_join(send, rollout.update_cache(None)).await.unwrap();
        assert_eq!(rollout.get_weights().unwrap().0, Version(version));
    }
    let broken = || {
        let broken = Err(std::io::Error::other("disk"));
        ensure_async_iterator(model(1).into_iter().map(Ok).chain([broken]))
    };
    for (version, is_fresh) in [(9000, true), (1, false)] {
        let send = trainer.send_weights(broken(), Version(version));
        assert!(futures::future::join(send, rollout.update_cache(None)).await.1.is_err());
        assert_eq!(rollout.get_weights().is_ok(), is_fresh, "after version {version} failed");
    }
}

#[tokio::test]
async fn an_update_without_some_of_the_tensors_leaves_the_cached_version_unless_it_is_partial() {
    let (mut trainer, mut rollout) = with_cache().await;
    let mut other = model(2);
    other.truncate(8);
    other.push(Weight::new("new", DType::U8, [1], vec![1]).unwrap());
    let whole = cached_after(&mut trainer, &mut rollout, model(1), 1).await.unwrap();
    for weights in [other.clone(), Vec::new(), model(3).split_off(1)] {
        let error = cached_after(&mut trainer, &mut rollout, weights, 2).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
        assert_eq!(cached(&rollout).await, whole);
    }
    cached_after(&mut trainer, &mut rollout, model(4), 4).await.unwrap();

    let mut rollout = rollout.with_expected(Expected::Partial);
    let (version, merged) = cached_after(&mut trainer, &mut rollout, other, 5).await.unwrap();
    assert_eq!((version, merged.len()), (Version(5), 11));
    let bytes = |weight: &Weight| weight.to_bytes().unwrap().to_vec();
    assert_eq!(merged[..8], model(2)[..8].iter().map(bytes).collect::<Vec<_>>());
    assert_eq!(merged[8], [1]);
    assert_eq!(merged[9..], model(4)[8..].iter().map(bytes).collect::<Vec<_>>());
}

/// What the cache has after an update.
async fn cached_after(
    trainer: &mut Box<dyn TrainerEngine>,
    rollout: &mut CachedEngine,
    weights: Vec<Weight>,
    version: u64,
) -> Result<(Version, Vec<Vec<u8>>)> {
    let send = trainer.send_weights(ensure_async_iterator(weights), Version(version));
    let (sent, received) = futures::future::join(send, rollout.update_cache(None)).await;
    // What a cache refuses, its rank does not confirm.
    assert_eq!(
        sent.map(drop).map_err(|error| error.kind()),
        received.as_ref().map(drop).map_err(Error::kind)
    );
    received?;
    Ok(cached(rollout).await)
}

/// A rollout that generates a token at a time, and notes with which version.
struct Generating {
    rollout: LocalRollout<TensorMap>,
    request: Arc<Mutex<Partial>>,
}

/// A request in flight.
#[derive(Default)]
struct Partial {
    tokens: Vec<u64>,
    active: u64,
    paused: bool,
}

impl Partial {
    fn generate(&mut self, count: usize) {
        assert!(!self.paused, "a token was generated while weights arrive");
        self.tokens.extend(vec![self.active; count]);
    }
}

#[async_trait]
impl RolloutWorker for Generating {
    async fn update(&mut self, version: Version) -> Result<ReceiveReport> {
        assert!(self.request.lock().unwrap().paused, "weights change under a request");
        self.rollout.update(version).await
    }

    async fn finalize(self: Box<Self>) -> Result<()> {
        Box::new(self.rollout).finalize().await
    }

    async fn pause(&mut self) -> Result<()> {
        self.request.lock().unwrap().paused = true;
        Ok(())
    }

    async fn resume(&mut self, active: Option<Version>) -> Result<()> {
        let mut request = self.request.lock().unwrap();
        request.paused = false;
        request.active = active.map_or(request.active, |version| version.0);
        Ok(())
    }
}

#[tokio::test]
async fn a_request_in_flight_is_set_aside_for_an_update_and_goes_on_where_it_was() {
    let request = Arc::new(Mutex::new(Partial::default()));
    let generates = Arc::clone(&request);
    let rollouts = vec![rollout().await.map(|engine| {
        let rollout = LocalRollout::new(engine, TensorMap::new());
        Box::new(Generating { rollout, request: generates }) as Box<dyn RolloutWorker>
    })];
    let trainer = trainer().await;
    let formed = CheckpointEngineManager::form(backend_naive::BACKEND, trainer, rollouts).await;
    let mut manager = formed.unwrap();
    for version in 1..=2 {
        let weights = ensure_async_iterator(model(version));
        manager.update_weights(weights, Version(version.into())).await.unwrap();
        request.lock().unwrap().generate(3);
    }
    assert_eq!(request.lock().unwrap().tokens, [1, 1, 1, 2, 2, 2]);
}

/// A rollout that is gone before it has entered an update.
struct Gone {
    _engine: Box<dyn engine_core::RolloutEngine>,
}

#[async_trait]
impl RolloutWorker for Gone {
    async fn update(&mut self, _: Version) -> Result<ReceiveReport> {
        Err(Error::new(ErrorKind::Io, "calling the rollout", "its actor has died"))
    }

    async fn finalize(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_that_fails_before_it_enters_an_update_ends_it_before_any_deadline() {
    let mut config = CheckpointEngineConfig::new("naive");
    config.timeout_seconds = 600.0;
    let context = || EngineContext::new(config.clone());
    let trainer = backend_naive::BACKEND.prepare_trainer(context()).await.unwrap();
    let other = backend_naive::BACKEND.prepare_rollout(context()).await.unwrap();
    let other = other.map(|engine| {
        Box::new(LocalRollout::new(engine, Fragile::default())) as Box<dyn RolloutWorker>
    });
    let rollout = backend_naive::BACKEND.prepare_rollout(context()).await.unwrap();
    let rollouts =
        vec![other, rollout.map(|_engine| Box::new(Gone { _engine }) as Box<dyn RolloutWorker>)];
    let mut manager =
        CheckpointEngineManager::form(&backend_naive::BACKEND, trainer, rollouts).await.unwrap();
    for version in 1..=2 {
        let weights = ensure_async_iterator(model(1));
        let error = manager.update_weights(weights, Version(version)).await.unwrap_err();
        assert!(error.to_string().contains("its actor has died"), "{error}");
    }
}
