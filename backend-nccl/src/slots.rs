//! Slots on a GPU, filled and digested there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use collective::{Shape, SharedSlot, SlotGuard, Slots};
use device_cuda::{CudaArena, CudaSlice, Stream};
use engine_core::memory::{Job, Pool};
use engine_core::{DeviceChoice, Error, ErrorKind, Result, Storage};

/// A rank's slots. Clones are the same ones.
#[derive(Clone, Debug)]
pub(crate) struct CudaSlots {
    arena: CudaArena,
    shape: Shape,
    /// Those that were enlarged, in memory of their own.
    enlarged: Arc<Mutex<HashMap<u32, CudaArena>>>,
    /// Where other processes read them, if they do.
    readers: Option<Arc<Readers>>,
}

/// The GPUs on which other processes read slots. Memory there is never given back, because somebody may have it open.
#[derive(Debug)]
struct Readers {
    /// Where readers find a slot, in the order in which the GPUs were asked for: in a copy, or where it was filled.
    places: Vec<Option<usize>>,
    /// The same slots on GPUs other than the one that fills them.
    copies: Vec<Copied>,
}

/// The slots on another GPU.
#[derive(Debug)]
struct Copied {
    slots: CudaSlots,
    stream: Stream,
}

impl CudaSlots {
    pub(crate) fn new(arena: CudaArena, shape: Shape) -> Self {
        Self { arena, shape, enlarged: Arc::default(), readers: None }
    }

    /// Slots on a device that other processes read on these ones, or on the same one if there are none.
    pub(crate) fn shared(
        device: &DeviceChoice,
        readers: &[DeviceChoice],
        shape: Shape,
    ) -> Result<Self> {
        let on = |device: &DeviceChoice| {
            let arena = CudaArena::for_life(device, shape.slots, shape.slot_bytes)?;
            Ok::<_, Error>(Self::new(arena, shape))
        };
        let number = |device: &DeviceChoice| device.ordinal().unwrap_or(0);
        let (mut places, mut copies) = (Vec::new(), Vec::<Copied>::new());
        let mut copied: Vec<u32> = Vec::new();
        for reader in readers {
            if reader.is_cpu() {
                let message = format!("`{reader}` has no memory that a server on a GPU could read");
                return Err(Error::new(ErrorKind::Config, "preparing", message));
            }
            if number(reader) == number(device) {
                places.push(None);
                continue;
            }
            let known = copied.iter().position(|at| *at == number(reader));
            places.push(Some(known.unwrap_or(copies.len())));
            if known.is_none() {
                let slots = on(reader)?;
                let stream = Stream::new(slots.arena.device())?;
                copied.push(number(reader));
                copies.push(Copied { slots, stream });
            }
        }
        if readers.is_empty() {
            places.push(None);
        }
        let readers = Some(Arc::new(Readers { places, copies }));
        Ok(Self { readers, ..on(device)? })
    }

    fn copies(&self) -> &[Copied] {
        self.readers.as_ref().map_or(&[], |readers| &readers.copies)
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

    /// Copies the first bytes of a slot to all other GPUs that have it, at the same time; they are there when this ends.
    fn copy(&self, slot: u32, bytes: usize) -> Result<()> {
        let (arena, at) = self.of(slot);
        let filled = arena.memory().slice(at, bytes)?;
        let begun: Result<Vec<()>> =
            self.copies().iter().map(|copied| copied.begin(slot, &filled)).collect();
        // Also when one of them could not begin, nothing reads the slot any more when this ends.
        let ended: Vec<_> =
            self.copies().iter().map(|copied| copied.stream.synchronize()).collect();
        begun?;
        ended.into_iter().try_for_each(|ended| Ok(ended?))
    }

    /// Makes a slot larger, in memory of its own.
    fn grow(&self, slot: u32, bytes: usize, is_shared: bool) -> Result<()> {
        if self.len(slot) < bytes {
            let own = match is_shared {
                true => self.arena.spare(bytes)?,
                false => self.arena.another(bytes)?,
            };
            self.enlarged().insert(slot, own);
        }
        Ok(())
    }

    /// Where other processes find a slot on this GPU.
    fn place(&self, slot: u32) -> Result<SharedSlot> {
        let (arena, start) = self.of(slot);
        let handle = arena.memory().export()?.to_vec();
        let (device, bytes) = (arena.device().uuid()?, self.len(slot) as u64);
        Ok(SharedSlot { device, handle, start: start as u64, bytes })
    }
}

impl Copied {
    fn begin(&self, slot: u32, filled: &CudaSlice) -> Result<()> {
        let (arena, at) = self.slots.of(slot);
        Ok(arena.memory().slice(at, filled.len())?.copy_from(filled, &self.stream)?)
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
        let filled = jobs.iter().map(|job| job.offset + job.len).max().unwrap_or(0) as usize;
        let (threads, own) = (pool.clone(), self.clone());
        pool.start(move || {
            let sum = arena.fill(at, len, jobs, &threads, digests)?;
            own.copy(slot.index(), filled)?;
            drop(slot);
            Ok(sum)
        })
        .await
    }

    async fn enlarge(&self, slot: SlotGuard, bytes: u64) -> Result<SlotGuard> {
        self.grow(slot.index(), bytes as usize, self.readers.is_some())?;
        for copied in self.copies() {
            copied.slots.grow(slot.index(), bytes as usize, true)?;
        }
        Ok(slot)
    }

    fn settle(&self) {
        self.arena.settle();
    }

    fn slower(&self) -> Vec<String> {
        // Slots that were enlarged share the packer.
        self.arena.slower()
    }

    fn shared(&self, slot: &SlotGuard) -> Result<Vec<SharedSlot>> {
        let Some(readers) = &self.readers else {
            let message = "these slots are given back while others may have them open";
            return Err(Error::new(ErrorKind::State, "sharing a slot", message));
        };
        let found = |place: &Option<usize>| match place {
            None => self.place(slot.index()),
            Some(copy) => readers.copies[*copy].slots.place(slot.index()),
        };
        readers.places.iter().map(found).collect()
    }

    fn view(&self, slot: SlotGuard, filled: u64) -> Storage {
        let (arena, at) = self.of(slot.index());
        arena.storage(at, filled as usize).guarded(slot)
    }
}
