//! Slots on a GPU, filled and digested there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use collective::{Shape, SlotGuard, Slots};
use device_cuda::CudaArena;
use engine_core::memory::{Job, Pool};
use engine_core::{Result, Storage};

/// A rank's slots. Clones are the same ones.
#[derive(Clone, Debug)]
pub(crate) struct CudaSlots {
    arena: CudaArena,
    shape: Shape,
    /// Those that were enlarged, in memory of their own.
    enlarged: Arc<Mutex<HashMap<u32, CudaArena>>>,
}

impl CudaSlots {
    pub(crate) fn new(arena: CudaArena, shape: Shape) -> Self {
        Self { arena, shape, enlarged: Arc::default() }
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
            let sum = arena.fill(at, len, &jobs, &threads, digests);
            drop(slot);
            sum
        })
        .await
    }

    async fn enlarge(&self, slot: SlotGuard, bytes: u64) -> Result<SlotGuard> {
        if self.len(slot.index()) < bytes as usize {
            let own = self.arena.another(bytes as usize)?;
            self.enlarged().insert(slot.index(), own);
        }
        Ok(slot)
    }

    fn slower(&self) -> Vec<String> {
        // Slots that were enlarged share the packer.
        self.arena.slower()
    }

    fn view(&self, slot: SlotGuard, filled: u64) -> Storage {
        let (arena, at) = self.of(slot.index());
        arena.storage(at, filled as usize).guarded(slot)
    }
}
