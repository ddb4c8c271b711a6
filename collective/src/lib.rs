//! Updates by broadcast, over any library of collectives: each bucket goes from a slot of the trainer to the slot of the same number on all
//! other ranks.
//!
//! A backend contributes a [`Library`]: the slots, in memory of some kind ([`MemorySlots`]), and the library's calls ([`Communicator`]), all
//! of which one thread makes ([`Thread`]). [`CollectiveEngine`] does the rest in the same way for every library, over the protocol of
//! [`update`](protocol):
//!
//! - **Order.** The sender enqueues a broadcast when the bucket is filled, and each receiver when the bucket is announced, in the order of
//!   the buckets. Within a group all ranks enqueue the same broadcasts in the same order, and no receiver waits for one that its sender has
//!   not enqueued.
//! - **Overlap.** While a bucket travels, the trainer fills the next slot, and receivers verify and install the previous bucket.
//! - **Groups.** If the library can give up joining, ranks begin to join the groups of the first update as soon as they know one another,
//!   by ids in the leader's metadata, while the trainer still computes. Later they join when the membership changes, after a failed update,
//!   or for every update if the configuration asks for it. All other updates use the existing groups. The announcement of the update
//!   carries what ranks need to join. A failed update breaks its groups on every rank, so that no late broadcast is taken for one of the
//!   next update.
//! - **More than one sender.** With `senders` trainers, trainer *n* modulo their number fills and sends bucket *n*, each trainer in its own
//!   group with all receivers. Other trainers on the leader's host may join as relays, so that the library can use their network
//!   interfaces.
//! - **Colocated rollouts.** A library may not allow two ranks of a group on one device. A rollout on the leader's device is then not a
//!   member of a group: it reads the leader's slots in place, if the library can share memory between processes ([`Share`]). Everything
//!   else is as with every rollout: the leader fills a slot again when all have released it.
//! - **Placed updates.** A trainer and a rollout of [placed updates](::placed) are a group of two, in which the trainer broadcasts parcels
//!   and the rollout answers.
//! - **Deadlines.** The thread watches every broadcast that is under way. One that takes too long breaks its group.

mod engine;
#[cfg(fuzzing)]
pub mod fuzzing;
mod group;
mod memory;
mod parts;
mod placed;
mod thread;

pub use engine::{CollectiveEngine, CollectiveOptions};
pub use memory::MemorySlots;
pub use parts::build_topology;
pub use placed::{
    ParcelsTo, Tensors, host_tensors, own_host_tensors, prepare_placed_rollout,
    prepare_placed_trainer,
};
pub use thread::{Thread, Wait};

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, OwnedMutexGuard};

use engine_core::memory::{Job, Pool};
use engine_core::{EngineContext, Error, ErrorKind, Result, Storage};

/// A library of collectives, which a backend provides.
#[async_trait]
pub trait Library: fmt::Debug + Send + Sync + 'static {
    /// The library's calls.
    type Communicator: Communicator;

    /// The backend's name.
    fn name(&self) -> &'static str;

    /// The default size of each of the two buckets, in bytes.
    fn default_bucket_bytes(&self) -> u64;

    /// Whether slots can be [enlarged](Slots::enlarge). Placed updates then begin with little memory.
    fn enlarges_slots(&self) -> bool {
        false
    }

    /// Loads the library, allocates the slots on the rank's device, and starts the thread.
    ///
    /// # Errors
    ///
    /// `Backend` if the library is missing, `Resource` if there is not enough memory, `Config` for a device that the library does not
    /// support.
    async fn open(
        &self,
        context: &EngineContext,
        shape: Shape,
        pool: &Pool,
    ) -> Result<Opened<Self::Communicator>>;
}

/// The slots that a rank needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Their number.
    pub slots: u32,
    /// The size of each in bytes.
    pub slot_bytes: u64,
}

/// The result of [`Library::open`] for a rank.
#[derive(Debug)]
pub struct Opened<C> {
    /// The thread that makes the library's calls.
    pub thread: Thread<C>,
    /// The rank's slots.
    pub slots: Arc<dyn Slots>,
    /// The name and version of the library, which must be the same on all ranks.
    pub version: String,
    /// Where the slots are, if the library does not allow two ranks of a group on one device.
    pub share: Option<Share>,
}

/// Where a rank's slots are, for ranks that are on the same device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The device, by a name that is the same in all processes of the host.
    pub device: String,
    /// The argument of [`Communicator::attach`], or the reason why the slots cannot be shared. Only the leader's key is used.
    pub key: std::result::Result<Bytes, String>,
}

