//! The contract that every transport fulfils.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::{BoxFuture, try_join_all};
use serde::{Deserialize, Serialize};

use crate::base::Bases;
use crate::control::{Control, Role};
use crate::observe::Observer;
use crate::provider::MemoryKind;
use crate::received::ReceivedWeights;
use crate::report::SendReport;
use crate::{CheckpointEngineConfig, Error, ErrorKind, Rank, Result, Version, WeightStream};

/// One rank's end of a group: what a trainer's and a rollout's have in common. It is the contract of every transport.
///
/// Each phase of its life is a type of its own, so that no call can be made too early, too late, or on the wrong
/// side:
///
/// 1. [`Backend::prepare_trainer`] and [`Backend::prepare_rollout`] allocate, and say how the rank is reached:
///    [`Prepared`], with its [`metadata`](Prepared::metadata);
/// 2. [`Backend::build_topology`], a pure function of all ranks' metadata, gives each its [place](Placement);
/// 3. [`Prepared::join`] joins the group: a [`TrainerEngine`] or a [`RolloutEngine`];
/// 4. any number of updates: [`send_weights`](TrainerEngine::send_weights) on the trainer while
///    [`receive_weights`](RolloutEngine::receive_weights) runs on the rollouts;
/// 5. [`finalize`](Self::finalize). A group that has to be formed anew is prepared anew.
///
/// Engines are owned values that may be moved into a task.
///
/// ```compile_fail,E0599
/// # use engine_core::{RolloutEngine, Version, WeightStream};
/// # async fn example(mut rollout: Box<dyn RolloutEngine>, weights: WeightStream<'_>) {
/// rollout.send_weights(weights, Version(1)).await; // a rollout does not send
/// # }
/// ```
///
/// ```compile_fail,E0382
/// # use engine_core::{Result, TrainerEngine, Version, WeightStream};
/// # async fn example(mut trainer: Box<dyn TrainerEngine>, weights: WeightStream<'_>) -> Result<()> {
/// trainer.finalize().await?;
/// trainer.send_weights(weights, Version(1)).await?; // it is gone
/// # Ok(())
/// # }
/// ```
///
/// # Contract
///
/// Every transport passes the suite of the `conformance` crate. In short: a receiver gets every weight exactly once, in
/// the order sent, bit for bit; the stream of an update that failed ends with an error, on every rank, within the
/// configured deadline; the next update works.
#[async_trait]
pub trait CheckpointEngine: fmt::Debug + Send {
    /// Frees buckets, and leaves the group.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, or the engine without a call of this, the same happens in the background.
    ///
    /// # Errors
    ///
    /// Whatever the transport's library reports.
    async fn finalize(self: Box<Self>) -> Result<()>;
}

/// A trainer's end of a group.
#[async_trait]
pub trait TrainerEngine: CheckpointEngine {
    /// Sends every weight of the stream, in order, to all receivers; ends when all have confirmed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future aborts the update on every rank; the next one works.
    ///
    /// # Errors
    ///
    /// The first failure of any rank, naming it, the bucket and the version. A rank whose process
    /// died is not waited for in later updates.
    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport>;

