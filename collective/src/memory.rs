//! Slots in memory of any kind.

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::join_all;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use engine_core::memory::{Job, Pool};
use engine_core::provider::{
    Allocation, BucketMemory, BucketSlot, Exported, Lifetime, MemoryKind, SlotBytes,
};
use engine_core::{DType, DeviceChoice, Error, ErrorKind, Result, Storage, Weight};

use super::{Shape, SharedSlot, SlotGuard, Slots};

/// A rank's slots, in memory of any kind. Clones are the same ones.
#[derive(Clone, Debug)]
pub struct MemorySlots {
    memory: Arc<dyn BucketMemory>,
    slots: Arc<[Bucket]>,
    /// Where other processes read them, if they do.
    readers: Option<Arc<Readers>>,
}

/// A slot. Whoever locks it has its guard, so nobody waits for the lock.
type Bucket = Arc<RwLock<Box<dyn BucketSlot>>>;

/// The devices on which other processes read slots. Memory there is never given back, because somebody may have it open.
#[derive(Debug)]
struct Readers {
    /// Where readers find a slot, in the order in which the devices were asked for: in a copy, or where it was filled.
    places: Vec<Option<usize>>,
    /// The same slots on devices other than the one that fills them.
    copies: Vec<MemorySlots>,
}

impl MemorySlots {
    /// Allocates the slots on a device.
    ///
    /// # Errors
    ///
    /// Those of the kind of memory.
    pub fn new(kind: &dyn MemoryKind, device: &DeviceChoice, shape: Shape) -> Result<Self> {
        Self::on(kind, device, shape, Lifetime::Users)
    }

    /// Allocates slots on a device that other processes read on these ones, or on the same one if there are none. A slot that is
    /// filled is copied to the others.
    ///
    /// # Errors
    ///
    /// Those of the kind of memory; `Config` for a reader in host memory.
    pub fn shared(
        kind: &dyn MemoryKind,
        device: &DeviceChoice,
        readers: &[DeviceChoice],
        shape: Shape,
    ) -> Result<Self> {
        let on = |device: &DeviceChoice| Self::on(kind, device, shape, Lifetime::Process);
        let number = |device: &DeviceChoice| device.ordinal().unwrap_or(0);
        let (mut places, mut copies, mut copied) = (Vec::new(), Vec::new(), Vec::new());
        for reader in readers {
            if reader.is_cpu() {
                let message =
                    format!("`{reader}` has no memory that a server on `{device}` could read");
                return Err(Error::new(ErrorKind::Config, "preparing", message));
            }
            if number(reader) == number(device) {
                places.push(None);
                continue;
            }
            let known = copied.iter().position(|at| *at == number(reader));
            places.push(Some(known.unwrap_or(copies.len())));
            if known.is_none() {
                copied.push(number(reader));
                copies.push(on(reader)?);
            }
        }
        if readers.is_empty() {
            places.push(None);
        }
        let readers = Some(Arc::new(Readers { places, copies }));
        Ok(Self { readers, ..on(device)? })
    }

    fn on(
        kind: &dyn MemoryKind,
        device: &DeviceChoice,
        shape: Shape,
        lifetime: Lifetime,
    ) -> Result<Self> {
        Ok(Self::of(kind.allocate(device, shape.slots, shape.slot_bytes, lifetime)?))
    }

    /// The slots of an allocation.
    pub fn of(Allocation { memory, slots }: Allocation) -> Self {
        let slots = slots.into_iter().map(|slot| Arc::new(RwLock::new(slot))).collect();
        Self { memory, slots, readers: None }
    }

    /// The memory of all slots as they were at first.
    pub fn memory(&self) -> &Arc<dyn BucketMemory> {
        &self.memory
    }

    /// The memory that a slot is in, and where it begins there, in bytes.
    ///
    /// # Errors
    ///
    /// `Protocol` if there is no such slot; `State` while it is being filled.
    pub fn place(&self, slot: u32) -> Result<(Arc<dyn BucketMemory>, u64)> {
        let slot = self.read(slot)?;
        Ok((slot.memory().clone(), slot.start()))
    }

    fn slot(&self, slot: u32) -> Result<Bucket> {
        self.slots.get(slot as usize).cloned().ok_or_else(|| {
            let message = format!("slot {slot} of {}", self.slots.len());
            Error::new(ErrorKind::Protocol, USING, message)
        })
    }

    fn read(&self, slot: u32) -> Result<OwnedRwLockReadGuard<Box<dyn BucketSlot>>> {
        self.slot(slot)?.try_read_owned().map_err(|_| in_use(slot))
    }

    fn write(&self, slot: u32) -> Result<OwnedRwLockWriteGuard<Box<dyn BucketSlot>>> {
        self.slot(slot)?.try_write_owned().map_err(|_| in_use(slot))
    }

    fn copies(&self) -> &[Self] {
        self.readers.as_ref().map_or(&[], |readers| &readers.copies)
    }