/// A rank's slots, in the memory that the library broadcasts from and to.
#[async_trait]
pub trait Slots: fmt::Debug + Send + Sync {
    /// Encodes all jobs into a slot, and returns its digest sum if it is wanted, else 0. When this ends, the library can use the bytes.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, work on the slot may go on. The slot's guard is dropped when that has ended.
    ///
    /// # Errors
    ///
    /// Those of the weights, naming them; those of the memory.
    async fn fill(
        &self,
        slot: SlotGuard,
        jobs: Vec<Job>,
        pool: &Pool,
        digests: bool,
    ) -> Result<u64>;

    /// Enlarges a slot to at least this number of bytes. Its contents are lost. Some peers take each weight, however
    /// large, by one broadcast: the engines that send to them need this.
    ///
    /// # Errors
    ///
    /// `Resource` if there is not enough memory; `Config` if slots cannot change their size.
    async fn enlarge(&self, slot: SlotGuard, bytes: u64) -> Result<SlotGuard> {
        let message = format!("slot {} keeps its size; {bytes} bytes are wanted", slot.index());
        Err(Error::new(ErrorKind::Config, "enlarging a slot", message))
    }

    /// Where other processes of the host read a slot, as long as the rank lives: one place on each GPU that has it. The places change when
    /// the slot is [enlarged](Self::enlarge).
    ///
    /// # Errors
    ///
    /// `Backend` if other processes cannot read slots.
    fn shared(&self, slot: &SlotGuard) -> Result<Vec<SharedSlot>> {
        let message =
            format!("slot {} is in memory that other processes cannot read", slot.index());
        Err(Error::new(ErrorKind::Backend, "sharing a slot", message))
    }

    /// The first bytes of a slot, for reading. The guard is dropped with the last view of them.
    ///
    /// # Errors
    ///
    /// `State` for more than there are.
    fn view(&self, slot: SlotGuard, filled: u64) -> Result<Storage>;

    /// Waits until the weights of all fills that have returned are dropped. Called at the end of an update that succeeded.
    fn settle(&self) {}

