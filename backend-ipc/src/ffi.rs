//! Mapped memory: all of the crate's `unsafe`.
#![allow(unsafe_code, reason = "mapping memory that processes share")]

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use bytes::Bytes;
use placed::HostTensors;
use placed::parcels::Scatter;
use rustix::fs::SealFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::error::SegmentError;

/// A shared mapping of the beginning of a file that cannot become shorter. So reading it is never a bus error,
/// whatever other processes do. It is unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    writable: bool,
}

// SAFETY: the mapping is ordinary memory that is not bound to a thread. The functions below see to it that
// accesses do not conflict.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes, read-only or writable, with all pages present.
    ///
    /// # Errors
    ///
    /// `Unsealed` if a process could shorten the file, `Short` if it is shorter than `len`; `System` if the system
    /// refuses.
    pub(crate) fn new(file: impl AsFd, len: usize, writable: bool) -> Result<Self, SegmentError> {
        let system = |call| move |errno| SegmentError::System { call, errno };
        // `INVAL` means that files of this kind cannot be sealed.
        let seals = match rustix::fs::fcntl_get_seals(&file) {
            Err(Errno::INVAL) => SealFlags::empty(),
            seals => seals.map_err(system("fcntl(F_GET_SEALS)"))?,
        };
        if !seals.contains(SealFlags::SHRINK) {
            return Err(SegmentError::Unsealed);
        }
        let stat = rustix::fs::fstat(&file).map_err(system("fstat"))?;
        if !usize::try_from(stat.st_size).is_ok_and(|size| size >= len) {
            return Err(SegmentError::Short { len, size: stat.st_size });
        }
        let protection =
            if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address that the kernel chooses aliases nothing.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file, 0) }
                .map_err(system("mmap"))?;
        match NonNull::new(start.cast()) {
            Some(start) => Ok(Self { start, len, writable }),
            None => Err(SegmentError::System { call: "mmap", errno: Errno::NOMEM }),
        }
    }

    /// Its first address.
    #[cfg(test)]
    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    fn check(&self, at: usize, len: usize) {
        let end = at.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len), "a range outside the mapping");
    }
}

