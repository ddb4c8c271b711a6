//! The current version for a rollout that joins late: from one that holds it, while the trainer is
//! busy with something else.

use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use crate::control::{Address, ControlConfig, ControlPlane, Event, Role};
use crate::{
    Backend, CheckpointEngine, CheckpointEngineConfig, EngineContext, Error, ErrorKind, Placement,
    Rank, ReceivedWeights, Result, SendReport, Version, WeightCache, WorkerMetadata,
};

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
/// ([`announce`](Self::announce)), and a newcomer, which gets the metadata of all when it joins the
/// group, finds it by [`Newcomer::holders`].
///
/// # Examples
///
/// ```
/// # use engine_core::control::{ControlConfig, Token};
/// # use engine_core::{Backend, CachedEngine, CheckpointEngineConfig, Holder, Newcomer, Result};
/// # async fn example(
/// #     backend: &'static dyn Backend, config: CheckpointEngineConfig, token: Token,
/// #     mut rollout: CachedEngine, mut late: CachedEngine,
/// # ) -> Result<()> {
/// // On a rollout that has a cache, before it tells the others of itself:
/// let at = ControlConfig::new("10.0.0.2:0".parse()?, token.clone());
/// let holder = Holder::listen(rollout.cache(), backend, config.clone(), at).await?;
/// let address = holder.address().clone();
/// tokio::spawn(holder.run());
///
/// // On a rollout that has joined the group and does not want to wait for the next update:
/// let at = ControlConfig::new(address, token);
/// if let Some(mut newcomer) = Newcomer::join(backend, config, at).await? {
///     late.take_over(&mut newcomer).await?;
///     newcomer.leave().await?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Holder {
    cache: WeightCache,
    backend: &'static dyn Backend,
    config: CheckpointEngineConfig,
    at: ControlConfig,
    control: Option<ControlPlane>,
}

/// What a holder tells a newcomer first.
#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    version: Option<Version>,
}

impl Holder {
    /// The attribute of a rank's metadata that says where it gives the version that it holds; see
    /// [`announce`](Self::announce).
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
        backend: &'static dyn Backend,
        config: CheckpointEngineConfig,
        at: ControlConfig,
    ) -> Result<Self> {
        let control = lead(at.clone()).await?;
        // Port 0 is a port now, and has to be the same whenever this listens again.
        let at = ControlConfig { address: control.address().clone(), ..at };
        Ok(Self { cache, backend, config, at, control: Some(control) })
    }

    /// Where newcomers find it.
    pub fn address(&self) -> &Address {
        &self.at.address
    }

    /// Adds the address to what this rank tells the others of itself.
    pub fn announce(&self, own: &mut WorkerMetadata) {
        if !own.attributes.is_object() {
            own.attributes = serde_json::json!({});
        }
        own.attributes[Self::ATTRIBUTE] = self.at.address.to_string().into();
    }

    /// Serves newcomers for as long as it can listen. A newcomer that fails, or that comes before
    /// there is a version, harms nobody else.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends it; a newcomer that is being served gets an error.
    ///
    /// # Errors
    ///
    /// That the address cannot be listened at any more.
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
        let newcomer = loop {
            match control.recv(LONG).await? {
                Some(Event::Joined(peer)) => break peer.rank,
                other => debug!(?other, "while waiting for a newcomer"),
            }
        };
        let held = self.cache.get_weights().ok();
        let offer = Offer { version: held.as_ref().map(|(version, _)| *version) };
        control.send(newcomer, written(&offer)?)?;
        let Some((version, weights)) = held else { return Ok(None) };
        let context = EngineContext::new(self.config.clone(), Role::Trainer);
        let deadline = context.deadline();
        let mut engine = self.backend.create(context.with_control(control.clone()))?;
        let own = engine.prepare().await?;
        control.send(newcomer, written(&own)?)?;
        let given = async {
            let its = answer(control, newcomer, deadline).await?;
            engine.init_process_group(place(self.backend, [own, its], Rank::LEADER)?).await?;
            engine.send_weights(weights, version).await
        };
        let given = given.await;
        engine.finalize().await?;
        given.map(Some)
    }
}

