//! The shared memory of a trainer's buckets.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use engine_core::available_memory;
use rustix::fs::{FallocateFlags, Mode};
use rustix::io::Errno;
use rustix::shm;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::error::SegmentError;
use crate::ffi::{Mapping, ReadView, WriteView};

/// What a rollout needs to map a trainer's segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SegmentInfo {
    /// The trainer's process.
    pub(crate) pid: u32,
    /// The segment's file descriptor there.
    pub(crate) fd: i32,
    /// The file's identity, so that another file behind the same number is noticed.
    pub(crate) device: u64,
    pub(crate) inode: u64,
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
    /// Keeps `/proc/<pid>/fd/<fd>` there for rollouts that join later.
    _file: OwnedFd,
}

impl Segment {
    /// Allocates a segment. All of its memory is there when this returns.
    pub(crate) fn create(slots: u32, bucket_bytes: u64) -> Result<Self, SegmentError> {
        let too_large = SegmentError::TooLarge(slots, bucket_bytes);
        let Some(len) = bucket_bytes.checked_mul(slots.into()) else { return Err(too_large) };
        let Ok(map_len) = usize::try_from(len) else { return Err(too_large) };
        // Shared memory may be larger than memory: taking what is not there would not fail here, but
        // end processes of the kernel's choice.
        if available_memory().is_some_and(|available| len > available) {
            return Err(SegmentError::Full { needed: len, available: shared_memory_in_words() });
        }
        let file = unnamed()?;
        // Without it, a full /dev/shm would show as a bus error at the first write.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len).map_err(
            |errno| match errno {
                Errno::NOSPC | Errno::NOMEM | Errno::DQUOT | Errno::FBIG => {
                    SegmentError::Full { needed: len, available: shared_memory_in_words() }
                }
                errno => SegmentError::System { call: "fallocate", errno },
            },
        )?;
        let mapping = Mapping::new(file.as_fd(), map_len, true)
            .map_err(|errno| SegmentError::System { call: "mmap", errno })?;
        let stat = rustix::fs::fstat(&file)
            .map_err(|errno| SegmentError::System { call: "fstat", errno })?;
        let info = SegmentInfo {
            pid: std::process::id(),
            fd: file.as_raw_fd(),
            device: stat.st_dev,
            inode: stat.st_ino,
            slots,
            bucket_bytes,
        };
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
        let path = format!("/proc/{}/fd/{}", info.pid, info.fd);
        let opened = File::open(&path).and_then(|file| Ok((file.metadata()?, file)));
        let (metadata, file) =
            opened.map_err(|source| SegmentError::Open { path: path.clone(), source })?;
        // A mapping longer than the file would be a bus error later.
        if (metadata.dev(), metadata.ino()) != (info.device, info.inode)
            || metadata.len() < len as u64
        {
            return Err(SegmentError::Replaced { path });
        }
        let mapping = Mapping::new(file.as_fd(), len, false)
            .map_err(|errno| SegmentError::System { call: "mmap", errno })?;
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

/// A file in shared memory without a name: it goes when the last process that has it open ends.
fn unnamed() -> Result<OwnedFd, SegmentError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let flags = shm::OFlags::CREATE | shm::OFlags::EXCL | shm::OFlags::RDWR;
    loop {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("/ckpt-engine-{}-{count}", std::process::id());
        let file = match shm::open(&name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => file,
            // The name of a process that had this id before and died between these two calls.
            Err(Errno::EXIST) => {
                shm::unlink(&name)
                    .map_err(|errno| SegmentError::System { call: "shm_unlink", errno })?;
                continue;
            }
            Err(Errno::NOSPC) => {
                let available = shared_memory_in_words();
                return Err(SegmentError::Full { needed: 0, available });
            }
            Err(errno) => return Err(SegmentError::System { call: "shm_open", errno }),
        };
        shm::unlink(&name).map_err(|errno| SegmentError::System { call: "shm_unlink", errno })?;
        return Ok(file);
    }
}

/// How much shared memory is free, for people.
pub(crate) fn shared_memory_in_words() -> String {
    match rustix::fs::statvfs("/dev/shm") {
        Ok(stat) => {
            let mib = |blocks: u64| blocks.saturating_mul(stat.f_frsize) >> 20;
            format!("{} of {} MiB of shared memory free", mib(stat.f_bavail), mib(stat.f_blocks))
        }
        Err(errno) => format!("/dev/shm cannot be examined: {errno}"),
    }
}