    /// Sends a part of a version: the weights of the stream. All others are those of the version that was committed last.
    ///
    /// An adapter, or a draft model, is a small update then. The others are neither read nor compared, so one that has changed nevertheless
    /// travels with the next [`send_weights`](Self::send_weights). All become active together. The new version has the weights of the
    /// stream first, then the others in their order. A name that the last version does not have is a new weight.
    ///
    /// The others come from the copy that a layer keeps which sends changes (`delta: true`). A rollout that has the last version gets nothing
    /// of them; if one does not, all get all of them.
    ///
    /// It has no default, because an engine around another one that forgets to pass it on would refuse what the inner one can do. An engine
    /// that keeps no copies returns [`no_copies`].
    ///
    /// # Cancel safety
    ///
    /// As [`send_weights`](Self::send_weights).
    ///
    /// # Errors
    ///
    /// `Config` if no copies are kept; `State` if there is no version, or no copy of it; those of [`send_weights`](Self::send_weights).
    async fn send_part(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport>;

    /// Proves that all rollouts hold the version that was committed last: every rank computes the digest of its copy anew from memory.
    ///
    /// Copies of what travelled are kept by a layer that sends changes (`delta: true`). Rollouts take part as in any update: they receive
    /// that version once more, with all of its weights unchanged, of which no bytes travel. Nothing is read from the trainer's weights.
    ///
    /// It has no default, as [`send_part`](Self::send_part) has none.
    ///
    /// # Cancel safety
    ///
    /// As [`send_weights`](Self::send_weights).
    ///
    /// # Errors
    ///
    /// `Digest`, naming the rank and the tensor whose bytes have changed by themselves: the next update sends whole weights. `Mismatch`,
    /// naming a rollout that does not have the version. `State` if there is no version, or the trainer has no copy of it. `Config` if
    /// ranks keep no copies, and if several trainers share the sending. Those of [`send_weights`](Self::send_weights).
    async fn attest(&mut self) -> Result<SendReport>;
}

/// For engines that keep no copies of what travelled: the error of [`TrainerEngine::send_part`] and [`TrainerEngine::attest`], of the kind
/// `Config`.
pub fn no_copies(operation: &str) -> Error {
    let message = "no copies are kept of what travelled; with `delta: true` they are";
    Error::new(ErrorKind::Config, operation, message)
}

/// A rollout's end of a group.
#[async_trait]
pub trait RolloutEngine: CheckpointEngine {
    /// The weights of the next update, in the order they were sent.
    ///
    /// Ends when the trainer begins an update. If a version is given, it has to be that one.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing. Dropping the [`ReceivedWeights`] before their end aborts
    /// the update on every rank.
    ///
    /// # Errors
    ///
    /// `Timeout` if no update begins within the deadline (call again to go on waiting);
    /// `PeerLost` if the trainer is gone, `TrainerLeft` if it left in order; `Mismatch` if the update has another version.
    async fn receive_weights(&mut self, version: Option<Version>) -> Result<ReceivedWeights<'_>>;

    /// Adopts a version that another rollout gives, as if the trainer had sent it here. Returns the same weights.
    ///
    /// A layer that applies changes keeps its copy of them. So a rollout that joins late, and takes over the version that all have, gets
    /// changes in the next update: without this, one rollout that has no version makes that update whole for all.
    ///
    /// # Contract
    ///
    /// The weights are those that the other rollout received, in the order sent. If they are not the trainer's, the next update is whole.
    ///
    /// It has no default, so that no engine around another one forgets to pass it on. One that keeps no copy returns `received` as it is.
    fn adopt<'a>(&'a mut self, received: ReceivedWeights<'a>) -> ReceivedWeights<'a>;
}

/// A rollout's end that keeps the last complete version in a local cache.
///
/// A rollout that starts anew, or that takes weights when it has time, reads the cache without
/// interrupting the trainer.
#[async_trait]
pub trait CheckpointEngineWithCache: RolloutEngine {
    /// Receives the next update into the cache; it replaces the cached version when it is complete
    /// and verified, and leaves it untouched otherwise.
    ///
    /// # Errors
    ///
    /// Those of [`receive_weights`](RolloutEngine::receive_weights).
    async fn update_cache(&mut self, version: Option<Version>) -> Result<Version>;

