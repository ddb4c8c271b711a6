//! Updates by broadcast, over any library of collectives: buckets go from the trainer's slots to the slots
//! of the same number on all other ranks.
//!
//! A backend contributes a [`Library`]: memory for the slots ([`Slots`]), and the library's calls
//! ([`Communicator`]), all of which one thread makes ([`Thread`]). [`CollectiveEngine`] does the rest, the
//! same for every library, over the protocol of [`update`](protocol):
//!
//! - **Order.** A broadcast is enqueued by its sender when the bucket is filled, and by each receiver when
//!   the bucket is announced, in the order of the buckets: within a group all ranks enqueue the same
//!   broadcasts in the same order, and no receiver waits for one that its sender has not enqueued.
//! - **Overlap.** While a bucket travels, the trainer fills the next slot, and receivers verify and
//!   install the one before.
//! - **Groups.** Ranks join when the membership changes, after an update that failed, or when the
//!   configuration asks for it each time; all other updates use the groups that are there. What ranks need
//!   to join travels with the announcement of the update. An update that fails breaks its groups on every
//!   rank, so that no late broadcast is ever taken for one of the next update.
//! - **More than one sender.** With `senders` trainers, bucket *n* is filled and sent by the one at *n*
//!   modulo their number, each in a group of its own with all receivers. Other trainers of the leader's
//!   host may join as relays, whose network interfaces the library can use.
//! - **Colocated rollouts.** A library may not let two ranks of a group be on one device. A rollout on the
//!   leader's device is no member of a group then: it reads the leader's slots where they are, if the
//!   library can share memory between processes ([`Share`]). All else is as with every rollout: the leader
//!   fills a slot again when all have released it.
//! - **Deadlines.** The thread looks at every broadcast that is under way; one that takes too long breaks
//!   its group.

mod engine;
#[cfg(fuzzing)]
pub mod fuzzing;
mod group;
mod parts;
mod thread;

pub use engine::{CollectiveEngine, CollectiveOptions};
pub use parts::build_topology;
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

/// A library of collectives, as a backend brings it.
#[async_trait]
pub trait Library: fmt::Debug + Send + Sync + 'static {
    /// Its calls.
    type Communicator: Communicator;

    /// The backend's name.
    fn name(&self) -> &'static str;

    /// The size of each of the two buckets unless one is configured, in bytes.
    fn default_bucket_bytes(&self) -> u64;

    /// Loads the library, allocates the slots on the rank's device, and starts the thread.
    ///
    /// # Errors
    ///
    /// `Backend` if the library is not there, `Resource` if there is not enough memory, `Config` for a
    /// device that the library does not know.
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
    /// How many.
    pub slots: u32,
    /// The size of each in bytes.
    pub slot_bytes: u64,
}

/// What a library has opened for a rank.
#[derive(Debug)]
pub struct Opened<C> {
    /// The thread that makes the library's calls.
    pub thread: Thread<C>,
    /// The rank's slots.
    pub slots: Arc<dyn Slots>,
    /// The library and its version, in words: all ranks need the same.
    pub version: String,
    /// Where the slots are, if the library wants no two ranks of a group on one device.
    pub share: Option<Share>,
}

/// Where a rank's slots are, for ranks that are on the same device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The device, as all processes of the host name it.
    pub device: String,
    /// What [`Communicator::attach`] takes to get at the slots; else why they cannot be shared, in words.
    /// Only the leader's is ever used.
    pub key: std::result::Result<Bytes, String>,
}

/// A rank's slots, in whatever memory the library broadcasts from and to.
#[async_trait]
pub trait Slots: fmt::Debug + Send + Sync {
    /// Encodes all jobs into a slot, and returns its digest sum if it is wanted, else 0. The bytes are
    /// there for the library when this ends.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, work on the slot may go on; its guard is dropped when that has ended.
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

    /// Where other processes of the host read a slot, as long as the rank lives: one place on each GPU that has it. Other
    /// places after the slot was [enlarged](Self::enlarge).
    ///
    /// # Errors
    ///
    /// `Backend` if other processes cannot read slots.
    fn shared(&self, slot: &SlotGuard) -> Result<Vec<SharedSlot>> {
        let message =
            format!("slot {} is in memory that other processes cannot read", slot.index());
        Err(Error::new(ErrorKind::Backend, "sharing a slot", message))
    }

    /// The first bytes of a slot, to be read; the guard is dropped with the last view of them.
    fn view(&self, slot: SlotGuard, filled: u64) -> Storage;

    /// What made filling the slots slower than necessary since the last call, in words for [`SendReport::slower`].
    ///
    /// [`SendReport::slower`]: engine_core::SendReport::slower
    fn slower(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Where other processes of the host read a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedSlot {
    /// The UUID of the device that it is on, in lower case and without a prefix.
    pub device: String,
    /// The handle with which the driver opens the allocation that it is in.
    pub handle: Vec<u8>,
    /// Where it begins in that allocation, in bytes.
    pub start: u64,
    /// Its size in bytes.
    pub bytes: u64,
}

/// Who uses which slot: one at a time.
#[derive(Debug)]
pub struct SlotLocks(Vec<Arc<Mutex<()>>>);

impl SlotLocks {
    /// For this number of slots, all unused.
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

/// The calls of a library of collectives. One thread makes them, and does nothing else.
pub trait Communicator: fmt::Debug + 'static {
    /// What the members of a new group need to find one another. Called on the leader.
    ///
    /// # Errors
    ///
    /// Those of the library.
    fn new_group(&mut self) -> Result<Bytes>;

    /// Joins a group, of which this rank is member `place` of `size`; member 0 is the sender. Ends when all
    /// have joined.
    ///
    /// # Errors
    ///
    /// `Timeout` if they do not within the wait; those of the library.
    fn join(
        &mut self,
        group: usize,
        id: &[u8],
        size: u32,
        place: u32,
        wait: &Wait<'_>,
    ) -> Result<()>;

    /// Whether the library can leave members out of a group without forming it anew.
    fn can_shrink(&self) -> bool {
        false
    }

    /// Leaves the members at these places out of a group in which nothing is under way; all others do the
    /// same now. They keep their order.
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
    /// As [`broadcast`](Self::broadcast); `Backend` where slots are broadcast from their beginning alone.
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

    /// How many of the group's broadcasts, in their order, have ended since it was joined.
    ///
    /// # Errors
    ///
    /// Why the group has failed.
    fn ended(&mut self, group: usize) -> Result<u64>;

    /// Waits until what [`Slots::fill`] has put into a slot is there for all who are attached to it.
    ///
    /// # Errors
    ///
    /// Those of the library; `Timeout`.
    fn settle(&mut self, slot: u32, wait: &Wait<'_>) -> Result<()> {
        let _ = (slot, wait);
        Ok(())
    }

    /// Maps the leader's slots, by their [`Share::key`], in the place of this rank's own, which are freed. Until
    /// [`detach`](Self::detach), views are read from there, and [`broadcast`](Self::broadcast) does nothing.
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

    /// Leaves all groups. Broadcasts that are under way are aborted, and no longer use the slots when this returns.
    ///
    /// It leaves all of them at once: a library that frees one group's resources may wait for the device, and so for
    /// broadcasts of another group that never end.
    fn leave(&mut self);
}
