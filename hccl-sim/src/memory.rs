//! Device memory that the host cannot read, and pinned host memory.
//!
//! Every allocation has two ranges of addresses. Callers get one that nothing may read or write; the
//! memory itself is mapped elsewhere, where only the simulator knows of it. A range that was freed is
//! never given out again, so that later uses of it are found.

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::{Arc, Mutex};

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

use crate::abi::*;
use crate::{Fault, Outcome, fault, lock};

/// What memory holds that nobody has written to.
pub(crate) const POISON: u8 = 0xb5;

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

/// Bytes of a file of memory, mapped for the simulator.
#[derive(Debug)]
pub(crate) struct Backing {
    address: usize,
    len: usize,
    file: OwnedFd,
}

impl Backing {
    fn new(len: usize) -> Result<Self, Fault> {
        let out = |_| fault(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no memory for it");
        let file = rustix::fs::memfd_create("hccl-sim", MemfdFlags::CLOEXEC).map_err(out)?;
        rustix::fs::ftruncate(&file, len as u64).map_err(out)?;
        Self::of(file, len)
    }

    fn of(file: OwnedFd, len: usize) -> Result<Self, Fault> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a mapping of its own at an address that the kernel chooses.
        let map =
            unsafe { rustix::mm::mmap(ptr::null_mut(), len, access, MapFlags::SHARED, &file, 0) };
        let map =
            map.map_err(|_| fault(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host cannot map it"))?;
        Ok(Self { address: map as usize, len, file })
    }

    pub(crate) fn descriptor(&self) -> i32 {
        self.file.as_raw_fd()
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "checked by `find`");
        (self.address + offset) as *mut u8
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing refers into it: every access holds
        // the value.
        let unmapped = unsafe { rustix::mm::munmap(self.address as *mut c_void, self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

/// Some bytes of device memory, or of pinned or other host memory.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    Device {
        backing: Arc<Backing>,
        offset: usize,
        device: i32,
    },
    Pinned {
        backing: Arc<Backing>,
        offset: usize,
    },
    /// The caller's own memory, which it vouches for.
    Host {
        address: usize,
    },
}

impl Place {
    fn pointer(&self, len: usize) -> *mut u8 {
        match self {
            Self::Device { backing, offset, .. } | Self::Pinned { backing, offset } => {
                backing.at(*offset, len)
            }
            Self::Host { address } => *address as *mut u8,
        }
    }

    pub(crate) fn device(&self) -> Option<i32> {
        match self {
            Self::Device { device, .. } => Some(*device),
            Self::Pinned { .. } | Self::Host { .. } => None,
        }
    }

    /// Copies from another place.
    ///
    /// # Safety
    ///
    /// A [`Place::Host`] has to be memory of that length. Threads that access the bytes at the same
    /// time get, as on the hardware, some mixture of them.
    pub(crate) unsafe fn copy_from(&self, from: &Self, len: usize) {
        // SAFETY: both have that length: the simulator's own as found, the host's by contract.
        unsafe { ptr::copy(from.pointer(len), self.pointer(len), len) }
    }

    /// Fills with a value; the same conditions as for `copy_from`.
    ///
    /// # Safety
    ///
    /// As for [`Place::copy_from`].
    pub(crate) unsafe fn fill(&self, value: u8, len: usize) {
        // SAFETY: it has that length, as for `copy_from`.
        unsafe { ptr::write_bytes(self.pointer(len), value, len) }
    }

    /// A copy of the bytes of device memory.
    pub(crate) fn read(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert!(self.device().is_some(), "only device memory is read so");
        // SAFETY: `bytes` has that length, and `pointer` checks it for device memory.
        unsafe { ptr::copy_nonoverlapping(self.pointer(len), bytes.as_mut_ptr(), len) }
        bytes
    }

    /// Writes into device memory.
    pub(crate) fn write(&self, bytes: &[u8]) {
        assert!(self.device().is_some(), "only device memory is written so");
        // SAFETY: `pointer` checks the length for device memory.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), self.pointer(bytes.len()), bytes.len());
        }
    }
}

/// Where an allocation's memory came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Allocated,
    Imported,
}

#[derive(Debug)]
struct Allocation {
    size: usize,
    /// Within the backing; not 0 for memory that is not made of whole pages.
    offset: usize,
    device: i32,
    charged: u64,
    /// Without one, it was freed.
    backing: Option<Arc<Backing>>,
    origin: Origin,
    exported: bool,
}

#[derive(Debug, Default)]
struct State {
    device: BTreeMap<usize, Allocation>,
    pinned: BTreeMap<usize, (usize, Arc<Backing>)>,
    used: HashMap<i32, u64>,
    allocations: u64,
}

/// All memory of the process.
#[derive(Debug)]
pub(crate) struct Memory {
    capacity: u64,
    oom_at: Option<u64>,
    state: Mutex<State>,
}

impl Memory {
    pub(crate) fn new(capacity: u64, oom_at: Option<u64>) -> Self {
        Self { capacity, oom_at, state: Mutex::default() }
    }