    /// The last complete version and its weights, in the order sent; shared, not copied.
    ///
    /// # Errors
    ///
    /// `State` if no version is complete yet.
    fn get_weights(&self) -> Result<(Version, WeightStream<'static>)>;
}

/// A rank that has allocated its memory and says how it is reached. [`join`](Self::join) turns it into an engine.
///
/// Dropping it frees what it has allocated.
pub struct Prepared<E> {
    metadata: WorkerMetadata,
    join: Join<E>,
}

type Join<E> = Box<dyn FnOnce(Placement) -> BoxFuture<'static, Result<E>> + Send>;

/// A trainer that has not joined its group.
pub type PreparedTrainer = Prepared<Box<dyn TrainerEngine>>;
/// A rollout that has not joined its group.
pub type PreparedRollout = Prepared<Box<dyn RolloutEngine>>;

impl<E> Prepared<E> {
    /// A rank that is reached as `metadata` says, and joins by what `join` does.
    pub fn new<Joining>(
        metadata: WorkerMetadata,
        join: impl FnOnce(Placement) -> Joining + Send + 'static,
    ) -> Self
    where
        Joining: Future<Output = Result<E>> + Send + 'static,
    {
        Self { metadata, join: Box::new(move |place| Box::pin(join(place))) }
    }

    /// What peers need to know of the rank.
    pub fn metadata(&self) -> &WorkerMetadata {
        &self.metadata
    }

    /// Adds what the embedding program tells other ranks about this one: the keys of an object, beside those that are
    /// there.
    #[must_use]
    pub fn with_attributes(mut self, attributes: serde_json::Value) -> Self {
        match (&mut self.metadata.attributes, attributes) {
            (_, serde_json::Value::Null) => {}
            (serde_json::Value::Object(have), serde_json::Value::Object(more)) => have.extend(more),
            (have, more) => *have = more,
        }
        self
    }

    /// The same rank; when it joins, the function turns its engine into something else.
    pub fn map<Other: 'static>(
        self,
        into: impl FnOnce(E) -> Other + Send + 'static,
    ) -> Prepared<Other>
    where
        E: 'static,
    {
        let Self { metadata, join } = self;
        Prepared::new(metadata, move |place| async move { join(place).await.map(into) })
    }

    /// Joins the group in the place that [`Backend::build_topology`] gave this rank.
    ///
    /// # Errors
    ///
    /// `Timeout`, naming the ranks, if others do not arrive; `Mismatch` if they want other formats; whatever the
    /// transport's library reports.
    pub async fn join(self, place: Placement) -> Result<E> {
        (self.join)(place).await
    }
}

impl<E> fmt::Debug for Prepared<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared").field("metadata", &self.metadata).finish_non_exhaustive()
    }
}

/// What peers need to know of a rank: made by [`Backend`]s, carried by the
/// embedding program or by the control plane.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct WorkerMetadata {
    /// The backend's name; all ranks of a group have the same.
    pub backend: String,
    /// The rank that the control plane gave, or the embedding program where there is none.
    pub rank: Rank,
    /// Whether the rank sends or receives.
    pub role: Role,
    /// The host, unique as long as it is up (its boot id).
    pub host: String,
    /// The process on that host.
    pub pid: u32,
    /// What only the backend understands.
    pub details: serde_json::Value,
    /// The format contract: what the rank says of the format of weights. A layer that converts them in
    /// front of the engine understands it; null where nobody does.
    #[serde(default)]
    pub format: serde_json::Value,
    /// What the embedding program tells other ranks along with it.
    #[serde(default)]
    pub attributes: serde_json::Value,
}

impl WorkerMetadata {
    /// The metadata of this process, with a backend's own part.
    pub fn of_this_process(
        backend: &str,
        rank: Rank,
        role: Role,
        details: serde_json::Value,
    ) -> Self {
        Self {
            backend: backend.to_owned(),
            rank,
            role,
            host: host_id(),
            pid: std::process::id(),
            details,
            format: serde_json::Value::Null,
            attributes: serde_json::Value::Null,
        }
    }
}

/// An identity of this host that changes when it starts anew.
fn host_id() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}/{}", name.trim(), boot.trim())
}

/// A rank's place in the group: made by [`Backend::build_topology`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Placement {
    /// This rank.
    pub rank: Rank,
    /// All ranks' metadata, in the order of the ranks. These may have gaps: a position in the list is no
    /// rank. All places of a group share the list.
    #[serde(with = "shared")]
    pub peers: Arc<[WorkerMetadata]>,
}

/// A shared list, written as any list.
mod shared {
    use super::*;

