//! The contract that every transport fulfils.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::control::{ControlPlane, Role};
use crate::observe::Observer;
use crate::received::ReceivedWeights;
use crate::report::SendReport;
use crate::{CheckpointEngineConfig, Error, ErrorKind, Rank, Result, Version, WeightStream};

/// Moves weights between a trainer and its rollouts: the contract of every transport.
///
/// An engine is one rank's end of a group. Its life has five phases:
///
/// 1. [`prepare`](Self::prepare) on every rank: allocate, and say how to be reached;
/// 2. [`Backend::build_topology`], a pure function of all ranks' metadata: who sends to whom;
/// 3. [`init_process_group`](Self::init_process_group) on every rank, with its place;
/// 4. any number of updates: [`send_weights`](Self::send_weights) on the trainer while
///    [`receive_weights`](Self::receive_weights) runs on the rollouts;
/// 5. [`finalize`](Self::finalize).
///
/// # Contract
///
/// Every transport passes the suite of the `conformance` crate. In short: a receiver gets every
/// weight exactly once, in the order sent, bit for bit; the stream of an update that failed ends
/// with an error, on every rank, within the configured deadline; the next update works.
#[async_trait]
pub trait CheckpointEngine: fmt::Debug + Send {
    /// Allocates buckets, registers memory, and returns what peers need to reach this rank.
    ///
    /// # Errors
    ///
    /// `Resource` if the buckets do not fit into the memory they should be in, and whatever the
    /// transport's library reports.
    async fn prepare(&mut self) -> Result<WorkerMetadata>;

    /// Joins the group in the place that [`Backend::build_topology`] gave this rank.
    ///
    /// # Errors
    ///
    /// `State` before `prepare`; `Timeout`, naming the ranks, if others do not arrive.
    async fn init_process_group(&mut self, place: Placement) -> Result<()>;

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
    /// `PeerLost` if the trainer is gone; `Mismatch` if the update has another version.
    async fn receive_weights(&mut self, version: Option<Version>) -> Result<ReceivedWeights<'_>>;

    /// Frees buckets, and leaves the group.
    ///
    /// # Errors
    ///
    /// `State` before `prepare`, and whatever the transport's library reports.
    async fn finalize(&mut self) -> Result<()>;
}

/// An engine whose rollouts keep the last complete version in a local cache.
///
/// A rollout that starts anew, or that takes weights when it has time, reads the cache without
/// interrupting the trainer.
#[async_trait]
pub trait CheckpointEngineWithCache: CheckpointEngine {
    /// Receives the next update into the cache; it replaces the cached version when it is complete
    /// and verified, and leaves it untouched otherwise.
    ///
    /// # Errors
    ///
    /// Those of [`receive_weights`](CheckpointEngine::receive_weights).
    async fn update_cache(&mut self, version: Option<Version>) -> Result<Version>;

    /// The last complete version and its weights, in the order sent; shared, not copied.
    ///
    /// # Errors
    ///
    /// `State` if no version is complete yet.
    fn get_weights(&self) -> Result<(Version, WeightStream<'static>)>;
}

/// What peers need to know of a rank: made by [`CheckpointEngine::prepare`], carried by the
/// embedding program or by [`ControlPlane::gather`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerMetadata {
    /// The backend's name; all ranks of a group have the same.
    pub backend: String,
    /// Whether the rank sends or receives.
    pub role: Role,
    /// The host, unique as long as it is up (its boot id).
    pub host: String,
    /// The process on that host.
    pub pid: u32,
    /// What only the backend understands.
    pub details: serde_json::Value,
    /// The format contract: what the rank says of the format of weights. Whoever converts them in
    /// front of the engine understands it; null where nobody does.
    #[serde(default)]
    pub format: serde_json::Value,
    /// What the embedding program tells other ranks along with it.
    #[serde(default)]
    pub attributes: serde_json::Value,
}

