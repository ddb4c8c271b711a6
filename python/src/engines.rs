//! The engines: all that this crate asks of the Rust API.

use std::time::Duration;

use bytes::Bytes;
use checkpoint_engine::control::{Channel, ControlConfig, Event, Token};
use checkpoint_engine::{
    ChannelId, CheckpointEngine, CheckpointEngineConfig, ControlPlane, EngineContext, Rank, Role,
    Version, WeightStream, config, form_group, form_local_group, registry,
};
use engine_core::{Error, ErrorKind, ReceivedWeights, Result, SendReport, WorkerMetadata};

/// A configuration, given as JSON or as the path of a file.
pub(crate) fn read_config(
    json: Option<&str>,
    path: Option<&str>,
) -> Result<CheckpointEngineConfig> {
    match (json, path) {
        (Some(text), _) => config::parse(text, config::Format::Json),
        (None, Some(path)) => config::load(path),
        (None, None) => Ok(CheckpointEngineConfig::default()),
    }
}

pub(crate) fn new_token() -> Result<Vec<u8>> {
    Ok(Token::generate()?.expose().to_vec())
}

pub(crate) fn read_token(path: &str) -> Result<Vec<u8>> {
    Ok(Token::read(path)?.expose().to_vec())
}

/// How a rank reaches its group.
#[derive(Debug)]
pub(crate) struct Reach {
    pub(crate) address: String,
    pub(crate) token: Vec<u8>,
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) heartbeat_timeout: Option<Duration>,
}

impl Reach {
    fn config(self) -> Result<ControlConfig> {
        let mut config = ControlConfig::new(self.address.parse()?, Token::new(&self.token)?);
        if let Some(timeout) = self.connect_timeout {
            config.connect_timeout = timeout;
        }
        if let Some(timeout) = self.heartbeat_timeout {
            config.heartbeat_timeout = timeout;
            config.heartbeat_interval = config.heartbeat_interval.min(timeout / 4);
        }
        Ok(config)
    }
}

/// A rank's connection to its group.
#[derive(Clone, Debug)]
pub(crate) struct Control(ControlPlane);

impl Control {
    pub(crate) async fn lead(reach: Reach) -> Result<Self> {
        ControlPlane::lead(reach.config()?).await.map(Self)
    }

    pub(crate) async fn join(reach: Reach, trainer: bool, rank: Option<u32>) -> Result<Self> {
        let role = if trainer { Role::Trainer } else { Role::Rollout };
        ControlPlane::join(reach.config()?, role, rank.map(Rank)).await.map(Self)
    }

    pub(crate) fn address(&self) -> String {
        self.0.address().to_string()
    }

    pub(crate) fn rank(&self) -> u32 {
        self.0.rank().0
    }

    pub(crate) fn is_trainer(&self) -> bool {
        self.0.role() == Role::Trainer
    }

    /// The ranks of the group: on the leader those that live.
    pub(crate) fn ranks(&self) -> Vec<u32> {
        self.0.peers().iter().map(|peer| peer.rank.0).collect()
    }

    pub(crate) async fn barrier(&self, name: &str, deadline: Duration) -> Result<()> {
        self.0.barrier(name, deadline).await
    }

    pub(crate) async fn close(self) -> Result<()> {
        self.0.close().await
    }

    /// The program's own channel of this number, counted from 0.
    pub(crate) fn channel(&self, number: u16) -> Result<Messages> {
        let id = ChannelId::FIRST_FREE.0.checked_add(number).map(ChannelId);
        let refuse =
            || Error::new(ErrorKind::Config, "opening a channel", "the number is too large");
        Ok(Messages(self.0.channel(id.ok_or_else(refuse)?)))
    }
}

/// A channel for a program's own messages.
#[derive(Debug)]
pub(crate) struct Messages(Channel);

impl Messages {
    pub(crate) fn send(&self, to: u32, body: Vec<u8>) -> Result<()> {
        self.0.send(Rank(to), Bytes::from(body))
    }

    /// The next message and its sender; `None` when the deadline passes.
    pub(crate) async fn recv(&self, deadline: Duration) -> Result<Option<(u32, Bytes)>> {
        loop {
            match self.0.recv(deadline).await? {
                Some(Event::Message { from, body }) => return Ok(Some((from.0, body))),
                Some(Event::Lost { error, .. }) => return Err(error.into()),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }
}

/// One rank's engine, in its group.
pub(crate) struct Engine {
    engine: Box<dyn CheckpointEngine>,
}

impl Engine {
    /// Prepares an engine, exchanges metadata, and joins; ends when `world_size` ranks are there.
    pub(crate) async fn form(
        control: &Control,
        config: CheckpointEngineConfig,
        world_size: u32,
        attributes: serde_json::Value,
        deadline: Duration,
    ) -> Result<(Self, Vec<WorkerMetadata>)> {
        let registry = registry();
        let backend = registry.get(&config.backend)?;
        let context = EngineContext::new(config, control.0.role()).with_control(control.0.clone());
        let mut engine = registry.create(context)?;
        let formed =
            form_group(&mut *engine, backend, &control.0, world_size, attributes, deadline).await?;
        Ok((Self { engine }, formed.peers.to_vec()))
    }

    /// A trainer and its rollouts within this process.
    pub(crate) async fn form_local(
        config: CheckpointEngineConfig,
        rollouts: usize,
    ) -> Result<(Self, Vec<Self>)> {
        let registry = registry();
        let backend = registry.get(&config.backend)?;
        let make = |role, rank| {
            let mut context = EngineContext::new(config.clone(), role);
            context.rank = Some(Rank(rank));
            registry.create(context)
        };
        let mut engines = vec![make(Role::Trainer, 0)?];
        for rank in 1..=rollouts {
            let rank = u32::try_from(rank).unwrap_or(u32::MAX);
            engines.push(make(Role::Rollout, rank)?);
        }
        let mut all: Vec<&mut dyn CheckpointEngine> = Vec::with_capacity(engines.len());
        for engine in &mut engines {
            all.push(&mut **engine);
        }
        form_local_group(&mut all, backend).await?;
        let trainer = Self { engine: engines.remove(0) };
        Ok((trainer, engines.into_iter().map(|engine| Self { engine }).collect()))
    }

    pub(crate) async fn send(
        &mut self,
        weights: WeightStream<'_>,
        version: u64,
    ) -> Result<SendReport> {
        self.engine.send_weights(weights, Version(version)).await
    }

    pub(crate) async fn receive(&mut self, version: Option<u64>) -> Result<ReceivedWeights<'_>> {
        self.engine.receive_weights(version.map(Version)).await
    }

    pub(crate) async fn finalize(mut self) -> Result<()> {
        self.engine.finalize().await
    }
}
