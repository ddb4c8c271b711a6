//! Buckets on a CUDA device as the links of the update protocol: the trainer exports them, rollouts on
//! the same GPU, or on one with peer access to it, read them in place.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use device_cuda::{CudaError, CudaMemory, Device, Packer, bucket_storage};
use engine_core::memory::{Job, Pool};
use engine_core::plan::ALIGNMENT;
use engine_core::{DeviceChoice, Error, ErrorKind, Rank, Result, Storage};
use protocol::{ReceiveLink, SendLink};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::error::SegmentError;
use crate::lease::{Lease, Terms};

/// Slots of the trainer. Together they are as large as the two buckets that the configuration speaks of:
/// with four, a process seldom waits for the other, and each turn on the GPU finds work.
const SLOTS: u32 = 4;

/// The size of each of the two buckets unless one is configured: processes take turns on a GPU, and the
/// fewer turns the better.
pub(crate) const DEFAULT_BUCKET_MEGABYTES: u64 = 2048;

/// What a rollout needs to map a trainer's buckets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CudaInfo {
    /// The allocation as other processes open it.
    pub(crate) handle: Vec<u8>,
    /// What they hold as long as they have it open.
    terms: Terms,
    /// Its number among the exporting process's own.
    export: u64,
    slots: u32,
    bucket_bytes: u64,
}

/// The buckets of this process: it cannot open its own exports, but need not either.
static EXPORTS: LazyLock<Mutex<HashMap<u64, CudaMemory>>> = LazyLock::new(Mutex::default);

fn exports() -> std::sync::MutexGuard<'static, HashMap<u64, CudaMemory>> {
    // Every change is one insertion or removal.
    EXPORTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory that other processes can open. It is freed when they have closed it, and never under them: what
/// becomes of them then, CUDA does not define.
#[derive(Debug)]
pub(crate) struct Exported {
    memory: CudaMemory,
    number: u64,
    /// Taken when it is dropped.
    lease: Option<Lease>,
}

/// What was dropped while other processes had it open.
static LEFT: Mutex<Vec<(CudaMemory, Lease)>> = Mutex::new(Vec::new());

/// Frees what others have closed meanwhile.
fn sweep() {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner).retain(|(_, lease)| !lease.is_over());
}

impl Exported {
    /// Exports memory; or says why this system does not let other processes open it.
    pub(crate) fn new(memory: CudaMemory) -> Result<Result<(Self, CudaInfo), CudaError>> {
        let handle = match memory.export() {
            Ok(handle) => handle.to_vec(),
            Err(reason) => return Ok(Err(reason)),
        };
        let lease = Lease::new()?;
        let terms = lease.terms();
        let mut exports = exports();
        let number = exports.keys().max().map_or(0, |last| last + 1);
        exports.insert(number, memory.clone());
        let info = CudaInfo { handle, terms, export: number, slots: 0, bucket_bytes: 0 };
        Ok(Ok((Self { memory, number, lease: Some(lease) }, info)))
    }

    pub(crate) fn memory(&self) -> &CudaMemory {
        &self.memory
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// What others hold as long as they have it open.
    pub(crate) fn terms(&self) -> Result<Terms> {
        let lease = self.lease.as_ref().ok_or(SegmentError::Lent)?;
        Ok(lease.terms())
    }
}

impl Drop for Exported {
    fn drop(&mut self) {
        exports().remove(&self.number);
        if let Some(lease) = self.lease.take().filter(|lease| !lease.is_over()) {
            let bytes = self.memory.len();
            warn!(bytes, "other processes have device memory open: it is not freed yet");
            let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
            left.push((self.memory.clone(), lease));
        }
    }
}

/// Opens memory that a process exported, which may be this one.
///
/// # Errors
///
/// `Protocol` for what was never exported, `PeerLost` if the process has ended.
pub(crate) fn opened(
    device: &Device,
    handle: &[u8],
    terms: &Terms,
    export: u64,
    len: usize,
) -> Result<CudaMemory> {
    let refuse = |message: &str| Error::new(ErrorKind::Protocol, "opening device memory", message);
    if terms.pid() == std::process::id() {
        let memory = exports().get(&export).filter(|memory| memory.len() == len).cloned();
        let memory = memory.ok_or_else(|| refuse("it is gone"))?;
        if memory.device().ordinal() != device.ordinal() {
            let message =
                "it is on another device of this process: give that rank a process of its own";
            return Err(Error::new(ErrorKind::Config, "opening device memory", message));
        }
        return Ok(memory);
    }
    let handle = handle.try_into().map_err(|_| refuse("a handle of a wrong length"))?;
    // Before it is opened, and until it is closed.
    let borrowed = terms.accept()?;
    Ok(CudaMemory::import(device, handle, len, Arc::new(borrowed))?)
}

/// The trainer's buckets.
#[derive(Debug)]
pub(crate) struct Buckets {
    memory: Exported,
    packer: Packer,
    /// Held while a slot is filled, beyond the future that began it if need be.
    locks: Vec<Arc<tokio::sync::Mutex<()>>>,
    info: CudaInfo,
}

impl Buckets {
    /// Allocates buckets; or says why this system does not let other processes open them.
    pub(crate) fn create(
        device: &DeviceChoice,
        bucket_bytes: u64,
    ) -> Result<Result<Self, CudaError>> {
        let (slots, bucket_bytes) = (SLOTS, (bucket_bytes / u64::from(SLOTS / 2)).max(ALIGNMENT));
        let bucket_bytes = bucket_bytes.next_multiple_of(ALIGNMENT);
        let device = open(device)?;
        sweep();
        let too_large = || {
            let message = format!("{slots} × {bucket_bytes} bytes of buckets are too many");
            Error::new(ErrorKind::Config, "preparing", message)
        };
        let bytes = bucket_bytes.checked_mul(slots.into()).ok_or_else(too_large)?;
        let memory = CudaMemory::new(&device, usize::try_from(bytes).map_err(|_| too_large())?)?;
        let (memory, info) = match Exported::new(memory)? {
            Ok(exported) => exported,
            Err(reason) => return Ok(Err(reason)),
        };
        let packer = Packer::new(&device)?;
        let info = CudaInfo { slots, bucket_bytes, ..info };
        let locks = (0..slots).map(|_| Arc::default()).collect();
        Ok(Ok(Self { memory, packer, locks, info }))
    }

