//! The current version for a rollout that joins late: from one that holds it, while the trainer is
//! busy with something else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use control_plane::{
    Address, Channel, ChannelId, Control, ControlConfig, ControlPlane, Event, Role, UPDATES,
};
use engine_core::{
    Backend, CheckpointEngineConfig, EngineContext, Error, ErrorKind, Parts, Placement, Rank,
    ReceivedWeights, Result, RolloutEngine, SendReport, Version, WorkerMetadata, clock,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use crate::WeightCache;

/// What a holder and a newcomer say to each other, beside the messages of the update.
const HANDOVER: ChannelId = ChannelId(1);

/// A wait for somebody who may never come; it begins anew.
const LONG: Duration = Duration::from_secs(3600);
/// The pause before a holder that serves somebody else is asked again.
const PAUSE: Duration = Duration::from_millis(20);

/// A rollout's offer of its cached version to newcomers.
///
/// For a newcomer, the holder is a trainer, and the two of them are a group of their own, with a
/// control plane and an engine of their own: the transport's, of any kind, and all of its guarantees.
/// The trainer takes no part. It costs two buckets on either side while it lasts. Newcomers are
/// served one after the other.
///
/// The holder listens at an address that others learn from its metadata
/// ([`announcement`](Self::announcement)), and a newcomer, which gets the metadata of all when it joins the
/// group, finds it by [`Newcomer::holders`].
///
/// # Examples
///
/// ```
/// # use std::sync::Arc;
/// # use control_plane::{ControlConfig, Token};
/// # use engine_core::{Backend, CheckpointEngineConfig, Result};
/// # use serving::{CachedEngine, Holder, Newcomer, WeightCache};
/// # async fn example(
/// #     backend: Arc<dyn Backend>, config: CheckpointEngineConfig, token: Token, late: WeightCache,
/// # ) -> Result<()> {
/// // On a rollout, before it joins, so that it can tell the others of it:
/// let cache = WeightCache::default();
/// let at = ControlConfig::new("10.0.0.2:0".parse()?, token.clone());
/// let holder = Holder::listen(cache.clone(), backend.clone(), config.clone(), at).await?;
/// let (address, announcement) = (holder.address().clone(), holder.announcement());
/// tokio::spawn(holder.run());
/// // It joins with `announcement` among its attributes, and fills the cache: `CachedEngine::with_cache(engine, cache)`.
///
/// // On a rollout that has joined the group and does not want to wait for the next update:
/// let at = ControlConfig::new(address, token);
/// if let Some(mut newcomer) = Newcomer::join(&*backend, config, at).await? {
///     late.take_over(newcomer.receive().await?).await?;
///     newcomer.leave().await?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Holder {
    cache: WeightCache,
    backend: Arc<dyn Backend>,
    config: CheckpointEngineConfig,
    at: ControlConfig,
    control: Option<ControlPlane>,
}

/// What a holder tells a newcomer first.
#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    version: Option<Version>,
    /// The names of the version's parts that are here; `None` if all are.
    #[serde(default)]
    parts: Option<Vec<String>>,
}

impl Holder {
    /// The attribute of a rank's metadata that says where it gives the version that it holds; see
    /// [`announcement`](Self::announcement).
    pub const ATTRIBUTE: &str = "holds";

    /// Listens for newcomers, who are [served](Self::run) from then on what `cache` has.
    ///
    /// The weights travel as they are in the cache; `config` decides on buckets, digests, deadlines
    /// and the transport's options.
    ///
    /// # Errors
    ///
    /// Those of [`ControlPlane::lead`].
    pub async fn listen(
        cache: WeightCache,
        backend: Arc<dyn Backend>,
        config: CheckpointEngineConfig,
        at: ControlConfig,
    ) -> Result<Self> {
        let control = lead(at.clone()).await?;
        // Port 0 is a port now, and has to be the same whenever this listens again.
        let mut at = at;
        at.address = control.address().clone();
        Ok(Self { cache, backend, config, at, control: Some(control) })
    }

    /// Where newcomers find it.
    pub fn address(&self) -> &Address {
        &self.at.address
    }

    /// What this rank tells the others of itself, for
    /// [`Prepared::with_attributes`](engine_core::Prepared::with_attributes).
    pub fn announcement(&self) -> serde_json::Value {
        serde_json::json!({ Self::ATTRIBUTE: self.at.address.to_string() })
    }

