//! A trainer process and a rollout process of one host, over shared memory.
//!
//! The trainer starts this program again as the rollout. On a cluster the two would be started by a
//! scheduler, find each other at `HOST:PORT`, and share the token as a file.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use checkpoint_engine::control::{ControlConfig, Token};
use checkpoint_engine::{
    CheckpointEngine, CheckpointEngineConfig, ControlPlane, DType, EngineContext, Error, ErrorKind,
    Result, Role, TensorMap, Version, Weight, ensure_async_iterator, form_group, registry,
};

const UPDATES: u64 = 3;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match std::env::args().nth(1) {
        None => trainer().await,
        Some(address) => rollout(&address).await,
    }
}

async fn trainer() -> Result<()> {
    let token = Token::generate()?;
    let address = format!("unix:@two-processes-{}", std::process::id());
    let config = ControlConfig::new(address.parse()?, token.clone());
    let control = ControlPlane::lead(config).await?;
    let failed = |error| Error::io("starting the rollout", error);
    let program = std::env::current_exe().map_err(failed)?;
    let mut child =
        Command::new(program).arg(&address).stdin(Stdio::piped()).spawn().map_err(failed)?;
    // The secret travels where no other process can read it.
    if let Some(mut input) = child.stdin.take() {
        input.write_all(token.expose()).map_err(failed)?;
    }

    let mut engine = form(&control, Role::Trainer).await?;
    for step in 1..=UPDATES {
        let weights = (0..8).map(|layer| {
            let bytes = vec![step as u8; 512 * 512 * 2];
            Weight::new(format!("layers.{layer}.weight"), DType::BF16, [512, 512], bytes)
        });
        let report = engine.send_weights(ensure_async_iterator(weights), Version(step)).await?;
        eprintln!("version {step}: {:.1} GB/s", report.gb_per_s());
    }
    engine.finalize().await?;
    control.close().await?;
    match child.wait() {
        Ok(status) if status.success() => Ok(()),
        other => {
            let message = format!("it ended with {other:?}");
            Err(Error::new(ErrorKind::Aborted, "running the rollout", message))
        }
    }
}

async fn rollout(address: &str) -> Result<()> {
    let mut secret = Vec::new();
    std::io::stdin()
        .read_to_end(&mut secret)
        .map_err(|error| Error::io("reading the secret", error))?;
    let config = ControlConfig::new(address.parse()?, Token::new(&secret)?);
    let control = ControlPlane::join(config, Role::Rollout, None).await?;
    let mut engine = form(&control, Role::Rollout).await?;
    let mut model = TensorMap::new();
    for step in 1..=UPDATES {
        // Every bucket is copied to its tensors as it arrives; the version is complete after that.
        let received = engine.receive_weights(Some(Version(step))).await?;
        received.install(&mut model).await?;
        assert!(model.iter().all(|(_, bytes)| bytes.iter().all(|&byte| u64::from(byte) == step)));
    }
    engine.finalize().await?;
    control.close().await
}

// ANCHOR: form
/// Prepares an engine, tells the others how to reach it, and joins the group.
async fn form(control: &ControlPlane, role: Role) -> Result<Box<dyn CheckpointEngine>> {
    let config = CheckpointEngineConfig { backend: "ipc".into(), ..Default::default() };
    let registry = registry();
    let context = EngineContext::new(config.clone(), role).with_control(control.clone());
    let mut engine = registry.create(context)?;
    let (backend, deadline) = (registry.get(&config.backend)?, Duration::from_secs(30));
    form_group(&mut *engine, backend, control, 2, serde_json::Value::Null, deadline).await?;
    Ok(engine)
}
// ANCHOR_END: form
