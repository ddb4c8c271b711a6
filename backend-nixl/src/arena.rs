//! The memory of a rank's buckets: slots in one piece, registered once.
//!
//! # Who may access a slot's bytes
//!
//! A [`Range`] owns the bytes of a slot. It is never copied, and no two ranges share a byte, so neither do two slots. The range is in its
//! slot's lock, and the holder of the lock has it: as a [`Slot`], which gives access to the bytes, or as a [`Lent`] slot, which does not,
//! because a peer was told that it may write there. A lent slot becomes a `Slot` again only with the proof that the peer has [`Quiesced`].
//! Without proof, its range is taken out of the slot and kept aside.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex as Sync, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use engine_core::memory::{Job, Pool};
use engine_core::provider::{
    Allocation, BucketMemory, BucketSlot, Lifetime, MemoryKind, Reach, SlotBytes,
};
use engine_core::{DeviceChoice, Storage};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::error::NixlError;
use crate::host::HostMemory;
use crate::lent::{AskId, Quiesced};

/// Slots of equal size. At most one user may write to each.
#[derive(Debug)]
pub(crate) struct Arena {
    /// The memory of all slots at first.
    home: Memory,
    slots: Vec<Arc<Mutex<Option<Range>>>>,
    /// The places of the slots, readable whichever thread holds their locks; `None` if a slot has lost its memory. Written only where a
    /// range is put into a slot or taken out.
    places: Sync<Vec<Option<Place>>>,
    /// For slots that nobody here uses: what keeps them in use, for messages.
    holders: Sync<BTreeMap<u32, String>>,
    slot_bytes: u64,
}

/// Memory of an arena: what NIXL needs of it, and its owner. Gives no access to any byte of it.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    memory: Arc<dyn BucketMemory>,
    reach: Reach,
}

/// The bytes of one slot, and the right to access them.
#[derive(Debug)]
pub(crate) struct Range {
    bytes: Box<dyn BucketSlot>,
    memory: Memory,
}

/// Where bytes are, and the owner of their memory. No right to access them.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) memory: Memory,
    pub(crate) address: usize,
    pub(crate) len: usize,
}

impl Arena {
    /// Allocates the slots on a device. All of their memory is present when this returns.
    ///
    /// # Errors
    ///
    /// Those of the kind of memory.
    pub(crate) fn on(
        kind: &dyn MemoryKind,
        device: &DeviceChoice,
        slots: u32,
        bytes: u64,
    ) -> engine_core::Result<Self> {
        // UCX keeps its mappings of a peer's device until its process ends, even when that peer has left. CUDA does not define the result
        // of freeing that memory meanwhile.
        let Allocation { memory, slots: ranges } =
            kind.allocate(device, slots, bytes, Lifetime::Process)?;
        let home = Memory::new(memory)?;
        let ranges = ranges.into_iter().map(Range::new).collect::<Result<Vec<_>, _>>()?;
        let places = ranges.iter().map(|range| Some(range.place())).collect();
        let slots = ranges.into_iter().map(|range| Arc::new(Mutex::new(Some(range)))).collect();
        let (places, holders) = (Sync::new(places), Sync::default());
        Ok(Self { home, slots, places, holders, slot_bytes: bytes })
    }

    /// Allocates the slots in host memory.
    ///
    /// # Errors
    ///
    /// `Full` if there is not enough memory.
    pub(crate) fn of_host(slots: u32, bytes: u64) -> engine_core::Result<Self> {
        Self::on(&HostMemory, &DeviceChoice::default(), slots, bytes)
    }

    /// Waits until the weights of all fills that have returned are dropped.
    pub(crate) fn settle(&self) {
        self.home.memory.settle();
    }

    /// What made filling the slots slower than possible since the last call.
    pub(crate) fn slower(&self) -> Vec<String> {
        self.home.memory.slower()
    }

    pub(crate) fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    pub(crate) fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// The address of the first slot, as long as none has moved.
    pub(crate) fn address(&self) -> usize {
        self.home.address()
    }

    /// All memory of slots, each once.
    pub(crate) fn memory(&self) -> Vec<Memory> {
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let all = places.iter().flatten().map(|place| (place.memory.address(), &place.memory));
        let distinct: BTreeMap<usize, &Memory> =
            all.chain([(self.home.address(), &self.home)]).collect();
        distinct.into_values().cloned().collect()
    }

    /// The number of the device that it is on; `None` for host memory.
    pub(crate) fn device(&self) -> Option<u32> {
        self.home.device()
    }