    /// Serves newcomers for as long as it can listen. A newcomer that fails, or that comes before there is a version,
    /// does not affect others.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends it; a newcomer that is being served gets an error.
    ///
    /// # Errors
    ///
    /// If it can no longer listen at the address.
    pub async fn run(mut self) -> Result<()> {
        loop {
            let control = match self.control.take() {
                Some(control) => control,
                None => lead(self.at.clone()).await?,
            };
            let served = self.serve(&control).await;
            match &served {
                Ok(Some(report)) => {
                    info!(version = %report.version, "a newcomer has the current version");
                }
                Ok(None) => debug!("a newcomer came before there was a version"),
                Err(error) => warn!(%error, "a newcomer did not get the current version"),
            }
            control.close().await?;
        }
    }

    /// Waits for a newcomer and gives it the cached version.
    async fn serve(&self, control: &ControlPlane) -> Result<Option<SendReport>> {
        let channel = control.channel(HANDOVER);
        let newcomer = loop {
            match channel.recv(LONG).await? {
                Some(Event::Joined(peer)) => break peer.rank,
                other => debug!(?other, "while waiting for a newcomer"),
            }
        };
        let held = self.cache.get_weights().ok();
        let parts = Parts::of(&self.config)?;
        let has = parts.wanted(self.config.wants.as_deref())?;
        let parts = (has != parts.all()).then(|| parts.named(&has));
        let offer = Offer { version: held.as_ref().map(|(version, _)| *version), parts };
        channel.send(newcomer, written(&offer)?)?;
        let Some((version, weights)) = held else { return Ok(None) };
        let context = EngineContext::new(self.config.clone());
        let deadline = context.deadline();
        let updates = Arc::new(OnlyWith { channel: control.channel(UPDATES), peer: newcomer });
        let context = context.with_control(updates as Arc<dyn Control>);
        let prepared = self.backend.prepare_trainer(context).await?;
        let own = prepared.metadata().clone();
        channel.send(newcomer, written(&own)?)?;
        let its = answer(&channel, newcomer, deadline).await?;
        let place = place(&self.backend, [own, its], Rank::LEADER)?;
        let mut engine = prepared.join(place).await?;
        let given = engine.send_weights(weights, version).await;
        engine.finalize().await?;
        given.map(Some)
    }
}

/// A rollout that receives the current version from one that holds it; see [`Holder`].
#[derive(Debug)]
pub struct Newcomer {
    control: ControlPlane,
    engine: Box<dyn RolloutEngine>,
    version: Version,
}

impl Newcomer {
    /// Where ranks of a group say that they give the version they hold.
    pub fn holders(workers: &[WorkerMetadata]) -> Vec<Address> {
        let address =
            |worker: &WorkerMetadata| worker.attributes[Holder::ATTRIBUTE].as_str()?.parse().ok();
        workers.iter().filter_map(address).collect()
    }

    /// Asks a holder; `None` if it has no version yet.
    ///
    /// # Contract
    ///
    /// The configuration is the holder's, as in a group; what it wants may be less than the holder has.
    ///
    /// # Errors
    ///
    /// `Mismatch` if it wants a part of the version that the holder does not have; `Timeout` if the holder does not answer within the configuration's deadline, or is busy with
    /// others for that long; those of joining a group.
    pub async fn join(
        backend: &dyn Backend,
        config: CheckpointEngineConfig,
        at: ControlConfig,
    ) -> Result<Option<Self>> {
        let context = EngineContext::new(config);
        let deadline = context.deadline();
        let until = Instant::now() + deadline;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let mut at = at.clone();
            at.connect_timeout = at.connect_timeout.min(left);
            let control = ControlPlane::join(at, Role::Rollout, None).await?;
            match Self::enter(backend, &context, &control, left).await {
                Ok(entered) => {
                    return Ok(entered.map(|(engine, version)| Self { control, engine, version }));
                }
                // It has served another one, and listens anew.
                Err(error) if error.says_trainer_is_gone() && !left.is_zero() => {
                    debug!(%error, "the holder is busy");
                    clock::sleep(PAUSE).await;
                }
                Err(error) => {
                    // The holder hears at once that it need not wait for this rank.
                    drop(control.close().await);
                    return Err(error);
                }
            }
        }
    }

    async fn enter(
        backend: &dyn Backend,
        context: &EngineContext,
        control: &ControlPlane,
        deadline: Duration,
    ) -> Result<Option<(Box<dyn RolloutEngine>, Version)>> {
        let channel = control.channel(HANDOVER);
        control.gather(2, Bytes::new(), deadline).await?;
        // One that serves another newcomer says nothing, and leaves when it has.
        let offer: Offer = answer(&channel, Rank::LEADER, deadline).await?;
        let Some(version) = offer.version else { return Ok(None) };
        has_all_of(offer.parts.as_deref(), context.config.wants.as_deref())?;
        let prepared =
            backend.prepare_rollout(context.clone().with_control(control.clone())).await?;
        let own = prepared.metadata().clone();
        channel.send(Rank::LEADER, written(&own)?)?;
        let its = answer(&channel, Rank::LEADER, deadline).await?;
        let engine = prepared.join(place(backend, [its, own], control.rank())?).await?;
        Ok(Some((engine, version)))
    }

    /// The version that the holder has.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The weights, once, like those of an update.
    ///
    /// # Errors
    ///
    /// Those of [`RolloutEngine::receive_weights`].
    pub async fn receive(&mut self) -> Result<ReceivedWeights<'_>> {
        self.engine.receive_weights(Some(self.version)).await
    }

    /// Frees the buckets and leaves the holder.
    ///
    /// # Errors
    ///
    /// Those of [`finalize`](engine_core::CheckpointEngine::finalize) and [`ControlPlane::close`].
    pub async fn leave(self) -> Result<()> {
        self.engine.finalize().await?;
        self.control.close().await
    }
}

