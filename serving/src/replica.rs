//! A rollout that keeps the last complete version, whatever happens to its trainer.

use std::future::Future;
use std::time::Duration;

use control_plane::{Address, ControlConfig, ControlPlane, form_group};
use engine_core::{
    CheckpointEngineConfig, Error, ErrorKind, Placement, Rank, Recovery, Registry, Result, Role,
    RolloutEngine, Version, clock,
};
use futures::future::{Either, select};
use tracing::{info, warn};

use crate::{Holder, Newcomer, WeightCache};

/// The pause before a trainer is looked for again.
const PAUSE: Duration = Duration::from_millis(500);

/// A rollout that receives every update into a cache, for an inference server that reads the cache when it likes.
///
/// It does what such a server would otherwise have to do itself: it joins the group,
/// takes the current version over from a rollout
/// that [holds](Self::holding) it, receives, continues after a failed update, and joins a new group when its trainer
/// was lost. During all this the cache has the last complete version.
///
/// # Examples
///
/// ```no_run
/// # use control_plane::ControlConfig;
/// # use engine_core::{CheckpointEngineConfig, Registry, Result};
/// # use serving::Replica;
/// # async fn example(registry: Registry, config: CheckpointEngineConfig, at: ControlConfig) -> Result<()> {
/// let replica = Replica::new(registry, config, at);
/// let cache = replica.cache();
/// tokio::spawn(replica.run(|heard| match heard {
///     Ok(version) => println!("version {version} is here"),
///     Err(error) => println!("still the version before: {error}"),
/// }));
/// // For each request:
/// let current = cache.current()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Replica {
    registry: Registry,
    config: CheckpointEngineConfig,
    at: ControlConfig,
    rank: Option<Rank>,
    cache: WeightCache,
    hold: Option<Address>,
    outlives_trainers: bool,
}

/// How the time in a group has ended.
enum Ended {
    /// The trainer left in order.
    InOrder,
    /// Another group is needed.
    Lost,
}

impl Replica {
    /// A rollout of the trainer at an address, with a backend and a configuration.
    pub fn new(registry: Registry, config: CheckpointEngineConfig, at: ControlConfig) -> Self {
        let cache = WeightCache::default().with_max_staleness(config.max_staleness);
        Self { registry, config, at, rank: None, cache, hold: None, outlives_trainers: false }
    }

    /// Takes this rank each time it joins, rather than one that the trainer gives.
    #[must_use]
    pub fn with_rank(mut self, rank: Rank) -> Self {
        self.rank = Some(rank);
        self
    }

    /// Keeps versions in this cache.
    #[must_use]
    pub fn with_cache(mut self, cache: WeightCache) -> Self {
        self.cache = cache;
        self
    }

    /// Gives the cached version, at this address, to rollouts that join later: they need not wait for the trainer's next
    /// update. Port 0 chooses one.
    #[must_use]
    pub fn holding(mut self, address: Address) -> Self {
        self.hold = Some(address);
        self
    }

    /// Waits for another trainer when one has left in order, rather than to end.
    #[must_use]
    pub fn outliving_trainers(mut self) -> Self {
        self.outlives_trainers = true;
        self
    }

    /// The cache, for the inference server to read.
    pub fn cache(&self) -> WeightCache {
        self.cache.clone()
    }

    /// Stays up to date until the trainer leaves in order. `heard` is called for every complete version, and for
    /// every failure, after which the cache still has the version before.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the group, and aborts an update that is under way.
    ///
    /// # Errors
    ///
    /// Errors that do not go away by trying again:
    /// `Config`, `Backend`, `Authentication`, `Protocol`, and `Mismatch` of forming the
    /// group.
    pub async fn run(self, heard: impl FnMut(&Result<Version>) + Send) -> Result<()> {
        let Some(address) = self.hold.clone() else {
            return self.follow(serde_json::Value::Null, None, heard).await;
        };
        let mut at = self.at.clone();
        at.address = address;
        let backend = self.registry.get(&self.config.backend)?.clone();
        let holder = Holder::listen(self.cache(), backend, self.config.clone(), at).await?;
        let own = holder.address().clone();
        let following = self.follow(holder.announcement(), Some(own), heard);
        match select(std::pin::pin!(following), std::pin::pin!(holder.run())).await {
            Either::Left((ended, _)) => ended,
            Either::Right((failed, _)) => failed,
        }
    }

