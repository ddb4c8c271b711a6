//! Memory of a device as storage for engine-core and the embedding program.

use std::sync::Arc;

use engine_core::{DeviceBytes, DeviceMemory, Result, Storage, Weight, plan::Piece};

use crate::bucket::Packer;
use crate::{CudaMemory, CudaSlice, Device};

impl DeviceMemory for CudaMemory {
    fn device(&self) -> String {
        format!("cuda:{}", CudaMemory::device(self).ordinal())
    }

    fn len(&self) -> u64 {
        CudaMemory::len(self) as u64
    }

    fn read(&self, start: u64, destination: &mut [u8]) -> Result<()> {
        Ok(self.slice(start as usize, destination.len())?.read(destination)?)
    }
}

/// A bucket on a device, which is digested there.
#[derive(Debug)]
struct Bucket {
    memory: CudaMemory,
    packer: Packer,
}

impl DeviceMemory for Bucket {
    fn device(&self) -> String {
        DeviceMemory::device(&self.memory)
    }

    fn len(&self) -> u64 {
        DeviceMemory::len(&self.memory)
    }

    fn read(&self, start: u64, destination: &mut [u8]) -> Result<()> {
        self.memory.read(start, destination)
    }

    fn digest(&self, start: u64, pieces: &[Piece]) -> Result<u64> {
        let rest = self.memory.len().saturating_sub(start as usize);
        self.packer.digest(&self.memory.slice(start as usize, rest)?, pieces)
    }
}

/// Copies a weight to a device. The memory is freed with the last clone.
///
/// # Errors
///
/// Those of the weight's encoding; what the driver reports.
pub fn upload(device: &Device, weight: &Weight) -> Result<Weight> {
    let bytes = weight.to_bytes()?;
    let memory = CudaMemory::new(device, bytes.len())?;
    memory.all().write(&bytes)?;
    Weight::from_meta(weight.meta().clone(), memory.all().storage())
}

/// Buckets on a device, one after the other in an allocation, as receivers see them. `packer` digests them.
pub fn bucket_storage(memory: &CudaMemory, packer: &Packer) -> Storage {
    let bucket = Bucket { memory: memory.clone(), packer: packer.clone() };
    DeviceBytes::new(Arc::new(bucket)).into()
}

impl CudaSlice {
    /// The same bytes as the storage of a weight. Nothing is copied.
    #[must_use]
    pub fn storage(&self) -> Storage {
        let whole = Storage::from(DeviceBytes::new(Arc::new(self.memory().clone())));
        let start = self.start() as u64;
        whole.slice(start..start + self.len() as u64)
    }

    /// The memory of a storage, if it is a CUDA device's.
    pub fn of_storage(storage: &Storage) -> Option<Self> {
        let (memory, bytes) = memory_of(storage)?;
        memory.slice(bytes.start() as usize, bytes.len() as usize).ok()
    }
}

/// The number of the device that a storage is on, and its address there, if it is a CUDA device's.
pub(crate) fn address_of(storage: &Storage) -> Option<(i32, u64)> {
    let (memory, bytes) = memory_of(storage)?;
    let end = bytes.start().checked_add(bytes.len());
    end.filter(|&end| end <= memory.len() as u64)?;
    Some((memory.device().ordinal(), memory.address() + bytes.start()))
}

fn memory_of(storage: &Storage) -> Option<(&CudaMemory, &DeviceBytes)> {
    let bytes = storage.device()?;
    let memory: &dyn std::any::Any = &**bytes.memory();
    let memory = match memory.downcast_ref::<CudaMemory>() {
        Some(memory) => memory,
        None => &memory.downcast_ref::<Bucket>()?.memory,
    };
    Some((memory, bytes))
}
