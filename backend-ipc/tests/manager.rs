//! The manager drives rollouts that lend their tensors as it drives all others.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use backend_ipc::{BACKEND, lend};
use conformance::processes::{address, context, control};
use control_plane::ControlPlane;
use engine_core::{
    CheckpointEngineConfig, DType, Error, ErrorKind, Rank, ReceiveReport, Result, Role, TensorMeta,
    Version, Weight, WeightStream, ensure_async_iterator,
};
use placed::{PlacedRollout, TensorState, Wanted};
use serving::{CheckpointEngineManager, RolloutWorker};

fn config(placed: bool) -> CheckpointEngineConfig {
    let mut config = CheckpointEngineConfig::new("ipc");
    config.timeout_seconds = 60.0;
    if placed {
        config.engine_kwargs.entry("ipc".into()).or_default().insert("placed".into(), true.into());
    }
    config
}

fn meta(name: &str) -> TensorMeta {
    TensorMeta::new(name, DType::U8, [64])
}

fn weight(name: &str, value: u8) -> Weight {
    Weight::new(name, DType::U8, [64], vec![value; 64]).unwrap()
}

/// What was active and what the tensors held, each time that a rollout was resumed.
type Log = Arc<Mutex<Vec<(Option<Version>, TensorState)>>>;

struct Logged(PlacedRollout, Log);

#[async_trait]
impl RolloutWorker for Logged {
    async fn update(&mut self, version: Version) -> Result<ReceiveReport> {
        let report = RolloutWorker::update(&mut self.0, version).await?;
        let expected = [version.0 as u8; 64];
        self.0.read(|tensor| {
            assert_eq!(*tensor.bytes()?, expected);
            Ok(())
        })?;
        Ok(report)
    }

    async fn finalize(self: Box<Self>) -> Result<()> {
        RolloutWorker::finalize(Box::new(self.0)).await
    }

    async fn resume(&mut self, active: Option<Version>) -> Result<()> {
        self.1.lock().unwrap().push((active, self.0.state().clone()));
        Ok(())
    }
}

#[tokio::test]
async fn the_manager_updates_rollouts_that_lend_their_tensors_and_says_when_they_hold_no_version() {
    let at = address();
    let mut planes = vec![ControlPlane::lead(control(at.clone())).await.unwrap()];
    for rank in 1..3 {
        let joined = ControlPlane::join(control(at.clone()), Role::Rollout, Some(Rank(rank)));
        planes.push(joined.await.unwrap());
    }
    let trainer = BACKEND.prepare_trainer(context(&planes[0], config(true))).await.unwrap();
    let log = Log::default();
    let rollouts = planes[1..].iter().map(|plane| {
        let wants = ["a", "b"].map(|name| Wanted::whole(meta(name)));
        let log = log.clone();
        let logged = |rollout| Box::new(Logged(rollout, log)) as Box<dyn RolloutWorker>;
        lend(context(plane, config(false)), wants).unwrap().map(logged)
    });
    let rollouts = rollouts.collect();
    let mut manager = CheckpointEngineManager::form(BACKEND, trainer, rollouts).await.unwrap();

    let model = |version| ensure_async_iterator(["a", "b"].map(|name| weight(name, version)));
    for version in 1..3 {
        let sent = manager.update_weights(model(version), Version(version.into()));
        let (sent, received) = sent.await.unwrap();
        assert_eq!((sent.counts.tensors, received.len()), (2, 2));
    }
    let broken = || Error::new(ErrorKind::Weight, "reading", "the trainer's disk");
    let broken = futures::stream::iter([Ok(weight("a", 3)), Err(broken())]);
    let failed = manager.update_weights(WeightStream::new(broken), Version(3)).await.unwrap_err();
    assert!(failed.to_string().contains("the trainer's disk"), "{failed}");
    manager.update_weights(model(4), Version(4)).await.unwrap();

    let log = std::mem::take(&mut *log.lock().unwrap());
    for (at, (active, state)) in log.into_iter().enumerate() {
        let version = Version(at as u64 / 2 + 1);
        match version {
            // Whether something was written before it failed is a matter of time.
            Version(3) => assert!(
                active.is_none()
                    && (state == TensorState::Active(Version(2))
                        || matches!(state, TensorState::Updating { version, .. } if version == Version(3))),
                "{active:?}, {state:?}"
            ),
            version => assert_eq!((active, state), (Some(version), TensorState::Active(version))),
        }
    }
    manager.finalize().await.unwrap();
}