impl WorkerMetadata {
    /// The metadata of this process, with a backend's own part.
    pub fn of_this_process(backend: &str, role: Role, details: serde_json::Value) -> Self {
        Self {
            backend: backend.to_owned(),
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
pub struct Placement {
    /// This rank.
    pub rank: Rank,
    /// All ranks' metadata, in the order of the ranks.
    pub peers: Vec<WorkerMetadata>,
}

impl Placement {
    /// The places of a group in which every rank knows every other: the start of a topology.
    ///
    /// # Errors
    ///
    /// `Mismatch` if there is no trainer or no rollout, if rank 0 is not a trainer, or if ranks were
    /// prepared for different backends; it names the rank.
    pub fn for_all(backend: &str, peers: &[WorkerMetadata]) -> Result<Vec<Self>> {
        let refuse =
            |message: String| Error::new(ErrorKind::Mismatch, "building the topology", message);
        if peers.first().map(|peer| peer.role) != Some(Role::Trainer) {
            return Err(refuse("rank 0 is not a trainer".into()));
        }
        if !peers.iter().any(|peer| peer.role == Role::Rollout) {
            return Err(refuse("there is no rollout".into()));
        }
        for (rank, peer) in (0..).map(Rank).zip(peers) {
            if peer.backend != backend {
                return Err(refuse(format!(
                    "it runs the backend `{}`, the group `{backend}`",
                    peer.backend
                ))
                .rank(rank));
            }
        }
        let places = (0..).map(Rank).zip(peers);
        Ok(places.map(|(rank, _)| Self { rank, peers: peers.to_vec() }).collect())
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
        self.peers.get(rank.index()).ok_or_else(|| {
            let message = format!("the placement has {} ranks", self.peers.len());
            Error::new(ErrorKind::Config, "reading a placement", message).rank(rank)
        })
    }
}

/// What an engine is made of: configuration, role, and its connection to the others.
#[derive(Clone, Debug)]
pub struct EngineContext {
    /// The configuration, common to all ranks.
    pub config: CheckpointEngineConfig,
    /// Whether this rank sends or receives.
    pub role: Role,
    /// The connection to rank 0. Engines that stay within a process need none.
    pub control: Option<ControlPlane>,
    /// Who is told of the progress of updates.
    pub observer: Arc<dyn Observer>,
}

impl EngineContext {
    /// A context without control plane and observer.
    pub fn new(config: CheckpointEngineConfig, role: Role) -> Self {
        Self { config, role, control: None, observer: Arc::new(()) }
    }

    /// With the connection to rank 0.
    #[must_use]
    pub fn with_control(mut self, control: ControlPlane) -> Self {
        self.control = Some(control);
        self
    }

    /// With someone to tell of the progress of updates.
    #[must_use]
    pub fn with_observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.observer = observer;
        self
    }

    /// The control plane, for engines that need it.
    ///
    /// # Errors
    ///
    /// `Config` if the context has none.
    pub fn require_control(&self) -> Result<ControlPlane> {
        self.control.clone().ok_or_else(|| {
            Error::new(
                ErrorKind::Config,
                "making an engine",
                format!("the backend `{}` needs a control plane", self.config.backend),
            )
        })
    }

    /// How many threads the rank packs or checks with: those of the configuration, else on a trainer
    /// one for every core, which packing and quantising can use, and on a rollout one for every
    /// second, since verifying takes less and several rollouts may share a host; at most 16, because
    /// memory bandwidth is used up before more are.
    pub fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        match (self.config.threads, self.role) {
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

/// A transport, as a value: each backend crate exports one as `BACKEND`.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Its name in configurations.
    fn name(&self) -> &'static str;

    /// What it is for, in one line.
    fn summary(&self) -> &'static str;

    /// Whether it can run on this machine.
    fn probe(&self) -> Availability;

    /// The kinds of devices that it can have buckets on, beside the host's memory.
    fn devices(&self) -> &'static [&'static str] {
        &[]
    }

    /// Makes one rank's engine.
    ///
    /// # Errors
    ///
    /// `Config` for a configuration that the backend cannot use; `Backend` if it cannot run here.
    fn create(&self, context: EngineContext) -> Result<Box<dyn CheckpointEngine>>;

    /// Places the ranks: who sends to whom. A pure function; every rank may compute it for itself.
    ///
    /// `workers` are all ranks' metadata in the order of the ranks, trainers first.
    ///
    /// # Errors
    ///
    /// `Mismatch`, naming the rank that does not fit.
    fn build_topology(&self, workers: &[WorkerMetadata]) -> Result<Vec<Placement>>;
}

/// Whether a backend can run on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "status", rename_all = "snake_case")]
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
