//! A CUDA device's memory as a kind of memory for transports.

use std::any::Any;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use engine_core::changes::ShadowMemory;
use engine_core::memory::{Job, Pool};
use engine_core::provider::{
    Allocation, BucketMemory, BucketSlot, Exported, ImportedMemory, Lifetime, MemoryKind,
    NativeHandle, Reach, SlotBytes,
};
use engine_core::{DeviceChoice, Error, ErrorKind, Result, Storage};

use crate::device::WeakMemory;
use crate::programs::NAME;
use crate::{
    CudaArena, CudaError, CudaMemory, CudaShadows, Device, IpcHandle, Packer, bucket_storage,
};

/// The kind of memory of CUDA devices, to be registered.
pub static MEMORY: &dyn MemoryKind = &Cuda;

#[derive(Debug)]
struct Cuda;

impl MemoryKind for Cuda {
    fn name(&self) -> &'static str {
        NAME
    }

    fn allocate(
        &self,
        device: &DeviceChoice,
        slots: u32,
        bytes: u64,
        lifetime: Lifetime,
    ) -> Result<Allocation> {
        let arena = match lifetime {
            Lifetime::Users => CudaArena::new(device, slots, bytes)?,
            Lifetime::Process => CudaArena::for_life(device, slots, bytes)?,
        };
        Ok(cut(arena, lifetime, slots, bytes))
    }

    fn import(
        &self,
        device: &DeviceChoice,
        handle: &[u8],
        bytes: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Box<dyn ImportedMemory>> {
        let handle = Handle::read(handle)?;
        let device = Device::of(device)?;
        let len = usize::try_from(bytes)
            .map_err(|_| refuse(format!("{bytes} bytes of another process's memory")))?;
        let memory = handle.open(&device, len, owner)?;
        let packer = Packer::new(&device)?;
        Ok(Box::new(Imported { storage: bucket_storage(&memory, &packer) }))
    }

    fn shadows(&self, device: &DeviceChoice) -> Result<Option<Arc<dyn ShadowMemory>>> {
        Ok(Some(Arc::new(CudaShadows::new(&Device::of(device)?)?)))
    }
}

const OPENING: &str = "opening memory of another process";

fn refuse(message: String) -> Error {
    Error::new(ErrorKind::Protocol, OPENING, message)
}

/// Exports memory. Other processes, or this one, pass the result to [`import`].
///
/// CUDA does not define the result of freeing memory that another process has open.
///
/// # Errors
///
/// What the driver reports, if processes cannot open each other's memory.
pub fn export(memory: &CudaMemory) -> std::result::Result<Vec<u8>, CudaError> {
    Ok(export_handle(memory)?.to_bytes())
}

fn export_handle(memory: &CudaMemory) -> std::result::Result<Handle, CudaError> {
    static NUMBERS: AtomicU64 = AtomicU64::new(0);
    let driver = memory.export()?;
    let mut exports = exports();
    exports.retain(|_, memory| memory.upgrade().is_some());
    // Memory that is exported again keeps its number.
    let is_it = |known: &WeakMemory| {
        known.upgrade().is_some_and(|known| known.address() == memory.address())
    };
    let known = exports.iter().find(|(_, known)| is_it(known)).map(|(number, _)| *number);
    let number = known.unwrap_or_else(|| NUMBERS.fetch_add(1, Ordering::Relaxed));
    exports.insert(number, memory.downgrade());
    Ok(Handle { process: std::process::id(), number, driver })
}

/// Opens memory of `len` bytes that a process has exported. `owner` lives as long as it is open.
///
/// # Errors
///
/// `Protocol` for bytes that are no handle, `PeerLost` if memory of this process is gone, and what the driver reports.
pub fn import(
    device: &Device,
    handle: &[u8],
    len: usize,
    owner: Arc<dyn Any + Send + Sync>,
) -> Result<CudaMemory> {
    Handle::read(handle)?.open(device, len, owner)
}

/// The memory of an arena.
#[derive(Debug)]
struct Memory {
    arena: CudaArena,
    lifetime: Lifetime,
}

/// Memory as libraries reach it that move bytes by their addresses. It has no slots.
///
/// Who gives it to a library answers for what that writes there.
pub fn reachable(memory: CudaMemory) -> Arc<dyn BucketMemory> {
    Arc::new(Reachable(memory))
}

#[derive(Debug)]
struct Reachable(CudaMemory);

impl BucketMemory for Reachable {
    #[allow(unsafe_code, reason = "libraries reach it by its address")]
    fn reach(&self) -> Option<Reach> {
        let device = self.0.device().ordinal().unsigned_abs();
        // SAFETY: `self` keeps the memory, which is all of this device. It has no slots.
        Some(unsafe { Reach::new(self.0.address(), Some(device)) })
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn spare(&self, _: u64) -> Result<Box<dyn BucketSlot>> {
        Err(CudaError::Range("memory without slots".into()).into())
    }

    fn enter(&self) -> Result<()> {
        Ok(self.0.device().enter()?)
    }
}

/// The bytes of one slot of an arena. No other slot has them.
#[derive(Debug)]
struct Slot {
    arena: CudaArena,
    memory: Arc<dyn BucketMemory>,
    start: u64,
    len: u64,
}

fn cut(arena: CudaArena, lifetime: Lifetime, slots: u32, bytes: u64) -> Allocation {
    let memory: Arc<dyn BucketMemory> = Arc::new(Memory { arena: arena.clone(), lifetime });
    let slot = |number| -> Box<dyn BucketSlot> {
        let (arena, memory) = (arena.clone(), memory.clone());
        Box::new(Slot { arena, memory, start: u64::from(number) * bytes, len: bytes })
    };
    Allocation { slots: (0..slots).map(slot).collect(), memory: memory.clone() }
}

impl BucketMemory for Memory {
    #[allow(unsafe_code, reason = "libraries reach it by its address")]
    fn reach(&self) -> Option<Reach> {
        let device = self.arena.device().ordinal().unsigned_abs();
        // SAFETY: the arena keeps an allocation of this device as long as `self` lives. `cut` and `spare` make slots of it that do not
        // overlap, and nothing else hands their arenas out.
        Some(unsafe { Reach::new(self.arena.memory().address(), Some(device)) })
    }

