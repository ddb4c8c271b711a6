//! The shared host memory of a trainer's buckets.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use engine_core::memory::{Job, Pool};
use engine_core::provider::{
    Allocation, BucketMemory, BucketSlot, Exported, ImportedMemory, Lifetime, MemoryKind, SlotBytes,
};
use engine_core::{DeviceChoice, Error, ErrorKind, Result, Storage, available_memory};
use rustix::fs::{FallocateFlags, SealFlags};
use rustix::io::Errno;

use crate::error::SegmentError;
use crate::ffi::{Mapping, ReadView, WriteView};
use crate::memfile::{FileAddress, MemFile};

/// The kind of memory that is host memory which other processes of the host can map.
#[derive(Debug)]
pub(crate) struct SharedMemory;

impl MemoryKind for SharedMemory {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn is_host(&self) -> bool {
        true
    }

    fn allocate(
        &self,
        _: &DeviceChoice,
        slots: u32,
        bytes: u64,
        _: Lifetime,
    ) -> Result<Allocation> {
        Ok(Segment::create(slots, bytes)?)
    }

    fn import(
        &self,
        _: &DeviceChoice,
        handle: &[u8],
        bytes: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Box<dyn ImportedMemory>> {
        let address: FileAddress = serde_json::from_slice(handle).map_err(|error| {
            let message = format!("where the memory is cannot be read: {error}");
            Error::new(ErrorKind::Protocol, "mapping shared memory", message).with_source(error)
        })?;
        let segment = MappedSegment::open(&address, bytes)?;
        Ok(Box::new(MappedSegment { _owner: owner, ..segment }))
    }
}

/// A trainer's shared memory.
#[derive(Debug)]
struct Segment {
    mapping: Arc<Mapping>,
    /// Keeps the address valid for rollouts that join later.
    file: MemFile,
}

/// A part of a [`Segment`].
#[derive(Debug)]
struct Slot {
    bytes: WriteView,
    segment: Arc<dyn BucketMemory>,
}

impl Segment {
    /// Allocates slots. All of their pages are present when this returns.
    fn create(slots: u32, bytes: u64) -> Result<Allocation, SegmentError> {
        let too_large = || SegmentError::TooLarge(slots, bytes);
        let len = bytes.checked_mul(slots.into()).ok_or_else(too_large)?;
        let full = || SegmentError::Full { needed: len, available: memory_in_words() };
        let (file, mapping) = allocate("ckpt-engine-buckets", len, full)?;
        close_to_others(&file)?;
        let parts = mapping.cut(usize::try_from(bytes).map_err(|_| too_large())?);
        let mapping = parts.first().ok_or_else(too_large)?.mapping().clone();
        let memory: Arc<dyn BucketMemory> = Arc::new(Self { mapping, file });
        let slot =
            |bytes| -> Box<dyn BucketSlot> { Box::new(Slot { bytes, segment: memory.clone() }) };
        Ok(Allocation { slots: parts.into_iter().map(slot).collect(), memory: memory.clone() })
    }
}

/// Tries to allocate shared memory. Returns how much is available, in words.
pub(crate) fn probe() -> Result<String, SegmentError> {
    Segment::create(1, 4096).map(|_| memory_in_words())
}

impl BucketMemory for Segment {
    fn len(&self) -> u64 {
        self.mapping.len() as u64
    }

    fn spare(&self, bytes: u64) -> Result<Box<dyn BucketSlot>> {
        let spare = Self::create(1, bytes)?.slots.pop();
        Ok(spare.ok_or(SegmentError::TooLarge(1, bytes))?)
    }

    fn export(&self) -> Result<Exported> {
        let handle = serde_json::to_vec(&self.file.address()).map_err(|error| {
            Error::new(ErrorKind::Protocol, "sharing memory", error.to_string()).with_source(error)
        })?;
        // A mapping keeps the memory, so no lease is needed.
        Ok(Exported { handle, stays_while_open: false, native: None })
    }
}

impl BucketSlot for Slot {
    fn memory(&self) -> &Arc<dyn BucketMemory> {
        &self.segment
    }

    fn start(&self) -> u64 {
        self.bytes.start() as u64
    }

    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn fill(&mut self, filled: u64, jobs: Vec<Job>, pool: &Pool, digests: bool) -> Result<u64> {
        let size = self.bytes.len();
        let outside = SegmentError::OutsideMemory { end: filled, size: size as u64 };
        let bytes = self.bytes.bytes_mut().get_mut(..filled as usize).ok_or(outside)?;
        pool.encode(&jobs, bytes, digests)
    }

    fn read(&self, filled: u64) -> Result<SlotBytes<'_>> {
        let outside = SegmentError::OutsideMemory { end: filled, size: self.bytes.len() as u64 };
        Ok(SlotBytes::Host(self.bytes.bytes().get(..filled as usize).ok_or(outside)?))
    }
}

