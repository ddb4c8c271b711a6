//! The memory of a rank's buckets.

use engine_core::memory::{Job, Pool};
use engine_core::{DeviceChoice, Error, ErrorKind, Result, Storage};

use crate::{CudaError, CudaMemory, Device, Packer, bucket_storage};

/// Slots for buckets in one piece of a device's memory, and the packer that fills them.
///
/// It does not know which slots are in use. Backends ensure that nobody reads a slot while it is written.
#[derive(Clone, Debug)]
pub struct CudaArena {
    memory: CudaMemory,
    packer: Packer,
}

impl CudaArena {
    /// Allocates `slots` slots of `bytes` bytes on a device; on the first one if it has no number.
    ///
    /// # Errors
    ///
    /// `Config` for more than can be addressed, `Resource` if there is not enough memory, `Backend` without a driver or such a device.
    pub fn new(device: &DeviceChoice, slots: u32, bytes: u64) -> Result<Self> {
        Self::of(device, slots, bytes, CudaMemory::new)
    }

    /// As [`new`](Self::new), in memory that is [never given back](CudaMemory::for_life).
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new).
    pub fn for_life(device: &DeviceChoice, slots: u32, bytes: u64) -> Result<Self> {
        Self::of(device, slots, bytes, CudaMemory::for_life)
    }

    fn of(
        device: &DeviceChoice,
        slots: u32,
        bytes: u64,
        allocate: impl FnOnce(&Device, usize) -> Result<CudaMemory, CudaError>,
    ) -> Result<Self> {
        let device = Device::of(device)?;
        let total = bytes.checked_mul(slots.into()).and_then(|total| usize::try_from(total).ok());
        let total = total.ok_or_else(|| {
            let message = format!("{slots} slots of {bytes} bytes are too many");
            Error::new(ErrorKind::Config, "preparing", message)
        })?;
        let memory = allocate(&device, total)?;
        Ok(Self { memory, packer: Packer::new(&device)? })
    }

    /// Other memory of this device, which the same packer fills.
    ///
    /// # Errors
    ///
    /// `Resource` if there is not enough memory.
    pub fn another(&self, bytes: usize) -> Result<Self> {
        let memory = CudaMemory::new(self.memory.device(), bytes)?;
        Ok(Self { memory, packer: self.packer.clone() })
    }

    /// Other memory of this device that is [never given back](CudaMemory::for_life), which the same packer
    /// fills.
    ///
    /// # Errors
    ///
    /// `Resource` if there is not enough memory.
    pub fn spare(&self, bytes: usize) -> Result<Self> {
        let memory = CudaMemory::for_life(self.memory.device(), bytes)?;
        Ok(Self { memory, packer: self.packer.clone() })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        self.memory.device()
    }

    /// All slots.
    pub fn memory(&self) -> &CudaMemory {
        &self.memory
    }

    /// Encodes all jobs into the bytes from `at` on, and returns their digest sum if it is wanted, else 0. Blocks until the bytes have
    /// arrived. When it returns, the device reads none of the weights any more, not even after an error.
    ///
    /// # Errors
    ///
    /// Those of [`Packer::fill`].
    pub fn fill(
        &self,
        at: usize,
        len: usize,
        jobs: Vec<Job>,
        pool: &Pool,
        digests: bool,
    ) -> Result<u64> {
        let slot = self.memory.slice(at, len)?;
        self.packer.fill(jobs, &slot, pool, digests)
    }

    /// As [`Packer::settle`], for all slots and spares.
    pub fn settle(&self) {
        self.packer.settle();
    }

    /// As [`Packer::slower`], for all slots and spares.
    pub fn slower(&self) -> Vec<String> {
        self.packer.slower()
    }

    /// The bytes from `at` on, for reading. They are digested on the device.
    ///
    /// # Panics
    ///
    /// If there are fewer bytes.
    pub fn storage(&self, at: usize, len: usize) -> Storage {
        bucket_storage(&self.memory, &self.packer).slice(at as u64..(at + len) as u64)
    }
}