    /// Free and total bytes of a device.
    pub(crate) fn info(&self, device: i32) -> (u64, u64) {
        let used = lock(&self.state).used.get(&device).copied().unwrap_or(0);
        (self.capacity - used, self.capacity)
    }

    /// Takes memory that nobody can address, for a communicator.
    pub(crate) fn charge(&self, device: i32, bytes: u64) -> bool {
        let used = &mut lock(&self.state).used;
        let used = used.entry(device).or_default();
        let fits = used.checked_add(bytes).is_some_and(|sum| sum <= self.capacity);
        if fits {
            *used += bytes;
        }
        fits
    }

    pub(crate) fn refund(&self, device: i32, bytes: u64) {
        if let Some(used) = lock(&self.state).used.get_mut(&device) {
            *used = used.saturating_sub(bytes);
        }
    }

    pub(crate) fn allocate(&self, device: i32, size: usize, policy: i32) -> Result<usize, Fault> {
        let policy = i64::from(policy);
        if size == 0 || !(ACL_MEM_MALLOC_HUGE_FIRST..=ACL_MEM_MALLOC_NORMAL_ONLY).contains(&policy)
        {
            return Err(fault(ACL_ERROR_INVALID_PARAM, "a size of 0, or an unknown policy"));
        }
        let huge = policy == ACL_MEM_MALLOC_HUGE_ONLY
            || policy == ACL_MEM_MALLOC_HUGE_FIRST && size > HUGE_PAGE / 2;
        let page = if huge { HUGE_PAGE } else { PAGE };
        // No more than promised: memory that is not made of huge pages begins at some multiple of 64.
        let offset = if huge { 0 } else { 64 };
        let too_much = || fault(ACL_ERROR_RT_MEMORY_ALLOCATION, "the device has not enough memory");
        let len = size
            .checked_add(offset)
            .and_then(|end| end.checked_next_multiple_of(page))
            .ok_or_else(too_much)?;
        let planned_failure = {
            let mut state = lock(&self.state);
            state.allocations += 1;
            self.oom_at == Some(state.allocations)
        };
        if planned_failure || !self.charge(device, len as u64) {
            return Err(too_much());
        }
        let refund = |fault| {
            self.refund(device, len as u64);
            fault
        };
        let backing = Backing::new(len).map_err(refund)?;
        let address = reserve(len, page).map_err(refund)?;
        // SAFETY: the backing has that length and is nobody else's yet.
        unsafe { ptr::write_bytes(backing.at(0, len), POISON, len) };
        let allocation = Allocation {
            size,
            offset,
            device,
            charged: len as u64,
            backing: Some(Arc::new(backing)),
            origin: Origin::Allocated,
            exported: false,
        };
        lock(&self.state).device.insert(address + offset, allocation);
        Ok(address + offset)
    }

