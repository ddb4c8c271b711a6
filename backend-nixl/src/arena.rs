//! The memory of a rank's buckets: slots in one piece, registered once.

mod ffi;

use std::sync::{Arc, Mutex as Sync, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use engine_core::memory::{Job, Pool};
use engine_core::{DeviceChoice, Storage, available_memory};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::error::NixlError;
use ffi::{Mapping, ReadView, WriteView};

/// Slots of equal size, each of them with at most one user who may write.
#[derive(Debug)]
pub(crate) struct Arena {
    memory: Memory,
    /// Where each slot is: in that memory, unless it was replaced.
    places: Sync<Vec<Place>>,
    locks: Vec<Arc<Mutex<()>>>,
    slot_bytes: usize,
}

#[derive(Clone, Debug)]
struct Place {
    memory: Memory,
    at: usize,
}

/// Memory of an arena.
#[derive(Clone, Debug)]
pub(crate) enum Memory {
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
            return Ok(Self::of(memory, slots, bytes as usize));
        }
        // The registry has refused all other devices.
        debug_assert!(device.is_cpu());
        Ok(Self::new(slots, bytes)?)
    }

    /// Allocates the slots in host memory. All of it is there when this returns.
    pub(crate) fn new(slots: u32, bytes: u64) -> Result<Self, NixlError> {
        let too_large = NixlError::TooLarge { slots, bytes };
        let len = bytes.checked_mul(slots.into()).and_then(|total| usize::try_from(total).ok());
        let (Some(len), Ok(slot_bytes)) = (len, usize::try_from(bytes)) else {
            return Err(too_large);
        };
        Ok(Self::of(Memory::on_host(len)?, slots, slot_bytes))
    }

    fn of(memory: Memory, slots: u32, slot_bytes: usize) -> Self {
        let places = (0..slots as usize)
            .map(|slot| Place { memory: memory.clone(), at: slot * slot_bytes })
            .collect();
        let locks = (0..slots).map(|_| Arc::default()).collect();
        Self { memory, places: Sync::new(places), locks, slot_bytes }
    }

    pub(crate) fn slots(&self) -> u32 {
        self.locks.len() as u32
    }

    pub(crate) fn slot_bytes(&self) -> u64 {
        self.slot_bytes as u64
    }

    /// The memory that all slots were in at first.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The number of the CUDA device that it is on; `None` for host memory.
    pub(crate) fn device(&self) -> Option<u32> {
        self.memory.device()
    }

    /// Where the first bytes of a slot are, address and length, whoever uses it.
    pub(crate) fn range(&self, slot: u32, filled: u64) -> Result<(usize, usize), NixlError> {
        let Place { memory, at } = self.place(slot, filled)?;
        Ok((memory.address() + at, filled as usize))
    }

    fn place(&self, slot: u32, filled: u64) -> Result<Place, NixlError> {
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        match places.get(slot as usize).filter(|_| filled <= self.slot_bytes()) {
            Some(place) => Ok(place.clone()),
            None => {
                let (slots, bytes) = (self.slots(), self.slot_bytes());
                Err(NixlError::Outside { slot, filled, slots, bytes })
            }
        }
    }

    /// Memory of the size of a slot, and of the arena's kind.
    ///
    /// # Errors
    ///
    /// `Full` or what the device reports if there is not so much memory.
    pub(crate) fn spare(&self) -> Result<Memory, NixlError> {
        match &self.memory {
            Memory::Host(_) => Memory::on_host(self.slot_bytes),
            #[cfg(feature = "cuda")]
            Memory::Cuda(memory) => {
                memory.spare(self.slot_bytes).map(Memory::Cuda).map_err(NixlError::Device)
            }
        }
    }

    /// Gives a slot other memory, and lets go of it. A peer that still writes to the old memory, which
    /// is returned, disturbs nobody as long as that is kept.
    pub(crate) fn replace(&self, slot: Slot, memory: Memory) -> Memory {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = places.get_mut(slot.number as usize) {
            *place = Place { memory, at: 0 };
        }
        slot.memory
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
        self.place(slot, filled)?;
        let lock = self.locks[slot as usize].clone().lock_owned();
        let lock = tokio::time::timeout(deadline, lock).await;
        let lock = lock.map_err(|_| NixlError::InUse { slot, waited: deadline })?;
        // It may have been replaced while this waited.
        let Place { memory, at } = self.place(slot, filled)?;
        Ok(Slot { number: slot, memory, at, len: filled as usize, lock })
    }
}

/// The first bytes of a slot, which nobody else in this process uses.
#[derive(Debug)]
pub(crate) struct Slot {
    number: u32,
    memory: Memory,
    at: usize,
    len: usize,
    lock: OwnedMutexGuard<()>,
}

impl Memory {
    /// Memory of the host, all of which is there when this returns.
    fn on_host(len: usize) -> Result<Self, NixlError> {
        // Memory that is not there would not fail here, but end processes of the kernel's choice.
        let total = len as u64;
        if available_memory().is_some_and(|available| total > available) {
            return Err(NixlError::Full(total));
        }
        let mapping = Mapping::new(len).map_err(|errno| match errno {
            rustix::io::Errno::NOMEM | rustix::io::Errno::AGAIN => NixlError::Full(total),
            errno => NixlError::System { call: "mmap", errno },
        })?;
        Ok(Self::Host(Arc::new(mapping)))
    }

    /// The number of the CUDA device that it is on; `None` for host memory.
    pub(crate) fn device(&self) -> Option<u32> {
        match self {
            Self::Host(_) => None,
            #[cfg(feature = "cuda")]
            Self::Cuda(memory) => Some(memory.device().ordinal().unsigned_abs()),
        }
    }

    pub(crate) fn address(&self) -> usize {
        match self {
            Self::Host(mapping) => mapping.address(),
            #[cfg(feature = "cuda")]
            Self::Cuda(memory) => memory.memory().address() as usize,
        }
    }

    pub(crate) fn len(&self) -> usize {
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
        let Self { memory, at, len, lock, .. } = self;
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

    /// Its memory; the slot is given back.
    pub(crate) fn into_memory(self) -> Memory {
        self.memory
    }

    /// Its memory; the slot stays in use for ever.
    pub(crate) fn into_memory_for_ever(self) -> Memory {
        std::mem::forget(self.lock);
        self.memory
    }

    /// To be read; the slot is in use until the last of these bytes is dropped.
    pub(crate) fn into_storage(self) -> Storage {
        let Self { memory, at, len, lock, .. } = self;
        match memory {
            Memory::Host(mapping) => {
                Bytes::from_owner(ReadView::new(mapping, at, len, lock)).into()
            }
            #[cfg(feature = "cuda")]
            Memory::Cuda(memory) => memory.storage(at, len).guarded(lock),
        }
    }
}
