//! The shared memory of a trainer's buckets.

use std::sync::Arc;

use bytes::Bytes;
use engine_core::available_memory;
use rustix::fs::{FallocateFlags, SealFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::error::SegmentError;
use crate::ffi::{Mapping, ReadView, WriteView};
use crate::memfile::{FileAddress, MemFile};

/// What a rollout needs to map a trainer's segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SegmentInfo {
    /// The segment in the trainer's process.
    file: FileAddress,
    pub(crate) slots: u32,
    pub(crate) bucket_bytes: u64,
}

/// The trainer's segment: its buckets, one after the other.
#[derive(Debug)]
pub(crate) struct Segment {
    mapping: Arc<Mapping>,
    info: SegmentInfo,
    /// Held while a slot is written, beyond the future that began it if need be.
    locks: Vec<Arc<Mutex<()>>>,
    /// Keeps its address good for rollouts that join later.
    _file: MemFile,
}

impl Segment {
    /// Allocates a segment. All of its memory is there when this returns.
    pub(crate) fn create(slots: u32, bucket_bytes: u64) -> Result<Self, SegmentError> {
        let too_large = SegmentError::TooLarge(slots, bucket_bytes);
        let Some(len) = bucket_bytes.checked_mul(slots.into()) else { return Err(too_large) };
        let full = || SegmentError::Full { needed: len, available: memory_in_words() };
        let (file, mapping) = allocate("ckpt-engine-buckets", len, full)?;
        close_to_others(&file)?;
        let info = SegmentInfo { file: file.address(), slots, bucket_bytes };
        let locks = (0..slots).map(|_| Arc::default()).collect();
        Ok(Self { mapping: Arc::new(mapping), info, locks, _file: file })
    }

    pub(crate) fn info(&self) -> &SegmentInfo {
        &self.info
    }

    /// A slot to write to, once all earlier writing to it has ended.
    pub(crate) async fn write(&self, slot: usize) -> WriteView {
        let lock = self.locks[slot].clone().lock_owned().await;
        let len = self.info.bucket_bytes as usize;
        WriteView::new(self.mapping.clone(), slot * len, len, lock)
    }
}

/// A trainer's segment as a rollout sees it.
#[derive(Debug)]
pub(crate) struct MappedSegment {
    mapping: Arc<Mapping>,
    info: SegmentInfo,
}

impl MappedSegment {
    /// Maps a segment for reading.
    pub(crate) fn open(info: SegmentInfo) -> Result<Self, SegmentError> {
        let too_large = SegmentError::TooLarge(info.slots, info.bucket_bytes);
        let len = info.bucket_bytes.checked_mul(info.slots.into());
        let Some(len) = len.and_then(|len| usize::try_from(len).ok()) else {
            return Err(too_large);
        };
        let mapping = Mapping::new(&info.file.open()?, len, false)?;
        Ok(Self { mapping: Arc::new(mapping), info })
    }

    /// The first bytes of a slot, in place.
    pub(crate) fn read(&self, slot: u32, filled: u64) -> Result<Bytes, SegmentError> {
        let SegmentInfo { slots, bucket_bytes: bucket, .. } = self.info;
        if slot >= slots || filled > bucket {
            return Err(SegmentError::Outside { slot, filled, slots, bucket });
        }
        let at = slot as usize * bucket as usize;
        Ok(Bytes::from_owner(ReadView::new(self.mapping.clone(), at, filled as usize)))
    }
}

/// A file in memory of so many bytes, all of which are there, and which nobody can make shorter or longer; mapped for writing.
/// The error is that of `full` where there is no memory for it.
pub(crate) fn allocate(
    name: &str,
    len: u64,
    full: impl Fn() -> SegmentError,
) -> Result<(MemFile, Mapping), SegmentError> {
    // There is no limit to such files but memory: taking what is not there would not fail here, but
    // end processes of the kernel's choice.
    if available_memory().is_some_and(|available| len > available) {
        return Err(full());
    }
    let map_len = usize::try_from(len).map_err(|_| full())?;
    let file = MemFile::create(name)?;
    // Without it, memory that is short would show as a bus error at the first write.
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len).map_err(|errno| match errno {
        Errno::NOSPC | Errno::NOMEM | Errno::DQUOT | Errno::FBIG => full(),
        errno => SegmentError::System { call: "fallocate", errno },
    })?;
    file.seal(SealFlags::SHRINK | SealFlags::GROW)?;
    let mapping = Mapping::new(&file, map_len, true)?;
    Ok((file, mapping))
}

/// Seals a file so that no mapping or descriptor that is made from now on can be written through.
fn close_to_others(file: &MemFile) -> Result<(), SegmentError> {
    match file.seal(SealFlags::FUTURE_WRITE | SealFlags::SEAL) {
        // Linux before 5.1, and gVisor, do not know the seal. Rollouts map for reading alone there too.
        Err(SegmentError::System { errno: Errno::INVAL, .. }) => file.seal(SealFlags::SEAL),
        sealed => sealed,
    }
}

/// How much memory there is for buckets, for people.
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

    #[test]
    fn a_process_that_opens_a_segment_can_neither_shorten_nor_change_it() {
        let segment = Segment::create(2, 4096).unwrap();
        let mapped = MappedSegment::open(segment.info().clone()).unwrap();
        let held = mapped.read(1, 4096).unwrap();
        let other =
            OpenOptions::new().read(true).write(true).open(segment.info().file.path()).unwrap();
        for len in [0, 4096, 1 << 20] {
            assert_eq!(other.set_len(len).unwrap_err().raw_os_error(), Some(1), "{len}");
        }
        assert_eq!(other.write_at(b"other", 4096).unwrap_err().raw_os_error(), Some(1));
        assert!(Mapping::new(&other, 4096, true).is_err(), "a mapping to write through");
        assert!(held.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn memory_that_could_become_shorter_or_is_shorter_than_said_is_not_mapped() {
        let file = MemFile::create("ckpt-engine-test").unwrap();
        rustix::fs::ftruncate(&file, 8192).unwrap();
        let info = |slots| SegmentInfo { file: file.address(), slots, bucket_bytes: 4096 };
        let error = MappedSegment::open(info(2)).unwrap_err();
        assert!(matches!(error, SegmentError::Unsealed), "{error}");
        file.seal(SealFlags::SHRINK).unwrap();
        let error = MappedSegment::open(info(3)).unwrap_err();
        assert!(matches!(error, SegmentError::Short { len: 12288, size: 8192 }), "{error}");
        MappedSegment::open(info(2)).unwrap();
        let not_in_memory = std::fs::File::open("/proc/self/exe").unwrap();
        let error = Mapping::new(&not_in_memory, 1, false).unwrap_err();
        assert!(matches!(error, SegmentError::Unsealed), "{error}");
    }
}
