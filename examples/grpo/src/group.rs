//! How a rank joins a group: as in examples/two_processes.rs.

use std::time::Duration;

use checkpoint_engine::control::{ControlConfig, Token};
use checkpoint_engine::{
    CheckpointEngine, ControlPlane, EngineContext, Role, config, form_group, registry,
};

use crate::Failure;

pub(crate) const RANKS: u32 = 3;
const DEADLINE: Duration = Duration::from_secs(30);

/// A rank's engine and its place in a group.
pub(crate) struct Member {
    pub(crate) engine: Box<dyn CheckpointEngine>,
    control: ControlPlane,
}

impl Member {
    pub(crate) async fn join(
        address: &str,
        secret: &[u8],
        config: &str,
        role: Role,
    ) -> Result<Self, Failure> {
        let place = ControlConfig::new(address.parse()?, Token::new(secret)?);
        let control = match role {
            Role::Trainer => ControlPlane::lead(place).await?,
            Role::Rollout => ControlPlane::join(place, role, None).await?,
        };
        let config = config::parse(config, config::Format::Json)?;
        let registry = registry();
        let context = EngineContext::new(config.clone(), role).with_control(control.clone());
        let mut engine = registry.create(context)?;
        let backend = registry.get(&config.backend)?;
        let nothing = serde_json::Value::Null;
        form_group(&mut *engine, backend, &control, RANKS, nothing, DEADLINE).await?;
        Ok(Self { engine, control })
    }

    /// Leaves, whatever state the group is in.
    pub(crate) async fn leave(mut self) {
        if let Err(error) = self.engine.finalize().await {
            eprintln!("leaving a group: {error}");
        }
        drop(self.engine);
        if let Err(error) = self.control.close().await {
            eprintln!("leaving a group: {error}");
        }
    }
}
