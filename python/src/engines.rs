//! The engines: all that this crate asks of the Rust API.

use std::time::Duration;

use bytes::Bytes;
use checkpoint_engine::control::{Channel, ControlConfig, Event, Token};
use checkpoint_engine::placed::{LentTensor, PlacedRollout, TensorState};
use checkpoint_engine::{
    ChannelId, CheckpointEngineConfig, ControlPlane, EngineContext, Rank, Role, RolloutEngine,
    TrainerEngine, Version, WeightStream, config, form_group, form_local_group, join_group,
    registry,
};
use engine_core::{
    Error, ErrorKind, ReceiveReport, ReceivedWeights, Result, SendReport, WorkerMetadata,
};

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

/// One rank's engine, in its group. Python has a class for each.
pub(crate) enum Engine {
    Trainer(Box<dyn TrainerEngine>),
    Rollout(Box<dyn RolloutEngine>),
    /// A rollout that lends its tensors.
    Lends(Box<PlacedRollout>),
}

impl Engine {
    /// Prepares an engine, exchanges metadata, and joins; ends when so many ranks are there as the leader says.
    pub(crate) async fn form(
        control: &Control,
        config: CheckpointEngineConfig,
        world_size: Option<u32>,
        attributes: serde_json::Value,
        deadline: Duration,
    ) -> Result<(Self, Vec<WorkerMetadata>)> {
        let registry = registry();
        let group = form_group(&registry, config, &control.0)
            .world_size(world_size)
            .attributes(attributes)
            .deadline(deadline);
        let (engine, place) = match control.0.role() {
            Role::Trainer => group.trainer().await.map(|(one, place)| (Self::Trainer(one), place)),
            Role::Rollout => group.rollout().await.map(|(one, place)| (Self::Rollout(one), place)),
        }?;
        Ok((engine, place.peers.to_vec()))
    }

    /// The same, of a rollout that lends these tensors.
    pub(crate) async fn lend(
        control: &Control,
        config: CheckpointEngineConfig,
        tensors: Vec<LentTensor>,
        world_size: Option<u32>,
        attributes: serde_json::Value,
        deadline: Duration,
    ) -> Result<(Self, Vec<WorkerMetadata>)> {
        const WHAT: &str = "lending tensors";
        let refuse = |message: String| Err(Error::new(ErrorKind::Config, WHAT, message));
        if control.0.role() != Role::Rollout {
            return refuse("a trainer lends nothing".into());
        }
        let registry = registry();
        let backend = registry.get(&config.backend)?;
        let context = EngineContext::new(config).with_control(control.0.clone());
        let prepared =
            checkpoint_engine::lend_tensors(context, tensors)?.with_attributes(attributes);
        let (engine, place) =
            join_group(prepared, backend, &control.0, world_size, deadline).await?;
        Ok((Self::Lends(Box::new(engine)), place.peers.to_vec()))
    }

    /// A trainer and its rollouts within this process.
    pub(crate) async fn form_local(
        config: CheckpointEngineConfig,
        rollouts: usize,
    ) -> Result<(Self, Vec<Self>)> {
        let registry = registry();
        let backend = registry.get(&config.backend)?;
        let context = |rank| EngineContext::new(config.clone()).with_rank(Rank(rank));
        let leads = registry.prepare_trainer(context(0)).await?;
        let mut receive = Vec::new();
        for rank in (1..=u32::MAX).take(rollouts) {
            receive.push(registry.prepare_rollout(context(rank)).await?);
        }
        let (mut trainers, rollouts) = form_local_group(backend, vec![leads], receive).await?;
        let trainer = Self::Trainer(trainers.remove(0));
        Ok((trainer, rollouts.into_iter().map(Self::Rollout).collect()))
    }

    pub(crate) async fn send(
        &mut self,
        weights: WeightStream<'_>,
        version: u64,
        part: bool,
    ) -> Result<SendReport> {
        let version = Version(version);
        match self {
            Self::Trainer(engine) if part => engine.send_part(weights, version).await,
            Self::Trainer(engine) => engine.send_weights(weights, version).await,
            Self::Rollout(_) | Self::Lends(_) => Err(other_side("sending weights", "rollout")),
        }
    }

    pub(crate) async fn attest(&mut self) -> Result<SendReport> {
        match self {
            Self::Trainer(engine) => engine.attest().await,
            Self::Rollout(_) | Self::Lends(_) => Err(other_side("attesting a version", "rollout")),
        }
    }

    pub(crate) async fn receive(&mut self, version: Option<u64>) -> Result<ReceivedWeights<'_>> {
        match self {
            Self::Rollout(engine) => engine.receive_weights(version.map(Version)).await,
            Self::Trainer(_) => Err(other_side("receiving weights", "trainer")),
            Self::Lends(_) => {
                Err(other_side("receiving weights", "rollout that lends its tensors"))
            }
        }
    }

    /// Takes part in an update of the tensors that it lends.
    pub(crate) async fn update(&mut self, version: Option<u64>) -> Result<ReceiveReport> {
        match self {
            Self::Lends(engine) => engine.update(version.map(Version)).await,
            _ => Err(other_side("updating", "rank that lends no tensors")),
        }
    }

    /// What its tensors hold, if it lends some.
    pub(crate) fn state(&self) -> Option<&TensorState> {
        match self {
            Self::Lends(engine) => Some(engine.state()),
            _ => None,
        }
    }

    pub(crate) async fn finalize(self) -> Result<()> {
        match self {
            Self::Trainer(engine) => engine.finalize().await,
            Self::Rollout(engine) => engine.finalize().await,
            Self::Lends(engine) => engine.finalize().await,
        }
    }
}

fn other_side(operation: &str, role: &str) -> Error {
    Error::new(ErrorKind::State, operation, format!("this rank is a {role}"))
}