/// A rollout that gets the current version from one that holds it; see [`Holder`].
#[derive(Debug)]
pub struct Newcomer {
    control: ControlPlane,
    engine: Box<dyn CheckpointEngine>,
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
    /// The configuration is the holder's, as in a group.
    ///
    /// # Errors
    ///
    /// `Timeout` if the holder does not answer within the configuration's deadline, or is busy with
    /// others for that long; those of joining a group.
    pub async fn join(
        backend: &'static dyn Backend,
        config: CheckpointEngineConfig,
        at: ControlConfig,
    ) -> Result<Option<Self>> {
        let context = EngineContext::new(config, Role::Rollout);
        let deadline = context.deadline();
        let until = Instant::now() + deadline;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let at = ControlConfig { connect_timeout: at.connect_timeout.min(left), ..at.clone() };
            let control = ControlPlane::join(at, Role::Rollout, None).await?;
            match Self::enter(backend, &context, &control, left).await {
                Ok(entered) => {
                    return Ok(entered.map(|(engine, version)| Self { control, engine, version }));
                }
                // It has served another one, and listens anew.
                Err(error) if error.kind() == ErrorKind::PeerLost && !left.is_zero() => {
                    debug!(%error, "the holder is busy");
                    crate::clock::sleep(PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn enter(
        backend: &'static dyn Backend,
        context: &EngineContext,
        control: &ControlPlane,
        deadline: Duration,
    ) -> Result<Option<(Box<dyn CheckpointEngine>, Version)>> {
        control.gather(2, Bytes::new(), deadline).await?;
        let offer: Offer = answer(control, Rank::LEADER, deadline).await.map_err(|error| {
            // The update of the newcomer before this one is announced to all that are there.
            if error.kind() == ErrorKind::Protocol { busy() } else { error }
        })?;
        let Some(version) = offer.version else { return Ok(None) };
        let mut engine = backend.create(context.clone().with_control(control.clone()))?;
        let own = engine.prepare().await?;
        control.send(Rank::LEADER, written(&own)?)?;
        let its = answer(control, Rank::LEADER, deadline).await?;
        engine.init_process_group(place(backend, [its, own], control.rank())?).await?;
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
    /// Those of [`CheckpointEngine::receive_weights`].
    pub async fn receive(&mut self) -> Result<ReceivedWeights<'_>> {
        self.engine.receive_weights(Some(self.version)).await
    }

    /// Frees the buckets and leaves the holder.
    ///
    /// # Errors
    ///
    /// Those of [`CheckpointEngine::finalize`] and [`ControlPlane::close`].
    pub async fn leave(mut self) -> Result<()> {
        self.engine.finalize().await?;
        self.control.close().await
    }
}

/// Listens, as a group of one that others join.
async fn lead(at: ControlConfig) -> Result<ControlPlane> {
    let deadline = at.heartbeat_timeout;
    let control = ControlPlane::lead(at).await?;
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
    control: &ControlPlane,
    peer: Rank,
    deadline: Duration,
) -> Result<T> {
    let operation = "handing a version over";
    let until = Instant::now() + deadline;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match control.recv(left).await? {
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

fn busy() -> Error {
    Error::new(ErrorKind::PeerLost, "handing a version over", "the holder serves another one")
        .rank(Rank::LEADER)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::control::Token;

    #[tokio::test]
    async fn a_newcomer_that_hears_of_an_update_for_another_one_asks_again() {
        let address = format!("unix:@busy-holder-{}", std::process::id()).parse().unwrap();
        let token = Token::new(b"a token that is long enough to be one").unwrap();
        let mut at = ControlConfig::new(address, token);
        at.heartbeat_interval = Duration::from_millis(100);
        at.heartbeat_timeout = Duration::from_secs(1);
        let holder = at.clone();
        let serving = tokio::spawn(async move {
            let nothing = written(&Offer { version: None }).unwrap();
            for message in [Bytes::from_static(b"\x01\x02"), nothing] {
                let control = lead(holder.clone()).await.unwrap();
                let joined = control.recv(LONG).await.unwrap();
                let Some(Event::Joined(newcomer)) = joined else { panic!("{joined:?}") };
                control.send(newcomer.rank, message).unwrap();
                while !matches!(
                    control.recv(LONG).await.unwrap(),
                    Some(Event::Left { .. } | Event::Lost { .. })
                ) {}
                control.close().await.unwrap();
            }
        });
        let config = CheckpointEngineConfig { timeout_seconds: 20.0, ..Default::default() };
        let joined = Newcomer::join(crate::naive::BACKEND, config, at).await.unwrap();
        assert!(joined.is_none(), "the second holder has no version");
        serving.await.unwrap();
    }
}
