//! The engine: NIXL's transfers as the link of the update protocol.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use engine_core::memory::{Job, Pool};
use engine_core::provider::MemoryKind;
use engine_core::{
    CheckpointEngineConfig, Control, EngineContext, Error, ErrorKind, Prepared, PreparedRollout,
    PreparedTrainer, Rank, Result, Role, RolloutEngine, TrainerEngine, WorkerMetadata,
};
use protocol::{Arrival, Fetch, FetchLink, Receiver, SendLink, Sender, Topology as Shape};
use serde::{Deserialize, Serialize};

use crate::NAME;
use crate::agent::{self, Agent, AgentOptions, Awaiting, Card};
use crate::arena::{Arena, Slot};
use crate::error::NixlError;
use crate::host::HostMemory;
use crate::{interface, lending};

/// Slots of a rank. Together they are as large as the two buckets of the configuration. With four, a bucket can stay until the next two
/// ranks of a ring have it, without loss of speed.
const SLOTS: u32 = 4;

/// The size of each of the two buckets unless one is configured.
const DEFAULT_BUCKET_MEGABYTES: u64 = 32;
/// The default on a device, where the time for a bucket must be long compared with that for starting one.
const DEFAULT_DEVICE_MEGABYTES: u64 = 512;

/// The transport's options: `engine_kwargs.nixl` of the configuration.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct NixlOptions {
    /// Who fetches from whom.
    pub topology: Topology,
    /// Who moves the bytes.
    pub transfer: Transfer,
    /// UCX's transports, in the form of `UCX_TLS` (`tcp`, `rc,sm`, …); all available ones if empty.
    pub transports: String,
    /// What UCX does about peers that fail.
    pub error_handling: ErrorHandling,
    /// The folder of `libnixl_capi.so`, or one into which a wheel of NIXL was unpacked. If not set, the library is searched for.
    pub library_dir: Option<PathBuf>,
    /// Whether trainers write into tensors that rollouts lend. The same on all trainers.
    pub placed: bool,
}

impl NixlOptions {
    pub(crate) fn of_agent(&self) -> AgentOptions {
        AgentOptions {
            library_dir: self.library_dir.clone(),
            transports: self.transports.clone(),
            error_handling: match self.error_handling {
                ErrorHandling::Peer => "peer",
                ErrorHandling::None => "none",
            },
            interface: String::new(),
            writes: self.transfer == Transfer::Write,
            // The library's thread would spin for the lock that the agent's thread holds while it copies. At other times, requests of peers
            // for host memory can wait for the agent's next poll.
            own_thread: false,
            reaches_devices: false,
        }
    }
}

/// A rank's slots.
pub(crate) fn arena(
    config: &CheckpointEngineConfig,
    memory: Option<&dyn MemoryKind>,
) -> Result<Arena> {
    let kind = memory.unwrap_or(&HostMemory);
    let bucket = bucket_bytes(config, kind.is_host());
    Arena::on(kind, &config.device, SLOTS, bucket / (u64::from(SLOTS) / 2))
}

/// The size of each of the two buckets of a rank.
pub(crate) fn bucket_bytes(config: &CheckpointEngineConfig, is_host: bool) -> u64 {
    let default = if is_host { DEFAULT_BUCKET_MEGABYTES } else { DEFAULT_DEVICE_MEGABYTES };
    config.bucket_bytes().unwrap_or(default << 20)
}

/// Makes names unique: agents with one name would be confused, above all those of a rank that restarts.
pub(crate) fn unique_name(rank: impl std::fmt::Display) -> String {
    let random = std::hash::BuildHasher::hash_one(
        &std::collections::hash_map::RandomState::new(),
        std::process::id(),
    );
    format!("ckpt-{rank}-{random:016x}")
}

/// Who fetches from whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub enum Topology {
    /// A ring for many buckets, a tree for few, within hosts where possible: whichever takes the least time by estimate.
    #[default]
    Auto,
    /// Each rollout from the one before it.
    Ring,
    /// All rollouts from the trainer.
    Star,
}

impl Topology {
    fn shape(self) -> Shape {
        match self {
            Self::Auto => Shape::Fastest,
            Self::Star => Shape::Star,
            Self::Ring => Shape::Ring,
        }
    }
}

/// Who moves the bytes of a bucket. The same on every rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub enum Transfer {
    /// The rank that wants them reads them, if there is a transport that can read. Over TCP it asks the rank that has them to write them.
    #[default]
    Read,
    /// The rank that has them writes them, when it is asked. For fabrics that write faster than they read.
    Write,
}