    pub(super) fn serialize<S: serde::Serializer>(
        peers: &Arc<[WorkerMetadata]>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(peers.iter())
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Arc<[WorkerMetadata]>, D::Error> {
        Vec::deserialize(deserializer).map(Arc::from)
    }
}

impl Placement {
    /// The place of a rank among these, which are in the order of their ranks.
    pub fn new(rank: Rank, peers: impl Into<Arc<[WorkerMetadata]>>) -> Self {
        Self { rank, peers: peers.into() }
    }

    /// The places of a group in which every rank knows every other: the start of a topology.
    ///
    /// The places are in the order of the ranks, the workers in any order.
    ///
    /// # Errors
    ///
    /// `Mismatch` if there is no trainer or no rollout, if rank 0 is not a trainer, if two workers have one
    /// rank, or if ranks were prepared for different backends; it names the rank.
    pub fn for_all(backend: &str, workers: &[WorkerMetadata]) -> Result<Vec<Self>> {
        let refuse =
            |message: String| Error::new(ErrorKind::Mismatch, "building the topology", message);
        let mut peers = workers.to_vec();
        peers.sort_by_key(|peer| peer.rank);
        if let Some(pair) = peers.windows(2).find(|pair| pair[0].rank == pair[1].rank) {
            let message = format!(
                "two workers have the rank {}: process {} of {} and process {} of {}; give each a rank of \
                 its own",
                pair[0].rank, pair[0].pid, pair[0].host, pair[1].pid, pair[1].host
            );
            return Err(refuse(message).rank(pair[0].rank));
        }
        let leads = |peer: &WorkerMetadata| (peer.rank, peer.role) == (Rank::LEADER, Role::Trainer);
        if !peers.first().is_some_and(leads) {
            return Err(refuse("rank 0 is not a trainer".into()));
        }
        if !peers.iter().any(|peer| peer.role == Role::Rollout) {
            return Err(refuse("there is no rollout".into()));
        }
        if let Some(peer) = peers.iter().find(|peer| peer.backend != backend) {
            let message = format!("it runs the backend `{}`, the group `{backend}`", peer.backend);
            return Err(refuse(message).rank(peer.rank));
        }
        let peers: Arc<[WorkerMetadata]> = peers.into();
        Ok(peers.iter().map(|peer| Self { rank: peer.rank, peers: Arc::clone(&peers) }).collect())
    }

    /// The place of a rank, out of those that [`Backend::build_topology`] made.
    ///
    /// # Errors
    ///
    /// `Mismatch` if there is none for it.
    pub fn of_rank(places: impl IntoIterator<Item = Self>, rank: Rank) -> Result<Self> {
        places.into_iter().find(|place| place.rank == rank).ok_or_else(|| {
            let message = "the topology has no place for this rank";
            Error::new(ErrorKind::Mismatch, "joining the group", message).rank(rank)
        })
    }

    /// This rank's own metadata.
    ///
    /// # Errors
    ///
    /// `Config` if the rank is not one of the peers.
    pub fn own(&self) -> Result<&WorkerMetadata> {
        self.peer(self.rank)
    }

    /// A rank's metadata.
    ///
    /// # Errors
    ///
    /// `Config` if there is no such rank.
    pub fn peer(&self, rank: Rank) -> Result<&WorkerMetadata> {
        self.peers.iter().find(|peer| peer.rank == rank).ok_or_else(|| {
            let ranks: Vec<String> = self.peers.iter().map(|peer| peer.rank.to_string()).collect();
            let message = format!("the placement has the ranks {}", ranks.join(", "));
            Error::new(ErrorKind::Config, "reading a placement", message).rank(rank)
        })
    }

    /// The ranks of the group's rollouts.
    pub fn rollouts(&self) -> impl Iterator<Item = Rank> + '_ {
        self.peers.iter().filter(|peer| peer.role == Role::Rollout).map(|peer| peer.rank)
    }
}