impl Mapping {
    /// Cuts a writable mapping into as many parts of equal size as fit. They do not overlap.
    ///
    /// It consumes the mapping, so no byte is ever in two parts.
    ///
    /// # Panics
    ///
    /// If the mapping is read-only.
    pub(crate) fn cut(self, part: usize) -> Vec<WriteView> {
        assert!(self.writable, "a mapping for reading alone");
        let count = self.len.checked_div(part).unwrap_or(0);
        let mapping = Arc::new(self);
        let cut = |number| WriteView { mapping: mapping.clone(), at: number * part, len: part };
        (0..count).map(cut).collect()
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// A word of a writable mapping, which all processes access atomically.
    ///
    /// # Panics
    ///
    /// If it is not within the mapping or not at a multiple of its size, or the mapping is read-only.
    pub(crate) fn word(&self, at: usize) -> &AtomicU32 {
        self.check(at, size_of::<AtomicU32>());
        assert!(self.writable && at.is_multiple_of(align_of::<AtomicU32>()), "no place of a word");
        // SAFETY: `check` has made sure that the word is within the mapping.
        let place = unsafe { self.start.as_ptr().add(at) };
        // SAFETY: mapped for writing as long as `self` lives, and aligned because a mapping begins at a page. Nobody accesses a word in
        // another way.
        unsafe { AtomicU32::from_ptr(place.cast()) }
    }

    /// Bytes of a parcel that its trainer has handed over: it writes to them only after the word of their slot says that they are its own
    /// again.
    ///
    /// # Panics
    ///
    /// If the range is not within the mapping.
    pub(crate) fn full(&self, at: usize, len: usize) -> &[u8] {
        self.check(at, len);
        // SAFETY: `check` has made sure that the range is within the mapping.
        let start = unsafe { self.start.as_ptr().add(at) };
        // SAFETY: mapped as long as `self` lives, and the file does not become shorter. Nobody writes to the bytes meanwhile, as the caller's
        // turn says. Any byte is a valid `u8`.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// Writes bytes to a writable mapping that others may write and read at the same time. Each aligned word is written
    /// atomically; the words have no order.
    ///
    /// # Panics
    ///
    /// If the range is not within the mapping, or the mapping is read-only.
    pub(crate) fn put(&self, at: usize, bytes: &[u8]) {
        self.check(at, bytes.len());
        assert!(self.writable, "a mapping for reading alone");
        // SAFETY: `check` has made sure that the range is within the mapping.
        let to = unsafe { self.start.as_ptr().add(at) };
        let head = to.align_offset(align_of::<u64>()).min(bytes.len());
        let (first, rest) = bytes.split_at(head);
        let (words, last) = rest.as_chunks::<8>();
        for (n, byte) in first.iter().enumerate() {
            put_byte(self, at + n, *byte);
        }
        let start = at + head;
        for (n, word) in words.iter().enumerate() {
            // SAFETY: within the range that was checked.
            let place = unsafe { self.start.as_ptr().add(start + n * 8) };
            // SAFETY: mapped for writing as long as `self` lives, and aligned because the mapping is and `head` made it so. All
            // access of this process through this function is atomic.
            let place = unsafe { AtomicU64::from_ptr(place.cast()) };
            place.store(u64::from_ne_bytes(*word), Ordering::Relaxed);
        }
        let start = start + words.len() * 8;
        for (n, byte) in last.iter().enumerate() {
            put_byte(self, start + n, *byte);
        }
    }
}

fn put_byte(mapping: &Mapping, at: usize, byte: u8) {
    mapping.check(at, 1);
    // SAFETY: `check` has made sure that the byte is within the mapping.
    let place = unsafe { mapping.start.as_ptr().add(at) };
    // SAFETY: mapped for writing as long as `mapping` lives; `put`, which calls this, has checked that.
    let place = unsafe { AtomicU8::from_ptr(place) };
    place.store(byte, Ordering::Relaxed);
}

/// Tensors to which a rollout scatters what comes in parcels: bytes with their offsets in what it lends.
pub(crate) fn scattered(tensors: Vec<(u64, Bytes)>) -> Arc<dyn Scatter> {
    // SAFETY: they are lent. They are read only when the thread that scatters has ended, and there is one such thread.
    Arc::new(unsafe { HostTensors::new(tensors) })
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more: every view holds it by `Arc`.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) } {
            tracing::error!(%error, "a segment could not be unmapped");
        }
    }
}

/// A read-only view of a part of a mapping. Nobody writes to the part while the view is read.
#[derive(Debug)]
pub(crate) struct ReadView {
    mapping: Arc<Mapping>,
    at: usize,
    len: usize,
}

impl ReadView {
    /// # Panics
    ///
    /// If the range is not within the mapping.
    pub(crate) fn new(mapping: Arc<Mapping>, at: usize, len: usize) -> Self {
        mapping.check(at, len);
        Self { mapping, at, len }
    }
}

impl AsRef<[u8]> for ReadView {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `new` checked that the range is within the mapping.
        let start = unsafe { self.mapping.start.as_ptr().add(self.at) };
        // SAFETY: the bytes are mapped as long as `self.mapping` lives, and the file does not become
        // shorter. Nobody writes to them, for one of three reasons. The file of a cache is sealed against writing. To a
        // bucket only the trainer writes, and only after every receiver has released it, which the protocol ties to the
        // end of this view. Memory that a rollout lends is read only while its lease is over, so that every process that
        // could write has let go. Any byte is a valid `u8`.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

/// A writable part of a mapping. It shares no byte with any other part.
#[derive(Debug)]
pub(crate) struct WriteView {
    mapping: Arc<Mapping>,
    /// `at + len` is at most the mapping's length, because only `cut` makes these views.
    at: usize,
    len: usize,
}

impl WriteView {
    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Its offset in the mapping.
    pub(crate) fn start(&self) -> usize {
        self.at
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the part lies within the mapping.
        let start = unsafe { self.mapping.start.as_ptr().add(self.at) };
        // SAFETY: mapped as long as `self.mapping` lives. No other part has these bytes, and other processes only map the
        // file for reading, so nobody writes to them while `self` is borrowed. Any byte is a valid `u8`.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the part lies within the mapping.
        let start = unsafe { self.mapping.start.as_ptr().add(self.at) };
        // SAFETY: the bytes are mapped for writing as long as `self.mapping` lives. In this process no other part has
        // them, and `self` is borrowed exclusively. Receivers have released the slot before the engine fills it.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}
