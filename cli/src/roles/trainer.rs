//! A trainer that runs updates, and what a trainer's process other than the leader's does.

use std::time::{Duration, Instant};

use checkpoint_engine::control::ControlConfig;
use checkpoint_engine::{
    CheckpointEngineConfig, ControlPlane, Error, ErrorKind, Rank, Registry, Result, Role,
    SendReport, TrainerEngine, Version, WeightStream, ensure_async_iterator, form_group, registry,
};

use super::parent::Parent;
use crate::device;
use crate::placed::{Placing, Shard};
use crate::source::{Source, SourceSpec, Weights};

/// A trainer that leads its group: what `sync` and `trainer` have in common.
#[derive(Debug)]
pub struct Trainer {
    /// Its engine, in a group.
    pub engine: Box<dyn TrainerEngine>,
    /// Where the weights come from.
    pub source: Source,
    /// What it holds of them; without this, whole tensors.
    pub shard: Option<Shard>,
    /// Whether each version is attested when all rollouts have it.
    pub attests: bool,
}

/// Weights of a source, or what one trainer holds of them.
///
/// # Errors
///
/// Those of the source.
pub fn stream<'a>(weights: Weights, shard: Option<&'a Shard>) -> WeightStream<'a> {
    let Some(shard) = shard else { return ensure_async_iterator(weights) };
    ensure_async_iterator(weights.flat_map(move |weight| {
        let (boxes, failed) = match weight.and_then(|weight| shard.of(weight)) {
            Ok(boxes) => (boxes, None),
            Err(error) => (Vec::new(), Some(Err(error))),
        };
        boxes.into_iter().map(Ok).chain(failed)
    }))
}

/// How long the trainer waits for those who still read the weights of the version before.
const IN_USE: Duration = Duration::from_secs(30);

impl Trainer {
    /// Runs one update.
    ///
    /// # Errors
    ///
    /// Why it failed.
    pub async fn update(&mut self, version: Version) -> Result<SendReport> {
        let until = Instant::now() + IN_USE;
        loop {
            match self.source.advance(version) {
                // Rollouts let go of an update that failed a little later than the trainer.
                Err(error) if error.kind() == ErrorKind::State && Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                advanced => break advanced?,
            }
        }
        let weights = self.source.weights(version)?;
        let spec = self.source.spec();
        let weights = stream(spec.sent(weights, version), self.shard.as_ref());
        match spec.is_part(version) {
            true => self.engine.send_part(weights, version).await,
            false => self.engine.send_weights(weights, version).await,
        }
    }

    /// Attests the version that all rollouts have now, if that is asked for. Returns the report of that.
    ///
    /// # Errors
    ///
    /// Those of [`TrainerEngine::attest`].
    pub async fn attest(&mut self) -> Result<Option<SendReport>> {
        match self.attests {
            true => self.engine.attest().await.map(Some),
            false => Ok(None),
        }
    }
}

/// What a trainer process other than the leader was started with.
#[derive(Clone, Debug)]
pub struct CoTrainerOptions {
    /// Where the leader is.
    pub control: ControlConfig,
    /// The rank to take.
    pub rank: Rank,
    /// The number of ranks of the group.
    pub world_size: u32,
    /// The engine's configuration.
    pub config: CheckpointEngineConfig,
    /// The model, the same as the leader's.
    pub source: SourceSpec,
    /// Who has which part of it, if not all have all.
    pub placing: Option<Placing>,
    /// Whether the weights stay the same from one update to the next.
    pub still: bool,
    /// Whether the leader's process has started this one.
    pub is_child: bool,
}

/// A trainer process other than the leader: takes part in all of the leader's updates. Whether it took part in the last
/// one; if not, the leader's process says why.
///
/// # Errors
///
/// Those of the group; an update that failed is reported to `failed` and the next one waited for.
pub async fn co_trainer(options: CoTrainerOptions, mut failed: impl FnMut(&Error)) -> Result<bool> {
    let parent = Parent::new(options.is_child);
    let registry: Registry = registry();
    let control = ControlPlane::join(options.control, Role::Trainer, Some(options.rank)).await?;
    let device = device::of_rank(&options.config.device, options.rank.0)?;
    let mut source = Source::open(options.source.clone())?.on_device(&device);
    source.advance(Version(1))?;
    let mut config = options.config;
    config.device = device;
    let group = form_group(&registry, config, &control).world_size(options.world_size);
    let (engine, _) = group.trainer().await?;
    let placing = options.placing.as_ref();
    let shard = placing.map(|placing| placing.shard(&source, options.rank)).transpose()?;
    // Only the leader attests.
    let mut trainer = Trainer { engine, source, shard, attests: false };
    for version in (1..=options.source.updates).map(Version) {
        let result = if options.still {
            let weights = stream(trainer.source.weights(Version(1))?, trainer.shard.as_ref());
            trainer.engine.send_weights(weights, version).await
        } else {
            trainer.update(version).await
        };
        match result {
            Ok(_) => {}
            // Without a leader there is no next update.
            Err(error) if error.says_trainer_is_gone() => {
                return if parent.is_there().await { Ok(false) } else { Err(error) };
            }
            Err(error) if parent.tells(&error) => {}
            Err(error) => failed(&error),
        }
    }
    trainer.engine.finalize().await?;
    control.close().await?;
    Ok(true)
}