/// Joins ranks that were prepared in this process to one group, whose control plane, if they need one, has formed.
///
/// # Errors
///
/// Those of [`Backend::build_topology`] and [`Prepared::join`].
pub async fn form_local_group(
    backend: &dyn Backend,
    trainers: Vec<PreparedTrainer>,
    rollouts: Vec<PreparedRollout>,
) -> Result<(Vec<Box<dyn TrainerEngine>>, Vec<Box<dyn RolloutEngine>>)> {
    let all =
        trainers.iter().map(Prepared::metadata).chain(rollouts.iter().map(Prepared::metadata));
    let workers: Vec<WorkerMetadata> = all.cloned().collect();
    let places = backend.build_topology(&workers)?;
    async fn join<E>(prepared: Prepared<E>, places: &[Placement]) -> Result<E> {
        let place = Placement::of_rank(places.iter().cloned(), prepared.metadata().rank)?;
        prepared.join(place).await
    }
    // At the same time: a transport may have them wait for one another.
    let trainers = try_join_all(trainers.into_iter().map(|trainer| join(trainer, &places)));
    let rollouts = try_join_all(rollouts.into_iter().map(|rollout| join(rollout, &places)));
    futures::future::try_join(trainers, rollouts).await
}

/// What an engine is made of: configuration, and its connection to the others.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EngineContext {
    /// The configuration, common to all ranks.
    pub config: CheckpointEngineConfig,
    /// The connection to rank 0. Engines that stay within a process need none.
    pub control: Option<Arc<dyn Control>>,
    /// The rank, where no control plane gives it; see [`rank`](Self::rank).
    pub rank: Option<Rank>,
    /// Who is told of the progress of updates.
    pub observer: Arc<dyn Observer>,
    /// Which versions rollouts have, for layers that send changes. [`Registry`](crate::Registry) gives every engine its own.
    pub bases: Bases,
    /// The kind of memory that the configuration's device has, if the [`Registry`](crate::Registry) has it; see
    /// [`memory_kind`](Self::memory_kind).
    pub memory: Option<&'static dyn MemoryKind>,
}

impl EngineContext {
    /// A context without control plane and observer.
    pub fn new(config: CheckpointEngineConfig) -> Self {
        Self {
            config,
            control: None,
            rank: None,
            observer: Arc::new(()),
            bases: Bases::default(),
            memory: None,
        }
    }

    /// With the connection to rank 0: a control plane, or a [`Control`] of any kind.
    #[must_use]
    pub fn with_control(mut self, control: impl Into<Arc<dyn Control>>) -> Self {
        self.control = Some(control.into());
        self
    }

    /// With a rank, for an engine without a control plane. Rank 0 is the trainer that leads the group.
    #[must_use]
    pub fn with_rank(mut self, rank: Rank) -> Self {
        self.rank = Some(rank);
        self
    }

    /// The rank of the engine: the one that the control plane gave, else that of
    /// [`with_rank`](Self::with_rank). Without either, the engine chooses one of its own.
    pub fn rank(&self) -> Option<Rank> {
        self.control.as_ref().map(|control| control.rank()).or(self.rank)
    }

    /// With someone to tell of the progress of updates.
    #[must_use]
    pub fn with_observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.observer = observer;
        self
    }

    /// The kind of memory of the configuration's device; `None` for the host, of which every backend has its own.
    ///
    /// # Errors
    ///
    /// `Config` for a device of a kind that is not known.
    pub fn memory_kind(&self) -> Result<Option<&'static dyn MemoryKind>> {
        let device = &self.config.device;
        if self.memory.is_none() && !device.is_cpu() {
            let message = format!("device: `{device}`: nothing here has memory of that kind");
            return Err(Error::new(ErrorKind::Config, "preparing", message));
        }
        Ok(self.memory)
    }

    /// The control plane, for engines that need it.
    ///
    /// # Errors
    ///
    /// `Config` if the context has none.
    pub fn require_control(&self) -> Result<Arc<dyn Control>> {
        self.control.clone().ok_or_else(|| {
            Error::new(
                ErrorKind::Config,
                "preparing",
                format!("the backend `{}` needs a control plane", self.config.backend),
            )
        })
    }

    /// How many threads a rank of this role packs or verifies with: the number that is configured, else one per core
    /// on a trainer and one per two cores on a rollout, at most 16. Verifying takes less than encoding, and several
    /// rollouts may share a host. More than 16 threads exceed the memory bandwidth.
    pub fn threads(&self, role: Role) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        match (self.config.threads, role) {
            (Some(threads), _) => threads.get(),
            (None, Role::Trainer) => cores().min(16),
            (None, Role::Rollout) => cores().div_ceil(2).min(16),
        }
    }

    /// The deadline of every wait.
    pub fn deadline(&self) -> Duration {
        self.config.timeout()
    }
}