/// What UCX does about peers that fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub enum ErrorHandling {
    /// It notices them. Only transports that can are used.
    #[default]
    Peer,
    /// It does not notice them, and may use transports that cannot. Deadlines still end every wait.
    None,
}

/// The data about a rank for the topology.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Details {
    pub(crate) slots: u32,
    pub(crate) slot_bytes: u64,
    pub(crate) transfer: Transfer,
}

/// A rank's memory and its agent.
#[derive(Debug)]
struct Node {
    agent: Agent,
    arena: Arc<Arena>,
    deadline: Duration,
}

impl Node {
    /// Starts a rank's agent over its slots. Returns it with its data for the topology.
    async fn start(
        context: &EngineContext,
        options: &NixlOptions,
        control: &dyn Control,
    ) -> Result<(Arc<Self>, serde_json::Value)> {
        let arena = Arc::new(arena(&context.config, context.memory_kind()?)?);
        let interface = interface::towards(control.leader_address()).await;
        let of_agent = AgentOptions { interface, ..options.of_agent() };
        let agent = Agent::start(of_agent, unique_name(control.rank()), arena.clone()).await?;
        // Shorter than the protocol's deadline, so that the error names the transfer that hangs.
        let deadline = context.deadline().mul_f64(0.75);
        let details = Details {
            slots: arena.slots(),
            slot_bytes: arena.slot_bytes(),
            transfer: options.transfer,
        };
        Ok((Arc::new(Self { agent, arena, deadline }), serde_json::json!(details)))
    }

    /// Ends the agent of a rank that leaves the group.
    async fn close(self: &mut Arc<Self>) {
        // Views that are still held keep the memory, which nobody outside can reach any more.
        if let Some(node) = Arc::get_mut(self) {
            node.agent.close().await;
        }
    }

    /// The agent's card, encoded.
    fn card(&self) -> Bytes {
        let card = self.agent.card();
        let encoded = card.and_then(|card| postcard::to_stdvec(&*card).map_err(NixlError::Card));
        encoded.map_or_else(
            |error| {
                // The reader of the empty card reports an error that names this rank.
                tracing::warn!(%error, "this rank cannot say how to reach it");
                Bytes::new()
            },
            Bytes::from,
        )
    }
}

/// The options of a configuration, after checks.
pub(crate) fn options(context: &EngineContext) -> Result<NixlOptions> {
    let options = context.config.kwargs::<NixlOptions>(NAME)?;
    // UCX reads the list to its end or to the next option, whichever comes first.
    let fit = |c: char| c.is_ascii_alphanumeric() || "_,:^/\\".contains(c);
    if !options.transports.chars().all(fit) {
        let message = format!("transports: `{}` is no list of names", options.transports);
        return Err(Error::new(ErrorKind::Config, "preparing", message));
    }
    Ok(options)
}

pub(crate) async fn prepare_trainer(context: EngineContext) -> Result<PreparedTrainer> {
    let options = options(&context)?;
    if options.placed {
        return lending::prepare_trainer(context).await;
    }
    let control = context.require_control()?;
    let pool = Pool::new(context.threads(Role::Trainer))?;
    let (node, details) = Node::start(&context, &options, &*control).await?;
    let metadata = WorkerMetadata::of_this_process(NAME, control.rank(), Role::Trainer, details);
    Ok(Prepared::new(metadata, move |place| async move {
        let link = Outgoing { node, pool, topology: options.topology };
        let hosts = place.peers.iter().map(|peer| (peer.rank, &*peer.host));
        let engine = Sender::new(link, &context, control, place.rollouts()).with_hosts(hosts);
        Ok(Box::new(engine) as Box<dyn TrainerEngine>)
    }))
}

pub(crate) async fn prepare_rollout(context: EngineContext) -> Result<PreparedRollout> {
    let options = options(&context)?;
    if options.placed {
        return Err(placed::says_nothing_of_what_it_wants());
    }
    let control = context.require_control()?;
    let pool = Pool::new(context.threads(Role::Rollout))?;
    let (node, details) = Node::start(&context, &options, &*control).await?;
    let rank = control.rank();
    let metadata = WorkerMetadata::of_this_process(NAME, rank, Role::Rollout, details);
    Ok(Prepared::new(metadata, move |_| async move {
        let link = Incoming { node, rank, peers: HashMap::new() };
        let engine = Receiver::new(link, &context, control, pool);
        Ok(Box::new(engine) as Box<dyn RolloutEngine>)
    }))
}

