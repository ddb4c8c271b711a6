//! Kinds of memory that buckets may be in, as values.
//!
//! A transport is written once, against these traits. A program gives its [`Registry`](crate::Registry) the kinds that it has
//! ([`with_memory`](crate::Registry::with_memory)), and the `device` of a configuration names one of them. The host's own
//! memory is none of them: what a transport needs of it (that others can map it, that a network card knows it) differs, so
//! each brings its own, as one more [`MemoryKind`].

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::changes::ShadowMemory;
use crate::memory::{Job, Pool};
use crate::{DeviceBytes, DeviceChoice, Error, ErrorKind, Result, Storage};

/// A kind of memory: of a GPU, of a device that is simulated, of the host with pages of another size.
///
/// # Examples
///
/// `examples/file-memory` of the repository is one, in 200 lines.
pub trait MemoryKind: fmt::Debug + Send + Sync {
    /// Its name, as the `device` of a configuration has it: `gpu` in `gpu:1`.
    fn name(&self) -> &'static str;

    /// Whether the CPU reads and writes it in place.
    fn is_host(&self) -> bool {
        false
    }

    /// Allocates so many slots of so many bytes on a device, on the first one if it has no number. All of the memory is
    /// there when this returns.
    ///
    /// # Errors
    ///
    /// `Config` for more than can be addressed, `Resource` for more than there is, `Backend` without such a device or
    /// what reaches it.
    fn allocate(
        &self,
        device: &DeviceChoice,
        slots: u32,
        bytes: u64,
        lifetime: Lifetime,
    ) -> Result<Allocation>;

    /// Opens memory of so many bytes that a process of this host [exported](BucketMemory::export), this one included, to
    /// be read on a device. `owner` is dropped when it is closed again.
    ///
    /// # Errors
    ///
    /// `Protocol` for a handle that is none of this kind; `PeerLost` if what was exported is gone; those of the device.
    fn import(
        &self,
        device: &DeviceChoice,
        handle: &[u8],
        bytes: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Box<dyn ImportedMemory>> {
        let _ = (device, handle, bytes, owner);
        Err(cannot_share(self.name()))
    }

    /// Memory on a device for the copies that deltas need, and what finds and applies changes there. `None` if this kind has none: then
    /// they lie in host memory.
    ///
    /// # Errors
    ///
    /// Those of [`allocate`](Self::allocate).
    fn shadows(&self, device: &DeviceChoice) -> Result<Option<Arc<dyn ShadowMemory>>> {
        let _ = device;
        Ok(None)
    }
}

/// When memory is given back to its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// With the last user in this process.
    Users,
    /// When this process ends: libraries of other processes may keep it mapped. What nobody here uses any more is used
    /// again.
    Process,
}

/// Memory and what was cut of it.
#[derive(Debug)]
pub struct Allocation {
    /// All of it.
    pub memory: Arc<dyn BucketMemory>,
    /// The slots, which do not overlap.
    pub slots: Vec<Box<dyn BucketSlot>>,
}

/// What other processes open memory with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// For [`MemoryKind::import`].
    pub handle: Vec<u8>,
    /// Whether the memory has to stay as long as another process has it open. If not, the system keeps it for them.
    pub stays_while_open: bool,
    /// How programs that are not this one open it, if they can.
    pub native: Option<NativeHandle>,
}

/// What the driver of a device opens memory with, in any program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NativeHandle {
    /// The device, by a name that is the same in all processes: of a GPU, the UUID in lower case and without a prefix.
    pub device: String,
    /// The driver's handle.
    pub handle: Vec<u8>,
}

/// Where memory is, for libraries that move bytes by their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    address: u64,
    device: Option<u32>,
}

