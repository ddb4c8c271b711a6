//! The links of the update protocol: the trainer's buckets, in any kind of memory that other processes can open.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use engine_core::memory::{Job, Pool};
use engine_core::plan::ALIGNMENT;
use engine_core::provider::{
    Allocation, BucketMemory, BucketSlot, ImportedMemory, Lifetime, MemoryKind,
};
use engine_core::{
    DeviceChoice, EngineContext, Error, ErrorKind, Placement, Rank, Result, Role, Storage,
};
use protocol::{ReceiveLink, SendLink};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::lease::{Lease, Leased, Terms, sweep};
use crate::segment::SharedMemory;

/// The slots in host memory: the trainer packs one while the rollouts read the other.
const SLOTS: u32 = 2;
/// The slots on a device. Together they are as large as two buckets of the configured size. With four, the processes
/// seldom wait for each other.
const DEVICE_SLOTS: u32 = 4;

/// The default bucket size on a device. It is large because processes take turns on a device, and fewer turns are
/// faster.
const DEFAULT_DEVICE_MEGABYTES: u64 = 2048;

/// The default bucket size in host memory, for this number of trainer threads. Two buckets fit into the last-level cache
/// of a server, so the rollouts read there what the trainer has just written. With more threads a bucket is larger, so
/// that each thread has enough work in it.
fn default_megabytes(threads: usize) -> u64 {
    (4 * threads as u64).clamp(16, 64)
}

/// The trainer's metadata: how to open its buckets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Offer {
    /// The kind of their memory.
    kind: String,
    /// What other processes need to open the memory.
    handle: Vec<u8>,
    /// The lease that other processes hold while they have the memory open, if the memory needs one.
    terms: Option<Terms>,
    slots: u32,
    bucket_bytes: u64,
}

/// A slot. It is locked until its filling has ended, even if the future that began it is dropped.
type Slot = Arc<tokio::sync::Mutex<Box<dyn BucketSlot>>>;

/// The trainer's buckets.
#[derive(Debug)]
pub(crate) struct Buckets {
    slots: Vec<Slot>,
    memory: Leased<Arc<dyn BucketMemory>>,
    offer: Offer,
    /// Why they are in host memory although a device is configured.
    slower: Option<String>,
}

impl Buckets {
    /// Allocates them on the configured device, or in shared memory of the host if other processes cannot open the
    /// device's memory.
    pub(crate) fn create(context: &EngineContext) -> Result<Self> {
        sweep();
        let mut slower = None;
        if let Some(kind) = context.memory_kind()? {
            match Self::of(kind, context)? {
                Ok(buckets) => return Ok(buckets),
                Err(reason) => {
                    let why = format!(
                        "weights go through shared memory of the host, because other processes cannot open \
                         this device's memory: {reason}"
                    );
                    warn!("{why}");
                    slower = Some(why);
                }
            }
        }
        Ok(Self { slower, ..Self::of(&SharedMemory, context)?? })
    }

    /// Allocates them in a kind of memory. The inner error says why other processes cannot open that memory on this
    /// system.
    fn of(kind: &dyn MemoryKind, context: &EngineContext) -> Result<Result<Self>> {
        let (slots, default) = match kind.is_host() {
            true => (SLOTS, default_megabytes(context.threads(Role::Trainer))),
            false => (DEVICE_SLOTS, DEFAULT_DEVICE_MEGABYTES),
        };
        let bytes = context.config.bucket_bytes().unwrap_or(default << 20);
        let bucket_bytes = (bytes / u64::from(slots / 2)).max(ALIGNMENT);
        let Some(bucket_bytes) = bucket_bytes.checked_next_multiple_of(ALIGNMENT) else {
            let message = format!("{slots} × {bucket_bytes} bytes of buckets are too many");
            return Err(Error::new(ErrorKind::Config, "preparing", message));
        };
        let device = &context.config.device;
        let Allocation { memory, slots: cut } =
            kind.allocate(device, slots, bucket_bytes, Lifetime::Users)?;
        let exported = match memory.export() {
            Ok(exported) => exported,
            Err(reason) => return Ok(Err(reason)),
        };
        let lease = exported.stays_while_open.then(Lease::new).transpose()?;
        let memory = Leased::new(memory, lease);
        let offer = Offer {
            kind: kind.name().into(),
            handle: exported.handle,
            terms: memory.terms(),
            slots,
            bucket_bytes,
        };
        let slots = cut.into_iter().map(|slot| Arc::new(slot.into())).collect();
        Ok(Ok(Self { slots, memory, offer, slower: None }))
    }

    pub(crate) fn offer(&self) -> &Offer {
        &self.offer
    }