/// Refuses a holder that does not have all parts of a version that a rank wants.
fn has_all_of(holds: Option<&[String]>, wants: Option<&[String]>) -> Result<()> {
    let Some(holds) = holds else { return Ok(()) };
    let wanted = match wants {
        Some(wants) if wants.iter().all(|wanted| holds.contains(wanted)) => return Ok(()),
        Some(wants) => format!("`{}`", wants.join("`, `")),
        None => "all".to_owned(),
    };
    let message = format!(
        "the holder has only the parts `{}` of its version, this rank wants {wanted}",
        holds.join("`, `")
    );
    Err(Error::new(ErrorKind::Mismatch, "taking a version over", message))
}

/// Listens, as a group of one that others join.
async fn lead(at: ControlConfig) -> Result<ControlPlane> {
    let deadline = at.heartbeat_timeout;
    let control = ControlPlane::lead(at).await?;
    // Open before anyone can join, so that no newcomer is missed.
    control.channel(HANDOVER);
    control.gather(1, Bytes::new(), deadline).await?;
    Ok(control)
}

fn written(message: &impl Serialize) -> Result<Bytes> {
    serde_json::to_vec(message).map(Bytes::from).map_err(malformed)
}

fn malformed(error: serde_json::Error) -> Error {
    Error::new(ErrorKind::Protocol, "handing a version over", error.to_string()).with_source(error)
}

/// What a peer says next.
async fn answer<T: DeserializeOwned>(
    channel: &Channel,
    peer: Rank,
    deadline: Duration,
) -> Result<T> {
    let operation = "handing a version over";
    let until = Instant::now() + deadline;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match channel.recv(left).await? {
            Some(Event::Message { from, body }) if from == peer => {
                return serde_json::from_slice(&body).map_err(malformed);
            }
            Some(Event::Lost { rank, error }) if rank == peer => {
                return Err(Error::from(error).rank(rank));
            }
            Some(Event::Left { rank }) if rank == peer => {
                return Err(Error::new(ErrorKind::PeerLost, operation, "it has left").rank(rank));
            }
            Some(other) => debug!(?other, "while a version is handed over"),
            None => {
                let message = format!("nothing within {:.1} s", deadline.as_secs_f64());
                return Err(Error::new(ErrorKind::Timeout, operation, message).rank(peer));
            }
        }
    }
}

/// A rank's place in the group of two.
fn place(backend: &dyn Backend, workers: [WorkerMetadata; 2], rank: Rank) -> Result<Placement> {
    Placement::of_rank(backend.build_topology(&workers)?, rank)
}

/// The channel of updates as the engine of a holder sees it: others that join meanwhile wait for the next one.
#[derive(Debug)]
struct OnlyWith {
    channel: Channel,
    peer: Rank,
}

#[async_trait]
impl Control for OnlyWith {
    fn rank(&self) -> Rank {
        self.channel.rank()
    }

    fn role(&self) -> Role {
        self.channel.role()
    }

    fn send(&self, to: Rank, body: Bytes) -> Result<()> {
        self.channel.send(to, body)
    }