impl Reach {
    /// The address of memory, in host memory or on the device of a number.
    ///
    /// # Safety
    ///
    /// As long as the [`BucketMemory`] that says so lives, all of its bytes are from this address on, readable and writable, and
    /// nobody accesses the bytes of a slot but through the slot. The slots lie where they say, and do not overlap.
    #[allow(unsafe_code, reason = "libraries are given what is promised here")]
    pub unsafe fn new(address: u64, device: Option<u32>) -> Self {
        Self { address, device }
    }

    /// Where the memory begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The number of its device; `None` for host memory.
    pub fn device(&self) -> Option<u32> {
        self.device
    }
}

/// An allocation. It gives no access to its bytes: its slots do.
pub trait BucketMemory: fmt::Debug + Send + Sync {
    /// Where libraries reach it, if they can.
    fn reach(&self) -> Option<Reach> {
        None
    }

    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A slot of so many bytes in memory of its own, of the same kind, device and lifetime.
    ///
    /// # Errors
    ///
    /// `Resource` if there is not so much.
    fn spare(&self, bytes: u64) -> Result<Box<dyn BucketSlot>>;

    /// Makes this thread one from which libraries can reach it.
    ///
    /// # Errors
    ///
    /// Those of the device.
    fn enter(&self) -> Result<()> {
        Ok(())
    }

    /// Lets other processes of the host open it.
    ///
    /// # Errors
    ///
    /// `Backend` if this system does not let them.
    fn export(&self) -> Result<Exported> {
        Err(cannot_share("this kind"))
    }

    /// Waits until the weights of all fills that have returned are dropped. Called at the end of an update that succeeded: what
    /// follows may reuse their memory.
    fn settle(&self) {}

    /// What of filling its slots, and those of spares, was slower than it could be since the last call, in words for
    /// [`SendReport::slower`](crate::SendReport::slower).
    fn slower(&self) -> Vec<String> {
        Vec::new()
    }
}

/// A part of an allocation, and the right to access its bytes: no other slot has one of them.
///
/// A library that was given its address may write to it, too. Who tells it to keeps the slot to himself until that has ended.
pub trait BucketSlot: fmt::Debug + Send + Sync {
    /// What it is a part of.
    fn memory(&self) -> &Arc<dyn BucketMemory>;

    /// Where it begins in that memory, in bytes.
    fn start(&self) -> u64;

    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Encodes all jobs into it, none of them beyond the first `filled` bytes, and returns their digest sum if it is wanted, else 0.
    /// Blocks until all who read the slot find the bytes there. Also when this is an error, nothing reads the weights any more. A thread of
    /// the pool may be about to drop them: [`settle`](BucketMemory::settle) waits for that.
    ///
    /// # Contract
    ///
    /// As [`Pool::encode`], whose threads encode what the device does not.
    ///
    /// # Errors
    ///
    /// The first error of a weight, naming it; those of the device; `State` for more than there is of the slot.
    fn fill(&mut self, filled: u64, jobs: Vec<Job>, pool: &Pool, digests: bool) -> Result<u64>;

    /// Its first bytes, to be read.
    ///
    /// # Errors
    ///
    /// `State` for more than there are.
    fn read(&self, filled: u64) -> Result<SlotBytes<'_>>;
}

/// The bytes of a slot.
#[derive(Debug)]
pub enum SlotBytes<'a> {
    /// In host memory.
    Host(&'a [u8]),
    /// On a device. The bytes change when the slot is filled again, so their holder keeps the slot as long
    /// ([`Storage::guarded`]).
    Device(DeviceBytes),
}

/// Memory of another process of the host, to be read.
pub trait ImportedMemory: fmt::Debug + Send + Sync {
    /// Some bytes of it, in place.
    ///
    /// # Contract
    ///
    /// The process that has exported it does not write to them as long as the view lives.
    ///
    /// # Errors
    ///
    /// `Protocol` for bytes beyond it.
    fn view(&self, bytes: Range<u64>) -> Result<Storage>;
}

fn cannot_share(kind: &str) -> Error {
    let message = format!("other processes cannot open memory of {kind}");
    Error::new(ErrorKind::Backend, "sharing memory", message)
}
