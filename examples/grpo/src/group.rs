//! How a rank joins a group: as in examples/two_processes.rs.

use std::time::Duration;

use checkpoint_engine::config;
use checkpoint_engine::prelude::*;

use crate::Failure;

pub(crate) const RANKS: u32 = 3;
const DEADLINE: Duration = Duration::from_secs(30);

/// A rank's engine, and its connection to the others.
pub(crate) struct Member<E> {
    pub(crate) engine: E,
    control: ControlPlane,
}

impl Member<Box<dyn TrainerEngine>> {
    pub(crate) async fn lead(address: &str, secret: &[u8], config: &str) -> Result<Self, Failure> {
        let at = ControlConfig::new(address.parse()?, Token::new(secret)?);
        let control = ControlPlane::lead(at).await?;
        let config = config::parse(config, config::Format::Json)?;
        let registry = registry();
        let group = form_group(&registry, config, &control).world_size(RANKS).deadline(DEADLINE);
        let (engine, _) = group.trainer().await?;
        Ok(Self { engine, control })
    }

    /// Leaves, whatever state the group is in.
    pub(crate) async fn leave(self) {
        note(self.engine.finalize().await);
        note(self.control.close().await);
    }
}

impl Member<Box<dyn RolloutEngine>> {
    pub(crate) async fn join(address: &str, secret: &[u8], config: &str) -> Result<Self, Failure> {
        let at = ControlConfig::new(address.parse()?, Token::new(secret)?);
        let control = ControlPlane::join(at, Role::Rollout, None).await?;
        let config = config::parse(config, config::Format::Json)?;
        let registry = registry();
        let group = form_group(&registry, config, &control).deadline(DEADLINE);
        let (engine, _) = group.rollout().await?;
        Ok(Self { engine, control })
    }

    /// Leaves, whatever state the group is in.
    pub(crate) async fn leave(self) {
        note(self.engine.finalize().await);
        note(self.control.close().await);
    }
}

fn note(left: Result<()>) {
    if let Err(error) = left {
        eprintln!("leaving a group: {error}");
    }
}