    fn len(&self) -> u64 {
        self.arena.memory().len() as u64
    }

    fn spare(&self, bytes: u64) -> Result<Box<dyn BucketSlot>> {
        let len = usize::try_from(bytes).map_err(|_| {
            Error::new(ErrorKind::Resource, "allocating", format!("{bytes} bytes of a device"))
        })?;
        let arena = match self.lifetime {
            Lifetime::Users => self.arena.another(len)?,
            Lifetime::Process => self.arena.spare(len)?,
        };
        let memory = Arc::new(Memory { arena: arena.clone(), lifetime: self.lifetime });
        Ok(Box::new(Slot { arena, memory, start: 0, len: bytes }))
    }

    fn enter(&self) -> Result<()> {
        Ok(self.arena.device().enter()?)
    }

    fn export(&self) -> Result<Exported> {
        let handle = export_handle(self.arena.memory())?;
        let native =
            NativeHandle { device: self.arena.device().uuid()?, handle: handle.driver.to_vec() };
        Ok(Exported { handle: handle.to_bytes(), stays_while_open: true, native: Some(native) })
    }

    fn settle(&self) {
        self.arena.settle();
    }

    fn slower(&self) -> Vec<String> {
        self.arena.slower()
    }
}

impl Slot {
    fn check(&self, filled: u64) -> Result<usize> {
        match filled <= self.len {
            true => Ok(filled as usize),
            false => {
                let words = format!("{filled} bytes of a slot of {}", self.len);
                Err(CudaError::Range(words).into())
            }
        }
    }
}

impl BucketSlot for Slot {
    fn memory(&self) -> &Arc<dyn BucketMemory> {
        &self.memory
    }

    fn start(&self) -> u64 {
        self.start
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn fill(&mut self, filled: u64, jobs: Vec<Job>, pool: &Pool, digests: bool) -> Result<u64> {
        let len = self.check(filled)?;
        self.arena.fill(self.start as usize, len, jobs, pool, digests)
    }

    fn read(&self, filled: u64) -> Result<SlotBytes<'_>> {
        let len = self.check(filled)?;
        match self.arena.storage(self.start as usize, len) {
            Storage::Device(bytes) => Ok(SlotBytes::Device(bytes)),
            // The arena's memory is a device's.
            Storage::Host(_) => Err(CudaError::Range("a slot of the host".into()).into()),
        }
    }
}

/// The exports of this process, by their numbers.
static EXPORTS: LazyLock<Mutex<HashMap<u64, WeakMemory>>> = LazyLock::new(Mutex::default);

fn exports() -> std::sync::MutexGuard<'static, HashMap<u64, WeakMemory>> {
    // Every change is one insertion, or the removal of dropped memory.
    EXPORTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The form in which an export travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Handle {
    /// The process that has exported it.
    process: u32,
    /// Its number among that process's exports.
    number: u64,
    driver: IpcHandle,
}

impl Handle {
    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = self.process.to_le_bytes().to_vec();
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(self.driver);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Self> {
        let words = || refuse(format!("{} bytes are no handle of CUDA memory", bytes.len()));
        Self::from_bytes(bytes).ok_or_else(words)
    }

    fn open(
        self,
        device: &Device,
        len: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<CudaMemory> {
        if self.process != std::process::id() {
            return Ok(CudaMemory::import(device, self.driver, len, owner)?);
        }
        // CUDA does not let a process open its own export.
        let memory = exports().get(&self.number).and_then(WeakMemory::upgrade);
        memory.filter(|memory| memory.len() == len).ok_or_else(|| {
            let message = "the memory that was exported is gone";
            Error::new(ErrorKind::PeerLost, OPENING, message)
        })
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (process, rest) = bytes.split_first_chunk()?;
        let (number, driver) = rest.split_first_chunk()?;
        let (process, number) = (u32::from_le_bytes(*process), u64::from_le_bytes(*number));
        Some(Self { process, number, driver: driver.try_into().ok()? })
    }
}

#[derive(Debug)]
struct Imported {
    storage: Storage,
}

impl ImportedMemory for Imported {
    fn view(&self, bytes: Range<u64>) -> Result<Storage> {
        let len = self.storage.len();
        if bytes.start > bytes.end || bytes.end > len {
            let message = format!("bytes {bytes:?} of {len} of another process's memory");
            return Err(Error::new(ErrorKind::Protocol, "reading a bucket", message));
        }
        Ok(self.storage.slice(bytes))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    #[test]
    fn a_handle_travels_as_bytes_and_others_are_refused_before_a_device_is_looked_for() {
        let handle = Handle { process: 7, number: 1 << 40, driver: [9; size_of::<IpcHandle>()] };
        let bytes = handle.to_bytes();
        assert_eq!(Handle::from_bytes(&bytes), Some(handle));
        for wrong in [&bytes[1..], &[bytes.as_slice(), &[0]].concat(), &[]] {
            let device = DeviceChoice::new("cuda", 0);
            let error = MEMORY.import(&device, wrong, 4096, Arc::new(())).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        }
    }
}
