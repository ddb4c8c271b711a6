//! Engines, deadlines and the control plane on an executor that is not tokio's.

use std::time::Duration;

use backend_ipc::BACKEND;
use control_plane::{ControlConfig, ControlPlane, Token, form_group};
use engine_core::{
    CheckpointEngineConfig, DType, ErrorKind, Registry, Result, Role, TensorMap, Version, Weight,
    ensure_async_iterator,
};
use futures::executor::block_on;

const DEADLINE: Duration = Duration::from_secs(30);

fn config() -> CheckpointEngineConfig {
    let mut config = CheckpointEngineConfig::new("ipc");
    config.update_weights_bucket_megabytes = Some(1);
    config.timeout_seconds = 1.0;
    config
}

async fn trainer(at: ControlConfig) -> Result<()> {
    let control = ControlPlane::lead(at).await?;
    let registry = Registry::new().with(BACKEND);
    let group = form_group(&registry, config(), &control).world_size(2).deadline(DEADLINE);
    let (mut engine, _) = group.trainer().await?;
    let weights = [Weight::new("w", DType::U8, [3 << 20], vec![7; 3 << 20])];
    engine.send_weights(ensure_async_iterator(weights), Version(1)).await?;
    engine.finalize().await
}

async fn rollout(at: ControlConfig) -> Result<()> {
    let control = ControlPlane::join(at, Role::Rollout, None).await?;
    let registry = Registry::new().with(BACKEND);
    let group = form_group(&registry, config(), &control).deadline(DEADLINE);
    let (mut engine, _) = group.rollout().await?;
    let mut model = TensorMap::new();
    engine.receive_weights(None).await?.install(&mut model).await?;
    assert!(model.iter().all(|(_, bytes)| bytes.iter().all(|&byte| byte == 7)));
    // Nothing comes any more: a deadline ends this, or the trainer's leaving.
    let error = engine.receive_weights(None).await.expect_err("there is no second update");
    assert!(matches!(error.kind(), ErrorKind::Timeout | ErrorKind::TrainerLeft), "{error}");
    Ok(())
}

#[test]
fn an_update_runs_on_an_executor_that_is_not_tokios() {
    let address = format!("unix:@executor-{}", std::process::id());
    let token = Token::generate().expect("a token");
    let at = ControlConfig::new(address.parse().expect("an address"), token);
    let there = at.clone();
    let rollout = std::thread::spawn(move || block_on(rollout(there)));
    block_on(trainer(at)).expect("the trainer's update");
    rollout.join().expect("no panic").expect("the rollout's update");
}