    /// Where the first bytes of a slot are, whether or not it is in use.
    pub(crate) fn place(&self, slot: u32, filled: u64) -> Result<Place, NixlError> {
        self.check(slot, filled)?;
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let place = places.get(slot as usize).and_then(Option::as_ref);
        let place = place.ok_or(NixlError::Vacant { slot })?;
        Ok(Place { len: filled as usize, ..place.clone() })
    }

    fn check(&self, slot: u32, filled: u64) -> Result<(), NixlError> {
        let (slots, bytes) = (self.slots(), self.slot_bytes());
        if slot < slots && filled <= bytes {
            Ok(())
        } else {
            Err(NixlError::Outside { slot, filled, slots, bytes })
        }
    }

    /// More memory of the size of a slot, and of the arena's kind.
    ///
    /// # Errors
    ///
    /// What the device reports if there is not enough memory.
    pub(crate) fn spare(&self) -> Result<Range, NixlError> {
        Range::new(self.home.memory.spare(self.slot_bytes).map_err(NixlError::Device)?)
    }

    /// Takes the range out of a slot that a peer may still write to, and puts `other` into it, if given. The slot is free again, with other
    /// memory or without.
    pub(crate) fn retire(&self, lent: Lent, other: Option<Range>) -> Option<(AskId, Range)> {
        let Lent { slot: Slot { number, mut guard, .. }, ask } = lent;
        let old = guard.take();
        if let Some(range) = other {
            self.put(number, &mut guard, range);
        } else if let Some(place) = self.places().get_mut(number as usize) {
            *place = None;
        }
        old.map(|range| (ask, range))
    }

    /// Puts memory into a slot that has none.
    ///
    /// # Errors
    ///
    /// The range, if the slot has memory, or is locked at this moment.
    pub(crate) fn install(&self, slot: u32, range: Range) -> Result<(), Range> {
        let guard =
            self.slots.get(slot as usize).and_then(|lock| lock.clone().try_lock_owned().ok());
        match guard {
            Some(mut guard) if guard.is_none() => {
                self.put(slot, &mut guard, range);
                Ok(())
            }
            _ => Err(range),
        }
    }

    fn put(&self, slot: u32, guard: &mut OwnedMutexGuard<Option<Range>>, range: Range) {
        if let Some(place) = self.places().get_mut(slot as usize) {
            *place = Some(range.place());
        }
        **guard = Some(range);
    }

    fn places(&self) -> std::sync::MutexGuard<'_, Vec<Option<Place>>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records what keeps a slot in use, for the error of those who wait for it in vain.
    pub(crate) fn hold(&self, slot: u32, by: String) {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner).insert(slot, by);
    }

    /// Locks the first bytes of a slot, once nobody else uses it.
    ///
    /// # Errors
    ///
    /// `InUse` if it is in use until the deadline, `Vacant` if the slot has lost its memory, `Outside` if there is no such slot.
    pub(crate) async fn lock(
        &self,
        slot: u32,
        filled: u64,
        deadline: Duration,
    ) -> Result<Slot, NixlError> {
        self.check(slot, filled)?;
        let lock = self.slots[slot as usize].clone().lock_owned();
        let Some(guard) = engine_core::clock::within(deadline, lock).await else {
            let holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
            let by = holders.get(&slot).cloned();
            let by = by.unwrap_or_else(|| "a view of an older bucket is kept".into());
            return Err(NixlError::InUse { slot, waited: deadline, by });
        };
        self.locked(slot, filled, guard)
    }

    /// Locks the first bytes of a slot, if nobody uses it.
    ///
    /// # Errors
    ///
    /// Those of [`lock`](Self::lock).
    pub(crate) fn try_lock(&self, slot: u32, filled: u64) -> Result<Slot, NixlError> {
        self.check(slot, filled)?;
        let lock = self.slots[slot as usize].clone().try_lock_owned();
        let by = "it was tried once".to_owned();
        let guard = lock.map_err(|_| NixlError::InUse { slot, waited: Duration::ZERO, by })?;
        self.locked(slot, filled, guard)
    }

    fn locked(
        &self,
        slot: u32,
        filled: u64,
        guard: OwnedMutexGuard<Option<Range>>,
    ) -> Result<Slot, NixlError> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner).remove(&slot);
        match &*guard {
            Some(_) => Ok(Slot { number: slot, len: filled as usize, guard }),
            None => Err(NixlError::Vacant { slot }),
        }
    }
}

