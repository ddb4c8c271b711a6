//! The memory of a rank's buckets: slots in one piece, registered once.

mod ffi;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use engine_core::memory::{Job, Pool};
use engine_core::{DeviceChoice, Storage};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::error::NixlError;
use ffi::{Mapping, ReadView, WriteView};

/// Slots of equal size, each of them with at most one user who may write.
#[derive(Debug)]
pub(crate) struct Arena {
    memory: Memory,
    locks: Vec<Arc<Mutex<()>>>,
    slot_bytes: usize,
}

/// Where an arena is.
#[derive(Clone, Debug)]
enum Memory {
    Host(Arc<Mapping>),
    #[cfg(feature = "cuda")]
    Cuda(device_cuda::CudaArena),
}

impl Arena {
    /// Allocates the slots on a device. All of their memory is there when this returns.
    ///
    /// # Errors
    ///
    /// `Full` or what the device reports if there is not so much memory.
    pub(crate) fn on(device: &DeviceChoice, slots: u32, bytes: u64) -> engine_core::Result<Self> {
        #[cfg(feature = "cuda")]
        if !device.is_cpu() {
            let memory = Memory::Cuda(device_cuda::CudaArena::new(device, slots, bytes)?);
            let locks = (0..slots).map(|_| Arc::default()).collect();
            return Ok(Self { memory, locks, slot_bytes: bytes as usize });
        }
        // The registry has refused all other devices.
        debug_assert!(device.is_cpu());
        Ok(Self::new(slots, bytes)?)
    }

    /// Allocates the slots in host memory. All of it is there when this returns.
    pub(crate) fn new(slots: u32, bytes: u64) -> Result<Self, NixlError> {
        let too_large = NixlError::TooLarge { slots, bytes };
        let Some(total) = bytes.checked_mul(slots.into()) else { return Err(too_large) };
        let (Ok(len), Ok(slot_bytes)) = (usize::try_from(total), usize::try_from(bytes)) else {
            return Err(too_large);
        };
        // Memory that is not there would not fail here, but end processes of the kernel's choice.
        if available_memory().is_some_and(|available| total > available) {
            return Err(NixlError::Full(total));
        }
        let mapping = Mapping::new(len).map_err(|errno| match errno {
            rustix::io::Errno::NOMEM | rustix::io::Errno::AGAIN => NixlError::Full(total),
            errno => NixlError::System { call: "mmap", errno },
        })?;
        let locks = (0..slots).map(|_| Arc::default()).collect();
        Ok(Self { memory: Memory::Host(Arc::new(mapping)), locks, slot_bytes })
    }

    pub(crate) fn slots(&self) -> u32 {
        self.locks.len() as u32
    }

    pub(crate) fn slot_bytes(&self) -> u64 {
        self.slot_bytes as u64
    }

    pub(crate) fn address(&self) -> usize {
        self.memory.address()
    }

    pub(crate) fn len(&self) -> usize {
        self.memory.len()
    }

    /// The number of the CUDA device that it is on; `None` for host memory.
    pub(crate) fn device(&self) -> Option<u32> {
        match &self.memory {
            Memory::Host(_) => None,
            #[cfg(feature = "cuda")]
            Memory::Cuda(memory) => Some(memory.device().ordinal().unsigned_abs()),
        }
    }

    /// Makes this thread one from which libraries can reach the memory.
    pub(crate) fn enter(&self) -> engine_core::Result<()> {
        match &self.memory {
            Memory::Host(_) => Ok(()),
            #[cfg(feature = "cuda")]
            // UCX looks for the context when the agent is made.
            Memory::Cuda(memory) => Ok(memory.device().enter()?),
        }
    }

    /// The first bytes of a slot, once nobody else uses it.
    pub(crate) async fn lock(
        &self,
        slot: u32,
        filled: u64,
        deadline: Duration,
    ) -> Result<Slot, NixlError> {
        let lock = self.locks.get(slot as usize).filter(|_| filled <= self.slot_bytes());
        let Some(lock) = lock else {
            let (slots, bytes) = (self.slots(), self.slot_bytes());
            return Err(NixlError::Outside { slot, filled, slots, bytes });
        };
        let lock = tokio::time::timeout(deadline, lock.clone().lock_owned()).await;
        let lock = lock.map_err(|_| NixlError::InUse { slot, waited: deadline })?;
        let at = slot as usize * self.slot_bytes;
        Ok(Slot { memory: self.memory.clone(), at, len: filled as usize, lock })
    }
}

/// The first bytes of a slot, which nobody else in this process uses.
#[derive(Debug)]
pub(crate) struct Slot {
    memory: Memory,
    at: usize,
    len: usize,
    lock: OwnedMutexGuard<()>,
}

impl Memory {
    fn address(&self) -> usize {
        match self {
            Self::Host(mapping) => mapping.address(),
            #[cfg(feature = "cuda")]
            Self::Cuda(memory) => memory.memory().address() as usize,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Host(mapping) => mapping.len(),
            #[cfg(feature = "cuda")]
            Self::Cuda(memory) => memory.memory().len(),
        }
    }
}

impl Slot {
    /// Where the bytes are: address and length.
    pub(crate) fn range(&self) -> (usize, usize) {
        (self.memory.address() + self.at, self.len)
    }

    /// Encodes all jobs into it, and returns the digest sum if it is wanted, else 0. Blocks.
    pub(crate) fn fill(self, jobs: &[Job], pool: &Pool, digests: bool) -> engine_core::Result<u64> {
        let Self { memory, at, len, lock } = self;
        match memory {
            Memory::Host(mapping) => {
                pool.encode(jobs, WriteView::new(mapping, at, len, lock).as_mut(), digests)
            }
            #[cfg(feature = "cuda")]
            Memory::Cuda(memory) => {
                let result = memory.fill(at, len, jobs, pool, digests);
                drop(lock);
                result
            }
        }
    }

    /// To be read; the slot is in use until the last of these bytes is dropped.
    pub(crate) fn into_storage(self) -> Storage {
        let Self { memory, at, len, lock } = self;
        match memory {
            Memory::Host(mapping) => {
                Bytes::from_owner(ReadView::new(mapping, at, len, lock)).into()
            }
            #[cfg(feature = "cuda")]
            Memory::Cuda(memory) => memory.storage(at, len).guarded(lock),
        }
    }
}

/// Memory that can be had without swapping, in bytes.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}
