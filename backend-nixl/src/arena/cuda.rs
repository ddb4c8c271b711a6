//! An arena on a CUDA device.

use std::sync::{Arc, Mutex, PoisonError};

use device_cuda::{CudaMemory, Device, Packer, bucket_storage};
use engine_core::memory::{Job, Pool};
use engine_core::{DeviceChoice, Error, ErrorKind, Result, Storage};

/// Memory of a device, and what fills it.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    memory: CudaMemory,
    packer: Arc<Mutex<Packer>>,
}

impl Memory {
    pub(super) fn new(device: &DeviceChoice, slots: u32, bytes: u64) -> Result<Self> {
        let ordinal = i32::try_from(device.ordinal().unwrap_or(0)).unwrap_or(i32::MAX);
        let device = Device::open(ordinal)?;
        let total = bytes.checked_mul(slots.into()).and_then(|total| usize::try_from(total).ok());
        let total = total.ok_or_else(|| {
            let message = format!("{slots} slots of {bytes} bytes are too many");
            Error::new(ErrorKind::Config, "preparing", message)
        })?;
        let memory = CudaMemory::new(&device, total)?;
        Ok(Self { memory, packer: Arc::new(Mutex::new(Packer::new(&device)?)) })
    }

    /// Other memory of this device, which the same packer fills.
    pub(super) fn spare(&self, bytes: usize) -> Result<Self> {
        let memory = CudaMemory::new(self.memory.device(), bytes)?;
        Ok(Self { memory, packer: self.packer.clone() })
    }

    pub(super) fn ordinal(&self) -> u32 {
        self.memory.device().ordinal().unsigned_abs()
    }

    /// UCX looks for the context when the agent is made.
    pub(super) fn enter(&self) -> Result<()> {
        Ok(self.memory.device().enter()?)
    }

    pub(super) fn address(&self) -> usize {
        self.memory.address() as usize
    }

    pub(super) fn len(&self) -> usize {
        self.memory.len()
    }

    pub(super) fn fill(
        &self,
        at: usize,
        len: usize,
        jobs: &[Job],
        pool: &Pool,
        digests: bool,
    ) -> Result<u64> {
        let slot = self.memory.slice(at, len)?;
        let mut packer = self.packer.lock().unwrap_or_else(PoisonError::into_inner);
        packer.fill(jobs, &slot, pool, digests)
    }

    pub(super) fn storage(&self, at: usize, len: usize) -> Storage {
        bucket_storage(&self.memory, &self.packer).slice(at as u64..(at + len) as u64)
    }
}