/// The first bytes of a slot, which nobody else in this process uses and no peer writes to.
#[derive(Debug)]
pub(crate) struct Slot {
    number: u32,
    len: usize,
    /// Always with a range: a slot without one is not handed out.
    guard: OwnedMutexGuard<Option<Range>>,
}

/// A slot whose address was given to a peer to write to. Its contents cannot be accessed.
#[derive(Debug)]
pub(crate) struct Lent {
    slot: Slot,
    ask: AskId,
}

impl Lent {
    /// Returns the slot, if the proof is for this question.
    ///
    /// # Errors
    ///
    /// The lent slot, if the proof is for another question.
    pub(crate) fn back(self, proof: &Quiesced) -> Result<Slot, Self> {
        if proof.is_for(&self.ask) { Ok(self.slot) } else { Err(self) }
    }

    /// The question for which it was lent.
    pub(crate) fn ask(&self) -> &AskId {
        &self.ask
    }

    /// The slot's number.
    pub(crate) fn number(&self) -> u32 {
        self.slot.number
    }
}

impl Memory {
    /// Whether anybody else has it.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.memory) > 1
    }

    /// Prepares this thread for libraries that access the memory: UCX looks for a device's context when the agent is made.
    pub(crate) fn enter(&self) -> engine_core::Result<()> {
        self.memory.enter()
    }

    /// # Errors
    ///
    /// `OutOfReach` for memory without an address.
    pub(crate) fn new(memory: Arc<dyn BucketMemory>) -> Result<Self, NixlError> {
        let reach = memory.reach().ok_or(NixlError::OutOfReach)?;
        Ok(Self { memory, reach })
    }

    /// The number of the device that it is on; `None` for host memory.
    pub(crate) fn device(&self) -> Option<u32> {
        self.reach.device()
    }

    pub(crate) fn address(&self) -> usize {
        // NIXL only exists where a pointer has 64 bits.
        self.reach.address() as usize
    }

    pub(crate) fn len(&self) -> usize {
        self.memory.len() as usize
    }
}

impl Range {
    fn new(bytes: Box<dyn BucketSlot>) -> Result<Self, NixlError> {
        let memory = Memory::new(bytes.memory().clone())?;
        Ok(Self { bytes, memory })
    }

    /// Where the bytes are.
    pub(crate) fn place(&self) -> Place {
        let address = self.memory.address() + self.bytes.start() as usize;
        Place { address, memory: self.memory.clone(), len: self.bytes.len() as usize }
    }
}

impl Slot {
    /// Its number.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// The number of bytes in use.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where the bytes are.
    pub(crate) fn place(&self) -> Result<Place, NixlError> {
        let place = self.guard.as_ref().map(Range::place);
        let place = place.ok_or(NixlError::Vacant { slot: self.number })?;
        Ok(Place { len: self.len, ..place })
    }

    /// Lends the slot to a peer, which is about to be told that it may write there.
    pub(crate) fn lend(self, ask: AskId) -> Lent {
        Lent { slot: self, ask }
    }

    /// Encodes all jobs into it, and returns the digest sum if it is wanted, else 0. Blocks.
    pub(crate) fn fill(
        mut self,
        jobs: Vec<Job>,
        pool: &Pool,
        digests: bool,
    ) -> engine_core::Result<u64> {
        let vacant = NixlError::Vacant { slot: self.number };
        let range = self.guard.as_mut().ok_or(vacant)?;
        range.bytes.fill(self.len as u64, jobs, pool, digests)
    }

    /// The bytes, for reading. The slot is in use until the last of them is dropped.
    pub(crate) fn into_storage(self) -> engine_core::Result<Storage> {
        let vacant = NixlError::Vacant { slot: self.number };
        let range = self.guard.as_ref().ok_or(vacant)?;
        match range.bytes.read(self.len as u64)? {
            SlotBytes::Device(bytes) => Ok(Storage::Device(bytes).guarded(self.guard)),
            SlotBytes::Host(_) => Ok(Bytes::from_owner(View(self)).into()),
        }
    }
}

/// A slot's bytes in host memory, to be read. Peers may read them too.
struct View(Slot);

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        let read = self.0.guard.as_ref().map(|range| range.bytes.read(self.0.len as u64));
        match read {
            Some(Ok(SlotBytes::Host(bytes))) => bytes,
            _ => {
                // `into_storage` has read the same bytes, so this cannot fail.
                debug_assert!(false, "a view of no bytes");
                &[]
            }
        }
    }
}