    pub(crate) fn into_link(self, pool: Pool) -> Outgoing {
        Outgoing { buckets: self, pool }
    }
}

#[derive(Debug)]
pub(crate) struct Outgoing {
    buckets: Buckets,
    pool: Pool,
}

#[async_trait]
impl SendLink for Outgoing {
    fn slots(&self) -> usize {
        self.buckets.slots.len()
    }

    fn bucket_bytes(&self) -> u64 {
        self.buckets.offer.bucket_bytes
    }

    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64> {
        let (pool, len) = (self.pool.clone(), self.bucket_bytes());
        // Locked before the work enters the pool, and held until the work ends, even if this future is
        // dropped.
        let mut slot = self.buckets.slots[slot].clone().lock_owned().await;
        self.pool.start(move || slot.fill(len, jobs, &pool, digests)).await
    }

    async fn publish(&mut self, _: usize, _: u64) -> Result<()> {
        // Nothing to do: the rollouts see the same memory, and `fill` has waited for the device.
        Ok(())
    }

    fn end(&mut self, committed: bool) {
        if committed {
            self.buckets.memory.settle();
        }
    }

    fn slower(&self) -> Vec<String> {
        let mut slower = self.buckets.memory.slower();
        slower.extend(self.buckets.slower.clone());
        slower
    }

    async fn close(&mut self, limit: Duration) {
        if !self.buckets.memory.wait_until_closed(limit).await {
            tracing::debug!("rollouts have the buckets open after the trainer has closed");
        }
    }
}

/// The trainer's buckets as a rollout reads them.
#[derive(Debug)]
pub(crate) struct Incoming {
    memory: Box<dyn ImportedMemory>,
    slots: u32,
    bucket_bytes: u64,
}

impl Incoming {
    /// Opens the buckets of the group's trainer.
    pub(crate) fn open(place: &Placement, context: &EngineContext) -> Result<Self> {
        let details = &place.peer(Rank::LEADER)?.details;
        let opened = offer(details).and_then(|offer| Self::of(&offer, context));
        opened.map_err(|error| error.rank(Rank::LEADER))
    }

    fn of(offer: &Offer, context: &EngineContext) -> Result<Self> {
        let Offer { slots, bucket_bytes, .. } = *offer;
        let bytes = bucket_bytes.checked_mul(slots.into()).ok_or_else(|| {
            let message = format!("{slots} buckets of {bucket_bytes} bytes");
            Error::new(ErrorKind::Protocol, JOINING, message)
        })?;
        let device = &context.config.device;
        let kind = kind_of(&offer.kind, device, context.memory_kind()?)?;
        // Accepted before the memory is opened, and held until it is closed.
        let owner = offer.terms.as_ref().map(Terms::accept).transpose()?;
        let memory = kind.import(device, &offer.handle, bytes, Arc::new(owner))?;
        Ok(Self { memory, slots, bucket_bytes })
    }
}

/// This rank's kind of memory with the name that the trainer gives.
fn kind_of<'a>(
    name: &str,
    device: &DeviceChoice,
    own: Option<&'a dyn MemoryKind>,
) -> Result<&'a dyn MemoryKind> {
    // Every rank can read shared memory of the host.
    let mut known = own.into_iter().chain([&SharedMemory as &dyn MemoryKind]);
    known.find(|kind| kind.name() == name).ok_or_else(|| {
        let message = format!(
            "the trainer's buckets are in memory of `{name}`, this rank's device is `{device}`: set `device` to \
             `{name}` here, or to `cpu` on the trainer"
        );
        Error::new(ErrorKind::Mismatch, JOINING, message)
    })
}

const JOINING: &str = "joining the group";

fn offer(details: &serde_json::Value) -> Result<Offer> {
    Offer::deserialize(details).map_err(|error| {
        let words = format!("the trainer's buckets are not what ipc knows: {error}");
        Error::new(ErrorKind::Protocol, JOINING, words).with_source(error)
    })
}

#[async_trait]
impl ReceiveLink for Incoming {
    async fn fetch(&mut self, slot: u32, filled: u64) -> Result<Storage> {
        if slot >= self.slots || filled > self.bucket_bytes {
            let Self { slots, bucket_bytes, .. } = self;
            let message =
                format!("bytes 0..{filled} of slot {slot} of {slots} × {bucket_bytes} bytes");
            let error = Error::new(ErrorKind::Protocol, "fetching a bucket", message);
            return Err(error.rank(Rank::LEADER));
        }
        let start = u64::from(slot) * self.bucket_bytes;
        let view = self.memory.view(start..start + filled);
        view.map_err(|error| error.rank(Rank::LEADER))
    }
}