/// A transport, as a value: each backend crate exports one as `BACKEND`. One may have a state of its own, a client or
/// credentials.
#[async_trait]
pub trait Backend: fmt::Debug + Send + Sync {
    /// Its name in configurations.
    fn name(&self) -> &'static str;

    /// What it is for, in one line.
    fn summary(&self) -> &'static str;

    /// Whether it can run on this machine.
    fn probe(&self) -> Availability;

    /// The kinds of devices that it can have buckets on, beside the host's memory.
    fn devices(&self) -> Devices {
        Devices::Kinds(&[])
    }

    /// Whether its rollouts may want some [`Parts`](crate::Parts) of a version alone. If not, a rollout that does is refused before
    /// it is prepared.
    fn sends_parts(&self) -> bool {
        false
    }

    /// Prepares a trainer: allocates buckets, registers memory, and says how the rank is reached.
    ///
    /// # Errors
    ///
    /// `Config` for a configuration that the backend cannot use; `Backend` if it cannot run here; `Resource` if the
    /// buckets do not fit into the memory they should be in; whatever the transport's library reports.
    async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer>;

    /// Prepares a rollout, as a trainer.
    ///
    /// # Errors
    ///
    /// Those of [`prepare_trainer`](Self::prepare_trainer).
    async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout>;

    /// Places the ranks: who sends to whom. A pure function; every rank may compute it for itself.
    ///
    /// `workers` are all ranks' metadata, in any order; the places are in the order of the ranks, which may
    /// have gaps. [`Placement::of_rank`] finds the one of a rank.
    ///
    /// # Errors
    ///
    /// `Mismatch`, naming the rank that does not fit, or that two workers have.
    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>>;
}

macro_rules! delegate {
    ($($to:ty),*) => {$(
        #[async_trait]
        impl<B: Backend + ?Sized> Backend for $to {
            fn name(&self) -> &'static str {
                (**self).name()
            }

            fn summary(&self) -> &'static str {
                (**self).summary()
            }

            fn probe(&self) -> Availability {
                (**self).probe()
            }

            fn devices(&self) -> Devices {
                (**self).devices()
            }

            fn sends_parts(&self) -> bool {
                (**self).sends_parts()
            }

            async fn prepare_trainer(&self, context: EngineContext) -> Result<PreparedTrainer> {
                (**self).prepare_trainer(context).await
            }

            async fn prepare_rollout(&self, context: EngineContext) -> Result<PreparedRollout> {
                (**self).prepare_rollout(context).await
            }

            fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>> {
                (**self).build_topology(workers)
            }
        }
    )*};
}

delegate!(&B, Arc<B>);

/// On which devices a backend can have buckets, beside the host's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Devices {
    /// On those of these kinds, whose memory it brings itself.
    Kinds(&'static [&'static str]),
    /// On those of every kind of memory that the [`Registry`](crate::Registry) has.
    Registered,
    /// All: it hands memory over, and weights stay where they are, on any device.
    Any,
}

/// Whether a backend can run on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "status", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Availability {
    /// It can; what was found.
    Usable {
        /// Versions, devices and limits, in words.
        details: String,
    },
    /// It cannot.
    Unusable {
        /// Why not.
        reason: String,
        /// What to install or change.
        remedy: String,
    },
}
