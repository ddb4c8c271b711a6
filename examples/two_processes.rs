//! A trainer process and a rollout process of one host, over shared memory.
//!
//! The trainer starts this program again as the rollout. On a cluster the two would be started by a
//! scheduler, find each other at `HOST:PORT`, and share the token as a file.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use checkpoint_engine::control::Event;
use checkpoint_engine::prelude::*;
use checkpoint_engine::{Channel, ChannelId};

const UPDATES: u64 = 3;
const DEADLINE: Duration = Duration::from_secs(30);

// ANCHOR: channel
/// The channel on which rollouts say how well a version does.
const REWARDS: ChannelId = ChannelId::FIRST_FREE;
// ANCHOR_END: channel

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

    // ANCHOR: form
    // Prepares an engine, tells the other rank how to reach it, and joins the group of two.
    let config = CheckpointEngineConfig::new("ipc");
    let group = form_group(&registry(), config, &control).world_size(2).trainer().await?;
    let (mut engine, _place) = group;
    // ANCHOR_END: form
    let rewards = control.channel(REWARDS);
    for step in 1..=UPDATES {
        let weights = (0..8).map(|layer| {
            let bytes = vec![step as u8; 512 * 512 * 2];
            Weight::new(format!("layers.{layer}.weight"), DType::BF16, [512, 512], bytes)
        });
        let report = engine.send_weights(ensure_async_iterator(weights), Version(step)).await?;
        let reward = next_reward(&rewards).await?;
        eprintln!("version {step}: {:.1} GB/s, reward {reward}", report.gb_per_s());
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

// ANCHOR: hear
/// Waits for what a rollout says; news of ranks that come and go arrive on the same channel.
async fn next_reward(rewards: &Channel) -> Result<f32> {
    let refuse = |kind, why: &str| Err(Error::new(kind, "waiting for a reward", why));
    match rewards.recv(DEADLINE).await? {
        Some(Event::Message { from, body }) => match body[..].try_into() {
            Ok(reward) => Ok(f32::from_le_bytes(reward)),
            Err(_) => refuse(ErrorKind::Protocol, "it is no number").map_err(|e| e.rank(from)),
        },
        Some(Event::Lost { error, .. }) => Err(error.into()),
        Some(event) => refuse(ErrorKind::PeerLost, &format!("{event:?}")),
        None => refuse(ErrorKind::Timeout, "no rollout has said anything"),
    }
}
// ANCHOR_END: hear

async fn rollout(address: &str) -> Result<()> {
    let mut secret = Vec::new();
    std::io::stdin()
        .read_to_end(&mut secret)
        .map_err(|error| Error::io("reading the secret", error))?;
    let config = ControlConfig::new(address.parse()?, Token::new(&secret)?);
    let control = ControlPlane::join(config, Role::Rollout, None).await?;
    let config = CheckpointEngineConfig::new("ipc");
    // The trainer alone has to know how many ranks there are.
    let (mut engine, _place) = form_group(&registry(), config, &control).rollout().await?;
    let rewards = control.channel(REWARDS);
    let mut model = TensorMap::new();
    for step in 1..=UPDATES {
        // Every bucket is copied to its tensors as it arrives; the version is complete after that.
        let received = engine.receive_weights(Some(Version(step))).await?;
        received.install(&mut model).await?;
        assert!(model.iter().all(|(_, bytes)| bytes.iter().all(|&byte| u64::from(byte) == step)));
        // ANCHOR: say
        let reward = step as f32 / UPDATES as f32;
        rewards.send(Rank::LEADER, Bytes::copy_from_slice(&reward.to_le_bytes()))?;
        // ANCHOR_END: say
    }
    engine.finalize().await?;
    control.close().await
}