/// The trainer's buckets.
#[derive(Debug)]
struct Outgoing {
    node: Arc<Node>,
    pool: Pool,
    topology: Topology,
}

#[async_trait]
impl SendLink for Outgoing {
    fn slots(&self) -> usize {
        self.node.arena.slots() as usize
    }

    fn bucket_bytes(&self) -> u64 {
        self.node.arena.slot_bytes()
    }

    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64> {
        let Node { arena, deadline, .. } = &*self.node;
        let bucket = arena.lock(slot as u32, arena.slot_bytes(), *deadline).await?;
        let pool = self.pool.clone();
        self.pool.start(move || bucket.fill(jobs, &pool, digests)).await
    }

    async fn publish(&mut self, _: usize, _: u64) -> Result<()> {
        // Nothing is sent: the rollouts read the bucket, or ask for it.
        self.node.agent.stir();
        Ok(())
    }

    fn topology(&self, _: usize, _: usize) -> Option<Shape> {
        Some(self.topology.shape())
    }

    fn card(&self) -> Bytes {
        self.node.card()
    }

    fn end(&mut self, committed: bool) {
        if committed {
            self.node.arena.settle();
        }
    }

    fn slower(&self) -> Vec<String> {
        self.node.arena.slower()
    }

    async fn close(&mut self, _: Duration) {
        self.node.close().await;
    }
}

/// A rollout's buckets.
#[derive(Debug)]
struct Incoming {
    node: Arc<Node>,
    /// This rank.
    rank: Rank,
    /// The ranks that it fetched from, with their cards, encoded and decoded.
    peers: HashMap<Rank, (Bytes, Arc<Card>)>,
}

impl Incoming {
    fn peer(&mut self, rank: Rank, card: Bytes) -> Result<Arc<Card>, NixlError> {
        if let Some((_, known)) = self.peers.get(&rank).filter(|(known, _)| *known == card) {
            return Ok(known.clone());
        }
        let read: Arc<Card> = postcard::from_bytes(&card).map(Arc::new).map_err(NixlError::Card)?;
        if self.peers.get(&rank).is_some_and(|(_, known)| known.name != read.name) {
            // Another process has the rank now.
            self.abandon(rank);
        }
        self.peers.insert(rank, (card, read.clone()));
        Ok(read)
    }
}

/// A bucket that is being fetched.
struct Expected {
    from: Rank,
    /// The rank that fetches.
    by: Rank,
    arrival: Arrival,
}

impl Awaiting for Expected {
    fn is_awaited(&self) -> bool {
        self.arrival.is_awaited()
    }

    fn tell(self: Box<Self>, result: Result<Slot, NixlError>) {
        let told = |error: NixlError| {
            let rank = if error.is_of_this_rank() { self.by } else { self.from };
            Error::from(error).rank(rank)
        };
        self.arrival.tell(result.map_err(told).and_then(Slot::into_storage));
    }
}

#[async_trait]
impl FetchLink for Incoming {
    fn card(&self) -> Bytes {
        self.node.card()
    }

    async fn fetch(&mut self, fetch: Fetch, arrival: Arrival) {
        let Fetch { from, card, slot, filled, .. } = fetch;
        let by = self.rank;
        let prepared = async {
            let peer = self.peer(from, card)?;
            peer.range(slot, filled)?;
            let Node { arena, deadline, .. } = &*self.node;
            Ok((peer, arena.lock(slot, filled, *deadline).await?))
        };
        let expected = Box::new(Expected { from, by, arrival });
        match prepared.await {
            Err(error) => expected.tell(Err(error)),
            Ok((peer, here)) => self.node.agent.transfer(agent::Transfer {
                slot: here,
                peer,
                from: slot,
                deadline: self.node.deadline,
                done: expected,
            }),
        }
    }

    fn abandon(&mut self, from: Rank) {
        if let Some((_, card)) = self.peers.remove(&from) {
            self.node.agent.forget(&card);
        }
    }

    async fn listen(&mut self, limit: Duration) {
        self.node.agent.renew(limit).await;
    }

    async fn close(&mut self) {
        self.node.close().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_of_a_group_is_the_fastest_one_unless_another_is_chosen() {
        assert_eq!(Topology::default(), Topology::Auto);
        for (chosen, shape) in [
            (Topology::Auto, Shape::Fastest),
            (Topology::Ring, Shape::Ring),
            (Topology::Star, Shape::Star),
        ] {
            assert_eq!(chosen.shape(), shape);
        }
    }
}