    async fn follow(
        &self,
        announcement: serde_json::Value,
        own: Option<Address>,
        mut heard: impl FnMut(&Result<Version>) + Send,
    ) -> Result<()> {
        loop {
            let ended = match self.join(announcement.clone()).await {
                Ok((control, mut engine, place)) => {
                    if let Some(version) = self.take_over(&mut *engine, &place, own.as_ref()).await
                    {
                        heard(&Ok(version));
                    }
                    let ended = self.receive(&mut *engine, &mut heard).await;
                    note(engine.finalize()).await;
                    note(control.close()).await;
                    ended
                }
                Err(error) if is_for_good(&error) => return Err(error),
                Err(error) => {
                    heard(&Err(error));
                    Ended::Lost
                }
            };
            if matches!(ended, Ended::InOrder) && !self.outlives_trainers {
                return Ok(());
            }
            clock::sleep(PAUSE).await;
        }
    }

    async fn join(
        &self,
        announcement: serde_json::Value,
    ) -> Result<(ControlPlane, Box<dyn RolloutEngine>, Placement)> {
        let control = ControlPlane::join(self.at.clone(), Role::Rollout, self.rank).await?;
        let group = form_group(&self.registry, self.config.clone(), &control);
        let (engine, place) = group.attributes(announcement).rollout().await?;
        info!(rank = %place.rank, "in the trainer's group");
        Ok((control, engine, place))
    }

    /// Gets a version that another rollout holds and that is newer than what is here.
    async fn take_over(
        &self,
        engine: &mut dyn RolloutEngine,
        place: &Placement,
        own: Option<&Address>,
    ) -> Option<Version> {
        for address in Newcomer::holders(&place.peers) {
            if Some(&address) == own {
                continue;
            }
            match self.take_over_from(engine, address).await {
                Ok(None) => {}
                Ok(Some(version)) => return Some(version),
                Err(error) => warn!(%error, "a rollout did not give the version that it holds"),
            }
        }
        None
    }

    async fn take_over_from(
        &self,
        engine: &mut dyn RolloutEngine,
        address: Address,
    ) -> Result<Option<Version>> {
        let mut at = self.at.clone();
        at.address = address;
        let backend = self.registry.get(&self.config.backend)?;
        let Some(mut newcomer) = Newcomer::join(backend, self.config.clone(), at).await? else {
            return Ok(None);
        };
        let is_newer = self.cache.version().is_none_or(|version| version < newcomer.version());
        let version = match is_newer {
            true => {
                let received = engine.adopt(newcomer.receive().await?);
                Some(self.cache.take_over(received).await?)
            }
            false => None,
        };
        newcomer.leave().await?;
        Ok(version)
    }

    async fn receive(
        &self,
        engine: &mut dyn RolloutEngine,
        heard: &mut (impl FnMut(&Result<Version>) + Send),
    ) -> Ended {
        loop {
            let received = match engine.receive_weights(None).await {
                // The trainer is at something else.
                Err(error) if error.kind() == ErrorKind::Timeout => continue,
                received => received,
            };
            let result = match received {
                Ok(received) => self.cache.fill(received).await,
                Err(error) => Err(error),
            };
            match &result {
                Err(error) if error.kind() == ErrorKind::TrainerLeft => return Ended::InOrder,
                Err(error) if error.report().recovery == Recovery::Reconnect => {
                    heard(&result);
                    return Ended::Lost;
                }
                _ => heard(&result),
            }
        }
    }
}

/// Whether another try would fail as well.
fn is_for_good(error: &Error) -> bool {
    use ErrorKind::{Authentication, Backend, Config, Mismatch, Protocol};
    matches!(error.kind(), Config | Backend | Authentication | Protocol | Mismatch)
}

async fn note(left: impl Future<Output = Result<()>>) {
    if let Err(error) = left.await {
        warn!(%error, "leaving a group");
    }
}