    pub(crate) fn info(&self) -> &CudaInfo {
        &self.info
    }

    /// Waits until no other process has the memory open, but no longer than that; whether none has.
    pub(crate) async fn wait_until_closed(&self, limit: Duration) -> bool {
        match &self.memory.lease {
            Some(lease) => lease.wait_until_over(limit).await,
            None => true,
        }
    }
}

/// The device of a configuration: the first one if it names none.
pub(crate) fn open(device: &DeviceChoice) -> Result<Device> {
    let ordinal = i32::try_from(device.ordinal().unwrap_or(0)).unwrap_or(i32::MAX);
    Ok(Device::open(ordinal)?)
}

#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) buckets: Arc<Buckets>,
    pub(crate) pool: Pool,
}

#[async_trait]
impl SendLink for Outgoing {
    fn slots(&self) -> usize {
        self.buckets.info.slots as usize
    }

    fn bucket_bytes(&self) -> u64 {
        self.buckets.info.bucket_bytes
    }

    async fn fill(&mut self, slot: usize, jobs: Vec<Job>, digests: bool) -> Result<u64> {
        let (buckets, pool) = (self.buckets.clone(), self.pool.clone());
        // Taken before the pool is entered, and held to the end of the work, also if nobody waits for that
        // any more.
        let lock = buckets.locks[slot].clone().lock_owned().await;
        self.pool
            .start(move || {
                let len = buckets.info.bucket_bytes as usize;
                let bucket = buckets.memory.memory.slice(slot * len, len)?;
                let sum = buckets.packer.fill(jobs, &bucket, &pool, digests);
                drop(lock);
                sum
            })
            .await
    }

    fn slower(&self) -> Vec<String> {
        self.buckets.packer.slower()
    }

    async fn close(&mut self, limit: Duration) {
        if !self.buckets.wait_until_closed(limit).await {
            tracing::debug!("rollouts have the buckets open after the trainer has closed");
        }
    }

    async fn publish(&mut self, _: usize, _: u64) -> Result<()> {
        // The rollouts see the same memory, and `fill` has waited for the device.
        Ok(())
    }
}

/// The trainer's buckets as a rollout reads them.
#[derive(Debug)]
pub(crate) struct Incoming {
    storage: Storage,
    slots: u32,
    bucket_bytes: u64,
}

impl Incoming {
    pub(crate) fn open(info: &CudaInfo, device: &DeviceChoice) -> Result<Self> {
        let refuse = |message: String| {
            Error::new(ErrorKind::Protocol, "joining the group", message).rank(Rank::LEADER)
        };
        if device.is_cpu() {
            let message = "the trainer's buckets are on a CUDA device, this rank's device is `cpu`: \
                           set `device` to `cuda` here, or to `cpu` on the trainer";
            return Err(Error::new(ErrorKind::Mismatch, "joining the group", message));
        }
        let device = open(device)?;
        let CudaInfo { slots, bucket_bytes, .. } = *info;
        let bytes = bucket_bytes.checked_mul(slots.into());
        let Some(len) = bytes.and_then(|bytes| usize::try_from(bytes).ok()) else {
            return Err(refuse(format!("{slots} buckets of {bucket_bytes} bytes")));
        };
        let memory = opened(&device, &info.handle, &info.terms, info.export, len)
            .map_err(|error| error.rank(Rank::LEADER))?;
        let packer = Packer::new(&device)?;
        Ok(Self { storage: bucket_storage(&memory, &packer), slots, bucket_bytes })
    }
}

#[async_trait]
impl ReceiveLink for Incoming {
    async fn fetch(&mut self, slot: u32, filled: u64) -> Result<Storage> {
        if slot >= self.slots || filled > self.bucket_bytes {
            let Self { slots, bucket_bytes, .. } = self;
            let message =
                format!("bytes 0..{filled} of slot {slot} of {slots} × {bucket_bytes} bytes");
            return Err(
                Error::new(ErrorKind::Protocol, "fetching a bucket", message).rank(Rank::LEADER)
            );
        }
        let start = u64::from(slot) * self.bucket_bytes;
        Ok(self.storage.slice(start..start + filled))
    }
}
