//! The engine: shared memory as the link of the update protocol.

use std::sync::Arc;

use async_trait::async_trait;

use engine_core::memory::{Job, Pool};
use engine_core::update::{ReceiveLink, Receiver, SendLink, Sender};
use engine_core::{
    CheckpointEngine, ControlPlane, EngineContext, Error, ErrorKind, Placement, Rank,
    ReceivedWeights, Result, Role, SendReport, Storage, Version, WeightStream, WorkerMetadata,
};

use crate::NAME;
use crate::segment::{MappedSegment, Segment, SegmentInfo};

/// Buckets of the trainer: one is packed while the rollouts read the other.
const SLOTS: u32 = 2;

/// The size of a bucket unless one is configured. Two of them fit into the last-level cache of a
/// server, so that the rollouts read from there what the trainer has just written.
const DEFAULT_BUCKET_MEGABYTES: u64 = 16;

/// A rank's end of the shared-memory transport.
#[derive(Debug)]
pub struct IpcEngine {
    context: EngineContext,
    control: ControlPlane,
    pool: Pool,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    New,
    Prepared(Option<Arc<Segment>>),
    Sending(Sender<Outgoing>),
    Receiving(Receiver<Incoming>),
}

impl IpcEngine {
    /// The engine of a rank.
    ///
    /// # Errors
    ///
    /// `Config` without a control plane; `Resource` if its threads cannot be started.
    pub fn new(context: EngineContext) -> Result<Self> {
        context.config.kwargs::<Kwargs>(NAME)?;
        let control = context.require_control()?;
        let pool = Pool::new(context.threads())?;
        Ok(Self { context, control, pool, phase: Phase::New })
    }
}

/// The transport has no options of its own.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Kwargs {}

#[async_trait]
impl CheckpointEngine for IpcEngine {
    async fn prepare(&mut self) -> Result<WorkerMetadata> {
        if matches!(self.phase, Phase::Sending(_) | Phase::Receiving(_)) {
            return Err(wrong_phase("preparing", "it is in a group already"));
        }
        let segment = match self.context.role {
            Role::Rollout => None,
            Role::Trainer => {
                let default = DEFAULT_BUCKET_MEGABYTES << 20;
                let bucket_bytes = self.context.config.bucket_bytes().unwrap_or(default);
                Some(Arc::new(Segment::create(SLOTS, bucket_bytes)?))
            }
        };
        let details = match &segment {
            None => serde_json::Value::Null,
            Some(segment) => serde_json::to_value(segment.info()).map_err(|error| {
                Error::new(ErrorKind::Protocol, "preparing", error.to_string()).with_source(error)
            })?,
        };
        self.phase = Phase::Prepared(segment);
        Ok(WorkerMetadata::of_this_process(NAME, self.context.role, details))
    }

    async fn init_process_group(&mut self, place: Placement) -> Result<()> {
        let Phase::Prepared(segment) = &self.phase else {
            return Err(wrong_phase("joining the group", "call prepare first, and once"));
        };
        let phase = match segment {
            Some(segment) => {
                let link = Outgoing { segment: segment.clone(), pool: self.pool.clone() };
                let rollouts = (0..).map(Rank).zip(&place.peers);
                let rollouts = rollouts.filter(|(_, peer)| peer.role == Role::Rollout);
                let rollouts = rollouts.map(|(rank, _)| rank);
                Phase::Sending(Sender::new(link, &self.context, self.control.clone(), rollouts))
            }
            None => {
                let details = place.peer(Rank::LEADER)?.details.clone();
                let info: SegmentInfo = serde_json::from_value(details).map_err(|error| {
                    let words = format!("the trainer's metadata is not ipc's: {error}");
                    Error::new(ErrorKind::Protocol, "joining the group", words)
                        .rank(Rank::LEADER)
                        .with_source(error)
                })?;
                let segment = MappedSegment::open(info)
                    .map_err(|error| Error::from(error).rank(Rank::LEADER))?;
                let (link, pool) = (Incoming { segment }, self.pool.clone());
                Phase::Receiving(Receiver::new(link, &self.context, self.control.clone(), pool))
            }
        };
        self.phase = phase;
        Ok(())
    }

    async fn send_weights(
        &mut self,
        weights: WeightStream<'_>,
        version: Version,
    ) -> Result<SendReport> {
        match &mut self.phase {
            Phase::Sending(sender) => sender.send(weights, version).await,
            Phase::Receiving(_) => Err(wrong_phase("sending weights", "this rank is a rollout")),
            _ => Err(wrong_phase("sending weights", "call init_process_group first")),
        }
    }

    async fn receive_weights(&mut self, version: Option<Version>) -> Result<ReceivedWeights<'_>> {
        match &mut self.phase {
            Phase::Receiving(receiver) => receiver.receive(version).await,
            Phase::Sending(_) => Err(wrong_phase("receiving weights", "this rank is a trainer")),
            _ => Err(wrong_phase("receiving weights", "call init_process_group first")),
        }
    }

    async fn finalize(&mut self) -> Result<()> {
        // The memory goes with the last view of it, here and at the rollouts.
        match std::mem::replace(&mut self.phase, Phase::New) {
            Phase::New => Err(wrong_phase("finalizing", "it was not prepared")),
            _ => Ok(()),
        }
    }
}

fn wrong_phase(operation: &str, message: &str) -> Error {
    Error::new(ErrorKind::State, operation, message)
}

/// The trainer's buckets.
#[derive(Debug)]
struct Outgoing {
    segment: Arc<Segment>,
    pool: Pool,
}

#[async_trait]
impl SendLink for Outgoing {
    fn slots(&self) -> usize {
        self.segment.info().slots as usize
    }

    fn bucket_bytes(&self) -> u64 {
        self.segment.info().bucket_bytes
    }

    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64> {
        let mut bucket = self.segment.write(slot).await;
        let pool = self.pool.clone();
        self.pool.start(move || pool.encode(&jobs, bucket.as_mut(), digests)).await
    }

    async fn publish(&mut self, _: usize, _: u64) -> Result<()> {
        // The rollouts see the same memory.
        Ok(())
    }
}

/// The trainer's buckets as a rollout reads them.
#[derive(Debug)]
struct Incoming {
    segment: MappedSegment,
}

#[async_trait]
impl ReceiveLink for Incoming {
    async fn fetch(&mut self, slot: u32, filled: u64) -> Result<Storage> {
        let bytes = self.segment.read(slot, filled);
        bytes.map(Storage::from).map_err(|error| Error::from(error).rank(Rank::LEADER))
    }
}