    pub(crate) fn free(&self, address: usize) -> Outcome {
        let mut state = lock(&self.state);
        let allocation = state.device.get_mut(&address).filter(|one| one.backing.is_some());
        let Some(allocation) = allocation.filter(|one| one.origin == Origin::Allocated) else {
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, "not an address that aclrtMalloc gave"));
        };
        if allocation.exported {
            let message = "it is exported to other processes";
            return Err(fault(ACL_ERROR_RT_MEMORY_FREE, message));
        }
        // Tasks that use it at this moment hold it a little longer; all later ones fail.
        allocation.backing = None;
        let (device, charged) = (allocation.device, allocation.charged);
        drop(state);
        self.refund(device, charged);
        Ok(())
    }

    /// Allocations that were not freed: of devices, with imported ones, and of the host.
    pub(crate) fn held(&self) -> (usize, usize) {
        let state = lock(&self.state);
        let devices = state.device.values().filter(|one| one.backing.is_some()).count();
        (devices, state.pinned.len())
    }

    /// Frees everything of a device that is reset.
    pub(crate) fn reset(&self, device: i32) {
        let mut state = lock(&self.state);
        for allocation in state.device.values_mut().filter(|one| one.device == device) {
            allocation.backing = None;
        }
        state.used.remove(&device);
    }

    pub(crate) fn allocate_host(&self, size: usize) -> Result<usize, Fault> {
        if size == 0 {
            return Err(fault(ACL_ERROR_INVALID_PARAM, "a size of 0"));
        }
        let backing = Backing::new(size.next_multiple_of(PAGE))?;
        let address = backing.address;
        lock(&self.state).pinned.insert(address, (size, Arc::new(backing)));
        Ok(address)
    }

    pub(crate) fn free_host(&self, address: usize) -> Outcome {
        let removed = lock(&self.state).pinned.remove(&address);
        let message = "not an address that aclrtMallocHost gave";
        removed.map(drop).ok_or_else(|| fault(ACL_ERROR_RT_PARAM_INVALID, message))
    }

    /// What an address is, if so many bytes from it are one thing.
    pub(crate) fn find(&self, address: usize, len: usize) -> Result<Place, Fault> {
        let state = lock(&self.state);
        let Some(end) = address.checked_add(len) else {
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, "beyond the end of all memory"));
        };
        if let Some((&start, allocation)) = state.device.range(..=address).next_back() {
            let reserved = allocation.charged as usize - allocation.offset;
            if address < start + reserved {
                let Some(backing) = &allocation.backing else {
                    let message = format!("{address:#x} was freed");
                    return Err(fault(ACL_ERROR_RT_DEVICE_MEM_ERROR, message));
                };
                if end > start + allocation.size {
                    let message = format!("{address:#x}, {len} bytes: beyond its allocation's end");
                    return Err(fault(ACL_ERROR_RT_DEVICE_MEM_ERROR, message));
                }
                return Ok(Place::Device {
                    backing: Arc::clone(backing),
                    offset: allocation.offset + (address - start),
                    device: allocation.device,
                });
            }
        }
        if let Some((&start, (size, backing))) = state.pinned.range(..=address).next_back()
            && address < start + size
        {
            if end > start + size {
                let message = "beyond the end of the pinned memory";
                return Err(fault(ACL_ERROR_RT_PARAM_INVALID, message));
            }
            return Ok(Place::Pinned { backing: Arc::clone(backing), offset: address - start });
        }
        if let Some((&next, _)) = state.device.range(address..end.max(address + 1)).next() {
            let message = format!("{address:#x} to {end:#x} runs into device memory at {next:#x}");
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, message));
        }
        Ok(Place::Host { address })
    }

    /// Device memory of that device, and nothing else.
    pub(crate) fn find_device(
        &self,
        address: usize,
        len: usize,
        device: i32,
    ) -> Result<Place, Fault> {
        let place = self.find(address, len)?;
        match place.device() {
            Some(own) if own == device => Ok(place),
            Some(other) => Err(fault(
                ACL_ERROR_RT_AICPU_EXCEPTION,
                format!("{address:#x} is memory of device {other}, not of device {device}"),
            )),
            None => Err(fault(
                ACL_ERROR_RT_AICPU_EXCEPTION,
                format!("{address:#x} is not device memory"),
            )),
        }
    }

    /// The memory of a whole allocation, marked as exported.
    pub(crate) fn export(&self, address: usize, size: usize) -> Result<(Arc<Backing>, i32), Fault> {
        let mut state = lock(&self.state);
        let own = |one: &&mut Allocation| {
            one.backing.is_some() && one.origin == Origin::Allocated && !one.exported
        };
        let allocation = state.device.get_mut(&address).filter(own);
        let whole = allocation.filter(|one| one.size == size && one.charged as usize == size);
        let Some(allocation) = whole.filter(|_| address.is_multiple_of(HUGE_PAGE)) else {
            let message = "only a whole allocation of whole huge pages can be exported, and once";
            return Err(fault(ACL_ERROR_RT_PARAM_INVALID, message));
        };
        let Some(backing) = allocation.backing.clone() else {
            return Err(fault(ACL_ERROR_RT_INTERNAL_ERROR, "filtered above"));
        };
        allocation.exported = true;
        Ok((backing, allocation.device))
    }

    pub(crate) fn end_export(&self, address: usize) {
        if let Some(allocation) = lock(&self.state).device.get_mut(&address) {
            allocation.exported = false;
        }
    }

    /// Makes another process's memory addressable here; it is charged to that one.
    pub(crate) fn import(&self, file: OwnedFd, size: usize, device: i32) -> Result<usize, Fault> {
        let backing = Backing::of(file, size)?;
        let address = reserve(size, HUGE_PAGE)?;
        let allocation = Allocation {
            size,
            offset: 0,
            device,
            // What `find` takes for the length of the range; `free` refuses imported memory.
            charged: size as u64,
            backing: Some(Arc::new(backing)),
            origin: Origin::Imported,
            exported: false,
        };
        lock(&self.state).device.insert(address, allocation);
        Ok(address)
    }

    pub(crate) fn end_import(&self, address: usize) {
        if let Some(allocation) = lock(&self.state).device.get_mut(&address) {
            allocation.backing = None;
        }
    }
}

/// A range of addresses, never given back, that nothing can read or write.
fn reserve(len: usize, alignment: usize) -> Result<usize, Fault> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // Enough to align within it, and a gap behind it.
    let total = len + alignment + PAGE;
    // SAFETY: a mapping of its own at an address that the kernel chooses.
    let map =
        unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), total, ProtFlags::empty(), flags) };
    let map = map.map_err(|_| fault(ACL_ERROR_RT_MEMORY_ALLOCATION, "no addresses are left"))?;
    Ok((map as usize).next_multiple_of(alignment))
}