/// A trainer's shared memory as a rollout sees it.
#[derive(Debug)]
struct MappedSegment {
    mapping: Arc<Mapping>,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl MappedSegment {
    /// Maps this many bytes for reading.
    fn open(file: &FileAddress, bytes: u64) -> Result<Self, SegmentError> {
        let len = usize::try_from(bytes).map_err(|_| SegmentError::TooLarge(1, bytes))?;
        let mapping = Mapping::new(&file.open()?, len, false)?;
        Ok(Self { mapping: Arc::new(mapping), _owner: Arc::new(()) })
    }
}

impl ImportedMemory for MappedSegment {
    fn view(&self, bytes: Range<u64>) -> Result<Storage> {
        let size = self.mapping.len() as u64;
        if bytes.start > bytes.end || bytes.end > size {
            return Err(SegmentError::OutsideMemory { end: bytes.end, size }.into());
        }
        let (at, len) = (bytes.start as usize, (bytes.end - bytes.start) as usize);
        Ok(Bytes::from_owner(ReadView::new(self.mapping.clone(), at, len)).into())
    }
}

/// Creates a memory file of this length, and maps it for writing. All pages are present, and no process can change its
/// length. Without enough memory, the error is that of `full`.
pub(crate) fn allocate(
    name: &str,
    len: u64,
    full: impl Fn() -> SegmentError,
) -> Result<(MemFile, Mapping), SegmentError> {
    // Only memory limits such files. Without this check a file that is too large would not fail here: the
    // kernel would kill processes.
    if available_memory().is_some_and(|available| len > available) {
        return Err(full());
    }
    let map_len = usize::try_from(len).map_err(|_| full())?;
    let file = MemFile::create(name)?;
    // Allocated now: otherwise a lack of memory would be a bus error at the first write.
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len).map_err(|errno| match errno {
        Errno::NOSPC | Errno::NOMEM | Errno::DQUOT | Errno::FBIG => full(),
        errno => SegmentError::System { call: "fallocate", errno },
    })?;
    file.seal(SealFlags::SHRINK | SealFlags::GROW)?;
    let mapping = Mapping::new(&file, map_len, true)?;
    Ok((file, mapping))
}

/// Seals a file against writing through any mapping or descriptor that is made from now on.
fn close_to_others(file: &MemFile) -> Result<(), SegmentError> {
    match file.seal(SealFlags::FUTURE_WRITE | SealFlags::SEAL) {
        // Linux before 5.1 and gVisor do not have this seal. There, too, rollouts only map for reading.
        Err(SegmentError::System { errno: Errno::INVAL, .. }) => file.seal(SealFlags::SEAL),
        sealed => sealed,
    }
}

/// How much memory is available, in words.
pub(crate) fn memory_in_words() -> String {
    match available_memory() {
        Some(bytes) => format!("{} MiB of memory available", bytes >> 20),
        None => "the system does not say how much memory is available".into(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;

    use super::*;

    /// Slots, and the address of their memory.
    fn segment(slots: u32, bytes: u64) -> (Allocation, FileAddress) {
        let allocation = Segment::create(slots, bytes).unwrap();
        let handle = allocation.memory.export().unwrap().handle;
        (allocation, serde_json::from_slice(&handle).unwrap())
    }

    #[test]
    fn a_process_that_opens_a_segment_can_neither_shorten_nor_change_it() {
        let (_kept, address) = segment(2, 4096);
        let mapped = MappedSegment::open(&address, 8192).unwrap();
        let held = mapped.view(4096..8192).unwrap();
        let other = OpenOptions::new().read(true).write(true).open(address.path()).unwrap();
        for len in [0, 4096, 1 << 20] {
            assert_eq!(other.set_len(len).unwrap_err().raw_os_error(), Some(1), "{len}");
        }
        assert_eq!(other.write_at(b"other", 4096).unwrap_err().raw_os_error(), Some(1));
        assert!(Mapping::new(&other, 4096, true).is_err(), "a mapping to write through");
        assert!(held.to_host().unwrap().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn memory_that_could_become_shorter_or_is_shorter_than_said_is_not_mapped() {
        let file = MemFile::create("ckpt-engine-test").unwrap();
        rustix::fs::ftruncate(&file, 8192).unwrap();
        let open = |bytes| MappedSegment::open(&file.address(), bytes);
        let error = open(8192).unwrap_err();
        assert!(matches!(error, SegmentError::Unsealed), "{error}");
        file.seal(SealFlags::SHRINK).unwrap();
        let error = open(12288).unwrap_err();
        assert!(matches!(error, SegmentError::Short { len: 12288, size: 8192 }), "{error}");
        open(8192).unwrap();
        let not_in_memory = std::fs::File::open("/proc/self/exe").unwrap();
        let error = Mapping::new(&not_in_memory, 1, false).unwrap_err();
        assert!(matches!(error, SegmentError::Unsealed), "{error}");
    }

    #[test]
    fn bytes_beyond_a_slot_or_beyond_the_memory_are_refused() {
        let (mut allocation, address) = segment(2, 4096);
        let pool = Pool::new(1).unwrap();
        assert!(allocation.slots[1].fill(4097, Vec::new(), &pool, true).is_err());
        assert!(allocation.slots[1].read(4097).is_err() && allocation.slots[1].read(4096).is_ok());
        let mapped = MappedSegment::open(&address, 8192).unwrap();
        for bytes in [0..8193, 8192..8193, u64::MAX - 1..u64::MAX] {
            let error = mapped.view(bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        }
        assert!(mapped.view(8192..8192).is_ok());
    }
}