    /// What made filling the slots slower than possible since the last call, in words for [`SendReport::slower`].
    ///
    /// [`SendReport::slower`]: engine_core::SendReport::slower
    fn slower(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Where other processes of the host read a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedSlot {
    /// The UUID of its device, in lower case and without a prefix.
    pub device: String,
    /// The handle with which the driver opens its allocation.
    pub handle: Vec<u8>,
    /// Where it begins in that allocation, in bytes.
    pub start: u64,
    /// Its size in bytes.
    pub bytes: u64,
}

/// A lock for each slot, so that it has one user at a time.
#[derive(Debug)]
pub struct SlotLocks(Vec<Arc<Mutex<()>>>);

impl SlotLocks {
    /// Locks for this number of slots, all unused.
    pub fn new(slots: u32) -> Self {
        Self((0..slots).map(|_| Arc::default()).collect())
    }

    /// Waits until nobody else uses the slot of this number; `None` if there is no such slot.
    pub async fn lock(&self, slot: u32) -> Option<SlotGuard> {
        let lock = self.0.get(slot as usize)?.clone().lock_owned().await;
        Some(SlotGuard { index: slot, _lock: lock })
    }
}

/// A slot that only its holder uses in this process.
#[derive(Debug)]
pub struct SlotGuard {
    index: u32,
    _lock: OwnedMutexGuard<()>,
}

impl SlotGuard {
    /// The slot's number.
    pub fn index(&self) -> u32 {
        self.index
    }
}

/// The calls of a library of collectives. One thread makes all of them, and does nothing else.
pub trait Communicator: fmt::Debug + 'static {
    /// Makes the id by which the members of a new group find one another. Called on the leader.
    ///
    /// # Errors
    ///
    /// Those of the library.
    fn new_group(&mut self) -> Result<Bytes>;

    /// Makes the ids of several new groups, of which this rank will be a member.
    ///
    /// # Errors
    ///
    /// Those of the library.
    fn new_groups(&mut self, count: usize) -> Result<Vec<Bytes>> {
        (0..count).map(|_| self.new_group()).collect()
    }

    /// Joins a group as member `place` of `size`. Member 0 is the sender. Returns when all have joined.
    ///
    /// # Errors
    ///
    /// `Timeout` if they do not join within `wait`; those of the library.
    fn join(
        &mut self,
        group: usize,
        id: &[u8],
        size: u32,
        place: u32,
        wait: &Wait<'_>,
    ) -> Result<()>;

    /// Whether a [`join`](Self::join) that waits for others ends soon when nobody waits for it any more. Then ranks join the groups of the
    /// first update early: should one of them die meanwhile, the others are free for that update all the same.
    fn can_give_up_joining(&self) -> bool {
        false
    }

    /// Connects the members of a group, if the library would only do it in the group's first broadcast. All members do the same now. Called
    /// after [`join`](Self::join) in groups of this engine, not in those with other programs.
    ///
    /// # Errors
    ///
    /// As [`join`](Self::join).
    fn connect_members(&mut self, group: usize, wait: &Wait<'_>) -> Result<()> {
        let _ = (group, wait);
        Ok(())
    }

    /// Whether the library can remove members from a group without forming it again.
    fn can_shrink(&self) -> bool {
        false
    }

    /// Removes the members at these places from a group in which nothing is under way. All others do the same now. They keep their order.
    ///
    /// # Errors
    ///
    /// As [`join`](Self::join).
    fn shrink(&mut self, group: usize, gone: &[u32], wait: &Wait<'_>) -> Result<()>;

    /// Takes part in the all-reduce of one 32-bit float by which inference servers begin a group, before any
    /// broadcast. Its value does not matter. All members do the same now. The slots keep their contents.
    ///
    /// # Errors
    ///
    /// `Backend` if the library has no such call; as [`join`](Self::join).
    fn greet(&mut self, group: usize, wait: &Wait<'_>) -> Result<()> {
        let _ = (group, wait);
        let message = "the library is used for broadcasts alone";
        Err(Error::new(ErrorKind::Backend, "greeting a group", message))
    }

    /// Enqueues the broadcast of the first `len` bytes of a slot, from member 0 to all others.
    ///
    /// # Errors
    ///
    /// `State` if the rank is not in the group; those of the library.
    fn broadcast(&mut self, group: usize, slot: u32, len: u64, wait: &Wait<'_>) -> Result<()>;

    /// Enqueues the broadcast of a part of a slot, in bytes. Some peers take each weight by a broadcast of its own: the engines
    /// that send to them need this.
    ///
    /// # Errors
    ///
    /// As [`broadcast`](Self::broadcast); `Backend` if the library only broadcasts slots from their beginning.
    fn broadcast_part(
        &mut self,
        group: usize,
        slot: u32,
        part: Range<u64>,
        wait: &Wait<'_>,
    ) -> Result<()> {
        if part.start == 0 {
            return self.broadcast(group, slot, part.end, wait);
        }
        let message =
            format!("slot {slot} is broadcast from its beginning, not from {}", part.start);
        Err(Error::new(ErrorKind::Backend, "broadcasting a part of a slot", message))
    }

    /// Enqueues the broadcast of a part of a slot, in bytes, from the member at a place to all others. Both ends of groups of two need this.
    ///
    /// # Errors
    ///
    /// As [`broadcast`](Self::broadcast); `Backend` if only member 0 can send.
    fn broadcast_from(
        &mut self,
        group: usize,
        place: u32,
        slot: u32,
        part: Range<u64>,
        wait: &Wait<'_>,
    ) -> Result<()> {
        if place == 0 {
            return self.broadcast_part(group, slot, part, wait);
        }
        let message = "the library is used for broadcasts of member 0 alone";
        Err(Error::new(ErrorKind::Backend, "broadcasting to a trainer", message))
    }

    /// The number of the group's broadcasts, in their order, that have ended since it was joined.
    ///
    /// # Errors
    ///
    /// The error with which the group has failed.
    fn ended(&mut self, group: usize) -> Result<u64>;

    /// Waits until all that are attached to a slot can read what [`Slots::fill`] has put into it.
    ///
    /// # Errors
    ///
    /// Those of the library; `Timeout`.
    fn settle(&mut self, slot: u32, wait: &Wait<'_>) -> Result<()> {
        let _ = (slot, wait);
        Ok(())
    }

    /// Maps the leader's slots, by their [`Share::key`], in place of this rank's own, which are freed. Until [`detach`](Self::detach),
    /// views read the leader's slots, and [`broadcast`](Self::broadcast) does nothing.
    ///
    /// # Errors
    ///
    /// Those of the library; `Backend` if it cannot share memory.
    fn attach(&mut self, key: &[u8]) -> Result<()> {
        let _ = key;
        let message = "the library cannot share slots between ranks";
        Err(Error::new(ErrorKind::Backend, "attaching to the leader's slots", message))
    }

    /// Unmaps the leader's slots, after their last view was dropped.
    fn detach(&mut self) {}

    /// Leaves some groups, as [`leave`](Self::leave) does all. In those that stay nothing is under way.
    fn leave_groups(&mut self, groups: &[usize]);

    /// Leaves all groups. Broadcasts that are under way are aborted, and no longer use the slots when this returns.
    ///
    /// It leaves all groups at once: a library that frees one group's resources may wait for the device, and so for broadcasts of another
    /// group that never end.
    fn leave(&mut self);
}
