//! Slots on a GPU, filled and digested there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use collective::{Shape, SharedSlot, SlotGuard, Slots};
use device_cuda::CudaArena;
use engine_core::memory::{Job, Pool};
use engine_core::{DeviceChoice, Error, ErrorKind, Result, Storage};

/// A rank's slots. Clones are the same ones.
#[derive(Clone, Debug)]
pub(crate) struct CudaSlots {
    arena: CudaArena,
    shape: Shape,
    /// Those that were enlarged, in memory of their own.
    enlarged: Arc<Mutex<HashMap<u32, CudaArena>>>,
    /// Whether other processes read them: then their memory is never given back, because somebody may have it open.
    is_shared: bool,
}

impl CudaSlots {
    pub(crate) fn new(arena: CudaArena, shape: Shape) -> Self {
        Self { arena, shape, enlarged: Arc::default(), is_shared: false }
    }

    /// Slots that other processes read where they are.
    pub(crate) fn shared(device: &DeviceChoice, shape: Shape) -> Result<Self> {
        let arena = CudaArena::for_life(device, shape.slots, shape.slot_bytes)?;
        Ok(Self { is_shared: true, ..Self::new(arena, shape) })
    }

    /// The memory of all slots as they were at first.
    pub(crate) fn arena(&self) -> &CudaArena {
        &self.arena
    }

    fn enlarged(&self) -> MutexGuard<'_, HashMap<u32, CudaArena>> {
        // Insertions are all that happens to the map.
        self.enlarged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory that a slot is in, and where it begins there.
    pub(crate) fn of(&self, slot: u32) -> (CudaArena, usize) {
        match self.enlarged().get(&slot) {
            Some(own) => (own.clone(), 0),
            None => (self.arena.clone(), (u64::from(slot) * self.shape.slot_bytes) as usize),
        }
    }

    fn len(&self, slot: u32) -> usize {
        let enlarged = self.enlarged();
        enlarged.get(&slot).map_or(self.shape.slot_bytes as usize, |own| own.memory().len())
    }
}

#[async_trait]
impl Slots for CudaSlots {
    async fn fill(
        &self,
        slot: SlotGuard,
        jobs: Vec<Job>,
        pool: &Pool,
        digests: bool,
    ) -> Result<u64> {
        let ((arena, at), len) = (self.of(slot.index()), self.len(slot.index()));
        let threads = pool.clone();
        pool.start(move || {
            let sum = arena.fill(at, len, jobs, &threads, digests);
            drop(slot);
            sum
        })
        .await
    }

    async fn enlarge(&self, slot: SlotGuard, bytes: u64) -> Result<SlotGuard> {
        if self.len(slot.index()) < bytes as usize {
            let own = match self.is_shared {
                true => self.arena.spare(bytes as usize)?,
                false => self.arena.another(bytes as usize)?,
            };
            self.enlarged().insert(slot.index(), own);
        }
        Ok(slot)
    }

    fn slower(&self) -> Vec<String> {
        // Slots that were enlarged share the packer.
        self.arena.slower()
    }

    fn shared(&self, slot: &SlotGuard) -> Result<SharedSlot> {
        if !self.is_shared {
            let message = "these slots are given back while others may have them open";
            return Err(Error::new(ErrorKind::State, "sharing a slot", message));
        }
        let (arena, start) = self.of(slot.index());
        let handle = arena.memory().export()?.to_vec();
        let (device, bytes) = (arena.device().uuid()?, self.len(slot.index()) as u64);
        Ok(SharedSlot { device, handle, start: start as u64, bytes })
    }

    fn view(&self, slot: SlotGuard, filled: u64) -> Storage {
        let (arena, at) = self.of(slot.index());
        arena.storage(at, filled as usize).guarded(slot)
    }
}