    /// Encodes jobs into a slot, on the pool. The slot is in use until that has ended.
    fn start(
        &self,
        slot: Arc<SlotGuard>,
        jobs: Vec<Job>,
        pool: &Pool,
        digests: bool,
    ) -> impl Future<Output = Result<u64>> + use<> {
        let filled = jobs.iter().map(|job| job.offset + job.len).max().unwrap_or(0);
        let (own, threads) = (self.clone(), pool.clone());
        pool.start(move || {
            let sum = own.write(slot.index())?.fill(filled, jobs, &threads, digests);
            drop(slot);
            sum
        })
    }

    /// Makes a slot larger, in memory of its own.
    fn grow(&self, slot: u32, bytes: u64) -> Result<()> {
        let mut own = self.write(slot)?;
        if own.len() < bytes {
            *own = self.memory.spare(bytes)?;
        }
        Ok(())
    }

    /// Where other processes find a slot on this device.
    fn shared_here(&self, slot: u32) -> Result<SharedSlot> {
        let own = self.read(slot)?;
        let Exported { native, .. } = own.memory().export()?;
        let native = native.ok_or_else(|| {
            let message = "only this program can open memory of this kind";
            Error::new(ErrorKind::Backend, SHARING, message)
        })?;
        let (start, bytes) = (own.start(), own.len());
        Ok(SharedSlot { device: native.device, handle: native.handle, start, bytes })
    }
}

const USING: &str = "using a slot";
const SHARING: &str = "sharing a slot";

fn in_use(slot: u32) -> Error {
    Error::new(ErrorKind::State, USING, format!("slot {slot} is being filled or read"))
}

#[async_trait]
impl Slots for MemorySlots {
    async fn fill(
        &self,
        slot: SlotGuard,
        jobs: Vec<Job>,
        pool: &Pool,
        digests: bool,
    ) -> Result<u64> {
        let (number, slot) = (slot.index(), Arc::new(slot));
        let filled = jobs.iter().map(|job| job.offset + job.len).max().unwrap_or(0);
        let sum = self.start(slot.clone(), jobs, pool, digests).await?;
        if self.copies().is_empty() || filled == 0 {
            return Ok(sum);
        }
        let bytes = view(self.read(number)?, filled, slot.clone())?;
        let whole = Weight::new("a filled slot", DType::U8, [filled], bytes)?;
        let copy = |copies: &Self| {
            let job = Job { weight: whole.clone(), start: 0, len: filled, offset: 0 };
            copies.start(slot.clone(), vec![job], pool, false)
        };
        // To all of them at the same time; also when one fails, nothing reads the slot any more when this ends.
        let copied = join_all(self.copies().iter().map(copy)).await;
        copied.into_iter().collect::<Result<Vec<_>>>()?;
        Ok(sum)
    }

    async fn enlarge(&self, slot: SlotGuard, bytes: u64) -> Result<SlotGuard> {
        self.grow(slot.index(), bytes)?;
        self.copies().iter().try_for_each(|copies| copies.grow(slot.index(), bytes))?;
        Ok(slot)
    }

    fn shared(&self, slot: &SlotGuard) -> Result<Vec<SharedSlot>> {
        let Some(readers) = &self.readers else {
            let message = "these slots are given back while others may have them open";
            return Err(Error::new(ErrorKind::State, SHARING, message));
        };
        let found = |place: &Option<usize>| match place {
            None => self.shared_here(slot.index()),
            Some(copy) => readers.copies[*copy].shared_here(slot.index()),
        };
        readers.places.iter().map(found).collect()
    }

    fn view(&self, slot: SlotGuard, filled: u64) -> Result<Storage> {
        view(self.read(slot.index())?, filled, slot)
    }

    fn settle(&self) {
        self.memory.settle();
    }

    fn slower(&self) -> Vec<String> {
        // Slots that were enlarged are filled by the same.
        self.memory.slower()
    }
}

/// The first bytes of a slot. `guard` is dropped with the last view of them.
fn view(
    slot: OwnedRwLockReadGuard<Box<dyn BucketSlot>>,
    filled: u64,
    guard: impl Send + Sync + 'static,
) -> Result<Storage> {
    match slot.read(filled)? {
        SlotBytes::Device(bytes) => Ok(Storage::from(bytes).guarded(guard)),
        SlotBytes::Host(_) => {
            Ok(Storage::from(Bytes::from_owner(HostView { slot, filled })).guarded(guard))
        }
    }
}

/// The first bytes of a slot in host memory.
struct HostView {
    slot: OwnedRwLockReadGuard<Box<dyn BucketSlot>>,
    filled: u64,
}

impl AsRef<[u8]> for HostView {
    fn as_ref(&self) -> &[u8] {
        match self.slot.read(self.filled) {
            Ok(SlotBytes::Host(bytes)) => bytes,
            _ => {
                // `view` has read the same bytes, so this cannot fail.
                debug_assert!(false, "a view of no bytes");
                &[]
            }
        }
    }
}
