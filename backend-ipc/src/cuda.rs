//! Buckets on a CUDA device as the links of the update protocol: the trainer exports them, rollouts on
//! the same GPU, or on one with peer access to it, read them in place.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use async_trait::async_trait;
use device_cuda::{CudaError, CudaMemory, Device, Packer, bucket_storage};
use engine_core::memory::{Job, Pool};
use engine_core::plan::ALIGNMENT;
use engine_core::update::{ReceiveLink, SendLink};
use engine_core::{DeviceChoice, Error, ErrorKind, Rank, Result, Storage};
use serde::{Deserialize, Serialize};

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
    handle: Vec<u8>,
    pid: u32,
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

/// The trainer's buckets.
#[derive(Debug)]
pub(crate) struct Buckets {
    memory: CudaMemory,
    packer: Arc<Mutex<Packer>>,
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
        let too_large = || {
            let message = format!("{slots} × {bucket_bytes} bytes of buckets are too many");
            Error::new(ErrorKind::Config, "preparing", message)
        };
        let bytes = bucket_bytes.checked_mul(slots.into()).ok_or_else(too_large)?;
        let memory = CudaMemory::new(&device, usize::try_from(bytes).map_err(|_| too_large())?)?;
        let handle = match memory.export() {
            Ok(handle) => handle.to_vec(),
            Err(reason) => return Ok(Err(reason)),
        };
        let packer = Arc::new(Mutex::new(Packer::new(&device)?));
        let mut exports = exports();
        let export = exports.keys().max().map_or(0, |last| last + 1);
        exports.insert(export, memory.clone());
        let info = CudaInfo { handle, pid: std::process::id(), export, slots, bucket_bytes };
        Ok(Ok(Self { memory, packer, info }))
    }

    pub(crate) fn info(&self) -> &CudaInfo {
        &self.info
    }
}

impl Drop for Buckets {
    fn drop(&mut self) {
        exports().remove(&self.info.export);
    }
}

/// The device of a configuration: the first one if it names none.
fn open(device: &DeviceChoice) -> Result<Device> {
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
        self.pool
            .start(move || {
                let len = buckets.info.bucket_bytes as usize;
                let bucket = buckets.memory.slice(slot * len, len)?;
                // Held to the end of the work, also if nobody waits for that any more.
                let mut packer = buckets.packer.lock().unwrap_or_else(PoisonError::into_inner);
                packer.fill(&jobs, &bucket, &pool, digests)
            })
            .await
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
        let memory = if info.pid == std::process::id() {
            let memory = exports().get(&info.export).filter(|memory| memory.len() == len).cloned();
            memory.ok_or_else(|| refuse("the trainer's buckets are gone".into()))?
        } else {
            let handle = info.handle.as_slice().try_into();
            let handle = handle.map_err(|_| refuse("a handle of a wrong length".into()))?;
            CudaMemory::import(&device, handle, len)
                .map_err(|error| Error::from(error).rank(Rank::LEADER))?
        };
        let packer = Arc::new(Mutex::new(Packer::new(&device)?));
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
