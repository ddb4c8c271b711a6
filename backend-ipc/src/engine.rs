//! The engine: buckets that other processes of the host map, in its memory or on its devices.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use engine_core::memory::Pool;
use engine_core::{
    CheckpointEngine, Control, EngineContext, Error, ErrorKind, Placement, Rank, ReceivedWeights,
    Result, Role, SendReport, Version, WeightStream, WorkerMetadata,
};
use protocol::{ReceiveLink, Receiver, SendLink, Sender};

use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::segment::{MappedSegment, Segment, SegmentInfo};
use crate::{NAME, shared};

/// How long the trainer waits for rollouts to close its buckets, before it leaves them to them.
const CLOSING: Duration = Duration::from_secs(2);

/// Buckets of the trainer: one is packed while the rollouts read the other.
const SLOTS: u32 = 2;

/// The size of a bucket unless one is configured, for so many threads of the trainer. Two of them fit into
/// the last-level cache of a server, so that the rollouts read from there what the trainer has just
/// written; many threads need larger ones to have enough to do in each.
fn default_bucket_megabytes(threads: usize) -> u64 {
    (4 * threads as u64).clamp(16, 64)
}

/// A rank's end of the shared-memory transport.
#[derive(Debug)]
pub struct IpcEngine {
    context: EngineContext,
    control: Arc<dyn Control>,
    pool: Pool,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    New,
    Prepared(Option<Buckets>),
    Sending(Sender<Box<dyn SendLink>>, Buckets),
    Receiving(Receiver<Box<dyn ReceiveLink>>),
}

/// The trainer's buckets.
#[derive(Clone, Debug)]
enum Buckets {
    Shared(Arc<Segment>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<cuda::Buckets>),
}

/// What the trainer tells of its buckets.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Offer {
    Shared(SegmentInfo),
    #[cfg(feature = "cuda")]
    Cuda(cuda::CudaInfo),
}

impl Buckets {
    fn create(context: &EngineContext) -> Result<Self> {
        let config = &context.config;
        let bytes = |default: u64| config.bucket_bytes().unwrap_or(default << 20);
        #[cfg(feature = "cuda")]
        if !config.device.is_cpu() {
            let bytes = bytes(cuda::DEFAULT_BUCKET_MEGABYTES);
            match cuda::Buckets::create(&config.device, bytes)? {
                Ok(buckets) => return Ok(Self::Cuda(Arc::new(buckets))),
                Err(reason) => tracing::warn!(
                    %reason,
                    "other processes cannot open this device's memory here: weights go through \
                     shared memory of the host instead, which is slower"
                ),
            }
        }
        Ok(Self::Shared(Arc::new(Segment::create(
            SLOTS,
            bytes(default_bucket_megabytes(context.threads())),
        )?)))
    }

    fn offer(&self) -> Offer {
        match self {
            Self::Shared(segment) => Offer::Shared(segment.info().clone()),
            #[cfg(feature = "cuda")]
            Self::Cuda(buckets) => Offer::Cuda(buckets.info().clone()),
        }
    }

    /// Gives rollouts time to let go of them, where that matters.
    async fn close(&self, limit: Duration) {
        match self {
            // The memory goes with the last mapping of it, here and at the rollouts.
            Self::Shared(_) => {
                let _ = limit;
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(buckets) => {
                if !buckets.wait_until_closed(limit).await {
                    tracing::debug!("rollouts have the buckets open after the trainer has closed");
                }
            }
        }
    }

    fn link(&self, pool: Pool) -> Box<dyn SendLink> {
        match self {
            Self::Shared(segment) => Box::new(shared::Outgoing { segment: segment.clone(), pool }),
            #[cfg(feature = "cuda")]
            Self::Cuda(buckets) => Box::new(cuda::Outgoing { buckets: buckets.clone(), pool }),
        }
    }
}

impl IpcEngine {
    /// The receiving end of the trainer's buckets.
    fn open(&self, offer: Offer) -> Result<Box<dyn ReceiveLink>> {
        match offer {
            Offer::Shared(info) => {
                let segment = MappedSegment::open(info)
                    .map_err(|error| Error::from(error).rank(Rank::LEADER))?;
                Ok(Box::new(shared::Incoming { segment }))
            }
            #[cfg(feature = "cuda")]
            Offer::Cuda(info) => {
                Ok(Box::new(cuda::Incoming::open(&info, &self.context.config.device)?))
            }
        }
    }

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
        if matches!(self.phase, Phase::Sending(..) | Phase::Receiving(_)) {
            return Err(Error::wrong_phase("preparing", "it is in a group already"));
        }
        let buckets = match self.context.role {
            Role::Rollout => None,
            Role::Trainer => Some(Buckets::create(&self.context)?),
        };
        let offer = buckets.as_ref().map(Buckets::offer);
        let details = serde_json::to_value(offer).map_err(|error| {
            Error::new(ErrorKind::Protocol, "preparing", error.to_string()).with_source(error)
        })?;
        self.phase = Phase::Prepared(buckets);
        let (rank, role) = (self.control.rank(), self.context.role);
        Ok(WorkerMetadata::of_this_process(NAME, rank, role, details))
    }

    async fn init_process_group(&mut self, place: Placement) -> Result<()> {
        let Phase::Prepared(buckets) = &self.phase else {
            return Err(Error::wrong_phase("joining the group", "call prepare first, and once"));
        };
        let phase = match buckets {
            Some(buckets) => {
                let link = buckets.link(self.pool.clone());
                let (control, rollouts) = (self.control.clone(), place.rollouts());
                let sender = Sender::new(link, &self.context, control, rollouts);
                Phase::Sending(sender, buckets.clone())
            }
            None => {
                let details = place.peer(Rank::LEADER)?.details.clone();
                let offer = serde_json::from_value(details).map_err(|error| {
                    let words = format!("the trainer's buckets are not what ipc knows: {error}");
                    Error::new(ErrorKind::Protocol, "joining the group", words)
                        .rank(Rank::LEADER)
                        .with_source(error)
                })?;
                let (link, pool) = (self.open(offer)?, self.pool.clone());
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
            Phase::Sending(sender, _) => sender.send(weights, version).await,
            Phase::Receiving(_) => {
                Err(Error::wrong_phase("sending weights", "this rank is a rollout"))
            }
            _ => Err(Error::wrong_phase("sending weights", "call init_process_group first")),
        }
    }

    async fn receive_weights(&mut self, version: Option<Version>) -> Result<ReceivedWeights<'_>> {
        match &mut self.phase {
            Phase::Receiving(receiver) => receiver.receive(version).await,
            Phase::Sending(..) => {
                Err(Error::wrong_phase("receiving weights", "this rank is a trainer"))
            }
            _ => Err(Error::wrong_phase("receiving weights", "call init_process_group first")),
        }
    }

    async fn finalize(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.phase, Phase::New) {
            Phase::New => Err(Error::wrong_phase("finalizing", "it was not prepared")),
            Phase::Sending(sender, buckets) => {
                drop(sender);
                buckets.close(self.context.deadline().min(CLOSING)).await;
                Ok(())
            }
            // The rest goes with the last view of it, here and at the rollouts.
            Phase::Prepared(_) | Phase::Receiving(_) => Ok(()),
        }
    }
}