    async fn recv(&self, deadline: Duration) -> Result<Option<Event>> {
        let until = Instant::now() + deadline;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let event = self.channel.recv(left).await?;
            let of = match &event {
                Some(Event::Message { from: rank, .. } | Event::Left { rank }) => *rank,
                Some(Event::Lost { rank, .. }) => *rank,
                None => return Ok(None),
                // What the engine knows of its peer is in its placement.
                Some(_) => continue,
            };
            if of == self.peer {
                return Ok(event);
            }
        }
    }

    fn cut(&self, rank: Rank, reason: &Error) -> Result<()> {
        self.channel.cut(rank, reason)
    }

    fn silence(&self, rank: Rank) -> Option<Duration> {
        self.channel.silence(rank)
    }

    fn next_update(&self) -> u64 {
        self.channel.next_update()
    }

    fn updates(&self) -> u64 {
        self.channel.updates()
    }

    fn leader_address(&self) -> Option<String> {
        self.channel.leader_address()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use control_plane::Token;

    fn place_of(test: &str) -> ControlConfig {
        let address = format!("unix:@{test}-{}", std::process::id()).parse().unwrap();
        let token = Token::new(b"a token that is long enough to be one").unwrap();
        let mut at = ControlConfig::new(address, token);
        at.heartbeat_interval = Duration::from_millis(100);
        at.heartbeat_timeout = Duration::from_secs(1);
        at
    }

    #[tokio::test]
    async fn a_newcomer_whose_holder_serves_another_one_asks_again_when_that_is_over() {
        let at = place_of("busy-holder");
        let holder = at.clone();
        let serving = tokio::spawn(async move {
            for answers in [false, true] {
                let control = lead(holder.clone()).await.unwrap();
                let channel = control.channel(HANDOVER);
                let joined = channel.recv(LONG).await.unwrap();
                let Some(Event::Joined(newcomer)) = joined else { panic!("{joined:?}") };
                if answers {
                    let nothing = written(&Offer { version: None, parts: None }).unwrap();
                    channel.send(newcomer.rank, nothing).unwrap();
                    while !matches!(
                        channel.recv(LONG).await.unwrap(),
                        Some(Event::Left { .. } | Event::Lost { .. })
                    ) {}
                }
                control.close().await.unwrap();
            }
        });
        let mut config = CheckpointEngineConfig::default();
        config.timeout_seconds = 20.0;
        let joined = Newcomer::join(backend_naive::BACKEND, config, at).await.unwrap();
        assert!(joined.is_none(), "the second holder has no version");
        serving.await.unwrap();
    }

    #[tokio::test]
    async fn a_newcomer_that_comes_before_the_holder_serves_anyone_is_served() {
        let at = place_of("early-newcomer");
        let mut config = CheckpointEngineConfig::default();
        config.timeout_seconds = 5.0;
        let backend = backend_naive::BACKEND;
        let cache = WeightCache::default();
        let holder = Holder::listen(cache, Arc::new(backend), config.clone(), at.clone());
        let holder = holder.await.unwrap();
        let joining = tokio::spawn(Newcomer::join(backend, config, at));
        let two = |control: &ControlPlane| control.peers().len() == 2;
        while !holder.control.as_ref().is_some_and(two) {
            clock::sleep(Duration::from_millis(1)).await;
        }
        let serving = tokio::spawn(holder.run());
        assert!(joining.await.unwrap().unwrap().is_none(), "there is no version yet");
        serving.abort();
    }

    #[tokio::test]
    async fn the_engine_of_a_holder_hears_of_the_newcomer_that_is_served_and_of_no_other() {
        let at = place_of("only-with");
        let control = lead(at.clone()).await.unwrap();
        let mut newcomers = Vec::new();
        for _ in 0..2 {
            let newcomer = ControlPlane::join(at.clone(), Role::Rollout, None).await.unwrap();
            newcomer.gather(1, Bytes::new(), LONG).await.unwrap();
            newcomers.push(newcomer);
        }
        let only = OnlyWith { channel: control.channel(UPDATES), peer: Rank(2) };
        for newcomer in &newcomers {
            newcomer.channel(UPDATES).send(Rank::LEADER, Bytes::from_static(b"hello")).unwrap();
        }
        let said = only.recv(LONG).await.unwrap();
        assert!(matches!(said, Some(Event::Message { from: Rank(2), .. })), "{said:?}");
        assert_eq!(only.recv(Duration::from_millis(100)).await.unwrap(), None);
    }
}
